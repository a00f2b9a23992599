#!/usr/bin/env python3
"""Checks the Julia package as far as that can be done without Julia.

Every .jl file must parse. The low-level file must be the one that the header makes; every function
of the header must have its @ccall there, with the header's arguments and result; every struct must
have the sizes and offsets that the C compiler gives it. What the other files use of the low-level
one must be there, calls with as many arguments as it takes, callbacks with the types that C calls.
What the package calls by a bare name must be one of its functions, an argument or of BASE below.
The library in MXFP4TRAIN_LIBRARY, if that is set, must export the functions. It finds what a run
passes by: calls that no test makes. tests/julia.rs runs the package.

  dev/check_julia.py [ROOT]    ROOT is the project's folder, by default the one that this file is in

Needs a C compiler, nm and the Python packages of dev/check_julia.txt.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import tree_sitter
import tree_sitter_julia

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
PACKAGE = ROOT / "bindings/julia"
LOW = PACKAGE / "src/LibMXFP4Train.jl"
sys.path.insert(0, str(PACKAGE / "gen"))

import header as c  # noqa: E402

HEADER = ROOT / "include/mxfp4train.h"

# Size and alignment of Julia's types in a struct, on the 64-bit systems that the library has.
SIZES = {
    "Int32": 4, "UInt32": 4, "Int64": 8, "UInt64": 8, "Csize_t": 8,
    "Cfloat": 4, "Cdouble": 8, "Cstring": 8, "Ptr": 8,
}  # fmt: skip
# The Julia type for each of C's, written apart from the generator's table on purpose.
JULIA_OF_C = {
    "size_t": "Csize_t", "uint64_t": "UInt64", "uint32_t": "UInt32", "int32_t": "Int32",
    "float": "Cfloat", "double": "Cdouble", "void": "Cvoid", "char *": "Cstring",
    "void *": "Ptr{Cvoid}", "char * *": "Ptr{Cstring}", "float *": "Ptr{Cfloat}",
    "int32_t *": "Ptr{Int32}", "uint32_t *": "Ptr{UInt32}", "size_t *": "Ptr{Csize_t}",
    "uint64_t *": "Ptr{UInt64}",
    "void * *": "Ptr{Ptr{Cvoid}}",
}  # fmt: skip

# What the package calls of Julia's own: a name that is not here and nowhere defined is a typing
# error, or is to be looked up in the manual of the oldest Julia of Project.toml, and added.
BASE = set(
    """
    ArgumentError BoundsError Cstring DimensionMismatch IOBuffer Int Int128 Int32 KeyError
    ReentrantLock Ref String UInt UInt64 VersionNumber abspath append! ccall close convert cumsum
    current_task delete! dlopen dlsym eachindex eltype empty! enumerate error fieldnames fieldtype
    filter finalizer findfirst first get getfield haskey include isdefined isempty isfile isinteger
    isinteractive isodd isopen join keys last length lock map merge min nameof new ntuple pairs
    parent pointer pop! position print push! read! reduce repr reshape reverse seek seekend size
    sizehint! sizeof something sprint task_local_storage throw typemax typemin typeof unsafe_load
    unsafe_store! unsafe_string vcat write
    """.split()
)

Node = tree_sitter.Node
failures: list[str] = []


def main() -> int:
    """Runs all checks; 1 if one failed."""
    files = sorted(PACKAGE.rglob("*.jl")) + sorted((ROOT / "examples/julia").glob("*.jl"))
    trees = {path: parse(path) for path in files}
    if failures:
        return report("the rest is not checked")
    header = c.read(HEADER)
    check_generated()
    calls = check_calls(header, trees[LOW])
    structs = check_structs(header, trees[LOW])
    check_constants(header, trees[LOW])
    check_library(header)
    for path, tree in trees.items():
        if path != LOW:
            check_use(path, tree, header, names_of(trees[LOW]))
    check_names(trees)
    exports = check_exports(trees)
    check_project()
    if failures:
        return report("")
    print(
        f"{len(files)} Julia files parse; {calls} functions, {structs} structs and {exports} "
        "exports are what the header says"
    )
    return 0


def report(note: str) -> int:
    """Prints what was found."""
    print("\n".join([*failures, note]).strip(), file=sys.stderr)
    return 1


def parse(path: Path) -> Node:
    """The syntax tree of a file, which must be without errors."""
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_julia.language()))
    root = parser.parse(path.read_bytes()).root_node
    for node in walk(root):
        if node.is_error or node.is_missing:
            fail(path, node, f"expected Julia, got a syntax error at {text(node)[:40]!r}")
    return root


def check_generated() -> None:
    """The committed low-level file is what the generator makes."""
    command = [sys.executable, str(PACKAGE / "gen/generate.py"), "--check"]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode != 0:
        failures.append(made.stderr.strip())


def check_calls(header: c.Header, tree: Node) -> int:
    """Compares each @ccall with the header, and finds those that are not there."""
    functions = {function.name: function for function in header.functions}
    seen = set()
    for definition in of_type(tree, "function_definition"):
        macros = [m for m in of_type(definition, "macrocall_expression") if macro(m) == "@ccall"]
        if not macros:
            continue
        if len(macros) != 1:
            fail(LOW, definition, f"expected one @ccall in a function, got {len(macros)}")
        typed = next(of_type(macros[0], "typed_expression"))
        call, result = typed.named_children
        library, name = text(call.named_children[0]).split(".")
        arguments = [typed_name(a) for a in call.named_children[1].named_children]
        if library != "libmxfp4train" or name not in functions:
            fail(LOW, call, f"expected a function of the header, got {library}.{name}")
            continue
        function = functions[name]
        expected = [(julia_name(n), julia_of(t)) for n, t in function.parameters]
        compare(LOW, call, f"arguments of {name}", expected, arguments)
        compare(LOW, call, f"result of {name}", julia_of(function.result), text(result))
        own_name, own_arguments = signature(definition)
        compare(LOW, definition, "name", name, own_name)
        compare(LOW, definition, f"parameters of {name}", [n for n, _ in expected], own_arguments)
        if name in seen:
            fail(LOW, call, f"expected one binding of {name}, got two")
        seen.add(name)
    for name in functions.keys() - seen:
        failures.append(f"{LOW.name}: expected an @ccall of {name}, got none")
    return len(seen)


def check_structs(header: c.Header, tree: Node) -> int:
    """Compares sizes and offsets by Julia's rules with those of the C compiler."""
    layouts = {}
    for definition in of_type(tree, "struct_definition"):
        name = text(next(of_type(definition, "type_head"))).strip()
        fields = [typed_name(f) for f in definition.named_children if f.type == "typed_expression"]
        offsets, at, alignment = {}, 0, 1
        for field, type_ in fields:
            size, align = size_of(type_)
            at = -(-at // align) * align
            offsets[field] = (at, size)
            at, alignment = at + size, max(alignment, align)
        layouts[name] = (-(-at // alignment) * alignment, offsets)
        if fields and text(definition).startswith("mutable"):
            fail(LOW, definition, f"expected {name} to be immutable, so that references hold it")
    expected = c_layouts(header)
    for struct in header.structs:
        if struct.name not in layouts:
            failures.append(f"{LOW.name}: expected a struct {struct.name}, got none")
        elif struct.fields:
            compare(
                LOW, tree, f"layout of {struct.name}", expected[struct.name], layouts[struct.name]
            )
    return len(expected)


def c_layouts(header: c.Header) -> dict[str, tuple[int, dict[str, tuple[int, int]]]]:
    """Size of every struct, offset and size of every field, as a compiled program prints them."""
    lines = []
    for struct in header.structs:
        if struct.fields:
            lines.append(f'  printf("{struct.name} %zu\\n", sizeof({struct.name}));')
        for name, _, _ in struct.fields:
            field = f"offsetof({struct.name}, {name}), sizeof((({struct.name} *)0)->{name})"
            lines.append(f'  printf("{struct.name}.{julia_name(name)} %zu %zu\\n", {field});')
    program = "\n".join(
        [
            "#include <stdio.h>",
            f'#include "{HEADER}"',
            "int main(void) {",
            *lines,
            "  return 0;",
            "}",
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "layout.c"), Path(folder, "layout")
        source.write_text(program, encoding="utf-8")
        subprocess.run([os.environ.get("CC", "cc"), str(source), "-o", str(binary)], check=True)
        printed = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout
    layouts: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {}
    for line in printed.splitlines():
        name, *numbers = line.split()
        if "." in name:
            struct_name, field_name = name.split(".")
            layouts[struct_name][1][field_name] = (int(numbers[0]), int(numbers[1]))
        else:
            layouts[name] = (int(numbers[0]), {})
    return layouts


def check_constants(header: c.Header, tree: Node) -> None:
    """Every value of an enum has its constant, an Int32 as values are in calls and structs."""
    constants = dict(constant(node) for node in of_type(tree, "const_statement"))
    for enum in header.enums:
        for name, value, _ in enum.values:
            compare(LOW, tree, f"constant {name}", f"Int32({value})", constants.get(name))
    for name, value, _ in header.macros:
        compare(LOW, tree, f"constant {name}", value, constants.get(name))


def check_library(header: c.Header) -> None:
    """The library exports what is bound."""
    library = os.environ.get("MXFP4TRAIN_LIBRARY")
    if not library:
        print("skipped: MXFP4TRAIN_LIBRARY is not set: no library is looked at")
        return
    command = ["nm", "-D", "--defined-only", library]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    exported = {line.split()[-1] for line in lines}
    for function in header.functions:
        if function.name not in exported:
            failures.append(f"{library}: expected a function {function.name}, got none")


def check_use(path: Path, tree: Node, header: c.Header, names: set[str]) -> None:
    """What a file uses of the low-level module is there, and is used as it is meant."""
    functions = {function.name: function for function in header.functions}
    callbacks = {
        (julia_of(f.result), *(julia_of(t).replace("{mxt_", "{Lib.mxt_") for _, t in f.parameters))
        for f in header.callbacks
    }
    for node in of_type(tree, "field_expression"):
        owner, name = text(node).split(".", 1)
        if owner == "Lib" and name not in names:
            fail(path, node, f"expected a name of LibMXFP4Train, got {name}")
    for node in of_type(tree, "call_expression"):
        owner, _, name = text(node.named_children[0]).partition(".")
        if owner == "Lib" and name in functions:
            count = len(node.named_children[1].named_children)
            expected = len(functions[name].parameters)
            compare(path, node, f"number of arguments of {name}", expected, count)
    definitions = {signature(d)[0]: d for d in of_type(tree, "function_definition")}
    for node in of_type(tree, "macrocall_expression"):
        if macro(node) == "@cfunction":
            check_callback(path, node, definitions, callbacks)


def check_callback(
    path: Path, node: Node, definitions: dict[str, Node], callbacks: set[tuple[str, ...]]
) -> None:
    """An @cfunction has the types of a callback of the header, and its function takes them."""
    # The arguments are one tuple in parentheses, or three expressions.
    inner = node.named_children[1]
    while len(inner.named_children) == 1:
        inner = inner.named_children[0]
    function, result, arguments = inner.named_children
    types = [text(a) for a in arguments.named_children]
    if (text(result), *types) not in callbacks:
        fail(path, node, f"expected the types of a callback of the header, got {text(inner)}")
    definition = definitions.get(text(function))
    if definition is None:
        fail(path, node, f"expected a function of this file, got {text(function)}")
        return
    head = next(of_type(definition, "signature"))
    call = next(of_type(head, "call_expression"))
    declared = [typed_name(a)[1] for a in call.named_children[1].named_children]
    compare(path, definition, f"types of {text(function)}", types, declared)


def check_names(trees: dict[Path, Node]) -> None:
    """A function that is called is there."""
    package = set()
    for path, tree in trees.items():
        if path.parent == LOW.parent and path != LOW:
            package |= defined_in(tree)
    for path, tree in trees.items():
        # Tests and examples are run to their last line.
        if path.parent != LOW.parent:
            continue
        known = BASE | package | defined_in(tree) | parameters_in(tree)
        for node in of_type(tree, "call_expression"):
            callee = node.named_children[0]
            if callee.type == "identifier" and text(callee) not in known:
                fail(path, node, f"expected a function that is defined, got {text(callee)}")


def defined_in(tree: Node) -> set[str]:
    """The functions and types that a file defines."""
    names = {signature(definition)[0] for definition in of_type(tree, "function_definition")}
    names |= {text(head).partition(" ")[0] for head in of_type(tree, "type_head")}
    for assignment in of_type(tree, "assignment"):
        target = assignment.named_children[0]
        if target.type == "call_expression":
            names.add(text(target.named_children[0]))
    # Other names of types.
    return names | {constant(node)[0] for node in of_type(tree, "const_statement")}


def parameters_in(tree: Node) -> set[str]:
    """Names of arguments and of types that stand for others: what a file may call without more."""
    names = {"T"}
    for head in of_type(tree, "signature"):
        for arguments in of_type(head, "argument_list"):
            names |= {text(name) for name in arguments.named_children if name.type == "identifier"}
    for assignment in of_type(tree, "assignment"):
        for arguments in of_type(assignment.named_children[0], "argument_list"):
            names |= {text(name) for name in arguments.named_children if name.type == "identifier"}
    return names


def check_exports(trees: dict[Path, Node]) -> int:
    """Every exported name is defined, with a docstring before it."""
    main_file = PACKAGE / "src/MXFP4Train.jl"
    exported = [
        text(name)
        for statement in of_type(trees[main_file], "export_statement")
        for name in statement.named_children
    ]
    documented = set()
    for path, tree in trees.items():
        if path.parent != main_file.parent:
            continue
        for node in walk(tree):
            before = node.prev_named_sibling
            if before is not None and before.type == "string_literal":
                documented.add(defined_name(node))
    for name in exported:
        if name not in documented:
            failures.append(f"{main_file.name}: expected a docstring of {name}, got none")
    return len(exported)


def defined_name(node: Node) -> str:
    """The name that a definition defines, or the empty string."""
    if node.type == "const_statement":
        return constant(node)[0]
    for head in ("type_head", "signature", "call_expression"):
        for found in of_type(node, head):
            return text(found).partition("(")[0].partition(" ")[0].strip()
    return ""


def check_project() -> None:
    """The package's description has what Julia needs, and the crate's version."""
    project = tomllib.loads((PACKAGE / "Project.toml").read_text(encoding="utf-8"))
    crate = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))
    version = crate["workspace"]["package"]["version"]
    if (project["name"], project["version"]) != ("MXFP4Train", version):
        failures.append(f"Project.toml: expected MXFP4Train {version}, got {project['version']}")
    for dependency in project["deps"]:
        if dependency not in project["compat"]:
            failures.append(f"Project.toml: expected a bound for {dependency} in compat, got none")


def julia_of(type_: c.Type) -> str:
    """The Julia type that a C type must have in a call or a struct."""
    name = " ".join([type_.base, *["*"] * type_.pointers])
    if name in JULIA_OF_C:
        return JULIA_OF_C[name]
    return "Ptr{" * type_.pointers + type_.base + "}" * type_.pointers


def julia_name(name: str) -> str:
    """The name of a field or argument in Julia, which has words of its own."""
    return f"{name}_" if name in ("begin", "end") else name


def size_of(type_: str) -> tuple[int, int]:
    """Size and alignment of a field."""
    if type_.startswith("NTuple{"):
        count, element = type_.removeprefix("NTuple{").removesuffix("}").split(",")
        size, alignment = size_of(element.strip())
        return int(count) * size, alignment
    # The types of callbacks are pointers.
    name = "Ptr" if type_.startswith(("Ptr{", "mxt_")) else type_
    return SIZES[name], SIZES[name]


def names_of(tree: Node) -> set[str]:
    """All that the low-level module defines."""
    names = {signature(d)[0] for d in of_type(tree, "function_definition")}
    names |= {text(h).strip() for h in of_type(tree, "type_head")}
    names |= {constant(node)[0] for node in of_type(tree, "const_statement")}
    return names | {"libmxfp4train"}


def constant(node: Node) -> tuple[str, str]:
    """Name and value of a constant."""
    name, value = text(node).removeprefix("const ").split(" = ", 1)
    return name, value


def signature(definition: Node) -> tuple[str, list[str]]:
    """Name and parameters of a function."""
    for head in of_type(definition, "signature"):
        for call in of_type(head, "call_expression"):
            name, arguments = call.named_children[:2]
            return text(name), [text(argument) for argument in arguments.named_children]
    return "", []


def typed_name(node: Node) -> tuple[str, str]:
    """Name and type of `name::type`."""
    name, type_ = node.named_children
    return text(name), text(type_)


def macro(node: Node) -> str:
    """The name of a macro that is called."""
    return text(node.named_children[0])


def compare(path: Path, node: Node, what: str, expected: object, came: object) -> None:
    """Notes a difference."""
    if expected != came:
        fail(path, node, f"{what}: expected {expected}, got {came}")


def fail(path: Path, node: Node, message: str) -> None:
    """Notes a failure with its place."""
    failures.append(f"{path.relative_to(ROOT)}:{node.start_point[0] + 1}: {message}")


def of_type(node: Node, type_: str) -> Iterator[Node]:
    """All nodes of a type, outer ones first."""
    return (found for found in walk(node) if found.type == type_)


def walk(node: Node) -> Iterator[Node]:
    """All nodes, outer ones first."""
    yield node
    for child in node.children:
        yield from walk(child)


def text(node: Node) -> str:
    """The text of a node."""
    return (node.text or b"").decode("utf-8")


if __name__ == "__main__":
    sys.exit(main())
