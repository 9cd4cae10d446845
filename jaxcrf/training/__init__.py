"""Finding parameters from data."""

from jaxcrf.training.search import SearchResult as SearchResult
from jaxcrf.training.search import Trial as Trial
from jaxcrf.training.search import search as search
