# Everything a fresh clone needs: `make demo`, `make test`. Only Python 3.11 and make must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-gpu check bench docs clean

demo: $(READY)
	$(BIN)/retain demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

# on a machine with a GPU and its build of torch in the environment: the same trainings, there
test-gpu: $(READY)
	RETAIN_TESTS_ON=gpu CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest -n 4 --dist worksteal \
	  tests/test_gpu.py tests/test_conformance.py tests/test_pipeline.py tests/training/test_resume.py

check: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(READY)
	$(BIN)/python bench/speed.py --write

docs: $(READY)
	$(BIN)/python docs/make_methods.py

# torch first and pinned: an unpinned request would bring gigabytes of GPU libraries on some systems
$(READY): requirements.txt requirements-starter.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-starter.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
