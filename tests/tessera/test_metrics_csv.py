"""metrics.csv is whole at every moment, and a resumed run continues it."""

import csv

import pytest

from tessera.metrics_csv import MetricsCSV


def rows(folder) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def logged(tmp_path):
    """Ten steps, two of which were validated."""
    logger = MetricsCSV(tmp_path)
    for step in range(10):
        logger.log_metrics({"train/loss": 1 / (step + 1)}, step)
        if step in (4, 9):
            logger.log_metrics({"val/greedy": step / 10}, step)
    return tmp_path


def test_a_step_has_one_row_whatever_is_logged_of_it(logged):
    assert [row["step"] for row in rows(logged)] == [str(step) for step in range(10)]
    assert [row["val/greedy"] for row in rows(logged)] == ["", "", "", "", "0.4", "", "", "", "", "0.9"]
    assert float(rows(logged)[4]["train/loss"]) == pytest.approx(0.2)


def test_a_new_column_gets_its_place_in_the_rows_before(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_metrics({"a": 2.0, "b": 3.0}, 1)
    logger.log_metrics({"a": 4.0}, 2)
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n0,1,\n1,2,3\n2,4,\n"


def test_a_resumed_run_goes_on_after_its_checkpoint(logged):
    resumed = MetricsCSV(logged)
    resumed.rewind(6)
    assert [row["step"] for row in rows(logged)] == ["0", "1", "2", "3", "4", "5"]
    resumed.log_metrics({"train/loss": 7.0, "train/kl": 0.5}, 6)
    assert rows(logged)[4] == {"step": "4", "train/loss": "0.2", "val/greedy": "0.4", "train/kl": ""}
    assert rows(logged)[6] == {"step": "6", "train/loss": "7", "val/greedy": "", "train/kl": "0.5"}


def test_a_run_that_begins_again_keeps_no_row(logged):
    MetricsCSV(logged).rewind(0)
    assert rows(logged) == []


def test_a_line_that_a_kill_has_cut_is_left_out(logged):
    path = logged / "metrics.csv"
    path.write_text(path.read_text()[:-7])
    MetricsCSV(logged).rewind(9)
    assert [row["step"] for row in rows(logged)] == [str(step) for step in range(9)]


def test_a_run_without_a_file_has_nothing_to_rewind(tmp_path):
    MetricsCSV(tmp_path).rewind(5)
    assert not (tmp_path / "metrics.csv").exists()


def test_every_moment_shows_whole_rows(tmp_path):
    logger = MetricsCSV(tmp_path)
    for step in range(5):
        logger.log_metrics({"loss": 0.1, **({"late": 1.0} if step == 3 else {})}, step)
        text = (tmp_path / "metrics.csv").read_text()
        assert text.endswith("\n")
        assert len({line.count(",") for line in text.splitlines()}) == 1
