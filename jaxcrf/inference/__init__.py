"""Algorithms over filters: pure functions that jit, differentiate, batch and shard."""

from jaxcrf.inference.conjugate_gradient import ConjugateGradientStats as ConjugateGradientStats
from jaxcrf.inference.conjugate_gradient import conjugate_gradient as conjugate_gradient
from jaxcrf.inference.deep_parsing import DeepParsingParams as DeepParsingParams
from jaxcrf.inference.deep_parsing import DeepParsingResult as DeepParsingResult
from jaxcrf.inference.deep_parsing import deep_parsing_init as deep_parsing_init
from jaxcrf.inference.deep_parsing import deep_parsing_step as deep_parsing_step
from jaxcrf.inference.energy import free_energy as free_energy
from jaxcrf.inference.energy import gibbs_energy as gibbs_energy
from jaxcrf.inference.frank_wolfe import frank_wolfe as frank_wolfe
from jaxcrf.inference.gaussian_crf import GaussianCRFResult as GaussianCRFResult
from jaxcrf.inference.gaussian_crf import GaussianCRFStats as GaussianCRFStats
from jaxcrf.inference.gaussian_crf import gaussian_crf as gaussian_crf
from jaxcrf.inference.infer import infer as infer
from jaxcrf.inference.local_convolution import local_convolution as local_convolution
from jaxcrf.inference.mean_field import MeanFieldResult as MeanFieldResult
from jaxcrf.inference.mean_field import MeanFieldStats as MeanFieldStats
from jaxcrf.inference.mean_field import mean_field as mean_field
from jaxcrf.inference.projected_gradient import projected_gradient as projected_gradient
from jaxcrf.inference.relaxation import InferenceResult as InferenceResult
from jaxcrf.inference.relaxation import InferenceStats as InferenceStats
from jaxcrf.inference.relaxation import relaxed_energy as relaxed_energy
from jaxcrf.inference.relaxation import rounded_energy as rounded_energy
from jaxcrf.inference.sparse_gaussian_crf import sparse_gaussian_crf as sparse_gaussian_crf
from jaxcrf.inference.triple_penalty import triple_penalty as triple_penalty
