"""The window message in plain jnp: the path of CPUs, the fallback elsewhere, and the kernels' oracle.

Both directions walk over blocks of pixels and, inside a block, over the offsets of the window; a block's
accumulator is all that lives besides the operands. On a CPU a block is a piece of one row, so that the
accumulator stays in the first-level cache; on an accelerator it is the whole map, so that every offset is
one large fused operation.

Arrays are held with the last spatial axis innermost, `[batch, *leading, channels, columns]`: a kernel
value belongs to a pixel and multiplies all its labels, so pixels are what is vectorised.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import sequential_vmap

from jaxcrf_kernels._bank import Needs, Operands, accumulator_dtype
from jaxcrf_kernels._platform import by_platform
from jaxcrf_kernels._varying import varying_like

# Columns of a block on a CPU: 21 labels times 128 float32 columns are 10 KiB, and two such blocks (the
# accumulator and the shifted map) leave room in a 32 KiB cache for the features. Measured at 375×500×21,
# 11×11: 128 columns take 0.75 (jax 0.12) to 1.0 (jax 0.10) of the time of whole rows, 64 no less.
CPU_COLUMNS = 128

# Whether features take a pass over the window of their own. XLA before jax 0.11 spends more on the joint
# loop than on the two (300 against 265 ms for all gradients at 375×500×21, 11×11); later ones 20 % less.
SEPARATE_FEATURES = jax.__version_info__ < (0, 11)


class WindowConfig(NamedTuple):
    """What is static about a message: the window, and the position terms per kernel."""

    filter_size: tuple[int, ...]
    position_bandwidths: tuple[tuple[float, ...] | None, ...]


def forward(config: WindowConfig, operands: Operands) -> Array:
    """Computes the message of `window_message`, its arguments already checked."""

    def run(whole_map: bool) -> Callable[..., Array]:
        # Mapping over a batch axis of `vmap` one item at a time keeps the block in the cache.
        return sequential_vmap(lambda *arguments: _forward(config, whole_map, *arguments))

    return by_platform(*operands, cpu=run(whole_map=False), accelerator=run(whole_map=True))


def gradients(config: WindowConfig, wanted: Needs, operands: Operands, cotangent: Array) -> dict[str, Any]:
    """Finds the gradients that are wanted, by the names of the operands; not that of `q`.

    Args:
        config: as in `forward`.
        wanted: which, at least one of them.
        operands: as in `forward`.
        cotangent: the gradient with respect to the message, shaped like `q`.
    """

    def stream(wanted: Needs) -> dict[str, Any]:
        def run(whole_map: bool) -> Callable[..., dict[str, Array]]:
            return sequential_vmap(lambda *arguments: _backward(config, wanted, whole_map, *arguments))

        return by_platform(*operands, cotangent, cpu=run(whole_map=False), accelerator=run(whole_map=True))

    others = wanted._replace(features=False)
    if SEPARATE_FEATURES and wanted.features and any(others):
        return stream(Needs(q=False, features=True, weights=False, left=False, right=False)) | stream(others)
    return stream(wanted)


class _Blocks(NamedTuple):
    """How the pixels of a map are cut into blocks, and where the window reaches from each."""

    grid: tuple[int, ...]  # blocks along batch and every spatial axis
    block: tuple[int, ...]  # pixels of a block along every spatial axis
    span: tuple[int, ...]
    spatial: tuple[int, ...]

    @classmethod
    def of(cls, config: WindowConfig, batch: int, spatial: tuple[int, ...], whole_map: bool) -> "_Blocks":
        span = tuple(k // 2 for k in config.filter_size)
        if whole_map:
            return cls((batch, *(1,) * len(spatial)), spatial, span, spatial)
        *leading, columns = spatial
        count = math.ceil(columns / CPU_COLUMNS)
        width = math.ceil(columns / count)
        if count > 1:
            width = math.ceil(width / 16) * 16  # whole vectors
        grid = (batch, *leading, math.ceil(columns / width))
        return cls(grid, (*(1,) * len(leading), width), span, spatial)

    def arrange(self, x: Array) -> Array:
        """`[batch, *spatial, c]` to `[batch, *leading, c, columns]`, padded by the window with zeros."""
        pad = [
            (span, span + count * size - n)
            for count, size, span, n in zip(self.grid[1:], self.block, self.span, self.spatial, strict=True)
        ]
        return jnp.pad(jnp.moveaxis(x, -1, -2), [(0, 0), *pad[:-1], (0, 0), pad[-1]])

    def starts(self) -> np.ndarray:
        """The first pixel of every block, `[blocks, 1 + spatial axes]`, batch first."""
        steps = (1, *self.block)
        ranges = [range(0, count * step, step) for count, step in zip(self.grid, steps, strict=True)]
        return np.array(list(itertools.product(*ranges)), np.int32)

    def slice(self, x: Array, start: Array, offset: list[Array] | tuple[int, ...]) -> Array:
        """The block at `start` seen through `offset` (0 = the window's first corner): `[*block, c, columns]`."""
        begin = [start[0] if x.shape[0] > 1 else 0]
        begin += [start[a + 1] + offset[a] for a in range(len(self.span))]
        begin.insert(-1, 0)
        begin = [jnp.asarray(index, jnp.int32) for index in begin]  # under x64 a loop counts in int64
        size = (1, *self.block[:-1], x.shape[-2], self.block[-1])
        return lax.dynamic_slice(x, begin, size)[0]

    def collect(self, blocks: Array) -> Array:
        """Stacked blocks `[blocks, *block, c]` to `[batch, *spatial, c]`."""
        # Either the grid or the block is trivial along every axis but the last, so order is kept.
        padded = (self.grid[0], *(g * b for g, b in zip(self.grid[1:], self.block, strict=True)))
        blocks = blocks.reshape(*padded, blocks.shape[-1])
        return blocks[(slice(None), *(slice(n) for n in self.spatial))]


def _offset(t: Array, sizes: tuple[int, ...]) -> list[Array]:
    offset = []
    for size in reversed(sizes):
        offset.append(lax.rem(t, size))
        t = lax.div(t, size)
    return offset[::-1]


def _position_table(config: WindowConfig) -> np.ndarray:
    """Every kernel's position term at every offset, `[offsets, kernels]`."""
    axes = [np.arange(k) - k // 2 for k in config.filter_size]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes)).astype(np.float64)
    columns = [
        np.zeros(len(offsets)) if theta is None else -0.5 * ((offsets / np.array(theta)) ** 2).sum(-1)
        for theta in config.position_bandwidths
    ]
    return np.exp(np.stack(columns, -1))


def _kernel(table_row: Array, differences: list[Array | None]) -> list[Array]:
    """`w_m exp(…)` per kernel: a scalar where the kernel has no features, else `[*block, columns]`."""
    values = []
    for m, difference in enumerate(differences):
        value = table_row[m]
        if difference is not None:
            # A reduction rather than a sum of slices: XLA then computes the kernel once per pixel instead
            # of fusing it into the product below, once per label (four times slower on jax 0.10).
            value = value * jnp.exp(-0.5 * jnp.sum(difference * difference, axis=-2))
        values.append(value)
    return values


def _total(kernels: list[Array], scales: list[Array | None]) -> Array:
    scaled = [
        functools.reduce(jnp.multiply, [s[..., m, :] for s in scales if s is not None], kernel)
        for m, kernel in enumerate(kernels)
    ]
    return functools.reduce(jnp.add, scaled)


def _per_label(kernel: Array) -> Array:
    return kernel if kernel.ndim == 0 else jnp.expand_dims(kernel, -2)


# Compiled here rather than by the caller, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(
    config: WindowConfig,
    whole_map: bool,
    q: Array,
    features: tuple[Array, ...],
    weights: Array,
    left: Array | None,
    right: Array | None,
) -> Array:
    blocks = _Blocks.of(config, q.shape[0], q.shape[1:-1], whole_map)
    dtype = accumulator_dtype(q.dtype)
    qs = blocks.arrange(q)
    fs = [blocks.arrange(f) if f.shape[-1] else None for f in features]
    ls, rs = (None if s is None else blocks.arrange(s) for s in (left, right))
    table = jnp.asarray(_position_table(config), dtype) * weights
    centre = blocks.span

    def one_block(start: Array) -> Array:
        here = [None if f is None else blocks.slice(f, start, centre) for f in fs]
        scale = None if ls is None else blocks.slice(ls, start, centre)

        def one_offset(t: Array, total: Array) -> Array:
            offset = _offset(t, config.filter_size)
            differences = [
                None if f is None or h is None else h - blocks.slice(f, start, offset)
                for h, f in zip(here, fs, strict=True)
            ]
            sender = None if rs is None else blocks.slice(rs, start, offset)
            kernel = _total(_kernel(table[t], differences), [scale, sender])
            return total + _per_label(kernel) * blocks.slice(qs, start, offset).astype(dtype)

        zero = jnp.zeros((*blocks.block[:-1], q.shape[-1], blocks.block[-1]), dtype)
        zero = varying_like(zero, q, features, weights, left, right)
        total = lax.fori_loop(0, len(table), one_offset, zero)
        return jnp.moveaxis(total, -2, -1).astype(q.dtype)

    return blocks.collect(lax.map(one_block, jnp.asarray(blocks.starts())))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(
    config: WindowConfig,
    needs: Needs,
    whole_map: bool,
    q: Array,
    features: tuple[Array, ...],
    weights: Array,
    left: Array | None,
    right: Array | None,
    cotangent: Array,
) -> dict[str, Array]:
    r"""Streams over the window once, collecting all gradients but that of `q` by gathering only.

    With `k_m` the kernel's value, `A = ⟨g_i, q_j⟩` and `B = ⟨q_i, g_j⟩` (labels contracted), the pair
    `(i, j)` gives pixel `i`

        ∂f_i  += -w_m k_m (s_i r_j A + s_j r_i B) (f_i - f_j)
        ∂w_m  += k_m s_i r_j A,    ∂s_i += w_m k_m r_j A,    ∂r_i += w_m k_m s_j B
    """
    blocks = _Blocks.of(config, q.shape[0], q.shape[1:-1], whole_map)
    dtype = accumulator_dtype(q.dtype)
    qs, gs = blocks.arrange(q), blocks.arrange(cotangent)
    fs = [blocks.arrange(f) if f.shape[-1] else None for f in features]
    ls, rs = (None if s is None else blocks.arrange(s) for s in (left, right))
    table = jnp.asarray(_position_table(config), dtype)
    centre = blocks.span

    initial: dict[str, list[Array | None]] = {}
    if needs.features:
        initial["features"] = [
            None if f is None else jnp.zeros((*blocks.block[:-1], f.shape[-2], blocks.block[-1]), dtype)
            for f in fs
        ]
    for name in ("weights", "left", "right"):
        if getattr(needs, name):
            initial[name] = [jnp.zeros(blocks.block, dtype)] * len(features)

    initial = varying_like(initial, q, features, weights, left, right, cotangent)

    def one_block(start: Array) -> dict:
        here = [None if f is None else blocks.slice(f, start, centre) for f in fs]
        s_i, r_i = (None if s is None else blocks.slice(s, start, centre) for s in (ls, rs))
        q_i = blocks.slice(qs, start, centre).astype(dtype)
        g_i = blocks.slice(gs, start, centre).astype(dtype)

        def times(value: Array, scale: Array | None, m: int) -> Array:
            return value if scale is None else value * scale[..., m, :]

        def one_offset(t: Array, found: dict) -> dict:
            offset = _offset(t, config.filter_size)
            differences = [
                None if f is None or h is None else h - blocks.slice(f, start, offset)
                for h, f in zip(here, fs, strict=True)
            ]
            s_j, r_j = (None if s is None else blocks.slice(s, start, offset) for s in (ls, rs))
            q_j = blocks.slice(qs, start, offset).astype(dtype)
            g_j = blocks.slice(gs, start, offset).astype(dtype)
            kernels = _kernel(table[t], differences)
            weighted = [weights[m] * kernel for m, kernel in enumerate(kernels)]
            found = dict(found)
            a = jnp.sum(g_i * q_j, axis=-2)
            b = jnp.sum(q_i * g_j, axis=-2)
            if needs.features:
                found["features"] = [
                    None
                    if difference is None
                    else found["features"][m]
                    - jnp.expand_dims(
                        weighted[m] * (times(times(a, s_i, m), r_j, m) + times(times(b, s_j, m), r_i, m)), -2
                    )
                    * difference
                    for m, difference in enumerate(differences)
                ]

            gains = {
                "weights": lambda m: kernels[m] * times(times(a, s_i, m), r_j, m),
                "left": lambda m: weighted[m] * times(a, r_j, m),
                "right": lambda m: weighted[m] * times(b, s_j, m),
            }
            for name, gain in gains.items():
                if name in found:
                    found[name] = [total + gain(m) for m, total in enumerate(found[name])]
            return found

        found = lax.fori_loop(0, len(table), one_offset, initial)
        collected: dict = {}
        if needs.features:
            collected["features"] = [
                None if f is None else jnp.moveaxis(f, -2, -1) for f in found["features"]
            ]
        if needs.weights:  # a partial sum per block, so that float32 never adds a whole image one by one
            collected["weights"] = jnp.stack([total.sum() for total in found["weights"]])
        for name in ("left", "right"):
            if name in found:
                collected[name] = jnp.stack(found[name], axis=-1)
        return collected

    found = lax.map(one_block, jnp.asarray(blocks.starts()))

    def to_operand(gradient: Array, operand: Array) -> Array:
        gradient = blocks.collect(gradient)
        if operand.shape[0] == 1:  # shared by the whole batch
            gradient = gradient.sum(axis=0, keepdims=True)
        return gradient.astype(operand.dtype)

    result: dict = {}
    if needs.features:
        result["features"] = tuple(
            jnp.zeros_like(f) if gradient is None else to_operand(gradient, f)
            for f, gradient in zip(features, found["features"], strict=True)
        )
    if needs.weights:
        result["weights"] = found["weights"].sum(axis=0)
    for name, operand in (("left", left), ("right", right)):
        if getattr(needs, name) and operand is not None:
            result[name] = to_operand(found[name], operand)
    return result
