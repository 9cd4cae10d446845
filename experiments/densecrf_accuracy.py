r"""How exact the fully connected filters are, and what that costs: error against time on photographs.

    python experiments/densecrf_accuracy.py --data VOCdevkit/VOC2012 --limit 4 --out results
    python experiments/densecrf_accuracy.py --smoke

One message `K q` of the appearance kernel `exp(-|p_i - p_j|²/2θ_α² - |I_i - I_j|²/2θ_β²)` is compared with
a float64 sum over all pixels, at random pixels of every image. `q` are the probabilities of the noisy labels of
`convcrf_synthetic.py`. The error of a pixel is `Σ_l |m_l - m*_l| / Σ_l m*_l`; the table has its median and
95th percentile over all pixels and images, once for the bare kernel and once for the symmetrically
normalised one, whose row sums are those of `filters.Dense` (themselves checked against float64 at the
random pixels). Times are those of one message after compilation and, apart, of building the filter.

Any folder in the layout of PASCAL VOC or CamVid will do, as for `convcrf_synthetic.py`. The output is a JSON
file, a Markdown table and a picture. Expected cost: about five minutes per image on 2 CPU cores, nearly all of it
the exact sums.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from convcrf_synthetic import find_data, noisy_logits, write_demonstration_folder
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

import jaxcrf
from jaxcrf import reporting
from jaxcrf.data.folders import open_folder
from jaxcrf.data.images import replacing
from jaxcrf.filters import Dense, Filter, Landmark, Lattice
from jaxcrf.plots import save_figure

BANDWIDTHS = ((80.0, 13.0), (50.0, 5.0), (100.0, 20.0))
LANDMARKS = (32, 64, 128, 256, 512)
RUNS = 5


def filters(landmarks: tuple[int, ...]) -> dict[str, Callable[[Any], Filter]]:
    """What is compared."""
    return {
        "lattice, classic scaling": lambda f: Lattice(f, scaling="classic"),
        "lattice": Lattice,
        "lattice, both orders": lambda f: Lattice(f, symmetric=True),
        **{f"landmark, K = {k}": lambda f, k=k: Landmark(f, num_landmarks=k) for k in landmarks},
    }


def exact_rows(features: np.ndarray, chosen: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """The message at the chosen pixels in float64, `[chosen, labels]`."""
    features, maps = np.asarray(features, np.float64), np.asarray(maps, np.float64)
    rows = []
    for i in chosen:
        distance = np.zeros(len(features))
        for column in features.T:
            distance += (column - column[i]) ** 2
        rows.append(np.exp(-0.5 * distance) @ maps)
    return np.stack(rows)


def timed(function: Callable[[], Any], runs: int) -> tuple[Any, float]:
    """A result and the median time in milliseconds, after a first run."""
    result = jax.block_until_ready(function())
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return result, 1e3 * statistics.median(times)


def relative(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The error of every pixel over all labels."""
    return np.abs(found - expected).sum(-1) / np.abs(expected).sum(-1)


def compare(
    image: np.ndarray, q: jax.Array, bandwidths: tuple[float, float], args: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Errors and times of all filters on one image."""
    features = jaxcrf.bilateral_features(image, *bandwidths)
    flat = np.asarray(features.values).reshape(-1, features.values.shape[-1])
    maps = np.asarray(q).reshape(len(flat), -1)
    chosen = np.random.default_rng(seed).choice(len(flat), min(args.pixels, len(flat)), replace=False)
    bare = exact_rows(flat, chosen, maps)

    ones = jnp.ones((*image.shape[:2], 1))
    start = time.perf_counter()
    sums = np.asarray(Dense(features)(ones)).reshape(-1)
    exact_seconds = time.perf_counter() - start
    exact_sums = exact_rows(flat, chosen, np.ones((len(flat), 1)))[:, 0]
    scale = np.asarray(sums, np.float64) ** -0.5
    normalized = scale[chosen, None] * exact_rows(flat, chosen, scale[:, None] * maps)

    found: dict[str, Any] = {
        "dense": {
            "none": np.abs(sums[chosen] / exact_sums - 1).tolist(),
            "message_ms": 1e3 * exact_seconds,
            "build_ms": 0.0,
        }
    }
    for name, make in filters(args.landmarks).items():
        k, build_ms = timed(lambda make=make: make(features), args.runs)
        message, message_ms = timed(lambda k=k: k(q), args.runs)
        symmetric = k.normalized("symmetric")(q)
        found[name] = {
            "none": relative(np.asarray(message).reshape(maps.shape)[chosen], bare).tolist(),
            "symmetric": relative(np.asarray(symmetric).reshape(maps.shape)[chosen], normalized).tolist(),
            "message_ms": message_ms,
            "build_ms": build_ms,
        }
        if args.runs > 1:
            jax.clear_caches()  # the programs of all lattices and landmarks take gigabytes
    return found


def summarize(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and percentiles over all images."""
    rows = {}
    for name in found[0]:
        row: dict[str, Any] = {
            part: statistics.median(f[name][part] for f in found) for part in ("message_ms", "build_ms")
        }
        for kind in ("none", "symmetric"):
            if kind in found[0][name]:
                errors = np.concatenate([f[name][kind] for f in found])
                row[kind] = {"median": float(np.median(errors)), "p95": float(np.percentile(errors, 95))}
        rows[name] = row
    return rows


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| bandwidths | filter | bare: median | 95 % | normalised: median | 95 % | message, ms | building, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for bandwidths, rows in results.items():
        for name, row in rows.items():
            cells = []
            for kind in ("none", "symmetric"):
                known = row.get(kind)
                cells += [f"{100 * known[part]:.2g} %" for part in ("median", "p95")] if known else ["", ""]
            cells += [f"{row[part]:.0f}" for part in ("message_ms", "build_ms")]
            lines.append(f"| {bandwidths} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """Error against time, one panel per pair of bandwidths; landmarks are joined by a line."""
    figure = Figure(figsize=(4.2 * len(results), 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for panel, (title, rows) in zip(panels, results.items(), strict=True):
        points = {name: (row["message_ms"], 100 * row["none"]["median"]) for name, row in rows.items()}
        line = [point for name, point in points.items() if name.startswith("landmark")]
        panel.plot(*zip(*line, strict=True), "o-", color="#0072B2", markersize=5, label="landmarks, bare")
        for name, (x, y) in points.items():
            if name.startswith("landmark"):
                panel.annotate(
                    name.removeprefix("landmark, "), (x, y), (4, 4), textcoords="offset points", fontsize=7
                )
        for name, color in (("lattice, classic scaling", "#999999"), ("lattice", "#D55E00")):
            panel.plot(*points[name], "s", color=color, markersize=7, label=f"{name}, bare")
        normalized = 100 * rows["lattice"]["symmetric"]["median"]
        panel.plot(
            points["lattice"][0], normalized, "D", color="#D55E00", markerfacecolor="none", markersize=7,
            label="lattice, normalised",
        )  # fmt: skip
        panel.plot(*points["dense"], "*", color="#222222", markersize=10, label="all pairs")
        panel.set(xscale="log", yscale="log", title=f"bandwidths {title}", xlabel="one message, ms")
        panel.grid(color="#dddddd", linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("median error of a message, %")
    panels[-1].legend(fontsize=7, frameon=False)
    return figure


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder in the layout of PASCAL VOC or CamVid")
    parser.add_argument("--split", help="default: val")
    parser.add_argument("--limit", type=int, default=4, help="at most so many images")
    parser.add_argument("--pixels", type=int, default=500, help="random pixels of every image")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the results go")
    parser.add_argument("--name", default="densecrf_accuracy", help="their file name, without suffix")
    parser.add_argument("--smoke", action="store_true", help="a minute piece of everything, without data")
    args = parser.parse_args(arguments)
    if not args.smoke:
        args.data = find_data(args.data, parser)
    args.landmarks = (8, 16) if args.smoke else LANDMARKS
    args.runs = 1 if args.smoke else RUNS
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        if args.smoke:
            write_demonstration_folder(Path(temporary))
            from jaxcrf import _demo

            folder = dataclasses.replace(open_folder(temporary), label_names=_demo.LABELS)
            bandwidths: tuple[tuple[float, float], ...] = (BANDWIDTHS[0],)
            examples = [tuple(x[:48, :64] for x in folder[0])]
        else:
            folder, bandwidths = open_folder(args.data, args.split), BANDWIDTHS
            chosen = np.linspace(0, len(folder) - 1, min(args.limit, len(folder))).round().astype(int)
            examples = [folder[int(i)] for i in chosen]
    results = {}
    for pair in bandwidths:
        found = []
        title = f"{pair[0]:g}, {pair[1]:g}"
        for index, (image, labels) in enumerate(
            track(examples, description=title, console=Console(stderr=True))
        ):
            logits = noisy_logits(labels, folder.num_labels, [0, index], "blocks", 0.8, None)
            found.append(compare(image, jax.nn.softmax(logits), pair, args, index))
        results[title] = summarize(found)
    table = markdown(results)
    args.out.mkdir(parents=True, exist_ok=True)
    reporting.write_json(
        args.out / f"{args.name}.json",
        {
            **reporting.circumstances(__file__),
            "settings": {
                "sizes": [list(image.shape) for image, _ in examples],
                "num_labels": folder.num_labels,
                "pixels": args.pixels,
                "smoke": args.smoke,
            },
            "results": results,
        },
    )
    with replacing(args.out / f"{args.name}.md") as file:
        file.write(table.encode())
    figure = draw(results)
    save_figure(figure, args.out / f"{args.name}.png")
    print(table)
    return results


if __name__ == "__main__":
    main()
