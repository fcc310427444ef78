"""Webdataset shards, intact and with every defect that a download can leave."""

import collections
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from rac3.config import InputError
from rac3.documents.document import Document, Note, Reject
from rac3.documents.filter import LaionFilter
from rac3.documents.webdataset import WebDataset


def image_bytes(seed: int, kind: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def sample(key: str, seed: int = 0, kind: str = "png") -> list[tuple[str, bytes]]:
    row = {"key": key, "caption": f"json caption {key}", "captions": ["first", "second"], "similarity": float("nan")}
    return [
        (f"{key}.{kind}", image_bytes(seed, "jpeg" if kind == "jpg" else kind)),
        (f"{key}.txt", f"caption {key}".encode()),
        (f"{key}.json", json.dumps(row).encode()),
    ]


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_table(path: Path, keys: list[str], failed: tuple[str, ...] = ()) -> None:
    rows = [{"key": k, "status": "failed_to_download" if k in failed else "success", "punsafe": 0.25} for k in keys]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def read(folder: Path, shard: str = "00000", **fields: object) -> tuple[dict[str, Document], dict[str, str]]:
    """Documents and reject reasons by key, without notes; fails if a key occurs twice."""
    items = [item for item in WebDataset(**fields).read(folder, shard) if not isinstance(item, Note)]
    documents = {item.key: item for item in items if isinstance(item, Document)}
    rejects = {item.key: item.reason for item in items if isinstance(item, Reject)}
    assert len(documents) + len(rejects) == len(items)
    return documents, rejects


def test_shards_are_sorted_and_named_without_suffix(tmp_path):
    for name in ("00010.tar", "00002.tar", "._00002.tar", "00002.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert WebDataset().shards(tmp_path) == ["00002", "00010"]
    assert WebDataset(folder=tmp_path.name).shards(tmp_path.parent) == ["00002", "00010"]


def test_no_folder_and_no_shards_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="nowhere' does not exist"):
        WebDataset(folder="nowhere").shards(tmp_path)
    with pytest.raises(InputError, match=r"holds no \.tar file"):
        WebDataset().shards(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "00000.tar").write_bytes(b"")
    with pytest.raises(InputError, match="its subfolders that do: train"):
        WebDataset().shards(tmp_path)


def test_bad_limit_is_an_input_error():
    with pytest.raises(InputError, match="max_pixels=0"):
        WebDataset(max_pixels=0)


@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp"])
def test_a_whole_sample(tmp_path, kind):
    write_tar(tmp_path / "00000.tar", sample("000000003", 3, kind))
    documents, rejects = read(tmp_path)
    document = documents["00000/000000003"]
    assert rejects == {}
    assert document.text == "caption 000000003"
    assert document.images[0].data == image_bytes(3, "jpeg" if kind == "jpg" else kind)  # the stored bytes
    assert document.metadata["captions"] == ["first", "second"]
    assert document.metadata["similarity"] is None  # NaN is no JSON
    json.dumps(document.metadata, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x.png", image_bytes(0)[:300], "truncated image"),
        ("x.png", b"", "empty image"),
        ("x.png", b"<html>404</html>", "not an image"),
        ("x.png", None, "missing image"),
        ("x.txt", None, "missing text"),
        ("x.txt", b"caf\xe9 \xff\xfe\xc3\x28", "undecodable text"),
        ("x.txt", b" \n", "empty text"),
        ("x.json", b'{"caption": "cut', "broken json"),
        ("x.json", b"[1, 2]", "broken json"),
        ("x.json", b"\xff\xfe\xfa", "broken json"),
        ("x.json", b"[" * 100_000, "broken json"),
    ],
)
def test_one_damaged_file_is_one_reject_and_its_neighbors_live(tmp_path, name, data, reason):
    damaged = [(n, data if n == name else d) for n, d in sample("x") if not (n == name and data is None)]
    write_tar(tmp_path / "00000.tar", sample("a", 1) + damaged + sample("b", 2))
    write_table(tmp_path / "00000.parquet", ["a", "x", "b"])  # the table does not mention the damage
    documents, rejects = read(tmp_path)
    assert list(documents) == ["00000/a", "00000/b"]
    assert list(rejects) == ["00000/x"]
    assert rejects["00000/x"].split(":")[0] == reason
    assert "\n" not in rejects["00000/x"]


def test_a_large_image_is_a_bomb_only_over_the_limit(tmp_path):
    write_tar(tmp_path / "00000.tar", sample("a"))
    assert len(read(tmp_path, max_pixels=12 * 16)[0]) == 1
    _, rejects = read(tmp_path, max_pixels=12 * 16 - 1)
    assert rejects == {"00000/a": "decompression bomb: 16x12 exceeds 191 pixels"}


def test_metadata_without_json_is_the_row_of_the_table(tmp_path):
    write_tar(tmp_path / "00000.tar", sample("a")[:2])
    assert read(tmp_path)[0]["00000/a"].metadata == {}
    write_table(tmp_path / "00000.parquet", ["a"])
    assert read(tmp_path)[0]["00000/a"].metadata == {"key": "a", "status": "success", "punsafe": 0.25}


def test_a_damaged_table_is_reported_where_it_is_needed(tmp_path):
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 cut")
    write_tar(tmp_path / "00000.tar", sample("a"))
    assert read(tmp_path)[1] == {}
    write_tar(tmp_path / "00000.tar", sample("a")[:2])
    documents, rejects = read(tmp_path)
    assert documents["00000/a"].metadata == {}
    assert list(rejects) == ["00000.parquet"]
    assert rejects["00000.parquet"].startswith("broken table: ")


def test_the_caption_can_be_a_field(tmp_path):
    write_tar(tmp_path / "00000.tar", [sample("a")[0], sample("a")[2]])
    assert read(tmp_path)[1] == {"00000/a": "missing text"}
    assert read(tmp_path, caption_field="caption")[0]["00000/a"].text == "json caption a"
    assert read(tmp_path, caption_field="captions")[0]["00000/a"].text == "first"
    assert read(tmp_path, caption_field="similarity")[1] == {"00000/a": "missing text"}
    write_tar(tmp_path / "00000.tar", sample("a"))  # with a .txt too
    assert read(tmp_path, caption_field="caption")[0]["00000/a"].text == "json caption a"
    assert read(tmp_path, caption_field="similarity")[1] == {"00000/a": "missing text"}


def test_odd_names(tmp_path):
    members = [
        *((f"./{name}", data) for name, data in sample("dot")),
        *((f"/deep/er/{name}", data) for name, data in sample("slash")),
        ("UPPER.PNG", image_bytes(0)),
        ("UPPER.TXT", b"caption"),
        ("._000.jpg", b"not a sample"),
        ("README", b"not a sample"),
        ("UPPER.npy", b"of no interest"),
        ("b\udcff.png", b""),
    ]
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        folder = tarfile.TarInfo("folder.txt")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/nowhere"
        tar.addfile(link)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    documents, rejects = read(tmp_path)
    assert list(documents) == ["00000/dot", "00000/deep/er/slash", "00000/UPPER"]
    assert rejects == {"00000/b?": "missing text"}
    " ".join([*documents, *rejects]).encode()  # every key can be written


def test_the_key_ends_at_the_first_dot_and_other_kinds_belong_to_nothing(tmp_path):
    image, text, json_file = sample("a.b/000", 1)
    extra = [("a.b/000.mask.png", b"no picture of the sample"), ("a.b/000.seg.txt", b"nor its caption")]
    write_tar(tmp_path / "00000.tar", [extra[0], image, extra[1], text, json_file])
    documents, rejects = read(tmp_path)
    assert rejects == {}
    assert documents["00000/a.b/000"].text == "caption a.b/000"
    assert documents["00000/a.b/000"].images[0].data == image_bytes(1)


@pytest.mark.parametrize("between", [[], sample("b", 1)])
def test_a_key_is_used_once(tmp_path, between):
    write_tar(tmp_path / "00000.tar", sample("a", 5) + between + sample("a", 6) + sample("c", 7))
    items = list(WebDataset().read(tmp_path, "00000"))
    assert Reject("00000/a", "duplicate key") in items
    documents = [item for item in items if isinstance(item, Document)]
    assert [d.key for d in documents] == ["00000/a", *(["00000/b"] if between else []), "00000/c"]
    assert documents[0].images[0].data == image_bytes(5)  # the first one stays


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_at_any_place_keeps_what_is_whole(tmp_path, tar_format):
    """Truncate a tar of three samples at many places: complete samples are documents, the rest are rejects."""
    # A long name takes extra header blocks in GNU and PAX tars; USTAR has no room for it.
    keys = ["a", "b" * (20 if tar_format == tarfile.USTAR_FORMAT else 120), "c"]
    path = tmp_path / "00000.tar"
    write_tar(path, [member for i, key in enumerate(keys) for member in sample(key, i)], tar_format)
    write_table(tmp_path / "00000.parquet", keys)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        # a sample is complete with the last byte of its JSON
        ends = [m.offset_data + m.size for m in tar.getmembers() if m.name.endswith(".json")]
    for length in sorted({*range(0, len(data), 300), *range(512, len(data), 512), *ends, ends[0] - 1}):
        path.write_bytes(data[:length])
        documents, rejects = read(tmp_path)
        whole = sum(end <= length for end in ends)
        assert list(documents) == [f"00000/{key}" for key in keys[:whole]], length
        assert set(rejects) == {f"00000/{key}" for key in keys[whole:]}, length
        assert {reason.split(":")[0] for reason in rejects.values()} <= {"truncated tar", "lost after truncated tar"}


def test_a_cut_without_a_table_is_still_reported(tmp_path):
    path = tmp_path / "00000.tar"
    write_tar(path, sample("a") + sample("b"))
    with tarfile.open(path) as tar:
        second = tar.getmembers()[3]
    data = path.read_bytes()
    for length in (0, second.offset, second.offset + 100):
        path.write_bytes(data[:length])
        documents, rejects = read(tmp_path)
        assert len(documents) == (length > 0)
        assert list(rejects) == ["00000"]
        assert rejects["00000"].startswith("truncated tar: ")


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = tmp_path / "00000.tar"
    write_tar(path, sample("a") + sample("b") + sample("c"))
    write_table(tmp_path / "00000.parquet", ["a", "b", "failed", "c"], failed=("failed",))
    with tarfile.open(path) as tar:
        second = tar.getmembers()[3]
    data = bytearray(path.read_bytes())
    data[second.offset : second.offset + 512] = b"\xa5" * 512
    path.write_bytes(data)
    documents, rejects = read(tmp_path)
    assert list(documents) == ["00000/a"]
    assert rejects == {"00000/b": "lost after truncated tar", "00000/c": "lost after truncated tar"}


def test_what_failed_to_download_is_no_reject(tmp_path):
    write_tar(tmp_path / "00000.tar", sample("a"))
    write_table(tmp_path / "00000.parquet", ["a", "b"], failed=("b",))
    assert read(tmp_path)[1] == {}


CORRUPT = {
    "00000": {"000000002": "truncated image"},
    "00001": {"000010002": "empty image"},
    "00002": {"000020002": "missing text"},
    "00003": {"000030002": "undecodable text"},
    "00004": {"000040002": "broken json"},
    "00005": {"000050003": "truncated tar", "000050004": "lost after truncated tar"},
    "00006": {"000060002": "decompression bomb"},
    "00007": {
        "000070001": "truncated image",
        "000070002": "empty image",
        "000070004": "missing text",
        "000070005": "undecodable text",
        "000070006": "broken json",
        "000070008": "decompression bomb",
        "000070009": "missing image",
        "000070010": "not an image",
    },
}


@pytest.mark.shared_data
def test_emoji_captions_corrupt(shared_data):
    folder = shared_data / "emoji-captions-corrupt"
    assert list(WebDataset().shards(folder)) == list(CORRUPT)
    good = {"00005": 3}
    for shard, expected in CORRUPT.items():
        documents, rejects = read(folder, shard)
        assert len(documents) == good.get(shard, 4)
        assert {key: reason.split(":")[0] for key, reason in rejects.items()} == {
            f"{shard}/{key}": reason for key, reason in expected.items()
        }


@pytest.mark.shared_data
def test_emoji_captions(shared_data):
    source, folder = WebDataset(folder="train"), shared_data / "emoji-captions"
    shards = source.shards(folder)
    assert len(shards) == 6
    outcomes: collections.Counter[str | None] = collections.Counter()
    keys = set()
    for shard in shards:
        for item in source.read(folder, shard):
            assert isinstance(item, Document), item
            keys.add(item.key)
            outcomes[LaionFilter().reason(item.metadata)] += 1
    assert len(keys) == 11287
    assert outcomes == {None: 10961, "unsafe": 108, "watermark": 119, "small": 99}
