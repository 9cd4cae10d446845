"""Which of the fully connected filters to use."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from jaxcrf.filters.arguments import read_features
from jaxcrf.filters.dense import Dense
from jaxcrf.filters.gaussian import GaussianFilter
from jaxcrf.filters.landmark import Landmark
from jaxcrf.filters.lattice import Lattice

Kind = Literal["dense", "lattice", "landmark"]
_FILTERS: dict[str, Callable[..., GaussianFilter]] = {
    "dense": Dense,
    "lattice": Lattice,
    "landmark": Landmark,
}

# Up to how many pixels all pairs are summed. On two CPU cores five iterations with 21 labels take 60 to 110 ms at
# 64×64, which nobody waits for, and 0.8 s at 96×128. For a GPU or TPU this is reasoned, not measured: at
# 256×256 an iteration is 0.2 TFLOP.
EXACT_PIXELS = {"cpu": 64 * 64, "accelerator": 256 * 256}


def select_filter(pixels: int, platform: str | None = None) -> Kind:
    """Names the filter that `fully_connected` takes by itself.

    All pairs are summed where that takes no time worth mentioning. Beyond, CPUs and GPUs take the
    permutohedral lattice, whose cost grows with the pixels alone; TPUs, which gather slowly and multiply
    matrices fast, take landmarks.

    Args:
        pixels: of one image.
        platform: "cpu", "gpu" or "tpu"; None is that of JAX's default device.

    Returns:
        "dense", "lattice" or "landmark".

    Example:
        >>> select_filter(32 * 32, "cpu"), select_filter(375 * 500, "cpu"), select_filter(375 * 500, "tpu")
        ('dense', 'lattice', 'landmark')
    """
    platform = jax.default_backend() if platform is None else platform
    if pixels <= EXACT_PIXELS["cpu" if platform == "cpu" else "accelerator"]:
        return "dense"
    return "landmark" if platform == "tpu" else "lattice"


def fully_connected(
    features: Any,
    *,
    kind: Kind | Literal["auto"] = "auto",
    weights: Any = 1.0,
    spatial_ndim: int = 2,
    **options: Any,
) -> GaussianFilter:
    r"""The fully connected Gaussian filter, evaluated as suits the image and the device.

    .. math::
        (K q)_i = \sum_m w_m \sum_j \exp(-\tfrac12 \lVert f_{mi} - f_{mj} \rVert^2)\, q_j

    Args:
        features: of one kernel `[*batch, *spatial, d]`, divided by the bandwidths, or a tuple.
        kind: `Dense`, `Lattice` or `Landmark`; "auto" takes what `select_filter` says.
        weights: one number for all kernels, or one per kernel.
        spatial_ndim: 2 for images, 3 for volumes.
        **options: of the filter, which then must be named.

    Returns:
        The filter.

    Raises:
        TypeError: if "auto" is given options, which not all filters have.
        ValueError: if the kind is unknown, or the filter refuses its arguments.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> f = jaxcrf.bilateral_features(jnp.zeros((6, 8, 3)), 80, 13)
        >>> type(jaxcrf.filters.fully_connected(f)).__name__
        'Dense'

    References:
        Krähenbühl and Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge
        Potentials*, 2011, eq. 3.
    """
    if kind != "auto" and kind not in _FILTERS:
        raise ValueError(f"kind: got {kind!r}; expected auto, {', '.join(get_args(Kind))}")
    if kind == "auto":
        if options:
            raise TypeError(
                f"{', '.join(options)}: options belong to one of the filters; name it, e.g. kind='lattice'"
            )
        shape = read_features(features, spatial_ndim)[0].values.shape[-1 - spatial_ndim : -1]
        kind = select_filter(math.prod(shape))
    return _FILTERS[kind](features, weights=weights, spatial_ndim=spatial_ndim, **options)
