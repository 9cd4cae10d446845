r"""Dense Gaussian CRFs for saliency: Table 5 of Chandra, Usunier and Kokkinos, 2017.

    python experiments/gaussian_crf_saliency.py --data saliency --weights resnet101.safetensors --seeds 1
    python experiments/gaussian_crf_saliency.py --dataset camvid --data camvid --unary-runs runs
    python experiments/gaussian_crf_saliency.py --smoke

Two labels, what stands out and the rest. Trained on MSRA-10K, measured on PASCAL-S and HKU-IS by the largest
F-measure of any threshold, `β² = 0.3`; the folder of --data holds the three as `msra10k`, `pascal_s` and `hku_is`. The
training is that of `gaussian_crf_voc.py`. The paper's figures, PASCAL-S / HKU-IS in percent: DeepLab-v2 85.9 / 91.6,
sparse 86.1 / 91.4, dense 87.2 / 92.7, dense + sparse 86.4 / 92.7.

Cost: the paper gives 2.5 days on a GTX-1080 for a network.

`--dataset camvid` takes for salient what CamVid has of vehicles and people, `OBJECTS`. The unary is
`recipes.camvid_unary` trained on for a little with the two labels; the rest is as for
`gaussian_crf_voc.py --dataset camvid`. About four minutes per row and seed on one quiet core, and a minute for each
seed's unary.

Output: JSON, a Markdown table, affinities of reference pixels, precision against recall, and what the networks say of
four images.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from gaussian_crf_training import CAMVID, PAPER, SMOKE, Row, add_arguments, chosen, grouped, run_seeds
from training_tables import Splits, camvid_splits, parse

from jaxcrf import metrics, plots
from jaxcrf.data import Pipeline, open_folder

OBJECTS = ("car", "pedestrian", "bicyclist")
# Of what little a smoke run has.
SMOKE_OBJECTS = ("pole", "road")
BETA_SQUARED = 0.3

ROWS = {
    "sparse": Row("gaussian_crf_sparse"),
    "dense": Row("gaussian_crf", {"embedding_size": 128}),
    "dense + sparse": Row("gaussian_crf_stacked", {"kind": "general", "embedding_size": 128}),
}

REDUCED_ROWS = {
    "sparse": Row("gaussian_crf_sparse"),
    "dense": Row("gaussian_crf", {"embedding_size": 32}),
    "dense + sparse": Row("gaussian_crf_stacked", {"kind": "general", "embedding_size": 32}),
}

SMOKE_ROWS = {"dense": Row("gaussian_crf", {"embedding_size": 4})}

SCALES = {
    "full": (PAPER, ROWS),
    "reduced": (dataclasses.replace(CAMVID, steps=(100, *CAMVID.steps[1:])), REDUCED_ROWS),
    "smoke": (SMOKE, SMOKE_ROWS),
}


def saliency_splits(root: Path) -> Splits:
    """MSRA-10K to train on, PASCAL-S to evaluate."""
    train, val = (
        open_folder(root / "msra10k", "full", "msra10k"),
        open_folder(root / "pascal_s", "full", "pascal_s"),
    )
    return Splits(train, train, val, (321, 321), (512, 512))


def curve(function: Callable[[Any], Any], pipeline: Pipeline) -> metrics.PrecisionRecallCurve:
    """Precision and recall of a network's probabilities of label 1."""
    counts = metrics.ThresholdCounts.zeros(ignore_label=pipeline.ignore_label)
    with pipeline.epoch() as batches:
        for batch in batches:
            scores = jax.nn.softmax(function(batch["image"]), axis=-1)[..., 1]
            # Rounding may leave a probability a little above one.
            counts = counts.update(batch["labels"], scores.clip(0, 1))
    return counts.curve()


def main(arguments: list[str] | None = None) -> None:
    """Trains and evaluates all rows and seeds, and writes the results."""
    more = functools.partial(add_arguments, scales=SCALES)
    datasets = {"saliency": saliency_splits, "camvid": camvid_splits}
    with parse(__doc__, arguments, splits=datasets, add_arguments=more) as args:
        run(args)


def run(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    setting, rows = chosen(args, SCALES)
    splits: Splits = args.splits
    if args.scale == "full":
        second = dataclasses.replace(splits, val=open_folder(args.data / "hku_is", "full", "hku_is"))
        measured = {"PASCAL-S": splits.evaluated(), "HKU-IS": second.evaluated()}
    else:
        objects = OBJECTS if args.scale == "reduced" else SMOKE_OBJECTS
        splits = grouped(splits, objects, "rest", separate=False)
        measured = {"max F": splits.evaluated()}

    def figures_of(function: Callable[[Any], Any]) -> Mapping[str, float]:
        return {
            name: float(curve(function, pipeline).f_measure(BETA_SQUARED).max())
            for name, pipeline in measured.items()
        }

    trained = run_seeds(
        args,
        "gaussian_crf_saliency",
        __file__,
        setting,
        splits,
        rows,
        evaluate=figures_of,
        columns={name: name for name in measured},
    )
    curves = {name: curve(network.predict, splits.evaluated()) for name, network in trained.items()}
    figure = plots.precision_recall(curves)
    plots.save_figure(figure, args.out / f"gaussian_crf_saliency_{args.dataset}_curves.png")


if __name__ == "__main__":
    main()
