import dataclasses
import functools
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import training_suite
from jaxcrf.training import (
    Checkpoints,
    Run,
    Template,
    Update,
    init_state,
    load_model,
    make_step,
    with_optimizers,
)
from processes import run_program
from training_suite import Network, assert_same, cross_entropy, draw_batch, leaves_of

UPDATE = Update("all", cross_entropy, optax.adam(0.1))


def flat(state):
    return leaves_of(Run(None, state, [], {}))


@functools.cache
def made_states():
    """The state after each of three steps."""
    template = Template(Network(nnx.Rngs(0)))
    state = with_optimizers(init_state(template, average=True), {"all": UPDATE})
    step = make_step(template, UPDATE, average_decay=0.9)
    states = []
    for seed in range(3):
        state, _ = step(state, draw_batch(seed=seed))
        states.append(jax.tree.map(lambda leaf: leaf.copy(), state))
    return states


# Of a test, so that they are compiled as tests are: fixtures of modules come before that is settled.
@pytest.fixture
def states():
    return made_states()


def fresh():
    template = Template(Network(nnx.Rngs(1)))
    return with_optimizers(init_state(template, average=True), {"all": UPDATE})


def test_everything_comes_back_bit_for_bit(tmp_path, states):
    with Checkpoints(tmp_path, description={"experiment": "test", "seed": 3}) as checkpoints:
        checkpoints.save(3, states[-1])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
        assert checkpoints.describe(3) == {"experiment": "test", "seed": 3}
        restored = checkpoints.restore(3, fresh())
    assert_same(flat(restored), flat(states[-1]))
    # Random keys are keys again, which the model can draw from.
    key = restored.variables["dropout/rngs/key"]
    assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)


def test_the_newest_few_and_the_best_are_kept(tmp_path, states):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, figure in enumerate((0.3, 0.6, 0.5, 0.4, None), start=1):
            checkpoints.save(step, states[0], None if figure is None else {"mean_iou": figure})
        checkpoints.wait()
        assert set(checkpoints.steps) == {2, 4, 5}


def test_another_model_is_refused_with_what_differs(tmp_path, states):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, states[0])
        checkpoints.wait()
        other = with_optimizers(
            init_state(Template(nnx.Conv(3, 6, (3, 3), rngs=nnx.Rngs(0)))), {"all": UPDATE}
        )
        with pytest.raises(ValueError, match=r"step 1 is of another model") as error:
            checkpoints.restore(1, other)
        assert "params/kernel: is missing, expected float32[3, 3, 3, 6]" in str(error.value)
        shaped = fresh()
        params = shaped.params | {"head/bias": np.zeros(4, np.float32)}
        with pytest.raises(ValueError, match=r"params/head/bias: holds float32\[3\], expected float32\[4\]"):
            checkpoints.restore(1, dataclasses.replace(shaped, params=params))


# In processes of their own, since what Orbax leaves open when it fails is noticed at any time afterwards.
DAMAGED = """
import shutil, sys
from pathlib import Path
from flax import nnx
from training_suite import Network, assert_same, leaves_of
from jaxcrf.training import Checkpoints, Run, Template, init_state

folder = Path(sys.argv[1])
state, fresh = (init_state(Template(Network(nnx.Rngs(seed)))) for seed in range(2))
with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state)
    checkpoints.save(2, state)
# What a process that was killed leaves behind does not count.
shutil.copytree(folder / "step_2", folder / "step_3.orbax-checkpoint-tmp-17")
for path in (folder / "step_2" / "state").rglob("d/*"):
    path.write_bytes(b"")
with Checkpoints(folder) as checkpoints:
    print("latest:", checkpoints.latest)
    try:
        checkpoints.restore(2, fresh)
    except ValueError as error:
        print("refused:", error)
    restored = checkpoints.restore(1, fresh)
    assert_same(leaves_of(Run(None, restored, [], {})), leaves_of(Run(None, state, [], {})))
    print("the one before is sound", flush=True)
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from flax import nnx
from training_suite import Network, leaves_of
from jaxcrf.training import Checkpoints, Run, Template, init_state, save_model

folder = Path(sys.argv[1])
model = Network(nnx.Rngs(0))
state = init_state(Template(model))
np.savez(folder / "expected.npz", **leaves_of(Run(None, state, [], {})))
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
with Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(1, state)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        checkpoints.save(2, state)
        checkpoints.wait()
    except OSError as error:
        print("refused:", error)
    try:
        save_model(folder / "model", model)
    except Exception as error:
        print("no model:", type(error).__name__, flush=True)
"""


def run(program, folder):
    suite = str(Path(training_suite.__file__).parent)
    # Without bytecode: under a limit on the size of files, Python would leave cut-off files beside the sources.
    options = {"PYTHONPATH": suite, "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"}
    outcome = run_program(program, folder, str(folder), **options)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return outcome.stdout


@pytest.mark.slow
def test_damaged_and_unfinished_checkpoints(tmp_path):
    said = run(DAMAGED, tmp_path / "checkpoints")
    assert "latest: 2" in said
    assert re.search(r"refused: .*step 2 cannot be read.*Delete its folder", said)
    assert "the one before is sound" in said


def test_a_full_disk_leaves_the_earlier_checkpoint_and_half_of_nothing(tmp_path):
    said = run(FULL_DISK, tmp_path)
    assert re.search(r"refused: .*could not be written .*those of the steps 1 are whole", said)
    assert "no model: " in said
    left = {entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".cache")}
    assert left == {"checkpoints", "expected.npz"}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps == (1,)
        found = checkpoints.restore(1, init_state(Template(Network(nnx.Rngs(1)))))
    # As that process had them: compiled with other options, the same seed gives other last bits.
    with np.load(tmp_path / "expected.npz") as expected:
        assert_same(flat(found), dict(expected))


def test_what_is_neither_a_model_nor_a_run(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_model(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"neither model\.json"):
        load_model(tmp_path)
