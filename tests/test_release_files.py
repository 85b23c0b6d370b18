"""The files around the code: they parse, agree with pyproject.toml and the code, and what they name exists."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_packaging import PROJECT, ROOT, pins
from tiue_jax.convert.adapters import KINDS
from tiue_jax.sampling.samplers import SAMPLERS
from tiue_jax.training import losses

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
JOBSET = yaml.safe_load((ROOT / "deploy" / "jobset.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
TEXTS = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
_PATH = re.compile(r"`((?:\.?[\w-]+/)+[\w.-]*|[\w-]+\.(?:py|md|txt|toml|cff))`")
_LINK = re.compile(r"\]\(([^)#:]+)(#[\w-]+)?\)")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_is_of_this_version_and_of_the_paper():
    assert CITATION["version"] == PROJECT["version"] and CITATION["license"] == PROJECT["license"]
    assert f"## {PROJECT['version']}" in text("CHANGELOG.md")
    (paper,) = CITATION["references"]
    assert paper["url"] == "https://arxiv.org/abs/2505.21960" and paper["url"] in text("README.md")
    assert len(paper["authors"]) == 10 and paper["authors"][0]["family-names"] == "Li"


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_text_names_exists(name):
    content = text(name)
    named = sorted(set(_PATH.findall(content)) | {link for link, _ in _LINK.findall(content)})
    made = {"dist/", "pipeline.py"}  # by .ci/release, and by an export
    missing = [path for path in named if path not in made and not (ROOT / path).exists()]
    print(f"{name} names {len(named)} files and folders")
    assert missing == [] and len(named) >= (20 if name == "CONTRIBUTING.md" else 1)


def test_what_contributing_says_of_the_code_is_so():
    content = text("CONTRIBUTING.md")
    step = text("tiue_jax/training/distill.py")
    assert "`Distillation._student_loss`" in content and re.search(
        r"class Distillation:.*def _student_loss", step, re.S
    )
    assert "`SAMPLERS`" in content and SAMPLERS and "`KINDS`" in content and KINDS
    terms = re.findall(r"losses\.(\w+)\(", step)
    assert {"vsd", "kl", "clip", "lora"} <= set(terms) and all(callable(getattr(losses, term)) for term in terms)
    makefile = text("Makefile")
    assert all(
        re.search(rf"^{target}:", makefile, re.MULTILINE) for target in re.findall(r"^make (\w+)", content, re.M)
    )


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.stem)
def test_an_issue_asks_for_the_environment(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    asked = [field for field in form["body"] if "`tiue env`" in field["attributes"]["label"]]
    assert [field["attributes"]["render"] for field in asked] == ["text"]
    assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_images_have_the_pinned_versions():
    files = {name: pins(f"deploy/requirements-{name}.txt", "3.11") for name in ("cuda", "tpu")}
    release, base = pins("requirements-release.txt", "3.11"), pins("requirements.txt", "3.11")
    assert f"hatchling{release['hatchling'].specifier}" in DOCKERFILE
    assert set(re.findall(r"^FROM python:(\d+\.\d+)\.\d+-", DOCKERFILE, re.M)) == {"3.11"}
    for name, pinned in files.items():
        assert not pinned.keys() & base.keys()
        assert f"COPY deploy/requirements-{name}.txt" in DOCKERFILE and f" AS {name}\n" in DOCKERFILE
    jax = str(base["jax"].specifier)
    assert str(files["cuda"]["jax-cuda12-plugin"].specifier) == str(files["cuda"]["jax-cuda12-pjrt"].specifier) == jax
    for need in map(Requirement, PROJECT["optional-dependencies"]["gcs"]):
        assert need.specifier.contains(str(files["tpu"][canonicalize_name(need.name)].specifier).removeprefix("=="))


@pytest.mark.parametrize(("script", "pinned"), [(".ci/gpu", "cuda"), (".ci/tpu", "tpu")])
def test_images_have_what_ci_compiles_with(script, pinned):
    content = text(script)
    for name, value in re.findall(r"^(\w+)=([\d.]+)", content, re.M):
        content = content.replace(f"${name}", value)
    of_ci = dict(re.findall(r"([a-z][\w-]+)==([\d.]+\d)", content))
    of_image = pins(f"deploy/requirements-{pinned}.txt", "3.11")
    assert of_ci and {name: str(of_image[name].specifier) for name in of_ci} == {n: f"=={v}" for n, v in of_ci.items()}
    print(f"{script} and the image: {of_ci}")


def test_what_an_image_copies_is_sent_to_docker():
    sent = [line.removeprefix("!") for line in text(".dockerignore").splitlines() if line.startswith("!")]
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M) for name in line.split()}
    assert copied and [name for name in copied if not any(Path(name).match(pattern) for pattern in sent)] == []
    assert all((ROOT / name).exists() for name in copied)


def test_the_jobset_runs_one_process_on_each_host():
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = JOBSET["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"] * job["completions"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] and chips == rows * columns == 16
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3, 4] and rule["onExitCodes"]["containerName"] == container["name"]
    assert "stop at 2, 3 and 4" in text("docs/pods.md")
    assert container["args"][:2] == ["train", "--config=sd21_tiue"]


def test_the_source_distribution_has_these_files():
    include = tomllib.loads(text("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for pattern in include:
        assert list(ROOT.glob(pattern.removeprefix("/"))), f"{pattern} matches nothing"
    assert {"/CHANGELOG.md", "/CITATION.cff", "/CONTRIBUTING.md", "/SECURITY.md"} <= set(include)
