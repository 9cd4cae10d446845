"""Training runs: stages of updates on one device or many, logged, guarded, interruptible and resumable."""

import collections
import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxcrf import metrics
from jaxcrf.data.images import replacing
from jaxcrf.data.pipeline import Pipeline
from jaxcrf.models import ModelConfig
from jaxcrf.models.parameters import named_leaves, with_leaves
from jaxcrf.training.checkpoints import Checkpoints
from jaxcrf.training.protocols import Stage, describe, locate, num_steps, updates_from
from jaxcrf.training.steps import (
    Report,
    Template,
    TrainState,
    data_mesh,
    init_state,
    make_predict,
    make_step,
    put_batch,
    replicate,
    with_optimizers,
)
from jaxcrf.training.updates import Batch, Update

# Reports are read that many steps late, so that the device never waits for the host.
_LAG = 2

# Files that `Experiment.initial` may name.
_WEIGHTS = (".safetensors", ".pth", ".pt")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a training run consists of. Run it with `train`.

    Attributes:
        name: of the run.
        model: a configuration of `jaxcrf.models`, or a function of an `nnx.Rngs` that makes any other module from
            images `[B, H, W, 3]` to logits `[B, H, W, L]`.
        data: the input pipelines by the name of their split. Stages name the splits that they train on.
        stages: the protocol, as of `jaxcrf.training.protocols`.
        validation: the split that is evaluated; None for none.
        label_names: what the labels stand for.
        seed: of the parameters and of dropout.
        validate_every: steps between evaluations; None for one at the end only.
        checkpoint_every: steps between checkpoints; None for one at the end only.
        keep: how many of the newest checkpoints are kept, besides the best one.
        log_every: steps between lines of the log.
        accumulate: see `make_step`.
        compute_dtype: see `make_step`; as "bfloat16".
        average_decay: see `make_step`. Evaluations and saved models take the average where there is one.
        initial: what the run begins with: the folder of a saved model or run, whose arrays of the same path, shape
            and dtype are taken; or a file of weights with torchvision's names, `.safetensors` or `.pth`, for the
            backbones, see `jaxcrf.compat.weights.load`.

    Raises:
        ValueError: if a stage or the validation names a split that is not in `data`, or a count is out of range.
    """

    name: str
    model: ModelConfig | Callable[[nnx.Rngs], nnx.Module]
    data: Mapping[str, Pipeline]
    stages: Sequence[Stage]
    validation: str | None = "val"
    label_names: tuple[str, ...] = ()
    seed: int = 0
    validate_every: int | None = None
    checkpoint_every: int | None = 1000
    keep: int = 2
    log_every: int = 20
    accumulate: int = 1
    compute_dtype: str | None = None
    average_decay: float | None = None
    initial: str | Path | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: got none; expected at least one Stage")
        for split in self.splits:
            if split not in self.data:
                raise ValueError(
                    f"data: has no split {split!r}, which is asked for; it has {', '.join(self.data)}"
                )
            if len(self.data[split].source) == 0:
                raise ValueError(
                    f"data: the split {split!r} is empty; check the folder that it was read from"
                )
        for name in ("validate_every", "checkpoint_every", "keep", "log_every", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}; expected at least 1")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that stages and validation use."""
        used = [*(stage.split for stage in self.stages), *([self.validation] if self.validation else [])]
        return tuple(dict.fromkeys(used))

    @property
    def num_steps(self) -> int:
        """The updates of all stages together."""
        return num_steps(self.stages)

    @property
    def ignore_label(self) -> int:
        """The label of void pixels in the data."""
        return next(iter(self.data.values())).ignore_label

    @property
    def step_options(self) -> dict[str, Any]:
        """The options of `make_step` that are the same for all updates."""
        return {
            "accumulate": self.accumulate,
            "compute_dtype": None if self.compute_dtype is None else jnp.dtype(self.compute_dtype),
            "average_decay": self.average_decay,
            "ignore_label": self.ignore_label,
        }

    def create(self) -> nnx.Module:
        """The model before training, made from `seed`."""
        make = self.model.create if isinstance(self.model, ModelConfig) else nnx.jit(self.model)
        model = make(nnx.Rngs(self.seed))
        return model if self.initial is None else _with_initial(model, self.initial)

    def description(self) -> dict[str, Any]:
        """What a checkpoint says about its run, as JSON can hold it."""
        return {
            "experiment": self.name,
            "model": self.model.to_json() if isinstance(self.model, ModelConfig) else None,
            "label_names": list(self.label_names),
            "ignore_label": self.ignore_label,
            "seed": self.seed,
            "stages": describe(self.stages),
            "data": {
                split: {
                    "examples": len(pipeline.source),
                    "batch_size": pipeline.batch_size,
                    "seed": pipeline.seed,
                    "shuffle": pipeline.shuffle,
                    "size": None if pipeline.size is None else list(pipeline.size),
                }
                for split, pipeline in self.data.items()
            },
            "accumulate": self.accumulate,
            "compute_dtype": self.compute_dtype,
            "average_decay": self.average_decay,
        }


@dataclasses.dataclass(frozen=True)
class Run:
    """What `train` returns.

    Attributes:
        model: the trained module in evaluation mode, with averaged parameters if any.
        state: the last state.
        rows: the log: one dictionary per line, with the step, the loss, figures of the validation and so on.
        figures: the last validation's; empty if there was none.
    """

    model: nnx.Module
    state: TrainState
    rows: list[dict[str, Any]]
    figures: dict[str, float]


def train(
    experiment: Experiment,
    folder: str | Path | None = None,
    *,
    num_devices: int | None = None,
    progress: bool = True,
) -> Run:
    """Runs an experiment to its end, or goes on where an earlier run of it in the same folder stopped.

    Going on is exact: parameters, optimisers, random streams and the order and augmentation of the data are what they
    would have been without the interruption. On Ctrl-C, or when the machine asks the process to end (SIGTERM), the
    step under way is finished and a checkpoint written first.

    All processes of a run call this alike, after `jax.distributed.initialize`; each reads its part of the data.
    The first one writes the log.

    Args:
        experiment: what to do.
        folder: for `checkpoints/`, the log `log.jsonl`, and the batch that made the loss NaN, should that happen;
            None keeps nothing.
        num_devices: over how many devices of all processes the batches are split; None for all.
        progress: whether to show a progress bar.

    Returns:
        The model, the state and the log.

    Raises:
        ValueError: if the folder holds another run, the batch size does not divide by the devices, or there are
            fewer of them.
        FloatingPointError: if a loss or gradient is not finite; the batch is in `folder` then.
        OSError: if a checkpoint cannot be written; the ones before are whole.
        KeyboardInterrupt, SystemExit: after a checkpoint, if the run was interrupted.

    Example:
        >>> import optax
        >>> from jaxcrf.data import Pipeline
        >>> from jaxcrf.training import Stage, Update, objectives
        >>> class Stripes:
        ...     label_names, ignore_label = ("left", "right"), 255
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         labels = np.tile(np.repeat([0, 1], 8), (16, 1)).astype(np.int32)
        ...         return np.repeat(200 * labels[..., None], 3, -1).astype(np.uint8), labels
        >>> pipeline = Pipeline(Stripes(), batch_size=2, size=(16, 16))
        >>> update = Update("all", objectives.segmentation(), optax.adam(0.01))
        >>> experiment = Experiment(
        ...     "stripes",
        ...     ModelConfig.of("small_fcn", 2, width=8),
        ...     data={"train": pipeline, "val": pipeline},
        ...     stages=[Stage("all", 30, (update,))],
        ... )
        >>> run = train(experiment, progress=False)
        >>> run.figures["pixel_accuracy"] > 0.9
        True
    """
    mesh = data_mesh(num_devices)
    check_batches(experiment, mesh)
    template = Template(experiment.create())
    first = jax.process_index() == 0
    folder = None if folder is None else Path(folder)
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if folder is not None:
            checkpoints = stack.enter_context(
                Checkpoints(
                    folder / "checkpoints", keep=experiment.keep, description=experiment.description()
                )
            )
        state = _begin(experiment, template, mesh, checkpoints)
        log = _Log(None if folder is None or not first else folder / "log.jsonl", int(state.step))
        interruption = stack.enter_context(_Interruption())
        bar = stack.enter_context(_Bar(experiment, int(state.step), progress and first))
        loop = _Loop(experiment, template, mesh, state, checkpoints, log, interruption, bar, folder)
        stack.callback(loop.close)
        loop.run()
    interruption.leave()
    if folder is not None and first:
        _draw_curves(log.rows, folder / "curves.png")
    model = template.build(_on_host(loop.state.evaluated), _on_host(loop.state.variables))
    return Run(model, loop.state, log.rows, loop.figures)


def evaluate_pipeline(
    predict: Callable[[Any], Any], pipeline: Pipeline, mesh: Mesh | None = None
) -> dict[str, float]:
    """Means over a data set, pixel by pixel as the benchmarks count: every example once, in one pass.

    Args:
        predict: a jitted function of a batch of images to logits.
        pipeline: the data.
        mesh: over which batches are split; None for one device.

    Returns:
        `mean_iou`, `pixel_accuracy` and `class_accuracy`.

    Example:
        >>> class Black:
        ...     label_names, ignore_label = ("black", "white"), 255
        ...     def __len__(self):
        ...         return 3
        ...     def __getitem__(self, index):
        ...         return np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.int32)
        >>> predict = lambda images: jnp.stack([255.0 - images[..., 0], 1.0 * images[..., 0]], -1)
        >>> evaluate_pipeline(predict, Pipeline(Black(), batch_size=2, size=(4, 6)))["mean_iou"]
        1.0
    """
    mesh = data_mesh(1) if mesh is None else mesh
    total: Any = 0
    count = jax.jit(
        lambda logits, labels: metrics.confusion_matrix(
            labels, logits.argmax(-1), logits.shape[-1], ignore_label=pipeline.ignore_label
        )
    )
    with pipeline.epoch() as batches:
        for batch in batches:
            whole = place_batch(batch, mesh)
            # Summed on the host in 64 bits: a data set has more pixels than 32 bits count.
            total = total + np.asarray(count(predict(whole["image"]), whole["labels"]), np.int64)
    figures = {
        "mean_iou": metrics.mean_iou,
        "pixel_accuracy": metrics.pixel_accuracy,
        "class_accuracy": metrics.class_accuracy,
    }
    return {name: float(figure(total)) for name, figure in figures.items()}


class _Loop:
    """The state of a run under way."""

    def __init__(
        self,
        experiment: Experiment,
        template: Template,
        mesh: Mesh,
        state: TrainState,
        checkpoints: Checkpoints | None,
        log: "_Log",
        interruption: "_Interruption",
        bar: "_Bar",
        folder: Path | None,
    ):
        self.state = state
        self.figures: dict[str, float] = {}
        self._experiment, self._template, self._mesh = experiment, template, mesh
        self._checkpoints, self._log, self._folder = checkpoints, log, folder
        self._interruption, self._bar = interruption, bar
        self._steps: dict[str, Callable] = {}
        self._predict: Callable | None = None
        self._batches: dict[str, Iterator[Batch]] = {}
        self._pending: collections.deque[tuple[int, Update, Any, Report]] = collections.deque()
        self._window = _Window()

    def close(self) -> None:
        """Ends the readers of the data."""
        for batches in self._batches.values():
            batches.close()  # type: ignore[attr-defined]

    def run(self) -> None:
        """Makes all steps that are left."""
        experiment = self._experiment
        done, total = int(self.state.step), experiment.num_steps
        while done < total:
            position = locate(experiment.stages, done)
            stage = experiment.stages[position.stage]
            update = stage.update(position.step)
            batch = place_batch(self._next(stage.split, position.batches[stage.split]), self._mesh)
            if update.name not in self._steps:
                self._settle()
                self._compile(update, batch)
                self._window.restart()
            report = self._step(update, batch)
            self._pending.append((done, update, batch, report))
            done += 1
            self._settle(_LAG)
            self._bar.advance(done, stage.name)
            ends_stage = position.step + 1 == stage.num_steps
            self._after(done, stage, ends_stage, done == total)
            if self._interruption.asked(done) and done < total:
                self._settle()
                self._save(done, None)
                return
        if self._checkpoints is not None:
            self._checkpoints.wait()
        if not self.figures and experiment.validation is not None and done == total:
            self.figures = self._validate()

    def _compile(self, update: Update, batch: Batch) -> None:
        step = make_step(self._template, update, mesh=self._mesh, **self._experiment.step_options)
        state = dataclasses.replace(self.state, optimizers={update.name: self.state.optimizers[update.name]})
        self._steps[update.name] = step.lower(state, batch).compile()  # type: ignore[attr-defined]

    def _step(self, update: Update, batch: Batch) -> Report:
        """One update; it sees its own optimiser only, so that it compiles once whatever others there are."""
        optimizers = self.state.optimizers
        state = dataclasses.replace(self.state, optimizers={update.name: optimizers[update.name]})
        state, report = self._steps[update.name](state, batch)
        self.state = dataclasses.replace(state, optimizers=optimizers | state.optimizers)
        return report

    def _next(self, split: str, position: int) -> Batch:
        if split not in self._batches:
            self._batches[split] = self._experiment.data[split].batches(position)
        return next(self._batches[split])

    def _settle(self, left: int = 0) -> None:
        """Reads the reports of all but the newest steps."""
        while len(self._pending) > left:
            step, update, batch, report = self._pending.popleft()
            if not bool(report.finite):
                self._stop(step, update, batch, report)
            self._window.add(report, batch["labels"].shape[0])

    def _after(self, done: int, stage: Stage, ends_stage: bool, ends: bool) -> None:
        """What is due between two steps."""
        experiment = self._experiment
        due = lambda every: every is not None and done % every == 0  # noqa: E731
        if due(experiment.log_every) or ends_stage:
            self._settle()
            row = {"step": done, "stage": stage.name, **self._window.row()}
            self._log.add(row)
            self._bar.show(row)
            self._window.restart()
        validates = experiment.validation is not None and (due(experiment.validate_every) or ends)
        saves = self._checkpoints is not None and (due(experiment.checkpoint_every) or ends)
        if not (validates or saves or ends_stage):
            return
        self._settle()
        figures = None
        if validates:
            figures = self.figures = self._validate()
            row = {"step": done, "stage": stage.name, **{f"validation_{k}": v for k, v in figures.items()}}
            self._log.add(row)
            self._bar.show(row)
        if ends_stage:
            following = updates_from(experiment.stages, locate(experiment.stages, done).stage)
            # Placed again: an optimiser that starts here does not lie on all devices yet.
            self.state = replicate(with_optimizers(self.state, following), self._mesh)
        if saves:
            self._save(done, figures)
        self._window.restart()

    def _validate(self) -> dict[str, float]:
        if self._predict is None:
            self._predict = make_predict(self._template, mesh=self._mesh)
        predict = self._predict
        params = self.state.evaluated
        variables, split = self.state.variables, self._experiment.validation
        assert split is not None
        return evaluate_pipeline(
            lambda images: predict(params, variables, images), self._experiment.data[split], self._mesh
        )

    def _save(self, done: int, figures: Mapping[str, float] | None) -> None:
        if self._checkpoints is not None and self._checkpoints.latest != done:
            self._checkpoints.save(done, self.state, figures)

    def _stop(self, step: int, update: Update, batch: Mapping[str, Any], report: Report) -> None:
        """Raises, with the offending batch on disk."""
        loss, norm = float(report.loss), float(report.gradient_norm)
        text = f"step {step}: the loss of update {update.name!r} is {loss}, its gradient's norm {norm}. "
        if self._folder is not None:
            path = self._folder / "failures" / f"step_{step}_process_{jax.process_index()}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            local = {
                name: np.concatenate([np.asarray(shard.data) for shard in array.addressable_shards])
                for name, array in batch.items()
            }
            with replacing(path) as file:
                about: dict[str, Any] = {
                    "step": step,
                    "update": update.name,
                    "loss": loss,
                    "gradient_norm": norm,
                }
                np.savez_compressed(file, **(local | about))
            text += f"The batch is in {path}. "
            if self._checkpoints is not None:
                self._checkpoints.wait()
                text += f"The newest checkpoint, of step {self._checkpoints.latest}, is sound. "
        raise FloatingPointError(
            text
            + "Parameters are as before that step. Look for labels out of range and broken images in the batch; "
            "lower the learning rate, or clip gradients with optax.clip_by_global_norm."
        )


class _Window:
    """Sums over the steps since the last line of the log."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._began, self._images = time.perf_counter(), 0
        self._confusion: np.ndarray | None = None
        self._sums: collections.defaultdict[str, list[float]] = collections.defaultdict(list)

    def add(self, report: Report, images: int) -> None:
        self._images += images
        self._sums["loss"].append(float(report.loss))
        self._sums["gradient_norm"].append(float(report.gradient_norm))
        for name, value in report.figures.items():
            self._sums[name].append(float(value))
        if report.confusion is not None:
            confusion = np.asarray(report.confusion, np.int64)
            self._confusion = confusion if self._confusion is None else self._confusion + confusion

    def row(self) -> dict[str, float]:
        row = {name: float(np.mean(values)) for name, values in self._sums.items()}
        if self._confusion is not None:
            row["mean_iou"] = float(metrics.mean_iou(self._confusion))
        row["images_per_second"] = self._images / max(time.perf_counter() - self._began, 1e-9)
        return row


class _Log:
    """Lines of JSON, in memory and on disk; those after the step that a run goes on from are dropped."""

    def __init__(self, path: Path | None, step: int):
        self._path, self.rows = path, []
        if path is None:
            return
        if path.is_file():
            self.rows = [row for row in read_log(path) if row["step"] <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Reads the log of a run; a last line that was cut off by the end of its process is left out.

    Args:
        path: `log.jsonl`.

    Returns:
        One dictionary per line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> _ = path.write_text('{"step": 20, "loss": 1.5}' + chr(10) + '{"step": 40, "lo')
        >>> read_log(path)
        [{'step': 20, 'loss': 1.5}]
    """
    rows = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number + 1 < len(lines):
                raise ValueError(
                    f"{path}: line {number + 1} is not JSON ({error}); the file is damaged"
                ) from error
    return rows


class _Interruption:
    """Notes Ctrl-C and requests to end, which the loop heeds between two steps."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Interruption":
        # Only the main thread may say what happens on a signal; JAX's own service agrees between processes.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt  # asked twice: at once, without a checkpoint
        self._signal = number

    def asked(self, step: int) -> bool:
        """Whether the run is to end after this step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self._signal = signal.SIGTERM
        return self._signal is not None

    def leave(self) -> None:
        """Raises what the signal would have raised."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            raise SystemExit(128 + self._signal)


class _Bar:
    """A progress bar with the newest figures."""

    _SHOWN = (("loss", "loss {:.3f}"), ("mean_iou", "mIoU {:.3f}"), ("images_per_second", "{:.1f} images/s"))

    def __init__(self, experiment: Experiment, done: int, shown: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._task = self._progress.add_task(
            experiment.name, total=experiment.num_steps, completed=done, figures=""
        )
        self._validation = ""

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, done: int, stage: str) -> None:
        self._progress.update(self._task, completed=done, description=stage)

    def show(self, row: Mapping[str, Any]) -> None:
        if "validation_mean_iou" in row:
            self._validation = f", validation mIoU {row['validation_mean_iou']:.3f}"
            return
        shown = [text.format(row[name]) for name, text in self._SHOWN if name in row]
        self._progress.update(self._task, figures=", ".join(shown) + self._validation)


def _begin(
    experiment: Experiment, template: Template, mesh: Mesh, checkpoints: Checkpoints | None
) -> TrainState:
    """The state to go on from."""
    state = init_state(template, average=experiment.average_decay is not None)
    # Every update's patterns are looked at now, so that a misspelt one does not end a run after hours.
    for update in {u.name: u for stage in experiment.stages for u in stage.updates}.values():
        with_optimizers(state, {update.name: update})
    done = None if checkpoints is None else checkpoints.latest
    if done is None or checkpoints is None:
        return replicate(with_optimizers(state, updates_from(experiment.stages, 0)), mesh)
    earlier, now = checkpoints.describe(done), json.loads(json.dumps(experiment.description()))
    changed = sorted(key for key in now if earlier.get(key) != now[key])
    if changed:
        lines = (f"{key}: {json.dumps(earlier.get(key))} then, {json.dumps(now[key])} now" for key in changed)
        raise ValueError(
            f"{checkpoints.folder}: holds another run. Take a new folder, or restore what has changed:\n  "
            + "\n  ".join(lines)
        )
    needed = updates_from(experiment.stages, locate(experiment.stages, done).stage)
    return checkpoints.restore(done, replicate(with_optimizers(state, needed), mesh))


def check_batches(experiment: Experiment, mesh: Mesh) -> None:
    """Raises unless every batch can be shared out over the devices."""
    for split in experiment.splits:
        size, parts = experiment.data[split].batch_size, mesh.size
        if size % parts:
            raise ValueError(
                f"batch_size: got {size} for the split {split!r}, which {parts} devices cannot share out evenly; "
                f"take a multiple of {parts}, or fewer devices"
            )


def place_batch(batch: Batch, mesh: Mesh) -> dict[str, Any]:
    """What a model is trained on of a batch, on the devices."""
    return put_batch({name: batch[name] for name in ("image", "labels")}, mesh)


def _with_initial(model: nnx.Module, path: str | Path) -> nnx.Module:
    """The model with the arrays of a saved one where path, shape and dtype agree, or with a file's weights."""
    from jaxcrf.training.checkpoints import load_model

    path = Path(path)
    if path.is_file() or path.suffix in _WEIGHTS:
        from jaxcrf.compat import weights

        try:
            weights.load(model, path)
        except ValueError as error:
            raise ValueError(f"initial: {error}") from error
        return model
    if not path.is_dir():
        raise ValueError(
            f"initial: {path} does not exist; expected the folder of a saved model or run, or a file of weights "
            f"({', '.join(_WEIGHTS)})"
        )
    source = load_model(path).model
    definition, state = nnx.split(model)
    ours, theirs = named_leaves(state), named_leaves(nnx.split(source)[1])
    shared = {
        name: theirs[name]
        for name, leaf in ours.items()
        if name in theirs and theirs[name].shape == leaf.shape and theirs[name].dtype == leaf.dtype
    }
    if not shared:
        raise ValueError(f"initial: {path} has no array of the same path, shape and dtype as the new model")
    return nnx.merge(definition, with_leaves(state, ours | shared))


def _on_host(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """One copy of replicated arrays, on this process's first device."""
    return {path: leaf.addressable_data(0) for path, leaf in leaves.items()}


def _draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    from jaxcrf import plots

    if any("loss" in row for row in rows):
        plots.save_figure(plots.training_curves(rows), path)
