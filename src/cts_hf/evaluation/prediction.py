# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Folders of images to masks and pictures: batched, resumable, on one process or many."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.folder import IMAGE_SUFFIXES
from ..data.pictures import PictureError, find_pictures, printable, read_picture
from ..hub.output_folder import OutputFolder
from .existing_models import Segmenter, as_segmenter
from .prediction_results import OUTPUTS, Results, file_digest, read_stamp, settings_digest
from .segmentation import ForwardPass, PreparedImage, of_images, of_process, segment_batches
from .sharing import Sharing, checked_sharing, format_budget
from .visualization import default_palette, draw_sharing_grid, overlay, superpatch_sizes
from .windows import InferenceOptions, check_input_sizes, resized_images


if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")
# What one image can raise in being resized, segmented or drawn; too little memory on a device is a RuntimeError.
_OF_ONE_IMAGE = (ValueError, RuntimeError, MemoryError)


class ReadImage(NamedTuple):
    """
    An image file, ready for the model, or what is wrong with it.

    Attributes:
        name: of the file in its folder, without suffix.
        path: of the file.
        digest: of its content.
        image: PIL image in RGB, upright.
        inputs: for every scale (1, C, h, w).
        problem: why the file cannot be used; then there is neither image nor input.
    """

    name: str
    path: Path
    digest: str | None = None
    image: Image.Image | None = None
    inputs: list[Tensor] | None = None
    problem: str | None = None


@dataclass
class PredictionReport:
    """
    What a run did, in all its processes.

    Attributes:
        num_segmented: images that were segmented.
        num_done: images whose results were there already, made by the same model with the same options.
        problems: a line for every image that could not be segmented.
    """

    num_segmented: int
    num_done: int
    problems: list[str]


def find_images(folder: str | Path) -> dict[str, Path]:
    """
    The image files in a folder and the folders below it, sorted by name: the path in the folder without suffix.
    Results of predictions are none, wherever they lie.

    Raises:
        ValueError: no folder, no images, two of the same name, whose results would have one name too, or folders that
            are found twice or cannot be listed.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {printable(folder)}: give one that holds images.")
    images, problems = find_pictures(folder, IMAGE_SUFFIXES, leave_out=lambda path: read_stamp(path) is not None)
    if problems:
        raise ValueError(
            f"Every image in {printable(folder)} must be a file with a name of its own, for its results: "
            f"{'; '.join(problems)}. Rename or remove these."
        )
    if not images:
        raise ValueError(
            f"There are no images in {printable(folder)}: it must hold {', '.join(sorted(IMAGE_SUFFIXES))} files."
        )
    return images


@torch.no_grad()
def predict_files(
    model: PreTrainedModel | Segmenter,
    processor: BaseImageProcessor,
    images: dict[str, Path],
    output_dir: str | Path,
    *,
    outputs: Sequence[str] = ("masks", "overlays"),
    token_reduction: float | tuple[float, ...] | None = None,
    sharing_threshold: float | None = None,
    options: InferenceOptions | None = None,
    overwrite: bool = False,
    num_workers: int = 0,
    accelerator: "Accelerator | None" = None,
) -> PredictionReport:
    """
    Segments image files and writes `output_dir/<output>/<name>`; what is there already is not made again, unless its
    image has changed.

    A file appears under its name when it is complete, so that a run that was killed can simply be started again. An
    image that cannot be read or segmented is left out and reported.

    Args:
        model: a Segmenter, or a model that `apply_cts` has changed, in evaluation mode, on the device to use.
        processor: prepares the images.
        images: name and path of each image, as `find_images` gives them.
        output_dir: folder for the results.
        outputs: any of "masks" (PNG, the class id of each pixel at the size of the image), "overlays" (JPEG, colored
            masks over the image) and "grids" (PNG, which superpatches shared a token).
        token_reduction: fraction of the tokens to remove, or what each level removes.
        sharing_threshold: instead of it, the probability from which on superpatches share. If neither is given, the
            model's own.
        options: how images are segmented; None is each one as a whole, at the processor's size.
        overwrite: whether results of another model, budget or other options may be replaced.
        num_workers: processes that read ahead.
        accelerator: of all the processes that share the images, every one of which has to call this.

    Raises:
        ValueError: an unknown output, grids where an image is not a single input of the model, a budget or threshold
            that the model cannot have, a folder where another run is writing, or files in it that the results would
            replace: files that are no results in any case, results of other settings without `overwrite`.
        OSError: no file can be written any more, as on a full disk.
    """
    if not isinstance(images, dict):
        raise ValueError(f"`images` must be what `find_images(folder)` gives, a path for each name, got {images!r}.")
    options = options or InferenceOptions()
    _check_outputs(outputs, options)
    model = as_segmenter(model, processor, options)
    sharing = _sharing(model, token_reduction, sharing_threshold)
    check_input_sizes(options, processor, model.config.superpatch_size)
    is_main_process = accelerator is None or accelerator.is_main_process
    output_dir = Path(output_dir)

    def plan() -> tuple[str, dict[str, list[str]]]:
        precision = accelerator.mixed_precision if accelerator else "no"
        settings = settings_digest(model, processor, sharing, options, precision)
        return settings, Results(output_dir, outputs, settings).pending(images, overwrite)

    with OutputFolder(output_dir, "prediction") if is_main_process else nullcontext():
        settings, pending = _on_main_process(plan, accelerator)
        writer = _Writer(Results(output_dir, outputs, settings), pending, model)
        names = of_process(list(pending), accelerator)
        reader = DataLoader(
            _Images({name: images[name] for name in names}, processor, options),
            options.batch_size,
            collate_fn=list,
            num_workers=num_workers,
        )
        problems = []
        with accelerator.autocast() if accelerator else nullcontext():
            for batch in tqdm(reader, "predicting", disable=not is_main_process):
                problems += [read.problem for read in batch if read.problem]
                good = [read for read in batch if not read.problem]
                problems += _segment_and_write(model, good, sharing, options, writer)
        problems = sorted(gather_object(problems) if accelerator and accelerator.num_processes > 1 else problems)
    return PredictionReport(len(pending) - len(problems), len(images) - len(pending), problems)


def _sharing(
    model: Segmenter, token_reduction: float | tuple[float, ...] | None, sharing_threshold: float | None
) -> Sharing:
    """How the model shares: what is given, or else what its configuration says."""
    config, sharing = model.config, Sharing("learned", token_reduction, sharing_threshold)
    if token_reduction is None and sharing_threshold is None:
        sharing = Sharing.of_model(config)
    takes_thresholds = config.backbone_config is None
    sharing = checked_sharing(sharing, True, config.superpatch_levels, takes_thresholds)
    if sharing.strategy == "learned" and model.cts.policy is None:
        raise ValueError(
            "`token_reduction` must be 0 for a model without policy, got "
            f"{format_budget(sharing.token_reduction, sharing.sharing_threshold)}: give a model with one, or "
            "--token_reduction 0."
        )
    return sharing


def _on_main_process(function: Callable[[], Result], accelerator: "Accelerator | None") -> Result:
    """What a function gives that the main process alone runs, in all processes; they all raise what it raises."""
    if accelerator is None or accelerator.num_processes == 1:
        return function()
    outcome: list[Result | ValueError | None] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [function()]
        except ValueError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    return outcome[0]


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: dict[str, Path], processor: BaseImageProcessor, options: InferenceOptions):
        self.images, self.processor, self.options = list(images.items()), processor, options

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ReadImage:
        name, path = self.images[index]
        try:
            image = read_picture(path)
            inputs = resized_images(image, self.processor, self.options)
            return ReadImage(name, path, file_digest(path), image, inputs)
        except PictureError as error:
            return ReadImage(name, path, problem=str(error))
        except (*_OF_ONE_IMAGE, OSError) as error:
            return ReadImage(name, path, problem=_problem(path, error))


class _Writer:
    """Draws and writes the results of an image that are still to be made."""

    def __init__(self, results: Results, pending: dict[str, list[str]], model: Segmenter):
        self.results, self.pending, config = results, pending, model.config
        self.patch_size, self.superpatch_sizes = config.patch_size, superpatch_sizes(config)
        self.num_labels = config.num_labels
        self.palette = default_palette(config.num_labels)

    def write(self, read: ReadImage, segmentation: Tensor, done: ForwardPass | None) -> None:
        mask = segmentation.cpu().numpy().astype(np.uint8 if self.num_labels <= 256 else np.uint16)
        for output in self.pending[read.name]:
            if output == "masks":
                picture = Image.fromarray(mask)
            elif output == "overlays":
                # No pixel is ignored, and with many classes 255 is one of them.
                picture = overlay(read.image, mask, self.palette, ignore_index=-1)
            else:
                picture = self._draw_grid(read.image, done)
            self.results.save(picture, output, read.name, read.digest)

    def _draw_grid(self, image: Image.Image, done: ForwardPass) -> Image.Image:
        """The tokens of an image; of several windows that its image processor cut, one beside or below the other."""
        (height, width), _, boxes = done.windows
        seen = image.resize((width, height), Image.Resampling.BILINEAR)
        pictures = []
        for index, box in enumerate(boxes):
            window = seen.crop((box.left, box.top, box.right, box.bottom))
            shared = of_images(done.shared_superpatches, index)
            pictures.append(draw_sharing_grid(window, shared, self.superpatch_sizes, self.patch_size))
        return Image.fromarray(np.concatenate(pictures, axis=0 if height > width else 1))


def _segment_and_write(
    model: Segmenter,
    batch: list[ReadImage],
    sharing: Sharing,
    options: InferenceOptions,
    writer: _Writer,
) -> list[str]:
    """
    Segments images and writes their results; where that fails, each image by itself, so that one cannot take others
    with it. Returns a line for every image that fails alone.
    """
    waiting = {read.name: read for read in batch}
    failure = None
    try:
        for read, segmentation, done in _segmentations(model, batch, sharing, options):
            writer.write(read, segmentation, done)
            del waiting[read.name]
    except _OF_ONE_IMAGE as error:
        failure = error.with_traceback(None)  # which holds tensors that memory is too small for
    if failure is None:
        return []
    if len(batch) == 1:
        return [_problem(batch[0].path, failure)]
    return [line for read in waiting.values() for line in _segment_and_write(model, [read], sharing, options, writer)]


def _problem(path: Path, error: BaseException) -> str:
    return f"{printable(path)}: cannot be segmented ({next(iter(str(error).splitlines()), type(error).__name__)})"


def _segmentations(
    model: Segmenter,
    batch: list[ReadImage],
    sharing: Sharing,
    options: InferenceOptions,
) -> Iterator[tuple[ReadImage, Tensor, ForwardPass | None]]:
    """Of each image its class ids (H, W) and, where there is a single one, its forward pass."""
    images = [PreparedImage(read, read.inputs, (read.image.height, read.image.width)) for read in batch]
    for segmentation in segment_batches(model, [images], options, **sharing.budget):
        done = segmentation.passes[0] if options.is_single_pass else None
        yield segmentation.source, segmentation.class_ids, done


def _check_outputs(outputs: Sequence[str], options: InferenceOptions) -> None:
    if unknown := [output for output in outputs if output not in OUTPUTS]:
        raise ValueError(f"`outputs` must be of {', '.join(OUTPUTS)}, got {', '.join(unknown)}: choose of these.")
    if "grids" in outputs and not options.is_single_pass:
        raise ValueError(
            "`outputs` must not have grids with windows, several scales or flips, as an image would have many, got "
            f"{', '.join(outputs)}: leave grids out, or segment whole images at one scale."
        )


__all__ = ["OUTPUTS", "PredictionReport", "find_images", "predict_files"]
