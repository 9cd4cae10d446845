"""Frank-Wolfe: the suite, an independent float64 loop, and its kinship with mean field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import dense_matrix
from inference_suite import CLOSE, LABELS, MATRIX, SHAPE, InferenceSuite, assert_close, random, window
from jaxcrf.filters import Diagonal

PLAIN = {"regularization": 0.0}


class TestFrankWolfe(InferenceSuite):
    FURTHER_CASES = ("quadratic", "fixed")
    CASES = {  # noqa: RUF012
        name: {"algorithm": "frank_wolfe"} | options
        for name, options in {
            "entropy": {"regularization": 0.6},
            "quadratic": {"regularizer": "quadratic", "regularization": 0.8},
            "plain": PLAIN,
            "fixed": {"step": "fixed", "step_size": 0.7},
            "decreasing": {"step": "decreasing", "regularizer": "quadratic", "regularization": 2.0},
        }.items()
    }
    DESCENDS = ("entropy", "quadratic", "plain")
    COMPILED = ("jaxcrf.inference.frank_wolfe", "_frank_wolfe")


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def nearest_in_simplex(v):
    """By bisection on the threshold, pixel by pixel."""
    result = np.empty_like(v)
    for i, row in enumerate(v):
        low, high = row.max() - 1, row.max()
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
        result[i] = np.maximum(row - low, 0)
    return result


def float64_loop(u, A, mu, iterations, regularizer, weight, step, step_size=1.0):
    """Plain Frank-Wolfe with the pairwise energy as one explicit matrix over (pixel, label)."""
    u = np.asarray(u, np.float64).reshape(-1, LABELS)
    P = np.kron(A.astype(np.float64), np.asarray(mu, np.float64))
    q = softmax(u)
    energies = []
    for iteration in range(iterations + 1):
        x = q.ravel()
        energies.append(-u.ravel() @ x + x @ P @ x / 2)
        gradient = (P @ x).reshape(q.shape) - u
        if weight == 0:
            p = np.eye(LABELS)[gradient.argmin(-1)]
        else:
            p = (softmax if regularizer == "entropy" else nearest_in_simplex)(-gradient / weight)
        d = (p - q).ravel()
        slope, curvature = gradient.ravel() @ d, d @ P @ d
        if weight and regularizer == "entropy":
            slope += weight * (np.sum(p * np.log(p)) - np.sum(q * np.log(q)))
        elif weight:
            slope, curvature = slope + weight * x @ d, curvature + weight * d @ d
        size = {"fixed": step_size, "decreasing": 2 / (iteration + 2)}.get(step)
        if size is None:
            candidates = np.linspace(0, 1, 100_001)
            size = candidates[np.argmin(slope * candidates + curvature * candidates**2 / 2)]
        if iteration < iterations:
            q = (1 - size) * q + size * p
    return q.reshape(*SHAPE, LABELS), np.array(energies)


@pytest.mark.parametrize(("step", "step_size"), [("line_search", None), ("fixed", 0.4), ("decreasing", None)])
@pytest.mark.parametrize(("regularizer", "weight"), [("entropy", 0.5), ("quadratic", 0.7), ("entropy", 0.0)])
def test_it_is_the_float64_loop(step, step_size, regularizer, weight):
    u, K = random(*SHAPE, LABELS, scale=2), window()
    K = K.replace(weights=-2 * K.weights)  # repulsion, so that steps shorter than one are the best
    options = {"regularizer": regularizer, "regularization": weight, "step": step, "step_size": step_size}
    found = jaxcrf.frank_wolfe(u, [(K, MATRIX)], num_iterations=4, **options)
    probs, energies = float64_loop(u, dense_matrix(K), MATRIX, 4, regularizer, weight, step, step_size)
    # The loop looks for its steps on a grid of 1e-5.
    assert_close(found.probs, probs, 1e-4)
    np.testing.assert_allclose(found.stats.energies, energies, rtol=1e-4, atol=1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("compatibility", [np.float32(0.7), np.array([0.5, 1, 0.1], np.float32), MATRIX])
def test_entropy_of_weight_one_and_full_steps_are_mean_field(compatibility):
    u = random(*SHAPE, LABELS, scale=2)
    for K in (window(), window(blur=2), window(kind="after")):
        options = {"num_iterations": 5, "unary_weight": 0.8, "exclude_self": True}
        expected = jaxcrf.mean_field(u, [(K, compatibility)], **options)
        found = jaxcrf.frank_wolfe(u, [(K, compatibility)], step="fixed", **options)
        assert_close(found.probs, expected.probs, 100 * np.finfo(np.float32).eps)
        assert int(found.stats.iterations) == int(expected.stats.iterations)


def test_that_holds_to_the_last_digits_of_float64():
    with jax.enable_x64(True):
        u = jnp.asarray(random(*SHAPE, LABELS, scale=2), jnp.float64)
        K = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), window())
        expected = jaxcrf.mean_field(u, [(K, 0.7)]).probs
        found = jaxcrf.frank_wolfe(u, [(K, 0.7)], step="fixed", num_iterations=5).probs
        assert_close(found, expected, 1e-14)


def test_where_the_energy_is_concave_the_line_search_is_mean_field_too():
    u, K = random(*SHAPE, LABELS), window()
    lowest = np.linalg.eigvalsh(dense_matrix(K).astype(np.float64)).min()
    K = K + Diagonal(jnp.full(SHAPE, max(0.0, -lowest) + 1e-3))
    found = jaxcrf.frank_wolfe(u, K, num_iterations=6)
    assert_close(found.probs, jaxcrf.mean_field(u, K, num_iterations=6).probs)


def test_a_small_weight_comes_near_to_none():
    u, K = random(*SHAPE, LABELS), window()
    plain = jaxcrf.frank_wolfe(u, K, **PLAIN)
    for regularizer in ("entropy", "quadratic"):
        found = jaxcrf.frank_wolfe(u, K, regularizer=regularizer, regularization=1e-4)
        np.testing.assert_allclose(found.stats.energies, plain.stats.energies, rtol=1e-3, atol=1e-2)


def test_its_objectives_are_energies_with_the_regulariser():
    u, K = random(*SHAPE, LABELS), window()
    result = jaxcrf.frank_wolfe(u, K)
    np.testing.assert_allclose(result.stats.objectives[-1], jaxcrf.free_energy(result.probs, u, K), rtol=1e-5)
    result = jaxcrf.frank_wolfe(u, K, regularizer="quadratic", regularization=0.5)
    expected = result.stats.energies[-1] + 0.25 * np.sum(np.square(result.probs))
    np.testing.assert_allclose(result.stats.objectives[-1], expected, rtol=1e-5)
    result = jaxcrf.frank_wolfe(u, K, **PLAIN)
    np.testing.assert_array_equal(result.stats.objectives, result.stats.energies)


def test_the_weight_and_the_step_can_be_learnt():
    with jax.enable_x64(True):
        u = jnp.asarray(random(*SHAPE, LABELS), jnp.float64)
        K = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), window())

        @jax.jit
        def loss(weight, size):
            return sum(
                jnp.sum(
                    jaxcrf.frank_wolfe(u, K, regularization=weight, num_iterations=3, **options).probs ** 2
                )
                for options in ({"step": "fixed", "step_size": size}, {"regularizer": "quadratic"})
            )

        found = jax.grad(loss, argnums=(0, 1))(0.7, 0.6)
        step = 1e-5
        expected = (
            (loss(0.7 + step, 0.6) - loss(0.7 - step, 0.6)) / (2 * step),
            (loss(0.7, 0.6 + step) - loss(0.7, 0.6 - step)) / (2 * step),
        )
        np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize("K", [window(kind="after"), window(blur=2)], ids=["after", "blurred"])
def test_without_symmetry_there_is_no_line_search(K):
    u = random(*SHAPE, LABELS)
    with pytest.raises(ValueError, match=r"pairwise: a filter is not symmetric.*step='fixed'"):
        jaxcrf.frank_wolfe(u, K)
    for step in ("fixed", "decreasing"):
        result = jaxcrf.frank_wolfe(u, K, step=step, regularization=0.5)
        assert_close(result.probs.sum(-1), 1, CLOSE)
        assert result.stats.energies is None
        assert result.stats.objectives is None


def test_matrices_without_symmetry_have_no_line_search():
    matrix = np.array([[0, 1, 2], [0, 0, 1], [0, 0, 0]], np.float32)
    with pytest.raises(ValueError, match="compatibility matrix is not symmetric"):
        jaxcrf.frank_wolfe(random(*SHAPE, LABELS), [(window(), matrix)])
    assert (
        jaxcrf.frank_wolfe(random(*SHAPE, LABELS), [(window(), matrix)], step="fixed").stats.energies is None
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularizer": "lasso"}, "regularizer: got 'lasso'"),
        ({"regularization": -0.1}, "regularization: got -0.1"),
        ({"regularization": float("nan")}, "regularization: got nan"),
        ({"regularization": [1.0]}, "regularization: got"),
        ({"step": "backtracking"}, "step: got 'backtracking'"),
        ({"step_size": 0.5}, "step_size: got 0.5 with step='line_search'"),
        ({"step": "fixed", "step_size": 0.0}, "step_size: got 0.0"),
        ({"step": "fixed", "step_size": 1.5}, "step_size: got 1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        jaxcrf.frank_wolfe(random(*SHAPE, LABELS), window(), **options)
