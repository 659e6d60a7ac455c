# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from cts_hf.conversion import convert_mmsegmentation, to_original
from cts_hf.conversion.checkpoints import convert_checkpoint
from cts_hf.conversion.weight_names import rename
from cts_hf.hub.normalization import IMAGENET

from ..helpers.mmsegmentation import AGGREGATION_NAMES, build_setr, logits_of_setr, normalize_map
from ..helpers.models import random_images, tiny_model


DECODERS = ["naive", "pup"]


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_outputs_are_those_of_mmsegmentation(decoder, tmp_path):
    reference, images = build_setr(decoder), random_images()
    meta = {"dataset_meta": {"classes": ("wall", "floor", "tree", "sky", "car")}}
    torch.save({"meta": meta, "state_dict": reference.state_dict()}, tmp_path / "setr.pth")
    model, _ = convert_checkpoint(tmp_path / "setr.pth", num_attention_heads=2)
    assert model.config.decoder_type == f"setr_{decoder}"
    assert model.config.decoder_layer_indices == [3, 4, 6, 7]
    assert (model.config.image_mean, model.config.image_std) == IMAGENET
    assert model.config.id2label[4] == "car"

    seen = []
    model.decode_head.register_forward_hook(lambda module, inputs, outputs: seen.extend(outputs))
    labels = torch.zeros(len(images), *images.shape[2:], dtype=torch.long)
    logits = model(images, labels=labels).logits
    expected, auxiliary = logits_of_setr(reference, images)
    # Here, what is upsampled last has been classified before, so that it rounds differently.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert len(seen) == 1 + len(auxiliary)
    for ours, theirs in zip(seen[1:], auxiliary, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_without_auxiliary_heads(decoder):
    weights = {name: value for name, value in build_setr(decoder).state_dict().items() if "auxiliary" not in name}
    model = convert_mmsegmentation(weights, num_attention_heads=2)
    assert model.config.auxiliary_loss_weight == 0
    with pytest.raises(ValueError, match=r"those of the weights, got auxiliary_loss_weight=0\.4"):
        convert_mmsegmentation(weights, num_attention_heads=2, auxiliary_loss_weight=0.4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_missing_and_left_over_weights_are_listed(decoder):
    weights = build_setr(decoder).state_dict()
    del weights["decode_head.up_convs.0.0.bn.running_mean"]
    with pytest.raises(ValueError, match=r"1 missing: .*decode_head\.up_convs\.0\.0\.bn\.running_mean"):
        convert_mmsegmentation(weights, num_attention_heads=2)
    weights = {**build_setr(decoder).state_dict(), "backbone.ln1.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 unexpected: .*extra"):
        convert_mmsegmentation(weights, num_attention_heads=2)


@torch.no_grad()
def test_the_head_of_multi_level_aggregation_is_that_of_mmsegmentation():
    reference, images = build_setr("mla"), random_images()
    head = tiny_model(decoder_type="setr_mla", num_hidden_layers=8, decoder_hidden_size=8).decode_head
    weights = reference.state_dict()
    head.load_state_dict({name: weights[rename(name, AGGREGATION_NAMES)] for name in head.state_dict()})
    *earlier, last = reference.backbone(images)
    logits, *auxiliary = head([*earlier, normalize_map(reference.neck.norm[-1], last)], with_auxiliary=True)
    expected, expected_auxiliary = logits_of_setr(reference, images)
    assert len(auxiliary) == len(expected_auxiliary) == 4
    for ours, theirs in zip((logits, *auxiliary), (expected, *expected_auxiliary), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_an_encoder_without_class_token_is_refused():
    with pytest.raises(ValueError, match="got those of SETR-MLA"):
        convert_mmsegmentation(build_setr("mla").state_dict(), num_attention_heads=2)


def test_what_the_original_does_not_have_is_not_saved_for_it():
    model = convert_mmsegmentation(build_setr("naive").state_dict(), num_attention_heads=2)
    with pytest.raises(ValueError, match="must have the decoder 'mask_transformer' or 'linear'"):
        to_original(model)
