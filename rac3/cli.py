"""The `rac3` command: `rac3 STAGE CONFIG [overrides]`."""

import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import logging
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import jax

from rac3 import recipes
from rac3.answering import Model
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError, check_settings, load_config_module, quoted, shipped_configs
from rac3.devices.cpu import keep_freed_memory
from rac3.devices.processes import Distributed, Processes, leave
from rac3.documents.webdataset import WebDataset
from rac3.execution.local import Local
from rac3.execution.ray import Ray
from rac3.experiment import Data, Experiment
from rac3.experiment_file import describe, load
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.retrieval.exact import Exact
from rac3.retrieval.faiss import Faiss
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.retriever import Retriever
from rac3.retrieval.scann import Scann
from rac3.run import Run, keep_programs
from rac3.training.checkpoint import SaveError
from rac3.training.preemption import RUN_AGAIN, PreemptedError
from rac3.vqgan.frozen import FrozenVQGAN

RETRIEVERS: dict[str, Callable[[], Retriever]] = {
    "scann": Scann,
    "exact": Exact,
    "faiss": Faiss,
    "fixed": Fixed,
    "random": Random,
    "none": NoRetriever,
}
EXECUTORS: dict[str, type[Local] | type[Ray]] = {"local": Local, "ray": Ray}
MESSAGE = 300  # characters that are shown of an error in a config or in arguments
AT_INFERENCE = ("evaluate", "generate", "demo", "report")  # stages that leave the model as it is
REFUSALS = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "make room",  # on a disk, in a quota, under a process's limit
    (errno.EROFS, errno.EACCES, errno.EPERM): "make it readable and writable, or give another --workdir",
    (errno.ENAMETOOLONG,): "use a shorter name",
    (errno.ENOTDIR, errno.EISDIR, errno.EEXIST): "move away what has its name",
    (errno.EMFILE, errno.ENFILE): "raise the limit of open files (ulimit -n)",
}
"""What to do about each error of the operating system."""
USAGE = "rac3 STAGE CONFIG [overrides] [retriever:{scann,exact,faiss,fixed,random,none} [its overrides]]"


def main() -> None:
    """The entry point: one line on errors that a person can do something about, a traceback with `--debug`.

    Exit codes: 0; 1 if a file can't be read or written (a full disk, no permission); 2 on bad input; 75 if training
    was asked to stop, and is saved; 130 if anything else was interrupted. After each but 2, the same command goes on.
    """
    arguments = sys.argv[1:]
    _use_utf8(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # keys and captions in a terminal that lacks their letters
    debug = "--debug" in arguments
    try:
        run([argument for argument in arguments if argument != "--debug"])
    except (Exception, KeyboardInterrupt) as error:
        code, line = _ending(error)
        shows_all = not line or (debug and code in (1, 2))
        if shows_all and not jax.distributed.is_initialized():
            raise
        print(traceback.format_exc() if shows_all else f"rac3: {line}", file=sys.stderr)
        leave(code)


def _use_utf8(arguments: Sequence[str]) -> None:
    """Starts the process again in Python's UTF-8 mode if its locale has ASCII alone.

    Otherwise libraries in C++ and Rust, which take paths in UTF-8, could not open a folder that is called 草原.
    """
    whole = sys.orig_argv
    if sys.getfilesystemencoding() == "utf-8" or not arguments or whole[-len(arguments) :] != list(arguments):
        return  # or called by another program
    os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *whole[1:]])


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the line of an error; "" if only its traceback tells what happened."""
    if isinstance(error, InputError):
        return 2, _joined(error)
    if isinstance(error, PreemptedError):
        return RUN_AGAIN, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; run the same command to go on"
    if isinstance(error, SaveError):
        return 1, str(error)
    if isinstance(error, OSError):
        reason = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else _joined(error)
        fix = next((fix for numbers, fix in REFUSALS.items() if error.errno in numbers), "fix that")
        return 1, f"{reason}; {fix}, and run the same command to go on"
    return 1, ""


def _joined(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(line.strip() for line in str(error).splitlines()).strip()


def run(arguments: Sequence[str]) -> None:
    """Runs one command.

    Raises:
      InputError: on bad input.
    """
    _quiet()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return
    stage, rest = arguments[0], list(arguments[1:])
    if stage not in STAGES:
        raise InputError(f"stage {stage!r} is unknown; use one of {', '.join(STAGES)}{_meant(stage, STAGES)}")
    if stage == "quickstart":
        stage, rest = "run", ["quickstart", *rest]
    if not rest or rest[0].startswith("-"):
        if not {"-h", "--help"} & set(rest):
            raise InputError(f"`rac3 {stage}` needs a config: a .py file, quickstart, or a finished workdir")
        rest = ["quickstart", "--help"]
    config = load_experiment(rest[0])
    experiment, options = parse(stage, config, rest[1:])
    needs_model = stage in (*AT_INFERENCE, "export") and getattr(options, "task", "") != "retrieval"
    workdir = Workdir(experiment.folder, experiment.name, _preparing(stage, rest), needs_model)
    # At inference a retriever on the command line goes to the model that the config trains; takedowns likewise.
    trained = experiment
    if stage in AT_INFERENCE:
        trained = dataclasses.replace(
            experiment,
            retriever=config.retriever,
            takedowns=config.takedowns,
            takedowns_missing_ok=config.takedowns_missing_ok,
        )
    started = time.monotonic()
    STAGES[stage].work(Model(experiment, workdir, trained), options)
    if STAGES[stage].timed:
        print(f"{stage}: done in {time.monotonic() - started:.0f} s, in {workdir.path}")


def load_experiment(config: str) -> Experiment:
    """The experiment of a config file, or the one that a finished workdir was made with.

    Raises:
      InputError: the config cannot be loaded, or gives something else.
    """
    if Path(config).is_dir() and config not in shipped_configs():
        experiment = load(config).experiment
        return dataclasses.replace(experiment, workdir=config)
    module = load_config_module(config)
    try:
        experiment = module.get_config()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        message = _joined(error)[:MESSAGE]
        raise InputError(f"get_config() of {config} fails: {type(error).__name__}: {message}") from error
    if not isinstance(experiment, Experiment):
        raise InputError(f"get_config() of {config} returns {type(experiment).__name__}, not an Experiment")
    return experiment


def _preparing(stage: str, arguments: Sequence[str]) -> str:
    """The arguments for an earlier stage of the same command: without what belongs to `stage` alone.

    A retriever or takedowns that are named at inference are not those that the model is trained with.
    """
    own = {field.name for field in dataclasses.fields(STAGES[stage].options())}
    if stage == "export" and len(arguments) > 1 and not arguments[1].startswith(("-", "retriever:")):
        arguments = [arguments[0], *arguments[2:]]  # without DIR
    if stage in AT_INFERENCE:
        own |= {"retriever", "takedowns", "takedowns_missing_ok", "no_takedowns_missing_ok"}
    kept: list[str] = []
    dropping = False
    for argument in arguments:
        name = re.split(r"[.=:]", argument.removeprefix("--"))[0].replace("-", "_")
        if argument.startswith(("--", "retriever:")):
            dropping = name in own
        if not dropping:
            kept.append(argument)
    return shlex.join(kept)


def parse(stage: str, config: Experiment, arguments: Sequence[str]) -> tuple[Experiment, Any]:
    """The experiment of the config with the overrides of the command line, and the stage's own options.

    The flags are the fields of one flat class, which is put together here:

        Experiment       seed, batches, model, ...             --seed 1 --batches.rows 8
                         retriever: one of RETRIEVERS          retriever:exact --retriever.dtype bfloat16
                         executor: its name, and next to it    --executor ray --ray.workers 4
                         the settings of each of EXECUTORS
        the stage        prompt, samples, seed, ...            --prompt "a red fox"; hides an Experiment's field
        MemoryOptions    add_memory, withdraw_memory           --add-memory news=/data/news

    Raises:
      InputError: an unknown flag or a value of the wrong type.
    """
    import tyro

    options = STAGES[stage].options()
    own: dict[str, tuple[Any, Any]] = {each.name: (each.type, _default(each)) for each in dataclasses.fields(options)}
    fields = dict(own)
    for field in dataclasses.fields(Experiment):
        value = getattr(config, field.name)
        if field.name in ("name", "data") or field.name in own:
            continue
        if field.name == "retriever":
            fields[field.name] = _retriever_type(value), value
        elif field.name == "executor":
            fields[field.name] = Literal[tuple(EXECUTORS)], type(value).__name__.lower()
            fields |= {name: (kind, value if isinstance(value, kind) else kind()) for name, kind in EXECUTORS.items()}
        elif field.name in ("vqgan", "clip"):
            fields[field.name] = type(value), value  # the built-in one, or an object of the config's own
        else:
            fields[field.name] = field.type, value
    fields |= {field.name: (field.type, field.default) for field in dataclasses.fields(MemoryOptions)}
    command = dataclasses.make_dataclass(
        "Command",
        [(name, kind, dataclasses.field(default_factory=lambda v=value: v)) for name, (kind, value) in fields.items()],  # type: ignore[misc]
        frozen=True,
    )
    docs = map(_attribute_docs, (Experiment, options, MemoryOptions))
    command.__doc__ = "\n".join([f"{STAGES[stage].help}.", "", "Attributes:", *docs])
    output = io.StringIO()
    wants_help = {"-h", "--help"} & set(arguments)
    try:
        with contextlib.ExitStack() as stack:
            if not wants_help:
                stack.enter_context(contextlib.redirect_stderr(output))
                stack.enter_context(contextlib.redirect_stdout(output))
            parsed: Any = tyro.cli(
                command, prog=f"rac3 {stage} CONFIG", args=list(arguments), config=(tyro.conf.CascadeSubcommandArgs,)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(output.getvalue(), stage)) from None
    values = {name: getattr(parsed, name) for name in fields if hasattr(config, name) and name not in own}
    values["executor"] = getattr(parsed, parsed.executor)
    values["data"] = MemoryOptions(parsed.add_memory, parsed.withdraw_memory).of(config.data)
    own_values = {name: getattr(parsed, name) for name in own}
    check_settings(own_values)
    return dataclasses.replace(config, **values), options(**own_values)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
    """Changes to the memory that a config names.

    Attributes:
      add_memory: parts that join the memory at inference, each as NAME=FOLDER of shards in img2dataset's layout
        (a relative folder starts from data_dir). Give them to every command that is to see them.
      withdraw_memory: names of parts that are no longer retrieved from.
    """

    add_memory: tuple[str, ...] = ()
    withdraw_memory: tuple[str, ...] = ()

    def of(self, data: Data) -> Data:
        """`data` with these changes.

        Raises:
          InputError: a part without name or folder, one that is there already, or none of a name to withdraw.
        """
        memory = dict(data.memory)
        for each in self.add_memory:
            name, _, folder = each.partition("=")
            if not name or not folder:
                raise InputError(f"--add-memory {quoted(each)} is not NAME=FOLDER; such as news=/data/news")
            if name in memory:
                raise InputError(
                    f"--add-memory {quoted(each)}: the memory has a part {quoted(name)} already; use another name"
                )
            memory[name] = WebDataset(folder)
        return dataclasses.replace(data, memory=memory, withdrawn=data.withdrawn + self.withdraw_memory)


def _retriever_type(config: Retriever) -> Any:
    """The choice of retrievers, the config's own among them under its class's name."""
    import tyro

    choices: dict[str, tuple[Any, Retriever | None]] = {name: (kind, None) for name, kind in RETRIEVERS.items()}
    own = next((name for name, (kind, _) in choices.items() if kind is type(config)), None)
    choices[own or type(config).__name__.lower()] = (type(config), config)
    types = [
        Annotated[
            kind,
            tyro.conf.subcommand(
                name, default=kind() if value is None else value, description=(kind.__doc__ or "").split("\n\n")[0]
            ),
        ]
        for name, (kind, value) in choices.items()
    ]
    return Union[tuple(types)]  # noqa: UP007  # built at run time


def _attribute_docs(cls: type) -> str:
    """What the docstring says below `Attributes:`, to which other attributes can be added."""
    return inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]


def _one_line(text: str, stage: str) -> str:
    """The message of a boxed error as one line, with what was probably meant."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = " ".join(re.sub(r"[│╭╮╰╯╷╵]+", " ", text).replace("─", "-").split())
    parts = [part.strip() for part in re.split(r"-{5,}", text) if part.strip()]
    message = (parts[1:] or parts or ["bad arguments"])[0][:MESSAGE]
    meant = ""
    if unknown := re.match(r"Unrecognized options: ([^\s,=]+)", message):
        flags = re.findall(r"--(?!help)\w\S*", text.partition("Perhaps you meant:")[2])
        retrievers = re.findall(r"retriever:\w+", text.partition("Available subcommands:")[2])
        meant = _meant(unknown[1], flags, cutoff=0.0) or _meant(unknown[1], retrievers, cutoff=0.85)
    return f"{message}{meant} (see `rac3 {stage} CONFIG --help`)"


def _meant(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """What was probably meant, as the end of a message: the nearest of the known names; "" if none is near.

    A name may be the end of several: `--steps` of `--training.steps` and `--clip.fit.steps`, `exact` of
    `retriever:exact`.
    """
    known = list(known)
    same = [each for each in known if re.split("[.:]", each)[-1] == name.removeprefix("--")]
    near = same or difflib.get_close_matches(name, known, 1, cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# What each stage does: a function of the run and of the stage's own options.


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A stage that adds no options."""


def _encoders(run: Run, options: Any) -> None:
    from rac3.report.encoders import encoders_report
    from rac3.stages.encoders import fit_encoders

    keep_freed_memory()
    fit_encoders(run)
    _describe(run)
    if getattr(options, "report", False):
        print(f"report: {encoders_report(run, options.report_images)}")


def _ingest(run: Run, options: Any) -> None:
    from rac3.stages.ingest import counts_line, ingest

    ingest(run)
    _describe(run)
    for split in run.experiment.data.sources():
        print(f"{split}: {counts_line(run, split)}")


def _embed(run: Run, options: Any) -> None:
    from rac3.stages.embed import embed

    embed(run)
    _describe(run)


def _index(run: Run, options: Any) -> None:
    from rac3.stages.retrieve import index

    index(run)


def _retrieve(run: Run, options: Any) -> None:
    from rac3.stages.retrieve import retrieve, shortage_line

    retrieve(run)
    for split in run.experiment.data.sources() if run.experiment.retrieves else ():
        if run.experiment.data.role(split) != "memory" and (line := shortage_line(run, split)):
            print(line)


def _prepare(run: Run, options: Any) -> None:
    for work in (_encoders, _ingest, _embed, _index, _retrieve):
        work(run, options)


@dataclasses.dataclass(frozen=True)
class AuditOptions:
    """What `audit` takes besides the experiment.

    Attributes:
      files: instead, read every file of the workdir and name those that are missing or damaged.
    """

    files: bool = False


def _audit(run: Run, options: Any) -> None:
    from rac3.stages.audit import audit
    from rac3.stages.audit_files import audit_files

    print(audit_files(run.workdir) if options.files else audit(run))


def _check_generator(run: Run) -> None:
    """Refuses what would fail after hours: a VQGAN that cannot draw, a mesh of other devices than there are."""
    from rac3.vqgan.published import require_decoder

    vqgan = run.experiment.vqgan
    if isinstance(vqgan, FrozenVQGAN) and vqgan.checkpoint is not None:
        require_decoder(Path(vqgan.checkpoint))
    run.experiment.mesh.build()


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What `train` takes besides the experiment.

    Attributes:
      distributed: how the processes of one training find each other; no result depends on it.
    """

    distributed: Distributed = dataclasses.field(default_factory=Distributed)


def _train(run: Run, options: Any) -> None:
    keep_freed_memory()
    stall_minutes = run.experiment.training.stall_minutes
    if isinstance(options, TrainOptions):
        started = options.distributed.start(stall_minutes, (PreemptedError,))
    else:  # all stages in one process
        started = Processes(stall_minutes=stall_minutes, orderly=(PreemptedError,))
    with started as processes:
        _train_with(run, processes)


def _train_with(run: Run, processes: Processes) -> None:
    from rac3.stages.train import train

    _check_generator(run)
    train(run, processes)
    if processes.first:
        _describe(run)
    if run.experiment.compare_with_cm3:
        vanilla = run.experiment.vanilla()
        train(run.variant(vanilla, vanilla), processes)


def _evaluate(run: Run, options: Any) -> None:
    from rac3.held_out import SPLITS
    from rac3.report.coco import coco_report, coco_summary
    from rac3.report.experiment import collect, summary
    from rac3.report.infilling import infilling_report, infilling_summary
    from rac3.stages.evaluate import comparisons, evaluate
    from rac3.stages.evaluate_coco import coco_splits, evaluate_coco
    from rac3.stages.evaluate_infilling import evaluate_infilling
    from rac3.stages.reference import reference
    from rac3.stages.retrieve import index, retrieve

    task = getattr(options, "task", "generation")
    if task == "retrieval":  # needs no model
        _evaluate_retrieval(run)
        return
    splits = coco_splits(run) if task == "coco" else SPLITS
    run.experiment.mesh.build()
    models = comparisons(run)
    if task == "few-shot":  # needs no neighbors
        _evaluate_few_shot(run, models)
        return
    if task == "knowledge":  # judges all models together
        _evaluate_knowledge(models)
        return
    works = {"generation": evaluate, "infilling": evaluate_infilling, "coco": evaluate_coco}
    metrics = {}
    for name, compared in models.items():
        index(compared)
        retrieve(compared, splits)
        if task in ("generation", "coco"):
            reference(compared, splits)
        metrics[name] = works[task](compared)
    if task == "infilling":
        print(infilling_summary(metrics))
        print(f"report: {infilling_report(run, models)}")
    elif task == "coco":
        print(coco_summary(metrics))
        print(f"report: {coco_report(run, models, metrics)}")
    else:
        print(summary(collect(run)))


def _evaluate_retrieval(run: Run) -> None:
    from rac3.report.retrieval import retrieval_report, retrieval_summary
    from rac3.stages.evaluate_retrieval import evaluate_retrieval
    from rac3.stages.retrieve import index, retrieve

    index(run)
    retrieve(run)
    print(retrieval_summary(evaluate_retrieval(run)))
    print(f"report: {retrieval_report(run)}")


def _evaluate_few_shot(run: Run, models: dict[str, Run]) -> None:
    from rac3.report.few_shot import few_shot_report, few_shot_summary
    from rac3.stages.evaluate_few_shot import evaluate_few_shot

    by_model = {each.model_name: each for each in models.values()}  # by any retriever: nothing is retrieved
    metrics = {name: evaluate_few_shot(each) for name, each in by_model.items()}
    print(few_shot_summary(metrics))
    print(f"report: {few_shot_report(run, metrics)}")


def _evaluate_knowledge(models: dict[str, Run]) -> None:
    from rac3.held_out import SPLITS
    from rac3.report.knowledge import knowledge_report, knowledge_summary
    from rac3.stages.evaluate_knowledge import evaluate_knowledge
    from rac3.stages.retrieve import index, retrieve

    for each in models.values():
        index(each)
        retrieve(each, SPLITS)
    metrics = evaluate_knowledge(models)
    print(knowledge_summary(metrics))
    print(f"report: {knowledge_report(models, metrics)}")


def _report(run: Run, options: Any) -> None:
    from rac3.report.experiment import report

    print(f"report: {report(run)}")


def _run(run: Run, options: Any) -> None:
    _check_generator(run)
    for work in (_prepare, _train, _evaluate, _report):
        work(run, options)


def _generate(run: Model, options: Any) -> None:
    from rac3.stages.generate import generate

    keep_programs(run.workdir.path)
    run.experiment.mesh.build()
    _index(run, options)
    print(generate(run, options))


def _demo(run: Model, options: Any) -> None:
    from rac3.demo.page import demo

    keep_programs(run.workdir.path)
    run.experiment.mesh.build()
    _index(run, options)
    demo(run, options)


def _export(run: Run, options: Any) -> None:
    from rac3.stages.export import export

    print(export(run, options))


def _plan(run: Run, options: Any) -> None:
    from rac3.plan.offline import plan
    from rac3.plan.training import training_plan

    print(f"{plan(run)}\n")
    print(training_plan(run))


def _describe(run: Run) -> None:
    """Stores the experiment in its workdir: that of the model, once there is one."""
    trained = run.workdir.find(run.recipe(recipes.train)) is not None
    if trained or not any((run.workdir.path / "train").glob("*/manifest.json")):
        describe(run)


def _encoders_options() -> type:
    from rac3.report.encoders import EncodersReport

    return EncodersReport


def _evaluate_options() -> type:
    from rac3.stages.evaluate import EvaluateOptions

    return EvaluateOptions


def _generate_options() -> type:
    from rac3.stages.generate import GenerateOptions

    return GenerateOptions


def _demo_options() -> type:
    from rac3.demo.page import DemoOptions

    return DemoOptions


def _export_options() -> type:
    from rac3.stages.export import ExportOptions

    return ExportOptions


@dataclasses.dataclass(frozen=True)
class Stage:
    """A row of the table of stages.

    Attributes:
      options: gives the dataclass of what the stage takes besides the experiment, imported when it is needed.
      timed: the command ends with how long it took.
    """

    help: str
    work: Callable[[Any, Any], None]
    options: Callable[[], type] = lambda: NoOptions
    timed: bool = True


STAGES = {
    "encoders": Stage(
        "fit or load the text tokenizer, the VQGAN and CLIP; --report shows reconstructions",
        _encoders,
        _encoders_options,
    ),
    "ingest": Stage("read, filter and tokenize the documents", _ingest),
    "embed": Stage("embed the documents and the training queries", _embed),
    "index": Stage("build the retriever's index of each part of the memory", _index),
    "retrieve": Stage("find and select the neighbors of every document", _retrieve),
    "prepare": Stage("the five above, skipping what is current", _prepare),
    "audit": Stage(
        "look for leaks: main documents, copies and test targets in what is retrieved; --files for damaged files",
        _audit,
        lambda: AuditOptions,
    ),
    "train": Stage("train the model, and the vanilla CM3 to compare it with", _train, lambda: TrainOptions),
    "evaluate": Stage(
        "evaluate on the held-out documents; --task infilling, few-shot, knowledge, coco, or retrieval (no model)",
        _evaluate,
        _evaluate_options,
    ),
    "generate": Stage(
        "draw, caption, infill, edit, continue, classify or score what you give; --prompts FILE for many",
        _generate,
        _generate_options,
        False,
    ),
    "demo": Stage(
        "serve a web page that draws, captions, infills and edits; needs gradio", _demo, _demo_options, False
    ),
    "report": Stage("write the report and metrics.json", _report, timed=False),
    "run": Stage("prepare, train, evaluate and report", _run),
    "plan": Stage("what all would take: memory, FLOPs, time, disk, messages; runs nothing", _plan, timed=False),
    "export": Stage(
        "write the trained model into DIR, for Hugging Face's transformers", _export, _export_options, False
    ),
    "quickstart": Stage("`run` with the quickstart config that ships with rac3", _run),
}


def _overview() -> str:
    lines = [f"usage: {USAGE}", "", "stages:"]
    lines += [f"  {name:<11} {stage.help}" for name, stage in STAGES.items()]
    lines += [
        "",
        "CONFIG is a Python file with get_config(), `quickstart`, or a finished workdir. `rac3 STAGE CONFIG --help`",
        "lists the overrides.",
        "--debug shows a traceback on errors.",
    ]
    return "\n".join(lines)


def _quiet() -> None:
    """Keeps libraries' notes out of the progress lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what orbax logs, it also raises
    unraisable = sys.unraisablehook

    def report(found: Any) -> None:
        """At the first part of a checkpoint that fails, orbax leaves the others to fail later, unheard."""
        files = [frame.filename for frame in traceback.extract_tb(found.exc_traceback)]
        if not any("orbax" in file or "asyncio" in file for file in files):
            unraisable(found)

    sys.unraisablehook = report
