# make quickstart: train on real photographs in minutes.  make test: the tests, on any machine.  make bench: figures for the docs.
PYTHON ?= python3
VENV ?= .venv
TESTS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test test-cuda-host lint bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[quickstart,dev]"
	touch $(READY)

quickstart: $(READY)
	$(BIN)/python run/quickstart.py

lint: $(READY)
	$(BIN)/ruff check .

# Compiled modules are kept, whatever the shell says: the processes that tests start would compile the package again
test: lint
	PYTHONDONTWRITEBYTECODE= DINOV2_REQUIRE_ORACLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --reruns 1 --max-suite-reruns 3 --rerun-show-tracebacks --durations 15 $(TESTS)

# The host side of CUDA without a GPU, under the newest torch that pip offers and under an older one
CUDA_TORCH ?= torch torch==2.11.0

test-cuda-host:
	PYTHON=$(PYTHON) tests/cuda_host/versions.sh $(CUDA_TORCH)

# CPU benchmarks, under 20 minutes on two cores; each writes a page to benchmarks/results/
bench: $(READY)
	$(BIN)/python -m benchmarks.step --write
	$(BIN)/python -m benchmarks.memory --write
	$(BIN)/python -m benchmarks.roofline --write
	$(BIN)/python -m benchmarks.scaling --write
	$(BIN)/python -m benchmarks.same_curve --write

clean:
	rm -rf $(VENV) .venv-cuda-* .oracle* build *.egg-info
