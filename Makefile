# make quickstart: train on real photographs in minutes.  make test: everything CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test lint clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[quickstart,dev]"
	touch $(READY)

quickstart: $(READY)
	$(BIN)/python run/quickstart.py

lint: $(READY)
	$(BIN)/ruff check .

test: lint
	DINOV2_REQUIRE_ORACLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

clean:
	rm -rf $(VENV) .oracle* build *.egg-info
