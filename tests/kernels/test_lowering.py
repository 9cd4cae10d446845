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
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

import jaxcrf_kernels
from jaxcrf_kernels._platform import by_platform, has_accelerator
from jaxcrf_kernels.pair_message import cases as pair_cases
from jaxcrf_kernels.pair_message import reference as pair_reference
from jaxcrf_kernels.window_message import cases as window_cases
from jaxcrf_kernels.window_message.reference import WindowConfig

pytestmark = pytest.mark.kernels

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

    @property
    def operation(self) -> Any:
        return self.package.api.OPERATION


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


def custom_calls(text):
    return [call for call in CUSTOM_CALLS if call in text]


def supports(name, case, platform, implementation):
    """Whether an implementation takes a case; where not, it has to say so, and what."""
    if implementation == "xla":
        return True
    reasons = []
    module = PRIMITIVES[name].operation.module(implementation)
    with pytest.MonkeyPatch.context() as patch:
        unsupported = module.unsupported
        patch.setattr(module, "unsupported", lambda *call: reasons.append(unsupported(*call)) or reasons[-1])
        try:
            lowered(name, case, platform, "value", implementation)
        except NotImplementedError as error:
            answer = str(error)
        else:
            return True
    (reason,) = reasons
    assert f"implementation: '{implementation}' of {name} does not take {reason}" in answer
    return False


@pytest.mark.parametrize("platform", ["cpu", *DEVICES])
@both_directions
@every_case
def test_what_is_asked_for_is_what_is_lowered(name, case, direction, platform):
    here = [n for n in PRIMITIVES[name].package.IMPLEMENTATIONS if platform in BACKENDS[n].platforms]
    assert "xla" in here
    taken = [implementation for implementation in here if supports(name, case, platform, implementation)]
    for implementation in taken:
        expected = BACKENDS[implementation].custom_call
        text = lowered(name, case, platform, direction, implementation)
        assert custom_calls(text) == [expected] * (expected is not None)
    # Without a choice, it is the first that takes the case, in the order of the operation; the last resort is XLA.
    best = [*(implementation for implementation in taken if implementation != "xla"), "xla"][0]
    expected = BACKENDS[best].custom_call
    text = lowered(name, case, platform, direction)
    assert custom_calls(text) == [expected] * (expected is not None)


@accelerators
@pytest.mark.parametrize("name", PRIMITIVES)
def test_the_choice_is_named(name, platform):
    operation = PRIMITIVES[name].operation
    usable = [n for n, backend in operation.backends.items() if backend.platform == platform]
    with device(platform):
        assert operation.select() == [*usable, "xla"][0]
        for implementation in operation.implementations:
            if implementation in ("xla", *usable):
                assert operation.select(implementation) == implementation
            else:
                other = operation.backends[implementation].platform
                with pytest.raises(NotImplementedError, match=f"'{implementation}' needs a {other} device"):
                    operation.select(implementation)


@accelerators
@pytest.mark.parametrize("name", PRIMITIVES)
def test_kernels_are_lowered_where_a_batch_is_split_over_devices(name, platform):
    primitive = PRIMITIVES[name]
    case = next(c for c in primitive.cases.CASES if c.name == "batch_shared")
    arrays = primitive.cases.operands(case)
    mesh = AbstractMesh((case.batch,), ("x",), axis_types=(AxisType.Auto,), abstract_device=DEVICES[platform])
    specs = jax.tree.map(
        lambda x: PartitionSpec("x") if x.shape[0] == case.batch and x.ndim > 1 else PartitionSpec(),
        tuple(arrays),
    )

    def value(*operands):
        given = primitive.cases.Operands(*operands)._asdict() | case.static
        return primitive.function(**given, implementation=implementation)

    for implementation in (None, *primitive.operation.implementations):
        backend = BACKENDS[implementation or primitive.operation.implementations[0]]
        if platform not in backend.platforms:
            continue
        with use_abstract_mesh(mesh):
            split = jax.shard_map(value, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("x"))
            gradients = jax.grad(lambda *xs, split=split: split(*xs).sum(), argnums=tuple(range(5)))
            for function in (split, gradients):
                text = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
                if implementation is not None:
                    expected = backend.custom_call
                    assert custom_calls(text) == [expected] * (expected is not None)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_lowering_finds_what_interpreting_passes():
    triton_gpu = PRIMITIVES["window_message"].operation.module("triton")
    case = window_cases.CASES[0]
    config = WindowConfig(case.window, (None,))
    arrays = window_cases.operands(case)

    def run(interpret, *arrays):
        return triton_gpu._forward(
            config, triton_gpu.Tiles(1, 48, 3), interpret, window_cases.Operands(*arrays)
        )

    jax.jit(functools.partial(run, True)).lower(*arrays).compile()
    with device("cuda"), pytest.raises(ValueError, match="power of 2"):
        jax.jit(functools.partial(run, False)).trace(*arrays).lower(lowering_platforms=("cuda",))


@accelerators
@both_directions
@every_window
def test_accelerators_walk_whole_maps(case, direction, platform):
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
