"""Batches split over devices: every device its own part, in a process with eight of them."""

import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import jaxcrf
from jax.sharding import Mesh, PartitionSpec as P

assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()), ("data",))
rng = np.random.default_rng(0)
image = jnp.asarray(rng.uniform(0, 255, (8, 9, 10, 3)), jnp.float32)
logits = jnp.asarray(rng.normal(size=(8, 9, 10, 3)), jnp.float32)
weights = jnp.array([0.3, 0.5])

def losses(weights, image, logits, **options):
    features = (jaxcrf.position_features((9, 10), 2.0), jaxcrf.bilateral_features(image, None, 60.0))
    K = jaxcrf.filters.Window(features, 3, weights=weights, blur=options.pop("blur")).normalized("symmetric")
    return jnp.sum(jaxcrf.mean_field(logits, [(K, 1.0)], **options).probs[..., 0] ** 2, (-1, -2))

for options in (
    {"blur": 1},
    {"blur": 2, "damping": 0.2},
    {"blur": 1, "num_iterations": 30, "tolerance": 1e-5},
    {"blur": 2, "num_iterations": 60, "gradient": "implicit"},
):
    def run(weights, image, logits):
        return losses(weights, image, logits, **dict(options))

    split = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    # One image at a time, since early stopping looks at all images of a batch together.
    alone = jnp.concatenate([run(weights, image[i : i + 1], logits[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(jax.jit(split)(weights, image, logits), alone, rtol=1e-5)

    def total(f, argument):
        return jax.grad(lambda w, u: sum(jnp.sum(part) for part in f(w, u)), argument)

    for argument in (0, 1):  # replicated weights, sharded logits
        found = jax.jit(total(lambda w, u: [split(w, image, u)], argument))(weights, logits)
        loop = lambda w, u: [run(w, image[i : i + 1], u[i : i + 1]) for i in range(8)]
        expected = total(loop, argument)(weights, logits)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
print("eight devices agree")
"""


FULLY_CONNECTED = """
import sys
import jax, jax.numpy as jnp, numpy as np
import jaxcrf
from jax.sharding import Mesh, PartitionSpec as P

(kind,) = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()), ("data",))
rng = np.random.default_rng(0)
image = jnp.asarray(rng.uniform(0, 255, (2, 6, 7, 3)), jnp.float32)
logits = jnp.asarray(rng.normal(size=(2, 6, 7, 3)), jnp.float32)

def run(weights, image, logits):
    features = (jaxcrf.position_features((6, 7), 2.0), jaxcrf.bilateral_features(image, 9.0, 60.0))
    K = jaxcrf.filters.fully_connected(features, kind=kind, weights=weights).normalized("symmetric")
    return jnp.sum(jaxcrf.mean_field(logits, K, num_iterations=2).probs[..., 0] ** 2, (-1, -2))

split = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
for f in (lambda f: f, lambda f: jax.grad(lambda *x: jnp.sum(f(*x)), (0, 1, 2))):
    found, alone = jax.jit(f(split)), jax.jit(f(run))
    weights = jnp.array([0.3, 0.5])
    for a, b in zip(
        jax.tree.leaves(found(weights, image, logits)),
        jax.tree.leaves(alone(weights, image, logits)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
print("both devices agree")
"""


def run_program(program, devices, home, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PATH": "", "HOME": str(home)},
    )


@pytest.mark.slow
def test_a_sharded_batch_is_a_loop(tmp_path):
    result = run_program(PROGRAM, 8, tmp_path)
    assert result.stdout.strip() == "eight devices agree", result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "lattice", "landmark"])
def test_fully_connected_filters_are_split_too(kind, tmp_path):
    result = run_program(FULLY_CONNECTED, 2, tmp_path, kind)
    assert result.stdout.strip() == "both devices agree", result.stderr[-2000:]
