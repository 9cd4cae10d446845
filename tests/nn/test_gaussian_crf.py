"""Layers of Gaussian CRFs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf

nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")

from jaxcrf.nn import (  # noqa: E402  (needs flax)
    EdgeHead,
    EmbeddingHead,
    GaussianCRF,
    SparseGaussianCRF,
    StackedGaussianCRF,
)

CHANNELS, LABELS = 6, 3


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def stack(rngs, **options):
    return StackedGaussianCRF(
        [
            GaussianCRF(CHANNELS, LABELS, embedding_size=8, rngs=rngs, **options),
            SparseGaussianCRF(CHANNELS, LABELS, connectivity=8, rngs=rngs, **options),
        ]
    )


LAYERS = {
    "potts": lambda rngs, **o: GaussianCRF(CHANNELS, LABELS, embedding_size=8, rngs=rngs, **o),
    "general": lambda rngs, **o: GaussianCRF(
        CHANNELS, LABELS, kind="general", embedding_size=8, rngs=rngs, **o
    ),
    "sparse potts": lambda rngs, **o: SparseGaussianCRF(CHANNELS, LABELS, connectivity=12, rngs=rngs, **o),
    "sparse general": lambda rngs, **o: SparseGaussianCRF(CHANNELS, LABELS, kind="general", rngs=rngs, **o),
    "stack": stack,
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("potts", "sparse general") else pytest.mark.exhaustive)
        for n in LAYERS
    ],
)
def test_every_parameter_is_reached_and_any_size_and_batch_will_do(name):
    layer = LAYERS[name](nnx.Rngs(0), learn_regularization=True)

    @nnx.jit
    def gradients(layer, features, unary):
        return nnx.grad(lambda layer: jnp.sum(layer(features, unary) ** 2))(layer)

    found = gradients(layer, random(2, 5, 7, CHANNELS), random(2, 5, 7, LABELS, seed=1))
    leaves = jax.tree.leaves(nnx.state(found))
    assert len(leaves) == len(jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert all(np.abs(leaf).max() > 0 for leaf in leaves)
    for shape in ((1, 1), (2, 3, 1, 5)):
        scores = layer(random(*shape, CHANNELS), random(*shape, LABELS))
        assert scores.shape == (*shape, LABELS)
        assert np.isfinite(scores).all()


@every_layer
def test_bfloat16_is_for_the_head(name):
    layer = LAYERS[name](nnx.Rngs(0), dtype=jnp.bfloat16)
    unary = random(4, 5, LABELS, seed=1)
    found = layer(random(4, 5, CHANNELS).astype(jnp.bfloat16), unary)
    assert found.dtype == jnp.float32
    expected = LAYERS[name](nnx.Rngs(0))(random(4, 5, CHANNELS), unary)
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_layers_only_call_the_functions():
    features, unary = random(4, 5, CHANNELS), random(4, 5, LABELS, seed=1)
    layer = LAYERS["general"](nnx.Rngs(0), regularization=2.0)
    result = layer.solve(features, unary, variances=True)
    expected = jaxcrf.gaussian_crf(
        layer.head(features), unary, kind="general", regularization=2.0, variances=True
    )
    np.testing.assert_array_equal(result.scores, expected.scores)
    np.testing.assert_array_equal(result.variances, expected.variances)
    dense, sparse = LAYERS["potts"](nnx.Rngs(0)), LAYERS["sparse potts"](nnx.Rngs(1))
    first = jaxcrf.gaussian_crf(
        dense.head(features), unary, kind="potts", regularization=1.0, embedding_scaling="spectral"
    ).scores
    second = jaxcrf.sparse_gaussian_crf(
        sparse.head(features),
        first,
        kind="potts",
        regularization=1.0,
        connectivity=12,
        edge_scaling="diagonally-dominant",
        centered=True,
    ).scores
    np.testing.assert_array_equal(StackedGaussianCRF([dense, sparse])(features, unary), second)


@pytest.mark.parametrize("name", ["potts", "sparse potts"])
def test_systems_stay_definite_whatever_is_learned(name):
    layer = LAYERS[name](nnx.Rngs(0), learn_regularization=True)
    assert float(layer.regularization) == pytest.approx(1.0)
    layer.head.convolution.kernel[...] *= 1e4
    layer.regularization_logit[...] = jnp.array(-5.0)
    assert 0 < float(layer.regularization) < 0.01
    stats = layer.solve(random(5, 6, CHANNELS), random(5, 6, LABELS)).stats
    assert bool(stats.definite)


@pytest.mark.exhaustive
def test_a_layer_learns_which_pixels_belong_together():
    # Two interleaved groups of pixels, known by their features; the unary of a group is right on average only.
    rng = np.random.default_rng(0)
    group = jnp.asarray(rng.integers(0, 2, (8, 8)))
    features = jnp.stack([group, 1 - group, *rng.normal(size=(4, 8, 8))], -1).astype(jnp.float32)
    noise = jnp.asarray(rng.normal(size=(16, 8, 8, 2)), jnp.float32)
    unary = 0.7 * jax.nn.one_hot(group, 2) + noise
    layer = GaussianCRF(CHANNELS, 2, embedding_size=4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.adam(0.03), wrt=nnx.Param)

    def loss(layer, unary):
        logits = layer(jnp.broadcast_to(features, (len(unary), *features.shape)), unary)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.stack([group] * len(unary))).mean()

    @nnx.jit
    def step(layer, optimizer, unary):
        optimizer.update(layer, nnx.grad(loss)(layer, unary))

    for _ in range(60):
        step(layer, optimizer, unary[:8])
    held_out = layer(jnp.broadcast_to(features, (8, *features.shape)), unary[8:])
    before, after = (np.mean(x.argmax(-1) == group) for x in (unary[8:], held_out))
    assert before < 0.8
    assert after > 0.95


def test_a_learned_regularization_begins_as_it_is_and_compiles_once():
    layer = GaussianCRF(CHANNELS, LABELS, regularization=3.0, learn_regularization=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer.regularization, 3.0, rtol=1e-6)
    # The first update would make a weak type a strong one, and a new program of every step.
    assert not layer.regularization_logit[...].weak_type


def test_bad_arguments_are_named():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"regularization: got 0.0; expected λ > 0"):
        GaussianCRF(CHANNELS, LABELS, regularization=0.0, rngs=rngs)
    with pytest.raises(ValueError, match="kind: got 'dense'"):
        EmbeddingHead(CHANNELS, kind="dense", rngs=rngs)
    with pytest.raises(ValueError, match="num_labels: got None"):
        EmbeddingHead(CHANNELS, kind="general", rngs=rngs)
    with pytest.raises(ValueError, match="num_labels: got None"):
        EdgeHead(CHANNELS, kind="general", rngs=rngs)
    with pytest.raises(ValueError, match="unary: got shape"):
        GaussianCRF(CHANNELS, LABELS, kind="general", rngs=rngs)(
            random(4, 5, CHANNELS), random(4, 5, LABELS + 1)
        )
