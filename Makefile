# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv with the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
NUMERICS_TEST = $(BIN)/python -m pytest -m trains --numprocesses auto --maxprocesses 4 --dist loadgroup $(CHOSEN)

.PHONY: help demo test test-numerics cluster-test lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv/installed  ## grow a transformer across six participants on a local Ray; results in results/quick
	$(BIN)/python benchmarks/sweep.py --suite quick --hosts 2 --numerics portable --out results/quick

test: .venv/installed  ## run the test suite, several tests at once
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup

test-numerics: .venv/installed  ## what trains, under settings that stand for other processors (CHOSEN="-k ..." for less)
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE DNNL_MAX_CPU_ISA=SSE41 $(NUMERICS_TEST)
	ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 DNNL_MAX_CPU_ISA=AVX2 $(NUMERICS_TEST)
	$(NUMERICS_TEST)

cluster-test: .venv/installed  ## a real `ray up` on machines made of namespaces; root, with sshd and rsync
	$(BIN)/python -m pytest -m cluster tests/cluster

lint: .venv/installed  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:  ## remove the environment and caches; results stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedsim needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable ".[dev]"
	touch $@
