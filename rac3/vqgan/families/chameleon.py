"""transformers' ChameleonVQVAE, alone or inside a Chameleon: a folder with `config.json` and safetensors, whole or in
shards. It has no decoder; the checkpoint that Chameleon itself publishes has one, and is read as taming's.
"""

from rac3.config import InputError
from rac3.vqgan.checkpoint import VQGANCheckpoint
from rac3.vqgan.family import Family, below, vqgan_params
from rac3.vqgan.files import CheckpointFiles
from rac3.vqgan.model import VQGANConfig
from rac3.weights.port import Weights
from rac3.weights.settings import Settings, read_settings
from rac3.weights.weights_file import everything, read_weights

WHOLE = "chameleon"  # model_type of a Chameleon; of the VQGAN alone it is chameleon_vqgan
PREFIXES = ("model.vqmodel.", "vqmodel.")


def load(files: CheckpointFiles) -> VQGANCheckpoint:
    settings, whole = read_settings(files.configs[0]), files.kind == WHOLE
    wanted = (lambda name: name.startswith(PREFIXES)) if whole else everything
    weights: Weights = read_weights(files.index or files.weights[0], wanted)
    if not weights:
        raise InputError(f"{str(settings.file.parent)!r} has no weights of the VQGAN (model.vqmodel.*); use another")
    config = read_config(settings.part("vq_config") if whole else settings)
    weights = below(weights, PREFIXES)
    decoder = any(name.startswith("decoder.") for name in weights)
    params = vqgan_params(files.weights[0], config, weights, decoder=decoder)
    return VQGANCheckpoint(config, params, "transformers ChameleonVQVAE")


def read_config(vq: Settings) -> VQGANConfig:
    """From the `config.json` of a ChameleonVQVAE, or from the `vq_config` of a Chameleon's."""
    vq.require(double_latent=False)
    attention = vq.values.get("attn_type", "vanilla") == "vanilla"
    return VQGANConfig(
        ch=vq.get("base_channels", int, 128),
        ch_mult=vq.numbers("channel_multiplier", (1, 1, 2, 2, 4)),
        num_res_blocks=vq.get("num_res_blocks", int, 2),
        attn_resolutions=vq.numbers("attn_resolutions", ()) if attention else (),
        resolution=vq.get("resolution", int, 512),
        in_channels=vq.get("in_channels", int, 3),
        z_channels=vq.get("latent_channels", int, 256),
        embed_dim=vq.get("embed_dim", int, 256),
        n_embed=vq.get("num_embeddings", int, 8192),
        dropout=vq.get("dropout", float, 0.0),
        mid_attn=attention,
    )


def decodes(files: CheckpointFiles) -> bool:
    return bool(read_weights(files.index or files.weights[0], lambda name: name.endswith("decoder.conv_out.bias")))


FAMILY = Family(
    load,
    kinds=(WHOLE, "chameleon_vqgan"),
    weights=("model.safetensors.index.json", "model.safetensors"),
    prefixes=PREFIXES,
    decodes=decodes,
)
