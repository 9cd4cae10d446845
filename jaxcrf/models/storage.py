"""Models as folders to be kept and handed on: arrays by Orbax, a configuration, and a model card for people."""

import dataclasses
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcrf.data.images import replacing
from jaxcrf.models import parameters
from jaxcrf.models.registry import ModelConfig

DESCRIPTION = "model.json"
_CARD = "README.md"
_ARRAYS = "arrays"


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


def save(
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
        model: as a rule from `jaxcrf.models.create`; of any other, `load` must be told how to make it.
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
        >>> save(path, model, label_names=("sky", "road", "car"))
        >>> load(path).label_names
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
    import orbax.checkpoint as ocp

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / _ARRAYS, parameters.module_tree(model))
        with replacing(temporary / DESCRIPTION) as file:
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


def load(path: str | os.PathLike, *, create: Any = None) -> SavedModel:
    """Reads a model from a folder that `save` wrote.

    The checkpoints of a run are read by `jaxcrf.training.load_model`, which reads these folders too.

    Args:
        path: the folder.
        create: a function of an `nnx.Rngs` that makes the module, for models outside the registry; None makes
            what the file says.

    Returns:
        The model and what is known about it.

    Raises:
        ValueError: if there is no model, it is damaged, or `create` makes another one.

    Example:
        >>> import tempfile
        >>> from jaxcrf import models
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> save(path, models.create("small_fcn", 3, width=8, rngs=nnx.Rngs(0)))
        >>> load(path).model(jnp.zeros((1, 16, 24, 3))).shape
        (1, 16, 24, 3)
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; expected a saved model")
    if not is_saved_model(path):
        raise ValueError(
            f"{path}: holds no {DESCRIPTION}, as a saved model does; checkpoints of a training run are read by "
            "jaxcrf.training.load_model"
        )
    try:
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / DESCRIPTION}: is not JSON ({error}); the file is damaged") from error
    model = described_model(description, create, path)
    expected = parameters.module_tree(model)
    # Abstract arrays lie nowhere; these go to where new ones would.
    sharding = jnp.zeros(()).sharding
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), expected
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path / _ARRAYS).item_metadata
            parameters.check_same(expected, getattr(stored, "tree", stored), str(path))
            restored = checkpointer.restore(path / _ARRAYS, target)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({first_line(error)}); the files are damaged") from error
    return as_saved(model, restored, description)


def is_saved_model(path: Path) -> bool:
    """Whether a folder is one that `save` wrote.

    Example:
        >>> import tempfile
        >>> is_saved_model(Path(tempfile.mkdtemp()))
        False
    """
    return (path / DESCRIPTION).is_file()


def described_model(description: Mapping[str, Any], create: Any, path: Path) -> nnx.Module:
    """The model that a file describes, to be filled with arrays; abstract where it is one of the registry.

    Args:
        description: with the configuration as "model".
        create: as for `load`.
        path: the file, for messages.

    Raises:
        ValueError: if the model is not of the registry and `create` does not say how to make it.

    Example:
        >>> config = ModelConfig.of("small_fcn", 3, width=8)
        >>> described_model({"model": config.to_json()}, None, Path("model")).config == config
        True
    """
    if create is not None:
        return create(nnx.Rngs(0))
    if not description.get("model"):
        raise ValueError(
            f"{path}: its model is not one of jaxcrf.models; pass create=, the function of an nnx.Rngs that makes it"
        )
    return ModelConfig.from_json(description["model"]).create_abstract()


def as_saved(model: nnx.Module, tree: Mapping[str, Any], description: Mapping[str, Any]) -> SavedModel:
    """A model with arrays that were read, in evaluation mode.

    Args:
        model: as it was described; may be abstract.
        tree: of `parameters.module_tree`.
        description: of the file.

    Example:
        >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> as_saved(layer, parameters.module_tree(layer), {"ignore_label": 0}).ignore_label
        0
    """
    filled = parameters.filled_module(model, tree)
    filled.eval()
    names = tuple(description.get("label_names", ()))
    return SavedModel(filled, names, int(description.get("ignore_label", 255)), description)


def first_line(error: BaseException) -> str:
    r"""An error in one line, for messages that quote it.

    Example:
        >>> first_line(ValueError("first\nsecond")), first_line(KeyError())
        ('first', 'KeyError')
    """
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _remove(folder: Path) -> None:
    """Deletes a folder that threads of a failed write may still be putting files into."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _circumstances() -> dict[str, Any]:
    from jaxcrf.reporting import circumstances

    return {name: value for name, value in circumstances().items() if name != "commit"}


def _card(name: str, model: nnx.Module, description: Mapping[str, Any], notes: str) -> str:
    _, params, _ = parameters.split(model)
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
        'saved = jaxcrf.models.load("path/to/this/folder")',
        "logits = saved.model(images)  # [batch, height, width, 3] in 0 … 255 to [batch, height, width, labels]",
        "```",
        "",
    ]
    return "\n".join(lines)
