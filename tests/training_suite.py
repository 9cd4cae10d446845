"""Small models, data and runs that the tests of training share; also a program that is killed."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from jaxcrf.data import Augmentation, Pipeline
from jaxcrf.training import Experiment, Outcome, Run, Stage, Update, losses, train

NUM_LABELS = 3
SIZE = (12, 16)


class Network(nnx.Module):
    """Everything that has a state: parameters, batch normalisation, dropout."""

    def __init__(self, rngs, *, dropout=0.3, norm=True):
        # Before a normalisation a bias has no gradient but rounding, which Adam would make steps of.
        self.body = nnx.Conv(3, 6, (3, 3), use_bias=not norm, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Conv(6, NUM_LABELS, (1, 1), rngs=rngs)

    def __call__(self, images):
        x = self.body(images / 128 - 1)
        x = nnx.relu(x if self.norm is None else self.norm(x))
        return self.head(self.dropout(x))


def plain_network(rngs):
    """One whose output depends on nothing but parameters and the image."""
    return Network(rngs, dropout=0.0, norm=False)


def cross_entropy(model, batch):
    logits = model(batch["image"])
    loss = losses.cross_entropy(logits, batch["labels"])
    return Outcome(loss, logits, {"twice": 2 * loss})


@dataclasses.dataclass(frozen=True)
class Squares:
    """Images with a bright square, whose pixels have their own label; a border is void."""

    count: int = 10
    label_names: tuple[str, ...] = ("dark", "bright", "border")
    ignore_label: int = 255

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 100, (*SIZE, 3)).astype(np.uint8)
        labels = np.zeros(SIZE, np.int32)
        top, left = rng.integers(1, 6, 2)
        image[top : top + 5, left : left + 6] += 140
        labels[top : top + 5, left : left + 6] = 1
        labels[:, -1] = 255
        return image, labels


def draw_batch(size=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_LABELS, (size, *SIZE)).astype(np.int32)
    # Parts of a batch differ in how many of their pixels count.
    labels[rng.random(labels.shape) < np.linspace(0, 0.8, size)[:, None, None]] = 255
    return {"image": rng.integers(0, 256, (size, *SIZE, 3)).astype(np.uint8), "labels": labels}


def experiment(**changes):
    """Two stages; in the first, two kinds of update take turns."""
    pipeline = Pipeline(Squares(), batch_size=4, size=SIZE, seed=3, augmentation=Augmentation())
    body = Update("body", cross_entropy, optax.adam(1e-2), trainable=("body/*", "norm/*"))
    everything = Update(
        "everything", cross_entropy, optax.sgd(1e-2, momentum=0.9), learning_rates={"head/*": 10.0}
    )
    options = {
        "name": "squares",
        "model": Network,
        "data": {"train": pipeline, "held_out": pipeline, "val": pipeline},
        "stages": (
            Stage("first", 7, (body, everything)),
            Stage("second", 5, (everything,), split="held_out"),
        ),
        "label_names": Squares.label_names,
        "checkpoint_every": 2,
        "log_every": 3,
        "average_decay": 0.9,
    }
    return Experiment(**(options | changes))


def leaves_of(run: Run) -> dict[str, np.ndarray]:
    """All arrays of a run's last state, by path."""
    state = dataclasses.replace(
        run.state,
        variables={
            path: jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            for path, leaf in run.state.variables.items()
        },
    )
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def assert_same(found: dict, expected: dict) -> None:
    """Bit for bit."""
    assert list(found) == list(expected)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def main(folder: str, repetitions: str, *process: str) -> None:
    """Trains in a folder, maybe as one of several processes, and stores the last state beside the checkpoints."""
    if process:
        address, count, index = process
        jax.distributed.initialize(address, int(count), int(index))
    whole = experiment()
    stages = whole.stages * int(repetitions)
    run = train(dataclasses.replace(whole, stages=stages), folder, progress=False)
    if jax.process_index() == 0:
        np.savez(Path(folder, "last.npz"), **leaves_of(run))


if __name__ == "__main__":
    main(*sys.argv[1:])
