"""Gaussians of position, axis by axis."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import FilterSuite
from jaxcrf.filters import Separable
from jaxcrf.filters.separable import MAX_TAPS
from oracles import gaussian_matrix


def positions(shape, bandwidth):
    return jaxcrf.position_features(shape, bandwidth)


class TestSeparable(FilterSuite):
    CASES: ClassVar = {
        "wide": lambda: Separable(positions((6, 5), (2.0, 9.0)), weights=1.5),
        "two": lambda: Separable((positions((4, 5), 1.0), positions((4, 5), 3.0)), weights=(0.5, 2.0)),
        "symmetric": lambda: Separable(positions((5, 4), 1.5)).normalized("symmetric"),
        "one pixel": lambda: Separable(positions((1, 1), 2.0)),
        "volume": lambda: Separable(positions((2, 3, 4), (1.0, 2.0, 0.7)), spatial_ndim=3),
    }


# Sizes on both sides of every branch: taps with ends, one matrix, and blocks of a band.
@pytest.mark.parametrize("shape", [(33, 40), (7, 90), (300, 3)])
@pytest.mark.parametrize("bandwidth", [0.7, 3.0, 12.0])
def test_it_is_the_exact_gaussian(shape, bandwidth):
    q = np.random.default_rng(0).normal(size=(*shape, 2))
    K = Separable(positions(shape, bandwidth))
    grid = np.indices(shape).reshape(2, -1).T / bandwidth
    expected = (gaussian_matrix(grid) @ q.reshape(-1, 2)).reshape(q.shape)
    magnitude = (gaussian_matrix(grid) @ np.abs(q).reshape(-1, 2)).max()
    # Two passes that each leave out erfc(5.2 / √2) = 2e-7 of a sum and round as many times as there are taps.
    np.testing.assert_allclose(K(q.astype(np.float32)), expected, rtol=0, atol=2e-6 * magnitude)


def test_float64_is_exact_to_its_own_rounding():
    with jax.enable_x64(True):
        q = np.random.default_rng(0).normal(size=(60, 11, 1))
        K = Separable(positions((60, 11), 2.0))
        grid = np.indices((60, 11)).reshape(2, -1).T / 2.0
        expected = (gaussian_matrix(grid) @ q.reshape(-1, 1)).reshape(q.shape)
        np.testing.assert_allclose(K(jnp.asarray(q)), expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_the_longest_tap_filter_and_the_first_band_agree():
    longest = (MAX_TAPS // 2) / 5.2
    q = np.random.default_rng(0).random((150, 1, 1)).astype(np.float32)
    taps, band = (Separable(positions((150, 1), (b, 1.0)))(q) for b in (longest - 1e-4, longest + 1e-4))
    np.testing.assert_allclose(taps, band, rtol=2e-4)  # the bandwidths differ by 3e-5


@pytest.mark.parametrize(
    "features",
    [
        pytest.param(jnp.zeros((4, 5, 2)), id="bare"),
        pytest.param(jaxcrf.bilateral_features(np.zeros((4, 5, 3), np.uint8), 3, 13), id="colour"),
    ],
)
def test_features_of_more_than_position_are_refused(features):
    with pytest.raises(ValueError, match=r"expected jaxcrf\.position_features"):
        Separable(features)
