# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Label maps: to the last pixel those of interpolation and argmax, however few classes are looked at."""

import pytest
import torch
import torch.nn.functional as F

from cts_hf.model import image_processing_label_maps_cts as label_maps
from cts_hf.model.image_processing_label_maps_cts import upsampled_argmax

from ..helpers.slow import slow_but


KINDS = ["normal", "smooth", "quantised", "bfloat16", "pairs", "constant", "near_ties", "large", "tiny", "mixed"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Height and width of logits, and of maps that are large enough for pruning.
SIZES = [
    ((8, 11), (120, 163)),
    ((12, 24), (200, 311)),
    ((16, 16), (256, 256)),
    ((7, 5), (129, 1)),
    ((9, 4), (2, 300)),
    ((1, 6), (40, 200)),
    ((5, 1), (100, 101)),
    ((30, 9), (13, 311)),
]
OTHER_SIZES = [((1, 1), (17, 5)), ((1, 1), (90, 80)), ((30, 40), (13, 9)), ((16, 16), (16, 16)), ((7, 6), (1, 1))]


def naive_argmax(logits, size):
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)


def make_logits(kind, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator)
    smooth = F.avg_pool2d(logits, 5, stride=1, padding=2)
    if kind == "normal":
        return logits
    if kind == "smooth":
        return smooth
    if kind == "quantised":
        return (4 * smooth).round()
    if kind == "bfloat16":
        return smooth.bfloat16().float()
    if kind == "pairs":  # each class is equal to another one, or next to it
        return smooth[torch.arange(shape[0]) // 2].nextafter(logits.round())
    if kind == "constant":
        return torch.ones(shape)
    if kind == "near_ties":
        return 1 + 1e-7 * smooth
    if kind == "large":
        return 1e37 * smooth
    if kind == "tiny":
        return 1e-44 * logits.round()
    return smooth * 10 ** torch.randint(-3, 4, (shape[0], 1, 1), generator=generator)


@pytest.fixture
def always_prune(monkeypatch):
    """Prunes whatever the size of the map and the number of candidates, and fails where all classes are compared."""
    monkeypatch.setattr(label_maps, "_MIN_PIXELS_PER_CELL", 0)
    monkeypatch.setattr(label_maps, "_MIN_SCORES", 0)
    monkeypatch.setattr(label_maps, "_MAX_SHARE_COMPARED", float("inf"))
    argmax_of_all = label_maps._argmax_of_all

    def argmax_of_ties(logits, size, pixels):
        return argmax_of_all(logits, size, pixels)

    monkeypatch.setattr(label_maps, "_argmax_of_all", argmax_of_ties)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_labels", [4, 35])
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_pruned_maps_are_exact(always_prune, kind, num_labels, shape, size):
    for dtype in DTYPES[:1] if kind == "large" else DTYPES:
        logits = make_logits(kind, num_labels, *shape).to(dtype)
        segmentation = upsampled_argmax(logits, size)
        assert segmentation.dtype == torch.int64
        assert torch.equal(segmentation, naive_argmax(logits, size)), dtype


@pytest.mark.parametrize("seed", range(40))
def test_pruned_maps_of_any_size_are_exact(always_prune, seed):
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(1, 20, (2,), generator=generator).tolist()
    rows = int(torch.randint(1, 150, (), generator=generator))
    columns = max(int(torch.randint(1, 150, (), generator=generator)), 129 - rows)
    num_labels = int(torch.randint(4, 60, (), generator=generator))
    kind = KINDS[seed % len(KINDS)]
    if height * width == 1:
        height = 2
    logits = make_logits(kind, num_labels, height, width, seed=seed)
    assert torch.equal(upsampled_argmax(logits, (rows, columns)), naive_argmax(logits, (rows, columns)))


@pytest.mark.parametrize("kind", ["normal", "smooth", "quantised", "constant", "nan", "infinite"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_labels", slow_but([1, 3, 300], [1, 2, 3, 33, 300]))
@pytest.mark.parametrize(("shape", "size"), [*OTHER_SIZES, SIZES[0], ((4, 4), (128, 128))])
def test_maps_are_exact(kind, dtype, num_labels, shape, size):
    """By whichever way is the fastest."""
    logits = make_logits("smooth" if kind in ("nan", "infinite") else kind, num_labels, *shape)
    if kind == "nan":
        logits[0, 0, 0], logits[-1, -1, -1], logits[-1, 0] = float("nan"), float("inf"), float("-inf")
    elif kind == "infinite":
        logits[0] = float("-inf")
    logits = logits.to(dtype)
    assert torch.equal(upsampled_argmax(logits, size), naive_argmax(logits, size))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "3e38"])
def test_pruned_maps_of_numbers_only(value):
    """What pruning would not survive is left to interpolation."""
    logits = make_logits("smooth", 300, 4, 4)
    assert label_maps._Cells.of(logits, (128, 128)) is not None
    logits[200, 3, 1] = float(value)
    assert label_maps._Cells.of(logits, (128, 128)) is None
    assert torch.equal(upsampled_argmax(logits, (128, 128)), naive_argmax(logits, (128, 128)))


@pytest.fixture
def set_num_threads():
    num_threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("kind", ["near_ties", "pairs"])
@pytest.mark.parametrize("num_labels", [3, 4, 17, 19, 35, 150])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_maps_are_exact_on_any_number_of_threads(set_num_threads, num_threads, kind, num_labels):
    """PyTorch chooses another interpolation on one."""
    set_num_threads(num_threads)
    logits = make_logits(kind, num_labels, 12, 24)
    assert torch.equal(upsampled_argmax(logits, (200, 311)), naive_argmax(logits, (200, 311)))


def test_maps_do_not_depend_on_strides():
    logits = make_logits("smooth", 20, 8, 11).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as token decoders give
    for size in ((90, 100), (500, 600)):
        assert torch.equal(upsampled_argmax(logits, size), naive_argmax(logits.contiguous(), size))


def test_maps_of_logits_with_a_gradient_beside_another_default_device():
    logits = make_logits("smooth", 150, 16, 16)
    with torch.device("meta"):
        segmentation = upsampled_argmax(logits.requires_grad_(), (256, 256))
    assert torch.equal(segmentation, naive_argmax(logits, (256, 256)))


def test_few_classes_are_interpolated(monkeypatch, set_num_threads):
    """Of smooth logits only those that are tied somewhere, of noise all of them if there are threads to do it."""
    set_num_threads(2)
    interpolated = []

    def upsample(logits, size):
        interpolated.append(len(logits))
        return F.interpolate(logits[None].contiguous(), size=size, mode="bilinear", align_corners=False)[0]

    monkeypatch.setattr(label_maps, "upsample", upsample)
    upsampled_argmax(make_logits("smooth", 150, 16, 16), (256, 256))
    assert sum(interpolated) < 15
    interpolated.clear()
    upsampled_argmax(make_logits("normal", 150, 16, 16), (256, 256))
    assert sum(interpolated) == 150
