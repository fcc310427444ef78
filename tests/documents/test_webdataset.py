"""Webdataset shards, intact and with every defect that a download can leave."""

import collections
import gzip
import io
import json
import tarfile
import tracemalloc
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
    assert rejects == {"00000/b?": "missing text", "00000/link": "a link: .png is not in the tar itself"}
    notes = {item.what: item for item in WebDataset().read(tmp_path, "00000") if isinstance(item, Note)}
    assert {what: (note.count, note.example) for what, note in notes.items()} == {
        ".jpg of no sample": (1, "00000/._000.jpg"),
        "a file without extension of no sample": (1, "00000/README"),
        ".npy of no sample": (1, "00000/UPPER.npy"),
    }
    " ".join([*documents, *rejects]).encode()  # every key can be written


def test_a_field_next_to_those_of_a_sample_is_no_sample(tmp_path):
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


@pytest.mark.slow
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


def items_of(folder: Path, shard: str = "00000", **fields: object) -> tuple[list[str], dict[str, str], dict[str, Note]]:
    """The keys of the documents, reasons of rejects by key, and notes by what they say."""
    items = list(WebDataset(**fields).read(folder, shard))
    rejects = {item.key: item.reason for item in items if isinstance(item, Reject)}
    notes = {item.what: item for item in items if isinstance(item, Note)}
    return [item.key for item in items if isinstance(item, Document)], rejects, notes


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **header: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in header.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def test_a_key_ends_at_the_extension_that_is_known(tmp_path):
    keys = ["photo 2.0", "photo 2.1", "v1.2.3/a.b", "photo 2.1.jpg", "photo"]
    members = [(f"{key}{end}", data) for key in keys for end, data in ((".png", image_bytes(0)), (".txt", b"x"))]
    write_tar(tmp_path / "00000.tar", members)
    documents, rejects, notes = items_of(tmp_path)
    assert sorted(documents) == sorted(f"00000/{key}" for key in keys)
    assert (rejects, notes) == ({}, {})


def test_fields_can_be_named(tmp_path):
    """As webdataset's ShardWriter names them, in any case; what has no such name belongs to no sample."""
    members = [("s0.input.JPG", image_bytes(0)), ("s0.caption.txt", b"x"), ("s0.jpg", b"no"), ("s0.txt", b"no")]
    write_tar(tmp_path / "00000.tar", members)
    documents, rejects, notes = items_of(tmp_path, image="input.jpg", text="caption.txt")
    assert (documents, rejects) == (["00000/s0"], {})
    assert {what: note.count for what, note in notes.items()} == {".jpg of no sample": 1, ".txt of no sample": 1}
    assert items_of(tmp_path, image="input.jpg;input.png", text=".caption.txt")[0] == ["00000/s0"]
    for bad in ({"image": ""}, {"text": "txt;;"}, {"image": "jpg;json"}, {"image": "jpg;txt"}):
        with pytest.raises(InputError, match=r"source\.(image|text)"):
            WebDataset(**bad)


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (["a.gif", "b.gif", "a.cls"], "2 .gif, 1 .cls (such as 'a.gif')"),
        (["s0.image.png", "s0.caption.txt", "s1.image.png"], "2 .image.png, 1 .caption.txt (such as 's0.image.png')"),
        (["a.jpg", "b.jpg"], "2 .jpg (such as 'a.jpg')"),
    ],
)
def test_a_shard_without_a_sample_says_what_it_holds(tmp_path, names, held):
    write_tar(tmp_path / "00000.tar", [(name, b"x") for name in names])
    with pytest.raises(InputError, match=r"00000\.tar holds no sample of an image and a text, but ") as error:
        items_of(tmp_path)
    assert held in str(error.value)
    assert "WebDataset(image='input.jpg', text='caption.txt')" in str(error.value)


def test_a_shard_without_members_is_noted(tmp_path):
    write_tar(tmp_path / "00000.tar", [])
    assert items_of(tmp_path) == ([], {}, {"shard without members": Note("shard without members", 1, "00000.tar")})


def test_members_that_are_not_adjacent_are_one_reject_a_sample(tmp_path):
    pictures, texts, metadata = zip(*[sample(key) for key in "ab"], strict=True)
    write_tar(tmp_path / "00000.tar", [*pictures, *texts, *sample("c")])
    documents, rejects, _ = items_of(tmp_path)
    assert documents == ["00000/c"]
    assert {key: reason.split(":")[0] for key, reason in rejects.items()} == dict.fromkeys(
        ("00000/a", "00000/b"), "members not adjacent"
    )
    write_tar(tmp_path / "00000.tar", [pictures[0], texts[0], pictures[1], texts[1], *metadata])
    documents, rejects, _ = items_of(tmp_path)
    assert documents == ["00000/a", "00000/b"]  # whose scores came too late
    assert rejects["00000/a"] == "members not adjacent: its json comes after other samples"


def test_the_reason_is_the_real_one(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in [*sample("good"), ("two.jpg", image_bytes(0, "jpeg")), *sample("two"), ("link.txt", b"x")]:
            add(tar, name, data)
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="two.png")
        add(tar, "device.png", type=tarfile.CHRTYPE)
        add(tar, "device.txt", b"x")
    documents, rejects, _ = items_of(tmp_path)
    assert documents == ["00000/good"]
    assert rejects == {
        "00000/two": "two images: .jpg and .png; name one field, as in WebDataset(image='jpg')",
        "00000/link": "a link: .png is not in the tar itself",
        "00000/device": "not a plain file: .png is a device",
    }
    assert items_of(tmp_path, image="jpg")[0] == ["00000/two"]


@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.gz", "00000.tgz"])
def test_gzipped_shards_are_read_whatever_they_are_called(tmp_path, name):
    write_tar(tmp_path / "plain.tar", [*sample("a"), *sample("b", 1)])
    data = gzip.compress((tmp_path / "plain.tar").read_bytes())
    (tmp_path / "plain.tar").unlink()
    (tmp_path / name).write_bytes(data)
    write_table(tmp_path / "00000.parquet", ["a", "b"])
    assert WebDataset().shards(tmp_path) == ["00000"]
    assert items_of(tmp_path) == (["00000/a", "00000/b"], {}, {})
    (tmp_path / name).write_bytes(data[: len(data) * 3 // 4])
    documents, rejects, _ = items_of(tmp_path)
    assert {*documents, *rejects} == {"00000/a", "00000/b"}
    assert "truncated tar" in rejects["00000/b"]
    (tmp_path / "00000.tar").write_bytes(data)
    (tmp_path / "00000.tgz").write_bytes(data)
    with pytest.raises(InputError, match="holds '00000' plain and compressed"):
        WebDataset().shards(tmp_path)


def test_a_shard_that_is_no_file_loses_what_its_table_lists(tmp_path):
    (tmp_path / "00000.tar").mkdir()
    (tmp_path / "00001.tar").symlink_to(tmp_path / "nowhere")
    assert WebDataset().shards(tmp_path) == ["00000", "00001"]
    for shard in ("00000", "00001"):
        (reject,) = WebDataset().read(tmp_path, shard)
        assert (reject.key, reject.documents) == (shard, None)
        assert reject.reason.startswith("unreadable shard: ")
        assert reject.reason.endswith("; the rest of the shard is lost")
    write_table(tmp_path / "00000.parquet", ["a", "b", "c"], failed=("c",))
    assert list(items_of(tmp_path)[1]) == ["00000/a", "00000/b"]


def test_a_cut_without_a_table_loses_the_rest(tmp_path):
    write_tar(tmp_path / "00000.tar", [*sample("a"), *sample("b"), *sample("c")])
    with tarfile.open(tmp_path / "00000.tar") as tar:
        cut = tar.getmember("b.txt").offset_data
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:cut])
    (reject,) = (item for item in WebDataset().read(tmp_path, "00000") if isinstance(item, Reject))
    assert (reject.key, reject.documents) == ("00000/b", None)
    assert reject.reason.endswith("; the rest of the shard is lost")


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header whose size field is given."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sparse(name: str, claims: int) -> bytes:
    """A GNU sparse member of 512 bytes that claims to be larger."""
    block = bytearray(header(name, b"%011o\0" % 512, b"S"))
    block[257:265] = b"ustar  \0"
    block[386:398], block[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    block[483:495] = b"%011o\0" % claims
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512)


@pytest.mark.parametrize(
    "odd",
    [
        header("x.png", b"\xff" * 11 + b"\x00"),  # -256 bytes
        header("x.png", b"\x80" + b"\x7f" * 11),  # more than any address
        header("x.png", b"77777777777\0"),
        header("x.png", b"\x80" + b"\xff" * 11, b"x"),  # of a PAX header, which is read whole
        header("x.png", b"\x80" + b"\0" * 6 + b"\x04" + b"\0" * 4, b"L"),  # a name of 16 GB
        header("x.png", b"9z\xff\0\0\0\0\0\0\0\0\0"),
    ],
)
def test_headers_that_claim_any_size_cost_no_memory(tmp_path, odd):
    write_tar(tmp_path / "plain.tar", [*sample("a"), *sample("b")])
    with tarfile.open(tmp_path / "plain.tar") as tar:
        second = tar.getmember("b.png").offset
    data = (tmp_path / "plain.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(data[:second] + odd + data[second:])
    tracemalloc.start()
    documents, rejects, _ = items_of(tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert documents == ["00000/a"]
    assert [reason.split(":")[0] for reason in rejects.values()] == ["truncated tar"]
    assert most < 2**25


def test_a_sparse_member_is_a_reject(tmp_path):
    write_tar(tmp_path / "plain.tar", [*sample("a"), *sample("b")])
    data = (tmp_path / "plain.tar").read_bytes()
    with tarfile.open(tmp_path / "plain.tar") as tar:
        second = tar.getmember("b.png").offset
    members = sparse("x.png", 5_000_000_000) + header("x.txt", b"%011o\0" % 1) + b"x" + bytes(511)
    (tmp_path / "00000.tar").write_bytes(data[:second] + members + data[second:])
    assert items_of(tmp_path) == (["00000/a", "00000/b"], {"00000/x": "not a plain file: .png is sparse"}, {})


def test_members_larger_than_any_image_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("rac3.documents.tar.MAX_BYTES", 2**16)
    write_tar(tmp_path / "00000.tar", [*sample("a"), ("x.png", bytes(2**16 + 1)), ("x.txt", b"x")])
    reason = "too large: .png has 65,537 bytes, more than 65,536"
    assert items_of(tmp_path) == (["00000/a"], {"00000/x": reason}, {})


def test_names_that_continue_each_other_are_held_in_bounded_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("rac3.documents.tar.RELATED", 3)
    keys = ["a", *(f"a.{number}" for number in range(10))]
    write_tar(tmp_path / "00000.tar", [member for key in keys for member in sample(key)[:2]])
    assert items_of(tmp_path)[0] == [f"00000/{key}" for key in keys]


@pytest.mark.parametrize(
    "value", ['{"a": ' * 600 + "1" + "}" * 600, '{"a": "\\ud800"}', '{"\\ud800": 1}', '{"n": 1e999}']
)
def test_odd_json_costs_at_most_its_sample(tmp_path, value):
    members = [*sample("a"), *sample("x")[:2], ("x.json", value.encode()), *sample("b")]
    write_tar(tmp_path / "00000.tar", members)
    documents, rejects, _ = items_of(tmp_path)
    assert {*documents, *rejects} == {"00000/a", "00000/x", "00000/b"}
    assert documents[0 :: len(documents) - 1] == ["00000/a", "00000/b"]


def test_a_table_with_dates_that_python_lacks_keeps_its_scores(tmp_path):
    write_tar(tmp_path / "00000.tar", sample("a")[:2])
    columns = {
        "key": ["a"],
        "punsafe": [0.25],
        "when": pyarrow.array([1_700_000_000_000_000_001], pyarrow.timestamp("ns")),
        "far": pyarrow.array([10_000_000], pyarrow.date32()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "00000.parquet")
    metadata = read(tmp_path)[0]["00000/a"].metadata
    assert metadata["punsafe"] == 0.25
    assert "2023-11-14" in str(metadata["when"])


def test_a_table_that_knows_no_sample_hides_its_columns(tmp_path):
    write_tar(tmp_path / "00000.tar", [*sample("a")[:2], *sample("b")[:2]])
    write_table(tmp_path / "00000.parquet", ["0", "1"])
    _, _, notes = items_of(tmp_path)
    note = notes["the keys of the table match no sample"]
    assert (note.count, set(note.hidden)) == (2, {"key", "status", "punsafe"})
    assert note.example == "00000.parquet has '0', the shard 'a'"
    write_table(tmp_path / "00000.parquet", ["0", "b"])
    _, _, notes = items_of(tmp_path)
    assert notes == {"the table has no row for the sample": Note("the table has no row for the sample", 1, "a")}
    pyarrow.parquet.write_table(pyarrow.table({"url": ["x"]}), tmp_path / "00000.parquet")
    _, rejects, notes = items_of(tmp_path)
    assert rejects == {"00000.parquet": "broken table: no column `key` among url"}
    assert notes["metadata can't be read from the table"].hidden == ("*",)
