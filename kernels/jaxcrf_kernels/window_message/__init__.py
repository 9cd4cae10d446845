"""Gaussian messages inside a window: the operation under ConvCRF."""

from jaxcrf_kernels.window_message.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from jaxcrf_kernels.window_message.api import select_implementation as select_implementation
from jaxcrf_kernels.window_message.api import window_message as window_message
