"""What the experiments that train have in common: data and command line, seeds, tables, figures on disk."""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convcrf_synthetic import find_data, write_demonstration_folder
from flax import nnx

from jaxcrf import presets, reporting
from jaxcrf.data import Pipeline, SegmentationFolder, augmentation, open_folder
from jaxcrf.data.images import replacing
from jaxcrf.filters.resampling import average_pool
from jaxcrf.presets import Preset
from jaxcrf.training import recipes, search, train
from jaxcrf.training.schedules import adam, polynomial_decay, warmup
from jaxcrf.training.search import PRESETS

FIGURES = ("mean_iou", "pixel_accuracy", "class_accuracy")

# Of the fully connected CRF on CamVid, where networks are less sure than on VOC and objects smaller.
CAMVID_SPACE: Mapping[str, Sequence[float]] = {
    "bilateral_weight": (1, 2, 4, 8),
    "bilateral_position_bandwidth": (20, 40, 80),
    "bilateral_color_bandwidth": (5, 10),
}

# Figures of one trained and evaluated row, as `evaluate_pipeline` returns them.
Figures = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Splits:
    """The data of an experiment.

    Attributes:
        train: what networks are trained on.
        held_out: images of the training set that they do not see, for CRFs.
        val: what is evaluated.
        crop: `(height, width)` of training images.
        whole: `(height, width)` that validation images are padded to.
    """

    train: SegmentationFolder
    held_out: SegmentationFolder
    val: SegmentationFolder
    crop: tuple[int, int]
    whole: tuple[int, int]

    @property
    def num_labels(self) -> int:
        """Of the data set."""
        return len(self.val.label_names)

    def evaluated(self, batch_size: int = 4) -> Pipeline:
        """Validation images, whole."""
        return Pipeline(self.val, batch_size=min(batch_size, len(self.val)), size=self.whole)


def voc_splits(root: Path) -> Splits:
    """PASCAL VOC 2012 with SBD: 10 382 and 200 images to train on, 1449 to evaluate."""
    train, held_out, val = (
        open_folder(root, split, "voc2012") for split in ("train_unary", "train_held_out", "val")
    )
    return Splits(train, held_out, val, (321, 321), (512, 512))


def camvid_splits(root: Path) -> Splits:
    """CamVid: 300 and 67 images to train on, 101 to evaluate, all of one size."""
    train, held_out, val = recipes.camvid_splits(root)
    height, width = val[0][1].shape
    return Splits(train, held_out, val, (height, width), (height, width))


SPLITS: dict[str, Callable[[Path], Splits]] = {"voc2012": voc_splits, "camvid": camvid_splits}


class ReducedFolder:
    """Examples at a fraction of their size: mean colours of squares of pixels, and one of their labels."""

    def __init__(self, folder: SegmentationFolder, reduction: int):
        self._folder = folder
        self._reduction = reduction
        self.ignore_label = folder.ignore_label

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, labels = self._folder[index]
        r = self._reduction
        if r > 1:
            small = average_pool(jnp.asarray(image, jnp.float32), r, labels.shape)
            image = np.asarray(small.round()).astype(np.uint8)
            labels = np.ascontiguousarray(labels[::r, ::r])
        return image, labels


@contextlib.contextmanager
def parse(
    description: str,
    arguments: Sequence[str] | None,
    *,
    splits: Mapping[str, Callable[[Path], Splits]] = SPLITS,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> Iterator[argparse.Namespace]:
    """The command line, with the data opened.

    Besides what was given, the arguments have `splits`, the opened data, and `scale`: "full" for the papers' own
    settings, "reduced" for CamVid on a CPU and "smoke" for a piece of everything on two small images.

    Args:
        description: the experiment's docstring.
        arguments: None for those of the process.
        splits: by the name of the data set, the first the default.
        add_arguments: adds further ones.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = next(iter(splits))
    parser.add_argument("--dataset", choices=tuple(splits), default=default)
    parser.add_argument("--data", type=Path, help="its folder")
    parser.add_argument(
        "--weights", type=Path, help="ImageNet weights under torchvision's names: .safetensors, .pth"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where checkpoints and logs go")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="a minute piece of everything, without data")
    if add_arguments is not None:
        add_arguments(parser)
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        parser.error(f"--seeds: got {args.seeds}; expected at least 1")
    if not args.smoke:
        args.data = find_data(args.data or Path(args.dataset), parser)
        args.splits = splits[args.dataset](args.data)
        args.scale = "full" if args.dataset == default else "reduced"
        args.runs = args.runs / Path(parser.prog).stem / args.dataset
        yield args
        return
    with tempfile.TemporaryDirectory() as folder:
        args.data, args.runs = Path(folder, "data"), Path(folder, "runs")
        for split in ("train", "val"):
            write_demonstration_folder(args.data, split)
        args.dataset, args.scale, args.seeds = "smoke", "smoke", 1
        small = camvid_splits(args.data)
        args.splits = dataclasses.replace(small, crop=(64, 64))
        yield args


def add_unary_runs(parser: argparse.ArgumentParser) -> None:
    """The argument of experiments that go on from a unary which others have trained."""
    parser.add_argument(
        "--unary-runs",
        type=Path,
        help="for CamVid: a folder with the runs of camvid_fcn.py, seed_0/unary and so on; without it they are made",
    )


def camvid_unary_run(args: argparse.Namespace, seed: int) -> Path:
    """The folder of a run of `recipes.camvid_unary`: one of --unary-runs, or trained now."""
    if args.unary_runs is not None:
        return args.unary_runs / f"seed_{seed}" / "unary"
    folder = args.runs / f"seed_{seed}" / "camvid_unary"
    train(recipes.camvid_unary(args.data, seed=seed), folder)
    return folder


def scratch_optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with a warm-up, from 2e-3 to zero, for networks that begin with noise."""
    schedule = warmup(polynomial_decay(2e-3, steps), max(1, min(50, steps // 5)))
    return optax.chain(optax.clip_by_global_norm(5.0), adam(schedule, weight_decay=1e-4))


def num_parameters(network: nnx.Module) -> int:
    """What is learned."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


def predict(module: nnx.Module) -> Callable[[Any], Any]:
    """A compiled function of images to logits, in evaluation mode."""
    module.eval()
    definition, state = nnx.split(module)
    run = jax.jit(lambda state, images: nnx.merge(definition, state)(images))
    return lambda images: run(state, images)


class Predictor:
    """A network as a function of an image `[H, W, 3]` to its logits, which compiles once for all sizes."""

    def __init__(self, network: nnx.Module, whole: tuple[int, int]):
        self.network = network
        self.run = predict(network)
        self._whole = whole

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Logits `[H, W, L]`."""
        height, width, _ = image.shape
        whole = np.full((1, *self._whole, 3), augmentation.MEAN_COLOR, np.uint8)
        whole[0, :height, :width] = image
        return np.asarray(self.run(whole))[0, :height, :width]


def searched(
    path: Path,
    folder: SegmentationFolder,
    predictor: Callable[[np.ndarray], np.ndarray],
    *,
    count: int,
    space: Mapping[str, Sequence[float]],
    coarse: int,
    refinements: int,
) -> Preset:
    """The fully connected CRF's parameters that are best on held-out images; found once, and read afterwards.

    Args:
        path: the file that holds them.
        folder: the images.
        predictor: an image to its logits.
        count: how many of the images, spread over the folder.
        space: see `search`.
        coarse: likewise.
        refinements: likewise.
    """
    if path.exists():
        return presets.load(path)
    chosen = np.linspace(0, len(folder) - 1, min(count, len(folder))).round().astype(int)
    # In half the memory, where there are hundreds of images of 21 labels.
    stored = [
        (image, predictor(image).astype(np.float16), labels)
        for image, labels in map(folder.__getitem__, chosen)
    ]

    def examples() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return ((image, logits.astype(np.float32), labels) for image, logits, labels in stored)

    path.parent.mkdir(parents=True, exist_ok=True)
    found = search(
        examples,
        preset=PRESETS["densecrf"],
        space=space,
        unary="logits",
        ignore_label=folder.ignore_label,
        coarse=coarse,
        refinements=refinements,
        log=path.with_suffix(".jsonl"),
    )
    presets.save(found.best, path)
    return found.best


def summarise(
    seeds: Sequence[Mapping[str, Figures]], baseline: str | None = "unary"
) -> dict[str, dict[str, Any]]:
    """Mean and spread of every row's figures and, of its mIoU, of the gain over the baseline of the same seed."""
    rows: dict[str, dict[str, Any]] = {}
    for row, figures in seeds[0].items():
        rows[row] = {
            name: _statistics([seed[row][name] for seed in seeds])
            for name in figures
            if all(np.ndim(seed[row][name]) == 0 for seed in seeds)
        }
        if baseline is not None:
            rows[row]["gain"] = _statistics(
                [seed[row]["mean_iou"] - seed[baseline]["mean_iou"] for seed in seeds]
            )
    return rows


def table(
    rows: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    paper: Mapping[str, float] | None = None,
) -> str:
    """The rows in Markdown, in percent, mean ± standard deviation over seeds.

    Args:
        rows: of `summarise`.
        columns: figure → heading.
        paper: row → the paper's mIoU, for a last column.
    """
    if columns is None:
        columns = {
            "mean_iou": "mIoU",
            "gain": "gain",
            "pixel_accuracy": "pixel accuracy",
            "class_accuracy": "class accuracy",
        }
        columns = {name: heading for name, heading in columns.items() if name in next(iter(rows.values()))}
    headings = [*columns.values(), *(["paper"] if paper else [])]
    lines = [f"| | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    for name, row in rows.items():
        cells = [_cell(row[figure], "+" if figure == "gain" else "") for figure in columns]
        if paper:
            cells.append(f"{paper[name]:.2f}" if name in paper else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(
    args: argparse.Namespace, name: str, source: str, rows: Mapping[str, Any], text: str, **more: Any
) -> None:
    """The results as JSON and as a table, `NAME_DATASET.json` and `.md` in the folder of --out."""
    stem = f"{name}_{args.dataset}"
    results = {
        "dataset": args.dataset,
        "scale": args.scale,
        "seeds": args.seeds,
        "rows": rows,
        **more,
        **reporting.circumstances(source),
    }
    reporting.write_json(args.out / f"{stem}.json", results)
    with replacing(args.out / f"{stem}.md") as file:
        file.write(text.encode())
    print(f"results in {args.out}")


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": float(np.mean(values)),
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "seeds": [float(value) for value in values],
    }


def _cell(entry: Mapping[str, Any], sign: str = "") -> str:
    spread = "" if entry["spread"] is None else f" ± {100 * entry['spread']:.2f}"
    return f"{100 * entry['mean']:{sign}.2f}{spread}"
