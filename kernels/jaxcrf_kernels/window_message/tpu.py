"""The window message on TPUs, by Pallas' Mosaic.

A core holds a tile of the map, all columns of which lie along the 128 lanes, and walks over the window with the
offset along columns outermost. One such offset takes two steps:

1. Kernel values of eight rows at a time, so that whole registers of pixels go through the exponential unit. The
   eight are not neighbours but lie a stripe apart, one from each of the eight stripes that a tile's rows are cut
   into: an offset along rows is then another address here too, where neighbours would have to move across
   sublanes. Every stripe holds its own halo; features are few, so that these copies cost little.
2. Row by row, the sum over the remaining offsets of values times labels, held in registers: labels lie along the
   sublanes, an offset along rows or depth is another address, and a value is broadcast to all labels.

Lanes can only be rotated. So everything belongs to the column `j` of the *sender* until the sum of a column
offset is complete; what belongs to the receiver is rotated to it once per offset, and the sum is rotated back.
Rotation wraps, which only spoils the outermost columns of a tile: tiles overlap by the window's width, and the
spoilt columns are dropped.

Slices of the window along depth, and parts of it along rows where it is so large that a tile with its halo would not
fit into the vector memory, are steps of the grid: they add to the same result, which stays in place.

The backward pass has the same two steps in the other order. The products of labels, `A = ⟨g_i, q_j⟩` and
`B = ⟨q_i, g_j⟩`, come first, row by row; gradients follow from them and the kernel values, eight rows at a time.
Every pixel gathers its own gradient, and the gradient of a weight leaves as one map, whose sum is taken outside.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcrf_kernels._bank import Needs, Operands
from jaxcrf_kernels._varying import result_like
from jaxcrf_kernels.window_message.reference import WindowConfig
from jaxcrf_kernels.window_message.volume import (
    EVERYTHING,
    Bank,
    as_volume,
    named_gradients,
    product,
    stacked_maps,
    unsupported_type,
)

LANES = 128
SUBLANES = 8  # of 32 bits

# What a tile may take of the vector memory: 16 MiB are what the compiler grants without being asked, and some of
# that goes to values that do not fit into registers.
VMEM_BYTES = 12 * 2**20

# Registers, of the 64 that a core has, that may hold the labels of a row: the sum of the forward pass, or the
# receiver's cotangent and q of the backward pass. Reasoned, not measured.
REGISTERS = 32

# Vector operations on a number that take the time of moving a byte: 6 T/s and 0.8 TB/s are the data sheet's of a v5e.
OPERATIONS_PER_BYTE = 7

# Offsets along rows that a loop's body holds: instructions of neighbouring offsets overlap, and a body of a dozen
# offsets is still short. Reasoned, not measured.
UNROLLED_ROWS = 13


class Tile(NamedTuple):
    """The part of a map that a step of the grid works on.

    Attributes:
        rows: of the result, a multiple of 8; the window's halo comes on top.
        columns: with the halo, a multiple of 128.
        labels: of q, a multiple of 8 (of 16 where q has 16 bits).
        offsets: of the window along rows, which a step of the grid adds up.
    """

    rows: int
    columns: int
    labels: int
    offsets: int

    @property
    def stripe(self) -> int:
        """Neighbouring rows that lie in the same sublane."""
        return self.rows // SUBLANES


class Shapes(NamedTuple):
    """What the choice of a tile depends on.

    Attributes:
        pixels: along depth, rows and columns.
        window: offsets along these.
        labels: of q.
        itemsize: bytes of a number of q.
        maps: features and scales per pixel.
        values: kernels that take an exponential.
        gradients: numbers per pixel that the backward pass finds, 0 for the forward pass.
    """

    pixels: tuple[int, int, int]
    window: tuple[int, int, int]
    labels: int
    itemsize: int
    maps: int
    values: int
    gradients: int = 0

    @property
    def halo(self) -> tuple[int, int, int]:
        """How far the window reaches to either side."""
        depth, rows, columns = (k // 2 for k in self.window)
        return depth, rows, columns


def vmem_bytes(shapes: Shapes, tile: Tile) -> int:
    """The vector memory that a tile takes: two buffers of what is moved, one of what is kept."""
    moved, kept = _traffic(shapes, tile)
    return 2 * moved + kept


def _traffic(shapes: Shapes, tile: Tile) -> tuple[int, int]:
    """Bytes that a tile moves, and that it keeps."""
    pixels, eight = 4 * tile.rows * tile.columns, 4 * SUBLANES * tile.columns
    halo = tile.offsets - 1
    # The maps of the receivers, and those of the senders; likewise q, and in the backward pass its cotangent.
    maps = shapes.maps * (2 * pixels + halo * eight)
    sources = (tile.rows + halo) * tile.labels * tile.columns * shapes.itemsize
    if shapes.gradients:
        sources = 2 * sources + 2 * tile.rows * tile.labels * tile.columns * shapes.itemsize
        return sources + maps + shapes.gradients * pixels, (2 * tile.offsets + shapes.gradients) * eight
    result = tile.rows * tile.labels * tile.columns * shapes.itemsize
    return sources + maps + result, tile.offsets * eight + tile.labels * pixels


@functools.lru_cache(maxsize=256)
def configuration(shapes: Shapes) -> Tile | None:
    """The tile that takes the least work, or None where not even the smallest one fits.

    A kernel value takes about 12 operations and 3 for each of its features, a label of a pair 2 (4 in the backward
    pass with its two products), and a byte that is moved as long as 7 of them. Halos and padding count like pixels,
    and everything but the labels is paid again for every block of labels. Reasoned, not measured.
    """
    depth, rows, columns = shapes.window
    halo = shapes.halo[2]
    step = SUBLANES * 4 // shapes.itemsize
    narrowest = _up(2 * halo + 1, LANES)
    tiles = {
        Tile(height, width, _up(math.ceil(shapes.labels / blocks), step), math.ceil(rows / parts))
        for height in (8, 16, 32, 64)
        for width in range(narrowest, narrowest + 8 * LANES, LANES)
        for blocks in range(1, math.ceil(shapes.labels / step) + 1)
        for parts in {1, 3, *(2**n for n in range(rows.bit_length()))}
    }
    per_label, held = (4, 2) if shapes.gradients else (2, 1)

    def fits(tile: Tile) -> bool:
        return vmem_bytes(shapes, tile) <= VMEM_BYTES

    def cost(tile: Tile) -> tuple[float, ...]:
        useful = tile.columns - 2 * halo
        steps = math.ceil(shapes.pixels[1] / tile.rows) * math.ceil(shapes.pixels[2] / useful)
        steps *= math.ceil(shapes.labels / tile.labels) * math.ceil(rows / tile.offsets) * depth
        per_pair = tile.labels * per_label + 3 * shapes.maps + 12 * shapes.values + 3 * shapes.gradients
        pairs = tile.rows * tile.columns * tile.offsets * columns
        registers = held * (tile.labels // SUBLANES) * (tile.columns // LANES)
        spilled = max(1.0, registers / REGISTERS)
        work = pairs * per_pair * spilled + OPERATIONS_PER_BYTE * _traffic(shapes, tile)[0]
        return (steps * work, *tile)

    return min(filter(fits, tiles), key=cost, default=None)


def _shapes(bank: Bank, q: Array, wanted: Needs | None = None) -> Shapes:
    """What the forward pass, or the backward pass where gradients are wanted, is about."""
    depth, rows, columns = (*(1,) * (5 - q.ndim), *q.shape[1:-1])
    return Shapes(
        pixels=(depth, rows, columns),
        window=bank.window,
        labels=q.shape[-1],
        itemsize=2 if q.dtype == jnp.bfloat16 else 4,
        maps=bank.maps,
        values=sum(size > 0 for size in bank.sizes),
        gradients=0 if wanted is None else bank.gradients(wanted),
    )


def _spans(bank: Bank, tile: Tile) -> tuple[int, int, int]:
    """The window's offsets along every axis, those along rows filled up to whole parts."""
    depth, rows, columns = bank.window
    return depth, _up(rows, tile.offsets), columns


def unsupported(config: WindowConfig, operands: Operands) -> str | None:
    """Says in words what of a call this implementation does not do, or None."""
    reason = unsupported_type(operands)
    if reason is not None:
        return reason
    bank = Bank.of(config, operands)
    shapes = (_shapes(bank, operands.q), _shapes(bank, operands.q, bank.streamed(EVERYTHING)))
    if None in map(configuration, shapes):
        return f"a window of {'×'.join(map(str, config.filter_size))}, whose tiles exceed the vector memory"
    return None


def forward(config: WindowConfig, operands: Operands, *, interpret: bool = False) -> Array:
    """Computes the message of `window_message`, its arguments already checked."""
    bank = Bank.of(config, operands)
    tile = configuration(_shapes(bank, operands.q))
    with jax.enable_x64(False):  # or loops and index maps would count in 64 bits
        return _forward(bank, tile, interpret, operands)


def gradients(
    config: WindowConfig, wanted: Needs, operands: Operands, cotangent: Array, *, interpret: bool = False
) -> dict[str, Any]:
    """Finds the gradients that are wanted, as the reference does."""
    bank = Bank.of(config, operands)

    def stream(wanted: Needs) -> Array:
        tile = configuration(_shapes(bank, operands.q, wanted))
        with jax.enable_x64(False):
            return _backward(bank, wanted, tile, interpret, operands, cotangent)

    return named_gradients(bank, wanted, operands, stream)


class _Grid(NamedTuple):
    """How the pixels of a volume are cut into tiles, and how arrays are laid out for that.

    The axes of the grid are the batch, tiles along columns, slices along depth, tiles along rows, blocks of labels,
    and the window's offsets along depth and parts along rows.
    """

    tile: Tile
    bank: Bank
    batch: int
    pixels: tuple[int, int, int]
    labels: int

    @classmethod
    def of(cls, tile: Tile, bank: Bank, volume: Array) -> "_Grid":
        batch, depth, rows, columns, labels = volume.shape
        return cls(tile, bank, batch, (depth, rows, columns), labels)

    @property
    def useful(self) -> int:
        """The columns of a tile that do not belong to its halo."""
        return self.tile.columns - 2 * self.bank.halo[2]

    @property
    def steps(self) -> tuple[int, ...]:
        """The length of every axis."""
        depth, rows, columns = self.pixels
        return (
            self.batch,
            math.ceil(columns / self.useful),
            depth,
            math.ceil(rows / self.tile.rows),
            math.ceil(self.labels / self.tile.labels),
            self.bank.window[0],
            math.ceil(self.bank.window[1] / self.tile.offsets),
        )

    @property
    def halo_rows(self) -> int:
        """The rows that the window reaches beyond those of a tile."""
        return _spans(self.bank, self.tile)[1] - 1

    def _padded(self, x: Array) -> Array:
        """`[batch, depth, rows, c, columns]` to overlapping tiles `[batch, tiles, depth, rows, c, tile columns]`."""
        count = self.steps[1]
        depth, above, before = self.bank.halo
        below = self.steps[3] * self.tile.rows + self.halo_rows - above - x.shape[2]
        after = (count - 1) * self.useful + self.tile.columns - before - x.shape[-1]
        x = jnp.pad(x, [(0, 0), (depth, depth), (above, below), (0, 0), (before, after)])
        starts = [n * self.useful for n in range(count)]
        return jnp.stack([x[..., n : n + self.tile.columns] for n in starts], axis=1)

    def labelled(self, x: Array) -> Array:
        """`[batch, depth, rows, columns, labels]` to `[batch, tiles, depth, rows, labels, columns]` with halos."""
        more = self.steps[4] * self.tile.labels - self.labels
        return self._padded(jnp.pad(jnp.moveaxis(x, -1, -2), [(0, 0)] * 3 + [(0, more), (0, 0)]))

    def mapped(self, x: Array) -> Array:
        """`[batch, depth, rows, columns, maps]` to `[batch, tiles, depth, tiles, maps, rows, 8, columns]`, likewise.

        The axis of eight has the stripes, the one before it a stripe's rows with their halo.
        """
        x = jnp.moveaxis(self._padded(jnp.moveaxis(x, -1, -2)), 4, 3)
        count, stripe = self.steps[3], self.tile.stripe
        taken = np.arange(stripe + self.halo_rows)[:, None] + np.arange(count * SUBLANES) * stripe
        x = x[..., taken, :]  # [batch, tiles, depth, maps, rows, stripes, columns]
        x = x.reshape(*x.shape[:-2], count, SUBLANES, x.shape[-1])
        return jnp.moveaxis(x, -3, 3)

    def collected(self, x: Array) -> Array:
        """`[batch, tiles, depth, rows, channels, columns]` to `[batch, depth, rows, columns, channels]`."""
        before = self.bank.halo[2]
        x = jnp.moveaxis(x[..., before : before + self.useful], (1, -1), (3, 4))
        x = x.reshape(*x.shape[:3], -1, x.shape[-1])
        return x[:, :, : self.pixels[1], : self.pixels[2]]

    def receiving_labels(self) -> pl.BlockSpec:
        """Of `labelled`, a tile without its halo."""
        tile, (depth, above, _) = self.tile, self.bank.halo
        block = [pl.Element(n) for n in (tile.rows, tile.labels, tile.columns)]
        return pl.BlockSpec(
            (None, None, None, *block),
            lambda b, x, z, y, l, dz, part: (b, x, z + depth, y * tile.rows + above, l * tile.labels, 0),
        )

    def sending_labels(self) -> pl.BlockSpec:
        """Of `labelled`, what a tile sees of one slice of the window and one part of its rows."""
        tile = self.tile
        block = [pl.Element(n) for n in (tile.rows + tile.offsets - 1, tile.labels, tile.columns)]
        return pl.BlockSpec(
            (None, None, None, *block),
            lambda b, x, z, y, l, dz, part: (
                *(b, x, z + dz),
                y * tile.rows + part * tile.offsets,
                *(l * tile.labels, 0),
            ),
        )

    def receiving_maps(self, maps: Array) -> pl.BlockSpec:
        """Of `mapped`, a tile without its halo."""
        tile, (depth, above, _) = self.tile, self.bank.halo
        block = [pl.Element(n) for n in (maps.shape[4], tile.stripe, SUBLANES, tile.columns)]
        return pl.BlockSpec(
            (None, None, None, None, *block),
            lambda b, x, z, y, l, dz, part: (b if len(maps) > 1 else 0, x, z + depth, y, 0, above, 0, 0),
        )

    def sending_maps(self, maps: Array) -> pl.BlockSpec:
        """Of `mapped`, what a tile sees of one slice of the window and one part of its rows."""
        tile = self.tile
        block = [
            pl.Element(n) for n in (maps.shape[4], tile.stripe + tile.offsets - 1, SUBLANES, tile.columns)
        ]
        return pl.BlockSpec(
            (None, None, None, None, *block),
            lambda b, x, z, y, l, dz, part: (
                *(b if len(maps) > 1 else 0, x, z + dz, y, 0),
                part * tile.offsets,
                *(0, 0),
            ),
        )

    def call(
        self,
        kernel: Callable[..., None],
        operands: list[tuple[Array, pl.BlockSpec]],
        result: jax.ShapeDtypeStruct,
        spec: pl.BlockSpec,
        scratch: list[tuple[int, ...]],
        interpret: bool,
        name: str,
    ) -> Array:
        """Runs a kernel whose result is added up over the last three axes."""
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid=self.steps,
            in_specs=[spec for _, spec in operands],
            out_specs=spec,
            out_shape=result,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4 + ("arbitrary",) * 3),
            interpret=interpret,
            name=name,
        )(*(array for array, _ in operands))


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _bank_operands(grid: _Grid, operands: Operands) -> list[tuple[Array, pl.BlockSpec]]:
    """The table, and the maps of the receivers and of the senders where there are any."""
    # Per kernel its weight, then its position terms. Two axes, because `vmap` adds one in front, and only the
    # last two may be taken whole.
    positions = grid.bank.positions(_spans(grid.bank, grid.tile))
    weights = operands.weights
    terms = jnp.concatenate([weights[:, None].astype(jnp.float32), positions], axis=1).reshape(1, -1)
    table = (terms, pl.BlockSpec(memory_space=pltpu.SMEM))
    maps = stacked_maps(operands.features, operands.left, operands.right)
    if maps is None:
        return [table]
    maps = grid.mapped(maps)
    return [table, (maps, grid.receiving_maps(maps)), (maps, grid.sending_maps(maps))]


def _loop(count: int, body: Callable[[Any], None]) -> None:
    """Runs `body` for its effects."""
    lax.fori_loop(0, count, lambda n, _: body(n), None)


def _over_rows(count: int, body: Callable[[Any, Any], Any], carry: Any = None) -> Any:
    """Folds `body(offset, carry)` over the offsets along rows."""
    return lax.fori_loop(0, count, body, carry, unroll=min(count, UNROLLED_ROWS))


class _Offset(NamedTuple):
    """What eight rows of senders and one offset of the window have in common, in the columns of the senders.

    Attributes:
        grid: what is static.
        table: the weights and position terms, in scalar memory.
        offset: along depth, rows and columns, counted from 0.
        receiver: all maps of the receiving pixels, `[8, columns]` each.
        sender: all maps of the sending pixels, likewise.
    """

    grid: _Grid
    table: Any
    offset: tuple[Any, Any, Any]
    receiver: list[Array]
    sender: list[Array]

    def weight(self, m: int) -> Array:
        return self.table[0, m * (1 + sum(_spans(self.grid.bank, self.grid.tile)))]

    def differences(self, m: int) -> list[Array]:
        """Of the features of kernel `m`, receiver less sender."""
        return [self.receiver[n] - self.sender[n] for n in self.grid.bank.feature_maps(m)]

    def value(self, m: int, differences: list[Array]) -> Array:
        """Kernel `m` without its weight and its scales: a scalar where it has no features."""
        bank = self.grid.bank
        spans = _spans(bank, self.grid.tile)
        start = m * (1 + sum(spans)) + 1
        factors = []
        for size, span, offset in zip(bank.window, spans, self.offset, strict=True):
            if span > size or (span > 1 and bank.bandwidths[m] is not None):
                factors.append(self.table[0, start + offset])
            start += span
        if differences:
            factors.append(jnp.exp(-0.5 * functools.reduce(jnp.add, [d * d for d in differences])))
        return product(*factors) if factors else jnp.float32(1)

    def left(self, pixels: list[Array], m: int) -> list[Array]:
        """The left scale of kernel `m` at given pixels, where there is one."""
        return [pixels[n] for n in self.grid.bank.left_maps(m)]

    def right(self, pixels: list[Array], m: int) -> list[Array]:
        """The right scale, likewise."""
        return [pixels[n] for n in self.grid.bank.right_maps(m)]


def _rotations(grid: _Grid, dx: Any) -> tuple[Any, Any]:
    """By how many lanes a receiver meets its sender at the offset `dx`, and a sender its receiver."""
    halo, columns = grid.bank.halo[2], grid.tile.columns
    return lax.rem(dx + (columns - halo), columns), lax.rem((columns + halo) - dx, columns)


def _position() -> tuple[Any, Any, Any]:
    """The block of labels, the offset along depth and the part of the window of this step."""
    return pl.program_id(4), pl.program_id(5), pl.program_id(6)


def _forward_kernel(grid: _Grid, table: Any, *refs: Any) -> None:
    """Adds a part of the window to a tile of the message; see the head of this file."""
    bank, tile = grid.bank, grid.tile
    receivers, senders, q, out, values, total = refs if bank.maps else (None, None, *refs)
    _, dz, part = _position()

    @pl.when((dz == 0) & (part == 0))
    def clear() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    def eight_rows(first: Any) -> None:
        def one_column(dx: Any) -> None:
            to_sender, to_receiver = _rotations(grid, dx)
            receiver = [pltpu.roll(receivers[c, first], to_sender, 1) for c in range(bank.maps)]

            def evaluate(dy: Any, _: None) -> None:
                sender = [senders[c, first + dy] for c in range(bank.maps)]
                offset = (dz, part * tile.offsets + dy, dx)
                here = _Offset(grid, table, offset, receiver, sender)
                terms = [
                    product(
                        here.weight(m) * here.value(m, here.differences(m)),
                        *here.left(receiver, m),
                        *here.right(sender, m),
                    )
                    for m in range(bank.kernels)
                ]
                values[dy] = jnp.broadcast_to(functools.reduce(jnp.add, terms), values.shape[1:])

            _over_rows(tile.offsets, evaluate)

            def one_row(r: Any) -> None:
                row = r * tile.stripe + first

                def add(dy: Any, found: Array) -> Array:
                    return found + values[dy, pl.ds(r, 1), :] * q[row + dy].astype(jnp.float32)

                found = _over_rows(tile.offsets, add, jnp.zeros(total.shape[1:], jnp.float32))
                total[row] += pltpu.roll(found, to_receiver, 1)

            _loop(SUBLANES, one_row)

        _loop(bank.window[2], one_column)

    _loop(tile.stripe, eight_rows)

    @pl.when((dz == grid.steps[5] - 1) & (part == grid.steps[6] - 1))
    def finish() -> None:
        def store(row: Any) -> None:
            out[row] = total[row].astype(out.dtype)

        _loop(tile.rows, store)


def _backward_kernel(wanted: Needs, grid: _Grid, table: Any, *refs: Any) -> None:
    r"""Adds a part of the window, and a block of labels, to the gradients of a tile.

    With `k_m` the kernel's value, the pair `(i, j)` gives pixel `i`

        ∂f_i  += -w_m k_m (s_i r_j A + s_j r_i B) (f_i - f_j)
        ∂w_m  += k_m s_i r_j A,    ∂s_i += w_m k_m r_j A,    ∂r_i += w_m k_m s_j B.
    """
    bank, tile = grid.bank, grid.tile
    receivers, senders, *sources, out, products, found = refs if bank.maps else (None, None, *refs)
    q_i, q_j, g_i, g_j = sources
    label, dz, part = _position()
    slots = bank.slots(wanted)
    pairs = []
    if wanted.features or wanted.weights or wanted.left:
        pairs.append((0, g_i, q_j))
    if wanted.features or wanted.right:
        pairs.append((1, q_i, g_j))

    @pl.when((label == 0) & (dz == 0) & (part == 0))
    def clear() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    def eight_rows(first: Any) -> None:
        def one_column(dx: Any) -> None:
            to_sender, to_receiver = _rotations(grid, dx)
            receiver = [pltpu.roll(receivers[c, first], to_sender, 1) for c in range(bank.maps)]

            def one_row(r: Any) -> None:
                row = r * tile.stripe + first
                ours = [pltpu.roll(x[row].astype(jnp.float32), to_sender, 1) for _, x, _ in pairs]

                def contract(dy: Any, _: None) -> None:
                    for (n, _, theirs), x in zip(pairs, ours, strict=True):
                        product = x * theirs[row + dy].astype(jnp.float32)
                        products[n, dy, pl.ds(r, 1), :] = jnp.sum(product, axis=0, keepdims=True)

                _over_rows(tile.offsets, contract)

            _loop(SUBLANES, one_row)
            found[...] = jnp.zeros(found.shape, found.dtype)

            def gather(dy: Any, _: None) -> None:
                sender = [senders[c, first + dy] for c in range(bank.maps)]
                offset = (dz, part * tile.offsets + dy, dx)
                here = _Offset(grid, table, offset, receiver, sender)
                a, b = products[0, dy], products[1, dy]
                slot = iter(slots.get("features", ()))
                for m in range(bank.kernels):
                    differences = here.differences(m)
                    value = here.value(m, differences)
                    weighted = here.weight(m) * value
                    s_i, s_j = here.left(receiver, m), here.left(sender, m)
                    r_i, r_j = here.right(receiver, m), here.right(sender, m)
                    if wanted.features and differences:
                        pull = weighted * (product(a, *s_i, *r_j) + product(b, *s_j, *r_i))
                        for difference in differences:
                            found[next(slot)] -= pull * difference
                    if wanted.weights:
                        found[slots["weights"][m]] += product(value * a, *s_i, *r_j)
                    if wanted.left:
                        found[slots["left"][m]] += product(weighted * a, *r_j)
                    if wanted.right:
                        found[slots["right"][m]] += product(weighted * b, *s_j)

            _over_rows(tile.offsets, gather)
            for n in range(found.shape[0]):
                out[n, first] += pltpu.roll(found[n], to_receiver, 1)

        _loop(bank.window[2], one_column)

    _loop(tile.stripe, eight_rows)


# Compiled here rather than by the caller, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    bank: Bank,
    tile: Tile,
    interpret: bool,
    operands: Operands,
) -> Array:
    q = operands.q
    volume = as_volume(q if q.dtype == jnp.bfloat16 else q.astype(jnp.float32))
    grid = _Grid.of(tile, bank, volume)
    batch, x, z, y, l, *_ = grid.steps
    shape = (batch, x, z, y * tile.rows, l * tile.labels, tile.columns)
    found = grid.call(
        _forward_kernel,
        [
            *_bank_operands(grid, operands),
            (grid.labelled(volume), grid.sending_labels()),
        ],
        result_like(shape, volume.dtype, operands),
        pl.BlockSpec(
            (None, None, None, tile.rows, tile.labels, tile.columns),
            lambda b, x, z, y, l, dz, part: (b, x, z, y, l, 0),
        ),
        [(tile.offsets, SUBLANES, tile.columns), (tile.rows, tile.labels, tile.columns)],
        interpret,
        "window_message",
    )
    return grid.collected(found)[..., : q.shape[-1]].reshape(q.shape).astype(q.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _backward(
    bank: Bank,
    wanted: Needs,
    tile: Tile,
    interpret: bool,
    operands: Operands,
    cotangent: Array,
) -> Array:
    q = operands.q
    dtype = q.dtype if q.dtype == jnp.bfloat16 else jnp.float32
    volume, pulled = as_volume(q.astype(dtype)), as_volume(cotangent.astype(dtype))
    grid = _Grid.of(tile, bank, volume)
    count = bank.gradients(wanted)
    batch, x, z, y, *_ = grid.steps
    block = (count, tile.stripe, SUBLANES, tile.columns)
    found = grid.call(
        functools.partial(_backward_kernel, wanted),
        [
            *_bank_operands(grid, operands),
            *(
                (array, spec)
                for array in (grid.labelled(volume), grid.labelled(pulled))
                for spec in (grid.receiving_labels(), grid.sending_labels())
            ),
        ],
        result_like((batch, x, z, y, *block), jnp.float32, operands, cotangent),
        pl.BlockSpec(
            (None, None, None, None, *block), lambda b, x, z, y, l, dz, part: (b, x, z, y, 0, 0, 0, 0)
        ),
        [(2, tile.offsets, SUBLANES, tile.columns), (count, SUBLANES, tile.columns)],
        interpret,
        "window_message_gradients",
    )
    # A row's number is made of its tile, its stripe and its place in that.
    found = jnp.moveaxis(found, (4, 5), (6, 5)).reshape(batch, x, z, y * tile.rows, count, tile.columns)
    return grid.collected(found)
