# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
import colorsys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cts_hf.data import SquashTransform, TrainingSamples, TrainTransform, build_scenes, collate
from cts_hf.data.transforms import _resize_then_crop, _scale_saturation, distort_colors


PLAIN = {"scale_range": (1, 1), "max_class_share": 1, "photometric_distortion": False}


@pytest.fixture(scope="module")
def scenes():
    return build_scenes(8, image_size=64)


@pytest.mark.parametrize("size", [(64, 64), (200, 50), (31, 90)])
def test_every_sample_has_the_crop_size(size):
    rng = np.random.default_rng(0)
    image, label = Image.new("RGB", size), Image.new("L", size, 3)
    for _ in range(10):
        sample = TrainTransform(48)(image, label, rng)
        assert sample["pixel_values"].shape == (3, 48, 48)
        assert sample["pixel_values"].dtype == torch.float32
        assert sample["labels"].shape == (48, 48)
        assert sample["labels"].dtype == torch.int64
        assert set(sample["labels"].unique().tolist()) <= {3, 255}


def test_scale_one_is_the_largest_size_in_the_base_size():
    transform = TrainTransform(32, base_size=(80, 40), scale_range=(1, 1))
    rng = np.random.default_rng(0)
    assert transform._random_size((100, 100), rng) == (40, 40)
    assert transform._random_size((100, 25), rng) == (80, 20)
    assert transform._random_size((25, 100), rng) == (20, 80)


def test_sizes_span_the_scale_range():
    rng = np.random.default_rng(0)
    widths = [TrainTransform(100)._random_size((100, 100), rng)[0] for _ in range(200)]
    assert 50 <= min(widths) < 60
    assert 190 < max(widths) <= 200


def test_image_and_label_stay_aligned(scenes):
    # An image that is its own label, stretched to grey levels, must follow the label wherever it goes.
    rng = np.random.default_rng(0)
    transform = TrainTransform(48, scale_range=(0.5, 2), photometric_distortion=False)
    for row in scenes:
        grey = Image.fromarray(np.asarray(row["label"]) * 25)
        sample = transform(Image.merge("RGB", [grey] * 3), row["label"], rng)
        levels = (sample["pixel_values"][0] * 0.5 + 0.5) * 255 / 25
        seen = sample["labels"] != 255
        assert ((levels - sample["labels"]).abs()[seen] < 0.5).float().mean() > 0.85


def test_images_are_normalized_as_the_model_wants(scenes):
    mean, std = [0.5, 0.25, 0.0], (0.5, 0.25, 1.0)
    row = scenes[0]

    def normalize(pixels):  # what 0.5 gives, which is between -1 and 1, to what these give
        return torch.stack([pixels[0], pixels[1] * 2 + 1, pixels[2] * 0.5 + 0.5])

    for make in (lambda *options: TrainTransform(64, None, (1, 1), 1, False, *options), partial(SquashTransform, 48)):
        pixels, half = (
            make(*options)(row["image"], row["label"], np.random.default_rng(0))["pixel_values"]
            for options in ((mean, std), ())
        )
        torch.testing.assert_close(pixels, normalize(half), rtol=0, atol=3 * 2**-23)
    with pytest.raises(ValueError, match=r"`image_mean` must be finite numbers, .* got 'imagenet'"):
        TrainTransform(64, image_mean="imagenet")
    with pytest.raises(ValueError, match=r"`image_std` must be numbers above 0, .* got \[1, 1\]"):
        SquashTransform(64, image_std=[1, 1])


def test_padding_is_zero_and_ignored():
    image, label = Image.new("RGB", (20, 10), (255, 255, 255)), Image.new("L", (20, 10), 1)
    sample = TrainTransform(32, base_size=(20, 10), **PLAIN)(image, label, np.random.default_rng(0))
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[:10, :20] = True
    assert torch.equal(sample["labels"], torch.where(inside, 1, 255))
    assert torch.equal(sample["pixel_values"], inside.float().expand(3, -1, -1))


def test_crops_of_one_class_are_avoided():
    label = np.zeros((64, 256), np.uint8)
    label[:, :24] = 1
    label[:, 24:40] = 255
    label, image = Image.fromarray(label), Image.new("RGB", (256, 64))

    def one_class(share):
        transform = TrainTransform(64, base_size=(256, 64), **{**PLAIN, "max_class_share": share})
        samples = [transform(image, label, np.random.default_rng(seed))["labels"] for seed in range(60)]
        return sum(len(set(sample.unique().tolist()) - {255}) == 1 for sample in samples)

    assert one_class(0.75) < 0.6 * one_class(1)


def test_half_of_the_samples_are_flipped():
    label = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8), (32, 1)))
    image = Image.merge("RGB", [label] * 3)
    transform = TrainTransform(32, base_size=(32, 32), **PLAIN)
    first = [int(transform(image, label, np.random.default_rng(seed))["labels"][0, 0]) for seed in range(100)]
    assert set(first) == {0, 31}
    assert 30 < first.count(31) < 70


def test_only_the_crop_is_resized_to_the_same_pixels(scenes):
    image = scenes[0]["image"]
    for size in ((37, 41), (150, 120)):
        crop = (5, 7, 35, 33)
        whole = np.asarray(image.resize(size, Image.Resampling.BILINEAR).crop(crop), np.int16)
        assert np.abs(np.asarray(_resize_then_crop(image, size, crop), np.int16) - whole).max() <= 1


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_saturation_changes_saturation_only(factor):
    pixels = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = _scale_saturation(pixels, factor)
    for before, after in zip(pixels.flatten(1).T.tolist(), scaled.flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value), abs=1e-5)


def test_grey_has_no_saturation_to_change():
    for level in (0.0, 0.5, 1.0):
        grey = torch.full((3, 4, 4), level)
        assert torch.equal(_scale_saturation(grey, 1.5), grey)


def test_distorted_colors_stay_in_range_and_are_sometimes_untouched():
    pixels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = [distort_colors(pixels, np.random.default_rng(seed)) for seed in range(100)]
    assert all(result.min() > -1e-5 and result.max() < 1 + 1e-5 for result in results)
    assert 0 < sum(torch.equal(result, pixels) for result in results) < 20


def test_squash_shows_the_whole_image():
    label = np.zeros((10, 40), np.uint8)
    label[:, 20:] = 1
    sample = SquashTransform(16)(Image.new("RGB", (40, 10)), Image.fromarray(label), np.random.default_rng(0))
    assert sample["pixel_values"].shape == (3, 16, 16)
    assert sample["labels"].flatten().bincount().tolist() == [128, 128]


def test_samples_are_the_same_whatever_the_workers_and_the_global_seed(scenes):
    samples = TrainingSamples(scenes, TrainTransform(32), seed=5)
    batches = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        np.random.seed(workers)
        state = torch.get_rng_state()
        batches.append(collate([samples[index] for index in range(8)]))
        assert torch.equal(torch.get_rng_state(), state)
        loaded = list(DataLoader(samples, batch_size=4, num_workers=workers, collate_fn=collate))
        batches.append({key: torch.cat([batch[key] for batch in loaded]) for key in loaded[0]})
    assert batches[0]["pixel_values"].shape == (8, 3, 32, 32)
    assert batches[0]["labels"].shape == (8, 32, 32)
    for batch in batches[1:]:
        assert torch.equal(batch["pixel_values"], batches[0]["pixel_values"])
        assert torch.equal(batch["labels"], batches[0]["labels"])


def test_epochs_and_seeds_differ_also_in_workers_that_stay(scenes):
    samples = TrainingSamples(scenes, TrainTransform(32))
    loader = DataLoader(samples, batch_size=8, num_workers=1, collate_fn=collate, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 0):
        samples.set_epoch(epoch)
        seen.append(next(iter(loader))["pixel_values"])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    other = TrainingSamples(scenes, TrainTransform(32), seed=1)
    assert not torch.equal(other[0]["pixel_values"], seen[0][0])


def test_samples_of_several_sizes_are_refused(scenes):
    small, large = (TrainingSamples(scenes, TrainTransform(size))[0] for size in (16, 32))
    with pytest.raises(ValueError, match=r"\[\(16, 16\), \(32, 32\)\]"):
        collate([small, large])


@pytest.mark.parametrize(
    "options",
    [
        {"crop_size": 0},
        {"crop_size": 8, "base_size": (0, 8)},
        {"crop_size": 8, "scale_range": (2, 1)},
        {"crop_size": 8, "max_class_share": 0},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        TrainTransform(**options)
