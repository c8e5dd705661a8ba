# Set-up and checks. On a fresh machine with python3 (3.11 or newer), pip and make: `make demo`, `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/digits
# which tests: the fast ones; `make test TESTS=` runs all
TESTS ?= -m "not slow"

.PHONY: demo test onnx extras check lint format types docs clean

demo: $(VENV)/.experiments
	$(BIN)/hmog train digits --workdir $(RUN_DIR)
	$(BIN)/hmog report $(RUN_DIR)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

# converts programs to ONNX; it has its own environment, as jax2onnx wants an older orbax than checkpoints do
onnx: .venv-onnx/.ready

check: lint types docs test

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.lint $(VENV)/.experiments
	$(BIN)/mypy

docs: $(VENV)/.docs $(VENV)/.experiments
	$(BIN)/sphinx-build -W -q -b html docs docs/_build

clean:
	rm -rf $(VENV) .venv-onnx docs/_build build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# the environment needs no ensurepip: the pip that is there installs into it
$(BIN)/python:
	$(PYTHON) -m venv --without-pip $(VENV)

$(VENV)/.%: $(BIN)/python pyproject.toml
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --no-compile --disable-pip-version-check -e ".[$*]"
	touch $@

# what all checks need, at once
extras: $(BIN)/python
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --no-compile --disable-pip-version-check -e ".[lint,experiments,docs,test]"
	touch $(VENV)/.lint $(VENV)/.experiments $(VENV)/.docs $(VENV)/.test

.venv-onnx/.converter: pyproject.toml
	$(PYTHON) -m venv --without-pip .venv-onnx
	$(PYTHON) -m pip --python .venv-onnx/bin/python install --quiet --no-compile --disable-pip-version-check "jax2onnx~=0.17.1" jaxtyping rich
	touch $@

.venv-onnx/.ready: .venv-onnx/.converter
	$(PYTHON) -m pip --python .venv-onnx/bin/python install --quiet --no-compile --disable-pip-version-check --no-deps -e .
	touch $@
