"""Every entry of the registry with small options, and what the tests of all of them compute once."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

from jaxcrf import models
from jaxcrf.models import ModelConfig
from jaxcrf.models.parameters import is_key, named_leaves, split
from jaxcrf.training.losses import cross_entropy

NUM_LABELS = 3
STEPS = 30
# Larger than the strides and no multiple of any of them.
SIZE = (35, 41)

_VGG = {"width": 4, "hidden_channels": 16}
_NORMALIZED_VGG = _VGG | {"norm": True}
_RESNET = {"width": 4, "blocks": [1, 1, 1, 1]}
_DEEPLAB_V2 = _RESNET | {"scales": [1.0, 0.5], "rates": [1, 2]}
_GAUSSIAN_CRF = {
    "width": 4,
    "blocks": [1, 1],
    "scales": [1.0],
    "rates": [1],
    "crf_options": {"width": 4, "depth": "res2a", "embedding_size": 4},
}

# Options that make entries small; a new entry gets a line here.
SMALL: dict[str, dict[str, Any]] = {
    "small_fcn": {"width": 8, "blocks": [1, 0, 1]},
    "vgg16_fcn": _NORMALIZED_VGG,
    "resnet50_fcn": _RESNET,
    "resnet101_fcn": _RESNET,
    "deeplab": _VGG,
    "deeplab_4x4": _NORMALIZED_VGG,
    "deeplab_7x7": _VGG,
    "deeplab_largefov": _VGG,
    "deeplab_msc": _VGG | {"branch_channels": 4},
    "deeplab_msc_largefov": _VGG | {"branch_channels": 4},
    "deeplab_v2": _DEEPLAB_V2,
    "deep_parsing_unary": _NORMALIZED_VGG,
    "convcrf": {
        "width": 4,
        "blocks": [1, 1],
        "crf_options": {"num_iterations": 1, "trainable_compatibility": True},
    },
    "crf_as_rnn": _NORMALIZED_VGG | {"crf_options": {"num_iterations": 1}},
    "deep_parsing_network": _NORMALIZED_VGG
    | {"crf_options": {"window": 6, "context_size": 3, "num_contexts": 2}},
    "gaussian_crf": _GAUSSIAN_CRF,
    "gaussian_crf_potts": _GAUSSIAN_CRF,
    "n_renet": {"width": 8, "multipliers": [1, 2]},
    "h_renet": _VGG
    | {"recurrent_channels": 8, "sources": ["pool4", "pool5", "conv7"], "normalization": "batch"},
    "h_renet_baseline": _VGG,
}


# The taps of `fc6` lie 2 and 6, 4 and 12 cells away from its place there, beyond the border of small images.
EXAMPLE_SIZES = {"deeplab": (48, 48), "deeplab_4x4": (72, 72)}


class Member:
    """An entry of the registry, made once; every program on it is compiled once."""

    def __init__(self, name: str):
        self.name = name
        if name not in SMALL:
            raise KeyError(
                f"{name}: is in the registry but not in SMALL; add a line with options that make it tiny"
            )

    @functools.cache  # noqa: B019  (a member lives as long as its module of tests)
    def abstract(self, **options: Any) -> Any:
        """A model that is never made, of which there are only shapes."""
        return self.config(**options).create_abstract()

    def config(self, **options: Any) -> ModelConfig:
        return ModelConfig.of(self.name, NUM_LABELS, **(SMALL[self.name] | options))

    @functools.cached_property
    def model(self) -> nnx.Module:
        return self.config().create(nnx.Rngs(0))

    @functools.cached_property
    def parts(self) -> tuple[Any, Any, Any]:
        """As `split` makes them."""
        return split(self.model)

    def run(self, images: Any, *, dtype: str | None = None) -> Any:
        """Logits in evaluation mode, maybe in another arithmetic with the same parameters."""
        definition, params, variables = self.parts
        if dtype is not None:
            definition, *_ = split(self.abstract(dtype=dtype))
        model = nnx.merge(definition, params, variables, copy=True)
        model.eval()
        return model(images)

    def traced(self, *images: Any, **options: Any) -> list[Any]:
        """Shapes and dtypes of the logits of images."""
        definition, *arrays = split(self.abstract(**options))

        def forward(*arrays: Any) -> Any:
            model: Any = nnx.merge(definition, *arrays)
            model.eval()
            return [model(x) for x in images]

        return jax.eval_shape(forward, *arrays)

    @functools.cached_property
    def logits(self) -> dict[str, Any]:
        """Of two images, whole and in half precision, and of a corner, by one program."""
        images = draw_images()
        # Made here, not while the program is traced.
        _ = self.parts

        @jax.jit
        def outputs(images: Any) -> dict[str, Any]:
            return {
                "batch": self.run(images),
                "half": self.run(images, dtype="bfloat16"),
                "corner": self.run(images[0, :5, :3]),
            }

        return outputs(images)

    @functools.cached_property
    def training(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Losses of steps on one image, and by path the largest gradient of every step."""
        image, labels = draw_example(EXAMPLE_SIZES.get(self.name, (24, 32)))
        definition, params, variables = self.parts
        optimizer = optax.adam(1e-2)

        # As one vector, on which an optimiser compiles many times as fast as on fifty arrays.
        vector, unravel = ravel_pytree(params)

        def loss(vector: Any, variables: Any) -> tuple[Any, Any]:
            model: Any = nnx.merge(definition, unravel(vector), variables, copy=True)
            model.train()
            model.set_attributes(nnx.Dropout, deterministic=True, raise_if_not_found=False)
            found = cross_entropy(model(image[None]), labels[None])
            return found, split(model)[2]

        def step(carry: Any, _: Any) -> Any:
            vector, variables, state = carry
            (found, variables), gradient = jax.value_and_grad(loss, has_aux=True)(vector, variables)
            updates, state = optimizer.update(gradient, state, vector)
            return (optax.apply_updates(vector, updates), variables, state), (found, gradient)

        @jax.jit
        def steps(vector: Any, variables: Any) -> Any:
            return jax.lax.scan(step, (vector, variables, optimizer.init(vector)), length=STEPS)[1]

        losses, gradients = (np.asarray(values) for values in steps(vector, variables))
        leaves = named_leaves(params)
        ends = np.cumsum([leaf.size for leaf in leaves.values()])[:-1]
        pieces = np.split(np.abs(gradients), ends, axis=1)
        return losses, {path: piece.max(1) for path, piece in zip(leaves, pieces, strict=True)}


def draw_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3)).astype(np.uint8)


def draw_example(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An image of three flat regions with some noise, and their labels; a corner is void."""
    height, width = size
    labels = np.zeros(size, np.int32)
    labels[:, width // 2 :] = 1
    labels[2 * height // 3 :] = 2
    noise = np.random.default_rng(0).normal(0, 10, (*size, 3))
    image = np.clip(np.array([[40, 80, 200], [200, 60, 60], [120, 200, 90]])[labels] + noise, 0, 255)
    labels[:4, :4] = 255
    return image.astype(np.float32), labels


def num_parameters(model: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def with_numbers(make: Callable[[], nnx.Module]) -> Any:
    """A network whose every number is drawn, the same for networks with the same parameters; compiles nothing."""
    definition, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if is_key(leaf):  # of dropout, which is off
            return jax.random.key(0)
        if len(leaf.shape) < 2:  # biases, normalisation
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        scale = math.sqrt(2 / math.prod(leaf.shape[:-1]))
        return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

    model = nnx.merge(definition, jax.tree.map(draw, state))
    model.eval()
    return model


def missing() -> list[str]:
    """Entries without small options."""
    return [name for name in models.names() if name not in SMALL]
