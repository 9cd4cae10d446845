"""Projected gradients: the suite, the projection, and an independent float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import dense_matrix
from inference_suite import EPSILON, LABELS, MATRIX, SHAPE, InferenceSuite, assert_close, random, window
from jaxcrf.inference.relaxation import best_step, project_to_simplex


class TestProjectedGradient(InferenceSuite):
    CASES = {  # noqa: RUF012
        "spectral": {"algorithm": "projected_gradient"},
        "constant": {"algorithm": "projected_gradient", "step_size": 0.3},
    }
    DESCENDS = ("spectral", "constant")
    COMPILED = ("jaxcrf.inference.projected_gradient", "_projected_gradient")


class TestProjection:
    def test_it_is_the_nearest_point(self):
        # The projection is the one point p with ⟨v - p, corner - p⟩ <= 0 for all corners.
        for labels in (1, 2, 5, 40):
            for scale in (0.1, 1.0, 30.0):
                v = random(200, labels, scale=scale)
                p = np.asarray(project_to_simplex(v), np.float64)
                assert (p >= 0).all()
                np.testing.assert_allclose(p.sum(-1), 1, atol=labels * EPSILON)
                inner = (v - p) - np.sum((v - p) * p, -1, keepdims=True)
                # v - p is rounded like v is; the products with p, which sums to one, no worse.
                assert inner.max() <= 10 * EPSILON * max(1, np.abs(v).max()) * labels**0.5

    def test_points_of_the_simplex_stay(self):
        p = np.random.default_rng(0).dirichlet(np.ones(6), 50).astype(np.float32)
        assert_close(project_to_simplex(p), p, 8 * EPSILON)
        corners = np.eye(6, dtype=np.float32)
        np.testing.assert_array_equal(project_to_simplex(corners), corners)

    def test_constants_do_not_matter_and_ties_are_shared(self):
        np.testing.assert_allclose(project_to_simplex(jnp.array([1e6, 1e6 + 0.5])), [0.25, 0.75])
        np.testing.assert_allclose(project_to_simplex(jnp.full(4, 7.0)), [0.25] * 4)
        np.testing.assert_allclose(project_to_simplex(jnp.array([0.0, -1e30])), [1, 0])

    def test_nan_comes_through(self):
        assert np.isnan(project_to_simplex(jnp.array([0.0, np.nan, 1.0]))).all()

    def test_its_derivative_agrees_with_differences_in_float64(self):
        with jax.enable_x64(True):
            v, t, g = (jnp.asarray(random(20, 5, seed=s), jnp.float64) for s in range(3))
            expected = (project_to_simplex(v + 1e-6 * t) - project_to_simplex(v - 1e-6 * t)) / 2e-6
            found = jax.jvp(project_to_simplex, (v,), (t,))[1]
            assert_close(found, expected, 1e-9)  # it is piecewise linear: rounding alone
            (pulled,) = jax.vjp(project_to_simplex, v)[1](g)
            np.testing.assert_allclose(jnp.vdot(pulled, t), jnp.vdot(g, found), rtol=1e-12)


class TestBestStep:
    def test_it_is_the_lowest_point_of_the_parabola(self):
        rng = np.random.default_rng(0)
        slope, curvature = -rng.exponential(size=200), 3 * rng.normal(size=200)
        candidates = np.linspace(0, 1, 10_001)
        values = slope[:, None] * candidates + curvature[:, None] * candidates**2 / 2
        found = best_step(jnp.asarray(slope, jnp.float32), jnp.asarray(curvature, jnp.float32))
        assert_close(found, candidates[values.argmin(1)], 1e-4)

    def test_flat_parabolas_have_finite_gradients(self):
        for slope, curvature in [(0.0, 0.0), (0.0, 1e-30), (-1e-30, 1e-38), (1e-20, 0.0), (-1.0, -1.0)]:
            step, gradient = jax.value_and_grad(best_step, argnums=(0, 1))(slope, curvature)
            assert 0 <= step <= 1
            assert np.isfinite(gradient).all()


def nearest_in_simplex(v):
    """By trying every number of labels that may be left."""
    result = np.empty_like(v)
    for i, row in enumerate(v):
        candidates = []
        for kept in range(1, len(row) + 1):
            best = np.argsort(-row)[:kept]
            p = np.zeros(len(row))
            p[best] = row[best] + (1 - row[best].sum()) / kept
            if (p >= 0).all():
                candidates.append(p)
        result[i] = min(candidates, key=lambda p, row=row: np.sum((p - row) ** 2))
    return result


@pytest.mark.parametrize("step_size", [0.4, None])
@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_the_float64_loop(step_size, sign):
    K = window()
    K = K.replace(weights=2 * sign * K.weights)
    u = random(*SHAPE, LABELS)
    P = np.kron(dense_matrix(K).astype(np.float64), MATRIX.astype(np.float64))
    flat = u.astype(np.float64).reshape(-1, LABELS)
    q = np.asarray(jax.nn.softmax(u), np.float64).reshape(-1, LABELS)
    length, energies = step_size or 1.0, []
    for iteration in range(6):
        x = q.ravel()
        energies.append(-flat.ravel() @ x + x @ P @ x / 2)
        gradient = (P @ x).reshape(q.shape) - flat
        p = nearest_in_simplex(q - length * gradient)
        d = (p - q).ravel()
        slope, curvature = gradient.ravel() @ d, d @ P @ d
        gamma = min(1, -slope / curvature) if curvature > 0 else 1
        if step_size is None and d @ d > 0:
            length = min(1e3, d @ d / curvature) if curvature > 0 else 1e3
        if iteration < 5:
            q = q + gamma * (p - q)
    found = jaxcrf.projected_gradient(u, [(K, MATRIX)], num_iterations=5, step_size=step_size)
    assert_close(found.probs, q.reshape(u.shape), 1e-4)
    np.testing.assert_allclose(found.stats.energies, energies, rtol=1e-5, atol=1e-4)


def test_a_convex_energy_is_minimised():
    # Repulsion with a heavy diagonal makes P positive definite; then all methods must end at one minimum.
    with jax.enable_x64(True):
        K = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), window())
        A = dense_matrix(K)
        mu = np.eye(LABELS) * np.abs(np.linalg.eigvalsh(A)).max() * 2
        u = jnp.asarray(random(*SHAPE, LABELS), jnp.float64)
        terms = [(K, 0.5), (jaxcrf.filters.Diagonal(jnp.ones(SHAPE)), mu)]
        P = np.kron(A, 0.5 * (1 - np.eye(LABELS))) + np.kron(np.eye(12), mu)
        assert np.linalg.eigvalsh(P).min() > 0
        result = jaxcrf.projected_gradient(u, terms, num_iterations=200)
        gradient = np.asarray(P @ np.asarray(result.probs).ravel()).reshape(u.shape) - u
        gap = np.sum(gradient * result.probs) - np.sum(gradient.min(-1))  # bounds E - min E from above
        assert -1e-12 <= gap < 1e-10
        other = jaxcrf.frank_wolfe(
            u, terms, regularizer="quadratic", regularization=1e-6, num_iterations=10, step="decreasing"
        )
        assert other.stats.energies[-1] >= result.stats.energies[-1] - 1e-9


@pytest.mark.parametrize("K", [window(kind="after"), window(blur=2)], ids=["after", "blurred"])
def test_filters_without_an_energy_are_refused(K):
    with pytest.raises(ValueError, match=r"pairwise: a filter is not symmetric.*mean_field"):
        jaxcrf.projected_gradient(random(*SHAPE, LABELS), K)


@pytest.mark.parametrize("step_size", [0.0, -1.0, float("nan"), float("inf"), [1.0, 2.0]])
def test_bad_steps_are_named(step_size):
    with pytest.raises(ValueError, match="step_size: got"):
        jaxcrf.projected_gradient(random(*SHAPE, LABELS), window(), step_size=step_size)
