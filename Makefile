# Everything happens in .venv beside this file. `make help` lists what there is.

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo lab test unprivileged conformance rounds fuzz kernels gallery guests clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 14

demo: $(VENV)/.demo  ## install into .venv, then let two emulated PCs and Python interrupt each other
	@$(BIN)/ivshmem-lab demo

lab: $(VENV)/.lab  ## open the first notebook in JupyterLab
	@$(BIN)/jupyter lab notebooks/00-start-here.ipynb

test: $(VENV)/.test  ## install what the tests need, then run every check
	@tests/apt.sh
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/pytest $(PYTEST_ARGS)

unprivileged: $(VENV)/.test  ## as root: labs, machines and Linux guests as a user without rights or KVM, in 2 GB (PYTEST_ARGS=)
	@tests/unprivileged.sh $(PYTEST_ARGS)

ACCESSES ?= 100000
ROUNDS ?= 200
SEED ?=

conformance: $(VENV)/.test  ## compare 100000 random accesses with real QEMU (ACCESSES=, SEED=)
	@IVSHMEM_LAB_ACCESSES=$(ACCESSES) IVSHMEM_LAB_SEED=$(SEED) $(BIN)/pytest -s -q tests/conformance

rounds: $(VENV)/.test  ## plug and unplug 200 times on machines of each kind, Linux guests too (ROUNDS=)
	@IVSHMEM_LAB_ROUNDS=$(ROUNDS) $(BIN)/pytest -s -q tests/lab/test_lab_hotplug_rounds.py

fuzz: $(VENV)/.test  ## a million mutated inputs for peers and for the control socket, 200 pairs of topologies applied (some minutes)
	@IVSHMEM_LAB_APPLY_EXAMPLES=200 $(BIN)/pytest -k after_applying tests/lab/test_lab_apply.py
	@IVSHMEM_LAB_FUZZ_INPUTS=1000000 $(BIN)/pytest -k mutated tests/peer/test_peer_hostile_server.py tests/server/test_server_control.py

KERNEL ?= 6.29.5
kernels: $(VENV)/.test  ## the widgets in JupyterLab and the notebooks on an older ipykernel (KERNEL=)
	@$(BIN)/pip install -q --upgrade --target build/ipykernel-$(KERNEL) --no-deps "ipykernel==$(KERNEL)" nest-asyncio
	@IVSHMEM_LAB_IPYKERNEL=$(CURDIR)/build/ipykernel-$(KERNEL) $(BIN)/pytest -q tests/notebooks tests/browser

gallery: $(VENV)/.test  ## draw every widget in every state into build/gallery, to look at (ONLY="hotplug bench")
	@PYTHONPATH=. $(BIN)/python -m tests.browser.gallery $(ONLY)

guests: $(VENV)/.demo  ## build the guest programs again from their sources (needs gcc)
	@$(BIN)/python -m ivshmem_lab.guests.toolchain

clean:  ## remove .venv and everything that was built
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis ivshmem-demo.*
	@find ivshmem_lab tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp says which extras .venv holds; it is out of date when pyproject.toml changes.
# Tests run with the versions that Binder gets, so that what is tested is what is shown.
$(VENV)/.lab: EXTRAS := [lab]
$(VENV)/.test: EXTRAS := [lab,test]
$(VENV)/.test: PINS := -c $(VENV)/pins.txt
$(VENV)/.test: binder/requirements.txt
$(VENV)/.lab $(VENV)/.test: COVERED := $(VENV)/.demo
$(VENV)/.test: COVERED += $(VENV)/.lab

$(VENV)/.demo $(VENV)/.lab $(VENV)/.test: pyproject.toml $(BIN)/python
	@echo "Installing ivshmem-lab$(EXTRAS) into $(VENV): about a minute, once ..."
	@grep -v '^-e' binder/requirements.txt >$(VENV)/pins.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PINS) -e '.$(EXTRAS)'
	@touch $(COVERED) $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "ivshmem-lab needs Python 3.11 or newer, and '$(PYTHON)' is not; name one that is: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
