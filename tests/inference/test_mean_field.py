"""Mean field against a plain float64 loop, and what it promises about options, transforms and gradients."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import dense_matrix
from jaxcrf.filters import Window

SHAPE, LABELS = (5, 6), 3
EPSILON = float(np.finfo(np.float32).eps)


def random(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def window(seed=0, blur=1, kind="none", batch=(), size=3):
    features = (
        jaxcrf.position_features(SHAPE, 1.5),
        jaxcrf.bilateral_features(random(*batch, *SHAPE, 3, seed=seed, scale=50), None, 60.0),
    )
    return Window(features, size, weights=[0.3, 0.5], blur=blur).normalized(kind)


COMPATIBILITIES = {
    "scalar": np.float32(0.7),
    "vector": np.array([0.5, 1.0, 0.1], np.float32),
    "matrix": np.array([[0, 1, 0.5], [1, 0, 0.2], [0.4, 0.3, 0.1]], np.float32),
}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def penalty_matrix(compatibility):
    if np.ndim(compatibility) == 0:
        return compatibility * (1 - np.eye(LABELS))
    return -np.diag(compatibility) if np.ndim(compatibility) == 1 else compatibility


def float64_loop(u, terms, iterations, unary_weight=1.0, initial="probs", exclude_self=False, damping=0.0):
    """The update written out with dense matrices."""
    u = np.asarray(u, np.float64).reshape(-1, LABELS)
    terms = [
        (dense_matrix(K).astype(np.float64), np.asarray(penalty_matrix(c), np.float64)) for K, c in terms
    ]
    if exclude_self:
        terms = [(A - np.diag(np.diag(A)), mu) for A, mu in terms]
    z, q = u, softmax(u)
    for iteration in range(iterations):
        filtered = u if initial == "logits" and iteration == 0 else q
        new = unary_weight * u - sum((A @ filtered) @ mu.T for A, mu in terms)
        z = damping * z + (1 - damping) * new
        q = softmax(z)
    return q.reshape(*SHAPE, LABELS)


@pytest.mark.parametrize("blur", [1, 2])
@pytest.mark.parametrize("form", list(COMPATIBILITIES))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unary_weight": 0.6},
        {"initial": "logits"},
        {"exclude_self": True},
        {"damping": 0.4, "unary_weight": 0.8},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_it_is_the_float64_loop(blur, form, options):
    u = random(*SHAPE, LABELS, scale=2)
    terms = [(window(0, blur), COMPATIBILITIES[form])]
    found = jaxcrf.mean_field(u, terms, num_iterations=4, **options)
    # Five soft-maxes of scores up to ten or so: a few hundred roundings.
    np.testing.assert_allclose(found.probs, float64_loop(u, terms, 4, **options), atol=500 * EPSILON)
    np.testing.assert_allclose(found.probs.sum(-1), 1, atol=4 * EPSILON)
    np.testing.assert_allclose(jax.nn.softmax(found.logits), found.probs, atol=4 * EPSILON)


def test_terms_of_several_kinds_add_up():
    u = random(*SHAPE, LABELS, scale=2)
    terms = [
        (window(0), COMPATIBILITIES["scalar"]),
        (window(1, blur=2), COMPATIBILITIES["matrix"]),
        (window(2, blur=2, kind="symmetric"), COMPATIBILITIES["vector"]),
        (window(3, kind="after") + window(4, blur=3), 0.5),
    ]
    found = jaxcrf.mean_field(u, terms, num_iterations=3).probs
    np.testing.assert_allclose(found, float64_loop(u, terms, 3), atol=500 * EPSILON)


def test_one_filter_alone_is_potts_of_weight_one():
    u, K = random(*SHAPE, LABELS), window()
    expected = jaxcrf.mean_field(u, [(K, 1.0)]).probs
    np.testing.assert_array_equal(jaxcrf.mean_field(u, K).probs, expected)
    np.testing.assert_array_equal(jaxcrf.mean_field(u, [K]).probs, expected)
    matrix = 1 - np.eye(LABELS, dtype=np.float32)
    np.testing.assert_allclose(jaxcrf.mean_field(u, [(K, matrix)]).probs, expected, atol=100 * EPSILON)


def test_unary_weight_may_be_one_per_label():
    u, weight = random(*SHAPE, LABELS), np.array([0.5, 1.0, 2.0], np.float32)
    found = jaxcrf.mean_field(u, window(), num_iterations=2, unary_weight=weight, damping=0.3).probs
    expected = float64_loop(u, [(window(), 1.0)], 2, unary_weight=weight, damping=0.3)
    np.testing.assert_allclose(found, expected, atol=500 * EPSILON)


def test_no_iterations_and_no_terms_leave_the_unary():
    u = random(*SHAPE, LABELS)
    for arguments in ({"num_iterations": 0}, {"num_iterations": 0, "gradient": "implicit"}):
        result = jaxcrf.mean_field(u, window(), **arguments)
        np.testing.assert_allclose(result.probs, softmax(u), atol=4 * EPSILON)
        assert int(result.stats.iterations) == 0
    np.testing.assert_allclose(jaxcrf.mean_field(u, []).probs, softmax(u), atol=4 * EPSILON)


def test_labels_can_be_permuted():
    u, order = random(*SHAPE, LABELS), np.array([2, 0, 1])
    matrix = COMPATIBILITIES["matrix"]
    found = jaxcrf.mean_field(u[..., order], [(window(), matrix[np.ix_(order, order)])]).probs
    np.testing.assert_allclose(
        found, jaxcrf.mean_field(u, [(window(), matrix)]).probs[..., order], atol=50 * EPSILON
    )


@pytest.mark.parametrize("blur", [1, 2])
def test_a_batch_is_a_loop(blur):
    u = random(2, *SHAPE, LABELS)
    K = window(blur=blur, batch=(2,))
    together = jaxcrf.mean_field(u, K).probs
    for item in range(2):
        features = tuple(f[item] if f.ndim == 4 else f for f in K.features)
        alone = jaxcrf.mean_field(u[item], K.replace(features=features)).probs
        np.testing.assert_allclose(together[item], alone, atol=50 * EPSILON)
    # A filter of one image serves a batch of unaries, with batch axes and under vmap.
    shared = window(blur=blur)
    np.testing.assert_allclose(
        jax.vmap(lambda u: jaxcrf.mean_field(u, shared).probs)(u),
        jaxcrf.mean_field(u, shared).probs,
        atol=50 * EPSILON,
    )


def test_eager_calls_compile_once():
    module = importlib.import_module("jaxcrf.inference.mean_field")
    jaxcrf.mean_field(random(*SHAPE, LABELS), window(0), num_iterations=7)
    compiled = module._mean_field._cache_size()
    jaxcrf.mean_field(random(*SHAPE, LABELS, seed=1), window(1), num_iterations=7)
    assert module._mean_field._cache_size() == compiled


class TestStopping:
    u = random(*SHAPE, LABELS)

    def test_it_stops_after_the_first_update_that_changes_nothing(self):
        K = window(kind="symmetric")
        probs = [np.asarray(jaxcrf.mean_field(self.u, K, num_iterations=n).probs) for n in range(12)]
        changes = [np.abs(b - a).max() for a, b in itertools.pairwise(probs)]
        for tolerance in (1e-2, 1e-3, 1e-4):
            expected = 1 + int(np.argmax(np.array(changes) <= tolerance))
            result = jaxcrf.mean_field(self.u, K, num_iterations=100, tolerance=tolerance)
            assert int(result.stats.iterations) == expected
            assert bool(result.stats.converged)
            np.testing.assert_allclose(result.stats.residual, changes[expected - 1], rtol=1e-3)
            np.testing.assert_allclose(result.probs, probs[expected], atol=1e-6)

    def test_it_says_when_it_has_not_converged(self):
        result = jaxcrf.mean_field(self.u, window(), num_iterations=1, tolerance=1e-6)
        assert int(result.stats.iterations) == 1
        assert not bool(result.stats.converged)
        assert float(result.stats.residual) > 1e-6

    def test_the_residual_is_the_last_change(self):
        four, five = (jaxcrf.mean_field(self.u, window(), num_iterations=n) for n in (4, 5))
        expected = np.abs(np.asarray(five.probs) - np.asarray(four.probs)).max()
        np.testing.assert_allclose(five.stats.residual, expected, rtol=1e-3)

    def test_nan_comes_through(self):
        u = self.u.copy()
        u[0, 0, 0] = np.nan
        result = jaxcrf.mean_field(u, window())
        assert np.isnan(result.probs[0, 0]).all()
        assert not bool(result.stats.converged)


class TestGradients:
    def loss(self, u, features, weights, compatibility, unary_weight, **options):
        K = Window(tuple(features), 3, weights=weights, blur=options.pop("blur", 1)).normalized(
            options.pop("kind", "none")
        )
        result = jaxcrf.mean_field(u, [(K, compatibility)], unary_weight=unary_weight, **options)
        g = jnp.asarray(random(*SHAPE, LABELS, seed=9), u.dtype)
        return jnp.sum(g * result.probs)

    def arguments(self):
        return (
            jnp.asarray(random(*SHAPE, LABELS), jnp.float64),
            [jnp.asarray(random(*SHAPE, 2, seed=s), jnp.float64) for s in (1, 2)],
            jnp.array([0.1, 0.2], jnp.float64),
            jnp.asarray(COMPATIBILITIES["matrix"], jnp.float64),
            jnp.asarray(0.9, jnp.float64),
        )

    @pytest.mark.parametrize(
        "options",
        [
            {"num_iterations": 3},
            {"num_iterations": 3, "blur": 2, "kind": "symmetric"},
            {"num_iterations": 3, "initial": "logits"},
            {"num_iterations": 3, "exclude_self": True, "blur": 2},
            {"num_iterations": 3, "damping": 0.3},
            {"num_iterations": 60, "tolerance": 1e-13},
            {"num_iterations": 120, "gradient": "implicit"},
            {"num_iterations": 120, "gradient": "implicit", "blur": 2, "damping": 0.2},
        ],
        ids=str,
    )
    def test_they_agree_with_finite_differences_in_float64(self, options):
        with jax.enable_x64(True):
            arguments = self.arguments()

            def loss(*arguments):
                return self.loss(*arguments, **dict(options))

            gradient = jax.jit(jax.grad(loss, argnums=tuple(range(5))))(*arguments)
            value = jax.jit(loss)
            rng, step = np.random.default_rng(3), 1e-5
            for place in range(5):  # one operand at a time, so that a small one cannot hide
                direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), arguments[place])

                def moved(t, place=place, direction=direction):
                    changed = list(arguments)
                    changed[place] = jax.tree.map(lambda x, d: x + t * d, arguments[place], direction)
                    return value(*changed)

                expected = (moved(step) - moved(-step)) / (2 * step)
                found = sum(
                    jnp.vdot(a, b)
                    for a, b in zip(jax.tree.leaves(gradient[place]), jax.tree.leaves(direction), strict=True)
                )
                # The adjoint iteration stops at 1e-6; otherwise the differences err by step² ≈ 1e-10.
                tolerance = 1e-5 if options.get("gradient") == "implicit" else 1e-7
                np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.optimized
    def test_unrolling_stores_messages_not_marginals(self):
        # At blur 2 an iteration hands on a quarter of a map. Ten more iterations may store ten such, no more.
        shape, labels = (64, 64), 8
        K = Window(jaxcrf.bilateral_features(random(*shape, 3, scale=50), None, 50.0), 3, blur=2)

        def memory(iterations):
            def loss(u):
                return jnp.sum(jaxcrf.mean_field(u, K, num_iterations=iterations).probs ** 2)

            compiled = jax.jit(jax.grad(loss)).lower(np.zeros((*shape, labels), np.float32)).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        map_bytes = 4 * np.prod(shape) * labels
        assert memory(20) - memory(10) <= 10 * map_bytes / 4 * 1.5

    @pytest.mark.optimized
    def test_implicit_memory_does_not_grow_with_iterations(self):
        shape, labels = (32, 32), 8
        K = Window(jaxcrf.bilateral_features(random(*shape, 3, scale=50), None, 50.0), 3)

        def memory(iterations):
            def loss(u):
                return jnp.sum(
                    jaxcrf.mean_field(u, K, num_iterations=iterations, gradient="implicit").probs ** 2
                )

            compiled = jax.jit(jax.grad(loss)).lower(np.zeros((*shape, labels), np.float32)).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert memory(40) == memory(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": "zeros"}, "initial: got 'zeros'"),
        ({"gradient": "magic"}, "gradient: got 'magic'"),
        ({"num_iterations": -1}, "num_iterations: got -1"),
        ({"num_iterations": 2.5}, "num_iterations: got 2.5"),
        ({"damping": 1.0}, "damping: got 1.0"),
        ({"tolerance": -1.0}, "tolerance: got -1.0"),
        ({"unary_weight": [1.0, 2.0]}, "unary_weight: got shape"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        jaxcrf.mean_field(random(*SHAPE, LABELS), window(), **options)


@pytest.mark.parametrize(
    ("logits", "pairwise", "error", "message"),
    [
        (random(6, 5, LABELS), window(), ValueError, "logits: got shape"),
        (np.zeros((*SHAPE, LABELS), np.int32), window(), ValueError, "logits: got dtype int32"),
        (np.zeros((*SHAPE, 0), np.float32), window(), ValueError, "holds nothing"),
        (random(4), [], ValueError, "logits: got shape"),
        (random(*SHAPE, LABELS), [(window(), np.ones(4))], ValueError, "compatibility: got shape"),
        (random(*SHAPE, LABELS), 3.0, TypeError, "pairwise: got float"),
        (random(*SHAPE, LABELS), [(3.0, window())], TypeError, "pairwise: got float where a filter"),
        (
            random(*SHAPE, LABELS),
            [window(), Window(jaxcrf.position_features((6, 5), 1.0), 3)],
            ValueError,
            "different spatial shapes",
        ),
    ],
)
def test_bad_operands_are_named(logits, pairwise, error, message):
    with pytest.raises(error, match=message):
        jaxcrf.mean_field(logits, pairwise)
