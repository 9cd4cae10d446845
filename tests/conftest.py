"""Shared by all tests: cases of the suites, and folders that are given from outside."""

import os
from pathlib import Path

import jax
import pytest
from jax._src import compiler

import quickly

# Whether the environment asks for it everywhere.
ALWAYS_QUICKLY = bool(jax.config.values["jax_disable_most_optimizations"])
OPTIMIZED_MODULES = pytest.StashKey[set]()


def pytest_collection_modifyitems(config, items):
    config.stash[OPTIMIZED_MODULES] = {
        item.module for item in items if item.get_closest_marker("optimized") is not None
    }


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames and hasattr(metafunc.cls, "CASES"):
        further = getattr(metafunc.cls, "FURTHER_CASES", ())
        metafunc.parametrize(
            "case",
            [
                pytest.param(c, marks=pytest.mark.exhaustive if c in further else [])
                for c in metafunc.cls.CASES
            ],
        )


@pytest.fixture(autouse=True, scope="session")
def quick_options():
    """Those of `quickly` for all programs without optimisations.

    JAX has no setting for options of all programs, and XLA_FLAGS would be those of optimised ones too.
    """
    known, of_jax = quickly.options(), compiler.get_compile_options

    def get_compile_options(*args, env_options_overrides=None, **kwargs):
        options = known if jax.config.values["jax_disable_most_optimizations"] else {}
        return of_jax(*args, env_options_overrides=options | (env_options_overrides or {}), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_compile_options)
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Thousands of compiled programs are gigabytes, and modules share next to none."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def fixtures_compiled_quickly(request):
    """Fixtures of a module are made before `compiled_quickly` has a say.

    Where a test of the module is marked `optimized`, they are optimised too: it may compare bits with theirs.
    """
    optimized = request.module in request.config.stash[OPTIMIZED_MODULES]
    jax.config.update("jax_disable_most_optimizations", ALWAYS_QUICKLY or not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", ALWAYS_QUICKLY)


@pytest.fixture(autouse=True)
def compiled_quickly(request):
    """Nearly all of a test's time is compilation, and unoptimised programs compile in half the time.

    Marked `optimized` is what compares with other tools, what bounds errors by rounding, what takes long to run and
    what looks at compiled programs: these run as users run them.
    """
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", ALWAYS_QUICKLY or not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", ALWAYS_QUICKLY)


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
