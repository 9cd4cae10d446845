"""The mean-field update of the Deep Parsing Network: triple penalties, label contexts, the best of a mixture."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Shaped

from jaxcrf import _checks
from jaxcrf.inference.local_convolution import read_maps, read_window
from jaxcrf.inference.triple_penalty import Method, triple_penalty

# The smallest probability that is believed, as in `unary_from_probs`.
CLIP = 1e-5


class DeepParsingParams(NamedTuple):
    """What `deep_parsing_step` learns; a pytree of arrays.

    Attributes:
        color_weight: `ω₁`, one number, of squared differences of colours.
        position_weight: `ω₂`, one number, of squared distances in pixels.
        scale: `a` of the linear activation `a x + b` of the triple penalties, one number.
        offset: `b`, one number.
        contexts: `μ`, `[size, size, labels, labels, contexts]`, size odd: the penalty of the label of the fourth axis
            at a pixel for the label of the third at the neighbour of the first two (rows, columns; the centre in the
            middle), in each context.
        context_offset: `c`, `[labels, contexts]`, what each context costs in any case; the bias of a convolution.
    """

    color_weight: Float[Array, ""]
    position_weight: Float[Array, ""]
    scale: Float[Array, ""]
    offset: Float[Array, ""]
    contexts: Float[Array, "size size labels labels contexts"]
    context_offset: Float[Array, "labels contexts"]


class DeepParsingResult(NamedTuple):
    """The update and what led to it, of the last iteration where there are several.

    Attributes:
        probs: `[*batch, height, width, labels]`, summing to one over the labels; the paper's b15.
        logits: `probs = softmax(logits)`.
        triple: the activated triple penalties, b12.
        penalty: of the context that penalises a label least, b14.
    """

    probs: Float[Array, "*batch height width labels"]
    logits: Float[Array, "*batch height width labels"]
    triple: Float[Array, "*batch height width labels"]
    penalty: Float[Array, "*batch height width labels"]


def deep_parsing_init(
    key: Array,
    num_labels: int,
    *,
    num_contexts: int = 5,
    context_size: int = 9,
    window: int | Sequence[int] = 50,
    deviation: float = 0.01,
    dtype: Any = jnp.float32,
) -> DeepParsingParams:
    """Makes parameters to start learning from.

    The weights are such that the triple penalties of an image in 0 … 255 are of the order of one: colours and positions
    count alike, and the largest distance in a window, summed over it, is about one. Contexts are random around zero.

    Args:
        key: a random key.
        num_labels: `L`.
        num_contexts: `K`, the mixture's components per label.
        context_size: the side of the contexts in pixels, odd.
        window: that of the triple penalty.
        deviation: the standard deviation of the contexts.
        dtype: of the parameters.

    Returns:
        The parameters.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> import jax, jaxcrf
        >>> params = jaxcrf.deep_parsing_init(jax.random.key(0), 21)
        >>> params.contexts.shape, params.context_offset.shape
        ((9, 9, 21, 21, 5), (21, 5))

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, Table 1 (b) and §3.3.
    """
    num_labels = _checks.check_num_labels(num_labels)
    color_weight, position_weight = initial_weights(window)
    if not _checks.is_whole(num_contexts) or num_contexts < 1:
        raise ValueError(f"num_contexts: got {num_contexts!r}; expected a whole number >= 1")
    if not _checks.is_whole(context_size) or context_size < 1 or context_size % 2 == 0:
        raise ValueError(
            f"context_size: got {context_size!r}; expected an odd number >= 1 (contexts have a centre)"
        )
    if not deviation >= 0:
        raise ValueError(f"deviation: got {deviation}; expected a standard deviation >= 0")
    shape = (context_size, context_size, num_labels, num_labels, num_contexts)
    return DeepParsingParams(
        color_weight=jnp.asarray(color_weight, dtype),
        position_weight=jnp.asarray(position_weight, dtype),
        scale=jnp.ones((), dtype),
        offset=jnp.zeros((), dtype),
        contexts=deviation * jax.random.normal(key, shape, dtype),
        context_offset=jnp.zeros((num_labels, num_contexts), dtype),
    )


def initial_weights(window: int | Sequence[int]) -> tuple[float, float]:
    """`ω₁` and `ω₂` at which colours and positions count alike, and the penalties of a window are at most about one.

    Example:
        >>> [f"{weight:.1e}" for weight in initial_weights(50)]
        ['1.0e-09', '1.6e-07']
    """
    height, width = read_window(window)
    pixels = height * width
    return 0.5 / (3 * 255**2 * pixels), 0.5 / (((height / 2) ** 2 + (width / 2) ** 2) * pixels)


def deep_parsing_step(
    probs: Float[Array, "*batch height width labels"],
    image: Shaped[Array, "*batch height width channels"],
    params: DeepParsingParams,
    *,
    window: int | Sequence[int] = 50,
    multiply_center: bool = True,
    num_iterations: int = 1,
    method: Method = "box",
    precision: Any = None,
) -> DeepParsingResult:
    r"""Updates any model's probabilities by the pairwise terms of the Deep Parsing Network.

    With `p` the model's probabilities, `q = p` at first, and `T` the `triple_penalty` of weights `ω₁` and `ω₂`,

    .. math::
        s_j(v) &= a\, T[q]_j(v) + b \qquad \text{(b12)} \\
        t_{i,k}(u) &= c_k(u) + \sum_{j \in M_i} \sum_v \mu_k(j - i, v, u)\, s_j(v) \qquad \text{(b13)} \\
        q_i(u) &\leftarrow \operatorname{softmax}_u \bigl( \log p_i(u) - \min_k t_{i,k}(u) \bigr)
            \qquad \text{(b14, b15)} .

    Pixels outside the image penalise nothing. Contexts of one pixel and one component make this the mean-field update
    of a CRF with the label compatibility `μ` (eq. 10). The paper takes one step, and learns the model through it.

    Differentiable once, in reverse mode, in `probs`, `image` and `params`; where contexts tie for the least penalty,
    they share the gradient. Several iterations are recomputed one by one in the backward pass.

    Args:
        probs: `p`, `[*batch, height, width, labels]`, >= 0; sigmoids, which do not sum to one, are fine. Below 1e-5
            they count as 1e-5 under the logarithm.
        image: `[*batch, height, width, channels]`, in the units of `1 / √ω₁`; or without channels. Batch axes
            broadcast.
        params: see `DeepParsingParams`; `deep_parsing_init` makes them.
        window: the size of the triple penalty's window, see there.
        multiply_center: as in `triple_penalty`. Eq. 10 drops the factor `p_j(v)` between its two lines: True is the
            first, False the second, the ordinary update.
        num_iterations: how many updates, at least one. `p` under the logarithm stays what it was.
        method: of `triple_penalty`.
        precision: of the convolution with the contexts, a `jax.lax.Precision` or its name; None is jax's default,
            which on recent NVIDIA GPUs is TensorFloat-32.

    Returns:
        `DeepParsingResult(probs, logits, triple, penalty)`, float32 or float64.

    Raises:
        TypeError: if `params` are something else.
        ValueError: if shapes disagree, concrete arrays hold NaN or negative probabilities, or an option is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, jaxcrf
        >>> image = jnp.zeros((4, 6, 3)).at[:, 3:].set(255.0)
        >>> probs = jnp.full((4, 6, 2), 0.5).at[:, 0].set(jnp.array([0.9, 0.1]))
        >>> params = jaxcrf.deep_parsing_init(jax.random.key(0), 2, window=5)
        >>> result = jax.jit(jaxcrf.deep_parsing_step, static_argnames="window")(
        ...     probs, image, params, window=5
        ... )
        >>> result.probs.shape
        (4, 6, 2)

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, eq. 7 to 10, figures 3 and 6 (b).
    """
    if not isinstance(params, DeepParsingParams):
        raise TypeError(
            f"params: got {type(params).__name__}; expected DeepParsingParams, e.g. of deep_parsing_init"
        )
    if not _checks.is_whole(num_iterations) or num_iterations < 1:
        raise ValueError(f"num_iterations: got {num_iterations!r}; expected a whole number >= 1")
    maps = read_maps(probs)
    if _checks.is_concrete(maps):
        with jax.ensure_compile_time_eval():
            low = float(maps.min())
        if low < 0:
            raise ValueError(
                f"probs: hold negative values (smallest {low:.4g}); pass probabilities, e.g. jax.nn.softmax(logits)"
            )
    contexts, context_offset = _read_contexts(params, maps.shape[-1])
    scale, offset = (_read_number(name, getattr(params, name)) for name in ("scale", "offset"))

    def update(q: Array) -> DeepParsingResult:
        triple = triple_penalty(
            q,
            image,
            window=window,
            color_weight=params.color_weight,
            position_weight=params.position_weight,
            multiply_center=multiply_center,
            method=method,
        )
        triple = scale * triple + offset
        penalty = _least_penalty(triple, contexts, context_offset, precision)
        logits = unary - penalty
        return DeepParsingResult(jax.nn.softmax(logits, axis=-1), logits, triple, penalty)

    unary = jnp.log(jnp.maximum(maps, CLIP))
    if num_iterations == 1:
        return update(maps)
    # Only probabilities are handed on, so that only they are stored; the first update gives them the image's batch.
    q, _ = lax.scan(
        jax.checkpoint(lambda q, _: (update(q).probs, None)),
        update(maps).probs,
        None,
        length=num_iterations - 2,
    )
    return update(q)


def _read_number(name: str, value: Any) -> Array:
    number = _checks.as_float(value)
    if number.ndim:
        raise ValueError(f"params.{name}: got shape {number.shape}; expected one number")
    _checks.check_finite(f"params.{name}", number)
    return number


def _read_contexts(params: DeepParsingParams, num_labels: int) -> tuple[Array, Array]:
    contexts, offset = _checks.as_float(params.contexts), _checks.as_float(params.context_offset)
    shape = contexts.shape
    if (
        len(shape) != 5
        or shape[2:4] != (num_labels, num_labels)
        or any(n % 2 == 0 for n in shape[:2])
        or shape[4] < 1
    ):
        raise ValueError(
            f"params.contexts: got shape {shape}; expected (size, size, {num_labels}, {num_labels}, contexts) with "
            f"an odd size, for probs of {num_labels} labels"
        )
    if offset.shape != (num_labels, shape[4]):
        raise ValueError(
            f"params.context_offset: got shape {offset.shape}; expected {(num_labels, shape[4])}, labels and contexts"
        )
    _checks.check_finite("params.contexts", contexts)
    _checks.check_finite("params.context_offset", offset)
    return contexts, offset


# Compiled here, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnames="precision")
def _least_penalty(triple: Array, contexts: Array, context_offset: Array, precision: Any) -> Array:
    """b13 and b14: contexts as one convolution, and the smallest over the contexts of a label."""
    dtype = jnp.promote_types(triple.dtype, contexts.dtype)
    labels, mixture = context_offset.shape
    batch = triple.shape[:-3]
    penalties = lax.conv_general_dilated(
        triple.reshape(math.prod(batch), *triple.shape[-3:]).astype(dtype),
        contexts.reshape(*contexts.shape[:3], labels * mixture).astype(dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
    penalties = penalties.reshape(*triple.shape, mixture) + context_offset.astype(dtype)
    return penalties.min(-1)
