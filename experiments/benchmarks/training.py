"""What the training loop costs beside the bare jitted step.

    python experiments/benchmarks/training.py --out results
    JAXCRF_DATA_DIR=… python experiments/benchmarks/training.py --out results

Cost: three minutes on two CPU cores. Expected: a step of the loop, with its log, its guard against NaN, its running
mIoU and batches from memory, takes at most 1.02 times the compiled step called on one batch over and over. The two take
turns, and the best of each counts: what disturbs a machine only ever adds. With CamVid at hand a third row trains from
its files, decoded and augmented on the cores that on a CPU also compute the step.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxcrf import reporting
from jaxcrf.data import Pipeline
from jaxcrf.models import ModelConfig
from jaxcrf.training import (
    Experiment,
    Stage,
    Template,
    Update,
    data_mesh,
    init_state,
    make_step,
    objectives,
    put_batch,
    recipes,
    replicate,
    train,
    with_optimizers,
)

TARGET = 1.02
NUM_LABELS = 11


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Random examples that cost nothing to read."""

    shape: tuple[int, int]
    count: int = 16
    ignore_label: int = 255

    def __len__(self) -> int:
        """How many."""
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One of them."""
        image = np.full((*self.shape, 3), 10 * index, np.uint8)
        return image, np.full(self.shape, index % NUM_LABELS, np.int32)


def experiment(args: argparse.Namespace) -> Experiment:
    """The network of `camvid_fcn.py`, on examples from memory."""
    pipeline = Pipeline(InMemory(args.shape), batch_size=args.batch_size, size=args.shape)
    update = Update("all", objectives.segmentation(), optax.adam(1e-3))
    return Experiment(
        "benchmark",
        ModelConfig.of("small_fcn", NUM_LABELS, width=args.width, reduction=2),
        data={"train": pipeline},
        stages=(Stage("all", args.steps, (update,)),),
        validation=None,
        log_every=max(1, args.steps // 4),
    )


def bare_ms(run: Experiment, steps: int) -> float:
    """Milliseconds of the compiled step on one batch that lies on the device."""
    mesh = data_mesh(1)
    template = Template(run.create())
    (update,) = run.stages[0].updates
    state = replicate(with_optimizers(init_state(template), {"all": update}), mesh)
    with run.data["train"].batches() as batches:
        batch = put_batch(next(batches), mesh)
    step: Any = make_step(template, update, mesh=mesh, **run.step_options)
    state, _ = step(state, batch)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    for _ in range(steps):
        state, report = step(state, batch)
    jax.block_until_ready((state, report))
    return 1e3 * (time.perf_counter() - begin) / steps


def loop_ms(run: Experiment) -> float:
    """Milliseconds of a step of `train`, from the best stretch between two lines of its log."""
    rows = train(run, num_devices=1, progress=False).rows
    batch_size = run.data[run.stages[0].split].batch_size
    return 1e3 * batch_size / max(row["images_per_second"] for row in rows)


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32, help="per round")
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--out", type=Path, help="folder for training.json")
    args = parser.parse_args()
    args.shape, args.batch_size, args.width = ((36, 48), 2, 8) if args.smoke else ((360, 480), 8, 48)
    if args.smoke:
        args.rounds, args.steps = 1, 4
    run = experiment(args)
    bare, loop = [], []
    for _ in range(args.rounds):
        bare.append(bare_ms(run, args.steps))
        loop.append(loop_ms(run))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(run.create(), nnx.Param)))
    result: dict[str, Any] = {
        "shape": list(args.shape),
        "batch_size": args.batch_size,
        "parameters": parameters,
        "bare_ms": bare,
        "loop_ms": loop,
        "ratio": min(loop) / min(bare),
        "target": TARGET,
    }
    print(f"bare step {min(bare):8.2f} ms\nloop      {min(loop):8.2f} ms, {result['ratio']:.3f} of it")
    folder = Path(os.environ.get("JAXCRF_DATA_DIR", "-"), "camvid")
    if folder.is_dir() and not args.smoke:
        files = recipes.camvid_unary(folder)
        (update,) = run.stages[0].updates
        data = {"train": files.data["train"]}
        stages = (Stage("all", args.steps, (update,)),)
        result["from_files_ms"] = loop_ms(dataclasses.replace(run, data=data, stages=stages))
        print(f"from files{result['from_files_ms']:8.2f} ms")
    if args.out:
        reporting.write_json(args.out / "training.json", result | reporting.circumstances(__file__))


if __name__ == "__main__":
    main()
