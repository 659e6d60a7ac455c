# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The site of the documents, as far as `mkdocs build --strict` does not check it; needs the `docs` extra."""

import importlib
import re

import pytest

import cts_hf

from .helpers.scripts import ROOT


griffe = pytest.importorskip("griffe")
mkdocs_config = pytest.importorskip("mkdocs.config")

SITE = ROOT / "docs/site"


@pytest.fixture(scope="module")
def package():
    extensions = griffe.load_extensions(str(SITE / "docstrings.py"))
    return griffe.load("cts_hf", search_paths=[ROOT / "src"], extensions=extensions)


def entries(docstring):
    """Type and description of each entry of the `Args` of a docstring, by name."""
    sections = docstring.parse("google", warnings=False)
    (parameters,) = [section for section in sections if section.kind is griffe.DocstringSectionKind.parameters]
    return {entry.name: (str(entry.annotation), entry.description) for entry in parameters.value}


def test_types_in_transformers_style_are_read(package):
    function = package["model.modeling_cts_targets.superpatch_targets"]
    assert entries(function.docstring)["superpatch_size"] == (
        "int",
        "Side of a superpatch in pixels; must divide height and width.",
    )


def test_types_over_two_lines_and_links_are_read(package):
    docstring = griffe.Docstring(
        """A [`CtsModel`], [`~cts_hf.share`], [`~CtsPolicyModel.fuse_batch_norm`] or [`~other.Unknown`].

        Args:
            logits (`torch.FloatTensor` of shape `(batch_size,
            num_labels)`, *optional*, returned when `labels` is given):
                See [`CtsConfig`].
        """.replace("\n        ", "\n")
    )
    probe = griffe.Module("probe", docstring=docstring)
    package.set_member("probe", probe)
    griffe.load_extensions(str(SITE / "docstrings.py")).call("on_package", pkg=package)
    package.del_member("probe")
    links = {
        "CtsModel": "cts_hf.model.modeling_cts.CtsModel",
        "share": "cts_hf.model.token_sharing.share",
        "CtsPolicyModel.fuse_batch_norm": "cts_hf.model.modeling_cts_policy.CtsPolicyModel.fuse_batch_norm",
    }
    linked = ", ".join(f"[`{name}`][{path}]" for name, path in links.items())
    assert docstring.value.startswith(f"A {linked} or `other.Unknown`.")
    types, description = entries(docstring)["logits"]
    assert types == "torch.FloatTensor of shape (batch_size, num_labels), optional, returned when labels is given"
    assert description.strip() == "See [`CtsConfig`][cts_hf.model.configuration_cts.CtsConfig]."


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build = importlib.import_module("mkdocs.commands.build").build
    build(mkdocs_config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.mark.slow
def test_every_room_has_a_page(site):
    rooms = {path.parent.name for path in (ROOT / "src/cts_hf").glob("*/__init__.py")}
    assert {path.parent.name for path in (site / "api").glob("*/index.html")} == rooms
    names = (site / "api/index.html").read_text()
    assert [name for name in cts_hf.__all__ if f"<code>{name}</code></a>" not in names] == ["__version__"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "link"),
    [
        ("index.html", 'href="method/"'),
        ("index.html", 'href="performance/#on-two-cpu-cores"'),
        ("index.html", 'src="images/scenes.png"'),
        ("index.html", 'href="https://github.com/cts-hf/cts_hf/tree/main/examples/recipes"'),
        ("contributing/index.html", 'href="../troubleshooting/"'),
        ("method/index.html", 'href="https://github.com/cts-hf/cts_hf/blob/main/src/cts_hf/model/token_sharing.py"'),
    ],
)
def test_links_lead_into_the_site_or_to_the_repository(site, page, link):
    assert link in (site / page).read_text()


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert not re.search(
            r'<(?:script|img|link rel="stylesheet")[^>]* (?:src|href)="(?:https?:)?//', page.read_text()
        )
