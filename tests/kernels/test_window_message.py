import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import SymbolicZero

import oracles
from jaxcrf_kernels import window_message
from jaxcrf_kernels._bank import Needs, backward, pull_back
from jaxcrf_kernels.window_message import IMPLEMENTATIONS, api, reference, select_implementation
from jaxcrf_kernels.window_message.cases import CASES, Case, Operands, operands
from message_suite import MESSAGES

BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
MESSAGE = MESSAGES["window_message"]
# The others are interpreted elsewhere.
every_implementation = pytest.mark.parametrize("implementation", MESSAGE.here())
message = MESSAGE.value
message_and_gradients = MESSAGE.value_and_gradients
draw_cotangent = MESSAGE.draw_cotangent
assert_value = MESSAGE.assert_value
assert_gradients = MESSAGE.assert_gradients


@pytest.mark.optimized
@every_implementation
@every_case
def test_value_and_gradients_are_the_float64_sums(case, implementation):
    arrays, cotangent = operands(case), draw_cotangent(case)
    value, gradients = message_and_gradients(case, arrays, cotangent, implementation=implementation)
    assert_value(case, value, arrays)
    assert_gradients(case, gradients, arrays, cotangent)


@pytest.mark.parametrize("name", ["merged_scaled", "batch_shared", "volume_batch"])
def test_the_oracle_gradients_are_its_finite_differences(name):
    case = BY_NAME[name]
    arrays = jax.tree.map(lambda x: x.astype(np.float64), operands(case))
    cotangent = draw_cotangent(case).astype(np.float64)
    exact = oracles.window_message_vjp(**arrays._asdict(), **case.static, cotangent=cotangent)
    generator = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: generator.normal(size=x.shape), arrays)
    # One operand at a time, or the largest gradient would hide the others.
    for operand in Operands._fields:

        def energy(step, name=operand):
            moved = jax.tree.map(lambda x, d: x + step * d, getattr(arrays, name), getattr(direction, name))
            value = oracles.window_message(**arrays._replace(**{name: moved})._asdict(), **case.static)
            return np.sum(cotangent * value)

        slope = (energy(1e-5) - energy(-1e-5)) / 2e-5
        products = jax.tree.map(
            lambda g, d: np.sum(g * d), getattr(exact, operand), getattr(direction, operand)
        )
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-7)


@pytest.mark.parametrize("name", ["merged_scaled", "batch_shared", "wide_line"])
def test_float64_stays_float64(name):
    case = BY_NAME[name]
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: x.astype(np.float64), operands(case))
        cotangent = draw_cotangent(case).astype(np.float64)
        value, gradients = message_and_gradients(case, arrays, cotangent)
        assert value.dtype == jnp.float64
        assert_value(case, value, arrays, np.finfo(np.float64).eps)
        assert_gradients(case, gradients, arrays, cotangent, np.finfo(np.float64).eps)


def test_float32_stays_float32_where_x64_is_on():
    case = BY_NAME["merged_scaled"]
    arrays, cotangent = operands(case), draw_cotangent(case)
    with jax.enable_x64(True):
        value, gradients = message_and_gradients(case, arrays, cotangent)
    assert_value(case, value, arrays)
    assert_gradients(case, gradients, arrays, cotangent)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["merged_scaled", "batch_shared"])
def test_one_scale_without_the_other(name, side):
    case = BY_NAME[name]
    arrays, cotangent = operands(case)._replace(**{side: None}), draw_cotangent(case)
    value, gradients = message_and_gradients(case, arrays, cotangent)
    assert_value(case, value, arrays)
    assert_gradients(case, gradients, arrays, cotangent)


@pytest.mark.parametrize("name", ["batch", "batch_shared", "batch_wide", "bfloat16_merged", "volume_batch"])
def test_a_batch_is_its_items_one_by_one(name):
    case = BY_NAME[name]
    arrays = operands(case)
    run = jax.jit(functools.partial(message, case))
    together = np.asarray(run(arrays))
    for item in range(case.batch):
        one = jax.tree.map(lambda x, item=item: x if x.ndim == 1 else x[[item if len(x) > 1 else 0]], arrays)
        np.testing.assert_array_equal(together[[item]], run(one))


@pytest.mark.parametrize("mapped", ["all", "q", "features", "weights", "left"])
def test_vmap_is_a_loop(mapped):
    case = BY_NAME["batch"]
    some = [operands(case, seed) for seed in range(3)]
    cotangent = draw_cotangent(case)
    axes = Operands(*[0 if mapped in (name, "all") else None for name in Operands._fields])
    if mapped != "all":
        some = [some[0]._replace(**{mapped: getattr(one, mapped)}) for one in some]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *some)
    arguments = Operands(
        *[getattr(some[0] if axis is None else stacked, name) for name, axis in axes._asdict().items()]
    )

    found = jax.vmap(lambda *xs: message_and_gradients(case, Operands(*xs), cotangent), tuple(axes))(
        *arguments
    )
    loop = [message_and_gradients(case, one, cotangent) for one in some]
    expected = jax.tree.map(lambda *xs: np.stack(xs), *loop)
    # The same sums over the window; those over blocks and batch may be compiled differently.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", ["merged_scaled", "wide"])
def test_a_second_call_compiles_nothing(name):
    case = BY_NAME[name]
    traces = []

    @jax.jit
    def step(arrays, cotangent):
        traces.append(None)
        return message_and_gradients(case, arrays, cotangent)

    first = step(operands(case), draw_cotangent(case))
    second = step(operands(case, 5), draw_cotangent(case, 6))
    assert len(traces) == 1
    assert step._cache_size() == 1
    assert not np.array_equal(first[0], second[0])


def test_jit_agrees_with_eager():
    case = BY_NAME["merged_scaled"]
    arrays = operands(case)
    compiled = jax.jit(functools.partial(message, case))(arrays)
    np.testing.assert_allclose(compiled, message(case, arrays), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "asked", [*Operands._fields, "q features", "weights left", "q right", "features left right"]
)
def test_gradients_of_some_operands_are_those_of_all(asked):
    case = BY_NAME["batch_shared"]
    arrays, cotangent = operands(case), draw_cotangent(case)
    names = asked.split()
    _, expected = message_and_gradients(case, arrays, cotangent)

    @jax.jit
    def some_gradients(arrays):
        def value(*chosen):
            return message(case, arrays._replace(**dict(zip(names, chosen, strict=True))))

        return jax.vjp(value, *[getattr(arrays, name) for name in names])[1](jnp.asarray(cotangent))

    for name, gradient in zip(names, some_gradients(arrays), strict=True):
        # The same sums; which loops XLA fuses them into depends on what else is asked for.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
            gradient,
            getattr(expected, name),
        )


def test_only_what_is_asked_for_is_computed():
    case = BY_NAME["merged_scaled"]
    arrays = operands(case)

    def passes(*names):
        def pull(cotangent, *chosen):
            def value(*chosen):
                return message(case, arrays._replace(**dict(zip(names, chosen, strict=True))))

            return jax.vjp(value, *chosen)[1](cotangent)

        text = jax.jit(pull).lower(arrays.q, *[getattr(arrays, name) for name in names]).as_text()
        return text.count("stablehlo.exponential")  # one kernel of this case has features

    assert passes("q") == passes("features") == passes("weights", "left", "right") == 1
    assert passes("q", "weights") == 2


def test_a_message_that_nothing_depends_on_has_zero_gradients():
    case = BY_NAME["merged_scaled"]
    arrays = jax.tree.map(jnp.asarray, operands(case))

    def unused(arrays):
        message(case, arrays)
        return jnp.sum(arrays.q)

    found = jax.grad(unused)(arrays)
    np.testing.assert_array_equal(found.q, jnp.ones_like(arrays.q))
    assert all(not np.any(x) for x in jax.tree.leaves(found._replace(q=None)))


def test_the_rule_answers_a_symbolic_zero_with_zeros():
    case = BY_NAME["merged_scaled"]
    arrays = jax.tree.map(jnp.asarray, operands(case))
    needs = Needs(*[True] * 5)
    zero = SymbolicZero(jax.typeof(arrays.q))
    found = pull_back(functools.partial(backward, reference), None, (needs, tuple(arrays)), zero)
    assert jax.tree.structure(found) == jax.tree.structure(tuple(arrays))
    for gradient, operand in zip(jax.tree.leaves(found), jax.tree.leaves(arrays), strict=True):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(operand))


@pytest.mark.parametrize(
    "name", ["merged_scaled", "batch_shared", "wide", "batch_wide", "wide_line", "volume_batch"]
)
def test_blocks_of_a_cpu_and_whole_maps_agree(name):
    case = BY_NAME[name]
    arrays, cotangent = operands(case), draw_cotangent(case)
    thetas = case.position_bandwidths or (None,) * len(case.feature_sizes)
    config = reference.WindowConfig(case.window, thetas)
    needs = Needs(False, True, True, case.scaled, case.scaled)

    @functools.partial(jax.jit, static_argnums=0)
    def run(whole_map, arrays, cotangent):
        value = reference._forward(config, whole_map, *arrays)
        return value, reference._backward(config, needs, whole_map, *arrays, cotangent)

    blocks, whole = run(False, arrays, cotangent), run(True, arrays, cotangent)
    assert set(blocks[1]) == set(whole[1]) == {name for name, needed in needs._asdict().items() if needed}
    # Float32 sums of up to a thousand pixels (the weights') in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), blocks, whole)


def test_the_window_may_change_with_the_axis_but_not_the_answer():
    transposed = Case("transposed", (8, 7), filter_size=(7, 3))
    arrays = operands(BY_NAME["oblong_window"])
    swapped = jax.tree.map(lambda x: x if x.ndim == 1 else x.swapaxes(1, 2), arrays)
    np.testing.assert_allclose(
        message(transposed, swapped).swapaxes(1, 2),
        message(BY_NAME["oblong_window"], arrays),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("size", [np.int64(3), (np.int32(3), 3), [3, 3], np.array([3, 3])])
def test_filter_sizes_may_be_numpy_integers(size):
    arrays = operands(BY_NAME["plain"])._asdict()
    np.testing.assert_array_equal(
        window_message(**arrays, filter_size=size), window_message(**arrays, filter_size=3)
    )


@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (2, 0, 5, 3), (2, 4, 0, 3), (2, 4, 5, 0)])
def test_nothing_in_nothing_out(shape):
    q, features = jnp.zeros(shape), [jnp.ones((*shape[:-1], 2))]

    def total(q, features, weights):
        return window_message(q, features, weights, filter_size=3).sum()

    assert window_message(q, features, jnp.ones(1), filter_size=3).shape == shape
    found = jax.grad(total, argnums=(0, 1, 2))(q, features, jnp.ones(1))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, jnp.zeros_like(y)), found, (q, features, jnp.ones(1))
    )


def test_an_explicit_implementation_is_never_replaced():
    with pytest.raises(ValueError, match="implementation: got 'cudnn'"):
        select_implementation("cudnn")
    with pytest.raises(ValueError, match="implementation: got 'cudnn'"):
        message(BY_NAME["plain"], operands(BY_NAME["plain"]), implementation="cudnn")
    assert select_implementation() in IMPLEMENTATIONS
    for name in IMPLEMENTATIONS:
        if name in MESSAGE.here():
            assert select_implementation(name) == name
        else:
            with pytest.raises(NotImplementedError, match=f"implementation: '{name}' needs"):
                select_implementation(name)


GOOD = {
    "q": np.zeros((2, 4, 5, 3), np.float32),
    "features": [np.zeros((2, 4, 5, 3), np.float32), np.zeros((1, 4, 5, 0), np.float32)],
    "weights": np.ones(2, np.float32),
    "filter_size": 3,
}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"q": np.zeros((5, 3), np.float32)}, r"q: got shape \(5, 3\); expected .* 1 to 3 spatial axes"),
        ({"q": np.zeros((2, 1, 4, 4, 5, 3), np.float32)}, r"q: got shape \(2, 1, 4, 4, 5, 3\)"),
        ({"q": np.zeros((2, 4, 5, 3), np.int32)}, "q: got dtype int32; expected floating point"),
        ({"features": [], "weights": np.ones(0, np.float32)}, "features: got no kernel"),
        ({"weights": np.ones(3, np.float32)}, r"weights: got shape \(3,\); expected \(2,\)"),
        ({"weights": np.float32(1)}, r"weights: got shape \(\); expected \(2,\)"),
        (
            {"features": [np.zeros((4, 5, 3), np.float32)] * 2},
            r"features\[0\]: got shape \(4, 5, 3\); expected \[2 or 1",
        ),
        (
            {"features": [np.zeros((2, 4, 5, 3)), np.zeros((2, 5, 4, 3))]},
            r"features\[1\]: got shape \(2, 5, 4, 3\)",
        ),
        ({"features": [np.zeros((3, 4, 5, 3), np.float32)] * 2}, r"features\[0\]: got shape \(3, 4, 5, 3\)"),
        (
            {"left": np.ones((2, 4, 5, 1), np.float32)},
            r"left: got shape \(2, 4, 5, 1\); expected \[2 or 1, 4, 5, 2\]",
        ),
        ({"right": np.ones((3, 4, 5, 2), np.float32)}, r"right: got shape \(3, 4, 5, 2\)"),
        ({"filter_size": 4}, "filter_size: got 4; expected an odd number"),
        ({"filter_size": -1}, "filter_size: got -1"),
        ({"filter_size": (3, 2)}, r"filter_size: got \(3, 2\)"),
        ({"filter_size": (3, 3, 3)}, "one for each of the 2 spatial axes"),
        ({"position_bandwidths": [(1.0, 0.0), None]}, "position_bandwidths: got .* 2 numbers > 0"),
        ({"position_bandwidths": [None, (1.0, float("nan"))]}, "position_bandwidths: got .* 2 numbers > 0"),
        ({"position_bandwidths": [(1.0,), None]}, "position_bandwidths: got .* one per spatial axis"),
        ({"position_bandwidths": [None]}, "position_bandwidths: got 1 entries for 2 kernels"),
    ],
)
def test_bad_input_says_what_to_do(bad, error):
    window_message(**GOOD)
    with pytest.raises(ValueError, match=error):
        window_message(**(GOOD | bad))


@pytest.mark.parametrize("size", [3.0, (3.5, 3)])
def test_a_fractional_window_is_refused(size):
    with pytest.raises(TypeError, match=r"filter_size: got .*; expected whole numbers"):
        window_message(**(GOOD | {"filter_size": size}))


def test_arithmetic_counts_pairs():
    counts = api.arithmetic((2, 4, 5, 3), (3, 5), (3, 0))
    pairs = 2 * 4 * 5 * 15
    assert counts == {"multiply_adds": pairs * 3, "exponentials": pairs, "bytes": 4.0 * 40 * (2 * 3 + 3)}
