import os

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from cts_hf import CtsImageProcessor
from cts_hf.data import build_scenes
from cts_hf.inference import InferenceOptions
from cts_hf.prediction import find_images, predict_files

from ..models import tiny_model
from .scripts import launch, run_main


SUFFIXES = {"masks": ".png", "overlays": ".jpg", "grids": ".png"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(num_labels=10).save_pretrained(folder)
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def options(model_folder, tmp_path):
    """Five good images, two of another size and one of those in a folder below."""
    images = tmp_path / "images"
    (images / "below").mkdir(parents=True)
    scenes = [row["image"] for row in build_scenes(5, image_size=64)]
    scenes[1] = scenes[1].crop((0, 0, 64, 48)).convert("L")
    sideways = Image.Exif()
    sideways[ExifTags.Base.Orientation] = 6
    for name, scene in zip(("a.png", "b.png", "c.png", "below/d.png"), scenes[:4], strict=True):
        scene.save(images / name)
    scenes[4].crop((0, 0, 64, 40)).save(images / "e.jpg", exif=sideways)
    return {"model": model_folder, "images": images, "output_dir": tmp_path / "out", "num_workers": 0}


NAMES = {"a": (64, 64), "b": (64, 48), "c": (64, 64), "below/d": (64, 64), "e": (40, 64)}


def written(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_masks_overlays_and_grids(monkeypatch, options):
    assert run_main(monkeypatch, "predict.py", **options) == 0
    out = options["output_dir"]
    assert written(out) == {f"{output}/{name}{suffix}" for output, suffix in SUFFIXES.items() for name in NAMES}
    for name, size in NAMES.items():
        mask, overlay = Image.open(out / "masks" / f"{name}.png"), Image.open(out / "overlays" / f"{name}.jpg")
        assert mask.size == overlay.size == size
        assert (mask.mode, overlay.mode) == ("L", "RGB")


@torch.no_grad()
def test_masks_are_what_the_model_and_the_processor_give(monkeypatch, options):
    run_main(monkeypatch, "predict.py", **options, token_reduction=0.6, outputs="masks")
    assert {path.parts[0] for path in map(type(options["images"]), written(options["output_dir"]))} == {"masks"}
    model, processor = tiny_model(num_labels=10), CtsImageProcessor(size={"shortest_edge": 64})
    for name in ("a", "b"):
        image = Image.open(options["images"] / f"{name}.png").convert("RGB")
        outputs = model(**processor(image, return_tensors="pt"), token_reduction=0.6)
        expected = processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])[0]
        mask = np.array(Image.open(options["output_dir"] / "masks" / f"{name}.png"))
        assert np.array_equal(mask, expected.numpy())


def test_what_is_there_is_not_made_again(monkeypatch, options):
    run_main(monkeypatch, "predict.py", **options)
    out = options["output_dir"]
    for name in written(out):
        os.utime(out / name, (1, 1))  # a file system's clock may be too coarse to tell two runs apart
    before = {name: (out / name).stat().st_mtime_ns for name in written(out)}
    kept = (out / "masks" / "c.png").read_bytes()
    (out / "masks" / "c.png").unlink()
    (out / "masks" / ".unfinished_c.png").write_bytes(kept[:20])  # what a killed run leaves behind
    run_main(monkeypatch, "predict.py", **options)
    after = {name: (out / name).stat().st_mtime_ns for name in written(out)}
    assert (out / "masks" / "c.png").read_bytes() == kept
    assert {name for name in before if before[name] != after[name]} == {
        f"{output}/c{suffix}" for output, suffix in SUFFIXES.items()
    }
    assert not (out / "masks" / ".unfinished_c.png").exists()


def test_unreadable_files_are_listed_and_the_others_done(monkeypatch, capsys, options):
    images = options["images"]
    (images / "broken.jpg").write_text("no picture")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:500])
    assert run_main(monkeypatch, "predict.py", **options) == 1
    errors = capsys.readouterr().err
    assert "Could not be read (2):" in errors
    assert f"{images / 'broken.jpg'}: cannot be read" in errors
    assert f"{images / 'cut.png'}: cannot be read" in errors
    assert {f"masks/{name}.png" for name in NAMES} <= written(options["output_dir"])


def test_windows_scales_and_flips_have_no_grids(monkeypatch, options):
    many = {"window": 48, "stride": 32, "scales": [0.75, 1.0], "flip": True}
    assert run_main(monkeypatch, "predict.py", **options, **many) == 0
    assert {name.split("/")[0] for name in written(options["output_dir"])} == {"masks", "overlays"}
    with pytest.raises(ValueError, match="an image has many grids"):
        run_main(monkeypatch, "predict.py", **options, **many, outputs=["grids"])


def test_impossible_calls_are_refused(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There are no images in"):
        find_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="outputs has pictures: there are masks"):
        predict_files(
            tiny_model(), CtsImageProcessor(), {}, tmp_path, outputs=["pictures"], options=InferenceOptions()
        )
    Image.new("RGB", (64, 64)).save(options["images"] / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.png and .*a\.jpg.* Rename"):
        find_images(options["images"])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_share_the_images(monkeypatch, options, tmp_path):
    (options["images"] / "broken.jpg").write_text("no picture")
    run_main(monkeypatch, "predict.py", **options)
    two = launch("predict.py", 2, **{**options, "output_dir": tmp_path / "two"})
    assert two.returncode != 0
    assert "Could not be read (1):" in two.stderr
    one = {name: (options["output_dir"] / name).read_bytes() for name in written(options["output_dir"])}
    assert {name: (tmp_path / "two" / name).read_bytes() for name in written(tmp_path / "two")} == one
