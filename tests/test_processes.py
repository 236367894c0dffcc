"""Two processes on one machine, joined by ``jax.distributed``."""

import os
import pathlib
import socket
import subprocess
import sys

from programs import two_processes

PROGRAM = pathlib.Path(two_processes.__file__)


def test_two_processes_end_with_the_thresholds_of_one(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, address, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for i in range(2)
    ]
    ends = [process.communicate(timeout=300) for process in processes]
    for process, (_, stderr) in zip(processes, ends, strict=True):
        assert process.returncode == 0, stderr
    alone = two_processes.bits(*two_processes.train(two_processes.PARAMS))
    assert [stdout.splitlines()[-1] for stdout, _ in ends] == [alone, alone]
