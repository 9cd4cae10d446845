"""Runs that are killed, and runs of several processes and devices."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from processes import last_line, run_program
from training_suite import assert_same

SUITE = Path(__file__).parents[1] / "training_suite.py"
# Of twelve steps, with a checkpoint after every second one.
REPETITIONS = "5"


def start(cache, folder, *process, repetitions=REPETITIONS):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(SUITE), str(folder), repetitions, *process]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process):
    _, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints.decode()[-3000:]


def last_state(folder):
    with np.load(folder / "last.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The last state of a run that nobody disturbs, where its programs are cached, and how long it takes then."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("whole")
    finish(start(cache, folder))
    began = time.monotonic()
    again = tmp_path_factory.mktemp("again")
    finish(start(cache, again))
    assert_same(last_state(again), last_state(folder))
    return last_state(folder), cache, time.monotonic() - began


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(tmp_path, uninterrupted):
    expected, cache, duration = uninterrupted
    kills = int(os.environ.get("JAXCRF_KILLS", "2"))
    moments = random.Random(kills)
    killed, round_number = 0, 0
    folder = tmp_path / "0"
    while killed < kills:
        process = start(cache, folder)
        try:
            # The first third of a process is imports.
            process.wait(timeout=moments.uniform(0.3, 1.0) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
        else:
            finish(process)
            assert_same(last_state(folder), expected)
            round_number += 1
            folder = tmp_path / str(round_number)
    finish(start(cache, folder))
    assert_same(last_state(folder), expected)
    # Nothing unfinished is left behind.
    names = [entry.name for entry in (folder / "checkpoints").iterdir()]
    assert all(name.removeprefix("step_").isdigit() for name in names), names


@pytest.mark.slow
def test_two_processes_are_two_devices(tmp_path, uninterrupted):
    _, cache, _ = uninterrupted
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    together = tmp_path / "together"
    processes = [start(cache, together, address, "2", str(index), repetitions="1") for index in range(2)]
    for process in processes:
        finish(process)
    alone = run_program(
        SUITE.read_text(),
        tmp_path,
        str(tmp_path / "alone"),
        "1",
        devices=2,
        PYTHONPATH=str(SUITE.parent),
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    found, expected = last_state(together), last_state(tmp_path / "alone")
    assert list(found) == list(expected)
    for path, leaf in expected.items():
        # The sums over both devices are the same numbers, added in the same order.
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-7, err_msg=path)


DEVICES = """
import sys, jax, numpy as np, optax
from flax import nnx
from training_suite import assert_same, cross_entropy, draw_batch, plain_network
from jaxcrf.training import (
    Checkpoints, Template, Update, data_mesh, init_state, make_step, put_batch, replicate, with_optimizers
)

update = Update("all", cross_entropy, optax.sgd(0.1, momentum=0.9))
template = Template(plain_network(nnx.Rngs(0)))
states = {}
for count in (1, 8):
    mesh = data_mesh(count)
    step = make_step(template, update, mesh=mesh)
    state = replicate(with_optimizers(init_state(template), {"all": update}), mesh)
    for seed in range(3):
        state, report = step(state, put_batch(draw_batch(size=8, seed=seed), mesh))
    states[count] = state
for path, leaf in states[1].params.items():
    # Sums over some 1000 pixels in another order, in float32.
    np.testing.assert_allclose(states[8].params[path], leaf, rtol=1e-5, atol=1e-6)
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(3, states[8])
    checkpoints.wait()
    fresh = with_optimizers(init_state(template), {"all": update})
    for count in (1, 2):
        restored = checkpoints.restore(3, replicate(fresh, data_mesh(count)))
        assert_same(
            {path: np.asarray(leaf) for path, leaf in restored.params.items()},
            {path: np.asarray(leaf) for path, leaf in states[8].params.items()},
        )
        assert len(restored.step.sharding.device_set) == count
print("eight devices, two and one agree")
"""


@pytest.mark.slow
def test_states_move_between_numbers_of_devices(tmp_path):
    outcome = run_program(DEVICES, tmp_path, str(tmp_path / "run"), devices=8, PYTHONPATH=str(SUITE.parent))
    assert last_line(outcome) == "eight devices, two and one agree"
