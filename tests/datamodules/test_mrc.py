"""Maps are read with their axes, place and size, and what is no map is refused in a sentence that says what to do."""

import bz2
import gzip
import itertools
import pickle
import random
import struct

import mrcfile
import numpy as np
import pytest
from maps import REAL, blob, patched, real, write
from scipy.ndimage import map_coordinates

from datamodules.mrc import MapFormatError, MapRecord, NoDensityError, Remedy, read_map, save_map
from datamodules.regridding import back_from_cube, on_cube
from datamodules.structures import read_structure

RNG = np.random.default_rng(0)
VOXELS = RNG.standard_normal((5, 6, 7)).astype(np.float32)


@pytest.mark.parametrize("axes", itertools.permutations((1, 2, 3)))
def test_all_orders_of_the_axes_are_the_same_map_in_the_same_place(tmp_path, axes):
    start = {1: -3, 2: 5, 3: 11}
    order = [3 - axis for axis in axes[::-1]]  # numpy axes of z, y, x as sections, rows, columns
    columns, rows, sections = (start[axis] for axis in axes)
    path = write(tmp_path / "m.mrc", VOXELS.transpose(order), mapc=axes[0], mapr=axes[1], maps=axes[2])
    with mrcfile.open(path, "r+") as mrc:
        mrc.header.nxstart, mrc.header.nystart, mrc.header.nzstart = columns, rows, sections
        # sampling and cell are of x, y, z, whatever the columns are
        mrc.header.mx, mrc.header.my, mrc.header.mz = VOXELS.shape[::-1]
        mrc.header.cella = tuple(1.5 * n for n in VOXELS.shape[::-1])
    record = read_map(path)
    assert np.array_equal(record.voxels, VOXELS)
    assert record.nstart == (-3, 5, 11)
    assert record.offset == (-4.5, 7.5, 16.5)
    assert record.axes == axes


@pytest.mark.parametrize("name", ["m.mrc", "m.map.gz", "m.map.bz2"])
def test_what_is_saved_is_read_with_voxel_size_origin_and_start(tmp_path, name):
    for origin, nstart in [
        ((0.0, 0.0, 0.0), (3, -4, 5)),
        ((1.25, 2.5, -3.75), (0, 0, 0)),
        ((1.5, 3.0, 4.5), (1, 2, 3)),
    ]:
        given = MapRecord(VOXELS, (1.5, 1.5, 1.5), origin, nstart)
        save_map(tmp_path / name, given)
        read = read_map(tmp_path / name)
        assert np.array_equal(read.voxels, VOXELS)
        assert (read.voxel_sizes, read.origin, read.nstart) == (given.voxel_sizes, origin, nstart)
        assert read.warnings == ()
    save_map(tmp_path / "again.mrc", read)
    save_map(tmp_path / "twice.mrc", read_map(tmp_path / "again.mrc"))
    assert (tmp_path / "again.mrc").read_bytes() == (tmp_path / "twice.mrc").read_bytes()
    assert mrcfile.validate(tmp_path / "again.mrc")


def test_a_map_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    broken = np.where(VOXELS.max() == VOXELS, np.nan, VOXELS).astype(np.float32)
    with pytest.raises(MapFormatError, match="not finite"):
        save_map(tmp_path / "m.mrc", MapRecord(broken, (1.5, 1.5, 1.5)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16])
def test_modes_are_read_as_their_numbers(tmp_path, dtype):
    voxels = (VOXELS * 20).astype(dtype) if dtype != np.uint16 else (np.abs(VOXELS) * 1000).astype(dtype)
    assert np.array_equal(read_map(write(tmp_path / "m.mrc", voxels)).voxels, voxels.astype(np.float32))


def test_big_endian_is_the_same_map_bit_for_bit(tmp_path):
    with mrcfile.new(tmp_path / "big.mrc") as mrc:
        mrc.set_data(VOXELS.astype(">f4"))
        mrc.voxel_size = 1.5
    record = read_map(tmp_path / "big.mrc")
    assert (tmp_path / "big.mrc").read_bytes()[212:214] == b"\x11\x11"
    assert record.voxels.dtype.isnative
    assert record.voxels.tobytes() == VOXELS.tobytes()


def test_bytes_of_imod_are_unsigned_unless_its_flag_says_signed(tmp_path):
    voxels = np.arange(-60, 60, dtype=np.int8).reshape(4, 5, 6)
    path = write(tmp_path / "m.mrc", voxels)
    assert np.array_equal(read_map(path).voxels, voxels)
    patched(path, 152, struct.pack("<ii", 1146047817, 0))
    assert np.array_equal(read_map(path).voxels, voxels.view(np.uint8))
    patched(path, 156, struct.pack("<i", 1))
    assert np.array_equal(read_map(path).voxels, voxels)


def test_compression_is_told_by_content_not_by_name(tmp_path):
    plain = write(tmp_path / "m.mrc", VOXELS).read_bytes()
    (tmp_path / "gzip.mrc").write_bytes(gzip.compress(plain))
    (tmp_path / "bzip2.map").write_bytes(bz2.compress(plain))
    (tmp_path / "plain.map.gz").write_bytes(plain)
    for name in ("gzip.mrc", "bzip2.map", "plain.map.gz"):
        assert np.array_equal(read_map(tmp_path / name).voxels, VOXELS)


def test_a_position_is_used_once_and_a_contradiction_is_said(tmp_path):
    agree = write(tmp_path / "a.mrc", VOXELS, nxstart=2, nystart=4, nzstart=6, origin=(3.0, 6.0, 9.0))
    assert read_map(agree).offset == (3.0, 6.0, 9.0)
    assert read_map(agree).warnings == ()
    disagree = write(tmp_path / "d.mrc", VOXELS, nxstart=2, origin=(30.0, 0.0, 0.0))
    assert read_map(disagree).offset == (30.0, 0.0, 0.0)
    assert "disagree" in read_map(disagree).warnings[0]


# ---- what a header lacks


def test_what_is_missing_is_assumed_aloud(tmp_path):
    cases = {
        "order of the axes": {"mapc": 0, "mapr": 0, "maps": 0},
        "sampling": {"mx": 0, "my": 0, "mz": 0},
        "`MAP `": {"map": b"    "},
        "machine stamp": {"machst": (0, 0, 0, 0)},
        "header statistics": {"dmax": 9.0},
    }
    for said, header in cases.items():
        record = read_map(write(tmp_path / "m.mrc", VOXELS, **header))
        assert np.array_equal(record.voxels, VOXELS)
        assert record.voxel_size == pytest.approx(1.5)
        assert any(said in warning for warning in record.warnings), said
    with (tmp_path / "m.mrc").open("ab") as file:
        file.write(b"more")
    assert any("longer" in warning for warning in read_map(tmp_path / "m.mrc").warnings)
    assert read_map(write(tmp_path / "m.mrc", VOXELS, dmin=0, dmax=-1, dmean=-2)).warnings == ()


def test_a_machine_stamp_for_the_other_byte_order_is_seen_through(tmp_path):
    record = read_map(patched(write(tmp_path / "m.mrc", VOXELS), 212, b"\x11\x11"))
    assert np.array_equal(record.voxels, VOXELS)
    assert "contradicts" in record.warnings[0]


REFUSED = {
    "axes": ({"mapc": 1, "mapr": 1, "maps": 3}, "axes"),
    "oblique cell": ({"cellb": (90, 94.3, 90)}, "not 90"),
    "zero cell": ({"cella": (0, 0, 0)}, "no voxel size .* data.assume_voxel_size"),
    "negative cell": ({"cella": (-10, -9, -7)}, "no voxel size"),
    "NaN cell": ({"cella": (np.nan,) * 3}, "no voxel size"),
    "huge voxels": ({"cella": (700, 600, 500)}, "voxel size of 100 A"),
    "anisotropic": ({"cella": (10.5, 9.0, 5.0)}, "no cubes: set data.allow_anisotropic"),
    "complex int16": ({"mode": 3}, "Fourier transform"),
    "4 bits": ({"mode": 101}, "4-bit"),
    "unknown mode": ({"mode": 77}, "unknown mode 77"),
    "cut short": ({"nz": 50}, "cut short"),
    "negative edge": ({"nx": -7}, "damaged"),
    "monstrous": ({"nx": 2**30}, "damaged"),
    "extended header": ({"nsymbt": -4}, "extended header"),
    "long extended header": ({"nsymbt": 2**31 - 1}, "extended header"),
    "stack": ({"ispg": 401, "mz": 1}, "stack of 5 volumes"),
    "origin": ({"origin": (np.inf, 0, 0)}, "origin"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_damaged_or_meaningless_header_is_refused_by_name(tmp_path, case, compression):
    header, reason = REFUSED[case]
    path = write(tmp_path / "m.mrc", VOXELS)
    whole = bytearray(path.read_bytes())
    fields = np.frombuffer(whole, mrcfile.dtypes.HEADER_DTYPE, 1)
    for name, value in header.items():
        fields[name] = value
    path.write_bytes(gzip.compress(bytes(whole)) if compression else bytes(whole))
    with pytest.raises(MapFormatError, match=reason) as told:
        read_map(path)
    assert str(told.value).startswith(str(path))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"MAP", "ends within its header"),
        (b"<html><body>Not found</body></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"\x89PNG\r\n\x1a\n" + bytes(RNG.integers(0, 256, 4000, np.uint8)), "no MRC"),
        (gzip.compress(bytes(RNG.integers(0, 256, 4000, np.uint8)))[:900], "compressed file"),
        (b"BZh9" + bytes(RNG.integers(0, 256, 4000, np.uint8)), "cannot be read|compressed"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path, content, reason):
    (tmp_path / "m.map").write_bytes(content)
    with pytest.raises(MapFormatError, match=reason):
        read_map(tmp_path / "m.map")


def test_images_fourier_transforms_and_missing_files_are_refused(tmp_path):
    for voxels, reason in [(VOXELS[0], "image of 7 x 6"), (VOXELS.astype(np.complex64), "Fourier transform")]:
        with pytest.raises(NoDensityError, match=reason):
            read_map(write(tmp_path / "m.mrc", voxels))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mrc"):
        read_map(tmp_path / "nowhere.mrc")
    with pytest.raises(ValueError, match="is a directory"):
        read_map(tmp_path)


def test_voxels_that_are_no_numbers_stop_or_are_zero_by_choice(tmp_path):
    broken = VOXELS.copy()
    broken[1, 2, 3], broken[0, 0, 0] = np.nan, np.inf
    with pytest.warns(RuntimeWarning):
        path = write(tmp_path / "m.mrc", broken)
    with pytest.raises(MapFormatError, match=r"2 of 210 voxels .* data\.nan_policy=zero"):
        read_map(path)
    record = read_map(path, nan_policy="zero")
    assert record.voxels[1, 2, 3] == record.voxels[0, 0, 0] == 0
    assert "2 of 210" in record.warnings[0]


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_map_is_refused(tmp_path, value):
    with pytest.raises(MapFormatError, match="no density in it"):
        read_map(write(tmp_path / "m.mrc", np.full((5, 6, 7), value, np.float32)))


def test_a_tomogram_beyond_the_memory_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / "m.mrc", VOXELS, nx=4000, ny=4000, nz=2000)
    with pytest.raises(MapFormatError, match=r"4000 x 4000 x 2000 voxels, for which 512.0 GB .* bin it"):
        read_map(path, memory=8 * 10**9)


def test_a_given_voxel_size_replaces_that_of_the_header(tmp_path):
    path = write(tmp_path / "m.mrc", VOXELS, cella=(0, 0, 0), nxstart=2)
    assert read_map(path, voxel_size=1.25).offset == (2.5, 0.0, 0.0)


def test_an_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(NoDensityError("a.mrc", "is an image")))
    assert (type(error), str(error)) == (NoDensityError, "a.mrc is an image")
    error = pickle.loads(pickle.dumps(NoDensityError("a.mrc", "is no cube", Remedy.CUBES)))
    assert (type(error), str(error)) == (NoDensityError, f"a.mrc is no cube: {Remedy.CUBES.value}")


# ---- damage at random


@pytest.mark.usefixtures("_no_hang")
@pytest.mark.filterwarnings("error")
def test_200_mutated_maps_are_each_read_or_refused_in_a_sentence(tmp_path):
    content = write(tmp_path / "m.mrc", blob((10, 11, 12))).read_bytes()
    sentences = []
    for seed in range(200):
        rng = random.Random(seed)
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 3, 30))):
            place = rng.randrange(1024 if seed % 4 else len(mutated))
            mutated[place] = rng.choice((0, 255, mutated[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
        if seed % 5 == 0:
            mutated = mutated[: rng.randrange(len(mutated))]
        packed = gzip.compress(bytes(mutated)) if seed % 7 == 0 else bytes(mutated)
        if seed % 21 == 0:
            place = rng.randrange(len(packed))
            packed = packed[:place] + bytes([packed[place] ^ 16]) + packed[place + 1 :]
        path = tmp_path / f"{seed}.mrc"
        path.write_bytes(packed)
        try:
            record = read_map(path)
        except MapFormatError as error:
            sentences.append(str(error).removeprefix(str(path)))
        else:
            assert record.voxels.ndim == 3
            assert np.isfinite(record.voxels).all()
            assert 0.2 <= record.voxel_size <= 20
    assert 50 < len(sentences) < 190
    assert all(sentence.startswith(" ") and "\n" not in sentence and len(sentence) < 300 for sentence in sentences)


# ---- real maps


def at_alpha_carbons(record: MapRecord, model: str, order: int = 1) -> float:
    """Mean density at the CA atoms of a fitted model."""
    atoms = read_structure(real(f"models/{model}"))
    places = (atoms.coord[atoms.atom_name == "CA"] - record.offset) / record.voxel_sizes
    return float(map_coordinates(record.voxels, places.T[::-1], order=order).mean())


NDOM, SHIFTED = "6vyb_ndom.pdb.gz", "6vyb_ndom_shifted.pdb.gz"
FITTED = {
    ("maps/emd_3488.map.gz", "5ni1.cif.gz"): 0.2705,
    ("maps/emd_3488.map.gz", "5me2.pdb.gz"): 0.2543,
    ("maps/emd_21457_seg.mrc.gz", NDOM): 0.7865,
    ("maps/emd_21457_seg_nstart.mrc.gz", NDOM): 0.7865,
    ("maps/emd_21457_seg_orig0.mrc.gz", SHIFTED): 0.7865,
    ("variants/mode0_int8.mrc", NDOM): 37.71,
    ("variants/mode1_int16.mrc.gz", NDOM): 786.5,
    ("variants/mode6_uint16.mrc.gz", NDOM): 7865,
    ("variants/mode12_float16.mrc.gz", NDOM): 0.7865,
    ("variants/big_endian_float32.mrc.gz", NDOM): 0.7865,
    ("variants/axis_order_231.mrc.gz", NDOM): 0.7865,
    ("variants/axis_order_321.mrc.gz", NDOM): 0.7865,
    ("variants/subvolume_of_400_grid.mrc.gz", NDOM): 0.7865,
    ("variants/origin_and_nstart_agree.mrc.gz", NDOM): 0.7865,
}


@pytest.mark.parametrize(("name", "model"), FITTED)
def test_real_maps_are_densest_where_their_models_are(name, model):
    assert at_alpha_carbons(read_map(real(name)), model) == pytest.approx(FITTED[name, model], rel=2e-4)


@pytest.mark.parametrize(
    ("name", "model"), [("maps/emd_3488.map.gz", "5ni1.cif.gz"), ("variants/axis_order_231.mrc.gz", NDOM)]
)
def test_resampled_maps_stay_in_their_place(name, model):
    record = read_map(real(name))
    same, fine = (on_cube(record, size) for size in (record.voxel_size, 0.75 * record.voxel_size))
    assert at_alpha_carbons(same, model) == pytest.approx(at_alpha_carbons(record, model), rel=1e-5)
    # what lies between voxels is known better on the finer grid, and splines through either agree
    assert at_alpha_carbons(fine, model, order=3) == pytest.approx(at_alpha_carbons(record, model, order=3), rel=0.01)
    back = back_from_cube(fine, record, 0.75 * record.voxel_size)
    assert back.voxels.shape == record.voxels.shape
    # the segment has hard edges, and so a Nyquist term, which is left out
    assert at_alpha_carbons(back, model) == pytest.approx(at_alpha_carbons(record, model), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("maps/emd_3001.map", "94.326"),
        ("maps/5i55_tiny.ccp4", "not 90"),
        ("maps/1pfe_asu.msk.gz", "not 90"),
        ("variants/mode4_complex64_emd_3197_fft.mrc", "Fourier transform"),
        ("variants/volume_stack_3.mrc.gz", "stack of 3 volumes"),
        ("variants/zero_cell.mrc.gz", "no voxel size"),
        ("maps/iota_yzx.ccp4.gz", "voxel size of 30 A"),
    ],
)
def test_real_files_that_are_no_density_are_refused(name, reason):
    with pytest.raises(MapFormatError, match=reason):
        read_map(real(name))


def test_gzip_and_bzip2_of_an_entry_are_the_same_map():
    first, second = (read_map(real(f"maps/emd_3197.map.{ending}")) for ending in ("gz", "bz2"))
    assert np.array_equal(first.voxels, second.voxels)
    assert first.offset == second.offset == pytest.approx((-22.8, 0, 0))


@pytest.mark.parametrize("name", ["maps/emd_11007_crop96.map.gz", "maps/emd_3488.map.gz", "maps/emd_3001.map"])
def test_axes_are_ordered_as_gemmi_orders_them(name, monkeypatch):
    gemmi = pytest.importorskip("gemmi")
    theirs = gemmi.read_ccp4_map(str(real(name)))
    theirs.setup(0.0)
    # the reader refuses an oblique cell, and orders it all the same
    monkeypatch.setattr("datamodules.mrc._voxel_sizes", lambda *_: (1.0, 1.0, 1.0))
    ours = read_map(real(name))
    x, y, z = ours.nstart
    for k, j, i in np.random.default_rng(0).integers(0, ours.voxels.shape, (200, 3)).tolist():
        assert theirs.grid.get_value(x + i, y + j, z + k) == ours.voxels[k, j, i]


def test_the_real_maps_are_at_hand_where_they_are_said_to_be():
    if not REAL.exists():
        pytest.skip(f"no real data in {REAL}")
    assert len(list((REAL / "maps").iterdir())) == 12
