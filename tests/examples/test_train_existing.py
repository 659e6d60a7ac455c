# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, pipeline

from cts_hf import CtsPolicyModel, load_cts
from cts_hf.data import SCENE_CLASSES
from cts_hf.training import loop

from ..helpers.existing_models import KINDS, PROCESSORS, build_existing, build_processor, save_existing
from ..helpers.models import tiny_policy
from ..helpers.scripts import launch
from ..helpers.training_runs import (
    TINY_POLICY,
    TINY_RUN,
    contents,
    largest_difference,
    no_step,
    run_example,
    write_scenes,
)


NAME = "upernet_dinov2"
MORE_KINDS = ["beit_segmentation", "data2vec_segmentation", "dpt_segmentation", "mask2former"]
KINDS_TO_TRAIN = [NAME, "eomt", *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE_KINDS)]
# Such a learning rate shows what training starts from.
STAYS = {"learning_rate": 1e-12, "min_lr": 0, "weight_decay": 0}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_policy().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def upernet(tmp_path_factory):
    return save_existing(tmp_path_factory.mktemp("upernet"), NAME)


def train(scenes, folder, *flags, **options):
    """`examples/train.py` for two steps, with crops of the model's size."""
    defaults = {**TINY_RUN, "batch_size": 2, "num_workers": 0, "max_steps": 2, "max_eval_samples": 2}
    return run_example("train.py", *flags, **{**defaults, "data_dir": scenes, "output_dir": folder, **options})


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", KINDS_TO_TRAIN)
def test_models_of_transformers_are_trained_with_sharing(name, scenes, policy, tmp_path):
    source, run = save_existing(tmp_path / "model", name), tmp_path / "run"
    results = train(scenes, run, model=source, policy=policy)
    assert [result["sharing"] for result in results] == ["none", "learned", "random", "oracle"]

    trained = load_cts(run)
    assert type(trained).__name__ == KINDS[name].model
    assert trained.config.id2label == dict(enumerate(SCENE_CLASSES))
    assert trained.token_sharing.token_reduction == 0.3
    kept = CtsPolicyModel.from_pretrained(policy).state_dict()
    assert largest_difference(kept, trained.token_sharing.policy.state_dict()) == 0
    # A plain model, where this package is missing.
    kind = getattr(transformers, KINDS[name].model)
    before, after = kind.from_pretrained(source).state_dict(), kind.from_pretrained(run).state_dict()
    assert any("layer" in key and not torch.equal(value, before[key]) for key, value in after.items())
    assert yaml.safe_load((run / "train.yaml").read_text())["crop_size"] == 64
    with Image.open(run / "prediction.png") as picture:
        picture.load()
    assert f"| mean IoU, no sharing | {results[0]['mean_iou']:.4f} |" in (run / "README.md").read_text()


@pytest.mark.slow
def test_the_folder_is_taken_by_the_pipeline_and_evaluate(scenes, upernet, policy, tmp_path):
    run = tmp_path / "run"
    results = train(scenes, run, model=upernet, policy=policy, eval_steps=1, token_reduction=0.4)
    run_example("evaluate.py", model=run, data_dir=scenes, max_samples=2, output_dir=tmp_path / "evaluation")
    evaluated = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert evaluated["results"][0]["mean_iou"] == results[1]["mean_iou"]
    image = Image.open(next((scenes / "images" / "val").iterdir()))
    for folder in (run, run / "best"):
        segment = pipeline("image-segmentation", model=load_cts(folder), image_processor=str(folder))
        assert all(region["mask"].size == image.size for region in segment(image))


def test_training_starts_from_all_weights_but_those_of_classes(scenes, upernet, policy, tmp_path):
    train(scenes, tmp_path, model=upernet, policy=policy, **STAYS)
    before = weights(upernet)
    for name, value in weights(tmp_path).items():
        if ".classifier." in name:
            assert value.shape[0] == len(SCENE_CLASSES)
            assert value.isfinite().all()
        elif "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, before[name], atol=1e-9, rtol=0)


@pytest.mark.slow
def test_what_save_cts_wrote_is_trained_on_with_its_policy(scenes, tmp_path):
    options = {"token_reduction": 0.5, "image_mean": 0.2, "image_std": 0.4}
    source = save_existing(tmp_path / "model", "beit_segmentation", policy=tiny_policy(seed=3), **options)
    train(scenes, tmp_path / "run", model=source)
    sharing = load_cts(tmp_path / "run").token_sharing
    assert (sharing.token_reduction, sharing.image_mean, sharing.image_std) == (0.3, (0.2,) * 3, (0.4,) * 3)
    assert largest_difference(tiny_policy(seed=3).state_dict(), sharing.policy.state_dict()) == 0
    # And a run goes on from what another has left.
    train(scenes, tmp_path / "on", model=tmp_path / "run")


def test_a_model_without_policy_is_trained_plainly(scenes, upernet, tmp_path):
    with pytest.raises(ValueError, match=r"has no policy and token_reduction is 0\.3: pass --policy FOLDER, .* first"):
        train(scenes, tmp_path / "run", model=upernet)
    results = train(scenes, tmp_path / "run", model=upernet, token_reduction=0)
    assert [result["token_reduction"] for result in results] == [0.0]
    sharing = load_cts(tmp_path / "run").token_sharing
    assert (sharing.token_reduction, sharing.policy) == (0.0, None)


@pytest.mark.parametrize("name", ["beit_segmentation", "dpt_segmentation", NAME])
@pytest.mark.slow
def test_the_encoder_is_frozen_or_learns_the_slower_the_lower(scenes, policy, tmp_path, name):
    source = save_existing(tmp_path / "model", name)
    options = {"model": source, "policy": policy, "learning_rate": 1e-2, "min_lr": 0}
    before = weights(source)

    def moved(folder):
        return {key: (value - before[key]).abs().max().item() for key, value in weights(folder).items() if key in kept}

    prefix = {"beit_segmentation": "beit.", "dpt_segmentation": "dpt."}.get(name, "backbone.")
    kept = [key for key in before if key.startswith(prefix)]
    train(scenes, tmp_path / "frozen", **options, freeze_encoder=True)
    assert set(moved(tmp_path / "frozen").values()) == {0}
    train(scenes, tmp_path / "run", **options, layer_decay=0.5, optimizer="adamw", max_steps=1)
    steps = moved(tmp_path / "run")
    first, third = (
        max(step for key, step in steps.items() if f"layers.{index}." in key or f"layer.{index}." in key)
        for index in (0, 2)
    )
    # AdamW's first step is as large as the learning rate.
    assert first == pytest.approx(third / 4, rel=0.01)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(scenes, policy, tmp_path):
    source = save_existing(tmp_path / "model", "beit_segmentation")
    options = {"model": source, "policy": policy, "save_steps": 1, "gradient_checkpointing": True}
    train(scenes, tmp_path / "whole", **options, max_steps=3)
    train(scenes, tmp_path / "parts", **options, max_steps=1, lr_scheduler="constant")
    with pytest.raises(ValueError, match="was made with other options: lr_scheduler 'constant' -> 'polynomial'"):
        train(scenes, tmp_path / "parts", **options, max_steps=3, resume_from_checkpoint="latest")
    train(
        scenes,
        tmp_path / "on",
        **options,
        max_steps=3,
        resume_from_checkpoint=tmp_path / "whole/checkpoints/step_00000002",
    )
    assert largest_difference(tmp_path / "whole" / "model.safetensors", tmp_path / "on" / "model.safetensors") == 0


@pytest.mark.slow
def test_a_saved_recipe_repeats_the_run(scenes, upernet, policy, tmp_path):
    train(scenes, tmp_path / "first", model=upernet, policy=policy, seed=3)
    run_example("train.py", recipe=tmp_path / "first" / "train.yaml", output_dir=tmp_path / "second")
    paths = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert largest_difference(*paths) == 0


def test_a_run_is_not_resumed_with_another_policy(scenes, upernet, tmp_path):
    tiny_policy().save_pretrained(tmp_path / "policy")
    options = {"model": upernet, "policy": tmp_path / "policy", "save_steps": 1}
    train(scenes, tmp_path / "run", **options)
    tiny_policy(seed=1).save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"was made with other data: digest of the policy '\w+' -> '\w+'"):
        train(scenes, tmp_path / "run", **options, resume_from_checkpoint="latest")


@pytest.mark.slow
def test_a_policy_is_trained_first_for_the_models_patches_and_images(scenes, tmp_path):
    source = save_existing(tmp_path / "model", "beit_segmentation")
    build_processor("beit_segmentation", image_mean=[0.1, 0.2, 0.3]).save_pretrained(source)
    options = {**TINY_POLICY, "model": source, "policy_epochs": 1, "save_steps": 1}
    train(scenes, tmp_path / "run", **options, max_steps=1)
    trained = CtsPolicyModel.from_pretrained(tmp_path / "run" / "policy")
    assert (trained.config.superpatch_size, trained.config.image_mean) == (16, [0.1, 0.2, 0.3])
    # It is not trained again when the run goes on, and is that of the finished model.
    train(scenes, tmp_path / "run", **options, max_steps=2, resume_from_checkpoint="latest")
    policies = (trained, load_cts(tmp_path / "run").token_sharing.policy)
    assert largest_difference(*(policy.state_dict() for policy in policies)) == 0


@pytest.mark.slow
def test_an_earlier_run_is_replaced_when_asked_to_only(scenes, upernet, policy, tmp_path):
    train(scenes, tmp_path, model=upernet, policy=policy)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds .*token_sharing/.* of an earlier run"):
        train(scenes, tmp_path, model=upernet, token_reduction=0)
    assert contents(tmp_path) == before
    train(scenes, tmp_path, "--overwrite_output_dir", model=upernet, token_reduction=0)
    assert [path.name for path in (tmp_path / "token_sharing").iterdir()] == ["options.json"]


@pytest.mark.slow
def test_crops_and_images_have_the_size_that_is_asked_for(scenes, policy, tmp_path):
    source = save_existing(tmp_path / "model", "beit_segmentation")
    build_processor("beit_segmentation", do_reduce_labels=True).save_pretrained(source)
    for crop_size, size in ((64, (72, 56)), (32, (41, 32))):
        folder = tmp_path / str(crop_size)
        train(scenes, folder, model=source, policy=policy, crop_size=crop_size)
        processor = AutoImageProcessor.from_pretrained(folder)
        assert (processor.size["height"], processor.size["width"]) == size
        assert not processor.do_reduce_labels  # the classes of our data sets start at 0


@pytest.mark.slow
def test_labels_that_are_all_ignored_change_nothing(upernet, tmp_path):
    scenes = write_scenes(tmp_path / "scenes", num_train=2)
    for path in (scenes / "labels" / "train").iterdir():
        Image.new("L", (64, 64), 255).save(path)
    for name in (NAME, "eomt"):
        source = save_existing(tmp_path / name, name)
        train(scenes, tmp_path / f"{name}_run", model=source, token_reduction=0)
        assert all(value.isfinite().all() for value in weights(tmp_path / f"{name}_run").values())


@pytest.mark.slow
def test_two_processes_train_one_model(upernet, policy, tmp_path):
    """Weights that get no gradient, and parts of a batch without labels, keep no process waiting."""
    scenes = write_scenes(tmp_path / "scenes", num_train=4)
    for path in sorted((scenes / "labels" / "train").iterdir())[:3]:
        Image.new("L", (64, 64), 255).save(path)
    options = {**TINY_RUN, "model": upernet, "policy": policy, "data_dir": scenes, "output_dir": tmp_path / "run"}
    ended = launch("train.py", 2, **options, num_workers=0, max_steps=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert load_cts(tmp_path / "run").token_sharing.policy is not None


def test_a_loss_that_is_not_finite_stops_the_run(scenes, upernet, policy, tmp_path, monkeypatch):
    backward = loop._backward
    monkeypatch.setattr(loop, "_backward", lambda *args: backward(*args) * float("nan"))
    with pytest.raises(ValueError, match="The loss must be finite, got nan at step 1"):
        train(scenes, tmp_path, model=upernet, policy=policy)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_finished_model_is_uploaded_with_its_policy(scenes, upernet, policy, tmp_path, uploads):
    train(scenes, tmp_path, "--push_to_hub", model=upernet, policy=policy, hub_model_id="street", save_steps=1)
    ((_, files),) = uploads
    assert {"model.safetensors", "train.yaml", "README.md", "token_sharing/model.safetensors"} <= files
    assert not any(name.startswith("checkpoints") for name in files)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpt_depth", {}, r"cannot be trained: .* got a DPTForDepthEstimation: give one that makes label maps"),
        ("dinov2", {}, r"cannot be trained: .* got a Dinov2Model: .* --backbone takes an encoder alone"),
        (NAME, {"policy_loss_weight": 1}, r"`policy_loss_weight` must be 0 for a model of transformers, .* got 1\.0"),
        (NAME, {"image_mean": [0.1, 0.1, 0.1]}, r"`image_mean` must be \[0\.485, .* got \[0\.1, 0\.1, 0\.1\]"),
        (NAME, {"policy_image_std": [0.1, 0.1, 0.1]}, r"`policy_image_std` must be \[0\.5, .* got \[0\.1"),
        (NAME, {"gradient_checkpointing": True}, r"`gradient_checkpointing` must be False for a UperNet.*, got True"),
        (NAME, {"eval_window": 64}, r"`window`, .* must be unset for a model of transformers"),
        ("data2vec_segmentation", {"crop_size": 48}, r"`crop_size` must be one that the Data2VecVisionFor.*, got 48"),
        ("eomt", {"freeze_encoder": True}, r"`freeze_encoder` must be False for a EomtForUniversal.*, got True"),
        ("beit_segmentation", {"unsharing": "residual"}, "`unsharing` must be left out for a model of transformers"),
        ("beit_segmentation", {"sharing_threshold": 0.9}, "`sharing_threshold` must be left out"),
    ],
    ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    scenes, policy, tmp_path, monkeypatch, name, options, message
):
    no_step(monkeypatch)
    build_existing(name).save_pretrained(tmp_path / "model")
    build_processor(name if name in PROCESSORS else "dpt_segmentation").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        train(scenes, tmp_path / "run", model=tmp_path / "model", policy=policy, **options)


def test_image_processors_with_other_pixels_are_refused(scenes, policy, tmp_path):
    source = save_existing(tmp_path / "model", NAME)
    build_processor(NAME, do_rescale=False).save_pretrained(source)
    with pytest.raises(ValueError, match=r"must scale pixels from 0 to 1, .* that multiplies them by 1:"):
        train(scenes, tmp_path / "run", model=source, policy=policy)


def test_incomplete_models_and_policies_for_others_are_refused(scenes, policy, upernet, tmp_path):
    source = save_existing(tmp_path / "model", NAME)
    kept = weights(source)
    del kept["decode_head.fpn_bottleneck.conv.weight"]
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit the UperNet.* 1 missing: decode_head\.fpn_bottleneck"):
        train(scenes, tmp_path / "run", model=source, policy=policy)
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="must hold the image processor of its model, got none"):
        train(scenes, tmp_path / "run", model=source, policy=policy)
    tiny_policy(superpatch_size=32).save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"`policy` must be for superpatches of two patches, .* 8 x 8 pixels here"):
        train(scenes, tmp_path / "run", model=upernet, policy=tmp_path / "policy")
    with pytest.raises(ValueError, match="`output_dir` must not be where `model` lies"):
        train(scenes, upernet, model=upernet, policy=policy)
