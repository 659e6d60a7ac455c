# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What images are normalized with: what weights expect, what the policy sees, and image processors that disagree."""

import json
import logging

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from cts_hf import CtsForSemanticSegmentation, CtsImageProcessor
from cts_hf.conversion import load_policy_backbone, load_vit_weights
from cts_hf.conversion.normalization import weights_normalization
from cts_hf.hub.loading import load_config, load_processor, load_segmenter
from cts_hf.hub.normalization import (
    HALF,
    IMAGENET,
    Normalization,
    check_normalization,
)
from cts_hf.training import save_model_folder

from ..helpers.models import TINY_BACKBONE, random_images, tiny_model, tiny_policy


# Numbers that float32 has exactly, and quotients that it has exactly, too: renormalizing them rounds nothing.
EXACT, EXACT_OF_POLICY = Normalization([0.5, 0.25, 0.0], [0.5, 0.25, 1.0]), Normalization([0.25] * 3, [0.5] * 3)


def normalize(images, normalization):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalization)
    return (images - mean) / std


def raw_images(batch_size=2, height=41, width=70):
    """Pixels from 0 to 1 in steps of 1 / 256, in which `EXACT` normalizes without rounding."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch_size, 3, height, width), generator=generator) / 256


def model_of(normalization, policy_normalization, **options):
    return tiny_model(
        **normalization._asdict(), policy_config={**TINY_BACKBONE, **policy_normalization._asdict()}, **options
    )


@pytest.mark.parametrize(("height", "width"), [(64, 64), (41, 70)])
@torch.no_grad()
def test_the_policy_sees_what_it_would_see_alone(height, width):
    images = raw_images(height=height, width=width)
    model = model_of(EXACT, EXACT_OF_POLICY)
    expected = model.cts.policy(normalize(images, EXACT_OF_POLICY)).logits
    assert torch.equal(model(normalize(images, EXACT)).policy_logits, expected)
    # The encoder sees what it always saw.
    scores = expected[:, 1] - expected[:, 0]
    same = model_of(HALF, HALF)
    assert torch.equal(
        model(normalize(images, EXACT)).logits, same(normalize(images, EXACT), superpatch_scores=scores).logits
    )


@torch.no_grad()
def test_the_policy_of_a_padded_batch_sees_zeros_as_padding():
    model = model_of(EXACT, EXACT_OF_POLICY)
    images, pixel_mask = raw_images(), torch.zeros(2, 41, 70)
    pixel_mask[0], pixel_mask[1, :33, :50] = 1, 1
    seen = []
    model.cts.policy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(normalize(images, EXACT), pixel_mask=pixel_mask)
    assert torch.equal(seen[0], normalize(images, EXACT_OF_POLICY) * pixel_mask[:, None])


@torch.no_grad()
def test_equal_normalizations_change_nothing():
    images = random_images(height=41)
    for normalization in (HALF, IMAGENET):
        model = model_of(normalization, normalization)
        seen = []
        model.cts.policy.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        outputs = model(images)
        assert seen[0] is images
        assert torch.equal(outputs.logits, tiny_model()(images).logits)


@torch.no_grad()
def test_rounding_is_that_of_float32_in_a_model_of_half_precision():
    model = model_of(HALF, IMAGENET).to(torch.bfloat16)
    images = raw_images()
    seen = []
    model.cts.policy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(normalize(images, HALF))
    assert seen[0].dtype == torch.float32
    # Scale, shift, mean, standard deviation and four results are rounded, each by 2**-23 at most: numbers below 4.
    torch.testing.assert_close(seen[0], normalize(images, IMAGENET), rtol=0, atol=8 * 2**-23)


@torch.no_grad()
def test_on_the_meta_device():
    with torch.device("meta"):
        assert model_of(HALF, IMAGENET)(torch.zeros(1, 3, 41, 64)).policy_logits.shape == (1, 2, 3, 4)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_and_exported():
    images = random_images(height=41)
    # Several in one process, as dynamo takes numbers that changed for variables.
    for own, of_policy in ((HALF, HALF), (IMAGENET, IMAGENET), (IMAGENET, HALF), (HALF, IMAGENET)):
        model = model_of(own, of_policy)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(images).policy_logits, model(images).policy_logits)
    program = torch.export.export(model, (images,))
    assert torch.equal(program.module()(images).policy_logits, model(images).policy_logits)


@pytest.mark.parametrize("part", ["", "policy_config."])
@torch.no_grad()
def test_a_normalization_that_is_set_afterwards_is_completed_or_refused(part):
    model = model_of(HALF, HALF)
    expected = model(random_images()).policy_logits
    config = model.config.policy_config if part else model.config
    for value in (None, 0.5, (0.5, 0.5, 0.5)):
        config.image_mean = value
        assert torch.equal(model(random_images()).policy_logits, expected)
    for value in ([0.4], [float("nan")] * 3):
        config.image_mean = value
        with pytest.raises(ValueError, match=rf"`{part}image_mean` must be finite numbers, .* 3 channels .* got"):
            model(random_images())


@torch.no_grad()
def test_a_policy_keeps_its_normalization_in_another_model(tmp_path):
    images = raw_images()
    model = tiny_model(use_policy=False, **EXACT._asdict())
    policy = tiny_policy(**EXACT_OF_POLICY._asdict())
    model.set_policy(policy)
    model.save_pretrained(tmp_path)
    for given in (model, CtsForSemanticSegmentation.from_pretrained(tmp_path)):
        assert (given.config.image_mean, given.config.image_std) == EXACT
        assert (given.cts.policy.config.image_mean, given.cts.policy.config.image_std) == EXACT_OF_POLICY
        logits = given(normalize(images, EXACT), token_reduction=0.3).policy_logits
        assert torch.equal(logits, policy(normalize(images, EXACT_OF_POLICY)).logits)


TIMM = {"architecture": "vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 1.0}}
OLD_TIMM = {"architecture": "vit", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
TRANSFORMERS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}
KNOWN = Normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
DESCRIPTIONS = [
    ({"config.json": TIMM}, KNOWN),
    ({"config.json": OLD_TIMM}, KNOWN),
    ({"config.json": {"model_type": "vit"}, "preprocessor_config.json": TRANSFORMERS}, KNOWN),
    ({"preprocessor_config.json": {**TRANSFORMERS, "do_normalize": False}}, Normalization([0.0] * 3, [1.0] * 3)),
    ({"config.json": {"model_type": "vit"}}, None),
    ({}, None),
]


@pytest.mark.parametrize(("files", "expected"), DESCRIPTIONS)
def test_folders_and_repositories_say_it(files, expected, tmp_path, monkeypatch):
    save_file({"pos_embed": torch.zeros(1)}, tmp_path / "model.safetensors")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert weights_normalization(tmp_path) == expected
    assert weights_normalization(tmp_path / "model.safetensors") == expected
    # Files with names of their own may lie anywhere.
    (tmp_path / "vit.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert weights_normalization(tmp_path / "vit.safetensors") is None

    def download(repo_id, name):
        assert repo_id == "timm/vit"
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr("cts_hf.conversion.weight_files.hf_hub_download", download)
    assert weights_normalization("timm/vit") == expected


def test_what_cannot_be_asked_is_not_taken_for_unknown(tmp_path, monkeypatch):
    save_file({"pos_embed": torch.zeros(1)}, tmp_path / "model.safetensors")

    def download(repo_id, name):
        if name != "model.safetensors":
            raise LocalEntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr("cts_hf.conversion.weight_files.hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=r"timm/vit may have a config\.json .*give both `image_mean`"):
        weights_normalization("timm/vit")
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"config\.json must be a JSON file, got something else"):
        weights_normalization(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth is neither a file"):
        weights_normalization(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pos_embed", "dist_token"], IMAGENET),
        (["deit.embeddings.distillation_token"], IMAGENET),
        (["_conv_stem.weight"], HALF),
        (["pos_embed"], None),
        (["conv_stem.weight"], None),
    ],
)
def test_weights_that_are_known_by_their_names(names, expected, tmp_path):
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "weights.pth")
    assert weights_normalization(tmp_path / "weights.pth") == expected


def test_googles_files_are_known(tmp_path):
    np.savez(tmp_path / "vit.npz", **{"Transformer/posembed_input/pos_embedding": np.zeros(1)})
    assert weights_normalization(tmp_path / "vit.npz") == HALF


def timm_vit_weights(distilled=False):
    pytest.importorskip("timm")
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    vit_class = VisionTransformerDistilled if distilled else VisionTransformer
    return vit_class(img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2).state_dict()


def logged(caplog):
    return [record.getMessage() for record in caplog.records if "what the weights of" in record.getMessage()]


@pytest.fixture
def caplog(caplog, monkeypatch):
    # transformers keeps its records from the root logger, where pytest listens.
    monkeypatch.setattr(logging.getLogger("cts_hf"), "propagate", True)
    return caplog


def test_a_model_records_what_the_weights_it_loads_expect(tmp_path, caplog):
    weights = timm_vit_weights()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    torch.save(weights, tmp_path / "vit.pth")
    model = tiny_model()
    load_vit_weights(model, tmp_path)
    assert (model.config.image_mean, model.config.image_std) == KNOWN
    assert (model.config.policy_config.image_mean, model.config.policy_config.image_std) == HALF
    assert not logged(caplog)

    # Nothing says: the model's stays, and this is logged.
    load_vit_weights(model, tmp_path / "vit.pth")
    assert (model.config.image_mean, model.config.image_std) == KNOWN
    (message,) = logged(caplog)
    assert "vit.pth" in message
    assert str(KNOWN._asdict()) in message
    # The caller says it, of known weights too.
    for source in (tmp_path, tmp_path / "vit.pth"):
        load_vit_weights(model, source, image_mean=0.5, image_std=[0.5, 0.5, 0.5])
        assert (model.config.image_mean, model.config.image_std) == HALF
    assert len(logged(caplog)) == 1
    load_vit_weights(model, tmp_path, image_std=1)
    assert (model.config.image_mean, model.config.image_std) == (KNOWN.image_mean, [1.0] * 3)
    with pytest.raises(ValueError, match=r"`image_std` must be numbers above 0, .* got 0"):
        load_vit_weights(model, tmp_path, image_std=0)

    deit = tiny_model(use_distillation_token=True)
    torch.save(timm_vit_weights(distilled=True), tmp_path / "deit.pth")
    load_vit_weights(deit, tmp_path / "deit.pth")
    assert (deit.config.image_mean, deit.config.image_std) == IMAGENET


def test_weights_that_do_not_fit_leave_the_configuration(tmp_path):
    save_file(timm_vit_weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    model = tiny_model(intermediate_size=128)
    with pytest.raises(ValueError, match="do not fit"):
        load_vit_weights(model, tmp_path)
    assert (model.config.image_mean, model.config.image_std) == HALF


def test_a_policy_records_what_its_backbone_expects(tmp_path):
    timm = pytest.importorskip("timm")
    save_file(timm.create_model("efficientnet_lite0").state_dict(), tmp_path / "model.safetensors")
    cfg = timm.get_pretrained_cfg("efficientnet_lite0.ra_in1k")
    description = {"architecture": "efficientnet_lite0", "pretrained_cfg": {"mean": cfg.mean, "std": cfg.std}}
    (tmp_path / "config.json").write_text(json.dumps(description))
    model = tiny_model(policy_config={"output_stride": 8})
    load_policy_backbone(model.cts.policy, tmp_path)
    assert (model.config.policy_config.image_mean, model.config.policy_config.image_std) == IMAGENET
    assert (model.config.image_mean, model.config.image_std) == HALF
    load_policy_backbone(model.cts.policy, tmp_path, image_mean=0.5, image_std=0.5)
    assert (model.config.policy_config.image_mean, model.config.policy_config.image_std) == HALF


def test_image_processors_that_disagree_are_refused():
    config = tiny_model(**IMAGENET._asdict()).config
    check_normalization(config, CtsImageProcessor(**IMAGENET._asdict()))
    with pytest.raises(ValueError, match=r"as config\.json says, .*0\.485.* got .*\[0\.5, 0\.5, 0\.5\].*correct"):
        check_normalization(config, CtsImageProcessor())
    with pytest.raises(ValueError, match=r"got .*\[0\.0, 0\.0, 0\.0\].*\[1\.0, 1\.0, 1\.0\]"):
        check_normalization(config, CtsImageProcessor(**IMAGENET._asdict(), do_normalize=False))


def test_a_model_is_not_saved_with_another_image_processor(tmp_path):
    with pytest.raises(ValueError, match=r"as config\.json says"):
        save_model_folder(tmp_path / "run", tiny_model(), CtsImageProcessor(image_mean=0), (), {})
    assert not (tmp_path / "run").exists()


def save_old(folder, processor):
    """A model as it was saved before configurations recorded the normalization."""
    tiny_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["policy_config"]):
        del part["image_mean"], part["image_std"]
    (folder / "config.json").write_text(json.dumps(config))


def test_a_configuration_of_old_is_completed_by_the_image_processor(tmp_path):
    save_old(tmp_path, CtsImageProcessor(**IMAGENET._asdict()))
    model = load_segmenter(tmp_path)
    for config in (model.config, model.cts.policy.config, load_config(tmp_path)):
        assert (config.image_mean, config.image_std) == IMAGENET
    check_normalization(model.config, load_processor(tmp_path))
    assert load_segmenter(tmp_path, image_mean=0).config.image_mean == [0.0] * 3
    # Recorded, it counts.
    model.save_pretrained(tmp_path)
    CtsImageProcessor().save_pretrained(tmp_path)
    assert load_config(tmp_path).image_mean == IMAGENET.image_mean
    with pytest.raises(ValueError, match=r"as config\.json says, with .*0\.485.* got .*0\.5"):
        load_processor(tmp_path)
    # What has no image processor is not refused before one is needed.
    save_old(tmp_path, CtsImageProcessor())
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_segmenter(tmp_path).config.image_mean == HALF.image_mean


def test_a_policy_that_names_no_normalization_has_the_models():
    model = tiny_model(image_mean=IMAGENET.image_mean, policy_config={**TINY_BACKBONE, "image_mean": None})
    assert model.config.policy_config.image_mean == model.config.image_mean == IMAGENET.image_mean
