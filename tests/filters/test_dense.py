"""The exact sum over all pairs of pixels."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import FilterSuite, assert_close, random_maps
from jaxcrf.filters import Dense
from jaxcrf_kernels import pair_message
from oracles import gaussian_matrix


def features(*shape, seed=0, spread=0.7):
    return (spread * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def bilateral(*spatial, seed=0):
    image = np.random.default_rng(seed).integers(0, 255, (*spatial, 3)).astype(np.uint8)
    return jaxcrf.bilateral_features(image, 3.0, 80.0, spatial_ndim=len(spatial))


class TestDense(FilterSuite):
    FURTHER_CASES: ClassVar = ("positions and colours", "before", "volume")
    CASES: ClassVar = {
        "five features": lambda: Dense(features(5, 7, 5), weights=1.5),
        "no feature": lambda: Dense(np.zeros((3, 4, 0), np.float32)),
        "positions and colours": lambda: Dense(
            (jaxcrf.position_features((4, 5), 1.5), bilateral(4, 5)), weights=(0.5, 2.0)
        ),
        "cut off": lambda: Dense(
            (jaxcrf.position_features((5, 6), 2.5), bilateral(5, 6), features(5, 6, 2)), cutoff=(1, 2)
        ),
        "scaled batch": lambda: Dense((features(4, 5, 2), features(2, 4, 5, 3))).normalized("symmetric"),
        "volume": lambda: Dense(bilateral(2, 3, 4), spatial_ndim=3),
        "before": lambda: Dense((features(4, 5, 3), features(4, 5, 2))).normalized("before"),
    }


@pytest.mark.parametrize("cutoff", [None, 0, 2, (1, 3)])
def test_it_is_the_sum_over_all_pairs(cutoff):
    spatial = (6, 7)
    kernels = (jaxcrf.position_features(spatial, 2.0), bilateral(*spatial), features(*spatial, 4))
    weights = (0.3, 1.1, 0.7)
    q = random_maps(Dense(kernels))
    grid = np.indices(spatial).reshape(2, -1).T
    reach = np.inf if cutoff is None else np.asarray(cutoff)
    inside = (np.abs(grid[:, None] - grid[None, :]) <= reach).all(-1)
    values = [np.asarray(getattr(f, "values", f)).reshape(42, -1) for f in kernels]
    expected = sum(
        w * (inside * gaussian_matrix(f)) @ q.reshape(42, -1) for w, f in zip(weights, values, strict=True)
    )
    assert_close(Dense(kernels, weights=weights, cutoff=cutoff)(q).reshape(42, -1), expected)


@pytest.mark.exhaustive
def test_a_photograph_agrees_with_float64_to_1e_5(data_dir):
    image = jaxcrf.data.read_image(next((data_dir / "voc_sample").rglob("2007_000129.jpg")))[100:196, 150:278]
    q = np.random.default_rng(0).dirichlet(np.ones(21), image.shape[:2]).astype(np.float32)
    f = jaxcrf.bilateral_features(image, 80, 13)
    matrix = gaussian_matrix_in_rows(np.asarray(f.values).reshape(-1, 5))
    found = np.asarray(Dense(f)(q)).reshape(-1, 21)
    np.testing.assert_allclose(found, matrix @ q.reshape(-1, 21), rtol=1e-5)
    scale = matrix.sum(1, keepdims=True) ** -0.5
    found = np.asarray(Dense(f).normalized("symmetric")(q)).reshape(-1, 21)
    np.testing.assert_allclose(found, scale * (matrix @ (scale * q.reshape(-1, 21))), rtol=1e-5)


def gaussian_matrix_in_rows(f):
    """The same matrix in less memory."""
    return np.concatenate([gaussian_matrix(f[i : i + 500], f) for i in range(0, len(f), 500)])


def test_volumes_with_anisotropic_spacing_and_any_channels():
    # Voxels of 3 x 1 x 1 mm: bandwidths of 6 mm are (2, 6, 6) voxels.
    volume = np.random.default_rng(0).normal(0, 20, (3, 5, 4, 7)).astype(np.float32)
    f = jaxcrf.bilateral_features(volume, (2.0, 6.0, 6.0), 15.0, spatial_ndim=3)
    millimetres = np.indices((3, 5, 4)).reshape(3, -1).T * (3.0, 1.0, 1.0)
    expected = gaussian_matrix(np.concatenate([millimetres / 6.0, volume.reshape(-1, 7) / 15.0], axis=1))
    q = random_maps(Dense(f, spatial_ndim=3))
    assert_close(Dense(f, spatial_ndim=3)(q).reshape(60, -1), expected @ q.reshape(60, -1))


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_precision_reaches_every_message(precision, monkeypatch):
    asked = []

    def record(*arguments, precision, **options):
        asked.append(precision)
        return pair_message(*arguments, precision=precision, **options)

    monkeypatch.setattr(jaxcrf.filters.dense, "pair_message", record)
    f = features(4, 5, 3)
    for K in (Dense(f, precision=precision), Dense((f, f), precision=precision).normalized("symmetric")):
        asked.clear()
        value = jax.jit(lambda K, q: K.T(K(q)))(K, random_maps(K))
        assert set(asked) == {precision}
        assert_close(value, K.T(K(random_maps(K))))


def test_far_features_do_not_lose_their_differences():
    # |f|² is 1e8 here: expanding ‖a - b‖² would leave nothing of differences of one.
    f = 1e4 + np.arange(12, dtype=np.float32).reshape(3, 4, 1) / 2
    q = random_maps(Dense(f))
    assert_close(Dense(f)(q).reshape(12, -1), gaussian_matrix(f.reshape(12, 1)) @ q.reshape(12, -1))


class TestBadInput:
    @pytest.mark.parametrize("cutoff", [-1, 1.5, (1, 2, 3), (True, 1), "far"])
    def test_cutoff(self, cutoff):
        with pytest.raises(ValueError, match="cutoff: got"):
            Dense(features(4, 5, 3), cutoff=cutoff)

    def test_nan_features(self):
        f = features(4, 5, 3)
        f[1, 2, 0] = math.nan
        with pytest.raises(ValueError, match="features: holds NaN"):
            Dense(f)

    def test_precision(self):
        with pytest.raises(ValueError, match="precision: got 'half'; expected one of 'float32', 'tf32'"):
            Dense(features(4, 5, 3), precision="half")

    def test_implementation(self):
        with pytest.raises(ValueError, match="implementation: got 'abacus'"):
            Dense(features(4, 5, 3), implementation="abacus")

    def test_kernels_of_different_sizes(self):
        with pytest.raises(ValueError, match="disagree in their spatial shape"):
            Dense((features(4, 5, 3), features(5, 4, 3)))

    def test_weights(self):
        with pytest.raises(ValueError, match="weights: got shape"):
            Dense(features(4, 5, 3), weights=jnp.ones(2))
