# Targets that users and CI call. Setting up is left to scripts/setup; it is quick when done.

SHELL := /bin/bash
export PATH := $(PATH):/usr/sbin:/sbin
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Most tests wait most of the time. The order of folders stays, which has the longest files first.
PARALLEL := --numprocesses=3 --dist=loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run lab test test-slow test-containers check bench

help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 24

setup:  ## install what `make run` needs, and .venv/bin/slurmgate
	@scripts/setup run

setup-dev:
	@scripts/setup dev

run: setup  ## serve config/services.json on http://127.0.0.1:8080 (Ctrl-C stops it)
	@exec $(BIN)/slurmgate up --config config/services.json

lab: setup-dev  ## a small Slurm cluster on this machine, and slurmgate on it (Ctrl-C ends both)
	@exec $(BIN)/python -m tests.lab up

test: setup-dev  ## every test that needs no container engine
	busted --pattern=_spec --lpath='lua/?.lua' tests/lua
	$(PYTEST) $(PARALLEL) --cov --cov-report=term-missing

test-slow: setup-dev  ## what takes minutes: real time limits, long schedules
	$(PYTEST) $(PARALLEL) tests/slow

test-containers:  ## the same in containers; starts a Docker engine where none runs
	@scripts/setup containers
	scripts/containers $(PYTEST) tests/containers

check: setup-dev  ## linters, types, layers, the nginx configuration
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	luacheck --quiet lua tests/lua
	$(BIN)/slurmgate render build/check
	nginx -t -q -e stderr -c $(CURDIR)/build/check/nginx.conf

bench: setup-dev  ## measure; prints a table and writes build/bench.json
	$(BIN)/python -m tests.bench
