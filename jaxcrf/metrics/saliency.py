"""Saliency: precision and recall against the threshold, and the F-measure where it is largest."""

import dataclasses
import functools
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jaxcrf._checks import is_concrete
from jaxcrf.metrics.arguments import integers, static_int
from jaxcrf.metrics.totals import Counts, Total, ratio

Average = Literal["images", "pixels"]


class PrecisionRecallCurve(NamedTuple):
    """Precision and recall of a mask that is cut out of scores, against the threshold.

    Attributes:
        thresholds: `[T]`; marked is what scores at least this.
        precision: the fraction of the marked pixels that are salient, `[T]`; 0 where none is marked.
        recall: the fraction of the salient pixels that are marked, `[T]`; NaN if there are none.
    """

    thresholds: Float[np.ndarray, "thresholds"]
    precision: Float[Array | np.ndarray, "thresholds"]
    recall: Float[Array | np.ndarray, "thresholds"]

    def f_measure(self, beta_squared: float = 0.3) -> Float[Array | np.ndarray, "thresholds"]:
        r"""The F-measure at every threshold.

        .. math::
            F_\beta = \frac{(1 + β^2)\, P R}{β^2 P + R}.

        Args:
            beta_squared: `β²`; below one, precision weighs more than recall.

        Returns:
            `[T]`; 0 where precision and recall are, NaN if there are no salient pixels.
        """
        p, r = self.precision, self.recall
        module = np if isinstance(p, np.ndarray) else jnp
        below = beta_squared * p + r
        # NaN stays NaN: it is not equal to 0.
        return (1 + beta_squared) * p * r / module.where(below == 0, 1, below)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["images", "precisions", "recalls", "salient", "marked", "found"],
    meta_fields=["ignore_label"],
)
@dataclasses.dataclass(frozen=True)
class ThresholdCounts(Counts):
    """What a precision-recall curve is made of, growing image by image.

    Scores are cut at `T` thresholds, `k / (T − 1)`. Both averages are kept: that over images, which saliency is
    measured by, of precisions and recalls rounded to `2**-24` and added up exactly; and the counts of all pixels
    together. Images without a salient pixel have no recall and are left out of the former.

    Attributes:
        images: how many images with salient pixels there were.
        precisions: the sum of their precisions, `[T]`.
        recalls: the sum of their recalls, `[T]`.
        salient: how many pixels are salient.
        marked: how many score at least the threshold, `[T]`.
        found: how many are both, `[T]`.
        ignore_label: the true label of pixels that do not count; None for no such label.

    Example:
        >>> import jax.numpy as jnp
        >>> counts = ThresholdCounts.zeros(num_thresholds=3)
        >>> counts = counts.update(jnp.array([[1, 1, 0]]), jnp.array([[0.9, 0.6, 0.5]]))
        >>> curve = counts.curve()
        >>> [values.round(2).tolist() for values in curve]
        [[0.0, 0.5, 1.0], [0.67, 0.67, 0.0], [1.0, 1.0, 0.0]]
    """

    images: Total
    precisions: Total
    recalls: Total
    salient: Total
    marked: Total
    found: Total
    ignore_label: int | None = 255

    @classmethod
    def zeros(cls, *, num_thresholds: int = 256, ignore_label: int | None = 255) -> Self:
        """Counts of nothing yet.

        Args:
            num_thresholds: `T`; 256 are the levels of an 8-bit saliency map.
            ignore_label: the true label of pixels that do not count; None for no such label.

        Returns:
            The counts.

        Raises:
            ValueError: if there are fewer than two thresholds.
        """
        num_thresholds = static_int("num_thresholds", num_thresholds, minimum=2)
        one, each = Total.zeros(), Total.zeros((num_thresholds,))
        return cls(one, each, each, one, each, each, ignore_label)

    def update(
        self,
        labels: Int[Array | np.ndarray, "*batch height width"],
        scores: Float[Array | np.ndarray, "*batch height width"],
    ) -> Self:
        """Counts more images.

        Args:
            labels: 1 for salient pixels and 0 for others, `[*batch, H, W]`.
            scores: how salient each is, from 0 to 1, of the same shape.

        Returns:
            New counts.

        Raises:
            ValueError: if shapes disagree, or concrete labels or scores are something else. Under `jit`, where values
                cannot be seen, other labels do not count, and NaN scores least.
            TypeError: if labels are no integers or scores no floats.
        """
        labels, scores = integers("labels", labels), jnp.asarray(scores)
        if not jnp.issubdtype(scores.dtype, jnp.floating):
            raise TypeError(f"scores: got dtype {scores.dtype}; expected floats, e.g. 8-bit scores / 255")
        if labels.shape != scores.shape or labels.ndim < 2:
            raise ValueError(
                f"labels, scores: got shapes {labels.shape} and {scores.shape}; expected [*batch, height, width] of "
                "both, e.g. probs[..., 1] as scores"
            )
        if labels.size == 0:
            return self
        counts, strange, out_of_range = _count(self, labels, scores)
        if is_concrete(strange) and bool(strange):
            raise ValueError(
                f"labels: hold something besides 0, 1 and ignore_label {self.ignore_label}; mark salient pixels by 1, "
                "e.g. a mask of 0 and 255 divided by 255"
            )
        if is_concrete(out_of_range) and bool(out_of_range):
            raise ValueError(
                "scores: hold NaN or numbers outside 0 to 1; pass probabilities, e.g. probs[..., 1]"
            )
        return counts

    def curve(self, average: Average = "images") -> PrecisionRecallCurve:
        """Precision and recall at every threshold; float64 on the host, float32 under `jit`.

        Args:
            average: `"images"` for the means over images, or `"pixels"` for those over all pixels.

        Returns:
            The curve.

        Raises:
            ValueError: if `average` is unknown.
        """
        count = self.marked.high.shape[-1]
        thresholds = np.linspace(0, 1, count)
        if average == "images":
            images = self.images.as_float() + np.zeros(count)
            precision, recall = (
                ratio(total.as_ratios(), images) for total in (self.precisions, self.recalls)
            )
        elif average == "pixels":
            found, marked, salient = (t.as_float() for t in (self.found, self.marked, self.salient))
            module = np if isinstance(found, np.ndarray) else jnp
            precision, recall = ratio(found, module.maximum(marked, 1)), ratio(found, salient + 0 * found)
        else:
            raise ValueError(f"average: got {average!r}; expected 'images' or 'pixels'")
        return PrecisionRecallCurve(thresholds, precision, recall)


def precision_recall_curve(
    labels: Int[Array | np.ndarray, "*batch height width"],
    scores: Float[Array | np.ndarray, "*batch height width"],
    ignore_label: int | None = 255,
    *,
    average: Average = "images",
    num_thresholds: int = 256,
) -> PrecisionRecallCurve:
    r"""Precision and recall of a saliency map that is cut at a threshold, against the threshold.

    .. math::
        P_t = \frac{\#\{i : s_i \ge t,\ y_i = 1\}}{\#\{i : s_i \ge t\}}, \qquad
        R_t = \frac{\#\{i : s_i \ge t,\ y_i = 1\}}{\#\{i : y_i = 1\}}, \qquad t = \frac{k}{T - 1}.

    For a data set, add up `ThresholdCounts`.

    Args:
        labels: 1 for salient pixels and 0 for others, `[*batch, H, W]`, every one an image.
        scores: how salient each is, from 0 to 1, of the same shape.
        ignore_label: the true label of pixels that do not count; None for no such label.
        average: `"images"` for the means over images with salient pixels, or `"pixels"` for those over all pixels.
        num_thresholds: `T`; 256 are the levels of an 8-bit saliency map.

    Returns:
        The curve.

    Raises:
        ValueError: if shapes disagree, or labels, scores or an option are out of range.
        TypeError: if labels are no integers or scores no floats.

    Example:
        >>> import jax.numpy as jnp
        >>> labels, scores = jnp.array([[1, 1, 0, 0]]), jnp.array([[1.0, 0.4, 0.6, 0.0]])
        >>> curve = precision_recall_curve(labels, scores, num_thresholds=3)
        >>> curve.precision.tolist(), curve.recall.tolist()
        ([0.5, 0.5, 1.0], [1.0, 0.5, 0.5])

    References:
        Achanta et al., *Frequency-tuned Salient Region Detection*, 2009, section 4.
    """
    counts = ThresholdCounts.zeros(num_thresholds=num_thresholds, ignore_label=ignore_label)
    return counts.update(labels, scores).curve(average)


def max_f_measure(
    labels: Int[Array | np.ndarray, "*batch height width"],
    scores: Float[Array | np.ndarray, "*batch height width"],
    ignore_label: int | None = 255,
    *,
    beta_squared: float = 0.3,
    average: Average = "images",
    num_thresholds: int = 256,
) -> Float[Array | np.ndarray, ""]:
    r"""The largest F-measure that a saliency map reaches at any threshold.

    .. math::
        \max_t \frac{(1 + β^2)\, P_t R_t}{β^2 P_t + R_t},

    of the precisions and recalls of `precision_recall_curve`, averaged over images first.

    Args:
        labels: 1 for salient pixels and 0 for others, `[*batch, H, W]`, every one an image.
        scores: how salient each is, from 0 to 1, of the same shape.
        ignore_label: the true label of pixels that do not count; None for no such label.
        beta_squared: `β²`; 0.3 weighs precision more than recall.
        average: `"images"` for the means over images with salient pixels, or `"pixels"` for those over all pixels.
        num_thresholds: how many thresholds are tried; 256 are the levels of an 8-bit saliency map.

    Returns:
        A number in `[0, 1]`; NaN if there is no salient pixel.

    Raises:
        ValueError: if shapes disagree, or labels, scores or an option are out of range.
        TypeError: if labels are no integers or scores no floats.

    Example:
        >>> import jax.numpy as jnp
        >>> labels, scores = jnp.array([[1, 1, 0, 0]]), jnp.array([[0.9, 0.7, 0.8, 0.1]])
        >>> round(float(max_f_measure(labels, scores)), 4)
        0.8125

    References:
        Chandra, Usunier and Kokkinos, 2017, section 5 and table 5; Achanta et al., *Frequency-tuned Salient Region
        Detection*, 2009, section 4.
    """
    curve = precision_recall_curve(
        labels, scores, ignore_label, average=average, num_thresholds=num_thresholds
    )
    return curve.f_measure(beta_squared).max()


@jax.jit
def _count(counts: ThresholdCounts, labels: Array, scores: Array) -> tuple[ThresholdCounts, Array, Array]:
    num_thresholds = counts.marked.high.shape[-1]
    labels, scores = (maps.reshape(-1, *maps.shape[-2:]) for maps in (labels, scores))
    thresholds = jnp.asarray(np.linspace(0, 1, num_thresholds), scores.dtype)
    ignored = jnp.zeros_like(labels, bool) if counts.ignore_label is None else labels == counts.ignore_label
    known = ((labels == 0) | (labels == 1)) & ~ignored

    def of_image(maps: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        label, score, is_known = (each.ravel() for each in maps)
        # How many thresholds the score reaches; NaN, which would be sorted last, reaches the lowest alone.
        reached = jnp.searchsorted(thresholds, jnp.where(score >= 0, score, 0), side="right")
        cell = jnp.where(is_known, label * (num_thresholds + 1) + reached, 2 * (num_thresholds + 1))
        histogram = jnp.zeros(2 * (num_thresholds + 1), jnp.int32).at[cell].add(1, mode="drop")
        others, salient = histogram.reshape(2, -1)[:, :0:-1].cumsum(1)[:, ::-1]
        return others, salient

    others, found = lax.map(of_image, (labels, scores, known))
    marked, salient = others + found, found[:, :1]
    counts_at_all = salient > 0
    precision = jnp.where(counts_at_all, found / jnp.maximum(marked, 1), 0)
    recall = found / jnp.maximum(salient, 1)
    added = {
        "images": Total.of(counts_at_all[:, 0], 0),
        "precisions": Total.of_ratios(precision, 0),
        "recalls": Total.of_ratios(recall, 0),
        "salient": Total.of(salient[:, 0], 0),
        "marked": Total.of(marked, 0),
        "found": Total.of(found, 0),
    }
    totals = {name: getattr(counts, name) + total for name, total in added.items()}
    strange = (~known & ~ignored).any()
    out_of_range = (known & ~((scores >= 0) & (scores <= 1))).any()
    return dataclasses.replace(counts, **totals), strange, out_of_range
