# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What is drawn in the pictures that matplotlib writes."""

from matplotlib.figure import Figure


def saved_figures(monkeypatch):
    """The figures that are saved from now on."""
    figures, save = [], Figure.savefig

    def remember_and_save(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", remember_and_save)
    return figures
