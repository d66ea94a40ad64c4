# `make course` runs every lesson, `make test` every test. Both need only Python 3.11 to 3.13 and this folder.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help course test check lab sync claims base refresh lesson newest colab-test links student slides site book format \
	clean

PYTHON ?= python3
BIN := .venv/bin
# The tests of the site open its pages in a browser. One thread a process: several processes share the cores.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal
CELL_BY_CELL := --nbval-lax --nbval-current-env --nbval-cell-timeout 600 --dist loadfile

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

course: .venv/installed  ## run all lessons on the CPU; report in build/course/report.html
	$(BIN)/python -m course run --jobs 2

test: .venv/developed  ## everything: lint, layers, twins, unit tests, and every notebook cell by cell
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/python -m course sync --check
	$(PARALLEL)
	LLM_WORKBOOK_PROFILE=cpu HF_HUB_OFFLINE=1 $(PARALLEL) $(CELL_BY_CELL) notebooks

check: .venv/developed  ## on every change: lint, layers, twins and the quick tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/python -m course sync --check
	$(PARALLEL) -m 'not slow and not colab'

colab-test: .venv/developed  ## lesson 06 in environments with Colab's versions (needs a package index; about 15 minutes)
	$(BIN)/pytest -m colab --timeout 3600 tests/helpers/test_colab_runtime.py

lab: .venv/installed  ## open JupyterLab
	$(BIN)/jupyter lab notebooks

sync: .venv/developed  ## bring the notebooks and their Python sources in line
	$(BIN)/python -m course sync

claims: .venv/installed  ## fill the ledger of claims: five seeds and a control of each changed lesson (hours, resumable)
	$(BIN)/python -m course claims

base: .venv/installed  ## train shima-4m anew (about an hour; continues where it was stopped)
	$(BIN)/python -m recipes.base_model build

student: .venv/installed  ## write the lessons without solutions, to hand out, to build/student
	$(BIN)/python -m course student

refresh: .venv/installed  ## run the lessons and write their outputs into the committed notebooks
	$(BIN)/python -m course refresh

lesson: .venv/developed  ## start a new lesson, for example: make lesson NAME=18_topic
	$(BIN)/python -m course new-lesson "$(NAME)"

newest:  ## try the newest versions of the packages, apart from .venv; the report is build/newest/report.txt
	PYTHON=$(PYTHON) .ci/newest

links: .venv/developed  ## say where the course is published: make links REPO=owner/name [VERSION=1.0.0]
	$(BIN)/python -m course links $(if $(REPO),"$(REPO)") $(if $(VERSION),--version "$(VERSION)")

slides: .venv/developed  ## lecture slides of all lessons in build/slides; they need no network
	$(BIN)/python -m course slides export

site: .venv/developed  ## build the book in build/site from the committed notebooks
	$(BIN)/python -m course site

book: .venv/developed  ## the same with the book as EPUB and PDF in it (needs Chromium)
	$(BIN)/python -m course site --epub --pdf

format: .venv/developed  ## format the code and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## delete what the commands above made, the environment included
	rm -rf build .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew when a pin changes, and complete only when this file is there. `import helpers` stops at a Python too old.
.venv/installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import helpers'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

# What site, slides, grading and tests need besides.
.venv/developed: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@
