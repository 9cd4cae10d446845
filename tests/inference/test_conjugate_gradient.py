"""Conjugate gradients on any operator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import jaxcrf
from jaxcrf.filters import Diagonal, Gram, Window

N = 24


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matrix(condition, seed=0, n=N):
    """A symmetric matrix with eigenvalues spread evenly between 1 and its condition number."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return (q * np.geomspace(1, condition, n)) @ q.T


def relative_error(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def times(a):
    a = jnp.asarray(a, jnp.float32)
    return lambda x: jnp.einsum("...ij,...j->...i", a, x, precision="highest")


@pytest.mark.parametrize("condition", [1, 10, 1e3])
def test_it_solves(condition):
    a, b = matrix(condition), random(N, seed=1)
    x, stats = jaxcrf.conjugate_gradient(times(a), b)
    a32 = a.astype(np.float32).astype(np.float64)
    assert relative_error(x, np.linalg.solve(a32, b)) <= 2e-7 * condition + 1e-6
    assert bool(stats.converged) == (float(stats.residual) <= 1e-6)
    np.testing.assert_allclose(
        stats.residual,
        np.linalg.norm(b - a32 @ np.asarray(x, np.float64)) / np.linalg.norm(b),
        rtol=0.01,
        atol=5e-6,
    )
    assert not bool(stats.indefinite)
    np.testing.assert_allclose(stats.largest_eigenvalue, condition, rtol=1e-3)
    if condition < 1e3:  # the smallest is found last
        np.testing.assert_allclose(stats.smallest_eigenvalue, 1, rtol=0.2)


def test_it_takes_the_steps_of_algorithm_1():
    a, b, x0 = matrix(50), random(N, seed=1), random(N, seed=2)
    x = x0.astype(np.float64)
    r = b - a @ x
    p = r
    for _ in range(5):
        alpha = r @ r / (p @ a @ p)
        x, new = x + alpha * p, r - alpha * (a @ p)
        p, r = new + (new @ new) / (r @ r) * p, new
    # A start is taken where it is nearer than zero.
    scale = np.float32(0.01 if np.linalg.norm(b - a @ x0) > np.linalg.norm(b) else 1)
    found, stats = jaxcrf.conjugate_gradient(times(a), b, x0=x0, max_iterations=5)
    if scale == 1:
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-4)
    else:
        zero, _ = jaxcrf.conjugate_gradient(times(a), b, max_iterations=5)
        np.testing.assert_array_equal(found, zero)
    assert int(stats.iterations) == 5
    assert not bool(stats.converged)


def test_iterations_are_those_of_scipy():
    a, b = matrix(30), random(N, seed=1)
    counted = []
    scipy.sparse.linalg.cg(a, b, rtol=1e-5, callback=counted.append)
    with jax.enable_x64(True):
        _, stats = jaxcrf.conjugate_gradient(
            lambda x: jnp.asarray(a) @ x, b.astype(np.float64), tolerance=1e-5
        )
    assert int(stats.iterations) == len(counted)


@pytest.mark.exhaustive
def test_a_good_start_saves_iterations_and_a_bad_one_does_no_harm():
    a, b = matrix(30), random(N, seed=1)
    exact = np.linalg.solve(a, b)
    _, cold = jaxcrf.conjugate_gradient(times(a), b, tolerance=1e-5)
    _, warm = jaxcrf.conjugate_gradient(times(a), b, tolerance=1e-5, x0=exact + 1e-4 * random(N, seed=2))
    _, there = jaxcrf.conjugate_gradient(times(a), b, tolerance=1e-5, x0=exact)
    _, worse = jaxcrf.conjugate_gradient(times(a), b, tolerance=1e-5, x0=1e6 * random(N, seed=2))
    assert int(there.iterations) == 0
    assert int(warm.iterations) < int(cold.iterations) == int(worse.iterations)
    assert bool(there.converged & warm.converged & worse.converged)


def test_preconditioners():
    scales = np.geomspace(1, 1e4, N)
    a = np.eye(N) * scales + 0.1 * matrix(10)
    b = random(N, seed=1)
    options = {"tolerance": 1e-4}
    _, plain = jaxcrf.conjugate_gradient(times(a), b, **options)
    x, found = jaxcrf.conjugate_gradient(times(a), b, preconditioner=lambda r: r / np.diag(a), **options)
    assert int(found.iterations) < int(plain.iterations) / 2
    assert bool(found.converged)
    assert relative_error(x, np.linalg.solve(a, b)) < 1e-3
    _, bad = jaxcrf.conjugate_gradient(times(a), b, preconditioner=lambda r: -r, **options)
    assert bool(bad.indefinite)
    assert not bool(bad.converged)


def test_every_system_of_a_batch_stops_by_itself():
    a = np.stack([matrix(c, seed=i) for i, c in enumerate((1.5, 30, 300))])
    b = random(3, N, seed=1) * np.float32([1e-15, 1, 1e15])[:, None]
    a[0] = 2 * np.eye(N)
    b[1] = 0
    x, stats = jaxcrf.conjugate_gradient(times(a), b, batch_ndim=1, tolerance=1e-5)
    assert stats.iterations[0] == 1
    assert stats.iterations[1] == 0
    np.testing.assert_array_equal(x[1], 0)
    for i in range(3):
        alone, its = jaxcrf.conjugate_gradient(times(a[i]), b[i], tolerance=1e-5)
        np.testing.assert_allclose(x[i], alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())
        assert its.iterations == stats.iterations[i]
    mapped, mapped_stats = jax.vmap(
        lambda a, b: jaxcrf.conjugate_gradient(lambda x: a @ x, b, tolerance=1e-5)
    )(a.astype(np.float32), b)
    np.testing.assert_allclose(mapped, x, rtol=1e-4, atol=1e-5 * np.abs(x).max(-1, keepdims=True).min())
    np.testing.assert_array_equal(mapped_stats.converged, stats.converged)


def test_operators_that_are_not_definite_are_reported():
    b = random(N, seed=1)
    for a in (-np.eye(N), np.diag(np.linspace(-1, 2, N)), np.zeros((N, N))):
        x, stats = jaxcrf.conjugate_gradient(times(a), b)
        assert bool(stats.indefinite)
        assert not bool(stats.converged)
        assert stats.residual > 1e-3
        assert np.isfinite(x).all()


@pytest.mark.exhaustive
def test_unreachable_tolerances_are_reported_with_what_was_reached():
    a, b = matrix(1e5), random(N, seed=1)
    _, stats = jaxcrf.conjugate_gradient(times(a), b, tolerance=0.0)
    assert not bool(stats.converged)
    assert 0 < stats.residual < 1e-2
    assert not bool(stats.indefinite)
    _, stats = jaxcrf.conjugate_gradient(times(matrix(10)), b, tolerance=0.0)
    assert not bool(stats.converged)
    assert 0 < stats.residual < 1e-6
    assert int(stats.iterations) < 5 * N  # it does not go on for ever
    _, stats = jaxcrf.conjugate_gradient(times(a), b, max_iterations=0)
    assert int(stats.iterations) == 0
    np.testing.assert_allclose(stats.residual, 1, rtol=1e-6)
    _, stats = jaxcrf.conjugate_gradient(times(matrix(10)), b, tolerance=0.0, absolute_tolerance=1e-3)
    assert bool(stats.converged)
    assert 1e-7 < stats.residual * np.linalg.norm(b) <= 1e-3


def test_nan_shows():
    b = random(N, seed=1)
    b[3] = np.nan
    x, stats = jaxcrf.conjugate_gradient(times(np.eye(N)), b)
    assert np.isnan(x).any()
    assert not bool(stats.converged)
    x, stats = jaxcrf.conjugate_gradient(lambda x: x * jnp.nan, random(N))
    assert np.isnan(x).any()
    assert not bool(stats.converged)


def test_derivatives_agree_with_a_dense_solve_in_float64():
    with jax.enable_x64(True):
        a, b = jnp.asarray(matrix(10, n=4)), jnp.asarray(random(4, seed=1), jnp.float64)
        w = jnp.asarray(random(4, seed=2), jnp.float64)

        def ours(a, b):
            x, _ = jaxcrf.conjugate_gradient(lambda v: (a + a.T) @ v / 2, b, x0=0.1 * b, tolerance=1e-12)
            return jnp.sum(w * x**2)

        def dense(a, b):
            return jnp.sum(w * jnp.linalg.solve((a + a.T) / 2, b) ** 2)

        for derivative in (jax.grad, jax.hessian):  # reverse, and forward over reverse
            found, expected = (jax.jit(derivative(f, (0, 1)))(a, b) for f in (ours, dense))
            jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-6, atol=1e-8), found, expected)


def system_filters():
    positions = jaxcrf.position_features((5, 6), 1.5)
    return {
        "window": Window(positions, 5).normalized("symmetric") + Diagonal(jnp.full((5, 6), 1.5)),
        "gram": Gram(random(5, 6, 3), kind="potts") + Diagonal(jnp.full((5, 6), 2.0)),
    }


@pytest.mark.parametrize("name", system_filters())
def test_filters_are_operators(name):
    K, b = system_filters()[name], random(2, 5, 6, 3, seed=1)
    dense = np.asarray(K(jnp.eye(30).reshape(5, 6, 30)), np.float64).reshape(30, 30)
    expected = np.linalg.solve(dense, b.reshape(2, 30, 3).astype(np.float64)).reshape(b.shape)
    x, stats = jaxcrf.conjugate_gradient(K, b)
    assert relative_error(x, expected) < 1e-5
    assert stats.iterations.shape == (2,)

    def value(K, b):
        return jnp.sum(jaxcrf.conjugate_gradient(K, b)[0] ** 2)

    # ∂K = -g xᵀ, through whatever the filter is made of; its own rules do the rest.
    found, g = jax.grad(value, (0, 1), allow_int=True)(K, b)
    np.testing.assert_allclose(
        g,
        np.linalg.solve(dense, 2 * expected.reshape(2, 30, 3)).reshape(b.shape),
        atol=1e-4 * np.abs(g).max(),
    )
    expected = jax.vjp(lambda K: K(x), K)[1](-g)[0]
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, rtol=0, atol=1e-4 * float(np.abs(e).max(initial=1e-9)))


def test_a_filter_is_compiled_once_per_shape():
    from jaxcrf.inference.conjugate_gradient import _solve_filtered

    before = _solve_filtered._cache_size()
    for seed in (1, 2):
        K = Gram(random(5, 7, 3, seed=seed), kind="potts") + Diagonal(jnp.full((5, 7), 2.0))
        jaxcrf.conjugate_gradient(K, random(5, 7, 2))
    assert _solve_filtered._cache_size() == before + 1


@pytest.mark.exhaustive
def test_label_operators_are_operators_too():
    K, b = Gram(random(3, 4, 2, 5), kind="general"), random(3, 4, 2, seed=1)
    x, stats = jaxcrf.conjugate_gradient(lambda x: K(x) + 2 * x, b)
    e = np.asarray(K.embeddings, np.float64).reshape(-1, 5)
    exact = np.linalg.solve(e @ e.T + 2 * np.eye(24), b.ravel().astype(np.float64))
    assert relative_error(x.ravel(), exact) < 1e-5
    assert bool(stats.converged)
    _, alone = jaxcrf.conjugate_gradient(K, b)  # of rank 5 only
    assert not bool(alone.converged)


def test_bad_arguments_are_named():
    b, K = random(4, 5, 2), Window(jaxcrf.position_features((4, 5), 1.0), 3)
    solve = jaxcrf.conjugate_gradient
    with pytest.raises(TypeError, match="operator: got float"):
        solve(3.0, b)
    with pytest.raises(TypeError, match="preconditioner: got int"):
        solve(lambda x: x, b, preconditioner=1)
    with pytest.raises(ValueError, match="operator: a filter that is not symmetric"):
        solve(K.normalized("after"), b)
    with pytest.raises(ValueError, match="b: got shape"):
        solve(K, b[1:])
    with pytest.raises(ValueError, match="b: got dtype int32"):
        solve(lambda x: x, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"operator: maps shape \(3,\) to \(\)"):
        solve(lambda x: x.sum(), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="x0: got shape"):
        solve(lambda x: x, b, x0=b[1:])
    with pytest.raises(ValueError, match="batch_ndim: got 4"):
        solve(lambda x: x, b, batch_ndim=4)
    for name in ("tolerance", "absolute_tolerance"):
        for value in (-1.0, float("nan"), [0.1]):
            with pytest.raises(ValueError, match=f"{name}: got"):
                solve(lambda x: x, b, **{name: value})
    for value in (-1, 0.5, True):
        with pytest.raises(ValueError, match="max_iterations: got"):
            solve(lambda x: x, b, max_iterations=value)
