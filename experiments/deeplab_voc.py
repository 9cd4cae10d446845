r"""DeepLab's fields of view and its dense CRF: Tables 1a and 2 of the paper.

    python experiments/deeplab_voc.py --data VOCdevkit/VOC2012 --weights vgg16.safetensors --runs runs --out results
    python experiments/deeplab_voc.py --dataset camvid --data camvid --runs runs --out results
    python experiments/deeplab_voc.py --smoke

Rows are networks, each by itself and with a fully connected CRF of ten iterations on top:

- `deeplab_7x7`, `deeplab`, `deeplab_4x4`, `deeplab_largefov`: fields of view of 224, 128, 224 and 224 pixels,
- `deeplab_msc`, `deeplab_msc_largefov`: two of these with the features of the image and the first four pools beside
  the last ones; only what is new is trained, and it begins with labelling as the network below it does,
- `averaged`: not in the paper; the probabilities of the two LargeFOV networks, of several scales and of mirror
  images, averaged.

Protocol (§3.1, §5): networks are fine-tuned from ImageNet's VGG-16 by SGD with momentum 0.9, weight decay 5e-4 and a
rate of 1e-3 (1e-2 for the last layer), a tenth of it after every 2000 steps, on batches of 20 crops of 321 × 321
whose labels are sub-sampled by 8; 6000 steps, a number that the paper leaves open. Scores are interpolated
bilinearly. With the networks as they are, the weight of the appearance kernel and its two bandwidths are searched for
on 100 images that were held out of the training set (the paper takes them from the validation set); the smoothness
kernel has weight and bandwidth 3.

The paper has on VOC's validation set, mIoU without and with the CRF, and millions of parameters:

| | mIoU | with CRF | parameters |
|---|---|---|---|
| deeplab_7x7 | 64.38 | 67.64 | 134.3 |
| deeplab | 59.80 | 63.74 | 65.1 |
| deeplab_4x4 | | 67.14 | 65.1 |
| deeplab_largefov | 62.25 | 67.64 | 20.5 |
| deeplab_msc | 61.30 | 65.21 | |
| deeplab_msc_largefov | 64.21 | 68.70 | |

with 8 images per second of 306 × 306 pixels and half a second for the CRF; a training took ten hours on a GPU of its
time.

`--dataset camvid` is a reduced form for CPUs. The same networks, a quarter as wide, with batch normalisation, are
trained from scratch on crops of images at half size; fields of view shrink with the images, so that all rates are
halved. All train by Adam, 2e-3 falling to zero, for 500 steps of 8 crops of 144 × 192, and what is new in the
multi-scale ones for 200 more. On two quiet cores that is three to five minutes a network, one for what is new.
Everything is evaluated at full size, where the CRF takes half a second to one an image; its parameters are searched
for once per seed, with `deeplab_largefov` on 12 held-out images, in some minutes. A seed takes about 40 minutes.

Runs can be interrupted at any time; the same command goes on where it was. The output is a JSON file, a Markdown table
and a picture after fig. 2: the scores and beliefs of one label after 0, 1, 2 and 10 iterations, by default of the
image that the CRF improves most and of the label that gains most in it (`--image`, `--label`).
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from training_tables import (
    CAMVID_SPACE,
    FIGURES,
    Predictor,
    ReducedFolder,
    Splits,
    num_parameters,
    parse,
    scratch_optimizer,
    searched,
    summarise,
    table,
    write,
)

from jaxcrf import bilateral_features, evaluation, mean_field, plots, position_features, presets
from jaxcrf.data import Augmentation, Pipeline, augmentation
from jaxcrf.filters import Filter, Lattice
from jaxcrf.filters.resampling import average_pool, bilinear_upsample
from jaxcrf.models import Averaged, ModelConfig
from jaxcrf.models.parameters import named_leaves, with_leaves
from jaxcrf.presets import Preset
from jaxcrf.training import Experiment, Stage, Update, load_model, objectives, save_model, train
from jaxcrf.training.schedules import optimizer_deeplab
from jaxcrf.training.search import SPACES

NETWORKS = (
    "deeplab_7x7",
    "deeplab",
    "deeplab_4x4",
    "deeplab_largefov",
    "deeplab_msc",
    "deeplab_msc_largefov",
)
AVERAGED, PAIR = "averaged", ("deeplab_largefov", "deeplab_msc_largefov")
# "Input stride" of the first fully-connected layer, in cells of 8 pixels.
RATES = {"deeplab_7x7": 4, "deeplab": 4, "deeplab_4x4": 8, "deeplab_largefov": 12}
PAPER = {
    "deeplab_7x7": (64.38, 67.64),
    "deeplab": (59.80, 63.74),
    "deeplab_4x4": (None, 67.14),
    "deeplab_largefov": (62.25, 67.64),
    "deeplab_msc": (61.30, 65.21),
    "deeplab_msc_largefov": (64.21, 68.70),
}
SHOWN_ITERATIONS = (0, 1, 2, 10)
DEEPLAB_AUGMENTATION = augmentation.get("deeplab")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the experiment is; the defaults are the paper's.

    Attributes:
        networks: the rows.
        width: of VGG's first stage.
        hidden_channels: of the fully-connected layers, and of those of LargeFOV.
        norm: batch normalisation.
        dropout: after the fully-connected layers.
        reduction: how much smaller the networks see images; rates shrink with it.
        crop: of training images as networks see them; None for the data set's.
        augmentation: of training images.
        batch_size: of training images.
        optimizer: by the number of steps.
        last_layer: how much faster the last layer learns.
        steps: of a network.
        branch_steps: of what multi-scale networks have besides.
        scales: that are averaged.
        flip: whether mirror images are, too.
        space: of the CRF's parameters.
        held_out: how many images are searched on.
        coarse: see `search`.
        refinements: see `search`.
        search_once: whether LargeFOV's parameters are those of all networks.
    """

    networks: tuple[str, ...] = NETWORKS
    width: int = 64
    hidden_channels: tuple[int, int] = (4096, 1024)
    norm: bool = False
    dropout: float = 0.5
    reduction: int = 1
    crop: tuple[int, int] | None = None
    augmentation: Augmentation = DEEPLAB_AUGMENTATION
    batch_size: int = 20
    optimizer: Callable[[int], optax.GradientTransformation] = lambda steps: optimizer_deeplab()
    last_layer: float = 10.0
    steps: int = 6000
    branch_steps: int = 6000
    scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    flip: bool = True
    space: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=lambda: SPACES["densecrf"])
    held_out: int = 100
    coarse: int = 3
    refinements: int = 1
    search_once: bool = False


SETTINGS = {
    "full": Setting(),
    "reduced": Setting(
        width=16,
        hidden_channels=(256, 128),
        norm=True,
        dropout=0.1,
        reduction=2,
        crop=(144, 192),
        augmentation=Augmentation(rotation=0.0, scale=(0.75, 1.5), brightness=25.0, hue=9.0),
        batch_size=8,
        optimizer=scratch_optimizer,
        last_layer=1.0,
        steps=500,
        branch_steps=200,
        space=CAMVID_SPACE,
        held_out=12,
        coarse=2,
        refinements=0,
        search_once=True,
    ),
    # Whether it runs: the other networks are these with other numbers.
    "smoke": Setting(
        networks=("deeplab_largefov", "deeplab_msc_largefov"),
        width=4,
        hidden_channels=(16, 8),
        batch_size=2,
        steps=2,
        branch_steps=1,
        scales=(1.0,),
        flip=False,
        space={"bilateral_weight": (5, 10)},
        held_out=1,
        coarse=1,
        refinements=0,
        search_once=True,
    ),
}


class Reduced(nnx.Module):
    """A network that sees images at a fraction of their size: means over squares of pixels."""

    def __init__(self, network: nnx.Module, reduction: int):
        self.network = network
        self.reduction = reduction

    def __call__(self, images: Array) -> Array:
        """Logits at every pixel of the whole images."""
        network: Any = self.network
        if self.reduction == 1:
            return network(images)
        size = images.shape[-3:-1]
        small = average_pool(jnp.asarray(images, jnp.float32), self.reduction, size)
        return bilinear_upsample(network(small), self.reduction, size)


def base_of(name: str) -> str:
    """The network that a multi-scale one is built on; any other itself."""
    return name.replace("_msc", "")


def configuration(setting: Setting, name: str, num_labels: int) -> ModelConfig:
    """The network of that name."""
    base = base_of(name)
    return ModelConfig.of(
        name,
        num_labels,
        width=setting.width,
        hidden_channels=setting.hidden_channels[base == "deeplab_largefov"],
        rate=RATES[base] // setting.reduction,
        norm=setting.norm,
        dropout=setting.dropout,
    )


def experiment(args: argparse.Namespace, setting: Setting, name: str, seed: int) -> Experiment:
    """The training of one network."""
    splits: Splits = args.splits
    folder = args.runs / f"seed_{seed}"
    config = configuration(setting, name, splits.num_labels)
    data = Pipeline(
        ReducedFolder(splits.train, setting.reduction),
        batch_size=setting.batch_size,
        size=setting.crop or splits.crop,
        seed=seed,
        augmentation=setting.augmentation,
    )
    loss = objectives.segmentation(subsample=8)
    rates = {"classifier/*": setting.last_layer}
    if name == base_of(name):
        initial = args.weights
        steps = setting.steps
        update = Update("network", loss, setting.optimizer(steps), learning_rates=rates)
    else:
        initial = folder / f"{name}_start"
        if not initial.exists():
            save_model(initial, with_branches(config, load_model(folder / base_of(name)).model, seed))
        steps = setting.branch_steps
        update = Update(
            "branches",
            loss,
            setting.optimizer(steps),
            trainable=("branches/*", "classifier/*"),
            learning_rates=rates,
            # Statistics of batch normalisation would move although the weights do not.
            evaluating=("backbone",),
        )
    return Experiment(
        name=name,
        model=config,
        data={"train": data},
        stages=(Stage(update.name, steps, (update,)),),
        validation=None,
        label_names=splits.val.label_names,
        seed=seed,
        checkpoint_every=500,
        initial=initial,
    )


def with_branches(config: ModelConfig, base: nnx.Module, seed: int) -> nnx.Module:
    """A multi-scale network that labels as its base does, until its new features get weights other than zero."""
    definition, state = nnx.split(config.create(nnx.Rngs(seed)))
    leaves, learned = named_leaves(state), named_leaves(nnx.split(base)[1])
    kernel = learned.pop("classifier/kernel")
    new = leaves["classifier/kernel"].shape[-2] - kernel.shape[-2]
    # The features of the base come first.
    leaves |= learned | {"classifier/kernel": jnp.pad(kernel, [(0, 0), (0, 0), (0, new), (0, 0)])}
    return nnx.merge(definition, with_leaves(state, leaves))


def images_per_second(predictor: Predictor, size: tuple[int, int], repeats: int = 5) -> float:
    """Of one image at a time, once compiled."""
    image = np.zeros((1, *size, 3), np.uint8)
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(predictor.run(image))
        seconds.append(time.perf_counter() - start)
    return 1 / float(np.median(seconds[1:]))


def crf_filter(image: np.ndarray, preset: Preset) -> Filter:
    """The sum of the two kernels of eq. 2 over all pairs of pixels."""
    features = (
        position_features(image.shape[:2], preset.position_bandwidth),
        bilateral_features(
            jnp.asarray(image), preset.bilateral_position_bandwidth, preset.bilateral_color_bandwidth
        ),
    )
    weights = jnp.asarray([preset.position_weight, preset.bilateral_weight])
    # Outside of jit, so that it gets the size that the image needs; of the scalings, which normalisation cancels,
    # the cheapest.
    lattice = Lattice(features, weights=weights, scaling="continuous")
    return lattice.normalized(preset.normalization)


infer = jax.jit(mean_field, static_argnames="num_iterations")


class DenseCRF:
    """The fully connected CRF as `evaluation.evaluate` takes it, with the time that it takes."""

    def __init__(self, preset: Preset):
        self._preset = preset
        self.seconds: list[float] = []

    def __call__(self, image: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Probabilities."""
        start = time.perf_counter()
        k = crf_filter(image, self._preset)
        probs = np.asarray(infer(logits, k, num_iterations=self._preset.num_iterations).probs)
        self.seconds.append(time.perf_counter() - start)
        return probs


def preset_path(args: argparse.Namespace, setting: Setting, name: str, seed: int) -> Path:
    """Where the CRF's parameters for a network are."""
    if setting.search_once:
        name = "deeplab_largefov"
    elif name == AVERAGED:
        name = PAIR[-1]
    return args.runs / f"seed_{seed}" / f"{name}_crf.json"


def trained_networks(args: argparse.Namespace, setting: Setting, seed: int) -> dict[str, Predictor]:
    """Trains all networks of a seed, or goes on, and finds the parameters of their CRFs."""
    needed = dict.fromkeys([base_of(name) for name in args.networks] + list(args.networks))
    if setting.search_once:
        needed = {"deeplab_largefov": None} | needed
    found: dict[str, Predictor] = {}
    for name in needed:
        print(f"seed {seed}: {name}")
        run = train(experiment(args, setting, name, seed), args.runs / f"seed_{seed}" / name)
        found[name] = Predictor(Reduced(run.model, setting.reduction), args.splits.whole)
        searched(
            preset_path(args, setting, name, seed),
            args.splits.held_out,
            found[name],
            count=setting.held_out,
            space=setting.space,
            coarse=setting.coarse,
            refinements=setting.refinements,
        )
    return {name: found[name] for name in args.networks}


def evaluate_seed(
    args: argparse.Namespace, setting: Setting, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, evaluation.Evaluation], dict[str, Predictor]]:
    """Figures of every network by itself and with the CRF, the evaluations, and the networks."""
    predictors = trained_networks(args, setting, seed)
    if set(PAIR) <= set(predictors):
        pair = [predictors[name].network for name in PAIR]
        averaged = Averaged(pair, scales=setting.scales, flip=setting.flip)
        predictors[AVERAGED] = Predictor(averaged, args.splits.whole)
    figures, evaluations = {}, {}
    for name, run in predictors.items():
        crf = DenseCRF(presets.load(preset_path(args, setting, name, seed)))
        result = evaluation.evaluate(run, args.splits.val, refine=crf, widths=(1,), num_pictures=0)
        assert result.baseline is not None
        alone, refined = result.baseline.totals(), result.totals()
        figures[name] = {
            **{figure: alone[figure] for figure in FIGURES},
            **{f"crf_{figure}": refined[figure] for figure in FIGURES},
            "gain": refined["mean_iou"] - alone["mean_iou"],
            "crf_seconds": float(np.median(crf.seconds)),
        }
        evaluations[name] = result
        print(f"seed {seed}: {name}: {alone['mean_iou']:.4f}, with CRF {refined['mean_iou']:.4f}")
    return figures, evaluations, predictors


def markdown(rows: Mapping[str, Any], costs: Mapping[str, Mapping[str, float]]) -> str:
    """Tables 1a and 2 in one."""
    lines = table(rows, columns={"mean_iou": "mIoU", "crf_mean_iou": "with CRF", "gain": "gain"}).splitlines()
    more = ["paper: mIoU | paper: with CRF | parameters, M | images/s | CRF, s/image", "---|---|---|---|---"]
    for name, row in rows.items():
        paper = " | ".join("" if value is None else f"{value:.2f}" for value in PAPER.get(name, (None, None)))
        cost = costs[name]
        more.append(
            f"{paper} | {cost['parameters'] / 1e6:.1f} | {cost['images_per_second']:.2f} | "
            f"{row['crf_seconds']['mean']:.2f}"
        )
    return "".join(f"{line} {cells} |\n" for line, cells in zip(lines, more, strict=True))


def shown_example(
    args: argparse.Namespace, result: evaluation.Evaluation, run: Predictor, crf: DenseCRF
) -> tuple[int, int]:
    """The image and the label of the picture: those asked for, or those that gain most."""
    val = args.splits.val
    assert result.baseline is not None
    if args.image is not None:
        index = val.names.index(args.image)
    else:
        before, after = (np.array([i.accuracy for i in r.images]) for r in (result.baseline, result))
        index = int(np.nanargmax(after - before))
    if args.label is not None:
        return index, val.label_names.index(args.label)
    image, truth = val[index]
    logits = run(image)
    gained = (crf(image, logits).argmax(-1) == truth) * 1 - (logits.argmax(-1) == truth)
    gains = [int(gained[truth == label].sum()) for label in range(len(val.label_names))]
    return index, int(np.argmax(gains))


def iterations_figure(
    image: np.ndarray, truth: np.ndarray, logits: np.ndarray, preset: Preset, label: int, name: str
) -> Figure:
    """Fig. 2: a label's scores, above, and beliefs, below, after so many iterations.

    Scores have one scale for all pictures, blue to red around zero. Their mean over the labels is taken off, which
    soft-max does not see.
    """
    k = crf_filter(image, preset)
    columns: dict[str, Any] = {f"image, {name}": [image, np.where(truth == label, label, 255)]}
    scores, beliefs = {}, {}
    for count in SHOWN_ITERATIONS:
        title = f"CRF, iteration {count}" if count else "network"
        score = infer(logits, k, num_iterations=count).logits if count else jnp.asarray(logits)
        scores[title] = np.asarray((score - score.mean(-1, keepdims=True))[..., label])
        beliefs[title] = np.asarray(jax.nn.softmax(score)[..., label])
    limit = np.quantile(np.abs(list(scores.values())), plots.SHOWN_IN_FULL)
    for title, score in scores.items():
        columns[title] = [painted("RdBu_r", 0.5 + 0.5 * score / limit), painted("viridis", beliefs[title])]
    return plots.segmentation_grid(columns, panel_width=2.4)


def painted(colormap: str, shares: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 as colours."""
    return (255 * matplotlib.colormaps[colormap](shares)[..., :3]).round().astype(np.uint8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What else can be asked for."""
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="only these rows")
    parser.add_argument("--image", help="the image of the picture, by its name")
    parser.add_argument("--label", help="the label of the picture, by its name")


def main(arguments: list[str] | None = None) -> None:
    """Trains and evaluates all seeds, and writes the results."""
    with parse(__doc__, arguments, add_arguments=add_arguments) as args:
        setting = SETTINGS[args.scale]
        prepare(args, setting)
        seeds: list[dict[str, dict[str, float]]] = []
        for seed in range(args.seeds):
            figures, evaluations, predictors = evaluate_seed(args, setting, seed)
            seeds.append(figures)
        rows = summarise(seeds, baseline=None)
        costs = {
            name: {
                "parameters": num_parameters(run.network),
                "images_per_second": images_per_second(run, args.splits.crop),
            }
            for name, run in predictors.items()
        }
        text = markdown(rows, costs)
        print(text)
        found = {
            name: [presets.load(preset_path(args, setting, name, s)) for s in range(args.seeds)]
            for name in rows
        }
        crf = {name: [dataclasses.asdict(preset) for preset in values] for name, values in found.items()}
        write(args, "deeplab_voc", __file__, rows, text, costs=costs, crf=crf)
        # That of the last seed.
        name = PAIR[0] if PAIR[0] in predictors else next(iter(predictors))
        run, preset = predictors[name], found[name][-1]
        index, label = shown_example(args, evaluations[name], run, DenseCRF(preset))
        image, truth = args.splits.val[index]
        names = args.splits.val.label_names
        figure = iterations_figure(image, truth, run(image), preset, label, names[label])
        plots.save_figure(figure, args.out / f"deeplab_voc_{args.dataset}_iterations.png")


def prepare(args: argparse.Namespace, setting: Setting) -> None:
    """Checks what was asked for before hours are spent."""
    if args.networks is None:
        args.networks = setting.networks
    if args.scale == "full" and args.weights is None:
        raise SystemExit("--weights: got none; the paper's networks begin with ImageNet's VGG-16")
    val = args.splits.val
    for option, known in (("image", val.names), ("label", val.label_names)):
        value = getattr(args, option)
        if value is not None and value not in known:
            raise SystemExit(f"--{option}: got {value!r}; expected one of {', '.join(known[:30])}")


if __name__ == "__main__":
    main()
