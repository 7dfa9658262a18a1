"""Progress bars. They need tqdm, which is loaded only when one is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tad_plugin.errors import missing_extra

__all__ = ["bar"]


def bar(items: Iterable[Any], name: str, show: bool, total: int | None = None, initial: int = 0) -> Any:
    """Iterates over ``items``, with a progress bar on stderr if ``show`` is set.

    Args:
        items: any iterable; returned unchanged without a bar.
        name: label of the bar.
        show: show the bar.
        total: number of items, if ``items`` has no length.
        initial: items that were done before (a resumed run).

    Raises:
        MissingExtraError: ``show`` is set and tqdm is not installed.
    """
    if not show:
        return items
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise missing_extra("tqdm", "reproduce", "a progress bar") from error
    return tqdm(items, desc=name, leave=False, total=total, initial=initial)
