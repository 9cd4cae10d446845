"""What every operator that mixes labels must pass. Its test class derives from `PixelLabelSuite`."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import assert_close
from jaxcrf.filters import Filter, PixelLabelOperator


class PixelLabelSuite:
    """The matrix, transforms, gradients and limits of one family of operators."""

    CASES: ClassVar[dict[str, Callable[[], PixelLabelOperator]]]
    PARAMETER: ClassVar[str]  # the field that gradients are taken in

    @pytest.fixture
    def K(self, case):
        return self.CASES[case]()

    def maps(self, K, seed=1, batch=None):
        shape = (*(K.batch if batch is None else batch), *K.spatial, K.num_labels)
        return np.random.default_rng(seed).normal(size=shape).astype(np.float32)

    def matrix(self, K):
        """The operator written out in float64, `[*batch, n, n]`."""
        raise NotImplementedError

    def test_it_is_its_matrix(self, K):
        q, matrix = self.maps(K), self.matrix(K)
        flat = q.reshape(*K.batch, -1, 1)
        assert_close(K(q), (matrix @ flat).reshape(q.shape), (np.abs(matrix) @ np.abs(flat)).max())
        diagonal = np.diagonal(matrix, axis1=-2, axis2=-1).reshape(q.shape)
        assert_close(K.diagonal(), diagonal, np.abs(matrix).max())
        p = self.maps(K, seed=2)
        assert_close(np.vdot(p, K(q)), np.vdot(K.T(p), q), np.vdot(np.abs(p), np.abs(np.asarray(K(q)))))
        assert K.is_symmetric
        assert isinstance(K, PixelLabelOperator)
        assert not isinstance(K, Filter)

    def test_transforms(self, case, K):
        q = self.maps(K, batch=(2, *K.batch))
        together = K(q)
        assert_close(jax.vmap(K)(q), together)
        for item in range(2):
            assert_close(together[item], K(q[item]))
        compiled = jax.jit(lambda K, q: K(q))
        compiled(K, q)
        assert_close(compiled(self.CASES[case](), q), together)
        assert compiled._cache_size() == 1
        assert K(jnp.asarray(q, jnp.bfloat16)).dtype == jnp.bfloat16

    def test_gradients_agree_with_finite_differences_in_float64(self, K):
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            e, q, g = (
                jnp.asarray(x, jnp.float64)
                for x in (getattr(K, self.PARAMETER), self.maps(K), self.maps(K, seed=3))
            )

            @jax.jit
            def value(e, q):
                return jnp.sum(g * K.replace(**{self.PARAMETER: e})(q))

            along = [jnp.asarray(rng.normal(size=x.shape)) for x in (e, q)]
            step = 1e-5
            expected = (
                value(e + step * along[0], q + step * along[1])
                - value(e - step * along[0], q - step * along[1])
            ) / (2 * step)
            _, found = jax.jvp(value, (e, q), tuple(along))
            reverse = sum(jnp.vdot(a, b) for a, b in zip(jax.grad(value, (0, 1))(e, q), along, strict=True))
            np.testing.assert_allclose([found, reverse], expected, rtol=1e-6, atol=1e-6)

    def test_maps_of_another_shape_are_refused(self, K):
        with pytest.raises(ValueError, match="q: got shape"):
            K(np.zeros((*K.spatial, K.num_labels + 1), np.float32))
        with pytest.raises(ValueError, match="floating point"):
            K(np.zeros((*K.spatial, K.num_labels), np.int32))

    def test_mean_field_refuses_it(self, K):
        for pairwise in (K, [(K, 1.0)]):
            with pytest.raises(TypeError, match=f"pairwise: got {type(K).__name__}, which mixes labels"):
                jaxcrf.mean_field(self.maps(K), pairwise)
