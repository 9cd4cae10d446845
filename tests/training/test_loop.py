"""Whole runs: to their end, interrupted, diverging, refused."""

import dataclasses
import json
import os
import signal

import numpy as np
import optax
import pytest
from flax import nnx

from jaxcrf.data import Pipeline
from jaxcrf.models import ModelConfig
from jaxcrf.training import Outcome, Stage, Update, load_model, objectives, read_log, save_model, train
from jaxcrf.training.planning import plan
from training_suite import (
    SIZE,
    Network,
    Squares,
    assert_same,
    cross_entropy,
    experiment,
    leaves_of,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(experiment(), folder, progress=False), folder


@pytest.mark.optimized
def test_a_run_leaves_a_log_curves_and_a_model(whole):
    run, folder = whole
    rows = read_log(folder / "log.jsonl")
    assert rows == run.rows
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [3, 6, 7, 9, 12]
    assert [row["stage"] for row in training] == ["first"] * 3 + ["second"] * 2
    assert {"loss", "twice", "gradient_norm", "mean_iou", "images_per_second"} <= set(training[0])
    assert rows[-1]["validation_mean_iou"] == run.figures["mean_iou"]
    assert (folder / "curves.png").stat().st_size > 0
    assert int(run.state.step) == 12
    saved = load_model(folder, create=Network)
    assert saved.label_names == Squares.label_names
    images = Squares()[0][0][None]
    np.testing.assert_array_equal(saved.model(images), run.model(images))
    plain = load_model(folder, create=Network, averaged=False)
    np.testing.assert_array_equal(plain.model.head.bias[...], run.state.params["head/bias"])
    assert not np.array_equal(saved.model.head.bias[...], plain.model.head.bias[...])


@dataclasses.dataclass(frozen=True)
class Interrupting(Squares):
    """Asks the process to end when an example is read."""

    signal: int = signal.SIGTERM
    flag: str = ""

    def __getitem__(self, index):
        if index == 4 and not os.path.exists(self.flag):
            with open(self.flag, "w"):
                pass
            os.kill(os.getpid(), self.signal)
        return super().__getitem__(index)


# Runs that are compared bit for bit are compiled alike, that of the module's fixture included.
@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, SystemExit), pytest.param(signal.SIGINT, KeyboardInterrupt, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_goes_on_exactly(tmp_path, whole, number, raised):
    original = experiment()
    data = {
        split: dataclasses.replace(
            pipeline, source=Interrupting(signal=number, flag=str(tmp_path / "flag")), num_threads=0
        )
        for split, pipeline in original.data.items()
    }
    interrupted = experiment(data=data, checkpoint_every=None)
    before = signal.getsignal(number)
    with pytest.raises(raised):
        train(interrupted, tmp_path / "run", progress=False)
    assert signal.getsignal(number) == before
    (step,) = (int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert 0 < step < 12
    run = train(interrupted, tmp_path / "run", progress=False)
    assert_same(leaves_of(run), leaves_of(whole[0]))
    # Lines of the log are cut where the run goes on, and none is there twice.
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 7, 9, 12]


@pytest.mark.slow
@pytest.mark.optimized
def test_a_finished_run_only_evaluates(whole):
    run, folder = whole
    again = train(experiment(), folder, progress=False)
    assert_same(leaves_of(again), leaves_of(run))
    assert again.figures == run.figures


def test_another_experiment_does_not_go_on(whole):
    _, folder = whole
    with pytest.raises(ValueError, match=r"holds another run.*\n  seed: 0 then, 1 now"):
        train(experiment(seed=1), folder, progress=False)


def test_a_loss_that_is_not_finite_stops_with_its_batch(tmp_path):
    def loss(model, batch):
        outcome = cross_entropy(model, batch)
        return Outcome(outcome.loss / (batch["labels"].shape[0] - (batch["image"][:, 0, 0, 0] < 90).sum()))

    class Bright(Squares):
        def __getitem__(self, index):
            image, labels = super().__getitem__(index)
            image[0, 0, 0] = 100 if index < 6 else 10
            return image, labels

    update = Update("all", loss, optax.sgd(0.01))
    pipeline = Pipeline(Bright(), batch_size=2, size=SIZE, shuffle=False)
    run = experiment(
        data={"train": pipeline, "val": pipeline}, stages=(Stage("all", 9, (update,)),), checkpoint_every=1
    )
    with pytest.raises(FloatingPointError, match=r"step 3: the loss of update 'all' is inf") as error:
        train(run, tmp_path, progress=False)
    (path,) = (tmp_path / "failures").iterdir()
    assert str(path) in str(error.value)
    with np.load(path) as dump:
        np.testing.assert_array_equal(dump["image"], [Bright()[6][0], Bright()[7][0]])
        assert (int(dump["step"]), str(dump["update"])) == (3, "all")
    assert max(int(entry.name[5:]) for entry in (tmp_path / "checkpoints").glob("step_*")) == 3


@pytest.mark.slow
def test_arrays_of_another_run_to_begin_with(tmp_path):
    options = {"width": 4, "blocks": [0, 0, 0]}
    trained = ModelConfig.of("small_fcn", 3, **options).create(nnx.Rngs(7))
    save_model(tmp_path / "model", trained)
    begun = experiment(model=ModelConfig.of("small_fcn", 4, **options), initial=tmp_path / "model").create()
    np.testing.assert_array_equal(begun.stem.convolution.kernel[...], trained.stem.convolution.kernel[...])
    assert begun.classifier.kernel.shape[-1] == 4
    with pytest.raises(ValueError, match=r"initial: .* has no array"):
        experiment(model=lambda rngs: nnx.Conv(3, 3, (1, 1), rngs=rngs), initial=tmp_path / "model").create()


def test_what_cannot_be_run_is_refused_at_once():
    stages = experiment().stages
    with pytest.raises(ValueError, match="data: has no split 'held_out'"):
        experiment(data={"train": experiment().data["train"], "val": experiment().data["val"]})
    with pytest.raises(ValueError, match="stages: got none"):
        experiment(stages=())
    with pytest.raises(ValueError, match="log_every: got 0"):
        experiment(log_every=0)
    misspelt = Update("all", cross_entropy, optax.sgd(0.1), trainable=("boddy/*",))
    with pytest.raises(ValueError, match="trainable: got the pattern 'boddy"):
        train(experiment(stages=(*stages, Stage("all", 1, (misspelt,)))), progress=False)
    with pytest.raises(ValueError, match="num_devices: got 64"):
        train(experiment(), num_devices=64, progress=False)


def test_logs_that_are_damaged(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n{\n" + json.dumps({"step": 3}) + "\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_log(path)


def test_plans_say_what_is_needed():
    found = plan(experiment())
    assert found.shapes == {"image": (4, *SIZE, 3), "labels": (4, *SIZE)}
    assert found.logits == (4, *SIZE, 3)
    sizes = {"body": 3 * 3 * 3 * 6, "norm": 12, "head": 6 * 3 + 3}
    assert found.params == sizes
    assert found.updates["body"].trained == sizes["body"] + sizes["norm"]
    assert found.updates["everything"].trained == sum(sizes.values())
    batch = 4 * SIZE[0] * SIZE[1] * (3 + 4)
    assert found.updates["everything"].arguments > batch + 3 * 4 * sum(sizes.values())
    assert found.num_steps == 12
    # Forward, and backward to weights and, of the second convolution only, to what comes in.
    pixels, body, head = 4 * SIZE[0] * SIZE[1], 3 * 3 * 3 * 6, 6 * 3
    assert found.updates["everything"].operations == 2 * pixels * (2 * body + 3 * head)


@pytest.mark.slow
def test_losses_of_a_network_with_a_crf():
    crf = {"refine": "convcrf", "refine_options": {"num_iterations": 1}}
    config = ModelConfig.of("small_fcn", 3, width=4, blocks=[0, 0, 0], **crf)
    pipeline = Pipeline(Squares(), batch_size=2, size=SIZE)
    unary = Update("unary", objectives.unary(), optax.adam(1e-2), trainable=("unary/*",))
    joint = Update("joint", objectives.joint(auxiliary_weight=0.5), optax.adam(1e-2))
    crf = Update(
        "crf",
        objectives.segmentation(subsample=2),
        optax.adam(1e-2),
        trainable=("crf/*",),
        evaluating=("unary",),
    )
    stages = (Stage("unary", 2, (unary,)), Stage("joint", 2, (unary, joint)), Stage("crf", 2, (crf,)))
    run = train(
        experiment(model=config, data={"train": pipeline, "val": pipeline}, stages=stages, log_every=1),
        progress=False,
    )
    rows = [row for row in run.rows if "loss" in row]
    assert [("unary_loss" in row) for row in rows] == [False, False, False, True, False, False]
    assert rows[3]["loss"] > 1.4 * rows[3]["unary_loss"] * 0.5
