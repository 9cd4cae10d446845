import numpy as np
import pytest

from jaxcrf.compatibility import as_compatibility, as_matrix, penalty, reward

MATRIX = np.array([[0, 1, 2], [0.5, 0, 1], [3, 1, 0.2]], np.float32)


@pytest.mark.parametrize(
    "compatibility", [2.0, np.array([1.0, 2.0, 0.5], np.float32), MATRIX], ids=["w", "v", "matrix"]
)
def test_every_form_is_its_matrix(compatibility):
    message = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    array, matrix = as_compatibility(compatibility, 3), np.asarray(as_matrix(compatibility, 3))
    expected = message.astype(np.float64) @ matrix.T
    np.testing.assert_allclose(penalty(message, array), expected, rtol=1e-5, atol=1e-6)
    # The reward differs from minus the penalty by one number per pixel.
    difference = np.asarray(reward(message, array)) + expected
    np.testing.assert_allclose(difference - difference[:, :1], 0, atol=2e-5)


def test_potts_and_diagonal_written_out():
    np.testing.assert_array_equal(as_matrix(2.0, 2), [[0, 2], [2, 0]])
    np.testing.assert_array_equal(as_matrix(np.array([1.0, 2.0]), 2), [[-1, 0], [0, -2]])


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 2), (1, 3, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="compatibility: got shape"):
        as_compatibility(np.ones(shape), 3)
