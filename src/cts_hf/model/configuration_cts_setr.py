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
"""The options of SETR's decoders."""

import math

from transformers import PreTrainedConfig

from .configuration_cts_checks import refuse_below_one


# Of the 24 layers of SETR's encoder, the number of those whose outputs each head sees, and its stages of upsampling.
_LAYERS = {"setr_naive": (10, 15, 20, 24), "setr_pup": (10, 15, 20, 24), "setr_mla": (6, 12, 18, 24)}
_STAGES = {"setr_naive": 1, "setr_pup": 4, "setr_mla": 1}
SETR_TYPES = tuple(_LAYERS)
# Options that only these decoders have.
SETR_OPTIONS = (
    "decoder_hidden_size",
    "decoder_layer_indices",
    "decoder_num_upsampling_layers",
    "auxiliary_num_upsampling_layers",
    "auxiliary_loss_weight",
)


def complete_setr(config: PreTrainedConfig) -> None:
    """Completes the options of a decoder of SETR in a [`CtsConfig`], and refuses those that do not fit."""
    if config.decoder_layer_indices is None:
        of_24 = _LAYERS[config.decoder_type]
        config.decoder_layer_indices = [math.ceil(number * config.num_hidden_layers / 24) - 1 for number in of_24]
    if config.decoder_num_upsampling_layers is None:
        config.decoder_num_upsampling_layers = _STAGES[config.decoder_type]
    refuse_below_one(config, "decoder_num_upsampling_layers", "auxiliary_num_upsampling_layers")
    if config.decoder_hidden_size < 2 or config.decoder_hidden_size % 2:
        raise ValueError(
            f"`decoder_hidden_size` must be an even number from 2 on, got {config.decoder_hidden_size}: leave it "
            "out for the 256 of SETR."
        )
    indices, last = list(config.decoder_layer_indices), config.num_hidden_layers - 1
    if not indices or indices != sorted(indices) or indices[0] < 0 or indices[-1] != last:
        raise ValueError(
            f"`decoder_layer_indices` must be layers from 0 on, in their order, that end with the last, {last}, "
            f"got {indices}: leave it out for those of SETR."
        )


__all__ = ["SETR_OPTIONS", "SETR_TYPES", "complete_setr"]
