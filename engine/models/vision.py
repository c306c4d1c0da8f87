"""LLaVA 1.5's eyes: transformers' CLIP tower, then a two-layer projector into the decoder's space.

Pictures become pixel values elsewhere (the checkpoint's image processor); this file holds no pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import ACT2FN

from engine.models.spec import VisionSpec


class VisionTower(nn.Module):
    """pixel values -> hidden rows for the image tokens; the same selection as transformers' LLaVA."""

    def __init__(self, vision: VisionSpec, hidden_size: int) -> None:
        super().__init__()
        self.vision = vision
        config = CLIPVisionConfig(**vision.config)
        self.clip = CLIPVisionModel._from_config(config, attn_implementation="sdpa")
        self.clip.eval()
        layers = vision.feature_layer
        num_layers = 1 if isinstance(layers, int) else len(layers)
        width = vision.config["hidden_size"] * num_layers
        self.linear_1 = nn.Linear(width, hidden_size, bias=vision.projector_bias)
        self.act = ACT2FN[vision.projector_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=vision.projector_bias)
        self.requires_grad_(False)

    def fill_buffers(self) -> None:
        """Position ids are no weight; a tower made on the meta device has to be given them."""
        for name, buffer in self.clip.named_buffers():
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                raise AssertionError(f"transformers' CLIP has a new buffer: {name}")
            ids = torch.arange(buffer.shape[-1], device=buffer.device).expand(1, -1)
            self.clip.get_submodule(owner).position_ids = ids

    def encode(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [N, 3, image_size, image_size] -> [N, num_image_tokens, hidden]."""
        dtype = self.linear_1.weight.dtype
        states = self.clip(pixel_values.to(dtype), output_hidden_states=True).hidden_states
        layers = self.vision.feature_layer
        chosen = [states[i] for i in ((layers,) if isinstance(layers, int) else layers)]
        if not self.vision.keep_class_token:
            chosen = [state[:, 1:] for state in chosen]
        return self.linear_2(self.act(self.linear_1(torch.cat(chosen, dim=-1))))
