"""Lowers every case for accelerators that this machine does not have.

Lowering finds what interpreting a kernel passes (tile sizes, index arithmetic, missing rules), and its text
says which code a device would run.
"""

import contextlib
import functools
import importlib
import math
import pkgutil
import re
from collections import Counter
from types import ModuleType
from typing import Any, NamedTuple

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import jaxcrf_kernels
from jaxcrf_kernels._platform import by_platform, has_accelerator
from jaxcrf_kernels.pair_message import cases as pair_cases
from jaxcrf_kernels.pair_message import reference as pair_reference
from jaxcrf_kernels.window_message import cases as window_cases

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


class Primitive(NamedTuple):
    """An operation of `jaxcrf_kernels`, named like its package, and its cases."""

    name: str
    cases: ModuleType

    @property
    def package(self) -> Any:
        return importlib.import_module(f"jaxcrf_kernels.{self.name}")

    @property
    def function(self) -> Any:
        return getattr(self.package, self.name)


PRIMITIVES = {
    "window_message": Primitive("window_message", window_cases),
    "pair_message": Primitive("pair_message", pair_cases),
}
CUSTOM_CALLS = [backend.custom_call for backend in BACKENDS.values() if backend.custom_call]


def device(platform):
    """A context in which this process lowers for `platform`."""
    if platform == "cpu":
        return contextlib.nullcontext()
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=DEVICES[platform])
    return use_abstract_mesh(mesh)


@functools.cache
def lowered(name, case, platform, direction, implementation=None):
    """The StableHLO text of one case of the primitive `name`."""
    primitive = PRIMITIVES[name]
    Operands, operands = primitive.cases.Operands, primitive.cases.operands

    def value(*arrays):
        given = Operands(*arrays)._asdict() | case.static
        return primitive.function(**given, implementation=implementation)

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


def all_cases(name):
    return [*PRIMITIVES[name].cases.CASES, *PRIMITIVES[name].cases.FULL_SIZE_CASES]


every_case = pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{case.name}") for name in PRIMITIVES for case in all_cases(name)],
)
every_window = pytest.mark.parametrize("case", all_cases("window_message"), ids=lambda case: case.name)
every_pair = pytest.mark.parametrize("case", all_cases("pair_message"), ids=lambda case: case.name)
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


def test_every_primitive_and_implementation_is_in_the_tables():
    packages = {module.name for module in pkgutil.iter_modules(jaxcrf_kernels.__path__) if module.ispkg}
    assert packages == set(PRIMITIVES)
    for primitive in PRIMITIVES.values():
        assert set(primitive.package.IMPLEMENTATIONS) <= set(BACKENDS)


@pytest.mark.parametrize("platform", ["cpu", *DEVICES])
@both_directions
@every_case
def test_an_explicit_implementation_is_what_is_lowered(name, case, direction, platform):
    here = [n for n in PRIMITIVES[name].package.IMPLEMENTATIONS if platform in BACKENDS[n].platforms]
    assert here
    for implementation in here:
        text = lowered(name, case, platform, direction, implementation)
        expected = BACKENDS[implementation].custom_call
        assert [call for call in CUSTOM_CALLS if call in text] == [expected] * (expected is not None)


def skip_unless_xla(name, platform):
    with device(platform):
        chosen = PRIMITIVES[name].package.select_implementation()
    if chosen != "xla":
        pytest.skip(f"{platform} runs {chosen}")


@accelerators
@both_directions
@every_window
def test_accelerators_walk_whole_maps(case, direction, platform):
    skip_unless_xla("window_message", platform)
    assert_loops(lowered("window_message", case, platform, direction, "xla"), case.batch, case)


@both_directions
@every_window
def test_cpus_walk_blocks_of_rows(case, direction):
    *leading, columns = case.spatial
    rows = case.batch * math.prod(leading)
    text = lowered("window_message", case, "cpu", direction, "xla")
    # Pieces of a row are short enough for the cache, and no shorter than that needs.
    pieces = {1} if columns <= 128 else set(range(math.ceil(columns / 128), math.ceil(columns / 64)))
    blocks = {rows * n for n in pieces} & set(trip_counts(text))
    assert len(blocks) == 1
    assert_loops(text, blocks.pop(), case)


def largest_tile(text):
    """The most elements that a square float matrix of the text has."""
    sizes = re.findall(r"tensor<(\d+)x(\d+)xf(?:32|64)>", text)
    return max(int(rows) * int(columns) for rows, columns in sizes if rows == columns)


@pytest.mark.parametrize("platform", ["cpu", *DEVICES])
@both_directions
@every_pair
def test_pairs_are_walked_tile_by_tile(case, direction, platform):
    if platform != "cpu":
        skip_unless_xla("pair_message", platform)
    text = lowered("pair_message", case, platform, direction, "xla")
    side = pair_reference.CPU_TILE if platform == "cpu" else pair_reference.ACCELERATOR_TILE
    expected = min(side, case.pixels) if case.cutoff is None else None
    tile = math.isqrt(largest_tile(text))
    assert tile <= side
    if expected is not None:
        # As few tiles as the limit allows, all of one size but for whole vectors.
        assert math.ceil(case.pixels / tile) == math.ceil(case.pixels / expected)
    # Products in full float32: a device's default may be TF32 or bfloat16.
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
