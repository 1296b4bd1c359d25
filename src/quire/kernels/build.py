"""Compiles the CPU kernels into one shared library: a translation unit per instruction-set level, and a choice.

    python -m quire.kernels.build            writes libquire_cpu.so beside the sources, or says why it cannot

Needs a C++17 compiler (what CXX says, else c++, g++ or clang++) and nothing else: the library has a plain C
interface and knows neither Python nor torch, so that one file serves every Python. Without OpenMP it runs on one
thread. The package's build hook (`hatch_build.py`) runs this file, which is why it imports nothing of Quire.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
LIBRARY = SOURCES / ("libquire_cpu.dylib" if sys.platform == "darwin" else "libquire_cpu.so")
MATRIX = ("-mamx-tile", "-mamx-int8", "-mamx-bf16")
"""The matrix unit; compilers before GCC 11 and clang 11 do not know it, and systems but Linux do not lend it."""
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "v2": ("-march=x86-64-v2",),
        "v3": ("-march=x86-64-v3",),
        "v4": ("-march=x86-64-v4",),
        "v4x": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
        "v4m": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", *MATRIX),
    },
    "aarch64": {"base": ("-march=armv8-a",)},
    "arm64": {"base": ("-march=armv8-a",)},
}
"""Instruction-set levels and the compiler's flags for each; `entry.cpp` chooses by what the processor has."""
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
)


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message says which in one line."""


def compiler() -> list[str]:
    """The C++ compiler: a program and what it is always given. Raises BuildError."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for name, *rest in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(name)
        if found:
            return [found, *rest]
    if asked:
        raise BuildError(f"no C++ compiler was found: CXX says {asked[0]}, and there is none")
    raise BuildError("no C++ compiler was found (c++, g++, clang++, or what CXX says)")


def build(library: Path = LIBRARY) -> Path:
    """Compiles the library; an existing one is replaced in one move, so that who has it open keeps it.

    Raises:
        BuildError: no compiler, a processor without a list of levels, an error of the compiler, or nowhere to write.
    """
    try:
        return _build(library)
    except OSError as error:
        raise BuildError(f"{library} cannot be written: {error.strerror}") from error


def _build(library: Path) -> Path:
    levels = LEVELS.get(platform.machine().replace("AMD64", "x86_64"))
    if levels is None or sys.platform == "win32":
        raise BuildError(f"no kernels for {platform.machine()} on {sys.platform}")
    cxx = compiler()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        openmp = ["-fopenmp"] if _accepts(cxx, work, "-fopenmp") else []
        levels = dict(levels)
        if sys.platform != "linux" or not all(_accepts(cxx, work, flag) for flag in MATRIX):
            levels.pop("v4m", None)
        with_matrix = ["-DQUIRE_WITH_V4M"] if "v4m" in levels else []
        units: dict[str, tuple[str, list[str]]] = {"entry": ("entry.cpp", with_matrix)}
        for level, flags in levels.items():
            units[level] = ("level.cpp", [*flags, f"-DQUIRE_LEVEL={level}"])

        def compile_unit(name: str) -> Path:
            source, flags = units[name]
            target = work / f"{name}.o"
            _run([*cxx, *FLAGS, *openmp, *flags, "-c", str(SOURCES / source), "-o", str(target)])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        made = work / library.name
        _run([*cxx, "-shared", *openmp, *map(str, objects), "-o", str(made)])
        beside = library.with_suffix(f".{os.getpid()}.new")
        shutil.copyfile(made, beside)
        beside.replace(library)
    return library


def _accepts(cxx: list[str], work: Path, flag: str) -> bool:
    probe = work / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    try:
        _run([*cxx, flag, str(probe), "-o", str(work / "probe")])
    except BuildError:
        return False
    return True


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command line
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if "error" in x] or done.stderr.splitlines()
        raise BuildError(f"{Path(command[0]).name} failed: {(lines or ['no message'])[0].strip()}")


def main() -> int:
    """Builds; 1 where that is impossible."""
    try:
        print(build())  # noqa: T201 - a command's result
    except BuildError as error:
        print(f"no CPU kernels: {error}; attention runs on torch", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
