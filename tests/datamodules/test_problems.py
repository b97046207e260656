"""Problems are read whole and exact, from the first place that has them, or refused in one sentence."""

import json
import os
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from datamodules import problems
from datamodules.answers import BoxedAnswer, NumberAnswer, boxed
from datamodules.problems import find, hub_answers, read_gsm8k, read_hub, read_math, strip_annotations
from datamodules.process_reward import MARK, is_right
from datamodules.standin import generate

REAL = Path(os.environ.get("TESSERA_DATA", Path(__file__).parents[3] / "shared" / "data"))
real = pytest.mark.skipif(not (REAL / "gsm8k" / "train.jsonl").exists(), reason=f"no real data in {REAL}")
STANDIN = {"sft": 40, "prompts": 30, "val": 10, "test": 20, "misconception": 0.6, "slip": 0.0}


def rows_of(made) -> list[dict]:
    return [{"question": problem.question, "answer": problem.solution} for problem in made]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    made = list({problem.question: problem for problem in generate(130, seed=0)}.values())
    write(tmp_path / "set" / "train.jsonl", rows_of(made[:100]))
    write(tmp_path / "set" / "test.jsonl", rows_of(made[100:120]))
    return tmp_path / "set"


@pytest.fixture(autouse=True)
def _nothing_found_by_accident(monkeypatch):
    monkeypatch.delenv("TESSERA_DATA", raising=False)
    monkeypatch.setattr(problems, "hub_answers", lambda: False)


# ---- one file


@real
@pytest.mark.parametrize(
    ("split", "rows", "marks", "without", "commas", "negative"),
    [("train", 7_473, 23_716, 95, 79, 3), ("test", 1_319, 4_282, 18, 14, 2)],
)
def test_gsm8k_is_read_whole_and_its_arithmetic_is_right(split, rows, marks, without, commas, negative):
    read = read_gsm8k(REAL / "gsm8k" / f"{split}.jsonl", split)
    insides = [[mark[1] for mark in MARK.finditer(problem.solution)] for problem in read]
    assert len(read) == len({problem.question for problem in read}) == rows
    assert sum(map(len, insides)) == marks
    assert sum(not inside for inside in insides) == without
    assert sum("," in problem.solution.rpartition("####")[2] for problem in read) == commas
    assert sum(problem.gold.startswith("-") for problem in read) == negative
    wrong = [mark for inside in insides for mark in inside if not is_right(mark)]
    assert wrong == (["3/4=3/4"] if split == "test" else [])
    assert all(NumberAnswer()(problem.solution, problem.gold).correct for problem in read)
    assert all(NumberAnswer("flexible")(problem.solution, problem.gold).correct for problem in read)
    assert read[5].id == f"{split}-5"


@real
@pytest.mark.parametrize(
    ("file", "split", "rows", "id"),
    [
        ("math_500", "test", 500, "test/precalculus/807.json"),
        ("math_level5_nt_cp", "train", 375, "cmath_1745"),
        ("math_level5_nt_cp", "test", 134, None),
        ("math_samples_8", "test", 75, "1"),
        ("olympiadbench_math_en", "test", 555, "1606"),
    ],
)
def test_every_math_file_is_read_whole_and_each_solution_ends_in_its_gold_answer(file, split, rows, id):
    read = read_math(REAL / "math" / f"{file}.jsonl", split)
    assert len(read) == len({problem.id for problem in read}) == rows
    assert id is None or read[0].id == id
    scorer = BoxedAnswer()
    if file != "olympiadbench_math_en":  # there a solution may box something on its way
        wrong = [problem.gold for problem in read if not scorer(problem.solution, problem.gold).correct]
        assert wrong == (["4:30p.."] if file == "math_samples_8" else [])  # that file's own spelling of 4:30 p.m.
    assert all(boxed(problem.solution) is not None for problem in read)
    assert not any("$" in problem.gold[:1] + problem.gold[-1:] for problem in read)


def test_parquet_rows_are_the_jsonl_rows(folder):
    rows = rows_of(generate(60, 3))
    rows = list({row["question"]: row for row in rows}.values())
    write(folder / "rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=7)
    assert read_gsm8k(folder / "rows.parquet") == read_gsm8k(folder / "rows.jsonl")


def test_a_file_that_is_not_parquet_is_a_sentence(tmp_path):
    for content in (b"", b"PAR1", b"PAR1" + b"\x00" * 100 + b"PAR1", b'{"question": "a"}'):
        (tmp_path / "rows.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"^[^\n]*rows\.parquet is not a readable parquet file[^\n]*$"):
            read_gsm8k(tmp_path / "rows.parquet")


GOOD = {"question": "How many?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "#### 2"}, "field `question` is missing"),
        ({"question": "q"}, "field `answer` is missing"),
        ({"question": "", "answer": "#### 2"}, "field `question` is empty"),
        ({"question": ["q"], "answer": "#### 2"}, "field `question` must be str"),
        ({"question": "q", "answer": 2}, "field `answer` must be str"),
        ({"question": "q", "answer": "it is 2"}, "field `answer` has no `####`"),
        ({"question": "q", "answer": "#### two"}, "field `answer` must end in a number, got 'two'"),
        ({"question": "q", "answer": "####"}, "must end in a number"),
        ({"question": "q", "answer": "#### " + "9" * 5000}, "must end in a number"),
        (GOOD, "field `question` repeats rows.jsonl, line 1"),
        ({**GOOD, "question": "q", "id": [1]}, "field `id` must be str"),
        ({**GOOD, "question": "q", "id": True}, "field `id` must be int"),
    ],
)
def test_a_bad_row_is_named_and_skipped_only_when_asked(tmp_path, row, said, caplog):
    path = write(tmp_path / "rows.jsonl", [GOOD, row, {**GOOD, "question": "Another?"}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2") as caught:
        read_gsm8k(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [problem.id for problem in read_gsm8k(path, on_error="skip")] == ["train-0", "train-2"]
    assert len(caplog.records) == 1
    assert "1 bad rows skipped" in caplog.text


def test_ids_of_the_file_are_kept_and_must_differ(tmp_path):
    rows = [{**GOOD, "id": 7}, {**GOOD, "question": "b", "id": "x"}, {**GOOD, "question": "c", "id": None}]
    assert [problem.id for problem in read_gsm8k(write(tmp_path / "a.jsonl", rows))] == ["7", "x", "train-2"]
    with pytest.raises(ValueError, match=r"line 2: field `id` repeats b\.jsonl, line 1"):
        read_gsm8k(write(tmp_path / "b.jsonl", [{**GOOD, "id": 7}, {**GOOD, "question": "b", "id": "7"}]))


def test_a_file_of_bad_rows_only_is_refused_even_when_skipping(tmp_path):
    with pytest.raises(ValueError, match="no usable row"):
        read_gsm8k(write(tmp_path / "rows.jsonl", [{"question": "q"}]), on_error="skip")
    with pytest.raises(ValueError, match="on_error must be 'stop' or 'skip', got 'ignore'"):
        read_gsm8k(tmp_path / "rows.jsonl", on_error="ignore")


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"problem": "p", "solution": r"\boxed{1} or \boxed{\frac{1}{2}}"}, r"\frac{1}{2}"),
        ({"problem": "p", "solution": r"so \boxed{2}", "answer": "$2$"}, "2"),
        ({"question": "q", "solution": ["long", "other"], "final_answer": ["$2n$"], "answer": None}, "2n"),
    ],
)
def test_the_gold_answer_of_math_is_the_answer_field_or_the_last_box(tmp_path, row, gold):
    (problem,) = read_math(write(tmp_path / "rows.jsonl", [row]))
    assert problem.gold == gold
    assert boxed(problem.solution) == gold


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"solution": r"\boxed{1}"}, "`problem` is missing"),
        ({"problem": "p", "solution": r"no box"}, r"no field `answer` and no closed \\boxed"),
        ({"problem": "p", "solution": r"\boxed{1"}, "no closed"),
        ({"problem": "p", "solution": [], "answer": "1"}, "`solution` is empty"),
        ({"problem": "p", "solution": [3], "answer": "1"}, "`solution` must be str"),
        ({"problem": "p", "solution": "s", "answer": 3}, "`answer` must be str"),
    ],
)
def test_a_bad_math_row_is_named(tmp_path, row, said):
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1: .*{said}"):
        read_math(write(tmp_path / "rows.jsonl", [row]))


def test_calculator_marks_are_stripped_and_nothing_else():
    assert strip_annotations("48/2 = <<48/2=24>>24 > 3 << 4\n#### 24") == "48/2 = 24 > 3 << 4\n#### 24"


# ---- where from


def test_a_given_folder_is_taken_and_named(folder):
    source = find("gsm8k", str(folder), val_size=10)
    assert (source.name, source.standin) == ("gsm8k", False)
    assert source.origin == f"data.path={folder}"
    assert {part: len(rows) for part, rows in source.parts.items()} == {"sft": 90, "prompts": 90, "val": 10, "test": 20}


def test_validation_rows_leave_training_and_depend_on_the_seed_only(folder):
    one, same, other = (find("gsm8k", folder, val_size=10, seed=seed).parts for seed in (0, 0, 1))
    assert one == same
    assert one["val"] != other["val"]
    assert not {p.question for p in one["val"]} & {p.question for p in one["sft"]}
    assert {p.id for p in one["val"] + one["sft"]} == {f"train-{i}" for i in range(100)}
    assert find("gsm8k", folder, val_size=5).parts["val"] == one["val"][5:]


def test_a_validation_part_as_large_as_training_is_refused(folder):
    with pytest.raises(ValueError, match=r"val_size=100 of 100 train rows .* set data\.val_size"):
        find("gsm8k", folder, val_size=100)
    assert find("gsm8k", folder, val_size=0).parts["val"] == []


def test_the_fingerprint_is_of_the_bytes(folder):
    before = find("gsm8k", folder, val_size=10).fingerprint
    assert find("gsm8k", folder, val_size=20).fingerprint == before
    with open(folder / "test.jsonl", "a") as file:
        file.write("\n")
    assert find("gsm8k", folder, val_size=10).fingerprint != before


def test_a_path_that_does_not_exist_names_the_other_places(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_DATA", "/some/where")
    with pytest.raises(FileNotFoundError) as caught:
        find("gsm8k", str(tmp_path / "absent"))
    for word in ("absent", "$TESSERA_DATA/gsm8k (/some/where)", "openai/gsm8k", "stand-in"):
        assert word in str(caught.value)


def test_a_folder_without_train_says_what_it_should_have(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no train\.\{jsonl,jsonl\.gz,json,parquet\}"):
        find("gsm8k", tmp_path)


def test_the_hubs_parquet_shards_are_read_in_order(folder, tmp_path):
    rows = rows_of(read_gsm8k(folder / "train.jsonl"))
    (tmp_path / "hub" / "main").mkdir(parents=True)
    for i, shard in enumerate((rows[:60], rows[60:])):
        table = pyarrow.Table.from_pylist(shard)
        pyarrow.parquet.write_table(table, tmp_path / "hub" / "main" / f"train-{i:05d}-of-00002.parquet")
    parts = find("gsm8k", tmp_path / "hub", val_size=0).parts
    assert parts["sft"] == find("gsm8k", folder, val_size=0).parts["sft"]
    assert parts["test"] == []


def test_the_environments_data_come_before_hub_and_standin(folder, monkeypatch):
    folder.rename(folder.parent / "gsm8k")
    monkeypatch.setenv("TESSERA_DATA", str(folder.parent))
    monkeypatch.setattr(problems, "hub_answers", lambda: pytest.fail("asked the hub"))
    source = find("gsm8k", download=True, val_size=10)
    assert (source.name, len(source.parts["test"])) == ("gsm8k", 20)
    assert source.origin.startswith("$TESSERA_DATA/gsm8k")


def test_without_any_data_the_standin_says_so_once(caplog):
    source = find("gsm8k", download=True, standin=STANDIN)
    assert (source.name, source.standin) == ("gsm8k-standin", True)
    assert {part: len(rows) for part, rows in source.parts.items()} == {"sft": 40, "prompts": 30, "val": 10, "test": 20}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "gsm8k-standin" in caplog.text


def test_the_standins_fingerprint_is_of_its_settings_and_they_stay_whole():
    settings = dict(STANDIN)
    one = find("gsm8k", standin=settings)
    assert settings == STANDIN
    assert find("gsm8k", standin=STANDIN).fingerprint == one.fingerprint
    for other in (STANDIN | {"sft": 41}, STANDIN | {"misconception": 0.5}):
        assert find("gsm8k", standin=other).fingerprint != one.fingerprint
    assert find("gsm8k", standin=STANDIN, seed=1).fingerprint != one.fingerprint
    boxes = find("math", standin=STANDIN)
    assert boxes.fingerprint != one.fingerprint
    assert all(boxed(problem.solution) for problem in boxes.parts["sft"])


def test_a_misspelt_setting_or_data_set_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match="no setting misconceptoin: it has misconception, prompts, sft, slip, test, val"
    ):
        find("gsm8k", standin=STANDIN | {"misconceptoin": 0.5})
    with pytest.raises(ValueError, match=r"no data set 'gsm9k': data\.name is one of gsm8k, math"):
        find("gsm9k")


def test_a_question_of_test_in_train_is_refused(folder):
    first = (folder / "test.jsonl").read_text().split("\n")[0]
    with open(folder / "train.jsonl", "a") as file:
        file.write(first + "\n")
    with pytest.raises(ValueError, match=r"train-100 is the question of test-0: delete it from train"):
        find("gsm8k", folder, val_size=10)


@real
def test_a_test_set_is_never_trained_on_whatever_its_file_is_called(tmp_path):
    (tmp_path / "train.jsonl").write_bytes((REAL / "gsm8k" / "test.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"train\.jsonl is GSM8K's test split, which is never trained on"):
        find("gsm8k", tmp_path)
    parts = find("gsm8k", tmp_path / "train.jsonl").parts
    assert (len(parts["sft"]), len(parts["prompts"]), len(parts["val"]), len(parts["test"])) == (0, 0, 0, 1_319)
    assert find("math", REAL / "math" / "math_500.jsonl").parts["sft"] == []


@real
def test_the_real_sets_are_found_with_their_counts(monkeypatch):
    monkeypatch.setenv("TESSERA_DATA", str(REAL))
    gsm8k, maths = find("gsm8k"), find("math", val_size=50)
    assert {part: len(rows) for part, rows in gsm8k.parts.items()} == {
        "sft": 6_973, "prompts": 6_973, "val": 500, "test": 1_319,
    }  # fmt: skip
    assert {part: len(rows) for part, rows in maths.parts.items()} == {
        "sft": 325, "prompts": 325, "val": 50, "test": 500,
    }  # fmt: skip
    assert Counter(problem.id.partition("_")[0] for problem in maths.parts["sft"]) == {"cmath": 325}


# ---- the hub


def test_the_hub_is_not_asked_when_switched_off(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    for word in ("1", "true", "ON"):
        monkeypatch.setenv("HF_HUB_OFFLINE", word)
        assert not hub_answers()


def test_the_hub_answers_when_its_address_accepts_a_connection(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_answers()
    monkeypatch.setattr(problems, "HUB_PROBE", 0.2)
    assert not hub_answers()


def test_a_name_look_up_without_end_delays_no_longer_than_the_probe(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(problems, "HUB_PROBE", 0.2)
    over = threading.Event()

    def look_up(*_, **__):
        over.wait(10)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", look_up)
    start = time.monotonic()
    assert not hub_answers()
    assert time.monotonic() - start < 2
    over.set()


def test_rows_of_the_hub_are_the_rows_of_the_file(folder, monkeypatch):
    import datasets

    def load_dataset(name, config, split):
        assert (name, config) == ("openai/gsm8k", "main")
        return rows_of(read_gsm8k(folder / f"{split}.jsonl", split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(problems, "hub_answers", lambda: True)
    source = find("gsm8k", download=True, val_size=10)
    assert source.parts == find("gsm8k", folder, val_size=10).parts
    assert source.origin == "hub openai/gsm8k"
    assert find("gsm8k", download=False, standin=STANDIN).standin


def test_a_hub_that_fails_is_one_sentence(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("first line\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"^openai/gsm8k cannot be read from the hub .ConnectionError: [^\n]+path$"):
        read_hub("gsm8k", "train")
