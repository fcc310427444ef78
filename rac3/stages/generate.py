"""Generate: your prompts -> pictures and texts, with what they retrieve; one prompt, or a file of them."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rac3 import recipes
from rac3.answering import AT_ONCE, Model
from rac3.artifacts.workdir import write_atomic
from rac3.config import InputError, fingerprint, quoted
from rac3.documents.document import Document, Text, captioned
from rac3.execution.progress import Progress
from rac3.generation.answers import Answer, Likelihood, plain_documents
from rac3.generation.engine import Progress as Drawing
from rac3.generation.sampling import Guidance, Sampling, Without
from rac3.generation.tasks.classify import Scored
from rac3.generation.tasks.continuation import Kind
from rac3.prompt import Ensemble, Passage, Prompt, Task, mask_of, pixels_of
from rac3.retrieval.retriever import Chosen

Judging = Literal["classify", "score"]  # tasks that draw nothing
TASKS = (*get_args(Task), *get_args(Judging))
SAMPLING = ("samples", "seed", "temperature", "top_p", "top_k", "guidance", "guidance_without", "copying")
ANSWERS = "answers.jsonl"  # of a file of prompts: a line for each


@dataclass(frozen=True)
class GenerateOptions:
    """What `rac3 generate` makes.

    Attributes:
      task: `draw` a prompt, as `controlled` does in the manner of the given documents; `caption` an image;
        `infill_image` under a mask, as `edit` does by the given documents; `infill_text` where the prompt says <mask>;
        `continue` a prompt, an image, or both. `classify` an image by the given labels, and `score` how probable its
        text is, make numbers and sample nothing. Without a task, a prompt is drawn, and an image alone captioned.
      prompt: a text.
      image: a picture: a png, jpeg or webp file.
      mask: what is drawn of the image: a picture of its size, white there; or LEFT,TOP,RIGHT,BOTTOM in pixels.
      documents: given to the model besides what is retrieved, each a picture with its caption, as FILE=CAPTION.
      follow: what `continue` makes, in order: text and image.
      labels: of `classify`, each a picture that it describes, as FILE=LABEL; of k pictures of each label, k runs have
        one each, and their probabilities are averaged.
      scored: of `classify` and `score`, what is scored: the text given the image, or the image given the text. Of
        `classify` too, apart: the image given a label, after the demonstrations of this label alone.
      prompts: a file with a prompt in each line instead: JSON objects of these options, with files relative to it. The
        command can be killed, and goes on where it was.
      retrieve: documents to retrieve; None is 2, all that retriever:fixed names, or 0 for `edit`, `controlled`,
        `classify`, and the score of a text or image alone.
      ensemble: of more documents than in training, what to do with several prompts that have some of them each: average
        over them for each id (mean), or answer each and keep the best answers (best).
      samples: for each prompt; the best are first.
      seed: of the drawing; another one draws other samples.
      temperature: of sampling, 0 for the most probable ids; None is what the config evaluates with.
      top_p: ids are drawn from the smallest set of this probability; None is what the config evaluates with.
      top_k: ids are drawn from this many; None is what the config evaluates with.
      guidance: the scale of classifier-free guidance, 1 for none; None is what the config evaluates with.
      guidance_without: what guidance contrasts with: a prompt without its text, or without its documents.
      copying: the weight of what the documents in the prompt say, 0 for none; None is what the config evaluates with.
      out: the folder for the answers; "" is WORKDIR/generated.
    """

    task: Task | Judging | Literal[""] = ""
    prompt: str = ""
    image: str = ""
    mask: str = ""
    documents: tuple[str, ...] = ()
    follow: tuple[Kind, ...] = ()
    labels: tuple[str, ...] = ()
    scored: Scored = "text"
    prompts: str = ""
    retrieve: int | None = None
    ensemble: Ensemble = ""
    samples: int = 4
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    guidance: float | None = None
    guidance_without: Without = "text"
    copying: float | None = None
    out: str = ""

    def __post_init__(self) -> None:
        if (self.retrieve is not None and self.retrieve < 0) or self.samples < 1:
            raise InputError(f"retrieve={self.retrieve} must be at least 0 and samples={self.samples} at least 1")
        self.sampling(Sampling())

    def sampling(self, configured: Sampling) -> Sampling:
        """The configured sampling with the options' own settings."""
        own: dict[str, Any] = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        own = {name: value for name, value in own.items() if value is not None}
        if self.guidance is not None:
            own["guidance"] = Guidance(self.guidance, self.guidance_without)
        if self.copying is not None:
            own["copying"] = replace(configured.copying, weight=self.copying)
        return replace(configured, **own)


class Judged(NamedTuple):
    """What `classify` or `score` finds: a record of plain data, and lines for the terminal."""

    record: dict[str, Any]
    lines: list[str]


def generate(run: Model, options: GenerateOptions) -> str:
    """Answers one prompt, or a file of prompts; the report for the terminal.

    Raises:
      InputError: no prompt, a file that cannot be read, or a prompt that cannot be answered.
    """
    folder = Path(options.out) if options.out else run.workdir.path / "generated"
    if options.prompts:
        return _generate_all(run, options, folder)
    if options.task in get_args(Judging):
        return _judge_one(run, options, folder)
    prompt = _prompt(run, options, Path())
    _open(run, draws=True, retrieves=prompt.retrieve > 0)
    with _Bar() as drawing:
        answer = run.answer(prompt, drawing)
    name = _file_name(prompt.task, options)
    files = answer.save(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{name}.json", answer.to_json(files) + "\n")
    return "\n".join(_report(answer, folder, files))


def _open(run: Model, draws: bool, retrieves: bool) -> None:
    """Opens what is needed in any case, each part with its name on the bar."""
    parts: dict[str, Callable[[], Any]] = {"text tokenizer": lambda: run.tokenizer, "VQGAN": lambda: run.images}
    if retrieves and run.experiment.retrieves:
        parts |= {"CLIP": lambda: run.encoder, "memory": run.memory}
    parts["model"] = lambda: run.engine if draws else run.scorer
    with Progress("opening", len(parts), "parts", shown=sys.stderr.isatty()) as bar:
        for name, part in parts.items():
            bar.update(0, name)
            part()
            bar.update()


def _file_name(task: str, options: GenerateOptions) -> str:
    """Of the text, or of the given picture, which no answer of another task replaces."""
    asked = options.prompt.strip() or Path(options.image).stem
    name = "".join(c if c.isalnum() else "-" for c in asked.lower())[:60]
    return name if task == "draw" else f"{name}-{task.replace('_', '-')}"


def _context_lines(answer: Answer | Likelihood) -> list[str]:
    lines = []
    for document, similarity in zip(answer.documents, answer.similarities, strict=True):
        how = "given" if similarity is None else f"retrieved {document.key} ({similarity:.2f})"
        lines.append(f"{how}: {document.text}")
    lines += [f"does not fit into the context: {document.key}" for document in answer.dropped]
    return lines + answer.notes


def _report(answer: Answer, folder: Path, files: Sequence[str]) -> list[str]:
    lines = _context_lines(answer)
    names = iter(files)
    for rank, (sample, score) in enumerate(zip(answer.samples, answer.scores, strict=True)):
        parts = [_printable(part) if isinstance(part, str) else str(folder / next(names)) for part in sample]
        lines.append(f"{answer.task} {rank} ({answer.score} {score:.3f}): {' | '.join(parts)}")
    return lines


def _printable(text: str) -> str:
    """A text without what would move the cursor of a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


class _Bar:
    """Progress through the ids of samples; it begins when their number is known."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def __call__(self, progress: Drawing) -> None:
        if self.bar is None:
            self.bar = Progress("drawing", progress.total, "ids").__enter__()
        self.bar.update(progress.drawn - self.bar.done)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *how: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(*how)


def _generate_all(run: Model, options: GenerateOptions, folder: Path) -> str:
    """Answers every line of a file, after those that are answered already."""
    path = Path(options.prompts)
    lines = _lines(path)
    folder.mkdir(parents=True, exist_ok=True)
    answers = folder / ANSWERS
    experiment = run.experiment
    memory = [run.recipe(recipes.index, part).fingerprint for part in experiment.data.memory_splits("test")]
    searched = memory, experiment.retriever, experiment.selection, recipes.takedown_keys(experiment)
    common = run.training_recipe.fingerprint, searched, replace(options, prompts="", out="")
    asked = [fingerprint([*common, line]) for line in lines]
    done = _answered(answers, asked)
    for half in folder.glob(f"{len(done):06d}-*.tmp"):  # written when the command was killed
        half.unlink()
    failed = sum("error" in record for record in done)
    if left := lines[len(done) :]:
        draws = any(line.get("task", options.task) not in get_args(Judging) for line in left)
        _open(run, draws, retrieves=options.retrieve != 0)
    with Progress("answers", len(lines), "prompts", initial=len(done)) as bar, answers.open("ab") as file:

        def moved(prompts: int) -> None:
            bar.update(max(0, prompts - bar.done))

        for number, answer in _each(run, options, path.parent, lines, len(done), moved):
            record = {"number": number, "asked": asked[number]}
            if isinstance(answer, InputError):
                failed += 1
                record["error"] = str(answer)
            elif isinstance(answer, Judged):
                record |= answer.record
            else:
                record |= json.loads(answer.to_json(answer.save(folder, f"{number:06d}")))
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            moved(number + 1)
    if failed:
        raise InputError(f'{failed} of {len(lines)} prompts of {path} have no answer; see "error" in {answers}')
    return f"{len(lines)} answers: {answers}"


def _each(
    run: Model,
    options: GenerateOptions,
    files: Path,
    lines: Sequence[dict[str, Any]],
    start: int,
    moved: Callable[[int], None],
) -> Iterator[tuple[int, Answer | Judged | InputError]]:
    """The answers to the lines from number `start` on, in order; a few prompts are in memory at a time.

    Args:
      moved: called with the number of prompts that is done; of those drawn together, each share of their ids counts.
    """
    for begin in range(start - start % AT_ONCE, len(lines), AT_ONCE):
        end = min(begin + AT_ONCE, len(lines))
        found: dict[int, Prompt | Judged | InputError] = {}
        scored: dict[int, tuple[GenerateOptions, Passage]] = {}
        for number in range(begin, end):
            try:
                own = _with(options, lines[number], number)
                if own.task == "score":  # those with an answer too: the last digits depend on what is scored together
                    scored[number] = own, _passage(own, files, options)
                elif number >= start:
                    classifies = own.task == "classify"
                    found[number] = _classify(run, own, files, options) if classifies else _prompt(run, own, files)
            except InputError as error:
                found[number] = error
            moved(begin + sum(not isinstance(each, Prompt) for each in found.values()))
        if any(number >= start for number in scored):
            found |= zip(scored, _scores(run, [*scored.values()]), strict=True)
        prompts = [prompt for prompt in found.values() if isinstance(prompt, Prompt)]

        def drawn(progress: Drawing, ready: int = end - len(prompts), asked: int = len(prompts)) -> None:
            moved(ready + asked * progress.drawn // progress.total)

        answers = run.answers(prompts, drawn)
        for number in range(max(begin, start), end):
            each = found[number]
            yield number, next(answers)[1] if isinstance(each, Prompt) else each


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"prompts {path} does not exist; give a file with a JSON object in each line")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):  # texts may have other breaks
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"prompts {path}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f'prompts {path}, line {number} is no JSON object; write {{"prompt": "a red fox"}}')
        lines.append(record)
    if not lines:
        raise InputError(f'prompts {path} is empty; write a line such as {{"prompt": "a red fox"}}')
    return lines


def _with(options: GenerateOptions, line: dict[str, Any], number: int) -> GenerateOptions:
    """The options of one line."""
    known = {field.name: field for field in fields(GenerateOptions) if field.name not in ("prompts", "out")}
    for name, value in line.items():
        if name not in known:
            raise InputError(f"prompt {number} has {name!r}; use {', '.join(known)}")
        default = getattr(GenerateOptions(), name)
        if isinstance(default, tuple):
            good = isinstance(value, list) and all(isinstance(each, str) for each in value)
        elif name in ("seed", "samples", "retrieve", "top_k"):
            good = isinstance(value, int) and not isinstance(value, bool)
        elif default is None:
            good = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            good = isinstance(value, type(default))
        if not good:
            raise InputError(f"prompt {number}: {name} cannot be {value!r}; see `rac3 generate CONFIG --help`")
    choices = {
        "task": TASKS,
        "scored": get_args(Scored),
        "ensemble": get_args(Ensemble)[1:],
        "guidance_without": get_args(Without),
    }
    for name, known_values in choices.items():
        if name in line and line[name] not in known_values:
            raise InputError(f"prompt {number}: {name} {line[name]!r} is unknown; use {', '.join(known_values)}")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in line.items()}
    return replace(options, **values)


def _answered(path: Path, asked: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of an earlier run, of which one that was not finished is removed.

    Raises:
      InputError: they answer other prompts.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    try:
        done = [json.loads(line) for line in whole.splitlines()]
        same = [record["asked"] for record in done] == list(asked[: len(done)])
    except (ValueError, TypeError, KeyError):
        same = False
    if not same:
        raise InputError(f"{path} has answers to other prompts, or with other options; use another --out, or remove it")
    return done


def _prompt(run: Model, options: GenerateOptions, files: Path) -> Prompt:
    """The prompt of the options; their files are relative to a folder.

    Raises:
      InputError: nothing is asked, or a file that cannot be read.
    """
    if not (options.prompt.strip() or options.image):
        raise InputError("the prompt has no text and no image; give --prompt TEXT or --image FILE")
    asked: Any = options.task  # none of `Judging`
    task: Task = asked or ("draw" if options.prompt.strip() else "caption")
    if not options.task and options.prompt.strip() and options.image:
        raise InputError("the prompt has a text and an image; say what to do: --task continue, infill_image or edit")
    if options.labels:
        raise InputError(f"the task {task} has no use for labels; give --task classify, or leave them out")
    retriever, retrieve = run.experiment.retriever, options.retrieve
    if retrieve is None and task in ("edit", "controlled"):
        retrieve = 0  # they follow what is given by hand
    elif retrieve is None:
        retrieve = retriever.num_neighbors if isinstance(retriever, Chosen) else 2
    settings = run.experiment.evaluation
    texts = task in ("caption", "infill_text")
    image = pixels_of(files / options.image) if options.image else None
    return Prompt(
        task=task,
        text=options.prompt,
        image=image,
        mask=None if image is None or not options.mask else mask_of(_mask(files, options.mask), image),
        documents=[_document(files, each) for each in options.documents],
        retrieve=retrieve,
        ensemble=options.ensemble,
        follow=options.follow,
        samples=options.samples,
        seed=options.seed,
        sampling=options.sampling(settings.caption_sampling if texts else settings.image_sampling),
    )


def _judge_one(run: Model, options: GenerateOptions, folder: Path) -> str:
    _open(run, draws=False, retrieves=bool(options.retrieve))
    common = GenerateOptions()
    if options.task == "classify":
        judged: Judged | InputError = _classify(run, options, Path(), common)
    else:
        (judged,) = _scores(run, [(options, _passage(options, Path(), common))])
    if isinstance(judged, InputError):
        raise judged
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(judged.record, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / f"{_file_name(options.task, options)}.json", line + "\n")
    return "\n".join(judged.lines)


def _check_used(options: GenerateOptions, common: GenerateOptions, *unused: str) -> None:
    """Refuses what a task that draws nothing has no use for.

    Args:
      common: the options of all prompts, whose sampling is for those that draw.
    """
    given = [name for name in unused if getattr(options, name)]
    given += [name for name in SAMPLING if getattr(options, name) != getattr(common, name)]
    if given:
        raise InputError(f"the task {options.task} has no use for {', '.join(given)}; leave that out")


def _classify(run: Model, options: GenerateOptions, files: Path, common: GenerateOptions) -> Judged:
    _check_used(options, common, "mask", "follow", "prompt", "documents")
    if not options.image:
        raise InputError("the task classify needs an image; give --image FILE")
    if options.retrieve:
        raise InputError(f"retrieve={options.retrieve}: the task classify retrieves nothing; use 0")
    labels: dict[str, list[Path]] = {}
    for each in options.labels:
        name, _, label = each.partition("=")
        if not name or not label.strip():
            raise InputError(f"--labels {quoted(each)} is not FILE=LABEL; such as fox1.png=fox")
        labels.setdefault(label.strip(), []).append(files / name)
    found = run.classify(files / options.image, labels, scored=options.scored)
    record = {
        "task": "classify",
        "prompt": {"image": options.image, "labels": list(options.labels)},
        "probabilities": {label: round(value, 6) for label, value in found.probabilities.items()},
        "notes": found.notes,
        "settings": {"scored": options.scored},
    }
    return Judged(record, [*found.notes, *(f"{label}: {value:.3f}" for label, value in found.probabilities.items())])


def _passage(options: GenerateOptions, files: Path, common: GenerateOptions) -> Passage:
    _check_used(options, common, "mask", "follow")
    text, image = options.prompt.strip(), options.image
    if options.scored == "apart":
        raise InputError("scored='apart' is for the task classify; use text or image")
    if not (text if options.scored == "text" else image):
        raise InputError(f"there is no {options.scored} to score; give --prompt TEXT, or --image FILE --scored image")
    rest = bool(text and image)
    return Passage(
        captioned(image, text, _image_file(files / image)) if image else Document("", (Text(text),), {}),
        int(rest and options.scored == "image"),
        infill=rest and options.scored == "text",
        documents=[_document(files, each) for each in options.documents],
        retrieve=(2 if rest else 0) if options.retrieve is None else options.retrieve,
        ensemble=options.ensemble,
    )


def _scores(run: Model, asked: Sequence[tuple[GenerateOptions, Passage]]) -> list[Judged | InputError]:
    """How probable passages are, all in one batch."""
    found = run.scores([passage for _, passage in asked])
    return [
        each if isinstance(each, InputError) else _scored(options, passage, each)
        for (options, passage), each in zip(asked, found, strict=True)
    ]


def _scored(options: GenerateOptions, passage: Passage, found: Likelihood) -> Judged:
    total, count = float(found.log_probs.sum()), len(found.log_probs)
    record = {
        "task": "score",
        "prompt": {"text": options.prompt.strip(), "image": options.image},
        "log_prob": round(total, 6),
        "log_probs": [round(value, 6) for value in found.log_probs.tolist()],
        "documents": plain_documents(found.documents, found.similarities),
        "dropped": [each.key for each in found.dropped],
        "notes": found.notes,
        "settings": {"scored": options.scored, "retrieve": passage.retrieve, "ensemble": options.ensemble},
    }
    line = f"{options.scored}: log p {total:.3f} nats, {count} ids, perplexity {math.exp(-total / count):.3f}"
    return Judged(record, [*_context_lines(found), line])


def _mask(files: Path, text: str) -> Any:
    """LEFT,TOP,RIGHT,BOTTOM, or a file."""
    numbers = text.split(",")
    if len(numbers) == 4 and all(number.strip().isdigit() for number in numbers):
        return tuple(map(int, numbers))
    return pixels_of(files / text).mean(-1) > 127


def _document(files: Path, text: str) -> Document:
    """FILE=CAPTION as a document."""
    name, _, caption = text.partition("=")
    return captioned(name, caption, _image_file(files / name))


def _image_file(path: Path) -> bytes:
    pixels_of(path)  # refuses what is no image
    return path.read_bytes()
