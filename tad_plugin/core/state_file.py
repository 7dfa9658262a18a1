"""The file of a SampleState: safetensors with a JSON header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tad_plugin.data.labels import label_digest
from tad_plugin.errors import FileFormatError, explain
from tad_plugin.utils.tensor_file import TensorFile

__all__ = ["FIELDS", "read_state_file", "write_state_file"]

#: the fields of a state that methods write, each [N]
FIELDS = ("target", "weight", "trusted", "trust")

_GROUPS = ("extra", "factors")
_KEYS = ("num_classes", "digest")
_FILE = TensorFile(
    "tad_plugin.state",
    "a state file",
    "Pass the file that SampleState.save wrote, or delete it and let the method compute it again",
    tensors=("observed", *FIELDS),
    fields=(*_KEYS, "configs"),
)


def write_state_file(path: str | Path, state: dict[str, Any], configs: dict[str, Any]) -> None:
    """Writes the file, atomically replaced.

    Args:
        path: the file.
        state: ``SampleState.state_dict()`` with ``observed``.
        configs: method name -> settings.
    """
    tensors = {name: state[name] for name in ("observed", *FIELDS)}
    tensors |= {f"{group}/{name}": value for group in _GROUPS for name, value in state[group].items()}
    _FILE.write(path, tensors, {**{key: state[key] for key in _KEYS}, "configs": configs})


def read_state_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header (with ``configs``), and the state for ``SampleState.load_state_dict`` (with ``observed``).

    Raises:
        FileFormatError: missing, truncated, damaged, or not a state file of a version that this package reads.
    """
    header, tensors = _FILE.read(path)
    if label_digest(tensors["observed"]) != header["digest"]:
        got = f"another one in {path}"
        raise FileFormatError(explain("labels that match the header's label hash", got, _FILE.way_out))
    state: dict[str, Any] = {key: header[key] for key in _KEYS} | {group: {} for group in _GROUPS}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        if group in _GROUPS:
            state[group][name] = value
        else:
            state[key] = value
    return header, state
