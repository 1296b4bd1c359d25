"""The package's build hook: compiles the CPU kernels into the wheel; without a compiler the wheel is pure Python."""

import importlib.util
import sysconfig
from pathlib import Path
from platform import machine
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "src/quire/kernels/cpu/libquire_cpu.*"


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs for wheels and editable installs. The library is plain C: one wheel per platform, for every Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, and marks the wheel with its platform."""
        kernels = _load(Path(self.root) / "src/quire/kernels/build.py")
        try:
            kernels.build()
        except kernels.BuildError as error:
            self.app.display_warning(f"no CPU kernels: {error}; attention will run on torch")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        platform = platform.replace(
            "universal2", machine()
        )  # a Mac's Python serves both, the library one
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(LIBRARY)


def _load(path: Path) -> ModuleType:
    """`quire.kernels.build` without the package, whose dependencies are not there yet."""
    spec = importlib.util.spec_from_file_location("quire_kernels_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
