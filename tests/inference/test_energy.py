"""Energies against sums over all pairs and all labellings, and what mean field does to them."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import dense_matrix
from jaxcrf.filters import Diagonal, Window

SHAPE, LABELS = (2, 3), 3


def random(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def window(shape=SHAPE, weight=0.8, kind="none", size=3):
    return Window(
        jaxcrf.bilateral_features(random(*shape, 3, scale=50), 2.0, 60.0), size, weights=weight
    ).normalized(kind)


MATRIX = np.array([[0.2, 1, 0.5], [1, 0, 0.3], [0.5, 0.3, -0.1]], np.float32)


def pairwise_energy(x, A, mu, exclude_self):
    total = 0.0
    for i, j in itertools.product(range(len(x)), repeat=2):
        if i != j or not exclude_self:
            total += 0.5 * A[i, j] * mu[x[i], x[j]]
    return total


@pytest.mark.parametrize("exclude_self", [False, True])
def test_gibbs_energy_is_the_sum_over_pairs(exclude_self):
    u, K = random(*SHAPE, LABELS), window()
    x = np.random.default_rng(1).integers(0, LABELS, SHAPE)
    found = jaxcrf.gibbs_energy(x, u, [(K, MATRIX)], unary_weight=0.7, exclude_self=exclude_self)
    unary = -0.7 * np.take_along_axis(u, x[..., None], -1).astype(np.float64).sum()
    expected = unary + pairwise_energy(x.ravel(), dense_matrix(K).astype(np.float64), MATRIX, exclude_self)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_free_energy_is_the_divergence_up_to_log_z():
    # All 3⁶ labellings: F(q) + log Z is KL(Q ‖ P), with no constant left over.
    u, K = random(*SHAPE, LABELS), window()
    q = np.asarray(jaxcrf.mean_field(u, [(K, MATRIX)], exclude_self=True).probs, np.float64).reshape(
        -1, LABELS
    )
    A = dense_matrix(K).astype(np.float64)
    pixels = np.arange(len(q))
    energies, log_q = [], []
    for labelling in itertools.product(range(LABELS), repeat=len(q)):
        x = np.array(labelling)
        unary = -u.reshape(-1, LABELS)[pixels, x].astype(np.float64).sum()
        energies.append(unary + pairwise_energy(x, A, MATRIX, exclude_self=True))
        log_q.append(np.log(q[pixels, x]).sum())
    energies, log_q = np.array(energies), np.array(log_q)
    log_z = np.log(np.exp(-energies + energies.min()).sum()) - energies.min()
    divergence = np.sum(np.exp(log_q) * (log_q + energies + log_z))
    found = jaxcrf.free_energy(q.reshape(*SHAPE, LABELS), u, [(K, MATRIX)], exclude_self=True)
    np.testing.assert_allclose(float(found) + log_z, divergence, rtol=1e-4)
    assert divergence > 0


def test_energies_of_a_batch():
    u, K = random(2, *SHAPE, LABELS), window()
    q = jaxcrf.mean_field(u, K).probs
    found = jaxcrf.free_energy(q, u, K)
    assert found.shape == (2,)
    np.testing.assert_allclose(found[1], jaxcrf.free_energy(q[1], u[1], K), rtol=1e-5)


def energies_along_the_way(u, pairwise, iterations=8, **options):
    return [
        float(
            jaxcrf.free_energy(jaxcrf.mean_field(u, pairwise, num_iterations=n, **options).probs, u, pairwise)
        )
        for n in range(iterations)
    ]


def assert_decreasing(energies):
    # Float32 sums of a hundred terms: rises below 1e-6 of the energy are rounding.
    rises = np.diff(energies)
    assert (rises <= 1e-6 * np.abs(energies).max()).all(), energies
    assert energies[-1] < energies[0]


class TestDescent:
    shape = (5, 6)

    def setup_method(self):
        self.u = random(*self.shape, LABELS, scale=0.3)
        # Attraction strong enough that the marginals move a long way.
        self.K = window(self.shape, weight=2.0, size=5)
        self.lowest = np.linalg.eigvalsh(dense_matrix(self.K).astype(np.float64)).min()

    def test_parallel_updates_descend_where_the_filter_is_positive_semidefinite(self):
        # A truncated Gaussian is not; a little more of the centre pixel makes it so, and then
        # -½⟨q, Kq⟩ is concave and every update minimises an upper bound that touches.
        K = self.K + Diagonal(jnp.full(self.shape, max(0.0, -self.lowest) + 1e-3))
        assert np.linalg.eigvalsh(dense_matrix(K)).min() > 0
        assert_decreasing(energies_along_the_way(self.u, K))

    @pytest.mark.exhaustive
    def test_damped_updates_descend_for_any_filter(self):
        # A repulsive filter makes parallel updates oscillate; damping by 1 - 1/(1 + |λ|) does not.
        K = self.K.replace(weights=-self.K.weights)
        largest = np.abs(np.linalg.eigvalsh(dense_matrix(K))).max()
        assert_decreasing(energies_along_the_way(self.u, K, damping=1 - 1 / (1 + largest)))

    @pytest.mark.exhaustive
    def test_undamped_updates_need_not_descend(self):
        K = self.K.replace(weights=-self.K.weights)
        assert np.diff(energies_along_the_way(self.u, K)).max() > 1e-2


@pytest.mark.parametrize("energy", [jaxcrf.gibbs_energy, jaxcrf.free_energy])
def test_filters_without_an_energy_are_refused(energy):
    u = random(*SHAPE, LABELS)
    first = (
        np.zeros(SHAPE, np.int32)
        if energy is jaxcrf.gibbs_energy
        else np.full((*SHAPE, LABELS), 1 / 3, np.float32)
    )
    for K in (window(kind="after"), Window(random(*SHAPE, 1), 3, blur=2)):
        with pytest.raises(ValueError, match="not symmetric"):
            energy(first, u, K)


def test_labels_out_of_range_are_refused():
    u = random(*SHAPE, LABELS)
    with pytest.raises(ValueError, match="labels: holds label 3"):
        jaxcrf.gibbs_energy(np.full(SHAPE, 3), u, window())
    with pytest.raises(ValueError, match="labels: got dtype float32"):
        jaxcrf.gibbs_energy(np.zeros(SHAPE, np.float32), u, window())
