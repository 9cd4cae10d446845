"""Landmarks for colours, moments of cells for positions."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import FilterSuite, dense_matrix
from jaxcrf.features import Features
from jaxcrf.filters import Landmark
from jaxcrf.filters.landmark import BARE_CELL, CELLS_PER_BANDWIDTH
from jaxcrf.filters.separable import SeparableKernel
from oracles import gaussian_matrix, pair_message, pair_message_vjp


def features(*shape, seed=0, spread=0.7):
    return (spread * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def colored(*shape, bandwidth, spatial_ndim=2, seed=0):
    """Positions of a known bandwidth and three random colours."""
    image = features(*shape, 3, seed=seed)
    return jaxcrf.bilateral_features(image, bandwidth, 1.0, spatial_ndim=spatial_ndim)


def photograph(height, width):
    """Two regions and a gradient, with noise, in 8 bits."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    channels = [np.sin(5 * x + 3 * y), np.cos(4 * y - 2 * x), np.sign(x - 0.4) * np.sin(9 * x * y)]
    noise = np.random.default_rng(0).normal(size=(height, width, 3))
    return np.clip(127 + 100 * np.stack(channels, -1) + 4 * noise, 0, 255).astype(np.uint8)


class TestLandmark(FilterSuite):
    # Gradients are taken in the leaves of the built filter, of which the landmarks are one: as functions of
    # the features they are constants to a gradient and not to a finite difference.
    FURTHER_CASES: ClassVar = ("one colour", "three kernels", "batches that broadcast", "volume")
    CASES: ClassVar = {
        "cells that do not fit": lambda: Landmark(colored(5, 7, bandwidth=(17.0, 33.0)), num_landmarks=6),
        "bare": lambda: Landmark(features(5, 7, 5), num_landmarks=9, weights=1.5),
        "one colour": lambda: Landmark(
            jaxcrf.bilateral_features(np.full((4, 5, 3), 77, np.uint8), 20, 13), num_landmarks=4
        ),
        "three kernels": lambda: Landmark(
            (jaxcrf.position_features((4, 5), 2.0), colored(4, 5, bandwidth=20.0), features(4, 5, 2)),
            num_landmarks=6,
            weights=(0.5, 2.0, 1.0),
        ),
        "batches that broadcast": lambda: Landmark(
            (features(3, 1, 2, 3, 2), features(2, 2, 3, 2)), num_landmarks=4
        ),
        "volume": lambda: Landmark(
            colored(3, 4, 5, bandwidth=(2.0, 20.0, 30.0), spatial_ndim=3), num_landmarks=6, spatial_ndim=3
        ),
        "symmetric": lambda: Landmark(colored(4, 5, bandwidth=17.0), num_landmarks=6).normalized("symmetric"),
    }


@pytest.mark.optimized
class TestAccuracy:
    def test_as_many_landmarks_as_colours_are_exact(self):
        f = features(6, 7, 3, spread=2.0)
        q = np.random.default_rng(1).normal(size=(1, 42, 3))
        expected = pair_message(q, (f.reshape(1, 42, 3),), np.ones(1))[0]
        magnitude = pair_message(q, (f.reshape(1, 42, 3),), np.ones(1), magnitude=True).max()
        # A landmark that the others represent to 100 roundings, 1.2e-5, may be left out; so much is lost.
        found = np.asarray(Landmark(f)(q.reshape(6, 7, 3).astype(np.float32))).reshape(42, 3)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * magnitude)
        with jax.enable_x64(True):
            found = np.asarray(Landmark(f.astype(np.float64))(q.reshape(6, 7, 3))).reshape(42, 3)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * magnitude)

    # Whole cells, ones cut to several pixels and to one, and cells of one pixel.
    @pytest.mark.parametrize(
        ("shape", "bandwidth"),
        [
            ((15, 23), 20.0),
            pytest.param((18, 19), (40.0, 6.0), marks=pytest.mark.exhaustive),
            pytest.param((2, 3, 29), (3.0, 50.0, 37.0), marks=pytest.mark.exhaustive),
        ],
    )
    def test_positions_are_those_of_the_gaussian(self, shape, bandwidth):
        # One colour, so that positions are all there is.
        f = jaxcrf.bilateral_features(
            np.full((*shape, 1), 9.0, np.float32), bandwidth, 1.0, spatial_ndim=len(shape)
        )
        exact = gaussian_matrix(np.asarray(f.values).reshape(-1, len(shape) + 1))
        found = dense_matrix(Landmark(f, num_landmarks=3, spatial_ndim=len(shape)))
        # A quadratic is off its linear fit by a twelfth of its curvature, times the squared width of the cell,
        # along every axis and for either pixel of a pair. Over a cell, and so nearly over a row, that averages out.
        assert np.abs(found - exact).max() < len(shape) * 2 / 12 / CELLS_PER_BANDWIDTH**2
        np.testing.assert_allclose(found.sum(-1), exact.sum(-1), rtol=2e-3)

    def test_pixels_without_known_positions_may_fill_many_cells(self):
        f = features(3, BARE_CELL, 1)
        q = np.random.default_rng(0).random((3 * BARE_CELL, 2)).astype(np.float32)
        rows = np.arange(0, len(q), 97)
        expected = gaussian_matrix(f.reshape(-1, 1)[rows], f.reshape(-1, 1)) @ q
        found = Landmark(f, num_landmarks=16)(q.reshape(3, BARE_CELL, 2)).reshape(-1, 2)[rows]
        # One feature of a few bandwidths is represented to rounding, but at the few pixels beyond the landmarks.
        assert np.median(np.abs(found / expected - 1)) < 1e-5

    @pytest.mark.exhaustive
    def test_more_landmarks_are_more_exact(self):
        f = jaxcrf.bilateral_features(photograph(40, 52), 12, 20)
        exact = gaussian_matrix(np.asarray(f.values).reshape(-1, 5))
        q = np.random.default_rng(0).random((40 * 52, 3)).astype(np.float32)
        expected = exact @ q
        errors = []
        for count in (16, 64, 256):
            found = np.asarray(Landmark(f, num_landmarks=count)(q.reshape(40, 52, 3))).reshape(-1, 3)
            errors.append(np.median(np.abs(found / expected - 1)))
        assert errors[0] > 3 * errors[1] > 9 * errors[2]
        assert errors[-1] < 0.002

    @pytest.mark.parametrize("bandwidths", [(80, 13), (100, 20)])
    def test_messages_on_photographs_are_within_a_percent(self, data_dir, bandwidths):
        path = next((data_dir / "voc_sample").rglob("2007_000847.jpg"))
        image = jaxcrf.data.read_image(path)
        f = jaxcrf.bilateral_features(image, *bandwidths)
        rng = np.random.default_rng(0)
        q = rng.random((*image.shape[:2], 5)) ** 2
        values = np.asarray(f.values, np.float64).reshape(-1, 5)
        chosen = rng.choice(len(values), 200, replace=False)
        # Ten at a time, since all differences are held at once.
        expected = np.concatenate(
            [gaussian_matrix(values[part], values) @ q.reshape(-1, 5) for part in np.split(chosen, 20)]
        )
        found = np.asarray(Landmark(f)(q.astype(np.float32))).reshape(-1, 5)[chosen]
        errors = np.abs(found - expected).sum(-1) / expected.sum(-1)
        assert np.median(errors) < 0.01


class TestGradients:
    def test_they_are_the_exact_kernels_where_landmarks_are_all_colours(self):
        # `C W⁺ Cᵀ` with C = W, of which only C moves: dC + dCᵀ, as for the Gaussian itself.
        with jax.enable_x64(True):
            f = features(4, 5, 3, spread=1.5).astype(np.float64)
            q, g = (np.random.default_rng(seed).normal(size=(4, 5, 2)) for seed in (1, 2))
            found = jax.grad(lambda f, q: jnp.sum(g * Landmark(f)(q)), argnums=(0, 1))(jnp.asarray(f), q)
        expected = pair_message_vjp(
            q.reshape(1, 20, 2), (f.reshape(1, 20, 3),), np.ones(1), cotangent=g.reshape(1, 20, 2)
        )
        # `W⁺` multiplies rounding, 1e-16, by the condition of `W`, 65 here; sums are of order ten.
        np.testing.assert_allclose(found[0].reshape(20, 3), expected.features[0][0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(found[1].reshape(20, 2), expected.q[0], rtol=0, atol=1e-12)

    def test_they_reach_the_image_and_not_known_positions(self):
        image = jnp.asarray(photograph(12, 14), jnp.float32)
        q, g = (np.random.default_rng(seed).random((12, 14, 2)).astype(np.float32) for seed in (0, 1))

        def value(values):
            K = Landmark(Features(values, (5.0, 5.0)), num_landmarks=8).normalized("symmetric")
            return jnp.sum(g * K(q))

        gradient = jax.jit(jax.grad(value))(jaxcrf.bilateral_features(image, 5, 20).values)
        assert np.isfinite(gradient).all()
        assert (gradient[..., :2] == 0).all()
        assert (np.abs(gradient[..., 2:]).max((0, 1)) > 0).all()

    def test_bandwidths_that_are_traced_have_one(self):
        image = jnp.asarray(photograph(6, 7), jnp.float32)

        def value(bandwidth):
            return jnp.sum(Landmark(jaxcrf.bilateral_features(image, bandwidth, 30.0))(jnp.ones((6, 7, 1))))

        assert jax.grad(value)(4.0) > 0  # wider kernels have larger sums


class TestTransforms:
    def test_it_is_built_the_same_under_jit_and_vmap(self):
        f = colored(3, 6, 7, bandwidth=20.0)
        q = np.random.default_rng(0).random((3, 6, 7, 2)).astype(np.float32)
        expected = Landmark(f, num_landmarks=5)(q)

        def message(values, q):
            return Landmark(Features(values, (20.0, 20.0)), num_landmarks=5)(q)

        np.testing.assert_allclose(jax.jit(message)(f.values, q), expected, rtol=1e-4)
        np.testing.assert_allclose(jax.vmap(message)(f.values, q), expected, rtol=1e-4)

    def test_float64_stays_float64(self):
        with jax.enable_x64(True):
            K = Landmark(colored(6, 7, bandwidth=3.0), num_landmarks=5)
            assert K(jnp.ones((6, 7, 1), jnp.float64)).dtype == jnp.float64

    def test_positions_alone_take_the_exact_path(self):
        K = Landmark(jaxcrf.position_features((9, 11), 2.0))
        assert isinstance(K.kernels[0], SeparableKernel)


class TestColoursWithoutLandmark:
    """More colours, all far apart, than landmarks."""

    def values(self):
        return 40 * features(6, 7, 3)

    def test_such_pixels_are_left_alone(self):
        q = np.random.default_rng(0).random((6, 7, 2)).astype(np.float32)
        np.testing.assert_allclose(Landmark(self.values(), num_landmarks=2)(q), q, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["before", "after", "symmetric"])
    def test_normalisations_are_finite(self, kind):
        # A spread at which row sums of the landmarks alone are negative.
        for spread in (1, 2, 4):
            f = spread * features(20, 21, 3)
            K = Landmark(f, num_landmarks=12)
            sums = K(np.ones((20, 21, 1), np.float32))
            assert float(sums.min()) > 1 - 1e-4
            assert np.isfinite(K.normalized(kind)(np.ones((20, 21, 1), np.float32))).all()

    def test_it_is_positive_semi_definite(self):
        matrix = dense_matrix(Landmark(2 * features(9, 9, 3), num_landmarks=12))
        values = np.linalg.eigvalsh(matrix.astype(np.float64))
        assert values[0] > -1e-5 * values[-1]


class TestBadInput:
    @pytest.mark.parametrize("num_landmarks", [0, -3, 2.5, True, None])
    def test_num_landmarks(self, num_landmarks):
        with pytest.raises(ValueError, match="num_landmarks: got"):
            Landmark(features(4, 5, 3), num_landmarks=num_landmarks)

    def test_nan_features(self):
        f = features(4, 5, 3)
        f[1, 2, 0] = np.nan
        with pytest.raises(ValueError, match="features: holds NaN"):
            Landmark(f)

    def test_under_jit_nan_propagates(self):
        f = features(4, 5, 3)
        f[1, 2, 0] = np.nan
        assert np.isnan(jax.jit(lambda f: Landmark(f)(jnp.ones((4, 5, 1))))(f)).all()

    def test_no_feature(self):
        with pytest.raises(ValueError, match="at least one dimension"):
            Landmark(np.zeros((4, 5, 0), np.float32))

    def test_too_few_axes(self):
        with pytest.raises(ValueError, match="spatial_ndim"):
            Landmark(features(4, 5))

    def test_weights(self):
        with pytest.raises(ValueError, match="weights: got shape"):
            Landmark(features(4, 5, 3), weights=(1.0, 2.0))

    def test_position_bandwidths_that_need_too_much_memory(self):
        values = jax.ShapeDtypeStruct((4000, 4000, 5), jnp.float32)
        with pytest.raises(ValueError, match=r"\(2\.0, 2\.0\) are so small .* GB per label"):
            jax.eval_shape(lambda v: Landmark(Features(v, (2.0, 2.0))), values)
