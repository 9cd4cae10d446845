"""The Deep Parsing Network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import grid_oracles
import jaxcrf
from jaxcrf import models
from jaxcrf.compat import weights
from jaxcrf.models import ModelConfig
from jaxcrf.models.deep_parsing import DeepParsingUnary
from jaxcrf.models.parameters import named_leaves
from jaxcrf.models.vgg import VGG16

LABELS = 3
TINY = {"width": 2, "hidden_channels": 4}


@pytest.fixture(scope="module")
def model():
    options = {"window": 6, "context_size": 3, "num_contexts": 2}
    made = models.create("deep_parsing_network", LABELS, crf_options=options, rngs=nnx.Rngs(0), **TINY)
    made.eval()
    return made


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def padded_with_zeros(kernel, dilation):
    """As fig. 2 (a) and (b): a dense filter with the original values every so many cells."""
    size = (len(kernel) - 1) * dilation + 1
    dense = np.zeros((size, size, *kernel.shape[2:]), kernel.dtype)
    dense[::dilation, ::dilation] = kernel
    return dense


def convolved(x, convolution, dilation=1):
    kernel = padded_with_zeros(np.asarray(convolution.kernel[...]), dilation)
    y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(y + convolution.bias[...])


def written_out(unary, x):
    """b1 to b11 up to the sigmoid, layer by layer as in Table 1 (b)."""
    x = (x - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    x = jnp.asarray(x, jnp.float32)
    for stage, count in enumerate((2, 2, 3, 3, 3), start=1):
        for k in range(1, count + 1):
            x = convolved(x, getattr(unary.backbone, f"conv{stage}_{k}"), 2 if stage == 5 else 1)
        if stage <= 3:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = convolved(convolved(x, unary.fc6, 4), unary.fc7)
    return x @ unary.classifier.kernel[...][0, 0] + unary.classifier.bias[...]


def test_filters_are_padded_with_zeros_where_pools_are_missing(model):
    assert padded_with_zeros(np.ones((3, 3, 1, 1)), 2).shape[:2] == (5, 5)
    assert padded_with_zeros(np.ones((7, 7, 1, 1)), 4).shape[:2] == (25, 25)
    x = images(1, 48, 64)
    found, expected = jax.jit(lambda x: (model.unary.scores(x), written_out(model.unary, x)))(x)
    assert found.shape == (1, 6, 8, LABELS)
    assert np.std(expected) > 1e-3
    # Sixteen layers, in other orders of summation.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_every_label_has_a_sigmoid_and_the_crf_takes_it(model):
    x = images(17, 26)
    with_unary = jax.jit(lambda x: (*model.with_unary(x), model.unary.scores(x)))
    refined, log_probs, scores = with_unary(x)
    # Cells are tiles of eight by eight pixels.
    interpolated = grid_oracles.upsample(np.asarray(scores, float), 8, x.shape[:2], 3.5)
    np.testing.assert_allclose(np.exp(log_probs), 1 / (1 + np.exp(-interpolated)), rtol=1e-5)
    assert np.abs(np.exp(log_probs).sum(-1) - 1).min() > 1e-3
    crf = model.crf
    expected = jaxcrf.deep_parsing_step(jnp.exp(log_probs), x, crf.params, window=6).logits
    np.testing.assert_allclose(refined, expected, atol=1e-5)
    assert {path.split("/")[0] for path in named_leaves(nnx.state(model, nnx.Param))} == {"unary", "crf"}


def test_pools_that_keep_the_resolution_may_be_left_out():
    x = images(16, 16)
    with_pools, without = (
        VGG16(width=1, pool_size=2, dense_pools=pools, rngs=nnx.Rngs(0)) for pools in (True, False)
    )
    found, other = jax.jit(lambda x: (with_pools(x), without(x)))(x)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in other.items()
    }
    np.testing.assert_array_equal(found["pool3"], other["pool3"])
    assert (found["pool4"] >= other["pool4"]).all()
    assert (found["pool4"] > other["pool4"]).any()


def test_it_begins_with_the_weights_of_vgg():
    """Those of DeepLab's network with the same first fully-connected layer."""
    trained = models.create("deeplab_7x7", 5, rngs=nnx.Rngs(1), **TINY)
    model = DeepParsingUnary(LABELS, rngs=nnx.Rngs(0), **TINY)
    loaded = weights.load(model, weights.export(trained))
    assert set(loaded.not_set) == {"classifier/kernel", "classifier/bias"}
    assert not loaded.unused
    for layer in ("fc6", "fc7"):
        np.testing.assert_array_equal(getattr(model, layer).kernel[...], getattr(trained, layer).kernel[...])


def test_the_papers_size():
    params = nnx.state(ModelConfig.of("deep_parsing_network", 21).create_abstract(), nnx.Param)
    sizes = {path: leaf.size for path, leaf in named_leaves(params).items()}
    assert sizes["crf/contexts"] == 9 * 9 * 21 * 105
    # VGG-16 without its last layer, and that of 21 labels.
    unary = sum(size for path, size in sizes.items() if path.startswith("unary/"))
    assert unary == 134_260_544 + 21 * 4097


def test_two_models_are_averaged_over_scales(model):
    averaged = models.Averaged([model, model], scales=(0.5, 1.0))
    found = jax.eval_shape(averaged, images(2, 24, 33))
    assert found.shape == (2, 24, 33, LABELS)
