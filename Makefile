# make demo: set up and run the main job. make install: a service, as root. make test: the tests. make check: all a change must pass.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo install test check lint types torture lab gpu fuzz bench score wheels constraints clean man help

help:
	@sed -n '1p' Makefile | cut -c3-

# ssh-keygen is what people without imagend sign with; demo and tests use it too.
$(READY): pyproject.toml constraints.txt
	@command -v ssh-keygen >/dev/null || { echo "imagend needs ssh-keygen: apt-get install openssh-client" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "imagend needs Python 3.11 or newer: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[engine,top,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps spandrel
	@touch $@

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

# As root, on a host that is to run imagend as a service: make install OPTIONS='--client alice --dry-run'
PREFIX ?= /opt/imagend
OPTIONS ?=
install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "imagend needs Python 3.11 or newer: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[engine]'
	$(PREFIX)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps spandrel
	@if command -v restorecon >/dev/null; then restorecon -R $(PREFIX); fi
	$(PREFIX)/bin/imagend install $(OPTIONS)

# Side by side (more of them: make test PROCESSES=8) what has no clock; the rest has the machine for itself: daemons and
# workers that must answer in time.
PROCESSES ?= 2
SIDE_BY_SIDE := tests/unit tests/engine tests/test_crash.py tests/test_crashstates.py tests/test_disk_faults.py \
	tests/test_fsync.py tests/test_lying.py tests/test_orders.py
test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE:%=--ignore=%)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

# The long form of the crash and soak tests: an hour or so.
torture: $(READY)
	$(BIN)/python -m pytest -m torture

# Other kernels, NFS, power cuts on loop devices, systemd in a container: needs root, and installs Debian packages.
lab: $(READY)
	tests/lab/packages
	$(BIN)/python -m pytest -m lab

# On a CUDA device: the tests, then the benchmark at full size. docs/gpu.md
gpu: $(READY)
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.gpu

# What imagend needs beside torch, for a machine without a network.
WHEELS_PYTHON ?= 3.12
WITHOUT ?=
wheels: $(READY)
	$(BIN)/python -m benchmarks.wheels --python $(WHEELS_PYTHON) --to .wheels --without $(WITHOUT)

# Each parser of strangers' bytes under atheris for so many seconds; findings go to .fuzz/.
SECONDS ?= 60
fuzz: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	@for target in unseal signature job table prompts weights header picture; do \
		echo "== $$target"; PYTHONPATH=tests $(BIN)/python -m fuzz $$target $(SECONDS) || exit 1; done

# Man pages to MANDIR; needs lowdown.
MANDIR ?= .man
man: $(READY)
	@command -v lowdown >/dev/null || { echo "make man needs lowdown: apt-get install lowdown" >&2; exit 1; }
	$(BIN)/python docs/man.py $(MANDIR)

bench: $(READY)
	$(BIN)/python -m benchmarks

score: $(READY)
	$(BIN)/python models/diffusers/shapes-xl/score.py

# Write down the versions that are installed now, after a deliberate upgrade.
constraints:
	$(BIN)/pip freeze --exclude-editable --exclude imagend | sed 's/+cpu//' > constraints.txt

clean:
	rm -rf $(VENV) spool/* outputs/* keys .mypy_cache .pytest_cache .ruff_cache .hypothesis
