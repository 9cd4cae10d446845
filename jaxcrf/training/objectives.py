"""What a model is trained for: loss functions of a model and a batch, to be put into an `Update`."""

from collections.abc import Callable
from typing import Any

from jax import Array

from jaxcrf.training.losses import auxiliary_cross_entropy, cross_entropy, subsample_labels
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


def _sampled(logits: Array, labels: Array, factor: int) -> tuple[Array, Array]:
    if factor == 1:
        return logits, labels
    return logits[..., ::factor, ::factor, :], subsample_labels(labels, factor)
