"""What a file of results must say besides its numbers, and how it is written."""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jaxcrf.data.images import replacing


def circumstances(source: str | Path | None = None) -> dict[str, Any]:
    """The versions, the device and the commit that a result was obtained with.

    Args:
        source: a file of the checkout whose commit is meant; None leaves the commit out.

    Returns:
        A dictionary that JSON can hold.

    Example:
        >>> sorted(circumstances())
        ['commit', 'device', 'versions']
    """
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in ("jax", "jaxlib", "numpy", "jaxcrf")},
        },
        "device": {"platform": device.platform, "kind": device.device_kind, "cores": os.cpu_count()},
        "commit": None if source is None else _commit(Path(source)),
    }


def write_json(path: str | Path, results: Mapping[str, Any]) -> None:
    """Writes results as JSON, whole or not at all.

    Args:
        path: the file; its folder is made.
        results: what JSON can hold.

    Raises:
        OSError: if the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "results.json"), {"accuracy": 0.5})
        ...     print(Path(folder, "results.json").read_text().strip())
        {
          "accuracy": 0.5
        }
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def _commit(source: Path) -> str | None:
    folder = source.resolve().parent if source.is_file() else source
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    return None
