"""What every filter must pass. A filter's test class derives from `FilterSuite` and lists its cases."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxcrf.filters import Filter

# Float32 sums over at most a few hundred pairs: their rounding errors stay below this share of the sum of
# the absolute values.
EPSILON = 200 * float(np.finfo(np.float32).eps)


# Properties are inherited: one method runs for several classes, none of which it depends on.
PROPERTY = settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.differing_executors])


def random_maps(
    K: Filter, labels: int = 3, seed: int = 0, batch: tuple[int, ...] | None = None
) -> np.ndarray:
    shape = (*(K.batch if batch is None else batch), *K.spatial, labels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense_matrix(K: Filter) -> np.ndarray:
    """The filter written out, `[*batch, pixels, pixels]`."""
    pixels = int(np.prod(K.spatial))
    identity = jnp.eye(pixels).reshape(*K.spatial, pixels)
    return np.asarray(K(identity)).reshape(*K.batch, pixels, pixels)


def assert_close(got, expected, magnitude=None):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    scale = np.abs(expected).max() if magnitude is None else magnitude
    np.testing.assert_allclose(got, expected, rtol=0, atol=EPSILON * max(float(scale), 1e-30))


class FilterSuite:
    """Linearity, transpose, diagonal, normalisation, transforms and gradients of one family of filters."""

    CASES: ClassVar[dict[str, Callable[[], Filter]]]
    FURTHER_CASES: ClassVar[tuple[str, ...]] = ()  # those that the core suite leaves out

    def parameters(self, case):
        """What gradients are taken in, and the filter as a function of it; by default all of its leaves."""
        return self.CASES[case](), lambda K: K

    @pytest.fixture
    def K(self, case):
        return self.CASES[case]()

    @PROPERTY
    @given(a=st.floats(-3, 3), b=st.floats(-3, 3), seed=st.integers(0, 2**16))
    def test_it_is_linear(self, case, a, b, seed):
        K = self.CASES[case]()
        p, q = random_maps(K, seed=seed), random_maps(K, seed=seed + 1)
        magnitude = np.abs(a * np.asarray(K(np.abs(p)))).max() + np.abs(b * np.asarray(K(np.abs(q)))).max()
        assert_close(K(a * p + b * q), a * np.asarray(K(p)) + b * np.asarray(K(q)), magnitude)

    @PROPERTY
    @given(seed=st.integers(0, 2**16))
    def test_its_transpose_is_exact(self, case, seed):
        K = self.CASES[case]()
        p, q = random_maps(K, seed=seed), random_maps(K, seed=seed + 1)
        left = np.sum(p.astype(np.float64) * np.asarray(K(q)))
        right = np.sum(np.asarray(K.T(p), np.float64) * q)
        magnitude = np.sum(np.abs(p) * np.asarray(K(np.abs(q))))
        assert abs(left - right) <= EPSILON * magnitude

    def test_transposing_twice_gives_it_back(self, K):
        q = random_maps(K)
        np.testing.assert_array_equal(K.T.T(q), K(q))

    def test_its_diagonal_is_that_of_its_matrix(self, K):
        matrix = dense_matrix(K)
        expected = np.diagonal(matrix, axis1=-2, axis2=-1).reshape(*K.batch, *K.spatial)
        assert_close(K.diagonal(), expected)
        assert_close(K.T.diagonal(), expected)

    def test_it_is_symmetric_where_it_says_so(self, K):
        matrix = dense_matrix(K)
        if K.is_symmetric:
            assert_close(matrix, np.swapaxes(matrix, -1, -2))

    def test_labels_are_treated_alike(self, K):
        q = random_maps(K)
        order = np.array([2, 0, 1])
        assert_close(np.asarray(K(q))[..., order], K(q[..., order]))

    def test_a_batch_is_a_loop(self, K):
        q = random_maps(K, batch=(2, *K.batch))
        together = K(q)
        for item in range(2):
            assert_close(together[item], K(q[item]))

    def test_vmap_is_a_loop(self, K):
        q = random_maps(K, batch=(2, *K.batch))
        assert_close(jax.vmap(K)(q), K(q))

    def test_it_passes_through_jit_without_recompiling(self, case):
        compiled = jax.jit(lambda K, q: K(q))
        K = self.CASES[case]()
        first = compiled(K, random_maps(K, seed=0))
        assert_close(first, K(random_maps(K, seed=0)))
        compiled(self.CASES[case](), random_maps(K, seed=1))
        assert compiled._cache_size() == 1

    def test_it_is_a_pytree_that_accepts_any_leaves(self, K):
        leaves, structure = jax.tree.flatten(K)
        assert jax.tree.structure(jax.tree.unflatten(structure, [object()] * len(leaves))) == structure
        with pytest.raises(AttributeError, match="immutable"):
            K.blur = 3

    @pytest.mark.parametrize("kind", ["before", "after", "symmetric"])
    def test_normalisation_scales_by_row_sums(self, K, kind):
        # Scaling all values of a kernel leaves a normalised one as it was, and "after" makes rows sum to one.
        normalised = K.normalized(kind)
        ones = np.ones((*K.batch, *K.spatial, 1), np.float32)
        if kind == "after":
            total = np.asarray(normalised(ones))
            assert_close(total, np.full_like(total, total.flat[0]))
        twice = normalised.normalized(kind)
        assert_close(twice(ones), normalised(ones))
        # "none" takes any of them off again.
        assert_close(normalised.normalized("none")(ones), K.normalized("none")(ones))

    def test_unknown_normalisations_are_refused(self, K):
        with pytest.raises(ValueError, match="normalization: got 'sideways'"):
            K.normalized("sideways")

    def test_the_gradient_of_the_maps_is_the_transpose(self, K):
        q, g = random_maps(K, seed=0), random_maps(K, seed=1)
        (found,) = jax.vjp(K, q)[1](g)
        assert_close(found, K.T(g), np.abs(np.asarray(K.T(np.abs(g)))).max())

    def test_gradients_agree_with_finite_differences_in_float64(self, case, K):
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            parameters, build = self.parameters(case)
            leaves = jax.tree.map(
                lambda x: jnp.asarray(np.asarray(x), jnp.float64), (parameters, random_maps(K))
            )
            direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), leaves)
            g = jnp.asarray(random_maps(K, seed=2), jnp.float64)

            @jax.jit  # the many small programs of eager mode take longer to compile than this one
            def value(step):
                parameters, q = jax.tree.map(lambda x, d: x + step * d, leaves, direction)
                return jnp.sum(g * build(parameters)(q))

            @jax.jit
            def gradients(leaves):
                return jax.grad(lambda p, q: jnp.sum(g * build(p)(q)), argnums=(0, 1))(*leaves)

            step = 1e-5  # truncation step² ~ 1e-10 and cancellation eps / step ~ 1e-11 of the value
            expected = (value(step) - value(-step)) / (2 * step)
            # Reverse mode by hand, since a custom VJP has no forward mode.
            gradient = gradients(leaves)
            found = sum(
                jnp.vdot(a, b)
                for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
            )
            scale = sum(
                jnp.vdot(jnp.abs(a), jnp.abs(b))
                for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
            )
            assert abs(found - expected) <= 1e-7 * scale

    def test_sums_of_filters_add_their_messages(self, K):
        q = random_maps(K)
        assert_close((K + K)(q), 2 * np.asarray(K(q)))
        assert_close((K + K.T)(q), np.asarray(K(q)) + np.asarray(K.T(q)))

    def test_bfloat16_maps_are_accepted(self, K):
        q = random_maps(K)
        found = K(jnp.asarray(q, jnp.bfloat16))
        assert found.dtype == jnp.bfloat16
        exact = np.asarray(K(np.asarray(jnp.asarray(q, jnp.bfloat16), np.float32)))
        # One rounding of the result, eight bits, where the grid is not changed; pooling rounds thrice more.
        np.testing.assert_allclose(
            np.asarray(found, np.float32), exact, rtol=0, atol=2**-6 * np.abs(exact).max()
        )

    def test_maps_of_another_size_are_refused(self, K):
        wrong = np.zeros((*(n + 1 for n in K.spatial), 2), np.float32)
        with pytest.raises(ValueError, match="q: got shape"):
            K(wrong)

    def test_integer_maps_are_refused(self, K):
        with pytest.raises(ValueError, match="floating point"):
            K(np.zeros((*K.spatial, 2), np.int32))
