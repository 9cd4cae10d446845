"""What the tests of all messages share: an operation with its cases and oracle, and bounds on rounding."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import oracles


class Depths(NamedTuple):
    """Additions on the way to each result."""

    q: int
    features: int
    weights: int
    left: int
    right: int


def window_depths(case) -> Depths:
    """Offsets, then labels or pixels; a kernel value takes up to 16 more."""
    window = case.offsets * len(case.feature_sizes) + 16
    pair = case.offsets + case.labels + case.batch + 16
    return Depths(window, 2 * pair, pair + int(np.prod(case.spatial)), pair, pair)


def pair_depths(case) -> Depths:
    """Pixels, then labels or pixels; a kernel value takes up to 24 more."""
    kernels = len(case.feature_sizes)
    pair = case.pixels + case.labels * case.batch + 24
    return Depths(case.pixels + kernels + 24, 2 * pair, pair + case.pixels, pair, pair)


def assert_within_rounding(found, expected, magnitude, depth, unit=None):
    """Compares within the error bound of a sum: rounding unit x additions x sum of absolute terms."""
    found = np.asarray(found)
    unit = np.finfo(np.float32).eps if unit is None else unit
    bound = depth * unit * magnitude + np.finfo(np.float32).tiny
    if found.dtype in (jnp.bfloat16, jnp.float16):
        # Rounded once more, to be stored.
        bound = bound + float(jnp.finfo(found.dtype).eps) * np.abs(expected)
    error = np.abs(found.astype(np.float64) - expected)
    assert found.shape == expected.shape
    assert (error <= bound).all(), f"error {error.max():.3g}, {np.max(error / bound):.3g} times its bound"


class Message:
    """An operation of `jaxcrf_kernels`, named like its package, with its cases and its oracle."""

    def __init__(self, name: str, depths: Callable[[Any], Depths]):
        self.name = name
        self.depths = depths
        self.cases: ModuleType = importlib.import_module(f"jaxcrf_kernels.{name}.cases")
        self.api: ModuleType = importlib.import_module(f"jaxcrf_kernels.{name}.api")
        self.function = getattr(self.api, name)
        self.operation = self.api.OPERATION
        self.by_name = {case.name: case for case in self.cases.CASES}
        self.exact = getattr(oracles, name)
        self.exact_vjp = getattr(oracles, f"{name}_vjp")
        self.value_and_gradients = jax.jit(
            self._value_and_gradients, static_argnums=0, static_argnames="implementation"
        )

    def here(self) -> list[str]:
        """The implementations that this machine runs."""
        runs = []
        for name in self.operation.implementations:
            try:
                self.operation.check(name)
            except NotImplementedError:
                continue
            runs.append(name)
        return runs

    def value(self, case, arrays, **options):
        """The message of a case's operands."""
        return self.function(**arrays._asdict(), **case.static, **options)

    def _value_and_gradients(self, case, arrays, cotangent, **options):
        operands = type(arrays)
        value, pull = jax.vjp(lambda *xs: self.value(case, operands(*xs), **options), *arrays)
        return value, operands(*pull(cotangent))

    def draw_cotangent(self, case, seed=1):
        """An array like the message's."""
        return self.cases.operands(case, seed).q

    def assert_value(self, case, found, arrays, unit=None):
        """Compares a message with the float64 sum."""
        exact = functools.partial(self.exact, **arrays._asdict(), **case.static)
        assert found.dtype == arrays.q.dtype
        assert_within_rounding(found, exact(), exact(magnitude=True), self.depths(case).q, unit)

    def assert_gradients(self, case, found, arrays, cotangent, unit=None):
        """Compares all gradients with the float64 sums."""
        exact = functools.partial(self.exact_vjp, **arrays._asdict(), **case.static, cotangent=cotangent)
        expected, magnitude, depths = exact(), exact(magnitude=True), self.depths(case)
        for name in arrays._fields:
            operand, got, want = getattr(arrays, name), getattr(found, name), getattr(expected, name)
            assert jax.tree.structure(got) == jax.tree.structure(operand) == jax.tree.structure(want)
            for x, g, w, s in zip(
                *map(jax.tree.leaves, (operand, got, want, getattr(magnitude, name))), strict=True
            ):
                assert g.dtype == x.dtype, name
                assert_within_rounding(g, w, s, getattr(depths, name), unit)


MESSAGES = {
    "window_message": Message("window_message", window_depths),
    "pair_message": Message("pair_message", pair_depths),
}
