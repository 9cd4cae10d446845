"""How the benchmarks measure: lowering, compiling, running and memory apart, and the machine's own ceilings."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def measure(function: Callable[..., Any], *operands: Any, runs: int = 9) -> dict[str, float]:
    """Lowers, compiles and runs a function of arrays.

    Args:
        function: what is measured; jitted here.
        *operands: its arguments.
        runs: timed runs, after one that is not.

    Returns:
        `lower_s`, `compile_s`, `median_ms`, `min_ms` and `extra_mib`, the compiled program's own memory
        besides its operands and results.
    """
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*operands)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    analysis = compiled.memory_analysis()
    jax.block_until_ready(compiled(*operands))
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*operands))
        times.append(time.perf_counter() - begin)
    return {
        "lower_s": middle - start,
        "compile_s": end - middle,
        "median_ms": 1e3 * statistics.median(times),
        "min_ms": 1e3 * min(times),
        "extra_mib": analysis.temp_size_in_bytes / 2**20,
    }


def ceilings(size: int = 2048) -> dict[str, float]:
    """What this device reaches at best, in float32: multiply-adds, exponentials and bytes, each per second."""
    a = jnp.ones((size, size))
    x = jnp.linspace(-1.0, 0.0, 1 << 22)

    def product(a: jax.Array) -> jax.Array:
        return jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST)

    return {
        "multiply_adds_per_s": size**3 / (1e-3 * measure(product, a)["min_ms"]),
        "exponentials_per_s": x.size / (1e-3 * measure(jnp.exp, x)["min_ms"]),
        "bytes_per_s": 8 * x.size / (1e-3 * measure(lambda x: x + 1, x)["min_ms"]),
    }


def floors_ms(work: dict[str, float], ceiling: dict[str, float]) -> tuple[float, float]:
    """The times that the arithmetic and the memory traffic of the work take at the ceilings."""
    arithmetic = work["multiply_adds"] / ceiling["multiply_adds_per_s"]
    arithmetic += work["exponentials"] / ceiling["exponentials_per_s"]
    return 1e3 * arithmetic, 1e3 * work["bytes"] / ceiling["bytes_per_s"]


def floor_ms(work: dict[str, float], ceiling: dict[str, float]) -> float:
    """The time below which the work cannot be done: arithmetic, or memory traffic if that takes longer."""
    return max(floors_ms(work, ceiling))
