# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Segmenter and SETR of PyTorch's own layers whose weights have the names, shapes and epsilons of mmsegmentation's."""

import torch
from torch import nn


class Wrapped(nn.Module):
    """A module that another one holds under a name."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Layer(nn.Module):
    def __init__(self, width, num_heads, eps):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = Wrapped(attn=nn.MultiheadAttention(width, num_heads, batch_first=True))
        hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        self.ffn = Wrapped(layers=nn.Sequential(hidden, nn.Linear(4 * width, width)))

    def forward(self, tokens):
        normalized = self.ln1(tokens)
        tokens = tokens + self.attn.attn(normalized, normalized, normalized, need_weights=False)[0]
        return tokens + self.ffn.layers(self.ln2(tokens))


class Backbone(nn.Module):
    def __init__(self, image_size, patch_size, width, depth, num_heads, out_indices=None):
        super().__init__()
        self.out_indices = out_indices
        self.patch_embed = Wrapped(projection=nn.Conv2d(3, width, patch_size, patch_size))
        self.cls_token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 1 + (image_size // patch_size) ** 2, width))
        self.layers = nn.ModuleList(Layer(width, num_heads, 1e-6) for _ in range(depth))
        self.ln1 = nn.LayerNorm(width, eps=1e-6) if out_indices is None else None

    def forward(self, images):
        patches = self.patch_embed.projection(images)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], dim=1) + self.pos_embed
        outputs = []
        for layer in self.layers:
            tokens = layer(tokens)
            outputs.append(tokens)
        if self.ln1 is not None:
            return to_map(self.ln1(tokens), patches.shape[2:])
        return [to_map(outputs[index], patches.shape[2:]) for index in self.out_indices]


def to_map(tokens, size):
    return tokens[:, 1:].transpose(1, 2).unflatten(2, size)


def normalize_map(norm, features):
    return norm(features.movedim(1, -1)).movedim(-1, 1)


def conv_module(in_channels, out_channels, side):
    conv = nn.Conv2d(in_channels, out_channels, side, padding=side // 2, bias=False)
    module = Wrapped(conv=conv, bn=nn.BatchNorm2d(out_channels))
    module.forward = lambda features: module.bn(module.conv(features)).relu()
    return module


class UpHead(nn.Module):
    def __init__(self, width, channels, num_classes, num_convs, up_scale, side):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        widths = [width] + num_convs * [channels]
        upsample = nn.Upsample(scale_factor=up_scale, mode="bilinear", align_corners=False)
        self.up_convs = nn.ModuleList(
            nn.Sequential(conv_module(widths[index], channels, side), upsample) for index in range(num_convs)
        )
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features):
        features = normalize_map(self.norm, features)
        for up_conv in self.up_convs:
            features = up_conv(features)
        return self.conv_seg(features)


class Neck(nn.Module):
    def __init__(self, width, channels, num_levels):
        super().__init__()
        self.norm = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(num_levels))
        self.mla = Wrapped(
            channel_proj=nn.ModuleList(conv_module(width, channels, 1) for _ in range(num_levels)),
            feat_extract=nn.ModuleList(conv_module(channels, channels, 3) for _ in range(num_levels)),
        )

    def forward(self, inputs):
        normalized = [normalize_map(norm, features) for norm, features in zip(self.norm, inputs, strict=True)]
        projected = [conv(features) for conv, features in zip(self.mla.channel_proj, normalized, strict=True)]
        projected.reverse()
        summed = [sum(projected[: index + 1]) for index in range(len(projected))]
        return [conv(features) for conv, features in zip(self.mla.feat_extract, summed, strict=True)]


class AggregationHead(nn.Module):
    def __init__(self, channels, num_classes, num_levels):
        super().__init__()
        half = channels // 2
        upsample = nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False)
        self.up_convs = nn.ModuleList(
            nn.Sequential(conv_module(channels, half, 3), conv_module(half, half, 3), upsample)
            for _ in range(num_levels)
        )
        self.conv_seg = nn.Conv2d(num_levels * half, num_classes, 1)

    def forward(self, features):
        each = [up_conv(level) for up_conv, level in zip(self.up_convs, features, strict=True)]
        return self.conv_seg(torch.cat(each, dim=1))


class MaskHead(nn.Module):
    def __init__(self, width, num_classes, depth):
        super().__init__()
        self.conv_seg = nn.Conv2d(width, num_classes, 1)  # there, and not used
        self.layers = nn.ModuleList(Layer(width, 1, 1e-5) for _ in range(depth))
        self.dec_proj = nn.Linear(width, width)
        self.cls_emb = nn.Parameter(torch.randn(1, num_classes, width))
        self.patch_proj, self.classes_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.decoder_norm, self.mask_norm = nn.LayerNorm(width), nn.LayerNorm(num_classes)

    def forward(self, features):
        tokens = self.dec_proj(features.flatten(2).transpose(1, 2))
        num_tokens = tokens.shape[1]
        tokens = torch.cat([tokens, self.cls_emb.expand(len(tokens), -1, -1)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.decoder_norm(tokens)
        patches = nn.functional.normalize(self.patch_proj(tokens[:, :num_tokens]), dim=-1)
        classes = nn.functional.normalize(self.classes_proj(tokens[:, num_tokens:]), dim=-1)
        masks = self.mask_norm(patches @ classes.mT)
        return masks.transpose(1, 2).unflatten(2, features.shape[2:])


class LinearHead(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.conv_seg = nn.Conv2d(width, num_classes, 1)

    def forward(self, features):
        return self.conv_seg(features)


def build_segmenter(decoder="mask", image_size=64, patch_size=16, width=32, num_heads=2, num_classes=5):
    """In evaluation mode: `(batch_size, 3, image_size, image_size)` to logits of each patch."""
    torch.manual_seed(0)
    backbone = Backbone(image_size, patch_size, width, 2, num_heads)
    head = MaskHead(width, num_classes, 2) if decoder == "mask" else LinearHead(width, num_classes)
    model = Wrapped(backbone=backbone, decode_head=head).eval()
    for name, parameter in model.named_parameters():
        if "ln" in name or "norm" in name:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
    return model


def build_setr(decoder, image_size=64, patch_size=16, width=32, num_heads=2, num_classes=5, channels=8):
    """In evaluation mode; `logits_of_setr` runs it and its auxiliary heads."""
    torch.manual_seed(0)
    indices = (1, 3, 5, 7) if decoder == "mla" else (3, 4, 6, 7)
    parts = {"backbone": Backbone(image_size, patch_size, width, 8, num_heads, indices)}
    if decoder == "mla":
        parts["neck"] = Neck(width, channels, 4)
        parts["decode_head"] = AggregationHead(channels, num_classes, 4)
        auxiliary = [LinearHead(channels, num_classes) for _ in range(4)]
    else:
        num_convs, up_scale, side = {"naive": (1, 4, 1), "pup": (4, 2, 3)}[decoder]
        parts["decode_head"] = UpHead(width, channels, num_classes, num_convs, up_scale, side)
        auxiliary = [UpHead(width, channels, num_classes, 1, 4, side) for _ in range(3)]
    model = Wrapped(**parts, auxiliary_head=nn.ModuleList(auxiliary)).eval()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if any(part in name for part in ("ln", "norm", ".bn")) and value.is_floating_point():
            is_scale = name.endswith(("weight", "running_var"))
            value.data.normal_(mean=1.0 if is_scale else 0.0, std=0.1)
    return model


# Our names in the decoder of SETR-MLA to the ones here.
AGGREGATION_NAMES = (
    (r"^layernorms\.", "neck.norm."),
    (r"^projections\.", "neck.mla.channel_proj."),
    (r"^aggregations\.", "neck.mla.feat_extract."),
    (r"^layers\.", "decode_head.up_convs."),
    (r"^classifier\.", "decode_head.conv_seg."),
    (r"^auxiliary_heads\.(\d+)\.", r"auxiliary_head.\1.conv_seg."),
    (r"\.batch_norm\.", ".bn."),
)


def logits_of_setr(model, images):
    """Logits of the head, and of each auxiliary head."""
    features = model.backbone(images)
    if hasattr(model, "neck"):
        features = model.neck(features)
        logits = model.decode_head(features)
    else:
        logits = model.decode_head(features[-1])
    auxiliary = features if hasattr(model, "neck") else features[:-1]
    return logits, [head(each) for head, each in zip(model.auxiliary_head, auxiliary, strict=True)]
