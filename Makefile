PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt

# Containers often set it; every process that the tests start would then compile torch and diffusers anew, which takes
# twice as long as the rest of their imports
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-llm plateau install lint test test-slow compare-toy rounds-toy

## Install, then three rounds of self-play on the embedded toy world; results in runs/toy
demo: install
	ACCELERATE_USE_CPU=1 $(BIN)/python -m spin_diffusion.cli demo

## Install, then SPACE on a small language model, and SPACE, SPIN and fine-tuning side by side; results in runs/toy-llm*
demo-llm: install
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch -q --config_file training/accelerate/one_cpu.yaml training/train_space_llm.py \
		--config training/configs/toy_llm.yaml
	$(BIN)/python assets/toy_language/compare.py --output_dir runs/toy-llm-compared

## Where self-play wins and where fine-tuning does, on a world of known density; in runs/plateau (two minutes)
plateau: install
	OMP_NUM_THREADS=1 $(BIN)/python assets/exact_plateau/play.py --output_dir runs/plateau

## Methods against each other on the toy world: equal steps, equal compute, each at its best rate; in runs/comparison-toy
compare-toy: install
	OMP_NUM_THREADS=1 $(BIN)/python evaluation/compare_methods.py --config evaluation/configs/compare_toy.yaml --jobs 2

## Fine-tuning, SPIN, SPACE and DDO over twenty rounds on the toy world's plateau, five seeds; in runs/rounds-toy
rounds-toy: install
	OMP_NUM_THREADS=1 $(BIN)/python evaluation/compare_methods.py --config evaluation/configs/rounds_toy.yaml --jobs 2

## Install, then lint and the tests (eight minutes on two cores)
test: install lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

## The tests that take minutes: kills at random instants, and at every point of a run (some twenty minutes on two cores)
test-slow: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --dist loadfile -m slow $(SELECT)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS) -e ".[dev]"
	touch $@
