"""How good a labelling is: confusion counts, the scores made of them, and bands around boundaries.

Everything here is pure and runs under `jax.jit` and `jax.vmap`. Scores are functions of a confusion matrix,
so a data set is scored by adding up the matrices of its images:

    total = sum(np.asarray(confusion_matrix(y, p, num_labels), np.int64) for y, p in pairs)
    mean_iou(total)
"""

import functools
import math
import operator
from typing import Literal, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Num


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
    num_labels = _static_int("num_labels", num_labels, minimum=1)
    labels = _integers("labels", labels)
    predictions = _integers("predictions", predictions)
    if labels.shape != predictions.shape:
        raise ValueError(
            f"predictions: got shape {predictions.shape}, but labels have shape {labels.shape}; "
            "pass label maps of one size, e.g. probs.argmax(-1)"
        )
    counts, astray = _count(labels, predictions, num_labels, ignore_label)
    if not isinstance(astray, jax.core.Tracer) and bool(astray.any()):
        values = np.unique(np.asarray(predictions)[np.asarray(astray)])
        raise ValueError(
            f"predictions: got the label {values[0]} where the truth counts; expected 0 to {num_labels - 1}. "
            "Pass a larger num_labels, or set the truth to ignore_label where nothing is predicted."
        )
    return counts


def per_class_iou(cm: Num[Array | np.ndarray, "*batch labels labels"]) -> Float[Array, "*batch labels"]:
    r"""Intersection over union of every label.

    .. math::
        \mathrm{IoU}_k = \frac{C_{kk}}{\sum_l C_{kl} + \sum_l C_{lk} - C_{kk}}.

    Args:
        cm: confusion counts `[*batch, L, L]`, row = truth.

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


def mean_iou(cm: Num[Array | np.ndarray, "*batch labels labels"]) -> Float[Array, "*batch"]:
    r"""Mean intersection over union, over the labels that occur.

    .. math::
        \mathrm{mIoU} = \frac{1}{|\mathcal L|} \sum_{k \in \mathcal L} \mathrm{IoU}_k, \qquad
        \mathcal L = \Bigl\{k : \sum_l C_{kl} + \sum_l C_{lk} > 0\Bigr\}.

    Args:
        cm: confusion counts `[*batch, L, L]`, row = truth.

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
    return _mean_of_defined(per_class_iou(cm))


def pixel_accuracy(cm: Num[Array | np.ndarray, "*batch labels labels"]) -> Float[Array, "*batch"]:
    r"""The fraction of pixels that are labelled correctly.

    .. math::
        \sum_k C_{kk} \Big/ \sum_{kl} C_{kl}.

    Args:
        cm: confusion counts `[*batch, L, L]`, row = truth.

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


def class_accuracy(cm: Num[Array | np.ndarray, "*batch labels labels"]) -> Float[Array, "*batch"]:
    r"""The mean, over the labels present in the truth, of the fraction of their pixels that are found.

    .. math::
        \frac{1}{|\mathcal T|} \sum_{k \in \mathcal T} \frac{C_{kk}}{\sum_l C_{kl}}, \qquad
        \mathcal T = \Bigl\{k : \sum_l C_{kl} > 0\Bigr\}.

    Args:
        cm: confusion counts `[*batch, L, L]`, row = truth.

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


def trimap_band(
    labels: Int[Array | np.ndarray, "*batch height width"],
    width: int,
    *,
    around: Literal["void", "labels"] = "void",
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
    labels = _integers("labels", labels)
    width = _static_int("width", width, minimum=0)
    if labels.ndim < 2:
        raise ValueError(f"labels: got shape {labels.shape}; expected [*batch, height, width]")
    void = jnp.zeros(labels.shape, bool) if ignore_label is None else labels == ignore_label
    if around == "void":
        # Void against the rest is itself a labelling, in which every pixel is valid.
        near = _near_another_label(void.astype(jnp.int32), jnp.ones_like(void), width)
    elif around == "labels":
        near = _near_another_label(labels, ~void, width)
    else:
        raise ValueError(f"around: got {around!r}; expected 'void' or 'labels'")
    return near & ~void


# The arithmetic is jitted also when called eagerly, where a dozen dispatches would each compile.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _count(
    labels: Array, predictions: Array, num_labels: int, ignore_label: int | None
) -> tuple[Array, Array]:
    """The confusion counts, and where the prediction has no place among them."""
    counted = (labels >= 0) & (labels < num_labels)
    if ignore_label is not None:
        counted &= labels != ignore_label
    placed = (predictions >= 0) & (predictions < num_labels)
    # Out-of-bounds updates are dropped by the scatter.
    cell = jnp.where(counted & placed, labels * num_labels + predictions, num_labels**2)
    counts = jnp.zeros(num_labels**2, jnp.int32).at[cell.ravel()].add(1, mode="drop")
    return counts.reshape(num_labels, num_labels), counted & ~placed


@jax.jit
def _per_class_iou(cm: Array) -> Array:
    correct = jnp.diagonal(cm, axis1=-2, axis2=-1)
    return _ratio(correct, cm.sum(-1) + cm.sum(-2) - correct)


@jax.jit
def _pixel_accuracy(cm: Array) -> Array:
    return _ratio(jnp.trace(cm, axis1=-2, axis2=-1), cm.sum((-2, -1)))


@jax.jit
def _class_accuracy(cm: Array) -> Array:
    return _mean_of_defined(_ratio(jnp.diagonal(cm, axis1=-2, axis2=-1), cm.sum(-1)))


@functools.partial(jax.jit, static_argnames="width")
def _near_another_label(labels: Array, valid: Array, width: int) -> Array:
    """Whether a valid pixel of another label lies within a Euclidean distance of `width`."""
    if labels.size == 0:
        return jnp.zeros(labels.shape, bool)
    height, columns = labels.shape[-2:]
    far = height + 1  # further than any pixel of the same column

    def step(state: tuple[Array, Array, Array], row: tuple[Array, Array]) -> tuple:
        # The label last met in this column, the distance to it, and the distance to any other label.
        nearest, distance, other_distance = state
        label, is_valid = row
        distance, other_distance = jnp.minimum(distance + 1, far), jnp.minimum(other_distance + 1, far)
        changes = is_valid & (label != nearest)
        other_distance = jnp.where(changes, distance, other_distance)
        distance = jnp.where(is_valid, 0, distance)
        nearest = jnp.where(is_valid, label, nearest)
        return (nearest, distance, other_distance), (nearest, distance, other_distance)

    rows = (jnp.moveaxis(labels, -2, 0), jnp.moveaxis(valid, -2, 0))
    nothing = jnp.full(rows[0].shape[1:], far, labels.dtype)
    start = (jnp.zeros_like(nothing), nothing, nothing)
    above: tuple[Array, Array, Array] = lax.scan(step, start, rows)[1]
    below: tuple[Array, Array, Array] = lax.scan(step, start, rows, reverse=True)[1]
    # Of both directions, the nearest pixel and the nearest whose label differs from that one's.
    from_above = above[1] <= below[1]
    nearest = jnp.where(from_above, above[0], below[0])
    distance = jnp.minimum(above[1], below[1])
    other_distance = jnp.minimum(
        jnp.where(above[0] == nearest, above[2], above[1]),
        jnp.where(below[0] == nearest, below[2], below[1]),
    )
    nearest, distance, other_distance = (jnp.moveaxis(a, 0, -2) for a in (nearest, distance, other_distance))

    reach = min(width, columns - 1)
    pad = [(0, 0)] * (labels.ndim - 1) + [(reach, reach)]
    nearest = jnp.pad(nearest, pad)
    distance, other_distance = (jnp.pad(a, pad, constant_values=far) for a in (distance, other_distance))
    # How far a pixel may be along the column when it is `dx` away along the row.
    chords = jnp.array(
        [min(math.isqrt(width * width - dx * dx), far - 1) for dx in range(-reach, reach + 1)], jnp.int32
    )

    def look(k: Array, near: Array) -> Array:
        there = [lax.dynamic_slice_in_dim(a, k, columns, -1) for a in (nearest, distance, other_distance)]
        return near | (jnp.where(there[0] != labels, there[1], there[2]) <= chords[k])

    return lax.fori_loop(0, 2 * reach + 1, look, jnp.zeros_like(valid))


def _integers(name: str, array: Array | np.ndarray) -> Array:
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: got dtype {array.dtype}; expected integer labels, e.g. probs.argmax(-1)")
    # One signed type, so that neither -1 nor 255 depends on how the labels were stored.
    return array.astype(jnp.int32)


def _static_int(name: str, value: SupportsIndex, *, minimum: int) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{name}: got {value!r}; expected a Python int, which is static under jax.jit"
        ) from error
    if number < minimum:
        raise ValueError(f"{name}: got {number}; expected at least {minimum}")
    return number


def _counts(cm: Array | np.ndarray) -> Array:
    # Totals over a data set may be int64, which jnp.asarray would truncate.
    cm = jnp.asarray(cm if isinstance(cm, jax.Array) else np.asarray(cm, np.float64), dtype=float)
    if cm.ndim < 2 or cm.shape[-1] != cm.shape[-2]:
        raise ValueError(f"cm: got shape {cm.shape}; expected [*batch, labels, labels] from confusion_matrix")
    return cm


def _ratio(part: Array, whole: Array) -> Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), jnp.nan)


@jax.jit
def _mean_of_defined(values: Array) -> Array:
    defined = ~jnp.isnan(values)
    return _ratio(jnp.where(defined, values, 0).sum(-1), defined.sum(-1))
