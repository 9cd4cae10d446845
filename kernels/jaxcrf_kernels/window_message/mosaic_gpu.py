"""The window message on GPUs from Hopper on, by Pallas' Mosaic GPU with warpgroup semantics.

A warpgroup of 128 threads makes 128 columns of a few neighbouring rows, a column each thread. It walks over the
rows of senders, which the copy engine brings to shared memory in advance, and over the window's offsets along
columns. At each it loads the labels of one sender per thread, computes the kernel values of that sender with all of
the warpgroup's rows, and adds the products to sums that never leave the registers. So a label that is loaded serves
as many multiply-adds as there are rows, and shared memory, which could only feed one multiply-add in four, is not
what the arithmetic waits for.

A shift along columns is another address: threads read neighbouring numbers at every offset, without bank conflicts.
What makes this possible is a layout in which all labels of a column belong to one thread, `LABELS`; wider vectors,
which Mosaic would choose by itself, could not be read at odd offsets. Rows outside of the window of a receiver come
with zero position terms.

The backward pass walks in the same way. Its products over labels, `A = ⟨g_i, q_j⟩` and `B = ⟨q_i, g_j⟩`, are sums
within a thread. Every pixel gathers its own gradient, and the gradient of a weight leaves as one map.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcrf_kernels._bank import Needs, Operands
from jaxcrf_kernels._varying import varying_like
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

# Columns of a warpgroup, one for each thread.
COLUMNS = 128

# Columns that a step has in shared memory: the most that one copy brings, and a multiple of 128, without which
# Mosaic does not find a layout for what is loaded from there. It leaves room for 129 offsets.
SLAB = 256
OFFSETS = SLAB - COLUMNS + 1

# `[labels, columns]` with a column in each thread, 32 to a warp and 4 warps to a warpgroup; and `[columns]` likewise.
LABELS = plgpu.Layout.TILED(Tiling(((1, COLUMNS), (32,), (1,))), (-3,), (-2,), -1)
PIXELS = LABELS.reduce(0)

# Of the 228 KiB that the warpgroups of a processor share.
SMEM_BYTES = 200 * 2**10

# Numbers that a thread may hold, so that three warpgroups fit into the 65536 registers of a processor: two wait for
# shared memory while one computes. Reasoned, not measured.
REGISTERS = 160

# The fewest that labels are cut into for the sake of more warpgroups: each of them computes all kernel values.
FEW_LABELS = 6

# Processors of an H100 or H200, and how many warpgroups keep one busy.
PROCESSORS = 132
WARPGROUPS = 3

# 2^(-‖x f_i - x f_j‖²) is the Gaussian: the device has an instruction for powers of two.
FEATURE_SCALE = math.sqrt(0.5 / math.log(2))


class Block(NamedTuple):
    """The part of a map that a warpgroup makes, beside its 128 columns.

    Attributes:
        rows: of receivers, whose sums lie in registers.
        labels: of q, at least 2, because Mosaic finds no layout for an axis of one, and at most 256.
        offsets: of the window along columns, which are walked over before more columns are brought; at most 129.
    """

    rows: int
    labels: int
    offsets: int


class Shapes(NamedTuple):
    """What the choice of a block depends on.

    Attributes:
        batch: items of q.
        pixels: along depth, rows and columns.
        window: offsets along these.
        labels: of q.
        itemsize: bytes of a number of q.
        maps: features and scales per pixel.
        kernels: how many there are.
        gradients: numbers per pixel that the backward pass finds, 0 for the forward pass.
    """

    batch: int
    pixels: tuple[int, int, int]
    window: tuple[int, int, int]
    labels: int
    itemsize: int
    maps: int
    kernels: int
    gradients: int = 0


def smem_bytes(shapes: Shapes, block: Block) -> int:
    """The shared memory of a warpgroup: two slabs of each operand, before which receivers take the same place."""
    labels, maps = block.labels * shapes.itemsize, 4 * shapes.maps
    received = block.rows * COLUMNS * max(labels if shapes.gradients else 0, maps)
    return max(received, 2 * SLAB * ((2 if shapes.gradients else 1) * labels + maps))


@functools.lru_cache(maxsize=256)
def configuration(shapes: Shapes) -> Block | None:
    """The block that takes the least work, or None where not even the smallest one fits.

    Counted per sender and thread: a multiply-add per label and receiver (two in the backward pass), some 8
    operations per kernel value and 3 per feature, and for each number loaded the time of 4 operations, which is
    what shared memory takes to serve a warp. Numbers beyond the registers are loaded and stored at each use.
    What counts is the processor with the most warpgroups, and fewer than three leave it waiting. Reasoned, not
    measured.
    """
    depth, window_rows, columns = shapes.window
    planes = shapes.batch * shapes.pixels[0]
    products = 2 if shapes.gradients else 1
    offsets = math.ceil(columns / math.ceil(columns / OFFSETS))
    fewest = max(2, min(shapes.labels, FEW_LABELS))
    blocks = {
        Block(rows, max(fewest, math.ceil(shapes.labels / count)), offsets)
        for rows in (1, 2, 3, 4, 6, 8)
        for count in range(1, shapes.labels + 1)
        if rows <= shapes.pixels[1]
    }

    def fits(block: Block) -> bool:
        return block.labels <= SLAB and smem_bytes(shapes, block) <= SMEM_BYTES

    def cost(block: Block) -> tuple[float, ...]:
        warpgroups = planes * math.ceil(shapes.pixels[1] / block.rows) * math.ceil(shapes.pixels[2] / COLUMNS)
        warpgroups *= math.ceil(shapes.labels / block.labels)
        numbers = block.rows * (products * block.labels + shapes.maps + shapes.gradients)
        numbers += products * block.labels + shapes.maps
        spilled = max(0, numbers - REGISTERS)
        per_pair = products * block.labels + 8 * shapes.kernels + 3 * shapes.maps + 2 * shapes.gradients
        loads = products * block.labels + shapes.maps + 2 * spilled
        senders = depth * (block.rows + window_rows - 1) * columns
        work = senders * (block.rows * per_pair + 4 * loads)
        return (work * max(math.ceil(warpgroups / PROCESSORS), WARPGROUPS), *block)

    return min(filter(fits, blocks), key=cost, default=None)


def _shapes(bank: Bank, q: Array, wanted: Needs | None = None) -> Shapes:
    """What the forward pass, or the backward pass where gradients are wanted, is about."""
    depth, rows, columns = (*(1,) * (5 - q.ndim), *q.shape[1:-1])
    return Shapes(
        batch=q.shape[0],
        pixels=(depth, rows, columns),
        window=bank.window,
        labels=q.shape[-1],
        itemsize=q.dtype.itemsize,
        maps=bank.maps,
        kernels=bank.kernels,
        gradients=0 if wanted is None else bank.gradients(wanted),
    )


def unsupported(config: WindowConfig, operands: Operands) -> str | None:
    """Says in words what of a call this implementation does not do, or None."""
    reason = unsupported_type(operands)
    if reason is not None:
        return reason
    bank = Bank.of(config, operands)
    shapes = (_shapes(bank, operands.q), _shapes(bank, operands.q, bank.streamed(EVERYTHING)))
    if None in map(configuration, shapes):
        return f"{bank.maps} features and scales per pixel, which exceed the shared memory"
    return None


def forward(config: WindowConfig, operands: Operands, *, interpret: bool = False) -> Array:
    """Computes the message of `window_message`, its arguments already checked."""
    bank = Bank.of(config, operands)
    block = configuration(_shapes(bank, operands.q))
    with jax.enable_x64(False):  # or loops and index maps would count in 64 bits
        return sequential_vmap(functools.partial(_forward, bank, block, interpret))(operands)


def gradients(
    config: WindowConfig, wanted: Needs, operands: Operands, cotangent: Array, *, interpret: bool = False
) -> dict[str, Any]:
    """Finds the gradients that are wanted, as the reference does."""
    bank = Bank.of(config, operands)

    def stream(wanted: Needs) -> Array:
        block = configuration(_shapes(bank, operands.q, wanted))
        with jax.enable_x64(False):
            return sequential_vmap(functools.partial(_backward, bank, wanted, block, interpret))(
                operands, cotangent
            )

    return named_gradients(bank, wanted, operands, stream)


class _Plan(NamedTuple):
    """How a volume is cut into blocks, and where things lie.

    Volumes are `[batch · depth · rows, channels, columns]`, padded by the window and to whole blocks, so that a row
    of senders is one index; results are likewise, without the window.
    """

    bank: Bank
    block: Block
    batch: int
    pixels: tuple[int, int, int]
    labels: int
    interpret: bool

    @classmethod
    def of(cls, bank: Bank, block: Block, q: Array, interpret: bool) -> "_Plan":
        batch, depth, rows, columns, labels = q.shape
        return cls(bank, block, batch, (depth, rows, columns), labels, interpret)

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Items, slices, blocks of rows, blocks of columns and blocks of labels."""
        depth, rows, columns = self.pixels
        return (
            self.batch,
            depth,
            math.ceil(rows / self.block.rows),
            math.ceil(columns / COLUMNS),
            math.ceil(self.labels / self.block.labels),
        )

    @property
    def parts(self) -> int:
        """Into how many the offsets along columns are cut."""
        return math.ceil(self.bank.window[2] / self.block.offsets)

    @property
    def spans(self) -> tuple[int, int, int]:
        """The position terms along every axis: for rows those that any row of a block may ask for."""
        depth, rows, _ = self.bank.window
        return depth, rows + 2 * (self.block.rows - 1), self.parts * self.block.offsets

    @property
    def padded_rows(self) -> int:
        return self.counts[2] * self.block.rows + self.bank.window[1] - 1

    @property
    def results(self) -> tuple[int, int]:
        """Rows and columns of a result."""
        items, depth, rows, columns, _ = self.counts
        return items * depth * rows * self.block.rows, columns * COLUMNS

    def table(self, weights: Array) -> Array:
        """Per kernel its weight, then its position terms."""
        terms = self.bank.positions(self.spans, (0, self.block.rows - 1, 0))
        return jnp.concatenate([weights[:, None].astype(jnp.float32), terms], axis=1).reshape(-1)

    def padded(self, x: Array, channels: int) -> Array:
        """`[batch, depth, rows, columns, c]` to a volume with its window."""
        _, _, rows, columns, c = x.shape
        depth, above, before = self.bank.halo
        width = (self.counts[3] - 1) * COLUMNS + (self.parts - 1) * self.block.offsets + SLAB
        width = math.ceil(width / 8) * 8  # rows of whole 16 bytes, as the copy engine wants them
        below, after = self.padded_rows - above - rows, width - before - columns
        pad = [(0, 0), (depth, depth), (above, below), (0, channels - c), (before, after)]
        return jnp.pad(jnp.moveaxis(x, -1, -2), pad).reshape(-1, channels, width)

    def labelled(self, x: Array) -> Array:
        return self.padded(x, self.counts[4] * self.block.labels)

    def mapped(self, features: tuple[Array, ...], left: Array | None, right: Array | None) -> list[Array]:
        """The volume of maps, where there are any."""
        maps = stacked_maps([f * FEATURE_SCALE for f in features], left, right)
        return [] if maps is None else [self.padded(maps, self.bank.maps)]

    def collected(self, x: Array) -> Array:
        """A result `[batch · depth · rows, c, columns]` to `[batch, depth, rows, columns, c]`."""
        items, depth, rows, *_ = self.counts
        x = x.reshape(items, depth, rows * self.block.rows, *x.shape[1:])
        return jnp.moveaxis(x[:, :, : self.pixels[1], :, : self.pixels[2]], -2, -1)

    def laid_out(self, x: Array) -> Array:
        """Says which thread has which column; the interpreter of jax 0.10 does not know layouts, and needs none."""
        return x if self.interpret else plgpu.layout_cast(x, LABELS if x.ndim == 2 else PIXELS)

    def call(self, kernel: Callable[..., None], operands: list[Array], shape: tuple[int, ...]) -> Array:
        """Runs a kernel; float32 results only, since Mosaic stores no arrays of two bytes to global memory."""
        found = plgpu.kernel(
            functools.partial(kernel, self),
            out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
            grid=(math.prod(self.counts),),
            grid_names=("block",),
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
            ),
            interpret=_interpreter() if self.interpret else None,
        )(*operands)
        # A Mosaic GPU kernel does not keep the axes of a mesh over which a result is said to vary.
        return varying_like(found, operands)


def _interpreter() -> Any:
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    # Where jax 0.10 keeps it.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


class _Sender(NamedTuple):
    """What a visit to a sender finds, a column in each thread.

    Attributes:
        maps: of the sender.
        labels: of the sender in every source, `[labels, columns]`.
        values: of every receiving row and kernel, without scales: a scalar where it has no features.
        differences: of every receiving row and kernel, the features of the receiver less those of the sender.
    """

    maps: list[Array]
    labels: list[Array]
    values: list[list[Array]]
    differences: list[list[list[Array]]]


class _Block:
    """A warpgroup's block: what it loads of the receivers, and its walk over the senders."""

    def __init__(self, plan: _Plan, table: Any, maps: Any | None):
        index = lax.axis_index("block")
        found = []
        for count in reversed(plan.counts):  # labels first: they share all else
            found.append(lax.rem(index, count))
            index = lax.div(index, count)
        self.label, self.column, self.block, self.slice, self.item = found
        self.plan, self.table, self.maps = plan, table, maps
        self.size = 1 + sum(plan.spans)
        self.weights = [table[m * self.size] for m in range(plan.bank.kernels)]
        self.received: list[list[Array]] = [[] for _ in range(plan.block.rows)]
        if maps is not None:
            self.received = self.receivers(maps, [(c,) for c in range(plan.bank.maps)], 0, plan.bank.maps)

    def _row(self, volume: Any, z: Any, y: Any) -> Any:
        """The index of a row of a padded volume, which may have one item for the whole batch."""
        plan = self.plan
        depth = plan.pixels[0] + plan.bank.window[0] - 1
        shared = volume.shape[0] == depth * plan.padded_rows
        item = 0 if shared else self.item * depth
        return (item + self.slice + z) * plan.padded_rows + self.block * plan.block.rows + y

    @property
    def labels(self) -> Any:
        """Which labels of a volume are the block's."""
        return pl.ds(self.label * self.plan.block.labels, self.plan.block.labels)

    @property
    def columns(self) -> Any:
        """Which columns of a result are the block's."""
        return pl.ds(self.column * COLUMNS, COLUMNS)

    def result_row(self, r: int) -> Any:
        plan = self.plan
        _, depth, rows, *_ = plan.counts
        return ((self.item * depth + self.slice) * rows + self.block) * plan.block.rows + r

    def labels_received(self, volume: Any) -> list[Array]:
        """The receivers' labels, row by row, in float32."""
        found = self.receivers(volume, [()], self.label, self.plan.block.labels)
        return [labels for (labels,) in found]

    def receivers(
        self, volume: Any, parts: list[tuple[int, ...]], label: Any, channels: int
    ) -> list[list[Array]]:
        """Loads the given parts of every row of the receivers.

        By the copy engine too, since Mosaic reads arrays of two bytes, and in jax 0.10 of any layout of ours, only
        from shared memory.
        """
        plan = self.plan
        depth, above, before = plan.bank.halo
        rows = range(plan.block.rows)

        def read(_: Any, ref: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(plan.laid_out(ref[r, *part]).astype(jnp.float32) for r in rows for part in parts)

        shapes = [(channels, COLUMNS)[len(part) :] for _ in rows for part in parts]
        found = plgpu.emit_pipeline(
            read,
            grid=(1,),
            in_specs=[
                plgpu.BlockSpec(
                    (pl.Element(plan.block.rows), channels, pl.Element(COLUMNS)),
                    lambda _: (self._row(volume, depth, above), label, self.column * COLUMNS + before),
                )
            ],
            init_carry=tuple(plan.laid_out(jnp.zeros(shape, jnp.float32)) for shape in shapes),
        )(volume)
        return [list(found[r * len(parts) : (r + 1) * len(parts)]) for r in rows]

    def walk(
        self,
        sources: list[Any],
        visit: Callable[[_Sender, tuple[Array, ...]], tuple[Array, ...]],
        carry: tuple[Array, ...],
        weighted: bool,
    ) -> tuple[Array, ...]:
        """Folds `visit` over all senders of the block; kernel values come with their weights where that is said."""
        plan, bank, block = self.plan, self.plan.bank, self.plan.block
        depth, rows, columns = plan.spans
        positioned = [theta is not None or columns > bank.window[2] for theta in bank.bandwidths]

        def step(indices: tuple[Any, Any, Any], *refs_and_carry: Any) -> tuple[Array, ...]:
            *refs, carry = refs_and_carry
            dz, y, part = indices

            def term(m: int, n: Any) -> Array:
                return self.table[m * self.size + 1 + n]

            def row_term(m: int, r: int) -> Array:
                found = term(m, dz) * term(m, depth + y + (block.rows - 1 - r))
                return found * self.weights[m] if weighted else found

            row_terms = [[row_term(m, r) for m in range(bank.kernels)] for r in range(block.rows)]

            def one_column(dx: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                here = pl.ds(dx, COLUMNS)
                sender = [plan.laid_out(refs[0][c, here]) for c in range(bank.maps)]
                labels = [plan.laid_out(ref[:, here]).astype(jnp.float32) for ref in refs[-len(sources) :]]
                values: list[list[Array]] = [[] for _ in range(block.rows)]
                differences: list[list[list[Array]]] = [[] for _ in range(block.rows)]
                for m in range(bank.kernels):
                    shift = term(m, depth + rows + part * block.offsets + dx) if positioned[m] else None
                    for r in range(block.rows):
                        apart = [self.received[r][n] - sender[n] for n in bank.feature_maps(m)]
                        value = row_terms[r][m] if shift is None else row_terms[r][m] * shift
                        if apart:
                            value = value * jnp.exp2(-functools.reduce(jnp.add, [d * d for d in apart]))
                        values[r].append(value)
                        differences[r].append(apart)
                return visit(_Sender(sender, labels, values, differences), carry)

            return lax.fori_loop(0, block.offsets, one_column, carry)

        def spec(volume: Any, channels: int, label: Any) -> plgpu.BlockSpec:
            return plgpu.BlockSpec(
                (None, channels, pl.Element(SLAB)),
                lambda dz, y, part: (
                    self._row(volume, dz, y),
                    label,
                    self.column * COLUMNS + part * block.offsets,
                ),
            )

        volumes: list[tuple[Any, int, Any]] = [] if self.maps is None else [(self.maps, bank.maps, 0)]
        volumes += [(source, block.labels, self.label) for source in sources]
        return plgpu.emit_pipeline(
            step,
            grid=(depth, block.rows + bank.window[1] - 1, plan.parts),
            in_specs=[spec(*volume) for volume in volumes],
            max_concurrent_steps=2,
            init_carry=carry,
        )(*(volume for volume, *_ in volumes))


def _forward_kernel(plan: _Plan, table: Any, *refs: Any) -> None:
    """Makes a block of the message."""
    *maps, q, out = refs
    bank, rows, labels = plan.bank, plan.block.rows, plan.block.labels
    block = _Block(plan, table, *(maps or [None]))

    def visit(sender: _Sender, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        found = []
        for r in range(rows):
            terms = [
                product(
                    sender.values[r][m],
                    *(block.received[r][n] for n in bank.left_maps(m)),
                    *(sender.maps[n] for n in bank.right_maps(m)),
                )
                for m in range(bank.kernels)
            ]
            value = functools.reduce(jnp.add, terms)
            if value.ndim:
                value = lax.broadcast_in_dim(value, (labels, COLUMNS), (1,))
            found.append(sums[r] + value * sender.labels[0])
        return tuple(found)

    zeros = [plan.laid_out(jnp.zeros((labels, COLUMNS), jnp.float32)) for _ in range(rows)]
    for r, total in enumerate(block.walk([q], visit, tuple(zeros), weighted=True)):
        out[block.result_row(r), block.labels, block.columns] = total


def _backward_kernel(wanted: Needs, plan: _Plan, table: Any, *refs: Any) -> None:
    r"""Makes a block of the gradients, as far as a block of labels contributes to them.

    With `k_m` the kernel's value, the pair `(i, j)` gives pixel `i`

        ∂f_i  += -w_m k_m (s_i r_j A + s_j r_i B) (f_i - f_j)
        ∂w_m  += k_m s_i r_j A,    ∂s_i += w_m k_m r_j A,    ∂r_i += w_m k_m s_j B.
    """
    *maps, q, g, out = refs
    bank, rows = plan.bank, plan.block.rows
    block = _Block(plan, table, *(maps or [None]))
    count = bank.gradients(wanted)
    # A from the receiver's cotangent and the sender's q, B the other way round; each only where it is used.
    used = (wanted.features or wanted.weights or wanted.left, wanted.features or wanted.right)
    pairs = [pair for pair, use in zip(((g, q), (q, g)), used, strict=True) if use]
    ours = list(zip(*(block.labels_received(receiver) for receiver, _ in pairs), strict=True))

    def visit(sender: _Sender, found: tuple[Array, ...]) -> tuple[Array, ...]:
        result = []
        for r in range(rows):
            products = [jnp.sum(x * y, axis=0) for x, y in zip(ours[r], sender.labels, strict=True)]
            a, b = products[0], products[-1]
            gains: dict[str, list[Array]] = {"features": [], "weights": [], "left": [], "right": []}
            for m in range(bank.kernels):
                value = sender.values[r][m]
                weighted = value * block.weights[m]
                s_i, s_j = ([x[n] for n in bank.left_maps(m)] for x in (block.received[r], sender.maps))
                r_i, r_j = ([x[n] for n in bank.right_maps(m)] for x in (block.received[r], sender.maps))
                if wanted.features and sender.differences[r][m]:
                    pull = weighted * (product(a, *s_i, *r_j) + product(b, *s_j, *r_i))
                    gains["features"] += [-pull * d for d in sender.differences[r][m]]
                gains["weights"].append(product(a * value, *s_i, *r_j))
                gains["left"].append(product(a * weighted, *r_j))
                gains["right"].append(product(b * weighted, *s_j))
            gained = [gain for name in bank.slots(wanted) for gain in gains[name]]
            before = found[r * count : (r + 1) * count]
            result += [x + gain for x, gain in zip(before, gained, strict=True)]
        return tuple(result)

    zeros = [plan.laid_out(jnp.zeros(COLUMNS, jnp.float32)) for _ in range(rows * count)]
    sources = [sender for _, sender in pairs]
    for n, total in enumerate(block.walk(sources, visit, tuple(zeros), weighted=False)):
        out[block.label, block.result_row(n // count), n % count, block.columns] = total


# Compiled here rather than by the caller, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    bank: Bank,
    block: Block,
    interpret: bool,
    operands: Operands,
) -> Array:
    q, features, weights, left, right = operands
    volume = as_volume(q)
    plan = _Plan.of(bank, block, volume, interpret)
    rows, columns = plan.results
    labelled = plan.labelled(volume)
    found = plan.call(
        _forward_kernel,
        [plan.table(weights), *plan.mapped(features, left, right), labelled],
        (rows, labelled.shape[1], columns),
    )
    return plan.collected(found)[..., : q.shape[-1]].reshape(q.shape).astype(q.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _backward(
    bank: Bank,
    wanted: Needs,
    block: Block,
    interpret: bool,
    operands: Operands,
    cotangent: Array,
) -> Array:
    q, features, weights, left, right = operands
    volume = as_volume(q)
    plan = _Plan.of(bank, block, volume, interpret)
    rows, columns = plan.results
    shape = (plan.counts[-1], rows, bank.gradients(wanted), columns)
    found = plan.call(
        functools.partial(_backward_kernel, wanted),
        [
            plan.table(weights),
            *plan.mapped(features, left, right),
            plan.labelled(volume),
            plan.labelled(as_volume(cotangent.astype(q.dtype))),
        ],
        shape,
    )
    found = plan.collected(found.sum(axis=0))
    if wanted.features:
        # The kernel's differences are those of scaled features.
        slots = bank.slots(wanted)["features"]
        scales = jnp.ones(found.shape[-1]).at[slots.start : slots.stop].set(1 / FEATURE_SCALE)
        found = found * scales
    return found
