r"""The window message as Triton kernels, for GPUs from Ampere on.

A thread owns one column of a few neighbouring rows and, for some labels, keeps one accumulator in a register
for each. A program's threads walk over the input rows that any of their rows can see and over the columns of the
window, load a pixel's values once, compute one kernel value per output row, and add the products: an
arrangement in which

- a loaded value serves all rows of a thread. Shifted loads from the first-level cache, of which a naive kernel
  needs one per multiply-add (1.9 GB for 375×500×21 and 11×11, at 28 TB/s on an H200 0.07 ms, and twice that
  where a warp's 32 columns straddle two cache lines), are what is scarce; 14 µs of multiply-adds are not.
- a kernel value serves all labels of a thread.
- no multiply-add is spent on pixels outside the window: rows come and go along the walk, which is unrolled
  where it begins and ends.
- nothing is masked. The operands are padded with zeros, so that the window of every pixel of every program lies
  inside, and the result is cut.

Labels are numbered and unrolled rather than an axis of a tile, whose sizes Triton wants to be powers of two:
21 labels are 21 registers. They are cut into even parts where there are more than a thread can hold.

Arrays are held as `[batch, channels, pixels]`, so that a warp reads neighbouring columns. Going there and
back costs two passes over `q` and two over the message; at 375×500×21 that is 65 MB or 14 µs of an H200's
bandwidth, and less where its 50 MB of second-level cache help.

A mean-field iteration is not one kernel with the message. At 375×500×21 the message reads one map of 15.75 MB and
writes one, and the soft-max, which XLA fuses with compatibility, unary and both changes of layout, reads two and
writes one: 79 MB. One kernel for all would read two and write one, 47 MB: 7 µs less of an H200's bandwidth in an
iteration of 50 or more, for a second backward pass to keep right.

Times and sizes here are reasoned, not measured. What is known is what Triton and ptxas make of it for compute
capability 9.0: at 375×500×21 and three features, forward and backward take 128 registers and spill none; a row
more each would take 162 and 226. The innermost loop forward is 161 instructions for 84 multiply-adds.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jaxcrf_kernels._bank import Needs, Operands, like_operand
from jaxcrf_kernels._triton import triton_call
from jaxcrf_kernels._varying import result_like
from jaxcrf_kernels.window_message.reference import WindowConfig

# float32 values that a thread keeps through the walk. What it loads and computes of one pixel, and addresses, take
# some 30 registers more: with 160 of them three warps fit on each of a processor's four schedulers.
REGISTERS = 128
# At least this many warps, if the image is large enough: two for each of an H200's 528 schedulers, which then have
# one to run while the other waits for memory.
WARPS = 1056
# The most labels of a thread: with so many a kernel value, of some ten instructions, costs less than half of what it
# is used for.
LABELS = 24
# The fewest that labels are cut into for the sake of more warps.
FEW_LABELS = 6

_LOG2_E = 1 / math.log(2)


class Tiles(NamedTuple):
    """How the work is cut into programs.

    Attributes:
        rows: output rows of a program, one accumulator each per label.
        columns: output columns of a program, a power of two; 32 for each of its warps.
        labels: labels of a program.
    """

    rows: int
    columns: int
    labels: int


def configuration(
    config: WindowConfig,
    shape: Sequence[int],
    kernels: int,
    features: int,
    needs: Needs | None = None,
) -> Tiles:
    """Chooses tiles for a message, or for the backward pass that finds what it needs.

    As many labels, then as many rows as registers allow, and fewer of both where that leaves too few warps.

    Args:
        config: as in `forward`.
        shape: `[batch, *spatial, labels]` of `q`.
        kernels: how many there are.
        features: of all kernels together.
        needs: None forward, else which gradients are wanted.

    Returns:
        Tiles that any image, window and number of labels may use.

    Example:
        >>> configuration(WindowConfig((11, 11), (None,)), (1, 375, 500, 21), 1, 3)
        Tiles(rows=4, columns=64, labels=21)
        >>> configuration(WindowConfig((11, 11), (None,)), (1, 94, 125, 21), 1, 3)
        Tiles(rows=1, columns=64, labels=7)
    """
    batch, *spatial, labels = shape
    planes, height, width = _three(spatial, 1)
    _, window_rows, _ = _three(config.filter_size, 1)
    # Two warps, or one where that wastes fewer columns: the smaller, the evener the load of 132 processors.
    columns = 64 if math.ceil(width / 64) * 2 == math.ceil(width / 32) else 32

    def even(parts: int) -> int:
        return math.ceil(labels / parts)

    def kept(rows: int, count: int) -> int:
        if needs is None:
            return rows * (count + features + 2 * kernels)
        found = needs.features * features + (needs.weights + needs.left + needs.right) * kernels
        both = 1 + (needs.features or needs.right)
        return rows * (both * count + features + 2 * kernels + found)

    def warps(rows: int, parts: int) -> int:
        blocks = math.ceil(height / rows) * math.ceil(width / columns) * (columns // 32)
        return batch * planes * blocks * parts

    parts = math.ceil(labels / LABELS)
    rows = min(8, height, window_rows)
    while rows > 1 and (kept(rows, even(parts)) > REGISTERS or warps(rows, parts) < WARPS):
        rows -= 1
    while warps(rows, parts) < WARPS and even(parts + 1) >= FEW_LABELS:
        parts += 1
    return Tiles(rows, columns, even(parts))


def unsupported(config: WindowConfig, operands: Operands) -> str | None:
    """Says what of a call these kernels do not do, or None."""
    q, weights = operands.q, operands.weights
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or weights.dtype != jnp.float32:
        return f"q of type {q.dtype} with weights of type {weights.dtype}: it adds in float32"
    # A map with its borders; the largest tile adds less than 64 columns and 8 rows.
    pixels = math.prod(n + k + 64 for n, k in zip(q.shape[1:-1], config.filter_size, strict=True))
    if pixels >= 2**31:
        return f"maps of {pixels} pixels with their borders: it counts them in 32 bits"
    return None


def forward(config: WindowConfig, operands: Operands, *, interpret: bool = False) -> Array:
    """Computes the message of `window_message`, its arguments already checked."""
    return _forward(config, _tiles(config, operands), interpret, operands)


def gradients(
    config: WindowConfig, wanted: Needs, operands: Operands, cotangent: Array, *, interpret: bool = False
) -> dict[str, Any]:
    """Finds the gradients that are wanted, as the reference does."""
    return _backward(config, wanted, _tiles(config, operands, wanted), interpret, operands, cotangent)


def _tiles(config: WindowConfig, operands: Operands, wanted: Needs | None = None) -> Tiles:
    features = operands.features
    return configuration(config, operands.q.shape, len(features), sum(f.shape[-1] for f in features), wanted)


class _Layout(NamedTuple):
    """Where pixels lie in the padded maps, and which program computes what. Axes: planes, rows, columns."""

    spatial: tuple[int, ...]
    window: tuple[int, int, int]
    tiles: Tiles
    batch: int
    labels: int

    @classmethod
    def of(cls, config: WindowConfig, tiles: Tiles, q: Array) -> "_Layout":
        batch, *spatial, labels = q.shape
        return cls(tuple(spatial), _three(config.filter_size, 1), tiles, batch, labels)

    @property
    def span(self) -> tuple[int, int, int]:
        planes, rows, columns = self.window
        return planes // 2, rows // 2, columns // 2

    @property
    def parts(self) -> int:
        return math.ceil(self.labels / self.tiles.labels)

    @property
    def blocks(self) -> tuple[int, int, int]:
        planes, rows, columns = _three(self.spatial, 1)
        return planes, math.ceil(rows / self.tiles.rows), math.ceil(columns / self.tiles.columns)

    @property
    def grid(self) -> tuple[int, int, int]:
        # Neighbouring programs share the rows that they read: columns first, then rows.
        planes, rows, columns = self.blocks
        return columns, rows * planes, self.batch * self.parts

    @property
    def result(self) -> tuple[int, int, int]:
        """A map of results: whole tiles."""
        planes, rows, columns = self.blocks
        return planes, rows * self.tiles.rows, columns * self.tiles.columns

    @property
    def padded(self) -> tuple[int, int, int]:
        """A map of operands: whole tiles and what their windows reach."""
        planes, rows, columns = (n + k - 1 for n, k in zip(self.result, self.window, strict=True))
        return planes, rows, columns

    def arrange(self, x: Array, channels: int | None = None) -> Array:
        """`[b, *spatial, c]` to `[b, channels, pixels]`, padded with zeros."""
        batch, *_, count = x.shape
        more = 0 if channels is None else channels - count
        x = jnp.moveaxis(x, -1, 1).reshape(batch, count, *_three(self.spatial, 1))
        sizes = zip(self.padded, self.span, x.shape[2:], strict=True)
        borders = [(span, size - span - n) for size, span, n in sizes]
        return jnp.pad(x, [(0, 0), (0, more), *borders]).reshape(batch, count + more, -1)

    def collect(self, x: Array) -> Array:
        """`[b, c, pixels]` of results to `[b, *spatial, c]`."""
        batch, count, _ = x.shape
        x = x.reshape(batch, count, *self.result)[(..., *(slice(n) for n in _three(self.spatial, 1)))]
        return jnp.moveaxis(x.reshape(batch, count, *self.spatial), 1, -1)

    def arrange_operands(
        self,
        features: tuple[Array, ...],
        weights: Array,
        left: Array | None,
        right: Array | None,
    ) -> "_Operands":
        return _Operands(
            [self.arrange(f) if f.shape[-1] else None for f in features],
            weights,
            *(None if s is None else self.arrange(s) for s in (left, right)),
        )

    def walk(self, visit: Callable[..., Any], carry: Any) -> Any:
        """Folds `visit(plane, row, column, receivers, carry)` over all that a tile's windows hold.

        The place is counted from the first corner of the first pixel's window; `receivers` are the tile's rows
        that it lies in the window of, as a range known when the kernel is traced.
        """
        rows, (planes, height, width) = self.tiles.rows, self.window

        def line(plane: Any, row: Any, receivers: range, carry: Any) -> Any:
            return _loop(0, width, lambda column, c: visit(plane, row, column, receivers, c), carry)

        def lines(plane: Any, carry: Any) -> Any:
            for row in range(rows - 1):
                carry = line(plane, row, range(row + 1), carry)
            everyone = range(rows)
            carry = _loop(rows - 1, height, lambda row, c: line(plane, row, everyone, c), carry)
            for row in range(height, height + rows - 1):
                carry = line(plane, row, range(row - height + 1, rows), carry)
            return carry

        return _loop(0, planes, lines, carry)


class _Operands(NamedTuple):
    """What kernel values are made of, as arrays `[batch or 1, channels, pixels]` or references to them."""

    features: Sequence[Any]  # None for a kernel without features
    weights: Any
    left: Any
    right: Any


class _Program:
    """One program of a grid: where it is, what it loads, and its kernel values.

    What belongs to the tile's rows is a list over them, of arrays with one element per column.
    """

    def __init__(self, config: WindowConfig, layout: _Layout, operands: _Operands):
        column, block, self.item = (pl.program_id(axis) for axis in range(3))
        _, rows, _ = layout.blocks
        self.layout = layout
        self.operands = operands
        self.rows = range(layout.tiles.rows)
        self.number = (self.item * layout.grid[1] + block) * layout.grid[0] + column
        self.batch = lax.div(self.item, np.int32(layout.parts))
        self.first_label = lax.rem(self.item, np.int32(layout.parts)) * layout.tiles.labels
        self.plane = lax.div(block, np.int32(rows))
        self.row = lax.rem(block, np.int32(rows)) * layout.tiles.rows
        self.column = column * layout.tiles.columns
        # exp(-½ (δ / θ)²) = 2^(rate δ²). Rates beyond float32 would make δ = 0 infinity times zero.
        self.rates = [
            [-min(0.5 * _LOG2_E / t / t, 1e30) for t in _three(theta or (), math.inf)]
            for theta in config.position_bandwidths
        ]
        self.own_features = [None if f is None else self.own(f, range(f.shape[1])) for f in operands.features]

    def start(self, plane: Any, row: Any, column: Any) -> Any:
        """The first pixel of a row of operands, the place counted as in `_Layout.walk`."""
        _, height, width = self.layout.padded
        return ((self.plane + plane) * height + self.row + row) * width + self.column + column

    def load(self, reference: Any, channel: Any, start: Any) -> Array:
        """One channel of as many pixels as the tile has columns."""
        batch = 0 if reference.shape[0] == 1 else self.batch
        return reference[batch, channel, pl.ds(start, self.layout.tiles.columns)].astype(jnp.float32)

    def own(self, reference: Any, channels: Any) -> list[list[Array]]:
        """Channels of the tile's own pixels."""
        plane, row, column = self.layout.span
        starts = [self.start(plane, row + r, column) for r in self.rows]
        return [[self.load(reference, channel, start) for channel in channels] for start in starts]

    def labels(self) -> list[Any]:
        """The channels of `q` that the program is for."""
        return [self.first_label + label for label in range(self.layout.tiles.labels)]

    def scales(self, reference: Any, start: Any) -> list[Any]:
        """Every kernel's pixel scale, None where it is one."""
        count = len(self.operands.features)
        return [None if reference is None else self.load(reference, m, start) for m in range(count)]

    def own_scales(self, reference: Any) -> list[list[Any]]:
        """Every kernel's scale of the tile's own pixels."""
        plane, row, column = self.layout.span
        return [self.scales(reference, self.start(plane, row + r, column)) for r in self.rows]

    def differences(self, start: Any, receivers: range) -> list[Any]:
        """Per kernel None, or the differences of features `f_i - f_j` as lists over receivers."""
        found: list[Any] = []
        for f, own in zip(self.operands.features, self.own_features, strict=True):
            if f is None or own is None:
                found.append(None)
                continue
            others = [self.load(f, channel, start) for channel in range(f.shape[1])]
            found.append([[h - o for h, o in zip(own[r], others, strict=True)] for r in receivers])
        return found

    def kernels(
        self, plane: Any, row: Any, column: Any, receivers: range, differences: Sequence[Any]
    ) -> list[list[Any]]:
        """Kernel values by receiver and kernel, without weights and scales; None for one."""
        span = self.layout.span
        found: list[list[Any]] = []
        for n, receiver in enumerate(receivers):
            offset = (plane - span[0], row - receiver - span[1], column - span[2])
            values: list[Any] = []
            for difference, rates in zip(differences, self.rates, strict=True):
                exponent: Any = None
                if difference is not None:
                    # Squared before it is scaled to powers of two: features of any size keep their digits.
                    exponent = (-0.5 * _LOG2_E) * _sum([d * d for d in difference[n]])
                if any(rates):
                    # The same for all columns, and each term constant in the loops inside its own.
                    position = _sum([r * _square(o) for r, o in zip(rates, offset, strict=True) if r])
                    if exponent is None:
                        exponent = jnp.full((self.layout.tiles.columns,), position, jnp.float32)
                    else:
                        exponent = exponent + position
                values.append(None if exponent is None else jnp.exp2(exponent))
            found.append(values)
        return found

    def store(self, reference: Any, item: Any, channel: Any, row: int, values: Array) -> None:
        """Writes one channel of one of the tile's rows."""
        _, height, width = self.layout.result
        start = (self.plane * height + self.row + row) * width + self.column
        reference[item, channel, pl.ds(start, self.layout.tiles.columns)] = values.astype(reference.dtype)


# Compiled here rather than by the caller, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    config: WindowConfig,
    tiles: Tiles,
    interpret: bool,
    operands: Operands,
) -> Array:
    q, features, weights, left, right = operands
    layout = _Layout.of(config, tiles, q)
    arranged = layout.arrange_operands(features, weights, left, right)
    count = len(features)

    def kernel(q_ref: Any, operands: _Operands, message_ref: Any) -> None:
        program = _Program(config, layout, operands)
        labels = program.labels()
        factors = [
            [_product(operands.weights[m], s) for m, s in enumerate(row)]
            for row in program.own_scales(operands.left)
        ]

        def visit(plane: Any, row: Any, column: Any, receivers: range, totals: Any) -> Any:
            start = program.start(plane, row, column)
            sender = program.scales(operands.right, start)
            values = program.kernels(plane, row, column, receivers, program.differences(start, receivers))
            if count == 1:  # what belongs to the receiver leaves the sum
                kernels = [_product(value, sender[0]) for (value,) in values]
            else:
                kernels = [
                    _sum([_product(factors[r][m], sender[m], value) for m, value in enumerate(row_values)])
                    for r, row_values in zip(receivers, values, strict=True)
                ]
            totals = [list(row_totals) for row_totals in totals]
            for n, label in enumerate(labels):
                q_j = program.load(q_ref, label, start)
                for r, k in zip(receivers, kernels, strict=True):
                    totals[r][n] = totals[r][n] + _product(k, q_j)
            return totals

        zero = jnp.zeros(tiles.columns, jnp.float32)
        totals = layout.walk(visit, [[zero] * len(labels) for _ in program.rows])
        for r in program.rows:
            for n, label in enumerate(labels):
                total = totals[r][n] * factors[r][0] if count == 1 else totals[r][n]
                program.store(message_ref, program.batch, label, r, total)

    channels = layout.parts * tiles.labels
    result = result_like((layout.batch, channels, math.prod(layout.result)), q.dtype, q, arranged)
    call = triton_call(
        kernel,
        result,
        name="window_message",
        grid=layout.grid,
        num_warps=max(1, tiles.columns // 32),
        interpret=interpret,
    )
    message = call(layout.arrange(q, channels), arranged)
    return layout.collect(message[:, : layout.labels])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _backward(
    config: WindowConfig,
    needs: Needs,
    tiles: Tiles,
    interpret: bool,
    operands: Operands,
    cotangent: Array,
) -> dict[str, Any]:
    r"""Walks over the window once, collecting all gradients but that of `q` by gathering only.

    With `k_m` the kernel's value, `A = ⟨g_i, q_j⟩` and `B = ⟨q_i, g_j⟩` (a program's labels contracted, the
    programs' results added), the pair `(i, j)` gives pixel `i`

        ∂f_i  += -w_m k_m (s_i r_j A + s_j r_i B) (f_i - f_j)
        ∂w_m  += k_m s_i r_j A,    ∂s_i += w_m k_m r_j A,    ∂r_i += w_m k_m s_j B
    """
    q, features, weights, left, right = operands
    layout = _Layout.of(config, tiles, q)
    arranged = layout.arrange_operands(features, weights, left, right)
    count = len(features)
    forth, back = needs.features or needs.weights or needs.left, needs.features or needs.right

    def kernel(q_ref: Any, g_ref: Any, operands: _Operands, results: dict[str, Any]) -> None:
        program = _Program(config, layout, operands)
        labels = program.labels()
        q_own = program.own(q_ref, labels) if back else []
        g_own = program.own(g_ref, labels) if forth else []
        s_own, r_own = (program.own_scales(s) for s in (operands.left, operands.right))
        zero = jnp.zeros(tiles.columns, jnp.float32)

        def visit(plane: Any, row: Any, column: Any, receivers: range, found: Any) -> Any:
            start = program.start(plane, row, column)
            differences = program.differences(start, receivers)
            values = program.kernels(plane, row, column, receivers, differences)
            s_other = program.scales(operands.left, start) if back else []
            r_other = program.scales(operands.right, start) if forth else []
            to, fro = [zero] * len(receivers), [zero] * len(receivers)
            for n, label in enumerate(labels):
                if forth:
                    q_j = program.load(q_ref, label, start)
                    to = [a + g_own[r][n] * q_j for r, a in zip(receivers, to, strict=True)]
                if back:
                    g_j = program.load(g_ref, label, start)
                    fro = [b + q_own[r][n] * g_j for r, b in zip(receivers, fro, strict=True)]
            found = jax.tree.map(lambda x: x, found)  # lists of its own
            for n, r in enumerate(receivers):
                for m, value in enumerate(values[n]):
                    a = _product(to[n], value, r_other[m]) if forth else zero
                    b = _product(fro[n], value, s_other[m]) if back else zero
                    if needs.left:
                        found["left"][r][m] = found["left"][r][m] + a
                    if needs.right:
                        found["right"][r][m] = found["right"][r][m] + b
                    a, b = _product(a, s_own[r][m]), _product(b, r_own[r][m])
                    if needs.weights:
                        found["weights"][r][m] = found["weights"][r][m] + a
                    if needs.features and differences[m] is not None:
                        energy = a + b
                        found["features"][r][m] = [
                            total + energy * d
                            for total, d in zip(found["features"][r][m], differences[m][n], strict=True)
                        ]
            return found

        initial: dict[str, Any] = {
            name: [[zero] * count for _ in program.rows]
            for name in ("weights", "left", "right")
            if getattr(needs, name)
        }
        if needs.features:
            sizes = [0 if f is None else f.shape[1] for f in operands.features]
            initial["features"] = [[[zero] * size for size in sizes] for _ in program.rows]
        found = layout.walk(visit, initial)

        for m in range(count):
            if needs.weights:
                total = _sum([found["weights"][r][m] for r in program.rows])
                results["weights"][m, program.number] = jnp.sum(total)
            for r in program.rows:
                for name in ("left", "right"):
                    if getattr(needs, name):
                        scaled = found[name][r][m] * operands.weights[m]
                        program.store(results[name], program.item, m, r, scaled)
                if needs.features:
                    for channel, total in enumerate(found["features"][r][m]):
                        scaled = -operands.weights[m] * total
                        program.store(results["features"][m], program.item, channel, r, scaled)

    def result(channels: int) -> Any:
        shape = (layout.batch * layout.parts, channels, math.prod(layout.result))
        return result_like(shape, jnp.float32, q, cotangent, arranged)

    results: dict[str, Any] = {name: result(count) for name in ("left", "right") if getattr(needs, name)}
    if needs.features:
        results["features"] = [result(f.shape[-1]) if f.shape[-1] else None for f in features]
    if needs.weights:  # a sum per program
        results["weights"] = result_like((count, math.prod(layout.grid)), jnp.float32, q, cotangent, arranged)
    call = triton_call(
        kernel,
        results,
        name="window_message_backward",
        grid=layout.grid,
        num_warps=max(1, tiles.columns // 32),
        interpret=interpret,
    )
    channels = layout.parts * tiles.labels
    found = call(layout.arrange(q, channels), layout.arrange(cotangent, channels), arranged)

    def to_operand(gradient: Array, operand: Array) -> Array:
        gradient = gradient.reshape(layout.batch, layout.parts, *gradient.shape[1:]).sum(axis=1)
        return like_operand(layout.collect(gradient), operand)

    gradients: dict[str, Any] = {}
    if needs.features:
        gradients["features"] = tuple(
            jnp.zeros_like(f) if gradient is None else to_operand(gradient, f)
            for f, gradient in zip(features, found["features"], strict=True)
        )
    if needs.weights:
        gradients["weights"] = found["weights"].sum(axis=1)
    for name, operand in (("left", left), ("right", right)):
        if getattr(needs, name) and operand is not None:
            gradients[name] = to_operand(found[name], operand)
    return gradients


def _three(sizes: Sequence[Any], missing: Any) -> tuple[Any, Any, Any]:
    """One value for each of planes, rows and columns: a line is a plane's only row, an image a volume's only plane."""
    planes, rows, columns = (*[missing] * (3 - len(sizes)), *sizes)
    return planes, rows, columns


def _loop(start: int, stop: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """A loop, or its body where it would run once."""
    if stop - start == 1:
        return body(start, carry)
    return lax.fori_loop(np.int32(start), np.int32(stop), body, carry) if stop > start else carry


def _square(offset: Any) -> Any:
    value = float(offset) if isinstance(offset, int) else offset.astype(jnp.float32)
    return value * value


def _sum(terms: Sequence[Any]) -> Any:
    return functools.reduce(lambda x, y: x + y, terms)


def _product(*factors: Any) -> Any:
    """The product of what is not None; None stands for one."""
    given = [x for x in factors if x is not None]
    return functools.reduce(lambda x, y: x * y, given) if given else None
