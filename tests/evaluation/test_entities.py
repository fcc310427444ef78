from pathlib import Path

import numpy as np
import pytest

from rac3.documents.document import Document, Judge, Text
from rac3.documents.world import World
from rac3.evaluation.entities import entity_of, left_out, named_accuracy, shown_accuracy, values_of


def test_true_pictures_score_one_and_wrong_names_zero() -> None:
    world = World("validation", seen=20, unseen=5)
    documents = [item for item in world.read(Path(), world.shards(Path())[0]) if isinstance(item, Document)]
    images = np.stack([document.images[0].pixels() for document in documents])
    assert isinstance(world, Judge)
    alone, jointly = ([values_of(each, fields) for each in documents] for fields in (["entity"], world.judged))
    names = [each["entity"] for each in alone]
    assert shown_accuracy(world.shown(images), alone) == shown_accuracy(world.shown(images), jointly) == 1
    one = names.index(world.entities()[19].name)  # all entities take part, however few the pictures
    assert shown_accuracy(world.shown(images[[one]]), [alone[one]]) == 1
    noise = np.random.default_rng(0).integers(-40, 40, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    assert shown_accuracy(world.shown(noisy), jointly) == 1
    others = [{"entity": next(other for other in names if other != name)} for name in names]
    assert shown_accuracy(world.shown(images), others) == 0


def test_all_wanted_values_must_be_shown() -> None:
    """The first lacks a value, the second has another one, the third shows more than is asked for."""
    shown = [{"a": "x"}, {"a": "x", "b": "z"}, {"a": "x", "b": "y", "c": "z"}]
    assert shown_accuracy(shown, [{"a": "x", "b": "y"}] * 3) == pytest.approx(1 / 3)
    assert shown_accuracy(shown, [{"a": "x"}] * 3) == 1


def test_names_count_as_whole_words_only() -> None:
    captions = ["Vormika on grass", "a vormikas flag", "the flag of vormika, in rain", ""]
    wanted = [{"e": name} for name in ("vormika", "vormika", "Vormika", "VORMIKA")]
    assert named_accuracy(captions, wanted) == 0.5  # in any case


def test_captions_must_name_all_that_is_wanted() -> None:
    wanted = {"entity": "vormika", "ground": "grass", "frame": "no frame"}
    captions = ["vormika on grass with no frame", "grass, no frame: Vormika", "vormika on grass with a red frame", "no"]
    assert named_accuracy(captions, [wanted] * 4) == 0.5


def test_a_document_shows_what_its_metadata_say() -> None:
    document = Document("a", (Text("x"),), {"e": " fox ", "n": 7, "none": None, "empty": " "})
    assert values_of(document, ["e", "n", "none", "empty", "absent"]) == {"e": "fox", "n": "7"}


@pytest.mark.parametrize(
    ("metadata", "name"),
    [({}, None), ({"e": None}, None), ({"e": ""}, None), ({"e": "  "}, None), ({"e": " fox "}, "fox"), ({"e": 7}, "7")],
)
def test_a_document_without_a_name_has_no_entity(metadata: dict, name: str | None) -> None:
    document = Document("a", (Text("x"),), metadata)
    assert entity_of(document, "e") == name
    assert entity_of(document, "") is None


def test_who_is_left_out_is_said() -> None:
    assert left_out("test", "e", 5, 0) == ""
    assert left_out("test", "e", 5, 5).startswith("test: no document has 'e' in its metadata")
    assert left_out("test", "e", 5, 2).startswith("test: 2 of 5 documents have no 'e'")
