# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Hashes of what the package computes: a change that only moves or renames code must not change one of them.

    python -m tests.hash_outputs > before.txt     # from the root of the repository
    python -m tests.hash_outputs | diff before.txt -

prints a line for each model, image processor and training. The hashes are those of one machine with one thread and one
version of PyTorch; they are compared, not kept. `CTS_GOLDEN_DIR` adds the large numeric references.
"""

import hashlib
import tempfile
from collections.abc import Iterable
from itertools import product

import numpy as np
import pytest
import torch

from cts_hf import CtsImageProcessor, CtsImageProcessorPil

from .helpers.golden import LARGE, TINY, build_golden_model, load_golden
from .helpers.models import random_images, tiny_model, tiny_policy
from .helpers.training_runs import train, write_scenes


MODELS = [
    {"decoder_type": decoder, "use_distillation_token": distilled, "policy_config": {"output_stride": stride, **size}}
    for decoder, distilled, stride in product(("mask_transformer", "linear"), (False, True), (8, 32))
    for size in [{"width_coefficient": 0.1, "depth_coefficient": 0.3}]
]
SIZES = [(64, 64), (33, 129)]


def digest(tensors: Iterable[torch.Tensor | np.ndarray | None]) -> str:
    """One hash of tensors, their shapes and their dtypes."""
    whole = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            whole.update(b"none")
            continue
        tensor = torch.as_tensor(tensor).detach().contiguous()
        whole.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def hash_models() -> None:
    for options, (height, width), dtype in product(MODELS, SIZES, (torch.float32, torch.bfloat16)):
        model = tiny_model(**options).to(dtype)
        images = random_images(2, height, width)
        mask = torch.ones(2, height, width, dtype=torch.int64)
        mask[1, height - 16 :] = 0
        outputs = []
        for reduction, pixel_mask in product((0.0, 0.3, 0.75), (None, mask)):
            with torch.no_grad():
                given = model(images, token_reduction=reduction, pixel_mask=pixel_mask, output_hidden_states=True)
            outputs += [given.logits, given.policy_logits, given.shared_superpatches, *given.hidden_states]
        name = " ".join(f"{key}={value}" for key, value in options.items() if key != "policy_config")
        stride = options["policy_config"]["output_stride"]
        print(f"model {name} stride={stride} {height}x{width} {dtype}: {digest(outputs)}")


def hash_gradients() -> None:
    for options in MODELS:
        model = tiny_model(policy_loss_weight=0.5, **options).train()
        labels = torch.randint(5, (2, 64, 64), generator=torch.Generator().manual_seed(1))
        outputs = model(random_images(), labels=labels, token_reduction=0.3)
        outputs.loss.backward()
        gradients = [parameter.grad for _, parameter in sorted(model.named_parameters())]
        print(f"gradients {options['decoder_type']} {options['policy_config']}: {digest([outputs.loss, *gradients])}")


def hash_policies() -> None:
    for stride in (8, 16, 32):
        policy = tiny_policy(output_stride=stride)
        with torch.no_grad():
            logits = [
                policy.unfuse_batch_norm()(random_images()).logits,
                policy.fuse_batch_norm()(random_images()).logits,
            ]
        print(f"policy stride={stride}: {digest(logits)}")


def hash_processors() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((50, 70), (64, 64), (90, 31))]
    labels = [rng.integers(0, 5, image.shape[:2], dtype=np.uint8) for image in images]
    for kind in (CtsImageProcessor, CtsImageProcessorPil):
        prepared = kind(size={"shortest_edge": 48})(images, segmentation_maps=labels, return_tensors="pt")
        print(f"{kind.__name__}: {digest(prepared[name] for name in sorted(prepared))}")


def hash_references() -> None:
    for name in (*TINY, *LARGE):
        try:
            golden, meta = load_golden(name)
        except pytest.skip.Exception:
            print(f"{name}: absent")
            continue
        model, inputs = build_golden_model(golden, meta)
        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=True)
        print(f"{name}: {digest([outputs.logits, outputs.policy_logits, *outputs.hidden_states])}")


def hash_training() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scenes = write_scenes(f"{folder}/scenes")
        for options in ({}, {"optimizer": "sgd", "max_grad_norm": 0.5}):
            random = {"drop_path_rate": 0.3, "decoder_dropout_prob": 0.3}
            run = f"{folder}/{options.get('optimizer')}"
            model, *_ = train(scenes, run, model_options=random, policy_loss_weight=0.5, max_steps=1, **options)
            state = model.state_dict()
            print(f"training {options}: {digest(state[name] for name in sorted(state))}")


def main() -> None:
    torch.set_num_threads(1)
    hash_references()
    hash_models()
    hash_gradients()
    hash_policies()
    hash_processors()
    hash_training()


if __name__ == "__main__":
    main()
