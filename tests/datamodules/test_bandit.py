"""Bandits as instances and files, and what is refused, with its place."""

import numpy as np
import pytest
import torch

from datamodules.bandit_files import from_file
from datamodules.bandit_instances import linear, mdp, minimax, skewed, table, tail, uniform
from datamodules.rounds import Doubling
from lightning_modules.theory.feedback import Preferences
from tests.theory.playing import offline, play, served

ETA = 6.0


def test_rounds_double_and_then_go_on_evenly():
    chunks = Doubling(40, 8)
    assert chunks.ends == [1, 2, 4, 8, 16, 24, 32, 40]
    assert torch.cat([chunks[i]["rounds"] for i in range(len(chunks))]).tolist() == list(range(40))
    assert Doubling(5, 100).ends == [1, 2, 4, 5]
    assert Doubling(3, 1).ends == [1, 2, 3]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: skewed([1.0, 0.4, 0.0], None, 1e6, ETA, 0.5), r"coverage=1e\+06 is infeasible: at eta=6 .* 1 and"),
        (lambda: skewed([1.0, 0.4, 0.0], None, 0.5, ETA, 0.5), "coverage=0.5 is infeasible"),
        (lambda: skewed([0.0, 1.0], None, 2.0, ETA, 0.5), "best reward at action 0"),
        (lambda: skewed([1.0, 0.0], 0.5, 2.0, ETA, 0.5), "give one of them, the other null"),
        (lambda: skewed([1.0, 0.0], 1.0, None, ETA, 0.5), "p=1.0 must lie in"),
        (lambda: uniform(1, 0.5), "fewer than two actions"),
        (lambda: uniform(5, -1.0), "noise=-1.0 must be a standard deviation"),
        (lambda: tail(50, 0.02, 1.0), "48 bad actions must be one or more"),
        (lambda: minimax(5, [8], 0.5), "each at least 20"),
        (lambda: minimax(5, [], 0.5), "horizons="),
        (lambda: linear(5, 4, 0, 0.5, 0), "features=0 must be positive"),
        (lambda: mdp(0, 4, 3, 0.25, 0), "steps=0"),
        (lambda: table("mine", [0.1, 0.2], [0.0, 1.0], 0.5), "probability 0 at context 0, action 0"),
        (lambda: table("mine", [0.1, 0.2], [0.4, 0.5], 0.5), "sums to 0.9 in context 0"),
        (lambda: table("mine", [0.1, float("nan")], [0.4, 0.6], 0.5), "context 0, action 1 is nan"),
        (lambda: table("mine", [0.1, 0.2, 0.3], [0.4, 0.6], 0.5), "tables of the same contexts"),
    ],
)
def test_what_makes_no_bandit_is_refused_by_name(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_tables_come_from_npz_and_from_rows(tmp_path):
    reference, reward = np.array([[0.2, 0.8], [0.5, 0.5]]), np.array([[0.1, 0.9], [0.3, 0.7]])
    np.savez(tmp_path / "b.npz", pi0=reference, reward=reward, d0=np.array([0.25, 0.75]))
    rows = [f"{x},{a},{reference[x, a]},{reward[x, a]},{(0.25, 0.75)[x]}" for x in (0, 1) for a in (0, 1)]
    (tmp_path / "b.csv").write_text("\n".join(["context,action,pi0,reward,d0", *rows]))
    for name in ("b.npz", "b.csv"):
        bandit = from_file(str(tmp_path / name), 0.5, None)
        torch.testing.assert_close(bandit.log_reference.exp(), torch.from_numpy(reference))
        torch.testing.assert_close(bandit.reward, torch.from_numpy(reward))
        assert bandit.contexts.tolist() == [0.25, 0.75]
        assert bandit.reward_range == (0.0, 1.0)
    np.savez(tmp_path / "wide.npz", pi0=reference, reward=3 * reward)
    assert from_file(str(tmp_path / "wide.npz"), 0.5, None).reward_range == pytest.approx((0.0, 2.7))


def test_an_action_that_is_never_taken_is_left_out_and_said_so(tmp_path, caplog):
    np.savez(tmp_path / "b.npz", pi0=np.array([[0.2, 0.0, 0.8]]), reward=np.array([[0.1, 0.5, 0.9]]))
    bandit = from_file(str(tmp_path / "b.npz"), 0.5, None)
    assert bandit.reward.tolist() == [[0.1, 0.9]]
    assert "never takes action 1" in caplog.text
    np.savez(tmp_path / "b.npz", pi0=np.array([[0.2, 0.0, 0.8], [0.2, 0.2, 0.6]]), reward=np.ones((2, 3)))
    with pytest.raises(ValueError, match="probability 0 at context 0, action 1"):
        from_file(str(tmp_path / "b.npz"), 0.5, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("context,action,pi0,reward\n0,0,0.5,0.1\n0,1,0.5,nan\n", "line 3: reward is 'nan'"),
        ("context,action,pi0,reward\n0,0,0.5,0.1\n0,0,0.5,0.3\n", "give each pair once"),
        ("context,action,reward\n0,0,0.1\n", "no column pi0"),
        ("context,action,pi0,reward\n", "no rows"),
        ("context,action,pi0,reward\n0,-1,0.5,0.1\n", "line 2: action is '-1'"),
    ],
)
def test_rows_that_make_no_bandit_are_refused_with_their_line(tmp_path, text, reason):
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        from_file(str(tmp_path / "b.csv"), 0.5, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("context,action,reward\n0,0,0.5\n0,1,NaN\n", "line 3: reward is 'NaN'"),
        ("context,action,reward\n0,0,0.5\n0,2,0.5\n", "line 3: action is 2, and the instance has 0 to 1"),
        ("context,action,reward\n1,0,0.5\n", "line 2: context is 1"),
        ("context,action,reward\n0,0,\n", "line 2: reward is ''"),
        ("context,action1,action2,label\n0,0,1,2\n", "line 2: label is '2'"),
        ("context,action,reward,propensity\n0,0,0.5,0\n", "line 2: propensity is 0"),
        ("context,reward\n0,0.5\n", "no column action"),
    ],
)
def test_logs_are_refused_with_their_line(tmp_path, text, reason):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        served(skewed([0.6, 0.4], 0.5, None, ETA, 0.5), 8, 8, str(tmp_path / "log.csv"))


def test_a_log_is_learned_from_row_by_row(tmp_path, caplog):
    bandit = skewed([0.6, 0.4], 0.5, None, ETA, 0.5)
    (tmp_path / "log.csv").write_text("context,action,reward,propensity\n0,0,0.5,0.9\n0,1,0.25,0.1\n0,0,0.7,0.9\n")
    data = served(bandit, 8, 8, str(tmp_path / "log.csv"))
    assert "another policy than the reference" in caplog.text
    method = offline(bandit, ETA, 0.0, 4, 8)
    again = type(method)(
        **{name: getattr(method, name) for name in ("eta", "feedback", "bonus", "decision", "regularizer", "copies")},
        seed=1, fit_from=1, eps=[], at=[],
    )  # fmt: skip
    again.meet(data)
    play(again, data)
    assert again.rounds == [1, 2, 3]
    assert again.statistics[0, 0].tolist() == [[2, pytest.approx(1.2)], [1, pytest.approx(0.25)]]
    assert again.constants()["mean_divergence"] == pytest.approx(float((again.best.exp() / data.log.behaviour).sum()))


def test_a_log_of_pairs_is_one_of_wins(tmp_path):
    bandit = skewed([0.6, 0.4], 0.5, None, ETA, 0.5)
    (tmp_path / "log.csv").write_text("context,action1,action2,label\n0,0,1,1\n0,1,0,1\n0,0,1,1\n0,1,1,0\n")
    data = served(bandit, 8, 8, str(tmp_path / "log.csv"))
    wins = Preferences().logged(bandit, data.log, slice(0, 4))
    assert wins[0, 0].tolist() == [[0, 2], [1, 0]]
