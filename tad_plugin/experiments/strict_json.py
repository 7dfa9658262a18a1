"""JSON that every reader takes, and its digest."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from tad_plugin.utils.files import plain

__all__ = ["content_digest", "strict"]


def strict(value: Any) -> Any:
    """:func:`tad_plugin.utils.files.plain` for strict JSON: NaN and infinite numbers become None."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(part) for key, part in item.items()}
        if isinstance(item, list):
            return [finite(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return finite(plain(value))


def content_digest(results: Mapping[str, Any]) -> str:
    """Sha256 (hex) of a JSON object without its own key "sha256"."""
    rest = {key: value for key, value in results.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
