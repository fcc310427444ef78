"""CLIP and VQGAN against the torch modules of transformers and diffusers: same weights, same inputs, same threads.

    python benchmarks/encoders.py [--threads 1 2] [--rounds 7] [--dtype float32] [--json FILE] [--small]

Needs the extra `parity`. Each number of threads gets its own process, pinned to as many cores, which runs ours and
torch's alternately. Prints the median ratio (above 1: ours is faster) with its extremes, and our share of the rate of a
large matrix product by JAX on the same cores. On a GPU, torch runs there too, compiled by torch.compile. `--small` is
for trying the script.
"""

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from measure import interleaved, ratio, record

PACKAGES = ("rac3", "jax", "jaxlib", "flax", "torch", "transformers", "diffusers", "numpy")


class Case(NamedTuple):
    """A measurement: one call of `ours` or `theirs` processes `items` images or texts."""

    name: str
    items: int
    flops: float | None  # of one call of `ours`, counted by XLA
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


def clip_cases(small: bool, dtype: str) -> Iterator[Case]:
    import jax
    import numpy as np
    import torch
    import transformers

    from rac3.clip.families import huggingface
    from rac3.clip.family import clip_params
    from rac3.clip.model import CLIP
    from rac3.weights.settings import Settings

    narrow = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    wide_text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    on_gpu = jax.default_backend() == "gpu"
    shapes: list[tuple[str, dict[str, Any], dict[str, Any], int, int]] = [
        ("ViT-B/32", {}, {}, 32, 32),
        ("ViT-L/14", wide_text, large, 4, 16),
    ]
    if small:
        shapes = [("small CLIP", narrow, {**narrow, "patch_size": 32}, 2, 2)]
    for name, text, vision, images, texts in shapes:
        images, texts = (256, 256) if on_gpu else (images, texts)
        theirs = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
        config = huggingface.read_config(Settings(Path(name), theirs.config.to_dict()))
        weights = {key: value.numpy() for key, value in theirs.state_dict().items()}
        params = jax.device_put(clip_params(Path(name), config, weights, huggingface.place))
        model = CLIP(config, dtype)
        theirs, device = to_device(theirs, dtype)
        rng = np.random.default_rng(0)
        pixels = rng.standard_normal((images, 224, 224, 3), np.float32)
        ids = rng.integers(1, 40_000, (texts, 77)).astype(np.int32)
        ids[:, -1] = config.text_config.eos_token_id
        their_pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(device, getattr(torch, dtype))
        their_ids = torch.from_numpy(ids.astype(np.int64)).to(device)
        embed_image = compiled(lambda p, x, m=model: m.apply({"params": p}, x, method="encode_image"), params, pixels)
        embed_text = compiled(lambda p, x, m=model: m.apply({"params": p}, x, method="encode_text"), params, ids)
        yield Case(f"{name} images", images, *embed_image, torch_call(theirs.get_image_features, their_pixels))
        yield Case(f"{name} texts of 77", texts, *embed_text, torch_call(theirs.get_text_features, their_ids))


def vqgan_cases(small: bool, dtype: str) -> Iterator[Case]:
    """A VQGAN with the shape of taming's f8: 256 x 256 pixels to 1,024 tokens."""
    import tempfile

    import diffusers
    import jax
    import numpy as np
    import torch

    from rac3.vqgan.model import VQGAN
    from rac3.vqgan.published import load_vqgan

    widths, size = ((32, 64), 32) if small else ((128, 256, 256, 512), 256)
    theirs = diffusers.VQModel(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=256,
        sample_size=size,
        num_vq_embeddings=8192,
        vq_embed_dim=256,
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        loaded = load_vqgan(Path(folder))
    model, params = VQGAN(loaded.config, dtype), jax.device_put(loaded.params)
    theirs, device = to_device(theirs, dtype)
    images = 16 if jax.default_backend() == "gpu" else 2
    pixels = np.random.default_rng(0).uniform(-1, 1, (images, size, size, 3)).astype(np.float32)
    their_pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(device, getattr(torch, dtype))
    encode = compiled(lambda p, x: model.apply({"params": p}, x, method="encode"), params, pixels)
    codes = np.asarray(encode[1]())
    decode = compiled(lambda p, x: model.apply({"params": p}, x, method="decode"), params, codes)
    grid = loaded.config.grid
    flat = torch.from_numpy(codes.reshape(-1).astype(np.int64)).to(device)

    def their_encode(pixels: Any) -> Any:
        return theirs.quantize(theirs.encode(pixels).latents)[2][2]

    def their_decode(codes: Any) -> Any:
        vectors = theirs.quantize.get_codebook_entry(codes, (images, grid, grid, 256))
        return theirs.decode(vectors, force_not_quantize=True).sample

    same = np.mean(np.asarray(their_encode(their_pixels).cpu()).reshape(codes.shape) == codes)
    print(f"VQGAN: {same:.2%} of the codes equal those of diffusers", flush=True)
    yield Case("VQGAN f8 encode", images, *encode, torch_call(their_encode, their_pixels))
    yield Case("VQGAN f8 decode", images, *decode, torch_call(their_decode, flat))


def pipeline_case(small: bool, dtype: str) -> Case:
    """512 x 512 JPEG files to vectors: decode, resize, ViT-B/32. Ours prepares in threads, ahead of the device."""
    import jax
    import numpy as np
    import PIL.Image
    import torch
    import transformers

    from rac3.clip.encoder import MixedEncoder
    from rac3.clip.families import huggingface
    from rac3.clip.family import clip_params
    from rac3.clip.model import CLIP
    from rac3.documents.document import Image
    from rac3.weights.settings import Settings

    theirs = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    config = huggingface.read_config(Settings(Path("ViT-B/32"), theirs.config.to_dict()))
    weights = {key: value.numpy() for key, value in theirs.state_dict().items()}
    params = clip_params(Path("ViT-B/32"), config, weights, huggingface.place)
    images = huggingface.read_images(Settings(Path("ViT-B/32"), {}), 224)
    batch = 256 if jax.default_backend() == "gpu" else 32
    text: Any = None  # no text is embedded
    encoder = MixedEncoder(
        CLIP(config, dtype),
        params,
        text,
        batch_size=batch,
        image_mean=images.mean,
        image_std=images.std,
        square=images.square,
    )
    theirs, device = to_device(theirs, dtype)
    rng = np.random.default_rng(0)
    files = []
    for _ in range(2 if small else 8 * batch if batch > 32 else 2 * batch):
        smooth = PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((512, 512))
        buffer = io.BytesIO()
        smooth.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    processor = transformers.CLIPImageProcessorPil() if hasattr(transformers, "CLIPImageProcessorPil") else None
    processor = processor or transformers.CLIPImageProcessor()

    def with_transformers() -> None:
        for start in range(0, len(files), batch):
            pictures = [PIL.Image.open(io.BytesIO(data)).convert("RGB") for data in files[start : start + batch]]
            pixels = processor(pictures, return_tensors="pt")["pixel_values"].to(device, getattr(torch, dtype))
            with torch.inference_mode():
                theirs.get_image_features(pixels)
        if device == "cuda":
            torch.cuda.synchronize()

    documents = [Image(data) for data in files]
    return Case("ViT-B/32 from JPEG", len(files), None, lambda: encoder.embed_images(documents), with_transformers)


def compiled(function: Callable[..., Any], params: Any, x: Any) -> tuple[float, Callable[[], Any]]:
    """The FLOPs of a function, and a call of it with its arguments on the device."""
    import jax

    x = jax.device_put(x)
    program = jax.jit(function).lower(params, x).compile()
    return float(program.cost_analysis()["flops"]), lambda: program(params, x).block_until_ready()


def torch_call(function: Callable[[Any], Any], x: Any) -> Callable[[], Any]:
    import torch

    if x.is_cuda:
        function = torch.compile(function)

    def call() -> None:
        with torch.inference_mode():
            function(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return call


def to_device(module: Any, dtype: str) -> tuple[Any, str]:
    import jax
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return module.to(device, getattr(torch, dtype)), device


def limit(dtype: str) -> float:
    """FLOP/s of a large matrix product: the most that a network can reach here."""
    import jax
    import jax.numpy as jnp

    n = 8192 if jax.default_backend() == "gpu" else 3072
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    times = interleaved({"product": lambda: product(a, a).block_until_ready()}, 5)["product"]
    return 2 * n**3 / min(times)


def measure(threads: int, rounds: int, dtype: str, small: bool) -> list[dict[str, Any]]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # before XLA counts the cores
    import torch

    torch.set_num_threads(threads)
    best, rows = limit(dtype), []
    cases = [*clip_cases(small, dtype), *vqgan_cases(small, dtype), pipeline_case(small, dtype)]
    for case in cases:
        times = interleaved({"ours": case.ours, "torch": case.theirs}, rounds)
        fastest = min(times["ours"])
        share = None if case.flops is None else round(case.flops / fastest / best, 3)
        found = ratio(times["torch"], times["ours"])
        rows.append(
            {
                "case": case.name,
                "threads": threads,
                "torch_over_ours": found,
                "items_per_second": round(case.items / fastest, 2),
                "torch_items_per_second": round(case.items / min(times["torch"]), 2),
                "share_of_matmul_rate": share,
                "matmul_gflops": round(best / 1e9),
            }
        )
        spread = f"{found['median']:.2f}x ({found['min']:.2f} to {found['max']:.2f})"
        of_limit = "" if share is None else f", {share:.0%} of the rate of a matrix product ({best / 1e9:.0f} GFLOP/s)"
        print(f"{threads} threads  {case.name:22} {spread}, {case.items / fastest:.4g}/s{of_limit}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # where a child process writes its results
    arguments = parser.parse_args()
    if arguments.rows:
        rows = measure(arguments.threads[0], arguments.rounds, arguments.dtype, arguments.small)
        arguments.rows.write_text(json.dumps(rows), encoding="utf-8")
        return
    import tempfile

    results = []
    for threads in arguments.threads:
        with tempfile.TemporaryDirectory() as folder:
            rows_file = Path(folder) / "rows.json"
            options = ["--threads", str(threads), "--rounds", str(arguments.rounds), "--dtype", arguments.dtype]
            options += ["--rows", str(rows_file), *(["--small"] if arguments.small else [])]
            subprocess.run([sys.executable, __file__, *options], check=True)
            results += json.loads(rows_file.read_text(encoding="utf-8"))
    if arguments.json:
        import jax

        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        command = f"python benchmarks/encoders.py --rounds {arguments.rounds} --dtype {arguments.dtype}"
        arguments.json.write_text(
            record(command, PACKAGES, results, device=device, dtype=arguments.dtype), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
