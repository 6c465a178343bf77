# Every target makes its own .venv first; nothing else is needed.
PYTHON ?= python3
BIN := .venv/bin
# What demo needs, and what the other targets need.
RUNTIME := .venv/.installed
INSTALLED := .venv/.installed-dev

.PHONY: help demo docs test test-slow test-rings test-dist test-browser test-gpu torture check format bench clean
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | column -t -s :

.venv/bin/python:
	$(PYTHON) -m venv .venv

# uv shows its progress and takes PyTorch's small CPU build where there is no GPU. pip is for where
# uv finds no package index, as with an index that only pip is configured for.
$(RUNTIME): .venv/bin/python pyproject.toml setup.py constraints.txt
	@echo 'Installing minigpt and PyTorch into .venv, once.'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	@VIRTUAL_ENV=.venv $(BIN)/uv pip install --torch-backend=auto --constraint constraints.txt \
	    --editable . \
	|| { echo 'uv could not install it, so pip does.'; \
	    $(BIN)/python -m pip install --disable-pip-version-check \
	    --constraint constraints.txt --editable .; }
	@touch $@

$(INSTALLED): .venv/bin/python pyproject.toml setup.py constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(RUNTIME) ## Tell a tale with the model that ships and trace it; train one for a minute
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

docs: $(INSTALLED) ## Write the outputs, pictures and pages that README.md and docs/ show: some minutes
	$(BIN)/python docs/reading_order.py --write
	$(BIN)/python docs/outputs.py
	$(BIN)/python docs/pictures.py storyteller 'Once upon a time'

bench: $(INSTALLED) ## Time training to 1.88 nats/byte on tinyshakespeare
	$(BIN)/python benchmarks/training.py

clean: ## Remove the environment and caches; runs stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
