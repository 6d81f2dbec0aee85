# One command per job; pre-commit and CI call the same targets. `make help` lists them.

PYTHON = .venv/bin/python
CONFIG = configs/local.yaml
PORT =
PYTEST_ARGS =
PYTEST_MARKS =
PYTEST_WORKERS = 2
NONE_CHOSEN = test $$? -eq 5
BASE_PYTHON = python3

PROTOS := $(wildcard cluster/rpc/*.proto)
GPU_BENCHMARKS := $(wildcard benchmarks/gpu_*.py)
# These import no more than a machine with a device is sure to have: torch, Triton, pytest.
GPU_TESTS := tests/gpu $(shell grep -lE 'mark.gpu|kernels.interpreted' tests/kernels/test_*.py)
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

# Another PYTHON brings its own packages: only our .venv is made and kept current by us.
ifeq ($(PYTHON),.venv/bin/python)
INSTALLED := .venv/.installed
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup serve chat status demo-flip test test-oracle test-gpu bench bench-gpu check fix protos protos-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED) ## make .venv and install everything into it; does nothing when nothing changed

# torch comes first and alone, so that a CPU build that pip was pointed at is taken and kept.
.venv/.installed: pyproject.toml
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it: make setup BASE_PYTHON=python3.11")'
	@echo "installing into .venv: a minute or two, 1.5 GB or more"
	@test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	@.venv/bin/python -c 'import pip, sys; sys.exit(int(pip.__version__.split(".")[0]) < 23)' || .venv/bin/python -m pip install -q --upgrade pip
	.venv/bin/python -m pip install -q $(TORCH)
	.venv/bin/python -m pip install -q -e '.[dev]'
	@touch $@

serve: $(INSTALLED) ## start a cluster and serve: make serve [CONFIG=configs/local.yaml] [PORT=8123]
	@exec .venv/bin/steelyard serve $(CONFIG) $(if $(PORT),--port $(PORT))

chat: $(INSTALLED) ## talk to the model that is being served: make chat [PORT=8123]
	@exec .venv/bin/steelyard chat $(if $(PORT),--url http://127.0.0.1:$(PORT))

status: $(INSTALLED) ## show pools, workers and load: make status [PORT=8123]
	@exec .venv/bin/steelyard status $(if $(PORT),--url http://127.0.0.1:$(PORT))

demo-flip: $(INSTALLED) ## watch the controller flip live workers under a load that swings; four minutes
	@exec $(PYTHON) -m benchmarks.flip --show

test: $(INSTALLED) ## everything that CI runs, a file per core, then what starts a Ray: make test [PYTEST_ARGS="tests/router -x"]
	$(PYTHON) -m pytest -m "not gpu and not oracle and not ray $(PYTEST_MARKS)" -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) || $(NONE_CHOSEN)
	$(PYTHON) -m pytest -m "ray $(PYTEST_MARKS)" $(PYTEST_ARGS) || $(NONE_CHOSEN)

test-oracle: $(INSTALLED) ## the long comparison with transformers, token for token
	$(PYTHON) -m pytest -m oracle --timeout 0 $(PYTEST_ARGS)

test-gpu: $(INSTALLED) ## what needs a CUDA device: make test-gpu [PYTHON=python3]
	$(PYTHON) -m pytest -c tests/gpu/bare.ini --rootdir . -m gpu $(GPU_TESTS) $(PYTEST_ARGS)

bench: $(INSTALLED) ## print the figures of the README
	$(PYTHON) -m benchmarks.step_jitter
	$(PYTHON) -m benchmarks.engine
	$(PYTHON) -m benchmarks.serve

bench-gpu: $(INSTALLED) ## the figures that need a CUDA device: make bench-gpu [PYTHON=python3]
	@test -n "$(GPU_BENCHMARKS)" || echo "there is no benchmark for GPUs yet"
	$(foreach file,$(GPU_BENCHMARKS),$(PYTHON) -m benchmarks.$(notdir $(basename $(file))) &&) true

check: $(INSTALLED) protos-check ## lint, format, types, generated files
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

fix: $(INSTALLED) ## repair what a tool can repair
	$(PYTHON) -m ruff check --fix --exit-zero .
	$(PYTHON) -m ruff format .

PROTOC = $(PYTHON) -m grpc_tools.protoc -I.

protos: $(INSTALLED) ## generate Python from cluster/rpc/*.proto
	$(if $(PROTOS),$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS))

protos-check: $(INSTALLED)
	@test -z "$(PROTOS)" || { \
	  fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	  $(PROTOC) --python_out="$$fresh" --pyi_out="$$fresh" --grpc_python_out="$$fresh" $(PROTOS) && \
	  for file in $$(cd "$$fresh" && find . -name '*_pb2*'); do \
	    cmp -s "$$fresh/$$file" "$$file" || { echo "$$file is not current: run make protos"; exit 1; }; \
	  done; }

clean: ## remove caches and build outputs; .venv stays
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
