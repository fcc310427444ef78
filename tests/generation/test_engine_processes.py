"""Two processes of four devices draw what one device draws."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, free_port

DRAW = """
import sys
import jax
import jax.numpy as jnp
import numpy as np

count, number, port = map(int, sys.argv[1:])
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, number)

from plain_transformer import random_params
from rac3.devices.mesh import MeshConfig
from rac3.generation.engine import Engine
from rac3.generation.request import Draw, Request
from rac3.generation.sampling import Sampling
from rac3.model.transformer import TransformerConfig
from rac3.tokens.html import Sequenced
from rac3.tokens.vocabulary import Vocabulary

vocabulary = Vocabulary(text_size=40, image_size=30)
config = TransformerConfig(num_layers=2, embed=32, num_heads=4, mlp=48, rotary_offsets=True, dtype="float32")
model = config.build(128, 64, 64)
mesh = MeshConfig(*((2, 2, 2) if count > 1 else (1, 1, 1))).build()
boxed = jax.eval_shape(model.init, jax.random.key(0), *[jnp.zeros((1, 2), jnp.int32)] * 4)
params = jax.tree.map(
    lambda leaf, like: jax.make_array_from_callback(leaf.shape, like.sharding, lambda index: leaf[index]),
    random_params(model), mesh.abstract(boxed),
)
engine = Engine(model, params, vocabulary, mesh, rows=16)
text = Draw(vocabulary.is_text(np.arange(128)), 12, stop=5)
prompts = [np.arange(8, 8 + size, dtype=np.int32) for size in (3, 20, 11, 1, 30)]
given = [Sequenced(ids, np.arange(1, len(ids) + 1, dtype=np.int32)) for ids in prompts]
requests = [Request([prompt], [text], 3) for prompt in given]
requests += [Request([given[1], prompt], [text], 2, endings=2) for prompt in given[2:]]
found = dict(engine.run(requests, [Sampling(temperature=2.0)] * 8, [7] * 8))
print([sample.runs[0].tolist() for index in range(8) for sample in found[index]])
"""


@pytest.mark.slow
def test_two_processes_draw_what_one_device_draws():
    port = str(free_port())
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

    def started(count: int, number: int) -> subprocess.Popen[str]:
        devices = f"--xla_force_host_platform_device_count={4 if count > 1 else 1}"
        environment = os.environ | {"XLA_FLAGS": " ".join([*flags, devices]), "PYTHONPATH": path}
        command = [sys.executable, "-c", DRAW, str(count), str(number), port]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    processes = [started(2, 0), started(2, 1), started(1, 0)]
    ended = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    assert [code for _, _, code in ended] == [0, 0, 0], [err[-3000:] for _, err, _ in ended]
    printed = [out.strip().splitlines()[-1] for out, _, _ in ended]
    assert printed[0] == printed[1] == printed[2]
    assert len(set(printed[0].split("], ["))) > 10
