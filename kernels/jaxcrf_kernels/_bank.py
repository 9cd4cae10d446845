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


def differentiable(forward: Callable[..., Array], backward: Callable[..., Any]) -> Callable[..., Array]:
    """Makes one function of a message's forward and backward passes.

    Args:
        forward: of the static configuration, `q`, `features`, `weights`, `left` and `right`.
        backward: of the configuration, `Needs`, the same operands and the cotangent; the gradients.

    Returns:
        The function, of the arguments of `forward`. Operands that vary over different axes of a mesh may meet.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def message(config: Any, *operands: Any) -> Array:
        return forward(config, *operands)

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
    return backward(config, needs, *operands, cotangent)


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _any_perturbed(tree: Any) -> bool:
    return any(x.perturbed for x in jax.tree.leaves(tree, is_leaf=_is_primal))
