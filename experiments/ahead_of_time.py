r"""Compiles the kernels for devices that this machine does not have. Needs packages that the tests do without.

    pip install libtpu                       # for --tpu: the compiler of TPUs, 130 MB
    python experiments/ahead_of_time.py --tpu v5e:2x2
    pip install triton                       # for --cuda: Triton with NVIDIA's assembler, 200 MB
    python experiments/ahead_of_time.py --cuda 90

Lowering, which the tests do, stops before the device's own compiler, which has the last word: on addresses that
vector memory cannot have, on shared memory, on registers. Here every case of every message goes through it, value
and gradients:

- `--tpu` compiles whole programs for a described topology, as on the real device, and prints what memory they take,
- `--cuda` takes the Triton kernels out of the lowered programs and compiles each for a compute capability, printing
  registers, spilled bytes and shared memory. The Triton inside jaxlib is another version than pip's, so that numbers
  may differ a little.

Nothing runs, and nothing is timed. The exit status is 1 if something does not compile. Expected cost: two minutes for
the window message's cases on TPUs, ten for the pair message's; `--match` selects cases by name.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# Libtpu asks the cloud who it is, unless told.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh

from jaxcrf_kernels import pair_message, window_message
from jaxcrf_kernels.pair_message import cases as pair_cases
from jaxcrf_kernels.window_message import cases as window_cases

MESSAGES = {"window_message": (window_message, window_cases), "pair_message": (pair_message, pair_cases)}
DEVICES = {80: "NVIDIA A100", 89: "NVIDIA L4", 90: "NVIDIA H200"}


def programs(match: str, implementation: str) -> Iterator[tuple[str, Callable[..., Any], tuple]]:
    """Every case in both directions: a name, a function and the types of its arguments."""
    for message, (function, cases) in MESSAGES.items():
        for case in (*cases.CASES, *cases.FULL_SIZE_CASES):
            arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cases.operands(case))

            def value(*operands: Any, f: Any = function, c: Any = case, m: Any = cases) -> Any:
                given = m.Operands(*operands)._asdict() | c.static
                return f(**given, implementation=implementation)

            def gradients(cotangent: Any, *operands: Any, value: Any = value) -> Any:
                return jax.vjp(value, *operands)[1](cotangent)

            for direction, run, arguments in (
                ("value", value, tuple(arrays)),
                ("gradients", gradients, (arrays.q, *arrays)),
            ):
                name = f"{message} {case.name} {direction}"
                if re.search(match, name):
                    yield name, run, arguments


def described(kind: str, platform: str) -> Any:
    """A context in which calls are lowered for a device."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device))


def report(name: str, work: Callable[[], str]) -> bool:
    """Prints what became of it; whether it went well."""
    begin = time.perf_counter()
    try:
        found = work()
    except Exception as problem:  # whatever a compiler says is what this script is for
        print(f"{name}: FAILED, {type(problem).__name__}: {str(problem)[:1500]}", flush=True)
        return False
    print(f"{name}: {found}, {time.perf_counter() - begin:.1f} s", flush=True)
    return True


def compile_for_tpu(topology: str, match: str) -> list[str]:
    """The names of what does not compile."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = SingleDeviceSharding(device)
    failed = []
    for name, run, arguments in programs(match, "tpu"):

        def work(run: Callable[..., Any] = run, arguments: tuple = arguments) -> str:
            placed = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
            )
            with described(device.device_kind, "tpu"):
                traced = jax.jit(run).trace(*placed)
            memory = traced.lower().compile().memory_analysis()
            return f"{memory.temp_size_in_bytes / 2**20:.1f} MiB extra"

        if not report(name, work):
            failed.append(name)
    return failed


def compile_for_cuda(capability: int, match: str) -> list[str]:
    """The names of what does not compile, or takes more shared memory than the device has."""
    from jax._src.pallas.triton import lowering

    original = lowering.lower_jaxpr_to_triton_module
    kernels: list[tuple[str, Any]] = []

    def remember(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        kernels.append(found.module.operation.get_asm(enable_debug_info=False))
        return found

    failed = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(lowering, "lower_jaxpr_to_triton_module", remember),
    ):
        for name, run, arguments in programs(match, "triton"):
            kernels.clear()
            with described(DEVICES[capability], "cuda"):
                text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
            warps = [int(n) for n in re.findall(r"num_warps = (\d+)", text)]
            if not kernels:
                print(f"{name}: no kernel")
                failed.append(name)
            for number, kernel in enumerate(kernels):

                def work(kernel: Any = kernel, number: int = number, warps: list[int] = warps) -> str:
                    path = Path(folder, "kernel.ttir")
                    path.write_text(kernel)
                    return resources(path, capability, warps[number] if number < len(warps) else 4)

                if not report(f"{name} {number}", work):
                    failed.append(name)
    return failed


def resources(path: Path, capability: int, num_warps: int) -> str:
    """Compiles Triton's intermediate code; registers, spills and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": num_warps, "num_stages": 1}
    kernel = triton.compile(str(path), target=GPUTarget("cuda", capability, 32), options=options)
    binary = path.with_suffix(".cubin")
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout + text.stderr)
    registers, stack = found.groups() if found else ("?", "?")
    return f"{registers} registers, {stack} bytes of stack, {kernel.metadata.shared} bytes shared"


def main(arguments: list[str] | None = None) -> int:
    """Compiles; 1 if something does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="for instance v5e:2x2, v4:2x2x1 or v6e:2x2")
    parser.add_argument("--cuda", metavar="CAPABILITY", type=int, choices=sorted(DEVICES))
    parser.add_argument("--match", default="", help="a regular expression that names must match")
    args = parser.parse_args(arguments)
    if not args.tpu and not args.cuda:
        parser.error("nothing to compile for: pass --tpu, --cuda or both")
    failed = []
    if args.tpu:
        failed += compile_for_tpu(args.tpu, args.match)
    if args.cuda:
        failed += compile_for_cuda(args.cuda, args.match)
    print(f"jax {jax.__version__}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
