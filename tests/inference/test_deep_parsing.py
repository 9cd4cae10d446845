"""The deep parsing step against a plain float64 loop, and its special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from jaxcrf import DeepParsingParams

EPSILON = float(np.finfo(np.float32).eps)
SHAPE, LABELS, WINDOW = (5, 6), 3, 4


def operands(seed=0, shape=SHAPE, labels=LABELS, channels=3):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(labels), shape).astype(np.float32)
    return probs, rng.uniform(0, 255, (*shape, channels)).astype(np.float32)


def parameters(size=3, mixture=2, labels=LABELS, seed=0):
    rng = np.random.default_rng(seed)
    return DeepParsingParams(
        *(np.float32(x) for x in (3e-6, 2e-3, 1.5, -0.1)),
        rng.normal(size=(size, size, labels, labels, mixture)).astype(np.float32),
        rng.normal(size=(labels, mixture)).astype(np.float32),
    )


def triples(q, image, params, multiply_center=True):
    """b12 before its activation, of all pairs of pixels."""
    height, width, labels = q.shape
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    steps = np.stack([y[None] - y[:, None], x[None] - x[:, None]])
    near = ((steps >= -(WINDOW // 2)) & (steps < WINDOW - WINDOW // 2)).all(0)
    colours = np.asarray(image, np.float64).reshape(height * width, -1)
    d = float(params.color_weight) * ((colours[:, None] - colours[None]) ** 2).sum(-1)
    d = (d + float(params.position_weight) * (steps**2).sum(0)) * near
    flat = q.reshape(-1, labels)
    return ((flat if multiply_center else 1) * (d @ flat)).reshape(q.shape)


def by_hand(probs, image, params, multiply_center=True, num_iterations=1):
    """Equation 7 with its sums written out."""
    p = np.asarray(probs, np.float64)
    contexts = np.asarray(params.contexts, np.float64)
    (height, width), reach = p.shape[:2], contexts.shape[0] // 2
    q = p
    for _ in range(num_iterations):
        s = float(params.scale) * triples(q, image, params, multiply_center) + float(params.offset)
        logits = np.log(np.maximum(p, 1e-5))
        for i in np.ndindex(height, width):
            penalties = np.asarray(params.context_offset, np.float64)
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    y, x = i[0] + dy, i[1] + dx
                    if 0 <= y < height and 0 <= x < width:
                        penalties = penalties + np.einsum(
                            "v,vuk->uk", s[y, x], contexts[dy + reach, dx + reach]
                        )
            logits[i] -= penalties.min(-1)
        q = np.exp(logits - logits.max(-1, keepdims=True))
        q /= q.sum(-1, keepdims=True)
    return q


@pytest.mark.parametrize(
    ("options", "size", "mixture"),
    [
        ({}, 3, 2),
        ({"multiply_center": False, "method": "window"}, 5, 1),
        ({"num_iterations": 4}, 3, 3),
        pytest.param({"num_iterations": 2}, 1, 2, marks=pytest.mark.exhaustive),
        pytest.param({"method": "window"}, 9, 5, marks=pytest.mark.exhaustive),
    ],
)
def test_it_is_the_float64_loop(options, size, mixture):
    probs, image = operands()
    params = parameters(size, mixture)
    found = jaxcrf.deep_parsing_step(probs, image, params, window=WINDOW, **options)
    expected = by_hand(probs, image, params, **{k: v for k, v in options.items() if k != "method"})
    np.testing.assert_allclose(found.probs, expected, atol=1000 * EPSILON)
    np.testing.assert_allclose(found.probs.sum(-1), 1, atol=4 * EPSILON)
    np.testing.assert_allclose(
        found.logits, np.log(np.maximum(probs, 1e-5)) - found.penalty, atol=10 * EPSILON
    )
    if "num_iterations" not in options:
        triple = triples(probs.astype(np.float64), image, params, options.get("multiply_center", True))
        expected = float(params.scale) * triple + float(params.offset)
        np.testing.assert_allclose(found.triple, expected, atol=1000 * EPSILON)


@pytest.mark.parametrize("multiply_center", [True, False], ids=["first line", "second line"])
def test_one_context_of_one_pixel_is_equation_10(multiply_center):
    """The second line is the mean-field update of an ordinary CRF with the label compatibility `μ` and `d`."""
    probs, image = operands()
    mu = np.array([[0, 1, 0.5], [1, 0, 0.2], [0.4, 0.3, 0.1]])  # penalty of u (rows) beside v
    params = parameters(1, 1)._replace(
        scale=1.0,
        offset=0.0,
        contexts=mu.T[None, None, :, :, None].astype(np.float32),
        context_offset=np.zeros((LABELS, 1), np.float32),
    )
    found = jaxcrf.deep_parsing_step(
        probs, image, params, window=WINDOW, multiply_center=multiply_center
    ).probs
    p = probs.astype(np.float64)
    weights = np.exp(np.log(p) - triples(p, image, params, multiply_center) @ mu.T)
    np.testing.assert_allclose(found, weights / weights.sum(-1, keepdims=True), atol=1000 * EPSILON)
    if multiply_center:
        return
    # And where the window reaches over the whole image, from d = |f_j|² + |f_z|² - 2 f_j · f_z.
    width = 2 * max(SHAPE)
    found = jaxcrf.deep_parsing_step(probs, image, params, window=width, multiply_center=False).probs
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    features = np.concatenate(
        [
            np.sqrt(3e-6) * (image - image.mean((0, 1))),
            np.sqrt(2e-3) * np.stack([y - y.mean(), x - x.mean()], -1),
        ],
        -1,
    )
    flat, f = p.reshape(-1, LABELS), features.reshape(-1, features.shape[-1])
    message = (f**2).sum(-1)[:, None] * flat.sum(0) + ((f**2).sum(-1) @ flat) - 2 * f @ (f.T @ flat)
    weights = np.exp(np.log(flat) - message @ mu.T).reshape(probs.shape)
    np.testing.assert_allclose(found, weights / weights.sum(-1, keepdims=True), atol=1000 * EPSILON)


def test_gradients_are_those_of_finite_differences():
    probs, image = operands()
    params = parameters()
    cotangent = np.random.default_rng(1).normal(size=probs.shape)

    def loss(probs, image, params):
        result = jaxcrf.deep_parsing_step(probs, image, params, window=WINDOW, num_iterations=2)
        return jnp.vdot(cotangent.astype(np.float32), result.probs)

    found = jax.jit(jax.grad(loss, (0, 1, 2)))(probs, image, params)
    point = jax.tree.map(lambda x: np.asarray(x, np.float64), (probs, image, params))
    leaves, structure = jax.tree.flatten(point)
    for n, gradient in enumerate(jax.tree.leaves(found)):
        direction = np.random.default_rng(n).normal(size=leaves[n].shape) * np.abs(leaves[n]).mean()
        ends = []
        for step in (1e-5, -1e-5):  # short, so that the same contexts stay the least
            moved = [x + step * direction if m == n else x for m, x in enumerate(leaves)]
            ends.append((cotangent * by_hand(*jax.tree.unflatten(structure, moved), num_iterations=2)).sum())
        difference = (ends[0] - ends[1]) / 2e-5
        # Rounding in float32 is 1e-6 of the sum of absolute values of what is summed up here.
        size = np.abs(np.asarray(gradient) * direction).sum()
        np.testing.assert_allclose((gradient * direction).sum(), difference, atol=2e-4 * size)


def test_one_label_stays_and_batches_are_loops():
    probs, image = operands(labels=1, channels=1)
    found = jaxcrf.deep_parsing_step(probs, image[..., 0], parameters(labels=1), window=50)
    np.testing.assert_array_equal(found.probs, 1)
    pairs = [operands(seed) for seed in range(2)]
    step = jax.jit(lambda p, i: jaxcrf.deep_parsing_step(p, i, parameters(), window=WINDOW))
    found = step(*(np.stack(x) for x in zip(*pairs, strict=True)))
    assert found.probs.shape == (2, *SHAPE, LABELS)
    for b, pair in enumerate(pairs):
        for one, many in zip(step(*pair), found, strict=True):
            np.testing.assert_allclose(many[b], one, atol=1000 * EPSILON)


def test_probabilities_of_zero_are_believed_to_a_limit():
    probs = np.zeros((*SHAPE, LABELS), np.float32)
    probs[..., 0] = 1
    image = operands()[1]
    found, gradient = jax.value_and_grad(
        lambda p: jaxcrf.deep_parsing_step(p, image, parameters(), window=WINDOW).probs[..., 1].sum()
    )(probs)
    assert np.isfinite(found)
    assert np.isfinite(gradient).all()


def test_initial_parameters():
    params = jaxcrf.deep_parsing_init(
        jax.random.key(0), LABELS, num_contexts=4, context_size=7, window=WINDOW, deviation=0.5
    )
    assert params.contexts.shape == (7, 7, LABELS, LABELS, 4)
    np.testing.assert_allclose(params.contexts.std(), 0.5, rtol=0.1)
    probs, image = operands()
    largest = jaxcrf.deep_parsing_step(np.ones_like(probs), image, params, window=WINDOW).triple.max()
    assert 0.1 < largest < 1
    for name in ("num_contexts", "context_size", "deviation"):
        with pytest.raises(ValueError, match=f"{name}: got -1"):
            jaxcrf.deep_parsing_init(jax.random.key(0), LABELS, **{name: -1})
    with pytest.raises(ValueError, match="context_size: got 4; expected an odd number"):
        jaxcrf.deep_parsing_init(jax.random.key(0), LABELS, context_size=4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"params": parameters()._asdict()}, TypeError, "params: got dict"),
        ({"num_iterations": 0}, ValueError, "num_iterations: got 0"),
        ({"probs": np.full((*SHAPE, LABELS), -0.5, np.float32)}, ValueError, "probs: hold negative values"),
        ({"probs": np.full((*SHAPE, LABELS), np.nan, np.float32)}, ValueError, "probs: holds NaN"),
        ({"probs": np.ones((*SHAPE, 2), np.float32)}, ValueError, r"params.contexts: got shape .* 2 labels"),
        ({"params": parameters(4)}, ValueError, "params.contexts: got shape .* odd size"),
        (
            {"params": parameters()._replace(context_offset=np.zeros((LABELS, 3)))},
            ValueError,
            "params.context_offset: got shape",
        ),
        ({"params": parameters()._replace(scale=np.ones(2))}, ValueError, "params.scale: got shape"),
        ({"params": parameters()._replace(offset=np.nan)}, ValueError, "params.offset: holds NaN"),
        ({"image": np.ones((6, 5, 3), np.float32)}, ValueError, "image: got shape"),
    ],
)
def test_bad_input_is_an_error(changes, error, message):
    probs, image = operands()
    arguments = {"probs": probs, "image": image, "params": parameters(), "window": WINDOW} | changes
    with pytest.raises(error, match=message):
        jaxcrf.deep_parsing_step(**arguments)
