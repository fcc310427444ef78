"""Round trips of tokenized documents through records and shards."""

import binascii
import copy
from pathlib import Path

import msgpack
import numpy as np
import pytest

from rac3.config import InputError
from rac3.documents.document import Document, Image, Text
from rac3.documents.store import (
    COLUMNS,
    NARROW,
    WIDE,
    DocumentStore,
    Keys,
    Texts,
    TokenizedDocument,
    columns_of,
    hash64,
    id_type,
    pack_ids,
    pack_record,
    unpack_ids,
    unpack_record,
    write_columns,
    write_id_starts,
    write_shard,
)


def item(number: int, bound: int = 2**16) -> TokenizedDocument:
    """A document of varying form with ids below `bound`; its images are arbitrary bytes."""
    rng = np.random.default_rng(number)
    segments: list[Text | Image] = [Text(f"caption {number} é"), Image(rng.bytes(20)), Image(rng.bytes(3)), Text("end")]
    segments = segments[number % 2 : 2 + number % 3]
    ids = tuple(rng.integers(0, bound, rng.integers(1, 9)).astype(np.int32) for _ in segments)
    return TokenizedDocument(Document(f"shard/{number}", tuple(segments), {"n": number, "tags": ["a", None]}), ids)


def same(one: TokenizedDocument, other: TokenizedDocument) -> bool:
    alike = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one.ids, other.ids, strict=True))
    return one.document == other.document and alike


def write(folder: Path, sizes: list[int], kind: str = NARROW) -> list[TokenizedDocument]:
    items = [item(number) for number in range(sum(sizes))]
    start, id_sizes = 0, []
    for shard, size in enumerate(sizes):
        id_sizes.append(write_shard(folder, shard, items[start : start + size], kind))
        start += size
    write_id_starts(folder, id_sizes)
    np.save(folder / "lengths.npy", np.array([sum(map(len, each.ids)) for each in items], np.int32))
    return items


def test_a_record_comes_back():
    for number in range(12):
        document = item(number).document
        assert unpack_record(pack_record(document)) == document


def test_a_record_is_plain_msgpack_without_ids():
    document = item(2).document
    record = msgpack.unpackb(pack_record(document))
    assert record.keys() == {"key", "segments", "metadata"}
    images = [{"image": each.data} for each in document.images]
    assert record["segments"] == [{"text": "caption 2 é"}, *images, {"text": "end"}]


@pytest.mark.parametrize(("kind", "bound"), [(NARROW, 2**16), (WIDE, 2**31)])
def test_ids_come_back(kind: str, bound: int):
    for number in range(12):
        each = item(number, bound)
        tokens = unpack_ids(pack_ids(each, kind), kind)
        assert [is_image for is_image, _ in tokens] == [isinstance(s, Image) for s in each.document.segments]
        assert same(TokenizedDocument(each.document, tuple(ids for _, ids in tokens)), each)


def test_the_bytes_of_ids_by_hand():
    """A text of two ids and an image of three: the checksum, 2 segments, 2 * 2, 2 * 3 + 1, then the ids."""
    document = Document("k", (Text("x"), Image(b"x")), {})
    two_parts = TokenizedDocument(document, (np.array([5, 6], np.int32), np.array([1, 2, 260], np.int32)))
    head = b"\2\0\0\0" + b"\4\0\0\0" + b"\7\0\0\0"
    narrow = head + b"\5\0\6\0" + b"\1\0\2\0\4\1"
    wide = head + b"\5\0\0\0\6\0\0\0" + b"\1\0\0\0\2\0\0\0\4\1\0\0"
    assert pack_ids(two_parts, NARROW) == binascii.crc32(narrow).to_bytes(4, "little") + narrow
    assert pack_ids(two_parts, WIDE) == binascii.crc32(wide).to_bytes(4, "little") + wide


def test_ids_take_two_bytes_where_those_of_both_tokenizers_fit():
    assert id_type(50_265, 16_384) == id_type(65_536, 65_536) == NARROW
    assert id_type(65_537, 256) == id_type(300, 65_537) == id_type(128_256, 8_192) == WIDE


@pytest.mark.parametrize("bad", [2**16, -1])
def test_an_id_that_does_not_fit_is_refused(bad: int):
    edge = TokenizedDocument(Document("a/1", (Text("x"),), {}), (np.array([0, 2**16 - 1], np.int32),))
    np.testing.assert_array_equal(unpack_ids(pack_ids(edge, NARROW), NARROW)[0][1], edge.ids[0])
    wrong = TokenizedDocument(edge.document, (np.array([3, bad], np.int32),))
    with pytest.raises(InputError, match=rf"'a/1' has the text id {bad}, .* range \[0, 65535\] .* uint16; use"):
        pack_ids(wrong, NARROW)


def test_documents_are_read_at_random_in_shard_order(tmp_path: Path):
    """Including a shard with no documents, all filtered out."""
    items = write(tmp_path, [3, 0, 5, 1])
    store = DocumentStore(tmp_path)
    assert len(store) == 9
    assert all(same(store[index], items[index]) for index in (8, 0, 3, 2))
    wanted = [5, 0, 5, 8, 2]
    assert all(same(got, items[index]) for got, index in zip(store.many(wanted), wanted, strict=True))
    assert store.many([]) == []
    np.testing.assert_array_equal(store.lengths, [sum(map(len, each.ids)) for each in items])


@pytest.mark.parametrize("kind", [NARROW, WIDE])
def test_ids_are_read_without_the_documents(kind: str, tmp_path: Path):
    """Shards with no documents come first, last, and two in a row. The records are gone."""
    items = write(tmp_path, [0, 3, 0, 0, 5, 1, 0], kind)
    for path in tmp_path.glob("*.array_record"):
        path.unlink()
    store = DocumentStore(tmp_path)
    for index in (8, 0, 3, 2, 7, 3):
        for (is_image, ids), segment, wanted in zip(
            store.tokens(index), items[index].document.segments, items[index].ids, strict=True
        ):
            assert is_image == isinstance(segment, Image)
            assert ids.dtype == np.int32
            np.testing.assert_array_equal(ids, wanted)


def test_files_of_ids_are_not_kept_open(tmp_path: Path):
    """A corpus has more shards than a process may open files."""
    write(tmp_path, [1] * 30)
    store = DocumentStore(tmp_path)
    store.tokens(0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in range(30):
        store.tokens(index)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "empty"])
def test_damaged_ids_are_found(damage: str, tmp_path: Path):
    items = write(tmp_path, [2, 3])
    path = tmp_path / "000001.u2"
    data = bytearray(path.read_bytes())
    size = len(pack_ids(items[2], NARROW)) + len(pack_ids(items[3], NARROW))
    data[size + 13] ^= 64
    path.write_bytes({"a flipped bit": bytes(data), "cut short": bytes(data[:-1]), "empty": b""}[damage])
    store = DocumentStore(tmp_path)
    with pytest.raises(InputError, match=r"000001\.u2 is damaged: the ids of document 4, the checksum is wrong"):
        store.tokens(4)
    assert len(store.tokens(1)) == len(items[1].ids)
    if damage != "empty":
        np.testing.assert_array_equal(store.tokens(3)[0][1], items[3].ids[0])


def test_ids_of_an_older_version_are_refused(tmp_path: Path):
    write(tmp_path, [2])
    (tmp_path / "id_starts.npy").unlink()
    with pytest.raises(InputError, match=r"id_starts\.npy is missing"):
        DocumentStore(tmp_path).tokens(0)


def test_a_shard_that_fails_leaves_no_file_with_a_final_name(tmp_path: Path):
    def fails():
        yield item(0)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_shard(tmp_path, 0, fails(), NARROW)
    assert all(path.suffix == ".tmp" for path in tmp_path.iterdir())


def test_a_store_travels_as_its_folder(tmp_path: Path):
    """Worker processes get a copy, which must not carry open files or the lengths of 150M documents."""
    items = write(tmp_path, [4])
    store = DocumentStore(tmp_path)
    assert same(store[1], items[1])
    assert len(store) == 4
    state = store.__getstate__()
    assert state == {"folder": tmp_path}
    assert same(copy.copy(store)[3], items[3])


def test_a_document_is_found_by_its_key(tmp_path: Path):
    write(tmp_path, [3, 5])
    with pytest.raises(InputError, match=r"key_hashes\.npy is missing"):
        DocumentStore(tmp_path).row_of("shard/5")
    hashes = [hash64(f"shard/{number}".encode()) for number in range(8)]
    hashes[2] = hashes[5]  # two keys with one hash
    np.save(tmp_path / "key_hashes.npy", np.array(hashes, np.uint64))
    store = DocumentStore(tmp_path)
    assert [store.row_of(key) for key in ("shard/5", "shard/0", "shard/8", "")] == [5, 0, None, None]
    assert hash64(b"shard/5") == 0x57D7F854BC2F6C6F


def columns(*parts: str | list[int], key: str = "0", length: int = 99) -> dict[str, int]:
    """The columns of a document of texts, whose ids are their characters, and of images, given by their codes."""
    segments = tuple(Text(part) if isinstance(part, str) else Image(bytes(part)) for part in parts)
    ids = tuple(np.array([*map(ord, part)] if isinstance(part, str) else part, np.int32) for part in parts)
    return columns_of(TokenizedDocument(Document(key, segments, {}), ids), length)


def test_the_length_of_a_text_is_that_of_its_texts_alone():
    lengths = [
        columns(*parts)["text_lengths"] for parts in (["four", [1, 2]], ["ab", [3], "c"], ["five5"], [[1, 2, 3]])
    ]
    assert lengths == [4, 3, 5, 0]
    assert columns("x", length=12)["lengths"] == 12


def test_texts_are_copies_but_for_case_and_spacing():
    hashes = [
        columns(*parts)["text_hashes"]
        for parts in (
            ["A red fox"],
            ["a  RED\tfox\n"],
            [[1], "a red", [2], "fox"],  # the texts of a document are joined
            ["a redfox"],
            ["a red foxes"],
            ["STRASSE"],
            ["stra\u00dfe"],  # equal by `casefold`, different by `lower`
        )
    ]
    assert hashes[0] == hashes[1] == hashes[2]
    assert hashes[5] == hashes[6]
    assert len(set(hashes)) == 4
    assert hashes[0] == hash64(b"a red fox")


def test_images_are_copies_by_the_codes_of_the_first():
    hashes = [
        columns(*parts)["image_hashes"]
        for parts in ([[1, 2, 3]], ["a caption", [1, 2, 3], [7, 8]], [[7, 8], [1, 2, 3]], [[1, 2]], [[2, 1, 3]])
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
    assert hashes[0] == hash64(b"\x01\0\0\0\x02\0\0\0\x03\0\0\0")  # the same on every machine and in every store


def test_what_a_document_lacks_has_the_hash_0_that_is_no_copy_of_another():
    alone, picture = columns("words"), columns([1, 2])
    assert (alone["image_hashes"], picture["text_hashes"]) == (0, 0)
    assert alone["text_hashes"] > 0 < picture["image_hashes"]


def test_keys_are_hashed_as_they_are():
    assert columns("x", key="A b")["key_hashes"] == hash64(b"A b") != columns("x", key="a b")["key_hashes"]


def test_columns_are_written_in_pieces_in_their_order(tmp_path: Path):
    """Three shards; the second kept no document."""
    pieces = {
        name: [np.array(values, dtype) for values in ([3, 1], [], [2, np.iinfo(dtype).max])]
        for name, dtype in COLUMNS.items()
    }
    write_columns(tmp_path, pieces)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.npy" for name in COLUMNS}
    widths = {"lengths": "int32", "text_lengths": "int32"}
    for name in COLUMNS:
        column = DocumentStore(tmp_path).column(name)
        assert column.dtype == widths.get(name, "uint64")
        assert column.tolist() == [3, 1, 2, np.iinfo(column.dtype).max]
    write_columns(tmp_path, {name: [] for name in COLUMNS})
    empty = np.load(tmp_path / "text_hashes.npy")
    assert (len(empty), empty.dtype) == (0, np.uint64)


def test_the_length_of_what_is_shown_of_a_document(tmp_path: Path):
    """Each part has its own <eod>; a missing text or image has length 0."""
    np.save(tmp_path / "lengths.npy", np.array([20, 6, 11], np.int32))  # both, a text alone, an image alone
    np.save(tmp_path / "text_lengths.npy", np.array([9, 5, 0], np.int32))
    store = DocumentStore(tmp_path)
    assert store.shown_lengths("document").tolist() == [20, 6, 11]
    assert store.shown_lengths("text").tolist() == [10, 6, 0]
    assert store.shown_lengths("image").tolist() == [11, 0, 11]
    rows = np.array([1, 2, 1])
    for shown, lengths in (("document", [6, 11, 6]), ("text", [6, 0, 6]), ("image", [0, 11, 0])):
        assert store.shown_lengths(shown, rows).tolist() == lengths


def test_texts_and_keys_are_those_of_the_documents(tmp_path: Path):
    items = write(tmp_path, [3, 6])
    np.save(tmp_path / "key_hashes.npy", np.array([hash64(each.document.key.encode()) for each in items], np.uint64))
    texts, keys = Texts(DocumentStore(tmp_path)), Keys(DocumentStore(tmp_path))
    assert list(texts) == [each.document.text for each in items]
    assert keys[2:9:3] == ["shard/2", "shard/5", "shard/8"]
    assert keys[-1] == "shard/8"
    assert [keys.index(key) for key in ("shard/0", "shard/8")] == [0, 8]
    with pytest.raises(ValueError, match="'shard/9' is not a key"):
        keys.index("shard/9")
    with pytest.raises(IndexError):
        texts[9]


def test_a_frame_is_stored_with_its_image():
    document = Document("a", (Image(b"x"), Image(b"y", "pad-white")), {})
    assert unpack_record(pack_record(document)) == document
    assert b"framing" not in pack_record(Document("a", (Image(b"x"),), {}))  # as before there were any
