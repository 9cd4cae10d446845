"""The interface of all filters, and the two that are made of nothing but others."""

import abc
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxcrf._checks import Normalization, check_normalization

# Added to the row sums `K 1` before they divide, as in Krähenbühl and Koltun's code.
NORMALIZATION_EPSILON = 1e-20

F = TypeVar("F", bound=type["Immutable"])


def filter_pytree(*, data: Sequence[str], static: Sequence[str]) -> Callable[[F], F]:
    """Registers a class of filters or kernels as a pytree of the named fields.

    Unflattening sets the fields and nothing else: a constructor validates what users pass, while JAX also
    fills trees with placeholders.

    Args:
        data: fields that hold arrays, filters or None.
        static: hashable fields that become part of the tree's structure.

    Returns:
        A class decorator.
    """

    def register(cls: F) -> F:
        def flatten(self: Immutable) -> tuple[list, tuple]:
            children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in data]
            return children, tuple(getattr(self, name) for name in static)

        def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Immutable:
            fields = dict(zip(data, children, strict=True)) | dict(zip(static, aux, strict=True))
            return cls.from_fields(**fields)

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register


class Immutable:
    """An object that is made once, and changed by making another."""

    @classmethod
    def from_fields(cls, **fields: Any) -> Self:
        """Makes an instance from its fields, unchecked."""
        self = object.__new__(cls)
        self._initialize(**fields)
        return self

    def _initialize(self, **fields: Any) -> None:
        """Sets fields, as constructors may."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def replace(self, **fields: Any) -> Self:
        """The same filter with some fields exchanged, unchecked."""
        return self.from_fields(**(vars(self) | fields))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"filters are immutable: cannot set {name!r}; build another filter")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"filters are immutable: cannot delete {name!r}; build another filter")

    def __repr__(self) -> str:
        fields = []
        for name, value in vars(self).items():
            described = jax.tree.map(
                lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else x, value
            )
            fields.append(f"{name.lstrip('_')}={described}")
        return f"{type(self).__name__}({', '.join(fields)})"


class LinearOperator(Immutable, abc.ABC):
    """A linear operator `K` on maps `[*batch, *spatial, labels]`: a `Filter` or a `PixelLabelOperator`."""

    @property
    @abc.abstractmethod
    def spatial(self) -> tuple[int, ...]:
        """The spatial shape of the maps."""

    @property
    @abc.abstractmethod
    def batch(self) -> tuple[int, ...]:
        """The operator's own batch shape; maps broadcast against it."""

    @property
    @abc.abstractmethod
    def is_symmetric(self) -> bool:
        """Whether `K.T` is `K`, known from the structure alone."""

    @property
    @abc.abstractmethod
    def T(self) -> "LinearOperator":
        """The transpose, exact: `⟨p, K q⟩ = ⟨K.T p, q⟩`."""

    @abc.abstractmethod
    def diagonal(self) -> Array:
        """The diagonal of `K`: the weight of every pixel, or of its every label, in its own message."""

    @abc.abstractmethod
    def apply(self, q: Array) -> Array:
        """`K q` of checked maps, in float32 or wider."""

    @abc.abstractmethod
    def check(self, q: Any, name: str = "q") -> Array:
        """Makes `q` an array with the operator's shape and broadcast batch, or raises."""

    def __call__(
        self, q: Float[Array, "*batch_and_spatial labels"]
    ) -> Float[Array, "*batch_and_spatial labels"]:
        """Applies the operator.

        Args:
            q: `[*batch, *spatial, labels]`; batch axes broadcast against the operator's.

        Returns:
            `K q` of the broadcast shape, in the type of `q`.

        Raises:
            ValueError: if the shape is not the operator's, or `q` is not floating point.
        """
        return _apply(self, self.check(q))


# Compiled here, so that calls outside any `jit` compile once per shape and geometry.
@jax.jit
def _apply(k: LinearOperator, q: Array) -> Array:
    return k.apply(q).astype(q.dtype)


class Filter(LinearOperator):
    r"""A linear operator `K` over pixels, the same for every label.

    `K(q)` filters maps `[*batch, *spatial, labels]`. Subclasses implement `convolve` and, where the
    filter works on a coarser grid, `restrict` and `prolong` around it: `K = prolong ∘ convolve ∘
    restrict`, all three linear and blind to labels. Algorithms that only need what lies between two
    applications of `K` carry the restricted maps from one to the next, which may be much smaller.
    """

    @property
    @abc.abstractmethod
    def T(self) -> "Filter":
        """The transpose, exact: `⟨p, K q⟩ = ⟨K.T p, q⟩`."""

    @abc.abstractmethod
    def normalized(self, kind: Normalization) -> "Filter":
        r"""Scales every kernel by its row sums `n = K 1`, computed on unweighted values.

        Args:
            kind: "before" is `K diag(1/n)`, "after" `diag(1/n) K`, "symmetric"
                `diag(n)^-½ K diag(n)^-½`, each with ε = 1e-20 added to `n`; "none" undoes any of them.

        Returns:
            The normalised filter; kernel weights multiply afterwards.

        Raises:
            ValueError: if the kind is unknown.
        """

    @property
    def restricts(self) -> bool:
        """Whether `restrict` is anything but the identity."""
        return False

    @property
    def pools(self) -> bool:
        """Whether the restricted maps are averages of `q` over cells, and so all that `K` sees of it."""
        return False

    @property
    def num_restricted(self) -> int:
        """How many maps `restrict` returns."""
        return 1

    def restrict(self, q: Array) -> tuple[Array, ...]:
        """The maps on the filter's own grid that `q` is reduced to."""
        return (q,)

    @abc.abstractmethod
    def convolve(self, restricted: tuple[Array, ...]) -> tuple[Array, ...]:
        """Filters restricted maps on their grid."""

    def prolong(self, convolved: tuple[Array, ...]) -> Array:
        """Brings filtered maps back to pixels."""
        return convolved[0]

    def apply(self, q: Array) -> Array:  # noqa: D102
        return self.prolong(self.convolve(self.restrict(q)))

    def check(self, q: Any, name: str = "q") -> Array:
        """Makes `q` an array with the filter's spatial shape and broadcast batch, or raises."""
        q = jnp.asarray(q)
        count = len(self.spatial)
        if q.ndim < count + 1 or q.shape[-1 - count : -1] != self.spatial:
            raise ValueError(
                f"{name}: got shape {q.shape}; expected [*batch, {', '.join(map(str, self.spatial))}, labels], "
                "the size of the features that the filter was built from"
            )
        if q.shape[-1] == 0:
            raise ValueError(f"{name}: got shape {q.shape}, which has no labels")
        return broadcast_to_batch(q, count + 1, self.batch, name)

    def __add__(self, other: "Filter") -> "Filter":
        """The filter `q ↦ K1 q + K2 q`."""
        if not isinstance(other, Filter):
            return NotImplemented
        if self.spatial != other.spatial:
            raise ValueError(
                f"cannot add filters over {self.spatial} and {other.spatial}: build both from one image"
            )
        return Sum((*_terms(self), *_terms(other)))

    def __radd__(self, other: Any) -> "Filter":
        # What `sum` begins with.
        return self if isinstance(other, int) and other == 0 else NotImplemented


def _terms(k: Filter) -> tuple[Filter, ...]:
    return k.terms if isinstance(k, Sum) else (k,)


class PixelLabelOperator(LinearOperator):
    """A linear operator on maps `[*batch, *spatial, labels]` that mixes labels as well as pixels.

    Linear solvers take it. Mean field does not: it wants a filter, which treats all labels alike, and a
    compatibility that mixes them.
    """

    @property
    @abc.abstractmethod
    def num_labels(self) -> int:
        """The labels of a pixel."""

    @property
    @abc.abstractmethod
    def T(self) -> "PixelLabelOperator":
        """The transpose, exact: `⟨p, K q⟩ = ⟨K.T p, q⟩`."""

    def check(self, q: Any, name: str = "q") -> Array:
        """Makes `q` an array with the operator's shape and broadcast batch, or raises."""
        q = jnp.asarray(q)
        shape = (*self.spatial, self.num_labels)
        if q.shape[-len(shape) :] != shape:
            raise ValueError(
                f"{name}: got shape {q.shape}; expected [*batch, {', '.join(map(str, shape))}], "
                "pixels and labels of what the operator was built from"
            )
        return broadcast_to_batch(q, len(shape), self.batch, name)


class ScaledFilter(Filter):
    """A filter of one symmetric kernel between scales of the pixels, `diag(left) K diag(right)`."""

    left: Array | None  # [*batch, *spatial], applied after the kernel
    right: Array | None  # likewise, applied before it
    symmetric_scales: bool

    @property
    def is_symmetric(self) -> bool:
        """True without, or with symmetric, normalisation."""
        return self.symmetric_scales

    @property
    def T(self) -> Self:
        """The transpose: scales change sides."""
        return self.replace(left=self.right, right=self.left)

    @abc.abstractmethod
    def row_sums(self) -> Float[Array, "*batch_and_spatial"]:
        """Those of the kernel without scales."""

    def normalized(self, kind: Normalization) -> Self:
        """As every filter's; where row sums are zero or negative, this is not finite."""
        check_normalization(kind)
        bare = self.replace(left=None, right=None, symmetric_scales=True)
        if kind == "none":
            return bare
        left, right = normalizing_scales(self.row_sums(), kind)
        return bare.replace(left=left, right=right, symmetric_scales=kind == "symmetric")


def scale_pixels(x: Array, scale: Array | None) -> Array:
    """Maps `[*batch, *spatial, labels]` times `[*batch, *spatial]`; None for ones."""
    return x if scale is None else x * scale[..., None]


@filter_pytree(data=("terms",), static=())
class Sum(Filter):
    """A sum of filters; usually written `K1 + K2`.

    Args:
        terms: filters over the same pixels.
    """

    terms: tuple[Filter, ...]

    def __init__(self, terms: Sequence[Filter]):
        self._initialize(terms=tuple(terms))

    @property
    def spatial(self) -> tuple[int, ...]:  # noqa: D102
        return self.terms[0].spatial

    @property
    def batch(self) -> tuple[int, ...]:  # noqa: D102
        return jnp.broadcast_shapes(*(k.batch for k in self.terms))

    @property
    def is_symmetric(self) -> bool:  # noqa: D102
        return all(k.is_symmetric for k in self.terms)

    @property
    def T(self) -> "Sum":  # noqa: D102
        return Sum([k.T for k in self.terms])

    def diagonal(self) -> Array:  # noqa: D102
        return functools.reduce(jnp.add, [k.diagonal() for k in self.terms])

    def normalized(self, kind: Normalization) -> "Sum":  # noqa: D102
        return Sum([k.normalized(kind) for k in self.terms])

    @property
    def restricts(self) -> bool:  # noqa: D102
        return any(k.restricts for k in self.terms)

    @property
    def pools(self) -> bool:  # noqa: D102
        return any(k.pools for k in self.terms)

    @property
    def num_restricted(self) -> int:  # noqa: D102
        return sum(k.num_restricted for k in self.terms) if self.restricts else 1

    def restrict(self, q: Array) -> tuple[Array, ...]:  # noqa: D102
        if not self.restricts:
            return (q,)
        return tuple(x for k in self.terms for x in k.restrict(q))

    def convolve(self, restricted: tuple[Array, ...]) -> tuple[Array, ...]:  # noqa: D102
        if not self.restricts:
            return (functools.reduce(jnp.add, [k.prolong(k.convolve(restricted)) for k in self.terms]),)
        return tuple(x for k, part in self._parts(restricted) for x in k.convolve(part))

    def prolong(self, convolved: tuple[Array, ...]) -> Array:  # noqa: D102
        if not self.restricts:
            return convolved[0]
        return functools.reduce(jnp.add, [k.prolong(part) for k, part in self._parts(convolved)])

    def _parts(self, maps: tuple[Array, ...]) -> list[tuple[Filter, tuple[Array, ...]]]:
        parts, begin = [], 0
        for k in self.terms:
            end = begin + k.num_restricted
            parts.append((k, maps[begin:end]))
            begin = end
        return parts


@filter_pytree(data=("values",), static=("_spatial",))
class Diagonal(Filter):
    """A filter that only scales: `(K q)_i = d_i q_i`.

    Args:
        values: `d`, `[*batch, *spatial]`.
        spatial_ndim: how many of the axes are spatial.

    Example:
        >>> import jax.numpy as jnp
        >>> Diagonal(jnp.full((2, 3), 2.0))(jnp.ones((2, 3, 1)))[0, 0]
        Array([2.], dtype=float32)
    """

    values: Array
    _spatial: tuple[int, ...]

    def __init__(self, values: Float[Array, "*batch_and_spatial"], spatial_ndim: int = 2):
        values = jnp.asarray(values)
        self._initialize(values=values, _spatial=values.shape[values.ndim - spatial_ndim :])

    @property
    def spatial(self) -> tuple[int, ...]:  # noqa: D102
        return self._spatial

    @property
    def batch(self) -> tuple[int, ...]:  # noqa: D102
        return self.values.shape[: self.values.ndim - len(self._spatial)]

    @property
    def is_symmetric(self) -> bool:  # noqa: D102
        return True

    @property
    def T(self) -> "Diagonal":  # noqa: D102
        return self

    def diagonal(self) -> Array:  # noqa: D102
        return self.values

    def normalized(self, kind: Normalization) -> "Diagonal":  # noqa: D102
        check_normalization(kind)
        if kind == "none":
            return self
        return self.replace(values=self.values / (self.values + NORMALIZATION_EPSILON))  # all three agree

    def convolve(self, restricted: tuple[Array, ...]) -> tuple[Array, ...]:  # noqa: D102
        (q,) = restricted
        return ((self.values[..., None] * q).astype(q.dtype),)


def broadcast_to_batch(q: Array, ndim: int, batch: tuple[int, ...], name: str) -> Array:
    """Broadcasts floating-point maps of `ndim` axes against the batch of a filter or operator, or raises."""
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"{name}: got dtype {q.dtype}; expected floating point, e.g. {name}.astype('float32')"
        )
    own = q.shape[: q.ndim - ndim]
    try:
        joint = jnp.broadcast_shapes(own, batch)
    except ValueError:
        raise ValueError(
            f"{name}: its batch axes {own} do not broadcast against those that it meets, {batch}"
        ) from None
    return q if joint == own else jnp.broadcast_to(q, (*joint, *q.shape[len(own) :]))


def normalizing_scales(sums: Array, kind: Normalization) -> tuple[Array | None, Array | None]:
    """What normalises a kernel of row sums `sums` from the left and from the right; None where nothing does."""
    sums = sums + NORMALIZATION_EPSILON
    if kind == "symmetric":
        root = lax.rsqrt(sums)
        return root, root
    return (1 / sums, None) if kind == "after" else (None, 1 / sums)


def flatten_batch(x: Array, batch: tuple[int, ...], ndim: int) -> Array:
    """`[*b, …]` with `ndim` trailing axes to `[prod(batch) or 1, …]`; 1 where `x` is shared by the batch."""
    own = x.shape[: x.ndim - ndim]
    tail = x.shape[x.ndim - ndim :]
    if math.prod(own) == 1:
        return x.reshape(1, *tail)
    return jnp.broadcast_to(x, (*batch, *tail)).reshape(-1, *tail)
