"""Checks that all metrics share."""

import operator
from typing import SupportsIndex

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcrf._checks import is_concrete


def integers(name: str, array: Array | np.ndarray) -> Array:
    """`array` as int32, whatever integers it holds."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: got dtype {array.dtype}; expected integer labels, e.g. probs.argmax(-1)")
    # One signed type, so that neither -1 nor 255 depends on how the labels were stored.
    return array.astype(jnp.int32)


def label_maps(
    labels: Array | np.ndarray, predictions: Array | np.ndarray, *, spatial: bool
) -> tuple[Array, Array]:
    """Truth and predictions as int32 of one shape, with two axes at least where `spatial`."""
    labels, predictions = integers("labels", labels), integers("predictions", predictions)
    if labels.shape != predictions.shape:
        raise ValueError(
            f"predictions: got shape {predictions.shape}, but labels have shape {labels.shape}; "
            "pass label maps of one size, e.g. probs.argmax(-1)"
        )
    if spatial and labels.ndim < 2:
        raise ValueError(f"labels: got shape {labels.shape}; expected [*batch, height, width]")
    return labels, predictions


def counted(labels: Array, num_labels: int, ignore_label: int | None) -> Array:
    """Where the truth is a label that counts."""
    inside = (labels >= 0) & (labels < num_labels)
    return inside if ignore_label is None else inside & (labels != ignore_label)


def placed(predictions: Array, num_labels: int) -> Array:
    """Where the prediction is a label at all."""
    return (predictions >= 0) & (predictions < num_labels)


def refuse_astray(astray: Array, predictions: Array, num_labels: int) -> None:
    """Raises if a concrete prediction is out of range where the truth counts."""
    if is_concrete(astray) and bool(astray.any()):
        values = np.unique(np.asarray(predictions)[np.asarray(astray)])
        raise ValueError(
            f"predictions: got the label {values[0]} where the truth counts; expected 0 to {num_labels - 1}. "
            "Pass a larger num_labels, or set the truth to ignore_label where nothing is predicted."
        )


def static_int(name: str, value: SupportsIndex, *, minimum: int) -> int:
    """`value` as an int of at least `minimum`."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{name}: got {value!r}; expected a Python int, which is static under jax.jit"
        ) from error
    if number < minimum:
        raise ValueError(f"{name}: got {number}; expected at least {minimum}")
    return number
