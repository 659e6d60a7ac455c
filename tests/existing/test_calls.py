# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import transformers

from cts_hf import apply_cts, remove_cts

from ..helpers.existing_models import build_existing, random_scores
from ..helpers.models import random_images, tiny_policy


TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 12,
}


def captioner():
    """A model that writes text about images, with a ViT as its encoder."""
    decoder = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        build_existing("vit").config, decoder
    )
    model = transformers.VisionEncoderDecoderModel(config).eval()
    model.generation_config.update(decoder_start_token_id=1, pad_token_id=0)
    return model


def dual_encoder():
    """A model of images and text, with a ViT for the former."""
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        build_existing("vit").config, transformers.BertConfig(**TEXT), projection_dim=8
    )
    return transformers.VisionTextDualEncoderModel(config).eval()


def lengths(model):
    """Where the numbers of tokens that the layers of a ViT see are written to."""
    seen = []
    layer = next(module for module in model.modules() if type(module).__name__ == "ViTLayer")
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    return seen


@pytest.mark.parametrize("name", ["beit_segmentation", "upernet_beit", "mask2former", "pixio"])
@torch.no_grad()
def test_models_inside_share_tokens_by_themselves(name):
    model, images, scores = build_existing(name), random_images(), random_scores(64, 64)
    inside = {
        "beit_segmentation": lambda: model.base_model,
        "upernet_beit": lambda: model.backbone,
        "mask2former": lambda: model.model.pixel_level_module.encoder,
        "pixio": lambda: model.pixio,
    }[name]()
    plain = inside(images)
    apply_cts(model, tiny_policy())
    by_default = inside(images)
    assert by_default.num_tokens.tolist() == [46, 46]
    assert torch.equal(by_default.shared_superpatches, model(images).shared_superpatches)
    # As the very model by itself.
    given = inside(images, superpatch_scores=scores, token_reduction=0.6)
    remove_cts(model)
    expected = apply_cts(inside)(images, superpatch_scores=scores, token_reduction=0.6)
    remove_cts(inside)
    assert type(given) is type(expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(given[key], value)
    assert type(inside(images)) is type(plain)


@torch.no_grad()
def test_generating_text_shares_tokens():
    model, images = apply_cts(captioner(), tiny_policy()), random_images()
    seen = lengths(model)
    generated = model.generate(images, max_new_tokens=2, num_beams=2)
    assert seen == [47]
    assert generated.shape == (2, 3)
    model.token_sharing.token_reduction = 0.6
    model.generate(images, max_new_tokens=2)
    encoder_outputs = model.get_encoder()(images)
    assert seen[1:] == [26, 26]
    assert encoder_outputs.num_tokens.tolist() == [25, 25]
    outputs = model(decoder_input_ids=torch.ones(2, 3, dtype=torch.int64), encoder_outputs=encoder_outputs)
    assert "num_tokens" not in outputs  # no image was encoded
    with pytest.raises(ValueError, match="without a policy"):
        apply_cts(captioner()).generate(images, max_new_tokens=2)


@torch.no_grad()
def test_masks_of_text_are_none_of_patches():
    model, images = apply_cts(dual_encoder(), tiny_policy()), random_images()
    text = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3)}
    outputs = model(pixel_values=images, **text)
    assert outputs.num_tokens.tolist() == [46, 46]
    text["attention_mask"][:, 2] = 0
    assert not torch.equal(model(pixel_values=images, **text).logits_per_image, outputs.logits_per_image)
    mask = torch.ones(2, 65)
    for wrong in (
        lambda: model.vision_model(images, attention_mask=mask),
        lambda: apply_cts(captioner(), tiny_policy())(images, text["input_ids"], attention_mask=mask),
    ):
        with pytest.raises(ValueError, match="`attention_mask` must be None where tokens are shared"):
            wrong()
    with pytest.raises(ValueError, match="`bool_masked_pos` must be None where tokens are shared"):
        apply_cts(build_existing("beit_segmentation"), tiny_policy()).beit(images, torch.ones(2, 64).bool())
