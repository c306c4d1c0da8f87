"""CUDA graphs of the decode step: one launch a token instead of hundreds.

A graph is captured at load for each of a few batch sizes; a smaller batch takes the next larger graph,
padded. What a step computes depends on the device's input buffer only, never on host numbers, so a
graph serves every context up to the longest that the KV cache allows: attention sizes its splits on
the device (kernels/attention.py). Steps that read prompts run eagerly; their kernels are long enough.

All graphs share one memory pool, one input buffer and one output, because no two run at once. What
cannot be captured (an op that falls back to plain torch) leaves the model running eagerly.
"""

from __future__ import annotations

import gc
import logging
import time

import torch
from torch import Tensor

from engine.inputs import InputLayout, decode_inputs, write_inputs
from engine.layers.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec

log = logging.getLogger(__name__)

_FIXED_BYTES = 320 * 2**20  # workspaces of cuBLAS and of the split kernels, code loaded on the way
_GRAPH_BYTES = 6 * 2**20  # what the driver keeps for one graph


def batch_buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes to capture: 1, 2, 4, 8, then multiples of 16, the tile of the tensor cores."""
    sizes = [1, 2, 4, 8, *range(16, max_rows + 16, 16)]
    return tuple(n for i, n in enumerate(sizes) if i == 0 or sizes[i - 1] < max_rows)


def reserved_bytes(spec: ModelSpec, max_rows: int) -> int:
    """Device memory that the graphs may take: set aside before the KV cache is sized; 0 if off."""
    if max_rows == 0:
        return 0
    buckets = batch_buckets(max_rows)
    logits = 3 * spec.vocab_size  # the shared output, fp32 from the head, and its half before that
    layer = 8 * spec.hidden_size + 4 * spec.intermediate_size + 4 * spec.num_heads * spec.head_size
    return _FIXED_BYTES + len(buckets) * _GRAPH_BYTES + 4 * buckets[-1] * (logits + layer)


class DecodeGraphs:
    """The captured decode steps of one decoder over one KV cache."""

    def __init__(
        self,
        decoder: Decoder,
        kv: list[KVCache],
        device: torch.device,
        *,
        max_rows: int,
        block_size: int,
        max_context: int,
        has_rope_lens: bool,
    ) -> None:
        self._decoder, self._kv, self._device = decoder, kv, device
        self._max_context = max_context
        width = -(-max_context // block_size)
        self._layouts = {
            rows: InputLayout(rows, rows, width, has_rope_lens) for rows in batch_buckets(max_rows)
        }
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        with torch.inference_mode(), torch.cuda.device(device):
            self._capture_all(block_size, reserved_bytes(decoder.spec, max_rows))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes that were captured."""
        return tuple(sorted(self._graphs))

    def layout_for(self, num_rows: int) -> InputLayout | None:
        """The layout of the smallest graph with room for num_rows; None: run the step eagerly."""
        fitting = [rows for rows in self._graphs if rows >= num_rows]
        return self._layouts[min(fitting)] if fitting else None

    def replay(self, layout: InputLayout, host: Tensor, input_ids: Tensor | None) -> Tensor:
        """Compute the step in a (pinned) host buffer -> logits [layout.num_rows, V], until the next replay.

        input_ids [up to num_rows]: tokens that only the device knows, in place of the buffer's.
        """
        self._words[: layout.num_words].copy_(host, non_blocking=True)
        if input_ids is not None:
            self._input_ids[: input_ids.shape[0]].copy_(input_ids)
        self._graphs[layout.num_rows].replay()
        return self._logits[: layout.num_rows]

    def _capture_all(self, block_size: int, budget: int) -> None:
        started = time.perf_counter()
        sizes = list(self._layouts)
        gc.collect()  # a tensor that dies while a stream is captured could end the capture
        torch.cuda.empty_cache()
        reserved_before = torch.cuda.memory_reserved(self._device)
        words = max(layout.num_words for layout in self._layouts.values())
        self._words = torch.zeros(words, dtype=torch.int32, device=self._device)
        # It begins every layout.
        self._input_ids = self._layouts[sizes[-1]].device_views(self._words)["input_ids"]
        vocab_size = self._decoder.spec.vocab_size
        self._logits = torch.empty(sizes[-1], vocab_size, device=self._device)
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        taken = 0
        # The largest batch first: the others fit into the memory that it took.
        for rows in (sizes[-1], *sizes[:-1]):
            try:
                graph = self._capture(rows, block_size, pool, stream)
            except RuntimeError as error:
                log.warning("decode steps of %d rows run without a CUDA graph: %s", rows, error)
                break
            torch.cuda.empty_cache()  # what the uncaptured run took
            taken = torch.cuda.memory_reserved(self._device) - reserved_before
            if taken > budget:
                log.warning(
                    "the CUDA graph of %d rows brings the graphs to %d of %d bytes, and is left out",
                    rows,
                    taken,
                    budget,
                )
                graph.reset()
                if not self._graphs:  # the pool went with its only graph
                    pool = torch.cuda.graph_pool_handle()
                continue
            self._graphs[rows] = graph
        torch.cuda.current_stream(self._device).wait_stream(stream)
        log.info(
            "captured %d decode graphs in %.1f s, %d of %d bytes",
            len(self._graphs),
            time.perf_counter() - started,
            taken,
            budget,
        )

    def _capture(
        self, rows: int, block_size: int, pool: tuple[int, int], stream: torch.cuda.Stream
    ) -> torch.cuda.CUDAGraph:
        layout = self._layouts[rows]
        host = torch.empty(layout.num_words, dtype=torch.int32)
        write_inputs(layout, host, [], block_size)  # padding only: the cache stays as it is
        inputs = decode_inputs(layout, self._words, self._max_context)

        def step() -> None:
            hidden = self._decoder.embed(inputs.input_ids)
            hidden = self._decoder.forward(hidden, inputs, self._kv)
            self._logits[:rows].copy_(self._decoder.logits(hidden))

        with torch.cuda.stream(stream):
            self._words[: layout.num_words].copy_(host)
            step()  # compiles kernels and makes workspaces, which a capture may not
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: another loaded model goes on answering. torch.cuda.graph would collect
            # garbage for each capture.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        return graph
