"""The LAION filter of the paper's section 4.1."""

import dataclasses

import pytest

from rac3.config import InputError
from rac3.documents.document import Note, SampleError
from rac3.documents.filter import LaionFilter

GOOD = {"pwatermark": 0.1, "punsafe": 0.1, "original_width": 640, "original_height": 480}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"pwatermark": 0.5}, None),  # only above the limit
        ({"pwatermark": 0.5001}, "watermark"),
        ({"punsafe": 0.5}, None),
        ({"punsafe": 0.5001}, "unsafe"),
        ({"pwatermark": 0.9, "punsafe": 0.9}, "watermark"),  # the first reason wins
        ({"original_width": 256, "original_height": 256}, None),
        ({"original_width": 255}, "small"),
        ({"original_height": 255}, "small"),
        ({"pwatermark": None, "punsafe": float("nan")}, None),
        ({"pwatermark": "0.9"}, "watermark"),  # a number in text is one
        ({"punsafe": " 0.51 "}, "unsafe"),
        ({"punsafe": "1e-3", "pwatermark": ""}, None),
        ({"punsafe": "nan"}, None),
        ({"punsafe": None, "PUNSAFE": 0.9}, "unsafe"),  # in any case
        ({"punsafe": 0.1, "PUNSAFE": 0.9}, None),  # but the usual one first
        ({"punsafe": True}, "unsafe"),
        ({"original_width": None, "original_height": None, "WIDTH": "64", "HEIGHT": "300"}, "small"),
        ({"width": 64, "height": 64}, None),  # the stored size counts only where the original size is unknown
        ({"original_width": None, "original_height": None, "width": 64, "height": 300}, "small"),
        ({"original_width": None, "width": 300, "height": 64}, None),  # each side by itself
        ({"original_height": None, "width": 64, "height": 300}, None),
    ],
)
def test_reason(change, reason):
    assert LaionFilter().reason(GOOD | change) == reason


def test_nothing_known_is_kept():
    assert LaionFilter().reason({}) is None


def test_limits_are_settings():
    off = LaionFilter(max_watermark=1.0, max_unsafe=1.0, min_side=0)
    assert off.reason({"pwatermark": 1.0, "punsafe": 1.0, "original_width": 1, "original_height": 1}) is None
    assert dataclasses.replace(off, max_watermark=0.2).reason({"pwatermark": 0.3, "punsafe": 0.3}) == "watermark"
    assert dataclasses.replace(off, max_unsafe=0.2).reason({"pwatermark": 0.3, "punsafe": 0.3}) == "unsafe"
    assert dataclasses.replace(off, min_side=2).reason({"original_width": 1, "original_height": 9}) == "small"


@pytest.mark.parametrize("field", [{"max_watermark": 1.5}, {"max_unsafe": -0.1}, {"min_side": -1}])
def test_bad_limits(field):
    with pytest.raises(InputError, match=next(iter(field))):
        LaionFilter(**field)


@pytest.mark.parametrize("value", ["UNLIKELY", "0,99", {"p": 0.1}, [0.1], "0.9.9"])
def test_a_score_that_cannot_be_read_does_not_pass(value):
    with pytest.raises(SampleError, match=r"^unreadable score: punsafe="):
        LaionFilter().reason(GOOD | {"punsafe": value})
    assert LaionFilter(max_unsafe=1.0).reason(GOOD | {"punsafe": value}) is None  # nobody asks for it


def test_metadata_that_is_lost_stops_only_a_filter_that_reads_it():
    lost, all_lost = (Note("no row", 3, "a", hidden) for hidden in (("key", "PUNSAFE"), ("*",)))
    for note in (lost, all_lost):
        with pytest.raises(InputError, match=r"^shard 7: no row \(3 samples; a\), .*punsafe .*--filter\.max-unsafe 1"):
            LaionFilter().check(note, "shard 7")
        LaionFilter(max_unsafe=1.0, max_watermark=1.0).check(note, "shard 7")
    LaionFilter(max_unsafe=1.0).check(lost, "shard 7")  # pwatermark is not among its columns
    LaionFilter().check(Note("something else", 3, "a"), "shard 7")
