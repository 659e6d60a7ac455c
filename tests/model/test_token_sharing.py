# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import fractions

import numpy as np
import pytest
import torch

from cts_hf import build_layout, num_shared_superpatches, share, superpatch_targets, unshare
from cts_hf.model.token_sharing import build_padded_layout, pad_labels


GRIDS = [(1, 1), (2, 3), (4, 4), (5, 7)]


def random_scores(rows, columns, batch_size=3, seed=0):
    return torch.randn(batch_size, rows, columns, generator=torch.Generator().manual_seed(seed))


def budgets(rows, columns):
    return sorted({0, 1, rows * columns // 2, rows * columns})


def patch_values(values_of_superpatches):
    return values_of_superpatches.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_the_best_superpatches_share(rows, columns):
    scores = random_scores(rows, columns)
    for num_shared in budgets(rows, columns):
        shared = build_layout(scores, num_shared).shared_superpatches
        assert shared.shape == scores.shape
        assert (shared.sum((1, 2)) == num_shared).all()
        for image_scores, image_shared in zip(scores, shared, strict=True):
            if 0 < num_shared < rows * columns:
                assert image_scores[image_shared].min() > image_scores[~image_shared].max()


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_unsharing_undoes_sharing(rows, columns):
    """A patch gets its own value back, or that of its superpatch where four patches share a token."""
    scores = random_scores(rows, columns)
    patches = torch.randn(3, 4 * rows * columns, 6)
    superpatches = torch.randn(3, rows * columns, 6)
    for num_shared in budgets(rows, columns):
        layout = build_layout(scores, num_shared)
        tokens = share(patches, superpatches, layout)
        assert tokens.shape == (3, 4 * rows * columns - 3 * num_shared, 6)
        restored = unshare(tokens, layout)
        is_shared = patch_values(layout.shared_superpatches)[:, :, None]
        of_superpatch = patch_values(torch.arange(rows * columns).view(1, rows, columns)).expand(3, -1)
        expected = torch.where(is_shared, superpatches.gather(1, of_superpatch[:, :, None].expand(-1, -1, 6)), patches)
        assert torch.equal(restored, expected)


def test_without_sharing_tokens_are_patches():
    patches = torch.randn(2, 24, 5)
    layout = build_layout(random_scores(2, 3, batch_size=2), 0)
    assert torch.equal(share(patches, torch.randn(2, 6, 5), layout), patches)
    assert torch.equal(unshare(patches, layout), patches)


def test_gradients_reach_the_values_of_the_tokens_only():
    scores = random_scores(3, 4, batch_size=2)
    patches = torch.randn(2, 48, 5, requires_grad=True)
    superpatches = torch.randn(2, 12, 5, requires_grad=True)
    layout = build_layout(scores, 5)
    unshare(share(patches, superpatches, layout), layout).sum().backward()
    is_shared = layout.shared_superpatches.flatten(1)[:, :, None].float()
    patch_is_shared = patch_values(layout.shared_superpatches)[:, :, None].float()
    assert torch.equal(superpatches.grad, 4 * is_shared.expand_as(superpatches))
    assert torch.equal(patches.grad, (1 - patch_is_shared).expand_as(patches))


def test_images_of_a_batch_are_independent():
    scores = random_scores(4, 5, batch_size=4)
    order = torch.tensor([2, 0, 3, 1])
    layout, permuted = build_layout(scores, 7), build_layout(scores[order], 7)
    for whole, part in zip(layout[:3], permuted[:3], strict=True):
        assert torch.equal(whole[order], part)


def test_equal_scores_are_shared_in_raster_order():
    shared = build_layout(torch.zeros(1, 3, 4), 5).shared_superpatches.flatten()
    assert shared.tolist() == [True] * 5 + [False] * 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_any_dtype(dtype):
    scores = torch.arange(12).view(1, 3, 4).to(dtype)
    layout = build_layout(scores, 4)
    assert layout.shared_superpatches.flatten().tolist() == [False] * 8 + [True] * 4
    values = torch.arange(48).view(1, 48, 1).to(dtype)
    tokens = share(values, torch.zeros(1, 12, 1, dtype=dtype), layout)
    assert tokens.dtype == unshare(tokens, layout).dtype == dtype


def test_padded_layout_gives_each_image_the_tokens_it_gets_alone():
    rows, columns = 4, 5
    sizes = [(4, 5), (2, 5), (3, 2), (1, 1)]
    scores = random_scores(rows, columns, batch_size=len(sizes))
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for index, (height, width) in enumerate(sizes):
        mask[index, :height, :width] = True
    patches = torch.randn(len(sizes), 2 * rows, 2 * columns, 3)
    superpatches = torch.randn(len(sizes), rows, columns, 3)
    for token_reduction in (0, 0.1, 0.3, 0.4375, 0.75):
        layout = build_padded_layout(scores, token_reduction, mask)
        tokens = share(patches.flatten(1, 2), superpatches.flatten(1, 2), layout)
        restored = unshare(tokens, layout).view_as(patches)
        for index, (height, width) in enumerate(sizes):
            part = slice(index, index + 1)
            num_shared = num_shared_superpatches(token_reduction, 4 * height * width)
            alone = build_layout(scores[part, :height, :width], num_shared)
            alone_tokens = share(
                patches[part, : 2 * height, : 2 * width].flatten(1, 2),
                superpatches[part, :height, :width].flatten(1, 2),
                alone,
            )
            assert torch.equal(tokens[part][layout.token_mask[part]], alone_tokens[0])
            expected = unshare(alone_tokens, alone).view(2 * height, 2 * width, 3)
            assert torch.equal(restored[index, : 2 * height, : 2 * width], expected)


def test_padded_layout_never_shares_padding():
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[:, :, 2:] = False
    for scores in (torch.full((1, 4, 4), float("-inf")), torch.arange(16).view(1, 4, 4) + 2**24):
        layout = build_padded_layout(scores, 0.75, mask)
        assert torch.equal(layout.shared_superpatches, mask)
        assert layout.patch_to_token.max() < layout.token_source.shape[1]


def test_padded_budgets_are_those_of_an_image_alone():
    """Also where the product of a budget and a number of patches is halfway between two integers."""
    grid = (torch.arange(40) < torch.arange(1, 41)[:, None])[:, None]  # 1 to 40 superpatches
    for token_reduction in [step / 1000 for step in range(751)]:
        shared = build_padded_layout(torch.zeros(40, 1, 40), token_reduction, grid).shared_superpatches
        expected = [num_shared_superpatches(token_reduction, 4 * count) for count in range(1, 41)]
        assert shared.sum((1, 2)).tolist() == expected


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


@pytest.mark.parametrize(
    ("token_reduction", "num_patches", "expected"),
    [(309 / 1024, 1024, 103), (0.3, 900, 90), (0.3, 1600, 160), (0.4375, 2304, 336), (0, 64, 0), (0.75, 64, 16)],
)
def test_budgets_of_the_paper(token_reduction, num_patches, expected):
    assert num_shared_superpatches(token_reduction, num_patches) == expected


@pytest.mark.parametrize("number", [np.float64(0.3), fractions.Fraction(3, 10)])
def test_any_kind_of_number_is_a_token_reduction(number):
    assert [num_shared_superpatches(number, 4 * n) for n in range(99)] == [round(0.3 * 4 * n / 3) for n in range(99)]
    scores, mask = random_scores(4, 5), torch.ones(3, 4, 5, dtype=torch.bool)
    expected = build_padded_layout(scores, 0.3, mask).shared_superpatches
    assert torch.equal(build_padded_layout(scores, number, mask).shared_superpatches, expected)


@pytest.mark.parametrize("token_reduction", [0.3, 0.4375, 309 / 1024, 0.375])
def test_a_compiled_budget_is_that_of_python(token_reduction):
    """Also where a budget is halfway between two integers, as 0.375 of an odd number of superpatches."""
    torch._dynamo.reset()

    def share_as_many(superpatches):
        num_shared = num_shared_superpatches(token_reduction, 4 * superpatches.shape[0])
        return superpatches.new_zeros(num_shared), superpatches + num_shared

    compiled = torch.compile(share_as_many, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_superpatches in range(600):
        shared, added = compiled(torch.zeros(num_superpatches, dtype=torch.int64))
        expected = round(token_reduction * 4 * num_superpatches / 3)
        assert shared.shape[0] == expected
        assert (added == expected).all()


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


def test_refusals_name_the_value():
    scores = random_scores(2, 2)
    with pytest.raises(ValueError, match=r"token_reduction.*0\.8"):
        num_shared_superpatches(0.8, 64)
    with pytest.raises(ValueError, match=r"between 0 and 4 superpatches, got 5"):
        build_layout(scores, 5)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        build_layout(scores.flatten(1), 1)
    with pytest.raises(ValueError, match=r"\(1, 10, 8\)"):
        superpatch_targets(torch.zeros(1, 10, 8, dtype=torch.int64), 4)
    layout = build_layout(scores, 1)
    scores_with_nan = scores.clone()
    scores_with_nan[0, 1, 1] = float("nan")
    for build in (build_layout, lambda scores, num_shared: build_padded_layout(scores, 0.3, torch.ones(3, 2, 2) > 0)):
        with pytest.raises(ValueError, match=r"must not be NaN.*got 1 NaN among 12: replace"):
            build(scores_with_nan, 1)
    with pytest.raises(ValueError, match="16 patches"):
        share(torch.zeros(3, 12, 1), torch.zeros(3, 3, 1), layout)
    with pytest.raises(ValueError, match=r"13 tokens of 3 images, got values of shape \(3, 14, 1\)"):
        unshare(torch.zeros(3, 14, 1), layout)
    for num_shared in (0, 1):
        layout = build_layout(scores, num_shared)
        for batch_size in (1, 2, 6):
            patches, superpatches = torch.zeros(batch_size, 16, 1), torch.zeros(batch_size, 4, 1)
            tokens = torch.zeros(batch_size, 16 - 3 * num_shared, 1)
            with pytest.raises(ValueError, match=rf"of 3 images, got values of shape \({batch_size}, 16, 1\)"):
                share(patches, superpatches, layout)
            with pytest.raises(ValueError, match=rf"of 3 images, got values of shape \({batch_size}, 1.*\)"):
                unshare(tokens, layout)


TENSOR_OF_INTEGERS = r"`labels` must be a torch\.Tensor of integer dtype, got "
NO_NUMBER = r"`token_reduction` must be a number between 0 \(no sharing\) and 0\.75 \(all shared\), got "


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: num_shared_superpatches("0.3", 64), NO_NUMBER + "'0.3'"),
        (lambda: num_shared_superpatches(True, 64), NO_NUMBER + "True"),
        (lambda: num_shared_superpatches(float("nan"), 64), NO_NUMBER + "nan"),
        (lambda: num_shared_superpatches(float("inf"), 64), NO_NUMBER + "inf"),
        (lambda: num_shared_superpatches(None, 64), NO_NUMBER + "None"),
        (lambda: num_shared_superpatches([0.3, 0.3], 64), NO_NUMBER + r"\[0\.3, 0\.3\]"),
        (lambda: num_shared_superpatches((0.3, 0.3), 64), NO_NUMBER + r"\(0\.3, 0\.3\)"),
        (lambda: num_shared_superpatches(torch.tensor(0.3), 64), NO_NUMBER + r"tensor\(0\.3000\)"),
        (lambda: num_shared_superpatches(torch.tensor([0.3, 0.3]), 64), NO_NUMBER + r"tensor\(\[0\.3000, 0\.3000\]\)"),
        (lambda: num_shared_superpatches(np.array(0.3), 64), NO_NUMBER + r"array\(0\.3\)"),
        (lambda: num_shared_superpatches(0.3j, 64), NO_NUMBER + "0.3j"),
        (lambda: num_shared_superpatches(0.3, 64.0), r"`num_patches` must be a whole number from 0 on, got 64\.0"),
        (lambda: num_shared_superpatches(0.3, -64), "whole number from 0 on, got -64"),
        (lambda: build_layout([[[0.5]]], 1), "`scores` must be a torch.Tensor of real dtype, got <class 'list'>"),
        (lambda: build_layout(np.zeros((1, 2, 2)), 1), r"`scores` .* got <class 'numpy\.ndarray'>"),
        (lambda: build_layout(torch.zeros(1, 2, 2) * 1j, 1), r"`scores` .* got torch\.complex64"),
        (lambda: build_layout(torch.zeros(1, 2, 2), 1.0), r"`num_shared` must be a whole number from 0 on, got 1\.0"),
        (lambda: build_layout(torch.zeros(1, 2, 2), True), "`num_shared` .* got True"),
        (lambda: build_padded_layout(torch.zeros(1, 2, 2), 0.3, torch.ones(1, 2, 2)), r"`superpatch_mask` .*float32"),
        (lambda: build_padded_layout(torch.zeros(1, 2, 2), 0.3, torch.ones(1, 3, 2) > 0), r"\(1, 2, 2\).*\(1, 3, 2\)"),
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
