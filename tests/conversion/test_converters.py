# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import os

import numpy as np
import pytest
import torch

from cts_hf import CtsPolicyConfig, conversion
from cts_hf.conversion import (
    convert_policy,
    convert_segmenter,
    load_policy_backbone,
    load_vit_weights,
    to_original,
)
from cts_hf.conversion.weight_files import read_weights

from ..helpers.golden import TINY, build_golden_model, load_golden
from ..helpers.models import random_images, tiny_model, tiny_policy


@pytest.fixture(params=TINY)
def golden(request):
    return load_golden(request.param)


def convert(weights, meta, **options):
    image_size = (meta["image_height"], meta["image_width"])
    return convert_segmenter(weights, image_size=image_size, **options)


def test_architecture_is_read_off_the_shapes(golden):
    golden, meta = golden
    config = build_golden_model(golden, meta)[0].config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_labels", "patch_size"):
        assert getattr(config, name) == meta[name], name
    assert config.use_distillation_token == meta["distilled"]
    assert config.decoder_type == meta["decoder"]
    assert config.use_policy is False


def test_classifiers_of_imagenet_are_left_out(golden):
    golden, meta = golden
    plain = convert(golden["weights"], meta)
    extended = convert({**golden["weights"], "encoder.head.weight": torch.zeros(1000, 64)}, meta)
    assert torch.equal(plain(golden["pixel_values"]).logits, extended(golden["pixel_values"]).logits)


def test_every_problem_is_listed(golden):
    golden, meta = golden
    weights = dict(golden["weights"])
    del weights["encoder.norm.bias"]
    del weights["encoder.blocks.0.attn.proj.weight"]
    weights["encoder.blocks.0.mlp.fc2.weight"] = weights["encoder.blocks.0.mlp.fc2.weight"][:, :-1]
    weights["neck.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match="do not fit") as error:
        convert(weights, meta)
    for part in (
        "2 missing: encoder.blocks.0.attn.proj.weight, encoder.norm.bias",
        "1 unexpected: neck.weight",
        "1 misshaped: encoder.blocks.0.mlp.fc2.weight: (64, 255) where (64, 256) is expected",
    ):
        assert part in str(error.value)


def test_another_image_or_patch_size_is_refused(golden):
    golden, _ = golden
    with pytest.raises(ValueError, match=r"encoder\.pos_embed: \(1, \d+, 64\) where \(1, \d+, 64\) is expected"):
        convert_segmenter(golden["weights"], image_size=128)
    with pytest.raises(ValueError, match="`patch_size` must be that of the weights, 16, got 8"):
        convert_segmenter(golden["weights"], image_size=64, patch_size=8)
    with pytest.raises(ValueError, match=r"those of the weights, got hidden_size=32 \(weights: 64\)"):
        convert_segmenter(golden["weights"], image_size=64, hidden_size=32)
    with pytest.raises(ValueError, match="4 classes of the weights, got 2 names"):
        convert_segmenter(load_golden("tiny_mask_cts")[0]["weights"], id2label={0: "a", 1: "b"})


def test_square_images_and_patches_are_read_off_the_weights():
    weights = load_golden("tiny_mask_cts")[0]["weights"]
    config = convert_segmenter(weights, drop_path_rate=0.1).config
    assert (config.image_size, config.patch_size, config.drop_path_rate) == (64, 16, 0.1)
    with pytest.raises(ValueError, match=r"`image_size` must be given .* got 15 of them"):
        convert_segmenter({**weights, "encoder.pos_embed": weights["encoder.pos_embed"][:, 1:]})


def test_and_back(golden):
    golden, meta = golden
    back = to_original(convert(golden["weights"], meta))
    assert back.keys() == golden["weights"].keys()
    for name, value in golden["weights"].items():
        assert torch.equal(back[name], value.float()), name


def test_and_back_with_a_policy():
    torch.manual_seed(0)
    backbone_stages = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "output_stride": 8}
    model = tiny_model(num_attention_heads=1, policy_config=backbone_stages)
    weights = to_original(model)
    assert weights["policy_net.head.weight"].shape == (2, 40, 1, 1)
    again = convert_segmenter(weights, num_attention_heads=1)
    assert again.config.use_policy
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_what_shapes_do_not_tell_of_a_policy_is_the_callers():
    backbone_stages = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "output_stride": 8}
    tensorflow = {"tf_padding": True, "batch_norm_eps": 1e-3}
    weights = to_original(tiny_model(num_attention_heads=1, policy_config=backbone_stages))
    whole = CtsPolicyConfig(superpatch_size=16, output_stride=8, **tensorflow)
    for given in (tensorflow, {**tensorflow, "output_stride": 8}, whole):
        policy_config = convert_segmenter(weights, num_attention_heads=1, policy_config=given).config.policy_config
        assert (policy_config.tf_padding, policy_config.batch_norm_eps, policy_config.output_stride) == (True, 1e-3, 8)
    assert not convert_segmenter(weights, num_attention_heads=1, policy_config=None).config.policy_config.tf_padding
    with pytest.raises(ValueError, match=r"got policy_config={'output_stride': 16} \(weights: .* 8}\)"):
        convert_segmenter(weights, policy_config={**tensorflow, "output_stride": 16})


def test_weights_of_something_else_are_refused():
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight', got 1 tensors without it \(model, "):
        convert_segmenter({"model": torch.zeros(1)}, image_size=64)
    with pytest.raises(ValueError, match="7 stages, or the first 5 or 3 of them, got 0 under"):
        convert_policy({"model": torch.zeros(1)})


def backbone_weights():
    torch.manual_seed(0)
    timm = pytest.importorskip("timm")
    return timm.create_model("efficientnet_lite0", pretrained=False).state_dict()


@torch.no_grad()
def test_policy_from_a_backbone_and_from_a_whole_policy():
    backbone = backbone_weights()
    half = convert_policy(backbone, output_stride=16)
    assert len(half.backbone.blocks) == 5
    assert torch.equal(half.backbone.conv_stem.weight, backbone["conv_stem.weight"])
    for prefix in ("", "policy_net."):
        again = convert_policy({f"{prefix}{name}": value for name, value in half.state_dict().items()})
        assert again.config.output_stride == 16
        assert torch.equal(again(random_images()).logits, half(random_images()).logits)
    assert convert_policy(backbone).config.output_stride == 32


def test_missing_weights_of_a_backbone_are_listed():
    backbone = backbone_weights()
    del backbone["blocks.1.0.bn2.running_var"]
    with pytest.raises(ValueError, match=r"1 missing: backbone\.blocks\.1\.0\.bn2\.running_var"):
        convert_policy(backbone)
    del backbone["blocks.1.0.bn2.num_batches_tracked"]
    backbone["blocks.1.0.bn2.running_var"] = torch.ones(96)
    convert_policy(backbone)


def test_backbone_from_files_and_from_the_weights_package(tmp_path):
    backbone = backbone_weights()
    torch.save({"state_dict": backbone}, tmp_path / "backbone.pth")
    policy = tiny_policy(width_coefficient=1.0, depth_coefficient=1.0, output_stride=16)
    head = policy.head.weight.clone()
    load_policy_backbone(policy, tmp_path / "backbone.pth")
    assert torch.equal(policy.backbone.blocks[4][2].conv_dw.weight, backbone["blocks.4.2.conv_dw.weight"])
    assert torch.equal(policy.head.weight, head)

    # The package numbers the blocks through and has the weights in the same order.
    stages = [(stage, block) for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(count)]
    names = iter(backbone)
    package = {}
    for name in names:
        parts = name.split(".")
        if parts[0] == "blocks":
            stage, block = int(parts[1]), int(parts[2])
            own = {"conv_dw": "_depthwise_conv", "conv_pw": "_project_conv", "bn1": "_bn1", "bn2": "_bn2"}
            if stage > 0:
                own = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
                own |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
            package[f"_blocks.{stages.index((stage, block))}.{own[parts[3]]}.{parts[4]}"] = backbone[name]
        else:
            own = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
            package[f"{own.get(parts[0], '_fc')}.{parts[1]}"] = backbone[name]
    torch.save(package, tmp_path / "package.pth")
    with pytest.raises(ValueError, match="tf_padding=True"):
        load_policy_backbone(policy, tmp_path / "package.pth")
    tensorflow = tiny_policy(width_coefficient=1.0, depth_coefficient=1.0, tf_padding=True, batch_norm_eps=1e-3)
    load_policy_backbone(tensorflow, tmp_path / "package.pth")
    for name, value in tensorflow.backbone.state_dict().items():
        assert torch.equal(value, backbone[name]), name


VIT_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def old_transformers_names(state_dict):
    """The key layout of ViTModel before transformers 5."""
    rules = (("layers.", "encoder.layer."), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"))
    rules += (("attention.o_proj", "attention.output.dense"), ("attention.q_proj", "attention.attention.query"))
    rules += (("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"))
    renamed = {}
    for name, value in state_dict.items():
        for new, old in rules:
            name = name.replace(new, old)
        renamed[f"vit.{name}"] = value
    return renamed


@pytest.mark.parametrize("layout", ["new", "old", "saved"])
@torch.no_grad()
def test_vit_of_transformers(layout, tmp_path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**VIT_SHAPE, image_size=64, patch_size=8, layer_norm_eps=1e-5)).eval()
    source = tmp_path
    if layout == "saved":
        vit.save_pretrained(tmp_path)
    else:
        source = tmp_path / "vit.bin"
        torch.save(vit.state_dict() if layout == "new" else old_transformers_names(vit.state_dict()), source)
    model = tiny_model()
    load_vit_weights(model, source)
    outputs = model.cts(random_images(), token_reduction=0)
    torch.testing.assert_close(outputs.last_hidden_state, vit(random_images()).last_hidden_state, rtol=0, atol=1e-4)


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_vit_of_timm(distilled, tmp_path):
    pytest.importorskip("timm")
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit_class = VisionTransformerDistilled if distilled else VisionTransformer
    vit = vit_class(img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2).eval()
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    model = tiny_model(use_distillation_token=distilled, layer_norm_eps=1e-6)
    load_vit_weights(model.cts, tmp_path / "vit.pth")
    outputs = model.cts(random_images(), token_reduction=0)
    expected = vit.forward_features(random_images())
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=0, atol=1e-4)

    multiscale = tiny_model(
        use_distillation_token=distilled, layer_norm_eps=1e-6, superpatch_embedding="multiscale", unsharing="residual"
    )
    load_vit_weights(multiscale, tmp_path / "vit.pth")  # its own projections stay at zero
    shared = [
        each.cts(random_images(), torch.rand(2, 4, 4, generator=torch.manual_seed(0)), 0.3)
        for each in (model, multiscale)
    ]
    assert torch.equal(*(outputs.last_hidden_state for outputs in shared))

    larger = tiny_model(image_size=(96, 64))
    load_vit_weights(larger, tmp_path / "vit.pth")
    grid = vit.pos_embed[:, 1 + distilled :].transpose(1, 2).unflatten(2, (8, 8))
    resized = torch.nn.functional.interpolate(grid, size=(12, 8), mode="bilinear").flatten(2).transpose(1, 2)
    assert torch.equal(larger.cts.embeddings.position_embeddings[:, 1:], resized)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight: \(64, 32\) where \(128, 32\)"):
        load_vit_weights(tiny_model(intermediate_size=128), tmp_path / "vit.pth")


@torch.no_grad()
def test_vit_of_google(tmp_path):
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    vit = timm_vit.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=10
    ).eval()
    generator = np.random.default_rng(0)

    def random(*shape):
        return (0.1 * generator.standard_normal(shape)).astype(np.float32)

    arrays = {"cls": random(1, 1, 32), "embedding/kernel": random(8, 8, 3, 32), "embedding/bias": random(32)}
    arrays |= {"head/kernel": random(32, 10), "head/bias": random(10)}
    arrays["Transformer/posembed_input/pos_embedding"] = random(1, 65, 32)
    norms = ["Transformer/encoder_norm"]
    for layer in ("Transformer/encoderblock_0", "Transformer/encoderblock_1"):
        norms += [f"{layer}/LayerNorm_0", f"{layer}/LayerNorm_2"]
        attention = f"{layer}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            arrays |= {f"{attention}/{part}/kernel": random(32, 2, 16), f"{attention}/{part}/bias": random(2, 16)}
        arrays |= {f"{attention}/out/kernel": random(2, 16, 32), f"{attention}/out/bias": random(32)}
        mlp = f"{layer}/MlpBlock_3"
        arrays |= {f"{mlp}/Dense_0/kernel": random(32, 64), f"{mlp}/Dense_0/bias": random(64)}
        arrays |= {f"{mlp}/Dense_1/kernel": random(64, 32), f"{mlp}/Dense_1/bias": random(32)}
    for norm in norms:
        arrays |= {f"{norm}/scale": 1 + random(32), f"{norm}/bias": random(32)}
    np.savez(tmp_path / "vit.npz", **arrays)

    vit.load_pretrained(str(tmp_path / "vit.npz"))  # timm's own reader is the reference
    model = tiny_model(layer_norm_eps=1e-6)
    load_vit_weights(model, tmp_path / "vit.npz")
    outputs = model.cts(random_images(), token_reduction=0)
    expected = vit.forward_features(random_images())
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=0, atol=1e-4)

    del arrays["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias"]
    np.savez(tmp_path / "damaged.npz", **arrays)
    with pytest.raises(ValueError, match=r"1 missing: blocks\.1\.attn\.qkv\.bias"):
        load_vit_weights(model, tmp_path / "damaged.npz")


class Call:
    """Unpickled by obedient readers as the call of a function."""

    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return (self.function, (self.argument,))


class Log:
    def __init__(self):
        self.losses, self.statistics = np.ones(3), {"mean": getattr}


def test_objects_in_a_file_become_inert(tmp_path, capsys):
    weights = {"layer.weight": torch.ones(2)}
    torch.save({"state_dict": weights, "log": Log(), "call": Call(print, "obeyed")}, tmp_path / "training.pth")
    assert read_weights(tmp_path / "training.pth").keys() == weights.keys()
    assert not capsys.readouterr().out
    torch.save({"state_dict": weights, "call": Call(os.mkdir, str(tmp_path / "obeyed"))}, tmp_path / "os.pth")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        read_weights(tmp_path / "os.pth")
    assert not (tmp_path / "obeyed").exists()
    torch.save({"state_dict": {**weights, "extra": Log()}}, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match="must hold a dictionary of tensors"):
        read_weights(tmp_path / "mixed.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        read_weights(tmp_path / "noise.pth")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="got a Tensor"):
        read_weights(tmp_path / "tensor.pth")


def test_unreadable_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors, pytorch_model\.bin, checkpoint\.pth"):
        read_weights(tmp_path)


def test_the_earlier_name_of_the_loader_still_works():
    with pytest.warns(FutureWarning, match="use that name"):
        assert conversion.load_policy_trunk is load_policy_backbone
