"""Low-rank operators of embeddings."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import FilterSuite, assert_close
from jaxcrf.filters import Diagonal, Filter, Gram, Window
from pixel_label_suite import PixelLabelSuite


def embeddings(*shape, seed=0, positive=True):
    e = np.random.default_rng(seed).normal(size=shape)
    # Row sums of inner products must not vanish for a normalisation to exist.
    return (np.abs(e) if positive else e).astype(np.float32)


class TestPottsGram(FilterSuite):
    ARGUMENTS: ClassVar = {
        "five numbers": (embeddings(5, 7, 5), 2),
        "batch": (embeddings(2, 4, 5, 3), 2),
        "volume": (embeddings(2, 1, 3, 9), 3),
    }
    CASES: ClassVar = {
        name: lambda a=arguments: Gram(a[0], kind="potts", spatial_ndim=a[1])
        for name, arguments in ARGUMENTS.items()
    } | {
        kind: lambda kind=kind: Gram(embeddings(4, 5, 3), kind="potts").normalized(kind)
        for kind in ("before", "after", "symmetric")
    }

    def parameters(self, case):
        e, spatial_ndim = self.ARGUMENTS.get(case, (embeddings(4, 5, 3), 2))
        kind = case if case in ("before", "after", "symmetric") else "none"
        return e, lambda e: Gram(e, kind="potts", spatial_ndim=spatial_ndim).normalized(kind)


@pytest.mark.parametrize("name", TestPottsGram.ARGUMENTS)
def test_the_potts_kind_is_the_matrix_of_inner_products(name):
    K = TestPottsGram.CASES[name]()
    e = np.asarray(K.embeddings, np.float64).reshape(*K.batch, -1, K.rank)
    q = np.random.default_rng(1).normal(size=(*K.batch, *K.spatial, 2)).astype(np.float32)
    flat, matrix = q.reshape(*K.batch, -1, 2), e @ np.swapaxes(e, -1, -2)
    assert_close(K(q), (matrix @ flat).reshape(q.shape), (np.abs(matrix) @ np.abs(flat)).max())
    assert_close(K.dual(), np.swapaxes(e, -1, -2) @ e)
    assert K.kind == "potts"
    assert isinstance(K, Filter)


class TestGeneralGram(PixelLabelSuite):
    CASES: ClassVar = {
        "image": lambda: Gram(embeddings(4, 5, 3, 6, positive=False), kind="general"),
        "batch": lambda: Gram(embeddings(2, 4, 5, 3, 6, positive=False), kind="general"),
        "volume": lambda: Gram(embeddings(2, 3, 4, 2, 5, positive=False), kind="general", spatial_ndim=3),
    }

    PARAMETER: ClassVar = "embeddings"

    def matrix(self, K):
        e = np.asarray(K.embeddings, np.float64).reshape(*K.batch, -1, K.rank)
        return e @ np.swapaxes(e, -1, -2)

    def test_its_dual_and_quadratic_form(self, K):
        e = np.asarray(K.embeddings, np.float64).reshape(*K.batch, -1, K.rank)
        dual = np.swapaxes(e, -1, -2) @ e
        assert_close(K.dual(), dual)
        lower = np.linalg.cholesky(dual + np.eye(K.rank))
        expected = np.einsum(
            "...nd,...nd->...n",
            e,
            np.linalg.solve(dual + np.eye(K.rank), e.swapaxes(-1, -2)).swapaxes(-1, -2),
        )
        found = K.quadratic_form(jnp.asarray(lower, jnp.float32))
        assert_close(found, expected.reshape(found.shape), 10)


def test_mean_field_takes_the_potts_kind():
    e, u = 0.3 * embeddings(5, 6, 4), np.random.default_rng(1).normal(size=(5, 6, 3)).astype(np.float32)
    K = Gram(e, kind="potts")
    found = jaxcrf.mean_field(u, [(K, 0.5)]).probs
    flat = e.reshape(-1, 4).astype(np.float64)
    q = np.asarray(jax.nn.softmax(u), np.float64).reshape(-1, 3)
    for _ in range(5):
        message = flat @ (flat.T @ q)
        scores = u.reshape(-1, 3) - 0.5 * (message.sum(-1, keepdims=True) - message)
        q = np.exp(scores - scores.max(-1, keepdims=True))
        q /= q.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, q.reshape(u.shape), atol=1e-5)


def test_it_adds_to_other_filters():
    q = np.random.default_rng(1).normal(size=(4, 5, 2)).astype(np.float32)
    K, window = Gram(embeddings(4, 5, 3), kind="potts"), Window(jaxcrf.position_features((4, 5), 1.0), 3)
    assert_close((K + window + Diagonal(jnp.ones((4, 5))))(q), K(q) + window(q) + q)


def test_bad_embeddings_are_named():
    with pytest.raises(ValueError, match=r"kind: got 'pots'; expected one of general, potts"):
        Gram(embeddings(4, 5, 3), kind="pots")
    with pytest.raises(ValueError, match=r"embeddings: got shape \(5, 3\)"):
        Gram(embeddings(5, 3), kind="potts")
    with pytest.raises(ValueError, match=r"one embedding per pixel is kind='potts'"):
        Gram(embeddings(4, 5, 3), kind="general")
    with pytest.raises(ValueError, match="holds nothing"):
        Gram(np.zeros((4, 5, 0), np.float32), kind="potts")
    with pytest.raises(ValueError, match="spatial_ndim"):
        Gram(embeddings(4, 5, 3), kind="potts", spatial_ndim=4)
    with pytest.raises(AttributeError, match="immutable"):
        Gram(embeddings(4, 5, 3), kind="potts").embeddings = 3


def test_the_small_matrix_of_many_numbers():
    e = embeddings(2, 3, 4, 513)
    found, rows = Gram(e, kind="potts").dual(), e.reshape(2, 12, 513).astype(np.float64)
    assert_close(found, np.swapaxes(rows, -1, -2) @ rows)
    np.testing.assert_array_equal(found, np.swapaxes(found, -1, -2))


@pytest.mark.optimized
def test_the_small_matrix_takes_no_more_memory_than_the_embeddings():
    K = Gram(jnp.zeros((101, 11, 96)), kind="potts")
    compiled = jax.jit(lambda K: K.dual()).lower(K).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * K.embeddings.nbytes
