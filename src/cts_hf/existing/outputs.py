# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What models of transformers return when they share tokens: their own outputs, with two fields more."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


# Not `functools.cache`, which `torch.compile` looks through.
_DERIVED: dict[type[ModelOutput], type[ModelOutput]] = {}


def sharing_output(kind: type[ModelOutput]) -> type[ModelOutput]:
    """
    The class derived from an output class, with the fields

    - `shared_superpatches` (`torch.BoolTensor` of shape `(batch_size, rows // 2, columns // 2)` of patches): The
      superpatches that were one token.
    - `num_tokens` (`torch.LongTensor` of shape `(batch_size,)`): Tokens of patches and superpatches; prefix tokens and
      queries are not counted.
    """
    if kind in _DERIVED:
        return _DERIVED[kind]
    annotations = {"shared_superpatches": torch.Tensor | None, "num_tokens": torch.Tensor | None}
    members = {
        "__annotations__": annotations,
        "__doc__": f"{kind.__name__} of a model that shares tokens: with `shared_superpatches` and `num_tokens`.",
        "__module__": kind.__module__,
        "__reduce__": _reduce,
        **dict.fromkeys(annotations),
    }
    _DERIVED[kind] = dataclass(type(f"Cts{kind.__name__}", (kind,), members))
    return _DERIVED[kind]


def _reduce(output: ModelOutput) -> tuple[Callable, tuple]:
    """For copies and pickles, as classes that are made here are found nowhere by their name."""
    base = type(output).__mro__[1]
    return _rebuild, (base, {field.name: getattr(output, field.name) for field in fields(output)}, _extras(output))


def _rebuild(kind: type[ModelOutput], values: dict[str, Any], extras: dict[str, Any]) -> ModelOutput:
    output = sharing_output(kind)(**values)
    for name, value in extras.items():
        setattr(output, name, value)
    return output


def _extras(output: ModelOutput) -> dict[str, Any]:
    """Attributes that some models set on their outputs and that are no fields."""
    names = {field.name for field in fields(output)}
    return {name: value for name, value in vars(output).items() if name not in names}


def with_sharing(
    output: ModelOutput, shared_superpatches: torch.Tensor | None, num_tokens: torch.Tensor | None
) -> ModelOutput:
    """The output with two fields more."""
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    values.update(shared_superpatches=shared_superpatches, num_tokens=num_tokens)
    return _rebuild(type(output), values, _extras(output))


def prepare_output(model: PreTrainedModel) -> None:
    """
    Makes the class of a model's outputs before it is compiled, as classes cannot be made in a graph: of all outputs
    that its module knows, as not all annotations name the one that is returned.
    """
    modules = {base.__module__ for base in type(model).__mro__ if issubclass(base, PreTrainedModel)}
    for module in modules & sys.modules.keys() - {PreTrainedModel.__module__}:
        for kind in list(vars(sys.modules[module]).values()):
            if isinstance(kind, type) and issubclass(kind, ModelOutput) and kind is not ModelOutput:
                sharing_output(kind)


__all__ = ["prepare_output", "sharing_output", "with_sharing"]
