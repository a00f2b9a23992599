#!/usr/bin/env python3
"""Writes src/LibMXFP4Train.jl, the C API in Julia, from include/mxfp4train.h.

  bindings/julia/gen/generate.py           writes the file
  bindings/julia/gen/generate.py --check   fails if the committed file is another

Needs a C compiler and pycparser.
"""

import argparse
import sys
from pathlib import Path

import header as c

ROOT = Path(__file__).resolve().parents[3]
HEADER = ROOT / "include/mxfp4train.h"
OUTPUT = ROOT / "bindings/julia/src/LibMXFP4Train.jl"
WIDTH = 92

# Julia's names of C's types. `Cstring` converts a Julia string and refuses zero bytes in it.
TYPES = {
    "void": "Cvoid",
    "char": "Cchar",
    "int32_t": "Int32",
    "uint32_t": "UInt32",
    "int64_t": "Int64",
    "uint64_t": "UInt64",
    "size_t": "Csize_t",
    "float": "Cfloat",
    "double": "Cdouble",
}
# Words that cannot be names in Julia; the names get an underscore at their end.
RESERVED = {
    "baremodule", "begin", "break", "catch", "const", "continue", "do", "else", "elseif", "end",
    "export", "false", "finally", "for", "function", "global", "if", "import", "let", "local",
    "macro", "module", "quote", "return", "struct", "true", "try", "using", "while",
}  # fmt: skip

INTRODUCTION = '''\
# Made from include/mxfp4train.h by gen/generate.py: run that after a change of the header.

"""
The C API as it is: a function for every one of `mxfp4train.h`, structs of the same layout, and
the constants. The rest of the package stands on it; programs want `MXFP4Train`.

Functions check nothing and throw nothing. Where C wants a pointer they take a `Ref`, an `Array`
or `C_NULL`, and keep what they are given alive for the call.
"""
module LibMXFP4Train

# What the functions call: the SONAME, by which the system finds the library that is loaded already.
const libmxfp4train = "libmxfp4train.so.{abi}"
'''


def main() -> int:
    """Writes or compares the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    made = generate(c.read(HEADER))
    if not parser.parse_args().check:
        OUTPUT.write_text(made, encoding="utf-8")
        return 0
    if OUTPUT.read_text(encoding="utf-8") == made:
        return 0
    script = Path(__file__).resolve().relative_to(ROOT)
    print(
        f"{OUTPUT.relative_to(ROOT)}: expected what {HEADER.relative_to(ROOT)} makes, got another "
        f"text; run {script}",
        file=sys.stderr,
    )
    return 1


def generate(header: c.Header) -> str:
    """The text of the Julia file."""
    abi = next(value for name, value, _ in header.macros if name == "MXT_ABI_VERSION")
    parts = [INTRODUCTION.format(abi=abi)]
    for name, value, documentation in header.macros:
        parts.append(f"{docstring(documentation)}const {name} = {value}\n")
    for name, type_, documentation in header.aliases:
        parts.append(f"{docstring(documentation)}const {name} = {julia_type(type_)}\n")
    for enum in header.enums:
        parts.append(comment(f"{enum.name}: {' '.join(enum.documentation)}"))
        for name, value, documentation in enum.values:
            parts.append(f"{docstring(documentation)}const {name} = Int32({value})\n")
    for callback in header.callbacks:
        parts.append(f"{docstring(callback.documentation)}const {callback.name} = Ptr{{Cvoid}}\n")
    # Opaque types first: fields and arguments of others point to them.
    for struct in sorted(header.structs, key=lambda struct: bool(struct.fields)):
        parts.append(docstring(struct.documentation) + struct_text(struct))
    for function in header.functions:
        parts.append(function_text(function))
    return "\n".join(parts) + "\nend\n"


def struct_text(struct: c.Struct) -> str:
    """An immutable struct, or a type that only pointers point to."""
    if not struct.fields:
        return f"mutable struct {struct.name} end\n"
    lines = [f"struct {struct.name}"]
    for name, type_, documentation in struct.fields:
        lines += [f"    # {line}".rstrip() for line in documentation]
        lines.append(f"    {julia_name(name)}::{julia_type(type_)}")
    return "\n".join([*lines, "end", ""])


def function_text(function: c.Function) -> str:
    """A function of the same name around the call."""
    names = [julia_name(name) for name, _ in function.parameters]
    typed = [f"{julia_name(n)}::{julia_type(t)}" for n, t in function.parameters]
    signature = f"{function.name}({', '.join(names)})"
    result = julia_type(function.result)
    call = f"    return @ccall libmxfp4train.{function.name}({', '.join(typed)})::{result}"
    if len(call) > WIDTH:
        arguments = "".join(f"        {argument},\n" for argument in typed).removesuffix(",\n")
        call = f"    return @ccall libmxfp4train.{function.name}(\n{arguments}\n    )::{result}"
    documentation = docstring([f"    {signature}", "", *function.documentation])
    return f"{documentation}function {signature}\n{call}\nend\n"


def julia_type(type_: c.Type) -> str:
    """The Julia type that a `ccall` or a field of a struct needs for a C type."""
    pointers = type_.pointers
    if type_.base == "char" and pointers > 0:
        name, pointers = "Cstring", pointers - 1
    else:
        name = TYPES.get(type_.base, type_.base)
    name = "Ptr{" * pointers + name + "}" * pointers
    return f"NTuple{{{type_.array},{name}}}" if type_.array else name


def julia_name(name: str) -> str:
    """A name that Julia takes."""
    return f"{name}_" if name in RESERVED else name


def docstring(lines: list[str]) -> str:
    """A docstring; nothing in it is code."""
    text = "\n".join(lines).replace("\\", "\\\\").replace("$", "\\$").replace('"', '\\"')
    return f'"""\n{text}\n"""\n'


def comment(text: str) -> str:
    """A comment line."""
    return f"# {text}\n"


if __name__ == "__main__":
    sys.exit(main())
