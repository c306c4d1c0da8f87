"""Tiny random checkpoints of every family, under the family's original tensor names.

transformers writes the families that it has; InternLM2 is written from tests/internlm2_reference.py.
`make_checkpoint` returns the folder; `reference_logits` runs the model that wrote it. Weights are
drawn large enough that wrong mathematics shows in the logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from engine.layers.awq_format import dequantize_awq, quantize_to_awq
from tests.internlm2_reference import internlm2_logits, internlm2_tensors

VOCAB_SIZE = 301  # 256 bytes, special tokens and an odd rest
IMAGE_TOKEN = 300

_CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
if hasattr(transformers, "InternLM3Config"):  # newer than the oldest transformers 5 we support
    _CONFIGS["internlm3"] = transformers.InternLM3Config
FAMILIES = (*_CONFIGS, "internlm2", "llava")
# Odd on purpose: sizes that are no powers of two, three query heads per KV head.
_SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=72,
    intermediate_size=104,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=None,
)
_HEAD_DIM = {"qwen3": 20, "internlm3": 16}
# What an RTN quantizer of these tests converts: every linear layer of a block.
_AWQ_MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "wqkv", "wo", "w1", "w2", "w3",
)  # fmt: skip


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str | int | None = None,
    **overrides: object,
) -> Path:
    """Write a random checkpoint; overrides are config.json keys (for llava: of its text model)."""
    folder.mkdir(parents=True, exist_ok=True)
    if family == "internlm2":
        _write_internlm2(folder, seed, dtype, overrides)
        return folder
    torch.manual_seed(seed)
    model = _build(family, overrides)
    randomize(model, seed)
    options = {} if shard_size is None else {"max_shard_size": shard_size}
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Norms near one, everything else normal with a width that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        width = 1.0 if "embed" in name else 0.2
        parameter.data.copy_(1 + 0.2 * values if is_norm else width * values)


def llava_config(**text: object) -> LlavaConfig:
    """A tower of four layers over 4 x 4 patches, and a text model of any family (`text_family=`)."""
    vision = CLIPVisionConfig(
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=4,
        num_attention_heads=5,
        image_size=28,
        patch_size=7,
    )
    family = text.pop("text_family", "llama")
    top = {
        key: text.pop(key)
        for key in ("vision_feature_layer", "vision_feature_select_strategy", "tie_word_embeddings")
        if key in text
    }
    return LlavaConfig(
        vision_config=vision,
        text_config=text_config(family, text),
        image_token_index=IMAGE_TOKEN,
        **top,
    )


def text_config(family: str, overrides: dict[str, object]) -> PretrainedConfig:
    sizes = dict(_SIZES)
    if family in _HEAD_DIM:
        sizes["head_dim"] = _HEAD_DIM[family]
    return _CONFIGS[family](**(sizes | overrides))


def reference_logits(
    folder: Path, input_ids: list[int], pixel_values: Tensor | None = None
) -> Tensor:
    """Logits [T, V] of the model that wrote folder, read back in fp32."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "internlm2":
        weights = {k: v.float() for k, v in load_folder(folder).items()}
        return internlm2_logits(config, weights, torch.tensor(input_ids))
    model = reference_model(folder)
    pictures = {} if pixel_values is None else {"pixel_values": pixel_values}
    with torch.inference_mode():
        return model(input_ids=torch.tensor([input_ids]), **pictures).logits[0]


def reference_model(folder: Path) -> torch.nn.Module:
    """transformers' own model of a folder, fp32."""
    config = json.loads((folder / "config.json").read_text())
    cls = LlavaForConditionalGeneration if config["model_type"] == "llava" else AutoModelForCausalLM
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


def load_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def save_folder(folder: Path, tensors: dict[str, Tensor], *, num_shards: int = 1) -> None:
    """Write tensors as one file, or as shards with an index; other safetensors files go."""
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rename_tensors(folder: Path, prefixes: dict[str, str]) -> None:
    """Replace the first matching prefix of each tensor name, as older and newer exporters differ."""

    def renamed(name: str) -> str:
        for old, new in prefixes.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    save_folder(folder, {renamed(name): t for name, t in load_folder(folder).items()})


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: object) -> None:
    """Change keys of config.json in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def make_awq(
    source: Path,
    folder: Path,
    *,
    group_size: int = 8,
    scales_dtype: torch.dtype = torch.float16,
    keep: tuple[str, ...] = (),
) -> tuple[Path, Path]:
    """Quantize source by rounding; returns (AWQ folder, its twin with dequantized weights).

    keep: parts of module names that stay in floating point.
    """
    quantized, twin = {}, {}
    for name, tensor in load_folder(source).items():
        module, _, leaf = name.rpartition(".")
        is_linear = leaf == "weight" and module.rpartition(".")[2] in _AWQ_MODULES
        in_tower = "vision_tower" in name
        if not is_linear or in_tower or any(part in module for part in keep):
            quantized[name] = twin[name] = tensor
            continue
        packed = _round_to_nearest(tensor.float().T, group_size, scales_dtype)
        quantized |= {f"{module}.{key}": value for key, value in packed.items()}
        twin[name] = dequantize_awq(**packed, group_size=_rows(packed), dtype=torch.float32).T
    awq_config = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": list(keep) or None,
    }
    twin_folder = folder.with_name(folder.name + "-twin")
    config = json.loads((source / "config.json").read_text())
    for target, tensors, extra in (
        (folder, quantized, {"quantization_config": awq_config}),
        (twin_folder, twin, {}),
    ):
        target.mkdir(parents=True, exist_ok=True)
        save_folder(target, tensors)
        (target / "config.json").write_text(json.dumps(config | extra))
    return folder, twin_folder


def tiny_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """A byte-level tokenizer: 256 bytes, then <unk>, <s>, </s>, <|im_start|>, <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    assert vocab_size >= len(vocab) + len(specials), "vocab_size must hold bytes and special tokens"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def _build(family: str, overrides: dict[str, object]) -> torch.nn.Module:
    if family == "llava":
        return LlavaForConditionalGeneration(llava_config(**overrides))
    return AutoModelForCausalLM.from_config(text_config(family, overrides))


def _write_internlm2(
    folder: Path, seed: int, dtype: torch.dtype, overrides: dict[str, object]
) -> None:
    config = (
        _SIZES
        | {
            "model_type": "internlm2",
            "architectures": ["InternLM2ForCausalLM"],
            "hidden_act": "silu",
            "bias": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        | overrides
    )
    (folder / "config.json").write_text(json.dumps(config))
    tensors = internlm2_tensors(config, seed)
    save_folder(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def _round_to_nearest(
    weight: Tensor, group_size: int, scales_dtype: torch.dtype
) -> dict[str, Tensor]:
    """weight [in, out] -> qweight, qzeros and scales; each group's range is stretched to hold 0."""
    rows = weight.shape[0] if group_size == -1 else group_size
    groups = weight.unflatten(0, (-1, rows))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low).clamp(min=1e-5) / 15).to(scales_dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15).to(torch.int32)
    qweight, qzeros = quantize_to_awq(weight, scales, zeros, rows)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def _rows(packed: dict[str, Tensor]) -> int:
    return packed["qweight"].shape[0] // packed["scales"].shape[0]


def token_chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces of a prompt."""
    for start in range(0, total, size):
        yield start, min(total, start + size)
