"""Speculative Jacobi decoding of images: ids per pass of the model, and what a pass of several ids costs.

    rac3 quickstart
    python benchmarks/jacobi.py runs/quickstart [--windows 2 4 8 16] [--temperatures 1.0 0.2] [--json FILE]

`mean`: ids per pass. Images of the captions of the tuning split, with what each retrieves, are drawn by the model.
Each pass computes the whole sequence, so that passes are counted, and no time is measured.
`pass_cost`: on one core, the time of a pass over a window of ids through that of a pass over one id, for the model of
`benchmarks/decode.py` (8 layers of width 512, a prompt of 512 ids). A pass over a window is timed as a step of as many
samples of one prompt, which has the same products.
`gain`: ids per pass through the cost of a pass. Below 1, drawing id by id is faster.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from measure import interleaved, record

PACKAGES = ("rac3", "jax", "jaxlib", "flax", "numpy")
# Ids -> for each place, the distribution of its id, given those before it.
Forward = Callable[[Int[np.ndarray, "rows places"]], Float[np.ndarray, "rows places ids"]]


class Drawn(NamedTuple):
    """Rows of ids, and the passes that each took."""

    ids: Int[np.ndarray, "rows places"]
    passes: Int[np.ndarray, " rows"]


def jacobi(forward: Forward, rows: int, places: int, ids: int, window: int, rng: np.random.Generator) -> Drawn:
    """Speculative Jacobi decoding (arXiv 2410.01699): exact samples, several ids to a pass where guesses are good.

    A guess is drawn for each place of a window from a distribution q, at first uniform. A pass gives the distribution p
    of each place, given the guesses before it. From the first place on, a guess x is accepted with probability
    min(1, p(x) / q(x)); the first that is not is drawn from the positive part of p - q. Places after it have new
    guesses, drawn from their p, which is their q in the next pass.
    """
    drawn, proposed = rng.integers(ids, size=(rows, places)), np.full((rows, places, ids), 1 / ids)
    done, passes = np.zeros(rows, int), np.zeros(rows, int)
    while (done < places).any():
        found = forward(drawn)
        for row in np.flatnonzero(done < places):
            passes[row] += 1
            end, p, q, x = min(done[row] + window, places), found[row], proposed[row], drawn[row]
            while done[row] < end:
                place = done[row]
                done[row] += 1
                if rng.random() * q[place, x[place]] >= p[place, x[place]]:
                    rest = np.maximum(p[place] - q[place], 0)
                    x[place] = rng.choice(ids, p=rest / rest.sum())
                    break
            for place in range(done[row], end):
                x[place] = rng.choice(ids, p=p[place] / p[place].sum())
                q[place] = p[place]
    return Drawn(drawn, passes)


def ids_per_pass(folder: Path, windows: list[int], temperatures: list[float], prompts: int) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    import rac3
    from rac3.documents.document import Text
    from rac3.generation.prompts import Context
    from rac3.generation.tasks import draw
    from rac3.held_out import held_out, retrieved, segment_ids

    run = rac3.load(folder)
    model, params, form, vocabulary = run.model, run.params, run.form, run.vocabulary
    places, first = form.tokens_per_image, vocabulary.image_start
    starts = []
    for item, neighbors in list(zip(*held_out(run, "tuning"), strict=True))[:prompts]:
        text = segment_ids(item, Text)
        assert text is not None
        documents = [each.tokens for each in retrieved(run, neighbors[0], form.max_documents)]
        starts.append(draw.request(form, text, Context(documents)).request.prompts[0])
    rows, lengths = np.arange(len(starts))[:, None], np.array([len(each.ids) for each in starts])
    at = lengths[:, None] + np.arange(places)
    tokens, offsets, segments = (np.zeros((len(starts), at.max() + 1), np.int32) for _ in range(3))
    for row, each in enumerate(starts):
        tokens[row, : lengths[row]], offsets[row, : lengths[row]] = each
        segments[row, : lengths[row] + places] = 1
    offsets[rows, at] = 1 + np.arange(places)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    @jax.jit
    def distributions(tokens: Any, temperature: Any) -> Any:
        hidden = model.apply(params, tokens, positions, offsets, segments)
        logits = model.apply(params, hidden[rows, at - 1], method="logits")
        return jax.nn.softmax(logits[..., first : first + run.images.codebook_size] / temperature)

    def forward(temperature: float, ids: Int[np.ndarray, "rows places"]) -> Float[np.ndarray, "rows places ids"]:
        tokens[rows, at] = first + ids
        return np.asarray(distributions(jnp.asarray(tokens), temperature), np.float64)

    found = []
    for temperature in temperatures:
        for window in windows:
            rng = np.random.default_rng(0)
            result = jacobi(partial(forward, temperature), len(starts), places, run.images.codebook_size, window, rng)
            speed = places / result.passes
            found.append(
                {
                    "temperature": temperature,
                    "window": window,
                    "mean": round(places * len(starts) / result.passes.sum(), 2),
                    "slowest image": round(float(speed.min()), 2),
                    "fastest image": round(float(speed.max()), 2),
                }
            )
    return found


def pass_cost(windows: list[int], rounds: int) -> dict[int, float]:
    from decode import CPU, our_engine

    from rac3.generation.request import Draw, Request
    from rac3.generation.sampling import Sampling
    from rac3.tokens.html import Sequenced

    # One for each window: an engine answers a few samples more in two rounds of a program that it has.
    engines = {n: our_engine(CPU, n, "float32")[0] for n in (1, *windows)}
    prompt = np.random.default_rng(0).integers(8, 4096, CPU["prompt"]).astype(np.int32)
    every = np.ones(engines[1].model.vocab_size, bool)

    def call(samples: int, new: int) -> None:
        request = Request([Sequenced(prompt, np.zeros_like(prompt))], [Draw(every, new)], samples)
        list(engines[samples].run([request], [Sampling(temperature=0.0)], [0]))

    short, long = 8, 64  # ids; what both have in common cancels out
    calls = {(n, new): partial(call, n, new) for n in (1, *windows) for new in (short, long)}
    times = interleaved(calls, rounds)  # type: ignore[arg-type]
    step = {
        n: float(np.median(np.subtract(times[n, long], times[n, short])))  # type: ignore[index]
        for n in (1, *windows)
    }
    return {n: round(step[n] / step[1], 2) for n in windows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished workdir")
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.2])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = ids_per_pass(options.run, options.windows, options.temperatures, options.prompts)
    cost = pass_cost(options.windows, options.rounds)
    for row in rows:
        row |= {"pass_cost": cost[row["window"]], "gain": round(row["mean"] / cost[row["window"]], 2)}
    print(json.dumps(rows, indent=2))
    if options.json:
        command = " ".join(["python benchmarks/jacobi.py", *sys.argv[1:]])
        options.json.write_text(record(command, PACKAGES, {"ids_per_pass": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
