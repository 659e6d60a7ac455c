# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A few built-in scenes, and a tiny model and an image processor for them."""

from functools import cache

from cts_hf import CtsImageProcessor
from cts_hf.data import build_scenes

from .models import tiny_model


NUM_SCENES = 5


@cache
def scenes():
    return build_scenes(NUM_SCENES, image_size=80)


def scene_model(**overrides):
    # In double precision, so that rounding, which batches change, exchanges neither classes nor superpatches.
    return tiny_model(num_labels=10, **overrides).double()


def processor(shortest_edge=64):
    return CtsImageProcessor(size={"shortest_edge": shortest_edge})
