"""What every solver of a Gaussian CRF must pass. Its test class derives from `SolverSuite` and lists its cases."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SHAPE, LABELS = (3, 4), 3

# Relative to the largest number, what float32 leaves of systems with condition numbers up to a few hundred.
CLOSE = 1e-5


class System(NamedTuple):
    """One linear system.

    Attributes:
        parameters: what the pairwise terms are made of: embeddings, or the weights of edges.
        unary: the right-hand side.
        regularization: `λ`.
    """

    parameters: Any
    unary: np.ndarray
    regularization: Any


def assert_close(found, expected, tolerance=CLOSE):
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def relative_error(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


class SolverSuite:
    """Values, statistics, transforms, gradients and limits of one way of solving one kind of system.

    `CASES` gives the options of `solve`. A subclass also says what its systems are.
    """

    CASES: ClassVar[dict[str, dict[str, Any]]]

    def solve(self, case, system, **options):
        """The result, with `scores` and `stats`."""
        raise NotImplementedError

    def system(self, case, shape=SHAPE, labels=LABELS, batch=(), seed=0) -> System:
        """A definite system with a condition number of at most a hundred."""
        raise NotImplementedError

    def accuracy_systems(self, case) -> list[System]:
        """Definite systems of full size, with several `λ`."""
        raise NotImplementedError

    def near_singular_system(self, case) -> System:
        """A definite system with a condition number of more than a thousand."""
        raise NotImplementedError

    def matrix(self, case, system) -> np.ndarray:
        """The matrix of one system without batch, written out in float64."""
        raise NotImplementedError

    def exact(self, case, system):
        """The solution in float64."""
        b = np.asarray(system.unary, np.float64)
        return np.linalg.solve(self.matrix(case, system), b.ravel()).reshape(b.shape)

    def item(self, system, index):
        return jax.tree.map(lambda x: x[index], system._replace(regularization=None))._replace(
            regularization=system.regularization
        )

    def loss(self, case, weights):
        def value(parameters, unary, regularization):
            x = self.solve(case, System(parameters, unary, regularization)).scores
            return jnp.sum(weights * x + 0.1 * x**2)

        return value

    def test_scores_are_those_of_a_dense_float64_solve(self, case):
        for system in self.accuracy_systems(case):
            result = self.solve(case, system)
            assert relative_error(result.scores, self.exact(case, system)) <= CLOSE
            assert bool(result.stats.definite)

    def test_residuals_and_conditions_are_what_they_say(self, case):
        system = self.system(case)
        result = self.solve(case, system)
        matrix, b = self.matrix(case, system), system.unary.ravel().astype(np.float64)
        residual = np.linalg.norm(
            b - matrix @ np.asarray(result.scores, np.float64).ravel()
        ) / np.linalg.norm(b)
        assert bool(result.stats.converged)
        assert result.stats.residual <= 1e-6
        assert abs(float(result.stats.residual) - residual) <= 5e-7  # it was computed in float32
        condition = np.linalg.cond(matrix)
        assert condition / 2 <= result.stats.condition <= 1.01 * condition

    def test_near_singular_systems_say_so(self, case):
        system = self.near_singular_system(case)
        result = self.solve(case, system)
        condition = np.linalg.cond(self.matrix(case, system))
        assert bool(result.stats.definite)
        assert not bool(result.stats.converged)  # 1e-6 cannot be reached in float32
        assert result.stats.condition >= condition / 2
        assert relative_error(result.scores, self.exact(case, system)) <= 1e-7 * condition

    def test_it_compiles_once_for_all_numbers_of_a_shape_and_nan_shows(self, case):
        compiled = jax.jit(lambda system: self.solve(case, system))
        for seed in (0, 1):
            system = self.system(case, seed=seed)
            assert_close(compiled(system).scores, self.exact(case, system))
        bad = system.unary.copy()
        bad[0, 0, 0] = np.nan
        result = compiled(system._replace(unary=bad))
        assert not bool(result.stats.converged)
        assert np.isnan(result.stats.residual)
        assert np.isnan(result.scores).any()
        assert compiled._cache_size() == 1
        with pytest.raises(ValueError, match="unary: holds NaN"):  # eagerly it is looked for
            self.solve(case, system._replace(unary=bad))

    def test_a_batch_is_a_loop(self, case):
        system = self.system(case, batch=(2,))
        # Of very different sizes, so that numbers shared by them would show.
        system = system._replace(unary=system.unary * np.float32([1e-12, 1e6])[:, None, None, None])
        together = self.solve(case, system)
        for index in range(2):
            alone = self.solve(case, self.item(system, index))
            assert_close(together.scores[index], alone.scores, 1e-6)
            assert together.stats.iterations[index] == alone.stats.iterations
            assert together.stats.converged[index]

    def test_batches_broadcast(self, case):
        system = self.system(case)
        b = np.stack([system.unary, -2 * system.unary])
        found = self.solve(case, system._replace(unary=b))
        x = self.exact(case, system)
        assert_close(found.scores, np.stack([x, -2 * x]))
        assert found.stats.definite.shape == found.stats.condition.shape == (2,)

    def test_vmap_is_a_loop(self, case):
        system = self.system(case, batch=(2,))
        regularizations = system.regularization * np.float32([1, 2])
        found = jax.vmap(lambda p, u, r: self.solve(case, System(p, u, r)))(*system[:2], regularizations)
        for index, regularization in enumerate(regularizations):
            alone = self.item(system, index)._replace(regularization=regularization)
            assert_close(found.scores[index], self.exact(case, alone))
            expected = self.solve(case, alone).stats
            assert found.stats.iterations[index] == expected.iterations
            np.testing.assert_allclose(found.stats.condition[index], expected.condition, rtol=1e-3)

    def test_gradients_and_tangents_agree_with_finite_differences_in_float64(self, case):
        system = self.system(case)
        rng = np.random.default_rng(3)
        weights = rng.normal(size=system.unary.shape)
        in_float32 = jax.grad(self.loss(case, weights.astype(np.float32)), (0, 1, 2))(*system)
        with jax.enable_x64(True):
            operands = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tuple(system))
            along = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=jnp.shape(x))), operands)
            exact = self.loss(case, weights)

            @jax.jit
            def everything(operands):
                moved = [
                    exact(*jax.tree.map(lambda x, d, s=s: x + s * d, operands, along)) for s in (1e-5, -1e-5)
                ]
                _, tangent = jax.jvp(exact, operands, along)
                return (moved[0] - moved[1]) / 2e-5, tangent, jax.grad(exact, (0, 1, 2))(*operands)

            expected, tangent, gradient = everything(operands)
            reverse = sum(
                jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(along), strict=True)
            )
            # "cg" stops at a residual of 1e-6.
            np.testing.assert_allclose([tangent, reverse], expected, rtol=1e-4, atol=1e-5)
        for found, wanted in zip(jax.tree.leaves(in_float32), jax.tree.leaves(gradient), strict=True):
            assert_close(found, wanted, 1e-4)

    def test_second_derivatives_agree_with_finite_differences_in_float64(self, case):
        system = self.system(case, shape=(2, 2), labels=2)
        rng = np.random.default_rng(4)
        with jax.enable_x64(True):
            operands = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tuple(system))
            along = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=jnp.shape(x))), operands)
            gradient = jax.grad(self.loss(case, rng.normal(size=system.unary.shape)), (0, 1, 2))

            @jax.jit
            def everything(operands):
                _, tangent = jax.jvp(gradient, operands, along)
                moved = [
                    gradient(*jax.tree.map(lambda x, d, s=s: x + s * d, operands, along))
                    for s in (1e-4, -1e-4)
                ]
                return tangent, *moved

            found, plus, minus = everything(operands)
            for f, p, m in zip(*map(jax.tree.leaves, (found, plus, minus)), strict=True):
                np.testing.assert_allclose(f, (p - m) / 2e-4, rtol=0, atol=2e-2 * float(np.abs(f).max()))

    @pytest.mark.parametrize(("shape", "labels"), [((1, 1), 3), ((3, 2), 1)], ids=str)
    def test_small_and_odd_shapes(self, case, shape, labels):
        system = self.system(case, shape=shape, labels=labels)
        result = self.solve(case, system)
        assert_close(result.scores, self.exact(case, system))
        assert bool(result.stats.definite)

    def test_nothing_to_explain_is_zero(self, case):
        system = self.system(case)
        result = self.solve(case, system._replace(unary=np.zeros_like(system.unary)))
        np.testing.assert_array_equal(result.scores, 0)
        assert bool(result.stats.converged)
        assert float(result.stats.residual) == 0

    def test_no_pairwise_terms_divide_by_lambda(self, case):
        system = self.system(case)
        zero = jax.tree.map(np.zeros_like, system.parameters)
        result = self.solve(case, system._replace(parameters=zero))
        assert_close(result.scores, system.unary / system.regularization, 1e-6)
        assert bool(result.stats.converged)
        np.testing.assert_allclose(result.stats.condition, 1, rtol=1e-6)

    def test_bfloat16_is_storage(self, case):
        system = self.system(case)
        narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), system.parameters)
        result = self.solve(case, system._replace(parameters=narrow))
        wide = jax.tree.map(lambda x: np.asarray(x, np.float32), narrow)
        assert result.scores.dtype == jnp.float32
        assert_close(result.scores, self.exact(case, system._replace(parameters=wide)))

    @pytest.mark.parametrize("regularization", [0.0, -1.0, float("nan"), float("inf"), [1.0, 2.0]])
    def test_bad_regularizations_are_named(self, case, regularization):
        with pytest.raises(ValueError, match="regularization: got"):
            self.solve(case, self.system(case)._replace(regularization=regularization))

    def test_a_unary_of_another_shape_is_refused(self, case):
        system = self.system(case)
        with pytest.raises(ValueError, match="unary: got shape"):
            self.solve(case, system._replace(unary=system.unary[1:]))
        with pytest.raises(ValueError, match="floating point"):
            self.solve(case, system._replace(unary=np.zeros(system.unary.shape, np.int32)))
        parameters = jax.tree.map(lambda p: np.stack([p, p]), system.parameters)
        mismatched = System(parameters, np.stack([system.unary] * 3), system.regularization)
        with pytest.raises(ValueError, match="batch axes"):
            self.solve(case, mismatched)
