"""The pair message on GPUs of compute capability 8 and newer, by Pallas' Triton.

A program receives for a group of pixels and walks over blocks of senders, as in flash attention: kernel values of
one pair of blocks are computed into registers, from differences of features in float32, and multiply the
senders' maps at once. Exponents are never positive, so that there is no running maximum and nothing to rescale.

Three things differ from attention.

- Which blocks are visited depends on the features: `blocks.visits` lists those that count, sorted by the kernels
  that do, and one loop a sort computes no kernel in vain. A list rather than a branch, since loops with
  branches are not pipelined.
- Tensor cores round their sums towards zero (Ootomo and Yokota, *Recovering single precision accuracy from Tensor
  Cores*, 2022). A message adds up to hundreds of thousands of terms of one sign, of which that would take
  about 5e-4 off, so that only runs of a thousand pixels are added there, and the runs in float32 proper.
- Every pair is visited twice, once from either side: the exponentials are computed twice, but in the backward
  pass each pixel gathers all it gets, as receiver and as sender, and nothing needs atomics.

Maps lie so that the axis that a product contracts is innermost, which tensor cores require of 32-bit operands:
pixels in the forward pass, labels in the backward pass.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxcrf_kernels._bank import Needs, Operands, like_operand
from jaxcrf_kernels._varying import result_like
from jaxcrf_kernels.pair_message.blocks import (
    HALF_LOG2E,
    Blocks,
    beyond_limits,
    counted_kernels,
    feature_offsets,
    visits,
)
from jaxcrf_kernels.pair_message.reference import PairConfig, merge_batch, unmerge_batch

# Kernels are unrolled, and so are features: beyond this the compiler would take minutes.
MAX_KERNELS = 16
MAX_FEATURES = 256


class TritonConfig(NamedTuple):
    """The sizes of a kernel, powers of two but for `run`.

    Attributes:
        rows: receiving pixels of a program.
        block: sending pixels of an entry of the list of visits.
        columns: sending pixels whose kernel values live at a time; divides `block`.
        labels: labels of a program in the forward pass, and of one product in the backward pass.
        run: entries that tensor cores add up before their sum is added in float32 proper.
        num_warps: of 32 threads each.
        num_stages: loads in flight.
    """

    rows: int
    block: int
    columns: int
    labels: int
    run: int
    num_warps: int
    num_stages: int


def configuration(pixels: int, labels: int, features: int, *, cutoff: bool = False) -> TritonConfig:
    """Chooses sizes by shape, for an H100.

    Triton lays kernel values out with a warp's threads along the senders, so that 128 receivers over 8 warps are
    16 receivers a thread, whose features all stay in registers: with 5 features, compiled by Triton 3.9 for compute
    capability 9.0, 167 (bfloat16) to 194 (float32) registers forward and 171 to 183 backward, and nothing spilt.
    More than 32 senders at a time would spread the warps over two columns of them and spill. Many features
    take fewer receivers a thread. Two warp groups of 64 rows are what Hopper's tensor cores take.

    The rest is reasoned, not measured. With 128 receivers a message of 375×500×21 reads 40 GB from the
    second-level cache, 7 ms where the exponentials take 9; with 64 it would be twice that, and small
    images, which need more programs to fill the device, bear it.

    Args:
        pixels: of all items together.
        labels: of `q`; those that are contracted, where it is the backward pass.
        features: of all kernels together.
        cutoff: whether there is one, which makes groups of receivers single blocks.
    """
    chunk = min(64, max(16, pl.next_power_of_2(labels)))
    small = cutoff or features > 8 or pixels < 2 * 132 * 128
    rows, num_warps = (64, 4) if small else (128, 8)
    if features > 8:
        num_warps *= 2
    return TritonConfig(rows, 64, 32, chunk, run=16, num_warps=num_warps, num_stages=2)


def unsupported(config: PairConfig, operands: Operands) -> str | None:
    """What of a call these kernels do not do, or None."""
    return beyond_limits(
        config,
        operands,
        max_kernels=MAX_KERNELS,
        max_features=MAX_FEATURES,
        wide_types="which tensor cores do not multiply fast",
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
    """What is static about a kernel."""

    tile: TritonConfig
    sizes: tuple[int, ...]  # features of every kernel
    cutoff: tuple[int, ...] | None
    precision: str
    interpret: bool

    @property
    def offsets(self) -> tuple[int, ...]:
        return feature_offsets(self.sizes)

    @property
    def sorts(self) -> list[tuple[int, ...]]:
        """The kernels that count in every sort of a pair of blocks."""
        return counted_kernels(self.sizes)


def _exp2(x: Array, interpret: bool) -> Array:
    if interpret:
        return jnp.exp2(x)
    # One instruction, of relative error 2^-22; the library's function spends three more on subnormal results.
    (y,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return y


def _rounded_to_tf32(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x1000) & ~0x1FFF, jnp.float32)


def _product(x: Array, y: Array, layout: _Layout) -> Array:
    """`x yᵀ`, accumulated in float32."""
    preset = lax.DotAlgorithmPreset
    algorithm: Any = lax.Precision.HIGHEST
    if layout.precision == "bfloat16":
        x, y, algorithm = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), None
    elif layout.precision == "tf32" and layout.interpret:
        x, y = _rounded_to_tf32(x), _rounded_to_tf32(y)
    elif not layout.interpret:
        algorithm = preset.TF32_TF32_F32 if layout.precision == "tf32" else preset.TF32_TF32_F32_X3
    return lax.dot_general(
        x, y, (((1,), (1,)), ((), ())), precision=algorithm, preferred_element_type=jnp.float32
    )


class _Pixels(NamedTuple):
    """What kernel values are computed from: a vector for every feature and every axis of the image."""

    features: tuple[Array, ...]
    coordinates: tuple[Array, ...]

    @classmethod
    def load(cls, layout: _Layout, features: Any, coordinates: Any, begin: Array, size: int) -> "_Pixels":
        where = pl.ds(begin, size)
        axes = 0 if layout.cutoff is None else len(layout.cutoff)
        return cls(
            tuple(features[d, where] for d in range(sum(layout.sizes))),
            tuple(coordinates[a, where] for a in range(axes)),
        )


def _kernel_values(layout: _Layout, rows: _Pixels, columns: _Pixels, m: int) -> tuple[Array, list[Array]]:
    """The values of kernel `m` between receivers and senders, and the differences of its features."""
    begin = layout.offsets[m]
    differences = [
        rows.features[d][:, None] - columns.features[d][None, :]
        for d in range(begin, begin + layout.sizes[m])
    ]
    if differences:
        square = functools.reduce(jnp.add, [x * x for x in differences])
        values = _exp2(square * HALF_LOG2E, layout.interpret)
    else:
        values = jnp.ones((layout.tile.rows, layout.tile.columns), jnp.float32)
    if layout.cutoff is not None:
        for a, reach in enumerate(layout.cutoff):
            distance = jnp.abs(rows.coordinates[a][:, None] - columns.coordinates[a][None, :])
            values = jnp.where(distance <= float(reach), values, 0.0)
    return values, differences


def _walk(
    layout: _Layout,
    begins: Any,
    senders: Any,
    sort: int,
    step: Callable[[Array, Any], Any],
    finish: Callable[[Any, Any], Any],
    initial: Any,
    total: Any,
) -> Any:
    """Visits the blocks of one sort in runs.

    Args:
        layout: of the kernel.
        begins: where the sorts begin.
        senders: the list of blocks.
        sort: which to visit.
        step: `(first pixel, run) -> run`.
        finish: `(total, run) -> total`.
        initial: what a run starts from.
        total: what the sum of all runs starts from.
    """
    tile = layout.tile
    begin, end = begins[sort], begins[sort + 1]

    def entry(t: Array, run: Any) -> Any:
        first = pl.multiple_of(senders[t] * tile.block, tile.block)
        for part in range(tile.block // tile.columns):
            run = step(first + part * tile.columns, run)
        return run

    def one_run(r: Array, total: Any) -> Any:
        start = begin + r * tile.run
        return finish(total, lax.fori_loop(start, jnp.minimum(start + tile.run, end), entry, initial))

    runs = lax.div(end - begin + (tile.run - 1), jnp.int32(tile.run))
    return lax.fori_loop(jnp.int32(0), runs, one_run, total)


def _forward_kernel(layout: _Layout, scaled: bool, *refs: Any) -> None:
    begins, senders, features, coordinates, gains, scales, maps, result = _optional(
        refs, True, True, True, layout.cutoff is not None, True, scaled, True, True
    )
    tile = layout.tile
    first_row = pl.multiple_of(pl.program_id(0) * tile.rows, tile.rows)
    here = pl.ds(first_row, tile.rows)
    rows = _Pixels.load(layout, features, coordinates, first_row, tile.rows)
    kernels = range(len(layout.sizes))
    # Without scales a gain is the kernel's weight.
    gain = [gains[m, here][:, None] if scaled else gains[m] for m in kernels]
    zeros = jnp.zeros((tile.rows, tile.labels), jnp.float32)
    total = zeros
    for sort, counted in enumerate(layout.sorts):

        def step(first: Array, run: Array, counted: tuple[int, ...] = counted) -> Array:
            columns = _Pixels.load(layout, features, coordinates, first, tile.columns)
            where = pl.ds(first, tile.columns)
            terms = []
            for m in counted:
                values, _ = _kernel_values(layout, rows, columns, m)
                values = values * gain[m]
                terms.append(values * scales[m, where][None, :] if scaled else values)
            return run + _product(functools.reduce(jnp.add, terms), maps[:, where], layout)

        total = _walk(layout, begins, senders, sort, step, jnp.add, zeros, total)
    result[here, :] = total


class _Wanted(NamedTuple):
    """Which sums the backward kernel finds, and whether kernels have scales of their own."""

    scaled: bool
    forth: bool  # Σ_j k_m r_j A, with A = ⟨g_i, q_j⟩
    back: bool  # Σ_j k_m s_j B, with B = ⟨q_i, g_j⟩
    features: bool

    @property
    def products(self) -> int:
        """How many products of maps that takes; without scales A + B is one of twice as many labels."""
        return 1 + (self.scaled and (self.features or (self.forth and self.back)))


def _backward_kernel(layout: _Layout, wanted: _Wanted, chunks: int, *refs: Any) -> None:
    r"""For every pixel `i` the sums over `j` that its gradients are made of.

    With `A = ⟨g_i, q_j⟩` and `B = ⟨q_i, g_j⟩`, kernel values `k` and scales `s` and `r`,

        forth_i = Σ_j k r_j A,   back_i = Σ_j k s_j B,   moments_i = Σ_j k (s_i r_j A + r_i s_j B) (f_i - f_j)
    """
    needs_a = not wanted.scaled or wanted.features or wanted.forth
    needs_b = wanted.scaled and (wanted.features or wanted.back)
    begins, senders, features, coordinates, s, r, q, g, forth, back, moments = _optional(
        refs,
        *(True, True, True, layout.cutoff is not None, wanted.scaled, wanted.scaled),
        *(True, True, wanted.forth, wanted.back, wanted.features),
    )
    tile = layout.tile
    first_row = pl.multiple_of(pl.program_id(0) * tile.rows, tile.rows)
    here = pl.ds(first_row, tile.rows)
    rows = _Pixels.load(layout, features, coordinates, first_row, tile.rows)
    kernels = range(len(layout.sizes))
    left = [s[m, here][:, None] if wanted.scaled else None for m in kernels]
    right = [r[m, here][:, None] if wanted.scaled else None for m in kernels]

    def agreement(receiver: Any, sender: Any, own: Array | None, where: Any) -> Array:
        if own is not None:
            return _product(own, sender[where, :], layout)

        def chunk(c: Array, total: Array) -> Array:
            labels = pl.ds(pl.multiple_of(c * tile.labels, tile.labels), tile.labels)
            return total + _product(receiver[here, labels], sender[where, labels], layout)

        zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        return lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, zeros)

    # One chunk of labels stays where it is; more are read again for every block, from the first-level cache.
    own_g = g[here, :] if chunks == 1 and needs_a else None
    own_q = q[here, :] if chunks == 1 and needs_b else None
    zero = jnp.zeros(tile.rows, jnp.float32)
    sums = {("forth", m): zero for m in kernels if wanted.forth}
    sums |= {("back", m): zero for m in kernels if wanted.back}
    if wanted.features:
        sums |= {("moments", d): zero for d in range(sum(layout.sizes))}

    for sort, counted in enumerate(layout.sorts):
        names = [(kind, m) for kind in ("forth", "back") for m in counted if (kind, m) in sums]
        for m in counted:
            own = range(layout.offsets[m], layout.offsets[m] + layout.sizes[m])
            names += [("moments", d) for d in own if wanted.features]
        if not names:
            continue

        def step(first: Array, run: Any, counted: Any = counted, names: Any = names) -> Any:
            found = dict(zip(names, run, strict=True))
            columns = _Pixels.load(layout, features, coordinates, first, tile.columns)
            where = pl.ds(first, tile.columns)
            a = agreement(g, q, own_g, where) if needs_a else None
            b = agreement(q, g, own_q, where) if needs_b else None
            for m in counted:
                values, differences = _kernel_values(layout, rows, columns, m)
                energies = []
                for kind, product, own, other in (("forth", a, left, r), ("back", b, right, s)):
                    if product is None:
                        continue
                    energy = values * product
                    if wanted.scaled:
                        energy = energy * other[m, where][None, :]
                    if (kind, m) in found:
                        found[kind, m] += jnp.sum(energy, axis=1)
                    energies.append(energy * own[m] if wanted.scaled else energy)
                if wanted.features:
                    energy = functools.reduce(jnp.add, energies)
                    for d, difference in enumerate(differences, layout.offsets[m]):
                        found["moments", d] += jnp.sum(energy * difference, axis=1)
            return tuple(found[name] for name in names)

        def finish(total: Any, run: Any) -> Any:
            return tuple(x + y for x, y in zip(total, run, strict=True))

        total = tuple(sums[name] for name in names)
        zeros = tuple(zero for _ in names)
        total = _walk(layout, begins, senders, sort, step, finish, zeros, total)
        sums |= dict(zip(names, total, strict=True))
    for (kind, index), value in sums.items():
        {"forth": forth, "back": back, "moments": moments}[kind][index, here] = value


def _optional(refs: Sequence[Any], *present: bool) -> Iterator[Any]:
    """The references in order, None where one is absent."""
    rest = iter(refs)
    return iter([next(rest) if here else None for here in present])


def _whole(shape: tuple[int, ...], batch: int) -> pl.BlockSpec:
    """All of an operand's item: kernels slice it themselves. `batch` is the axis of programs along items."""
    rest = (0,) * (len(shape) - 1)
    return pl.BlockSpec((None, *shape[1:]), lambda *ids: (0 if shape[0] == 1 else ids[batch], *rest))


def _program_spec(x: Array, batch: int) -> pl.BlockSpec:
    """What belongs to one program: `[batch, groups, …]`."""
    shared = x.shape[0] == 1
    return pl.BlockSpec((None, None, x.shape[2]), lambda *ids: (0 if shared else ids[batch], ids[0], 0))


def _call(kernel: Any, layout: _Layout, **arguments: Any) -> Callable[..., Any]:
    parameters = plgpu.CompilerParams(num_warps=layout.tile.num_warps, num_stages=layout.tile.num_stages)
    return pl.pallas_call(kernel, compiler_params=parameters, interpret=layout.interpret, **arguments)


class _Arranged(NamedTuple):
    """The operands of a bank in order of blocks."""

    blocks: Blocks
    layout: _Layout
    begins: Array
    senders: Array
    features: Array
    coordinates: Array | None
    left: Array | None  # [batch or 1, kernels, pixels]; ones where only the other is given
    right: Array | None

    @property
    def operands(self) -> list[Array]:
        """What every kernel starts with."""
        own = [self.begins, self.senders, self.features]
        return own if self.coordinates is None else [*own, self.coordinates]

    def specs(self, batch: int) -> list[pl.BlockSpec]:
        own = [_program_spec(x, batch) for x in (self.begins, self.senders)]
        own.append(_whole(self.features.shape, batch))
        if self.coordinates is not None:
            shape = self.coordinates.shape
            own.append(pl.BlockSpec(shape, lambda *ids: (0,) * len(shape)))
        return own


def _arrange(
    config: PairConfig,
    tile: TritonConfig,
    features: tuple[Array, ...],
    left: Array | None,
    right: Array | None,
    interpret: bool,
) -> _Arranged:
    blocks = Blocks.of(config.spatial, tile.block, tile.rows // tile.block)
    sizes = tuple(f.shape[-1] for f in features)
    batch = max(f.shape[0] for f in features)
    joined = jnp.concatenate([jnp.broadcast_to(f, (batch, *f.shape[1:])) for f in features], axis=-1)
    if joined.shape[-1] == 0:  # constant kernels alone: nothing reads this
        joined = jnp.zeros((*joined.shape[:-1], 1), jnp.float32)
    joined = blocks.arrange(joined.astype(jnp.float32), copies=True)
    listed = visits(blocks, joined, sizes, tolerance=config.tolerance, cutoff=config.cutoff)
    if left is not None or right is not None:
        ones = jnp.ones((1, math.prod(config.spatial), len(sizes)), jnp.float32)
        left, right = (blocks.arrange(ones if s is None else s, copies=True) for s in (left, right))
    return _Arranged(
        blocks,
        _Layout(tile, sizes, config.cutoff, config.precision, interpret),
        listed.begins,
        listed.senders,
        joined,
        None if config.cutoff is None else blocks.coordinates(),
        left,
        right,
    )


# Compiled here rather than by the caller, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    config: PairConfig,
    tile: TritonConfig | None,
    interpret: bool,
    operands: Operands,
) -> Array:
    q, features, weights, left, right = operands
    merged_q, merged = merge_batch(q, *features, left, right)
    batch, pixels, labels = merged_q.shape
    number = sum(f.shape[-1] for f in features)
    tile = tile or configuration(batch * pixels, labels, number, cutoff=config.cutoff is not None)
    arranged = _arrange(config, tile, features, left, right, interpret)
    blocks, layout = arranged.blocks, arranged.layout
    scaled = arranged.left is not None
    chunks = math.ceil(labels / tile.labels)
    maps = blocks.arrange_maps(merged_q, chunks * tile.labels, config.precision)
    if arranged.left is not None and arranged.right is not None:
        gains = [weights[:, None] * arranged.left, arranged.right]
        gain_specs = [_whole(x.shape, 2) for x in gains]
    else:
        gains = [weights]
        gain_specs = [pl.BlockSpec(weights.shape, lambda *ids: (0,))]
    inputs = [*arranged.operands, *gains, maps]
    message = _call(
        functools.partial(_forward_kernel, layout, scaled),
        layout,
        grid=(blocks.groups, chunks, batch),
        in_specs=[
            *arranged.specs(2),
            *gain_specs,
            pl.BlockSpec((None, tile.labels, blocks.pixels), lambda i, c, b: (b, c, 0)),
        ],
        out_specs=pl.BlockSpec((None, blocks.pixels, tile.labels), lambda i, c, b: (b, 0, c)),
        out_shape=result_like((batch, blocks.pixels, chunks * tile.labels), jnp.float32, inputs),
        name="pair_message_forward",
    )(*inputs)
    message = blocks.collect(message[..., :labels])
    return unmerge_batch(message, q, merged)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _backward(
    config: PairConfig,
    needs: Needs,
    tile: TritonConfig | None,
    interpret: bool,
    operands: Operands,
    cotangent: Array,
) -> dict[str, Any]:
    q, features, weights, left, right = operands
    scaled = left is not None or right is not None
    sizes = tuple(f.shape[-1] for f in features)
    merged_q, _ = merge_batch(q, *features, left, right)
    merged_g, _ = merge_batch(cotangent, *features, left, right)
    wanted = _Wanted(
        scaled,
        forth=needs.weights or needs.left,
        back=needs.right,
        features=needs.features and sum(sizes) > 0,
    )
    if not any(wanted[1:]):  # features of constant kernels: there are none
        return {}
    receiver, sender = merged_g, merged_q
    both = not scaled and wanted.features
    if both:
        # Only A + B is needed, and a pair counts towards its kernel's weight from either side.
        receiver, sender = (
            jnp.concatenate([merged_g, merged_q], -1),
            jnp.concatenate([merged_q, merged_g], -1),
        )
    batch, pixels, labels = sender.shape
    tile = tile or configuration(batch * pixels, labels, sum(sizes), cutoff=config.cutoff is not None)
    arranged = _arrange(config, tile, features, left, right, interpret)
    blocks, layout = arranged.blocks, arranged.layout
    chunks = math.ceil(labels / tile.labels)

    def arrange(x: Array) -> Array:
        return blocks.arrange_maps(x, chunks * tile.labels, config.precision, channels_last=True)

    scales = [x for x in (arranged.left, arranged.right) if x is not None]
    inputs = [*arranged.operands, *scales, arrange(sender), arrange(receiver)]
    counts = [len(sizes)] * (wanted.forth + wanted.back) + [sum(sizes)] * wanted.features
    shapes = [result_like((batch, n, blocks.pixels), jnp.float32, inputs) for n in counts]
    results = _call(
        functools.partial(_backward_kernel, layout, wanted, chunks),
        layout,
        grid=(blocks.groups, batch),
        in_specs=[*arranged.specs(1), *(_whole(x.shape, 1) for x in inputs[len(arranged.operands) :])],
        out_specs=[_whole(x.shape, 1) for x in shapes],
        out_shape=shapes,
        name="pair_message_backward",
    )(*inputs)
    forth, back, moments = _optional(results, wanted.forth, wanted.back, wanted.features)

    def to_operand(gradient: Array, operand: Array) -> Array:
        return like_operand(blocks.collect(jnp.swapaxes(gradient, 1, 2)), operand)

    found: dict[str, Any] = {}
    if wanted.features:
        ends = [sum(sizes[: m + 1]) for m in range(len(sizes))]
        found["features"] = tuple(
            -weights[m] * to_operand(moments[:, end - f.shape[-1] : end], f)
            if f.shape[-1]
            else jnp.zeros_like(f)
            for m, (f, end) in enumerate(zip(features, ends, strict=True))
        )
    if needs.weights:
        terms = forth if arranged.left is None else forth * arranged.left
        found["weights"] = terms.sum(axis=(0, 2)) * (0.5 if both else 1.0)
    for name, operand, gradient in (("left", left, forth), ("right", right, back)):
        if getattr(needs, name) and operand is not None:
            found[name] = weights * to_operand(gradient, operand)
    return found
