import json

import pytest
from PIL import Image

from cts_hf import CtsImageProcessor
from cts_hf.data import SCENE_CLASSES, build_scenes

from ..models import tiny_model
from .scripts import launch, run_main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint and a data set of five scenes."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny_model(num_labels=10).save_pretrained(root / "model")
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(root / "model")
    for row in build_scenes(5, image_size=64):
        for kind, picture in (("images", row["image"]), ("labels", row["label"])):
            path = root / "data" / kind / "test" / f"{row['name']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    (root / "data" / "classes.txt").write_text("\n".join(SCENE_CLASSES))
    return root / "model", root / "data"


@pytest.fixture
def options(folders, tmp_path):
    model, data = folders
    return {"model": model, "data_dir": data, "split": "test", "output_dir": tmp_path / "out", "num_workers": 0}


def read(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_one_budget_prints_a_table_and_every_class(monkeypatch, capsys, options):
    run_main(monkeypatch, "evaluate.py", **options)
    printed = capsys.readouterr().out
    assert "| learned |             0.3 |" in printed
    assert "IoU of sky: " in printed
    written = read(options["output_dir"])
    assert written["classes"] == list(SCENE_CLASSES)
    assert written["settings"]["split"] == "test"
    assert [result["num_images"] for result in written["results"]] == [5]
    assert not (options["output_dir"] / "evaluation.png").exists()


def test_sweep_in_windows(monkeypatch, options):
    sweep = {"policy": ["learned", "oracle"], "token_reduction": [0, 0.3, 0.75]}
    run_main(monkeypatch, "evaluate.py", **options, **sweep, window=48, stride=32, flip=True, max_samples=2)
    results = read(options["output_dir"])["results"]
    assert [(result["policy"], result["token_reduction"]) for result in results] == [
        ("none", 0),
        ("learned", 0.3),
        ("learned", 0.75),
        ("oracle", 0.3),
        ("oracle", 0.75),
    ]
    assert results[0]["num_images"] == 2
    assert results[0]["input_size"] == [48, 48]
    with Image.open(options["output_dir"] / "evaluation.png") as picture:
        picture.load()


def test_enlarged_images_have_more_tokens(monkeypatch, options):
    run_main(monkeypatch, "evaluate.py", **options, shortest_edge=128)
    assert read(options["output_dir"])["results"][0]["input_size"] == [128, 128]


def test_another_data_set_or_split_is_refused(monkeypatch, options, folders, tmp_path):
    with pytest.raises(SystemExit, match="no split 'train', the data set has test"):
        run_main(monkeypatch, "evaluate.py", **{**options, "split": "train"})
    tiny_model(num_labels=3).save_pretrained(tmp_path / "other")
    CtsImageProcessor().save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="The data set has 10 classes, the model 3"):
        run_main(monkeypatch, "evaluate.py", **{**options, "model": tmp_path / "other"})


# Five images are three batches of two; one image leaves a process without any.
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("more", [{"batch_size": 2}, {"window": 48, "stride": 32, "flip": True, "max_samples": 1}])
def test_two_processes_give_what_one_gives(monkeypatch, options, more, tmp_path):
    run = {**options, **more, "policy": ["learned", "random", "oracle"], "token_reduction": [0, 0.3]}
    run_main(monkeypatch, "evaluate.py", **run)
    finished = launch("evaluate.py", 2, **{**run, "output_dir": tmp_path / "two"})
    assert finished.returncode == 0, finished.stderr
    assert read(tmp_path / "two")["results"] == read(options["output_dir"])["results"]
