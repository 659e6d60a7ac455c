# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What patches that shared a token get besides a copy, and what superpatches are embedded as besides a projection."""

import copy

import pytest
import torch
from torch import nn

from cts_hf import CtsForSemanticSegmentation
from cts_hf.model.modeling_cts_unsharing import CtsUnsharingResidual

from ..helpers.models import TINY_BACKBONE, random_images, tiny_model
from .test_modeling_cts_backbone import build
from .test_modeling_cts_layout import assert_as_alone, levels_model, of_image, padded, tuple_of


OPTIONS = {"unsharing": "residual", "superpatch_embedding": "multiscale"}
DECODERS = ["linear", "mask_transformer", "setr_naive", "setr_mla"]
LEVELS = [(2,), (2, 4)]
BUDGETS = [
    {"token_reduction": 0.3},
    {"token_reduction": 0.75},
    {"token_reduction": torch.tensor([0.0, 0.6])},
    {"sharing_threshold": 0.5},
]
MASK = torch.ones(2, 41, 70)
MASK[1, 30:] = MASK[1, :, 50:] = 0


def trained(model):
    """With weights that do something, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("unsharing_residual.") or "superpatch_projections" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def without(model, **options):
    """The same weights in a model that copies."""
    config = copy.deepcopy(model.config)
    for name, value in options.items():
        setattr(config, name, value)
    plain = CtsForSemanticSegmentation(config).eval()
    left_over = plain.load_state_dict(model.state_dict(), strict=False)
    assert not left_over.missing_keys
    assert left_over.unexpected_keys
    return plain


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("decoder_type", DECODERS)
@torch.no_grad()
def test_new_weights_change_nothing(decoder_type, levels):
    model = levels_model(decoder_type=decoder_type, superpatch_levels=levels, **OPTIONS)
    plain = without(model, unsharing="copy", superpatch_embedding="projection")
    for arguments in [*BUDGETS, {"token_reduction": 0}]:
        for pixel_mask in (None, MASK):
            expected, outputs = (
                each(random_images(2, 41, 70), pixel_mask=pixel_mask, **arguments) for each in (plain, model)
            )
            assert torch.equal(outputs.logits, expected.logits)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("decoder_type", DECODERS)
@torch.no_grad()
def test_without_sharing_they_have_no_part(decoder_type, levels):
    model = trained(levels_model(decoder_type=decoder_type, superpatch_levels=levels, **OPTIONS))
    plain, images = without(model, unsharing="copy", superpatch_embedding="projection"), random_images()
    assert not torch.equal(model(images, token_reduction=0.3).logits, plain(images, token_reduction=0.3).logits)
    for token_reduction in (0, torch.zeros(2)):
        logits = model(images, token_reduction=token_reduction).logits
        assert torch.equal(logits, plain(images, token_reduction=token_reduction).logits)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("decoder_type", ["linear", "mask_transformer"])
@torch.no_grad()
def test_patches_that_share_get_a_residual_and_others_nothing(decoder_type, levels):
    """One patch at a time: what its pixels have over those of its token, times the gate that the token has for it."""
    model = trained(levels_model(decoder_type=decoder_type, superpatch_levels=levels, unsharing="residual"))
    images = random_images()
    outputs, encoded = model(images, token_reduction=0.5), model.cts(images, token_reduction=0.5)
    tokens, layout, residual = encoded.last_hidden_state[:, 1:], encoded.token_layout, model.unsharing_residual
    added = outputs.logits - without(model, unsharing="copy")(images, token_reduction=0.5).logits
    for index, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(8), torch.arange(8)).tolist():
        level = 1
        for each, shared in zip(levels, tuple_of(layout.shared_superpatches), strict=True):
            level = each if shared[index, row // each, column // each] else level
        if level == 1:
            assert not added[index, :, row, column].any()
            continue
        own = images[index, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        top, left, side = 8 * (row // level) * level, 8 * (column // level) * level, 8 * level
        of_token = nn.functional.avg_pool2d(images[index, :, top : top + side, left : left + side], level)
        gate = residual.gate(tokens[index, layout.patch_to_token[index, 8 * row + column]])
        expected = residual.output_projection(gate * residual.difference_projection((own - of_token).flatten()))
        torch.testing.assert_close(added[index, :, row, column], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [(2,), (2, 4), (3, 6)])
@torch.no_grad()
def test_a_superpatch_is_seen_at_the_resolution_of_the_level_before(levels):
    side = 2 * levels[-1]
    options = {"superpatch_levels": levels, "image_size": 8 * side, "use_policy": False}
    model = trained(levels_model(superpatch_embedding="multiscale", **options))
    plain, images = without(model, superpatch_embedding="projection"), random_images(1, 8 * side, 8 * side)
    arguments = {
        "superpatch_scores": tuple(torch.rand(1, side // level, side // level) for level in levels),
        "token_reduction": 0.6,
        "output_hidden_states": True,
    }
    outputs, expected = model.cts(images, **arguments), plain.cts(images, **arguments)
    terms = outputs.hidden_states[0][0, 1:] - expected.hidden_states[0][0, 1:]
    first, checked = side * side, 0
    assert not terms[outputs.token_layout.token_source[0] < first].any()
    for finer, level, projection in zip(
        (1, *levels[:-1]), levels, model.cts.embeddings.patch_embeddings.superpatch_projections, strict=True
    ):
        cells = side // level
        for number, source in enumerate(outputs.token_layout.token_source[0].tolist()):
            if first <= source < first + cells * cells:
                row, column = divmod(source - first, cells)
                pixels = images[0, :, 8 * level * row :, 8 * level * column :][:, : 8 * level, : 8 * level]
                seen = nn.functional.avg_pool2d(pixels, finer).flatten()
                torch.testing.assert_close(terms[number], projection(seen), rtol=1e-4, atol=1e-4)
                checked += 1
        first += cells * cells
    assert checked == sum(int(shared.sum()) for shared in tuple_of(outputs.token_layout.shared_superpatches)) > 0


@pytest.mark.parametrize("decoder_type", DECODERS)
@torch.no_grad()
def test_each_image_of_a_batch_gets_what_it_gets_alone(decoder_type):
    model = trained(levels_model(decoder_type=decoder_type, **OPTIONS))
    images, pixel_values, pixel_mask = padded([(64, 80), (41, 50), (16, 70)], 64, 80)
    pixel_values = pixel_values + 9 * (1 - pixel_mask[:, None])  # whatever the padding is
    for arguments in ({"token_reduction": torch.tensor([0.3, 0.62, 0.5])}, {"token_reduction": 0.55}):
        batch = model(pixel_values, pixel_mask=pixel_mask, **arguments)
        for index, image in enumerate(images):
            assert_as_alone(batch, model(image, **of_image(arguments, index)), index)
        order = [2, 0, 1]
        permuted = {
            name: value[order] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        again = model(pixel_values[order], pixel_mask=pixel_mask[order], **permuted)
        for index, image in enumerate(order):
            rows, columns = batch.logits_sizes[image].tolist()
            pair = again.logits[index, :, :rows, :columns], batch.logits[image, :, :rows, :columns]
            torch.testing.assert_close(*pair, rtol=0, atol=1e-4)


@pytest.mark.parametrize("decoder_type", DECODERS)
def test_gradients_reach_the_new_weights(decoder_type):
    """The gate moves first; the rest has a gradient as soon as it has."""
    model = levels_model(decoder_type=decoder_type, **OPTIONS).train()
    labels = torch.randint(5, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    names = {name for name, _ in model.named_parameters() if "unsharing" in name or "superpatch_projections" in name}
    assert len(names) == 6
    later = {f"unsharing_residual.{part}_projection.weight" for part in ("difference", "output")}
    for expected in (names - later, names):
        model(random_images(), labels=labels, token_reduction=0.6).loss.backward()
        reached = {name for name, parameter in model.named_parameters() if name in names and parameter.grad.any()}
        assert reached == expected
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * (parameter.grad if parameter.grad is not None else 0)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, gradients = trained(levels_model(decoder_type="setr_naive", **OPTIONS)).train(), []
    labels, state = torch.randint(5, (2, 64, 64)), copy.deepcopy(model.state_dict())
    for _ in range(2):
        model.load_state_dict(state)
        model.zero_grad()
        model(random_images(), labels=labels, token_reduction=0.6).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        model.gradient_checkpointing_enable()
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("decoder_type", ["linear", "setr_naive"])
@pytest.mark.parametrize(("dtype", "dtype_of_part"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_weights_compute_in_their_own_dtype(dtype, dtype_of_part, decoder_type):
    model = trained(levels_model(decoder_type=decoder_type, **OPTIONS)).to(getattr(torch, dtype))
    model.unsharing_residual.to(getattr(torch, dtype_of_part))
    for autocasts in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocasts):
            outputs = model(random_images(), labels=torch.zeros(2, 64, 64, dtype=torch.int64))
        outputs.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.unsharing_residual.parameters())
        if not autocasts:
            assert outputs.logits.dtype == next(model.decode_head.parameters()).dtype


@torch.no_grad()
def test_linear_layers_can_be_quantized():
    model = trained(levels_model(decoder_type="linear", **OPTIONS))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    expected, outputs = model(random_images()), quantized(random_images().double())
    similarity = nn.functional.cosine_similarity(outputs.logits, expected.logits, dim=1)
    assert similarity.mean() > 0.98  # as of the whole model, and of three more layers whose values are multiplied


@pytest.mark.parametrize("decoder_type", ["linear", "setr_mla"])
@pytest.mark.parametrize("size", [(64, 64), (72, 56)])
@torch.no_grad()
def test_encoders_of_transformers_have_a_residual_on_any_grid(size, decoder_type):
    model = build(decoder_type=decoder_type, unsharing="residual")
    plain, images = without(model, unsharing="copy"), random_images(2, *size)
    assert torch.equal(model(images, token_reduction=0).logits, plain(images, token_reduction=0).logits)
    outputs, expected = model(images, token_reduction=0.4), plain(images, token_reduction=0.4)
    assert torch.equal(outputs.shared_superpatches, expected.shared_superpatches)
    differs = (outputs.logits != expected.logits).any(dim=1)
    if decoder_type == "linear":
        shared = outputs.shared_superpatches.repeat_interleave(2, 1).repeat_interleave(2, 2)
        rows, columns = (outputs.logits.shape[axis] - shared.shape[axis - 1] for axis in (2, 3))
        assert torch.equal(differs, nn.functional.pad(shared, (0, columns, 0, rows)))
    assert differs.any()


@torch.no_grad()
def test_a_trained_model_gets_new_weights_when_it_is_loaded(tmp_path):
    plain, images = levels_model(), random_images()
    plain.save_pretrained(tmp_path / "plain")
    model = CtsForSemanticSegmentation.from_pretrained(tmp_path / "plain", **OPTIONS)
    assert torch.equal(model(images).logits, plain(images).logits)
    trained(model).save_pretrained(tmp_path / "trained")
    loaded = CtsForSemanticSegmentation.from_pretrained(tmp_path / "trained")
    assert (loaded.config.unsharing, loaded.config.superpatch_embedding) == ("residual", "multiscale")
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert not torch.equal(loaded(images).logits, plain(images).logits)


def test_the_residual_is_small():
    model = tiny_model(unsharing="residual", num_labels=150)
    assert isinstance(model.unsharing_residual, CtsUnsharingResidual)
    num_weights = sum(parameter.numel() for parameter in model.unsharing_residual.parameters())
    assert num_weights == 64 * (32 + 1 + 3 * 8 * 8 + 150)


@pytest.mark.slow
@pytest.mark.parametrize("levels", LEVELS)
@torch.no_grad()
def test_compiles_and_exports(levels):
    torch._dynamo.reset()
    policy_config = {**TINY_BACKBONE, "output_stride": 8}
    model = trained(levels_model(superpatch_levels=levels, policy_config=policy_config, **OPTIONS))
    images = random_images(2, 41, 70)
    expected = model(images, token_reduction=0.5).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (images,), {"token_reduction": 0.5}).module()
    for module in (compiled, exported):
        torch.testing.assert_close(module(images, token_reduction=0.5).logits, expected, rtol=0, atol=1e-4)
    pixel_mask = MASK[:, :, :]
    expected = model(images, pixel_mask=pixel_mask).logits
    torch.testing.assert_close(compiled(images, pixel_mask=pixel_mask).logits, expected, rtol=0, atol=1e-4)
