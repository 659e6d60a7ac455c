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
from .modeling_cts_checks import check_images, check_labels
from .modeling_cts_decoder_base import CtsDecoder
from .modeling_cts_decoders import DECODERS
from .modeling_cts_embeddings import CtsEmbeddings
from .modeling_cts_grid import PatchGrid
from .modeling_cts_layers import CtsAttention, CtsLayer, drop_path_schedule, padding_attention_mask
from .modeling_cts_outputs import CtsModelOutput, CtsSemanticSegmenterOutput
from .modeling_cts_policy import CtsPolicyModel, check_policy_scores, policy_loss, renormalize
from .modeling_cts_targets import IGNORED_TARGET, pad_labels, superpatch_targets
from .token_sharing import (
    TokenLayout,
    build_layout,
    check_scores,
    num_shared_superpatches,
    unshare,
)


class CtsPreTrainedModel(PreTrainedModel):
    config: CtsConfig
    base_model_prefix = "cts"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over pixels, not a sum that a trainer could rescale
    _no_split_modules = ["CtsEmbeddings", "CtsLayer"]  # noqa: RUF012
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
        policy = policy.to(device=base.embeddings.cls_token.device, dtype=base.embeddings.cls_token.dtype)
        policy.config = self.config.policy_config = policy_config
        self.config.use_policy, base.policy = True, policy
        policy.requires_grad_(True).train(base.training)
        base._freeze_policy()


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
        self.embeddings = CtsEmbeddings(config)
        self.layers = nn.ModuleList(
            CtsLayer(config, config.num_attention_heads, config.layer_norm_eps, config.hidden_dropout_prob, rate)
            for rate in drop_path_schedule(config.drop_path_rate, config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()
        self._freeze_policy()

    def train(self, mode: bool = True) -> "CtsModel":
        super().train(mode)
        self._freeze_policy()  # here too, as `from_pretrained` makes every parameter trainable before its `eval()`
        return self

    def _freeze_policy(self):
        if self._policy_is_frozen():
            self.policy.eval()  # or its batch-norm statistics drift
            self.policy.requires_grad_(False)

    def _policy_is_frozen(self) -> bool:
        return self.policy is not None and self.config.policy_loss_weight == 0

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        superpatch_scores: torch.Tensor | None = None,
        token_reduction: float | None = None,
        pixel_mask: torch.Tensor | None = None,
        layer_indices: tuple[int, ...] = (),
        **kwargs: Unpack[TransformersKwargs],
    ) -> CtsModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images of any size from one superpatch on; padded with zeros on the right and the bottom to
                whole superpatches.
            superpatch_scores (`torch.Tensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`,
            *optional*):
                Scores that replace those of the policy, which is then not run: the higher, the sooner a superpatch is
                shared. Rows and columns are `ceil(height / superpatch_size)` and `ceil(width / superpatch_size)`.
            token_reduction (`float`, *optional*):
                Fraction of the patch tokens to remove, from 0 (no sharing, and the policy is not run) to 0.75;
                `config.token_reduction` by default.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
                1 at pixels of the image, 0 at padding on its right and bottom, in a batch of images of different
                sizes. Each image is encoded as it is alone.
            layer_indices (`tuple[int, ...]`, *optional*):
                Layers, counted from 0, whose outputs to return as `layer_outputs`, before the last normalization.

        Returns:
            [`CtsModelOutput`]: The encoder's output and the layout of its tokens.

        Raises:
            ValueError: If an argument has a wrong type or shape, `token_reduction` is outside [0, 0.75], the scores of
                superpatches are NaN, `pixel_mask` is something else, or sharing is asked for without a policy or
                scores. On accelerators values are refused by assertions there, in compiled graphs not at all.
        """
        check_images(pixel_values, self.config.num_channels, self.config.superpatch_size)
        grid = PatchGrid.of_images(pixel_values, pixel_mask, self.config.patch_size)
        pixel_values = grid.blank(pixel_values)  # whatever the padding was
        layout, policy_logits = self._build_layout(pixel_values, grid, superpatch_scores, token_reduction)

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

        return CtsModelOutput(
            last_hidden_state=hidden_states,
            token_layout=layout,
            policy_logits=policy_logits,
            image_sizes=grid.image_sizes,
            layer_outputs=tuple(layer_outputs[index] for index in layer_indices) or None,
        )

    def _build_layout(
        self,
        images: torch.Tensor,
        grid: PatchGrid,
        superpatch_scores: torch.Tensor | None,
        token_reduction: float | None,
    ) -> tuple[TokenLayout, torch.Tensor | None]:
        if token_reduction is None:
            token_reduction = self.config.token_reduction
        num_shared = num_shared_superpatches(token_reduction, grid.num_patches)
        superpatch_mask = grid.mask(2)

        shape = (images.shape[0], *grid.shape(2))
        policy_logits = None
        if superpatch_scores is not None:
            check_scores(superpatch_scores, shape)
            scores = superpatch_scores.to(images.device)
        elif num_shared == 0:
            scores = images.new_zeros(shape)
        else:
            policy_logits = self._run_policy(renormalize(images, grid, self.config), superpatch_mask)
            scores = (policy_logits[:, 1] - policy_logits[:, 0]).detach()
            check_policy_scores(scores, images, self.policy)

        if superpatch_mask is None:
            return build_layout(scores, num_shared), policy_logits
        # Budgets are rounded: a smaller image can need up to three tokens more than one that fills the grid.
        max_tokens = grid.num_patches - 3 * max(num_shared - 1, 0)
        budgets = num_shared_superpatches(token_reduction, grid.image_num_patches())
        layout = build_layout(scores, budgets, superpatch_mask=superpatch_mask, max_tokens=max_tokens)
        return layout, policy_logits

    def _run_policy(self, pixel_values: torch.Tensor, superpatch_mask: torch.Tensor | None) -> torch.Tensor:
        if self.policy is None:
            raise ValueError(
                "This model has no policy (`use_policy=False`): give `superpatch_scores`, or `token_reduction=0` to "
                "run it without sharing."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._policy_is_frozen()):
            return self.policy(pixel_values, superpatch_mask=superpatch_mask, return_dict=True).logits


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
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        superpatch_scores: torch.Tensor | None = None,
        token_reduction: float | None = None,
        pixel_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CtsSemanticSegmenterOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images of any size from one superpatch on.
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
                Class ids in `[0, num_labels)` or `config.semantic_loss_ignore_index`, for the loss.
            superpatch_scores, token_reduction, pixel_mask:
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
            **{**kwargs, "layer_indices": decode_head.layer_indices, "return_dict": True},
        )
        layout = outputs.token_layout
        grid = PatchGrid(tuple(pixel_values.shape[2:]), self.config.patch_size, image_sizes=outputs.image_sizes)
        hidden_states = [
            states[:, self.cts.embeddings.num_prefix_tokens :]
            for states in (*(outputs.layer_outputs or ()), outputs.last_hidden_state)
        ]
        with_auxiliary = labels is not None
        mask = layout.token_mask
        if decode_head.takes_maps:
            hidden_states = [_unshare_to_map(states, layout, grid).contiguous() for states in hidden_states]
            mask = grid.mask(2)
        all_logits = decode_head(hidden_states, mask, with_auxiliary, **kwargs)
        if not isinstance(all_logits, list | tuple):
            raise TypeError(
                f"`{type(decode_head).__name__}.forward` must return a tuple of logits, got a {type(all_logits)}: "
                "return `(logits,)`."
            )
        if not decode_head.takes_maps:
            all_logits = [_unshare_to_map(logits, layout, grid) for logits in all_logits]
        parts = _parts(all_logits[0], grid)
        all_logits = [_crop(logits, grid) for logits in all_logits]

        return CtsSemanticSegmenterOutput(
            loss=self._loss(all_logits, outputs.policy_logits, labels, grid) if labels is not None else None,
            logits=all_logits[0],
            policy_logits=outputs.policy_logits,
            shared_superpatches=layout.shared_superpatches,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            logits_sizes=grid.image_begun_patches(parts),
        )

    def _check_labels(self, labels: torch.Tensor, pixel_values: torch.Tensor) -> None:
        check_images(pixel_values, self.config.num_channels, self.config.superpatch_size)
        shape = (pixel_values.shape[0], *pixel_values.shape[-2:])
        advice = "pass label maps to the image processor as `segmentation_maps`, so that they are resized as images."
        check_labels(labels, shape, self.config.num_labels, self.config.semantic_loss_ignore_index, advice)

    def _loss(
        self,
        all_logits: Sequence[torch.Tensor],
        policy_logits: torch.Tensor | None,
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
            targets = self._policy_targets(labels, grid)
            loss = loss + self.config.policy_loss_weight * policy_loss(policy_logits, targets, IGNORED_TARGET)
        return loss

    def _policy_targets(self, labels: torch.Tensor, grid: PatchGrid) -> torch.Tensor:
        superpatch_size, ignore_index = self.config.superpatch_size, self.config.semantic_loss_ignore_index
        labels = pad_labels(labels, superpatch_size, ignore_index)
        return superpatch_targets(labels, superpatch_size, ignore_index, grid.mask(2))


def _unshare_to_map(values: torch.Tensor, layout: TokenLayout, grid: PatchGrid) -> torch.Tensor:
    """Values of tokens, `(batch_size, num_tokens, dim)`, to a map of patches, `(batch_size, dim, rows, columns)`."""
    return unshare(values, layout).transpose(1, 2).unflatten(2, grid.shape())


def _parts(logits: torch.Tensor, grid: PatchGrid) -> int:
    """How many logits a decoder gives for a patch, along each side."""
    return logits.shape[2] // grid.shape()[0]


def _crop(logits: torch.Tensor, grid: PatchGrid) -> torch.Tensor:
    """Cuts off the logits, of whole superpatches, that lie beyond the images."""
    rows, columns = grid.begun_patches(_parts(logits, grid))
    # Contiguous, as upsampling takes several times as long with the classes last, and rounds differently.
    return logits[:, :, :rows, :columns].contiguous()


__all__ = [
    "CtsForSemanticSegmentation",
    "CtsModel",
    "CtsModelOutput",
    "CtsPreTrainedModel",
    "CtsSemanticSegmenterOutput",
]
