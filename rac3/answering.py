"""A trained model that answers prompts: every task of the paper, with retrieved or given documents.

model = rac3.load("runs/quickstart")
model.generate("a red fox", retrieve=2, samples=4, seed=1).images[0]
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float

from rac3.config import InputError, quoted, to_plain
from rac3.documents.document import (
    PADDED_SIDE,
    Document,
    Image,
    ImageError,
    Text,
    captioned,
    center_square,
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
from rac3.prompt import (
    MASK,
    Mask,
    Passage,
    Picture,
    PixelMask,
    Pixels,
    Prompt,
    checked_int,
    mask_of,
    pixels_of,
    scaled_mask,
)
from rac3.ranking import Ranked, by_clip, by_likelihood, by_log_prob
from rac3.run import Found, Run, tokenize
from rac3.tokens.html import Segment

MASK_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)  # ids that a masked part of a text may have
PARTIAL_EVERY = 4  # steps of the engine between two looks at what it draws
AT_ONCE = 64  # prompts that are retrieved for and decoded together


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
          scored: the label given the image (text), as in the paper, or the image given the label (image); or that
            after the demonstration of this label alone (apart), which small models are better at.

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
        shots = checked_int("shots", shots)
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
        return [Found(each, None, self._tokenized(framed(each, self.experiment.framing), most)) for each in documents]

    def _tokenized(self, document: Document, most: int = sys.maxsize) -> TokenizedDocument:
        """One document, with at most this many ids of each text.

        Raises:
          InputError: an image of it can't be decoded.
        """
        try:
            return tokenize([document], self.tokenizer, self.images, most)[0]
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
            notes=[*asked.notes, *ranked.notes],
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
            return by_clip(self.encoder, [*self.images.decode(np.stack(codes))], text, samples)

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
            return by_clip(self.encoder, pictures, text, samples)

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
        asked: list[Asked] = []
        for tokens in lengths:
            assumed = [tokens] * (len(parts) - 1)
            try:
                asked.append(infill_text.request(self.form, known, assumed, context, codes, prompt.samples))
            except InputError:
                if not asked:
                    raise
                break  # a shorter one fits

        def finish(samples: list[Sample]) -> Ranked:
            texts = []
            for sample in samples:
                filled = [self.tokenizer.decode(ids.tolist()).strip() for ids in infill_text.answer(sample)]
                texts.append("".join(piece for pair in zip(parts, [*filled, ""], strict=True) for piece in pair))
            if not any(part.strip() for part in parts[1:]):  # no text follows that a filled part may fit badly
                return by_log_prob([(text,) for text in texts], samples)
            apart = prompt.ensemble == "best"  # then each request was one for each prompt of the ensemble
            of_prompt = [number // prompt.samples for number in range(len(texts))] if apart else None
            encode = self.tokenizer.encode
            return by_likelihood(self.form, self.scorer, encode, texts, codes, context, of_prompt)

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
            ended = sum(len(segments) < len(prompt.follow) for segments in made)
            note = f"{ended} of {len(made)} samples lack a text that was to follow: the model wrote none there"
            ranked = by_log_prob([tuple(map(self._part, segments)) for segments in made], samples)
            return ranked._replace(notes=(note,)) if ended else ranked

        return [asked], finish

    def _part(self, segment: Segment) -> Part:
        if segment.is_image:
            return PIL.Image.fromarray(self.images.decode(segment.ids[None])[0])
        return self.tokenizer.decode(segment.ids.tolist())


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


def _given_image(prompt: Prompt) -> Pixels:
    if prompt.image is None:
        raise InputError(f"the task {prompt.task} needs an image; give one")
    return prompt.image


def _given_mask(prompt: Prompt) -> PixelMask:
    if prompt.mask is None:
        raise InputError(f"the task {prompt.task} needs a mask of the pixels to draw; give one")
    return prompt.mask
