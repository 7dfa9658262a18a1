"""The functional API: public names are defined where the package says, and the README says what each is for."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from tad_plugin import iwd
from tad_plugin.iwd.config import IWDConfig


def test_the_readme_has_every_public_name() -> None:
    text = (Path(iwd.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert not [name for name in iwd.__all__ if f"`{name}`" not in text]


def test_every_setting_is_in_the_readme() -> None:
    text = (Path(iwd.__file__).parent / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| setting | default |") :]
    assert not [field.name for field in fields(IWDConfig) if f"`{field.name}`" not in table]


def test_public_names_are_defined_in_this_package_or_in_the_derivative_tools() -> None:
    modules = {getattr(iwd, name).__module__ for name in iwd.__all__}
    assert all(module.startswith(("tad_plugin.iwd.", "tad_plugin.nn.derivatives.")) for module in modules)
