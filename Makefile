# `make demo` and `make test` do all their own set-up on a fresh machine: Python 3.11 or later and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
GPU := .venv-gpu
WHEEL := .gpu-wheel
KIT := .gpu-kit
PROOF := .venv-gpu-proof
# A process that has run out of tests takes some of the other's; the slowest are named, as all checks have half an hour.
PARALLEL := -n 2 --dist worksteal --durations 12
# The Python, on the machine with a card, that has torch.
GPU_PYTHON ?= python3

.PHONY: demo test test-slow test-gpu test-gpu-wheel gpu-proof gpu-proof-kit check lint types docs figures bench bench-smoke clean

demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo demo

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m slow

# On a machine with a CUDA card; installs faiss-gpu in place of faiss-cpu.
test-gpu: $(GPU)/.installed
	$(GPU)/bin/python -m pytest -m gpu

# That FAISS's GPU build has what we call; needs no card. It shadows faiss-cpu by standing before it on the path.
test-gpu-wheel: $(INSTALLED) $(WHEEL)/faiss
	SPADE_FAISS_GPU_WHEEL=$(CURDIR)/$(WHEEL) $(BIN)/python -m pytest -m gpu_wheel

# What is right and how fast it is on this machine's card, as benchmarks/results/gpu/CARD.json: at most 8 minutes, of which
# setting up may take one and a half; no network. It needs the folder that gpu-proof-kit fills, and GPU_PYTHON.
gpu-proof: $(PROOF)/.installed
	$(PROOF)/bin/python -m benchmarks.gpu_proof --budget-s 390

# The kit for it, for another machine: its Python is KIT_PYTHON (as 3.12), its torch KIT_TORCH; by default those of this project here.
gpu-proof-kit:
	$(PYTHON) -m benchmarks.gpu_kit download $(KIT) \
		$(if $(KIT_PYTHON),--python $(KIT_PYTHON)) $(if $(KIT_TORCH),--torch $(KIT_TORCH))

# What takes one core goes two at a time; tests take both.
check: $(INSTALLED)
	$(MAKE) --jobs 2 --output-sync=target lint types docs test-gpu-wheel bench-smoke
	$(MAKE) test
	$(MAKE) test-slow

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(wildcard spade_faiss/search/native/src/* tests/native/*.cpp)

types: $(INSTALLED)
	$(BIN)/mypy

# The documentation, into site/; open site/index.html.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The figures of benchmarks/results/; DATA is a folder that holds mvtec_bottle and magnetic_tile.
figures: $(INSTALLED)
	$(BIN)/python -m benchmarks.main_job --data $(DATA) --out benchmarks/results
	$(BIN)/python -m benchmarks.gallery --data $(DATA) --out benchmarks/results --recipes exact ivf compact location history
	$(BIN)/python -m benchmarks.kernel --data $(DATA) --out benchmarks/results
	$(BIN)/python -m benchmarks.windows --data $(DATA) --out benchmarks/results
	$(BIN)/python -m benchmarks.codes --out benchmarks/results
	$(BIN)/python -m benchmarks.durability --out benchmarks/results
	$(BIN)/python -m benchmarks.calibration --data $(DATA) --out benchmarks/results
	$(BIN)/python -m benchmarks.pages

# Exact against approximate, on generated features: seconds.
bench-smoke: $(INSTALLED)
	rm -rf demo/smoke
	$(BIN)/python -m benchmarks run benchmarks/sweeps/smoke.yaml --one-process --out demo/smoke/raw --scratch demo/smoke/scratch
	$(BIN)/python -m benchmarks report demo/smoke/raw --out demo/smoke/report

# The same for good, resumable: some 40 minutes on two cores, 10 GB of SCRATCH. PATCHCORE is a Python that has anomalib.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks run $(addprefix benchmarks/sweeps/,image.yaml pixel.yaml peers.yaml scaling.yaml image_large.yaml) \
		--data $(DATA) --out $(SCRATCH)/raw --scratch $(SCRATCH) $(if $(PATCHCORE),--patchcore-python $(PATCHCORE))
	$(BIN)/python -m benchmarks report $(SCRATCH)/raw --out benchmarks/results/sweep

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard spade_faiss/search/native/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,serve,watch,cluster,demo,dev]'
	touch $@

$(GPU)/.installed: pyproject.toml setup.py constraints.txt $(wildcard spade_faiss/search/native/src/*)
	$(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[gpu,demo,dev,watch]'
	touch $@

$(WHEEL)/faiss: constraints.txt
	rm -rf $(WHEEL)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --target $(WHEEL) faiss-gpu \
	    nvidia-cublas-cu12 nvidia-cuda-runtime-cu12 nvidia-curand-cu12 nvidia-cuda-nvrtc-cu12
	touch $@

$(PROOF)/.installed: $(wildcard $(KIT)/*)
	$(GPU_PYTHON) -m benchmarks.gpu_kit install $(KIT) $(PROOF)
	touch $@

clean:
	rm -rf $(VENV) $(GPU) $(WHEEL) $(KIT) $(PROOF) demo site build dist spade_faiss/search/native/_native*.so
