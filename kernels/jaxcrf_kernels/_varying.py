"""What loops and kernels need under `shard_map`: carries and results that say over which mesh axes they vary."""

from typing import Any

import jax
from jax import lax


def varying_like(tree: Any, *operands: Any) -> Any:
    """Makes every leaf vary over the mesh axes that any leaf of the operands varies over.

    Outside `shard_map` this does nothing. Inside, constants and replicated arrays (kernel weights, say) are
    marked as varying before they meet sharded ones; the transpose of the mark is the sum over the axes, so
    that gradients of replicated arrays come out summed.
    """
    leaves = jax.tree.leaves(operands)
    axes = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))

    def mark(leaf: Any) -> Any:
        missing = tuple(axes - jax.typeof(leaf).manual_axis_type.varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def result_like(shape: tuple[int, ...], dtype: Any, *operands: Any) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which varies over the mesh axes that any leaf of the operands varies over.

    What `pl.pallas_call` computes is opaque, so that inside `shard_map` its results must say this themselves.
    """
    kinds = [jax.typeof(leaf).manual_axis_type for leaf in jax.tree.leaves(operands)]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kinds[0].update(varying=varying))
