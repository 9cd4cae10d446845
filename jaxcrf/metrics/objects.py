"""What is wrong with a labelling: labels that are missed, boxes that are off, or boundaries.

The three measures of the Deep Parsing Network. The paper describes them in words; where it leaves a choice, it is
named below.
"""

import dataclasses
import functools
import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jaxcrf.metrics.arguments import counted, label_maps, placed, refuse_astray, static_int
from jaxcrf.metrics.distances import squared_distance_to
from jaxcrf.metrics.totals import Counts, Total, mean_of_defined, ratio

# An object counts as localised from this IoU of boxes on, as in the detection task of Pascal VOC.
LOCALIZED = 0.5


class ObjectScores(NamedTuple):
    """Three measures per label, NaN where one is not defined; means are those of the labels where it is.

    Attributes:
        tagging: the fraction of images in which the label is rightly present or absent, `[L]`.
        localization: the mean IoU of predicted and true bounding boxes, `[L]`.
        boundary: the mean precision of the boundaries of localised objects, `[L]`.
    """

    tagging: Float[Array | np.ndarray, "labels"]
    localization: Float[Array | np.ndarray, "labels"]
    boundary: Float[Array | np.ndarray, "labels"]

    def means(self) -> tuple[Float[Array | np.ndarray, ""], ...]:
        """The mean over labels of each."""
        return tuple(mean_of_defined(values) for values in self)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["images", "right_tags", "seen", "objects", "box_ious", "localized", "precisions"],
    meta_fields=["boundary_tolerance", "background", "ignore_label"],
)
@dataclasses.dataclass(frozen=True)
class ObjectCounts(Counts):
    r"""What the tagging, localisation and boundary accuracies are made of, growing image by image.

    The *object* of a label in an image is all of its pixels. Where an image's truth is `ignore_label`, neither tags nor
    boxes look; truth outside `0 … L − 1` that is not `ignore_label`, such as −1, lies outside the image, and pads one.

    - *Tagging*: :math:`\mathrm{TA}_k` is the fraction of images in which label `k` is predicted somewhere if and only
      if it is true somewhere.
    - *Localisation*: :math:`\mathrm{LA}_k` is the mean, over the images with `k` in their truth, of the intersection
      over union of the bounding boxes of its predicted and of its true pixels; 0 where it is not predicted.
    - *Boundary*: :math:`\mathrm{BA}_k` is the mean, over the objects whose boxes reach an IoU of ½, of the fraction of
      its predicted boundary that is at most a tolerance away from its true boundary. Boundary pixels of `k` have a
      4-neighbour that is not `k`, void included, for void outlines objects; predicted ones in void that are further
      than the tolerance from the true boundary do not count, since there is no truth to compare them with.

    IoUs and precisions are rounded to :math:`2^{-24}` before they are added up, exactly.

    Attributes:
        images: how many images there were.
        right_tags: in how many of them a label was rightly present or absent, `[L]`.
        seen: in how many it was true or predicted, `[L]`.
        objects: in how many it was true, `[L]`.
        box_ious: the sum of its boxes' IoUs, `[L]`.
        localized: how many of its objects have a boundary that was compared, `[L]`.
        precisions: the sum of their boundaries' precisions, `[L]`.
        boundary_tolerance: as a fraction of the image's diagonal.
        background: a label that is no object, and has no scores; None if there is none.
        ignore_label: the true label of void pixels; None for no such label.

    Example:
        >>> import jax.numpy as jnp
        >>> counts = ObjectCounts.zeros(2)
        >>> counts = counts.update(jnp.array([[0, 0, 1, 1]]), jnp.array([[0, 0, 0, 1]]))
        >>> [values.round(3).tolist() for values in counts.scores()]
        [[1.0, 1.0], [0.667, 0.5], [0.0, 0.0]]

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, arXiv:1509.02634, section 5 and table 3a;
        Hariharan et al., *Semantic Contours from Inverse Detectors*, 2011, for the tolerance.
    """

    images: Total
    right_tags: Total
    seen: Total
    objects: Total
    box_ious: Total
    localized: Total
    precisions: Total
    boundary_tolerance: float = 0.02
    background: int | None = None
    ignore_label: int | None = 255

    @classmethod
    def zeros(
        cls,
        num_labels: int,
        *,
        boundary_tolerance: float = 0.02,
        background: int | None = None,
        ignore_label: int | None = 255,
    ) -> Self:
        """Counts of nothing yet.

        Args:
            num_labels: the number of labels `L`.
            boundary_tolerance: how far a predicted boundary may be from the true one, as a fraction of the image's
                diagonal, rounded down to whole pixels.
            background: a label that is no object and is left out, such as 0 for Pascal VOC; None if there is none.
            ignore_label: the true label of void pixels; None for no such label.

        Returns:
            The counts.

        Raises:
            ValueError: if `num_labels` is not positive, the tolerance is outside 0 … 1 or `background` is no label.
        """
        num_labels = static_int("num_labels", num_labels, minimum=1)
        if not 0 <= boundary_tolerance <= 1:
            raise ValueError(
                f"boundary_tolerance: got {boundary_tolerance}; expected a fraction of the diagonal, 0 to 1"
            )
        if background is not None and not 0 <= background < num_labels:
            raise ValueError(
                f"background: got {background}; expected a label from 0 to {num_labels - 1}, or None"
            )
        each = ("right_tags", "seen", "objects", "box_ious", "localized", "precisions")
        return cls(
            images=Total.zeros(),
            **{name: Total.zeros((num_labels,)) for name in each},
            boundary_tolerance=float(boundary_tolerance),
            background=background,
            ignore_label=ignore_label,
        )

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
        if labels.size == 0:
            return self
        counts, astray = _count(self, labels, predictions)
        refuse_astray(astray, predictions, self.seen.high.shape[-1])
        return counts

    def scores(self) -> ObjectScores:
        """The three measures of every label; float64 on the host, float32 under `jit`."""
        seen, objects, localized = (total.as_float() for total in (self.seen, self.objects, self.localized))
        tagging = ratio(self.right_tags.as_float(), self.images.as_float() + 0 * seen)
        module = np if isinstance(tagging, np.ndarray) else jnp
        is_object = np.arange(len(seen)) != (-1 if self.background is None else self.background)
        scores = (
            module.where(seen > 0, tagging, np.nan),
            ratio(self.box_ious.as_ratios(), objects),
            ratio(self.precisions.as_ratios(), localized),
        )
        return ObjectScores(*(module.where(is_object, score, np.nan) for score in scores))


def tagging_accuracy(
    labels: Int[Array | np.ndarray, "*batch height width"],
    predictions: Int[Array | np.ndarray, "*batch height width"],
    num_labels: int,
    ignore_label: int | None = 255,
    *,
    background: int | None = None,
) -> Float[Array | np.ndarray, ""]:
    r"""How often it is right which labels an image shows, the mean over labels.

    .. math::
        \mathrm{TA} = \frac{1}{|\mathcal L|} \sum_{k \in \mathcal L} \frac{1}{N} \sum_{n=1}^{N}
        \bigl[\, k \in \hat y^{(n)} \iff k \in y^{(n)} \bigr],

    over the labels :math:`\mathcal L` that are true or predicted in any image. `ObjectCounts` has each label's, and
    adds up the images of a data set.

    Args:
        labels: true labels `[*batch, H, W]`, every one an image.
        predictions: the predicted labels, of the same shape.
        num_labels: the number of labels `L`.
        ignore_label: the true label of void pixels, where predictions do not count; None for no such label.
        background: a label that is no object and is left out, such as 0 for Pascal VOC; None if there is none.

    Returns:
        A number in `[0, 1]`; NaN if there is no label.

    Raises:
        ValueError: if shapes disagree, a prediction is out of range where the truth counts, or an option is.
        TypeError: if an array does not hold integers.

    Example:
        >>> import jax.numpy as jnp
        >>> labels, predictions = jnp.array([[[0, 1]], [[0, 0]]]), jnp.array([[[0, 0]], [[0, 0]]])
        >>> float(tagging_accuracy(labels, predictions, num_labels=2))
        0.75

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, arXiv:1509.02634, section 5.
    """
    return _mean_score(0, labels, predictions, num_labels, ignore_label, background, 0.0)


def localization_accuracy(
    labels: Int[Array | np.ndarray, "*batch height width"],
    predictions: Int[Array | np.ndarray, "*batch height width"],
    num_labels: int,
    ignore_label: int | None = 255,
    *,
    background: int | None = None,
) -> Float[Array | np.ndarray, ""]:
    r"""The intersection over union of predicted and true bounding boxes, the mean over labels of that over images.

    .. math::
        \mathrm{LA} = \frac{1}{|\mathcal T|} \sum_{k \in \mathcal T} \frac{1}{|\mathcal N_k|} \sum_{n \in \mathcal N_k}
        \frac{|\hat b_k^{(n)} \cap b_k^{(n)}|}{|\hat b_k^{(n)} \cup b_k^{(n)}|},

    where :math:`\mathcal N_k` are the images with label `k` in their truth, :math:`b_k` is the box around all of its
    true pixels and :math:`\hat b_k` that around all pixels predicted so. `ObjectCounts` has each label's, and adds up
    the images of a data set.

    Args:
        labels: true labels `[*batch, H, W]`, every one an image.
        predictions: the predicted labels, of the same shape.
        num_labels: the number of labels `L`.
        ignore_label: the true label of void pixels, where predictions do not count; None for no such label.
        background: a label that is no object and is left out, such as 0 for Pascal VOC; None if there is none.

    Returns:
        A number in `[0, 1]`; NaN if there is no label.

    Raises:
        ValueError: if shapes disagree, a prediction is out of range where the truth counts, or an option is.
        TypeError: if an array does not hold integers.

    Example:
        >>> import jax.numpy as jnp
        >>> labels, predictions = jnp.array([[1, 1, 1, 0]]), jnp.array([[1, 1, 0, 0]])
        >>> round(float(localization_accuracy(labels, predictions, num_labels=2, background=0)), 3)
        0.667

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, arXiv:1509.02634, section 5.
    """
    return _mean_score(1, labels, predictions, num_labels, ignore_label, background, 0.0)


def boundary_accuracy(
    labels: Int[Array | np.ndarray, "*batch height width"],
    predictions: Int[Array | np.ndarray, "*batch height width"],
    num_labels: int,
    ignore_label: int | None = 255,
    *,
    tolerance: float = 0.02,
    background: int | None = None,
) -> Float[Array | np.ndarray, ""]:
    r"""The precision of the boundaries of localised objects, the mean over labels of that over objects.

    .. math::
        \mathrm{BA} = \frac{1}{|\mathcal T|} \sum_{k \in \mathcal T} \frac{1}{|\mathcal M_k|} \sum_{n \in \mathcal M_k}
        \frac{\#\{i \in \partial\hat y_k^{(n)} : \exists j \in \partial y_k^{(n)},\ \lVert p_i - p_j \rVert \le w\}}
        {\#\,\partial\hat y_k^{(n)}},

    where :math:`\mathcal M_k` are the images in which the boxes of label `k` reach an IoU of ½, and :math:`\partial`
    are the pixels with a 4-neighbour of another label. Predicted boundary in void, out of reach of the true one, does
    not count. `ObjectCounts` has each label's, and adds up the images of a data set.

    Args:
        labels: true labels `[*batch, H, W]`, every one an image.
        predictions: the predicted labels, of the same shape.
        num_labels: the number of labels `L`.
        ignore_label: the true label of void pixels; None for no such label.
        tolerance: `w` as a fraction of the image's diagonal, rounded down to whole pixels.
        background: a label that is no object and is left out, such as 0 for Pascal VOC; None if there is none.

    Returns:
        A number in `[0, 1]`; NaN if no object is localised.

    Raises:
        ValueError: if shapes disagree, a prediction is out of range where the truth counts, or an option is.
        TypeError: if an array does not hold integers.

    Example:
        >>> import jax.numpy as jnp
        >>> labels, predictions = jnp.array([[1, 1, 1, 0, 0]]), jnp.array([[1, 1, 0, 0, 0]])
        >>> float(boundary_accuracy(labels, predictions, num_labels=2, tolerance=0.0))
        0.0
        >>> float(boundary_accuracy(labels, predictions, num_labels=2, tolerance=0.2))
        1.0

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, arXiv:1509.02634, section 5; Hariharan et
        al., *Semantic Contours from Inverse Detectors*, 2011.
    """
    return _mean_score(2, labels, predictions, num_labels, ignore_label, background, tolerance)


def _mean_score(
    which: int,
    labels: Array | np.ndarray,
    predictions: Array | np.ndarray,
    num_labels: int,
    ignore_label: int | None,
    background: int | None,
    tolerance: float,
) -> Array | np.ndarray:
    counts = ObjectCounts.zeros(
        num_labels, boundary_tolerance=tolerance, background=background, ignore_label=ignore_label
    )
    return mean_of_defined(counts.update(labels, predictions).scores()[which])


class _OfImage(NamedTuple):
    """What one image adds, `[L]` each."""

    is_true: Array
    is_predicted: Array
    box_iou: Array
    compared: Array
    precision: Array


@jax.jit
def _count(counts: ObjectCounts, labels: Array, predictions: Array) -> tuple[ObjectCounts, Array]:
    num_labels = counts.seen.high.shape[-1]
    astray = counted(labels, num_labels, counts.ignore_label) & ~placed(predictions, num_labels)
    labels, predictions = (maps.reshape(-1, *maps.shape[-2:]) for maps in (labels, predictions))
    compare = functools.partial(
        _compare, num_labels=num_labels, ignore_label=counts.ignore_label, tolerance=counts.boundary_tolerance
    )
    # One after the other: memory is that of one, and boundaries that nothing is to be compared with are skipped.
    of = lax.map(lambda maps: compare(*maps), (labels, predictions))
    added = {
        "images": Total.of(jnp.ones_like(labels[:, 0, 0]), 0),
        "right_tags": Total.of(of.is_true == of.is_predicted, 0),
        "seen": Total.of(of.is_true | of.is_predicted, 0),
        "objects": Total.of(of.is_true, 0),
        "box_ious": Total.of_ratios(of.box_iou, 0),
        "localized": Total.of(of.compared, 0),
        "precisions": Total.of_ratios(of.precision, 0),
    }
    totals = {name: getattr(counts, name) + total for name, total in added.items()}
    return dataclasses.replace(counts, **totals), astray


def _compare(
    labels: Array, predictions: Array, *, num_labels: int, ignore_label: int | None, tolerance: float
) -> _OfImage:
    valid = counted(labels, num_labels, ignore_label)
    inside = valid if ignore_label is None else valid | (labels == ignore_label)
    every = jnp.arange(num_labels)[:, None, None]
    true_boxes, predicted_boxes = (_boxes((every == maps) & valid) for maps in (labels, predictions))
    is_true, is_predicted = true_boxes[4] > 0, predicted_boxes[4] > 0
    box_iou = _box_iou(true_boxes, predicted_boxes)

    # The image without its padding.
    sides = jnp.stack([inside.any(1).sum(), inside.any(0).sum()]).astype(jnp.float32)
    longest = tolerance * math.hypot(*labels.shape)
    # A thousandth of a pixel for rounding, so that a tolerance of whole pixels is not one less.
    radius = jnp.floor(tolerance * jnp.sqrt((sides**2).sum()) + 1e-3).astype(jnp.int32)
    true_edge, predicted_edge = _edge(labels, inside), _edge(predictions, inside) & inside

    def precision(label: Array) -> tuple[Array, Array]:
        edge = true_edge & (labels == label)
        near = squared_distance_to(edge, radius, int(longest + 1)) <= radius**2
        found = predicted_edge & (predictions == label)
        right, judged = (found & near).sum(), (found & (near | valid)).sum()
        return judged > 0, jnp.where(judged > 0, right / jnp.maximum(judged, 1), 0).astype(jnp.float32)

    def of_label(k: tuple[Array, Array]) -> tuple[Array, Array]:
        label, localized = k
        return lax.cond(localized, precision, _nothing, label)

    compared, precisions = lax.map(of_label, (jnp.arange(num_labels) + 0 * is_true, box_iou >= LOCALIZED))
    return _OfImage(is_true, is_predicted, box_iou, compared, precisions)


def _nothing(label: Array) -> tuple[Array, Array]:
    return label < 0, 0.0 * label.astype(jnp.float32)


def _boxes(masks: Array) -> tuple[Array, Array, Array, Array, Array]:
    """First and last row and column of every mask `[L, H, W]`, and whether there are any, as a number."""
    height, width = masks.shape[1:]
    rows, columns = masks.any(2), masks.any(1)
    return (
        jnp.argmax(rows, 1),
        height - 1 - jnp.argmax(rows[:, ::-1], 1),
        jnp.argmax(columns, 1),
        width - 1 - jnp.argmax(columns[:, ::-1], 1),
        rows.any(1).astype(jnp.int32),
    )


def _box_iou(a: tuple[Array, ...], b: tuple[Array, ...]) -> Array:
    def area(top: Array, bottom: Array, left: Array, right: Array) -> Array:
        return jnp.maximum(bottom - top + 1, 0) * jnp.maximum(right - left + 1, 0)

    common = area(
        jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1]), jnp.maximum(a[2], b[2]), jnp.minimum(a[3], b[3])
    )
    both = a[4] * b[4]
    return jnp.where(both > 0, common / (area(*a[:4]) + area(*b[:4]) - common), 0).astype(jnp.float32)


def _edge(maps: Array, inside: Array) -> Array:
    """Where a 4-neighbour inside the image has another label."""
    edge = jnp.zeros_like(inside) & inside
    for axis in (0, 1):
        size = maps.shape[axis]
        first, second = (
            tuple(lax.slice_in_dim(x, start, size - 1 + start, axis=axis) for x in (maps, inside))
            for start in (0, 1)
        )
        differs = (first[0] != second[0]) & first[1] & second[1]
        before, after = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        before[axis], after[axis] = (1, 0), (0, 1)
        edge |= jnp.pad(differs, before) | jnp.pad(differs, after)
    return edge
