# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from cts_hf.evaluation.metrics import policy_scores
from cts_hf.evaluation.segmentation import PreparedImage, of_process, segment_batches
from cts_hf.evaluation.windows import Box, InferenceOptions, View, segment, window_boxes, with_flips

from ..helpers.models import random_images, tiny_model


def prepared(name, *sizes):
    images = [random_images(1, *size, seed=seed) for seed, size in enumerate(sizes)]
    return PreparedImage(name, images, size=(50, 70))


def test_images_of_a_batch_come_with_what_the_model_did_with_each():
    model = tiny_model(token_reduction=0.3)
    batches = [[prepared("a", (64, 64)), prepared("b", (64, 96))], [prepared("c", (64, 64))]]
    segmentations = list(segment_batches(model, batches))
    assert [segmentation.source for segmentation in segmentations] == ["a", "b", "c"]
    for segmentation, image in zip(segmentations, [image for batch in batches for image in batch], strict=True):
        with torch.no_grad():
            outputs = model(image.inputs[0])
        (done,) = segmentation.passes
        height, width = image.inputs[0].shape[-2:]
        assert done.windows == ((height, width), False, [Box(0, 0, height, width)])
        assert torch.equal(done.shared_superpatches, outputs.shared_superpatches)
        torch.testing.assert_close(done.scores, policy_scores(outputs.policy_logits))
        assert segmentation.class_ids.shape == (50, 70)


def test_every_pass_of_scales_flips_and_windows_is_reported():
    model, image = tiny_model(), prepared("a", (64, 96), (32, 48))
    options = InferenceOptions(scales=[1.0, 0.5], window=48, stride=32, flip=True, batch_size=2)
    (segmentation,) = segment_batches(model, [[image]], options, token_reduction=0.6)
    sizes = [(64, 96), (64, 96), (48, 72), (48, 72)]  # the small one is enlarged to the window
    expected = []
    for size, flipped in zip(sizes, [False, True, False, True], strict=True):
        boxes = window_boxes(*size, 48, 32)
        expected += [(size, flipped, boxes[start : start + 2]) for start in range(0, len(boxes), 2)]
    assert [done.windows for done in segmentation.passes] == expected
    for done in segmentation.passes:
        assert done.scores.shape == done.shared_superpatches.shape == (len(done.windows.boxes), 3, 3)
        assert done.shared_superpatches.flatten(1).sum(1).tolist() == [7] * len(done.windows.boxes)
    views = with_flips([View(pixel_values) for pixel_values in image.inputs])
    probabilities = segment(model, views, image.size, 48, 32, 2, token_reduction=0.6)
    assert torch.equal(segmentation.class_ids, probabilities.argmax(0))


@pytest.mark.parametrize("options", [{}, {"window": 48, "stride": 32, "flip": True}])
def test_given_scores_replace_the_policy(options):
    model = tiny_model()
    model.cts.policy.register_forward_hook(lambda *_: pytest.fail("the policy ran"))
    numbers, asked = count(), []

    def scores(source, windows):
        asked.append((source, windows))
        rows, columns = (-(-side // 16) for side in (windows.boxes[0].bottom, windows.boxes[0].right))
        return torch.full((len(windows.boxes), rows, columns), float(next(numbers)))

    batch = [prepared("a", (64, 64)), prepared("b", (64, 64))]
    settings = {"token_reduction": 0.3, "superpatch_scores": scores}
    segmentations = list(segment_batches(model, [batch], InferenceOptions(**options), **settings))
    passes = [(each.source, done) for each in segmentations for done in each.passes]
    assert [(source, done.windows) for source, done in passes] == asked
    assert [done.scores.unique().tolist() for _, done in passes] == [[index] for index in range(len(asked))]


def test_without_sharing_there_are_no_scores():
    (segmentation,) = segment_batches(tiny_model(use_policy=False), [[prepared("a", (64, 64))]], token_reduction=0)
    assert segmentation.passes[0].scores is None
    assert not segmentation.passes[0].shared_superpatches.any()


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
def test_each_item_is_dealt_out_to_one_process(num_processes):
    items = list(range(7))
    processes = [SimpleNamespace(process_index=rank, num_processes=num_processes) for rank in range(num_processes)]
    for given in (lambda: items, lambda: iter(items)):
        dealt = [of_process(given(), process) for process in processes]
        assert sorted(item for part in dealt for item in part) == items
    assert list(of_process(items, None)) == items


@pytest.mark.parametrize(
    "options", [InferenceOptions(), InferenceOptions(window=48, flip=True)], ids=["whole", "views"]
)
def test_logits_that_are_nan_are_no_segmentation(options):
    model = tiny_model()
    model.decode_head.mask_norm.bias.data.fill_(float("nan"))
    images = [PreparedImage("a", [random_images(1)], (64, 64))]
    with pytest.raises(ValueError, match="The model's logits must be numbers, got NaN"):
        list(segment_batches(model, [images], options, token_reduction=0))
