# `make help` lists the targets and their variables.

VENV ?= .venv
TESTS ?= tests
PYTEST_ARGS ?=
LOCK_ARGS ?=
DETECTRON2 ?=
LINT_VENV := .venv-lint

BASE_PYTHON := $(or $(PYTHON),python3)
VENV_PYTHON := $(VENV)/bin/python

# Lets every target use this checkout, whatever the environment has installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.DEFAULT_GOAL := help
.PHONY: help env test test-fast coverage lint format lock demo clean distclean

help:
	@echo "make env        build the environment: Detectron2 0.6 from PyPI, without its C++ extension"
	@echo "make test       run the tests, in the environment (built if needed)"
	@echo "make test-fast  the same without the slow ones, on all cores"
	@echo "make coverage   run the tests, and show which lines and branches they do not run"
	@echo "make lint       check style and imports of the code; needs no environment"
	@echo "make format     correct the code's style"
	@echo "make lock       pin the packages of dev/requirements/*.in, with their hashes, in *.txt"
	@echo "make demo       run the demo, in the environment (built if needed)"
	@echo "make clean      remove build products and the outputs of the demo"
	@echo "make distclean  make clean, and remove the environments"
	@echo
	@echo "Variables:"
	@echo "  VENV=<folder>        the environment (.venv)"
	@echo "  PYTHON=<program>     the Python to build it with (python3); 3.9 to 3.13"
	@echo "  DETECTRON2=github    build Detectron2's main branch, with its C++ extension"
	@echo "  DETECTRON2=<folder>  build the Detectron2 of this checkout, with its C++ extension"
	@echo "  DETECTRON2=pypi      go back to Detectron2 0.6 from PyPI"
	@echo "  TESTS=<files>        the tests to run (tests)"
	@echo "  PYTEST_ARGS=<args>   more arguments of pytest"
	@echo "  LOCK_ARGS=<args>     more arguments of uv: --upgrade for the newest of all packages,"
	@echo "                       --upgrade-package <name> for that of one"

env:
	@$(BASE_PYTHON) dev/make_env.py "$(VENV)" \
		$(if $(DETECTRON2),--detectron2 "$(DETECTRON2)") $(if $(PYTHON),--this-python)

# Models that passed tests wrote are deleted: gigabytes.
test: env
	"$(VENV_PYTHON)" -m pytest -o tmp_path_retention_policy=failed $(TESTS) $(PYTEST_ARGS)

# What a change is tried with again and again: minutes. A process for each core, of one thread each.
test-fast: export OMP_NUM_THREADS := 1
test-fast: env
	"$(VENV_PYTHON)" -m pytest -o tmp_path_retention_policy=failed -m "not slow" \
		-n auto --dist loadfile $(TESTS) $(PYTEST_ARGS)

# Lines and branches of gfl_d2 that the tests run.
coverage: env
	rm -rf output/coverage && mkdir -p output/coverage
	"$(VENV_PYTHON)" -m coverage run --rcfile dev/coverage.ini -m pytest \
		-o tmp_path_retention_policy=failed $(TESTS) $(PYTEST_ARGS)
	"$(VENV_PYTHON)" -m coverage combine --rcfile dev/coverage.ini -q
	"$(VENV_PYTHON)" -m coverage report --rcfile dev/coverage.ini

demo: env
	"$(VENV_PYTHON)" demo/run_demo.py

# ruff and import-linter have an environment of their own, without PyTorch: it takes seconds.
$(LINT_VENV)/complete: dev/requirements/lint.txt
	$(BASE_PYTHON) -m venv --clear $(LINT_VENV)
	$(LINT_VENV)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r $<
	touch $@

lint: $(LINT_VENV)/complete
	$(LINT_VENV)/bin/ruff check --config dev/ruff.toml .
	$(LINT_VENV)/bin/ruff format --config dev/ruff.toml --check .
	$(LINT_VENV)/bin/lint-imports --config dev/importlinter.ini --no-cache

format: $(LINT_VENV)/complete
	$(LINT_VENV)/bin/ruff check --config dev/ruff.toml --fix .
	$(LINT_VENV)/bin/ruff format --config dev/ruff.toml .

# Versions that are there stay, unless LOCK_ARGS says otherwise.
lock: $(LINT_VENV)/complete
	@cd dev/requirements && for name in build lint env; do \
		../../$(LINT_VENV)/bin/uv pip compile -q --universal --python-version 3.9 --generate-hashes \
			--no-annotate --custom-compile-command "make lock" $$name.in -o $$name.txt $(LOCK_ARGS) \
			|| exit; \
	done

clean:
	rm -rf build dist output/demo *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./.venv*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv $(LINT_VENV)
