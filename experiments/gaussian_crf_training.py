"""What the experiments with Gaussian CRF networks share: their training in three phases, and their pictures."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from training_tables import (
    Figures,
    Splits,
    add_unary_runs,
    camvid_unary_run,
    predict,
    summarise,
    table,
    write,
)

from jaxcrf import plots
from jaxcrf.data import Augmentation, Pipeline, SegmentationFolder
from jaxcrf.filters import Gram
from jaxcrf.models import ModelConfig
from jaxcrf.training import (
    Experiment,
    Update,
    evaluate_pipeline,
    load_model,
    objectives,
    protocols,
    recipes,
    train,
)
from jaxcrf.training.schedules import optimizer_dense_gaussian_crf, polynomial_decay, warmup

Phase = Literal[1, 2, 3]


@dataclasses.dataclass(frozen=True)
class Row:
    """A network of a table: the CRF's name among the refinements of `models.create`, and its options."""

    refine: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# What goes along while the unary is trained: a pairwise stream of full length, which all rows begin with pieces of.
UNARY = Row("gaussian_crf_sparse_potts")


def paper_optimizer(phase: Phase, num_steps: int) -> optax.GradientTransformation:
    """Momentum and the paper's rates, 1e-3, 1e-3 and 2.5e-4, decaying polynomially."""
    return optimizer_dense_gaussian_crf(phase, num_steps=num_steps)


def adam(phase: Phase, num_steps: int) -> optax.GradientTransformation:
    """Adam, for streams that begin from nothing and have a few hundred steps."""
    rate = {1: 1e-3, 2: 3e-3, 3: 1e-3}[phase]
    schedule = warmup(polynomial_decay(rate, num_steps), max(1, num_steps // 10))
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule))


@dataclasses.dataclass(frozen=True)
class Setting:
    """How networks are made and trained.

    Attributes:
        network: the unary, by its name in `models`.
        network_options: its options.
        stream: options that the CRFs of all rows have, as `width` of the pairwise stream.
        steps: of the three phases; 0 of the first where the unary is trained already.
        batch_size: of all phases.
        crop: of training images; None for the data set's. Sums over pixels are means, so that what is learned from
            crops fits whole images.
        augmentation: of the training images.
        optimizer: of a phase and its number of steps.
        num_pairs: see `objectives.pairwise`.
        frozen: keeps the unary as it is in the third phase, which then sees the held-out images: the unary is surer
            of those that it was trained on, and the CRF would trust it too much.
        weighted: counts rare labels more, as `recipes.camvid_unary` does.
    """

    network: str
    network_options: Mapping[str, Any]
    stream: Mapping[str, Any]
    steps: tuple[int, int, int]
    batch_size: int
    augmentation: Augmentation
    crop: tuple[int, int] | None = None
    optimizer: Callable[[Phase, int], optax.GradientTransformation] = paper_optimizer
    num_pairs: int = 4096
    frozen: bool = False
    weighted: bool = False


# The paper's: DeepLab-v2 at three scales, 20 000 iterations of 10 images per phase, flipped and scaled at random.
PAPER = Setting(
    network="deeplab_v2",
    network_options={},
    stream={},
    steps=(20_000, 20_000, 20_000),
    batch_size=10,
    augmentation=Augmentation(
        rotation=0.0, scale=(0.5, 1.5), brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0
    ),
)

# CamVid on two cores: the small network of `recipes.camvid_unary`, and a pairwise stream of a quarter of the width.
CAMVID = Setting(
    network="small_fcn",
    network_options={"width": recipes.SCALES["cpu"].width, "reduction": recipes.SCALES["cpu"].reduction},
    stream={"width": 16, "depth": "res3a"},
    steps=(0, 120, 120),
    batch_size=8,
    crop=(192, 256),
    augmentation=Augmentation(rotation=0.0, scale=(0.7, 1.6), brightness=25.0, hue=9.0),
    optimizer=adam,
    frozen=True,
    weighted=True,
)

SMOKE = dataclasses.replace(
    PAPER,
    network_options={"blocks": [1, 1], "width": 4, "scales": [1.0, 0.5], "rates": [1]},
    stream={"width": 4, "depth": "res3a"},
    steps=(2, 2, 2),
    batch_size=2,
    num_pairs=64,
)


Scales = Mapping[str, tuple[Setting, Mapping[str, Row]]]


def add_arguments(parser: argparse.ArgumentParser, scales: Scales) -> None:
    """What these experiments can be told besides the usual."""
    names = tuple(dict.fromkeys(name for _, rows in scales.values() for name in rows))
    parser.add_argument(
        "--rows", nargs="+", choices=names, metavar="ROW", help="only these: " + ", ".join(names)
    )
    add_unary_runs(parser)


def chosen(args: argparse.Namespace, scales: Scales) -> tuple[Setting, dict[str, Row]]:
    """The setting of the command line, and its rows."""
    setting, rows = scales[args.scale]
    wanted = {name: row for name, row in rows.items() if not args.rows or name in args.rows}
    if not wanted:
        raise SystemExit(f"--rows: got {', '.join(args.rows)}; this data set has {', '.join(rows)}")
    return setting, wanted


# Of one folder for all rows: it takes a pass over its labels.
mild_class_weights = functools.cache(recipes.mild_class_weights)


def experiment(
    name: str,
    setting: Setting,
    splits: Splits,
    row: Row,
    phases: slice,
    *,
    seed: int,
    initial: str | Path | None,
) -> Experiment:
    """Some of the three phases of a row's network."""
    options: dict[str, Any] = {"class_weights": mild_class_weights(splits.train)} if setting.weighted else {}
    counts = [max(1, count) for count in setting.steps]
    above = ("pairwise/*", "crf/*")
    # While the pairwise terms are trained alone, nothing flows through the unary.
    unary, pairwise, joint = (
        Update(update, loss, setting.optimizer(phase, count), **patterns)
        for update, phase, count, loss, patterns in zip(
            ("unary", "pairwise", "joint"),
            (1, 2, 3),
            counts,
            (
                objectives.scores(part="unary", **options),
                objectives.pairwise(num_pairs=setting.num_pairs),
                objectives.scores(**options),
            ),
            (
                {"trainable": ("unary/*",)},
                {"trainable": above, "evaluating": ("unary",)},
                {"trainable": above, "evaluating": ("unary",)} if setting.frozen else {},
            ),
            strict=True,
        )
    )
    stages = protocols.three_phase(unary, pairwise, joint, steps=counts)
    if setting.frozen:
        stages = (*stages[:2], dataclasses.replace(stages[2], split="held_out"))
    stages = stages[phases]
    sources = {"train": splits.train, "held_out": splits.held_out}
    data = {
        split: Pipeline(
            sources[split],
            batch_size=setting.batch_size,
            size=setting.crop or splits.crop,
            seed=seed,
            augmentation=setting.augmentation,
        )
        for split in dict.fromkeys(stage.split for stage in stages)
    }
    return Experiment(
        name=name,
        model=ModelConfig.of(
            setting.network,
            splits.num_labels,
            refine=row.refine,
            refine_options={**row.options, **setting.stream},
            **setting.network_options,
        ),
        data=data,
        stages=stages,
        validation=None,
        label_names=splits.val.label_names,
        seed=seed,
        initial=initial,
    )


class Trained(NamedTuple):
    """A network, and its compiled function of images to logits."""

    model: Any
    predict: Callable[[Any], Any]


def trained_unary(args: argparse.Namespace, setting: Setting, splits: Splits, seed: int) -> str | Path:
    """The folder of a run whose `unary/…` has been through the first phase, which all rows share."""
    initial: str | Path | None = args.weights
    if args.scale == "reduced":
        initial = camvid_unary_run(args, seed)
        if not setting.steps[0]:
            return initial
    folder = args.runs / f"seed_{seed}" / "unary"
    train(experiment("unary", setting, splits, UNARY, slice(1), seed=seed, initial=initial), folder)
    return folder


def train_seed(
    args: argparse.Namespace,
    setting: Setting,
    splits: Splits,
    rows: Mapping[str, Row],
    evaluate: Callable[[Callable[[Any], Any]], Figures],
    seed: int,
) -> tuple[dict[str, Figures], dict[str, Trained]]:
    """All rows of one seed: what `evaluate` says of their predictions, and the networks.

    Args:
        args: of `training_tables.parse`.
        setting: how networks are made and trained.
        splits: the data.
        rows: the networks by name.
        evaluate: figures of a function of images to logits.
        seed: of parameters, order and augmentation.
    """
    folder = args.runs / f"seed_{seed}"
    below = trained_unary(args, setting, splits, seed)
    network: Any = load_model(below).model
    trained = {"unary": Trained(network.unary, predict(network.unary))}
    for name, row in rows.items():
        phases = experiment(name, setting, splits, row, slice(1, None), seed=seed, initial=below)
        model = train(phases, folder / name).model
        trained[name] = Trained(model, predict(model))
    return {name: evaluate(network.predict) for name, network in trained.items()}, trained


def run_seeds(
    args: argparse.Namespace,
    name: str,
    source: str,
    setting: Setting,
    splits: Splits,
    rows: Mapping[str, Row],
    *,
    evaluate: Callable[[Callable[[Any], Any]], Figures] | None = None,
    columns: Mapping[str, str] | None = None,
    paper: Mapping[str, float] | None = None,
    shown: Callable[[str], bool] = lambda row: True,
) -> dict[str, Trained]:
    """An experiment: all seeds, their results and figures on disk, and the networks of the last seed.

    Args:
        args: of `training_tables.parse`.
        name: what its files are called.
        source: its file.
        setting: how networks are made and trained.
        splits: the data.
        rows: the networks by name.
        evaluate: figures of a function of images to logits; None for those of `evaluate_pipeline`.
        columns: of the table, see there; None for mIoU with its gain over the unary, and accuracies.
        paper: likewise.
        shown: of which rows the qualitative figure has a column.
    """
    baseline = "unary" if columns is None else None
    if evaluate is None:
        evaluate = functools.partial(evaluate_pipeline, pipeline=splits.evaluated())
    seeds: list[dict[str, Figures]] = []
    trained: dict[str, Trained] = {}
    for seed in range(args.seeds):
        figures, trained = train_seed(args, setting, splits, rows, evaluate, seed)
        seeds.append(figures)
        print(table(summarise(seeds, baseline), columns))
    found = summarise(seeds, baseline)
    text = table(found, columns, paper if args.scale == "full" else None)
    write(args, name, source, found, text, steps=setting.steps)
    stem = f"{name}_{args.dataset}"
    affinity_figures(trained, splits, len(splits.val) // 2, args.out, stem)
    columns_shown = {row: network for row, network in trained.items() if shown(row)}
    qualitative_figure(columns_shown, splits, args.out / f"{stem}.png")
    return trained


def affinity_figures(
    trained: Mapping[str, Trained], splits: Splits, index: int, out: Path, stem: str
) -> None:
    """Figures 3 and 4 of the paper: what dense layers make of some reference pixels of a validation image."""
    image, labels = splits.val[index]
    affinities = nnx.jit(lambda network, image: network.affinities(image))
    for name, (network, _) in trained.items():
        if name == "unary":
            continue
        terms = affinities(network, jnp.asarray(image, jnp.float32))[0]
        truth = np.asarray(objectives.labels_at_cells(network, labels))
        if not isinstance(terms, Gram) or (truth == splits.val.ignore_label).all():
            continue
        cells = reference_cells(truth, splits.val.ignore_label, 3 if terms.kind == "potts" else 1)
        shown = None
        if terms.kind == "general":
            # The reference's own label against itself and the image's commonest others.
            own = next(iter(cells))
            others = dict.fromkeys([own, *common_labels(truth, splits), *range(splits.num_labels)])
            shown = (own, list(others)[:3])
        figure = plots.affinity(
            terms, list(cells.values()), image=image, labels=shown, label_names=splits.val.label_names
        )
        name_of_file = "_".join(name.lower().replace("+", "").split())
        plots.save_figure(figure, out / f"{stem}_affinity_{name_of_file}.png")


def common_labels(truth: np.ndarray, splits: Splits) -> list[int]:
    """The labels of an image, the commonest first."""
    counted = np.bincount(truth[truth != splits.val.ignore_label], minlength=splits.num_labels)
    return [int(label) for label in np.argsort(-counted) if counted[label]]


def reference_cells(truth: np.ndarray, ignore_label: int, count: int) -> dict[int, tuple[int, int]]:
    """For the labels of which an image shows most, a cell each that lies deepest inside of it."""
    from scipy import ndimage

    depths = {}
    for label in np.unique(truth[truth != ignore_label]):
        inside = np.pad(truth == label, 1)
        depth = ndimage.distance_transform_edt(inside)[1:-1, 1:-1]
        cell = np.unravel_index(depth.argmax(), depth.shape)
        depths[int(label)] = (float(depth[cell]), (int(cell[0]), int(cell[1])))
    chosen = sorted(depths, key=lambda label: -depths[label][0])[:count]
    return {label: depths[label][1] for label in chosen}


def qualitative_figure(trained: Mapping[str, Trained], splits: Splits, path: Path, count: int = 4) -> None:
    """Figure 5 of the paper: images, truth and what networks say, of images spread over the validation set."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("image", "truth", *trained)}
    chosen = np.unique(np.linspace(0, len(splits.val) - 1, count).round().astype(int)).tolist()
    examples = dataclasses.replace(splits, val=splits.val.subset(chosen))
    # In batches as they were evaluated in, which are compiled already.
    pipeline = splits.evaluated()
    with dataclasses.replace(pipeline, source=examples.val).epoch() as batches:
        for batch in batches:
            found = {name: np.asarray(function(batch["image"])) for name, (_, function) in trained.items()}
            for k, labels in enumerate(batch["labels"]):
                if len(columns["image"]) == len(chosen):
                    break
                height, width = examples.val[len(columns["image"])][1].shape
                columns["image"].append(batch["image"][k, :height, :width])
                columns["truth"].append(labels[:height, :width])
                for name, logits in found.items():
                    columns[name].append(logits[k, :height, :width].argmax(-1))
    figure = plots.segmentation_grid(columns, label_names=splits.val.label_names)
    plots.save_figure(figure, path)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Reads labels and puts some of them together.

    Attributes:
        reader: reads the labels.
        table: what each of them becomes.
        ignore_label: stays.
    """

    reader: Callable[[Path, str], np.ndarray]
    table: tuple[int, ...]
    ignore_label: int

    def __call__(self, path: Path, name: str) -> np.ndarray:
        """The new labels of an example."""
        labels = self.reader(path, name)
        table = np.full(max(256, self.ignore_label + 1), self.ignore_label, np.int32)
        table[: len(self.table)] = self.table
        return table[labels]


def grouped(splits: Splits, groups: Sequence[str], others: str, *, separate: bool) -> Splits:
    """The same images with other labels: 0 for all that is not in `groups`, and 1, 2, … for these.

    Args:
        splits: the data.
        groups: names of labels.
        others: the name of the new label 0.
        separate: whether the groups stay different labels, or become one, "object".
    """
    known = splits.val.label_names
    chosen = [name for name in groups if name in known]
    table = tuple((chosen.index(name) + 1 if separate else 1) if name in chosen else 0 for name in known)
    names = (others, *(chosen if separate else ["object"]))

    def relabelled(folder: SegmentationFolder) -> SegmentationFolder:
        reader = Grouped(folder.label_reader, table, folder.ignore_label)
        return dataclasses.replace(folder, label_names=names, label_reader=reader)

    changed = {part: relabelled(getattr(splits, part)) for part in ("train", "held_out", "val")}
    return dataclasses.replace(splits, **changed)
