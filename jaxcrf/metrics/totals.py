"""Sums over a data set that are exact, in whatever order, batches and devices they are added up."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Int32, Int64

from jaxcrf._checks import is_concrete

_BITS = 16
_LOW = (1 << _BITS) - 1
# Ratios are added up as whole numbers of this fraction, which float32 holds exactly up to one: rounding them once
# each, by at most half of it, is all the error there is.
_FRACTION = 2.0**-24


@functools.partial(jax.tree_util.register_dataclass, data_fields=["high", "low"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Total:
    r"""Counts beyond int32 without 64-bit arithmetic: two words, :math:`2^{16} h + l`.

    Leafwise sums of totals are totals, so `jax.lax.psum(total, axis)` is right as it is: the low word of a sum over
    fewer than 32 768 devices fits. The operator `+` carries besides, and may be applied any number of times, up to
    :math:`2^{47}` (1.4 · 10¹⁴) in all.

    Attributes:
        high: int32 `[...]`.
        low: int32 `[...]`.

    Example:
        >>> total = Total.of(jnp.int32(2**31 - 1))
        >>> (total + total + total).value()
        np.int64(6442450941)
    """

    high: Int32[Array, "*shape"]
    low: Int32[Array, "*shape"]

    @classmethod
    def zeros(cls, shape: Sequence[int] = ()) -> Self:
        """Nothing yet, `[*shape]`."""
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))

    @classmethod
    def of(cls, counts: Int[Array, "..."], axis: int | tuple[int, ...] = ()) -> Self:
        """Counts from 0 to 2³¹ − 1, summed over `axis`, which has fewer than 32 768 of them."""
        counts = counts.astype(jnp.int32)
        return cls((counts >> _BITS).sum(axis), (counts & _LOW).sum(axis))._carried()

    @classmethod
    def of_ratios(cls, ratios: Float[Array, "..."], axis: int | tuple[int, ...] = ()) -> Self:
        """Numbers from 0 to 1, summed over `axis`; to be read by `as_ratios`, or times 2⁻²⁴."""
        return cls.of(jnp.round(ratios.astype(jnp.float32) / _FRACTION).astype(jnp.int32), axis)

    def __add__(self, other: "Total") -> "Total":
        return Total(self.high + other.high, self.low + other.low)._carried()

    def _carried(self) -> Self:
        return dataclasses.replace(self, high=self.high + (self.low >> _BITS), low=self.low & _LOW)

    def value(self) -> Int64[np.ndarray, "*shape"]:
        """The exact counts, on the host; not under `jit`."""
        return (np.asarray(self.high, np.int64) << _BITS) + np.asarray(self.low, np.int64)

    def as_float(self) -> Array | np.ndarray:
        """The counts as floats: float64 of NumPy, or float32 where traced, rounded once."""
        if is_concrete(self.high):
            return self.value().astype(np.float64)
        return self.high.astype(jnp.float32) * 2.0**_BITS + self.low.astype(jnp.float32)

    def as_ratios(self) -> Array | np.ndarray:
        """The sums of `of_ratios`, as `as_float` gives them."""
        return self.as_float() * _FRACTION


class Counts:
    """What is counted for a metric: a pytree of totals, and statically what they are totals of.

    Counts are immutable: `update` returns new ones, and `+` merges those of two parts of a data set. Both run under
    `jax.jit`; `jax.lax.psum(counts, axis)` merges those of all devices inside `jax.shard_map`, and `counts` streamed
    batch by batch equal those of everything at once.
    """

    def __add__(self, other: Self) -> Self:
        return self.merge(other)

    def merge(self, other: Self) -> Self:
        """The counts of two parts of a data set together.

        Args:
            other: counts of the same kind.

        Returns:
            Their sum.

        Raises:
            TypeError: if the two count different things.
            ValueError: if the two were made with different arguments.
        """
        if type(self) is not type(other):
            raise TypeError(
                f"counts: got {type(other).__name__} to be added to {type(self).__name__}; add counts of one kind"
            )
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Total):
                mine, theirs = mine.high.shape, theirs.high.shape
            if mine != theirs:
                raise ValueError(
                    f"counts: got {field.name} {theirs} to be added to {field.name} {mine}; make both by `zeros` "
                    "with the same arguments"
                )
        totals = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if isinstance(getattr(self, field.name), Total)
        }
        return dataclasses.replace(self, **totals)  # type: ignore[type-var]


def ratio(part: Array | np.ndarray, whole: Array | np.ndarray) -> Array | np.ndarray:
    """`part / whole`, NaN where nothing is divided by nothing; NumPy's where both are."""
    if isinstance(part, np.ndarray | np.generic) and isinstance(whole, np.ndarray | np.generic):
        return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), jnp.nan)


def mean_of_defined(values: Array | np.ndarray) -> Array | np.ndarray:
    """The mean over the last axis of what is not NaN; NaN if nothing is."""
    if isinstance(values, np.ndarray):
        defined = ~np.isnan(values)
        return ratio(np.where(defined, values, 0).sum(-1), defined.sum(-1).astype(np.float64))
    defined = ~jnp.isnan(values)
    return ratio(jnp.where(defined, values, 0).sum(-1), defined.sum(-1))
