"""What other projects call their label noise, in the words of this one, since names collide."""

from __future__ import annotations

from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.errors import unknown_name

__all__ = ["CONVENTIONS", "resolve_noise"]

CONVENTIONS: dict[str, dict[str, str]] = {
    # Files of "robust dataset condensation": asymmetric moves c to c + 1 in every class.
    "rdc": {"symmetric": "symmetric", "asymmetric": "pair", "human": "human"},
    # Dataset distillation from learning with noisy labels: its pairflip swaps classes that look alike.
    "dd_lnl": {"symmetric": "symmetric", "pairflip": "asymmetric"},
}
"""Project -> its name of a kind of noise -> ours."""


def resolve_noise(text: str) -> str:
    """A noise specification of this package, from one that may name another project's convention.

    ``rdc:asymmetric:0.4`` becomes ``pair:0.4``. A specification without such a prefix is returned as it is.

    Raises:
        UnknownNameError: the project has no such noise.
        ConfigError: no valid specification.
    """
    project, _, rest = text.partition(":")
    if project in CONVENTIONS:
        kind, _, more = rest.partition(":")
        known = CONVENTIONS[project]
        if kind not in known:
            raise unknown_name(f"noise of {project}", kind, known)
        text = f"{known[kind]}:{more}" if more else known[kind]
    NoiseSpec.parse(text, seed=0)
    return text
