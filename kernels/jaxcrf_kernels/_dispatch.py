"""Which code a message runs: the one that its caller names, or the best for the platform it is lowered for.

An implementation is a module with the reference's `forward(config, operands)` and `gradients(config, wanted, operands,
cotangent)`, which also take `interpret=True`, and with `unsupported(config, operands)`, which says in words what it
does not do with operands of such shapes and types, or None. It is imported when a call might run it, so that users of
a CPU never load what they have no use for.
"""

import contextlib
import contextvars
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax import Array, lax

from jaxcrf_kernels._bank import Needs, Operands, backward, differentiable

# The compute capability of devices that kernels are lowered for without being there.
_CAPABILITIES = {
    "V100": (7, 0),
    "T4": (7, 5),
    "A100": (8, 0),
    "L4": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "B200": (10, 0),
}

# JAX warns since 0.11 whenever a kernel takes Pallas' Triton route, while it is lowered: long after the kernel's
# caller has returned, so that no context manager round the call could catch it.
_DEPRECATION = "The Pallas Triton backend is deprecated"

_interpret = contextvars.ContextVar("interpret", default=False)


class Backend(NamedTuple):
    """Where an implementation other than the reference is found, and what it needs.

    Attributes:
        module: its full name.
        platform: "cuda" or "tpu".
        capability: the least compute capability of a CUDA device.
    """

    module: str
    platform: str
    capability: tuple[int, int] = (0, 0)

    def missing(self) -> str | None:
        """What this process lacks to run it, in words."""
        if self.platform not in platforms():
            return f"a {self.platform} device, and this process has {', '.join(sorted(platforms()))}"
        found = cuda_capability() if self.platform == "cuda" else None
        if found is not None and found < self.capability:
            wanted, has = (".".join(map(str, c)) for c in (self.capability, found))
            return f"compute capability {wanted}, and this device has {has}"
        return None


class Call(NamedTuple):
    """What is static about a call: which implementation, or None for the best, and its configuration."""

    implementation: str | None
    interpret: bool
    config: Any


class Operation:
    """A message that has several implementations.

    Args:
        name: of its public function.
        reference: the module in plain jnp, which runs everywhere and is called "xla".
        backends: the others by name. Where several could run, the first is taken.
    """

    def __init__(self, name: str, reference: ModuleType, backends: Mapping[str, Backend]):
        self.name = name
        self.implementations = ("xla", *backends)
        self.backends = backends
        self._reference = reference
        self._message = differentiable(self._forward, self._backward)

    def __call__(self, implementation: str | None, config: Any, operands: Operands) -> Array:
        """Runs a checked call; differentiable once, in reverse mode."""
        self.check(implementation)
        interpret = _interpret.get()
        if implementation not in (None, "xla"):
            reason = self.module(implementation).unsupported(config, operands)
            if reason is not None:
                raise NotImplementedError(
                    f"implementation: {implementation!r} of {self.name} does not take {reason}; pass None or 'xla'"
                )
        return self._message(Call(implementation, interpret, config), *operands)

    def check(self, implementation: str | None) -> None:
        """Raises unless an explicit choice exists and can run here."""
        if implementation is None:
            return
        if implementation not in self.implementations:
            raise ValueError(
                f"implementation: got {implementation!r}, which {self.name} does not have; "
                f"pass None or one of {', '.join(map(repr, self.implementations))}"
            )
        if implementation != "xla" and not _interpret.get():
            missing = self.backends[implementation].missing()
            if missing is not None:
                raise NotImplementedError(
                    f"implementation: {implementation!r} needs {missing}; pass None for the best that runs here, "
                    "or 'xla', which runs everywhere"
                )

    def select(self, implementation: str | None = None) -> str:
        """The explicit choice, checked, or what calls get on this machine unless their operands are exotic."""
        self.check(implementation)
        if implementation is not None:
            return implementation
        return self.runnable()[0]

    def runnable(self) -> list[str]:
        """What can run on this machine, the best first; the last is always "xla"."""
        return [*(name for name, backend in self.backends.items() if backend.missing() is None), "xla"]

    def module(self, implementation: str | None) -> ModuleType:
        """The code of an implementation, loaded when it is first asked for; None is the reference's."""
        if implementation is None or implementation == "xla":
            return self._reference
        return importlib.import_module(self.backends[implementation].module)

    def _forward(self, call: Call, operands: Operands) -> Array:
        def run(module: ModuleType, **options: Any) -> Callable[..., Array]:
            return lambda operands: module.forward(call.config, operands, **options)

        return self._run(call, run, operands)

    def _backward(self, call: Call, needs: Needs, operands: Operands, cotangent: Array) -> Operands:
        def run(module: ModuleType, **options: Any) -> Callable[..., Operands]:
            return lambda *arrays: backward(module, call.config, needs, *arrays, **options)

        return self._run(call, run, operands, cotangent)

    def _run(
        self, call: Call, run: Callable[..., Callable[..., Any]], operands: Operands, *more: Array
    ) -> Any:
        if call.implementation == "xla":
            return run(self._reference)(operands, *more)
        if call.implementation is not None:
            _silence_deprecation()
            options = {"interpret": True} if call.interpret else {}
            return run(self.module(call.implementation), **options)(operands, *more)
        branches: dict[str, Callable[..., Any]] = {}
        for name, backend in self.backends.items():
            if backend.platform in branches or backend.missing() is not None:
                continue
            module = self.module(name)
            if module.unsupported(call.config, operands) is None:
                branches[backend.platform] = run(module)
        if not branches:
            return run(self._reference)(operands, *more)
        _silence_deprecation()
        return lax.platform_dependent(operands, *more, default=run(self._reference), **branches)


def platforms() -> set[str]:
    """What this process can lower for: its backend, and the device that the ambient abstract mesh names."""
    backend = jax.default_backend()
    found = {"cuda" if backend == "gpu" else backend}
    device = _abstract_device()
    if device is not None:
        found.add(device.platform)
    return found


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the CUDA device that calls are lowered for, or None where nothing says it."""
    device = _abstract_device()
    if device is not None and device.platform == "cuda":
        known = [c for name, c in _CAPABILITIES.items() if name in device.device_kind]
        return known[0] if known else None
    if jax.default_backend() != "gpu":
        return None
    text = getattr(jax.devices()[0], "compute_capability", None)
    if text is None:
        return None
    major, _, minor = str(text).partition(".")
    return int(major), int(minor or 0)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs explicit choices of an implementation by Pallas' interpreter, wherever this is. For tests."""
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def _abstract_device() -> Any:
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return None if device is None or getattr(device, "platform", "cpu") == "cpu" else device


def _silence_deprecation() -> None:
    """Silences JAX's notice that Pallas' Triton route will go, and no other warning.

    Which routes there are is this package's business, not its user's. Called whenever a message with a kernel is
    traced, since test runners forget filters between tests.
    """
    known = any(
        action == "ignore" and getattr(message, "pattern", None) == _DEPRECATION
        for action, message, *_ in warnings.filters
    )
    if not known:
        warnings.filterwarnings("ignore", message=_DEPRECATION, category=DeprecationWarning)
