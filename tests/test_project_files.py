# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What one file of the repository says of another is true."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import cts_hf

from .helpers.scripts import ROOT


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_commits_are_formatted_with_the_version_that_the_tests_use():
    (pinned,) = set(re.findall(r'"ruff\b[^\d]*([\d.]+)"', text_of("pyproject.toml")))
    (hooks,) = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert hooks["rev"] == f"v{pinned}"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["version"] == cts_hf.__version__
    assert citation["preferred-citation"]["title"] in text_of("README.md")


def test_targets_that_contributing_names_are_there():
    targets = set(re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)`", text_of("CONTRIBUTING.md") + text_of("README.md"))) == targets


def test_the_workflow_runs_what_ci_runs():
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    assert {"run": ".ci/run"} in jobs["test"]["steps"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', text_of("pyproject.toml"))[1]
    assert oldest in jobs["test"]["strategy"]["matrix"]["python"]


MOVED = re.findall(r"^\| `(cts_hf\.[\w.]+)` \| `(cts_hf\.[\w.]+)` \|$", text_of("CHANGELOG.md"), re.MULTILINE)


@pytest.mark.parametrize(("was", "now"), MOVED)
def test_modules_are_where_the_changelog_says(was, now):
    assert importlib.util.find_spec(now), f"{was} has moved on"


def test_the_package_says_its_version_and_that_it_is_typed():
    assert cts_hf.__version__ == importlib.metadata.version("cts-hf")
    assert (Path(cts_hf.__file__).parent / "py.typed").exists()
