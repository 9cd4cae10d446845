"""Checkpoints of a run, and models as folders to be handed on; both with Orbax.

A checkpoint appears under its own name only when it is whole, so that a run that is killed at any moment
leaves nothing behind that could be taken for one. It holds the whole `TrainState`; the position in the data
is the number of the step.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array

from jaxcrf.data.images import replacing
from jaxcrf.training.steps import TrainState
from jaxcrf.training.updates import is_key, named_leaves, split, with_leaves

_DESCRIPTION = "model.json"
_CARD = "README.md"
_ARRAYS = "arrays"
_CHECKPOINTS = "checkpoints"


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
        >>> import numpy as np, optax
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
        _check_same(expected, stored, f"{self.folder}: the checkpoint of step {step}")
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
                f"{self.folder}: {which} could not be written ({_first_line(error)}); those of the steps "
                f"{kept} are whole. Make room, then start the same run again: it goes on from the newest of them."
            ) from error

    @contextlib.contextmanager
    def _readable(self, step: int) -> Any:
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"{self.folder}: the checkpoint of step {step} cannot be read ({_first_line(error)}); it has been "
                "damaged since it was written. Delete its folder to go on from an earlier one (there are "
                f"{', '.join(map(str, self.steps)) or 'none'})."
            ) from error


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model read from disk, and what is known about it.

    Attributes:
        model: the module, in evaluation mode.
        label_names: what the labels stand for; empty if unknown.
        ignore_label: the label of void pixels in its training data.
        description: all that its file says, figures and circumstances included.
    """

    model: nnx.Module
    label_names: tuple[str, ...]
    ignore_label: int
    description: Mapping[str, Any]


def save_model(
    path: str | os.PathLike,
    model: nnx.Module,
    *,
    label_names: tuple[str, ...] = (),
    ignore_label: int = 255,
    figures: Mapping[str, float] | None = None,
    notes: str = "",
    overwrite: bool = False,
) -> None:
    """Writes a model as a folder: its arrays, its configuration and a model card for people.

    Args:
        path: the folder to be made.
        model: as a rule from `jaxcrf.models.create`; of any other, `load_model` must be told how to make it.
        label_names: what the labels stand for.
        ignore_label: the label of void pixels.
        figures: what was measured, as `{"mean_iou": 0.51}`.
        notes: for the model card: training data, intended use, limits.
        overwrite: whether an existing model may be replaced.

    Raises:
        ValueError: if the folder exists already.
        OSError: if it cannot be written; then nothing is there under its name.

    Example:
        >>> import tempfile
        >>> from jaxcrf import models
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> model = models.create("small_fcn", 3, width=8, rngs=nnx.Rngs(0))
        >>> save_model(path, model, label_names=("sky", "road", "car"))
        >>> load_model(path).label_names
        ('sky', 'road', 'car')
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; pass overwrite=True, or choose another name")
    config = getattr(model, "config", None)
    description = {
        "model": None if config is None else config.to_json(),
        "label_names": list(label_names),
        "ignore_label": ignore_label,
        "figures": dict(figures or {}),
        **_circumstances(),
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / _ARRAYS, _model_tree(model))
        with replacing(temporary / _DESCRIPTION) as file:
            file.write((json.dumps(description, indent=2) + "\n").encode())
        with replacing(temporary / _CARD) as file:
            file.write(_card(path.name, model, description, notes).encode())
        if path.exists():
            # A folder cannot be replaced in one go; its predecessor waits beside it until the new one is in place.
            old = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        _remove(temporary)


def load_model(
    path: str | os.PathLike, *, create: Any = None, step: int | None = None, averaged: bool = True
) -> SavedModel:
    """Reads a model: from a folder that `save_model` wrote, or from the checkpoints of a run.

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
        >>> from jaxcrf import models
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> save_model(path, models.create("small_fcn", 3, width=8, rngs=nnx.Rngs(0)))
        >>> load_model(path).model(jnp.zeros((1, 16, 24, 3))).shape
        (1, 16, 24, 3)
    """
    path = Path(path).absolute()
    if (path / _DESCRIPTION).is_file():
        try:
            description = json.loads((path / _DESCRIPTION).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path / _DESCRIPTION}: is not JSON ({error}); the file is damaged") from error
        model = _create(description, create, path)
        expected = _model_tree(model)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                stored = checkpointer.metadata(path / _ARRAYS).item_metadata
                _check_same(expected, getattr(stored, "tree", stored), str(path))
                restored = checkpointer.restore(
                    path / _ARRAYS, jax.tree.map(ocp.utils.to_shape_dtype_struct, expected)
                )
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path}: cannot be read ({_first_line(error)}); the files are damaged"
            ) from error
        return _saved(model, restored, description)
    folder = path / _CHECKPOINTS if (path / _CHECKPOINTS).is_dir() else path
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder; expected a saved model or the folder of a training run")
    if not any(folder.glob("step_*")):
        raise ValueError(
            f"{path}: holds neither {_DESCRIPTION}, as a saved model does, nor checkpoints, as a training run does"
        )
    with Checkpoints(folder, keep=1_000_000) as checkpoints:
        chosen = checkpoints.latest if step is None else step
        if chosen not in checkpoints.steps:
            raise ValueError(f"step: got {step}; {folder} has {', '.join(map(str, checkpoints.steps))}")
        description = checkpoints.describe(chosen)
        model = _create(description, create, path)
        with checkpoints._readable(chosen):
            stored = checkpoints._manager.item_metadata(chosen)["state"].tree
        expected = _model_tree(model)
        names = {
            "params": "average" if averaged and "average" in stored else "params",
            "variables": "variables",
        }
        _check_same(
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
    return _saved(
        model, {part: everything[name] for part, name in names.items() if part in expected}, description
    )


def _remove(folder: Path) -> None:
    """Deletes a folder that threads of a failed write may still be putting files into."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _create(description: Mapping[str, Any], create: Any, path: Path) -> nnx.Module:
    if create is not None:
        return create(nnx.Rngs(0))
    if not description.get("model"):
        raise ValueError(
            f"{path}: its model is not one of jaxcrf.models; pass create=, the function of an nnx.Rngs that makes it"
        )
    from jaxcrf import models

    return models.ModelConfig.from_json(description["model"]).create(nnx.Rngs(0))


def _saved(model: nnx.Module, tree: Mapping[str, Any], description: Mapping[str, Any]) -> SavedModel:
    flat = {name: _flatten(part) for name, part in tree.items()}
    definition, params, variables = split(model)
    merged = nnx.merge(
        definition,
        _filled(params, flat.get("params", {})),
        _filled(variables, flat.get("variables", {})),
    )
    merged.eval()
    names = tuple(description.get("label_names", ()))
    return SavedModel(merged, names, int(description.get("ignore_label", 255)), description)


def _filled(state: Any, data: Mapping[str, Array]) -> Any:
    return with_leaves(state, _from_data(named_leaves(state), data))


def _model_tree(model: nnx.Module) -> dict[str, Any]:
    _, params, variables = split(model)
    parts = {"params": _to_data(named_leaves(params)), "variables": _to_data(named_leaves(variables))}
    return {name: _nest(leaves) for name, leaves in parts.items() if leaves}


def _to_tree(state: TrainState) -> dict[str, Any]:
    """The state as nested dictionaries of plain arrays, by names that do not depend on Python's classes."""
    parts: dict[str, Any] = {
        "params": _to_data(state.params),
        "variables": _to_data(state.variables),
        "average": state.average or {},
        "optimizers": _optimizer_leaves(state.optimizers),
    }
    nested = {name: _nest(leaves) for name, leaves in parts.items() if leaves}
    return nested | {"step": state.step, "failed": state.failed}


def _from_tree(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    flat = {name: _flatten(tree.get(name, {})) for name in ("params", "variables", "average", "optimizers")}
    names = iter(_optimizer_leaves(like.optimizers))
    return TrainState(
        step=tree["step"],
        params=_from_data(like.params, flat["params"]),
        variables=_from_data(like.variables, flat["variables"]),
        optimizers=jax.tree.map(lambda _: flat["optimizers"][next(names)], like.optimizers),
        average=None if like.average is None else {path: flat["average"][path] for path in like.average},
        failed=tree["failed"],
    )


def _optimizer_leaves(optimizers: Mapping[str, Any]) -> dict[str, Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(optimizers)
    }


def _to_data(leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Random keys as the integers they consist of."""
    return {path: jax.random.key_data(leaf) if is_key(leaf) else leaf for path, leaf in leaves.items()}


def _from_data(like: Mapping[str, Array], data: Mapping[str, Array]) -> dict[str, Array]:
    return {
        path: jax.random.wrap_key_data(data[path], impl=jax.random.key_impl(leaf))
        if is_key(leaf)
        else data[path]
        for path, leaf in like.items()
    }


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flatten(value, f"{prefix}{name}/")
        else:
            leaves[prefix + name] = value
    return leaves


def _check_same(expected: Mapping[str, Any], stored: Mapping[str, Any], what: str) -> None:
    """Raises with a readable difference unless both trees hold arrays of the same names, shapes and dtypes."""
    wanted = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in _flatten(expected).items()}
    found = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in _flatten(stored).items()}
    lines = [
        *(f"{path}: is missing, expected {_spell(wanted[path])}" for path in wanted if path not in found),
        *(f"{path}: {_spell(found[path])} is one too many" for path in found if path not in wanted),
        *(
            f"{path}: holds {_spell(found[path])}, expected {_spell(wanted[path])}"
            for path in wanted
            if path in found and found[path] != wanted[path]
        ),
    ]
    if lines:
        shown = lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])
        raise ValueError(
            f"{what} is of another model or optimiser; {len(lines)} arrays differ:\n  " + "\n  ".join(shown)
        )


def _spell(entry: tuple[tuple[int, ...], str]) -> str:
    return f"{entry[1]}[{', '.join(map(str, entry[0]))}]"


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _circumstances() -> dict[str, Any]:
    from jaxcrf.reporting import circumstances

    return {name: value for name, value in circumstances().items() if name != "commit"}


def _card(name: str, model: nnx.Module, description: Mapping[str, Any], notes: str) -> str:
    _, params, _ = split(model)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    config = description["model"]
    labels = description["label_names"]
    lines = [
        f"# {name}",
        "",
        notes.strip() or "A model for dense labelling, trained with jaxcrf.",
        "",
        "| | |",
        "|---|---|",
        f"| architecture | {type(model).__name__ if config is None else config['name']} |",
        *(f"| {key} | {value} |" for key, value in ({} if config is None else config["options"]).items()),
        f"| parameters | {count:,} |",
        *(f"| {key} | {value:.4f} |" for key, value in description["figures"].items()),
        *(f"| {package} | {version} |" for package, version in description["versions"].items() if version),
        "",
    ]
    if labels:
        lines += ["Labels: " + ", ".join(f"{i} {label}" for i, label in enumerate(labels)) + ".", ""]
    lines += [
        "```python",
        "import jaxcrf",
        "",
        'saved = jaxcrf.training.load_model("path/to/this/folder")',
        "logits = saved.model(images)  # [batch, height, width, 3] in 0 … 255 to [batch, height, width, labels]",
        "```",
        "",
    ]
    return "\n".join(lines)
