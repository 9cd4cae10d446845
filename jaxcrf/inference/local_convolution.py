"""Sums over windows taken tap by tap, for filters of any kind: learned, or distances between pixels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Float

from jaxcrf import _checks
from jaxcrf.filters.base import broadcast_to_batch, flatten_batch
from jaxcrf_kernels._platform import by_platform
from jaxcrf_kernels._varying import varying_like


class Reach(NamedTuple):
    """How far a window goes from its pixel: `before` towards the first pixel, `after` towards the last; y, x."""

    before: tuple[int, int]
    after: tuple[int, int]

    @classmethod
    def of(cls, window: tuple[int, int]) -> "Reach":
        """That of a window of so many pixels, 50 from -25 to +24."""
        before = window[0] // 2, window[1] // 2
        return cls(before, (window[0] - 1 - before[0], window[1] - 1 - before[1]))

    @property
    def window(self) -> tuple[int, int]:
        """Its height and width."""
        return self.before[0] + 1 + self.after[0], self.before[1] + 1 + self.after[1]

    @property
    def mirrored(self) -> "Reach":
        """The pixels in whose windows a pixel lies."""
        return Reach(self.after, self.before)

    def within(self, height: int, width: int) -> "Reach":
        """Without what lies outside the image wherever the pixel is, and so counts nowhere."""
        before, after = ((min(y, height - 1), min(x, width - 1)) for y, x in self)
        return Reach(before, after)


class Wanted(NamedTuple):
    """What one pass over the windows is to find; see `Streamed`."""

    message: bool
    pull: bool
    distances: bool


class Streamed(NamedTuple):
    """What one pass over the windows finds; None where it was not wanted.

    Attributes:
        message: `Σ_z d(j, z) x_z`, `[batch, height, width, labels]`.
        pull: `Σ_z ⟨p_j, x_z⟩ (I_j - I_z)`, `[batch, height, width, channels]`, for the partner `p`.
        distances: `Σ_j Σ_z ⟨p_j, x_z⟩` times the squared distances of colours and of positions, `[2]`.
    """

    message: Array | None
    pull: Array | None
    distances: Array | None


def read_window(window: int | Sequence[int]) -> tuple[int, int]:
    """Checks a window and expands it to its height and width."""
    sizes: tuple[Any, ...] = (window, window) if np.ndim(window) == 0 else tuple(window)  # type: ignore[arg-type]  # np.ndim tells mypy nothing
    if len(sizes) != 2 or any(not _checks.is_whole(n) or n < 1 for n in sizes):
        raise ValueError(
            f"window: got {window!r}; expected a whole number >= 1, odd or even, or a height and a width"
        )
    return int(sizes[0]), int(sizes[1])


def read_maps(probs: Any) -> Array:
    """Makes maps an array `[*batch, height, width, labels]` of at least float32, free of NaN where it is concrete."""
    maps = jnp.asarray(probs)
    if not jnp.issubdtype(maps.dtype, jnp.floating):
        raise ValueError(
            f"probs: got dtype {maps.dtype}; expected floating-point maps [*batch, height, width, labels]. "
            "Divide 8-bit probabilities by 255; one-hot encode label maps, e.g. by jax.nn.one_hot."
        )
    if maps.ndim < 3:
        raise ValueError(f"probs: got shape {maps.shape}; expected [*batch, height, width, labels]")
    _checks.check_not_empty("probs", maps)
    _checks.check_finite("probs", maps)
    return _checks.as_float(maps)


def rows_first(x: Array) -> Array:
    """`[batch, height, width, c]` to `[batch, height, c, width]`: what labels share multiplies vectors of pixels."""
    return jnp.moveaxis(x, -1, -2)


def local_convolution(
    probs: Float[Array, "*batch height width labels"],
    filters: Float[Array, "*filters"],
    *,
    window: int | Sequence[int] = 50,
    multiply_center: bool = True,
) -> Float[Array, "*batch height width labels"]:
    r"""Sums every label's map over the window of every pixel, with a filter of the pixel's own.

    .. math::
        o_{j}(v) = p_j(v) \sum_{z \in N_j} k_j(z - j)\, p_z(v) .

    The filters are shared by the labels; the factor `p_j(v)` in front is `multiply_center`. This is the locally
    convolutional layer b12 of the Deep Parsing Network with filters that are learned, which the paper suggests for
    aligned images (faces, people); `triple_penalty` is the one whose filters are distances between pixels, for which
    there is a much faster form. The cost grows with the area of the window; beside operands and results next to nothing
    is stored, in either direction.

    Differentiable once, in reverse mode, in `probs` and `filters`.

    Args:
        probs: `p`, `[*batch, height, width, labels]`, of any sign and sum.
        filters: `k`, `[*batch, height, width, taps]`, or `[taps]` for one filter everywhere. The taps are the pixels
            of the window row by row. Batch axes broadcast.
        window: its size, one number or height and width. An even window has one pixel more before its centre than
            after it: 50 reaches from -25 to +24. Pixels outside the image contribute nothing.
        multiply_center: whether to multiply by `p_j(v)`.

    Returns:
        `o`, shaped like `probs` (with the filters' batch axes), float32 or float64.

    Raises:
        ValueError: if shapes disagree, `window` is not a whole number, or concrete arrays hold NaN.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> right_neighbour = jnp.array([0.0, 0.0, 1.0])
        >>> probs = jnp.array([[[0.1], [0.2], [0.5]]])
        >>> jaxcrf.local_convolution(probs, right_neighbour, window=(1, 3), multiply_center=False)[0, :, 0]
        Array([0.2, 0.5, 0. ], dtype=float32)

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, eq. 8 and its footnote.
    """
    reach = Reach.of(read_window(window))
    maps = read_maps(probs)
    k = _checks.as_float(filters)
    height, width = maps.shape[-3:-1]
    taps = reach.window[0] * reach.window[1]
    if k.shape[-1:] != (taps,) or (k.ndim != 1 and k.shape[-3:-1] != (height, width)):
        raise ValueError(
            f"filters: got shape {k.shape}; expected ({taps},) or [*batch, {height}, {width}, {taps}] for a window "
            f"of {reach.window[0]} × {reach.window[1]} over probs of shape {maps.shape}"
        )
    _checks.check_finite("filters", k)
    k = k.reshape(1, 1, taps) if k.ndim == 1 else k
    maps = broadcast_to_batch(maps, 3, k.shape[:-3], "probs")
    dtype = jnp.promote_types(maps.dtype, k.dtype)
    maps, k = maps.astype(dtype), k.astype(dtype)
    batch = maps.shape[:-3]
    k = flatten_batch(k, batch, 3)
    maps, k = varying_like((maps, k), maps, k)
    if len(k) == 1:  # a filter is shared by labels, and so by the labels of all images
        x = jnp.moveaxis(flatten_batch(maps, batch, 3), 0, -2)
        message = _compiled_local_convolution(reach, x.reshape(1, height, width, -1), k)
        message = jnp.moveaxis(message.reshape(x.shape), -2, 0)
    else:
        message = _compiled_local_convolution(reach, flatten_batch(maps, batch, 3), k)
    message = message.reshape(maps.shape)
    return maps * message if multiply_center else message


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local_convolution(reach: Reach, x: Array, k: Array) -> Array:
    """The sums of `[batch, height, width, labels]` by `[batch, height, width, taps]` or `[1, 1, 1, taps]`."""

    def run(by_row: bool) -> Callable[..., Array]:
        return sequential_vmap(lambda x, k: _tap_by_tap(reach, by_row, x, k))

    return by_platform(x, k, cpu=run(True), accelerator=run(False))


def _local_convolution_fwd(reach: Reach, x: Array, k: Array) -> tuple[Array, tuple[Array, Array]]:
    return _local_convolution(reach, x, k), (x, k)


def _local_convolution_bwd(reach: Reach, operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    def run(by_row: bool) -> Callable[..., tuple[Array, Array]]:
        return sequential_vmap(lambda x, k, g: _tap_by_tap_transposed(reach, by_row, x, k, g))

    return by_platform(*operands, g, cpu=run(True), accelerator=run(False))


_local_convolution.defvjp(_local_convolution_fwd, _local_convolution_bwd)

# Compiled here, so that calls outside any `jit` compile once per shape.
_compiled_local_convolution = jax.jit(_local_convolution, static_argnums=0)


class _Walk(NamedTuple):
    """Blocks of whole rows, and in each the taps of the window.

    On a CPU a block is one row, so that what is summed stays in the cache; on an accelerator all rows of an image, so
    that every tap is one large operation.
    """

    reach: Reach
    shape: tuple[int, ...]  # [batch, height, width]
    rows: int

    @classmethod
    def over(cls, reach: Reach, x: Array, by_row: bool) -> "_Walk":
        return cls(reach, x.shape[:-1], 1 if by_row else x.shape[1])

    @property
    def taps(self) -> int:
        return self.reach.window[0] * self.reach.window[1]

    def pad(self, x: Array) -> Array:
        """`[batch, height, width, c]` to `[batch, height, c, width]`, with zeros wherever the window reaches."""
        (top, left), (bottom, right) = self.reach
        return jnp.pad(rows_first(x), ((0, 0), (top, bottom), (0, 0), (left, right)))

    def starts(self) -> Array:
        """Image and first row of every block."""
        batch, height, _ = self.shape
        image, row = np.meshgrid(np.arange(batch), np.arange(0, height, self.rows), indexing="ij")
        return jnp.asarray(np.stack([image.ravel(), row.ravel()], -1), jnp.int32)

    def corner(self, start: Array, tap: Array | None = None) -> tuple[Array, ...]:
        """Where the block begins in padded maps, seen through a tap; None is the centre."""
        if tap is None:
            dy, dx = (jnp.int32(n) for n in self.reach.before)
        else:
            dy, dx = self._step(tap)
        zero = jnp.int32(0)
        return start[0], start[1] + dy, zero, dx

    def _step(self, tap: Array) -> tuple[Array, Array]:
        """Row and column of a tap in the window."""
        tap, width = (
            jnp.asarray(tap, jnp.int32),
            jnp.int32(self.reach.window[1]),
        )  # under x64 a loop counts in int64
        return lax.div(tap, width), lax.rem(tap, width)

    def slice(self, padded: Array, corner: tuple[Array, ...]) -> Array:
        """`[rows, c, width]` of padded maps."""
        return lax.dynamic_slice(padded, corner, (1, self.rows, padded.shape[2], self.shape[2]))[0]

    def filters(self, k: Array, start: Array) -> Array:
        """The block's filters as `[taps, rows, 1, width]`, or `[taps, 1, 1, 1]` where all pixels share one."""
        if k.shape[1:3] == (1, 1):
            k = k[0]
        else:
            zero = jnp.int32(0)
            k = lax.dynamic_slice(k, (start[0], start[1], zero, zero), (1, self.rows, *k.shape[2:]))[0]
        return jnp.moveaxis(k, -1, 0)[:, :, None]

    def position_distance(self, tap: Array, dtype: Any) -> Array:
        """The squared distance of a tap's pixel, in pixels."""
        dy, dx = (n - before for n, before in zip(self._step(tap), self.reach.before, strict=True))
        return (dy * dy + dx * dx).astype(dtype)

    def collect(self, blocks: Array) -> Array:
        """Stacked blocks `[blocks, rows, c, width]` to `[batch, height, width, c]`."""
        return jnp.moveaxis(blocks.reshape(*self.shape[:2], *blocks.shape[2:]), -2, -1)


def _tap_by_tap(reach: Reach, by_row: bool, x: Array, k: Array) -> Array:
    x, k = varying_like((x, k), x, k)
    walk = _Walk.over(reach, x, by_row)
    padded = walk.pad(x)

    def block(start: Array) -> Array:
        filters = walk.filters(k, start)

        def tap(t: Array, total: Array) -> Array:
            return total + filters[t] * walk.slice(padded, walk.corner(start, t))

        total = jnp.zeros((walk.rows, x.shape[-1], x.shape[2]), x.dtype)
        return lax.fori_loop(0, walk.taps, tap, varying_like(total, x))

    return walk.collect(lax.map(block, walk.starts()))


def _tap_by_tap_transposed(reach: Reach, by_row: bool, x: Array, k: Array, g: Array) -> tuple[Array, Array]:
    x, k, g = varying_like((x, k, g), x, k, g)
    walk = _Walk.over(reach, x, by_row)
    padded, shared = walk.pad(x), k.shape[1:3] == (1, 1)
    g = rows_first(g)

    def block(sent: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], Array | None]:
        filters = walk.filters(k, start)
        zero = jnp.int32(0)
        received = walk.slice(g, (start[0], start[1], zero, zero))

        def tap(gradient: Array, t: Array) -> tuple[Array, Array]:
            corner = walk.corner(start, t)
            agreement = jnp.sum(received * walk.slice(padded, corner), 1)
            total = walk.slice(gradient, corner) + filters[t] * received
            return lax.dynamic_update_slice(gradient, total[None], corner), (
                agreement.sum() if shared else agreement
            )

        gradient, of_filters = lax.scan(tap, sent[0], jnp.arange(walk.taps))
        if shared:
            return (gradient, sent[1] + of_filters), None
        return (gradient, sent[1]), jnp.moveaxis(of_filters, 0, -1)

    zeros = varying_like((jnp.zeros_like(padded), jnp.zeros((walk.taps,), x.dtype)), x)
    (gradient, of_shared), of_filters = lax.scan(block, zeros, walk.starts())
    (top, left), (height, width) = reach.before, x.shape[1:3]
    gradient = jnp.moveaxis(gradient[:, top : top + height, :, left : left + width], -2, -1)
    return gradient, (of_shared if of_filters is None else of_filters).reshape(k.shape)


def stream_taps(
    reach: Reach,
    wanted: Wanted,
    by_row: bool,
    x: Array,
    image: Array,
    weights: Array,
    partner: Array | None,
) -> Streamed:
    """One pass over the windows for the quadratic distance, tap by tap.

    Args:
        reach: of the window.
        wanted: what is to be found.
        by_row: whether blocks are rows, or whole images.
        x: `[batch, height, width, labels]`.
        image: `[batch, height, width, channels]`.
        weights: of the squared distances of colours and of positions, `[2]`.
        partner: shaped like `x`; needed for all but the message.

    Returns:
        What was found.
    """
    walk = _Walk.over(reach, x, by_row)
    maps, colours = walk.pad(x), walk.pad(image)
    partners = None if partner is None else walk.pad(partner)
    like = (x, image, weights, partner)

    def block(start: Array) -> Streamed:
        here = walk.slice(colours, walk.corner(start))
        received = None if partners is None else walk.slice(partners, walk.corner(start))

        def tap(t: Array, found: Streamed) -> Streamed:
            there = walk.slice(maps, walk.corner(start, t))
            difference = here - walk.slice(colours, walk.corner(start, t))
            colour, position = jnp.sum(difference**2, 1), walk.position_distance(t, x.dtype)
            message, pull, distances = found
            if message is not None:
                message = message + (weights[0] * colour + weights[1] * position)[:, None] * there
            if received is not None:
                agreement = jnp.sum(received * there, 1)
                if pull is not None:
                    pull = pull + agreement[:, None] * difference
                if distances is not None:
                    distances = distances + jnp.stack([agreement * colour, agreement * position])
            return Streamed(message, pull, distances)

        def zeros(wanted: bool, *shape: int) -> Array | None:
            return jnp.zeros(shape, x.dtype) if wanted else None

        start_from = Streamed(
            zeros(wanted.message, walk.rows, x.shape[-1], x.shape[2]),
            zeros(wanted.pull, *here.shape),
            zeros(wanted.distances, 2, here.shape[0], here.shape[2]),
        )
        found = lax.fori_loop(0, walk.taps, tap, varying_like(start_from, like))
        return found._replace(distances=None if found.distances is None else found.distances.sum((1, 2)))

    found = lax.map(block, walk.starts())
    return Streamed(
        None if found.message is None else walk.collect(found.message),
        None if found.pull is None else walk.collect(found.pull),
        None if found.distances is None else found.distances.sum(0),
    )
