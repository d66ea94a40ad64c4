# `make course` runs every lesson, `make test` every test. Both need only Python 3.11 to 3.13 and this folder.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help course test lab base refresh lesson newest colab-test links student slides site format clean

PYTHON ?= python3
BIN := .venv/bin

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

course: .venv/installed  ## run all lessons on the CPU; report in build/course/report.html
	$(BIN)/python -m course.runner run

test: .venv/installed  ## lint, unit tests, and every notebook cell by cell
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pytest
	LLM_WORKBOOK_PROFILE=cpu HF_HUB_OFFLINE=1 $(BIN)/pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 600 notebooks

colab-test: .venv/installed  ## lesson 06 in environments with Colab's versions (needs a package index; about 15 minutes)
	$(BIN)/pytest -m colab --timeout 3600 tests/test_colab_runtime.py

lab: .venv/installed  ## open JupyterLab
	$(BIN)/jupyter lab notebooks

base: .venv/installed  ## train shima-4m anew (about an hour; continues where it was stopped)
	$(BIN)/python -m recipes.base_model build

student: .venv/installed  ## write the lessons without solutions, to hand out, to build/student
	$(BIN)/python -m course.runner student

refresh: .venv/installed  ## run the lessons and write their outputs into the committed notebooks
	$(BIN)/python -m course.runner refresh

lesson: .venv/installed  ## start a new lesson, for example: make lesson NAME=11_topic
	$(BIN)/python -m course.new_lesson "$(NAME)"

newest:  ## try the newest versions of the packages, apart from .venv; the report is build/newest/report.txt
	PYTHON=$(PYTHON) .ci/newest

links: .venv/installed  ## say where the course is published: make links REPO=owner/name [VERSION=1.0.0]
	$(BIN)/python -m course.links $(if $(REPO),"$(REPO)") $(if $(VERSION),--version "$(VERSION)")

slides: .venv/installed  ## lecture slides of all lessons in build/slides; they need no network
	$(BIN)/python -m course.slides export

site: .venv/installed  ## build the book in build/site from the committed notebooks
	PYTHONPATH=. $(BIN)/python site/build.py

format: .venv/installed  ## format the code and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## delete what the commands above made, the environment included
	rm -rf build .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew when a pin changes, and complete only when this file is there. `import helpers` stops at a Python too old.
.venv/installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import helpers'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@
