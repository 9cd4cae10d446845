"""ReNet layers as modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf

nnx = pytest.importorskip("flax.nnx")

from jaxcrf.nn import ReNet, ReNetGroup  # noqa: E402  (needs flax)


def images(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=(*shape, 2)), jnp.float32)


@pytest.mark.parametrize("cell", ["gru", pytest.param("lstm", marks=pytest.mark.exhaustive), "irnn"])
def test_layers_only_call_the_function(cell):
    layer = ReNet(2, 3, cell=cell, direction="horizontal", patch=(2, 1), rngs=nnx.Rngs(0))
    x = images(2, 5, 4)
    mask = np.ones((2, 5, 4), bool)
    mask[1, :, 3:] = False
    options = {"cell": cell, "direction": "horizontal", "patch": (2, 1)}
    expected = jaxcrf.renet_init(jax.random.key(0), 2, 3, cell=cell, patch=(2, 1))
    assert {n: v.shape for n, v in layer.parameters.items()} == {n: v.shape for n, v in expected.items()}
    np.testing.assert_array_equal(
        layer(x, mask), jaxcrf.renet_layer(layer.parameters, x, mask=mask, **options)
    )


def test_groups_are_two_layers_that_are_reached_whole():
    group = ReNetGroup(2, 3, patch=(2, 2), direction="horizontal", chunk=2, rngs=nnx.Rngs(0))
    x = images(2, 5, 4)
    mask = np.ones((2, 5, 4), bool)
    mask[1, 3:] = False
    params = {"first": group.first.parameters, "second": group.second.parameters}
    expected = jaxcrf.renet_group(params, x, mask=mask, patch=(2, 2), direction="horizontal", chunk=2)
    np.testing.assert_array_equal(group(x, mask), expected)
    assert not np.array_equal(params["first"]["bias"], params["second"]["bias"])

    @nnx.jit
    def gradients(group, x, mask):
        return nnx.grad(lambda group: jnp.sum(group(x, mask) ** 2))(group)

    found = jax.tree.leaves(nnx.state(gradients(group, x, jnp.asarray(mask))))
    assert len(found) == 6
    assert all(np.abs(leaf).max() > 0 for leaf in found)


def test_dtype_is_that_of_the_arithmetic():
    layer, wide = (ReNet(2, 3, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (jnp.bfloat16, None))
    x = images(3, 4)
    found = layer(x)
    assert found.dtype == jnp.bfloat16
    assert layer.bias[...].dtype == jnp.float32
    np.testing.assert_allclose(found.astype(jnp.float32), wide(x), atol=0.01)


def test_bad_input():
    with pytest.raises(ValueError, match="direction: got 'down'; expected one of 'vertical', 'horizontal'"):
        ReNet(2, 3, direction="down", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="chunk: got 0"):
        ReNetGroup(2, 3, chunk=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cell: got 'LSTM'; did you mean 'lstm'"):
        ReNet(2, 3, cell="LSTM", rngs=nnx.Rngs(0))
