import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrf import _linalg


@pytest.fixture(scope="module", params=[(), (1,), (2, 3)], ids=str)
def matrices(request):
    factors = np.random.default_rng(0).normal(size=(*request.param, 5, 5)).astype(np.float32)
    return factors @ np.swapaxes(factors, -1, -2) + np.eye(5, dtype=np.float32)


def test_batches_are_those_of_numpy(matrices):
    lower = _linalg.cholesky(matrices)
    np.testing.assert_allclose(lower, np.linalg.cholesky(matrices), atol=1e-5)
    b = np.random.default_rng(1).normal(size=(*matrices.shape[:-1], 2)).astype(np.float32)
    np.testing.assert_allclose(
        _linalg.triangular_solve(lower, b, lower=True), np.linalg.solve(lower, b), atol=1e-4
    )
    np.testing.assert_allclose(_linalg.eigvalsh(matrices), np.linalg.eigvalsh(matrices), rtol=1e-4)
    packed, rows = _linalg.lu(matrices)
    low = np.tril(packed, -1) + np.eye(5)
    np.testing.assert_allclose(
        low @ np.triu(packed), np.take_along_axis(matrices, np.asarray(rows)[..., None], -2), atol=1e-4
    )


def test_no_batch_is_handed_to_lapack_whole():
    # Two such calls side by side can wait for each other for ever on two cores.
    def both(matrices):
        return _linalg.cholesky(matrices).sum() + _linalg.cholesky(2 * matrices).sum()

    text = jax.jit(jax.grad(both)).lower(jnp.stack([jnp.eye(5)] * 3)).as_text()
    calls = [line for line in text.splitlines() if "@lapack_" in line]
    assert calls
    assert not any("3x5x5" in line for line in calls)
