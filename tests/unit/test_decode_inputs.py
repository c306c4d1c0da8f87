"""The buffer of a step's inputs, and its padding for decode graphs, on the CPU."""

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.graphs import batch_buckets, reserved_bytes
from engine.inputs import InputLayout, decode_inputs, write_inputs
from engine.models.families import read_spec
from engine.models.weights import check_weights, load_model
from engine.runner import Runner
from engine.scheduler import Work
from engine.sequence import Sequence
from engine.types import SamplingParams
from tests.tiny import make_checkpoint

BLOCK_SIZE = 4
CPU = torch.device("cpu")


def make_sequence(length, first_block, num_computed=0):
    sequence = Sequence(
        [(7 * i + length) % 250 for i in range(length)], SamplingParams(), max_tokens=99
    )
    sequence.block_table = list(range(first_block, first_block + length // BLOCK_SIZE + 1))
    sequence.num_computed = num_computed
    return sequence


@pytest.mark.parametrize(
    ("max_rows", "expected"),
    [
        (1, (1,)),
        (3, (1, 2, 4)),
        (8, (1, 2, 4, 8)),
        (9, (1, 2, 4, 8, 16)),
        (40, (1, 2, 4, 8, 16, 32, 48)),
        (256, (1, 2, 4, 8, *range(16, 257, 16))),
    ],
)
def test_batch_sizes_reach_the_largest_batch(max_rows, expected):
    assert batch_buckets(max_rows) == expected


@pytest.mark.parametrize("length", [1, 4, 9, 31])
@pytest.mark.parametrize("has_rope_lens", [False, True])
def test_views_of_one_buffer_hold_the_step(length, has_rope_lens):
    reading, decoding = make_sequence(length, 3), make_sequence(13, 40, num_computed=12)
    work = [Work(decoding, 1), Work(reading, length)]
    layout = InputLayout(length + 1, 2, 9, has_rope_lens)
    buffer = torch.full((layout.num_words,), -7, dtype=torch.int32)
    write_inputs(layout, buffer, work, BLOCK_SIZE)
    views = layout.device_views(buffer)
    positions = [12, *range(length)]
    starts = [43 * BLOCK_SIZE, *range(3 * BLOCK_SIZE, 3 * BLOCK_SIZE + length)]
    assert views["input_ids"].tolist() == [decoding.tokens[12], *reading.tokens]
    assert views["positions"].tolist() == positions
    assert views["slots"].tolist() == starts
    assert views["cu_seqlens"].tolist() == [0, 1, length + 1]
    assert views["context_lens"].tolist() == [13, length]
    tables = [decoding.block_table, reading.block_table]
    assert views["block_tables"].tolist() == [t + [0] * (9 - len(t)) for t in tables]
    if has_rope_lens:
        assert views["rope_lens"].tolist() == [13, *[length] * length]
    starts = [view.storage_offset() * view.element_size() % 16 for view in views.values()]
    assert not any(starts), "a pointer that 16 does not divide compiles every kernel again"


def test_a_step_ahead_is_one_position_further_and_knows_no_ids():
    sequence = make_sequence(13, 40, num_computed=12)
    layout = InputLayout(2, 2, 6)
    buffer = torch.empty(layout.num_words, dtype=torch.int32)
    write_inputs(layout, buffer, [Work(sequence, 1)], BLOCK_SIZE, ahead=1)
    views = layout.device_views(buffer)
    assert views["input_ids"].tolist() == [0, 0]
    assert views["positions"].tolist() == [13, 0]
    assert views["slots"].tolist() == [43 * BLOCK_SIZE + 1, -1]
    assert views["context_lens"].tolist() == [14, 0]
    assert views["cu_seqlens"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "overrides", [{}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}]
)
@pytest.mark.parametrize("quant_policy", [0, 8])
def test_padding_changes_no_row_and_stores_nothing(tmp_path, quant_policy, overrides):
    folder = make_checkpoint(tmp_path, **overrides)
    model = load_model(check_weights(folder, read_spec(folder)), CPU, torch.float32)
    config = EngineConfig(
        folder, cache_tokens=200, cache_block_seq_len=BLOCK_SIZE, quant_policy=quant_policy
    )
    runner = Runner(model, config, CPU, session_len=100)
    sequences = [make_sequence(length, 10 * n) for n, length in enumerate((5, 17, 26))]
    for sequence in sequences:
        runner.forward([Work(sequence, sequence.num_tokens)])
        sequence.num_computed = sequence.num_tokens
        sequence.tokens.append(11)
    work = [Work(sequence, 1) for sequence in sequences]
    expected = runner.forward(work)
    before = [cache.k.clone() for cache in runner._kv]

    layout = InputLayout(8, 8, 25, has_rope_lens=bool(overrides))
    buffer = torch.empty(layout.num_words, dtype=torch.int32)
    write_inputs(layout, buffer, work, BLOCK_SIZE)
    inputs = decode_inputs(layout, buffer, max_context_len=100)
    with torch.inference_mode():
        decoder = model.decoder
        hidden = decoder.forward(decoder.embed(inputs.input_ids), inputs, runner._kv)
        padded = decoder.logits(hidden)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:3], expected)
    for cache, was in zip(runner._kv, before, strict=True):
        torch.testing.assert_close(cache.k, was)


def test_a_graph_never_exceeds_the_batch_and_zero_turns_graphs_off():
    assert EngineConfig("m", max_batch_size=24).largest_graph == 24
    assert EngineConfig("m", max_batch_size=24, cuda_graph_max_batch=99).largest_graph == 24
    assert EngineConfig("m", cuda_graph_max_batch=0).largest_graph == 0
    for wrong in (-1, 1.5, True):
        with pytest.raises(ConfigError, match="cuda_graph_max_batch"):
            EngineConfig("m", cuda_graph_max_batch=wrong)


def test_the_memory_set_aside_grows_with_the_batch(tmp_path):
    spec = read_spec(make_checkpoint(tmp_path))
    assert reserved_bytes(spec, 0) == 0
    assert 0 < reserved_bytes(spec, 1) < reserved_bytes(spec, 64) < 2**30
