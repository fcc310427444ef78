from pathlib import Path

import numpy as np
import pytest

from rac3.documents.document import Document, Text
from rac3.documents.world import World
from rac3.evaluation.entities import emblem_accuracy, entity_of, left_out, name_accuracy


def test_true_pictures_score_one_and_wrong_names_zero() -> None:
    world = World("validation", seen=20, unseen=5)
    documents = [item for item in world.read(Path(), world.shards(Path())[0]) if isinstance(item, Document)]
    images = np.stack([document.images[0].pixels() for document in documents])
    names = [str(document.metadata["entity"]) for document in documents]
    assert emblem_accuracy(images, names, world.entities()) == 1
    one = names.index(world.entities()[19].name)  # all entities take part, however few the pictures
    assert emblem_accuracy(images[[one]], [names[one]], world.entities()) == 1
    noise = np.random.default_rng(0).integers(-40, 40, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    assert emblem_accuracy(noisy, names, world.entities()) == 1
    others = [next(other for other in names if other != name) for name in names]
    assert emblem_accuracy(images, others, world.entities()) == 0


def test_names_count_as_whole_words_only() -> None:
    captions = ["Vormika on grass", "a vormikas flag", "the flag of vormika, in rain", ""]
    assert name_accuracy(captions, ["vormika", "vormika", "Vormika", "VORMIKA"]) == 0.5  # in any case


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
