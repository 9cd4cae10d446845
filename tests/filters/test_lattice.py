"""The permutohedral lattice."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import FilterSuite
from jaxcrf.filters import Lattice
from jaxcrf.filters.lattice import default_capacity
from oracles import gaussian_matrix, permutohedral


def features(*shape, seed=0, spread=0.7):
    return (spread * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


class TestLattice(FilterSuite):
    ARGUMENTS: ClassVar = {
        "five features": ((features(5, 7, 5),), {"weights": 1.5}),
        "one pixel": ((features(1, 1, 3),), {}),
        "both orders": ((features(5, 6, 4),), {"symmetric": True}),
        "shared and batched": ((features(4, 5, 2), features(2, 4, 5, 3)), {}),
        "volume": ((features(2, 3, 4, 4),), {"spatial_ndim": 3}),
    }
    FURTHER_CASES: ClassVar = ("five features", "both orders", "shared and batched", "volume")
    CASES: ClassVar = {
        name: lambda arguments=arguments: Lattice(arguments[0], **arguments[1])
        for name, arguments in ARGUMENTS.items()
    } | {"symmetric": lambda: Lattice(features(4, 5, 3)).normalized("symmetric")}

    def parameters(self, case):
        arrays, options = self.ARGUMENTS.get(case, ((features(4, 5, 3),), {}))
        kind = case if case == "symmetric" else "none"
        options = {"scaling": "continuous"} | options  # the other is not differentiated through
        weights = np.broadcast_to(np.float32(options.pop("weights", 1.0)), (len(arrays),))
        return (arrays, weights), lambda p: Lattice(p[0], weights=p[1], **options).normalized(kind)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_a_plain_lattice(d, reverse):
    f, q = features(6, 7, d), np.random.default_rng(1).normal(size=(6, 7, 2)).astype(np.float32)
    K = Lattice(f, scaling="classic")
    found = K.T(q) if reverse else K(q)
    order = reversed(range(d + 1)) if reverse else None
    expected = permutohedral(f.reshape(-1, d), q.reshape(-1, 2), order).reshape(q.shape) / (1 + 2.0**-d)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("scaling", ["continuous", "gaussian"])
@pytest.mark.parametrize("d", [1, *(pytest.param(d, marks=pytest.mark.exhaustive) for d in (2, 3)), 4])
def test_a_constant_is_summed_as_the_gaussian_does(d, scaling):
    # Evenly spread features, far from their border: the sum is (2π)^{d/2} times their density.
    side = {1: 400, 2: 60, 3: 26, 4: 14}[d]
    step = {1: 0.05, 2: 0.2, 3: 0.4, 4: 0.6}[d]
    grid = step * np.indices((side,) * d).reshape(d, -1).T.astype(np.float32)
    K = Lattice(grid, spatial_ndim=1, scaling=scaling)
    sums = np.asarray(K(np.ones((len(grid), 1), np.float32)))[:, 0]
    middle = np.abs(grid - grid.mean(0)).max(1) < 0.2 * step * side
    exact = gaussian_matrix(grid[middle][:20], grid).sum(1)
    # Sums near the border of the features are cut at lattice vertices rather than by the Gaussian's tail.
    np.testing.assert_allclose(sums[middle][:20], exact, rtol=0.05)


@pytest.mark.exhaustive
def test_the_gaussian_scaling_makes_up_for_holes():
    # In five dimensions most vertices around a pixel do not exist.
    f = jaxcrf.bilateral_features(smooth_photograph(40, 52), 12, 20)
    exact = gaussian_matrix(np.asarray(f.values).reshape(-1, 5)).sum(1)
    ones = np.ones((40, 52, 1), np.float32)

    def error(K):
        return np.median(np.abs(np.asarray(K(ones)).reshape(-1) / exact - 1))

    classic, continuous, gaussian = (Lattice(f, scaling=s) for s in ("classic", "continuous", "gaussian"))
    assert error(gaussian) < 0.08 < error(continuous) < error(classic)
    # Taking a normalisation off brings the correction back, and normalised they are all the same.
    np.testing.assert_allclose(
        gaussian.normalized("after").normalized("none")(ones), gaussian(ones), rtol=1e-6
    )
    np.testing.assert_allclose(
        gaussian.normalized("symmetric")(ones), classic.normalized("symmetric")(ones), rtol=1e-5
    )


def test_symmetric_normalisation_agrees_with_the_exact_kernel():
    image = smooth_photograph(40, 52)
    f = jaxcrf.bilateral_features(image, 12, 20)
    q = np.random.default_rng(0).random((40, 52, 3)).astype(np.float32)
    exact = gaussian_matrix(np.asarray(f.values).reshape(-1, 5))
    scale = exact.sum(1) ** -0.5
    expected = (scale[:, None] * exact * scale) @ q.reshape(-1, 3)
    found = np.asarray(Lattice(f).normalized("symmetric")(q)).reshape(-1, 3)
    assert np.median(np.abs(found / expected - 1)) < 0.023  # what the public C++ code has on photographs


def smooth_photograph(height, width):
    y, x = np.mgrid[:height, :width] / max(height, width)
    channels = [np.sin(5 * x + 3 * y), np.cos(4 * y - 2 * x), np.sin(9 * x * y)]
    noise = np.random.default_rng(0).normal(size=(height, width, 3))
    return np.clip(127 + 100 * np.stack(channels, -1) + 4 * noise, 0, 255).astype(np.uint8)


def test_one_colour_is_one_simplex():
    f = np.full((4, 5, 3), (0.3, -0.1, 0.2), np.float32)
    q = np.random.default_rng(0).random((4, 5, 2)).astype(np.float32)
    K = Lattice(f)
    assert int(K.num_vertices[0]) == 4
    # All pixels coincide, and so do their messages: with the correction, the sum of all maps.
    np.testing.assert_allclose(K(q), np.broadcast_to(q.sum((0, 1)), q.shape), rtol=1e-4)


def test_gradients_reach_the_image():
    image = jnp.asarray(smooth_photograph(12, 14), jnp.float32)
    q = jnp.asarray(np.random.default_rng(0).random((12, 14, 2)), jnp.float32)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(12, 14, 2)), jnp.float32)

    def value(image):
        K = Lattice(jaxcrf.bilateral_features(image, 5, 20)).normalized("symmetric")
        return jnp.sum(g * K(q))

    gradient = jax.jit(jax.grad(value))(image)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_positions_alone_take_the_exact_path():
    f = jaxcrf.position_features((9, 11), 2.0)
    K = Lattice(f)
    assert K.capacity == ()
    q = np.random.default_rng(0).random((9, 11, 2)).astype(np.float32)
    expected = gaussian_matrix(np.asarray(f.values).reshape(-1, 2)) @ q.reshape(-1, 2)
    np.testing.assert_allclose(np.asarray(K(q)).reshape(-1, 2), expected, rtol=1e-5)
    assert len(Lattice(f, scaling="classic").capacity) == 1


class TestCapacity:
    def test_vertices_are_counted_where_features_are_concrete(self):
        K = Lattice(features(6, 7, 3))
        (count,), (capacity,) = K.num_vertices, K.capacity
        assert int(count) <= capacity < 1.2 * int(count) + 1
        assert not K.overflowed

    def test_too_little_room_is_an_error_that_says_how_much(self):
        count = int(Lattice(features(6, 7, 3)).num_vertices[0])
        with pytest.raises(ValueError, match=f"capacity={count}"):
            Lattice(features(6, 7, 3), capacity=count - 1)
        exact = Lattice(features(6, 7, 3), capacity=count)
        np.testing.assert_allclose(
            exact(np.ones((6, 7, 1), np.float32)),
            Lattice(features(6, 7, 3))(np.ones((6, 7, 1), np.float32)),
            rtol=1e-6,
        )

    def test_under_jit_too_little_room_is_nan_and_reported(self):
        count = int(Lattice(features(6, 7, 3)).num_vertices[0])

        @jax.jit
        def message(f):
            K = Lattice(f, capacity=count - 1)
            return K(jnp.ones((6, 7, 1))), K.overflowed

        message, overflowed = message(features(6, 7, 3))
        assert np.isnan(message).all()
        assert overflowed

    @pytest.mark.exhaustive
    def test_one_overflowing_image_does_not_spoil_the_others(self):
        calm, busy = np.zeros((6, 7, 3), np.float32), 9 * features(6, 7, 3)
        message = jax.jit(lambda f: Lattice(f, capacity=20)(jnp.ones((6, 7, 1))))(np.stack([calm, busy]))
        assert np.isfinite(message[0]).all()
        assert np.isnan(message[1]).all()

    def test_under_jit_small_images_always_have_room(self):
        f = 50 * features(6, 7, 5)  # every pixel alone
        message = jax.jit(lambda f: Lattice(f)(jnp.ones((6, 7, 1))))(f)
        np.testing.assert_allclose(message, Lattice(f)(jnp.ones((6, 7, 1))), rtol=1e-6)
        assert default_capacity(42, 5) == 6 * 42
        assert default_capacity(10**6, 5) == 2 * 10**6


class TestBadInput:
    def test_nan_features(self):
        f = features(4, 5, 3)
        f[1, 2, 0] = np.nan
        with pytest.raises(ValueError, match="features: holds NaN"):
            Lattice(f)

    def test_under_jit_nan_propagates(self):
        f = features(4, 5, 3)
        f[1, 2, 0] = np.nan
        assert np.isnan(jax.jit(lambda f: Lattice(f)(jnp.ones((4, 5, 1))))(f)).any()

    def test_features_that_span_too_many_cells(self):
        with pytest.raises(ValueError, match="larger bandwidths"):
            Lattice(1e6 * features(4, 5, 5))

    def test_no_feature(self):
        with pytest.raises(ValueError, match="at least one dimension"):
            Lattice(np.zeros((4, 5, 0), np.float32))

    @pytest.mark.parametrize("capacity", [0, -3, 2.5, True])
    def test_capacity(self, capacity):
        with pytest.raises(ValueError, match="capacity: got"):
            Lattice(features(4, 5, 3), capacity=capacity)

    def test_scaling(self):
        with pytest.raises(ValueError, match="scaling: got 'exact'"):
            Lattice(features(4, 5, 3), scaling="exact")

    def test_too_few_axes(self):
        with pytest.raises(ValueError, match="spatial_ndim"):
            Lattice(features(4, 5), spatial_ndim=2)

    def test_weights(self):
        with pytest.raises(ValueError, match="weights: got shape"):
            Lattice(features(4, 5, 3), weights=(1.0, 2.0))
