import re

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from cts_hf import CtsImageProcessor
from cts_hf.onnx_export import OnnxSegmenter

from ..models import tiny_model
from .scripts import run_main


@pytest.mark.slow
def test_export_and_use(monkeypatch, capsys, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs `pip install onnx onnxscript onnxruntime`")
    pytest.importorskip("onnxruntime")
    model, target = tiny_model(), tmp_path / "exported"
    model.save_pretrained(tmp_path / "model")
    CtsImageProcessor(do_resize=False).save_pretrained(tmp_path / "model")
    options = {"image_size": [48, 80], "token_reduction": 0.4, "benchmark": True, "rounds": 2}
    run_main(monkeypatch, "export_onnx.py", model=tmp_path / "model", output_dir=target, **options)

    lines = capsys.readouterr().out.splitlines()
    difference = re.search(
        r"logits differ by (\S+) at most, 100.00% of the superpatches share alike", "\n".join(lines)
    )
    assert float(difference[1]) < 1e-4
    assert [line.split("  ")[1] for line in lines[-4:]] == [
        "PyTorch, no sharing",
        "PyTorch",
        "ONNX Runtime, no sharing",
        "ONNX Runtime",
    ]
    names = {path.name for path in target.iterdir()}
    assert {"model.onnx", "config.json", "preprocessor_config.json"} <= names
    assert AutoConfig.from_pretrained(target).token_reduction == 0.4

    image = Image.new("RGB", (123, 77), "teal")
    processor = AutoImageProcessor.from_pretrained(target)
    inputs = processor(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 48, 80)
    outputs = OnnxSegmenter(target / "model.onnx")(**inputs)
    with torch.no_grad():
        expected = model(**inputs, token_reduction=0.4)
    segmentations = [
        processor.post_process_semantic_segmentation(each, [(77, 123)])[0] for each in (outputs, expected)
    ]
    assert segmentations[0].shape == (77, 123)
    assert (segmentations[0] == segmentations[1]).float().mean() > 0.99


def test_the_model_itself_is_not_overwritten(monkeypatch, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit, match="is the folder of the model"):
        run_main(monkeypatch, "export_onnx.py", model=tmp_path, output_dir=f"{tmp_path}/.")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
