"""Algorithms over filters: pure functions that jit, differentiate, batch and shard."""

from jaxcrf.inference.energy import free_energy as free_energy
from jaxcrf.inference.energy import gibbs_energy as gibbs_energy
from jaxcrf.inference.mean_field import MeanFieldResult as MeanFieldResult
from jaxcrf.inference.mean_field import MeanFieldStats as MeanFieldStats
from jaxcrf.inference.mean_field import mean_field as mean_field
