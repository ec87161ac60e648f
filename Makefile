PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test test-all bench format

# Train on the embedded LM, run the head beside it, and compare it with fixed thresholds.
# An earlier demo run is replaced.
demo: $(STAMP)
	rm -rf checkpoints/demo
	$(BIN)/python train.py --run-dir checkpoints/demo

test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 2

# The slow tests too: simulations, and what needs minutes.
test-all: export OMP_NUM_THREADS := 1
test-all: $(STAMP)
	$(BIN)/pytest -n 2 -m "slow or not slow"

# Speed and memory on one core, beside gymnasium, stable-baselines3 and transformers.
bench: export OMP_NUM_THREADS := 1
bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# torch comes first and alone, so that a build chosen by hand (for one kind of GPU) is kept.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch -c constraints.txt
	$(BIN)/python -m pip install -e ".[dev]" -c constraints.txt
	touch $@
