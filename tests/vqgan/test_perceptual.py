"""LPIPS against a functional reference in torch, through the files that users have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.config import InputError
from rac3.vqgan.perceptual import CHANNELS, LAYERS, PerceptualConfig, load_lpips, lpips

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def weights() -> tuple[dict, dict]:
    """The state dicts of torchvision's VGG16 (but for its classifier, one small layer) and of LPIPS's linear layers."""
    generator = torch.Generator().manual_seed(0)
    vgg, channels = {}, 3
    for layer, width in zip(LAYERS, CHANNELS, strict=True):
        for index in layer:
            kernel = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
            vgg[f"features.{index}.weight"] = kernel
            vgg[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
            channels = width
    vgg["classifier.0.weight"] = torch.zeros(4, 4)
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for i, width in enumerate(CHANNELS)
    }
    return vgg, heads


def torch_lpips(vgg, heads, x, y):
    """NCHW in [-1, 1]; with torch's own `normalize` and pooling in place of ours."""
    import torch.nn.functional as F

    def features(x):
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        x = (x - shift) / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        out = []
        for number, layer in enumerate(LAYERS):
            x = F.max_pool2d(x, 2) if number else x
            for index in layer:
                x = F.relu(F.conv2d(x, vgg[f"features.{index}.weight"], vgg[f"features.{index}.bias"], padding=1))
            out.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    pairs = zip(features(x), features(y), heads.values(), strict=True)
    return sum(F.conv2d((a - b) ** 2, head).mean((1, 2, 3)) for a, b, head in pairs)


def test_the_layers_are_those_of_vgg16():
    """Configuration D of arXiv 1409.1556 as torchvision lists it: a ReLU follows each convolution, M is a pooling."""
    listed = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
    parts = [part for entry in listed for part in (("pool",) if entry == "M" else (entry, "relu"))]
    layers, widths = [()], [()]
    for index, part in enumerate(parts):
        if part == "pool":
            layers.append(())
            widths.append(())
        elif part != "relu":
            layers[-1] += (index,)
            widths[-1] += (part,)
    assert tuple(layers[:-1]) == LAYERS
    assert [set(each) for each in widths[:-1]] == [{width} for width in CHANNELS]


def pictures(shape: tuple) -> tuple[jax.Array, jax.Array]:
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, *shape)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(y)


def to_torch(x: jax.Array):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def files_of(form: str, weights, folder) -> list:
    vgg, heads = weights
    if form == "one file":  # the state dict of a whole LPIPS, with its buffers and its heads listed twice
        slices = {index: f"net.slice{number + 1}" for number, layer in enumerate(LAYERS) for index in layer}
        whole = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
        for name, value in vgg.items():
            if name.startswith("features."):
                whole[f"{slices[int(name.split('.')[1])]}.{name.removeprefix('features.')}"] = value
        whole |= heads | {name.replace("lin", "lins."): value for name, value in heads.items()}
        torch.save(whole, folder / "lpips.pth")
        return [folder / "lpips.pth"]
    torch.save(vgg, folder / "vgg16-397923af.pth", _use_new_zipfile_serialization=form != "old format")
    torch.save(heads, folder / "vgg.pth", _use_new_zipfile_serialization=form != "old format")
    files = [folder / "vgg16-397923af.pth", folder / "vgg.pth"]
    return files[::-1] if form == "old format" else files


def test_parity_with_torch(weights, tmp_path):
    x, y = pictures((2, 16, 24, 3))
    expected = torch_lpips(*weights, to_torch(x), to_torch(y))
    loaded = load_lpips(files_of("two files", weights, tmp_path))
    distance = jax.jit(lpips)(loaded, x, y)
    assert distance.shape == (2,)
    np.testing.assert_allclose(distance, expected, rtol=1e-4)  # 13 convolutions deep
    assert not np.asarray(jax.jit(lpips)(loaded, x, x)).any()
    for form in ("old format", "one file"):
        jax.tree.map(np.testing.assert_array_equal, load_lpips(files_of(form, weights, tmp_path)), loaded)


def test_gradients_agree_with_torch_and_are_finite_where_all_features_vanish(weights, tmp_path):
    loaded = load_lpips(files_of("two files", weights, tmp_path))
    x, y = pictures((1, 16, 16, 3))
    distance = jax.jit(jax.value_and_grad(lambda y, loaded: lpips(loaded, x, y).sum()))
    _, ours = distance(y, loaded)
    leaf = to_torch(y).requires_grad_()
    torch_lpips(*weights, to_torch(x), leaf).sum().backward()
    expected = leaf.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(expected).max())

    dark = loaded._replace(
        convolutions=tuple(tuple((k, jnp.full_like(b, -1e4)) for k, b in layer) for layer in loaded.convolutions)
    )
    value, gradient = distance(y, dark)
    assert value == 0
    assert not np.asarray(gradient).any()


def test_what_is_missing_or_wrong_is_one_clear_line(weights, tmp_path):
    vgg, heads = files_of("two files", weights, tmp_path)
    alex = {f"lin{i}.model.1.weight": torch.zeros(1, n, 1, 1) for i, n in enumerate((64, 192, 384, 256, 256))}
    torch.save(alex, tmp_path / "alex.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    for files, message in (
        ([vgg], r"lack 'lin0\.model\.1\.weight' of shape \(1, 64, 1, 1\) and 4 more; .* for VGG16 \(vgg\.pth\)$"),
        ([heads], r"lack 'features\.0\.weight' of shape \(64, 3, 3, 3\) and 25 more; .*vgg16-397923af\.pth"),
        (
            [vgg, tmp_path / "alex.pth"],
            r"'lin1\.model\.1\.weight' has shape \(1, 192, 1, 1\), but the model asks for \(1, 128, 1, 1\); .*vgg\.pth",
        ),
        ([vgg, tmp_path / "none.pth"], r"none\.pth' do not exist"),
        ([vgg, tmp_path / "page.pth"], "a web page, not weights"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_lpips(files)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"none\.pth' do not exist"):
        PerceptualConfig((str(vgg), str(tmp_path / "none.pth"))).files()
    with pytest.raises(InputError, match=r"perceptual\.weight=0\.0 must be positive"):
        PerceptualConfig(weight=0.0)
