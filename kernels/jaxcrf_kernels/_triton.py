"""How Pallas kernels are handed to Triton."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def triton_call(
    kernel: Callable[..., None],
    results: Any,
    *,
    name: str,
    grid: Sequence[int],
    num_warps: int,
    interpret: bool = False,
) -> Callable[..., Any]:
    """A kernel as a function of arrays, which it sees as references to the whole of each.

    Args:
        kernel: writes its last arguments, references to results, from the others, references to operands.
        results: the types of the results.
        name: of the kernel, for profiles.
        grid: how many programs along each of up to three axes, the first fastest.
        num_warps: of a program, 32 threads each.
        interpret: whether to run on Pallas' interpreter instead of a GPU.

    Returns:
        The function; operands may be trees of arrays, and the kernel gets such trees of references.
    """
    # Without products of matrices Triton has nothing to pipeline: further stages would only ask for memory.
    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=1)
    return pl.pallas_call(
        kernel, results, grid=tuple(grid), compiler_params=params, interpret=interpret, name=name
    )
