"""Attention over the paged KV cache on one GPU: microseconds, TB/s and the share of the memory roof.

    python -m tests.bench.bench_attention --output DIR [--sweep]

Correctness comes first: a form that fails its check is not timed. Every figure is the median of
CUDA-graph replays over scattered blocks; a graph walks through sequences whose caches together exceed
300 MB, so the 60 MB L2 never holds them. The roof is bytes / 4.6 TB/s, the read bandwidth of a plain
streaming kernel on an H200. Workers compile every variant first, into Triton's cache on disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels import attention, fused, kv_store
from engine.kernels.attention import Launch
from engine.kernels.kv_quant import CalibratedKV, KVQuant, OnlineKV
from engine.layers.kv_cache import strided_zeros
from tests.bench import results_file
from tests.kernels.paged_pool import FORMS, make_pool, relative_error

ROOF_TB_S = 4.6
BLOCK_SIZE, HEAD_SIZE = 64, 128
NUM_BLOCKS = 4096  # 64 sequences of 4,096 tokens, or 8 of 32,768
ROTATED_BYTES = 300e6
MODELS = {"7B": (32, 32), "8B": (32, 8)}  # query heads, KV heads
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
SWEEP_LAUNCHES = [
    Launch(16, 32, 4, 3), Launch(16, 64, 4, 2), Launch(16, 64, 4, 4), Launch(16, 64, 8, 3),
    Launch(16, 128, 4, 2), Launch(16, 128, 4, 3), Launch(16, 128, 8, 3),
]  # fmt: skip
SWEEP_FORMS = ("plain", "online int8", "calibrated int8", "online int4")
SWEEP_PREFILL = [Launch(128, 64, 8, 2), Launch(64, 64, 4, 3), Launch(128, 128, 8, 2)]
NUM_WORKERS = 14


@dataclass
class BenchPool:
    """A full cache of one model and form, and the blocks' random order."""

    k: Tensor
    v: Tensor
    quant: KVQuant | None
    order: Tensor
    num_heads: int
    counters: Tensor

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, with their scales and zeros if these are stored."""
        per_head = self.k.shape[3] * self.k.element_size()
        if isinstance(self.quant, OnlineKV):
            per_head += 4
        return 2 * self.k.shape[2] * per_head

    def tables(self, batch: int, context: int) -> Iterator[Tensor]:
        """Block tables [batch, context / BLOCK_SIZE] of disjoint sequences, as many as rotation needs."""
        width = context // BLOCK_SIZE
        sets = self.order.view(-1, batch, width)
        needed = -(-ROTATED_BYTES // (batch * context * self.token_bytes))
        yield from sets[: int(max(1, min(needed, sets.shape[0])))]


def make_bench_pool(
    model: str, form: str, num_blocks: int = NUM_BLOCKS, head_major: bool = True
) -> BenchPool:
    num_heads, num_kv_heads = MODELS[model]

    def pool(width: int, dtype: torch.dtype) -> Tensor:
        shape = (num_blocks, BLOCK_SIZE, num_kv_heads, width)
        return strided_zeros(shape, dtype, "cuda", head_major)

    quant = None
    if FORMS[form] is None:
        k, v = pool(HEAD_SIZE, torch.float16).normal_(), pool(HEAD_SIZE, torch.float16).normal_()
    else:
        kind, bits = FORMS[form]
        k, v = (pool(HEAD_SIZE * bits // 8, torch.uint8).random_(0, 256) for _ in range(2))
        if kind == "online":
            params = [pool(2, torch.float16) for _ in range(2)]
            for p in params:
                p[..., 0] = 6 / 2**bits
                p[..., 1] = -3
            quant = OnlineKV(bits, *params)
        else:
            scale = torch.full((num_kv_heads, HEAD_SIZE), 6 / 2**bits, device="cuda")
            zero = torch.full_like(scale, -3)
            quant = CalibratedKV(bits, scale, zero, scale, zero)
    order = torch.randperm(num_blocks, device="cuda").int()
    counters = torch.zeros(2**16, dtype=torch.int32, device="cuda")
    return BenchPool(k, v, quant, order, num_heads, counters)


def decode_call(pool: BenchPool, table: Tensor, context: int, **options: object) -> Tensor:
    batch = table.shape[0]
    q = torch.randn(batch, pool.num_heads, HEAD_SIZE, dtype=torch.float16, device="cuda")
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    return lambda: attention.paged_attention(
        q, pool.k, pool.v, table, lens, starts, (1,) * batch, context, batch, HEAD_SIZE**-0.5,
        None, pool.quant, pool.counters, **options,
    )  # fmt: skip


def prefill_call(pool: BenchPool, table: Tensor, length: int, **options: object) -> Tensor:
    q = torch.randn(length, pool.num_heads, HEAD_SIZE, dtype=torch.float16, device="cuda")
    lens = torch.tensor([length], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    return lambda: attention.paged_attention(
        q, pool.k, pool.v, table, lens, starts, (length,), length, 0, HEAD_SIZE**-0.5,
        None, pool.quant, pool.counters, **options,
    )  # fmt: skip


def median_us(calls: list[Callable[[], object]], budget_ms: float = 60) -> float:
    """Microseconds of one call: all of them in one CUDA graph, replayed; the median replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    spent = 0.0
    while len(times) < 4 or (spent < budget_ms and len(times) < 40):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        spent += times[-1]
    return 1e3 * sorted(times[1:])[len(times[1:]) // 2] / len(calls)


class Report:
    """Rows as they come, failures beside them; the table is printed last."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.failures: list[str] = []
        self.began = time.monotonic()

    def add(self, name: str, us: float, moved_bytes: float = 0, **extra: object) -> None:
        row = {"name": name, "us": round(us, 2), **extra}
        if moved_bytes:
            row["tb_s"] = round(moved_bytes / us * 1e-6, 3)
            row["roof_us"] = round(moved_bytes / ROOF_TB_S * 1e-6, 2)
            row["roof_share"] = round(row["roof_us"] / us, 3)
        self.rows.append(row)

    def guard(self, name: str, run: Callable[[], None]) -> None:
        """A failure is printed and kept; the next section runs."""
        begin = time.monotonic()
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - one failure must not hide the other sections
            self.failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            print(f"FAILED {name}", flush=True)
            traceback.print_exc(limit=4)
        torch.cuda.empty_cache()
        now = time.monotonic()
        print(f"[{now - self.began:6.1f} s] {name}: {now - begin:.1f} s", flush=True)

    def print_table(self) -> None:
        print(f"{'':58} {'us':>9} {'TB/s':>6} {'roof':>6}")
        for row in self.rows:
            share = f"{row['tb_s']:6.2f} {row['roof_share']:6.1%}" if "tb_s" in row else ""
            rest = {k: v for k, v in row.items() if k in ("tflops", "error")}
            print(f"{row['name']:58} {row['us']:9.1f} {share} {rest or ''}")
        for failure in self.failures:
            print("FAILED", failure)


def check_form(form: str, dtype: torch.dtype) -> float:
    """The largest relative error over decode with and without splits, and prefill over prefixes."""
    worst = 0.0
    batches = {
        "decode": ((1, 63, 64, 1000, 0, 2311), (1,) * 6, 6),
        "prefill": ((700, 1000, 65), (700, 129, 2), 0),
    }
    for contexts, query_lens, num_decodes in batches.values():
        for heads in ((4, 4), (8, 2)):
            pool = make_pool(
                contexts, query_lens, num_decodes, num_heads=heads[0], num_kv_heads=heads[1],
                head_size=HEAD_SIZE, block_size=BLOCK_SIZE, dtype=dtype, form=form,
                head_major=True, device="cuda",
            )  # fmt: skip
            expected = pool.expected(HEAD_SIZE**-0.5, None)
            for num_splits in (1, 5):
                torch.empty_like(pool.q).fill_(float("nan"))
                out = attention.paged_attention(
                    pool.q, pool.k_cache, pool.v_cache, pool.tables, pool.context_lens,
                    pool.cu_seqlens, pool.query_lens, max(contexts), num_decodes,
                    HEAD_SIZE**-0.5, None, pool.quant, num_splits=num_splits,
                )  # fmt: skip
                worst = max(worst, relative_error(out, expected))
    return worst


def check(report: Report) -> set[str]:
    """Forms that passed in fp16 and bf16."""
    passed = set(FORMS)
    for form in FORMS:
        for dtype, tolerance in TOLERANCE.items():
            name = f"check {form} {dtype}"

            def run(form: str = form, dtype: torch.dtype = dtype, bound: float = tolerance) -> None:
                error = check_form(form, dtype)
                print(f"  {form:16} {dtype!s:15} relative error {error:.2e} (bound {bound:.0e})")
                if not error < bound:
                    passed.discard(form)
                    raise AssertionError(f"relative error {error:.2e}, bound {bound:.0e}")

            failures = len(report.failures)
            report.guard(name, run)
            if len(report.failures) > failures:
                passed.discard(form)
    return passed


def bench_form(report: Report, model: str, form: str) -> None:
    pool = make_bench_pool(model, form)
    for batch, context in ((64, 4096), (1, 4096), (1, 32768)):
        calls = [decode_call(pool, table, context) for table in pool.tables(batch, context)]
        moved = batch * context * pool.token_bytes
        report.add(
            f"decode {model} {form} batch {batch} context {context}", median_us(calls), moved
        )
    flops = 4 * 4096**2 / 2 * HEAD_SIZE * pool.num_heads
    us = median_us([prefill_call(pool, table, 4096) for table in pool.order.view(64, 1, 64)[:4]])
    report.add(f"prefill {model} {form} 4096 tokens", us, tflops=round(flops / us * 1e-6))


def bench_slot_major(report: Report) -> None:
    """The CPU's layout, whose rows of one head lie K rows apart."""
    for form in ("plain", "online int8"):
        pool = make_bench_pool("7B", form, head_major=False)
        calls = [decode_call(pool, table, 4096) for table in pool.tables(64, 4096)]
        moved = 64 * 4096 * pool.token_bytes
        report.add(f"decode 7B {form} batch 64 context 4096, slot-major", median_us(calls), moved)
        del pool, calls


def bench_sdpa(report: Report) -> None:
    """torch's own attention over contiguous caches: what paging and splitting cost or gain."""
    attend = torch.nn.functional.scaled_dot_product_attention
    for model, (num_heads, num_kv_heads) in MODELS.items():
        for batch in (64, 1):
            sets = 1 if batch == 64 else 8
            shape = (sets, batch, num_kv_heads, 4096, HEAD_SIZE)
            k, v = (torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2))
            q = torch.randn(batch, num_heads, 1, HEAD_SIZE, dtype=torch.float16, device="cuda")
            gqa = num_heads != num_kv_heads
            calls = [
                lambda i=i, q=q, k=k, v=v, gqa=gqa: attend(q, k[i], v[i], enable_gqa=gqa)
                for i in range(sets)
            ]
            moved = 2 * k[0].nbytes
            report.add(
                f"torch SDPA decode {model} batch {batch} context 4096", median_us(calls), moved
            )
            del k, v, calls
        q = torch.randn(1, num_heads, 4096, HEAD_SIZE, dtype=torch.float16, device="cuda")
        k, v = (q[:, :num_kv_heads].clone() for _ in range(2))
        gqa = num_heads != num_kv_heads
        us = median_us([lambda q=q, k=k, v=v, g=gqa: attend(q, k, v, is_causal=True, enable_gqa=g)])
        flops = 4 * 4096**2 / 2 * HEAD_SIZE * num_heads
        report.add(f"torch SDPA prefill {model} 4096 tokens", us, tflops=round(flops / us * 1e-6))


def small_ops(rows: int) -> dict[str, Callable[[], object]]:
    """The other launches of a 7B decode layer, plain and over the partial sums of a split-K product."""

    def randn(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device="cuda")

    pool = make_bench_pool("7B", "online int8", num_blocks=64)
    cos, sin = (randn(rows, HEAD_SIZE, dtype=torch.float32) for _ in range(2))
    slots = torch.arange(rows, device="cuda")
    qkv, qkv_sums = randn(rows, 12288), randn(4, rows, 12288, dtype=torch.float32)
    x, residual, weight = randn(rows, 4096), randn(rows, 4096), randn(4096)
    sums = randn(8, rows, 4096, dtype=torch.float32)
    gate_up, gate_up_sums = randn(rows, 22016), randn(3, rows, 22016, dtype=torch.float32)

    def store(x: Tensor, **options: object) -> Tensor:
        return kv_store.rotate_and_store(
            x, cos, sin, None, None, 0.0, pool.k, pool.v, slots, pool.quant, **options
        )

    return {
        "rotate_and_store int8": lambda: store(qkv),
        "rotate_and_store int8, 4 partials": lambda: store(qkv_sums, dtype=torch.float16),
        "add_rms_norm": lambda: fused.add_rms_norm(x, residual, weight, 1e-5),
        "add_rms_norm, 8 partials": lambda: fused.add_rms_norm_partials(
            sums, None, residual, weight, 1e-5
        ),
        "silu_and_mul": lambda: fused.silu_and_mul(gate_up),
        "silu_and_mul, 3 partials": lambda: fused.silu_and_mul_partials(
            gate_up_sums, None, torch.float16
        ),
    }


def bench_small_ops(report: Report) -> None:
    """Warm in L2, as they are in a layer: their inputs were just written."""
    for rows in (1, 64):
        for name, call in small_ops(rows).items():
            report.add(f"{name}, {rows} rows of 7B", median_us([call] * 20, budget_ms=5))


def sweep(report: Report, passed: set[str]) -> None:
    """Other launches at batch 64 and batch 1; the numbers for decode_launch and count_splits."""
    for model in MODELS:
        for form in (f for f in SWEEP_FORMS if f in passed):
            pool = make_bench_pool(model, form)
            group = MODELS[model][0] // MODELS[model][1]
            chosen = attention.decode_launch(group, HEAD_SIZE, pool.k.dtype, torch.float16)
            for batch, splits in ((64, (1, 2, 3, 8, 16)), (1, (4, 8, 16, 32, 64))):
                tables = list(pool.tables(batch, 4096))
                moved = batch * 4096 * pool.token_bytes
                for launch in (chosen, *SWEEP_LAUNCHES):
                    for num_splits in splits:
                        name = f"sweep {model} {form} batch {batch} {_short(launch)} x{num_splits}"

                        def run(
                            pool: BenchPool = pool,
                            tables: list[Tensor] = tables,
                            options: dict = dict(decode=launch, num_splits=num_splits),  # noqa: B006
                            name: str = name,
                            moved: float = moved,
                        ) -> None:
                            calls = [decode_call(pool, t, 4096, **options) for t in tables]
                            report.add(name, median_us(calls, budget_ms=8), moved)

                        try:
                            run()
                        except Exception as error:  # noqa: BLE001 - a launch may not fit
                            report.failures.append(f"{name}: {str(error)[:120]}")
            del pool
            torch.cuda.empty_cache()


def sweep_prefill(report: Report) -> None:
    for model in MODELS:
        pool = make_bench_pool(model, "plain", num_blocks=256)
        flops = 4 * 4096**2 / 2 * HEAD_SIZE * pool.num_heads
        for launch in SWEEP_PREFILL:
            table = pool.order.view(4, 1, 64)[0]
            us = median_us([prefill_call(pool, table, 4096, prefill=launch)], budget_ms=10)
            name = f"sweep prefill {model} plain {_short(launch)}"
            report.add(name, us, tflops=round(flops / us * 1e-6))


def _short(launch: Launch) -> str:
    return f"M{launch.block_m} N{launch.block_n} w{launch.num_warps} s{launch.num_stages}"


def compile_jobs(with_sweep: bool) -> list[Callable[[], object]]:
    """Small calls that compile every variant that the sections launch."""
    jobs: list[Callable[[], object]] = []
    for form in FORMS:
        for dtype in TOLERANCE:
            jobs.append(lambda form=form, dtype=dtype: check_form(form, dtype))
        for model in MODELS:

            def small(form: str = form, model: str = model) -> None:
                pool = make_bench_pool(model, form, num_blocks=64)
                for num_splits in (1, 2):
                    decode_call(pool, pool.order.view(1, 64), 4096, num_splits=num_splits)()
                prefill_call(pool, pool.order.view(1, 64), 4096)()

            jobs.append(small)
            if with_sweep and form in SWEEP_FORMS:
                for launch in SWEEP_LAUNCHES:

                    def swept(
                        form: str = form, model: str = model, launch: Launch = launch
                    ) -> None:
                        pool = make_bench_pool(model, form, num_blocks=64)
                        table = pool.order.view(1, 64)
                        for splits in (1, 2):
                            decode_call(pool, table, 4096, decode=launch, num_splits=splits)()

                    jobs.append(swept)
    jobs += [lambda rows=rows: [call() for call in small_ops(rows).values()] for rows in (1, 64)]
    return jobs


def compile_share(worker: int, with_sweep: bool) -> None:
    for job in compile_jobs(with_sweep)[worker::NUM_WORKERS]:
        try:
            job()
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - the section that needs it reports it
            print(f"worker {worker}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def compile_all(with_sweep: bool) -> None:
    command = [sys.executable, "-m", "tests.bench.bench_attention"]
    command += ["--sweep"] if with_sweep else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, "--worker", str(n)], env=environment)
        for n in range(NUM_WORKERS)
    ]
    for worker in workers:
        worker.wait(timeout=300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=results_file.RESULTS)
    parser.add_argument("--sweep", action="store_true", help="also time other launches")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_attention needs a CUDA device; torch sees none.")
    if options.worker is not None:
        compile_share(options.worker, options.sweep)
        return
    report = Report()
    report.guard("compile", lambda: compile_all(options.sweep))
    passed = check(report)
    for model in MODELS:
        for form in (form for form in FORMS if form in passed):
            report.guard(f"{model} {form}", lambda m=model, f=form: bench_form(report, m, f))
    report.guard("slot-major", lambda: bench_slot_major(report))
    report.guard("torch SDPA", lambda: bench_sdpa(report))
    report.guard("small ops", lambda: bench_small_ops(report))
    if options.sweep:
        report.guard("sweep", lambda: sweep(report, passed))
        report.guard("sweep prefill", lambda: sweep_prefill(report))
    figures = {"rows": report.rows, "failures": report.failures, "roof_tb_s": ROOF_TB_S}
    path = results_file.save("attention", figures, options.output)
    report.print_table()
    print(f"{len(report.failures)} failures; saved to {path}")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
