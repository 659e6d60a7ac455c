# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import transformers

from cts_hf import apply_cts

from ..helpers.existing_models import build_existing
from ..helpers.models import tiny_policy


def test_an_image_processor_for_other_channels_is_not_guessed_from(tmp_path):
    """It cannot have made the images of such a model: what they are normalized with must be said."""
    build_existing("vit", num_channels=1).save_pretrained(tmp_path)
    assert apply_cts(transformers.AutoModel.from_pretrained(tmp_path)).token_sharing.image_mean == (0.5,)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    for given in ({}, {"image_std": 0.2}):
        with pytest.raises(ValueError, match=r"`image_mean` must be given for a model of 1 channels whose image proc"):
            apply_cts(model, **given)
    with pytest.raises(ValueError, match="`image_std` must be given"):
        apply_cts(model, image_mean=0.1)
    sharing = apply_cts(model, tiny_policy(num_channels=1), image_mean=0.1, image_std=[0.2]).token_sharing
    assert (sharing.image_mean, sharing.image_std) == ((0.1,), (0.2,))
