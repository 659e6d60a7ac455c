# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from cts_hf import CtsImageProcessor, CtsPolicyModel
from cts_hf.data.folder import IMAGE_SUFFIXES
from cts_hf.data.pictures import PictureError, find_pictures
from cts_hf.evaluation.scored_images import ImageFiles, load_policy_of, score_images
from cts_hf.evaluation.windows import InferenceOptions
from cts_hf.hub.normalization import IMAGENET

from ..helpers.existing_models import save_existing
from ..helpers.models import tiny_model, tiny_policy
from ..helpers.scenes import processor, scene_model, scenes


LEVELS = (2, 4)


def save(model, folder, **options):
    model.save_pretrained(folder)
    CtsImageProcessor(size={"shortest_edge": 64}, **options).save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("levels", [(2,), LEVELS], ids=str)
def test_scores_are_those_of_the_model_and_the_policy_runs_once_an_image(levels, monkeypatch):
    model, num_images = scene_model(superpatch_levels=levels), []
    rows = [dict(row) for row in scenes()]
    rows[1] = {name: rows[1][name].crop((0, 0, 80, 48)) for name in ("image", "label")}
    monkeypatch.setattr(type(model.cts), "_encode", lambda *_, **__: pytest.fail("the Segmenter ran"))
    hook = model.cts.policy.register_forward_hook(lambda *call: num_images.append(len(call[1][0])))
    images = score_images(model.config, model.cts.policy, rows, processor(72))
    hook.remove()
    monkeypatch.undo()
    assert [image.index for image in images] == list(range(len(rows)))
    assert sum(num_images) == len(rows)
    for image, row in zip(images, rows, strict=True):
        outputs = model(processor(72)(row["image"], return_tensors="pt").pixel_values, sharing_threshold=0.0)
        logits = outputs.policy_logits if len(levels) > 1 else (outputs.policy_logits,)
        assert outputs.num_tokens.item() * levels[-1] ** 2 == image.num_patches
        for scores, targets, of_level in zip(image.scores, image.targets, logits, strict=True):
            torch.testing.assert_close(torch.from_numpy(scores), (of_level[:, 1] - of_level[:, 0])[0])
            assert scores.shape == targets.shape


def test_a_policy_is_run_as_by_the_model_that_will_have_it(tmp_path):
    model = tiny_model(superpatch_levels=LEVELS, policy_config={**tiny_policy().config.to_diff_dict()})
    policy = tiny_policy(superpatch_levels=LEVELS, **IMAGENET._asdict())
    model.set_policy(policy)
    expected = score_images(model.config, model.cts.policy, scenes(), processor())
    save(policy, tmp_path / "policy", **IMAGENET._asdict())
    config, opened, own_processor = load_policy_of(tmp_path / "policy")
    assert (config.superpatch_levels, config.patch_size) == (LEVELS, 8)
    for image, other in zip(expected, score_images(config, opened, scenes(), own_processor), strict=True):
        # The model renormalizes images that its processor has normalized otherwise.
        for scores, others in zip(image.scores, other.scores, strict=True):
            torch.testing.assert_close(torch.from_numpy(scores), torch.from_numpy(others), atol=1e-4, rtol=1e-4)


def test_a_policy_or_a_model_of_one_level_has_larger_ones_on_demand(tmp_path):
    save(tiny_policy(), tmp_path / "policy")
    save(tiny_model(), tmp_path / "model")
    for source in ("policy", "model"):
        config, policy, _ = load_policy_of(tmp_path / source, superpatch_levels=[2, 4])
        assert (config.superpatch_levels, policy.config.superpatch_levels) == (LEVELS, (2,))
        assert [len(image.scores) for image in score_images(config, policy, scenes().take(1), processor())] == [2]


def test_another_policy_in_place_of_the_models(tmp_path):
    save(tiny_model(), tmp_path / "model")
    other = tiny_policy(seed=9)
    save(other, tmp_path / "policy")
    _, policy, _ = load_policy_of(tmp_path / "model", tmp_path / "policy")
    assert isinstance(policy, CtsPolicyModel)
    assert torch.equal(policy.head.weight, other.head.weight)
    assert not policy.training


def test_image_files_have_no_labels(tmp_path):
    for index, row in enumerate(scenes()):
        row["image"].save(tmp_path / f"{index}.png")
    paths, _ = find_pictures(tmp_path, IMAGE_SUFFIXES)
    model = scene_model()
    images = score_images(model.config, model.cts.policy, ImageFiles(paths.values()), processor())
    labelled = score_images(model.config, model.cts.policy, scenes(), processor())
    for image, other in zip(images, labelled, strict=True):
        assert image.targets is None
        assert (image.scores[0] == other.scores[0]).all()
    (tmp_path / "0.png").write_text("no picture")
    with pytest.raises(PictureError, match=r"0\.png"):
        score_images(model.config, model.cts.policy, ImageFiles(paths.values()), processor())


def test_models_without_thresholds_are_refused(tmp_path):
    save(tiny_model(use_policy=False), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"`model` must have a policy, got .*plain without one"):
        load_policy_of(tmp_path / "plain")
    save(tiny_policy(superpatch_levels=LEVELS), tmp_path / "policy")
    with pytest.raises(ValueError, match="`with_policy` must be None where `model` is a policy"):
        load_policy_of(tmp_path / "policy", tmp_path / "policy")
    with pytest.raises(ValueError, match=r"`policy_config.superpatch_levels` must be among .* of the model, \(2,\)"):
        load_policy_of(tmp_path / "policy", superpatch_levels=[2])
    existing = save_existing(tmp_path / "existing", "beit_segmentation", tiny_policy())
    with pytest.raises(ValueError, match=r"`model` must have an encoder of this package, .* got .*existing"):
        load_policy_of(existing)


def test_windows_and_nothing_at_all_are_refused():
    model = scene_model()
    with pytest.raises(ValueError, match="`window`, `scales` and `flip` must be unset to find a threshold"):
        score_images(
            model.config, model.cts.policy, scenes(), processor(), options=InferenceOptions(window=48, stride=32)
        )
    with pytest.raises(ValueError, match="There are no images"):
        score_images(model.config, model.cts.policy, [], processor())
