"""A VQGAN in rac3's own form, and the settings that choose one."""

import numpy as np
import pytest
from plain_vqgan import random_params
from published_vqgans import CONFIG, GUMBEL

from rac3.config import InputError
from rac3.vqgan.codec import VQGANCodec
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.model import VQGAN


def test_drawing_without_a_decoder_is_refused():
    model = VQGAN(CONFIG)
    params = random_params(model)
    del params["decoder"]
    codec = VQGANCodec(model, params)
    pixels = [np.zeros((40, 50, 3), np.uint8)]
    with pytest.raises(InputError, match="no decoder"):
        codec.decode(codec.encode(pixels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 256}, "vqgan.resolution=256 is for a checkpoint"),
        ({"model": GUMBEL}, "vqgan.model.quantizer='gumbel' can't be fitted here"),
    ],
)
def test_settings_of_checkpoints_are_refused_without_one(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        FrozenVQGAN(**settings)
    FrozenVQGAN(checkpoint="vqgan.ckpt", **settings)
