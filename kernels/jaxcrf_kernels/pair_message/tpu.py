"""The pair message on TPUs, by Pallas' Mosaic.

A core holds a group of receiving pixels along the sublanes and walks over blocks of senders, which lie along the
lanes. The kernel values of a pair of blocks go strip by strip into a scratch of the vector memory, and from there
into one product with the senders' maps. Maps are `[labels, pixels]`: pixels along the lanes, where 21 labels
take 24 rows instead of 128 lanes.

A pair of blocks in which no kernel counts is stepped over, though its operands are still fetched: 64 KiB for
512 senders, which takes less time than a step's start. With a cut-off only neighbouring blocks are stepped through.

The backward pass lets each pixel gather what it gets as receiver and as sender. Its sums over the senders stay
apart by lanes until all senders have been seen, since adding up lanes is slow.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcrf_kernels._bank import Needs, Operands, like_operand
from jaxcrf_kernels._varying import result_like
from jaxcrf_kernels.pair_message.blocks import (
    Blocks,
    active,
    beyond_limits,
    counted_kernels,
    feature_offsets,
    neighbours,
)
from jaxcrf_kernels.pair_message.reference import PairConfig, merge_batch, unmerge_batch

LANES = 128

# Kernels are unrolled, and so are features; the sums of the backward pass take 256 KiB a feature at 512 receivers.
MAX_KERNELS = 8
MAX_FEATURES = 32


class TpuConfig(NamedTuple):
    """The sizes of a kernel.

    Attributes:
        rows: receiving pixels of a step, a multiple of `columns`.
        columns: sending pixels of a step, a multiple of 128.
        labels: of a step; a multiple of 16, which fits 16 and 32 bits alike.
        strip: receivers whose kernel values are computed at a time.
    """

    rows: int
    columns: int
    labels: int
    strip: int


def configuration(
    pixels: int, labels: int, features: int, *, cutoff: tuple[int, ...] | None = None, backward: bool = False
) -> TpuConfig:
    """Chooses sizes by shape. Reasoned, not measured.

    A step takes about 0.35 µs to start, in which a core computes some 10^5 kernel values: 512 × 512 of them
    outweigh that, at 1 MiB of scratch for each array of such a size. Strips of 8 receivers by 512 senders are four
    registers of each quantity, which hides the latency of one operation behind the others'.

    Args:
        pixels: of one item.
        labels: of `q`; those that are contracted, where it is the backward pass.
        features: of all kernels together.
        cutoff: whose reach no block needs to exceed by much.
        backward: whether it is for the backward pass.
    """
    wanted = 512
    if backward and features > 8:  # less room next to the sums
        wanted = 256
    if cutoff is not None:
        wanted = min(wanted, pl.next_power_of_2(max(1, math.prod(c + 1 for c in cutoff))))
    columns = max(LANES, min(wanted, pl.next_power_of_2(pixels)))
    return TpuConfig(columns, columns, min(256, _up(labels, 16)), strip=8)


def _up(n: int, step: int) -> int:
    return math.ceil(n / step) * step


def unsupported(config: PairConfig, operands: Operands) -> str | None:
    """What of a call these kernels do not do, or None."""
    return beyond_limits(
        config,
        operands,
        max_kernels=MAX_KERNELS,
        max_features=MAX_FEATURES,
        wide_types="which TPUs do not compute with",
    )


def forward(config: PairConfig, operands: Operands, *, interpret: bool = False) -> Array:
    """Computes the message of `pair_message`, its arguments already checked."""
    return _forward(config, None, interpret, operands)


def gradients(
    config: PairConfig, wanted: Needs, operands: Operands, cotangent: Array, *, interpret: bool = False
) -> dict[str, Any]:
    """Finds the gradients that are wanted, as the reference does."""
    return _backward(config, wanted, None, interpret, operands, cotangent)


class _Layout(NamedTuple):
    """What is static about a kernel, and where things lie among the channels of a pixel.

    The channels are all features, the coordinates if there is a cut-off, and the left and right scales if any.
    """

    tile: TpuConfig
    sizes: tuple[int, ...]  # features of every kernel
    cutoff: tuple[int, ...] | None
    scaled: bool
    precision: str

    @property
    def offsets(self) -> tuple[int, ...]:
        return feature_offsets(self.sizes)

    @property
    def coordinates(self) -> int:
        return sum(self.sizes)

    @property
    def left(self) -> int:
        return self.coordinates + (0 if self.cutoff is None else len(self.cutoff))

    @property
    def right(self) -> int:
        return self.left + len(self.sizes)

    @property
    def sorts(self) -> list[tuple[int, ...]]:
        """The kernels that count in every sort of a pair of blocks."""
        return counted_kernels(self.sizes)


def _values(layout: _Layout, rows: Array, columns: Any, m: int) -> tuple[Array, list[Array]]:
    """The values of kernel `m` in a strip, and the differences of its features.

    Args:
        layout: of the kernel.
        rows: channels of the strip's receivers, `[strip, channels]`.
        columns: channels of the senders, `[channels, columns]`.
        m: which kernel.
    """

    def difference(c: int) -> Array:
        return rows[:, c : c + 1] - columns[c : c + 1, :]

    begin = layout.offsets[m]
    differences = [difference(d) for d in range(begin, begin + layout.sizes[m])]
    if differences:
        values = jnp.exp(-0.5 * functools.reduce(jnp.add, [x * x for x in differences]))
    else:
        values = jnp.ones((layout.tile.strip, layout.tile.columns), jnp.float32)
    for a, reach in enumerate(layout.cutoff or ()):
        values = jnp.where(jnp.abs(difference(layout.coordinates + a)) <= float(reach), values, 0.0)
    return values, differences


def _strips(layout: _Layout, strip: Callable[[Any], None]) -> None:
    """Calls `strip` with the place of every strip of receivers."""
    size = layout.tile.strip

    def body(s: Array, _: None) -> None:
        strip(pl.ds(pl.multiple_of(s * size, size), size))

    lax.fori_loop(jnp.int32(0), jnp.int32(layout.tile.rows // size), body, None)


def _product(x: Array, y: Array, contract: tuple[int, int], precision: str) -> Array:
    """A product of matrices, accumulated in float32; TPUs have no TF32, and compute it in full."""
    exact = precision != "bfloat16"
    if not exact:
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _forward_kernel(
    layout: _Layout,
    _senders: Any,
    sorts: Any,
    weights: Any,
    receivers: Any,
    senders: Any,
    maps: Any,
    result: Any,
    values: Any,
) -> None:
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _() -> None:
        result[...] = jnp.zeros(result.shape, jnp.float32)

    sort = sorts[0, step]
    for number, counted in enumerate(layout.sorts, 1):

        @pl.when(sort == number)
        def _(counted: tuple[int, ...] = counted) -> None:
            def strip(here: Any) -> None:
                rows = receivers[here, :]
                terms = []
                for m in counted:
                    term = _values(layout, rows, senders, m)[0] * weights[m]
                    if layout.scaled:
                        of_row = rows[:, layout.left + m : layout.left + m + 1]
                        term = term * of_row * senders[layout.right + m : layout.right + m + 1, :]
                    terms.append(term)
                values[here, :] = functools.reduce(jnp.add, terms)

            _strips(layout, strip)

    @pl.when(sort > 0)
    def _() -> None:
        result[...] += _product(maps[...], values[...], (1, 1), layout.precision)


class _Wanted(NamedTuple):
    """Which sums the backward kernel finds, and of which products of maps."""

    forth: bool  # Σ_j k_m r_j A, with A = ⟨g_i, q_j⟩
    back: bool  # Σ_j k_m s_j B, with B = ⟨q_i, g_j⟩
    features: bool
    products: tuple[str, ...]  # without scales A + B is one product of twice as many labels

    def names(self, layout: _Layout, counted: Sequence[int]) -> list[tuple[str, int]]:
        """The sums of some kernels, the moments by feature."""
        found = [("forth", m) for m in counted if self.forth] + [("back", m) for m in counted if self.back]
        for m in counted:
            own = range(layout.offsets[m], layout.offsets[m] + layout.sizes[m])
            found += [("moments", d) for d in own if self.features]
        return found


def _backward_kernel(layout: _Layout, wanted: _Wanted, *refs: Any) -> None:
    r"""For every pixel `i` the sums over `j` that its gradients are made of.

    With `A = ⟨g_i, q_j⟩` and `B = ⟨q_i, g_j⟩`, kernel values `k` and scales `s` and `r`,

        forth_i = Σ_j k r_j A,   back_i = Σ_j k s_j B,   moments_i = Σ_j k (s_i r_j A + r_i s_j B) (f_i - f_j)
    """
    count = len(wanted.products)
    _senders, sorts, receivers, senders, *rest = refs
    maps, (result, sums, *products) = rest[: 2 * count], rest[2 * count :]
    all_names = wanted.names(layout, range(len(layout.sizes)))
    step, chunk = pl.program_id(2), pl.program_id(3)
    last_chunk = chunk == pl.num_programs(3) - 1

    @pl.when((step == 0) & (chunk == 0))
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    sort = sorts[0, step]

    @pl.when((sort > 0) & (chunk == 0))
    def _() -> None:
        for product in products:
            product[...] = jnp.zeros(product.shape, jnp.float32)

    @pl.when(sort > 0)
    def _() -> None:
        for n, product in enumerate(products):
            of_receivers, of_senders = maps[2 * n], maps[2 * n + 1]
            product[...] += _product(of_receivers[...], of_senders[...], (1, 0), layout.precision)

    def channel(x: Any, c: int, *, column: bool) -> Array:
        return x[:, c : c + 1] if column else x[c : c + 1, :]

    for number, counted in enumerate(layout.sorts, 1):

        @pl.when((sort == number) & last_chunk)
        def _(counted: tuple[int, ...] = counted) -> None:
            def strip(here: Any) -> None:
                rows = receivers[here, :]
                found: dict[tuple[str, int], Array] = {}
                for m in counted:
                    values, differences = _values(layout, rows, senders, m)
                    energies = []
                    for name, product in zip(wanted.products, products, strict=True):
                        energy = values * product[here, :]
                        own, other = (layout.left, layout.right)[:: 1 if name == "forth" else -1]
                        if layout.scaled:
                            energy = energy * channel(senders, other + m, column=False)
                        found[name, m] = energy
                        if layout.scaled:
                            energy = energy * channel(rows, own + m, column=True)
                        energies.append(energy)
                    energy = functools.reduce(jnp.add, energies)
                    for d, difference in enumerate(differences, layout.offsets[m]):
                        found["moments", d] = energy * difference
                for which in wanted.names(layout, counted):
                    pieces = [
                        found[which][:, lane : lane + LANES] for lane in range(0, layout.tile.columns, LANES)
                    ]
                    sums[all_names.index(which), here, :] += functools.reduce(jnp.add, pieces)

            _strips(layout, strip)

    @pl.when((step == pl.num_programs(2) - 1) & last_chunk)
    def _() -> None:
        for index in range(len(all_names)):
            result[:, index : index + 1] = jnp.sum(sums[index], axis=1, keepdims=True)


class _Arranged(NamedTuple):
    """The operands of a bank in order of blocks.

    Attributes:
        blocks: how pixels are cut.
        layout: of the kernel.
        senders: which block every step's senders are, `[groups * steps]`.
        sorts: which kernels count in a step, `[batch, groups, 1, steps]`: none, one alone, or several.
        channels: `[batch, pixels, channels]`.
        steps: how many blocks a group steps through.
    """

    blocks: Blocks
    layout: _Layout
    senders: Array
    sorts: Array
    channels: Array
    steps: int

    @property
    def operands(self) -> list[Array]:
        """The list of senders, the sorts, and the channels of receivers and of senders."""
        return [self.senders, self.sorts, self.channels, jnp.swapaxes(self.channels, 1, 2)]

    def sender(self, i: Any, step: Any, senders: Any) -> Any:
        return step if self.layout.cutoff is None else senders[i * self.steps + step]

    def specs(self, order: Callable[..., Any]) -> list[pl.BlockSpec]:
        """Of the sorts and the channels; `order` turns a program's place into item, group and step."""
        tile, number = self.layout.tile, self.channels.shape[-1]
        shared_sorts, shared = self.sorts.shape[0] == 1, self.channels.shape[0] == 1

        def at(index: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *ids: index(*order(*ids[:-1]), ids[-1])

        return [
            pl.BlockSpec(
                (None, None, 1, self.steps),
                at(lambda b, i, j, senders: (0 if shared_sorts else b, i, 0, 0)),
                memory_space=pltpu.SMEM,
            ),
            pl.BlockSpec((None, tile.rows, number), at(lambda b, i, j, senders: (0 if shared else b, i, 0))),
            pl.BlockSpec(
                (None, number, tile.columns),
                at(lambda b, i, j, senders: (0 if shared else b, 0, self.sender(i, j, senders))),
            ),
        ]


def _arrange(
    config: PairConfig,
    tile: TpuConfig,
    features: tuple[Array, ...],
    left: Array | None,
    right: Array | None,
) -> _Arranged:
    blocks = Blocks.of(config.spatial, tile.columns, tile.rows // tile.columns)
    sizes = tuple(f.shape[-1] for f in features)
    given = [*features, *(s for s in (left, right) if s is not None)]
    batch = max(x.shape[0] for x in given)

    def arranged(x: Array) -> Array:
        x = blocks.arrange(x.astype(jnp.float32), channels_last=True, copies=True)
        return jnp.broadcast_to(x, (batch, *x.shape[1:]))

    parts = [arranged(f) for f in features]
    joined = jnp.swapaxes(jnp.concatenate(parts, axis=-1), 1, 2)
    table, inside = (None, None) if config.cutoff is None else neighbours(blocks, config.cutoff)
    flags = active(blocks, joined, sizes, tolerance=config.tolerance, senders=table)
    if inside is not None:
        flags = [flag & inside for flag in flags]
    sorts = sum(flag * (m + 1) for m, flag in enumerate(flags))
    sorts = jnp.where(sum(flag.astype(jnp.int32) for flag in flags) > 1, len(flags) + 1, sorts)
    if config.cutoff is not None:
        coordinates = blocks.coordinates().T[None]
        parts.append(jnp.broadcast_to(coordinates, (batch, *coordinates.shape[1:])))
    scaled = left is not None or right is not None
    if scaled:
        ones = jnp.ones((1, math.prod(config.spatial), len(sizes)), jnp.float32)
        parts += [arranged(ones if s is None else s) for s in (left, right)]
    channels = jnp.concatenate(parts, axis=-1)
    if channels.shape[-1] == 0:  # constant kernels alone: nothing reads this
        channels = jnp.zeros((1, blocks.pixels, 1), jnp.float32)
    return _Arranged(
        blocks,
        _Layout(tile, sizes, config.cutoff, scaled, config.precision),
        jnp.zeros(1, jnp.int32) if table is None else table.reshape(-1),
        sorts.astype(jnp.int32)[:, :, None, :],
        channels,
        sorts.shape[-1],
    )


# Compiled here rather than by the caller, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    config: PairConfig,
    tile: TpuConfig | None,
    interpret: bool,
    operands: Operands,
) -> Array:
    q, features, weights, left, right = operands
    merged_q, merged = merge_batch(q, *features, left, right)
    batch, pixels, labels = merged_q.shape
    tile = tile or configuration(pixels, labels, sum(f.shape[-1] for f in features), cutoff=config.cutoff)
    arranged = _arrange(config, tile, features, left, right)
    blocks, layout = arranged.blocks, arranged.layout
    chunks = math.ceil(labels / tile.labels)
    maps = blocks.arrange_maps(merged_q, chunks * tile.labels, config.precision)
    listed, sorts, *channels = arranged.operands
    inputs = [listed, sorts, weights, *channels, maps]
    of_sorts, of_receivers, of_senders = arranged.specs(lambda b, c, i, j: (b, i, j))
    message = pl.pallas_call(
        functools.partial(_forward_kernel, layout),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, chunks, blocks.groups, arranged.steps),
            in_specs=[
                of_sorts,
                pl.BlockSpec(memory_space=pltpu.SMEM),
                of_receivers,
                of_senders,
                pl.BlockSpec(
                    (None, tile.labels, tile.columns),
                    lambda b, c, i, j, senders: (b, c, arranged.sender(i, j, senders)),
                ),
            ],
            out_specs=pl.BlockSpec((None, tile.labels, tile.rows), lambda b, c, i, j, senders: (b, c, i)),
            scratch_shapes=[pltpu.VMEM((tile.rows, tile.columns), jnp.float32)],
        ),
        out_shape=result_like((batch, chunks * tile.labels, blocks.pixels), jnp.float32, inputs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        interpret=interpret,
        name="pair_message_forward",
    )(*inputs)
    message = blocks.collect(jnp.swapaxes(message[:, :labels], 1, 2))
    return unmerge_batch(message, q, merged)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _backward(
    config: PairConfig,
    needs: Needs,
    tile: TpuConfig | None,
    interpret: bool,
    operands: Operands,
    cotangent: Array,
) -> dict[str, Any]:
    q, features, weights, left, right = operands
    scaled = left is not None or right is not None
    sizes = tuple(f.shape[-1] for f in features)
    merged_q, _ = merge_batch(q, *features, left, right)
    merged_g, _ = merge_batch(cotangent, *features, left, right)
    of_features = needs.features and sum(sizes) > 0
    forth, back = needs.weights or needs.left, needs.right
    if not (of_features or forth or back):  # features of constant kernels: there are none
        return {}
    both = not scaled and of_features
    if both:
        # Only A + B is needed, and a pair counts towards its kernel's weight from either side.
        pairs = {
            "forth": (
                jnp.concatenate([merged_g, merged_q], -1),
                jnp.concatenate([merged_q, merged_g], -1),
            )
        }
    else:
        pairs = {"forth": (merged_g, merged_q), "back": (merged_q, merged_g)}
        pairs = {
            name: pairs[name] for name, asked in (("forth", forth), ("back", back)) if asked or of_features
        }
    wanted = _Wanted(forth, back, of_features, tuple(pairs))
    batch, pixels, labels = pairs[wanted.products[0]][0].shape
    tile = tile or configuration(pixels, labels, sum(sizes), cutoff=config.cutoff, backward=True)
    arranged = _arrange(config, tile, features, left, right)
    blocks, layout = arranged.blocks, arranged.layout
    chunks = math.ceil(labels / tile.labels)

    maps = [
        blocks.arrange_maps(x, chunks * tile.labels, config.precision, channels_last=of_receiver)
        for pair in pairs.values()
        for x, of_receiver in zip(pair, (True, False), strict=True)
    ]
    # A block's last axis must be whole lanes, or all there is: chunks of labels get an axis of their own.
    maps = [
        jnp.swapaxes(x.reshape(batch, blocks.pixels, chunks, tile.labels), 1, 2) if n % 2 == 0 else x
        for n, x in enumerate(maps)
    ]
    map_specs = [
        pl.BlockSpec((None, None, tile.rows, tile.labels), lambda b, i, j, c, senders: (b, c, i, 0)),
        pl.BlockSpec(
            (None, tile.labels, tile.columns),
            lambda b, i, j, c, senders: (b, c, arranged.sender(i, j, senders)),
        ),
    ]
    names = wanted.names(layout, range(len(sizes)))
    inputs = [*arranged.operands, *maps]
    found = pl.pallas_call(
        functools.partial(_backward_kernel, layout, wanted),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, blocks.groups, arranged.steps, chunks),
            in_specs=[*arranged.specs(lambda b, i, j, c: (b, i, j)), *(map_specs * len(pairs))],
            out_specs=pl.BlockSpec((None, tile.rows, len(names)), lambda b, i, j, c, senders: (b, i, 0)),
            scratch_shapes=[
                pltpu.VMEM((len(names), tile.rows, LANES), jnp.float32),
                *(pltpu.VMEM((tile.rows, tile.columns), jnp.float32) for _ in pairs),
            ],
        ),
        out_shape=result_like((batch, blocks.pixels, len(names)), jnp.float32, inputs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="pair_message_backward",
    )(*inputs)
    found = blocks.collect(found)

    def part(kind: str, kernels: Sequence[int]) -> Array:
        return jnp.stack([found[..., names.index((kind, m))] for m in kernels], axis=-1)

    result: dict[str, Any] = {}
    kernels = range(len(sizes))
    if of_features:
        result["features"] = tuple(
            -weights[m] * like_operand(part("moments", range(begin, begin + size)), f)
            if size
            else jnp.zeros_like(f)
            for m, (f, begin, size) in enumerate(zip(features, layout.offsets, sizes, strict=True))
        )
    if needs.weights:
        terms = part("forth", kernels)
        if left is not None:
            terms = terms * left
        result["weights"] = terms.sum(axis=(0, 1)) * (0.5 if both else 1.0)
    if needs.left and left is not None:
        result["left"] = weights * like_operand(part("forth", kernels), left)
    if needs.right and right is not None:
        result["right"] = weights * like_operand(part("back", kernels), right)
    return result
