# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What is refused in folders of models of transformers that share tokens; see tests/existing/test_saving.py, too."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cts_hf import apply_cts, load_cts
from cts_hf.hub.sharing_folder import load_sharing_model, write_sharing_model

from ..helpers.existing_models import build_existing
from ..helpers.models import tiny_model, tiny_policy


@pytest.fixture
def folder(tmp_path):
    write_sharing_model(apply_cts(build_existing("beit_segmentation"), tiny_policy()), tmp_path / "street")
    return tmp_path / "street"


def options_file(folder):
    return folder / "token_sharing" / "options.json"


def test_folders_of_other_kinds_are_refused(tmp_path):
    build_existing("beit_segmentation").save_pretrained(tmp_path / "plain")
    message = r"must be what `save_cts` wrote, got a model without token_sharing/options\.json .*`from_pretrained`.*ap"
    with pytest.raises(ValueError, match=message):
        load_sharing_model(tmp_path / "plain")
    tiny_model().save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=message):
        load_sharing_model(tmp_path / "own")
    with pytest.raises(FileNotFoundError, match=r"must be the folder of a model, or the id"):
        load_sharing_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_sharing_model(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"someone/absent must be the folder of a model, or the id"):
        load_sharing_model("someone/absent", cache_dir=tmp_path / "cache", local_files_only=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"`format_version` must be 1, got 2: update"),
        ({"format_version": True}, r"`format_version` must be 1, got True"),
        ({"format_version": None}, r"`format_version` must be 1, got None"),
        ({"token_reduction": 0.9}, r"`token_reduction` must be a number between 0"),
        ({"token_reduction": "0.3"}, r"`token_reduction` must be a number between 0"),
        ({"token_reduction": float("nan")}, r"`token_reduction` must be a number between 0"),
        ({"image_mean": 0.5}, r"`image_mean` must be a list of one number for each channel, got 0\.5"),
        ({"image_mean": []}, r"`image_mean` must be a list"),
        ({"image_mean": [0.5, "a", 0.5]}, r"`image_mean` must be finite numbers"),
        ({"image_std": [0.5, 0, 0.5]}, r"`image_std` must be numbers above 0"),
        ({"has_policy": 1}, r"`has_policy` must be true or false, got 1"),
        ({"levels": 2}, r"its keys must be format_version, has_policy, .* got .*'levels'"),
    ],
)
def test_options_that_are_no_options_are_refused(folder, changes, message):
    content = json.loads(options_file(folder).read_text())
    options_file(folder).write_text(json.dumps({**content, **changes}))
    with pytest.raises(ValueError, match=rf"token_sharing/options\.json in .*street cannot be read .*{message}"):
        load_sharing_model(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"7", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 9])
def test_options_of_another_form_are_refused(folder, content):
    options_file(folder).write_bytes(content)
    with pytest.raises(ValueError, match=r"token_sharing/options\.json in .*street cannot be read"):
        load_sharing_model(folder)


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (["os"], r"must be one model class of transformers, got \['os'\]"),
        (["PreTrainedConfig"], r"must be one model class"),
        (["CtsForSemanticSegmentation"], r"must be one model class"),
        (["__class__"], r"must be one model class"),
        (["PreTrainedModel"], r"`model_type` in config\.json of .* must be None"),
        (["ViTModel"], r"`model_type` in config\.json of .* must be 'vit', as ViTModel has it, got 'beit'"),
        ([], r"must be one model class"),
        (["ViTModel", "BeitModel"], r"must be one model class"),
        ([["BeitModel"]], r"must be one model class"),
        ("BeitModel", r"must be one model class"),
        (None, r"must be one model class"),
    ],
)
def test_only_classes_of_transformers_are_opened(folder, architectures, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(ValueError, match=message):
        load_sharing_model(folder)


def test_code_in_the_folder_is_never_run(folder, tmp_path):
    for part, name in (("", "BeitForSemanticSegmentation"), ("token_sharing", "CtsPolicyModel")):
        (folder / part / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass {name}: pass\n")
        config = json.loads((folder / part / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": f"evil.{name}", "AutoModel": f"evil.{name}"}
        (folder / part / "config.json").write_text(json.dumps(config))
    for options in ({}, {"trust_remote_code": True}):
        load_sharing_model(folder, **options)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold the weights of a model"):
        load_sharing_model(folder)  # not even from pickles
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["", "token_sharing"])
def test_weights_that_are_incomplete_or_not_finite_are_refused(folder, part):
    file = folder / part / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("bias"))
    changes = {
        r"1 missing: ": {n: w for n, w in weights.items() if n != name},
        r"1 unexpected: other": {**weights, "other": torch.ones(1)},
        r"1 misshaped: ": {**weights, name: torch.ones(99)},
        r"must hold finite weights": {**weights, name: torch.full_like(weights[name], torch.nan)},
    }
    for message, changed in changes.items():
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_sharing_model(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged or incomplete"):
        load_sharing_model(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold the weights of a model"):
        load_sharing_model(folder)


def test_a_policy_that_is_missing_or_another_models_is_refused(folder):
    tiny_policy(superpatch_size=28).save_pretrained(folder / "token_sharing")
    with pytest.raises(ValueError, match=r"`policy` must be for superpatches of two patches"):
        load_cts(folder)
    (folder / "token_sharing" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"token_sharing has no config\.json"):
        load_sharing_model(folder)
    tiny_model().save_pretrained(folder / "token_sharing")
    with pytest.raises(ValueError, match=r"must hold a policy, got a whole segmentation model"):
        load_sharing_model(folder)


@pytest.mark.parametrize(
    "options",
    [{"ignore_mismatched_sizes": True}, {"output_loading_info": True}, {"use_safetensors": False}, {"state_dict": {}}],
)
def test_options_that_let_incomplete_weights_through_are_refused(folder, options):
    with pytest.raises(ValueError, match=rf"`{next(iter(options))}` must be left out, got .*complete, or not at all"):
        load_sharing_model(folder, **options)
