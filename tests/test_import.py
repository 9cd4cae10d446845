import ast
import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

import jaxcrf

HEAVY = {
    "flax",
    "optax",
    "orbax",
    "grain",
    "tensorflow",
    "tensorflow_datasets",
    "matplotlib",
    "PIL",
    "typer",
    "rich",
}
KERNEL_LANGUAGES = ("mosaic", "triton", "pallas")


def run(code):
    """What `code`, run in a process of its own, leaves in the variable `result`."""
    code = f"import json, sys\n{code}\nprint(json.dumps(result))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("statement", ["import jaxcrf", "from jaxcrf import filters, mean_field, refine"])
def test_importing_loads_nothing_heavy(statement):
    loaded = run(f"{statement}; result = sorted(sys.modules)")
    assert "jaxcrf" in loaded
    assert not HEAVY & {name.partition(".")[0] for name in loaded}


def test_importing_loads_no_kernel_language_that_jax_does_not():
    before, after = run(
        "import jax; before = sorted(sys.modules)\n"
        "from jaxcrf import filters, mean_field, refine; result = before, sorted(sys.modules)"
    )
    added = set(after) - set(before)
    assert "jaxcrf.refinement" in added
    assert not [name for name in added if any(language in name for language in KERNEL_LANGUAGES)]


def test_a_message_on_a_cpu_loads_no_kernel_language():
    loaded = run(
        "import jax; import jax.numpy as jnp; from jaxcrf_kernels import window_message\n"
        "q = jnp.ones((1, 4, 5, 2))\n"
        "f = lambda q: window_message(q, [q], jnp.ones(1), filter_size=3).sum()\n"
        "jax.block_until_ready(jax.jit(jax.value_and_grad(f))(q))\n"
        "result = sorted(sys.modules)"
    )
    assert not [name for name in loaded if "jax.experimental" in name and "pallas" in name]


def test_submodules_appear_at_first_touch():
    before, after = run(
        "import jaxcrf; before = 'jaxcrf.plots' in sys.modules; jaxcrf.plots; jaxcrf.metrics\n"
        "result = before, ['jaxcrf.plots' in sys.modules, 'jaxcrf.metrics' in sys.modules]"
    )
    assert not before
    assert after == [True, True]


@pytest.mark.parametrize("name", jaxcrf.__all__)
def test_every_public_name_resolves(name):
    value = getattr(jaxcrf, name)
    if name == "__version__":
        assert value == version("jaxcrf")
    else:
        assert value is getattr(jaxcrf, name)
        assert value.__doc__


def test_dir_lists_the_public_names():
    assert dir(jaxcrf) == sorted(jaxcrf.__all__)
    assert len(set(jaxcrf.__all__)) == len(jaxcrf.__all__)


def test_type_checkers_see_the_names_that_resolve():
    """The imports under `TYPE_CHECKING` and the tables that do the work name the same things."""
    tree = ast.parse(inspect.getsource(jaxcrf))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {alias.asname: f"{node.module}.{alias.name}" for alias in node.names}
    submodules = {name: f"jaxcrf.{name}" for name in jaxcrf._SUBMODULES}
    assert seen == submodules | {name: f"jaxcrf.{home}.{name}" for name, home in jaxcrf._HOMES.items()}


def test_unknown_names_are_attribute_errors():
    assert not hasattr(jaxcrf, "nonsense")
    with pytest.raises(AttributeError, match="module 'jaxcrf' has no attribute 'nonsense'"):
        jaxcrf.nonsense  # noqa: B018
    with pytest.raises(ImportError):
        from jaxcrf import nonsense  # noqa: F401
