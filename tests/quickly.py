"""How programs are compiled in a fraction of the time, without optimisations: nearly all of a test is compilation."""

import contextlib
import functools

import jax

# Emitters whose code LLVM is done with in half the time, and one piece of work instead of many small ones.
OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


@functools.cache
def options():
    """Those of the options above that this version of XLA has."""
    known = {}
    for name, value in OPTIONS.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
            known[name] = value
    return known


def flags():
    """The same for the XLA_FLAGS of another process."""
    return [f"--{name}={str(value).lower()}" for name, value in options().items()]
