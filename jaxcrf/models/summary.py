"""What a model is and takes, without making it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcrf.models.network import Network, check_count
from jaxcrf.models.operations import count_operations
from jaxcrf.models.parameters import named_leaves, split
from jaxcrf.models.registry import ModelConfig


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summary` found; as a string a table.

    Attributes:
        name: of the model in the registry, or of its class.
        input_shape: of the images.
        output_shape: of the logits.
        parts: how many parameters every part of the model has, by name.
        parameters: how many there are.
        flops: operations of a forward pass for the whole batch, see `jaxcrf.models.operations.count_operations`.
        is_lower_bound: whether there may be more, in a solver that ends when it has converged.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parts: Mapping[str, int]
    parameters: int
    flops: int
    is_lower_bound: bool

    def __str__(self) -> str:
        digits = max(0, 2 - math.floor(math.log10(max(self.flops, 1) / 1e9)))
        least = "at least " if self.is_lower_bound else ""
        rows = [
            *((part, f"{count:,}") for part, count in self.parts.items()),
            ("parameters", f"{self.parameters:,}"),
            ("GFLOPs", f"{least}{self.flops / 1e9:,.{digits}f}"),
        ]
        widths = [max(len(row[k]) for row in rows) for k in range(2)]
        lines = [f"{part:<{widths[0]}}  {number:>{widths[1]}}" for part, number in rows]
        lines.insert(len(self.parts), "-" * len(lines[0]))
        shapes = (" × ".join(map(str, shape)) for shape in (self.input_shape, self.output_shape))
        return "\n".join([f"{self.name}: {' → '.join(shapes)}", *lines])


def summary(
    model: nnx.Module | ModelConfig, size: Sequence[int] = (321, 321), *, batch_size: int = 1
) -> Summary:
    """Counts the parameters of a model and the operations of a forward pass; nothing is computed.

    Args:
        model: a module, which may be abstract, or the configuration of one, of which no arrays are made.
        size: of the images, `(H, W)`.
        batch_size: how many there are.

    Returns:
        The figures, whose string is a table. Operations are those of convolutions, matrix products, factorisations
        and triangular solves, with two for a multiplication and an addition; the messages of windows and lattices are
        none of these.

    Raises:
        TypeError: if `model` is neither a module nor a configuration.
        ValueError: if sizes are not whole numbers of at least 1.

    Example:
        >>> print(summary(ModelConfig.of("deeplab_largefov", 21), size=(321, 321)))
        deeplab_largefov: 1 × 321 × 321 × 3 → 1 × 321 × 321 × 21
        backbone    14,714,688
        classifier      21,525
        fc6          4,719,616
        fc7          1,049,600
        ----------------------
        parameters  20,505,429
        GFLOPs             102
    """
    if isinstance(model, ModelConfig):
        model = model.create_abstract()
    elif not isinstance(model, nnx.Module):
        raise TypeError(
            f"model: got {model!r}; expected a module or a configuration, as ModelConfig.of('deeplab_largefov', 21)"
        )
    if len(size) != 2:
        raise ValueError(f"size: got {size!r}; expected (height, width)")
    for count in size:
        check_count("size", count)
    check_count("batch_size", batch_size)
    config = getattr(model, "config", None)
    shape = (batch_size, *size, _in_channels(model))
    definition, params, variables = split(model)

    def forward(params: nnx.State, variables: nnx.State, images: jax.Array) -> jax.Array:
        merged = nnx.merge(definition, params, variables)
        merged.eval()
        return merged(images)

    program = jax.make_jaxpr(forward)(params, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    parts: dict[str, int] = {}
    for path, leaf in named_leaves(params).items():
        part = _part(model, path)
        parts[part] = parts.get(part, 0) + leaf.size
    operations = count_operations(program)
    return Summary(
        name=type(model).__name__ if config is None else config.name,
        input_shape=shape,
        output_shape=program.out_avals[0].shape,
        parts=parts,
        parameters=sum(parts.values()),
        flops=operations.flops,
        is_lower_bound=operations.is_lower_bound,
    )


def _in_channels(model: nnx.Module) -> int:
    """The channels of a model's images: those of the first network in it; of others, 3 as usual."""
    networks = (module for _, module in nnx.iter_modules(model) if isinstance(module, Network))
    return getattr(next(networks, None), "in_channels", 3)


def _part(model: nnx.Module, path: str) -> str:
    """The first name of a path; of networks inside a model the second one too."""
    first, *rest = path.split("/")
    return f"{first}/{rest[0]}" if rest and isinstance(getattr(model, first), Network) else first
