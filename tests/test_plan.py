"""Planning without a compiler: the search, tables, the cache, models, the command line."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests import tiny
from tiue_jax.cli import plan as cli
from tiue_jax.models.presets import PRESETS
from tiue_jax.plan import architecture, cache, chips, programs, report, search
from tiue_jax.plan.measure import Measured
from tiue_jax.recipes import sd21_tiue
from tiue_jax.training.settings import Settings

V5E = chips.CHIPS["v5e"]
ROOT = Path(__file__).parents[1]


def settings(**train):
    config = sd21_tiue.get_config().to_dict()
    config["train"].update(train)
    return Settings.from_config(config)


def measured(batch=8, peak=9e9, flops=100e12, sent=10e9, **other):
    values = {
        "topology": "v5e:4x4",
        "program": "train",
        "mode": "quick",
        "batch_per_chip": batch,
        "data": 1,
        "fsdp": 16,
        "remat": "full",
        "parts": {"student": 200_000_000, "teacher": 800_000_000},
        "state_bytes": 1_000_000_000,
        "temp_bytes": int(peak) - 1_000_000_000,
        "peak_bytes": int(peak),
        "hbm_bytes": V5E.hbm_bytes,
        "fits": peak <= V5E.hbm_bytes,
        "flops_per_chip": int(flops),
        "bytes_accessed": 10**12,
        "collectives": {"all-gather": (3, int(sent))},
        "background_bytes": int(sent),
        "estimated_cycles": None,
        "compile_seconds": 60.0,
    }
    return Measured(**values | other)


# ---- search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 4, 64])
@pytest.mark.parametrize(
    ("fixed", "per_row", "curve", "largest"),
    [(1e9, 0.79e9, 1.0, 20), (1e9, 1.98e9, 1.0, 8), (10e9, 4e9, 1.0, 1), (1e9, 0.1e9, 1.2, 64), (1e9, 1e6, 1.0, 1792)],
)
def test_the_largest_batch_is_found(first, fixed, per_row, curve, largest):
    def measure(batch):
        return measured(batch, int(fixed + per_row * batch**curve))

    tried = search.largest_batch(measure, first, V5E.hbm_bytes)
    batches = [result.batch_per_chip for result in tried]
    assert max(result.batch_per_chip for result in tried if result.fits) == largest
    assert len(set(batches)) == len(batches) <= 9, batches


def test_not_even_one_fits():
    tried = search.largest_batch(lambda batch: measured(batch, 20e9 + batch), 8, V5E.hbm_bytes)
    assert not any(result.fits for result in tried)
    assert tried[-1].batch_per_chip == 1


# ---- report ----------------------------------------------------------------------------------------------------------


def test_cost():
    a_day = report.cost(measured(flops=197e12, sent=100e9), V5E, images=16 * 8 * 86_400)
    assert a_day == pytest.approx((1.0, 1e12 / 819e9, 0.5, 1.0, 0.5, 128.0, 1.0, 384.0))
    slow_links = report.cost(measured(flops=197e12, sent=400e9), V5E)
    assert (slow_links.step_seconds, slow_links.collective_share, slow_links.days) == (2.0, 1.0, None)


def test_what_is_sent_in_the_foreground_is_waited_for():
    """10 GB take 50 ms and half of them 25 ms. The compiler's cycles count if they take longer than the FLOPs."""
    for cycles, seconds in ((None, 1.025), (3 * V5E.clock, 3.025), (V5E.clock / 2, 1.025)):
        cycles = None if cycles is None else int(cycles)
        full = measured(flops=197e12, mode="full", estimated_cycles=cycles, background_bytes=5 * 10**9)
        assert report.cost(full, V5E).step_seconds == pytest.approx(seconds)
    assert "sent: 5.00 GB of 10.0 GB while the chip computes" in report.notes(full, V5E, settings())[-1]


def test_the_best_is_the_fastest_that_fits():
    slow, fast = measured(remat="full", flops=150e12), measured(remat="attention")
    too_large = measured(remat="none", flops=90e12, peak=20e9)
    larger = measured(batch=16, flops=200e12, peak=15e9)  # no faster
    assert report.best([slow, fast, too_large, larger], V5E) is fast
    assert report.best([too_large, measured(peak=30e9)], V5E) is too_large


def test_a_gpu_that_is_full(monkeypatch):
    """The last lines say what JAX takes of the memory, and what the compiler does not count."""
    monkeypatch.delenv(chips.MEMORY_FRACTION, raising=False)
    chip, _ = chips.parse("h100:8")
    too_large = measured(topology="h100:8", data=8, fsdp=1, peak=70e9, hbm_bytes=chip.hbm_bytes, fits=False)
    assert report.notes(too_large, chip, settings()) == [
        "does not fit: it needs 70.0 GB of the 63.7 GB that JAX takes of the 84.9 GB of a h100",
        "memory: without the workspaces of cuDNN and cuBLAS, which are chosen on a card",
    ]
    fits = measured(topology="h100:8", data=8, fsdp=1, flops=989.4e12, sent=45e9, hbm_bytes=chip.hbm_bytes)
    assert report.cost(fits, chip).step_seconds == pytest.approx(1.0)  # sent in the background, in a tenth of it
    assert "at 989 TFLOP/s and 450 GB/s between chips" in report.notes(fits, chip, settings())[-2]


def test_tables_say_what_was_measured():
    tried = [measured(), measured(batch=32, peak=40e9, collectives=None, bytes_accessed=None)]
    console = Console(width=140, record=True, file=io.StringIO())
    images = 66_500 * 64
    console.print(report.parts_table(tried[0]))
    console.print(report.table(tried, tried[0], V5E, images))
    for line in report.notes(tried[0], V5E, settings()):
        console.print(line)
    text = console.export_text()
    for expected in ("200 MB", "9.00 GB", "16.9 GB", "chip-hours", "yes", "no", "508 ms"):
        assert expected in text, text
    assert "--config.train.batch_size=128" in text
    assert "66,500 steps of 64" in text


def test_json():
    """The command prints every field of `Measured` and `Cost`, of the best program and of all that were tried."""
    chosen, other = measured(flops=197e12, sent=100e9), measured(batch=16, peak=20e9, collectives=None, remat=None)
    images = 16 * 8 * 86_400
    printed = json.loads(json.dumps(report.as_json(chosen, [chosen, other], V5E, images)))
    tried = printed.pop("tried")
    assert (
        printed
        == tried[0]
        == {
            "topology": "v5e:4x4",
            "program": "train",
            "mode": "quick",
            "batch_per_chip": 8,
            "data": 1,
            "fsdp": 16,
            "remat": "full",
            "parts": {"student": 200_000_000, "teacher": 800_000_000},
            "state_bytes": 1_000_000_000,
            "temp_bytes": 8_000_000_000,
            "peak_bytes": 9_000_000_000,
            "hbm_bytes": 16_911_433_728,
            "fits": True,
            "flops_per_chip": 197 * 10**12,
            "bytes_accessed": 10**12,
            "collectives": {"all-gather": [3, 100 * 10**9]},
            "background_bytes": 100 * 10**9,
            "estimated_cycles": None,
            "compile_seconds": 60.0,
            "compute_seconds": pytest.approx(1.0),
            "memory_seconds": pytest.approx(1e12 / 819e9),
            "collective_seconds": pytest.approx(0.5),
            "step_seconds": pytest.approx(1.0),
            "collective_share": pytest.approx(0.5),
            "images_per_second": pytest.approx(128.0),
            "days": pytest.approx(1.0),
            "chip_hours": pytest.approx(384.0),
        }
    )
    assert tried[1]["batch_per_chip"] == 16 and tried[1]["fits"] is False
    assert tried[1]["remat"] is None and tried[1]["collectives"] is None
    assert report.as_json(chosen, [chosen], V5E, None)["days"] is None


# ---- cache -----------------------------------------------------------------------------------------------------------


def test_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = cache.key({"topology": "v5e:4x4"})
    assert cache.load(name) is None
    cache.save(name, dataclasses.asdict(measured()))
    assert Measured.from_dict(cache.load(name)) == measured()
    assert cache.key({"topology": "v5e:4x4"}) == name != cache.key({"topology": "v6e:4x4"})
    (tmp_path / "tiue_jax" / "plan" / f"{name}.json").write_text("{half")
    assert cache.load(name) is None


def test_cache_knows_the_sources(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1")
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    before = cache.key({})
    (tmp_path / "a.py").write_text("x = 2")
    assert cache.key({}) != before


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "stabilityai/stable-diffusion-2-1-base"])
def test_published_models_need_no_download(name, monkeypatch):
    monkeypatch.delenv("TIUE_MODELS", raising=False)
    given = settings()
    given = dataclasses.replace(given, model=dataclasses.replace(given.model, pretrained_model_name_or_path=name))
    assert architecture.read(given).pipeline == PRESETS["sd15" if name == "sd15" else "sd21-base"]


def test_a_folder_is_read(tmp_path):
    folder = tiny.write_pipeline(tmp_path / "model")
    given = settings()
    given = dataclasses.replace(
        given, model=dataclasses.replace(given.model, pretrained_model_name_or_path=str(folder))
    )
    assert architecture.read(given).pipeline.unet == tiny.UNET


# ---- command line ----------------------------------------------------------------------------------------------------


CONFIG = ("--config", "configs/sd21_tiue.py")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--topology=v5e:4x4",), "--config is missing"),
        (CONFIG, "--topology is missing"),
        ((*CONFIG, "--topology=v5e:5x5"), "unknown topology 'v5e:5x5', expected kind:shape among v4: 2x2x1"),
        ((*CONFIG, "--topology=v5e:4x4", "--batch_per_chip=0"), "batch_per_chip must be a whole number >= 1, got '0'"),
        ((*CONFIG, "--topology=v5e:4x4", "--fsdp=3"), "fsdp must divide the number of chips, 16, got 3"),
        ((*CONFIG, "--topology=v5e:16x16"), "train.batch_size 64 does not split over 256 chips"),
        ((*CONFIG, "--topology=v5e:4x4", "--remat=some"), "remat must be among"),
        ((*CONFIG, "--topology=v5e:4x4", "--sampler", "--fsdp=4"), "fsdp is for the training step, got 4 with"),
        ((*CONFIG, "--topology=v5e:4x4", "--config.train.nope=3"), "command line: no setting 'nope' in the config"),
        ((*CONFIG, "--topology=v5e:4x4", "--mode=fast"), "command line: --mode=fast: expected one of quick, full"),
        (
            (*CONFIG, "--topology=v5e:4x4", "--config.train.batch_size=0"),
            "train.batch_size must be an integer between 1 and 2147483647, got 0",
        ),
    ],
)
def test_wrong_command_lines(flags, expected, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error, error


def test_without_libtpu(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", *CONFIG, "--topology=v5e:4x4"]) == 2
    assert capsys.readouterr().err == (
        "error: compiling for a TPU needs libtpu, on a machine without one too: pip install 'tiue-jax[tpu]'\n"
    )


def test_without_the_cuda_wheels(capsys, monkeypatch):
    def missing(name):
        raise chips.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(chips.importlib.metadata, "version", missing)
    assert cli.main(["plan", *CONFIG, "--topology=h100:8"]) == 2
    assert capsys.readouterr().err == (
        "error: compiling for a GPU needs jax-cuda12-pjrt, jax-cuda12-plugin, nvidia-cuda-nvcc-cu12, "
        "nvidia-cudnn-cu12, on a machine without one too: pip install 'tiue-jax[cuda-plan]'\n"
    )


class FakePlanner:
    """Stands in for plan.planner.Planner. A parameter of this model cannot be split over 256 chips."""

    def __init__(self, *args):
        pass

    def measure(self, choice):
        if choice.fsdp == 256:
            raise ValueError("['conv_in'] [3, 3, 4, 320] has no axis that fsdp=256 divides")
        return measured(choice.batch_per_chip, 9e9, fsdp=choice.fsdp, data=256 // choice.fsdp, remat=choice.remat)


def test_an_impossible_mesh_is_left_out_and_the_others_are_shown(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "Planner", FakePlanner)
    flags = ["plan", *CONFIG, "--topology=v5e:16x16", "--batch_per_chip=8,16", "--json"]
    assert cli.main([*flags, "--fsdp=8,all", "--remat=full"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    tried = [(one["batch_per_chip"], one["data"], one["fsdp"], one["remat"]) for one in printed["tried"]]
    assert tried == [(8, 32, 8, "full"), (16, 32, 8, "full")]
    assert printed["batch_per_chip"] == 16 and printed["images_per_second"] > 0
    images = 66_500 * 64  # of the recipe, whatever the batch
    assert printed["days"] == pytest.approx(images / printed["images_per_second"] / 86_400)
    assert err == "left out fsdp=256, remat=full: ['conv_in'] [3, 3, 4, 320] has no axis that fsdp=256 divides\n"
    assert cli.main([*flags, "--fsdp=all"]) == 2
    assert capsys.readouterr().err.startswith("error: ['conv_in']")


def test_the_largest_batch_of_each_policy(capsys, monkeypatch):
    def measure(self, choice):
        peak = (1e9 if choice.remat == "full" else 2e9) * choice.batch_per_chip
        return measured(choice.batch_per_chip, peak, fsdp=choice.fsdp, remat=choice.remat)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(FakePlanner, "measure", measure)
    monkeypatch.setattr(cli, "Planner", FakePlanner)
    flags = ["plan", *CONFIG, "--topology=v5e:4x4", "--batch_per_chip=max", "--remat=full,none", "--json"]
    assert cli.main([*flags, "--config.distill.gradient_accumulation_steps=2"]) == 0
    tried = json.loads(capsys.readouterr().out)["tried"]
    largest = {}
    for one in tried:
        if one["fits"]:
            largest[one["remat"]] = max(largest.get(one["remat"], 0), one["batch_per_chip"])
    assert largest == {"full": 16, "none": 8}
    assert not any(one["batch_per_chip"] % 2 for one in tried)  # two micro-batches


def test_nothing_fits(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(FakePlanner, "measure", lambda self, choice: measured(choice.batch_per_chip, 40e9))
    monkeypatch.setattr(cli, "Planner", FakePlanner)
    assert cli.main(["plan", *CONFIG, "--topology=v5e:4x4"]) == 1
    assert "does not fit: it needs 40.0 GB of the 16.9 GB of a v5e chip" in capsys.readouterr().out


def test_ctrl_c(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "Planner", interrupted)
    assert cli.main(["plan", *CONFIG, "--topology=v5e:4x4"]) == 130


def test_help_of_the_module():
    call = [sys.executable, "-m", "tiue_jax.plan", "--help"]
    result = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "tiue plan --config sd21_tiue" in result.stdout
    assert "--batch_per_chip=TEXT\n      batch sizes to try" in result.stdout and "(default: quick)" in result.stdout


def given(**flags):
    return SimpleNamespace(
        **{"batch_per_chip": None, "fsdp": None, "remat": None, "search": False, "sampler": False} | flags
    )


def test_the_recipe_itself_is_the_default():
    batches, bases = cli.choices(given(), settings(), 16)
    assert batches == [4] and bases == [cli.Choice(4, 16, settings().distill.remat)]


def test_a_search_tries_every_mesh_and_policy():
    batches, bases = cli.choices(given(search=True), settings(), 16)
    assert batches is None
    assert {(base.fsdp, base.remat) for base in bases} == {(n, p) for n in (4, 8, 16) for p in cli.REMAT_POLICIES}
    assert len(bases) == 3 * len(cli.REMAT_POLICIES)


def test_given_batches_meshes_and_policies_are_tried():
    policy = list(cli.REMAT_POLICIES)[-1]
    batches, bases = cli.choices(given(batch_per_chip="2,8", fsdp="4,all", remat=str(policy)), settings(), 16)
    assert batches == [2, 8]
    assert [(base.fsdp, base.remat) for base in bases] == [(4, policy), (16, policy)]


def test_the_sampler_takes_any_batch_whatever_the_micro_batches_of_training():
    train, distill = settings().train, settings().distill
    split = dataclasses.replace(settings(), distill=dataclasses.replace(distill, gradient_accumulation_steps=4))
    assert cli.choices(given(sampler=True, batch_per_chip="1,6"), split, 16).batches == [1, 6]
    assert cli.choices(given(sampler=True), split, train.batch_size).batches == [1]
    assert cli.choices(given(sampler=True, batch_per_chip="max"), split, 16).bases[0].batch_per_chip == 4
    with pytest.raises(ValueError, match="must be a multiple of the 4 micro-batches, got 6"):
        cli.choices(given(batch_per_chip="6"), split, 16)


def test_a_choice_changes_only_its_settings():
    changed = programs.with_choice(settings(), 128, 4, 16, None)
    assert (changed.train.batch_size, changed.train.mesh_data, changed.train.mesh_fsdp) == (128, 4, 4)
    assert changed.distill == settings().distill
