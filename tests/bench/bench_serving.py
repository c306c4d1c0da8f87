"""The engine end to end on one GPU, on random weights: tokens per second and first token, beside the roof.

    python -m tests.bench.bench_serving [--output DIR] [--quick] [--budget SECONDS]

Llama-2-7B and Llama-3.1-8B shapes in fp16 and W4A16 are made directly on the GPU; tokens are greedy and
meaningless, and end by length only. Requests go through Engine.stream, one thread a stream, so tokens
per second are those that a caller sees. Figures of decoding alone (batch 1) leave out the prompt;
those of 16 and 256 streams count everything from the first request to the last token. A section that
fails has its message in place of a figure, and one that would pass the budget says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from engine import Engine, EngineConfig, Finished, Request, SamplingParams, TextDelta
from engine.inputs import InputLayout, decode_inputs, write_inputs
from engine.layers.kv_cache import allocate_kv, kv_bytes_per_block
from engine.layers.linear import AwqLinear
from engine.models.decoder import Decoder
from engine.models.families import read_spec
from engine.models.spec import ModelSpec
from engine.models.weights import Model
from engine.prompt import PromptBuilder
from tests.bench import results_file

READ_BYTES_PER_S = 4.60e12  # a plain streaming kernel on an H200
MATRIX_FLOPS = 790e12  # cuBLAS, fp16, random data
CUDA = torch.device("cuda", 0)
BLOCK_SIZE = 64
_COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "torch_dtype": "float16",
    "eos_token_id": 2,
}
MODELS = {
    "Llama-2-7B": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": 32,
        "max_position_embeddings": 8192,  # the model has 4096: room for an answer after 4096 tokens
        "rms_norm_eps": 1e-5,
    },
    "Llama-3.1-8B": _COMMON
    | {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}


class NoText:
    """A tokenizer for ids that mean nothing: each is one letter."""

    eos_token_ids: tuple[int, ...] = ()
    special_ids: frozenset[int] = frozenset()
    strips_start = 0
    bos_prefix: tuple[int, ...] = ()

    def token_bytes(self, token_id: int) -> bytes:
        return b"a"

    def control_id(self, text: str) -> int | None:
        return None


@dataclass(frozen=True)
class Roof:
    """What reading the weights and the cache, or the arithmetic, costs at least."""

    spec: ModelSpec
    weight_bytes: int  # all that a decode step reads: everything but the embedding
    quant_policy: int

    def step_s(self, streams: int, context: int) -> float:
        """One decode step."""
        kv = kv_bytes_per_block(self.spec, 1, torch.float16, self.quant_policy)
        num_bytes = self.weight_bytes + streams * context * kv
        return max(num_bytes / READ_BYTES_PER_S, streams * self._flops() / MATRIX_FLOPS)

    def prompt_s(self, length: int) -> float:
        """Matrix products of a prompt, and its attention's half square."""
        spec = self.spec
        attention = 2 * spec.num_layers * spec.num_heads * spec.head_size * length * length
        return (length * self._flops() + attention) / MATRIX_FLOPS

    def _flops(self) -> float:
        spec = self.spec
        heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_size
        layer = spec.hidden_size * (heads + 3 * spec.intermediate_size)
        return 2 * spec.num_layers * layer


class Bench:
    """Rows of the table as they come, and the time that is left."""

    def __init__(self, budget_s: float) -> None:
        self.started, self.budget_s = time.perf_counter(), budget_s
        self.rows: list[dict] = []

    @property
    def spent_s(self) -> float:
        return time.perf_counter() - self.started

    def section(self, name: str, needs_s: float, measure: Callable[[], list[dict]]) -> None:
        """Rows of `measure`, each with this section's name; a failure becomes a row."""
        if self.spent_s + needs_s > self.budget_s:
            self.rows.append(
                {"section": name, "error": f"left out: {self.spent_s:.0f} s are spent"}
            )
            return
        began = time.perf_counter()
        try:
            rows = measure()
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            rows = [{"figure": "", "error": f"{type(error).__name__}: {str(error)[:300]}"}]
        for row in rows:
            self.rows.append({"section": name} | row)
        print(f"[{self.spent_s:6.1f} s] {name}: {time.perf_counter() - began:.1f} s", flush=True)


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(0)
    torch.cuda.set_device(CUDA)
    bench = Bench(options.budget or (55 if options.quick else 140))
    for name in list(MODELS)[: 1 if options.quick else None]:
        for is_awq in (True, False):
            bench_model(bench, name, is_awq, options.quick)
            clean_up()
            figures = {"rows": bench.rows, "seconds": round(bench.spent_s, 1)}
            path = results_file.save("serving", figures, options.output)  # what there is so far
    print_table(bench.rows)
    print(f"{path}; {bench.spent_s:.0f} s")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=results_file.RESULTS)
    parser.add_argument("--quick", action="store_true", help="Llama-2-7B at batch 1 only")
    parser.add_argument("--budget", type=float, help="seconds after which sections are left out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this bench needs an NVIDIA GPU")
    return options


def bench_model(bench: Bench, name: str, is_awq: bool, quick: bool) -> None:
    kind = f"{name} {'W4A16' if is_awq else 'fp16'}"
    made: list[Model] = []

    def make() -> list[dict]:
        began = time.perf_counter()
        made.append(random_model(MODELS[name] | ({"quantization_config": AWQ} if is_awq else {})))
        torch.cuda.synchronize()
        spent = time.perf_counter() - began
        return [{"figure": "random weights made", "value": round(spent, 2), "unit": "s"}]

    bench.section(kind, 10, make)
    if not made:
        return
    model = made[0]
    bench.section(kind, 5, lambda: count_launches(model))
    bench.section(kind, 8, lambda: time_device_step(model))
    bench.section(f"{kind}, fp16 KV", 15, lambda: bench_alone(model, 0, with_first_token=True))
    bench.section(f"{kind}, int8 KV", 12, lambda: bench_alone(model, 8, with_first_token=False))
    if not quick:
        bench.section(f"{kind}, fp16 KV", 15, lambda: bench_streams(model, 0, 16))
        if is_awq:
            bench.section(f"{kind}, int8 KV", 40, lambda: bench_streams(model, 8, 256))


def clean_up() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@torch.inference_mode()
def random_model(config: dict) -> Model:
    """A Model with random weights on the GPU whose activations stay finite in fp16."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        spec = read_spec(Path(folder))
    with torch.device("meta"):
        decoder = Decoder(spec)
    decoder.to(torch.float16)
    decoder.to_empty(device=CUDA)
    for name, parameter in decoder.named_parameters():
        if parameter.dtype == torch.int32:
            parameter.random_(-(2**31), 2**31 - 1)
        elif name.endswith("scales"):
            parameter.uniform_(0.002, 0.004)
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.02)
    for module in decoder.modules():
        if isinstance(module, AwqLinear):
            module.finish_loading()
    weight_bytes = sum(p.nbytes for p in decoder.parameters())
    return Model(spec, decoder, None, weight_bytes)


def roof_of(model: Model, quant_policy: int) -> Roof:
    read = model.weight_bytes - model.decoder.embed_weight.nbytes
    return Roof(model.spec, read, quant_policy)


def make_engine(
    model: Model, quant_policy: int, streams: int, tokens: int, **options: object
) -> Engine:
    config = EngineConfig(
        "random-weights",
        device="cuda:0",
        dtype="float16",
        max_batch_size=streams,
        cache_tokens=streams * (-(-tokens // BLOCK_SIZE) + 1) * BLOCK_SIZE,
        quant_policy=quant_policy,
        **options,
    )
    tokenizer = NoText()
    prompts = PromptBuilder(Path(), model.spec, tokenizer, None)
    return Engine(model, config, CUDA, model.spec.max_position, tokenizer, prompts)


def random_prompt(length: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(vocab_size) for _ in range(length))


def run(engine: Engine, prompt: tuple[int, ...], answer: int) -> tuple[float, float, Finished]:
    """(seconds to the first token, seconds from the first to the last, the end)."""
    params = SamplingParams(temperature=0, max_new_tokens=answer, ignore_eos=True)
    began = time.perf_counter()
    first = last = 0.0
    for event in engine.stream(Request(prompt, params)):
        if isinstance(event, TextDelta):
            last = time.perf_counter()
            first = first or last
    return first - began, last - first, event


def bench_alone(model: Model, quant_policy: int, *, with_first_token: bool) -> list[dict]:
    """One stream: decode after 32 and 4096 tokens, and the first token of a long prompt."""
    engine = make_engine(model, quant_policy, 1, 4096 + 320)
    roof, size = roof_of(model, quant_policy), model.spec.vocab_size
    rows = []
    try:
        graphs = engine._runner._graphs
        rows.append(
            {"figure": "graphs", "value": list(graphs.sizes) if graphs else "none: see the log"}
        )
        run(engine, random_prompt(32, size, 0), 32)
        run(engine, random_prompt(4096, size, 1), 4)
        first_tokens = []
        for context, answer in ((32, 256), (4096, 256)):
            speeds = []
            for seed in range(3):
                first_s, decode_s, _ = run(
                    engine, random_prompt(context, size, 10 * context + seed), answer
                )
                speeds.append((answer - 1) / decode_s)
                if context == 4096:
                    first_tokens.append(first_s)
            best = 1 / roof.step_s(1, context + answer // 2)
            rows.append(figure(f"batch 1, context {context}", median(speeds), "tok/s", best))
        if with_first_token:
            best_ms = roof.prompt_s(4096) * 1e3
            name = "first token, 4096-token prompt"
            rows.append(figure(name, median(first_tokens) * 1e3, "ms", best_ms))
    finally:
        engine.close()
        clean_up()
    return rows


def bench_streams(model: Model, quant_policy: int, streams: int) -> list[dict]:
    """All streams at once, 512 tokens in and 512 out."""
    length = answer = 512
    engine = make_engine(model, quant_policy, streams, length + answer)
    roof, size = roof_of(model, quant_policy), model.spec.vocab_size
    try:
        graphs = engine._runner._graphs
        captured = len(graphs.sizes) if graphs else 0
        together(engine, size, streams, 64, 8, seed=0)
        began = time.perf_counter()
        results = together(engine, size, streams, length, answer, seed=1000)
        spent = time.perf_counter() - began
        preemptions = engine.stats().preemptions
    finally:
        engine.close()
        clean_up()
    best_s = roof.prompt_s(length) * streams + answer * roof.step_s(streams, length + answer // 2)
    produced = sum(end.usage.completion_tokens for _, _, end in results)
    row = figure(
        f"{streams} streams, {length} in / {answer} out",
        produced / spent,
        "tok/s",
        streams * answer / best_s,
    )
    first = median(first_s for first_s, _, _ in results)
    decode = median(decode_s for _, decode_s, _ in results)
    details = {
        "seconds": round(spent, 2),
        "median_first_token_s": round(first, 3),
        "median_ms_per_token": round(decode / (answer - 1) * 1e3, 3),
        "graphs": captured,
        "preemptions": preemptions,
    }
    return [row | details]


def together(
    engine: Engine, size: int, streams: int, length: int, answer: int, seed: int
) -> list[tuple[float, float, Finished]]:
    prompts = [random_prompt(length, size, seed + n) for n in range(streams)]
    gate = threading.Barrier(streams)

    def client(prompt: tuple[int, ...]) -> tuple[float, float, Finished]:
        gate.wait()
        return run(engine, prompt, answer)

    with ThreadPoolExecutor(streams) as pool:
        return list(pool.map(client, prompts))


@torch.inference_mode()
def count_launches(model: Model) -> list[dict]:
    """Kernels of one decode layer at batch 1 and 16, by torch's profiler, with their names."""
    from torch.profiler import ProfilerActivity, profile

    rows = []
    for batch in (1, 16):
        inputs, kv = decode_step(model, batch, context=512, quant_policy=0)
        decoder, layer = model.decoder, model.decoder.layers[1]
        hidden = decoder.embed(inputs.input_ids)
        rotary = decoder.rotary(inputs)
        layer(hidden, hidden, rotary, inputs, kv[1])
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            layer(hidden, hidden, rotary, inputs, kv[1])
            torch.cuda.synchronize()
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels.sort(key=lambda event: event.time_range.start)
        rows.append(
            {
                "figure": f"launches of one decode layer, batch {batch}",
                "value": len(kernels) or "the profiler saw none",
                "unit": "kernels",
                "kernels": [
                    f"{event.name[:60]} {event.time_range.elapsed_us():.1f} us" for event in kernels
                ],
            }
        )
        del inputs, kv
    return rows


@torch.inference_mode()
def time_device_step(model: Model) -> list[dict]:
    """A captured decode step alone: what is left of a figure above is the host's."""
    from engine.graphs import DecodeGraphs

    rows = []
    for batch, context in ((1, 32), (1, 4096), (16, 768)):
        inputs, kv = decode_step(model, batch, context, quant_policy=0)
        graphs = DecodeGraphs(
            model.decoder, kv, CUDA, max_rows=batch, block_size=BLOCK_SIZE,
            max_context=context + BLOCK_SIZE, has_rope_lens=False,
        )  # fmt: skip
        layout = graphs.layout_for(batch)
        if layout is None:
            raise RuntimeError("the decode step was not captured; the log says why")
        host = torch.empty(layout.num_words, dtype=torch.int32, pin_memory=True)
        write_inputs(layout, host, [], BLOCK_SIZE)
        views = layout.host_views(host)
        for name in ("input_ids", "positions", "slots", "context_lens"):
            views[name][:batch] = getattr(inputs, name).cpu().numpy()
        table = inputs.block_tables.cpu().numpy()
        views["block_tables"][:batch, : table.shape[1]] = table
        graphs.replay(layout, host, None)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(5):
            start.record()
            for _ in range(20):
                logits = graphs.replay(layout, host, None)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 20)
        if not logits.isfinite().all():
            raise RuntimeError("the logits of the random model are not finite")
        best = roof_of(model, 0).step_s(batch, context) * 1e3
        name = f"device step, batch {batch}, context {context}"
        rows.append(figure(name, median(times), "ms", best))
        del graphs, inputs, kv
        clean_up()
    return rows


def decode_step(model: Model, batch: int, context: int, quant_policy: int) -> tuple:
    """(BatchInputs of random tokens at the end of `context`, a random cache for them)."""
    blocks = -(-context // BLOCK_SIZE)
    kv = allocate_kv(model.spec, batch * blocks, BLOCK_SIZE, model.dtype, CUDA, quant_policy)
    for cache in kv:
        for pool in (cache.k, cache.v):
            pool.normal_() if pool.is_floating_point() else pool.random_(0, 256)
    layout = InputLayout(batch, batch, blocks)
    buffer = torch.zeros(layout.num_words, dtype=torch.int32, device=CUDA)
    views = layout.device_views(buffer)
    tables = torch.randperm(batch * blocks, device=CUDA).view(batch, blocks)
    views["block_tables"].copy_(tables)
    views["input_ids"].random_(0, model.spec.vocab_size)
    views["positions"].fill_(context - 1)
    views["context_lens"].fill_(context)
    views["cu_seqlens"].copy_(torch.arange(batch + 1, device=CUDA))
    views["slots"].copy_(tables[:, -1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE)
    return decode_inputs(layout, buffer, context), kv


def figure(name: str, value: float, unit: str, roof: float) -> dict:
    share = roof / value if unit in ("ms", "s") else value / roof
    return {
        "figure": name,
        "value": round(value, 3 if unit == "ms" and value < 10 else 1),
        "unit": unit,
        "roof": round(roof, 3 if unit == "ms" and roof < 10 else 1),
        "share_of_roof": round(share, 3),
    }


def print_table(rows: list[dict]) -> None:
    for row in rows:
        for kernel in row.get("kernels", ()):
            print(f"    {kernel}")
        if "kernels" in row:
            print(f"  of {row['section']}, {row['figure']}")
    print(f"\n{'model':32} {'figure':42} {'value':>10} {'roof':>10}  share")
    for row in rows:
        left = f"{row['section']:32} {row.get('figure', ''):42}"
        if "error" in row:
            print(f"{left} {row['error'][:160]}")
            continue
        share = f"{row['share_of_roof']:.0%}" if "roof" in row else ""
        value = f"{row['value']} {row.get('unit', '')}"
        extra = f"  {row['median_ms_per_token']} ms a token" if "median_ms_per_token" in row else ""
        print(f"{left} {value:>13} {row.get('roof', ''):>7}  {share}{extra}")


if __name__ == "__main__":
    main()
