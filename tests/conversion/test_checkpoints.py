# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the exact file formats of other implementations, made here."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from cts_hf import CtsForSemanticSegmentation, CtsImageProcessor
from cts_hf.conversion.checkpoints import convert_checkpoint, load_policy, load_policy_folder, save_original
from cts_hf.data.benchmarks.ade20k import ADE20K_CLASSES
from cts_hf.hub.normalization import HALF, IMAGENET

from ..helpers.golden import build_golden_model, load_golden
from ..helpers.mmsegmentation import build_segmenter
from ..helpers.models import random_images, tiny_config, tiny_model, tiny_policy


def write_original(folder, weights, meta, **net_kwargs):
    """A folder as `segm.train` of CTS and Segmenter leaves it: tuples in the YAML, an optimizer beside the model."""
    net = {
        "image_size": (meta["image_height"], meta["image_width"]),
        "patch_size": meta["patch_size"],
        "d_model": meta["hidden_size"],
        "n_heads": meta["num_attention_heads"],
        "n_layers": meta["num_hidden_layers"],
        "normalization": "deit" if meta["distilled"] else "vit",
        "distilled": meta["distilled"],
        "backbone": "vit_tiny_patch16_384",
        "dropout": 0.0,
        "drop_path_rate": 0.1,
        "decoder": {"name": meta["decoder"], "drop_path_rate": 0.0, "dropout": 0.1, "n_layers": 2},
        "n_cls": meta["num_labels"],
        **net_kwargs,
    }
    if meta["decoder"] == "linear":
        net["decoder"] = {"name": "linear"}
    variant = {
        "world_batch_size": 8,
        "dataset_kwargs": {"dataset": "something", "image_size": 96, "normalization": net["normalization"]},
        "net_kwargs": net,
        "inference_kwargs": {"im_size": 96, "window_size": 64, "window_stride": 64},
    }
    folder.mkdir(exist_ok=True)
    (folder / "variant.yml").write_text(yaml.dump(variant))
    classifier = {
        "encoder.head.weight": torch.zeros(1000, meta["hidden_size"]),
        "encoder.head.bias": torch.zeros(1000),
    }
    if meta["distilled"]:
        classifier |= {name.replace("head", "head_dist"): value for name, value in classifier.items()}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    snapshot = {"model": {**weights, **classifier}, "optimizer": optimizer.state_dict(), "n_cls": meta["num_labels"]}
    torch.save({**snapshot, "lr_scheduler": {"last_epoch": 1}, "epoch": 0}, folder / "checkpoint.pth")
    return folder


@pytest.mark.parametrize("name", ["tiny_mask_cts", "tiny_linear_cts_distilled"])
@torch.no_grad()
def test_original_folder(name, tmp_path):
    golden, meta = load_golden(name)
    schedule = (meta["num_unshared"], meta["num_shared"])
    net_kwargs = {"policy_method": "policy_net", "policy_schedule": schedule, "policynet_ckpt": "elsewhere.pth"}
    model, processor = convert_checkpoint(write_original(tmp_path / "run", golden["weights"], meta, **net_kwargs))
    inputs = build_golden_model(golden, meta)[1]
    torch.testing.assert_close(model(**inputs).logits, golden["logits"], rtol=0, atol=1e-4)

    config = model.config
    assert (config.drop_path_rate, config.decoder_dropout_prob) == (
        0.1,
        0.0 if config.decoder_type == "linear" else 0.1,
    )
    assert processor.size == {"shortest_edge": 96}
    expected = IMAGENET if meta["distilled"] else HALF
    for part in (config, config.policy_config, processor):
        assert (list(part.image_mean), list(part.image_std)) == expected


@torch.no_grad()
def test_a_plain_segmenter_becomes_a_cts_model(tmp_path):
    golden, meta = load_golden("tiny_mask_cts")
    folder = write_original(tmp_path / "run", golden["weights"], meta)
    plain, processor = convert_checkpoint(folder)
    assert plain.config.token_reduction == 0
    assert plain.config.use_policy is False
    expected = plain(golden["pixel_values"]).logits

    policy = tiny_policy(superpatch_size=32)
    policy.save_pretrained(tmp_path / "policy")
    model, _ = convert_checkpoint(folder, policy=tmp_path / "policy")
    assert torch.equal(model(golden["pixel_values"]).logits, expected)
    model.save_pretrained(tmp_path / "converted")
    processor.save_pretrained(tmp_path / "converted")
    again = CtsForSemanticSegmentation.from_pretrained(tmp_path / "converted")
    outputs = again(golden["pixel_values"], token_reduction=0.5)
    assert torch.equal(outputs.policy_logits, policy(golden["pixel_values"]).logits)
    assert outputs.shared_superpatches.any()


@pytest.mark.parametrize("name", ["tiny_mask_cts", "tiny_linear_cts_distilled"])
def test_weights_that_come_without_a_normalization(name, tmp_path):
    golden, meta = load_golden(name)
    torch.save({"model": golden["weights"]}, tmp_path / "weights.pth")
    for options, expected in (
        ({}, IMAGENET if meta["distilled"] else HALF),
        ({"image_mean": 0, "image_std": [0.25, 0.25, 0.25]}, ([0.0] * 3, [0.25] * 3)),
    ):
        size = (meta["image_height"], meta["image_width"])
        model, processor = convert_checkpoint(tmp_path / "weights.pth", image_size=size, **options)
        for part in (model.config, processor):
            assert (list(part.image_mean), list(part.image_std)) == expected
    # What `variant.yml` says can be overruled; what it cannot say is refused.
    folder = write_original(tmp_path / "run", golden["weights"], meta)
    assert convert_checkpoint(folder, image_std=1)[0].config.image_std == [1.0] * 3
    folder = write_original(tmp_path / "run", golden["weights"], meta, normalization="clip")
    with pytest.raises(ValueError, match="must be one of vit, deit, got 'clip'"):
        convert_checkpoint(folder)


def test_names_and_options(tmp_path):
    golden, meta = load_golden("tiny_mask_cts")
    folder = write_original(tmp_path / "run", golden["weights"], meta)
    model, _ = convert_checkpoint(folder, class_names=["ant", "bee", "cat", "dog"])
    assert model.config.label2id == {"ant": 0, "bee": 1, "cat": 2, "dog": 3}
    assert convert_checkpoint(folder / "checkpoint.pth", token_reduction=0.25)[0].config.token_reduction == 0.25
    with pytest.raises(ValueError, match="4 classes of the weights, got 2 names"):
        convert_checkpoint(folder, class_names=["a", "b"])
    variant = yaml.unsafe_load((folder / "variant.yml").read_text())
    variant["dataset_kwargs"]["dataset"] = "ade20k"
    (folder / "variant.yml").write_text(yaml.dump(variant))
    with pytest.raises(ValueError, match=f"4 classes of the weights, got {len(ADE20K_CLASSES)} names"):
        convert_checkpoint(folder)
    (folder / "variant.yml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="must be a YAML file of options"):
        convert_checkpoint(folder)


@torch.no_grad()
def test_policies(tmp_path):
    policy = tiny_policy(superpatch_size=32, width_coefficient=1.0, depth_coefficient=1.0, output_stride=32)
    torch.save(policy.state_dict(), tmp_path / "model.pth")  # as `policynet/train.py` of CTS saves it
    loaded = load_policy(tmp_path / "model.pth")
    assert torch.equal(loaded(random_images()).logits, policy(random_images()).logits)
    torch.save({f"module.{name}": value for name, value in policy.state_dict().items()}, tmp_path / "parallel.pth")
    assert load_policy(tmp_path / "parallel.pth", tf_padding=True).config.tf_padding
    backbone = {name.removeprefix("backbone."): v for name, v in policy.state_dict().items() if "head" not in name}
    torch.save(backbone, tmp_path / "backbone.pth")
    assert load_policy(tmp_path / "backbone.pth", output_stride=8).backbone.num_features == 40

    # A backbone of timm says what it expects; the original policy network has 0.5.
    (tmp_path / "timm").mkdir()
    save_file(backbone, tmp_path / "timm" / "model.safetensors")
    description = {"pretrained_cfg": {"mean": IMAGENET.image_mean, "std": IMAGENET.image_std}}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(description))
    for source, options, expected in (
        ("timm/model.safetensors", {}, IMAGENET),
        ("model.pth", {}, HALF),
        ("backbone.pth", {}, HALF),
        ("backbone.pth", IMAGENET._asdict(), IMAGENET),
    ):
        config = load_policy(tmp_path / source, **options).config
        assert (config.image_mean, config.image_std) == expected


def test_other_checkpoints_are_refused(tmp_path):
    torch.save(tiny_policy(width_coefficient=1.0, depth_coefficient=1.0).state_dict(), tmp_path / "policy.pth")
    with pytest.raises(ValueError, match="must hold a segmentation model, got a policy: convert it"):
        convert_checkpoint(tmp_path / "policy.pth")
    torch.save(build_segmenter().state_dict(), tmp_path / "segmenter.pth")
    with pytest.raises(ValueError, match="must hold a policy, got a mmsegmentation model"):
        load_policy(tmp_path / "segmenter.pth")
    torch.save({"patch_embed.proj.weight": torch.ones(1)}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="got an image encoder: load it"):
        convert_checkpoint(tmp_path / "vit.pth")
    torch.save({"fc.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"must be a checkpoint of .* got weights of other names: fc\.weight"):
        convert_checkpoint(tmp_path / "other.pth")


ORIGINAL_OPTIONS = {"image_size": (64, 96), "patch_size": 16, "intermediate_size": 128, "policy_config": None}


@pytest.mark.parametrize("options", [{}, {"decoder_type": "linear", "use_distillation_token": True}])
@torch.no_grad()
def test_the_way_back_to_the_original(options, tmp_path):
    imagenet = IMAGENET._asdict()
    model = tiny_model(**{**ORIGINAL_OPTIONS, **options, **imagenet})
    processor = CtsImageProcessor(size={"shortest_edge": 96}, **imagenet)
    save_original(model, processor, tmp_path)
    with pytest.raises(FileExistsError, match="Remove it or name another folder"):
        save_original(model, processor, tmp_path)
    with pytest.raises(ValueError, match=r"normalize as config\.json says, .*0\.485.*, got .*0\.5, 0\.5"):
        save_original(model, CtsImageProcessor(), tmp_path / "other")
    black = {"image_mean": [0, 0, 0]}
    with pytest.raises(ValueError, match="must be those of a normalization that the original has"):
        save_original(tiny_model(**ORIGINAL_OPTIONS, **black), CtsImageProcessor(**black), tmp_path / "other")
    weights = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    assert weights["encoder.head.weight"].shape == (1000, 32)
    again, processor_again = convert_checkpoint(tmp_path)
    assert processor_again.to_dict() == processor.to_dict()
    images = random_images(width=96)
    outputs = again(images)
    assert torch.equal(outputs.logits, model(images).logits)
    assert outputs.shared_superpatches.any()


def test_what_the_original_cannot_express_is_refused(tmp_path):
    policy_config = {"tf_padding": True, "batch_norm_eps": 1e-3, "output_stride": 16, "depth_coefficient": 0.3}
    policy_config["image_mean"] = 0
    options = {"layer_norm_eps": 1e-6, "decoder_num_attention_heads": 2, "policy_config": policy_config}
    model = tiny_model(**{**ORIGINAL_OPTIONS, **options})
    with pytest.raises(ValueError, match="The original CTS cannot express") as error:
        save_original(model, CtsImageProcessor(), tmp_path / "original")
    for part in (
        "layer_norm_eps=1e-06 (original: 1e-05)",
        "decoder_layer_norm_eps=1e-06 (original: 1e-05)",
        "decoder_num_attention_heads=2 (original: 1)",
        "policy_config.tf_padding=True (original: False)",
        "policy_config.batch_norm_eps=0.001 (original: 1e-05)",
        "policy_config.output_stride=16 (original: 32)",
        "policy_config.depth_coefficient=0.3 (original: 1.0)",
        "policy_config.image_mean=[0.0, 0.0, 0.0] (original: [0.5, 0.5, 0.5])",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "original").exists()
    with pytest.raises(ValueError, match=r"express intermediate_size=64 \(original: 128\): it"):
        save_original(tiny_model(use_policy=False), CtsImageProcessor(), tmp_path / "original")
    levels = {**ORIGINAL_OPTIONS, "use_policy": False, "superpatch_levels": (2, 4), "sharing_threshold": 0.9}
    with pytest.raises(ValueError, match=r"superpatch_levels=\(2, 4\) \(original: \(2,\)\), sharing_threshold=0\.9"):
        save_original(tiny_model(**levels), CtsImageProcessor(), tmp_path / "original")
    for name, value in (("unsharing", "residual"), ("superpatch_embedding", "multiscale")):
        with pytest.raises(
            ValueError, match=f"`model` must have `{name}` .* got '{value}': they have no such weights"
        ):
            save_original(
                tiny_model(**ORIGINAL_OPTIONS, use_policy=False, **{name: value}),
                CtsImageProcessor(),
                tmp_path / "original",
            )
    # A linear decoder has no heads, and a model without policy no padding.
    options |= {"layer_norm_eps": 1e-5, "decoder_type": "linear", "use_policy": False}
    save_original(tiny_model(**{**ORIGINAL_OPTIONS, **options}), CtsImageProcessor(), tmp_path / "original")


def test_folders_that_would_give_a_random_policy_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "segmenter")
    with pytest.raises(ValueError, match="must hold a policy, got a whole segmentation model: give the folder of"):
        load_policy(tmp_path / "segmenter")
    policy = tiny_policy()
    weights = policy.state_dict()
    stem = weights["backbone.conv_stem.weight"]
    del weights["head.bias"]
    broken = {**weights, "neck.weight": torch.ones(1), "backbone.conv_stem.weight": torch.cat([stem, stem])}
    policy.save_pretrained(tmp_path / "policy", state_dict=broken)
    with pytest.raises(ValueError, match=r"config\.json describes") as error:
        load_policy_folder(tmp_path / "policy")
    for part in ("1 missing: head.bias", "1 unexpected: neck.weight", "1 misshaped: backbone.conv_stem.weight"):
        assert part in str(error.value)
    policy.save_pretrained(tmp_path / "policy")
    assert torch.equal(load_policy(tmp_path / "policy").head.bias, policy.head.bias)


@pytest.mark.parametrize(
    "name", ["checkpoint.pth", "model.safetensors", "weights.npz", "model.pth", "pytorch_model.bin", "weights.pt"]
)
@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"no weights at all", b"\x80\x02"], ids=["empty", "zip", "text", "pickle"]
)
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    source = tmp_path / name if name.startswith("weights") else tmp_path
    problem = (
        "(must be a file of weights, got one that|cannot be read as weights)" if content else ".* got an empty one"
    )
    with pytest.raises(ValueError, match=f"{name} {problem}"):
        convert_checkpoint(source)


def test_folders_where_files_are_expected_are_named(tmp_path):
    (tmp_path / "checkpoint.pth").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds none of model.safetensors, .* Name the file itself"):
        convert_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds none of"):
        load_policy(tmp_path / "checkpoint.pth")
    golden, meta = load_golden("tiny_mask_cts")
    folder = write_original(tmp_path / "run", golden["weights"], meta)
    (folder / "variant.yml").unlink()
    (folder / "variant.yml").mkdir()
    with pytest.raises(ValueError, match=r"variant\.yml must be a YAML file of options"):
        convert_checkpoint(folder)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("net_kwargs", "image_size", []),
        ("net_kwargs", "image_size", [64]),
        ("net_kwargs", "image_size", [64, "64"]),
        ("net_kwargs", "image_size", -64),
        ("net_kwargs", "image_size", {"height": 64}),
        ("net_kwargs", "patch_size", "16"),
        ("net_kwargs", "n_heads", 0),
        ("net_kwargs", "n_heads", True),
        ("net_kwargs", "dropout", "none"),
        ("net_kwargs", "drop_path_rate", float("nan")),
        ("net_kwargs", "normalization", ["vit"]),
        ("net_kwargs", "policy_schedule", [1]),
        ("net_kwargs", "policy_schedule", [0, 0]),
        ("net_kwargs", "policy_schedule", "all"),
        ("net_kwargs", "decoder", [1, 2]),
        ("net_kwargs", "decoder", {"dropout": 2}),
        ("dataset_kwargs", "image_size", [96, 96]),
        ("dataset_kwargs", "dataset", ["ade20k"]),
    ],
)
def test_options_of_another_kind_are_named(tmp_path, section, name, value):
    golden, meta = load_golden("tiny_mask_cts")
    folder = write_original(tmp_path / "run", golden["weights"], meta)
    variant = yaml.safe_load((folder / "variant.yml").read_text().replace("!!python/tuple", ""))
    variant[section][name] = value
    (folder / "variant.yml").write_text(yaml.safe_dump(variant))
    with pytest.raises(
        ValueError, match=rf"`{section}\.{name}(\.dropout)?` in .*variant\.yml must be .*, got .*: correct it"
    ):
        convert_checkpoint(folder)


def test_variants_that_are_no_text_are_named(tmp_path):
    golden, meta = load_golden("tiny_mask_cts")
    folder = write_original(tmp_path / "run", golden["weights"], meta)
    for content in ("net_kwargs: {}".encode("utf-16"), b"a: [", b"[" * 10000):
        (folder / "variant.yml").write_bytes(content)
        with pytest.raises(ValueError, match=r"variant\.yml must be a YAML file of options in UTF-8"):
            convert_checkpoint(folder)
    variant = {"net_kwargs": {"n_heads": 2}, "dataset_kwargs": "none"}
    (folder / "variant.yml").write_text(yaml.safe_dump(variant))
    with pytest.raises(ValueError, match=r"`dataset_kwargs` in .* must be a mapping, got 'none'"):
        convert_checkpoint(folder)


def test_originals_replace_no_file(tmp_path):
    model, processor = tiny_model(**ORIGINAL_OPTIONS, use_policy=False), CtsImageProcessor()
    (tmp_path / "variant.yml").write_text("mine")
    with pytest.raises(FileExistsError, match=r"variant\.yml is there already"):
        save_original(model, processor, tmp_path)
    assert (tmp_path / "variant.yml").read_text() == "mine"
    processor = CtsImageProcessor(size={"height": 64, "width": 96})
    with pytest.raises(ValueError, match="must have a size of shortest_edge"):
        save_original(model, processor, tmp_path / "original")
    assert not (tmp_path / "original").exists()


def test_setting_a_policy(tmp_path):
    for policy_loss_weight in (0.0, 0.5):
        model = CtsForSemanticSegmentation(
            tiny_config(use_policy=False, policy_loss_weight=policy_loss_weight)
        ).train()
        policy = tiny_policy(output_stride=8).requires_grad_(False)
        model.set_policy(policy)
        is_trained = policy_loss_weight > 0
        assert model.cts.policy is policy
        assert model.config.use_policy
        assert model.config.policy_config.output_stride == 8
        assert {parameter.requires_grad for parameter in policy.parameters()} == {is_trained}
        assert policy.training is is_trained
        model.save_pretrained(tmp_path)
        CtsImageProcessor().save_pretrained(tmp_path)
        again = CtsForSemanticSegmentation.from_pretrained(tmp_path)
        assert again.config.policy_config.output_stride == 8
        for name, value in again.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name

    encoder = tiny_model(use_policy=False).cts.to(torch.bfloat16)
    encoder.set_policy(tiny_policy())
    assert encoder.policy.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"`policy_config\.superpatch_size` must be 16 .* got 32"):
        model.set_policy(tiny_policy(superpatch_size=32))
    with pytest.raises(ValueError, match=r"`policy_config\.num_channels` must be 3 .* got 1"):
        model.set_policy(tiny_policy(num_channels=1))
    assert model.cts.policy is policy
