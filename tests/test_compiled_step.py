"""compiled_step.py, step_inputs.py: a run and a plan build the same step, and the batches of a run fit it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.tiny_run import UNET
from tiue_jax import sharding
from tiue_jax.data import corpus, embeddings
from tiue_jax.data.loader import tokens
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel, CLIPVisionConfig
from tiue_jax.models.tiny_vae import AutoencoderTiny
from tiue_jax.plan import architecture, chips, programs
from tiue_jax.training import compiled_step, step_inputs
from tiue_jax.training.distill_settings import DistillConfig
from tiue_jax.training.settings import DataConfig, ModelConfig, Settings, TrainConfig
from tiue_jax.training.teacher import read_teacher
from tiue_jax.weights import model_folder

CLIP = CLIPConfig(
    dataclasses.replace(tiny.TEXT, projection_dim=6),
    CLIPVisionConfig(8, 16, 1, 2, image_size=8, patch_size=4, projection_dim=6),
    projection_dim=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Teacher, CLIP, tiny autoencoder and prompts."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write_pipeline(folder / "teacher", unet=UNET)
    clip = functional.init(functional.abstract(CLIPModel, CLIP.text_config, CLIP.vision_config, 6)[1], 0)
    tiny.write_tokenizer(folder / "clip")
    model_folder.save(folder / "clip", clip, CLIP.to_dict(), filename="model.safetensors")
    model_folder.save(folder / "vae", tiny.random_params(AutoencoderTiny, tiny.TINY_VAE, 0), tiny.TINY_VAE.to_dict())
    (folder / "prompts.txt").write_text("a red apple\nb\n")
    return folder


def settings(folder, *, with_embeddings: bool = False, clip_weight: float = 0.0) -> Settings:
    model = ModelConfig(str(folder / "teacher"), str(folder / "clip"), str(folder / "vae"))
    data = DataConfig(str(folder / "prompts.txt"), embeddings="made/before" if with_embeddings else None)
    train = TrainConfig(batch_size=2, max_train_steps=5, mesh_replicate_below=64)
    distill = DistillConfig(
        num_inference_steps=2,
        lora_rank=2,
        compute_dtype="float32",
        clip_weight=clip_weight,
        clip_decay_steps=5,
    )
    return Settings(model, data, train, distill)


@pytest.mark.parametrize("clip_weight", [0.0, 0.1])
@pytest.mark.parametrize("with_embeddings", [False, True])
def test_a_plan_traces_the_step_that_the_run_traces(folder, monkeypatch, with_embeddings, clip_weight):
    chosen = settings(folder, with_embeddings=with_embeddings, clip_weight=clip_weight)
    monkeypatch.setattr(chips, "devices", lambda topology: jax.devices()[:1])  # a topology of TPUs needs libtpu
    planned = programs.train(chosen, architecture.read(chosen), "v5e:1x1").traced

    teacher = read_teacher(chosen)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    if with_embeddings:
        null = np.ones((tiny.CONTEXT, tiny.TEXT.hidden_size), embeddings.DTYPE)
    else:
        null = teacher.tokenize([""])[0]
    program = compiled_step.make(chosen, mesh, teacher.models, teacher.schedule, null)
    run = program.trace()

    assert str(run.jaxpr) == str(planned.jaxpr)
    assert run.args_info == planned.args_info and run.out_info == planned.out_info
    assert bool(program.frozen.clip) == bool(program.frozen.tiny_vae) == bool(clip_weight)
    assert bool(program.frozen.text_encoder) == (not with_embeddings)

    prompts = corpus.open_prompts(chosen.data.prompts, None)
    columns = {} if with_embeddings else {"input_ids": tokens(prompts, teacher.tokenize)}
    if clip_weight:
        columns["clip_input_ids"] = tokens(prompts, teacher.tokenize_clip)
    assert program.batch.keys() == columns.keys() | ({"text"} if with_embeddings else set())
    for name, column in columns.items():
        read = column([1, 0])
        assert (read.shape, read.dtype) == (program.batch[name].shape, program.batch[name].dtype)


def test_the_clip_loss_reads_its_models_from_their_folders(folder):
    chosen = settings(folder, clip_weight=0.1)
    teacher = read_teacher(chosen)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    program = compiled_step.make(chosen, mesh, teacher.models, teacher.schedule)
    frozen = teacher.load_frozen(program.frozen)
    features = step_inputs.build(chosen, teacher.models).clip_features
    batch = {"clip_input_ids": jnp.asarray(teacher.tokenize_clip(["a red apple", "b"]), jnp.int32)}
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32)
    of_text, of_image = jax.jit(features)(frozen, batch, latents)
    assert of_text.shape == of_image.shape == (2, 6)
    assert np.isfinite(of_text).all() and np.isfinite(of_image).all()
    whole = model_folder.load(folder / "clip", teacher.models.clip.params)
    jax.tree.map(np.testing.assert_array_equal, frozen.clip, whole)


def test_a_clip_loss_without_clip_is_refused(folder):
    chosen = settings(folder, clip_weight=0.1)
    without = dataclasses.replace(chosen, model=ModelConfig(chosen.model.pretrained_model_name_or_path))
    with pytest.raises(ValueError, match="clip_weight = 0.1 needs model.clip_model_name_or_path, got None"):
        read_teacher(without)
