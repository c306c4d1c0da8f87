"""Loading: shards, ties, links, progress and memory, and a sentence for every broken checkpoint."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine import Engine, EngineConfig
from engine.errors import CapacityError, ModelError
from engine.models import weights
from engine.models.families import read_spec
from engine.models.weights import check_weights, load_model
from tests.paged import plain_logits
from tests.tiny import (
    edit_config,
    load_folder,
    make_awq,
    make_checkpoint,
    save_folder,
    tiny_tokenizer,
)

PROMPT = list(range(20, 41))
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint(tmp_path / "model", "llama")


def check(folder):
    check_weights(folder, read_spec(folder))


def logits(folder):
    return plain_logits(
        load_model(check_weights(folder, read_spec(folder)), "cpu", torch.float32), PROMPT
    )[0]


def refuses(folder, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        check(folder)


def change(folder, **tensors):
    """Replace (or with None, drop) tensors; keyword names use __ for a dot."""
    content = load_folder(folder)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        content.pop(name, None)
        if tensor is not None:
            content[name] = tensor
    save_folder(folder, content)


def shard(folder, num_shards=3):
    save_folder(folder, load_folder(folder), num_shards=num_shards)
    return sorted(folder.glob("*.safetensors"))


def test_shards_with_and_without_an_index_load_alike(folder):
    expected = logits(folder)
    assert len(shard(folder)) == 3
    assert torch.equal(logits(folder), expected)
    (folder / "model.safetensors.index.json").unlink()
    assert torch.equal(logits(folder), expected)


def test_transformers_own_shards_load(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    check(folder)


def test_links_into_a_hub_cache_are_followed(folder, tmp_path):
    expected = logits(folder)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    shard(folder)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    assert torch.equal(logits(snapshot), expected)


def test_progress_counts_every_byte_once(folder):
    calls = []
    spec = read_spec(folder)
    model = load_model(
        check_weights(folder, spec), "cpu", torch.bfloat16, lambda *call: calls.append(call)
    )
    total = sum(t.nbytes for t in load_folder(folder).values())
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1] == (total, total)
    assert {call[1] for call in calls} == {total}
    assert model.weight_bytes == total // 2


def test_weight_bytes_counts_a_tied_head_once(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    model = load_model(check_weights(folder, read_spec(folder)), "cpu", torch.float32)
    assert model.decoder.head.weight is model.decoder.embed_weight
    assert model.weight_bytes == sum(t.nbytes for t in load_folder(folder).values())


def test_a_tied_head_on_disk_is_used_unless_it_is_the_embedding(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    tied = logits(folder)
    embed = load_folder(folder)[EMBED]
    change(folder, lm_head__weight=embed)
    assert torch.equal(logits(folder), tied)
    change(folder, lm_head__weight=2 * embed)
    torch.testing.assert_close(logits(folder), 2 * tied)
    change(folder, lm_head__weight=embed, model__embed_tokens__weight=None)
    assert torch.equal(logits(folder), tied)


def test_an_engine_compares_a_tied_head_once(tmp_path, monkeypatch):
    folder = tiny_tokenizer(make_checkpoint(tmp_path, "llama", tie_word_embeddings=True))
    change(folder, lm_head__weight=load_folder(folder)[EMBED])
    compared, same_values = [], weights._same_values
    monkeypatch.setattr(
        weights, "_same_values", lambda *names: compared.append(names) or same_values(*names)
    )
    Engine.load(EngineConfig(model=folder, device="cpu", cache_tokens=512)).close()
    assert len(compared) == 1


def test_harmless_extras_are_accepted(folder):
    expected = logits(folder)
    change(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(6))
    assert torch.equal(logits(folder), expected)


def test_llava_position_ids_are_accepted(tmp_path):
    folder = make_checkpoint(tmp_path, "llava")
    ids = torch.arange(17)[None]
    change(folder, vision_tower__vision_model__embeddings__position_ids=ids)
    check(folder)


def test_missing_tensors_are_counted_and_the_first_is_named(folder):
    change(folder, **{DOWN.replace(".", "__"): None, "model__norm__weight": None})
    refuses(folder, f"Checkpoint lacks 2 tensors, first: {DOWN}.")


def test_an_untied_head_may_not_be_missing(folder):
    change(folder, lm_head__weight=None)
    refuses(folder, f"Checkpoint lacks 1 tensor, first: {HEAD}.")


def test_surplus_tensors_are_named(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    change(folder, **{name.replace(".", "__"): torch.ones(72)})
    refuses(folder, f"Checkpoint has 1 tensor that this model does not use, first: {name}.")


def test_a_wrong_shape_is_named(folder):
    change(folder, **{DOWN.replace(".", "__"): torch.ones(72, 103)})
    refuses(folder, f"{DOWN} has shape [72, 103]; config.json asks for [72, 104].")


@pytest.mark.parametrize(("dtype", "name"), [(torch.int32, "I32"), (torch.float64, "F64")])
def test_a_wrong_type_is_named(dtype, name, folder):
    change(folder, **{DOWN.replace(".", "__"): torch.ones(72, 104, dtype=dtype)})
    refuses(folder, f"{DOWN} is {name}; expected F16 or BF16 or F32.")


def test_awq_integers_must_be_int32(folder, tmp_path):
    awq, _ = make_awq(folder, tmp_path / "awq", keep=("self_attn",))
    name = "model.layers.0.mlp.up_proj.qzeros"
    change(awq, **{name.replace(".", "__"): torch.zeros(9, 13)})
    refuses(awq, f"{name} is F32; expected I32.")


def test_a_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    refuses(folder, "model.safetensors is truncated: its tensors take")
    os.truncate(file, 100)
    refuses(folder, "model.safetensors is truncated at 100 bytes. Download it again.")
    os.truncate(file, 3)
    refuses(folder, "model.safetensors is truncated at 3 bytes.")


def write_header(folder, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"\xff",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}',
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}},
        {"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": 5},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
def test_a_corrupt_header_is_named(header, folder):
    write_header(folder, header)
    refuses(folder, "model.safetensors")


def test_an_oversize_header_is_not_read(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refuses(folder, "safetensors allows 100,000,000. It is corrupt or of another format.")


def test_a_tensor_in_two_shards_is_named(folder):
    files = shard(folder)
    content = weights.read_headers(folder)
    name = next(n for n, entry in content.items() if entry.file == files[0])
    (folder / "model.safetensors.index.json").unlink()
    save_file({name: load_folder(folder)[name]}, folder / "model-extra.safetensors")
    refuses(folder, f"{name} is in both")


def test_a_missing_shard_is_named(folder):
    shard(folder)[1].unlink()
    refuses(
        folder,
        "model.safetensors.index.json names 1 of 3 files that are not in the folder, "
        "first: model-00002-of-00003.safetensors. Complete the download.",
    )


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/x.safetensors", "a\\b", "x.bin", 5])
def test_an_index_may_only_name_files_beside_it(file, folder):
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][EMBED] = file
    path.write_text(json.dumps(index))
    refuses(folder, f"{EMBED} is in {file!r}; expected the plain name of a safetensors file.")


def test_an_index_that_names_the_wrong_shard_is_refused(folder):
    files = shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    wrong = next(f.name for f in files if f.name != index["weight_map"][EMBED])
    index["weight_map"][EMBED] = wrong
    path.write_text(json.dumps(index))
    refuses(folder, f"{wrong} does not hold {EMBED} (1 tensor misplaced).")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_a_broken_index_is_named(content, folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    refuses(folder, "model.safetensors.index.json")


def test_an_index_that_cannot_be_read_is_named(folder):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.unlink()
    index.mkdir()
    refuses(folder, "model.safetensors.index.json cannot be read: Is a directory.")


def test_pickled_weights_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(folder, "only pytorch_model.bin; only safetensors is read")
    refuses(folder, ".save_pretrained('NEW')")


def test_an_empty_folder_is_named(folder):
    (folder / "model.safetensors").unlink()
    refuses(folder, "has no safetensors file; expected model.safetensors or shards of it.")


def test_a_full_gpu_is_a_capacity_error(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with pytest.raises(CapacityError, match=r"weights need [\d,]+ bytes of GPU memory; 1,000 are"):
        load_model(check_weights(folder, read_spec(folder)), "cuda", torch.float32)


MEMORY_PROBE = """
import resource, sys, torch
from pathlib import Path
from engine.models.families import read_spec
from engine.models.weights import check_weights, load_model
folder = Path(sys.argv[1])
spec = read_spec(folder)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(check_weights(folder, spec), "cpu", torch.float16)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 - model.weight_bytes)
"""


@pytest.mark.slow
def test_the_host_holds_one_shard_at_most_beside_the_model(tmp_path):
    """A checkpoint of about 600 MB in fp32 shards of 150 MB, loaded as fp16 in a fresh process."""
    folder = make_checkpoint(
        tmp_path,
        "llama",
        shard_size="150MB",
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=12,
        vocab_size=1000,
    )
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")]
    assert sum(sizes) > 500e6
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    extra = int(result.stdout)
    assert extra < max(sizes) + 100e6, f"{extra / 1e6:.0f} MB beside the model"


def test_a_config_with_more_layers_than_the_weights_is_refused(folder):
    edit_config(folder, num_hidden_layers=4)
    refuses(folder, "Checkpoint lacks 9 tensors, first: model.layers.3.input_layernorm.weight.")
