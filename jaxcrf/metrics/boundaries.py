"""Bands around boundaries, and the scores inside them."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Int64

from jaxcrf.metrics.arguments import counted, integers, label_maps, placed, refuse_astray, static_int
from jaxcrf.metrics.distances import FAR, squared_distance_to_another_label
from jaxcrf.metrics.totals import Counts, Total, mean_of_defined, ratio

Around = Literal["void", "labels"]

# The widths of the curves, in pixels: finer where they are steeper.
TRIMAP_WIDTHS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40)


def trimap_band(
    labels: Int[Array | np.ndarray, "*batch height width"],
    width: int,
    *,
    around: Around = "void",
    ignore_label: int | None = 255,
) -> Bool[Array, "*batch height width"]:
    r"""Marks a narrow band around object boundaries, where segmentations usually go wrong.

    A pixel is in the band if another kind of pixel is at most `width` away, in Euclidean distance between
    pixel centres:

    .. math::
        i \in B \iff \exists j : \lVert p_i - p_j \rVert_2 \le w,\quad
        y_i \ne \mathrm{void},\ \begin{cases} y_j = \mathrm{void} & \text{around void} \\
        \mathrm{void} \ne y_j \ne y_i & \text{around labels.} \end{cases}

    Void pixels themselves are never in the band: they have no truth to compare with. Around `"labels"`, width
    1 marks both sides of the 4-neighbour boundary, and labels are compared across void pixels in between.

    Distances are exact. Each pixel looks up and down its column for the nearest pixel of some label and the
    nearest of any other, one of which differs from any given label; then along its row over those. The work
    is proportional to `width` times the number of pixels.

    Args:
        labels: true labels `[*batch, H, W]`.
        width: the width of the band in pixels, on each side of the boundary; a static int, 0 marks nothing.
        around: `"void"` for the surroundings of void pixels, which outline the objects of Pascal VOC, or
            `"labels"` for those of changes of label, where a data set has no such outlines.
        ignore_label: the label of void pixels; None for no such label.

    Returns:
        A mask like `labels`, True inside the band. Use it as
        `confusion_matrix(jnp.where(band, labels, ignore_label), ...)`.

    Raises:
        ValueError: if `width` is negative, `around` is unknown, or `labels` has fewer than two axes.
        TypeError: if `labels` does not hold integers or `width` is not a static int.

    Example:
        >>> import jax.numpy as jnp
        >>> labels = jnp.array([[0, 0, 0, 255, 1, 1, 1]])
        >>> trimap_band(labels, 1).astype(int)
        Array([[0, 0, 1, 0, 1, 0, 0]], dtype=int32)
        >>> trimap_band(labels, 2, around="labels").astype(int)
        Array([[0, 0, 1, 0, 1, 0, 0]], dtype=int32)

    References:
        Chen et al., *Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs*
        (DeepLab), arXiv:1412.7062, section 5.2 and fig. 5; Kohli, Ladický and Torr, *Robust Higher Order
        Potentials for Enforcing Label Consistency*, 2009.
    """
    labels = integers("labels", labels)
    width = static_int("width", width, minimum=0)
    if labels.ndim < 2:
        raise ValueError(f"labels: got shape {labels.shape}; expected [*batch, height, width]")
    return _band_distance(labels, width, around, ignore_label) <= min(width, _longest(labels)) ** 2


class TrimapCurve(NamedTuple):
    """How good a labelling is near boundaries, against how near.

    Attributes:
        widths: the bands' widths in pixels, `[W]`.
        accuracy: the fraction of the band's pixels that are labelled correctly, `[W]`; NaN where it has none.
        mean_iou: mean intersection over union inside the band, `[W]`.
        pixels: how many pixels the band has, `[W]`.
    """

    widths: Int[np.ndarray, "widths"]
    accuracy: Float[Array | np.ndarray, "widths"]
    mean_iou: Float[Array | np.ndarray, "widths"]
    pixels: Float[Array | np.ndarray, "widths"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["total"], meta_fields=["widths", "around", "ignore_label"]
)
@dataclasses.dataclass(frozen=True)
class TrimapCounts(Counts):
    """Confusion matrices inside bands around boundaries that grow image by image: what a trimap curve is made of.

    All bands of an image are counted in one pass over its distances.

    Attributes:
        total: `[W, L, L]`, row = truth, column = prediction.
        widths: the bands' widths in pixels.
        around: what the bands are around, see `trimap_band`.
        ignore_label: the true label of void pixels; None for no such label.

    Example:
        >>> import jax.numpy as jnp
        >>> counts = TrimapCounts.zeros(2, widths=(1, 2), around="labels")
        >>> counts = counts.update(jnp.array([[0, 0, 0, 1, 1]]), jnp.array([[0, 1, 1, 1, 1]]))
        >>> counts.curve().accuracy.tolist()
        [0.5, 0.5]
    """

    total: Total
    widths: tuple[int, ...]
    around: Around = "void"
    ignore_label: int | None = 255

    @classmethod
    def zeros(
        cls,
        num_labels: int,
        *,
        widths: Sequence[int] = TRIMAP_WIDTHS,
        around: Around = "void",
        ignore_label: int | None = 255,
    ) -> Self:
        """Counts of nothing yet.

        Args:
            num_labels: the number of labels `L`.
            widths: the bands' widths in pixels, increasing.
            around: `"void"` or `"labels"`, as for `trimap_band`.
            ignore_label: the true label of void pixels; None for no such label.

        Returns:
            The counts.

        Raises:
            ValueError: if a number is not positive, widths do not increase, or `around` is unknown.
        """
        num_labels = static_int("num_labels", num_labels, minimum=1)
        numbers = tuple(static_int("widths", width, minimum=1) for width in widths)
        if not numbers or any(a >= b for a, b in itertools.pairwise(numbers)):
            raise ValueError(f"widths: got {numbers}; expected at least one, in increasing order")
        _check_around(around)
        return cls(Total.zeros((len(numbers), num_labels, num_labels)), numbers, around, ignore_label)

    def update(
        self,
        labels: Int[Array | np.ndarray, "*batch height width"],
        predictions: Int[Array | np.ndarray, "*batch height width"],
    ) -> Self:
        """Counts more images.

        Args:
            labels: true labels `[*batch, H, W]`.
            predictions: the predicted labels, of the same shape.

        Returns:
            New counts.

        Raises:
            ValueError: if shapes disagree, or a prediction is out of range where the truth counts.
            TypeError: if an array does not hold integers.
        """
        labels, predictions = label_maps(labels, predictions, spatial=True)
        total, astray = _count_bands(self, labels, predictions)
        refuse_astray(astray, predictions, self.total.high.shape[-1])
        return dataclasses.replace(self, total=total)

    def matrices(self) -> Int64[np.ndarray, "widths labels labels"]:
        """The exact counts of every band, `[W, L, L]`, on the host."""
        return self.total.value()

    def curve(self) -> TrimapCurve:
        """Accuracy and mean IoU against the band's width; float64 on the host, float32 under `jit`."""
        cm = self.total.as_float()
        correct = cm.diagonal(axis1=-2, axis2=-1)
        pixels = cm.sum((-2, -1))
        ious = ratio(correct, cm.sum(-1) + cm.sum(-2) - correct)
        return TrimapCurve(
            np.array(self.widths), ratio(correct.sum(-1), pixels), mean_of_defined(ious), pixels
        )


def trimap_curve(
    labels: Int[Array | np.ndarray, "*batch height width"],
    predictions: Int[Array | np.ndarray, "*batch height width"],
    num_labels: int,
    *,
    widths: Sequence[int] = TRIMAP_WIDTHS,
    around: Around = "void",
    ignore_label: int | None = 255,
) -> TrimapCurve:
    """Accuracy and mean IoU inside bands around boundaries, against the bands' width.

    The bands are those of `trimap_band`; pixels of all images are pooled. For a data set, add up `TrimapCounts`.

    Args:
        labels: true labels `[*batch, H, W]`.
        predictions: the predicted labels, of the same shape.
        num_labels: the number of labels `L`.
        widths: the bands' widths in pixels, increasing.
        around: `"void"` for bands around void pixels, as the DeepLab paper has them, or `"labels"` for bands around
            changes of label.
        ignore_label: the true label of void pixels; None for no such label.

    Returns:
        The curve.

    Raises:
        ValueError: if shapes disagree, a prediction is out of range where the truth counts, or an option is.
        TypeError: if an array does not hold integers.

    Example:
        >>> import jax.numpy as jnp
        >>> labels = jnp.array([[0, 0, 0, 255, 1, 1, 1]])
        >>> trimap_curve(labels, labels * 0, 2, widths=(1, 3)).mean_iou.tolist()
        [0.25, 0.25]

    References:
        Chen et al., *Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs*
        (DeepLab), arXiv:1412.7062, section 5.2 and fig. 5.
    """
    counts = TrimapCounts.zeros(num_labels, widths=widths, around=around, ignore_label=ignore_label)
    return counts.update(labels, predictions).curve()


@jax.jit
def _count_bands(counts: TrimapCounts, labels: Array, predictions: Array) -> tuple[Total, Array]:
    num_widths, num_labels, _ = counts.total.high.shape
    widths = np.minimum(counts.widths, _longest(labels))
    distance = _band_distance(labels, int(widths[-1]), counts.around, counts.ignore_label)
    counts_at_all = counted(labels, num_labels, counts.ignore_label)
    has_place = placed(predictions, num_labels)
    # The first band that a pixel is in; it is in all wider ones too.
    band = jnp.searchsorted(jnp.asarray(widths**2, jnp.int32), distance.ravel()).reshape(distance.shape)
    cell = (band * num_labels + labels) * num_labels + predictions
    # Out-of-bounds updates are dropped by the scatter: among them pixels beyond the widest band.
    cell = jnp.where(counts_at_all & has_place, cell, num_widths * num_labels**2)
    added = jnp.zeros(num_widths * num_labels**2, jnp.int32).at[cell.ravel()].add(1, mode="drop")
    added = added.reshape(num_widths, num_labels, num_labels).cumsum(0)
    return counts.total + Total.of(added), counts_at_all & ~has_place


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _band_distance(labels: Array, reach: int, around: Around, ignore_label: int | None) -> Array:
    """Squared distances of pixels that are not void to what the band is around, right up to `reach` squared."""
    _check_around(around)
    void = jnp.zeros(labels.shape, bool) if ignore_label is None else labels == ignore_label
    reach = min(reach, _longest(labels))
    if around == "void":
        # Void against the rest is itself a labelling, in which every pixel is valid.
        distance = squared_distance_to_another_label(void.astype(jnp.int32), jnp.ones_like(void), reach)
    else:
        distance = squared_distance_to_another_label(labels, ~void, reach)
    return jnp.where(void, FAR, distance)


def _longest(labels: Array) -> int:
    """No shorter than any distance inside the image, and such that its square is less than `FAR`."""
    return min(sum(labels.shape[-2:]), int(FAR**0.5) - 1)


def _check_around(around: str) -> None:
    if around not in ("void", "labels"):
        raise ValueError(f"around: got {around!r}; expected 'void' or 'labels'")
