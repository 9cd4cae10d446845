"""Which code a call should lower to, decided when it is lowered rather than when it is traced."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def has_accelerator() -> bool:
    """Whether this process can lower for anything but a CPU.

    True where a GPU or TPU backend is present, or where the ambient abstract mesh names one, as it does
    when a kernel is lowered for a device that this machine does not have.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None and getattr(device, "platform", "cpu") != "cpu":
        return True
    return jax.default_backend() != "cpu"


def by_platform(*operands: Any, cpu: Callable[..., Any], accelerator: Callable[..., Any]) -> Any:
    """Calls `cpu(*operands)` or `accelerator(*operands)`, whichever platform the call is lowered for.

    `jax.lax.platform_dependent` traces every branch on every machine; the accelerator's branch is only
    offered to it where it could be taken.
    """
    if not has_accelerator():
        return cpu(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=accelerator)
