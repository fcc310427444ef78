"""The `rac3` command: `rac3 STAGE CONFIG [overrides]`."""

import contextlib
import dataclasses
import io
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from rac3.artifacts.workdir import Workdir
from rac3.config import InputError, load_config_module
from rac3.documents.webdataset import WebDataset
from rac3.execution.local import Local
from rac3.execution.ray import Ray
from rac3.experiment import Data, Experiment
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.retrieval.exact import Exact
from rac3.retrieval.faiss import Faiss
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.retriever import Retriever
from rac3.retrieval.scann import Scann

RETRIEVERS: dict[str, Callable[[], Retriever]] = {
    "scann": Scann,
    "exact": Exact,
    "faiss": Faiss,
    "fixed": Fixed,
    "random": Random,
    "none": NoRetriever,
}
EXECUTORS: dict[str, type[Local] | type[Ray]] = {"local": Local, "ray": Ray}
STAGES = {
    "encoders": "fit or load the text tokenizer, the VQGAN and CLIP; --report shows reconstructions",
    "ingest": "read, filter and tokenize the documents",
    "embed": "embed the documents and the training queries",
    "index": "build the retriever's index of each part of the memory",
    "retrieve": "find and select the neighbors of every document",
    "prepare": "the five above, skipping what is current",
    "audit": "look for leaks: main documents, copies and test targets in what is retrieved",
    "train": "train the model, and the vanilla CM3 beside it",
    "evaluate": "evaluate on the held-out documents; --task retrieval: what is retrieved, without a model",
    "generate": "draw a caption of your own, or caption a picture",
    "report": "write the report and metrics.json",
    "run": "prepare, train, evaluate and report",
    "plan": "what the offline stages would take: FLOPs, time, memory, disk; runs nothing",
    "quickstart": "`run` with the quickstart config that ships with rac3",
}
USAGE = "rac3 STAGE CONFIG [overrides] [retriever:{scann,exact,faiss,fixed,random,none} [its overrides]]"


def main() -> None:
    """The entry point: exit code 0, or 2 with one line on bad input; a traceback only with `--debug`."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        run([argument for argument in arguments if argument != "--debug"])
    except InputError as error:
        if debug:
            raise
        print(f"rac3: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("rac3: interrupted; run the same command to go on", file=sys.stderr)
        sys.exit(130)


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
        raise InputError(f"stage {stage!r} is unknown; use one of {', '.join(STAGES)}")
    if stage == "quickstart":
        rest = ["quickstart", *rest]
    if not rest or rest[0].startswith("-"):
        if not {"-h", "--help"} & set(rest):
            raise InputError(f"`rac3 {stage}` needs a config: a .py file, or quickstart")
        rest = ["quickstart", "--help"]
    configured = _load(rest[0])
    experiment, options = parse(stage, configured, rest[1:])
    workdir = Workdir(experiment.folder, experiment.name, _preparing(stage, rest))
    _run_stage("run" if stage == "quickstart" else stage, experiment, configured, workdir, options)


def _load(config: str) -> Experiment:
    """The experiment of a config file.

    Raises:
      InputError: the config cannot be loaded, or gives something else.
    """
    module = load_config_module(config)
    try:
        configured = module.get_config()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"get_config() of {config} fails: {type(error).__name__}: {error}") from error
    if not isinstance(configured, Experiment):
        raise InputError(f"get_config() of {config} returns {type(configured).__name__}, not an Experiment")
    return configured


def _preparing(stage: str, arguments: Sequence[str]) -> str:
    """The arguments for an earlier stage of the same command: without what belongs to `stage` alone.

    A retriever or takedowns that are named at inference are not those that the model is trained with.
    """
    own = {field.name for field in _option_fields(stage)}
    if stage in ("evaluate", "generate", "report"):
        own |= {"retriever", "takedowns"}
    kept: list[str] = []
    dropping = False
    for argument in arguments:
        name = re.split(r"[.=:]", argument.removeprefix("--"))[0].replace("-", "_")
        if argument.startswith(("--", "retriever:")):
            dropping = name in own
        if not dropping:
            kept.append(argument)
    return shlex.join(kept)


def parse(stage: str, configured: Experiment, arguments: Sequence[str]) -> tuple[Experiment, Any]:
    """The experiment with the overrides of the command line, and the stage's own options.

    Raises:
      InputError: an unknown key or a value of the wrong type.
    """
    import tyro

    fields: list[Any] = []
    for field in dataclasses.fields(Experiment):
        value = getattr(configured, field.name)
        if field.name in ("name", "data"):
            fixed: Any = Annotated[field.type, tyro.conf.Fixed, tyro.conf.Suppress]
            fields.append((field.name, fixed, dataclasses.field(default=value)))
        elif field.name == "retriever":
            fields.append((field.name, _retriever_type(value), dataclasses.field(default=value)))
        elif field.name == "executor":  # its name, and the settings of each beside it
            fields.append((field.name, Literal[tuple(EXECUTORS)], type(value).__name__.lower()))
            fields += [(n, kind, value if isinstance(value, kind) else kind()) for n, kind in EXECUTORS.items()]
        else:
            fields.append((field.name, field.type, dataclasses.field(default_factory=lambda v=value: v)))  # type: ignore[misc]
    fields = [(name, kind, _default(spec)) for name, kind, spec in fields]
    fields += [(f.name, f.type, dataclasses.field(default=f.default)) for f in _option_fields(stage)]
    fields += [(f.name, f.type, f) for f in dataclasses.fields(MemoryOptions)]
    command = dataclasses.make_dataclass("Command", fields, frozen=True)
    kind = _options(stage)
    command.__doc__ = f"{STAGES[stage]}.\n\n{_attribute_docs(Experiment)}" + (_attribute_docs(kind) if kind else "")
    command.__doc__ += _attribute_docs(MemoryOptions)
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
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(Experiment)}
    values["executor"] = getattr(parsed, parsed.executor)
    values["data"] = MemoryOptions(parsed.add_memory, parsed.withdraw_memory).of(configured.data)
    options = kind(**{f.name: getattr(parsed, f.name) for f in _option_fields(stage)}) if kind else None
    return Experiment(**values), options


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
                raise InputError(f"--add-memory {each!r} is not NAME=FOLDER; such as news=/data/news")
            if name in memory:
                raise InputError(f"--add-memory {each!r}: the memory has a part {name!r} already; use another name")
            memory[name] = WebDataset(folder)
        return dataclasses.replace(data, memory=memory, withdrawn=data.withdrawn + self.withdraw_memory)


def _options(stage: str) -> Any:
    """The dataclass of what a stage takes beside the experiment; None if that is nothing."""
    from rac3.report.encoders import EncodersReport
    from rac3.stages.evaluate import EvaluateOptions
    from rac3.stages.generate import GenerateConfig

    return {"generate": GenerateConfig, "encoders": EncodersReport, "evaluate": EvaluateOptions}.get(stage)


def _option_fields(stage: str) -> Sequence[Any]:
    kind = _options(stage)
    return dataclasses.fields(kind) if kind else ()


def _default(spec: Any) -> Any:
    return spec if isinstance(spec, dataclasses.Field) else dataclasses.field(default=spec)


def _retriever_type(configured: Retriever) -> Any:
    """The choice of retrievers, the config's own among them under its class's name."""
    import tyro

    choices: dict[str, tuple[Any, Retriever | None]] = {name: (kind, None) for name, kind in RETRIEVERS.items()}
    own = next((name for name, (kind, _) in choices.items() if kind is type(configured)), None)
    choices[own or type(configured).__name__.lower()] = (type(configured), configured)
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
    doc = cls.__doc__ or ""
    return doc[doc.index("Attributes:") :] if "Attributes:" in doc else ""


def _one_line(text: str, stage: str) -> str:
    """The message of a boxed error as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = " ".join(re.sub(r"[│╭╮╰╯╷╵]+", " ", text).replace("─", "-").split())
    parts = [part.strip() for part in re.split(r"-{5,}", text) if part.strip()]
    return f"{(parts[1:] or parts or ['bad arguments'])[0]} (see `rac3 {stage} CONFIG --help`)"


def _run_stage(stage: str, experiment: Experiment, configured: Experiment, workdir: Workdir, options: Any) -> None:
    """The stages that the command names, in the order of the chain."""
    from rac3.plan.offline import plan
    from rac3.report.encoders import encoders_report
    from rac3.report.experiment import collect, report, summary
    from rac3.report.retrieval import retrieval_report, retrieval_summary
    from rac3.stages import embed, encoders, ingest, retrieve, train
    from rac3.stages.audit import audit
    from rac3.stages.evaluate import evaluate_all, vanilla
    from rac3.stages.evaluate_retrieval import evaluate_retrieval
    from rac3.stages.generate import generate
    from rac3.vqgan.files import require_decoder

    if stage in ("run", "train") and experiment.vqgan.checkpoint is not None:
        require_decoder(Path(experiment.vqgan.checkpoint))
    if stage == "plan":
        print(plan(experiment, workdir))
        return
    without_model = stage == "evaluate" and options.task == "retrieval"
    if stage in ("run", "train", "evaluate", "generate") and not without_model:
        experiment.mesh.build()  # what asks for other devices than there are is refused before work is done
    started = time.monotonic()
    variants = [experiment, *([vanilla(experiment)] if experiment.compare_with_cm3 else [])]
    prepare = stage in ("run", "prepare")
    if prepare or stage == "encoders":
        encoders.fit_encoders(experiment, workdir)
    if stage == "encoders" and options.report:
        print(f"report: {encoders_report(experiment, workdir, options.report_images)}")
    if prepare or stage == "ingest":
        ingest.ingest(experiment, workdir)
        for split in experiment.data.sources():
            print(f"{split}: {ingest.counts_line(experiment, workdir, split)}")
    if prepare or stage == "embed":
        embed.embed(experiment, workdir)
    if prepare or stage == "index":
        retrieve.index(experiment, workdir)
    if prepare or stage == "retrieve":
        retrieve.retrieve(experiment, workdir)
    if stage in ("run", "train"):
        for variant in variants:
            train.train(variant, workdir)
    if stage == "audit":
        print(audit(experiment, workdir))
    # At inference a retriever on the command line goes to the model that the config trains; takedowns likewise.
    trained = experiment
    if stage != "run":
        trained = dataclasses.replace(experiment, retriever=configured.retriever, takedowns=configured.takedowns)
    if without_model:
        retrieve.index(experiment, workdir)
        retrieve.retrieve(experiment, workdir)
        print(retrieval_summary(evaluate_retrieval(experiment, workdir)))
        print(f"report: {retrieval_report(experiment, workdir)}")
    elif stage in ("run", "evaluate"):
        evaluate_all(experiment, trained, workdir)
        print(summary(collect(experiment, workdir, trained)))
    if stage in ("run", "report"):
        print(f"report: {report(experiment, workdir, trained)}")
    if stage == "generate":
        retrieve.index(experiment, workdir)
        print(generate(experiment, trained, workdir, options))
    if stage not in ("generate", "report"):
        print(f"{stage}: done in {time.monotonic() - started:.0f} s, in {workdir.path}")


def _overview() -> str:
    lines = [f"usage: {USAGE}", "", "stages:"]
    lines += [f"  {name:<11} {text}" for name, text in STAGES.items()]
    lines += [
        "",
        "CONFIG is a Python file with get_config(), or `quickstart`. `rac3 STAGE CONFIG --help` lists the overrides.",
        "--debug shows a traceback on errors.",
    ]
    return "\n".join(lines)


def _quiet() -> None:
    """Keeps libraries' notes out of the progress lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("absl").setLevel(logging.ERROR)
