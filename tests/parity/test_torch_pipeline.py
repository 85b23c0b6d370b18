"""The exported pipeline.py does what diffusers' users expect of a pipeline: arguments, LoRAs, compiling, offloading."""

import copy
import inspect

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor

from tests import tiny
from tests.parity.conftest import relative_error
from tiue_jax.convert import export, torch_pipeline
from tiue_jax.convert.merge_lora import merge_lora
from tiue_jax.convert.torch_pipeline import TiUEPipeline

LATENTS = {"output_type": "latent", "return_dict": False}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    tiny.write_pipeline(root / "source", {"sampler": "tiue", "num_inference_steps": 3}, unet=tiny.ONE_LEVEL_UNET)
    export.export_pipeline(root / "source", root / "student")
    return root / "student"


@pytest.fixture(scope="module")
def loaded(student):
    """The pipeline of the student, for tests that do not change it."""
    return TiUEPipeline.from_pretrained(student)


@pytest.fixture(scope="module")
def reference(loaded):
    """The latents of two prompts from one noise."""
    return latents_of(loaded)


@pytest.fixture
def pipe(loaded):
    """A copy of the pipeline, for tests that change it."""
    copies = {name: copy.deepcopy(loaded.components[name]) for name in ("unet", "text_encoder", "vae")}
    return TiUEPipeline(**{**loaded.components, **copies})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(pipe, prompt=("red", "apple"), **kwargs) -> np.ndarray:
    prompts = {} if prompt is None else {"prompt": list(prompt)}
    return pipe(**prompts, generator=seeded(), **LATENTS, **kwargs)[0].numpy()


def close(name: str, got: np.ndarray, want: np.ndarray, bound: float = 1e-5) -> None:
    error = relative_error(got, torch.from_numpy(want))
    print(f"{name}: {error:.1e}")
    assert error <= bound


def test_prompt_embeds_in_place_of_prompts(loaded, reference):
    text = loaded.encode_prompts(["red", "apple"], "cpu")
    close("prompt_embeds", latents_of(loaded, None, prompt_embeds=text), reference, 0)
    stock = StableDiffusionPipeline(**loaded.components)
    of_stock, _ = stock.encode_prompt(["red", "apple"], "cpu", 1, False)
    close("embeddings of a stock pipeline", latents_of(loaded, None, prompt_embeds=of_stock), reference)
    several = latents_of(loaded, None, prompt_embeds=text, num_images_per_prompt=2)
    close("two images of each", several, latents_of(loaded, ("red", "red", "apple", "apple")))


def test_every_argument_of_a_stock_pipeline_is_taken_or_refused(loaded):
    theirs = inspect.signature(StableDiffusionPipeline.__call__).parameters
    ours = inspect.signature(TiUEPipeline.__call__).parameters
    known = ours.keys() | torch_pipeline.REFUSED.keys()
    unknown = [name for name in theirs if name not in known and not name.startswith("callback_")]
    print(f"{len(theirs)} arguments, refused: {len(torch_pipeline.REFUSED)}, unknown: {unknown}")
    assert unknown == ["clip_skip", "kwargs"]  # clip_skip: an exported folder lacks the layers already
    defaults = {name: p.default for name, p in theirs.items() if p.default is not inspect.Parameter.empty}
    harmless = {name: defaults[name] for name in (*torch_pipeline.REFUSED,) if name in defaults}
    assert len(loaded("red", callback_on_step_end_tensor_inputs=["latents"], **harmless).images) == 1


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"callback_on_step_end": print},
            ValueError,
            "callback_on_step_end has no effect, since a student has no steps between which it could be called, got "
            "builtin_function_or_method: leave it out",
        ),
        ({"callback": print}, ValueError, "callback has no effect"),
        ({"negative_prompt_embeds": torch.zeros(1, 8, 8)}, ValueError, "no guidance, got Tensor: leave it out"),
        ({"guidance_scale": 7.5}, ValueError, "guidance_scale must be at most 1, since .* no guidance, got 7.5"),
        ({"timesteps": [999, 1]}, ValueError, r"timesteps has no effect, since num_inference_steps .* got \[999, 1\]"),
        ({"eta": 0.5}, ValueError, "eta has no effect, since a student adds no noise, got 0.5"),
        ({"ip_adapter_image": Image.new("RGB", (8, 8))}, ValueError, "image prompts are not supported, got Image"),
        ({"cross_attention_kwargs": {"gligen": 1}}, ValueError, r"may only have 'scale', got \['gligen'\]"),
        ({"prompt_embeds": torch.zeros(1, 8, 8)}, ValueError, "either prompt or prompt_embeds, got both"),
        ({"prompt": None}, ValueError, "either prompt or prompt_embeds, got neither"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 8, 9)},
            ValueError,
            r"prompt_embeds must be of shape \[b, l, 8\], got \[1, 8, 9\]",
        ),
        ({"prompts": "red"}, TypeError, "TiUEPipeline has no argument 'prompts'"),
    ],
)
def test_refused_arguments(loaded, kwargs, error, message):
    with pytest.raises(error, match=message):
        loaded(**{"prompt": "red", **kwargs})


def test_images_of_each_output_type_are_the_same(loaded):
    images = {kind: loaded("red", generator=seeded(), output_type=kind).images for kind in ("pil", "np", "pt")}
    assert images["np"].shape == (1, 16, 16, 3) and images["pt"].shape == (1, 3, 16, 16)
    np.testing.assert_array_equal(images["pt"].permute(0, 2, 3, 1).numpy(), images["np"])
    np.testing.assert_array_equal(np.array(images["pil"][0]), np.round(255 * images["np"][0]).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_unet_runs_compiled(pipe, reference, how):
    seen = []

    def backend(graph, inputs):
        seen.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    if how == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    else:
        pipe.unet.compile(backend=backend, fullgraph=True)
    close(f"compiled {how}", latents_of(pipe), reference)
    print(f"graphs: {seen}")
    assert len(seen) == 1 and seen[0] > 50  # the whole pass is one graph
    latents_of(pipe)
    assert len(seen) == 1  # and it is not compiled again


def test_channels_last(pipe, reference):
    pipe.unet.to(memory_format=torch.channels_last)
    layouts = []
    pipe.unet.conv_out.register_forward_hook(
        lambda _, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    close("channels_last", latents_of(pipe), reference)
    assert layouts == [True]


def test_offloading_moves_the_unet_for_the_pass(pipe, student, reference, monkeypatch):
    """An accelerator is at hand in few tests: hooks as enable_model_cpu_offload sets them, all to the CPU."""
    moves = []
    pipe.unet, hook = cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    before = type(hook.hook).pre_forward

    def pre_forward(self, module, *args, **kwargs):
        moves.append(type(module).__name__)
        return before(self, module, *args, **kwargs)

    monkeypatch.setattr(type(hook.hook), "pre_forward", pre_forward)
    close("offloaded", latents_of(pipe), reference, 0)
    assert moves == ["UNet2DConditionModel"]

    other, _ = cpu_offload_with_hook(UNet2DConditionModel.from_pretrained(student / "unet"), torch.device("cpu"))
    pipe.unet = other
    close("a UNet that was offloaded before it came", latents_of(pipe), reference, 0)
    assert moves == ["UNet2DConditionModel"] * 2


def test_enable_model_cpu_offload_hooks_every_part(pipe, reference):
    pipe.enable_model_cpu_offload(device="cpu")
    close("enable_model_cpu_offload", latents_of(pipe), reference, 0)
    assert [hasattr(module, "_hf_hook") for module in (pipe.text_encoder, pipe.unet, pipe.vae)] == [True] * 3


def test_a_stock_pipeline_shares_the_parts(loaded, student):
    stock = StableDiffusionPipeline(**loaded.components)
    stock.set_progress_bar_config(disable=True)
    own = StableDiffusionPipeline.from_pretrained(student)
    own.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    np.testing.assert_array_equal(
        stock("red", generator=seeded(), **how).images, own("red", generator=seeded(), **how).images
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(student, reference, dtype):
    pipe = TiUEPipeline.from_pretrained(student, torch_dtype=dtype)
    text = pipe.encode_prompts(["red", "apple"], "cpu").float()  # as from another program, in another dtype
    close(f"{dtype}", latents_of(pipe, None, prompt_embeds=text), reference, 0.05)


def write_lora(folder, pipe, rank: int = 2):
    """A LoRA of the attention of the UNet and of the text encoder, in diffusers' format."""
    generator = seeded(1)
    tensors = {}
    for part, module in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        names = ("to_q", "to_v") if part == "unet" else ("q_proj", "v_proj")
        for name, layer in module.named_modules():
            if name.endswith(names):
                out, into = layer.weight.shape
                tensors[f"{part}.{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
                tensors[f"{part}.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder / "pytorch_lora_weights.safetensors"


def test_loras(pipe, student, reference, tmp_path):
    """The oracle is our own merge, which the tests of LoRAs compare with peft."""
    lora = write_lora(tmp_path / "lora", pipe)
    merge_lora(student, [lora], tmp_path / "whole")
    merge_lora(student, [lora], tmp_path / "half", scale=[0.5])
    whole, half = (
        latents_of(TiUEPipeline.from_pretrained(tmp_path / name, scheduler=pipe.scheduler))
        for name in ("whole", "half")
    )
    assert relative_error(whole, torch.from_numpy(reference)) > 0.01  # it does something
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    close("load_lora_weights", latents_of(pipe), whole, 1e-4)
    close("scale 0.5", latents_of(pipe, cross_attention_kwargs={"scale": 0.5}), half, 1e-4)
    close("scale 1 again", latents_of(pipe), whole, 1e-4)
    pipe.set_adapters(["style"], [0.5])
    close("set_adapters", latents_of(pipe), half, 1e-4)
    pipe.set_adapters(["style"], [1.0])
    pipe.fuse_lora()
    close("fuse_lora", latents_of(pipe), whole, 1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    close("unload_lora_weights", latents_of(pipe), reference, 1e-4)


@pytest.fixture(scope="module")
def checker():
    """A safety checker with random weights, which flags nothing until its thresholds are lowered."""
    side = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**side, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=side, vision_config=vision, projection_dim=8)
    model = StableDiffusionSafetyChecker(config).eval()
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return model, extractor


def test_the_safety_checker_blackens_what_it_flags(student, loaded, checker):
    model, extractor = checker
    given = {"safety_checker": model, "feature_extractor": extractor}
    pipe = TiUEPipeline.from_pretrained(student, **given)
    plain = loaded("red", generator=seeded(), output_type="np").images
    for flag in (False, True):
        model.concept_embeds_weights.data.fill_(-2.0 if flag else 2.0)  # a cosine similarity is above, or below
        done = pipe("red", generator=seeded(), output_type="np")
        assert done.nsfw_content_detected == [flag]
        np.testing.assert_array_equal(done.images, np.zeros_like(plain) if flag else plain)
    images, flagged = pipe(["red", "red"], generator=seeded(), return_dict=False)
    assert flagged == [True, True] and [image.getextrema() for image in images] == [((0, 0),) * 3] * 2
    with pytest.raises(ValueError, match="safety_checker needs a feature_extractor"):
        TiUEPipeline(**{**pipe.components, "feature_extractor": None})
