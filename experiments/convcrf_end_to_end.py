r"""Network and CRF trained together: Table 3 of the ConvCRF paper.

    python experiments/convcrf_end_to_end.py --data VOC2012 --weights resnet101.safetensors --runs runs --out results
    python experiments/convcrf_end_to_end.py --dataset camvid --data camvid --runs runs --out results
    python experiments/convcrf_end_to_end.py --smoke

Rows:

- `unary`: the network of `experiments/convcrf_decoupled.py`, alone; with `--unary-runs FOLDER` it and the decoupled
  CRF are taken from that experiment's runs, or from those of camvid_fcn.py,
- `unary, as long`: a network that was trained alone for as many epochs as the one below,
- `decoupled`: a ConvCRF with learned compatibility on `unary`, trained on the held-out images,
- `end to end`: such a ConvCRF and its network trained together (§5.3): updates of the network by its own loss and of
  everything, with an auxiliary loss of the network, in turn; at each epoch's end the CRF is tuned on the held-out
  images,
- `end to end, unary`: the network of that, without its CRF,
- `crf_as_rnn`: the baseline: a fully connected CRF with weights per label and a learned compatibility on `unary`, both
  trained by CRF-as-RNN's protocol: batches of one image, a constant rate of 1e-13 for a loss summed over pixels, 5
  iterations, and 10 in the evaluation.

The paper has, on PASCAL VOC's validation set, mIoU 70.99 for the unary, 72.18 for ConvCRF and 69.6 for CRFasRNN; pixel
accuracies are 93.76, 94.04 and 93.03.

Full setting: 250 epochs, of which the first 100 are the network's alone, so that the joint ones begin before it has
converged. Network, optimiser and augmentation are those of convcrf_decoupled.py; rates fall over the whole training.
The paper needed 30 hours on four GPUs of its time. For how long its baseline was trained it does not say: here one
epoch.

`--dataset camvid` begins where `experiments/camvid_fcn.py` ends, with a network from scratch and its decoupled CRF. Six
epochs of crops of 192 × 256, from a tenth of the rate that the network began with, are about five minutes a seed on
two quiet cores, and one for `unary, as long`. CRF-as-RNN's protocol gets 60 images, which with the evaluation is three
minutes; its rate, which was chosen for another network, moves this one by nothing that can be measured.

Runs can be interrupted at any time; the same command goes on where it was. The output is a JSON file, a Markdown table
and the curves of the training (fig. 4).
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import convcrf_decoupled
import jax.numpy as jnp
import optax
from convcrf_decoupled import add_arguments, crf_experiment, trained, unary_experiment
from training_tables import Splits, parse, predict, summarise, table, write

from jaxcrf import plots
from jaxcrf.data import Augmentation, Pipeline
from jaxcrf.models import ModelConfig
from jaxcrf.training import Experiment, Stage, Update, evaluate_pipeline, objectives, recipes
from jaxcrf.training.loop import read_log
from jaxcrf.training.protocols import end_to_end
from jaxcrf.training.schedules import Schedule, adam, optimizer_crf_as_rnn, polynomial_decay, schedule_convcrf

VARIANT = "convcrf+C"
PAPER = {"unary, as long": 70.99, "end to end": 72.18, "crf_as_rnn": 69.6}
TEST_ITERATIONS = 10


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the experiment is; the defaults are the paper's, and where it has none, ours (¹).

    Attributes:
        decoupled: the setting of `unary` and `decoupled`.
        unary_epochs: of the network alone. 0 begins with `decoupled`, and then only the joint epochs are left.
        joint_epochs: afterwards.
        batch_size: of the training images.
        crop: of all of them; None for the data set's.
        augmentation: of the training images.
        learning_rate: of the network's and the joint updates, to begin with.
        weight_decay: L2 on kernels.
        class_weights: whether rare labels weigh more, as in `jaxcrf.training.recipes`.
        crf_learning_rate: of the CRF's own updates, falling to zero ¹.
        filter: of the fully connected CRF.
        rnn_images: of CRF-as-RNN's protocol; None for one epoch ¹.
    """

    decoupled: convcrf_decoupled.Setting = convcrf_decoupled.SETTINGS["full"]
    unary_epochs: int = 100
    joint_epochs: int = 150
    batch_size: int = 16
    crop: tuple[int, int] | None = None
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    learning_rate: float = 5e-5
    weight_decay: float = 5e-4
    class_weights: bool = False
    crf_learning_rate: float = 1e-2
    filter: str = "auto"
    rnn_images: int | None = None


SETTINGS = {
    "full": Setting(),
    "reduced": Setting(
        decoupled=convcrf_decoupled.SETTINGS["reduced"],
        unary_epochs=0,
        joint_epochs=6,
        batch_size=8,
        crop=(192, 256),
        augmentation=Augmentation(rotation=5.0, scale=(0.7, 1.6), brightness=25.0, hue=9.0),
        learning_rate=2e-4,
        weight_decay=1e-4,
        class_weights=True,
        rnn_images=60,
    ),
    "smoke": Setting(
        decoupled=convcrf_decoupled.SETTINGS["smoke"],
        unary_epochs=1,
        joint_epochs=1,
        batch_size=1,
        rnn_images=1,
    ),
}


def configuration(args: argparse.Namespace, setting: Setting) -> ModelConfig:
    """The network with the ConvCRF that is trained."""
    if not setting.decoupled.from_recipes:
        return convcrf_decoupled.configuration(setting.decoupled, args.splits, VARIANT)
    config = recipes.camvid_crf(args.data, args.runs, variant=VARIANT).model
    assert isinstance(config, ModelConfig)
    return config


def schedules(setting: Setting, steps_per_epoch: int) -> tuple[Schedule, Schedule, int]:
    """The rates of the network's and of the joint updates, which count their own steps only, and all steps."""
    unary_steps = setting.unary_epochs * steps_per_epoch
    steps = unary_steps + setting.joint_epochs * steps_per_epoch
    whole = schedule_convcrf(steps, learning_rate=setting.learning_rate)
    # They take turns within an epoch, of which the network has the odd one.
    joint_share, unary_share = (
        count / steps_per_epoch for count in (steps_per_epoch // 2, -(-steps_per_epoch // 2))
    )

    def unary(step: Any) -> Any:
        return whole(jnp.where(step < unary_steps, step, unary_steps + (step - unary_steps) / unary_share))

    def joint(step: Any) -> Any:
        return whole(unary_steps + step / joint_share)

    return unary, joint, steps


def training_data(args: argparse.Namespace, setting: Setting, seed: int) -> dict[str, Pipeline]:
    """Augmented crops of the training images, and plain ones of those held out."""
    splits: Splits = args.splits
    options: dict[str, Any] = {
        "batch_size": setting.batch_size,
        "size": setting.crop or splits.crop,
        "seed": seed,
    }
    return {
        "train": Pipeline(splits.train, augmentation=setting.augmentation, **options),
        "held_out": Pipeline(splits.held_out, **options),
    }


def joint_experiment(
    args: argparse.Namespace, setting: Setting, seed: int, initial: Path | None, *, alone: bool
) -> Experiment:
    """The training of network and CRF, or for as long of the network alone."""
    data = training_data(args, setting, seed)
    # An epoch has updates of both kinds.
    steps_per_epoch = max(2, data["train"].steps_per_epoch)
    crf_steps = data["held_out"].steps_per_epoch
    unary_rate, joint_rate, steps = schedules(setting, steps_per_epoch)
    train_weights, held_out_weights = (
        {"class_weights": recipes.mild_class_weights(folder)} if setting.class_weights else {}
        for folder in (args.splits.train, args.splits.held_out)
    )
    if alone:
        rate = schedule_convcrf(steps, learning_rate=setting.learning_rate)
        optimizer = adam(rate, weight_decay=setting.weight_decay)
        update = Update("unary", objectives.unary(**train_weights), optimizer, trainable=("unary/*",))
        stages: tuple[Stage, ...] = (Stage("unary", steps, (update,)),)
    else:
        stages = end_to_end(
            Update(
                "unary",
                objectives.unary(**train_weights),
                adam(unary_rate, weight_decay=setting.weight_decay),
                trainable=("unary/*",),
            ),
            Update(
                "joint",
                objectives.joint(**train_weights),
                adam(joint_rate, weight_decay=setting.weight_decay),
            ),
            Update(
                "crf",
                objectives.segmentation(**held_out_weights),
                optax.adam(polynomial_decay(setting.crf_learning_rate, setting.joint_epochs * crf_steps)),
                trainable=("crf/*",),
                evaluating=("unary",),
            ),
            steps_per_epoch=steps_per_epoch,
            crf_steps=crf_steps,
            unary_epochs=max(1, setting.unary_epochs),
            joint_epochs=setting.joint_epochs,
        )
        if not setting.unary_epochs:
            stages = stages[1:]
    return Experiment(
        name="unary_as_long" if alone else "end_to_end",
        model=configuration(args, setting),
        data=data,
        stages=stages,
        validation=None,
        label_names=args.splits.val.label_names,
        seed=seed,
        initial=initial,
    )


def rnn_experiment(args: argparse.Namespace, setting: Setting, seed: int, unary: Path) -> Experiment:
    """CRF-as-RNN's training, which begins with a finished network."""
    splits: Splits = args.splits
    base = configuration(args, setting)
    crf = {
        "preset": "densecrf_crf_as_rnn",
        "filter": setting.filter,
        "weights_per_label": True,
        "trainable_compatibility": True,
    }
    options = base.to_json()["options"] | {"refine": "densecrf", "refine_options": crf}
    data = Pipeline(splits.train, batch_size=1, size=splits.whole, seed=seed)
    update = Update("crf_as_rnn", objectives.segmentation(reduction="sum"), optimizer_crf_as_rnn())
    return Experiment(
        name="crf_as_rnn",
        model=ModelConfig.of(base.name, base.num_labels, **options),
        data={"train": data},
        stages=(Stage("crf_as_rnn", setting.rnn_images or len(splits.train), (update,)),),
        validation=None,
        label_names=splits.val.label_names,
        seed=seed,
        initial=unary,
    )


def evaluate_seed(
    args: argparse.Namespace, setting: Setting, seed: int
) -> tuple[dict[str, Mapping[str, float]], Path]:
    """All rows of one seed, figures of the validation images; and the run of the training end to end."""
    below = setting.decoupled
    val = args.splits.evaluated()

    def run(name: str, experiment: Any) -> tuple[Any, Path]:
        return trained(args, name, seed, experiment)

    def figures(module: Any) -> Mapping[str, float]:
        return evaluate_pipeline(predict(module), val)

    rows = {}
    model, unary = run("unary", lambda: unary_experiment(args, below, seed))
    rows["unary"] = figures(model.unary)
    refined, decoupled = run(VARIANT, lambda: crf_experiment(args, below, VARIANT, unary, seed))
    rows["decoupled"] = figures(refined)
    start = args.weights if setting.unary_epochs else decoupled
    model, _ = run("unary_as_long", lambda: joint_experiment(args, setting, seed, start, alone=True))
    rows["unary, as long"] = figures(model.unary)
    model, joint = run("end_to_end", lambda: joint_experiment(args, setting, seed, start, alone=False))
    rows["end to end, unary"] = figures(model.unary)
    rows["end to end"] = figures(model)
    model, _ = run("crf_as_rnn", lambda: rnn_experiment(args, setting, seed, unary))
    model.crf.num_iterations = TEST_ITERATIONS
    rows["crf_as_rnn"] = figures(model)
    return rows, joint


def main(arguments: list[str] | None = None) -> None:
    """Trains and evaluates all seeds, and writes the results."""
    with parse(__doc__, arguments, add_arguments=add_arguments) as args:
        setting = SETTINGS[args.scale]
        seeds, runs = [], []
        for seed in range(args.seeds):
            figures, run = evaluate_seed(args, setting, seed)
            seeds.append(figures)
            runs.append(run)
            print(table(summarise(seeds), paper=PAPER))
        rows = summarise(seeds)
        write(args, "convcrf_end_to_end", __file__, rows, table(rows, paper=PAPER))
        # The losses of the CRF's own updates, on other images and without an auxiliary term, are not to be compared.
        joint = [row for row in read_log(runs[0] / "log.jsonl") if row["stage"] != "crf"]
        curves = plots.training_curves(joint, names=("loss", "mean_iou"))
        plots.save_figure(curves, args.out / f"convcrf_end_to_end_{args.dataset}.png")


if __name__ == "__main__":
    main()
