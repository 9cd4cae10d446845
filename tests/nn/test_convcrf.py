"""The ConvCRF layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
import oracles

nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")

from jaxcrf.nn import ConvCRF  # noqa: E402  (needs flax)
from jaxcrf.nn.mean_field import infer  # noqa: E402
from jaxcrf.training import losses  # noqa: E402
from layer_suite import (  # noqa: E402  (needs flax)
    LABELS,
    check_batches_and_reach,
    check_values_and_gradients,
    example,
    learned_number,
    moved,
    names,
    pixel_features,
)

NUMBERS = (
    "bilateral_color_bandwidth",
    "bilateral_position_bandwidth",
    "bilateral_weight",
    "position_bandwidth",
    "position_weight",
    "unary_weight",
)
# Small enough for finite differences, with every pixel in most others' windows.
TINY = jaxcrf.Preset(
    position_weight=0.6,
    position_bandwidth=(1.5, 2.5),
    bilateral_weight=0.9,
    bilateral_position_bandwidth=2.0,
    bilateral_color_bandwidth=40.0,
    unary_weight=0.7,
    normalization="none",
    num_iterations=2,
    filter_size=(3, 5),
    blur=1,
)
VARIANTS = {"": {}, "+T": {"trainable_features": True}, "+C": {"trainable_compatibility": True}}
VARIANTS["+CT"] = VARIANTS["+C"] | VARIANTS["+T"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def create(variant, *, shape=(4, 5), preset=TINY, **options):
    given = VARIANTS[variant] | options
    return ConvCRF(
        LABELS, preset=preset, image_shape=shape if given.get("trainable_features") else None, **given
    )


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("convcrf", ""),
        pytest.param("convcrf", "+CT", marks=pytest.mark.exhaustive),
        pytest.param("convcrf_reference", "+C", marks=pytest.mark.exhaustive),
        ("densecrf", "+T"),
    ],
)
def test_layers_begin_as_their_preset(name, variant):
    images, logits = example(13, 18, 2)
    preset = dataclasses.replace(jaxcrf.presets.get(name), num_iterations=2, filter_size=3)
    expected = jaxcrf.refine(images, logits=logits, preset=preset)
    result = create(variant, shape=(13, 18), preset=preset).infer(images, logits)
    # Learned bandwidths divide in float32, others in float64; features up to 60 enter the kernels as differences.
    np.testing.assert_allclose(result.probs, expected, atol=3e-5)
    np.testing.assert_allclose(jax.nn.softmax(result.logits), result.probs, atol=1e-6)


def test_where_nothing_is_learned_the_layer_is_refine():
    images, logits = example(9, 10)
    preset = dataclasses.replace(jaxcrf.presets.get("convcrf"), num_iterations=2, filter_size=3)
    layer = create("", preset=preset, learn_weights=False, learn_bandwidths=False)
    assert not names(layer)
    expected = jaxcrf.refine(images, logits=logits, preset=preset)
    np.testing.assert_allclose(jax.nn.softmax(layer(images, logits)), expected, atol=1e-6)


def test_a_preset_may_have_one_kernel_or_none():
    images, logits = example()
    for name in ("position", "bilateral"):
        preset = dataclasses.replace(TINY, **{f"{name}_weight": 0.0})
        layer = create("", preset=preset)
        assert not [path for path in names(layer) if path.startswith(f"scales/{name}")]
        expected = jaxcrf.refine(images, logits=logits, preset=preset)
        np.testing.assert_allclose(layer.infer(images, logits).probs, expected, atol=2e-6)
    with pytest.raises(ValueError, match="preset: position_weight and bilateral_weight are both 0"):
        create("", preset=dataclasses.replace(TINY, position_weight=0, bilateral_weight=0))
    with pytest.raises(ValueError, match="trainable_features: the preset's position_weight is 0"):
        create("+T", preset=dataclasses.replace(TINY, position_weight=0))


@every_variant
def test_what_is_learned_is_what_was_asked_for(variant):
    extra = {"+T": {"feature_offsets"}, "+C": {"compatibility"}, "": set()}
    extra["+CT"] = extra["+C"] | extra["+T"]
    # Beside trained features, the bandwidth that they are divided by is no parameter of its own.
    numbers = set(NUMBERS) - ({"position_bandwidth"} if "T" in variant else set())
    assert set(names(create(variant))) == {f"scales/{n}" for n in numbers} | extra[variant]
    weights = {"scales/position_weight", "scales/bilateral_weight", "scales/unary_weight"}
    assert set(names(create(variant, learn_bandwidths=False))) == weights | extra[variant]
    assert set(names(create(variant, learn_weights=False))).isdisjoint(weights)
    without = dataclasses.replace(TINY, bilateral_position_bandwidth=None)
    assert "scales/bilateral_position_bandwidth" not in names(create(variant, preset=without))


def oracle(images, logits, parameters, preset):
    """Marginals, pixel by pixel in float64."""
    number = learned_number(parameters, preset)
    places, smooth, appearance = pixel_features(images, number)
    smooth = smooth + parameters.get("feature_offsets", 0.0)
    reach = np.asarray(preset.filter_size) // 2
    inside = (np.abs(places.reshape(-1, 1, 2) - places.reshape(1, -1, 2)) <= reach).all(-1)
    kernel = number("position_weight") * oracles.gaussian_matrix(smooth.reshape(-1, 2))
    kernel = kernel + number("bilateral_weight") * oracles.gaussian_matrix(appearance.reshape(-1, 5))
    kernel = kernel * inside
    penalty = parameters.get("compatibility", 1 - np.eye(LABELS))
    u = logits.reshape(-1, LABELS)
    q = oracles.softmax(u)
    for _ in range(preset.num_iterations):
        q = oracles.softmax(number("unary_weight") * u - kernel @ q @ penalty.T)
    return q.reshape(logits.shape)


@pytest.mark.parametrize(
    ("variant", "axes"),
    [
        pytest.param("", "scalar", marks=pytest.mark.exhaustive),
        pytest.param("+C", "per axis", marks=pytest.mark.exhaustive),
        pytest.param("+T", "scalar", marks=pytest.mark.exhaustive),
        ("+CT", "per axis"),
    ],
)
def test_values_and_gradients_are_those_of_float64_loops(variant, axes):
    preset = TINY if axes == "per axis" else dataclasses.replace(TINY, position_bandwidth=1.5)
    layer = moved(create(variant, preset=preset))
    check_values_and_gradients(layer, functools.partial(oracle, preset=preset))


@pytest.mark.parametrize(
    "variant", [*(pytest.param(v, marks=pytest.mark.exhaustive) for v in ("", "+T", "+C")), "+CT"]
)
def test_a_batch_is_a_loop_and_every_parameter_is_reached(variant):
    preset = dataclasses.replace(jaxcrf.presets.get("convcrf"), num_iterations=2, filter_size=3)
    layer = moved(create(variant, shape=(9, 10), preset=preset))
    check_batches_and_reach(layer, *example(9, 10, 2))


def test_bfloat16_logits_are_storage_only():
    layer = moved(create("+CT"))
    images, logits = example()
    stored = logits.astype(jnp.bfloat16)
    found = layer(images, stored)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, layer(images, stored.astype(jnp.float32)))


def test_options_reach_mean_field():
    images, logits = example()
    layer = create("", exclude_self=True, num_iterations=3)
    k = jaxcrf.filters.Window(
        (
            jaxcrf.position_features((4, 5), TINY.position_bandwidth),
            jaxcrf.bilateral_features(images, 2.0, 40.0),
        ),
        TINY.filter_size,
        weights=(0.6, 0.9),
    )
    expected = jaxcrf.mean_field(logits, k, num_iterations=3, unary_weight=0.7, exclude_self=True)
    result = layer.infer(images, logits)
    np.testing.assert_allclose(result.logits, expected.logits, atol=5e-6)
    assert result.stats.iterations == 3
    assert np.abs(result.probs - create("", num_iterations=3).infer(images, logits).probs).max() > 1e-3


@pytest.mark.exhaustive
def test_at_convergence_both_gradients_are_the_same():
    images, logits = example()
    weak = dataclasses.replace(TINY, position_weight=0.05, bilateral_weight=0.05, num_iterations=30)
    found = []
    for gradient in ("unrolled", "implicit"):
        layer = create("", preset=weak, gradient=gradient)
        loss = lambda layer: jnp.sum(layer.infer(images, logits).probs[..., 0] ** 2)  # noqa: E731
        found.append(names(nnx.grad(loss)(layer)))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, atol=1e-5, err_msg=name)


def test_learned_numbers_keep_their_sign_and_make_a_preset():
    images, logits = example()
    layer = moved(create(""))
    preset = layer.learned_preset()
    assert preset.position_bandwidth != TINY.position_bandwidth
    assert len(preset.position_bandwidth) == 2
    assert preset.filter_size == TINY.filter_size
    refined = jaxcrf.refine(images, logits=logits, preset=preset)
    np.testing.assert_allclose(layer.infer(images, logits).probs, refined, atol=5e-6)
    for name, scale in layer.scales.items():
        scale[...] = jnp.full_like(scale[...], -20.0)
        assert np.all(np.asarray(getattr(layer.learned_preset(), name)) > 0)


def test_new_parameters_compile_nothing_anew():
    images, logits = example()
    layer = create("+CT")
    layer(images, logits)
    assert not any(leaf.weak_type for leaf in names(layer).values())
    before = infer._cache_size()
    # A seed that no other test has compiled for.
    moved(layer, seed=7)(images, logits)
    assert infer._cache_size() == before


def test_trained_features_are_positions_at_first():
    layer = create("+T")
    y, x = np.meshgrid(np.arange(4) / 1.5, np.arange(5) / 2.5, indexing="ij")
    np.testing.assert_allclose(layer.smoothness_features, np.stack([y, x], -1), rtol=1e-6)
    layer.feature_offsets[...] = layer.feature_offsets[...].at[1, 2, 0].set(0.25)
    np.testing.assert_allclose(layer.smoothness_features[1, 2], [1 / 1.5 + 0.25, 2 / 2.5], rtol=1e-6)
    assert create("").smoothness_features is None
    np.testing.assert_array_equal(create("+C").compatibility[...], 1 - np.eye(LABELS))


@pytest.mark.exhaustive
def test_more_freedom_fits_better():
    # Labels 0 and 1 take turns in columns, each column of one colour: neither Potts nor Gaussians of positions can
    # know that neighbours differ, learned compatibilities can.
    height, width = 8, 8
    labels = np.broadcast_to(np.arange(width) % 2, (4, height, width))
    images = np.full((4, height, width, 3), 128, np.uint8)
    noise = np.random.default_rng(0).normal(0, 1.0, (4, height, width, LABELS))
    logits = jnp.asarray(0.5 * np.eye(LABELS)[labels] + noise, jnp.float32)
    reached = {}
    for variant in VARIANTS:
        layer = create(variant, shape=(height, width), num_iterations=5)
        optimizer = nnx.Optimizer(layer, optax.adam(0.05), wrt=nnx.Param)

        @nnx.jit
        def step(layer, optimizer):
            loss, grads = nnx.value_and_grad(
                lambda layer: losses.cross_entropy(layer(images, logits), labels)
            )(layer)
            optimizer.update(layer, grads)
            return loss

        found = [float(step(layer, optimizer)) for _ in range(60)]
        assert np.isfinite(found).all()
        reached[variant] = found[-1]
    assert reached["+T"] < reached[""] - 0.01
    assert reached["+C"] < reached[""] - 0.01
    assert reached["+CT"] < min(reached["+C"], reached["+T"])


def test_bad_arguments_are_named():
    images, logits = example()
    with pytest.raises(ValueError, match="preset: got 'convcfr'"):
        ConvCRF(LABELS, preset="convcfr")
    with pytest.raises(ValueError, match="num_labels: got 0"):
        ConvCRF(0)
    with pytest.raises(ValueError, match="gradient: got 'exact'"):
        ConvCRF(LABELS, gradient="exact")
    with pytest.raises(ValueError, match="num_iterations: got -1"):
        ConvCRF(LABELS, num_iterations=-1)
    with pytest.raises(ValueError, match="image_shape: got None with trainable_features=True"):
        ConvCRF(LABELS, trainable_features=True)
    with pytest.raises(ValueError, match=r"image_shape: got \(4, 5\) with trainable_features=False"):
        ConvCRF(LABELS, image_shape=(4, 5))
    with pytest.raises(ValueError, match=r"image_shape: got \(4, 5, 3\); expected \(height, width\)"):
        ConvCRF(LABELS, trainable_features=True, image_shape=(4, 5, 3))
    with pytest.raises(ValueError, match=r"logits: got shape \(4, 5, 3\); expected \[\*batch, H, W, 4\]"):
        ConvCRF(4)(images, logits)
    with pytest.raises(ValueError, match=r"images: got shape \(3, 5, 3\) for logits of shape \(4, 5, 3\)"):
        create("")(images[1:], logits)
    with pytest.raises(ValueError, match=r"images: got 3 × 5 pixels; the trained features .* of 4 × 5"):
        create("+T")(images[1:], logits[1:])
