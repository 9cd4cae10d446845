"""Models for dense labelling, by name."""

from jaxcrf.models.registry import ModelConfig as ModelConfig
from jaxcrf.models.registry import create as create
from jaxcrf.models.registry import names as names
