"""The window message against what its peers do, and ConvCRF as a whole.

    python experiments/benchmarks/window_message.py [--out DIR] [--smoke]

Measured in one run, so that ratios hold on a noisy machine:

- one message and its gradients (maps, features, weights) at several sizes, batches and windows, with a
  smoothness and a colour kernel,
- the same by im2col in plain jnp, which is how the public implementations work: shifted copies of the maps
  and kernel values for the whole window are made, then contracted,
- the same row by row with one accumulator over a loop of offsets, kernel values from explicit features (the
  form that the package's own blocks grew out of),
- five mean-field iterations of the reference's ConvCRF, features included, at blur 4 and at full resolution,
- with `--large`, the peak memory of a process that refines an 8-megapixel photograph with 21 labels.

`floor` is the time the machine would need for the multiply-adds and exponentials alone at the rates that
this script measures for a matrix product and for `exp`. Takes about five minutes on two cores and 8 GB.
"""

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from measuring import ceilings, floor_ms, measure

import jaxcrf
from jaxcrf import presets, reporting
from jaxcrf_kernels import window_message
from jaxcrf_kernels.window_message.api import arithmetic

# height, width, labels, window, batch
SIZES = [
    (375, 500, 21, 5, 1),
    (375, 500, 21, 7, 1),
    (375, 500, 21, 11, 1),
    (375, 500, 21, 13, 1),
    (94, 125, 21, 11, 1),
    (94, 125, 21, 11, 8),
    (256, 256, 4, 11, 1),
]
SMOKE_SIZES = [(24, 30, 3, 5, 1), (12, 15, 3, 5, 2)]
IM2COL_LIMIT_GIB = 9.0
POSITION_BANDWIDTH = 3.0


def operands(height: int, width: int, labels: int, batch: int) -> tuple[Array, Array, Array]:
    """Random maps, colours divided by their bandwidth, and kernel weights."""
    rng = np.random.default_rng(0)
    q = rng.random((batch, height, width, labels), dtype=np.float32)
    colours = rng.uniform(0, 255, (batch, height, width, 3)).astype(np.float32) / 13
    return jnp.asarray(q), jnp.asarray(colours), jnp.array([3.0, 10.0])


def ours(q: Array, colours: Array, weights: Array, *, window: int) -> Array:
    """The package's message."""
    none = jnp.zeros((1, *q.shape[1:-1], 0))
    return window_message(
        q,
        [none, colours],
        weights,
        filter_size=window,
        position_bandwidths=[(POSITION_BANDWIDTH,) * 2, None],
    )


def _positions(q: Array) -> Array:
    return jaxcrf.position_features(q.shape[1:-1], POSITION_BANDWIDTH).values[None]


def im2col(q: Array, colours: Array, weights: Array, *, window: int) -> Array:
    """Shifted copies of the maps times kernel values, both for the whole window, contracted."""
    span = window // 2
    height, width = q.shape[1:-1]

    def shifts(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (span, span), (span, span), (0, 0)))
        return jnp.stack(
            [padded[:, dy : dy + height, dx : dx + width] for dy in range(window) for dx in range(window)],
            axis=1,
        )

    kernel: Any = 0.0
    for weight, f in zip(weights, (_positions(q), colours), strict=True):
        kernel = kernel + weight * jnp.exp(-0.5 * jnp.sum((f[:, None] - shifts(f)) ** 2, -1))
    return jnp.einsum("nkhw,nkhwl->nhwl", kernel, shifts(q))


def row_by_row(q: Array, colours: Array, weights: Array, *, window: int) -> Array:
    """Rows outside, offsets inside, one `[labels, columns]` accumulator."""
    span = window // 2
    height, width, labels = q.shape[1:]

    def arrange(x: Array) -> Array:
        return jnp.pad(x.transpose(0, 1, 3, 2), ((0, 0), (span, span), (0, 0), (span, span)))[0]

    maps, features = arrange(q), [arrange(_positions(q)), arrange(colours)]

    def view(x: Array, y: Array, x0: Any) -> Array:
        return lax.dynamic_slice(x, (y, 0, x0), (1, x.shape[1], width))[0]

    def row(y: Array) -> Array:
        centres = [view(f, y + span, span) for f in features]

        def offset(t: Array, total: Array) -> Array:
            dy, dx = lax.div(t, window), lax.rem(t, window)
            kernel: Any = 0.0
            for m, f in enumerate(features):
                kernel = kernel + weights[m] * jnp.exp(
                    -0.5 * jnp.sum((centres[m] - view(f, y + dy, dx)) ** 2, 0)
                )
            return total + kernel * view(maps, y + dy, dx)

        return lax.fori_loop(0, window * window, offset, jnp.zeros((labels, width)))

    return lax.map(row, jnp.arange(height)).transpose(0, 2, 1)[None]


def messages(sizes: list[tuple[int, int, int, int, int]], ceiling: dict[str, float], runs: int) -> list[dict]:
    """Every size by every form, value and value with gradients."""
    rows = []
    for height, width, labels, window, batch in sizes:
        arrays = operands(height, width, labels, batch)
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)
        forms = {"ours": ours, "row by row": row_by_row, "im2col": im2col}
        if batch > 1:
            del forms["row by row"]
        for name, form in forms.items():
            row: dict[str, Any] = {
                "size": [height, width, labels],
                "window": window,
                "batch": batch,
                "form": name,
            }

            def value(q: Array, f: Array, w: Array, form: Any = form, window: int = window) -> Array:
                return form(q, f, w, window=window)

            def gradients(
                q: Array, f: Array, w: Array, value: Any = value, cotangent: Array = cotangent
            ) -> Any:
                return jax.value_and_grad(lambda *x: jnp.vdot(cotangent, value(*x)), (0, 1, 2))(q, f, w)

            copies_gib = 4 * batch * height * width * labels * window**2 / 2**30
            row["value"] = measure(value, *arrays, runs=runs)
            # Autodiff of im2col holds about three times its copies.
            if name == "ours" or (name == "im2col" and 3 * copies_gib < IM2COL_LIMIT_GIB):
                row["value_and_gradient"] = measure(gradients, *arrays, runs=max(2, runs // 3))
            if name == "ours":
                row["floor_ms"] = floor_ms(arithmetic(arrays[0].shape, window, (0, 3)), ceiling)
                row["fraction_of_floor"] = row["floor_ms"] / row["value"]["median_ms"]
            rows.append(row)
            print_row(row)
    return rows


def print_row(row: dict) -> None:
    """One line of the table, as it is measured."""
    height, width, labels = row["size"]
    line = f"{row['batch']}×{height}×{width}×{labels} window {row['window']:2}  {row['form']:<11}"
    for part in ("value", "value_and_gradient"):
        if part in row:
            m = row[part]
            line += f"  {m['median_ms']:9.1f} ms {m['extra_mib']:7.0f} MiB (compile {m['compile_s']:.1f} s)"
    if "fraction_of_floor" in row:
        line += f"  {100 * row['fraction_of_floor']:.0f} % of the floor's speed"
    print(line, flush=True)


def ratios(rows: list[dict]) -> list[dict]:
    """Times and memory of the other forms over ours, and of our gradient over our value."""
    found = []
    for mine in rows:
        if mine["form"] != "ours":
            continue
        entry: dict[str, Any] = {k: mine[k] for k in ("size", "window", "batch")}
        entry["gradient over value"] = mine["value_and_gradient"]["median_ms"] / mine["value"]["median_ms"]
        for other in rows:
            if other["form"] == "ours" or any(other[k] != mine[k] for k in ("size", "window", "batch")):
                continue
            for part in ("value", "value_and_gradient"):
                if part in other:
                    entry[f"{other['form']}, {part}"] = {
                        "time": other[part]["median_ms"] / mine[part]["median_ms"],
                        "memory": other[part]["extra_mib"] / mine[part]["extra_mib"],
                    }
        found.append(entry)
    return found


def refinements(height: int, width: int, labels: int, runs: int) -> list[dict]:
    """Five iterations of the reference's ConvCRF, image in, probabilities out."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.uniform(0, 255, (height, width, 3)), jnp.float32)
    logits = jnp.asarray(np.log(rng.dirichlet(np.ones(labels), (height, width))), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=logits.shape), jnp.float32)
    rows = []
    for blur in (4, 1):
        config = jaxcrf.RefineConfig(dataclasses.replace(presets.get("convcrf_reference"), blur=blur))

        def run(image: Array, logits: Array, config: Any = config) -> Array:
            return jaxcrf.refine_logits(image, logits, config).probs

        def gradients(image: Array, logits: Array, run: Any = run) -> Any:
            return jax.value_and_grad(lambda *x: jnp.vdot(cotangent, run(*x)), (0, 1))(image, logits)

        row = {
            "size": [height, width, labels],
            "blur": blur,
            "iterations": config.preset.num_iterations,
            "value": measure(run, image, logits, runs=runs),
            "value_and_gradient": measure(gradients, image, logits, runs=max(2, runs // 3)),
        }
        rows.append(row)
        value, both = row["value"], row["value_and_gradient"]
        print(
            f"refine {height}×{width}×{labels} blur {blur}: {value['median_ms']:.1f} ms "
            f"{value['extra_mib']:.0f} MiB (compile {value['compile_s']:.1f} s), with gradient "
            f"{both['median_ms']:.1f} ms {both['extra_mib']:.0f} MiB",
            flush=True,
        )
    return rows


def large_photograph() -> None:
    """Refines 2448×3264×21 and prints the peak of this process in GiB; run in a process of its own."""
    rng = np.random.default_rng(0)
    shape = (2448, 3264)
    image = rng.integers(0, 255, (*shape, 3), dtype=np.uint8)
    probs = rng.random((*shape, 21), dtype=np.float32)
    for y in range(shape[0]):
        probs[y] /= probs[y].sum(-1, keepdims=True)
    np.asarray(jaxcrf.refine(image, probs, preset="convcrf_reference"))
    # Not getrusage: what it says of a child includes the parent at the moment of the fork.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for window_message.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--large", action="store_true", help="also the peak memory at 8 megapixels (4 GB)")
    parser.add_argument("--large-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.large_only:
        large_photograph()
        return

    runs = 2 if arguments.smoke else 7
    ceiling = ceilings(128 if arguments.smoke else 2048)
    rates = ", ".join(f"{name} {value / 1e9:.1f} G" for name, value in ceiling.items())
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {rates}", flush=True)
    rows = messages(SMOKE_SIZES if arguments.smoke else SIZES, ceiling, runs)
    results = {
        **reporting.circumstances(__file__),
        "ceilings": ceiling,
        "messages": rows,
        "ratios": ratios(rows),
        "refine": refinements(*((24, 30, 3) if arguments.smoke else (375, 500, 21)), runs),
    }
    if arguments.large:
        command = [sys.executable, __file__, "--large-only"]
        peak = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        results["large_photograph"] = {"size": [2448, 3264, 21], "process_peak_gib": peak}
        print(f"2448×3264×21: process peak {peak:.2f} GiB, input and result included")
    if arguments.out is not None:
        reporting.write_json(arguments.out / "window_message.json", results)


if __name__ == "__main__":
    main()
