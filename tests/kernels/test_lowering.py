"""Lowers every case for accelerators that this machine does not have.

Lowering finds what interpreting a kernel passes (tile sizes, index arithmetic, missing rules), and its text
says which code a device would run.
"""

import contextlib
import functools
import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from jaxcrf_kernels import window_message
from jaxcrf_kernels._platform import by_platform, has_accelerator
from jaxcrf_kernels.window_message import IMPLEMENTATIONS, select_implementation
from jaxcrf_kernels.window_message.cases import CASES, FULL_SIZE_CASES, Operands, operands

DEVICES = {
    "cuda": AbstractDevice(device_kind="NVIDIA H200", num_cores=1, platform="cuda"),
    "tpu": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
}


class Backend(NamedTuple):
    """Where an implementation runs and how the lowered text names it; no call means plain XLA."""

    platforms: tuple[str, ...]
    custom_call: str | None


BACKENDS = {
    "xla": Backend(("cpu", "cuda", "tpu"), None),
    "triton": Backend(("cuda",), "__gpu$xla.gpu.triton"),
    "mosaic_gpu": Backend(("cuda",), "mosaic_gpu"),
    "tpu": Backend(("tpu",), "tpu_custom_call"),
}
CUSTOM_CALLS = [backend.custom_call for backend in BACKENDS.values() if backend.custom_call]


def device(platform):
    """A context in which this process lowers for `platform`."""
    if platform == "cpu":
        return contextlib.nullcontext()
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=DEVICES[platform])
    return use_abstract_mesh(mesh)


@functools.cache
def lowered(case, platform, direction, implementation=None):
    """The StableHLO text of one case."""

    def value(*arrays):
        return window_message(**Operands(*arrays)._asdict(), **case.static, implementation=implementation)

    def gradients(cotangent, *arrays):
        return jax.vjp(value, *arrays)[1](cotangent)

    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands(case))
    function, arguments = {"value": (value, arrays), "gradients": (gradients, (arrays.q, *arrays))}[direction]
    with device(platform):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def trip_counts(text):
    """How often each loop runs, in no particular order: older versions of JAX outline the bodies."""
    counts = [int(n) for n in re.findall(r"cond \{\s*%\w+ = stablehlo\.constant dense<(\d+)>", text)]
    assert len(counts) == text.count("stablehlo.while"), "a loop whose trip count is not a constant"
    return Counter(counts)


def assert_loops(text, maps, case):
    """Asserts that every pass over the window is one loop over `maps` and one over the offsets."""
    counts = trip_counts(text)
    passes = counts.total() // 2
    assert passes
    assert counts == Counter({maps: passes}) + Counter({case.offsets: passes})


every_case = pytest.mark.parametrize("case", CASES + FULL_SIZE_CASES, ids=lambda case: case.name)
both_directions = pytest.mark.parametrize("direction", ["value", "gradients"])
accelerators = pytest.mark.parametrize("platform", DEVICES)


@accelerators
def test_the_abstract_device_is_seen(platform):
    before = has_accelerator()
    with device(platform):
        assert has_accelerator()
    assert has_accelerator() == before == (jax.default_backend() != "cpu")


def test_an_abstract_cpu_is_no_accelerator():
    if jax.default_backend() != "cpu":
        pytest.skip("this machine has an accelerator")
    cpu = AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=cpu)):
        assert not has_accelerator()


def test_the_accelerator_branch_is_not_traced_without_one():
    if jax.default_backend() != "cpu":
        pytest.skip("this machine has an accelerator")

    def refuse(x):
        raise AssertionError("traced for a CPU")

    jax.jit(lambda x: by_platform(x, cpu=lambda x: x + 1, accelerator=refuse)).lower(1.0)
    with device("cuda"), pytest.raises(AssertionError, match="traced for a CPU"):
        jax.jit(lambda x: by_platform(x, cpu=lambda x: x + 1, accelerator=refuse)).lower(1.0)


def test_every_implementation_has_a_backend():
    assert set(IMPLEMENTATIONS) <= set(BACKENDS)


@pytest.mark.parametrize(
    ("implementation", "platform"),
    [(name, platform) for name in IMPLEMENTATIONS for platform in BACKENDS[name].platforms],
)
@both_directions
@every_case
def test_an_explicit_implementation_is_what_is_lowered(case, direction, implementation, platform):
    text = lowered(case, platform, direction, implementation)
    expected = BACKENDS[implementation].custom_call
    assert [call for call in CUSTOM_CALLS if call in text] == [expected] * (expected is not None)


@accelerators
@both_directions
@every_case
def test_accelerators_walk_whole_maps(case, direction, platform):
    with device(platform):
        chosen = select_implementation()
    if chosen != "xla":
        pytest.skip(f"{platform} runs {chosen}")
    assert_loops(lowered(case, platform, direction, "xla"), case.batch, case)


@both_directions
@every_case
def test_cpus_walk_blocks_of_rows(case, direction):
    *leading, columns = case.spatial
    rows = case.batch * math.prod(leading)
    text = lowered(case, "cpu", direction, "xla")
    # Pieces of a row are short enough for the cache, and no shorter than that needs.
    pieces = {1} if columns <= 128 else set(range(math.ceil(columns / 128), math.ceil(columns / 64)))
    blocks = {rows * n for n in pieces} & set(trip_counts(text))
    assert len(blocks) == 1
    assert_loops(text, blocks.pop(), case)
