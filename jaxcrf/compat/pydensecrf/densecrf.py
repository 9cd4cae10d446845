r"""`pydensecrf.densecrf`: fully connected CRFs over the permutohedral lattice.

With unary energies `U`, kernels `K_m` and compatibilities `M_m`, an update is

.. math::
    Q \leftarrow \mathrm{softmax}\Big(-U - \sum_m M_m K_m Q\Big), \qquad
    M_m = -w I, \; \mathrm{diag}(v) \text{ or } \tfrac12 (C + C^\top)

for a scalar `w`, a vector `v` or a matrix `C`: scalars greater than zero smooth, vectors and matrices *less*
than zero on the diagonal do. Everywhere else in jaxcrf a compatibility greater than zero smooths.
"""

import enum
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float
from numpy.typing import ArrayLike

from jaxcrf import _checks
from jaxcrf._checks import Normalization
from jaxcrf.compatibility import reward
from jaxcrf.filters import Filter, Lattice

# Below this a probability counts as this in `q log q`.
KL_FLOOR = 1e-20


class KernelType(enum.IntEnum):
    """What of a kernel the original could learn. Inference does not depend on it."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


class NormalizationType(enum.IntEnum):
    """Where a kernel is divided by its row sums `n = K 1`; "symmetric" is by the root, on both sides."""

    NO_NORMALIZATION = 0
    NORMALIZE_BEFORE = 1
    NORMALIZE_AFTER = 2
    NORMALIZE_SYMMETRIC = 3


CONST_KERNEL = KernelType.CONST_KERNEL
DIAG_KERNEL = KernelType.DIAG_KERNEL
FULL_KERNEL = KernelType.FULL_KERNEL
NO_NORMALIZATION = NormalizationType.NO_NORMALIZATION
NORMALIZE_BEFORE = NormalizationType.NORMALIZE_BEFORE
NORMALIZE_AFTER = NormalizationType.NORMALIZE_AFTER
NORMALIZE_SYMMETRIC = NormalizationType.NORMALIZE_SYMMETRIC

_NORMALIZATIONS: dict[NormalizationType, Normalization] = {
    NO_NORMALIZATION: "none",
    NORMALIZE_BEFORE: "before",
    NORMALIZE_AFTER: "after",
    NORMALIZE_SYMMETRIC: "symmetric",
}

# A filter, and its compatibility in jaxcrf's signs.
_Term = tuple[Filter, Array]


class Unary:
    """What `DenseCRF.setUnary` takes; make a `ConstUnary` or a `LogisticUnary`."""

    _energy: np.ndarray | None = None


class ConstUnary(Unary):
    """Unary energies that are given.

    Args:
        u: energies `(labels, pixels)`, `-log p`; `inf` forbids a label.

    Raises:
        TypeError: if they are not real numbers.
        ValueError: if they are not two-dimensional, hold NaN or `-inf`, or forbid a pixel every label.
    """

    def __init__(self, u: ArrayLike):
        energy = np.array(_matrix("u", u, "energies (labels, pixels)"))  # a copy: the caller's may change
        _check_energy("u", energy)
        self._energy = energy


class LogisticUnary(Unary):
    """Unary energies that are linear in features, `U = L f`.

    Args:
        L: weights `(labels, features)`.
        f: features of the pixels `(features, pixels)`.

    Raises:
        TypeError: if they are not real numbers.
        ValueError: if their shapes do not fit each other, or they hold NaN or infinite values.
    """

    def __init__(self, L: ArrayLike, f: ArrayLike):
        weights = _matrix("L", L, "weights (labels, features)")
        features = _matrix("f", f, "features (features, pixels)")
        if weights.shape[1] != features.shape[0]:
            raise ValueError(
                f"L, f: got shapes {weights.shape} and {features.shape}; expected (labels, features) and "
                "(features, pixels) with as many features in both"
            )
        _check_finite("L", weights)
        _check_finite("f", features)
        self._energy = weights @ features
        _check_energy("L, f: their product", self._energy)


class DenseCRF:
    """A CRF of `nvar` variables, every two of which are connected.

    Args:
        nvar: the number of variables, or pixels, `N`.
        nlabels: the number of labels.

    Raises:
        TypeError: if one is not a whole number.
        ValueError: if one is less than 1.

    Example:
        >>> import numpy as np
        >>> crf = DenseCRF(3, 2)
        >>> crf.setUnaryEnergy(-np.log([[0.9, 0.4, 0.9], [0.1, 0.6, 0.1]]))
        >>> crf.addPairwiseEnergy([[0.0, 0.1, 0.2]], compat=2)
        >>> np.argmax(crf.inference(5), axis=0)
        array([0, 0, 0])

    References:
        Krähenbühl and Koltun, 2011, algorithm 1; for the symmetric normalisation their *Parameter
        Learning and Convergent Inference for Dense Random Fields*, 2013.
    """

    def __init__(self, nvar: int, nlabels: int):
        self._nvar = _count("nvar", nvar)
        self._nlabels = _count("nlabels", nlabels)
        self._logits: Array | None = None  # [N, labels]
        self._terms: tuple[_Term, ...] = ()

    def setUnaryEnergy(self, u: ArrayLike, f: ArrayLike | None = None) -> None:
        """Sets the unary energies, in place of earlier ones.

        Args:
            u: energies `(labels, N)`, `-log p`; with `f`, weights `(labels, features)`.
            f: features of the pixels `(features, N)`; the energies then are `u @ f`.

        Raises:
            TypeError: if they are not real numbers.
            ValueError: if a shape is another, or they hold NaN, `-inf` or a pixel with no label left.
        """
        self.setUnary(ConstUnary(u) if f is None else LogisticUnary(u, f))

    def setUnary(self, u: Unary) -> None:
        """Sets the unary energies, in place of earlier ones.

        Args:
            u: a `ConstUnary` or a `LogisticUnary` over `(labels, N)`; it may be used again elsewhere.

        Raises:
            TypeError: if it is something else.
            ValueError: if it is for another number of labels or pixels.
        """
        energy = u._energy if isinstance(u, Unary) else None
        if energy is None:
            raise TypeError(
                f"u: got {type(u).__name__}; expected a ConstUnary or a LogisticUnary. "
                "Arrays of energies go to setUnaryEnergy."
            )
        expected = (self._nlabels, self._nvar)
        if energy.shape != expected:
            raise ValueError(
                f"u: got energies of shape {energy.shape}; expected {expected}, (labels, pixels). {_LAYOUT}"
            )
        self._logits = _logits_of(energy)

    def addPairwiseEnergy(
        self,
        features: ArrayLike,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        r"""Adds the kernel `exp(-½‖f_i - f_j‖²)`, as the permutohedral lattice approximates it.

        Args:
            features: `f`, `(d, N)`, divided by the bandwidths.
            compat: a scalar `w`, for `-w I`; a vector `(labels,)`, for its diagonal matrix; or a matrix
                `(labels, labels)`, of which the symmetric part is taken.
            kernel: a `KernelType`; without effect.
            normalization: a `NormalizationType`.

        Raises:
            TypeError: if features or compatibility are not real numbers.
            ValueError: if a shape is another, values are NaN or infinite or beyond the lattice's range, or
                an enumeration has no such member.
        """
        array = _matrix("features", features, f"features (d, {self._nvar})")
        if array.shape[1] != self._nvar:
            raise ValueError(
                f"features: got shape {array.shape}; expected (d, {self._nvar}), one column per pixel. {_LAYOUT}"
            )
        _check_finite("features", array)
        self._add("features", np.ascontiguousarray(array.T), compat, kernel, normalization)

    def _add(
        self, name: str, features: Float[np.ndarray, "pixels d"], compat: Any, kernel: int, normalization: int
    ) -> None:
        compatibility = _compatibility(compat, self._nlabels)
        _member(KernelType, "kernel", kernel)
        kind = _NORMALIZATIONS[_member(NormalizationType, "normalization", normalization)]
        _check_range(name, features)
        try:
            k = _filter(features)
        except ValueError as error:  # the lattice knows them as features
            raise ValueError(f"{name}: {str(error).removeprefix('features: ')}") from None
        self._terms = (*self._terms, (k.normalized(kind), compatibility))

    def inference(self, niter: int) -> Float[np.ndarray, "labels pixels"]:
        """Runs mean-field updates from `softmax(-U)` on.

        Args:
            niter: how many; with 0 the result is `softmax(-U)`.

        Returns:
            Probabilities `Q`, `(labels, N)` float32, the caller's own.

        Raises:
            TypeError: if `niter` is not a whole number.
            ValueError: if `niter` is negative, or there are no unary energies yet.
        """
        niter = _count("niter", niter, least=0)
        return _maps(_infer(self._unary("inference"), self._terms, niter))

    def startInference(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Begins an inference that the caller advances with `stepInference`.

        Returns:
            `Q = softmax(-U)` and two buffers, each `(labels, N)` float32.

        Raises:
            ValueError: if there are no unary energies yet.
        """
        q = _maps(_infer(self._unary("startInference"), (), 0))
        return q, np.zeros_like(q), np.zeros_like(q)

    def stepInference(self, Q: np.ndarray, tmp1: np.ndarray, tmp2: np.ndarray) -> None:
        """Advances `Q` by one update, in place.

        Args:
            Q: probabilities `(labels, N)`; overwritten by the new ones.
            tmp1: buffer of the same shape, overwritten by the scores whose softmax the new `Q` is.
            tmp2: buffer of the same shape, overwritten by the last kernel's energies `M K Q`.

        Raises:
            TypeError: if one is not a NumPy array of floating point.
            ValueError: if one cannot be written to or has another shape, `Q` holds NaN or infinite
                values, or there are no unary energies yet.
        """
        logits = self._unary("stepInference")
        for name, buffer in (("Q", Q), ("tmp1", tmp1), ("tmp2", tmp2)):
            self._check_buffer(name, buffer)
        _check_finite("Q", Q)
        new, scores, last = jax.device_get(_step(logits, self._terms, _pixels_first(Q)))
        if last is not None:
            tmp2[...] = last.T
        tmp1[...] = scores.T
        Q[...] = new.T

    def klDivergence(self, Q: ArrayLike) -> float:
        r"""The energy that the updates lower, `Σ Q log Q + Σ U Q + Σ_m ⟨Q, M_m K_m Q⟩`.

        This is the Kullback-Leibler divergence to the CRF but for its `log Z`, with every pair counted
        twice as often as there.

        Args:
            Q: probabilities `(labels, N)`.

        Returns:
            The sum, with `0 · inf = 0` where a forbidden label has no probability.

        Raises:
            TypeError: if `Q` is not of real numbers.
            ValueError: if it has another shape or holds NaN or infinite values.
        """
        array = _matrix("Q", Q, f"probabilities {(self._nlabels, self._nvar)}")
        self._check_shape("Q", array)
        _check_finite("Q", array)
        # Float32 within a pixel, float64 over the many.
        per_pixel = _divergences(self._logits, self._terms, _pixels_first(array))
        return float(np.asarray(per_pixel).sum(dtype=np.float64))

    def _unary(self, caller: str) -> Array:
        if self._logits is None:
            raise ValueError(f"{caller}: there are no unary energies yet; call setUnaryEnergy first")
        return self._logits

    def _check_shape(self, name: str, array: np.ndarray) -> None:
        if array.shape != (self._nlabels, self._nvar):
            raise ValueError(
                f"{name}: got shape {array.shape}; expected {(self._nlabels, self._nvar)}, (labels, pixels), "
                "as startInference returns it"
            )

    def _check_buffer(self, name: str, buffer: np.ndarray) -> None:
        if not isinstance(buffer, np.ndarray) or buffer.dtype.kind != "f":
            got = buffer.dtype if isinstance(buffer, np.ndarray) else type(buffer).__name__
            raise TypeError(
                f"{name}: got {got}; expected a NumPy array of floating point, which is written to: pass on "
                "what startInference returned"
            )
        self._check_shape(name, buffer)
        if not buffer.flags.writeable:
            raise ValueError(f"{name}: is read-only; pass a copy, {name}.copy()")


class DenseCRF2D(DenseCRF):
    """A `DenseCRF` over the pixels of an image; pixel `(x, y)` is variable `y * w + x`.

    Args:
        w: the image's width.
        h: the image's height.
        nlabels: the number of labels.

    Raises:
        TypeError: if one is not a whole number.
        ValueError: if one is less than 1.

    Example:
        >>> import numpy as np
        >>> image = np.zeros((4, 6, 3), np.uint8)
        >>> image[:, 3:] = 200
        >>> probs = np.full((2, 4, 6), 0.5)
        >>> probs[0, 1, 1], probs[1, 1, 1] = 0.99, 0.01
        >>> probs[0, 2, 4], probs[1, 2, 4] = 0.01, 0.99
        >>> crf = DenseCRF2D(6, 4, 2)
        >>> crf.setUnaryEnergy(-np.log(probs).reshape(2, -1))
        >>> crf.addPairwiseBilateral(sxy=(10, 10), srgb=20, rgbim=image, compat=10)
        >>> np.argmax(crf.inference(5), axis=0).reshape(4, 6)[0]
        array([0, 0, 0, 1, 1, 1])
    """

    def __init__(self, w: int, h: int, nlabels: int):
        self._w, self._h = _count("w", w), _count("h", h)
        super().__init__(self._w * self._h, nlabels)

    def addPairwiseGaussian(
        self,
        sxy: Any,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds the smoothness kernel, which compares positions.

        Args:
            sxy: its bandwidth in pixels, one number or `(x, y)`.
            compat: as for `addPairwiseEnergy`.
            kernel: a `KernelType`; without effect.
            normalization: a `NormalizationType`.

        Raises:
            TypeError: if bandwidth or compatibility are not real numbers.
            ValueError: as `addPairwiseEnergy`, and if a bandwidth is not positive, or so small that the
                image exceeds the lattice's range.
        """
        features = np.empty((self._h, self._w, 2), np.float32)
        self._fill_positions(features, _bandwidths("sxy", sxy, 2))
        self._add("sxy", features.reshape(self._nvar, -1), compat, kernel, normalization)

    def addPairwiseBilateral(
        self,
        sxy: Any,
        srgb: Any,
        rgbim: ArrayLike,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds the appearance kernel, which compares positions and colours.

        Args:
            sxy: the bandwidth of positions in pixels, one number or `(x, y)`.
            srgb: the bandwidth of colours in the image's unit, one number or one per channel.
            rgbim: the image `(h, w, 3)`; usually uint8, but any real numbers will do.
            compat: as for `addPairwiseEnergy`.
            kernel: a `KernelType`; without effect.
            normalization: a `NormalizationType`.

        Raises:
            TypeError: if image, bandwidths or compatibility are not real numbers.
            ValueError: as `addPairwiseGaussian`, and if the image has another shape or holds NaN or
                infinite values.
        """
        image = _numbers("rgbim", rgbim, "an image of real numbers")
        if image.shape != (self._h, self._w, 3):
            raise ValueError(
                f"rgbim: got shape {image.shape}; expected {(self._h, self._w, 3)}, (height, width, 3). For other "
                "numbers of channels, build features with utils.create_pairwise_bilateral and add them with "
                "addPairwiseEnergy."
            )
        _check_finite("rgbim", image)
        features = np.empty((self._h, self._w, 5), np.float32)
        self._fill_positions(features, _bandwidths("sxy", sxy, 2))
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # what comes of it is checked
            np.divide(image, _bandwidths("srgb", srgb, 3), out=features[..., 2:], casting="same_kind")
        self._add("sxy, srgb", features.reshape(self._nvar, -1), compat, kernel, normalization)

    def _fill_positions(self, features: np.ndarray, bandwidths: Float[np.ndarray, "2"]) -> None:
        # x before y, and divided in float32: the lattice notices both the order and the last bit.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            features[..., 0] = np.arange(self._w, dtype=np.float32) / bandwidths[0]
            features[..., 1] = (np.arange(self._h, dtype=np.float32) / bandwidths[1])[:, None]


def _filter(features: Float[np.ndarray, "pixels d"]) -> Filter:
    return Lattice(features, scaling="classic", spatial_ndim=1)


@jax.jit
def _logits_of(energy: Float[Array, "labels pixels"]) -> Float[Array, "pixels labels"]:
    return -energy.T


def _penalties(terms: tuple[_Term, ...], q: Array) -> list[Array]:
    """Every term's energies `M K q`."""
    return [-reward(k(q), compatibility) for k, compatibility in terms]


def _scores(logits: Array, penalties: list[Array]) -> Array:
    return functools.reduce(jnp.subtract, penalties, logits)


# All three take the number of iterations, the filters and their weights as data: they compile once per shape.
@jax.jit
def _infer(logits: Array, terms: tuple[_Term, ...], num_iterations: Array | int) -> Array:
    def update(_: Array, q: Array) -> Array:
        return jax.nn.softmax(_scores(logits, _penalties(terms, q)), axis=-1)

    return lax.fori_loop(0, num_iterations, update, jax.nn.softmax(logits, axis=-1))


@jax.jit
def _step(logits: Array, terms: tuple[_Term, ...], q: Array) -> tuple[Array, Array, Array | None]:
    penalties = _penalties(terms, q)
    scores = _scores(logits, penalties)
    return jax.nn.softmax(scores, axis=-1), scores, penalties[-1] if penalties else None


@jax.jit
def _divergences(logits: Array | None, terms: tuple[_Term, ...], q: Array) -> Float[Array, " pixels"]:
    total = q * jnp.log(jnp.maximum(q, KL_FLOOR))
    if logits is not None:
        total -= jnp.where(q == 0, 0, q * logits)
    for penalty in _penalties(terms, q):
        total += q * penalty
    return total.sum(-1)


def _maps(q: Float[Array, "pixels labels"]) -> Float[np.ndarray, "labels pixels"]:
    return np.array(q).T


def _pixels_first(maps: Float[np.ndarray, "labels pixels"]) -> Float[np.ndarray, "pixels labels"]:
    return np.ascontiguousarray(maps.T, np.float32)


_LAYOUT = "Pixel (x, y) is column y * width + x: reshape maps (labels, height, width) with (labels, -1)."


def _count(name: str, value: Any, least: int = 1) -> int:
    if not _checks.is_whole(value):
        raise TypeError(f"{name}: got {value!r}; expected a whole number >= {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}; expected a whole number >= {least}")
    return int(value)


def _numbers(name: str, x: Any, expected: str) -> np.ndarray:
    """`x` as float32, whatever it came as."""
    try:
        array = np.asarray(x)
    except ValueError:  # nested lists of different lengths
        raise TypeError(
            f"{name}: got {type(x).__name__} with rows of different lengths; expected {expected}"
        ) from None
    if not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "biu"):
        got = array.dtype if hasattr(x, "dtype") else type(x).__name__
        raise TypeError(f"{name}: got {got}; expected {expected}")
    with np.errstate(over="ignore"):  # becomes infinite, which is checked
        return array.astype(np.float32, copy=False)


def _matrix(name: str, x: Any, expected: str) -> np.ndarray:
    array = _numbers(name, x, expected)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name}: got shape {array.shape}; expected {expected}. {_LAYOUT}")
    return array


def _check_finite(name: str, array: np.ndarray) -> None:
    # Two reductions that pass NaN on, without an array of booleans.
    if not (math.isfinite(array.min()) and math.isfinite(array.max())):
        raise ValueError(
            f"{name}: holds NaN, infinite values or such as float32 has not; replace them, e.g. with "
            "numpy.nan_to_num"
        )


def _check_energy(name: str, energy: np.ndarray) -> None:
    low, high = energy.min(), energy.max()
    if np.isnan(low) or low == -np.inf:
        raise ValueError(
            f"{name}: holds NaN or -inf; replace them. Energies are -log p, and inf forbids a label."
        )
    if high == np.inf and np.isinf(energy.min(axis=0)).any():
        pixel = int(np.argmax(energy.min(axis=0)))
        raise ValueError(
            f"{name}: is inf for all labels of pixel {pixel}; clip probabilities before taking the logarithm, as "
            "utils.unary_from_softmax does"
        )


def _check_range(name: str, features: Float[np.ndarray, "pixels d"]) -> None:
    """Raises where the original's lattice, whose coordinates are 16-bit, wraps around."""
    room = 2**16 // (features.shape[1] + 1)
    with np.errstate(invalid="ignore", over="ignore"):
        span = float(np.nan_to_num(np.ptp(features, axis=0), nan=np.inf).max())
    if span > room:
        raise ValueError(
            f"{name}: the features span {span:.4g} bandwidths; the lattice has room for {room}. Use greater "
            "bandwidths: at such as these pixels have no neighbours."
        )


def _bandwidths(name: str, value: Any, count: int) -> Float[np.ndarray, " axes"]:
    values = _numbers(name, value, f"one number or {count}")
    if values.ndim > 1:
        raise ValueError(f"{name}: got shape {values.shape}; expected one number or {count}")
    return np.array(_checks.positive_bandwidths(name, value, count), np.float32)


def _compatibility(compat: Any, num_labels: int) -> Array:
    """The compatibility in jaxcrf's signs: a scalar rewards, a vector rewards, a matrix penalises."""
    array = _numbers("compat", compat, "a number, a vector or a matrix of numbers")
    if array.shape not in ((), (num_labels,), (num_labels, num_labels)):
        raise ValueError(
            f"compat: got shape {array.shape}; expected a number w for -w I, ({num_labels},) for a diagonal or "
            f"({num_labels}, {num_labels}) for a full matrix: this CRF has {num_labels} labels"
        )
    _check_finite("compat", array)
    if array.ndim == 0:
        return jnp.asarray(array)
    return jnp.asarray(-array if array.ndim == 1 else (array + array.T) / 2)


def _member(enumeration: Any, name: str, value: Any) -> Any:
    try:
        return enumeration(value)
    except ValueError:
        names = ", ".join(member.name for member in enumeration)
        raise ValueError(f"{name}: got {value!r}; expected one of {names}") from None
