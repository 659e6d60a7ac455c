# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from cts_hf import superpatch_targets
from cts_hf.model.modeling_cts_targets import pad_labels


GRIDS = [(1, 1), (2, 3), (4, 4), (5, 7)]


def test_padded_targets_are_those_of_an_image_alone():
    generator = torch.Generator().manual_seed(0)
    sizes = [(5, 6), (3, 6), (4, 2), (1, 1)]
    labels = torch.full((len(sizes), 20, 24), 255)
    mask = torch.zeros(len(sizes), 5, 6, dtype=torch.bool)
    for index, (rows, columns) in enumerate(sizes):
        coarse = torch.randint(0, 3, (2 * rows, 2 * columns), generator=generator)
        coarse[coarse == 2] = 255
        labels[index, : 4 * rows, : 4 * columns] = coarse.repeat_interleave(2, 0).repeat_interleave(2, 1)
        mask[index, :rows, :columns] = True
    targets = superpatch_targets(labels, 4, superpatch_mask=mask)
    assert (targets[~mask] == 255).all()
    for index, (rows, columns) in enumerate(sizes):
        alone = superpatch_targets(labels[index : index + 1, : 4 * rows, : 4 * columns], 4)
        assert torch.equal(targets[index, :rows, :columns], alone[0])


def brute_force_target(cell, on_border, ignore_index):
    classes = set(cell.flatten().tolist())
    if classes == {ignore_index} or len(classes) == 1:
        return 1
    if ignore_index in classes and len(classes) == 2:
        return 255 if on_border else 0
    return 0


@pytest.mark.parametrize("ignore_index", [255, 0, -100])
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_superpatch_targets_by_brute_force(rows, columns, ignore_index):
    generator = torch.Generator().manual_seed(rows * columns)
    coarse = torch.randint(0, 3, (2, rows * 2, columns * 2), generator=generator)
    coarse[coarse == 2] = ignore_index
    labels = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)  # superpatches of 4 pixels, blocks of 2
    targets = superpatch_targets(labels, 4, ignore_index)
    assert targets.dtype == torch.int64
    for image in range(2):
        for row in range(rows):
            for column in range(columns):
                cell = labels[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                on_border = row in (0, rows - 1) or column in (0, columns - 1)
                assert targets[image, row, column] == brute_force_target(cell, on_border, ignore_index)


@pytest.mark.parametrize(("dtype", "ignore_index"), [(torch.uint8, 255), (torch.int8, -100), (torch.int64, -100)])
def test_labels_are_padded_with_the_ignore_index(dtype, ignore_index):
    padded = pad_labels(torch.ones(1, 3, 6, dtype=dtype), 4, ignore_index)
    assert padded.dtype == dtype
    assert padded.tolist() == [[[1] * 6 + [ignore_index] * 2] * 3 + [[ignore_index] * 8]]
    whole = torch.ones(1, 4, 8, dtype=torch.bool)
    assert torch.equal(pad_labels(whole, 4), whole)


def test_labels_that_are_no_whole_superpatches_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 10, 8\)"):
        superpatch_targets(torch.zeros(1, 10, 8, dtype=torch.int64), 4)


TENSOR_OF_INTEGERS = r"`labels` must be a torch\.Tensor of integer dtype, got "


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: superpatch_targets(torch.zeros(1, 8, 8), 4), TENSOR_OF_INTEGERS + r"torch\.float32"),
        (lambda: superpatch_targets(np.zeros((1, 8, 8), int), 4), TENSOR_OF_INTEGERS + r"<class 'numpy\.ndarray'>"),
        (lambda: superpatch_targets(torch.ones(1, 8, 8).int(), 4.0), r"`superpatch_size` .* from 1 on, got 4\.0"),
        (lambda: superpatch_targets(torch.ones(1, 8, 8).int(), 0), "`superpatch_size` .* from 1 on, got 0"),
        (
            lambda: superpatch_targets(torch.ones(1, 8, 8).int(), 4, superpatch_mask=torch.ones(1, 8, 8) > 0),
            r"`superpatch_mask` must have shape .*\(1, 2, 2\).*\(1, 8, 8\)",
        ),
        (lambda: pad_labels(np.zeros((1, 8, 8), int), 4), TENSOR_OF_INTEGERS + r"<class 'numpy\.ndarray'>"),
        (
            lambda: pad_labels(torch.ones(1, 8, 7).bool(), 4),
            r"can hold the ignore index, 255, .* got torch\.bool: conv",
        ),
        (
            lambda: pad_labels(torch.ones(1, 8, 7).byte(), 4, -100),
            r"the ignore index, -100, .* got torch\.uint8: conv",
        ),
        (
            lambda: pad_labels(torch.ones(1, 8, 7).to(torch.int8), 4),
            r"the ignore index, 255, .* got torch\.int8: conv",
        ),
        (lambda: pad_labels(torch.ones(1, 8, 8).int(), 0), "`superpatch_size` .* from 1 on, got 0"),
    ],
)
def test_wrong_types_are_refused_as_clearly_as_wrong_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
