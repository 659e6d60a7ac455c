# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of a model with and without sharing, side by side."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..model.modeling_cts import CtsForSemanticSegmentation
from ..model.modeling_cts_outputs import per_level
from .end_to_end import EndToEnd
from .inputs import Batch, Model, policy_of, smooth_maps
from .timing import Stopwatch, marked_parts


KINDS = ("plain", "cts")
AROUND = ("preprocessing", "postprocessing")  # the parts of a run that are no parts of the forward


class Runner:
    """
    Runs a model on batches, with and without sharing, and keeps the time and the tokens of each run.

    Args:
        model: an own one, or one that [`apply_cts`] has changed.
        sharing: what calls with sharing are told, a budget or a threshold.
        draws_logits: whether smooth random logits take the place of a Segmenter's before they become label maps.
        end_to_end: how pictures become label maps, to measure that around each forward.
    """

    def __init__(
        self, model: Model, sharing: dict[str, Any], draws_logits: bool = False, end_to_end: EndToEnd | None = None
    ):
        self.model, self.draws_logits, self.end_to_end = model, draws_logits, end_to_end
        self.sharing = {"plain": {"token_reduction": 0.0}, "cts": sharing}
        self.is_own = isinstance(model, CtsForSemanticSegmentation)
        self.stopwatch = Stopwatch(model.device)
        self.times: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        self.num_tokens: dict[str, list[int]] = {kind: [] for kind in KINDS}
        self.num_shared: list[tuple[int, ...]] = []

    def marked_parts(self) -> AbstractContextManager[None]:
        """Within this context, the parts of a Segmenter's forward are timed, unless it is compiled."""
        return marked_parts(self.model, self.stopwatch) if self.is_own else nullcontext()

    def forward(self, forward: Callable[..., ModelOutput], kind: str, batch: Batch) -> ModelOutput:
        """One forward by `forward`, the model or what it was compiled to."""
        policy = policy_of(self.model)
        if kind == "cts" and policy is not None and "superpatch_scores" in batch.options:
            policy(batch.pixel_values)  # for its time, as drawn scores take the place of its own
        return forward(pixel_values=batch.pixel_values, **batch.options, **self.sharing[kind])

    def run(
        self, forward: Callable[..., ModelOutput], kind: str, batch: Batch
    ) -> tuple[dict[str, float], ModelOutput]:
        """Milliseconds of each part of the way that is measured, and the outputs of the forward."""
        self.stopwatch.start()
        features: dict[str, Any] = {}
        if self.end_to_end is not None:
            features = self.end_to_end.preprocess(batch)
            batch = batch._replace(pixel_values=features["pixel_values"])
            self.stopwatch.mark("preprocessing")
        outputs = self.forward(forward, kind, batch)
        self.stopwatch.mark("unsharing" if self.is_own else "forward")
        if self.end_to_end is not None:
            self.replace_logits(outputs, batch)
            self.stopwatch.mark("not counted")
            self.end_to_end.postprocess(outputs, features)
            self.stopwatch.mark("postprocessing")
        parts = self.stopwatch.parts()
        parts.pop("not counted", None)
        return parts, outputs

    def replace_logits(self, outputs: ModelOutput, batch: Batch) -> None:
        """
        Puts smooth random logits in the place of a Segmenter's if that was asked for, the same for both kinds and in
        the same layout in memory: those of random weights are like no trained model's, and how long a label map takes
        depends on them.
        """
        if self.draws_logits:
            generator = torch.Generator().manual_seed(batch.index)
            outputs.logits.copy_(smooth_maps(tuple(outputs.logits.shape), generator))

    def run_pairs(self, forward: Callable[..., ModelOutput], batches: Iterator[Batch], rounds: int) -> None:
        """Runs both kinds on so many batches, by turns first, and keeps their times and tokens."""
        for index, batch in enumerate(islice(batches, rounds)):
            for kind in KINDS if index % 2 == 0 else KINDS[::-1]:
                times, outputs = self.run(forward, kind, batch)
                self.times[kind].append(times)
                self.num_tokens[kind] += outputs.num_tokens.tolist()
                if kind == "cts":
                    self.num_shared += _count_shared(outputs.shared_superpatches)


def _count_shared(shared_superpatches: Tensor | tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    """Superpatches of each level that share a token, image by image."""
    return list(zip(*(of_level.sum(dim=(1, 2)).tolist() for of_level in per_level(shared_superpatches)), strict=True))


__all__ = ["AROUND", "KINDS", "Runner"]
