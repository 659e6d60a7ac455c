# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import inspect
import typing

import torch
import transformers

from cts_hf import apply_cts, remove_cts
from cts_hf.existing import outputs

from ..helpers.existing_models import build_existing, random_scores
from ..helpers.models import random_images


@torch.no_grad()
def test_a_users_model_whose_annotations_cannot_be_read():
    class UsersModel(transformers.ViTModel):
        def forward(self, pixel_values: "OnlyForTypeCheckers", **kwargs) -> "OnlyForTypeCheckers":  # noqa: F821
            return super().forward(pixel_values, **kwargs)

    plain = build_existing("vit")
    model = UsersModel(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    expected, images = plain(random_images()), random_images()
    assert apply_cts(model)(images, superpatch_scores=random_scores(64, 64)).num_tokens.tolist() == [46, 46]
    assert torch.equal(remove_cts(model)(images).last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_outputs_that_no_annotation_names_are_made_before_a_model_is_compiled(monkeypatch):
    model, images = build_existing("zoedepth"), random_images()
    returned = type(model(images))
    assert returned not in typing.get_args(typing.get_type_hints(inspect.unwrap(type(model).forward))["return"])
    monkeypatch.setattr(outputs, "_DERIVED", made := {})
    apply_cts(model)
    assert returned in made
