"""Schedules against their closed forms, optimisers against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

optax = pytest.importorskip("optax")
nnx = pytest.importorskip("flax.nnx")

from jaxcrf.training import schedules  # noqa: E402  (needs optax)

CASES = {
    "convcrf": (schedules.schedule_convcrf(1000), 1000, lambda t: 5e-5 * ((1 - t / 1000) ** 0.9) ** 2),
    "gaussian crf 1": (
        schedules.schedule_dense_gaussian_crf(1),
        20_000,
        lambda t: 1e-3 * (1 - t / 20_000) ** 0.9,
    ),
    "gaussian crf 2": (
        schedules.schedule_dense_gaussian_crf(2),
        20_000,
        lambda t: 1e-3 * (1 - t / 20_000) ** 0.9,
    ),
    "gaussian crf 3": (
        schedules.schedule_dense_gaussian_crf(3),
        20_000,
        lambda t: 2.5e-4 * (1 - t / 20_000) ** 0.9,
    ),
    "deeplab": (schedules.schedule_deeplab(), 6000, lambda t: 1e-3 * 0.1 ** (t // 2000)),
    "hrenet": (schedules.schedule_hrenet(), 30_000, lambda t: 1e-3 if t < 15_000 else 1e-4),
    "hrenet baseline": (
        schedules.schedule_hrenet(12_001),
        12_001,
        lambda t: 1e-3 if t < 6001 else 1e-4,
    ),
    "hrenet coco": (
        schedules.schedule_hrenet(120_000, every=50_000),
        120_000,
        lambda t: 1e-3 * 0.1 ** (t // 50_000),
    ),
    "warmup": (
        schedules.warmup(schedules.polynomial_decay(0.1, 100, 1.0), 10),
        100,
        lambda t: 0.1 * (1 - t / 100) * min(1, (t + 1) / 10),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_schedules_are_their_closed_forms(name):
    schedule, end, expected = CASES[name]
    edges = [edge + d for edge in (2000, 4000, 6001, 15_000, 50_000, 100_000) for d in (-1, 0) if edge < end]
    steps = [0, 1, 9, 10, end // 2, *edges, end - 1]
    found = jax.jit(jax.vmap(schedule))(jnp.array(steps))
    # Near the end of a polynomial, 1 - t/T is a difference of float32 numbers next to one.
    np.testing.assert_allclose(found, [expected(t) for t in steps], rtol=1e-5, atol=1e-10)
    # Python numbers, as eager loops and plots pass them.
    np.testing.assert_allclose([float(schedule(t)) for t in steps], found, rtol=1e-5, atol=1e-10)
    assert found[0] > found[-1] or name == "warmup"


@pytest.mark.parametrize("name", [name for name in CASES if name != "deeplab"])
def test_after_the_end_nothing_changes_any_more(name):
    schedule, end, expected = CASES[name]
    last = expected(end - 1) if "hrenet" in name else 0.0
    for step in (end, end + 1, 10 * end, 2**31 - 1):
        found = schedule(jnp.int32(step))
        np.testing.assert_allclose(found, last, rtol=1e-6)


def test_steps_come_at_their_multiples_also_where_a_rounded_quotient_would_miss_them():
    times = np.arange(1, 20)
    for every in (41, 61, 109, 2000):
        schedule = jax.jit(jax.vmap(schedules.step_decay(1.0, every, 0.5)))
        np.testing.assert_array_equal(schedule(times * every), 0.5**times)
        np.testing.assert_array_equal(schedule(times * every - 1), 0.5 ** (times - 1))


def test_deeplab_has_no_end_and_its_rate_no_nan():
    assert float(schedules.schedule_deeplab()(jnp.int32(2**31 - 1))) == 0
    np.testing.assert_allclose(schedules.schedule_deeplab()(20_000), 1e-13, rtol=1e-5)


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {"conv": {"kernel": rng.normal(size=3), "bias": rng.normal(size=2)}}


def run(optimizer, start, gradients):
    """The parameters after every step, in float64."""
    with jax.enable_x64(True):
        current = jax.tree.map(jnp.asarray, start)
        state = optimizer.init(current)
        found = []
        for gradient in gradients:
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, current)
            current = optax.apply_updates(current, updates)
            found.append(jax.tree.map(np.asarray, current))
    return found


GRADIENTS = [params(seed) for seed in range(1, 9)]


def sgd_loop(rate, momentum, decay, start, gradients, *, outside=False):
    weights, velocity = {k: v.copy() for k, v in start["conv"].items()}, {"kernel": 0.0, "bias": 0.0}
    for t, gradient in enumerate(gradients):
        for name, value in weights.items():
            slope = gradient["conv"][name] + (decay * value if name == "kernel" else 0)
            velocity[name] = momentum * velocity[name] + (1 if outside else rate(t)) * slope
            weights[name] = value - (rate(t) if outside else 1) * velocity[name]
    return weights


def test_sgd_has_the_rate_inside_its_velocity():
    rate = lambda t: 0.1 if t < 4 else 0.01  # noqa: E731
    optimizer = schedules.sgd(schedules.step_decay(0.1, 4), weight_decay=0.3)
    found = run(optimizer, params(), GRADIENTS)[-1]["conv"]
    expected = sgd_loop(rate, 0.9, 0.3, params(), GRADIENTS)
    other = sgd_loop(rate, 0.9, 0.3, params(), GRADIENTS, outside=True)
    for name in ("kernel", "bias"):
        # The rate itself is float32.
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
        assert np.abs(found[name] - other[name]).max() > 0.01
    # Until the rate first changes there is no difference.
    found = run(optimizer, params(), GRADIENTS[:4])[-1]["conv"]
    other = sgd_loop(rate, 0.9, 0.3, params(), GRADIENTS[:4], outside=True)
    np.testing.assert_allclose(found["kernel"], other["kernel"], rtol=1e-6)


def test_after_a_drop_of_the_rate_steps_shrink_over_ten_steps_inside_and_at_once_outside():
    schedule, one = schedules.step_decay(0.1, 200), {"bias": np.ones(1)}
    inside = run(schedules.sgd(schedule), one, [one] * 260)
    outside = run(optax.sgd(schedule, momentum=0.9), one, [one] * 260)
    steps = [np.diff([float(x["bias"][0]) for x in way]) for way in (inside, outside)]
    # steps[k] leads from step k's result to that of k + 1; both had settled at 0.1 / (1 - 0.9).
    np.testing.assert_allclose([s[198] for s in steps], -1.0, rtol=1e-5)
    np.testing.assert_allclose([s[199] for s in steps], [-0.91, -0.1], rtol=1e-5)
    np.testing.assert_allclose([s[258] for s in steps], -0.1, rtol=0.02)


def test_adam_has_l2_in_its_gradient():
    start, rate, decay, (b1, b2, tiny) = params(), 0.1, 0.3, (0.9, 0.999, 1e-8)
    found = run(schedules.adam(rate, weight_decay=decay), start, GRADIENTS)[-1]["conv"]
    decoupled = run(optax.adamw(rate, weight_decay=decay), start, GRADIENTS)[-1]["conv"]
    for name, initial in start["conv"].items():
        value = initial
        mean = square = np.zeros_like(value)
        for t, gradient in enumerate(GRADIENTS, start=1):
            slope = gradient["conv"][name] + (decay * value if name == "kernel" else 0)
            mean, square = b1 * mean + (1 - b1) * slope, b2 * square + (1 - b2) * slope**2
            value = value - rate * (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + tiny)
        np.testing.assert_allclose(found[name], value, rtol=1e-6)
        assert np.abs(decoupled[name] - value).max() > 0.01


OPTIMIZERS = {
    "convcrf": (schedules.optimizer_convcrf(100), 5e-5, 0.0),
    "crf as rnn": (schedules.optimizer_crf_as_rnn(), 1e-13, 0.99),
    "gaussian crf": (schedules.optimizer_dense_gaussian_crf(3), 2.5e-4, 0.9),
    "deeplab": (schedules.optimizer_deeplab(), 1e-3, 0.9),
    "deep parsing network": (schedules.optimizer_deep_parsing_network(), 1e-3, 0.9),
    "hrenet": (schedules.optimizer_hrenet(), 1e-3, 0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_have_the_papers_rates_momentum_and_decay(name):
    optimizer, rate, momentum = OPTIMIZERS[name]
    start = {"kernel": np.full(1, 2.0), "bias": np.full(1, 2.0)}
    nothing, one = ({k: np.full(1, x) for k in start} for x in (0.0, 1.0))
    with jax.enable_x64(True):
        state = optimizer.init(start)
        # What is added to the parameters, since 1e-13 is near the rounding of the parameters themselves.
        first, state = optimizer.update(one, state, start)
        second, _ = optimizer.update(nothing, state, start)
        still, _ = optimizer.update(nothing, optimizer.init(start), start)
    first, second, still = (jax.tree.map(np.asarray, found) for found in (first, second, still))
    # Decay 5e-4 of a weight of 2 is 1e-3 of gradient, for kernels alone.
    assert still["bias"] == 0
    np.testing.assert_allclose(first["bias"], -rate, rtol=1e-6)
    if momentum:
        np.testing.assert_allclose(first["kernel"], -rate * 1.001, rtol=1e-6)
        np.testing.assert_allclose(second["bias"], -rate * momentum, rtol=1e-6)
        np.testing.assert_allclose(still["kernel"], -rate * 1e-3, rtol=1e-6)
    else:
        # Adam's first step is the rate, however small the gradient.
        np.testing.assert_allclose(still["kernel"], -rate, rtol=1e-4)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.kernel_weights = nnx.Param(jnp.ones(2))

    def __call__(self, x):
        return self.blocks[1](self.norm(self.blocks[0](x)))


def test_only_what_is_named_kernel_decays():
    state = nnx.state(Network(nnx.Rngs(0)), nnx.Param)
    marked = {
        jax.tree_util.keystr(path): bool(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(schedules.kernels(state))
    }
    assert len(marked) == len(jax.tree.leaves(state)) == 7
    assert all(leaf == ("['kernel']" in path) for path, leaf in marked.items())
    assert sum(marked.values()) == 2
    flat = {
        "blocks/0/kernel": 1,
        "blocks/0/bias": 1,
        "kernel": 1,
        "crf/kernel_weights": 1,
        "a_kernel": 1,
        "kernel/bias": 1,
    }
    assert [path for path, leaf in schedules.kernels(flat).items() if leaf] == ["blocks/0/kernel", "kernel"]


def test_optimizers_train_nnx_modules_under_jit():
    network = Network(nnx.Rngs(0))
    before = nnx.state(network, nnx.Param)
    before = jax.tree.map(jnp.copy, before)
    optimizer = nnx.Optimizer(network, schedules.optimizer_deeplab(weight_decay=0.5), wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer):
        grads = jax.tree.map(jnp.zeros_like, nnx.state(network, nnx.Param))
        optimizer.update(network, grads)

    step(network, optimizer)
    ratios = jax.tree.map(lambda a, b: a / b, nnx.state(network, nnx.Param), before)
    np.testing.assert_allclose(ratios["blocks"][0]["kernel"][...], 1 - 1e-3 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(ratios["norm"]["scale"][...], 1)
    np.testing.assert_array_equal(ratios["kernel_weights"][...], 1)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_steps: got 0; expected a whole number of steps >= 1"):
        schedules.schedule_convcrf(0)
    with pytest.raises(ValueError, match=r"num_steps: got 1000.0"):
        schedules.polynomial_decay(1.0, 1000.0)
    with pytest.raises(ValueError, match="power: got 0"):
        schedules.polynomial_decay(1.0, 10, 0)
    with pytest.raises(ValueError, match="every: got True"):
        schedules.step_decay(1.0, True)
    with pytest.raises(ValueError, match="factor: got 10"):
        schedules.step_decay(1.0, 10, 10)
    with pytest.raises(ValueError, match="phase: got 4; expected 1"):
        schedules.schedule_dense_gaussian_crf(4)
    with pytest.raises(ValueError, match="num_steps: got 0"):
        schedules.schedule_hrenet(0)
    with pytest.raises(ValueError, match="num_steps: got -1"):
        schedules.warmup(optax.constant_schedule(1.0), -1)
