"""Losses of dense labelling, as pure functions of logits and label maps.

| loss | used by |
|---|---|
| `cross_entropy` | all five papers: "softmax loss", "pixel-wise cross entropy"; saliency is the case of two labels |
| `auxiliary_cross_entropy` | ConvCRF, §5.3: the unary's own loss beside that of the CRF's output |
| `pairwise_embedding`, `pairwise_edges` | dense Gaussian CRF, §4, second phase: the pairwise terms alone |
| `expected_error`, `soft_iou`, `dice` | losses nearer to what is measured: accuracy, mIoU, overlap |

Each is one scalar over all pixels that it is given, batch axes included. Arithmetic is at least float32
whatever the logits' type. Ignored pixels have no part in a loss nor in its gradient, whatever their logits
are; where all are ignored the loss is 0, and so are its gradients. Labels that are neither of the `L` nor
`ignore_label` are an error; under `jax.jit`, where values cannot be looked at, they make loss and gradients
NaN.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, Num

from jaxcrf import _checks
from jaxcrf.filters.gram import EmbeddingKind
from jaxcrf.filters.grid import OFFSETS, Connectivity, EdgeKind


class _Targets(NamedTuple):
    """What all losses of pixels need."""

    logits: Array  # [*any, labels], zero where a pixel does not count
    one_hot: Array  # [*any, labels], boolean
    labels: Array  # [*any], zero where a pixel does not count
    weights: Array  # [*any], zero where a pixel does not count
    fault: Array | float  # NaN if a label is out of range, otherwise 1


def cross_entropy(
    logits: Float[Array, "*any labels"],
    labels: Int[Array, "*any"],
    *,
    class_weights: Any = None,
    pixel_weights: Any = None,
    ignore_label: int | None = 255,
    label_smoothing: Any = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Array, ""]:
    r"""Minus the mean log-probability of the true labels.

    .. math::
        \frac{\sum_i w_i\, \ell_i}{\sum_i w_i}, \qquad
        \ell_i = -\sum_l \bigl[(1 - \varepsilon)\,[l = y_i] + \tfrac{\varepsilon}{L}\bigr]
            \log \operatorname{softmax}(z_i)_l, \qquad w_i = c_{y_i}\, a_i,

    over the pixels that are not ignored, with class weights `c` and pixel weights `a`. The sum is divided by
    the sum of the weights, so that it is the weights' ratios that matter, and not how often a batch happens
    to show a rare class.

    Args:
        logits: `z`, `[*any, L]`.
        labels: `y`, `[*any]`.
        class_weights: `c`, one number >= 0 per label, as from `class_weights`; None for ones.
        pixel_weights: `a`, numbers >= 0 of the labels' shape (or that broadcast to it); None for ones.
        ignore_label: the label of pixels that do not count; None for no such label.
        label_smoothing: `ε`, the share of the target that is spread evenly over all labels, 0 to 1.
        reduction: "mean" as above; "sum" for the numerator alone. A rate that was chosen for a sum over
            pixels, as CRF-as-RNN's 1e-13, means nothing for a mean.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: if shapes disagree, a label is out of range, a weight is negative, or an option is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
        >>> cross_entropy(logits, jnp.array([0, 1, 255])).round(4)  # (ln 2 + ln 4/3) / 2
        Array(0.4904, dtype=float32)

    References:
        Chen et al., *Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs*, 2015,
        §3.1; Szegedy et al., *Rethinking the Inception Architecture*, 2016, §7 (smoothing).
    """
    _check_option("reduction", reduction, ("mean", "sum"))
    if _checks.is_concrete(label_smoothing) and not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}; expected a share, 0 to 1")
    pixels = _read(logits, labels, ignore_label, pixel_weights)
    weights = pixels.weights
    if class_weights is not None:
        per_label = _weights("class_weights", class_weights, weights.dtype)
        if per_label.shape != pixels.logits.shape[-1:]:
            raise ValueError(
                f"class_weights: got shape {per_label.shape}; expected {pixels.logits.shape[-1:]}, one per label"
            )
        weights = weights * per_label[pixels.labels]
    log_probs = jax.nn.log_softmax(pixels.logits, axis=-1)
    terms = -_at(log_probs, pixels.one_hot)
    if not (_checks.is_concrete(label_smoothing) and label_smoothing == 0):
        terms = (1 - label_smoothing) * terms - label_smoothing * log_probs.mean(-1)
    total = jnp.sum(weights * terms) * pixels.fault
    return total if reduction == "sum" else _divide(total, weights.sum())


def auxiliary_cross_entropy(
    logits: Float[Array, "*any labels"],
    auxiliary: Any,
    labels: Int[Array, "*any"],
    *,
    auxiliary_weight: Any = 1.0,
    **options: Any,
) -> Float[Array, ""]:
    r"""The cross-entropy of a model's output plus that of scores from inside it.

    .. math::
        \mathcal L(z) + \sum_k \alpha_k\, \mathcal L(z^{(k)})

    With the logits of a CRF as `z` and its unary as `z⁽¹⁾`, gradients reach the network below by a way of their
    own as well as through the iterations of mean field, in which they vanish.

    Args:
        logits: `z`, `[*any, L]`.
        auxiliary: `z⁽¹⁾` of the same shape, or a list of several.
        labels: `[*any]`.
        auxiliary_weight: `α`, one number for all or one for each. The paper does not give its own.
        **options: those of `cross_entropy`, for all terms alike.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: as `cross_entropy`; also if the number of weights is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> labels = jnp.zeros((4, 5), int)
        >>> refined, unary = jnp.zeros((4, 5, 2)), jnp.zeros((4, 5, 2))
        >>> auxiliary_cross_entropy(refined, unary, labels, auxiliary_weight=0.5).round(4)  # 1.5 ln 2
        Array(1.0397, dtype=float32)

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, §5.3.
    """
    several = list(auxiliary) if isinstance(auxiliary, (list, tuple)) else [auxiliary]
    one_each = isinstance(auxiliary_weight, Sequence) or getattr(auxiliary_weight, "ndim", 0) == 1
    weights = list(auxiliary_weight) if one_each else [auxiliary_weight] * len(several)
    if len(weights) != len(several):
        raise ValueError(
            f"auxiliary_weight: got {len(weights)} weights for {len(several)} auxiliary scores; expected one "
            "number, or one for each"
        )
    total = cross_entropy(logits, labels, **options)
    for weight, scores in zip(weights, several, strict=True):
        total = total + weight * cross_entropy(scores, labels, **options)
    return total


def expected_error(
    logits: Float[Array, "*any labels"],
    labels: Int[Array, "*any"],
    *,
    pixel_weights: Any = None,
    ignore_label: int | None = 255,
) -> Float[Array, ""]:
    r"""The share of pixels that labels drawn from the predicted distributions would have wrong.

    .. math::
        \frac{\sum_i a_i \bigl(1 - \operatorname{softmax}(z_i)_{y_i}\bigr)}{\sum_i a_i}

    Bounded, unlike the cross-entropy: pixels that are wrong beyond repair cannot outweigh the others. A CRF
    whose few parameters weigh unary against pairwise terms profits; a network that starts from noise is
    better trained by the cross-entropy, whose gradient does not vanish where the truth is improbable.

    Args:
        logits: `z`, `[*any, L]`.
        labels: `y`, `[*any]`.
        pixel_weights: `a`, numbers >= 0 of the labels' shape (or that broadcast to it); None for ones.
        ignore_label: the label of pixels that do not count; None for no such label.

    Returns:
        A scalar in `[0, 1]`, at least float32.

    Raises:
        ValueError: if shapes disagree, a label is out of range, or a weight is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
        >>> expected_error(logits, jnp.array([0, 1, 255])).round(4)
        Array(0.375, dtype=float32)
    """
    pixels = _read(logits, labels, ignore_label, pixel_weights)
    hit = _at(jax.nn.softmax(pixels.logits, axis=-1), pixels.one_hot)
    return _divide(jnp.sum(pixels.weights * (1 - hit)) * pixels.fault, pixels.weights.sum())


def soft_iou(
    logits: Float[Array, "*any labels"],
    labels: Int[Array, "*any"],
    *,
    pixel_weights: Any = None,
    ignore_label: int | None = 255,
) -> Float[Array, ""]:
    r"""One minus the mean intersection over union, with probabilities for the prediction.

    .. math::
        1 - \frac{1}{|\mathcal L|} \sum_{l \in \mathcal L} \frac{\sum_i a_i\, p_{il}\, y_{il}}
            {\sum_i a_i\, (p_{il} + y_{il} - p_{il}\, y_{il})}, \qquad p_i = \operatorname{softmax}(z_i),

    where `y` is 1 at the true labels and 0 elsewhere, sums are over all pixels of the batch, and `𝓛` are the
    labels that occur among the true ones. To one that does not occur the fraction is 0 whatever is predicted,
    so that it would only scale the loss.

    Args:
        logits: `z`, `[*any, L]`.
        labels: `[*any]`.
        pixel_weights: `a`, numbers >= 0 of the labels' shape (or that broadcast to it); None for ones.
        ignore_label: the label of pixels that do not count; None for no such label.

    Returns:
        A scalar in `[0, 1]`, at least float32.

    Raises:
        ValueError: if shapes disagree, a label is out of range, or a weight is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> soft_iou(jnp.zeros((4, 2)), jnp.array([0, 0, 1, 1])).round(4)  # 1 - 1 / (2 + 2 - 1)
        Array(0.6667, dtype=float32)

    References:
        Rahman and Wang, *Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation*,
        2016, eq. 3 to 5.
    """
    pixels = _read(logits, labels, ignore_label, pixel_weights)
    both, predicted, true = _overlap(pixels, jax.nn.softmax(pixels.logits, axis=-1))
    return _mean_overlap(both, predicted + true - both, true) * pixels.fault


def dice(
    logits: Float[Array, "*any labels"],
    labels: Int[Array, "*any"],
    *,
    squared: bool = False,
    pixel_weights: Any = None,
    ignore_label: int | None = 255,
) -> Float[Array, ""]:
    r"""One minus the mean Dice coefficient, with probabilities for the prediction.

    .. math::
        1 - \frac{1}{|\mathcal L|} \sum_{l \in \mathcal L} \frac{2 \sum_i a_i\, p_{il}\, y_{il}}
            {\sum_i a_i\, (p_{il}^n + y_{il})}, \qquad p_i = \operatorname{softmax}(z_i),

    with `n = 1`, or `n = 2` if `squared`; pixels and labels are as in `soft_iou`.

    Args:
        logits: `z`, `[*any, L]`.
        labels: `[*any]`.
        squared: square the probabilities in the denominator, as V-Net does.
        pixel_weights: `a`, numbers >= 0 of the labels' shape (or that broadcast to it); None for ones.
        ignore_label: the label of pixels that do not count; None for no such label.

    Returns:
        A scalar in `[0, 1]`, at least float32.

    Raises:
        ValueError: if shapes disagree, a label is out of range, or a weight is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> labels = jnp.array([0, 0, 1, 1])
        >>> dice(jnp.zeros((4, 2)), labels).round(4), dice(jnp.zeros((4, 2)), labels, squared=True).round(4)
        (Array(0.5, dtype=float32), Array(0.3333, dtype=float32))

    References:
        Milletari, Navab and Ahmadi, *V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
        Segmentation*, 2016, §3 (squared).
    """
    pixels = _read(logits, labels, ignore_label, pixel_weights)
    both, predicted, true = _overlap(pixels, jax.nn.softmax(pixels.logits, axis=-1), 2 if squared else 1)
    return _mean_overlap(2 * both, predicted + true, true) * pixels.fault


def pairwise_embedding(
    embeddings: Float[Array, "..."],
    labels: Int[Array, "*batch height width"],
    pairs: Int[Array, "*batch pairs 2"],
    *,
    kind: EmbeddingKind,
    num_labels: int | None = None,
    competitors: Literal["any", "both"] = "any",
    ignore_label: int | None = 255,
) -> Float[Array, ""]:
    r"""Trains embeddings on their own: the true labels of two pixels are to have the lowest pairwise energy.

    The pair of pixels `p, q` has the energy `E(m, n)` if it takes the labels `m, n`: `⟨A_p^m, A_q^n⟩` for
    general embeddings; for Potts-type ones `⟨A_p, A_q⟩` if `m ≠ n` and 0 otherwise. Of minus these energies
    the loss takes the soft-max cross-entropy with the true pair of labels as the class,

    .. math::
        \frac{1}{K} \sum_{(p, q)} \Bigl[ E_{pq}(y_p, y_q)
            + \log \sum_{(m, n) \in \mathcal C} e^{-E_{pq}(m, n)} \Bigr],

    which is minus the log-likelihood of two pixels under the Gaussian CRF's pairwise term alone.

    The paper asks for `A(l₁, l₂) < A(l₁' ≠ l₁, l₂' ≠ l₂)` by "the softmax cross-entropy loss" and says no more.
    Two readings differ in the set `𝒞`. With "any" it holds all `L²` pairs of labels, the soft-max over all
    classes: every wrong pair is to cost more than the true one. With "both" it holds, besides the true pair,
    those that are wrong in both places, the inequality to the letter. The first is the default, since the
    second has nothing to teach Potts-type embeddings where there are two labels (as in saliency): the only
    pair that is wrong in both places then has the energy of the true one.

    The paper does not say either which pixels are compared; all pairs would be `N²`. `random_pairs` draws some.

    Args:
        embeddings: `[*batch, H, W, L, D]` for the general kind, `[*batch, H, W, D]` for Potts.
        labels: `[*batch, H, W]`, of the embeddings' resolution (see `subsample_labels`).
        pairs: `[*batch, K, 2]`, or `[K, 2]` for the same in every image: places of two pixels in the
            flattened image, `y · W + x`. Pairs with an ignored pixel do not count.
        kind: "general" or "potts".
        num_labels: `L`, for the Potts kind, whose embeddings do not say it.
        competitors: "any" or "both", see above.
        ignore_label: the label of pixels that do not count; None for no such label.

    Returns:
        A scalar, at least float32: the mean over the pairs that count.

    Raises:
        ValueError: if shapes disagree, a label or a place is out of range, or an option is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> labels = jnp.array([[0, 0, 1]])
        >>> alike = jnp.array([[[5.0], [5.0], [-5.0]]])  # pixels of one label agree, others disagree
        >>> pairs = jnp.array([[0, 1], [0, 2]])
        >>> pairwise_embedding(alike, labels, pairs, kind="potts", num_labels=2).round(4)  # ln 2
        Array(0.6931, dtype=float32)

        For a pair of unlike labels, two pairs of labels are as good as each other to Potts-type embeddings,
        and for one of like labels all `L` pairs of like ones are: hence the `ln 2` that remains.

    References:
        Chandra, Usunier and Kokkinos, *Dense and Low-Rank Gaussian CRFs Using Deep Embeddings*, 2017, §4 and
        eq. 11.
    """
    _check_option("kind", kind, ("general", "potts"))
    _check_option("competitors", competitors, ("any", "both"))
    found = jnp.asarray(embeddings)
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f"embeddings: got dtype {found.dtype}; expected floating point")
    found = _checks.as_float(found)
    own = 2 if kind == "general" else 1
    if found.ndim < 2 + own or found.shape[:-own] != np.shape(labels):
        expected = "[*batch, H, W, L, D]" if kind == "general" else "[*batch, H, W, D]"
        raise ValueError(
            f"embeddings: got shape {found.shape} for labels of shape {np.shape(labels)}; expected {expected} for "
            f"kind={kind!r} and labels [*batch, H, W] of the same resolution"
        )
    if kind == "general":
        if num_labels not in (None, found.shape[-2]):
            raise ValueError(
                f"num_labels: got {num_labels}, but the embeddings have {found.shape[-2]} labels"
            )
        num_labels = found.shape[-2]
    elif num_labels is None:
        raise ValueError("num_labels: got None; kind='potts' needs the number of labels")
    count = _checks.check_num_labels(num_labels)
    truth = _checks.check_labels("labels", labels, count, ignore_label)
    pixels = int(np.prod(truth.shape[-2:]))
    places = _places(pairs, truth.shape[:-2], pixels)

    def pick(x: Array) -> Array:
        """`x [*batch, H, W, …]` at both pixels of every pair, `[images, pairs, 2, …]`."""
        return jax.vmap(lambda image, at: image[at])(x.reshape(-1, pixels, *x.shape[truth.ndim :]), places)

    classes = pick(truth)
    counts = jnp.ones(classes.shape, bool) if ignore_label is None else classes != ignore_label
    fault = _fault(classes, counts, count) if _traced(labels, pairs) else 1.0
    classes = jnp.where(counts, classes, 0)
    first, second = classes[..., 0], classes[..., 1]
    valid = counts.all(-1)
    ends = pick(found)
    ends = jnp.where(valid.reshape(*valid.shape, *[1] * (own + 1)), ends, 0)
    if kind == "general":
        # Full float32: the default precision of accelerators keeps 8 to 11 bits.
        energies = jnp.einsum(
            "bkmd,bknd->bkmn", ends[:, :, 0], ends[:, :, 1], precision=lax.Precision.HIGHEST
        )
        true_energy, log_partition = _general_terms(energies, first, second, competitors)
    else:
        products = jnp.sum(ends[:, :, 0] * ends[:, :, 1], axis=-1)
        true_energy, log_partition = _potts_terms(products, first, second, count, competitors)
    weights = valid.astype(found.dtype)
    return _divide(jnp.sum(weights * (true_energy + log_partition)) * fault, weights.sum())


def pairwise_edges(
    edges: Float[Array, "..."],
    labels: Int[Array, "*batch height width"],
    *,
    kind: EdgeKind,
    connectivity: Connectivity,
    num_labels: int | None = None,
    competitors: Literal["any", "both"] = "any",
    ignore_label: int | None = 255,
) -> Float[Array, ""]:
    r"""Trains the edges of a grid on their own: `pairwise_embedding` for sparse Gaussian CRFs.

    The pairs of pixels are the ends of the edges, and the energy of the labels `m, n` is `W_e(m, n)` for general
    edges; for Potts-type ones `w_e` if `m ≠ n` and 0 otherwise. The loss is that of `pairwise_embedding`, over all
    edges whose ends both count.

    Args:
        edges: `[*batch, H, W, E, L, L]` for the general kind, `[*batch, H, W, E]` for Potts, `E = connectivity / 2`,
            as `sparse_gaussian_crf` takes them.
        labels: `[*batch, H, W]`, of the edges' resolution.
        kind: "general" or "potts".
        connectivity: 4, 8 or 12.
        num_labels: `L`, for the Potts kind, whose edges do not say it.
        competitors: "any" or "both", see `pairwise_embedding`.
        ignore_label: the label of pixels that do not count; None for no such label.

    Returns:
        A scalar, at least float32: the mean over the edges that count.

    Raises:
        ValueError: if shapes disagree, a label is out of range, or an option is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> edges = jnp.array([[[9.0, 0.0], [-9.0, 0.0], [0.0, 0.0]]])  # the first two pixels alike, the third not
        >>> pairwise_edges(edges, jnp.array([[0, 0, 1]]), kind="potts", connectivity=4, num_labels=2).round(3)  # ln 2
        Array(0.693, dtype=float32)

    References:
        Chandra and Kokkinos, Fast, Exact and Multi-Scale Inference for Semantic Image Segmentation with Deep Gaussian
        CRFs, 2016, for the model; Chandra, Usunier and Kokkinos, *Dense and Low-Rank Gaussian CRFs Using Deep
        Embeddings*, 2017, §4, for the loss.
    """
    _check_option("kind", kind, ("general", "potts"))
    _check_option("competitors", competitors, ("any", "both"))
    if connectivity not in (4, 8, 12):
        raise ValueError(f"connectivity: got {connectivity!r}; expected 4, 8 or 12")
    found = _checks.as_float(edges)
    offsets = OFFSETS[: connectivity // 2]
    own = found.shape[-2:] if kind == "general" else ()
    if found.shape != (*np.shape(labels), len(offsets), *own) or len(set(own)) > 1:
        expected = "[*batch, H, W, E, L, L]" if kind == "general" else "[*batch, H, W, E]"
        raise ValueError(
            f"edges: got shape {found.shape} for labels of shape {np.shape(labels)}; expected {expected} for "
            f"kind={kind!r}, E = {len(offsets)} and labels [*batch, H, W] of the same resolution"
        )
    if kind == "general":
        if num_labels not in (None, own[0]):
            raise ValueError(f"num_labels: got {num_labels}, but the edges have {own[0]} labels")
        num_labels = own[0]
    elif num_labels is None:
        raise ValueError("num_labels: got None; kind='potts' needs the number of labels")
    count = _checks.check_num_labels(num_labels)
    truth = _checks.check_labels("labels", labels, count, ignore_label)
    height, width = truth.shape[-2:]
    counts = jnp.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
    fault = _fault(truth, counts, count) if _traced(labels) else 1.0
    # Outside of the image there is a label that does not count.
    inside = jnp.where(counts, truth, -1)
    padded = jnp.pad(inside, [(0, 0)] * (inside.ndim - 2) + [(2, 2)] * 2, constant_values=-1)
    second = jnp.stack(
        [padded[..., 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width] for dy, dx in offsets], axis=-1
    )
    first = jnp.broadcast_to(inside[..., None], second.shape)
    valid = (first >= 0) & (second >= 0)
    first, second = (jnp.where(valid, labels_of, 0) for labels_of in (first, second))
    found = jnp.where(valid.reshape(*valid.shape, *[1] * len(own)), found, 0)
    if kind == "general":
        true_energy, log_partition = _general_terms(found, first, second, competitors)
    else:
        true_energy, log_partition = _potts_terms(found, first, second, count, competitors)
    weights = valid.astype(found.dtype)
    return _divide(jnp.sum(weights * (true_energy + log_partition)) * fault, weights.sum())


def random_pairs(key: Array, shape: Sequence[int], num_pairs: int) -> Int[Array, "*batch pairs 2"]:
    """Pairs of different pixels, drawn evenly from all pairs of an image.

    Args:
        key: a key of `jax.random`.
        shape: that of the label maps, `[*batch, H, W]`; every image gets pairs of its own.
        num_pairs: `K`, per image; a pair may come up again.

    Returns:
        int32 `[*batch, K, 2]`, places in the flattened image.

    Raises:
        ValueError: if an image has only one pixel, or `num_pairs` is not at least 1.

    Example:
        >>> import jax
        >>> random_pairs(jax.random.key(0), (4, 30, 40), 256).shape
        (4, 256, 2)
    """
    *batch, height, width = map(int, shape)
    pixels = height * width
    if pixels < 2:
        raise ValueError(f"shape: got {tuple(shape)}; expected [*batch, H, W] with at least two pixels")
    if not _checks.is_whole(num_pairs) or num_pairs < 1:
        raise ValueError(f"num_pairs: got {num_pairs!r}; expected a whole number >= 1")
    of_first, of_step = jax.random.split(key)
    first = jax.random.randint(of_first, (*batch, num_pairs), 0, pixels)
    second = (first + jax.random.randint(of_step, (*batch, num_pairs), 1, pixels)) % pixels
    return jnp.stack([first, second], axis=-1)


def class_weights(
    counts: Num[Any, "*images labels"],
    *,
    kind: Literal["median_frequency", "inverse_frequency"] = "median_frequency",
) -> Float[np.ndarray, " labels"]:
    r"""Weights that make up for labels of unequal frequency.

    With `n_{kl}` pixels of label `l` in image `k`,

    .. math::
        f_l = \frac{\sum_k n_{kl}}{\sum_{k : n_{kl} > 0} \sum_{l'} n_{kl'}}, \qquad
        c_l = \frac{\operatorname{median}_{l'} f_{l'}}{f_l}

    for "median_frequency", where a label's frequency is taken over the images that show it; and for
    "inverse_frequency"

    .. math::
        c_l = \frac{\sum_{k l'} n_{k l'}}{L' \sum_k n_{kl}},

    with `L'` labels that occur, which gives each of them the same total weight. Computed on the host in float64.

    Args:
        counts: pixels per image and label, `[images, L]`, without ignored ones; or `[L]` for all images
            together, as if there were one. `confusion_matrix(labels, labels, L).sum(1)` counts an image.
        kind: see above.

    Returns:
        float32 `[L]`; 0 for labels that do not occur.

    Raises:
        ValueError: if counts are negative or all zero, or the kind is unknown.

    Example:
        >>> class_weights([[60, 40, 0], [0, 75, 25]]).round(3)  # frequencies 0.6, 0.575, 0.25
        array([0.958, 1.   , 2.3  ], dtype=float32)
        >>> class_weights([60, 115, 25], kind="inverse_frequency").round(3)
        array([1.111, 0.58 , 2.667], dtype=float32)

    References:
        Eigen and Fergus, *Predicting Depth, Surface Normals and Semantic Labels with a Common Multi-Scale
        Convolutional Architecture*, 2015, §6.3.2 (median frequency).
    """
    _check_option("kind", kind, ("median_frequency", "inverse_frequency"))
    found = np.asarray(counts, np.float64)
    if found.ndim not in (1, 2) or not found.size:
        raise ValueError(f"counts: got shape {found.shape}; expected [L] or [images, L]")
    if not (np.isfinite(found).all() and (found >= 0).all() and found.any()):
        raise ValueError("counts: are negative, not finite or all zero; expected pixels per label")
    found = np.atleast_2d(found)
    pixels = found.sum(0)
    occurs = pixels > 0
    if kind == "median_frequency":
        shown = np.where(found > 0, found.sum(1, keepdims=True), 0).sum(0)
        frequency = pixels[occurs] / shown[occurs]
        weights = np.median(frequency) / frequency
    else:
        weights = pixels.sum() / (occurs.sum() * pixels[occurs])
    result = np.zeros(len(pixels), np.float32)
    result[occurs] = weights
    return result


def subsample_labels(
    labels: Int[Array, "*batch height width"], factor: int = 8, *, offset: int = 0
) -> Int[Array, "*batch rows columns"]:
    """Every `factor`-th pixel of label maps: targets for a network that predicts at a coarser resolution.

    Nothing is averaged, so that labels stay labels and ignored pixels stay ignored.

    Args:
        labels: `[*batch, H, W]`.
        factor: the network's output stride.
        offset: the first row and column that is taken. 0 goes with outputs at the pixels 0, 8, 16, …, as strided
            convolutions with "same" or symmetric padding have them; `factor // 2` with cell centres.

    Returns:
        `[*batch, ⌈(H - offset) / factor⌉, ⌈(W - offset) / factor⌉]`.

    Raises:
        ValueError: if `labels` are no maps, or `factor` or `offset` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> subsample_labels(jnp.zeros((2, 321, 321), int)).shape
        (2, 41, 41)

    References:
        Chen et al., 2015, §3.1: "our targets are the ground truth labels (subsampled by 8)".
    """
    if np.ndim(labels) < 2:
        raise ValueError(f"labels: got shape {np.shape(labels)}; expected [*batch, H, W]")
    if not _checks.is_whole(factor) or factor < 1:
        raise ValueError(f"factor: got {factor!r}; expected a whole number >= 1")
    if not _checks.is_whole(offset) or not 0 <= offset < min(np.shape(labels)[-2:]):
        raise ValueError(
            f"offset: got {offset!r}; expected a row and column of the maps of shape {np.shape(labels)}"
        )
    return labels[..., offset::factor, offset::factor]


def _read(logits: Any, labels: Any, ignore_label: int | None, pixel_weights: Any) -> _Targets:
    scores = jnp.asarray(logits)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"logits: got dtype {scores.dtype}; expected floating-point scores [..., labels]")
    if scores.ndim < 1 or scores.shape[:-1] != np.shape(labels):
        raise ValueError(
            f"logits: got shape {scores.shape} for labels of shape {np.shape(labels)}; expected one axis more, the "
            "labels', and the same pixels. Bring one to the other's resolution, e.g. with subsample_labels."
        )
    _checks.check_not_empty("logits", scores)
    scores = _checks.as_float(scores)
    count = scores.shape[-1]
    truth = _checks.check_labels("labels", labels, count, ignore_label)
    counts = jnp.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
    fault = _fault(truth, counts, count) if _traced(labels) else 1.0
    weights = counts.astype(scores.dtype)
    if pixel_weights is not None:
        given = _weights("pixel_weights", pixel_weights, scores.dtype)
        try:
            given = jnp.broadcast_to(given, truth.shape)
        except ValueError:
            raise ValueError(
                f"pixel_weights: got shape {given.shape}; expected the labels' {truth.shape}"
            ) from None
        weights = jnp.where(counts, given, 0)
    truth = jnp.where(counts, truth, 0)
    # Logits of ignored pixels are put aside before anything is computed: where they are not finite, a zero
    # cotangent would still become NaN on its way back.
    return _Targets(
        logits=jnp.where(counts[..., None], scores, 0),
        one_hot=truth[..., None] == jnp.arange(count),
        labels=truth,
        weights=weights,
        fault=fault,
    )


def _traced(*arrays: Any) -> bool:
    return not all(_checks.is_concrete(x) for x in arrays)


def _fault(labels: Array, counts: Array, num_labels: int) -> Array:
    """NaN if a label that counts is out of range, otherwise 1; as a factor, it is felt by gradients too."""
    astray = counts & ((labels < 0) | (labels >= num_labels))
    return jnp.where(astray.any(), jnp.nan, 1.0)


def _weights(name: str, weights: Any, dtype: Any) -> Array:
    array = jnp.asarray(weights, dtype)
    if _checks.is_concrete(array):
        values = np.asarray(array)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{name}: are negative or not finite; expected numbers >= 0")
    return array


def _check_option(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(choices)}")


def _at(values: Array, one_hot: Array) -> Array:
    # A comparison in place of a gather, whose transpose would be a scatter.
    return jnp.where(one_hot, values, 0).sum(-1)


def _divide(total: Array, weight: Array) -> Array:
    return total / jnp.where(weight > 0, weight, 1)


def _overlap(pixels: _Targets, probs: Array, power: int = 1) -> tuple[Array, Array, Array]:
    """Per label: what prediction and truth share, what is predicted, and what is true."""
    weights = pixels.weights[..., None]
    axes = tuple(range(probs.ndim - 1))
    both = jnp.where(pixels.one_hot, weights * probs, 0).sum(axes)
    predicted = (weights * probs**power).sum(axes)
    true = jnp.where(pixels.one_hot, weights, 0).sum(axes)
    return both, predicted, true


def _mean_overlap(shared: Array, whole: Array, true: Array) -> Array:
    """One minus the mean of `shared / whole` over the labels that occur; 0 where none does."""
    occurs = true > 0
    ratio = jnp.where(occurs, shared / jnp.where(occurs, whole, 1), 0)
    number = occurs.sum()
    return jnp.where(number > 0, 1 - ratio.sum() / jnp.maximum(number, 1), 0)


def _places(pairs: Any, batch: tuple[int, ...], pixels: int) -> Array:
    """Pairs as `[images, pairs, 2]`."""
    places = jnp.asarray(pairs)
    if not jnp.issubdtype(places.dtype, jnp.integer) or places.ndim < 2 or places.shape[-1] != 2:
        raise ValueError(
            f"pairs: got {places.dtype} of shape {places.shape}; expected integers [*batch, pairs, 2]"
        )
    if places.ndim > 2 and places.shape[:-2] != batch:
        raise ValueError(
            f"pairs: got shape {places.shape}; expected batch axes {batch}, as the labels', or none"
        )
    if _checks.is_concrete(places) and places.size:
        values = np.asarray(places)
        if values.min() < 0 or values.max() >= pixels:
            raise ValueError(f"pairs: holds a place out of range; expected 0 to {pixels - 1}, y · width + x")
    return jnp.broadcast_to(places, (*batch, *places.shape[-2:])).reshape(-1, *places.shape[-2:])


def _general_terms(
    energies: Float[Array, "*pairs labels labels"], first: Array, second: Array, competitors: str
) -> tuple[Array, Array]:
    """The energy of the true labels, and the logarithm of the sum over all that compete."""
    num_labels = energies.shape[-1]
    own_first = (first[..., None] == jnp.arange(num_labels))[..., :, None]
    own_second = (second[..., None] == jnp.arange(num_labels))[..., None, :]
    true = own_first & own_second
    competing = jnp.ones_like(true) if competitors == "any" else true | ~(own_first | own_second)
    log_partition = jax.nn.logsumexp(-energies, axis=(-2, -1), where=competing)
    return jnp.where(true, energies, 0).sum((-2, -1)), log_partition


def _potts_terms(
    unlike_energy: Float[Array, "*pairs"], first: Array, second: Array, num_labels: int, competitors: str
) -> tuple[Array, Array]:
    """As `_general_terms`. There are two energies only, 0 and that of unlike labels: competitors are counted."""
    same = first == second
    L = num_labels
    if competitors == "any":
        like, unlike = jnp.full(same.shape, L), jnp.full(same.shape, L * (L - 1))
    else:
        # Besides the true pair, (L-1)² pairs are wrong in both places; those of like labels among them are
        # L-1 where the true labels are alike, and L-2 where they are not.
        like = jnp.where(same, 1 + (L - 1), L - 2)
        unlike = jnp.where(same, (L - 1) ** 2 - (L - 1), 1 + (L - 1) ** 2 - (L - 2))
    # The sum of n e^{-E}, in logarithms; no term at all where n = 0.
    terms = jnp.stack([jnp.zeros_like(unlike_energy), -unlike_energy], axis=-1)
    numbers = jnp.stack([like, unlike], axis=-1)
    log_partition = jax.nn.logsumexp(terms, axis=-1, b=numbers, where=numbers > 0)
    return jnp.where(same, 0, unlike_energy), log_partition
