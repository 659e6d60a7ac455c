# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Picture files: every mode becomes RGB or is refused by name, and folders are searched through links."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from cts_hf.data.pictures import PictureError, find_pictures, read_picture, to_rgb


SUFFIXES = {".png", ".jpg"}
LEVELS = np.arange(256, dtype=np.uint8).reshape(8, 32)
# Eight bits as sixteen, by either of the usual rules, and a value in between.
SIXTEEN_BITS = [LEVELS * np.uint16(257), LEVELS.astype(np.uint16) << 8, (LEVELS.astype(np.uint16) << 8) + 77]


def grey(image):
    """The grey levels of an RGB picture whose channels are equal."""
    assert image.mode == "RGB"
    channels = np.asarray(image)
    assert (channels == channels[..., :1]).all()
    return channels[..., 0]


@pytest.mark.parametrize("values", SIXTEEN_BITS)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, values, suffix):
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    assert np.array_equal(grey(read_picture(tmp_path / f"a{suffix}")), LEVELS)


def test_sixteen_bits_of_any_byte_order_and_format_are_scaled(tmp_path):
    big_endian = Image.frombytes("I;16B", (32, 8), SIXTEEN_BITS[0].astype(">u2").tobytes())
    assert np.array_equal(grey(to_rgb(big_endian)), LEVELS)
    (tmp_path / "a.pgm").write_bytes(b"P5 32 8 65535\n" + SIXTEEN_BITS[0].astype(">u2").tobytes())
    assert np.array_equal(grey(read_picture(tmp_path / "a.pgm")), LEVELS)
    # Older versions of Pillow open 16-bit PNG files in this mode.
    as_older = Image.fromarray(SIXTEEN_BITS[0].astype(np.int32))
    as_older.format = "PNG"
    assert np.array_equal(grey(to_rgb(as_older)), LEVELS)


def test_sixteen_bit_grey_and_color_agree(tmp_path):
    """Pillow itself reads 16-bit color."""
    values = np.random.default_rng(0).integers(0, 65536, (8, 32), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    (tmp_path / "color.png").write_bytes(png(32, 8, bits=16, color_type=2, rows=rows))
    assert np.array_equal(read_picture(tmp_path / "grey.png"), read_picture(tmp_path / "color.png"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_of_eight_bits_are_converted_as_pillow_does(mode):
    colors = np.random.default_rng(0).integers(0, 256, (8, 32, 4), dtype=np.uint8)
    image = Image.fromarray(colors, "RGBA").convert("RGB" if mode in ("CMYK", "YCbCr", "HSV") else "RGBA")
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    assert image.mode == mode
    assert np.array_equal(to_rgb(image), image.convert("RGB"))


def test_transparent_palettes_are_converted_without_their_transparency(tmp_path):
    image = Image.fromarray(LEVELS % 4)
    image.putpalette([9, 8, 7, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(tmp_path / "a.png", transparency=1)
    assert np.array_equal(read_picture(tmp_path / "a.png"), image.convert("RGB"))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_modes_that_hold_grey_levels_are_taken_as_they_are(dtype):
    image = Image.fromarray(LEVELS.astype(dtype))
    assert np.array_equal(grey(to_rgb(image)), LEVELS)
    assert np.array_equal(to_rgb(image), image.convert("RGB"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (LEVELS / np.float32(255), "mode 'F' must have values from 0 to 255, got 0 to 1, which is black there"),
        (LEVELS / np.float32(255) * np.float32(1.1), "got 0 to 1.1, which is black there"),
        (LEVELS - np.float32(1), "mode 'F' must have values from 0 to 255, got -1 to 254"),
        (LEVELS * np.float32(257), "mode 'F' must have values from 0 to 255, got 0 to 65535"),
        (LEVELS * np.float32("nan"), "got nan to nan"),
        (LEVELS.astype(np.uint16), "mode 'I;16' must have values from 0 to 65535, got 0 to 255, which is black there"),
        (LEVELS.astype(np.int32) * 257, "mode 'I' must have values from 0 to 255, got 0 to 65535"),
    ],
)
def test_values_without_a_certain_meaning_are_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(
        PictureError, match=f"a.tif: cannot be read as a picture .*{message}.*: (save|convert) .* 8.bit"
    ):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_zeros_are_black_whatever_the_range(mode):
    assert (grey(to_rgb(Image.new(mode, (4, 4)))) == 0).all()


def test_pictures_are_turned_upright_and_the_first_frame_is_read(tmp_path):
    first, second = (Image.fromarray(values) for values in (LEVELS, LEVELS[::-1].copy()))
    first.save(tmp_path / "frames.tif", save_all=True, append_images=[second])
    assert np.array_equal(grey(read_picture(tmp_path / "frames.tif")), LEVELS)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(SIXTEEN_BITS[0]).save(tmp_path / "sideways.png", exif=exif)
    assert np.array_equal(grey(read_picture(tmp_path / "sideways.png")), np.rot90(LEVELS, -1))


@pytest.mark.parametrize("max_pixels", [100, 200])
def test_decompression_bombs_are_named(tmp_path, monkeypatch, max_pixels):
    """Over twice the limit Pillow raises; over the limit it warns, which raises where warnings are errors."""
    Image.fromarray(LEVELS).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PictureError, match=r"bomb\.png: cannot be read as a picture .*exceeds limit"):
            read_picture(tmp_path / "bomb.png")


def test_files_that_pillow_does_not_read_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(LEVELS).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-40])
    file = io.BytesIO()
    Image.fromarray(LEVELS).save(file, "DDS")
    header = bytearray(file.getvalue())
    header[80:88] = struct.pack("<I4s", 4, b"DX99")  # a compression that Pillow does not have: NotImplementedError
    (tmp_path / "compressed.png").write_bytes(header)
    for name in ("text.png", "cut.png", "compressed.png", "absent.png", "."):
        with pytest.raises(PictureError, match=f"{name}: cannot be read as a picture"):
            read_picture(f"{tmp_path}/{name}")


def test_links_to_folders_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "deep" / "b.jpg", tmp_path / "root" / "a.png")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    files, problems = find_pictures(tmp_path / "root", SUFFIXES)
    assert files == {"a": tmp_path / "root/a.png", "linked/deep/b": tmp_path / "root/linked/deep/b.jpg"}
    assert problems == []


def test_links_back_end_nowhere(tmp_path):
    write(tmp_path / "below" / "a.png")
    (tmp_path / "below" / "self").symlink_to(tmp_path / "below")
    (tmp_path / "below" / "root").symlink_to(tmp_path)
    assert find_pictures(tmp_path, SUFFIXES) == ({"below/a": tmp_path / "below/a.png"}, [])


def test_a_folder_that_is_found_twice_is_reported(tmp_path):
    write(tmp_path / "a" / "1.png")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    files, problems = find_pictures(tmp_path, SUFFIXES)
    assert list(files) == ["a/1"]
    assert problems == [f"{tmp_path / 'b'} and {tmp_path / 'a'} are the same folder"]


def test_hidden_files_and_folders_are_skipped(tmp_path):
    root = tmp_path / ".hidden itself"
    write(root / "a.png", root / ".b.png", root / ".ipynb_checkpoints/c.png", root / "d/.git/d.png")
    write(root / "__MACOSX/e.png", root / "notes.txt", root / "folder.png" / "f.png")
    assert list(find_pictures(root, SUFFIXES)[0]) == ["a", "folder.png/f"]


def test_files_of_one_name_are_reported(tmp_path):
    write(tmp_path / "a.JPG", tmp_path / "a.png")
    assert find_pictures(tmp_path, SUFFIXES)[1] == [
        f"{tmp_path / 'a.png'} and {tmp_path / 'a.JPG'} have the same name"
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_what_is_no_file_is_reported(tmp_path):
    """A broken link is found: reading it names the problem."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "link.png").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    files, problems = find_pictures(tmp_path, SUFFIXES)
    assert list(files) == ["link"]
    assert problems == [
        f"{tmp_path / name}: must be a file, not a pipe, socket or device" for name in ("device.png", "pipe.png")
    ]


def write(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def png(width, height, bits, color_type, rows):
    """A PNG file of uncompressed rows, each of which starts with its filter."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
