# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
import torch
from transformers import BeitImageProcessor, BitImageProcessor, EomtImageProcessor

from cts_hf import apply_cts, save_cts
from cts_hf.benchmark.arguments import BenchmarkArguments
from cts_hf.benchmark.end_to_end import EndToEnd
from cts_hf.benchmark.existing import EXISTING_PRESETS, count_multiply_adds, scores_shape
from cts_hf.benchmark.existing import build_existing as build_preset
from cts_hf.benchmark.measuring import main, measure, run_benchmark

from ..helpers.existing_models import build_existing
from ..helpers.models import tiny_policy


@pytest.mark.parametrize("name", ["dinov2", "vit", "beit_segmentation"])
def test_a_model_of_transformers_is_measured(name):
    model = apply_cts(build_existing(name))
    row = measure(model, 0.4, (72, 56), batch_size=2, rounds=2)
    assert row["bound"] > 1
    assert row["plain"]["multiply_adds"] == 2 * count_multiply_adds(model, (72, 56), 0.0, runs_policy=False)
    assert row["parts"].keys() == {"forward", "upsampling"}
    assert row["ratio"] == row["ratio_with_upsampling"]


def test_multiply_adds_are_those_of_the_tokens():
    """Of a linear layer of the encoder: a product for each token."""
    model = apply_cts(build_existing("dinov2", num_hidden_layers=1))
    plain, shared = (count_multiply_adds(model, (64, 64), reduction, False) for reduction in (0.0, 0.375))
    width, removed = 32, 3 * 8
    per_token = 12 * width**2
    attention = 2 * width * (65**2 - (65 - removed) ** 2)
    projection = 16 * 3 * 8**2 * width  # of the superpatches
    assert plain - shared == removed * per_token + attention - projection
    policy = tiny_policy()
    with_policy = count_multiply_adds(apply_cts(build_existing("dinov2"), policy), (64, 64), 0.375, True)
    assert with_policy > count_multiply_adds(apply_cts(build_existing("dinov2")), (64, 64), 0.375, False)


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("beit_segmentation", BeitImageProcessor(size={"height": 64, "width": 64})),
        ("eomt", EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})),
        ("eomt", EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, do_split_image=True)),
    ],
    ids=["beit", "eomt", "eomt_windows"],
)
def test_label_maps_of_models_of_transformers_are_measured(name, processor, monkeypatch):
    model, maps = apply_cts(build_existing(name)), []
    postprocess = EndToEnd.postprocess
    monkeypatch.setattr(EndToEnd, "postprocess", lambda *given: maps.append(postprocess(*given)))
    row = measure(model, 0.4, (64, 64), batch_size=2, rounds=2, end_to_end=EndToEnd(model, processor))
    assert all(label_map.shape == (64, 64) for label_maps in maps for label_map in label_maps)
    assert {len(label_maps) for label_maps in maps} == {2}
    assert row["end_to_end"]["cts"]["shares"].keys() == {"preprocessing", "forward", "postprocessing"}
    assert row["cts"]["num_tokens"] < row["plain"]["num_tokens"]
    with pytest.raises(ValueError, match=r"`image_size` must be .*got \(48, 48\), which becomes \(64, 64\)"):
        measure(model, 0.4, (48, 48), batch_size=2, rounds=2, end_to_end=EndToEnd(model, processor))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"superpatch_levels": [2, 4]}, r"`superpatch_levels` must be 2 .*got \[2, 4\]"),
        ({"sharing_threshold": [0.9]}, r"`sharing_threshold` unset .*got .*\[0.9\]"),
        ({"token_reduction": ["0.8"]}, r"`token_reduction` must be .*0.75 .*got 0.8"),
        ({"end_to_end": True}, "image processor of its model for `end_to_end`, got none"),
    ],
)
def test_models_of_transformers_refuse_what_they_cannot_do(tmp_path, options, message):
    config = build_existing("beit_segmentation").config
    config.architectures = ["BeitForSemanticSegmentation"]
    config.save_pretrained(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_benchmark(BenchmarkArguments(model=str(tmp_path), rounds=1, **options))


def test_models_without_label_maps_have_no_way_to_them(tmp_path):
    build_existing("dinov2").config.save_pretrained(tmp_path)  # names no architecture
    BitImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model` must be one for semantic or universal segmentation"):
        run_benchmark(BenchmarkArguments(model=str(tmp_path), rounds=1, end_to_end=True))
    preset = EXISTING_PRESETS["dinov2-small-518"]
    with pytest.raises(ValueError, match="`end_to_end` must be unset for a Dinov2Model"):
        preset.build_processor()


def test_an_odd_last_row_has_no_scores():
    assert scores_shape(build_existing("dinov2"), (72, 56)) == (4, 3)


def test_folders_of_plain_models_and_of_models_that_share_are_opened_with_their_weights(tmp_path):
    plain = build_existing("dinov2")
    plain.save_pretrained(tmp_path / "plain")
    save_cts(apply_cts(build_existing("dinov2"), tiny_policy(), 0.2), tmp_path / "shared")
    for folder, token_reduction in (("plain", 0.4), ("shared", 0.2)):
        model = build_preset(None, str(tmp_path / folder), 0.4, runs_policy=True)
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
        assert model.token_sharing.token_reduction == token_reduction
        assert model.token_sharing.policy.config.superpatch_size == 16
    assert build_preset(None, str(tmp_path / "plain"), 0.4, runs_policy=False).token_sharing.policy is None


@pytest.mark.slow
def test_folders(tmp_path, capsys):
    model = apply_cts(build_existing("dinov2"), tiny_policy(), 0.2)
    save_cts(model, tmp_path / "model")
    main(["--model", str(tmp_path / "model"), "--rounds", "1", "--json", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text())["token_reduction"] == 0.2
    assert "64x64, 20.00 % fewer tokens, batch 1: ratio" in capsys.readouterr().out
    options = ["--rounds", "1", "--given_scores", "--token_reduction", "0.3", "0.6"]
    main(["--model", str(tmp_path / "model"), *options])
    assert "60.00 %" in capsys.readouterr().out
    model.config.save_pretrained(tmp_path / "config")
    main(["--model", str(tmp_path / "config"), *options, "--image_size", "48"])
    assert "48x48" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXISTING_PRESETS)
def test_presets_are_built(name):
    with torch.device("meta"):
        model = EXISTING_PRESETS[name].build()
    rows, columns = scores_shape(model, (640, 640) if "640" in name else (518, 518))
    assert rows == columns
