"""What a step of training does: which loss, on which parameters, by which optimiser."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import optax
from flax import nnx
from jax import Array

Batch: TypeAlias = Mapping[str, Any]


class Outcome(NamedTuple):
    """What a loss function returns.

    Attributes:
        loss: the scalar to be minimised, a mean over the pixels that count.
        logits: `[batch, H, W, labels]`, from which the running mIoU is taken; None for no such figure.
        figures: further scalars for the log.
    """

    loss: Array
    logits: Array | None = None
    figures: Mapping[str, Array] = {}


Loss: TypeAlias = Callable[[nnx.Module, Batch], Outcome]


@dataclasses.dataclass(frozen=True)
class Update:
    """One kind of update. Stages of a protocol that share one continue its optimiser's state.

    Parameters are named by their path in the model, as `backbone/layers/0/kernel`, and chosen by patterns
    of the shell: `*` stands for anything, slashes included, so that `crf/*` is everything inside `crf`.

    Attributes:
        name: what the log calls it.
        loss: a function of the model and a batch.
        optimizer: any Optax transformation; its schedules count the updates of this kind.
        trainable: patterns of the parameters that move. The others are not even differentiated.
        learning_rates: pattern → factor on the optimiser's step, as DeepLab's 10 for the last layer. Of several
            patterns that match a parameter the last one counts.
        evaluating: patterns of modules that run in evaluation mode, so that frozen layers neither drop features
            nor touch the statistics of their batch normalisation.

    Example:
        >>> from jaxcrf.training import losses
        >>> def cross_entropy(model, batch):
        ...     logits = model(batch["image"])
        ...     return Outcome(losses.cross_entropy(logits, batch["labels"]), logits)
        >>> Update("unary", cross_entropy, optax.adam(1e-3), learning_rates={"classifier/*": 10.0}).trainable
        ('*',)
    """

    name: str
    loss: Loss
    optimizer: optax.GradientTransformation
    trainable: tuple[str, ...] = ("*",)
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    evaluating: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("trainable", "evaluating"):
            if isinstance(getattr(self, name), str):
                raise TypeError(
                    f"{name}: got the string {getattr(self, name)!r}; expected a tuple of patterns"
                )

    def transformation(self) -> optax.GradientTransformation:
        """The optimiser with its step scaled as `learning_rates` says."""
        if not self.learning_rates:
            return self.optimizer
        return optax.chain(self.optimizer, scale_by_path(self.learning_rates))


def scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of parameters by a factor that depends on their path.

    Args:
        factors: pattern → factor; the last pattern that matches counts, and 1 where none does.

    Returns:
        The transformation; it belongs at the end of a chain, where it scales the learning rate.

    Raises:
        ValueError: at `init`, if a pattern matches no parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"body/kernel": jnp.ones(2), "head/kernel": jnp.ones(2)}
        >>> transformation = optax.chain(optax.sgd(0.5), scale_by_path({"head/*": 10.0}))
        >>> updates, _ = transformation.update(params, transformation.init(params), params)
        >>> updates["body/kernel"][0].item(), updates["head/kernel"][0].item()
        (-0.5, -5.0)
    """

    def init(params: Any) -> optax.EmptyState:
        for pattern in factors:
            select(params, (pattern,), "learning_rates")
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def factor(path: str) -> float:
            found = [value for pattern, value in factors.items() if fnmatch.fnmatchcase(path, pattern)]
            return found[-1] if found else 1.0

        return {path: factor(path) * value for path, value in updates.items()}, state

    return optax.GradientTransformation(init, update)


def select(
    paths: Iterable[str], patterns: Iterable[str], argument: str = "trainable", kind: str = "parameters"
) -> tuple[str, ...]:
    """The paths that match any of the patterns, in their order.

    Raises:
        ValueError: if a pattern matches nothing.

    Example:
        >>> select(["crf/weights", "unary/kernel", "unary/bias"], ("unary/*",))
        ('unary/kernel', 'unary/bias')
    """
    paths, patterns = tuple(paths), tuple(patterns)
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or paths[:3]
            raise ValueError(
                f"{argument}: got the pattern {pattern!r}, which matches none of the {len(paths)} {kind}, "
                f"such as {', '.join(near)}"
            )
    return tuple(path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns))
