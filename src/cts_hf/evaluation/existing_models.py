# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Models of transformers that share tokens, as evaluation and prediction take them: with the interface that they need of
`CtsForSemanticSegmentation`, and label maps made by the model's own image processor.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
)
from transformers.utils import ModelOutput

from ..existing.apply import apply_cts, remove_cts
from ..existing.loading import load_existing
from ..existing.sharing import TokenSharing
from ..hub.loading import image_size_of, is_own_model, load_policy_folder, load_processor, load_segmenter
from ..hub.normalization import Normalization, processor_normalization
from ..hub.problems import first_line
from ..hub.sharing_folder import shares_tokens
from ..model.configuration_cts import CtsConfig
from ..model.modeling_cts import CtsForSemanticSegmentation
from ..model.modeling_cts_encoders import encoder_config, patch_height_and_width
from ..model.modeling_cts_policy import CtsPolicyModel
from .windows import Box, InferenceOptions


# What label maps are made of, by whichever model.
LOGITS = ("logits", "masks_queries_logits", "class_queries_logits")


@dataclass(frozen=True)
class ExistingConfig:
    """
    What evaluation and prediction read of a model's configuration, by the names of [`CtsConfig`].

    Args:
        upstream (`PreTrainedConfig`): The model's own configuration.
        token_sharing ([`TokenSharing`]): What it shares tokens by.
        patch_size (`int`): Side of a patch in pixels.
    """

    upstream: PreTrainedConfig
    token_sharing: TokenSharing
    patch_size: int
    superpatch_levels: tuple[int, ...] = (2,)
    sharing_threshold: None = None

    @property
    def backbone_config(self) -> PreTrainedConfig:
        """Not None, as images are not padded."""
        return self.upstream

    @property
    def superpatch_size(self) -> int:
        return 2 * self.patch_size

    @property
    def num_labels(self) -> int:
        return self.upstream.num_labels

    @property
    def id2label(self) -> dict[int, str]:
        return self.upstream.id2label

    @property
    def token_reduction(self) -> float:
        return self.token_sharing.token_reduction

    @property
    def num_channels(self) -> int:
        return self.token_sharing.num_channels

    @property
    def image_height_and_width(self) -> tuple[int, int]:
        return image_size_of(self.upstream)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.upstream.to_diff_dict()


class ExistingSegmenter(nn.Module):
    """
    A model that [`apply_cts`] has changed, with the interface of [`CtsForSemanticSegmentation`].

    Args:
        model ([`~transformers.PreTrainedModel`]): For semantic segmentation, or for universal segmentation.
        processor ([`~transformers.BaseImageProcessor`]): Its image processor, which makes its label maps.

    Raises:
        ValueError: If the model gives no label maps, if its image processor makes none of whole images, or if that
            normalizes images otherwise than the model's policy is told.
    """

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor):
        super().__init__()
        _check_model(model)
        _check_processor(processor, model.token_sharing)
        self.model, self.processor, self.training = model, processor, model.training
        patch_size, _ = patch_height_and_width(encoder_config(model))
        self.config = ExistingConfig(model.config, model.token_sharing, patch_size)

    @property
    def cts(self) -> TokenSharing:
        """Where the policy is."""
        return self.model.token_sharing

    @property
    def device(self) -> torch.device:
        return self.model.device

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of the model, and of its policy, which the model's own state dict does not hold."""
        policy = {} if self.cts.policy is None else self.cts.policy.state_dict(prefix="policy.")
        return {**self.model.state_dict(prefix="model."), **policy}

    def forward(
        self,
        pixel_values: Tensor,
        superpatch_scores: Tensor | None = None,
        token_reduction: float | None = None,
        return_dict: bool = True,
    ) -> ModelOutput:
        """The model's outputs, with `policy_logits`: None if the policy did not run."""
        policy, logits = self.cts.policy, []
        with policy.register_forward_hook(lambda *call: logits.append(call[-1].logits)) if policy else nullcontext():
            outputs = self.model(
                pixel_values.to(self.model.dtype),
                superpatch_scores=superpatch_scores,
                token_reduction=token_reduction,
                return_dict=return_dict,
            )
        outputs.policy_logits = logits[0] if logits else None
        return outputs

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        """Where the image processor cuts windows out of resized images of `size`: the whole, but for EoMT's."""
        height, width = size
        if not getattr(self.processor, "do_split_image", False):
            return [Box(0, 0, height, width)]
        unchanged = {"do_resize": False, "do_rescale": False, "do_normalize": False}
        windows = self.processor(torch.zeros(3, height, width), do_split_image=True, **unchanged)
        spans = [(int(start), int(end)) for _, start, end in windows.patch_offsets]
        if height > width:
            return [Box(start, 0, end, width) for start, end in spans]
        return [Box(0, start, height, end) for start, end in spans]

    def class_ids(self, outputs: ModelOutput, part: slice, boxes: list[Box], size: tuple[int, int]) -> Tensor:
        """
        The label map of an image, int64 of `size`.

        Args:
            outputs: of a forward pass.
            part: the windows of the image.
            boxes: their places, as `boxes` gives them.
            size: height and width in pixels.
        """
        logits = {name: outputs[name][part].float() for name in LOGITS if outputs.get(name) is not None}
        offsets = None
        if getattr(self.processor, "do_split_image", False):
            is_tall = boxes[-1].bottom > boxes[-1].right
            offsets = [(0, box.top, box.bottom) if is_tall else (0, box.left, box.right) for box in boxes]
        outputs = SimpleNamespace(**logits, patch_offsets=offsets)
        return self.processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]


Segmenter = CtsForSemanticSegmentation | ExistingSegmenter


def as_segmenter(
    model: PreTrainedModel | ExistingSegmenter, processor: BaseImageProcessor, options: InferenceOptions
) -> Segmenter:
    """
    A model that evaluation and prediction can take.

    Args:
        model: a Segmenter, which is given back, or a model that [`apply_cts`] has changed.
        processor: its image processor.
        options: how images are segmented.

    Raises:
        ValueError: a model that shares no tokens or gives no label maps, or options that it cannot have.
    """
    if not isinstance(model, ExistingSegmenter):
        if model.config.model_type == CtsConfig.model_type:
            return model
        model = ExistingSegmenter(model, processor)
    if not options.is_single_pass or options.shortest_edge is not None:
        raise ValueError(
            "`window`, `stride`, `scales`, `flip` and `shortest_edge` must be unset for a model of transformers, as "
            f"its image processor says how images are resized and cut, got {options}: leave them out, or change the "
            "`size` of the image processor."
        )
    return model


def load_any(source: str | Path, policy: str | Path | None = None) -> tuple[Segmenter, BaseImageProcessor]:
    """
    Opens a segmentation model, of this package or of transformers, and its image processor.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.
        policy (`str` or `Path`, *optional*): Folder or id of a policy, in place of the one that the model may have.

    Returns:
        the model, in evaluation mode, for evaluation and prediction, and its image processor. A model of transformers
        shares tokens as `save_cts` has recorded. A plain one shares them as [`apply_cts`] does by default if it is
        given a policy, and otherwise only where calls ask for it.

    Raises:
        FileNotFoundError, ValueError: If one of them is missing, incomplete, of another kind, or does not fit.
    """
    if is_own_model(source):
        model, processor = load_segmenter(source), load_processor(source)
        if policy is not None:
            model.set_policy(load_policy_folder(policy).eval())
        return model, processor
    model, processor = load_with_policy(source, policy)
    return ExistingSegmenter(model, processor), processor


def load_with_policy(
    source: str | Path, policy: CtsPolicyModel | str | Path | None = None, ignore: tuple[str, ...] = (), **options: Any
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    Opens a model of transformers, which shares tokens as [`load_any`] says, and its image processor.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.
        policy ([`CtsPolicyModel`], `str` or `Path`, *optional*): As for [`load_any`].
        ignore (`tuple[str, ...]`): Prefixes of weights that may be misshaped, and are then random ones.
        options: As for `from_pretrained` of the model.

    Raises:
        FileNotFoundError, ValueError: If one of them is missing, incomplete, of another kind, or does not fit.
    """
    processor = load_existing_processor(source)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    model = load_existing(source, ignore, **options)
    if not shares_tokens(model):
        budget = {} if policy is not None else {"token_reduction": 0.0}
        apply_cts(model, policy, image_mean=mean, image_std=std, **budget)
    elif policy is not None:
        token_reduction = model.token_sharing.token_reduction
        apply_cts(remove_cts(model), policy, token_reduction, image_mean=mean, image_std=std)
    return model, processor


def load_existing_processor(source: str | Path) -> BaseImageProcessor:
    """The image processor in a folder or repository of a model of transformers; `FileNotFoundError` if it has none."""
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} must hold the image processor of its model, got none that can be read ({first_line(error)}): "
            "save it there with its `save_pretrained`."
        ) from error


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(getattr(model, "token_sharing", None), TokenSharing):
        raise ValueError(
            f"`model` must be a Segmenter of this package or share tokens by `apply_cts`, got a "
            f"{type(model).__name__} that does not: call `apply_cts`, with `token_reduction=0` to evaluate it as it "
            "is."
        )
    check_makes_label_maps(type(model).__name__)


def check_makes_label_maps(kind: str) -> None:
    """Refuses the name of a class of transformers whose models are not for semantic or universal segmentation."""
    known = {
        *MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.values(),
        *MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES.values(),
    }
    if kind not in known:
        raise ValueError(
            f"`model` must be one for semantic or universal segmentation, such as BeitForSemanticSegmentation or "
            f"EomtForUniversalSegmentation, got a {kind}: give one that makes label maps."
        )


def _check_processor(processor: BaseImageProcessor, sharing: TokenSharing) -> None:
    kind = type(processor).__name__
    if not hasattr(processor, "post_process_semantic_segmentation"):
        raise ValueError(
            f"The image processor must have `post_process_semantic_segmentation`, which makes label maps, got a "
            f"{kind}: save the one that the model was trained with."
        )
    for name in ("do_center_crop", "do_pad", "pad_size"):
        if getattr(processor, name, None):
            raise ValueError(
                f"The image processor must neither crop nor pad images, as its label maps would be of what is left "
                f"and of the padding, got a {kind} with {name}={getattr(processor, name)}: unset that; EoMT's cuts "
                "images that are no squares into windows with `do_split_image=True`."
            )
    processed = processor_normalization(processor, sharing.num_channels)
    recorded = Normalization(list(sharing.image_mean), list(sharing.image_std))
    if sharing.policy is not None and processed != recorded:
        raise ValueError(
            f"The image processor must normalize as the model's policy is told, with {recorded._asdict()}, got "
            f"{processed._asdict()}: give `apply_cts` the `image_mean` and `image_std` of the image processor."
        )


__all__ = [
    "LOGITS",
    "ExistingSegmenter",
    "Segmenter",
    "as_segmenter",
    "check_makes_label_maps",
    "load_any",
    "load_existing_processor",
    "load_with_policy",
]
