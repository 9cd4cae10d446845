"""The public PyTorch ConvCRF's configuration dictionary, with its results.

Its conventions differ from this package's in four ways, all reproduced here: the first iteration filters
log-probabilities instead of probabilities, the update weighs unary and message as
`(w_u - w) log p + w m`, kernel weights are called compatibilities, and the last soft-max is optional.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxcrf import _checks
from jaxcrf._checks import Normalization
from jaxcrf.features import bilateral_features, position_features
from jaxcrf.filters import Filter, Window
from jaxcrf.inference.mean_field import mean_field

# The reference's own `default_conf`.
DEFAULT_CONFIG: dict[str, Any] = {
    "filter_size": 11,
    "blur": 4,
    "merge": True,
    "norm": "none",
    "weight": "vector",
    "unary_weight": 1,
    "weight_init": 0.2,
    "trainable": False,
    "convcomp": False,
    "logsoftmax": True,
    "softmax": True,
    "final_softmax": False,
    "pos_feats": {"sdims": 3, "compat": 3},
    "col_feats": {"sdims": 80, "schan": 13, "compat": 10, "use_bias": False},
    "trainable_bias": False,
    "pyinn": False,
}

# Keys about training or about how the reference computes; they do not change its results.
_WITHOUT_EFFECT = {"trainable", "trainable_bias", "pyinn", "skip_init_softmax"}


def run(
    unary: Float[Array, "*batch height width labels"],
    image: Shaped[Array, "*batch height width channels"],
    conf: Mapping[str, Any] | None = None,
    num_iterations: int = 5,
) -> Float[Array, "*batch height width labels"]:
    """Runs the reference's inference with one of its configuration dictionaries.

    Args:
        unary: log-probabilities or scores `[*batch, H, W, labels]`; probabilities if the configuration has
            `logsoftmax` off. Channels last, where the reference has them first.
        image: `[*batch, H, W, channels]` in 0 to 255.
        conf: the dictionary; keys left out are as in `DEFAULT_CONFIG`.
        num_iterations: mean-field iterations.

    Returns:
        What the reference returns, channels last: probabilities if `final_softmax` is on, otherwise the
        scores of the last update.

    Raises:
        ValueError: on unknown keys, on merged kernels with a normalisation (which the reference does not
            have either), or on shapes that disagree.

    Example:
        >>> import jax.numpy as jnp
        >>> run(jnp.zeros((8, 8, 2)), jnp.zeros((8, 8, 3)), {"filter_size": 5, "final_softmax": True})[0, 0]
        Array([0.5, 0.5], dtype=float32)

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, and its code.
    """
    if conf is not None and not isinstance(conf, Mapping):
        raise TypeError(f"conf: got {type(conf).__name__}; expected the reference's configuration dictionary")
    conf = dict(conf or {})
    unknown = sorted(set(conf) - set(DEFAULT_CONFIG) - _WITHOUT_EFFECT)
    if unknown:
        raise ValueError(
            f"conf: unknown keys {', '.join(unknown)}; known ones are {', '.join(DEFAULT_CONFIG)}"
        )
    conf = DEFAULT_CONFIG | conf
    unary, image = jnp.asarray(unary), _checks.as_float(image)
    if not jnp.issubdtype(unary.dtype, jnp.floating):
        raise ValueError(f"unary: got dtype {unary.dtype}; expected floating-point scores or probabilities")
    _checks.check_finite("unary", unary)
    if conf["weight"] not in ("vector", "scalar", "none", None):
        raise ValueError(f"conf: weight is {conf['weight']!r}; the reference has 'vector', 'scalar' and None")
    for key, needed in (
        ("pos_feats", ("sdims", "compat")),
        ("col_feats", ("sdims", "schan", "compat", "use_bias")),
    ):
        missing = [] if conf[key] is None else [k for k in needed if k not in conf[key]]
        if missing:
            raise ValueError(f"conf: {key} lacks {', '.join(missing)}")
    if unary.ndim < 3 or image.ndim < 3 or unary.shape[-3:-1] != image.shape[-3:-1]:
        raise ValueError(
            f"unary, image: got shapes {unary.shape} and {image.shape}; expected [*batch, H, W, labels] and "
            "[*batch, H, W, channels] of one size (channels last)"
        )
    if conf["merge"] and conf["norm"] not in ("none", None):
        raise ValueError("conf: merged kernels cannot be normalised in the reference; set 'merge' to False")
    logits = jax.nn.log_softmax(unary, axis=-1) if conf["logsoftmax"] else jnp.log(unary)
    k = _build_filter(image, conf)

    share = 1.0 if conf["weight"] in (None, "none") else float(conf["weight_init"])
    unary_weight = 1.0 if conf["weight"] in (None, "none") else float(conf["unary_weight"]) - share
    labels = unary.shape[-1]
    compatibility: Any = share
    if conf["convcomp"]:
        # The reference adds a 1×1 convolution of constant initial weight to the message.
        compatibility = -share * (jnp.eye(labels) + 0.1 * math.sqrt(2.0 / labels))
    if not conf["softmax"]:
        return _without_softmax(
            logits, k, unary_weight, compatibility, num_iterations, bool(conf["logsoftmax"])
        )
    result = mean_field(
        logits,
        [(k, compatibility)],
        num_iterations=num_iterations,
        unary_weight=unary_weight,
        initial="logits" if conf["logsoftmax"] else "probs",
    )
    return result.probs if conf["final_softmax"] else result.logits


def _build_filter(image: Array, conf: Mapping[str, Any]) -> Filter:
    spatial = image.shape[-3:-1]
    features, weights = [], []
    if conf["pos_feats"] is not None:
        features.append(position_features(spatial, conf["pos_feats"]["sdims"]))
        weights.append(float(conf["pos_feats"]["compat"]))
    if conf["col_feats"] is not None:
        colour = conf["col_feats"]
        positions = colour["sdims"] if colour["use_bias"] else None
        features.append(bilateral_features(image, positions, colour["schan"]))
        weights.append(float(colour["compat"]))
    k = Window(tuple(features), conf["filter_size"], weights=jnp.array(weights), blur=conf["blur"])
    kinds: dict[str | None, Normalization] = {None: "none", "none": "none", "sym": "symmetric"}
    kind = kinds.get(conf["norm"])
    if kind is None:
        raise ValueError(f"conf: norm is {conf['norm']!r}; the reference has 'none' and 'sym'")
    return k.normalized(kind)


def _without_softmax(
    logits: Array,
    k: Filter,
    unary_weight: float,
    compatibility: Any,
    num_iterations: int,
    filter_logits: bool,
) -> Array:
    """The reference with `softmax` off: a linear recursion of scores."""
    from jaxcrf.compatibility import as_compatibility, reward

    weights = as_compatibility(compatibility, logits.shape[-1])
    scores = logits if filter_logits else jax.nn.softmax(logits, axis=-1)
    for _ in range(num_iterations):
        scores = unary_weight * logits + reward(k(scores), weights)
    return scores
