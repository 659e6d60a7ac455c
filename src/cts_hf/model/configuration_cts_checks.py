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
import numbers
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Stages of the policy's backbone, EfficientNet-Lite0, down to each stride.
NUM_STAGES_OF_STRIDE = {8: 3, 16: 5, 32: 7}
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


def refuse_unlisted(config: PreTrainedConfig, name: str, values: Sequence[str]) -> None:
    value = getattr(config, name)
    if value not in values:
        names = ", ".join(map(repr, values))
        raise ValueError(f"`{name}` must be one of {names}, got {value!r}: choose one of them.")


def refuse_indivisible(config: PreTrainedConfig, name: str) -> None:
    """Refuses a number of attention heads that does not divide the width."""
    if config.hidden_size % getattr(config, name):
        raise ValueError(
            f"`hidden_size` ({config.hidden_size}) must be a multiple of `{name}` ({getattr(config, name)})."
        )


def check_image_size(config: PreTrainedConfig) -> None:
    """Refuses an `image_size` that is not one or two multiples of the patch size."""
    sides = [config.image_size] if isinstance(config.image_size, int) else list(config.image_size)
    if len(sides) not in (1, 2) or any(side < 1 or side % config.patch_size for side in sides):
        raise ValueError(
            f"`image_size` must be one or two (height, width) multiples of `patch_size` ({config.patch_size}), got "
            f"{config.image_size}."
        )


def check_levels(levels: Sequence[int], name: str = "levels") -> tuple[int, ...]:
    """Refuses sides of superpatches that do not nest; returns them as a tuple. The name is for the message."""
    is_sequence = isinstance(levels, (tuple, list)) and len(levels) > 0
    is_whole = is_sequence and all(isinstance(level, int) and not isinstance(level, bool) for level in levels)
    if not is_whole or any(
        level <= finer or level % finer for finer, level in zip((1, *levels[:-1]), levels, strict=True)
    ):
        raise ValueError(
            f"`{name}` must be sides of superpatches in patches, from 2 on, each a multiple of the one before, got "
            f"{levels!r}: give for example (2,) or (2, 4)."
        )
    return tuple(levels)


def check_reductions(token_reduction: Any, levels: tuple[int, ...] = (2,)) -> float | tuple[float, ...]:
    """
    Refuses what is neither a number that sharing at these levels can remove, nor a tuple of one for each level that
    can be removed together; returns Python floats, whatever kind of numbers they are.
    """
    highest = 1 - 1 / levels[-1] ** 2
    is_tuple = isinstance(token_reduction, tuple)
    reductions = token_reduction if is_tuple else (token_reduction,)
    are_numbers = all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in reductions)
    if are_numbers and is_tuple:
        # A superpatch of l x l patches takes the place of l * l, and removes all but one of them.
        covered = sum(value / (1 - 1 / level**2) for value, level in zip(reductions, levels, strict=False))
        is_valid = len(reductions) == len(levels) and min(reductions) >= 0 and covered <= 1 + 1e-9
    else:
        is_valid = are_numbers and 0 <= token_reduction <= highest
    if not is_valid:
        several = f", or a tuple of one for each of the levels {levels}, which together fit into an image"
        raise ValueError(
            f"`token_reduction` must be a number between 0 (no sharing) and {highest:g} (all shared)"
            f"{several if len(levels) > 1 else ''}, got {token_reduction!r}: give one number for all images, such as "
            "0.3."
        )
    return tuple(map(float, reductions)) if is_tuple else float(token_reduction)


def check_threshold(sharing_threshold: Any) -> None:
    """Refuses what is neither a probability nor `None`."""
    is_number = isinstance(sharing_threshold, numbers.Real) and not isinstance(sharing_threshold, bool)
    if sharing_threshold is not None and not (is_number and 0 <= sharing_threshold <= 1):
        raise ValueError(
            "`sharing_threshold` must be a probability between 0 and 1, or None for a budget, got "
            f"{sharing_threshold!r}: give one number, such as 0.9."
        )


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


def check_policy_fits(config: PreTrainedConfig, policy_config: PreTrainedConfig) -> None:
    """Refuses the configuration of a policy for superpatches of another size, or for other channels."""
    for name, expected in (("superpatch_size", config.superpatch_size), ("num_channels", config.num_channels)):
        value = getattr(policy_config, name)
        if value != expected:
            raise ValueError(
                f"`policy_config.{name}` must be {expected} for a model with patch_size={config.patch_size} and "
                f"num_channels={config.num_channels}, got {value}."
            )
    levels, own_levels = policy_config.superpatch_levels, config.superpatch_levels
    if levels[0] != own_levels[0] or not set(levels) <= set(own_levels):
        raise ValueError(
            f"`policy_config.superpatch_levels` must be among those of the model, {own_levels}, with the first of "
            f"them, got {levels}: give the model these `superpatch_levels`, and `token_reduction` a tuple with 0 "
            "for levels that are not to share."
        )


def without_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Options by name without those that older versions lack, where they have their defaults."""
    defaults = {
        "superpatch_levels": (2,),
        "superpatch_embedding": "projection",
        "unsharing": "copy",
        "sharing_threshold": None,
        "backbone_config": None,
        "freeze_encoder": False,
        "num_stages": None,
    }

    def is_default(name: str, value: Any) -> bool:
        return name in defaults and (tuple(value) if isinstance(value, list) else value) == defaults[name]

    return {name: value for name, value in options.items() if not is_default(name, value)}


def check_stages(output_stride: int, num_stages: int | None) -> None:
    """Refuses a stride that no stage of the policy's backbone has, and fewer stages than it takes."""
    if output_stride not in NUM_STAGES_OF_STRIDE:
        raise ValueError(f"`output_stride` must be 8, 16 or 32, got {output_stride}.")
    fewest = NUM_STAGES_OF_STRIDE[output_stride]
    if num_stages is not None and not fewest <= num_stages <= max(NUM_STAGES_OF_STRIDE.values()):
        raise ValueError(
            f"`num_stages` must be from {fewest}, which `output_stride={output_stride}` takes, to 7, got "
            f"{num_stages}: leave it out, or choose another stride."
        )


class CheckedConfig:
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self.check_options()  # options can be set behind the checks, and what is saved has to load again
        return super().save_pretrained(*args, **kwargs)


__all__ = [
    "NUM_STAGES_OF_STRIDE",
    "CheckedConfig",
    "channel_values",
    "check_image_size",
    "check_levels",
    "check_policy_fits",
    "check_reductions",
    "check_stages",
    "check_threshold",
    "complete_normalization",
    "refuse_below_one",
    "refuse_below_zero",
    "refuse_indivisible",
    "refuse_outside",
    "refuse_unknown_names",
    "refuse_unlisted",
    "without_defaults",
]
