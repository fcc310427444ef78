"""`rac3 plan`: what the offline stages of a config take, by arithmetic, before anything runs and without a device.

FLOPs of the encoders are those that XLA counts in their programs; those of an index are what its retriever `needs`.
A time is FLOPs over the reached share of the cluster's peak, or what the host's work takes (decoding pictures, reading
the memory again) where that takes longer. Units: documents, bytes, FLOPs, seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from rac3 import recipes
from rac3.clip.checkpoint import towers
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.model import CLIPConfig
from rac3.config import InputError
from rac3.documents.world import World
from rac3.experiment import Experiment, Split
from rac3.plan.table import aligned, amount, duration
from rac3.retrieval.retriever import Planned
from rac3.retrieval.selection import HELD_BYTES
from rac3.run import PARTS, Run
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.model import VQGAN

TEXT_TOKENS = 32  # of a caption, on average: LAION's have 20 to 30
RECORD_BYTES = 730  # of a document besides its picture and ids: key, caption, img2dataset's metadata, columns
IDS_DTYPE_LIMIT = 65_536  # ids below it take two bytes
READ_BYTES = 2e9  # per second and host, from disks or the network
VECTOR_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Line:
    """What a stage takes; None where it is not known. Memory is of one host, and of one GPU."""

    stage: str
    flops: float | None
    seconds: float | None
    host_bytes: float = 0.0
    gpu_bytes: float = 0.0
    disk_bytes: float = 0.0
    limit: str = ""  # what the time goes into


def plan(run: Run) -> str:
    """The plan, as a table for a terminal.

    Raises:
      InputError: the number of documents is not known; or, after the table is printed, what does not fit and the fix.
    """
    experiment, sizes = run.experiment, _sizes(run)
    lines = [_ingest(experiment, sizes), _embed(experiment, sizes), *_index_and_search(experiment, sizes)]
    table = _table(experiment, sizes, lines)
    for line in lines:
        if problem := _problem(experiment, line):
            print(table)
            raise InputError(problem)
    return table


def _sizes(run: Run) -> dict[Split, int]:
    """Documents of each part of the memory, the training documents first."""
    experiment, folder = run.experiment, run.workdir.path
    told = {"train": experiment.cluster.documents, "memory": experiment.cluster.memory_documents, "held out": 0}
    sizes: dict[Split, int] = {}
    for split, source in experiment.data.sources().items():
        role = experiment.data.role(split)
        if role == "held out":
            continue
        if told[role]:
            sizes[split] = told[role]
        elif isinstance(source, World):
            sizes[split] = sum(1 for shard in source.shards(folder) for _ in source.read(folder, shard))
        elif (count := _ingested(run, split)) is not None:
            sizes[split] = count
        else:
            option = "documents" if split == "train" else "memory-documents"
            raise InputError(f"how many documents {split} has is known once it is ingested; say --cluster.{option} N")
    return sizes


def _ingested(run: Run, split: Split) -> int | None:
    try:
        artifact = run.workdir.find(run.recipe(recipes.documents, split))
    except InputError:  # a checkpoint or the data is not here: a plan may come before both
        return None
    return None if artifact is None else int(artifact.manifest["counts"]["documents"])


def _ingest(experiment: Experiment, sizes: Mapping[Split, int]) -> Line:
    vqgan, documents = experiment.vqgan, sum(sizes.values())
    flops = None
    if isinstance(vqgan, FrozenVQGAN):
        config = vqgan.model
        pixels = jax.ShapeDtypeStruct((1, config.resolution, config.resolution, config.in_channels), jnp.float32)
        flops = documents * _flops(VQGAN(config, vqgan.dtype), "encode", pixels)
    codebook_size, tokens_per_image = codes(experiment)
    id_bytes = 2 if max(codebook_size, experiment.text.vocab_size) <= IDS_DTYPE_LIMIT else 4
    record = 1e3 * experiment.cluster.image_kilobytes + RECORD_BYTES + id_bytes * (tokens_per_image + TEXT_TOKENS)
    return _encoding(experiment, "ingest", flops, documents, documents * record)


def codes(experiment: Experiment) -> tuple[int, int]:
    """How many codes images are made of, and how many an image has."""
    vqgan = experiment.vqgan
    if isinstance(vqgan, FrozenVQGAN):
        return vqgan.model.n_embed, vqgan.model.tokens_per_image
    return vqgan.codebook_size, vqgan.tokens_per_image


def _embed(experiment: Experiment, sizes: Mapping[Split, int]) -> Line:
    """Training documents go through CLIP as documents, and for each view as queries with dropout."""
    clip, documents, queries = experiment.clip, sum(sizes.values()), experiment.num_views * sizes["train"]
    flops = None
    if isinstance(clip, FrozenCLIP):
        config = clip.model
        model, channels = towers(config, clip.dtype), 3
        if isinstance(config, CLIPConfig):
            channels = config.vision_config.num_channels
        pixels = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, channels), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, min(TEXT_TOKENS, config.text_config.max_position_embeddings)), jnp.int32)
        both = ids, jax.ShapeDtypeStruct(ids.shape, bool), pixels
        each = _flops(model, "encode_image", pixels, *both) + _flops(model, "encode_text", ids, *both)
        flops = each * (documents + queries)
    vectors = documents + len(PARTS) * queries
    disk = float(vectors * _width(experiment) * VECTOR_BYTES[experiment.embedding_dtype])
    return _encoding(experiment, "embed", flops, documents, disk)


def _width(experiment: Experiment) -> int:
    """Of the encoder's vectors."""
    clip = experiment.clip
    return clip.model.projection_dim if isinstance(clip, FrozenCLIP) else clip.width


def _encoding(experiment: Experiment, stage: str, flops: float | None, pictures: int, disk_bytes: float) -> Line:
    """A stage that decodes pictures and runs a frozen model on them at the same time."""
    cluster = experiment.cluster
    if flops is None:
        return Line(stage, None, None, disk_bytes=disk_bytes, limit="not known of this encoder")
    limits = {
        "the model": flops / cluster.device_flops,
        "decoding": pictures / cluster.decoded_per_second,
        "disks": disk_bytes / (READ_BYTES * cluster.hosts),
    }
    limit = max(limits, key=lambda name: limits[name])
    return Line(stage, flops, limits[limit], disk_bytes=disk_bytes, limit=limit)


def _index_and_search(experiment: Experiment, sizes: Mapping[Split, int]) -> list[Line]:
    """The index of each part of the memory, and the search of the training queries in the training part."""
    retriever, cluster, width = experiment.retriever, experiment.cluster, _width(experiment)
    if not experiment.retrieves:
        return []
    if not isinstance(retriever, Planned):
        return [Line(stage, None, None, limit="not known of this retriever") for stage in ("index", "retrieve")]
    parts = [retriever.needs(count, width) for count in sizes.values()]
    train = retriever.needs(sizes["train"], width)
    queries = len(PARTS) * experiment.num_views * sizes["train"]
    rate = cluster.device_flops if train.on_devices else cluster.cpu_flops
    build_flops = sum(needs.build_flops for needs in parts)
    searching = queries * train.query_flops
    neighbors = 12.0 * queries * experiment.selection.depth  # an id of 8 bytes and a score of 4
    held = min(HELD_BYTES, 4.0 * width * sum(sizes.values()))  # by the selection
    return [
        Line(
            "index",
            build_flops,
            build_flops / (cluster.cpu_flops / cluster.hosts),
            host_bytes=max(needs.build_bytes for needs in parts),
            disk_bytes=sum(needs.disk_bytes for needs in parts),
            limit="one host's cores" if build_flops else "",
        ),
        Line(
            "retrieve",
            searching,
            searching / rate,
            host_bytes=sum(needs.search_bytes for needs in parts) + held,
            gpu_bytes=max(needs.device_bytes for needs in parts) if cluster.gpus else 0.0,
            disk_bytes=neighbors,
            limit="GPUs" if train.on_devices and cluster.gpus else "cores",
        ),
    ]


def _problem(experiment: Experiment, line: Line) -> str:
    """What does not fit, in one line with the fix; "" if all does."""
    cluster, name = experiment.cluster, type(experiment.retriever).__name__
    if line.host_bytes > cluster.host_bytes:
        return (
            f"{line.stage}: {name} takes {amount(line.host_bytes)} of host memory, a host has "
            f"{amount(cluster.host_bytes)}; use retriever:exact, which streams the memory, smaller vectors "
            "(--retriever.reorder-dtype int8 or none of scann), or a host with more"
        )
    if cluster.gpus and line.gpu_bytes > cluster.gpu_bytes:
        return (
            f"{line.stage}: {name} takes {amount(line.gpu_bytes)} of each GPU's memory, which is "
            f"{amount(cluster.gpu_bytes)}; lower --retriever.block-rows"
        )
    return ""


@lru_cache(maxsize=8)
def _flops(model: Any, method: str, x: jax.ShapeDtypeStruct, *inputs: Any) -> float:
    """Of one call of a Flax module's method on `x`, as XLA counts them in the program before it is compiled.

    Args:
      inputs: what `__call__` takes, which makes the parameters, if that is more than `x`.
    """
    params = jax.eval_shape(model.init, jax.random.key(0), *(inputs or (x,)))
    cost: Any = jax.jit(lambda params, x: model.apply(params, x, method=method)).lower(params, x).cost_analysis()
    return float(cost["flops"])


def _table(experiment: Experiment, sizes: Mapping[Split, int], lines: list[Line]) -> str:
    cluster = experiment.cluster
    counted = " + ".join(f"{count:,} {split}" for split, count in sizes.items())
    machine = f"{cluster.hosts} x {cluster.host_cores} cores, {amount(cluster.host_bytes)}"
    if cluster.gpus:
        machine += (
            f", {cluster.gpus} x {cluster.gpu} of {amount(cluster.gpu_bytes)} and {cluster.gpu_flops / 1e12:g} TFLOP/s"
        )
    head = ["stage", "FLOP", "time", "limited by", "host memory", "GPU memory", "disk"]
    rows = [
        [
            line.stage,
            "-" if line.flops is None else f"{line.flops:.2g}",
            "-" if line.seconds is None else duration(line.seconds),
            line.limit,
            amount(line.host_bytes),
            amount(line.gpu_bytes),
            amount(line.disk_bytes),
        ]
        for line in lines
    ]
    rows.append(["all", "", duration(sum(line.seconds or 0 for line in lines)), "", "", "", ""])
    rows[-1][-1] = amount(sum(line.disk_bytes for line in lines))
    title = f"{experiment.name}: {counted} documents on {machine}; {cluster.utilization:.0%} of the peaks are reached"
    return "\n".join([title, "", *aligned(head, rows)])
