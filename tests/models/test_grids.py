import jax
import numpy as np
import pytest

import grid_oracles
from jaxcrf.models import grids


def maps(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("stride", "size"), [(8, (17, 24)), (3, (1, 10)), (1, (4, 5))])
def test_upsampling_interpolates_between_cells_and_repeats_the_last(stride, size):
    x = maps(2, *(-(-n // stride) for n in size), 3)
    expected = [grid_oracles.upsample(each, stride, size) for each in x]
    np.testing.assert_allclose(
        jax.jit(grids.upsample, static_argnums=(1, 2))(x, stride, size), expected, atol=1e-6
    )


@pytest.mark.parametrize(
    ("shape", "size"), [((7, 10), (3, 21)), ((5, 6), (5, 6)), ((4, 3), (1, 1)), ((1, 2), (3, 5))]
)
def test_resizing_keeps_corners(shape, size):
    x = maps(2, *shape, 3)
    found = np.asarray(jax.jit(grids.resize, static_argnums=1)(x, size))
    np.testing.assert_allclose(found, [grid_oracles.resize(each, size) for each in x], atol=1e-6)
    if min(size) > 1:
        np.testing.assert_allclose(
            found[:, [0, 0, -1, -1], [0, -1, 0, -1]], x[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        )


@pytest.mark.parametrize(("size", "stride"), [(3, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("shape", [(7, 10), (1, 2)])
def test_pools_take_the_largest_around_every_cell(size, stride, shape):
    x = maps(2, *shape, 3)
    found = jax.jit(grids.max_pool, static_argnums=(1, 2))(x, size, stride)
    np.testing.assert_array_equal(found, [grid_oracles.max_pool(each, size, stride) for each in x])


def test_a_pools_gradient_goes_to_the_largest():
    x = np.array([1.0, 5.0, 2.0, 0.0, 3.0], np.float32)[None, :, None]
    gradient = jax.grad(lambda x: (grids.max_pool(x, 3, 2)[0, :, 0] * np.array([1.0, 10.0, 100.0])).sum())(x)
    np.testing.assert_array_equal(gradient[0, :, 0], [0, 11, 0, 0, 100])


def test_grids_of_another_size_are_refused():
    with pytest.raises(ValueError, match="x: got 3 cells along axis 1 for 33 pixels; expected 5"):
        grids.upsample(maps(1, 5, 3, 2)[0], 8, (40, 33))
