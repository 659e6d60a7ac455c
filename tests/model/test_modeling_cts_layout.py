# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Models with several levels of superpatches, budgets per image, and sharing by a threshold."""

import copy
import math

import pytest
import torch
from torch import nn

from cts_hf import CtsForSemanticSegmentation, num_shared_superpatches, superpatch_targets, unshare

from ..helpers.models import TINY_BACKBONE, random_images, tiny_model, tiny_policy
from ..helpers.slow import slow_but


DECODERS = ["mask_transformer", "linear", "setr_naive", "setr_mla"]
SIZES = [(64, 64), (64, 96), (16, 16), (41, 70), (33, 129)]
REDUCTIONS = [0, 0.1, 0.45, 0.7, 0.9, 0.9375, (0.2, 0.5), (0.0, 0.3)]


def tuple_of(values):
    return values if isinstance(values, tuple) else (values,)


def levels_model(**options):
    options = {"superpatch_levels": (2, 4), "decoder_hidden_size": 8, **options}
    model = tiny_model(**options)
    with torch.no_grad():  # at initialization every probability is near one half
        for head in (model.cts.policy.head, *model.cts.policy.larger_heads) if model.cts.policy else ():
            nn.init.normal_(head.weight, std=0.1)
    return model


def owners(shared, levels, shape):
    """Slow and plain: the cell (level, row, column) of each patch of one image, from what its levels share."""
    cells = {(row, column): (1, row, column) for row in range(shape[0]) for column in range(shape[1])}
    for level, of_level in zip(levels, shared, strict=True):
        for row, column in of_level.nonzero().tolist():
            for patch_row in range(level * row, level * row + level):
                for patch_column in range(level * column, level * column + level):
                    assert cells[patch_row, patch_column][0] == 1  # a patch is in one shared superpatch
                    cells[patch_row, patch_column] = (level, row, column)
    return cells


@pytest.mark.slow
@pytest.mark.parametrize("decoder_type", DECODERS)
@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_any_size_and_budget(height, width, decoder_type):
    model = levels_model(decoder_type=decoder_type)
    rows, columns = (4 * math.ceil(side / 32) for side in (height, width))
    for token_reduction in REDUCTIONS:
        outputs = model(random_images(2, height, width), token_reduction=token_reduction, output_hidden_states=True)
        budgets = num_shared_superpatches(token_reduction, rows * columns, (2, 4))
        parts = 4 if decoder_type.startswith("setr") else 1
        assert outputs.logits.shape == (2, 5, *(math.ceil(parts * side / 8) for side in (height, width)))
        assert outputs.logits.isfinite().all()
        shapes = [(2, rows // 2, columns // 2), (2, rows // 4, columns // 4)]
        assert [of_level.shape for of_level in outputs.shared_superpatches] == shapes
        assert [of_level.sum((1, 2)).tolist() for of_level in outputs.shared_superpatches] == [[b, b] for b in budgets]
        assert outputs.num_tokens.tolist() == 2 * [rows * columns - 3 * budgets[0] - 15 * budgets[1]]
        assert outputs.num_tokens.dtype == torch.int64
        assert outputs.hidden_states[0].shape[1] == 1 + outputs.num_tokens[0]
        if any(budgets):
            assert [of_level.shape for of_level in outputs.policy_logits] == [(2, 2, *shape[1:]) for shape in shapes]
        else:
            assert outputs.policy_logits is None


@pytest.mark.parametrize("levels", [(2, 4), (2, 4, 8), (3, 6), (4,)])
@torch.no_grad()
def test_tokens_are_embedded_as_means(levels):
    """Each token is the projection of the mean of the pixels of its patches, at the mean of their positions."""
    side = levels[-1]
    model = levels_model(superpatch_levels=levels, image_size=8 * 2 * side, use_policy=False)
    images, shape = random_images(1, 8 * 2 * side, 8 * 2 * side), (2 * side, 2 * side)
    scores = tuple(torch.randn(1, 2 * side // level, 2 * side // level) for level in levels)
    outputs = model.cts(images, superpatch_scores=scores, token_reduction=0.6, output_hidden_states=True)
    shared = [of_level[0] for of_level in tuple_of(outputs.token_layout.shared_superpatches)]
    embedded = unshare(outputs.hidden_states[0][:, 1:], outputs.token_layout)[0]

    embeddings = model.cts.embeddings
    positions = embeddings.position_embeddings[0, 1:].view(*shape, -1)
    assert sum(int(of_level.sum()) for of_level in shared) > 0
    for (row, column), (level, cell_row, cell_column) in owners(shared, levels, shape).items():
        rows, columns = (slice(level * at, level * at + level) for at in (cell_row, cell_column))
        pixels = images[:, :, 8 * rows.start : 8 * rows.stop, 8 * columns.start : 8 * columns.stop]
        pixels = nn.functional.avg_pool2d(pixels, level)
        expected = embeddings.patch_embeddings.projection(pixels.flatten()) + positions[rows, columns].mean((0, 1))
        torch.testing.assert_close(embedded[row * shape[1] + column], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoder_type", ["mask_transformer", "linear"])
@torch.no_grad()
def test_patches_of_a_token_get_the_same_logits(decoder_type):
    outputs = levels_model(decoder_type=decoder_type)(random_images(), token_reduction=0.6)
    for index in range(2):
        cells = owners([of_level[index] for of_level in outputs.shared_superpatches], (2, 4), (8, 8))
        logits = {}
        for (row, column), cell in cells.items():
            logits.setdefault(cell, []).append(outputs.logits[index, :, row, column])
        assert len(logits) == outputs.num_tokens[index]
        assert all(torch.equal(one, of_cell[0]) for of_cell in logits.values() for one in of_cell)


@torch.no_grad()
def test_a_budget_of_the_first_level_alone_is_a_model_without_others():
    model, plain = levels_model(), tiny_model(use_policy=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    images, scores = random_images(2, 64, 96), torch.randn(2, 4, 6)
    expected = plain(images, superpatch_scores=scores, token_reduction=0.3)
    outputs = model(images, superpatch_scores=(scores, torch.zeros(2, 2, 3)), token_reduction=(0.3, 0.0))
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.shared_superpatches[0], expected.shared_superpatches)
    assert torch.equal(outputs.num_tokens, expected.num_tokens)
    assert plain(images, superpatch_scores=(scores,), token_reduction=(0.3,)).logits.equal(expected.logits)


def padded(sizes, height, width):
    images = [random_images(1, *size, seed=index) for index, size in enumerate(sizes)]
    pixel_values, pixel_mask = torch.zeros(len(sizes), 3, height, width), torch.zeros(len(sizes), height, width)
    for index, (rows, columns) in enumerate(sizes):
        pixel_values[index, :, :rows, :columns], pixel_mask[index, :rows, :columns] = images[index][0], 1
    return images, pixel_values, pixel_mask


def assert_as_alone(batch, alone, index):
    for whole, own in zip(tuple_of(batch.shared_superpatches), tuple_of(alone.shared_superpatches), strict=True):
        rows, columns = own.shape[1:]
        assert torch.equal(whole[index, :rows, :columns], own[0])
        assert whole[index].sum() == own.sum()
    assert batch.num_tokens[index] == alone.num_tokens[0]
    rows, columns = alone.logits.shape[2:]
    torch.testing.assert_close(batch.logits[index, :, :rows, :columns], alone.logits[0], rtol=0, atol=1e-4)


PER_IMAGE = [
    {"token_reduction": torch.tensor([0.0, 0.3, 0.62, 0.75])},
    {"token_reduction": torch.tensor([[0.1, 0.2], [0.0, 0.9], [0.7, 0.0], [0.0, 0.0]])},
    {"sharing_threshold": 0.0},
    {"sharing_threshold": 1.0},
    {"token_reduction": 0.55},
    {"token_reduction": (0.3, 0.45)},
    {"token_reduction": 0.9375},
]


def of_image(arguments, index):
    """The arguments of one image of a batch."""
    return {
        name: value[index : index + 1] if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def between(probabilities, part):
    """A threshold at about a part of all values, in the widest gap around it: rounding does not reach across."""
    values = probabilities.flatten().sort().values
    first = max(0, min(len(values) - 12, int(part * len(values)) - 6))
    gaps = values[first + 1 : first + 12] - values[first : first + 11]
    index = first + gaps.argmax().item()
    return values[index : index + 2].mean().item()


@pytest.mark.parametrize("decoder_type", slow_but(("mask_transformer", "setr_mla"), DECODERS))
@pytest.mark.parametrize("policy_levels", [(2,), (2, 4)])
@torch.no_grad()
def test_each_image_of_a_batch_gets_what_it_gets_alone(policy_levels, decoder_type):
    model = levels_model(
        decoder_type=decoder_type, policy_config={**TINY_BACKBONE, "superpatch_levels": policy_levels}
    )
    sizes = [(64, 80), (40, 50), (16, 80), (64, 64)]
    images, pixel_values, pixel_mask = padded(sizes, 64, 80)
    probabilities = model(pixel_values, token_reduction=0.3).policy_logits[0].softmax(dim=1)[:, 1]
    thresholds = [{"sharing_threshold": between(probabilities, part)} for part in (0.1, 0.4, 0.7, 0.95)]
    for arguments in [*PER_IMAGE, *thresholds]:
        together = model(pixel_values[:, :, :, :64], **arguments)
        batch = model(pixel_values, pixel_mask=pixel_mask, **arguments)
        for index, image in enumerate(images):
            own = of_image(arguments, index)
            assert_as_alone(batch, model(image, **own), index)
            assert_as_alone(together, model(pixel_values[index : index + 1, :, :, :64], **own), index)


@torch.no_grad()
def test_a_single_level_has_budgets_per_image_too():
    model = levels_model(superpatch_levels=(2,))
    images = random_images(4)
    probabilities = model(images, token_reduction=0.3).policy_logits.softmax(dim=1)[:, 1]
    for arguments in (
        {"token_reduction": torch.tensor([0.0, 0.3, 0.62, 0.75])},
        {"token_reduction": torch.tensor([[0.1], [0.75], [0.0], [0.3]])},
        {"sharing_threshold": probabilities.quantile(0.4).item()},
        {"sharing_threshold": probabilities.quantile(0.7).item()},
    ):
        batch = model(images, **arguments)
        assert isinstance(batch.shared_superpatches, torch.Tensor)
        assert len(set(batch.num_tokens.tolist())) > 1
        for index in range(4):
            assert_as_alone(batch, model(images[index : index + 1], **of_image(arguments, index)), index)
    same = model(images, token_reduction=torch.full((4,), 0.3))
    assert torch.equal(same.shared_superpatches, model(images, token_reduction=0.3).shared_superpatches)


@torch.no_grad()
def test_rows_of_a_batch_are_as_long_as_its_longest():
    outputs = levels_model().cts(random_images(4), token_reduction=torch.tensor([0.5, 0.6, 0.7, 0.9]))
    assert outputs.last_hidden_state.shape[1] == 1 + outputs.num_tokens.max()
    assert outputs.num_tokens.tolist() == outputs.token_layout.token_mask.sum(1).tolist()


@torch.no_grad()
def test_what_is_probable_enough_is_shared():
    model, images = levels_model(), random_images(4)
    logits = model(images, token_reduction=0.3).policy_logits
    finer, coarser = (of_level.softmax(dim=1)[:, 1] for of_level in logits)
    for threshold in (0.0, 0.2, 0.5, 0.7, 0.9):
        shared = model(images, sharing_threshold=threshold).shared_superpatches
        expected = coarser >= threshold
        assert torch.equal(shared[1], expected)
        covered = expected.repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.equal(shared[0], (finer >= threshold) & ~covered)
    assert model(images, sharing_threshold=0).num_tokens.tolist() == [4] * 4
    assert model(images, sharing_threshold=1).num_tokens.tolist() == [64] * 4


@torch.no_grad()
def test_a_threshold_takes_scores_as_logarithms_of_odds():
    model, probabilities = levels_model(superpatch_levels=(2,)), torch.rand(2, 4, 4)
    probabilities[0, 0, 0], probabilities[0, 0, 1] = 0.5, 1.0
    for dtype in (torch.float32, torch.bfloat16):
        scores = probabilities.logit().to(dtype)
        for threshold in (0.0, 0.25, 0.5, 0.9):
            shared = model(random_images(), superpatch_scores=scores, sharing_threshold=threshold).shared_superpatches
            assert torch.equal(shared, scores.double() >= torch.tensor(threshold).double().logit())
        shared = model(random_images(), superpatch_scores=scores, sharing_threshold=1.0).shared_superpatches
        assert torch.equal(shared, probabilities == 1)
    bools = probabilities > 0.5  # 0 and 1 are even odds and better
    shared = model(random_images(), superpatch_scores=bools, sharing_threshold=0.6).shared_superpatches
    assert torch.equal(shared, bools)


@torch.no_grad()
def test_a_threshold_of_the_configuration_gives_way_to_the_call():
    model, images = levels_model(sharing_threshold=0.6), random_images()
    plain = levels_model()
    assert torch.equal(model(images).logits, plain(images, sharing_threshold=0.6).logits)
    assert torch.equal(model(images, sharing_threshold=0.3).logits, plain(images, sharing_threshold=0.3).logits)
    assert torch.equal(model(images, token_reduction=0.3).logits, plain(images, token_reduction=0.3).logits)
    model = levels_model(token_reduction=(0.2, 0.5))
    assert torch.equal(model(images).logits, plain(images, token_reduction=(0.2, 0.5)).logits)


@torch.no_grad()
def test_a_policy_of_small_superpatches_serves_large_ones_by_its_least_sure():
    model = levels_model(superpatch_levels=(2, 4, 8), policy_config={**TINY_BACKBONE, "superpatch_levels": (2,)})
    images = random_images(2, 128, 64)
    logits = model(images, token_reduction=0.3).policy_logits
    assert torch.equal(logits[0], model.cts.policy(images).logits)
    scores = [of_level[:, 1] - of_level[:, 0] for of_level in logits]
    for level, finer in zip(scores[1:], scores[:-1], strict=True):
        assert torch.equal(level, -nn.functional.max_pool2d(-finer, 2))
    injected = model(images, token_reduction=0.3, superpatch_scores=tuple(scores))
    assert torch.equal(injected.logits, model(images, token_reduction=0.3).logits)


@torch.no_grad()
def test_a_trained_model_gets_larger_superpatches_when_it_is_loaded(tmp_path):
    plain = tiny_model()
    plain.save_pretrained(tmp_path)
    model = CtsForSemanticSegmentation.from_pretrained(tmp_path, superpatch_levels=[2, 4])
    assert model.state_dict().keys() == plain.state_dict().keys()
    images = random_images()
    expected = plain(images, token_reduction=0.3)
    assert torch.equal(model(images, token_reduction=(0.3, 0)).logits, expected.logits)
    assert model(images, token_reduction=0.8).num_tokens.max() < 16
    model.set_policy(tiny_policy(superpatch_levels=(2, 4)))
    assert model.config.policy_config.superpatch_levels == (2, 4)
    with pytest.raises(
        ValueError, match=r"policy_config\.superpatch_levels` must be among .* \(2,\), .* got \(2, 4\)"
    ):
        plain.set_policy(tiny_policy(superpatch_levels=(2, 4)))


@pytest.mark.parametrize("policy_levels", [(2,), (2, 4)])
def test_a_joint_policy_learns_from_every_level_of_its_own(policy_levels):
    policy_config = {**TINY_BACKBONE, "superpatch_levels": policy_levels}
    model = levels_model(policy_loss_weight=0.5, policy_config=policy_config).train()
    labels = torch.randint(5, (2, 3, 3)).repeat_interleave(20, 1).repeat_interleave(20, 2)  # 60 x 60, padded to 64
    outputs = model(random_images(2, 60, 60), labels=labels)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    upsampled = nn.functional.interpolate(outputs.logits, size=(60, 60), mode="bilinear", align_corners=False)
    whole = nn.functional.pad(labels, (0, 4, 0, 4), value=255)
    losses = [
        nn.functional.cross_entropy(logits, superpatch_targets(whole, 8 * level), ignore_index=255)
        for level, logits in zip(policy_levels, outputs.policy_logits, strict=False)
    ]
    expected = nn.functional.cross_entropy(upsampled, labels) + 0.5 * sum(losses) / len(losses)
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("arguments", [{"token_reduction": 0.6}, {"sharing_threshold": 0.5}])
def test_gradient_checkpointing_gives_the_same_gradients(arguments):
    model, gradients = levels_model(policy_loss_weight=1.0).train(), []
    labels = torch.randint(5, (2, 64, 64))
    state = copy.deepcopy(model.state_dict())
    for _ in range(2):
        model.load_state_dict(state)
        model.zero_grad()
        model(random_images(), labels=labels, **arguments).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        model.gradient_checkpointing_enable()
    assert gradients[0]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


SCORES = (torch.zeros(2, 4, 4), torch.zeros(2, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"superpatch_scores": torch.zeros(2, 4, 4)}, r"a tuple of one tensor for each of the levels \(2, 4\), got 1"),
        ({"superpatch_scores": (*SCORES, torch.zeros(2, 1, 1))}, "`superpatch_scores` must be a tuple .* got 3"),
        ({"superpatch_scores": list(SCORES)}, "`superpatch_scores` must be a torch.Tensor .* got <class 'list'>"),
        ({"superpatch_scores": (SCORES[0], None)}, "`superpatch_scores` .* got <class 'NoneType'>"),
        ({"superpatch_scores": SCORES[::-1]}, r"shape .* = \(2, 4, 4\) for these images, got \(2, 2, 2\)"),
        ({"superpatch_scores": (SCORES[0], SCORES[1] * math.nan)}, "NaN"),
        ({"superpatch_scores": (SCORES[0], SCORES[1] * math.nan), "sharing_threshold": 0.5}, "NaN"),
        ({"token_reduction": 0.95}, r"`token_reduction` must be a number between 0 .* 0\.9375 .* got 0\.95"),
        ({"token_reduction": [0.3, 0.3]}, r"`token_reduction` must be .* got \[0\.3, 0\.3\]"),
        ({"token_reduction": torch.tensor(0.3)}, r"`token_reduction` must be .* got tensor\(0\.3000\)"),
        ({"token_reduction": torch.full((3,), 0.3)}, r"one entry for each of 2 images .* got shape \(3,\)"),
        ({"token_reduction": torch.full((1,), 0.3)}, r"one entry for each of 2 images .* got shape \(1,\)"),
        ({"token_reduction": torch.full((2, 3), 0.3)}, r"\(batch_size, 2\) .* got \(2, 3\)"),
        ({"token_reduction": torch.tensor([0.3, 0.95])}, r"must be between 0 .* and 0\.9375 .* got \[0\.9"),
        ({"token_reduction": torch.tensor([0.3, math.nan])}, r"got \[nan\]"),
        ({"sharing_threshold": 1.5}, r"`sharing_threshold` must be a probability .* got 1\.5: give one number"),
        ({"sharing_threshold": -0.1}, r"`sharing_threshold` must be a probability .* got -0\.1"),
        ({"sharing_threshold": math.nan}, "`sharing_threshold` must be a probability .* got nan"),
        ({"sharing_threshold": "0.9"}, "`sharing_threshold` must be a probability .* got '0.9'"),
        ({"sharing_threshold": True}, "`sharing_threshold` must be a probability .* got True"),
        ({"sharing_threshold": [0.9]}, r"`sharing_threshold` must be a probability .* got \[0\.9\]"),
        ({"sharing_threshold": torch.tensor(0.9)}, r"`sharing_threshold` must be a probability .* got tensor"),
        (
            {"sharing_threshold": 0.9, "token_reduction": 0.3},
            r"`sharing_threshold` must be None where `token_reduction` is given, got 0\.9 and 0\.3: give one of them",
        ),
    ],
)
def test_refusals_name_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        levels_model()(random_images(), **arguments)


def test_a_policy_wants_targets_for_each_of_its_levels():
    policy, targets = tiny_policy(superpatch_levels=(2, 4)), torch.ones(2, 4, 4, dtype=torch.int64)
    assert policy(random_images(), labels=(targets, targets[:, :2, :2])).loss > 0
    for labels, got in ((targets, "class 'torch.Tensor'"), ((targets,), "1 of them")):
        with pytest.raises(ValueError, match=f"`labels` must be a tuple of superpatch targets, .* got .*{got}"):
            policy(random_images(), labels=labels)
    with pytest.raises(ValueError, match=r"`labels` must have shape \(2, 2, 2\), got \(2, 4, 4\)"):
        policy(random_images(), labels=(targets, targets))


@torch.no_grad()
def test_the_larger_heads_of_a_policy_see_the_mean_of_the_features():
    policy, images = tiny_policy(superpatch_levels=(2, 4)), random_images(2, 41, 70)
    finer, coarser = policy(images).logits
    padded_images = nn.functional.pad(images, (0, 96 - 70, 0, 64 - 41))
    features = policy.backbone(nn.functional.interpolate(padded_images, size=(128, 192), mode="bilinear"))
    torch.testing.assert_close(finer, policy.head(features))
    torch.testing.assert_close(coarser, policy.larger_heads[0](nn.functional.avg_pool2d(features, 2)))
    assert tiny_policy(superpatch_levels=(2,)).state_dict().keys() == tiny_policy().state_dict().keys()
    extra = policy.state_dict().keys() - tiny_policy().state_dict().keys()
    assert extra == {"larger_heads.0.weight", "larger_heads.0.bias"}


@pytest.mark.parametrize("arguments", [{"token_reduction": 0.6}, {"token_reduction": (0.3, 0.45)}])
@pytest.mark.slow
@torch.no_grad()
def test_numbers_compile_and_export_at_static_shapes(arguments):
    torch._dynamo.reset()
    model, images = levels_model(policy_config={**TINY_BACKBONE, "output_stride": 8}), random_images(2, 41, 70)
    expected = model(images, **arguments)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, **arguments)
    exported = torch.export.export(model, (images,), arguments).module()(images, **arguments)
    for outputs in (compiled, exported):
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-4)
        assert all(map(torch.equal, outputs.shared_superpatches, expected.shared_superpatches))
        assert torch.equal(outputs.num_tokens, expected.num_tokens)
