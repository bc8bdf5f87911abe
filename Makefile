# controlnet: `make` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# -qq: build backends and indexes warn at length; what goes wrong is an error all the same.
PIP = PYTHONWARNINGS=ignore $(BIN)/python -m pip
CONSTRAINTS ?= constraints.txt
NEED_GB := 12

.DEFAULT_GOAL := help
.PHONY: docs release-check bench-gpu help env demo test test-floors check lint format types layers tiny tiny-depth card bench parity bench-tiny bench-batch bench-sdxl bench-stream bench-tiles bench-scale bench-train memory paper ablations gallery convergence torture wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.ready ## Make the environment in .venv (once)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old"; echo "hint: make env PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: python3-venv is missing"; echo "hint: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import shutil; f = shutil.disk_usage(".").free / 1e9; print(f"free disk: {f:.0f} GB"); raise SystemExit(f < $(NEED_GB))' || { echo "error: the environment needs $(NEED_GB) GB of free disk"; echo "hint: free some, or work in a clone on another disk"; exit 1; }
	@echo "making the environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --upgrade pip
	@echo "installing torch and what else is needed: some 7 GB, a few minutes"
	@$(PIP) install -qq --constraint $(CONSTRAINTS) --editable '.[dev]'
	@echo "fetching the weights of detectors"
	@$(BIN)/controlnet models pull || echo "warning: weights of detectors were not fetched; later: controlnet models pull"
	@touch $@

demo: env ## Photos -> edges, a pose, depth -> images; says where they are
	$(BIN)/python examples/demo.py out/demo

test: env ## Run all tests
	$(BIN)/python -m pytest

test-floors: ## Run the tests in an environment of the lowest versions that pyproject.toml allows (7 GB, at releases)
	@mkdir -p out && $(PYTHON) .ci/floors.py > out/floors.txt
	@$(MAKE) --no-print-directory test VENV=.venv-floors CONSTRAINTS=out/floors.txt

check: env lint types layers test ## Linters, types, layers, tests

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers cannot follow the import hook of an editable install; a folder of links shows them the package.
types: env
	@mkdir -p .typing/controlnet
	@for part in cli model preprocessors; do ln -sfn ../../$$part .typing/controlnet/$$part; done
	MYPYPATH=.typing $(BIN)/mypy

layers: env
	$(BIN)/lint-imports --no-cache

wheel: env ## Build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	@ls dist

release-check: env ## Build wheel and sdist, check them, and use the wheel in a bare environment (8 GB, minutes)
	rm -rf build dist
	$(BIN)/python -m build --outdir dist . >/dev/null
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) .ci/release.py dist/*.whl

tiny: env ## Train the embedded model (hours on a CPU; resumes; MINUTES=30: of each stage)
	$(BIN)/python -u -m controlnet.model.tiny.train $(if $(MINUTES),--minutes $(MINUTES))
	$(BIN)/python -u -m controlnet.model.tiny.card

tiny-depth: env ## Train the embedded depth network (an hour on 2 cores; resumes)
	$(BIN)/python -u -m controlnet.model.tiny.depth

card: env ## Measure the embedded model again and write its card
	$(BIN)/python -u -m controlnet.model.tiny.card

bench: env ## Time the command line, and SD 1.5 with a ControlNet, against what one would use instead (20 GB, half an hour)
	$(BIN)/python benchmarks/detect.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/image.py

bench-gpu: env ## Every figure that needs a GPU, in nine minutes
	$(BIN)/python benchmarks/gpu.py

bench-sdxl: env ## SDXL at full size beside diffusers' pipelines
	$(BIN)/python benchmarks/sdxl.py

memory: env ## What training needs on a GPU, by count
	$(BIN)/python benchmarks/memory.py

parity: env ## Compare schedulers, modes and families with diffusers' pipeline; writes benchmarks/parity.md
	$(BIN)/python benchmarks/parity.py

bench-tiny: env ## Where the time of an image by tiny goes (a minute)
	$(BIN)/python benchmarks/first_image.py

bench-batch: env ## Time many photos beside controlnet_aux; memory over 10,000 files (minutes)
	$(BIN)/python benchmarks/batch.py

bench-stream: env ## Memory and pace of a stream of a million samples, beside webdataset (2 GB, minutes)
	$(BIN)/python benchmarks/stream.py

bench-tiles: env ## Seams, memory and time of large pictures in tiles (minutes)
	$(BIN)/python benchmarks/tiles.py

bench-scale: env ## Batches and training in one process and in several (minutes)
	$(BIN)/python benchmarks/scale.py

bench-train: env ## Time and memory of a training step beside diffusers' and plain fine-tuning (24 GB, minutes)
	$(BIN)/python benchmarks/train.py

paper: env ## Tables of the paper's claims on the embedded model (two hours on 2 cores)
	$(BIN)/python benchmarks/paper.py

ablations: env ## Train ControlNets on tiny with other prompts and data, and judge them (hours on 2 cores)
	$(BIN)/python benchmarks/ablations.py

docs: env ## These pages as a site with search, in out/docs/site/
	$(BIN)/python docs/build.py

gallery: env ## Pictures of what control does, into docs/
	$(BIN)/python examples/gallery.py

convergence: env ## Train three ControlNets on tiny: when does control begin? (an hour on 2 cores)
	$(BIN)/python benchmarks/convergence.py

torture: env ## Kill every writing command at 50 random moments, and fill its disk (an hour)
	$(BIN)/python tests/torture.py

clean: ## Remove everything that make made, except .venv and runs
	rm -rf build dist out .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
