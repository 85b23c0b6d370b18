"""settings.py and the files in configs/: read into dataclasses, with errors that name the setting."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tiue_jax.training.checkpoint import check_config
from tiue_jax.training.settings import Settings

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*_tiue.py"))


def load(path: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files(path):
    config = load(path)
    assert config.is_locked
    settings = Settings.from_config(config.to_dict())
    assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()
    assert settings.distill.max_train_steps == settings.train.max_train_steps
    assert f"--config configs/{path.name}" in path.read_text()  # the launch command
    for name, section in settings.to_dict().items():  # every setting can be overridden on the command line
        assert set(section) - {"max_train_steps"} == set(config[name]) - {"max_train_steps"}


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
        ({"train": {"batch_size": 0}}, "train.batch_size must be an integer >= 1, got 0"),
        ({"train": {"seed": -1}}, "train.seed must be between 0 and 4294967295, got -1"),
        ({"train": {"checkpoints_total_limit": 0}}, "train.checkpoints_total_limit must be >= 1 or None, got 0"),
        ({"train": {"max_skipped_steps": 0}}, "train.max_skipped_steps must be an integer >= 1, got 0"),
        (
            {"train": {"checkpoints_best_metric": "train/loss"}},
            r"must be among \['eval/teacher_distance'\], got 'train/l",
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
        ({"train": {"batch_size": "16"}}, "train.batch_size must be an integer >= 1, got '16'"),
        ({"train": {"validation_prompts": "a red apple"}}, "must be a tuple of texts, got 'a red apple'"),
        ({"train": {"validation_num_inference_steps": 0}}, "validation_num_inference_steps must be an integer >= 1"),
        ({"train": {"validation_guidance_scale": math.nan}}, "validation_guidance_scale must be finite, got nan"),
        ({"train": {"max_train_minutes": 0.0}}, "train.max_train_minutes must be > 0 or None, got 0.0"),
        ({"distill": {"num_inference_steps": 0}}, "num_inference_steps must be >= 1, got 0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_config(CONFIG | change)


def test_a_longer_run_resumes_only_where_nothing_falls_towards_its_end():
    def lengthened(distill):
        short, long = ({**CONFIG, "train": {"max_train_steps": n}, "distill": distill} for n in (5, 9))
        now = Settings.from_config(long)
        check_config(Settings.from_config(short).to_dict(), now.to_dict(), now.free_on_resume)

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
        check_config(was.to_dict(), now.to_dict(), now.free_on_resume)

    moved("a/e", "b/e")
    for before, after in ((None, "b/e"), ("a/e", None), ("", "b/e")):
        with pytest.raises(ValueError, match=f"data.embeddings was {before!r}, now {after!r}"):
            moved(before, after)
