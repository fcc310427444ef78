"""A trained model that answers prompts: every task of the paper, with retrieved or given documents.

model = rac3.load("runs/quickstart")
model.generate("a red fox", retrieve=2, samples=4, seed=1).images[0]
"""

import contextlib
import dataclasses
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Shaped, UInt8

from rac3.config import InputError, quoted, to_plain
from rac3.documents.document import (
    PADDED_SIDE,
    Document,
    Image,
    ImageError,
    Text,
    captioned,
    center_square,
    decode_image,
    encode_png,
    frame,
    framed,
    framed_place,
    prepare_image,
)
from rac3.documents.store import TokenizedDocument, Tokens
from rac3.generation.answers import Answer, Classified, Likelihood, Part
from rac3.generation.engine import Progress
from rac3.generation.prompts import Asked, Context, each_alone
from rac3.generation.request import Request, Sample
from rac3.generation.sampling import Sampling
from rac3.generation.tasks import (
    caption,
    classify,
    continuation,
    controlled,
    draw,
    edit,
    infill_image,
    infill_text,
    score,
)
from rac3.generation.tasks.continuation import Kind
from rac3.generation.tasks.score import Parts
from rac3.run import Found, Run, tokenize
from rac3.tokens.html import Segment

Task = Literal["draw", "caption", "infill_image", "infill_text", "edit", "controlled", "continue"]
Ensemble = Literal["", "mean", "best"]
Pixels = UInt8[np.ndarray, "_ _ 3"]
PixelMask = Bool[np.ndarray, "_ _"]
Picture = Pixels | PIL.Image.Image | str | os.PathLike[str]  # pixels, or a file
# What is not zero is drawn, or what is white; or left, top, right, bottom.
Mask = Shaped[np.ndarray, "_ _"] | PIL.Image.Image | tuple[int, int, int, int]

CLIP_SCORE, LOG_PROB = "CLIP score", "log p per id"
MASK = "<mask>"  # in the text of a prompt: a part to fill in
MASK_TOKENS = (1, 2, 4, 8)  # ids that a masked part of a text may have
PARTIAL_EVERY = 4  # steps of the engine between two looks at what it draws
AT_ONCE = 64  # prompts that are retrieved for and decoded together


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is asked of a model.

    Attributes:
      task: `draw` an image of the text, as `controlled` does in the manner of the given documents; `caption` the image;
        `infill_image` under the mask, as `edit` does by what the given documents show; `infill_text` where the text
        says <mask>; `continue` with `follow` after text and image, or after a document.
      text, image, mask: what the task starts from. The mask is True at the pixels to draw, and has the image's size.
      documents: given by hand, in context before those that are retrieved; they need not be in the memory.
      retrieve: the number of documents to retrieve.
      ensemble: what to do with more documents than in training, which go into several prompts with some of them each
        (paper, section 5.4): `mean` averages the distributions of each id over the prompts; `best` answers each prompt
        apart, `samples` times, and keeps the best answers of all. "" has all documents in one prompt.
      document: of `continue`, what it starts from in place of text and image: texts and images in any order.
      follow: kinds of segments, in order.
      samples: how many to draw; the answer has them best first.
      seed: another one draws other samples.
      sampling: None is what the experiment evaluates with.

    Raises:
      InputError: an unknown task, a value of another type or out of its range, or a mask of another size.
    """

    task: Task = "draw"
    text: str = ""
    image: Pixels | None = None
    mask: PixelMask | None = None
    documents: Sequence[Document] = ()
    retrieve: int = 2
    ensemble: Ensemble = ""
    document: Document | None = None
    follow: Sequence[Kind] = ()
    samples: int = 4
    seed: int = 0
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise InputError(f"task={quoted(self.task)} is unknown; use {', '.join(get_args(Task))}")
        if self.ensemble not in get_args(Ensemble):
            raise InputError(f"ensemble={quoted(self.ensemble)} is unknown; use mean, best, or '' for none")
        if not isinstance(self.text, str):
            raise InputError(f"text={quoted(self.text)} is no text; give a str")
        for name, least in (("retrieve", 0), ("samples", 1), ("seed", 0)):
            _check_int(name, getattr(self, name), least)
        if not isinstance(self.sampling, Sampling | None):
            raise InputError(f"sampling={quoted(self.sampling)} is no Sampling; give such as Sampling(temperature=0.5)")
        if self.image is not None:
            _check_pixels(self.image)
        if self.mask is not None and not (isinstance(self.mask, np.ndarray) and self.mask.dtype == bool):
            raise InputError(f"the mask is {quoted(self.mask)}; give a bool array of shape (height, width)")
        if self.mask is not None and self.mask.ndim != 2:
            raise InputError(f"the mask has the shape {self.mask.shape}; give one of shape (height, width)")
        if self.mask is not None and self.image is not None and self.mask.shape != self.image.shape[:2]:
            size, wanted = (f"{x.shape[1]} x {x.shape[0]}" for x in (self.mask, self.image))
            raise InputError(f"the mask has {size} pixels, but the image {wanted}; give one of the same size")
        if self.document is not None:
            if not isinstance(self.document, Document):
                raise InputError(f"document={quoted(self.document)} is no Document; give such as rac3.Document(...)")
            if self.task != "continue" or self.text or self.image is not None:
                raise InputError("a document is for the task continue, in place of a text and an image; give only one")
        if self.task in ("draw", "controlled", "infill_text") and not self.text.strip():
            raise InputError(f"the task {self.task} needs a text; give one, such as 'a red fox'")

    @property
    def query(self) -> str | Pixels | None:
        """What retrieves: the text, or else the image, whose masked pixels get the mean color of the others.

        Raises:
          ImageError: the image of the document can't be decoded.
        """
        if self.document is not None:
            return self.document.text or self.document.images[0].pixels()
        text = " ".join(self.text.replace(MASK, " ").split())
        if text or self.image is None or self.mask is None or self.mask.all():
            return text or self.image
        known = self.image[~self.mask].mean(0).round().astype(np.uint8)
        return np.where(self.mask[..., None], known, self.image)


@dataclass(frozen=True, eq=False)
class Passage:
    """A part of a document to be scored.

    Attributes:
      segment: its number.
      start, end: of the segment, the ids [start, end): of `Model.tokenizer` for a text, `Model.images` for an image.
        None is its end.
      infill: given also what follows the part; else only what is before it.
      documents, retrieve, ensemble: the context, as in `Prompt`, of which `best` has nothing to rank. What retrieves is
        the rest of the document, without the segment: its text, or else its image.
    """

    document: Document
    segment: int = 0
    start: int = 0
    end: int | None = None
    infill: bool = False
    documents: Sequence[Document] = ()
    retrieve: int = 0
    ensemble: Ensemble = ""


class Ranked(NamedTuple):
    """The samples of an answer, best first, their scores, and what the scores are."""

    samples: list[tuple[Part, ...]]
    scores: list[float]
    score: str


Finish = Callable[[list[Sample]], Ranked]  # of the samples of all requests


@dataclass(frozen=True, eq=False)
class _Work:
    """One prompt in progress.

    Attributes:
      found: the documents for its context.
      asked: what is asked of the engine.
      finish: makes the answer of their samples.
    """

    prompt: Prompt
    found: list[Found]
    sampling: Sampling
    asked: list[Asked]
    finish: Finish

    @property
    def requests(self) -> list[Request]:
        """The requests to run."""
        apart = self.prompt.ensemble == "best"
        return [request for asked in self.asked for request in (each_alone(asked) if apart else [asked.request])]


class Model(Run):
    """A run that answers prompts. Every method has the options of `Prompt`: retrieve, documents, samples, seed, ..."""

    def generate(self, text: str, **options: Any) -> Answer:
        """Images of a caption (paper, section 4.2), the one that CLIP likes best first.

        Raises:
          InputError: (as all methods here) an empty prompt, or one that leaves no room for its answer.
        """
        return self.answer(Prompt("draw", text, **options))

    def caption(self, image: Picture, **options: Any) -> Answer:
        """Captions of an image, the one of the lowest perplexity first (paper, section 4.2)."""
        return self.answer(Prompt("caption", image=pixels_of(image), **options))

    def infill(self, image: Picture, mask: Mask, text: str = "", **options: Any) -> Answer:
        """The image with other pixels under the mask (paper, section 5.2); those outside stay as they are."""
        pixels = pixels_of(image)
        return self.answer(Prompt("infill_image", text, pixels, mask_of(mask, pixels), **options))

    def edit(self, image: Picture, mask: Mask, documents: Sequence[Document], text: str = "", **options: Any) -> Answer:
        """The image with what the documents show under the mask (paper, section 5.3)."""
        pixels = pixels_of(image)
        options = {"retrieve": 0, **options}
        return self.answer(Prompt("edit", text, pixels, mask_of(mask, pixels), documents, **options))

    def infill_text(self, text: str, image: Picture | None = None, **options: Any) -> Answer:
        """The text, with every `<mask>` filled in, the one of the lowest perplexity first (paper, section 3.3)."""
        return self.answer(Prompt("infill_text", text, None if image is None else pixels_of(image), **options))

    def resume(self, follow: Sequence[Kind], text: str = "", image: Picture | None = None, **options: Any) -> Answer:
        """What follows a text, an image, or both, or a whole `document`: `follow` names the kinds, in order."""
        pixels = None if image is None else pixels_of(image)
        return self.answer(Prompt("continue", text, pixels, follow=follow, **options))

    def classify(
        self,
        image: Picture,
        labels: Mapping[str, Sequence[Picture]],
        shots: int | None = None,
        scored: classify.Scored = "text",
    ) -> Classified:
        """The probability of each label by k-shot in-context learning (paper, section 5.4).

        Of k runs, each has one demonstration of every label; their probabilities are averaged.

        Args:
          labels: demonstrations of each, as many of one as of another.
          shots: use the first k of them; None is all.
          scored: the label given the image, as in the paper, or the image given the label.

        Raises:
          InputError: fewer than two labels, labels with different numbers of demonstrations, or fewer than k.
        """
        counts = {len(pictures) for pictures in labels.values()}
        if len(counts) > 1:
            raise InputError(
                f"labels have {min(counts)} to {max(counts)} demonstrations; give each as many as the others"
            )
        most = max(counts, default=0)
        shots = most if shots is None else shots
        _check_int("shots", shots)
        if shots > most:
            raise InputError(f"shots={shots} is not among the 0 to {most} demonstrations of each label")
        documents = [
            captioned(label, label, encode_png(pixels_of(pictures[run])))
            for run in range(shots)
            for label, pictures in labels.items()
        ]
        tokens = [each.tokens for each in self.tokenize(documents)]
        runs = [tokens[start : start + len(labels)] for start in range(0, len(tokens), max(1, len(labels)))]
        ids = [self.tokenizer.encode(label) for label in labels]
        codes = self.images.encode([frame(pixels_of(image), self.experiment.framing)])[0]
        asked = classify.request(self.form, codes, ids, runs, scored)
        log_probs = iter(self.scorer.log_probs([part for row in asked.parts for part in row]))
        probs = classify.answer([[next(log_probs) for _ in row] for row in asked.parts])
        order = np.argsort(-probs, kind="stable").tolist()
        return Classified({[*labels][number]: float(probs[number]) for number in order}, asked.notes)

    def score(self, document: Document, segment: int = 0, **options: Any) -> Likelihood:
        """The log probability of each id of a segment, or of a part of it; the options are those of `Passage`."""
        (found,) = self.scores([Passage(document, segment, **options)])
        if isinstance(found, InputError):
            raise found
        return found

    def scores(self, passages: Sequence[Passage]) -> list[Likelihood | InputError]:
        """What `score` has of each passage, all in one batch; for one that can't be scored, the reason."""
        asked: list[tuple[Parts, list[Found]] | InputError] = []
        for passage in passages:
            try:
                asked.append(self._parts(passage))
            except InputError as error:
                asked.append(error)
        parts = [part for each in asked if not isinstance(each, InputError) for part in each[0].parts]
        log_probs = iter(self.scorer.log_probs(parts) if parts else [])
        return [
            each if isinstance(each, InputError) else _likelihood(*each, [next(log_probs) for _ in each[0].parts])
            for each in asked
        ]

    def _parts(self, passage: Passage) -> tuple[Parts, list[Found]]:
        """What is to be scored, and the documents for its context."""
        if passage.ensemble not in ("", "mean"):
            raise InputError(
                f"ensemble={quoted(passage.ensemble)}: a score has no samples to rank; use mean, or '' for none"
            )
        document, segment = framed(passage.document, self.experiment.framing), passage.segment
        if not 0 <= segment < len(document.segments):
            raise InputError(f"segment {segment} is not among the document's {len(document.segments)}; the first is 0")
        own = self._tokenized(document)
        rest = [each for number, each in enumerate(document.segments) if number != segment]
        text = " ".join(each.text for each in rest if isinstance(each, Text))
        image = next((each.pixels() for each in rest if isinstance(each, Image)), None)
        if passage.retrieve and not rest:
            raise InputError(
                f"retrieve={passage.retrieve}, but the document has nothing besides the segment to retrieve by; use 0"
            )
        found = self._given(passage.documents)
        if passage.retrieve:
            found += self.retrieve(text, None if text else image, passage.retrieve)
        context = Context([each.tokens.tokens for each in found], passage.ensemble == "mean")
        asked = score.request(
            self.form, own.tokens, segment, context, passage.start, passage.end, infill=passage.infill
        )
        return asked, found

    def answer(
        self,
        prompt: Prompt,
        on_progress: Callable[[Progress], None] | None = None,
        on_partial: Callable[[list[tuple[Part, ...]]], None] | None = None,
    ) -> Answer:
        """The answer to one prompt.

        Args:
          on_progress: as in `answers`.
          on_partial: called with what there is of each sample, in the order of their numbers: a text so far, and a
            picture that is black below the rows of codes that are drawn. Of the tasks draw, controlled, caption and
            continue; the others give nothing until they are done.
        """
        heard = on_progress if on_partial is None else self._hearing(prompt, on_progress, on_partial)
        ((_, answer),) = self.answers([prompt], heard, None if on_partial is None else PARTIAL_EVERY)
        if isinstance(answer, InputError):
            raise answer
        return answer

    def _hearing(
        self,
        prompt: Prompt,
        on_progress: Callable[[Progress], None] | None,
        on_partial: Callable[[list[tuple[Part, ...]]], None],
    ) -> Callable[[Progress], None]:
        """What is called every few steps for `answer`; of an ensemble's `best`, it shows the samples of one prompt."""
        drawn: dict[int, Sample] = {}
        kinds: dict[str, Sequence[Kind]] = {
            "draw": ["image"],
            "controlled": ["image"],
            "caption": ["text"],
            "continue": prompt.follow,
        }

        def heard(progress: Progress) -> None:
            if on_progress is not None:
                on_progress(progress)
            going_on = progress.partial().get(0, {})
            drawn.update(going_on)
            if going_on and prompt.task in kinds:
                made = [continuation.answer(self.form, kinds[prompt.task], drawn[number]) for number in sorted(drawn)]
                on_partial([tuple(map(self._so_far, segments)) for segments in made])

        return heard

    def _so_far(self, segment: Segment) -> Part:
        """What there is of a text or a picture."""
        if not segment.is_image:
            return self.tokenizer.decode(segment.ids.tolist()).rstrip("\N{REPLACEMENT CHARACTER}")  # half a letter
        tokens, width = self.images.tokens_per_image, max(1, self.form.image_width)
        picture = self.images.decode(np.pad(segment.ids, (0, tokens - len(segment.ids)), "edge")[None])[0].copy()
        picture[len(picture) * (len(segment.ids) // width * width) // tokens :] = 0
        return PIL.Image.fromarray(picture)

    def answers(
        self,
        prompts: Sequence[Prompt],
        on_progress: Callable[[Progress], None] | None = None,
        steps: int | None = None,
    ) -> Iterator[tuple[int, Answer | InputError]]:
        """The answer to each prompt, in their order; for one that can't be answered, the reason.

        Args:
          on_progress: called every few steps of the engine.
          steps: how many these are; None is as many as the engine has.

        Raises:
          InputError: no prompts, or something else among them.
        """
        if not prompts or not all(isinstance(prompt, Prompt) for prompt in prompts):
            raise InputError(
                f"prompts={quoted(prompts)} is no list of Prompts; give at least one, as Prompt('draw', ...)"
            )
        for start in range(0, len(prompts), AT_ONCE):
            chunk = [self._framed(prompt) for prompt in prompts[start : start + AT_ONCE]]
            work = self._prepare(chunk)
            samples = self._samples([each for each in work if isinstance(each, _Work)], on_progress, steps)
            for number, each in enumerate(work, start):
                if isinstance(each, InputError):
                    yield number, each
                else:
                    yield number, _unframed(self._answer(each, next(samples)), prompts[number], each.prompt)

    def _framed(self, prompt: Prompt) -> Prompt:
        """The prompt with its image and mask as the frozen models get them."""
        framing = self.experiment.framing
        if prompt.document is not None:
            return dataclasses.replace(prompt, document=framed(prompt.document, framing))
        if prompt.image is None or framing == "crop":
            return prompt
        image, mask = frame(prompt.image, framing), prompt.mask
        if mask is not None:
            padded = frame(np.repeat(~mask[..., None], 3, axis=2).astype(np.uint8) * 255, "pad-white")
            mask = padded[..., 0] < 255
        return dataclasses.replace(prompt, image=image, mask=mask)

    def _prepare(self, prompts: Sequence[Prompt]) -> list[_Work | InputError]:
        """Retrieves for each prompt, and makes its requests."""
        work: list[_Work | InputError] = []
        for prompt, retrieved in zip(prompts, self._retrieved(prompts), strict=True):
            try:
                work.append(self._work(prompt, self._given(prompt.documents) + retrieved))
            except InputError as error:
                work.append(error)
        return work

    def _given(self, documents: Sequence[Document]) -> list[Found]:
        """Documents that are given by hand.

        Raises:
          InputError: something else, or an image that can't be decoded.
        """
        if not isinstance(documents, Sequence) or not all(isinstance(each, Document) for each in documents):
            raise InputError(f"documents={quoted(documents)} is no list of Documents; give one, as [Document(...)]")
        most = self.experiment.max_text_tokens  # as of all documents in the memory
        return [Found(each, None, self._tokenized(each, most)) for each in documents]

    def _tokenized(self, document: Document, most: int = sys.maxsize) -> TokenizedDocument:
        """One document, with at most this many ids of each text.

        Raises:
          InputError: an image of it can't be decoded.
        """
        try:
            return tokenize([framed(document, self.experiment.framing)], self.tokenizer, self.images, most)[0]
        except ImageError as error:
            raise InputError(
                f"document {quoted(document.key)} has an image that cannot be read: {error}; give a png, jpeg or webp"
            ) from error

    def _retrieved(self, prompts: Sequence[Prompt]) -> list[list[Found]]:
        """The documents that each prompt retrieves."""
        queries = [self._query(prompt) for prompt in prompts]
        asking = [number for number, query in enumerate(queries) if query is not None]
        most = max((prompts[number].retrieve for number in asking), default=0)
        retrieved = dict(zip(asking, self.retrieve_many([queries[n] for n in asking], most), strict=True))  # type: ignore[misc]
        return [retrieved.get(number, [])[: prompt.retrieve] for number, prompt in enumerate(prompts)]

    def _query(self, prompt: Prompt) -> str | Pixels | None:
        """None: nothing is retrieved; as for a document whose image can't be decoded, which is refused later."""
        with contextlib.suppress(ImageError):
            return prompt.query if prompt.retrieve and self.experiment.retrieves else None
        return None

    def _samples(
        self, work: Sequence[_Work], on_progress: Callable[[Progress], None] | None, steps: int | None
    ) -> Iterator[list[Sample]]:
        """The samples of all requests of each prompt."""
        requests = [each.requests for each in work]
        samplings = [each.sampling for each, own in zip(work, requests, strict=True) for _ in own]
        seeds = [each.prompt.seed for each, own in zip(work, requests, strict=True) for _ in own]
        every = [request for own in requests for request in own]
        out = dict(self.engine.run(every, samplings, seeds, on_progress, steps))
        found = (out[number] for number in range(len(out)))
        for own in requests:
            yield [sample for _ in own for sample in next(found)]

    def _answer(self, work: _Work, samples: list[Sample]) -> Answer:
        prompt, asked = work.prompt, work.asked[0]
        ranked = work.finish(samples)
        dropped = set(asked.dropped)
        kept = [found for number, found in enumerate(work.found) if number not in dropped]
        return Answer(
            task=prompt.task,
            prompt={
                "text": (prompt.document or prompt).text,
                **({"follow": list(prompt.follow)} if prompt.follow else {}),
            },
            samples=ranked.samples[: prompt.samples],
            scores=ranked.scores[: prompt.samples],
            score=ranked.score,
            documents=[found.document for found in kept],
            similarities=[found.score for found in kept],
            dropped=[work.found[number].document for number in asked.dropped],
            notes=asked.notes,
            settings={
                "retrieve": prompt.retrieve,
                "ensemble": prompt.ensemble,
                "samples": prompt.samples,
                "seed": prompt.seed,
                "sampling": to_plain(work.sampling),
            },
        )

    # What each task asks, and what it makes of the samples.

    def _work(self, prompt: Prompt, found: list[Found]) -> _Work:
        settings = self.experiment.evaluation
        draws = prompt.task not in ("caption", "infill_text")
        sampling = prompt.sampling or (settings.image_sampling if draws else settings.caption_sampling)
        context = Context([each.tokens.tokens for each in found], prompt.ensemble != "", sampling.without)
        asked, finish = {
            "draw": self._draw,
            "controlled": self._draw,
            "caption": self._caption,
            "infill_image": self._infill_image,
            "edit": self._infill_image,
            "infill_text": self._infill_text,
            "continue": self._continue,
        }[prompt.task](prompt, context)
        return _Work(prompt, found, sampling, asked, finish)

    def _draw(self, prompt: Prompt, context: Context) -> tuple[list[Asked], Finish]:
        form, text = self.form, prompt.text.strip()
        task = controlled if prompt.task == "controlled" else draw
        asked = task.request(form, self.tokenizer.encode(text), context, prompt.samples)

        def finish(samples: list[Sample]) -> Ranked:
            codes = [draw.answer(form, sample) for sample in samples]
            return self._by_clip([*self.images.decode(np.stack(codes))], text, samples)

        return [asked], finish

    def _infill_image(self, prompt: Prompt, context: Context) -> tuple[list[Asked], Finish]:
        form, text = self.form, prompt.text.strip()
        image, mask = _given_image(prompt), _given_mask(prompt)
        square = center_square(image)
        inside = mask[square]
        if not inside.any():
            raise InputError(
                "the mask covers no pixel of the image's middle square, which is all that the model sees; mark pixels "
                "in it"
            )
        codes = self.images.encode([image])[0]
        masked = infill_image.masked_codes(form, scaled_mask(inside, self.images.resolution))
        task = edit if prompt.task == "edit" else infill_image
        asked = task.request(form, codes, masked, context, self.tokenizer.encode(text), prompt.samples)

        def finish(samples: list[Sample]) -> Ranked:
            filled = [infill_image.answer(form, sample, codes, masked) for sample in samples]
            pictures = [image.copy() for _ in filled]
            for picture, drawn in zip(pictures, self.images.decode(np.stack(filled)), strict=True):
                picture[square] = infill_image.plug(image[square], prepare_image(drawn, len(inside)), inside)
            return self._by_clip(pictures, text, samples)

        return [asked], finish

    def _caption(self, prompt: Prompt, context: Context) -> tuple[list[Asked], Finish]:
        form, codes = self.form, self.images.encode([_given_image(prompt)])[0]
        asked = caption.request(form, codes, context, self.experiment.evaluation.max_caption_tokens, prompt.samples)

        def finish(samples: list[Sample]) -> Ranked:
            texts = [self.tokenizer.decode(caption.answer(form, sample).tolist()) for sample in samples]
            return by_log_prob([(text,) for text in texts], samples)

        return [asked], finish

    def _infill_text(self, prompt: Prompt, context: Context) -> tuple[list[Asked], Finish]:
        parts = prompt.text.strip().split(MASK)
        known = [self.tokenizer.encode(part) for part in parts]
        codes = None if prompt.image is None else self.images.encode([prompt.image])[0]
        ends_open = len(parts) == 2 and not parts[1].strip()  # nothing after the mask tells how long it is
        lengths = (self.experiment.evaluation.max_caption_tokens,) if ends_open else MASK_TOKENS
        asked = [
            infill_text.request(self.form, known, [tokens] * (len(parts) - 1), context, codes, prompt.samples)
            for tokens in lengths
        ]

        def finish(samples: list[Sample]) -> Ranked:
            texts = []
            for sample in samples:
                filled = [self.tokenizer.decode(ids.tolist()).strip() for ids in infill_text.answer(sample)]
                texts.append("".join(piece for pair in zip(parts, [*filled, ""], strict=True) for piece in pair))
            return by_log_prob([(text,) for text in texts], samples)

        return asked, finish

    def _continue(self, prompt: Prompt, context: Context) -> tuple[list[Asked], Finish]:
        form, ids = self.form, np.array(self.tokenizer.encode(prompt.text.strip()), np.int32)
        document: Tokens = ((False, ids),) if len(ids) else ()
        if prompt.image is not None:
            document = (*document, (True, self.images.encode([prompt.image])[0]))
        if prompt.document is not None:
            document = self._tokenized(prompt.document).tokens
        most = self.experiment.evaluation.max_caption_tokens
        asked = continuation.request(form, document, prompt.follow, context, most, prompt.samples)

        def finish(samples: list[Sample]) -> Ranked:
            made = [continuation.answer(form, prompt.follow, sample) for sample in samples]
            return by_log_prob([tuple(map(self._part, segments)) for segments in made], samples)

        return [asked], finish

    def _part(self, segment: Segment) -> Part:
        if segment.is_image:
            return PIL.Image.fromarray(self.images.decode(segment.ids[None])[0])
        return self.tokenizer.decode(segment.ids.tolist())

    def _by_clip(self, pictures: list[Pixels], text: str, samples: list[Sample]) -> Ranked:
        """By the cosine of CLIP's vectors of picture and text (paper, section 4.2); without a text, by perplexity."""
        parts: list[tuple[Part, ...]] = [(PIL.Image.fromarray(picture),) for picture in pictures]
        if not text:
            return by_log_prob(parts, samples)
        scores = self.encoder.embed_images(pictures) @ self.encoder.embed_texts([text])[0]
        return _ranked(parts, scores, CLIP_SCORE)


def _likelihood(asked: Parts, found: list[Found], log_probs: list[Float[np.ndarray, " _"]]) -> Likelihood:
    """The score of a passage, of the log probabilities after each prompt of its context."""
    kept = [each for number, each in enumerate(found) if number not in asked.dropped]
    return Likelihood(
        log_probs=score.answer(log_probs),
        documents=[each.document for each in kept],
        similarities=[each.score for each in kept],
        dropped=[found[number].document for number in asked.dropped],
        notes=asked.notes,
    )


def _unframed(answer: Answer, asked: Prompt, prompt: Prompt) -> Answer:
    """An answer with its pictures in the frame of the image that was asked about, if they change that image."""
    if prompt.task not in ("infill_image", "edit") or asked.image is None or prompt.image is None:
        return answer
    height, width, _ = asked.image.shape
    if asked.image.shape == prompt.image.shape or max(height, width) > PADDED_SIDE:  # scaled too: it stays so
        return answer
    rows, columns = framed_place(height, width)
    box = (columns.start, rows.start, columns.stop, rows.stop)
    samples = [tuple(part if isinstance(part, str) else part.crop(box) for part in each) for each in answer.samples]
    return dataclasses.replace(answer, samples=samples)


def by_log_prob(parts: list[tuple[Part, ...]], samples: list[Sample]) -> Ranked:
    """The lowest perplexity first (paper, section 4.2)."""
    return _ranked(parts, np.array([sample.mean_log_prob for sample in samples]), LOG_PROB)


def _ranked(parts: list[tuple[Part, ...]], scores: Float[np.ndarray, " samples"], unit: str) -> Ranked:
    order = np.argsort(-scores, kind="stable").tolist()
    return Ranked([parts[i] for i in order], [float(scores[i]) for i in order], unit)


def pixels_of(picture: Picture) -> Pixels:
    """RGB in 0..255 of a picture, or of a file.

    Raises:
      InputError: the file does not exist or is no image, or pixels of another type or shape.
    """
    if isinstance(picture, PIL.Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    if not isinstance(picture, str | os.PathLike):
        _check_pixels(picture)
        return picture
    path = Path(picture)
    if not path.is_file():
        raise InputError(f"image {path} does not exist; give a png, jpeg or webp file")
    try:
        return decode_image(path.read_bytes())
    except ImageError as error:
        raise InputError(f"image {path} cannot be read: {error}") from error


def _check_pixels(pixels: object) -> None:
    """Raises InputError unless these are RGB in 0..255 of at least one pixel."""
    what = quoted(pixels)
    if isinstance(pixels, np.ndarray):
        if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size:
            return
        what = f"{pixels.dtype} of shape {pixels.shape}"
    raise InputError(f"the image is {what}; give uint8 of shape (height, width, 3) in 0..255, or a file")


def _check_int(name: str, value: object, least: int = 0) -> None:
    """Raises InputError unless this is an int of 64 bits from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise InputError(f"{name}={quoted(value)} is no int from {least} to 2**63 - 1; give one")


def mask_of(mask: Mask, image: Pixels) -> PixelMask:
    """True at the pixels to draw: those that are white in a mask, or inside a rectangle.

    Raises:
      InputError: something else, or a rectangle that is empty or not inside the image.
    """
    height, width, _ = image.shape
    if isinstance(mask, np.ndarray):
        return mask.astype(bool)
    if isinstance(mask, PIL.Image.Image):
        return np.asarray(mask.convert("L")) > 127
    try:
        left, top, right, bottom = map(operator.index, mask)
    except (TypeError, ValueError) as error:
        raise InputError(f"the mask is {quoted(mask)}; give an array, a picture, or left,top,right,bottom") from error
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"the rectangle {left},{top},{right},{bottom} is empty or not inside the image of {width} x {height} "
            "pixels; give left,top,right,bottom"
        )
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    return inside


def scaled_mask(mask: Bool[np.ndarray, "side side"], size: int) -> Bool[np.ndarray, "size size"]:
    """A square mask at another size: True where a pixel has any part of a masked one in it."""
    if len(mask) == size:
        return mask
    grey = PIL.Image.fromarray(mask.astype(np.float32))
    return np.asarray(grey.resize((size, size), PIL.Image.Resampling.BOX)) > 0


def _given_image(prompt: Prompt) -> Pixels:
    if prompt.image is None:
        raise InputError(f"the task {prompt.task} needs an image; give one")
    return prompt.image


def _given_mask(prompt: Prompt) -> PixelMask:
    if prompt.mask is None:
        raise InputError(f"the task {prompt.task} needs a mask of the pixels to draw; give one")
    return prompt.mask
