# Two commands do everything: `make run` serves the studio on the demo model, `make test` passes the tests.
# Both make their own virtual environment in .venv; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint format bench screenshots clean

run: .venv/run
	$(BIN)/python app.py $(ARGS)

test: .venv/test lint
	$(BIN)/python -m tests.browser.chromium
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/test
	$(BIN)/python -m tests.bench.bench_demo

screenshots: .venv/test
	$(BIN)/python -m tests.browser.screenshots

.venv/run: requirements.txt
	@echo "Installing into .venv: about 2 GB, more with a CUDA build of torch; this takes some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/test: .venv/run requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
