# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from cts_hf.benchmark.arguments import BenchmarkArguments
from cts_hf.benchmark.building import build_model
from cts_hf.benchmark.measuring import main, measure
from cts_hf.benchmark.presets import PRESETS
from cts_hf.benchmark.report import PARTS

from ..helpers.clock import Clock
from ..helpers.figures import saved_figures
from ..helpers.models import random_images, tiny_config, tiny_model
from ..helpers.scripts import ClosedPipe


EXAMPLE = Path(__file__).parents[2] / "examples" / "benchmark.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    return folder


def test_times_are_those_of_the_parts(monkeypatch):
    clock, model, runs = Clock(), tiny_model(), []
    monkeypatch.setattr("cts_hf.benchmark.timing.time", clock)
    monkeypatch.setattr("cts_hf.benchmark.measuring.upsampled_argmax", lambda *_: clock.wait(4))
    clock.let_take(model.cts.embeddings.patch_embeddings, lambda _: 1)
    clock.let_take(model.cts.policy.backbone, lambda _: 2)
    for layer in model.cts.layers:
        clock.let_take(layer.mlp, lambda tokens: tokens.shape[1])
    clock.let_take(model.decode_head, lambda _: 3)

    def be_slow_in_the_last_round(_, arguments, options):
        runs.append(options["token_reduction"])
        clock.slowness = 5 if len(runs) in (9, 10) else 1  # two runs that are not timed, and 4 rounds of two

    model.register_forward_pre_hook(be_slow_in_the_last_round, with_kwargs=True)
    row = measure(model, 0.75, (64, 64), batch_size=2, rounds=4)
    assert runs[2:10] == [0, 0.75, 0.75, 0] * 2  # each is first as often as the other
    # In milliseconds: 64 patches, or 16 superpatches, and the class token in two layers; two images to upsample.
    rest = {"decoder": 3000, "unsharing": 0, "upsampling": 8000}
    assert row["plain_parts"] == {"embedding_and_sharing": 1000, "encoder": 130_000, **rest}
    assert row["parts"] == {"embedding_and_sharing": 1000, "policy": 2000, "encoder": 34_000, **rest}
    for kind, milliseconds in (("plain", 134_000), ("cts", 40_000)):
        assert row[kind]["latency_ms_p50"] == milliseconds
        # Between the three quick rounds and the slow one.
        assert row[kind]["latency_ms_p95"] == pytest.approx((0.15 + 0.85 * 5) * milliseconds)
        assert row[kind]["images_per_second"] == pytest.approx(2000 / milliseconds)
    # What makes a round slow makes both of its runs slow.
    assert [row["ratio"], *row["ratio_quartiles"]] == pytest.approx([134 / 40] * 3)
    assert row["ratio_with_upsampling"] == pytest.approx(142 / 48)
    assert row["bound"] == row["plain"]["multiply_adds"] / row["cts"]["multiply_adds"]
    assert row["reached"] == pytest.approx(row["ratio"] / row["bound"])


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 20), (1.5, 10), (60, 3)])
def test_by_default_there_are_as_many_rounds_as_fit_in_half_a_minute(monkeypatch, seconds, rounds):
    clock, model = Clock(), tiny_model()
    monkeypatch.setattr("cts_hf.benchmark.timing.time", clock)
    clock.let_take(model.decode_head, lambda _: seconds)
    assert measure(model, 0.3, (64, 64), batch_size=1)["rounds"] == rounds


def test_memory_and_multiply_adds_are_counted():
    model = tiny_model(decoder_type="linear", use_policy=False)
    row = measure(model, 0.75, (64, 64), batch_size=2, rounds=1)
    # By hand, for 64 patches and the class token: projections, MLP and attention of 2 layers; embedding; classifier.
    hidden, mlp, tokens = 32, 64, 65
    layer = tokens * (4 * hidden * hidden + 2 * hidden * mlp) + 2 * tokens**2 * hidden
    expected = 2 * layer + 64 * (3 * 8 * 8 * hidden) + 64 * hidden * 5
    assert row["plain"]["multiply_adds"] == 2 * expected
    # More than the largest tensor, the unfolded images, and less than everything ever computed.
    images_mib = 2 * 3 * 64 * 64 * 4 / 2**20
    assert images_mib < row["plain"]["peak_memory_mib"] < 100 * images_mib


def test_hooks_are_removed_and_weights_kept():
    model = tiny_model()
    before = model(random_images()).logits
    measure(model, 0.3, (64, 64), batch_size=1, rounds=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(random_images()).logits, before)


@pytest.mark.slow
def test_compiled():
    counters.clear()
    row = measure(tiny_model(), 0.3, (64, 64), batch_size=1, rounds=2, compile=True)
    assert counters["stats"]["unique_graphs"] == 2  # plain and sharing
    assert set(row["parts"]) == set(PARTS)


def test_sweep_writes_json_and_plot(checkpoint, tmp_path, capsys, monkeypatch):
    results, plot, figures = tmp_path / "results.json", tmp_path / "plot.png", saved_figures(monkeypatch)
    sweep = ["--token_reduction", "0.3", "0.6", "--image_size", "64", "96", "--batch_size", "1", "2"]
    main(["--model", str(checkpoint), *sweep, "--rounds", "1", "--json", str(results), "--plot", str(plot)])
    report = json.loads(results.read_text())
    cases = [(row["image_size"][0], row["token_reduction"], row["batch_size"]) for row in report["rows"]]
    assert cases == [(s, r, b) for s in (64, 96) for r in (0.3, 0.6) for b in (1, 2)]
    for key in ("ratio", "bound", "parts"):
        assert report[key] == report["rows"][0][key]
    assert report["setup"]["threads"] == torch.get_num_threads()
    printed = capsys.readouterr().out
    assert "96x96, 60.00 % fewer tokens, batch 2: ratio" in printed
    assert torch.__version__ in printed
    (figure,) = figures
    ratio_axes, part_axes = figure.axes
    assert [bar.get_width() for bar in ratio_axes.patches] == [row["ratio"] for row in report["rows"]]
    ends = np.reshape([bar.get_x() + bar.get_width() for bar in part_axes.patches], (-1, len(PARTS)))[:, -1]
    times = [sum(row[key].values()) for row in report["rows"] for key in ("plain_parts", "parts")]
    assert ends == pytest.approx(times)
    with Image.open(plot) as picture:
        picture.load()


def test_a_plot_takes_a_name_with_dollars(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "$a^b^c$")
    command = ["--model", str(tmp_path / "$a^b^c$"), "--image_size", "64", "--rounds", "1"]
    main([*command, "--plot", str(tmp_path / "plot.png")])
    with Image.open(tmp_path / "plot.png") as picture:
        picture.load()


def test_a_report_that_cannot_be_printed_is_saved_and_one_that_cannot_be_saved_printed(
    checkpoint, tmp_path, capsys, monkeypatch
):
    command = ["--model", str(checkpoint), "--image_size", "64", "--rounds", "1", "--json", str(tmp_path / "r.json")]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", ClosedPipe())
        with pytest.raises(BrokenPipeError):
            main([*command, "--plot", str(tmp_path / "r.png")])
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 1
    assert (tmp_path / "r.png").exists()

    def fail_midway(path, *_, **__):
        path.write_bytes(b"{")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fail_midway)
    with pytest.raises(OSError, match="no space left"):
        main([*command, "--overwrite"])
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 1  # of the run before
    assert "64x64, 30.00 % fewer tokens, batch 1: ratio" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_runs_a_config_without_weights(tmp_path):
    tiny_config(image_size=(64, 96)).save_pretrained(tmp_path)
    command = [sys.executable, str(EXAMPLE), "--model", str(tmp_path), "--rounds", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "64x96, 30.00 % fewer tokens, batch 1: ratio" in finished.stdout


def test_checkpoints_are_loaded_and_their_policy_fused(checkpoint):
    model = build_model(BenchmarkArguments(model=str(checkpoint)))
    assert model.cts.policy.backbone.conv_stem.folded_weight is not None
    torch.testing.assert_close(model(random_images()).logits, tiny_model()(random_images()).logits)


@pytest.mark.parametrize(
    ("name", "num_tokens"),
    [("tiny-512", 715), ("small-512", 715), ("small-768", 1296), ("base-512", 715), ("large-640", 1120)],
)
def test_presets_have_the_published_numbers_of_tokens(name, num_tokens):
    preset = PRESETS[name]
    with torch.device("meta"):
        model = tiny_model(image_size=preset.image_size, patch_size=16, token_reduction=preset.token_reduction)
        outputs = model(torch.empty(1, 3, preset.image_size, preset.image_size), output_hidden_states=True)
    assert outputs.hidden_states[0].shape[1] == 1 + num_tokens
    assert preset.config().policy_config.output_stride == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Either `preset`, .* must be given, got None and None"),
        ({"preset": "small-512", "model": "here"}, "Either `preset`, .*, got 'small-512' and 'here'"),
        ({"preset": "huge"}, "tiny-512.*got 'huge'"),
        ({"preset": "small-512", "rounds": 0}, "rounds.*got 0"),
        ({"preset": "small-512", "image_size": [64, -1]}, r"`image_size` must be .* got \[64, -1\]"),
        ({"preset": "small-512", "batch_size": [0]}, r"`batch_size` must be .* got \[0\]"),
        ({"preset": "small-512", "token_reduction": ["nan"]}, "`token_reduction` must be .*between 0"),
        ({"preset": "small-512", "plot": "report.txt"}, "`plot` must be the path of a .png or .svg file"),
        (
            {"preset": "small-512", "plot": "report.png", "json": "./report.png"},
            "`plot` must be another file than `json`, got report.png for both",
        ),
    ],
)
def test_refusals_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkArguments(**options)


@pytest.mark.parametrize("name", ["json", "plot"])
def test_files_that_cannot_be_written_are_refused_before_the_model_is_opened(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "folder.png", tmp_path / "file" / "report.png", tmp_path / f"{'n' * 300}.png"):
        with pytest.raises(ValueError, match=f"`{name}` must be the path of a file that can be written, got"):
            main(["--model", "absent", f"--{name}", str(path)])
    with pytest.raises(FileNotFoundError, match="absent"):
        main(["--model", str(tmp_path / "absent"), f"--{name}", str(tmp_path / "new" / "report.png")])
    assert list((tmp_path / "new").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["json", "plot"])
def test_files_that_exist_are_replaced_only_if_asked(checkpoint, tmp_path, name):
    path = tmp_path / "report.png"
    path.write_text("mine")
    command = ["--model", str(checkpoint), "--image_size", "64", "--rounds", "1", f"--{name}", str(path)]
    with pytest.raises(ValueError, match=f"`{name}` must be the path of a new file, got .*: .* with --overwrite"):
        main(command)
    assert path.read_text() == "mine"
    main([*command, "--overwrite"])
    assert path.read_bytes() != b"mine"


def test_links_to_nothing_yet_and_devices_are_written_to(checkpoint, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "results.json")
    command = ["--model", str(checkpoint), "--image_size", "64", "--rounds", "1"]
    main([*command, "--json", str(tmp_path / "link.json")])
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 1
    assert (tmp_path / "link.json").is_symlink()
    main([*command, "--json", os.devnull])
