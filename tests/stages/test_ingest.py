"""What ingest keeps of a source: which documents, in which order, what it truncates, and what it counts."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import PER_IMAGE, PlainCodec, codes_of, document, experiment_of, workdir_of

from rac3 import recipes
from rac3.artifacts.workdir import Artifact
from rac3.config import InputError
from rac3.documents.document import Document, Note, Reject, Text, encode_png
from rac3.documents.filter import LaionFilter
from rac3.documents.store import TokenizedDocument
from rac3.run import Run
from rac3.stages.ingest import counts_line, ingest
from rac3.tokens.text import Tokenizer

LIMIT = 24  # text tokens, of a byte each
SHARDS = [
    [
        document("a", "a red fox", b"fox"),
        Reject("broken", "truncated image: at byte 7"),
        document("marked", "words", b"marked", pwatermark=0.51),
        document("b", b"one", "x" * LIMIT, b"two"),
    ],
    [document("unsafe", "words", b"unsafe", punsafe=0.9)],  # nothing stays of this shard
    [
        document("c", "y" * (LIMIT + 1), b"fox"),
        document("d", b"alone"),
        Reject("lost", "truncated image: at byte 9"),
        Reject("mute", "missing text"),
        document("small", "words", b"small", original_width=100),
        document("tiny", "words", b"tiny", original_width=100),
        document("e", "z" * 2 * LIMIT),
    ],
]
KEPT = ["a", "b", "c", "d", "e"]
Ingested = Callable[..., tuple[Run, Artifact, list[TokenizedDocument]]]


@pytest.fixture
def ingested(tmp_path: Path) -> Ingested:
    """Ingests shards as the training documents."""

    def make(shards: Sequence[Sequence[Document | Reject]] = SHARDS, **fields: object):
        experiment = experiment_of({"train": shards}, max_text_tokens=LIMIT, **fields)
        run = Run(experiment, workdir_of(experiment, tmp_path / "workdir"))
        ingest(run)
        store = run.documents("train")
        return run, run.artifact(recipes.documents, "train"), store.many(range(len(store)))

    return make


def test_documents_are_filtered_tokenized_and_kept_in_the_order_of_the_shards(ingested: Ingested):
    _, _, items = ingested(max_reject_fraction=0.5)
    assert [item.document.key for item in items] == KEPT
    wanted = {each.key: each for shard in SHARDS for each in shard if isinstance(each, Document)}
    for item in items:
        assert item.document == wanted[item.document.key]  # the whole text too: it is only the ids that are truncated
        for segment, ids in zip(item.document.segments, item.ids, strict=True):
            if hasattr(segment, "data"):
                np.testing.assert_array_equal(ids, codes_of(segment.data))
            else:
                assert len(ids) == min(len(segment.text), LIMIT)
                assert len(set(ids.tolist())) == len(set(segment.text[:LIMIT]))


def test_what_is_not_kept_is_counted_by_its_reason(ingested: Ingested):
    _, artifact, _ = ingested(max_reject_fraction=0.5)
    counts = artifact.manifest["counts"]
    assert counts["documents"] == 5
    assert counts["filtered"] == {"watermark": 1, "unsafe": 1, "small": 2}
    assert counts["rejects"] == {"truncated image": 2, "missing text": 1}
    assert counts["texts_cut"] == 2  # of 25 and 48 bytes, not the one of 24
    assert counts["throughput"]["documents"] == 12
    lines = [json.loads(line) for line in (artifact.folder / "rejects.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [
        ("broken", "truncated image: at byte 7"),
        ("lost", "truncated image: at byte 9"),
        ("mute", "missing text"),
    ]


def test_the_columns_are_those_of_the_documents(ingested: Ingested):
    """Three ids of markup come with each image, and one at the end."""
    _, artifact, _ = ingested(max_reject_fraction=0.5)
    columns = {name: np.load(artifact.folder / f"{name}.npy") for name in ("lengths", "text_lengths", "image_hashes")}
    texts, images = np.array([9, LIMIT, LIMIT, 0, LIMIT]), np.array([1, 2, 1, 1, 0])
    np.testing.assert_array_equal(columns["text_lengths"], texts)
    np.testing.assert_array_equal(columns["lengths"], texts + (PER_IMAGE + 3) * images + 1)
    assert artifact.manifest["counts"]["tokens"] == columns["lengths"].sum()
    same = columns["image_hashes"][:, None] == columns["image_hashes"]
    assert same[0, 2]  # a and c show one fox
    assert same.sum() == 5 + 2


def test_more_than_ten_shards_stay_in_their_order(ingested: Ingested):
    """Shard 10 comes after shard 9, not after shard 1; the texts of two are truncated, the first and the eleventh."""
    sizes = [LIMIT + 1, *range(1, 10), LIMIT + 1, 10]
    shards = [[document(f"d{number}", "x" * size)] for number, size in enumerate(sizes)]
    _, artifact, items = ingested(shards)
    assert [item.document.key for item in items] == [f"d{number}" for number in range(12)]
    lengths = np.load(artifact.folder / "text_lengths.npy")
    assert lengths.tolist() == [len(item.ids[0]) for item in items] == [min(size, LIMIT) for size in sizes]
    assert artifact.manifest["counts"]["texts_cut"] == 2


@pytest.mark.parametrize(("limit", "passes"), [(0.25, True), (0.24, False)])
def test_the_share_of_rejects_is_of_all_that_the_source_has(limit: float, passes: bool, ingested: Ingested):
    """3 of 12: 5 documents, 4 filtered, 3 rejects."""
    if passes:
        ingested(max_reject_fraction=limit)
    else:
        with pytest.raises(
            InputError,
            match=r"3 of 12 documents of train are damaged \(2 truncated image, 1 missing text\), .*_fraction=0\.24",
        ):
            ingested(max_reject_fraction=limit)


def test_a_source_of_which_nothing_stays_is_refused(ingested: Ingested):
    with pytest.raises(InputError, match=r"the source of train gives no documents \(0 damaged, 1 filtered\)"):
        ingested([SHARDS[1], []])


@pytest.mark.parametrize(("codes", "kind"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_are_as_wide_as_the_larger_vocabulary_asks_for(
    codes: int, kind: str, ingested: Ingested, monkeypatch: pytest.MonkeyPatch
):
    largest = np.array([codes - 1, 0, 1, 2], np.int32)
    monkeypatch.setattr(PlainCodec, "encode", lambda self, images: np.tile(largest, (len(images), 1)))
    _, artifact, (item,) = ingested([[document("a", b"fox")]], vqgan=PlainCodec(codes))
    assert artifact.manifest["counts"]["ids"] == kind
    np.testing.assert_array_equal(item.ids[0], largest)


def test_a_text_that_the_tokenizer_has_no_ids_for_is_a_reject(ingested: Ingested, monkeypatch: pytest.MonkeyPatch):
    """Tokenizers of the T5 and BERT families drop control characters, of which a caption may consist."""
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encode(self, text.replace("\x07", "")))
    documents = [document("a", "\x07", b"bell"), document("b", "a bell", b"bell"), document("c", "\x07\x07")]
    _, artifact, items = ingested([documents], max_reject_fraction=0.9)
    assert [item.document.key for item in items] == ["b"]
    assert artifact.manifest["counts"]["rejects"] == {"text without ids": 2}
    assert np.load(artifact.folder / "lengths.npy").shape == (1,)


def test_long_shards_are_read_in_blocks(ingested: Ingested, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rac3.stages.ingest.DOCUMENTS_AT_ONCE", 2)
    _, artifact, items = ingested(max_reject_fraction=0.5)
    assert [item.document.key for item in items] == KEPT
    assert artifact.manifest["counts"]["texts_cut"] == 2


def test_counts_line(ingested: Ingested):
    run, artifact, _ = ingested(max_reject_fraction=0.5)
    tokens = artifact.manifest["counts"]["tokens"]
    assert counts_line(run, "train") == (
        f"5 documents, {tokens} tokens; filtered: 1 watermark, 1 unsafe, 2 small; "
        "rejects: 2 truncated image, 1 missing text"
    )


def whole(shard: str, count: int) -> list[Document | Reject]:
    return [document(f"{shard}{number}", "words", f"{shard}{number}".encode()) for number in range(count)]


@pytest.mark.parametrize(("limit", "passes"), [(0.32, False), (0.34, True)])
def test_a_lost_shard_weighs_as_the_documents_of_the_others(limit: float, passes: bool, ingested: Ingested):
    """10 of 30 documents are lost with one reject: the others have 12 and 8 on average 10."""
    lost = [Reject("s2", "unreadable shard: a folder", documents=None)]
    shards = [whole("a", 12), whole("b", 8), lost]
    if not passes:
        with pytest.raises(InputError, match=r"10 of 30 documents of train are damaged \(10 unreadable shard\)"):
            ingested(shards, max_reject_fraction=limit)
        return
    counts = ingested(shards, max_reject_fraction=limit)[1].manifest["counts"]
    assert counts["rejects"] == {"unreadable shard": 10}
    assert counts["documents"] == 20


@pytest.mark.parametrize(("read", "missing"), [(3, 7), (10, 1), (11, 1)])
def test_of_a_cut_shard_what_was_read_is_not_lost(read: int, missing: int, ingested: Ingested):
    cut = [*whole("c", read), Reject("c/x", "truncated tar: early", documents=None)]
    counts = ingested([whole("a", 10), cut], max_reject_fraction=1.0)[1].manifest["counts"]
    assert counts["rejects"] == {"truncated tar": missing}


def test_notes_are_counted_together_and_cost_nothing(ingested: Ingested):
    notes = [Note(".gif of no sample", 3, "s0/a.gif"), Note(".gif of no sample", 2, "s1/b.gif"), Note("empty", 1)]
    run, artifact, items = ingested([[notes[0], *whole("a", 2)], [*whole("b", 1), *notes[1:]]], max_reject_fraction=0.0)
    assert len(items) == 3
    assert artifact.manifest["counts"]["notes"] == {
        ".gif of no sample": {"count": 5, "example": "s0/a.gif"},
        "empty": {"count": 1, "example": ""},
    }
    assert counts_line(run, "train").endswith("; 5 .gif of no sample (such as s0/a.gif); 1 empty")


def test_scores_that_are_lost_stop_the_filter_that_needs_them(ingested: Ingested):
    shards = [[*whole("a", 2), Note("no row", 2, "a0", ("punsafe",))]]
    with pytest.raises(InputError, match=r"shard shard-0 of train: no row .* punsafe"):
        ingested(shards)


def test_scores_that_are_lost_are_no_matter_to_a_filter_that_is_off(ingested: Ingested):
    off = LaionFilter(max_unsafe=1.0, max_watermark=1.0)
    shards = [[*whole("a", 2), Note("no row", 2, "a0", ("punsafe",))]]
    assert len(ingested(shards, filter=off)[2]) == 2


def test_scores_that_cannot_be_read_are_rejects(ingested: Ingested):
    odd = [document("x", "words", b"x", punsafe="unlikely"), document("y", "words", b"y", punsafe="0.9")]
    counts = ingested([[*whole("a", 2), *odd]], max_reject_fraction=0.3)[1].manifest["counts"]
    assert counts["rejects"] == {"unreadable score": 1}
    assert counts["filtered"] == {"unsafe": 1}


@pytest.mark.parametrize("metadata", [{"n": 2**70}, {"n": -(2**64)}, {"t": "\ud800"}, {"\udfff": 1}, {"d": [[]]}])
def test_metadata_that_no_file_holds_is_a_reject(metadata: dict[str, Any], ingested: Ingested):
    for _ in range(2000 if "d" in metadata else 0):
        metadata = {"d": [metadata["d"]]}
    odd = Document("x", (Text("words"),), metadata)
    _, artifact, items = ingested([[*whole("a", 1), odd, *whole("b", 1)]], max_reject_fraction=0.4)
    assert [item.document.key for item in items] == ["a0", "b0"]
    assert artifact.manifest["counts"]["rejects"] == {"metadata that can't be stored": 1}


def picture(height: int, width: int, value: int = 7) -> bytes:
    return encode_png(np.full((height, width, 3), value, np.uint8))


def test_the_area_that_is_cropped_is_counted(ingested: Ingested):
    """Of 2 x 4 half is outside the middle square, of 4 x 1 three quarters; 1.25 of three pictures."""
    shards = [[document("a", picture(2, 4))], [document("b", picture(4, 1)), document("c", "words", picture(3, 3))]]
    run, artifact, _ = ingested(shards)
    counts = artifact.manifest["counts"]
    assert (counts["pictures"]["count"], counts["pictures"]["not_square"]) == (3, 2)
    assert counts["pictures"]["area"] == pytest.approx(1.25)
    said = "2 of 3 pictures are not square, and 41.7% of the area is cropped (--framing pad-white keeps it)"
    assert counts_line(run, "train").endswith(f"; {said}")
    run, artifact, items = ingested(shards, framing="pad-border")
    assert counts_line(run, "train").endswith(
        "; 2 of 3 pictures are not square, and padded rather than cropped by 41.7% of the area"
    )
    assert [item.document.images[0].pixels().shape for item in items] == [(4, 4, 3), (4, 4, 3), (3, 3, 3)]


def test_a_split_of_one_code_is_a_warning(ingested: Ingested, monkeypatch: pytest.MonkeyPatch):
    said = "WARNING: all 3 pictures are code 9 alone"
    run, _, _ = ingested([whole("a", 3)])
    assert "WARNING" not in counts_line(run, "train")
    monkeypatch.setattr(PlainCodec, "encode", lambda self, images: np.full((len(images), PER_IMAGE), 9, np.int32))
    run, _, _ = ingested([whole("b", 2), whole("c", 1)], vqgan=PlainCodec(32))
    assert said in counts_line(run, "train")
