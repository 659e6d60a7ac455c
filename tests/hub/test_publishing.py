# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Uploads to a stand-in of the Hub that speaks its HTTP interface, on this machine."""

import ast
import base64
import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, BeitImageProcessor

import cts_hf
from cts_hf import CtsImageProcessor, CtsImageProcessorPil, apply_cts, load_cts, save_cts
from cts_hf.hub.model_card import model_card
from cts_hf.hub.normalization import IMAGENET
from cts_hf.hub.publishing import publish, upload_folder

from ..helpers.existing_models import build_existing
from ..helpers.models import random_images, tiny_model, tiny_policy


TOKEN = "hf_" + "a1B2" * 8
SOURCES = Path(cts_hf.__file__).parent / "model"
CODE = {path.name for path in SOURCES.glob("*.py")} - {"__init__.py"}
MODEL = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} | CODE


class Hub(ThreadingHTTPServer):
    """Keeps the repositories that are created and the files that are committed to them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories, self.requests = {}, []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, self.headers["Authorization"]))
        if self.path == "/api/repos/create":
            options = json.loads(body)
            name = f"{options['organization'] or 'me'}/{options['name']}"
            self.server.repositories.setdefault(name, {"options": options, "files": {}})
            return self.answer({"url": f"{self.server.endpoint}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        repository = self.server.repositories[name]
        if "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer({"files": files})
        assert "/commit/" in self.path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                repository["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self.answer({"commitUrl": f"{self.server.endpoint}/{name}/commit/1", "commitOid": "1"})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):  # where both are set, the latter counts
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path):
    """A model as training leaves it, and what must stay at home."""
    folder = tmp_path / "street"
    tiny_model().save_pretrained(folder)
    CtsImageProcessor().save_pretrained(folder)
    for name in ("README.md", "train.yaml", "prediction.png", "evaluation.json"):
        (folder / name).write_text("{}")
    for name in ("notes.txt", ".env", "optimizer.bin", "model.pth", "train.py", "token"):
        (folder / name).write_text(TOKEN)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model.safetensors").write_text("")
    (tmp_path / "secret.png").write_text("secret")
    (folder / "linked.png").symlink_to(tmp_path / "secret.png")
    return folder


@torch.no_grad()
def test_model_processor_card_and_code_in_one_call(hub, tmp_path, capfd):
    model = tiny_model()
    options = {"metrics": {"mean IoU": 0.5}, "token": TOKEN, "endpoint": hub.endpoint}
    upload = publish(model, CtsImageProcessorPil(), "me/street", private=True, **options)
    assert upload.url == f"{hub.endpoint}/me/street"
    assert (set(upload.files), upload.left_out) == (MODEL, [])
    repository = hub.repositories["me/street"]
    assert repository["files"].keys() == MODEL
    assert repository["options"]["visibility"] == "private"
    assert {authorization for _, authorization in hub.requests} == {f"Bearer {TOKEN}"}

    for name, content in repository["files"].items():
        assert TOKEN.encode() not in content, name
        (tmp_path / name).write_bytes(content)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(again(random_images()).logits, model(random_images()).logits)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CtsImageProcessor
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.pipeline_tag, card.data.license) == ("image-segmentation", "apache-2.0")
    assert 'model="me/street"' in card.text
    assert "| mean IoU | 0.5000 |" in card.text
    assert "train.yaml" not in card.text
    assert TOKEN not in "".join([*capfd.readouterr(), str(upload)])


def test_a_folder_without_what_is_private(hub, folder, capfd):
    upload = upload_folder(folder, token=TOKEN, endpoint=hub.endpoint)
    expected = MODEL | {"train.yaml", "prediction.png", "evaluation.json"}
    assert set(upload.files) == expected
    assert hub.repositories["me/street"]["files"].keys() == expected
    assert upload.left_out == sorted(
        [".env", "checkpoints/", "linked.png", "model.pth", "notes.txt", "optimizer.bin", "token", "train.py"]
    )
    assert TOKEN not in "".join([*capfd.readouterr(), str(upload)])


def test_dry_run_lists_and_asks_nobody(hub, folder, monkeypatch):
    monkeypatch.setattr("cts_hf.hub.publishing.HfApi", None)
    upload = upload_folder(folder, "me/road", endpoint=hub.endpoint, dry_run=True)
    assert upload.url is None
    assert str(upload).startswith(f"{len(MODEL) + 3} files would be uploaded to me/road:\n  README.md\n")
    assert "left out:\n  .env\n  checkpoints/\n" in str(upload)
    upload = publish(tiny_policy(), CtsImageProcessor(), "me/policy", card="# Mine", dry_run=True)
    assert {"model.safetensors", "modeling_cts_policy.py", "README.md"} <= set(upload.files)
    assert hub.requests == []


def test_image_processors_that_contradict_the_configuration_are_refused(hub, folder):
    with pytest.raises(ValueError, match=r"as config\.json says, with .*0\.5.* got .*0\.485.*correct"):
        publish(tiny_model(), CtsImageProcessor(**IMAGENET._asdict()), "me/street", endpoint=hub.endpoint)
    CtsImageProcessor(image_std=1).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"as config\.json says, with .*0\.5.* got .*\[1.*correct"):
        upload_folder(folder, endpoint=hub.endpoint)
    assert hub.requests == []


def test_sharded_weights_are_complete(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    CtsImageProcessor().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Mine")
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(shards) > 1
    assert shards | {"model.safetensors.index.json"} <= set(upload_folder(tmp_path, dry_run=True).files)


def test_what_is_no_model_is_refused(hub, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`folder` must be that of a model, got .*absent"):
        upload_folder(tmp_path / "absent")
    (folder / "train.yaml").write_text(f"report_to: {TOKEN}")
    with pytest.raises(ValueError, match=r"train\.yaml must hold no token of the Hub") as error:
        upload_folder(folder, endpoint=hub.endpoint)
    assert TOKEN not in str(error.value)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"lacks README\.md, model\.safetensors: save .* only weights in safetensors"):
        upload_folder(folder, endpoint=hub.endpoint)
    assert hub.requests == []


def sharing_model(policy=True, token_reduction=0.3):
    return apply_cts(build_existing("beit_segmentation"), tiny_policy() if policy else None, token_reduction)


@pytest.fixture
def sharing_folder(tmp_path):
    """A model of transformers that shares tokens, and what must stay at home."""
    folder = tmp_path / "shared"
    save_cts(sharing_model(), folder)
    BeitImageProcessor().save_pretrained(folder)
    for name in ("notes.txt", "token_sharing/notes.txt", "token_sharing/README.md", "token_sharing/picture.png"):
        (folder / name).write_text(TOKEN)
    (folder / "token_sharing" / "checkpoints").mkdir()
    return folder


@torch.no_grad()
def test_a_model_of_transformers_with_its_policy(hub, sharing_folder, tmp_path, capfd):
    upload = upload_folder(sharing_folder, "me/street", token=TOKEN, endpoint=hub.endpoint)
    assert upload.left_out == [
        ".cts_hf.json",
        ".cts_hf.lock",
        "notes.txt",
        "token_sharing/README.md",
        "token_sharing/checkpoints/",
        "token_sharing/notes.txt",
        "token_sharing/picture.png",
    ]
    files = hub.repositories["me/street"]["files"]
    assert files.keys() == set(upload.files)
    assert {"token_sharing/options.json", "token_sharing/modeling_cts_policy.py"} <= files.keys()
    assert {"token_sharing/config.json", "token_sharing/model.safetensors"} <= files.keys()
    assert not any(TOKEN.encode() in content for content in files.values())
    for name, content in files.items():
        (tmp_path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / name).write_bytes(content)
    again, model = load_cts(tmp_path / "again"), load_cts(sharing_folder)
    assert torch.equal(again(random_images()).logits, model(random_images()).logits)


def test_a_model_of_transformers_in_one_call(hub):
    options = {"metrics": {"mean IoU": 0.5}, "endpoint": hub.endpoint, "token": TOKEN}
    upload = publish(sharing_model(), BeitImageProcessor(), "me/street", **options)
    files = hub.repositories["me/street"]["files"]
    assert {"model.safetensors", "preprocessor_config.json", "token_sharing/options.json"} <= files.keys()
    assert upload.left_out == []
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.data.license is None  # the weights are of others
    for text in (
        "removes 30.0% of the patch tokens",
        "superpatches of 16 x 16 pixels",
        'pipeline("image-segmentation", model=load_cts("me/street"), image_processor=processor)',
        'BeitForSemanticSegmentation.from_pretrained("me/street")',
        "| mean IoU | 0.5000 |",
    ):
        assert text in card.text, text
    assert "train.yaml" not in card.text


@pytest.mark.parametrize(
    ("name", "tag"),
    [("dpt_depth", "depth-estimation"), ("eomt", "image-segmentation"), ("dinov2", "image-feature-extraction")],
)
def test_cards_say_what_a_model_is_for(name, tag):
    model = apply_cts(build_existing(name), tiny_policy())
    card = ModelCard(model_card(model, {}, title="t", name="n", has_recipe=False))
    assert card.data.pipeline_tag == tag
    assert f'pipeline("{tag}", model=load_cts("n")' in card.text


def test_the_card_of_a_model_without_a_policy_says_what_calls_must_give():
    text = model_card(sharing_model(policy=False), {}, title="t", name="n", has_recipe=False)
    assert "It has no policy: calls must give `superpatch_scores`, or `token_reduction=0`." in text
    assert 'model = load_cts("n")' in text
    assert "pipeline(" not in text


def test_an_incomplete_model_of_transformers_is_refused(hub, sharing_folder, tmp_path):
    policy = sharing_folder / "token_sharing" / "model.safetensors"
    policy.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"token_sharing must hold the weights of a model"):
        upload_folder(sharing_folder, endpoint=hub.endpoint)
    policy.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"lacks token_sharing/model\.safetensors"):
        upload_folder(sharing_folder, endpoint=hub.endpoint)
    policy.unlink()
    (tmp_path / "elsewhere.safetensors").rename(policy)
    (sharing_folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks preprocessor_config\.json"):
        upload_folder(sharing_folder, endpoint=hub.endpoint)
    (sharing_folder / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(ValueError, match=r"preprocessor_config\.json in .* cannot be read"):
        upload_folder(sharing_folder, endpoint=hub.endpoint)
    BeitImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(sharing_folder)
    with pytest.raises(ValueError, match=r"must normalize as token_sharing/options\.json says, .*0\.5.* got .*0\.1"):
        upload_folder(sharing_folder, endpoint=hub.endpoint)
    (sharing_folder / "token_sharing" / "modeling_cts_policy.py").write_text(f"# {TOKEN}")
    BeitImageProcessor().save_pretrained(sharing_folder)
    with pytest.raises(ValueError, match=r"modeling_cts_policy\.py must hold no token of the Hub"):
        upload_folder(sharing_folder, endpoint=hub.endpoint)
    assert hub.requests == []


NAMES = [
    "me/street",
    'x", trust_remote_code=True); import os; print("',
    "```\n\n# Title\n<script>alert(1)</script>",
    "a\n---\nlicense: mit\n---\n",
    "back\\slash \\\" and 'quotes'",
    "[link](https://example.com) ![x](y) | *b* _i_ ~~s~~ $m$ `c` & &lt; #",
    "caf\u00e9 \U0001f600 \u2028 \x85 \x00",
    b"not \xff UTF-8".decode("utf-8", "surrogateescape"),
    "   ",
    "1. item",
]


@cache
def once(build):
    return build()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("build", [tiny_model, tiny_policy, sharing_model])
def test_names_stay_in_their_place_in_the_card(tmp_path, build, name):
    model = once(build)
    text = model_card(model, {name: 0.5}, title=name, name=name)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    plain = model_card(model, {"m": 0.5}, title="t", name="n")
    assert len(text.splitlines()) == len(plain.splitlines())
    assert ModelCard(text).data.to_dict() == ModelCard(plain).data.to_dict()

    code, plain_code = ("".join(re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)) for card in (text, plain))
    nodes, plain_nodes = (list(ast.walk(ast.parse(each))) for each in (code, plain_code))
    assert [type(node) for node in nodes] == [type(node) for node in plain_nodes]
    literals, plain_literals = (
        [node.value for node in each if isinstance(node, ast.Constant)] for each in (nodes, plain_nodes)
    )
    assert literals == [name if value == "n" else value for value in plain_literals]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("street-2.1_tiny (mine)", "street-2.1_tiny (mine)"),
        ("__init__ of a__b", r"\_\_init\_\_ of a\_\_b"),
        ("a\nb  c\t\x00d", "a b c d"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("`c` | *b* _i_ ~s~ $m$", r"\`c\` \| \*b\* \_i\_ \~s\~ \$m\$"),
        ("![x](y) #", r"!\[x\](y) \#"),
        ("back\\slash\\", r"back\\slash\\"),
    ],
)
def test_texts_are_shown_as_they_are(text, shown):
    card = model_card(tiny_policy(), {text: 0.5}, title=text, name="n")
    assert f"\n# {shown}\n" in card
    assert f"\n| {shown} | 0.5000 |\n" in card


@pytest.mark.parametrize("repo_id", ["me/my street", "a/b/c", "", "x" * 97, 7])
def test_names_that_no_repository_can_have_are_refused_first(folder, repo_id):
    for call in (
        lambda: upload_folder(folder, repo_id, dry_run=True),
        lambda: publish(tiny_model(), CtsImageProcessor(), repo_id, dry_run=True),
    ):
        with pytest.raises(ValueError, match=r"`repo_id` must be 'owner/name' or 'name', .* another name"):
            call()


def test_a_folder_whose_name_no_repository_can_have_needs_another(folder):
    other = folder.rename(folder.with_name("my street"))
    with pytest.raises(ValueError, match=r"`repo_id` must be .*, got 'my street'"):
        upload_folder(other, dry_run=True)
    assert upload_folder(other, "me/street", dry_run=True).repo_id == "me/street"
