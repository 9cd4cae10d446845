"""Exact Euclidean distances to the nearest pixel of another kind, as far as some reach.

Each pixel looks up and down its column first, then along its row over what the columns found: the work is
proportional to the reach times the number of pixels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# The square of the longest distance along an axis; the sum of two of them fits into int32. It stands for none as well.
_LONGEST = 32767
FAR = np.int32(_LONGEST**2)


@functools.partial(jax.jit, static_argnames="reach")
def squared_distance_to_another_label(labels: Array, valid: Array, reach: int) -> Array:
    """Squared distances of all pixels to the nearest valid one of another label, right up to `reach` squared."""
    if labels.size == 0:
        return jnp.full(labels.shape, FAR)
    far = labels.shape[-2] + 1  # further than any pixel of the same column

    def step(state: tuple[Array, Array, Array], row: tuple[Array, Array]) -> tuple:
        # The label last met in this column, the distance to it, and the distance to any other label.
        nearest, distance, other_distance = state
        label, is_valid = row
        distance, other_distance = jnp.minimum(distance + 1, far), jnp.minimum(other_distance + 1, far)
        changes = is_valid & (label != nearest)
        other_distance = jnp.where(changes, distance, other_distance)
        distance = jnp.where(is_valid, 0, distance)
        nearest = jnp.where(is_valid, label, nearest)
        return (nearest, distance, other_distance), (nearest, distance, other_distance)

    rows = (jnp.moveaxis(labels, -2, 0), jnp.moveaxis(valid, -2, 0))
    # Made of the labels, so that it varies over the devices of `jax.shard_map` as they do.
    nothing = jnp.full_like(rows[0][0], far) + 0 * rows[0][0]
    start = (0 * nothing, nothing, nothing)
    above: tuple[Array, Array, Array] = lax.scan(step, start, rows)[1]
    below: tuple[Array, Array, Array] = lax.scan(step, start, rows, reverse=True)[1]
    # Of both directions, the nearest pixel and the nearest whose label differs from that one's, which is enough: one
    # of the two differs from any given label.
    nearest = jnp.where(above[1] <= below[1], above[0], below[0])
    distance = jnp.minimum(above[1], below[1])
    other_distance = jnp.minimum(
        jnp.where(above[0] == nearest, above[2], above[1]),
        jnp.where(below[0] == nearest, below[2], below[1]),
    )
    nearest, distance, other_distance = (jnp.moveaxis(a, 0, -2) for a in (nearest, distance, other_distance))

    reach = min(reach, labels.shape[-1] - 1)
    nearest = _pad(nearest, reach, 0)
    squares = [_pad(_squared(a, far), reach, FAR) for a in (distance, other_distance)]

    def look(k: Array, least: Array) -> Array:
        there = [lax.dynamic_slice_in_dim(a, k, labels.shape[-1], -1) for a in (nearest, *squares)]
        return jnp.minimum(least, jnp.where(there[0] != labels, there[1], there[2]) + (k - reach) ** 2)

    return lax.fori_loop(0, 2 * reach + 1, look, jnp.full_like(labels, FAR) + 0 * labels)


def squared_distance_to(marked: Array, radius: Array, reach: int) -> Array:
    """Squared distances of all pixels to the nearest marked one, right up to `radius` squared.

    Args:
        marked: bool `[H, W]`.
        radius: a whole number, traced; the work is proportional to it.
        reach: a static bound on it.
    """
    far = marked.shape[-2] + 1

    def step(distance: Array, row: Array) -> tuple[Array, Array]:
        distance = jnp.where(row, 0, jnp.minimum(distance + 1, far))
        return distance, distance

    nothing = jnp.where(marked[0], far, far)
    above = lax.scan(step, nothing, marked)[1]
    below = lax.scan(step, nothing, marked, reverse=True)[1]
    reach = min(reach, marked.shape[-1] - 1)
    squares = _pad(_squared(jnp.minimum(above, below), far), reach, FAR)

    def look(k: Array, least: Array) -> Array:
        there = lax.dynamic_slice_in_dim(squares, k, marked.shape[-1], -1)
        return jnp.minimum(least, there + (k - reach) ** 2)

    radius = jnp.minimum(radius, reach)
    return lax.fori_loop(reach - radius, reach + radius + 1, look, jnp.where(marked, FAR, FAR))


def _squared(distance: Array, far: int) -> Array:
    return jnp.where(distance >= far, FAR, jnp.minimum(distance, _LONGEST) ** 2)


def _pad(a: Array, reach: int, value: int | np.int32) -> Array:
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(reach, reach)], constant_values=value)
