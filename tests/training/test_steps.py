# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from cts_hf.data import StreamingSamples, TrainingSamples
from cts_hf.training import OptimizationArguments, TrainingSteps


def rows(num_rows):
    for index in range(num_rows):
        picture = Image.fromarray(np.full((2, 2), index, np.uint8))
        yield {"image": picture, "label": picture, "name": str(index)}


def transform(image, label, rng):
    """Samples of the id of their image and of what their generator draws."""
    return {"pixel_values": torch.tensor(rng.random()), "labels": torch.tensor(np.array(label), dtype=torch.int64)}


def training_steps(num_rows=11, process=0, num_processes=1, streamed=False, **options):
    dataset = Dataset.from_list(list(rows(num_rows)))
    accelerator = SimpleNamespace(process_index=process, num_processes=num_processes, device=torch.device("cpu"))
    args = OptimizationArguments(**{"batch_size": 4, "max_steps": 5, **options})
    if streamed:
        samples = StreamingSamples(dataset.to_iterable_dataset(), transform)
    else:
        samples = TrainingSamples(dataset, transform)
    return TrainingSteps(samples, args, accelerator)


def take(steps, num_steps, epoch=0, first_step=0):
    """The first steps: epoch, step, and [(image, drawn number)] of each micro-batch."""
    taken = []
    for (epoch_, step, batches), _ in zip(steps.iterate(epoch, first_step), range(num_steps), strict=False):
        micro_batches = [
            list(zip(batch["labels"][:, 0, 0].tolist(), batch["pixel_values"].tolist(), strict=True))
            for batch in batches
        ]
        taken.append((epoch_, step, micro_batches))
    return taken


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("num_processes", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_a_step_has_the_same_samples_however_it_is_split(streamed, num_processes, accumulation):
    expected = take(training_steps(streamed=streamed), 5)
    shares = [
        take(training_steps(11, p, num_processes, streamed, gradient_accumulation_steps=accumulation), 5)
        for p in range(num_processes)
    ]
    for step, (epoch, index, (batch,)) in enumerate(expected):
        parts = [share[step] for share in shares]
        assert {part[:2] for part in parts} == {(epoch, index)}
        assert all(len(part[2]) == accumulation for part in parts)
        assert sorted(sample for part in parts for micro in part[2] for sample in micro) == sorted(batch)


@pytest.mark.parametrize("streamed", [False, True])
def test_any_step_can_be_the_first(streamed):
    expected = take(training_steps(streamed=streamed), 6)
    for first in range(5):
        epoch, step, _ = expected[first]
        assert take(training_steps(streamed=streamed), 6 - first, epoch, step) == expected[first:]


def test_epochs_differ_and_use_each_image_once():
    taken = take(training_steps(8), 4)
    epochs = [[image for *_, (batch,) in taken[start : start + 2] for image, _ in batch] for start in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(8))
    assert epochs[0] != epochs[1]
    assert taken[0] != take(training_steps(8, seed=1), 1)[0]


def test_the_order_does_not_touch_global_random_numbers():
    state = torch.get_rng_state()
    take(training_steps(), 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_number_of_steps():
    assert training_steps(11, max_steps=0, num_epochs=3).total == 6
    assert training_steps(11, max_steps=0, num_epochs=0.1).total == 1
    assert training_steps(11, max_steps=7).total == 7


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match=r"`batch_size` must be a multiple of 3 processes x 1.*, got 4"):
        training_steps(num_processes=3)
    with pytest.raises(ValueError, match="There are 3 training images, fewer than batch_size=4"):
        training_steps(3)
    with pytest.raises(ValueError, match="fewer images than batch_size"):
        take(training_steps(3, streamed=True), 1)
    with pytest.raises(ValueError, match="The length of a stream is not known: pass max_steps"):
        training_steps(streamed=True, max_steps=0)
