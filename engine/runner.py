"""Runs a scheduled step on the device: work items -> flat tensors -> logits. Owns the KV cache.

Also sizes that cache: the share of free memory that EngineConfig asks for, measured after a trial
forward pass so that a full step and the decode graphs still fit beside it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence as Rows

import psutil
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import CapacityError
from engine.graphs import DecodeGraphs, reserved_bytes
from engine.inputs import InputLayout, first_position, to_device, write_inputs
from engine.layers.kv_cache import allocate_kv, kv_bytes_per_block
from engine.models.weights import Model
from engine.prompt import ImageSpan
from engine.scheduler import Work
from engine.types import BatchInputs

IMAGE_CACHE_BYTES = 256 * 2**20
DEFAULT_SHARE = 0.8
CPU_KV_BYTES = 2 * 2**30  # a default that leaves a desktop its memory


class Runner:
    """One model with its KV cache, ready to compute steps."""

    def __init__(
        self, model: Model, config: EngineConfig, device: torch.device, session_len: int
    ) -> None:
        self.model = model
        self.device = device
        self.block_size = config.cache_block_seq_len
        self._has_dynamic_rope = model.spec.rope.kind == "dynamic"
        policy = config.quant_policy
        self.bytes_per_block = kv_bytes_per_block(model.spec, self.block_size, model.dtype, policy)
        self.num_blocks = self._count_blocks(config, session_len)
        try:
            self._kv = allocate_kv(
                model.spec, self.num_blocks, self.block_size, model.dtype, device, policy
            )
        except (RuntimeError, MemoryError) as error:  # torch and Python say it so
            raise CapacityError(
                f"The KV cache takes {self.num_blocks * self.bytes_per_block:,} bytes, which {device} "
                "does not have. Lower cache_max_entry_count, cache_bytes or cache_tokens."
            ) from error
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._feature_bytes = 0
        self._graphs = self._capture_graphs(config, session_len)

    @torch.inference_mode()
    def forward(self, work: Rows[Work], input_ids: Tensor | None = None) -> Tensor:
        """Compute `work` (single-token rows first) -> logits [number of sampling items, V] float32.

        input_ids [len(work)]: `work` is one token ahead of what is committed (Scheduler.look_ahead), and
        only the device knows these tokens. The result is good until the next call.
        """
        ahead = 0 if input_ids is None else 1
        layout = self._graph_layout(work, ahead)
        if layout is not None:
            host = self._write(layout, work, ahead)
            return self._graphs.replay(layout, host, input_ids)[: len(work)]
        inputs = self._inputs(work, ahead)
        hidden = self.model.decoder.embed(inputs.input_ids if input_ids is None else input_ids)
        if not ahead:
            self._place_images(hidden, work)
        hidden = self.model.decoder.forward(hidden, inputs, self._kv)
        ends = itertools.accumulate(item.count for item in work)
        last = [end - 1 for end, item in zip(ends, work, strict=True) if item.samples]
        if len(last) < hidden.shape[0]:
            hidden = hidden.index_select(0, to_device(last, torch.int64, self.device))
        return self.model.decoder.logits(hidden)

    def free(self) -> None:
        """Let go of the weights, the KV cache and the picture features; nothing runs after this."""
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # a device that failed has nothing to wait for
                torch.cuda.synchronize(self.device)
        del self.model
        self._graphs = None
        self._kv.clear()
        self._features.clear()

    def _capture_graphs(self, config: EngineConfig, session_len: int) -> DecodeGraphs | None:
        if self.device.type != "cuda" or config.largest_graph == 0:
            return None
        graphs = DecodeGraphs(
            self.model.decoder,
            self._kv,
            self.device,
            max_rows=config.largest_graph,
            block_size=self.block_size,
            max_context=min(session_len, self.num_blocks * self.block_size),
            has_rope_lens=self._has_dynamic_rope,
        )
        return graphs if graphs.sizes else None

    def _graph_layout(self, work: Rows[Work], ahead: int) -> InputLayout | None:
        """The graph's layout if every item is one row that picks a token and is no part of a picture."""
        if self._graphs is None:
            return None
        for item in work:
            if item.count > 1 or not item.samples:
                return None
            begin = first_position(item, ahead)
            if any(s.start <= begin < s.start + s.length for s in item.sequence.images):
                return None
        return self._graphs.layout_for(len(work))

    def _inputs(self, work: Rows[Work], ahead: int) -> BatchInputs:
        contexts = [first_position(item, ahead) + item.count for item in work]
        layout = InputLayout(
            num_rows=sum(item.count for item in work),
            num_sequences=len(work),
            width=-(-max(contexts) // self.block_size),
            has_rope_lens=self._has_dynamic_rope,
        )
        buffer = self._write(layout, work, ahead).to(self.device, non_blocking=True)
        return BatchInputs(
            **layout.device_views(buffer),
            query_lens=tuple(item.count for item in work),
            max_context_len=max(contexts),
            num_decodes=sum(item.count == 1 for item in work),
        )

    def _write(self, layout: InputLayout, work: Rows[Work], ahead: int) -> Tensor:
        """A host buffer with the step; torch keeps pinned memory until the copy out of it is done."""
        pinned = self.device.type == "cuda"
        buffer = torch.empty(layout.num_words, dtype=torch.int32, pin_memory=pinned)
        write_inputs(layout, buffer, work, self.block_size, ahead)
        return buffer

    def _place_images(self, hidden: Tensor, work: Rows[Work]) -> None:
        """Overwrite the placeholder rows of `hidden` [T, hidden_size] with picture features."""
        row = 0
        for item in work:
            begin = item.sequence.num_computed
            end = begin + item.count
            for span in item.sequence.images:
                first, last = max(begin, span.start), min(end, span.start + span.length)
                if first < last:
                    features = self._encode(span)[first - span.start : last - span.start]
                    hidden[row + first - begin : row + last - begin] = features
            row += item.count

    def _encode(self, span: ImageSpan) -> Tensor:
        """Features [span.length, hidden_size]; a picture is encoded once while it is remembered."""
        if span.digest in self._features:
            self._features.move_to_end(span.digest)
            return self._features[span.digest]
        pixels = span.pixel_values.unsqueeze(0).to(self.device, self.model.dtype)
        features = self.model.vision.encode(pixels)[0]
        self._features[span.digest] = features
        self._feature_bytes += features.nbytes
        while self._feature_bytes > IMAGE_CACHE_BYTES and len(self._features) > 1:
            _, dropped = self._features.popitem(last=False)
            self._feature_bytes -= dropped.nbytes
        return features

    def _count_blocks(self, config: EngineConfig, session_len: int) -> int:
        """KV blocks to allocate; never more than max_batch_size sequences of session_len can fill."""
        useful = -(-session_len // self.block_size) * config.max_batch_size
        if config.cache_tokens is not None:
            count = -(-config.cache_tokens // self.block_size)
        elif config.cache_bytes is not None:
            count = config.cache_bytes // self.bytes_per_block
        else:
            count = min(self._budget(config) // self.bytes_per_block, useful)
        if count < 1:
            raise CapacityError(
                f"The KV cache has room for {count} blocks of {self.block_size} tokens "
                f"({self.bytes_per_block:,} bytes each); at least 1 is needed. Raise "
                "cache_max_entry_count, cache_bytes or cache_tokens, or free device memory."
            )
        held = count * self.block_size
        if config.session_len is not None and held < config.session_len:
            raise CapacityError(
                f"The KV cache has room for {held:,} tokens; session_len asks for "
                f"{config.session_len:,}. Raise cache_max_entry_count, cache_bytes or cache_tokens, or "
                "lower session_len."
            )
        return count

    def _budget(self, config: EngineConfig) -> int:
        """Bytes for KV blocks from the share of free memory."""
        free_bytes = self._free_bytes(config)
        if config.cache_max_entry_count is not None:
            return int(free_bytes * config.cache_max_entry_count)
        most = free_bytes if self.device.type == "cuda" else CPU_KV_BYTES
        return min(int(free_bytes * DEFAULT_SHARE), most)

    def _free_bytes(self, config: EngineConfig) -> int:
        """Free memory once the largest step has its working memory."""
        if self.device.type != "cuda":
            return psutil.virtual_memory().available
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._trial(config.max_prefill_token_num)
        working = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        graphs = reserved_bytes(self.model.spec, config.largest_graph)
        return max(free - working - graphs, 0)

    @torch.inference_mode()
    def _trial(self, count: int) -> None:
        """One forward pass over `count` tokens without a cache, for its peak memory."""
        inputs = BatchInputs(
            input_ids=self._tensor([0] * count),
            positions=self._tensor(list(range(count))),
            slots=self._tensor([-1] * count),
            cu_seqlens=self._tensor([0, count], torch.int32),
            context_lens=self._tensor([count], torch.int32),
            block_tables=self._tensor([[0]], torch.int32),
            query_lens=(count,),
            max_context_len=count,
        )
        decoder = self.model.decoder
        hidden = decoder.forward(decoder.embed(inputs.input_ids), inputs, None)
        decoder.logits(hidden[-1:])

    def _tensor(self, values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return to_device(values, dtype, self.device)
