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
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


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

    from_recipe = [] if recipe is None else read_recipe(recipe, dataclass_types)
    parser = HfArgumentParser(tuple(dataclass_types), description="--recipe FILE reads options from a YAML file.")
    return parser.parse_args_into_dataclasses([*from_recipe, *rest], look_for_args_file=False)


def read_recipe(path: str | Path, dataclass_types: Sequence[type]) -> list[str]:
    """The options in a YAML or JSON file as command-line arguments, so that they are checked as those are."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}. A recipe is a YAML or JSON file of options.")
    text = path.read_text(encoding="utf-8")
    options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(options, dict):
        raise ValueError(f"The recipe {path} must map options to values, it is a {type(options).__name__}.")
    names = {f.name for dataclass_type in dataclass_types for f in fields(dataclass_type)}
    if unknown := sorted(options.keys() - names):
        raise ValueError(f"The recipe {path} has unknown options {unknown}. There are {', '.join(sorted(names))}.")
    arguments = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        # Null and the empty list are what options that have them as a default are without being named.
        if values and value is not None:
            arguments += [f"--{name}", *map(str, values)]
    return arguments


def save_recipe(folder: str | Path, arguments: Sequence[Any]) -> None:
    """Writes every effective option to `train.yaml` in `folder`, so that `--recipe` repeats the run."""
    options = {name: value for group in arguments for name, value in asdict(group).items()}
    text = yaml.safe_dump(options, sort_keys=False, default_flow_style=None, width=119)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / RECIPE_FILE).write_text(text, encoding="utf-8")
