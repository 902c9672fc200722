# Entry points for people and for CI; `make help` lists them.
# Further arguments of a command go in ARGS, e.g. make test ARGS="-k streams".

# An active virtual or conda environment (other than base) is used as it is; without one, .venv is created here.
ACTIVE := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)))
ENV    := $(or $(ACTIVE),.venv)
PYTHON := $(ENV)/bin/python

# Marks "this checkout, with this pyproject.toml and this lock, is installed in this environment". It lies inside the
# environment, so another environment is never taken for installed, and carries a checksum of the checkout's path,
# so neither is another checkout.
STAMPS := $(ENV)/.differentiable-nas-
STAMP  := $(STAMPS)$(shell printf %s '$(CURDIR)' | cksum | cut -d ' ' -f 1)

PRESET ?= laptop
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help install sweep test test-slow lint lock

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## install this project and its tools in the active environment, or in .venv
	@echo "installed in $(ENV)"

sweep: $(STAMP)  ## run the study of partial channels, K = 1, 2, 4, 8 (PRESET=laptop)
	$(PYTHON) experiments/sweep_k.py --preset $(PRESET) $(ARGS)

test: $(STAMP)  ## run the default tests, a file to a process
	$(PYTHON) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile $(ARGS)

test-slow: $(STAMP)  ## run the tests that take minutes
	$(PYTHON) -m pytest -m slow $(ARGS)

lint: $(STAMP)  ## check style, format and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

$(STAMP): pyproject.toml requirements.lock | $(PYTHON)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    f"error: {sys.executable} is Python {sys.version.split()[0]}; activate an environment with 3.11 or later")'
	@$(PYTHON) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m ensurepip
	@echo "installing in $(ENV); the first time takes minutes, PyTorch is large"
	@rm -f $(STAMPS)*
	$(PYTHON) -m pip install --quiet -c requirements.lock -e ".[dev]"
	@touch $@

ifdef ACTIVE
$(PYTHON):
	@echo "error: $@ is missing, though the environment $(ENV) is active; deactivate it, or activate another" >&2; exit 1
else
$(PYTHON):
	@for python in python3.11 python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	        echo "creating $(ENV) with $$($$python --version)"; exec $$python -m venv $(ENV); \
	    fi; \
	done; \
	echo "error: neither python3.11 nor python3 is Python 3.11 or later; install it, or activate an environment" >&2; \
	exit 1
endif

# Resolves all extras without installing anything. Wants Python 3.11 on Linux, which is what the lock is for.
define WRITE_LOCK
import json, sys
found = [item["metadata"] for item in json.load(sys.stdin)["install"] if "dir_info" not in item["download_info"]]
print("# The exact versions this project is tested with, on Python 3.11 and Linux. Written by `make lock`.")
print(*sorted((f"{item['name']}=={item['version']}" for item in found), key=str.lower), sep="\n")
endef
export WRITE_LOCK

lock: | $(PYTHON)  ## pin what pyproject.toml newly names; UPGRADE=1 takes the newest of everything
	$(PYTHON) -m pip install --dry-run --quiet --ignore-installed --report .lock.json \
	    $(if $(UPGRADE),,-c requirements.lock) -e ".[dev,cluster]"
	$(PYTHON) -c "$$WRITE_LOCK" < .lock.json > requirements.lock
	@rm .lock.json
