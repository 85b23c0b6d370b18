"""`tiue env`: versions, devices and settings. No secret is printed, and a JAX that does not start is reported."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from tiue_jax.cli import env
from tiue_jax.cli.main import main

SECRETS = {
    "HF_TOKEN": "hf_QwErTyUiOpAsDf",
    "WANDB_API_KEY": "0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "DB_PASSWORD": "correct horse",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key-of-the-project.json",
}


def settings(environment: dict[str, str]) -> dict[str, str]:
    """The group "environment", without asking for devices."""
    clean = {name: environment[name] for name in env.VARIABLES if name in environment}
    return {name: env.without_secrets(value, environment) for name, value in clean.items()}


def test_versions_devices_and_settings(capsys, monkeypatch):
    monkeypatch.setenv("TIUE_MODELS", os.path.expanduser("~/models"))
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    assert main(["tiue", "env", "--json"]) == 0
    out = capsys.readouterr().out
    facts = json.loads(out)
    assert facts["packages"]["jax"] == importlib.metadata.version("jax")
    assert facts["devices"]["backend"] == "cpu" and facts["devices"]["devices"].endswith(" x cpu")
    assert facts["environment"]["TIUE_MODELS"] == "~/models" and facts["environment"]["JAX_PLATFORMS"] == "cpu"
    assert facts["system"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert SECRETS["HF_TOKEN"] not in out and "HF_TOKEN" not in out
    lines = env.report(facts).splitlines()
    assert "devices" in lines and "  backend: cpu" in lines and max(map(len, lines)) < 1000


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ImportError('no libjax')", "JAX did not start: ImportError: no libjax"),
        ("import os; os.abort()", "JAX did not start: status -6"),
        ("import time; time.sleep(60)", "JAX did not start within 2 s; another process may use the devices"),
        ("def local_devices(): raise RuntimeError('no TPU')\nconfig = None", "JAX did not start: "),
    ],
)
def test_a_jax_that_does_not_start_is_one_line(tmp_path, code, message):
    (tmp_path / "jax.py").write_text(code)
    facts = env.collect({**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=2)
    assert list(facts["devices"]) == ["error"] and facts["devices"]["error"].startswith(message)
    assert "\n" not in facts["devices"]["error"] and facts["packages"]["numpy"]


def test_the_command_reports_a_platform_that_is_missing():
    command = [sys.executable, "-m", "tiue_jax", "env"]
    broken = {**os.environ, "JAX_PLATFORMS": "abacus"}
    done = subprocess.run(command, env=broken, capture_output=True, text=True, check=True)
    assert "error: JAX did not start: " in done.stdout and "abacus" in done.stdout and done.stderr == ""


def test_no_module_of_the_current_folder_is_imported(tmp_path, monkeypatch):
    (tmp_path / "jax.py").write_text("open('touched', 'w').close()")
    monkeypatch.chdir(tmp_path)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env.collect(clean)
    assert not (tmp_path / "touched").exists()


def test_secrets_are_never_printed():
    shown = settings(
        {
            **SECRETS,
            "HOME": "/home/me",
            "HF_HOME": "/home/me/.cache/hf",
            "TMPDIR": "/home/media",
            "HF_ENDPOINT": "https://me:letmein@hub.local/api?sig=abc",
            "HTTPS_PROXY": "http://user:pass@proxy:3128",
            "XLA_FLAGS": f"--xla_dump_to=/tmp/{SECRETS['WANDB_API_KEY']}",
            "JAX_COMPILATION_CACHE_DIR": "gs://bucket/hf_0123456789",
        }
    )
    text = " ".join(shown.values())
    for secret in [*SECRETS.values(), "letmein", "sig=abc", "user:pass", "hf_0123456789", "/home/me/"]:
        assert secret not in text
    assert shown["HF_HOME"] == "~/.cache/hf" and shown["TMPDIR"] == "/home/media"
    assert shown["HF_ENDPOINT"] == "https://(hidden)@hub.local/api?(hidden)"
    assert shown["XLA_FLAGS"] == "--xla_dump_to=/tmp/(hidden)"
    print(f"{len(SECRETS)} secrets and 2 passwords in {len(shown)} settings: none printed")


def test_every_variable_that_is_printed_may_be_printed():
    assert len(set(env.VARIABLES)) == len(env.VARIABLES)
    for word in ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL"):
        assert [name for name in env.VARIABLES if word in name] == []


def test_an_unknown_flag_is_one_line(capsys):
    assert main(["tiue", "env", "--what"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --what, see --help\n"
