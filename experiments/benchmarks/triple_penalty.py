"""The triple penalty of the Deep Parsing Network: box sums against the window pixel by pixel.

    python experiments/benchmarks/triple_penalty.py [--out DIR] [--smoke]

Measured in one run, so that ratios hold on a noisy machine:

- the value at 512×512×21 by box sums for windows of 10, 50 and 100 pixels (Table 2 (a) of the paper), whose cost should
  not depend on the window,
- the value by windows, row by row with one accumulator, at the paper's window of 50,
- value and gradients of probabilities, image and weights,
- the whole deep parsing step with 5 contexts of 9×9 for each label,
- the largest error of both forms over random pixels against a float64 sum, relative to the largest sum and to each.

`extra_maps` is the compiled program's own memory in maps of the input's size, besides operands and results. On
two cores the whole takes about a minute.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from measuring import measure

import jaxcrf
from jaxcrf import reporting

SIZE, SMOKE_SIZE = (512, 512, 21), (24, 30, 3)
WINDOWS, SMOKE_WINDOWS = (10, 50, 100), (4, 6)
MAIN_WINDOW, SMOKE_MAIN_WINDOW = 50, 6
COLOR_WEIGHT, POSITION_WEIGHT = 1e-3, 1e-2


def operands(height: int, width: int, labels: int) -> tuple[Array, Array]:
    """Random maps, and an image of smooth colours with noise."""
    rng = np.random.default_rng(0)
    probs = rng.random((height, width, labels), dtype=np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    smooth = np.stack([128 + 90 * np.sin(0.02 * (a * y + b * x)) for a, b in ((1, 0), (0, 1), (1, 1))], -1)
    image = np.clip(np.round(smooth + rng.normal(scale=10, size=smooth.shape)), 0, 255)
    return jnp.asarray(probs), jnp.asarray(image, jnp.float32)


def sums(probs: Array, image: Array, weights: Array, *, window: int, method: str) -> Array:
    """What is measured, without the factor of the centre."""
    return jaxcrf.triple_penalty(
        probs,
        image,
        window=window,
        color_weight=weights[0],
        position_weight=weights[1],
        multiply_center=False,
        method=method,
    )


def errors(found: Array, probs: Array, image: Array, window: int, pixels: int) -> dict[str, float]:
    """Over random pixels, against a direct sum in float64."""
    p, colours = np.asarray(probs), np.asarray(image, np.float64)
    height, width = p.shape[:2]
    rng = np.random.default_rng(1)
    absolute, relative, largest = [], [], float(found.max())
    for y, x in zip(rng.integers(0, height, pixels), rng.integers(0, width, pixels), strict=True):
        rows = np.arange(max(0, y - window // 2), min(height, y + window - window // 2))
        columns = np.arange(max(0, x - window // 2), min(width, x + window - window // 2))
        near = np.ix_(rows, columns)
        d = COLOR_WEIGHT * ((colours[near] - colours[y, x]) ** 2).sum(-1)
        d += POSITION_WEIGHT * ((rows - y)[:, None] ** 2 + (columns - x)[None] ** 2)
        exact = (d[..., None] * p[near].astype(np.float64)).sum((0, 1))
        error = np.abs(np.asarray(found[y, x]) - exact)
        absolute.append(error.max() / largest)
        relative.append((error / exact).max())
    return {"of_largest": float(max(absolute)), "relative": float(max(relative))}


def report(name: str, row: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """One line of the table, as it is measured, with memory in maps."""
    row["extra_maps"] = row["extra_mib"] * 2**20 / (4 * np.prod(shape))
    print(
        f"{name:<42} {row['median_ms']:9.1f} ms (fastest {row['min_ms']:9.1f})  {row['extra_mib']:6.0f} MiB, "
        f"{row['extra_maps']:.1f} maps (compile {row['compile_s']:.1f} s)",
        flush=True,
    )
    return row


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for triple_penalty.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    arguments = parser.parse_args()
    shape = SMOKE_SIZE if arguments.smoke else SIZE
    windows, main_window = (SMOKE_WINDOWS, SMOKE_MAIN_WINDOW) if arguments.smoke else (WINDOWS, MAIN_WINDOW)
    runs = 2 if arguments.smoke else 7
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {'×'.join(map(str, shape))}", flush=True)
    probs, image = operands(*shape)
    weights = jnp.array([COLOR_WEIGHT, POSITION_WEIGHT], jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    results: dict[str, Any] = {**reporting.circumstances(__file__), "size": list(shape), "value": {}}

    def value(window: int, method: str) -> Any:
        return lambda p, i, w: sums(p, i, w, window=window, method=method)

    for window in windows:
        row = measure(value(window, "box"), probs, image, weights, runs=runs)
        results["value"][f"box, window {window}"] = report(f"box, window {window}", row, shape)
    name = f"window by window, {main_window}"
    row = measure(value(main_window, "window"), probs, image, weights, runs=2)
    results["value"][name] = report(name, row, shape)
    box = results["value"][f"box, window {main_window}"]
    results["window_over_box"] = row["min_ms"] / box["min_ms"]
    results["memory_of_window_over_box"] = row["extra_mib"] / box["extra_mib"]

    def gradients(p: Array, i: Array, w: Array) -> Any:
        return jax.value_and_grad(lambda *x: jnp.vdot(cotangent, value(main_window, "box")(*x)), (0, 1, 2))(
            p, i, w
        )

    row = measure(gradients, probs, image, weights, runs=max(2, runs // 2))
    results["value_and_gradients"] = report("box, with gradients", row, shape)

    params = jaxcrf.deep_parsing_init(jax.random.key(0), shape[-1], window=main_window)

    def step(p: Array, i: Array, params: Any) -> Array:
        return jaxcrf.deep_parsing_step(p, i, params, window=main_window).probs

    row = measure(step, probs, image, params, runs=2)
    results["deep_parsing_step"] = report("deep parsing step", row, shape)

    results["errors"] = {}
    for method in ("box", "window"):
        found = value(main_window, method)(probs, image, weights)
        error = errors(found, probs, image, main_window, 20 if arguments.smoke else 500)
        results["errors"][method] = error
        print(f"{method}: error {error['of_largest']:.1e} of the largest, relative {error['relative']:.1e}")
    print(f"window by window takes {results['window_over_box']:.1f} times as long as box")
    if arguments.out is not None:
        reporting.write_json(arguments.out / "triple_penalty.json", results)


if __name__ == "__main__":
    main()
