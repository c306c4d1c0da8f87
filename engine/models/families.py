"""From a checkpoint folder's JSON files to a ModelSpec: one function per model family.

Only JSON is read: no remote code, no weights. A setting that would change the mathematics and is not
supported stops here with a ModelError that names it; a key that is missing takes the default of the
family's published configuration class. An explicit null counts as absent, except Mistral's
sliding_window, where null is how version 0.2 says "none".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from engine.errors import ConfigError, ModelError
from engine.models.json_keys import Keys, read_json
from engine.models.names import block_linears, group_size_of
from engine.models.spec import ModelSpec, QuantSpec, RopeSpec, VisionSpec

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_VISION_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu")
_DTYPES = ("float32", "float16", "bfloat16")

# Beyond any model: refused before anything is built with them.
_MAX_WIDTH = 2**24
_MAX_LAYERS = 1024
_MAX_IMAGE_SIDE = 4096

# What a configuration may leave out, as the families' published classes fill it in. None: as many
# KV heads as query heads; head_dim = hidden_size / num_attention_heads; no end token.
_DEFAULT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "eos_token_id",
)  # fmt: skip
_DEFAULT_ROWS = {
    "llama": (32000, 4096, 11008, 32, 32, None, None, 2048, 1e-6, 2),
    "mistral": (32000, 4096, 14336, 32, 32, 8, None, 131072, 1e-6, 2),
    "qwen2": (151936, 4096, 22016, 32, 32, 32, None, 32768, 1e-6, None),
    "qwen3": (151936, 4096, 22016, 32, 32, 32, 128, 32768, 1e-6, None),
    "internlm2": (103168, 4096, 11008, 32, 32, None, None, 2048, 1e-6, 2),
    "internlm3": (128512, 4096, 10240, 48, 32, 2, 128, 32768, 1e-5, 2),
}
DEFAULTS = {
    family: dict(zip(_DEFAULT_KEYS, row, strict=True)) for family, row in _DEFAULT_ROWS.items()
}
_CLIP_DEFAULTS: dict[str, int | float] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
}
_CLIP_MOST = {
    "num_hidden_layers": _MAX_LAYERS,
    "image_size": _MAX_IMAGE_SIDE,
    "patch_size": _MAX_IMAGE_SIDE,
}
# Keys that change the mathematics of a decoder, with the only values under which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "use_logn_attn": (False,),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "is_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
}


def read_spec(folder: Path) -> ModelSpec:
    """The structure of the checkpoint in folder; raises ModelError where it cannot be honoured."""
    folder = Path(folder)
    config = Keys(read_json(folder / "config.json"), "config.json")
    model_type = config.text("model_type")
    if model_type == "llava":
        spec = _llava(config)
    elif model_type in _FAMILIES:
        spec = _decoder(config, model_type, needs_sizes=True)
    else:
        supported = ", ".join(sorted([*_FAMILIES, "llava"]))
        raise ModelError(
            f"config.json: model_type {model_type!r} is not supported (supported: {supported})."
        )
    spec = dataclasses.replace(
        spec,
        quant=_quant(folder, config),
        eos_token_ids=_generation_eos(folder) or spec.eos_token_ids,
    )
    _check_awq_shapes(spec)
    return spec


def with_rope_scaling_factor(spec: ModelSpec, factor: float) -> ModelSpec:
    """EngineConfig.rope_scaling_factor, as in LMDeploy: dynamic NTK with this factor; 0 is off."""
    if factor == 0:
        return spec
    if spec.rope.kind != "default":
        raise ConfigError(
            f"rope_scaling_factor is {factor:g}, but this model already scales its positions "
            f"({spec.rope.kind}); set rope_scaling_factor to 0."
        )
    rope = dataclasses.replace(
        spec.rope, kind="dynamic", factor=factor, original_max_position=spec.max_position
    )
    return dataclasses.replace(spec, rope=rope)


def _decoder(config: Keys, model_type: str, *, needs_sizes: bool) -> ModelSpec:
    """A text model; needs_sizes False fills missing sizes with the family's defaults (LLaVA)."""
    defaults = DEFAULTS[model_type]
    for key, neutral in _NEUTRAL.items():
        if config.has(key) and config.raw[key] not in neutral:
            raise ModelError(
                f"{config.file}: {config.path}{key} {config.raw[key]!r} is not supported."
            )
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(
            f"{config.file}: {config.path}hidden_act {activation!r} is not supported (supported: silu)."
        )

    def size(key: str, most: int = _MAX_WIDTH) -> int:
        return config.size(key, None if needs_sizes else defaults[key], most=most)

    hidden_size, num_heads = size("hidden_size"), size("num_attention_heads")
    num_kv_heads = config.size(
        "num_key_value_heads", defaults["num_key_value_heads"] or num_heads, most=_MAX_WIDTH
    )
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads {num_heads}")
    head_size = _head_size(config, hidden_size, num_heads, defaults["head_dim"])
    max_position = config.size("max_position_embeddings", defaults["max_position_embeddings"])
    spec = ModelSpec(
        family=model_type,
        names=model_type,
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers", _MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        norm_eps=config.number("rms_norm_eps", defaults["rms_norm_eps"]),
        rope=_rope(config, head_size, max_position),
        max_position=max_position,
        dtype=_dtype(config),
        tied_head=config.flag("tie_word_embeddings", False),
        eos_token_ids=config.token_ids("eos_token_id", defaults["eos_token_id"]),
    )
    spec = dataclasses.replace(spec, windows=(None,) * spec.num_layers)
    return _FAMILIES[model_type](spec, config)


def _llama(spec: ModelSpec, config: Keys) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return dataclasses.replace(
        spec, names="llama", qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias", False)
    )


def _mistral(spec: ModelSpec, config: Keys) -> ModelSpec:
    window = None
    if config.raw.get("sliding_window", 4096) is not None:
        window = config.size("sliding_window", 4096)
    return dataclasses.replace(spec, names="llama", windows=(window,) * spec.num_layers)


def _qwen2(spec: ModelSpec, config: Keys) -> ModelSpec:
    return dataclasses.replace(spec, names="llama", qkv_bias=True, windows=_windows(spec, config))


def _qwen3(spec: ModelSpec, config: Keys) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return dataclasses.replace(
        spec,
        names="llama",
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        windows=_windows(spec, config),
    )


def _internlm2(spec: ModelSpec, config: Keys) -> ModelSpec:
    bias = config.flag("bias", True)
    return dataclasses.replace(
        spec, names="internlm2", qkv_layout="grouped", qkv_bias=bias, o_bias=bias
    )


def _internlm3(spec: ModelSpec, config: Keys) -> ModelSpec:
    # transformers writes attention_bias and mlp_bias for what the published code calls qkv_bias and bias
    bias = config.flag("bias", config.flag("mlp_bias", False))
    qkv_bias = config.flag("qkv_bias", config.flag("attention_bias", False))
    return dataclasses.replace(spec, names="llama", qkv_bias=qkv_bias, o_bias=bias, mlp_bias=bias)


_FAMILIES: dict[str, Callable[[ModelSpec, Keys], ModelSpec]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "internlm2": _internlm2,
    "internlm3": _internlm3,
}


def _llava(config: Keys) -> ModelSpec:
    """LLaVA 1.5 in the Hugging Face layout: any decoder above, a CLIP tower and a projector."""
    text = config.section("text_config")
    model_type = text.text("model_type", "llama")
    if model_type not in _FAMILIES:
        raise ModelError(
            f"config.json: text_config.model_type {model_type!r} is not supported "
            f"(supported: {', '.join(sorted(_FAMILIES))})."
        )
    spec = _decoder(text, model_type, needs_sizes=False)
    vision = _vision(config)
    if vision.image_token_id >= spec.vocab_size:
        raise ModelError(
            f"config.json: image_token_index is {vision.image_token_id}; "
            f"expected a token below text_config.vocab_size {spec.vocab_size}."
        )
    return dataclasses.replace(
        spec,
        family="llava",
        vision=vision,
        dtype=_dtype(config, spec.dtype),
        tied_head=config.flag("tie_word_embeddings", False) or spec.tied_head,
        eos_token_ids=config.token_ids("eos_token_id") or spec.eos_token_ids,
    )


def _vision(config: Keys) -> VisionSpec:
    raw = config.section("vision_config")
    kind = raw.text("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise ModelError(
            f"config.json: vision_config.model_type {kind!r} is not supported "
            "(supported: clip_vision_model)."
        )
    clip: dict[str, int | float | str] = {
        key: raw.size(key, value, most=_CLIP_MOST.get(key, _MAX_WIDTH))
        if isinstance(value, int)
        else raw.number(key, value)
        for key, value in _CLIP_DEFAULTS.items()
    }
    if clip["num_channels"] != 3:
        raise raw.error("num_channels", "3 (pictures are read as RGB)")
    if clip["hidden_size"] % clip["num_attention_heads"]:
        raise raw.error(
            "num_attention_heads", f"a divisor of vision_config.hidden_size {clip['hidden_size']}"
        )
    if clip["image_size"] < clip["patch_size"]:
        raise raw.error("patch_size", f"at most vision_config.image_size {clip['image_size']}")
    clip["hidden_act"] = _vision_activation(raw, "hidden_act", "quick_gelu")
    strategy = config.text("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ModelError(
            f"config.json: vision_feature_select_strategy {strategy!r} is not supported "
            "(supported: default, full)."
        )
    token_key = "image_token_index" if config.has("image_token_index") else "image_token_id"
    token = config.token_ids(token_key, 32000)
    if len(token) != 1:
        raise config.error(token_key, "one token id")
    num_patches = (clip["image_size"] // clip["patch_size"]) ** 2
    return VisionSpec(
        config=clip,
        image_token_id=token[0],
        num_image_tokens=num_patches + (strategy == "full"),
        feature_layer=_feature_layer(config, clip["num_hidden_layers"]),
        keep_class_token=strategy == "full",
        projector_act=_vision_activation(config, "projector_hidden_act", "gelu"),
        projector_bias=config.flag("multimodal_projector_bias", True),
    )


def _vision_activation(keys: Keys, key: str, default: str) -> str:
    name = keys.text(key, default)
    if name not in _VISION_ACTIVATIONS:
        raise ModelError(
            f"{keys.file}: {keys.path}{key} {name!r} is not supported "
            f"(supported: {', '.join(_VISION_ACTIVATIONS)})."
        )
    return name


def _feature_layer(config: Keys, num_layers: int) -> int | tuple[int, ...]:
    """Indices into the tower's num_layers + 1 hidden states; a list is concatenated."""
    value = config.raw.get("vision_feature_layer")
    value = -2 if value is None else value
    layers = value if isinstance(value, list) else [value]
    limit = num_layers + 1
    wrong = [i for i in layers if isinstance(i, bool) or not isinstance(i, int)]
    is_long = len(layers) > limit
    if not layers or is_long or wrong or any(not -limit <= i < limit for i in layers):
        raise config.error(
            "vision_feature_layer", f"a layer from {-limit} to {num_layers} or a list of them"
        )
    return tuple(layers) if isinstance(value, list) else value


def _head_size(config: Keys, hidden_size: int, num_heads: int, default: int | None) -> int:
    if not config.has("head_dim") and default is None and hidden_size % num_heads:
        raise config.error("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    head_size = config.size("head_dim", default or hidden_size // num_heads, most=_MAX_WIDTH)
    if head_size % 2:
        raise ModelError(
            f"{config.file}: {config.path}head_dim is {head_size}; rotary positions need an even one."
        )
    return head_size


def _windows(spec: ModelSpec, config: Keys) -> tuple[int | None, ...]:
    """Qwen: layers from max_window_layers on slide, or those that layer_types names."""
    if not config.flag("use_sliding_window", False) or (
        "sliding_window" in config.raw and not config.has("sliding_window")
    ):
        return spec.windows
    window = config.size("sliding_window", 4096)
    kinds = config.raw.get("layer_types")
    if kinds is None:
        first = config.raw.get("max_window_layers")
        first = 28 if first is None else first
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise config.error("max_window_layers", "a whole number of at least 0")
        return tuple(window if i >= first else None for i in range(spec.num_layers))
    known = ("full_attention", "sliding_attention")
    if (
        not isinstance(kinds, list)
        or len(kinds) != spec.num_layers
        or any(kind not in known for kind in kinds)
    ):
        raise config.error("layer_types", f"{spec.num_layers} entries of {' or '.join(known)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: Keys, head_size: int, max_position: int) -> RopeSpec:
    """Old rope_scaling beside rope_theta, or transformers 5's rope_parameters that holds both."""
    key = "rope_scaling" if config.raw.get("rope_scaling") else "rope_parameters"
    scaling = config.section(key)
    if any(isinstance(value, dict) for value in scaling.raw.values()):
        raise ModelError(
            f"{config.file}: {config.path}{key} differs by layer type, which is not supported."
        )
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in _ROPE_KINDS:
        supported = ", ".join(_ROPE_KINDS[1:])
        raise ModelError(
            f"{config.file}: {config.path}{key} type {kind!r} is not supported (supported: {supported})."
        )
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.error("partial_rotary_factor", "1 (only whole heads are rotated)")
    holder = scaling if scaling.has("rope_theta") else config
    base = holder.number("rope_theta", 10000.0, above=1.0)
    if kind == "default":
        return RopeSpec(base=base, dim=head_size)
    if kind in ("linear", "dynamic"):
        if kind == "dynamic" and head_size == 2:
            raise config.error("head_dim", "more than 2 with dynamic rope scaling")
        return RopeSpec(
            base=base,
            dim=head_size,
            kind=kind,
            factor=scaling.number("factor"),
            original_max_position=max_position,
        )
    holder = config if config.has("original_max_position_embeddings") else scaling
    original = holder.size("original_max_position_embeddings", max_position)
    if kind == "llama3":
        return _llama3_rope(scaling, base, head_size, original)
    return _yarn_rope(scaling, base, head_size, original, max_position)


def _llama3_rope(scaling: Keys, base: float, head_size: int, original: int) -> RopeSpec:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        raise scaling.error("high_freq_factor", f"a number above low_freq_factor {low:g}")
    return RopeSpec(
        base=base,
        dim=head_size,
        kind="llama3",
        factor=scaling.number("factor"),
        original_max_position=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn_rope(
    scaling: Keys, base: float, head_size: int, original: int, max_position: int
) -> RopeSpec:
    attention = scaling.raw.get("attention_factor")
    return RopeSpec(
        base=base,
        dim=head_size,
        kind="yarn",
        factor=scaling.number("factor", max_position / original),
        original_max_position=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=None if attention is None else scaling.number("attention_factor"),
        mscale=_optional_scale(scaling, "mscale"),
        mscale_all_dim=_optional_scale(scaling, "mscale_all_dim"),
        truncate=scaling.flag("truncate", True),
    )


def _optional_scale(scaling: Keys, key: str) -> float:
    """0 and absent mean the same: not given."""
    return scaling.number(key) if scaling.raw.get(key) else 0.0


def _dtype(config: Keys, default: str = "float32") -> str:
    key = "dtype" if config.has("dtype") else "torch_dtype"
    name = config.text(key, default).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(
            f"{config.file}: {config.path}{key} {name!r} is not supported "
            f"(supported: {', '.join(_DTYPES)})."
        )
    return name


def _quant(folder: Path, config: Keys) -> QuantSpec | None:
    """quantization_config of config.json (or of its text_config), or AutoAWQ's old quant_config.json."""
    for keys in (config, config.section("text_config")):
        if keys.has("quantization_config"):
            return _awq(keys.section("quantization_config"), "group_size", "bits")
    old = folder / "quant_config.json"
    if old.exists():
        return _awq(Keys(read_json(old), "quant_config.json"), "q_group_size", "w_bit")
    return None


def _awq(quant: Keys, group_key: str, bits_key: str) -> QuantSpec:
    def refuse(key: str, supported: str) -> ModelError:
        return ModelError(
            f"{quant.file}: {quant.path}{key} {quant.raw.get(key)!r} is not supported "
            f"(supported: {supported})."
        )

    if quant.text("quant_method", "awq") != "awq":
        raise refuse("quant_method", "awq")
    if quant.text("version", "gemm").lower() != "gemm":
        raise refuse("version", "gemm")
    if quant.text("backend", "autoawq") == "llm-awq":
        raise refuse("backend", "autoawq")
    if quant.size(bits_key, 4) != 4:
        raise refuse(bits_key, "4")
    if not quant.flag("zero_point", True):
        raise refuse("zero_point", "true")
    group_size = -1 if quant.raw.get(group_key) == -1 else quant.size(group_key, 128)
    kept = quant.raw.get("modules_to_not_convert") or []
    if not isinstance(kept, list) or any(not isinstance(name, str) for name in kept):
        raise quant.error("modules_to_not_convert", "a list of module names")
    return QuantSpec(group_size=group_size, modules_to_not_convert=tuple(kept))


def _check_awq_shapes(spec: ModelSpec) -> None:
    """Each quantized layer must divide into groups and packed columns; group_size_of says if not."""
    for i in range(spec.num_layers):
        for linear in block_linears(spec):
            group_size_of(spec, i, linear.name)


def _generation_eos(folder: Path) -> tuple[int, ...]:
    """generation_config.json's end tokens win over config.json's, as in transformers."""
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    return Keys(read_json(path), path.name).token_ids("eos_token_id")
