# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Mean intersection over union as a metric of `evaluate`, from one confusion matrix of counts.

`evaluate.load` runs a copy of this file: it imports nothing of this package, and no other class of `evaluate` by name,
as the first one that it finds here is the metric.
"""

import importlib
import inspect
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor


if TYPE_CHECKING:
    from accelerate import Accelerator


def _import_package(name: str, attribute: str) -> ModuleType:
    """
    A package of Hugging Face, also where a script of that name, such as examples/evaluate.py, hides it: the folder of
    a script comes first on the path of whatever it or its neighbors import.
    """
    path = list(sys.path)
    hiding = [f"{package}.py" for package in ("datasets", "evaluate")]
    sys.path[:] = [folder for folder in path if not any(os.path.isfile(os.path.join(folder, file)) for file in hiding)]
    try:
        module = importlib.import_module(name)
    finally:
        sys.path[:] = path
    if not hasattr(module, attribute):
        raise ImportError(
            f"`{name}` must be the package of Hugging Face, but {getattr(module, '__file__', 'another module')} was "
            "imported under its name before: give that another name."
        )
    return module


datasets = _import_package("datasets", "Features")
evaluate = _import_package("evaluate", "Metric")

_DESCRIPTION = """
The intersection over union (IoU) of a class is the number of pixels that have the class in the prediction and in the
reference, divided by the number that have it in at least one of them. Mean IoU is its mean over the classes, each IoU
being that of all maps together. The maps are counted in one confusion matrix as they are added, and not stored.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: sequence of maps of class ids, or a tensor or an array of them.
    references: the same number of maps of class ids or `ignore_index`, each of the shape of its prediction.

Returns:
    dict of fractions of 1: mean_iou, mean_accuracy, overall_accuracy, and per_category_iou and per_category_accuracy,
    lists of `num_labels`. A class without pixels in references and predictions has IoU NaN, one without pixels in the
    references has accuracy NaN; means leave NaN out.

Example:

    >>> metric = MeanIoU(num_labels=3)
    >>> metric.add_batch(predictions=[[[0, 1]], [[1, 1]]], references=[[[0, 1]], [[0, 255]]])
    >>> metric.compute()["per_category_iou"]
    [0.5, 0.5, nan]
"""

_CITATION = """\
@article{everingham2010pascal,
  title   = {The Pascal Visual Object Classes (VOC) Challenge},
  author  = {Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and Zisserman, Andrew},
  journal = {International Journal of Computer Vision},
  volume  = {88},
  year    = {2010},
}"""


class MeanIoU(evaluate.Metric):
    """
    Mean intersection over union from one confusion matrix of int64 counts, on whichever device it is kept.

    It is used as every metric of `evaluate`, and gives what `evaluate`'s own `mean_iou` gives. Two things differ: it
    must know `num_labels` when maps are added, and it writes nothing to disk.

    Args:
        num_labels: number of classes; only `compute` with all maps at once can do without it.
        ignore_index: id of the reference pixels that do not count.
        device: where the counts are kept; give the model's device, so that no map waits for a transfer.
        num_process: must be 1, see `compute`.
        options: the other ones of `evaluate.Metric`.

    Raises:
        ValueError: an option out of range or of the wrong type, an unknown option, or a device that is not available.
    """

    def __init__(
        self,
        num_labels: int | None = None,
        ignore_index: int = 255,
        device: torch.device | str = "cpu",
        num_process: int = 1,
        **options: Any,
    ):
        if num_labels is not None and (not _is_int(num_labels) or num_labels < 1):
            raise ValueError(f"`num_labels` must be a number of classes, 1 or more, got {num_labels!r}: correct it.")
        if not _is_int(ignore_index):
            raise ValueError(f"`ignore_index` must be the id of pixels to ignore, got {ignore_index!r}: correct it.")
        if num_process != 1:
            raise ValueError(
                f"`num_process` must be 1, got {num_process!r}: nothing is exchanged through files. Let every process "
                "have a metric of its own, and give `compute` the `accelerator`, which sums their counts."
            )
        allowed = inspect.signature(evaluate.Metric).parameters.keys() - {"kwargs"}
        if unknown := sorted(options.keys() - allowed):  # which `evaluate` would ignore
            raise ValueError(
                "The options must be num_labels, ignore_index, device and those of `evaluate.Metric`, got "
                f"{unknown} as well: correct or leave out these."
            )
        super().__init__(num_process=num_process, **options)
        self.num_labels, self.ignore_index, self.device = num_labels, ignore_index, _checked_device(device)
        self.reset()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
            reference_urls=["https://huggingface.co/spaces/evaluate-metric/mean_iou"],
        )

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # nothing is stored there: it is not made

    def download_and_prepare(self, download_config: Any = None, dl_manager: Any = None) -> None:
        """Does nothing, as there is nothing to download. `evaluate.load` calls it."""

    def __len__(self) -> int:
        """Number of pairs of maps that were added, in this process, since the last result."""
        return self._num_pairs

    def reset(self) -> None:
        """Forgets all counts."""
        self._num_pairs = 0
        # One place after the matrix counts ignored pixels, one impossible ids: finding them now would wait for the
        # device, so `confusion_matrix` complains about them. The last counts pairs, for all processes.
        self._counts = torch.zeros((self.num_labels or 0) ** 2 + 3, dtype=torch.int64, device=self.device)

    def add(self, *, prediction: Any = None, reference: Any = None, **inputs: Any) -> None:
        """
        Counts one pair of maps, without waiting for the device.

        Args:
            prediction: class ids (H, W), as a tensor, array, PIL image or nested list of any integer type.
            reference: class ids or the ignore index, of the same shape.
            inputs: the same two as `predictions` and `references`, as `evaluate.combine` calls them.

        Raises:
            ValueError: maps that are missing, of another type or rank, or of different shapes.
        """
        _refuse_unknown(inputs)
        prediction, reference = inputs.get("predictions", prediction), inputs.get("references", reference)
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Any = None, references: Any = None, **inputs: Any) -> None:
        """
        Counts pairs of maps, without waiting for the device. If one of them is refused, none is counted.

        Args:
            predictions: class ids: a sequence of (H, W) maps as `add` takes them, of any sizes, or all as (B, H, W).
            references: class ids or the ignore index, as many maps of the same shapes.
            inputs: nothing; other names are refused.

        Raises:
            ValueError: maps that are missing, of another type or rank, or of different numbers or shapes.
        """
        _refuse_unknown(inputs)
        if self.num_labels is None:
            raise ValueError(
                "`num_labels` must be known when maps are added, got None: give it to MeanIoU, or to `evaluate.load`, "
                "or give all maps to `compute` at once."
            )
        numbers = [
            len(maps) if hasattr(maps, "__len__") else type(maps).__name__ for maps in (predictions, references)
        ]
        if numbers[0] != numbers[1] or not isinstance(numbers[0], int):
            raise ValueError(
                f"`predictions` and `references` must be two sequences of as many maps, got {numbers[0]} and "
                f"{numbers[1]}: give one prediction for every reference."
            )
        pairs = [_checked_pair(*pair) for pair in zip(predictions, references, strict=True)]
        for prediction, reference in pairs:
            self._count(prediction, reference)

    def _count(self, prediction: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> None:
        size = self.num_labels
        prediction, reference = (
            # NumPy's conversion takes arrays of any byte order and strides, too.
            (ids if isinstance(ids, Tensor) else torch.from_numpy(ids.astype(np.int64))).to(self.device, torch.int64)
            for ids in (prediction.reshape(-1), reference.reshape(-1))
        )
        possible = (prediction >= 0) & (prediction < size) & (reference >= 0) & (reference < size)
        place = torch.where(possible, reference * size + prediction, size**2 + 1)
        place = torch.where(reference == self.ignore_index, size**2, place)
        self._counts.scatter_add_(0, place, torch.ones_like(place))
        self._counts[-1] += 1
        self._num_pairs += 1

    def confusion_matrix(self, accelerator: "Accelerator | None" = None) -> Tensor:
        """
        Counts so far, (num_labels, num_labels) int64: references in rows, predictions in columns.

        Args:
            accelerator: sums the counts of all its processes, every one of which has to call this.

        Raises:
            ValueError: no maps were added, or a pixel was outside [0, num_labels) and not ignored.
        """
        counts = self._counts.clone()
        if accelerator is not None:
            counts = accelerator.reduce(counts, reduction="sum")
        *_, impossible, num_pairs = counts[-3:].tolist()
        if not num_pairs:
            raise ValueError("There is nothing to compute, as no maps were added: call `add` or `add_batch` first.")
        if impossible:
            raise ValueError(
                f"Ids must be 0 to {self.num_labels - 1}, or {self.ignore_index} in references to be ignored, but "
                f"those of {impossible} pixels were not: check `num_labels`, `ignore_index` and the label maps."
            )
        return counts[:-3].view(self.num_labels, self.num_labels)

    def compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        num_labels: int | None = None,
        ignore_index: int | None = None,
        nan_to_num: float | None = None,
        accelerator: "Accelerator | None" = None,
        **options: Any,
    ) -> dict[str, float | list[float]]:
        """
        The metrics of everything that was added. As ever in `evaluate`, what was added is then forgotten.

        Args:
            predictions, references: more maps, as for `add_batch`.
            num_labels, ignore_index: for these maps, if they are all; by default those of the metric.
            nan_to_num: replaces NaN in the result; the means leave it out nonetheless.
            accelerator: sums the counts of all its processes, every one of which has to call this; each gets the
                result.
            options: `label_map` and `reduce_labels` of `evaluate`'s own `mean_iou`, only to change nothing.

        Raises:
            ValueError: as `add_batch` and `confusion_matrix`, or options that contradict those of the metric.
        """
        _refuse_relabelling(options)
        if nan_to_num is not None and (isinstance(nan_to_num, bool) or not isinstance(nan_to_num, int | float)):
            raise ValueError(f"`nan_to_num` must be the number to put for NaN, got {nan_to_num!r}: correct it.")
        own = (self.num_labels, self.ignore_index)
        asked = tuple(
            mine if given is None else given for mine, given in zip(own, (num_labels, ignore_index), strict=True)
        )
        if asked != own:
            if len(self):
                raise ValueError(
                    f"`num_labels` and `ignore_index` must be {own[0]} and {own[1]}, with which {len(self)} maps were "
                    f"counted, got {asked[0]} and {asked[1]}: give them to MeanIoU or to `evaluate.load`."
                )
            other = type(self)(*asked, self.device)
            return other.compute(
                predictions=predictions, references=references, nan_to_num=nan_to_num, accelerator=accelerator
            )
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        try:
            matrix = self.confusion_matrix(accelerator)
        finally:
            self.reset()  # else ids that were refused would be refused again with the next maps
        return _metrics(matrix.cpu().double(), nan_to_num)


def _metrics(matrix: Tensor, nan_to_num: float | None) -> dict[str, float | list[float]]:
    right, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = right / (labelled + predicted - right)
    accuracy = right / labelled
    values = {
        "mean_iou": iou.nanmean(),
        "mean_accuracy": accuracy.nanmean(),
        "overall_accuracy": right.sum() / labelled.sum(),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }
    if nan_to_num is not None:
        values = {name: value.nan_to_num(nan_to_num) for name, value in values.items()}
    return {name: value.tolist() for name, value in values.items()}


def _checked_pair(prediction: Any, reference: Any) -> tuple[Tensor | np.ndarray, Tensor | np.ndarray]:
    prediction, reference = _map_of_ids("predictions", prediction), _map_of_ids("references", reference)
    if prediction.shape != reference.shape:
        raise ValueError(
            f"A prediction must have the shape of its reference, {tuple(reference.shape)}, got "
            f"{tuple(prediction.shape)}: resize logits to the reference's size before taking the argmax."
        )
    return prediction, reference


def _map_of_ids(name: str, given: Any) -> Tensor | np.ndarray:
    if isinstance(given, Tensor):
        if given.layout != torch.strided or given.is_meta or given.is_quantized:
            raise ValueError(
                f"`{name}` must be maps of class ids that are stored one by one, got a tensor of {given.dtype}, "
                f"{given.layout} on {given.device}: make it a dense one, such as with `to_dense`."
            )
        ids, is_integer = given, not given.is_floating_point() and not given.is_complex()
    else:
        try:
            ids = np.asarray(given)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"`{name}` must be maps (height, width) of class ids, got one that is no array ({error}): give rows "
                "of one length."
            ) from error
        is_integer = ids.dtype.kind in "iub"
    if not is_integer or ids.ndim != 2:
        raise ValueError(
            f"`{name}` must be maps (height, width) of class ids of an integer type, got one of {ids.dtype} and shape "
            f"{tuple(ids.shape)}: take the argmax of logits, and give single maps to `add`, several to `add_batch`."
        )
    return ids


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        torch.zeros(1, device=device).item()  # which "meta" does not have
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:  # no such type, not in this build, not in this machine
        raise ValueError(
            f"`device` must be a device of this machine, got {device!r} ({error}): give another, such as 'cpu'."
        ) from error


def _refuse_relabelling(options: dict[str, Any]) -> None:
    if unknown := sorted(options.keys() - {"label_map", "reduce_labels"}):
        raise ValueError(
            "The options must be num_labels, ignore_index, nan_to_num, accelerator and those of `evaluate`'s "
            f"mean_iou, got {unknown} as well: correct or leave out these."
        )
    for name, value in options.items():
        if value:
            raise ValueError(
                f"`{name}` must be {None if name == 'label_map' else False}, got {value!r}: change the ids of the "
                "maps before they are added."
            )


def _refuse_unknown(inputs: dict[str, Any]) -> None:
    if unknown := inputs.keys() - {"predictions", "references"}:
        raise ValueError(f"The inputs must be predictions and references, got {', '.join(sorted(unknown))} as well.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["MeanIoU"]
