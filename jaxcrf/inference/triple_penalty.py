"""The triple penalty of the Deep Parsing Network, at a cost that does not depend on its window."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Float, Shaped

from jaxcrf import _checks
from jaxcrf.filters.base import broadcast_to_batch, flatten_batch
from jaxcrf.inference.local_convolution import (
    Reach,
    Streamed,
    Wanted,
    read_maps,
    read_window,
    rows_first,
    stream_taps,
)
from jaxcrf_kernels._platform import by_platform
from jaxcrf_kernels._varying import varying_like

Method = Literal["box", "window"]

# Sums run over tiles, whose sides are at most as many times the window's: all numbers are then of the size of the
# window's own, whatever the size of the image. Wider tiles round more, smaller ones sum more pixels twice. At
# 512×512×21 and a window of 50, 128 columns and 171 to 256 rows took least.
TILE_WINDOWS = (5, 3)
TILE_PIXELS = 48  # at least

# Columns whose prefix sums are one matrix product. 16 and 64 take as long or longer.
BLOCK = 32


def triple_penalty(
    probs: Float[Array, "*batch height width labels"],
    image: Shaped[Array, "*batch height width channels"],
    *,
    window: int | Sequence[int] = 50,
    color_weight: Any,
    position_weight: Any,
    multiply_center: bool = True,
    method: Method = "box",
) -> Float[Array, "*batch height width labels"]:
    r"""Weighs the labels of a pixel by those of all pixels around it that are unlike it.

    With `N_j` the window around pixel `j`, and the colours `I` and positions `x` of pixels,

    .. math::
        o_j(v) = p_j(v) \sum_{z \in N_j} d(j, z)\, p_z(v) , \qquad
        d(j, z) = \omega_1 \lVert I_j - I_z \rVert^2 + \omega_2 \lVert x_j - x_z \rVert^2 .

    "box" is exact, at a cost that does not depend on the window: `d` is quadratic, so that with box sums `B`

    .. math::
        \sum_z d(j, z)\, p_z = \omega_1 \bigl( \lVert I_j \rVert^2 B[p] - 2\, I_j \cdot B[I p]
            + B[\lVert I \rVert^2 p] \bigr) + \omega_2 (\ldots) .

    The box sums are running sums over tiles of the image that are a few windows large, with colours and positions
    centred in each tile, so that rounding does not grow with the image: errors are about 1e-6 of the largest sums. They
    are not small beside a sum that vanishes; where a pixel is like all around it, a few of these 1e-6 may be left, of
    either sign. "window" adds the window up pixel by pixel instead; there nothing cancels.

    Both are differentiable once, in reverse mode, in `probs`, `image` and the weights, at two to three times the cost
    of the value: the transpose is the same sum over the mirrored window.

    Args:
        probs: `p`, `[*batch, height, width, labels]`; they need not sum to one.
        image: `[*batch, height, width, channels]`, any number of channels, in the units of `1 / √ω₁`; or without the
            last axis, for one channel. Batch axes broadcast.
        window: the size of `N_j` in pixels, one number or height and width. An even window has one pixel more before
            its centre than after it: the paper's 50 reaches from -25 to +24. Pixels outside the image contribute
            nothing, so that a window may be larger than the image; a window of one pixel gives zero.
        color_weight: `ω₁`, one number. At colours from 0 to 255, 1e-5 makes the largest distance about two.
        position_weight: `ω₂`, one number.
        multiply_center: whether to multiply by `p_j(v)`. The paper's eq. 7 does; without, the sum is that of an
            ordinary mean-field update, the second line of eq. 10.
        method: "box" or "window".

    Returns:
        `o`, shaped like `probs` (with the image's batch axes), float32 or float64.

    Raises:
        ValueError: if shapes disagree, `window` is not a whole number, a weight not one number, `method` unknown, or
            concrete arrays hold NaN.

    Under `jit` NaN of a pixel may reach all the pixels of its tile.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> image = jnp.array([[[0.0], [0.0], [3.0]]])
        >>> probs = jnp.array([[[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]])
        >>> jaxcrf.triple_penalty(
        ...     probs, image, window=3, color_weight=1.0, position_weight=0.1, multiply_center=False
        ... ).round()[0]
        Array([[0., 0.],
               [9., 0.],
               [5., 5.]], dtype=float32)

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, eq. 3, 4, 7, 8 (b12), 10.
    """
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}; expected one of {', '.join(get_args(Method))}")
    sizes = read_window(window)
    maps = read_maps(probs)
    pixels = _read_image(image, maps)
    maps = broadcast_to_batch(maps, 3, pixels.shape[:-3], "probs")
    dtype = jnp.promote_types(maps.dtype, pixels.dtype)
    weights = jnp.stack(
        [
            _read_weight(name, weight).astype(dtype)
            for name, weight in (("color_weight", color_weight), ("position_weight", position_weight))
        ]
    )
    maps, pixels = maps.astype(dtype), pixels.astype(dtype)
    batch = maps.shape[:-3]
    pixels = jnp.broadcast_to(pixels, (*batch, *pixels.shape[-3:]))
    reach = Reach.of(sizes).within(*maps.shape[-3:-1])
    maps, pixels, weights = varying_like((maps, pixels, weights), maps, pixels, weights)
    message = _compiled_weighted_sums(
        reach, method, flatten_batch(maps, batch, 3), flatten_batch(pixels, batch, 3), weights
    ).reshape(maps.shape)
    return maps * message if multiply_center else message


def _read_image(image: Any, maps: Array) -> Array:
    pixels = jnp.asarray(image)
    spatial = maps.shape[-3:-1]
    if not (jnp.issubdtype(pixels.dtype, jnp.floating) or jnp.issubdtype(pixels.dtype, jnp.integer)):
        raise ValueError(f"image: got dtype {pixels.dtype}; expected numbers")
    if pixels.ndim == 2 or (pixels.shape == maps.shape[:-1] and pixels.shape[-3:-1] != spatial):
        pixels = pixels[..., None]
    if pixels.ndim < 3 or pixels.shape[-3:-1] != spatial:
        raise ValueError(
            f"image: got shape {jnp.shape(image)} with probs of shape {maps.shape}; expected "
            f"[*batch, {spatial[0]}, {spatial[1]}, channels]. Resize one to the other; the axis order is height, width."
        )
    _checks.check_not_empty("image", pixels)
    _checks.check_finite("image", pixels)
    return _checks.as_float(pixels)


def _read_weight(name: str, value: Any) -> Array:
    weight = _checks.as_float(value)
    if weight.ndim:
        raise ValueError(f"{name}: got shape {weight.shape}; expected one number")
    _checks.check_finite(name, weight)
    return weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_sums(reach: Reach, method: Method, x: Array, image: Array, weights: Array) -> Array:
    """`Σ_z d(j, z) x_z` of `[batch, height, width, labels]`."""
    if reach.window == (1, 1):
        return jnp.zeros_like(x)
    return _stream(reach, method, Wanted(True, False, False), x, image, weights).message  # type: ignore[return-value]  # it was wanted


def _weighted_sums_fwd(
    reach: Reach, method: Method, x: Array, image: Array, weights: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _weighted_sums(reach, method, x, image, weights), (x, image, weights)


def _weighted_sums_bwd(
    reach: Reach, method: Method, operands: tuple[Array, ...], g: Array
) -> tuple[Array, Array, Array]:
    x, image, weights = operands
    if reach.window == (1, 1):
        return jnp.zeros_like(x), jnp.zeros_like(image), jnp.zeros_like(weights)
    # Every pair (j, z) moves with I_j - I_z, which j enters once as receiver and once as sender.
    sent = _stream(reach.mirrored, method, Wanted(True, True, True), g, image, weights, x)
    received = _stream(reach, method, Wanted(False, True, False), x, image, weights, g)
    # All that is added and returned was wanted.
    pull = 2 * weights[0] * (sent.pull + received.pull)  # type: ignore[operator]
    return sent.message, pull, sent.distances  # type: ignore[return-value]


_weighted_sums.defvjp(_weighted_sums_fwd, _weighted_sums_bwd)

# Compiled here, so that calls outside any `jit` compile once per shape.
_compiled_weighted_sums = jax.jit(_weighted_sums, static_argnums=(0, 1))


def _stream(
    reach: Reach,
    method: Method,
    wanted: Wanted,
    x: Array,
    image: Array,
    weights: Array,
    partner: Array | None = None,
) -> Streamed:
    stream = stream_taps if method == "window" else _stream_boxes

    def run(by_row: bool) -> Callable[..., Streamed]:
        # Mapping over a batch axis of `vmap` one item at a time keeps a tile in the cache.
        return sequential_vmap(lambda *operands: stream(reach, wanted, by_row, *operands))

    return by_platform(x, image, weights, partner, cpu=run(True), accelerator=run(False))


class _Tiles(NamedTuple):
    """How an image is cut into tiles, and where the windows of their pixels reach.

    Padded maps have one row more on top, which the window of the first row has just left.
    """

    reach: Reach
    shape: tuple[int, ...]  # [batch, height, width]
    counts: tuple[int, int]
    size: tuple[int, int]  # pixels of a tile
    extent: tuple[int, int]  # rows and columns that its windows reach over, the row on top included

    @classmethod
    def over(cls, reach: Reach, x: Array) -> "_Tiles":
        counts, size = [], []
        for n, window, windows in zip(x.shape[1:3], reach.window, TILE_WINDOWS, strict=True):
            count = math.ceil(n / max(TILE_PIXELS, windows * window))
            counts.append(count)
            size.append(math.ceil(n / count))
        height, width = reach.window
        # One column more for the sum of all, and whole blocks.
        columns = math.ceil((size[1] + width) / BLOCK) * BLOCK
        extent = (size[0] + height, columns)
        return cls(reach, x.shape[:-1], (counts[0], counts[1]), (size[0], size[1]), extent)

    def pad(self, x: Array) -> Array:
        """`[batch, height, width, c]` to `[batch, rows, c, columns]`."""
        top, left = self._margin()
        rows, columns = (
            (count - 1) * size + extent + abs(before - after)
            for count, size, extent, before, after in zip(
                self.counts, self.size, self.extent, *self.reach, strict=True
            )
        )
        _, height, width = self.shape
        pad = ((0, 0), (top + 1, rows - top - 1 - height), (0, 0), (left, columns - left - width))
        return jnp.pad(rows_first(x), pad)

    def _margin(self) -> tuple[int, int]:
        """The same for the mirrored window, so that both directions of a gradient share padded maps."""
        return max(self.reach.before[0], self.reach.after[0]), max(self.reach.before[1], self.reach.after[1])

    def starts(self) -> Array:
        """Image, row and column in padded maps where that begins which every tile's windows reach over."""
        axes = [np.arange(n) for n in (self.shape[0], *self.counts)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        spare = [margin - before for margin, before in zip(self._margin(), self.reach.before, strict=True)]
        return jnp.asarray(grid * [1, *self.size] + [0, *spare], jnp.int32)

    def collect(self, tiles: Array) -> Array:
        """Stacked tiles `[tiles, rows, c, columns]` to `[batch, height, width, c]`."""
        (vertical, horizontal), (rows, columns) = self.counts, self.size
        batch, height, width = self.shape
        c = tiles.shape[2]
        whole = tiles.reshape(batch, vertical, horizontal, rows, c, columns).transpose(0, 1, 3, 2, 5, 4)
        whole = whole.reshape(batch, vertical * rows, horizontal * columns, c)
        return whole[:, :height, :width]


def _stream_boxes(
    reach: Reach,
    wanted: Wanted,
    by_row: bool,
    x: Array,
    image: Array,
    weights: Array,
    partner: Array | None,
) -> Streamed:
    """What `stream_taps` finds, by box sums; `by_row` keeps running sums of columns, else whole tiles are summed."""
    tiles = _Tiles.over(reach, x)
    image = image - image.mean((1, 2), keepdims=True)  # so that the zeros around it are nothing special
    maps, colours = tiles.pad(x), tiles.pad(image)
    partners = None if partner is None else tiles.pad(partner)

    def tile(start: Array) -> Streamed:
        cut = functools.partial(_cut, start=start, extent=tiles.extent)
        own_partners = None if partners is None else cut(partners)
        return _stream_tile(tiles, wanted, by_row, weights, cut(maps), cut(colours), own_partners)

    together = None if by_row else math.prod(tiles.counts)
    found = lax.map(tile, tiles.starts(), batch_size=together)
    return Streamed(
        None if found.message is None else tiles.collect(found.message),
        None if found.pull is None else tiles.collect(found.pull),
        None if found.distances is None else found.distances.sum(0),
    )


def _cut(padded: Array, start: Array, extent: tuple[int, int]) -> Array:
    size = (1, extent[0], padded.shape[2], extent[1])
    return lax.dynamic_slice(padded, (start[0], start[1], jnp.int32(0), start[2]), size)[0]


def _stream_tile(
    tiles: _Tiles,
    wanted: Wanted,
    by_row: bool,
    weights: Array,
    maps: Array,
    colours: Array,
    partners: Array | None,
) -> Streamed:
    """One tile's share, from everything that its windows reach over, `[rows, c, columns]`."""
    (height, width), (rows, columns) = tiles.reach.window, tiles.size
    top, left = tiles.reach.before[0] + 1, tiles.reach.before[1]  # of the tile's first pixel
    dtype, channels = maps.dtype, colours.shape[1]
    # So few digits that differences from it are exact where colours are whole numbers.
    center = colours.mean((0, 2), keepdims=True).astype(jnp.bfloat16).astype(dtype)
    colours = colours - center
    y = jnp.arange(len(maps), dtype=dtype)[:, None, None] - (top + (rows - 1) / 2)
    x = jnp.arange(maps.shape[-1], dtype=dtype)[None, None] - (left + (columns - 1) / 2)
    y, x = (jnp.broadcast_to(a, (len(maps), 1, maps.shape[-1])) for a in (y, x))
    squares = [jnp.sum(colours**2, 1, keepdims=True), y**2 + x**2]
    if not wanted.distances:  # apart from each other only for the gradients of their weights
        squares = [weights[0] * squares[0] + weights[1] * squares[1]]
    # What the maps are multiplied by before they are summed.
    factors = jnp.concatenate([jnp.ones_like(y), y, x, colours, *squares], 1)

    def products(row: Any) -> Array:
        f, m = (lax.dynamic_index_in_dim(a, row, 0, keepdims=False) for a in (factors, maps))
        return f[:, None] * m[None]

    def inside(a: Array, row: Any) -> Array:
        """A row of the tile itself, `[c, columns]`."""
        return lax.dynamic_index_in_dim(a, row + top, 0, keepdims=False)[:, left : left + columns]

    def find(row: Any, sums: Array) -> Streamed:
        """What a row wants to know, from sums of columns over its windows, `[factors, labels, columns]`."""
        sums = _box_sums(sums, width, columns)
        here = inside(factors, row)[:, None]
        one, at_colour = sums[0], sums[3 : 3 + channels]
        # Written out, since reductions over so few are not vectorised along the columns.
        by_position = sum(here[n] * sums[n] for n in range(1, 3))
        by_colour = sum(here[n] * sums[n] for n in range(3, 3 + channels))
        of_colour = of_position = message = pull = distances = None
        if wanted.distances:
            of_colour = here[-2] * one - 2 * by_colour + sums[-2]
            of_position = here[-1] * one - 2 * by_position + sums[-1]
            message = weights[0] * of_colour + weights[1] * of_position
        elif wanted.message:
            message = here[-1] * one - 2 * (weights[0] * by_colour + weights[1] * by_position) + sums[-1]
        if partners is not None:
            # As a product with ones, since reductions over labels are not vectorised along the columns.
            over_labels = functools.partial(
                jnp.einsum, "l,...lw->...w", jnp.ones_like(maps[0, :, 0]), precision="highest"
            )
            p = inside(partners, row)
            if of_colour is not None and of_position is not None:
                distances = over_labels(p * jnp.stack([of_colour, of_position])).sum(-1)
            if wanted.pull:
                pull = here[3 : 3 + channels, 0] * over_labels(p * one) - over_labels(p * at_colour)
        return Streamed(message if wanted.message else None, pull, distances)

    if by_row:

        def step(sums: Array, row: Array) -> tuple[Array, Streamed]:
            sums = sums + (products(row + height) - products(row))
            return sums, find(row, sums)

        sums = varying_like(jnp.zeros((factors.shape[1], *maps.shape[1:]), dtype), (maps, factors))
        sums = lax.fori_loop(0, height, lambda row, total: total + products(row), sums)
        _, found = lax.scan(step, sums, jnp.arange(rows, dtype=jnp.int32))
    else:
        everything = factors[1:, :, None] * maps[1:, None]
        summed = _box_sums(jnp.moveaxis(everything, 0, -1), height, rows)
        found = jax.vmap(find)(jnp.arange(rows, dtype=jnp.int32), jnp.moveaxis(summed, -1, 0))
    if found.distances is not None:
        found = found._replace(distances=found.distances.sum(0))
    return found


def _box_sums(a: Array, window: int, count: int) -> Array:
    """The sums of `window` neighbours along the last axis, from the first `count` places on.

    Prefix sums in blocks are a matrix product, those of the blocks another; both stay inside a tile.
    """
    blocks = math.ceil((count + window) / BLOCK)
    lead, missing = a.shape[:-1], blocks * BLOCK - a.shape[-1]
    if missing > 0:
        a = jnp.pad(a, [(0, 0)] * len(lead) + [(0, missing)])
    a = a[..., : blocks * BLOCK].reshape(-1, BLOCK)

    def before(a: Array) -> Array:
        """Sums of all that comes earlier."""
        n = a.shape[-1]
        return lax.dot(a, jnp.asarray(np.triu(np.ones((n, n)), 1), a.dtype), precision=lax.Precision.HIGHEST)

    of_blocks = before(a.sum(-1).reshape(-1, blocks))
    sums = (before(a).reshape(-1, blocks, BLOCK) + of_blocks[..., None]).reshape(*lead, blocks * BLOCK)
    return sums[..., window : window + count] - sums[..., :count]
