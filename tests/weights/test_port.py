"""A small peer's weights become our parameters, or one line says what does not fit."""

from types import SimpleNamespace

import numpy as np
import pytest

from rac3.config import InputError
from rac3.weights.port import Place, port

IN, OUT = 3, 5
PARAMS = {
    "linear": {"kernel": (IN, OUT), "bias": (OUT,)},
    "conv": {"kernel": (2, 4, IN, OUT)},
    "q_proj": {"kernel": (IN, OUT), "bias": (OUT,)},
    "k_proj": {"kernel": (IN, OUT), "bias": (OUT,)},
    "v_proj": {"kernel": (IN, OUT), "bias": (OUT,)},
    "scale": (),
}
PLACES = {
    "linear/kernel": Place("fc.weight", transposed=True),
    "linear/bias": Place("fc.bias"),
    "conv/kernel": Place("conv.weight", transposed=True),
    **{f"{part}_proj/kernel": Place("qkv.weight", transposed=True, part=i) for i, part in enumerate("qkv")},
    **{f"{part}_proj/bias": Place("qkv.bias", part=i) for i, part in enumerate("qkv")},
    "scale": Place("scale"),
}
WEIGHTS = {"fc.weight": (OUT, IN), "fc.bias": (OUT,), "conv.weight": (OUT, IN, 2, 4), "scale": ()}
WEIGHTS |= {"qkv.weight": (3 * OUT, IN), "qkv.bias": (3 * OUT,)}


def drawn() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in WEIGHTS.items()}


def ported(weights: dict[str, np.ndarray], params: dict = PARAMS, **options: str) -> dict:
    shapes = {
        name: {part: SimpleNamespace(shape=shape) for part, shape in value.items()}
        if isinstance(value, dict)
        else SimpleNamespace(shape=value)
        for name, value in params.items()
    }
    return port(shapes, weights, PLACES.__getitem__, where="weights 'a.bin'", **options)


def test_layouts():
    weights = drawn()
    found = ported(weights)
    x = np.random.default_rng(1).standard_normal((7, IN))
    np.testing.assert_allclose(x @ found["linear"]["kernel"], x @ weights["fc.weight"].T)
    np.testing.assert_array_equal(found["linear"]["bias"], weights["fc.bias"])
    for row, column, i, o in np.ndindex(2, 4, IN, OUT):
        assert found["conv"]["kernel"][row, column, i, o] == weights["conv.weight"][o, i, row, column]
    for i, part in enumerate("qkv"):
        rows = slice(i * OUT, (i + 1) * OUT)
        np.testing.assert_array_equal(found[f"{part}_proj"]["kernel"], weights["qkv.weight"][rows].T)
        np.testing.assert_array_equal(found[f"{part}_proj"]["bias"], weights["qkv.bias"][rows])
    assert found["scale"] == weights["scale"]


def test_parameters_are_contiguous_float32_of_their_own():
    """The weights may be views of a file, in half precision."""
    weights = {name: weight.astype(np.float16) for name, weight in drawn().items()}
    for weight in weights.values():
        weight.setflags(write=False)
    found = ported(weights)
    for array in (found["linear"]["kernel"], found["linear"]["bias"], found["k_proj"]["kernel"], found["scale"]):
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.flags.writeable
    np.testing.assert_array_equal(found["linear"]["bias"], weights["fc.bias"])


def test_a_linear_layer_is_a_convolution_of_one_pixel():
    weights = drawn()
    as_conv = weights | {"fc.weight": weights["fc.weight"][:, :, None, None]}
    np.testing.assert_array_equal(ported(as_conv)["linear"]["kernel"], weights["fc.weight"].T)
    ours = PARAMS | {"linear": {"kernel": (1, 1, IN, OUT), "bias": (OUT,)}}
    np.testing.assert_array_equal(ported(weights, ours)["linear"]["kernel"][0, 0], weights["fc.weight"].T)
    with pytest.raises(InputError, match=r"'conv\.weight' has shape \(5, 3, 4, 2\), but the model asks for \(5, 3, 2,"):
        ported(weights | {"conv.weight": weights["conv.weight"].transpose(0, 1, 3, 2)})
    with pytest.raises(InputError, match=r"'fc\.bias' has shape \(5, 1, 1, 1\), but the model asks for \(5,\)"):
        ported(weights | {"fc.bias": weights["fc.bias"][:, None, None, None]})


def test_what_may_be_left_out_is_named_whole():
    weights = drawn() | {"loss.weight": np.zeros(1), "xloss.weight": np.zeros(1)}
    with pytest.raises(InputError, match=r"have 'xloss\.weight' of shape \(1,\), which the model has no place for"):
        ported(weights, ignored=r"loss\..*")
    assert ported(weights, ignored=r"x?loss\..*").keys() == PARAMS.keys()


FIX = "; give the weights and the config of one model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.bias": None}, f"weights 'a.bin' lack 'fc.bias' of shape (5,){FIX}"),
        ({"fc.bias": None, "qkv.weight": None}, f"weights 'a.bin' lack 'fc.bias' of shape (5,) and 1 more{FIX}"),
        ({"qkv.weight": None}, f"weights 'a.bin' lack 'qkv.weight' of shape (15, 3){FIX}"),  # three parameters, once
        ({"a": np.zeros(2)}, f"weights 'a.bin' have 'a' of shape (2,), which the model has no place for{FIX}"),
        (
            {"a": np.zeros(2), "b": np.zeros(3), "scale": np.zeros(1)},  # names before shapes
            f"weights 'a.bin' have 'a' of shape (2,) and 1 more, which the model has no place for{FIX}",
        ),
        ({"scale": np.zeros(1)}, f"weights 'a.bin': 'scale' has shape (1,), but the model asks for (){FIX}"),
        (
            {"qkv.bias": np.zeros(OUT)},
            f"weights 'a.bin': 'qkv.bias' has shape (5,), but the model asks for (15,){FIX}",
        ),
        (
            {"fc.bias": np.zeros(OUT, np.int8)},
            "weights 'a.bin': 'fc.bias' is of int8, not of floats; give weights that are not quantized",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(changes: dict[str, np.ndarray | None], message: str):
    weights = {name: weight for name, weight in (drawn() | changes).items() if weight is not None}
    with pytest.raises(InputError) as error:
        ported(weights)
    assert str(error.value) == message


def test_the_fix_is_the_callers():
    with pytest.raises(InputError, match=r"; download vgg\.pth$"):
        ported({}, fix="download vgg.pth")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["fc.weight", "qkv.bias", "scale"])
def test_a_value_that_is_no_number_is_refused(name: str, value: float):
    weights = drawn()
    weights[name].flat[-1] = value
    with pytest.raises(
        InputError, match=rf"^weights 'a\.bin': 1 of the \d+ values of '{name}' are NaN or infinite; download"
    ):
        ported(weights)


def test_numbers_beyond_float32_are_infinite():
    weights = drawn()
    weights["fc.bias"] = np.array([1, 2, 3, 4, 1e39])
    with (
        pytest.raises(InputError, match=r"1 of the 5 values of 'fc\.bias' are NaN or infinite"),
        np.errstate(over="ignore"),
    ):
        ported(weights)


def test_a_matrix_of_zeros_is_refused_and_a_bias_of_zeros_is_not():
    weights = drawn()
    weights["fc.bias"][:] = 0
    weights["scale"][...] = 0
    ported(weights)
    weights["conv.weight"][:] = 0
    with pytest.raises(InputError, match=r"all 120 values of 'conv\.weight' are 0; download them again"):
        ported(weights)
