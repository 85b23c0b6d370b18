"""changed_settings.py: what a resumed run may change freely, with a reason that it keeps, or never."""

import dataclasses

import pytest

from tiue_jax.training.changed_settings import FIXED, Change, Resumption, compare
from tiue_jax.training.distill_settings import DistillConfig
from tiue_jax.training.settings import DataConfig, ModelConfig, Settings, TrainConfig

SETTINGS = Settings(
    ModelConfig("runs/teacher"), DataConfig("a.txt"), TrainConfig(max_train_steps=9), DistillConfig(max_train_steps=9)
)
FINGERPRINTS = {"teacher.unet": "1a", "teacher.vae": "2b", "teacher.prediction_type": "epsilon", "prompts": "3c"}


def changed(section: str, **values: object) -> Settings:
    """The settings with other values in a section."""
    return dataclasses.replace(SETTINGS, **{section: dataclasses.replace(getattr(SETTINGS, section), **values)})


def resume(settings: Settings, why: str | None = None, about: dict | None = None, **fingerprints: str) -> Resumption:
    """Resumes a run of SETTINGS with other settings, and other fingerprints, `teacher__unet="9f"`."""
    now = FINGERPRINTS | {name.replace("__", "."): text for name, text in fingerprints.items()}
    resumption = Resumption(settings, now, why)
    resumption.check(SETTINGS.to_dict(), Resumption(SETTINGS, FINGERPRINTS).about([]) if about is None else about)
    return resumption


@pytest.mark.parametrize(
    ("settings", "fingerprints", "expected"),
    [
        (changed("distill", student_learning_rate=1e-5), {}, "distill.student_learning_rate was 1e-06, now 1e-05"),
        (changed("train", batch_size=8), {}, "train.batch_size was 64, now 8"),
        (changed("train", seed=8), {}, "train.seed was 0, now 8"),
        (changed("distill", num_inference_steps=2), {}, "distill.num_inference_steps was 4, now 2"),
        (
            changed("data", prompts="b.txt"),
            {"prompts": "9f"},
            "data.prompts was 'a.txt', now 'b.txt'; fingerprint of pro",
        ),
        (SETTINGS, {"prompts": "9f"}, "fingerprint of prompts was '3c', now '9f'"),
        (SETTINGS, {"teacher__unet": "9f"}, "fingerprint of teacher.unet was '1a', now '9f'"),
        (
            changed("model", pretrained_model_name_or_path="b"),
            {"teacher__vae": "9f"},
            "model.pretrained_model_name_or_path was 'runs/teacher', now 'b'; fingerprint of teacher.vae was '2b'",
        ),
    ],
)
def test_a_change_is_refused_and_with_a_reason_it_is_kept(settings, fingerprints, expected):
    with pytest.raises(ValueError) as raised:
        resume(settings, **fingerprints)
    message = str(raised.value)
    assert message.startswith(f"settings differ from those that the run was started with: {expected}")
    assert message.endswith('to record this and go on: --override_settings="WHY"') and len(message) <= 600

    entry = resume(settings, "a better one", **fingerprints).history(7)[-1]
    assert (entry["step"], entry["why"]) == (7, "a better one") and entry["time"].endswith("+00:00")
    shown = [str(Change(change["name"], change["from"], change["to"])) for change in entry["changes"]]
    assert "; ".join(shown).startswith(expected)


@pytest.mark.parametrize(
    ("settings", "fingerprints"),
    [
        (SETTINGS, {}),
        (changed("model", pretrained_model_name_or_path="runs/teacher/"), {}),
        (changed("model", pretrained_model_name_or_path="/moved/elsewhere"), {}),
        (changed("data", prompts="moved.txt"), {}),
        (changed("train", log_every=3, mesh_fsdp=4, mesh_data=1), {}),
    ],
)
def test_what_changes_no_update_is_free(settings, fingerprints):
    for why in (None, "nothing to say"):
        resumption = resume(settings, why, **fingerprints)
        assert resumption.changes == [] and resumption.history(7) == []


@pytest.mark.parametrize(
    ("settings", "fingerprints", "name"),
    [
        (changed("distill", lora_rank=8), {}, "distill.lora_rank"),
        (changed("distill", lora_targets=("to_q",)), {}, "distill.lora_targets"),
        (changed("model", student_name_or_path="b"), {}, "model.student_name_or_path"),
        (SETTINGS, {"teacher__prediction_type": "v_prediction"}, "teacher.prediction_type"),
    ],
)
def test_no_reason_changes_what_the_checkpoint_cannot_follow(settings, fingerprints, name):
    with pytest.raises(ValueError) as raised:
        resume(settings, "because I say so", **fingerprints)
    message = str(raised.value)
    assert message.startswith(f"settings that no run can change: {name} was") and FIXED[name] in message
    assert "start a new run in another --workdir" in message and len(message) <= 600


def test_the_start_of_the_student_may_be_gone_and_stays_known(monkeypatch):
    """It is read before the first step only, so a run that goes on has no fingerprint of it to compare."""
    settings = changed("model", student_name_or_path="runs/first/student")
    about = Resumption(settings, FINGERPRINTS | {"student": "4d"}).about([])
    resumption = Resumption(settings, FINGERPRINTS)
    resumption.check(settings.to_dict(), about)
    assert resumption.changes == [] and resumption.about([]) == about

    elsewhere = Resumption(changed("model", student_name_or_path="/local/student"), FINGERPRINTS)
    with pytest.raises(ValueError, match="model.student_name_or_path was 'runs/first/student', now '/local/student'"):
        elsewhere.check(settings.to_dict(), about)
    monkeypatch.setattr("jax.process_index", lambda: 1)  # the saved settings are those of process 0
    elsewhere.check(settings.to_dict(), about)


def test_a_checkpoint_without_fingerprints_knows_its_teacher_by_name():
    resume(SETTINGS, about={}, teacher__unet="9f")
    with pytest.raises(ValueError, match="model.pretrained_model_name_or_path was 'runs/teacher', now 'b'"):
        resume(changed("model", pretrained_model_name_or_path="b"), about={})


def test_the_history_grows():
    first = resume(changed("train", batch_size=8), "more room")
    about = first.about(first.history(3))
    assert about["fingerprints"] == FINGERPRINTS
    second = Resumption(changed("train", seed=5), FINGERPRINTS, "again")
    second.check(changed("train", batch_size=8).to_dict(), about)
    entries = second.history(7)
    assert [(entry["step"], entry["why"], len(entry["changes"])) for entry in entries] == [
        (3, "more room", 1),
        (7, "again", 2),
    ]
    third = Resumption(changed("train", seed=5), FINGERPRINTS, "again")  # the same command again
    third.check(changed("train", seed=5).to_dict(), second.about(entries))
    assert third.history(9) == entries


def test_processes_must_agree_on_fingerprints_but_not_on_where_models_lie():
    facts = Resumption(SETTINGS, FINGERPRINTS, "x").facts()
    assert facts["fingerprint of teacher.unet"] == "1a" and facts["setting train.batch_size"] == 64
    assert facts["--override_settings"] == "x" and "setting data.prompts" in facts
    assert not [name for name in facts if "name_or_path" in name]


def test_settings_are_compared_by_name():
    saved = {"train": {"seed": 0, "log_every": 10, "prompts": ["a"]}, "distill": {"kl_weight": 0.1}}
    assert compare(saved, saved | {"train": {"seed": 0, "log_every": 10, "prompts": ("a",)}}, free={}) == []
    now = {"train": {"seed": 1, "log_every": 50, "prompts": ["a"]}, "distill": {"kl_weight": 0.1, "clip_weight": 0.0}}
    assert compare(saved, now, free={"train.log_every": object}) == [
        Change("distill.clip_weight", None, 0.0),
        Change("train.seed", 0, 1),
    ]
