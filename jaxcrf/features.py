"""What a Gaussian kernel compares: features of pixels, already divided by their bandwidths."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

from jaxcrf import _checks


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["position_bandwidths"]
)
@dataclasses.dataclass(frozen=True)
class Features:
    """Features `f_i` of every pixel, with what is known about them before any value is.

    The kernel between two pixels is `exp(-½‖f_i - f_j‖²)`. Bare arrays are accepted wherever `Features`
    are and mean the same with nothing known.

    Attributes:
        values: `[*batch, *spatial, d]`, divided by the bandwidths.
        position_bandwidths: None, or the bandwidths (pixels, one per spatial axis in array order) of the
            first features, which then are exactly the pixel's coordinates divided by them. Static, so
            that filters can choose separable or tabulated arithmetic under `jit`.
    """

    values: Float[Array, "*batch_and_spatial d"]
    position_bandwidths: tuple[float, ...] | None = None


def position_features(shape: Sequence[int], bandwidth: Any) -> Features:
    r"""Coordinates as features: the smoothness kernel `exp(-‖p_i - p_j‖² / 2θ²)`.

    Args:
        shape: the spatial shape, `(height, width)` or `(depth, height, width)`.
        bandwidth: `θ_γ` in pixels, one number or one per axis in array order (y before x). A traced
            bandwidth is differentiable, at the price of the static knowledge.

    Returns:
        Features with values `[*spatial, len(shape)]`.

    Raises:
        ValueError: if a size or a bandwidth is not positive.

    Example:
        >>> position_features((2, 3), 2.0).values[1, 2]
        Array([0.5, 1. ], dtype=float32)
        >>> position_features((2, 3), (1.0, 4.0)).position_bandwidths
        (1.0, 4.0)

    References:
        Krähenbühl and Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge
        Potentials*, 2011, eq. 3 (second kernel).
    """
    shape = tuple(int(n) for n in shape)
    if not shape or any(n < 1 for n in shape):
        raise ValueError(f"shape: got {shape}; expected the spatial sizes, each >= 1")
    bandwidths = _checks.positive_bandwidths("bandwidth", bandwidth, len(shape))
    known = all(isinstance(b, float) for b in bandwidths)
    # Known bandwidths divide in float64, so that coordinates are rounded once.
    xp: Any = np if known else jnp
    axes = [xp.arange(n, dtype=float) / b for n, b in zip(shape, bandwidths, strict=True)]
    values = jnp.asarray(xp.stack(xp.meshgrid(*axes, indexing="ij"), axis=-1), dtype=float)
    return Features(values, bandwidths if known else None)


def bilateral_features(
    image: Shaped[Array, "*batch_and_spatial channels"],
    position_bandwidth: Any,
    color_bandwidth: Any,
    *,
    spatial_ndim: int = 2,
) -> Features:
    r"""Coordinates and colours as features: `exp(-‖p_i - p_j‖² / 2θ_α² - ‖I_i - I_j‖² / 2θ_β²)`.

    Args:
        image: `[*batch, *spatial, channels]`, any number of channels, in whatever unit
            `color_bandwidth` is in (0 to 255 for 8-bit images).
        position_bandwidth: `θ_α` in pixels, one number or one per spatial axis in array order (y before
            x); None leaves the coordinates out.
        color_bandwidth: `θ_β` in image units, one number or one per channel.
        spatial_ndim: 2 for images, 3 for volumes.

    Returns:
        Features with values `[*batch, *spatial, spatial_ndim + channels]` (without coordinates,
        `channels`).

    Raises:
        ValueError: if the image has too few axes or a bandwidth is not positive.

    Example:
        >>> import numpy as np
        >>> image = np.full((4, 5, 3), 26, np.uint8)
        >>> bilateral_features(image, 80, 13).values.shape
        (4, 5, 5)
        >>> bilateral_features(image, None, 13).values[0, 0]
        Array([2., 2., 2.], dtype=float32)

    References:
        Krähenbühl and Koltun, 2011, eq. 3 (first kernel).
    """
    _checks.check_spatial_ndim(spatial_ndim)
    image = _checks.as_float(image)
    if image.ndim < spatial_ndim + 1:
        raise ValueError(
            f"image: got shape {image.shape}; expected [*batch, {spatial_ndim} spatial axes, channels]. "
            "Give a single-channel image a last axis: image[..., None]."
        )
    colors = _checks.positive_bandwidths("color_bandwidth", color_bandwidth, image.shape[-1])
    colored = image / jnp.stack([jnp.asarray(c, image.dtype) for c in colors])
    if position_bandwidth is None:
        return Features(colored)
    spatial = image.shape[-1 - spatial_ndim : -1]
    positions = position_features(spatial, position_bandwidth)
    coordinates = jnp.broadcast_to(positions.values, (*image.shape[:-1], spatial_ndim)).astype(image.dtype)
    return Features(jnp.concatenate([coordinates, colored], axis=-1), positions.position_bandwidths)
