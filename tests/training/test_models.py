# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from safetensors.torch import load_file, save_file

from cts_hf import CtsImageProcessor
from cts_hf.data import SCENE_CLASSES
from cts_hf.training import (
    DataArguments,
    ModelArguments,
    PolicySourceArguments,
    adopt_architecture,
    build_policy,
    build_segmenter,
)
from cts_hf.training.arguments import PolicyArguments

from ..helpers.models import random_images, tiny_model
from ..helpers.training_runs import TINY_MODEL, TINY_POLICY


ADDED = {"unsharing": "residual", "superpatch_embedding": "multiscale"}


def save(folder, **options):
    model = tiny_model(**{"num_labels": len(SCENE_CLASSES), **options})
    model.save_pretrained(folder)
    CtsImageProcessor().save_pretrained(folder)
    return model


def build(scenes, **options):
    args = ModelArguments(**options)
    adopt_architecture(args)
    data = DataArguments(data_dir=str(scenes)).load()
    policy = None if args.model else build_policy(PolicyArguments(**TINY_POLICY), args.patch_size)
    return args, build_segmenter(args, policy, PolicySourceArguments(), data, 64).eval()


@pytest.mark.parametrize("num_labels", [5, len(SCENE_CLASSES)])
@torch.no_grad()
def test_a_trained_model_is_given_weights_that_change_nothing(scenes, tmp_path, capsys, num_labels):
    trained, images = save(tmp_path, num_labels=num_labels), random_images()
    _, model = build(scenes, model=str(tmp_path), **ADDED)
    printed = capsys.readouterr().out
    for name, value in ADDED.items():
        assert f"has no weights for {name} '{value}': they are new, and start so that they change nothing" in printed
    expected = trained.cts(images, token_reduction=0.3).last_hidden_state
    assert torch.equal(model.cts(images, token_reduction=0.3).last_hidden_state, expected)
    if num_labels == len(SCENE_CLASSES):
        assert torch.equal(model(images, token_reduction=0.3).logits, trained(images, token_reduction=0.3).logits)
    assert model.unsharing_residual.output_projection.weight.shape[0] == len(SCENE_CLASSES)


def test_a_trained_model_keeps_its_weights(scenes, tmp_path, capsys):
    trained = save(tmp_path, num_labels=5, **ADDED)  # other classes: those of the residual are new
    torch.nn.init.normal_(trained.unsharing_residual.gate.weight)
    trained.save_pretrained(tmp_path)
    args, model = build(scenes, model=str(tmp_path))
    assert {name: getattr(args, name) for name in ADDED} == ADDED
    assert torch.equal(model.unsharing_residual.gate.weight, trained.unsharing_residual.gate.weight)
    assert "no weights" not in capsys.readouterr().out
    for name, value in {"unsharing": "copy", "superpatch_embedding": "projection"}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be '{ADDED[name]}', as .* got '{value}': leave it out"):
            build(scenes, model=str(tmp_path), **{name: value})


def test_weights_that_a_folder_should_have_are_missed(scenes, tmp_path):
    save(tmp_path, **ADDED)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["unsharing_residual.gate.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing: unsharing_residual\.gate\.weight"):
        build(scenes, model=str(tmp_path))


@pytest.mark.parametrize("name", ADDED)
def test_weights_that_nothing_would_train_are_refused(scenes, tmp_path, name):
    options = {name: ADDED[name], "token_reduction": 0}
    with pytest.raises(ValueError, match=f"`token_reduction` must be above 0 to train a model with {name} .* got 0"):
        build(scenes, **TINY_MODEL, **options)
    save(tmp_path)
    frozen = {"model": str(tmp_path), "freeze_encoder": True}
    if name == "superpatch_embedding":
        with pytest.raises(ValueError, match=r"`superpatch_embedding` must be 'projection' where .* got 'multiscale'"):
            build(scenes, **frozen, superpatch_embedding="multiscale")
        save(tmp_path, superpatch_embedding="multiscale")
    _, model = build(scenes, **frozen, unsharing="residual")
    assert all(parameter.requires_grad for parameter in model.unsharing_residual.parameters())
    assert not any(parameter.requires_grad for parameter in model.cts.parameters())


def test_a_new_model_has_them_as_asked(scenes):
    _, model = build(scenes, **TINY_MODEL, **ADDED)
    assert {name: getattr(model.config, name) for name in ADDED} == ADDED
    args, model = build(scenes, **TINY_MODEL)
    assert (args.unsharing, model.config.unsharing, model.unsharing_residual) == (None, "copy", None)
