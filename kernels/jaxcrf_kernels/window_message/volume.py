"""What kernels know of a message beforehand, its maps of one to three axes seen as volumes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcrf_kernels._bank import Needs, Operands, like_operand
from jaxcrf_kernels.window_message.reference import WindowConfig


class Bank(NamedTuple):
    """What is static about the operands.

    The maps of a pixel are its features, then its left scales, then its right scales.

    Attributes:
        window: offsets along depth, rows and columns.
        bandwidths: per kernel None, or one per axis.
        sizes: features per kernel.
        left: whether receivers are scaled.
        right: whether senders are scaled.
    """

    window: tuple[int, int, int]
    bandwidths: tuple[tuple[float, ...] | None, ...]
    sizes: tuple[int, ...]
    left: bool
    right: bool

    @classmethod
    def of(cls, config: WindowConfig, operands: Operands) -> "Bank":
        """Of the operands of a call."""
        features, left, right = operands.features, operands.left, operands.right
        leading = (1,) * (3 - len(config.filter_size))
        depth, rows, columns = (*leading, *config.filter_size)
        # An axis that is not there has one offset, 0, whose bandwidth does not matter.
        thetas = tuple(
            None if t is None else (*(1.0,) * len(leading), *t) for t in config.position_bandwidths
        )
        sizes = tuple(f.shape[-1] for f in features)
        return cls((depth, rows, columns), thetas, sizes, left is not None, right is not None)

    @property
    def kernels(self) -> int:
        """How many there are."""
        return len(self.sizes)

    @property
    def halo(self) -> tuple[int, int, int]:
        """How far the window reaches to either side."""
        depth, rows, columns = (k // 2 for k in self.window)
        return depth, rows, columns

    @property
    def maps(self) -> int:
        """How many a pixel has."""
        return sum(self.sizes) + self.kernels * (self.left + self.right)

    def feature_maps(self, m: int) -> range:
        """Which maps are the features of kernel `m`."""
        start = sum(self.sizes[:m])
        return range(start, start + self.sizes[m])

    def left_maps(self, m: int) -> list[int]:
        """Which map is the left scale of kernel `m`, where there is one."""
        return [sum(self.sizes) + m] if self.left else []

    def right_maps(self, m: int) -> list[int]:
        """Which map is its right scale, likewise."""
        return [sum(self.sizes) + self.kernels * self.left + m] if self.right else []

    def positions(self, spans: Sequence[int], before: Sequence[int] = (0, 0, 0)) -> np.ndarray:
        """Every kernel's position term along each axis, `[kernels, sum of spans]`, and zeros around the window.

        Args:
            spans: how many numbers each axis gets.
            before: how many zeros come before those of the window.
        """
        terms = []
        for theta in self.bandwidths:
            for axis, (size, span, zeros) in enumerate(zip(self.window, spans, before, strict=True)):
                offsets = np.arange(size) - size // 2
                scaled = np.zeros(size) if theta is None else offsets / theta[axis]
                terms.append(np.pad(np.exp(-0.5 * scaled**2), (zeros, span - zeros - size)))
        return np.concatenate(terms).reshape(self.kernels, -1).astype(np.float32)

    def streamed(self, needs: Needs) -> Needs:
        """What a pass over pairs must find: what is needed, exists, and is not the gradient of `q`."""
        return Needs(
            q=False,
            features=needs.features and any(self.sizes),
            weights=needs.weights,
            left=needs.left and self.left,
            right=needs.right and self.right,
        )

    def slots(self, wanted: Needs) -> dict[str, range]:
        """Where the gradients of a pixel are found: by name, a range of numbers."""
        counts = {"features": sum(self.sizes)} | dict.fromkeys(("weights", "left", "right"), self.kernels)
        found, start = {}, 0
        for name, count in counts.items():
            if getattr(wanted, name):
                found[name] = range(start, start + count)
                start += count
        return found

    def gradients(self, wanted: Needs) -> int:
        """How many numbers these are."""
        return sum(map(len, self.slots(wanted).values()))


EVERYTHING = Needs(q=False, features=True, weights=True, left=True, right=True)


def as_volume(x: Array) -> Array:
    """`[batch, *spatial, channels]` with three spatial axes."""
    return x.reshape(x.shape[0], *(1,) * (5 - x.ndim), *x.shape[1:])


def stacked_maps(features: Sequence[Array], *scales: Array | None) -> Array | None:
    """All maps side by side, `[batch or 1, depth, rows, columns, maps]` in float32, or None for none."""
    arrays = [as_volume(x) for x in (*features, *scales) if x is not None and x.shape[-1]]
    if not arrays:
        return None
    batch = max(x.shape[0] for x in arrays)
    arrays = [jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in arrays]
    return jnp.concatenate([x.astype(jnp.float32) for x in arrays], axis=-1)


def unsupported_type(operands: Operands) -> str | None:
    """Says which operand is of a type that kernels do not compute with, or None."""
    for array in (operands.q, *operands.features, operands.weights):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"{array.dtype} operands, only float32, bfloat16 and float16"
    return None


def named_gradients(
    bank: Bank, wanted: Needs, operands: Operands, stream: Callable[[Needs], Array]
) -> dict[str, Any]:
    """Tells the gradients of a pass apart.

    Args:
        bank: of the operands.
        wanted: which gradients are.
        operands: of the message.
        stream: finds `[batch, depth, rows, columns, numbers]` by `Bank.slots`, those of the weights pixel by pixel.

    Returns:
        Gradients by the names of the operands.
    """
    wanted = bank.streamed(wanted)
    if not any(wanted):
        return {}
    found = stream(wanted)
    gradients: dict[str, Any] = {}
    for name, slots in bank.slots(wanted).items():
        part = found[..., slots.start : slots.stop]
        if name == "features":
            pieces = [bank.feature_maps(m) for m in range(bank.kernels)]
            gradients[name] = tuple(
                _flat(part[..., piece.start : piece.stop], f)
                for piece, f in zip(pieces, operands.features, strict=True)
            )
        elif name == "weights":
            # Row by row, slice by slice, so that float32 never adds a whole image one by one.
            total = part.sum(axis=3).sum(axis=2).sum(axis=(0, 1))
            gradients[name] = total.astype(operands.weights.dtype)
        else:
            gradients[name] = _flat(part, getattr(operands, name))
    return gradients


def _flat(gradient: Array, operand: Array) -> Array:
    return like_operand(gradient, operand).reshape(operand.shape)


def product(first: Array, *factors: Array) -> Array:
    """Of one array or more."""
    return functools.reduce(jnp.multiply, factors, first)
