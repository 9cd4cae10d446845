"""Programs that need a process of their own, such as those on several devices, which a process has or has not."""

import subprocess
import sys

from quickly import flags


def run_program(program, home, *arguments, devices=1, quickly=False, **environment):
    """Runs a program's text on so many host devices, in an environment of its own; its outcome, unchecked."""
    xla = [f"--xla_force_host_platform_device_count={devices}"]
    if quickly:
        environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | environment
        xla += flags()
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={
            "XLA_FLAGS": " ".join(xla),
            "JAX_PLATFORMS": "cpu",
            "PATH": "",
            "HOME": str(home),
            "PYTHONWARNINGS": "error",
            **environment,
        },
    )


def last_line(outcome):
    """What a program said last, or else the end of what went wrong, for the message of an assertion."""
    lines = outcome.stdout.strip().splitlines()
    return lines[-1] if outcome.returncode == 0 and lines else outcome.stderr[-3000:]
