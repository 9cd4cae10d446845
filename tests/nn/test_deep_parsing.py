"""The Deep Parsing Network's smoothness terms as a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf

nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("optax")

from jaxcrf.models.parameters import named_leaves  # noqa: E402  (needs flax)
from jaxcrf.nn import DeepParsing  # noqa: E402
from jaxcrf.training.updates import select  # noqa: E402
from layer_suite import moved  # noqa: E402  (needs flax)

LABELS = 3
SMALL = {"num_contexts": 2, "context_size": 3, "window": 4}


def create(seed=0, labels=LABELS, **options):
    return DeepParsing(labels, **(SMALL | options), rngs=nnx.Rngs(seed))


def example(*shape, seed=0, channels=3, labels=LABELS):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (*shape, channels)).astype(np.uint8)
    return images, jnp.asarray(rng.normal(size=(*shape, labels)), jnp.float32)


def step(layer, probs, images, **options):
    """`deep_parsing_step` with what the layer has learned, its weights written out."""
    initial = jaxcrf.deep_parsing_init(jax.random.key(0), LABELS, **SMALL)
    params = jaxcrf.DeepParsingParams(
        initial.color_weight * layer.color_weight[...],
        initial.position_weight * layer.position_weight[...],
        layer.scale[...],
        layer.offset[...],
        layer.contexts[...],
        layer.context_offset[...],
    )
    return jaxcrf.deep_parsing_step(probs, images, params, window=SMALL["window"], **options)


@pytest.mark.parametrize(
    "options", [{}, {"multiply_center": False, "num_iterations": 2}, {"inputs": "log_probs"}], ids=str
)
def test_a_layer_is_the_step_with_its_parameters(options):
    images, logits = example(5, 6)
    layer = moved(create(**options), scale=0.3)
    probs = jax.nn.softmax(logits)
    if "inputs" in options:
        probs = jax.nn.sigmoid(logits)
        logits, options = jax.nn.log_sigmoid(logits), {}
    expected = step(layer, probs, images, **options)
    found = layer.infer(images, logits)
    for name, value in expected._asdict().items():
        # Logarithms and exponentials of them round by 1e-7, penalties are of the order of one.
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(layer(images, logits), found.logits)


def test_it_begins_with_triple_penalties_alone():
    images, logits = example(5, 6)
    layer = create(deviation=0.0)
    probs = jax.nn.softmax(logits)
    triple = jaxcrf.triple_penalty(
        probs,
        images,
        window=4,
        color_weight=0.5 / (3 * 255**2 * 16),
        position_weight=0.5 / (8 * 16),
    )
    found = layer.infer(images, logits)
    np.testing.assert_allclose(found.penalty, triple, atol=1e-6)
    np.testing.assert_allclose(found.logits, jnp.log(probs) - triple, atol=1e-5)
    assert np.abs(triple).max() > 0.01
    # Nothing at all is left of it without them.
    np.testing.assert_allclose(
        create(deviation=0.0, own_penalty=0.0)(images, logits), jnp.log(probs), atol=1e-6
    )


def pooled(x, factor):
    height, width, channels = x.shape
    return x.reshape(height // factor, factor, width // factor, factor, channels).mean((1, 3))


def test_reduced_penalties_are_those_of_cells_interpolated():
    images, logits = example(6, 8)
    layer = moved(create(reduction=2))
    found = layer.infer(images, logits)
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    cells = step(layer, pooled(probs, 2).astype(np.float32), pooled(images.astype(np.float32), 2))
    for name in ("triple", "penalty"):
        value = np.asarray(getattr(cells, name), np.float64)
        for axis, n in ((0, 6), (1, 8)):
            centers = np.arange(0.5, n, 2)
            value = np.apply_along_axis(functools.partial(np.interp, np.arange(n), centers), axis, value)
        np.testing.assert_allclose(getattr(found, name), value, atol=1e-5, err_msg=name)
        if name == "penalty":
            np.testing.assert_allclose(found.logits, np.log(probs) - value, atol=1e-5)
    np.testing.assert_allclose(found.probs, jax.nn.softmax(found.logits), atol=1e-6)


def test_every_parameter_is_reached_and_recomputing_changes_nothing():
    images, logits = example(2, 5, 6)
    layer = moved(create(reduction=2))
    # Some of either context win somewhere.
    weights = jnp.asarray(np.random.default_rng(2).normal(size=logits.shape), jnp.float32)

    @nnx.jit
    def gradients(layer):
        def loss(layer):
            return jnp.sum(weights * layer(images, logits))

        def recomputed(layer):
            return jnp.sum(weights * nnx.remat(lambda layer, logits: layer(images, logits))(layer, logits))

        return nnx.grad(loss)(layer), nnx.grad(recomputed)(layer)

    found, again = (named_leaves(nnx.state(gradient)) for gradient in gradients(layer))
    assert set(found) == {
        "color_weight",
        "position_weight",
        "scale",
        "offset",
        "contexts",
        "context_offset",
    }
    for name, value in found.items():
        assert np.abs(value).max() > 0, name
        np.testing.assert_allclose(again[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_papers_stages_are_patterns_of_its_parameters():
    paths = [f"crf/{name}" for name in named_leaves(nnx.state(create()))] + ["unary/kernel"]
    assert set(select(paths, ("crf/*_weight",))) == {"crf/color_weight", "crf/position_weight"}
    assert set(select(paths, ("crf/context*",))) == {"crf/contexts", "crf/context_offset"}


def test_windows_larger_than_the_image_any_channels_and_single_pixels():
    layer = create(window=(9, 30), context_size=5, reduction=2)
    pairs = [example(*shape, channels=channels) for shape, channels in (((1, 1), 3), ((2, 3, 4), 1))]
    # One program: every operation compiles once per shape otherwise.
    found = nnx.jit(lambda layer, pairs: [layer(*pair) for pair in pairs])(layer, pairs)
    for (_, logits), value in zip(pairs, found, strict=True):
        assert value.shape == logits.shape
        assert np.isfinite(value).all()


def test_in_a_window_of_one_pixel_nothing_differs():
    images, logits = example(5, 6)
    np.testing.assert_array_equal(create(window=1).infer(images, logits).triple, 0)


def test_one_label_is_sure():
    images, logits = example(3, 4, labels=1)
    found = nnx.jit(lambda layer: layer.infer(images, logits))(create(labels=1))
    np.testing.assert_allclose(found.probs, 1.0)


def test_half_precision_is_for_storage():
    images, logits = example(5, 6)
    layer = create()
    half = layer(images, logits.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, layer(images, logits), atol=0.05)


def test_iterations_may_be_set():
    images, logits = example(5, 6)
    layer = moved(create())
    more = moved(create(num_iterations=3))
    layer.set_attributes(num_iterations=3)
    np.testing.assert_array_equal(layer(images, logits), more(images, logits))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_contexts": 0}, "num_contexts: got 0; expected a whole number"),
        ({"context_size": 4}, "context_size: got 4; expected an odd number"),
        ({"window": 0}, "window: got 0; expected a whole number"),
        ({"reduction": 0}, "reduction: got 0; expected a whole number"),
        ({"reduction": 1.5}, "reduction: got 1.5; expected a whole number"),
        ({"num_iterations": 0}, "num_iterations: got 0; expected a whole number"),
        ({"inputs": "sigmoid"}, "inputs: got 'sigmoid'; expected one of logits, log_probs"),
        ({"deviation": -1.0}, "deviation: got -1.0"),
        ({"own_penalty": np.nan}, "own_penalty: got nan; expected a finite number"),
        ({"labels": 0}, "num_labels: got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_bad_input():
    images, logits = example(5, 6)
    layer = create()
    with pytest.raises(ValueError, match=r"logits: got shape \(5, 6, 2\); expected \[\*batch, H, W, 3\]"):
        layer(images, logits[..., :2])
    with pytest.raises(
        ValueError, match=r"images: got shape \(3, 6, 3\) for logits of shape \(5, 6, 3\).*their"
    ):
        layer(images[:3], logits)
    with pytest.raises(ValueError, match=r"images: got shape \(5, 6\)"):
        layer(images[..., 0], logits)
    with pytest.raises(ValueError, match="logits"):
        layer(images, logits.at[1, 2, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="image: "):
        layer(np.where(images > 250, np.nan, images), logits)
