"""Every defect of a JSON lines file is one sentence that names the file, the line and what to do."""

import gzip
import json
import os
import re

import pytest

from datamodules.jsonl import field, read_jsonl


def write(folder, content: bytes, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(content)
    return path


def complaint(path) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        list(read_jsonl(path))
    message = str(caught.value)
    assert path.name in message
    return message


def test_a_line_separator_inside_a_row_does_not_end_it(tmp_path):
    row = {"question": "one\u2028two\x85three\x0cfour"}
    path = write(tmp_path, json.dumps(row, ensure_ascii=False).encode() + b"\n")
    assert list(read_jsonl(path)) == [(1, row)]


def test_blank_lines_crlf_and_a_byte_order_mark_are_read_over_and_lines_keep_their_numbers(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]


def test_gzip_is_recognised_by_its_bytes_not_its_name(tmp_path):
    path = write(tmp_path, gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert [record["a"] for _, record in read_jsonl(path)] == [1, 2]


def test_broken_gzip_is_a_sentence(tmp_path):
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    flipped = bytes([*whole[:20], whole[20] ^ 0xFF, *whole[21:]])
    for broken in (whole[:-5], whole[:30], flipped, b"\x1f\x8b", b"\x1f\x8brest"):
        assert "gzip" in complaint(write(tmp_path, broken))


def test_a_missing_file_is_named_with_the_place_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"nowhere\.jsonl does not exist .*{tmp_path}/nowhere\.jsonl"):
        list(read_jsonl("nowhere.jsonl"))


def test_directories_pipes_and_impossible_names_are_refused_without_waiting(tmp_path):
    assert "a directory" in complaint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "device or pipe" in complaint(tmp_path / "pipe")
    with pytest.raises(ValueError, match="cannot be looked up"):
        list(read_jsonl("x" * 5000))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n \r\n", "is empty"),
        (b'{"a": 1}\n{"a": ', "line 2: invalid JSON .* cut short"),
        (b'{"a": 1}\n{"a" 1}\n{"a": 2}\n', "line 2: invalid JSON at column 6"),
        (b'{"a": 1}{"a": 2}\n', "line 1: invalid JSON"),
        (b'{"a": "caf\xe9"}\n', "line 1: byte 10 of the file is not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}\n{"a": "\xff"}\n', "line 2: byte 19 of the file"),
        ('{"a": 1}\n'.encode("utf-16"), "byte 0 of the file is not UTF-8"),
        (b"  <!DOCTYPE html>\n<html></html>", "HTML page: download the raw file"),
        (b"<html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PAR1\x15\x04", "ending .parquet"),
        (b"[1, 2]\n", "line 1: expected a JSON object, got .1, 2."),
        (b'"text"\n', "expected a JSON object"),
        (b"12\n", "expected a JSON object"),
        (b"null\n", "expected a JSON object"),
        (b'{"a": NaN}\n', "line 1: NaN is not JSON"),
        (b'{"a": [-Infinity]}\n', "-Infinity is not JSON"),
        (b'{"a": 1e999}\n', "overflows"),
        (b'{"a": 1' + b"0" * 5000 + b"}\n", "integer of 5001 digits"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "nested too deeply"),
        (b'{"a": "\\ud800"}\n', "surrogate"),
        (b'{"a": "tab\there"}\n', "line 1: invalid JSON"),
        (b'{"a": 1}\n\x00\x00\n', "line 2: invalid JSON"),
    ],
)
def test_each_kind_of_bad_content_has_its_sentence(tmp_path, content, said):
    assert re.search(said, complaint(write(tmp_path, content)))


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    assert list(read_jsonl(write(tmp_path, b'{"a": "\\ud83d\\ude00"}\n'))) == [(1, {"a": "😀"})]


def test_bad_lines_are_collected_when_asked_for_but_a_bad_file_is_still_refused(tmp_path):
    defects: list[str] = []
    path = write(tmp_path, b'{"a": 1}\nnonsense\n{"a": 3}\n')
    assert [line for line, _ in read_jsonl(path, defects)] == [1, 3]
    assert len(defects) == 1
    assert "line 2" in defects[0]
    with pytest.raises(ValueError, match="empty"):
        list(read_jsonl(write(tmp_path, b""), defects))


@pytest.mark.parametrize(
    ("record", "kind", "said"),
    [
        ({"other": 1}, str, r"field `a` is missing, the row has \['other'\]"),
        ({"a": None}, str, "missing"),
        ({"a": 5}, str, "must be str, got 5"),
        ({"a": "5"}, float, "must be float"),
        ({"a": True}, float, "must be float, got True"),
        ({"a": True}, int, "must be int"),
        ({"a": float("nan")}, float, "finite"),
        ({"a": float("inf")}, float, "finite"),
        ({"a": " \u2028"}, str, "empty"),
        ({"a": []}, list, "empty"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named_with_its_line(record, kind, said):
    with pytest.raises(ValueError, match=rf"^rows\.jsonl, line 7: field `a`.*{said}|{said}"):
        field(record, "a", kind, "rows.jsonl", 7)


def test_an_integer_is_a_float_and_false_is_a_bool():
    assert field({"a": 3}, "a", float, "f", 1) == 3.0
    assert field({"a": False}, "a", bool, "f", 1) is False
    assert field({"a": 0}, "a", int, "f", 1) == 0
