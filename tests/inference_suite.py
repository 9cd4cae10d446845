"""What every inference algorithm must pass. Its test class derives from `InferenceSuite` and lists its cases."""

import importlib
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from jaxcrf.filters import Window

SHAPE, LABELS = (3, 4), 3
EPSILON = float(np.finfo(np.float32).eps)
ITERATIONS = 4

# A few iterations of a dozen additions each, with gradients of up to ten: a few hundred roundings.
CLOSE = 500 * EPSILON

MATRIX = np.array([[0.1, 1, 0.5], [1, 0, 0.2], [0.5, 0.2, 0.3]], np.float32)


def random(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def window(seed=0, shape=SHAPE, batch=(), kind="none", blur=1):
    features = (
        jaxcrf.position_features(shape, 1.5),
        jaxcrf.bilateral_features(random(*batch, *shape, 3, seed=seed, scale=50), None, 60.0),
    )
    return Window(features, 3, weights=[0.2, 0.4], blur=blur).normalized(kind)


def assert_close(found, expected, tolerance=CLOSE):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


class InferenceSuite:
    """Simplices, energies, transforms, gradients and limits of one algorithm.

    `CASES` gives the options of `jaxcrf.infer`. `DESCENDS` names the cases whose objective never rises, with any
    symmetric filter.
    """

    CASES: ClassVar[dict[str, dict[str, Any]]]
    DESCENDS: ClassVar[tuple[str, ...]] = ()
    COMPILED: ClassVar[tuple[str, str]]  # the module and the name of the function that is compiled

    def infer(self, case, logits, pairwise, **options):
        return jaxcrf.infer(logits, pairwise, **({"num_iterations": ITERATIONS} | self.CASES[case] | options))

    def test_marginals_are_probabilities(self, case):
        result = self.infer(case, random(*SHAPE, LABELS, scale=3), [(window(), MATRIX)])
        assert (np.asarray(result.probs) >= 0).all()
        assert_close(result.probs.sum(-1), 1, 4 * EPSILON)
        assert_close(jax.nn.softmax(result.logits), result.probs, 8 * EPSILON)
        assert np.isfinite(result.logits).all()
        assert int(result.stats.iterations) == ITERATIONS

    def test_energies_are_those_of_every_iterate(self, case):
        u, pairwise = random(*SHAPE, LABELS), [(window(), MATRIX)]
        options = {"unary_weight": 0.8, "exclude_self": True}
        energies = self.infer(case, u, pairwise, **options).stats.energies
        assert energies.shape == (ITERATIONS + 1,)
        for iterations in (0, 1, ITERATIONS):
            probs = self.infer(case, u, pairwise, num_iterations=iterations, **options).probs
            expected = jaxcrf.relaxed_energy(probs, u, pairwise, **options)
            np.testing.assert_allclose(energies[iterations], expected, rtol=1e-5, atol=1e-5)

    def test_an_iteration_applies_every_filter_once(self, case):
        traced = jax.make_jaxpr(lambda u: self.infer(case, u, window()))(random(*SHAPE, LABELS))
        assert str(traced).count("name=_apply") == 2  # for the first gradient, and in the loop

    def test_the_objective_never_rises(self, case):
        if case not in self.DESCENDS:
            pytest.skip("nothing is promised")
        for sign in (1, -1):  # attraction and repulsion
            u, K = random(*SHAPE, LABELS, seed=4), window(seed=4)
            K = K.replace(weights=3 * sign * K.weights)
            objectives = self.infer(case, u, [(K, MATRIX)], num_iterations=12).stats.objectives
            # Sums of dozens of numbers up to ten: rises below 1e-5 are rounding.
            assert (np.diff(objectives) <= 1e-5).all()
            assert objectives[-1] < objectives[0]

    def test_the_lowest_labelling_is_never_beaten(self, case):
        u, K = random(2, 3, 2, seed=5), window(shape=(2, 3))
        labellings = np.indices((2,) * 6).reshape(6, -1).T.reshape(-1, 2, 3)
        lowest = np.min(jaxcrf.gibbs_energy(labellings, np.broadcast_to(u, (64, 2, 3, 2)), K))
        result = self.infer(case, u, K, num_iterations=20)
        rounded = jaxcrf.rounded_energy(result.probs, u, K)
        assert rounded >= lowest - 1e-5
        np.testing.assert_allclose(
            rounded, jaxcrf.gibbs_energy(np.asarray(result.probs).argmax(-1), u, K), rtol=1e-6
        )

    def test_no_iterations_are_the_start(self, case):
        u = random(*SHAPE, LABELS)
        result = self.infer(case, u, window(), num_iterations=0)
        assert_close(result.probs, jax.nn.softmax(u))
        assert result.stats.energies.shape == (1,)
        assert int(result.stats.iterations) == 0

    def test_a_strong_unary_wins(self, case):
        best = np.random.default_rng(0).integers(0, LABELS, SHAPE)
        u = 50 * np.eye(LABELS, dtype=np.float32)[best]
        result = self.infer(case, u, window(), num_iterations=10)
        np.testing.assert_array_equal(result.probs.argmax(-1), best)
        assert (np.asarray(result.probs.max(-1)) > 0.9).all()

    @pytest.mark.parametrize(
        ("shape", "labels"), [((1, 1), 3), ((3, 4), 1), ((1, 1), 1), ((5,), 2), ((2, 1, 3), 2)], ids=str
    )
    def test_small_and_odd_shapes(self, case, shape, labels):
        u = random(*shape, labels)
        K = Window(jaxcrf.position_features(shape, 1.0), 3, spatial_ndim=len(shape))
        result = self.infer(case, u, K)
        assert result.probs.shape == u.shape
        assert np.isfinite(result.probs).all()
        assert_close(result.probs.sum(-1), 1, 4 * EPSILON)
        assert result.stats.energies.shape == (ITERATIONS + 1,)

    def test_nothing_pairwise(self, case):
        u = random(*SHAPE, LABELS)
        result = self.infer(case, u, [])
        assert (np.asarray(result.probs.argmax(-1)) == u.argmax(-1)).all()
        np.testing.assert_allclose(
            result.stats.energies[-1], -np.sum(np.asarray(result.probs, np.float64) * u), rtol=1e-5
        )

    def test_labels_can_be_permuted(self, case):
        u, order = random(*SHAPE, LABELS), np.array([2, 0, 1])
        found = self.infer(case, u[..., order], [(window(), MATRIX[np.ix_(order, order)])])
        expected = self.infer(case, u, [(window(), MATRIX)])
        assert_close(found.probs, expected.probs[..., order])
        np.testing.assert_allclose(found.stats.energies, expected.stats.energies, rtol=1e-5, atol=1e-5)

    def test_a_batch_is_a_loop(self, case):
        # Of very different images, so that a step shared by them would show.
        u = random(2, *SHAPE, LABELS) * np.array([1, 4], np.float32)[:, None, None, None]
        together = self.infer(case, u, window(batch=(2,)))
        for item in range(2):
            features = tuple(f[item] if f.ndim == 4 else f for f in window(batch=(2,)).features)
            alone = self.infer(case, u[item], window().replace(features=features))
            assert_close(together.probs[item], alone.probs)
            np.testing.assert_allclose(
                together.stats.energies[:, item], alone.stats.energies, rtol=1e-5, atol=1e-5
            )
        mapped = jax.vmap(lambda u: self.infer(case, u, window()))(u)
        shared = self.infer(case, u, window())
        assert_close(mapped.probs, shared.probs)
        np.testing.assert_allclose(
            mapped.stats.energies, np.transpose(shared.stats.energies), rtol=1e-5, atol=1e-5
        )

    def test_it_stops_early(self, case):
        u = random(*SHAPE, LABELS)
        probs = [np.asarray(self.infer(case, u, window(), num_iterations=n).probs) for n in range(5)]
        changes = np.array([np.abs(b - a).max() for a, b in itertools.pairwise(probs)])
        tolerance = float(np.sort(changes)[:2].mean()) if changes.min() else 0.0
        expected = 1 + int(np.argmax(changes <= tolerance))
        result = self.infer(case, u, window(), num_iterations=9, tolerance=tolerance)
        assert int(result.stats.iterations) == expected
        assert bool(result.stats.converged)
        assert_close(result.stats.residual, changes[expected - 1])
        assert_close(result.probs, probs[expected])
        assert result.stats.energies.shape == (10,)
        assert (np.asarray(result.stats.energies[expected:]) == np.asarray(result.stats.energies[-1])).all()

    def test_jit_agrees_and_nothing_compiles_twice(self, case):
        module, name = self.COMPILED
        compiled = getattr(importlib.import_module(module), name)
        found = [self.infer(case, random(*SHAPE, LABELS, seed=s), window(s)).probs for s in (0, 1)]
        entries = compiled._cache_size()
        self.infer(case, random(*SHAPE, LABELS, seed=2), window(2))
        assert compiled._cache_size() == entries
        jitted = jax.jit(lambda u, K: self.infer(case, u, K))
        for seed, expected in enumerate(found):
            assert_close(jitted(random(*SHAPE, LABELS, seed=seed), window(seed)).probs, expected)
        assert jitted._cache_size() == 1

    def test_gradients_agree_with_finite_differences_in_float64(self, case):
        with jax.enable_x64(True):
            arguments = (
                jnp.asarray(random(*SHAPE, LABELS, seed=8), jnp.float64),
                jnp.asarray(random(*SHAPE, 2, seed=1), jnp.float64),
                jnp.asarray(MATRIX, jnp.float64),
                jnp.asarray(0.9, jnp.float64),
            )
            g = jnp.asarray(random(*SHAPE, LABELS, seed=9), jnp.float64)

            @jax.jit
            def loss(u, features, matrix, unary_weight):
                symmetric = 0.5 * (matrix + matrix.T)
                K = Window(features, 3, weights=0.5)
                result = self.infer(case, u, [(K, symmetric)], unary_weight=unary_weight, num_iterations=3)
                assert result.probs.dtype == jnp.float64
                return jnp.sum(g * result.probs) + 0.1 * result.stats.energies.sum()

            gradient = jax.jit(jax.grad(loss, argnums=range(4)))(*arguments)
            rng, step = np.random.default_rng(3), 1e-5
            for place in range(4):  # one operand at a time, so that a small one cannot hide
                direction = jnp.asarray(rng.normal(size=arguments[place].shape))

                def moved(t, place=place, direction=direction):
                    return loss(*(a + t * direction if i == place else a for i, a in enumerate(arguments)))

                expected = (moved(step) - moved(-step)) / (2 * step)
                # The differences err by step² ≈ 1e-10 times a third derivative.
                np.testing.assert_allclose(
                    jnp.vdot(gradient[place], direction), expected, rtol=1e-7, atol=1e-7
                )

    def test_gradients_of_certain_images_are_finite(self, case):
        u = 500 * random(*SHAPE, LABELS)

        def loss(u, weight):
            result = self.infer(case, u, [(window(), weight)])
            return jnp.sum(result.probs[..., 0]) + result.stats.objectives[-1]

        for gradient in jax.grad(loss, argnums=(0, 1))(u, jnp.float32(0.5)):
            assert np.isfinite(gradient).all()

    def test_16_bit_logits_are_accepted(self, case):
        u = jnp.asarray(random(*SHAPE, LABELS), jnp.bfloat16)
        result = self.infer(case, u, window())
        assert result.probs.dtype == jnp.float32
        assert_close(result.probs, self.infer(case, u.astype(jnp.float32), window()).probs)

    def test_nan_comes_through(self, case):
        u = random(2, *SHAPE, LABELS)
        u[0, 0, 0, 0] = np.nan
        result = jax.jit(lambda u: self.infer(case, u, window()))(u)
        assert np.isnan(result.probs[0, 0, 0]).all()
        assert np.isfinite(result.probs[1]).all()
        assert not bool(result.stats.converged)
        assert np.isnan(result.stats.energies[:, 0]).all()

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"num_iterations": -1}, ValueError, "num_iterations: got -1"),
            ({"num_iterations": 2.5}, ValueError, "num_iterations: got 2.5"),
            ({"tolerance": -1.0}, ValueError, "tolerance: got -1.0"),
            ({"unary_weight": [1.0, 2.0]}, ValueError, "unary_weight: got shape"),
            ({"temperature": 1.0}, TypeError, "temperature: .* has no such option"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
    )
    def test_bad_options_are_named(self, case, options, error, message):
        with pytest.raises(error, match=message):
            self.infer(case, random(*SHAPE, LABELS), window(), **options)

    @pytest.mark.parametrize(
        ("logits", "pairwise", "error", "message"),
        [
            (random(4, 3, LABELS), window(), ValueError, "logits: got shape"),
            (np.zeros((*SHAPE, LABELS), np.int32), window(), ValueError, "logits: got dtype int32"),
            (np.zeros((*SHAPE, 0), np.float32), window(), ValueError, "holds nothing"),
            (random(*SHAPE, LABELS), [(window(), np.ones(4))], ValueError, "compatibility: got shape"),
            (random(*SHAPE, LABELS), 3.0, TypeError, "pairwise: got float"),
        ],
        ids=["shape", "dtype", "empty", "compatibility", "pairwise"],
    )
    def test_bad_operands_are_named(self, case, logits, pairwise, error, message):
        with pytest.raises(error, match=message):
            self.infer(case, logits, pairwise)
