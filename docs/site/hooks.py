# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What mkdocs cannot do by its configuration alone: pages made of files at the root of the repository and of docstrings,
and links out of `docs/`, which are relative in the repository, so that they work there and can be checked.
"""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    extensions = griffe.load_extensions(str(ROOT / "docs/site/docstrings.py"))
    package = griffe.load("cts_hf", search_paths=[ROOT / "src"], extensions=extensions)
    files.append(File.generated(config, "api/index.md", content=_public_names(package)))
    for room in package.modules.values():
        if not room.is_init_module:
            continue
        lines = [f"# {room.path}\n", f"{room.docstring.value}\n", _public_names(room, level=2)]
        if own := [name for name in room.exports or () if not room[name].is_alias]:
            lines.append(
                f"::: {room.path}\n    options:\n      members: {own}\n      show_docstring_description: false\n"
            )
        lines += [f"::: {module.path}\n" for module in _modules(room)]
        files.append(File.generated(config, f"api/{room.name}.md", content="\n".join(lines)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to pages become links in the site, links to other files of the repository links to it."""
    places = {f"docs/{name}": name for name in files.src_uris} | PAGES
    source = {name: path for path, name in places.items()}[page.file.src_uri]

    def replace(match):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        if path in places:
            return f"]({posixpath.relpath(places[path], posixpath.dirname(page.file.src_uri))}"
        if (ROOT / path).exists():
            return f"]({config.repo_url.rstrip('/')}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
        return match[0]  # no link, but code; or one that leads nowhere, which mkdocs refuses

    return LINK.sub(replace, markdown)


def _modules(package):
    for _, module in sorted(package.modules.items()):
        if module.is_init_module:
            yield from _modules(module)
        else:
            yield module


def _public_names(package, level=1):
    """A list of what a package exports, each name with the first paragraph of its docstring."""
    if not package.exports:
        return ""
    lines = [f"{'#' * level} {'Public names' if level > 1 else package.path}\n", f"`from {package.path} import ...`\n"]
    for name in package.exports:
        target = package[name].final_target if package[name].is_alias else package[name]
        shown = f"[`{name}`][{target.path}]" if target.has_docstrings else f"`{name}`"
        first, *_ = target.docstring.value.split("\n\n") if target.docstring else [""]
        lines.append(
            f"- {shown}" if not first or first.startswith("Args:") else f"- {shown}: {' '.join(first.split())}"
        )
    return "\n".join(lines) + "\n"
