import json
import math
import re

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from tests import fake_hub, tiny
from tiue_jax.cli import convert as cli
from tiue_jax.convert.lora_files import read_lora
from tiue_jax.convert.merge_lora import apply, merge_lora
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.unet import UNet
from tiue_jax.weights.tree import to_torch_names

RANK, SCALE = 2, 0.5
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
UNET_LAYERS = {  # torch's shapes
    f"{ATTENTION}.to_q": (8, 8),
    f"{ATTENTION}.to_out.0": (8, 8),
    "down_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
    "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
}
TEXT_LAYERS = {"text_model.encoder.layers.1.self_attn.q_proj": (8, 8), "text_model.encoder.layers.1.mlp.fc1": (16, 8)}
SHAPES = {
    "unet": functional.abstract(UNet, tiny.UNET)[1],
    "text_encoder": functional.abstract(CLIPTextModel, tiny.TEXT)[1],
}


def halves(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """up [o r] and down [r i], in the shape that their layer's weight has."""
    rng = np.random.default_rng(seed)
    down = rng.standard_normal((RANK, *shape[1:]), np.float32)
    return rng.standard_normal((shape[0], RANK, *(1 for _ in shape[2:])), np.float32), down


def change(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return np.tensordot(up.reshape(len(up), RANK), down, axes=1)


def peft(part: str, module: str) -> tuple[str, str]:
    return tuple(f"{part}.{module}.lora_{side}.weight" for side in "BA")


def older(part: str, module: str) -> tuple[str, str]:
    middle = "lora" if part == "unet" else "lora_linear_layer"
    return tuple(f"{part}.{module}.{middle}.{side}.weight" for side in ("up", "down"))


def kohya(part: str, module: str) -> tuple[str, str]:
    name = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + module.replace(".", "_")
    return tuple(f"{name}.lora_{side}.weight" for side in ("up", "down"))


def kohya_by_diffusers(part: str, module: str) -> tuple[str, str]:
    return tuple(name.replace("lora_te_", "lora_te1_") for name in kohya(part, module))


def of_an_adapter(part: str, module: str) -> tuple[str, str]:
    return tuple(name.replace(".weight", ".default_0.weight") for name in peft(part, module))


def of_a_peft_model(part: str, module: str) -> tuple[str, str]:
    return tuple(f"base_model.model.{module}.lora_{side}.weight" for side in "BA")


def oldest(part: str, module: str) -> tuple[str, str]:
    attention, _, which = module.removesuffix(".0").rpartition(".to_")
    return tuple(f"{attention}.processor.to_{which}_lora.{side}.weight" for side in ("up", "down"))


def lora_file(path, naming, layers, alpha=None, metadata=None):
    tensors = {}
    for i, (part, module, shape) in enumerate(layers):
        up_name, down_name = naming(part, module)
        up, down = halves(shape, i)
        tensors |= {up_name: up, down_name: down}
        if alpha is not None:
            tensors[f"{down_name.removesuffix('.lora_down.weight')}.alpha"] = np.array(alpha, np.float16)
    save_file(tensors, path, metadata=metadata)
    return path


ALL = [("unet", *item) for item in UNET_LAYERS.items()] + [("text_encoder", *item) for item in TEXT_LAYERS.items()]
METADATA = {"unet.lora_alpha": 3, "unet.alpha_pattern": {"to_q": 5}, "text_encoder.lora_alpha": 1}


@pytest.mark.parametrize(
    ("naming", "layers", "alpha", "metadata"),
    [
        (peft, ALL, None, None),
        (peft, ALL, None, METADATA),
        (older, ALL, None, None),
        (kohya, ALL, 8, None),
        (kohya_by_diffusers, ALL, 8, None),
        (of_an_adapter, ALL, None, METADATA),
        (oldest, ALL[:2], None, None),
    ],
)
def test_each_naming_adds_scale_alpha_over_rank_times_b_a(tmp_path, naming, layers, alpha, metadata):
    kept = metadata and {"lora_adapter_metadata": json.dumps(metadata)}
    path = lora_file(tmp_path / "lora.safetensors", naming, layers, alpha, kept)
    deltas = read_lora(path, SHAPES)
    for part, shapes in SHAPES.items():
        zeros = to_torch_names(apply(functional.init(shapes, 0), [({}, SCALE)]))
        got = to_torch_names(apply(functional.init(shapes, 0), [(deltas.get(part, {}), SCALE)]))
        own = {f"{module}.weight": (i, shape) for i, (p, module, shape) in enumerate(layers) if p == part}
        for name, before in zeros.items():
            if name not in own:
                np.testing.assert_array_equal(got[name], before)
                continue
            alpha_of_layer = alpha or RANK
            if metadata:
                alpha_of_layer = 1 if part == "text_encoder" else 5 if "to_q" in name else 3
            want = before + SCALE * alpha_of_layer / RANK * change(*halves(own[name][1], own[name][0]))
            np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


def test_names_of_transformers_5_and_other_dtypes(tmp_path):
    path = tmp_path / "lora.safetensors"
    up, down = halves((8, 8), 0)
    names = peft("text_encoder", "encoder.layers.0.self_attn.v_proj")
    save_file(dict(zip(names, (up.astype(np.float16), down.astype(np.float16)), strict=True)), path)
    deltas = read_lora(path, SHAPES)["text_encoder"]
    kernel = ("text_model", "encoder", "layers", 0, "self_attn", "v_proj", "kernel")
    assert list(deltas) == [kernel]
    params = functional.cast(functional.init(SHAPES["text_encoder"], 0), np.float16)
    assert (
        to_torch_names(apply(params, [(deltas, 1.0)]))[".".join(map(str, kernel[:-1])) + ".weight"].dtype == np.float16
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: x.update({"unet.nowhere.to_q.lora_A.weight": x["a"]}), "unused: a, unet.nowhere.to_q.lora_A.weight"),
        (lambda x: x.update({f"unet.{ATTENTION}.to_k.dora_scale": x["a"]}), "to_k lacks down and up"),
        (
            lambda x: x.update({f"unet.{ATTENTION}.to_q.dora_scale": np.ones((2, 4), np.float32)}),
            r"to_q has a magnitude \[2, 4\] for a weight \[8, 8\]",
        ),
        (
            lambda x: x.update({f"unet.{ATTENTION}.to_q.hada_w1_a": x["a"]}),
            "1 that do not belong together: unet.*to_q has .*hada_w1_a",
        ),
        (
            lambda x: x.update({f"lora_unet_{ATTENTION.replace('.', '_')}_to_q.lora_down.weight": x["a"]}),
            "1 twice: .*to_q",
        ),
        (lambda x: x.pop(f"unet.{ATTENTION}.to_q.lora_B.weight"), rf"unet.{ATTENTION}.to_q lacks up"),
        (
            lambda x: x.update({f"unet.{ATTENTION}.to_q.lora_B.weight": np.zeros((9, 2), np.float32)}),
            rf"unet.{ATTENTION}.to_q is \[8, 8\], the file has down \[2, 8\], up \[9, 2\]",
        ),
        (
            lambda x: x.update(
                {"unet.down_blocks.0.resnets.0.conv1.lora_A.weight": np.zeros((2, 8, 1, 1), np.float32)}
            ),
            r"conv1 is \[8, 8, 3, 3\], the file has down \[2, 8, 1, 1\], up \[8, 2, 1, 1\]",
        ),
        (
            lambda x: x.update({f"unet.{ATTENTION}.to_q.lora_B.weight": np.zeros((8, 2), np.int8)}),
            rf"unet.{ATTENTION}.to_q.lora_B.weight is I8",
        ),
    ],
)
def test_everything_that_does_not_fit_is_in_one_error(tmp_path, damage, message):
    path = lora_file(tmp_path / "lora.safetensors", peft, ALL)
    tensors = load_file(path)
    tensors["a"] = np.zeros((2, 8), np.float32)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(path, SHAPES)
    assert str(error.value).startswith(f"{path}: the LoRA does not fit the model: ")
    assert re.search("[12] unused: a[,;]?", str(error.value)) and "\n" not in str(error.value)


def test_other_kinds_of_file_are_refused(tmp_path):
    for fields, message in (
        ({"unet.use_dora": True}, r"unet.use_dora is true, but unet.\S+ has no lora_magnitude_vector in "),
        ({"unet.lora_bias": True}, "unet.lora_bias is true: this variant of LoRA is not supported"),
        ({"unet.init_lora_weights": "pissa_niter_4"}, "unet.init_lora_weights is 'pissa_niter_4': this LoRA belongs"),
        ({"unet.alpha_pattern": {"to_q": 5, "to_k": 5}}, "unet.alpha_pattern: 'to_k' matches no layer of the file"),
        ({"unet.rank_pattern": {"": 2}}, "unet.rank_pattern: '' matches no layer of the file"),
        ({"unet.rank_pattern": {"(": 2}}, r"unet.rank_pattern: '\(' is refused, since some regular expressions run"),
        ({"unet.rank_pattern": {"*": 2}}, r"unet.rank_pattern: '\*' is no pattern: "),
        ({"unet.rank_pattern": {"to_q": 3}}, rf"unet gives {ATTENTION}.to_q rank 3, its matrices have rank {RANK}"),
        ({"unet.r": 4}, rf"unet gives \S+ rank 4, its matrices have rank {RANK}"),
        (
            {"unet.alpha_pattern": 4},
            "unet.alpha_pattern must be an object whose values are finite numbers .*, got 4",
        ),
    ):
        path = tmp_path / "fields.safetensors"
        lora_file(path, peft, ALL, metadata={"lora_adapter_metadata": json.dumps(fields)})
        with pytest.raises(ValueError, match=f"fields.safetensors: metadata field {message}"):
            read_lora(path, SHAPES)
    for field, value in (("lora_alpha", "x"), ("lora_alpha", float("nan")), ("lora_alpha", 10**400)):
        kept = {"lora_adapter_metadata": json.dumps({f"unet.{field}": value})}
        path = lora_file(tmp_path / "alpha.safetensors", peft, ALL, metadata=kept)
        with pytest.raises(ValueError, match="metadata field unet.lora_alpha must be a finite number or None, got"):
            read_lora(path, SHAPES)
    for written in ("{", "[]"):
        path = lora_file(tmp_path / "x.safetensors", peft, ALL, metadata={"lora_adapter_metadata": written})
        with pytest.raises(
            ValueError,
            match="metadata field lora_adapter_metadata: (not valid|expected a) JSON",
        ):
            read_lora(path, SHAPES)
    path = lora_file(tmp_path / "alphas.safetensors", kohya, ALL, alpha=[1, 2])
    with pytest.raises(ValueError, match=r"alphas.safetensors: alpha of \S+ is F16 \[2\], not a number"):
        read_lora(path, SHAPES)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="empty.safetensors: holds no LoRA"):
        read_lora(tmp_path / "empty.safetensors", SHAPES)
    (tmp_path / "lora.pt").touch()
    with pytest.raises(ValueError, match="lora.pt: expected a .safetensors file"):
        read_lora(tmp_path / "lora.pt", SHAPES)
    for name in ("loras/style.safetensors", "loras/style.pt", "./a/b"):
        with pytest.raises(FileNotFoundError, match=f"{name.removeprefix('./')}: no such file"):
            read_lora(name, SHAPES)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: no such file"):
        read_lora(tmp_path / "nowhere.safetensors", SHAPES)
    with pytest.raises(ValueError, match=r"name one file: 5 LoRA files: alpha.safetensors, "):
        read_lora(tmp_path, SHAPES)
    (tmp_path / "new").mkdir()
    with pytest.raises(FileNotFoundError, match=r"new: no LoRA, expected pytorch_lora_weights.safetensors, adapter_m"):
        read_lora(tmp_path / "new", SHAPES)


def factors(path):
    """The factors of all layers in a file, or the only file of a folder."""
    return {delta.factor for deltas in read_lora(path, SHAPES).values() for delta in deltas.values()}


def test_the_files_of_peft_have_their_alpha_beside_them(tmp_path):
    unet = ALL[: len(UNET_LAYERS)]
    path = lora_file(tmp_path / "adapter_model.safetensors", of_a_peft_model, unet)
    config = tmp_path / "adapter_config.json"
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json: no such file, expected the alpha of "):
        read_lora(tmp_path, SHAPES)
    config.write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 7, "alpha_pattern": {"to_q": 3}}))
    assert factors(tmp_path) == factors(path) == {7 / RANK, 3 / RANK}
    config.write_text(json.dumps({"peft_type": "VERA"}))
    with pytest.raises(ValueError, match="peft_type is 'VERA', not supported, expected one of LORA, LOHA, LOKR"):
        read_lora(tmp_path, SHAPES)
    text = ALL[len(UNET_LAYERS) :]
    lora_file(path, of_a_peft_model, text)
    config.write_text(json.dumps({"lora_alpha": 5, "use_rslora": True}))
    assert factors(tmp_path) == {5 / math.sqrt(RANK)}


def test_other_file_names_and_integer_alphas(tmp_path):
    lora_file(tmp_path / "Style.SAFETENSORS", kohya, ALL)
    tensors = load_file(tmp_path / "Style.SAFETENSORS")
    for name in [name for name in tensors if name.endswith(".lora_down.weight")]:
        tensors[name.replace(".lora_down.weight", ".alpha")] = np.array(3, np.int32)
    save_file(tensors, tmp_path / "Style.SAFETENSORS")
    (tmp_path / "optimizer.safetensors").touch()
    assert factors(tmp_path) == factors(tmp_path / "Style.SAFETENSORS") == {3 / RANK}


def test_a_lora_of_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TIUE_MODELS", raising=False)
    content = lora_file(tmp_path / "a.safetensors", kohya, ALL, 4).read_bytes()
    files = {"style.safetensors": content, "README.md": b"", "unet/model.safetensors": b"x"}
    with fake_hub.serve(tmp_path / "downloads", {"a/one": files, "a/two": {**files, "more.safetensors": b"x"}}) as hub:
        assert factors("a/one") == factors("a/two/style.safetensors") == {4 / RANK}
        assert "a/one/style.safetensors: hub a/one at " in capsys.readouterr().err
        assert set(hub.served) == {"style.safetensors"}
        with pytest.raises(ValueError, match="hub a/two: name one file: 2 LoRA files: more.safetensors, style.safet"):
            read_lora("a/two", SHAPES)
        with pytest.raises(FileNotFoundError, match="hub a/two: no file x.safetensors"):
            read_lora("a/two/x.safetensors", SHAPES)
        with pytest.raises(FileNotFoundError, match="no file a/three, and hub a/three: no such repository"):
            read_lora("a/three", SHAPES)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert factors("a/one") == {4 / RANK}
    monkeypatch.setenv("TIUE_MODELS", str(tmp_path / "models"))
    (tmp_path / "models" / "a--four").mkdir(parents=True)
    lora_file(tmp_path / "models" / "a--four" / "x.safetensors", kohya, ALL, 6)
    assert factors("a/four") == {6 / RANK}


def test_several_loras_are_added_each_with_its_scale(tmp_path, capsys):
    teacher = tiny.write_pipeline(tmp_path / "teacher")
    one = lora_file(tmp_path / "one.safetensors", peft, ALL[:2])
    two = lora_file(tmp_path / "two.safetensors", kohya, ALL[1:], 6)
    command = ["convert", "merge-lora", "--model", str(teacher), "--lora", str(one), "--lora", str(two)]
    assert cli.main([*command, "--out", str(tmp_path / "both"), "--scale", "0.5", "--scale", "-2"]) == 0
    printed = capsys.readouterr().out
    assert f"{one} at scale 0.5 and {two} at scale -2 in {len(ALL)} weights" in printed
    merge_lora(teacher, one, tmp_path / "first", scale=0.5)
    merge_lora(tmp_path / "first", two, tmp_path / "second", scale=-2.0)
    unet = "unet/diffusion_pytorch_model.safetensors"
    got, want = (load_file(tmp_path / name / unet) for name in ("both", "second"))
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    with pytest.raises(ValueError, match="expected a scale for each LoRA, got 1 for 2"):
        merge_lora(teacher, [one, two], tmp_path / "new", scale=[1.0])


def test_values_that_are_not_finite_are_named(tmp_path):
    path = lora_file(tmp_path / "lora.safetensors", peft, ALL)
    tensors = load_file(path)
    tensors[f"unet.{ATTENTION}.to_q.lora_B.weight"][0, 0] = np.nan
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=rf"lora.safetensors: values not finite in the LoRA of {ATTENTION}.to_q.weight"
    ):
        apply(functional.init(SHAPES["unet"], 0), [(read_lora(path, SHAPES)["unet"], 1.0)])


def test_command_line(tmp_path, capsys):
    teacher = tiny.write_pipeline(tmp_path / "teacher", tiue_config={"sampler": "tiue", "num_inference_steps": 2})
    path = lora_file(tmp_path / "pytorch_lora_weights.safetensors", peft, ALL)
    command = [
        "convert",
        "merge-lora",
        "--model",
        str(teacher),
        "--lora",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main([*command, "--scale", "0.5"]) == 0
    assert f"at scale 0.5 in {len(ALL)} weights, in float32" in capsys.readouterr().out
    unet = "unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / unet) for folder in (teacher, tmp_path / "out"))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        f"{x}.weight" for x in UNET_LAYERS
    }
    assert (tmp_path / "out" / "tiue_config.json").read_bytes() == (teacher / "tiue_config.json").read_bytes()
    assert cli.main(command) == cli.BAD_INPUT
    with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
        merge_lora(teacher, path, tmp_path / "new", scale=float("nan"))
