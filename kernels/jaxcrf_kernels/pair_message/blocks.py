"""The pixels of an image in blocks, and which pairs of blocks a message must visit: what the kernels share.

The pixels of a block are neighbours in the image, so that their features lie close together, and the box around
these says how small the kernel values between two blocks are. Blocks at the border are filled up with copies of
its pixels, which leaves boxes as they are and values finite, and with zeros where maps are concerned: such pixels
send nothing, what they receive is dropped, and no kernel needs a mask.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcrf_kernels._bank import Operands
from jaxcrf_kernels.pair_message.reference import PairConfig

# Above this squared distance of the features `exp(-½ d²)` is below 2^-126, the smallest number that float32
# holds in full; units that compute exponentials fast return zero there. The margin is for the rounding of sums.
EXACT_LIMIT = 2 * 126 * math.log(2) * (1 + 1e-3)

# exp(-½ d²) = 2^(HALF_LOG2E d²).
HALF_LOG2E = -0.5 * math.log2(math.e)


class Blocks(NamedTuple):
    """How the pixels are cut into blocks.

    Attributes:
        spatial: pixels along every axis.
        block: a block's pixels along every axis, powers of two.
        group: consecutive blocks that a program receives messages for.
    """

    spatial: tuple[int, ...]
    block: tuple[int, ...]
    group: int

    @classmethod
    def of(cls, spatial: tuple[int, ...], size: int, group: int) -> "Blocks":
        """Cuts an image into blocks of `size` pixels, as cubic as they can be and no longer than the image."""
        block = [1] * len(spatial)
        while math.prod(block) < size:
            growing = [a for a, n in enumerate(spatial) if block[a] < n] or [len(spatial) - 1]
            # The last axis first: its pixels are neighbours in memory.
            block[min(growing, key=lambda a: (block[a], -a))] *= 2
        return cls(spatial, tuple(block), group)

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks along every axis."""
        return tuple(math.ceil(n / b) for n, b in zip(self.spatial, self.block, strict=True))

    @property
    def size(self) -> int:
        """Pixels of a block."""
        return math.prod(self.block)

    @property
    def groups(self) -> int:
        """How many groups of blocks there are."""
        return math.ceil(math.prod(self.grid) / self.group)

    @property
    def number(self) -> int:
        """How many blocks there are, with those that fill the last group."""
        return self.groups * self.group

    @property
    def pixels(self) -> int:
        """How many pixels there are, with those that fill the blocks."""
        return self.number * self.size

    def arrange(self, x: Array, *, channels_last: bool = False, copies: bool = False) -> Array:
        """Puts the pixels in order of their blocks.

        Args:
            x: `[batch, pixels, channels]`.
            channels_last: whether channels stay the last axis.
            copies: whether blocks are filled with copies of pixels, or with zeros.

        Returns:
            `[batch, channels, pixels of all blocks]`, or with the last axes swapped.
        """
        mode: Any = {"mode": "edge"} if copies else {}
        axes = len(self.spatial)
        x = x.reshape(x.shape[0], *self.spatial, x.shape[-1])
        pad = [(0, g * b - n) for g, b, n in zip(self.grid, self.block, self.spatial, strict=True)]
        x = jnp.pad(x, [(0, 0), *pad, (0, 0)], **mode)
        x = x.reshape(x.shape[0], *itertools.chain(*zip(self.grid, self.block, strict=True)), x.shape[-1])
        x = x.transpose(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
        x = x.reshape(x.shape[0], math.prod(self.grid), self.size, x.shape[-1])
        x = jnp.pad(x, [(0, 0), (0, self.number - x.shape[1]), (0, 0), (0, 0)], **mode)
        x = x.reshape(x.shape[0], self.pixels, x.shape[-1])
        return x if channels_last else jnp.swapaxes(x, 1, 2)

    def arrange_maps(self, x: Array, labels: int, precision: str, *, channels_last: bool = False) -> Array:
        """Puts maps in order, filled up with zeros to a number of labels, in the type that they are multiplied in."""
        # Rounded here, once, rather than in every step; it halves what these read.
        x = x.astype(jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
        return self.arrange(
            jnp.pad(x, [(0, 0), (0, 0), (0, labels - x.shape[-1])]), channels_last=channels_last
        )

    def collect(self, x: Array) -> Array:
        """The inverse of `arrange` with `channels_last`: `[batch, pixels, channels]` without the filling."""
        axes = len(self.spatial)
        x = x[:, : math.prod(self.grid) * self.size]
        x = x.reshape(x.shape[0], *self.grid, *self.block, x.shape[-1])
        x = x.transpose(0, *itertools.chain(*((1 + a, 1 + axes + a) for a in range(axes))), 1 + 2 * axes)
        shape = [g * b for g, b in zip(self.grid, self.block, strict=True)]
        x = x.reshape(x.shape[0], *shape, x.shape[-1])[(slice(None), *(slice(n) for n in self.spatial))]
        return x.reshape(x.shape[0], math.prod(self.spatial), x.shape[-1])

    def coordinates(self) -> Array:
        """Where pixels lie, `[axes, pixels of all blocks]`, in float32: whole numbers below 2^24 are exact."""
        axes = range(len(self.spatial))
        grid = jnp.stack([lax.broadcasted_iota(jnp.float32, self.spatial, a) for a in axes], -1)
        return self.arrange(grid.reshape(1, -1, len(axes)), copies=True)[0]

    def boxes(self, features: Array) -> tuple[Array, Array]:
        """The least and the greatest of every feature in every block, `[batch, features, blocks]`."""
        tiles = features.reshape(*features.shape[:2], self.number, self.size)
        return tiles.min(-1), tiles.max(-1)


def active(
    blocks: Blocks,
    features: Array,
    sizes: tuple[int, ...],
    *,
    tolerance: float,
    senders: Array | None = None,
) -> list[Array]:
    """Finds which kernels count between groups of receivers and blocks of senders.

    Args:
        blocks: how pixels are cut.
        features: of all kernels side by side, `[batch, features, pixels of all blocks]`.
        sizes: how many features each kernel has.
        tolerance: kernel values below it may be left out; 0 leaves out what float32 does not hold in full.
        senders: the blocks in question, `[groups, candidates]`; None for all.

    Returns:
        Per kernel `[batch, groups, candidates]`, False where all values are too small. Not-a-number counts.
    """
    limit = EXACT_LIMIT if tolerance == 0 else min(EXACT_LIMIT, -2 * math.log(tolerance))
    low, high = blocks.boxes(features)
    grouped = (*low.shape[:2], blocks.groups, 1, blocks.group)
    low_receiver, high_receiver = low.reshape(grouped).min(-1), high.reshape(grouped).max(-1)
    low_sender, high_sender = (x[:, :, None] if senders is None else x[:, :, senders] for x in (low, high))
    found, begin = [], 0
    shape = (low.shape[0], blocks.groups, low_sender.shape[-1])
    for size in sizes:
        square = jnp.zeros(shape, jnp.float32)
        for d in range(begin, begin + size):
            below, above = low_sender[:, d] - high_receiver[:, d], low_receiver[:, d] - high_sender[:, d]
            gap = jnp.maximum(jnp.maximum(below, above), 0)
            square = square + gap * gap
        found.append(jnp.logical_not(square > limit))
        begin += size
    return found


def neighbours(blocks: Blocks, cutoff: tuple[int, ...]) -> tuple[Array, Array]:
    """The blocks within a cut-off of every block, and which of these entries lie inside the image.

    Args:
        blocks: with groups of one block.
        cutoff: the largest distance of a pair of pixels along every axis.

    Returns:
        `[groups, candidates]` indices and flags. Computed rather than stored: a table would be a constant of
        the program.
    """
    assert blocks.group == 1
    sides = zip(cutoff, blocks.block, blocks.grid, strict=True)
    reach = [min(math.ceil(c / b), n - 1) for c, b, n in sides]
    offsets = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))), np.int32)
    strides = np.cumprod((1, *blocks.grid[:0:-1]))[::-1]
    index = lax.iota(jnp.int32, blocks.number)
    sender = jnp.zeros((blocks.number, len(offsets)), jnp.int32)
    inside = jnp.ones(sender.shape, bool)
    for a, n in enumerate(blocks.grid):
        place = lax.rem(lax.div(index, jnp.int32(strides[a])), jnp.int32(n))[:, None] + offsets[None, :, a]
        inside = inside & (place >= 0) & (place < n)
        sender = sender + jnp.clip(place, 0, n - 1) * jnp.int32(strides[a])
    return sender, inside


class Visits(NamedTuple):
    """Which blocks send to every group of receivers, sorted by which kernels count there.

    Attributes:
        senders: `[batch, groups, candidates]` indices of blocks.
        begins: `[batch, groups, sorts + 1]`: where every sort begins and ends in `senders`. Sort `m` is of the
            blocks where kernel `m` alone counts; a last one, if there are several kernels, where more do.
    """

    senders: Array
    begins: Array


def visits(
    blocks: Blocks,
    features: Array,
    sizes: tuple[int, ...],
    *,
    tolerance: float,
    cutoff: tuple[int, ...] | None,
) -> Visits:
    """Lists the pairs of blocks that count. Arguments as in `active`, and the cut-off of the pixels."""
    senders, inside = (None, None) if cutoff is None else neighbours(blocks, cutoff)
    flags = active(blocks, features, sizes, tolerance=tolerance, senders=senders)
    if inside is not None:
        flags = [flag & inside for flag in flags]
    number = jnp.sum(jnp.stack(flags), axis=0, dtype=jnp.int32)
    sorts = [flag & (number == 1) for flag in flags]
    if len(flags) > 1:
        sorts.append(number > 1)
    # A counting sort. The places of what is left out are after all others, so that every place is taken once.
    sorts.append(number == 0)
    place = jnp.zeros(flags[0].shape, jnp.int32)
    begin = jnp.zeros((*place.shape[:2], 1), jnp.int32)
    begins = []
    for members in sorts:
        begins.append(begin)
        rank = jnp.cumsum(members, axis=-1, dtype=jnp.int32)
        place = jnp.where(members, begin + rank - 1, place)
        begin = begin + rank[..., -1:]
    batch, groups, candidates = place.shape
    if senders is None:
        senders = lax.broadcasted_iota(jnp.int32, (groups, candidates), 1)
    rows = lax.broadcasted_iota(jnp.int32, (batch * groups, candidates), 0)
    listed = (
        jnp.zeros((batch * groups, candidates), jnp.int32)
        .at[rows, place.reshape(rows.shape)]
        .set(
            jnp.broadcast_to(senders, place.shape).reshape(rows.shape),
            unique_indices=True,
            mode="promise_in_bounds",
        )
    )
    return Visits(listed.reshape(place.shape), jnp.concatenate(begins, axis=-1))


def feature_offsets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where the features of every kernel begin among those of all."""
    return tuple(sum(sizes[:m]) for m in range(len(sizes)))


def counted_kernels(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """The kernels that count in every sort of a pair of blocks: one alone, or all where several do."""
    kernels = tuple(range(len(sizes)))
    return [(m,) for m in kernels] + ([kernels] if len(kernels) > 1 else [])


def beyond_limits(
    config: PairConfig, operands: Operands, *, max_kernels: int, max_features: int, wide_types: str
) -> str | None:
    """What of a call kernels of such limits do not do, and why not types of 64 bits, or None."""
    wide = [x.dtype for x in jax.tree.leaves(operands) if x.dtype.itemsize > 4]
    if wide:
        return f"{wide[0]}, {wide_types}"
    if len(operands.features) > max_kernels:
        return f"{len(operands.features)} kernels; it takes up to {max_kernels}"
    number = sum(f.shape[-1] for f in operands.features)
    if number > max_features:
        return f"{number} features; it takes up to {max_features}"
    if max(config.spatial, default=0) >= 2**24:
        return f"{max(config.spatial)} pixels along an axis; it takes fewer than 2^24"
    return None
