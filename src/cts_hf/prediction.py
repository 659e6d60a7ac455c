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
"""Folders of images to masks and pictures: batched, resumable, on one process or many."""

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cts_hf.data.folder import IMAGE_SUFFIXES
from cts_hf.image_processing_pil_cts import CtsImageProcessingMixin
from cts_hf.inference import InferenceOptions, resized_images
from cts_hf.modeling_cts import CtsForSemanticSegmentation
from cts_hf.pictures import PictureError, find_pictures, printable, read_picture
from cts_hf.segmentation import PreparedImage, of_process, segment_batches
from cts_hf.visualization import default_palette, draw_sharing_grid, overlay


if TYPE_CHECKING:
    from accelerate import Accelerator

# Each is a folder of the output, with pictures of this type.
OUTPUTS = {"masks": ".png", "overlays": ".jpg", "grids": ".png"}


class ReadImage(NamedTuple):
    """
    An image file, ready for the model, or what is wrong with it.

    Attributes:
        name: of the file in its folder, without suffix.
        image: PIL image in RGB, upright.
        inputs: for every scale (1, C, h, w).
        problem: why the file could not be read; then there is neither image nor input.
    """

    name: str
    image: Image.Image | None = None
    inputs: list[Tensor] | None = None
    problem: str | None = None


def find_images(folder: str | Path) -> dict[str, Path]:
    """
    The image files in a folder and the folders below it, sorted by name: the path in the folder without suffix.

    Raises:
        ValueError: no folder, no images, two of the same name, whose results would have one name too, or folders that
            are found twice or cannot be listed.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {printable(folder)}: give one that holds images.")
    images, problems = find_pictures(folder, IMAGE_SUFFIXES)
    if problems:
        raise ValueError(
            f"Every image in {printable(folder)} must have a name of its own, for its results: {'; '.join(problems)}. "
            "Rename or remove these."
        )
    if not images:
        raise ValueError(
            f"There are no images in {printable(folder)}: it must hold {', '.join(sorted(IMAGE_SUFFIXES))} files."
        )
    return images


@torch.no_grad()
def predict_files(
    model: CtsForSemanticSegmentation,
    processor: CtsImageProcessingMixin,
    images: dict[str, Path],
    output_dir: str | Path,
    *,
    outputs: Sequence[str] = ("masks", "overlays"),
    token_reduction: float | None = None,
    options: InferenceOptions | None = None,
    num_workers: int = 0,
    accelerator: "Accelerator | None" = None,
) -> list[str]:
    """
    Segments image files and writes `output_dir/<output>/<name>`; what is there already is not made again.

    A file appears under its name when it is complete, so that a run that was killed can simply be started again.

    Args:
        model: in evaluation mode, on the device to use.
        processor: prepares the images.
        images: name and path of each image, as `find_images` gives them.
        output_dir: folder for the results.
        outputs: any of "masks" (PNG, the class id of each pixel at the size of the image), "overlays" (JPEG, coloured
            masks over the image) and "grids" (PNG, which superpatches shared a token).
        token_reduction: 0 to 0.75; None is `model.config.token_reduction`.
        options: how images are segmented; None is each one as a whole, at the processor's size.
        num_workers: processes that read ahead.
        accelerator: of all the processes that share the images, every one of which has to call this.

    Returns:
        a line for every file that could not be read, of all processes; the other files are done nonetheless.

    Raises:
        ValueError: an output that there is not, or grids where an image is not a single input of the model.
    """
    options = options or InferenceOptions()
    _check_outputs(outputs, options)
    # Dealt out before looking at what is done, which other processes change.
    names = of_process(list(images), accelerator)
    writer = _Writer(Path(output_dir), outputs, model.config)
    pending = {name: images[name] for name in names if not writer.is_done(name)}
    reader = DataLoader(
        _Images(pending, processor, options), options.batch_size, collate_fn=list, num_workers=num_workers
    )
    problems = []
    with accelerator.autocast() if accelerator else nullcontext():
        is_main_process = accelerator is None or accelerator.is_main_process
        for batch in tqdm(reader, "predicting", disable=not is_main_process):
            problems += [read.problem for read in batch if read.problem]
            good = [read for read in batch if not read.problem]
            for read, segmentation, shared in _segmentations(model, good, token_reduction, options):
                writer.write(read, segmentation, shared)
    return sorted(gather_object(problems) if accelerator and accelerator.num_processes > 1 else problems)


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: dict[str, Path], processor: CtsImageProcessingMixin, options: InferenceOptions):
        self.images, self.processor, self.options = list(images.items()), processor, options

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ReadImage:
        name, path = self.images[index]
        try:
            image = read_picture(path)
        except PictureError as error:
            return ReadImage(name, problem=str(error))
        return ReadImage(name, image, resized_images(image, self.processor, self.options))


class _Writer:
    """Writes the pictures of an image, each one under a temporary name first."""

    def __init__(self, folder: Path, outputs: Sequence[str], config):
        self.folder, self.outputs = folder, outputs
        self.patch_size, self.num_labels = config.patch_size, config.num_labels
        self.palette = default_palette(config.num_labels)

    def is_done(self, name: str) -> bool:
        return all(self._path(output, name).exists() for output in self.outputs)

    def write(self, read: ReadImage, segmentation: Tensor, shared_superpatches: Tensor | None) -> None:
        mask = segmentation.cpu().numpy().astype(np.uint8 if self.num_labels <= 256 else np.uint16)
        for output in self.outputs:
            if output == "masks":
                picture = Image.fromarray(mask)
            elif output == "overlays":
                # No pixel is ignored, and with many classes 255 is one of them.
                picture = overlay(read.image, mask, self.palette, ignore_index=-1)
            else:
                height, width = read.inputs[0].shape[-2:]
                seen = read.image.resize((width, height), Image.Resampling.BILINEAR)
                picture = draw_sharing_grid(seen, shared_superpatches, 2 * self.patch_size, self.patch_size)
            self._save(picture, self._path(output, read.name))

    def _path(self, output: str, name: str) -> Path:
        return self.folder / output / f"{name}{OUTPUTS[output]}"

    def _save(self, picture: Image.Image, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".unfinished_{path.name}")
        picture.save(unfinished, quality=90)
        os.replace(unfinished, path)


def _segmentations(
    model: CtsForSemanticSegmentation,
    batch: list[ReadImage],
    token_reduction: float | None,
    options: InferenceOptions,
) -> Iterator[tuple[ReadImage, Tensor, Tensor | None]]:
    """Of each image its class ids (H, W) and, where there is a single grid, its shared superpatches (Hs, Ws)."""
    images = [PreparedImage(read, read.inputs, (read.image.height, read.image.width)) for read in batch]
    for segmentation in segment_batches(model, [images], options, token_reduction=token_reduction):
        shared = segmentation.passes[0].shared_superpatches[0] if options.is_single_pass else None
        yield segmentation.source, segmentation.class_ids, shared


def _check_outputs(outputs: Sequence[str], options: InferenceOptions) -> None:
    if unknown := [output for output in outputs if output not in OUTPUTS]:
        raise ValueError(f"outputs has {', '.join(unknown)}: there are {', '.join(OUTPUTS)}.")
    if "grids" in outputs and not options.is_single_pass:
        raise ValueError(
            "outputs has grids, but with windows, several scales or flips an image has many grids: choose the others, "
            "or segment whole images at one scale."
        )


__all__ = ["OUTPUTS", "find_images", "predict_files"]
