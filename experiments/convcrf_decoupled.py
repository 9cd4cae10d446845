r"""CRFs that are trained on the outputs of a finished network: Table 2 of the ConvCRF paper.

    python experiments/convcrf_decoupled.py --data VOC2012 --weights resnet101.safetensors --runs runs --out results
    python experiments/convcrf_decoupled.py --dataset camvid --data camvid --runs runs --out results
    python experiments/convcrf_decoupled.py --smoke

Decoupled training (§5.2): a network is trained, then frozen, and the parameters of a CRF are learned on images that it
has not seen. Rows:

- `unary`: the network alone,
- `densecrf`: the fully connected CRF after DeepLab, its parameters searched for on the held-out images, 10 iterations,
- `convcrf`: ConvCRF with hand-crafted features, kernel weights and bandwidths learned on the held-out images,
- `convcrf+T`, `+C`, `+CT`: also the smoothness features, the label compatibility, both.

The paper has, on PASCAL VOC's validation set:

| | unary | densecrf | convcrf | +T | +C | +CT |
|---|---|---|---|---|---|---|
| mIoU | 71.23 | 72.02 | 72.04 | 72.07 | 72.30 | 72.37 |
| pixel accuracy | 91.84 | 94.01 | 93.99 | 94.01 | 94.01 | 94.03 |

Full setting (§5): ResNet-101 with an FCN head from ImageNet's weights, 200 epochs of 10 382 crops of 321 × 321 in
batches of 16, Adam from 5e-5 with polynomial decay, L2 of 5e-4 on kernels, 2-D dropout of one half, flips, rotations,
scales and colours; about 130 000 steps, a day on one large GPU. The 200 held-out images are padded to 512 × 512, the
one size that the features of +T need.

`--dataset camvid` is what `experiments/camvid_fcn.py` trains, a network of 1.3 million parameters: on two quiet cores
eleven minutes a seed for the network, two for each ConvCRF, and three for the dense CRF, whose parameters are searched
for on six held-out images. `--unary-runs FOLDER` names a folder with runs `seed_K/unary` (and `seed_K/convcrf` …) that
are taken as they are, such as camvid_fcn.py leaves.

Runs can be interrupted at any time; the same command goes on where it was. The output is a JSON file, a Markdown table
and the validation images that the last CRF changed most for the better.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx
from training_tables import (
    CAMVID_SPACE,
    FIGURES,
    Predictor,
    Splits,
    parse,
    predict,
    searched,
    summarise,
    table,
    write,
)

import jaxcrf
from jaxcrf import evaluation, plots, presets
from jaxcrf.data import Pipeline, augmentation
from jaxcrf.models import ModelConfig, convcrf_options
from jaxcrf.models.convcrf import VARIANTS, Variant
from jaxcrf.presets import Preset
from jaxcrf.training import (
    Experiment,
    Stage,
    Update,
    evaluate_pipeline,
    load_model,
    objectives,
    recipes,
    train,
)
from jaxcrf.training.schedules import optimizer_convcrf, polynomial_decay
from jaxcrf.training.search import SPACES

PAPER = {
    "unary": 71.23,
    "densecrf": 72.02,
    "convcrf": 72.04,
    "convcrf+T": 72.07,
    "convcrf+C": 72.30,
    "convcrf+CT": 72.37,
}
PICTURES = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the experiment is; the defaults are the paper's, and where it has none, ours (¹).

    Attributes:
        from_recipes: networks and ConvCRFs are those of `jaxcrf.training.recipes`; of the rest only the dense CRF's
            numbers count then.
        network: a name of `jaxcrf.models`.
        network_options: of the network.
        epochs: of the unary's training.
        batch_size: of the unary's training.
        preset: where the ConvCRF starts; that of the public code.
        crf_epochs: of a ConvCRF's training, on the held-out images ¹.
        crf_batch_size: likewise ¹.
        crf_learning_rate: likewise, of Adam, falling to zero ¹.
        variants: of ConvCRF.
        space: of the dense CRF's parameters; DeepLab's grid.
        searched: on how many held-out images.
        coarse: see `search`.
        refinements: see `search`.
    """

    from_recipes: bool = False
    network: str = "resnet101_fcn"
    network_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    epochs: int = 200
    batch_size: int = 16
    preset: str = "convcrf_reference"
    crf_epochs: int = 10
    crf_batch_size: int = 4
    crf_learning_rate: float = 3e-2
    variants: tuple[Variant, ...] = VARIANTS
    space: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=lambda: SPACES["densecrf"])
    searched: int = 200
    coarse: int = 3
    refinements: int = 1


SETTINGS = {
    "full": Setting(),
    "reduced": Setting(
        from_recipes=True,
        space=CAMVID_SPACE,
        searched=6,
        coarse=2,
        refinements=0,
    ),
    "smoke": Setting(
        network="small_fcn",
        network_options={"width": 8, "blocks": [0, 0, 0]},
        epochs=1,
        batch_size=2,
        crf_epochs=1,
        crf_batch_size=1,
        variants=("convcrf+CT",),  # whether it runs: the others are parts of it
        space={"bilateral_weight": (5, 10)},
        searched=1,
        coarse=1,
        refinements=0,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the experiments of ConvCRF have besides."""
    parser.add_argument(
        "--unary-runs", type=Path, help="a folder with runs seed_K/unary, which are taken as they are"
    )


def configuration(setting: Setting, splits: Splits, variant: Variant | None) -> ModelConfig:
    """The network with a ConvCRF on top: of a variant, or one that is not learned."""
    return ModelConfig.of(
        setting.network,
        splits.num_labels,
        **setting.network_options,
        refine="convcrf",
        refine_options=convcrf_options(variant, splits.whole, preset=setting.preset),
    )


def unary_experiment(
    args: argparse.Namespace, setting: Setting, seed: int, epochs: int | None = None
) -> Experiment:
    """The training of the network, below a ConvCRF that has no part in it."""
    if setting.from_recipes:
        return recipes.camvid_unary(args.data, seed=seed)
    splits: Splits = args.splits
    data = Pipeline(
        splits.train,
        batch_size=setting.batch_size,
        size=splits.crop,
        seed=seed,
        augmentation=augmentation.get("convcrf"),
    )
    steps = (epochs or setting.epochs) * data.steps_per_epoch
    update = Update("unary", objectives.unary(), optimizer_convcrf(steps), trainable=("unary/*",))
    return Experiment(
        name="unary",
        model=configuration(setting, splits, None),
        data={"train": data},
        stages=(Stage("unary", steps, (update,)),),
        validation=None,
        label_names=splits.val.label_names,
        seed=seed,
        initial=args.weights,
    )


def crf_experiment(
    args: argparse.Namespace, setting: Setting, variant: Any, unary: Path, seed: int
) -> Experiment:
    """The training of a ConvCRF on the held-out images, above the network of a run."""
    if setting.from_recipes:
        return recipes.camvid_crf(args.data, unary, variant=variant, seed=seed)
    splits: Splits = args.splits
    # Without augmentation: the features of +T belong to places of the image.
    data = Pipeline(splits.held_out, batch_size=setting.crf_batch_size, size=splits.whole, seed=seed)
    steps = setting.crf_epochs * data.steps_per_epoch
    update = Update(
        "crf",
        objectives.segmentation(),
        optax.adam(polynomial_decay(setting.crf_learning_rate, steps)),
        trainable=("crf/*",),
        # A pixel's own feature sees few images; at the full rate Adam would follow their noise.
        learning_rates={"crf/feature_offsets": 0.1} if "T" in variant else {},
        evaluating=("unary",),
    )
    return Experiment(
        name=variant,
        model=configuration(setting, splits, variant),
        data={"held_out": data},
        stages=(Stage("crf", steps, (update,), split="held_out"),),
        validation=None,
        label_names=splits.val.label_names,
        seed=seed,
        checkpoint_every=None,
        initial=unary,
    )


def trained(
    args: argparse.Namespace, name: str, seed: int, experiment: Callable[[], Experiment]
) -> tuple[nnx.Module, Path]:
    """The model of a run and its folder: one of --unary-runs as it is, or trained now."""
    if args.unary_runs is not None:
        folder = args.unary_runs / f"seed_{seed}" / name
        if folder.exists():
            return load_model(folder).model, folder
        if name == "unary":
            raise ValueError(f"--unary-runs: {folder} does not exist; expected the folder of a training run")
    folder = args.runs / f"seed_{seed}" / name
    print(f"seed {seed}: {name}")
    return train(experiment(), folder).model, folder


def dense_figures(
    run: Callable[[np.ndarray], np.ndarray], splits: Splits, preset: Preset
) -> dict[str, float]:
    """Figures of the dense CRF, on images as large as they are."""
    refine = functools.partial(jaxcrf.refine, method="densecrf", preset=preset)
    totals = evaluation.evaluate(
        run, splits.val, refine=lambda image, logits: np.asarray(refine(image, logits=logits)), num_pictures=0
    ).totals()
    return {name: totals[name] for name in FIGURES}


def evaluate_seed(
    args: argparse.Namespace, setting: Setting, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, Callable[[Any], Any]]]:
    """All rows of one seed: figures of the validation images, and what the networks are as functions."""
    splits: Splits = args.splits
    val = splits.evaluated()
    model, unary = trained(args, "unary", seed, lambda: unary_experiment(args, setting, seed))
    network: Any = model
    run = Predictor(network.unary, splits.whole)
    preset = searched(
        args.runs / f"seed_{seed}" / "densecrf.json",
        splits.held_out,
        run,
        count=setting.searched,
        space=setting.space,
        coarse=setting.coarse,
        refinements=setting.refinements,
    )
    functions = {"unary": run.run}
    figures = {
        "unary": evaluate_pipeline(run.run, val),
        "densecrf": dense_figures(run, splits, preset),
    }
    for variant in setting.variants:
        refined, _ = trained(
            args,
            variant,
            seed,
            lambda variant=variant: crf_experiment(args, setting, variant, unary, seed),
        )
        functions[variant] = predict(refined)
        figures[variant] = evaluate_pipeline(functions[variant], val)
    return figures, functions


def pictures(
    val: Pipeline, functions: Mapping[str, Callable[[Any], Any]], count: int
) -> dict[str, list[np.ndarray]]:
    """Columns of a grid: the images on which the last function is right at most pixels more than the first."""
    found: list[tuple[int, dict[str, np.ndarray]]] = []
    with val.epoch() as batches:
        for batch in batches:
            predicted = {name: np.asarray(f(batch["image"])).argmax(-1) for name, f in functions.items()}
            for i, truth in enumerate(batch["labels"]):
                valid = truth != val.ignore_label
                columns = {"image": batch["image"][i], "truth": truth}
                columns |= {name: labels[i] for name, labels in predicted.items()}
                before, *_, after = (int((labels[i] == truth)[valid].sum()) for labels in predicted.values())
                found.append((after - before, columns))
                found = sorted(found, key=lambda entry: -entry[0])[:count]
    return {title: [columns[title] for _, columns in found] for title in found[0][1]}


def main(arguments: list[str] | None = None) -> None:
    """Trains and evaluates all seeds, and writes the results."""
    with parse(__doc__, arguments, add_arguments=add_arguments) as args:
        setting = SETTINGS[args.scale]
        seeds, functions = [], {}
        for seed in range(args.seeds):
            figures, functions = evaluate_seed(args, setting, seed)
            seeds.append(figures)
            print(table(summarise(seeds), paper=PAPER))
        rows = summarise(seeds)
        found = [
            dataclasses.asdict(presets.load(args.runs / f"seed_{seed}" / "densecrf.json"))
            for seed in range(args.seeds)
        ]
        write(args, "convcrf_decoupled", __file__, rows, table(rows, paper=PAPER), densecrf=found)
        shown = {name: functions[name] for name in ("unary", setting.variants[-1])}
        columns = pictures(args.splits.evaluated(), shown, PICTURES)
        figure = plots.segmentation_grid(columns, label_names=args.splits.val.label_names)
        plots.save_figure(figure, args.out / f"convcrf_decoupled_{args.dataset}.png")


if __name__ == "__main__":
    main()
