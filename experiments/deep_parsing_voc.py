r"""The Deep Parsing Network on PASCAL VOC, stage by stage: Tables 2 and 3a, figures 4 to 7 of Liu et al., 2015.

    python experiments/deep_parsing_voc.py --data VOCdevkit/VOC2012 --weights vgg16.safetensors --seeds 1
    python experiments/deep_parsing_voc.py --dataset camvid --data camvid --unary-runs runs
    python experiments/deep_parsing_voc.py --smoke

Incremental training: the unary network (b1 to b11) from ImageNet's VGG-16; with it fixed, `ω₁` and `ω₂` of the triple
penalty (b12); with these fixed too, the label contexts (b13, b14); then everything. All are stages of one model, each
of them evaluated; the contexts are about the identity while the triple penalty is trained. Rows, in the order of the
paper's tables, mIoU on VOC val, training on `train_aug`:

| Table 3a | | Table 2a, after b12 | | Table 2b, after b14 | |
|---|---|---|---|---|---|
| unary | 62.4 | unary, dense CRF | 63.4 | contexts 1×1 | 64.8 |
| + triple penalty | 64.7 | window 10×10 | 63.8 | contexts 5×5 | 66.0 |
| + label contexts | 66.5 | window 50×50 (the stage) | 64.7 | contexts 9×9 | 66.3 |
| + joint tuning | 67.8 | window 100×100 | 64.3 | 9×9 mixtures (the stage) | 66.5 |

The last stage has TA 96.4, LA 72.1 and BA 93.3. Table 2c, the improvement of pairwise terms on their unary (DSN 2.6,
DeepLab 3.3, DPN 5.4), is the column of gains. Two more rows take as many steps as the stages they stand beside: "joint
from the start" trains all parameters together for the steps of all stages (fig. 6a), and "unary, tuned as long" trains
the unary alone for those of the last, which is not in the paper and says what of the last gain is due to the CRF.

What the paper leaves open: rates, schedules and numbers of steps. The unary has DeepLab's, 6000 steps; those of the
other stages are ours, see FULL. Images are cropped to 321 × 321 for training; the paper rescales to 512 × 512.

Cost: no figures in the paper, and none of ours on VOC yet: b1 to b11 have 134 million parameters.

`--dataset camvid` is a small setting for two CPU cores, CAMVID: the network of `recipes.camvid_unary`, from
`--unary-runs` or trained first; penalties on cells of 2 × 2 pixels; stages after the first on the 67 held-out images,
since the unary is surer of those that it was trained on. "Joint from the start" begins with the trained unary, and
takes the steps of the three stages after it. `--tables joint` leaves the rows of Tables 2a and 2b out.

Output: JSON, a Markdown table, label compatibilities (fig. 4a) and contexts (4b), what every stage says of four images
(fig. 5), the curves of both trainings (6a), mIoU by the number of iterations (6b), and accuracies by stage (7).
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from gaussian_crf_training import mild_class_weights
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from training_tables import (
    Figures,
    Predictor,
    Splits,
    add_unary_runs,
    camvid_splits,
    camvid_unary_run,
    parse,
    summarise,
    table,
    voc_splits,
    write,
)

from jaxcrf import evaluation, plots
from jaxcrf.data import Augmentation, Pipeline, SegmentationFolder, open_folder
from jaxcrf.models import ModelConfig
from jaxcrf.models.convcrf import Refined
from jaxcrf.nn import DenseCRF
from jaxcrf.plots.curves import LINE_COLORS
from jaxcrf.training import Experiment, Run, Update, load_model, objectives, protocols, recipes, train
from jaxcrf.training.schedules import optimizer_deep_parsing_network, polynomial_decay

STAGES = ("unary", "+ triple penalty", "+ label contexts", "+ joint tuning")
FROM_START, TUNED, DENSE = "joint from the start", "unary, tuned as long", "unary, dense CRF"
PAPER = dict(zip(STAGES, (62.4, 64.7, 66.5, 67.8), strict=True)) | {
    DENSE: 63.4,
    "window 10×10": 63.8,
    "window 100×100": 64.3,
    "contexts 1×1": 64.8,
    "contexts 5×5": 66.0,
    "contexts 9×9": 66.3,
}
SHOWN = 4  # images of fig. 5
TABLES = ("joint", "windows", "contexts")
# Not a and b of the linear activation: a says nothing that these do not, and b, before there are contexts, is the same
# for all labels, so that an optimiser would follow the noise in its gradient.
WEIGHTS = ("crf/*_weight",)
CONTEXTS = ("crf/contexts", "crf/context_offset")
MEASURES = {
    "tagging_accuracy": "tagging accuracy (TA)",
    "localization_accuracy": "localisation accuracy (LA)",
    "boundary_accuracy": "boundary accuracy (BA)",
}


def paper_optimizer(row: str, steps: int) -> optax.GradientTransformation:
    """Momentum for networks; Adam for the triple penalty and the contexts."""
    if row == "+ triple penalty":
        return optax.adam(polynomial_decay(0.1, steps))
    if row == "+ label contexts":
        return optax.adam(polynomial_decay(1e-3, steps))
    return optimizer_deep_parsing_network(learning_rate=1e-3 if row in ("unary", FROM_START) else 1e-4)


def camvid_optimizer(row: str, steps: int) -> optax.GradientTransformation:
    """Adam, with rates that fall to zero."""
    rate = {"+ triple penalty": 2.0, "+ label contexts": 1e-2}.get(row, 1e-3)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adam(polynomial_decay(rate, steps)))


SCALED = Augmentation(rotation=0.0, scale=(0.5, 1.5), brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the experiment is made; the defaults are the paper's where it gives any.

    Attributes:
        network: the unary, by its name in `models`.
        network_options: its options.
        crf: options of `nn.DeepParsing`.
        steps: of the four stages; 0 of the first where the unary is trained already.
        batch_size: of all stages.
        augmentation: of the training images.
        optimizer: of a row and its number of steps.
        rates: parameter → factor on the rate where everything is trained.
        evaluating: what runs in evaluation mode then.
        held_out: whether stages after the first see the held-out images.
        weighted: counts rare labels more, as `recipes.camvid_unary` does.
        windows: of Table 2a.
        contexts: of Table 2b, without mixtures.
        dense_crf: whether Table 2a has the dense CRF, with its usual parameters.
        iterations: of fig. 6b.
        validate_every: steps between the points of fig. 6a.
        validated: how many images those and fig. 6b are measured on.
    """

    network: str = "deep_parsing_unary"
    network_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    crf: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"inputs": "log_probs"})
    steps: tuple[int, int, int, int] = (6000, 1000, 2000, 4000)
    batch_size: int = 10
    augmentation: Augmentation = SCALED
    optimizer: Callable[[str, int], optax.GradientTransformation] = paper_optimizer
    rates: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"unary/classifier/*": 10.0, "crf/*": 10.0}
    )
    evaluating: tuple[str, ...] = ()
    held_out: bool = False
    weighted: bool = False
    windows: tuple[int, ...] = (10, 100)
    contexts: tuple[int, ...] = (1, 5, 9)
    dense_crf: bool = True
    iterations: tuple[int, ...] = (1, 2, 3, 5, 10)
    validate_every: int = 500
    validated: int = 300


FULL = Setting()

# CamVid on two cores. A window of 24 cells of 2 pixels is 48 pixels wide, and contexts of 5 reach over 10.
CAMVID = Setting(
    network="small_fcn",
    network_options={"width": recipes.SCALES["cpu"].width, "reduction": recipes.SCALES["cpu"].reduction},
    crf={"reduction": 2, "window": 24, "context_size": 5},
    steps=(0, 30, 60, 40),
    batch_size=2,
    # Mirror images only: what the unary gets wrong in larger or smaller images is something else, and penalties that
    # are learned there help less than none here.
    augmentation=dataclasses.replace(SCALED, scale=(1.0, 1.0)),
    optimizer=camvid_optimizer,
    rates={"unary/*": 0.1, "crf/context*": 3.0, "crf/*_weight": 200.0},
    # Two images are too few for statistics of batch normalisation.
    evaluating=("unary",),
    held_out=True,
    weighted=True,
    windows=(12, 48),
    contexts=(1, 3, 5),
    dense_crf=False,
    iterations=(1, 2, 3, 5),
    validate_every=20,
    validated=20,
)

SMOKE = dataclasses.replace(
    FULL,
    network_options={"width": 4, "hidden_channels": 8},
    crf={"inputs": "log_probs", "window": 6, "context_size": 3, "num_contexts": 2},
    steps=(1, 1, 1, 1),
    batch_size=2,
    # What a window is trained with is what a context is.
    windows=(),
    contexts=(1,),
    iterations=(2,),
    validate_every=1,
    validated=1,
)
SETTINGS = {"full": FULL, "reduced": CAMVID, "smoke": SMOKE}


def paper_splits(root: Path) -> Splits:
    """VOC with all 10 582 images to train on, as the paper has it."""
    return dataclasses.replace(voc_splits(root), train=open_folder(root, "train_aug", "voc2012"))


def spread(folder: SegmentationFolder, count: int) -> SegmentationFolder:
    """So many images, from all over a folder."""
    chosen = np.unique(np.linspace(0, len(folder) - 1, count).round().astype(int))
    return folder.subset(chosen.tolist())


def update_of(setting: Setting, splits: Splits, row: str, steps: int) -> Update:
    """What a row's training changes, and by which loss."""
    options = {"class_weights": mild_class_weights(splits.train)} if setting.weighted else {}
    below = row in ("unary", TUNED)
    patterns: dict[str, Any]
    if below:
        scales = {name: rate for name, rate in setting.rates.items() if name.startswith("unary/")}
        patterns = {"trainable": ("unary/*",), "learning_rates": scales}
        if row == TUNED:
            patterns["evaluating"] = setting.evaluating
    elif row in (STAGES[3], FROM_START):
        patterns = {"learning_rates": setting.rates, "evaluating": setting.evaluating}
    else:
        trainable = CONTEXTS if row == STAGES[2] or row.startswith("contexts") else WEIGHTS
        patterns = {"trainable": trainable, "evaluating": ("unary",)}
    loss = objectives.unary(**options) if below else objectives.segmentation(**options)
    return Update(row, loss, setting.optimizer(stage_of(row), steps), **patterns)


def stage_of(row: str) -> str:
    """The stage by whose rates a row is trained."""
    if row.startswith("window"):
        return STAGES[1]
    return STAGES[2] if row.startswith("contexts") else row


def experiment(
    setting: Setting,
    splits: Splits,
    row: str,
    steps: int,
    *,
    seed: int,
    initial: str | Path | None,
    validated: bool = False,
    **crf: Any,
) -> Experiment:
    """The training of a row, which goes on from another one."""
    split = "held_out" if setting.held_out and row != "unary" else "train"
    sources = {"train": splits.train, "held_out": splits.held_out}
    data = {
        split: Pipeline(
            sources[split],
            batch_size=setting.batch_size,
            size=splits.crop,
            seed=seed,
            augmentation=setting.augmentation,
        )
    }
    if validated:
        val = spread(splits.val, setting.validated)
        data["val"] = dataclasses.replace(splits.evaluated(1), source=val)
    (stage,) = protocols.incremental([update_of(setting, splits, row, steps)], [steps], split=split)
    return Experiment(
        name=row,
        model=ModelConfig.of(
            setting.network,
            splits.num_labels,
            refine="deep_parsing",
            refine_options={**setting.crf, **crf},
            **setting.network_options,
        ),
        data=data,
        stages=(stage,),
        validation="val" if validated else None,
        validate_every=setting.validate_every if validated else None,
        label_names=splits.val.label_names,
        seed=seed,
        initial=initial,
    )


def folder_of(args: argparse.Namespace, seed: int, row: str) -> Path:
    """Where a row's run is."""
    name = row.removeprefix("+ ").replace(",", "").replace("×", "x").replace(" ", "_")
    return args.runs / f"seed_{seed}" / name


@dataclasses.dataclass(frozen=True)
class Seed:
    """All networks of one seed, and the points of fig. 6a: steps and mIoU of both trainings."""

    networks: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]


def train_seed(args: argparse.Namespace, setting: Setting, seed: int) -> Seed:
    """Trains all rows that are asked for, or goes on."""
    splits: Splits = args.splits
    beginning = camvid_unary_run(args, seed) if args.scale == "reduced" else args.weights
    networks: dict[str, Any] = {}
    curves: dict[str, list[tuple[int, float]]] = {"stage by stage": [], FROM_START: []}

    def run(row: str, steps: int, initial: str | Path | None, **options: Any) -> Run:
        print(f"seed {seed}: {row}")
        made = experiment(setting, splits, row, steps, seed=seed, initial=initial, **options)
        return train(made, folder_of(args, seed, row))

    before, done = beginning, 0
    for row, steps in zip(STAGES, setting.steps, strict=True):
        if not steps:
            networks[row] = load_model(before).model.unary
            continue
        found = run(row, steps, before, validated=True)
        networks[row] = found.model.unary if row == STAGES[0] else found.model
        curves["stage by stage"] += points(found, done)
        before, done = folder_of(args, seed, row), done + steps
    stage = functools.partial(folder_of, args, seed)
    unary = stage(STAGES[0]) if setting.steps[0] else beginning
    if "joint" in args.tables:
        found = run(FROM_START, done, beginning, validated=True)
        networks[FROM_START], curves[FROM_START] = found.model, points(found, 0)
        networks[TUNED] = run(TUNED, setting.steps[3], unary).model.unary
    if "windows" in args.tables:
        if setting.dense_crf:
            networks[DENSE] = Refined(networks[STAGES[0]], DenseCRF(splits.num_labels))
        for size in setting.windows:
            # The contexts are the identity, as they are in this stage: one of one pixel does.
            options = {"window": size, "context_size": 1, "num_contexts": 1}
            row = f"window {size}×{size}"
            networks[row] = run(row, setting.steps[1], unary, **options).model
    if "contexts" in args.tables:
        for size in setting.contexts:
            row = f"contexts {size}×{size}"
            options = {"context_size": size, "num_contexts": 1}
            networks[row] = run(row, setting.steps[2], stage(STAGES[1]), **options).model
    return Seed(networks, curves)


def points(run: Run, done: int) -> list[tuple[int, float]]:
    """Steps, counted from the beginning of the training, and mIoU."""
    return [
        (done + row["step"], row["validation_mean_iou"]) for row in run.rows if "validation_mean_iou" in row
    ]


def evaluate_network(args: argparse.Namespace, run: Predictor) -> tuple[Figures, dict[str, list[float]]]:
    """Figures of a network on the validation images, and of every label."""
    background = 0 if args.scale == "full" else None
    found = evaluation.evaluate(run, args.splits.val, widths=(1,), background=background, num_pictures=0)
    labels = {"iou": [row.iou for row in found.table()]}
    labels |= {name: np.asarray(values).tolist() for name, values in found.objects._asdict().items()}
    return found.totals(), labels


def mean_iou_by_iterations(
    args: argparse.Namespace, setting: Setting, networks: Mapping[str, Any]
) -> dict[str, list[tuple[int, float]]]:
    """Fig. 6b: mIoU after so many iterations, 0 for the unary, of networks with a CRF."""
    splits: Splits = args.splits
    val = spread(splits.val, setting.validated)
    found: dict[str, list[tuple[int, float]]] = {}
    for name, network in networks.items():
        own = network.crf.num_iterations
        found[name] = []
        for count in (0, *setting.iterations):
            if count:
                network.set_attributes(num_iterations=count)
            run = Predictor(network if count else network.unary, splits.whole)
            result = evaluation.evaluate(run, val, widths=(1,), num_pictures=0)
            found[name].append((count, result.totals()["mean_iou"]))
        network.set_attributes(num_iterations=own)
    return found


def signed_contexts(network: Any, unary: Predictor, splits: Splits) -> np.ndarray:
    """Contexts times the sign that triple penalties have of labels that are there, in some validation images."""
    total = 0.0
    definition, state = nnx.split(network.crf)
    infer = jax.jit(lambda state, *inputs: nnx.merge(definition, state).infer(*inputs).triple)
    for image, labels in map(spread(splits.val, 8).__getitem__, range(min(8, len(splits.val)))):
        triple = np.asarray(infer(state, image, unary(image)))
        there = labels[..., None] == np.arange(splits.num_labels)
        total += triple[there].sum()
    return np.asarray(network.crf.contexts[...], np.float64) * np.sign(total)


def telling_pairs(contexts: np.ndarray, count: int = 8) -> list[tuple[int, int]]:
    """Pairs of different labels whose contexts say most: where the one speaks for the other by place."""
    reach = contexts.std((0, 1)).max(-1)
    np.fill_diagonal(reach, 0)
    order = np.argsort(-reach, axis=None)[:count]
    around, center = np.unravel_index(order, reach.shape)
    return list(zip(center.tolist(), around.tolist(), strict=True))


def lines(series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, width: float = 4.4) -> Figure:
    """Curves of mIoU in percent against steps or iterations, as in fig. 6."""
    figure = Figure(figsize=(width, 0.75 * width), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, (name, curve) in zip(LINE_COLORS, series.items(), strict=False):
        x, y = np.array(curve, float).reshape(-1, 2).T
        axes.plot(x, 100 * y, marker="o", markersize=3, color=color, label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("mIoU, %")
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.legend(frameon=False, fontsize=8)
    return figure


def stages_figure(rows: Mapping[str, Any], stages: Sequence[str]) -> Figure:
    """Fig. 7: accuracies by stage, with their spread over seeds."""
    figure = Figure(figsize=(3.0 * len(MEASURES), 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        found = [rows[stage][name] for stage in stages]
        means = [100 * entry["mean"] for entry in found]
        spreads = [100 * (entry["spread"] or 0.0) for entry in found]
        axes.errorbar(range(len(stages)), means, spreads, marker="o", capsize=3, color=LINE_COLORS[0])
        names = [stage.removeprefix("+ ").replace(" ", "\n") for stage in stages]
        axes.set_xticks(range(len(stages)), names, fontsize=8)
        axes.set_xlim(-0.4, len(stages) - 0.6)
        axes.set_title(title, fontsize=9)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    return figure


def averaged(
    seeds: Sequence[Mapping[str, Sequence[tuple[float, float]]]],
) -> dict[str, list[tuple[float, float]]]:
    """Curves of several seeds as one of each name."""
    return {
        name: [tuple(point) for point in np.mean([seed[name] for seed in seeds], 0).tolist()]
        for name in seeds[0]
        if seeds[0][name]
    }


def per_label_table(found: Mapping[str, Mapping[str, np.ndarray]], label_names: Sequence[str]) -> str:
    """Table 3a: IoU of every label after every stage; TA, LA and BA after the last."""
    last = list(found)[-1]
    rows = {f"{row} (IoU)": figures["iou"] for row, figures in found.items()}
    for name, title in MEASURES.items():
        rows[f"{last}: {title}"] = found[last][name.removesuffix("_accuracy")]
    cells = [["", *label_names, "mean"], ["---"] * (len(label_names) + 2)]
    for title, values in rows.items():
        cells.append([title, *(f"{100 * value:.1f}" for value in [*values, np.nanmean(values)])])
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What else can be asked for."""
    parser.add_argument(
        "--tables",
        nargs="*",
        choices=TABLES,
        default=TABLES,
        help="what is trained besides the four stages: the joint ablation, the windows of Table 2a, the contexts of 2b",
    )
    add_unary_runs(parser)


def main(arguments: list[str] | None = None) -> None:
    """Trains and evaluates all rows and seeds, and writes the results."""
    datasets = {"voc2012": paper_splits, "camvid": camvid_splits}
    with parse(__doc__, arguments, splits=datasets, add_arguments=add_arguments) as args:
        if args.scale == "full" and args.weights is None:
            raise SystemExit("--weights: got none; the paper's network begins with ImageNet's VGG-16")
        run(args, SETTINGS[args.scale])


def run(args: argparse.Namespace, setting: Setting) -> None:
    """What the command line asks for."""
    splits: Splits = args.splits
    # Most rows are the same programs, with other numbers.
    jax.config.update("jax_compilation_cache_dir", str(args.runs / "programs"))
    figures, labels, curves = [], [], []
    seed: Any = None
    runs: dict[str, Predictor] = {}
    for number in range(args.seeds):
        seed = train_seed(args, setting, number)
        runs = {row: Predictor(network, splits.whole) for row, network in seed.networks.items()}
        found = {row: evaluate_network(args, run) for row, run in runs.items()}
        figures.append({row: totals for row, (totals, _) in found.items()})
        labels.append({row: per_label for row, (_, per_label) in found.items()})
        curves.append(seed.curves)
        print(table(summarise(figures)))
    rows = summarise(figures)
    per_label = {
        row: {name: np.mean([seed[row][name] for seed in labels], 0) for name in labels[0][row]}
        for row in STAGES
    }
    columns = {
        "mean_iou": "mIoU",
        "gain": "gain",
        "pixel_accuracy": "pixel accuracy",
        "tagging_accuracy": "TA",
        "localization_accuracy": "LA",
        "boundary_accuracy": "BA",
    }
    text = table(rows, columns, PAPER if args.scale == "full" else None)
    text += "\n" + per_label_table(per_label, splits.val.label_names)
    with_crf = {"one model, all stages": seed.networks[STAGES[3]]}
    if setting.dense_crf:
        with_crf[DENSE] = Refined(seed.networks[STAGES[0]], DenseCRF(splits.num_labels))
    iterations = mean_iou_by_iterations(args, setting, with_crf)
    shown = averaged(curves)
    write(
        args,
        "deep_parsing_voc",
        __file__,
        rows,
        text,
        steps=setting.steps,
        curves=shown,
        iterations=iterations,
        per_label={row: {k: v.tolist() for k, v in found.items()} for row, found in per_label.items()},
    )
    draw(args, seed, runs, rows, shown, iterations)


def draw(
    args: argparse.Namespace,
    seed: Seed,
    runs: Mapping[str, Predictor],
    rows: Mapping[str, Any],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    iterations: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Figures 4 to 7, of the last seed where they show one network."""
    splits: Splits = args.splits
    names = splits.val.label_names
    contexts = signed_contexts(seed.networks[STAGES[3]], runs[STAGES[0]], splits)
    examples = [spread(splits.val, SHOWN)[index] for index in range(min(SHOWN, len(splits.val)))]
    columns: dict[str, list[np.ndarray]] = {
        "image": [image for image, _ in examples],
        "truth": [truth for _, truth in examples],
    } | {row: [runs[row](image).argmax(-1) for image, _ in examples] for row in STAGES}
    made = {
        "compatibility": plots.compatibility(contexts.sum((0, 1)).mean(-1), names),
        "contexts": plots.label_contexts(contexts, telling_pairs(contexts), label_names=names),
        "steps": plots.segmentation_grid(columns, label_names=names),
        "training": lines(curves, "steps"),
        "iterations": lines(iterations, "iterations"),
        "stages": stages_figure(rows, STAGES),
    }
    for name, figure in made.items():
        plots.save_figure(figure, args.out / f"deep_parsing_voc_{args.dataset}_{name}.png")


if __name__ == "__main__":
    main()
