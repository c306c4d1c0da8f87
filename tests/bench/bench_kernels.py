"""W4A16 matmul on one GPU: every layer of two models, beside the memory roof, cuBLAS fp16 and tinygemm.

    python -m tests.bench.bench_kernels [--output DIR] [--quick] [--sweep [--budget SECONDS]]

Every figure is the median of CUDA-graph replays that rotate through more than 300 MB of distinct random
weights, so that L2 (60 MB on an H200) never holds them. Each kernel is compared with fp32 before it is
timed; a kernel that is wrong or fails has its message in the table in place of a figure. --quick leaves
out the second model and the peers. --sweep times other launches than launch_config's and prints the best.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from engine.kernels import w4a16
from engine.kernels.w4a16 import LaunchConfig, launch_config
from engine.kernels.w4a16_layout import PackedW4A16, dequantize_w4a16, pack_w4a16
from tests.bench import results_file

READ_BYTES_PER_S = 4.60e12  # a plain streaming kernel on an H200
ROTATED_BYTES = 320e6
GROUP_SIZE = 128
ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 2048)
TINYGEMM_ROWS = (1, 4, 16)
# layer: (N, K)
MODELS = {
    "Llama-2-7B": {
        "qkv": (12288, 4096),
        "o": (4096, 4096),
        "gate_up": (22016, 4096),
        "down": (4096, 11008),
    },
    "Llama-3.1-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
}
TARGET_US = {1: 34, 16: 38, 64: 62, 256: 185, 2048: 1230}  # sum of the four Llama-2-7B layers
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Weights:
    """One layer's shape with as many random copies as L2 cannot hold."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k = n, k
        self.num_bytes = n * k * (0.5 + 2.5 / GROUP_SIZE)  # int4, fp16 scale, int4 zero point
        copies = max(2, round(ROTATED_BYTES / self.num_bytes + 0.5))
        self.packed = [random_packed(n, k) for _ in range(copies)]

    @property
    def roof_us(self) -> float:
        return self.num_bytes / READ_BYTES_PER_S * 1e6


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(0)
    started = time.perf_counter()
    figures: dict = {"group_size": GROUP_SIZE, "rotated_bytes": ROTATED_BYTES}
    if options.sweep:
        figures["sweep"] = sweep(options.budget)
        name = "w4a16_sweep"
    else:
        figures["correctness"] = guarded(check_every_mode)
        figures["repack_ms"] = guarded(time_repack)
        models = list(MODELS)[:1] if options.quick else list(MODELS)
        figures["models"] = {name: bench_model(name, peers=not options.quick) for name in models}
        name = "w4a16"
    figures["seconds"] = round(time.perf_counter() - started, 1)
    path = results_file.save(name, figures, options.output)
    if not options.sweep:
        print_tables(figures)
    print(f"{path}; {figures['seconds']} s")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=results_file.RESULTS)
    parser.add_argument("--quick", action="store_true", help="one model, no peers")
    parser.add_argument("--sweep", action="store_true", help="time other launches, print the best")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for --sweep")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this bench needs an NVIDIA GPU")
    return options


def guarded(section: Callable[[], object]) -> object:
    """A section's result, or what it failed with: the others must go on."""
    try:
        return section()
    except Exception as error:  # noqa: BLE001
        words = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"FAILED {words}", flush=True)
        return words


def random_packed(n: int, k: int, dtype: torch.dtype = torch.float16) -> PackedW4A16:
    """Random bits in kernel layout; scales near 0.01."""
    tiles_n, blocks, groups = -(-n // 128), -(-k // 128), k // GROUP_SIZE
    tiles = random_bits(tiles_n, blocks, 128, 16)
    scales = (
        0.005 + 0.01 * torch.rand(tiles_n, groups, 128, device="cuda", generator=_generator())
    ).to(dtype)
    zeros = torch.randint(
        0, 16, (tiles_n, groups, 128), dtype=torch.int32, device="cuda", generator=_generator()
    )
    words = (scales.view(torch.int16).to(torch.int32) & 0xFFFF) | (zeros << 16)
    return PackedW4A16(tiles, words, k, n, GROUP_SIZE, dtype)


def random_bits(*shape: int) -> Tensor:
    return torch.randint(
        -(2**31), 2**31, shape, dtype=torch.int32, device="cuda", generator=_generator()
    )


@cache
def _generator() -> torch.Generator:
    """Not torch's own: that one stays unusable after a graph capture that failed."""
    return torch.Generator("cuda").manual_seed(0)


def random_x(m: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(m, k, device="cuda", generator=_generator()).to(dtype)


def exact(x: Tensor, packed: PackedW4A16) -> Tensor:
    return x.float() @ dequantize_w4a16(packed, torch.float32).T


def check(out: Tensor, expected: Tensor) -> float:
    """The relative error, if it is one."""
    error = ((out.float() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE[out.dtype]:
        raise AssertionError(f"relative error {error:.2e}")
    return error


def check_every_mode() -> dict[str, object]:
    """Relative errors of each regime and type on a middling shape; the whole test is pytest -m gpu."""
    errors = {}
    for dtype, m in product(TOLERANCE, (1, 16, 64, 100, 256, 1000)):
        packed, x = random_packed(2176, 2048, dtype), random_x(m, 2048, dtype)
        name = f"{str(dtype).removeprefix('torch.')} M={m}"
        errors[name] = guarded(
            lambda x=x, w=packed: check(w4a16.w4a16_packed_matmul(x, w, None), exact(x, w))
        )
    return errors


def time_repack() -> float:
    """Milliseconds to repack one gate_up layer from AutoAWQ's layout."""
    n, k = MODELS["Llama-2-7B"]["gate_up"]
    disk = random_bits(k, n // 8), random_bits(k // 128, n // 8)
    scales = torch.rand(k // 128, n, device="cuda", generator=_generator()).half()
    pack_w4a16(*disk, scales, GROUP_SIZE)
    torch.cuda.synchronize()
    started = time.perf_counter()
    pack_w4a16(*disk, scales, GROUP_SIZE)
    torch.cuda.synchronize()
    return round((time.perf_counter() - started) * 1e3, 2)


def time_calls(calls: list[Callable[[], object]]) -> float:
    """Median microseconds a call of CUDA-graph replays that make all calls in turn."""
    torch.cuda.synchronize()
    with torch.cuda.stream(_stream()):
        calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()  # torch.cuda.graph would collect garbage every time
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def replay(count: int) -> float:
            start.record()
            for _ in range(count):
                graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / count

        replay(1)
        count = max(1, min(20, round(1.5 / max(replay(1), 1e-3))))
        return median(replay(count) for _ in range(9)) / len(calls) * 1e3


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def matmul_calls(
    weights: Weights, x: Tensor, config: LaunchConfig | None = None
) -> list[Callable[[], object]]:
    return [lambda p=p: w4a16.w4a16_packed_matmul(x, p, None, config) for p in weights.packed]


def time_ours(weights: Weights, m: int) -> float:
    x, first = random_x(m, weights.k), weights.packed[0]
    check(w4a16.w4a16_packed_matmul(x, first, None), exact(x, first))
    return time_calls(matmul_calls(weights, x))


def time_partials(weights: Weights, m: int) -> float:
    """Without the reduction, which a fused norm or activation does while it loads."""
    x, first = random_x(m, weights.k), weights.packed[0]
    check(w4a16.w4a16_partials(x, first).sum(0).half(), exact(x, first))
    return time_calls([lambda p=p: w4a16.w4a16_partials(x, p) for p in weights.packed])


def time_cublas(weights: Weights, m: int) -> float:
    n, k, x = weights.n, weights.k, random_x(m, weights.k)
    copies = max(2, round(ROTATED_BYTES / (2 * n * k) + 0.5))
    dense = [
        torch.randn(n, k, dtype=torch.float16, device="cuda", generator=_generator())
        for _ in range(copies)
    ]
    return time_calls([lambda w=w: torch.mm(x, w.T) for w in dense])


def time_tinygemm(weights: Weights, m: int) -> float:
    n, k, x = weights.n, weights.k, random_x(m, weights.k, torch.bfloat16)
    scales = torch.rand(k // GROUP_SIZE, n, 2, device="cuda", generator=_generator()).bfloat16()
    packed = []
    for _ in weights.packed:
        values = torch.randint(
            0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=_generator()
        )
        packed.append(torch.ops.aten._convert_weight_to_int4pack(values, 8))
    matmul = torch.ops.aten._weight_int4pack_mm
    return time_calls([lambda w=w: matmul(x, w, GROUP_SIZE, scales) for w in packed])


def time_layer_chain(layers: dict[str, Weights], m: int, *, partials: bool = False) -> float:
    """qkv, o, gate_up, down in turn, as a model calls them: microseconds for the four."""
    inputs = {k: random_x(m, k) for k in {w.k for w in layers.values()}}
    copies = min(len(w.packed) for w in layers.values())
    op = w4a16.w4a16_partials if partials else w4a16.w4a16_packed_matmul
    calls = []
    for i in range(copies):
        for w in layers.values():
            if partials:
                calls.append(lambda w=w, i=i: op(inputs[w.k], w.packed[i]))
            else:
                calls.append(lambda w=w, i=i: op(inputs[w.k], w.packed[i], None))
    for call in calls[:4]:
        call()
    return time_calls(calls) * 4


def bench_model(name: str, *, peers: bool) -> dict:
    layers = {layer: Weights(n, k) for layer, (n, k) in MODELS[name].items()}
    kinds: dict[str, tuple[Callable[[Weights, int], float], tuple[int, ...]]] = {
        "ours": (time_ours, ROWS),
        "ours, partial sums": (time_partials, tuple(m for m in ROWS if m <= 64)),
    }
    if peers:
        kinds["cuBLAS fp16"] = (time_cublas, ROWS)
        if name == next(iter(MODELS)):
            kinds["tinygemm bf16"] = (time_tinygemm, TINYGEMM_ROWS)
    table: dict = {"roof_us": {layer: round(w.roof_us, 2) for layer, w in layers.items()}}
    for kind, (timer, rows) in kinds.items():
        table[kind] = {
            layer: {m: rounded(guarded(lambda t=timer, w=w, m=m: t(w, m))) for m in rows}
            for layer, w in layers.items()
        }
        torch.cuda.empty_cache()
    table["chain"] = {
        m: rounded(guarded(lambda m=m: time_layer_chain(layers, m))) for m in (1, 16, 64)
    }
    table["chain, partial sums"] = {
        m: rounded(guarded(lambda m=m: time_layer_chain(layers, m, partials=True)))
        for m in (1, 16, 64)
    }
    return table


def rounded(value: object) -> object:
    return round(value, 2) if isinstance(value, float) else value


def print_tables(figures: dict) -> None:
    errors = figures["correctness"]
    print("relative error against fp32:", errors)
    print(f"repack of gate_up: {figures['repack_ms']} ms")
    for name, table in figures["models"].items():
        print(
            f"\n{name}, microseconds a call (roof: weight bytes / {READ_BYTES_PER_S / 1e12} TB/s)"
        )
        print(f"{'layer':9}{'kernel':20}{'roof':>6}" + "".join(f"{f'M={m}':>9}" for m in ROWS))
        failures = []
        kinds = [kind for kind in table if kind != "roof_us" and not kind.startswith("chain")]
        for layer, kind in product(table["roof_us"], kinds):
            row = table[kind][layer]
            failures += [f"{layer} {kind} M={m}: {v}" for m, v in row.items() if isinstance(v, str)]
            cells = "".join(cell(row.get(m)) for m in ROWS)
            print(f"{layer:9}{kind:20}{table['roof_us'][layer]:6.1f}{cells}")
        roof = sum(table["roof_us"].values())
        for kind in kinds:
            sums = [total(table[kind], m) for m in ROWS]
            print(f"{'sum':9}{kind:20}{roof:6.1f}" + "".join(cell(v) for v in sums))
        if name == next(iter(MODELS)):
            print(f"{'sum':9}{'to reach':26}" + "".join(cell(TARGET_US.get(m)) for m in ROWS))
        for kind in ("chain", "chain, partial sums"):
            print(
                f"{'four':9}{kind:20}{roof:6.1f}" + "".join(cell(table[kind].get(m)) for m in ROWS)
            )
            failures += [f"{kind} M={m}: {v}" for m, v in table[kind].items() if isinstance(v, str)]
        first = {message.partition(": ")[2]: message for message in reversed(failures)}
        print("\n".join(first.values()))


def total(layers: dict[str, dict[int, object]], m: int) -> float | str | None:
    values = [row.get(m) for row in layers.values()]
    if any(isinstance(v, str) for v in values):
        return "failed"
    return None if None in values else sum(values)


def cell(value: object) -> str:
    if value is None:
        return f"{'':9}"
    return f"{'failed':>9}" if isinstance(value, str) else f"{value:9.1f}"


def sweep(budget_s: float) -> dict:
    """The best launch of each Llama-2-7B layer and M, most wanted rows first, until the time is up."""
    deadline = time.perf_counter() + budget_s
    layers = {layer: Weights(n, k) for layer, (n, k) in MODELS["Llama-2-7B"].items()}
    found: dict = {}
    for m in (1, 256, 64, 16, 128, 32, 512, 2048):
        sums = {"now": 0.0, "best": 0.0}
        for layer, weights in layers.items():
            x = random_x(m, weights.k)
            expected = exact(x, weights.packed[0])
            now = launch_config(m, weights.n, weights.k)
            times: dict[LaunchConfig, object] = {}
            for config in [now, *candidates(m, weights.n, weights.k)]:
                if config not in times and (not times or time.perf_counter() < deadline):
                    times[config] = guarded(
                        lambda c=config, w=weights, x=x, e=expected: time_config(w, x, e, c)
                    )
            valid = {c: t for c, t in times.items() if isinstance(t, float)}
            failed = {describe(c): t for c, t in times.items() if isinstance(t, str)}
            ranked = sorted(valid.items(), key=lambda item: item[1])
            found[f"{layer} M={m}"] = {
                "now": rounded(times[now]),
                "ranked": [(describe(c), rounded(t)) for c, t in ranked],
                "failed": failed,
            }
            best = "; ".join(f"{t:.2f} {describe(c)}" for c, t in ranked[:4])
            print(f"{layer} M={m} now {rounded(times[now])} | {best} | failed {len(failed)}")
            for text in list(dict.fromkeys(failed.values()))[:1]:
                print("   ", text[:200])
            sums["now"] += valid.get(now, float("nan"))
            sums["best"] += ranked[0][1] if ranked else float("nan")
        found[f"sum M={m}"] = {k: round(v, 1) for k, v in sums.items()}
        print(
            f"sum M={m}: now {sums['now']:.1f}, best {sums['best']:.1f}, target {TARGET_US.get(m)}"
        )
        found[f"pieces M={m}"] = sweep_pieces(layers, m) if m == 2048 else None
        if time.perf_counter() > deadline:
            print(f"out of time after M={m}")
            break
    return found


def candidates(m: int, n: int, k: int) -> list[LaunchConfig]:
    """Launches worth 20 milliseconds each; another block_m compiles, too."""
    now, tiles = launch_config(m, n, k), -(-n // 128)
    count = w4a16._multiprocessors(torch.cuda.current_device())
    streams = [
        LaunchConfig("stream", block_m=bm, programs=count * p)
        for bm, p in product((64, 128), (1, 2, 3))
    ]
    if now.regime == "split":
        splits = range(1, min(k // 512, 4 * count // tiles + 1) + 1)
        return [replace(now, split_k=s) for s in splits] + (streams[:3] if m > 32 else [])
    return [*streams, LaunchConfig("workspace")]


def sweep_pieces(layers: dict[str, Weights], m: int) -> dict[str, list[object]]:
    """The workspace regime with other piece sizes: the four layers' sum in microseconds."""
    results: dict[str, list[object]] = {}
    kept = w4a16.workspace_rows
    for most in (2048, 4096, 8192, 32768, 2048):
        w4a16.workspace_rows = lambda m, n, k, most=most: -(-n // -(-n // most) // 128) * 128
        sums = guarded(
            lambda: sum(time_calls(matmul_calls(w, random_x(m, w.k))) for w in layers.values())
        )
        results.setdefault(f"{most} rows", []).append(rounded(sums))
        print(f"workspace of {most} rows, M={m}: {rounded(sums)}")
    w4a16.workspace_rows = kept
    dequantize_us = rounded(guarded(lambda: time_dequantize(layers)))
    results["dequantize only"] = [dequantize_us]
    print(f"dequantize only, whole layers: {dequantize_us}")
    return results


def time_dequantize(layers: dict[str, Weights]) -> float:
    total_us = 0.0
    for w in layers.values():
        out = torch.empty(w.n, w.k, dtype=torch.float16, device="cuda")
        total_us += time_calls(
            [lambda p=p, o=out: w4a16.dequantize_rows(p, 0, o) for p in w.packed]
        )
    return total_us


def time_config(weights: Weights, x: Tensor, expected: Tensor, config: LaunchConfig) -> float:
    check(w4a16.w4a16_packed_matmul(x, weights.packed[0], None, config), expected)
    return time_calls(matmul_calls(weights, x, config))


def describe(config: LaunchConfig) -> str:
    """The fields that differ from the defaults."""
    default = asdict(LaunchConfig(config.regime))
    changed = {k: v for k, v in asdict(config).items() if v != default[k]}
    return config.regime + "".join(f" {k}={v}" for k, v in changed.items())


if __name__ == "__main__":
    main()
