# make run: the main job. make test: the everyday checks. make test-slow: the slow tests alone.
# make format: ruff applies its fixes, formats the code, and lists the faults that it cannot fix.
# make docs: builds the documentation site; make docs NOTEBOOKS=force executes all notebooks but 06 first, to show their outputs.
# make faults: kills a run of two processes twenty times, and compares its parameters with those of an uninterrupted run.
# make test TESTS=--first-parameters: each everyday test once; TESTS may be any argument of pytest.
# Each target makes the virtual environment that it needs; PYTHON and VENV choose another.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
NOTEBOOKS ?= off
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: run test test-slow format docs faults clean

run: $(VENV)/requirements-installed
	$(BIN)/python main.py

# A test process that dies ends the tests: a replacement has been seen to wait without end.
test: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "not slow" $(TESTS)

test-slow: $(VENV)/dev-installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m slow

format: $(VENV)/dev-installed
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

docs: $(VENV)/docs-installed
	NOTEBOOKS=$(NOTEBOOKS) $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "Open $(CURDIR)/docs/_build/html/index.html"

faults: $(VENV)/requirements-installed
	$(BIN)/python -m castling_jax faults --kills=20

# The targets are marker files, not the folder itself, so that an interrupted installation is repeated.
$(VENV)/requirements-installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing requirements.txt into $(VENV), about 1 GB; this takes a few minutes the first time."
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/dev-installed: $(VENV)/requirements-installed pyproject.toml
	$(PIP) --editable .[dev]
	touch $@

$(VENV)/docs-installed: $(VENV)/requirements-installed pyproject.toml
	$(PIP) --editable .[docs]
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build docs/notebooks
