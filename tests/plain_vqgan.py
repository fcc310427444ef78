"""The taming architecture in plain torch, and VQGANs of random parameters to compare with it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rac3.vqgan.model import VQGAN


def random_params(model: VQGAN, seed: int = 0) -> dict:
    """Parameters of the usual sizes, drawn with NumPy: compiling `init` takes longer than a whole test."""
    size, rng = model.config.resolution, np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]

    def draw(path, shape):
        values = rng.standard_normal(shape.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return jnp.asarray(values / np.sqrt(np.prod(shape.shape[:-1])))
        return jnp.asarray(0.1 * values + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@partial(jax.jit, static_argnums=(0, 3))
def apply(model: VQGAN, params: dict, x: jax.Array, method: str = "__call__"):
    return model.apply({"params": params}, x, method=method)


def torch_vqgan(w, config, x):
    """taming-transformers' encoder or decoder, as functions of its state dict; `x` is NCHW."""
    import torch
    import torch.nn.functional as F

    def conv(name, x, stride=1, padding=None):
        kernel = w[f"{name}.weight"]
        return F.conv2d(x, kernel, w[f"{name}.bias"], stride, kernel.shape[-1] // 2 if padding is None else padding)

    def norm(name, x):
        return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def resnet(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)

    def attention(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5, dim=2)
        return x + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))

    def level(name, blocks, x):
        for block in range(blocks):
            x = resnet(f"{name}.block.{block}", x)
            if x.shape[-1] in config.attn_resolutions:
                x = attention(f"{name}.attn.{block}", x)
        return x

    def middle(name, x):
        return resnet(f"{name}.mid.block_2", attention(f"{name}.mid.attn_1", resnet(f"{name}.mid.block_1", x)))

    def encode(x):
        x = conv("encoder.conv_in", x)
        for i in range(len(config.ch_mult)):
            x = level(f"encoder.down.{i}", config.num_res_blocks, x)
            if i < len(config.ch_mult) - 1:
                x = conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = conv("encoder.conv_out", F.silu(norm("encoder.norm_out", middle("encoder", x))))
        return conv("quant_conv", x)

    def decode(z):
        x = middle("decoder", conv("decoder.conv_in", conv("post_quant_conv", z)))
        for i in reversed(range(len(config.ch_mult))):
            x = level(f"decoder.up.{i}", config.num_res_blocks + 1, x)
            if i:
                x = conv(f"decoder.up.{i}.upsample.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return conv("decoder.conv_out", F.silu(norm("decoder.norm_out", x)))

    return encode(x) if x.shape[1] == config.in_channels else decode(x)
