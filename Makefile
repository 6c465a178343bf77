# Every target makes its own .venv first; nothing else is needed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test test-slow test-rings test-dist test-browser test-gpu torture check format bench clean
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | column -t -s :

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED) ## Train a small model on text that comes with Python, sample it, trace it
	sh demo.sh $(BIN)/minigpt

test: $(INSTALLED) ## Run the tests, in as many processes as there are cores
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow and not torture and not dist and not browser and not gpu'

test-slow: $(INSTALLED) ## Run the slow tests too
	$(BIN)/python -m pytest -m 'not gpu and not browser'

test-rings: $(INSTALLED) ## Delete each ring in a copy and run the three jobs
	$(BIN)/python -m pytest -n auto tests/test_rings.py

test-dist: $(INSTALLED) ## Run the tests that train in several processes
	$(BIN)/python -m pytest -m dist

test-browser: $(INSTALLED) ## Run the tests that open a trace's page in Chromium
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	$(BIN)/python -m pytest -m browser

test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

torture: $(INSTALLED) ## Run kills, full disks, power cuts and hostile files at length
	$(BIN)/python -m pytest -n auto --dist worksteal -m torture

check: $(INSTALLED) ## Lint, check types, and check the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/reading_order.py --write

bench: $(INSTALLED) ## Time training to 1.88 nats/byte on tinyshakespeare
	$(BIN)/python benchmarks/training.py

clean: ## Remove the environment and caches; runs stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
