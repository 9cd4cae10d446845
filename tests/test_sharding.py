"""Batches split over devices: every device its own part, in a process with eight of them."""

import subprocess
import sys

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


def test_a_sharded_batch_is_a_loop(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PATH": "", "HOME": str(tmp_path)},
    )
    assert result.stdout.strip() == "eight devices agree", result.stderr[-2000:]
