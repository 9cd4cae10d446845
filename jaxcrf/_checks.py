"""Argument checks, in two tiers.

Shapes, types and Python scalars are checked everywhere, at trace time. Values (NaN, negative
probabilities, labels out of range) can only be looked at on concrete arrays: each `check_*` below does so
in one fused reduction and passes silently over tracers, where NaN propagates instead.

Dimension legend of the whole package: `*batch` any number of leading batch axes; `*spatial` the spatial
axes (`height width`, or `depth height width`); `labels` the labels of a pixel; `d` the feature dimensions
of a kernel; `kernels` the kernels that one filter merges; `channels` the channels of an image.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

# How far probabilities may be from summing to one: 8-bit and float16 soft-max outputs pass, logits and
# percentages do not.
SUM_TOLERANCE = 1e-2


Normalization = Literal["none", "before", "after", "symmetric"]


def check_normalization(kind: Any) -> None:
    """Raises unless `kind` is one of the four normalisations."""
    if kind not in get_args(Normalization):
        raise ValueError(f"normalization: got {kind!r}; expected one of {', '.join(get_args(Normalization))}")


def is_concrete(x: Any) -> bool:
    """Whether values can be looked at, that is, `x` is not being traced."""
    return not isinstance(x, jax.core.Tracer)


def is_whole(x: Any) -> bool:
    """Whether `x` is a whole number as Python or NumPy have them; booleans are not."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def as_float(x: Any) -> jax.Array:
    """`x` as an array of float32, or of its own type where that is wider: 16-bit floats are storage only."""
    x = jnp.asarray(x)
    wanted = jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    return x.astype(wanted)


def positive_bandwidths(name: str, value: Any, count: int) -> tuple[Any, ...]:
    """Expands a bandwidth to one per axis and checks those that are known.

    Args:
        name: the argument's name, for errors.
        value: a number, or one per axis.
        count: the number of axes.

    Returns:
        `count` numbers: Python floats where the value is concrete, tracers otherwise.

    Raises:
        ValueError: if there are not `count` of them or one is not greater than zero.
    """
    if isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1:
        values = tuple(value)
        if len(values) != count:
            raise ValueError(
                f"{name}: got {len(values)} bandwidths; expected one number, or one for each of {count} axes"
            )
    else:
        values = (value,) * count
    if all(is_concrete(v) for v in values):
        values = tuple(float(v) for v in values)
        if any(not v > 0 for v in values):
            raise ValueError(
                f"{name}: got {value}; a bandwidth must be greater than 0. Leave the feature out, "
                "or give its kernel weight 0, to switch it off."
            )
    return values


def check_spatial_ndim(spatial_ndim: int) -> None:
    """Raises unless there are one to three spatial axes."""
    if spatial_ndim not in (1, 2, 3):
        raise ValueError(f"spatial_ndim: got {spatial_ndim}; expected 1, 2 (images) or 3 (volumes)")


def check_num_labels(num_labels: Any) -> int:
    """Raises unless `num_labels` is a whole number of at least 1."""
    if not is_whole(num_labels) or num_labels < 1:
        raise ValueError(f"num_labels: got {num_labels!r}; expected a whole number >= 1")
    return int(num_labels)


def check_layer_inputs(images: Any, logits: Any, num_labels: int) -> None:
    """Raises unless a layer that refines logits against images can take these two."""
    shape, size = jnp.shape(logits), jnp.shape(images)
    if len(shape) < 3 or shape[-1] != num_labels:
        raise ValueError(f"logits: got shape {shape}; expected [*batch, H, W, {num_labels}]")
    if len(size) < 3 or size[-3:-1] != shape[-3:-1]:
        raise ValueError(
            f"images: got shape {size} for logits of shape {shape}; expected [*batch, H, W, channels] of "
            "their size. Bring the logits to the images' size first."
        )


def check_not_empty(name: str, x: jax.Array) -> None:
    """Raises if `x` holds nothing."""
    if x.size == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, which holds nothing; every axis must be >= 1")


@jax.jit
def _survey(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.isfinite(x).all(), x.min(), x.max()


@jax.jit
def _survey_probs(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.isfinite(x).all(), x.min(), jnp.abs(x.sum(-1) - 1).max()


def check_finite(name: str, x: jax.Array) -> None:
    """Raises if a concrete floating-point `x` holds NaN or infinity."""
    if not is_concrete(x) or not jnp.issubdtype(x.dtype, jnp.floating) or not x.size:
        return
    with jax.ensure_compile_time_eval():
        finite = bool(_survey(x)[0])
    if not finite:
        raise ValueError(f"{name}: holds NaN or infinite values; replace them, e.g. with numpy.nan_to_num")


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raises if the default device, or for CPUs the machine, has less memory than is needed in any case.

    Args:
        needed: bytes, a lower bound.
        what: what needs it, to begin the message with.
        remedy: what to do, to end it with.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        try:
            available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # not on this operating system
            return
    else:
        available = (device.memory_stats() or {}).get("bytes_limit", 0)
    if 0 < available < needed:
        raise MemoryError(
            f"{what} needs at least {needed / 2**30:.1f} GiB; {device.platform} memory is "
            f"{available / 2**30:.1f} GiB. {remedy}"
        )


def check_probs(name: str, probs: jax.Array) -> None:
    """Raises if concrete `probs` are not probabilities over the last axis, up to `SUM_TOLERANCE`."""
    if not jnp.issubdtype(probs.dtype, jnp.floating):
        raise ValueError(
            f"{name}: got dtype {probs.dtype}; expected floating-point probabilities. "
            "Pass a label map as labels=…, num_labels=…; divide 8-bit probabilities by 255."
        )
    if not is_concrete(probs) or not probs.size:
        return
    # A constant can be looked at even while something else is being traced.
    with jax.ensure_compile_time_eval():
        finite, low, off = map(float, _survey_probs(probs))
    if not finite:
        raise ValueError(f"{name}: holds NaN or infinite values; replace them before refining")
    if low < -SUM_TOLERANCE:
        raise ValueError(
            f"{name}: holds negative values (smallest {low:.4g}); pass unnormalised scores as logits=…"
        )
    if off > SUM_TOLERANCE:
        raise ValueError(
            f"{name}: do not sum to 1 over the last axis (off by up to {off:.4g}, {SUM_TOLERANCE} is "
            "accepted); normalise them, move the label axis last, or pass scores as logits=…"
        )


def check_labels(name: str, labels: Any, num_labels: int, ignore_label: int | None) -> jax.Array:
    """Makes a label map int32, and raises if it is not of whole numbers or a concrete one is out of range.

    The range is checked before the cast, and comparisons come after it: narrow and unsigned types would
    wrap the numbers they are compared with.
    """
    if not hasattr(labels, "dtype"):
        labels = np.asarray(labels)
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == np.bool_):
        raise ValueError(
            f"{name}: got dtype {labels.dtype}; expected integers. Pass probabilities as probs=…, "
            "or cast the map, e.g. labels.astype('int32')."
        )
    if is_concrete(labels) and labels.size:
        values = np.asarray(labels)
        kept = values if ignore_label is None else values[values != ignore_label]
        low, high = (int(kept.min()), int(kept.max())) if kept.size else (0, 0)
        if low < 0 or high >= num_labels:
            raise ValueError(
                f"{name}: holds label {low if low < 0 else high}; expected 0 to {num_labels - 1}"
                f"{'' if ignore_label is None else f' or ignore_label={ignore_label}'}. "
                "Raise num_labels, or name the label to be ignored."
            )
    return jnp.asarray(labels).astype(jnp.int32)
