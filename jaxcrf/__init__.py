"""Conditional random fields and their relatives for dense labelling, in JAX.

Every system here is a linear filter over pixels plus a small algorithm that uses it; see `jaxcrf.filters`
and `jaxcrf.inference`. The names below load on first use, so that `import jaxcrf` costs little more than
`import jax`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcrf import compat as compat
    from jaxcrf import compatibility as compatibility
    from jaxcrf import data as data
    from jaxcrf import evaluation as evaluation
    from jaxcrf import filters as filters
    from jaxcrf import inference as inference
    from jaxcrf import metrics as metrics
    from jaxcrf import models as models
    from jaxcrf import nn as nn
    from jaxcrf import plots as plots
    from jaxcrf import presets as presets
    from jaxcrf import training as training
    from jaxcrf.features import Features as Features
    from jaxcrf.features import bilateral_features as bilateral_features
    from jaxcrf.features import position_features as position_features
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
    from jaxcrf.presets import Preset as Preset
    from jaxcrf.recurrent import renet_group as renet_group
    from jaxcrf.recurrent import renet_group_init as renet_group_init
    from jaxcrf.recurrent import renet_init as renet_init
    from jaxcrf.recurrent import renet_layer as renet_layer
    from jaxcrf.recurrent import renet_mask as renet_mask
    from jaxcrf.refinement import RefineConfig as RefineConfig
    from jaxcrf.refinement import refine as refine
    from jaxcrf.refinement import refine_logits as refine_logits
    from jaxcrf.unary import unary_from_labels as unary_from_labels
    from jaxcrf.unary import unary_from_probs as unary_from_probs

_SUBMODULES = (
    "compat",
    "compatibility",
    "data",
    "evaluation",
    "filters",
    "inference",
    "metrics",
    "models",
    "nn",
    "plots",
    "presets",
    "training",
)
_HOMES = {
    "ConjugateGradientStats": "inference.conjugate_gradient",
    "DeepParsingParams": "inference.deep_parsing",
    "DeepParsingResult": "inference.deep_parsing",
    "Features": "features",
    "GaussianCRFResult": "inference.gaussian_crf",
    "GaussianCRFStats": "inference.gaussian_crf",
    "InferenceResult": "inference.relaxation",
    "InferenceStats": "inference.relaxation",
    "MeanFieldResult": "inference.mean_field",
    "MeanFieldStats": "inference.mean_field",
    "Preset": "presets",
    "RefineConfig": "refinement",
    "bilateral_features": "features",
    "conjugate_gradient": "inference.conjugate_gradient",
    "deep_parsing_init": "inference.deep_parsing",
    "deep_parsing_step": "inference.deep_parsing",
    "frank_wolfe": "inference.frank_wolfe",
    "free_energy": "inference.energy",
    "gaussian_crf": "inference.gaussian_crf",
    "gibbs_energy": "inference.energy",
    "infer": "inference.infer",
    "local_convolution": "inference.local_convolution",
    "mean_field": "inference.mean_field",
    "position_features": "features",
    "projected_gradient": "inference.projected_gradient",
    "refine": "refinement",
    "refine_logits": "refinement",
    "renet_group": "recurrent",
    "renet_group_init": "recurrent",
    "renet_init": "recurrent",
    "renet_layer": "recurrent",
    "renet_mask": "recurrent",
    "relaxed_energy": "inference.relaxation",
    "rounded_energy": "inference.relaxation",
    "sparse_gaussian_crf": "inference.sparse_gaussian_crf",
    "triple_penalty": "inference.triple_penalty",
    "unary_from_labels": "unary",
    "unary_from_probs": "unary",
}

__all__ = ["__version__", *_SUBMODULES, *_HOMES]  # noqa: PLE0604  (names, spelled in the tables above)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"jaxcrf.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"jaxcrf.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name == "__version__":
        from importlib.metadata import version

        return version("jaxcrf")
    raise AttributeError(f"module 'jaxcrf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
