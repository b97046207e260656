"""Sweeps as they are given on the command line: every trial once, whatever happens to whom."""

import os
import signal

import pytest
import yaml

from tests.waiting import alive, until

pytest_plugins = ["tests.tools.places"]


def test_two_agents_carry_out_fifty_trials_and_none_twice(place):
    place.write(method="bayes", parameters={"x": {"min": 0.0, "max": 1.0}, "kind": {"values": ["a", "b"]}})
    status, out, err = place.sweep("--agents", "2", "--trials", "50")
    assert status == 0, err
    assert place.states() == ["COMPLETE"] * 50
    assert len(place.notes("started")) == 50
    assert {trial.user_attrs["agent"] for trial in place.trials} == {p.stem for p in place.path.glob("study/agents/*")}
    assert len({trial.user_attrs["agent"] for trial in place.trials}) == 2
    assert min(trial.value for trial in place.trials) < 0.51  # the last logged: at the optimum 1/2
    assert all((place.path / "study" / name).stat().st_size > 5000 for name in ("history.png", "importance.png"))
    assert out.count(" finished ") == 50
    best = yaml.safe_load((place.path / "study" / "best.yaml").read_text())
    assert best["loss"] == min(trial.value for trial in place.trials)
    assert best["command"] == f"python program.py --x={best['parameters']['x']} --kind={best['parameters']['kind']}"


def test_a_grid_has_every_point_once_over_all_agents_and_ends(place):
    axes = {"x": {"values": [0.1, 0.2, 0.3]}, "n": {"min": 1, "max": 4}, "pause": {"value": 0.05}}
    place.write(method="grid", parameters=axes)
    status, _, err = place.sweep("--agents", "2")
    assert status == 0, err
    points = [(note["x"], note["n"]) for note in place.notes("started")]
    assert len(points) == 12
    assert set(points) == {(x, n) for x in ("0.1", "0.2", "0.3") for n in "1234"}
    status, out, _ = place.sweep()
    assert status == 0
    assert "12 trials are done" in out
    assert len(place.notes("started")) == 12


def test_a_cap_and_a_target_end_a_sweep(place):
    place.write(run_cap=3)
    assert place.sweep("--trials", "9")[0] == 0
    assert len(place.trials) == 3
    place.write(run_cap=5)  # the same study goes on
    assert place.sweep()[0] == 0
    assert len(place.trials) == 5


def test_a_reached_target_ends_a_sweep(place):
    place.write(method="grid", metric={"name": "test/loss", "target": 0.1}, parameters={"x": {"min": 2, "max": 9}})
    assert place.sweep("--trials", "2")[0] == 0
    assert place.states() == ["COMPLETE"] * 2
    place.write(method="grid", metric={"name": "test/loss", "target": 3.0}, parameters={"x": {"min": 2, "max": 9}})
    assert place.sweep("--folder", "other")[0] == 0
    assert len(list((place.path / "other" / "trials").glob("*.log"))) == 1


def test_a_result_comes_before_what_was_logged_and_else_the_last_one_counts(place):
    place.write(method="grid", metric={"name": "test/loss"}, parameters={"x": {"values": [0.5]}})
    place.sweep()
    assert place.trials[0].value == pytest.approx(0.04)
    place.write(method="grid", parameters={"x": {"values": [0.5]}})
    place.sweep("--folder", "other")
    best = yaml.safe_load((place.path / "other" / "best.yaml").read_text())
    assert best["loss"] == pytest.approx(0.04 + 1 / 2)


def test_a_crash_is_one_failed_trial_and_the_sweep_goes_on(place):
    axes = {"x": {"values": [0.1, 0.2, 0.3, 0.4]}, "crash": {"value": "[0.2]"}}
    place.write(method="grid", parameters=axes)
    status, out, _ = place.sweep()
    assert status == 0
    assert place.states() == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert place.trials[1].user_attrs["log"].endswith("x=0.2 is too much")
    (line,) = [line for line in out.splitlines() if " failed " in line]
    assert "exit status 1: x=0.2 is too much" in line
    assert "3 complete, 1 fail" in out


def test_when_all_of_the_first_trials_fail_the_sweep_stops(place):
    axes = {"x": {"min": 1, "max": 20}, "crash": {"value": str(list(range(21)))}}
    place.write(method="grid", parameters=axes)
    status, _, err = place.sweep("--agents", "2")
    assert status == 1
    assert "failed in the first" in err
    assert len(err.splitlines()) == 1
    assert 3 <= len(place.trials) <= 4


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [("los", "metric.name los is never logged by program.py; did you mean loss?"), ("reward", "there are loss")],
)
def test_a_metric_that_is_never_logged_stops_the_sweep_at_once(place, metric, remedy):
    place.write(method="grid", metric={"name": metric}, parameters={"x": {"min": 1, "max": 20}})
    status, _, err = place.sweep()
    assert status == 1
    assert remedy in err
    assert len(err.splitlines()) == 1
    assert len(place.trials) == 1


def test_trials_that_fall_behind_are_ended_and_count_as_pruned(place):
    place.write(
        method="grid",
        parameters={"x": {"values": [0.3, 2, 3, 4]}, "steps": {"value": 30}, "pause": {"value": 0.03}},
        early_terminate={"type": "hyperband", "min_iter": 3, "eta": 2},
    )
    status, out, err = place.sweep()
    assert status == 0, err
    assert place.states() == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    assert [note["x"] for note in place.notes("ended")] == ["2", "3", "4"]
    assert not any(alive(note["pid"]) for note in place.notes("started"))
    assert "trial 3 pruned" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_ends_its_processes_and_goes_on_later(place, number):
    place.write(method="grid", parameters={"x": {"values": [0.1, 0.2, 0.3, 0.4]}, "pause": {"value": 0.3}})
    process = place.start("--agents", "2")
    until(lambda: len(place.notes("started")) >= 3)
    os.killpg(process.pid, number)
    out, err = process.communicate()
    assert process.returncode == 128 + number, out
    assert "the same command goes on" in err
    assert not any(alive(pid) for pid in [*place.agents(), *(note["pid"] for note in place.notes("started"))])
    assert "RUNNING" in place.states()
    assert "FAIL" not in place.states()
    assert place.sweep("--agents", "2")[0] == 0
    assert place.states() == ["COMPLETE"] * 4


def test_the_trial_of_a_killed_agent_is_carried_on_by_another(place):
    axes = {"x": {"values": [n / 10 for n in range(8)]}, "pause": {"value": 0.2}, "slow": {"value": "[0.0]"}}
    place.write(method="grid", parameters=axes)
    process = place.start("--agents", "2")
    until(lambda: any(note["x"] == "0.0" for note in place.notes("started")))
    agent = place.path / "study" / "agents" / f"{place.trials[0].user_attrs['agent']}.lock"
    killed = int(agent.read_text().split()[0])
    os.kill(killed, signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"agent {killed} ended" in out
    assert place.states() == ["COMPLETE"] * 8
    assert sorted(note["x"] for note in place.notes("started")) == ["0.0", *(str(n / 10) for n in range(8))]
    (ended,) = place.notes("ended")  # what the killed agent left at work did not work on beside the other
    assert ended["x"] == "0.0"


def test_a_sweep_killed_as_a_whole_goes_on_without_losing_or_repeating_a_trial(place):
    place.write(method="bayes", parameters={"x": {"min": 0.0, "max": 1.0}, "pause": {"value": 0.2}})
    for _ in range(3):
        before = len(place.notes("started"))
        process = place.start("--agents", "2", "--trials", "10")
        until(lambda before=before: len(place.notes("started")) >= before + 3)
        for pid in [process.pid, *filter(alive, place.agents())]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    status, _, err = place.sweep("--agents", "2", "--trials", "10")
    assert status == 0, err
    assert place.states() == ["COMPLETE"] * 10
    assert len({note["x"] for note in place.notes("started")}) == 10
    assert len({trial.params["x"] for trial in place.trials}) == 10


def test_two_commands_share_a_study(place):
    place.write(parameters={"x": {"min": 0.0, "max": 1.0}, "pause": {"value": 0.1}})
    both = [place.start("--trials", "8") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert place.states() == ["COMPLETE"] * 8
    assert len(place.notes("started")) == 8
    assert len(place.agents()) == 2


def test_the_folder_of_another_sweep_is_refused(place):
    place.write()
    assert place.sweep("--trials", "1")[0] == 0
    place.write(description="what it is for does not change what it is")
    assert place.sweep("--trials", "1")[0] == 0
    place.write(method="bayes")
    status, _, err = place.sweep("--trials", "2")
    assert status == 1
    assert "study belongs to another sweep" in err
    assert len(err.splitlines()) == 1


def test_a_report_tells_what_is_missing_instead_of_failing(place):
    place.write(parameters={"x": {"min": 0.0, "max": 1.0}})
    status, _, err = place.sweep("--report")
    assert status == 1
    assert "no study yet" in err
    place.sweep("--trials", "2")
    status, out, err = place.sweep("--report")
    assert status == 0, err
    assert "importance.png needs 4 finished trials" in out
    assert not (place.path / "study" / "importance.png").exists()


def test_half_a_line_that_a_killed_agent_left_in_the_journal_is_dropped(place):
    place.write()
    assert place.sweep("--trials", "2")[0] == 0
    with (place.path / "study" / "journal.log").open("a") as journal:
        journal.write('{"op_code": 4, "worker_id": "half')
    status, _, err = place.sweep("--trials", "3")
    assert status == 0, err
    assert place.states() == ["COMPLETE"] * 3
