# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from cts_hf.model.modeling_cts_grid import PatchGrid, num_cells


@pytest.mark.parametrize("cell_size", [1, 2, 7, 16])
def test_cells_cover_a_length_and_no_more(cell_size):
    for length in range(1, 70):
        count = num_cells(length, cell_size)
        assert (count - 1) * cell_size < length <= count * cell_size
        assert num_cells(torch.tensor(length), cell_size) == count


@pytest.mark.parametrize("levels", [(2,), (2, 4), (2, 4, 8)])
@pytest.mark.parametrize("size", [(64, 64), (65, 31), (33, 129)])
def test_levels_cover_the_padded_image(levels, size):
    grid = PatchGrid(size, 4, levels)
    padded = grid.pad(torch.ones(2, 3, *size))
    for level in (1, *levels):
        rows, columns = grid.shape(level)
        assert padded.shape == (2, 3, rows * level * 4, columns * level * 4)
    assert grid.num_patches == padded[0, 0].numel() // 16
    assert max(grid.padding) < 4 * levels[-1]
    assert (padded[..., : size[0], : size[1]] == 1).all()
    assert padded.sum() == 6 * size[0] * size[1]
    assert grid.begun_patches() == tuple(num_cells(side, 4) for side in size)
    assert grid.mask() is grid.image_shapes() is grid.image_num_patches() is grid.image_begun_patches() is None


@pytest.mark.parametrize("levels", [(2,), (2, 4)])
def test_each_image_has_the_grid_that_it_has_alone(levels):
    sizes = [(64, 40), (16, 40), (33, 17)]
    grid = PatchGrid((64, 40), 4, levels, image_sizes=torch.tensor(sizes))
    for index, size in enumerate(sizes):
        alone = PatchGrid(size, 4, levels)
        assert grid.image_num_patches()[index] == alone.num_patches
        assert tuple(grid.image_begun_patches()[index].tolist()) == alone.begun_patches()
        for level in (1, *levels):
            rows, columns = alone.shape(level)
            assert grid.image_shapes(level)[index].tolist() == [rows, columns]
            mask = grid.mask(level)[index]
            assert mask.shape == grid.shape(level)
            assert mask[:rows, :columns].all()
            assert mask.sum() == rows * columns


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_a_pixel_mask_becomes_the_sizes_of_images(dtype):
    mask = torch.zeros(2, 24, 40, dtype=dtype)
    mask[0], mask[1, :17, :8] = 1, 1
    images = torch.randn(2, 3, 24, 40)
    grid = PatchGrid.of_images(images, mask, 4)
    assert grid.size == (24, 40)
    assert grid.image_sizes.tolist() == [[24, 40], [17, 8]]
    assert torch.equal(grid.blank(images), images * mask[:, None])
    grid = PatchGrid.of_images(images, None, 4)
    assert grid.image_sizes is None
    assert grid.blank(images) is images
