"""The state file: a safetensors file whose JSON header says what it is, and whose contents are checked on reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.data.labels import label_digest
from tad_plugin.errors import FileFormatError, explain
from tad_plugin.utils.files import atomic_save

__all__ = ["FORMAT", "VERSION", "content_digest", "read_state", "write_state"]

FORMAT = "tad_plugin.core.state"
VERSION = 1
_DO = "Pass the file that SampleState.save wrote, or delete it and let the method compute it anew"


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """Sha256 (hex) over names, dtypes, shapes and bytes of CPU tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_state(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors and header (atomically replaced); format, version and the hash of the contents are added.

    Args:
        path: the file.
        tensors: on any device.
        header: plain values; others become their ``str``.
    """
    from safetensors.torch import save_file

    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    full = {"format": FORMAT, "version": VERSION, **header, "content": content_digest(ready)}
    metadata = {"tad_plugin": json.dumps(full, default=str)}
    atomic_save(path, lambda temporary: save_file(ready, str(temporary), metadata=metadata))


def read_state(path: str | Path, fields: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a state file.

    Args:
        path: the file.
        fields: names of the tensors of length N that it must hold, "observed" among them.

    Raises:
        FileFormatError: missing, truncated, of another format or version, or with other contents than were written.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileFormatError(explain("a state file", f"nothing at {path}", _DO))
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("tad_plugin", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(explain("a readable state file", f"{path}: {error}", _DO)) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        found = header if isinstance(header, dict) else {}
        got = f"format {found.get('format')!r}, version {found.get('version')!r} in {path}"
        raise FileFormatError(explain(f"format {FORMAT!r}, version {VERSION}", got, _DO))
    lost = sorted({*fields} - set(tensors)) or sorted({"digest", "num_classes", "configs", "content"} - set(header))
    if lost:
        raise FileFormatError(explain("all fields of a state", f"{path} without {', '.join(lost)}", _DO))
    if content_digest(tensors) != header["content"] or label_digest(tensors["observed"]) != header["digest"]:
        raise FileFormatError(explain("contents that match the header's hashes", f"others in {path}", _DO))
    return header, tensors
