# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What predict.py does with results that are there already and are not, or no more, what it wrote."""

import os

import pytest
from PIL import Image, PngImagePlugin

from cts_hf.evaluation.prediction_results import read_stamp

from ..helpers.scripts import run_main
from ..helpers.slow import slow_but
from .test_predict import contents


def test_results_that_were_cut_are_made_again(monkeypatch, capsys, options):
    out = options["output_dir"]
    run_main(monkeypatch, "predict.py", **options)
    whole = contents(out)
    for name in ("masks/a.png", "overlays/b.jpg", "grids/below/d.png"):
        (out / name).write_bytes(whole[name][: 2 * len(whole[name]) // 3])
    capsys.readouterr()
    run_main(monkeypatch, "predict.py", **options, outputs="masks")
    assert "3 images were segmented, 2 had been already" in capsys.readouterr().out
    assert contents(out) == whole


@pytest.mark.parametrize("overwrite", slow_but([{"overwrite_output_dir": True}], [{}, {"overwrite_output_dir": True}]))
@pytest.mark.parametrize("name", ["masks/a.png", "overlays/a.jpg"])
def test_results_that_were_edited_are_never_replaced(monkeypatch, options, name, overwrite):
    """Pillow keeps the comment of a JPEG, and with it the stamp, as an editor may with that of a PNG."""
    out = options["output_dir"]
    run_main(monkeypatch, "predict.py", **options)
    edited = Image.open(out / name).transpose(Image.Transpose.ROTATE_180)
    edited.save(out / name, comment=edited.info.get("comment"), pnginfo=png_text(edited))
    assert read_stamp(out / name)
    before = contents(out)
    for change in ({}, {"token_reduction": 0.6}):
        with pytest.raises(ValueError, match=rf"holds {name}, which .* no results of this package, or were edited"):
            run_main(monkeypatch, "predict.py", **options, **overwrite, **change)
    Image.open(options["images"] / "a.png").transpose(Image.Transpose.ROTATE_180).save(options["images"] / "a.png")
    with pytest.raises(ValueError, match="or were edited"):
        run_main(monkeypatch, "predict.py", **options, **overwrite)
    assert contents(out) == before


def test_results_of_the_same_pixels_are_done(monkeypatch, capsys, options):
    """As after an optimizer of PNG files, which may choose another mode for grey levels or few colors."""
    out = options["output_dir"]
    run_main(monkeypatch, "predict.py", **options)
    mask = Image.open(out / "masks" / "a.png")
    mask.convert("P").save(out / "masks" / "a.png", pnginfo=png_text(mask), optimize=True)
    capsys.readouterr()
    run_main(monkeypatch, "predict.py", **options)
    assert "0 images were segmented, 5 had been already" in capsys.readouterr().out


def png_text(picture):
    metadata = PngImagePlugin.PngInfo()
    for key, value in picture.info.items():
        if isinstance(value, str):
            metadata.add_text(key, value)
    return metadata


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_pipes_named_like_images_or_results_are_refused(monkeypatch, options):
    """To open one would wait for a writer, for ever."""
    os.mkfifo(options["images"] / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png: must be a file, not a pipe, socket or device"):
        run_main(monkeypatch, "predict.py", **options)
    (options["images"] / "pipe.png").unlink()
    (options["output_dir"] / "masks").mkdir(parents=True)
    os.mkfifo(options["output_dir"] / "masks" / "a.png")
    with pytest.raises(ValueError, match=r"holds masks/a\.png, which the results would replace"):
        run_main(monkeypatch, "predict.py", **options)
