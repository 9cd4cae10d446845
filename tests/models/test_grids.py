import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import grid_oracles
from jaxcrf.models import ModelConfig, grids
from jaxcrf.models.vgg import VGG16FCN
from model_suite import with_numbers


def maps(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("stride", "size", "offset"),
    [(8, (17, 24), 0.0), (8, (17, 24), 3.5), (2, (5, 6), 0.5), (3, (1, 10), 1.0), (1, (4, 5), 0.0)],
)
def test_upsampling_interpolates_between_cells_and_repeats_the_last(stride, size, offset):
    x = maps(2, *(-(-n // stride) for n in size), 3)
    expected = [grid_oracles.upsample(each, stride, size, offset) for each in x]
    found = jax.jit(grids.upsample, static_argnums=(1, 2, 3))(x, stride, size, offset)
    np.testing.assert_allclose(found, expected, atol=1e-6)


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


@pytest.mark.parametrize(("size", "dilation"), [(3, 2), (2, 3), (3, 12)])
def test_taps_far_apart_see_what_is_inside(size, dilation):
    rng = np.random.default_rng(1)
    x, kernel = maps(2, 6, 9, 3), rng.normal(size=(size, size, 3, 2)).astype(np.float32)
    expected = np.zeros((2, 6, 9, 2))
    before = (size - 1) * dilation // 2
    for row, column, y, z in np.ndindex(6, 9, size, size):
        i, j = row + y * dilation - before, column + z * dilation - before
        if 0 <= i < 6 and 0 <= j < 9:
            expected[:, row, column] += x[:, i, j].astype(np.float64) @ kernel[y, z]
    found = jax.jit(lambda x, kernel: grids.atrous_convolution(x, kernel, rhs_dilation=(dilation, dilation)))(
        x, kernel
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    halves = [a.astype(jax.numpy.bfloat16) for a in (x, kernel)]
    assert grids.atrous_convolution(*halves, rhs_dilation=(dilation, dilation)).dtype == jax.numpy.bfloat16


def test_atrous_convolutions_keep_the_size():
    with pytest.raises(ValueError, match=r"strides, padding: got \(2, 2\) and 'SAME'; expected \(1, 1\)"):
        grids.atrous_convolution(maps(1, 4, 4, 1), np.ones((3, 3, 1, 1)), (2, 2))
    with pytest.raises(ValueError, match="and 'VALID'"):
        grids.atrous_convolution(maps(1, 4, 4, 1), np.ones((3, 3, 1, 1)), padding="VALID")


@pytest.mark.parametrize("pool_size", [2, 3])
def test_cells_lie_where_they_see_an_image_alike_on_both_sides(pool_size):
    """What an image and its mirror image say of mirrored places agrees, if cells are where they are said to be."""
    model = with_numbers(
        lambda: VGG16FCN(2, pool_size=pool_size, width=2, hidden_channels=4, rngs=nnx.Rngs(0))
    )
    # All weights alike along both axes.
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda a: (a + jnp.flip(a, (0, 1))) / 2 if a.ndim == 4 else a, state)
    model = nnx.merge(graph, state)
    # Of whole cells of the coarsest grid, and one more pixel where cells lie over every so many.
    n = 128 + (pool_size == 3)
    image = np.random.default_rng(1).uniform(0, 255, (n, n, 3)).astype(np.float32)
    run = nnx.jit(lambda model, image: model(image))
    found = np.asarray(run(model, image))
    mirrored = np.asarray(run(model, image[::-1, ::-1]))[::-1, ::-1]
    np.testing.assert_allclose(mirrored, found, rtol=1e-4, atol=1e-4 * np.abs(found).max())
    assert np.abs(mirrored - np.roll(found, 1, 0)).max() > 1e-2 * np.ptp(found)


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("deeplab", 0.0),
        ("h_renet", 3.5),
        ("deep_parsing_network", 3.5),
        ("n_renet", 0.5),
        ("vgg16_fcn", 0.0),
    ],
)
def test_cells_of_networks_are_where_their_pools_put_them(name, offset):
    network = ModelConfig.of(name, 3).create_abstract()
    network = getattr(network, "unary", network)
    np.testing.assert_array_equal(network.places(20), offset + np.arange(0, 20, network.stride))
