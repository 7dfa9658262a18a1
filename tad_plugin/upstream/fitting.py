"""Checks added lines against the Python file that they are put into: syntax, and names that are defined there."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterable, Sequence, Set

__all__ = ["defined_by", "import_line", "is_import", "misfit"]

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef)


def defined_by(lines: Iterable[str]) -> set[str]:
    """Names that statements of one line each define."""
    return {name for line in lines for name in _bound(ast.parse(line.strip()))}


def import_line(content: bytes) -> int | None:
    """Number of lines up to the end of the first imports of a file; None if it does not begin with imports."""
    try:
        body = ast.parse(content).body
    except (SyntaxError, ValueError):
        return None
    found = None
    for number, statement in enumerate(body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            found = statement.end_lineno
        elif not (number == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            break
    return found


def is_import(lines: Sequence[str]) -> bool:
    """True if all lines are imports at the top of a module. These need no certain neighbours."""
    return all(re.match(r"(import|from) ", line) for line in lines)


def misfit(content: bytes, numbers: Sequence[int], before: bytes, known: Set[str]) -> str | None:
    """Says why added lines do not fit into a file, or returns None if they do.

    They fit if the file can be parsed, if they are statements of it (not part of a text), and if every name that they
    read is defined in their function, around it, at the top of the file, or by Python.

    Args:
        content: the file with the added lines.
        numbers: 1-based numbers of the added lines.
        before: the file without them.
        known: names that are defined elsewhere.
    """
    try:
        old = ast.parse(before)
    except (SyntaxError, ValueError) as error:
        return f"the file is not valid Python even without them ({error})"
    try:
        new = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        return f"with them the file is not valid Python ({error})"
    statements = [node for node in _statements(new) if node.lineno in set(numbers)]
    grown = len(_statements(new)) - len(_statements(old))
    if grown != len(statements) or {statement.lineno for statement in statements} != set(numbers):
        return "they are not statements there"
    unknown = sorted({name for statement in statements for name in _unknown(statement, new) - known})
    return f"{', '.join(unknown)} not defined there" if unknown else None


def _statements(tree: ast.AST) -> list[ast.stmt]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def _unknown(statement: ast.stmt, tree: ast.Module) -> set[str]:
    """Names that a statement reads and nobody defines."""
    known = set(dir(builtins)) | {"__file__", "__name__"} | _bound(tree)
    for function in ast.walk(tree):
        if isinstance(function, _SCOPES) and function.lineno <= statement.lineno <= (function.end_lineno or 0):
            known |= _bound(function)
    known |= _bound(statement)  # lambdas and comprehensions
    if any(isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names) for node in ast.walk(tree)):
        return set()  # what `import *` defines is not known here
    read = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return read - known


def _bound(tree: ast.AST) -> set[str]:
    """Names that a function or the top of a module defines, not those that functions in it define."""
    found: set[str] = set()
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            found.update(node.names)
        if isinstance(node, (*_SCOPES, ast.ClassDef)):
            found.add(node.name)
        if node is tree or not isinstance(node, (*_SCOPES, ast.ClassDef)):
            nodes.extend(ast.iter_child_nodes(node))
    return found
