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
"""
CTS models: a Vision Transformer whose patches share tokens (Lu et al., CVPR 2023, arXiv 2306.02095), and a decoder on
top of it.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_cts import CtsConfig
from .modeling_cts_backbone import build_backbone, encode, freeze_unused, refuse_padding
from .modeling_cts_checks import check_images, check_labels
from .modeling_cts_decoder_base import CtsDecoder, crop_map, logits_per_side, unshare_to_map
from .modeling_cts_decoders import DECODERS
from .modeling_cts_embeddings import CtsEmbeddings
from .modeling_cts_grid import PatchGrid
from .modeling_cts_layers import CtsAttention, CtsLayer, CtsZeroLinear, drop_path_schedule, padding_attention_mask
from .modeling_cts_layout import choose_layout
from .modeling_cts_outputs import CtsModelOutput, CtsSemanticSegmenterOutput, per_level
from .modeling_cts_policy import CtsPolicyModel, policy_loss
from .modeling_cts_targets import IGNORED_TARGET, pad_labels, superpatch_targets
from .modeling_cts_unsharing import CtsUnsharingResidual
from .token_sharing import TokenLayout, count_tokens, is_identity


class CtsPreTrainedModel(PreTrainedModel):
    config: CtsConfig
    base_model_prefix = "cts"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over pixels, not a sum that a trainer could rescale
    _no_split_modules = ["CtsEmbeddings", "CtsLayer", "CtsUnsharingResidual"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CtsLayer, "attentions": CtsAttention}  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CtsEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=std)
            init.trunc_normal_(module.cls_token, mean=0.0, std=std)
            if module.distillation_token is not None:
                init.trunc_normal_(module.distillation_token, mean=0.0, std=std)
        elif isinstance(module, CtsDecoder):
            module.init_own_weights(std)
        elif isinstance(module, CtsZeroLinear):
            init.zeros_(module.weight)

    def set_policy(self, policy: CtsPolicyModel) -> None:
        """
        Gives the model a policy, in place of the one it may have; its configuration follows. As ever, the policy is
        frozen if `config.policy_loss_weight` is 0 and trained otherwise.

        Args:
            policy ([`CtsPolicyModel`]): Becomes part of this model, on the device and in the dtype of its encoder.
                Convert it afterwards to run it in another dtype than the encoder. Both share one configuration.

        Raises:
            ValueError: If it is no policy, or has options that do not fit this model, which is then as before.
        """
        # By name, and converted: with remote code, the classes of a policy can be copies of those of this model.
        if getattr(getattr(policy, "config", None), "model_type", None) != "cts_policy":
            raise ValueError(f"`policy` must be a CtsPolicyModel, got {type(policy)}: load one by `from_pretrained`.")
        policy_config = self.config.sub_configs["policy_config"].from_dict(policy.config.to_dict())
        self.config.check_policy_config(policy_config)
        base = self.base_model
        # Not `self.dtype`: that of the first parameter, which may be one of the policy to replace.
        weight = next((base.embeddings if base.backbone is None else base.backbone).parameters())
        policy = policy.to(device=weight.device, dtype=weight.dtype)
        policy.config = self.config.policy_config = policy_config
        self.config.use_policy, base.policy = True, policy
        policy.requires_grad_(True).train(base.training)
        base._freeze()


class CtsModel(CtsPreTrainedModel):
    """
    A Vision Transformer encoder with content-aware token sharing.

    Args:
        config ([`CtsConfig`]): The configuration.
    """

    def __init__(self, config: CtsConfig):
        super().__init__(config)
        config.check_options()  # again: `from_pretrained` sets options behind the configuration's own check
        self.policy = CtsPolicyModel(config.policy_config) if config.use_policy else None
        self.backbone = None
        if config.backbone_config is not None:
            self.backbone = build_backbone(config)
        else:
            self.embeddings = CtsEmbeddings(config)
            self.layers = nn.ModuleList(
                CtsLayer(config, config.num_attention_heads, config.layer_norm_eps, config.hidden_dropout_prob, rate)
                for rate in drop_path_schedule(config.drop_path_rate, config.num_hidden_layers)
            )
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()
        self._freeze()

    def train(self, mode: bool = True) -> "CtsModel":
        super().train(mode)
        self._freeze()  # here too, as `from_pretrained` makes every parameter trainable before its `eval()`
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings if self.backbone is None else self.backbone.get_input_embeddings()

    def _freeze(self):
        if self.backbone is not None:
            freeze_unused(self.backbone)
        if self.config.freeze_encoder:
            for module in self.children():
                if module is not self.policy:
                    module.eval()
                    module.requires_grad_(False)
        if self.policy is not None and self.config.policy_loss_weight == 0:
            self.policy.eval()  # or its batch-norm statistics drift
            self.policy.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        superpatch_scores: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        token_reduction: float | tuple[float, ...] | torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        layer_indices: tuple[int, ...] = (),
        sharing_threshold: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CtsModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images of any size from one superpatch of the first level on; padded with zeros on the right
                and the bottom to whole superpatches of the last.
            superpatch_scores (`torch.Tensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`,
            *optional*):
                Scores that replace those of the policy, which is then not run: the higher, the sooner a superpatch is
                shared. A tuple of one tensor per level if there are several. Rows and columns are those of the padded
                images: `ceil(height / superpatch_size)` and `ceil(width / superpatch_size)` for a single level.
            token_reduction (`float`, `tuple[float, ...]` or `torch.FloatTensor`, *optional*):
                Fraction of the patch tokens to remove, from 0 (no sharing, and the policy is not run) to
                `1 - 1 / level**2` of the largest level, 0.75 for 2 x 2; a tuple of what each level removes; or either
                for each image in a tensor, `(batch_size,)` or `(batch_size, num_levels)`. By default that of the
                configuration.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
                1 at pixels of the image, 0 at padding on its right and bottom, in a batch of images of different
                sizes. Each image is encoded as it is alone.
            layer_indices (`tuple[int, ...]`, *optional*):
                Layers, counted from 0, whose outputs to return as `layer_outputs`, before the last normalization.
            sharing_threshold (`float`, *optional*):
                Instead of a budget: share where the probability of one class is at least this, the largest
                superpatches first; a score is the logarithm of its odds. By default that of the configuration, if it
                has one and `token_reduction` is not given.

        Returns:
            [`CtsModelOutput`]: The encoder's output and the layout of its tokens.

        Raises:
            ValueError: If an argument has a wrong type or shape, `token_reduction` or `sharing_threshold` is out of
                range or both are given, the scores of superpatches are NaN, `pixel_mask` is something else, or sharing
                is asked for without a policy or scores. On accelerators values are refused by assertions there, in
                compiled graphs not at all.
        """
        check_images(pixel_values, self.config.num_channels, self.config.superpatch_size)
        if self.backbone is None:
            levels = self.config.superpatch_levels
            grid = PatchGrid.of_images(pixel_values, pixel_mask, self.config.patch_size, levels)
        else:
            refuse_padding(pixel_mask)
            grid = PatchGrid.of_config(self.config, pixel_values.shape[2:])
        pixel_values = grid.blank(pixel_values)  # whatever the padding was
        sharing = (superpatch_scores, token_reduction, sharing_threshold)
        layout, policy_logits = choose_layout(pixel_values, grid, self.config, self.policy, *sharing)

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_encoder):
            if self.backbone is None:
                outputs = self._encode(pixel_values, grid, layout, layer_indices, **{**kwargs, "return_dict": True})
            else:
                outputs = encode(self.backbone, pixel_values, layout, layer_indices, **kwargs)
        return CtsModelOutput(
            **outputs,
            token_layout=layout,
            policy_logits=policy_logits,
            image_sizes=grid.image_sizes,
            num_tokens=count_tokens(layout),
        )

    @capture_outputs(tie_last_hidden_states=False)
    def _encode(
        self,
        pixel_values: torch.Tensor,
        grid: PatchGrid,
        layout: TokenLayout,
        layer_indices: tuple[int, ...],
        **kwargs: Unpack[TransformersKwargs],
    ) -> CtsModelOutput:
        hidden_states = self.embeddings(grid.pad(pixel_values), layout, grid.image_shapes())
        attention_mask = padding_attention_mask(
            self.config, hidden_states, layout.token_mask, before=self.embeddings.num_prefix_tokens
        )
        layer_outputs = {}
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
            if index in layer_indices:
                layer_outputs[index] = hidden_states
        hidden_states = self.layernorm(hidden_states.to(self.layernorm.weight.dtype))

        layer_outputs = tuple(layer_outputs[index] for index in layer_indices) or None
        return CtsModelOutput(last_hidden_state=hidden_states, layer_outputs=layer_outputs)


class CtsForSemanticSegmentation(CtsPreTrainedModel):
    """
    Semantic segmentation with content-aware token sharing: the encoder of [`CtsModel`], and the decoder that
    `config.decoder_type` names.

    Args:
        config ([`CtsConfig`]): The configuration.
    """

    def __init__(self, config: CtsConfig):
        super().__init__(config)
        if config.num_labels < 2:
            # One class wins everywhere, and the mask transformer normalizes its logits away.
            raise ValueError(f"`num_labels` must be at least 2 (background is a class too), got {config.num_labels}.")
        self.cts = CtsModel(config)
        self.decode_head = DECODERS[config.decoder_type](config)
        self.unsharing_residual = None
        if config.unsharing == "residual":
            num_channels = config.hidden_size if self.decode_head.takes_maps else config.num_labels
            self.unsharing_residual = CtsUnsharingResidual(config, num_channels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        superpatch_scores: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        token_reduction: float | tuple[float, ...] | torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        sharing_threshold: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CtsSemanticSegmenterOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images of any size from one superpatch on.
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
                Class ids in `[0, num_labels)` or `config.semantic_loss_ignore_index`, for the loss.
            superpatch_scores, token_reduction, pixel_mask, sharing_threshold:
                As in [`CtsModel.forward`].

        Returns:
            [`CtsSemanticSegmenterOutput`]: Logits, and the loss if there are `labels`.

        Raises:
            ValueError: As [`CtsModel.forward`], or if `labels` have another size or unknown ids, or the ignore
                index is a class.

        Example:

        ```python
        >>> from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        >>> processor = AutoImageProcessor.from_pretrained(folder)
        >>> model = AutoModelForSemanticSegmentation.from_pretrained(folder)
        >>> outputs = model(**processor(image, return_tensors="pt"), token_reduction=0.3)
        >>> segmentation = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0]
        ```"""
        if labels is not None:
            self._check_labels(labels, pixel_values)
        decode_head = self.decode_head
        outputs = self.cts(
            pixel_values,
            superpatch_scores,
            token_reduction,
            pixel_mask,
            sharing_threshold=sharing_threshold,
            **{**kwargs, "layer_indices": decode_head.layer_indices, "return_dict": True},
        )
        layout = outputs.token_layout
        grid = PatchGrid.of_config(self.config, pixel_values.shape[2:], outputs.image_sizes)
        hidden_states = [
            states[:, -layout.token_source.shape[1] :]
            for states in (*(outputs.layer_outputs or ()), outputs.last_hidden_state)
        ]
        with_auxiliary = labels is not None
        mask, residual = layout.token_mask, None
        if self.unsharing_residual is not None and not is_identity(layout):
            residual = self.unsharing_residual(pixel_values, hidden_states[-1], layout, grid)
        if decode_head.takes_maps:
            maps = [unshare_to_map(states, layout, grid) for states in hidden_states[:-1]]
            maps.append(unshare_to_map(hidden_states[-1], layout, grid, residual))
            hidden_states = [states.contiguous() for states in maps]
            mask = grid.mask(grid.levels[0])
        all_logits = decode_head(hidden_states, mask, with_auxiliary, **kwargs)
        if not isinstance(all_logits, list | tuple):
            raise TypeError(
                f"`{type(decode_head).__name__}.forward` must return a tuple of logits, got a {type(all_logits)}: "
                "return `(logits,)`."
            )
        if not decode_head.takes_maps:
            logits, *auxiliary = all_logits
            all_logits = [unshare_to_map(logits, layout, grid, residual)]
            all_logits += [unshare_to_map(logits, layout, grid) for logits in auxiliary]
        parts = logits_per_side(all_logits[0], grid)
        all_logits = [crop_map(logits, grid) for logits in all_logits]

        return CtsSemanticSegmenterOutput(
            loss=self._loss(all_logits, outputs.policy_logits, labels, grid) if labels is not None else None,
            logits=all_logits[0],
            policy_logits=outputs.policy_logits,
            shared_superpatches=layout.shared_superpatches,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            logits_sizes=grid.image_begun_patches(parts),
            num_tokens=outputs.num_tokens,
        )

    def _check_labels(self, labels: torch.Tensor, pixel_values: torch.Tensor) -> None:
        check_images(pixel_values, self.config.num_channels, self.config.superpatch_size)
        shape = (pixel_values.shape[0], *pixel_values.shape[-2:])
        advice = "pass label maps to the image processor as `segmentation_maps`, so that they are resized as images."
        check_labels(labels, shape, self.config.num_labels, self.config.semantic_loss_ignore_index, advice)

    def _loss(
        self,
        all_logits: Sequence[torch.Tensor],
        policy_logits: torch.Tensor | tuple[torch.Tensor, ...] | None,
        labels: torch.Tensor,
        grid: PatchGrid,
    ) -> torch.Tensor:
        ignore_index, labels = self.config.semantic_loss_ignore_index, labels.long()
        # Counted here, because the mean over no pixels is NaN: a batch without annotation has the loss 0.
        num_pixels = (labels != ignore_index).sum().clamp(min=1)

        def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
            logits = logits.float()
            return self.loss_function(logits, labels, ignore_index=ignore_index, num_items_in_batch=num_pixels)

        loss = self.decode_head.loss(all_logits, cross_entropy)
        if self.config.policy_loss_weight > 0 and policy_logits is not None:
            loss = loss + self.config.policy_loss_weight * self._policy_loss(policy_logits, labels, grid)
        return loss

    def _policy_loss(
        self, policy_logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor, grid: PatchGrid
    ) -> torch.Tensor:
        patch_size, ignore_index = self.config.patch_size, self.config.semantic_loss_ignore_index
        labels = pad_labels(grid.pad(labels, value=ignore_index), grid.levels[-1] * patch_size, ignore_index)
        # The logits of other levels are not the policy's own.
        own = [
            (logits, superpatch_targets(labels, level * patch_size, ignore_index, grid.mask(level)))
            for level, logits in zip(grid.levels, per_level(policy_logits), strict=True)
            if level in self.config.policy_config.superpatch_levels
        ]
        return policy_loss(*map(tuple, zip(*own, strict=True)), IGNORED_TARGET)


__all__ = [
    "CtsForSemanticSegmentation",
    "CtsModel",
    "CtsModelOutput",
    "CtsPreTrainedModel",
    "CtsSemanticSegmenterOutput",
]
