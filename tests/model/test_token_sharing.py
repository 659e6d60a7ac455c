# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import fractions

import numpy as np
import pytest
import torch

from cts_hf import build_layout, num_shared_superpatches, share, unshare

from ..helpers.slow import slow_but


GRIDS = [(1, 1), (2, 3), (4, 4), (5, 7)]


def random_scores(rows, columns, batch_size=3, seed=0):
    return torch.randn(batch_size, rows, columns, generator=torch.Generator().manual_seed(seed))


def budgets(rows, columns):
    return sorted({0, 1, rows * columns // 2, rows * columns})


def padded_layout(scores, token_reduction, mask):
    num_patches = 4 * mask.sum((1, 2))
    return build_layout(scores, num_shared_superpatches(token_reduction, num_patches), superpatch_mask=mask)


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


def reference_tokens(scores, budgets, levels, height, width):
    """
    Slow and plain: the cells (level, row, column) of the tokens of one image of `height` x `width` patches, in order,
    and the index of the token of each patch.
    """
    owner = {}
    chosen = {level: [] for level in levels}
    for level, level_scores, budget in reversed(list(zip(levels, scores, budgets, strict=True))):
        cells = [(row, column) for row in range(height // level) for column in range(width // level)]
        free = [cell for cell in cells if (level * cell[0], level * cell[1]) not in owner]
        best = sorted(free, key=lambda cell: -level_scores[cell].item())[:budget]  # stable: raster order among equals
        chosen[level] = sorted(best)
        for row, column in best:
            for patch_row in range(level * row, level * row + level):
                for patch_column in range(level * column, level * column + level):
                    assert (patch_row, patch_column) not in owner
                    owner[patch_row, patch_column] = (level, row, column)
    patches = [(row, column) for row in range(height) for column in range(width)]
    tokens = [(1, *patch) for patch in patches if patch not in owner]
    tokens += [(level, *cell) for level in levels for cell in chosen[level]]
    return tokens, [tokens.index(owner.get(patch, (1, *patch))) for patch in patches]


def cell_names(levels, rows, columns, batch_size):
    """(level, row, column) of every cell: patches, and superpatches of each level."""
    names = []
    for level in (1, *levels):
        grid = torch.cartesian_prod(torch.tensor([level]), torch.arange(rows // level), torch.arange(columns // level))
        names.append(grid.view(1, -1, 3).expand(batch_size, -1, -1))
    return names[0], names[1:]


def random_batch(seed, levels, batch_size=4):
    """Scores of every level with many equal ones, sizes in patches, and budgets of images of any size."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return torch.randint(low, high + 1, (), generator=generator).item()

    largest = levels[-1]
    rows, columns = number(1, 3), number(1, 3)
    sizes = [(rows, columns), *((number(1, rows), number(1, columns)) for _ in range(batch_size - 1))]
    mask = torch.zeros(batch_size, rows, columns, dtype=torch.bool)
    budgets = torch.zeros(batch_size, len(levels), dtype=torch.int64)
    for index, (image_rows, image_columns) in enumerate(sizes):
        mask[index, :image_rows, :image_columns] = True
        free = image_rows * image_columns
        for place in reversed(range(len(levels))):
            budgets[index, place] = number(0, free)
            ratio = levels[place] // (levels[place - 1] if place else 1)
            free = (free - budgets[index, place].item()) * ratio**2
    shapes = [(batch_size, rows * largest // level, columns * largest // level) for level in levels]
    scores = [torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes]
    scores[0][0, 0, 0], scores[-1][-1, -1, -1] = float("-inf"), float("inf")
    return scores, budgets, mask, [(largest * height, largest * width) for height, width in sizes]


LEVELS = [(2,), (3,), (2, 4), (2, 6), (2, 4, 8)]


def assert_tokens(layout, index, tokens, owners, levels, size):
    """The layout of an image of a batch is that of the reference, on the part of the grid that is the image."""
    shared = layout.shared_superpatches
    shared = (shared,) if len(levels) == 1 else shared
    rows, columns = shared[0].shape[1] * levels[0], shared[0].shape[2] * levels[0]
    patches, superpatches = cell_names(levels, rows, columns, shared[0].shape[0])
    picked = share(patches, superpatches, layout)[index]
    if layout.token_mask is not None:
        assert layout.token_mask[index].tolist() == [True] * len(tokens) + [False] * (len(picked) - len(tokens))
    assert list(map(tuple, picked[: len(tokens)].tolist())) == tokens
    owner_map = layout.patch_to_token[index].view(rows, columns)[: size[0], : size[1]]
    assert owner_map.flatten().tolist() == owners
    for level, chosen in zip(levels, shared, strict=True):
        assert list(map(tuple, chosen[index].nonzero().tolist())) == [name[1:] for name in tokens if name[0] == level]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(12))
def test_any_levels_sizes_and_budgets_agree_with_the_reference(levels, seed):
    """Each image of a padded batch gets exactly the tokens that it gets alone, as many as the formula says."""
    scores, budgets, mask, sizes = random_batch(seed, levels)
    layout = build_layout(scores, list(budgets.unbind(1)), levels=levels, superpatch_mask=mask)
    for index, (height, width) in enumerate(sizes):
        of_image = [
            level_scores[index, : height // level, : width // level]
            for level, level_scores in zip(levels, scores, strict=True)
        ]
        tokens, owners = reference_tokens(of_image, budgets[index].tolist(), levels, height, width)
        saved = sum((level**2 - 1) * budget for level, budget in zip(levels, budgets[index].tolist(), strict=True))
        assert len(tokens) == height * width - saved
        assert_tokens(layout, index, tokens, owners, levels, (height, width))
        alone = build_layout([part[None] for part in of_image], budgets[index].tolist(), levels=levels)
        assert alone.token_mask is None
        assert alone.token_source.shape == (1, len(tokens))
        assert_tokens(alone, 0, tokens, owners, levels, (height, width))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_images_of_a_padded_batch_are_independent(levels, seed):
    scores, budgets, mask, _ = random_batch(seed, levels)
    order = torch.tensor([2, 0, 3, 1])
    layout = build_layout(scores, list(budgets.unbind(1)), levels=levels, superpatch_mask=mask)
    permuted = build_layout(
        [of_level[order] for of_level in scores],
        list(budgets[order].unbind(1)),
        levels=levels,
        superpatch_mask=mask[order],
    )
    for name in ("token_source", "patch_to_token", "token_mask"):
        assert torch.equal(layout[name][order], permuted[name])


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_constant_in_each_token_is_shared_and_unshared_unchanged(levels, seed):
    """Values of any trailing dimensions: none, and two."""
    scores, budgets, mask, _ = random_batch(seed, levels)
    layout = build_layout(scores, list(budgets.unbind(1)), levels=levels, superpatch_mask=mask)
    is_real = mask.repeat_interleave(levels[-1], 1).repeat_interleave(levels[-1], 2).flatten(1)
    for trailing in ((), (2, 3)):
        tokens = torch.randn(*layout.token_source.shape, *trailing)
        patches = unshare(tokens, layout)
        assert patches.shape == (*layout.patch_to_token.shape, *trailing)
        grid = patches.unflatten(1, (mask.shape[1] * levels[-1], -1))
        superpatches = [grid[:, ::level, ::level].flatten(1, 2) for level in levels]
        shared = share(patches, superpatches, layout)
        assert torch.equal(shared[layout.token_mask], tokens[layout.token_mask])
        assert torch.equal(unshare(shared, layout)[is_real], patches[is_real])


@pytest.mark.parametrize("levels", LEVELS)
def test_without_budgets_the_tokens_are_the_patches(levels):
    scores, budgets, _, _ = random_batch(0, levels)
    patches, superpatches = cell_names(levels, *(levels[0] * side for side in scores[0].shape[1:]), len(budgets))
    for budget in (0, torch.zeros(len(budgets), dtype=torch.int64)):
        layout = build_layout(scores, [budget] * len(levels), levels=levels)
        assert torch.equal(share(patches, superpatches, layout), patches)
        assert torch.equal(unshare(patches, layout), patches)


def test_a_number_is_the_budget_of_every_image():
    scores = random_scores(3, 4)
    layout, of_each = build_layout(scores, 5), build_layout(scores, torch.tensor([5, 5, 5]), max_tokens=33)
    assert of_each.token_mask.all()
    for name in ("shared_superpatches", "token_source", "patch_to_token"):
        assert torch.equal(layout[name], of_each[name])


def test_padded_layout_never_shares_padding():
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[:, :, 2:] = False
    for scores in (torch.full((1, 4, 4), float("-inf")), torch.arange(16).view(1, 4, 4) + 2**24):
        layout = padded_layout(scores, 0.75, mask)
        assert torch.equal(layout.shared_superpatches, mask)
        assert layout.patch_to_token.max() < layout.token_source.shape[1]


def test_padded_budgets_are_those_of_an_image_alone():
    """Also where the product of a budget and a number of patches is halfway between two integers."""
    grid = (torch.arange(40) < torch.arange(1, 41)[:, None])[:, None]  # 1 to 40 superpatches
    for token_reduction in [step / 1000 for step in range(751)]:
        shared = padded_layout(torch.zeros(40, 1, 40), token_reduction, grid).shared_superpatches
        expected = [num_shared_superpatches(token_reduction, 4 * count) for count in range(1, 41)]
        assert shared.sum((1, 2)).tolist() == expected


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
    expected = padded_layout(scores, 0.3, mask).shared_superpatches
    assert torch.equal(padded_layout(scores, number, mask).shared_superpatches, expected)


@pytest.mark.parametrize("token_reduction", slow_but([0.375], [0.3, 0.4375, 309 / 1024, 0.375]))
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


def test_refusals_name_the_value():
    scores = random_scores(2, 2)
    with pytest.raises(ValueError, match=r"token_reduction.*0\.8"):
        num_shared_superpatches(0.8, 64)
    with pytest.raises(ValueError, match=r"between 0 and 4 superpatches, got 5"):
        build_layout(scores, 5)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        build_layout(scores.flatten(1), 1)
    layout = build_layout(scores, 1)
    scores_with_nan = scores.clone()
    scores_with_nan[0, 1, 1] = float("nan")
    for build in (build_layout, lambda scores, num_shared: padded_layout(scores, 0.3, torch.ones(3, 2, 2) > 0)):
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
        (lambda: num_shared_superpatches(np.array(0.3), 64), NO_NUMBER + r"array\(0\.3\)"),
        (lambda: num_shared_superpatches(0.3j, 64), NO_NUMBER + "0.3j"),
        (lambda: num_shared_superpatches(0.3, 64.0), r"`num_patches` must be a whole number from 0 on, got 64\.0"),
        (lambda: num_shared_superpatches(0.3, -64), "whole number from 0 on, got -64"),
        (lambda: build_layout([[[0.5]]], 1), "`scores` must be a torch.Tensor of real dtype, got <class 'list'>"),
        (lambda: build_layout(np.zeros((1, 2, 2)), 1), r"`scores` .* got <class 'numpy\.ndarray'>"),
        (lambda: build_layout(torch.zeros(1, 2, 2) * 1j, 1), r"`scores` .* got torch\.complex64"),
        (lambda: build_layout(torch.zeros(1, 2, 2), 1.0), r"`num_shared` must be a whole number from 0 on, got 1\.0"),
        (
            lambda: build_layout([torch.zeros(1, 4, 4), torch.zeros(1, 2, 2)], [3, 4], levels=(2, 4)),
            r"`num_shared` must be between 0 .*, got 3 of \[0\]: share",
        ),
        (
            lambda: build_layout(torch.zeros(2, 2, 2), torch.tensor([4, 5])),
            r"`num_shared` must be .*, got \[4, 5\] of \[4, 4\]: share",
        ),
        (
            lambda: build_layout(torch.zeros(1, 2, 2), 3, superpatch_mask=torch.eye(2)[None] > 0),
            r"`num_shared` must be .*, got 3 of \[2\]: share",
        ),
        (lambda: build_layout(torch.zeros(2, 2, 2), torch.tensor([-1, 0])), r"`num_shared` .* got \[-1, 0\] of"),
        (lambda: build_layout(torch.zeros(2, 2, 2), torch.tensor([1.0, 0])), "`num_shared` .* got torch.float32"),
        (lambda: build_layout(torch.zeros(2, 2, 2), torch.tensor([1])), r"`num_shared` .* \(2,\), got \(1,\)"),
        (
            lambda: build_layout(torch.zeros(2, 2, 2), torch.tensor([1, 2]), max_tokens=12),
            r"`max_tokens` must be .* got .*\[13, 10\] tokens: give",
        ),
        (lambda: build_layout(torch.zeros(1, 2, 2), 1, levels=(2, 4)), r"one value for each .*\(2, 4\), got 1: give"),
        (lambda: build_layout(torch.zeros(1, 2, 2), [1, 2]), r"`num_shared` .*\(2,\), got 2: give"),
        (
            lambda: build_layout([torch.zeros(1, 2, 2)] * 2, [1, 1], levels=(2, 4)),
            r"level 2 .*\(1, 4, 4\).*\(1, 2, 2\)",
        ),
        (lambda: build_layout([torch.zeros(1, 2, 2)] * 2, [1, 1], levels=(2, 3)), r"`levels` .*got \(2, 3\): give"),
        (lambda: build_layout(torch.zeros(1, 2, 2), 1, levels=(1,)), r"`levels` .*got \(1,\): give"),
        (lambda: build_layout(torch.zeros(1, 2, 2), 1, levels=2), "`levels` .*got 2: give"),
        (lambda: build_layout(torch.zeros(1, 2, 2), True), "`num_shared` .* got True"),
        (
            lambda: build_layout(torch.zeros(1, 2, 2), 1, superpatch_mask=torch.ones(1, 2, 2)),
            r"`superpatch_mask` .*float32",
        ),
        (
            lambda: build_layout(torch.zeros(1, 2, 2), 1, superpatch_mask=torch.ones(1, 3, 2) > 0),
            r"\(1, 2, 2\).*\(1, 3, 2\)",
        ),
    ],
)
def test_wrong_types_are_refused_as_clearly_as_wrong_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("extra", [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_patches_in_no_superpatch_never_share(rows, columns, extra):
    shape = (2 * rows + extra[0], 2 * columns + extra[1])
    scores = random_scores(rows, columns)
    patches = torch.randn(3, shape[0] * shape[1], 6)
    superpatches = torch.randn(3, rows * columns, 6)
    for num_shared in budgets(rows, columns):
        layout = build_layout(scores, num_shared, shape=shape)
        assert torch.equal(layout.shared_superpatches, build_layout(scores, num_shared).shared_superpatches)
        tokens = share(patches, superpatches, layout)
        assert tokens.shape == (3, shape[0] * shape[1] - 3 * num_shared, 6)
        restored, given = (values.unflatten(1, shape) for values in (unshare(tokens, layout), patches))
        is_shared = torch.zeros(3, *shape, dtype=torch.bool)
        is_shared[:, : 2 * rows, : 2 * columns] = patch_values(layout.shared_superpatches).view(3, 2 * rows, -1)
        assert torch.equal(restored[~is_shared], given[~is_shared])
        expected = superpatches.unflatten(1, (rows, columns)).repeat_interleave(2, 1).repeat_interleave(2, 2)
        inner = restored[:, : 2 * rows, : 2 * columns]
        inner_shared = is_shared[:, : 2 * rows, : 2 * columns]
        assert torch.equal(inner[inner_shared], expected[inner_shared])


@pytest.mark.parametrize("shape", [(3, 4), (4, 6), (6, 4)])
def test_a_shape_that_superpatches_do_not_cover_is_refused(shape):
    with pytest.raises(ValueError, match=r"`shape` must be .* cover \(4, 4\), got \(\d, \d\)"):
        build_layout(torch.zeros(1, 2, 2), 1, shape=shape)
