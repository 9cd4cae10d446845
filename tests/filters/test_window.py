from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcrf
import oracles
from filter_suite import FilterSuite, assert_close, dense_matrix, random_maps
from jaxcrf.filters import Diagonal, Sum, Window


def image(*shape, seed=0, smooth=40.0):
    return (128 + smooth * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def bank(shape, filter_size, *, batch=(), channels=3, blur=1, kind="none"):
    """A smoothness and an appearance kernel over a random image."""
    features = (
        jaxcrf.position_features(shape, 1.5),
        jaxcrf.bilateral_features(image(*batch, *shape, channels), 3.0, 60.0, spatial_ndim=len(shape)),
    )
    weights = np.array([0.7, 2.0], np.float32)
    K = Window(features, filter_size, weights=weights, blur=blur, spatial_ndim=len(shape))
    return K.normalized(kind)


class TestWindow(FilterSuite):
    FURTHER_CASES: ClassVar = (
        "smoothness",
        "bank, batch",
        "bank, rectangular window",
        "bank, before",
        "blur 3, cut cells",
        "blur 4, larger than the image",
        "volume",
        "volume, blur 2",
        "one row",
        "window larger than the image",
    )
    CASES: ClassVar = {
        "one kernel of bare features": lambda: Window(image(6, 5, 2, smooth=1.0), 3),
        "smoothness": lambda: Window(jaxcrf.position_features((5, 7), (1.0, 2.0)), 5, weights=2.0),
        "bank": lambda: bank((6, 7), 5),
        "bank, rectangular window": lambda: bank((6, 7), (1, 5)),
        "bank, batch": lambda: bank((5, 4), 3, batch=(2,)),
        "bank, symmetric": lambda: bank((6, 7), 5, kind="symmetric"),
        "bank, before": lambda: bank((4, 5), 3, kind="before"),
        "bank, after, batch": lambda: bank((4, 5), 3, kind="after", batch=(2,)),
        "blur 2": lambda: bank((6, 8), 3, blur=2),
        "blur 3, cut cells": lambda: bank((7, 8), 3, blur=3),
        "blur 2, symmetric": lambda: bank((5, 6), 3, blur=2, kind="symmetric"),
        "blur 4, larger than the image": lambda: bank((3, 5), 5, blur=4),
        "transposed blur 2, before": lambda: bank((5, 6), 3, blur=2, kind="before").T,
        "volume": lambda: bank((3, 4, 5), 3, channels=1),
        "volume, blur 2": lambda: bank((3, 4, 5), 3, channels=1, blur=2),
        "one pixel": lambda: bank((1, 1), 3),
        "one row": lambda: bank((1, 9), 5),
        "window larger than the image": lambda: bank((3, 4), 11),
    }


class TestSum(FilterSuite):
    CASES: ClassVar = {
        "windows of two sizes": lambda: bank((5, 6), 3) + bank((5, 6), 5),
        "blurred and not": lambda: bank((6, 6), 3) + bank((6, 6), 3, blur=2),
        "without the centre": lambda: bank((5, 6), 3) + Diagonal(-bank((5, 6), 3).diagonal()),
    }

    def test_normalisation_scales_by_row_sums(self, case):
        if case == "without the centre":
            pytest.skip("each term is normalised by itself, and one of them is negative")
        K = self.CASES[case]()
        normalised = K.normalized("after")
        total = np.asarray(normalised(np.ones((*K.spatial, 1), np.float32)))
        assert_close(total, np.full_like(total, 2 * 2.7))


def test_it_is_the_float64_sum_over_the_window():
    shape, size = (9, 10), 5
    colours = image(*shape, 3)
    K = Window(
        (jaxcrf.position_features(shape, 2.0), jaxcrf.bilateral_features(colours, 4.0, 50.0)),
        size,
        weights=[0.5, 2.0],
    )
    q = random_maps(K)
    grid = np.stack(np.mgrid[:9, :10], -1).astype(np.float64)
    features = [(grid / 2)[None], np.concatenate([grid / 4, colours / 50.0], -1)[None]]
    expected = oracles.window_message(q[None], features, [0.5, 2.0], filter_size=size)[0]
    assert_close(K(q), expected)


def test_tabulated_positions_are_those_in_the_features():
    shape = (7, 8)
    known = jaxcrf.bilateral_features(image(*shape, 3), 2.0, 50.0)
    unknown = jaxcrf.Features(known.values)
    q = random_maps(Window(known))
    assert_close(Window(known, 5)(q), Window(unknown, 5)(q))


@pytest.mark.parametrize("blur", [2, 3, 4])
@pytest.mark.parametrize("shape", [(8, 12), (7, 9), (5, 6)])
def test_blur_is_pool_filter_upsample_written_out(blur, shape):
    # Every step as a float64 matrix: P averages the pixels of a cell, U is linear between cell centres.
    def pool(n):
        cells = -(-n // blur)
        front = -(-(cells * blur - n) // 2)
        member = (np.arange(n)[None] + front) // blur == np.arange(cells)[:, None]
        return member / member.sum(1, keepdims=True)

    def upsample(n):
        cells = -(-n // blur)
        front = -(-(cells * blur - n) // 2)
        position = np.clip((np.arange(n) + front + 0.5) / blur - 0.5, 0, cells - 1)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, cells - 1)
        matrix = np.zeros((n, cells))
        matrix[np.arange(n), low] += 1 - (position - low)
        matrix[np.arange(n), high] += position - low
        return matrix

    colours = image(*shape, 3)
    K = Window(
        (jaxcrf.position_features(shape, 3.0), jaxcrf.bilateral_features(colours, None, 50.0)), 3, blur=blur
    )
    P, U = (np.kron(f(shape[0]), f(shape[1])) for f in (pool, upsample))
    grid = np.stack(np.mgrid[: shape[0], : shape[1]], -1).reshape(-1, 2) / 3.0
    cells = (len(pool(shape[0])), len(pool(shape[1])))
    features = [(P @ f).reshape(1, *cells, -1) for f in (grid, colours.reshape(-1, 3) / 50.0)]
    identity = np.eye(P.shape[0]).reshape(1, *cells, -1)
    core = oracles.window_message(identity, features, [1.0, 1.0], filter_size=3).reshape(P.shape[0], -1)
    assert_close(dense_matrix(K), U @ core @ P)


@pytest.mark.parametrize("kind", ["before", "after", "symmetric"])
@pytest.mark.parametrize("blur", [1, 2])
def test_each_kernel_is_normalised_by_itself_and_weighted_afterwards(kind, blur):
    shape = (5, 6)
    features = (jaxcrf.position_features(shape, 1.0), jaxcrf.bilateral_features(image(*shape, 3), None, 40.0))
    K = Window(features, 3, weights=[3.0, 10.0], blur=blur).normalized(kind)
    expected = 0
    for f, w in zip(features, (3.0, 10.0), strict=True):
        A = dense_matrix(Window(f, 3, blur=blur)).astype(np.float64)
        n = A.sum(1)
        left = {"before": np.ones_like(n), "after": 1 / n, "symmetric": n**-0.5}[kind]
        right = {"before": 1 / n, "after": np.ones_like(n), "symmetric": n**-0.5}[kind]
        expected = expected + w * left[:, None] * A * right[None]
    assert_close(dense_matrix(K), expected)


def test_windows_of_one_geometry_merge_into_one_bank():
    shape = (5, 6)
    first, second = Window(jaxcrf.position_features(shape, 2.0), 3), Window(image(*shape, 1, smooth=1.0), 3)
    merged = first.normalized("symmetric") + second
    assert isinstance(merged, Window)
    assert merged.is_symmetric
    q = random_maps(merged)
    assert_close(merged(q), np.asarray(first.normalized("symmetric")(q)) + np.asarray(second(q)))
    assert isinstance(first + Window(image(*shape, 1), 5), Sum)


@settings(max_examples=10, deadline=None)
@given(dy=st.integers(0, 3), dx=st.integers(0, 3), seed=st.integers(0, 100))
def test_it_commutes_with_translation_away_from_the_border(dy, dx, seed):
    whole, q = (
        image(12, 13, 3, seed=seed),
        np.random.default_rng(seed).normal(size=(12, 13, 2)).astype(np.float32),
    )

    def message(y, x):
        part = (slice(y, y + 9), slice(x, x + 10))
        return np.asarray(Window(jaxcrf.bilateral_features(whole[part], 3.0, 60.0), 5)(q[part]))

    np.testing.assert_allclose(
        message(dy, dx)[2:-5, 2:-5], message(0, 0)[2 + dy : dy + 4, 2 + dx : dx + 5], atol=1e-5
    )


def test_bandwidths_are_differentiable():
    shape = (6, 7)
    colours = image(*shape, 3)
    q, g = (np.random.default_rng(s).normal(size=(*shape, 2)) for s in (0, 1))

    def loss(theta):
        features = (
            jaxcrf.position_features(shape, theta[0]),
            jaxcrf.bilateral_features(jnp.asarray(colours, theta.dtype), theta[1], theta[2]),
        )
        return jnp.sum(g * Window(features, 5)(jnp.asarray(q, theta.dtype)))

    with jax.enable_x64(True):
        theta, step = jnp.array([1.5, 3.0, 50.0]), 1e-5
        found = jax.grad(loss)(theta)
        for a in range(3):
            e = np.zeros(3)
            e[a] = step
            # Truncation step² ≈ 1e-10, cancellation eps / step ≈ 1e-11.
            np.testing.assert_allclose(found[a], (loss(theta + e) - loss(theta - e)) / (2 * step), rtol=1e-7)


def test_symmetry_is_known_from_the_structure():
    assert all(bank((4, 5), 3, kind=kind).is_symmetric for kind in ("none", "symmetric"))
    assert not any(bank((4, 5), 3, kind=kind).is_symmetric for kind in ("before", "after"))
    assert not bank((4, 6), 3, blur=2).is_symmetric
    assert (bank((4, 5), 3) + bank((4, 5), 5)).is_symmetric


def test_it_describes_itself_and_stays_as_it_is():
    K = bank((4, 5), 3)
    assert "filter_size=(3, 3)" in repr(K)
    assert "float32[2]" in repr(K)
    with pytest.raises(AttributeError, match="cannot delete"):
        del K.weights
    assert sum([K, K]).weights.shape == (4,)


def test_16_bit_images_are_storage_only():
    colours = image(6, 7, 3).round()
    exact = Window(jaxcrf.bilateral_features(colours, 3.0, 60.0), 3, blur=2)
    stored = Window(jaxcrf.bilateral_features(jnp.asarray(colours, jnp.bfloat16), 3.0, 60.0), 3, blur=2)
    rounded = Window(
        jaxcrf.bilateral_features(np.asarray(jnp.asarray(colours, jnp.bfloat16), np.float32), 3.0, 60.0),
        3,
        blur=2,
    )
    q = random_maps(exact)
    assert stored.weights.dtype == jnp.float32
    np.testing.assert_array_equal(stored(q), rounded(q))


def test_features_may_be_shared_by_a_batch_or_not():
    shape = (5, 6)
    colours = image(2, *shape, 3)
    features = (jaxcrf.position_features(shape, 2.0), jaxcrf.bilateral_features(colours, None, 50.0))
    K = Window(features, 3)
    assert K.batch == (2,)
    q = random_maps(K, batch=())  # one map, two images
    for item in range(2):
        alone = Window((features[0], jaxcrf.bilateral_features(colours[item], None, 50.0)), 3)
        assert_close(K(q)[item], alone(q))


def test_weights_alone_can_be_traced():
    K = jax.jit(lambda w: Window(jaxcrf.position_features((4, 4), 1.0), 3, weights=w))(2.0)
    assert_close(
        K(np.ones((4, 4, 1), np.float32)),
        2 * np.asarray(K.replace(weights=jnp.ones(1))(np.ones((4, 4, 1), np.float32))),
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros((4, 4, 1)), 4), {}, "filter_size: got 4; expected an odd number"),
        ((np.zeros((4, 4, 1)), 0), {}, "filter_size: got 0"),
        ((np.zeros((4, 4, 1)), (3, 3, 3)), {}, "filter_size"),
        ((np.zeros((4, 4, 1)), 3), {"blur": 0}, "blur: got 0"),
        ((np.zeros((4, 4, 1)), 3), {"blur": 1.5}, "blur: got 1.5"),
        ((np.zeros((4, 4, 1)), 3), {"weights": [1.0, 2.0]}, "weights: got shape"),
        ((np.zeros((4, 4, 1)), 3), {"spatial_ndim": 4}, "spatial_ndim: got 4"),
        ((np.zeros((4, 1)), 3), {}, "features: got shape"),
        ((np.zeros((0, 4, 1)), 3), {}, "holds no pixel"),
        (((), 3), {}, "empty tuple"),
        (((np.zeros((4, 4, 1)), np.zeros((4, 5, 1))), 3), {}, "disagree in their spatial shape"),
        (
            ((np.zeros((2, 4, 4, 1)), np.zeros((3, 4, 4, 1))), 3),
            {},
            "batch axes of the kernels do not broadcast",
        ),
        ((np.zeros((4, 4, 1)), 3), {"implementation": "magic"}, "implementation: got 'magic'"),
        ((np.zeros((4, 4, 1)), 3.5), {}, "filter_size: got 3.5"),
        ((np.zeros((4, 4, 1)), None), {}, "filter_size: got None"),
        ((np.zeros((4, 4, 1)), True), {}, "filter_size: got True"),
        ((jaxcrf.position_features((3, 4, 4), 1.0), 3), {}, "do not fit spatial_ndim=2"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Window(*arguments, **options)


def test_batches_that_do_not_broadcast_are_refused():
    K = bank((4, 5), 3, batch=(2,))
    with pytest.raises(ValueError, match=r"batch axes \(3,\) do not broadcast"):
        K(np.zeros((3, 4, 5, 2), np.float32))


def test_filters_over_different_images_cannot_be_added():
    with pytest.raises(ValueError, match="cannot add filters"):
        bank((4, 5), 3) + bank((5, 4), 3)
    with pytest.raises(TypeError):
        bank((4, 5), 3) + 1
