# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
from PIL import Image

from cts_hf import CtsImageProcessor
from cts_hf.data import SCENE_CLASSES, build_scenes

from ..helpers.models import tiny_model, tiny_policy
from ..helpers.scripts import launch, run_main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Segmenter and a policy of two levels, and a data set of five scenes."""
    root = tmp_path_factory.mktemp("thresholds")
    models = {
        "model": tiny_model(num_labels=10, superpatch_levels=(2, 4)),
        "policy": tiny_policy(superpatch_levels=(2, 4)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(root / name)
    for row in build_scenes(5, image_size=64):
        for kind, picture in (("images", row["image"]), ("labels", row["label"])):
            path = root / "data" / kind / "val" / f"{row['name']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    (root / "data" / "classes.txt").write_text("\n".join(SCENE_CLASSES))
    return root


@pytest.fixture
def options(folders, tmp_path):
    return {"model": folders / "model", "num_workers": 0, "json": tmp_path / "found.json"}


def test_what_is_found_is_what_evaluate_gives(monkeypatch, capsys, folders, options, tmp_path):
    run_main(monkeypatch, "find_threshold.py", **options, data_dir=folders / "data", token_reduction=0.6)
    found = json.loads(options["json"].read_text())
    assert f"sharing_threshold {found['sharing_threshold']}, on 5 images" in capsys.readouterr().out
    assert found["token_reduction"]["mean"] >= 0.6
    assert found["settings"]["token_reduction"] == 0.6
    evaluation = {"data_dir": folders / "data", "model": folders / "model", "num_workers": 0, "output_dir": tmp_path}
    run_main(monkeypatch, "evaluate.py", **evaluation, sharing_threshold=found["sharing_threshold"])
    (result,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert result["mean_token_reduction"] == found["token_reduction"]["mean"]
    assert result["policy_precision_at_budget"] == found["precision"]["mean"]

    # Of the same images without labels, the same.
    monkeypatch.setattr("cts_hf.data.arguments.DatasetArguments.load", lambda _: pytest.fail("labels were read"))
    run = {**options, "images": folders / "data" / "images", "overwrite": True}
    run_main(monkeypatch, "find_threshold.py", **run, token_reduction=0.6)
    alone = json.loads(options["json"].read_text())
    assert alone.pop("settings")["images"] == str(run["images"])
    assert alone == {name: found[name] for name in ("sharing_threshold", "num_images", "token_reduction")}


def test_a_precision_of_a_policy_alone(monkeypatch, folders, options):
    run = {**options, "model": folders / "policy", "data_dir": folders / "data", "max_samples": 3}
    run_main(monkeypatch, "find_threshold.py", **run, precision=0.3)
    found = json.loads(options["json"].read_text())
    assert found["num_images"] == 3
    assert found["precision"]["mean"] >= 0.3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "Either `token_reduction` or `precision` must be wanted, got None and None"),
        ({"token_reduction": 0.3, "precision": 0.9}, r"Either .* must be wanted, got 0\.3 and 0\.9"),
        ({"precision": 0.9, "images": "photos"}, "`precision` must be None with `images`"),
        ({"token_reduction": 0.95}, r"`token_reduction` must be a number between 0 \(no sharing\) and 0\.9375"),
        ({"precision": 90}, r"`precision` must be above 0 and at most 1, got 90\.0"),
        ({"token_reduction": 0.3, "max_samples": 0}, "`max_samples` must be at least 1, got 0"),
        ({"token_reduction": 0.3, "json": "folders"}, "`json` must be the path of a new file, got .*, which exists"),
    ],
)
def test_what_cannot_be_wanted_is_refused_before_images_are_read(monkeypatch, options, more, message):
    monkeypatch.setattr("cts_hf.data.arguments.DatasetArguments.load", lambda _: pytest.fail("images were read"))
    if "json" in more:
        options["json"].write_text("of the user")
    with pytest.raises(ValueError, match=message):
        run_main(monkeypatch, "find_threshold.py", **{**more, **options})
    assert not options["json"].exists() or options["json"].read_text() == "of the user"


def test_images_and_a_data_set_are_refused(monkeypatch, options, folders, tmp_path):
    run = {**options, "token_reduction": 0.3, "images": folders / "data" / "images"}
    with pytest.raises(SystemExit, match="`images` must be given without options of a data set"):
        run_main(monkeypatch, "find_threshold.py", **run, data_dir=folders / "data")
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="There are no images"):
        run_main(monkeypatch, "find_threshold.py", **{**run, "images": folders / "policy"})


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_find_what_one_finds(monkeypatch, folders, options, tmp_path):
    run = {**options, "data_dir": folders / "data", "precision": 0.3, "batch_size": 2}
    run_main(monkeypatch, "find_threshold.py", **run)
    finished = launch("find_threshold.py", 2, **{**run, "json": tmp_path / "two.json"})
    assert finished.returncode == 0, finished.stderr
    one, two = (json.loads(path.read_text()) for path in (options["json"], tmp_path / "two.json"))
    assert {**one, "settings": None} == {**two, "settings": None}
