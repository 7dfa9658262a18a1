"""Tensor files: safetensors with a JSON header that names the kind of file and holds hashes of the contents.

State files and synthetic sets are tensor files. The header holds ``format``, ``version``, ``content`` (hash of the
tensors) and ``header`` (hash of the header itself). Reading checks all of them, so a single flipped bit is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.errors import FileFormatError, explain
from tad_plugin.utils.files import atomic_save

__all__ = ["TensorFile", "content_digest"]

_KEY = "tad_plugin"
_OLD, _NOW = 1, 2


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """Sha256 (hex) over the names, dtypes, shapes and bytes of CPU tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class TensorFile:
    """One kind of tensor file.

    Attributes:
        format: name of the format, as in the header.
        what: the kind in words, for messages ("a state file").
        way_out: advice for a file that cannot be read.
        tensors: names of the required tensors.
        fields: names of the required header fields.
    """

    format: str
    what: str
    way_out: str
    tensors: Collection[str] = ()
    fields: Collection[str] = ()

    def write(self, path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Writes a file. An existing one is replaced atomically.

        Args:
            path: the file.
            tensors: tensors by name, on any device.
            header: JSON values; values of other types become their ``str``.
        """
        from safetensors.torch import save_file

        ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        full = {"format": self.format, "version": _NOW, **header, "content": content_digest(ready)}
        full = json.loads(json.dumps(full, default=str))  # as it will be read back
        metadata = {_KEY: json.dumps({**full, "header": _header_digest(full)})}
        atomic_save(path, lambda temporary: save_file(ready, str(temporary), metadata=metadata))

    def read(self, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Reads a file of version 2, or of version 1, which has no hash of its header.

        Returns:
            (header, tensors on the CPU).

        Raises:
            FileFormatError: the file is missing, truncated, of another format or version, lacks a required field or
                tensor, or was changed after it was written.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise self._error(self.what, f"nothing at {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {}).get(_KEY, "{}")
                header = json.loads(text)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise self._error(f"{self.what} that can be read", f"{path}: {error}") from error
        header = header if isinstance(header, dict) else {}
        version = header.get("version")
        if header.get("format") != self.format or version not in (_OLD, _NOW):
            got = f"format {header.get('format')!r}, version {version!r} in {path}"
            raise self._error(f"format {self.format!r}, version {_OLD} or {_NOW}", got)
        needed = {*self.fields} | ({"content", "header"} if version == _NOW else set())
        if lost := sorted({*self.tensors} - set(tensors)) or sorted(needed - set(header)):
            raise self._error(f"all fields of {self.what}", f"{path} without {', '.join(lost)}")
        # The text as well: 1e5 and 1E5 differ by one bit and are the same number.
        whole = version == _OLD or (header["header"] == _header_digest(header) and text == json.dumps(header))
        found = content_digest(tensors)
        if not whole or header.get("content", found) != found:
            raise self._error("contents that match the hashes in the header", f"other contents in {path}")
        return header, tensors

    def _error(self, expected: str, got: str) -> FileFormatError:
        return FileFormatError(explain(expected, got, self.way_out))


def _header_digest(header: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in header.items() if key != "header"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
