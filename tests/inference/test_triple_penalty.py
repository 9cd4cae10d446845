"""The triple penalty and local convolutions against a plain float64 loop, and what they promise about gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from jaxcrf.inference.local_convolution import (
    Reach,
    Streamed,
    _tap_by_tap,
    _tap_by_tap_transposed,
    stream_taps,
)
from jaxcrf.inference.triple_penalty import _stream_boxes

EPSILON = float(np.finfo(np.float32).eps)
WEIGHTS = {"color_weight": 1e-3, "position_weight": 0.05}
METHODS = ["box", "window"]


def operands(height, width, labels, channels=3, batch=(), seed=0):
    rng = np.random.default_rng(seed)
    probs = rng.random((*batch, height, width, labels)).astype(np.float32)
    return probs, rng.integers(0, 256, (*batch, height, width, channels)).astype(np.uint8)


def distances(image, color_weight, position_weight):
    """`d(j, z)` of all pairs of pixels, float64."""
    height, width = image.shape[:2]
    colours = np.asarray(image, np.float64).reshape(height * width, -1)
    positions = np.mgrid[:height, :width].reshape(2, -1).T.astype(np.float64)

    def squares(f):
        return ((f[:, None] - f[None]) ** 2).sum(-1)

    return color_weight * squares(colours) + position_weight * squares(positions)


def inside(height, width, window):
    """Which pixels lie in the window of which, row by row; an even window has one more before its centre."""
    window = np.broadcast_to(window, 2)
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    found = np.ones((height * width,) * 2, bool)
    for at, size in ((y, window[0]), (x, window[1])):
        step = at[None] - at[:, None]
        found &= (step >= -(size // 2)) & (step < size - size // 2)
    return found


def by_hand(probs, image, window, color_weight, position_weight, multiply_center=True):
    """The definition, with a matrix of all pairs."""
    height, width, labels = probs.shape
    p = np.asarray(probs, np.float64).reshape(-1, labels)
    matrix = distances(image, color_weight, position_weight) * inside(height, width, window)
    found = matrix @ p
    return (p * found if multiply_center else found).reshape(probs.shape)


CASES = [
    # height, width, labels, channels, window
    pytest.param(9, 12, 3, 3, 5, id="odd window"),
    pytest.param(9, 12, 2, 1, 6, id="even window, one channel"),
    pytest.param(4, 3, 1, 5, 50, id="window larger than the image, one label, five channels"),
    pytest.param(60, 55, 2, 3, (3, 8), id="several tiles, window of two sizes"),
    pytest.param(1, 9, 2, 3, 4, id="one row", marks=pytest.mark.exhaustive),
    pytest.param(101, 3, 2, 3, 2, id="three tiles down", marks=pytest.mark.exhaustive),
    pytest.param(10, 130, 4, 2, 13, id="tiles across", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("height", "width", "labels", "channels", "window"), CASES)
def test_it_is_the_definition(method, height, width, labels, channels, window):
    probs, image = operands(height, width, labels, channels)
    for multiply_center in (True, False):
        found = jaxcrf.triple_penalty(
            probs, image, window=window, multiply_center=multiply_center, method=method, **WEIGHTS
        )
        expected = by_hand(probs, image, window, multiply_center=multiply_center, **WEIGHTS)
        # Sums of squares up to tile² against those of the window, of up to some thousand terms.
        np.testing.assert_allclose(found, expected, atol=100 * EPSILON * expected.max())


@pytest.mark.parametrize("method", METHODS)
def test_float64_in_and_out(method):
    probs, image = operands(7, 9, 2)
    expected = float64_gradients(probs, image, 4, *WEIGHTS.values(), np.ones(probs.shape))[0]
    with jax.enable_x64(True):
        found = jax.grad(lambda p: jaxcrf.triple_penalty(p, image, window=4, method=method, **WEIGHTS).sum())(
            probs.astype(np.float64)
        )
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_position_and_colour_alone(method):
    probs, image = operands(9, 12, 2)
    for weights in (
        {"color_weight": 2.0, "position_weight": 0},
        {"color_weight": 0, "position_weight": -3.0},
    ):
        found = jaxcrf.triple_penalty(probs, image, window=6, method=method, **weights)
        expected = by_hand(probs, image, 6, **weights)
        np.testing.assert_allclose(found, expected, atol=100 * EPSILON * np.abs(expected).max())


@pytest.mark.parametrize("method", METHODS)
def test_a_window_of_one_pixel_is_no_penalty(method):
    probs, image = operands(5, 4, 2)
    found, gradients = jax.value_and_grad(
        lambda *x: jaxcrf.triple_penalty(*x, window=1, method=method, **WEIGHTS).sum(), (0, 1)
    )(probs, image.astype(np.float32))
    assert found == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_batches_are_loops_and_images_may_be_shared():
    probs, image = operands(6, 5, 2, batch=(2, 2))
    found = jaxcrf.triple_penalty(probs, image, window=4, **WEIGHTS)
    shared = jaxcrf.triple_penalty(probs, image[0, 1], window=4, **WEIGHTS)
    one = jax.jit(lambda p, i: jaxcrf.triple_penalty(p, i, window=4, **WEIGHTS))
    for b in np.ndindex(2, 2):
        np.testing.assert_allclose(found[b], one(probs[b], image[b]), rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(shared[b], one(probs[b], image[0, 1]), rtol=1e-4, atol=1e-2)
    assert jaxcrf.triple_penalty(probs[0, 0], image, window=4, **WEIGHTS).shape == probs.shape
    mapped = jax.vmap(one)(probs[0], image[0])
    np.testing.assert_allclose(mapped, found[0], rtol=1e-4, atol=1e-2)


def test_images_without_channels_have_one():
    probs, image = operands(6, 5, 2, channels=1)
    expected = jaxcrf.triple_penalty(probs, image, window=4, **WEIGHTS)
    np.testing.assert_array_equal(jaxcrf.triple_penalty(probs, image[..., 0], window=4, **WEIGHTS), expected)


def float64_gradients(probs, image, window, color_weight, position_weight, cotangent):
    """Of `⟨cotangent, p ⊙ (D p)⟩`, differentiated by hand."""
    height, width, labels = probs.shape
    p = np.asarray(probs, np.float64).reshape(-1, labels)
    colours = np.asarray(image, np.float64).reshape(len(p), -1)
    near = inside(height, width, window)
    matrix = distances(image, color_weight, position_weight) * near
    g = np.asarray(cotangent, np.float64).reshape(-1, labels)
    agreement = near * ((g * p) @ p.T)
    of_colours = 2 * color_weight * (agreement + agreement.T)
    return (
        (g * (matrix @ p) + matrix.T @ (g * p)).reshape(probs.shape),
        (of_colours.sum(1)[:, None] * colours - of_colours @ colours).reshape(image.shape),
        (agreement * distances(image, 1, 0)).sum(),
        (agreement * distances(image, 0, 1)).sum(),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("height", "width", "window"),
    [
        (7, 9, 4),
        pytest.param(7, 9, 50, marks=pytest.mark.exhaustive),
        pytest.param(51, 60, 6, marks=pytest.mark.exhaustive),
    ],
)
def test_gradients_are_those_of_float64(method, height, width, window):
    probs, image = operands(height, width, 3)
    image = image.astype(np.float32)
    cotangent = np.random.default_rng(1).normal(size=probs.shape).astype(np.float32)

    def loss(probs, image, color_weight, position_weight):
        found = jaxcrf.triple_penalty(
            probs,
            image,
            window=window,
            color_weight=color_weight,
            position_weight=position_weight,
            method=method,
        )
        return jnp.vdot(cotangent, found)

    found = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(probs, image, *WEIGHTS.values())
    expected = float64_gradients(probs, image, window, *WEIGHTS.values(), cotangent)
    magnitude = float64_gradients(probs, image, window, *WEIGHTS.values(), np.abs(cotangent))
    for ours, exact, size in zip(found, expected, magnitude, strict=True):
        np.testing.assert_allclose(ours, exact, atol=100 * EPSILON * np.abs(size).max())


def test_the_float64_gradients_are_finite_differences():
    """Of the oracle itself, since float32 leaves too few digits for differences."""
    probs, image = operands(4, 5, 2)
    image, cotangent = image.astype(np.float64), np.random.default_rng(1).normal(size=probs.shape)
    point = [probs.astype(np.float64), image, *WEIGHTS.values()]

    def value(probs, image, *weights):
        return (cotangent * by_hand(probs, image, 3, *weights)).sum()

    expected = float64_gradients(point[0], image, 3, *WEIGHTS.values(), cotangent)
    for n, gradient in enumerate(expected):
        direction = np.random.default_rng(n).normal(size=np.shape(point[n]))
        ends = [value(*point[:n], point[n] + sign * 1e-4 * direction, *point[n + 1 :]) for sign in (1, -1)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-4, (gradient * direction).sum(), rtol=1e-7)


@pytest.mark.parametrize(
    "wanted", [(True, True, True), pytest.param((True, False, False), marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("stream", [_stream_boxes, stream_taps])
def test_whole_images_at_once_are_the_same(stream, wanted):
    """The form for accelerators, which a CPU does not take."""
    probs, image = operands(53, 20, 2, batch=(2,))
    reach, weights = Reach.of((4, 5)), jnp.array(list(WEIGHTS.values()), jnp.float32)
    arrays = (probs, image.astype(np.float32), weights, probs[::-1].copy())
    by_row, whole = (
        jax.jit(stream, static_argnums=(0, 1, 2))(reach, Streamed(*wanted), rows, *arrays)
        for rows in (True, False)
    )
    assert len(jax.tree.leaves(whole)) == sum(wanted)
    for a, b in zip(jax.tree.leaves(by_row), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=100 * EPSILON * np.abs(b).max())


@pytest.mark.exhaustive
@pytest.mark.optimized
def test_the_box_form_is_exact_at_the_papers_size():
    """Relative error at most 1e-4 at 512 × 512 and window 50, of colours with a large offset, against float64."""
    probs, image = operands(512, 512, 2)
    image = np.asarray(image / 8 + 200, np.float32)
    found = jaxcrf.triple_penalty(probs, image, window=50, multiply_center=False, **WEIGHTS)
    largest = float(found.max())
    exact = np.asarray(image, np.float64)
    for y, x in np.random.default_rng(0).integers(0, 512, (200, 2)):
        rows, columns = (slice(max(0, n - 25), n + 25) for n in (y, x))
        at_y, at_x = np.mgrid[rows.start : min(512, y + 25), columns.start : min(512, x + 25)]
        d = WEIGHTS["color_weight"] * ((exact[rows, columns] - exact[y, x]) ** 2).sum(-1)
        d += WEIGHTS["position_weight"] * ((at_y - y) ** 2 + (at_x - x) ** 2)
        expected = (d[..., None] * probs[rows, columns].astype(np.float64)).sum((0, 1))
        np.testing.assert_allclose(found[y, x], expected, rtol=1e-4)
        np.testing.assert_allclose(found[y, x], expected, atol=2e-5 * largest)


# Local convolutions with filters of one's own.


def filters_by_hand(probs, filters, window):
    """`Σ_z k_j(z - j) p_z`, a loop over taps."""
    height, width, _ = probs.shape
    sizes = np.broadcast_to(window, 2)
    found = np.zeros(probs.shape)
    filters = np.broadcast_to(filters, (height, width, sizes.prod())).astype(np.float64)
    for y in range(height):
        for x in range(width):
            for tap in range(sizes.prod()):
                at_y, at_x = y + tap // sizes[1] - sizes[0] // 2, x + tap % sizes[1] - sizes[1] // 2
                if 0 <= at_y < height and 0 <= at_x < width:
                    found[y, x] += filters[y, x, tap] * probs[at_y, at_x]
    return found


@pytest.mark.parametrize("own", [True, False], ids=["a filter for every pixel", "one for all"])
def test_local_convolutions_and_their_gradients(own):
    rng, window = np.random.default_rng(0), (3, 4)
    probs = rng.normal(size=(2, 5, 6, 2)).astype(np.float32)
    filters = rng.normal(size=(5, 6, 12) if own else (12,)).astype(np.float32)
    cotangent = rng.normal(size=probs.shape).astype(np.float32)

    def apply(probs, filters):
        return jaxcrf.local_convolution(probs, filters, window=window, multiply_center=False)

    value, pull = jax.vjp(jax.jit(apply), probs, filters)
    np.testing.assert_allclose(value, [filters_by_hand(p, filters, window) for p in probs], atol=1e-5)
    # It is bilinear: ⟨g, K(k, p)⟩ = ⟨∂p, p'⟩ at p = p', and the same for k.
    of_probs, of_filters = pull(cotangent)
    other, other_filters = (rng.normal(size=x.shape) for x in (probs, filters))
    expected = sum(
        (g * filters_by_hand(p, filters, window)).sum() for g, p in zip(cotangent, other, strict=True)
    )
    np.testing.assert_allclose((of_probs * other).sum(), expected, atol=1e-3)
    expected = sum(
        (g * filters_by_hand(p, other_filters, window)).sum() for g, p in zip(cotangent, probs, strict=True)
    )
    np.testing.assert_allclose((of_filters * other_filters).sum(), expected, atol=1e-3)
    batched = np.stack([filters, 2 * filters]) if own else filters
    scaled = jaxcrf.local_convolution(probs, batched, window=window)
    factor = np.array([1, 2])[:, None, None, None] if own else 1
    np.testing.assert_allclose(scaled, probs * value * factor, atol=1e-4)


def test_distances_as_filters_are_the_triple_penalty():
    probs, image = operands(5, 6, 2)
    image = image.astype(np.float64)
    matrix = (distances(image, *WEIGHTS.values())).reshape(5, 6, 5, 6)
    filters = np.zeros((5, 6, 16), np.float32)
    for y, x, tap in np.ndindex(filters.shape):
        at_y, at_x = y + tap // 4 - 2, x + tap % 4 - 2
        if 0 <= at_y < 5 and 0 <= at_x < 6:
            filters[y, x, tap] = matrix[y, x, at_y, at_x]
    found = jaxcrf.local_convolution(probs, filters, window=4)
    expected = jaxcrf.triple_penalty(probs, image.astype(np.float32), window=4, **WEIGHTS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.exhaustive
def test_filters_of_whole_images_at_once_are_the_same():
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(2, 5, 6, 2)), jnp.float32) for _ in range(2))
    for shape in ((2, 5, 6, 12), (1, 1, 1, 12)):
        k, reach = jnp.asarray(rng.normal(size=shape), jnp.float32), Reach.of((3, 4))
        x, g = x[: shape[0]], g[: shape[0]]
        for run, arrays in ((_tap_by_tap, (x, k)), (_tap_by_tap_transposed, (x, k, g))):
            by_row, whole = (run(reach, rows, *arrays) for rows in (True, False))
            for a, b in zip(jax.tree.leaves(by_row), jax.tree.leaves(whole), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window: got 0"),
        ({"window": 2.5}, "window: got 2.5"),
        ({"window": (3, 3, 3)}, "window: got"),
        ({"method": "fast"}, "method: got 'fast'; expected one of box, window"),
        ({"color_weight": np.ones(3)}, r"color_weight: got shape \(3,\)"),
        ({"position_weight": np.nan}, "position_weight: holds NaN"),
        ({"probs": np.full((4, 5, 2), np.nan, np.float32)}, "probs: holds NaN"),
        ({"probs": np.ones((4, 5, 2), np.int32)}, "probs: got dtype int32"),
        ({"probs": np.ones((4, 5), np.float32)}, "probs: got shape"),
        ({"probs": np.ones((4, 5, 0), np.float32)}, "probs: got shape"),
        ({"image": np.ones((5, 4, 3), np.float32)}, "image: got shape .* Resize"),
        ({"image": np.full((4, 5, 3), np.inf, np.float32)}, "image: holds NaN"),
        ({"image": np.ones((4, 5, 0), np.float32)}, "image: got shape"),
        ({"image": np.ones((4, 5, 3), bool)}, "image: got dtype bool"),
        ({"probs": np.ones((2, 4, 5, 2), np.float32), "image": np.ones((3, 4, 5, 1))}, "probs: its batch"),
    ],
)
def test_bad_input_is_an_error(changes, message):
    probs, image = operands(4, 5, 2)
    arguments = {"probs": probs, "image": image, "window": 3, **WEIGHTS} | changes
    with pytest.raises(ValueError, match=message):
        jaxcrf.triple_penalty(**arguments)


def test_filters_that_do_not_fit_are_errors():
    probs, _ = operands(4, 5, 2)
    for shape in ((10,), (4, 5, 10), (5, 4, 9), (5, 9)):
        with pytest.raises(ValueError, match="filters: got shape"):
            jaxcrf.local_convolution(probs, np.ones(shape, np.float32), window=3)
    with pytest.raises(ValueError, match="filters: holds NaN"):
        jaxcrf.local_convolution(probs, np.full(9, np.nan, np.float32), window=3)
