# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Every code block of README.md, CONTRIBUTING.md and docs/ runs, page by page, in a folder that has what the page takes
for granted: data sets (tiny), checkpoints to convert and a cache of downloads (random weights). Training is cut to a
few steps of small crops; `accelerate launch` and `torchrun` are checked by their own parsers, and their scripts run in
this process.
"""

import json
import re
import shlex
from pathlib import Path

import huggingface_hub.constants
import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
)

from cts_hf import CtsForSemanticSegmentation, CtsImageProcessor
from cts_hf.conversion.checkpoints import save_original

from .helpers.models import tiny_config, tiny_policy
from .helpers.scripts import ROOT, run_script
from .helpers.training_runs import reset_accelerate


PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
RUN = {"python", "bash"}
LANGUAGES = {*RUN, "bibtex", "text", ""}

FEW_STEPS = ["--max_steps", "2", "--batch_size", "2", "--crop_size", "64", "--num_workers", "0"]
FEW_STEPS += ["--max_eval_samples", "1", "--eval_steps", "0"]
SHORTENED = {
    "train.py": FEW_STEPS,
    "train_policy.py": FEW_STEPS,
    "evaluate.py": ["--max_samples", "1", "--num_workers", "0"],
    "find_threshold.py": ["--num_workers", "0"],
    "predict.py": ["--num_workers", "0"],
    "benchmark.py": ["--rounds", "1", "--image_size", "64", "--batch_size", "1"],
    "export_onnx.py": ["--rounds", "1"],
    "convert_checkpoint.py": [],
    "push_to_hub.py": ["--dry_run"],
}


def code_blocks(page):
    """(line, language, code) of each block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start()].count("\n") + 1, match[1], match[2]


def languages(page):
    return {language for _, language, _ in code_blocks(page)}


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_complete(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(list(code_blocks(page)))
    assert languages(page) <= LANGUAGES
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if not RUN.isdisjoint(languages(page))])
@pytest.mark.usefixtures("workplace")
def test_code_runs(page, monkeypatch, capsys):
    for line, language, code in code_blocks(page):
        with capsys.disabled():
            print(f"{page}:{line}")
        if language == "python":
            capsys.readouterr()
            names = {"__name__": "__main__"}
            exec(compile(code, f"{page}:{line}", "exec"), names)
            for test in [value for name, value in names.items() if name.startswith("test_")]:
                test()
            assert_printed(code, capsys.readouterr().out)
        elif language == "bash":
            for words in commands(code):
                run_command(words, monkeypatch)


def assert_printed(code, output):
    """A comment behind a `print` that begins with a list is what it prints."""
    for expected in re.findall(r"^print\(.*\)  # (\[.*\])", code, re.MULTILINE):
        assert expected in output.splitlines()


def commands(code):
    """The words of each command, comments left out."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def run_command(words, monkeypatch):
    program, *arguments = words
    if program == "pip":
        assert_installable(arguments)
    elif program in ("pytest", "hf", "pre-commit"):
        assert arguments in ([], ["auth", "login"], ["install"]), "a test cannot do this; is it right?"
    else:
        if program == "accelerate":
            assert arguments[0] == "launch"
            parsed = launch_command_parser().parse_args(arguments[1:])
            arguments = [parsed.training_script, *parsed.training_script_args]
        elif program == "torchrun":
            parsed = get_args_parser().parse_args(arguments)
            arguments = [parsed.training_script, *parsed.training_script_args]
        else:
            assert program == "python"
        script, *options = arguments
        shortened = list(SHORTENED[Path(script).name])
        if script.endswith("train.py") and "--policy" not in options:
            shortened += ["--policy_epochs", "0.01"]
        code = run_script(monkeypatch, ROOT / script, [*options, *shortened])
        assert code is None or not isinstance(code, int) or code == 0, f"{script} ends with the status {code}"


def assert_installable(arguments):
    if arguments == ["install", "pre-commit"]:
        return
    assert arguments[:2] == ["install", "-e"]
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[2])[1]
    known = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert all(f"\n{extra} = [" in known for extra in (extras or "").split(",") if extra)


@pytest.fixture
def workplace(page, tmp_path, monkeypatch):
    """The current folder, with all that the page takes for granted; what it leaves in this process is undone."""
    num_threads = torch.get_num_threads()
    reset_accelerate()
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")

    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            write_pair(tmp_path / f"data/images/{split}/{index}.jpg", tmp_path / f"data/labels/{split}/{index}.png", 3)
    (tmp_path / "data/classes.txt").write_text("road\ncar\nsky\n")
    ade20k = tmp_path / "ADEChallengeData2016"
    for split, name in (
        ("training", "ADE_train_00000001"),
        ("training", "ADE_train_00000002"),
        ("validation", "ADE_val_00000001"),
    ):
        write_pair(ade20k / f"images/{split}/{name}.jpg", ade20k / f"annotations/{split}/{name}.png", 151)

    if page not in ("README.md", "docs/tour.md"):  # which train it
        model = CtsForSemanticSegmentation(tiny_config(image_size=128))
        model.save_pretrained("outputs/scenes")
        CtsImageProcessor(size={"shortest_edge": 128}).save_pretrained("outputs/scenes")
        Path("outputs/scenes/README.md").write_text("# Scenes")
    original = CtsForSemanticSegmentation(
        tiny_config(use_policy=False, token_reduction=0, patch_size=16, intermediate_size=128)
    )
    save_original(original, CtsImageProcessor(), "seg_small_mask")
    policy = tiny_policy(superpatch_size=32, width_coefficient=1.0, depth_coefficient=1.0)
    torch.save(policy.state_dict(), "policy.pth")  # as the original saves it

    for name in downloads(page):
        folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (folder / "snapshots" / "0").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("0")
        architecture = name.removeprefix("timm/").partition(".")[0]
        save_file(timm.create_model(architecture).state_dict(), folder / "snapshots/0/model.safetensors")
        pretrained_cfg = timm.get_pretrained_cfg(name.removeprefix("timm/")).to_dict()
        (folder / "snapshots/0/config.json").write_text(json.dumps({"pretrained_cfg": pretrained_cfg}))
    for name, model, processor in transformers_downloads(page):
        folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("0")
        model.save_pretrained(folder / "snapshots/0")
        processor.save_pretrained(folder / "snapshots/0")
    yield
    plt.close("all")
    torch.set_num_threads(num_threads)
    reset_accelerate()


def downloads(page):
    """The repositories of timm that the page's code and recipes name."""
    code = "".join(code for _, _, code in code_blocks(page))
    recipes = [(ROOT / name).read_text() for name in re.findall(r"--recipe (\S+)", code)]
    return sorted(set(re.findall(r"timm/[\w.]+", "".join([code, *recipes]))))


def transformers_downloads(page):
    """The repositories with models of transformers that the page's code names: tiny, and with their patches' sizes."""
    code = "".join(code for _, _, code in code_blocks(page))
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    if "microsoft/beit-base-finetuned-ade-640-640" in code:
        config = BeitConfig(**size, intermediate_size=32, image_size=64, patch_size=16, out_indices=[1, 2, 3, 4])
        processor = BeitImageProcessor(size={"height": 64, "width": 64})
        yield "microsoft/beit-base-finetuned-ade-640-640", BeitForSemanticSegmentation(config), processor
    if "facebook/dinov2-small" in code:
        model = Dinov2Model(Dinov2Config(**size, image_size=70, patch_size=14))
        yield "facebook/dinov2-small", model, BitImageProcessor(size={"shortest_edge": 70})


def write_pair(image, label, num_ids):
    rng = np.random.default_rng(0)
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(image)
    Image.fromarray(rng.integers(0, num_ids, (7, 9), dtype=np.uint8).repeat(10, 0).repeat(10, 1)).save(label)
