# SPDX-License-Identifier: GPL-2.0-or-later
# make demo    a narrated session of a real gdb on the demo hypervisor
# make test    every test that this machine can run, a file for each processor at a time; what was skipped, and why, stands at the
#              end; ARGS="-n 0 tests/svm" for some of them, one after the other
# make thorough  random VMCBs, page walks, predictions of exits, IOMMU tables and invented snapshots, by the ten and hundred thousand;
#              fingerprints of all examples
# make lint    ruff, and mypy --strict
# make bench   speed of the engine and of world switches
# make docs    the documentation site, in build/site
# make clean   remove everything that was made here
# Each target sets itself up: Python packages in .venv, the examples where there is gcc, a gdb where the system has none.
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
V := .venv
RUN := $(V)/bin/python

PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
GCC := $(shell command -v gcc >/dev/null && command -v ld >/dev/null && gcc -dumpmachine | grep x86_64)
fail = { echo "vmdbg: $(1)" >&2; exit 1; }

# The suite starts hundreds of processes: where bytecode is not kept, half of each one's start is compiling our modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test thorough lint bench docs clean examples gdb
.DELETE_ON_ERROR:

demo: $(V)/ready gdb
	@test -n "$(GCC)" || $(call fail,the demo hypervisor is compiled here and needs gcc and ld for x86-64; apt install gcc binutils)
	@$(MAKE) --no-print-directory --silent -C examples/hypervisor
	@$(V)/bin/vmdbg demo

test: $(V)/ready gdb examples
	@$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

thorough: $(V)/ready gdb examples
	@$(RUN) -m tests.thorough vmcbs
	@$(RUN) -m tests.thorough walks
	@$(RUN) -m tests.thorough exits
	@$(RUN) -m tests.thorough iommu
	@$(RUN) -m tests.thorough fingerprints
	@$(RUN) -m tests.thorough snapshots

lint: $(V)/ready
	@$(V)/bin/ruff check .
	@$(V)/bin/mypy

bench: $(V)/ready examples
	@$(RUN) -m benchmarks.engine
	@$(RUN) -m benchmarks.worldswitch

docs: $(V)/ready
	@$(RUN) -m sphinx -q -a -W --keep-going -j auto -c docs/site -d build/site.cache . build/site || \
	{ rm -rf build/site.cache; exit 1; }  # a page that is not read anew is not complained of again
	@echo "vmdbg: build/site/index.html"

clean:
	@for d in hypervisor bench bootsector nested secure-loader assignment regression; do $(MAKE) --no-print-directory --silent -C examples/$$d clean; done
	rm -rf $(V) build dist *.egg-info vmdbg/*/_*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis docs/_generated
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

examples: | $(V)/ready
	@if test -n "$(GCC)"; then \
	for d in hypervisor bench bootsector nested secure-loader assignment regression; do $(MAKE) --no-print-directory --silent -C examples/$$d || exit 1; done; \
	else echo "vmdbg: no gcc and ld for x86-64: the examples are not built, tests that boot them are skipped"; fi

gdb: $(V)/ready
	@command -v gdb >/dev/null || test -x $(V)/bin/gdb || { echo "vmdbg: no gdb here: taking the one from PyPI"; \
	$(PIP) gdb-for-pwndbg; }

$(V)/ready: pyproject.toml $(wildcard vmdbg/*/*.[ch])
	@test -n "$(PYTHON)" || $(call fail,Python 3.11 or newer is needed; apt install python3 (of Debian 12 or Ubuntu 24.04 at least) or name one: make PYTHON=...)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call fail,$(PYTHON) cannot make a virtual environment; apt install python3-venv)
	@echo "vmdbg: installing into $(V) with $(PYTHON) (once)"
	@$(PYTHON) -m venv $(V)
	@rm -f vmdbg/*/_*.so
	@$(PIP) --editable '.[dev]'
	@$(RUN) -c 'import vmdbg.engine._native' 2>/dev/null || echo "vmdbg: the native runtime could not be built (it needs" \
	"a C compiler and Python.h: apt install gcc python3-dev); the Python one does the same, slower"
	@touch $@
