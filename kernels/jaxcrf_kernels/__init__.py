"""Accelerated primitives of jaxcrf on plain arrays.

One folder per operation: its API with the VJP rule, the plain-jnp reference that is both the CPU
path and the oracle, and one list of cases shared by tests, benchmarks and lowering checks.
"""

from jaxcrf_kernels.pair_message import pair_message as pair_message
from jaxcrf_kernels.window_message import window_message as window_message
