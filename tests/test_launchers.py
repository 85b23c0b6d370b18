"""launchers.py, joining.py: who started a process, and several real processes that find each other, or do not."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from tests import devices
from tiue_jax.training import joining, launchers

OTHERWISE = "to choose otherwise, give --coordinator_address, --num_processes and --process_id, or only"
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"} | {
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}
EIGHT_GPUS = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


def slurm(tasks: int, per_node: str, task: int, local: int, node: int) -> dict[str, str]:
    """The environment of a task of SLURM."""
    numbers = {"NTASKS": tasks, "STEP_TASKS_PER_NODE": per_node, "PROCID": task, "LOCALID": local, "NODEID": node}
    return SLURM | {f"SLURM_{name}": str(value) for name, value in numbers.items()} | EIGHT_GPUS


def open_mpi(count: int, rank: int) -> dict[str, str]:
    """The environment of a process of Open MPI 4, all on one machine."""
    numbers = {"SIZE": count, "RANK": rank, "LOCAL_SIZE": count, "LOCAL_RANK": rank}
    return OPEN_MPI | {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in numbers.items()} | EIGHT_GPUS


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (slurm(1, "1", 0, 0, 0), ("SLURM", 1, 0, None)),  # all eight GPUs
        (slurm(2, "1(x2)", 1, 0, 1), ("SLURM", 2, 1, None)),
        (slurm(16, "8(x2)", 13, 5, 1), ("SLURM", 16, 13, (5,))),
        (slurm(4, "2(x2)", 3, 1, 1), ("SLURM", 4, 3, (4, 5, 6, 7))),
        (slurm(5, "4,1", 4, 0, 1), ("SLURM", 5, 4, None)),
        (slurm(2, "2", 1, 1, 0) | {"SLURM_GPUS_PER_TASK": "4"}, ("SLURM", 2, 1, None)),  # it sees no other GPUs
        (slurm(2, "2", 1, 1, 0) | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, ("SLURM", 2, 1, None)),
        (slurm(2, "2", 1, 1, 0) | {"CUDA_VISIBLE_DEVICES": ""}, ("SLURM", 2, 1, None)),
        (slurm(2, "2", 1, 1, 0) | {"JAX_LOCAL_DEVICE_IDS": "0,3"}, ("SLURM", 2, 1, (0, 3))),
        (slurm(8, "8", 3, 3, 0) | {"SLURM_STEP_NUM_TASKS": "4"}, ("SLURM", 4, 3, (3,))),
        (open_mpi(2, 1), ("Open MPI", 2, 1, (4, 5, 6, 7))),
        (slurm(4, "4", 0, 0, 0) | open_mpi(2, 1), ("Open MPI", 2, 1, (4, 5, 6, 7))),  # mpirun in a job of SLURM
        ({"JAX_NUM_PROCESSES": "1"} | slurm(4, "4", 0, 0, 0), ("JAX_NUM_PROCESSES=1", 1, 0, None)),
    ],
)
def test_the_place_of_a_process(environment, expected):
    place = launchers.find(environment, 5)
    assert (place.launcher, place.num_processes, place.process_id, place.gpus) == expected


def test_the_address_comes_from_the_launcher_or_the_environment():
    assert launchers.find(slurm(2, "2", 0, 0, 0), 5).coordinator_address == f"localhost:{65535 - 2**12 + 1 + 7}"
    nodes = {"SLURM_STEP_NODELIST": "gpu[003,007-015],big1"}
    moved = slurm(2, "2", 0, 0, 0) | nodes | {"JAX_COORDINATOR_PORT": "1234"}
    assert launchers.find(moved, 5).coordinator_address == "gpu003:1234"
    six = open_mpi(2, 0) | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620:10d]:43370"}
    assert launchers.find(six, 5).coordinator_address == f"[fe80::b9b]:{61_440 + 1314521088 // 2**12 % 2**12}"
    given = {"JAX_COORDINATOR_ADDRESS": "[::1]:5", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert launchers.find(given, 5).coordinator_address == "[::1]:5"
    assert launchers.find(slurm(2, "2", 0, 0, 0) | given, 5).coordinator_address == "[::1]:5"
    assert launchers.find({}, 5) is None


def test_gpus_are_counted_on_the_machine(tmp_path):
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert launchers.visible_gpus({}, tmp_path) == 3
    assert launchers.visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert launchers.visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == 0


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ((None, 2, 0), "missing .'--coordinator_address'."),
        (("localhost:1", None, None), "missing .'--num_processes', '--process_id'."),
        (("localhost:1", 2, 2), "--process_id must be between 0 and --num_processes - 1, got 2 of 2"),
        (("localhost", 2, 1), "--coordinator_address must be host:port with a port from 1 to 65535, got 'localhost'"),
        (("localhost:70000", 2, 1), "a port from 1 to 65535, got 'localhost:70000'"),
        (("a b:1", 2, 1), "must be host:port"),
    ],
)
def test_bad_flags(processes, message):
    with pytest.raises(ValueError, match=message):
        joining.initialize(*processes)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "no launcher was recognised, missing JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (slurm(2, "2", 0, 0, 0) | {"SLURM_PROCID": "x"}, "SLURM: cannot find the other processes: invalid literal"),
        (slurm(2, "2", 5, 0, 0), "got 5 of 2 .SLURM."),
        (slurm(2, "2", 0, 0, 0) | {"JAX_PROCESS_ID": "1.5"}, "JAX_PROCESS_ID must be a whole number, got '1.5'"),
        (slurm(2, "2", 0, 0, 0) | {"JAX_LOCAL_DEVICE_IDS": "x"}, "JAX_LOCAL_DEVICE_IDS must be a whole number"),
        (open_mpi(2, 0) | {"OMPI_MCA_orte_hnp_uri": "x"}, "Open MPI: cannot find .*: OMPI_MCA_orte_hnp_uri = 'x'"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            "since version 5 Open MPI does not",
        ),
    ],
)
def test_bad_environments(environment, message):
    with pytest.raises(ValueError, match=message) as raised:
        launchers.find(environment, 5)
    assert len(str(raised.value)) <= 600


def test_a_process_that_trains_alone_in_a_job_says_so():
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}
    assert "8 tasks, but srun did not start this process: it trains alone" in launchers.advice(job)
    assert "no JOB_COMPLETION_INDEX" in launchers.advice({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert launchers.advice({}) is None and launchers.advice(job | {"SLURM_NTASKS": "1"}) is None


# ---- real processes -------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(environment: dict[str, str], *flags: str) -> subprocess.Popen:
    """Starts a process that joins the others."""
    program = [sys.executable, "-m", "tests.programs.join_others", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, env=devices.environment(2) | environment, **pipes)


def end(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """The exit status of a process, its stdout, and the lines of its stderr."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err.splitlines()


@pytest.mark.parametrize(
    ("name", "environments"),
    [
        ("SLURM", [slurm(2, "2", i, i, 0) for i in (0, 1)]),
        ("Open MPI", [open_mpi(2, i) for i in (0, 1)]),
        ("environment variables", [{"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)} for i in (0, 1)]),
    ],
)
def test_two_processes_of_a_launcher_find_each_other(name, environments):
    port = str(free_port())
    where = {"JAX_COORDINATOR_PORT": port}
    if name == "environment variables":
        where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    started = [start(environment | where) for environment in environments]
    for i, process in enumerate(started):
        status, out, err = end(process)
        assert status == 0, err
        gpus = ("all", "all") if name == "environment variables" else ("0,1,2,3", "4,5,6,7")
        assert json.loads(out) == {"joined": True, "processes": 2, "process": i, "devices": 4, "gpus": gpus[i]}
        assert re.match(rf"process {i} of 2, waiting at (localhost|127.0.0.1):{port}, ", err[0])
        assert f"(by {name}; {OTHERWISE}" in err[0]
        assert name == "environment variables" or ", 4 of 8 GPUs, up to 300 s" in err[0]


def test_one_task_of_slurm_has_all_devices_and_needs_no_other():
    status, out, err = end(start(slurm(1, "1", 0, 0, 0)))
    assert (status, err) == (0, ["SLURM: one process, 8 GPUs"])
    assert json.loads(out) == {"joined": False, "processes": 1, "process": 0, "devices": 2, "gpus": "all"}


def test_a_process_without_the_others_reports_and_gives_up():
    address = f"localhost:{free_port()}"
    flags = [f"--coordinator_address={address}", "--num_processes=2", "--join_timeout=3", "--report_every=1.2"]
    for i, missing in enumerate(["not all other processes have come", "process 0 does not answer there"]):
        began = time.monotonic()
        status, out, err = end(start({}, *flags, f"--process_id={i}"))
        assert (status, out) == (1, "") and 3 <= time.monotonic() - began < 60
        first, *reports, last = err
        assert first == f"process {i} of 2, waiting at {address}, no GPU and no TPU, up to 3 s (by flags)"
        assert len(reports) == 2 and all(f"{address}: {missing}" in line and " of 3 s" in line for line in reports)
        assert last.startswith(f"error: process {i} of 2, waiting at {address}: {missing}")
        assert "gave up after 3 s" in last and "--join_timeout=SECONDS" in last and len(last) <= 600


@pytest.mark.usefixtures("sigint_not_ignored")
def test_ctrl_c_ends_a_process_that_waits():
    flags = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2", "--process_id=0"]
    process = start({}, *flags)
    assert "waiting at" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "", ["interrupted"])


def test_a_port_in_use_is_one_line():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        flags = [f"--coordinator_address=localhost:{port}", "--num_processes=2", "--process_id=0"]
        status, out, (error,) = end(start({}, *flags))
    assert (status, out) == (2, "")
    assert error.startswith(
        f"error: process 0 cannot listen at port {port} of localhost:{port} (Address already in use)"
    )
    assert "choose another --coordinator_address" in error and len(error) <= 600


def test_a_pod_of_kubernetes_without_a_token_is_one_line(tmp_path):
    package = tmp_path / "kubernetes"
    package.mkdir()
    # as the real package does; a test with it was made by hand
    load = "def load_incluster_config(): raise Exception('Service token file does not exist.')"
    (package / "__init__.py").write_text(f"class config:\n    {load}\n")
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    path = {"PYTHONPATH": os.pathsep.join([str(devices.ROOT), str(tmp_path)])}
    status, out, (error,) = end(start(pod | path))
    assert (status, out) == (2, "")
    assert error.startswith("error: Kubernetes: cannot find the other processes: Service token file does not exist.")
    assert OTHERWISE in error and len(error) <= 600
