"""Losses, against float64 loops over pixels and finite differences of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from jaxcrf.training import losses

LABELS = 4
IGNORE = 255


def example(seed=0, shape=(2, 3, 5), scale=2.0):
    """Logits and labels; about one pixel in four is ignored."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (*shape, LABELS)).astype(np.float32)
    labels = rng.integers(0, LABELS, shape)
    return logits, np.where(rng.random(shape) < 0.25, IGNORE, labels)


def pixels(logits, labels, pixel_weights=None):
    """The pixels that count: probabilities, label and weight."""
    weights = np.ones(labels.shape) if pixel_weights is None else np.asarray(pixel_weights, np.float64)
    for at in np.ndindex(labels.shape):
        if labels[at] != IGNORE:
            yield oracles.softmax(np.asarray(logits[at], np.float64)), labels[at], weights[at]


def cross_entropy(logits, labels, class_weights=None, pixel_weights=None, label_smoothing=0.0):
    total = weight = 0.0
    for p, y, a in pixels(logits, labels, pixel_weights):
        target = np.full(len(p), label_smoothing / len(p))
        target[y] += 1 - label_smoothing
        w = a * (1.0 if class_weights is None else class_weights[y])
        total += w * -(target * np.log(p)).sum()
        weight += w
    return total / weight


def expected_error(logits, labels, pixel_weights=None):
    found = [(a * (1 - p[y]), a) for p, y, a in pixels(logits, labels, pixel_weights)]
    return sum(x for x, _ in found) / sum(a for _, a in found)


def overlap(logits, labels, pixel_weights=None, *, form, squared=False):
    found = list(pixels(logits, labels, pixel_weights))
    scores = []
    for label in {y for _, y, a in found if a}:
        both = sum(a * p[label] for p, y, a in found if y == label)
        true = sum(a for _, y, a in found if y == label)
        predicted = sum(a * p[label] ** (2 if squared else 1) for p, _, a in found)
        scores.append(both / (predicted + true - both) if form == "iou" else 2 * both / (predicted + true))
    return 1 - np.mean(scores)


WEIGHTS = np.array([0.5, 2.0, 1.0, 3.0], np.float32)
PIXEL_WEIGHTS = np.random.default_rng(9).random((2, 3, 5)).astype(np.float32)
CASES = {
    "cross-entropy": (losses.cross_entropy, cross_entropy, {}),
    "cross-entropy, weighted": (
        losses.cross_entropy,
        cross_entropy,
        {"class_weights": WEIGHTS, "pixel_weights": PIXEL_WEIGHTS},
    ),
    "cross-entropy, smoothed": (losses.cross_entropy, cross_entropy, {"label_smoothing": 0.1}),
    "expected error": (losses.expected_error, expected_error, {"pixel_weights": PIXEL_WEIGHTS}),
    "soft IoU": (losses.soft_iou, lambda *a, **k: overlap(*a, **k, form="iou"), {}),
    "soft IoU, weighted": (
        losses.soft_iou,
        lambda *a, **k: overlap(*a, **k, form="iou"),
        {"pixel_weights": PIXEL_WEIGHTS},
    ),
    "dice": (losses.dice, lambda *a, **k: overlap(*a, **k, form="dice"), {}),
    "dice, squared": (
        losses.dice,
        lambda *a, **k: overlap(*a, **k, form="dice"),
        {"squared": True, "pixel_weights": PIXEL_WEIGHTS},
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def finite_differences(function, x, step=1e-5):
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            gradient[at] += sign * function(moved) / (2 * step)
    return gradient


@every_case
def test_values_and_gradients_are_those_of_a_float64_loop(case):
    loss, oracle, options = CASES[case]
    logits, labels = example()
    value, gradient = jax.jit(jax.value_and_grad(lambda z: loss(z, labels, **options)))(logits)
    # A few roundings of float32 in sums of 30 terms of order one.
    np.testing.assert_allclose(value, oracle(logits, labels, **options), rtol=2e-6)
    expected = finite_differences(lambda z: oracle(z, labels, **options), logits)
    # Differences of float64 with steps of 1e-5 are good to some 1e-10.
    np.testing.assert_allclose(gradient, expected, atol=2e-7)
    assert np.abs(gradient).max() > 1e-3
    assert not gradient[labels == IGNORE].any()


def test_cross_entropy_is_that_of_optax():
    optax = pytest.importorskip("optax")
    logits, labels = example()
    labels = np.where(labels == IGNORE, 0, labels)
    terms = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), terms.mean(), rtol=1e-6)
    total = losses.cross_entropy(logits, labels, reduction="sum")
    np.testing.assert_allclose(total, terms.sum(), rtol=1e-6)


def test_a_sum_over_pixels_is_not_divided_by_weights():
    logits, labels = example()
    options = {"class_weights": WEIGHTS, "pixel_weights": PIXEL_WEIGHTS}
    mean = losses.cross_entropy(logits, labels, **options)
    total = losses.cross_entropy(logits, labels, **options, reduction="sum")
    weight = sum(a * WEIGHTS[y] for _, y, a in pixels(logits, labels, PIXEL_WEIGHTS))
    np.testing.assert_allclose(total, mean * weight, rtol=1e-6)


def test_class_weights_count_by_their_ratios_only():
    logits, labels = example()
    once, thrice = (losses.cross_entropy(logits, labels, class_weights=k * WEIGHTS) for k in (1, 3))
    np.testing.assert_allclose(once, thrice, rtol=1e-6)


PLAIN = {name: case[0] for name, case in CASES.items() if not case[2]} | {
    "expected error": losses.expected_error,
    "smoothed": lambda *a, **k: losses.cross_entropy(*a, **k, label_smoothing=0.1),
}


@functools.cache
def graded(loss):
    """A loss with its gradient; compiled once for all tests of one shape."""
    return jax.jit(jax.value_and_grad(loss))


every_loss = pytest.mark.parametrize("loss", PLAIN.values(), ids=PLAIN.keys())


@every_loss
def test_nothing_to_learn_from_is_zero_with_zero_gradients(loss):
    logits, labels = example()
    nothing = graded(loss)(logits, np.full_like(labels, IGNORE))
    unweighted = jax.jit(jax.value_and_grad(functools.partial(loss, pixel_weights=0.0)))(logits, labels)
    for value, gradient in (nothing, unweighted):
        assert value == 0
        assert not gradient.any()
    one_label = np.where(labels == IGNORE, IGNORE, 0)
    value, gradient = graded(loss)(logits[..., :1], one_label)
    assert abs(value) < 1e-6
    assert np.abs(gradient).max() < 1e-6


@every_loss
def test_extreme_logits_keep_values_and_gradients_finite(loss):
    _, labels = example()
    for sign in (1, -1):
        truth = np.where(labels == IGNORE, 0, labels)
        logits = np.where(np.arange(LABELS) == truth[..., None], sign * 1e4, -sign * 1e4).astype(np.float32)
        value, gradient = graded(loss)(logits, labels)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        if sign > 0 and loss is not PLAIN["smoothed"]:
            assert abs(value) < 1e-6


@every_loss
def test_ignored_pixels_may_hold_anything(loss):
    logits, labels = example()
    hidden = np.where((labels == IGNORE)[..., None], np.array([np.nan, np.inf, -np.inf, 1e38]), logits)
    value, gradient = graded(loss)(hidden.astype(np.float32), labels)
    expected, expected_gradient = graded(loss)(logits, labels)
    assert value == expected
    np.testing.assert_array_equal(gradient, expected_gradient)


@every_loss
def test_arithmetic_is_float32_for_bfloat16_logits(loss):
    logits, labels = example()
    stored = jnp.asarray(logits, jnp.bfloat16)
    value, gradient = graded(loss)(stored, labels)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    assert value == graded(loss)(stored.astype(jnp.float32), labels)[0]


@every_loss
def test_vmap_is_a_loop_and_any_leading_axes_will_do(loss):
    logits, labels = example(shape=(3, 2, 3, 5))
    each = [graded(loss)(z, y)[0] for z, y in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(logits, labels), np.stack(each), rtol=1e-5)
    flat = jax.jit(loss)(logits[0].reshape(-1, LABELS), labels[0].reshape(-1))
    np.testing.assert_allclose(each[0], flat, rtol=1e-6)


@every_loss
def test_labels_out_of_range_are_errors_or_nan(loss):
    logits, labels = example()
    for wrong in (LABELS, -1):
        bad = labels.copy()
        bad[0, 0, 0] = wrong
        with pytest.raises(ValueError, match=f"labels: holds label {wrong}; expected 0 to 3 or ignore_label"):
            loss(logits, bad)
        value, gradient = graded(loss)(logits, bad)
        assert np.isnan(value)
        assert np.isnan(gradient).any()
    assert np.isfinite(graded(loss)(logits, labels)[0])


def test_an_ignored_label_may_be_one_of_the_labels_or_none():
    logits, labels = example()
    found = losses.cross_entropy(logits, np.where(labels == IGNORE, 2, labels), ignore_label=2)
    expected = losses.cross_entropy(logits, np.where(labels == 2, IGNORE, labels))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="labels: holds label 255"):
        losses.cross_entropy(logits, labels, ignore_label=None)


def test_labels_that_do_not_occur_have_no_part_in_overlaps():
    logits, labels = example()
    labels = np.where(labels == 3, 0, labels)
    wider = np.concatenate([logits, np.full_like(logits[..., :2], -1e4)], axis=-1)
    for loss in (losses.soft_iou, losses.dice):
        expected = graded(loss)(logits, labels)[0]
        np.testing.assert_allclose(jax.jit(loss)(wider, labels), expected, rtol=1e-6)


def test_auxiliary_terms_are_weighted_and_added():
    logits, labels = example()
    first, second = example(1)[0], example(2)[0]
    main, one, two = (
        cross_entropy(z, labels, class_weights=WEIGHTS).astype(float) for z in (logits, first, second)
    )
    options = {"class_weights": WEIGHTS}
    found = losses.auxiliary_cross_entropy(logits, first, labels, auxiliary_weight=0.4, **options)
    np.testing.assert_allclose(found, main + 0.4 * one, rtol=2e-6)
    for weights in ([0.4, 0.1], np.array([0.4, 0.1])):
        found = losses.auxiliary_cross_entropy(
            logits, [first, second], labels, auxiliary_weight=weights, **options
        )
        np.testing.assert_allclose(found, main + 0.4 * one + 0.1 * two, rtol=2e-6)
    found = losses.auxiliary_cross_entropy(
        logits, [first, second], labels, auxiliary_weight=jnp.float32(2), **options
    )
    np.testing.assert_allclose(found, main + 2 * (one + two), rtol=2e-6)
    with pytest.raises(ValueError, match="auxiliary_weight: got 1 weights for 2"):
        losses.auxiliary_cross_entropy(logits, [first, second], labels, auxiliary_weight=[1.0])


def pairwise_oracle(embeddings, labels, pairs, *, kind, num_labels, competitors):
    """One pair of pixels and one pair of labels after the other."""
    embeddings = np.asarray(embeddings, np.float64)
    images = labels.reshape(-1, labels.shape[-2] * labels.shape[-1])
    flat = embeddings.reshape(*images.shape, *embeddings.shape[labels.ndim :])
    pairs = np.broadcast_to(pairs, (*labels.shape[:-2], *pairs.shape[-2:])).reshape(len(images), -1, 2)
    terms = []
    for image, truth, places in zip(flat, images, pairs, strict=True):
        for p, q in places:
            if IGNORE in (truth[p], truth[q]):
                continue

            def energy(m, n, image=image, p=p, q=q):
                if kind == "general":
                    return image[p, m] @ image[q, n]
                return 0.0 if m == n else image[p] @ image[q]

            terms.append(pair_oracle(energy, truth[p], truth[q], num_labels, competitors))
    return np.mean(terms)


def pair_oracle(energy, first, second, num_labels, competitors):
    """Minus the logarithm of the true labels' share."""
    competing = [
        (m, n)
        for m in range(num_labels)
        for n in range(num_labels)
        if competitors == "any" or (m, n) == (first, second) or (m != first and n != second)
    ]
    return energy(first, second) + np.log(sum(np.exp(-energy(m, n)) for m, n in competing))


@pytest.mark.parametrize("competitors", ["any", "both"])
@pytest.mark.parametrize(("kind", "num_labels"), [("general", 3), ("potts", 3), ("potts", 2), ("general", 2)])
def test_pairwise_embedding_is_a_loop_over_pairs(kind, num_labels, competitors):
    rng = np.random.default_rng(0)
    shape = (2, 2, 3) if kind == "potts" else (2, 2, 3, num_labels)
    embeddings = rng.normal(size=(*shape, 2)).astype(np.float32)
    labels = rng.integers(0, num_labels, (2, 2, 3))
    labels[0, 1, 1] = IGNORE
    pairs = np.asarray(losses.random_pairs(jax.random.key(0), labels.shape, 6))
    options = {"kind": kind, "competitors": competitors}

    def loss(embeddings):
        count = num_labels if kind == "potts" else None
        return losses.pairwise_embedding(embeddings, labels, pairs, num_labels=count, **options)

    def oracle(embeddings):
        return pairwise_oracle(embeddings, labels, pairs, num_labels=num_labels, **options)

    value, gradient = jax.jit(jax.value_and_grad(loss))(embeddings)
    np.testing.assert_allclose(value, oracle(embeddings), rtol=2e-6)
    np.testing.assert_allclose(gradient, finite_differences(oracle, embeddings), atol=5e-7)
    # To Potts-type embeddings, two labels that are both wrong are as good as the true ones.
    assert np.any(np.abs(gradient) > 1e-3) == ((kind, num_labels, competitors) != ("potts", 2, "both"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["general", "potts"])
def test_pairwise_embedding_of_hard_cases(kind):
    labels = np.array([[0, 1, 0, 1]])
    pairs = np.array([[0, 1], [0, 2], [3, 3]])
    shape = (1, 4, 2, 3) if kind == "general" else (1, 4, 3)

    def loss(embeddings, labels=labels, **options):
        return losses.pairwise_embedding(embeddings, labels, pairs, kind=kind, num_labels=2, **options)

    for competitors in ("any", "both"):
        value_and_gradient = jax.jit(functools.partial(jax.value_and_grad(loss), competitors=competitors))
        # Energies of ±3e4.
        extreme = 100 * np.random.default_rng(0).choice([-1.0, 1.0], shape).astype(np.float32)
        value, gradient = value_and_gradient(extreme, labels)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        value, gradient = value_and_gradient(extreme * np.nan, np.full_like(labels, IGNORE))
        assert value == 0
        assert not gradient.any()
    ones = np.ones(shape)
    stored = jnp.asarray(ones, jnp.bfloat16)
    assert loss(stored).dtype == jnp.float32
    assert loss(stored) == loss(ones)
    bad = np.array([[0, 1, 0, 2]])
    with pytest.raises(ValueError, match="labels: holds label 2"):
        loss(ones, bad)
    assert np.isnan(jax.jit(loss)(ones, bad))
    one_label = losses.pairwise_embedding(
        np.ones((1, 4, 3)), np.zeros((1, 4), int), pairs, kind="potts", num_labels=1
    )
    assert one_label == 0


def test_pairwise_embedding_learns_which_pixels_belong_together():
    labels = np.repeat([[0], [1], [2]], 4, axis=1)
    embeddings = jax.random.normal(jax.random.key(1), (*labels.shape, 4))

    @jax.jit
    def step(embeddings, key):
        pairs = losses.random_pairs(key, labels.shape, 32)
        loss = lambda e: losses.pairwise_embedding(e, labels, pairs, kind="potts", num_labels=3)  # noqa: E731
        return embeddings - jax.grad(loss)(embeddings)

    for key in jax.random.split(jax.random.key(2), 100):
        embeddings = step(embeddings, key)
    products = np.einsum("ijd,kld->ijkl", embeddings, embeddings)
    alike = labels[:, :, None, None] == labels
    assert products[alike].min() > 0 > products[~alike].max()


def test_random_pairs_are_all_pairs_alike_and_never_a_pixel_with_itself():
    pairs = np.asarray(losses.random_pairs(jax.random.key(0), (2, 2, 2), 6000))
    assert pairs.shape == (2, 6000, 2)
    assert pairs.dtype == np.int32
    assert (pairs[0] != pairs[1]).any()
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(pairs.reshape(-1, 2).T), 1)
    assert not np.diag(counts).any()
    # 12 cells of 1000 on average; five standard deviations.
    assert np.abs(counts[~np.eye(4, dtype=bool)] - 1000).max() < 5 * np.sqrt(1000)


def test_class_weights_are_a_loop_over_images():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 1000, (5, LABELS)) * (rng.random((5, LABELS)) < 0.6)
    counts[:, 2] = 0
    counts[0, [0, 1, 3]] = 7, 8, 9
    frequencies = {}
    for label in (0, 1, 3):
        showing = [image for image in counts if image[label]]
        frequencies[label] = sum(i[label] for i in showing) / sum(i.sum() for i in showing)
    median = sorted(frequencies.values())[1]
    expected = [median / frequencies[label] if label in frequencies else 0 for label in range(LABELS)]
    np.testing.assert_allclose(losses.class_weights(counts), expected, rtol=1e-6)
    found = losses.class_weights(counts, kind="inverse_frequency")
    # Every label has the same weight in all, and a pixel one on average.
    np.testing.assert_allclose(
        found * counts.sum(0), np.where(np.arange(4) == 2, 0, counts.sum() / 3), rtol=1e-6
    )
    totals = losses.class_weights(counts.sum(0), kind="inverse_frequency")
    np.testing.assert_array_equal(found, totals)
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "connectivity", "competitors"),
    [("potts", 12, "any"), ("general", 8, "both"), ("general", 4, "any")],
)
def test_pairwise_edges_is_a_loop_over_edges(kind, connectivity, competitors):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 3, 3))
    labels[0, 1, 1] = IGNORE
    offsets = [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0)][: connectivity // 2]
    shape = (*labels.shape, len(offsets), *([3, 3] if kind == "general" else []))
    edges = rng.normal(size=shape).astype(np.float32)
    options = {"kind": kind, "connectivity": connectivity, "competitors": competitors}

    def loss(edges):
        return losses.pairwise_edges(edges, labels, num_labels=3, **options)

    def oracle(edges):
        terms = []
        for image, y, x, (e, (dy, dx)) in itertools.product(range(2), range(3), range(3), enumerate(offsets)):
            if not (0 <= y + dy < 3 and 0 <= x + dx < 3):
                continue
            first, second, weight = labels[image, y, x], labels[image, y + dy, x + dx], edges[image, y, x, e]
            if IGNORE in (first, second):
                continue
            energy = lambda m, n, w=weight: w[m, n] if kind == "general" else w * (m != n)  # noqa: E731
            terms.append(pair_oracle(energy, first, second, 3, competitors))
        return np.mean(terms)

    value, gradient = jax.jit(jax.value_and_grad(loss))(edges)
    np.testing.assert_allclose(value, oracle(edges.astype(np.float64)), rtol=2e-6)
    np.testing.assert_allclose(gradient, finite_differences(oracle, edges), atol=5e-7)
    found = jax.jit(lambda labels: losses.pairwise_edges(edges, labels, num_labels=3, **options))(labels + 7)
    assert np.isnan(found)


def test_labels_are_subsampled_as_networks_sample():
    labels = np.arange(2 * 17 * 25).reshape(2, 17, 25)
    np.testing.assert_array_equal(
        losses.subsample_labels(labels), labels[:, [0, 8, 16]][:, :, [0, 8, 16, 24]]
    )
    found = losses.subsample_labels(jnp.asarray(labels), 8, offset=4)
    np.testing.assert_array_equal(found, labels[:, [4, 12]][:, :, [4, 12, 20]])
    np.testing.assert_array_equal(losses.subsample_labels(labels, 1), labels)


def test_bad_arguments_are_named():
    logits, labels = example()
    pairs = np.array([[0, 1]])
    with pytest.raises(ValueError, match=r"logits: got shape \(2, 3, 5, 4\) for labels of shape \(2, 3, 4\)"):
        losses.cross_entropy(logits, labels[..., :4])
    with pytest.raises(ValueError, match="logits: got dtype int"):
        losses.cross_entropy(labels[..., None], labels)
    with pytest.raises(ValueError, match="labels: got dtype float"):
        losses.cross_entropy(logits, labels.astype(float))
    with pytest.raises(ValueError, match="reduction: got 'none'; expected one of mean, sum"):
        losses.cross_entropy(logits, labels, reduction="none")
    with pytest.raises(ValueError, match="label_smoothing: got 2"):
        losses.cross_entropy(logits, labels, label_smoothing=2)
    with pytest.raises(ValueError, match=r"class_weights: got shape \(3,\); expected \(4,\)"):
        losses.cross_entropy(logits, labels, class_weights=[1, 2, 3])
    with pytest.raises(ValueError, match="class_weights: are negative"):
        losses.cross_entropy(logits, labels, class_weights=[1, 2, 3, -1])
    with pytest.raises(ValueError, match="pixel_weights: got shape"):
        losses.dice(logits, labels, pixel_weights=np.ones(4))
    with pytest.raises(ValueError, match="kind: got 'sparse'"):
        losses.pairwise_embedding(logits, labels, pairs, kind="sparse")
    with pytest.raises(ValueError, match="competitors: got 'all'"):
        losses.pairwise_embedding(logits, labels, pairs, kind="potts", num_labels=4, competitors="all")
    with pytest.raises(ValueError, match="num_labels: got None"):
        losses.pairwise_embedding(logits, labels, pairs, kind="potts")
    with pytest.raises(ValueError, match=r"embeddings: got shape .* expected \[\*batch, H, W, L, D\]"):
        losses.pairwise_embedding(logits, labels, pairs, kind="general")
    with pytest.raises(ValueError, match=r"edges: got shape .* expected \[\*batch, H, W, E\] .* E = 2"):
        losses.pairwise_edges(logits, labels, kind="potts", connectivity=4, num_labels=4)
    with pytest.raises(ValueError, match="connectivity: got 6"):
        losses.pairwise_edges(logits, labels, kind="potts", connectivity=6, num_labels=4)
    with pytest.raises(ValueError, match="pairs: holds a place out of range; expected 0 to 14"):
        losses.pairwise_embedding(logits, labels, pairs + 14, kind="potts", num_labels=4)
    with pytest.raises(ValueError, match=r"pairs: got shape \(3, 1, 2\); expected batch axes \(2,\)"):
        losses.pairwise_embedding(logits, labels, np.stack([pairs] * 3), kind="potts", num_labels=4)
    with pytest.raises(ValueError, match="at least two pixels"):
        losses.random_pairs(jax.random.key(0), (1, 1), 4)
    with pytest.raises(ValueError, match="num_pairs: got 0"):
        losses.random_pairs(jax.random.key(0), (2, 1), 0)
    with pytest.raises(ValueError, match="counts: are negative"):
        losses.class_weights([[0, 0]])
    with pytest.raises(ValueError, match="kind: got 'log'"):
        losses.class_weights([[1, 2]], kind="log")
    with pytest.raises(ValueError, match="factor: got 0"):
        losses.subsample_labels(labels, 0)
    with pytest.raises(ValueError, match="offset: got 3"):
        losses.subsample_labels(labels, 8, offset=3)
