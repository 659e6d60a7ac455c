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
Label maps of logits: exactly the argmax of bilinearly interpolated logits, without interpolating most of them.

A bilinear cell is the area between four neighbouring logits. Its pixels are weighted means of these four corners, with
weights that all classes share. So a class that another one exceeds at all four corners is nowhere the argmax inside:
most cells are left with one class and need no arithmetic, the others with a few. Rounding is taken care of by a
tolerance: classes are dropped only if they are lower by more, and pixels whose two best classes are closer are left to
`F.interpolate`, whose rounding differs between processors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .image_processing_maps_cts import upsample


# With fewer pixels per cell, or fewer scores in all, looking at the cells takes longer than interpolating everything,
# which gains from each thread, unlike the cells, whose steps are too small to be split: the limits are for one thread.
_MIN_PIXELS_PER_CELL, _MIN_SCORES = 8, 2**21
# The same if more than this share of the classes must be compared in a cell on average, as in noise. What is done for
# every map takes about as long as comparing so many classes.
_MAX_SHARE_COMPARED, _FIXED_COST = 0.7, 4.5
# If height and width of the map sum up to so much or less, PyTorch rounds a class depending on its place among the
# others. On one thread it rounds three classes in a way of their own.
_MAX_SIDES_OF_VECTORS, _MIN_CLASSES = 128, 4
# Scores that are worked on at a time, few enough for the processor's cache.
_BLOCK_NUMEL = 2**15


@torch.no_grad()
def upsampled_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """
    Class of each pixel: bilinearly upsampled logits' argmax, without ever holding the upsampled logits of all classes.

    Gives exactly the map that `F.interpolate(logits[None].contiguous(), size, mode="bilinear",
    align_corners=False)[0].argmax(0)` gives, ties and NaN included, in less time and memory.

    Args:
        logits (`torch.Tensor` of shape `(num_labels, height, width)`): scores of floating-point type.
        size (`tuple[int, int]`): height and width of the map, in pixels.

    Returns:
        `torch.LongTensor` of shape `size`, class ids in `[0, num_labels)`.
    """
    cells = _Cells.of(logits, size) if _may_prune(logits, size) else None
    return _argmax_of_all(logits, size) if cells is None else _argmax_in_cells(logits, size, cells)


def _may_prune(logits: Tensor, size: tuple[int, int]) -> bool:
    """Whether few classes per cell would give the exact map, and sooner."""
    num_labels, height, width = logits.shape
    return (
        logits.device.type == "cpu"  # elsewhere interpolation is fast, and counting candidates waits for the device
        and num_labels >= _MIN_CLASSES
        and height * width > 1  # a single logit is a vector of classes, too
        and sum(size) > _MAX_SIDES_OF_VECTORS
        and size[0] * size[1] >= _MIN_PIXELS_PER_CELL * height * width
        and size[0] * size[1] * num_labels >= _MIN_SCORES * torch.get_num_threads()
    )


def _argmax_of_all(logits: Tensor, size: tuple[int, int], pixels: Tensor | None = None) -> Tensor:
    """`upsampled_argmax` by interpolation of all classes, a few at a time; of `pixels` of the flattened map only."""
    num_labels, num_pixels = logits.shape[0], size[0] * size[1]
    # So few classes stay in the processor's cache between interpolation and maximum; small maps take more at a time.
    chunk_size = max(16, 2**20 // num_pixels // 64 * 64)
    starts = [index * chunk_size for index in range(max(num_labels // chunk_size, 1))]
    segmentation = best = None
    # PyTorch may interpolate vectors of classes, and rounds the rest, or very few classes, differently: chunks are
    # whole vectors, and what is left over goes with the last one.
    for start, end in zip(starts, [*starts[1:], num_labels], strict=True):
        scores = upsample(logits[start:end], size)
        if pixels is not None:
            scores = scores.flatten(1)[:, pixels]
        scores, classes = scores.max(dim=0)
        classes += start
        if best is None:
            segmentation, best = classes, scores
        else:
            # Strictly better, so that the first of equal classes stays, as in argmax.
            segmentation = torch.where(scores > best, classes, segmentation)
            best = torch.maximum(best, scores)
    if best.isnan().any():
        return upsample(logits, size).argmax(dim=0)  # to argmax NaN is the largest; the comparison above skips it
    return segmentation


def _argmax_in_cells(logits: Tensor, size: tuple[int, int], cells: "_Cells") -> Tensor:
    """`upsampled_argmax` by comparison of each cell's candidates."""
    segmentation = cells.any_candidate().index_select(0, cells.rows.cell).index_select(1, cells.columns.cell).flatten()
    ties = []
    for indices in cells.undecided():
        pixels, classes, gaps = cells.compare(indices)
        segmentation.scatter_(0, pixels.flatten(), classes.flatten())
        near_ties = pixels[gaps <= _take(cells.tolerance, indices)]
        if len(near_ties):
            ties.append(near_ties)
    is_tied = torch.zeros(logits.shape[0], dtype=torch.bool, device="cpu")
    tied_pixels = []
    for pixels in torch.cat(ties).split(_BLOCK_NUMEL) if ties else []:
        segmentation[pixels], is_undecided, tied_classes = cells.compare_precisely(pixels)
        is_tied[tied_classes] = True
        tied_pixels.append(pixels[is_undecided])
    if is_tied.any():
        is_tied[:_MIN_CLASSES] |= is_tied.sum() < _MIN_CLASSES
        classes, pixels = is_tied.nonzero()[:, 0], torch.cat(tied_pixels)
        segmentation[pixels] = classes[_argmax_of_all(logits[classes], size, pixels)]
    return segmentation.view(size)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """`values.flatten()[index]`; indexing would let threads wait for one another even for few elements."""
    return values.flatten().index_select(0, index.flatten()).view(index.shape)


def _rounding(dtype: torch.dtype) -> tuple[float, float]:
    """The largest difference of two scores that rounding can turn round: for logits of magnitude 1, and of 0."""
    # A weighted mean along each axis: two products and a sum, which add up to one epsilon of the largest logit. So a
    # score is off by two here, and by two and one for the product of its weights in PyTorch; two scores are compared.
    epsilon = 10 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if torch.finfo(dtype).bits < 32:
        epsilon += 4 * torch.finfo(dtype).eps  # the score is rounded again, and older versions round the weights, too
    return epsilon, torch.finfo(dtype).tiny  # below it, numbers lose digits


@dataclass
class _Axis:
    """
    The cells along one side of the logits: cell i lies between logit i - 1 and logit i. The first and the last cell
    lie on the border, and have the same logit on both sides.

    Attributes:
        cell: (pixels,) int64, the cell of each pixel.
        weights: (2, pixels), of the logits before and behind it.
        pixels: (most pixels of a cell, cells) int64, the pixels of each cell, the last one repeated.
        is_empty: (cells,) bool, whether a cell has no pixel.
    """

    cell: Tensor
    weights: Tensor
    pixels: Tensor
    is_empty: Tensor

    @classmethod
    def of(cls, num_logits: int, num_pixels: int, dtype: torch.dtype) -> "_Axis":
        # Interpolating unit vectors shows the weights as they are rounded on this machine. Each is a picture of its
        # own, of one channel, and wide enough that none is interpolated as a vector of classes.
        width = max(_MAX_SIDES_OF_VECTORS + 1 - num_pixels, 1)
        units = torch.eye(num_logits, dtype=dtype, device="cpu")[:, None, :, None].expand(-1, -1, -1, width)
        size = (num_pixels, width)
        weights = F.interpolate(units.contiguous(), size=size, mode="bilinear", align_corners=False)[:, 0, :, 0]
        before = (weights.cumsum(0) == 0).sum(0)  # the first logit that counts
        behind = (before + 1).clamp(max=num_logits - 1)
        second = weights.gather(0, behind[None])[0].masked_fill(behind == before, 0)
        weights = torch.stack([weights.gather(0, before[None])[0], second])
        cell = before + 1 - ((before == 0) & (second == 0)).long()
        count = cell.bincount(minlength=num_logits + 1)
        offsets = torch.arange(count.max(), device="cpu")[:, None].minimum(count - 1)
        pixels = (count.cumsum(0) - count + offsets).clamp(min=0)
        return cls(cell, weights, pixels, is_empty=count == 0)


@dataclass
class _Cells:
    """
    The cells of the logits of one image, and the candidates of each: the classes that can be the argmax in it.

    Attributes:
        rows, columns: the axes.
        tolerance: (cells,), the largest difference of two classes' scores that rounding can turn round.
        epsilon, smallest: the same for logits of magnitude 1, and of 0.
        classes: (candidates,) int64, sorted by cell, then by class.
        corners: (4, candidates), their logits at the corners: top left, top right, bottom left, bottom right.
        count: (cells,) int64, the candidates of each cell.
        start: (cells,) int64, the first of them.
    """

    rows: _Axis
    columns: _Axis
    tolerance: Tensor
    epsilon: float
    smallest: float
    classes: Tensor
    corners: Tensor
    count: Tensor
    start: Tensor

    @classmethod
    def of(cls, logits: Tensor, size: tuple[int, int]) -> "_Cells | None":
        """The cells of logits `(num_labels, height, width)` for a map of `size`; None if candidates are too many."""
        num_labels, height, width = logits.shape
        limit = num_labels * _MAX_SHARE_COMPARED / torch.get_num_threads() - _FIXED_COST
        epsilon, smallest = _rounding(logits.dtype)
        bands, num_compared = [], 0
        # A few rows of cells at a time, and the row of logits below them.
        for rows in torch.arange(height + 1, device="cpu").split(
            max(_BLOCK_NUMEL // (num_labels * (width + 2)) - 1, 1)
        ):
            bands.append(_Band.of(logits, rows, epsilon, smallest))
            num_compared += bands[-1].num_compared()
            if num_compared > limit * (height + 1) * (width + 1) or not bands[-1].is_finite():
                return None
        cells, classes, corners = (torch.cat(parts, dim=-1) for parts in zip(*map(_Band.prune, bands), strict=True))
        count = cells.bincount(minlength=(height + 1) * (width + 1))
        return cls(
            *(_Axis.of(*lengths, corners.dtype) for lengths in zip((height, width), size, strict=True)),
            tolerance=torch.cat([band.tolerance.flatten() for band in bands]),
            epsilon=epsilon,
            smallest=smallest,
            classes=classes,
            corners=corners,
            count=count,
            start=count.cumsum(0) - count,
        )

    def any_candidate(self) -> Tensor:
        """(rows, columns) int64, a candidate of each cell."""
        return _take(self.classes, self.start).view(len(self.rows.is_empty), len(self.columns.is_empty))

    def undecided(self) -> Iterator[Tensor]:
        """Indices of the cells that have pixels and several candidates, most candidates first, in blocks."""
        has_pixels = ~(self.rows.is_empty[:, None] | self.columns.is_empty).flatten()
        indices = ((self.count > 1) & has_pixels).nonzero()[:, 0]
        indices = _take(indices, _take(self.count, indices).argsort(descending=True))
        if len(indices):
            yield from indices.split(max(_BLOCK_NUMEL // (len(self.rows.pixels) * len(self.columns.pixels)), 1))

    def compare(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Compares the candidates of cells at all of their pixels.

        Args:
            indices: (n,) int64, from `undecided`.

        Returns:
            the pixels' places in the flattened map, int64, their best class, int64, and by how much its score exceeds
            the second best. All of them are (most rows of a cell, most columns of a cell, n).
        """
        num_columns = len(self.columns.is_empty)
        rows = self.rows.pixels.index_select(1, indices // num_columns)  # (most rows, n)
        columns = self.columns.pixels.index_select(1, indices % num_columns)  # (most columns, n)
        upper, lower = (_take(weights, rows) for weights in self.rows.weights)
        left, right = (_take(weights, columns) for weights in self.columns.weights)
        start, count = _take(self.start, indices), _take(self.count, indices)
        best = upper.new_full((len(rows), *columns.shape), -torch.inf)
        second, winner = best.clone(), torch.zeros_like(best)
        for rank in range(int(count[0])):
            n = int((count > rank).sum())
            scores = _interpolate(
                self.corners.index_select(1, start[:n] + rank)[:, None, None],
                (upper[:, None, :n], lower[:, None, :n]),
                (left[:, :n], right[:, :n]),
            )
            best_so_far, second_so_far, winner_so_far = best[..., :n], second[..., :n], winner[..., :n]
            # Numbers in place of masks, which take many times as long: the rank where it is better, else 0 or less.
            better_rank = (scores - best_so_far).sign_().mul_(rank)
            torch.maximum(winner_so_far, better_rank, out=winner_so_far)
            torch.maximum(second_so_far, torch.minimum(scores, best_so_far), out=second_so_far)
            torch.maximum(best_so_far, scores, out=best_so_far)
        pixels = rows[:, None] * len(self.columns.cell) + columns
        classes = _take(self.classes, start + winner.long())
        return pixels, classes, best - second

    def compare_precisely(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Compares the candidates of single pixels, with more digits.

        Args:
            pixels: (n,) int64, places in the flattened map.

        Returns:
            the pixels' best class, (n,) int64; whether PyTorch's rounding might prefer another one, (n,) bool; and all
            classes that it might prefer anywhere, (classes,) int64, repeated.
        """
        row, column = pixels // len(self.columns.cell), pixels % len(self.columns.cell)
        cell = self.rows.cell[row] * len(self.columns.is_empty) + self.columns.cell[column]
        count = self.count[cell]
        rank = torch.arange(int(count.max()), device="cpu")[:, None]  # (most candidates, 1)
        candidate = self.start[cell] + rank.minimum(count - 1)
        corners = self.corners[:, candidate].double()
        scores = _interpolate(corners, self.rows.weights[:, row].double(), self.columns.weights[:, column].double())
        scores.masked_fill_(rank >= count, -torch.inf)
        best, winner = scores.max(0)
        tolerance = self.epsilon * corners.abs().amax((0, 1)) + self.smallest
        is_contender = scores >= best - tolerance
        is_undecided = is_contender.sum(0) > 1
        tied_classes = self.classes[candidate[is_contender & is_undecided]]
        return self.classes[candidate.gather(0, winner[None])[0]], is_undecided, tied_classes


def _interpolate(corners: Tensor, row_weights: Sequence[Tensor], column_weights: Sequence[Tensor]) -> Tensor:
    """The weighted mean of `(4, ...)` corners as in `_Cells`, by the two weights along each axis."""
    (upper, lower), (left, right) = row_weights, column_weights
    on_left, on_right = corners[:2] * upper + corners[2:] * lower
    return (on_left * left).addcmul_(on_right, right)


@dataclass
class _Band:
    """
    Some rows of cells.

    Attributes:
        first: index of the first cell.
        values: (rows + 1, columns + 1, num_labels) floating-point, the logits at the corners of the cells.
        is_candidate: (rows, columns, num_labels) bool.
        tolerance: (rows, columns), see `_Cells`.
    """

    first: int
    values: Tensor
    is_candidate: Tensor
    tolerance: Tensor

    @classmethod
    def of(cls, logits: Tensor, rows: Tensor, epsilon: float, smallest: float) -> "_Band":
        """Rows of cells, int64, of logits `(num_labels, height, width)`, with candidates by their range in a cell."""
        _, height, width = logits.shape
        row = torch.cat([rows - 1, rows[-1:]]).clamp(0, height - 1)
        column = torch.arange(-1, width + 1, device="cpu").clamp(0, width - 1)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        values = logits.index_select(1, row).permute(1, 2, 0).to(dtype).index_select(1, column)
        highest, lowest = torch.maximum(values[:-1], values[1:]), torch.minimum(values[:-1], values[1:])
        highest = torch.maximum(highest[:, :-1], highest[:, 1:])
        lowest = torch.minimum(lowest[:, :-1], lowest[:, 1:])
        tolerance = epsilon * torch.maximum(highest.amax(2), -lowest.amin(2)) + smallest
        is_candidate = highest >= (lowest.amax(2) - tolerance)[..., None]
        return cls(int(rows[0]) * (width + 1), values, is_candidate, tolerance)

    def is_finite(self) -> bool:
        """Whether all logits are numbers, so small that no sum or difference of them overflows."""
        finfo = torch.finfo(self.tolerance.dtype)
        return bool(self.tolerance.amax() < finfo.max * finfo.eps)

    def num_compared(self) -> int:
        """How many candidates share a cell with others."""
        count = self.is_candidate.sum(2)
        return int(count.masked_fill(count == 1, 0).sum())

    def prune(self) -> tuple[Tensor, Tensor, Tensor]:
        """
        The candidates that the best class of no corner exceeds at all corners.

        Returns:
            the cell and the class of each, (n,) int64, and the logits at its corners, (4, n), as in `_Cells`.
        """
        rows, columns, num_labels = self.values.shape
        cells, classes = self.is_candidate.flatten(0, 1).nonzero().unbind(1)
        corner = torch.arange(rows * columns, device="cpu").view(rows, columns)
        corner = torch.stack([corner[:-1, :-1], corner[:-1, 1:], corner[1:, :-1], corner[1:, 1:]]).flatten(1)
        corners = _take(self.values, corner.index_select(1, cells) * num_labels + classes)
        is_exceeded = torch.zeros_like(cells, dtype=torch.bool)
        for rival in _take(self.values.argmax(2), corner):  # (cells,)
            limit = _take(self.values, corner * num_labels + rival) - self.tolerance.flatten()
            is_exceeded |= (corners < limit.index_select(1, cells)).all(0)
        kept = (~is_exceeded).nonzero()[:, 0]
        parts = (self.first + cells, classes, corners)
        return tuple(part.index_select(-1, kept) for part in parts)


__all__ = ["upsampled_argmax"]
