# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The model to measure, and what makes label maps of its outputs."""

from pathlib import Path

import torch
from transformers import AutoImageProcessor, BaseImageProcessor

from ..evaluation.existing_models import ExistingSegmenter
from ..hub.loading import is_own_model, load_config, load_processor, load_segmenter
from ..hub.problems import first_line
from ..model.configuration_cts import CtsConfig
from ..model.image_processing_cts import CtsImageProcessor
from ..model.modeling_cts import CtsForSemanticSegmentation
from .arguments import BenchmarkArguments
from .end_to_end import EndToEnd
from .existing import EXISTING_PRESETS, build_existing
from .inputs import Model
from .presets import PRESETS


def build_model(arguments: BenchmarkArguments) -> Model:
    """The model to measure: a checkpoint, or random weights; ready for inference, batch normalizations folded."""
    torch.manual_seed(0)
    levels = tuple(arguments.superpatch_levels) or None
    if _is_existing(arguments):
        _refuse_several_levels(arguments)
        reduction = (arguments.reductions or [0.3])[0]
        model = build_existing(arguments.preset, arguments.model, reduction, not arguments.given_scores)
    elif arguments.preset is not None:
        model = CtsForSemanticSegmentation(PRESETS[arguments.preset].config(levels))
    elif has_random_weights(arguments):
        config = load_config(arguments.model)
        config.superpatch_levels = levels or config.superpatch_levels
        arguments.check_reductions(tuple(config.superpatch_levels))
        model = CtsForSemanticSegmentation(config)
    else:
        arguments.check_reductions(levels or tuple(load_config(arguments.model).superpatch_levels))
        model = load_segmenter(arguments.model, **({"superpatch_levels": levels} if levels else {}))
    if arguments.attn_implementation != "sdpa" or type(model)._supports_sdpa:  # some wrappers name none themselves
        model.set_attn_implementation(arguments.attn_implementation)
    model = model.to(arguments.device, getattr(torch, arguments.dtype)).eval()
    if arguments.given_scores and isinstance(model, CtsForSemanticSegmentation):
        model.cts.policy = None
    elif arguments.given_scores:
        model.token_sharing.policy = None
    return model


def _is_existing(arguments: BenchmarkArguments) -> bool:
    """Whether the model is one of transformers."""
    return arguments.preset in EXISTING_PRESETS or (arguments.model is not None and not is_own_model(arguments.model))


def has_random_weights(arguments: BenchmarkArguments) -> bool:
    """Whether there are no weights to load."""
    if arguments.model is None:
        return True
    # Weights of any kind: those that cannot be read must be refused, and not be replaced by random ones.
    folder = Path(arguments.model)
    return folder.is_dir() and not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())


def build_end_to_end(arguments: BenchmarkArguments, model: Model) -> EndToEnd:
    """
    The way from pictures to label maps: by the checkpoint's image processor, or by one made for random weights.

    Raises:
        FileNotFoundError: If a model with weights has no image processor.
        ValueError: If the model or its image processor makes no label maps.
    """
    is_random = has_random_weights(arguments)
    processor: BaseImageProcessor
    if isinstance(model, CtsForSemanticSegmentation):
        processor = _own_processor(model.config) if is_random else load_processor(arguments.model)
        return EndToEnd(model, processor)
    if arguments.preset is not None:
        processor = EXISTING_PRESETS[arguments.preset].build_processor()
    else:
        processor = _existing_processor(arguments.model)
    ExistingSegmenter(model, processor)  # refuses what makes no label maps
    return EndToEnd(model, processor)


def _own_processor(config: CtsConfig) -> CtsImageProcessor:
    height, width = config.image_height_and_width
    size = {"height": height, "width": width}
    return CtsImageProcessor(size=size, image_mean=config.image_mean, image_std=config.image_std)


def _existing_processor(source: str) -> BaseImageProcessor:
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} must hold the image processor of its model for `end_to_end`, got none that can be read "
            f"({first_line(error)}): save it there with its `save_pretrained`."
        ) from error


def _refuse_several_levels(arguments: BenchmarkArguments) -> None:
    if arguments.superpatch_levels not in ([], [2]) or arguments.sharing_threshold:
        raise ValueError(
            "`superpatch_levels` must be 2 and `sharing_threshold` unset for a model of transformers, whose images "
            f"all have the same number of tokens, got {arguments.superpatch_levels} and "
            f"{arguments.sharing_threshold}: leave them out."
        )
    arguments.check_reductions((2,))


__all__ = ["build_end_to_end", "build_model", "has_random_weights"]
