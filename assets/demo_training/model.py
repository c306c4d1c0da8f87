"""The demo model's shape, and a plain forward pass over the transformers modules for fast training.

transformers' own forward serves generation; this one computes the same with fixed shapes and no masks,
so that torch.compile makes one graph of it (`check_forward` compares the two).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_SIZE = 144
PATCH = 12
NORM_MEAN = (0.5, 0.5, 0.5)
NORM_STD = (0.5, 0.5, 0.5)


def build_config(vocab_size: int, pad: int, stop: int, image: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=256,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=stop,
        pad_token_id=pad,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to the processor's floats, -1 to 1."""
    return pixels.float() / 127.5 - 1.0


def encode_images(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Patch features [N, patches, vision width] before the projector."""
    tower = model.model.vision_tower
    emb = tower.embeddings
    weight = emb.patch_embedding.weight.flatten(1)
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)  # [N, patches, 3 * 12 * 12]
    x = F.linear(patches, weight)
    x = torch.cat([emb.class_embedding.expand(x.shape[0], 1, -1).to(x.dtype), x], 1)
    x = tower.pre_layrnorm(x + emb.position_embedding.weight)
    heads = tower.config.num_attention_heads
    for layer in tower.encoder.layers:
        h, attn = layer.layer_norm1(x), layer.self_attn
        q, k, v = (_heads(proj(h), heads) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        x = x + attn.out_proj(_join(F.scaled_dot_product_attention(q, k, v)))
        x = x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.layer_norm2(x))))
    return x[:, 1:]


def decode(model: LlavaForConditionalGeneration, x: Tensor) -> Tensor:
    """Final hidden states [B, L, D] of embeddings x; causal, positions from 0."""
    lm, cfg = model.model.language_model, model.config.text_config
    cos, sin = _rope(x.shape[1], cfg.head_dim, x.device)
    for layer in lm.layers:
        h, attn = layer.input_layernorm(x), layer.self_attn
        q = _rotate(_heads(attn.q_proj(h), cfg.num_attention_heads), cos, sin)
        k = _rotate(_heads(attn.k_proj(h), cfg.num_key_value_heads), cos, sin)
        v = _heads(attn.v_proj(h), cfg.num_key_value_heads)
        groups = cfg.num_attention_heads // cfg.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        x = x + attn.o_proj(_join(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        h, mlp = layer.post_attention_layernorm(x), layer.mlp
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return lm.norm(x)


def embed(
    model: LlavaForConditionalGeneration, ids: Tensor, features: Tensor | None, slots: Tensor | None
) -> Tensor:
    """Token embeddings [B, L, D] with projected image features put at the flat positions `slots`."""
    x = model.model.language_model.embed_tokens(ids)
    if features is None:
        return x
    projected = model.model.multi_modal_projector(features).flatten(0, 1)
    flat = x.flatten(0, 1).to(projected.dtype)
    return flat.index_copy(0, slots.flatten(), projected).view(x.shape)


def token_loss(
    model: LlavaForConditionalGeneration, hidden: Tensor, ids: Tensor, learn: Tensor
) -> Tensor:
    """Mean cross entropy of the next token where `learn` is 1."""
    logits = F.linear(hidden[:, :-1], model.lm_head.weight)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weight = learn[:, 1:].flatten().float()
    return (loss * weight).sum() / weight.sum()


class PatchHeads(nn.Module):
    """Training-only teachers: what shape, colour and character lies under every patch."""

    def __init__(self, width: int, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Sum of the heads' losses; labels [N, heads, patches], 0 is background and weighs little."""
        total = features.new_zeros((), dtype=torch.float32)
        for index, head in enumerate(self.heads):
            target = labels[:, index].flatten()
            loss = F.cross_entropy(head(features).flatten(0, 1).float(), target, reduction="none")
            weight = torch.where(target > 0, 1.0, 0.1)
            total = total + (loss * weight).sum() / weight.sum()
        return total


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)  # [B, H, L, D]


def _join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _rope(length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)
