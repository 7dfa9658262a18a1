"""What a training script holds: :func:`attach` makes a :class:`Hook`, :func:`add_arguments` its command-line flags."""

from __future__ import annotations

from tad_plugin.hook.attaching import add_arguments, attach
from tad_plugin.hook.core import Hook

__all__ = ["Hook", "add_arguments", "attach"]
