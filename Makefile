# `make` lists the targets. The environment in .venv is created on first use, and brought up to date
# when setup.py, pyproject.toml or constraints.txt change.
#
#   PYTHON=/path/to/python3.12   the interpreter to create .venv from (default: see tools/make_venv.sh)
#   PYTEST_ARGS="-m slow"        further arguments of pytest
#   DEMO_ARGS="..."              arguments of the demo

VENV := .venv
RUN := $(VENV)/bin/python
# make_venv.sh writes this file last, so an interrupted installation is taken up again by the next make.
INSTALLED := $(VENV)/.installed
# wildcard leaves out what a partial checkout does not have.
SOURCES := $(wildcard paci_megatron lab tools pretrain_gpt_paci.py examples tests)

.DEFAULT_GOAL := help
.PHONY: docs help venv demo test test-older lint format clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

$(INSTALLED): setup.py pyproject.toml constraints.txt tools/make_venv.sh
	sh tools/make_venv.sh $(VENV)

venv: $(INSTALLED)  ## create .venv, or bring it up to date

demo: $(INSTALLED)  ## train a small GPT with 1F1B-flush and with PACI on a CPU, and compare them
	$(RUN) examples/gpt/demo.py $(DEMO_ARGS)

# One thread per process: several stages share the cores, and threads waiting for each other cost more than they give.
test: $(INSTALLED)  ## run the tests, without those marked slow or gpu
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_ARGS)

# Beside the release that constraints.txt has. A folder that PYTHONPATH puts first, as a user's checkout would be.
OLDER_MEGATRON := $(VENV)/megatron-core-0.19.0
$(OLDER_MEGATRON): $(INSTALLED)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ megatron-core==$(@:$(VENV)/megatron-core-%=%)

test-older: $(OLDER_MEGATRON)  ## run what depends most on Megatron with the oldest release that is supported
	PYTHONPATH=$(abspath $(OLDER_MEGATRON)) OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/unit/test_patches.py \
		tests/multiproc/test_user_code.py tests/multiproc/test_training.py

docs: $(INSTALLED)  ## build the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: $(INSTALLED)  ## check style and types
	$(RUN) -m ruff check $(SOURCES) setup.py
	$(RUN) -m ruff format --check $(SOURCES) setup.py
	$(RUN) -m mypy $(SOURCES)

format: $(INSTALLED)  ## rewrite the sources in the common style
	$(RUN) -m ruff check --fix $(SOURCES) setup.py
	$(RUN) -m ruff format $(SOURCES) setup.py

clean:  ## remove build products and caches
	rm -rf build dist *.egg-info __pycache__ .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv and runs/ too
	rm -rf $(VENV) runs
