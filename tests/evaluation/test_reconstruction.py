from dataclasses import dataclass

import numpy as np
import pytest

from rac3.documents.document import Picture, pixels_of, prepare_image
from rac3.evaluation.reconstruction import codebook_use, psnr, reconstruction_metrics, ssim


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_psnr_of_each_picture():
    black = np.zeros((3, 4, 4, 3), np.uint8)
    other = black.copy()
    other[1] += 16
    other[2] += 255  # no wrap-around
    np.testing.assert_allclose(psnr(black, other), [np.inf, 20 * np.log10(255 / 16), 0], atol=1e-9)
    np.testing.assert_allclose(psnr(other, black), psnr(black, other))


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """By the definition: every place of the window, one by one."""
    size = min(11, *a.shape[:2])
    line = np.exp(-((np.arange(size) - (size - 1) / 2) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    for channel in range(a.shape[2]):
        for top in range(a.shape[0] - size + 1):
            for left in range(a.shape[1] - size + 1):
                x, y = (p[top : top + size, left : left + size, channel].astype(np.float64) for p in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("size", [(16, 13), (7, 16)])
def test_ssim_is_the_definition(size):
    a = pictures(2, *size, 3)
    b = np.clip(a + np.random.default_rng(1).normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    # variances as differences of squares in float32: 255^2 * 2^-24, next to c2 = 58
    np.testing.assert_allclose(ssim(a, b), [plain_ssim(x, y) for x, y in zip(a, b, strict=True)], atol=1e-4)
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-6)


def test_ssim_falls_with_blur_and_does_not_mind_many_pictures():
    sharp = pictures(70, 16, 16, 3)
    blurred = (sharp // 2 + np.roll(sharp, 1, axis=1) // 2).astype(np.uint8)
    values = ssim(sharp, blurred)
    assert values.shape == (70,)
    assert (values < 0.9).all()
    np.testing.assert_allclose(values[64:], ssim(sharp[64:], blurred[64:]), atol=1e-6)


def test_codebook_use():
    assert codebook_use(np.array([[0, 1], [2, 3]]), 8) == pytest.approx((0.5, 4.0))
    assert codebook_use(np.zeros((2, 3), int), 8) == pytest.approx((0.125, 1.0))


@dataclass(frozen=True, eq=False)
class Redrawn:
    """An image tokenizer that gives each picture the codes, and the codes the pictures, that it has been told."""

    codes: np.ndarray
    drawn: np.ndarray
    codebook_size = 16
    tokens_per_image = 4
    resolution = 40

    def encode(self, images: list[Picture]) -> np.ndarray:
        assert len(images) == len(self.codes)
        return self.codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        assert codes is self.codes
        return self.drawn


def test_metrics_are_means_over_the_pictures_and_of_one_that_is_exact_60_db():
    """The originals are as large as they like: the tokenizer sees a square of its resolution."""
    images = [pictures(20 + 3 * number, 44 - number, 3, seed=number) for number in range(3)]
    truth = np.stack([prepare_image(pixels_of(image), 40) for image in images])
    drawn = truth.copy()
    drawn[1] = np.where(truth[1] >= 128, truth[1] - 4, truth[1] + 4)
    drawn[2] = np.where(truth[2] >= 128, truth[2] - 16, truth[2] + 16)
    codes = np.array([[0, 1, 2, 3], [0, 0, 1, 1], [0, 0, 0, 0]], np.int32)
    found = reconstruction_metrics(Redrawn(codes, drawn), images)
    assert found["psnr"] == pytest.approx((60 + 20 * np.log10(255 / 4) + 20 * np.log10(255 / 16)) / 3, rel=1e-5)
    assert 0.8 < found["ssim"] < 1
    share = np.array([7, 3, 1, 1]) / 12
    assert found["codebook_use"] == 4 / 16
    assert found["codebook_perplexity"] == pytest.approx(np.exp(-np.sum(share * np.log(share))))
