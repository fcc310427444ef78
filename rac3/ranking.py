"""Which of several samples for a prompt is best: by CLIP, by perplexity, or by how probable a text is as a whole."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Float, Int

from rac3.clip.encoder import Encoder
from rac3.config import InputError
from rac3.documents.store import Tokens
from rac3.generation.answers import Part
from rac3.generation.prompts import Context, Form
from rac3.generation.request import Sample
from rac3.generation.tasks import score
from rac3.generation.tasks.score import Parts, Scorer
from rac3.prompt import Pixels

CLIP_SCORE, LOG_PROB, LOG_PROB_WHOLE = "CLIP score", "log p per id", "log p of the text"


class Ranked(NamedTuple):
    """The samples of an answer, best first, their scores, what the scores are, and what else to tell the user."""

    samples: list[tuple[Part, ...]]
    scores: list[float]
    score: str
    notes: tuple[str, ...] = ()


def by_clip(encoder: Encoder, pictures: list[Pixels], text: str, samples: list[Sample]) -> Ranked:
    """By the cosine of CLIP's vectors of picture and text (paper, section 4.2); without a text, by perplexity."""
    parts: list[tuple[Part, ...]] = [(PIL.Image.fromarray(picture),) for picture in pictures]
    if not text:
        return by_log_prob(parts, samples)
    return _ranked(parts, encoder.embed_images(pictures) @ encoder.embed_texts([text])[0], CLIP_SCORE)


def by_log_prob(parts: list[tuple[Part, ...]], samples: list[Sample]) -> Ranked:
    """The lowest perplexity first (paper, section 4.2)."""
    return _ranked(parts, np.array([sample.mean_log_prob for sample in samples]), LOG_PROB)


def by_likelihood(
    form: Form,
    scorer: Scorer,
    encode: Callable[[str], Sequence[int]],
    texts: list[str],
    codes: Int[np.ndarray, " tokens"] | None,
    context: Context,
    of_prompt: Sequence[int] | None = None,
) -> Ranked:
    """The text that is most probable as a whole first, given its image and the documents that fit next to each text.

    What fills a gap was drawn without regard to how well the text goes on after it, and for another number of ids in
    each request, so its own probability does not tell which fits. Texts that are too long as a whole are left out.

    Args:
      encode: the text tokenizer's.
      codes: of the image of which these are alt texts.
      of_prompt: which prompt of the context each text is judged by, in turn; None averages over all of them.
    """
    of_image: Tokens = () if codes is None else ((True, codes),)
    whole = {text: np.array(encode(text), np.int32) for text in texts}
    given, asked = Context(context.documents, context.ensemble), dict[str, Parts]()
    for text in sorted(whole, key=lambda text: -len(whole[text])):
        with contextlib.suppress(InputError):  # it is too long
            parts = score.request(form, ((False, whole[text]), *of_image), 0, given, infill=codes is not None)
            asked[text] = parts
            given = replace(given, documents=[d for n, d in enumerate(given.documents) if n not in parts.dropped])
    log_probs = iter(scorer.log_probs([part for each in asked.values() for part in each.parts]) if asked else [])
    found = {text: [next(log_probs) for _ in each.parts] for text, each in asked.items()}
    totals, kept = [], [number for number, text in enumerate(texts) if text in found]
    for number in kept:
        each = found[texts[number]]
        own = each if of_prompt is None else [each[of_prompt[number] % len(each)]]
        totals.append(score.answer(own).sum())
    lost = len(texts) - len(kept)
    notes = (f"{lost} of {len(texts)} texts are too long once they are filled in, and were left out",) if lost else ()
    return _ranked([(texts[number],) for number in kept], np.array(totals), LOG_PROB_WHOLE)._replace(notes=notes)


def _ranked(parts: list[tuple[Part, ...]], scores: Float[np.ndarray, " samples"], unit: str) -> Ranked:
    order = np.argsort(-scores, kind="stable").tolist()
    return Ranked([parts[i] for i in order], [float(scores[i]) for i in order], unit)
