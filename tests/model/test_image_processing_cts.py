# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Image processors: what both backends must do alike, and post-processing against its plain definition."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cts_hf.model.image_processing_cts import CtsImageProcessor
from cts_hf.model.image_processing_pil_cts import CtsImageProcessorPil


@pytest.fixture(params=[CtsImageProcessor, CtsImageProcessorPil], ids=["torchvision", "pil"])
def processor(request):
    return request.param(size={"shortest_edge": 32})


def picture(height, width, seed=0):
    """A smooth random RGB image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def label_map(height, width, num_labels=256, seed=0):
    return np.random.default_rng(seed).integers(0, num_labels, (height, width), dtype=np.int32)


def naive_argmax(logits, size):
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (None, (512, 768)),
        (64, (64, 96)),
        ({"shortest_edge": 64}, (64, 96)),
        ({"shortest_edge": 64, "longest_edge": 81}, (54, 81)),
        ({"height": 48, "width": 40}, (48, 40)),
    ],
)
@pytest.mark.parametrize("cls", [CtsImageProcessor, CtsImageProcessorPil])
def test_sizes(cls, size, expected):
    processor = cls() if size is None else cls(size=size)
    inputs = processor(picture(60, 90), label_map(60, 90), return_tensors="pt")
    assert set(inputs) == {"pixel_values", "labels"}
    assert inputs["pixel_values"].shape == (1, 3, *expected)
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["labels"].shape == (1, *expected)
    assert inputs["labels"].dtype == torch.int64


def test_values_are_scaled_to_plus_minus_one(processor):
    black_and_white = np.stack([np.zeros((32, 40, 3), np.uint8), np.full((32, 40, 3), 255, np.uint8)])
    pixel_values = processor(black_and_white, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values[0], torch.full((3, 32, 40), -1.0))
    torch.testing.assert_close(pixel_values[1], torch.full((3, 32, 40), 1.0))


@pytest.mark.parametrize("as_input", [lambda im: im, np.array, lambda im: torch.from_numpy(np.array(im))])
@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 61), (20, 25)])
def test_backends_agree(as_input, height, width):
    images = [as_input(picture(height, width)), as_input(picture(64, 48, seed=1))]
    maps = [label_map(height, width), label_map(64, 48)]
    one, other = (
        cls(size={"shortest_edge": 32}, do_reduce_labels=True)(images, maps, return_tensors="pt")
        for cls in (CtsImageProcessor, CtsImageProcessorPil)
    )
    assert set(one) == set(other)
    # torchvision and Pillow round 8-bit results differently: by one grey level, 2 / 255 after normalization.
    torch.testing.assert_close(one["pixel_values"], other["pixel_values"], atol=2.01 / 255, rtol=0)
    assert torch.equal(one["labels"], other["labels"])
    assert torch.equal(one["pixel_mask"], other["pixel_mask"])


def test_grey_and_transparent_images_become_rgb(processor):
    image = picture(40, 50)
    inputs = processor([image.convert("L"), image.convert("RGBA"), image], return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 32, 40)
    assert torch.equal(inputs["pixel_values"][1], inputs["pixel_values"][2])


def test_images_of_different_sizes_are_padded(processor):
    sizes = [(64, 64), (32, 48), (80, 40)]
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    maps = [label_map(*size, seed=i) for i, size in enumerate(sizes)]
    inputs = processor(images, maps, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 64, 48)
    assert inputs["labels"].shape == inputs["pixel_mask"].shape == (3, 64, 48)
    assert inputs["labels"].dtype == inputs["pixel_mask"].dtype == torch.int64
    for i, (height, width) in enumerate([(32, 32), (32, 48), (64, 32)]):
        alone = processor(images[i], maps[i], return_tensors="pt")
        assert set(alone) == {"pixel_values", "labels"}
        assert torch.equal(inputs["pixel_values"][i, :, :height, :width], alone["pixel_values"][0])
        assert torch.equal(inputs["labels"][i, :height, :width], alone["labels"][0])
        padding = torch.ones(64, 48, dtype=torch.bool)
        padding[:height, :width] = False
        assert torch.equal(inputs["pixel_mask"][i], (~padding).long())
        assert (inputs["pixel_values"][i][:, padding] == 0).all()
        assert (inputs["labels"][i][padding] == 255).all()


def test_no_mask_without_padding(processor):
    # Different at first, equal once resized.
    inputs = processor([picture(64, 96), picture(32, 48)], return_tensors="pt")
    assert set(inputs) == {"pixel_values"}
    assert inputs["pixel_values"].shape == (2, 3, 32, 48)


def test_pad_size(processor):
    inputs = processor(picture(64, 96), pad_size={"height": 40, "width": 64}, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 40, 64)
    assert inputs["pixel_mask"].sum() == 32 * 48


def test_without_padding_a_mixed_list_stays_a_list(processor):
    images = [picture(64, 64), picture(32, 48)]
    maps = [label_map(64, 64), label_map(32, 48)]
    inputs = processor(images, maps, do_pad=False)
    assert set(inputs) == {"pixel_values", "labels"}
    assert [tuple(x.shape) for x in inputs["pixel_values"]] == [(3, 32, 32), (3, 32, 48)]
    assert [tuple(x.shape) for x in inputs["labels"]] == [(32, 32), (32, 48)]
    with pytest.raises(ValueError, match="Unable to convert output 'pixel_values'"):
        processor(images, do_pad=False, return_tensors="pt")


@pytest.mark.parametrize(("height", "width"), [(80, 120), (21, 33), (32, 32)])
def test_labels_are_resized_to_the_nearest(processor, height, width):
    labels = label_map(height, width)
    result = processor(picture(height, width), labels, return_tensors="pt").labels[0]
    expected = Image.fromarray(labels).resize((result.shape[1], result.shape[0]), Image.Resampling.NEAREST)
    assert np.array_equal(result, np.array(expected))


@pytest.mark.parametrize(
    "as_input",
    [
        lambda m: m,
        lambda m: torch.from_numpy(m),
        lambda m: Image.fromarray(m),
        lambda m: m.astype(np.uint16),
        lambda m: m[None],
        lambda m: [m],
    ],
)
def test_label_ids_are_kept_in_any_container(processor, as_input):
    labels = label_map(32, 40, num_labels=2000)
    inputs = processor(picture(32, 40), as_input(labels), return_tensors="pt")
    assert np.array_equal(inputs["labels"][0], labels)


def test_palette_maps_keep_their_indices(processor):
    labels = label_map(32, 40, num_labels=4).astype(np.uint8)
    palette_map = Image.fromarray(labels)
    palette_map.putpalette([9, 8, 7, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    assert np.array_equal(processor(picture(32, 40), palette_map, return_tensors="pt").labels[0], labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_reduced_labels(processor, dtype):
    labels = np.tile(np.array([0, 1, 2, 150, 254, 255, 0, 1], dtype), (32, 4))
    before = labels.copy()
    inputs = processor(picture(32, 32), labels, do_reduce_labels=True, return_tensors="pt")
    assert inputs["labels"][0, 0, :8].tolist() == [255, 0, 1, 149, 253, 255, 255, 0]
    assert np.array_equal(labels, before)


@pytest.mark.parametrize(
    "as_input",
    [
        list,
        tuple,
        torch.tensor,
        np.array,
        lambda sizes: [torch.tensor(size) for size in sizes],
        lambda sizes: [tuple(torch.tensor(size)) for size in sizes],
        lambda sizes: [tuple(np.array(size, float)) for size in sizes],
    ],
)
def test_post_processing(processor, as_input):
    logits = torch.randn(3, 5, 8, 6)
    sizes = [(40, 31), (8, 6), (3, 90)]
    target_sizes = as_input(sizes)
    maps = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), target_sizes)
    with_scores = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), target_sizes, True)
    for i, size in enumerate(sizes):
        assert torch.equal(maps[i], naive_argmax(logits[i], size))
        assert torch.equal(maps[i], with_scores[i].segmentation)
        expected = F.interpolate(logits[i : i + 1], size=size, mode="bilinear", align_corners=False)[0]
        assert torch.equal(with_scores[i].segmentation_scores, expected)


def test_post_processing_without_target_sizes(processor):
    outputs = SimpleNamespace(logits=torch.randn(2, 5, 8, 6), logits_sizes=None)
    maps = processor.post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(maps), outputs.logits.argmax(1))
    with_scores = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    assert torch.equal(with_scores[1].segmentation_scores, outputs.logits[1])


@pytest.mark.parametrize("target_sizes", [None, [(40, 31), (50, 60)]])
@pytest.mark.parametrize("with_scores", [False, True])
def test_logits_of_padding_are_cut_off(processor, target_sizes, with_scores):
    logits = torch.randn(2, 5, 8, 6)
    outputs = SimpleNamespace(logits=logits, logits_sizes=torch.tensor([[8, 3], [5, 6]]))
    together = processor.post_process_semantic_segmentation(outputs, target_sizes, with_scores)
    for i, (rows, columns) in enumerate([(8, 3), (5, 6)]):
        own = SimpleNamespace(logits=logits[i : i + 1, :, :rows, :columns])
        own_sizes = target_sizes and target_sizes[i : i + 1]
        alone = processor.post_process_semantic_segmentation(own, own_sizes, with_scores)[0]
        if with_scores:
            assert torch.equal(together[i].segmentation_scores, alone.segmentation_scores)
        assert torch.equal(*(x.segmentation if with_scores else x for x in (together[i], alone)))


@pytest.mark.parametrize("target_sizes", [None, [(40, 31), (50, 60)]])
@pytest.mark.parametrize("with_scores", [False, True])
def test_nan_logits_are_refused_except_on_padding(processor, target_sizes, with_scores):
    outputs = SimpleNamespace(logits=torch.randn(2, 5, 8, 6), logits_sizes=torch.tensor([[8, 3], [5, 6]]))
    outputs.logits[1, 2, 5:] = float("nan")
    assert len(processor.post_process_semantic_segmentation(outputs, target_sizes, with_scores)) == 2
    outputs.logits[1, 2, 4, 5] = float("nan")
    with pytest.raises(ValueError, match="must be numbers, got NaN for image 1: look for NaN in the image and in the"):
        processor.post_process_semantic_segmentation(outputs, target_sizes, with_scores)


def test_save_and_load(processor, tmp_path):
    processor = type(processor)(size={"shortest_edge": 24}, do_reduce_labels=True, image_std=[0.3, 0.4, 0.5])
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "CtsImageProcessor"
    for cls in (CtsImageProcessor, CtsImageProcessorPil):
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.to_dict() == processor.to_dict()
    one, other = (
        p(picture(40, 50), label_map(40, 50), return_tensors="pt")
        for p in (processor, type(processor).from_pretrained(tmp_path))
    )
    assert all(torch.equal(one[key], other[key]) for key in ("pixel_values", "labels"))


@pytest.mark.parametrize(
    ("images", "maps", "message"),
    [
        ([(40, 50), (40, 50)], [np.zeros((40, 50), int)], "2 images and 1 segmentation maps"),
        ([(40, 50)], [np.zeros((50, 40), int)], r"Image 0 has \(height, width\) = \(40, 50\).*\(50, 40\)"),
        ([(40, 50)], [picture(40, 50)], r"map 0 has the shape \((3, 40, 50|40, 50, 3)\).*RGB"),
        ([(40, 50)], [np.zeros((40, 50))], "type .*float64.*integers"),
    ],
)
def test_unfit_segmentation_maps_are_refused(processor, images, maps, message):
    with pytest.raises(ValueError, match=message):
        processor([picture(*size) for size in images], maps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_center_crop": True, "crop_size": 24}, "do_center_crop=True is not supported"),
        ({"size": {"shortest_edge": 0}}, "1 pixel or more.*'shortest_edge': 0"),
        ({"size": {"height": 32}}, "must have one of the following set of keys"),
        ({"pad_size": {"height": 8, "width": 8}}, "Padding dimensions are negative"),
    ],
)
def test_options_without_a_meaning_are_refused(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor(picture(40, 50), **options)


@pytest.mark.parametrize(
    ("target_sizes", "message"),
    [
        ([(8, 8)], "got 1 for the logits of 2 images"),
        ([(8, 8), (0, 8)], r"1 or more, got \(0, 8\) among them: pass the sizes of"),
        (torch.tensor([[8, 8], [8, -1]]), r"got \[8, -1\]"),
        ((40, 50), "got 40 among them"),
        (torch.tensor([40, 50]), "got 40 among them"),
        (np.array([40, 50]), "got 40 among them"),
        (np.array([[8.0, 8.0], [8.0, np.inf]]), r"got \[8\.0, inf\] among them"),
        (40, "per image, in whole pixels of 1 or more, got 40: pass"),
        (torch.tensor(40), r"got tensor\(40\): pass"),
        ([(8, 8), None], "got None among them"),
        ([(8, 8), "88"], "got '88' among them"),
        ([(8, 8), ("8", "8")], r"got \('8', '8'\) among them"),
        ([(float("nan"), 3), (8, 8)], r"got \(nan, 3\) among them"),
        ([(8, 8), (8.5, 8)], r"got \(8.5, 8\)"),
        ([(8, 8), (8, 8, 3)], r"got \(8, 8, 3\)"),
    ],
)
def test_unfit_target_sizes_are_refused(processor, target_sizes, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process_semantic_segmentation(SimpleNamespace(logits=torch.zeros(2, 3, 4, 4)), target_sizes)


@pytest.mark.slow
def test_without_torchvision():
    script = """
import sys
sys.modules["torchvision"] = None  # `import torchvision` raises ImportError
import numpy as np
from cts_hf.model.image_processing_pil_cts import CtsImageProcessorPil
image = np.zeros((40, 50, 3), np.uint8)
inputs = CtsImageProcessorPil(size=32)([image, image[:, :40]], [image[..., 0], image[:, :40, 0]], return_tensors="pt")
assert inputs["pixel_values"].shape == (2, 3, 32, 40) and "pixel_mask" in inputs
from cts_hf.model.image_processing_cts import CtsImageProcessor
try:
    CtsImageProcessor()
except ImportError as error:
    assert "torchvision" in str(error).lower()
else:
    raise AssertionError("CtsImageProcessor must refuse")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("processor_class", [CtsImageProcessor, CtsImageProcessorPil])
def test_reducing_labels_does_not_make_a_class_ignored(processor_class):
    image, labels = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint16)
    options = {"do_reduce_labels": True, "return_tensors": "pt"}
    assert (processor_class()(image, segmentation_maps=labels, **options)["labels"] == 255).all()
    labels[0] = 256
    with pytest.raises(ValueError, match=r"must have ids from 0 to 255 with do_reduce_labels=True, got 256"):
        processor_class()(image, segmentation_maps=labels, **options)


@pytest.mark.parametrize("processor_class", [CtsImageProcessor, CtsImageProcessorPil])
def test_arrays_in_any_order_of_memory(processor_class):
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    labels = np.random.default_rng(1).integers(0, 5, (64, 48), dtype=np.int32)
    plain = processor_class()(image, segmentation_maps=labels, return_tensors="pt")
    mirrored = image[::-1, ::-1].copy()[::-1, ::-1]
    other = processor_class()(mirrored, segmentation_maps=labels.astype(">i4"), return_tensors="pt")
    for name in plain:
        assert torch.equal(plain[name], other[name]), name
    with pytest.raises(ValueError, match="Image 0 must have real values, got complex128"):
        processor_class()(image.astype(complex))
