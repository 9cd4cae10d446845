"""Writes API.md: every public name with the first line of its documentation. `python tests/api_page.py` renews it."""

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "API.md"

MODULES = (
    "jaxcrf",
    "jaxcrf.filters",
    "jaxcrf.nn",
    "jaxcrf.models",
    "jaxcrf.training",
    "jaxcrf.training.losses",
    "jaxcrf.training.objectives",
    "jaxcrf.training.protocols",
    "jaxcrf.training.schedules",
    "jaxcrf.training.recipes",
    "jaxcrf.data",
    "jaxcrf.metrics",
    "jaxcrf.evaluation",
    "jaxcrf.plots",
    "jaxcrf.presets",
    "jaxcrf.compatibility",
    "jaxcrf.compat",
    "jaxcrf.compat.weights",
)

HEAD = """# The public names

What each takes, computes and raises, with an example and the paper, is in its documentation: `help(jaxcrf.refine)`, or
the file behind the link. This page is made from these; `python tests/api_page.py` renews it.
"""


def page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for name in MODULES:
        module = importlib.import_module(name)
        lines = [f"- [`{entry}`]({where}) {summary}" for entry, where, summary in entries(module)]
        parts.append("\n".join([f"## {name}", "", first_line(module), "", *lines, ""]))
    return "\n".join(parts)


def entries(module: ModuleType) -> Iterator[tuple[str, str, str]]:
    """Public names of a module with the files that they come from and what they are."""
    package = module.__name__ if hasattr(module, "__path__") else None
    names = getattr(module, "__all__", None) or sorted(vars(module))
    for name in names:
        if name.startswith("_"):
            continue
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value) or hasattr(value, "__wrapped__"):
            home = value.__module__
            # Modules hold what they define, packages what they show of theirs.
            if home == module.__name__ or (package and home.startswith("jaxcrf.")):
                yield name, file_of(home), first_line(value)


def file_of(module: str) -> str:
    """The file of a module, from the root."""
    path = Path(inspect.getsourcefile(importlib.import_module(module)) or "").resolve()
    # An installed package lies elsewhere.
    parts = path.parts
    return "/".join(parts[len(parts) - 1 - parts[::-1].index("jaxcrf") :])


def first_line(documented: Any) -> str:
    """The summary of a docstring."""
    return (inspect.getdoc(documented) or "").strip().partition("\n")[0]


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit(f"usage: python {Path(__file__).name}")
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(page())
    os.replace(temporary, PAGE)
