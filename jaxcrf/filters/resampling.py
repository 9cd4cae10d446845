"""Average pooling and bilinear up-sampling, the `P` and `U` of a blurred filter `U K P`.

Both follow the public ConvCRF reference in what decides parity: a map of `n` pixels is cut into
`⌈n/blur⌉` cells, the `pad = ⌈(⌈n/blur⌉·blur - n) / 2⌉` missing pixels in front are not counted into the
averages, and up-sampling puts cell centres half a pixel in (no corner alignment) and repeats the border.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def cells(n: int, blur: int) -> tuple[int, int]:
    """The number of cells along an axis of `n` pixels, and the pixels missing in front of the first.

    Example:
        >>> cells(375, 4)
        (94, 1)
    """
    count = math.ceil(n / blur)
    return count, math.ceil((count * blur - n) / 2)


def pixels_per_cell(n: int, blur: int) -> np.ndarray:
    """How many pixels each cell along an axis really holds.

    Example:
        >>> pixels_per_cell(6, 4)
        array([3, 3])
    """
    count, pad = cells(n, blur)
    edges = np.clip(np.arange(count + 1) * blur - pad, 0, n)
    return np.diff(edges)


def average_pool(x: Array, blur: int, spatial: Sequence[int]) -> Array:
    """Averages `[*batch, *spatial, c]` over cells of `blur` pixels along every spatial axis."""
    dtype, batch = x.dtype, x.ndim - 1 - len(spatial)
    pad = [(0, 0)] * batch
    split = list(x.shape[:batch])
    size = np.ones((), x.dtype)
    for n in spatial:
        count, front = cells(n, blur)
        pad.append((front, count * blur - n - front))
        split += [count, blur]
        size = np.multiply.outer(size, pixels_per_cell(n, blur))
    x = jnp.pad(x, [*pad, (0, 0)]).reshape(*split, x.shape[-1])
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # 16-bit floats are storage only
    total = x.sum(axis=tuple(range(batch + 1, batch + 2 * len(spatial), 2)))
    return (total / jnp.asarray(size[..., None], x.dtype)).astype(dtype)


def bilinear_upsample(x: Array, blur: int, spatial: Sequence[int]) -> Array:
    """Brings cells `[*batch, *cells, c]` back to `[*batch, *spatial, c]`, linearly along every axis."""
    # One axis after the other as `blur` phases, each a fixed blend of a cell and one neighbour: five times
    # faster on a CPU than jax.image.resize, whose weights are a matrix.
    for axis, n in enumerate(spatial, start=x.ndim - 1 - len(spatial)):
        count, front = cells(n, blur)
        before = jnp.concatenate(
            [lax.slice_in_dim(x, 0, 1, axis=axis), lax.slice_in_dim(x, 0, -1, axis=axis)], axis
        )
        after = jnp.concatenate(
            [lax.slice_in_dim(x, 1, None, axis=axis), lax.slice_in_dim(x, -1, None, axis=axis)], axis
        )
        phases = []
        for position in _phase_positions(blur):
            neighbour = before if position < 0 else after
            phases.append((1 - abs(position)) * x + abs(position) * neighbour)
        x = jnp.stack(phases, axis=axis + 1)
        x = x.reshape(*x.shape[:axis], count * blur, *x.shape[axis + 2 :])
        x = lax.slice_in_dim(x, front, front + n, axis=axis)
    return x


def upsample_weights(n: int, blur: int) -> np.ndarray:
    """The weights `[n, 3]` of every pixel's own cell and its two neighbours, in the order before, own, after."""
    count, front = cells(n, blur)
    pixel = np.arange(n) + front
    cell = pixel // blur
    position = np.asarray(_phase_positions(blur))[pixel % blur]
    weights = np.stack([np.maximum(-position, 0), 1 - np.abs(position), np.maximum(position, 0)], -1)
    # The border is repeated: what would come from outside comes from the cell itself.
    weights[cell == 0, 1] += weights[cell == 0, 0]
    weights[cell == 0, 0] = 0
    weights[cell == count - 1, 1] += weights[cell == count - 1, 2]
    weights[cell == count - 1, 2] = 0
    return weights


def _phase_positions(blur: int) -> list[float]:
    """Where the pixels of a cell lie relative to its centre, in cells."""
    return [(k + 0.5) / blur - 0.5 for k in range(blur)]
