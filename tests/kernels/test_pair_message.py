import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import SymbolicZero

import oracles
from jaxcrf_kernels._bank import Needs, backward, pull_back
from jaxcrf_kernels.pair_message import IMPLEMENTATIONS, api, pair_message, reference, select_implementation
from jaxcrf_kernels.pair_message.cases import CASES, Case, Operands, operands
from jaxcrf_kernels.window_message import window_message
from message_suite import MESSAGES, assert_within_rounding

BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
MESSAGE = MESSAGES["pair_message"]
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


@pytest.mark.parametrize("name", ["merged_scaled", "batch", "batch_shared", "cutoff_volume"])
def test_the_oracle_gradients_are_its_finite_differences(name):
    case = BY_NAME[name]
    arrays = jax.tree.map(lambda x: x.astype(np.float64), operands(case))
    cotangent = draw_cotangent(case).astype(np.float64)
    exact = oracles.pair_message_vjp(**arrays._asdict(), **case.static, cotangent=cotangent)
    generator = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: generator.normal(size=x.shape), arrays)
    # One operand at a time, or the largest gradient would hide the others.
    for operand in Operands._fields:

        def energy(step, name=operand):
            moved = jax.tree.map(lambda x, d: x + step * d, getattr(arrays, name), getattr(direction, name))
            value = oracles.pair_message(**arrays._replace(**{name: moved})._asdict(), **case.static)
            return np.sum(cotangent * value)

        slope = (energy(1e-5) - energy(-1e-5)) / 2e-5
        products = jax.tree.map(
            lambda g, d: np.sum(g * d), getattr(exact, operand), getattr(direction, operand)
        )
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["merged_scaled", "scaled", "batch_shared", "tiles", "cutoff_line"])
def test_float64_stays_float64(name):
    case = BY_NAME[name]
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: x.astype(np.float64), operands(case))
        cotangent = draw_cotangent(case).astype(np.float64)
        value, gradients = message_and_gradients(case, arrays, cotangent)
        assert value.dtype == jnp.float64
        assert_value(case, value, arrays, np.finfo(np.float64).eps)
        assert_gradients(case, gradients, arrays, cotangent, np.finfo(np.float64).eps)


@pytest.mark.parametrize("name", ["merged_scaled", "cutoff_tiles"])
def test_float32_stays_float32_where_x64_is_on(name):
    case = BY_NAME[name]
    arrays, cotangent = operands(case), draw_cotangent(case)
    with jax.enable_x64(True):
        value, gradients = message_and_gradients(case, arrays, cotangent)
    assert_value(case, value, arrays)
    assert_gradients(case, gradients, arrays, cotangent)


@pytest.mark.parametrize("name", ["tiles_scaled", "batch_shared", "cutoff_tiles"])
def test_gradients_are_finite_differences_in_float64(name):
    case = BY_NAME[name]
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: x.astype(np.float64), operands(case))
        cotangent = draw_cotangent(case).astype(np.float64)
        generator = np.random.default_rng(2)
        direction = jax.tree.map(lambda x: generator.normal(size=x.shape), arrays)
        _, gradients = message_and_gradients(case, arrays, cotangent)
        for operand in Operands._fields:

            def energy(step, name=operand):
                move = jax.tree.map(
                    lambda x, d: x + step * d, getattr(arrays, name), getattr(direction, name)
                )
                return np.sum(cotangent * np.asarray(message(case, arrays._replace(**{name: move}))))

            slope = (energy(1e-5) - energy(-1e-5)) / 2e-5
            products = jax.tree.map(
                lambda g, d: np.sum(g * d), getattr(gradients, operand), getattr(direction, operand)
            )
            # Truncation, step² = 1e-10, and cancellation, eps / step = 2e-11, of sums of up to 1e4.
            np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["scaled", "merged_scaled", "batch_shared", "tiles_scaled"])
def test_one_scale_without_the_other(name, side):
    case = BY_NAME[name]
    arrays, cotangent = operands(case)._replace(**{side: None}), draw_cotangent(case)
    value, gradients = message_and_gradients(case, arrays, cotangent)
    assert_value(case, value, arrays)
    assert_gradients(case, gradients, arrays, cotangent)


def smooth_image(height, width):
    """A few soft blobs of colour, 0 to 255."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    generator = np.random.default_rng(0)
    image = np.zeros((height, width, 3))
    for _ in range(6):
        a, b, colour = generator.uniform(0, 1), generator.uniform(0, 1), generator.uniform(-1, 1, 3)
        image += np.exp(-20 * ((y - a) ** 2 + (x - b) ** 2))[..., None] * colour
    return 255 * (image - image.min()) / np.ptp(image)


@pytest.mark.exhaustive
def test_it_is_exact_on_an_image():
    height, width, labels = 96, 128, 4
    positions = np.indices((height, width)).reshape(2, -1).T
    colours = smooth_image(height, width).reshape(-1, 3)
    features = np.concatenate([positions / 80, colours / 13], axis=-1).astype(np.float32)[None]
    q = np.random.default_rng(1).dirichlet(np.ones(labels), (1, height * width)).astype(np.float32)
    found = np.asarray(pair_message(q, [features], np.ones(1, np.float32)))
    for begin in range(0, height * width, 1024):
        rows = slice(begin, begin + 1024)
        exponent = sum(
            np.subtract.outer(f[rows], f) ** 2 for f in features[0].T.astype(np.float64)
        )  # one feature at a time, to be kind to the memory
        expected = np.exp(-0.5 * exponent) @ q[0].astype(np.float64)
        # Relative to the largest, as asked for; the sums' own bound is 12288 eps = 1.5e-3.
        np.testing.assert_allclose(found[0, rows], expected, rtol=0, atol=1e-5 * expected.max())


@pytest.mark.parametrize("size", [(3, 5), (11, 1), (7, 7)])
def test_a_cutoff_is_a_window(size):
    spatial, labels = (23, 31), 3
    case = Case("window", spatial, labels, batch=2, feature_sizes=(3, 0), scaled=True)
    arrays = operands(case)
    maps = jax.tree.map(lambda x: x if x.ndim == 1 else x.reshape(x.shape[0], *spatial, -1), arrays)
    maps = maps._replace(features=(maps.features[0], np.zeros((2, *spatial, 0), np.float32)))
    expected = window_message(**maps._asdict(), filter_size=size).reshape(2, -1, labels)
    cut = case._replace(cutoff=tuple(k // 2 for k in size))
    # The same sums of up to 98 terms of size about one in another order.
    np.testing.assert_allclose(message(cut, arrays), expected, rtol=1e-5, atol=1e-5)


def test_a_cutoff_skips_tiles():
    """All visited pairs of pixels, and only tiles that hold some, as few as the cut-off and tiles imply."""
    for case in (one for one in CASES if one.cutoff is not None):
        tiles = reference._Tiles.of(reference.PairConfig(case.spatial, case.cutoff), 512)
        second, begins = tiles.partners()
        first = np.repeat(np.arange(tiles.number), np.diff(begins))
        visited = set(zip(first.tolist(), second.tolist(), strict=True))
        assert len(visited) == len(second)
        grid = np.indices(case.spatial).reshape(len(case.spatial), -1).T
        tile = np.ravel_multi_index(tuple((grid // tiles.block).T), tiles.grid)
        near = (np.abs(grid[:, None] - grid[None, :]) <= case.cutoff).all(-1)
        needed = {(min(a, b), max(a, b)) for a, b in zip(*(tile[x] for x in np.nonzero(near)), strict=True)}
        assert needed == visited
    large = reference._Tiles.of(reference.PairConfig((375, 500), (9, 9)), 512)
    visited = len(large.partners()[0]) * large.size**2
    every = (375 * 500) ** 2 / 2
    assert visited < every / 50  # 19² of 187500 pixels are 1/519 of all pairs


def test_memory_is_far_from_all_pairs():
    case = Case("memory", (96, 128), labels=21, feature_sizes=(5, 2))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands(case))
    all_pairs = 4 * case.pixels**2
    for function, arguments in (
        (functools.partial(message, case), (shapes,)),
        (functools.partial(message_and_gradients, case), (shapes, shapes.q)),
    ):
        found = jax.jit(function).lower(*arguments).compile().memory_analysis()
        # Tiles of 1 MiB each and a few copies of maps of 1 MiB, against 576 MiB.
        assert found.temp_size_in_bytes < all_pairs / 20


@pytest.mark.parametrize("name", ["batch", "batch_shared", "batch_shared_plain", "tiles_batch"])
def test_a_batch_is_its_items_one_by_one(name):
    case = BY_NAME[name]
    arrays = operands(case)
    run = jax.jit(functools.partial(message, case))
    together = np.asarray(run(arrays))
    for item in range(case.batch):
        one = jax.tree.map(lambda x, item=item: x if x.ndim == 1 else x[[item if len(x) > 1 else 0]], arrays)
        # Where items share their features they are filtered as labels, in products of another shape.
        np.testing.assert_allclose(together[[item]], run(one), rtol=1e-5, atol=1e-5)


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
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), found, expected)


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from jaxcrf_kernels.pair_message import pair_message
from jaxcrf_kernels.pair_message.cases import Case, Operands, operands

assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()), ("data",))
for case in (
    Case("plain", (7, 5), batch=4, feature_sizes=(3, 0)),
    Case("scaled", (23, 31), batch=4, feature_sizes=(3, 2), scaled=True),
    Case("shared", (7, 5), batch=4, feature_sizes=(3,), shared=True),
    Case("cutoff", (7, 5), batch=4, feature_sizes=(3, 2), scaled=True, cutoff=(2, 1)),
):
    arrays = operands(case)

    def run(*xs):
        return pair_message(**Operands(*xs)._asdict(), **case.static)

    specs = jax.tree.map(lambda x: P("data") if x.ndim == 3 and len(x) > 1 else P(), tuple(arrays))
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("data"))
    cotangent = operands(case, 1).q

    def both(f):
        def compute(*xs):
            value, pull = jax.vjp(f, *xs)
            return value, pull(cotangent)

        return jax.jit(compute)(*arrays)

    check = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * max(1e-9, np.abs(y).max(initial=0)))
    jax.tree.map(check, both(split), both(run))
print("four devices agree")
"""


@pytest.mark.exhaustive
def test_a_sharded_batch_is_a_loop(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        check=False,
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PATH": "", "HOME": str(tmp_path)},
    )
    assert result.stdout.strip() == "four devices agree", result.stderr[-2000:]


@pytest.mark.parametrize("name", ["merged_scaled", "cutoff_tiles"])
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
    np.testing.assert_allclose(compiled, message(case, arrays), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "asked", [*Operands._fields, "q features", "weights left", "q right", "features left right"]
)
@pytest.mark.parametrize("name", ["scaled", "batch_shared"])
def test_gradients_of_some_operands_are_those_of_all(asked, name):
    case = BY_NAME[name]
    arrays, cotangent = operands(case), draw_cotangent(case)
    names = asked.split()
    _, expected = message_and_gradients(case, arrays, cotangent)

    @jax.jit
    def some_gradients(arrays):
        def value(*chosen):
            return message(case, arrays._replace(**dict(zip(names, chosen, strict=True))))

        return jax.vjp(value, *[getattr(arrays, name) for name in names])[1](jnp.asarray(cotangent))

    for operand, gradient in zip(names, some_gradients(arrays), strict=True):
        # The same sums; which loops XLA fuses them into depends on what else is asked for.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4),
            gradient,
            getattr(expected, operand),
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
    ("name", "tile"),
    [
        ("prime", 1),
        *itertools.product(["tiles", "tiles_scaled", "cutoff_tiles", "cutoff_volume"], [37, 4096]),
    ],
)
def test_the_size_of_tiles_does_not_matter(name, tile):
    case = BY_NAME[name]
    arrays, cotangent = operands(case), draw_cotangent(case)
    config = (case.pixels,) if case.cutoff is None else case.spatial
    tiles = reference._Tiles.of(reference.PairConfig(config, case.cutoff), tile)
    needs = Needs(False, True, True, case.scaled, case.scaled)

    @jax.jit
    def run(arrays, cotangent):
        value = reference._forward(tiles, *arrays)
        return value, reference._backward(needs, tiles, *arrays, cotangent)

    value, gradients = run(arrays, cotangent)
    assert_value(case, value, arrays)
    assert set(gradients) == {operand for operand, needed in needs._asdict().items() if needed}
    exact = functools.partial(
        oracles.pair_message_vjp, **arrays._asdict(), **case.static, cotangent=cotangent
    )
    expected, magnitude, depths = exact(), exact(magnitude=True), MESSAGE.depths(case)
    for operand, gradient in gradients.items():
        for g, w, s in zip(
            *map(jax.tree.leaves, (gradient, getattr(expected, operand), getattr(magnitude, operand))),
            strict=True,
        ):
            assert_within_rounding(g, w, s, getattr(depths, operand))


def test_far_and_equal_features_have_finite_gradients():
    # A kernel value of zero times a large difference, and differences of zero.
    features = np.array([0, 0, 1e4, 1e15], np.float32).reshape(1, 4, 1)
    q = np.ones((1, 4, 2), np.float32)
    found = jax.grad(lambda f, q: pair_message(q, [f], jnp.ones(1)).sum(), argnums=(0, 1))(features, q)
    np.testing.assert_array_equal(found[0], np.zeros_like(features))
    np.testing.assert_array_equal(found[1][0, :, 0], [2, 2, 1, 1])


@pytest.mark.parametrize("cutoff", [np.array([1, 2]), [np.int64(1), 2], (1, np.int32(2))])
def test_cutoffs_may_be_numpy_integers(cutoff):
    case = BY_NAME["cutoff"]
    arrays = operands(case)._asdict()
    np.testing.assert_array_equal(
        pair_message(**arrays, spatial=np.array(case.spatial), cutoff=cutoff),
        pair_message(**arrays, spatial=case.spatial, cutoff=(1, 2)),
    )


@pytest.mark.parametrize("shape", [(0, 20, 3), (2, 0, 3), (2, 20, 0)])
@pytest.mark.parametrize("cutoff", [None, (1, 1)])
def test_nothing_in_nothing_out(shape, cutoff):
    q, features = jnp.zeros(shape), [jnp.ones((*shape[:-1], 2))]
    static = {"spatial": (shape[1] // 5, 5), "cutoff": cutoff}

    def total(q, features, weights):
        return pair_message(q, features, weights, **static).sum()

    assert pair_message(q, features, jnp.ones(1), **static).shape == shape
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
    "q": np.zeros((2, 20, 3), np.float32),
    "features": [np.zeros((2, 20, 3), np.float32), np.zeros((1, 20, 0), np.float32)],
    "weights": np.ones(2, np.float32),
    "spatial": (4, 5),
    "cutoff": (2, 1),
}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"q": np.zeros((20, 3), np.float32)}, r"q: got shape \(20, 3\); expected \[batch, pixels, labels\]"),
        ({"q": np.zeros((2, 4, 5, 3), np.float32)}, r"q: got shape \(2, 4, 5, 3\); .*Reshape"),
        ({"q": np.zeros((2, 20, 3), np.int32)}, "q: got dtype int32; expected floating point"),
        ({"features": [], "weights": np.ones(0, np.float32)}, "features: got no kernel"),
        ({"weights": np.ones(3, np.float32)}, r"weights: got shape \(3,\); expected \(2,\)"),
        ({"weights": np.float32(1)}, r"weights: got shape \(\); expected \(2,\)"),
        (
            {"features": [np.zeros((20, 3), np.float32)] * 2},
            r"features\[0\]: got shape \(20, 3\); expected \[2 or 1, 20, d\]",
        ),
        (
            {"features": [np.zeros((2, 20, 3)), np.zeros((2, 21, 3))]},
            r"features\[1\]: got shape \(2, 21, 3\)",
        ),
        ({"features": [np.zeros((3, 20, 3), np.float32)] * 2}, r"features\[0\]: got shape \(3, 20, 3\)"),
        (
            {"left": np.ones((2, 20, 1), np.float32)},
            r"left: got shape \(2, 20, 1\); expected \[2 or 1, 20, 2\]",
        ),
        ({"right": np.ones((3, 20, 2), np.float32)}, r"right: got shape \(3, 20, 2\)"),
        ({"spatial": (4, 6)}, r"spatial: got \(4, 6\), which is 24 pixels; expected .* 20 pixels of q"),
        ({"spatial": None}, r"cutoff: got \(2, 1\) without spatial; pass spatial"),
        ({"cutoff": (2, 1, 0)}, r"cutoff: got \(2, 1, 0\); expected 2 distances >= 0"),
        ({"cutoff": (2, -1)}, r"cutoff: got \(2, -1\)"),
    ],
)
def test_bad_input_says_what_to_do(bad, error):
    pair_message(**GOOD)
    with pytest.raises(ValueError, match=error):
        pair_message(**(GOOD | bad))


@pytest.mark.parametrize(
    "bad", [{"cutoff": 2}, {"cutoff": (2.0, 1)}, {"spatial": 20}, {"spatial": (4.0, 5)}, {"cutoff": "22"}]
)
def test_fractions_of_pixels_are_refused(bad):
    with pytest.raises(TypeError, match=f"{next(iter(bad))}: got .*; expected whole numbers"):
        pair_message(**(GOOD | bad))


def test_arithmetic_counts_pairs():
    pairs = 2 * 20**2
    counts = api.arithmetic((2, 20, 3), (3, 0))
    assert counts == {
        "multiply_adds": pairs * 3,
        "exponentials": (pairs + 40) / 2,
        "bytes": 4.0 * 40 * (2 * 3 + 3),
    }
    grid = np.indices((4, 5)).reshape(2, -1).T
    near = (np.abs(grid[:, None] - grid[None]) <= (2, 1)).all(-1).sum()
    counts = api.arithmetic((2, 20, 3), (3, 0), spatial=(4, 5), cutoff=(2, 1))
    assert (counts["multiply_adds"], counts["exponentials"]) == (2 * near * 3, near + 20)
