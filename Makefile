# What CONTRIBUTING.md explains; .ci/run does all of it in an environment of its own.
.PHONY: quality types rooms test slow docs ci

quality:
	ruff check
	ruff format --check

types:
	mypy

rooms:
	python -m tests.rooms

test:
	pytest

slow:
	pytest -m slow

docs:
	mkdocs build --strict

ci:
	.ci/run
