# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode

from cts_hf import superpatch_targets
from cts_hf.data import load_folder
from cts_hf.evaluation.evaluator import evaluate_segmentation, evaluate_sharings
from cts_hf.evaluation.mean_iou import MeanIoU
from cts_hf.evaluation.sharing import STRATEGIES, Sharing
from cts_hf.evaluation.sweep import to_json
from cts_hf.evaluation.windows import InferenceOptions, View, segment, with_flips

from ..helpers.models import tiny_model
from ..helpers.scenes import NUM_SCENES, processor, scene_model, scenes
from ..helpers.slow import slow_but


WINDOWS = {"window": 48, "stride": 32}


def label_tensor(row):
    return torch.from_numpy(np.array(row["label"])).long()


def scores_seen(model, *arguments, **settings):
    """The scores that the model is given during an evaluation, by image."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["superpatch_scores"]), with_kwargs=True
    )
    evaluate_segmentation(model, *arguments, **settings)
    hook.remove()
    return torch.cat(seen)


@torch.no_grad()
def test_whole_images_as_the_image_processor_segments_them():
    model = scene_model()
    expected = MeanIoU(10)
    for row in scenes():
        outputs = model(**processor()(row["image"], return_tensors="pt"), token_reduction=0.3)
        segmentation = processor().post_process_semantic_segmentation(outputs, [(80, 80)])[0]
        expected.add(prediction=segmentation, reference=label_tensor(row))
    expected = expected.compute()
    for batch_size in (1, 3):
        options = InferenceOptions(batch_size=batch_size)
        result = evaluate_segmentation(model, scenes(), processor(), token_reduction=0.3, options=options)
        assert result["num_images"] == NUM_SCENES
        for name, value in expected.items():
            assert result[name] == pytest.approx(value, nan_ok=True), name


def test_windows_scales_and_flips_as_segment_gives_them():
    model = scene_model()
    expected = MeanIoU(10)
    for row in scenes():
        images = [processor(edge)(row["image"], return_tensors="pt").pixel_values for edge in (64, 32)]
        views = with_flips([View(image) for image in images])
        probabilities = segment(model, views, (80, 80), **WINDOWS, token_reduction=0.3)
        expected.add(prediction=probabilities.argmax(0), reference=label_tensor(row))
    options = InferenceOptions(**WINDOWS, scales=[1.0, 0.5], flip=True)
    result = evaluate_segmentation(model, scenes(), processor(), token_reduction=0.3, options=options)
    assert result["mean_iou"] == pytest.approx(expected.compute()["mean_iou"])


@pytest.mark.parametrize("options", slow_but([{}], [{}, {**WINDOWS, "flip": True}]))
def test_streamed_rows_and_several_sharings_at_once_change_nothing(options):
    model, options = scene_model(), InferenceOptions(**options, batch_size=2)
    sharings = [Sharing(strategy, 0.3) for strategy in STRATEGIES[1:]] + [Sharing("learned", 0)]
    together = evaluate_sharings(model, scenes(), processor(), sharings, options=options)
    streamed = evaluate_sharings(model, scenes().to_iterable_dataset(), processor(), sharings, options=options)
    assert to_json(streamed) == to_json(together)
    for sharing, result in zip(sharings, together, strict=True):
        settings = {"sharing": sharing.strategy, "token_reduction": sharing.token_reduction}
        alone = evaluate_segmentation(model, scenes(), processor(), options=options, **settings)
        assert to_json(alone) == to_json(result)
        assert ("policy_accuracy" in result) == (sharing.token_reduction > 0)


def test_random_scores_belong_to_the_image_not_to_its_batch():
    model = scene_model()
    arguments = {"sharing": "random", "token_reduction": 0.3}
    one = scores_seen(model, scenes(), processor(), options=InferenceOptions(batch_size=1), **arguments)
    two = scores_seen(model, scenes(), processor(), options=InferenceOptions(batch_size=2), **arguments)
    assert torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, scores_seen(model, scenes(), processor(), seed=1, **arguments))


def test_oracle_prefers_one_class_then_what_is_ignored_and_breaks_ties_at_random():
    scores = scores_seen(scene_model(), scenes(), processor(), sharing="oracle", token_reduction=0.3)
    labels = torch.stack([label_tensor(row) for row in scenes()])
    seen = (2 * torch.arange(64) + 1) * 80 // 128  # the nearest pixels
    targets = superpatch_targets(labels[:, seen[:, None], seen], 16)
    assert set(targets.unique().tolist()) == {0, 1}
    assert scores[targets == 1].min() > scores[targets == 0].max()

    labels = np.zeros((64, 64), np.uint8)
    labels[20:24] = 1  # the second row of superpatches holds two classes
    labels[:4] = 255  # the first is partly ignored, on the border
    row = {"image": Image.new("RGB", (64, 64)), "label": Image.fromarray(labels)}
    scores = scores_seen(scene_model(), [row], processor(), sharing="oracle", token_reduction=0.3)[0]
    assert scores[1].max() < scores[0].min() < scores[0].max() < scores[2:].min()
    order = scores[2:].flatten().argsort()
    assert not torch.equal(order, order.sort().values)
    assert not torch.equal(order, order.sort(descending=True).values)


def test_policy_metrics_are_of_what_is_shared():
    options = InferenceOptions(**WINDOWS)
    budget = 0.3
    result = evaluate_segmentation(
        scene_model(), scenes(), processor(), sharing="oracle", token_reduction=budget, options=options
    )
    assert result["policy_accuracy"] == result["policy_average_precision"] == 1
    assert 0 < result["policy_precision_at_budget"] <= 1
    unshared = evaluate_segmentation(scene_model(), scenes(), processor(), sharing="oracle", token_reduction=0)
    assert not any(name.startswith("policy_") for name in unshared)


def half_plain_row():
    """64 x 64 pixels: of superpatches of 16, the upper half has one class, every one of the lower half several."""
    labels = np.zeros((64, 64), np.uint8)
    labels[32:, ::2] = 1
    return {"image": Image.new("RGB", (64, 64)), "label": Image.fromarray(labels)}


HALF = 0.375  # of 64 patches, three each of 8 superpatches, disappear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 64, "flip": True}])
def test_of_equal_scores_those_count_that_shared(dtype, options):
    model = scene_model()
    model.cts.policy.head.weight.data.zero_()
    model = model.to(dtype)
    result = evaluate_segmentation(
        model, [half_plain_row()], processor(), token_reduction=HALF, options=InferenceOptions(**options)
    )
    # All scores are equal. The model shares the first superpatches, which have one class.
    assert result["policy_precision_at_budget"] == 1


@pytest.mark.parametrize("options", [{}, {"window": 48, "flip": True}])
@pytest.mark.parametrize("levels", [(2,), (2, 4)])
def test_a_threshold_gives_each_image_what_it_gets_alone(levels, options):
    model, rows, seen = scene_model(superpatch_levels=levels), scenes().take(3), []
    pixel_values = processor()([row["image"] for row in rows], return_tensors="pt").pixel_values
    with torch.no_grad():
        # The policy of the levels between which the images differ.
        logits = model(pixel_values).policy_logits
    logits = logits if isinstance(logits, tuple) else (logits,)
    threshold = logits[0].softmax(dim=1)[:, 1].median().item()
    model.register_forward_hook(lambda *call: seen.append(call[-1].num_tokens))
    results = []
    for batch_size in (3, 1):
        settings = {"sharing_threshold": threshold, "options": InferenceOptions(**options, batch_size=batch_size)}
        results.append(evaluate_segmentation(model, rows, processor(), **settings))
        num_tokens = torch.cat(seen)
        assert results[-1]["mean_num_tokens"] == pytest.approx(num_tokens.double().mean().item(), abs=1e-12)
        assert len(set(num_tokens.tolist())) > 1
        seen.clear()
    assert to_json(results[0]) == to_json(results[1])
    result = results[0]
    assert (result["token_reduction"], result["sharing_threshold"]) == (None, threshold)
    assert 0 < result["mean_token_reduction"] < 1 - 1 / levels[-1] ** 2
    assert result["policy_precision_at_budget"] > 0
    model.config.sharing_threshold = threshold
    assert to_json(evaluate_segmentation(model, rows, processor(), options=settings["options"])) == to_json(result)


@pytest.mark.parametrize("sharing", STRATEGIES[1:])
@pytest.mark.parametrize("options", [{}, {"window": 64, "flip": True}])
def test_metrics_are_those_of_the_models_own_outputs(sharing, options):
    model, forwards, policy_runs = scene_model(), [], []

    def answer_something_else(module, args, outputs):
        """Whatever the model did: it has shared what has several classes, by scores that say the opposite."""
        shape = outputs.shared_superpatches.shape
        is_plain = torch.ones(shape, dtype=torch.bool)
        is_plain[:, shape[1] // 2 :] = False
        outputs.shared_superpatches = ~is_plain
        if outputs.policy_logits is not None:
            outputs.policy_logits = torch.stack([-is_plain.float(), is_plain.float()], dim=1)
        forwards.append(len(policy_runs))
        return outputs

    model.register_forward_hook(answer_something_else)
    model.cts.policy.register_forward_hook(lambda *_: policy_runs.append(1))
    settings = {"sharing": sharing, "token_reduction": HALF, "options": InferenceOptions(**options)}
    result = evaluate_segmentation(model, [half_plain_row()], processor(), **settings)
    assert result["policy_precision_at_budget"] == 0
    assert (result["policy_accuracy"] == 1) == (sharing != "random")
    # The policy runs inside the model and nowhere else.
    assert forwards == [index + 1 if sharing == "learned" else 0 for index in range(len(forwards))]
    assert len(policy_runs) == (len(forwards) if sharing == "learned" else 0)


def test_the_models_own_budget_is_the_default():
    model = scene_model(token_reduction=0.6)
    result = evaluate_segmentation(model, scenes(), processor())
    assert result["token_reduction"] == 0.6
    assert to_json(result) == to_json(evaluate_segmentation(model, scenes(), processor(), token_reduction=0.6))


def test_training_mode_comes_back():
    model = scene_model().train()
    evaluate_segmentation(model, scenes().take(1), processor())
    assert model.training
    with pytest.raises(KeyError):
        evaluate_segmentation(model, [{"image": scenes()[0]["image"]}], processor())
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharing": "best"}, "`sharing` must be one of none, learned, random, oracle, got 'best'"),
        (
            {"sharing": "none", "token_reduction": 0.3},
            "`token_reduction` must be 0 where `sharing` is 'none', got 0.3",
        ),
        ({"token_reduction": 0.8}, "between 0"),
    ],
)
def test_unknown_strategies_and_budgets_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_segmentation(scene_model(), scenes(), processor(), **settings)


def test_a_model_without_policy_has_no_learned_sharing():
    model = scene_model(use_policy=False)
    with pytest.raises(ValueError, match="`sharing` must be 'none', 'random' or 'oracle' for a model without policy"):
        evaluate_segmentation(model, scenes(), processor(), token_reduction=0.3)
    for settings in ({"token_reduction": 0}, {"sharing": "none"}, {"sharing": "random", "token_reduction": 0.3}):
        assert evaluate_segmentation(model, scenes().take(1), processor(), **settings)["num_images"] == 1


def test_a_single_sharing_is_refused():
    with pytest.raises(ValueError, match=r"`sharings` must be a list of `Sharing`, got a single one: pass \[Sharing"):
        evaluate_sharings(scene_model(), scenes(), processor(), Sharing("learned", 0.3))


def test_nothing_to_evaluate_is_refused():
    for rows in (scenes().take(0), scenes().to_iterable_dataset().take(0)):
        with pytest.raises(ValueError, match="The data set is empty"):
            evaluate_segmentation(scene_model(), rows, processor())


def test_a_budget_too_small_for_the_images_has_no_policy_to_measure():
    model = scene_model()
    model.cts.policy.register_forward_hook(lambda *_: pytest.fail("the policy ran"))
    # 0.01 of 64 patches is less than half of the three that a superpatch saves.
    result = evaluate_segmentation(model, scenes().take(1), processor(), token_reduction=0.01)
    assert np.isnan(result["policy_accuracy"])
    assert np.isnan(result["policy_precision_at_budget"])


def write_odd_folder(root):
    """A panorama, an image smaller than a window, one in grey, one with transparency and a photo taken sideways."""
    rng = np.random.default_rng(0)
    rotated = Image.Exif()
    rotated[ExifTags.Base.Orientation] = 6
    odd = {
        "panorama.jpg": ("RGB", (240, 80), None),
        "small.png": ("RGB", (20, 33), None),
        "grey.png": ("L", (70, 64), None),
        "transparent.png": ("RGBA", (64, 90), None),
        "sideways.jpg": ("RGB", (96, 64), rotated),
    }
    for split in ("train", "val"):
        for name, (mode, (width, height), exif) in odd.items():
            image = Image.fromarray(rng.integers(0, 255, (height, width, 4), dtype=np.uint8)).convert(mode)
            if exif is not None:
                width, height = height, width
            label = Image.fromarray(rng.integers(0, 5, (height, width), dtype=np.uint8))
            for kind, picture, file in (("images", image, name), ("labels", label, name[:-3] + "png")):
                path = root / kind / split / file
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, **({"exif": exif} if exif is not None and kind == "images" else {}))
    return root


def ious_by_hand(model, root, token_reduction, scales=(1.0,), flip=False, **windows):
    """IoU of every class, counted from the files."""
    counts = np.zeros((5, 5), np.int64)
    for file in (root / "images" / "val").iterdir():
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        label = np.array(Image.open(root / "labels" / "val" / f"{file.stem}.png"))
        edges = [round(64 * scale) for scale in scales]
        views = [View(processor(edge)(image, return_tensors="pt").pixel_values) for edge in edges]
        views = with_flips(views) if flip else views
        probabilities = segment(model, views, label.shape, **windows, token_reduction=token_reduction)
        np.add.at(counts, (label, probabilities.argmax(0).numpy()), 1)
    return counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())


@pytest.mark.parametrize("options", slow_but([{}], [{}, {**WINDOWS, "scales": [0.5, 1.0], "flip": True}]))
@torch.no_grad()
def test_images_of_any_size_and_mode(tmp_path, options):
    model, data = tiny_model().double(), load_folder(write_odd_folder(tmp_path))
    # With the largest budget, everything is shared whatever the strategy.
    sharings = [Sharing("learned", 0.3), Sharing("random", 0.75), Sharing("oracle", 0.75)]
    settings = {"options": InferenceOptions(**options)}
    results = evaluate_sharings(model, data.validation, processor(), sharings, **settings)
    for sharing, result in zip(sharings, results, strict=True):
        assert result["num_images"] == 5
        expected = ious_by_hand(model, tmp_path, sharing.token_reduction, **options)
        assert result["per_category_iou"] == pytest.approx(expected.tolist())


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("options", slow_but([{}], [{}, {"window": 64, "stride": 48, "flip": True}]))
def test_no_more_than_the_full_logits_of_one_image(options):
    rows = [{"image": Image.new("RGB", (256, 256)), "label": Image.new("L", (256, 256))}] * 4
    model, options = tiny_model(num_labels=150), InferenceOptions(batch_size=4, **options)
    with LargestTensor() as largest:
        evaluate_segmentation(model, rows, processor(256), sharing="random", options=options)
    assert largest.numel <= 150 * 256 * 256
