# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Loads a checkpoint in many ways, each in a process of its own, in an environment from which packages are hidden. Run as
a script with the folder of a job: job.json names the hidden packages and the cells, CELL.json is written for each.
"""

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path


class Hidden:
    """A finder of modules that does not find some packages."""

    def __init__(self, finder, names):
        self.finder = finder
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def hide(names):
    sys.meta_path = [Hidden(finder, set(names)) for finder in sys.meta_path]


def load(loader, source, options):
    """What `loader` gives, and a number or a dictionary that its weights, options and input decide."""
    import torch
    import transformers
    from PIL import Image

    image = Image.open(os.environ["CELL_IMAGE"])
    if loader == "pipeline":
        segmenter = transformers.pipeline("image-segmentation", model=source, **options)
        return segmenter.model, {
            segment["label"]: sum(value > 0 for value in segment["mask"].tobytes()) for segment in segmenter(image)
        }
    loaded = getattr(transformers, loader).from_pretrained(source, **options)
    if loader == "AutoConfig":
        return loaded, loaded.token_reduction
    if loader == "AutoImageProcessor":
        return loaded, loaded(image, return_tensors="pt")["pixel_values"].double().sum().item()
    with torch.no_grad():
        outputs = loaded(torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96))
    values = outputs.logits if loader == "AutoModelForSemanticSegmentation" else outputs.last_hidden_state
    return loaded, values.double().abs().sum().item()


def run_cell(folder, cell):
    from transformers import dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = str(folder / cell["name"] / "modules")  # nobody else's code
    options = {"trust_remote_code": True} if cell["trust_remote_code"] else {}
    try:
        loaded, value = load(cell["loader"], cell["source"], options)
        result = {"class": type(loaded).__name__, "module": type(loaded).__module__, "value": value}
    except Exception as error:
        result = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    (folder / f"{cell['name']}.json").write_text(json.dumps(result))


def main(folder):
    job = json.loads((folder / "job.json").read_text())
    hide(job["hidden"])
    # What takes long is imported once, for all cells: they are forked from this process.
    if job["import_package"]:
        import cts_hf  # noqa: F401
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline  # noqa: F401

    for cell in job["cells"]:
        process = multiprocessing.get_context("fork").Process(target=run_cell, args=(folder, cell))
        process.start()
        process.join()
        assert process.exitcode == 0, f"{cell} ended with {process.exitcode}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
