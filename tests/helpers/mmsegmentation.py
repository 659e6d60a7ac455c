# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A Segmenter of PyTorch's own layers whose weights have the names, shapes and epsilons of mmsegmentation's."""

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
    def __init__(self, image_size, patch_size, width, depth, num_heads):
        super().__init__()
        self.patch_embed = Wrapped(projection=nn.Conv2d(3, width, patch_size, patch_size))
        self.cls_token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 1 + (image_size // patch_size) ** 2, width))
        self.layers = nn.ModuleList(Layer(width, num_heads, 1e-6) for _ in range(depth))
        self.ln1 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        patches = self.patch_embed.projection(images)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], dim=1) + self.pos_embed
        for layer in self.layers:
            tokens = layer(tokens)
        return self.ln1(tokens)[:, 1:].transpose(1, 2).unflatten(2, patches.shape[2:])


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
