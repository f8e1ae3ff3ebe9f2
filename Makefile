# Everything is set up inside this folder: .tools (uv), .venv (Python), .cache (downloads).
# `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3

export UV_CACHE_DIR := $(CURDIR)/.cache/uv
export PIP_CACHE_DIR := $(CURDIR)/.cache/pip
export XDG_CACHE_HOME := $(CURDIR)/.cache
export UV_PYTHON_DOWNLOADS := never
export VIRTUAL_ENV := $(CURDIR)/.venv
# What the user's shell finds, for commands that are printed to be pasted there.
export CALLER_PATH := $(PATH)
export PATH := $(CURDIR)/.venv/bin:$(CURDIR)/.tools/bin:$(PATH)
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME

.PHONY: help setup reference demo demo-ray serve wheel test sweep attack check format bench bench-ray docs lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 11

setup: ## install everything into this folder; PYTHON=python3.12 for another Python
	@tools/setup "$(PYTHON)"

reference: setup ## torch and PEFT, which the tests compare adapters with; about 0.2 GB to download
	@tools/setup-reference

demo: setup ## train two adapters, package, serve and ask them; MODEL=folder-or-hub-id for your own
	@mlops demo $(if $(MODEL),--model "$(MODEL)")

demo-ray: setup ## the demo's Bento on a Ray cluster of two nodes on this machine
	@mlops demo $(if $(MODEL),--model "$(MODEL)") --ray

serve: setup ## the demo's service, left running until Ctrl-C
	@mlops demo $(if $(MODEL),--model "$(MODEL)") --keep-serving

wheel: setup ## a wheel in dist, to install on another machine
	@uv build --quiet --wheel --no-build-isolation --out-dir dist
	@ls dist/*.whl

test: setup reference ## all tests, in two processes
	@python -m pytest -n 2

sweep: setup reference ## every architecture compared with torch; writes the table in docs/models.md
	@SWEEP_PAGE=write python -m pytest -m sweep tests/sweep

attack: setup ## the attacks on services and stores, the long ones too; they stay on loopback
	@python -m pytest -m attacks tests/attacks

check: setup ## lint, format, types, layers
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports

format: setup ## mend what lint and format can mend
	@ruff check --fix .
	@ruff format .

bench: setup ## the benchmarks, each against a named peer in the same run
	@python -m benchmarks

bench-ray: setup ## the same for Ray Serve: what it costs, what it brings
	@python -m benchmarks scaling --runs 3

docs: setup ## write docs/api.md from the description of the API
	@python tools/api_reference.py

lock: setup ## pin the newest allowed dependencies, with hashes
	@uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --no-annotate --custom-compile-command "make lock" \
	  pyproject.toml --group dev -o requirements.lock
	@uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --no-annotate --custom-compile-command "make lock" \
	  tools/requirements.in -o tools/requirements.lock

clean: ## remove all that the other targets made
	@rm -rf .venv .tools .cache .demo build dist .pytest_cache .mypy_cache .ruff_cache
