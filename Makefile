# Every target creates .venv first; nothing else is needed.
PYTHON ?= python3
BIN := .venv/bin
# Timestamps of the packages for demo, and for the other targets.
RUNTIME := .venv/.installed
INSTALLED := .venv/.installed-dev

.PHONY: help demo docs test test-integration test-slow test-rings test-dist test-browser test-gpu torture check format bench clean
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-18s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(RUNTIME): pyproject.toml setup.py constraints.txt install.py
	@$(PYTHON) install.py
	@touch $@

$(INSTALLED): pyproject.toml setup.py constraints.txt install.py
	@$(PYTHON) install.py dev
	@touch $@ $(RUNTIME)

demo: $(RUNTIME) ## Tell a tale with the model that ships and trace it; train one for a minute
	@$(BIN)/python demo.py

test: $(INSTALLED) ## Run the tests, in as many processes as there are cores
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not integration and not slow and not torture and not dist and not browser and not gpu'

test-integration: $(INSTALLED) ## Run the tests of 0.3 seconds and more: whole runs, other libraries
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'integration and not slow and not gpu'

test-slow: $(INSTALLED) ## Run the tests of ten seconds and more: compiled graphs, kill and resume
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'slow and not torture and not dist and not browser and not gpu' --ignore tests/test_rings.py

test-rings: $(INSTALLED) ## Delete each ring in a copy and run the three jobs
	$(BIN)/python -m pytest -n auto tests/test_rings.py

test-dist: $(INSTALLED) ## Run the tests that train in several processes
	$(BIN)/python -m pytest -m dist

test-browser: $(INSTALLED) ## Run the tests that open a trace's page in Chromium
	@$(PYTHON) install.py dev browser
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

docs: $(INSTALLED) ## Update all outputs and pictures in README.md and docs/: about 15 minutes; commit a new model first
	@$(PYTHON) install.py dev browser
	$(BIN)/python docs/reading_order.py --write
	$(BIN)/python docs/outputs.py
	$(BIN)/python docs/pictures.py storyteller 'Once upon a time'
	$(BIN)/python docs/page_picture.py storyteller 'Once upon a time'
	$(BIN)/python docs/first_minutes.py

bench: $(INSTALLED) ## Time training to 1.88 nats/byte on tinyshakespeare
	$(BIN)/python benchmarks/training.py

clean: ## Remove the environment and caches; runs stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
