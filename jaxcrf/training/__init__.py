"""Finding parameters from data: training by gradients, and search."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxcrf.training.search import SearchResult as SearchResult
from jaxcrf.training.search import Trial as Trial
from jaxcrf.training.search import search as search

if TYPE_CHECKING:
    from jaxcrf.training import losses as losses
    from jaxcrf.training import objectives as objectives
    from jaxcrf.training import protocols as protocols
    from jaxcrf.training import schedules as schedules
    from jaxcrf.training.checkpoints import Checkpoints as Checkpoints
    from jaxcrf.training.checkpoints import SavedModel as SavedModel
    from jaxcrf.training.checkpoints import load_model as load_model
    from jaxcrf.training.checkpoints import save_model as save_model
    from jaxcrf.training.loop import Experiment as Experiment
    from jaxcrf.training.loop import Run as Run
    from jaxcrf.training.loop import evaluate_pipeline as evaluate_pipeline
    from jaxcrf.training.loop import read_log as read_log
    from jaxcrf.training.loop import train as train
    from jaxcrf.training.protocols import Stage as Stage
    from jaxcrf.training.steps import Template as Template
    from jaxcrf.training.steps import TrainState as TrainState
    from jaxcrf.training.steps import data_mesh as data_mesh
    from jaxcrf.training.steps import init_state as init_state
    from jaxcrf.training.steps import make_predict as make_predict
    from jaxcrf.training.steps import make_step as make_step
    from jaxcrf.training.steps import put_batch as put_batch
    from jaxcrf.training.steps import replicate as replicate
    from jaxcrf.training.steps import with_optimizers as with_optimizers
    from jaxcrf.training.updates import Outcome as Outcome
    from jaxcrf.training.updates import Update as Update
    from jaxcrf.training.updates import scale_by_path as scale_by_path

# These load at first touch: a search needs neither Flax nor Optax nor Orbax, which the others do.
_SUBMODULES = ("losses", "objectives", "protocols", "schedules")
_HOMES = {
    "Checkpoints": "checkpoints",
    "Experiment": "loop",
    "Outcome": "updates",
    "Run": "loop",
    "SavedModel": "checkpoints",
    "Stage": "protocols",
    "Template": "steps",
    "TrainState": "steps",
    "Update": "updates",
    "data_mesh": "steps",
    "evaluate_pipeline": "loop",
    "init_state": "steps",
    "load_model": "checkpoints",
    "make_predict": "steps",
    "make_step": "steps",
    "put_batch": "steps",
    "read_log": "loop",
    "replicate": "steps",
    "save_model": "checkpoints",
    "scale_by_path": "updates",
    "train": "loop",
    "with_optimizers": "steps",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"jaxcrf.training.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxcrf.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'jaxcrf.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({"Trial", "SearchResult", "search", *_SUBMODULES, *_HOMES})
