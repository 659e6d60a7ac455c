# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cts_hf import CtsImageProcessor, apply_cts, superpatch_targets
from cts_hf.data import build_scenes
from cts_hf.evaluation.cost import multiply_adds, num_tokens
from cts_hf.evaluation.evaluator import evaluate_segmentation, evaluate_sharings
from cts_hf.evaluation.existing_models import ExistingSegmenter, as_segmenter, load_any
from cts_hf.evaluation.mean_iou import MeanIoU
from cts_hf.evaluation.prediction_results import settings_digest
from cts_hf.evaluation.segmentation import PreparedImage, segment_batches
from cts_hf.evaluation.sharing import Sharing
from cts_hf.evaluation.windows import InferenceOptions, resized_images
from cts_hf.model.image_processing_maps_cts import resize_labels

from ..helpers.existing_models import PROCESSORS, build_existing, build_processor, save_existing
from ..helpers.models import random_images, tiny_model, tiny_policy


NUM_LABELS = 5
NAME = "upernet_dinov2"


def rows(number=3):
    """Scenes of 60 x 96 pixels in five classes."""
    return [
        {
            "image": row["image"].crop((0, 0, 96, 60)),
            "label": Image.fromarray(np.array(row["label"])[:60] % NUM_LABELS),
        }
        for row in build_scenes(number, image_size=96)
    ]


def label_tensor(row):
    return torch.from_numpy(np.array(row["label"])).long()


def prepared(row, processor):
    return PreparedImage(row, resized_images(row["image"], processor), (row["image"].height, row["image"].width))


@pytest.mark.parametrize("is_tall", [False, True])
@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_label_maps_are_upstreams(name, is_tall):
    model, processor = build_existing(name), build_processor(name)
    if hasattr(model, "class_predictor"):
        # A class for each query, or one of them is everywhere.
        model.class_predictor.register_forward_hook(lambda *call: call[-1] + 8 * torch.eye(*call[-1].shape[-2:]))
    row = rows(1)[0]
    if is_tall:
        row = {"image": row["image"].transpose(Image.Transpose.ROTATE_90)}
    size = (row["image"].height, row["image"].width)
    outputs = model(**processor(row["image"], return_tensors="pt"))
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
    segmenter = ExistingSegmenter(apply_cts(model), processor)
    (segmentation,) = segment_batches(segmenter, [[prepared(row, processor)]], token_reduction=0.0)
    assert len(segmentation.passes[0].windows.boxes) == (2 if name.startswith("eomt") else 1)
    assert len(expected.unique()) > 1
    assert torch.equal(segmentation.class_ids, expected)


@pytest.mark.parametrize("name", ["beit_segmentation", "mask2former", "eomt"])
def test_images_of_a_batch_are_what_they_are_alone(name):
    processor = build_processor(name)
    segmenter = ExistingSegmenter(apply_cts(build_existing(name), tiny_policy()), processor)
    images = [prepared(row, processor) for row in rows()]
    together = list(segment_batches(segmenter, [images], token_reduction=0.3))
    alone = list(segment_batches(segmenter, [[image] for image in images], token_reduction=0.3))
    for first, second in zip(together, alone, strict=True):
        # Batches may round differently, which ties and near ties show.
        assert (first.class_ids != second.class_ids).float().mean() < 0.01
        (first,), (second,) = first.passes, second.passes
        assert torch.equal(first.shared_superpatches, second.shared_superpatches)
        torch.testing.assert_close(first.scores, second.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharing", ["learned", "random", "oracle"])
@pytest.mark.parametrize("name", ["beit_segmentation", "upernet_dinov2", "mask2former"])
@torch.no_grad()
def test_results_are_of_the_models_own_outputs(name, sharing):
    model, processor = apply_cts(build_existing(name), tiny_policy()), build_processor(name)
    given, calls = [], []
    hooks = [
        model.register_forward_pre_hook(lambda *call: given.append(call[2]), with_kwargs=True, prepend=True),
        model.register_forward_hook(lambda *call: calls.append(call[1:])),
    ]
    options = InferenceOptions(batch_size=1)
    result = evaluate_segmentation(model, rows(), processor, sharing=sharing, token_reduction=0.3, options=options)
    for hook in hooks:
        hook.remove()
    metric, targets, shared = MeanIoU(NUM_LABELS), [], []
    for row, options, (args, outputs) in zip(rows(), given, calls, strict=True):
        size = (row["image"].height, row["image"].width)
        (ids,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
        metric.add(prediction=ids, reference=label_tensor(row))
        height, width = (side // 16 * 16 for side in args[0].shape[-2:])
        labels = resize_labels(label_tensor(row), args[0].shape[-2:])[None, :height, :width]
        targets.append(superpatch_targets(labels, 16))
        shared.append(outputs.shared_superpatches)
        assert outputs.shared_superpatches.shape == targets[-1].shape
        if sharing == "oracle":
            scores = options["superpatch_scores"]
            assert scores[targets[-1] == 1].min() > scores[targets[-1] == 0].max()
        else:
            assert (options["superpatch_scores"] is None) == (sharing == "learned")
    for key, value in metric.compute().items():
        assert result[key] == pytest.approx(value, nan_ok=True), key
    targets, shared = torch.cat(targets), torch.cat(shared)
    counted = targets != 255
    assert result["policy_precision_at_budget"] == pytest.approx(
        (targets[counted & shared] == 1).float().mean().item()
    )
    if sharing == "oracle":
        assert result["policy_accuracy"] == 1


def test_targets_of_windows_are_of_the_windows():
    model, processor = apply_cts(build_existing("eomt")), build_processor("eomt")
    result = evaluate_segmentation(model, rows(), processor, sharing="oracle", token_reduction=0.3)
    # The scores of the oracle are above 0 just where targets are 1, if both are of the same places.
    assert result["policy_accuracy"] == result["policy_average_precision"] == 1
    assert result["num_images"] == 3


@pytest.mark.parametrize("name", ["beit_segmentation", "upernet_dinov2", "mask2former", "eomt"])
@torch.no_grad()
def test_tokens_are_counted_as_the_model_counts_them(name):
    model, processor = apply_cts(build_existing(name), tiny_policy()), build_processor(name)
    segmenter = ExistingSegmenter(model, processor)
    (pixel_values,) = resized_images(rows(1)[0]["image"], processor)
    size = tuple(segmenter.boxes(tuple(pixel_values.shape[-2:]))[0][2:])
    costs = []
    for token_reduction in (0, 0.3, 0.75):
        outputs = model(pixel_values[..., : size[0], : size[1]], token_reduction=token_reduction)
        assert outputs.num_tokens.tolist() == [num_tokens(segmenter, size, token_reduction)]
        costs.append(multiply_adds(segmenter, size, token_reduction, runs_policy=False))
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 3
    assert multiply_adds(segmenter, size, 0.3) > costs[1]


def test_the_policy_of_a_sharing_model_stays_in_evaluation_mode():
    model = apply_cts(build_existing(NAME), tiny_policy()).train()
    evaluate_segmentation(model, rows(1), build_processor(NAME), token_reduction=0.3)
    assert model.training
    assert not any(module.training for module in model.token_sharing.modules())


def test_models_of_all_kinds_are_opened(tmp_path):
    other = tiny_policy(seed=1)
    other.save_pretrained(tmp_path / "policy")
    options = {"token_reduction": 0.2, "image_mean": 0.1, "image_std": 0.2}
    saved = save_existing(tmp_path / "saved", NAME, policy=tiny_policy(), **options)
    plain = save_existing(tmp_path / "plain", NAME)

    model, processor = load_any(saved)
    assert (model.cts.token_reduction, model.cts.image_std) == (0.2, (0.2, 0.2, 0.2))
    assert type(processor).__name__.startswith("SegformerImageProcessor")
    model, _ = load_any(saved, tmp_path / "policy")
    assert (model.cts.token_reduction, model.cts.image_std) == (0.2, (0.2, 0.2, 0.2))
    assert torch.equal(model.cts.policy.head.weight, other.head.weight)
    model, _ = load_any(plain)
    assert (model.cts.token_reduction, model.cts.policy) == (0.0, None)
    model, _ = load_any(plain, tmp_path / "policy")
    assert model.cts.token_reduction == 0.3
    assert torch.equal(model.cts.policy.head.weight, other.head.weight)

    tiny_model().save_pretrained(tmp_path / "own")
    CtsImageProcessor().save_pretrained(tmp_path / "own")
    model, processor = load_any(tmp_path / "own", tmp_path / "policy")
    assert torch.equal(model.cts.policy.head.weight, other.head.weight)
    assert not any(module.training for module in model.modules())
    assert as_segmenter(model, processor, InferenceOptions(flip=True)) is model


@torch.no_grad()
def test_a_plain_checkpoint_may_lack_what_its_model_never_uses(tmp_path):
    """As published ones of DPT do."""
    folder = save_existing(tmp_path, "dpt_segmentation")
    weights = load_file(folder / "model.safetensors")
    unused = "neck.fusion_stage.layers.0.residual_layer1."
    kept = {name: value for name, value in weights.items() if not name.startswith(unused)}
    assert len(kept) < len(weights)
    pixel_values = random_images(1)
    expected = load_any(folder)[0](pixel_values).logits
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(load_any(folder)[0](pixel_values).logits, expected)
    save_file(dict(list(kept.items())[1:]), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit the DPTForSemanticSegmentation"):
        load_any(folder)


def test_what_decides_the_results_is_in_their_digest(tmp_path):
    def digest(folder, policy=None):
        model, processor = load_any(folder, policy)
        options = InferenceOptions()
        return settings_digest(model, processor, Sharing("learned", 0.3), options)

    first = save_existing(tmp_path / "first", NAME, policy=tiny_policy())
    tiny_policy(seed=1).save_pretrained(tmp_path / "policy")
    found = [
        digest(first),
        digest(first, tmp_path / "policy"),
        digest(save_existing(tmp_path / "mean", NAME, policy=tiny_policy(), image_mean=0.3, image_std=0.2)),
        digest(save_existing(tmp_path / "none", NAME)),
    ]
    assert len(set(found)) == 4
    assert digest(save_existing(tmp_path / "renamed", NAME, policy=tiny_policy())) == found[0]


@pytest.mark.parametrize(
    "options",
    [{"window": 48}, {"flip": True}, {"scales": [1.0, 0.5]}, {"shortest_edge": 48}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_the_image_processor_decides_are_refused(options):
    model, processor = apply_cts(build_existing(NAME)), build_processor(NAME)
    with pytest.raises(ValueError, match=r"must be unset for a model of transformers, .* leave them out"):
        evaluate_sharings(model, rows(1), processor, [Sharing("none", 0)], options=InferenceOptions(**options))


def test_models_and_image_processors_that_give_no_label_maps_are_refused(tmp_path):
    processor = build_processor("dpt_segmentation")
    with pytest.raises(ValueError, match=r"got a DPTForDepthEstimation: give one that makes label maps"):
        ExistingSegmenter(apply_cts(build_existing("dpt_depth")), processor)
    with pytest.raises(ValueError, match=r"or share tokens by `apply_cts`, got a DPTForSemanticSegmentation"):
        as_segmenter(build_existing("dpt_segmentation"), processor, InferenceOptions())
    for options, name in (({"do_pad": True}, "eomt"), ({"do_center_crop": True}, "beit_segmentation")):
        with pytest.raises(ValueError, match=rf"must neither crop nor pad images.* with {next(iter(options))}=True"):
            ExistingSegmenter(apply_cts(build_existing(name)), build_processor(name, **options))
    with pytest.raises(ValueError, match=r"must normalize as the model's policy is told, with .*0\.3.*, got .*0\.485"):
        ExistingSegmenter(apply_cts(build_existing(NAME), tiny_policy(), image_mean=0.3), build_processor(NAME))
    build_existing(NAME).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold the image processor of its model, got none"):
        load_any(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    with pytest.raises(ValueError, match="must have `post_process_semantic_segmentation`"):
        load_any(tmp_path)


def test_learned_sharing_needs_a_policy():
    model, processor = apply_cts(build_existing(NAME)), build_processor(NAME)
    with pytest.raises(ValueError, match=r"`sharing` must be .* for a model without policy"):
        evaluate_segmentation(model, rows(1), processor, token_reduction=0.3)
