# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BeitForSemanticSegmentation, pipeline

from cts_hf import apply_cts, load_cts, remove_cts, save_cts
from cts_hf.hub.loading import load_policy_folder, load_processor, load_segmenter

from ..helpers.existing_models import KINDS, build_existing, call_existing, tensors
from ..helpers.models import random_images, tiny_model, tiny_policy


IMAGES = random_images(batch_size=1)
MEAN, STD = (0.1, 0.2, 0.3), (0.7, 0.8, 0.9)
REPOSITORY, COMMIT = "someone/street", "0123456789abcdef0123456789abcdef01234567"
PROCESSORS = {
    "beit_segmentation": "BeitImageProcessor",
    "data2vec_segmentation": "BeitImageProcessor",
    "dpt_segmentation": "DPTImageProcessor",
    "upernet_dinov2": "SegformerImageProcessor",
    "mask2former": "Mask2FormerImageProcessor",
    "eomt": "EomtImageProcessor",
    "dpt_depth": "DPTImageProcessor",
    "depth_anything": "DPTImageProcessor",
    "zoedepth": "ZoeDepthImageProcessor",
}


def shared(name="beit_segmentation", **options):
    return apply_cts(build_existing(name), tiny_policy(), **options)


def load(source, **options):
    """What `load_cts` gives, with the attention of `build_existing`."""
    return load_cts(source, attn_implementation="eager", **options)


@torch.no_grad()
def outputs(model, name="beit_segmentation", **options):
    # Weights that lie in a file are not aligned as others, which can change the last bit of what is computed.
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.clone()
    images = IMAGES.to(model.dtype)
    output = call_existing(model, name, images, **options)
    return {**tensors(output), **{k: output[k] for k in ("shared_superpatches", "num_tokens") if k in output}}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture
def folder(tmp_path):
    save_cts(shared(), tmp_path / "street")
    return tmp_path / "street"


# Not PixioBackbone, of which transformers' own `save_pretrained` and `from_pretrained` exchange two layer norms.
@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"pixio"}))
def test_models_come_back_and_are_plain_ones_without_the_package(tmp_path, name):
    expected_plain = outputs(build_existing(name), name)
    model = shared(name, token_reduction=0.4375, image_mean=MEAN, image_std=STD)
    save_cts(model, tmp_path)
    assert not any(name.startswith("token_sharing") for name in load_file(tmp_path / "model.safetensors"))
    assert_equal(outputs(type(model).from_pretrained(tmp_path, attn_implementation="eager"), name), expected_plain)

    again = load(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.token_sharing.policy.parameters())
    assert (again.token_sharing.token_reduction, again.token_sharing.image_mean) == (0.4375, MEAN)
    assert again.token_sharing.image_std == STD
    expected = outputs(model, name)
    assert expected["shared_superpatches"].any()
    assert_equal(outputs(again, name), expected)
    assert_equal(outputs(remove_cts(again), name), expected_plain)


def test_the_checkpoint_is_upstreams_own(tmp_path, folder):
    build_existing("beit_segmentation").save_pretrained(tmp_path / "plain")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    added = {path.name for path in folder.iterdir()} - {path.name for path in (tmp_path / "plain").iterdir()}
    assert added == {"README.md", "token_sharing", ".cts_hf.json", ".cts_hf.lock"}


def test_without_a_policy(tmp_path):
    model = apply_cts(build_existing("dinov2"), token_reduction=0.2)
    save_cts(model, tmp_path)
    assert [path.name for path in (tmp_path / "token_sharing").iterdir()] == ["options.json"]
    again = load(tmp_path)
    assert again.token_sharing.policy is None
    scores = {"superpatch_scores": torch.rand(1, 4, 4)}
    assert_equal(outputs(again, "dinov2", **scores), outputs(model, "dinov2", **scores))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype):
    model = shared().to(dtype)
    save_cts(model, tmp_path)
    again = load(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert_equal(outputs(again), outputs(model))
    other = load(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    assert_equal(outputs(other), outputs(model.float()))


def test_options_of_from_pretrained_reach_the_model(folder):
    model = load_cts(folder, attn_implementation="eager", id2label={i: f"class {i}" for i in range(5)})
    assert model.config._attn_implementation == "eager"
    assert model.config.id2label[3] == "class 3"


def test_a_model_that_is_offloaded_to_the_disk(tmp_path):
    folder = tmp_path / "saved"
    save_cts(shared("dinov2"), folder)
    expected = outputs(shared("dinov2"), "dinov2")
    model = load(folder, device_map={"": "disk"}, offload_folder=tmp_path / "disk")
    assert {parameter.device.type for name, parameter in model.named_parameters() if "policy" not in name} == {"meta"}
    assert_equal(outputs(model, "dinov2"), expected)
    save_cts(model, tmp_path / "again")
    assert_equal(outputs(load(tmp_path / "again"), "dinov2"), expected)

    weights = load_file(folder / "model.safetensors")
    weights["layernorm.bias"][0] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold finite weights, got .*: layernorm\.bias\. "):
        load(folder, device_map={"": "disk"}, offload_folder=tmp_path / "other")


def test_weights_in_several_files(folder):
    expected = outputs(shared())
    for part, model in (("", build_existing("beit_segmentation")), ("token_sharing", tiny_policy())):
        (folder / part / "model.safetensors").unlink()
        model.save_pretrained(folder / part, max_shard_size="50KB")
        assert (folder / part / "model.safetensors.index.json").exists()
    assert_equal(outputs(load(folder)), expected)


def test_tensors_that_two_modules_share_are_refused_as_upstream_does(tmp_path):
    model = shared()
    layers = model.beit.layers
    layers[1].mlp.fc1.weight = layers[0].mlp.fc1.weight
    with pytest.raises(ValueError, match=r"could not be written .*shared tensors .*layers\.1\.mlp\.fc1\.weight"):
        save_cts(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {".cts_hf.json", ".cts_hf.lock"}
    layers[1].mlp.fc1.weight = torch.nn.Parameter(layers[0].mlp.fc1.weight.detach().clone())
    save_cts(model, tmp_path)
    assert_equal(outputs(load(tmp_path)), outputs(model))


def test_a_policy_that_several_models_share_is_saved_with_each(tmp_path):
    policy = tiny_policy()
    for name in ("beit_segmentation", "dinov2"):
        model = apply_cts(build_existing(name), policy)
        save_cts(model, tmp_path / name)
        assert_equal(outputs(load(tmp_path / name), name), outputs(model, name))


def hub_cache(folder, cache, commit=COMMIT):
    """The folder as a download from the Hub leaves it."""
    repository = cache / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def test_from_the_hub(tmp_path, folder):
    cache = tmp_path / "cache"
    hub_cache(folder, cache)
    other = COMMIT[::-1]
    save_cts(shared(token_reduction=0.1), tmp_path / "other")
    hub_cache(tmp_path / "other", cache, other)  # is `main` now
    options = {"cache_dir": cache, "local_files_only": True}
    assert load_cts(REPOSITORY, **options).token_sharing.token_reduction == 0.1
    expected = outputs(shared())
    assert_equal(outputs(load(REPOSITORY, revision=COMMIT, **options)), expected)
    downloaded = cache / "models--someone--street" / "snapshots" / COMMIT
    assert_equal(outputs(load(downloaded)), expected)


def test_one_revision_is_read_although_another_is_uploaded_meanwhile(tmp_path, folder, monkeypatch):
    cache = tmp_path / "cache"
    hub_cache(folder, cache)
    read = BeitForSemanticSegmentation.from_pretrained

    def upload_and_read(source, **options):
        hub_cache(folder, cache, COMMIT[::-1])
        (cache / "models--someone--street" / "snapshots" / COMMIT[::-1] / "token_sharing" / "config.json").unlink()
        return read(source, **options)

    monkeypatch.setattr(BeitForSemanticSegmentation, "from_pretrained", upload_and_read)
    model = load(REPOSITORY, cache_dir=cache, local_files_only=True)
    assert_equal(outputs(model), outputs(shared()))


def test_in_a_subfolder_of_a_folder_and_of_a_repository(tmp_path, folder):
    hub_cache(folder.parent, tmp_path / "cache")
    expected = outputs(shared())
    assert_equal(outputs(load(folder.parent, subfolder="street")), expected)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True, "subfolder": "street"}
    assert_equal(outputs(load(REPOSITORY, **options)), expected)


@pytest.mark.slow
def test_plain_model_and_policy_where_the_package_is_missing(folder):
    script = """
import sys
sys.modules["cts_hf"] = None
from transformers import AutoModel, AutoModelForSemanticSegmentation
print(type(AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1])).__name__)
print(type(AutoModel.from_pretrained(sys.argv[1] + "/token_sharing", trust_remote_code=True)).__name__)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "home")}
    command = [sys.executable, "-c", script, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout.split() == ["BeitForSemanticSegmentation", "CtsPolicyModel"], run.stderr[-2000:]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pipelines(tmp_path, name):
    model = shared(name)
    model.config.id2label = {index: f"class {index}" for index in range(5)}
    save_cts(model, tmp_path)
    size = {"shortest_edge": 64, "longest_edge": 64} if name == "eomt" else {"height": 64, "width": 64}
    options = {"do_split_image": False, "do_pad": True} if name == "eomt" else {}
    processor = getattr(transformers, PROCESSORS[name])(size=size, **options)
    processor.save_pretrained(tmp_path)
    model = load(tmp_path)
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(output))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8))
    task = "depth-estimation" if "Depth" in type(model).__name__ else "image-segmentation"
    pipe = pipeline(task, model=model, image_processor=processor)
    if task == "depth-estimation":
        assert pipe(image)["depth"].size == image.size
    else:
        regions = pipe(image, subtask="semantic")
        assert regions
        assert {region["mask"].size for region in regions} == {image.size}
    assert calls[0].num_tokens[0] < 4 * calls[0].shared_superpatches.numel()


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`model` must be one that `apply_cts` has changed, got a Beit.*save_pretr"):
        save_cts(build_existing("beit_segmentation"), tmp_path / "out")
    for other in (tiny_model(), torch.nn.DataParallel(shared()), torch.compile(shared()), None):
        with pytest.raises(ValueError, match=r"`model` must be one that `apply_cts` has changed"):
            save_cts(other, tmp_path / "out")

    class Mine(BeitForSemanticSegmentation):
        pass

    with pytest.raises(ValueError, match=r"`model` must be of a class of transformers, .*Mine"):
        save_cts(apply_cts(Mine(build_existing("beit_segmentation").config)), tmp_path / "out")
    model = shared()
    model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match=r"adapters of PEFT.*merge them"):
        save_cts(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_model_is_replaced_whole(tmp_path):
    save_cts(shared(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    without_policy = apply_cts(build_existing("dinov2"), token_reduction=0.1)
    save_cts(without_policy, tmp_path)
    loaded = load_cts(tmp_path)
    assert type(loaded) is type(without_policy)
    assert loaded.token_sharing.policy is None
    assert loaded.token_sharing.token_reduction == 0.1
    assert not list((tmp_path / "token_sharing").glob("*.safetensors"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_of_others_are_not_replaced(tmp_path):
    for name in ("config.json", "model-00001-of-00002.safetensors", "token_sharing/options.json", "README.md"):
        other = tmp_path / name.replace("/", "_")
        (other / name).parent.mkdir(parents=True)
        (other / name).write_text("mine")
        with pytest.raises(ValueError, match=rf"holds {name}, which this run would replace"):
            save_cts(shared(), other)
        assert [path for path in other.rglob("*") if path.is_file() and not path.name.startswith(".cts")] == [
            other / name
        ]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"must be a folder that can be written to"):
        save_cts(shared(), tmp_path / "file")
    with_processor = tmp_path / "new"
    transformers.BeitImageProcessor().save_pretrained(with_processor)
    save_cts(shared(), with_processor)
    load_cts(with_processor)


def test_a_save_that_fails_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    model = shared()

    def fail(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(model.token_sharing.policy, "save_pretrained", fail)
        with pytest.raises(ValueError, match=r"could not be written to .*No space left on device"):
            save_cts(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {".cts_hf.json", ".cts_hf.lock"}

    # One that is killed while the files move to their places leaves some of them.
    replace, moved = os.replace, []

    def kill(source, target):
        if Path(target).name == "options.json":
            raise KeyboardInterrupt
        moved.append(Path(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            save_cts(model, tmp_path)
    stale = tmp_path / "token_sharing" / "model.safetensors"
    assert stale in moved
    save_cts(apply_cts(build_existing("beit_segmentation")), tmp_path)
    assert not stale.exists()
    assert load_cts(tmp_path).token_sharing.policy is None


@pytest.mark.parametrize("wrong", [5, None, True, b"runs/beit", ["runs/beit"]])
def test_what_is_no_folder_or_id_is_refused(wrong):
    for refused in (load_cts, load_policy_folder, load_processor, load_segmenter):
        with pytest.raises(ValueError, match=r"A folder or id on the Hub must be a `str` or `Path`, got <class"):
            refused(wrong)
    with pytest.raises(ValueError, match=r"An output folder must be a `str` or `Path`, got <class"):
        save_cts(apply_cts(build_existing("dinov2")), wrong)
