# make demo   sample the shipped student beside its teacher, then distil the teacher for a few minutes
# make test   ruff, mypy and every test
# make space  the folder build/space, ready to be uploaded to a Space of the Hugging Face hub
# make docs   builds the documentation site into .cache/site: open .cache/site/index.html
# make venv   only the environment;  make lint  only ruff and mypy;  make pytest  only the tests;  make clean  removes what the others made
#
# VENV=path chooses the environment, PYTHON=path the interpreter it is made with, PYTEST_ARGS="-n 2 -k unet" the tests.

VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadfile
BIN := $(VENV)/bin

# The first interpreter that runs (a pyenv shim may exist and refuse to), is new enough and can make environments.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

.PHONY: demo space test lint pytest docs venv clean

demo: $(VENV)/.installed
	$(BIN)/tiue quickstart

space:
	rm -rf build/space
	mkdir -p build/space
	cp space/* build/space/
	cp -rL tiue_jax build/space/tiue_jax
	find build/space -name __pycache__ -prune -exec rm -rf {} +

test: lint pytest

pytest: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	.ci/site $(VENV)

venv: $(VENV)/.installed

# An environment that was left half-made, or whose interpreter is gone, is made anew.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with the venv module found;" \
			"install one (Debian: python3 python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 1; }; \
		"$(PYTHON)" -m venv --clear $(VENV); }
	@echo "Installing requirements.txt into $(VENV): about a minute, once"
	@$(BIN)/python -m pip install -qq -r requirements.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt requirements-metrics.txt requirements-demo.txt
	@echo "Installing requirements-test.txt into $(VENV): some minutes, once"
	@$(BIN)/python -m pip install -qq -r requirements-test.txt
	@$(BIN)/python -m pip install -qq --no-deps -r requirements-metrics.txt -r requirements-demo.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .cache
	find . -name __pycache__ -prune -exec rm -rf {} +
