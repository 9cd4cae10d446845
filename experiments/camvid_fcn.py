r"""A small FCN from scratch on CamVid, then ConvCRFs trained on its outputs: Table 2 of the ConvCRF paper.

    python experiments/camvid_fcn.py --data camvid --runs runs --out results
    python experiments/camvid_fcn.py --scale gpu --data camvid --runs runs --out results
    python experiments/camvid_fcn.py --smoke

Decoupled training (ConvCRF, §5.2): the network is trained on 300 of the 367 training images, then frozen, and the
CRF's parameters are trained on the other 67. Rows, evaluated on the 101 validation images at full size:

- `unary`: the network alone,
- `preset`: a ConvCRF with the numbers that `jaxcrf.refine` takes by default, nothing trained,
- `convcrf`: kernel weights and bandwidths trained (hand-crafted features),
- `convcrf+T`, `+C`, `+CT`: also the smoothness features, the label compatibility, both.

The paper has, on PASCAL VOC with a ResNet-101: unary 71.23, ConvCRF 72.04, +T 72.07, +C 72.30, +CT 72.37 mIoU.

`--scale cpu` is a network of 1.3 million parameters that sees images at half size: about ten minutes a seed for the
network and a few for the four CRFs on two quiet cores. `--scale gpu` is seven times as wide in arithmetic, sees full
resolution and trains for 400 epochs. Runs can be interrupted at any time; the same command goes on where it was. The
output is a JSON file, a Markdown table, the training curves and the validation images that changed most.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from convcrf_synthetic import find_data, write_demonstration_folder
from training_tables import predict, summarise, table

from jaxcrf import plots, reporting
from jaxcrf.data import Pipeline
from jaxcrf.data.images import replacing
from jaxcrf.models.convcrf import VARIANTS
from jaxcrf.training import Run, evaluate_pipeline, recipes, train


def evaluate_seed(args: argparse.Namespace, seed: int) -> tuple[dict[str, dict[str, float]], dict[str, Run]]:
    """All rows of one seed: figures of the validation images, and the runs."""
    folder = args.runs / f"seed_{seed}"
    experiment = recipes.camvid_unary(args.data, seed=seed, scale=args.scale)
    runs = {"unary": train(experiment, folder / "unary")}
    val = experiment.data["val"]
    network: Any = runs["unary"].model
    figures = {
        "unary": evaluate_pipeline(predict(network.unary), val),
        "preset": runs["unary"].figures,
    }
    for variant in args.variants:
        tuned = recipes.camvid_crf(args.data, folder / "unary", variant=variant, seed=seed, scale=args.scale)
        runs[variant] = train(tuned, folder / variant)
        figures[variant] = runs[variant].figures
    return figures, runs


def pictures(val: Pipeline, unary: Any, refined: Any, count: int) -> dict[str, list[np.ndarray]]:
    """Columns of a grid: the images on which most pixels changed for the better."""
    found = []
    for index in range(len(val.source)):
        image, truth = val.source[index]
        before, after = (np.asarray(f(image[None]))[0].argmax(-1) for f in (unary, refined))
        valid = truth != val.ignore_label
        better = int(((after == truth) & valid).sum() - ((before == truth) & valid).sum())
        found.append((better, index, before, after))
    best = sorted(found, key=lambda entry: -entry[0])[:count]
    columns: dict[str, list[np.ndarray]] = {"image": [], "truth": [], "unary": [], "ConvCRF+CT": []}
    for _, index, before, after in best:
        image, truth = val.source[index]
        for name, picture in zip(columns, (image, truth, before, after), strict=True):
            columns[name].append(picture)
    return columns


def main(arguments: list[str] | None = None) -> None:
    """Trains and evaluates all seeds, and writes the results."""
    with parse(arguments) as args:
        seeds, last = [], {}
        for seed in range(args.seeds):
            figures, last = evaluate_seed(args, seed)
            seeds.append(figures)
            print(table(summarise(seeds)))
        rows = summarise(seeds)
        unary: Any = last["unary"].model
        val = recipes.camvid_unary(args.data, scale=args.scale).data["val"]
        results = {
            "data": args.data.name,
            "scale": args.scale,
            "seeds": args.seeds,
            "rows": rows,
            "images_per_second": {
                name: float(np.median([r["images_per_second"] for r in run.rows if "images_per_second" in r]))
                for name, run in last.items()
            },
            **reporting.circumstances(__file__),
        }
        reporting.write_json(args.out / "camvid_fcn.json", results)
        with replacing(args.out / "camvid_fcn.md") as file:
            file.write(table(rows).encode())
        curves = plots.training_curves(last["unary"].rows, names=("loss", "mean_iou"))
        plots.save_figure(curves, args.out / "camvid_fcn_curves.png")
        columns = pictures(val, predict(unary.unary), predict(last["convcrf+CT"].model), 4)
        figure = plots.segmentation_grid(columns, label_names=val.source.label_names)
        plots.save_figure(figure, args.out / "camvid_fcn.png")
        print(f"results in {args.out}")


@contextlib.contextmanager
def parse(arguments: list[str] | None) -> Iterator[argparse.Namespace]:
    """The command line; a smoke run gets data and a folder for its runs that are gone afterwards."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the folder of CamVid")
    parser.add_argument("--scale", choices=tuple(recipes.SCALES), default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where checkpoints and logs go")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="a minute piece of everything, without data")
    args = parser.parse_args(arguments)
    args.variants = VARIANTS
    if not args.smoke:
        args.data = find_data(args.data or Path("camvid"), parser)
        yield args
        return
    with tempfile.TemporaryDirectory() as folder:
        args.data, args.runs, args.scale, args.seeds = (
            Path(folder, "camvid"),
            Path(folder, "runs"),
            "smoke",
            1,
        )
        args.variants = ("convcrf+CT",)  # whether it runs: the others are parts of it
        for split in ("train", "val"):
            write_demonstration_folder(args.data, split)
        yield args


if __name__ == "__main__":
    main()
