# Every target works as the first command on a fresh clone: the stamp makes the environment once.
#   make serve            a server on 127.0.0.1:8000 with the embedded model (MODEL=, ARGS= to change it)
#   make test lint check  tests; ruff and mypy; both
#   make kernels          compile the CPU kernels again where their sources changed (CXX= names the compiler)
#   make sanitize         the kernels' tests under the address and undefined-behaviour sanitizers (gcc)
#   make soak             kill -9 at fifty random instants (KILLS=, ARGS="--seed N"); writes docs/soak.json
#   make bench            offline throughput (MODEL=, ARGS=)
#   make demo-model       train the embedded model again (about an hour on two cores)
# PYTHON=... uses that interpreter as it is instead of .venv; PIP=... replaces its pip;
# BASE_PYTHON=... is what .venv is made with; TORCH_ARGS=... goes to the torch install: "--index-url URL" with the
# index of CPU builds that pytorch.org names keeps 6 GB of CUDA libraries off a machine without a GPU.

BASE_PYTHON ?= python3
TORCH       ?= torch==2.13.0
TORCH_ARGS  ?=
MODEL       ?= demo
ARGS        ?=
KILLS       ?= 50

ifdef PYTHON
STAMP := .ready-$(subst /,_,$(PYTHON))
else
PYTHON := .venv/bin/python
STAMP  := .venv/.ready
endif
PIP ?= $(PYTHON) -m pip

# The install builds the CPU kernels; this stamp builds them again when a pull changed their sources.
KERNELS := tandem/ops/cpu/lib/.ready

.PHONY: setup kernels serve test lint check sanitize soak bench demo-model clean
.DEFAULT_GOAL := setup

setup: $(STAMP) $(KERNELS)

# torch goes first, on its own: once it is importable (say, a CPU build), the second line keeps it.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || $(BASE_PYTHON) -m venv .venv
	@$(PYTHON) -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH_ARGS) "$(TORCH)"
	$(PIP) install --quiet -c constraints.txt hatchling editables
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

kernels: $(KERNELS)

$(KERNELS): $(wildcard tandem/ops/cpu/csrc/*) tandem/ops/cpu/build.py | $(STAMP)
	$(PYTHON) tandem/ops/cpu/build.py
	@mkdir -p $(@D) && touch $@

serve: $(STAMP) $(KERNELS)
	@exec $(PYTHON) -m tandem serve $(MODEL) $(ARGS)

# Passive: on tiny models, threads that spin while they wait for each other make a busy machine 100 times slower.
test: $(STAMP) $(KERNELS)
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest $(ARGS)

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

check: lint test

sanitize: $(STAMP)
	OMP_WAIT_POLICY=passive $(PYTHON) tests/sanitize.py $(ARGS)

soak: $(STAMP) $(KERNELS)
	$(PYTHON) tests/soak.py --kills $(KILLS) --out docs/soak.json $(ARGS)

bench: $(STAMP) $(KERNELS)
	$(PYTHON) -m tandem bench throughput --model $(MODEL) --dtype bfloat16 $(ARGS)

demo-model: $(STAMP)
	$(PYTHON) -m tools.demo_model.build --out tandem/assets/demo $(ARGS)

clean:
	rm -rf .venv .ready-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf tandem/ops/cpu/lib tandem/ops/cpu/obj
