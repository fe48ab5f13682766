# The whole project is driven from here; `make help` lists what there is.

# A Python of 3.11 or 3.12 that can make virtual environments, and the build of torch for this machine.
PYTHON ?= python3
TORCH ?= torch==2.13.0

# --- serve -----------------------------------------------------------------------------------------------------------

serve: .venv/.ready  ## Set up, start tritonserver, load the models, stream a first answer (CHECKPOINT=, HTTP_PORT=, ...)
	@exec .venv/bin/python -m backend.serve \
	    $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') $(if $(HTTP_PORT),--http-port '$(HTTP_PORT)') \
	    $(if $(GRPC_PORT),--grpc-port '$(GRPC_PORT)') $(if $(METRICS_PORT),--metrics-port '$(METRICS_PORT)') \
	    $(if $(OPENAI_PORT),--openai-port '$(OPENAI_PORT)') $(if $(MODEL_NAME),--model-name '$(MODEL_NAME)')

# --- set-up, checks, tests -------------------------------------------------------------------------------------------

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: serve setup kernels test-gpu bench-gpu bench-serving check test tools helm-check observability-check drain-check image-check audit test-demo-kernels conformance faults soak test-fuzz test-lm-eval test-perf-tools eval bench-tokenizers bench-peers browser lock clean help

# The server binary comes with a wheel unless an installed tritonserver is there.
SERVER_LOCKS := requirements/server.txt $(if $(wildcard /opt/tritonserver/bin/tritonserver),,requirements/triton.txt)
PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input
# Leaves one line per large download, and whatever is unusual; an index of the user's own that lacks a package is not.
BRIEFLY := 2>&1 | sed --unbuffered --regexp-extended \
    --expression '/^(Looking in|Collecting|Processing|Requirement already|Successfully|  Using cached)/d' \
    --expression '/^ +(Attempting uninstall|Found existing|Uninstalling|Successfully uninstalled)/d' \
    --expression '/^WARNING: Location .* is ignored: it is neither/d' \
    --expression '/^ +Downloading .*(kB|bytes)\)$$/d' --expression 's/^ +Downloading /    /' --expression 's/^Installing collected packages.*/    installing/'
UV := uv==0.13.9
LM_EVAL := lm_eval[api]==0.4.13
AIPERF := aiperf==0.13.0
PERF_ANALYZER := tritonclient==2.51.0
PEERS := sentencepiece==0.2.3 xllamacpp==2026.10.11549 matplotlib==3.11.2

setup: .venv/.ready-tests  ## Make .venv with everything, without running anything

check: .venv/.ready-tests  ## Formatting, lint, types and house rules
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/pytest tests/unit/test_house_rules.py

test: .venv/.ready-tests browser tools  ## Every test that needs no GPU
	.venv/bin/pytest --durations=10 --durations-min=2

tools: .venv/.ready-tests  ## helm 3 and Prometheus for the tests of docker/, into .venv/tools
	@tests/deploy/install_tools.sh

observability-check: .venv/.ready-tests tools  ## Rules, dashboard and log on a live server with a real Prometheus
	.venv/bin/pytest tests/deploy/test_rules.py tests/deploy/test_monitoring.py tests/deploy/test_beyond_one_machine.py

drain-check: .venv/.ready-tests  ## A pod deleted under load, and who may do what at the ports, TLS included
	DEPLOY_CHECKS=all .venv/bin/pytest tests/deploy/test_drain.py tests/deploy/test_exposure.py

image-check: .venv/.ready-tests  ## Build docker/Dockerfile on a stand-in base (root, buildah, mmdebstrap) and run the image
	tests/deploy/build_image.sh
	DEPLOY_CHECKS=all .venv/bin/pytest tests/deploy/test_dockerfile.py tests/deploy/test_image.py

audit: .venv/.ready-tests  ## Known vulnerabilities of the locked packages; asks a public database
	$(PIP) install --progress-bar off pip-audit==2.10.1 $(BRIEFLY)
	.venv/bin/pip-audit --require-hashes --disable-pip --requirement requirements/server.txt

helm-check: .venv/.ready-tests tools  ## The chart: lint, render by helm 3 and 4, validate for several versions of Kubernetes
	.venv/bin/pytest tests/deploy/test_chart.py

test-demo-kernels: .venv/.ready-tests  ## The CUDA runner, emulated, answers every question of the demo as PyTorch does (half an hour)
	DEMO_QUESTIONS=all .venv/bin/pytest -rP tests/unit/runner/test_cuda_against_torch.py -k demo_checkpoint

conformance: .venv/.ready-tests  ## Every row of the contract with clients, by its tests; writes the table of tests/conformance
	.venv/bin/python -m tests.conformance

faults: .venv/.ready-tests  ## Everything that may happen to the server from outside: deaths, signals, memory, disks, clients (10 minutes)
	FAULTS=all .venv/bin/pytest -rs tests/triton/test_deaths.py tests/triton/test_shutdown.py tests/triton/test_host_faults.py \
	    tests/triton/test_clock.py tests/triton/test_clock_jumps.py tests/triton/test_bad_clients.py tests/triton/test_reload.py tests/triton/test_cancellation.py

soak: .venv/.ready-tests  ## Thousands of mixed requests to a live server, about 5 minutes; MINUTES=30: so long, with memory and handles watched
	.venv/bin/python -m tests.triton.soak $(if $(MINUTES),--minutes '$(MINUTES)')

test-fuzz: .venv/.ready-tests  ## Tens of thousands of bad inputs: files, requests, settings, a live server; ten minutes of the gateway's OpenAPI
	FUZZ=full .venv/bin/pytest -v -s tests/fuzz
	FUZZ_SECONDS=600 FUZZ_EXAMPLES=1000 .venv/bin/pytest -rP tests/gateway/test_fuzz.py

# lm-eval wants NumPy 2.
test-lm-eval: .venv/.ready-tests .venv-lm-eval/.ready  ## lm-eval through the gateway gives the scores that PyTorch gives directly
	.venv/bin/python -m tests.gateway.lm_eval.compare .venv-lm-eval/bin/lm_eval

# perf_analyzer comes with tritonclient 2.51.0, and wants two libraries that nvidia-pytriton holds; aiperf has pins of its own.
test-perf-tools: .venv/.ready-tests .venv-perf-tools/.ready  ## perf_analyzer and aiperf against a server with its gateway
	.venv/bin/python -m tests.gateway.perf_tools.run .venv-perf-tools

.venv-perf-tools/.ready: | .venv/.ready
	@echo "set-up: .venv-perf-tools with $(AIPERF) and perf_analyzer of $(PERF_ANALYZER)"
	@'$(PYTHON)' -m venv --clear .venv-perf-tools
	@.venv-perf-tools/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off '$(AIPERF)'
	@cd .venv-perf-tools && mkdir libraries wheel && \
	    bin/python -m pip --disable-pip-version-check download --quiet --progress-bar off --no-deps --only-binary=:all: \
	        --platform manylinux1_x86_64 --dest wheel '$(PERF_ANALYZER)' && \
	    bin/python -m zipfile --extract wheel/*.whl wheel && mv wheel/*.data/data/bin/perf_analyzer . && chmod +x perf_analyzer && rm -r wheel && \
	    for name in libb64.so.0d libcudart.so.12; do \
	        ln -s "$$(find ../.venv/ -path '*nvidia_pytriton.libs*' -name "$${name%%.so*}-*.so$${name#*.so}*" -exec readlink -f {} + | head -n 1)" "libraries/$$name"; \
	    done
	@touch $@

# TASKS of lm-eval (it fetches their data) and of tests/evaluation; PRECISIONS bf16,fp8,fp8-kv; MAX_TOKENS the longest context; LIMIT samples a task.
eval: .venv/.ready-tests .venv-lm-eval/.ready  ## Scores through the server in each precision beside the published ones (CHECKPOINT=, TASKS=, ...)
	@.venv/bin/python -m tests.evaluation \
	    $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') $(if $(TASKS),--tasks '$(TASKS)') $(if $(PRECISIONS),--precisions '$(PRECISIONS)') \
	    $(if $(LIMIT),--limit '$(LIMIT)') $(if $(MAX_TOKENS),--max-tokens '$(MAX_TOKENS)') $(if $(JSON),--json '$(JSON)')

bench-tokenizers: .venv/.ready-tests .venv-peers/.ready  ## Tekken's tokens per text against SentencePiece; MB/s of tokenizers (3 minutes; Debian's texts)
	.venv/bin/python -m tests.bench.bench_tekken
	.venv/bin/python -m tests.bench.bench_tokenizers

bench-peers: .venv/.ready-tests .venv-peers/.ready  ## The serving path beside what one would use instead, on the CPU (about 6 minutes)
	.venv/bin/python -m tests.bench.bench_peers

# What others serve with, and plots: they want NumPy 2.
.venv-peers/.ready: | .venv/bin/python
	@echo "set-up: .venv-peers with $(PEERS)"
	@'$(PYTHON)' -m venv --clear .venv-peers
	@.venv-peers/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off $(PEERS)
	@touch $@

.venv-lm-eval/.ready: | .venv/bin/python
	@echo "set-up: .venv-lm-eval with $(LM_EVAL)"
	@'$(PYTHON)' -m venv --clear .venv-lm-eval
	@.venv-lm-eval/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off '$(LM_EVAL)'
	@touch $@

# The page is tested in Chromium, which is no Python package: installed where that is possible, else those tests are skipped.
browser:
	@has() { command -v "$$1" > /dev/null; }; \
	if has chromedriver && { has chromium || has chromium-browser || has google-chrome; }; then exit 0; fi; \
	if has apt-get && [ "$$(id -u)" = 0 ]; then \
	    echo "set-up: chromium and chromium-driver"; \
	    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium chromium-driver; } > /dev/null 2>&1 && exit 0; \
	fi; \
	echo "set-up: no Chromium with chromedriver here: the tests of the page will be skipped"

# The environment of `make setup` where there is one; otherwise a python3 that has torch, cuda-bindings, numpy and pytest.
GPU_PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON))

kernels:  ## Compile the CUDA kernels ahead (no GPU needed)
	$(GPU_PYTHON) -m kernels build

test-gpu:  ## Everything that needs a Hopper GPU, with a short table last (LOGS=folder for the full logs)
	$(GPU_PYTHON) -m tests.gpu $(if $(LOGS),--logs '$(LOGS)')

bench-gpu:  ## Kernels, decode steps and prompts on a Hopper GPU, under 8 minutes; without one: at toy sizes on the emulator (JSON=file)
	$(GPU_PYTHON) -m tests.bench.gpu $(if $(JSON),--json '$(JSON)')

bench-serving:  ## Requests served end to end on a GPU, without Triton and through it, 8 minutes each; without one: a toy (WAY=engine|triton)
	$(foreach way,$(or $(WAY),engine triton),$(GPU_PYTHON) -m tests.bench.serving $(way) $(ARGUMENTS) &&) true

.venv/bin/python:
	@command -v '$(PYTHON)' > /dev/null || { echo "make: no '$(PYTHON)' here: install Python 3.11 or 3.12, or name one, as in make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 12) else f"make: Python 3.11 or 3.12 is needed and $(PYTHON) is {v[0]}.{v[1]}: name one, as in make PYTHON=/path/to/python3.11")'
	@'$(PYTHON)' -c 'import ensurepip, venv' 2> /dev/null || { echo "make: $(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "set-up: making .venv with $$('$(PYTHON)' --version)"
	@'$(PYTHON)' -m venv --clear .venv

.venv/.ready: requirements/server.txt requirements/triton.txt pyproject.toml | .venv/bin/python
	@rm -f .venv/.ready .venv/.ready-tests
	@echo "set-up: $(TORCH)"
	@$(PIP) install --progress-bar off '$(TORCH)' $(BRIEFLY)
	@echo "set-up: $(SERVER_LOCKS)"
	@$(PIP) install --progress-bar off --require-hashes $(addprefix --requirement ,$(SERVER_LOCKS)) $(BRIEFLY)
	@.venv/bin/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "nemo-triton.pth").write_text(f"{pathlib.Path.cwd()}\n")'
	@$(PIP) check > .venv/pip-check.txt || { cat .venv/pip-check.txt >&2; exit 1; }
	@touch $@

.venv/.ready-tests: requirements/tests.txt .venv/.ready
	@echo "set-up: requirements/tests.txt"
	@$(PIP) install --progress-bar off --require-hashes --requirement requirements/tests.txt $(BRIEFLY)
	@$(PIP) check > .venv/pip-check.txt || { cat .venv/pip-check.txt >&2; exit 1; }
	@touch $@

# One resolution of everything first; the smaller files are held to its versions.
lock: | .venv/bin/python  ## Write requirements/*.txt anew from the pins in pyproject.toml (UPGRADE=1: newer indirect ones)
	@$(PIP) install --progress-bar off $(UV) $(BRIEFLY)
	@compile() { \
	    .venv/bin/uv pip compile pyproject.toml --quiet --generate-hashes --no-emit-package torch --no-annotate \
	        --python-platform x86_64-manylinux_2_35 --python-version 3.11 --custom-compile-command 'make lock' --output-file "requirements/$$1.txt" "$${@:2}"; \
	    echo "requirements/$$1.txt: $$(grep --count '==' "requirements/$$1.txt") packages"; \
	}; \
	compile tests --extra tests --extra triton --no-emit-package nvidia-pytriton $(if $(UPGRADE),--upgrade); \
	for extra in client kernels gateway server triton; do compile "$$extra" --extra "$$extra" --constraint requirements/tests.txt; done

clean:  ## Remove .venv and what the tools left behind
	rm -rf .venv .venv-lm-eval .venv-perf-tools .venv-peers .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s%s\n", $$1, $$2 }' Makefile
