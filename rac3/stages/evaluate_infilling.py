"""Evaluate infilling and editing: the middle of held-out images, drawn again (paper, sections 5.2 and 5.3).

infilling   the middle of an image, given the rest of it and its text; with what the text retrieves, and without
editing     the same without the text, given by hand what the text of another entity retrieves
controlled  a whole image of the text without the entity's name, given those same documents
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from rac3 import recipes
from rac3.artifacts.workdir import write_atomic
from rac3.documents.document import Image, Text, prepare_image
from rac3.documents.store import TokenizedDocument
from rac3.documents.world import World, nearest_settings
from rac3.evaluation.reconstruction import psnr
from rac3.execution.progress import Progress
from rac3.experiment import Split
from rac3.generation.prompts import Asked, Context, Form
from rac3.generation.tasks import controlled, draw, edit, infill_image, score
from rac3.run import Run
from rac3.stages.held_out import SPLITS, Judge, entity, held_out, judge, retrieved, sampled, segment_ids

METRICS = "metrics.json"
MIDDLE = 0.6  # of the side of an image
SHOWN = 12  # documents whose pictures are kept for the report
NAMELESS = "something"  # in place of the entity's name

Pictures = UInt8[np.ndarray, "n height width 3"]


def evaluate_infilling(run: Run) -> dict[str, Any]:
    """How the run's model infills, edits and follows demonstrations on each held-out split, made or read.

    The artifact holds `metrics.json`, and for each split `SPLIT.npy`: the first pictures of each kind, uint8
    [kinds, n, height, width, 3].

    Raises:
      InputError: the model is not trained yet, or its images have no middle: their codes are no square.
    """
    recipe = recipes.infilling(run.experiment, run.trained)
    if run.workdir.find(recipe) is None:
        with run.workdir.write(recipe) as draft:
            metrics = {}
            for split in SPLITS:
                if split in run.experiment.data.sources():
                    test = Infilling.open(run, split)
                    metrics[split], pictures = test.measured() if test.items else ({"documents": 0}, {})
                    metrics[split]["pictures"] = [*pictures]
                    np.save(draft.folder / f"{split}.npy", np.array([each[:SHOWN] for each in pictures.values()]))
            write_atomic(draft.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    return json.loads((_folder(run) / METRICS).read_text())


def kept_pictures(run: Run, split: str) -> dict[str, Pictures]:
    """By kind, the pictures of the first documents of a split; empty if it has no document to infill."""
    kinds = evaluate_infilling(run)[split]["pictures"]
    return dict(zip(kinds, np.load(_folder(run) / f"{split}.npy", allow_pickle=False), strict=True))


def _folder(run: Run) -> Path:
    recipe = recipes.infilling(run.experiment, run.trained)
    return run.workdir.require(recipe, recipes.COMMANDS[recipe.stage]).folder


def middle(form: Form) -> Bool[np.ndarray, "width width"]:
    """The codes in the middle of an image, `MIDDLE` of its side high and wide."""
    width = form.image_width
    side = max(1, round(MIDDLE * width))
    start = (width - side) // 2
    masked = np.zeros((width, width), bool)
    masked[start : start + side, start : start + side] = True
    return masked


def next_of_another(names: Sequence[str]) -> list[int]:
    """For each, the number of the next one, around the end, that has another name; empty if all have one name."""
    if len(set(names)) < 2:
        return []
    count = len(names)
    following = [[(n + step) % count for step in range(1, count)] for n in range(count)]
    return [next(other for other in row if names[other] != names[n]) for n, row in enumerate(following)]


@dataclass(frozen=True, eq=False)
class Infilling:
    """The held-out documents of a split that have a text and an image.

    Attributes:
      neighbors: of the text of each, in the memory.
      pixels: of the image of each, as the model sees it.
      names: the entity that each shows; empty unless all say one.
    """

    run: Run
    split: Split
    items: Sequence[TokenizedDocument]
    neighbors: Int[np.ndarray, "n depth"]
    pixels: Pictures
    names: Sequence[str]

    @classmethod
    def open(cls, run: Run, split: Split) -> "Infilling":
        items, neighbors = held_out(run, split)
        rows = [row for row, item in enumerate(items) if item.document.images and item.document.text]
        items, size = [items[row] for row in rows], run.images.resolution
        pixels = np.array([prepare_image(item.document.images[0].pixels(), size) for item in items], np.uint8)
        names = [entity(run, item) for item in items]
        return cls(
            run, split, items, neighbors[rows, 0], pixels.reshape(-1, size, size, 3), names if all(names) else []
        )

    def measured(self) -> tuple[dict[str, Any], dict[str, Pictures]]:
        """The metrics, and the pictures of each kind."""
        most = self.run.experiment.evaluation.num_retrieved if self.run.experiment.retrieves else 0
        pictures = {"original": self.pixels, "masked": np.where(self.under, np.uint8(255), self.pixels)}
        pictures["codes"] = self._plugged(self.codes)
        metrics: dict[str, Any] = {
            "documents": len(self.items),
            "original": {"entity_accuracy": self._share(self.pixels, self.names)},
            "codes": self._compared(pictures["codes"]),
            "infilling": {},
        }
        with Progress(f"infilling {self.run.trained.model_name} on {self.split}", most + 3, "parts") as bar:
            for k in range(most + 1):
                found = pictures[f"infilled {k}"] = self._infilled(k)
                metrics["infilling"][str(k)] = {"perplexity": self._perplexity(k), **self._compared(found)}
                bar.update()
            if most:
                pictures["copied"] = self._plugged(self._first_retrieved())
                metrics["copied"] = self._compared(pictures["copied"])
            others = next_of_another(self.names) if most else []
            if others:
                wanted = [self.names[other] for other in others]
                given = [self._context(other, most) for other in others]
                pictures["given"] = self.run.images.decode(self._first_retrieved()[others])
                pictures["edited"] = self._edited(given)
                metrics["editing"] = {
                    "entity_accuracy": self._share(pictures["edited"], wanted),
                    "unchanged": self._share(pictures["edited"], self.names),
                }
                bar.update()
                pictures["controlled"] = self._controlled(given)
                metrics["controlled"] = {
                    "entity_accuracy": self._share(pictures["controlled"], wanted),
                    "setting_accuracy": self._settings(pictures["controlled"]),
                }
            bar.update()
        return metrics, pictures

    @cached_property
    def masked(self) -> Bool[np.ndarray, " tokens"]:
        return middle(self.run.form).reshape(-1)

    @cached_property
    def under(self) -> Bool[np.ndarray, "height width 1"]:
        """The pixels that the masked codes show."""
        size = self.run.images.resolution // self.run.form.image_width
        return np.kron(middle(self.run.form), np.ones((size, size), bool))[..., None]

    @cached_property
    def codes(self) -> Int[np.ndarray, "n tokens"]:
        found = [segment_ids(item, Image) for item in self.items]
        return np.stack([ids for ids in found if ids is not None])  # `open` leaves out documents without an image

    @cached_property
    def judge(self) -> Judge:
        return judge(self.run, self.split, self.names)

    def _infilled(self, k: int) -> Pictures:
        asked = [
            infill_image.request(self.run.form, codes, self.masked, self._context(row, k), self._text(row))
            for row, codes in enumerate(self.codes)
        ]
        return self._filled(f"{self.split} infilled", asked)

    def _edited(self, given: Sequence[Context]) -> Pictures:
        asked = [
            edit.request(self.run.form, codes, self.masked, documents)
            for codes, documents in zip(self.codes, given, strict=True)
        ]
        return self._filled(f"{self.split} edited", asked)

    def _filled(self, what: str, asked: Sequence[Asked]) -> Pictures:
        form, drawn = self.run.form, sampled(self.run, what, asked, self.run.experiment.evaluation.image_sampling)
        pairs = zip(drawn, self.codes, strict=True)
        return self._plugged(np.stack([infill_image.answer(form, each[0], own, self.masked) for each, own in pairs]))

    def _controlled(self, given: Sequence[Context]) -> Pictures:
        run, asked = self.run, []
        for item, name, documents in zip(self.items, self.names, given, strict=True):
            text = item.document.text.replace(name, NAMELESS)
            asked.append(controlled.request(run.form, run.tokenizer.encode(text), documents))
        drawn = sampled(run, f"{self.split} controlled", asked, run.experiment.evaluation.image_sampling)
        return run.images.decode(np.stack([draw.answer(run.form, each[0]) for each in drawn]))

    def _perplexity(self, k: int) -> float:
        """Of the masked codes, given the text and all codes that are not masked."""
        places = np.flatnonzero(self.masked)
        first, last = int(places[0]), int(places[-1]) + 1
        parts = []
        for row, codes in enumerate(self.codes):
            document = (False, np.asarray(self._text(row), np.int32)), (True, codes)
            asked = score.request(self.run.form, document, 1, self._context(row, k), first, last, infill=True)
            parts += asked.parts
        nats = [-each[: last - first][self.masked[first:last]] for each in self.run.scorer.log_probs(parts)]
        return float(np.exp(np.mean(nats, dtype=np.float64)))

    def _first_retrieved(self) -> Int[np.ndarray, "n tokens"]:
        """Of the first document that each text retrieved, the codes; those of a black image if it retrieved nothing."""
        size = self.run.images.resolution
        out = np.tile(self.run.images.encode([np.zeros((size, size, 3), np.uint8)])[0], (len(self.items), 1))
        for row, neighbors in enumerate(self.neighbors):
            for item in retrieved(self.run, neighbors, 1):
                codes = segment_ids(item, Image)
                out[row] = out[row] if codes is None else codes
        return out

    def _context(self, row: int, k: int) -> Context:
        documents = [item.tokens for item in retrieved(self.run, self.neighbors[row], k)]
        return Context(documents, without=self.run.experiment.evaluation.image_sampling.without)

    def _text(self, row: int) -> np.ndarray:
        ids = segment_ids(self.items[row], Text)
        assert ids is not None  # `open` leaves out documents without a text
        return ids

    def _plugged(self, codes: Int[np.ndarray, "n tokens"]) -> Pictures:
        """The originals with the middle of what these codes show."""
        return np.where(self.under, self.run.images.decode(codes), self.pixels)

    def _compared(self, images: Pictures) -> dict[str, float | None]:
        """How near the middle is to the original's, in dB, and how often the entity is right."""
        inside = self.under[..., 0]
        middles = (each[:, inside][:, :, None] for each in (self.pixels, images))
        return {
            "psnr": float(np.minimum(psnr(*middles), 60).mean()),
            "entity_accuracy": self._share(images, self.names),
        }

    def _share(self, images: Pictures, names: Sequence[str]) -> float | None:
        """Of the images that show the entity of this name; None without names."""
        if not names:
            return None
        return float(np.mean([shown == name for shown, name in zip(self.judge(images), names, strict=True)]))

    def _settings(self, images: Pictures) -> float | None:
        """Share of the images in the setting that the text names; None of sources other than the procedural world."""
        if not isinstance(self.run.experiment.data.train, World):
            return None
        pairs = zip(nearest_settings(images), self.items, strict=True)
        return float(np.mean([setting.words in item.document.text for setting, item in pairs]))
