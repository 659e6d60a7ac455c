# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
A segmentation model as an ONNX file, for ONNX Runtime and whatever else reads ONNX. The whole of it is exported,
policy and sharing included; image size and budget are fixed, as the number of tokens follows from them.

Needs `pip install onnx onnxscript onnxruntime`, which the extra `onnx` of this package stands for.
"""

import importlib
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from ..hub.loading import image_size_of
from ..hub.output_folder import UNFINISHED
from ..hub.sharing_folder import shares_tokens
from ..model.modeling_cts import CtsForSemanticSegmentation, CtsSemanticSegmenterOutput
from ..model.modeling_cts_outputs import per_level


OPSET_VERSION = 18


class _Exported(nn.Module):
    """The model with what an ONNX file can have: tensors in, a tuple of tensors out."""

    def __init__(self, model: PreTrainedModel, token_reduction: float | tuple[float, ...] | None):
        super().__init__()
        self.model = model
        self.token_reduction = token_reduction

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(pixel_values, token_reduction=self.token_reduction, return_dict=True)
        return outputs.logits, *per_level(outputs.shared_superpatches)


def check_exportable(kind: str) -> None:
    """
    Refuses the name of a class of models that give no logits of classes for patches.

    Raises:
        ValueError: If it is none of this package or of transformers for semantic segmentation.
    """
    if kind not in (CtsForSemanticSegmentation.__name__, *MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.values()):
        raise ValueError(
            f"`model` must be one for semantic segmentation, with logits of each class, such as "
            f"BeitForSemanticSegmentation, got a {kind}: models that predict masks of queries or depth, and encoders "
            "alone, are not exported."
        )


@torch.no_grad()
def export_onnx(
    model: PreTrainedModel,
    file: str | Path,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int | None = 1,
    token_reduction: float | tuple[float, ...] | None = None,
) -> None:
    """
    Writes a model as an ONNX file of opset 18, weights included.

    The file has the input `pixel_values`, float32 `(batch_size, num_channels, height, width)`, and the outputs
    `logits`, float32 `(batch_size, num_labels, ceil(height / patch_size), ceil(width / patch_size))`, or of the
    resolution that the model of transformers gives, and `shared_superpatches`, bool `(batch_size, superpatch_rows,
    superpatch_columns)`; of several levels one for each, `shared_superpatches_2x2` and so on.

    Args:
        model ([`CtsForSemanticSegmentation`] or [`~transformers.PreTrainedModel`]):
            A Segmenter, or a model of transformers for semantic segmentation that [`apply_cts`] has changed, in
            float32. It is exported in evaluation mode and left as it was.
        file (`str` or `Path`): The file to write, or to replace once the new one is whole; its folder is made. Of
            large models the weights are in a second file beside it, with `.data` after its name.
        image_size (`int` or pair of `int`, *optional*): Height and width in pixels; the configuration's by default.
        batch_size (`int`, *optional*, defaults to 1): Images per call; `None` lets every call have its own number.
        token_reduction (`float` or `tuple[float, ...]`, *optional*): Fraction of the patch tokens to remove, or what
            each level removes; the model's own by default.

    Raises:
        ImportError: If onnx or onnxscript is missing.
        ValueError: If the model is of another kind, does not share tokens, is not in float32 or cannot run with these
            options; or if a size is not a positive whole number.
    """
    check_exportable(type(model).__name__)
    is_own = isinstance(model, CtsForSemanticSegmentation)
    if not is_own and not shares_tokens(model):
        raise ValueError(
            f"`model` must share tokens, got a {type(model).__name__} that does not: call `apply_cts`, with "
            "`token_reduction=0` to export it as it is."
        )
    if model.dtype != torch.float32:
        raise ValueError(f"`model` must be in torch.float32, got {model.dtype}: call `model.float()`.")
    if image_size is None:
        image_size = model.config.image_height_and_width if is_own else image_size_of(model.config)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise ValueError(
            f"`image_size` must be a positive whole number or two (height, width), got {image_size}: correct it."
        )
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"`batch_size` must be at least 1, or None for any number, got {batch_size}: correct it.")
    _require("onnx")
    opset = getattr(_require("onnxscript"), f"opset{OPSET_VERSION}")

    def stable_sort(self: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # PyTorch's exporter has no stable sort. TopK is one: of equal values it takes the one with the lower index.
        dim = dim % len(self.shape)
        length = opset.Shape(self, start=dim, end=dim + 1)
        return opset.TopK(self, length, axis=dim, largest=int(descending), sorted=1)

    # An example batch of one image would make the number of images a constant.
    num_channels = model.config.num_channels if is_own else model.token_sharing.num_channels
    pixel_values = torch.zeros(batch_size or 2, num_channels, height, width, device=model.device)
    was_training = model.training
    try:
        exported = _Exported(model, token_reduction).eval()
        exported(pixel_values)  # bad options fail here, with the model's own message
        program = torch.onnx.export(
            exported,
            (pixel_values,),
            input_names=["pixel_values"],
            output_names=["logits", *_shared_names(model.config.superpatch_levels if is_own else (2,))],
            dynamic_shapes=None if batch_size else {"pixel_values": {0: torch.export.Dim("batch_size")}},
            opset_version=OPSET_VERSION,
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            dynamo=True,
            verbose=False,
        )
    finally:
        model.train(was_training)
    if batch_size is None and isinstance(program.model.graph.inputs[0].shape[0], int):
        # What PyTorch falls back to where the code of a model fixes the number.
        raise ValueError(
            f"`batch_size` must be a number for this {type(model).__name__}, whose export fixes the images of a call, "
            "got None: give the number that you need."
        )
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=file.parent) as folder:
        # Under its own name, which a file of weights beside it has too.
        program.save(str(Path(folder) / file.name))
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == file.name):
            os.replace(path, file.with_name(path.name))  # the file that refers to the others last


class OnnxSegmenter:
    """
    An exported model in ONNX Runtime. It takes `pixel_values` and gives the model's output class.

    Args:
        file (`str` or `Path`): What [`export_onnx`] wrote.
        num_threads (`int`, *optional*): Threads of one operation; as PyTorch has by default.
        providers (`tuple[str, ...]`): Execution providers of ONNX Runtime.

    Raises:
        ImportError: If onnxruntime is missing.
    """

    def __init__(
        self, file: str | Path, num_threads: int | None = None, providers: tuple[str, ...] = ("CPUExecutionProvider",)
    ):
        onnxruntime = _require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(file), options, providers=list(providers))

    def __call__(self, pixel_values: torch.Tensor) -> CtsSemanticSegmenterOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images of the size that was exported, of any floating-point type and on any device.

        Returns:
            [`CtsSemanticSegmenterOutput`]: `logits` and `shared_superpatches`, a tuple of one per level if there are
            several, as the image processor's post-processing takes them.

        Raises:
            ValueError: If the images have another shape than was exported.
        """
        expected = self.session.get_inputs()[0].shape  # a name stands for any number
        fits = [
            isinstance(side, str) or side == given for side, given in zip(expected, pixel_values.shape, strict=False)
        ]
        if len(expected) != pixel_values.ndim or not all(fits):
            raise ValueError(
                f"`pixel_values` must have the shape {tuple(expected)} that was exported, got "
                f"{tuple(pixel_values.shape)}. Use the image processor saved beside the file, or export this size."
            )
        images = pixel_values.detach().to("cpu", torch.float32).numpy()
        logits, *shared = map(torch.from_numpy, self.session.run(None, {"pixel_values": images}))
        return CtsSemanticSegmenterOutput(
            logits=logits, shared_superpatches=tuple(shared) if len(shared) > 1 else shared[0]
        )


def _shared_names(levels: tuple[int, ...]) -> list[str]:
    if len(levels) == 1:
        return ["shared_superpatches"]
    return [f"shared_superpatches_{level}x{level}" for level in levels]


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is missing: `pip install onnx onnxscript onnxruntime`.") from error


__all__ = ["OnnxSegmenter", "check_exportable", "export_onnx"]
