# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from cts_hf import apply_cts
from cts_hf.export.onnx import OPSET_VERSION, OnnxSegmenter, export_onnx
from cts_hf.model.modeling_cts_outputs import per_level

from ..helpers.existing_models import build_existing
from ..helpers.models import TINY_BACKBONE, random_images, tiny_model, tiny_policy
from ..model.test_modeling_cts_layout import levels_model
from ..model.test_modeling_cts_unsharing import trained


pytest.importorskip("onnxscript", reason="ONNX export needs `pip install onnx onnxscript onnxruntime`")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def export(tmp_path, model, **options):
    file = tmp_path / "new folder" / "model.onnx"
    export_onnx(model, file, **options)
    return file


def assert_equal(model, exported, pixel_values, **options):
    with torch.no_grad():
        expected = model(pixel_values, **options)
    given = exported(pixel_values)
    assert type(given.shared_superpatches) is type(expected.shared_superpatches)
    assert all(map(torch.equal, per_level(given.shared_superpatches), per_level(expected.shared_superpatches)))
    torch.testing.assert_close(given.logits, expected.logits, atol=1e-4, rtol=0)
    return expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"image_mean": [0.4, 0.5, 0.6], "policy_config": {**TINY_BACKBONE, "image_mean": 0.5, "image_std": 0.25}},
        {"decoder_type": "linear", "use_distillation_token": True},
    ],
)
def test_one_size(tmp_path, options):
    model = tiny_model(**options)
    file = export(tmp_path, model, image_size=(50, 75), batch_size=1)  # neither whole superpatches nor whole patches
    exported = OnnxSegmenter(file)
    for seed in range(3):
        outputs = assert_equal(model, exported, random_images(1, 50, 75, seed=seed))
        assert outputs.shared_superpatches.any()
        assert not outputs.shared_superpatches.all()
    assert OPSET_VERSION in [opset.version for opset in onnx.load(file).opset_import if opset.domain == ""]
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    half = exported(random_images(1, 50, 75).to(torch.float16).requires_grad_())  # it casts, as the model does
    assert half.logits.dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(1, 3, 50, 75\).*got \(1, 3, 64, 75\)"):
        exported(random_images(1, 64, 75))
    with pytest.raises(ValueError, match="got \\(2, 3, 50, 75\\)"):
        exported(random_images(2, 50, 75))


@pytest.mark.slow
@pytest.mark.parametrize("token_reduction", [0, 0.3, 0.75])
def test_any_number_of_images_and_any_budget(tmp_path, token_reduction):
    model = tiny_model()
    model.train()
    file = export(tmp_path, model, batch_size=None, token_reduction=token_reduction)
    assert model.training  # as it was
    model.eval()
    exported = OnnxSegmenter(file)
    for batch_size in (1, 2, 5):
        images = random_images(batch_size, 64, 64, seed=batch_size)
        assert_equal(model, exported, images, token_reduction=token_reduction)


@pytest.mark.slow
@pytest.mark.parametrize("decoder_type", ["mask_transformer", "setr_naive"])
@pytest.mark.parametrize("token_reduction", [0.6, (0.15, 0.45), 0])
def test_levels_and_a_residual(tmp_path, token_reduction, decoder_type):
    options = {"unsharing": "residual", "superpatch_embedding": "multiscale", "decoder_type": decoder_type}
    model = trained(levels_model(**options, policy_config={**TINY_BACKBONE, "superpatch_levels": (2,)}))
    file = export(tmp_path, model, image_size=(50, 75), batch_size=None, token_reduction=token_reduction)
    exported = OnnxSegmenter(file)
    assert [output.name for output in exported.session.get_outputs()] == [
        "logits",
        "shared_superpatches_2x2",
        "shared_superpatches_4x4",
    ]
    for batch_size in (1, 3):
        images = random_images(batch_size, 50, 75, seed=batch_size)
        outputs = assert_equal(model, exported, images, token_reduction=token_reduction)
        assert all(of_level.any() for of_level in outputs.shared_superpatches) == (token_reduction != 0)


@pytest.mark.slow
def test_equal_scores_share_in_raster_order(tmp_path):
    """The order of equal scores is part of the method's definition, and not every runtime's sort keeps it."""
    model = tiny_model()
    torch.nn.init.zeros_(model.cts.policy.head.weight)
    exported = OnnxSegmenter(export(tmp_path, model))
    shared = assert_equal(model, exported, random_images(1)).shared_superpatches.flatten()
    assert shared[: shared.sum()].all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("beit_segmentation", (72, 56)),  # an odd grid
        ("data2vec_segmentation", None),
        ("dpt_segmentation", None),
        ("upernet_dinov2", (48, 100)),
    ],
)
def test_models_of_transformers(tmp_path, name, image_size):
    model = apply_cts(build_existing(name), tiny_policy(), token_reduction=0.3)
    exported = OnnxSegmenter(export(tmp_path, model, image_size=image_size, batch_size=None))
    for batch_size in (1, 3):
        images = random_images(batch_size, *(image_size or (64, 64)), seed=batch_size)
        with torch.no_grad():
            expected = model(images)
        given = exported(images)
        assert torch.equal(given.shared_superpatches, expected.shared_superpatches)
        assert expected.shared_superpatches.any()
        # In float32, whose rounding grows with the values, which are large in these random models.
        scale = expected.logits.abs().max().item()
        torch.testing.assert_close(given.logits, expected.logits, atol=1e-5 * scale, rtol=0)


@pytest.mark.slow
def test_any_number_of_images_is_refused_where_pytorch_fixes_it(tmp_path, monkeypatch):
    torch_export = torch.onnx.export
    monkeypatch.setattr(
        torch.onnx, "export", lambda *args, **options: torch_export(*args, **options | {"dynamic_shapes": None})
    )
    with pytest.raises(ValueError, match="`batch_size` must be a number for this CtsForSemanticSegmentation"):
        export(tmp_path, tiny_model(), batch_size=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["eomt", "mask2former", "dpt_depth", "dinov2"])
def test_models_without_logits_of_classes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"`model` must be one for semantic segmentation, .* are not exported"):
        export(tmp_path, apply_cts(build_existing(name), tiny_policy()))


def test_models_that_share_no_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`model` must share tokens, got a BeitForSem.* call `apply_cts`"):
        export(tmp_path, build_existing("beit_segmentation"))
    with pytest.raises(ValueError, match="shares tokens without a policy"):
        export(tmp_path, apply_cts(build_existing("beit_segmentation")))


def test_bad_options(tmp_path):
    cases = [
        ({"token_reduction": 0.8}, r"between 0 \(no sharing\) and 0.75"),
        ({"image_size": (8, 64)}, "at least one superpatch"),
        ({"image_size": (-5, 64)}, r"positive whole number or two .*, got \(-5, 64\)"),
        ({"image_size": (64.0, 64)}, r"positive whole number or two .*, got \(64.0, 64\)"),
        ({"image_size": 0}, "positive whole number or two .*, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, or None"),
        ({"batch_size": 1.5}, "`batch_size` must be at least 1, or None"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            export(tmp_path, tiny_model(), **options)
    with pytest.raises(ValueError, match=r"`model` must be in torch.float32, got torch.bfloat16: call `model.float"):
        export(tmp_path, tiny_model().bfloat16())
    with pytest.raises(ValueError, match="no policy"):
        export(tmp_path, tiny_model(use_policy=False))
    assert not list(tmp_path.iterdir())
