import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import training_suite
from jaxcrf import models
from jaxcrf.training import (
    Checkpoints,
    Run,
    Template,
    Update,
    init_state,
    load_model,
    make_step,
    save_model,
    with_optimizers,
)
from training_suite import Network, assert_same, cross_entropy, draw_batch, leaves_of

UPDATE = Update("all", cross_entropy, optax.adam(0.1))


def flat(state):
    return leaves_of(Run(None, state, [], {}))


@pytest.fixture(scope="module")
def states():
    """The state after each of three steps."""
    template = Template(Network(nnx.Rngs(0)))
    state = with_optimizers(init_state(template, average=True), {"all": UPDATE})
    step = make_step(template, UPDATE, average_decay=0.9)
    states = []
    for seed in range(3):
        state, _ = step(state, draw_batch(seed=seed))
        states.append(jax.tree.map(lambda leaf: leaf.copy(), state))
    return states


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


def test_damaged_and_unfinished_checkpoints(tmp_path, states):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, states[0])
        checkpoints.save(2, states[1])
    # What a process that was killed leaves behind does not count.
    shutil.copytree(tmp_path / "step_2", tmp_path / "step_3.orbax-checkpoint-tmp-17")
    (folder,) = (tmp_path / "step_2" / "state").glob("ocdbt.process_*")
    for path in [*folder.glob("d/*"), *(tmp_path / "step_2" / "state").glob("d/*")]:
        path.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 2
        with pytest.raises(ValueError, match=r"step 2 cannot be read.*Delete its folder"):
            checkpoints.restore(2, fresh())
        assert_same(flat(checkpoints.restore(1, fresh())), flat(states[0]))


# In a process of its own, since what Orbax leaves open when it fails is noticed only as Python ends.
FULL_DISK = """
import resource, sys
from pathlib import Path
from flax import nnx

import training_suite
from training_suite import Network
from jaxcrf.training import Checkpoints, Template, init_state, save_model

folder = Path(sys.argv[1])
model = Network(nnx.Rngs(0))
state = init_state(Template(model))
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
        print("no model:", type(error).__name__)
"""


def test_a_full_disk_leaves_the_earlier_checkpoint_and_half_of_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(training_suite.__file__).parent)},
    )
    assert re.search("refused: .*could not be written .*those of the steps 1 are whole", done.stdout)
    assert "no model: " in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoints"]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps == (1,)
        template = Template(Network(nnx.Rngs(1)))
        expected = init_state(Template(Network(nnx.Rngs(0))))
        assert_same(flat(checkpoints.restore(1, init_state(template))), flat(expected))


@pytest.fixture(scope="module")
def model():
    return models.create("small_fcn", 3, width=4, blocks=[0, 0, 0], rngs=nnx.Rngs(0))


def test_models_are_saved_with_all_that_is_known(tmp_path, model):
    path = tmp_path / "deep" / "model"
    save_model(
        path,
        model,
        label_names=("sky", "road", "car"),
        ignore_label=254,
        figures={"mean_iou": 0.51},
        notes="Made for a test.",
    )
    saved = load_model(path)
    assert saved.label_names == ("sky", "road", "car")
    assert saved.ignore_label == 254
    assert saved.description["figures"] == {"mean_iou": 0.51}
    assert saved.model.config == model.config
    images = np.random.default_rng(0).integers(0, 256, (1, 17, 23, 3)).astype(np.uint8)
    model.eval()
    np.testing.assert_array_equal(saved.model(images), model(images))
    card = (path / "README.md").read_text()
    for text in ("Made for a test.", "| mean_iou | 0.5100 |", "1 road", "small_fcn", "load_model"):
        assert text in card
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_models_are_not_overwritten_by_accident(tmp_path, model):
    save_model(tmp_path / "model", model)
    with pytest.raises(ValueError, match="exists already"):
        save_model(tmp_path / "model", model)
    save_model(tmp_path / "model", model, label_names=("a", "b", "c"), overwrite=True)
    assert load_model(tmp_path / "model").label_names == ("a", "b", "c")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_models_of_other_classes_are_made_by_the_caller(tmp_path):
    network = Network(nnx.Rngs(5))
    save_model(tmp_path / "model", network)
    with pytest.raises(ValueError, match="pass create="):
        load_model(tmp_path / "model")
    saved = load_model(tmp_path / "model", create=Network)
    np.testing.assert_array_equal(saved.model.body.kernel[...], network.body.kernel[...])
    with pytest.raises(ValueError, match=r"(?s)another model.*params/body/kernel: .*one too many"):
        load_model(tmp_path / "model", create=lambda rngs: nnx.Conv(3, 6, (1, 1), rngs=rngs))


def test_what_is_no_model(tmp_path, model):
    with pytest.raises(ValueError, match="no such folder"):
        load_model(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"neither model\.json"):
        load_model(tmp_path)
    save_model(tmp_path / "model", model)
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    description["model"]["name"] = "smal_fcn"
    (tmp_path / "model" / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="did you mean 'small_fcn'"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "model.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_model(tmp_path / "model")
