r"""H-ReNet, recurrent layers on a fully convolutional network: Tables 4 and 5 of the paper, and its other studies.

    python experiments/hrenet_voc.py --data VOCdevkit/VOC2012 --weights vgg16.safetensors --runs runs --out results
    python experiments/hrenet_voc.py --dataset camvid --data camvid --runs runs --out results
    python experiments/hrenet_voc.py --smoke

Rows (`--rows` takes some of them), with the paper's mIoU on VOC's validation set, by itself and with the fully
connected CRF:

| row | | mIoU | with CRF |
|---|---|---|---|
| baseline | VGG-16 at stride 8, `conv6` of rate 12 | 63.4 | 67.5 |
| hrenet | a recurrent layer group on it, 120 units in each direction | 70.0 | |
| hrenet_bn | what goes into the group normalised by batches (Table 5: from conv7) | 70.4 | 71.9 |
| hrenet_bn_mlfb | from pool4, pool5 and conv7 (Tables 4 and 5) | 71.1 | 72.6 |
| hrenet_bn_conv7_pool5 | from pool5 and conv7 (Table 5) | 70.9 | |
| hrenet_bn_pool5, hrenet_bn_pool4 | from one of these alone (Table 5) | 68.3, 59.2 | |
| hrenet_l2_mlfb | every map of an image scaled to a norm, 100, 1000 or 10 000 | "no improvement" | |
| irnn_bn | IRNNs in place of LSTMs, with as many parameters | 67.2 | |
| baseline_256, baseline_320 | crops of 256 × 320, 320 × 400 | 63.6, 63.4 | |
| hrenet_bn_mlfb_256, hrenet_bn_mlfb_320 | likewise | 67.3, 69.3 | |
| hrenet_bn_convcrf | `hrenet_bn` with a ConvCRF that is trained on images held out: the paper's future work | | |
| hrenet_bn_mlfb_coco | trained with MS COCO first (`--coco`); the paper has it on VOC's test set, 75.3 | | |

An image takes it 0.21 s (baseline), 0.24 s (H-ReNet) and 0.46 s with two iterations of the CRF, which is a
post-process with parameters searched for on the held-out images, as in `deeplab_voc.py`; ten iterations here.

Protocol (§4): conv1 to conv5 from ImageNet's VGG-16, of which conv1 and conv2 stay as they are; other convolutions from
a normal distribution of deviation 0.1, ReNet layers uniform over [-0.2, 0.2]. SGD at 1e-3, a tenth of it in the
second half of 12 000 (baseline), 30 000, or with several layers combined 40 000 steps, momentum 0.9 and weight decay
5e-4; batches of 10 crops of 400 × 500, mirrored at random, smaller images reflected at their edges. With COCO 120 000
steps on both data sets, a tenth of the rate after every 50 000, and then 30 000 on VOC. Tests are on whole images; a
mask keeps the recurrent layers out of the padding that makes them one size. The paper trains on all 10 582 images; 200
are held out here, for the CRF and for the norm of hrenet_l2_mlfb.

`--dataset camvid` is a reduced form for CPUs: a quarter of the width, batch normalisation, 64 units in each direction,
half-size images and half the rate of `conv6`; Adam, 2e-3 falling to zero, ten times as much for the last layer and
twice for the group; 5 images of 180 × 240 a step. Nothing is pre-trained: a baseline from scratch, 300 steps, gives all
rows of a seed their conv1 to conv5, as ImageNet's VGG-16 does otherwise. From there all take the same 600 steps, conv1
and conv2 as they are. Seven minutes a row and five for what they begin with, on one core, and a second an image for the
CRF, whose parameters are searched for once, with the baseline of the first seed.

Runs can be interrupted at any time; the same command goes on where it was. The output is a JSON file, a Markdown table,
after every seed, and a picture after fig. 4, of images in which many pixels changed for the better.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax
from deeplab_voc import DenseCRF
from renet_training import MaskedPredictor, qualitative_figure
from training_tables import (
    FIGURES,
    ReducedFolder,
    Splits,
    camvid_splits,
    num_parameters,
    parse,
    scratch_optimizer,
    searched,
    summarise,
    voc_splits,
    write,
)

from jaxcrf import evaluation
from jaxcrf.compat import weights
from jaxcrf.data import Augmentation, Pipeline, SegmentationFolder, augmentation, open_folder
from jaxcrf.models import ModelConfig
from jaxcrf.models.convcrf import Refined
from jaxcrf.nn import ConvCRF
from jaxcrf.training import Experiment, Stage, Update, load_model, objectives, save_model, train
from jaxcrf.training.schedules import optimizer_hrenet
from jaxcrf.training.search import SPACES

BATCH_NORM = {"normalization": "batch"}
ALL_LAYERS = {"sources": ("pool4", "pool5", "conv7")}


@dataclasses.dataclass(frozen=True)
class Row:
    """A network and how it is trained.

    Attributes:
        options: of `h_renet`.
        steps: in the paper.
        crop: of training images; None for 400 × 500.
        l2_scales: of which the best on held-out images is taken; none without such a normalisation.
        convcrf: the row whose network gets a ConvCRF instead of being trained.
        coco: whether COCO comes first.
        paper: mIoU, by itself and with the CRF.
    """

    options: Mapping[str, Any]
    steps: int = 30_000
    crop: tuple[int, int] | None = None
    l2_scales: tuple[float, ...] = ()
    convcrf: str | None = None
    coco: bool = False
    paper: tuple[float | None, float | None] = (None, None)


BASELINE, COMBINED = {"cell": None}, BATCH_NORM | ALL_LAYERS
ROWS = {
    "baseline": Row(BASELINE, 12_000, paper=(63.4, 67.5)),
    "hrenet": Row({}, paper=(70.0, None)),
    "hrenet_bn": Row(BATCH_NORM, paper=(70.4, 71.9)),
    "hrenet_bn_mlfb": Row(COMBINED, 40_000, paper=(71.1, 72.6)),
    "hrenet_bn_conv7_pool5": Row(BATCH_NORM | {"sources": ("pool5", "conv7")}, 40_000, paper=(70.9, None)),
    "hrenet_bn_pool5": Row(BATCH_NORM | {"sources": ("pool5",)}, paper=(68.3, None)),
    "hrenet_bn_pool4": Row(BATCH_NORM | {"sources": ("pool4",)}, paper=(59.2, None)),
    "hrenet_l2_mlfb": Row({"normalization": "l2"} | ALL_LAYERS, 40_000, l2_scales=(100.0, 1000.0, 10_000.0)),
    "irnn_bn": Row(BATCH_NORM | {"cell": "irnn"}, paper=(67.2, None)),
    "baseline_256": Row(BASELINE, 12_000, (256, 320), paper=(63.6, None)),
    "baseline_320": Row(BASELINE, 12_000, (320, 400), paper=(63.4, None)),
    "hrenet_bn_mlfb_256": Row(COMBINED, 40_000, (256, 320), paper=(67.3, None)),
    "hrenet_bn_mlfb_320": Row(COMBINED, 40_000, (320, 400), paper=(69.3, None)),
    "hrenet_bn_convcrf": Row(BATCH_NORM, convcrf="hrenet_bn"),
    "hrenet_bn_mlfb_coco": Row(COMBINED, coco=True),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the experiment is; the defaults are the paper's.

    Attributes:
        rows: that are taken unless others are asked for.
        crf_rows: with the fully connected CRF as well.
        width: of VGG's first stage.
        hidden_channels: of `conv6` and `conv7`.
        recurrent_channels: of LSTMs, in each direction.
        rate: of `conv6`.
        deviation: of initial weights; None for one by the size of each layer.
        norm: batch normalisation in the backbone.
        dropout: after `conv6` and `conv7`.
        reduction: how much smaller the networks see images.
        crop: of training images as networks see them; None for the row's, or the data set's.
        augmentation: of training images.
        batch_size: of training images.
        optimizer: by the number of steps.
        steps: of every network; None for the row's.
        pretraining: steps of a baseline from scratch, whose conv1 to conv5 are those that networks begin with; 0
            where there are ImageNet's.
        coco_steps: before.
        trainable: patterns of the parameters that are trained.
        learning_rates: pattern → factor on the rate.
        crf_steps: of the ConvCRF.
        space: of the fully connected CRF's parameters.
        held_out: how many images are searched on.
        coarse: see `search`.
        refinements: see `search`.
        search_once: whether the first row's and seed's parameters are those of all.
    """

    rows: tuple[str, ...] = tuple(name for name, row in ROWS.items() if not row.coco)
    crf_rows: tuple[str, ...] = ("baseline", "hrenet_bn", "hrenet_bn_mlfb", "hrenet_bn_mlfb_coco")
    width: int = 64
    hidden_channels: int = 1024
    recurrent_channels: int = 120
    rate: int = 12
    deviation: float | None = 0.1
    norm: bool = False
    dropout: float = 0.5
    reduction: int = 1
    crop: tuple[int, int] | None = None
    augmentation: Augmentation = dataclasses.field(default_factory=lambda: augmentation.get("hrenet"))
    batch_size: int = 10
    optimizer: Callable[[int], optax.GradientTransformation] = optimizer_hrenet
    steps: int | None = None
    pretraining: int = 0
    coco_steps: int = 120_000
    # All that does not begin with a b, and of the backbone what comes after conv2.
    trainable: tuple[str, ...] = ("[!b]*", "backbone/*[345]_*")
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    crf_steps: int = 100
    space: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=lambda: SPACES["densecrf"])
    held_out: int = 100
    coarse: int = 3
    refinements: int = 1
    search_once: bool = False


SETTINGS = {
    "full": Setting(),
    "reduced": Setting(
        rows=("baseline", "hrenet", "hrenet_bn"),
        crf_rows=("baseline", "hrenet_bn"),
        width=16,
        hidden_channels=128,
        recurrent_channels=64,
        rate=6,
        deviation=None,
        norm=True,
        dropout=0.1,
        reduction=2,
        # Whole images: recurrent layers that have never swept that far do worse.
        crop=(180, 240),
        augmentation=Augmentation(rotation=0.0, scale=(0.75, 1.5), brightness=25.0, hue=9.0),
        batch_size=5,
        optimizer=scratch_optimizer,
        steps=600,
        pretraining=300,
        # What states between -1 and 1 are multiplied with has a long way to go.
        learning_rates={"classifier/*": 10.0, "group/*": 2.0},
        held_out=8,
        refinements=0,
        search_once=True,
    ),
    # Whether it runs: the other rows are these with other numbers.
    "smoke": Setting(
        rows=("hrenet_bn", "hrenet_bn_convcrf"),
        # Its search and evaluation are those of deeplab_voc.py, which has a smoke run of its own.
        crf_rows=(),
        width=4,
        hidden_channels=8,
        recurrent_channels=4,
        batch_size=2,
        steps=2,
        crf_steps=1,
        space={"bilateral_weight": (5, 10)},
        held_out=1,
        coarse=1,
        refinements=0,
    ),
}


class Joined:
    """The examples of two data sets one after the other."""

    def __init__(self, first: SegmentationFolder, second: SegmentationFolder):
        self._parts = (first, second)
        self.ignore_label = first.ignore_label

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        first, second = self._parts
        return first[index] if index < len(first) else second[index - len(first)]


def paper_splits(root: Path) -> Splits:
    """VOC with SBD and the paper's crops."""
    return dataclasses.replace(voc_splits(root), crop=(400, 500))


def irnn_channels(channels: int, recurrent_channels: int) -> int:
    """Hidden units with which IRNNs have as many parameters as LSTMs, or just about.

    A layer of `d` units in each of two directions and `G` gates has `2 G d (c + d + 1)` parameters for `c` channels,
    and the second one of a group `c = 2 d`.
    """
    c, d = channels, recurrent_channels
    wanted = 8 * d * (c + d + 1) + 8 * d * (2 * d + d + 1)
    # 2 u (c + u + 1) + 2 u (3 u + 1) = 8 u² + 2 (c + 2) u
    half = (c + 2) / 8
    return round(math.sqrt(half**2 + wanted / 8) - half)


def configuration(setting: Setting, row: Row, num_labels: int, l2_scale: float | None = None) -> ModelConfig:
    """The network of a row."""
    options = dict(row.options)
    recurrent_channels = setting.recurrent_channels
    if options.get("cell") == "irnn":
        recurrent_channels = irnn_channels(setting.hidden_channels, recurrent_channels)
    if l2_scale is not None:
        options["l2_scale"] = l2_scale
    return ModelConfig.of(
        "h_renet",
        num_labels,
        width=setting.width,
        hidden_channels=setting.hidden_channels,
        recurrent_channels=recurrent_channels,
        rate=setting.rate,
        deviation=setting.deviation,
        norm=setting.norm,
        dropout=setting.dropout,
        **options,
    )


def pipeline(args: argparse.Namespace, setting: Setting, row: Row, source: Any, seed: int) -> Pipeline:
    """Batches of crops."""
    return Pipeline(
        ReducedFolder(source, setting.reduction),
        batch_size=setting.batch_size,
        size=setting.crop or (row.crop if args.scale == "full" else None) or args.splits.crop,
        seed=seed,
        augmentation=setting.augmentation,
    )


def initial_weights(args: argparse.Namespace, setting: Setting, seed: int) -> Path | None:
    """What conv1 to conv5 begin with, under torchvision's names."""
    if not setting.pretraining:
        return args.weights
    folder = args.runs / f"seed_{seed}"
    path = folder / "vgg16.safetensors"
    if not path.exists():
        update = Update("pretraining", objectives.segmentation(), setting.optimizer(setting.pretraining))
        experiment = Experiment(
            name="pretraining",
            model=configuration(setting, ROWS["baseline"], args.splits.num_labels),
            data={"train": pipeline(args, setting, ROWS["baseline"], args.splits.train, seed)},
            stages=(Stage(update.name, setting.pretraining, (update,)),),
            validation=None,
            label_names=args.splits.val.label_names,
            seed=seed,
            checkpoint_every=500,
        )
        weights.write_state_dict(path, weights.export(train(experiment, folder / "pretraining").model))
    return path


def network_experiment(
    args: argparse.Namespace, setting: Setting, name: str, config: ModelConfig, seed: int
) -> Experiment:
    """The training of one network."""
    splits: Splits = args.splits
    row = ROWS[name]
    steps = setting.steps or row.steps
    loss = objectives.segmentation()
    data = {"train": pipeline(args, setting, row, splits.train, seed)}
    rates = dict(setting.learning_rates)
    if row.options.get("cell", "lstm") is None:
        rates.pop("group/*", None)
    update = Update(
        "network", loss, setting.optimizer(steps), trainable=setting.trainable, learning_rates=rates
    )
    stages: tuple[Stage, ...] = (Stage("network", steps, (update,)),)
    if row.coco:
        both: Any = Joined(splits.train, open_folder(args.coco, "trainval2014", "coco_voc"))
        data["coco"] = pipeline(args, setting, row, both, seed)
        optimizer = optimizer_hrenet(setting.coco_steps, every=50_000)
        first = Update("coco", loss, optimizer, trainable=setting.trainable)
        stages = (Stage("coco", setting.coco_steps, (first,), split="coco"), *stages)
    return Experiment(
        name=name,
        model=config,
        data=data,
        stages=stages,
        validation=None,
        label_names=splits.val.label_names,
        seed=seed,
        checkpoint_every=500,
        initial=initial_weights(args, setting, seed),
    )


def crf_experiment(args: argparse.Namespace, setting: Setting, name: str, seed: int) -> Experiment:
    """The training of a ConvCRF on a network, which stays as it is, on images that this has not seen."""
    folder = args.runs / f"seed_{seed}"
    splits: Splits = args.splits
    base: Any = load_model(folder / str(ROWS[name].convcrf)).model
    crf_options = {"preset": "convcrf_trainable", "trainable_compatibility": True}
    config = ModelConfig.of(
        base.config.name,
        splits.num_labels,
        refine="convcrf",
        refine_options=crf_options,
        **base.config.to_json()["options"],
    )
    initial = folder / f"{name}_start"
    if not initial.exists():
        model: Any = Refined(base, ConvCRF(splits.num_labels, **crf_options))
        model.config = config
        save_model(initial, model)
    update = Update(
        "crf",
        objectives.segmentation(),
        optax.adam(1e-2),
        trainable=("crf/*",),
        evaluating=("unary",),
    )
    return Experiment(
        name=name,
        model=config,
        data={"held_out": pipeline(args, setting, ROWS[name], splits.held_out, seed)},
        stages=(Stage("crf", setting.crf_steps, (update,), split="held_out"),),
        validation=None,
        label_names=splits.val.label_names,
        seed=seed,
        checkpoint_every=None,
        initial=initial,
    )


def trained_network(args: argparse.Namespace, setting: Setting, name: str, seed: int) -> MaskedPredictor:
    """The network of a row, trained, or read where it has been."""
    folder, row = args.runs / f"seed_{seed}", ROWS[name]

    def run(experiment: Experiment, path: Path) -> MaskedPredictor:
        return MaskedPredictor(train(experiment, path).model, setting.reduction, args.splits.whole)

    if row.convcrf is not None:
        trained_network(args, setting, row.convcrf, seed)
        return run(crf_experiment(args, setting, name, seed), folder / name)
    if not row.l2_scales:
        config = configuration(setting, row, args.splits.num_labels)
        return run(network_experiment(args, setting, name, config, seed), folder / name)
    found = []
    for scale in row.l2_scales if args.scale == "full" else row.l2_scales[:1]:
        config = configuration(setting, row, args.splits.num_labels, scale)
        network = run(network_experiment(args, setting, name, config, seed), folder / f"{name}_{scale:g}")
        held_out = evaluation.evaluate(network, args.splits.held_out, widths=(1,), num_pictures=0)
        found.append((held_out.totals()["mean_iou"], scale, network))
        print(f"seed {seed}: {name}: norm {scale:g}: {found[-1][0]:.4f} on held-out images")
    return max(found, key=lambda entry: entry[0])[-1]


def evaluate_row(
    args: argparse.Namespace, setting: Setting, name: str, seed: int
) -> tuple[dict[str, float], evaluation.Evaluation, MaskedPredictor]:
    """Figures of a row by itself and, where it gets one, with the CRF; the former's evaluation, and the network."""
    run = trained_network(args, setting, name, seed)
    crf = None
    if name in setting.crf_rows:
        path = args.runs / f"seed_{seed}" / f"{name}_crf.json"
        if setting.search_once:
            path = args.runs / "crf.json"
        crf = DenseCRF(
            searched(
                path,
                args.splits.held_out,
                run,
                count=setting.held_out,
                space=setting.space,
                coarse=setting.coarse,
                refinements=setting.refinements,
            )
        )
    result = evaluation.evaluate(run, args.splits.val, refine=crf, widths=(1,), num_pictures=0)
    alone = result if result.baseline is None else result.baseline
    figures = {figure: alone.totals()[figure] for figure in FIGURES}
    figures |= {"seconds": run.seconds(), "parameters": float(num_parameters(run.network))}
    if crf is not None:
        figures |= {f"crf_{figure}": result.totals()[figure] for figure in FIGURES}
        figures["crf_seconds"] = float(np.median(crf.seconds))
    shown = {name: round(value, 4) for name, value in figures.items() if "mean_iou" in name}
    print(f"seed {seed}: {name}: {shown}")
    return figures, alone, run


def percent(entry: Mapping[str, Any], sign: str = "") -> str:
    """Mean ± standard deviation over seeds, in percent."""
    spread = "" if entry["spread"] is None else f" ± {100 * entry['spread']:.2f}"
    return f"{100 * entry['mean']:{sign}.2f}{spread}"


def markdown(rows: Mapping[str, Mapping[str, Any]], *, paper: bool) -> str:
    """Tables 4 and 5 in one: what every row has, and the paper's figures where it is the paper's data set."""
    headings = ["mIoU", "with CRF", "pixel accuracy", "gain", "parameters, M", "s/image"]
    headings += ["paper: mIoU", "paper: with CRF"] if paper else []
    lines = [f"| | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    for name, row in rows.items():
        cells = [
            percent(row["mean_iou"]),
            percent(row["crf_mean_iou"]) if "crf_mean_iou" in row else "",
            percent(row["pixel_accuracy"]),
            percent(row["gain"], "+") if name != "baseline" and "gain" in row else "",
            f"{row['parameters']['mean'] / 1e6:.2f}",
            f"{row['seconds']['mean']:.3f}",
        ]
        if paper:
            cells += ["" if value is None else f"{value:.1f}" for value in ROWS[name].paper]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What else can be asked for."""
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), metavar="ROW", help="only these rows")
    parser.add_argument("--coco", type=Path, help="the folder of MS COCO, for hrenet_bn_mlfb_coco")


def main(arguments: list[str] | None = None) -> None:
    """Trains and evaluates all rows and seeds, and writes the results."""
    datasets = {"voc2012": paper_splits, "camvid": camvid_splits}
    with parse(__doc__, arguments, splits=datasets, add_arguments=add_arguments) as args:
        setting = SETTINGS[args.scale]
        names = args.rows or [*setting.rows, *(["hrenet_bn_mlfb_coco"] if args.coco else [])]
        if args.scale == "full" and args.weights is None:
            raise SystemExit("--weights: got none; the paper's networks begin with ImageNet's VGG-16")
        if "hrenet_bn_mlfb_coco" in names and args.coco is None:
            raise SystemExit("--coco: got none; hrenet_bn_mlfb_coco is trained on MS COCO first")
        seeds: list[dict[str, dict[str, float]]] = []
        for seed in range(args.seeds):
            found = {name: evaluate_row(args, setting, name, seed) for name in names}
            seeds.append({name: figures for name, (figures, _, _) in found.items()})
            rows = summarise(seeds, "baseline" if "baseline" in names else None)
            text = markdown(rows, paper=args.scale == "full")
            print(text)
            # So far: a seed takes its time.
            done = argparse.Namespace(**vars(args) | {"seeds": len(seeds)})
            write(done, "hrenet_voc", __file__, rows, text, steps=setting.steps)
        # That of the last seed.
        pictures(args, {name: (result, run) for name, (_, result, run) in found.items()})


def pictures(
    args: argparse.Namespace,
    found: Mapping[str, tuple[evaluation.Evaluation, MaskedPredictor]],
    count: int = 4,
) -> None:
    """Fig. 4: of every part of the data set the image in which the best network is most ahead of the first one."""
    first, *_ = found
    best = max(found, key=lambda name: found[name][0].totals()["mean_iou"] if name != first else -1.0)
    before, after = (
        np.array([image.accuracy for image in found[name][0].images], float) for name in (first, best)
    )
    gains = np.nan_to_num(after - before, nan=-1.0)
    # Neighbours may be of one scene.
    parts = np.array_split(np.arange(len(gains)), min(count, len(gains)))
    chosen = [int(part[gains[part].argmax()]) for part in parts]
    columns = {name: lambda image, run=found[name][1]: run(image).argmax(-1) for name in (first, best)}
    qualitative_figure(args.splits.val, chosen, columns, args.out / f"hrenet_voc_{args.dataset}.png")


if __name__ == "__main__":
    main()
