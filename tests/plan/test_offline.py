"""The plan's arithmetic, and what it refuses."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny_config

from rac3.artifacts.workdir import Workdir
from rac3.cli import run
from rac3.config import InputError, load_config_module
from rac3.devices.cluster import Cluster
from rac3.plan.offline import plan
from rac3.plan.table import amount, duration
from rac3.retrieval.baselines import NoRetriever
from rac3.retrieval.exact import Exact
from rac3.retrieval.scann import Scann
from rac3.run import Run
from rac3.vqgan.model import VQGAN

PAPER = load_config_module(str(Path(__file__).parents[2] / "configs" / "ra_cm3_2_7b.py")).get_config()


def table(experiment, folder) -> dict[str, list[str]]:
    """Cells by stage; two blanks part the columns."""
    lines = plan(Run(experiment, Workdir(folder / "work", experiment.name))).splitlines()[3:]
    return {cells[0]: cells[1:] for cells in ([c for c in line.split("  ") if c] for line in lines)}


def test_the_papers_memory(tmp_path, capsys):
    run(["plan", "configs/ra_cm3_2_7b.py", "--workdir", str(tmp_path / "work")])
    out = capsys.readouterr().out
    assert "150,000,000 train documents on 32 x 96 cores, 1 TB, 8 x A100 of 80 GB" in out
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
    small = replace(scann, cluster=replace(scann.cluster, memory_gb=400.0))
    with pytest.raises(InputError, match=r"index: Scann takes 950 GB .* a host has 400 GB; use retriever:exact"):
        table(small, tmp_path)
    assert "ingest" in capsys.readouterr().out  # the table stands above the line
    assert table(replace(small, retriever=Exact()), tmp_path)


def test_blocks_that_no_gpu_holds(tmp_path):
    # a device holds two blocks of 2 bytes x 768 at least
    huge = replace(PAPER, retriever=Exact(dtype="bfloat16", block_rows=100_000_000))
    with pytest.raises(InputError, match=r"retrieve: Exact takes 307 GB of each GPU's memory, which is 80 GB; lower"):
        table(replace(huge, cluster=replace(huge.cluster, memory_gb=1e4)), tmp_path)


def test_documents_are_counted_or_asked_for(tmp_path):
    tiny = tiny_config.get_config()
    # 12 seen entities of 3 documents; 4 unseen ones join the memory
    first = plan(Run(tiny, Workdir(tmp_path / "work", "tiny"))).splitlines()[0]
    assert "36 train + 12 memory documents" in first
    unknown = replace(PAPER, cluster=Cluster())
    with pytest.raises(InputError, match=r"train has is known once it is ingested; say --cluster\.documents N"):
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
    [
        ({"hosts": 0}, "hosts=0 is not above 0; use a positive"),
        ({"gpu_tflops": -1.0}, r"gpu_tflops=-1.0 is neg"),
        ({"decode_images_per_second": 0.0}, "decode_images_per_second=0.0 is not above 0"),
        ({"utilization": 1.5}, "outside"),
        ({"utilization": 0.0}, "outside"),
        ({"gpus": -1}, "gpus=-1 is neg"),
        ({"documents": -1}, "documents=-1 is neg"),
        ({"memory_gb": -1.0}, r"memory_gb=-1.0 is neg"),
    ],
)
def test_bad_cluster(wrong, message):
    with pytest.raises(InputError, match=message):
        Cluster(**wrong)


def cells(experiment, folder) -> dict[str, list[str]]:
    """As `table`, with the empty cells: FLOP, time, limited by, host memory, GPU memory, disk."""
    head, *lines = plan(Run(experiment, Workdir(folder / "work", experiment.name))).splitlines()[2:]
    starts = [head.index(name) for name in ("FLOP", "time", "limited by", "host memory", "GPU memory", "disk")]
    ends = [*starts[1:], None]
    return {line.split()[0]: [line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines if line}


def test_what_the_paper_keeps_on_disk(tmp_path):
    """A record is a picture of 20 kB, 730 bytes, and 1,024 + 32 ids of two bytes; a vector 768 numbers of two bytes, of
    each document and of its two queries; a neighbor an id of 8 bytes and a score of 4, of each query 8."""
    rows = cells(PAPER, tmp_path)
    documents = 150e6 * (20_000 + 730 + 2 * (1024 + 32))
    vectors = 3 * 150e6 * 768 * 2
    neighbors = 2 * 150e6 * 8 * 12
    assert rows["ingest"][5] == f"{documents / 1e12:.3g} TB"
    assert rows["embed"][5] == f"{vectors / 1e9:.3g} GB"
    assert rows["retrieve"][5] == f"{neighbors / 1e9:.3g} GB"
    assert rows["all"][5] == f"{(documents + vectors + neighbors) / 1e12:.3g} TB"


@pytest.mark.parametrize(
    ("change", "disk"),
    [
        ({}, (48 + 2 * 36) * 64 * 4),
        ({"embedding_dtype": "bfloat16"}, (48 + 2 * 36) * 64 * 2),
        ({"embedding_dtype": "int8"}, (48 + 2 * 36) * 64),
        ({"num_views": 3}, (48 + 3 * 2 * 36) * 64 * 4),
    ],
)
def test_vectors_of_documents_and_of_each_view_of_training_queries(change, disk, tmp_path):
    """36 training documents and 12 of the memory, of width 64; those of the memory never ask."""
    experiment = replace(tiny_config.get_config(), **change)
    rows = cells(experiment, tmp_path)
    assert rows["embed"][5] == f"{disk / 1e3:.3g} kB"
    views = change.get("num_views", 1)
    assert rows["retrieve"][5] == f"{views * 2 * 36 * 8 * 12 / 1e3:.3g} kB"


def test_each_view_goes_through_clip_once_more(tmp_path):
    tiny = tiny_config.get_config()
    one, three = (float(cells(replace(tiny, num_views=views), tmp_path)["embed"][0]) for views in (1, 3))
    assert three / one == pytest.approx((48 + 3 * 36) / (48 + 36), rel=0.03)


def test_ids_beyond_two_bytes_take_four(tmp_path):
    tiny = tiny_config.get_config()
    wide = replace(tiny, text=replace(tiny.text, vocab_size=65_537))
    narrow = replace(tiny, text=replace(tiny.text, vocab_size=65_536))
    ids = tiny.vqgan.model.tokens_per_image + 32
    for experiment, size in ((narrow, 2), (wide, 4)):
        assert cells(experiment, tmp_path)["ingest"][5] == f"{48 * (20_730 + size * ids) / 1e6:.3g} MB"


def test_a_stage_is_as_slow_as_the_slowest_of_its_parts(tmp_path):
    """A tenth of a second for pictures on ten cores; with slow cores the model; with huge pictures the disks."""
    tiny = tiny_config.get_config()
    base = Cluster(cores=10, memory_gb=100.0, core_gflops=1e6, decode_images_per_second=48.0)
    flops = float(cells(replace(tiny, cluster=base), tmp_path)["ingest"][0])
    for cluster, limit, seconds in (
        (base, "decoding", 48 / (10 * 48)),
        (replace(base, core_gflops=1e-3), "the model", flops / (10 * 1e6 * 0.4)),
        (replace(base, image_kilobytes=1e9), "disks", 48 * 1e12 / 2e9),
    ):
        row = cells(replace(tiny, cluster=cluster), tmp_path)["ingest"]
        assert row[2] == limit
        number, unit = row[1].split()
        size = {"s": 1, "min": 60, "h": 3600, "days": 86_400}[unit]
        assert float(number) * size == pytest.approx(seconds, rel=0.06)


def test_indexes_are_built_on_one_host_and_hold_all_parts(tmp_path):
    """Build memory is that of the largest part, search memory that of all; a cluster does not build any faster."""
    tiny = tiny_config.get_config()
    cluster = Cluster(documents=3_000_000, memory_documents=1_000_000, cores=10, memory_gb=1000.0)
    scann = replace(tiny, retriever=Scann(), cluster=cluster)
    needs = [scann.retriever.needs(count, 64) for count in (3_000_000, 1_000_000)]
    one, two = (cells(replace(scann, cluster=replace(cluster, hosts=hosts)), tmp_path) for hosts in (1, 2))
    assert one["index"][3] == f"{needs[0].build_bytes / 1e9:.3g} GB"
    assert one["index"][1] == two["index"][1]
    held = min(2**30, 4e6 * 64 * 4)
    assert one["retrieve"][3] == f"{(needs[0].search_bytes + needs[1].search_bytes + held) / 1e9:.3g} GB"
    assert one["retrieve"][2] == "cores"
    queries = 2 * 3_000_000
    assert float(one["retrieve"][0]) == pytest.approx(queries * needs[0].query_flops, rel=0.06)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0.0, "-"), (10.0, "0.01 kB"), (999_000.0, "999 kB"), (1e6, "1 MB"), (2.5e9, "2.5 GB"), (3.38e12, "3.38 TB")],
)
def test_bytes_have_a_unit(number, shown):
    assert amount(number) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0.5, "0.5 s"), (119.0, "119 s"), (120.0, "2 min"), (7199.0, "120 min"), (7200.0, "2 h"), (172_800.0, "2 days")],
)
def test_times_have_a_unit(number, shown):
    assert duration(number) == shown


def test_the_cluster_is_the_product_of_its_parts():
    cluster = Cluster(
        hosts=3, cores=10, memory_gb=64.0, core_gflops=20.0, decode_images_per_second=7.0, utilization=0.5
    )
    assert cluster.cpu_flops == 3 * 10 * 20e9 * 0.5
    assert cluster.device_flops == cluster.cpu_flops
    assert cluster.decoded_per_second == 3 * 10 * 7
    assert cluster.host_bytes == 64e9
    gpus = replace(cluster, gpus=8, gpu_tflops=100.0)
    assert gpus.device_flops == 3 * 8 * 100e12 * 0.5
    assert gpus.cpu_flops == cluster.cpu_flops
    h100 = replace(cluster, gpus=8, gpu="H100")
    assert (h100.device_bytes, h100.device_flops, h100.link_bytes_per_second) == (80e9, 3 * 8 * 989e12 * 0.5, 450e9)
    assert replace(h100, gpu_memory_gb=94.0, link_gb_per_second=300.0).device_bytes == 94e9
    assert replace(h100, gpu_memory_gb=94.0, link_gb_per_second=300.0).link_bytes_per_second == 300e9
    assert Cluster().host_cores >= 1
    assert Cluster().host_bytes > 1e8
