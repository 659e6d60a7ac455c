# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The scores that the policy of a Segmenter gives images, without running the Segmenter."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import BaseImageProcessor

from ..data.pictures import read_picture
from ..hub.loading import load_policy_folder, load_processor, read_config
from ..model.configuration_cts import CtsConfig, CtsPolicyConfig
from ..model.modeling_cts_grid import PatchGrid
from ..model.modeling_cts_layout import choose_layout
from ..model.modeling_cts_outputs import per_level
from ..model.modeling_cts_policy import CtsPolicyModel
from .evaluator import prepared_batches, window_targets
from .existing_models import load_any
from .metrics import policy_scores
from .segmentation import Windows
from .windows import Box, InferenceOptions, check_input_sizes, same_size_groups


if TYPE_CHECKING:
    from accelerate import Accelerator


class ScoredImage(NamedTuple):
    """
    What a policy says of an image.

    Attributes:
        index: of the image in its data set.
        num_patches: in its grid, padding included.
        scores: of each level (Hs, Ws) float32 or float64, by which superpatches share.
        targets: of each level (Hs, Ws) int64 of `superpatch_targets`; None without labels.
    """

    index: int
    num_patches: int
    scores: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...] | None


class ImageFiles(torch.utils.data.Dataset):
    """
    Image files as rows without labels.

    Args:
        paths: of the images.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Image.Image]:
        return {"image": read_picture(self.paths[index]), "label": None}


def load_policy_of(
    source: str | Path, policy: str | Path | None = None, superpatch_levels: Sequence[int] | None = None
) -> tuple[CtsConfig, CtsPolicyModel, BaseImageProcessor]:
    """
    Opens what decides about the tokens of a Segmenter.

    Args:
        source: folder, or id on the Hub, of a Segmenter, or of a policy that one will have.
        policy: folder or id of a policy in place of the Segmenter's.
        superpatch_levels: in place of those of the Segmenter, or of the policy.

    Returns:
        the configuration of the Segmenter, the policy and the image processor.

    Raises:
        FileNotFoundError, ValueError: one of them is missing or incomplete, they do not fit each other, or the model
            has no policy or takes no thresholds, as those of transformers.
    """
    if read_config(source).get("model_type") == CtsPolicyConfig.model_type:
        if policy is not None:
            raise ValueError(f"`with_policy` must be None where `model` is a policy, got {policy}: leave it out.")
        own, processor = load_policy_folder(source), load_processor(source)
        levels = tuple(superpatch_levels or own.config.superpatch_levels)
        patch_size = own.config.superpatch_size // own.config.superpatch_levels[0]
        config = CtsConfig(
            patch_size=patch_size,
            image_size=patch_size,
            superpatch_levels=levels,
            policy_config=own.config,
            **{name: getattr(own.config, name) for name in ("num_channels", "image_mean", "image_std")},
        )
        return config, own.eval(), processor
    model, processor = load_any(source, policy)
    config = model.config
    if config.backbone_config is not None:
        raise ValueError(
            f"`model` must have an encoder of this package, as those of transformers take budgets only, got {source}: "
            "give `token_reduction` to them."
        )
    if model.cts.policy is None:
        raise ValueError(f"`model` must have a policy, got {source} without one: give it one by --with_policy.")
    if superpatch_levels is not None:
        config.superpatch_levels, config.token_reduction = tuple(superpatch_levels), 0.0
        config.check_options()
    return config, model.cts.policy, processor


@torch.no_grad()
def score_images(
    config: CtsConfig,
    policy: CtsPolicyModel,
    dataset: Dataset | IterableDataset | ImageFiles,
    processor: BaseImageProcessor,
    *,
    options: InferenceOptions | None = None,
    num_workers: int = 0,
    accelerator: "Accelerator | None" = None,
    show_progress: bool = False,
) -> list[ScoredImage]:
    """
    Runs a policy once on each image, as a Segmenter does.

    Args:
        config: of the Segmenter.
        policy: in evaluation mode, on the device to use.
        dataset: rows with `image` and `label`, which may be None.
        processor, num_workers, accelerator, show_progress: as for `evaluate_sharings`.
        options: size and number of the images of a forward pass; whole images at one scale.

    Returns:
        the images in their order, the same in every process.

    Raises:
        ValueError: options of several windows or scales, inputs smaller than a superpatch, or no image.
    """
    options = options or InferenceOptions()
    if not options.is_single_pass:
        raise ValueError(f"`window`, `scales` and `flip` must be unset to find a threshold, got {options}: leave out.")
    check_input_sizes(options, processor, config.superpatch_size)
    images = []
    for batch in prepared_batches(
        dataset, processor, options, options.batch_size, accelerator, num_workers, show_progress
    ):
        for alike in same_size_groups(batch, [image.inputs[0] for image in batch]):
            pixel_values = torch.cat([image.inputs[0] for image in alike]).to(policy.device)
            size = tuple(pixel_values.shape[-2:])
            grid, windows = PatchGrid.of_config(config, size), Windows(size, flipped=False, boxes=[Box(0, 0, *size)])
            with nullcontext() if accelerator is None else accelerator.autocast():
                # Any threshold makes it run.
                _, logits = choose_layout(pixel_values, grid, config, policy, sharing_threshold=0.5)
            scores = per_level(policy_scores(logits))
            for index, image in enumerate(alike):
                row, targets = image.source, None
                if row.label is not None:
                    targets = per_level(window_targets(config, row.label.to(policy.device), windows))
                    targets = tuple(of_level[0].cpu().numpy() for of_level in targets)
                own = tuple(_at_least_float32(of_level[index]).cpu().numpy() for of_level in scores)
                images.append(ScoredImage(row.index, grid.num_patches, own, targets))
    if accelerator is not None and accelerator.num_processes > 1:
        images = gather_object(images)
    if not images:
        raise ValueError("There are no images: there is nothing to find a threshold on.")
    return sorted(images, key=lambda image: image.index)


def _at_least_float32(scores: torch.Tensor) -> torch.Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


__all__ = ["ImageFiles", "ScoredImage", "load_policy_of", "score_images"]
