"""Maps cut into blocks over the devices of a mesh, and the halos that a window reads across the cuts.

A device filters its own block and so must see a frame of its neighbours' pixels round it, the *halo*. Blocks
with their halos are called *extended* here: as one global array they are a map in which every block's frame
lies between the blocks, `[*batch, pieces · (block + 2 · halo), …, c]`, evenly split over the devices.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcrf import _checks

# The mesh axes that one axis of an array is split over, the slowest first.
Names = tuple[str, ...]


def read_sharding(sharding: Any, ndim: int, name: str = "sharding") -> NamedSharding:
    """Reads how maps `[*batch, *spatial]` are split: one entry per axis, over a mesh that XLA partitions for.

    Args:
        sharding: a `NamedSharding`; a specification with too few entries leaves the last axes whole, as JAX
            has it, and a last entry that stands for an unsplit label axis is dropped.
        ndim: how many axes `[*batch, *spatial]` has.
        name: the argument's name, for errors.

    Returns:
        A `NamedSharding` whose specification has `ndim` entries, each None or a tuple of names, and whose
        mesh has axes of type `Auto` only, whatever those of the argument are.

    Raises:
        TypeError: if it is no `NamedSharding` over devices.
        ValueError: if it has an entry too many.
    """
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        raise TypeError(
            f"{name}: got {sharding!r}; expected a jax.sharding.NamedSharding over a mesh of devices, e.g. "
            "NamedSharding(jax.make_mesh((8,), ('rows',)), PartitionSpec('rows'))"
        )
    names: list[Names] = []
    for entry in sharding.spec:
        if entry is not None and not isinstance(entry, str | tuple):
            raise ValueError(f"{name}: got the entry {entry} in {sharding.spec}; expected mesh axes or None")
        names.append(_names(entry))
    while len(names) > ndim and not names[-1]:
        names.pop()
    if len(names) > ndim:
        raise ValueError(
            f"{name}: got {sharding.spec}, which splits axis {len(names) - 1} of maps with the axes [*batch, *spatial] "
            f"0 to {ndim - 1}; labels stay together on a device, so leave that axis out"
        )
    names += [()] * (ndim - len(names))
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in names)))


def splits(sharding: NamedSharding | None, axes: slice = slice(None)) -> bool:
    """Whether a sharding from `read_sharding` has any of the axes on more than one device."""
    return sharding is not None and any(
        _pieces(sharding.mesh, _names(entry)) > 1 for entry in tuple(sharding.spec)[axes]
    )


def evenly(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array, with the axes left whole that do not divide by their devices.

    Arrays that enter or leave a compiled program must divide; inside one they need not.
    """
    entries = list(sharding.spec) + [None] * (len(shape) - len(sharding.spec))
    kept = [
        entry if n % _pieces(sharding.mesh, _names(entry)) == 0 else None
        for entry, n in zip(entries, shape, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def place(x: Any, sharding: NamedSharding | None) -> Any:
    """Spreads an array over the devices of the mesh; passes tracers on as they are, and all where there is none."""
    if sharding is None or not _checks.is_concrete(x):
        return x
    return jax.device_put(x, evenly(sharding, np.shape(x)))


def constrain(x: Array, sharding: NamedSharding) -> Array:
    """Tells XLA how to hold a traced array; its values stay. A concrete one passes."""
    if _checks.is_concrete(x):
        return x
    with ambient(sharding):
        return lax.with_sharding_constraint(x, sharding)


@contextlib.contextmanager
def ambient(sharding: NamedSharding | None) -> Iterator[None]:
    """Computes with no other mesh in force than that of a sharding from `read_sharding`.

    A mesh that the caller has set may be one of `Explicit` axes, along which XLA must not partition.
    """
    if sharding is None:
        yield
        return
    around = jax.sharding.get_abstract_mesh()
    if around.manual_axes:
        raise ValueError(
            f"sharding: this filter splits its maps itself and cannot be used inside shard_map over "
            f"{', '.join(map(str, around.manual_axes))}; build it without sharding there, or call it outside"
        )
    with jax.sharding.use_abstract_mesh(cast(Mesh, sharding.mesh).abstract_mesh):
        yield


class Blocks(NamedTuple):
    """How maps `[*batch, *spatial, c]` are cut over a mesh. Static; sizes need not divide.

    Maps are filled up with zeros behind, so that all blocks have one size. These pixels send nothing, and
    what they receive is dropped.

    Attributes:
        mesh: the devices.
        batch: per batch axis the mesh axes that split it, counted from the last one.
        spatial: per spatial axis likewise.
        size: pixels (or cells) along every spatial axis.
        span: how far a window reaches from its centre.

    Example:
        >>> import jax
        >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("rows",))
        >>> blocks = Blocks(mesh, (), (("rows",), ()), (5, 7), (2, 2))
        >>> blocks.block, blocks.padded, blocks.halo  # one device: the whole map, and nothing to exchange
        ((5, 7), (5, 7), (0, 0))
    """

    mesh: Mesh
    batch: tuple[Names, ...]
    spatial: tuple[Names, ...]
    size: tuple[int, ...]
    span: tuple[int, ...]

    @classmethod
    def of(
        cls, sharding: NamedSharding, size: tuple[int, ...], span: tuple[int, ...] | None = None
    ) -> "Blocks":
        """Those that a sharding from `read_sharding` asks for; without a span, nothing is seen of the neighbours."""
        names = tuple(_names(entry) for entry in sharding.spec)
        cut = len(names) - len(size)
        mesh = cast(Mesh, sharding.mesh)
        return cls(mesh, names[:cut], names[cut:], size, span or (0,) * len(size))

    @property
    def pieces(self) -> tuple[int, ...]:
        """Blocks along every spatial axis."""
        return tuple(_pieces(self.mesh, names) for names in self.spatial)

    @property
    def block(self) -> tuple[int, ...]:
        """Pixels of a block along every spatial axis."""
        return tuple(math.ceil(n / p) for n, p in zip(self.size, self.pieces, strict=True))

    @property
    def padded(self) -> tuple[int, ...]:
        """Pixels of all blocks along every spatial axis."""
        return tuple(p * b for p, b in zip(self.pieces, self.block, strict=True))

    @property
    def halo(self) -> tuple[int, ...]:
        """Pixels that are seen of the neighbours: the window's span, as far as there are any."""
        return tuple(min(s, (p - 1) * b) for s, p, b in zip(self.span, self.pieces, self.block, strict=True))

    def sharding(self, ndim: int) -> NamedSharding:
        """That of maps with `ndim` batch and spatial axes, whose batch axes are counted from the last one."""
        count = ndim - len(self.spatial)
        names = ((),) * count + self.batch
        entries = (*names[len(names) - count :], *self.spatial) if count >= 0 else self.spatial
        return NamedSharding(self.mesh, PartitionSpec(*(entry or None for entry in entries)))

    def constrain(self, x: Array) -> Array:
        """Tells XLA to hold maps `[*batch, *size, c]` in blocks; their values stay."""
        return constrain(x, NamedSharding(self.mesh, self._spec(x)))

    def pad(self, x: Array) -> Array:
        """`[*batch, *size, c]` to `[*batch, *padded, c]`, with zeros."""
        behind = [(0, p - n) for p, n in zip(self.padded, self.size, strict=True)]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1 - len(self.size)) + behind + [(0, 0)])

    def unpad(self, x: Array) -> Array:
        """`[*batch, *padded, c]` to `[*batch, *size, c]`."""
        return x[(..., *(slice(n) for n in self.size), slice(None))]

    def extend(self, x: Array) -> Array:
        """`[*batch, *padded, c]` to its extended form; what lies outside the image is zero."""
        if not x.size:  # a kernel without features
            extended = [p * (b + 2 * h) for p, b, h in zip(self.pieces, self.block, self.halo, strict=True)]
            return jnp.zeros((*x.shape[: x.ndim - 1 - len(self.size)], *extended, x.shape[-1]), x.dtype)
        return self._over_devices(self._exchange, self._spec(x), x)

    def cores(self, x: Array) -> Array:
        """The inverse of `extend`."""
        if not x.size:
            return jnp.zeros((*x.shape[: x.ndim - 1 - len(self.size)], *self.padded, x.shape[-1]), x.dtype)
        return self._over_devices(self._core, self._spec(x), x)

    def window(self, function: Callable[..., Array], maps: Array, extended: Any, replicated: Any) -> Array:
        """Applies a function of a window to every block, seen with its halo.

        Args:
            function: of maps, the arrays of `extended` and those of `replicated`, as one device sees them;
                returns maps of the shape of the first.
            maps: `[*batch, *padded, labels]`; their halos are exchanged here.
            extended: arrays in extended form, their batch axes broadcasting against those of the maps.
            replicated: arrays that every device has.

        Returns:
            `[*batch, *padded, labels]`.
        """
        count = maps.ndim - 1 - len(self.size)
        batch = maps.shape[:count]
        maps, extended = jax.tree.map(self._pad_batch, (maps, extended))

        def run(maps: Array, extended: Any, replicated: Any) -> Array:
            return self._core(function(self._exchange(maps), extended, replicated))

        spec = self._spec(maps)
        specs = jax.tree.map(self._spec, extended)
        found = self._over_devices(
            run, spec, maps, extended, replicated, specs=(spec, specs, PartitionSpec())
        )
        return found[tuple(slice(n) for n in batch)]

    def _over_devices(
        self, function: Callable[..., Array], out: PartitionSpec, *arrays: Any, specs: Any = None
    ) -> Array:
        with ambient(NamedSharding(self.mesh, out)):
            split = jax.shard_map(
                function, mesh=self.mesh, in_specs=specs or jax.tree.map(self._spec, arrays), out_specs=out
            )
            return split(*arrays)

    def _spec(self, x: Array) -> PartitionSpec:
        """The partition of `[*batch, *spatial, c]`; batch axes of one item are shared."""
        own = x.shape[: x.ndim - 1 - len(self.size)]
        names = ((),) * len(own) + self.batch
        batch = [entry if n > 1 else () for entry, n in zip(names[len(names) - len(own) :], own, strict=True)]
        batch = [
            entry if n % _pieces(self.mesh, entry) == 0 else () for entry, n in zip(batch, own, strict=True)
        ]
        return PartitionSpec(*(entry or None for entry in (*batch, *self.spatial)))

    def _pad_batch(self, x: Array) -> Array:
        """Fills batch axes up so that they divide by their devices."""
        own = x.shape[: x.ndim - 1 - len(self.size)]
        names = ((),) * len(own) + self.batch
        pad = [
            (0, -n % _pieces(self.mesh, entry) if n > 1 else 0)
            for entry, n in zip(names[len(names) - len(own) :], own, strict=True)
        ]
        return jnp.pad(x, pad + [(0, 0)] * (x.ndim - len(own)))

    def _exchange(self, block: Array) -> Array:
        """On a device: its block with the halo round it, one axis after the other so that corners come along."""
        first = block.ndim - 1 - len(self.size)
        for axis, (names, pieces, halo) in enumerate(
            zip(self.spatial, self.pieces, self.halo, strict=True), first
        ):
            size = block.shape[axis]
            before: list[Array] = []
            after: list[Array] = []
            # A halo deeper than a block comes from several devices, the farthest gives what is left.
            for hop in range(1, math.ceil(halo / size) + 1):
                width = min(size, halo - (hop - 1) * size)
                forward = [(d, d + hop) for d in range(pieces - hop)]
                backward = [(d + hop, d) for d in range(pieces - hop)]
                before.insert(
                    0, lax.ppermute(lax.slice_in_dim(block, size - width, size, axis=axis), names, forward)
                )
                after.append(lax.ppermute(lax.slice_in_dim(block, 0, width, axis=axis), names, backward))
            if halo:
                block = jnp.concatenate([*before, block, *after], axis)
        return block

    def _core(self, x: Array) -> Array:
        """On a device: an extended block without its halo."""
        return x[(..., *(slice(h, h + b) for h, b in zip(self.halo, self.block, strict=True)), slice(None))]


def _names(entry: Any) -> Names:
    """An entry of a partition, in the one form of its three that a loop can read."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _pieces(mesh: Any, names: Names) -> int:
    return math.prod(mesh.shape[name] for name in names)
