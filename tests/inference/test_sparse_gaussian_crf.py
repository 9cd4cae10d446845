"""Gaussian CRFs on the edges of a grid."""

import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
import oracles
from jaxcrf.inference.sparse_gaussian_crf import DIRECT_BLOCK, block_size
from solver_suite import LABELS, SHAPE, SolverSuite, System, assert_close, relative_error


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_edges(kind, spatial, connectivity, labels, seed=0, batch=()):
    tail = (labels, labels) if kind == "general" else ()
    return random(*batch, *spatial, connectivity // 2, *tail, seed=seed)


def pairwise(kind, edges, labels):
    """`K`, written out."""
    matrix = oracles.grid_matrix(edges)
    if kind == "general":
        return matrix
    together = np.ones((labels, labels))
    return np.kron(matrix, (together / labels if kind == "centered" else together) - np.eye(labels))


def dense(kind, edges, labels, regularization):
    matrix = pairwise(kind, edges, labels)
    return matrix + regularization * np.eye(len(matrix))


def needed(kind, edges, labels):
    """The smallest `λ` of a definite system."""
    return max(1e-3, -np.linalg.eigvalsh(pairwise(kind, edges, labels))[0])


def options_of(kind):
    return {"kind": "potts", "centered": True} if kind == "centered" else {"kind": kind}


class TestSparseGaussianCRF(SolverSuite):
    FURTHER_CASES: ClassVar = ("cg, potts, 4", "cg, general, 12", "direct, potts, 12", "cg, centered, 8")
    CASES: ClassVar = {
        f"{solver}, {kind}, {connectivity}": {"solver": solver, "kind": kind, "connectivity": connectivity}
        for solver, kind, connectivity in (
            ("cg", "potts", 4),
            ("direct", "potts", 8),
            ("cg", "general", 12),
            ("direct", "general", 4),
            ("direct", "potts", 12),
            ("direct", "centered", 4),
            ("cg", "centered", 8),
        )
    }

    def solve(self, case, system, **options):
        return jaxcrf.sparse_gaussian_crf(
            system.parameters,
            system.unary,
            regularization=system.regularization,
            **(self.CASES[case] | options_of(self.CASES[case]["kind"]) | options),
        )

    def arguments(self, case):
        return self.CASES[case]["kind"], self.CASES[case]["connectivity"]

    def system(self, case, shape=SHAPE, labels=LABELS, batch=(), seed=0):
        kind, connectivity = self.arguments(case)
        edges = random_edges(kind, shape, connectivity, labels, seed, batch)
        least = max(needed(kind, e, labels) for e in (edges if batch else [edges]))
        return System(edges, random(*batch, *shape, labels, seed=seed + 10), float(np.float32(1.3 * least)))

    def accuracy_systems(self, case):
        kind, connectivity = self.arguments(case)
        edges, b = random_edges(kind, (11, 11), connectivity, 5), random(11, 11, 5, seed=1)
        least = needed(kind, edges, 5)
        return [System(edges, b, float(np.float32(share * least))) for share in (1.01, 1.5, 10.0)]

    def near_singular_system(self, case):
        system = self.accuracy_systems(case)[0]
        kind, _ = self.arguments(case)
        # Elimination with a step of refinement reaches 1e-6 long after conjugate gradients have given up.
        share = 1.0005 if self.CASES[case]["solver"] == "cg" else 1.00003
        return system._replace(regularization=float(np.float32(share * needed(kind, system.parameters, 5))))

    def matrix(self, case, system):
        kind, _ = self.arguments(case)
        return dense(kind, system.parameters, system.unary.shape[-1], system.regularization)


every_kind = pytest.mark.parametrize("kind", ["general", "potts"])


@pytest.mark.parametrize(
    ("kind", "connectivity", "spatial"),
    [
        pytest.param("potts", 4, (5, 8), marks=pytest.mark.exhaustive),
        ("potts", 8, (8, 5)),
        pytest.param("potts", 12, (5, 8), marks=pytest.mark.exhaustive),
        ("potts", 12, (1, 6)),
        ("centered", 8, (5, 8)),
        ("general", 4, (7, 1)),
        pytest.param("general", 8, (5, 8), marks=pytest.mark.exhaustive),
        ("general", 12, (8, 5)),
    ],
    ids=str,
)
def test_the_direct_solver_orders_pixels_of_any_shape(kind, connectivity, spatial):
    edges, b = random_edges(kind, spatial, connectivity, 3), random(*spatial, 3, seed=1)
    least = needed(kind, edges, 3)
    options = {"connectivity": connectivity, "variances": True, **options_of(kind)}

    @jax.jit
    def solve(regularization):
        return jaxcrf.sparse_gaussian_crf(edges, b, regularization=regularization, **options)

    # Definite; and not, where the linear system still has a solution but no Gaussian has it as its mean.
    for share in (1.1, 0.47):
        matrix = dense(kind, edges, 3, share * least)
        exact = np.linalg.solve(matrix, b.ravel().astype(np.float64)).reshape(b.shape)
        result = solve(share * least)
        assert relative_error(result.scores, exact) <= 1e-6 * np.linalg.cond(matrix)
        assert bool(result.stats.definite) == (share > 1)
        if share > 1:
            assert_close(result.variances.ravel(), np.diag(np.linalg.inv(matrix)), 1e-5)
        else:
            assert np.isinf(result.stats.condition)
            assert np.isnan(result.variances).all()


@every_kind
def test_indefinite_systems_are_reported_by_cg(kind):
    edges, b = random_edges(kind, (6, 7), 8, 3), random(6, 7, 3, seed=1)
    for share in (0.1, 0.9):
        options = {"kind": kind, "connectivity": 8, "regularization": share * needed(kind, edges, 3)}
        stats = jaxcrf.sparse_gaussian_crf(edges, b, solver="cg", **options).stats
        assert not bool(stats.definite)
        assert not bool(stats.converged)


@pytest.mark.parametrize(
    ("kind", "connectivity"),
    [
        ("potts", 8),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("general", 12), ("centered", 4))),
    ],
)
def test_dominated_edges_are_always_definite(kind, connectivity):
    b = random(5, 6, 3, seed=1)
    options = {"connectivity": connectivity, "regularization": 0.5, **options_of(kind)}

    @jax.jit
    def solve(edges):
        return jaxcrf.sparse_gaussian_crf(
            edges, b, edge_scaling="diagonally-dominant", solver="direct", **options
        )

    gradient = jax.jit(jax.grad(lambda edges: jnp.sum(solve(edges).scores ** 2)))
    for stretch in (1e3, 1.0, 0.0):
        edges = stretch * random_edges(kind, (5, 6), connectivity, 3)
        stats = solve(edges).stats
        assert bool(stats.definite)
        assert stats.condition <= 1.95 / 0.05 + 1e-3
        assert np.isfinite(gradient(edges)).all()
    # Whoever has little to do with strong edges keeps its own.
    edges = 1e-3 * np.abs(random_edges(kind, (5, 6), connectivity, 3))
    strong = edges.copy()
    strong[0, 0, 0] *= 1e6
    found = solve(strong).scores
    unscaled = jaxcrf.sparse_gaussian_crf(edges, b, **options).scores
    np.testing.assert_allclose(found[-1, -1], unscaled[-1, -1], rtol=1e-3)
    assert_close(solve(edges).scores, unscaled, 1e-6)


@pytest.mark.exhaustive
def test_centered_terms_have_the_probabilities_of_potts_terms():
    edges, b = random_edges("potts", (5, 6), 8, 4), random(5, 6, 4, seed=1)
    options = {"kind": "potts", "connectivity": 8, "regularization": 1.2 * needed("potts", edges, 4)}
    plain, centered = (
        jaxcrf.sparse_gaussian_crf(edges, b, centered=c, **options).scores for c in (False, True)
    )
    assert np.abs(np.asarray(plain - centered)).max() > 0.01
    np.testing.assert_allclose(jax.nn.softmax(plain), jax.nn.softmax(centered), atol=1e-5)
    # And of many labels they may be as strong as of two.
    strong = np.full((5, 6, 4), 0.1, np.float32)
    for labels in (2, 30):
        u = random(5, 6, labels, seed=2)
        options = {"kind": "potts", "connectivity": 8, "regularization": 1.0}
        assert bool(jaxcrf.sparse_gaussian_crf(strong, u, centered=True, **options).stats.definite)
    assert not bool(jaxcrf.sparse_gaussian_crf(strong, u, **options).stats.definite)


@every_kind
def test_variances_are_differentiable(kind):
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        edges = jnp.asarray(random_edges(kind, (3, 4), 8, 3), jnp.float64)
        weights, b = rng.normal(size=(3, 4, 3)), jnp.ones((3, 4, 3))
        operands = (edges, jnp.float64(1.3 * needed(kind, edges, 3)))
        along = tuple(jnp.asarray(rng.normal(size=np.shape(x))) for x in operands)

        @jax.jit
        def value(edges, regularization):
            result = jaxcrf.sparse_gaussian_crf(
                edges, b, kind=kind, connectivity=8, regularization=regularization, variances=True
            )
            return jnp.sum(weights * result.variances)

        gradient = jax.grad(value, (0, 1))(*operands)
        plus, minus = (
            value(*(x + s * d for x, d in zip(operands, along, strict=True))) for s in (1e-5, -1e-5)
        )
        found = sum(jnp.vdot(g, d) for g, d in zip(gradient, along, strict=True))
        np.testing.assert_allclose(found, (plus - minus) / 2e-5, rtol=1e-6)


def test_the_backward_pass_reuses_the_factorisation():
    def value(edges):
        unary = jnp.ones((4, 5, 2))
        return jaxcrf.sparse_gaussian_crf(
            edges, unary, kind="potts", regularization=99.0, solver="direct"
        ).scores.sum()

    edges = random_edges("potts", (4, 5), 4, 2)
    counts = [
        len(re.findall(r"= cholesky\b", str(jax.make_jaxpr(f)(edges)))) for f in (value, jax.grad(value))
    ]
    assert counts == [2, 2]  # of the mean and of the deviations


@pytest.mark.optimized
def test_memory_of_cg_is_that_of_the_edges():
    edges, b = jnp.zeros((40, 45, 2, 5, 5)), jnp.zeros((40, 45, 5))  # 9000 × 9000 would be 324 MB

    def value(edges, b):
        return jaxcrf.sparse_gaussian_crf(
            edges, b, kind="general", regularization=1.0, solver="cg"
        ).scores.sum()

    compiled = jax.jit(jax.value_and_grad(value, (0, 1))).lower(edges, b).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * edges.nbytes + 30 * b.nbytes


@pytest.mark.exhaustive
def test_dense_then_sparse_is_two_solves():
    e, edges, b = random(4, 5, 2), 0.1 * random_edges("potts", (4, 5), 8, 3), random(4, 5, 3, seed=1)
    strongest = np.linalg.norm(e.reshape(-1, 2).astype(np.float64), 2) ** 2
    first = np.kron(e.reshape(-1, 2) @ e.reshape(-1, 2).T.astype(np.float64), np.ones((3, 3)) - np.eye(3))
    first = first + 2 * strongest * np.eye(60)
    exact = np.linalg.solve(
        dense("potts", edges, 3, 2.0), np.linalg.solve(first, b.ravel().astype(np.float64))
    )

    @jax.jit
    def stacked(e, edges):
        scores = jaxcrf.gaussian_crf(e, b, kind="potts", regularization=2 * strongest).scores
        return jaxcrf.sparse_gaussian_crf(
            edges, scores, kind="potts", connectivity=8, regularization=2.0
        ).scores

    assert relative_error(stacked(e, edges).ravel(), exact) <= 1e-5
    gradients = jax.grad(lambda *operands: jnp.sum(stacked(*operands) ** 2), (0, 1))(e, edges)
    assert all(np.abs(g).max() > 0 for g in gradients)


def test_iterations_that_do_not_suffice_are_reported():
    edges, b = random_edges("potts", (11, 11), 4, 5), random(11, 11, 5, seed=1)
    options = {"kind": "potts", "regularization": 1.01 * needed("potts", edges, 5), "solver": "cg"}
    stats = jaxcrf.sparse_gaussian_crf(edges, b, max_iterations=3, **options).stats
    assert (int(stats.iterations), bool(stats.converged)) == (3, False)
    stats = jaxcrf.sparse_gaussian_crf(edges, b, tolerance=0.0, **options).stats
    assert not bool(stats.converged)  # float32 cannot
    assert 0 < stats.residual < 1e-4


def test_auto_chooses_by_the_size_of_blocks():
    def grid(kind, spatial, connectivity, labels=3):
        return jaxcrf.filters.Grid(
            random_edges(kind, spatial, connectivity, labels), connectivity=connectivity, kind=kind
        )

    assert block_size(grid("potts", (6, 5), 4)) == block_size(grid("potts", (5, 6), 8)) == 5
    assert block_size(grid("potts", (6, 5), 12)) == 10
    assert block_size(grid("general", (6, 5), 12, labels=4)) == 40
    for width, solver in ((DIRECT_BLOCK, "direct"), (DIRECT_BLOCK + 1, "cg")):
        edges, b = 0.1 * random_edges("potts", (width, width), 4, 2), random(width, width, 2)
        options = {"kind": "potts", "regularization": 2.0}
        stats = jaxcrf.sparse_gaussian_crf(edges, b, **options).stats
        assert (int(stats.iterations) == 0) == (solver == "direct")


def test_unknown_options_are_named():
    edges, b = random_edges("potts", (3, 4), 4, 3), random(3, 4, 3)
    options = {"kind": "potts", "regularization": 30.0}
    for bad, message in (
        ({"solver": "lu"}, "solver: got 'lu'; expected one of auto, cg, direct"),
        (
            {"edge_scaling": "dominant"},
            "edge_scaling: got 'dominant'; expected 'diagonally-dominant' or None",
        ),
        ({"kind": "dense"}, "kind: got 'dense'"),
        ({"connectivity": 5}, "connectivity: got 5"),
        ({"connectivity": 8}, "edges: got shape"),
        ({"tolerance": -1.0}, "tolerance: got -1.0"),
        ({"max_iterations": -1}, "max_iterations: got -1"),
        ({"centered": True, "kind": "general"}, "centered: kind='general'"),
        ({"variances": True, "solver": "cg"}, "variances: solver='cg' cannot give them"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxcrf.sparse_gaussian_crf(edges, b, **(options | bad))
    edges[0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="edges: holds NaN or infinite"):
        jaxcrf.sparse_gaussian_crf(edges, b, **options)


@pytest.mark.exhaustive
def test_it_runs_on_parts_of_a_batch():
    # One device is enough for the types to be checked.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    P = jax.sharding.PartitionSpec
    edges, b = random_edges("potts", (3, 4), 4, 2), random(2, 3, 4, 2, seed=1)
    for solver in ("cg", "direct"):

        def solve(edges, b, solver=solver):
            return jaxcrf.sparse_gaussian_crf(
                edges, b, kind="potts", regularization=9.0, solver=solver
            ).scores

        def split(edges, b, solve=solve):
            return jax.shard_map(solve, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(edges, b)

        found, expected = (
            jax.jit(jax.value_and_grad(lambda e, f=f: jnp.sum(f(e, b) ** 2)))(edges) for f in (split, solve)
        )
        assert_close(found[0], expected[0], 1e-6)
        assert_close(found[1], expected[1], 1e-5)
