"""Flax NNX layers: they hold parameters and call the pure functions of `jaxcrf`."""

try:
    import flax as _flax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("jaxcrf.nn needs Flax: pip install 'jaxcrf[train]'", name="flax") from error

from jaxcrf.nn.convcrf import ConvCRF as ConvCRF
from jaxcrf.nn.deep_parsing import DeepParsing as DeepParsing
from jaxcrf.nn.dense_crf import DenseCRF as DenseCRF
from jaxcrf.nn.gaussian_crf import EdgeHead as EdgeHead
from jaxcrf.nn.gaussian_crf import EmbeddingHead as EmbeddingHead
from jaxcrf.nn.gaussian_crf import GaussianCRF as GaussianCRF
from jaxcrf.nn.gaussian_crf import SparseGaussianCRF as SparseGaussianCRF
from jaxcrf.nn.gaussian_crf import StackedGaussianCRF as StackedGaussianCRF
from jaxcrf.nn.renet import ReNet as ReNet
from jaxcrf.nn.renet import ReNetGroup as ReNetGroup
