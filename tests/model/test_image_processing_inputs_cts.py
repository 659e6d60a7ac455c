# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the image processors of both backends take for an image, and what they refuse."""

import numpy as np
import pytest
import torch
from PIL import Image

from cts_hf.data.pictures import read_picture
from cts_hf.model.image_processing_cts import CtsImageProcessor
from cts_hf.model.image_processing_inputs_cts import check_images, check_resized_size
from cts_hf.model.image_processing_pil_cts import CtsImageProcessorPil


LEVELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
FRACTIONS = (LEVELS / 255).astype(np.float32)


@pytest.fixture(params=[CtsImageProcessor, CtsImageProcessorPil], ids=["torchvision", "pil"])
def processor(request):
    return request.param(size={"shortest_edge": 32})


def sixteen_bits(levels):
    """Levels as they are stored in 16 bits: 255 becomes 65535."""
    return levels * np.uint16(257)


@pytest.mark.parametrize(
    ("image", "levels"),
    [
        (Image.fromarray(sixteen_bits(LEVELS[..., 0])), Image.fromarray(LEVELS[..., 0])),
        (
            Image.frombytes("I;16B", (50, 40), sixteen_bits(LEVELS[..., 0]).astype(">u2").tobytes()),
            Image.fromarray(LEVELS[..., 0]),
        ),
        (sixteen_bits(LEVELS), LEVELS),
        (sixteen_bits(LEVELS).astype(">u2"), LEVELS),
        (sixteen_bits(LEVELS[..., :1]).transpose(2, 0, 1), LEVELS[..., :1].transpose(2, 0, 1)),
        (torch.from_numpy(sixteen_bits(LEVELS)), torch.from_numpy(LEVELS)),
        (LEVELS > 99, (LEVELS > 99) * np.uint8(255)),
        (torch.from_numpy(LEVELS > 99), (LEVELS > 99) * np.uint8(255)),
        (Image.fromarray(LEVELS[..., 0].astype(np.float32)), Image.fromarray(LEVELS[..., 0])),
        (Image.fromarray(LEVELS[..., 0].astype(np.int32)), Image.fromarray(LEVELS[..., 0])),
    ],
)
def test_other_depths_are_scaled_to_eight_bits(processor, image, levels):
    pixel_values, expected = (processor(x, return_tensors="pt").pixel_values for x in (image, levels))
    assert torch.equal(pixel_values, expected)


@pytest.mark.parametrize("do_convert_rgb", [True, False])
def test_pictures_of_one_bit_are_black_and_white(processor, do_convert_rgb):
    image = Image.fromarray(LEVELS[..., 0]).convert("1")
    options = {"do_convert_rgb": do_convert_rgb, "image_mean": 0.5, "image_std": 0.5}
    pixel_values, expected = (
        processor(x, **options, return_tensors="pt").pixel_values for x in (image, image.convert("L"))
    )
    assert torch.equal(pixel_values, expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_paths_of_sixteen_bit_pictures_are_scaled(processor, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(sixteen_bits(LEVELS[..., 0])).save(path)
    expected = processor(Image.fromarray(LEVELS[..., 0]), return_tensors="pt").pixel_values
    assert torch.equal(processor(str(path), return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_dropped_however_an_image_is_given(processor, mode, tmp_path):
    """The colors below it are what training sees; white, on which transformers lays PIL images, is not."""
    alpha = Image.fromarray(LEVELS[..., 0])
    image = Image.fromarray(LEVELS[..., :3] // 64 * 64).convert({"LA": "L", "P": "P"}.get(mode, "RGB"))
    expected = processor(image.convert("RGB"), return_tensors="pt").pixel_values
    options = {}
    if "A" in mode:
        image.putalpha(alpha)
    elif mode == "P":
        options["transparency"] = bytes(range(0, 256, 2))  # of the first colors
    else:
        options["transparency"] = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", **options)
    saved = Image.open(tmp_path / "a.png")
    assert saved.mode == mode
    assert saved.has_transparency_data
    for given in (saved, str(tmp_path / "a.png"), read_picture(tmp_path / "a.png")):
        assert torch.equal(processor(given, return_tensors="pt").pixel_values, expected)
    assert saved.has_transparency_data  # the image itself stays as it is


@pytest.mark.parametrize("as_input", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_transparency_of_arrays_is_dropped(processor, as_input, axes):
    image = as_input(np.dstack([LEVELS, 255 - LEVELS[..., 0]]).transpose(axes).copy())
    expected = processor(LEVELS, return_tensors="pt").pixel_values
    assert torch.equal(processor(image, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32])
@pytest.mark.parametrize("do_rescale", [True, False])
def test_zeros_are_black_whatever_their_type(processor, dtype, do_rescale):
    image = np.zeros((40, 50, 3), dtype)
    pixel_values = processor(image, do_rescale=do_rescale, return_tensors="pt").pixel_values
    assert torch.equal(pixel_values, torch.full((1, 3, 32, 40), -1.0))


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (LEVELS.astype(np.float32), {}),
        (LEVELS.astype(np.int64), {}),
        (LEVELS // 200, {}),  # dark, but of the type for levels
        (FRACTIONS, {"do_rescale": False}),
        (torch.from_numpy(FRACTIONS), {"do_rescale": False}),
        # The range that other options expect is not known.
        (FRACTIONS * 2 - 1, {"do_rescale": False, "do_normalize": False}),
        (LEVELS, {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}),
        (LEVELS, {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
        (FRACTIONS, {"rescale_factor": 1.0}),
    ],
)
def test_values_in_range_are_taken_as_they_are(processor, image, options):
    options = {**options, "do_resize": False}
    result = processor(image, **options, return_tensors="pt").pixel_values[0]
    values = torch.as_tensor(image).permute(2, 0, 1).double()
    if options.get("do_rescale", True):
        values = values * options.get("rescale_factor", 1 / 255)
    if options.get("do_normalize", True):
        values = (values - options.get("image_mean", [0.5])[0]) / options.get("image_std", [0.5])[0]
    # A few roundings to float32, of constants and of results of at most 2.
    torch.testing.assert_close(result.double(), values, atol=8 * 2.0**-23, rtol=0)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (FRACTIONS, {}, "got 0 to 1, which is black there and looks like 0 to 1: pass do_rescale=False"),
        (torch.from_numpy(FRACTIONS).half(), {}, "from 0 to 255, got 0 to 1, which is black there"),
        (FRACTIONS * 1.05, {}, "from 0 to 255, got 0 to 1.05, which is black there"),
        (np.dstack([FRACTIONS, FRACTIONS[..., 0]]), {}, "from 0 to 255, got 0 to 1, which is black there"),
        (LEVELS - 1.0, {}, "from 0 to 255, got -1 to 254"),
        (LEVELS + 1.0, {}, "from 0 to 255, got 1 to 256"),
        (LEVELS.astype(int) - 1, {}, "from 0 to 255, got -1 to 254"),
        (LEVELS.astype(np.int32) * 257, {}, "from 0 to 255, got 0 to 65535"),
        (np.full((40, 50, 3), np.nan), {}, "from 0 to 255, got nan to nan"),
        (LEVELS, {"do_rescale": False}, "from 0 to 1, got 0 to 255: leave do_rescale=True"),
        (Image.fromarray(LEVELS), {"do_rescale": False}, "from 0 to 1, got 0 to 255: leave do_rescale=True"),
        (FRACTIONS - 0.5, {"do_rescale": False}, "from 0 to 1, got -0.5 to 0.5"),
        (Image.fromarray(FRACTIONS[..., 0]), {}, "mode 'F' must have values from 0 to 255, got 0 to 1"),
        (Image.fromarray(FRACTIONS[..., 0]), {"do_convert_rgb": False}, "from 0 to 255, got 0 to 1, which is black"),
        (Image.fromarray(LEVELS[..., 0].astype(np.int32) * 257), {}, "mode 'I' must have values from 0 to 255"),
        (LEVELS.astype(np.uint16), {}, "from 0 to 65535, got 0 to 255, which is black there and looks like 0 to 255"),
        (torch.from_numpy(LEVELS.astype(np.uint16)), {}, "from 0 to 65535, got 0 to 255, which is black there"),
        (Image.fromarray(LEVELS[..., 0].astype(np.uint16)), {}, "mode 'I;16' must have values from 0 to 65535, got 0"),
        (LEVELS[:0], {}, r"Image 1 must have pixels, got the shape \(0, 50, 3\)"),
    ],
)
def test_values_out_of_range_or_ambiguous_are_refused(processor, image, options, message):
    good = Image.new(image.mode, (50, 40)) if isinstance(image, Image.Image) else np.zeros_like(LEVELS)
    with pytest.raises(ValueError, match=message):
        processor([good, image], **options)


def test_values_on_a_device_are_checked_without_waiting_for_it(monkeypatch):
    """The meta device has no values that the host could read: doing so raises an error."""
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda *arguments: asserted.append(arguments))
    image = torch.zeros(3, 40, 50, device="meta")
    assert check_images([image], white=255, do_convert_rgb=True) == [image]
    check_images([image.to(torch.uint8), image.to(torch.uint16)], white=255, do_convert_rgb=True)
    (condition, message), (wide_condition, wide_message) = asserted  # uint8 needs none
    assert condition.device.type == wide_condition.device.type == "meta"
    assert message.startswith("Image 0 must have values from 0 to 255: pass do_rescale=False")
    assert wide_message.startswith("Image 1 must have values from 0 to 65535: convert what holds 0 to 255 to 8 bits")


def test_images_that_resizing_would_blow_up_are_refused(processor):
    message = r"Image 1 must have at most 1048576 pixels .* got 1 x 40000 pixels.* makes 32 x 1280000"
    with pytest.raises(ValueError, match=message):
        processor([Image.new("RGB", (40, 32)), Image.new("RGB", (40000, 1))])
    square = processor(Image.new("RGB", (40000, 1)), size={"height": 32, "width": 32}).pixel_values[0]
    assert square.shape == (3, 32, 32)


@pytest.mark.parametrize("turned", [False, True])
def test_only_long_and_narrow_images_are_too_large(turned):
    def check(short, long, shortest_edge):
        check_resized_size((long, short) if turned else (short, long), shortest_edge, "Image 0")

    check(1, 256, 64)  # 2**20 pixels
    check(2, 5000, 16)  # far longer than wide, but few
    check(100, 1600, 512)  # 2**22 pixels, but the shape is common
    for size, limit in (
        ((1, 257, 64), 2**20),
        ((1, 900, 64), 2**20),
        ((2, 6000, 64), 2**20),
        ((100, 1601, 512), 2**22),
    ):
        with pytest.raises(ValueError, match=f"Image 0 must have at most {limit} pixels"):
            check(*size)
