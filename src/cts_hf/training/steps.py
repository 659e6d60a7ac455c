# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The order of training samples: a function of seed and step only, so that a run can be resumed at any step."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset, Sampler

from ..data import StreamingSamples, TrainingSamples, collate
from .arguments import OptimizationArguments


Batch = dict[str, torch.Tensor]


def micro_batch_size(args: OptimizationArguments, num_processes: int) -> int:
    """Images that go through the model at once: `batch_size` split over processes and accumulation steps."""
    parts = num_processes * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise ValueError(
            f"`batch_size` must be a multiple of {num_processes} processes x {args.gradient_accumulation_steps} "
            f"gradient_accumulation_steps, got {args.batch_size}: each part gets as many images."
        )
    return args.batch_size // parts


class MicroBatchSampler(Sampler[list[int]]):
    """
    Indices of the micro-batches of one process, for the rest of one epoch.

    Each optimizer step takes the next `batch_size` indices of the epoch's order, which are dealt to accumulation steps
    and processes in turn: every number of them makes the same steps. What is left at the end of an epoch is not used.

    Args:
        num_samples: size of the data set.
        args: batch_size, gradient_accumulation_steps and seed.
        process_index, num_processes: which part this process takes.
    """

    def __init__(self, num_samples: int, args: OptimizationArguments, process_index: int = 0, num_processes: int = 1):
        if num_samples < args.batch_size:
            raise ValueError(
                f"There are {num_samples} training images, fewer than batch_size={args.batch_size}: choose a smaller "
                "batch_size."
            )
        self.num_samples = num_samples
        self.args = args
        self.process_index = process_index
        self.num_processes = num_processes
        self.size = micro_batch_size(args, num_processes)
        self.steps_per_epoch = num_samples // args.batch_size
        self.epoch, self.first_step = 0, 0

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        stride = self.size * self.num_processes
        first = self.first_step * self.args.batch_size + self.process_index * self.size
        for start in range(first, self.steps_per_epoch * self.args.batch_size, stride):
            yield order[start : start + self.size]


class ShardedStream(IterableDataset):
    """The samples of a stream that belong to one process, in whole steps. Every process reads the whole stream."""

    def __init__(self, samples: StreamingSamples, args: OptimizationArguments, process_index: int, num_processes: int):
        self.samples = samples
        self.batch_size = args.batch_size
        self.size = micro_batch_size(args, num_processes)
        self.process_index = process_index
        self.num_processes = num_processes
        self.first_step = 0

    def __iter__(self) -> Iterator[Batch]:
        step: list[Batch] = []
        for index, sample in enumerate(self.samples):
            if index < self.first_step * self.batch_size:
                continue
            step.append(sample)
            if len(step) == self.batch_size:
                mine = range(self.batch_size)
                yield from (step[i] for i in mine if i // self.size % self.num_processes == self.process_index)
                step = []


class TrainingSteps:
    """
    The micro-batches of each optimizer step of one process, from any step on.

    Args:
        samples: training samples.
        args: batch_size, gradient_accumulation_steps, num_epochs, max_steps and seed.
        accelerator: has the number of this process, which decides its part of each batch.
        num_workers: processes that make samples.
    """

    def __init__(
        self,
        samples: TrainingSamples | StreamingSamples,
        args: OptimizationArguments,
        accelerator: Accelerator,
        num_workers: int = 0,
    ):
        self.samples = samples
        self.accumulation_steps = args.gradient_accumulation_steps
        share = (args, accelerator.process_index, accelerator.num_processes)
        # A generator of its own: a loader otherwise draws from the global one, and resuming would change the rest.
        options = {
            "collate_fn": collate,
            "generator": torch.Generator(),
            "pin_memory": accelerator.device.type == "cuda",
        }
        if isinstance(samples, StreamingSamples):
            if args.max_steps <= 0:
                raise ValueError("The length of a stream is not known: pass max_steps with streaming.")
            self.order = ShardedStream(samples, *share)
            self.loader = DataLoader(self.order, batch_size=self.order.size, **options)
            self.total = args.max_steps
            return
        self.order = MicroBatchSampler(len(samples), *share)
        self.loader = DataLoader(
            samples,
            batch_sampler=self.order,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            **options,
        )
        self.total = args.max_steps or max(1, round(args.num_epochs * self.order.steps_per_epoch))

    def iterate(self, epoch: int = 0, first_step: int = 0) -> Iterator[tuple[int, int, list[Batch]]]:
        """
        Endlessly gives (epoch, step in the epoch, micro-batches of the step).

        Args:
            epoch, first_step: where to start.
        """
        while True:
            self.samples.set_epoch(epoch)
            self.order.epoch, self.order.first_step = epoch, first_step
            step, batches = first_step, []
            for batch in self.loader:
                batches.append(batch)
                if len(batches) == self.accumulation_steps:
                    yield epoch, step, batches
                    step, batches = step + 1, []
            if step == 0:
                raise ValueError("The training data has fewer images than batch_size: choose a smaller batch_size.")
            epoch, first_step = epoch + 1, 0
