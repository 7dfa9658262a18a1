"""Diffs of added lines: read strictly, inserted and removed exactly."""

from __future__ import annotations

import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tad_plugin.errors import FileFormatError, PatchError
from tad_plugin.upstream.added_lines import Insertion, added_lines, format_diff, insert_lines, parse_diff, remove_lines

SIMPLE = "--- a/m.py\n+++ b/m.py\n@@ -1,0 +2 @@\n+two\n@@ -3,0 +5,2 @@\n+five\n+    six\n"


def test_a_diff_is_read_and_written_again() -> None:
    found = parse_diff(SIMPLE)
    assert found == {"m.py": (Insertion(1, ("two",)), Insertion(3, ("five", "    six")))}
    assert added_lines(found["m.py"]) == 3 and format_diff(dict(found)) == SIMPLE
    assert parse_diff(SIMPLE.replace("\n", "\r\n")) == found


def test_lines_go_where_the_diff_says_with_the_endings_of_the_file() -> None:
    lines = parse_diff(SIMPLE)["m.py"]
    assert insert_lines(b"1\n3\n4\nlast", lines) == b"1\ntwo\n3\n4\nfive\n    six\nlast"
    assert insert_lines(b"1\r\n3\r\n4\r\n", lines) == b"1\r\ntwo\r\n3\r\n4\r\nfive\r\n    six\r\n"
    # mixed endings: each new line takes the ending of the line before it
    assert insert_lines(b"1\n3\n4\r\n", lines) == b"1\ntwo\n3\n4\r\nfive\r\n    six\r\n"
    top = [Insertion(0, ("first",))]
    assert insert_lines(b"1\r\n", top) == b"first\r\n1\r\n" and insert_lines(b"", top) == b"first\n"


text = st.text("ab +-@\té", max_size=8)


@given(
    lines=st.lists(st.tuples(text, st.sampled_from(["\n", "\r\n"])), max_size=12),
    new=st.dictionaries(st.integers(0, 12), st.lists(text, min_size=1, max_size=3), min_size=1, max_size=5),
    closed=st.booleans(),
)
def test_putting_in_and_taking_out_is_exact(
    lines: list[tuple[str, str]], new: dict[int, list[str]], closed: bool
) -> None:
    content = "".join(a + b for a, b in lines).encode()
    if not closed and lines:
        content += b"no ending"
    insertions = [Insertion(k, tuple(v)) for k, v in sorted(new.items()) if k <= len(lines)]
    patched = insert_lines(content, insertions)
    assert remove_lines(patched, insertions) == content
    before, after = content.split(b"\n"), patched.split(b"\n")
    assert len(after) == len(before) + added_lines(insertions)
    if insertions:
        (read,) = parse_diff(format_diff({"a/b.py": insertions})).values()
        assert list(read) == insertions


def test_the_places_are_those_of_difflib() -> None:
    old = [f"{n}\n" for n in range(20)]
    new = [*old[:4], "x\n", *old[4:9], "y\n", "z\n", *old[9:], "end\n"]
    diff = "".join(difflib.unified_diff(old, new, "a/f.py", "b/f.py", n=0))
    assert insert_lines("".join(old).encode(), parse_diff(diff)["f.py"]) == "".join(new).encode()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("+two", "-two", "line 4 .*'-two'"),
        ("+    six\n", "      six\n", "line 7"),
        ("+    six\n", "", "line 7|the diff"),
        ("@@ -1,0 +2 @@", "@@ -1,1 +2 @@", "@@ -1,1 [+]2 @@"),
        ("@@ -1,0 +2 @@\n", "-gone\n@@ -1,0 +2 @@\n", "'-gone'"),
        ("@@ -3,0 +5,2 @@", "@@ -3,0 +4,2 @@", "@@ -3,0 [+]4,2 @@"),
        ("@@ -3,0 +5,2 @@", "@@ -1,0 +3,2 @@", "@@ -1,0 [+]3,2 @@"),
        ("@@ -3,0 +5,2 @@", "@@ -3,0 +5,0 @@", "@@ -3,0 [+]5,0 @@"),
        ("+++ b/m.py", "+++ b/n.py", "'m.py' and 'n.py'"),
        ("--- a/m.py\n", "", r"'\+\+\+ b/m.py'"),
        (SIMPLE, SIMPLE + SIMPLE, "'m.py' and 'm.py'"),
        (SIMPLE, SIMPLE + "--- a/n.py\n+++ b/n.py\n", "the diff"),
        (SIMPLE, "", "the diff"),
        (SIMPLE, "@@ -1,0 +2 @@\n+two\n", "line 1 "),
    ],
)
def test_anything_but_added_lines_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        parse_diff(SIMPLE.replace(old, new, 1))


def test_a_file_that_does_not_fit_is_named() -> None:
    with pytest.raises(PatchError, match="3 .* 2"):
        insert_lines(b"1\n2\n", [Insertion(3, ("x",))])
    assert insert_lines(b"1\n2", [Insertion(2, ("x",))]) == b"1\n2\nx"
    assert remove_lines(b"1\n2\nx", [Insertion(2, ("x",))]) == b"1\n2"
    with pytest.raises(PatchError, match="'x' at line 2"):
        remove_lines(b"1\n2\n", [Insertion(1, ("x",))])
    with pytest.raises(PatchError, match="'x' at line 3"):
        remove_lines(b"1\n2\n", [Insertion(2, ("x",))])
