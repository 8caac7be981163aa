# `make demo` and `make test` set up everything; `make` alone lists what there is.

VENV := .venv# not absolute, for make splits a path at its spaces
SUITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUITS)' 2>/dev/null && echo $$p && break; done)

define NO_PYTHON
ResGrid needs Python 3.11 to 3.14, and none of them is on the PATH.
  Debian, Ubuntu:  apt-get install python3 python3-venv
  Fedora:          dnf install python3
  macOS:           brew install python@3.14
  without root:    install uv (https://docs.astral.sh/uv); `make` then lets it fetch a Python
  elsewhere:       make PYTHON=/path/to/python
endef
export NO_PYTHON

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
# A person's settings of pip that break an environment; those of indexes and proxies stay.
export PIP_USER := 0
unexport PIP_TARGET PIP_PREFIX PIP_ROOT

.DEFAULT_GOAL := help
.PHONY: help install demo up worker ui test test-long test-gpu check audit format repro bench bench-gpu gpu-wheels picture \
	lock clean

help:  ## List the targets
	@awk 'BEGIN { FS = ":[^#]*## *" } /^##@ / { print "\n" substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  %-12s%s\n", $$1, $$2 }' Makefile

##@ Use it: the first time `make demo`, then source .venv/bin/activate
install: $(VENV)/installed  ## Make .venv with the locked dependencies and this package

$(VENV)/installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || command -v uv >/dev/null || { echo "$$NO_PYTHON"; exit 1; }
	@echo "Setting up .venv, which takes minutes: about 3 GB to fetch the first time, most of it torch"
	@if [ -n "$(PYTHON)" ]; then "$(PYTHON)" -m venv $(VENV); else uv venv --quiet --seed --clear --python 3.13 $(VENV); fi
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	@$(VENV)/bin/uv pip install --quiet --python $(VENV) --compile-bytecode --require-hashes -r requirements.lock
	@$(VENV)/bin/uv pip install --quiet --python $(VENV) --no-deps --editable .
	@touch $@

demo: install  ## Run the whole pipeline on handwritten digits: minutes on a laptop
	@cd examples/digits && dvc repro && resgrid sync
	@echo
	@echo "Next: open examples/digits/reports/index.html, then"
	@echo "  source .venv/bin/activate && cd examples/digits"
	@echo "  resgrid ui        # browse and compare the runs in MLflow; Ctrl-C ends it"

up: install  ## Start Prefect, MLflow and a worker here; Ctrl-C ends them
	@resgrid up

POOL ?= pool
worker: install  ## Train cells of a work pool on this machine (POOL=pool SLOTS=4 NAME=node-7)
	@resgrid worker --pool "$(POOL)" $(if $(SLOTS),--slots $(SLOTS)) $(if $(NAME),--name "$(NAME)")

PIPELINE ?= .
ui: install  ## Serve MLflow's pages (PIPELINE=examples/digits for the demo's)
	cd "$(PIPELINE)" && resgrid ui

repro: install  ## Run the whole grid on CIFAR-10: weeks without a GPU
	dvc repro

##@ Test and measure
PYTEST := pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: install  ## Run the tests
	$(PYTEST)

test-long: install  ## Run the tests in their long forms as well
	$(PYTEST) -m "long or not long"

bench: install  ## Measure the speed against the standard loop: a quarter of an hour on an idle machine
	python benchmarks/speed.py

# Neither of these two installs anything but the wheels that `make gpu-wheels` left in .gpu/wheels: they run on a
# machine with a GPU, torch and no network, with PYTHON=python3.
ON_GPU = PYTHONPATH=$(CURDIR)/src:$(CURDIR)/.gpu/site$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
CARRIED = @[ -d $(VENV) ] || [ ! -d .gpu/wheels ] || $(PYTHON) -m pip install --quiet --no-index --no-deps \
	--no-compile --no-cache-dir --upgrade --target .gpu/site .gpu/wheels/*.whl
bench-gpu:  ## Measure training steps on a GPU: five minutes at most, no `make install` needed
	$(CARRIED)
	$(ON_GPU) benchmarks/gpu.py

test-gpu:  ## Run the tests that need a GPU: no `make install` needed
	$(CARRIED)
	$(ON_GPU) -m pytest --noconftest -p no:cacheprovider -W default tests/test_gpu.py

GPU_PYTHON ?= 3.12
GPU_WHEELS := numpy pillow pydantic pydantic-core annotated-types typing-inspection typing-extensions ruamel-yaml \
	ruamel-yaml-clib safetensors pytest iniconfig packaging pluggy pygments
gpu-wheels: install  ## Fetch what a Linux machine with torch alone needs beside it (GPU_PYTHON=3.12)
	rm -rf .gpu/wheels
	for name in $(GPU_WHEELS); do grep -hoE "^$$name==[^ ]+" requirements.lock | head -1; done | \
		xargs $(VENV)/bin/python -m pip download --quiet --no-deps --only-binary=:all: --dest .gpu/wheels \
		--python-version $(GPU_PYTHON) --implementation cp --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
	@du -sh .gpu/wheels

##@ Change it
PRIVATE := ^\s*(import dvc|from dvc[. ])|PREFECT__|(prefect|mlflow)(\.[a-z_]+)*\._
check: install  ## Style, types, import contracts, and other projects' public parts alone
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	@! grep -rnE --include='*.py' '$(PRIVATE)' src tasks flows benchmarks || { echo "DVC's and private parts, above"; exit 1; }

picture: install  ## Draw ARCHITECTURE.md's picture anew from the imports
	python docs/picture.py

audit: install  ## Check the locked dependencies against known advisories (asks a server)
	uv tool run pip-audit --requirement requirements.lock --require-hashes --disable-pip --strict

format: install  ## Put the code into shape
	ruff check --fix .
	ruff format .

lock:  ## Resolve the dependencies anew, for Linux and macOS and Python 3.11 to 3.14
	$(VENV)/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --extra dev \
		--no-header --constraints constraints.txt pyproject.toml -o requirements.lock

clean:  ## Delete .venv and caches (no data, no results)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
