# Each target sets up what it needs in .venv: `make demo` and `make test` run in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DIRS := hf_visual_peft recipes benchmarks tests
# torch and torchvision (extra "vision") go in together, so that pip picks a pair that fits
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test quality style docs coverage clean

demo: $(VENV)/.demo
	$(BIN)/hf-visual-peft demo $(ARGS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

quality: $(VENV)/.test
	$(BIN)/ruff check $(DIRS)
	$(BIN)/ruff format --check $(DIRS)
	$(BIN)/mypy

style: $(VENV)/.test
	$(BIN)/ruff check --fix $(DIRS)
	$(BIN)/ruff format $(DIRS)

docs: $(VENV)/.test
	$(BIN)/hf-visual-peft methods --markdown > docs/methods.md.new
	mv docs/methods.md.new docs/methods.md

# every method on every architecture: about five minutes on two cores
coverage: $(VENV)/.test
	$(BIN)/hf-visual-peft coverage --markdown docs/coverage.md --json docs/coverage.json

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing the package and what the demo needs into $(VENV) (a few minutes)"
	$(PIP) --editable ".[vision,demo]"
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing the package and what the tests need into $(VENV) (a few minutes)"
	$(PIP) --editable ".[vision,demo,test,quality]"
	@touch $@
