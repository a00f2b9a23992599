#!/usr/bin/env python3
"""Writes the licences of all crates that are linked into the library and mxtrain, with their texts.

Usage: dev/third-party.py FILE

Called by `make`. Asks `cargo metadata` (CARGO names another cargo) which crates there are and takes the texts
from their sources, which cargo has fetched to build them; it fetches those that only tests need, unless they
are there.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARGO = os.environ.get("CARGO", "cargo")
# What files with the terms are called, in any case and with any ending.
TERMS = re.compile(r"(licen[cs]e|copying|notice|copyright|unlicense)([-._].*)?$", re.IGNORECASE)
CODE = (".rs", ".c", ".h", ".py", ".toml", ".json")


def output(*command):
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def linked():
    """The packages whose code ends up in the library or in mxtrain."""
    host = re.search(r"^host: (.*)$", output(os.environ.get("RUSTC", "rustc"), "-vV"), re.MULTILINE)
    metadata = json.loads(
        output(CARGO, "metadata", "--format-version=1", "--locked", f"--filter-platform={host[1]}")
    )
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    ours = metadata["workspace_members"]
    found, waiting = set(), list(ours)
    while waiting:
        package = waiting.pop()
        kinds = {kind for target in packages[package]["targets"] for kind in target["kind"]}
        # A procedural macro runs in the compiler.
        if package in found or "proc-macro" in kinds:
            continue
        found.add(package)
        for dependency in nodes[package]["deps"]:
            # Neither "dev" nor "build".
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                waiting.append(dependency["pkg"])
    others = (packages[package] for package in found.difference(ours))
    return sorted(others, key=lambda package: (package["name"], package["version"]))


def texts(package):
    """Names and contents of the files with the terms, those of sources in other languages included."""
    folder = Path(package["manifest_path"]).parent
    paths = {path for path in folder.rglob("*") if TERMS.match(path.name)}
    if package["license_file"]:
        paths.add(folder / package["license_file"])
    for path in sorted(paths):
        if path.is_file() and path.suffix not in CODE:
            text = path.read_text(encoding="utf-8", errors="replace")
            yield str(path.relative_to(folder)), "\n".join(line.rstrip() for line in text.splitlines())


def main():
    (target,) = sys.argv[1:]
    crates = linked()
    lines = [
        "libmxfp4train and mxtrain contain code of the Rust standard library (MIT OR Apache-2.0) and of these",
        "crates, each under the terms beside it. Their authors' texts follow.",
        "",
    ]
    holders = {}
    for crate in crates:
        name = f"{crate['name']} {crate['version']}"
        terms = crate["license"] or f"the file {crate['license_file']}"
        lines.append(f"{name}: {terms}  {crate['repository'] or ''}".rstrip())
        found = False
        for file, text in texts(crate):
            found = True
            # The same text of several crates is written once.
            holders.setdefault(text.strip("\n"), []).append(f"{name}: {file}")
        if not found:
            authors = ", ".join(crate["authors"]) or "its authors"
            lines.append(f"    (its source has no text of the terms; by {authors})")
    for text, files in holders.items():
        lines += ["", "=" * 80, *files, "=" * 80, "", text]
    content = "\n".join(lines) + "\n"
    partial = Path(f"{target}.part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(content, encoding="utf-8")
    partial.replace(target)


if __name__ == "__main__":
    main()
