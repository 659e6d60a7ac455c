# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The folder of a model of transformers that shares tokens: transformers' own checkpoint, which loads as a plain model
where this package is missing, and a subfolder with the policy and the options of sharing.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import transformers
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from ..model.configuration_cts_checks import channel_values, check_reductions
from ..model.modeling_cts_policy import CtsPolicyModel
from .loading import (
    PROCESSOR_FILE,
    load_complete,
    load_policy_folder,
    place_options,
    read_config,
    reading,
    require_mapping,
)
from .normalization import Normalization, processor_normalization
from .problems import first_line


SHARING = "token_sharing"
OPTIONS_FILE = "options.json"
_FORMAT_VERSION = 1
# Options of `from_pretrained` that would let incomplete weights or pickles through, or give more than a model.
_REFUSED = ("ignore_mismatched_sizes", "output_loading_info", "state_dict", "use_safetensors")


@dataclass(frozen=True)
class SharingOptions:
    """
    How a model of transformers shares tokens, as its folder records it.

    Args:
        token_reduction (`float`): Fraction of the patch tokens that calls remove which say nothing else.
        image_mean (`list[float]`): Mean that the model's images are normalized with, of pixels from 0 to 1.
        image_std (`list[float]`): Standard deviation, likewise.
        has_policy (`bool`): Whether there is a policy, without which calls must give `superpatch_scores`.
    """

    token_reduction: float
    image_mean: list[float]
    image_std: list[float]
    has_policy: bool

    def __post_init__(self) -> None:
        check_reductions(self.token_reduction)
        for name in Normalization._fields:
            if not isinstance(value := getattr(self, name), list) or not value:
                raise ValueError(f"`{name}` must be a list of one number for each channel, got {value!r}")
            channel_values(name, value, len(value))
        if not isinstance(self.has_policy, bool):
            raise ValueError(f"`has_policy` must be true or false, got {self.has_policy!r}")


def shares_tokens(model: PreTrainedModel) -> bool:
    """Whether a model is one that `apply_cts` has changed."""
    return getattr(model, SHARING, None) is not None


def is_sharing_folder(folder: str | Path) -> bool:
    """Whether a folder holds a model of transformers that shares tokens."""
    return (Path(folder) / SHARING / OPTIONS_FILE).is_file()


def check_can_be_written(model: PreTrainedModel) -> None:
    """
    Refuses a model that [`write_sharing_model`] cannot write such that it loads again.

    Raises:
        ValueError: If it shares no tokens, is of a class that is not in transformers, or has adapters of PEFT.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not shares_tokens(model):
        raise ValueError(
            f"`model` must be one that `apply_cts` has changed, got a {name} that shares no tokens: save it with "
            "`save_pretrained`. Of a model that is wrapped or compiled, give what is inside."
        )
    if getattr(transformers, name, None) is not type(model):
        raise ValueError(
            f"`model` must be of a class of transformers, by whose name it is loaded again, got {type(model)}: save "
            "it with `save_pretrained` and its policy with `model.token_sharing.policy.save_pretrained`."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"`model` must hold all of its weights itself, got a {name} with adapters of PEFT, without which its "
            "checkpoint would be saved: merge them into it first."
        )


def write_sharing_model(model: PreTrainedModel, folder: str | Path) -> None:
    """
    Writes a model that shares tokens into a folder that holds no model yet.

    Args:
        model ([`PreTrainedModel`]): One that `apply_cts` has changed.
        folder (`str` or `Path`): Created if it is not there.

    Raises:
        ValueError: As [`check_can_be_written`].
    """
    check_can_be_written(model)
    sharing = model.token_sharing
    options = SharingOptions(
        token_reduction=sharing.token_reduction,
        image_mean=list(sharing.image_mean),
        image_std=list(sharing.image_std),
        has_policy=sharing.policy is not None,
    )
    model.save_pretrained(folder)
    subfolder = Path(folder) / SHARING
    subfolder.mkdir()
    if options.has_policy:
        sharing.policy.save_pretrained(subfolder)
    content = {"format_version": _FORMAT_VERSION, **asdict(options)}
    (subfolder / OPTIONS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_sharing_model(
    source: str | Path, ignore: tuple[str, ...] = (), **options: Any
) -> tuple[PreTrainedModel, CtsPolicyModel | None, SharingOptions]:
    """
    Opens what [`write_sharing_model`] wrote: the plain model and the policy, each complete and with finite weights.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.
        ignore (`tuple[str, ...]`): Prefixes of weights that may be misshaped, and are then random ones.
        options: As for `from_pretrained` of the model. The policy comes from the same revision and cache.

    Returns:
        `tuple` of the model, the policy if there is one, and [`SharingOptions`].

    Raises:
        FileNotFoundError: If there is no such folder or repository, or it lacks a configuration or weights.
        ValueError: If it was written by something else, if a file is damaged or weights are incomplete or not finite,
            or if an option would let such weights through.
    """
    if refused := [name for name in _REFUSED if name in options]:
        raise ValueError(
            f"`{refused[0]}` must be left out, got {options[refused[0]]!r}: a model that shares tokens is loaded from "
            "safetensors, complete, or not at all."
        )
    config = read_config(source, options)
    sharing, commit = _read_sharing_options(source, options)
    if commit is not None:
        options["revision"] = commit  # what is uploaded in the meantime is not mixed in
    model = load_complete(model_class(config, source), source, ignore, use_safetensors=True, **options)
    return model, _load_policy(source, options) if sharing.has_policy else None, sharing


def check_sharing_folder(folder: str | Path) -> None:
    """
    Refuses a folder of [`write_sharing_model`] whose model, policy or image processor is incomplete.

    Raises:
        FileNotFoundError: As [`load_sharing_model`].
        ValueError: Likewise, or if the image processor cannot be read or does not normalize images as the options say
            that the policy expects.
    """
    _, _, sharing = load_sharing_model(folder)
    with reading(folder, PROCESSOR_FILE):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        processed = processor_normalization(processor, len(sharing.image_mean))
    recorded = Normalization(sharing.image_mean, sharing.image_std)
    if sharing.has_policy and processed != recorded:
        raise ValueError(
            f"The image processor in {folder} must normalize as {SHARING}/{OPTIONS_FILE} says, with "
            f"{recorded._asdict()}, got {processed._asdict()}: save the one that the model was trained with, or give "
            "`image_mean` and `image_std` to `apply_cts` and save the model again."
        )


def _read_sharing_options(source: str | Path, options: dict[str, Any]) -> tuple[SharingOptions, str | None]:
    """The options of sharing, and the commit that they are from if `source` is on the Hub."""
    name = f"{SHARING}/{OPTIONS_FILE}"
    try:
        path = cached_file(source, name, **place_options(options))
    except OSError as error:
        raise ValueError(
            f"{source} must be what `save_cts` wrote, got a model without {name} ({first_line(error)}): load it with "
            "`from_pretrained`, and let it share tokens with `apply_cts`."
        ) from error
    with reading(source, name):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        require_mapping(content)
        version = content.pop("format_version", None)
        if version != _FORMAT_VERSION or isinstance(version, bool):
            raise ValueError(
                f"`format_version` must be {_FORMAT_VERSION}, got {version!r}: update this package, if it was written "
                "by a later version"
            )
        expected = {field.name for field in fields(SharingOptions)}
        if content.keys() != expected:
            raise ValueError(f"its keys must be format_version, {', '.join(sorted(expected))}, got {sorted(content)}")
        return SharingOptions(**content), extract_commit_hash(path, None)


def model_class(config: dict[str, Any], source: str | Path) -> type[PreTrainedModel]:
    """The class of transformers that a configuration names; nothing else is looked up by its name."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise ValueError(
            f"`architectures` in config.json of {source} must be one model class of transformers, got {names!r}, "
            f"which transformers {transformers.__version__} does not have: update it, or save the model again."
        )
    expected = getattr(kind.config_class, "model_type", None)
    if config.get("model_type") != expected:
        raise ValueError(
            f"`model_type` in config.json of {source} must be {expected!r}, as {name} has it, got "
            f"{config.get('model_type')!r}: save the model again."
        )
    return kind


def _load_policy(source: str | Path, options: dict[str, Any]) -> CtsPolicyModel:
    place = place_options(options)
    subfolder = PurePosixPath(place.pop("subfolder", "")) / SHARING
    if Path(source).is_dir():
        return load_policy_folder(Path(source) / subfolder)
    return load_policy_folder(source, subfolder=subfolder.as_posix(), **place)


__all__ = [
    "OPTIONS_FILE",
    "SHARING",
    "SharingOptions",
    "check_can_be_written",
    "check_sharing_folder",
    "is_sharing_folder",
    "load_sharing_model",
    "model_class",
    "shares_tokens",
    "write_sharing_model",
]
