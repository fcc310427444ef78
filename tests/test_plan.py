"""The plan's arithmetic, and what it refuses."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny_config

from rac3.artifacts import Workdir
from rac3.cli import run
from rac3.config import InputError, load_config_module
from rac3.plan import plan
from rac3.retrieval.controls import NoRetriever
from rac3.retrieval.exact import Exact
from rac3.retrieval.scann import Scann
from rac3.scale import Scale
from rac3.tokens.vqgan import VQGAN

PAPER = load_config_module(str(Path(__file__).parents[1] / "configs" / "ra_cm3_2_7b.py")).get_config()


def table(experiment, folder) -> dict[str, list[str]]:
    """Cells by stage; two blanks part the columns."""
    lines = plan(experiment, Workdir(folder / "work", experiment.name)).splitlines()[3:]
    return {cells[0]: cells[1:] for cells in ([c for c in line.split("  ") if c] for line in lines)}


def test_the_papers_memory(tmp_path, capsys):
    run(["plan", "configs/ra_cm3_2_7b.py", "--workdir", str(tmp_path / "work")])
    out = capsys.readouterr().out
    assert "150,000,000 train documents on 32 x 96 cores, 1 TB, 8 GPUs" in out
    assert not (tmp_path / "work").exists()  # nothing is made
    rows = table(PAPER, tmp_path)
    flops = 2 * 150e6 * 2.0 * 150e6 * 768  # two queries a document, an inner product with each
    assert float(rows["retrieve"][0]) == pytest.approx(flops, rel=0.02)
    assert rows["retrieve"][1].strip() == f"{flops / (256 * 312e12 * 0.4) / 60:.3g} min"


def test_scann_of_the_papers_memory_and_what_does_not_fit(tmp_path, capsys):
    scann = replace(PAPER, retriever=Scann(num_neighbors=32))
    cells = [cell.strip() for cell in table(scann, tmp_path)["index"]]
    # the float array twice, once to build from and once to reorder with, and a quarter of a byte per dimension
    assert f"{(2 * 150e6 * 768 * 4 + 150e6 * 768 / 4) / 1e9:.3g} GB" in cells
    small = replace(scann, scale=replace(scann.scale, memory_gb=400.0))
    with pytest.raises(InputError, match=r"index: Scann takes 950 GB .* a host has 400 GB; use retriever:exact"):
        table(small, tmp_path)
    assert "ingest" in capsys.readouterr().out  # the table stands above the line
    assert table(replace(small, retriever=Exact()), tmp_path)


def test_blocks_that_no_gpu_holds(tmp_path):
    # a device holds two blocks of 2 bytes x 768 at least
    huge = replace(PAPER, retriever=Exact(dtype="bfloat16", block_rows=100_000_000))
    with pytest.raises(InputError, match=r"retrieve: Exact takes 307 GB of each GPU's memory, which is 80 GB; lower"):
        table(replace(huge, scale=replace(huge.scale, memory_gb=1e4)), tmp_path)


def test_documents_are_counted_or_asked_for(tmp_path):
    tiny = tiny_config.get_config()
    # 12 seen entities of 3 documents; 4 unseen ones join the memory
    first = plan(tiny, Workdir(tmp_path / "work", "tiny")).splitlines()[0]
    assert "36 train + 12 memory documents" in first
    unknown = replace(PAPER, scale=Scale())
    with pytest.raises(InputError, match=r"train has is known once it is ingested; say --scale\.documents N"):
        table(unknown, tmp_path)


def test_flops_of_the_encoders_are_those_of_their_programs(tmp_path):
    tiny = tiny_config.get_config()
    model = VQGAN(tiny.vqgan.model)
    pixels = jax.ShapeDtypeStruct((1, 40, 40, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), pixels)
    program = jax.jit(lambda p, x: model.apply(p, x, method="encode")).lower(params, pixels).compile()
    expected = 48 * program.cost_analysis()["flops"]
    assert float(table(tiny, tmp_path)["ingest"][0]) == pytest.approx(expected, rel=0.1)  # two digits, and fusion


@dataclass(frozen=True)
class Mine:
    num_neighbors: int = 4

    def build(self, part, folder): ...

    def open(self, part, folder): ...


def test_a_retriever_that_does_not_say_what_it_needs(tmp_path):
    rows = table(replace(tiny_config.get_config(), retriever=Mine()), tmp_path)
    assert [cell.strip() for cell in rows["retrieve"]][:3] == ["-", "-", "not known of this retriever"]
    assert "retrieve" not in table(replace(tiny_config.get_config(), retriever=NoRetriever()), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"hosts": 0}, "hosts=0 must be above 0"), ({"utilization": 1.5}, "outside"), ({"gpus": -1}, "gpus=-1 is neg")],
)
def test_bad_scale(wrong, message):
    with pytest.raises(InputError, match=message):
        Scale(**wrong)
