r"""The N-ReNet from scratch: Table 1 and fig. 2 of the paper on recurrent layers.

    python experiments/renet_stanford.py --data iccv09Data --runs runs --out results
    python experiments/renet_stanford.py --dataset camvid --data camvid --seeds 1 --runs runs --out results
    python experiments/renet_stanford.py --smoke

Three recurrent layer groups, the first over patches of 2 × 2 pixels, a 1 × 1 convolution, bilinear interpolation;
nothing is pre-trained. Stanford Background has 715 images of 8 labels and no split of its own. There are five folds,
each evaluated with a network that was trained on the others; figures are means over the folds.

Protocol (§4): SGD on random crops of 240 × 320, mirrored at random, smaller images reflected at their edges; batches of
10; the unweighted cross-entropy of all pixels. Tests are on whole images. The paper leaves open how many units there
are (60, 120 and 240 in each direction here), the initial weights (uniform over [-0.2, 0.2], as its H-ReNet's), the rate
and the number of steps (1e-3, a tenth of it in the second half of 30 000 steps, as for its H-ReNet).

It has 80.4 % of the pixels and 71.8 % by class right, and takes 0.07 s an image on its GPU. Others of its Table 1: a
multi-scale ConvNet 78.8 and 72.4 (0.6 s on a CPU), a recurrent CNN 76.2 and 67.2 (1.1 s), a deep 2-D LSTM 78.6 and 68.8
(1.3 s), and with pre-trained features 82.1 and 77.3 (zoom-out).

`--dataset camvid` is a reduced form for CPUs: a network of 16, 32 and 64 units that sees images at a quarter of their
size, patches of 2 × 2 of its pixels; 600 steps of Adam, 2e-3 falling to zero, of 8 crops of 72 × 96, scaled and
recoloured as well. Five to eight minutes a seed on one core. Rows are seeds there.

Runs can be interrupted at any time; the same command goes on where it was. The output is a JSON file, a Markdown table,
some images with what they are labelled as, and the first four maps of the first and the last layer, as fig. 2.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax
from matplotlib.figure import Figure
from PIL import Image
from renet_training import MaskedPredictor, qualitative_figure
from training_tables import (
    FIGURES,
    ReducedFolder,
    Splits,
    camvid_splits,
    num_parameters,
    parse,
    scratch_optimizer,
    summarise,
    table,
    write,
)

from jaxcrf import evaluation, plots
from jaxcrf.data import Augmentation, Pipeline, augmentation, open_folder
from jaxcrf.models import ModelConfig
from jaxcrf.training import Experiment, Stage, Update, objectives, train
from jaxcrf.training.schedules import optimizer_hrenet

NUM_FOLDS = 5
PAPER = {"pixel_accuracy": 80.4, "class_accuracy": 71.8, "seconds": 0.07}
SHOWN_MAPS = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the experiment is; the defaults are the paper's.

    Attributes:
        width: hidden units of the first group, in each direction.
        reduction: how much smaller the network sees images.
        crop: of training images as the network sees them; None for the data set's.
        augmentation: of training images.
        batch_size: of training images.
        optimizer: by the number of steps.
        steps: of a network.
    """

    width: int = 60
    reduction: int = 1
    crop: tuple[int, int] | None = None
    augmentation: Augmentation = dataclasses.field(default_factory=lambda: augmentation.get("hrenet"))
    batch_size: int = 10
    optimizer: Callable[[int], optax.GradientTransformation] = optimizer_hrenet
    steps: int = 30_000


SETTINGS = {
    "full": Setting(),
    "reduced": Setting(
        width=16,
        reduction=4,
        crop=(72, 96),
        augmentation=Augmentation(
            rotation=0.0, scale=(0.75, 1.5), brightness=25.0, hue=9.0, padding="reflect"
        ),
        batch_size=8,
        optimizer=scratch_optimizer,
        steps=600,
    ),
    "smoke": Setting(width=2, batch_size=2, steps=2),
}


def stanford_splits(root: Path, fold: int = 1) -> Splits:
    """A fold of Stanford Background: 572 images to train on, 143 to evaluate."""
    train, val = (open_folder(root, f"{part}_{fold}", "stanford_background") for part in ("train", "test"))
    sizes = []
    for path in (*train.image_paths, *val.image_paths):
        with Image.open(path) as picture:
            sizes.append(picture.size[::-1])
    height, width = np.max(sizes, 0).tolist()
    return Splits(train, train.subset(()), val, (240, 320), (height, width))


def repetitions(args: argparse.Namespace) -> dict[str, tuple[Splits, int]]:
    """Trainings by their name: the folds of Stanford Background, or seeds on other data."""
    if args.scale == "full":
        return {f"fold_{k}": (stanford_splits(args.data, k), k) for k in range(1, NUM_FOLDS + 1)}
    return {f"seed_{seed}": (args.splits, seed) for seed in range(args.seeds)}


def experiment(setting: Setting, splits: Splits, name: str, seed: int) -> Experiment:
    """The training of one network."""
    data = Pipeline(
        ReducedFolder(splits.train, setting.reduction),
        batch_size=setting.batch_size,
        size=setting.crop or splits.crop,
        seed=seed,
        augmentation=setting.augmentation,
    )
    update = Update("network", objectives.segmentation(), setting.optimizer(setting.steps))
    return Experiment(
        name=name,
        model=ModelConfig.of("n_renet", splits.num_labels, width=setting.width),
        data={"train": data},
        stages=(Stage("network", setting.steps, (update,)),),
        validation=None,
        label_names=splits.val.label_names,
        seed=seed,
        checkpoint_every=500,
    )


def feature_map_figure(run: MaskedPredictor, image: np.ndarray) -> Figure:
    """Fig. 2: beside the image the first maps of the first layer, beside the prediction those of the last one."""
    maps = run.feature_maps(image)
    # The image's part of maps that are padded as it was.
    step = run.reduction * run.network.stride
    height, width = (-(-n // step) for n in image.shape[:2])
    shown = {
        name: maps[name][:height, :width] for name in ("renet1_vertical", f"renet{len(maps) // 2}_horizontal")
    }
    return plots.feature_maps(shown, {"image, prediction": [image, run(image).argmax(-1)]}, count=SHOWN_MAPS)


def markdown(rows: dict[str, Any]) -> str:
    """Table 1's last line, beside the paper's."""
    columns = {"pixel_accuracy": "pixel accuracy", "class_accuracy": "class accuracy", "mean_iou": "mIoU"}
    lines = table(rows, columns).splitlines()
    pixels, classes, time = (PAPER[name] for name in ("pixel_accuracy", "class_accuracy", "seconds"))
    paper = f"| paper, Stanford Background | {pixels} | {classes} | | {time} |"
    seconds = [f"{row['seconds']['mean']:.3f}" for row in rows.values()]
    more = ["s/image", "---", *seconds]
    return "".join(f"{line} {cell} |\n" for line, cell in zip(lines, more, strict=True)) + paper + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Trains and evaluates all networks, and writes the results."""
    splits = {"stanford_background": stanford_splits, "camvid": camvid_splits}
    with parse(__doc__, arguments, splits=splits) as args:
        setting = SETTINGS[args.scale]
        found: list[dict[str, dict[str, float]]] = []
        for name, (data, seed) in repetitions(args).items():
            trained = train(experiment(setting, data, name, seed), args.runs / name)
            run = MaskedPredictor(trained.model, setting.reduction, data.whole)
            totals = evaluation.evaluate(run, data.val, widths=(1,), num_pictures=0).totals()
            figures = {figure: totals[figure] for figure in FIGURES}
            found.append({"n_renet": figures | {"seconds": run.seconds()}})
            rows = summarise(found, baseline=None)
            text = markdown(rows)
            print(f"{name}\n{text}")
        write(
            args,
            "renet_stanford",
            __file__,
            rows,
            text,
            parameters=num_parameters(run.network),
            steps=setting.steps,
        )
        # Of the last fold or seed, images spread over those that it is tested on.
        pictures(run, data, args.out, f"renet_stanford_{args.dataset}")


def pictures(run: MaskedPredictor, data: Splits, out: Path, stem: str) -> None:
    """Some labelled images, and the feature maps of one."""
    chosen: Sequence[int] = np.unique(np.linspace(0, len(data.val) - 1, 4).round().astype(int)).tolist()
    qualitative_figure(
        data.val, chosen, {"N-ReNet": lambda image: run(image).argmax(-1)}, out / f"{stem}.png"
    )
    image, _ = data.val[chosen[len(chosen) // 2]]
    plots.save_figure(feature_map_figure(run, image), out / f"{stem}_maps.png")


if __name__ == "__main__":
    main()
