"""How long `import jaxcrf` takes beside `import jax`.

    python experiments/benchmarks/import_time.py --out results/import_time

Cost: a minute. Expected: ratios below 1.3. The bare import loads next to nothing, because names load at
first touch; `refine` is the touch that most programs begin with, and brings jax with it.
Each measurement is a fresh process; the imports take turns, so that a busy machine slows all of them.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from jaxcrf import reporting

TARGET = 1.3
STATEMENTS = {"jax": "import jax", "jaxcrf": "import jaxcrf", "refine": "from jaxcrf import refine"}


def seconds(statement: str) -> float:
    """Wall time of a fresh interpreter that runs `statement` and exits."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def measure(runs: int) -> dict:
    """Medians over `runs` processes each, after one run apiece that fills the file caches."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for run in range(runs + 1):
        for name, statement in STATEMENTS.items():
            elapsed = seconds(statement)
            if run > 0:
                times[name].append(elapsed)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "statements": STATEMENTS,
        "seconds": medians,
        "ratios": {name: medians[name] / medians["jax"] for name in ("jaxcrf", "refine")},
        "target": TARGET,
        "runs": runs,
        **reporting.circumstances(__file__),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15, help="processes per import")
    parser.add_argument("--smoke", action="store_true", help="two runs, to see that it works")
    parser.add_argument("--out", type=Path, help="folder for import_time.json")
    arguments = parser.parse_args()
    result = measure(2 if arguments.smoke else arguments.runs)
    for name, median in result["seconds"].items():
        print(
            f"{STATEMENTS[name]:<26} {1000 * median:7.0f} ms, {median / result['seconds']['jax']:.2f} of jax"
        )
    print(f"target: below {TARGET}")
    if arguments.out is not None:
        reporting.write_json(arguments.out / "import_time.json", result)


if __name__ == "__main__":
    main()
