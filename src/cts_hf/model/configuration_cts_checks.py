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
"""What the configurations of CTS refuse, and the normalization that both have."""

import math
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What transformers itself passes to a config beyond the declared fields of `PreTrainedConfig`.
_FOREIGN_NAMES = {
    "_commit_hash",
    "_name_or_path",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "tie_last_hidden_states",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
}


def refuse_unknown_names(config: PreTrainedConfig, names: dict[str, Any]) -> None:
    # The configs of transformers turn any keyword into an attribute, so that a misspelt option is silently lost.
    unknown = sorted(name for name in names if name not in _FOREIGN_NAMES and not hasattr(type(config), name))
    if not unknown:
        return
    own_fields = sorted(type(config).__annotations__)
    message = (
        f"{type(config).__name__} has no option {', '.join(map(repr, unknown))}. Its own options are "
        f"{', '.join(own_fields)}, besides those of every transformers config. Correct or remove the name."
    )
    # In a file that transformers wrote, other versions of it and other tools leave names too; it has to load still.
    if config.transformers_version is None:
        raise ValueError(message)
    logger.warning(message)


def refuse_outside(config: PreTrainedConfig, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be between {low} and {high}, got {value}.")


def refuse_below_one(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(config, name)}.")


def refuse_below_zero(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None or not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be a finite number from 0 on, got {value}.")


def channel_values(name: str, value: Any, num_channels: int) -> list[float]:
    """
    A mean or standard deviation of the channels, in units of pixels that go from 0 to 1.

    Args:
        name (`str`): `"image_mean"` or `"image_std"`, for messages too.
        value (number, `list`, `tuple` or `None`): One number for all channels, or one for each; 0.5 if `None`.
        num_channels (`int`): Channels of the images.

    Returns:
        `list[float]` of length `num_channels`.

    Raises:
        ValueError: If it is something else, not finite, or a standard deviation that is not above 0.
    """
    value = 0.5 if value is None else value
    values = list(value) if isinstance(value, list | tuple) else [value] * num_channels
    are_numbers = all(isinstance(entry, float | int) and not isinstance(entry, bool) for entry in values)
    if (
        len(values) != num_channels
        or not are_numbers
        or not all(map(math.isfinite, values))
        or (name.endswith("image_std") and min(values) <= 0)
    ):
        kind = "numbers above 0" if name.endswith("image_std") else "finite numbers"
        raise ValueError(
            f"`{name}` must be {kind}, one for each of {num_channels} channels or one for all of them, got {value!r}: "
            "give those that the images of the weights were normalized with."
        )
    return [float(entry) for entry in values]


def complete_normalization(config: PreTrainedConfig) -> None:
    for name in ("image_mean", "image_std"):
        setattr(config, name, channel_values(name, getattr(config, name), config.num_channels))


class CheckedConfig:
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self.check_options()  # options can be set behind the checks, and what is saved has to load again
        return super().save_pretrained(*args, **kwargs)


__all__ = [
    "CheckedConfig",
    "channel_values",
    "complete_normalization",
    "refuse_below_one",
    "refuse_below_zero",
    "refuse_outside",
    "refuse_unknown_names",
]
