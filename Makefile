# make demo and make test work in a fresh clone; the other targets are for development.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt cmake/cuda.cmake setup.py pyproject.toml constraints.txt
NATIVE := $(filter csrc/%,$(SOURCES)) $(wildcard tests/cpu_kernels/*.cpp tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/include/*.h tests/cuda_on_cpu/include/*/*.h)
RUN := runs/demo
FLAGS :=
MINUTES ?= 5

.PHONY: demo test test-all breaks bench docs hub cuda-check gpu-check gpu-check-offline gpu-profile lint format wheels clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 20

# Without a GPU the demo does not need the CUDA kernels, which take minutes to build if nvcc is installed.
demo: export SEDD_CUDA := $(or $(SEDD_CUDA),$(if $(shell command -v nvidia-smi),auto,off))
demo: $(VENV)/.train ## train a tiny model on the sources of Python for 5 minutes (MINUTES=5), then evaluate, sample and infill
	@rm -rf $(RUN)
	@printf '\n== 1 of 4: training on the sources and documentation of this Python, $(MINUTES) minutes\n'
	$(BIN)/sedd train --run_dir $(RUN) --max_minutes $(MINUTES)
	@printf '\n== 2 of 4: measuring bits per byte on text held out from training, at most half a minute\n'
	$(BIN)/sedd eval perplexity $(RUN) --max_minutes 0.5 --json $(RUN)/eval/perplexity.json
	@printf '\n== 3 of 4: three samples, a few seconds\n'
	$(BIN)/sedd sample $(RUN) --num 3 --seed 1
	@printf '\n== 4 of 4: filling the gaps of a text, a few seconds\n'
	$(BIN)/sedd infill $(RUN) 'def {{10}}(self):{{40}}return {{12}}' --seed 1
	@$(BIN)/python examples/demo_summary.py $(RUN)

# One thread per process: two such processes test faster than one with two threads.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.dev ## run the tests; skip costly ones whose sources have not changed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

test-all: export OMP_NUM_THREADS := 1
test-all: $(VENV)/.dev ## run all tests under all schedules of the emulation, and record which costly ones passed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal --all --record

breaks: $(VENV)/.dev ## break the package and its tests on purpose; a test must fail each time
	$(BIN)/python tests/breaks.py

bench: $(VENV)/.dev ## run the benchmarks, and update the picture and the table in docs/performance.md
	$(BIN)/python -m pytest benchmarks/ --benchmark-only -q --benchmark-json=benchmarks/results/latest.json
	$(BIN)/python benchmarks/report.py benchmarks/results/latest.json
	$(BIN)/python benchmarks/profiles.py

# A kernel of a notebook runs beside Sphinx and whatever else there is: one thread.
docs: export OMP_NUM_THREADS := 1
docs: $(VENV)/.dev ## run the notebooks and build the documentation site in build/site
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/site
	@echo "build/site/index.html"

cuda-check: $(VENV)/.dev ## check the machine code of nvcc (needs no GPU), and update the table in docs/kernels.md
	$(BIN)/python benchmarks/cuda_check.py --docs docs/kernels.md

gpu-check: export SEDD_CUDA := on
gpu-check: $(VENV)/.dev ## on a machine with a GPU: tests, compute-sanitizer and timings in ten minutes
	$(BIN)/python benchmarks/gpu_check.py $(FLAGS)

# Uses the installed packages of $(PYTHON). OUT= sets the folder of the report; FLAGS="--device cpu --quick" is a quick
# test without a GPU.
gpu-check-offline: ## the same without network or .venv, including the build
	$(PYTHON) benchmarks/gpu_check.py --build $(FLAGS)

gpu-profile: ## without network or .venv: ncu counters of each kernel, and tile sizes of the fused head
	$(PYTHON) benchmarks/gpu_check.py --build --profile $(FLAGS)

lint: $(VENV)/.dev ## check with ruff, mypy and clang-format, without changes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/.dev ## format with ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

wheels: ## build the wheel and the source distribution into dist, and test them with TORCH="python3.10:2.6.0 2.13.0" (2.13.0)
	$(PYTHON) tests/wheels.py --out dist $(if $(TORCH),--torch $(TORCH))

hub: $(VENV)/.dev ## write the operators in the layout of the Hugging Face kernels hub into build/hub/sedd-ext
	$(BIN)/python tests/hub_layout.py sedd_ext --out build/hub/sedd-ext

clean: ## remove the environment and all build outputs
	rm -rf $(VENV) build dist *.egg-info sedd_ext/_C.*so

# Environment with the package and the extra named by the stamp file; rebuilt when a source changes.
$(VENV)/.%: $(SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.10 or newer, or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is older than 3.10: set PYTHON= to a newer one"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: Python's venv module is missing: install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "make: Python.h is missing: install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "make: no C++ compiler found: install g++ or clang, or set CXX="; exit 1; }
	@printf '== Setting up $(VENV) with %s\n' "$$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@printf '== pip downloads PyTorch and the other packages, builds the kernels (about 1 minute; CUDA kernels take more), and installs everything\n'
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools prints long warnings about editable installs
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -c constraints.txt -e ".[$*]"
	@touch $@
