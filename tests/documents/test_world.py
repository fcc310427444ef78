"""The drawn world: held-out entities and settings stay held out, and pixels tell the emblem."""

import io
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rac3.config import InputError
from rac3.documents.document import Document, Source
from rac3.documents.world import (
    EMBLEM,
    FRAMES,
    GROUNDS,
    SIZE,
    WEATHERS,
    Setting,
    World,
    _entities,
    draw,
    draw_emblem,
    nearest_entities,
    nearest_settings,
)

SPLITS = ("train", "memory", "validation", "tuning", "test")
SETTINGS = len(GROUNDS) * len(WEATHERS) * len(FRAMES)


def world(split: str, **fields: int) -> World:
    sizes = {
        "seen": 12,
        "unseen": 5,
        "tuning": 3,
        "documents_per_entity": 4,
        "questions_per_entity": 2,
        "documents_per_shard": 10,
    }
    return World(split=split, **sizes | fields)  # type: ignore[arg-type]


def documents(source: World) -> list[Document]:
    found = [item for shard in source.shards(Path()) for item in source.read(Path(), shard)]
    assert all(isinstance(item, Document) for item in found)
    return found  # type: ignore[return-value]


def settings_of(split: str) -> set[tuple[str, str]]:
    """(entity, words of the setting) of each document."""
    return {tuple(document.text.split(" ", 1)) for document in documents(world(split))}  # type: ignore[misc]


def test_seen_and_unseen_entities_are_apart():
    names = {split: {name for name, _ in settings_of(split)} for split in SPLITS}
    entities = [entity.name for entity in world("train").entities()]
    assert names["train"] == names["validation"] == set(entities[:12])
    assert names["test"] == set(entities[12:17])
    assert names["tuning"] == set(entities[17:])
    assert names["memory"] == set(entities[12:])
    assert len(set(entities)) == 20


def test_no_picture_is_in_two_splits():
    each = [settings_of(split) for split in SPLITS]
    assert [len(pairs) for pairs in each] == [12 * 4, 8 * 4, 12 * 2, 3 * 2, 5 * 2]  # and no pair twice in a split
    assert len(set().union(*each)) == sum(map(len, each))


def test_documents_name_their_entity_and_keep_their_keys_apart():
    assert isinstance(world("train"), Source)
    for split in SPLITS:
        found = documents(world(split))
        assert len({document.key for document in found}) == len(found)
        for document in found:
            assert document.key.startswith(split)
            assert document.metadata["entity"] == document.text.split()[0]
            assert document.metadata["seen"] == (split in ("train", "validation"))
            setting = Setting(*(document.metadata[key] for key in ("ground", "weather")), "").words.split(" with")[0]
            assert document.text.split(" ", 1)[1] == f"{setting} with {document.metadata['frame']}"


@pytest.mark.parametrize(
    ("split", "entities", "each"),
    [("train", 12, 4), ("memory", 8, 4), ("validation", 12, 2), ("tuning", 3, 2), ("test", 5, 2)],
)
def test_the_shards_hold_every_document_and_are_known_without_drawing(split: str, entities: int, each: int):
    _entities.cache_clear()
    shards = world(split).shards(Path())
    assert _entities.cache_info().misses == 0
    assert len(shards) == -(-entities * each // 10)
    assert [item.key for item in documents(world(split))] == [f"{split}/{i:06d}" for i in range(entities * each)]
    assert len(world(split)._plan()) == entities * each


def test_copies_say_the_same_and_look_almost_the_same():
    for split, entities, each in (("train", 12, 4), ("memory", 8, 4)):
        plain = {item.text: item.images[0].pixels().astype(int) for item in documents(world(split))}
        copied = documents(world(split, copies=3))
        assert [item.key for item in copied] == [f"{split}/{i:06d}" for i in range(entities * each * 3)]
        assert len(world(split, copies=3).shards(Path())) == -(-entities * each * 3 // 10)
        assert Counter(item.text for item in copied) == dict.fromkeys(plain, 3)
        seen = [item.images[0].pixels() for item in copied]
        assert len({picture.tobytes() for picture in seen}) == len(copied)
        noise = np.stack([picture - plain[item.text] for item, picture in zip(copied, seen, strict=True)])
        assert noise.min() == -4
        assert noise.max() == 4
        assert abs(noise.mean()) < 0.1
        assert np.mean([a.text == b.text for a, b in pairwise(copied)]) < 0.3  # spread out
    assert documents(world("test", copies=3)) == documents(world("test"))
    assert documents(world("memory", copies=3)) == documents(world("memory", copies=3))
    with pytest.raises(InputError, match="copies=0 is below 1"):
        world("train", copies=0).shards(Path())


def test_the_world_is_a_function_of_its_fields():
    assert documents(world("test")) == documents(world("test"))
    assert documents(world("test")) != documents(world("test", seed=1))
    whole = [document.segments for document in documents(world("train", documents_per_shard=1000))]
    assert whole == [document.segments for document in documents(world("train"))]  # for any shard size


def test_entities_are_drawn_by_the_seed():
    zero, one = (world("train", seed=seed).entities() for seed in (0, 1))
    assert not {entity.name for entity in zero} & {entity.name for entity in one}
    assert not {(entity.layout, entity.colors) for entity in zero} & {(entity.layout, entity.colors) for entity in one}


def test_settings_are_drawn_by_the_seed_and_shuffled():
    """Two seeds give the settings in different orders, and an entity's documents are spread out."""
    zero, one = ([each.text.split(" ", 1)[1] for each in documents(world("train", seed=seed))] for seed in (0, 1))
    assert np.mean([a == b for a, b in zip(zero, one, strict=True)]) < 0.3
    names = [document.metadata["entity"] for document in documents(world("train"))]
    assert np.mean([a == b for a, b in pairwise(names)]) < 0.3  # of 4 documents each


def test_emblems_are_apart_in_pixels():
    """In a world where, without the check, two emblems would be within a distance of 2."""
    entities = world("train", seed=4, seen=300, unseen=1).entities()
    emblems = np.stack([draw_emblem(entity) for entity in entities]).astype(np.int16)
    nearest = [np.abs(emblems[:row] - emblems[row]).mean((1, 2, 3)).min() for row in range(1, len(emblems))]
    assert min(nearest) > 12


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("weather", WEATHERS)
def test_the_setting_leaves_the_emblem_alone(frame: str, weather: str):
    entities = world("train").entities()
    for ground in GROUNDS:
        for entity in entities[:3]:
            picture = draw(entity, Setting(ground, weather, frame))
            np.testing.assert_array_equal(picture[EMBLEM, EMBLEM], draw_emblem(entity))


def test_every_setting_looks_different():
    entity = world("train").entities()[0]
    pictures = {draw(entity, Setting(g, w, f)).tobytes() for g in GROUNDS for w in WEATHERS for f in FRAMES}
    assert len(pictures) == SETTINGS


def test_the_picture_of_a_document_shows_its_entity():
    source = world("test")
    found = documents(source)
    images = np.stack([document.images[0].pixels() for document in found])
    assert images.shape == (10, SIZE, SIZE, 3)
    names, distances = nearest_entities(images, source.entities())
    assert names == [document.metadata["entity"] for document in found]
    assert (distances.min(1) == 0).all()
    with pytest.raises(InputError, match=r"images of 32 x 32 .* vqgan\.model\.resolution to 40"):
        nearest_entities(images[:, :32, :32], source.entities())
    with PIL.Image.open(io.BytesIO(found[0].images[0].data)) as picture:
        assert picture.format == "PNG"


def test_the_setting_is_told_by_what_is_around_the_emblem():
    """Of every setting, with any emblem in it or none, and with noise."""
    every = [Setting(g, w, f) for g in GROUNDS for w in WEATHERS for f in FRAMES]
    entities = world("train").entities()
    images = np.stack([draw(entities[number % 17], setting) for number, setting in enumerate(every)])
    assert nearest_settings(images) == every
    noise = np.random.default_rng(0).integers(-40, 41, images.shape)
    assert nearest_settings((images + noise).clip(0, 255).astype(np.uint8)) == every
    black = images.copy()
    black[:, EMBLEM, EMBLEM] = 0
    assert nearest_settings(black) == every
    with pytest.raises(InputError, match=r"images of 32 x 40 "):
        nearest_settings(images[:, :32])


def test_the_world_judges_its_own_pictures():
    """By the metadata of its documents, of any split, with noise; and by no field that it can't see."""
    source = world("test")
    for split in ("tuning", "validation"):
        found = documents(world(split))
        images = np.stack([document.images[0].pixels() for document in found]).astype(int)
        noisy = (images + np.random.default_rng(0).integers(-40, 41, images.shape)).clip(0, 255).astype(np.uint8)
        assert source.shown(noisy) == [{key: each.metadata[key] for key in source.judged} for each in found]
    assert source.judged == ("entity", "ground", "weather", "frame")
    setting = Setting("grass", "rain", "a gold")
    assert setting.fields == {"ground": "grass", "weather": "rain", "frame": "a gold frame"}
    assert setting.words == "on grass in rain with a gold frame"


def test_a_world_without_entities_to_tune_on_has_no_such_split():
    with pytest.raises(InputError, match="tuning=0 leaves no entity for the split tuning"):
        world("tuning", tuning=0)
    assert len(world("test", tuning=0).entities()) == 17


def test_a_name_says_nothing_of_the_emblem():
    """Names that start with the same letter have different colors."""
    one, other = world("train", seen=50).entities(), world("train", seen=51).entities()
    assert [entity.name for entity in one] == [entity.name for entity in other][: len(one)]
    shared = {entity.name: entity for entity in one}
    firsts = {entity.name[0] for entity in one}
    for letter in firsts:
        alike = [shared[name].colors for name in shared if name[0] == letter]
        assert len(alike) < 3 or len(set(alike)) > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"documents_per_entity": SETTINGS - 1},
            f"{SETTINGS + 1} documents per entity exceed the {SETTINGS} settings",
        ),
        ({"seen": 0}, "seen=0"),
        ({"unseen": 0}, "unseen=0"),
        ({"tuning": -1}, "tuning=-1"),
        ({"questions_per_entity": 0}, "questions_per_entity=0"),
        ({"documents_per_shard": 0}, "documents_per_shard=0"),
    ],
)
def test_fields_are_checked(fields: dict[str, int], message: str):
    with pytest.raises(InputError, match=message):
        world("train", **fields)
