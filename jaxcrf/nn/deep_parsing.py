"""The Deep Parsing Network's smoothness terms as a layer: triple penalties and mixtures of label contexts, learned."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Shaped

from jaxcrf import _checks
from jaxcrf.filters.resampling import average_pool, bilinear_upsample
from jaxcrf.inference.deep_parsing import (
    CLIP,
    DeepParsingParams,
    DeepParsingResult,
    deep_parsing_init,
    deep_parsing_step,
    initial_weights,
)
from jaxcrf.inference.local_convolution import read_window

Inputs = Literal["logits", "log_probs"]


class DeepParsing(nnx.Module):
    r"""Updates logits against an image as the last four layers of the Deep Parsing Network do, b12 to b15.

    See `jaxcrf.deep_parsing_step`: triple penalties `s = a T[p] + b`, convolutions of them with `K` contexts per label,
    the least penalty of a label's contexts, and `log p` minus it. What is learned:

    - `color_weight` and `position_weight`: `ω₁` and `ω₂` as multiples of what `jaxcrf.deep_parsing_init` gives them,
      which is of the order of 1e-9; both begin at 1. They may change their sign.
    - `scale` and `offset`: `a` and `b`.
    - `contexts` and `context_offset`: `μ` and `c`.

    Contexts begin as noise around the identity: each penalises a label by its own triple penalty at the same pixel,
    times `own_penalty`. The layer then is the unary with triple penalties, which is what the paper trains first; its
    four stages are those of one model, with other patterns of trainable parameters: `unary/*`; `crf/*_weight`;
    `crf/context*`; all.

    With `reduction`, penalties are computed on cells of that many pixels along both axes, of mean colours and
    probabilities, and interpolated linearly in between; a reduction of 2 costs a quarter, and a window or context
    reaches twice as far in the image.

    Args:
        num_labels: `L`.
        num_contexts: `K`, the mixture's components per label.
        context_size: the side of the contexts in cells, odd.
        window: the size of the triple penalty's window in cells, one number or height and width.
        multiply_center: as in `jaxcrf.triple_penalty`.
        num_iterations: how many updates; it may be set, as by `model.set_attributes(num_iterations=3)`.
        reduction: pixels per cell along both axes; 1 in the paper.
        inputs: "logits", for any network, whose soft-max are the probabilities `p`; or "log_probs", their logarithms
            themselves, which need not sum to one: log-sigmoids, as of the paper's network.
        own_penalty: see above; 0 for contexts that begin as noise only.
        deviation: the standard deviation of the noise. Without any, the contexts of a label would stay alike.
        rngs: where the noise comes from.

    Attributes:
        num_labels: `L`.
        num_iterations: of the update.

    Raises:
        ValueError: if a number is out of its range, or `inputs` are unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = DeepParsing(3, num_contexts=2, context_size=3, window=9, rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((2, 8, 9, 3)), jnp.zeros((2, 8, 9, 3))).shape
        (2, 8, 9, 3)
        >>> layer.contexts.shape, float(layer.color_weight[...])
        ((3, 3, 3, 3, 2), 1.0)

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, §3.2 and §3.3.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        num_contexts: int = 5,
        context_size: int = 9,
        window: int | Sequence[int] = 50,
        multiply_center: bool = True,
        num_iterations: int = 1,
        reduction: int = 1,
        inputs: Inputs = "logits",
        own_penalty: float = 1.0,
        deviation: float = 0.01,
        rngs: nnx.Rngs,
    ):
        initial = deep_parsing_init(
            rngs.params(),
            num_labels,
            num_contexts=num_contexts,
            context_size=context_size,
            window=window,
            deviation=deviation,
        )
        for name, value in (("num_iterations", num_iterations), ("reduction", reduction)):
            if not _checks.is_whole(value) or value < 1:
                raise ValueError(f"{name}: got {value!r}; expected a whole number >= 1")
        if not math.isfinite(own_penalty):
            raise ValueError(f"own_penalty: got {own_penalty}; expected a finite number")
        if inputs not in get_args(Inputs):
            raise ValueError(f"inputs: got {inputs!r}; expected one of {', '.join(get_args(Inputs))}")
        self.num_labels = int(num_labels)
        self.num_iterations = int(num_iterations)
        self._window = read_window(window)
        self._multiply_center = bool(multiply_center)
        self._reduction = int(reduction)
        self._inputs = inputs
        self.color_weight = nnx.Param(jnp.ones_like(initial.color_weight))
        self.position_weight = nnx.Param(jnp.ones_like(initial.position_weight))
        self.scale = nnx.Param(initial.scale)
        self.offset = nnx.Param(initial.offset)
        center = context_size // 2
        own = own_penalty * jnp.eye(self.num_labels)[..., None]
        self.contexts = nnx.Param(initial.contexts.at[center, center].add(own))
        self.context_offset = nnx.Param(initial.context_offset)

    @property
    def params(self) -> DeepParsingParams:
        """What `jaxcrf.deep_parsing_step` takes, with `ω₁` and `ω₂` themselves."""
        color, position = initial_weights(self._window)
        return DeepParsingParams(
            color_weight=color * self.color_weight[...],
            position_weight=position * self.position_weight[...],
            scale=self.scale[...],
            offset=self.offset[...],
            contexts=self.contexts[...],
            context_offset=self.context_offset[...],
        )

    def infer(
        self,
        images: Shaped[Array, "*batch height width channels"],
        logits: Float[Array, "*batch height width labels"],
    ) -> DeepParsingResult:
        """Probabilities, logits, triple penalties and the least penalties.

        Args:
            images: `[*batch, H, W, channels]`, 0 to 255.
            logits: the unary, `[*batch, H, W, L]`.

        Returns:
            `DeepParsingResult(probs, logits, triple, penalty)`, at least float32, all at every pixel.

        Raises:
            ValueError: if shapes disagree with each other or the number of labels, or concrete arrays hold NaN.
        """
        _checks.check_layer_inputs(images, logits, self.num_labels)
        size = jnp.shape(logits)[-3:-1]
        unary, pixels = _checks.as_float(logits), _checks.as_float(images)
        _checks.check_finite("logits", unary)
        probs = jnp.exp(unary) if self._inputs == "log_probs" else jax.nn.softmax(unary)
        result = deep_parsing_step(
            average_pool(probs, self._reduction, size),
            average_pool(pixels, self._reduction, size),
            self.params,
            window=self._window,
            multiply_center=self._multiply_center,
            num_iterations=self.num_iterations,
        )
        if self._reduction == 1:
            return result
        triple, penalty = (
            bilinear_upsample(x, self._reduction, size) for x in (result.triple, result.penalty)
        )
        updated = jnp.log(jnp.maximum(probs, CLIP)) - penalty
        return DeepParsingResult(jax.nn.softmax(updated), updated, triple, penalty)

    def __call__(
        self,
        images: Shaped[Array, "*batch height width channels"],
        logits: Float[Array, "*batch height width labels"],
    ) -> Float[Array, "*batch height width labels"]:
        """The updated logits, whose soft-max are the probabilities."""
        return self.infer(images, logits).logits
