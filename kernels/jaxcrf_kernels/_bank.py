"""What the messages of a bank of Gaussian kernels share: their operands, the checks of these, and the VJP rule."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxcrf_kernels._varying import varying_like


@jax.tree_util.register_static
class Needs(NamedTuple):
    """Which operands the backward pass must find gradients for."""

    q: bool
    features: bool
    weights: bool
    left: bool
    right: bool


class Operands(NamedTuple):
    """The arrays that a message takes, by the names of its arguments.

    Attributes:
        q: the maps, `[batch, *pixels, labels]`.
        features: per kernel `[batch or 1, *pixels, d]`.
        weights: one per kernel.
        left: scales of the receiving pixel, `[batch or 1, *pixels, kernels]`, or None.
        right: scales of the sending pixel, likewise.
    """

    q: Any
    features: tuple[Any, ...]
    weights: Any
    left: Any
    right: Any


def accumulator_dtype(dtype: np.dtype) -> np.dtype:
    """Float32, or the operand's own type where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def check_bank(q: Array, features: Sequence[Array], weights: Array, left: Any, right: Any) -> None:
    """Raises unless maps `[batch, *pixels, labels]` and the operands of the kernels fit each other."""
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q: got dtype {q.dtype}; expected floating point. Cast it, e.g. q.astype('float32')."
        )
    batch, *pixels, _ = q.shape
    count = len(features)
    if count == 0:
        raise ValueError("features: got no kernel; pass at least one array, of zero features if need be")
    if weights.shape != (count,):
        raise ValueError(f"weights: got shape {weights.shape}; expected ({count},), one weight per kernel")

    def check(name: str, shape: tuple[int, ...], last: int | None) -> None:
        fits = len(shape) == q.ndim and shape[0] in (1, batch) and list(shape[1:-1]) == pixels
        if not fits or (last is not None and shape[-1] != last):
            expected = f"[{batch} or 1, {', '.join(map(str, pixels))}, {'d' if last is None else last}]"
            raise ValueError(f"{name}: got shape {shape}; expected {expected} to match q")

    for m, array in enumerate(features):
        check(f"features[{m}]", array.shape, None)
    for name, array in (("left", left), ("right", right)):
        if array is not None:
            check(name, np.shape(array), count)


def backward(
    implementation: Any, config: Any, needs: Needs, operands: Operands, cotangent: Array, **options: Any
) -> Operands:
    """Pulls a cotangent of a message back to its operands.

    Args:
        implementation: a module with `forward` and `gradients`.
        config: its configuration.
        needs: which gradients are wanted; the others come back as zeros.
        operands: as in `forward`.
        cotangent: the gradient with respect to the message, shaped like `q`.
        options: for the module's functions.

    Returns:
        Gradients in the order of the operands; None where the operand is None.
    """
    found = jax.tree.map(jnp.zeros_like, operands)
    streamed = needs._replace(q=False)
    if any(streamed):
        found = found._replace(**implementation.gradients(config, streamed, operands, cotangent, **options))
    if needs.q:
        # Every Gaussian is symmetric, and so is the window: the transpose only swaps the scales.
        transposed = operands._replace(
            q=cotangent.astype(operands.q.dtype), left=operands.right, right=operands.left
        )
        found = found._replace(q=implementation.forward(config, transposed, **options))
    return found


def like_operand(gradient: Array, operand: Array) -> Array:
    """A gradient `[batch, …]` of an operand that the whole batch may share, in the operand's type."""
    if operand.shape[0] == 1:
        gradient = gradient.sum(axis=0, keepdims=True)
    return gradient.astype(operand.dtype)


def differentiable(forward: Callable[..., Array], backward: Callable[..., Any]) -> Callable[..., Array]:
    """Makes one function of a message's forward and backward passes.

    Args:
        forward: of the static configuration and `Operands`.
        backward: of the configuration, `Needs`, the same operands and the cotangent; the gradients.

    Returns:
        The function, of the configuration and the operands one by one. These may vary over different axes of a mesh.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def message(config: Any, *operands: Any) -> Array:
        return forward(config, Operands(*operands))

    def remember(config: Any, *operands: Any) -> tuple[Array, Any]:
        needs = Needs(*map(_any_perturbed, operands))
        values = jax.tree.map(lambda x: x.value, operands, is_leaf=_is_primal)
        return message(config, *values), (needs, values)

    message.defvjp(remember, functools.partial(pull_back, backward), symbolic_zeros=True)
    return lambda config, *operands: message(config, *varying_like(operands, operands))


def pull_back(backward: Callable[..., Any], config: Any, residuals: Any, cotangent: Any) -> Any:
    """The gradients, which are zeros where the message is not used."""
    needs, operands = residuals
    if isinstance(cotangent, SymbolicZero):
        return jax.tree.map(jnp.zeros_like, operands)
    return tuple(backward(config, needs, Operands(*operands), cotangent))


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _any_perturbed(tree: Any) -> bool:
    return any(x.perturbed for x in jax.tree.leaves(tree, is_leaf=_is_primal))
