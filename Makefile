# `make demo` and `make test` need Python 3.11 or newer and nothing else: each makes its own virtual environment.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
DEMO := .venv-demo/bin
TEST := .venv-test/bin

.PHONY: help demo test lint types fast clean
help:
	@echo "make demo   make a checkpoint, export it, prove its scores, score pairs with it"
	@echo "make test   lint, types and all tests"
	@echo "make fast   only the fast tests"
	@echo "make clean  remove what the other targets made"

# torch comes first and by its exact version, so that nothing else chooses another build of it.
.venv-%/ready: pyproject.toml constraints.txt
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --constraint constraints.txt torch==2.13.0
	.venv-$*/bin/pip install --quiet --constraint constraints.txt --editable '.[cpu,export,train$(if $(filter test,$*),$(comma)dev)]'
	touch $@
comma := ,

demo: .venv-demo/ready
	rm -rf demo
	$(DEMO)/python -m benchmarks.make_checkpoint demo/checkpoint --size small
	$(DEMO)/cappy export demo/checkpoint demo/bundle --precision fp32 --precision int8
	$(DEMO)/cappy score examples/pairs.jsonl --bundle demo/bundle
	$(DEMO)/cappy rank --bundle demo/bundle --precision int8 --instruction "Is the sky blue?" \
		--candidate Yes --candidate No --candidate "Ask me tomorrow"
	@echo "Its weights are random, so the ranking means nothing; that it is PyTorch's ranking was proven above."

test: lint types
	$(TEST)/pytest

fast: .venv-test/ready
	$(TEST)/pytest -m "not slow"

lint: .venv-test/ready
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .

types: .venv-test/ready
	$(TEST)/mypy

clean:
	rm -rf .venv-demo .venv-test demo
