"""The engine's oracle: for every id, the whole sequence again, one sample at a time, with no cache."""

import hashlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rac3.generation.request import Draw, Request, Sample
from rac3.generation.sampling import Sampling, sample
from rac3.generation.step import Step
from rac3.model.transformer import Transformer
from rac3.tokens.vocabulary import Vocabulary


class PlainEngine:
    def __init__(
        self, model: Transformer, params, vocabulary: Vocabulary, image_width: int = 0, word_starts=None
    ) -> None:
        self.model, self.params, self.vocabulary, self.image_width = model, params, vocabulary, image_width
        self.word_starts = word_starts
        self._logits, self._sample = jax.jit(self._last), jax.jit(sample)

    def run(
        self, requests: Sequence[Request], samplings: Sequence[Sampling], seeds: Sequence[int]
    ) -> Iterator[tuple[int, list[Sample]]]:
        for place, (request, sampling, seed) in enumerate(zip(requests, samplings, seeds, strict=True)):
            digest = hashlib.blake2b(request.prompts[0].ids.astype("<i4").tobytes(), digest_size=4).digest()
            of_prompt = jax.random.fold_in(jax.random.key(seed), np.uint32(int.from_bytes(digest, "little")))
            numbers = range(request.first, request.first + request.samples)
            yield place, [self._one(request, sampling, jax.random.fold_in(of_prompt, each)) for each in numbers]

    def _one(self, request: Request, sampling: Sampling, key: jax.Array) -> Sample:
        ids: list[int] = []
        offsets: list[int] = []
        runs, log_probs, place = [], [], 0  # the place in the grammar's tables
        for run in request.grammar:
            if not isinstance(run, Draw):
                ids, offsets, place = [*ids, *run.ids], [*offsets, *run.offsets], place + len(run.ids)
                continue
            allowed = np.array(run.allowed)
            if run.stop >= 0:
                allowed[run.stop] = True
            drawn, scores = [], []
            for index in range(run.count):
                drawn_id, score = self._draw(
                    request, sampling, ids, offsets, run.offset + index, allowed, jax.random.fold_in(key, place + index)
                )
                scores.append(score)
                ids.append(drawn_id)
                offsets.append(0 if drawn_id == run.stop else run.offset + index)
                if drawn_id == run.stop:
                    break
                drawn.append(drawn_id)
            else:
                if run.stop >= 0:
                    ids, offsets = [*ids, run.stop], [*offsets, 0]
            place += run.count + (run.stop >= 0)
            runs.append(np.array(drawn, np.int32))
            log_probs.append(np.array(scores, np.float32))
        return Sample(runs, log_probs)

    def _draw(self, request, sampling, ids, offsets, offset, allowed, key) -> tuple[int, float]:
        width = self.model.max_positions
        tokens, places = np.zeros((2, len(request.prompts), width), np.int32)
        lengths = np.array([len(prompt.ids) for prompt in request.prompts])
        for row, prompt in enumerate(request.prompts):
            length = len(prompt.ids) + len(ids)
            tokens[row, :length], places[row, :length] = [*prompt.ids, *ids], [*prompt.offsets, *offsets]
        logits = self._logits(self.params, tokens, places, lengths + len(ids))
        known = np.arange(width) < lengths[:, None]
        drawn, drawn_offsets = np.zeros((2, 1, 1, width), np.int32)
        drawn[..., : len(ids)], drawn_offsets[..., : len(ids)] = ids, offsets
        count = [np.full((1, 1), each, np.int32) for each in (len(ids), offset)]
        prompts = [np.where(known, each, 0)[None] for each in (tokens, places)]
        step = Step(
            *prompts,
            lengths[None],
            drawn,
            drawn_offsets,
            *count,
            self.word_starts,
            vocabulary=self.vocabulary,
            image_width=self.image_width,
        )
        step = jax.tree.map(jnp.asarray, step)
        drawn_ids, scores = self._sample(sampling, logits[None, :, None], allowed[None, None], step, key[None, None])
        return int(drawn_ids[0, 0]), float(scores[0, 0])

    def _last(self, params, tokens, offsets, lengths):
        """Logits after the last of `lengths` ids of each row."""
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = (places < lengths[:, None]).astype(jnp.int32)
        hidden = self.model.apply(params, tokens, places, offsets, segments)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.model.apply(params, last, method="logits")
