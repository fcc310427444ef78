"""The data set of emoji: from hand-made packages of four sets, with a plain color for each icon."""

import base64
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest

from rac3.config import InputError
from rac3.documents.document import Document, Text
from rac3.documents.webdataset import WebDataset

STYLES = ("a", "b", "c", "d")
COUNT = 60  # subjects in all sets; one more is in three alone


def packed(files: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def code(number: int) -> str:
    return f"1F{number:03X}"


@pytest.fixture
def made(emoji_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the packages in it. Set c is without code points; set d has other names for them."""
    names = [
        {"hexcode": f"{code(n)}-FE0F", "label": f"Thing {n}", "tags": ["toy"], "group": 0} for n in range(COUNT + 1)
    ]
    names += [{"hexcode": code(99), "label": "light skin tone", "tags": [], "group": 1}]
    messages = {"groups": [{"key": "objects", "order": 0}, {"key": "component", "order": 1}]}
    files = {"names": {"en/data.json": names, "en/messages.json": messages}}
    for style in STYLES:
        own = "d-" if style == "d" else ""
        count = COUNT if style == "c" else COUNT + 1
        icons = {f"{own}thing-{n}": {"body": f"<{style} {n}/>"} for n in range(count)}
        icons[f"{own}thing-1"]["width"] = 30
        aliases = {f"{own}thing-0": {"parent": f"{own}zero"}}
        icons[f"{own}zero"] = icons.pop(f"{own}thing-0")
        files[style] = {"icons.json": {"icons": icons, "aliases": aliases, "width": 20, "height": 10}}
        if style != "c":
            files[style]["chars.json"] = {code(n).lower(): f"{own}thing-{n}" for n in range(count)}
    packages = {}
    (tmp_path / "set" / "packages").mkdir(parents=True)
    for name, content in files.items():
        data = packed(content)
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
        packages[name] = emoji_data.Package(f"@x/{name}", "1.0.0", integrity, f"license {name}", f"style {name}")
        (tmp_path / "set" / "packages" / f"{name}-1.0.0.tgz").write_bytes(data)
    monkeypatch.setattr(emoji_data, "NAMES", packages.pop("names"))
    monkeypatch.setattr(emoji_data, "SETS", tuple(packages.values()))
    monkeypatch.setattr(emoji_data, "draw", plain)
    return tmp_path / "set"


def plain(svg: str) -> bytes:
    """A picture that tells the set and the number of an icon."""
    found = re.fullmatch(r'<svg [^>]*viewBox="0 0 (\d+) 10"><([a-d]) (\d+)/></svg>', svg)
    assert found, svg
    assert int(found[1]) == (30 if found[3] == "1" else 20)
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), (STYLES.index(found[2]), int(found[3]), 0)).save(file, "png")
    return file.getvalue()


def documents(folder: Path, name: str) -> list[Document]:
    source = WebDataset(name)
    found = [each for shard in source.shards(folder) for each in source.read(folder, shard)]
    documents = [each for each in found if isinstance(each, Document)]
    assert len(documents) == len(found)  # no rejects, no notes
    return documents


def shown(document: Document) -> tuple[int, int]:
    """The number of the set and of the subject that its picture shows."""
    style, number, _ = document.images[0].pixels()[0, 0].tolist()
    return style, number


def test_each_split_has_the_pictures_that_it_promises(emoji_data: ModuleType, made: Path):
    counts = emoji_data.make(made, 0, "none")
    splits = {name: documents(made, name) for name in counts}
    assert {name: len(each) for name, each in splits.items()} == counts
    pictures = Counter(shown(each) for found in splits.values() for each in found)
    assert pictures == {(style, number): 1 for style in range(4) for number in range(COUNT)}  # none with three alone
    subjects = {name: {shown(each)[1] for each in found} for name, found in splits.items()}
    assert subjects["validation"] <= subjects["train"]
    assert subjects["unseen-memory"] == subjects["unseen-test"] | subjects["unseen-tuning"]
    assert not subjects["unseen-memory"] & subjects["train"]
    assert not subjects["unseen-test"] & subjects["unseen-tuning"]
    asked = Counter(shown(each)[1] for name in ("unseen-test", "unseen-tuning") for each in splits[name])
    assert set(asked.values()) == {2}
    assert 4 <= len(asked) <= 20  # 18% of 60
    assert splits["validation"]


def test_a_picture_comes_with_what_it_shows(emoji_data: ModuleType, made: Path):
    emoji_data.make(made, 0, "none")
    forms = set()
    for each in documents(made, "train"):
        style, number = shown(each)
        metadata, name = each.metadata, f"thing {number}"
        assert (metadata["concept"], metadata["hexcode"]) == (name, f"{code(number)}-FE0F")
        assert (metadata["style"], metadata["license"]) == (f"style {STYLES[style]}", f"license {STYLES[style]}")
        (text,) = (part.text for part in each.segments if isinstance(part, Text))
        assert metadata["caption"] == text
        forms.add(text.replace(name, "NAME").replace(metadata["style"], "STYLE"))
    assert forms == {"NAME in STYLE style"}
    table = pyarrow.parquet.read_table(made / "train" / "00000.parquet")
    with tarfile.open(made / "train" / "00000.tar") as tar:
        assert [name for name in tar.getnames() if name.endswith(".png")] == [
            f"{key}.png" for key in table["key"].to_pylist()
        ]
    assert json.loads((made / "train" / "00000_stats.json").read_text())["count"] == len(table)


def test_the_same_command_goes_on(emoji_data: ModuleType, made: Path):
    emoji_data.make(made, 0, "none")
    before = (made / "train" / "00000.tar").read_bytes()
    (made / "train").rename(made / "train.partial")
    kept = (made / "unseen-test" / "00000.tar").stat().st_mtime_ns
    emoji_data.make(made, 0, "none")
    assert (made / "train" / "00000.tar").read_bytes() == before
    assert not (made / "train.partial").exists()
    assert (made / "unseen-test" / "00000.tar").stat().st_mtime_ns == kept
    with pytest.raises(InputError, match="holds pictures of another seed"):
        emoji_data.make(made, 1, "none")


def test_seeds_split_apart(emoji_data: ModuleType, made: Path):
    archives = {each: made / "packages" / f"{each.name[3:]}-1.0.0.tgz" for each in emoji_data.SETS}
    names, messages = emoji_data.read_json(made / "packages" / "names-1.0.0.tgz", "en/data.json", "en/messages.json")
    known = emoji_data.subjects(names, {each["order"]: each["key"] for each in messages["groups"]})
    assert len(known) == COUNT + 1
    found = emoji_data.icons(known, archives)
    first, second = (
        {icon.subject["concept"] for icon in emoji_data.split(found, seed)["unseen-memory"]} for seed in (0, 1)
    )
    assert first != second
    values = np.array([emoji_data.uniform(0, str(number)) for number in range(2000)])
    assert abs(values.mean() - 0.5) < 0.03
    assert abs((values < 0.18).mean() - 0.18) < 0.03


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda out: (out / "packages" / "a-1.0.0.tgz").write_bytes(b"x"),
            "a-1.0.0.tgz is damaged: its SHA-512 is another",
        ),
        (lambda out: (out / "packages" / "b-1.0.0.tgz").unlink(), "/@x/b/-/b-1.0.0.tgz can't be read"),
        (lambda out: (out / "mine.txt").write_text("mine"), "holds other files; use a new --out"),
    ],
    ids=["damaged", "no registry", "other files"],
)
def test_what_cannot_be_made_is_refused(emoji_data: ModuleType, made: Path, damage: Damage, said: str):
    damage(made)
    with pytest.raises(InputError, match=said):
        emoji_data.make(made, 0, made.parent.as_uri())
    assert not (made / "train").exists()


def test_another_version_of_a_package_is_refused_and_not_kept(emoji_data: ModuleType, made: Path):
    registry = made.parent / "@x" / "a" / "-"
    registry.mkdir(parents=True)
    path = made / "packages" / "a-1.0.0.tgz"
    (registry / "a-1.0.0.tgz").write_bytes(path.read_bytes())
    whole = path.read_bytes()
    path.unlink()
    assert emoji_data.fetched(emoji_data.SETS[0], made / "packages", made.parent.as_uri()) == path
    assert path.read_bytes() == whole
    path.unlink()
    other = replace(emoji_data.SETS[0], integrity="sha512-other")
    with pytest.raises(InputError, match=r"is not @x/a 1\.0\.0: its SHA-512 is another"):
        emoji_data.fetched(other, made / "packages", made.parent.as_uri())
    assert not path.exists()


def test_a_real_icon_is_drawn_on_white(emoji_data: ModuleType):
    pytest.importorskip("resvg_py")
    icon = {"body": '<path fill="#f00" d="M0 0h8v16H0z"/>'}
    pixels = np.asarray(PIL.Image.open(io.BytesIO(emoji_data.draw(emoji_data.svg_of({"icons": {"x": icon}}, "x")))))
    assert pixels.shape[:2] == (64, 64)
    assert pixels[32, 16, :3].tolist() == [255, 0, 0]
    assert pixels[32, 48, :3].tolist() == [255, 255, 255]
