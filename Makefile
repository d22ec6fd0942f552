# `make demo` and `make test` need only Python >= 3.11 and make: they build .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
PEERS := build/peers
PEERS_STAMP := $(PEERS)/.installed

.PHONY: demo test test-large lint graphs matrix matrix-passes bench-passes bench-cpu bench-generate bench-experts bench-load bench-large bench-attention bench-memory bench-checkpoints bench-quality bench-integers bench-speculation check-gpu judges judges-full onnx-models fuzz fuzz-mutants tolerances clean

demo: $(STAMP)
	$(BIN)/python bench/demo.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# graphs of up to a hundred thousand nodes, memory of large checkpoints, more families with recurrent layers
test-large: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m large

# how the rewriting passes scale with the graph
bench-passes: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/passes.py

# the CPU figures against the peers, which have an environment of their own; two idle cores, most of an hour
bench-cpu: $(PEERS_STAMP)
	OMP_NUM_THREADS=2 $(PEERS)/bin/python bench/cpu.py --plot

# tokens a second on a cache of 512 tokens against transformers
bench-generate: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python bench/cpu_generate.py

# the forms of experts against each other and against the cost model
bench-experts: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/experts.py

# passes, lowering and loading of 8 to 61 layers with 256 experts each
bench-load: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/cpu_load.py

# memory and seconds of starting a model of more than 2 GB; takes 20 GB of disk for a while
bench-large: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/large_model.py

# passes of choice against the default pipeline
bench-attention: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/attention_passes.py

# peak memory of a comparison against plain runs
bench-memory: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/compare_memory.py

# the Triton backend against the reference on this machine's GPU
check-gpu: $(STAMP)
	$(BIN)/python bench/gpu_agreement.py

# what outside judges say: the ONNX suites, torch's op database, random graphs
judges: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/judges.py --run

# the same with all samples
judges-full: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/judges.py --full

# the ONNX models inside two packages from PyPI, against ONNX Runtime alone
onnx-models: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/onnx_models.py

# how far honest backends are from float64, against the tolerances
tolerances: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/tolerances.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=typelinks $(BIN)/mypy -p moec

# random graphs through text, passes and backends; GRAPHS and SEED choose how many and which
GRAPHS ?= 5000
SEED ?= 0
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/judge_fuzz.py --graphs $(GRAPHS) --seed $(SEED) --workers $(WORKERS)

# whether that finds mistakes which are made on purpose
fuzz-mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/fuzz_mutants.py

# every family of models: traced, run, generated with, quantised; writes docs/models.md
matrix: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/families.py --workers $(WORKERS)

# speculative decoding of the shipped model against plain greedy decoding
bench-speculation: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/speculation.py

# loss of the shipped model with its weights in fewer bits
bench-quality: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/quality.py

# integer weights on ONNX Runtime against f32
bench-integers: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/integers.py

# memory of a compiled block-FP8 checkpoint against the bytes of its files
bench-checkpoints: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/checkpoint_memory.py

# every pass on every stored graph
matrix-passes: $(STAMP)
	MOEC_MATRIX=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/passes/test_matrix.py

# the stored graphs of tests/model_matrix.py, traced again
graphs: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/model_matrix.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moec needs Python 3.11 or later, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[hf,checkpoints,test]"
	touch $(STAMP)

# llama.cpp is built from source, which takes minutes; where that fails it is left out
$(PEERS_STAMP): pyproject.toml constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -c constraints.txt -e ".[hf,checkpoints,peers]"
	-$(PEERS)/bin/python -m pip install --quiet "llama-cpp-python>=0.3.36"
	touch $(PEERS_STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
