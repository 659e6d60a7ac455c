# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What is refused when a model is opened, whichever script opens it."""

import json
import re
from functools import partial

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor

from cts_hf import CtsImageProcessor, CtsImageProcessorPil
from cts_hf.benchmark.measuring import main as benchmark
from cts_hf.conversion.checkpoints import convert_checkpoint, load_policy
from cts_hf.hub.loading import check_model_folder, load_config, load_policy_folder, load_processor, load_segmenter
from cts_hf.hub.publishing import publish, upload_folder

from ..conversion.test_checkpoints import write_original
from ..helpers.golden import load_golden
from ..helpers.models import random_images, tiny_model, tiny_policy
from ..helpers.scripts import command_line, run_main
from ..helpers.training_runs import write_scenes


DROPPED = ["cts.layernorm.weight", "cts.policy.head.bias", "decode_head.class_embeddings"]


def write_model(folder, change=lambda weights: None):
    """A model with its processor, whose weights `change` spoils."""
    tiny_model(num_labels=10).save_pretrained(folder)
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def drop_three(weights):
    for name in DROPPED:
        del weights[name]


def poison_policy(weights):
    weights["cts.policy.head.weight"][0, 0] = torch.nan
    weights["cts.policy.head.bias"][0] = torch.inf


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that are no complete model, each with what is said of it."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_policy().save_pretrained(folder / "policy")
    CtsImageProcessor().save_pretrained(folder / "policy")
    names = ", ".join(DROPPED)
    poisoned = "must hold finite weights, got NaN or infinity in weights of the policy: "
    poisoned += "cts.policy.head.bias, cts.policy.head.weight|cts.policy.head.weight, cts.policy.head.bias"
    return [
        (write_model(folder / "dropped", drop_three), f"config.json describes. 3 missing: {names}. Save it again"),
        (folder / "policy", "must hold a segmentation model, got a policy: give the folder of the model"),
        (write_model(folder / "poisoned", poison_policy), poisoned),
    ]


def runs_of_scripts(monkeypatch, tmp_path, model):
    """For each script that opens a model, a function that runs it."""
    data = write_scenes(tmp_path / "data", num_train=1, num_val=1)
    target = tmp_path / "target"
    runs = {
        "evaluate.py": {"model": model, "data_dir": data, "output_dir": target, "num_workers": 0},
        "predict.py": {"model": model, "images": data / "images", "output_dir": target, "num_workers": 0},
        "export_onnx.py": {"model": model, "output_dir": target},
        "convert_checkpoint.py": {"source": model, "output_dir": target, "kind": "original"},
        "train.py": {"model": model, "data_dir": data, "output_dir": target, "max_steps": 1},
    }
    for script, options in runs.items():
        yield partial(run_main, monkeypatch, script, **options)
    yield partial(benchmark, command_line({"model": model, "rounds": 1}))


@pytest.mark.parametrize("index", range(3), ids=["dropped", "policy", "poisoned"])
def test_every_script_refuses_what_is_no_complete_model(monkeypatch, tmp_path, folders, index):
    model, message = folders[index]
    for run in runs_of_scripts(monkeypatch, tmp_path, model):
        with pytest.raises(ValueError, match=message):
            run()


def test_what_is_incomplete_is_not_published(folders, tmp_path):
    for folder, message in (folders[0], folders[2]):
        (folder / "README.md").write_text("# Mine")
        with pytest.raises(ValueError, match=message):
            upload_folder(folder, dry_run=True)
    model = tiny_model()
    model.decode_head.class_embeddings.data.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"infinity in weights of the model: decode_head.class_embeddings. Its training diverged"
    ):
        publish(model, CtsImageProcessor(), "me/street", dry_run=True)
    encoder = publish(tiny_model().cts, CtsImageProcessor(), "me/encoder", dry_run=True)
    assert "model.safetensors" in encoder.files


def test_policies_are_as_complete_as_models(tmp_path):
    policy = tiny_policy()
    with torch.no_grad():
        policy.head.bias[0] = -torch.inf
    policy.save_pretrained(tmp_path / "folder")
    message = "infinity in weights of the policy: head.bias"
    with pytest.raises(ValueError, match=message):
        load_policy_folder(tmp_path / "folder")
    torch.save(
        tiny_policy(superpatch_size=32, width_coefficient=1.0, depth_coefficient=1.0).state_dict(), tmp_path / "p"
    )
    weights = torch.load(tmp_path / "p")
    weights["head.bias"][1] = torch.nan
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path / "model.pth")


def test_weights_that_are_converted_must_be_finite(tmp_path):
    golden, meta = load_golden("tiny_mask_cts")
    golden["weights"]["encoder.norm.weight"][0] = torch.nan
    source = write_original(tmp_path / "run", golden["weights"], meta)
    with pytest.raises(ValueError, match=r"infinity in weights of the model: cts.layernorm.weight"):
        convert_checkpoint(source)


@torch.no_grad()
def test_complete_folders_open(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    CtsImageProcessorPil(size={"shortest_edge": 80}).save_pretrained(tmp_path)
    opened = load_segmenter(tmp_path, dtype=torch.float32)
    assert not opened.training
    assert torch.equal(opened(random_images()).logits, model(random_images()).logits)
    assert load_config(tmp_path).hidden_size == 32
    assert type(load_processor(tmp_path)) is CtsImageProcessor
    assert load_processor(str(tmp_path)).size.shortest_edge == 80


def test_what_is_no_model_is_said_so(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = write_model(tmp_path / "model")
    with pytest.raises(ValueError, match="must hold a policy, got a whole segmentation model"):
        load_policy_folder(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "segformer"}))
    with pytest.raises(ValueError, match=r"`model_type` 'cts' in its config.json., got `model_type` 'segformer'"):
        load_segmenter(folder)
    (folder / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"config.json in .* cannot be read"):
        load_segmenter(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json: it must be the folder of a model"):
        load_segmenter(folder)
    file = tmp_path / "file"
    file.write_text("")
    for load in (load_segmenter, load_policy_folder, load_processor, load_config):
        with pytest.raises(FileNotFoundError, match=r"must be the folder of a model, or the id .* got a file"):
            load(file)
        with pytest.raises(FileNotFoundError, match="got no such folder"):
            load(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="owner/absent must be the folder of a model, or the id of a"):
            load("owner/absent")


@pytest.mark.parametrize("size", [0, 5, 1000], ids=["empty", "header", "cut"])
def test_damaged_weights_are_said_so(tmp_path, size):
    weights = write_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"weights in .* cannot be read .* damaged or incomplete"):
        load_segmenter(tmp_path)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id2label": ["sky"]}, "AttributeError: 'list' object has no attribute 'items'"),
        ({"dtype": "os.system"}, "AttributeError: module 'torch' has no attribute 'os.system'"),
        ({"num_hidden_layers": -1}, "ValueError: `num_hidden_layers` must be at least 1, got -1."),
        ({"hidden_size": "a"}, "Field 'hidden_size' expected int, got str"),
        ({"auto_map": 3}, "TypeError: "),
        ([], "TypeError: it must be a JSON mapping, got a list"),
        (3, "TypeError: "),
    ],
)
def test_configurations_that_are_none_are_named(tmp_path, changes, reason):
    path = write_model(tmp_path) / "config.json"
    edit_json(path, **changes) if isinstance(changes, dict) else path.write_text(json.dumps(changes))
    message = rf"config\.json in {re.escape(str(tmp_path))} cannot be read \(.*{re.escape(reason)}.*\)\. Correct it"
    for load in (load_segmenter, load_config, load_processor, check_model_folder):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([], "TypeError: it must be a JSON mapping, got a list"),
        ({"size": "big"}, "ValueError: Could not convert size"),
        *(
            (
                {"size": {"shortest_edge": size}},
                f"`size` must hold whole numbers of at least 1, got {size!r} as shortest",
            )
            for size in ("abc", 0, -1, 1.5, True)
        ),
        ({"rescale_factor": "x"}, "`rescale_factor` must be a number above 0, got 'x'"),
        ({"resample": "x"}, "'x' is not a valid Resampling"),
    ],
)
def test_image_processors_that_are_none_are_named(tmp_path, changes, reason):
    path = write_model(tmp_path) / "preprocessor_config.json"
    edit_json(path, **changes) if isinstance(changes, dict) else path.write_text(json.dumps(changes))
    message = rf"preprocessor_config\.json in {re.escape(str(tmp_path))} cannot be read \(.*{re.escape(reason)}"
    for load in (load_processor, check_model_folder):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_sizes_that_are_not_used_are_not_looked_at(tmp_path):
    write_model(tmp_path)
    edit_json(tmp_path / "preprocessor_config.json", do_resize=False, size=None, do_rescale=False, rescale_factor=None)
    assert not load_processor(tmp_path).do_resize


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({}, "its `weight_map` must be a JSON mapping, got a NoneType"),
        ([], "it must be a JSON mapping, got a list"),
        ({"weight_map": {"a": "b"}}, "its `metadata` must be a JSON mapping, got a NoneType"),
        ({"weight_map": {"a": 3}, "metadata": {}}, "TypeError: "),
        (
            {"weight_map": {"a": "../b.safetensors"}, "metadata": {}},
            "it must name files in this folder, got '../b.saf",
        ),
        ({"weight_map": {"a": "/b.safetensors"}, "metadata": {}}, "it must name files in this folder, got '/b"),
    ],
)
def test_an_index_of_shards_that_is_none_is_named(tmp_path, index, reason):
    (write_model(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json in .* cannot be read \(.*{reason}"):
        load_segmenter(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"x" * 500, b"PK\x03\x04" + b"0" * 99, [1, 2], {0: torch.ones(2)}],
    ids=["text", "zip", "list", "key"],
)
def test_pickled_weights_that_are_none_are_named(tmp_path, content):
    (write_model(tmp_path) / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=rf"weights in {re.escape(str(tmp_path))} cannot be read .* damaged or"):
        load_segmenter(tmp_path)


def test_missing_weights_and_shards_are_said_so(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold the weights of a model beside its config.json"):
        load_segmenter(tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold the weights of a model beside its config.json"):
        load_segmenter(tmp_path)


def test_image_processors_that_do_not_belong_to_the_model_are_refused(tmp_path):
    folder = write_model(tmp_path)
    ViTImageProcessor().save_pretrained(folder)
    with pytest.raises(ValueError, match="must be a CtsImageProcessor, got a ViTImageProcessor"):
        load_processor(folder)
    (folder / "preprocessor_config.json").write_text("")
    with pytest.raises(ValueError, match=r"preprocessor_config.json in .* cannot be read"):
        load_processor(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json, .* save the image processor"):
        load_processor(folder)


def test_weights_of_any_format_are_not_replaced_by_random_ones(tmp_path):
    """A folder with a configuration alone is measured with random weights, but none whose weights cannot be opened."""
    folder = write_model(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        benchmark(command_line({"model": folder, "rounds": 1}))
