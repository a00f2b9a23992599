"""What include/mxfp4train.h declares, by way of the C preprocessor and pycparser."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pycparser import c_ast, c_parser

# The header needs these types and no system headers, whose extensions pycparser does not know.
SYSTEM_HEADERS = {
    "stddef.h": "typedef unsigned long size_t;\n",
    "stdint.h": "".join(
        f"typedef {base} {name};\n"
        for base, name in [
            ("signed int", "int32_t"),
            ("unsigned int", "uint32_t"),
            ("signed long", "int64_t"),
            ("unsigned long", "uint64_t"),
        ]
    ),
}


@dataclass(frozen=True)
class Type:
    """A C type: `base` with so many pointers, or an array of `array` of it."""

    base: str
    pointers: int = 0
    array: int = 0


@dataclass
class Function:
    """A function, or the type of a callback."""

    name: str
    result: Type
    parameters: list[tuple[str, Type]]
    documentation: list[str]


@dataclass
class Struct:
    """A struct; `fields` are name, type and documentation, and none if it is opaque."""

    name: str
    fields: list[tuple[str, Type, list[str]]]
    documentation: list[str]


@dataclass
class Enum:
    """An enum; `values` are name, value and documentation."""

    name: str
    values: list[tuple[str, int, list[str]]]
    documentation: list[str]


@dataclass
class Header:
    """All that the header declares, in its order."""

    macros: list[tuple[str, str, list[str]]] = field(default_factory=list)
    enums: list[Enum] = field(default_factory=list)
    structs: list[Struct] = field(default_factory=list)
    aliases: list[tuple[str, Type, list[str]]] = field(default_factory=list)
    callbacks: list[Function] = field(default_factory=list)
    functions: list[Function] = field(default_factory=list)


def read(path: Path) -> Header:
    """Parses the header at `path`."""
    text = preprocess(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    header = Header()
    for match in re.finditer(r"^#define (MXT_\w+) (.+)$", text, re.MULTILINE):
        name = match[1]
        at = next(i for i, line in enumerate(lines) if line.startswith(f"#define {name} "))
        header.macros.append((name, match[2], comment_above(lines, at)))
    code = re.sub(r"^#(define|undef)\b.*$", "", text, flags=re.MULTILINE)
    for node in c_parser.CParser().parse(code, str(path)).ext:
        if node.coord is not None and Path(node.coord.file) == path:
            Reader(header, lines).declaration(node)
    return header


def preprocess(path: Path) -> str:
    """The header with its includes and, as lines of their own, the macros that it defines."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in SYSTEM_HEADERS.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        command = [os.environ.get("CC", "cc"), "-E", "-dD", "-nostdinc", "-I", folder, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def comment_above(lines: list[str], at: int) -> list[str]:
    """The comment that ends above line `at` (from 0), without its slashes."""
    start = at
    while start > 0 and lines[start - 1].lstrip().startswith("//"):
        start -= 1
    return [line.strip().removeprefix("//").removeprefix(" ") for line in lines[start:at]]


class Reader:
    """Turns nodes of pycparser into entries of a header."""

    def __init__(self, header: Header, lines: list[str]) -> None:
        self.header = header
        self.lines = lines

    def declaration(self, node: c_ast.Node) -> None:
        """Adds a declaration of the file's top level."""
        if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.FuncDecl):
            self.header.functions.append(self.function(node.name, node.type, node))
        elif isinstance(node, c_ast.Typedef):
            self.typedef(node)
        else:
            raise ValueError(f"{node.coord}: expected a function or a typedef, got {node}")

    def typedef(self, node: c_ast.Typedef) -> None:
        """Adds a typedef: a struct, an enum, a callback or another name of a type."""
        inner = node.type.type
        if isinstance(inner, c_ast.FuncDecl):
            self.header.callbacks.append(self.function(node.name, inner, node))
        elif isinstance(inner, c_ast.Struct):
            fields = [
                (decl.name, self.type(decl.type), self.documentation(decl))
                for decl in inner.decls or []
            ]
            self.header.structs.append(Struct(node.name, fields, self.documentation(inner)))
        elif isinstance(inner, c_ast.Enum):
            values = [
                (item.name, self.integer(item.value), self.documentation(item))
                for item in inner.values.enumerators
            ]
            self.header.enums.append(Enum(node.name, values, self.documentation(inner)))
        else:
            alias = (node.name, self.type(node.type), self.documentation(node))
            self.header.aliases.append(alias)

    def function(self, name: str, node: c_ast.FuncDecl, at: c_ast.Node) -> Function:
        """A function with its parameters, of which `void` alone is none."""
        parameters = [(p.name, self.type(p.type)) for p in (node.args.params if node.args else [])]
        if parameters == [(None, Type("void"))]:
            parameters = []
        return Function(name, self.type(node.type), parameters, self.documentation(at))

    def type(self, node: c_ast.Node) -> Type:
        """A type without its `const`, which no calling convention knows."""
        if isinstance(node, c_ast.PtrDecl):
            inner = self.type(node.type)
            return Type(inner.base, inner.pointers + 1)
        if isinstance(node, c_ast.ArrayDecl):
            inner = self.type(node.type)
            return Type(inner.base, inner.pointers, self.integer(node.dim))
        if isinstance(node, c_ast.TypeDecl):
            return self.type(node.type)
        if isinstance(node, c_ast.IdentifierType):
            return Type(" ".join(node.names))
        if isinstance(node, c_ast.Struct):
            return Type(node.name)
        raise ValueError(f"{node.coord}: expected a type that the bindings know, got {node}")

    def integer(self, node: c_ast.Node) -> int:
        """The value of a constant, which may have a minus in front."""
        if isinstance(node, c_ast.UnaryOp) and node.op == "-":
            return -self.integer(node.expr)
        if isinstance(node, c_ast.Constant):
            return int(node.value, 0)
        raise ValueError(f"{node.coord}: expected an integer constant, got {node}")

    def documentation(self, node: c_ast.Node) -> list[str]:
        """The comment above a declaration."""
        return comment_above(self.lines, node.coord.line - 1)
