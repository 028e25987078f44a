# Works where python3, pip and make exist; everything else goes into .venv.

PYTHON ?= python3
REFERENCE ?= ../shared/reference
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PY := $(BIN)/python
INSTALLED := .venv/.installed

.PHONY: demo test check lint types peers fuzz bench docs reference clean

demo: $(INSTALLED)  ## train, merge and measure on real data
	$(BIN)/sd-mecha demo $(DEMO_ARGS)

test: $(INSTALLED)  ## the tests, without the slow ones
	$(PY) -m pytest -q -m "not slow" $(PYTEST_ARGS)

check: lint types peers  ## everything that must hold before a change lands
	$(PY) -m pytest -q $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(INSTALLED)
	$(PY) -m mypy

peers: $(INSTALLED)  ## libraries that results are compared with, and one that guides fuzzing; tests do without what is missing
	-$(PY) -m pip install --quiet --editable '.[peers]' --constraint constraints.txt

fuzz: peers  ## damaged files for the readers: TARGET=torch SECONDS=600; what is found goes to tests/faults/findings/TARGET
	$(PY) -m tests.faults.fuzz $(or $(TARGET),all) $(or $(SECONDS),120)

bench: $(INSTALLED)  ## speed and memory: CASES="sd15_weighted_sum ..." REPEATS=3 BENCH_ARGS=--quick
	$(PY) -m bench $(CASES) $(if $(REPEATS),--repeats $(REPEATS)) $(BENCH_ARGS)

docs: $(INSTALLED)  ## docs/methods.md and its pictures, from the docstrings of the merge methods
	$(PY) -m pip install --quiet --editable '.[docs]' --constraint constraints.txt
	$(PY) -m docs

reference: $(INSTALLED)  ## compare with the full reference data, where it is present
	@test -d "$(REFERENCE)" || { echo "no reference data in $(REFERENCE)"; exit 1; }
	SD_MECHA_REFERENCE="$(abspath $(REFERENCE))" $(PY) -m pytest -q -m reference $(PYTEST_ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable '.[dev,demo]' --constraint constraints.txt
	@touch $@

clean:
	rm -rf .venv build dist bench/.work bench/.old-venv bench/results demo-output
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests bench docs -name __pycache__ -type d -prune -exec rm -rf {} +
