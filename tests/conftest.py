"""Shared by all tests: cases of the suites, and folders that are given from outside."""

import os
from pathlib import Path

import jax
import pytest


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames and hasattr(metafunc.cls, "CASES"):
        metafunc.parametrize("case", list(metafunc.cls.CASES))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Thousands of compiled programs are gigabytes, and modules share next to none."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="class")
def compiled_quickly():
    """For suites of identities, which hold whatever a compiler makes of the arithmetic.

    Unoptimised programs compile in half the time, which is most of the time that a suite takes. What is compared
    with independent numbers runs as users run it.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _folder(variable: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set")
    return Path(path)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of other tools, one `.npz` per configuration."""
    return _folder("JAXCRF_GOLDEN_DIR")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data sets, one folder each."""
    return _folder("JAXCRF_DATA_DIR")
