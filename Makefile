.PHONY: install test lint docs bench example

install:  ## everything a contributor needs, into the active environment
	pip install -e ".[dev]"

test:     ## unit tests, doctests, and the code blocks of README and docs
	python -m pytest

lint:     ## rules, format, types
	ruff check .
	ruff format --check .
	lint-imports
	mypy

docs:     ## the site, into site/
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

bench:    ## every benchmark, one after the other
	set -e; for script in benchmarks/*/*.py; do python "$$script"; done

example:  ## rank the latent dimensions of a real data set
	python examples/latent_dimension.py
