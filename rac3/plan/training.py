"""`rac3 plan`: what training takes on each device, by arithmetic: memory, FLOPs, what crosses links, and time.

Nothing is run or compiled. The bytes of the state are those of the real one, by its shapes and shardings; activations
are counted by the rules of `Kept`, which the tests compare with what JAX keeps for the backward pass. `c` below is the
size of a number in the model's dtype.

Times are rooflines. Products run at the reached share of the peak. What crosses the `tensor` axis waits for products,
and they for it. What crosses `fsdp` and `data` moves while products run, and counts where it takes longer than they do.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rac3.batches.packing import PackedBatch
from rac3.config import InputError
from rac3.devices.mesh import AXES
from rac3.experiment import Experiment
from rac3.model.cudnn import slot_sizes
from rac3.model.packed import AttentionName
from rac3.model.transformer import Transformer
from rac3.plan.offline import TEXT_TOKENS, codes
from rac3.plan.table import aligned, amount, duration
from rac3.run import Run, initializer
from rac3.tokens.vocabulary import Vocabulary
from rac3.training.flops import step_flops
from rac3.training.state import TrainState, first_state

Remat = Literal["none", "dots", "attention", "full"]
USABLE = 0.9  # of a GPU's memory; the rest is the CUDA context's, the kernels' and the communicators'
MARKUP_TOKENS = 5  # of a document: <eod>, and the markup of one picture with its text
F32 = 4
PAPER_GPUS, PAPER_DAYS = 256, 5  # A100s (paper, section 4.1)


@dataclass(frozen=True)
class Setting:
    """What a person may choose without changing what is learned."""

    data: int
    fsdp: int
    tensor: int
    microbatches: int
    remat: Remat

    def __str__(self) -> str:
        return f"{self.data}/{self.fsdp}/{self.tensor}, {self.microbatches} microbatches, remat {self.remat}"

    @property
    def options(self) -> str:
        """On the command line."""
        return (
            f"--mesh.data {self.data} --mesh.fsdp {self.fsdp} --mesh.tensor {self.tensor} "
            f"--training.microbatches {self.microbatches} --model.remat {self.remat}"
        )


@dataclass(frozen=True)
class Collective:
    """One kind of message of a step.

    Attributes:
      kind: as XLA names it.
      axes: of the mesh, that it crosses.
      size: bytes of the whole buffer on a device: what is gathered, or what is reduced.
      count: per step.
    """

    what: str
    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    axes: tuple[str, ...]
    size: float
    count: int

    def sent(self, setting: Setting) -> float:
        """Bytes that each device sends per step, around a ring."""
        devices = math.prod(getattr(setting, axis) for axis in self.axes)
        return (2 if self.kind == "all-reduce" else 1) * self.size * (devices - 1) / devices * self.count


@dataclass(frozen=True)
class Estimate:
    """What a setting takes: bytes per device by part, executed FLOPs of all devices, and seconds of a step."""

    setting: Setting
    memory: dict[str, float]
    flops: float
    collectives: list[Collective]
    compute_seconds: float
    tensor_seconds: float
    other_seconds: float  # of messages that move while products run

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def sent(self) -> float:
        """Bytes that each device sends per step."""
        return sum(each.sent(self.setting) for each in self.collectives)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute_seconds + self.tensor_seconds + max(0.0, self.other_seconds - self.compute_seconds)


def planned_model(experiment: Experiment, attention: AttentionName = "plain") -> Transformer:
    """The model of an experiment by its config alone; the plain form of attention is tried on no device."""
    batches, (codebook, per_image) = experiment.batches, codes(experiment)
    vocabulary = Vocabulary(experiment.text.vocab_size, codebook)
    longest = max(per_image, experiment.max_text_tokens)
    config = replace(experiment.model, attention=attention)
    return config.build(vocabulary.padded_size, batches.context_length, longest, batches.max_groups)


@dataclass(frozen=True)
class Kept:
    """Bytes that a layer keeps for its backward pass, per token.

    Attributes:
      stream: of the residual stream and the norms, which sequence parallelism shards.
      split: of heads and MLP, which tensor parallelism shards.
    """

    stream: float
    split: float


class TrainingPlan:
    """The arithmetic of an experiment on `devices` devices (default: those of its cluster)."""

    def __init__(self, experiment: Experiment, devices: int | None = None) -> None:
        self.experiment, self.cluster = experiment, experiment.cluster
        self.devices = devices or self.cluster.devices
        self.model = planned_model(experiment)
        self.state = jax.eval_shape(
            functools.partial(
                first_state, initializer(self.model), experiment.optimizer.build(experiment.training.steps)
            ),
            jax.random.key(0),
        )
        self._state_bytes: dict[tuple[int, int, int], tuple[int, int]] = {}
        self.row, self.rows = experiment.batches.row, experiment.batches.rows
        self.itemsize = float(jnp.dtype(experiment.model.dtype).itemsize)  # of a number in the model
        self.layer_parameters = sum(
            leaf.size for leaf in jax.tree.leaves(self.state.params["params"]["blocks"])
        ) / experiment.model.num_layers  # fmt: skip
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    @property
    def tokens(self) -> int:
        """Positions of a step."""
        return self.rows * self.row

    def chosen(self) -> Setting:
        """The setting of the experiment.

        Raises:
          InputError: its mesh does not fit the devices.
        """
        experiment = self.experiment
        shape = experiment.mesh.shape(self.devices)
        return Setting(*shape, experiment.training.microbatches, experiment.model.remat)

    def estimate(self, setting: Setting) -> Estimate:
        """
        Raises:
          InputError: a size can't be divided over the mesh.
        """
        rows = self.rows_at_once(setting)
        collectives = list(self._collectives(setting, rows))
        flops = self.executed_flops(setting.remat)
        seconds = {True: 0.0, False: 0.0}
        for each in collectives:
            seconds[each.axes == ("tensor",)] += each.sent(setting) / self._bytes_per_second(setting, each.axes)
        peak = self.devices * self.cluster.device_flops / self.cluster.devices
        memory = self._memory(setting, rows)
        return Estimate(setting, memory, flops, collectives, flops / peak, seconds[True], seconds[False])

    def rows_at_once(self, setting: Setting) -> int:
        """Rows of a microbatch on each shard of the batch.

        Raises:
          InputError: the rows, or their tokens, can't be divided.
        """
        shards = setting.data * setting.fsdp
        if self.rows % (shards * setting.microbatches):
            raise InputError(
                f"batches.rows={self.rows} can't be divided by mesh.data x mesh.fsdp x training.microbatches="
                f"{shards * setting.microbatches}; use a multiple of that, or fewer microbatches"
            )
        if self.row % self._stream_shards(setting):
            raise InputError(f"rows of {self.row} tokens can't be divided by mesh.tensor={setting.tensor}")
        return self.rows // shards // setting.microbatches

    # Memory.

    def _memory(self, setting: Setting, rows: int) -> dict[str, float]:
        experiment, config = self.experiment, self.experiment.model
        params, moments = map(float, self.state_bytes((setting.data, setting.fsdp, setting.tensor)))
        tokens, tensor, stream = rows * self.row, setting.tensor, self._stream_shards(setting)
        kept, everything = self.kept(setting.remat), self.kept("none")
        kernels = self.layer_parameters / tensor * self.itemsize

        layers = config.num_layers * tokens * (kept.stream / stream + kept.split / tensor)
        # A layer's backward pass: what it makes again, the widest cotangents, and the kernels of two layers, the second
        # on its way. Sequence parallelism gathers the inputs of both products, and their cotangents.
        again = 0.0 if setting.remat == "none" else everything.stream / stream + everything.split / tensor
        widest = self.itemsize * max(config.mlp, 4 * config.embed) / tensor
        gathered = 2 * self.itemsize * config.embed + 2 * F32 * config.embed / stream
        working = tokens * (again + widest + gathered + self._attention_copies() / tensor) + 2 * kernels
        if setting.remat == "none":
            layers += config.num_layers * kernels  # in the model's dtype, for the backward pass
        # The head: hidden states and their cotangent, what the final norm keeps; a chunk of logits, their exponentials
        # and cotangents; the table, and its gradient.
        vocab = self.model.vocab_size / tensor
        chunk = min(rows * experiment.training.loss_chunk, tokens)
        head = tokens * config.embed * (2 * self.itemsize + 3 * F32 / stream)
        head += chunk * vocab * (2 * F32 + self.itemsize) + vocab * config.embed * (self.itemsize + F32)
        # The lookups: all tables on each device in the model's dtype, later their gradients in float32.
        lookups = self._table_rows() * config.embed * F32
        return {
            "parameters": params,
            "Adam's moments": moments,
            "gradients": params * (1 if setting.microbatches == 1 else 2),  # the sum, and those of one microbatch
            "kept activations": float(layers),
            "work at the peak": max(working, head, float(lookups)),
        }

    def kept(self, remat: Remat) -> Kept:
        """What a layer keeps, per token."""
        config, c = self.experiment.model, self.itemsize
        embed, attention = config.embed, self._attention_tokens() * (c * config.embed + F32 * config.num_heads)
        if remat == "none":
            # Two norms: three float32 arrays, the output, and eight numbers. Query, key, value, the output of attention
            # in two layouts; the MLP's hidden layer, and where it is positive.
            norms = 2 * (3 * F32 + c) * embed + 8 * F32
            return Kept(norms, 4 * c * embed + attention + (c + 1) * config.mlp)
        if remat == "dots":  # the input and the stream between; query, key and value; the MLP before its ReLU
            return Kept(2 * c * embed, 3 * c * embed + attention + c * config.mlp)
        return Kept(c * embed, attention if remat == "attention" else 0.0)

    def attention_form(self) -> str:
        """The one that is planned for; what a device's trial chooses may take less."""
        name = self.experiment.model.attention
        if name != "auto":
            return name
        return "cudnn" if self.cluster.gpus and self.experiment.batches.max_groups else "blockwise"

    def _attention_tokens(self) -> float:
        """Tokens that attention keeps its output for, per token of a row: cuDNN's slots are longer than the row."""
        if self.attention_form() != "cudnn":
            return 1.0
        batches = self.experiment.batches
        slots = slot_sizes(self.row, batches.context_length, batches.max_groups)
        return sum((last - first) * size for first, last, size in slots) / self.row

    def _attention_copies(self) -> float:
        """Bytes per token while attention's backward pass runs: query, key, value, output, and their cotangents."""
        config = self.experiment.model
        if self.attention_form() == "plain":
            return 3.0 * F32 * config.num_heads * self.row
        return 8 * self._attention_tokens() * self.itemsize * config.embed

    def state_bytes(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Of the parameters, and of the optimizer's state, on each device of a mesh of this shape.

        Raises:
          InputError: an axis can't be divided over the mesh.
        """
        if shape not in self._state_bytes:
            data, fsdp, tensor = shape
            mesh = replace(self.experiment.mesh, data=data, fsdp=fsdp, tensor=tensor).planned(math.prod(shape))
            state: TrainState = mesh.abstract(self.state)
            self._state_bytes[shape] = _bytes_per_device(state.params), _bytes_per_device(state.opt_state)
        return self._state_bytes[shape]

    def _stream_shards(self, setting: Setting) -> int:
        """Devices that share the positions of a row between layers."""
        axes = dict(self.experiment.mesh.rules).get("seq") or ()
        return math.prod(getattr(setting, axis) for axis in axes)

    def _table_rows(self) -> int:
        """Of ids, positions and offsets."""
        offsets = self.model.max_segment_tokens + 1 if self.experiment.model.offset_embedding else 0
        return self.model.vocab_size + self.model.max_positions + offsets

    # FLOPs.

    @functools.cached_property
    def flops_per_token(self) -> tuple[float, float]:
        """Forward and backward, for a real token, with attention counted in full and up to each token."""
        groups = self._groups()
        full, causal = (float(x) / groups.tokens.size for x in step_flops(self.model, groups))
        return full, causal

    def _groups(self) -> PackedBatch:
        """A row with one group for each number of retrieved documents."""
        batches = self.experiment.batches
        document = codes(self.experiment)[1] + TEXT_TOKENS + MARKUP_TOKENS
        lengths = [min(batches.context_length, (1 + count) * document) for count in batches.num_retrieved]
        segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
        positions = np.concatenate([np.arange(length) for length in lengths])[None]
        weight = np.ones(segments.shape, np.float32)
        return PackedBatch(segments, segments, segments, positions, positions, weight, segments)

    def executed_flops(self, remat: Remat) -> float:
        """Of a step, padding and what is computed again included."""
        config = self.experiment.model
        _, causal = self.flops_per_token
        again = 0.0
        if remat in (
            "attention",
            "full",
        ):  # all products of the forward pass but the last one, whose output no one needs
            again += 2.0 * (4 * config.embed**2 + config.embed * config.mlp) * config.num_layers
        if remat == "full":
            pairs = causal - 6.0 * self._products()
            again += pairs / 3  # attention's forward pass
        return self.tokens * (causal + again)

    def _products(self) -> float:
        config = self.experiment.model
        per_layer = 4 * config.embed**2 + 2 * config.embed * config.mlp
        return float(config.num_layers * per_layer + config.embed * self.model.vocab_size)

    # Messages.

    def _collectives(self, setting: Setting, rows: int) -> Iterator[Collective]:
        """Gradients are reduced in each microbatch, where XLA does it. The tests compare this with XLA's programs."""
        config, c, times = self.experiment.model, self.itemsize, setting.microbatches
        layers, fsdp, data, tensor = config.num_layers * times, ("fsdp",), ("data",), ("tensor",)
        stream = float(rows * self.row * config.embed * c)
        kernels = self.layer_parameters * c / setting.tensor
        places = float((self._table_rows() - self.model.vocab_size) * config.embed)  # tables of positions and offsets
        table = float(self.model.vocab_size * config.embed)
        part = table / setting.tensor
        if setting.fsdp > 1:
            yield Collective("kernels, forward and backward", "all-gather", fsdp, kernels, 2 * layers)
            yield Collective("gradients of kernels", "reduce-scatter", fsdp, kernels, layers)
            yield Collective("tables, for lookups and head", "all-gather", fsdp, (2 * part + places) * c, times)
            yield Collective("their gradients", "reduce-scatter", fsdp, (2 * part + places) * F32, times)
        if setting.data > 1:
            yield Collective("gradients of kernels", "all-reduce", data, kernels / setting.fsdp, layers)
            yield Collective("gradients of tables", "all-reduce", data, 2 * part / setting.fsdp * F32, times)
            shared = (*data, *tensor) if setting.tensor > 1 else data
            yield Collective("gradients of positions", "all-reduce", shared, places / setting.fsdp * F32, times)
        if setting.tensor > 1:
            again = int(setting.remat in ("attention", "full"))  # the attention's output product
            if self._stream_shards(setting) > 1:
                inputs = 4 if setting.remat == "none" else 6
                yield Collective("inputs of products", "all-gather", tensor, stream, inputs * layers)
                yield Collective("outputs of products", "reduce-scatter", tensor, stream, (4 + again) * layers)
                yield Collective("hidden states for the head", "all-gather", tensor, stream, times)
            else:
                yield Collective("outputs of products", "all-reduce", tensor, stream, (4 + again) * layers)
            yield Collective("gradient of hidden states", "all-reduce", tensor, stream, times)
            yield Collective("table of the lookups", "all-gather", tensor, table * c, times)
            yield Collective("its gradient", "reduce-scatter", tensor, table * F32, times)

    def _bytes_per_second(self, setting: Setting, axes: Sequence[str]) -> float:
        """Of the slowest link on the way around a group: the last axis of the mesh is that of adjacent devices."""
        inner = math.prod(getattr(setting, axis) for axis in AXES[AXES.index(axes[-1]) + 1 :])
        span = inner * math.prod(getattr(setting, axis) for axis in axes)
        within = self.cluster.gpus and self.cluster.gpus % span == 0
        return self.cluster.link_bytes_per_second if within else 1e9 * self.cluster.network_gb_per_second

    # Other settings.

    def fits(self, estimate: Estimate) -> bool:
        return estimate.bytes <= self.usable_bytes

    @property
    def usable_bytes(self) -> float:
        return USABLE * self.cluster.device_bytes

    def best(self) -> Estimate | None:
        """The fastest setting that fits; of equally fast ones the one that sends least, then that of least memory."""
        found = [each for setting in self._settings() if (each := self._tried(setting)) and self.fits(each)]
        return min(found, key=lambda each: (each.seconds, each.other_seconds, each.bytes), default=None)

    def neighbors(self, setting: Setting) -> list[Estimate]:
        """The setting, and those that differ from it by a factor of 2 in one size, or in what is kept."""
        tried = [setting, *(replace(setting, remat=remat) for remat in get_args(Remat) if remat != setting.remat)]
        for factor in (0.5, 2.0):
            for name in ("tensor", "fsdp"):
                tried.append(_scaled(setting, **{name: factor, "data": 1 / factor}))
            tried.append(_scaled(setting, microbatches=factor))
        return [each for one in tried if (each := self._tried(one)) is not None]

    def _settings(self) -> Iterator[Setting]:
        for tensor in _divisors(math.gcd(self.devices, self.experiment.model.num_heads)):
            for fsdp in _divisors(self.devices // tensor):
                data = self.devices // tensor // fsdp
                if self.rows % (data * fsdp) == 0:
                    for microbatches in _divisors(self.rows // (data * fsdp)):
                        for remat in get_args(Remat):
                            yield Setting(data, fsdp, tensor, microbatches, remat)

    def _tried(self, setting: Setting) -> Estimate | None:
        sizes = setting.data, setting.fsdp, setting.tensor, setting.microbatches
        if min(sizes) < 1 or math.prod(sizes[:3]) != self.devices:
            return None
        try:
            return self.estimate(setting)
        except InputError:  # it can't be divided so
            return None


def _count(number: int) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _scaled(setting: Setting, **factors: float) -> Setting:
    """Sizes times factors; 0 where that is no whole number."""
    sizes = {name: getattr(setting, name) * factor for name, factor in factors.items()}
    whole: dict[str, Any] = {name: int(size) if size == int(size) else 0 for name, size in sizes.items()}
    return replace(setting, **whole)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _bytes_per_device(tree: Any) -> int:
    """Of a tree of arrays that are not allocated, by their shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def growth(experiment: Experiment, devices: Sequence[int]) -> list[Estimate]:
    """The fastest setting that fits, for each number of devices on which one does; the batch stays the same."""
    found = (TrainingPlan(experiment, count).best() for count in devices)
    return [each for each in found if each is not None]


def training_plan(run: Run) -> str:
    """The plan of the training, as text for a terminal.

    Raises:
      InputError: the mesh does not fit the devices or the model; or, after the plan is printed, it does not fit the
        memory, with a setting that does.
    """
    plan = TrainingPlan(run.experiment)
    estimate = plan.estimate(plan.chosen())
    text = "\n".join(_lines(plan, estimate))
    if plan.fits(estimate):
        return text
    print(text)
    best = plan.best()
    fix = f"use {best.setting.options}" if best else "no mesh of these devices fits: use more devices, or fewer rows"
    raise InputError(
        f"train: {amount(estimate.bytes)} of each device's memory, of which {USABLE:.0%} of "
        f"{amount(plan.cluster.device_bytes)} can be used; {fix}"
    )


def _lines(plan: TrainingPlan, estimate: Estimate) -> Iterator[str]:
    experiment, cluster, setting = plan.experiment, plan.cluster, estimate.setting
    device = "GPU" if cluster.gpus else "host"
    full, causal = plan.flops_per_token
    steps = experiment.training.steps
    yield (
        f"train, by arithmetic: {_count(plan.parameters)} parameters on {plan.devices} {device}s, "
        f"{plan.rows:,} rows of {plan.row:,} tokens a step\n"
        f"mesh data/fsdp/tensor {setting}, attention {plan.attention_form()}"
    )
    yield ""
    yield from aligned(
        [f"memory per {device}", ""],
        [
            *([name, amount(size)] for name, size in estimate.memory.items()),
            ["all", f"{amount(estimate.bytes)} of {amount(cluster.device_bytes)}, {USABLE:.0%} of which can be used"],
        ],
    )
    yield ""
    yield (
        f"GFLOP per token: {full / 1e9:.3g} with attention in full, {causal / 1e9:.3g} up to each token; "
        f"{estimate.flops / plan.tokens / 1e9:.3g} are computed"
    )
    yield ""
    messages = [
        [each.what, each.kind, " x ".join(each.axes), f"{each.count:,}", amount(each.size), amount(each.sent(setting))]
        for each in estimate.collectives
    ]
    if messages:
        yield from aligned(["between devices", "", "across", "times", "of", f"sent by each {device}, a step"], messages)
        yield ""
    seconds, days = estimate.seconds, estimate.seconds * steps / 86_400
    yield (
        f"a step: {duration(seconds)}. Products take {duration(estimate.compute_seconds)} at {cluster.utilization:.0%} "
        f"of the peak, and messages across tensor another {duration(estimate.tensor_seconds)};\n"
        f"{duration(estimate.other_seconds)} across data and fsdp pass while products run. "
        f"{cluster.link_bytes_per_second / 1e9:g} GB/s within a host, {cluster.network_gb_per_second:g} between hosts."
    )
    yield (
        f"{steps:,} steps of {plan.tokens / 1e6:.3g}M tokens, {steps * plan.tokens / 1e9:,.0f}B in all: {days:.3g} "
        f"days, {days * 24 * plan.devices:,.0f} {device} hours\n"
        f"(the paper's 2.7B: {PAPER_GPUS} A100s for {PAPER_DAYS} days, {PAPER_GPUS * PAPER_DAYS * 24:,} GPU hours)"
    )
    yield ""
    yield from aligned(
        ["data/fsdp/tensor", "microbatches", "remat", f"per {device}", "a step", ""],
        [_row(plan, each, "this one" if each.setting == setting else "") for each in plan.neighbors(setting)],
    )


def _row(plan: TrainingPlan, estimate: Estimate, note: str) -> list[str]:
    setting = estimate.setting
    note = note if plan.fits(estimate) else f"{note}, does not fit".removeprefix(", ")
    mesh = f"{setting.data}/{setting.fsdp}/{setting.tensor}"
    shown = amount(estimate.bytes), duration(estimate.seconds)
    return [mesh, str(setting.microbatches), setting.remat, *shown, note]
