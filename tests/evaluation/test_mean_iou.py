# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
import socket
import sys
from types import ModuleType

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score

import cts_hf.evaluation.mean_iou
from cts_hf.evaluation.mean_iou import MeanIoU, _import_package


NUM_LABELS = 6


@pytest.fixture(autouse=True)
def _offline_and_in_memory(tmp_path, monkeypatch):
    """No test may use the network, or leave anything where `evaluate` would store maps."""

    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    yield
    assert not (tmp_path / "metrics").exists()


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    references = torch.randint(0, NUM_LABELS, (5, 12, 10), generator=generator)
    noise = torch.randint(0, NUM_LABELS, references.shape, generator=generator)
    predictions = torch.where(torch.rand(references.shape, generator=generator) < 0.6, references, noise)
    references[torch.rand(references.shape, generator=generator) < 0.1] = 255
    return {"predictions": predictions, "references": references}


def test_agrees_with_scikit_learn(maps):
    metric = MeanIoU(NUM_LABELS)
    for prediction, reference in zip(*maps.values(), strict=True):
        metric.add(prediction=prediction, reference=reference)
    counted = maps["references"] != 255
    expected, given = maps["references"][counted].numpy(), maps["predictions"][counted].numpy()
    matrix = metric.confusion_matrix()
    assert matrix.dtype == torch.int64
    assert np.array_equal(matrix.numpy(), confusion_matrix(expected, given, labels=range(NUM_LABELS)))
    result = metric.compute()
    assert result["per_category_iou"] == pytest.approx(jaccard_score(expected, given, average=None))
    assert result["mean_iou"] == pytest.approx(jaccard_score(expected, given, average="macro"))
    assert result["per_category_accuracy"] == pytest.approx(recall_score(expected, given, average=None))
    assert result["mean_accuracy"] == pytest.approx(recall_score(expected, given, average="macro"))
    assert result["overall_accuracy"] == pytest.approx(accuracy_score(expected, given))


def by_the_formula_of_evaluate(predictions, references, num_labels, ignore_index):
    """What `mean_iou` of `evaluate` defines: areas per class from histograms, NaN for 0 / 0, means without NaN."""
    areas = np.zeros((3, num_labels))
    for prediction, reference in zip(predictions, references, strict=True):
        prediction, reference = (ids[reference != ignore_index] for ids in (prediction, reference))
        for area, ids in zip(areas, (prediction[prediction == reference], prediction, reference), strict=True):
            area += np.bincount(ids, minlength=num_labels)
    both, predicted, labelled = areas
    with np.errstate(invalid="ignore"):
        iou, accuracy = both / (predicted + labelled - both), both / labelled
    return {
        "mean_iou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "overall_accuracy": both.sum() / labelled.sum(),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ignore_index", [255, 0, -1])
def test_agrees_with_the_formula_of_evaluate(seed, ignore_index):
    rng = np.random.default_rng(seed)
    num_labels = 9
    present = rng.choice(num_labels, size=3 + seed, replace=False)  # the other classes are empty
    sizes = [(7, 5), (1, 1), (3, 11)]
    predictions = [rng.choice(present, size) for size in sizes]
    references = [rng.choice([*present[1:], ignore_index], size) for size in sizes]
    expected = by_the_formula_of_evaluate(predictions, references, num_labels, ignore_index)
    given = MeanIoU(num_labels, ignore_index).compute(predictions=predictions, references=references)
    assert given.keys() == expected.keys()
    assert np.isnan(given["per_category_iou"]).any()
    for name, value in expected.items():
        assert given[name] == pytest.approx(value, nan_ok=True), name


def test_absent_classes_are_nan_and_left_out_of_the_means():
    maps = {"predictions": [[[0, 0, 2, 0]]], "references": [[[0, 0, 0, 1]]]}
    result = MeanIoU(4).compute(**maps)
    assert result["per_category_iou"] == pytest.approx([0.5, 0, 0, float("nan")], nan_ok=True)
    assert result["per_category_accuracy"] == pytest.approx([2 / 3, 0, float("nan"), float("nan")], nan_ok=True)
    assert result["mean_iou"] == pytest.approx(0.5 / 3)
    assert result["mean_accuracy"] == pytest.approx(1 / 3)
    replaced = MeanIoU(4).compute(**maps, nan_to_num=-1)
    assert replaced["per_category_iou"] == pytest.approx([0.5, 0, 0, -1])
    assert replaced["per_category_accuracy"] == pytest.approx([2 / 3, 0, -1, -1])
    assert replaced["mean_iou"] == result["mean_iou"]


def test_only_ignored_pixels_are_nan():
    ignored = {"predictions": [[[0, 1]]], "references": [[[255, 255]]]}
    assert np.isnan(MeanIoU(2).compute(**ignored)["mean_iou"])
    assert MeanIoU(2).compute(**ignored, nan_to_num=0)["overall_accuracy"] == 0


def test_every_kind_of_map_counts_alike(maps):
    arrays = {name: ids.numpy().astype(np.uint8) for name, ids in maps.items()}
    expected = MeanIoU(NUM_LABELS).compute(**maps)
    for kind in (
        lambda ids: torch.from_numpy(ids),
        lambda ids: ids.astype(">i2"),
        lambda ids: ids.astype(np.uint64),
        lambda ids: ids[:, :, ::-1],
        lambda ids: [Image.fromarray(each) for each in ids],
        lambda ids: ids.tolist(),
        lambda ids: [torch.from_numpy(each).long() for each in ids],
    ):
        assert MeanIoU(NUM_LABELS).compute(**{name: kind(ids) for name, ids in arrays.items()}) == expected
    masks = {name: ids < 2 for name, ids in maps.items()}
    assert MeanIoU(2).compute(**masks) == MeanIoU(2).compute(**{name: ids.long() for name, ids in masks.items()})


def test_what_was_added_is_forgotten_with_the_result(maps):
    metric = MeanIoU(NUM_LABELS)
    expected = MeanIoU(NUM_LABELS).compute(**maps)
    for _ in range(2):
        metric.add_batch(**{name: ids[:2] for name, ids in maps.items()})
        metric.add_batch(**{name: list(ids[2:4]) for name, ids in maps.items()})
        assert len(metric) == 4
        assert metric.compute(**{name: ids[4:] for name, ids in maps.items()}) == expected
        assert len(metric) == 0
        with pytest.raises(ValueError, match="no maps were added: call `add` or `add_batch` first"):
            metric.compute()
    metric.add_batch(**maps)
    metric.reset()
    assert len(metric) == 0
    assert metric.compute(**maps) == expected


def test_memory_does_not_grow_with_the_maps(maps):
    metric = MeanIoU(NUM_LABELS)
    metric.add_batch(**maps)
    held = [value for value in vars(metric).values() if isinstance(value, torch.Tensor | np.ndarray | list)]
    assert [value.numel() for value in held] == [NUM_LABELS**2 + 3]


class Processes:
    """The part of an Accelerator that metrics use, for processes that are metrics of a list."""

    def __init__(self, others):
        self.others = others

    def reduce(self, counts, reduction):
        assert reduction == "sum"
        return counts + sum(metric._counts for metric in self.others)


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_any_sharding_gives_the_same_numbers(maps, cut):
    whole, first, second = (MeanIoU(NUM_LABELS) for _ in range(3))
    first.add_batch(**{name: ids[:cut] for name, ids in maps.items()})
    second.add_batch(**{name: ids[cut:] for name, ids in maps.items()})
    assert first.compute(accelerator=Processes([second])) == whole.compute(**maps)


def test_exchange_through_files_is_refused():
    with pytest.raises(ValueError, match=r"`num_process` must be 1, got 2: .* the `accelerator`"):
        MeanIoU(3, num_process=2, process_id=1)


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Where `evaluate.load` copies code to; what it leaves in this process is undone."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("modules_cache")
def test_loads_offline_from_the_package(maps):
    path = cts_hf.evaluation.mean_iou.__file__
    expected = MeanIoU(NUM_LABELS).compute(**maps)
    metric = evaluate.load(path, num_labels=NUM_LABELS, ignore_index=255)
    assert type(metric).__name__ == "MeanIoU"
    assert metric.module_type == "metric"
    metric.add_batch(**maps)
    assert metric.compute() == expected
    # As `mean_iou` of `evaluate` is called.
    assert evaluate.load(path).compute(**maps, num_labels=NUM_LABELS, ignore_index=255) == expected
    with pytest.raises(ValueError, match="`num_process` must be 1, got 2"):
        evaluate.load(path, num_process=2)


def test_a_script_of_its_name_does_not_hide_evaluate(tmp_path, monkeypatch):
    (tmp_path / "evaluate.py").write_text("raise AssertionError('the script was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = list(sys.path)
    monkeypatch.delitem(sys.modules, "evaluate")
    assert _import_package("evaluate", "Metric").Metric is evaluate.Metric
    assert sys.path == path
    monkeypatch.setitem(sys.modules, "evaluate", ModuleType("evaluate"))
    with pytest.raises(ImportError, match="must be the package of Hugging Face, but another module was imported"):
        _import_package("evaluate", "Metric")


def test_says_what_it_is():
    metric = MeanIoU(3)
    assert list(metric.features) == ["predictions", "references"]
    assert "intersection over union" in metric.description
    assert "predictions" in metric.inputs_description
    assert metric.citation.startswith("@article")
    assert "mean_iou" in metric.compute.__doc__
    assert "stored examples: 0" in repr(metric)


def test_example_of_the_description():
    lines = [line.strip() for line in MeanIoU(3).inputs_description.splitlines()]
    code = [line.removeprefix(">>> ") for line in lines if line.startswith(">>> ")]
    names = {"MeanIoU": MeanIoU}
    exec("\n".join(code[:-1]), names)
    assert repr(eval(code[-1], names)) == lines[-1]


def test_combines_with_other_metrics(maps):
    expected = MeanIoU(NUM_LABELS).compute(**maps)
    metrics = evaluate.combine([MeanIoU(NUM_LABELS), MeanIoU(NUM_LABELS)])
    named = evaluate.combine({"ours": MeanIoU(NUM_LABELS)}, force_prefix=True)
    for prediction, reference in zip(*(ids[:2] for ids in maps.values()), strict=True):
        metrics.add(prediction, reference)
    metrics.add_batch(**{name: ids[2:] for name, ids in maps.items()})
    result = metrics.compute()
    assert result["mean_io_u_0_mean_iou"] == result["mean_io_u_1_mean_iou"] == expected["mean_iou"]
    assert named.compute(**maps)["ours_mean_iou"] == expected["mean_iou"]


def test_impossible_ids_are_reported_and_forgotten(maps):
    metric = MeanIoU(NUM_LABELS - 1)
    with pytest.raises(ValueError, match=r"Ids must be 0 to 4, or 255 .* check `num_labels`"):
        metric.compute(**maps)
    good = {"predictions": [[[0, 1]]], "references": [[[0, 1]]]}
    assert metric.compute(**good)["mean_iou"] == 1


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"predictions": torch.zeros(1, 2, 2).int()}, "two sequences of as many maps, got 1 and NoneType"),
        ({"predictions": [[[0]]] * 2, "references": [[[0]]]}, "two sequences of as many maps, got 2 and 1"),
        (
            {"predictions": [[[0]]], "references": [[[0, 1]]]},
            r"shape of its reference, \(1, 2\), got \(1, 1\)",
        ),
        (
            {"predictions": torch.zeros(1, 2, 2), "references": torch.zeros(1, 2, 2)},
            "integer type, got one of torch",
        ),
        ({"predictions": [[[0.5]]], "references": [[[0]]]}, "integer type, got one of float64"),
        (
            {"predictions": [[0, 1]], "references": [[0, 1]]},
            r"shape \(2,\): take the argmax of logits",
        ),
        ({"predictions": ["a"], "references": ["a"]}, "integer type, got one of <U1"),
        ({"predictions": [[[0], [0, 1]]], "references": [[[0]]]}, "`predictions` must be maps .* that is no array"),
        (
            {"predictions": [[[0]]], "references": [torch.zeros(1, 1).int().to_sparse()]},
            "`references` must be maps of class ids that are stored one by one, .* torch.sparse_coo on cpu",
        ),
        (
            {"predictions": torch.zeros(1, 1, 1, device="meta").int(), "references": [[[0]]]},
            "`predictions` must be maps of class ids that are stored one by one, .* on meta",
        ),
        ({"predictions": [None], "references": [[[0]]]}, "integer type, got one of object"),
        ({"predictions": [[[0]]], "references": [[[0]]], "labels": 1}, "predictions and references, got labels as"),
    ],
)
def test_maps_that_do_not_fit_are_refused(maps, message):
    metric = MeanIoU(2)
    with pytest.raises(ValueError, match=message):
        metric.add_batch(**maps)
    assert len(metric) == 0


def test_a_refused_batch_is_not_counted_in_part():
    metric = MeanIoU(2)
    with pytest.raises(ValueError, match="resize logits"):
        metric.compute(predictions=[[[0]], [[0]]], references=[[[1]], [[1, 1]]])
    assert metric.compute(predictions=[[[0]]], references=[[[0]]])["overall_accuracy"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 0}, "`num_labels` must be a number of classes, 1 or more, got 0"),
        ({"num_labels": 2.0}, "`num_labels` must be a number of classes, 1 or more, got 2.0"),
        ({"num_labels": True}, "`num_labels` must be a number of classes, 1 or more, got True"),
        (
            {"num_labels": 2, "ignore_indx": 0, "cache_dir": "."},
            r"of `evaluate.Metric`, got \['ignore_indx'\] as well",
        ),
        ({"num_labels": 2, "device": "gpu"}, "`device` must be a device of this machine, got 'gpu'"),
        ({"num_labels": 2, "device": "meta"}, "`device` must be a device of this machine, got 'meta'"),
        ({"num_labels": 2, "device": None}, "`device` must be a device of this machine, got None"),
        ({"num_labels": 2, "ignore_index": None}, "`ignore_index` must be the id of pixels to ignore, got None"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(**options)


def test_options_of_evaluates_own_metric_may_only_change_nothing(maps):
    expected = MeanIoU(NUM_LABELS).compute(**maps)
    assert MeanIoU(NUM_LABELS).compute(**maps, label_map=None, reduce_labels=False) == expected
    assert MeanIoU().compute(**maps, num_labels=NUM_LABELS, ignore_index=255, reduce_labels=False) == expected
    for options, message in (
        ({"reduce_labels": True}, "`reduce_labels` must be False, got True: change the ids"),
        ({"label_map": {1: 2}}, r"`label_map` must be None, got \{1: 2\}: change the ids"),
        ({"ignore_indx": 0}, r"got \['ignore_indx'\] as well: correct or leave out"),
    ):
        with pytest.raises(ValueError, match=message):
            MeanIoU(NUM_LABELS).compute(**maps, **options)


def test_options_of_compute_must_be_those_that_were_counted_with(maps):
    metric = MeanIoU(NUM_LABELS)
    metric.add_batch(**maps)
    for options in ({"num_labels": 9}, {"ignore_index": 0}):
        with pytest.raises(ValueError, match="with which 5 maps were counted, got"):
            metric.compute(**options)
    with pytest.raises(ValueError, match="`nan_to_num` must be the number to put for NaN, got 'zero'"):
        metric.compute(nan_to_num="zero")
    assert metric.compute(num_labels=NUM_LABELS, ignore_index=255) == MeanIoU(NUM_LABELS).compute(**maps)
    with pytest.raises(ValueError, match="`num_labels` must be known when maps are added, got None"):
        MeanIoU().add_batch(**maps)
