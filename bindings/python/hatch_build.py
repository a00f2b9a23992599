"""Marks a wheel that carries the library as one for its machine; without it, it is for any."""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("src/mxfp4train")
# Beside the package, where `make wheel` writes what the library was linked for.
TAG = Path("platform-tag")


class CustomBuildHook(BuildHookInterface):
    """Chooses the tag. The package is Python alone and loads the library itself."""

    def initialize(self, version, build_data):
        root = Path(self.root)
        if not (root / PACKAGE / "lib").is_dir():
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{(root / TAG).read_text(encoding='utf-8').strip()}"
