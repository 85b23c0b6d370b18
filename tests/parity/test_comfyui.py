"""The nodes for ComfyUI keep its conventions, and draw what the student's pipeline draws. ComfyUI itself is not needed.

ComfyUI's conventions, from its documentation: a pack is a folder whose `__init__.py` has NODE_CLASS_MAPPINGS. A node
has INPUT_TYPES, RETURN_TYPES, FUNCTION and CATEGORY. An IMAGE is a float32 tensor [b h w c] in [0, 1].
"""

import importlib.util
import inspect
import json
import sys
import types

import numpy as np
import pytest
import torch
from diffusers.utils import dynamic_modules_utils

from tests import tiny
from tests.test_imports import ROOT
from tiue_jax.convert import export
from tiue_jax.convert.torch_pipeline import TiUEPipeline

PACK = ROOT / "comfyui"
WORKFLOW = json.loads((PACK / "workflow.json").read_text(encoding="utf-8"))
WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


class SaveImage:
    """Stands in for the node of this name in ComfyUI."""

    saved: list[torch.Tensor] = []
    RETURN_TYPES = ()
    FUNCTION = "save_images"
    CATEGORY = "image"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})}}

    def save_images(self, images, filename_prefix):
        self.saved.append(images)
        return ()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models/diffusers with a student, a student in a folder of its own, and a pipeline that is none."""
    root = tmp_path_factory.mktemp("comfyui") / "models" / "diffusers"
    tiny.write_pipeline(root.parent / "source", {"sampler": "tiue", "num_inference_steps": 3})
    export.export_pipeline(root.parent / "source", root / "student")
    export.export_pipeline(root.parent / "source", root / "mine" / "other", dtype="float16")
    tiny.write_pipeline(root / "teacher")
    return root


@pytest.fixture(scope="module")
def pack(models, tmp_path_factory):
    """The pack, imported as ComfyUI imports it, beside stand-ins for the modules of ComfyUI that it uses."""
    comfy = types.ModuleType("comfy")
    comfy.model_management = types.SimpleNamespace(get_torch_device=lambda: torch.device("cpu"))
    paths = types.ModuleType("folder_paths")
    paths.get_folder_paths = {"diffusers": [str(models)]}.__getitem__
    name = str(PACK).replace(".", "_x_")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "comfy", comfy)
        patch.setitem(sys.modules, "folder_paths", paths)
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        yield module


def inputs_of(node) -> dict[str, tuple]:
    return {
        name: given for group in ("required", "optional") for name, given in node.INPUT_TYPES().get(group, {}).items()
    }


def run(pack, workflow: dict) -> dict[str, tuple]:
    """Runs a workflow of ComfyUI's API: checks the inputs of each node as ComfyUI does, then calls its function."""
    nodes, done = {**pack.NODE_CLASS_MAPPINGS, "SaveImage": SaveImage}, {}

    def output(number: str) -> tuple:
        if number in done:
            return done[number]
        node = nodes[workflow[number]["class_type"]]
        given, kwargs = workflow[number]["inputs"], {}
        assert given.keys() == inputs_of(node).keys()
        for name, (kind, *options) in inputs_of(node).items():
            value = given[name]
            if isinstance(value, list):  # a link: the number of a node, and which of its outputs
                source, index = value
                kwargs[name] = output(source)[index]
                assert nodes[workflow[source]["class_type"]].RETURN_TYPES[index] == kind
                continue
            if isinstance(kind, list):
                assert value in kind
            else:
                assert type(value) is WIDGETS[kind]
                if kind == "INT":
                    assert options[0]["min"] <= value <= options[0]["max"]
            kwargs[name] = value
        done[number] = getattr(node(), node.FUNCTION)(**kwargs)
        assert isinstance(done[number], tuple) and len(done[number]) == len(node.RETURN_TYPES)
        return done[number]

    for number in workflow:
        output(number)
    return done


def changed(**inputs) -> dict:
    """The workflow with other inputs, wherever a node has them."""
    return {
        number: {**node, "inputs": {name: inputs.get(name, value) for name, value in node["inputs"].items()}}
        for number, node in WORKFLOW.items()
    }


def images(pack, **inputs) -> np.ndarray:
    (drawn,) = run(pack, changed(**inputs))["2"]
    assert drawn.dtype == torch.float32 and drawn.device.type == "cpu" and drawn.ndim == 4 and drawn.shape[-1] == 3
    assert drawn.min() >= 0 and drawn.max() <= 1
    return drawn.numpy()


def test_the_nodes_keep_the_conventions(pack):
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        assert name.startswith("TiUE") and isinstance(node.CATEGORY, str) and isinstance(node.RETURN_TYPES, tuple)
        assert len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
        assert inspect.ismethod(node.INPUT_TYPES) and node.INPUT_TYPES().keys() <= {"required", "optional", "hidden"}
        parameters = list(inspect.signature(getattr(node, node.FUNCTION)).parameters)[1:]
        assert parameters == list(inputs_of(node))
        for kind, *options in inputs_of(node).values():
            assert (isinstance(kind, list) and kind) or kind.isupper()
            options = options[0] if options else {}
            if kind == "INT":
                assert options["min"] <= options["default"] <= options["max"] and options["max"] < 2**64


def test_only_students_are_listed(pack):
    folders, _ = inputs_of(pack.NODE_CLASS_MAPPINGS["TiUELoadStudent"])["folder"]
    assert folders == ["mine/other", "student"]


def test_the_workflow_draws_what_the_pipeline_draws(pack, models):
    SaveImage.saved.clear()
    drawn = images(pack)
    (saved,) = SaveImage.saved
    np.testing.assert_array_equal(saved.numpy(), drawn)
    pipe = TiUEPipeline.from_pretrained(models / "student")
    want = pipe("a red apple", generator=torch.Generator().manual_seed(0), output_type="np").images
    np.testing.assert_array_equal(drawn, want)


def test_every_input_has_its_effect(pack):
    drawn = images(pack)
    np.testing.assert_array_equal(images(pack), drawn)
    for inputs in ({"seed": 1}, {"seed": 2**64 - 1}, {"k": 1}, {"prompt": "red"}):
        difference = np.abs(images(pack, **inputs) - drawn).max()
        print(f"{inputs}: images differ by up to {difference:.2f}")
        assert difference > 1e-3
    np.testing.assert_array_equal(images(pack, k=3), drawn)  # it is the student's own
    assert images(pack, batch_size=3, width=24, height=16).shape == (3, 16, 24, 3)
    close = images(pack, folder="mine/other", dtype="bfloat16")
    assert close.shape == drawn.shape and np.abs(close - drawn).mean() < 0.05


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"trust_code": False}, r"student.pipeline\.py is a program: read it, then switch trust_code on"),
        (
            {"folder": "../teacher"},
            r"no student '\.\./teacher' in models/diffusers: write one with",
        ),
    ],
)
def test_a_student_that_cannot_be_loaded(pack, inputs, message):
    node = pack.NODE_CLASS_MAPPINGS["TiUELoadStudent"]
    given = {"folder": "student", "dtype": "float32", "trust_code": True} | inputs
    with pytest.raises(ValueError, match=message):
        node().load(**given)
