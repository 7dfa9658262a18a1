"""Text of a source file: its lines, with all that must survive when lines are put in or taken out.

Git and editors change line endings, the newline at the end and the byte order mark. None of these changes what the
file says, so the digest leaves them out, and the content keeps them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["SourceText"]

_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SourceText:
    r"""Lines of a file.

    Attributes:
        mark: the byte order mark, or b"".
        lines: without their endings.
        endings: of each line, b"\n" or b"\r\n"; b"" of a last line without one.
    """

    mark: bytes
    lines: tuple[bytes, ...]
    endings: tuple[bytes, ...]

    @classmethod
    def of(cls, content: bytes) -> SourceText:
        """Splits the content of a file."""
        mark = _MARK if content.startswith(_MARK) else b""
        parts = content.removeprefix(mark).split(b"\n")
        endings = [b"\r\n" if part.endswith(b"\r") else b"\n" for part in parts[:-1]]
        lines = [part.removesuffix(b"\r") for part in parts[:-1]]
        if parts[-1]:
            lines, endings = [*lines, parts[-1]], [*endings, b""]
        return cls(mark, tuple(lines), tuple(endings))

    @property
    def content(self) -> bytes:
        """The bytes of the file: the inverse of :meth:`of`."""
        return self.mark + b"".join(line + ending for line, ending in zip(self.lines, self.endings, strict=True))

    @property
    def digest(self) -> str:
        """sha256 of the text, 64 hexadecimal digits, whatever the line endings and the newlines at the end."""
        return hashlib.sha256(b"\n".join(self.lines).rstrip(b"\n")).hexdigest()

    def inserted(self, new: Mapping[int, Sequence[bytes]]) -> SourceText:
        """The text with more lines.

        Args:
            new: number of lines before them in this text, in [0, len(lines)] -> the lines. Each takes the ending of the
                line before it. A file without a newline at its end still has none.
        """
        lines: list[bytes] = []
        endings: list[bytes] = []
        usual = Counter(ending for ending in self.endings if ending).most_common(1)
        near = self.endings[0] if self.endings and self.endings[0] else b"\n"
        for position in range(len(self.lines) + 1):
            for line in new.get(position, ()):
                lines.append(line)
                endings.append(near)
            if position < len(self.lines):
                near = self.endings[position] or (usual[0][0] if usual else b"\n")
                lines.append(self.lines[position])
                endings.append(near)
        return SourceText(self.mark, tuple(lines), self._closed(endings))

    def removed(self, numbers: Collection[int]) -> SourceText:
        """The text without the lines at these 0-based positions: the inverse of :meth:`inserted`."""
        kept = [n for n in range(len(self.lines)) if n not in numbers]
        return SourceText(self.mark, tuple(self.lines[n] for n in kept), self._closed([self.endings[n] for n in kept]))

    def _closed(self, endings: list[bytes]) -> tuple[bytes, ...]:
        """The endings, with the last one missing exactly where it was missing before."""
        if endings and self.endings and not self.endings[-1]:
            endings[-1] = b""
        return tuple(endings)
