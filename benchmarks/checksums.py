"""What it costs that every file of a workdir is checked: opening artifacts, writing and reading arrays.

    python benchmarks/checksums.py --workdir runs/quickstart

`opening` checks all artifacts of a workdir as the stages that open them do. `arrays` writes 100,000 vectors of width
768 and reads them, with the CRC-32C of every chunk that rac3 stores, and without, in interleaved rounds in the page
cache.
`hashing` is SHA-256 over one file on one core. Results go to `benchmarks/results/checksums_cpu.json`.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from measure import interleaved, ratio, record, seconds

from rac3.artifacts.arrays import create_array, read_array, write_shard
from rac3.artifacts.files import damage, describe
from rac3.artifacts.workdir import Workdir

RESULTS = Path(__file__).parent / "results" / "checksums_cpu.json"
PACKAGES = ("rac3", "numpy", "tensorstore")
DOCUMENTS, WIDTH, SHARD = 100_000, 768, 65_536
MEGABYTES = 500  # that are hashed


def opening(workdir: Path, rounds: int) -> dict[str, Any]:
    """Seconds to compare all files of all artifacts with their manifests."""
    owner = json.loads((workdir / "workdir.json").read_text(encoding="utf-8"))["config"]
    artifacts = Workdir(workdir, owner).artifacts()
    files = [(each.folder, each.manifest["files"]) for each in artifacts]

    def check() -> None:
        assert not [found for folder, known in files for found in damage(folder, known)]

    return {
        "artifacts": len(files),
        "files": sum(len(known) for _, known in files),
        "megabytes": round(sum(size for _, known in files for size, _ in known.values()) / 1e6, 1),
        "seconds": round(statistics.median(interleaved({"check": check}, rounds)["check"]), 3),
    }


def unchecked(path: Path, like: Path) -> Any:
    """An array as `create_array` makes it, without checksums of its chunks."""
    spec = json.loads((like / "zarr.json").read_text(encoding="utf-8"))
    sharding = spec["codecs"][0]["configuration"]
    sharding["codecs"] = [each for each in sharding["codecs"] if each["name"] != "crc32c"]
    kept = {name: spec[name] for name in ("shape", "data_type", "fill_value", "chunk_grid", "codecs")}
    where = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open({**where, "metadata": kept, "open": True, "create": True}).result()


def arrays(rounds: int) -> dict[str, Any]:
    """Seconds to write and to read the vectors of 100,000 documents."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((DOCUMENTS, WIDTH), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        plain, checked = Path(folder) / "plain", Path(folder) / "checked"

        def write(path: Path) -> None:
            shutil.rmtree(path, ignore_errors=True)
            made = create_array(path, vectors.shape, "float32", SHARD)
            if path == plain:
                shutil.copytree(path, path.with_name("like"), dirs_exist_ok=True)
                shutil.rmtree(path)
                made = unchecked(path, path.with_name("like"))
            for number in range(-(-DOCUMENTS // SHARD)):
                write_shard(made, number, vectors[number * SHARD : (number + 1) * SHARD])

        written = interleaved({"plain": lambda: write(plain), "checked": lambda: write(checked)}, rounds)
        read = interleaved({"plain": lambda: read_array(plain), "checked": lambda: read_array(checked)}, rounds)
        np.testing.assert_array_equal(read_array(plain), read_array(checked))
        files = describe(checked)
        one = seconds(lambda: [*damage(checked, files)])
    return {
        "documents": DOCUMENTS,
        "megabytes": round(vectors.nbytes / 1e6),
        "write": _times(written),
        "read": _times(read),
        "opening_s": round(one, 4),
    }


def _times(found: dict[str, list[float]]) -> dict[str, Any]:
    seconds_of = {f"{name}_s": round(statistics.median(each), 2) for name, each in found.items()}
    return {**seconds_of, "times_plain": ratio(found["checked"], found["plain"])}


def hashing(rounds: int) -> dict[str, Any]:
    """Gigabytes a second."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_bytes(bytes(MEGABYTES * 10**6))
        found = interleaved({"hash": lambda: describe(Path(folder))}, rounds)["hash"]
    return {"gigabytes_per_second": round(MEGABYTES / 1e3 / statistics.median(found), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a finished workdir")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not (options.workdir / "workdir.json").is_file():
        parser.error(f"--workdir {options.workdir} is no workdir; run `rac3 quickstart` first")
    results = {
        "opening": opening(options.workdir, options.rounds),
        "arrays": arrays(options.rounds),
        "hashing": hashing(options.rounds),
    }
    command = f"python benchmarks/checksums.py --workdir {options.workdir.name} --rounds {options.rounds}"
    RESULTS.write_text(record(command, PACKAGES, results), encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
