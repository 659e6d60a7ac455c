# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from transformers import Trainer, TrainingArguments

from cts_hf import CtsForSemanticSegmentation, superpatch_targets
from cts_hf.data import SquashTransform, TrainingSamples, collate, load_segmentation_data
from cts_hf.evaluation.metrics import MeanIoU, TrainerMeanIoU, preprocess_logits_for_metrics

from ..helpers.models import tiny_model
from ..helpers.training_runs import largest_difference, write_scenes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_segmentation_data(write_scenes(tmp_path_factory.mktemp("scenes"), num_train=8, ignored_rows=False))


def make_trainer(data, folder, **options):
    samples = {split: TrainingSamples(rows, SquashTransform(64)) for split, rows in data.splits.items()}
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=3,
        remove_unused_columns=False,  # else the collator would get no images and labels
        batch_eval_metrics=True,  # one batch of predictions in memory at a time
        **options,
    )
    return Trainer(
        tiny_model(num_labels=data.num_classes, id2label=data.id2label, label2id=data.label2id),
        arguments,
        train_dataset=samples["train"],
        eval_dataset=samples["val"],
        data_collator=collate,
        compute_metrics=TrainerMeanIoU(data.num_classes),
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )


def test_trainer_trains_evaluates_and_saves(data, tmp_path):
    trainer = make_trainer(data, tmp_path, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=3)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert largest_difference(start, trainer.model.state_dict()) > 0
    history = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    batch, metric = collate([trainer.eval_dataset[index] for index in range(3)]), MeanIoU(data.num_classes)
    with torch.no_grad():
        logits = trainer.model.eval()(batch["pixel_values"]).logits
    predictions = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear").argmax(1)
    metric.add_batch(predictions=predictions, references=batch["labels"])
    assert history["eval_mean_iou"] == metric.compute()["mean_iou"]
    trainer.save_model(str(tmp_path / "saved"))
    saved = CtsForSemanticSegmentation.from_pretrained(tmp_path / "saved")
    assert largest_difference(saved.state_dict(), trainer.model.state_dict()) == 0


def test_gradient_accumulation_makes_the_same_steps(data, tmp_path):
    # Every label counts here, so that the mean of the parts' means is the mean of the whole.
    states = []
    for parts in (1, 2):
        trainer = make_trainer(
            data,
            tmp_path / str(parts),
            per_device_train_batch_size=4 // parts,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=0,  # else a loss that is scaled wrongly makes the same step
        )
        trainer.model.config.token_reduction = 0.75  # rounding cannot exchange superpatches: all of them share
        start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        states.append(trainer.model.state_dict())
    # SGD goes as far as the gradients are large, and these differ by rounding, about a millionth.
    assert largest_difference(*states) < 1e-3 * largest_difference(start, states[0])


def test_trainer_trains_a_policy_jointly(data, tmp_path):
    trainer = make_trainer(data, tmp_path, per_device_train_batch_size=4, learning_rate=1e-3)
    trainer.model.config.policy_loss_weight = 1.0
    trainer.model.cts.policy.requires_grad_(True)
    head = trainer.model.cts.policy.head.weight.clone()
    trainer.train()
    assert not torch.equal(head, trainer.model.cts.policy.head.weight)
    batch = collate([trainer.train_dataset[0]])
    targets = superpatch_targets(batch["labels"], 2 * trainer.model.config.patch_size)
    assert trainer.model(batch["pixel_values"]).policy_logits.shape[-2:] == targets.shape[-2:]
