"""`pydensecrf.utils`: unary energies and features, as NumPy arrays in the original's layout."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from jaxcrf import _checks
from jaxcrf.compat.pydensecrf.densecrf import _bandwidths, _check_finite, _count, _numbers


def unary_from_labels(
    labels: ArrayLike, n_labels: int, gt_prob: float, zero_unsure: bool = True
) -> Float[np.ndarray, "n_labels pixels"]:
    r"""Energies of a label map that is right with probability `gt_prob`.

    .. math::
        U_l(i) = -\log p \text{ where } l = \text{labels}_i, \quad
        -\log \tfrac{1 - p}{n - 1} \text{ elsewhere}, \quad
        \log n \text{ everywhere where the label is unsure}.

    Args:
        labels: label map of any shape, whole numbers. With `zero_unsure` label `k` is row `k - 1`, otherwise
            row `k`.
        n_labels: `n`; with `zero_unsure` the label 0 is not counted.
        gt_prob: `p`, between 0 and 1, both excluded; less than `1 / n` speaks against the labels.
        zero_unsure: whether 0 means "unknown" and not a label.

    Returns:
        Float32 energies `(n_labels, pixels)`.

    Raises:
        TypeError: if labels or their number are not whole numbers.
        ValueError: if a label or the probability is out of range.

    Example:
        >>> unary_from_labels([[1, 2, 0]], 2, gt_prob=0.75).round(3)
        array([[0.288, 1.386, 0.693],
               [1.386, 0.288, 0.693]], dtype=float32)
    """
    n_labels = _count("n_labels", n_labels)
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob: got {gt_prob}; expected a probability between 0 and 1, e.g. 0.7")
    flat = np.asarray(labels).reshape(-1)
    if flat.dtype.kind == "f" and np.array_equal(flat, np.rint(flat)):
        flat = flat.astype(np.int64)
    if flat.dtype.kind not in "biu":
        raise TypeError(
            f"labels: got {flat.dtype} that are not whole numbers; pass a label map, and probabilities to "
            "unary_from_softmax"
        )
    first = 1 if zero_unsure else 0
    low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
    if low < 0 or high >= n_labels + first:
        raise ValueError(
            f"labels: holds {low if low < 0 else high}; expected {first} to {n_labels - 1 + first}"
            f"{', or 0 for unsure' if zero_unsure else ''}, for n_labels={n_labels} and zero_unsure={zero_unsure}"
        )
    # A single label has no others for the rest of the probability.
    wrong = -np.log((1 - gt_prob) / max(n_labels - 1, 1))
    rows = np.arange(first, n_labels + first)[:, None]
    energy = np.where(rows == flat, np.float32(-np.log(gt_prob)), np.float32(wrong))
    if zero_unsure:
        energy[:, flat == 0] = np.log(n_labels)
    return energy


def unary_from_softmax(
    sm: ArrayLike, scale: float | None = None, clip: float | None = 1e-5
) -> Float[np.ndarray, "labels pixels"]:
    r"""Energies of probabilities, `U = -log max(s p + (1 - s) / n, clip)`.

    Args:
        sm: probabilities `(n, *shape)`, labels first.
        scale: `s`, how far the probabilities are trusted, greater than 0 and at most 1; None trusts them.
        clip: the smallest probability that is believed. None believes all, and 0 becomes `inf`.

    Returns:
        Float32 energies `(n, pixels)`.

    Raises:
        TypeError: if `sm` is not of real numbers.
        ValueError: if values are not between 0 and 1 (up to 1e-2), or `scale` or `clip` is out of range.

    Example:
        >>> unary_from_softmax([[1.0, 0.5], [0.0, 0.5]], scale=0.5).round(3)
        array([[0.288, 0.693],
               [1.386, 0.693]], dtype=float32)
    """
    probs = np.asarray(sm)
    if probs.dtype != np.float64:
        probs = _numbers("sm", sm, "probabilities (labels, ...)")
    if not probs.ndim or not probs.size:
        raise ValueError(f"sm: got shape {probs.shape}; expected probabilities (labels, ...)")
    _check_finite("sm", probs)
    low, high = probs.min(), probs.max()
    if low < -_checks.SUM_TOLERANCE or high > 1 + _checks.SUM_TOLERANCE:
        raise ValueError(
            f"sm: holds values from {low:.4g} to {high:.4g}; expected probabilities. Apply a softmax over the "
            "first axis to scores, and divide 8-bit probabilities by 255."
        )
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale: got {scale}; expected more than 0 and at most 1, or None")
        probs = scale * probs + (1 - scale) / len(probs)
    if clip is not None and not 0 < clip < 1:
        raise ValueError(f"clip: got {clip}; expected a probability between 0 and 1, e.g. 1e-5, or None")
    with np.errstate(divide="ignore"):
        energy = -np.log(np.clip(probs, 0 if clip is None else clip, 1))
    return energy.reshape(len(probs), -1).astype(np.float32)


def create_pairwise_gaussian(sdims: Any, shape: Sequence[int]) -> Float[np.ndarray, "dims pixels"]:
    """Positions as features for `DenseCRF.addPairwiseEnergy`, in any number of dimensions.

    Args:
        sdims: bandwidths in pixels, one number or one per axis of `shape` in its order: for an image `(y, x)`,
            where `DenseCRF2D.addPairwiseGaussian` takes `(x, y)`.
        shape: the size of the image or volume.

    Returns:
        Float32 features `(len(shape), pixels)`, in the order of the axes. `DenseCRF2D` has x before y, so
        that the lattice's approximation there differs a little.

    Raises:
        TypeError: if bandwidths or sizes are not numbers.
        ValueError: if a bandwidth is not positive, a size is less than 1, or their numbers differ.

    Example:
        >>> create_pairwise_gaussian((1, 2), (2, 3))
        array([[0. , 0. , 0. , 1. , 1. , 1. ],
               [0. , 0.5, 1. , 0. , 0.5, 1. ]], dtype=float32)
    """
    sizes = tuple(_count("shape", size) for size in shape)
    if not sizes:
        raise ValueError("shape: got (); expected the sizes of an image or volume, e.g. image.shape[:2]")
    bandwidths = _bandwidths("sdims", sdims, len(sizes))
    features = np.indices(sizes, np.float32).reshape(len(sizes), -1)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        features /= bandwidths[:, None]
    _check_finite("sdims: features by such bandwidths", features)
    return features


def create_pairwise_bilateral(
    sdims: Any, schan: Any, img: ArrayLike, chdim: int = -1
) -> Float[np.ndarray, "features pixels"]:
    """Positions and channels as features for `DenseCRF.addPairwiseEnergy`, in any number of dimensions.

    Args:
        sdims: bandwidths in pixels, one number or one per spatial axis in their order.
        schan: bandwidths in the image's unit, one number or one per channel.
        img: the image or volume, real numbers.
        chdim: the axis of the channels; -1 means that there is none, and a single channel: for
            `(height, width, 3)` pass 2.

    Returns:
        Float32 features `(spatial axes + channels, pixels)`: positions first.

    Raises:
        TypeError: if image or bandwidths are not real numbers.
        ValueError: if a bandwidth is not positive, their numbers differ from the image's axes or channels,
            there is no axis `chdim`, or the image holds NaN or infinite values.

    Example:
        >>> create_pairwise_bilateral((1, 1), 10, np.array([[0, 50]]))
        array([[0., 0.],
               [0., 1.],
               [0., 5.]], dtype=float32)
        >>> create_pairwise_bilateral((80, 80), (13, 13, 13), np.zeros((4, 5, 3)), chdim=2).shape
        (5, 20)
    """
    image = _numbers("img", img, "an image of real numbers")
    if not image.ndim or not image.size:
        raise ValueError(f"img: got shape {image.shape}, which is no image; every axis must be >= 1")
    _check_finite("img", image)
    if chdim == -1:
        channels = image[None]
    elif -image.ndim <= chdim < image.ndim and image.ndim > 1:
        channels = np.moveaxis(image, chdim, 0)
    else:
        raise ValueError(
            f"chdim: got {chdim} for an image of shape {image.shape}; pass the axis of its channels"
        )
    bandwidths = _bandwidths("schan", schan, len(channels))
    positions = create_pairwise_gaussian(sdims, channels.shape[1:])
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        colours = channels.reshape(len(channels), -1) / bandwidths[:, None]
    _check_finite("schan: features by such bandwidths", colours)
    return np.concatenate([positions, colours])


def compute_unary(labels: ArrayLike, M: int, GT_PROB: float = 0.5) -> np.ndarray:
    """The old name of `unary_from_labels`, with 0 for unsure. Warns that it is deprecated."""
    _deprecated("compute_unary", "unary_from_labels")
    return unary_from_labels(labels, M, GT_PROB)


def softmax_to_unary(sm: ArrayLike, GT_PROB: float = 1) -> np.ndarray:
    """The old name of `unary_from_softmax`, without clipping. Warns that it is deprecated."""
    _deprecated("softmax_to_unary", "unary_from_softmax")
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def _deprecated(old: str, new: str) -> None:
    warnings.warn(f"pydensecrf.utils.{old} is deprecated; use {new}", DeprecationWarning, stacklevel=3)
