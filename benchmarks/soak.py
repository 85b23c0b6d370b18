"""Disturbs tiny training runs by faults drawn from a seed, until the time is over, and compares with undisturbed ones.

    python benchmarks/soak.py --minutes 20 [--seed 0] [--faults 200]

After each fault the same command is given again. When a run is done, every checkpoint of it is compared bit for bit
with that of a run that was never disturbed, and the next run begins. Faults:

    kill, term, hup     SIGKILL at any moment, also while starting and saving; SIGTERM; SIGHUP
    full, read-only     the disk is full while the run trains; the disk is read-only when it starts
    truncated, flipped  a file of the newest checkpoint is cut, or a bit in it is flipped, before the run starts
    vanished, paused    one of two processes is killed; the process is stopped for some seconds (SIGSTOP)
    slow, clock         each rename and each new folder takes 0.3 s; the time of day jumps by up to a day and back

Prints how many faults were survived, and how many checkpoints were lost, bytes were different, errors were one line and
tracebacks were printed. Exit status 1 if anything but faults and one-line errors is not 0. The disk is a tmpfs of its
own, in a namespace of its own (`unshare`, Linux). Processes are forked from this one after its imports.
"""

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.modules["tests"] = types.ModuleType("tests")  # ours; some installed packages bring a folder of this name
sys.modules["tests"].__path__ = [str(ROOT / "tests")]

STEPS = 12
LIMIT = 300.0  # seconds that a process may take
DISK = "48m"
ENDS = {"kill": -signal.SIGKILL, "term": 128 + signal.SIGTERM, "hup": 128 + signal.SIGHUP}
HARMLESS = ("paused", "slow", "clock")
FAULTS = ("kill", "kill", "kill", "term", "hup", "full", "read-only", "truncated", "flipped", "paused", "slow", "clock")


class Ended(NamedTuple):
    """How the processes of one command ended: their statuses, and what they printed together."""

    statuses: list[int]
    text: str


class Soak:
    """The runs and what was counted. All times are drawn from `rng`."""

    def __init__(self, folder: Path, disk: Path, rng: random.Random):
        self.folder, self.disk, self.rng = folder, disk, rng
        self.counts: collections.Counter[str] = collections.Counter()
        self.survived: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    # ---- processes ----------------------------------------------------------------------------------------------

    def start(self, workdir: Path, processes: int, how: str, more: tuple[str, ...] = ()) -> list[int]:
        """Forks the processes of a command, which train in `workdir`. Returns their ids."""
        from tests.tiny_run import command

        settings = {"train__max_train_steps": STEPS, "train__checkpoint_every": 1, "train__validation_every": 10**6}
        settings |= {"train__checkpoints_total_limit": "None"}
        argv = [*command(self.folder / "teacher", workdir, **settings), f"--log_json={self.folder / 'log'}", *more]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            argv += [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}"]
        for name in ("log", "output"):
            (self.folder / name).write_text("")
        seed = self.rng.random()
        pids = []
        for i in range(processes):
            pid = os.fork()
            if pid == 0:
                train([*argv, *([f"--process_id={i}"] if processes > 1 else [])], self.folder / "output", how, seed)
            pids.append(pid)
        return pids

    def steps(self) -> int:
        """The number of steps that the processes have logged."""
        return (self.folder / "log").read_text().count("\n")

    def until(self, pids: list[int], steps: int) -> bool:
        """Waits until the processes have logged so many steps. False if one of them ended before."""
        until = time.monotonic() + LIMIT
        while self.steps() < steps and time.monotonic() < until:
            if any(not running(pid) for pid in pids):
                return False
            time.sleep(0.02)
        return True

    def end(self, pids: list[int]) -> Ended:
        """Waits for the processes. One that takes too long is killed, which is counted as a hang."""
        until, statuses = time.monotonic() + LIMIT, []
        for pid in pids:
            while running(pid):
                if time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
                    self.wrong.append("a process did not end")
                    until += 10
                time.sleep(0.02)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        text = (self.folder / "output").read_text(errors="replace")
        self.counts["tracebacks"] += text.count("Traceback")
        self.counts["one-line errors"] += len(re.findall(r"^error: .{1,600}$", text, re.MULTILINE))
        self.counts["processes"] += len(pids)
        return Ended(statuses, text)

    def run(self, workdir: Path, processes: int, fault: str, more: tuple[str, ...] = ()) -> Ended:
        """Gives the command once, with a fault of the running processes or none."""
        pids = self.start(workdir, processes, fault, more)
        if fault == "kill" and self.rng.random() < 0.3:
            time.sleep(self.rng.uniform(0, 15))  # while it starts
            begun = True
        else:
            begun = self.until(pids, self.rng.randint(1, 3))
            time.sleep(self.rng.uniform(0, 0.5))
        if begun and fault in (*ENDS, "vanished"):
            victim = pids[-1]
            os.kill(victim, -ENDS["kill"] if fault in ("kill", "vanished") else ENDS[fault] - 128)
        elif begun and fault == "paused":
            os.kill(pids[-1], signal.SIGSTOP)
            time.sleep(self.rng.uniform(1, 4))
            os.kill(pids[-1], signal.SIGCONT)
        elif begun and fault == "full":
            ballast = self.disk / "ballast"
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free_bytes(self.disk))
            ended = self.end(pids)
            ballast.unlink()
            return ended
        elif begun and fault in HARMLESS:
            self.until(pids, 4)
            os.kill(pids[-1], signal.SIGTERM)
        if begun and fault == "paused":
            self.until(pids, 4)
            os.kill(pids[-1], signal.SIGTERM)
        return self.end(pids)

    # ---- faults -------------------------------------------------------------------------------------------------

    def disturb(self, workdir: Path, fault: str, processes: int) -> None:
        """Applies a fault to a run, and checks what is left of it."""
        before = checkpoints(workdir)
        if fault in ("truncated", "flipped") and not before:
            fault = "kill"
        expected: set[int] = {0}
        lost_by_fault = 0
        if fault == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", self.disk], check=True)
            ended = self.run(workdir, processes, fault)
            subprocess.run(["mount", "-o", "remount,rw", self.disk], check=True)
            expected = {2, 4}
        elif fault in ("truncated", "flipped"):
            self.damage(workdir / "checkpoints" / str(before[-1]), fault)
            ended = self.run(workdir, processes, "term")
            if 2 in ended.statuses and "is broken" in ended.text:
                lost_by_fault = 1
                if len(before) > 1:
                    ended = self.run(workdir, processes, "term", ("--allow_older",))
                else:
                    shutil.rmtree(workdir)
                    self.survived[fault] += 1
                    return
            expected |= {ENDS["term"]}
        else:
            ended = self.run(workdir, processes, fault)
            expected |= {ENDS.get(fault, ENDS["term"])} | ({4} if fault == "full" else set())
            if fault == "vanished":
                expected |= {1, -signal.SIGKILL, -signal.SIGABRT, 143}
        after = checkpoints(workdir)
        if lost := set(before[: len(before) - lost_by_fault]) - set(after):
            self.counts["checkpoints lost"] += len(lost)
        if not set(ended.statuses) <= expected:
            self.wrong.append(f"{fault}: statuses {ended.statuses}, expected {sorted(expected)}: {ended.text[-2000:]}")
        elif "Traceback" in ended.text:
            self.wrong.append(f"{fault}: {ended.text[ended.text.index('Traceback') :][:3000]}")
        else:
            self.survived[fault] += 1

    def damage(self, checkpoint: Path, fault: str) -> None:
        """Cuts a file of a checkpoint or flips a bit in it."""
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
        path = self.rng.choice(files)
        data = bytearray(path.read_bytes())
        if fault == "truncated":
            path.write_bytes(data[: self.rng.randrange(len(data))])
        else:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(data)

    def compare(self, workdir: Path, whole: Path) -> None:
        """Counts the different bytes of all checkpoints, in another process, since this one must not start jax."""
        answer = self.folder / "different"
        answer.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                answer.write_text(json.dumps(different_bytes(workdir, whole)))
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        os.waitpid(pid, 0)
        compared, different = json.loads(answer.read_text()) if answer.exists() else (0, 10**9)
        self.counts["checkpoints compared"] += compared
        self.counts["bytes different"] += different
        self.counts["runs compared"] += 1

    def report(self, minutes: float) -> int:
        """Prints the counts. Returns the exit status."""
        print(f"faults survived: {self.survived.total()} in {minutes:.1f} minutes")
        print("  " + ", ".join(f"{count} {fault}" for fault, count in sorted(self.survived.items())))
        for name in ("checkpoints lost", "bytes different", "one-line errors", "tracebacks"):
            print(f"{name}: {self.counts[name]}")
        for name in ("processes", "runs compared", "checkpoints compared"):
            print(f"{name}: {self.counts[name]}")
        for text in self.wrong:
            print(f"wrong: {text}")
        bad = self.counts["checkpoints lost"] + self.counts["bytes different"] + self.counts["tracebacks"]
        return int(bool(bad or self.wrong))


def train(argv: list[str], output: Path, how: str, seed: float) -> NoReturn:
    """Runs `tiue train` in a process that was forked for it, and ends the process."""
    status = 1
    try:
        with output.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
        rng, now = random.Random(seed), time.time
        if how == "slow":
            for name in ("rename", "replace", "mkdir"):
                setattr(os, name, delayed(getattr(os, name)))
        elif how == "clock":
            time.time = lambda: now() + rng.uniform(-86400, 86400)
        from tiue_jax.cli import train as command

        status = command.main(argv)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def delayed(function):
    """A function that takes 0.3 s longer."""

    def slow(*arguments, **named):
        time.sleep(0.3)
        return function(*arguments, **named)

    return slow


def running(pid: int) -> bool:
    """True if a child has not ended. Its status stays to be read."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def free_bytes(folder: Path) -> int:
    """The bytes that can still be written to the disk of a folder."""
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize


def checkpoints(workdir: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def different_bytes(workdir: Path, whole: Path) -> tuple[int, int]:
    """Compares every checkpoint of a run with another run's. Returns how many there are, and how many bytes differ."""
    import jax
    import numpy as np

    from tests.tiny_run import position, saved

    different = 0
    steps = checkpoints(workdir)
    if steps[-1] != STEPS:
        different += 1
    for step in steps:
        one, other = saved(workdir, step), saved(whole, step)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            left, right = (np.frombuffer(np.asarray(x).tobytes(), np.uint8) for x in (a, b))
            different += int(np.sum(left != right))
        different += position(workdir, step) != position(whole, step)
    return len(steps), different


def soak(minutes: float, seed: int, faults: int, with_two: bool, folder: Path) -> int:
    """Runs until the time is over or so many faults were applied. Returns the exit status."""
    from tests.tiny_run import compile_cache, write_model

    began = time.monotonic()
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", disk], check=True)
    this = Soak(folder, disk, random.Random(seed))
    os.environ |= compile_cache(os.environ.get("JAX_COMPILATION_CACHE_DIR", folder / "compiled"))
    pid = os.fork()
    if pid == 0:  # writing a model starts jax
        write_model(folder / "teacher")
        os._exit(0)
    os.waitpid(pid, 0)
    import jax  # after the environment of the cache is set

    import tiue_jax.cli.train  # noqa: F401

    jax.config.update("jax_platforms", "cpu")
    done = 0
    tracks = [1, 2] if with_two else [1]
    whole = {}
    for processes in tracks:
        whole[processes] = folder / f"whole{processes}"
        ended = this.end(this.start(whole[processes], processes, ""))
        if set(ended.statuses) != {0}:
            print(ended.text)
            raise SystemExit(f"the undisturbed run of {processes} process(es) failed: {ended.statuses}")
    print(f"undisturbed runs: {time.monotonic() - began:.0f} s", flush=True)

    def over() -> bool:
        return done >= faults or time.monotonic() - began > 60 * minutes

    while not over():
        processes = this.rng.choices(tracks, [4, 1][: len(tracks)])[0]
        workdir = disk / "run"
        while not over() and checkpoints(workdir)[-1:] != [STEPS]:
            fault = this.rng.choice(FAULTS) if processes == 1 else this.rng.choice(("vanished", "paused", "kill"))
            this.disturb(workdir, fault, processes)
            done += 1
            print(f"{time.monotonic() - began:.0f} s: {fault}, at step {checkpoints(workdir)[-1:]}", flush=True)
        ended = this.run(workdir, processes, "")  # the same command, undisturbed until the end
        if set(ended.statuses) != {0}:
            this.wrong.append(f"the last command: {ended.statuses}: {ended.text[-2000:]}")
        this.compare(workdir, whole[processes])
        shutil.rmtree(workdir, ignore_errors=True)
    return this.report((time.monotonic() - began) / 60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="time for all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (default: %(default)s)")
    parser.add_argument("--faults", type=int, default=10**9, help="ends after so many faults")
    parser.add_argument("--one_process", action="store_true", help="no runs of two processes")
    args = parser.parse_args()
    if os.environ.get("SOAK_NAMESPACE") != "own":
        own = ["unshare", "--map-root-user", "--mount", sys.executable, __file__, *sys.argv[1:]]
        return subprocess.run(own, env=os.environ | {"SOAK_NAMESPACE": "own", "JAX_PLATFORMS": "cpu"}).returncode
    from machine import machine

    print(machine("jax", "orbax-checkpoint"), flush=True)
    with tempfile.TemporaryDirectory(prefix="soak.") as folder:
        try:
            return soak(args.minutes, args.seed, args.faults, not args.one_process, Path(folder))
        finally:
            subprocess.run(["umount", "--lazy", Path(folder) / "disk"], check=False)


if __name__ == "__main__":
    sys.exit(main())
