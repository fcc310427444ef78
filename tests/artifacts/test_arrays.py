"""Arrays on disk: one file per shard, written at once; single rows; vectors that are read as float32."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore

from rac3.artifacts.arrays import (
    CHUNK_BYTES,
    Rows,
    VectorDtype,
    Vectors,
    create_array,
    open_array,
    read_array,
    write_shard,
)
from rac3.config import InputError


@pytest.mark.parametrize("shape", [(1000, 2, 3), (0, 4), (5,), (3, 2_000_000)])
@pytest.mark.parametrize("shard_rows", [64, 300, 65_536])
def test_arrays_come_back_by_rows_and_whole(tmp_path: Path, shape: tuple[int, ...], shard_rows: int):
    """Rows of (3, 2000000) float32 exceed the chunk size; shards are written in any order."""
    array = create_array(tmp_path / "a", shape, "float32", shard_rows)
    data = np.random.default_rng(0).random(shape, np.float32)
    for number in reversed(range(-(-shape[0] // shard_rows))):
        write_shard(array, number, data[number * shard_rows : (number + 1) * shard_rows])
    np.testing.assert_array_equal(read_array(tmp_path / "a"), data)
    rows = Rows(tmp_path / "a")
    assert rows.shape == shape
    assert len(rows) == shape[0]
    half = shape[0] // 2
    for index in (slice(0, half), slice(half, None), slice(-2, 10_000), slice(half, 0)):
        np.testing.assert_array_equal(rows[index], data[index])
    picked = np.random.default_rng(1).integers(0, max(shape[0], 1), 700 if shape[0] == 1000 else min(shape[0], 7))
    np.testing.assert_array_equal(rows[picked], data[picked])


def test_a_shard_is_one_file_and_a_row_is_one_small_chunk(tmp_path: Path):
    array = create_array(tmp_path / "a", (10_000, 256), "float32", 4096)
    chunk = array.chunk_layout.read_chunk.shape
    assert chunk[0] * 256 * 4 <= CHUNK_BYTES
    assert 4096 % chunk[0] == 0
    before: set[Path] = set()
    for number in range(3):
        write_shard(array, number, np.ones((min(4096, 10_000 - number * 4096), 256), np.float32))
        files = {path for path in (tmp_path / "a" / "c").rglob("*") if path.is_file()}
        assert len(files - before) == 1
        before = files


@pytest.mark.parametrize("rows", [0, 1, 63, 65])
def test_a_part_of_a_shard_is_not_written(tmp_path: Path, rows: int):
    array = create_array(tmp_path / "a", (100, 2), "int64", 64)
    with pytest.raises(ValueError, match="shard 0 has 64 rows"):
        write_shard(array, 0, np.zeros((rows, 2), np.int64))


def test_an_array_of_another_layout_is_not_opened_for_this_one(tmp_path: Path):
    create_array(tmp_path / "a", (4, 2), "int64", 2)
    create_array(tmp_path / "a", (4, 2), "int64", 2)
    with pytest.raises(ValueError, match="shape"):
        create_array(tmp_path / "a", (5, 2), "int64", 2)
    with pytest.raises(ValueError, match="chunk"):
        create_array(tmp_path / "a", (4, 2), "int64", 4)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_vectors_come_back_as_float32(tmp_path: Path, dtype: VectorDtype, bytes_each: int):
    """As close as the type allows: bfloat16 keeps 8 bits per number, int8 is within half of a row's 127th."""
    data = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
    data *= np.random.default_rng(1).uniform(0.01, 10, (1000, 1)).astype(np.float32)
    data[7] = 0
    vectors = Vectors.create(tmp_path / "v", (1000, 64), dtype, 300)
    for number in range(4):
        vectors.write_shard(number, data[number * 300 : (number + 1) * 300])
    assert open_array(tmp_path / "v").dtype.name == dtype
    stored = Vectors(tmp_path / "v")
    largest = np.abs(data).max(1, keepdims=True)
    bound = {"float32": 0, "bfloat16": np.abs(data) * 2**-8, "int8": largest * (0.5 / 127 + 1e-6)}[dtype]
    assert (np.abs(stored[:] - data) <= bound).all()
    picked = np.array([999, 7, 7, 0])
    np.testing.assert_array_equal(stored[picked], stored[:][picked])
    assert stored[picked].dtype == np.float32
    assert not stored[7:8].any()
    assert stored.shape == (1000, 64)
    size = sum(path.stat().st_size for path in (tmp_path / "v" / "c").rglob("*") if path.is_file())
    assert 1000 * 64 * bytes_each <= size <= 1200 * 64 * bytes_each + 4 * 1024


def test_a_vector_that_is_no_number_stays_none(tmp_path: Path):
    """int8 has no NaN; a NaN must not be read as a plausible vector."""
    data = np.ones((4, 3), np.float32)
    data[1, 2] = np.nan
    vectors = Vectors.create(tmp_path / "v", (4, 3), "int8", 4)
    vectors.write_shard(0, data)
    assert np.isfinite(vectors[:]).all(1).tolist() == [True, False, True, True]


def test_rows_are_those_asked_for_in_their_order(tmp_path: Path):
    """Across shards of 4 and chunks of 2, some twice; the other two axes are complete."""
    data = np.arange(10 * 2 * 3).reshape(10, 2, 3)
    array = create_array(tmp_path / "a", data.shape, "int64", 4, chunk_bytes=2 * 2 * 3 * 8)
    assert array.chunk_layout.write_chunk.shape == (4, 2, 3)
    assert array.chunk_layout.read_chunk.shape == (2, 2, 3)
    for number, rows in enumerate((data[:4], data[4:8], data[8:])):
        write_shard(array, number, rows)
    rows = Rows(tmp_path / "a")
    np.testing.assert_array_equal(rows[np.array([9, 0, 4, 4, 3, 9])], data[[9, 0, 4, 4, 3, 9]])
    np.testing.assert_array_equal(rows[np.array([1, 2, 7])], data[[1, 2, 7]])
    np.testing.assert_array_equal(rows[3:9], data[3:9])
    np.testing.assert_array_equal(rows[-3:], data[-3:])
    assert rows[np.array([], int)].shape == (0, 2, 3)
    with pytest.raises(ValueError, match="steps of 2; use a step of 1"):
        rows[0:4:2]


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_is_none_is_no_other_row(row: int, tmp_path: Path):
    """-1 means no neighbor; it must not read the last document."""
    array = create_array(tmp_path / "a", (10, 2), "int64", 4)
    for number, size in enumerate((4, 4, 2)):
        write_shard(array, number, np.ones((size, 2), np.int64))
    with pytest.raises(ValueError, match=f"Index {row} is outside valid range"):
        Rows(tmp_path / "a")[np.array([0, row])]


def test_rows_that_no_one_has_written_are_missing_and_zeros_are_there(tmp_path: Path):
    """zarr reads what is missing as a fill value, and does not store what equals it."""
    ids = create_array(tmp_path / "ids", (5, 2), "int64", 2)
    write_shard(ids, 1, np.zeros((2, 2), np.int64))
    assert (tmp_path / "ids/c/1/0").is_file()
    assert Rows(tmp_path / "ids")[2:4].tolist() == [[0, 0], [0, 0]]
    for rows in (slice(1, 3), np.array([3, 4])):
        with pytest.raises(InputError, match=r"ids/c/[02]/0 is missing"):
            Rows(tmp_path / "ids")[rows]


def test_every_bit_of_a_row_is_checked(tmp_path: Path):
    """Chunks of 2 rows: what is damaged in one is found when it is read, and the other is read as before."""
    array = create_array(tmp_path / "a", (4, 2), "float32", 4, chunk_bytes=16)
    data = np.arange(8, dtype=np.float32).reshape(4, 2)
    write_shard(array, 0, data)
    path = tmp_path / "a/c/0/0"
    whole = path.read_bytes()
    place = whole.index(data[:2].tobytes())
    for bit in range(0, 8 * data[:2].nbytes, 5):
        flipped = bytearray(whole)
        flipped[place + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(InputError, match=r"a/c/0/0 is damaged: Digest mismatch"):
            Rows(tmp_path / "a")[np.array([1])]
        np.testing.assert_array_equal(Rows(tmp_path / "a")[2:], data[2:])


def test_an_array_of_an_older_version_is_read_as_it_was_written(tmp_path: Path):
    """Its chunks have no checksums, and it left out those that equal its fill value."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = {"chunk_shape": [2, 1], "codecs": [little_endian], "index_codecs": [little_endian, {"name": "crc32c"}]}
    metadata = {
        "shape": [4, 1],
        "data_type": "int64",
        "fill_value": -1,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 1]}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    store = {"driver": "file", "path": str(tmp_path / "a")}
    array = tensorstore.open({"driver": "zarr3", "kvstore": store, "metadata": metadata, "create": True}).result()
    array[:2].write(np.array([[3], [4]])).result()
    assert not (tmp_path / "a/c/1").exists()
    assert read_array(tmp_path / "a").tolist() == [[3], [4], [-1], [-1]]


def test_int8_codes_are_127ths_of_the_largest_number_of_their_row(tmp_path: Path):
    """0.6 is 76.2 / 127, 0.25 is 31.75 / 127; each row has its own scale."""
    rows = np.array([[1.0, -0.6, 0.25], [0.0, 0.0, 0.0], [-0.02, 0.005, 0.0]], np.float32)
    vectors = Vectors.create(tmp_path / "v", (3, 3), "int8", 2)
    vectors.write_shard(0, rows[:2])
    vectors.write_shard(1, rows[2:])
    codes = np.array([[127, -76, 32], [0, 0, 0], [-127, 32, 0]])
    np.testing.assert_array_equal(read_array(tmp_path / "v"), codes)
    scales = np.array([1, 0, 0.02]) / 127
    np.testing.assert_allclose(read_array(tmp_path / "v.scales"), scales, rtol=1e-6)
    np.testing.assert_allclose(Vectors(tmp_path / "v")[:], codes * scales[:, None], rtol=1e-6)
    np.testing.assert_allclose(vectors[np.array([2, 0])], (codes * scales[:, None])[[2, 0]], rtol=1e-6)


def test_bfloat16_rounds_to_the_nearest(tmp_path: Path):
    """1 + 3/512 lies between 1 and 1 + 1/128, nearer to the latter; ties round to even."""
    vectors = Vectors.create(tmp_path / "v", (1, 4), "bfloat16", 1)
    vectors.write_shard(0, np.array([[1 + 3 / 512, 1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 512]], np.float32))
    np.testing.assert_array_equal(vectors[:], [[1 + 1 / 128, 1.0, 1 + 1 / 64, -1.0]])
