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

from cts_hf import CtsImageProcessor
from cts_hf.benchmark.arguments import BenchmarkArguments
from cts_hf.benchmark.building import build_model
from cts_hf.benchmark.end_to_end import EndToEnd
from cts_hf.benchmark.measuring import main, measure, run_benchmark
from cts_hf.benchmark.presets import PRESETS
from cts_hf.benchmark.report import PARTS
from cts_hf.evaluation.cost import multiply_adds
from cts_hf.model.image_processing_label_maps_cts import upsampled_argmax

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


@pytest.mark.parametrize("draws_logits", [False, True])
def test_the_way_from_picture_to_label_map_is_timed_around_the_same_forwards(monkeypatch, draws_logits):
    clock, model, seen = Clock(), tiny_model(), []
    monkeypatch.setattr("cts_hf.benchmark.timing.time", clock)
    monkeypatch.setattr("cts_hf.benchmark.running.smooth_maps", lambda shape, _: clock.wait(50) or torch.ones(shape))
    clock.let_take(model.cts.embeddings.patch_embeddings, lambda _: 1)
    clock.let_take(model.cts.policy.backbone, lambda _: 2)
    for layer in model.cts.layers:
        clock.let_take(layer.mlp, lambda tokens: tokens.shape[1])
    clock.let_take(model.decode_head, lambda _: 3)

    class SlowEndToEnd(EndToEnd):
        def preprocess(self, batch):
            clock.wait(5)
            return super().preprocess(batch)

        def postprocess(self, outputs, features):
            clock.wait(20)
            maps = super().postprocess(outputs, features)
            seen.append((outputs, maps))
            return maps

    end_to_end = SlowEndToEnd(model, CtsImageProcessor())
    options = {"draws_logits": draws_logits, "end_to_end": end_to_end}
    row = measure(model, 0.75, (64, 64), batch_size=2, rounds=4, **options)
    for outputs, maps in seen:
        assert (outputs.logits == 1).all() == draws_logits
        assert [label_map.shape for label_map in maps] == [(64, 64)] * 2
        assert torch.equal(maps[0], upsampled_argmax(outputs.logits[0], (64, 64)))
    # The forward is measured as without what is around it; drawing logits counts nowhere.
    assert row["ratio"] == pytest.approx(134 / 40)
    assert row["parts"]["policy"] == 2000
    assert row["parts"].keys() == set(PARTS)
    whole = row["end_to_end"]
    assert whole["ratio"] == pytest.approx(159 / 65)
    assert whole["ratio_quartiles"] == pytest.approx([159 / 65] * 2)
    assert whole["draws_logits"] == draws_logits
    for kind, forward in (("plain", 134_000), ("cts", 40_000)):
        assert whole[kind]["parts"] == {"preprocessing": 5000, "forward": forward, "postprocessing": 20_000}
        total = forward + 25_000
        assert whole[kind]["latency_ms_p50"] == total
        assert whole[kind]["images_per_second"] == pytest.approx(2000 / total)
        assert whole[kind]["shares"]["forward"] == pytest.approx(forward / total)
        assert sum(whole[kind]["shares"].values()) == pytest.approx(1)
        # The images are made within, and given to the forward alone.
        images_mib = 2 * 3 * 64 * 64 * 4 / 2**20
        assert whole[kind]["peak_memory_mib"] >= row[kind]["peak_memory_mib"] + 0.99 * images_mib


def test_both_kinds_get_the_same_pictures_and_logits(monkeypatch):
    """Those of one round, and of no other."""
    model, pictures, logits = tiny_model(), [], []

    class Watched(EndToEnd):
        def preprocess(self, batch):
            pictures.append(b"".join(picture.tobytes() for picture in batch.pictures))
            return super().preprocess(batch)

        def postprocess(self, outputs, features):
            logits.append(outputs.logits.clone())
            return super().postprocess(outputs, features)

    end_to_end = Watched(model, CtsImageProcessor())
    measure(model, 0.3, (64, 64), batch_size=2, rounds=3, draws_logits=True, end_to_end=end_to_end)
    rounds = slice(2, 8)  # two runs are before them
    assert pictures[rounds][::2] == pictures[rounds][1::2]
    assert len(set(pictures[rounds])) == 3
    for plain, shared in zip(logits[rounds][::2], logits[rounds][1::2], strict=True):
        assert torch.equal(plain, shared)
    assert not torch.equal(logits[2], logits[4])


def test_thresholds_are_measured_by_what_images_share():
    model = tiny_model(superpatch_levels=(2, 4))
    calls = []
    model.cts.policy.register_forward_hook(lambda *_: calls.append("policy"))
    row = measure(model, 0.5, (128, 128), batch_size=2, rounds=2, sharing_threshold=0.9)
    assert (row["sharing_threshold"], row["token_reduction"], row["superpatch_levels"]) == (0.9, 0.5, [2, 4])
    assert row["plain"]["num_tokens_range"] == [256, 256]
    low, high = row["cts"]["num_tokens_range"]
    assert low < row["cts"]["num_tokens"] < high
    # The policy's time is part of it: in the first run, in two rounds, in that for memory and in that for logits.
    assert len(calls) == 5
    assert row["parts"]["policy"] > 0
    cheapest, dearest = (multiply_adds(model, (128, 128), 1 - tokens / 256) for tokens in (low, high))
    assert 2 * cheapest < row["cts"]["multiply_adds"] < 2 * dearest
    assert row["bound"] == row["plain"]["multiply_adds"] / row["cts"]["multiply_adds"]


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
    sweep = ["--token_reduction", "0.3", "0.6", "--image_size", "64", "96", "--batch_size", "2"]
    main(["--model", str(checkpoint), *sweep, "--rounds", "1", "--json", str(results), "--plot", str(plot)])
    report = json.loads(results.read_text())
    cases = [(row["image_size"][0], row["token_reduction"], row["batch_size"]) for row in report["rows"]]
    assert cases == [(s, r, 2) for s in (64, 96) for r in (0.3, 0.6)]
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


def test_levels_and_reductions_of_each_are_measured(tmp_path, capsys):
    tiny_config(image_size=128).save_pretrained(tmp_path / "config")
    command = ["--model", str(tmp_path / "config"), "--superpatch_levels", "2", "4", "--rounds", "1"]
    main([*command, "--token_reduction", "0.8", "0.3,0.15", "--json", str(tmp_path / "r.json"), "--end_to_end"])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["arguments"]["token_reduction"] == [0.8, [0.3, 0.15]]
    assert [row["superpatch_levels"] for row in report["rows"]] == [[2, 4]] * 2
    # 2 superpatches of 4 x 4 remove at most 15 % of 256 tokens, and 26 of 2 x 2 about 30 %.
    assert [row["cts"]["num_tokens"] for row in report["rows"]] == [pytest.approx(51, abs=1), 256 - 2 * 15 - 26 * 3]
    printed = capsys.readouterr().out
    assert "128x128, 30.00 % + 15.00 % fewer tokens, batch 1: ratio" in printed
    assert "label maps of smooth random logits" in printed
    assert "from picture to label map" in printed


def test_a_trained_policy_decides_on_pictures_of_a_folder(checkpoint, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    CtsImageProcessor().save_pretrained(folder)
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(2):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"images/{index}.png")
    command = ["--model", str(folder), "--rounds", "1", "--sharing_threshold", "0.5", "0.501"]
    with pytest.raises(ValueError, match=r"`sharing_threshold` must be given with `images` .*got \[0.5, 0.501\]"):
        main(command)
    with pytest.raises(ValueError, match=r"without `token_reduction` .*got .*token_reduction=\[0.3\]"):
        main([*command, "--images", str(tmp_path / "images"), "--token_reduction", "0.3"])
    with pytest.raises(ValueError, match="There is no folder"):
        main([*command, "--images", str(tmp_path / "absent")])
    options = ["--images", str(tmp_path / "images"), "--end_to_end", "--json", str(tmp_path / "r.json")]
    main([*command, *options])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["token_reduction"], row["sharing_threshold"]) for row in rows] == [(None, 0.5), (None, 0.501)]
    assert rows[0]["cts"]["num_tokens"] <= rows[1]["cts"]["num_tokens"]
    assert not rows[0]["end_to_end"]["draws_logits"]
    printed = capsys.readouterr().out
    assert "label maps of the model's own logits" in printed
    assert "64x64, at 0.5, " in printed
    # Without its policy, scores are drawn by which images lose what the configuration says, on average.
    main([*command[:-1], "--given_scores", "--json", str(tmp_path / "given.json")])
    given = json.loads((tmp_path / "given.json").read_text())
    assert (given["token_reduction"], given["parts"].get("policy")) == (0.3, None)


def test_a_threshold_of_the_configuration_is_measured_where_nothing_else_is_asked_for(tmp_path):
    tiny_config(sharing_threshold=0.7).save_pretrained(tmp_path)
    report = run_benchmark(BenchmarkArguments(model=str(tmp_path), rounds=1))
    assert (report["sharing_threshold"], report["token_reduction"]) == (0.7, 0.3)
    report = run_benchmark(BenchmarkArguments(model=str(tmp_path), rounds=1, token_reduction=["0.4"]))
    assert (report["sharing_threshold"], report["token_reduction"]) == (None, 0.4)
    with pytest.raises(ValueError, match=r"`sharing_threshold` must be above 0 and below 1 .*got \[0.5, 1.0\]"):
        run_benchmark(BenchmarkArguments(model=str(tmp_path), sharing_threshold=[0.5, 1.0]))


def test_levels_are_those_that_were_asked_for(checkpoint, tmp_path):
    assert build_model(BenchmarkArguments(model=str(checkpoint))).config.superpatch_levels == (2,)
    model = build_model(BenchmarkArguments(model=str(checkpoint), superpatch_levels=[2, 4]))
    assert model.config.superpatch_levels == (2, 4)
    assert len(model(random_images(), token_reduction=0.8).shared_superpatches) == 2
    with pytest.raises(ValueError, match=r"`token_reduction` must be .*0.75 .*got 0.8"):
        build_model(BenchmarkArguments(model=str(checkpoint), token_reduction=["0.8"]))
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`token_reduction` must be .*0.75 .*got 0.8"):
        build_model(BenchmarkArguments(model=str(tmp_path), token_reduction=["0.8"]))


def test_label_maps_need_an_image_processor(checkpoint):
    with pytest.raises(FileNotFoundError, match="has no preprocessor_config"):
        run_benchmark(BenchmarkArguments(model=str(checkpoint), rounds=1, end_to_end=True))


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
    [
        ("tiny-512", 715),
        ("small-512", 715),
        ("small-768", 1296),
        ("base-512", 715),
        ("large-640", 1120),
        # Of 4096, 109 superpatches of 4 x 4 and 274 of 2 x 2 remove 60 %.
        ("small-1024", 1639),
        ("large-1024", 1639),
    ],
)
def test_presets_have_the_published_numbers_of_tokens(name, num_tokens):
    preset = PRESETS[name]
    options = {"superpatch_levels": preset.superpatch_levels, "token_reduction": preset.token_reduction}
    with torch.device("meta"):
        model = tiny_model(image_size=preset.image_size, patch_size=16, **options)
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
        ({"preset": "small-512", "token_reduction": ["0.8"]}, "`token_reduction` must be .*0.75 .*got 0.8"),
        ({"preset": "small-512", "token_reduction": ["0.1,0.2"]}, r"`token_reduction` must be .*got \(0.1, 0.2\)"),
        ({"preset": "small-1024", "token_reduction": ["0.5,0.5"]}, r"together fit .*got \(0.5, 0.5\)"),
        ({"preset": "small-1024", "token_reduction": ["0.95"]}, "0.9375 .*got 0.95"),
        (
            {"preset": "small-1024", "superpatch_levels": [2], "token_reduction": ["0.8"]},
            "`token_reduction` must be .*0.75 .*got 0.8",
        ),
        (
            {"model": "here", "superpatch_levels": [2, 4], "token_reduction": ["0.2,0.3,0.1"]},
            r"one for each of the levels \(2, 4\)",
        ),
        (
            {"preset": "small-512", "token_reduction": ["0.1;0.2"]},
            "`token_reduction` must be numbers, .*got '0.1;0.2'",
        ),
        ({"preset": "small-512", "superpatch_levels": [2, 3]}, r"`superpatch_levels` must be .*got \[2, 3\]"),
        ({"preset": "small-512", "sharing_threshold": [1.5]}, "`sharing_threshold` must be a probability .*got 1.5"),
        (
            {"preset": "small-512", "sharing_threshold": [0.9], "compile": True},
            r"`sharing_threshold` must be unset with `compile`, got \[0.9\]",
        ),
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
