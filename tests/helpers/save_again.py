# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Loads a folder as remote code, saves it again, and compares:

    python save_again.py FOLDER SECOND_FOLDER HIDDEN_PACKAGE ...
"""

import json
import sys

import numpy as np
import torch
from loading_cells import hide
from PIL import Image


def main(folder, second):
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

    trusted = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trusted)
    base = AutoModel.from_pretrained(folder, **trusted)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, **trusted)
    processor = AutoImageProcessor.from_pretrained(folder, **trusted)
    image = Image.open(folder + "/image.png")
    segmenter = pipeline("image-segmentation", model=folder, **trusted)
    segments = segmenter(image)
    assert len(segmenter([image, folder + "/image.png"])) == 2

    model.save_pretrained(second)
    processor.save_pretrained(second)
    again = AutoModelForSemanticSegmentation.from_pretrained(second, **trusted)
    processor_again = AutoImageProcessor.from_pretrained(second, **trusted)
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs, outputs_again = model(**inputs), again(**processor_again(image, return_tensors="pt"))
        hidden = base(**inputs).last_hidden_state
    assert torch.equal(outputs.logits, outputs_again.logits)

    masks = np.zeros((image.height, image.width), dtype=int)
    for segment in segments:
        masks[np.array(segment["mask"]) > 0] = model.config.label2id[segment["label"]]
    np.save(second + "/masks.npy", masks)
    print(
        json.dumps(
            {
                "logits": outputs.logits.sum().item(),
                "hidden": hidden.abs().sum().item(),
                "classes": [type(each).__name__ for each in (config, base, model, processor)],
                "modules": [type(each).__module__ for each in (config, base, model, processor)],
            }
        )
    )


if __name__ == "__main__":
    # Before transformers is imported, which looks for what there is.
    hide(sys.argv[3:])
    main(*sys.argv[1:3])
