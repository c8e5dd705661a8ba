"""Real processes on loopback: the same result as one process, and a stop or a mistake that all of them share."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from devices import on_cpus

from flax_hmog.training import restore
from flax_hmog.training.processes import STOPPED

pytestmark = pytest.mark.slow
# one start of EM: of several that end in the same model, rounding decides whose numbering of the clusters wins
OPTIONS = [
    *("synthetic", "--data.scale", "standard", "--em.n-restarts", "1"),
    *("--em.max-steps", "8", "--checkpoints.em-steps", "4"),
    *("--gradient.epochs", "12", "--gradient.batch-size", "128"),
]

# as many components as the data have, or rounding decides which of several equal fits wins; and gentle steps
ROUNDS = [
    *("--model.n-components", "6", "--model.n-clusters", "4", "--encoder.name", "mlp", "--encoder.features", "6"),
    *("--heads.differentiable.lat-dim", "3", "--rounds.start", "features", "--rounds.n-components", "6"),
    *("--rounds.distil-epochs", "1"),
    *("--gradient.epochs", "3", "--gradient.learning-rate", "3e-4"),
]


SAVING = """
import resource, sys, time, jax, numpy as np
folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from small_checkpoints import HEAD, X
from flax_hmog.training import CheckpointWriter
variables = HEAD.init(jax.random.key(0), X)
with CheckpointWriter(folder, head=HEAD) as writer:
    time.sleep(2 * index)  # the second comes when the first has written
    writer.save(1, variables)
    if index == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        writer.save(2, variables, state={"large": np.random.default_rng(0).standard_normal(100_000)})
    except ValueError as error:
        sys.exit(str(error))
"""


def free_port():
    """Below those that the system gives to outgoing connections, one of which could take it before the run does."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            return free.getsockname()[1]


def start(workdir, count, devices, *options):
    """Processes of one run, each with so many devices."""
    port = free_port()
    command = [sys.executable, "-m", "experiments.train", *OPTIONS, *options, "--workdir", str(workdir)]
    several = ["--processes.coordinator", f"127.0.0.1:{port}", "--processes.count", str(count)]
    return [
        subprocess.Popen(
            [*command, *(several if count > 1 else []), *(["--processes.index", str(index)] if count > 1 else [])],
            env=on_cpus(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(count)
    ]  # fmt: skip


def outputs(processes):
    """Text of all, once they have ended; none is left behind where one does not end."""
    try:
        return [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def finish(processes):
    """Exit statuses, once all have ended."""
    for text in outputs(processes):
        assert "Traceback" not in text, text[-3000:]
    return [process.returncode for process in processes]


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    assert finish(start(workdir, 1, 1)) == [0]
    return workdir


def assert_same_course(got, want, nats=0.0):
    """To a share of 1e-4, or so many nats where a log-density is near 0; with these a row or two may go elsewhere."""
    for a, b in zip(records(got), records(want), strict=True):
        for name, least in (("objective", nats), ("test_log_density", nats), ("nmi", 10 * nats)):
            if b.get(name) is not None:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=least), (name, b)


def test_several_processes_stop_together_go_on_and_do_what_one_does(one_process, tmp_path):
    """SIGTERM to the second of two, with two devices each: both save at the same step, from which four go on."""
    processes = start(tmp_path, 2, 2)
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and '"epoch": 1,' in metrics.read_text()):
        if any(process.poll() is not None for process in processes):
            pytest.fail("\n".join(text[-3000:] for text in outputs(processes)))
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes) == [STOPPED, STOPPED]
    stopped = restore(tmp_path / "checkpoints" / "seed0" / "differentiable").step
    assert 0 < stopped < 12 * 37
    assert finish(start(tmp_path, 4, 1)) == [0] * 4
    assert [record["epoch"] for record in records(tmp_path) if "epoch" in record] == list(range(13))
    assert_same_course(tmp_path, one_process)
    assert (tmp_path / "report.npz").is_file()  # which one of them has noted
    # one process restores what several have saved
    states = [restore(folder / "checkpoints" / "seed0" / "differentiable") for folder in (tmp_path, one_process)]
    for name, leaf in states[1].variables["params"].items():
        np.testing.assert_allclose(states[0].variables["params"][name], leaf, rtol=1e-2, atol=1e-3, err_msg=name)


def test_several_processes_train_an_encoder_as_one_does(tmp_path):
    """EM on features of rows that lie on two processes, and its merges, included."""
    for name, count in (("one", 1), ("two", 2)):
        assert finish(start(tmp_path / name, count, 1, *ROUNDS)) == [0] * count
    assert_same_course(tmp_path / "two", tmp_path / "one", nats=1e-3)
    assert records(tmp_path / "two")[-1]["stage"] == "differentiable-1"


def test_a_mistake_that_one_process_finds_stops_all(one_process):
    """The first process alone looks at the run folder: the others must not wait for it."""
    processes = start(one_process, 2, 1, "--model.lat-dim", "3")
    output = outputs(processes)
    assert [process.returncode for process in processes] == [1, 1]
    assert "another model.lat_dim" in output[0]
    assert "the first process must succeed" in output[1]


def test_a_save_that_fails_on_one_process_fails_on_all_at_once(tmp_path):
    """The first process finds no room: none waits for the other, and both can end; nor does one that comes late."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SAVING, str(tmp_path), str(free_port())]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(index)], env=environment, **streams) for index in range(2)]
    output = outputs(processes)
    assert [process.returncode for process in processes] == [1, 1]
    for text, said in zip(output, ("File too large", "the first process must succeed"), strict=True):
        assert f"checkpoint {tmp_path}/2 must be written; got " in text
        assert said in text
        assert "Traceback" not in text
    assert restore(tmp_path).step == 1
