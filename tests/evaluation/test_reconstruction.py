import numpy as np
import pytest

from rac3.evaluation.reconstruction import codebook_use, psnr, ssim


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
    # variances as differences of squares in float32: 255^2 * 2^-24 beside c2 = 58
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
