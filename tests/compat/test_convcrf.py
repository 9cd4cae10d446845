"""The reference's outputs and gradients on real crops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from jaxcrf.compat import convcrf
from jaxcrf.filters import Window

pytestmark = pytest.mark.optimized

CONFIGURATIONS = (
    "colour_position",
    "default",
    "filter5_blur1",
    "filter7_blur2_final",
    "one_iteration",
    "probabilities_in",
    "scalar_weight",
    "sym_unmerged",
    "sym_unmerged_blur4",
)


@pytest.mark.parametrize("image", ["2007_000129", "2007_000847"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_outputs_and_gradients_are_the_reference_s(golden_dir, image, name):
    golden = np.load(golden_dir / f"convcrf_{image}_{name}.npz")
    conf, iterations = json.loads(str(golden["config"])), int(golden["num_iterations"])

    def run(unary, image):
        return convcrf.run(unary, image, conf, iterations)

    found = np.asarray(run(golden["unary"], golden["image"]))
    error = np.abs(found - golden["output"]) / np.maximum(1, np.abs(golden["output"]))
    assert error.max() <= 1e-4
    if "cotangent" not in golden:
        return

    def loss(unary, image):
        return jnp.sum(golden["cotangent"] * run(unary, image))

    gradients = jax.grad(loss, argnums=(0, 1))(golden["unary"], golden["image"].astype(np.float32))
    for gradient, expected in zip(gradients, (golden["grad_unary"], golden["grad_image"]), strict=True):
        assert np.abs(gradient - expected).max() <= 1e-3 * np.abs(expected).max()


def example(labels=3, seed=0):
    rng = np.random.default_rng(seed)
    unary = np.log(rng.dirichlet(np.ones(labels), size=(6, 7))).astype(np.float32)
    return unary, rng.integers(0, 256, (6, 7, 3)).astype(np.uint8)


def test_a_batch_is_a_loop_where_the_reference_crashes():
    first, second = example(seed=0), example(seed=1)
    conf = {"norm": "sym", "merge": False, "filter_size": 5, "blur": 2}
    together = convcrf.run(*(np.stack(pair) for pair in zip(first, second, strict=True)), conf)
    np.testing.assert_allclose(together[1], convcrf.run(*second, conf), atol=1e-4)


def test_the_initial_convolution_only_adds_a_number_per_pixel():
    plain = convcrf.run(*example(), {"filter_size": 5, "blur": 1})
    added = convcrf.run(*example(), {"filter_size": 5, "blur": 1, "convcomp": True})
    difference = np.asarray(added - plain)
    np.testing.assert_allclose(difference, np.broadcast_to(difference[..., :1], difference.shape), atol=1e-3)
    assert np.abs(difference).max() > 0.1


def test_without_softmax_the_recursion_is_linear():
    unary, image = example()
    conf = {
        "filter_size": 3,
        "blur": 1,
        "softmax": False,
        "pos_feats": {"sdims": 3, "compat": 0.01},
        "col_feats": None,
    }
    log_probs = np.asarray(jax.nn.log_softmax(unary))
    K = Window(jaxcrf.position_features(unary.shape[:2], 3.0), 3, weights=0.01)
    expected = 0.8 * log_probs + 0.2 * np.asarray(K(0.8 * log_probs + 0.2 * np.asarray(K(log_probs))))
    np.testing.assert_allclose(convcrf.run(unary, image, conf, 2), expected, rtol=1e-5)
    zero = {**conf, "pos_feats": {"sdims": 3, "compat": 0.0}}
    np.testing.assert_allclose(convcrf.run(unary, image, zero, 3), 0.8 * jax.nn.log_softmax(unary), atol=1e-5)


def test_no_weight_means_unary_plus_message():
    unary, image = example()
    conf = {"weight": None, "filter_size": 5, "blur": 1, "final_softmax": True}
    # w = ½ and w_u = 1 halves both, so doubling the logits of that brings it back.
    half = {"weight": "scalar", "weight_init": 0.5, "filter_size": 5, "blur": 1}
    found = convcrf.run(unary, image, conf, 1)
    np.testing.assert_allclose(found, jax.nn.softmax(2 * convcrf.run(unary, image, half, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"filtersize": 5}, "unknown keys filtersize"),
        ({"norm": "sym"}, "merged kernels cannot be normalised"),
        ({"norm": "both", "merge": False}, "norm is 'both'"),
        ({"filter_size": 4}, "filter_size: got 4"),
    ],
)
def test_bad_configurations_are_refused(conf, message):
    with pytest.raises(ValueError, match=message):
        convcrf.run(*example(), conf)


def test_channels_first_arrays_are_refused():
    unary, image = example()
    with pytest.raises(ValueError, match="channels last"):
        convcrf.run(np.moveaxis(unary, -1, 0), image)
