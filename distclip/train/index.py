"""The index of a checkpoint: which tensor lies where, as JSON.

torch writes it as a pickle, `.metadata`, and reads single numbers back by unrestricted unpickling: either can run any
code. We leave that file for torch's own tools and never read it. Tensors and numbers are read by torch's restricted
unpickler (`weights_only=True`), so loading a checkpoint runs nothing in it.

Private torch API, read in 2.13: `_StorageInfo`, what `Metadata.storage_data` holds.
"""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from distclip.train.manifest import write_durably

NAME = "index.json"


def write_index(folder: Path, metadata: Metadata) -> None:
    places = metadata.storage_data
    document: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks = [
                {
                    "at": list(chunk.offsets),
                    "size": list(chunk.sizes),
                    **where(places[MetadataIndex(name, chunk.offsets)]),
                }
                for chunk in entry.chunks
            ]
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            document[name] = {"dtype": dtype, "size": list(entry.size), "chunks": chunks}
        else:
            document[name] = where(places[MetadataIndex(name)])
    write_durably(folder / NAME, json.dumps(document) + "\n")


def where(place: _StorageInfo) -> dict[str, str | int]:
    assert not place.transform_descriptors  # we ask torch for none
    return {"file": place.relative_path, "offset": place.offset, "length": place.length}


def read_index(folder: Path) -> Metadata:
    """What `write_index` wrote, which names no file outside the folder."""
    document = json.loads((folder / NAME).read_text(encoding="utf-8"))
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, entry in document.items():
        if "chunks" not in entry:
            entries[name] = BytesStorageMetadata()
            places[MetadataIndex(name)] = place_of(entry)
            continue
        for chunk in entry["chunks"]:
            places[MetadataIndex(name, torch.Size(chunk["at"]))] = place_of(chunk)
        entries[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=dtype_of(entry["dtype"])),
            size=torch.Size(entry["size"]),
            chunks=[ChunkStorageMetadata(torch.Size(c["at"]), torch.Size(c["size"])) for c in entry["chunks"]],
        )
    return Metadata(state_dict_metadata=entries, storage_data=places)


def place_of(entry: dict[str, Any]) -> _StorageInfo:
    file = entry["file"]
    if Path(file).name != file:
        raise ValueError(f"a checkpoint's data lies beside its index, not in {file!r}")
    return _StorageInfo(file, entry["offset"], entry["length"])


def dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype


class Reader(FileSystemReader):
    """Reads our index instead of torch's pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))


class Planner(DefaultLoadPlanner):
    """Reads single numbers with the restricted unpickler."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        *path, last = self.mappings[read_item.dest_index.fqn]
        place: Any = self.original_state_dict
        for key in path:
            place = place[key]
        place[last] = torch.load(value, weights_only=True)
