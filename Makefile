# make demo and make test do everything from a fresh clone; the other targets are for development.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt cmake/cuda.cmake setup.py pyproject.toml constraints.txt
NATIVE := $(filter csrc/%,$(SOURCES)) $(wildcard tests/cpu_kernels/*.cpp tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/include/*.h tests/cuda_on_cpu/include/*/*.h)
RUN := runs/demo

.PHONY: demo test bench cuda-check gpu-check lint format clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.train ## train a tiny model on Python's own text for at most 5 minutes, then evaluate, sample and infill
	rm -rf $(RUN)
	$(BIN)/sedd train --run_dir $(RUN) --max_minutes 5
	$(BIN)/sedd eval perplexity $(RUN)
	$(BIN)/sedd sample $(RUN) --num 3 --seed 1
	$(BIN)/sedd infill $(RUN) 'def {{10}}(self):{{40}}return {{12}}' --seed 1

test: $(VENV)/.test ## run the tests
	$(BIN)/python -m pytest -q

bench: $(VENV)/.test ## run the benchmarks, draw the picture and refresh the table in docs/performance.md
	$(BIN)/python -m pytest benchmarks/ --benchmark-only -q --benchmark-json=benchmarks/results/latest.json
	$(BIN)/python benchmarks/report.py benchmarks/results/latest.json
	$(BIN)/python benchmarks/profiles.py

cuda-check: $(VENV)/.test ## check nvcc's machine code, without a GPU, and refresh the table in docs/kernels.md
	$(BIN)/python benchmarks/cuda_check.py --docs docs/kernels.md

gpu-check: export SEDD_CUDA := on
gpu-check: $(VENV)/.test ## on a machine with a GPU: tests, compute-sanitizer and timings in ten minutes
	$(BIN)/python benchmarks/gpu_check.py --out benchmarks/results/gpu-check.json

lint: $(VENV)/.dev ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/.dev ## let ruff and clang-format change the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info sedd_ext/_C.*.so

# An environment with the package and the extra that the stamp is named after; built anew when a source changes.
$(VENV)/.%: $(SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.10 or newer, or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is older than 3.10: set PYTHON= to a newer one"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: Python's venv module is missing: install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "make: Python.h is missing: install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "make: no C++ compiler found: install g++ or clang, or set CXX="; exit 1; }
	@echo "setting up $(VENV): packages are downloaded and the kernels built, which takes a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools warns at length of editable installs
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	@touch $@
