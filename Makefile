# make          set up .venv, run every notebook that is not up to date, redraw figures/
# make setup    the environment alone
# make test     unit tests, then every notebook against its stored outputs
# make lab      JupyterLab on notebooks/
# make bench    measure speed and memory here, into tests/benchmarks/results/
# make zoo      train the shipped models again, one per core; a stopped run goes on
# make lock     renew constraints.txt from pyproject.toml
# make clean    remove what runs have left in build/
#
# NB=05           only the notebook of that number
# PROFILE=paper   the papers' own models and data; output stays in build/paper/
# ENV=current     the environment that is active (conda, Binder) in place of .venv
# DEVICE=cuda     where make bench measures; by default a GPU where there is one
# ARGS='-k frame' further options for pytest, with make test and make bench

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: all setup test lab bench zoo lock clean
.DEFAULT_GOAL := all

PROFILE ?= tiny
NB      ?=
ARGS    ?=
# where `make bench` measures, and the file that it writes, tests/benchmarks/results/$(BENCH).json
DEVICE  ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
BENCH   ?= $(DEVICE)
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
             $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)

# uv does not read pip's variable for a folder of local wheels; empty for those who have none
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

ifeq ($(ENV),current)
PY    := python
READY :=
else
VENV  ?= .venv
PY    := $(abspath $(VENV))/bin/python
READY := $(VENV)/.ready

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found: install one, or name it by PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo; echo "No virtual environment could be made: on Debian and Ubuntu, apt install python3-venv;"; \
	  echo "or use conda: conda env create -f environment.yml && conda activate tensorlens && make ENV=current"; exit 1; }
	@echo "installing into $(VENV) (torch is large: a few minutes on a first download)"
	@$(PY) -m pip install -q uv
	@$(PY) -m uv pip install -q --python $(PY) --compile-bytecode -c constraints.txt -e '.[dev]' \
	  || $(PY) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
endif

all: $(READY)
	@$(PY) -m tensorlens_utils.notebooks --profile $(PROFILE) $(NB)

setup: $(READY)

test: $(READY)
	$(PY) -m pytest --nbval --nbval-current-env --nbval-cell-timeout 600 \
	  --nbval-sanitize-with tests/nbval_sanitize.cfg --doctest-modules $(ARGS) tests tensorlens_utils notebooks

lab: $(READY)
	$(PY) -m jupyterlab --ServerApp.root_dir=notebooks

bench: $(READY)
	@mkdir -p tests/benchmarks/results
	DEVICE=$(DEVICE) $(PY) -m pytest tests/benchmarks --benchmark-json=tests/benchmarks/results/$(BENCH).json $(ARGS)

zoo: $(READY)
	$(PY) -m tensorlens_utils.recipes

# without find-links, which would lock one machine's build of torch; without CUDA's packages, which torch pins by itself
lock: $(READY)
	env -u UV_FIND_LINKS -u PIP_FIND_LINKS $(PY) -m uv pip compile -q --universal --no-header --no-annotate \
	  --python-version 3.11 --extra dev pyproject.toml | grep -vE '^(nvidia|cuda|triton)' > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf build
