"""Runs of a grid beside each other."""

import json

import pytest

from tessera import comparison
from tessera.folder import RunFolder


@pytest.fixture
def run(tmp_path):
    """`run("optimizer=mars", 1, 2.5)` is a finished run with that word, seed and test loss."""

    def run(word: str, seed: int, value: float, metric: str = "loss") -> RunFolder:
        folder = RunFolder(tmp_path / f"{word}-{seed}-{metric}")
        folder.path.mkdir()
        headline = {"metric": f"test/{metric}", "direction": "min", "value": value}
        results = {"model": "gpt2", "data": {"name": "text"}, "headline": headline, "seed": seed, "seconds": 3.0}
        (folder.path / "results.json").write_text(json.dumps(results | {"units_per_step": 1024}))
        (folder.path / "run.json").write_text(json.dumps({"words": ["model=gpt2", word, f"seed={seed}"]}))
        rows = "".join(f"{step},{value + 1 / (step + 1)}\n" for step in (9, 19))
        (folder.path / "metrics.csv").write_text(f"step,val/{metric}\n{rows}20,\n")
        return folder

    return run


def test_seeds_are_one_row_and_the_best_group_is_first(run, tmp_path, capsys):
    runs = [run("optimizer=adamw", s, 2.5 + s / 10) for s in (0, 1)] + [run("optimizer=mars", s, 2.0) for s in (0, 1)]
    comparison.compare(runs, tmp_path / "picture.png")
    lines = [line for line in capsys.readouterr().out.splitlines() if "optimizer=" in line]
    assert [line.split()[1] for line in lines] == ["optimizer=mars", "optimizer=adamw"]
    assert "2.5500" in lines[1]
    assert "0: 2.5000  1: 2.6000" in lines[1]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_seeds_of_a_group_share_stands_beside_the_loss():
    tables = [{"loss": "2.5", "cache_bytes": "784"}, {"loss": "2.6", "cache_bytes": "784"}]
    assert comparison.shared(tables) == {"cache_bytes": "784"}
    assert comparison.shared(tables[:1]) == tables[0]
    assert comparison.shared([{}, tables[0]]) == {}


def test_the_figure_has_the_mean_over_tokens_and_the_range_of_the_seeds(run):
    groups = comparison.grouped([run("optimizer=adamw", 0, 2.0), run("optimizer=adamw", 1, 3.0)])
    (axis,) = comparison.figure(groups).axes
    assert axis.get_xlabel() == "tokens"
    assert axis.lines[0].get_xydata().tolist() == [[10 * 1024, 2.6], [20 * 1024, 2.55]]
    assert sorted({y for _, y in axis.collections[0].get_paths()[0].vertices.round(6).tolist()}) == [
        2.05,
        2.1,
        3.05,
        3.1,
    ]


def test_labels_that_differ_in_the_seed_are_a_mean_with_a_band_on_logarithmic_axes(run, tmp_path, monkeypatch):
    runs = {}
    for label, scale in {"seed 1": 1.0, "mars": 4.0, "seed 2": 3.0}.items():
        runs[label] = run(label.replace(" ", "="), 0, scale)
        (runs[label].path / "export").mkdir()
        rows = "".join(f"{x},{scale / x}\n" for x in (10, 20, 80))
        (runs[label].path / "export" / "curves.csv").write_text(f"evaluations,tv\n{rows}")
        (runs[label].path / "results.json").write_text(json.dumps({"table": {"tv@10": "0.1"}}))
    drawn = []
    monkeypatch.setattr(comparison, "save_figure", lambda figure, path: drawn.append(figure))
    comparison.beside(runs, tmp_path / "picture.png")
    (axis,) = drawn[0].axes
    assert [line.get_label() for line in axis.lines] == ["mean, 2 seeds", "mars"]
    assert axis.lines[0].get_ydata().tolist() == pytest.approx([0.2, 0.1, 0.025])
    edges = axis.collections[0].get_paths()[0].vertices
    assert (edges[:, 1].min(), edges[:, 1].max()) == pytest.approx((1 / 80, 0.3))
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")


def test_runs_that_cannot_be_compared_are_refused(run, tmp_path):
    unfinished = RunFolder(tmp_path / "unfinished")
    with pytest.raises(ValueError, match=r"unfinished has no results.json"):
        comparison.compare([run("optimizer=adamw", 0, 2.0), unfinished], tmp_path / "picture.png")
    with pytest.raises(ValueError, match="1 runs with test/loss: a comparison needs two"):
        comparison.compare([run("optimizer=adamw", 1, 2.0)], tmp_path / "picture.png")
    with pytest.raises(ValueError, match="2 runs with test/greedy and test/loss"):
        comparison.compare([run("a=1", 0, 2.0), run("a=2", 0, 2.0, "greedy")], tmp_path / "picture.png")
    fitted = run("a=3", 0, 2.0)
    results = fitted.results | {"headline": {"metric": "test/loss", "direction": "min", "value": None}}
    (fitted.path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"has no test/loss: run it with stages=\[fit,test\]"):
        comparison.compare([run("a=4", 0, 2.0), fitted], tmp_path / "picture.png")
