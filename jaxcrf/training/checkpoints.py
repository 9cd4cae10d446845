"""Checkpoints of a run, with Orbax.

A checkpoint appears under its own name only when it is whole, so that a run that is killed at any moment
leaves nothing behind that could be taken for one. It holds the whole `TrainState`; the position in the data
is the number of the step.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax import Array

from jaxcrf.models import parameters, storage
from jaxcrf.models.storage import SavedModel, first_line
from jaxcrf.training.steps import TrainState

_CHECKPOINTS = "checkpoints"

save_model = storage.save


class Checkpoints:
    """The checkpoints of one run: written in the background, the newest few and the best one kept.

    Args:
        folder: where they lie; made if need be.
        keep: how many of the newest are kept. The best one by `metric` is kept besides.
        metric: the figure by which one is the best; larger is better.
        description: what every checkpoint says about its run, for JSON.

    Raises:
        OSError: if the folder cannot be made.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> from jaxcrf.training.steps import Template, init_state
        >>> state = init_state(Template(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
        >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
        ...     checkpoints.save(7, state)
        ...     checkpoints.wait()
        ...     checkpoints.latest, checkpoints.restore(7, state).params["bias"].shape
        (7, (3,))
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 2,
        metric: str = "mean_iou",
        description: Mapping[str, Any] | None = None,
    ):
        if keep < 1:
            raise ValueError(f"keep: got {keep}; expected at least 1")
        self.folder = Path(folder).absolute()
        self._description = dict(description or {})
        policies = ocp.checkpoint_managers.preservation_policy
        best = policies.BestN(
            get_metric_fn=lambda figures: figures[metric], n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            # Named, so that what lies on disk can be looked into before anything is saved or restored.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "description": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                cleanup_tmp_directories=True,
                step_prefix="step",
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # An error on the way out must not hide the one that is under way.
        with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
            self.wait()
        with contextlib.suppress(Exception):
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of all checkpoints that are kept."""
        return tuple(self._manager.all_steps())

    def save(self, step: int, state: TrainState, figures: Mapping[str, float] | None = None) -> None:
        """Begins to write a checkpoint; the arrays are copied before this returns.

        Args:
            step: its number.
            state: what is to be kept.
            figures: of the validation, if there was one.

        Raises:
            OSError: if this checkpoint or the one before cannot be written, as on a full disk.
        """
        with self._explained(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_to_tree(state)),
                    description=ocp.args.JsonSave(self._description),
                ),
                metrics=None if figures is None else dict(figures),
                force=True,
            )

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            OSError: if it cannot be written, as on a full disk.
        """
        with self._explained(None):
            self._manager.wait_until_finished()

    def describe(self, step: int) -> dict[str, Any]:
        """What a checkpoint says about its run."""
        with self._readable(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(description=ocp.args.JsonRestore())
            )
        return restored["description"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a checkpoint, on whatever devices `like` lies.

        Args:
            step: its number.
            like: a state of the same structure, whose shapes, dtypes and shardings are taken over.

        Returns:
            The state, bit for bit as it was saved.

        Raises:
            ValueError: if the checkpoint is of another model or optimiser, with what differs, or damaged.
        """
        expected = _to_tree(like)
        with self._readable(step):
            stored = self._manager.item_metadata(step)["state"].tree
        parameters.check_same(expected, stored, f"{self.folder}: the checkpoint of step {step}")
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), expected
        )
        with self._readable(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )
        return _from_tree(restored["state"], like)

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Any:
        try:
            yield
        except Exception as error:
            kept = ", ".join(map(str, self.steps)) or "none"
            which = "a checkpoint" if step is None else f"a checkpoint, at step {step} or before,"
            raise OSError(
                f"{self.folder}: {which} could not be written ({first_line(error)}); those of the steps "
                f"{kept} are whole. Make room, then start the same run again: it goes on from the newest of them."
            ) from error

    @contextlib.contextmanager
    def _readable(self, step: int) -> Any:
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"{self.folder}: the checkpoint of step {step} cannot be read ({first_line(error)}); it has been "
                "damaged since it was written. Delete its folder to go on from an earlier one (there are "
                f"{', '.join(map(str, self.steps)) or 'none'})."
            ) from error


def load_model(
    path: str | os.PathLike, *, create: Any = None, step: int | None = None, averaged: bool = True
) -> SavedModel:
    """Reads a model: from a folder that `models.save` wrote, or from the checkpoints of a run.

    Args:
        path: the folder of the model or of the run.
        create: a function of an `nnx.Rngs` that makes the module, for models outside the registry; None makes
            what the file says.
        step: which checkpoint of a run; None for the newest.
        averaged: whether the moving average of the parameters is taken, where a run kept one.

    Returns:
        The model and what is known about it.

    Raises:
        ValueError: if there is no model, it is damaged, or `create` makes another one.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxcrf import models
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> models.save(path, models.create("small_fcn", 3, width=8, rngs=nnx.Rngs(0)))
        >>> load_model(path).model(jnp.zeros((1, 16, 24, 3))).shape
        (1, 16, 24, 3)
    """
    path = Path(path).absolute()
    if storage.is_saved_model(path):
        return storage.load(path, create=create)
    folder = path / _CHECKPOINTS if (path / _CHECKPOINTS).is_dir() else path
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder; expected a saved model or the folder of a training run")
    if not any(folder.glob("step_*")):
        raise ValueError(
            f"{path}: holds neither {storage.DESCRIPTION}, as a saved model does, nor checkpoints, as a training run "
            "does"
        )
    with Checkpoints(folder, keep=1_000_000) as checkpoints:
        chosen = checkpoints.latest if step is None else step
        if chosen not in checkpoints.steps:
            raise ValueError(f"step: got {step}; {folder} has {', '.join(map(str, checkpoints.steps))}")
        description = checkpoints.describe(chosen)
        model = storage.described_model(description, create, path)
        with checkpoints._readable(chosen):
            stored = checkpoints._manager.item_metadata(chosen)["state"].tree
        expected = parameters.module_tree(model)
        names = {
            "params": "average" if averaged and "average" in stored else "params",
            "variables": "variables",
        }
        parameters.check_same(
            {names[part]: leaves for part, leaves in expected.items()},
            {name: stored.get(name, {}) for part, name in names.items() if part in expected},
            f"{folder}: the checkpoint of step {chosen}",
        )
        with checkpoints._readable(chosen):
            everything = checkpoints._manager.restore(
                chosen,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(
                        jax.tree.map(
                            lambda leaf: jax.ShapeDtypeStruct(
                                leaf.shape,
                                leaf.dtype,
                                sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),
                            ),
                            stored,
                            is_leaf=lambda leaf: hasattr(leaf, "shape"),
                        )
                    )
                ),
            )["state"]
    return storage.as_saved(
        model, {part: everything[name] for part, name in names.items() if part in expected}, description
    )


def _to_tree(state: TrainState) -> dict[str, Any]:
    """The state as nested dictionaries of plain arrays, by names that do not depend on Python's classes."""
    parts: dict[str, Any] = {
        "params": parameters.to_data(state.params),
        "variables": parameters.to_data(state.variables),
        "average": state.average or {},
        "optimizers": _optimizer_leaves(state.optimizers),
    }
    nested = {name: parameters.nest(leaves) for name, leaves in parts.items() if leaves}
    return nested | {"step": state.step, "failed": state.failed}


def _from_tree(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    flat = {
        name: parameters.flatten(tree.get(name, {}))
        for name in ("params", "variables", "average", "optimizers")
    }
    names = iter(_optimizer_leaves(like.optimizers))
    return TrainState(
        step=tree["step"],
        params=parameters.from_data(like.params, flat["params"]),
        variables=parameters.from_data(like.variables, flat["variables"]),
        optimizers=jax.tree.map(lambda _: flat["optimizers"][next(names)], like.optimizers),
        average=None if like.average is None else {path: flat["average"][path] for path in like.average},
        failed=tree["failed"],
    )


def _optimizer_leaves(optimizers: Mapping[str, Any]) -> dict[str, Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(optimizers)
    }
