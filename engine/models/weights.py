"""Checkpoint files: check their headers against a ModelSpec, then copy tensors into a model.

Only safetensors is read, never pickle. Every tensor must be used, present once, and of the expected
shape and type; a few harmless extras are listed in names.py. Each tensor goes from disk straight into
its place, fused slices included, so the host never holds more than one tensor beside the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from engine.errors import CapacityError, ModelError
from engine.layers.linear import AwqLinear
from engine.models.decoder import Decoder
from engine.models.names import (
    HARMLESS_SUFFIXES,
    Layout,
    Placement,
    decoder_placements,
    detect_layout,
    module_name,
)
from engine.models.spec import ModelSpec

if TYPE_CHECKING:
    from engine.models.vision import VisionTower

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_MAX_INDEX_BYTES = 256 << 20
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint. weight_bytes counts what the weights occupy on the device."""

    spec: ModelSpec
    decoder: Decoder
    vision: VisionTower | None
    weight_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """What activations and the KV cache are computed in."""
        return self.decoder.embed_weight.dtype


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as a safetensors header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """A checked folder: which tensors it has and where each goes. tied: the head is the embedding."""

    spec: ModelSpec
    entries: dict[str, TensorEntry]
    placements: list[Placement]
    tied: bool


def check_weights(folder: Path, spec: ModelSpec) -> Plan:
    """What load_model will do; ModelError unless the safetensors files hold exactly what spec needs.

    Reads headers only, except a tied model's second copy of the head, which must be compared.
    """
    entries = read_headers(folder)
    layout = detect_layout(spec, entries)
    embed = f"{module_name(spec, 'embed', layout=layout)}.weight"
    head = f"{module_name(spec, 'head', layout=layout)}.weight"
    tied = spec.tied_head
    if tied and embed in entries and head in entries:
        # transformers 5 ties only what is equal; a different head on disk is the model's own
        tied = entries[embed].shape == entries[head].shape and _same_values(entries, embed, head)
    placements = list(decoder_placements(spec, layout, own_head=not tied))
    if tied and embed not in entries and head in entries:
        placements = [
            Placement(head, p.shape, p.target) if p.name == embed else p for p in placements
        ]
    if spec.vision is not None:
        placements += _vision_placements(spec, layout)
    _check_entries(entries, placements, {head} if tied else set())
    return Plan(spec, entries, placements, tied)


def load_model(
    plan: Plan,
    device: torch.device | str,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Build the modules on device and fill them; on_progress(done_bytes, total_bytes) per tensor.

    AWQ scales take dtype too; packed integers stay as they are.
    """
    spec = plan.spec
    root = nn.Module()
    with torch.device("meta"):
        root.decoder = Decoder(spec)
        root.vision = None if spec.vision is None else _vision_tower(spec)
    root.to(dtype)
    if plan.tied:
        root.decoder.head.weight = None  # becomes the embedding once that has memory
    weight_bytes = _bytes_of(root)
    device = torch.device(device)
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    if weight_bytes > free_bytes:
        raise _no_room(weight_bytes, free_bytes)
    try:
        root.to_empty(device=device)
        if plan.tied:
            root.decoder.head.weight = root.decoder.embed_weight
        if root.vision is not None:
            root.vision.fill_buffers()
        _fill(root, plan, on_progress)
        for module in root.modules():
            if isinstance(module, AwqLinear):
                module.finish_loading()
    except torch.cuda.OutOfMemoryError as error:
        raise _no_room(weight_bytes, free_bytes) from error
    return Model(spec, root.decoder, root.vision, _bytes_of(root))


def read_headers(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a folder: model.safetensors, or the shards of its index, or every file."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.exists():
        return _read_header(single)
    if index.exists():
        return _read_indexed(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(_no_safetensors(folder))
    return _merge(files)


def _vision_placements(spec: ModelSpec, layout: Layout) -> Iterator[Placement]:
    """The tower's own parameters; transformers nests them in vision_model in some versions."""
    with torch.device("meta"):
        tower = _vision_tower(spec)
    for name, parameter in tower.named_parameters():
        inner = name.removeprefix("clip.").removeprefix("vision_model.")
        prefix = layout.tower if name.startswith("clip.") else layout.projector
        yield Placement(prefix + inner, tuple(parameter.shape), f"vision.{name}")


def _vision_tower(spec: ModelSpec) -> VisionTower:
    from engine.models.vision import VisionTower  # transformers' CLIP takes seconds to import

    return VisionTower(spec.vision, spec.hidden_size)


def _check_entries(
    entries: dict[str, TensorEntry], placements: list[Placement], spare: set[str]
) -> None:
    wanted = {p.name: p for p in placements}
    missing = [name for name in wanted if name not in entries]
    if missing:
        raise ModelError(f"Checkpoint lacks {_count(missing)}, first: {missing[0]}.")
    surplus = sorted(
        name
        for name in entries.keys() - wanted.keys() - spare
        if not name.endswith(HARMLESS_SUFFIXES)
    )
    if surplus:
        raise ModelError(
            f"Checkpoint has {_count(surplus)} that this model does not use, first: {surplus[0]}."
        )
    for name, placement in wanted.items():
        entry = entries[name]
        if entry.shape != placement.shape:
            raise ModelError(
                f"{name} has shape {list(entry.shape)}; config.json asks for {list(placement.shape)}."
            )
        allowed = ("I32",) if placement.packed else _FLOATS
        if entry.dtype not in allowed:
            raise ModelError(f"{name} is {entry.dtype}; expected {' or '.join(allowed)}.")


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor" + ("" if len(names) == 1 else "s")


def _bytes_of(root: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in root.parameters())


def _no_room(needed: int, free: float) -> CapacityError:
    return CapacityError(
        f"The weights need {needed:,} bytes of GPU memory; {free:,} are free. "
        "Close other programs on this GPU, or load a smaller or quantized model."
    )


def _fill(root: nn.Module, plan: Plan, on_progress: Callable[[int, int], None] | None) -> None:
    by_file: dict[Path, list[Placement]] = {}
    for placement in plan.placements:
        by_file.setdefault(plan.entries[placement.name].file, []).append(placement)
    total = sum(plan.entries[p.name].num_bytes for p in plan.placements)
    done = 0
    for file, placements in by_file.items():
        with safe_open(file, framework="pt") as tensors:
            for placement in placements:
                parameter = root.get_parameter(placement.target)
                _copy(placement, tensors.get_tensor(placement.name), parameter.data, plan.spec)
                done += plan.entries[placement.name].num_bytes
                if on_progress is not None:
                    on_progress(done, total)


def _copy(placement: Placement, source: Tensor, target: Tensor, spec: ModelSpec) -> None:
    """Write source into its slice of target, converting the float type on the way."""
    axis, start = placement.axis, placement.start
    parts = _ungroup(source, axis, spec) if placement.grouped else (source,)
    for part in parts:
        width = part.shape[axis]
        # converted on the host: copy_ would put the wider source on the GPU first
        target.narrow(axis, start, width).copy_(part.to(target.dtype))
        start += width


def _ungroup(source: Tensor, axis: int, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Split an axis laid out per KV head as [its query heads, key, value] into q, k and v."""
    group = spec.num_heads // spec.num_kv_heads
    heads = source.unflatten(axis, (spec.num_kv_heads, group + 2, -1))
    q = heads.narrow(axis + 1, 0, group).flatten(axis, axis + 2)
    k = heads.select(axis + 1, group).flatten(axis, axis + 1)
    v = heads.select(axis + 1, group + 1).flatten(axis, axis + 1)
    return q, k, v


def _same_values(entries: dict[str, TensorEntry], first: str, second: str) -> bool:
    with (
        safe_open(entries[first].file, framework="pt") as a,
        safe_open(entries[second].file, framework="pt") as b,
    ):
        return torch.equal(a.get_tensor(first), b.get_tensor(second))


def _read_indexed(folder: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = _read_weight_map(index)
    for name, file in weight_map.items():
        plain = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not plain or not file.endswith(".safetensors"):
            raise ModelError(
                f"{_INDEX}: {name} is in {file!r}; expected the plain name of a safetensors file."
            )
    files = [folder / file for file in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise ModelError(
            f"{_INDEX} names {len(absent)} of {len(files)} files that are not in the folder, "
            f"first: {absent[0]}. Complete the download."
        )
    entries = _merge(files)
    lost = [name for name, file in weight_map.items() if _file_of(entries, name) != file]
    if lost:
        raise ModelError(
            f"{_INDEX}: {weight_map[lost[0]]} does not hold {lost[0]} ({_count(lost)} misplaced)."
        )
    return entries


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ModelError(f"{_INDEX} is larger than {_MAX_INDEX_BYTES >> 20} MB.")
        raw = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{_INDEX} is not valid JSON: {error}.") from error
    except OSError as error:
        raise ModelError(f"{_INDEX} cannot be read: {error.strerror}.") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{_INDEX} has no weight_map; expected tensor names with their files.")
    return weight_map


def _file_of(entries: dict[str, TensorEntry], name: str) -> str | None:
    return entries[name].file.name if name in entries else None


def _merge(files: list[Path]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read_header(file).items():
            if name in entries:
                raise ModelError(f"{name} is in both {entries[name].file.name} and {file.name}.")
            entries[name] = entry
    return entries


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """A safetensors header: 8 bytes of length, JSON, then the data, which must fill the file."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            header_len = int.from_bytes(stream.read(8), "little")
            if size < 8 or (8 + header_len > size and header_len <= _MAX_HEADER_BYTES):
                raise ModelError(f"{file.name} is truncated at {size:,} bytes. Download it again.")
            if header_len > _MAX_HEADER_BYTES:
                raise ModelError(
                    f"{file.name} has a header of {header_len:,} bytes; "
                    f"safetensors allows {_MAX_HEADER_BYTES:,}. It is corrupt or of another format."
                )
            header = json.loads(stream.read(header_len), object_pairs_hook=_unique)
    except OSError as error:
        raise ModelError(f"{file.name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file.name} has a corrupt safetensors header: {error}.") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file.name} has a corrupt safetensors header: not a JSON object.")
    header.pop("__metadata__", None)
    return _entries(file, header, size - 8 - header_len)


def _entries(file: Path, header: dict, data_bytes: int) -> dict[str, TensorEntry]:
    entries, spans = {}, []
    for name, raw in header.items():
        try:
            dtype, shape, (begin, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
            num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
            sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file.name}: the header's entry for {name} is corrupt.") from error
        if not sound or end - begin != num_bytes:
            raise ModelError(f"{file.name}: the header's entry for {name} is corrupt.")
        entries[name] = TensorEntry(file, dtype, shape, num_bytes)
        spans.append((begin, end))
    cursor = 0
    for begin, end in sorted(spans):
        if begin != cursor:
            raise ModelError(f"{file.name} has a corrupt safetensors header: tensors overlap.")
        cursor = end
    if cursor > data_bytes:
        raise ModelError(
            f"{file.name} is truncated: its tensors take {cursor:,} bytes, it holds {data_bytes:,}. "
            "Download it again."
        )
    if cursor < data_bytes:
        raise ModelError(
            f"{file.name} is corrupt: {data_bytes - cursor:,} bytes follow its tensors."
        )
    return entries


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _no_safetensors(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder with a checkpoint."
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")])
    if not pickles:
        return f"{folder} has no safetensors file; expected model.safetensors or shards of it."
    return (
        f"{folder} has no safetensors file, only {pickles[0].name}; only safetensors is read, because "
        "loading the older format can run code. Convert a checkpoint that you trust with: "
        'python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('OLD').save_pretrained('NEW')\""
    )
