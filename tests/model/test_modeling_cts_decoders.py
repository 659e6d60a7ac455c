# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn

from cts_hf import CtsConfig, CtsForSemanticSegmentation, unshare
from cts_hf.model.configuration_cts import DECODER_TYPES
from cts_hf.model.modeling_cts_decoder_base import CtsDecoder
from cts_hf.model.modeling_cts_decoders import DECODERS

from ..helpers.models import TINY_BACKBONE, random_images, tiny_config, tiny_model


SETR = ("setr_naive", "setr_pup", "setr_mla")
# Rows of logits for one row of patches.
LOGITS_PER_PATCH = {"mask_transformer": 1, "linear": 1, "setr_naive": 4, "setr_pup": 16, "setr_mla": 4}


def model_with(decoder_type, **options):
    """With batch normalizations that do something, as after training."""
    model = tiny_model(decoder_type=decoder_type, **{"decoder_hidden_size": 8, "num_hidden_layers": 3, **options})
    generator = torch.Generator().manual_seed(1)
    for module in model.decode_head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.normal_(module.bias, std=0.1, generator=generator)
    return model


def labels_of(images, num_labels=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, num_labels, (len(images), *images.shape[2:]), generator=generator)


def test_every_decoder_has_a_name_in_the_configuration():
    assert tuple(DECODERS) == DECODER_TYPES
    assert set(LOGITS_PER_PATCH) == set(DECODER_TYPES), "each decoder says how many logits a patch has"
    assert all(issubclass(decoder, CtsDecoder) for decoder in DECODERS.values())


def test_another_decoder_keeps_its_options_when_it_is_saved(monkeypatch, tmp_path):
    monkeypatch.setattr("cts_hf.model.configuration_cts.DECODER_TYPES", (*DECODER_TYPES, "another"))
    tiny_config(decoder_type="another", decoder_hidden_size=8).save_pretrained(tmp_path)
    assert CtsConfig.from_pretrained(tmp_path).decoder_hidden_size == 8


@pytest.mark.parametrize("decoder_type", ["linear", "setr_naive"])
def test_a_decoder_that_returns_no_tuple_is_refused(decoder_type):
    model = tiny_model(decoder_type=decoder_type, decoder_hidden_size=8)
    model.decode_head.forward = lambda hidden_states, *args, **kwargs: hidden_states[-1]
    with pytest.raises(TypeError, match="must return a tuple of logits"):
        model(random_images())


@pytest.mark.parametrize("takes_maps", [False, True])
@torch.no_grad()
def test_a_decoder_gets_what_it_declares(takes_maps, monkeypatch):
    """A new decoder is a class and an entry in DECODERS: here one that takes features of the patches for logits."""

    class Decoder(CtsDecoder):
        layer_indices = (1, 0)

        def __init__(self, config):
            super().__init__()
            self.takes_maps, self.num_labels = takes_maps, config.num_labels
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, hidden_states, mask=None, with_auxiliary=False, **kwargs):
            self.seen = hidden_states
            axis = 1 if takes_maps else 2
            logits = [self.scale * states.narrow(axis, 0, self.num_labels) for states in hidden_states]
            return tuple(logits) if with_auxiliary else tuple(logits[:1])

        def loss(self, logits, criterion):
            return sum(weight * criterion(each) for weight, each in enumerate(logits))

        def init_own_weights(self, std):
            nn.init.ones_(self.scale)

    monkeypatch.setitem(DECODERS, "linear", Decoder)
    model, images = tiny_model(decoder_type="linear", num_hidden_layers=3), random_images(2, 40, 64)
    outputs = model(images, labels=labels_of(images), output_hidden_states=True)
    assert len(outputs.hidden_states) == 4  # as of any model
    encoded = model.cts(images, layer_indices=(1, 0))
    assert torch.equal(encoded.layer_outputs[0], outputs.hidden_states[2])
    assert torch.equal(encoded.layer_outputs[1], outputs.hidden_states[1])
    assert model.cts(images).layer_outputs is None

    expected = []
    for states in (*encoded.layer_outputs, encoded.last_hidden_state):
        patches = unshare(states[:, 1:], encoded.token_layout)
        expected.append(patches.transpose(1, 2).unflatten(2, (6, 8)))
    for states, tokens, as_map in zip(
        model.decode_head.seen, (*encoded.layer_outputs, encoded.last_hidden_state), expected, strict=True
    ):
        assert torch.equal(states, as_map if takes_maps else tokens[:, 1:])
    assert torch.equal(outputs.logits, expected[0][:, :5, :5])
    losses = [cross_entropy(each[:, :5, :5], images) for each in expected]
    torch.testing.assert_close(outputs.loss, losses[1] + 2 * losses[2])


def cross_entropy(logits, images):
    upsampled = nn.functional.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
    return nn.functional.cross_entropy(upsampled, labels_of(images))


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (16, 16), (41, 70), (33, 129)])
@torch.no_grad()
def test_logits_cover_the_image(decoder_type, height, width):
    model, images = model_with(decoder_type), random_images(2, height, width)
    for token_reduction in (0, 0.3, 0.75):
        logits = model(images, token_reduction=token_reduction).logits
        per_patch = LOGITS_PER_PATCH[decoder_type]
        assert logits.shape == (2, 5, -(-per_patch * height // 8), -(-per_patch * width // 8))
        assert logits.is_contiguous()
        assert logits.isfinite().all()
        assert logits.std() > 0


@pytest.mark.parametrize("decoder_type", SETR)
@pytest.mark.parametrize("options", [{}, {"use_distillation_token": True, "auxiliary_loss_weight": 0}])
@torch.no_grad()
def test_images_of_different_sizes_are_decoded_as_alone(decoder_type, options):
    model = model_with(decoder_type, decoder_layer_indices=[0, 1, 2, 2], **options)
    sizes = [(64, 80), (40, 50), (16, 80), (64, 64)]
    images = [random_images(1, *size, seed=index) for index, size in enumerate(sizes)]
    pixel_values, pixel_mask = torch.full((len(sizes), 3, 64, 80), torch.nan), torch.zeros(len(sizes), 64, 80)
    for index, (height, width) in enumerate(sizes):
        pixel_values[index, :, :height, :width] = images[index][0]
        pixel_mask[index, :height, :width] = 1
    for token_reduction in (0, 0.3, 0.75):
        batch = model(pixel_values, pixel_mask=pixel_mask, token_reduction=token_reduction)
        for index, image in enumerate(images):
            alone = model(image, token_reduction=token_reduction).logits[0]
            rows, columns = batch.logits_sizes[index]
            assert (rows, columns) == alone.shape[1:]
            torch.testing.assert_close(batch.logits[index, :, :rows, :columns], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("decoder_type", SETR)
def test_the_loss_counts_auxiliary_heads(decoder_type):
    model, images = model_with(decoder_type, auxiliary_loss_weight=0.25), random_images(2, 48, 64)
    seen = []
    model.decode_head.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    loss = model(images, labels=labels_of(images)).loss
    main, *auxiliary = [cross_entropy(logits, images) for logits in seen[0]]
    assert len(auxiliary) == (4 if decoder_type == "setr_mla" else 3)
    torch.testing.assert_close(loss, main + 0.25 * sum(auxiliary))
    model(images)
    assert len(seen[1]) == 1  # without labels they are not run

    without = model_with(decoder_type, auxiliary_loss_weight=0)
    assert not any("auxiliary" in name for name, _ in without.named_parameters())
    without.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(without(images, labels=labels_of(images)).loss, main, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoder_type", SETR)
def test_every_weight_learns_with_and_without_gradient_checkpointing(decoder_type):
    model, images = model_with(decoder_type).train(), random_images(2, 48, 64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = []
    for _ in range(2):
        model.load_state_dict(state)
        model.zero_grad()
        model(images, labels=labels_of(images)).loss.backward()
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        # All of them: `DistributedDataParallel` refuses weights that a loss does not reach.
        assert not [name for name, weight in trained.items() if weight.grad is None]
        gradients.append([weight.grad.clone() for weight in trained.values()])
        model.gradient_checkpointing_enable()
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("decoder_type", SETR)
def test_a_new_head_is_initialized(decoder_type):
    with torch.device("meta"):
        model = CtsForSemanticSegmentation(tiny_config(decoder_type=decoder_type))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7)
        tensor._is_hf_initialized = False
    model.init_weights()
    for name, tensor in (*model.decode_head.named_parameters(), *model.decode_head.named_buffers()):
        if name.endswith("num_batches_tracked"):
            assert tensor == 0, name
        elif tensor.ndim == 4:
            assert 0.01 < tensor.std() < 0.03, name
        else:
            assert (tensor == (1 if name.endswith(("weight", "running_var")) else 0)).all(), name


@pytest.mark.parametrize("decoder_type", SETR)
@torch.no_grad()
def test_save_and_load(decoder_type, tmp_path):
    model, images = model_with(decoder_type), random_images()
    model.save_pretrained(tmp_path)
    loaded = CtsForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert (tmp_path / "modeling_cts_setr.py").exists()


def test_setr_has_the_sizes_of_its_configurations():
    """Those of mmsegmentation's configurations for ViT-L, with its parameters counted by hand."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    options = {**sizes, "num_labels": 19, "use_policy": False, "policy_config": dict(TINY_BACKBONE)}
    layer = lambda inputs, outputs, side: inputs * outputs * side**2 + 2 * outputs  # noqa: E731
    classifier = lambda channels: channels * 19 + 19  # noqa: E731
    naive, pup = layer(1024, 256, 1) + classifier(256), layer(1024, 256, 3) + classifier(256)
    expected = {
        "setr_naive": 4 * naive + 3 * 2048,
        "setr_pup": 4 * pup + 3 * layer(256, 256, 3) + 3 * 2048,
        "setr_mla": 3 * 2048
        + 4 * (layer(1024, 256, 1) + layer(256, 256, 3) + layer(256, 128, 3) + layer(128, 128, 3) + classifier(256))
        + classifier(512),
    }
    for decoder_type, count in expected.items():
        config = CtsConfig(decoder_type=decoder_type, **options)
        indices = [5, 11, 17, 23] if decoder_type == "setr_mla" else [9, 14, 19, 23]
        assert config.decoder_layer_indices == indices
        with torch.device("meta"):
            decoder = DECODERS[decoder_type](config)
        assert sum(weight.numel() for weight in decoder.parameters()) == count
