r"""Label compatibilities `μ(l, l')`: the penalty for two related pixels taking labels `l` and `l'`.

Three forms are accepted wherever a compatibility is: a scalar `w` is Potts, `μ = w (1 - I)`; a vector `v`
rewards each label for agreeing with itself, `μ = -diag(v)`; a matrix is `μ` itself, rows the receiving
label. Weights greater than zero smooth.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jaxcrf import _checks


def as_compatibility(compatibility: Any, num_labels: int) -> Array:
    """Checks a compatibility and makes it an array: scalar, `[labels]` or `[labels, labels]`.

    Args:
        compatibility: a number, a vector or a matrix.
        num_labels: the labels that it must fit.

    Returns:
        The compatibility as a floating-point array.

    Raises:
        ValueError: if it has another shape.

    Example:
        >>> as_compatibility(3, num_labels=21).shape
        ()
    """
    if not isinstance(compatibility, (int, float)) and not hasattr(compatibility, "dtype"):
        try:
            compatibility = np.asarray(compatibility, np.float32)
        except (TypeError, ValueError):
            raise TypeError(
                f"compatibility: got {type(compatibility).__name__}; expected a scalar, a vector or a matrix of "
                "numbers. Several filters go into a list, [K1, (K2, w)]."
            ) from None
    array = _checks.as_float(compatibility)
    if array.shape not in ((), (num_labels,), (num_labels, num_labels)):
        raise ValueError(
            f"compatibility: got shape {array.shape}; expected a scalar (Potts), ({num_labels},) for the "
            f"diagonal or ({num_labels}, {num_labels}) for a full penalty matrix"
        )
    return array


def as_matrix(compatibility: Any, num_labels: int) -> Float[Array, "labels labels"]:
    """Writes any compatibility as its penalty matrix.

    Args:
        compatibility: scalar, vector or matrix.
        num_labels: `L`.

    Returns:
        `μ`, `[L, L]`.

    Raises:
        ValueError: if the compatibility has another shape.

    Example:
        >>> as_matrix(2.0, 2)
        Array([[0., 2.],
               [2., 0.]], dtype=float32)
    """
    array = as_compatibility(compatibility, num_labels)
    if array.ndim == 0:
        return array * (1 - jnp.eye(num_labels, dtype=array.dtype))
    return -jnp.diag(array) if array.ndim == 1 else array


def penalty(message: Array, compatibility: Array) -> Array:
    """The expected penalty `Σ_l' μ(l, l') m(l')` of every label, `[..., labels]`."""
    if compatibility.ndim == 0:
        return compatibility * (message.sum(-1, keepdims=True) - message)
    if compatibility.ndim == 1:
        return -compatibility * message
    # Full float32: the default precision of accelerators keeps 8 to 11 bits.
    return jnp.matmul(message, compatibility.T, precision=lax.Precision.HIGHEST)


def reward(message: Array, compatibility: Array) -> Array:
    """Minus the penalty, up to a constant per pixel, which no soft-max sees.

    For Potts the constant is `w Σ m`, so that the update is the familiar `+ w m`.
    """
    if compatibility.ndim < 2:
        return compatibility * message
    return -penalty(message, compatibility)
