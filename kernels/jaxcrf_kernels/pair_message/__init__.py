"""Gaussian messages between all pairs of pixels: the operation under the fully connected CRF."""

from jaxcrf_kernels.pair_message.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from jaxcrf_kernels.pair_message.api import PRECISIONS as PRECISIONS
from jaxcrf_kernels.pair_message.api import pair_message as pair_message
from jaxcrf_kernels.pair_message.api import select_implementation as select_implementation
