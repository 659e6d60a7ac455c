# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from cts_hf import num_shared_superpatches


LEVELS = [(2, 4), (2, 4, 8), (2, 6), (3, 6), (4,)]
STEPS = 96


def sizes(levels):
    """Numbers of patches of images of whole superpatches."""
    return [count * levels[-1] ** 2 for count in (1, 2, 3, 7, 12, 35, 64)]


def reductions(levels):
    highest = 1 - 1 / levels[-1] ** 2
    return [highest * step / STEPS for step in range(STEPS + 1)]


def as_tuple(budgets):
    return budgets if isinstance(budgets, tuple) else (budgets,)


@pytest.mark.parametrize("levels", LEVELS)
def test_a_split_budget_fits_and_removes_what_is_asked_for(levels):
    for num_patches in sizes(levels):
        for token_reduction in reductions(levels):
            budgets = as_tuple(num_shared_superpatches(token_reduction, num_patches, levels))
            available, removed = num_patches, 0
            for level, budget in reversed(list(zip(levels, budgets, strict=True))):
                assert 0 <= budget <= available // level**2
                available -= level**2 * budget
                removed += (level**2 - 1) * budget
            # The first level makes up for what larger ones are rounded down by, unless there is no space for it.
            half = (levels[0] ** 2 - 1) / 2
            missing = token_reduction * num_patches - removed
            assert -half - 1e-4 <= missing <= half + sum(level**2 - 1 for level in levels[1:]) + 1e-4
            if token_reduction < 0.6 and num_patches > 6 * levels[-1] ** 2:
                assert missing <= half + 1e-4
        everything = as_tuple(num_shared_superpatches(1 - 1 / levels[-1] ** 2, num_patches, levels))
        assert everything == (*[0] * (len(levels) - 1), num_patches // levels[-1] ** 2)
        assert as_tuple(num_shared_superpatches(0, num_patches, levels)) == (0,) * len(levels)


def test_the_largest_level_removes_two_thirds_where_the_rest_fits():
    assert num_shared_superpatches(0.45, 1600, (2, 4)) == (80, 32)  # 720 tokens: 240 / 3 and 480 / 15
    # Of 1600 patches 4 x 4 leave 16 (100 - S), of which 2 x 2 can remove 12 (100 - S): 15 S + 12 (100 - S) = 1440.
    assert num_shared_superpatches(0.9, 1600, (2, 4)) == (80, 80)


def test_a_tuple_is_what_each_level_removes():
    assert num_shared_superpatches((0.15, 0.3), 1600, (2, 4)) == (80, 32)
    assert num_shared_superpatches((0.3, 0), 1600, (2, 4)) == (num_shared_superpatches(0.3, 1600), 0)
    assert num_shared_superpatches((0.3,), 1600) == num_shared_superpatches(0.3, 1600)
    assert num_shared_superpatches((0, 15 / 16), 1600, (2, 4)) == (0, 100)
    for num_patches in sizes((2, 4)):  # together they cover the image, however their parts are rounded
        for step in range(STEPS + 1):
            covered = step / STEPS
            finer, coarser = num_shared_superpatches((0.75 * (1 - covered), 15 / 16 * covered), num_patches, (2, 4))
            assert 4 * finer + 16 * coarser <= num_patches


@pytest.mark.parametrize("levels", [(2,), *LEVELS])
def test_smaller_images_need_few_more_tokens_than_the_largest(levels):
    """No more than the savings of one superpatch of each level: the rows of a batch are that long."""
    counts = torch.arange(1, 41) * levels[-1] ** 2

    def tokens(budgets):
        return counts - sum((level**2 - 1) * of for level, of in zip(levels, as_tuple(budgets), strict=True))

    given = reductions(levels)
    given += [tuple((1 - 1 / level**2) * one / len(levels) for level in levels) for one in given]
    for token_reduction in given:
        longest = tokens(num_shared_superpatches(token_reduction, counts, levels))
        assert (longest.cummax(0).values - longest).max() <= sum(level**2 - 1 for level in levels)


@pytest.mark.parametrize("levels", [(2,), *LEVELS])
def test_tensors_are_split_as_numbers(levels):
    """The budgets of each image are those that it has alone, whatever it is that differs."""
    counts = torch.tensor(sizes(levels))
    for token_reduction in reductions(levels):
        expected = [as_tuple(num_shared_superpatches(token_reduction, int(count), levels)) for count in counts]
        per_image = torch.full((len(counts),), token_reduction, dtype=torch.float64)
        for given in (token_reduction, per_image):
            budgets = as_tuple(num_shared_superpatches(given, counts, levels))
            assert all(of_level.dtype == torch.int64 for of_level in budgets)
            assert torch.stack(budgets, dim=1).tolist() == [list(of_image) for of_image in expected]
    each = torch.tensor(reductions(levels), dtype=torch.float64)
    budgets = as_tuple(num_shared_superpatches(each, int(counts[-1]), levels))
    expected = [as_tuple(num_shared_superpatches(one, int(counts[-1]), levels)) for one in reductions(levels)]
    assert torch.stack(budgets, dim=1).tolist() == [list(of_image) for of_image in expected]


def test_a_tensor_has_what_each_level_removes_from_each_image():
    rows = [(0.15, 0.3), (0.75, 0.0), (0.0, 0.9375), (0.0, 0.0)]
    given = torch.tensor(rows, dtype=torch.float64)
    finer, coarser = num_shared_superpatches(given, 1600, (2, 4))
    assert list(zip(finer.tolist(), coarser.tolist(), strict=True)) == [
        num_shared_superpatches(row, 1600, (2, 4)) for row in rows
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_can_be_removed_in_any_dtype(dtype):
    assert num_shared_superpatches(torch.tensor([0.75], dtype=dtype), 64).tolist() == [16]
    given = torch.tensor([[0.0, 0.9375], [0.375, 0.46875]], dtype=dtype)
    budgets = num_shared_superpatches(given, 64, (2, 4))
    assert [of_level.tolist() for of_level in budgets] == [[0, 8], [4, 2]]


NO_NUMBER = r"`token_reduction` must be a number between 0 .* and 0\.9375 .* each of the levels \(2, 4\), .* got "


@pytest.mark.parametrize(
    ("token_reduction", "message"),
    [
        (0.95, NO_NUMBER + r"0\.95"),
        ([0.3, 0.3], NO_NUMBER + r"\[0\.3, 0\.3\]"),
        ((0.3,), NO_NUMBER + r"\(0\.3,\)"),
        ((), NO_NUMBER + r"\(\)"),
        ((0.3, 0.3, 0.3), NO_NUMBER),
        ((0.5, 0.5), NO_NUMBER + r"\(0\.5, 0\.5\)"),  # 2 / 3 and 8 / 15 of the image
        ((-0.1, 0.3), NO_NUMBER),
        ((0.3, math.nan), NO_NUMBER + r"\(0\.3, nan\)"),
        ((math.nan, 0.3), NO_NUMBER),
        ((0.3, True), NO_NUMBER),
        (("0.3", 0.3), NO_NUMBER),
        (((0.3, 0.3), 0.3), NO_NUMBER),
        ((torch.tensor([0.3]), 0.3), NO_NUMBER),
        (torch.tensor(0.3), NO_NUMBER + r"tensor\(0\.3000\)"),
        (torch.tensor([1]), "`token_reduction` must be a torch.Tensor of floating-point dtype, got torch.int64"),
        (torch.tensor([True]), "floating-point dtype, got torch.bool"),
        (torch.zeros(2, 3), r"shape \(batch_size,\) or \(batch_size, 2\) .* got \(2, 3\)"),
        (torch.zeros(2, 2, 2), r"got \(2, 2, 2\)"),
        (torch.tensor([0.3, 0.95]), r"between 0 .* and 0\.9375 .* got \[0\.9[45]"),
        (torch.tensor([0.3, math.nan]), r"got \[nan\]"),
        (torch.tensor([-0.3, 0.3]), r"got \[-0\.3"),
        (torch.tensor([[0.5, 0.5], [0.3, 0.3]]), r"what several levels remove must fit .* got \[\[0\.5, 0\.5\]\]"),
        (torch.tensor([[-0.5, 0.5]]), r"got \[\[-0\.5, 0\.5\]\]"),
    ],
)
def test_what_cannot_be_removed_is_refused(token_reduction, message):
    with pytest.raises(ValueError, match=message):
        num_shared_superpatches(token_reduction, 64, (2, 4))


def test_levels_must_nest():
    for levels in ((), (1,), (4, 2), (2, 3), (2, 2), 2, ("2",), (2.0,), (True,)):
        with pytest.raises(ValueError, match="`levels` must be sides of superpatches in patches"):
            num_shared_superpatches(0.3, 64, levels)
