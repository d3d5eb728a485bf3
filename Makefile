# make quickstart: train on real photographs in minutes.  make test: run the tests, 12 minutes on two cores.  make bench: regenerate the docs' figures.
PYTHON ?= python3
VENV ?= .venv
TESTS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test test-cuda-host lint bench commands docs package clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[quickstart,dev]"
	touch $(READY)

quickstart: $(READY)
	$(BIN)/python run/quickstart.py

lint: $(READY)
	$(BIN)/ruff check .

# Cache bytecode even if the shell disables it: otherwise every process that a test starts compiles the package again
test: lint
	@echo "$(if $(TESTS),testing $(TESTS),testing everything: about 12 minutes on two cores; TESTS=tests/train runs a part)"
	PYTHONDONTWRITEBYTECODE= DINOV2_REQUIRE_ORACLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --reruns 1 --max-suite-reruns 3 --rerun-show-tracebacks --durations 15 $(TESTS)

# Test the host side of CUDA without a GPU, with the latest torch on pip and with an older one
CUDA_TORCH ?= torch torch==2.11.0

test-cuda-host:
	PYTHON=$(PYTHON) tests/cuda_host/versions.sh $(CUDA_TORCH)

# CPU benchmarks, less than 20 minutes on two cores; each writes a page to benchmarks/results/
bench: $(READY)
	$(BIN)/python -m benchmarks.step --write
	$(BIN)/python -m benchmarks.memory --write
	$(BIN)/python -m benchmarks.roofline --write
	$(BIN)/python -m benchmarks.scaling --write
	$(BIN)/python -m benchmarks.same_curve --write

# Run the commands that the pages show, on generated images and with a tiny network
commands: $(READY)
	$(BIN)/python -m tests.docs.run_commands

# The documentation as a site in build/site; a broken link is an error
docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict

# Build and check the distributions, the wheel in another environment, the Dockerfile without docker, and the notebook
package: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ci]"
	tests/packaging/check.sh $(BIN)/python

clean:
	rm -rf $(VENV) .venv-cuda-* .oracle* build *.egg-info
