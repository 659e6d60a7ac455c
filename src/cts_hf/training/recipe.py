# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes: files of options (YAML or JSON) that the command line overrides, and the record of what a run used."""

import json
import reprlib
import sys
from argparse import Action, ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import HfArgumentParser

from ..data.base import repeated
from .arguments import COMMAND_LINE_ONLY, FREE_ON_RESUME


RECIPE_FILE = "train.yaml"
# Values in messages, cut to a line: a recipe may hold any.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


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
        ValueError: a recipe that is no mapping, names an option twice, or has options that do not exist or that only
            the command line may give.
        SystemExit: command-line arguments that do not exist, and values of a wrong type, as argparse does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--recipe")
    # The first pass finds the recipe, whose values `--help`, which is of the second, shows.
    finder = _parser(dataclass_types, add_help=False)
    given, _ = finder.parse_known_args(argv)
    recipe, *others = given.recipe or [None]
    if others:
        finder.error(f"argument --recipe: expected one recipe, got {', '.join(given.recipe)}")
    if recipe is None and all(getattr(given, name, None) is None for name in ("dataset", "data_dir")):
        recipe = default_recipe

    parser = _parser(dataclass_types)
    if recipe is not None:
        # As defaults, never as words of the command line: a value that starts with a dash stays a value.
        parser.set_defaults(**_converted(read_recipe(recipe, dataclass_types), parser, recipe))
    *groups, _, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(groups)


def _parser(dataclass_types: Sequence[type], **options: Any) -> HfArgumentParser:
    # No abbreviations: what one means would change with every new option.
    parser = HfArgumentParser(tuple(dataclass_types), allow_abbrev=False, **options)
    parser.add_argument("--recipe", action="append", metavar="FILE", help="YAML or JSON file of options.")
    return parser


class Unquoted(NamedTuple):
    """A value of a recipe that is no string: its text, and the value that YAML or JSON reads."""

    text: str
    value: Any

    def __repr__(self) -> str:
        return self.text


class _RecipeLoader(yaml.SafeLoader):
    """
    Reads YAML without its features that silently change values. Booleans, numbers, dates and null become [`Unquoted`];
    repeated keys, anchors, aliases (which can stand for more values than fit in memory) and tags are refused.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses anchors, aliases and tags."""
        event = self.peek_event()
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors (&), aliases (*) and tags (!) are not allowed: write the value, text in quotes",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        """Leaves `<<` a key as any other: there is nothing to merge without aliases."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        """Refuses repeated keys."""
        _refuse_twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return super().construct_mapping(node, deep)

    def construct_unquoted(self, node: Any) -> Unquoted:
        """A value that is no string, with its text."""
        return Unquoted(node.value or "null", yaml.SafeLoader.yaml_constructors[node.tag](self, node))


for _kind in ("bool", "int", "float", "null", "timestamp"):
    _RecipeLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _RecipeLoader.construct_unquoted)
for _kind in ("merge", "value"):  # << and =
    _RecipeLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _RecipeLoader.construct_yaml_str)


def _refuse_twice(names: Iterable[str]) -> None:
    if twice := repeated(names):
        raise ValueError(f"each option must be given once, got {_REPR.repr(twice[0])} again: delete one")


def _json_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON as [`_RecipeLoader`] has those of YAML."""
    _refuse_twice(name for name, _ in pairs)
    return {name: _json_value(value) for name, value in pairs}


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return value if isinstance(value, str | dict) else Unquoted(json.dumps(value), value)


def read_recipe(path: str | Path, dataclass_types: Sequence[type]) -> dict[str, Any]:
    """
    The options that a YAML or JSON file names. Values are strings, [`Unquoted`], or lists or mappings of them.

    Raises:
        ValueError: no such file, a file that is no mapping or names an option twice, or options that do not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}. A recipe is a YAML or JSON file of options.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            options = json.loads(text, object_pairs_hook=_json_mapping)
        else:
            options = yaml.load(text, Loader=_RecipeLoader)
    except RecursionError as error:
        raise ValueError(f"The recipe {path} must map options to values, it is nested too deeply.") from error
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read as YAML or JSON in UTF-8: {error}") from error
    if not isinstance(options, dict):
        kind = type(options.value if isinstance(options, Unquoted) else options).__name__
        raise ValueError(f"The recipe {path} must map options to values, it is a {kind}.")
    names = {f.name for dataclass_type in dataclass_types for f in fields(dataclass_type)}
    if unknown := sorted(map(str, options.keys() - names)):
        raise ValueError(f"The recipe {path} has unknown options {unknown}. There are {', '.join(sorted(names))}.")
    return options


def _converted(options: dict[str, Any], parser: ArgumentParser, path: str | Path) -> dict[str, Any]:
    """The options of a recipe as the parser has those of the command line; wrong values end the process as there."""
    actions = {action.option_strings[0]: action for action in parser._actions}
    converted = {}
    for name, value in options.items():
        action, default = actions[f"--{name}"], parser.get_default(name)
        is_list = action.nargs == "+"
        plain = value.value if isinstance(value, Unquoted) else value
        if plain is None or plain == []:
            # The command line cannot express these, but `save_recipe` writes defaults that are empty.
            if plain != default:
                parser.error(
                    f"argument --{name}: expected a value in the recipe {path}, got {value!r}: give one, or leave the "
                    f"option out for its default, {default!r}"
                )
            continue
        if isinstance(value, list) and not is_list:
            parser.error(f"argument --{name}: expected one value in the recipe {path}, got {_REPR.repr(value)}")
        items = value if isinstance(value, list) else [value]
        values = [_converted_value(item, action, parser, path) for item in items]
        converted[name] = values if is_list else values[0]
        if name in COMMAND_LINE_ONLY and converted[name] != default:
            raise ValueError(
                f"`{name}` must be given on the command line, got {_REPR.repr(value)} in the recipe {path}: delete it "
                f"there and pass --{name} if that is what you want."
            )
    return converted


def _converted_value(item: Any, action: Action, parser: ArgumentParser, path: str | Path) -> Any:
    """One value of a recipe in the type of its option, if YAML reads it as it is written."""
    text, value = item if isinstance(item, Unquoted) else (item, item)
    if action.type is str:
        allowed, converted = "a string: write it in quotes", item if isinstance(item, str) else None
    elif isinstance(action.default, bool):
        allowed, converted = "true or false, without quotes", value if isinstance(value, bool) else None
    else:
        allowed = "a whole number, such as 8" if action.type is int else "a decimal number, such as 0.001"
        allowed = getattr(action.type, "allowed", allowed)
        try:
            converted = action.type(text)
            # 010 is 8 to YAML, 1:30 is 90.
            if isinstance(item, Unquoted) and converted != action.type(value):
                converted = None
        except (ValueError, TypeError, OverflowError):
            converted = None
    name, shown = action.option_strings[0], _REPR.repr(item)
    if converted is None:
        parser.error(f"argument {name}: invalid value: {shown} in the recipe {path}: it must be {allowed}")
    if action.choices is not None and converted not in action.choices:
        choices = ", ".join(map(str, action.choices))
        parser.error(f"argument {name}: invalid choice: {shown} in the recipe {path} (choose from {choices})")
    return converted


def effective_options(arguments: Sequence[Any]) -> dict[str, Any]:
    """All options of several dataclasses by name; budgets of several levels as a recipe has them."""
    return {
        name: ",".join(map(repr, value)) if isinstance(value, tuple) else value
        for group in arguments
        for name, value in asdict(group).items()
    }


def refuse_changed_options(saved: dict[str, Any], arguments: Sequence[Any], place: Path, free: frozenset[str]) -> None:
    """
    Refuses options that differ from those with which the run was started.

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
        if not isinstance(saved, dict):
            raise ValueError(f"it must map options to values, it is a {type(saved).__name__}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{folder / RECIPE_FILE} cannot be read ({error}): train the model in {folder} again."
        ) from error
    refuse_changed_options(saved, arguments, folder, FREE_ON_RESUME - {"num_epochs", "max_steps"})


def _shown(options: dict[str, Any], name: str) -> str:
    return repr(options[name]) if name in options else "(not there)"


def _is_same(saved: Any, current: Any) -> bool:
    if isinstance(saved, str) and isinstance(current, str):
        return saved == current or (Path(saved).exists() and Path(saved).resolve() == Path(current).resolve())
    return saved == current


def save_recipe(folder: str | Path, arguments: Sequence[Any]) -> None:
    """
    Writes the effective options to `train.yaml` in `folder`, so that `--recipe` repeats the run. Those that only the
    command line may give are left out, so that repeating a run neither replaces nor uploads anything.
    """
    options = {name: value for name, value in effective_options(arguments).items() if name not in COMMAND_LINE_ONLY}
    text = yaml.safe_dump(options, sort_keys=False, default_flow_style=None, width=119)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / RECIPE_FILE).write_text(text, encoding="utf-8")
