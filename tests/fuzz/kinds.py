"""Files, values and command lines that a person may hand to rac3: a good one of each kind, damaged at random and read.

    for name, kind in kinds.items():
        case = kind(folder)        # writes the good input
        case(random.Random(7))     # damages a copy in its own way, reads it, says "read" or "rejected"

Whatever was done to it, reading may only give something, count a reject, or raise an `InputError` or an `OSError`,
which the command turns into one line. Anything else is a fault of rac3.
"""

import contextlib
import dataclasses
import io
import json
import random
import re
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny_config

from fuzz.mutations import DEEP, NUMBERS, VALUES, changed_bytes, changed_value
from rac3 import recipes
from rac3.clip.published import load_clip
from rac3.config import InputError
from rac3.documents.document import Document, ImageError, Reject, SampleError, decode_image, image_size
from rac3.documents.filter import LaionFilter
from rac3.documents.webdataset import WebDataset
from rac3.tokens.text import TextTokenizer
from rac3.vqgan.published import load_vqgan
from rac3.weights.settings import read_settings
from rac3.weights.torch_file import read_torch_file
from rac3.weights.weights_file import read_weights

Case = Callable[[random.Random], str]
READ, REJECTED = "read", "rejected"


def picture(seed: int = 0, kind: str = "png", **options: Any) -> bytes:
    import PIL.Image

    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    PIL.Image.fromarray(pixels).convert(options.pop("mode", "RGB")).save(data, kind, **options)
    return data.getvalue()


def samples() -> list[tuple[str, bytes]]:
    """The members of three samples in img2dataset's layout."""
    members = []
    for number in range(3):
        scores = {"pwatermark": 0.1, "punsafe": 0.2, "width": 300, "height": 300, "url": "a", "key": f"{number:05d}"}
        content = {"png": picture(number), "txt": b"a fox at dawn", "json": json.dumps(scores).encode()}
        members += [(f"{number:05d}.{kind}", data) for kind, data in content.items()]
    return members


def tar_of(members: list[tuple[str, bytes]], tar_format: int) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def read_shards(folder: Path) -> str:
    source, rejects, documents = WebDataset(), 0, 0
    keep = LaionFilter()
    for shard in source.shards(folder):
        for item in source.read(folder, shard):
            rejects += isinstance(item, Reject)
            documents += isinstance(item, Document)
            if isinstance(item, Document):
                with contextlib.suppress(SampleError):
                    keep.reason(item.metadata)
    return REJECTED if rejects or not documents else READ


def tar(folder: Path) -> Case:
    """A shard: its bytes, or its members in another order, under other names, with other content."""
    members = samples()

    def case(rng: random.Random) -> str:
        content = list(members)
        for _ in range(rng.choice((0, 1, 3))):
            place = rng.randrange(len(content))
            name, data = content[place]
            change = rng.randrange(6)
            if change == 0:
                content[place] = content[rng.randrange(len(content))]
            elif change == 1:
                content[place] = name, changed_bytes(data, rng)
            elif change == 2:
                odd = changed_bytes(name.encode(), rng).replace(b"\0", b"").decode(errors="replace") or "a"
                content[place] = odd, data
            elif change == 3:
                rng.shuffle(content)
            elif change == 4 and name.endswith("json"):
                with contextlib.suppress(ValueError):  # changed before
                    value = changed_value(json.loads(data), rng)
                    content[place] = name, as_json(value)
            elif len(content) > 1:
                del content[place]
        short = all(len(name.encode(errors="replace")) < 100 for name, _ in content)
        formats = (tarfile.USTAR_FORMAT if short else tarfile.GNU_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        data = tar_of(content, rng.choice(formats))
        if rng.random() < 0.7:
            data = changed_bytes(data, rng)
        (folder / "00000.tar").write_bytes(data)
        return read_shards(folder)

    return case


def image(folder: Path) -> Case:
    """PNG in its color types, JPEG, WebP, GIF, BMP, TIFF."""
    kinds = [picture(kind=kind) for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff")]
    kinds += [picture(mode=mode) for mode in ("L", "1", "P", "RGBA", "LA")] + [picture(kind="jpeg", progressive=True)]

    def case(rng: random.Random) -> str:
        data = changed_bytes(rng.choice(kinds), rng)
        with contextlib.suppress(ImageError):
            image_size(data)
        try:
            pixels = decode_image(data)
        except ImageError:
            return REJECTED
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        return READ

    return case


def table(folder: Path) -> Case:
    """The parquet file next to a shard, which alone has the metadata: its bytes, or its columns."""
    import pyarrow
    import pyarrow.parquet

    (folder / "00000.tar").write_bytes(
        tar_of([each for each in samples() if "json" not in each[0]], tarfile.GNU_FORMAT)
    )
    columns = {
        "key": [f"{number:05d}" for number in range(3)],
        "punsafe": [0.1, 0.2, 0.3],
        "pwatermark": [0.1, 0.2, 0.3],
        "status": ["success"] * 3,
        "width": [300, 300, 300],
    }

    def case(rng: random.Random) -> str:
        path = folder / "00000.parquet"
        changed = changed_value(columns, rng, deep=50) if rng.random() < 0.5 else columns  # pyarrow writes no deeper
        try:
            pyarrow.parquet.write_table(pyarrow.table(changed), path)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError, AttributeError):  # no table at all
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
        if rng.random() < 0.6 or changed is columns:
            path.write_bytes(changed_bytes(path.read_bytes(), rng))
        return read_shards(folder)

    return case


def settings(kind: str, dump: Callable[[Any], bytes]) -> Callable[[Path], Case]:
    def kind_of(folder: Path) -> Case:
        values = {
            "model": {"params": {"ch": 8, "ch_mult": [1, 2], "name": "a", "on": True, "rate": 4.5e-06}},
            "size": 3,
        }

        def case(rng: random.Random) -> str:
            path = folder / f"config.{kind}"
            changed = dump(changed_value(values, rng))
            path.write_bytes(changed_bytes(changed, rng) if rng.random() < 0.6 else changed)
            found = read_settings(path)
            size = found.get("size", int, 3)
            found.part("model", {}).part("params", {}).numbers("ch_mult", (1, 2))
            assert type(size) is int
            assert abs(size) < 2**31
            return READ

        return case

    return kind_of


def as_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:  # Python's writer can't nest as deeply as a file can
        return b"[" * DEEP + b"]" * DEEP


def as_yaml(value: Any) -> bytes:
    import yaml

    try:
        return str(yaml.safe_dump(value)).encode(errors="surrogatepass")
    except RecursionError:
        return b"[" * DEEP + b"]" * DEEP


def torch_file(folder: Path) -> Case:
    """Of `torch.save`, zipped and not, with and without a command: its bytes, or its pickle under a right checksum."""
    import torch

    canary = folder / "ran"

    class Command:
        def __reduce__(self) -> tuple:
            return Path.touch, (canary,)

    tensors = {"a.weight": torch.ones(3, 4), "b": torch.arange(5), "c": torch.ones(2, dtype=torch.bfloat16)}
    originals = []
    for value in ({"state_dict": tensors, "epoch": 3}, tensors | {"callback": Command()}):
        for zipped in (True, False):
            data = io.BytesIO()
            torch.save(value, data, _use_new_zipfile_serialization=zipped)
            originals.append((zipped, data.getvalue()))

    def case(rng: random.Random) -> str:
        zipped, data = rng.choice(originals)
        if zipped and rng.random() < 0.5:
            out = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
                for name in old.namelist():
                    content = old.read(name)
                    new.writestr(name, changed_bytes(content, rng) if name.endswith("data.pkl") else content)
            data = out.getvalue()
        else:
            data = changed_bytes(data, rng)
        path = folder / "a.pt"
        path.write_bytes(data)
        try:
            read_torch_file(path)
        finally:
            assert not canary.exists(), "a command in the file was run"
        return READ

    return case


def safetensors(folder: Path) -> Case:
    """One file, or two with an index: bytes, header, index."""
    from safetensors.numpy import save

    tensors = {"a.weight": np.ones((3, 4), np.float32), "b": np.arange(5), "c": np.ones(2, np.float16)}
    whole = save(tensors)
    size = int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    index = {"metadata": {"total_size": 92}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}

    def case(rng: random.Random) -> str:
        path, way = folder / "model.safetensors", rng.randrange(3)
        path.write_bytes(changed_bytes(whole, rng) if way == 0 else whole)
        if way == 1:
            text = as_json(changed_value(header, rng))
            path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        if way == 2:
            path = folder / "model.safetensors.index.json"
            text = as_json(changed_value(index, rng))
            path.write_bytes(changed_bytes(text, rng) if rng.random() < 0.3 else text)
        read_weights(path)
        return READ

    return case


def tokenizer(folder: Path) -> Case:
    """The two files that fitting writes: their bytes, or their values."""
    texts = ["a red fox at dawn", "a blue fox on grass", "the dawn of grass"] * 4
    TextTokenizer(vocab_size=300).fit(texts, folder / "good")
    names = ("tokenizer.json", "tokenizer_config.json")
    good = {name: (folder / "good" / name).read_bytes() for name in names}

    def case(rng: random.Random) -> str:
        opened = folder / "opened"
        opened.mkdir(exist_ok=True)
        damaged = rng.choice(names)
        for name, data in good.items():
            if name == damaged:
                value = as_json(changed_value(json.loads(data), rng))
                data = value if rng.random() < 0.5 else changed_bytes(data, rng)
            (opened / name).write_bytes(data)
        found = TextTokenizer(checkpoint=str(opened)).load()
        ids = found.encode("a red fox <x> 草原")
        assert all(0 <= number < found.size for number in ids)
        found.decode(ids)
        return READ

    return case


def vqgan(folder: Path) -> Case:
    """taming's settings beside a checkpoint."""
    from published_vqgans import CONFIG, taming_yaml, write_taming

    write_taming(folder, dataclasses.replace(CONFIG, ch=8, z_channels=8, embed_dim=8, norm_groups=8))
    right = taming_yaml(dataclasses.replace(CONFIG, ch=8, z_channels=8, embed_dim=8), "taming.models.vqgan.VQModel")

    def case(rng: random.Random) -> str:
        text = as_yaml(changed_value(right, rng))
        (folder / "model.yaml").write_bytes(changed_bytes(text, rng) if rng.random() < 0.3 else text)
        load_vqgan(folder / "last.ckpt")
        return READ

    return case


def clip(folder: Path) -> Case:
    """A folder of transformers' CLIP: settings, processor, tokenizer, weights."""
    from published_clips import CONFIG, random_weights, write_processor, write_tokenizer
    from safetensors.numpy import save_file

    good = folder / "good"
    write_tokenizer(good)
    write_processor(good)
    (good / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(random_weights(), good / "model.safetensors")
    names = ("config.json", "config.json", "preprocessor_config.json", "vocab.json", "merges.txt", "model.safetensors")
    opened = shutil.copytree(good, folder / "opened")

    def case(rng: random.Random) -> str:
        name = rng.choice(names)
        data = (good / name).read_bytes()
        if name.endswith("json") and rng.random() < 0.7:
            data = as_json(changed_value(json.loads(data), rng))
        else:
            data = changed_bytes(data, rng)
        (opened / name).write_bytes(data)
        try:
            load_clip(str(opened))
        finally:
            shutil.copy(good / name, opened / name)
        return READ

    return case


def _places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field of a config and of the configs in it."""
    for field in dataclasses.fields(value):
        yield (*path, field.name)
        if dataclasses.is_dataclass(getattr(value, field.name)):
            yield from _places(getattr(value, field.name), (*path, field.name))


def config(folder: Path) -> Case:
    """The file of a config with one of its fields set to something odd."""
    from rac3.cli import load_experiment

    places = list(_places(tiny_config.get_config()))
    odd = [repr(value) for value in VALUES if value == value and value not in (float("inf"), -float("inf"))]
    odd += ["float('nan')", "float('inf')", "print", "int", "object()", "lambda: 0", "{1: 2}", "b'a'", "...", "1/0"]
    odd += ["(_ for _ in ())", "__import__('sys').exit(0)", "range(3)", "(1, 'a')", "tiny_config", "type(e)"]

    def case(rng: random.Random) -> str:
        path, number = rng.choice(places), rng.randrange(10**9)
        value = rng.choice(odd)
        for depth in range(len(path) - 1, -1, -1):
            value = f"replace({'.'.join(('e', *path[:depth]))}, {path[depth]}={value})"
        lines = ["from dataclasses import replace", "import tiny_config", "def get_config():"]
        lines += ["    e = tiny_config.get_config()", f"    return {value}", ""]
        file = folder / f"mine_{number}.py"
        file.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
        try:
            recipes.train(load_experiment(str(file)))
        finally:
            file.unlink()
        return READ

    return case


def _options(stage: str) -> list[str]:
    from rac3.cli import parse

    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        parse(stage, tiny_config.get_config(), ["--help"])
    return sorted(set(re.findall(r"--[a-z][a-z0-9.-]*", output.getvalue())))


def command(folder: Path) -> Case:
    """The command line: options of each stage with odd values, in odd places, cut and doubled."""
    from rac3.cli import STAGES, parse

    tiny = tiny_config.get_config()
    stages = [name for name in STAGES if name != "quickstart"]
    names = [name for stage in ("train", "generate", "evaluate") for name in _options(stage)]
    odd = [str(value) for value in (*VALUES, *NUMBERS)] + [
        "--",
        "-1",
        "--seed",
        "retriever:exact",
        "retriever:",
        "=",
        "{1",
    ]

    def case(rng: random.Random) -> str:
        words: list[str] = []
        for _ in range(rng.choice((1, 1, 2, 4))):
            name = rng.choice(names)
            name = changed_bytes(name.encode(), rng).decode(errors="replace") if rng.random() < 0.2 else name
            words += [name] + [rng.choice(odd) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        if {"-h", "--help"} & set(words):
            return READ
        parse(rng.choice(stages), tiny, words)
        return READ

    return case


def takedowns(folder: Path) -> Case:
    """A file of keys: never fewer of the lines that were left alone than before."""
    keys = [f"00000/{number:05d}" for number in range(5)]
    good = ("\n".join(keys) + "\n").encode()

    def case(rng: random.Random) -> str:
        (folder / "keys.txt").write_bytes(changed_bytes(good, rng))
        found = recipes.takedown_keys(dataclasses.replace(tiny_config.get_config(), takedowns=str(folder / "keys.txt")))
        left = set((folder / "keys.txt").read_bytes().decode().split("\n")) & set(keys)
        assert left <= set(found), f"the keys {left - set(found)} are not read"
        return READ

    return case


def workdir_file(folder: Path, finished: Path | None = None) -> Case:
    """A file of a finished run: what is read in spite of the damage is what was there before."""
    import jax
    from workdir_files import FILES, READERS, folder_of, linked

    import rac3 as package
    from rac3.cli import run

    if finished is None:
        finished = folder / "finished"
        run(["run", tiny_config.__file__, "--workdir", str(finished), "--no-compare-with-cm3"])
    copy = linked(finished, folder / "copy")
    opened = package.load(copy)
    stages = [stage for stage in FILES if stage not in ("evaluation", "best", "index")]
    before = {stage: jax.tree.map(np.asarray, READERS[stage](opened)) for stage in stages}
    files = [(stage, path) for stage in stages for path in folder_of(opened, stage).rglob("*") if path.is_file()]
    files = [
        (stage, path) for stage, path in files if path.relative_to(folder_of(opened, stage)).parts[0] != "checkpoints"
    ]

    def case(rng: random.Random) -> str:
        stage, path = rng.choice(files)
        good = path.read_bytes()
        path.unlink()  # the finished run shares it
        path.write_bytes(changed_bytes(good, rng))
        try:
            after = jax.tree.map(np.asarray, READERS[stage](package.load(copy)))
        finally:
            path.write_bytes(good)
        jax.tree.map(np.testing.assert_array_equal, after, before[stage])
        return READ

    return case


KINDS: dict[str, Callable[[Path], Case]] = {
    "tar": tar,
    "image": image,
    "table": table,
    "json": settings("json", as_json),
    "yaml": settings("yaml", as_yaml),
    "torch": torch_file,
    "safetensors": safetensors,
    "tokenizer": tokenizer,
    "vqgan": vqgan,
    "clip": clip,
    "config": config,
    "command": command,
    "takedowns": takedowns,
    "workdir": workdir_file,
}
SECONDS = 30.0  # of one case, on a processor
LINE = 2000  # characters of a message


class TooLongError(BaseException):
    """A case took more than `SECONDS`. No handler of errors in rac3 catches it."""


def outcome(case: Case, seed: int) -> str:
    """What became of one case: `read`, `rejected` or `refused`.

    Raises:
      TooLongError: it took too long.
      ValueError: the message of a refusal is empty, or too long to be read.
      Exception: any other error of the reader.
    """

    def late(signum: int, frame: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return case(random.Random(seed))
    except (InputError, OSError) as error:
        if not 0 < len(str(error)) <= LINE:
            raise ValueError(f"a message of {len(str(error))} characters") from error
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
