# `make demo` needs Python 3.11 or newer, `make test` also Chromium. Each makes the virtual environments that it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The demo runs in the tests' environment where there is one: it has all that the demo's own would have.
DEMO := $(if $(wildcard .venv-test/ready),.venv-test,.venv-demo)
TEST := .venv-test/bin
ENGINE := .venv-engine/bin

# Real texts for the benchmarks (PromptSource's and BIG-Bench's tasks), where the folder is there; made-up ones otherwise.
DATA ?= $(wildcard ../shared/data)
# A checkpoint of cappy-large's size for bench-full; without one, random weights with RoBERTa's genuine vocabulary.
CHECKPOINT ?= bench/large
# Without a slash at its end, which would leave its last name empty.
override CHECKPOINT := $(patsubst %/,%,$(CHECKPOINT))
ROBERTA ?= $(DATA)/roberta-tokenizer
RESULTS ?= bench/results
# One result for each kind of CPU: none takes another's place, and none are mixed.
RESULT_OF = $(RESULTS)/$(1)-$(shell $(TEST)/python -m cappy_bench.machine).json
# Tests share the cores by files: what a file's tests share is made once, and PyTorch's threads do not fight for a core.
SHARED := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# What only `make wheel` tries, on the wheels that it makes.
OF_WHEELS := tests/contracts/test_wheels.py tests/contracts/test_other_processors.py
PYTEST := OMP_NUM_THREADS=1 $(TEST)/pytest $(SHARED)

# Python keeps what it compiled, also where the environment says no: else each process of a test compiles all of it again.
export PYTHONDONTWRITEBYTECODE :=

# What keeps `make bench` short; with BENCH= it measures the tools of all installed environments, each workload 3 times.
BENCH ?= --environment main --max-seconds 8

# Where make gpu-check writes its result; GPU_CHECK= takes its other options, such as --only and --keep-engines.
GPU_RESULT ?= bench/gpu-check.json
GPU_CHECK ?=
# Where packages cannot be fetched, GPU_PYTHON=python3 takes an interpreter that has them, and no environment is made.
GPU_PYTHON ?= .venv-gpu/bin/python
GPU_READY := $(if $(filter .venv-gpu/%,$(GPU_PYTHON)),.venv-gpu/ready)
LARGE_PYTHON := $(if $(GPU_READY),$(TEST)/python,$(GPU_PYTHON))
# GPU_TARGETS=cuda where TensorRT cannot be had: its models take most of the export's time.
GPU_TARGETS ?= cuda tensorrt
# Other options of the export, such as --limit fp16.max_error=0.01 for random weights, which are nearer to fp16's limit.
GPU_EXPORT ?=

.PHONY: help demo test lint types fast native wheel engine-tests main-tests clients others bench bench-full bench-micro gpu-check clean
help:
	@echo "make demo   export cappy-mini, prove its scores, score pairs and rank candidates with it"
	@echo "make test   lint, types and all tests"
	@echo "make fast   only the fast tests"
	@echo "make native  compile the kernels where there is a compiler; the targets below and above do it themselves"
	@echo "make wheel  wheels with the kernels for x86-64 and arm64, in dist/, by a compiler from the package index"
	@echo "make engine-tests  the engine's tests, where PyTorch is not installed"
	@echo "make main-tests  all other tests but those of wheels"
	@echo "make clients  cappy serve with the clients that people have, with schemathesis, and its pages in Chromium"
	@echo "make others  tables of pandas, polars, Arrow and datasets, Triton's schema, and Ray clusters of two nodes"
	@echo "make bench  parity and speed of cappy-mini beside other tools, in under 10 minutes"
	@echo "make bench-full   the same for a model of cappy-large's size, beside every tool that can be installed"
	@echo "make bench-micro  tokenisation, planning and single batches (pytest-benchmark)"
	@echo "make gpu-check    on a machine with an NVIDIA GPU: parity, speed and failure drills of CHECKPOINT= (docs/gpu.md)"
	@echo "make clean  remove what the other targets made"

# Beside the sources, where editable installs find it. Without a compiler it says so, and all goes on without.
native:
	$(PYTHON) engine/cappy_engine/native/build.py

# pip would compile every file of every package, 69 seconds for the tests' environment. Python compiles what it imports.
PIP_INSTALL := pip install --quiet --no-compile

# torch comes first and by its exact version, so that nothing else chooses another build of it.
.venv-%/ready: pyproject.toml constraints.txt hatch_build.py | native
	rm -rf .venv-$*
	$(PYTHON) -m venv --upgrade-deps .venv-$*
	.venv-$*/bin/$(PIP_INSTALL) --constraint constraints.txt torch==2.13.0
	.venv-$*/bin/$(PIP_INSTALL) --constraint constraints.txt --editable '.[cpu,export,train$(if $(filter test,$*),$(comma)dev)]'
	touch $@
comma := ,

demo: $(DEMO)/ready
	rm -rf demo
	$(DEMO)/bin/cappy export export/cappy_mini/checkpoint demo/bundle --precision fp32 --precision int8
	$(DEMO)/bin/cappy score docs/examples/pairs.jsonl --bundle demo/bundle
	$(DEMO)/bin/cappy rank --bundle demo/bundle --precision int8 --instruction "$$(cat docs/examples/news.txt)" \
		--candidate World --candidate Sports --candidate Business --candidate "Science and technology"

# `make -j2 test` keeps two cores busy: types, clients and others take one each, and stand first.
test: types clients others lint engine-tests main-tests

fast: .venv-test/ready
	$(PYTEST) -m "not slow"

lint: .venv-test/ready
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .

types: .venv-test/ready
	$(TEST)/mypy

# What production installs, the server too, and what the engine's tests need.
.venv-engine/ready: pyproject.toml constraints.txt hatch_build.py | native
	rm -rf .venv-engine
	$(PYTHON) -m venv --upgrade-deps .venv-engine
	$(ENGINE)/$(PIP_INSTALL) --constraint constraints.txt --editable '.[cpu,files,serve,tracing]' pytest hypothesis pytest-xdist httpx
	touch $@

# The engine's tests run where PyTorch is not installed, as the engine itself does.
engine-tests: .venv-engine/ready
	OMP_NUM_THREADS=1 $(ENGINE)/pytest $(SHARED) tests/engine

# Clients of other servers have an environment of their own; `cappy serve` runs in the engine's.
.venv-clients/ready: tests/clients/requirements.txt
	rm -rf .venv-clients
	$(PYTHON) -m venv --upgrade-deps .venv-clients
	.venv-clients/bin/$(PIP_INSTALL) --requirement $<
	touch $@

main-tests: .venv-test/ready
	$(PYTEST) --ignore tests/engine $(OF_WHEELS:%=--ignore=%)

clients: .venv-engine/ready .venv-clients/ready
	CAPPY=$(ENGINE)/cappy .venv-clients/bin/pytest tests/clients

# Packages that people have beside ours: some need newer versions than constraints.txt has.
.venv-others/ready: tests/support/others.txt pyproject.toml hatch_build.py | native
	rm -rf .venv-others
	$(PYTHON) -m venv --upgrade-deps .venv-others
	.venv-others/bin/$(PIP_INSTALL) --requirement $< --editable '.[cpu,files,ray,serve]'
	touch $@

others: .venv-others/ready
	OMP_NUM_THREADS=1 .venv-others/bin/pytest tests/engine/test_columns.py tests/engine/bulk/formats/test_parquet.py tests/engine/serving/test_triton.py tests/clusters

# Tools that cannot be installed beside the others have environments of their own.
.venv-bench-%/ready: benchmarks/cappy_bench/environments/%.txt
	rm -rf .venv-bench-$*
	$(PYTHON) -m venv --upgrade-deps .venv-bench-$*
	$(if $(shell grep ^torch $<),.venv-bench-$*/bin/$(PIP_INSTALL) torch==2.13.0)
	.venv-bench-$*/bin/$(PIP_INSTALL) --requirement $<
	touch $@

.venv-bench-node/ready: benchmarks/cappy_bench/environments/node/package.json
	rm -rf .venv-bench-node
	mkdir .venv-bench-node
	cp $< .venv-bench-node/
	cd .venv-bench-node && npm install --ignore-scripts --no-package-lock --no-audit --no-fund
	touch $@

bench/mini-bundle/manifest.json: .venv-test/ready
	rm -rf bench/mini-bundle
	$(TEST)/cappy export export/cappy_mini/checkpoint bench/mini-bundle --precision fp32 --precision fp16 --precision bf16 \
		--precision int8

bench: bench/mini-bundle/manifest.json
	$(TEST)/cappy bench run --suite quick $(BENCH) --title cappy-mini --checkpoint export/cappy_mini/checkpoint \
		--bundle bench/mini-bundle --work bench/mini --out $(call RESULT_OF,cappy-mini) --force $(if $(DATA),--data $(DATA)) \
		> bench/mini.txt
	$(TEST)/cappy bench compare $(call RESULT_OF,cappy-mini)
	$(TEST)/cappy bench report --results $(RESULTS) --force

bench/large/config.json: $(if $(GPU_READY),.venv-test/ready)
	@test -f "$(ROBERTA)/vocab.json" || { echo "set ROBERTA to a folder with RoBERTa's vocab.json and merges.txt" >&2; exit 1; }
	rm -rf bench/large
	$(LARGE_PYTHON) -m cappy_bench.make_checkpoint bench/large --size large --tokenizer $(ROBERTA)

FULL := bench/$(notdir $(CHECKPOINT))
FULL_NAME := $(if $(filter bench/large,$(CHECKPOINT)),cappy-large,$(notdir $(CHECKPOINT)))
FULL_TITLE := $(if $(filter bench/large,$(CHECKPOINT)),cappy-large's size,$(notdir $(CHECKPOINT)))
$(FULL)-bundle/manifest.json: $(if $(filter bench/large,$(CHECKPOINT)),bench/large/config.json)
	rm -rf $(FULL)-bundle
	$(TEST)/cappy export $(CHECKPOINT) $(FULL)-bundle --precision fp32 --precision bf16 --precision int8

bench-full: $(FULL)-bundle/manifest.json $(patsubst %,.venv-bench-%/ready,openvino llamacpp infinity node)
	$(TEST)/cappy bench run --suite full --max-seconds 30 --title "$(FULL_TITLE)" --checkpoint $(CHECKPOINT) \
		--bundle $(FULL)-bundle --work $(FULL)-work --out $(call RESULT_OF,$(FULL_NAME)) --force $(if $(DATA),--data $(DATA)) \
		> bench/full.txt
	$(TEST)/cappy bench compare $(call RESULT_OF,$(FULL_NAME))
	$(TEST)/cappy bench report --results $(RESULTS) --force

bench-micro: .venv-test/ready
	$(TEST)/pytest benchmarks/micro --benchmark-columns=median,iqr,rounds

# ziglang is a compiler that makes libraries for other machines, too.
.venv-wheel/ready: constraints.txt
	rm -rf .venv-wheel
	$(PYTHON) -m venv --upgrade-deps .venv-wheel
	.venv-wheel/bin/$(PIP_INSTALL) --constraint constraints.txt build hatchling ziglang
	touch $@

# Tried where no compiler can be found; arm64's library is run by qemu-user, if that is installed, and its C library.
wheel: .venv-wheel/ready .venv-test/ready
	rm -rf dist
	CAPPY_BUILD=manylinux-x86_64 .venv-wheel/bin/python -m build --wheel --no-isolation
	CAPPY_BUILD=manylinux-aarch64 .venv-wheel/bin/python -m build --wheel --no-isolation
	CAPPY_WHEELS=dist OMP_NUM_THREADS=1 $(TEST)/pytest $(SHARED) $(OF_WHEELS)

# With onnxruntime-gpu, which cannot be installed beside onnxruntime, and the TensorRT that it is linked with.
.venv-gpu/ready: pyproject.toml constraints.txt hatch_build.py | native
	rm -rf .venv-gpu
	$(PYTHON) -m venv --upgrade-deps .venv-gpu
	.venv-gpu/bin/$(PIP_INSTALL) --constraint constraints.txt torch==2.13.0
	.venv-gpu/bin/$(PIP_INSTALL) --constraint constraints.txt --editable '.[gpu,export]' 'tensorrt-cu13<11'
	touch $@

# Made once: an export of cappy-large's size takes minutes. Remove the folder to export again.
GPU_BUNDLE := bench/$(notdir $(CHECKPOINT))-gpu-bundle
$(GPU_BUNDLE)/manifest.json: | $(GPU_READY) $(if $(filter bench/large,$(CHECKPOINT)),bench/large/config.json)
	rm -rf $(GPU_BUNDLE)
	$(GPU_PYTHON) -m cappy_engine export $(CHECKPOINT) $(GPU_BUNDLE) $(GPU_TARGETS:%=--target %) \
		--precision fp32 --precision fp16 $(if $(filter tensorrt,$(GPU_TARGETS)),--precision int8) $(GPU_EXPORT)

gpu-check: $(GPU_BUNDLE)/manifest.json | $(GPU_READY)
	$(GPU_PYTHON) -m cappy_bench.gpu.check --checkpoint $(CHECKPOINT) --bundle $(GPU_BUNDLE) \
		--title "GPU check of $(notdir $(CHECKPOINT))" --out $(GPU_RESULT) --force $(if $(DATA),--data $(DATA)) $(GPU_CHECK)

clean:
	rm -rf .venv-demo .venv-test .venv-engine .venv-clients .venv-others .venv-gpu .venv-wheel .venv-bench-* demo bench dist
	rm -f engine/cappy_engine/native/build.json engine/cappy_engine/native/*.so
