"""The synthetic task: ground truth made as coarse and as wrong as a network's prediction."""

from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Int, Int32

Seed: TypeAlias = "int | list[int] | np.random.SeedSequence | np.random.Generator"


def corrupt_labels(
    rng_or_seed: Seed,
    labels: Int[np.ndarray, "*batch height width"],
    num_labels: int,
    *,
    factor: int = 8,
    keep: float = 0.8,
    ignore_label: int = 255,
) -> Int32[np.ndarray, "*batch height width"]:
    """Turns ground truth into a coarse and noisy prediction, for a CRF to clean up.

    The label map is down-sampled by `factor`, every coarse label is kept with probability `keep` and
    otherwise replaced by a label drawn uniformly from all of them (the old one included), and the result
    is up-sampled again; both resamplings take the nearest label. Pixels `[y, x]` thus form blocks
    `[y // factor, x // factor]` of one label: that of the block's centre, the pixel at `factor // 2` on
    both axes.

    Void pixels get a label too, as a network would give them one, and it is for the evaluation to leave
    them out. Where a block's centre is void or outside the image, the block's labelled pixel nearest to
    the centre stands in for it; a block without any labelled pixel gets a uniformly random label.

    Args:
        rng_or_seed: a NumPy generator, which advances, or whatever seeds one; the same seed gives the
            same noise.
        labels: ground truth, 0 to `num_labels - 1` or `ignore_label`.
        num_labels: how many labels there are.
        factor: how many pixels a coarse one spans along either axis.
        keep: the probability that a coarse label survives.
        ignore_label: the label of void pixels.

    Returns:
        The noisy labels, 0 to `num_labels - 1` everywhere.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import numpy as np
        >>> labels = np.array([[0, 0, 0, 0, 1, 1, 255, 255]] * 2)
        >>> corrupt_labels(0, labels, num_labels=2, factor=2, keep=1.0)[0]
        array([0, 0, 0, 0, 1, 1, 1, 1], dtype=int32)
        >>> noisy = corrupt_labels(0, np.zeros((256, 256), int), num_labels=21)
        >>> round((noisy == 0).mean().item(), 1)
        0.8

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, section 5.1. The
        paper's published code up-samples bilinearly instead: `corrupt_probs`.
    """
    labels = _checked_labels(labels, num_labels, factor, keep, ignore_label)
    rng = np.random.default_rng(rng_or_seed)
    coarse, void = _downsample(labels, factor, ignore_label)
    replaced = (rng.random(coarse.shape) >= keep) | void
    noisy = np.where(replaced, rng.integers(num_labels, size=coarse.shape), coarse).astype(np.int32)
    height, width = labels.shape[-2:]
    return noisy.repeat(factor, axis=-2).repeat(factor, axis=-1)[..., :height, :width]


def corrupt_probs(
    rng_or_seed: Seed,
    labels: Int[np.ndarray, "*batch height width"],
    num_labels: int,
    *,
    factor: int = 8,
    keep: float = 0.8,
    ignore_label: int = 255,
) -> Float32[np.ndarray, "*batch height width labels"]:
    """Turns ground truth into coarse and noisy label probabilities: `corrupt_labels`, but smooth.

    The coarse truth `t`, the coarse random labels `n` and the coarse coin tosses `k` (1 where the truth is
    kept), as in `corrupt_labels` and from the same draws, are up-sampled bilinearly, half-pixel centres
    and edges repeated, and mixed at the fine resolution,

        p = up(k) up(onehot(t)) + (1 - up(k)) up(onehot(n)).

    A wrong coarse label so loses the outskirts of its block to its neighbours: in a region of one label,
    about 90 % of the most probable labels are right where `corrupt_labels` leaves 81 %. This is what the
    paper's published code does, and why its noisy labels are 86.6 % right on PASCAL VOC.

    Args:
        rng_or_seed: as in `corrupt_labels`.
        labels: ground truth, 0 to `num_labels - 1` or `ignore_label`.
        num_labels: how many labels there are.
        factor: how many pixels a coarse one spans along either axis.
        keep: the probability that a coarse label survives.
        ignore_label: the label of void pixels.

    Returns:
        Probabilities that sum to one at every pixel.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import numpy as np
        >>> labels = np.array([[0, 0, 1, 1]] * 2)
        >>> corrupt_probs(0, labels, num_labels=2, factor=2, keep=1.0)[0, :, 0]
        array([1.  , 0.75, 0.25, 0.  ], dtype=float32)

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, section 5.1.
    """
    labels = _checked_labels(labels, num_labels, factor, keep, ignore_label)
    rng = np.random.default_rng(rng_or_seed)
    coarse, void = _downsample(labels, factor, ignore_label)
    kept = (rng.random(coarse.shape) < keep) & ~void
    noise = rng.integers(num_labels, size=coarse.shape)
    onehot = np.eye(num_labels, dtype=np.float32)
    size = labels.shape[-2:]
    truth = _upsample(onehot[np.where(void, noise, coarse)], factor, size)
    mask = _upsample(kept[..., None].astype(np.float32), factor, size)
    return mask * truth + (1 - mask) * _upsample(onehot[noise], factor, size)


def _checked_labels(
    labels: np.ndarray, num_labels: int, factor: int, keep: float, ignore_label: int
) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim < 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels: got shape {labels.shape} of {labels.dtype}; expected integers [*batch, height, width]"
        )
    if num_labels < 1:
        raise ValueError(f"num_labels: got {num_labels}; expected at least 1")
    if factor < 1:
        raise ValueError(f"factor: got {factor}; expected a whole number of pixels, at least 1")
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: got {keep}; expected a probability, 0 to 1")
    strange = (labels != ignore_label) & ((labels < 0) | (labels >= num_labels))
    if strange.any():
        raise ValueError(
            f"labels: got {labels[strange][0]}; expected 0 to {num_labels - 1}, or {ignore_label} for void. "
            "Pass the right num_labels, or ignore_label if void is another number."
        )
    return labels


def _downsample(labels: np.ndarray, factor: int, ignore_label: int) -> tuple[np.ndarray, np.ndarray]:
    """The label of every block, and where there is none."""
    *batch, height, width = labels.shape
    rows, columns = -(-height // factor), -(-width // factor)
    pad = [(0, 0)] * len(batch) + [(0, rows * factor - height), (0, columns * factor - width)]
    blocks = np.pad(labels, pad, constant_values=ignore_label)
    blocks = blocks.reshape(*batch, rows, factor, columns, factor).swapaxes(-3, -2)
    blocks = blocks.reshape(*batch, rows, columns, factor * factor)
    offset = np.arange(factor) - factor // 2
    from_centre = np.argsort((offset[:, None] ** 2 + offset**2).ravel(), kind="stable")
    blocks = blocks[..., from_centre]
    first = (blocks != ignore_label).argmax(axis=-1)[..., None]
    coarse = np.take_along_axis(blocks, first, axis=-1)[..., 0]
    return coarse, coarse == ignore_label


def _upsample(coarse: np.ndarray, factor: int, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, half-pixel centres, edges repeated: `[*batch, rows, columns, c]` to `[*batch, *size, c]`."""
    for axis, n in zip((-3, -2), size, strict=True):
        position = (np.arange(n) + 0.5) / factor - 0.5
        below = np.floor(position).astype(int)
        fraction = (position - below).astype(np.float32).reshape((n,) + (1,) * (-1 - axis))
        low, high = (coarse.take(np.clip(i, 0, coarse.shape[axis] - 1), axis) for i in (below, below + 1))
        coarse = low * (1 - fraction) + high * fraction
    return coarse
