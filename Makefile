# make demo      a five-hospital study on generated phantoms, or on DATA=DIR; report in demo/study/report.html
# make federation a coordinator and three hospitals as processes, over TLS, from enrolment to model
# make test      everything that must hold, within minutes
# make test-slow the full counts
# make faults    60 kills, cuts and full disks in one running federation; table in faults/
# make locks     what the containers install, with hashes, anew from pyproject.toml
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= demo
FEDERATION ?= federation
FAULTS ?= faults
DATA   ?=
STUDY  ?=
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

LOCK    = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
          --no-emit-index-url --no-emit-find-links --custom-compile-command 'make locks' --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv system demo federation faults lint types test test-slow locks clean

help:
	@sed -n 's/^# //p' Makefile

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "fedseg needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name one with make PYTHON=..."'
	@echo "Installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	touch $@

system:
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends chromium nginx-light faketime iproute2 strace

demo: venv
	OMP_NUM_THREADS=1 $(BIN)/fedseg demo --out $(OUT) $(if $(DATA),--data $(DATA)) $(if $(STUDY),--study $(STUDY))

federation: venv
	OMP_NUM_THREADS=1 $(BIN)/fedseg federation --out $(FEDERATION)

faults: venv
	OMP_NUM_THREADS=1 $(BIN)/python tests/integration/faulting.py $(FAULTS) 60 1

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: venv
	$(BIN)/mypy

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

test-slow: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

locks: venv
	$(LOCK) pyproject.toml -o locks/relay.txt
	$(LOCK) pyproject.toml --extra coordinator -o locks/coordinator.txt
	$(LOCK) pyproject.toml --extra site -o locks/trainer.txt
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	| $(LOCK) - -o locks/build.txt

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
