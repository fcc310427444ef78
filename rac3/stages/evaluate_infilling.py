"""Evaluate infilling and editing: the middle of held-out images is drawn again (paper, sections 5.2 and 5.3).

infilling   the middle of an image, given the rest of it, its text, and 0 to k documents that the text retrieves
editing     the middle without the text, given the documents that the text of another entity retrieves
controlled  a whole image of the text with "something" for the entity's name, given those same documents

Each is judged by the entity that it shows: its own after infilling, that of the documents after the other two.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from rac3 import recipes
from rac3.artifacts.workdir import write_atomic
from rac3.config import InputError
from rac3.documents.document import Image, Judge, Text, prepare_image
from rac3.documents.store import TokenizedDocument
from rac3.evaluation.entities import shown_accuracy, values_of
from rac3.evaluation.reconstruction import psnr
from rac3.execution.progress import Progress
from rac3.experiment import Split
from rac3.generation.prompts import Asked, Context, Form
from rac3.generation.sampling import Contrast, Guidance, Sampling
from rac3.generation.tasks import controlled, draw, edit, infill_image, score
from rac3.held_out import (
    SPLITS,
    EntityJudge,
    Pictures,
    context,
    copied,
    entity,
    held_out,
    judge,
    retrieved,
    sampled,
    segment_ids,
)
from rac3.run import Run

METRICS = "metrics.json"
MIDDLE = 0.6  # of the side of an image
SHOWN = 12  # documents whose pictures are kept for the report
NAMELESS = "something"  # in place of the entity's name


def evaluate_infilling(run: Run) -> dict[str, Any]:
    """How the run's model infills, edits and draws after documents on each held-out split, made or read.

    The artifact holds `metrics.json`, and for each split `SPLIT.npy`: the first pictures of each kind, uint8
    [kinds, n, height, width, 3], whose kinds are the split's `pictures` in the metrics.

    Raises:
      InputError: the model is not trained yet, or the codes of an image are no square.
    """
    recipe = recipes.infilling(run.experiment, run.trained, run.step)
    if run.workdir.find(recipe) is None:
        with run.workdir.write(recipe) as draft:
            metrics = {}
            for split in SPLITS:
                if split in run.experiment.data.sources():
                    test = Infilling.open(run, split)
                    metrics[split], pictures = test.measured() if test.items else ({"documents": 0}, {})
                    metrics[split]["pictures"] = [*pictures]
                    np.save(draft.folder / f"{split}.npy", np.array([*pictures.values()], np.uint8))
            write_atomic(draft.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    return json.loads((_folder(run) / METRICS).read_text(encoding="utf-8"))


def kept_pictures(run: Run, split: Split) -> dict[str, Pictures]:
    """By kind, the pictures of the first documents of a split; empty if it has no document to infill."""
    kinds = evaluate_infilling(run)[split]["pictures"]
    return dict(zip(kinds, np.load(_folder(run) / f"{split}.npy", allow_pickle=False), strict=True))


def _folder(run: Run) -> Path:
    recipe = recipes.infilling(run.experiment, run.trained, run.step)
    return run.workdir.require(recipe).folder


def middle(form: Form, resolution: int) -> infill_image.PixelMask:
    """The pixels of the codes in the middle of an image: `MIDDLE` of its side high and wide.

    Raises:
      InputError: the codes of an image are no square grid over its pixels.
    """
    width = form.image_width
    if not width or resolution % width:
        raise InputError(
            f"the {form.tokens_per_image} codes of an image of {resolution} x {resolution} pixels are no square grid "
            "over it, so that it has no middle to infill; use a VQGAN whose codes are"
        )
    side, pixels = max(1, round(MIDDLE * width)), resolution // width
    start = (width - side) // 2
    inside = slice(pixels * start, pixels * (start + side))
    masked = np.zeros((resolution, resolution), bool)
    masked[inside, inside] = True
    return masked


def next_of_another(names: Sequence[str], usable: Collection[int]) -> list[int]:
    """For each, the number of the next usable one, around the end, that has another name; empty if any has none."""
    count, out = len(names), []
    for number, name in enumerate(names):
        following = ((number + step) % count for step in range(1, count))
        found = next((each for each in following if each in usable and names[each] != name), None)
        if found is None:
            return []
        out.append(found)
    return out


@dataclass(frozen=True, eq=False)
class Infilling:
    """The held-out documents of a split that have a text and an image.

    Attributes:
      neighbors: of the text of each, in the memory; -1 is none.
      pixels: of the image of each, as the model sees it.
      names: the entity that each shows; empty unless all say one.
      inside: the pixels that are drawn again.
    """

    run: Run
    split: Split
    items: Sequence[TokenizedDocument]
    neighbors: Int[np.ndarray, "n depth"]
    pixels: Pictures
    names: Sequence[str]
    inside: infill_image.PixelMask

    @classmethod
    def open(cls, run: Run, split: Split) -> "Infilling":
        found, neighbors = held_out(run, split)
        rows = [row for row, item in enumerate(found) if item.document.images and item.document.text]
        items, size = [found[row] for row in rows], run.images.resolution
        pixels = [prepare_image(item.document.images[0].pixels(), size) for item in items]
        names = [entity(run, item) for item in items]
        return cls(
            run,
            split,
            items,
            neighbors[rows, 0],
            np.array(pixels, np.uint8).reshape(-1, size, size, 3),
            names if all(names) else [],
            middle(run.form, size),
        )

    def measured(self) -> tuple[dict[str, Any], dict[str, Pictures]]:
        """The metrics, and the first pictures of each kind."""
        pictures: dict[str, Pictures] = {}

        def kept(kind: str, images: Pictures) -> Pictures:
            pictures[kind] = images[:SHOWN].copy()
            return images

        kept("original", self.pixels)
        kept("masked", np.where(self.inside[..., None], np.uint8(255), self.pixels))
        metrics: dict[str, Any] = {
            "documents": len(self.items),
            "original": {"entity_accuracy": self._share(self.pixels, self.names)},
            "reconstructed": self._compared(kept("reconstructed", self._plugged(self.run.images.decode(self.codes)))),
            "infilling": {},
        }
        most = self.run.experiment.evaluation.num_retrieved if self.run.experiment.retrieves else 0
        with Progress(f"infilling {self.run.model_name} on {self.split}", most + 2, "parts") as bar:
            for k in range(most + 1):
                infilled = self._compared(kept(f"infilled {k}", self._infilled(k)))
                metrics["infilling"][str(k)] = {"perplexity": self._perplexity(k), **infilled}
                bar.update()
            if most:
                firsts = copied(self.run, self.neighbors)
                metrics["copied"] = self._compared(kept("copied", self._plugged(firsts)))
                others = self._others()
                if others:
                    wanted = [self.names[other] for other in others]
                    kept("given", firsts[others])
                    edited = kept("edited", self._edited(others, most))
                    metrics["editing"] = {
                        "entity_accuracy": self._share(edited, wanted),
                        "unchanged": self._share(edited, self.names),
                    }
                    drawn = kept("controlled", self._controlled(others, most))
                    metrics["controlled"] = {
                        "entity_accuracy": self._share(drawn, wanted),
                        "setting_accuracy": self._settings(drawn),
                    }
            bar.update()
        return metrics, pictures

    @cached_property
    def masked(self) -> Bool[np.ndarray, " tokens"]:
        """The codes that are drawn again."""
        return infill_image.masked_codes(self.run.form, self.inside)

    @cached_property
    def codes(self) -> Int[np.ndarray, "n tokens"]:
        return np.stack([self._ids(row, Image) for row in range(len(self.items))])

    @cached_property
    def _judge(self) -> EntityJudge | None:
        return judge(self.run, self.split, self.names)

    @property
    def _sampling(self) -> Sampling:
        return self.run.experiment.evaluation.image_sampling

    def _others(self) -> list[int]:
        """For each document, the one by whose neighbors it is edited; empty without names or neighbors."""
        usable = {row for row, neighbors in enumerate(self.neighbors) if retrieved(self.run, neighbors, 1)}
        return next_of_another(self.names, usable)

    def _infilled(self, k: int) -> Pictures:
        asked = [
            infill_image.request(
                self.run.form, codes, self.masked, self._context(row, k, self._sampling), self._ids(row, Text)
            )
            for row, codes in enumerate(self.codes)
        ]
        return self._filled("infilled", asked, self._sampling)

    def _edited(self, others: Sequence[int], k: int) -> Pictures:
        sampling = self._sampling
        if sampling.without == "text":  # there is none to leave out
            sampling = replace(sampling, guidance=Guidance(), contrast=Contrast())
        asked = [
            edit.request(self.run.form, codes, self.masked, self._context(other, k, sampling))
            for codes, other in zip(self.codes, others, strict=True)
        ]
        return self._filled("edited", asked, sampling)

    def _filled(self, what: str, asked: Sequence[Asked], sampling: Sampling) -> Pictures:
        samples = sampled(self.run, f"{self.split} {what}", asked, sampling)
        filled = [
            infill_image.answer(self.run.form, first, codes, self.masked)
            for (first,), codes in zip(samples, self.codes, strict=True)
        ]
        return self._plugged(self.run.images.decode(np.stack(filled)))

    def _controlled(self, others: Sequence[int], k: int) -> Pictures:
        run, asked = self.run, []
        for item, name, other in zip(self.items, self.names, others, strict=True):
            text = next(each.text for each in item.document.segments if isinstance(each, Text))
            ids = run.tokenizer.encode(nameless(text, name))[: run.experiment.max_text_tokens]
            asked.append(controlled.request(run.form, ids, self._context(other, k, self._sampling)))
        samples = sampled(run, f"{self.split} controlled", asked, self._sampling)
        return run.images.decode(np.stack([draw.answer(run.form, first) for (first,) in samples]))

    def _perplexity(self, k: int) -> float:
        """Of the masked codes, given the text, all known codes outside their span, and those before each in it."""
        places = np.flatnonzero(self.masked)
        first, last = int(places[0]), int(places[-1]) + 1
        parts = []
        for row, codes in enumerate(self.codes):
            document = (False, self._ids(row, Text)), (True, codes)
            documents = self._context(row, k, self._sampling)
            parts += score.request(self.run.form, document, 1, documents, first, last, infill=True).parts
        nats = [-each[places - first] for each in self.run.scorer.log_probs(parts)]
        return float(np.exp(np.mean(nats, dtype=np.float64)))

    def _context(self, row: int, k: int, sampling: Sampling) -> Context:
        """The first k documents that the text of a row retrieved."""
        return context(self.run, self.neighbors[row], k, sampling)

    def _ids(self, row: int, kind: type[Text] | type[Image]) -> Int[np.ndarray, " ids"]:
        ids = segment_ids(self.items[row], kind)
        assert ids is not None  # `open` takes documents with both
        return ids

    def _plugged(self, images: Pictures) -> Pictures:
        """The originals with the middle of these images."""
        return np.where(self.inside[..., None], images, self.pixels)

    def _compared(self, images: Pictures) -> dict[str, float | None]:
        """PSNR of the middle in dB (a picture counts at most 60), and how often the entity is right."""
        middles = (each[:, self.inside][:, None] for each in (self.pixels, images))
        return {
            "psnr": float(np.minimum(psnr(*middles), 60).mean()),
            "entity_accuracy": self._share(images, self.names),
        }

    def _share(self, images: Pictures, names: Sequence[str]) -> float | None:
        """Of the images that show the entity of this name; None without names, or a judge."""
        if not names or self._judge is None:
            return None
        return float(np.mean([shown == name for shown, name in zip(self._judge(images), names, strict=True)]))

    def _settings(self, images: Pictures) -> float | None:
        """Share of the images that show all that the text names but the entity; None if the source judges no more."""
        source, entity_field = self.run.experiment.data.train, self.run.experiment.data.entity_field
        if not isinstance(source, Judge):
            return None
        fields = [field for field in source.judged if field != entity_field]
        wanted = [values_of(item.document, fields) for item in self.items]
        return shown_accuracy(source.shown(images), wanted) if all(wanted) else None


def nameless(text: str, name: str) -> str:
    """A text with `NAMELESS` for a name, where the name is a whole word, in any case."""
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", NAMELESS, text, flags=re.IGNORECASE)
