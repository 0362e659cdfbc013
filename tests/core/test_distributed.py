"""Processes that find each other, agree, stop together, and notice when one is missing; settings that cannot be."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from cast_jax.core import distributed
from cast_jax.core.errors import UserError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator": "node1"}, r"coordinator is 'node1'; it must be '', 'auto' or HOST:PORT"),
        ({"num_processes": 2}, r"coordinator is '', beside which num_processes and process_id are not read"),
        ({"coordinator": "auto", "process_id": 1}, r"coordinator is 'auto', beside which"),
        ({"coordinator": "node1:99", "num_processes": 2}, r"process_id is -1 of num_processes 2"),
        ({"coordinator": "node1:99", "num_processes": 2, "process_id": 2}, r"process_id is 2 of num_processes 2"),
        ({"coordinator": "node1:99", "num_processes": 1, "process_id": 0, "timeout": 0}, r"timeout is 0; it must lie"),
        ({"processes": 2}, r"config\.distributed: unknown key processes; known: coordinator, num_processes"),
    ],
)
def test_faulty_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(changes)


def test_one_process_agrees_with_itself():
    distributed.initialize({})
    distributed.barrier()
    distributed.require_same("nothing", [1])
    assert distributed.gather(3) == [3]
    assert distributed.agreed("x") == "x"
    assert distributed.is_first()
    assert not distributed.several()
    stop = distributed.StopTogether(2)
    assert [stop(1, None), stop(2, 15)] == [None, 15]


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, {}),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, {"local_device_ids": []}),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, {}),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {"local_device_ids": []}),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, {}),
    ],
)
def test_a_machines_only_process_takes_all_of_its_gpus(environment, devices, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._devices_of_this_process() == devices


PROGRAM = """
import json, logging, os, signal, sys, time
from pathlib import Path
import jax
from cast_jax.core import distributed
from cast_jax.core.errors import UserError
logging.basicConfig()
distributed.HEARTBEAT = 6
try:
    distributed.initialize(json.loads(sys.argv[1]))
except UserError as error:
    sys.exit(str(error))
me, folder = jax.process_index(), Path(sys.argv[2])
found = {"first": distributed.is_first(), "gathered": distributed.gather({"me": me}), "agreed": distributed.agreed(me)}
with distributed.first_alone():
    found["alone"] = (folder / "made").exists()
    time.sleep(0.2)
    (folder / "made").touch()
try:
    distributed.require_same("the number", me)
except UserError as error:
    found["different"] = str(error)
distributed.require_same("the text", "same")
stop, found["stopped"] = distributed.StopTogether(2), None
for step in range(100):
    if (number := stop(step, 15 if me == 1 and step >= 10 else None)) is not None:
        found["stopped"] = step, number
        break
    distributed.barrier()
print(json.dumps(found), flush=True)
distributed.barrier()
if me == int(sys.argv[3]):
    os.kill(os.getpid(), int(sys.argv[4]))
time.sleep(100)
"""


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(folder, environment=None, victim=1, number=signal.SIGKILL, **config) -> subprocess.Popen:
    """A process of the program, which ``number`` strikes in the end if it is the victim."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(config), str(folder), str(victim), str(int(number))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | (environment or {}), **pipes)


def check_together(processes, victim: int) -> None:
    """What two processes found, and how one ended after the other was struck."""
    zero, one = (json.loads(process.stdout.readline()) for process in processes)
    assert (zero["first"], one["first"]) == (True, False)
    assert zero["gathered"] == one["gathered"] == [{"me": 0}, {"me": 1}]
    assert zero["agreed"] == one["agreed"] == 0
    assert (zero["alone"], one["alone"]) == (False, True)
    assert zero["different"] == one["different"]
    assert "the number must be the same in all processes, but differs between process 0 and 1" in zero["different"]
    assert zero["stopped"] == one["stopped"] == [13, 15]
    _, said = processes[1 - victim].communicate(timeout=60)
    assert processes[1 - victim].returncode not in (0, None)
    assert "another task died" in said
    processes[victim].kill()  # if it was only stopped
    processes[victim].communicate()


def test_two_processes_agree_and_the_second_ones_death_ends_the_first(tmp_path):
    config = {"coordinator": free_address(), "num_processes": 2, "timeout": 60}
    check_together([start(tmp_path, process_id=number, **config) for number in (0, 1)], 1)


def test_slurm_is_found_and_others_are_not_and_a_silent_first_process_ends_the_second(tmp_path):
    with socket.socket() as free:  # jax derives the port from the job's number
        free.bind(("127.0.0.1", 0))
    tasks = {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    tasks |= {"JAX_COORDINATOR_PORT": free_address().split(":")[1]}
    ranks = [tasks | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in (0, 1)]
    # The first one does not die, which closed connections would tell: it falls silent, as a machine that is gone.
    silent = {"victim": 0, "number": signal.SIGSTOP}
    processes = [start(tmp_path, rank, **silent, coordinator="auto", timeout=60) for rank in ranks]
    lonely = start(tmp_path, coordinator="auto", timeout=60)
    check_together(processes, 0)
    _, said = lonely.communicate(timeout=90)
    assert "config.distributed.coordinator=auto: no cluster of SLURM, Open MPI, Kubernetes" in said


def test_a_missing_process_is_said_to_after_the_timeout(tmp_path):
    addresses = free_address(), free_address()
    first = start(tmp_path, coordinator=addresses[0], num_processes=2, process_id=0, timeout=3)
    second = start(tmp_path, coordinator=addresses[1], num_processes=2, process_id=1, timeout=3)
    for process, number in ((first, 0), (second, 1)):
        _, said = process.communicate(timeout=90)
        assert process.returncode == 1, said
        assert f"config.distributed.coordinator={addresses[number]}: " in said
        assert "within 3 s" in said
        assert ("not all of the 2 processes came" if number == 0 else "found no coordinator") in said


LATE = """
import json, sys, time
import jax
from cast_jax.core import distributed
distributed.initialize(json.loads(sys.argv[1]))
jax.devices()
if jax.process_index() == 1:
    end = distributed.end
    distributed.end = lambda code: (time.sleep(0.5), end(code))
distributed.leave(0)
"""


def test_a_process_that_is_slow_to_leave_is_not_aborted_when_the_first_is_gone():
    config = {"coordinator": free_address(), "num_processes": 2, "timeout": 60}
    commands = ([sys.executable, "-c", LATE, json.dumps(config | {"process_id": number})] for number in (0, 1))
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
