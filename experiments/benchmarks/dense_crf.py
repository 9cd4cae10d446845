"""The fully connected CRF: building its filter, five iterations, their gradients, and the same in SciPy.

    python experiments/benchmarks/dense_crf.py [--image FILE] [--out DIR] [--smoke]

Measured in one run, on a piece of 375 × 500 pixels of the photograph that ships with matplotlib (or of FILE), 21
labels, a smoothness kernel of bandwidth 3 and an appearance kernel of (80, 13) and (50, 5), both normalised
symmetrically:

- the lattice: building it, five mean-field iterations, and both together from image to probabilities,
- gradients of weights, bandwidths, image and logits through all of that,
- landmarks, likewise,
- one message of all pairs, at a quarter of the height and width,
- the lattice's iterations in NumPy and SciPy: splat, blurs and slice as sparse matrices, the smoothness
  kernel by `ndimage.correlate1d`, on the vertices that our lattice found (which is thus not timed).

`extra` is what the process's peak grows by over what it held before, programs compiled: filter, iterates and
results. Takes about three minutes on two cores and 4 GB.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
import scipy.sparse
from jax import Array

import jaxcrf
from jaxcrf import _demo, reporting
from jaxcrf.filters import Dense, Filter, Landmark, Lattice
from jaxcrf.filters.lattice import LatticeKernel

BANDWIDTHS = ((80.0, 13.0), (50.0, 5.0))
WEIGHTS = (3.0, 10.0)
SMOOTHNESS = 3.0
ITERATIONS = 5

# As `refine` builds it: what the other scaling corrects, the normalisation takes out again.
LATTICE = partial(Lattice, scaling="continuous")


def resident(name: str) -> float:
    """A line of the process's status, in MiB; 0 where there is no such file."""
    try:
        found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def watch(function: Callable[[], Any], runs: int) -> dict[str, float]:
    """Runs something that may compile: the first call, the median of later ones, and their memory."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    first = time.perf_counter() - start
    before = 0.0
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # makes the peak what is held now
        before = resident("VmRSS")
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return {
        "compile_s": max(first - median, 0.0),
        "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(times),
        "extra_mib": max(resident("VmHWM") - before, 0.0),
    }


def features(image: Array, bandwidths: tuple[float, float]) -> tuple[Any, Any]:
    """Of both kernels."""
    position = jaxcrf.position_features(image.shape[:2], SMOOTHNESS)
    return position, jaxcrf.bilateral_features(image, *bandwidths)


@jax.jit
def infer(k: Filter, logits: Array) -> Array:
    """Five iterations with a filter that is given."""
    return jaxcrf.mean_field(logits, k, num_iterations=ITERATIONS).probs


def ours(
    image: Array, logits: Array, bandwidths: tuple[float, float], kind: Callable[..., Filter], runs: int
) -> dict[str, Any]:
    """Building, iterating, both, and gradients."""

    def build() -> Filter:
        return kind(features(image, bandwidths), weights=WEIGHTS).normalized("symmetric")

    k = build()
    row: dict[str, Any] = {
        "build": watch(build, runs),
        "iterations": watch(lambda: infer(k, logits), runs),
        "together": watch(lambda: infer(build(), logits), runs),
    }
    if isinstance(k, Lattice):
        row["vertices"] = [int(n) for n in k.num_vertices]
        room = k.capacity[0]

        @jax.jit
        def gradients(image: Array, logits: Array, weights: Array) -> Any:
            def value(image: Array, logits: Array, weights: Array) -> Array:
                k = LATTICE(features(image, bandwidths), weights=weights, capacity=room)
                probs = jaxcrf.mean_field(logits, k.normalized("symmetric"), num_iterations=ITERATIONS).probs
                return jnp.vdot(probs, probs)

            return jax.value_and_grad(value, (0, 1, 2))(image, logits, weights)

        weights = jnp.asarray(WEIGHTS)
        row["value_and_gradient"] = watch(lambda: gradients(image, logits, weights), max(2, runs // 3))
    return row


def in_scipy(k: Lattice, logits: np.ndarray, runs: int) -> dict[str, float]:
    """The same iterations with sparse matrices, and what a run of them takes."""
    kernel = next(x for x in k.kernels if isinstance(x, LatticeKernel))
    (count,) = (int(n) for n in k.num_vertices)
    classes, pixels = kernel.vertex.shape[1:]
    vertex, weight = np.asarray(kernel.vertex[0]), np.asarray(kernel.barycentric[0])
    slicing = scipy.sparse.csr_matrix(
        (weight.T.reshape(-1), vertex.T.reshape(-1), np.arange(0, classes * pixels + 1, classes)),
        shape=(pixels, count),
    )
    splatting = slicing.T.tocsr()
    blurs = []
    for pair in np.asarray(kernel.neighbours[0])[:, :, :count]:
        here = np.repeat(np.arange(count), 2)
        there = pair.T.reshape(-1)
        exists = there < count
        half = np.full(exists.sum(), 0.5, np.float32)
        blur = scipy.sparse.csr_matrix((half, (here[exists], there[exists])), shape=(count, count))
        blurs.append(blur + scipy.sparse.identity(count, np.float32, "csr"))
    gain = float(kernel.gain[0])
    reach = int(np.ceil(5.2 * SMOOTHNESS))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTHNESS) ** 2).astype(np.float32)

    def lattice(x: np.ndarray) -> np.ndarray:
        x = splatting @ x.reshape(pixels, -1)
        for blur in blurs:
            x = blur @ x
        return gain * (slicing @ x)

    def smooth(x: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            x = scipy.ndimage.correlate1d(x, taps, axis, mode="constant")
        return x

    def softmax(x: np.ndarray) -> np.ndarray:
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    ones = np.ones((*logits.shape[:2], 1), np.float32)
    roots = [smooth(ones) ** -0.5, lattice(ones).reshape(ones.shape) ** -0.5]

    def run() -> np.ndarray:
        q = softmax(logits)
        for _ in range(ITERATIONS):
            first = roots[0] * smooth(roots[0] * q)
            second = roots[1] * lattice(roots[1] * q).reshape(q.shape)
            q = softmax(logits + WEIGHTS[0] * first + WEIGHTS[1] * second)
        return q

    # Both must compute the same thing for their times to mean anything.
    difference = float(np.abs(run() - np.asarray(infer(k, jnp.asarray(logits)))).max())
    return {"iterations": watch(run, max(1, runs // 4)), "largest_difference": difference}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, help="a photograph of at least 375 × 500 pixels")
    parser.add_argument("--out", type=Path, help="folder for dense_crf.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    arguments = parser.parse_args()
    height, width, labels, runs = (24, 32, 3, 2) if arguments.smoke else (375, 500, 21, 9)
    whole = _demo.photograph() if arguments.image is None else jaxcrf.data.read_image(arguments.image)
    if whole.shape[0] < height or whole.shape[1] < width:
        parser.error(f"--image: is {whole.shape[0]} × {whole.shape[1]}; expected {height} × {width} or more")
    image = jnp.asarray(whole[:height, :width], jnp.float32)
    rng = np.random.default_rng(0)
    logits = np.log(rng.dirichlet(np.ones(labels), (height, width))).astype(np.float32).clip(-10)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {height}×{width}×{labels}", flush=True)

    rows = []
    for bandwidths in BANDWIDTHS:
        row: dict[str, Any] = {"bandwidths": list(bandwidths)}
        for name, kind in (("lattice", LATTICE), ("landmark", Landmark)):
            row[name] = ours(image, jnp.asarray(logits), bandwidths, kind, runs)
            for part, found in row[name].items():
                if isinstance(found, dict):
                    print(
                        f"{bandwidths} {name:8} {part:18} {found['median_ms']:8.1f} ms  {found['extra_mib']:5.0f} MiB"
                        f"  (first call {found['compile_s']:.1f} s more)",
                        flush=True,
                    )
        k = LATTICE(features(image, bandwidths), weights=WEIGHTS).normalized("symmetric")
        row["scipy"] = in_scipy(k, logits, runs)
        ratio = row["scipy"]["iterations"]["median_ms"] / row["lattice"]["iterations"]["median_ms"]
        row["scipy_over_lattice"] = ratio
        print(
            f"{bandwidths} SciPy    iterations         {row['scipy']['iterations']['median_ms']:8.1f} ms, {ratio:.1f} "
            f"times as long; probabilities differ by at most {row['scipy']['largest_difference']:.1e}",
            flush=True,
        )
        small = image[: height // 4, : width // 4]
        dense = Dense(jaxcrf.bilateral_features(small, *bandwidths))
        q = jax.nn.softmax(jnp.asarray(logits[: small.shape[0], : small.shape[1]]))
        row["dense"] = {"size": [*small.shape[:2], labels], "message": watch(lambda k=dense, q=q: k(q), runs)}
        print(
            f"{bandwidths} all pairs of {small.shape[:2]}: {row['dense']['message']['median_ms']:.1f} ms",
            flush=True,
        )
        rows.append(row)
    if arguments.out is not None:
        results = {
            **reporting.circumstances(__file__),
            "size": [height, width, labels],
            "iterations": ITERATIONS,
            "rows": rows,
        }
        reporting.write_json(arguments.out / "dense_crf.json", results)


if __name__ == "__main__":
    main()
