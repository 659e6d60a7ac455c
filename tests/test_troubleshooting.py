# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The messages that docs/troubleshooting.md quotes (in blocks of `text`) are those of the source: all that the examples
have put in, such as paths and numbers, apart. Messages of others are in blocks without a language.
"""

import ast
import re

import pytest

from .helpers.scripts import ROOT


QUOTED = re.findall(r"^```text\n(.*?)\n```$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE | re.DOTALL)
PLAIN_WORD = re.compile(r"(?<![\w/'`.=-])[A-Za-z]{4,}(?![\w/'`=-]|\.\w)")


def source_texts():
    """What the strings in the source consist of: sentences, or the parts of them between values."""
    texts = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.update(text.strip(" :") for text in re.split(r"\n|(?<=[.:;]) ", node.value))
    return {text for text in texts if len(text) >= 4}


@pytest.fixture(scope="module")
def texts():
    return source_texts()


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_messages_are_those_of_the_source(texts, message):
    found = {text for text in texts if text in message}
    covered = set()
    for text in found:
        before, after = r"\b" * text[0].isalpha(), r"\b" * text[-1].isalpha()
        for match in re.finditer(before + re.escape(text) + after, message):
            covered.update(range(*match.span()))
    changed = [word[0] for word in PLAIN_WORD.finditer(message) if not covered.issuperset(range(*word.span()))]
    assert not changed, f"not in the source: {changed}"
    phrases = [text for text in found if len(text.split()) >= 3]
    assert sum(map(len, phrases)) >= len(message) / 3, f"hardly anything of this is in the source: {phrases}"


def test_changed_messages_are_found(texts):
    with pytest.raises(AssertionError, match="not in the source"):
        test_quoted_messages_are_those_of_the_source(texts, "This model has no strategy: give `superpatch_scores`.")
