# The same commands by hand and in CI. `make` alone lists them.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CONFIG ?= serve_config.yaml
MODELS ?= llama-3.1-8b qwen3-0.6b
BENCH_FP8 = --model benchmarks/models/llama-3.1-8b --name llama-3.1-8b-fp8 --set quantization=fp8 kv_cache_dtype=fp8 --rows mixed 1000
REAL_MODELS ?= required
MINUTES ?= 60
INTEGRATION_PROCESSES ?= 1
BENCH_PYTHON ?= $(BIN)/python
UNIT_PLUGINS := -p pytest_asyncio.plugin -p pytest_timeout -p xdist.plugin
VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/pip install --quiet $(PIP_FLAGS)
AGENTS := tests/agents/node_modules

.DEFAULT_GOAL := help
.PHONY: help install install-dev models system-packages serve chaos soak fuzz docs test test-unit test-integration agents test-agents lint format typecheck demo-model bench-cpu bench-gpu bench-techniques bench-relay bench-overhead bench-client bench-routing bench-scaling lock clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Rayline needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	touch $@

# torch comes first, so that nothing that needs it picks another build.
$(VENV)/.runtime: $(VENV)/.venv pyproject.toml
	@echo "Installing Rayline into $(VENV) (a few minutes the first time)"
	$(PIP) $(TORCH)
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

install: $(VENV)/.runtime  ## Make .venv with what serving needs
install-dev: $(VENV)/.dev  ## Add what tests, benchmarks and training need

ifdef MODEL
serve: $(VENV)/.runtime
	@$(BIN)/python -c 'import gguf' 2>/dev/null || $(BIN)/pip install --quiet -e '.[gguf]'
	$(BIN)/rayline pull $(MODEL)
	$(BIN)/rayline serve $(MODEL) --config $(CONFIG)
else
serve: $(VENV)/.runtime  ## Serve CONFIG (serve_config.yaml) on http://127.0.0.1:8000, or a real model: MODEL=smollm2
	$(BIN)/python -m deployments.check --start $(CONFIG)
	RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.api.send_timeout:proxy_middlewares $(BIN)/serve run $(CONFIG)
endif

system-packages:  ## Debian packages that some tests use (as root); without them these tests are skipped
	command -v chromium && command -v prometheus && command -v amtool && command -v redis-server && command -v npm && ls /usr/lib/postgresql/*/bin/initdb || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium prometheus prometheus-alertmanager redis-server postgresql $$(command -v npm >/dev/null || echo npm) >/dev/null; }

models: $(VENV)/.dev  ## Download the real models that some tests use (350 MB) into ~/.cache/rayline
	$(BIN)/rayline pull smollm2 gemma3-270m

test: test-unit test-integration  ## Run every test that needs no GPU

# Plugins that come with other packages cost each process seconds to load and rewrite, and no unit test needs them.
test-unit: $(VENV)/.dev $(if $(filter required,$(REAL_MODELS)),models)  ## Run the tests that need no Ray cluster, on all cores (REAL_MODELS=optional: without those of missing models)
	REAL_MODELS=$(REAL_MODELS) PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/pytest $(UNIT_PLUGINS) tests/unit --numprocesses auto --maxprocesses 8 --dist worksteal

# They wait more than they compute. Each of several processes has a Ray cluster for its files.
test-integration: $(VENV)/.dev  ## Run the tests of a whole server (INTEGRATION_PROCESSES=2: two files at a time)
	$(BIN)/pytest tests/integration tests/e2e tests/gpu $(if $(filter-out 1,$(INTEGRATION_PROCESSES)),--numprocesses $(INTEGRATION_PROCESSES) --dist loadfile --no-loadscope-reorder)

# Both programs come as binaries in npm packages; no script of theirs is run but the one that puts the binary in place.
$(AGENTS)/.installed: tests/agents/package-lock.json
	@command -v npm >/dev/null || { echo 'The agents come from npm: install Node.js 18 or newer (Debian: apt-get install npm)' >&2; exit 1; }
	npm ci --prefix tests/agents --ignore-scripts --no-audit --no-fund --loglevel error
	node $(AGENTS)/@anthropic-ai/claude-code/install.cjs
	touch $@

agents: $(AGENTS)/.installed  ## Get the coding agents that test-agents runs (needs npm)

test-agents: $(VENV)/.dev $(AGENTS)/.installed  ## Run coding agents and SDKs against a server
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/pytest $(UNIT_PLUGINS) tests/agents

chaos: $(VENV)/.dev  ## Faults on purpose: kill, hang, drown and update a fleet on this machine (20 minutes or so)
	$(BIN)/python -m chaos

soak: $(VENV)/.dev  ## A long load (MINUTES=60): memory must not grow
	$(BIN)/python -m chaos.soak --minutes $(MINUTES)

fuzz: $(VENV)/.dev  ## Ten minutes of requests made up from the OpenAPI description
	FUZZ_SECONDS=600 $(BIN)/pytest --timeout 2000 tests/integration/test_fuzz.py

docs: $(VENV)/.dev  ## Build the documentation into site/
	$(BIN)/python -m deployments.cli.config_reference > docs/configuration.md
	$(BIN)/python -m deployments.cli.command_reference > docs/command-line.md
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.dev  ## Check style, the direction of imports, and the English of documents and messages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m scripts.prose

format: $(VENV)/.dev  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.dev  ## Check types (mypy, strict)
	$(BIN)/mypy

demo-model: $(VENV)/.dev  ## Train the demo model into configs/demo (wants a GPU; under 15 minutes)
	$(BIN)/python -m demo.train --out configs/demo

bench-cpu: $(VENV)/.dev  ## Engine against transformers on this CPU
	$(BIN)/python -m benchmarks.cpu

bench-gpu:  ## Engine beside vLLM on this GPU (MODELS="llama-3.1-8b …"; BENCH_PYTHON= a Python that has both)
	@rm -f bench-gpu.rayline.jsonl bench-gpu.vllm.jsonl
	@for model in $(MODELS); do \
		$(BENCH_PYTHON) -m benchmarks.engine_vllm --model benchmarks/models/$$model --out bench-gpu.vllm.jsonl; \
		$(BENCH_PYTHON) -m benchmarks.engine --model benchmarks/models/$$model --random-weights --out bench-gpu.rayline.jsonl; \
	done
	@$(BENCH_PYTHON) -m benchmarks.engine_vllm $(BENCH_FP8) --out bench-gpu.vllm.jsonl
	@$(BENCH_PYTHON) -m benchmarks.engine $(BENCH_FP8) --random-weights --out bench-gpu.rayline.jsonl
	@$(BENCH_PYTHON) -m benchmarks.engine_table bench-gpu.rayline.jsonl bench-gpu.vllm.jsonl

bench-techniques: $(VENV)/.dev  ## What KV cache, GQA and window save on this machine
	$(BIN)/python -m benchmarks.techniques

bench-relay: $(VENV)/.dev  ## Tokens a second that one router relays, with an emulated engine behind it
	$(BIN)/python -m benchmarks.relay

bench-overhead: $(VENV)/.dev  ## What the serving path adds to the time to first token
	$(BIN)/python -m benchmarks.overhead

bench-client: $(VENV)/.dev  ## What the load generator adds to what it measures, beside aiohttp and httpx
	$(BIN)/python -m benchmarks.serve_overhead

bench-scaling: $(VENV)/.dev  ## A fleet from one replica to one for each GPU (ARGS="--model DIR" or "--emulated …")
	$(BIN)/python -m benchmarks.scaling $(ARGS)

bench-routing: $(VENV)/.dev  ## Routing policies on simulated replicas (TRACES="mooncake.jsonl azure.csv": their paths)
	@test -n "$(TRACES)" || { echo 'set TRACES="…": benchmarks/routing_trace.py says where to get them' >&2; exit 2; }
	$(BIN)/python -m benchmarks.routing_decision
	$(BIN)/python -m benchmarks.routing_sim $(TRACES)

# Not torch, and what torch brings: which build of it is right depends on the machine.
TORCHS := torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime \
	cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

lock: $(VENV)/.dev  ## Write requirements.lock: versions and hashes of what the image installs
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet pyproject.toml --extra accounts --extra otel --extra gguf --universal --python-version 3.11 \
		--generate-hashes --no-annotate --custom-compile-command 'make lock' --upgrade \
		$(addprefix --no-emit-package ,$(TORCHS)) --output-file requirements.lock

clean:  ## Remove what make made
	rm -rf $(VENV) $(AGENTS) bench-gpu.*.jsonl build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
