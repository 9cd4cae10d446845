"""`refine` from the outside: results, every documented mistake, and the core without the checks."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from jaxcrf import presets
from jaxcrf.filters import Dense, Landmark, Lattice, Window, select_filter
from jaxcrf.refinement import RefineConfig


def example(height=24, width=30, seed=0):
    """A two-coloured image, its labels, and those with a share flipped."""
    rng = np.random.default_rng(seed)
    truth = (np.add.outer(np.arange(height), np.arange(width)) > (height + width) / 2).astype(np.int32)
    image = np.where(truth[..., None] == 1, [200, 40, 40], [40, 40, 200]) + rng.normal(
        0, 5, (height, width, 3)
    )
    noisy = np.where(rng.random(truth.shape) < 0.15, 1 - truth, truth)
    return np.clip(image, 0, 255).astype(np.uint8), truth, noisy


def as_probs(labels, confidence=0.7):
    return np.exp(np.asarray(jaxcrf.unary_from_labels(labels, 2, confidence=confidence)))


IMAGE, TRUTH, NOISY = example()
PROBS = as_probs(NOISY)

# The default preset's scores reach 130, where float32 numbers lie 1.5e-5 apart; five updates pass on what a
# differently compiled program rounds differently.
ROUNDING = 2e-4


@pytest.mark.parametrize("preset", [None, *presets.names()])
def test_noise_goes_and_edges_stay(preset):
    refined = jaxcrf.refine(IMAGE, PROBS, preset=preset)
    assert refined.dtype == jnp.float32
    np.testing.assert_allclose(refined.sum(-1), 1, atol=1e-5)
    accuracy = (np.asarray(refined).argmax(-1) == TRUTH).mean()
    assert accuracy > 0.95 > (NOISY == TRUTH).mean() + 0.05


@pytest.mark.parametrize("filter", ["auto", "dense", "lattice", "landmark"])
def test_the_fully_connected_crf_removes_noise_too(filter):
    refined = np.asarray(jaxcrf.refine(IMAGE, PROBS, method="densecrf", filter=filter))
    np.testing.assert_allclose(refined.sum(-1), 1, atol=1e-5)
    assert (refined.argmax(-1) == TRUTH).mean() > 0.95


def test_the_fully_connected_crf_is_mean_field_over_the_filter_of_its_preset():
    p = presets.get("densecrf")
    features = (jaxcrf.position_features(TRUTH.shape, 3.0), jaxcrf.bilateral_features(IMAGE, 80.0, 13.0))
    assert (p.position_weight, p.bilateral_weight, p.num_iterations) == (3.0, 10.0, 5)
    for name, make in (("dense", Dense), ("lattice", Lattice), ("landmark", Landmark)):
        K = make(features, weights=(3.0, 10.0)).normalized("symmetric")
        expected = jaxcrf.mean_field(jnp.log(PROBS), K, num_iterations=5).probs
        found = jaxcrf.refine(IMAGE, PROBS, method="densecrf", filter=name)
        np.testing.assert_allclose(found, expected, atol=ROUNDING)
        # The core, in which a lattice has a static size, says the same.
        config = RefineConfig(preset=p, filter=name)
        np.testing.assert_allclose(
            jaxcrf.refine_logits(IMAGE, jnp.log(PROBS), config).probs, expected, atol=ROUNDING
        )


def test_auto_is_what_select_filter_says():
    assert select_filter(TRUTH.size, "cpu") == "dense"
    expected = jaxcrf.refine(IMAGE, PROBS, method="densecrf", filter=select_filter(TRUTH.size))
    np.testing.assert_array_equal(jaxcrf.refine(IMAGE, PROBS, method="densecrf"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("filter", ["dense", "lattice", "landmark"])
def test_an_image_of_one_colour_is_smoothed_by_position_alone(filter):
    flat = np.full_like(IMAGE, 130)
    refined = np.asarray(jaxcrf.refine(flat, PROBS, method="densecrf", filter=filter))
    assert np.isfinite(refined).all()
    votes = PROBS.sum((0, 1))
    assert (refined.argmax(-1) == votes.argmax()).all()


@pytest.mark.parametrize("filter", ["dense", "lattice", "landmark"])
def test_the_fully_connected_crf_takes_volumes_and_any_channels(filter):
    volume = np.concatenate([np.stack([IMAGE] * 3)] * 2, -1)
    refined = jaxcrf.refine(
        volume,
        labels=np.stack([NOISY] * 3),
        num_labels=2,
        method="densecrf",
        filter=filter,
        spatial_ndim=3,
        position_bandwidth=(1.0, 3.0, 3.0),
        bilateral_position_bandwidth=(10.0, 30.0, 30.0),
    )
    assert refined.shape == (3, *TRUTH.shape, 2)
    assert (np.asarray(refined).argmax(-1) == TRUTH).mean() > 0.95


def test_bandwidths_without_neighbours_are_refused():
    for name in ("position_bandwidth", "bilateral_position_bandwidth"):
        with pytest.raises(ValueError, match=f"{name}: got 0.1, at which no pixel sees another"):
            jaxcrf.refine(IMAGE, PROBS, method="densecrf", **{name: 0.1})
    apart = (0.1, 3.0)  # columns that do not see each other still see along themselves
    assert jaxcrf.refine(IMAGE, PROBS, method="densecrf", position_bandwidth=apart).shape == PROBS.shape


def test_too_many_labels_for_the_memory_are_refused_before_it_is_filled():
    labels = np.zeros((2000, 2000), np.int32)
    image = np.zeros((2000, 2000, 3), np.uint8)
    with pytest.raises(
        MemoryError, match=r"2000 x 2000 pixels with 1000000 labels needs at least \d+\.\d GiB"
    ):
        jaxcrf.refine(image, labels=labels, num_labels=1_000_000, method="densecrf")


def test_probs_logits_and_labels_are_three_ways_to_say_the_same():
    expected = jaxcrf.refine(IMAGE, PROBS)
    np.testing.assert_allclose(jaxcrf.refine(IMAGE, logits=np.log(PROBS)), expected, atol=ROUNDING)
    np.testing.assert_allclose(jaxcrf.refine(IMAGE, labels=NOISY, num_labels=2), expected, atol=ROUNDING)
    np.testing.assert_allclose(jaxcrf.refine(IMAGE, logits=np.log(PROBS) + 3.0), expected, atol=ROUNDING)


def test_it_is_mean_field_over_the_windows_of_its_preset():
    p = presets.get("convcrf_reference")
    features = (
        jaxcrf.position_features(TRUTH.shape, p.position_bandwidth),
        jaxcrf.bilateral_features(IMAGE, None, p.bilateral_color_bandwidth),
    )
    K = Window(features, p.filter_size, weights=[p.position_weight, p.bilateral_weight], blur=p.blur)
    expected = jaxcrf.mean_field(np.log(PROBS), K, num_iterations=5, unary_weight=p.unary_weight).probs
    np.testing.assert_allclose(jaxcrf.refine(IMAGE, PROBS, preset="convcrf_reference"), expected, atol=1e-6)


def test_parameters_replace_the_preset_s():
    base = presets.get("convcrf")
    changed = dataclasses.replace(base, filter_size=5, blur=2, num_iterations=2, normalization="after")
    expected = jaxcrf.refine(IMAGE, PROBS, preset=changed)
    found = jaxcrf.refine(
        IMAGE, PROBS, preset="convcrf", filter_size=5, blur=2, num_iterations=2, normalization="after"
    )
    np.testing.assert_array_equal(found, expected)
    one_kernel = jaxcrf.refine(IMAGE, PROBS, position_weight=0.0)
    assert not np.allclose(one_kernel, jaxcrf.refine(IMAGE, PROBS))


def test_ignored_pixels_are_filled_in():
    labels = NOISY.copy()
    labels[5:9, 5:9] = 255
    refined = np.asarray(jaxcrf.refine(IMAGE, labels=labels, num_labels=2)).argmax(-1)
    np.testing.assert_array_equal(refined[5:9, 5:9], TRUTH[5:9, 5:9])


def test_a_batch_is_a_loop():
    second = example(seed=1)
    images, probs = np.stack([IMAGE, second[0]]), np.stack([PROBS, as_probs(second[2])])
    together = jaxcrf.refine(images, probs)
    for item in range(2):
        np.testing.assert_allclose(together[item], jaxcrf.refine(images[item], probs[item]), atol=ROUNDING)


def test_images_without_channels_and_with_many():
    grey = IMAGE.mean(-1).astype(np.uint8)
    np.testing.assert_array_equal(jaxcrf.refine(grey, PROBS), jaxcrf.refine(grey[..., None], PROBS))
    assert jaxcrf.refine(np.concatenate([IMAGE, IMAGE], -1), PROBS).shape == PROBS.shape


def test_volumes():
    image, labels = np.stack([IMAGE] * 6), np.stack([NOISY] * 6)
    refined = jaxcrf.refine(image, labels=labels, num_labels=2, spatial_ndim=3, filter_size=5, blur=2)
    assert refined.shape == (6, *TRUTH.shape, 2)
    assert (np.asarray(refined).argmax(-1) == TRUTH).mean() > 0.95


def test_one_pixel_and_one_label():
    one = jaxcrf.refine(IMAGE[:1, :1], PROBS[:1, :1])
    assert one.shape == (1, 1, 2)
    assert np.asarray(one).argmax() == PROBS[0, 0].argmax()
    certain = np.ones((*TRUTH.shape, 1), np.float32)
    np.testing.assert_array_equal(jaxcrf.refine(IMAGE, certain), certain)
    np.testing.assert_array_equal(jaxcrf.refine(IMAGE, labels=np.zeros_like(NOISY), num_labels=1), certain)
    np.testing.assert_array_equal(jaxcrf.refine(IMAGE, logits=7 * certain), certain)


def test_the_input_is_left_as_it_was():
    probs = jnp.asarray(PROBS)
    before, host = np.array(probs), PROBS.copy()
    jaxcrf.refine(IMAGE, probs)
    jaxcrf.refine(IMAGE, PROBS)

    class Parameter:  # as neural-network libraries have them: an object around an array
        def __init__(self, value):
            self.value, self.shape, self.ndim, self.dtype = value, value.shape, value.ndim, value.dtype

        def __jax_array__(self):
            return self.value

    jaxcrf.refine(IMAGE, Parameter(probs))
    np.testing.assert_array_equal(probs, before)
    np.testing.assert_array_equal(PROBS, host)


def test_the_core_jits_differentiates_and_batches():
    config = jaxcrf.RefineConfig(dataclasses.replace(presets.get("convcrf"), filter_size=5, blur=2))
    logits = jnp.log(PROBS)

    @jax.jit
    def loss(image, logits):
        return -jnp.mean(jnp.log(jaxcrf.refine_logits(image, logits, config).probs[..., 0] + 1e-6))

    image_gradient, gradient = jax.grad(loss, argnums=(0, 1))(jnp.asarray(IMAGE, jnp.float32), logits)
    assert np.isfinite(image_gradient).all()
    assert np.abs(gradient).max() > 0
    stacked = jax.vmap(lambda i, u: jaxcrf.refine_logits(i, u, config).probs)(
        jnp.stack([IMAGE] * 2), jnp.stack([logits] * 2)
    )
    np.testing.assert_allclose(stacked[1], jaxcrf.refine_logits(IMAGE, logits, config).probs, atol=ROUNDING)
    assert np.isnan(jaxcrf.refine_logits(IMAGE, logits.at[0, 0].set(jnp.nan), config).probs).any()


def test_refining_again_compiles_nothing():
    from jaxcrf import refinement

    jaxcrf.refine(IMAGE, PROBS)
    compiled = refinement._jitted(refinement._refine_probs, True)
    count = compiled._cache_size()
    jaxcrf.refine(IMAGE[::-1].copy(), PROBS[::-1].copy())
    assert compiled._cache_size() == count


BAD_CALLS = {
    "nothing": (TypeError, "exactly one of probs, logits and labels; got none", (IMAGE,), {}),
    "two unaries": (TypeError, "got probs and logits", (IMAGE, PROBS), {"logits": PROBS}),
    "unknown parameter": (
        TypeError,
        "unknown parameters colour; preset fields are",
        (IMAGE, PROBS),
        {"colour": 1},
    ),
    "labels without a count": (TypeError, "labels needs num_labels", (IMAGE,), {"labels": NOISY}),
    "a count without labels": (TypeError, "num_labels goes with labels", (IMAGE, PROBS), {"num_labels": 2}),
    "method": (ValueError, "method: got 'magic'", (IMAGE, PROBS), {"method": "magic"}),
    "filter": (ValueError, "filter: got 'lattice'", (IMAGE, PROBS), {"filter": "lattice"}),
    "preset": (
        ValueError,
        "preset: got 'convcfr'.*did you mean 'convcrf'",
        (IMAGE, PROBS),
        {"preset": "convcfr"},
    ),
    "normalization": (ValueError, "normalization: got 'x'", (IMAGE, PROBS), {"normalization": "x"}),
    "even window": (ValueError, "filter_size: got 4", (IMAGE, PROBS), {"filter_size": 4}),
    "no bandwidth": (ValueError, "color_bandwidth: got 0", (IMAGE, PROBS), {"bilateral_color_bandwidth": 0}),
    "no kernel": (ValueError, "both are 0", (IMAGE, PROBS), {"position_weight": 0, "bilateral_weight": 0}),
    "rank of the unary": (ValueError, "probs: got shape", (IMAGE, PROBS[0, 0]), {}),
    "rank of the image": (ValueError, "image: got shape", (IMAGE[0], PROBS), {}),
    "size": (ValueError, "image: got shape .* does not fit probs", (IMAGE[:-1], PROBS), {}),
    "axes swapped": (ValueError, "axis order is height, width", (np.swapaxes(IMAGE, 0, 1), PROBS), {}),
    "batch": (ValueError, "image: got shape", (np.stack([IMAGE] * 3), np.stack([PROBS] * 2)), {}),
    "sum": (ValueError, "do not sum to 1", (IMAGE, 0.9 * PROBS), {}),
    "negative": (ValueError, "negative", (IMAGE, np.log(PROBS)), {}),
    "NaN": (ValueError, "probs: holds NaN", (IMAGE, np.where(PROBS > 0.5, np.nan, PROBS)), {}),
    "inf": (
        ValueError,
        "logits: holds NaN or infinite",
        (IMAGE,),
        {"logits": np.where(PROBS > 0.5, np.inf, PROBS)},
    ),
    "integers as probabilities": (ValueError, "probs: got dtype uint8", (IMAGE, IMAGE[..., :2]), {}),
    "integers as logits": (
        ValueError,
        "logits: got dtype int32",
        (IMAGE,),
        {"logits": np.zeros((*TRUTH.shape, 2), np.int32)},
    ),
    "floats as labels": (
        ValueError,
        "labels: got dtype float",
        (IMAGE,),
        {"labels": NOISY * 1.0, "num_labels": 2},
    ),
    "label range": (ValueError, "labels: holds label 9", (IMAGE,), {"labels": NOISY + 8, "num_labels": 2}),
    "num_labels": (ValueError, "num_labels: got 0", (IMAGE,), {"labels": NOISY, "num_labels": 0}),
    "NaN image": (ValueError, "image: holds NaN", (np.full(IMAGE.shape, np.nan), PROBS), {}),
    "boolean image": (ValueError, "image: got dtype bool", (IMAGE > 100, PROBS), {}),
    "no pixels": (ValueError, "holds nothing", (IMAGE[:0], PROBS[:0]), {}),
    "no labels": (ValueError, "holds nothing", (IMAGE, PROBS[..., :0]), {}),
    "no channels": (ValueError, "image: got shape .* holds nothing", (IMAGE[..., :0], PROBS), {}),
    "no image": (TypeError, "image: got NoneType", (None, PROBS), {}),
    "a file's name": (TypeError, "image: got str", ("photo.jpg", PROBS), {}),
    "weight": (ValueError, "unary_weight: got nan", (IMAGE, PROBS), {"unary_weight": np.nan}),
    "kind of preset": (ValueError, "preset: got 3", (IMAGE, PROBS), {"preset": 3}),
    "spatial_ndim": (ValueError, "spatial_ndim: got 7", (IMAGE, PROBS), {"spatial_ndim": 7}),
}


@pytest.mark.parametrize("mistake", list(BAD_CALLS))
def test_mistakes_are_named(mistake):
    error, message, arguments, options = BAD_CALLS[mistake]
    with pytest.raises(error, match=message):
        jaxcrf.refine(*arguments, **options)


def test_images_from_zero_to_one_warn():
    with pytest.warns(UserWarning, match="multiply the image by 255"):
        jaxcrf.refine(IMAGE / 255.0, PROBS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxcrf.refine(IMAGE.astype(np.float32), PROBS)
        jaxcrf.refine(np.zeros_like(IMAGE), PROBS)


def test_rounded_probabilities_are_accepted():
    jaxcrf.refine(IMAGE, PROBS.astype(np.float16))
    jaxcrf.refine(IMAGE, np.round(PROBS * 255) / 255)


@pytest.mark.slow
def test_a_medical_volume():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (64, 256, 256)).astype(np.uint8)
    probs = rng.dirichlet(np.ones(4), size=image.shape).astype(np.float32)
    refined = jaxcrf.refine(image, probs, spatial_ndim=3, filter_size=5)
    assert refined.shape == probs.shape
    np.testing.assert_allclose(refined.sum(-1), 1, atol=1e-5)
