import functools
import json
import shutil

import numpy as np
import pytest
from flax import nnx

from jaxcrf import models
from jaxcrf.training import load_model, save_model
from training_suite import Network


@functools.cache
def small_model():
    return models.create("small_fcn", 3, width=4, blocks=[0, 0, 0], rngs=nnx.Rngs(0))


# Of a test, so that it is compiled as tests are: fixtures of modules come before that is settled.
@pytest.fixture
def model():
    return small_model()


def test_models_are_saved_with_all_that_is_known(tmp_path, model):
    path = tmp_path / "deep" / "model"
    models.save(
        path,
        model,
        label_names=("sky", "road", "car"),
        ignore_label=254,
        figures={"mean_iou": 0.51},
        notes="Made for a test.",
    )
    saved = models.load(path)
    assert saved.label_names == ("sky", "road", "car")
    assert saved.ignore_label == 254
    assert saved.description["figures"] == {"mean_iou": 0.51}
    assert saved.model.config == model.config
    np.testing.assert_array_equal(saved.model.classifier.kernel[...], model.classifier.kernel[...])
    assert saved.model.dropout.deterministic
    assert saved.model.stem.norm.use_running_average
    card = (path / "README.md").read_text()
    for text in ("Made for a test.", "| mean_iou | 0.5100 |", "1 road", "small_fcn", "jaxcrf.models.load"):
        assert text in card
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_models_are_not_overwritten_by_accident(tmp_path, model):
    models.save(tmp_path / "model", model)
    with pytest.raises(ValueError, match="exists already"):
        models.save(tmp_path / "model", model)
    models.save(tmp_path / "model", model, label_names=("a", "b", "c"), overwrite=True)
    assert models.load(tmp_path / "model").label_names == ("a", "b", "c")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_models_of_other_classes_are_made_by_the_caller(tmp_path):
    network = Network(nnx.Rngs(5))
    models.save(tmp_path / "model", network)
    with pytest.raises(ValueError, match="pass create="):
        models.load(tmp_path / "model")
    saved = models.load(tmp_path / "model", create=Network)
    np.testing.assert_array_equal(saved.model.body.kernel[...], network.body.kernel[...])
    with pytest.raises(ValueError, match=r"(?s)another model.*params/body/kernel: .*one too many"):
        models.load(tmp_path / "model", create=lambda rngs: nnx.Conv(3, 6, (1, 1), rngs=rngs))


def test_what_is_no_model(tmp_path, model):
    with pytest.raises(ValueError, match="no such folder"):
        models.load(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"holds no model\.json.*by jaxcrf\.training\.load_model"):
        models.load(tmp_path)
    models.save(tmp_path / "model", model)
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    description["model"]["name"] = "smal_fcn"
    (tmp_path / "model" / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="did you mean 'small_fcn'"):
        models.load(tmp_path / "model")
    description["model"]["name"] = "small_fcn"
    description["model"]["options"]["width"] = 8
    (tmp_path / "model" / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"(?s)another model.*: holds float32\[4\], expected float32\[8\]"):
        models.load(tmp_path / "model")
    (tmp_path / "model" / "model.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        models.load(tmp_path / "model")


def test_damaged_arrays(tmp_path, model):
    models.save(tmp_path / "model", model)
    shutil.rmtree(tmp_path / "model" / "arrays")
    with pytest.raises(ValueError, match=r"model: cannot be read \(.*\); the files are damaged"):
        models.load(tmp_path / "model")


def test_training_knows_them_by_other_names(tmp_path, model):
    save_model(tmp_path / "model", model)
    assert load_model(tmp_path / "model").model.config == model.config
    assert save_model is models.save
