# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from .rooms import ALLOWED, arrows, drawing, imports, problems


def test_arrows_between_rooms_go_down_and_nothing_goes_round():
    modules = imports()
    assert set(arrows(modules)) == set(ALLOWED)
    assert problems(modules) == []
    assert drawing(arrows(modules)).splitlines()[0] == "model      -> nothing"


def test_an_upward_arrow_a_circle_and_an_unknown_room_are_found():
    modules = {
        "cts_hf": {"cts_hf.model.a"},
        "cts_hf.model.a": {"cts_hf.hub.b"},
        "cts_hf.hub.b": {"cts_hf.hub.c"},
        "cts_hf.hub.c": {"cts_hf.hub.b"},
        "cts_hf.attic.d": set(),
    }
    found = "\n".join(problems(modules))
    assert "cts_hf.model.a must import from ['model'] only, got cts_hf.hub.b" in found
    assert "in a circle, got cts_hf.hub.b <- cts_hf.hub.c <- cts_hf.hub.b" in found.replace(
        "cts_hf.hub.c <- cts_hf.hub.b <- cts_hf.hub.c", "cts_hf.hub.b <- cts_hf.hub.c <- cts_hf.hub.b"
    )
    assert "cts_hf.attic.d must lie in one of" in found
