"""The adversarial loss of VQGAN (arXiv 2012.09841, section 3.1): a discriminator that tells images from their
reconstructions, patch by patch, and the hinge losses of the two players.

    64 x 64 pixels -> three of conv 4x4 / 2 -> 8 x 8 -> conv 4x4 -> 7 x 7 -> conv 4x4 -> 6 x 6 logits
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rac3.config import InputError
from rac3.vqgan.model import Images

Logits = Float[Array, "batch rows columns 1"]
"""One for each patch, and above 0 where it looks real."""


@dataclass(frozen=True)
class AdversarialConfig:
    """The adversarial loss of a VQGAN's fit.

    Attributes:
      weight: of the generator's adversarial loss, on top of its adaptive weight (`objective.adaptive_weight`); 0
        switches it off, and taming-transformers uses 0.8.
      start: the step from which it counts. Before it, the discriminator is neither computed nor trained.
      ndf: channels of the discriminator's first layer; doubled by each layer, up to eight times as many.
      n_layers: convolutions that halve the image. With 3, a logit sees 70 x 70 pixels.
    """

    weight: float = 0.0
    start: int = 0
    ndf: int = 64
    n_layers: int = 3

    def __post_init__(self) -> None:
        if self.weight < 0 or self.start < 0:
            raise InputError(
                f"adversarial.weight={self.weight} and start={self.start} must not be negative; weight=0 switches off"
            )
        if min(self.ndf, self.n_layers) < 1:
            raise InputError(f"adversarial.ndf={self.ndf} and n_layers={self.n_layers} must be at least 1; 64 and 3 do")

    @property
    def min_resolution(self) -> int:
        """Pixels in height and width that leave one logit."""
        return 3 * 2**self.n_layers


class Discriminator(nn.Module):
    """The patch discriminator of pix2pix (arXiv 1611.07004), layers and initial weights as in taming-transformers.

    It normalizes by groups of channels in each image, where taming normalizes over the batch. Batch norm would need an
    all-reduce in each layer to mean the same on many devices as on one, separate statistics for real and reconstructed
    images, and running averages as one more state.
    """

    config: AdversarialConfig

    @nn.compact
    def __call__(self, images: Images) -> Logits:
        ndf, n_layers = self.config.ndf, self.config.n_layers
        h = images
        for layer in range(n_layers + 1):
            channels = ndf * min(2**layer, 8)
            h = _conv(channels, 2 if layer < n_layers else 1, f"conv_{layer}")(h)
            if layer:
                h = nn.GroupNorm(math.gcd(32, channels), epsilon=1e-5, name=f"norm_{layer}")(h)
            h = nn.leaky_relu(h, 0.2)
        return _conv(1, 1, "conv_out")(h)


def _conv(channels: int, strides: int, name: str) -> nn.Conv:
    padding = ((1, 1), (1, 1))
    return nn.Conv(channels, (4, 4), strides, padding, kernel_init=nn.initializers.normal(0.02), name=name)


def discriminator_loss(real: Logits, fake: Logits) -> Float[Array, ""]:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2: the hinge loss."""
    return 0.5 * (jnp.mean(nn.relu(1 - real)) + jnp.mean(nn.relu(1 + fake)))


def generator_loss(fake: Logits) -> Float[Array, ""]:
    """-mean fake."""
    return -jnp.mean(fake)
