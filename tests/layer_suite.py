"""What the layers of mean field have to pass, and what their tests are made of. Needs flax."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcrf.training import losses

LABELS = 3

# Images, logits and parameters by name to marginals, in float64.
Oracle = Callable[[np.ndarray, np.ndarray, Mapping[str, np.ndarray]], np.ndarray]


def example(height=4, width=5, *batch, seed=0):
    """Images and logits."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (*batch, height, width, 3)).astype(np.uint8)
    return images, jnp.asarray(rng.normal(size=(*batch, height, width, LABELS)), jnp.float32)


def moved(layer, seed=1, scale=0.2):
    """The layer with its parameters away from where they began."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(layer)
    state = jax.tree.map(lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), state)
    return nnx.merge(graph, state)


def names(layer):
    """The parameters by name."""
    return by_path(nnx.state(layer, nnx.Param))


def by_path(state):
    """Leaves of a state by their path, with slashes."""
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def learned_number(parameters, preset):
    """A function of a number's name to its value: that of the preset, times the soft-plus of its parameter."""

    def number(name):
        initial = np.asarray(getattr(preset, name), np.float64)
        scale = parameters.get(f"scales/{name}")
        return initial if scale is None else initial * np.log1p(np.exp(scale))

    return number


def pixel_features(images, number):
    """Positions in pixels, and the features of the two kernels."""
    height, width, _ = images.shape
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).astype(float)
    appearance = [
        places / number("bilateral_position_bandwidth"),
        images / number("bilateral_color_bandwidth"),
    ]
    return places, places / number("position_bandwidth"), np.concatenate(appearance, axis=-1)


def check_values_and_gradients(layer, oracle: Oracle):
    """Marginals are the oracle's, and gradients of all parameters and of the logits its finite differences."""
    images, logits = example()
    cotangent = np.random.default_rng(2).normal(size=logits.shape)
    graph, state = nnx.split(layer)

    @jax.jit
    def objective(state, logits):
        probs = nnx.merge(graph, state).infer(images, logits).probs
        return jnp.sum(probs * cotangent), probs

    gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (_, probs), (by_parameters, by_logits) = gradient(state, logits)
    numbers = {name: np.asarray(value, np.float64) for name, value in names(layer).items()}
    unary = np.asarray(logits, np.float64)
    np.testing.assert_allclose(probs, oracle(images, unary, numbers), atol=2e-6)

    found = by_path(by_parameters)
    assert set(found) == set(numbers)
    numbers["logits"] = unary
    for name, value in (found | {"logits": by_logits}).items():
        expected = np.zeros(np.shape(value))
        for at in np.ndindex(expected.shape):
            for sign in (1, -1):
                shifted = {k: v.copy() for k, v in numbers.items()}
                shifted[name][at] += sign * 1e-5
                changed = oracle(images, shifted.pop("logits"), shifted)
                expected[at] += sign * np.sum(changed * cotangent) / 2e-5
        # Roundings of float32 in sums over 20 pixels, of terms of order one.
        np.testing.assert_allclose(value, expected, atol=2e-5, err_msg=name)
        assert np.abs(expected).max() > 1e-3


def check_batches_and_reach(layer, images, logits):
    """A batch is a loop over its images, and the gradient of a loss reaches every number of every parameter."""
    labels = np.random.default_rng(3).integers(0, LABELS, logits.shape[:-1])

    @nnx.jit
    def gradients(layer, images, logits, labels):
        def loss(layer):
            refined = layer(images, logits)
            return losses.cross_entropy(refined, labels), refined

        return nnx.grad(loss, has_aux=True)(layer)

    found, refined = gradients(layer, images, logits, labels)
    leaves = jax.tree.leaves(nnx.state(found))
    assert len(leaves) == len(names(layer))
    assert all(np.all(np.abs(leaf) > 0) for leaf in leaves)
    for image, unary, expected in zip(images, logits, refined, strict=True):
        np.testing.assert_allclose(layer(image, unary), expected, atol=2e-5)
