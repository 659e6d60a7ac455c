# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The rooms of the package and who imports whom:

    python -m tests.rooms

prints them from the ground up, each with the rooms below that it stands on, and ends with an error at an arrow that is
not allowed and at files of one room that import each other in a circle.
"""

from graphlib import CycleError, TopologicalSorter

import grimp


PACKAGE = "cts_hf"
# The rooms that each room may import from. A new room is a line here.
ALLOWED = {
    "model": set(),
    "hub": {"model"},
    "existing": {"model", "hub"},
    "data": {"model", "hub"},
    "conversion": {"model", "hub", "data"},
    "evaluation": {"model", "hub", "existing", "data"},
    "training": {"model", "hub", "data", "conversion", "evaluation"},
    "export": {"model", "hub", "evaluation"},
    "benchmark": {"model", "hub", "existing", "evaluation"},
}
# Within functions only: by these lines transformers finds the code of both backends wherever it saves that of one.
_SAVED_TOGETHER = {
    (f"{PACKAGE}.model.image_processing_base_cts", f"{PACKAGE}.model.{backend}")
    for backend in ("image_processing_cts", "image_processing_pil_cts")
}


def room_of(module: str) -> str:
    """The folder that a module lies in; its own name if it lies in none."""
    return module.split(".")[1] if module.count(".") else "__init__"


def imports() -> dict[str, set[str]]:
    """For each module of the package, the modules of the package that it imports."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in sorted(graph.modules)}


def arrows(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """For each room, the other rooms that it imports from."""
    rooms: dict[str, set[str]] = {}
    for module, imported in modules.items():
        if (room := room_of(module)) != "__init__":
            rooms.setdefault(room, set()).update(room_of(each) for each in imported)
    return {room: below - {room} for room, below in rooms.items()}


def problems(modules: dict[str, set[str]]) -> list[str]:
    """Arrows that are not allowed, with the modules they are about, and circles."""
    found = []
    for module, imported in modules.items():
        room = room_of(module)
        if room == "__init__":
            continue
        if room not in ALLOWED:
            found.append(f"{module} must lie in one of {sorted(ALLOWED)}: move it, or add its room to `ALLOWED`.")
            continue
        found += [
            f"{module} must import from {sorted(ALLOWED[room] | {room})} only, got {other}: move what it needs down."
            for other in sorted(imported)
            if room_of(other) not in ALLOWED[room] | {room}
        ]
    graph = {
        module: {other for other in imported if (module, other) not in _SAVED_TOGETHER}
        for module, imported in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"Modules must not import each other in a circle, got {' <- '.join(error.args[1])}.")
    return found


def drawing(rooms: dict[str, set[str]]) -> str:
    """A line for each room, from the ground up, with the rooms below that it imports from."""
    order = TopologicalSorter(ALLOWED).static_order()
    return "\n".join(f"{room:<11}-> {', '.join(sorted(rooms[room])) or 'nothing'}" for room in order if room in rooms)


if __name__ == "__main__":
    modules = imports()
    print(drawing(arrows(modules)))
    if found := problems(modules):
        raise SystemExit("\n".join(found))
