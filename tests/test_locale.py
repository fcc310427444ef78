"""The command in a locale that has ASCII alone makes the same artifacts as under UTF-8, whatever keys are called."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rac3.documents.document import encode_png

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
FOLDER, SHARD, KEYS = (
    "\u8349\u539f",
    "\u30ab-0",
    ("\u30ad\u30c4\u30cd", "\u043b\u0438\u0441\u0430", "fuchs", "\u00fcber", "\u72d0"),
)
CONFIG = """# \u72d0
from handmade import PlainCodec, PlainEncoder
from rac3.documents.webdataset import WebDataset
from rac3.experiment import Data, Experiment
from rac3.retrieval.exact import Exact
from rac3.tokens.text import TextTokenizer


def get_config():
    plain = dict(text=TextTokenizer(vocab_size=256), vqgan=PlainCodec(), clip=PlainEncoder(), retriever=Exact())
    return Experiment("locale", Data(WebDataset("data")), max_reject_fraction=0.5, **plain)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard with a damaged picture, a config, and takedowns, all of them with other letters than ASCII has."""
    folder = tmp_path_factory.mktemp("locale") / FOLDER
    (folder / "data").mkdir(parents=True)
    with tarfile.open(folder / "data" / f"{SHARD}.tar", "w", encoding="utf-8") as tar:
        for number, key in enumerate(KEYS):
            picture = encode_png(np.full((2, 2, 3), number, np.uint8)) if number else b"damaged"
            for name, data in ((f"{key}.png", picture), (f"{key}.txt", f"{key} {number}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / "c.py").write_text(CONFIG, encoding="utf-8")
    (folder / "keys.txt").write_text(f"{SHARD}/{KEYS[1]}\n", encoding="utf-8")
    return folder


def test_an_ascii_locale_makes_the_same_artifacts(folder: Path, rac3: Callable[..., int]):
    arguments = ("prepare", str(folder / "c.py"), "--data-dir", str(folder), "--takedowns", str(folder / "keys.txt"))
    assert rac3(*arguments, "--workdir", str(folder / "utf-8")) == 0
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    done = subprocess.run(
        [sys.executable, "-c", "from rac3.cli import main; main()", *arguments, "--workdir", str(folder / "ascii")],
        env={**kept, **ASCII, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    made = {name: sorted((folder / name).glob("*/*/manifest.json")) for name in ("ascii", "utf-8")}
    stages = {name: [path.parts[-3:] for path in paths] for name, paths in made.items()}
    assert len(stages["ascii"]) >= 6
    assert stages["ascii"] == stages["utf-8"]
    for path in ("rejects.jsonl", "key_hashes.npy"):
        (ours,), (theirs,) = (list((folder / name).glob(f"documents/*/{path}")) for name in made)
        assert ours.read_bytes() == theirs.read_bytes()
    assert f"{SHARD}/{KEYS[0]}" in next(folder.glob("ascii/documents/*/rejects.jsonl")).read_text(encoding="utf-8")
