"""The command `tiue evaluate`: results, report, resume, references, comparison and bad input."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests import tiny
from tiue_jax import images
from tiue_jax.cli import evaluate as command
from tiue_jax.cli.command_line import parse
from tiue_jax.evaluate import extractors, generate, pixels
from tiue_jax.evaluate.image_sources import DatasetImages, ImageFolder
from tiue_jax.evaluate.pixels import Resize
from tiue_jax.evaluate.protocols import PROTOCOLS
from tiue_jax.pipeline import Pipeline

DDIM = {"sampler": "ddim", "num_inference_steps": 1, "timestep_spacing": "linspace"}
PROMPTS = ("red", "apple", "pear", "ape")
EACH = 3  # images of a prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("tiny") / "teacher", DDIM)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Twelve images in a folder, one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("reference") / "real"
    pixels_of = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    for i, image in enumerate(pixels_of):
        path = folder / ("more" if i == 3 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images.write_png(path, image)
    return folder


@pytest.fixture(scope="module")
def shared():
    """The pipeline and the extractor, which are loaded and compiled once for all tests."""
    return {"pipelines": {}, "extractors": {}}


@pytest.fixture
def cli(model, shared, tmp_path, monkeypatch, capsys):
    """Runs the command in this process, in an empty folder: status, stdout, stderr."""
    load, load_extractor = Pipeline.from_pretrained, extractors.load

    def pipeline(name, dtype="float32"):
        if name not in shared["pipelines"]:
            shared["pipelines"][name] = load(name, dtype)
        return shared["pipelines"][name]

    def extractor(source, *resize):
        if (source, *resize) not in shared["extractors"]:
            shared["extractors"][source, *resize] = load_extractor(source, *resize)
        return shared["extractors"][source, *resize]

    monkeypatch.setattr(Pipeline, "from_pretrained", pipeline)
    monkeypatch.setattr(extractors, "load", extractor)
    monkeypatch.setattr(generate, "CHUNK", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def run(*args):
        status = command.main(["tiue evaluate", *map(str, args)])
        return status, *capsys.readouterr()

    return run


def usual(model, *more):
    """The arguments of an evaluation of 12 images."""
    return ("--model", model, "--prompt_file", "prompts.txt", "--num_images_per_prompt", EACH, "--out", "out", *more)


def results() -> dict:
    with open("out/results.json", encoding="utf-8") as file:
        return json.load(file)


def refused(answer, *words) -> None:
    status, _, err = answer
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and len(err) <= 600, err
    for word in words:
        assert str(word) in err, err


def test_results_and_report(cli, model, reference, tmp_path):
    status, out, err = cli(*usual(model, "--reference", reference))
    assert status == 0, err
    found = results()
    metrics = found["points"][0]["metrics"]["clip"]
    assert {"frechet_distance", "kid", "cmmd", "precision", "recall", "density", "coverage"} <= metrics.keys()
    assert {"near_copies", "clip_score", "retrieval", "diversity"} <= metrics.keys()
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in metrics.values())
    assert metrics["frechet_distance"]["low"] < metrics["frechet_distance"]["high"]
    assert "too few for the rank" in out and "needs 129 or more" in out
    assert len(list((tmp_path / "out/teacher/images").iterdir())) == len(PROMPTS) * EACH
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # random, best, worst
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the report needs no other file"
    for word in ("Fréchet distance", "apple", found["prompts"]["sha256"], "PIL bicubic"):
        assert word in page


def test_an_image_depends_on_its_number_and_prompt_only(cli, model, tmp_path, shared):
    assert cli(*usual(model))[0] == 0
    pipeline = shared["pipelines"][str(model)]
    latents = generate.noise([5], pipeline.latents_shape())
    expected = pipeline([PROMPTS[5 // EACH]], latents=latents)[0]
    made, _ = images.read_png(tmp_path / "out/teacher/images/000005.png")
    assert np.abs(made.astype(int) - expected).max() <= 1  # another batch size rounds in another way


def test_a_killed_run_goes_on_with_the_same_results(cli, model, tmp_path, monkeypatch):
    assert cli(*usual(model))[0] == 0
    whole = results()["points"][0]["metrics"]
    chunks = sorted((tmp_path / "out/teacher/chunks").iterdir())
    chunks[1].unlink()
    chunks[2].write_bytes(chunks[2].read_bytes()[:100])  # cut off, as no run leaves it but a disk may
    made = []
    noise = generate.noise
    monkeypatch.setattr(generate, "noise", lambda numbers, *more: made.append(list(numbers)) or noise(numbers, *more))
    assert cli(*usual(model))[0] == 0
    assert made == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert results()["points"][0]["metrics"] == whole


def test_another_evaluation_in_the_folder_is_refused(cli, model):
    assert cli(*usual(model))[0] == 0
    refused(cli(*usual(model, "--num_images_per_prompt", 2)), "out/teacher", "num_images 12, got 8")
    refused(cli(*usual(model, "--num_inference_steps", 3)), "sampling", "another folder as --out")


def test_another_seed_draws_other_images_of_the_same_protocol(cli, model, tmp_path):
    for seed in (0, 1):
        assert cli(*usual(model, "--seed", seed), "--out", f"seed-{seed}")[0] == 0
    first, second = (images.read_png(tmp_path / f"seed-{seed}/teacher/images/000000.png")[0] for seed in (0, 1))
    assert np.abs(first.astype(int) - second).max() > 5
    assert cli("compare", "seed-0/results.json", "seed-1/results.json")[0] == 0
    refused(cli(*usual(model, "--seed", 1), "--out", "seed-0"), "seed 0, got 1")
    refused(cli(*usual(model, "--seed", -1)), "--seed must be 0 or more, got -1")


def test_images_of_a_model_that_has_changed_since_are_refused(cli, model, tmp_path, shared):
    changed = tmp_path / "models" / "teacher"
    shutil.copytree(model, changed)
    assert cli(*usual(changed))[0] == 0
    weights = changed / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: -array for name, array in load_file(weights).items()}, weights)
    del shared["pipelines"][str(changed)]
    refused(cli(*usual(changed)), "model's vae", "another folder as --out")


def test_features_are_kept_without_images(cli, model, tmp_path):
    assert cli(*usual(model, "--nokeep_images"))[0] == 0
    assert not (tmp_path / "out/teacher/images").exists()
    assert cli(*usual(model))[0] == 0
    assert len(list((tmp_path / "out/teacher/images").iterdir())) == len(PROMPTS) * EACH


def test_a_curve_over_guidance_has_a_plot(cli, model, reference, tmp_path):
    assert cli(*usual(model, "--guidance_scales", "1,3", "--reference", reference))[0] == 0
    labels = [point["label"] for point in results()["points"]]
    assert labels == ["teacher, guidance 1", "teacher, guidance 3"]
    page = (tmp_path / "out/report.html").read_text()
    assert "<svg" in page and "precision against recall" in page and "teacher, guidance 3" in page
    assert page.count("<polyline") >= 1  # joins the points of one model


def test_statistics_in_a_file_give_the_same_distances(cli, model, reference, tmp_path):
    assert cli("statistics", "--reference", reference, "--extractor", "emoji-clip", "--out", "real.npz")[0] == 0
    assert cli(*usual(model, "--reference", reference))[0] == 0
    of_folder = results()["points"][0]["metrics"]
    assert cli(*usual(model, "--reference", "real.npz"))[0] == 0
    assert results()["points"][0]["metrics"] == of_folder
    refused(cli(*usual(model, "--reference", "real.npz", "--resize", 8), "--out", "new"), "real.npz", "resize")
    with np.load("real.npz") as file:
        np.savez("clean.npz", mu=file["mu"], sigma=file["sigma"])  # as clean-fid publishes them
    refused(cli(*usual(model, "--reference", "clean.npz")), "another extractor than clip")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    refused(cli(*usual(model, "--reference", "broken.npz")), "broken.npz")
    again = cli("statistics", "--reference", "clean.npz", "--extractor", "emoji-clip", "--out", "again.npz")
    refused(again, "real images", "clean.npz")


def test_real_images_in_an_array(cli, model, reference, tmp_path):
    folder = ImageFolder(reference)
    np.save("real.npy", folder.read(0, len(folder), Resize()))
    assert cli(*usual(model, "--reference", reference))[0] == 0
    of_folder = results()["points"][0]["metrics"]
    assert cli(*usual(model, "--reference", "real.npy"))[0] == 0
    assert results()["points"][0]["metrics"] == of_folder
    np.save("gray.npy", np.zeros((3, 8, 8), np.uint8))
    refused(cli(*usual(model, "--reference", "gray.npy")), "gray.npy", "[3 8 8]")


def write_dataset(folder, paths, file_format="array_record", feature="image"):
    """Writes a data set of images as tensorflow-datasets does, with the split "validation"."""
    import tensorflow_datasets as tfds

    folder.mkdir()
    identity = tfds.core.dataset_info.DatasetIdentity("real", tfds.core.Version("1.0.0"), str(folder), __name__)
    features = tfds.features.FeaturesDict({feature: tfds.features.Image(), "label": tfds.features.Text()})
    info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
    writer = tfds.core.SequentialWriter(info, 5, file_format=file_format)
    writer.initialize_splits(["validation"])
    writer.add_examples({"validation": [{feature: path.open("rb"), "label": "x"} for path in paths]})
    writer.close_all()


def test_real_images_of_a_data_set(cli, model, reference, tmp_path):
    write_dataset(tmp_path / "set", ImageFolder(reference).files)
    assert cli(*usual(model, "--reference", reference))[0] == 0
    of_folder = results()["points"][0]["metrics"]
    assert cli(*usual(model, "--reference", "set"))[0] == 0
    assert results()["points"][0]["metrics"] == of_folder
    out_of_order = DatasetImages(tmp_path / "set", "validation")
    assert (out_of_order.read(7, 9, Resize()) == ImageFolder(reference).read(7, 9, Resize())).all()
    refused(cli(*usual(model, "--reference", "set", "--reference_split", "train")), "['validation'], got 'train'")
    (tmp_path / "torn.png").write_bytes(b"torn")
    write_dataset(tmp_path / "torn", [*ImageFolder(reference).files[:2], tmp_path / "torn.png"])
    refused(cli(*usual(model, "--reference", "torn")), "1 files (2) cannot be read as images")


def test_features_of_real_images_are_cached_by_content(cli, model, reference, monkeypatch):
    assert cli(*usual(model, "--reference", reference))[0] == 0
    monkeypatch.setattr(ImageFolder, "read", None)  # would be called for images that are not in the cache
    assert cli(*usual(model, "--reference", reference))[0] == 0


def write_results(folder, name, **changed):
    """A copy of the results with other entries: its path."""
    (folder / name).write_text(json.dumps(results() | changed))
    return folder / name


def test_results_name_the_real_images_by_their_content(cli, model, reference, tmp_path):
    assert cli("statistics", "--reference", reference, "--extractor", "emoji-clip", "--out", "real.npz")[0] == 0
    found = []
    for source in (reference, "real.npz"):
        assert cli(*usual(model, "--reference", source))[0] == 0
        found.append(results()["reference_sha256"])
    assert found == [ImageFolder(reference).sha256()] * 2


def test_compare_shows_results_of_one_protocol_only(cli, model, tmp_path):
    assert cli(*usual(model))[0] == 0
    first = tmp_path / "out/results.json"
    status, out, _ = cli("compare", first, first)
    assert status == 0 and out.count("teacher") == 2 and "CLIP score" in out
    other = json.loads(first.read_text())
    other["protocol"]["prompt_prefix"] = "A photo depicts "
    (tmp_path / "other.json").write_text(json.dumps(other))
    refused(cli("compare", first, "other.json"), "other.json", "prompt_prefix", "not comparable")
    refused(cli("compare", first, write_results(tmp_path, "real.json", reference_sha256="a")), "reference_sha256 is a")
    (tmp_path / "foreign.json").write_text("{}")
    refused(cli("compare", "foreign.json"), "foreign.json", "results.json of tiue evaluate")
    refused(cli("compare"), "got none")


def test_bad_input_is_one_line_before_any_image(cli, model, reference, tmp_path):
    refused(cli(*usual(model, "--num_images", 100)), "100 images need 34 prompts, got 4")
    refused(cli(*usual(model, "--guidance_scales", "1,x")), "guidance_scales", "1,x")
    refused(cli(*usual(model, "--reference", "absent")), "absent: no such folder")
    refused(cli(*usual(model, "--extractor", tmp_path / "absent")), "absent")
    refused(cli(*usual(model, "--extractor", model / "unet")), "model_type")
    refused(cli("--model", model, "--out", "x"), "prompt_file")
    (tmp_path / "empty").mkdir()
    refused(cli(*usual(model, "--reference", "empty")), "empty: no images")
    mixed = tmp_path / "mixed"
    for size in (8, 9):
        mixed.mkdir(exist_ok=True)
        images.write_png(mixed / f"{size}.png", np.zeros((size, 8, 3), np.uint8))
    refused(cli(*usual(model, "--reference", mixed)), "2 sizes (8 x 8, 8 x 9", "--resize")
    Image.new("RGBA", (8, 8)).save(mixed / "glass.png")
    refused(cli(*usual(model, "--reference", mixed)), "1 files (glass.png (RGBA))", "convert them")
    (mixed / "torn.jpg").write_bytes(b"\xff\xd8 torn")
    refused(cli(*usual(model, "--reference", mixed)), "1 files (torn.jpg) cannot be read")
    png = (reference / "0.png").read_bytes()
    start = png.index(b"IDAT") - 4
    half = (int.from_bytes(png[start : start + 4]) // 2).to_bytes(4)  # the second half is no chunk
    (tmp_path / "chunk").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "chunk" / name).write_bytes(png[:start] + half + png[start + 4 :])
    refused(cli(*usual(model, "--reference", "chunk")), "0.png", "image")
    other = tiny.write_pipeline(tmp_path / "student", {"sampler": "one_step", "num_inference_steps": 1})
    refused(cli(*usual(model, "--model", other, "--guidance_scales", 3)), "guidance_scale", "one_step")
    refused(cli(*usual(model, "--resize_filter", "bicubic")), "nothing to resize")
    assert not (tmp_path / "out").exists()


def test_a_filter_alone_keeps_the_sizes_of_the_protocol():
    args = parse(["evaluate", "--protocol", "coco30k-mosaic", "--resize_filter", "bicubic"], command.define_flags, "")
    preset, read = PROTOCOLS["coco30k-mosaic"], command.read_protocol(args)
    assert read.reference_resize == dataclasses.replace(preset.reference_resize, filter="bicubic")
    assert read.reference_resize.size == 512 and read.resize.size == preset.resize.size


def test_a_resize_cuts_the_centre_first():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 255
    assert (Resize(2, "box")(Image.fromarray(image)) == 255).all()
    assert not (Resize(2, "box", crop=False)(Image.fromarray(image)) == 255).all()


def test_the_resize_of_clean_fid_does_not_round():
    ramp = np.repeat(np.arange(4, dtype=np.uint8)[None, :, None] * 60, 4, 0).repeat(3, 2)
    resized = pixels.clean_resize(ramp[None], 5)
    assert resized.shape == (1, 5, 5, 3) and resized.dtype == np.float32
    assert (resized != resized.round()).any() and resized.min() >= 0
