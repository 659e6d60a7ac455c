import pytest
import torch

from cts_hf.conversion import convert_policy, convert_segmenter

from .golden import TINY, build_golden_model, load_golden
from .models import random_images


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
    with pytest.raises(ValueError, match="patch_size=16, got patch_size=8"):
        convert_segmenter(golden["weights"], image_size=64, patch_size=8)


def test_weights_of_something_else_are_refused():
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight' is missing among 1 tensors \(model\)"):
        convert_segmenter({"model": torch.zeros(1)}, image_size=64)
    with pytest.raises(ValueError, match="7 stages, or 5 or 3 of them, got weights of 0"):
        convert_policy({"model": torch.zeros(1)})


def trunk_weights():
    torch.manual_seed(0)
    timm = pytest.importorskip("timm")
    return timm.create_model("efficientnet_lite0", pretrained=False).state_dict()


@torch.no_grad()
def test_policy_from_a_trunk_and_from_a_whole_policy():
    trunk = trunk_weights()
    half = convert_policy(trunk, output_stride=16)
    assert len(half.backbone.blocks) == 5
    assert torch.equal(half.backbone.conv_stem.weight, trunk["conv_stem.weight"])
    for prefix in ("", "policy_net."):
        again = convert_policy({f"{prefix}{name}": value for name, value in half.state_dict().items()})
        assert again.config.output_stride == 16
        assert torch.equal(again(random_images()).logits, half(random_images()).logits)
    assert convert_policy(trunk).config.output_stride == 32


def test_missing_weights_of_a_trunk_are_listed():
    trunk = trunk_weights()
    del trunk["blocks.1.0.bn2.running_var"]
    with pytest.raises(ValueError, match=r"1 missing: backbone\.blocks\.1\.0\.bn2\.running_var"):
        convert_policy(trunk)
    del trunk["blocks.1.0.bn2.num_batches_tracked"]
    trunk["blocks.1.0.bn2.running_var"] = torch.ones(96)
    convert_policy(trunk)
