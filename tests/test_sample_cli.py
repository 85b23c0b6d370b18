"""The command `tiue sample`."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tiue_jax import images
from tiue_jax.cli import sample
from tiue_jax.pipeline import Pipeline

STUDENT = {"sampler": "tiue", "num_inference_steps": 2, "timestep_spacing": "trailing"}
DDIM = ("--sampler", "ddim", "--num_inference_steps", 2, "--timestep_spacing", "linspace")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("tiny") / "student", STUDENT)


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline.from_pretrained(model)


@pytest.fixture
def cli(model, pipe, tmp_path, monkeypatch, capsys):
    """Runs the command in this process, in an empty folder: status, stdout, stderr. It loads `model` only once."""
    load = Pipeline.from_pretrained
    defaults = {"vae": None, "vae_dtype": None, "vae_tiling": None, "mesh_step": 1, "embeddings": []}

    def load_once(name, dtype, **how):
        return pipe if (name, dtype, how) == (str(model), "float32", defaults) else load(name, dtype, **how)

    monkeypatch.setattr(Pipeline, "from_pretrained", load_once)
    monkeypatch.chdir(tmp_path)

    def run(*args):
        status = sample.main(["sample.py", "--model", str(model), *map(str, args)])
        return status, *capsys.readouterr()

    return run


def test_one_image_with_its_metadata(cli, model, pipe):
    status, out, _ = cli("--prompt", "red apple", "--seed", 5, "--out", "apple.png")
    assert status == 0 and out.startswith("apple.png: 1 image in ")
    image, about = images.read_png("apple.png")
    np.testing.assert_array_equal(image, pipe(["red apple"], seed=5)[0])
    assert about == {
        "prompt": "red apple",
        "seed": "5",
        "model": str(model),
        "sampler": "tiue",
        "num_inference_steps": "2",
        "timestep_spacing": "trailing",
        "num_images_per_prompt": "1",
        "dtype": "float32",
        "software": "tiue-jax",
    }
    assert [path.name for path in Path().iterdir()] == ["apple.png"]


def test_grid_of_several_prompts_and_a_file(cli, pipe):
    Path("prompts.txt").write_text("apple\n\npear\n", encoding="utf-8")
    status, out, _ = cli(
        *("--prompt", "red", "--prompt_file", "prompts.txt", "--num_images_per_prompt", 2),
        *("--batch_size", 4, "--upscale", 2, "--out", "new/folder/grid.png"),
    )
    assert status == 0 and out.startswith("new/folder/grid.png: 6 images in ")
    image, about = images.read_png("new/folder/grid.png")
    whole = pipe(["red", "apple", "pear"], num_images_per_prompt=2, batch_size=4)
    np.testing.assert_array_equal(image, images.grid(images.enlarge(whole, 2), 2))  # a row for each prompt
    assert about["prompt"] == "red\napple\npear" and about["num_images_per_prompt"] == "2"


def test_negative_prompts_are_used_and_recorded(cli, pipe):
    guided = (*DDIM, "--guidance_scale", 3, "--prompt", "red", "--prompt", "apple")
    how = {"sampler": "ddim", "num_inference_steps": 2, "timestep_spacing": "linspace", "guidance_scale": 3.0}
    assert cli(*guided, "--negative_prompt", "pear", "--out", "grid.png")[0] == 0
    image, about = images.read_png("grid.png")
    np.testing.assert_array_equal(image, images.grid(pipe(["red", "apple"], **how, negative_prompt="pear"), None))
    assert about["negative_prompt"] == "pear"
    assert cli(*guided, "--negative_prompt", "pear", "--negative_prompt", "", "--out", "each")[0] == 0
    each = pipe(["red", "apple"], **how, negative_prompt=["pear", ""])
    for i, negative in enumerate(["pear", None]):
        image, about = images.read_png(f"each/0000{i}.png")
        np.testing.assert_array_equal(image, each[i])
        assert about.get("negative_prompt") == negative


def test_lines_of_a_prompt_file_are_not_changed(cli, pipe):
    Path("prompts.json").write_text("red  apple\nred\nred  apple\n", encoding="utf-8")
    assert cli("--prompt_file", "prompts.json", "--out", "images")[0] == 0
    for i, want in enumerate(pipe(["red  apple", "red", "red  apple"])):
        image, about = images.read_png(f"images/{i:05d}.png")
        np.testing.assert_array_equal(image, want)
        assert about["prompt"] == ("red" if i == 1 else "red  apple")


def test_metadata_of_the_decoder(cli):
    how = ("--vae_tiling", "--tile_sample_min_size", 8, "--upscale", 2, "--vae_dtype", "bfloat16")
    assert cli("--prompt", "red", *how, "--out", "a.png")[0] == 0
    about = images.read_png("a.png")[1]
    told = {"vae_tiling": "True", "tile_sample_min_size": "8", "upscale": "2", "vae_dtype": "bfloat16"}
    assert {name: about.get(name) for name in told} == told


def test_images_that_are_not_finite_are_an_error(cli):
    prompts = ("--prompt", "red", "--prompt", "apple", "--prompt", "pear")
    status, _, error = cli(*prompts, *DDIM, "--guidance_scale", "3e38", "--out", "a.png")
    assert status == 2 and error.count("error: ") == 1  # below the progress bar
    assert error.splitlines()[-1].startswith("error: image 0 of prompt 'red' is not finite")
    status, _, error = cli(*prompts, *DDIM, "--guidance_scale", "nan", "--out", "a.png")
    assert status == 2 and "guidance_scale must be a finite number or None, got nan" in error
    assert list(Path().iterdir()) == []


def test_ctrl_c(cli, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "from_pretrained", interrupted)
    assert cli("--prompt", "red", "--out", "a.png")[0] == 130


def test_single_files(cli, pipe):
    prompts = ("--prompt", "red", "--prompt", "red", "--prompt", "")
    status, out, _ = cli(*prompts, *DDIM, "--guidance_scale", 3, "--out", "images")
    assert status == 0 and out.startswith("images: 3 images in ")
    assert sorted(path.name for path in Path("images").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    whole = pipe(
        ["red", "red", ""], sampler="ddim", num_inference_steps=2, guidance_scale=3.0, timestep_spacing="linspace"
    )
    for i, (prompt, number) in enumerate([("red", "0"), ("red", "1"), ("", "0")]):
        image, about = images.read_png(f"images/{i:05d}.png")
        np.testing.assert_array_equal(image, whole[i])
        assert (about["prompt"], about["image_number"], about["guidance_scale"]) == (prompt, number, "3.0")


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_given_latents_in_our_layout_or_in_pytorchs(cli, pipe, axes):
    latents = np.random.default_rng(0).standard_normal((3, 8, 8, 4), np.float32)
    np.save("noise.npy", latents.transpose(axes))
    prompts = ("--prompt", "red", "--prompt", "apple", "--prompt", "pear")
    assert cli(*prompts, "--latents", "noise.npy", "--out", "images")[0] == 0
    for i, want in enumerate(pipe(["red", "apple", "pear"], latents=latents)):
        image, about = images.read_png(f"images/{i:05d}.png")
        np.testing.assert_array_equal(image, want)
        assert about["latents"] == "noise.npy"


def test_key_steps(cli):
    how = ("--sampler", "faster_diffusion", "--num_inference_steps", 3, "--guidance_scale", 1)
    for given in ("0,2", "2"):
        assert cli("--prompt", "red", *how, "--key_steps", given, "--out", "a.png")[0] == 0
        assert images.read_png("a.png")[1]["key_steps"] == "(0, 2)"


def test_long_prompts_are_warned_about(cli, caplog):
    with caplog.at_level(logging.WARNING, logger="tiue_jax"):
        status, _, _ = cli("--prompt", "red apple pear red", "--out", "a.png")
    assert status == 0 and "ignored: 'red'" in caplog.text


def write_broken_latents():
    for name, latents in (
        ("cut", np.zeros((1, 8, 8, 4), np.float32)),
        ("flat", np.zeros((8, 8, 4), np.float32)),
        ("three", np.zeros((1, 8, 8, 3), np.float32)),
        ("both", np.zeros((1, 4, 4, 4), np.float32)),
        ("two", np.zeros((2, 4, 8, 8), np.float32)),
        ("double", np.zeros((1, 8, 8, 4), np.float64)),
        ("nan", np.full((1, 8, 8, 4), np.nan, np.float32)),
        ("objects", np.array([{}])),
    ):
        np.save(f"{name}.npy", latents)
    with open("cut.npy", "r+b") as file:
        file.truncate(600)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "emoji-tieu"], "unknown model 'emoji-tieu'"),
        (["--model", "."], "no model_index.json"),
        (["--out", "file.txt/a.png"], "file.txt is not a folder"),
        (["--out", "file.txt/folder"], "file.txt is not a folder"),
        (["--out", "folder.png"], "folder.png: cannot write: a folder"),
        (["--out", "a.jpg"], "out must end in .png or be a folder, got 'a.jpg'"),
        (["--prompt_file", "empty.txt"], "empty.txt: expected at least one prompt"),
        (["--prompt_file", "latin1.txt"], "latin1.txt"),
        (["--prompt_file", "absent.txt"], "absent.txt"),
        (["--prompt_file", "/dev/zero"], "/dev/zero: a device, expected a file"),
        (
            ["--prompt_file", "table.csv", "--field", "title"],
            "no field 'title'; its fields are caption ('a cat'), x ('1')",
        ),
        (["--prompt", "caf\udce9"], r"prompt must be UTF-8 text, got b'caf\xe9'"),
        (["--num_inference_steps", "0"], "num_inference_steps must be an integer between 1 and 1000000 or None, got 0"),
        (["--num_inference_steps", "1001"], "between 1 and 1000, got 1001"),
        (["--num_inference_steps", "four"], "num_inference_steps"),
        (["--num_images_per_prompt", "0"], "num_images_per_prompt must be an integer >= 1, got 0"),
        (["--height", "15"], "height must be a positive multiple of the VAE's factor 2, got 15"),
        (["--width", "-2"], "width must be an integer between 1 and 65536, got -2"),
        (["--seed", "-1"], "seed must be an integer between 0 and 4294967295, got -1"),
        (["--sampler", "euler"], "sampler"),
        (["--guidance_scale", "3"], "guidance_scale is a setting of samplers"),
        (["--sampler", "lcm", "--timestep_spacing", "leading"], "timestep_spacing is a setting of samplers"),
        (
            ["--negative_prompt", "blurry"],
            "no effect without a guidance_scale above 1 with one of the samplers",
        ),
        (["--negative_prompt", "a", "--negative_prompt", "b"], "one for each prompt, got a list of 2"),
        (["--negative_prompt", "caf\udce9"], r"negative_prompt must be UTF-8 text, got b'caf\xe9'"),
        (["--key_steps", "2"], "key_steps is a setting of samplers ['faster_diffusion'], got 2 with 'tiue'"),
        (["--sampler", "faster_diffusion", "--key_steps", "0,two"], "key_steps must be whole numbers, got '0,two'"),
        (["--latents", "absent.npy"], "absent.npy"),
        (["--latents", "file.txt"], "file.txt: expected a whole .npy file of numbers"),
        (["--latents", "cut.npy"], "cut.npy: expected a whole .npy file of numbers"),
        (["--latents", "objects.npy"], "objects.npy: expected a whole .npy file of numbers"),
        (["--latents", "flat.npy"], "flat.npy: expected latents [n h w 4] or PyTorch's [n 4 h w], got [8 8 4]"),
        (["--latents", "three.npy"], "three.npy: expected latents [n h w 4] or PyTorch's [n 4 h w], got [1 8 8 3]"),
        (["--latents", "both.npy"], "both.npy: [1 4 4 4] may be [n h w c] or [n c h w]"),
        (
            ["--latents", "two.npy"],
            "latents must be float32 [1 8 8 4], [n h w c] with one for each image, got float32 [2",
        ),
        (["--latents", "double.npy"], "got float64 [1 8 8 4]"),
        (["--latents", "nan.npy"], "latents must be finite, got nan at [0, 0, 0, 0]"),
        (["--dtype", "int8"], "dtype"),
        (["--mesh_step", "2"], "must multiply to the number of devices, 1, got data=-1, fsdp=1, step=2"),
        (["--columns", "0"], "columns must be an integer >= 1 or None, got 0"),
        (["--upscale", "0"], "upscale must be an integer >= 1, got 0"),
        (["--stpes", "4"], "stpes"),
        (["apple"], "unexpected argument 'apple'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(cli, args, message):
    Path("file.txt").write_text("red\n")
    Path("empty.txt").write_text("\n \n")
    Path("latin1.txt").write_bytes(b"caf\xe9\n")
    Path("table.csv").write_text("caption,x\na cat,1\n")
    Path("folder.png").mkdir()
    write_broken_latents()
    before = sorted(Path().rglob("*"))
    prompt = [] if "--prompt_file" in args else ["--prompt", "red"]
    status, out, err = cli(*prompt, "--out", "a.png", *args)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(Path().rglob("*")) == before


def test_no_prompt_at_all(cli):
    assert cli("--out", "a.png")[::2] == (2, "error: no prompt: expected --prompt or --prompt_file\n")


def test_failing_in_the_middle_leaves_no_file(cli, pipe, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    status, _, err = cli("--prompt", "red apple", "--out", "a.png")
    assert status == 2 and err == "error: [Errno 28] cannot write: No space left on device: 'a.png'\n"
    assert list(Path().iterdir()) == []


def test_as_a_command(tmp_path):
    script = Path(__file__).parents[1] / "sample.py"

    def run(*args):
        return subprocess.run([sys.executable, script, *args], cwd=tmp_path, capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0 and "--num_inference_steps" in shown.stdout
    failed = run("--prompt", "red", "--model", "nope")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("error: unknown model 'nope'") and failed.stderr.count("\n") == 1
