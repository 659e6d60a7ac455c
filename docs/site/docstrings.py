# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the docstrings of transformers' style have more than Google's, which griffe reads: types with backticks and
asterisks, entries whose types go over two lines, and names in brackets that are links.
"""

import re

import griffe


NAMES = r"\*{0,2}\w+(?:, \*{0,2}\w+)*"
TYPED_ENTRY = re.compile(rf"^( +)({NAMES}) \(([^\n:]*(?:\n[^\n:]*)?)\):(?=\s)", re.MULTILINE)
NAME = re.compile(r"\[`~?([\w.]+)`\](?![(\[])")


class TransformersDocstrings(griffe.Extension):
    def on_package(self, *, pkg, **kwargs):
        documented = [item for item in _walk(pkg) if item.docstring]
        # By name; methods with their class before it.
        paths = {
            item.path.removeprefix(f"{item.module.path}."): item.path
            for item in documented
            if item.is_class or item.is_function
        }

        def link(match):
            name = match[1].removeprefix(f"{pkg.name}.")
            return f"[`{name}`][{paths[name]}]" if name in paths else f"`{name}`"

        for item in documented:
            item.docstring.value = NAME.sub(link, TYPED_ENTRY.sub(_plain_entry, item.docstring.value))


def _walk(item):
    yield item
    for member in item.members.values():
        if not member.is_alias:
            yield from _walk(member)


def _plain_entry(match):
    indent, names, types = match.groups()
    types = re.sub(r"\[(`\w+`)\]|\*(\w+)\*", r"\1\2", types).replace("`", "")
    return f"{indent}{names} ({' '.join(types.split())}):"
