"""The compiled sampler makes the images of the pipeline, from a folder that runs without this package."""

import importlib.util
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections import Counter

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from tests import devices, tiny
from tests.programs.run_compiled_sampler import PROMPTS, SEED
from tiue_jax.cli import convert as convert_main
from tiue_jax.convert import export_compiled, inspect_model
from tiue_jax.convert.compiled_sampler import Sampler
from tiue_jax.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    student = {"sampler": "tiue", "num_inference_steps": 2, "timestep_spacing": "trailing"}
    return Pipeline.from_pretrained(tiny.write_pipeline(tmp_path_factory.mktemp("tiny") / "student", student))


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("compiled") / "any"
    export_compiled.export_compiled(pipe, out)
    return out


def test_without_this_package_it_gives_the_pipelines_images_bit_for_bit(pipe, folder, tmp_path):
    files = {path.name for path in folder.iterdir()}
    assert files == {"compiled.json", "sampler.py", "tokenizer.json", "weights.safetensors"} | {
        f"sampler.{name}.jax_export" for name in ("cpu", "cuda", "tpu")
    }
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "compiled.json").stat().st_mode}
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    program = [sys.executable, "-m", "tests.programs.run_compiled_sampler", elsewhere, tmp_path / "images.npy"]
    subprocess.run(program, check=True, cwd=devices.ROOT)
    got = np.load(tmp_path / "images.npy")
    np.testing.assert_array_equal(got, pipe(PROMPTS, seed=SEED))
    assert len(np.unique(got.reshape(3, -1), axis=0)) == 3


def program(folder, platform):
    return jax.export.deserialize(bytearray((folder / f"sampler.{platform}.jax_export").read_bytes()))


def test_it_is_lowered_for_every_platform(folder):
    assert [program(folder, name).platforms for name in ("cpu", "cuda", "tpu")] == [("cpu",), ("cuda",), ("tpu",)]
    manifest = json.loads((folder / "compiled.json").read_text())
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"] and manifest["batch_size"] is None
    assert manifest["sampling"] == {"sampler": "tiue", "num_inference_steps": 2, "timestep_spacing": "trailing"}
    names = set(load_file(folder / "weights.safetensors"))
    assert "vae/decoder/conv_in/kernel" in names and not any(name.startswith("vae/encoder") for name in names)


def test_inspect_says_what_it_is(folder):
    report = inspect_model.inspect(folder)
    assert report.kind == "a compiled sampler of tiue convert export-compiled"
    assert {"sampler: tiue", "platforms: ['cpu', 'cuda', 'tpu']"} < set(report.notes)


def test_large_images_keep_the_attention_kernel_of_tpus(pipe, tmp_path):
    # 1,024 tokens, any batch
    export_compiled.export_compiled(pipe, tmp_path / "out", height=64, width=64, platforms=["tpu"])
    assert "tpu_custom_call" in program(tmp_path / "out", "tpu").mlir_module()


def test_bfloat16_weights_and_a_tiny_autoencoder(pipe, tmp_path):
    vae = tiny.write_tiny_vae(tmp_path / "vae")
    half = Pipeline.from_pretrained(pipe.name, "bfloat16", vae=vae)
    with jax.numpy_dtype_promotion("standard"):
        export_compiled.export_compiled(half, tmp_path / "out", batch_size=1, platforms=["cpu"])
        sampler = Sampler(tmp_path / "out")
        np.testing.assert_array_equal(sampler(["red"]), half(["red"]))
    assert set(sampler.manifest["dtype"].values()) == {"bfloat16"}
    assert {x.dtype.name for x in load_file(tmp_path / "out" / "weights.safetensors").values()} == {"bfloat16"}


def test_fixed_batches_are_filled_up_and_latents_and_guidance_are_arguments(pipe, tmp_path, caplog):
    how = {"sampler": "ddim", "num_inference_steps": 2, "guidance_scale": 3.0}
    export_compiled.export_compiled(pipe, tmp_path / "two", batch_size=2, height=12, width=20, platforms=["cpu"], **how)
    sampler = Sampler(tmp_path / "two")
    size = {"height": 12, "width": 20, "batch_size": 2}
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        got = sampler(PROMPTS)
    assert "Compiling" in caplog.text
    np.testing.assert_array_equal(got, pipe(PROMPTS, **how, **size))
    latents = np.random.default_rng(0).standard_normal((2, 6, 10, 4), np.float32)
    given = {"latents": latents, "num_images_per_prompt": 2, "guidance_scale": 5.0}
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        got = sampler(["red"], **given)
    assert "Compiling" not in caplog.text
    np.testing.assert_array_equal(got, pipe(["red"], **{**how, **size, **given}))

    for negative in ("pear", ["pear", "apple", "b"]):
        got = sampler(PROMPTS, negative_prompt=negative)
        want = pipe(PROMPTS, **how, **size, negative_prompt=negative)
        assert np.abs(got.astype(int) - want).max() <= 1 and np.abs(got.astype(int) - sampler(PROMPTS)).max() > 4
    with pytest.raises(ValueError, match="negative_prompt has no effect at guidance_scale 1.0, expected above 1"):
        sampler(["red"], negative_prompt="pear", guidance_scale=1.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": []}, r"at least one text, got \[\]"),
        ({"seed": -1}, "seed must be between 0 and 4294967295, got -1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be >= 1, got 0"),
        ({"guidance_scale": 2.0}, "compiled without guidance, got 2.0"),
        ({"negative_prompt": "b"}, "negative_prompt has no effect without guidance, and this sampler has none"),
        ({"negative_prompt": ["", ""]}, "negative_prompt must be one text or a list of 1, got a list of 2"),
        (
            {"latents": np.zeros((1, 4, 8, 8), np.float32)},
            r"latents must be float32 \[1, 8, 8, 4\], got .*\[1, 4, 8, 8\]",
        ),
    ],
)
def test_wrong_arguments_are_named(folder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sampler(folder)(**{"prompts": ["red"], **kwargs})


def test_a_long_prompt_is_cut_as_the_pipeline_cuts_it(pipe, folder):
    sampler = Sampler(folder)
    for prompt in ("red apple pear red", "", "red"):
        np.testing.assert_array_equal(sampler.tokenize(prompt), pipe.tokenize([prompt])[0])


def test_broken_folders_are_named(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    manifest = json.loads((broken / "compiled.json").read_text())
    (broken / "compiled.json").write_text(json.dumps(manifest | {"platforms": ["tpu"]}))
    with pytest.raises(ValueError, match="broken: compiled for tpu, got cpu"):
        Sampler(broken)
    (broken / "compiled.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match="compiled.json: format must be 3, got 2; export the sampler again"):
        Sampler(broken)
    (broken / "compiled.json").write_text(json.dumps(manifest))
    (broken / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights.safetensors: no such file"):
        Sampler(broken)


MISFITS = {
    "format": [None, "3", 3.5, []],
    "platforms": [None, "cpu", [], [3]],
    "guided": [None, 1, "yes"],
    "guidance_scale": [None, "7", float("nan"), float("inf"), True, 10**400],
    "batch_size": [0, -1, 1.5, "8", 7],
    "latents": [None, 8, [8, 8], [8, 8, 0], [8, "8", 4], [8, 8, 5], [10**9, 8, 4]],
    "context": [None, 0, "8", 9, 10**9, 8.5],
    "pad_token_id": [None, -1, 10**10, "0"],
    "crc32": [None, [], {}, {"weights.safetensors": "x"}],
}


def test_every_damaged_file_is_one_line_and_no_image(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "compiled")
    rng, outcomes = random.Random(0), Counter()
    manifest = json.loads((copy / "compiled.json").read_text())
    spec = importlib.util.spec_from_file_location("sampler", copy / "sampler.py")
    sampler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sampler)
    out = tmp_path / "a.png"

    def run(name, kind):
        status = sampler.main(["sampler.py", "--prompt", "red", "--no_compile_cache", "--out", str(out)])
        lines = capsys.readouterr().err.splitlines()
        assert status == 2 and len(lines) == 1, (name, kind, status, lines)
        assert lines[0].startswith(f"error: {copy}") and len(lines[0]) <= 607 and not out.exists()
        outcomes["named" if f"{copy / name}: " in lines[0] else "folder named"] += 1

    for name in ("tokenizer.json", "weights.safetensors", "sampler.cpu.jax_export", "compiled.json"):
        whole = (copy / name).read_bytes()
        contents = {"missing": None, "empty": b"", "cut": whole[: len(whole) // 2], "zeros": bytes(len(whole))}
        contents |= {"text": b"no", "nested": b'{"a":' * 99999, "digits": b'{"format":' + b"1" * 5000 + b"}"}
        if name != "compiled.json":
            for place in rng.sample(range(len(whole)), 20):
                contents[place] = whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
        for kind, content in contents.items():
            (copy / name).unlink()
            if content is not None:
                (copy / name).write_bytes(content)
            else:
                (copy / name).mkdir()
            run(name, kind)
            if content is None:
                (copy / name).rmdir()
            (copy / name).write_bytes(whole)
    whole = (copy / "compiled.json").read_bytes()
    for field, values in MISFITS.items():
        for value in values:
            (copy / "compiled.json").write_text(json.dumps(manifest | {field: value}))
            run("compiled.json", (field, value))
    crc = manifest["crc32"]
    for name, content in (  # whole files of something else, whose checksums fit
        ("tokenizer.json", b"{}"),
        ("weights.safetensors", save({"x": np.zeros(3, np.float32)})),
        ("sampler.cpu.jax_export", b"no program"),
    ):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        changed = {"crc32": crc | {name: zlib.crc32(content)}}
        (copy / "compiled.json").write_text(json.dumps(manifest | changed))
        run(name, "another file")
        (copy / name).write_bytes(before)
    (copy / "compiled.json").write_bytes(whole)
    print(dict(outcomes))
    assert outcomes["named"] > 100 and Sampler(copy).manifest == manifest


def test_bad_arguments_of_the_export_write_nothing(pipe, folder, tmp_path):
    for kwargs, message in (
        ({"platforms": ["cpu", "metal"]}, r"platforms must be among \['cpu', 'cuda', 'tpu'\], got \['cpu', 'metal'\]"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"height": 15}, "height must be a positive multiple of the VAE's factor 2, got 15"),
        ({"sampler": "euler"}, "sampler must be among"),
    ):
        with pytest.raises(ValueError, match=message):
            export_compiled.export_compiled(pipe, tmp_path / "new", **kwargs)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileExistsError, match="any: exists, expected a new folder"):
        export_compiled.export_compiled(pipe, folder)


def test_command_line(pipe, tmp_path, capsys):
    command, out = ["convert", "export-compiled", "--model", pipe.name], tmp_path / "out"
    assert convert_main.main(command) == 2
    assert capsys.readouterr().err == "error: --out is missing, see --help\n"
    assert convert_main.main([*command, "--out", str(out), "--batch_size", "1", "--platforms", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: {pipe.name} for cpu")
    script, prompts = [sys.executable, str(out / "sampler.py")], ["--prompt", "red", "--prompt", "pear"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "caches"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def call(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*script, *more], env=env, capture_output=True, text=True)

    done = call(*prompts, "--out", str(tmp_path / "a.png"), "--no_compile_cache")
    assert done.returncode == 0 and done.stdout.split() == [str(tmp_path / f"a-{i}.png") for i in (0, 1)]
    assert not (tmp_path / "caches").exists()
    assert call(*prompts, "--out", str(tmp_path / "b.png")).returncode == 0
    assert list((tmp_path / "caches" / "tiue_jax" / "xla").glob("*-cache"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--seed", "-1"), "seed must be"),
        (("--out", "image"), "out must end in .png, got 'image'"),
        (("--out", "nowhere/a.png"), "nowhere/a.png: no folder nowhere"),
        (("--seed", "x"), "argument --seed: invalid int value: 'x'"),
        (("--what",), "unrecognized arguments: --what"),
    ],
)
def test_bad_command_lines_of_the_sampler(folder, capsys, wrong, message):
    spec = importlib.util.spec_from_file_location("sampler", folder / "sampler.py")
    sampler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sampler)
    assert sampler.main(["sampler.py", "--prompt", "red", "--no_compile_cache", *wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_the_command_line_exports_what_the_pipeline_can_do(pipe, tmp_path):
    out = tmp_path / "out"
    call = ["convert", "export-compiled", "--model", str(pipe.name), "--out", str(out), "--platforms", "cpu"]
    how = {"sampler": "faster_diffusion", "num_inference_steps": 3, "timestep_spacing": "trailing"}
    flags = [f"--{name}={value}" for name, value in how.items()]
    with jax.numpy_dtype_promotion("standard"):
        assert convert_main.main([*call, *flags, "--key_steps=0,2", "--vae_dtype=bfloat16", "--vae_tiling"]) == 0
    manifest = json.loads((out / "compiled.json").read_text())
    assert manifest["sampling"] == {**how, "guidance_scale": 7.5, "key_steps": [0, 2]}
    assert manifest["dtype"] == {"text_encoder": "float32", "unet": "float32", "vae": "bfloat16"}
