"""compile_cache.py: the folder of compiled programs, and commands that use it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from tests import tiny
from tiue_jax import compile_cache
from tiue_jax.cli import train

ROOT = Path(__file__).parents[1]
OPTIONS = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_compilation_cache_max_size")


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    """An empty folder for the user's caches, and jax with its cache on, which conftest.py switches off."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    shown = warnings.showwarning
    yield tmp_path / "caches"
    warnings.showwarning = shown
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_own(cache_home):
    assert compile_cache.enable() == cache_home / "tiue_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(cache_home / "tiue_jax" / "xla")
    assert jax.config.jax_compilation_cache_max_size == compile_cache.MAX_BYTES
    assert list((cache_home / "tiue_jax" / "xla").iterdir()) == []
    assert (cache_home / "tiue_jax" / "xla").stat().st_mode & 0o777 == 0o700


def test_the_users_environment_comes_first(cache_home):
    jax.config.update("jax_compilation_cache_dir", "/somewhere/else")
    assert compile_cache.enable() == Path("/somewhere/else")
    jax.config.update("jax_enable_compilation_cache", False)
    assert compile_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir == "/somewhere/else" and not cache_home.exists()


def test_a_limit_that_the_user_set_stays(cache_home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "1000")
    jax.config.update("jax_compilation_cache_max_size", 1000)
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_max_size == 1000


def test_a_folder_that_cannot_be_written_is_a_warning_in_one_line(cache_home, capsys):
    cache_home.write_text("a file where the folder should be")
    assert compile_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None
    warning = capsys.readouterr().err
    assert warning == f"warning: compiled programs are not kept: {cache_home}/tiue_jax/xla: Not a directory\n"


def test_a_folder_that_others_may_write_to_is_not_used(cache_home, capsys):
    folder = cache_home / "tiue_jax" / "xla"
    folder.mkdir(parents=True)
    for mode in (0o777, 0o770, 0o702, 0o1777):
        folder.chmod(mode)
        assert compile_cache.enable() is None and jax.config.jax_compilation_cache_dir is None
        warning = capsys.readouterr().err
        expected = f"{folder}: others may write to it (mode {mode:04o}), expected 0700: remove it"
        assert warning == f"warning: compiled programs are not kept: {expected}\n"
    folder.chmod(0o755)  # as older versions made it
    assert compile_cache.enable() == folder and folder.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == ""


def test_a_folder_of_somebody_else_is_not_used(cache_home, capsys, monkeypatch):
    folder = cache_home / "tiue_jax" / "xla"
    folder.mkdir(parents=True, mode=0o700)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert compile_cache.enable() is None and jax.config.jax_compilation_cache_dir is None
    warning = capsys.readouterr().err
    expected = f"{folder}: belongs to user {user} and not to {user + 1}, expected your own folder"
    assert warning == f"warning: compiled programs are not kept: {expected}\n"


def test_a_program_that_was_not_written_to_its_end_is_removed(cache_home):
    folder = cache_home / "tiue_jax" / "xla"
    folder.mkdir(parents=True, mode=0o700)
    for name in ("whole-1-cache", "whole-1-atime", "half-2-cache", "being_written-3-cache"):
        (folder / name).write_bytes(b"x")
    os.utime(folder / "half-2-cache", (0, 0))
    compile_cache.enable()
    assert sorted(path.name for path in folder.iterdir()) == ["being_written-3-cache", "whole-1-atime", "whole-1-cache"]


def test_a_user_without_a_home_is_a_warning_in_one_line(cache_home, capsys, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home(path):
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "expanduser", no_home)
    assert compile_cache.enable() is None
    assert capsys.readouterr().err == "warning: compiled programs are not kept: ~/.cache: no home folder for ~\n"


def test_training_has_a_flag_to_switch_it_off():
    given = ["train.py", f"--config={ROOT}/configs/emoji_tiue.py", "--workdir=runs/x"]
    assert train.read_flags(given).keep_compiled
    assert not train.read_flags([*given, "--no_compile_cache"]).keep_compiled


def test_the_second_run_of_a_command_does_not_compile(tmp_path):
    model = tiny.write_pipeline(tmp_path / "model", {"sampler": "tiue", "num_inference_steps": 1})
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "caches"), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # the tiny model compiles in less than the usual second

    def counts(*arguments, **variables):
        command = [
            sys.executable,
            "-m",
            "tests.programs.count_cache_hits",
            "--model",
            model,
            "--out",
            tmp_path / "a.png",
        ]
        done = subprocess.run(
            [*command, "--prompt", "red", *map(str, arguments)],
            cwd=ROOT,
            env=env | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "persistent compilation cache" not in done.stderr
        programs, _, found, _ = done.stdout.split()[-4:]
        return int(programs), int(found)

    def hits(*arguments, **variables):
        return counts(*arguments, **variables)[1]

    assert hits("--no_compile_cache", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "users")) == 0
    assert not (tmp_path / "users").exists() and not (tmp_path / "caches").exists()
    programs, found = counts()
    assert programs >= 1 and found == 0
    kept = sorted((tmp_path / "caches" / "tiue_jax" / "xla").glob("jit_text_to_images-*-cache"))
    assert len(kept) == 1
    again, found = counts("--prompt", "apple", "--batch_size", 1, "--seed", 3)
    print(f"the first run compiled {programs} programs, the second needed {again} and compiled {again - found}")
    assert again == found == programs  # nothing is compiled
    # a truncated program is compiled again, without a word, and replaced
    (program,) = kept
    whole = program.stat().st_size
    os.truncate(program, whole // 2)
    assert hits() == 0
    assert program.stat().st_size > 0.9 * whole
    assert hits() == 1


def test_sampling_imports_nothing_that_it_does_not_use(tmp_path):
    """Each of these takes from a tenth of a second to several seconds."""
    model = tiny.write_pipeline(tmp_path / "model", {"sampler": "tiue", "num_inference_steps": 1})
    flags = ["--model", str(model), "--prompt", "red", "--out", str(tmp_path / "a.png"), "--no_compile_cache"]
    command = [sys.executable, "-m", "tests.programs.sample_and_list_modules", *flags]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("modules:")[2].split())
    assert "tiue_jax.pipeline" in loaded and (tmp_path / "a.png").exists()
    unused = "transformers huggingface_hub torch tensorflow orbax tensorstore grain diffusers pandas pyarrow scipy"
    unused += " tiue_jax.training tiue_jax.plan tiue_jax.evaluate jax._src.pallas.mosaic.lowering"
    print(f"{len(loaded)} modules")
    assert not loaded & set(unused.split())
