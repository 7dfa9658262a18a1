"""Patches on checkouts that people have edited: placed by anchors on both sides, and taken back to their edits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tad_plugin.cli import main
from tad_plugin.errors import PatchError, UnknownNameError
from tad_plugin.upstream.added_lines import insert_lines
from tad_plugin.upstream.checkout import apply, reverse, status
from tad_plugin.upstream.make_patch import write_patch
from tad_plugin.upstream.patch import Patch, load_patch, only_files
from tests.upstream.edits import MATRIX, own_comment

MAIN = b'''"""A script."""
import argparse
import random


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--size', type=int, default=3, help='size of a batch')
    parser.add_argument('--steps', type=int, default=2, help='number of steps')
    args = parser.parse_args()

    # the data
    labels = [n % 2 for n in range(10)]
    values = [float(n) for n in range(10)]
    pools = [[], []]
    for number, label in enumerate(labels):
        pools[label].append(number)

    def draw(c, n):
        chosen = random.sample(pools[c], n)
        return [values[i] for i in chosen]

    total = 0.0
    for step in range(args.steps):
        for c in range(2):
            rows = draw(c, args.size)
            loss = sum(rows)
            total = total + loss
        print(step, total)
    return total


if __name__ == '__main__':
    main()
'''
ADDED = {
    "import random\n": ["import tad_plugin"],
    "help='number of steps')\n": ["    tad_plugin.add_arguments(parser)"],
    "append(number)\n": ["    hook = tad_plugin.attach(args=args, labels=labels)", "    pools = hook.pools()"],
    "random.sample(pools[c], n)\n": ["        hook.drawn(chosen)"],
    "range(args.steps):\n": ["        pools = hook.pools()"],
    "loss = sum(rows)\n": ["            loss = hook.reweight(loss)"],
    "print(step, total)\n": ["    hook.finish()"],
}
OTHER = MAIN.replace(b"total", b"result").replace(b"import random\n", b"import random\nimport sys\n")


def with_hook(content: bytes) -> bytes:
    """The script with the lines put in by hand."""
    text = content.decode()
    for after, lines in ADDED.items():
        assert text.count(after) <= 1
        text = text.replace(after, after + "".join(f"{line}\n" for line in lines))
    return text.encode()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "checkout"
    (place / "sub").mkdir(parents=True)
    (place / ".git").mkdir()
    (place / ".git" / "HEAD").write_text("a1" * 20 + "\n")
    (place / "main.py").write_bytes(MAIN)
    (place / "sub" / "other.py").write_bytes(OTHER)
    return place


@pytest.fixture
def patch(root: Path, tmp_path: Path) -> Patch:
    edited = tmp_path / "edited"
    (edited / "sub").mkdir(parents=True)
    (edited / "main.py").write_bytes(with_hook(MAIN))
    (edited / "sub" / "other.py").write_bytes(
        with_hook(OTHER.replace(b"result)\n", b"total)\n")).replace(b"total", b"result")
    )
    folder = tmp_path / "patches"
    write_patch("demo", root, edited, folder, repository="https://example.org/demo", commit="a1" * 20)
    return load_patch("demo", folder)


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.py")}


def edit(root: Path, *pairs: tuple[str, str], file: str = "main.py") -> None:
    text = (root / file).read_text()
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (root / file).write_text(text)


@pytest.mark.parametrize("case", MATRIX)
def test_the_matrix_of_checkouts(case: str, root: Path, patch: Patch) -> None:
    change, of_root, _, after = MATRIX[case]
    for name, content in files(root).items():
        (root / name).write_bytes(change(content))
    if of_root is not None:
        of_root(root)
    before = files(root)
    apply(patch, root)
    found = status(patch, root)
    assert found.condition == after
    assert [len(state.own) for state in found.files] == [8, 8]
    # the same edit of the patched files gives the same bytes
    plain = {f.path: insert_lines(MAIN if f.path == "main.py" else OTHER, f.insertions) for f in patch.files}
    spaces = {f.path: {line.encode() for i in f.insertions for line in i.lines} for f in patch.files}
    for name, content in files(root).items():
        expected = change(plain[name])
        if case == "trailing spaces":  # not on our lines
            expected = b"\n".join(
                line.rstrip() if line.rstrip() in spaces[name] else line for line in expected.split(b"\n")
            )
        assert content == expected
    reverse(patch, root)
    assert files(root) == before


def test_a_comment_after_patching_stays(root: Path, patch: Patch) -> None:
    apply(patch, root)
    for name, content in files(root).items():
        (root / name).write_bytes(own_comment(content))
    assert status(patch, root).condition == "patched and edited"
    with pytest.raises(PatchError, match="'demo'"):
        apply(patch, root)
    reverse(patch, root)
    assert files(root) == {"main.py": own_comment(MAIN), "sub/other.py": own_comment(OTHER)}
    assert status(patch, root).condition == "edited"


@pytest.mark.parametrize(
    "pair",
    [
        ("            rows = draw(c, args.size)\n", "            rows = draw(c, args.size)\n            print(rows)\n"),
        ("    labels = [n % 2", "    print('labels')\n    labels = [n % 2"),
        ("total = 0.0", "total = 1.0"),
        ("    return total\n", "    return total\n\n\ndef more():\n    return 1\n"),
        ("import random\n", "import random\nimport sys\n"),
        ("import random\n", "import sys\nimport random\nfrom pathlib import Path\n"),
        ("'size of a batch'", "'a batch'"),
        ("'number of steps'", "'steps'"),
    ],
)
def test_other_edits_do_not_matter_and_stay(pair: tuple[str, str], root: Path, patch: Patch) -> None:
    edit(root, pair)
    before = files(root)
    apply(patch, root)
    patched = (root / "main.py").read_text()
    assert all(patched.count(line) >= 1 for lines in ADDED.values() for line in lines)
    # in front of what followed, behind what came before
    assert patched.index("labels=labels)") < patched.index("def draw") < patched.index("hook.drawn")
    assert patched.index("loss = hook.reweight") < patched.index("total = total + loss")
    reverse(patch, root)
    assert files(root) == before


def test_code_that_moved_deeper_gets_deeper_lines(root: Path, patch: Patch) -> None:
    head, body = MAIN.decode().split("    total = 0.0\n")
    loop, rest = body.split("    return total\n")
    moved = f"    total = 0.0\n{loop}    return total\n".splitlines()
    deeper = "".join(f"    {line}\n" for line in moved)
    (root / "main.py").write_text(f"{head}    for run in range(2):\n{deeper}{rest}")
    before = files(root)
    apply(patch, root)
    text = (root / "main.py").read_text()
    assert "\n                loss = hook.reweight(loss)\n                total = total + loss\n" in text
    assert "\n            pools = hook.pools()\n            for c in range(2):\n" in text
    reverse(patch, root)
    assert files(root) == before


def test_tabs_are_kept(root: Path, patch: Patch) -> None:
    (root / "main.py").write_bytes(re.sub(rb"(?m)^( {4})+", lambda m: b"\t" * (len(m[0]) // 4), MAIN))
    before = files(root)
    apply(patch, root)
    assert b"\n\t\t\tloss = hook.reweight(loss)\n" in (root / "main.py").read_bytes()
    reverse(patch, root)
    assert files(root) == before


one_sided: dict[str, list[tuple[str, str]]] = {
    "all before it changed": [
        ("rows = draw(c, args.size)\n            loss = sum(rows)\n", "mean = 3.0\n            loss = mean / 2\n")
    ],
    "all after it changed": [("            total = total + loss\n", "            x = loss\n            total += x\n")],
    "a new line at the place": [("loss = sum(rows)\n", "loss = sum(rows)\n            loss = loss / 2\n")],
}


@pytest.mark.parametrize("case", one_sided)
def test_a_place_with_one_side_is_refused_and_suggested(
    case: str, root: Path, patch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(root, *one_sided[case])
    before = files(root)
    with pytest.raises(PatchError, match=r"main.py: .*'loss = hook.reweight\(loss\)'.*patch guide"):
        apply(patch, root)
    assert files(root) == before
    found = status(patch, root)
    assert found.condition == "edited"
    (point,) = [p for p in found.files[0].points if "reweight" in p.insertion.lines[0]]
    assert point.line is None and point.suggestions
    folder = root.parent / "patches"
    assert main(["patch", "guide", "demo", str(root), "--patches", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "suggestion: after line" in out and "loss = hook.reweight(loss)" in out and files(root) == before
    # the reader pastes the lines where they belong, and apply does the rest
    text = (root / "main.py").read_text().splitlines(keepends=True)
    for p in found.files[0].points[::-1]:
        if p.line is None:
            at = next((n for n, line in enumerate(text) if line.strip().startswith("loss = ")), len(text)) + 1
            text[at:at] = [row.decode() + "\n" for row in p.rows]
    (root / "main.py").write_text("".join(text))
    apply(patch, root)
    assert status(patch, root).condition == "patched and edited"
    reverse(patch, root)
    assert files(root) == before


def test_a_twin_of_a_place_is_not_taken_for_it(root: Path, patch: Patch) -> None:
    # the place is gone; another one looks like one side of it
    edit(
        root,
        ("            loss = sum(rows)\n            total = total + loss\n", "            total += sum(rows)\n"),
        ("    main()\n", "    loss = sum(rows)\n    main()\n"),
    )
    before = files(root)
    with pytest.raises(PatchError, match="reweight"):
        apply(patch, root)
    assert files(root) == before


def test_two_like_places_are_refused(root: Path, patch: Patch) -> None:
    text = (root / "main.py").read_text()
    start, end = text.index("    total = 0.0\n"), text.index("    return total\n")
    (root / "main.py").write_text(text[:end] + text[start:end] + text[end:])
    with pytest.raises(PatchError, match="2 places match"):
        apply(patch, root)


def test_names_that_the_file_does_not_define_are_refused(root: Path, patch: Patch) -> None:
    text = MAIN.decode().replace("labels", "classes")
    (root / "main.py").write_text(
        text.replace("enumerate(classes)", "enumerate(labels)").replace("def main():", "def main(labels):")
    )
    apply(only_files(patch, ["main.py"]), root)
    reverse(patch, root)
    (root / "main.py").write_text(text)
    with pytest.raises(PatchError, match="labels not defined there"):
        apply(patch, root)
    (root / "main.py").write_text(MAIN.decode() + "print 'old'\n")
    with pytest.raises(PatchError, match="not valid Python"):
        apply(patch, root)


def test_a_place_inside_a_text_is_refused(root: Path, patch: Patch) -> None:
    edit(
        root, ("    total = 0.0\n", "    total = 0.0\n    '''\n"), ("    return total\n", "    '''\n    return total\n")
    )
    with pytest.raises(PatchError, match="not statements there"):
        apply(patch, root)


def test_own_lines_are_found_by_content(root: Path, patch: Patch) -> None:
    apply(patch, root)
    edit(
        root,
        ("        pools = hook.pools()\n", ""),
        ("    hook.finish()\n", ""),
        ("    return total\n", "    hook.finish()\n    return total\n"),
    )
    found = status(patch, root)
    assert found.condition == "partly patched" and [len(s.own) for s in found.files] == [7, 8]
    apply(patch, root)  # only what is missing
    assert (root / "main.py").read_bytes() == with_hook(MAIN)
    # the user's own use of the hook, and a third copy of one of our lines elsewhere, stay
    edit(
        root,
        ("    return total\n", "    print(hook.state)\n    return total\n"),
        ("    total = 0.0\n", "    total = 0.0\n    pools = hook.pools()\n"),
    )
    reverse(patch, root)
    expected = MAIN.decode().replace("    return total\n", "    print(hook.state)\n    return total\n")
    assert (root / "main.py").read_text() == expected.replace(
        "    total = 0.0\n", "    total = 0.0\n    pools = hook.pools()\n"
    )


def test_a_line_of_ours_that_was_edited_stays_and_is_named(
    root: Path, patch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    apply(patch, root)
    edit(root, ("labels=labels)", "labels=labels, seed=3)"))
    assert status(patch, root).condition == "partly patched"
    folder = str(root.parent / "patches")
    assert main(["patch", "reverse", "demo", str(root), "--patches", folder]) == 0
    assert "main.py, line 18: hook = tad_plugin.attach(args=args, labels=labels, seed=3)" in capsys.readouterr().err
    line = "    hook = tad_plugin.attach(args=args, labels=labels, seed=3)\n"
    assert (root / "main.py").read_text() == MAIN.decode().replace("append(number)\n", f"append(number)\n{line}")


def test_some_files_only(root: Path, patch: Patch) -> None:
    (root / "sub" / "other.py").unlink()
    with pytest.raises(PatchError, match="--files main.py"):
        apply(patch, root)
    part = only_files(patch, ["main.py"])
    apply(part, root)
    assert status(part, root).condition == "patched" and (root / "main.py").read_bytes() == with_hook(MAIN)
    with pytest.raises(UnknownNameError, match="main.py"):
        only_files(patch, ["mian.py"])
    reverse(patch, root)
    assert files(root) == {"main.py": MAIN}


def test_a_file_that_changes_meanwhile_is_not_overwritten(
    root: Path, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tad_plugin.upstream import checkout as writing

    original: Callable[..., None] = writing._write_beside

    def slow(place: Path, temporary: Path, content: bytes) -> None:
        original(place, temporary, content)
        if place.name == "other.py" and b"hook" in content:
            place.write_bytes(OTHER + b"# new\n")

    monkeypatch.setattr(writing, "_write_beside", slow)
    with pytest.raises(PatchError, match="changed meanwhile"):
        apply(patch, root)
    assert files(root) == {"main.py": MAIN, "sub/other.py": OTHER + b"# new\n"}


def test_the_verb_shows_before_it_acts_and_tells_conditions_apart(
    root: Path, patch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(root.parent / "patches")

    def verb(action: str, *more: str) -> tuple[int, str]:
        code = main(["patch", action, "demo", str(root), "--patches", folder, *more])
        return code, capsys.readouterr().out

    assert verb("status")[0] == 4 and "demo: unpatched" in verb("status")[1]
    code, out = verb("apply", "--dry_run")
    assert code == 0 and files(root) == {"main.py": MAIN, "sub/other.py": OTHER}
    added = [line[1:] for line in out.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert added.count("    hook = tad_plugin.attach(args=args, labels=labels)") == 2 and len(added) == 16
    assert verb("guide")[1].count("(verified)") == 14 and files(root) == {"main.py": MAIN, "sub/other.py": OTHER}
    assert verb("apply")[0] == 0 and verb("status")[0] == 0
    edit(root, ("total = 0.0", "total = 1.0"))
    assert verb("status")[0] == 3 and verb("guide")[1].count("in place, line") == 14
    code, out = verb("reverse", "--dry_run")
    assert code == 0 and out.count("\n-") == 17 and status(patch, root).condition == "patched and edited"
    assert verb("reverse")[0] == 0 and verb("status")[0] == 5
    edit(root, ("import random\n", "import random\nimport tad_plugin\n"))
    assert verb("status")[0] == 6
    for name in files(root):
        (root / name).write_text("x = 1\n")
    assert verb("status")[0] == 7 and "not this repository" in verb("status")[1]
    assert verb("apply")[0] == 2
