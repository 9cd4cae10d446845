"""Gaussian CRFs of embeddings."""

import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from jaxcrf.inference.gaussian_crf import choose_solver, extreme_eigenvalues, solve_iteratively
from solver_suite import LABELS, SHAPE, SolverSuite, System, assert_close, relative_error

D = 4


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def vectors(e):
    return np.asarray(e, np.float64).reshape(-1, e.shape[-1])


def top(e):
    """The largest eigenvalue of `AᵀA`."""
    return np.linalg.norm(vectors(e), 2) ** 2


def dense(kind, e, labels, regularization):
    gram = vectors(e) @ vectors(e).T
    if kind == "potts":
        gram = np.kron(gram, np.ones((labels, labels)) - np.eye(labels))
    return gram + regularization * np.eye(len(gram))


class TestGaussianCRF(SolverSuite):
    FURTHER_CASES: ClassVar = ("cg, general", "direct, potts")
    CASES: ClassVar = {
        f"{solver}, {kind}": {"solver": solver, "kind": kind}
        for solver in ("cg", "direct")
        for kind in ("general", "potts")
    }

    def solve(self, case, system, **options):
        return jaxcrf.gaussian_crf(
            system.parameters,
            system.unary,
            regularization=system.regularization,
            **(self.CASES[case] | options),
        )

    def embeddings(self, case, shape, labels, d, seed=0):
        return random(*shape, *((labels,) if self.CASES[case]["kind"] == "general" else ()), d, seed=seed)

    def system(self, case, shape=SHAPE, labels=LABELS, batch=(), seed=0):
        e = self.embeddings(case, (*batch, *shape), labels, D, seed)
        strongest = max(map(top, e)) if batch else top(e)
        share = 0.1 if self.CASES[case]["kind"] == "general" else 1.3
        return System(e, random(*batch, *shape, labels, seed=seed + 10), float(share * strongest))

    def accuracy_systems(self, case):
        shares = (0.001, 0.1, 10.0) if self.CASES[case]["kind"] == "general" else (1.01, 1.5, 10.0)
        e, b = self.embeddings(case, (11, 11), 5, 16), random(11, 11, 5, seed=1)
        return [System(e, b, float(np.float32(share * top(e)))) for share in shares]

    def near_singular_system(self, case):
        share = 1e-4 if self.CASES[case]["kind"] == "general" else 1.001
        e = self.embeddings(case, (11, 11), 5, 16)
        return System(e, random(11, 11, 5, seed=1), float(np.float32(share * top(e))))

    def matrix(self, case, system):
        return dense(
            self.CASES[case]["kind"], system.parameters, system.unary.shape[-1], system.regularization
        )

    def test_rank_deficient_embeddings(self, case):
        system = self.system(case)
        e = system.parameters.copy()
        e[..., 2], e[..., 3] = e[..., 0], 0  # two of four numbers say something
        share = 1e-3 if self.CASES[case]["kind"] == "general" else 1.5
        system = system._replace(parameters=e, regularization=float(share * top(e)))
        result = self.solve(case, system)
        assert relative_error(result.scores, self.exact(case, system)) <= 1e-5
        assert bool(result.stats.definite)


@pytest.mark.parametrize("kind", ["general", "potts"])
def test_spectral_scaling_leaves_weak_embeddings_alone_and_volumes_are_images(kind):
    e, b = random(2, 3, 4, *((3,) if kind == "general" else ()), 4), random(2, 3, 4, 3, seed=1)
    options = {"kind": kind, "regularization": float(2 * top(e)), "spatial_ndim": 3}
    found = jaxcrf.gaussian_crf(e, b, embedding_scaling="spectral", **options)
    exact = np.linalg.solve(dense(kind, e, 3, options["regularization"]), b.ravel().astype(np.float64))
    assert_close(found.scores.ravel(), exact)


@pytest.mark.parametrize("kind", ["general", "potts"])
def test_variances_are_the_diagonal_of_the_inverse(kind):
    e, b = random(11, 11, *((5,) if kind == "general" else ()), 16), random(11, 11, 5, seed=1)
    for share in (0.01, 1.0) if kind == "general" else (1.1, 10.0):
        options = {"kind": kind, "regularization": float(np.float32(share * top(e)))}
        expected = np.diag(np.linalg.inv(dense(kind, e, 5, options["regularization"]))).reshape(b.shape)
        found = jaxcrf.gaussian_crf(e, b, variances=True, **options).variances
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["general", "potts"])
def test_variances_are_differentiable(kind):
    e = random(3, 4, *((3,) if kind == "general" else ()), 4)
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        weights, b = rng.normal(size=(3, 4, 3)), jnp.ones((3, 4, 3))
        operands = (jnp.asarray(e, jnp.float64), jnp.float64(1.3 * top(e)))
        along = tuple(jnp.asarray(rng.normal(size=np.shape(x))) for x in operands)

        @jax.jit
        def value(e, regularization):
            result = jaxcrf.gaussian_crf(e, b, kind=kind, regularization=regularization, variances=True)
            return jnp.sum(weights * result.variances)

        gradient = jax.grad(value, (0, 1))(*operands)
        plus, minus = (
            value(*(x + s * d for x, d in zip(operands, along, strict=True))) for s in (1e-5, -1e-5)
        )
        found = sum(jnp.vdot(g, d) for g, d in zip(gradient, along, strict=True))
        np.testing.assert_allclose(found, (plus - minus) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["general", "potts"])
@pytest.mark.parametrize("scaling", ["unit-ball", "spectral"])
def test_scaled_embeddings_are_always_definite(kind, scaling):
    b, options = random(5, 6, 3, seed=1), {"kind": kind, "regularization": 0.5, "embedding_scaling": scaling}

    @jax.jit
    def solve(e):
        return jaxcrf.gaussian_crf(e, b, **options)

    gradient = jax.jit(jax.grad(lambda e: jnp.sum(solve(e).scores ** 2)))
    for seed, stretch in enumerate((1e3, 1e-3, 1.0, 0.0)):
        e = stretch * random(5, 6, *((3,) if kind == "general" else ()), 4, seed=seed)
        e[..., 1:] *= 0.01  # nearly all alike, which is the worst case
        stats = solve(e).stats
        assert bool(stats.definite)
        assert bool(stats.converged)
        assert stats.largest_eigenvalue <= 0.9501 * 0.5
        assert np.isfinite(gradient(e)).all()


def test_indefinite_systems_are_solved_directly_and_reported_by_both():
    labels = 3
    e, b = random(5, 6, 4), random(5, 6, labels, seed=1)
    for share in (0.2, 0.9, 0.99):
        regularization = float(np.float32(share * top(e)))
        options = {"kind": "potts", "regularization": regularization, "variances": True}
        exact = np.linalg.solve(dense("potts", e, labels, regularization), b.ravel().astype(np.float64))
        result = jaxcrf.gaussian_crf(e, b, **options)
        assert relative_error(result.scores.ravel(), exact) <= 1e-4
        assert not bool(result.stats.definite)
        assert np.isinf(result.stats.condition)
        assert np.isnan(result.variances).all()  # there is no such Gaussian
        result = jaxcrf.gaussian_crf(e, b, solver="cg", **options)
        assert not bool(result.stats.definite)
        assert not bool(result.stats.converged)
        assert np.isnan(result.variances).all()


def test_gradients_of_indefinite_systems_are_those_of_the_linear_system():
    with jax.enable_x64(True):
        e, b = jnp.asarray(random(3, 4, 2), jnp.float64), jnp.asarray(random(3, 4, 3, seed=1), jnp.float64)
        regularization = 0.5 * top(e)

        def value(e):
            return jnp.sum(jaxcrf.gaussian_crf(e, b, kind="potts", regularization=regularization).scores ** 3)

        def by_hand(e):
            flat = e.reshape(-1, 2)
            matrix = jnp.kron(flat @ flat.T, jnp.ones((3, 3)) - jnp.eye(3)) + regularization * jnp.eye(36)
            return jnp.sum(jnp.linalg.solve(matrix, b.ravel()) ** 3)

        np.testing.assert_allclose(jax.grad(value)(e), jax.grad(by_hand)(e), rtol=1e-8)


def test_one_indefinite_image_leaves_the_others_of_its_batch_alone():
    e = random(2, 4, 5, 3) * np.float32([1, 0.1])[:, None, None, None]
    b, regularization = random(2, 4, 5, 3, seed=1), float(0.5 * top(e[0]))
    for solver in ("cg", "direct"):
        result = jaxcrf.gaussian_crf(e, b, kind="potts", regularization=regularization, solver=solver)
        np.testing.assert_array_equal(result.stats.definite, [False, True])
        exact = np.linalg.solve(dense("potts", e[1], 3, regularization), b[1].ravel().astype(np.float64))
        assert relative_error(result.scores[1].ravel(), exact) <= 1e-5


@pytest.mark.parametrize("kind", ["general", "potts"])
def test_the_gradient_is_two_outer_products(kind):
    # ∂A = -(A g) xᵀ - (A x) gᵀ, labels mixed for Potts ones; ∂b = g; ∂λ = -gᵀx.
    e = random(4, 5, *((3,) if kind == "general" else ()), 4)
    b, w, regularization = random(4, 5, 3, seed=1), random(4, 5, 3, seed=2), float(2 * top(e))

    def solve(e, b, r):
        return jaxcrf.gaussian_crf(e, b, kind=kind, regularization=r, solver="direct").scores

    found = jax.grad(lambda *operands: jnp.vdot(w, solve(*operands)), (0, 1, 2))(e, b, regularization)
    matrix = dense(kind, e, 3, regularization)
    x, g = (np.linalg.solve(matrix, v.ravel().astype(np.float64)) for v in (b, w))
    assert_close(found[1].ravel(), g)
    assert_close(found[2], -g @ x)
    a = vectors(e)
    if kind == "general":
        expected = -np.outer(x, a.T @ g) - np.outer(g, a.T @ x)
    else:
        x, g = x.reshape(-1, 3), g.reshape(-1, 3)

        def mixed(t):
            return t.sum(-1, keepdims=True) - t

        expected = -x @ mixed(a.T @ g).T - g @ mixed(a.T @ x).T
    assert_close(np.asarray(found[0]).reshape(expected.shape), expected)


def test_the_backward_pass_reuses_the_factorisation():
    def value(e):
        unary = jnp.ones((4, 5, 2))
        return jaxcrf.gaussian_crf(e, unary, kind="potts", regularization=99.0).scores.sum()

    counts = [
        len(re.findall(r"= cholesky\b", str(jax.make_jaxpr(f)(random(4, 5, 3)))))
        for f in (value, jax.grad(value))
    ]
    assert counts == [1, 1]  # of the mean and of the deviations, at once


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_memory_is_that_of_the_embeddings(solver):
    e, b = jnp.zeros((24, 25, 5, 32)), jnp.zeros((24, 25, 5))  # 3000 × 3000 would be 36 MB

    def value(e, b):
        return jaxcrf.gaussian_crf(e, b, kind="general", regularization=1.0, solver=solver).scores.sum()

    compiled = jax.jit(jax.value_and_grad(value, (0, 1))).lower(e, b).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * e.nbytes + 10 * b.nbytes + 2**18


@pytest.mark.parametrize("kind", ["general", "potts"])
def test_iterations_that_do_not_suffice_are_reported(kind):
    e = random(11, 11, *((5,) if kind == "general" else ()), 16)
    b, regularization = random(11, 11, 5, seed=1), float((0.01 if kind == "general" else 1.1) * top(e))
    options = {"kind": kind, "regularization": regularization, "solver": "cg"}
    stats = jaxcrf.gaussian_crf(e, b, max_iterations=3, **options).stats
    assert int(stats.iterations) == 3
    assert not bool(stats.converged)
    assert stats.residual > 1e-6
    stats = jaxcrf.gaussian_crf(e, b, tolerance=0.0, **options).stats
    assert not bool(stats.converged)  # float32 cannot
    assert 0 < stats.residual < 1e-4
    assert bool(stats.definite)
    stats = jaxcrf.gaussian_crf(e, b, tolerance=1e-3, **options).stats
    assert bool(stats.converged)
    assert 1e-6 < stats.residual <= 1e-3


def test_auto_chooses_by_shape_and_definiteness():
    def choice(kind, d, **options):
        K = jaxcrf.filters.Gram(random(2, 3, *((2,) if kind == "general" else ()), d), kind=kind)
        return choose_solver(K, options.pop("labels", 2), options.pop("embedding_scaling", None))

    assert choice("general", 12) == "direct"
    assert choice("general", 13) == "cg"
    assert choice("potts", 6) == "direct"
    assert choice("potts", 7) == "direct"  # it might be indefinite
    assert choice("potts", 7, labels=1) == "cg"
    assert choice("potts", 7, embedding_scaling="unit-ball") == "cg"
    e, b = random(3, 4, 2), random(3, 4, 3)
    options = {"kind": "potts", "regularization": 30.0}
    found = jaxcrf.gaussian_crf(e, b, **options)
    expected = jaxcrf.gaussian_crf(e, b, solver="direct", **options)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_extreme_eigenvalues_are_found():
    rng = np.random.default_rng(0)
    eigenvalues = 3 * np.linspace(0, 1, 40) ** np.array([[1.0], [4.0]]) - 2
    q, _ = np.linalg.qr(rng.normal(size=(2, 40, 40)))
    matrix = jnp.asarray(q * eigenvalues[:, None] @ np.swapaxes(q, -1, -2), jnp.float32)
    low, high = extreme_eigenvalues(lambda v: (matrix @ v[..., None])[..., 0], (2, 40), 1, jnp.float32)
    assert (low >= -2 - 1e-5).all()
    assert (high <= 1 + 1e-5).all()
    np.testing.assert_allclose(low, -2, atol=0.03)
    np.testing.assert_allclose(high, 1, atol=0.03)
    np.testing.assert_array_equal(extreme_eigenvalues(jnp.zeros_like, (2, 40), 1, jnp.float32), 0)


def test_other_symmetric_operators_are_solved_iteratively():
    # Any pixel filter stands for Potts-type pairwise terms; this one has eigenvalues of both signs.
    K = jaxcrf.filters.Window(jaxcrf.position_features((4, 5), 1.0), 3)
    K = K + jaxcrf.filters.Diagonal(-K.diagonal())
    matrix = np.asarray(K(jnp.eye(20).reshape(4, 5, 20)), np.float64).reshape(20, 20)
    b = jnp.asarray(random(4, 5, 3))
    solve = jax.jit(
        lambda regularization: solve_iteratively(
            K, b, regularization, tolerance=jnp.float32(1e-6), max_iterations=100
        )
    )
    for regularization in (8.0, 3.0):  # definite, and not: 2 s_min is below -3
        full = np.kron(matrix, np.ones((3, 3)) - np.eye(3)) + regularization * np.eye(60)
        eigenvalues = np.linalg.eigvalsh(full)
        x, stats = solve(jnp.float32(regularization))
        assert bool(stats.definite) == bool(eigenvalues[0] > 0) == (regularization == 8.0)
        if eigenvalues[0] > 0:
            assert relative_error(x.ravel(), np.linalg.solve(full, np.asarray(b, np.float64).ravel())) < 1e-5
            np.testing.assert_allclose(stats.condition, eigenvalues[-1] / eigenvalues[0], rtol=0.01)


def test_types_are_promoted_together():
    e, b = random(3, 4, 2), random(3, 4, 3)
    with jax.enable_x64(True):
        options = {"kind": "potts", "regularization": 30.0}
        assert jaxcrf.gaussian_crf(e.astype(np.float64), b, **options).scores.dtype == np.float64
        assert jaxcrf.gaussian_crf(e, b.astype(np.float64), **options).scores.dtype == np.float64


def test_unknown_options_are_named():
    e, b = random(3, 4, 2), random(3, 4, 3)
    options = {"kind": "potts", "regularization": 30.0}
    for bad, message in (
        ({"solver": "lu"}, "solver: got 'lu'; expected one of auto, cg, direct"),
        ({"embedding_scaling": "unit"}, "embedding_scaling: got 'unit'"),
        ({"kind": "dense"}, "kind: got 'dense'"),
        ({"tolerance": -1.0}, "tolerance: got -1.0"),
        ({"max_iterations": -1}, "max_iterations: got -1"),
        ({"max_iterations": 2.5}, "max_iterations: got 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxcrf.gaussian_crf(e, b, **(options | bad))
    e[0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="embeddings: holds NaN or infinite"):
        jaxcrf.gaussian_crf(e, b, **options)


@pytest.mark.exhaustive
def test_it_runs_on_parts_of_a_batch():
    # One device is enough for the types to be checked.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    P = jax.sharding.PartitionSpec
    e, b = random(2, 3, 4, 3), random(2, 3, 4, 2, seed=1)
    for solver, kind, shared in (("cg", "general", random(3, 4, 2, 3)), ("direct", "potts", e[0])):

        def solve(e, b, kind=kind, solver=solver):
            return jaxcrf.gaussian_crf(e, b, kind=kind, regularization=30.0, solver=solver).scores

        def split(e, b, solve=solve):
            return jax.shard_map(solve, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(e, b)

        found, expected = (
            jax.jit(jax.value_and_grad(lambda e, f=f: jnp.sum(f(e, b) ** 2)))(shared) for f in (split, solve)
        )
        assert_close(found[0], expected[0], 1e-6)
        assert_close(found[1], expected[1], 1e-5)
