"""Progress bars, which need tqdm and are asked for by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tad_plugin.errors import missing_extra

__all__ = ["bar"]


def bar(items: Iterable[Any], name: str, show: bool, total: int | None = None, initial: int = 0) -> Any:
    """``items``, with a progress bar on stderr where ``show`` is set.

    Args:
        items: what is gone through.
        name: stands before the bar.
        show: False gives ``items`` back as they are.
        total: how many there are, where ``items`` do not tell.
        initial: how many of them were done before (a resumed run).

    Raises:
        MissingExtraError: a bar is wanted and tqdm is not installed.
    """
    if not show:
        return items
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise missing_extra("tqdm", "reproduce", "a progress bar") from error
    return tqdm(items, desc=name, leave=False, total=total, initial=initial)
