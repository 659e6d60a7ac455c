# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import pipeline

from cts_hf import CtsConfig, CtsForSemanticSegmentation, CtsPolicyConfig, CtsPolicyModel
from cts_hf.data import SCENE_CLASSES, DataError, build_scenes
from cts_hf.hub.normalization import IMAGENET, check_normalization
from cts_hf.model.image_processing_cts import CtsImageProcessor
from cts_hf.model.modeling_cts_embeddings import CtsEmbeddings

from ..helpers.figures import saved_figures
from ..helpers.models import tiny_model
from ..helpers.slow import slow_but
from ..helpers.training_runs import (
    TINY_DATA,
    TINY_MODEL,
    TINY_POLICY,
    TINY_RUN,
    largest_difference,
    run_example,
    train_example,
)


# Of `train_policy.py`, but for the data set and the output folder.
POLICY_RUN = {**TINY_POLICY, **TINY_DATA, "cpu_threads": 1, "patch_size": 8, "batch_size": 4}


@pytest.fixture(scope="module")
def train_policy(scenes, tmp_path_factory):
    """A folder with a policy, and its metrics."""
    folder = tmp_path_factory.mktemp("policy")
    options = {**POLICY_RUN, "data_dir": scenes, "output_dir": folder}
    return folder, run_example("train_policy.py", **options, max_steps=3, eval_steps=2, squash=True)


def train(scenes, folder, *flags, **options):
    """As `train_example`, where a policy that is given or trained first is not trained jointly, too."""
    if options.keys() & {"policy", "policy_epochs"}:
        options = {"policy_loss_weight": 0.0, **options}
    return train_example(scenes, folder, *flags, **options)


@pytest.mark.usefixtures("drawn_panels")
def test_train_makes_a_folder_that_the_pipeline_takes(scenes, tmp_path, capsys, monkeypatch):
    figures = saved_figures(monkeypatch)
    results = train(scenes, tmp_path, policy_epochs=1, eval_steps=1)
    assert [(r["sharing"], r["token_reduction"]) for r in results] == [
        ("none", 0.0),
        ("learned", 0.3),
        ("random", 0.3),
        ("oracle", 0.3),
    ]
    assert [result["num_images"] for result in results] == [3] * 4
    printed = capsys.readouterr().out
    for word in ("none", "learned", "random", "oracle", "mean IoU", "precision_at_budget"):
        assert word in printed
    first_image = Image.open(sorted((scenes / "images" / "val").iterdir())[0])
    (figure,) = figures
    assert np.array_equal(figure.axes[0].images[0].get_array(), first_image)
    with Image.open(tmp_path / "prediction.png") as picture:
        picture.load()

    card = (tmp_path / "README.md").read_text()
    assert f"| mean IoU, no sharing | {results[0]['mean_iou']:.4f} |" in card
    assert dict(CtsImageProcessor.from_pretrained(tmp_path).size)["shortest_edge"] == 64
    model = CtsForSemanticSegmentation.from_pretrained(tmp_path)
    assert model.config.id2label[0] == "sky"
    # The policy was trained first, then frozen.
    policy = CtsPolicyModel.from_pretrained(tmp_path / "policy")
    assert largest_difference(policy.state_dict(), model.cts.policy.state_dict()) == 0
    image = Image.open(next((scenes / "images" / "val").iterdir()))
    for folder in (tmp_path, tmp_path / "best"):
        regions = pipeline("image-segmentation", model=str(folder))(image)
        assert regions
        assert all(region["mask"].size == image.size for region in regions)


@pytest.mark.parametrize("decoder_type", slow_but(["setr_mla"], ["setr_naive", "setr_pup", "setr_mla"]))
def test_decoders_of_setr_are_trained_and_predict(decoder_type, scenes, tmp_path):
    options = {"decoder_type": decoder_type, "decoder_hidden_size": 8, "policy_epochs": 1}
    results = train(scenes, tmp_path, **options)
    assert all(0 <= result["mean_iou"] <= 1 for result in results)
    model = CtsForSemanticSegmentation.from_pretrained(tmp_path)
    assert model.config.decoder_type == decoder_type
    image = Image.open(next((scenes / "images" / "val").iterdir()))
    assert pipeline("image-segmentation", model=str(tmp_path))(image)


def test_a_saved_recipe_repeats_the_run(scenes, tmp_path):
    train(scenes, tmp_path / "first", seed=3)
    run_example("train.py", recipe=tmp_path / "first" / "train.yaml", output_dir=tmp_path / "second")
    weights = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert largest_difference(*weights) == 0
    train(scenes, tmp_path / "third", seed=4)
    assert largest_difference(*(tmp_path / name / "model.safetensors" for name in ("first", "third"))) > 0


def test_train_policy_measures_and_saves(train_policy):
    folder, metrics = train_policy
    assert metrics.keys() == {"accuracy", "precision", "recall", "average_precision", "precision_at_budget"}
    assert "squash: true" in (folder / "train.yaml").read_text()
    assert "precision_at_budget" in (folder / "README.md").read_text()
    assert (folder / "best" / "model.safetensors").exists()


def test_train_takes_a_trained_policy_and_evaluates_in_windows(scenes, train_policy, tmp_path):
    folder, _ = train_policy
    train(scenes, tmp_path, policy=folder, eval_window=32, max_eval_samples=1)
    trained = CtsForSemanticSegmentation.from_pretrained(tmp_path).cts.policy
    assert largest_difference(CtsPolicyModel.from_pretrained(folder).state_dict(), trained.state_dict()) == 0


LEVELS = {"superpatch_levels": [2, 4], "token_reduction": "0.15,0.3"}


@pytest.fixture(scope="module")
def policy_of_levels(scenes, tmp_path_factory):
    """A folder with a policy for superpatches of 2 x 2 and 4 x 4 patches, and its metrics."""
    folder = tmp_path_factory.mktemp("policy_of_levels")
    options = {**POLICY_RUN, **LEVELS, "data_dir": scenes, "output_dir": folder}
    return folder, run_example("train_policy.py", **options, max_steps=2)


def test_a_policy_of_several_levels(scenes, policy_of_levels, tmp_path, capsys):
    folder, metrics = policy_of_levels
    measured = {"accuracy", "precision", "recall", "average_precision", "precision_at_budget"}
    assert metrics.keys() == {name + level for name in measured for level in ("", "_2x2", "_4x4")}
    policy = CtsPolicyModel.from_pretrained(folder)
    assert policy.config.superpatch_levels == (2, 4)
    assert len(policy.larger_heads) == 1
    with pytest.raises(ValueError, match=r"`policy_config.superpatch_levels` must be .* got \(2, 4\): give the model"):
        train(scenes, tmp_path / "refused", policy=folder)
    results = train(scenes, tmp_path / "run", policy=folder, **LEVELS)
    assert [result["token_reduction"] for result in results[1:]] == [(0.15, 0.3)] * 3
    assert all(0 <= result["policy_precision_at_budget_4x4"] <= 1 for result in results[1:])
    model = CtsForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert (model.config.superpatch_levels, model.config.token_reduction) == ((2, 4), (0.15, 0.3))
    assert largest_difference(policy.state_dict(), model.cts.policy.state_dict()) == 0
    # Further training has the levels of the model.
    train(scenes, tmp_path / "on", model=tmp_path / "run", policy_loss_weight=0, token_reduction=0.9)
    assert CtsForSemanticSegmentation.from_pretrained(tmp_path / "on").config.superpatch_levels == (2, 4)


def test_training_of_a_policy_of_several_levels_is_resumed(scenes, policy_of_levels, tmp_path):
    folder, _ = policy_of_levels
    options = {**POLICY_RUN, **LEVELS, "data_dir": scenes, "output_dir": tmp_path, "save_steps": 1}
    run_example("train_policy.py", **options, max_steps=1)
    resumed = {**options, "max_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"superpatch_levels \[2, 4\] -> \[2\]"):
        run_example("train_policy.py", **{**resumed, "superpatch_levels": 2, "token_reduction": 0.3})
    run_example("train_policy.py", **resumed)
    assert largest_difference(folder / "model.safetensors", tmp_path / "model.safetensors") == 0


def test_a_policy_of_several_levels_is_trained_first(scenes, tmp_path):
    results = train(scenes, tmp_path, policy_epochs=0.4, **LEVELS)
    assert [result["token_reduction"] for result in results[1:]] == [(0.15, 0.3)] * 3
    policy = CtsPolicyModel.from_pretrained(tmp_path / "policy")
    model = CtsForSemanticSegmentation.from_pretrained(tmp_path)
    assert policy.config.superpatch_levels == (2, 4)
    assert largest_difference(policy.state_dict(), model.cts.policy.state_dict()) == 0
    assert "precision_at_budget_4x4" in (tmp_path / "policy" / "README.md").read_text()


def test_a_policy_and_a_model_of_one_level_serve_larger_superpatches(scenes, train_policy, tmp_path):
    folder, _ = train_policy
    train(scenes, tmp_path / "run", policy=folder, **LEVELS)
    config = CtsConfig.from_pretrained(tmp_path / "run")
    assert (config.superpatch_levels, config.policy_config.superpatch_levels) == ((2, 4), (2,))
    train(scenes, tmp_path / "plain", policy=folder)
    train(scenes, tmp_path / "on", model=tmp_path / "plain", policy_loss_weight=0, **LEVELS)
    config = CtsConfig.from_pretrained(tmp_path / "on")
    assert (config.superpatch_levels, config.policy_config.superpatch_levels) == ((2, 4), (2,))
    with pytest.raises(ValueError, match=r"`token_reduction` must be a number between 0 \(no sharing\) and 0.75"):
        train(scenes, tmp_path / "refused", model=tmp_path / "plain", policy_loss_weight=0, token_reduction=0.9)


def test_train_with_a_threshold(scenes, train_policy, tmp_path):
    folder, _ = train_policy
    results = train(scenes, tmp_path / "run", policy=folder, sharing_threshold=0.5)
    assert [(result["sharing"], result["token_reduction"]) for result in results] == [
        ("none", 0.0),
        ("learned", None),
        ("random", 0.3),
        ("oracle", 0.3),
    ]
    assert CtsConfig.from_pretrained(tmp_path / "run").sharing_threshold == 0.5
    assert "from a probability of 0.5 on" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_training_with_a_threshold_is_resumed_with_the_same(scenes, train_policy, tmp_path):
    folder, _ = train_policy
    train(scenes, tmp_path / "resumed", policy=folder, sharing_threshold=0.5, max_steps=1, save_steps=1)
    resumed = {"policy": folder, "max_steps": 2, "save_steps": 1, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"sharing_threshold 0\.5 -> 0\.9"):
        train(scenes, tmp_path / "resumed", sharing_threshold=0.9, **resumed)
    train(scenes, tmp_path / "resumed", sharing_threshold=0.5, **resumed)
    train(scenes, tmp_path / "whole", policy=folder, sharing_threshold=0.5, max_steps=2)
    weights = (tmp_path / name / "model.safetensors" for name in ("resumed", "whole"))
    assert largest_difference(*weights) == 0


def test_a_segmenter_is_refused_as_policy(scenes, tmp_path):
    tiny_model().save_pretrained(tmp_path / "segmenter")
    with pytest.raises(ValueError, match="must hold a policy, got a whole segmentation model"):
        train(scenes, tmp_path / "run", policy=tmp_path / "segmenter")


def test_train_without_sharing_measures_nothing_else(scenes, tmp_path):
    results = train(scenes, tmp_path, token_reduction=0, policy_loss_weight=0)
    assert [result["token_reduction"] for result in results] == [0.0]


def save_trained(folder, **options):
    """A model as others may have trained it: another budget, other classes, another size."""
    model = tiny_model(seed=7, image_size=128, token_reduction=0.5, **options)
    model.save_pretrained(folder)
    CtsImageProcessor().save_pretrained(folder)
    return model.state_dict()


@pytest.mark.parametrize("num_labels", [5, len(SCENE_CLASSES)])
@pytest.mark.parametrize("decoder_type", slow_but(["mask_transformer"], ["mask_transformer", "linear"]))
def test_train_goes_on_from_a_trained_model(scenes, tmp_path, num_labels, decoder_type):
    before = save_trained(tmp_path / "trained", num_labels=num_labels, decoder_type=decoder_type)
    # Such a learning rate shows what training starts from.
    options = {"learning_rate": 1e-12, "min_lr": 0, "weight_decay": 0, "policy_loss_weight": 0, "hidden_size": 999}
    train(scenes, tmp_path / "run", model=tmp_path / "trained", **options)
    model = CtsForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert (model.config.num_labels, model.config.id2label[0]) == (len(SCENE_CLASSES), "sky")
    assert (model.config.token_reduction, model.config.image_size) == (0.3, 128)
    for name, value in model.state_dict().items():
        if num_labels == 5 and name.startswith(
            ("decode_head.class_emb", "decode_head.mask_norm", "decode_head.classi")
        ):
            assert value.shape != before[name].shape
            assert value.isfinite().all()
        else:
            torch.testing.assert_close(value, before[name], atol=1e-9, rtol=0)
    # The recipe has the architecture that was trained.
    assert "hidden_size: 32" in (tmp_path / "run" / "train.yaml").read_text()


def test_a_trained_model_gets_another_policy(scenes, train_policy, tmp_path):
    save_trained(tmp_path / "plain", use_policy=False)
    with pytest.raises(ValueError, match=r"has no policy and token_reduction is 0.3: pass --policy FOLDER"):
        train(scenes, tmp_path / "run", model=tmp_path / "plain", policy_loss_weight=0)
    train(scenes, tmp_path / "run", model=tmp_path / "plain", policy_loss_weight=0, token_reduction=0)
    folder, _ = train_policy
    train(scenes, tmp_path / "shared", model=tmp_path / "plain", policy=folder)
    trained = CtsForSemanticSegmentation.from_pretrained(tmp_path / "shared").cts.policy
    assert largest_difference(CtsPolicyModel.from_pretrained(folder).state_dict(), trained.state_dict()) == 0


def test_models_that_cannot_be_trained_on_are_refused(scenes, tmp_path):
    weights = save_trained(tmp_path / "broken")
    del weights["cts.layernorm.weight"]
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"config\.json describes\. 1 missing: cts\.layernorm\.weight\. Save it"):
        train(scenes, tmp_path / "run", model=tmp_path / "broken")
    save_trained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"`image_mean` must be \[0\.5, .* got \[0\.4, 0\.5, 0\.5\]: leave it out"):
        train(scenes, tmp_path / "run", model=tmp_path / "other", image_mean=[0.4, 0.5, 0.5], policy_epochs=1)
    with pytest.raises(ValueError, match=r"`policy_image_std` must be \[0\.5, .* got \[0\.4, 0\.5, 0\.5\]"):
        train(scenes, tmp_path / "run", model=tmp_path / "other", policy_image_std=[0.4, 0.5, 0.5])
    CtsImageProcessor(image_mean=[0.4, 0.4, 0.4]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"as config\.json says, with .*0\.5.* got .*\[0\.4, 0\.4, 0\.4\]"):
        train(scenes, tmp_path / "run", model=tmp_path / "other")
    with pytest.raises(ValueError, match=r"One of `model`, .* got .*'backbone_weights': 'timm/x'"):
        train(scenes, tmp_path / "run", model=tmp_path / "other", backbone_weights="timm/x")


def seen_by(module, seen):
    """Collects the images that a kind of module is given."""

    def hook(instance, inputs):
        if isinstance(instance, module):
            seen.append(inputs[0].detach())

    return torch.nn.modules.module.register_module_forward_pre_hook(hook)


def normalization_of(folder):
    """What the configuration, the policy's and the image processor in a folder say."""
    config, processor = CtsConfig.from_pretrained(folder), CtsImageProcessor.from_pretrained(folder)
    return [(list(part.image_mean), list(part.image_std)) for part in (config, config.policy_config, processor)]


def test_train_normalizes_as_the_weights_expect(scenes, tmp_path):
    timm_deit = pytest.importorskip("timm.models.deit")
    shape = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.save(timm_deit.VisionTransformerDistilled(**shape).state_dict(), tmp_path / "deit.pth")
    options = {"backbone_weights": tmp_path / "deit.pth", "use_distillation_token": True, "policy_epochs": 1}
    train(scenes, tmp_path / "run", **options)
    # The policy was trained in the same run, from scratch: it has the same.
    assert normalization_of(tmp_path / "run") == [IMAGENET] * 3
    policy_processor = CtsImageProcessor.from_pretrained(tmp_path / "run" / "policy")
    check_normalization(CtsPolicyConfig(**IMAGENET._asdict()), policy_processor)
    check_normalization(CtsPolicyConfig.from_pretrained(tmp_path / "run" / "policy"), policy_processor)
    assert "image_mean: null" in (tmp_path / "run" / "train.yaml").read_text()

    # Further training keeps the normalization.
    train(scenes, tmp_path / "on", model=tmp_path / "run", policy_loss_weight=0)
    assert normalization_of(tmp_path / "on") == [IMAGENET] * 3
    given = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "policy_image_mean": [0.5, 0.5, 0.5]}
    seen = []
    hook = seen_by(CtsEmbeddings, seen)
    train(scenes, tmp_path / "given", **options, **given)
    hook.remove()
    zeros, ones = [0.0] * 3, [1.0] * 3
    assert normalization_of(tmp_path / "given") == [(zeros, ones), ([0.5] * 3, ones), (zeros, ones)]
    assert min(images.min() for images in seen) >= 0
    assert max(images.max() for images in seen) <= 1
    train(scenes, tmp_path / "scratch", **given)
    assert normalization_of(tmp_path / "scratch") == normalization_of(tmp_path / "given")


def test_train_completes_an_earlier_model_from_its_image_processor(scenes, tmp_path):
    save_trained(tmp_path / "old")
    values = json.loads((tmp_path / "old" / "config.json").read_text())
    for part in (values, values["policy_config"]):
        del part["image_mean"], part["image_std"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(values))
    CtsImageProcessor(**IMAGENET._asdict()).save_pretrained(tmp_path / "old")
    train(scenes, tmp_path / "run", model=tmp_path / "old", policy_loss_weight=0)
    assert normalization_of(tmp_path / "run") == [IMAGENET] * 3


def test_train_policy_normalizes_as_its_options_say(scenes, tmp_path):
    options = {**POLICY_RUN, "data_dir": scenes, "output_dir": tmp_path, "max_steps": 1}
    options |= {"photometric_distortion": False, "policy_image_mean": [0, 0, 0], "policy_image_std": [1, 1, 1]}
    for squash in (True, False):
        seen = []
        hook = seen_by(CtsPolicyModel, seen)
        run_example("train_policy.py", **options, squash=squash, overwrite_output_dir=True)
        hook.remove()
        assert len(seen) > 1  # in training and in evaluation
        assert all(images.min() >= 0 and images.max() <= 1 for images in seen)
    config, processor = CtsPolicyConfig.from_pretrained(tmp_path), CtsImageProcessor.from_pretrained(tmp_path)
    for part in (config, processor):
        assert (list(part.image_mean), list(part.image_std)) == ([0.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match=r"`policy_image_std` must be numbers above 0.* got \[1\.0, 0\.0, 1\.0\]"):
        run_example("train_policy.py", **{**options, "policy_image_std": [1, 0, 1]})


def test_a_policy_that_nothing_trains_is_refused(scenes, tmp_path):
    with pytest.raises(ValueError, match="The policy would stay as random as it starts"):
        train(scenes, tmp_path, policy_loss_weight=0)


@pytest.mark.parametrize("streaming", [True, False])
def test_train_takes_whatever_datasets_opens(tmp_path, streaming):
    rows = build_scenes(8, 64).rename_columns({"image": "photo", "label": "mask"})
    for split, part in (("train", rows.select(range(6))), ("validation", rows.select(range(6, 8)))):
        (tmp_path / "data").mkdir(exist_ok=True)
        part.to_parquet(tmp_path / "data" / f"{split}.parquet")
    options = {"dataset": tmp_path / "data", "image_column": "photo", "label_column": "mask"}
    options.update(classes=list(SCENE_CLASSES), streaming=streaming, output_dir=tmp_path / "run", max_steps=3)
    options.update(**TINY_POLICY, **TINY_DATA, **TINY_MODEL, **TINY_RUN, policy_loss_weight=1, save_steps=2)
    results = run_example("train.py", **options)
    assert {result["num_images"] for result in results} == {2}


def test_unknown_splits_are_refused(scenes, tmp_path):
    with pytest.raises(DataError, match="There is no split 'trian', the data set has train, val"):
        train(scenes, tmp_path, train_split="trian")


def test_a_finished_model_is_uploaded_without_its_checkpoints(scenes, tmp_path, uploads):
    train(scenes, tmp_path, "--push_to_hub", hub_model_id="street")
    ((repo_id, files),) = uploads
    assert repo_id == "me/street"
    assert {"model.safetensors", "config.json", "train.yaml", "README.md", "modeling_cts.py"} <= files
    assert not any("/" in name for name in files)
