"""The grids that networks score: every so many pixels, beginning with the first ones.

Convolutions and pools that pad by half their width put cell `i` of a grid of stride `s` over pixel `s i`, so that `n`
pixels make `⌈n/s⌉` cells, whatever `n` is, and a grid of half the stride holds every cell of the coarser one. Pools of
2 × 2, and patches, make as many cells, but tile the image from its upper left corner: cell `i` is centred at
`s i + (s - 1) / 2`. (Cells that tile it from its centre are those of `jaxcrf.filters.resampling`.)
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jaxcrf.filters.resampling import interpolate_cells


def upsample(
    x: Float[Array, "*batch rows columns channels"], stride: int, size: Sequence[int], offset: float = 0.0
) -> Float[Array, "*batch height width channels"]:
    r"""Interpolates linearly between the cells of a grid, and repeats the first and the last one.

    .. math::
        y_p = (1 - t)\, x_i + t\, x_{i+1}, \qquad i = \lfloor (p - o) / s \rfloor,\ t = (p - o) / s - i

    Args:
        x: cells `i` over pixels `s i + o`, `[*batch, ⌈H/s⌉, ⌈W/s⌉, channels]`.
        stride: `s`.
        size: `(H, W)`.
        offset: `o`, from 0 to less than `s`.

    Returns:
        `[*batch, H, W, channels]`.

    Raises:
        ValueError: if there are not as many cells as the size asks for.

    Example:
        >>> upsample(jnp.asarray([0.0, 4.0, 8.0])[None, :, None], 4, (1, 10))[0, :, 0]
        Array([0., 1., 2., 3., 4., 5., 6., 7., 8., 8.], dtype=float32)
    """
    for axis, n in enumerate(size, start=x.ndim - 3):
        cells = x.shape[axis]
        if cells != -(-n // stride):
            raise ValueError(
                f"x: got {cells} cells along axis {axis} for {n} pixels; expected {-(-n // stride)}"
            )
        if stride == 1:
            continue
        x = interpolate_cells(x, axis, [(k - offset) / stride for k in range(stride)], cells)
        x = lax.slice_in_dim(x, 0, n, axis=axis)
    return x


def resize(
    x: Float[Array, "*batch height width channels"], size: Sequence[int]
) -> Float[Array, "*batch rows columns channels"]:
    """Resizes bilinearly so that the corners stay corners, to any size.

    Pixel `i` of `n` takes the place `i (N - 1) / (n - 1)` among the `N` that there were, as DeepLab's networks
    resize images and scores. There is no smoothing before a reduction.

    Args:
        x: the maps.
        size: wanted.

    Returns:
        `[*batch, *size, channels]`, in the type of `x`.

    Example:
        >>> resize(jnp.arange(5.0)[None, :, None], (1, 3))[0, :, 0]
        Array([0., 2., 4.], dtype=float32)

    References:
        Chen et al., *DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
        Fully Connected CRFs*, 2018, §4.1 (multi-scale inputs).
    """
    rows, columns = (
        np.linspace(0.0, count - 1.0, n) if n > 1 else np.zeros(1)
        for n, count in zip(size, x.shape[-3:-1], strict=True)
    )
    return interpolate(x, rows, columns)


def interpolate(
    x: Float[Array, "*batch height width channels"],
    rows: Float[np.ndarray, " rows"],
    columns: Float[np.ndarray, " columns"],
) -> Float[Array, "*batch rows columns channels"]:
    """Interpolates linearly at the crossings of some rows and columns, between which the maps may have any.

    Args:
        x: the maps, whose own rows and columns are 0, 1, ….
        rows: where to, in those; beyond the first and the last they are repeated.
        columns: likewise.

    Returns:
        `[*batch, rows, columns, channels]`, in the type of `x`.

    Example:
        >>> interpolate(jnp.asarray([0.0, 4.0, 8.0])[None, :, None], np.zeros(1), np.array([-1.0, 0.5, 2.0]))[0, :, 0]
        Array([0., 2., 8.], dtype=float32)
    """
    dtype = x.dtype
    # Products with two small matrices, at full precision: a GPU would else round pixels to ten bits.
    for places, product in ((rows, "ph,...hwc->...pwc"), (columns, "qw,...pwc->...pqc")):
        count = x.shape[-3 if places is rows else -2]
        weights = _linear_weights(places, count)
        if not np.array_equal(weights, np.eye(count)):
            x = jnp.einsum(product, jnp.asarray(weights, dtype), x, precision=lax.Precision.HIGHEST)
    return x.astype(dtype)


def atrous_convolution(
    x: Float[Array, "batch rows columns channels"],
    kernel: Float[Array, "height width channels features"],
    strides: Sequence[int] = (1, 1),
    padding: Any = "SAME",
    *,
    rhs_dilation: Sequence[int] = (1, 1),
    **options: Any,
) -> Float[Array, "batch rows columns features"]:
    """A convolution whose taps lie so far apart that many of them see little but padding.

    It takes what `nnx.Conv` hands to its `conv_general_dilated`. On a CPU every tap multiplies only the cells that it
    sees, which of 3 × 3 taps, 12 apart on 41 × 41 cells, are two thirds.

    Args:
        x: the maps.
        kernel: the taps.
        strides: all 1.
        padding: "SAME".
        rhs_dilation: how far apart the taps are, in cells.
        **options: of `jax.lax.conv_general_dilated`, which other devices use.

    Returns:
        Maps of the same size.

    Raises:
        ValueError: if strides or padding are others.

    Example:
        >>> x, kernel = jnp.arange(5.0)[None, None, :, None], jnp.ones((1, 3, 1, 1))
        >>> atrous_convolution(x, kernel, rhs_dilation=(1, 3))[0, 0, :, 0]
        Array([3., 5., 2., 3., 5.], dtype=float32)
    """
    if any(stride != 1 for stride in strides) or padding != "SAME":
        raise ValueError(f"strides, padding: got {strides} and {padding!r}; expected (1, 1) and 'SAME'")
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options

    def convolution(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, rhs_dilation=rhs_dilation, **options)

    def tap_by_tap(x: Array, kernel: Array) -> Array:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        y = jnp.zeros((*x.shape[:-1], kernel.shape[-1]), dtype)
        for row, column in np.ndindex(*kernel.shape[:2]):
            seen, written = [], []
            for axis, tap in ((0, row), (1, column)):
                n, dilation = x.shape[1 + axis], rhs_dilation[axis]
                offset = tap * dilation - (kernel.shape[axis] - 1) * dilation // 2
                seen.append(slice(max(0, offset), max(0, n + min(0, offset))))
                written.append(slice(max(0, -offset), max(0, n - max(0, offset))))
            piece = x[:, *seen]
            if piece.size:
                product = jnp.einsum(
                    "brcx,xy->brcy",
                    piece,
                    kernel[row, column],
                    precision=options.get("precision"),
                    preferred_element_type=dtype,
                )
                y = y.at[:, *written].add(product)
        return y.astype(x.dtype)

    return lax.platform_dependent(x, kernel, cpu=tap_by_tap, default=convolution)


def max_pool(x: Float[Array, "*batch height width channels"], size: int, stride: int) -> Array:
    """The largest of `size × size` values around every cell of a grid.

    A window of 3 reaches one pixel to both sides; one of 2 the pixel and the next.

    Example:
        >>> max_pool(jnp.asarray([1.0, 5.0, 2.0, 0.0, 3.0])[None, :, None], 3, 2)[0, :, 0]
        Array([5., 5., 3.], dtype=float32)
    """
    # As maxima of shifted maps, axis by axis: the gradient of a windowed reduction scatters, which CPUs and GPUs do
    # slowly.
    lowest = jnp.asarray(-jnp.inf, x.dtype)
    for axis in (x.ndim - 3, x.ndim - 2):
        n = x.shape[axis]
        cells = -(-n // stride)
        before = (size - 1) // 2
        behind = (cells - 1) * stride + size - before - n
        pad = [(0, 0, 0)] * x.ndim
        pad[axis] = (before, behind, 0)
        padded = lax.pad(x, lowest, pad)
        pieces = [
            lax.slice_in_dim(padded, k, k + (cells - 1) * stride + 1, stride=stride, axis=axis)
            for k in range(size)
        ]
        x = pieces[0]
        for piece in pieces[1:]:
            x = jnp.maximum(x, piece)
    return x


def _linear_weights(places: np.ndarray, count: int) -> np.ndarray:
    """The matrix `[places, count]` of linear interpolation between 0, 1, …, `count - 1`."""
    inside = np.clip(places, 0, count - 1)
    return np.maximum(0.0, 1.0 - np.abs(inside[:, None] - np.arange(count)))
