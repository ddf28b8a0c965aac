# Each target sets up what it needs in .venv: `make demo` and `make test` run in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
# the versions that all tests passed with; `make test CONSTRAINTS=` takes the newest instead
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
DIRS := hf_visual_peft recipes benchmarks tests docs
# torch and torchvision (extra "vision") go in together, so that pip picks a pair that fits
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(addprefix --constraint ,$(CONSTRAINTS))

.PHONY: demo test notebooks test-newest test-oldest constraints quality style docs site look coverage dist clean

demo: $(VENV)/.demo
	$(BIN)/hf-visual-peft demo $(ARGS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# the notebooks of examples/, in a kernel each
notebooks: $(VENV)/.notebooks
	$(BIN)/python -m pytest -p no:cacheprovider --nbmake --nbmake-timeout=600 examples

# the newest and the oldest versions that pyproject.toml allows, each in an environment of its own
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

test-oldest: .venv-oldest/constraints.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=$<

# after a green run with the newest versions: what `make demo` and `make test` install from now on
constraints: test-newest
	$(MAKE) .venv-newest/.docs .venv-newest/.notebooks VENV=.venv-newest CONSTRAINTS=
	( echo "# The versions that the tests last passed with; \`make constraints\` renews them after a green \`make test-newest\`."; \
	  .venv-newest/bin/python -m pip freeze --disable-pip-version-check --exclude-editable ) > constraints.txt.new
	mv constraints.txt.new constraints.txt

quality: $(VENV)/.test
	$(BIN)/ruff check $(DIRS)
	$(BIN)/ruff format --check $(DIRS)
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(VENV)/.test
	$(BIN)/ruff check --fix $(DIRS)
	$(BIN)/ruff format $(DIRS)

docs: $(VENV)/.docs
	$(BIN)/hf-visual-peft methods --markdown > docs/methods.md.new
	mv docs/methods.md.new docs/methods.md
	$(MAKE) site

# the documentation as pages to open in a browser: build/site/index.html
site: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --config-file docs/site/mkdocs.yml

# every page of the site in a headless Chromium, as on a phone and on a desktop: errors, and what is too wide
look: site $(VENV)/.test
	$(BIN)/python docs/site/look.py

# the picture in README, from docs/defaults.md
docs/assets/overview.svg: docs/defaults.md docs/site/overview.py | $(VENV)/.test
	$(BIN)/python docs/site/overview.py

# wheel and sdist of a release, checked, in dist/
dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

# every method on every architecture: about five minutes on two cores
coverage: $(VENV)/.test
	$(BIN)/hf-visual-peft coverage --markdown docs/coverage.md --json docs/coverage.json

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest build *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing the package and what the demo needs into $(VENV) (a few minutes)"
	$(PIP) --editable ".[vision,demo]"
	@touch $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing the package and what the tests need into $(VENV) (a few minutes)"
	$(PIP) --editable ".[vision,demo,test,quality]"
	@touch $@

$(VENV)/.docs: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing the package and what its pages need into $(VENV) (a few minutes)"
	$(PIP) --editable ".[vision,docs]"
	@touch $@

$(VENV)/.notebooks: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing the package and what its notebooks need into $(VENV) (a few minutes)"
	$(PIP) --editable ".[vision,demo,notebooks]"
	@touch $@

$(VENV)/.dist: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) build twine
	@touch $@

.venv-oldest/constraints.txt: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check --quiet uv
	.venv-oldest/bin/uv pip compile --quiet --no-header --no-annotate --resolution lowest-direct \
	  --extra vision --extra demo --extra test --extra quality --python .venv-oldest/bin/python pyproject.toml > $@.new
	mv $@.new $@
