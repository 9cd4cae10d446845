"""Every implementation of every message on Pallas' interpreter, and how one of them is chosen.

What a GPU or TPU would run is compared with float64 sums on any machine; that it is what would run there is
seen from the lowered text, in `test_lowering.py`.
"""

import contextlib
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxcrf_kernels._bank import Needs
from jaxcrf_kernels._dispatch import interpreted
from jaxcrf_kernels.window_message.reference import WindowConfig
from message_suite import MESSAGES, assert_within_rounding

pytestmark = pytest.mark.kernels

# Interpreters that take seconds for a case get the few that differ most.
FEW_CASES = {
    "mosaic_gpu": (
        "plain",
        "one_pixel",
        "many_labels",
        "merged_scaled",
        "batch_shared",
        "bfloat16_merged",
    )
}
# Whatever an implementation may leave out, it does these; the core suite runs no others, and fewest of those few.
LEAST_CASES = ("plain", "many_labels", "one_pixel", "merged_scaled", "batch", "batch_shared", "bfloat16")
FEWEST_CASES = ("plain", "merged_scaled")

IMPLEMENTATIONS = [
    pytest.param(message, name, id=f"{message.name}-{name}")
    for message in MESSAGES.values()
    for name in message.operation.implementations[1:]
]
INTERPRETED = [
    pytest.param(*one.values, id=one.id, marks=pytest.mark.exhaustive if one.values[1] in FEW_CASES else [])
    for one in IMPLEMENTATIONS
]
CASES = [
    pytest.param(
        message,
        name,
        case,
        id=f"{message.name}-{name}-{case.name}",
        marks=[]
        if case.name in (FEWEST_CASES if name in FEW_CASES else LEAST_CASES)
        else pytest.mark.exhaustive,
    )
    for message in MESSAGES.values()
    for name in message.operation.implementations[1:]
    for case in message.cases.CASES
    if name not in FEW_CASES or case.name in FEW_CASES[name]
]
every_implementation = pytest.mark.parametrize(("message", "implementation"), IMPLEMENTATIONS)
interpreted_implementation = pytest.mark.parametrize(("message", "implementation"), INTERPRETED)
every_case = pytest.mark.parametrize(("message", "implementation", "case"), CASES)


@pytest.fixture
def reasons(monkeypatch):
    """What the implementations called say that they do not support, None included."""
    found = []
    for message in MESSAGES.values():
        for name in message.operation.implementations[1:]:
            module = message.operation.module(name)

            def record(*arguments, unsupported=module.unsupported):
                found.append(unsupported(*arguments))
                return found[-1]

            monkeypatch.setattr(module, "unsupported", record)
    return found


def value_and_gradients(message, implementation, case, arrays, cotangent):
    """Compiled afresh, so that no program of a device is taken for an interpreter's."""
    function = functools.partial(message._value_and_gradients, case, implementation=implementation)
    with interpreted():
        return jax.jit(function)(arrays, cotangent)


def refused(call):
    """What an implementation answers if it does not support a call, else None."""
    try:
        jax.eval_shape(call)
    except NotImplementedError as error:
        return str(error)
    return None


def assert_close(found, expected):
    """Compares the same sums of some dozens of terms in another order."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), found, expected)


class TestInterpreted:
    @every_case
    def test_value_and_gradients_are_the_float64_sums(self, message, implementation, case, reasons):
        arrays, cotangent = message.cases.operands(case), message.draw_cotangent(case)
        call = functools.partial(value_and_gradients, message, implementation, case, arrays, cotangent)
        refusal = refused(call)
        (reason,) = set(reasons)
        if reason is not None:
            assert case.name not in LEAST_CASES
            assert f"'{implementation}' of {message.name} does not take {reason}" in refusal
            return
        assert refusal is None
        value, gradients = call()
        message.assert_value(case, value, arrays)
        message.assert_gradients(case, gradients, arrays, cotangent)

    @interpreted_implementation
    def test_float32_stays_float32_where_x64_is_on(self, message, implementation):
        case = message.by_name["merged_scaled"]
        arrays, cotangent = message.cases.operands(case), message.draw_cotangent(case)
        arrays = arrays._replace(right=None)  # and one scale needs no other
        with jax.enable_x64(True):
            value, gradients = value_and_gradients(message, implementation, case, arrays, cotangent)
        message.assert_value(case, value, arrays)
        message.assert_gradients(case, gradients, arrays, cotangent)

    @interpreted_implementation
    def test_float16_is_stored_only(self, message, implementation):
        case = message.by_name["batch_shared"]._replace(dtype="float16")
        arrays, cotangent = message.cases.operands(case), message.draw_cotangent(case)
        arrays = arrays._replace(left=None)
        value, gradients = value_and_gradients(message, implementation, case, arrays, cotangent)
        message.assert_value(case, value, arrays)
        message.assert_gradients(case, gradients, arrays, cotangent)

    @interpreted_implementation
    def test_vmap_is_a_loop(self, message, implementation):
        case, mapped = message.by_name["merged_scaled"], ("q", "weights", "left")
        cotangent, fields = message.draw_cotangent(case), message.cases.Operands
        first, second = (message.cases.operands(case, seed) for seed in range(2))
        some = [first, first._replace(**{name: getattr(second, name) for name in mapped})]
        axes = fields(*[0 if name in mapped else None for name in fields._fields])
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *some)
        arguments = first._replace(**{name: getattr(stacked, name) for name in mapped})

        def call(*arrays):
            return value_and_gradients(message, implementation, case, fields(*arrays), cotangent)

        found = jax.jit(jax.vmap(call, tuple(axes)))(*arguments)
        expected = [message.value_and_gradients(case, one, cotangent, implementation="xla") for one in some]
        assert_close(found, jax.tree.map(lambda *xs: np.stack(xs), *expected))

    @interpreted_implementation
    @pytest.mark.parametrize("asked", ["q", "features", "weights left", "right"])
    def test_gradients_of_some_operands_are_those_of_all(self, message, implementation, asked):
        case, names = message.by_name["batch_shared"], asked.split()
        arrays, cotangent = message.cases.operands(case), message.draw_cotangent(case)
        _, expected = message.value_and_gradients(case, arrays, cotangent, implementation="xla")

        @jax.jit
        def some_gradients(*chosen):
            def value(*chosen):
                given = arrays._replace(**dict(zip(names, chosen, strict=True)))
                return message.value(case, given, implementation=implementation)

            return jax.vjp(value, *chosen)[1](jnp.asarray(cotangent))

        with interpreted():
            found = some_gradients(*[getattr(arrays, name) for name in names])
        assert_close(found, tuple(getattr(expected, name) for name in names))


@pytest.mark.parametrize(
    ("name", "changes", "tiles"),
    [
        ("merged_scaled", {}, (3, 16, 2)),
        ("batch_shared", {"filter_size": (7, 3)}, (4, 16, 3)),
        ("volume_batch", {"spatial": (2, 5, 7), "filter_size": (3, 3, 3)}, (2, 32, 1)),
        ("positions_only", {"filter_size": 1}, (1, 16, 2)),
        ("wide_line", {"spatial": (37,)}, (1, 16, 2)),
        ("plain", {"filter_size": (3, 5)}, (3, 16, 2)),
    ],
)
def test_tiles_of_the_triton_kernel_do_not_matter(name, changes, tiles):
    from jaxcrf_kernels.window_message import triton_gpu

    message = MESSAGES["window_message"]
    case = message.by_name[name]._replace(**changes)
    tiles = triton_gpu.Tiles(*tiles)
    arrays, cotangent = message.cases.operands(case), message.draw_cotangent(case)
    config = WindowConfig(case.window, case.position_bandwidths or (None,) * len(case.feature_sizes))
    needs = Needs(False, True, True, case.scaled, case.scaled)
    message.assert_value(case, triton_gpu._forward(config, tiles, True, arrays), arrays)
    found = triton_gpu._backward(config, needs, tiles, True, arrays, cotangent)
    assert set(found) == {operand for operand, needed in needs._asdict().items() if needed}
    exact = functools.partial(message.exact_vjp, **arrays._asdict(), **case.static, cotangent=cotangent)
    expected, magnitude, depths = exact(), exact(magnitude=True), message.depths(case)
    for operand, gradient in found.items():
        for g, w, s in zip(
            *map(jax.tree.leaves, (gradient, getattr(expected, operand), getattr(magnitude, operand))),
            strict=True,
        ):
            assert_within_rounding(g, w, s, getattr(depths, operand))


def device(kind, platform="cuda"):
    """A context in which this process lowers for a device that it does not have."""
    abstract = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract))


def only_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("this machine has an accelerator")


def small(message):
    case = message.by_name["plain"]
    return case, message.cases.operands(case)


@every_implementation
def test_an_explicit_choice_that_cannot_run_says_what_would(message, implementation):
    only_a_cpu()
    backend = message.operation.backends[implementation]
    expected = f"'{implementation}' needs a {backend.platform} device, and this process has cpu; .* 'xla'"
    with pytest.raises(NotImplementedError, match=expected):
        message.value(*small(message), implementation=implementation)
    with pytest.raises(NotImplementedError, match=expected):
        message.api.select_implementation(implementation)


@every_implementation
def test_an_old_gpu_gets_what_it_can_run(message, implementation):
    backend = message.operation.backends[implementation]
    if backend.platform != "cuda":
        pytest.skip("not for GPUs")
    assert backend.capability > (7, 5)
    with device("Tesla T4"):
        assert message.api.select_implementation() == "xla"
        with pytest.raises(NotImplementedError, match=r"compute capability \d+.0, and this device has 7.5"):
            message.api.select_implementation(implementation)
    with device("NVIDIA B200"):
        assert message.api.select_implementation(implementation) == implementation


@every_implementation
def test_nothing_is_computed_in_float32_that_is_float64(message, implementation):
    case, arrays = small(message)
    with jax.enable_x64(True), interpreted():
        arrays = jax.tree.map(lambda x: x.astype(np.float64), arrays)
        with pytest.raises(NotImplementedError, match=r"does not take .*float64.* pass None or 'xla'"):
            message.value(case, arrays, implementation=implementation)
        assert message.value(case, arrays).dtype == jnp.float64


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_unknown_names_are_refused(message):
    for context in (contextlib.nullcontext(), interpreted(), device("NVIDIA H200")):
        with context, pytest.raises(ValueError, match=r"got 'cuda', which .* does not have; .*'xla'"):
            message.value(*small(message), implementation="cuda")


@every_implementation
def test_the_interpreter_is_never_chosen_silently(message, implementation, monkeypatch):
    module = message.operation.module(implementation)
    asked = []

    def forward(config, operands, *, interpret=False):
        asked.append(interpret)
        return jnp.zeros_like(operands.q)

    monkeypatch.setattr(module, "forward", forward)
    case, arrays = small(message)
    run = functools.partial(message.value, case, arrays)
    with interpreted():
        run(implementation=implementation)
        assert asked == [True]
        run()  # the best for this machine, which is no interpreter
        run(implementation="xla")
    kinds = {"cuda": "NVIDIA H200", "tpu": "TPU v5 lite"}
    platform = message.operation.backends[implementation].platform
    with device(kinds[platform], platform):
        jax.jit(lambda: run(implementation=implementation)).trace()
    native = [interpret for interpret in asked[1:] if interpret]
    assert not native
    assert len(asked) >= 2


CPU = """
import sys
import jax, jax.numpy as jnp
from jaxcrf_kernels import pair_message, window_message

assert jax.default_backend() == "cpu"
def total(q, **options):
    features = jnp.zeros((*q.shape[:-1], 2))
    message = window_message if options else pair_message
    return message(q, [features], jnp.ones(1), **options).sum()

for call in (total, jax.jit(jax.grad(total))):
    call(jnp.ones((1, 6, 2)))
for call in (lambda q: total(q, filter_size=3), jax.jit(jax.grad(lambda q: total(q, filter_size=3)))):
    call(jnp.ones((1, 4, 5, 2)))
kernels = ("jax.experimental.pallas", "jax._src.pallas", "jax.experimental.mosaic")
ours = ("mosaic_gpu", "triton_gpu", "tpu")
print([m for m in sys.modules if m.startswith(kernels) or m.startswith("jaxcrf_kernels") and m.endswith(ours)])
"""


def test_users_of_a_cpu_load_no_kernels(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", CPU],
        capture_output=True,
        text=True,
        check=False,
        env={"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(tmp_path)},
    )
    assert result.stdout.strip() == "[]", result.stderr[-2000:]
