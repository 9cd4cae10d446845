"""Models for dense labelling, by name."""

try:
    import flax as _flax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("jaxcrf.models needs Flax: pip install 'jaxcrf[train]'", name="flax") from error

from jaxcrf.models.averaging import Averaged as Averaged
from jaxcrf.models.convcrf import convcrf_options as convcrf_options
from jaxcrf.models.registry import ModelConfig as ModelConfig
from jaxcrf.models.registry import create as create
from jaxcrf.models.registry import names as names
from jaxcrf.models.storage import SavedModel as SavedModel
from jaxcrf.models.storage import load as load
from jaxcrf.models.storage import save as save
from jaxcrf.models.summary import Summary as Summary
from jaxcrf.models.summary import summary as summary
