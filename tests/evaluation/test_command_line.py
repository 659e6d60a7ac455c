# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
import io
import sys

import pytest
import torch

from cts_hf.evaluation.command_line import new_accelerator, print_text


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", rb"Stra\xdfe \u8def \udcff"), ("utf-8", "Straße 路 \\udcff".encode())]
)
def test_what_the_output_cannot_encode_is_escaped(monkeypatch, encoding, printed):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding, newline="\n", write_through=True))
    print_text("Straße 路 \udcff")
    assert output.getvalue() == printed + b"\n"


def test_a_stream_in_the_place_of_the_output_gets_everything(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_text("Straße")
    assert sys.stdout.getvalue() == "Straße\n"


@pytest.mark.parametrize("has_devices", [False, True])
def test_processes_meet_on_the_cpu_where_there_are_no_devices(monkeypatch, has_devices):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_devices)
    monkeypatch.setattr("cts_hf.evaluation.command_line.Accelerator", lambda **options: options)
    assert new_accelerator(step_scheduler_with_optimizer=False) == {
        "cpu": not has_devices,
        "step_scheduler_with_optimizer": False,
    }
