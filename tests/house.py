# SPDX-License-Identifier: Apache-2.0
"""How the package is laid out: `python tests/house.py` prints it, a folder a line.

It measures the source text alone, and ends with status 1 where a limit is passed.
`tests/test_house.py` holds the limits, and which folder may import which.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "jaxdistill"
ROOT_NAMES, FILES, FILE_LINES, FUNCTION_LINES = 15, 12, 450, 60
"""At most so many names in the package's root, files in a folder, lines in a file, and
lines in a function without its docstring. `__init__.py` counts for none of the first
two."""

ALLOWED = {
    "types": "",
    "runtimes": "",
    "losses": "types",
    "models": "types",
    "pretrained": "models",
    "data": "types",
    "parallel": "types",
    "objectives": "types losses",
    "teachers": "types losses models data parallel",
    "train": "types losses models data parallel teachers",
    "report": "parallel train",
    "study": "types models data parallel teachers train report",
    "export": "types runtimes models pretrained data parallel teachers train report",
    "cli": "teachers train report export",
}
"""What each folder may import beside itself: of earlier lines alone, so no cycle."""


class Function(NamedTuple):
    """A function's or method's name, and its lines without those of its docstring."""

    name: str
    lines: int


class Source(NamedTuple):
    """A file, measured in lines; blank ones are counted in `lines` alone."""

    path: Path
    lines: int
    code: int
    docstring: int
    comment: int
    functions: tuple[Function, ...]
    imports: frozenset[str]

    @property
    def folder(self) -> str:
        """The folder below the package, or the name of a file in its root."""
        return self.path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def read(path: Path) -> Source:
    """One file, measured."""
    text = path.read_text()
    tree = ast.parse(text)
    documented = {line for node in _docstrings(tree) for line in _span(node)}
    comments = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    }
    lines = text.splitlines()
    blank = {i for i, line in enumerate(lines, 1) if not line.strip()}
    return Source(
        path,
        len(lines),
        len(lines) - len(documented | comments | blank),
        len(documented - blank),
        len(comments),
        tuple(_functions(tree)),
        frozenset(imports(tree)),
    )


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its folder"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folders_of(source: Source) -> set[str]:
    """The package's other folders that a file imports."""
    own = {
        name.split(".")[1] for name in source.imports if name.startswith("jaxdistill.")
    }
    return own - {source.folder, "__version__"}


def _docstrings(tree: ast.AST) -> Iterator[ast.Expr]:
    """Strings that stand alone: of modules, classes, functions, and of constants."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                yield node


def _functions(tree: ast.AST) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            documented = first in _docstrings(node) and len(_span(first))
            yield Function(node.name, len(_span(node)) - documented)


def _span(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


SOURCES = [read(path) for path in sorted(PACKAGE.rglob("*.py"))]


def passed(sources: list[Source] = SOURCES) -> list[str]:
    """A sentence for each limit that is passed."""
    found = []
    names = {s.folder for s in sources} - {"__init__"}
    if len(names) > ROOT_NAMES:
        found.append(f"the root has {len(names)} names, more than {ROOT_NAMES}")
    counts: dict[Path, int] = {}
    for source in sources:
        name = source.path.relative_to(PACKAGE)
        counts[name.parent] = counts.get(name.parent, 0) + (name.stem != "__init__")
        if source.lines > FILE_LINES:
            found.append(f"{name} has {source.lines} lines, more than {FILE_LINES}")
        found += [
            f"{name}: {function.name} has {function.lines} lines, more than "
            f"{FUNCTION_LINES}"
            for function in source.functions
            if function.lines > FUNCTION_LINES
        ]
        found += [
            f"{name} imports {other}, which {source.folder} may not"
            for other in sorted(folders_of(source))
            if source.folder != "__init__"
            and other not in ALLOWED.get(source.folder, "").split()
        ]
    found += [
        f"{folder} has {count} files, more than {FILES}"
        for folder, count in counts.items()
        if folder.parts and count > FILES
    ]
    return found


def table(sources: list[Source] = SOURCES) -> str:
    """A line for each folder, in the order in which they may import each other."""
    columns = ("files", "code", "docstring", "comment")
    text = [f"{'':24}{''.join(f'{name:>11}' for name in columns)}  longest function"]
    rows: dict[str, list[Source]] = {}
    for source in sources:
        parent = source.path.relative_to(PACKAGE).parent
        rows.setdefault(str(parent) if parent.parts else source.folder, []).append(
            source
        )
    order = ["__init__", *ALLOWED]
    for name in sorted(rows, key=lambda n: (order.index(n.split("/")[0]), n)):
        text.append(_line(name, rows[name]))
    return "\n".join([*text, _line("all", sources)])


def _line(name: str, sources: list[Source]) -> str:
    functions = [function for source in sources for function in source.functions]
    longest = max(functions, key=lambda f: f.lines, default=Function("-", 0))
    sums = [sum(column) for column in zip(*(s[2:5] for s in sources), strict=True)]
    return (
        f"{name:24}{''.join(f'{n:11}' for n in (len(sources), *sums))}"
        f"  {longest.name} ({longest.lines})"
    )


if __name__ == "__main__":
    print(table())
    sys.exit("\n".join(passed()) or 0)
