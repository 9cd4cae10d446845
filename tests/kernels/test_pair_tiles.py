"""What only the pair message's kernels have: pairs of blocks that are left out, and products of less precision."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import oracles
from jaxcrf_kernels._bank import Needs
from jaxcrf_kernels._dispatch import interpreted
from jaxcrf_kernels.pair_message import api, blocks, pair_message, reference, triton_gpu
from jaxcrf_kernels.pair_message.cases import Case, Operands, operands
from message_suite import MESSAGES, assert_within_rounding

pytestmark = pytest.mark.kernels

MESSAGE = MESSAGES["pair_message"]
draw_cotangent = MESSAGE.draw_cotangent
BY_NAME = {case.name: case for case in MESSAGE.cases.CASES}
KERNELS = [name for name in api.IMPLEMENTATIONS if name != "xla"]
every_kernel = pytest.mark.parametrize("implementation", KERNELS)


def value_and_gradients(case, arrays, cotangent, **options):
    """Compiled afresh, so that no program of a device is taken for an interpreter's."""

    def run(arrays, cotangent):
        def value(*xs):
            return pair_message(**Operands(*xs)._asdict(), **(case.static | options))

        found, pull = jax.vjp(value, *arrays)
        return found, Operands(*pull(cotangent))

    with interpreted():
        return jax.jit(run)(arrays, cotangent)


SHAPES = [
    ((13,), 8, 1),
    ((13,), 8, 2),
    ((1, 1), 64, 2),
    ((5, 7), 16, 1),
    ((9, 33), 32, 2),
    ((3, 5, 6), 64, 1),
    ((375, 500), 64, 2),
]
every_shape = pytest.mark.parametrize(("spatial", "size", "group"), SHAPES)


@every_shape
def test_blocks_hold_every_pixel_once(spatial, size, group):
    cut = blocks.Blocks.of(spatial, size, group)
    assert cut.size == size
    assert cut.number % group == 0
    pixels = math.prod(spatial)
    index = np.arange(pixels, dtype=np.float32).reshape(1, -1, 1)
    arranged = np.asarray(cut.arrange(index + 1))
    assert arranged.shape == (1, 1, cut.pixels)
    np.testing.assert_array_equal(np.sort(arranged[arranged > 0]), np.arange(1, pixels + 1))
    np.testing.assert_array_equal(cut.arrange(index + 1, channels_last=True)[..., 0], arranged[:, 0])
    np.testing.assert_array_equal(cut.collect(cut.arrange(index, channels_last=True)), index)
    # Blocks are compact, and copies of their pixels keep them so.
    where = np.asarray(cut.coordinates()).reshape(len(spatial), cut.number, size)
    assert (cut.block > np.ptp(where, axis=-1).T).all()


def test_blocks_of_an_image_are_squares_with_little_filling():
    cut = blocks.Blocks.of((375, 500), 64, 2)
    assert cut.block == (8, 8)
    assert cut.pixels < 1.02 * 375 * 500


def brute_force(cut, features, sizes, tolerance, cutoff):
    """Per kernel, group and block, whether any pair of pixels has a value that counts."""
    f = np.asarray(features, np.float64)
    receivers = f.reshape(*f.shape[:2], cut.groups, -1)
    senders = f.reshape(*f.shape[:2], cut.number, -1)
    where = np.asarray(cut.coordinates())
    begin, found = 0, []
    for size in sizes:
        own = slice(begin, begin + size)
        difference = receivers[:, own, :, None, :, None] - senders[:, own, None, :, None, :]
        values = np.exp(-0.5 * (difference**2).sum(1))
        if cutoff is not None:
            places = where.reshape(len(cutoff), cut.number, -1)
            apart = np.abs(places[:, :, None, :, None] - places[:, None, :, None, :])
            values = values * (apart <= np.reshape(cutoff, (-1, 1, 1, 1, 1))).all(0)
        found.append((values > max(tolerance, 2.0**-126)).any((-1, -2)))
        begin += size
    return np.stack(found)


@pytest.mark.parametrize(
    ("spatial", "sizes", "cutoff"),
    [
        ((11, 13), (2,), None),
        ((11, 13), (2, 3), None),
        ((11, 13), (3, 0, 1), None),
        ((40,), (1, 1), None),
        ((11, 13), (2, 0), (2, 5)),
        ((5, 6, 7), (2,), (1, 1, 2)),
    ],
)
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_every_pair_of_blocks_that_counts_is_visited_once(spatial, sizes, cutoff, tolerance):
    cut = blocks.Blocks.of(spatial, 8, 1 if cutoff else 2)
    # Positions and colours that make most pairs vanish.
    generator = np.random.default_rng(0)
    places = np.indices(spatial).reshape(len(spatial), -1).T
    rows = np.concatenate([places, generator.normal(size=(len(places), 3))], axis=1)
    values = [3.0 * rows[:, :d] * (m + 1) for m, d in enumerate(sizes)]
    features = cut.arrange(np.concatenate(values, axis=1)[None].astype(np.float32), copies=True)
    listed = blocks.visits(cut, features, sizes, tolerance=tolerance, cutoff=cutoff)
    senders, begins = (np.asarray(x)[0] for x in listed)
    needed = brute_force(cut, features, sizes, tolerance, cutoff)[:, 0]
    several = len(sizes) > 1
    assert begins.shape == (cut.groups, len(sizes) + several + 1)
    visited = np.zeros(needed.shape, int)
    for group in range(cut.groups):
        for sort in range(begins.shape[1] - 1):
            here = senders[group, begins[group, sort] : begins[group, sort + 1]]
            assert len(set(here.tolist())) == len(here)
            for m in [sort] if sort < len(sizes) else range(len(sizes)):
                visited[m, group, here] += 1
    assert visited.max() == 1
    assert (visited.astype(bool) | ~needed).all()
    if sizes == (2,):
        assert visited.sum() < 0.8 * visited.size  # the boxes are worth their while


def clusters(shape, distance):
    """Two halves of an image whose features lie `distance` apart, and vary by less than one within."""
    generator = np.random.default_rng(3)
    half = (np.arange(shape[1]) >= shape[1] // 2) * distance
    noise = generator.uniform(-0.1, 0.1, (*shape, 2))
    return (noise + np.stack([np.broadcast_to(half, shape), np.zeros(shape)], -1)).astype(np.float32)


def two_clusters(distance):
    case = Case("clusters", (8, 32), labels=2, feature_sizes=(2,))
    features = clusters(case.spatial, distance).reshape(1, -1, 2)
    arrays = operands(case)._replace(features=(features,), q=np.abs(operands(case).q))
    return case, arrays


@every_kernel
def test_what_is_left_out_is_what_the_tolerance_says(implementation, monkeypatch):
    if implementation == "tpu":  # of its own choice one block would be half of the image
        module = api.OPERATION.module("tpu")
        config = module.TpuConfig(128, 128, 16, 8)
        monkeypatch.setattr(module, "configuration", lambda *_, **__: config)
    case, arrays = two_clusters(4.0)  # kernel values of about 3e-4 between the halves
    cotangent = draw_cotangent(case)
    exact = oracles.pair_message(**arrays._asdict())
    inside = np.abs(arrays.features[0][0, :, None, 0] - arrays.features[0][0, None, :, 0]) < 1
    matrix = arrays.weights[0] * inside * oracles.gaussian_matrix(arrays.features[0][0])
    near = (matrix @ arrays.q[0].astype(np.float64))[None]
    far = exact - near
    assert (far > 1e-2).all()
    for tolerance, expected in ((0.0, exact), (1e-6, exact), (1e-2, near)):
        found, gradients = value_and_gradients(
            case, arrays, cotangent, implementation=implementation, tolerance=tolerance
        )
        error = np.abs(np.asarray(found, np.float64) - expected)
        assert (error < 0.1 * far).all()
        bound = tolerance * arrays.weights[0] * np.abs(arrays.q).sum(1, keepdims=True)
        assert (np.abs(found - exact) <= bound + 1e-5 * exact).all()
        # The gradient is that of the message which is computed.
        transposed = (
            matrix.T
            if expected is near
            else arrays.weights[0] * oracles.gaussian_matrix(arrays.features[0][0])
        )
        np.testing.assert_allclose(
            gradients.q[0], transposed @ cotangent[0].astype(np.float64), rtol=1e-4, atol=1e-4
        )


def test_the_reference_leaves_nothing_out():
    _, arrays = two_clusters(5.0)
    run = functools.partial(pair_message, **arrays._asdict(), implementation="xla")
    np.testing.assert_array_equal(run(tolerance=1e-2), run())


@every_kernel
def test_blocks_too_far_apart_for_float32_change_nothing(implementation):
    case, arrays = two_clusters(40.0)
    cotangent = draw_cotangent(case)
    found, gradients = value_and_gradients(case, arrays, cotangent, implementation=implementation)
    MESSAGE.assert_value(case, found, arrays)
    MESSAGE.assert_gradients(case, gradients, arrays, cotangent)


@every_kernel
def test_not_a_number_is_never_left_out(implementation):
    case, arrays = two_clusters(40.0)
    arrays.features[0][0, 5, 1] = np.nan
    found, _ = value_and_gradients(case, arrays, draw_cotangent(case), implementation=implementation)
    assert np.isnan(found).all()


@every_kernel
def test_far_and_equal_features_have_finite_gradients(implementation):
    features = np.array([0, 0, 1e4, 1e15], np.float32).reshape(1, 4, 1)
    case = Case("far", (4,), labels=2, feature_sizes=(1,))
    arrays = Operands(np.ones((1, 4, 2), np.float32), (features,), np.ones(1, np.float32), None, None)
    _, gradients = value_and_gradients(case, arrays, np.ones_like(arrays.q), implementation=implementation)
    np.testing.assert_array_equal(gradients.features[0], np.zeros_like(features))
    np.testing.assert_array_equal(gradients.q[0, :, 0], [2, 2, 1, 1])


@every_kernel
@pytest.mark.parametrize("name", ["many_labels", "tiles_scaled"])
@pytest.mark.parametrize(("precision", "unit"), [("tf32", 2.0**-9), ("bfloat16", 2.0**-8)])
def test_products_are_as_precise_as_was_asked_for(implementation, name, precision, unit):
    case = BY_NAME[name]
    arrays, cotangent = operands(case), draw_cotangent(case)
    found, gradients = value_and_gradients(
        case, arrays, cotangent, implementation=implementation, precision=precision
    )
    exact = functools.partial(oracles.pair_message, **arrays._asdict(), **case.static)
    assert_within_rounding(found, exact(), exact(magnitude=True), 1.1, unit)
    exact = functools.partial(
        oracles.pair_message_vjp, **arrays._asdict(), **case.static, cotangent=cotangent
    )
    jax.tree.map(
        lambda g, w, s: assert_within_rounding(g, w, s, 1.1, unit),
        gradients,
        Operands(*exact()),
        Operands(*exact(magnitude=True)),
    )
    # It is honoured: less is computed than float32 would be, but for TPUs, which have no TF32.
    full, _ = value_and_gradients(case, arrays, cotangent, implementation=implementation)
    error = np.abs(np.asarray(found - full)).max() / np.abs(full).max()
    assert (error < 1e-6) == (implementation == "tpu" and precision == "tf32")
    assert error < unit


@pytest.mark.parametrize("precision", api.PRECISIONS)
@pytest.mark.parametrize(
    ("platform", "kind", "custom_call"),
    [("cuda", "NVIDIA A100", "__gpu$xla.gpu.triton"), ("tpu", "TPU v5 lite", "tpu_custom_call")],
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_every_precision_is_lowered(platform, kind, custom_call, precision):
    case = BY_NAME["merged_scaled"]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands(case))

    def both(cotangent, *xs):
        def value(*xs):
            return pair_message(**Operands(*xs)._asdict(), **case.static, precision=precision, tolerance=1e-6)

        found, pull = jax.vjp(value, *xs)
        return found, pull(cotangent)

    abstract = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract)):
        text = jax.jit(both).trace(shapes.q, *shapes).lower(lowering_platforms=(platform,)).as_text()
    # The message, whose function is also that of its transpose, and the other gradients.
    assert text.count(f"@{custom_call}(") == 2


def test_the_reference_is_more_precise_than_it_has_to_be():
    case = BY_NAME["many_labels"]
    run = functools.partial(pair_message, **operands(case)._asdict(), implementation="xla")
    for precision in api.PRECISIONS:
        np.testing.assert_array_equal(run(precision=precision), run())


@pytest.mark.parametrize(
    "tile",
    [
        triton_gpu.TritonConfig(16, 16, 16, 16, run=1, num_warps=4, num_stages=1),
        triton_gpu.TritonConfig(64, 32, 16, 16, run=3, num_warps=4, num_stages=2),
        triton_gpu.TritonConfig(128, 64, 64, 32, run=2, num_warps=8, num_stages=3),
    ],
    ids=str,
)
def test_the_sizes_of_the_triton_kernel_do_not_matter(tile):
    case = Case("sizes", (9, 21), labels=21, feature_sizes=(2, 1), scaled=True)
    arrays, cotangent = operands(case), draw_cotangent(case)
    config, needs = (
        reference.PairConfig(case.spatial, case.cutoff),
        Needs(False, True, True, *[case.scaled] * 2),
    )
    MESSAGE.assert_value(case, triton_gpu._forward(config, tile, True, arrays), arrays)
    found = triton_gpu._backward(config, needs, tile, True, arrays, cotangent)
    exact = functools.partial(MESSAGE.exact_vjp, **arrays._asdict(), **case.static, cotangent=cotangent)
    expected, magnitude, depths = exact(), exact(magnitude=True), MESSAGE.depths(case)
    assert set(found) == {operand for operand, needed in needs._asdict().items() if needed}
    for operand, gradient in found.items():
        for g, w, s in zip(
            *map(jax.tree.leaves, (gradient, getattr(expected, operand), getattr(magnitude, operand))),
            strict=True,
        ):
            assert_within_rounding(g, w, s, getattr(depths, operand))


@pytest.mark.parametrize("pixels", [1, 100, 12000, 187500])
@pytest.mark.parametrize("labels", [1, 21, 150, 1000])
@pytest.mark.parametrize("features", [0, 5, 11, 256])
def test_the_heuristic_of_triton_stays_within_limits(pixels, labels, features):
    for cutoff in (False, True):
        tile = triton_gpu.configuration(pixels, labels, features, cutoff=cutoff)
        for size in (tile.rows, tile.block, tile.columns, tile.labels):
            assert size >= 16  # the least that tensor cores take
            assert size & (size - 1) == 0
        assert tile.block % tile.columns == tile.rows % tile.block == 0
        assert tile.rows == tile.block or not cutoff
        assert tile.num_warps in (4, 8, 16)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"precision": "float16"}, "precision: got 'float16'; expected one of 'float32', 'tf32', 'bfloat16'"),
        ({"precision": None}, "precision: got None"),
        ({"tolerance": -1e-3}, r"tolerance: got -0.001; expected a number in \[0, 1\)"),
        ({"tolerance": 1.0}, "tolerance: got 1.0"),
        ({"tolerance": math.nan}, "tolerance: got nan"),
    ],
)
def test_bad_accuracy_says_what_to_do(bad, error):
    with pytest.raises(ValueError, match=error):
        pair_message(jnp.ones((1, 4, 2)), [jnp.ones((1, 4, 1))], jnp.ones(1), **bad)


@every_kernel
def test_what_is_too_much_is_said(implementation):
    module = api.OPERATION.module(implementation)
    config = reference.PairConfig((4,), None)

    def reason(kernels, size):
        f = tuple(jnp.zeros((1, 4, size)) for _ in range(kernels))
        return module.unsupported(config, Operands(jnp.zeros((1, 4, 2)), f, jnp.ones(kernels), None, None))

    assert reason(4, 8) is None
    assert "40 kernels; it takes up to" in reason(40, 1)
    assert "300 features; it takes up to" in reason(1, 300)
