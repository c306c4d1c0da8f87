"""Every family, rope scaling and window against the model that wrote the checkpoint, in fp32."""

import json

import pytest
import torch

from engine.models.families import read_spec, with_rope_scaling_factor
from engine.models.weights import check_weights, load_model
from tests.paged import PagedRun, plain_logits
from tests.tiny import (
    FAMILIES,
    IMAGE_TOKEN,
    edit_config,
    make_awq,
    make_checkpoint,
    reference_logits,
    reference_model,
    rename_tensors,
    token_chunks,
)

TOLERANCE = 1e-4
PROMPT = [(7 * i * i + 3 * i + 11) % 256 for i in range(63)]

ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 40,
        "attention_factor": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
}
VARIANTS = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-all-kv-heads": ("llama", {"num_key_value_heads": 6}),
    "llama-head-dim": ("llama", {"head_dim": 10}),
    "codellama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3-tied-window": (
        "qwen3",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "internlm2-bias": ("internlm2", {"bias": True}),
    "internlm2-linear": ("internlm2", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    **{
        f"llama-{name}": ("llama", {"rope_parameters": rope | {"rope_theta": 5000.0}})
        for name, rope in ROPES.items()
    },
}
if "internlm3" in FAMILIES:
    VARIANTS["internlm3-bias"] = ("internlm3", {"attention_bias": True, "mlp_bias": True})


def load(folder, dtype=torch.float32):
    return load_model(check_weights(folder, read_spec(folder)), "cpu", dtype)


def assert_close(actual, expected, tolerance=TOLERANCE):
    error = (actual - expected).abs()
    scale = expected.abs().max()
    assert error.max() < tolerance, (
        f"max error {error.max():.2e}, mean {error.mean():.2e}, largest logit {scale:.2f}"
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_reference(variant, tmp_path):
    family, overrides = VARIANTS[variant]
    folder = make_checkpoint(tmp_path, family, **overrides)
    expected = reference_logits(folder, PROMPT)
    model = load(folder)
    assert expected.abs().max() > 1, "a reference of zeros proves nothing"
    assert_close(plain_logits(model, PROMPT)[0], expected)
    run = PagedRun(model)
    rows = [run.step({0: PROMPT[a:b]})[0] for a, b in token_chunks(40, 13)]
    rows += [run.step({0: [token]})[0] for token in PROMPT[40:]]
    assert_close(torch.cat(rows), expected)


@pytest.mark.parametrize(
    "variant", [*FAMILIES, "mistral-window", "llama-llama3", "llama-yarn", "llama-tied"]
)
def test_64_greedy_tokens_equal_the_reference(variant, tmp_path):
    family, overrides = VARIANTS[variant]
    folder = make_checkpoint(tmp_path, family, **overrides)
    run = PagedRun(load(folder), block_size=16)
    tokens, logits = list(PROMPT[:11]), run.step({0: PROMPT[:11]})[0]
    for _ in range(64):
        tokens.append(int(logits[-1].argmax()))
        logits = run.step({0: tokens[-1:]})[0]
    expected = reference_logits(folder, tokens[:-1])[10:].argmax(-1)
    assert tokens[11:] == expected.tolist()


@pytest.mark.parametrize(
    "variant", ["llama", "mistral-window", "qwen3", "internlm2", "llama-dynamic"]
)
def test_a_mixed_batch_equals_each_sequence_alone(variant, tmp_path):
    family, overrides = VARIANTS[variant]
    model = load(make_checkpoint(tmp_path, family, max_position_embeddings=24, **overrides))
    prompts = {0: PROMPT[:1], 1: PROMPT[3:40], 2: PROMPT[20:29], 3: PROMPT[5:60], 4: PROMPT[:33]}
    together, alone = PagedRun(model), PagedRun(model)
    schedule = [
        {1: prompts[1][:30], 0: prompts[0]},
        {0: [5], 1: prompts[1][30:], 2: prompts[2]},
        {0: [6], 1: [7], 2: [8], 3: prompts[3][:20], 4: prompts[4][:31]},
        {0: [9], 1: [10], 2: [11], 4: prompts[4][31:], 3: prompts[3][20:]},
        {s: [12 + s] for s in range(5)},
    ]
    for chunks in schedule:
        batch = together.step(chunks)
        for s, tokens in chunks.items():
            assert_close(batch[s], alone.step({s: tokens})[s])


def test_plain_batches_keep_sequences_apart(tmp_path):
    model = load(make_checkpoint(tmp_path, "llama"))
    prompts = [PROMPT[:1], PROMPT[:33], PROMPT[10:17]]
    for prompt, logits in zip(prompts, plain_logits(model, *prompts), strict=True):
        assert_close(logits, plain_logits(model, prompt)[0])


@pytest.mark.parametrize("family", ["llama", "qwen3", "internlm2"])
def test_dynamic_ntk_grows_with_the_sequence_as_the_reference_does(family, tmp_path):
    """A prompt beyond max_position in one step, then decoding, beside transformers' own cache."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    overrides = scaling if family == "internlm2" else {"rope_parameters": rope}
    folder = make_checkpoint(tmp_path, family, max_position_embeddings=24, **overrides)
    prompt, run = PROMPT[:41], PagedRun(load(folder))
    logits = run.step({0: prompt})[0]
    assert_close(logits, reference_logits(folder, prompt))
    if family == "internlm2":
        return  # its reference has no cache to decode from
    reference = reference_model(folder)
    with torch.inference_mode():
        past = reference(input_ids=torch.tensor([prompt]), use_cache=True)
        for token in PROMPT[41:60]:
            past = reference(
                input_ids=torch.tensor([[token]]), past_key_values=past.past_key_values
            )
            assert_close(run.step({0: [token]})[0], past.logits[0])


def test_rope_scaling_factor_is_dynamic_ntk(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", max_position_embeddings=24)
    spec = with_rope_scaling_factor(read_spec(folder), 2.5)
    logits = plain_logits(load_model(check_weights(folder, spec), "cpu", torch.float32), PROMPT)[0]
    edit_config(
        folder,
        rope_parameters={"rope_type": "dynamic", "factor": 2.5, "rope_theta": 10000.0},
    )
    assert_close(logits, reference_logits(folder, PROMPT))


@pytest.mark.parametrize("kind_key", ["type", "rope_type"])
def test_old_and_new_rope_keys_read_alike(kind_key, tmp_path):
    rope = ROPES["llama3"]
    folder = make_checkpoint(tmp_path, "llama", rope_parameters=rope | {"rope_theta": 5000.0})
    new = read_spec(folder)
    old_rope = {kind_key if key == "rope_type" else key: value for key, value in rope.items()}
    edit_config(
        folder,
        remove=("rope_parameters", "dtype"),
        rope_scaling=old_rope,
        rope_theta=5000.0,
        torch_dtype="float32",
    )
    assert read_spec(folder) == new


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp32(dtype, tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", dtype=dtype)
    exact, half = load(folder), load(folder, dtype)
    expected = plain_logits(exact, PROMPT)[0]
    run = PagedRun(half)
    logits = torch.cat(
        [run.step({0: PROMPT[:50]})[0]] + [run.step({0: [t]})[0] for t in PROMPT[50:]]
    )
    assert logits.dtype == torch.float32
    assert_close(logits, expected, tolerance=0.05 * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_checkpoints_load_into_fp32_exactly(dtype, tmp_path):
    folder = make_checkpoint(tmp_path, "llama", dtype=dtype)
    assert read_spec(folder).dtype == str(dtype).removeprefix("torch.")
    assert_close(plain_logits(load(folder), PROMPT)[0], reference_logits(folder, PROMPT))


@pytest.mark.parametrize("family", ["llama", "qwen2", "internlm2", "llava"])
@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.bfloat16])
def test_awq_equals_its_dequantized_twin(family, scales_dtype, tmp_path):
    source = make_checkpoint(tmp_path / "fp", family, num_attention_heads=3, num_key_value_heads=1)
    awq, twin = make_awq(source, tmp_path / "awq", scales_dtype=scales_dtype)
    assert read_spec(awq).quant.group_size == 8
    model = load(awq)
    assert_close(plain_logits(model, PROMPT)[0], plain_logits(load(twin), PROMPT)[0])
    assert_close(plain_logits(model, PROMPT)[0], reference_logits(twin, PROMPT))


def test_awq_keeps_unconverted_modules_and_reads_old_quant_config(tmp_path):
    source = make_checkpoint(tmp_path / "fp", "llama")
    awq, twin = make_awq(source, tmp_path / "awq", group_size=-1, keep=("down_proj", "self_attn"))
    edit_config(awq, remove=("quantization_config",))
    old = {"w_bit": 4, "q_group_size": -1, "version": "GEMM", "zero_point": True}
    old["modules_to_not_convert"] = ["down_proj", "self_attn"]
    (awq / "quant_config.json").write_text(json.dumps(old))
    assert_close(plain_logits(load(awq), PROMPT)[0], plain_logits(load(twin), PROMPT)[0])


LLAVA_PREFIXES = {
    "as-saved": {},
    "vision_model": {"vision_tower.": "vision_tower.vision_model."},
    "new": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "newest": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("layer", "strategy"), [(-2, "default"), (2, "full"), ([-3, -1, 0], "default")]
)
def test_llava_with_pictures_equals_the_reference(family, layer, strategy, tmp_path):
    folder = make_checkpoint(
        tmp_path,
        "llava",
        text_family=family,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    model = load(folder)
    num_rows = model.spec.vision.num_image_tokens
    assert num_rows == (17 if strategy == "full" else 16)
    picture = [IMAGE_TOKEN] * num_rows
    tokens = [*PROMPT[:5], *picture, *PROMPT[5:9], *picture, *PROMPT[9:12]]
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        images = model.vision.encode(pixels)
        assert images.shape == (2, num_rows, model.spec.hidden_size)
        hidden = model.decoder.embed(torch.tensor(tokens))
        hidden[torch.tensor(tokens) == IMAGE_TOKEN] = images.flatten(0, 1)
    run = PagedRun(model)
    logits = [
        run.step({0: tokens[:20]}, hidden[:20])[0],
        run.step({0: tokens[20:]}, hidden[20:])[0],
    ]
    assert_close(torch.cat(logits), reference_logits(folder, tokens, pixels))


@pytest.mark.parametrize("prefixes", LLAVA_PREFIXES)
def test_llava_loads_under_every_prefix_in_the_wild(prefixes, tmp_path):
    folder = make_checkpoint(tmp_path, "llava")
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    tokens = [*PROMPT[:3], *[IMAGE_TOKEN] * 16, *PROMPT[3:9]]
    expected, rows = reference_logits(folder, tokens), load(folder)
    with torch.inference_mode():
        expected_rows = rows.vision.encode(pixels)
    rename_tensors(folder, LLAVA_PREFIXES[prefixes])
    model = load(folder)
    assert_close(plain_logits(model, tokens)[0], expected)
    with torch.inference_mode():
        assert_close(model.vision.encode(pixels), expected_rows, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "variant", ["llama", "mistral-window", "qwen3", "internlm2", "llama-dynamic", "llava"]
)
def test_cuda_equals_the_cpu(variant, tmp_path):
    family, overrides = VARIANTS[variant]
    folder = make_checkpoint(tmp_path, family, max_position_embeddings=24, **overrides)
    spec = read_spec(folder)
    runs = [
        PagedRun(load_model(check_weights(folder, spec), name, torch.float32))
        for name in ("cpu", "cuda")
    ]
    for chunks in ({0: PROMPT[:30], 1: PROMPT[:9]}, {0: [5], 2: PROMPT[:17]}, {0: [6], 1: [7]}):
        cpu, cuda = (run.step(chunks) for run in runs)
        for s in chunks:
            assert_close(cuda[s].cpu(), cpu[s], tolerance=1e-3)
