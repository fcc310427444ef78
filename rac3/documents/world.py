"""A procedurally drawn world: entities whose emblems cannot be guessed from their names.

An image shows an entity's emblem in a setting; its caption names the entity and the setting:

    "vormika on grass in rain with a gold frame"

The setting can be drawn from the caption. The emblem (layout, colors, charge) can only be known from other images of
the entity, seen in training or retrieved. Unseen entities are never trained on; the memory shows them in other settings
than the test asks for. This is the paper's knowledge-intensive generation (section 5.1), scored by pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

from rac3.config import InputError
from rac3.documents.document import Document, Image, Reject, Text, encode_png

SIZE = 40  # pixels a side
NOISE = 4  # of 255, the most by which a pixel of a copied document differs
EMBLEM = slice(8, 32)  # its rows and columns: aligned to 8x8 patches, so that no patch mixes emblem and setting
COLORS = {
    "red": (214, 40, 40),
    "blue": (36, 72, 200),
    "green": (24, 140, 64),
    "gold": (250, 190, 20),
    "black": (20, 20, 24),
    "white": (248, 248, 248),
}
GROUNDS = {"grass": (90, 170, 60), "sand": (226, 200, 130), "water": (50, 110, 190)}
WEATHERS = {"sun": (170, 214, 250), "rain": (120, 135, 150), "night": (24, 26, 60)}
FRAMES: dict[str, tuple[int, int, int] | None] = {"no": None, "a gold": (212, 160, 20), "a red": (180, 20, 20)}
CHARGES = ("disc", "square", "diamond", "ring", "plus", "bars")


@dataclass(frozen=True)
class Entity:
    """A made-up name, and an emblem that is independent of it."""

    name: str
    layout: tuple[int, ...]  # index of the color of each of the 3x3 fields, row by row
    colors: tuple[str, str, str]
    charge: str  # drawn on the center field, in another color
    charge_color: str


@dataclass(frozen=True)
class Setting:
    """The ground, weather and frame, which the caption states."""

    ground: str
    weather: str
    frame: str

    @property
    def fields(self) -> dict[str, str]:
        """As in the metadata of a document; its caption has these words."""
        return {"ground": self.ground, "weather": self.weather, "frame": f"{self.frame} frame"}

    @property
    def words(self) -> str:
        return "on {ground} in {weather} with {frame}".format(**self.fields)


def all_settings() -> list[Setting]:
    """Every ground, in every weather, with every frame."""
    return [Setting(g, w, f) for g in GROUNDS for w in WEATHERS for f in FRAMES]


@dataclass(frozen=True)
class World:
    """A split of the world as a document source.

    Attributes:
      split: `train` and `validation` show the seen entities, `test` the unseen ones, `tuning` other unseen ones, and
        `memory` both kinds of unseen ones. An entity is never in the same setting in two splits.
      seed: of the entities and their settings.
      seen: number of seen entities.
      unseen: number of unseen entities of `test`.
      tuning: number of unseen entities of `tuning`; may be 0.
      documents_per_entity: images of each entity in `train` (seen) or `memory` (unseen).
      copies: documents with each of these images, which differ in faint noise, as what is found on the web is repeated.
      questions_per_entity: images of each entity in `validation` (seen), `test` or `tuning` (unseen).
      documents_per_shard: documents in each shard but the last.
    """

    split: Literal["train", "memory", "validation", "tuning", "test"] = "train"
    seed: int = 0
    seen: int = 200
    unseen: int = 40
    tuning: int = 0
    documents_per_entity: int = 6
    copies: int = 1
    questions_per_entity: int = 2
    documents_per_shard: int = 512

    def __post_init__(self) -> None:
        settings = len(GROUNDS) * len(WEATHERS) * len(FRAMES)
        wanted = self.documents_per_entity + self.questions_per_entity
        if wanted > settings:
            raise InputError(f"world: {wanted} documents per entity exceed the {settings} settings; use fewer")
        for name in ("seen", "unseen", "documents_per_entity", "copies", "questions_per_entity", "documents_per_shard"):
            if getattr(self, name) < 1:
                raise InputError(f"world: {name}={getattr(self, name)} is below 1; use at least 1")
        if self.tuning < (self.split == "tuning"):
            raise InputError(f"world: tuning={self.tuning} leaves no entity for the split tuning; use 40, say")

    def shards(self, data_dir: Path) -> Sequence[str]:
        # Without drawing any: every command asks.
        documents = len(self._entities_shown()) * self._documents_of_each() * self._copies()
        return [f"{start:06d}" for start in range(0, documents, self.documents_per_shard)]

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject]:
        start = int(shard)
        for index, (entity, setting) in enumerate(self._plan()[start : start + self.documents_per_shard], start):
            picture = draw(entity, setting)
            if self._copies() > 1:
                noise = np.random.default_rng([self.seed, 2, index]).integers(
                    -NOISE, NOISE, picture.shape, endpoint=True
                )
                picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
            yield Document(
                key=f"{self.split}/{index:06d}",
                segments=(Text(f"{entity.name} {setting.words}"), Image(encode_png(picture))),
                metadata={
                    "entity": entity.name,
                    "seen": self.split in ("train", "validation"),
                    **setting.fields,
                },
            )

    @property
    def judged(self) -> tuple[str, ...]:
        """The entity, and what its setting consists of."""
        return "entity", *all_settings()[0].fields

    def shown(self, pictures: UInt8[np.ndarray, "pictures height width 3"]) -> list[dict[str, str]]:
        """The entity whose emblem is nearest to each picture's middle, and the setting that is nearest around it.

        Raises:
          InputError: the pictures are not of the world's size.
        """
        names, _ = nearest_entities(pictures, self.entities())
        return [
            {"entity": name, **setting.fields} for name, setting in zip(names, nearest_settings(pictures), strict=True)
        ]

    def entities(self) -> tuple[Entity, ...]:
        """All entities: the seen ones, the unseen ones of `test`, and those of `tuning`."""
        return _entities(self.seed, self.seen + self.unseen + self.tuning)

    def _entities_shown(self) -> range:
        """Which of the entities the split shows."""
        known, tested = self.seen, self.seen + self.unseen
        every = tested + self.tuning
        return {
            "train": range(known),
            "validation": range(known),
            "memory": range(known, every),
            "test": range(known, tested),
            "tuning": range(tested, every),
        }[self.split]

    def _documents_of_each(self) -> int:
        return self.documents_per_entity if self.split in ("train", "memory") else self.questions_per_entity

    def _copies(self) -> int:
        return self.copies if self.split in ("train", "memory") else 1

    def _plan(self) -> list[tuple[Entity, Setting]]:
        """The (entity, setting) of each document, shuffled."""
        rng = np.random.default_rng([self.seed, 1])
        settings, entities = all_settings(), self._entities_shown()
        first = 0 if self.split in ("train", "memory") else self.documents_per_entity  # of an entity's settings
        plan = []
        for index, entity in enumerate(self.entities()):
            order = [settings[i] for i in rng.permutation(len(settings))]
            if index in entities:
                plan += [
                    (entity, setting) for setting in order[first : first + self._documents_of_each()]
                ] * self._copies()
        return [plan[i] for i in rng.permutation(len(plan))]


@lru_cache(maxsize=8)
def _entities(seed: int, count: int) -> tuple[Entity, ...]:
    """Draw `count` entities with distinct names, and emblems that differ clearly in pixels."""
    rng = np.random.default_rng([seed, 0])
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = rng.integers(2, 4)
        names[
            "".join(rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(syllables))
            + rng.choice(list("bdgklmnrstx"))
        ] = None
    entities: list[Entity] = []
    pictures = np.zeros((count, 24, 24, 3), np.int16)
    for name in names:
        while True:
            first, second, third = (str(color) for color in rng.choice(list(COLORS), 3, replace=False))
            colors = (first, second, third)
            layout = tuple(int(field) for field in rng.integers(3, size=9))
            charge_color = str(rng.choice([color for color in COLORS if color != colors[layout[4]]]))
            entity = Entity(name, layout, colors, str(rng.choice(CHARGES)), charge_color)
            picture = draw_emblem(entity).astype(np.int16)
            distances = np.abs(pictures[: len(entities)] - picture).mean((1, 2, 3))
            if not len(entities) or distances.min() > 12:
                break
        pictures[len(entities)] = picture
        entities.append(entity)
    return tuple(entities)


def draw_emblem(entity: Entity) -> UInt8[np.ndarray, "24 24 3"]:
    """Draw the emblem alone."""
    y, x = np.mgrid[0:24, 0:24] - 11.5
    charge = {
        "disc": np.hypot(x, y) < 3.6,
        "square": (abs(x) < 3) & (abs(y) < 3),
        "diamond": abs(x) + abs(y) < 4.5,
        "ring": (np.hypot(x, y) > 1.5) & (np.hypot(x, y) < 3.9),
        "plus": (np.minimum(abs(x), abs(y)) < 1) & (np.maximum(abs(x), abs(y)) < 3.6),
        "bars": (abs(x) < 4) & (abs(abs(y) - 2) < 1),
    }[entity.charge]
    fields = np.array([COLORS[entity.colors[field]] for field in entity.layout], np.uint8).reshape(3, 3, 3)
    picture = fields.repeat(8, 0).repeat(8, 1)
    picture[charge] = COLORS[entity.charge_color]
    return picture


def draw(entity: Entity, setting: Setting) -> UInt8[np.ndarray, "40 40 3"]:
    """Draw the emblem in its setting: sky with weather, ground below, a frame around everything."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    picture = np.empty((SIZE, SIZE, 3), np.uint8)
    picture[:] = WEATHERS[setting.weather]
    if setting.weather == "rain":
        picture[(x + 2 * y) % 8 < 2] = (70, 90, 130)
    elif setting.weather == "night":
        picture[(x % 8 == 5) & (y % 8 == 3)] = (255, 250, 190)
    else:
        picture[(y < 8) & (x >= 32) & (np.hypot(x - 36, y - 4) < 3.5)] = (255, 220, 60)
    ground = y >= 32
    picture[ground] = GROUNDS[setting.ground]
    if setting.ground == "water":
        picture[ground & ((x // 2 + y // 2) % 4 == 0)] = (150, 190, 235)
    elif setting.ground == "grass":
        picture[ground & (x % 4 == 1) & (y % 8 < 5)] = (50, 120, 40)
    frame = FRAMES[setting.frame]
    if frame is not None:
        picture[(np.minimum(x, y) < 2) | (np.maximum(x, y) >= SIZE - 2)] = frame
    picture[EMBLEM, EMBLEM] = draw_emblem(entity)
    return picture


def nearest_settings(images: UInt8[np.ndarray, "images height width 3"]) -> list[Setting]:
    """The setting whose pixels around the emblem are nearest to those of each image.

    Raises:
      InputError: as `nearest_entities`.
    """
    _check_size(images)
    anything = Entity("", (0,) * 9, ("red", "red", "red"), "disc", "blue")  # its emblem is as far in every setting
    settings = all_settings()
    drawn = np.stack([draw(anything, setting) for setting in settings]).astype(np.float32)
    distances = [np.abs(drawn - image).mean((1, 2, 3)) for image in images.astype(np.float32)]
    return [settings[int(row.argmin())] for row in distances]


def nearest_entities(
    images: UInt8[np.ndarray, "images height width 3"], entities: Sequence[Entity]
) -> tuple[list[str], Float[np.ndarray, "images entities"]]:
    """The entity whose emblem is nearest to each image's emblem region, and all mean absolute distances (0 to 255).

    Raises:
      InputError: the images, which have the VQGAN's resolution, are not of the world's size.
    """
    _check_size(images)
    emblems = np.stack([draw_emblem(entity) for entity in entities]).astype(np.float32)
    regions = images[:, EMBLEM, EMBLEM].astype(np.float32)
    distances = np.stack([np.abs(emblems - region).mean((1, 2, 3)) for region in regions])
    return [entities[i].name for i in distances.argmin(1)], distances


def _check_size(images: UInt8[np.ndarray, "images height width 3"]) -> None:
    if images.shape[1:3] != (SIZE, SIZE):
        height, width = images.shape[1:3]
        raise InputError(
            f"images of {height} x {width} cannot be compared with the world's {SIZE} x {SIZE}; set vqgan.resolution "
            f"(with a checkpoint) or vqgan.model.resolution to {SIZE}"
        )
