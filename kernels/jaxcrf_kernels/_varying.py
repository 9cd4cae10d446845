"""What loops need under `shard_map`: a carry varies over the same mesh axes before and after its body."""

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
