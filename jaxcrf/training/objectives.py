"""What a model is trained for: loss functions of a model and a batch, to be put into an `Update`."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax import Array

from jaxcrf.filters import Gram
from jaxcrf.training.losses import (
    auxiliary_cross_entropy,
    cross_entropy,
    pairwise_edges,
    pairwise_embedding,
    random_pairs,
    subsample_labels,
)
from jaxcrf.training.updates import Batch, Loss, Outcome


def segmentation(loss: Callable[..., Array] = cross_entropy, *, subsample: int = 1, **options: Any) -> Loss:
    r"""A loss of the model's logits.

    Args:
        loss: a function of logits and labels, as those of `jaxcrf.training.losses`.
        subsample: compare every so many pixels along both axes only, as DeepLab's training does.
        **options: further arguments of `loss`, as `class_weights`.

    Returns:
        A loss function for an `Update`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxcrf import models
        >>> model = models.create("small_fcn", 3, width=8, rngs=nnx.Rngs(0))
        >>> batch = {"image": jnp.zeros((1, 16, 24, 3)), "labels": jnp.zeros((1, 16, 24), int)}
        >>> outcome = segmentation()(model, batch)
        >>> outcome.loss.shape, outcome.logits.shape
        ((), (1, 16, 24, 3))
    """

    def objective(model: Any, batch: Batch) -> Outcome:
        logits = model(batch["image"])
        seen, labels = _sampled(logits, batch["labels"], subsample)
        return Outcome(loss(seen, labels, **options), logits)

    return objective


def unary(loss: Callable[..., Array] = cross_entropy, *, subsample: int = 1, **options: Any) -> Loss:
    """A loss of the logits below a CRF, those of `model.unary`, as `models.Refined` has it.

    The arguments are those of `segmentation`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxcrf import models
        >>> model = models.create("small_fcn", 3, width=8, refine="convcrf", rngs=nnx.Rngs(0))
        >>> batch = {"image": jnp.zeros((1, 16, 24, 3)), "labels": jnp.zeros((1, 16, 24), int)}
        >>> unary()(model, batch).logits.shape
        (1, 16, 24, 3)
    """
    below = segmentation(loss, subsample=subsample, **options)

    def objective(model: Any, batch: Batch) -> Outcome:
        return below(model.unary, batch)

    return objective


def joint(*, auxiliary_weight: float = 1.0, subsample: int = 1, **options: Any) -> Loss:
    """The cross-entropy of the CRF's logits plus `auxiliary_weight` times that of the logits below it.

    Args:
        auxiliary_weight: of the second term.
        subsample: as in `segmentation`.
        **options: further arguments of `losses.cross_entropy`.

    Returns:
        A loss function for an `Update` of a model with `with_unary`, as `models.Refined`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxcrf import models
        >>> model = models.create("small_fcn", 3, width=8, refine="convcrf", rngs=nnx.Rngs(0))
        >>> batch = {"image": jnp.zeros((1, 16, 24, 3)), "labels": jnp.zeros((1, 16, 24), int)}
        >>> list(joint()(model, batch).figures)
        ['unary_loss']

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, §5.3.
    """

    def objective(model: Any, batch: Batch) -> Outcome:
        logits, below = model.with_unary(batch["image"])
        seen, labels = _sampled(logits, batch["labels"], subsample)
        auxiliary, _ = _sampled(below, batch["labels"], subsample)
        total = auxiliary_cross_entropy(seen, auxiliary, labels, auxiliary_weight=auxiliary_weight, **options)
        figures = {"unary_loss": cross_entropy(auxiliary, labels, **options)}
        return Outcome(total, logits, figures)

    return objective


def scores(
    loss: Callable[..., Array] = cross_entropy, *, part: Literal["unary"] | None = None, **options: Any
) -> Loss:
    """A loss of a network's scores on its own grid, where they cost less than logits of all pixels.

    Args:
        loss: a function of logits and labels, as those of `jaxcrf.training.losses`.
        part: "unary" for the network below a CRF; None for the whole model.
        **options: further arguments of `loss`, as `class_weights`.

    Returns:
        A loss function for an `Update` of a `models.network.Network`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxcrf import models
        >>> model = models.create("small_fcn", 3, width=8, rngs=nnx.Rngs(0))
        >>> batch = {"image": jnp.zeros((1, 16, 24, 3)), "labels": jnp.zeros((1, 16, 24), int)}
        >>> scores()(model, batch).loss.shape
        ()

    References:
        Chen et al., *Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs*, 2015, §3.1.
    """

    def objective(model: Any, batch: Batch) -> Outcome:
        network = model if part is None else getattr(model, part)
        labels = labels_at_cells(network, batch["labels"])
        return Outcome(loss(network.scores(batch["image"]), labels, **options))

    return objective


def labels_at_cells(network: Any, labels: Array) -> Array:
    """The labels of the pixels under the cells of a network's grid, `[*batch, rows, columns]`.

    Args:
        network: a `models.network.Network`.
        labels: `[*batch, H, W]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcrf.models.network import Network
        >>> labels_at_cells(Network(2, 3, stride=4), jnp.arange(10)[None])
        Array([[0, 4, 8]], dtype=int32)
    """
    rows, columns = (np.rint(network.places(n)).astype(int).clip(0, n - 1) for n in labels.shape[-2:])
    return labels[..., rows[:, None], columns]


def pairwise(
    *, num_pairs: int = 4096, scale: float = 10.0, competitors: Literal["any", "both"] = "any"
) -> Loss:
    """The loss of a Gaussian CRF's pairwise terms alone: the second of three phases.

    That of `losses.pairwise_embedding` for dense terms, and of `losses.pairwise_edges` for those along edges; of
    models with both their sum. The labels are those of the pixels under the cells of the model's grid.

    Args:
        num_pairs: how many pairs of an image's cells are compared, of the `P²` that there are. They are drawn once:
            what lies there changes with every crop.
        scale: of the energies in the loss. In the CRF, the energy of a pair is the pairwise term times both scores,
            which are not one and zero, as labels are, but as large as a network's logits; of terms that are to say
            enough by themselves, as with a scale of one, the CRF would make far too much.
        competitors: as in `losses.pairwise_embedding`.

    Returns:
        A loss function for an `Update` of a `models.gaussian_crf.GaussianCRFNetwork`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxcrf import models
        >>> options = {"embedding_size": 4, "width": 4, "depth": "res2a"}
        >>> model = models.create(
        ...     "small_fcn", 3, width=8, refine="gaussian_crf_potts", refine_options=options, rngs=nnx.Rngs(0)
        ... )
        >>> batch = {"image": jnp.zeros((1, 16, 24, 3)), "labels": jnp.zeros((1, 16, 24), int)}
        >>> pairwise()(model, batch).loss.shape
        ()

    References:
        Chandra, Usunier and Kokkinos, *Dense and Low-Rank Gaussian CRFs Using Deep Embeddings*, 2017, §4.
    """

    def objective(model: Any, batch: Batch) -> Outcome:
        labels = labels_at_cells(model, batch["labels"])
        pairs = random_pairs(jax.random.key(0), labels.shape[-2:], num_pairs)
        total: Any = 0
        for terms in model.affinities(batch["image"]):
            options: dict[str, Any] = {
                "kind": terms.kind,
                "num_labels": model.num_labels,
                "competitors": competitors,
            }
            if isinstance(terms, Gram):
                total += pairwise_embedding(math.sqrt(scale) * terms.embeddings, labels, pairs, **options)
            else:
                edges, connectivity = scale * terms.edges, terms.connectivity
                total += pairwise_edges(edges, labels, connectivity=connectivity, **options)
        return Outcome(total)

    return objective


def _sampled(logits: Array, labels: Array, factor: int) -> tuple[Array, Array]:
    if factor == 1:
        return logits, labels
    return logits[..., ::factor, ::factor, :], subsample_labels(labels, factor)
