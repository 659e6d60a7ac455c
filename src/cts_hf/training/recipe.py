# Copyright 2026 The cts_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Recipes: files of options (YAML or JSON) that the command line overrides, and the record of what a run used."""

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from cts_hf.training.arguments import FREE_ON_RESUME


RECIPE_FILE = "train.yaml"


def parse_recipe(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, default_recipe: str | Path | None = None
) -> tuple[Any, ...]:
    """
    Reads options from a recipe and the command line, which wins.

    Args:
        dataclass_types: options dataclasses, with no field name twice.
        argv: arguments, `sys.argv[1:]` by default. `--recipe FILE`, or FILE as the first argument, names the recipe.
        default_recipe: recipe of a run that names neither a recipe nor a data set.

    Returns:
        one instance of each dataclass.

    Raises:
        ValueError: a recipe that is no mapping or has options that do not exist.
        SystemExit: command-line arguments that do not exist, as argparse does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    found, rest = finder.parse_known_args(argv)
    recipe = found.recipe
    if recipe is None and rest and not rest[0].startswith("-"):
        recipe = rest.pop(0)
    if recipe is None and not any(argument.split("=")[0] in ("--dataset", "--data_dir") for argument in rest):
        recipe = default_recipe

    parser = HfArgumentParser(tuple(dataclass_types), description="--recipe FILE reads options from a YAML file.")
    if recipe is not None:
        # As defaults, never as words of the command line: a value that starts with a dash stays a value.
        parser.set_defaults(**_converted(read_recipe(recipe, dataclass_types), parser, recipe))
    return parser.parse_args_into_dataclasses(rest, look_for_args_file=False)


def read_recipe(path: str | Path, dataclass_types: Sequence[type]) -> dict[str, Any]:
    """
    The options that a YAML or JSON file gives a value, other than null and the empty list.

    Raises:
        ValueError: no such file, a file that is no mapping, or options that do not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}. A recipe is a YAML or JSON file of options.")
    try:
        text = path.read_text(encoding="utf-8")
        options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read as YAML or JSON in UTF-8: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"The recipe {path} must map options to values, it is a {type(options).__name__}.")
    names = {f.name for dataclass_type in dataclass_types for f in fields(dataclass_type)}
    if unknown := sorted(map(str, options.keys() - names)):
        raise ValueError(f"The recipe {path} has unknown options {unknown}. There are {', '.join(sorted(names))}.")
    # Null and the empty list are what options that have them as a default are without being named.
    return {name: value for name, value in options.items() if value is not None and value != []}


def _converted(options: dict[str, Any], parser: ArgumentParser, path: str | Path) -> dict[str, Any]:
    """The options of a recipe as the parser has those of the command line; wrong values end the process as there."""
    actions = {action.option_strings[0]: action for action in parser._actions}
    converted = {}
    for name, value in options.items():
        action = actions[f"--{name}"]
        is_list = action.nargs == "+"
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not is_list:
            parser.error(f"argument --{name}: expected one value in the recipe {path}, got {value!r}")
        try:
            values = [action.type(str(item)) for item in values]
        except (ValueError, TypeError, ArgumentTypeError) as error:
            parser.error(f"argument --{name}: invalid value: {value!r} in the recipe {path} ({error})")
        if action.choices is not None and not set(values) <= set(action.choices):
            allowed = ", ".join(map(str, action.choices))
            parser.error(f"argument --{name}: invalid choice: {value!r} in the recipe {path} (choose from {allowed})")
        converted[name] = values if is_list else values[0]
    return converted


def effective_options(arguments: Sequence[Any]) -> dict[str, Any]:
    """All options of several dataclasses by name."""
    return {name: value for group in arguments for name, value in asdict(group).items()}


def refuse_changed_options(saved: dict[str, Any], arguments: Sequence[Any], place: Path, free: frozenset[str]) -> None:
    """
    Refuses to go on with options that differ from those that an earlier part of the run was made with.

    Args:
        saved: the earlier options.
        arguments: options dataclasses of now.
        place: where `saved` was found.
        free: names of options that may differ.

    Raises:
        ValueError: it lists every difference.
    """
    # As JSON has them, so that tuples are lists.
    current = json.loads(json.dumps(effective_options(arguments)))
    differences = [
        f"{name} {_shown(saved, name)} -> {_shown(current, name)}"
        for name in sorted((saved.keys() | current.keys()) - free)
        if not _is_same(saved.get(name), current.get(name))
    ]
    if differences:
        raise ValueError(
            f"{place} was made with other options: {', '.join(differences)}. Resume with the former ones (its "
            "train.yaml or progress.json has them), or start a new run in another --output_dir. Only "
            f"{', '.join(sorted(free))} may change."
        )


def refuse_another_recipe(folder: Path, arguments: Sequence[Any]) -> None:
    """Refuses a finished model whose `train.yaml` is not that of these options; the length of training counts too."""
    try:
        saved = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{folder / RECIPE_FILE} cannot be read ({error}): train the model in {folder} anew."
        ) from error
    refuse_changed_options(saved, arguments, folder, FREE_ON_RESUME - {"num_epochs", "max_steps"})


def _shown(options: dict[str, Any], name: str) -> str:
    return repr(options[name]) if name in options else "(not there)"


def _is_same(saved: Any, current: Any) -> bool:
    if isinstance(saved, str) and isinstance(current, str):
        return saved == current or (Path(saved).exists() and Path(saved).resolve() == Path(current).resolve())
    return saved == current


def save_recipe(folder: str | Path, arguments: Sequence[Any]) -> None:
    """Writes every effective option to `train.yaml` in `folder`, so that `--recipe` repeats the run."""
    text = yaml.safe_dump(effective_options(arguments), sort_keys=False, default_flow_style=None, width=119)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / RECIPE_FILE).write_text(text, encoding="utf-8")
