# `make demo` and `make test` need Python 3.11 or newer and nothing else: each makes its own virtual environment.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
DEMO := .venv-demo/bin
TEST := .venv-test/bin

.PHONY: help demo test lint types fast clean
help:
	@echo "make demo   export cappy-mini, prove its scores, score pairs and rank candidates with it"
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
	$(DEMO)/cappy export models/cappy-mini demo/bundle --precision fp32 --precision int8
	$(DEMO)/cappy score examples/pairs.jsonl --bundle demo/bundle
	$(DEMO)/cappy rank --bundle demo/bundle --precision int8 --instruction "$$(cat examples/news.txt)" \
		--candidate World --candidate Sports --candidate Business --candidate "Science and technology"

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
