# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModel, pipeline

from cts_hf import CtsPolicyModel, apply_cts, load_cts, remove_cts, save_cts
from cts_hf.existing.saving import load_existing

from ..helpers.existing_models import build_existing, call_existing
from ..helpers.models import random_images, tiny_policy
from .test_apply import random_scores, states


SHARING = "token_sharing/token_sharing.json"


@pytest.mark.parametrize("name", ["dinov2", "beit_segmentation", "upernet_dinov2", "depth_anything", "eomt", "dinov3"])
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    plain = build_existing(name)
    images = random_images()
    expected = states(call_existing(plain, name, images))
    model = apply_cts(plain, tiny_policy(), 0.4, image_mean=[0.1, 0.2, 0.3], image_std=0.5)
    save_cts(model, tmp_path)
    loaded = load_cts(tmp_path, attn_implementation="eager")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.token_sharing.token_reduction == 0.4
    assert loaded.token_sharing.image_mean == (0.1, 0.2, 0.3)
    # Not to the bit: where weights lie in memory decides how convolutions round.
    close = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(
        states(call_existing(loaded, name, images)), states(call_existing(model, name, images)), **close
    )
    # Without this package it is upstream's own checkpoint.
    again, info = type(model).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(states(call_existing(again, name, images)), expected, **close)
    policy = CtsPolicyModel.from_pretrained(tmp_path, subfolder="token_sharing")
    assert torch.equal(policy(images).logits, model.token_sharing.policy(images).logits)


def test_without_policy_over_an_earlier_model(tmp_path):
    save_cts(apply_cts(build_existing("dinov2"), tiny_policy()), tmp_path)
    save_cts(apply_cts(build_existing("dinov2", seed=1), token_reduction=0.2), tmp_path)
    loaded = load_cts(tmp_path)
    assert loaded.token_sharing.policy is None
    assert loaded.token_sharing.token_reduction == 0.2
    with pytest.raises(ValueError, match="without a policy"):
        loaded(random_images())
    assert loaded(random_images(), superpatch_scores=random_scores(64, 64)).num_tokens.tolist() == [52, 52]


def test_options_of_from_pretrained(tmp_path):
    save_cts(apply_cts(build_existing("dinov2"), tiny_policy()), tmp_path / "a" / "b")
    model = load_cts(tmp_path / "a", subfolder="b", dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert load_cts(tmp_path / "a" / "b", device_map="cpu")(random_images()).shared_superpatches.any()


def random_picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8))


PROCESSORS = {
    "beit_segmentation": "BeitImageProcessor",
    "upernet_dinov2": "SegformerImageProcessor",
    "eomt": "EomtImageProcessor",
    "mask2former": "Mask2FormerImageProcessor",
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pipeline_of_segmentation(name, tmp_path):
    size = {"shortest_edge": 64, "longest_edge": 64} if name == "eomt" else {"height": 64, "width": 64}
    options = {"do_pad": True} if name == "eomt" else {}
    processor = getattr(transformers, PROCESSORS[name])(size=size, **options)
    save_cts(apply_cts(build_existing(name), tiny_policy()), tmp_path)
    processor.save_pretrained(tmp_path)
    segment = pipeline("image-segmentation", model=load_cts(tmp_path), image_processor=str(tmp_path))
    regions = segment(random_picture(), subtask="semantic")
    assert all(np.asarray(region["mask"]).shape == (80, 96) for region in regions)


def test_pipeline_of_depth(tmp_path):
    model = apply_cts(build_existing("depth_anything"), tiny_policy())
    processor = transformers.DPTImageProcessor(size={"height": 64, "width": 64})
    estimate = pipeline("depth-estimation", model=model, image_processor=processor)
    assert estimate(random_picture())["depth"].size == (96, 80)


def test_refusals(tmp_path):
    model = build_existing("dinov2")
    with pytest.raises(ValueError, match="that shares no tokens: call `apply_cts` first"):
        save_cts(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"got none with token_sharing/token_sharing.json: open other models"):
        load_cts(tmp_path)
    apply_cts(model, tiny_policy())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`folder` must be a folder"):
        save_cts(model, tmp_path / "file")
    save_cts(model, tmp_path)
    for damage in ("{", "[]", "{}", '"x"', json.dumps({"policy": 1, "token_reduction": 0.3})):
        (tmp_path / SHARING).write_text(damage)
        with pytest.raises(ValueError, match=r"token_sharing.json in .* cannot be read"):
            load_cts(tmp_path)
    save_cts(model, tmp_path)
    options = json.loads((tmp_path / SHARING).read_text())
    for changed in ({"token_reduction": 2}, {"image_mean": [0.1, "x", 0.3]}, {"image_std": 3}, {"policy": "yes"}):
        (tmp_path / SHARING).write_text(json.dumps({**options, **changed}))
        with pytest.raises(ValueError, match=r"token_sharing.json in .* cannot be read"):
            load_cts(tmp_path)
    save_cts(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for architecture in ("OfNobody", "AutoModel", "torch"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        with pytest.raises(ValueError, match=rf"must hold a model of transformers .*, got '{architecture}'"):
            load_cts(tmp_path)


def test_any_model_is_opened_with_what_it_shares_by(tmp_path):
    model = build_existing("dinov2")
    model.save_pretrained(tmp_path)
    assert not hasattr(load_existing(tmp_path), "token_sharing")
    save_cts(apply_cts(model, token_reduction=0.2), tmp_path / "inner")
    assert load_existing(tmp_path / "inner").token_sharing.token_reduction == 0.2
    assert load_existing(tmp_path, subfolder="inner").token_sharing.token_reduction == 0.2
    remove_cts(model).layernorm.weight.data.fill_(torch.inf)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold finite weights, got .*layernorm.weight"):
        load_existing(tmp_path)


def test_incomplete_weights_are_refused(tmp_path):
    model = apply_cts(build_existing("dinov2"), tiny_policy())
    model.layernorm.weight.data.fill_(torch.inf)
    save_cts(model, tmp_path)
    with pytest.raises(ValueError, match=r"must hold finite weights, got .*layernorm.weight"):
        load_cts(tmp_path)
    model.token_sharing.policy.head.weight.data.fill_(torch.nan)
    model.layernorm.weight.data.fill_(1.0)
    save_cts(model, tmp_path)
    with pytest.raises(ValueError, match=r"must hold finite weights, got NaN or infinity in weights of the policy"):
        load_cts(tmp_path)
    assert AutoModel.from_pretrained(tmp_path) is not None
