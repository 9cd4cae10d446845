"""What the constructors of Gaussian filters read alike: features and weights, of one kernel or several."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxcrf import _checks
from jaxcrf.features import Features


def read_features(features: Any, spatial_ndim: int) -> tuple[Features, ...]:
    """Reads a `features` argument: one kernel's features or a sequence of them, all over the same pixels.

    Args:
        features: `Features` or a bare array `[*batch, *spatial, d]`, or a tuple or list of those.
        spatial_ndim: how many axes are spatial.

    Returns:
        The features of every kernel, their values at least float32.

    Raises:
        ValueError: if there is no kernel, or shapes do not fit `spatial_ndim` or each other.
    """
    _checks.check_spatial_ndim(spatial_ndim)
    kernels = []
    for f in features if isinstance(features, (tuple, list)) else (features,):
        values = f.values if isinstance(f, Features) else f
        known = f.position_bandwidths if isinstance(f, Features) else None
        kernels.append(Features(_checks.as_float(values), known))
    if not kernels:
        raise ValueError("features: got an empty tuple; pass the features of at least one kernel")
    for f in kernels:
        if f.values.ndim < spatial_ndim + 1:
            raise ValueError(
                f"features: got shape {f.values.shape}; expected [*batch, {spatial_ndim} spatial axes, d] "
                "(spatial_ndim=3 for volumes)"
            )
        if 0 in f.values.shape[:-1]:
            raise ValueError(f"features: got shape {f.values.shape}, which holds no pixel")
        if f.position_bandwidths is not None and len(f.position_bandwidths) != spatial_ndim:
            raise ValueError(
                f"features: positions along {len(f.position_bandwidths)} axes do not fit "
                f"spatial_ndim={spatial_ndim}"
            )
    shapes = {f.values.shape[-1 - spatial_ndim : -1] for f in kernels}
    if len(shapes) > 1:
        raise ValueError(
            f"features: kernels disagree in their spatial shape, {sorted(shapes)}; build all from one image"
        )
    batches = [f.values.shape[: f.values.ndim - 1 - spatial_ndim] for f in kernels]
    try:
        jnp.broadcast_shapes(*batches)
    except ValueError:
        raise ValueError(f"features: batch axes of the kernels do not broadcast, {batches}") from None
    return tuple(kernels)


def read_weights(weights: Any, count: int) -> Float[Array, " kernels"]:
    """Reads a `weights` argument: one number for all kernels, or one per kernel.

    Raises:
        ValueError: if there is another number of them.
    """
    weights = _checks.as_float(weights)
    if weights.shape not in ((), (count,)):
        raise ValueError(
            f"weights: got shape {weights.shape} for {count} kernels; expected one number or ({count},)"
        )
    return jnp.broadcast_to(weights, (count,))
