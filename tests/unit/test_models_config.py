"""config.json as found in the wild, and every way in which it can be wrong."""

import json
import re

import pytest
import transformers

from engine.errors import ConfigError, ModelError
from engine.models.families import DEFAULTS, read_spec, with_rope_scaling_factor

LLAMA = {
    "model_type": "llama",
    "vocab_size": 301,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "torch_dtype": "bfloat16",
}
LLAVA = {
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 32064},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "torch_dtype": "float16",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}


def spec_of(folder, config, **changes):
    (folder / "config.json").write_text(json.dumps(config | changes))
    return read_spec(folder)


def scaled(rope, **changes):
    return {"rope_scaling": rope | changes}


def test_absent_keys_take_the_published_defaults(tmp_path):
    spec = spec_of(tmp_path, LLAMA)
    assert (spec.num_kv_heads, spec.head_size, spec.max_position) == (6, 12, 2048)
    assert (spec.norm_eps, spec.rope.base, spec.eos_token_ids) == (1e-6, 10000.0, (2,))
    assert spec.windows == (None, None, None)
    assert spec.dtype == "bfloat16"


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_defaults_equal_transformers(family):
    names = {"internlm2": None, "internlm3": "InternLM3Config", "llama": "LlamaConfig"}
    name = names.get(family, f"{family.capitalize()}Config")
    if name is None or not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = getattr(transformers, name)()
    for key, value in DEFAULTS[family].items():
        if value is None and key in ("num_key_value_heads", "head_dim"):
            heads, hidden = config.num_attention_heads, config.hidden_size
            value = heads if key == "num_key_value_heads" else hidden // heads
            assert getattr(config, key, value) == value, key
        else:
            assert getattr(config, key) == value, key


def test_nulls_count_as_absent(tmp_path):
    optional = ("num_key_value_heads", "head_dim", "rope_scaling", "rope_theta", "rms_norm_eps")
    others = ("hidden_act", "attention_bias", "eos_token_id", "quantization_config", "dtype")
    nulls = dict.fromkeys((*optional, *others))
    assert spec_of(tmp_path, LLAMA, **nulls) == spec_of(tmp_path, LLAMA)


def test_end_tokens_of_generation_config_win(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert spec_of(tmp_path, LLAMA, eos_token_id=3).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 1}')
    assert spec_of(tmp_path, LLAMA, eos_token_id=3).eos_token_ids == (3,)


def test_mistral_says_no_window_with_null(tmp_path):
    mistral = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2}
    assert spec_of(tmp_path, mistral).windows == (4096,) * 3
    assert spec_of(tmp_path, mistral, sliding_window=7).windows == (7,) * 3
    assert spec_of(tmp_path, mistral, sliding_window=None).windows == (None,) * 3


def test_qwen2_windows_need_the_switch(tmp_path):
    qwen = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 9}
    assert spec_of(tmp_path, qwen).windows == (None,) * 3
    on = qwen | {"use_sliding_window": True}
    assert spec_of(tmp_path, on, max_window_layers=2).windows == (None, None, 9)
    assert spec_of(tmp_path, on, sliding_window=None).windows == (None,) * 3


def test_internlm3_reads_the_published_bias_keys(tmp_path):
    config = LLAMA | {"model_type": "internlm3", "num_key_value_heads": 2, "head_dim": 16}
    spec = spec_of(tmp_path, config, qkv_bias=True, bias=False)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, False, False)
    spec = spec_of(tmp_path, config, qkv_bias=False, bias=True)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (False, True, True)


def test_llava_fills_what_its_text_config_leaves_out(tmp_path):
    spec = spec_of(tmp_path, LLAVA)
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size) == (4096, 32, 32064)
    assert spec.dtype == "float16"
    vision = spec.vision
    assert (vision.num_image_tokens, vision.image_token_id) == (576, 32000)
    assert (vision.feature_layer, vision.keep_class_token) == (-2, False)
    assert spec_of(tmp_path, LLAVA, image_token_id=9).vision.image_token_id == 9
    full = spec_of(tmp_path, LLAVA, vision_feature_select_strategy="full")
    assert full.vision.num_image_tokens == 577


@pytest.mark.parametrize("dtype_key", ["dtype", "torch_dtype"])
def test_dtype_under_both_keys(dtype_key, tmp_path):
    config = {k: v for k, v in LLAMA.items() if k != "torch_dtype"}
    assert spec_of(tmp_path, config, **{dtype_key: "float16"}).dtype == "float16"


def test_rope_scaling_factor_refuses_a_model_that_already_scales(tmp_path):
    spec = spec_of(tmp_path, LLAMA, rope_scaling={"type": "linear", "factor": 2.0})
    assert with_rope_scaling_factor(spec, 0) is spec
    with pytest.raises(ConfigError, match="already scales its positions"):
        with_rope_scaling_factor(spec, 2.0)


YARN = {"type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WRONG = {
    "unknown family": (
        {"model_type": "gpt2"},
        "config.json: model_type 'gpt2' is not supported (supported: internlm2, internlm3, llama, "
        "llava, mistral, qwen2, qwen3).",
    ),
    "no family": ({"model_type": None}, "config.json: model_type is missing; expected a string."),
    "no size": (
        {"hidden_size": None},
        "config.json: hidden_size is missing; expected a whole number.",
    ),
    "text size": (
        {"hidden_size": "x"},
        "config.json: hidden_size is 'x'; expected a whole number from 1 to 16,777,216.",
    ),
    "zero size": ({"num_hidden_layers": 0}, "config.json: num_hidden_layers is 0;"),
    "negative size": ({"vocab_size": -5}, "config.json: vocab_size is -5;"),
    "true as size": ({"intermediate_size": True}, "config.json: intermediate_size is True;"),
    "fraction as size": ({"num_attention_heads": 6.0}, "num_attention_heads is 6.0;"),
    "heads": (
        {"num_attention_heads": 7},
        "config.json: num_attention_heads is 7; expected a divisor of hidden_size 72.",
    ),
    "kv heads": (
        {"num_key_value_heads": 4},
        "config.json: num_key_value_heads is 4; expected a divisor of num_attention_heads 6.",
    ),
    "odd head": ({"head_dim": 7}, "head_dim is 7; rotary positions need an even one."),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a number above 0."),
    "nan eps": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a number above 0."),
    "bias": ({"attention_bias": 1}, "attention_bias is 1; expected true or false."),
    "activation": (
        {"hidden_act": "gelu"},
        "config.json: hidden_act 'gelu' is not supported (supported: silu).",
    ),
    "dtype": (
        {"torch_dtype": "float8_e4m3fn"},
        "config.json: torch_dtype 'float8_e4m3fn' is not supported "
        "(supported: float32, float16, bfloat16).",
    ),
    "end token": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id"),
    "logn": ({"use_logn_attn": True}, "config.json: use_logn_attn True is not supported."),
    "softcap": (
        {"attn_logit_softcapping": 50.0},
        "config.json: attn_logit_softcapping 50.0 is not supported.",
    ),
    "partial rotary": (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5 is not supported.",
    ),
    "rope type": (
        scaled({"type": "longrope"}),
        "config.json: rope_scaling type 'longrope' is not supported "
        "(supported: linear, dynamic, llama3, yarn).",
    ),
    "new rope type": (
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
        "config.json: rope_parameters type 'proportional' is not supported",
    ),
    "rope per layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters differs by layer type",
    ),
    "rope list": ({"rope_scaling": [1]}, "config.json: rope_scaling is [1]; expected an object."),
    "rope without factor": (
        scaled({"type": "dynamic"}),
        "config.json: rope_scaling.factor is missing; expected a number.",
    ),
    "negative factor": (scaled(YARN, factor=-1), "rope_scaling.factor is -1;"),
    "theta": ({"rope_theta": 0}, "config.json: rope_theta is 0; expected a number above 1."),
    "llama3 without bounds": (
        scaled({"rope_type": "llama3", "factor": 8.0}),
        "rope_scaling.low_freq_factor is missing",
    ),
    "llama3 bounds": (
        scaled(LLAMA3, high_freq_factor=0.5),
        "rope_scaling.high_freq_factor is 0.5; expected a number above low_freq_factor 1.",
    ),
    "quant list": ({"quantization_config": [1]}, "quantization_config is [1]; expected an object."),
    "quant method": (
        {"quantization_config": AWQ | {"quant_method": "gptq"}},
        "config.json: quantization_config.quant_method 'gptq' is not supported (supported: awq).",
    ),
    "awq version": (
        {"quantization_config": AWQ | {"version": "gemv"}},
        "quantization_config.version 'gemv' is not supported (supported: gemm).",
    ),
    "awq bits": (
        {"quantization_config": AWQ | {"bits": 8}},
        "quantization_config.bits 8 is not supported (supported: 4).",
    ),
    "awq symmetric": (
        {"quantization_config": AWQ | {"zero_point": False}},
        "quantization_config.zero_point False is not supported (supported: true).",
    ),
    "awq group": (
        {"quantization_config": AWQ | {"group_size": 128}},
        "model.layers.0.self_attn.q_proj has 72 inputs; AWQ group_size 128 must divide them.",
    ),
    "awq columns": (
        {"quantization_config": AWQ, "num_key_value_heads": 1},
        "model.layers.0.self_attn.q_proj cannot be AWQ: 8 output columns share an int32.",
    ),
    "awq half a fused layer": (
        {"quantization_config": AWQ | {"modules_to_not_convert": ["k_proj"]}},
        "modules_to_not_convert keeps model.layers.0.self_attn.k_proj in floating point but not "
        "model.layers.0.self_attn.q_proj;",
    ),
    "awq exceptions": (
        {"quantization_config": AWQ | {"modules_to_not_convert": "lm_head"}},
        "modules_to_not_convert is 'lm_head'; expected a list of module names.",
    ),
}


SIZES = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
]  # fmt: skip
TOWER_SIZES = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size",
]  # fmt: skip


@pytest.mark.parametrize("size", [3_000_000_000, 2**31 - 1, 10**30])
@pytest.mark.parametrize("key", SIZES)
def test_sizes_beyond_any_model_are_refused_before_anything_is_built(tmp_path, key, size):
    with pytest.raises(ModelError, match=f"config.json: {key} is {size}; expected a whole number"):
        spec_of(tmp_path, LLAMA, **{key: size})


@pytest.mark.parametrize("size", [2**31 - 1, 10**30])
@pytest.mark.parametrize("key", TOWER_SIZES)
def test_tower_sizes_beyond_any_model_are_refused(tmp_path, key, size):
    tower = LLAVA["vision_config"] | {key: size}
    with pytest.raises(ModelError, match=f"vision_config.{key} is {size}; expected"):
        spec_of(tmp_path, LLAVA, vision_config=tower)


def test_at_most_1024_layers_are_read(tmp_path):
    assert len(spec_of(tmp_path, LLAMA, num_hidden_layers=1024).windows) == 1024
    for count in (1025, 3_000_000):
        with pytest.raises(ModelError, match=f"num_hidden_layers is {count}; .* from 1 to 1,024"):
            spec_of(tmp_path, LLAMA, num_hidden_layers=count)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_is_named(name, tmp_path):
    changes, message = WRONG[name]
    with pytest.raises(ModelError, match=re.escape(message)):
        spec_of(tmp_path, LLAMA, **changes)


WRONG_LLAVA = {
    "text model": (
        {"text_config": {"model_type": "gemma"}},
        "config.json: text_config.model_type 'gemma' is not supported",
    ),
    "text size": (
        {"text_config": {"hidden_size": 0}},
        "config.json: text_config.hidden_size is 0;",
    ),
    "tower": (
        {"vision_config": {"model_type": "siglip_vision_model"}},
        "vision_config.model_type 'siglip_vision_model' is not supported "
        "(supported: clip_vision_model).",
    ),
    "tower heads": (
        {"vision_config": {"num_attention_heads": 5}},
        "vision_config.num_attention_heads is 5; expected a divisor",
    ),
    "patch": ({"vision_config": {"patch_size": 500}}, "vision_config.patch_size is 500;"),
    "tower activation": (
        {"vision_config": {"hidden_act": "xielu"}},
        "vision_config.hidden_act 'xielu' is not supported",
    ),
    "strategy": (
        {"vision_feature_select_strategy": "cls"},
        "vision_feature_select_strategy 'cls' is not supported (supported: default, full).",
    ),
    "layer": ({"vision_feature_layer": 25}, "vision_feature_layer is 25; expected a layer"),
    "no layers": ({"vision_feature_layer": []}, "vision_feature_layer is []; expected a layer"),
    "image token": (
        {"image_token_index": 40000},
        "image_token_index is 40000; expected a token below text_config.vocab_size 32064.",
    ),
}


@pytest.mark.parametrize("name", WRONG_LLAVA)
def test_a_wrong_llava_config_is_named(name, tmp_path):
    changes, message = WRONG_LLAVA[name]
    with pytest.raises(ModelError, match=re.escape(message)):
        spec_of(tmp_path, LLAVA, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b"[1]", "config.json is list; expected a JSON object."),
        (None, "has no config.json; expected a Hugging Face checkpoint."),
    ],
)
def test_a_broken_config_file_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(message)):
        read_spec(tmp_path)
