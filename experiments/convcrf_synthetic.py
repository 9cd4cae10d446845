r"""ConvCRF on synthetic data: Table 1 of Teichmann and Cipolla, *Convolutional CRFs*, 2018 (section 5.1).

Ground truth is made as coarse and as wrong as a network's prediction (down-sampled by 8, every coarse label
kept with probability 0.8 and otherwise replaced at random, up-sampled again); the CRF has to restore it with
the help of the image.

    python experiments/convcrf_synthetic.py --data VOCdevkit/VOC2012 --out results
    python experiments/convcrf_synthetic.py --smoke

Any folder in the layout of PASCAL VOC or CamVid will do. Where JAXCRF_DATA_DIR names a folder of data sets,
--data may be a name in it. The output is a JSON file, a Markdown table and a picture.

Two noises:
  blocks   the coarse labels as they are, in blocks of 8 × 8 pixels. The logits say how often a block is
           right: `unary_from_labels` with confidence 0.8 + 0.2 / L.
  smooth   up-sampled bilinearly, as the paper's published code does; the mixing weights, which lie between
           0 and 1, are themselves the logits, as there. The noisy labels are then about 87 % right, which
           is what the paper reports.

mIoU is that of one confusion matrix over all images, averaged over the classes that occur in the truth (on
a few images, most classes occur in the noise only). ± is the standard deviation over the seeds of the noise.

Expected cost, on 2 CPU cores: about 0.2 s per image and seed for the reference's rows at blur 4, 0.8 s at
blur 1, and a second of compilation per row for every new image size.

Expected numbers, accuracy / mIoU in %. The paper, VOC val: unary 86.60 / 51.87, FullCRF 94.79 / 84.37,
ConvCRF with window 5 97.13 / 90.90, 7 97.13 / 92.98, 11 98.97 / 93.74, 13 98.99 / 93.89. Measured, 3 seeds,
on 30 images of CamVid val (--limit 30) and on 4 images of VOC val (2007_000033, _000129, _000332, _000847):

                           CamVid, blocks   CamVid, smooth   VOC, blocks     VOC, smooth
    unary                  78.79 / 47.10    87.22 / 58.55    78.07 / 64.33   87.21 / 76.10
    reference  5, blur 4   95.65 / 76.47    95.44 / 74.56    95.03 / 86.64   95.73 / 86.81
    reference  7, blur 4   95.27 / 74.38    94.67 / 71.49    96.25 / 88.66   95.57 / 86.22
    reference 11, blur 4   93.53 / 68.15    92.90 / 66.18    96.13 / 87.79   95.10 / 84.65
    reference 13, blur 4   92.50 / 65.23    91.86 / 63.23    95.86 / 86.83   94.65 / 83.27
    reference  5, blur 1   81.82 / 50.75    92.20 / 67.91    80.19 / 66.69   92.46 / 83.52
    reference  7, blur 1   87.80 / 59.19    94.85 / 74.72    85.26 / 72.52   95.51 / 88.24
    reference 11, blur 1   94.68 / 73.82    96.44 / 79.88    94.03 / 85.31   97.12 / 90.93
    reference 13, blur 1   95.53 / 76.45    96.49 / 79.95    95.69 / 88.22   97.17 / 90.93
    convcrf (7, blur 4)    96.09 / 77.68    96.25 / 77.42    96.87 / 90.03   96.85 / 89.78
    convcrf_fine (11, 2)   96.20 / 78.42    96.51 / 79.25    96.86 / 90.15   97.15 / 90.78

The spread over the seeds is at most 0.1 in accuracy and 0.2 in mIoU for the last two rows. The paper's order
of the windows shows at blur 1 only: at blur 4, the larger the window, the more of what is thin is erased by
the default appearance kernel, which knows colours but no distance. These are other images than the paper's:
on the four, a unary without any noise, only down-sampled, has 96.76 / 89.79.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

import jaxcrf
from jaxcrf import metrics, presets, reporting
from jaxcrf.data.folders import SegmentationFolder, open_folder
from jaxcrf.data.images import replacing, write_image, write_labels
from jaxcrf.data.synthetic import corrupt_labels, corrupt_probs
from jaxcrf.plots import save_figure, segmentation_grid

PAPER = {  # Table 1: accuracy, mIoU
    "unary": (86.60, 51.87),
    "densecrf, lattice": (94.79, 84.37),
    "reference 5, blur 4": (97.13, 90.90),
    "reference 7, blur 4": (97.13, 92.98),
    "reference 11, blur 4": (98.97, 93.74),
    "reference 13, blur 4": (98.99, 93.89),
}
REFERENCE = "convcrf_reference"
PICTURES = 4


def fully_connected_rows(filters: tuple[str, ...] = ("lattice", "landmark")) -> dict:
    """The fully connected CRF with its usual parameters."""
    preset = presets.get("densecrf")
    return {f"densecrf, {name}": jaxcrf.RefineConfig(preset, filter=name) for name in filters}


def reference_rows(windows: tuple[int, ...] = (5, 7, 11, 13), blurs: tuple[int, ...] = (4, 1)) -> dict:
    """The published code's default parameters at the paper's window sizes."""
    base = presets.get(REFERENCE)
    return {
        f"reference {window}, blur {blur}": jaxcrf.RefineConfig(
            dataclasses.replace(base, filter_size=window, blur=blur)
        )
        for blur in blurs
        for window in windows
    }


def tuned_rows(files: list[Path]) -> dict:
    """Our own presets: those that ship, and those that `tune_convcrf.py` wrote to `files`."""
    shipped = [name for name in presets.names() if name.startswith("convcrf") and name != REFERENCE]
    rows = {name: jaxcrf.RefineConfig(presets.get(name)) for name in shipped}
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))["presets"]
        rows |= {name: jaxcrf.RefineConfig(presets.Preset(**fields)) for name, fields in found.items()}
    return rows


def noisy_logits(
    labels: np.ndarray, num_labels: int, seed: list[int], noise: str, keep: float, confidence: float | None
) -> jax.Array:
    """The unary logits of one image."""
    if noise == "smooth":
        return jnp.asarray(corrupt_probs(seed, labels, num_labels, keep=keep))
    noisy = corrupt_labels(seed, labels, num_labels, keep=keep)
    right = keep + (1 - keep) / num_labels if confidence is None else confidence
    return jaxcrf.unary_from_labels(noisy, num_labels, confidence=right)


def refined(image: np.ndarray, logits: jax.Array, config: jaxcrf.RefineConfig) -> jax.Array:
    """Probabilities, once they are there."""
    if config.filter == "window":
        probs = jaxcrf.refine_logits(image, logits, config).probs
    else:  # a lattice has the size that the image needs if it is built outside of jit
        probs = jaxcrf.refine(
            image, logits=logits, method="densecrf", preset=config.preset, filter=config.filter
        )
    return probs.block_until_ready()


def evaluate(folder: SegmentationFolder, rows: dict, args: argparse.Namespace) -> tuple[dict, dict]:
    """Confusion matrices `[seeds, L, L]` and times per row, and the pictures' label maps."""
    num_labels = folder.num_labels
    counts = defaultdict(lambda: np.zeros((args.seeds, num_labels, num_labels), np.int64))
    seconds = defaultdict(list)
    compiled = set()
    shown = set(np.linspace(0, len(folder) - 1, min(PICTURES, len(folder))).round().astype(int).tolist())
    pictures = defaultdict(list)
    for index in track(range(len(folder)), description="images", console=Console(stderr=True)):
        image, labels = folder[index]
        if index in shown:
            pictures["image"].append(image)
            pictures["truth"].append(labels)
        for seed in range(args.seeds):
            logits = noisy_logits(labels, num_labels, [seed, index], args.noise, args.keep, args.confidence)
            for name, config in rows.items():
                if config is None:
                    predicted = logits
                else:
                    if (name, image.shape) not in compiled:
                        refined(image, logits, config)
                        compiled.add((name, image.shape))
                    start = time.perf_counter()
                    predicted = refined(image, logits, config)
                    seconds[name].append(time.perf_counter() - start)
                predicted = np.asarray(predicted.argmax(-1))
                matrix = metrics.confusion_matrix(labels, predicted, num_labels, folder.ignore_label)
                counts[name][seed] += np.asarray(matrix)
                if index in shown and seed == 0:
                    pictures[name].append(predicted)
    scores = {name: score(matrices, seconds[name]) for name, matrices in counts.items()}
    return scores, pictures


def score(matrices: np.ndarray, seconds: list[float]) -> dict[str, Any]:
    """Accuracy and mIoU in %, over the classes in the truth: mean and spread over the seeds."""
    accuracy = 100 * np.asarray(metrics.pixel_accuracy(matrices))
    ious = 100 * np.asarray(metrics.per_class_iou(matrices))
    miou = np.array([iou[m.sum(1) > 0].mean() for iou, m in zip(ious, matrices, strict=True)])
    return {
        "accuracy": float(accuracy.mean()),
        "accuracy_std": float(accuracy.std()),
        "miou": float(miou.mean()),
        "miou_std": float(miou.std()),
        "milliseconds": 1000 * float(np.median(seconds)) if seconds else None,
        "per_seed": {"accuracy": accuracy.tolist(), "miou": miou.tolist()},
    }


def markdown(scores: dict) -> str:
    """The table."""
    lines = [
        "| | accuracy | mIoU | ms per image | paper: accuracy | paper: mIoU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, s in scores.items():
        time_taken = "" if s["milliseconds"] is None else f"{s['milliseconds']:.0f}"
        published = " | ".join(f"{x:.2f}" for x in PAPER[name]) if name in PAPER else " | "
        lines.append(
            f"| {name} | {s['accuracy']:.2f} ± {s['accuracy_std']:.2f} | {s['miou']:.2f} ± {s['miou_std']:.2f} "
            f"| {time_taken} | {published} |"
        )
    return "\n".join(lines) + "\n"


def find_data(path: Path | None, parser: argparse.ArgumentParser) -> Path:
    """The folder of --data: as given, or in JAXCRF_DATA_DIR, or that itself."""
    shared = os.environ.get("JAXCRF_DATA_DIR")
    if path is None and shared is None:
        parser.error("name a data set: --data, or the environment variable JAXCRF_DATA_DIR; or use --smoke")
    if path is None or (shared is not None and not path.exists()):
        path = Path(shared, path or "")
    return path


def write_demonstration_folder(root: Path, split: str = "val") -> None:
    """A data set of two pieces of the photograph that ships with matplotlib, in the layout of CamVid."""
    from jaxcrf import _demo

    image, labels = _demo.photograph(), _demo.annotation()
    for part in ("images", "labels"):
        (root / split / part).mkdir(parents=True)
    for name, piece in {"upper": np.s_[:160, 120:320], "lower": np.s_[280:440, 180:380]}.items():
        write_image(root / split / "images" / f"{name}.png", image[piece])
        write_labels(root / split / "labels" / f"{name}.png", labels[piece])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder in the layout of PASCAL VOC or CamVid")
    parser.add_argument("--split", help="default: val")
    parser.add_argument("--limit", type=int, help="at most so many images, evenly spread over the split")
    parser.add_argument("--seeds", type=int, default=3, help="how many draws of the noise")
    parser.add_argument("--noise", choices=("blocks", "smooth"), default="blocks")
    parser.add_argument(
        "--keep", type=float, default=0.8, help="the probability that a coarse label survives"
    )
    parser.add_argument("--confidence", type=float, help="of blocks; default: keep + (1 - keep) / L")
    parser.add_argument("--blur", type=int, nargs="+", default=[4, 1], help="of the reference's rows")
    parser.add_argument("--rows", nargs="+", help="only rows whose names begin with one of these")
    parser.add_argument(
        "--tuned", type=Path, nargs="+", default=[], help="further presets, as written by tune_convcrf.py"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the results go")
    parser.add_argument("--name", default="convcrf_synthetic", help="their file name, without suffix")
    parser.add_argument("--smoke", action="store_true", help="a minute piece of everything, without data")
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        parser.error(f"--seeds: got {args.seeds}; expected at least 1")
    if not args.smoke:
        args.data = find_data(args.data, parser)
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        if args.smoke:
            write_demonstration_folder(Path(temporary))
            from jaxcrf import _demo

            folder = dataclasses.replace(open_folder(temporary), label_names=_demo.LABELS)
            args.seeds = 1
            rows = {
                "unary": None,
                **fully_connected_rows(("lattice",)),
                **reference_rows((5, 11), (4,)),
                **tuned_rows(args.tuned),
            }
        else:
            folder = open_folder(args.data, args.split)
            rows = {
                "unary": None,
                **fully_connected_rows(),
                **reference_rows(blurs=tuple(args.blur)),
                **tuned_rows(args.tuned),
            }
        if args.rows is not None:
            known = ", ".join(rows)
            rows = {name: row for name, row in rows.items() if name.startswith(tuple(args.rows))}
            if not rows:
                raise SystemExit(f"--rows: got {' '.join(args.rows)}; the rows are {known}")
        if args.limit is not None and args.limit < len(folder):
            chosen = np.linspace(0, len(folder) - 1, args.limit).round().astype(int)
            folder = dataclasses.replace(
                folder,
                **{
                    field: tuple(getattr(folder, field)[i] for i in chosen)
                    for field in ("names", "image_paths", "label_paths")
                },
            )
        scores, pictures = evaluate(folder, rows, args)

    result = {
        **reporting.circumstances(__file__),
        "settings": {
            "images": list(folder.names),
            "num_labels": folder.num_labels,
            **{key: getattr(args, key) for key in ("noise", "keep", "confidence", "seeds", "smoke")},
            "presets": {name: dataclasses.asdict(c.preset) for name, c in rows.items() if c is not None},
        },
        "scores": scores,
        "paper": PAPER,
    }
    table = markdown(scores)
    args.out.mkdir(parents=True, exist_ok=True)
    reporting.write_json(args.out / f"{args.name}.json", result)
    with replacing(args.out / f"{args.name}.md") as file:
        file.write(table.encode())
    shown = {
        "image": "image",
        "truth": "label",
        "unary": "noised",
        "densecrf, lattice": "dense CRF",
        "reference 11, blur 4": "ConvCRF, window 11",
    }
    tuned = [name for name in tuned_rows(args.tuned) if name in scores]
    if tuned:
        best = max(tuned, key=lambda name: scores[name]["miou"])
        shown[best] = best
    columns = {title: pictures[key] for key, title in shown.items() if key in pictures}
    # Label maps keep their void; predictions have none.
    figure = segmentation_grid(columns, label_names=folder.label_names, ignore_label=folder.ignore_label)
    save_figure(figure, args.out / f"{args.name}.png")
    print(table)
    return result


if __name__ == "__main__":
    main()
