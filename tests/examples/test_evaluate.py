# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import io
import json
import shutil
import sys

import pytest
from PIL import Image

from cts_hf import CtsImageProcessor
from cts_hf.data import SCENE_CLASSES, build_scenes

from ..helpers.existing_models import save_existing
from ..helpers.models import tiny_model, tiny_policy
from ..helpers.scripts import ROOT, ClosedPipe, command_line, launch, run_main, run_script
from ..helpers.slow import slow_but


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
    sweep = {"sharing": ["learned", "oracle"], "token_reduction": [0, 0.3, 0.75]}
    run_main(monkeypatch, "evaluate.py", **options, **sweep, window=48, stride=32, flip=True, max_samples=2)
    results = read(options["output_dir"])["results"]
    assert [(result["sharing"], result["token_reduction"]) for result in results] == [
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


def test_a_plot_takes_a_name_with_dollars(monkeypatch, options, tmp_path):
    shutil.copytree(options["model"], tmp_path / "$a^b^c$")
    run = {**options, "model": tmp_path / "$a^b^c$", "token_reduction": [0, 0.3], "max_samples": 1}
    run_main(monkeypatch, "evaluate.py", **run)
    with Image.open(options["output_dir"] / "evaluation.png") as picture:
        picture.load()


def test_enlarged_images_have_more_tokens(monkeypatch, options):
    run_main(monkeypatch, "evaluate.py", **options, shortest_edge=128)
    assert read(options["output_dir"])["results"][0]["input_size"] == [128, 128]


def test_another_data_set_is_refused(monkeypatch, options, tmp_path):
    tiny_model(num_labels=3).save_pretrained(tmp_path / "other")
    CtsImageProcessor().save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="The data set has 10 classes, the model 3"):
        run_main(monkeypatch, "evaluate.py", **{**options, "model": tmp_path / "other"})


REORDERED = (*SCENE_CLASSES[1::-1], *SCENE_CLASSES[2:])
RENAMED = ("air", *SCENE_CLASSES[1:])


@pytest.fixture
def named_model(tmp_path):
    """Saves a model with these names of its classes."""

    def save(names):
        tiny_model(num_labels=10, id2label=dict(enumerate(names))).save_pretrained(tmp_path / "named")
        CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "named")
        return tmp_path / "named"

    return save


def test_classes_in_another_order_than_the_models_are_refused(monkeypatch, options, named_model):
    first, second = SCENE_CLASSES[:2]
    message = f"in the order of the model's, got '{first}' for class 0, which is '{second}' in the model"
    with pytest.raises(SystemExit, match=message):
        run_main(monkeypatch, "evaluate.py", **{**options, "model": named_model(REORDERED)})
    assert not (options["output_dir"] / "evaluation.json").exists()


def test_classes_of_other_names_than_the_models_are_warned_about(monkeypatch, capsys, options, named_model):
    run_main(monkeypatch, "evaluate.py", **{**options, "model": named_model(RENAMED)}, max_samples=1)
    printed = capsys.readouterr().err
    assert "Warning: 1 of 10 classes have other names in the data set than in the model" in printed
    assert f"such as class 0: '{SCENE_CLASSES[0]}' and 'air'" in printed


@pytest.mark.parametrize("names", [SCENE_CLASSES, [f"class_{index}" for index in range(10)]])
def test_equal_and_missing_names_are_not_warned_about(monkeypatch, capsys, options, named_model, names):
    run_main(monkeypatch, "evaluate.py", **{**options, "model": named_model(names)}, max_samples=1)
    assert "Warning" not in capsys.readouterr().err


@pytest.mark.parametrize("old", [["--policy", "random", "oracle"], ["--policy=random"], ["--policy"]])
def test_the_earlier_name_of_the_option_is_refused_with_the_new_one(monkeypatch, capsys, options, old):
    arguments = [*command_line(options), *old]
    with pytest.raises(SystemExit) as exit:
        run_script(monkeypatch, ROOT / "examples" / "evaluate.py", arguments)
    assert exit.value.code == 2
    assert "`--policy` is now `--sharing`, one or more of none, learned, random, oracle" in capsys.readouterr().err
    assert not options["output_dir"].exists()


def test_no_sharing_is_evaluated_once_whatever_the_budgets(monkeypatch, capsys, options):
    run = {**options, "max_samples": 1}
    run_main(monkeypatch, "evaluate.py", **run, sharing="none")
    (result,) = read(options["output_dir"])["results"]
    assert (result["sharing"], result["token_reduction"]) == ("none", 0)
    assert "|    none |               0 |" in capsys.readouterr().out
    sweep = {"sharing": ["oracle", "none"], "token_reduction": [0.3, 0.6], "overwrite_output_dir": True}
    run_main(monkeypatch, "evaluate.py", **run, **sweep)
    results = read(options["output_dir"])["results"]
    assert [(each["sharing"], each["token_reduction"]) for each in results] == [
        ("none", 0),
        ("oracle", 0.3),
        ("oracle", 0.6),
    ]
    assert results[0] == result


def test_budgets_of_each_level_and_thresholds(monkeypatch, capsys, options, tmp_path):
    folder = tmp_path / "levels"
    tiny_model(num_labels=10, superpatch_levels=(2, 4)).save_pretrained(folder)
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)
    run = {**options, "model": folder, "max_samples": 2}
    run_main(monkeypatch, "evaluate.py", **run, token_reduction=[0.9, "0.15,0.3"], sharing_threshold=[0, 1])
    results = read(options["output_dir"])["results"]
    assert [(each["token_reduction"], each.get("sharing_threshold")) for each in results] == [
        (0.9, None),
        ([0.15, 0.3], None),
        (None, 0),
        (None, 1),
    ]
    assert [each["mean_token_reduction"] for each in results[2:]] == [0.9375, 0]
    printed = capsys.readouterr().out
    assert "| learned |        0.15,0.3 |" in printed
    assert "| learned |          p >= 0 |" in printed
    for model, token_reduction in ((options["model"], "0.15,0.3"), (options["model"], 0.9), (folder, "0.2,0.9")):
        with pytest.raises(ValueError, match="`token_reduction` must be a number between 0"):
            run_main(
                monkeypatch,
                "evaluate.py",
                **{**run, "model": model, "output_dir": tmp_path / "refused"},
                token_reduction=token_reduction,
            )
    assert not (tmp_path / "refused").exists()


def test_the_models_own_threshold_is_the_default(monkeypatch, options, tmp_path):
    tiny_model(num_labels=10, sharing_threshold=0.5).save_pretrained(tmp_path / "own")
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "own")
    run_main(monkeypatch, "evaluate.py", **options, sharing_threshold=0.5)
    expected = read(options["output_dir"])["results"]
    run = {**options, "model": tmp_path / "own", "overwrite_output_dir": True}
    run_main(monkeypatch, "evaluate.py", **run)
    assert read(options["output_dir"])["results"] == expected
    run_main(monkeypatch, "evaluate.py", **run, token_reduction=0.3)
    assert read(options["output_dir"])["results"][0]["token_reduction"] == 0.3


def refuse_to_load(*_, **__):
    raise AssertionError("a model was loaded")


def test_what_is_wrong_is_said_before_a_model_is_loaded(monkeypatch, options, tmp_path):
    monkeypatch.setattr("cts_hf.CtsForSemanticSegmentation.from_pretrained", refuse_to_load)
    with pytest.raises(SystemExit, match="no split 'train', the data set has test"):
        run_main(monkeypatch, "evaluate.py", **{**options, "split": "train"})
    monkeypatch.setattr("cts_hf.data.arguments.DatasetArguments.load", refuse_to_load)
    (tmp_path / "notes").write_text("of the user")
    with pytest.raises(ValueError, match="notes must be a folder that can be written to"):
        run_main(monkeypatch, "evaluate.py", **{**options, "output_dir": tmp_path / "notes"})
    assert (tmp_path / "notes").read_text() == "of the user"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"token_reduction": ["0.3", "nan"]}, "`token_reduction` must be a number between 0 .* got nan"),
        ({"token_reduction": "inf"}, "`token_reduction` must be a number between 0 .* got inf"),
        ({"sharing_threshold": [0.9, 1.5]}, "`sharing_threshold` must be a probability between 0 and 1, .* got 1.5"),
        ({"max_samples": 0}, "`max_samples` must be at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"scales": ["1.0", "nan"]}, r"`scales` must be one or more finite numbers above 0, got \[1.0, nan\]"),
        ({"shortest_edge": 0}, "`shortest_edge` must be a whole number, 1 or more, got 0"),
        ({"batch_size": 0}, "`batch_size` must be a whole number, 1 or more, got 0"),
        ({"window": 32, "stride": 0}, "`stride` must be a whole number, 1 or more, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused_first(monkeypatch, options, more, message):
    monkeypatch.setattr("cts_hf.data.arguments.DatasetArguments.load", refuse_to_load)
    with pytest.raises(ValueError, match=message):
        run_main(monkeypatch, "evaluate.py", **{**options, **more})
    assert not options["output_dir"].exists()


def test_windows_smaller_than_a_superpatch_are_refused_before_images_are_read(monkeypatch, options):
    monkeypatch.setattr("cts_hf.evaluation.evaluator.resized_images", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(ValueError, match="`window` must be at least 16 pixels"):
        run_main(monkeypatch, "evaluate.py", **options, window=15)


def test_more_images_than_there_are_is_all_of_them(monkeypatch, options):
    run_main(monkeypatch, "evaluate.py", **options, max_samples=6)
    assert read(options["output_dir"])["results"][0]["num_images"] == 5


def test_only_earlier_results_are_replaced_and_only_if_asked(monkeypatch, options):
    folder = options["output_dir"]
    run = {**options, "max_samples": 1}
    run_main(monkeypatch, "evaluate.py", **run, token_reduction=[0, 0.3])
    assert (folder / "evaluation.png").exists()
    with pytest.raises(ValueError, match=r"evaluation.json, evaluation.png of an earlier run: .* --overwrite"):
        run_main(monkeypatch, "evaluate.py", **run)
    assert len(read(folder)["results"]) == 2
    run_main(monkeypatch, "evaluate.py", **run, overwrite_output_dir=True)
    assert len(read(folder)["results"]) == 1
    assert not (folder / "evaluation.png").exists()  # which was of the two

    (folder / "evaluation.png").write_text("of the user")
    with pytest.raises(ValueError, match=r"holds evaluation.png, which this run would replace"):
        run_main(monkeypatch, "evaluate.py", **run, overwrite_output_dir=True)
    assert (folder / "evaluation.png").read_text() == "of the user"


def test_results_are_printed_and_saved_before_they_are_drawn(monkeypatch, capsys, options):
    def fail(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("cts_hf.evaluation.sweep.plot_sweep", fail)
    with pytest.raises(RuntimeError, match="no fonts"):
        run_main(monkeypatch, "evaluate.py", **options, token_reduction=[0, 0.3], max_samples=1)
    assert "| learned |             0.3 |" in capsys.readouterr().out
    assert len(read(options["output_dir"])["results"]) == 2
    assert {path.name for path in options["output_dir"].iterdir() if not path.name.startswith(".cts_hf")} == {
        "evaluation.json"
    }


def test_results_that_cannot_be_saved_are_printed(monkeypatch, capsys, options):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("cts_hf.evaluation.sweep.to_json", fail)
    with pytest.raises(OSError, match="no space left"):
        run_main(monkeypatch, "evaluate.py", **options, max_samples=1)
    assert "IoU of sky: " in capsys.readouterr().out


@pytest.mark.parametrize("token_reduction", [[0.3], [0, 0.3]])
def test_results_that_cannot_be_printed_are_saved_and_drawn(monkeypatch, options, token_reduction):
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    with pytest.raises(BrokenPipeError):
        run_main(monkeypatch, "evaluate.py", **options, token_reduction=token_reduction, max_samples=1)
    assert len(read(options["output_dir"])["results"]) == len(token_reduction)
    assert (options["output_dir"] / "evaluation.png").exists() == (len(token_reduction) > 1)


def test_names_that_the_output_cannot_encode_are_escaped(monkeypatch, options, tmp_path):
    shutil.copytree(options["data_dir"], tmp_path / "data")
    names = ["Straße", *SCENE_CLASSES[1:]]
    (tmp_path / "data" / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii", write_through=True))
    run_main(monkeypatch, "evaluate.py", **{**options, "data_dir": tmp_path / "data"}, max_samples=1)
    assert rb"IoU of Stra\xdfe: " in printed.getvalue()
    assert read(options["output_dir"])["classes"] == names


def test_nothing_of_the_machine_is_saved(monkeypatch, options):
    run_main(monkeypatch, "evaluate.py", **options, max_samples=1)
    written = read(options["output_dir"])
    assert written.keys() == {"settings", "classes", "results"}
    typed = {str(value) for value in options.values()}
    assert {value for value in written["settings"].values() if "/" in str(value)} <= typed


@pytest.fixture
def existing_options(options, tmp_path):
    """The scenes in five classes, as models of transformers have in the tests."""
    shutil.copytree(options["data_dir"], tmp_path / "data")
    for path in (tmp_path / "data" / "labels").rglob("*.png"):
        Image.open(path).point(lambda label: label % 5).save(path)
    (tmp_path / "data" / "classes.txt").write_text("\n".join(SCENE_CLASSES[:5]))
    return {**options, "data_dir": tmp_path / "data", "max_samples": 2}


@pytest.mark.parametrize("name", slow_but(("beit_segmentation", "eomt"), ("beit_segmentation", "eomt", "mask2former")))
def test_models_of_transformers(monkeypatch, existing_options, name, tmp_path):
    folder, run = existing_options["output_dir"], {**existing_options, "overwrite_output_dir": True}
    sharing = {"sharing": ["learned", "random", "oracle"], "token_reduction": [0, 0.3]}
    saved = save_existing(tmp_path / "saved", name, tiny_policy())
    run_main(monkeypatch, "evaluate.py", **{**run, "model": saved}, **sharing)
    results = read(folder)["results"]
    assert [result["sharing"] for result in results] == ["none", "learned", "random", "oracle"]
    plain = save_existing(tmp_path / "plain", name)
    tiny_policy().save_pretrained(tmp_path / "policy")
    with_policy = {"with_policy": tmp_path / "policy"}
    run_main(monkeypatch, "evaluate.py", **{**run, "model": plain}, **sharing, **with_policy)
    assert read(folder)["results"] == results
    run_main(monkeypatch, "evaluate.py", **{**run, "model": plain})
    assert read(folder)["results"] == results[:1]
    run_main(monkeypatch, "evaluate.py", **{**run, "model": plain}, **with_policy)
    assert read(folder)["results"] == results[1:2]


def test_a_policy_in_place_of_the_models(monkeypatch, options, tmp_path):
    tiny_policy(seed=1).save_pretrained(tmp_path / "policy")
    model = tiny_model(num_labels=10)
    model.set_policy(tiny_policy(seed=1))
    model.save_pretrained(tmp_path / "other")
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "other")
    run = {**options, "overwrite_output_dir": True}
    run_main(monkeypatch, "evaluate.py", **run)
    before = read(options["output_dir"])["results"]
    run_main(monkeypatch, "evaluate.py", **run, with_policy=tmp_path / "policy")
    replaced = read(options["output_dir"])["results"]
    run_main(monkeypatch, "evaluate.py", **{**run, "model": tmp_path / "other"})
    assert replaced == read(options["output_dir"])["results"] != before


def test_models_of_transformers_are_refused_with_other_classes_or_windows(
    monkeypatch, options, existing_options, tmp_path
):
    model = save_existing(tmp_path / "model", "beit_segmentation")
    with pytest.raises(SystemExit, match="The data set has 10 classes, the model 5"):
        run_main(monkeypatch, "evaluate.py", **{**options, "model": model})
    with pytest.raises(ValueError, match=r"`window`, .* must be unset for a model of transformers"):
        run_main(monkeypatch, "evaluate.py", **{**existing_options, "model": model}, window=48)
    with pytest.raises(ValueError, match="`sharing` must be 'none', 'random' or 'oracle' for a model without policy"):
        run_main(monkeypatch, "evaluate.py", **{**existing_options, "model": model}, token_reduction=0.3)


# Five images are three batches of two; one image leaves a process without any.
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("more", [{"batch_size": 2}, {"window": 48, "stride": 32, "flip": True, "max_samples": 1}])
def test_two_processes_give_what_one_gives(monkeypatch, options, more, tmp_path):
    run = {**options, **more, "sharing": ["learned", "random", "oracle"], "token_reduction": [0, 0.3]}
    run["sharing_threshold"] = 0.5
    run_main(monkeypatch, "evaluate.py", **run)
    finished = launch("evaluate.py", 2, **{**run, "output_dir": tmp_path / "two"})
    assert finished.returncode == 0, finished.stderr
    assert read(tmp_path / "two")["results"] == read(options["output_dir"])["results"]
