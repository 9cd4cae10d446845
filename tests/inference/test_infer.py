"""Mean field through `infer`: the suite, agreement with `mean_field`; and what all algorithms have in common."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from filter_suite import dense_matrix
from inference_suite import LABELS, MATRIX, SHAPE, InferenceSuite, assert_close, random, window

ALGORITHMS = ("mean_field", "frank_wolfe", "projected_gradient")


class TestMeanField(InferenceSuite):
    # The damping makes up for the strongest filter of the suite: 1 - 1/(1 + |λ|) with |λ| < 13.
    CASES = {"plain": {}, "damped": {"damping": 0.93}}  # noqa: RUF012
    DESCENDS = ("damped",)
    COMPILED = ("jaxcrf.inference.infer", "_mean_field_watched")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"initial": "logits", "unary_weight": 0.7},
        {"damping": 0.4, "unary_weight": np.array([0.5, 1, 2], np.float32), "exclude_self": True},
        {"num_iterations": 50, "tolerance": 1e-3},
        {"num_iterations": 60, "gradient": "implicit"},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
@pytest.mark.parametrize("blur", [1, 2])
def test_it_is_mean_field(options, blur):
    u, pairwise = random(*SHAPE, LABELS), [(window(blur=blur), MATRIX)]
    found = jaxcrf.infer(u, pairwise, **options)
    expected = jaxcrf.mean_field(u, pairwise, **options)
    assert_close(found.probs, expected.probs)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert int(found.stats.iterations) == int(expected.stats.iterations)
    assert bool(found.stats.converged) == bool(expected.stats.converged)
    assert (found.stats.energies is None) == (blur == 2)
    if blur == 1:
        options = {k: v for k, v in options.items() if k in ("unary_weight", "exclude_self")}
        np.testing.assert_allclose(
            found.stats.objectives[-1], jaxcrf.free_energy(found.probs, u, pairwise, **options), rtol=1e-5
        )


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_gradients_are_those_of_mean_field(gradient):
    u = random(*SHAPE, LABELS)

    def loss(u, weight, run):
        return jnp.sum(run(u, [(window(), weight)], num_iterations=40, gradient=gradient).probs[..., 0] ** 2)

    found = jax.grad(loss, argnums=(0, 1))(u, 0.5, jaxcrf.infer)
    for a, b in zip(found, jax.grad(loss, argnums=(0, 1))(u, 0.5, jaxcrf.mean_field), strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"), [({"initial": "zeros"}, "initial: got"), ({"damping": 1.0}, "damping: got 1.0")]
)
def test_bad_options_of_mean_field_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        jaxcrf.infer(random(*SHAPE, LABELS), window(), **options)


def test_unknown_algorithms_are_named():
    with pytest.raises(ValueError, match="algorithm: got 'gibbs'; expected one of mean_field, frank_wolfe"):
        jaxcrf.infer(random(*SHAPE, LABELS), window(), algorithm="gibbs")
    with pytest.raises(TypeError, match="damping: frank_wolfe has no such option; it has num_iterations"):
        jaxcrf.infer(random(*SHAPE, LABELS), window(), algorithm="frank_wolfe", damping=0.5)


def test_results_have_the_same_fields():
    structures = {
        jax.tree.structure(jaxcrf.infer(random(*SHAPE, LABELS), window(), algorithm=algorithm))
        for algorithm in ALGORITHMS
    }
    assert len(structures) == 1


@pytest.mark.parametrize("exclude_self", [False, True])
def test_the_relaxed_energy_of_a_labelling_is_its_gibbs_energy(exclude_self):
    u = random(5, *SHAPE, LABELS)
    x = np.random.default_rng(1).integers(0, LABELS, (5, *SHAPE))
    options = {"unary_weight": 0.7, "exclude_self": exclude_self}
    found = jaxcrf.relaxed_energy(np.eye(LABELS, dtype=np.float32)[x], u, [(window(), MATRIX)], **options)
    assert found.shape == (5,)
    np.testing.assert_allclose(found, jaxcrf.gibbs_energy(x, u, [(window(), MATRIX)], **options), rtol=1e-5)


def test_the_relaxed_energy_is_the_quadratic_form():
    u, q = random(*SHAPE, LABELS), np.random.default_rng(0).dirichlet(np.ones(LABELS), SHAPE)
    P = np.kron(dense_matrix(window()).astype(np.float64), MATRIX)
    expected = -0.7 * np.sum(u * q) + q.ravel() @ P @ q.ravel() / 2
    found = jaxcrf.relaxed_energy(q.astype(np.float32), u, [(window(), MATRIX)], unary_weight=0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_relaxed_energy_refuses_what_has_none():
    q = np.full((*SHAPE, LABELS), 1 / 3, np.float32)
    for pairwise in (window(blur=2), [(window(), np.triu(MATRIX))]):
        with pytest.raises(ValueError, match="not symmetric"):
            jaxcrf.relaxed_energy(q, q, pairwise)
    with pytest.raises(ValueError, match="probs: got 2 labels"):
        jaxcrf.relaxed_energy(q[..., :2], q, window())


def all_energies(u, K, mu):
    """Of every labelling of a few pixels, by sums over pairs."""
    A = dense_matrix(K).astype(np.float64)
    flat = u.reshape(-1, u.shape[-1]).astype(np.float64)
    pixels = np.arange(len(flat))
    return np.array(
        [
            -flat[pixels, x].sum() + 0.5 * np.sum(A * mu[np.ix_(x, x)])
            for x in map(np.array, itertools.product(range(flat.shape[-1]), repeat=len(flat)))
        ]
    )


@pytest.mark.parametrize("labels", [2, 3])
def test_relaxing_loses_nothing_and_plain_methods_come_close(labels):
    # With a Potts model corners are the lowest points, so that no relaxed energy is below the exhaustive minimum.
    mu = 1 - np.eye(labels)
    found = {algorithm: [] for algorithm in ALGORITHMS}
    for seed in range(8):
        u, K = random(2, 3, labels, seed=seed), window(seed, shape=(2, 3))
        energies = all_energies(u, K, mu)
        for algorithm in ALGORITHMS:
            options = {"regularization": 0.3} if algorithm == "frank_wolfe" else {}
            result = jaxcrf.infer(u, K, algorithm=algorithm, num_iterations=20, **options)
            assert np.min(result.stats.energies) >= energies.min() - 1e-5
            rounded = float(jaxcrf.rounded_energy(result.probs, u, K))
            assert np.abs(energies - rounded).min() < 1e-4  # it is the energy of a labelling
            found[algorithm].append(rounded - energies.min())
    # All find the best of 64 or 729 labellings most of the time.
    for algorithm, excess in found.items():
        assert np.median(excess) < 1e-4, (algorithm, excess)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
import jaxcrf
from jax.sharding import Mesh, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ("data",))
assert len(jax.devices()) == 2
rng = np.random.default_rng(0)
image = jnp.asarray(rng.uniform(0, 255, (2, 5, 6, 3)), jnp.float32)
logits = jnp.asarray(rng.normal(size=(2, 5, 6, 3)), jnp.float32)
weights = jnp.array([0.3, 0.5])

for options in (
    {"algorithm": "mean_field", "damping": 0.2},
    {"algorithm": "frank_wolfe", "regularization": 0.5},
    {"algorithm": "frank_wolfe", "step": "decreasing", "regularizer": "quadratic", "tolerance": 1e-3},
    {"algorithm": "projected_gradient", "tolerance": 1e-3},
):
    def run(weights, image, logits):
        features = (jaxcrf.position_features((5, 6), 2.0), jaxcrf.bilateral_features(image, None, 60.0))
        K = jaxcrf.filters.Window(features, 3, weights=weights)
        result = jaxcrf.infer(logits, [(K, 1.0)], **options)
        return jnp.sum(result.probs[..., 0] ** 2, (-1, -2)) + result.stats.energies[-1]

    split = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    alone = lambda w, u: jnp.concatenate([run(w, image[i : i + 1], u[i : i + 1]) for i in range(2)])
    np.testing.assert_allclose(jax.jit(split)(weights, image, logits), alone(weights, logits), rtol=1e-5)
    found = jax.jit(jax.grad(lambda w, u: split(w, image, u).sum(), (0, 1)))(weights, logits)
    expected = jax.jit(jax.grad(lambda w, u: alone(w, u).sum(), (0, 1)))(weights, logits)
    for a, b in zip(found, expected, strict=True):  # of replicated weights and of sharded logits
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
print("two devices agree")
"""


@pytest.mark.exhaustive
def test_a_sharded_batch_is_a_loop(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        check=False,
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PATH": "", "HOME": str(tmp_path)},
    )
    assert result.stdout.strip() == "two devices agree", result.stderr[-2000:]
