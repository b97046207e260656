from math import comb

import pytest
import torch

from lightning_modules.alignment.accuracy import AnswerAccuracy, bootstrap_interval, maj_at_k, pass_at_k


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(8, 3, 1, 0.375), (8, 3, 4, 0.928571), (20, 1, 10, 0.5), (8, 0, 4, 0.0), (8, 6, 4, 1.0)],
)
def test_pass_at_k_has_its_published_values(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(torch.tensor([n]), torch.tensor([c]), k).item() == pytest.approx(expected, abs=5e-7)


def test_pass_at_k_is_exact_where_factorials_overflow() -> None:
    cases = [(1000, c, 300) for c in (0, 1, 5, 700, 701, 1000)]
    n, c, _ = torch.tensor(cases).T
    expected = [1 - comb(n - c, k) / comb(n, k) for n, c, k in cases]
    assert pass_at_k(n, c, 300).tolist() == pytest.approx(expected, abs=1e-12)


def test_pass_at_one_is_the_mean_accuracy() -> None:
    n, c = torch.tensor([8, 8, 4]), torch.tensor([3, 8, 0])
    torch.testing.assert_close(pass_at_k(n, c, 1), c.double() / n)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_k_beyond_the_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k} of 4"):
        pass_at_k(torch.tensor([8, 4]), torch.tensor([1, 1]), k)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["7", "7", "8"], "7", True),
        (["7", "8", "8"], "7", False),
        (["7", "8", "8", "7"], "7", True),  # a tie goes to the first seen
        (["8", "7", "7", "8"], "7", False),
        ([None, None, None, "7"], "7", True),  # no answer, no vote
        ([None, None], "7", False),
        ([], "7", False),
    ],
)
def test_majority_vote(answers: list[str | None], right: str, expected: bool) -> None:
    assert maj_at_k(answers, [answer == right for answer in answers]) is expected


def test_majority_vote_needs_a_verdict_for_each_answer() -> None:
    with pytest.raises(ValueError, match="2 answers but 1"):
        maj_at_k(["7", "8"], [True])


def test_bootstrap_interval_is_the_normal_one_for_many_prompts() -> None:
    values = (torch.arange(1319) < 1055).double()  # 80 % of GSM8K's test split: a standard error of 1.1 points
    low, high = bootstrap_interval(values, seed=0, resamples=4000)
    mean = values.mean().item()
    assert (low, high) == pytest.approx((mean - 1.96 * 0.011, mean + 1.96 * 0.011), abs=1.5e-3)


def test_bootstrap_interval_depends_on_the_seed_alone() -> None:
    values = torch.rand(50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_bootstrap_interval_widens_with_its_level_and_closes_on_a_constant() -> None:
    values = torch.rand(50)
    low, high = bootstrap_interval(values, seed=0, level=0.5)
    wide_low, wide_high = bootstrap_interval(values, seed=0, level=0.99)
    assert wide_low < low < values.mean() < high < wide_high
    assert bootstrap_interval(torch.ones(5), seed=0) == (1.0, 1.0)
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(values, seed=0, level=1.0)


def rows(*index: int) -> dict[str, torch.Tensor]:
    """What became of four responses to each of these prompts; every prompt has its own numbers."""
    i = torch.tensor(index, dtype=torch.long)
    return {
        "index": i,
        "greedy_correct": i % 2 == 0,
        "sampled": torch.full_like(i, 4),
        "correct": i % 5,
        "majority_correct": i % 5 > 2,
        "extracted": 4 - i % 2,
        "finished": 4 - i % 3,
        "length": 10.0 + i / 7,
    }


def on_processes(*parts: AnswerAccuracy) -> AnswerAccuracy:
    """The first of the metrics as it is when one process holds each."""

    def gather(state: torch.Tensor, group=None) -> list[torch.Tensor]:
        (name,) = [name for name in AnswerAccuracy.COLUMNS if getattr(parts[0], name)[0] is state]
        return [torch.cat(getattr(part, name) or [torch.tensor([])]) for part in parts]

    parts[0].dist_sync_fn = gather
    parts[0].distributed_available_fn = lambda: True
    return parts[0]


def measured(*updates: dict[str, torch.Tensor], **options) -> AnswerAccuracy:
    metric = AnswerAccuracy(**{"k": 4, **options})
    for update in updates:
        metric.update(**update)
    return metric


def test_scores_are_means_over_prompts() -> None:
    scores = measured(rows(0, 1), rows(3)).compute()
    expected = {
        "greedy": 1 / 3,
        "sampled": (0 + 1 + 3) / 12,
        "pass@4": 2 / 3,
        "maj@4": 1 / 3,
        "format_rate": 10 / 12,
        "unfinished_rate": 1 / 12,
        "mean_length": 10 + 4 / 21,
        "n": 3,
    }
    assert {name: score.item() for name, score in scores.items()} == pytest.approx(expected, abs=1e-6)
    assert all(score.is_floating_point() for score in scores.values())


def test_one_process_and_two_score_alike_to_the_last_bit() -> None:
    one = measured(rows(*range(7)))
    # a distributed sampler interleaves the prompts and repeats the first to even out the processes
    two = on_processes(measured(rows(0, 2, 4, 6)), measured(rows(1, 3, 5, 0)))
    assert two.compute() == one.compute()
    assert two.intervals(seed=3) == one.intervals(seed=3)
    assert two.compute()["n"] == 7


def test_a_process_without_prompts_is_no_obstacle() -> None:
    assert on_processes(measured(rows(0, 1, 2)), measured()).compute() == measured(rows(0, 1, 2)).compute()


def test_intervals_hold_the_scores() -> None:
    metric = measured(rows(*range(40)))
    scores, intervals = metric.compute(), metric.intervals()
    assert set(intervals) == set(scores) - {"n"}
    for name, (low, high) in intervals.items():
        assert low < scores[name] < high


def test_without_samples_the_greedy_responses_are_described() -> None:
    row = rows(0, 1, 2, 3)
    greedy = {name: row[name] for name in ("index", "greedy_correct", "length")}
    counts = {"extracted": torch.tensor([1, 1, 1, 0]), "finished": torch.tensor([1, 0, 1, 0])}
    scores = measured({**greedy, **counts}, k=0).compute()
    assert set(scores) == {"greedy", "format_rate", "unfinished_rate", "mean_length", "n"}
    assert (scores["greedy"], scores["format_rate"], scores["unfinished_rate"]) == (0.5, 0.75, 0.5)


def test_without_greedy_decoding_there_is_no_greedy_score() -> None:
    row = rows(0, 1)
    del row["greedy_correct"]
    assert "greedy" not in measured(row, greedy=False).compute()


def test_a_missing_column_is_named() -> None:
    row = rows(0, 1)
    del row["correct"]
    with pytest.raises(ValueError, match="no correct given"):
        measured(row)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        AnswerAccuracy(k=0, greedy=False)
