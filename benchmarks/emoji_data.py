"""Real pictures with captions: emoji in ten openly licensed styles, as shards in img2dataset's layout.

    pip install resvg_py
    python benchmarks/emoji_data.py --out DIR
    rac3 run configs/emoji_captions.py --data-dir DIR

Reads icon sets and names from the npm registry (`SETS`, `NAMES`: 36 MB, kept in DIR/packages), each of a fixed version
that is checked by its SHA-512, and draws every icon at 64 x 64 pixels on white. Nothing of a package is run.

    DIR/train            subjects in all styles but those of `validation`
    DIR/validation       the same subjects in other styles
    DIR/unseen-memory    other subjects, in all styles but two
    DIR/unseen-tuning    half of these subjects in the two styles that are left: to choose settings with
    DIR/unseen-test      the other half likewise

A caption names the subject and the style ("swan in glossy style"). The metadata of a picture says its `concept` (the
name), `hexcode`, `group`, `style`, `license` and where it is from. A drawing has no size in pixels: `original_width`
and `original_height` are 512, so that a filter of small pictures keeps it.

A split has its final name only when it is complete; the same command goes on after a kill.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rac3.artifacts.workdir import write_atomic
from rac3.config import InputError
from rac3.execution.progress import Progress

REGISTRY = "https://registry.npmjs.org"
SIDE, DRAWN = 64, 512  # pixels of a picture; and what stands for the size of a drawing
LEAST_STYLES = 4  # of a subject
UNSEEN, HELD_OUT = 0.18, 0.04  # shares: of the subjects; of the pictures of those that are trained on
SAMPLES = 2000  # of a shard
LARGEST = 2**28  # bytes of a file in a package
CAPTION = "{concept} in {style} style"
SOURCES = "sources.json"


@dataclass(frozen=True)
class Package:
    """A package of the registry.

    Attributes:
      integrity: its SHA-512, as npm writes it.
      license: of the pictures in it.
      style: words for captions.
    """

    name: str
    version: str
    integrity: str
    license: str
    style: str = ""


NAMES = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
)
SETS = (
    Package(
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "shaded",
    ),
    Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "soft",
    ),
    Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "plain",
    ),
    Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
        "outlined",
    ),
    Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT",
        "glossy",
    ),
    Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "flat",
    ),
    Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
        "black and white",
    ),
    Package(
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "bright",
    ),
    Package(
        "@iconify-json/emojione-v1",
        "1.2.3",
        "sha512-UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
        "CC-BY-SA-4.0",
        "old",
    ),
    Package(
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "sha512-cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
        "CC-BY-4.0",
        "silhouette",
    ),
)


@dataclass(frozen=True)
class Icon:
    """One picture of a subject, and what its metadata says."""

    svg: str
    package: Package
    subject: Mapping[str, Any]

    @property
    def place(self) -> str:
        """What it is drawn from, which tells it apart from all others."""
        return f"{self.package.name}@{self.package.version}:{self.subject['hexcode']}"


def fetched(package: Package, folder: Path, registry: str) -> Path:
    """The package's archive, from the folder or from the registry.

    Raises:
      InputError: the registry can't be reached, or what it gives is not the package.
    """
    short = package.name.rpartition("/")[2]
    path = folder / f"{short}-{package.version}.tgz"
    if not path.is_file():
        url = f"{registry.rstrip('/')}/{package.name}/-/{short}-{package.version}.tgz"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                data = answer.read(LARGEST)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise InputError(f"{url} can't be read: {error}; give another --registry, or put {path} there") from error
        if _integrity(data) != package.integrity:
            raise InputError(f"{url} is not {package.name} {package.version}: its SHA-512 is another; use that version")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    elif _integrity(path.read_bytes()) != package.integrity:
        raise InputError(f"{path} is damaged: its SHA-512 is another; remove it, to fetch it again")
    return path


def _integrity(data: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


def read_json(archive: Path, *names: str) -> list[Any]:
    """Files of a package; None for one that it lacks."""
    with tarfile.open(archive) as tar:
        sizes = {member.name: member.size for member in tar.getmembers() if member.isreg()}
        found = []
        for name in names:
            size = sizes.get(f"package/{name}")
            file = None if size is None or size > LARGEST else tar.extractfile(f"package/{name}")
            found.append(None if file is None else json.load(file))
        return found


def subjects(names: list[dict[str, Any]], groups: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """By code points, the name and group of each emoji; other skins are the same subject."""
    return {
        _plain(each["hexcode"]): {
            "concept": each["label"].lower(),
            "hexcode": each["hexcode"],
            "group": groups[each["group"]],
        }
        for each in names
        if groups.get(each.get("group"), "component") != "component"
    }


def _plain(hexcode: str) -> str:
    """Without the selector that asks for a picture, which some sets leave out."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def icons(known: Mapping[str, dict[str, Any]], archives: Mapping[Package, Path]) -> dict[str, list[Icon]]:
    """By code points, the icons of each subject that has some in `LEAST_STYLES` sets.

    A set says which code points an icon is for, or has the names that other sets have for them.
    """
    drawn: dict[Package, Any] = {}
    own: dict[Package, dict[str, str]] = {}
    called: dict[str, list[str]] = {}
    for package, path in archives.items():
        drawn[package], chars = read_json(path, "icons.json", "chars.json")
        own[package] = {_plain(code): name for code, name in (chars or {}).items()}
        for code, name in own[package].items():
            called.setdefault(code, []).append(name)
    found: dict[str, list[Icon]] = {}
    for code, subject in known.items():
        mine = []
        for package, data in drawn.items():
            names = [own[package][code]] if code in own[package] else called.get(code, [])
            svg = next((svg for name in names if (svg := svg_of(data, name))), None)
            if svg:
                mine.append(Icon(svg, package, subject))
        if len(mine) >= LEAST_STYLES:
            found[code] = mine
    return found


def svg_of(data: Mapping[str, Any], name: str) -> str | None:
    """An icon of a set; None if it has none of this name."""
    name = data.get("aliases", {}).get(name, {}).get("parent", name)
    icon = data["icons"].get(name)
    if icon is None:
        return None
    left, top, width, height = (
        icon.get(key, data.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def draw(svg: str) -> bytes:
    """A PNG file of an icon, on white.

    Raises:
      InputError: resvg_py is not installed.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise InputError("resvg_py, which draws the icons, is not installed; run `pip install resvg_py`") from error
    return svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background="white", skip_system_fonts=True)


def split(found: Mapping[str, list[Icon]], seed: int) -> dict[str, list[Icon]]:
    """The pictures of each folder, in random order."""
    made: dict[str, list[Icon]] = {
        name: [] for name in ("train", "validation", "unseen-memory", "unseen-tuning", "unseen-test")
    }
    for code, drawn in found.items():
        chance = uniform(seed, code)
        shuffled = sorted(drawn, key=lambda icon: uniform(seed, icon.place))
        if chance < UNSEEN:
            made["unseen-test" if chance < UNSEEN / 2 else "unseen-tuning"] += shuffled[:2]
            made["unseen-memory"] += shuffled[2:]
        else:
            held_out = int(uniform(seed, code, "held out") < HELD_OUT * len(drawn))
            made["validation"] += shuffled[:held_out]
            made["train"] += shuffled[held_out:]
    return {name: sorted(each, key=lambda icon: uniform(seed, icon.place, "order")) for name, each in made.items()}


def uniform(seed: int, *of: str) -> float:
    """In [0, 1), by the seed and some words."""
    digest = hashlib.sha256("\0".join((str(seed), *of)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def caption(icon: Icon) -> str:
    """The name of the subject, and the style: together they ask for this picture and no other."""
    return CAPTION.format(concept=icon.subject["concept"], style=icon.package.style)


def write_split(folder: Path, drawn: list[Icon], update: Callable[[], None]) -> None:
    """Shards of tar, parquet and counts; the folder has its name when all of them are whole."""
    import pyarrow
    import pyarrow.parquet

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for shard, start in enumerate(range(0, len(drawn), SAMPLES)):
        rows = []
        with tarfile.open(partial / f"{shard:05d}.tar", "w") as tar:
            for number, icon in enumerate(drawn[start : start + SAMPLES]):
                row = {
                    "key": f"{shard:05d}{number:04d}",
                    "url": icon.place,
                    "caption": caption(icon),
                    **{name: icon.subject[name] for name in ("concept", "hexcode", "group")},
                    "style": icon.package.style,
                    "license": icon.package.license,
                    **{"width": SIDE, "height": SIDE, "original_width": DRAWN, "original_height": DRAWN},
                    **{"status": "success", "error_message": None},
                }
                rows.append(row)
                files = (("png", draw(icon.svg)), ("txt", row["caption"].encode()), ("json", json.dumps(row).encode()))
                for ending, data in files:
                    member = tarfile.TarInfo(f"{row['key']}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                update()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial / f"{shard:05d}.parquet")
        counts = {"count": len(rows), "successes": len(rows), "failed_to_download": 0, "failed_to_resize": 0}
        (partial / f"{shard:05d}_stats.json").write_text(json.dumps(counts) + "\n", encoding="utf-8")
    partial.rename(folder)


def record(seed: int) -> str:
    """What a folder is made of, by which another seed or version is refused."""
    packages = [{"name": each.name, "version": each.version, "license": each.license} for each in (NAMES, *SETS)]
    return json.dumps({"seed": seed, "caption": CAPTION, "packages": packages}, indent=2) + "\n"


def make(out: Path, seed: int, registry: str) -> dict[str, int]:
    """Makes the data set; the pictures of each split.

    Raises:
      InputError: `out` holds something else, or a package can't be had.
    """
    wanted, sources = record(seed), out / SOURCES
    if sources.is_file() and sources.read_text(encoding="utf-8") != wanted:
        raise InputError(
            f"{out} holds pictures of another seed, with other captions, or of other packages; use another --out"
        )
    if not sources.is_file() and out.is_dir() and any(each.name != "packages" for each in out.iterdir()):
        raise InputError(f"{out} holds other files; use a new --out")
    with Progress("packages", 1 + len(SETS), "packages") as bar:
        archives = {}
        for package in (NAMES, *SETS):
            archives[package] = fetched(package, out / "packages", registry)
            bar.update()
    names, messages = read_json(archives.pop(NAMES), "en/data.json", "en/messages.json")
    groups = {each["order"]: each["key"] for each in messages["groups"]}
    splits = split(icons(subjects(names, groups), archives), seed)
    write_atomic(sources, wanted)
    missing = {name: drawn for name, drawn in splits.items() if not (out / name).is_dir()}
    with Progress("pictures", sum(map(len, missing.values())), "pictures") as bar:
        for name, drawn in missing.items():
            write_split(out / name, drawn, bar.update)
    return {name: len(drawn) for name, drawn in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the splits")
    registry = os.environ.get("npm_config_registry") or REGISTRY  # noqa: SIM112  # as npm writes it
    parser.add_argument("--registry", default=registry, help="of npm packages; by default npm_config_registry")
    options = parser.parse_args()
    try:
        counts = make(options.out, options.seed, options.registry)
    except InputError as error:
        print(f"{error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(f"{name}: {count:,} pictures" for name, count in counts.items()))


if __name__ == "__main__":
    main()
