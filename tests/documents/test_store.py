"""Records and shards of tokenized documents: what is written comes back."""

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
    TokenizedDocument,
    hash64,
    id_type,
    pack_record,
    unpack_record,
    write_columns,
    write_shard,
)


def item(number: int, bound: int = 2**16) -> TokenizedDocument:
    """A document of varying form with ids below `bound`; images are bytes that nobody decodes here."""
    rng = np.random.default_rng(number)
    segments: list[Text | Image] = [Text(f"caption {number} é"), Image(rng.bytes(20)), Image(rng.bytes(3)), Text("end")]
    segments = segments[number % 2 : 2 + number % 3]
    ids = tuple(rng.integers(0, bound, rng.integers(1, 9)).astype(np.int32) for _ in segments)
    return TokenizedDocument(Document(f"shard/{number}", tuple(segments), {"n": number, "tags": ["a", None]}), ids)


def same(one: TokenizedDocument, other: TokenizedDocument) -> bool:
    alike = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one.ids, other.ids, strict=True))
    return one.document == other.document and alike


def write(folder: Path, sizes: list[int]) -> list[TokenizedDocument]:
    items = [item(number) for number in range(sum(sizes))]
    start = 0
    for shard, size in enumerate(sizes):
        write_shard(folder / f"{shard:05d}.array_record", items[start : start + size], NARROW)
        start += size
    np.save(folder / "lengths.npy", np.array([sum(map(len, each.ids)) for each in items], np.int32))
    return items


@pytest.mark.parametrize(("kind", "bound"), [(NARROW, 2**16), (WIDE, 2**31)])
def test_a_record_comes_back(kind: str, bound: int):
    for number in range(12):
        assert same(unpack_record(pack_record(item(number, bound), kind)), item(number, bound))


def test_a_record_is_plain_msgpack_and_says_its_width():
    for kind, size in ((NARROW, 2), (WIDE, 4)):
        record = msgpack.unpackb(pack_record(item(2), kind))
        assert record.keys() == {"key", "ids", "segments", "metadata"}
        assert record["ids"] == kind
        assert record["segments"][0]["text"] == "caption 2 é"
        assert len(record["segments"][1]["ids"]) == size * len(item(2).ids[1])
        np.testing.assert_array_equal(np.frombuffer(record["segments"][1]["ids"], kind), item(2).ids[1])


def test_ids_take_two_bytes_where_those_of_both_tokenizers_fit():
    assert id_type(50_265, 16_384) == id_type(65_536, 65_536) == NARROW
    assert id_type(65_537, 256) == id_type(300, 65_537) == id_type(128_256, 8_192) == WIDE


@pytest.mark.parametrize("bad", [2**16, -1])
def test_an_id_that_does_not_fit_is_refused(bad: int):
    edge = TokenizedDocument(Document("a/1", (Text("x"),), {}), (np.array([0, 2**16 - 1], np.int32),))
    assert same(unpack_record(pack_record(edge, NARROW)), edge)
    wrong = TokenizedDocument(edge.document, (np.array([3, bad], np.int32),))
    with pytest.raises(InputError, match=rf"'a/1' has the text id {bad}, outside \[0, 65535\] .* uint16 holds; use"):
        pack_record(wrong, NARROW)


def test_documents_are_read_at_random_in_shard_order(tmp_path: Path):
    """Also with a shard whose documents were all filtered."""
    items = write(tmp_path, [3, 0, 5, 1])
    store = DocumentStore(tmp_path)
    assert len(store) == 9
    assert all(same(store[index], items[index]) for index in (8, 0, 3, 2))
    wanted = [5, 0, 5, 8, 2]
    assert all(same(got, items[index]) for got, index in zip(store.many(wanted), wanted, strict=True))
    assert store.many([]) == []
    np.testing.assert_array_equal(store.lengths, [sum(map(len, each.ids)) for each in items])


def test_a_store_travels_as_its_folder(tmp_path: Path):
    """Worker processes get a copy of it: that must not carry open files or the lengths of 150M documents."""
    items = write(tmp_path, [4])
    store = DocumentStore(tmp_path)
    assert same(store[1], items[1])
    assert len(store) == 4
    state = store.__getstate__()
    assert state == {"folder": tmp_path}
    assert same(copy.copy(store)[3], items[3])


def test_a_document_is_found_by_its_key(tmp_path: Path):
    write(tmp_path, [3, 5])
    with pytest.raises(InputError, match=r"key_hashes\.npy is missing.*run `rac3 ingest` again"):
        DocumentStore(tmp_path).row_of("shard/5")
    hashes = [hash64(f"shard/{number}".encode()) for number in range(8)]
    hashes[2] = hashes[5]  # two keys with one hash
    np.save(tmp_path / "key_hashes.npy", np.array(hashes, np.uint64))
    store = DocumentStore(tmp_path)
    assert [store.row_of(key) for key in ("shard/5", "shard/0", "shard/8", "")] == [5, 0, None, None]
    assert hash64(b"shard/5") == 0x57D7F854BC2F6C6F


def test_columns_are_the_shards_pieces_in_order(tmp_path: Path):
    """Hashes use all 64 bits, which a detour over floats would lose; a shard without documents has an empty piece."""
    large = 2**64 - 1
    pieces = {
        "lengths": ([3, 5], [], [4]),
        "text_lengths": ([1, 0], [], [2]),
        "key_hashes": ([large, 1], [], [large - 1]),
        "text_hashes": ([large - 2, 0], [], [7]),
        "image_hashes": ([0, large - 4], [], [8]),
    }
    assert pieces.keys() == COLUMNS.keys()
    columns = {name: [np.array(piece, COLUMNS[name]) for piece in each] for name, each in pieces.items()}
    write_columns(tmp_path, columns)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.npy" for name in pieces}
    for name, (first, _, last) in pieces.items():
        found = np.load(tmp_path / f"{name}.npy")
        assert found.dtype == ("int32" if name.endswith("lengths") else "uint64")
        assert found.tolist() == first + last
    store = DocumentStore(tmp_path)
    assert len(store) == 3
    assert store.lengths.tolist() == [3, 5, 4]
    assert store.column("image_hashes").tolist() == [0, large - 4, 8]
    # the text has its <eod>, the image has it too; the second document has no text
    assert store.shown_lengths("text").tolist() == [2, 0, 3]
    assert store.shown_lengths("image").tolist() == [2, 5, 2]
    assert store.shown_lengths("document").tolist() == [3, 5, 4]
    (tmp_path / "key_hashes.npy").unlink()
    with pytest.raises(InputError, match=r"key_hashes.npy is missing; delete .* and run `rac3 ingest` again"):
        DocumentStore(tmp_path).column("key_hashes")


def test_columns_of_no_documents_are_empty(tmp_path: Path):
    write_columns(tmp_path, {name: [] for name in COLUMNS})
    assert [np.load(tmp_path / f"{name}.npy").dtype for name in COLUMNS] == list(COLUMNS.values())
    assert len(DocumentStore(tmp_path)) == 0
