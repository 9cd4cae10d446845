"""Other tools' interfaces, on jaxcrf's arithmetic: the only place where their conventions live."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxcrf.compat import convcrf as convcrf
from jaxcrf.compat import pydensecrf as pydensecrf

if TYPE_CHECKING:
    from jaxcrf.compat import state_dicts as state_dicts
    from jaxcrf.compat import weights as weights

# At first touch: the networks need Flax, which the others do without.
_SUBMODULES = ("state_dicts", "weights")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"jaxcrf.compat.{name}")
    raise AttributeError(f"module 'jaxcrf.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({"convcrf", "pydensecrf", *_SUBMODULES})
