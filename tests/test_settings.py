"""settings.py, changed_settings.py and the recipes: read into dataclasses, with errors that name the setting."""

import dataclasses
import importlib
import json
import math
import typing
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from tiue_jax.checked_fields import without_none
from tiue_jax.cli import config_flags, train
from tiue_jax.training.changed_settings import FREE, FREE_TO_MOVE, LENGTH, check_changes, find_changes
from tiue_jax.training.settings import Settings, default_config, optional_settings

ROOT = Path(__file__).parents[1]
RECIPES = config_flags.recipe_names()
# The settings of a run of the emoji recipe, as its config.json had them in version 0.1.0. Never change this: later
# versions must read it.
VERSION_0_1_0 = json.loads("""
{
  "model": {
    "pretrained_model_name_or_path": "emoji",
    "clip_model_name_or_path": null,
    "tiny_vae_name_or_path": null
  },
  "data": {"prompts": "emoji", "field": null, "embeddings": null},
  "train": {
    "seed": 0,
    "batch_size": 16,
    "max_train_steps": 1200,
    "max_train_minutes": null,
    "log_every": 10,
    "checkpoint_every": 100,
    "checkpoints_total_limit": 2,
    "checkpoints_best_metric": null,
    "max_skipped_steps": 10,
    "validation_every": 100,
    "validation_prompts": ["a red apple", "a dog face"],
    "validation_num_inference_steps": 25,
    "validation_guidance_scale": 4.0,
    "mesh_data": 1,
    "mesh_fsdp": -1,
    "mesh_replicate_below": 65536,
    "mesh_replicate_frozen": false
  },
  "distill": {
    "num_inference_steps": 4,
    "timestep_spacing": "leading",
    "teacher_guidance_scale": 2.5,
    "lora_guidance_scale": 1.0,
    "min_timestep": 20,
    "max_timestep": 980,
    "timestep_weighting": "uniform",
    "lora_rank": 32,
    "lora_alpha": 54.0,
    "lora_targets": ["to_q", "to_v", "conv1"],
    "kl_weight": 0.1,
    "kl_batch_size": 8.0,
    "clip_weight": 0.0,
    "clip_decay_steps": null,
    "clip_threshold": 0.35,
    "clip_normalize": true,
    "text_dropout": 0.1,
    "ema_decay": 0.99,
    "student_learning_rate": 5e-05,
    "student_learning_rate_schedule": "linear",
    "lora_learning_rate": 0.001,
    "lora_learning_rate_schedule": "constant",
    "warmup_steps": 0,
    "max_train_steps": 1200,
    "max_grad_norm": 1.0,
    "adam_b1": 0.9,
    "adam_b2": 0.999,
    "adam_eps": 1e-08,
    "compute_dtype": "float32",
    "gradient_accumulation_steps": 1,
    "remat": "none",
    "latent_size": null
  }
}
""")


def read(*argv: str) -> Settings:
    """The settings of a command line."""
    return config_flags.parse(["train.py", *argv], flags.FlagValues(), required=("config",))


def flat(sections: dict) -> dict[str, object]:
    """{"train": {"seed": 0}} as {"train.seed": 0}."""
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_found_by_name_and_by_path(name):
    settings = read("--config", name)
    assert settings == read(f"--config={name}") == read("--config", str(ROOT / "configs" / f"{name}.py"))
    assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()
    assert Settings.from_dict(settings.to_dict()) == settings
    assert settings.distill.max_train_steps == settings.train.max_train_steps
    source = (config_flags.RECIPES / f"{name}.py").read_text()
    assert f"--config {name} " in source  # the docstring has the command
    assert read("--config", name, "--config.train.profile_steps=3").train.profile_steps == 3


def without_defaults() -> ConfigDict:
    """The config that recipes change, with None for every setting."""
    sections = default_config().to_dict()
    return ConfigDict({section: dict.fromkeys(values) for section, values in sections.items()}).lock()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_lists_only_what_differs_from_the_defaults(name, monkeypatch):
    for recipe in RECIPES:  # a recipe may start from another one
        module = importlib.import_module(f"tiue_jax.recipes.{recipe}")
        if hasattr(module, "default_config"):
            monkeypatch.setattr(module, "default_config", without_defaults)
    set_by_recipe = flat(importlib.import_module(f"tiue_jax.recipes.{name}").get_config().to_dict())
    defaults = flat(default_config().to_dict())
    listed = {setting for setting, value in set_by_recipe.items() if value is not None}
    assert "model.pretrained_model_name_or_path" in listed
    assert [setting for setting in listed if set_by_recipe[setting] == defaults[setting]] == []


@pytest.mark.parametrize("name", RECIPES)
def test_print_config_prints_every_setting(name, capsys):
    assert train.main(["train.py", "--config", name, "--print_config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    values, defaults = flat(read("--config", name).to_dict()), flat(default_config().to_dict())
    assert {line.split(" = ")[0] for line in lines} == defaults.keys() == values.keys() - {"distill.max_train_steps"}
    for line in lines:
        setting, _, rest = line.partition(" = ")
        value, _, default = rest.partition("  # default: ")
        assert value == repr(values[setting])
        assert default == "" or default == repr(defaults[setting]) != value
    assert any("# default: " in line for line in lines)


CONFIG = {
    "model": {"pretrained_model_name_or_path": "x"},
    "data": {"prompts": "p.txt"},
    "train": {"max_train_steps": 5},
    "distill": {},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": {}}, r"expected the config sections \['data', 'distill', 'model', 'train'\]"),
        ({"train": {"lr": 1}}, r"unknown settings \['lr'\] in section 'train'"),
        ({"distill": {"max_train_steps": 1}}, r"unknown settings \['max_train_steps'\] in section 'distill'"),
        ({"data": {}}, r"settings \['prompts'\] are missing in section 'data'"),
        ({"train": {"batch_size": 0}}, "train.batch_size must be an integer between 1 and 2147483647, got 0"),
        ({"train": {"seed": -1}}, "train.seed must be an integer between 0 and 4294967295, got -1"),
        (
            {"train": {"checkpoints_total_limit": 0}},
            "checkpoints_total_limit must be an integer .* or None, got 0",
        ),
        (
            {"train": {"max_skipped_steps": 0}},
            "train.max_skipped_steps must be an integer between 1 and .*, got 0",
        ),
        (
            {"train": {"checkpoints_best_metric": "train/loss"}},
            r"must be among \['eval/teacher_distance', .*\] or None, got 'train/l",
        ),
        ({"train": {"checkpoints_best_metric": "eval/teacher_distance"}}, "needs validation_prompts, got none"),
        (
            {
                "train": {
                    "checkpoints_best_metric": "eval/teacher_distance",
                    "validation_prompts": ["x"],
                    "checkpoint_every": 1000,
                    "validation_every": 1500,
                }
            },
            "expected checkpoint_every to be a multiple of validation_every, got 1000 and 1500",
        ),
        (
            {"train": {"evaluation_metrics": ["fid"]}},
            "evaluation_metrics must be some of frechet_distance.*, got 'fid'",
        ),
        (
            {"train": {"evaluation_metrics": ["retrieval"]}},
            "needs evaluation_extractor, such as 'emoji-clip', got none",
        ),
        (
            {"train": {"evaluation_metrics": ["recall"], "evaluation_extractor": "emoji-clip"}},
            "recall needs evaluation_reference, got none",
        ),
        (
            {"train": {"evaluation_metrics": ["diversity"], "evaluation_extractor": "emoji-clip"}},
            "diversity needs evaluation_images_per_prompt >= 2, got 1",
        ),
        (
            {"train": {"checkpoints_best_metric": "eval/clip_score"}},
            r"'eval/clip_score' needs 'clip_score' in evaluation_metrics, got \[\]",
        ),
        (
            {
                "train": {
                    "checkpoints_best_metric": "eval/clip_score",
                    "evaluation_metrics": ["clip_score"],
                    "evaluation_extractor": "emoji-clip",
                    "checkpoint_every": 100,
                }
            },
            "expected checkpoint_every to be a multiple of evaluation_every, got 100 and 1000",
        ),
        ({"train": {"batch_size": "16"}}, "train.batch_size must be an integer between 1 and .*, got '16'"),
        ({"train": {"validation_prompts": "a red apple"}}, "must be a tuple of texts, got 'a red apple'"),
        ({"train": {"validation_num_inference_steps": 0}}, "validation_num_inference_steps must be an integer"),
        (
            {"train": {"validation_guidance_scale": math.nan}},
            "validation_guidance_scale must be a finite number, got nan",
        ),
        ({"train": {"max_train_minutes": 0.0}}, "train.max_train_minutes must be a finite number > 0 or None, got 0.0"),
        ({"train": {"profile_steps": 0}}, "train.profile_steps must be an integer between 1 and .* or None, got 0"),
        ({"distill": {"num_inference_steps": 0}}, "num_inference_steps must be an integer between 1 and .*, got 0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_config(CONFIG | change)


def plain_type(setting: str) -> tuple[type, bool]:
    """The type of a setting, as in the docs, and whether it may be None."""
    section, name = setting.split(".")
    kinds = {field.name: field.type for field in dataclasses.fields(Settings)}
    kind = typing.get_type_hints(kinds[section])[name]
    inner = without_none(kind)
    return (kind, False) if inner is None else (inner, True)


# Those of the loop that later versions added, with their defaults. A run of an older version has none of them.
ADDED_TO_TRAIN = {
    "profile_steps": None,
    "health_images": 8,
    "evaluation_metrics": [],
    "evaluation_every": 1000,
    "evaluation_images": 256,
    "evaluation_images_per_prompt": 1,
    "evaluation_prompts": None,
    "evaluation_extractor": None,
    "evaluation_reference": None,
}
SETTINGS = [name for name in flat(VERSION_0_1_0 | {"train": VERSION_0_1_0["train"] | ADDED_TO_TRAIN})]
SETTINGS.remove("distill.max_train_steps")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_value_of_any_setting_is_one_line_that_names_it(setting):
    kind, optional = plain_type(setting)
    number = [None, "8", "x", True, [1], {}, math.nan, math.inf, -math.inf, -5, -5.0, 10**400, 10**5000]
    wrong = {
        int: [*number, 1.5, 8.0],
        float: number,
        bool: [None, "true", 1, 0.0, [True]],
        str: [None, 1, 1.5, True, ["x"], {}],
        tuple[str, ...]: [None, "x", 1, [1, 2], ("a", None), {"a": 1}],
    }[kind]
    if setting in ("train.validation_guidance_scale", "distill.clip_threshold"):  # any finite number
        wrong = [value for value in wrong if value not in (-5, -5.0)]
    section, name = setting.split(".")
    for value in wrong[1:] if optional else wrong:
        with pytest.raises(ValueError) as raised:
            Settings.from_config({**CONFIG, section: CONFIG[section] | {name: value}})
        message = str(raised.value)
        assert message.startswith(f"{setting} must be ") and ", got " in message
        assert len(message) <= 400 and "\n" not in message
    if optional:
        settings = Settings.from_config({**CONFIG, section: CONFIG[section] | {name: None}})
        assert flat(settings.to_dict())[setting] is None


@pytest.mark.parametrize(
    "zero", ["batch_size", "log_every", "checkpoint_every", "max_train_steps", "max_train_minutes"]
)
def test_zero_is_refused(zero):
    with pytest.raises(ValueError, match=f"train.{zero} must be .*, got 0"):
        Settings.from_config({**CONFIG, "train": {zero: 0}})


@pytest.mark.parametrize("config", [None, [], "x", {"train": 1}, {**CONFIG, "train": None}, {**CONFIG, "distill": [1]}])
def test_sections_that_are_none(config):
    for read_config in (Settings.from_config, Settings.from_dict):
        with pytest.raises(ValueError, match="config section"):
            read_config(config)


def test_every_optional_setting_takes_none_and_a_value_from_the_command_line():
    values = {int: "3", float: "2.5", str: "x"}
    for setting in optional_settings():
        kind, _ = plain_type(setting)
        none, value = f"--config.{setting}=None", f"--config.{setting}={values.get(kind)}"
        if setting == "train.checkpoints_best_metric":
            value = f"--config.{setting}=eval/teacher_distance"
        if setting == "distill.teacher_guidance_scale_max":
            value = f"--config.{setting}=7.5"
        if setting == "distill.timesteps":
            value = f"--config.{setting}=(900, 600, 300, 1)"
        assert flat(read("--config", "emoji_tiue", none).to_dict())[setting] is None
        assert flat(read("--config", "emoji_tiue", value, none).to_dict())[setting] is None
        assert flat(read("--config", "emoji_tiue", none, value).to_dict())[setting] is not None
        assert flat(read("--config", "emoji_tiue", *none.split("=")).to_dict())[setting] is None


def check_resumed(saved: dict, settings: Settings) -> None:
    """Checks that a run of the first versions, which has no fingerprints, may go on."""
    check_changes(find_changes(saved, settings, {}, {}), None)


def test_a_longer_run_resumes_only_where_nothing_falls_towards_its_end():
    def lengthened(distill):
        short, long = ({**CONFIG, "train": {"max_train_steps": n}, "distill": distill} for n in (5, 9))
        now = Settings.from_config(long)
        check_resumed(Settings.from_config(short).to_dict(), now)

    lengthened({})
    for distill in ({"lora_learning_rate_schedule": "cosine"}, {"clip_weight": 0.1}):
        with pytest.raises(ValueError, match="train.max_train_steps was 5, now 9"):
            lengthened(distill)
    lengthened({"clip_weight": 0.1, "clip_decay_steps": 3})


def test_embeddings_may_move_but_not_come_or_go():
    def moved(before, after):
        was, now = (
            Settings.from_config({**CONFIG, "data": {"prompts": "p", "embeddings": e}}) for e in (before, after)
        )
        check_resumed(was.to_dict(), now)

    moved("a/e", "b/e")
    for before, after in ((None, "b/e"), ("a/e", None), ("", "b/e")):
        with pytest.raises(ValueError, match=f"data.embeddings was {before!r}, now {after!r}"):
            moved(before, after)


def test_the_settings_that_are_free_on_resume_exist():
    known = flat(Settings.from_dict(VERSION_0_1_0).to_dict())
    assert set(FREE) | set(FREE_TO_MOVE) <= known.keys() and set(LENGTH) <= set(FREE)


def test_a_run_of_an_older_version_is_read_and_goes_on():
    settings = Settings.from_dict(VERSION_0_1_0)
    assert settings.train.validation_prompts == ("a red apple", "a dog face")
    added = flat({"train": ADDED_TO_TRAIN}) | {"data.split": "train", "data.max_bad_share": 0.01}
    added |= {"distill.negative_prompt": "", "model.embeddings": [], "model.clip_skip": 0}
    added |= {"model.student_name_or_path": None, "distill.timesteps": None}
    added |= {"distill.teacher_guidance_scale_max": None, "distill.lora_updates_per_step": 1}
    added |= {"distill.shared_encoder": True}
    assert flat(settings.to_dict()) == flat(VERSION_0_1_0) | added
    check_resumed(VERSION_0_1_0, settings)
    profiled = {**VERSION_0_1_0, "train": VERSION_0_1_0["train"] | {"profile_steps": 5}}
    check_resumed(VERSION_0_1_0, Settings.from_dict(profiled))
    negative = {**VERSION_0_1_0, "distill": VERSION_0_1_0["distill"] | {"negative_prompt": "blurry"}}
    with pytest.raises(ValueError, match="distill.negative_prompt was '', now 'blurry'"):
        check_resumed(VERSION_0_1_0, Settings.from_dict(negative))


def test_a_negative_prompt_needs_a_teacher_with_guidance():
    distill = Settings.from_dict(VERSION_0_1_0).distill
    with pytest.raises(ValueError, match="negative_prompt = 'blurry' needs teacher_guidance_scale above 1, got 1.0"):
        dataclasses.replace(distill, negative_prompt="blurry", teacher_guidance_scale=1.0)
    assert dataclasses.replace(distill, negative_prompt="blurry").negative_prompt == "blurry"
