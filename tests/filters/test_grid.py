"""Sparse operators on the edges of a grid."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
import oracles
from filter_suite import FilterSuite, assert_close, dense_matrix
from jaxcrf.filters import Diagonal, Filter, Grid, Window
from pixel_label_suite import PixelLabelSuite


def random_edges(*shape, seed=0, positive=False):
    e = np.random.default_rng(seed).normal(size=shape)
    # Row sums of weights must not vanish for a normalisation to exist.
    return (np.abs(e) + 0.1 if positive else e).astype(np.float32)


class TestPottsGrid(FilterSuite):
    ARGUMENTS: ClassVar = {
        "4": (random_edges(5, 7, 2, positive=True), 4),
        "8": (random_edges(4, 5, 4, positive=True), 8),
        "12": (random_edges(5, 4, 6, positive=True), 12),
        "batch": (random_edges(2, 4, 5, 4, positive=True), 8),
    }
    CASES: ClassVar = {
        name: lambda a=arguments: Grid(a[0], connectivity=a[1], kind="potts")
        for name, arguments in ARGUMENTS.items()
    } | {
        kind: lambda kind=kind: Grid(
            random_edges(4, 5, 4, positive=True), connectivity=8, kind="potts"
        ).normalized(kind)
        for kind in ("before", "after", "symmetric")
    }

    def parameters(self, case):
        edges, connectivity = self.ARGUMENTS.get(case, (random_edges(4, 5, 4, positive=True), 8))
        kind = case if case in ("before", "after", "symmetric") else "none"
        return edges, lambda e: Grid(e, connectivity=connectivity, kind="potts").normalized(kind)


@pytest.mark.parametrize("connectivity", [4, 8, 12])
@pytest.mark.parametrize("spatial", [(4, 5), (1, 6), (6, 1), (2, 2), (1, 1)], ids=str)
def test_the_potts_kind_is_a_weighted_adjacency_matrix(spatial, connectivity):
    edges = random_edges(*spatial, connectivity // 2)
    K = Grid(edges, connectivity=connectivity, kind="potts")
    matrix = oracles.grid_matrix(edges)
    assert_close(dense_matrix(K), matrix)
    assert_close(K.degrees().ravel(), np.abs(matrix).sum(-1))
    np.testing.assert_array_equal(K.diagonal(), np.zeros(spatial))
    np.testing.assert_array_equal(
        K.edges[0, 0], np.where(oracles.grid_edges_inside(edges)[0, 0], edges[0, 0], 0)
    )
    assert (K.kind, K.connectivity) == ("potts", connectivity)
    assert isinstance(K, Filter)
    assert isinstance(K, Grid)


@pytest.mark.parametrize(("connectivity", "corner", "border"), [(4, 2, 3), (8, 3, 5), (12, 5, 8)])
def test_neighbours_are_counted(connectivity, corner, border):
    ones = np.ones((7, 7, connectivity // 2))
    degrees = Grid(ones, connectivity=connectivity, kind="potts").degrees()
    assert (degrees[0, 0], degrees[0, 3], degrees[3, 3]) == (corner, border, connectivity)


class TestGeneralGrid(PixelLabelSuite):
    CASES: ClassVar = {
        "4": lambda: Grid(random_edges(4, 5, 2, 3, 3), connectivity=4, kind="general"),
        "8": lambda: Grid(random_edges(3, 4, 4, 2, 2), connectivity=8, kind="general"),
        "12": lambda: Grid(random_edges(5, 3, 6, 2, 2), connectivity=12, kind="general"),
        "batch": lambda: Grid(random_edges(2, 3, 4, 4, 3, 3), connectivity=8, kind="general"),
        "one label": lambda: Grid(random_edges(3, 4, 4, 1, 1), connectivity=8, kind="general"),
    }
    PARAMETER: ClassVar = "edges"

    def matrix(self, K):
        edges = np.asarray(K.edges)
        return np.stack([oracles.grid_matrix(e) for e in edges]) if K.batch else oracles.grid_matrix(edges)

    def test_degrees_are_absolute_row_sums(self, K):
        expected = np.abs(self.matrix(K)).sum(-1)
        assert_close(K.degrees(), expected.reshape(*K.batch, *K.spatial, K.num_labels))
        assert K.kind == "general"


@pytest.mark.parametrize("kind", ["general", "potts"])
def test_edges_that_leave_the_image_are_ignored_whatever_they_hold(kind):
    labels = (2, 2) if kind == "general" else ()
    edges = random_edges(3, 4, 6, *labels)
    inside = oracles.grid_edges_inside(edges)
    spoilt = np.where(inside.reshape(*inside.shape, *(1 for _ in labels)), edges, np.nan)
    q = random_edges(3, 4, 2, seed=1)

    def value(edges):
        return jnp.sum(Grid(edges, connectivity=12, kind=kind)(q) ** 2)

    np.testing.assert_array_equal(value(spoilt), value(edges))
    gradient = np.asarray(jax.grad(value)(spoilt))
    np.testing.assert_array_equal(gradient[~inside], 0)
    assert np.isfinite(gradient).all()


def test_mean_field_takes_the_potts_kind():
    edges, u = random_edges(5, 6, 2, positive=True), random_edges(5, 6, 3, seed=1)
    found = jaxcrf.mean_field(u, [(Grid(edges, connectivity=4, kind="potts"), 0.5)]).probs
    matrix = oracles.grid_matrix(edges)
    q = oracles.softmax(u.reshape(-1, 3))
    for _ in range(5):
        message = matrix @ q
        q = oracles.softmax(u.reshape(-1, 3) - 0.5 * (message.sum(-1, keepdims=True) - message))
    np.testing.assert_allclose(found, q.reshape(u.shape), atol=1e-5)


def test_it_adds_to_other_filters():
    q = random_edges(4, 5, 2, seed=1)
    K = Grid(random_edges(4, 5, 4), connectivity=8, kind="potts")
    window = Window(jaxcrf.position_features((4, 5), 1.0), 3)
    assert_close((K + window + Diagonal(jnp.ones((4, 5))))(q), K(q) + window(q) + q)


def test_bad_edges_are_named():
    with pytest.raises(ValueError, match=r"kind: got 'pots'; expected one of general, potts"):
        Grid(random_edges(4, 5, 2), connectivity=4, kind="pots")
    with pytest.raises(ValueError, match=r"connectivity: got 6; expected 4, 8 or 12"):
        Grid(random_edges(4, 5, 3), connectivity=6, kind="potts")
    with pytest.raises(
        ValueError, match=r"edges: got shape \(4, 5, 3\); expected \[\*batch, height, width, 2\]"
    ):
        Grid(random_edges(4, 5, 3), connectivity=4, kind="potts")
    with pytest.raises(ValueError, match=r"expected \[\*batch, height, width, 4, labels, labels\]"):
        Grid(random_edges(4, 5, 4), connectivity=8, kind="general")
    with pytest.raises(ValueError, match=r"edges: got shape \(4, 5, 2, 3, 2\)"):
        Grid(random_edges(4, 5, 2, 3, 2), connectivity=4, kind="general")
    with pytest.raises(ValueError, match="holds nothing"):
        Grid(np.zeros((0, 5, 2), np.float32), connectivity=4, kind="potts")
    with pytest.raises(AttributeError, match="immutable"):
        Grid(random_edges(4, 5, 2), connectivity=4, kind="potts").edges = 3
