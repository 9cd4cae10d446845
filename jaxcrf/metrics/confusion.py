"""Confusion counts, and the scores made of them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Int64, Num

from jaxcrf.metrics.arguments import counted, label_maps, placed, refuse_astray, static_int
from jaxcrf.metrics.totals import Counts, Total, mean_of_defined, ratio


def confusion_matrix(
    labels: Int[Array | np.ndarray, "*any"],
    predictions: Int[Array | np.ndarray, "*any"],
    num_labels: int,
    ignore_label: int | None = 255,
) -> Int[Array, "num_labels num_labels"]:
    r"""Counts how often each true label received each predicted label.

    .. math::
        C_{kl} = \#\{i : y_i = k,\ \hat y_i = l\}.

    Pixels whose *true* label is `ignore_label`, or lies outside `0 … num_labels − 1`, do not count. A pixel
    that does count but whose *prediction* lies outside that range has no cell in the matrix, and leaving it
    out would flatter the score: with concrete arrays it is an error. Under `jax.jit` values cannot be
    checked; there such a pixel counts nowhere.

    Args:
        labels: the truth, of any shape.
        predictions: the predicted labels, of the same shape.
        num_labels: the number of labels `L`.
        ignore_label: the label of pixels that do not count, inside or outside the range; None for no such
            label.

    Returns:
        int32 counts `[L, L]`, row = truth, column = prediction; exact for up to `2**31 − 1` pixels a call.

    Raises:
        ValueError: if the shapes differ, `num_labels` is not positive, or a prediction is out of range.
        TypeError: if an array does not hold integers.

    Example:
        >>> import jax.numpy as jnp
        >>> labels, predictions = jnp.array([[0, 0, 1, 255]]), jnp.array([[0, 1, 1, 0]])
        >>> confusion_matrix(labels, predictions, num_labels=2)
        Array([[1, 1],
               [0, 1]], dtype=int32)
    """
    num_labels = static_int("num_labels", num_labels, minimum=1)
    labels, predictions = label_maps(labels, predictions, spatial=False)
    counts, astray = _count(labels, predictions, num_labels, ignore_label)
    refuse_astray(astray, predictions, num_labels)
    return counts


def per_class_iou(
    cm: "Num[Array | np.ndarray, '*batch labels labels'] | ConfusionCounts",
) -> Float[Array, "*batch labels"]:
    r"""Intersection over union of every label.

    .. math::
        \mathrm{IoU}_k = \frac{C_{kk}}{\sum_l C_{kl} + \sum_l C_{lk} - C_{kk}}.

    Args:
        cm: confusion counts `[*batch, L, L]`, row = truth; or `ConfusionCounts`.

    Returns:
        One number in `[0, 1]` per label, `[*batch, L]`; NaN where a label is neither true nor predicted.

    Raises:
        ValueError: if `cm` is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> per_class_iou(jnp.array([[2, 2, 0], [0, 4, 0], [0, 0, 0]]))
        Array([0.5      , 0.6666667,       nan], dtype=float32)

    References:
        Everingham et al., *The Pascal Visual Object Classes Challenge: A Retrospective*, 2015, section 2.4.
    """
    return _per_class_iou(_counts(cm))


def mean_iou(
    cm: "Num[Array | np.ndarray, '*batch labels labels'] | ConfusionCounts",
) -> Float[Array, "*batch"]:
    r"""Mean intersection over union, over the labels that occur.

    .. math::
        \mathrm{mIoU} = \frac{1}{|\mathcal L|} \sum_{k \in \mathcal L} \mathrm{IoU}_k, \qquad
        \mathcal L = \Bigl\{k : \sum_l C_{kl} + \sum_l C_{lk} > 0\Bigr\}.

    Args:
        cm: confusion counts `[*batch, L, L]`, row = truth; or `ConfusionCounts`.

    Returns:
        A number in `[0, 1]` per matrix, `[*batch]`. Labels with an empty union are left out; NaN if that
        leaves none.

    Raises:
        ValueError: if `cm` is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> mean_iou(jnp.array([[2, 2, 0], [0, 4, 0], [0, 0, 0]]))
        Array(0.5833334, dtype=float32)

    References:
        Everingham et al., *The Pascal Visual Object Classes Challenge: A Retrospective*, 2015, section 2.4.
    """
    return _mean(per_class_iou(cm))


def pixel_accuracy(
    cm: "Num[Array | np.ndarray, '*batch labels labels'] | ConfusionCounts",
) -> Float[Array, "*batch"]:
    r"""The fraction of pixels that are labelled correctly.

    .. math::
        \sum_k C_{kk} \Big/ \sum_{kl} C_{kl}.

    Args:
        cm: confusion counts `[*batch, L, L]`, row = truth; or `ConfusionCounts`.

    Returns:
        A number in `[0, 1]` per matrix, `[*batch]`; NaN if no pixel counts.

    Raises:
        ValueError: if `cm` is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> pixel_accuracy(jnp.array([[2, 2], [0, 4]]))
        Array(0.75, dtype=float32)
    """
    return _pixel_accuracy(_counts(cm))


def class_accuracy(
    cm: "Num[Array | np.ndarray, '*batch labels labels'] | ConfusionCounts",
) -> Float[Array, "*batch"]:
    r"""The mean, over the labels present in the truth, of the fraction of their pixels that are found.

    .. math::
        \frac{1}{|\mathcal T|} \sum_{k \in \mathcal T} \frac{C_{kk}}{\sum_l C_{kl}}, \qquad
        \mathcal T = \Bigl\{k : \sum_l C_{kl} > 0\Bigr\}.

    Args:
        cm: confusion counts `[*batch, L, L]`, row = truth; or `ConfusionCounts`.

    Returns:
        A number in `[0, 1]` per matrix, `[*batch]`; NaN if no pixel counts.

    Raises:
        ValueError: if `cm` is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> class_accuracy(jnp.array([[2, 2, 0], [0, 4, 0], [0, 0, 0]]))
        Array(0.75, dtype=float32)
    """
    return _class_accuracy(_counts(cm))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total"], meta_fields=["ignore_label"])
@dataclasses.dataclass(frozen=True)
class ConfusionCounts(Counts):
    """A confusion matrix that grows batch by batch, exact beyond int32.

    Attributes:
        total: `[L, L]`, row = truth, column = prediction.
        ignore_label: the true label of pixels that do not count; None for no such label.

    Example:
        >>> import jax.numpy as jnp
        >>> counts = ConfusionCounts.zeros(2)
        >>> for labels, predictions in [([0, 0], [0, 1]), ([1, 255], [1, 1])]:
        ...     counts = counts.update(jnp.array(labels), jnp.array(predictions))
        >>> counts.matrix().tolist(), mean_iou(counts)
        ([[1, 1], [0, 1]], Array(0.5, dtype=float32))
    """

    total: Total
    ignore_label: int | None = 255

    @classmethod
    def zeros(cls, num_labels: int, ignore_label: int | None = 255) -> Self:
        """Counts of nothing yet.

        Args:
            num_labels: the number of labels `L`.
            ignore_label: the true label of pixels that do not count; None for no such label.

        Returns:
            The counts.

        Raises:
            ValueError: if `num_labels` is not positive.
        """
        num_labels = static_int("num_labels", num_labels, minimum=1)
        return cls(Total.zeros((num_labels, num_labels)), ignore_label)

    @property
    def num_labels(self) -> int:
        """The number of labels `L`."""
        return self.total.high.shape[-1]

    def update(
        self, labels: Int[Array | np.ndarray, "*any"], predictions: Int[Array | np.ndarray, "*any"]
    ) -> Self:
        """Counts more pixels.

        Args:
            labels: the truth, of any shape, up to `2**31 - 1` pixels.
            predictions: the predicted labels, of the same shape.

        Returns:
            New counts.

        Raises:
            ValueError: as `confusion_matrix` does.
            TypeError: if an array does not hold integers.
        """
        added = confusion_matrix(labels, predictions, self.num_labels, self.ignore_label)
        return dataclasses.replace(self, total=_add(self.total, added))

    def matrix(self) -> Int64[np.ndarray, "labels labels"]:
        """The exact counts `[L, L]`, on the host; under `jit`, scores take the counts themselves."""
        return self.total.value()


class LabelRow(NamedTuple):
    """One label's row of `per_class_table`; fractions are NaN where nothing is divided by nothing.

    Attributes:
        label: the label.
        name: what it stands for.
        pixels: how many pixels are truly of this label.
        share: their share of all pixels that count.
        iou: intersection over union.
        precision: the fraction of the pixels predicted so that are.
        recall: the fraction of the pixels truly so that are found, whose mean is `class_accuracy`.
    """

    label: int
    name: str
    pixels: int
    share: float
    iou: float
    precision: float
    recall: float


def per_class_table(
    cm: "Num[Array | np.ndarray, 'labels labels'] | ConfusionCounts", label_names: Sequence[str] | None = None
) -> list[LabelRow]:
    r"""What a confusion matrix says of every label, a row each.

    .. math::
        \mathrm{IoU}_k = \frac{C_{kk}}{\sum_l C_{kl} + \sum_l C_{lk} - C_{kk}}, \qquad
        \mathrm{precision}_k = \frac{C_{kk}}{\sum_l C_{lk}}, \qquad
        \mathrm{recall}_k = \frac{C_{kk}}{\sum_l C_{kl}}.

    Args:
        cm: confusion counts `[L, L]`, row = truth; not under `jit`.
        label_names: the labels' names; None for the numbers.

    Returns:
        One row per label, computed in float64.

    Raises:
        ValueError: if `cm` is not square, or names are missing.

    Example:
        >>> for row in per_class_table(np.array([[2, 2], [0, 4]]), ["sky", "tree"]):
        ...     print(f"{row.name:5} {row.pixels} {row.iou:.3f} {row.precision:.3f} {row.recall:.3f}")
        sky   4 0.500 1.000 0.500
        tree  4 0.667 0.667 1.000
    """
    counts = np.asarray(cm.matrix() if isinstance(cm, ConfusionCounts) else cm).astype(np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"cm: got shape {counts.shape}; expected [labels, labels] from confusion_matrix")
    names = [str(label) for label in range(len(counts))] if label_names is None else list(label_names)
    if len(names) != len(counts):
        raise ValueError(f"label_names: got {len(names)} names for {len(counts)} labels; name every label")
    correct, true, predicted = np.diagonal(counts), counts.sum(1), counts.sum(0)
    columns = (
        ratio(true, np.full_like(true, true.sum())),
        ratio(correct, true + predicted - correct),
        ratio(correct, predicted),
        ratio(correct, true),
    )
    return [
        LabelRow(label, name, int(true[label]), *(float(column[label]) for column in columns))
        for label, name in enumerate(names)
    ]


# The arithmetic is jitted also when called eagerly, where a dozen dispatches would each compile.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _count(
    labels: Array, predictions: Array, num_labels: int, ignore_label: int | None
) -> tuple[Array, Array]:
    """The confusion counts, and where the prediction has no place among them."""
    counts, has_place = counted(labels, num_labels, ignore_label), placed(predictions, num_labels)
    # Out-of-bounds updates are dropped by the scatter.
    cell = jnp.where(counts & has_place, labels * num_labels + predictions, num_labels**2)
    cm = jnp.zeros(num_labels**2, jnp.int32).at[cell.ravel()].add(1, mode="drop")
    return cm.reshape(num_labels, num_labels), counts & ~has_place


@jax.jit
def _add(total: Total, counts: Array) -> Total:
    return total + Total.of(counts)


@jax.jit
def _per_class_iou(cm: Array) -> Array:
    correct = jnp.diagonal(cm, axis1=-2, axis2=-1)
    return jnp.asarray(ratio(correct, cm.sum(-1) + cm.sum(-2) - correct))


@jax.jit
def _pixel_accuracy(cm: Array) -> Array:
    return jnp.asarray(ratio(jnp.trace(cm, axis1=-2, axis2=-1), cm.sum((-2, -1))))


@jax.jit
def _class_accuracy(cm: Array) -> Array:
    return jnp.asarray(mean_of_defined(ratio(jnp.diagonal(cm, axis1=-2, axis2=-1), cm.sum(-1))))


@jax.jit
def _mean(values: Array) -> Array:
    return jnp.asarray(mean_of_defined(values))


def _counts(cm: "Array | np.ndarray | ConfusionCounts") -> Array:
    if isinstance(cm, ConfusionCounts):
        cm = cm.total.as_float()
    # Totals over a data set may be int64, which jnp.asarray would truncate.
    cm = jnp.asarray(cm if isinstance(cm, jax.Array) else np.asarray(cm, np.float64), dtype=float)
    if cm.ndim < 2 or cm.shape[-1] != cm.shape[-2]:
        raise ValueError(f"cm: got shape {cm.shape}; expected [*batch, labels, labels] from confusion_matrix")
    return cm
