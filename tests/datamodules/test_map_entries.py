"""Entries from manifests and names; what belongs together is checked, what is alike is kept together."""

from dataclasses import replace

import pytest
from maps import blob, real, write

from datamodules.map_entries import Entry, check_same_grid, divided, find_entries, read_manifest
from datamodules.mrc import MapFormatError, MapRecord, read_map


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_a_folder_of_emdb_is_read_by_its_names(tmp_path):
    touch(
        tmp_path,
        *("EMD-1234/map/emd_1234.map.gz", "EMD-1234/other/emd_1234_half_map_1.map.gz"),
        *(
            "EMD-1234/other/emd_1234_half_map_2.map.gz",
            "EMD-1234/masks/emd_1234_msk_1.map",
            "EMD-5678/map/emd_5678.map.gz",
        ),
    )
    first, second = find_entries(tmp_path)
    assert (first.id, first.cluster, first.map.name) == ("emd_1234", "EMD-1234", "emd_1234.map.gz")
    assert (first.half1.name, first.half2.name) == ("emd_1234_half_map_1.map.gz", "emd_1234_half_map_2.map.gz")
    assert first.mask.name == "emd_1234_msk_1.map"
    assert (second.half1, second.mask) == (None, None)


def test_names_of_other_programs_are_understood(tmp_path, caplog):
    touch(
        tmp_path,
        "run.mrc",
        "run_half1.mrc",
        "run_half2.mrc",
        "run_mask.mrc",
        "b.map",
        "b.map.gz",
        "notes.txt",
        "c_msk.mrc",
    )
    entries = {entry.id: entry for entry in find_entries(tmp_path)}
    assert set(entries) == {"run", "b"}
    assert [file.name for file in entries["run"].files] == ["run.mrc", "run_half1.mrc", "run_half2.mrc", "run_mask.mrc"]
    assert "b.map.gz is left aside" in caplog.text
    assert "c_msk.mrc is left aside" in caplog.text


def test_a_manifest_says_it_all(tmp_path):
    touch(tmp_path, "a.mrc", "h1.mrc", "h2.mrc", "b.mrc")
    (tmp_path / "m.csv").write_text(
        "id,map,half1,half2,voxel_size,contour,split,cluster\na,a.mrc,h1.mrc,h2.mrc,1.05,-0.2,train,x\nb,b.mrc,,,,,test,\n"
    )
    a, b = read_manifest(tmp_path / "m.csv")
    assert a == Entry(
        "a", tmp_path / "a.mrc", tmp_path / "h1.mrc", tmp_path / "h2.mrc", voxel_size=1.05, contour=-0.2, split="train",
        cluster="x", listed=True,
    )  # fmt: skip
    assert (b.cluster, b.split, b.half1) == ("b", "test", None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no column id"),
        ("id,file\na,a.mrc\n", "unknown column 'file'|no column map"),
        ("id,map\n", "no row"),
        ("id,map\na,\n", "line 2: column map is empty"),
        ("id,map\na,nowhere.mrc\n", "line 2: map is .*nowhere.mrc, which is no file"),
        ("id,map\na,a.mrc\na,a.mrc\n", "the id a stands in two rows"),
        ("id,map,voxel_size\na,a.mrc,zero\n", "line 2: voxel_size is 'zero': give a number above 0"),
        ("id,map,split\na,a.mrc,dev\n", "split is 'dev'"),
        ("id,map,half1\na,a.mrc,a.mrc\n", "one half map without the other"),
        ("id,map\na,a.mrc,3\n", "line 2 has more or fewer fields"),
        ("id,map,split\na,a.mrc\n", "line 2 has more or fewer fields"),
    ],
)
def test_a_wrong_manifest_is_refused_by_its_line(tmp_path, text, reason):
    touch(tmp_path, "a.mrc")
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as told:
        read_manifest(tmp_path / "m.csv")
    assert str(told.value).startswith(str(tmp_path / "m.csv"))


def test_a_folder_without_maps_says_what_would_be_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.csv"):
        find_entries(tmp_path)


# ---- what belongs together


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"voxels": blob((8, 8, 9))}, r"shape \(z, y, x\), \(8, 8, 8\) and \(8, 8, 9\)"),
        ({"voxel_sizes": (1.06,) * 3}, r"voxel size in A, \(1.05, 1.05, 1.05\) and \(1.06, 1.06, 1.06\)"),
        ({"origin": (0.0, 3.0, 0.0)}, r"position in A, \(0, 0, 0\) and \(0, 3, 0\)"),
    ],
)
def test_halves_that_do_not_fit_are_named_with_both_values(tmp_path, other, what):
    first = MapRecord(blob((8, 8, 8)), (1.05,) * 3, path=tmp_path / "one.mrc")
    with pytest.raises(MapFormatError, match=rf"one\.mrc and .*two\.mrc differ in {what}"):
        check_same_grid(first, replace(first, path=tmp_path / "two.mrc", **other))


def test_halves_may_say_their_place_in_either_way(tmp_path):
    voxels = blob((8, 8, 8))
    by_start = read_map(write(tmp_path / "a.mrc", voxels, nxstart=2, nystart=3, nzstart=4))
    by_origin = read_map(write(tmp_path / "b.mrc", voxels, origin=(3.0, 4.5, 6.0)))
    check_same_grid(by_start, by_origin)


def test_the_real_segment_fits_itself_by_origin_and_by_start():
    by_origin, by_start, lost = (
        read_map(real(f"maps/emd_21457_seg{kind}.mrc.gz")) for kind in ("", "_nstart", "_orig0")
    )
    check_same_grid(by_origin, by_start)
    with pytest.raises(MapFormatError, match="position"):
        check_same_grid(by_origin, lost)


# ---- parts


def entries(*clusters: str, split: str | None = None) -> list[Entry]:
    return [Entry(f"{cluster}-{i}", cluster=cluster, split=split) for i, cluster in enumerate(clusters)]


def test_clusters_are_never_divided():
    some = entries(*(f"c{i // 4}" for i in range(80)))
    parts = divided(some, (0.8, 0.1, 0.1), seed=0)
    assert {part: len(found) for part, found in parts.items()} == {"train": 64, "val": 8, "test": 8}
    clusters = [{entry.cluster for entry in found} for found in parts.values()]
    assert sum(map(len, clusters)) == len(set.union(*clusters)) == 20
    assert divided(some[::-1], (0.8, 0.1, 0.1), seed=0)["test"] == parts["test"][::-1]
    assert divided(some, (0.8, 0.1, 0.1), seed=1)["test"] != parts["test"]


def test_few_clusters_still_have_a_test_and_fewer_are_refused():
    assert [len(part) for part in divided(entries("a", "b", "c"), (0.9, 0.05, 0.05), 0).values()] == [1, 1, 1]
    with pytest.raises(ValueError, match="2 maps of 2 clusters cannot be divided"):
        divided(entries("a", "b"), (0.9, 0.05, 0.05), 0)


def test_a_manifest_decides_and_may_not_contradict_itself():
    given = [*entries("a", split="train"), *entries("b", split="val"), *entries("c", split="test"), *entries("d")]
    assert [entry.id for entry in divided(given, (0.9, 0.05, 0.05), 0)["train"]] == ["a-0", "d-0"]
    assert [len(part) for part in divided(entries("a", split="test"), (0.9, 0.05, 0.05), 0).values()] == [0, 0, 1]
    with pytest.raises(ValueError, match="cluster a is in the splits train and test"):
        divided([*entries("a", split="train"), *entries("a", split="test")], (0.9, 0.05, 0.05), 0)
    with pytest.raises(ValueError, match=r"data\.split"):
        divided(given, (0.9, 0.2, 0.1), 0)
