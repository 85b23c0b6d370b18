"""distributed.py, stop_request.py: comparing, stopping together, and training in two real processes."""

import http.server
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import devices
from tests.test_fingerprint import replace_weights
from tests.tiny_run import checkpoints, command, compile_cache, losses, write_model
from tiue_jax.pipeline import Pipeline
from tiue_jax.training import distributed, joining, stop_request
from tiue_jax.training.checkpoint_files import read_weights
from tiue_jax.training.distributed import DisagreementError
from tiue_jax.training.stop_request import StopRequest


def test_one_process_needs_no_other():
    joining.initialize()
    assert not jax.distributed.is_initialized()
    assert distributed.all_agree(True) and not distributed.all_agree(False)
    assert distributed.from_process_0(0.1) == 0.1
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    distributed.check_same({"a": 1})
    assert distributed.failed(2) == 2
    distributed.barrier("nobody else")
    tree = distributed.to_process_0({"a": jnp.arange(3), "b": [jnp.ones((2, 2))]})
    assert isinstance(tree["a"], np.ndarray) and tree["b"][0].shape == (2, 2)


def test_what_is_not_the_same_on_all_processes_is_named(monkeypatch):
    others = [{"a": "1", "b": "'2'"}, {"a": "1", "b": "'3'", "c": "0"}, {"a": "4", "b": "'3'", "c": "0"}]
    monkeypatch.setattr(distributed, "gather", lambda value: [value, *others])
    with pytest.raises(DisagreementError) as raised:
        distributed.check_same({"b": "3", "a": 1})
    assert str(raised.value) == (
        "expected the same on all processes, got a: 1 on process 0, 4 on process 3; b: '3' on process 0, '2' on "
        "process 1; c: missing on process 0, 0 on process 2"
    )


def test_a_signal_asks_to_stop_and_a_second_acts_at_once(sigint_not_ignored):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.listen()
        assert not stop.reached(1) and stop.minutes_left is None
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # only the first one counts
        assert stop.reached(2) and stop.cause() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_time_limit_is_no_signal():
    with StopRequest() as stop:
        stop.listen(minutes=0.1 / 60)
        assert 0 < stop.minutes_left < 0.01
        time.sleep(0.11)
        assert stop.reached(1) and stop.cause() is None


@pytest.mark.usefixtures("sighup_not_ignored")
def test_a_terminal_that_is_closed_is_a_request_unless_it_is_ignored():
    with StopRequest() as stop:
        stop.listen()
        signal.raise_signal(signal.SIGHUP)
        assert stop.reached(1) and stop.cause() == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            stop.listen()
            signal.raise_signal(signal.SIGHUP)
            assert not stop.reached(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_request_to_save_is_answered_once():
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)  # too early: there is nothing to save
        stop.listen()
        assert not stop.save_requested(all_meet=True)
        signal.raise_signal(signal.SIGUSR1)
        assert stop.save_requested(all_meet=False) and not stop.save_requested(all_meet=True)
        assert not stop.reached(1)
    assert signal.getsignal(signal.SIGUSR1) == before


class Metadata(http.server.BaseHTTPRequestHandler):
    """Stands in for Compute Engine's server. It answers with an error, with no HTTP, with no, and with yes."""

    answers = [b"HTTP/1.0 503\n\n", b"?\n\n", b"HTTP/1.0 200\n\nFALSE", b"HTTP/1.0 200\n\nTRUE\n"]

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        self.wfile.write(self.answers.pop(0))

    def log_message(self, *args):
        pass


def test_the_notice_of_preemption_is_a_signal():
    with http.server.HTTPServer(("localhost", 0), Metadata) as server, StopRequest() as stop:
        stop.listen()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}/preempted"
        watch = threading.Thread(target=stop_request.watch_preemption, args=(threading.Event(), url, 0.01), daemon=True)
        watch.start()
        watch.join(20)
        assert stop.reached(1) and stop.cause() == signal.SIGTERM and Metadata.answers == []
        server.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "teacher")


def launch(
    model: Path, workdir: Path, processes: int, *more: str, last: tuple[str, ...] = (), **changed: object
) -> list[tuple[int, str, str]]:
    """Runs training on 8 devices in all. Returns exit status, stdout and stderr of every process.

    `more` are flags of every process, `last` of the last one.
    """
    settings = {
        "train__mesh_data": 1,
        "train__mesh_fsdp": 8,  # the state is sharded over both processes
        "train__mesh_replicate_below": 1000,
        "distill__num_inference_steps": 1,
        "distill__timestep_spacing": "trailing",
        "distill__lora_targets": "('to_q', 'to_v')",
        "train__checkpoint_every": 1000,
    }
    env = devices.environment(8 // processes) | compile_cache(model / "compiled")
    env |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    _, *arguments = command(model, workdir, **settings | changed)
    program = [sys.executable, "-m", "tests.programs.train_one_of_several", *arguments]
    started = []
    for i in range(processes):
        flags = []
        if processes > 1:
            flags += [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}"]
        flags += more
        if i == processes - 1:
            flags += last
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*program, *flags], env=env, **pipes))
    with_output = [(process, *process.communicate(timeout=1000)) for process in started]
    return [(process.returncode, out, err) for process, out, err in with_output]


def without_gloo(output: str) -> str:
    """The output of a process without gloo's lines. Gloo writes them in pieces, which its threads may mix."""
    gloo = r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+"
    return re.sub(gloo, "", output).strip()


@pytest.mark.slow
def test_processes_that_were_not_started_alike_say_so_and_end(model, tmp_path):
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    other = tmp_path / "other.txt"
    other.write_text("a blue pear\n")

    def refused(*last: str) -> str:
        """The error that both processes end with."""
        ended = launch(model, workdir, 2, last=last)
        assert [status for status, _, _ in ended] == [2, 2], ended
        (error,) = {line for _, _, text in ended for line in text.splitlines() if line.startswith("error: ")}
        return error

    error = refused("--config.train.batch_size=16", f"--config.data.prompts={other}")
    assert error.startswith("error: expected the same on all processes, got fingerprint of prompts: '")
    assert error.endswith("; setting train.batch_size: 8 on process 0, 16 on process 1")
    assert not workdir.exists()

    replaced = shutil.copytree(model, tmp_path / "replaced", ignore=shutil.ignore_patterns("compiled"))
    replace_weights(replaced / "unet")
    error = refused(f"--config.model.pretrained_model_name_or_path={replaced}")
    assert re.search(r"got fingerprint of teacher.unet: '\w{16}' on process 0, '\w{16}' on process 1$", error)
    assert not workdir.exists()

    error = refused(f"--workdir={elsewhere}")
    assert error.startswith("error: expected a run's folder that all processes share, got .shared-")
    assert error.endswith(f" written by process 0 in {workdir} and not found by process 1 in {elsewhere}")
    assert [path.name for path in workdir.iterdir()] == [".lock"] and not elsewhere.exists()

    error = refused("--stale")
    assert error.endswith("on all processes, got checkpoint steps: [] on process 0, [7] on process 1")


@pytest.mark.slow
def test_two_processes_train_stop_die_and_resume_as_one(model, tmp_path):
    workdir = tmp_path / "two"
    stopped = launch(model, workdir, 2, "--preempt", train__max_train_steps=1000)
    assert [status for status, _, _ in stopped] == [143, 143], stopped
    (_, first, _), (_, second, _) = stopped
    step = int(re.search(r"stopped by SIGTERM: saved .*/checkpoints/(\d+), resume", first)[1])
    assert 3 <= step < 100 and without_gloo(second) == ""
    assert checkpoints(workdir) == [2, step] and "step 2: saving, as SIGUSR1 asked" in first
    assert not (workdir / "student").exists()

    (survived, first, _), (killed, _, _) = launch(
        model, workdir, 2, "--kill", train__max_train_steps=1000, train__checkpoint_every=1
    )
    assert killed == -signal.SIGKILL and survived not in (0, 143)
    assert f"checkpoints/{step}\n" in first and not (workdir / "student").exists()
    later = checkpoints(workdir)[-1]
    assert step < later <= step + 2  # the checkpoint of the last step may not have been whole

    last = later + 2
    shown = {"train__validation_prompts": "('a red apple',)", "train__validation_num_inference_steps": 1}
    finished = launch(model, workdir, 2, train__max_train_steps=last, train__validation_every=1000, **shown)
    assert [status for status, _, _ in finished] == [0, 0], finished
    (_, first, _), (_, second, _) = finished
    assert f"checkpoints/{later}\n" in first and f"done: {last} steps" in first and without_gloo(second) == ""

    ((status, _, error),) = launch(model, tmp_path / "one", 1, train__max_train_steps=last)
    assert status == 0, error
    expected, got = losses(tmp_path / "one"), losses(workdir)
    assert got.keys() == expected.keys() and max(got)[0] == last
    # gloo adds the parts of the processes in another order than one process adds those of its devices
    for at, value in expected.items():
        np.testing.assert_allclose(got[at], value, rtol=2e-3, atol=1e-7, err_msg=str(at))
    student = Pipeline.from_pretrained(workdir / "student").unet.params
    # read onto the device of this process: the checkpoint was saved on the devices of two
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), student)
    jax.tree.map(np.testing.assert_array_equal, student, read_weights(workdir, structs, step=last))
    assert sorted(path.name.split("_0")[0] for path in (workdir / "samples").iterdir()) == [
        "health",
        "student_above_teacher",
    ]
