# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cts_hf import CtsImageProcessor
from cts_hf.data.pictures import read_picture
from cts_hf.evaluation.existing_models import load_any
from cts_hf.evaluation.prediction import find_images, predict_files
from cts_hf.evaluation.prediction_results import read_stamp
from cts_hf.evaluation.visualization import draw_sharing_grid
from cts_hf.evaluation.windows import InferenceOptions
from cts_hf.hub.output_folder import OutputFolder

from ..helpers.existing_models import save_existing
from ..helpers.models import tiny_model, tiny_policy
from ..helpers.scripts import launch, run_main


SUFFIXES = {"masks": ".png", "overlays": ".jpg", "grids": ".png"}
NAMES = {"a": (64, 64), "b": (64, 48), "c": (64, 64), "below/d": (64, 64), "e": (40, 64)}


def written(folder):
    """All files but the hidden ones of the folder itself: its lock and record."""
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix() for path in paths if len(path.parts) > 1 or not path.name.startswith(".")}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in written(folder)}


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


def test_what_is_there_is_not_made_again(monkeypatch, capsys, options):
    run_main(monkeypatch, "predict.py", **options)
    assert "5 images were segmented, 0 had been already" in capsys.readouterr().out
    out = options["output_dir"]
    for name in written(out):
        os.utime(out / name, (1, 1))  # a file system's clock may be too coarse to tell two runs apart
    kept = contents(out)
    before = {name: (out / name).stat().st_mtime_ns for name in kept}
    (out / "masks" / "c.png").unlink()
    run_main(monkeypatch, "predict.py", **options)
    assert "1 images were segmented, 4 had been already" in capsys.readouterr().out
    after = {name: (out / name).stat().st_mtime_ns for name in written(out)}
    assert {name for name in before if before[name] != after[name]} == {"masks/c.png"}
    assert contents(out) == kept


def test_results_of_other_settings_are_refused_and_only_replaced_when_asked(monkeypatch, options, tmp_path):
    out = options["output_dir"]
    run_main(monkeypatch, "predict.py", **options)
    before = contents(out)
    tiny_model(seed=1, num_labels=10).save_pretrained(tmp_path / "other")
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "other")
    tiny_model(num_labels=10).save_pretrained(tmp_path / "resized")
    CtsImageProcessor(size={"shortest_edge": 48}).save_pretrained(tmp_path / "resized")
    for change in (
        {"model": tmp_path / "other"},
        {"model": tmp_path / "resized"},
        {"token_reduction": 0.6},
        {"flip": True},
        {"shortest_edge": 48, "outputs": "masks"},
    ):
        with pytest.raises(ValueError, match=r"masks/a\.png.* of another model, budget .* --overwrite_output_dir"):
            run_main(monkeypatch, "predict.py", **{**options, **change})
        assert contents(out) == before

    # The same budget, said aloud, and the same model under another name are the same settings.
    tiny_model(num_labels=10).save_pretrained(tmp_path / "same")
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "same")
    run_main(monkeypatch, "predict.py", **{**options, "model": tmp_path / "same"}, token_reduction=0.3, batch_size=1)
    assert contents(out) == before

    replaced = {**options, "model": tmp_path / "other", "outputs": ["masks", "overlays"]}
    run_main(monkeypatch, "predict.py", **replaced, overwrite_output_dir=True)
    run_main(monkeypatch, "predict.py", **{**replaced, "output_dir": tmp_path / "fresh"})
    # Grids of the first model are not left beside masks of the second.
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_threshold_in_place_of_a_budget(monkeypatch, options, tmp_path):
    run = {**options, "outputs": ["masks", "grids"]}
    run_main(monkeypatch, "predict.py", **run, sharing_threshold=0.5)
    before = contents(options["output_dir"])
    with pytest.raises(ValueError, match="of another model, budget or other options"):
        run_main(monkeypatch, "predict.py", **run)
    tiny_model(num_labels=10, sharing_threshold=0.5).save_pretrained(tmp_path / "own")
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "own")
    run_main(monkeypatch, "predict.py", **{**run, "model": tmp_path / "own"}, batch_size=1)
    assert contents(options["output_dir"]) == before
    run_main(monkeypatch, "predict.py", **{**run, "output_dir": tmp_path / "budget"})
    run_main(
        monkeypatch,
        "predict.py",
        **{**run, "model": tmp_path / "own", "output_dir": tmp_path / "same"},
        token_reduction=0.3,
    )
    budget = contents(tmp_path / "budget")
    assert budget.keys() == before.keys()
    assert budget == contents(tmp_path / "same") != before


@torch.no_grad()
def test_grids_of_a_threshold_have_boxes_of_all_sizes(monkeypatch, options, tmp_path):
    model, processor = (
        tiny_model(num_labels=10, superpatch_levels=(2, 4)),
        CtsImageProcessor(size={"shortest_edge": 64}),
    )
    model.save_pretrained(tmp_path / "levels")
    processor.save_pretrained(tmp_path / "levels")
    image = Image.open(options["images"] / "a.png").convert("RGB")
    inputs = processor(image, return_tensors="pt")
    fine, coarse = (logits.softmax(dim=1)[0, 1] for logits in model(**inputs).policy_logits)
    threshold = coarse.quantile(0.7).item()  # one of four
    fine, coarse = (shared[0] for shared in model(**inputs, sharing_threshold=threshold).shared_superpatches)
    assert fine.any()
    assert coarse.any()
    run = {**options, "model": tmp_path / "levels", "outputs": "grids"}
    run_main(monkeypatch, "predict.py", **run, sharing_threshold=threshold)
    drawn = Image.open(options["output_dir"] / "grids" / "a.png")
    assert drawn.tobytes() == draw_sharing_grid(image, (fine, coarse), (16, 32), 8).tobytes()
    assert drawn.tobytes() != draw_sharing_grid(image, (fine, torch.zeros_like(coarse)), (16, 32), 8).tobytes()


def test_results_of_an_image_that_has_changed_are_made_again(monkeypatch, capsys, options, tmp_path):
    out = options["output_dir"]
    run_main(monkeypatch, "predict.py", **options)
    before = contents(out)
    Image.open(options["images"] / "c.png").transpose(Image.Transpose.ROTATE_180).save(options["images"] / "c.png")
    run_main(monkeypatch, "predict.py", **options, outputs="masks")
    assert "1 images were segmented, 4 had been already" in capsys.readouterr().out
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} == {
        f"{output}/c{suffix}" for output, suffix in SUFFIXES.items()
    }
    run_main(monkeypatch, "predict.py", **{**options, "output_dir": tmp_path / "fresh"})
    assert after == contents(tmp_path / "fresh")


@pytest.mark.parametrize("overwrite", [{}, {"overwrite_output_dir": True}], ids=["", "overwrite"])
def test_files_of_others_are_never_replaced(monkeypatch, options, overwrite):
    """The user's own label maps, in the folder of the images or elsewhere, whatever they hold."""
    images = options["images"]
    for folder in (images, options["output_dir"]):
        (folder / "masks" / "below").mkdir(parents=True)
        Image.new("L", (64, 64), 7).save(folder / "masks" / "a.png")
        (folder / "masks" / "below" / "d.png").write_bytes(b"")
        before = contents(folder)
        with pytest.raises(ValueError, match=r"masks/a\.png, masks/below/d\.png, which .* no results of this package"):
            run_main(monkeypatch, "predict.py", **{**options, "output_dir": folder}, **overwrite)
        assert contents(folder) == before
    (options["output_dir"] / "grids").write_text("mine")
    with pytest.raises(ValueError, match="holds grids, which the results would replace"):
        run_main(monkeypatch, "predict.py", **options, **overwrite, outputs="grids")


def test_results_beside_images_of_their_name_are_no_images(monkeypatch, options):
    """Pictures of the user's own in a folder called overlays, one of which is named like a result but for its type."""
    images = options["output_dir"] = options["images"]
    (images / "overlays").mkdir()
    Image.new("RGB", (64, 64), "teal").save(images / "overlays" / "a.png")
    run_main(monkeypatch, "predict.py", **options)
    after = contents(images)
    assert {"overlays/a.png", "overlays/a.jpg", "overlays/overlays/a.jpg"} <= set(after)
    for _ in range(2):
        run_main(monkeypatch, "predict.py", **options)
        assert contents(images) == after


@pytest.mark.parametrize("place", [".", "out", "below/out"])
def test_results_among_the_images_are_no_images(monkeypatch, options, place):
    images = options["images"]
    own = written(images)
    options["output_dir"] = images / place
    expected = {f"{output}/{name}{suffix}" for output, suffix in SUFFIXES.items() for name in NAMES}
    for _ in range(3):
        assert run_main(monkeypatch, "predict.py", **options) == 0
        assert written(images / place) - own == expected
    # Nor are those of an earlier run for a run that writes somewhere else.
    run_main(monkeypatch, "predict.py", **{**options, "output_dir": images / "other"})
    assert written(images / "other") == expected


def test_unreadable_files_are_listed_and_the_others_done(monkeypatch, capsys, options):
    images = options["images"]
    (images / "broken.jpg").write_text("no picture")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:500])
    assert run_main(monkeypatch, "predict.py", **options) == 1
    errors = capsys.readouterr().err
    assert "Could not be segmented (2):" in errors
    assert f"{images / 'broken.jpg'}: cannot be read" in errors
    assert f"{images / 'cut.png'}: cannot be read" in errors
    assert {f"masks/{name}.png" for name in NAMES} <= written(options["output_dir"])


def test_windows_scales_and_flips_have_no_grids(monkeypatch, options):
    many = {"window": 48, "stride": 32, "scales": [0.75, 1.0], "flip": True}
    assert run_main(monkeypatch, "predict.py", **options, **many) == 0
    assert {name.split("/")[0] for name in written(options["output_dir"])} == {"masks", "overlays"}
    with pytest.raises(ValueError, match=r"`outputs` must not have grids with windows, .*, got grids: leave"):
        run_main(monkeypatch, "predict.py", **options, **many, outputs=["grids"])


def test_impossible_calls_are_refused(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There are no images in"):
        find_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="`outputs` must be of masks, overlays, grids, got pictures"):
        predict_files(
            tiny_model(), CtsImageProcessor(), {}, tmp_path, outputs=["pictures"], options=InferenceOptions()
        )
    Image.new("RGB", (64, 64)).save(options["images"] / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.png and .*a\.jpg.* Rename"):
        find_images(options["images"])


def test_one_image_that_cannot_be_segmented_takes_no_other_with_it(monkeypatch, capsys, options):
    images, out = options["images"], options["output_dir"]
    Image.new("RGB", (64, 64), "teal").save(images / f"{'n' * 251}.png")  # as long as a name can be
    (images / b"\xff.png".decode("utf-8", "surrogateescape")).write_bytes((images / "a.png").read_bytes())
    forward = type(tiny_model()).forward

    def too_much_for_e(self, pixel_values, **kwargs):
        if pixel_values.shape[-2] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate a lot")
        return forward(self, pixel_values, **kwargs)

    monkeypatch.setattr(type(tiny_model()), "forward", too_much_for_e)
    assert run_main(monkeypatch, "predict.py", **options) == 1
    output = capsys.readouterr()
    assert "6 images were segmented" in output.out
    assert output.err.endswith(
        f"Could not be segmented (1):\n  {images / 'e.jpg'}: cannot be segmented (CUDA out of memory.)\n"
    )
    names = {*NAMES, "n" * 251, b"\xff".decode("utf-8", "surrogateescape")} - {"e"}
    assert written(out) == {f"{output}/{name}{suffix}" for output, suffix in SUFFIXES.items() for name in names}


def test_images_that_would_cost_gigabytes_are_reported(monkeypatch, capsys, options):
    Image.new("RGB", (900, 1)).save(options["images"] / "long.png")
    assert run_main(monkeypatch, "predict.py", **options) == 1
    output = capsys.readouterr()
    assert "5 images were segmented" in output.out
    assert f"Could not be segmented (1):\n  {options['images'] / 'long.png'}: cannot be segmented (" in output.err


def test_images_smaller_than_a_superpatch_are_reported(monkeypatch, capsys, options, tmp_path):
    tiny_model(num_labels=10).save_pretrained(tmp_path / "as_is")
    CtsImageProcessor(do_resize=False).save_pretrained(tmp_path / "as_is")
    Image.new("RGB", (4, 64)).save(options["images"] / "thin.png")
    assert run_main(monkeypatch, "predict.py", **{**options, "model": tmp_path / "as_is"}) == 1
    assert f"{options['images'] / 'thin.png'}: cannot be segmented (" in capsys.readouterr().err
    assert {f"masks/{name}.png" for name in NAMES} == {
        name for name in written(options["output_dir"]) if name.startswith("masks/")
    }


def test_a_full_disk_leaves_nothing_half_written(monkeypatch, options):
    out, write_bytes = options["output_dir"], Path.write_bytes

    def fill_disk(path, content):
        if len(list(out.rglob("*.png"))) >= 2:
            write_bytes(path, content[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(OSError, match=r"No space left on device.* could not be written.* start again"):
        run_main(monkeypatch, "predict.py", **options)
    assert all(read_stamp(out / name) for name in written(out))
    monkeypatch.undo()
    assert run_main(monkeypatch, "predict.py", **options) == 0
    assert len(written(out)) == 15


def test_what_a_killed_run_leaves_is_taken_away(monkeypatch, options):
    """The temporary file is the same in the next run, which replaces it."""
    out, replace = options["output_dir"], os.replace

    def kill(source, target):
        if Path(target).parent.name == "overlays":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", kill)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            run_main(monkeypatch, "predict.py", **options)
    assert len([path for path in (out / "overlays").iterdir() if path.name.startswith(".unfinished_")]) == 1
    assert run_main(monkeypatch, "predict.py", **options) == 0
    assert len(written(out)) == 15


def test_a_second_run_in_the_same_folder_is_refused_before_it_opens_the_model(monkeypatch, options):
    held, done = threading.Event(), threading.Event()

    def hold():
        with OutputFolder(options["output_dir"], "prediction"):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    try:
        with pytest.raises(ValueError, match="Another run is writing to"):
            run_main(monkeypatch, "predict.py", **{**options, "model": "absent"})
    finally:
        done.set()
        thread.join()
    options["output_dir"].with_name("file").write_text("mine")
    with pytest.raises(ValueError, match="must be a folder that can be written to"):
        run_main(
            monkeypatch,
            "predict.py",
            **{**options, "model": "absent", "output_dir": options["output_dir"].with_name("file")},
        )


def test_options_and_images_are_checked_before_the_model_is_opened(monkeypatch, options, tmp_path):
    (tmp_path / "empty").mkdir()
    for change, message in (
        ({"images": tmp_path / "absent"}, "There is no folder"),
        ({"images": tmp_path / "empty"}, "There are no images in"),
        ({"token_reduction": "nan"}, "`token_reduction` must be .*between 0"),
        ({"token_reduction": -0.1}, "`token_reduction` must be .*between 0"),
        ({"sharing_threshold": 1.5}, "`sharing_threshold` must be a probability between 0 and 1"),
        ({"token_reduction": 0.3, "sharing_threshold": 0.9}, "`sharing_threshold` must be None where `token_red"),
        ({"num_workers": -1}, "`num_workers` must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run_main(monkeypatch, "predict.py", **{**options, "model": "absent", **change})
    assert not options["output_dir"].exists()


def test_names_that_differ_in_case_alone_are_refused_where_case_is_ignored(monkeypatch, options, tmp_path):
    Image.new("RGB", (64, 64)).save(options["images"] / "A.png")
    assert run_main(monkeypatch, "predict.py", **options, outputs="masks") == 0
    monkeypatch.setattr("cts_hf.evaluation.prediction_results._ignores_case", lambda folder: True)
    with pytest.raises(ValueError, match=r"upper case counts as lower case in .*: A and a. Rename"):
        run_main(monkeypatch, "predict.py", **{**options, "output_dir": tmp_path / "ignoring"})


# Side of a picture's patches: those of 8 pixels are enlarged twice.
PATCH = 16


@pytest.mark.parametrize(
    ("name", "grids"),
    [
        ("beit_segmentation", dict.fromkeys(NAMES, (7, 9))),  # an odd grid
        # Windows of 64 x 64 pixels, side by side.
        ("eomt", {"a": (8, 8), "b": (16, 8), "e": (8, 16)}),
        ("upernet_dinov2", dict.fromkeys(NAMES, (12.5, 6))),  # 4 of 100 pixels are no whole patch
    ],
)
def test_models_of_transformers(monkeypatch, options, name, grids, tmp_path):
    model = save_existing(tmp_path / "plain", name)
    tiny_policy().save_pretrained(tmp_path / "policy")
    run = {**options, "model": model, "with_policy": tmp_path / "policy"}
    assert run_main(monkeypatch, "predict.py", **run) == 0
    out = options["output_dir"]
    assert written(out) == {f"{output}/{name}{suffix}" for output, suffix in SUFFIXES.items() for name in NAMES}
    sharing, processor = load_any(model, tmp_path / "policy")
    for image, size in NAMES.items():
        mask = Image.open(out / "masks" / f"{image}.png")
        assert mask.size == size
        picture = read_picture(find_images(options["images"])[image])
        with torch.no_grad():
            outputs = sharing.model(**processor(picture, return_tensors="pt"))
        (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[size[::-1]])
        # Images that are segmented together may be rounded differently.
        assert (np.array(mask) != expected.numpy()).mean() < 0.01
    for image, (columns, rows) in grids.items():
        assert Image.open(out / "grids" / f"{image}.png").size == (columns * PATCH, rows * PATCH)
    with pytest.raises(ValueError, match="of another model, budget or other options"):
        run_main(monkeypatch, "predict.py", **{**options, "model": model})
    with pytest.raises(ValueError, match="must be unset for a model of transformers"):
        run_main(monkeypatch, "predict.py", **run, flip=True)


def test_sharing_needs_a_policy(options):
    model = tiny_model(num_labels=10, use_policy=False)
    images = find_images(options["images"])
    with pytest.raises(ValueError, match=r"`token_reduction` must be 0 for a model without policy, got 0.3"):
        predict_files(model, CtsImageProcessor(), images, options["output_dir"])
    report = predict_files(
        model, CtsImageProcessor(size={"shortest_edge": 64}), images, options["output_dir"], token_reduction=0
    )
    assert (report.num_segmented, report.num_done, report.problems) == (5, 0, [])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_share_the_images(monkeypatch, options, tmp_path):
    (options["images"] / "broken.jpg").write_text("no picture")
    run_main(monkeypatch, "predict.py", **options)
    two = launch("predict.py", 2, **{**options, "output_dir": tmp_path / "two"})
    assert two.returncode != 0
    assert "Could not be segmented (1):" in two.stderr
    assert "ValueError" not in two.stderr  # of one that finds the folder locked by the other
    assert "5 images were segmented, 0 had been already" in two.stdout
    assert contents(tmp_path / "two") == contents(options["output_dir"])
    again = launch("predict.py", 2, **{**options, "output_dir": tmp_path / "two"}, token_reduction=0.6)
    assert again.returncode != 0
    assert "of another model, budget or other options" in again.stderr
