"""Compiled code for CPUs, as operators `torch.ops.pertoken.*`: what costs too much between matrix products.

It is built with the machine's own C++ compiler on first use, and kept in the cache folder. Wherever it stands there is
a way in plain torch that gives the same numbers: a machine without a compiler is slower, nothing else.
"""

import hashlib
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from pertoken.machine.cache import cache_folder

BUILD_LIMIT = 600.0
"""Seconds that compiling may take, or waiting for another process that is at it."""
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-ffast-math", "-fno-finite-math-only")


@cache
def available() -> bool:
    """Build (once per machine, compiler and version) and load the operators; False if that cannot be done."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not torch.backends.mkldnn.is_available():
        return False
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.[ch]*"))]
    key = "\n".join([*texts, version, torch.__version__, *FLAGS, platform.processor(), processor()])
    target = cache_folder() / "native" / f"pertoken-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    try:
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_suffix(".lock"), timeout=BUILD_LIMIT):  # processes that begin together build once
                if not target.is_file():
                    _build(compiler, target)
        torch.ops.load_library(str(target))
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the operators are there and know these tensors: float32 or bfloat16, on the CPU."""
    known = all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) for x in tensors)
    return known and available()


@cache
def attends(dtype: torch.dtype) -> bool:
    """Whether oneDNN knows the products of `dtype` that attention of packed rows is made of, on this processor: those
    of bfloat16 are known from AVX-512 on."""
    if not available():
        return False
    try:
        x = torch.zeros(2, 1, 8, dtype=dtype)
        torch.ops.pertoken.attend(x, x, x, torch.tensor([[0, 2, -1]]), 0, 1.0)
    except RuntimeError:
        return False
    return True


def multiplies() -> bool:
    """Whether products with packed weights are faster in our code than in oneDNN's, on this processor."""
    return available() and bool(torch.ops.pertoken.multiplies())


def _build(compiler: str, target: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-I{path}" for path in include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    for left in target.parent.glob(f"{target.stem}-*"):  # by a process that was killed: nobody else builds this one now
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.stem}-") as place:
        parts = {source: f"{place}/{source.stem}.o" for source in Path(__file__).parent.glob("*.cpp")}
        _run(*([compiler, *FLAGS, abi, *includes, "-c", str(source), "-o", part] for source, part in parts.items()))
        # Linked in a step of its own: with -ffast-math it would turn subnormal numbers off for the process.
        where, built = [f"-L{path}" for path in library_paths()], f"{place}/pertoken.so"
        _run([compiler, "-shared", "-fopenmp", *parts.values(), *where, "-ltorch_cpu", "-lc10", "-o", built])
        Path(built).replace(target)


def _run(*commands: list[str]) -> None:
    """Run commands side by side; raises CalledProcessError if one fails."""
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands]
    try:
        codes = [process.wait(timeout=BUILD_LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()
    for command, code in zip(commands, codes, strict=True):
        if code:
            raise subprocess.CalledProcessError(code, command)


@cache
def processor() -> str:
    """What the processor can do: code built for one machine must not be loaded on another by way of a shared home."""
    return _cpuinfo("flags") or platform.machine()


@cache
def vendor() -> str:
    """Who has made the processor, as it says itself (`GenuineIntel`, `AuthenticAMD`); "" where that is not known."""
    return _cpuinfo("vendor_id").partition(":")[2].strip()


def _cpuinfo(field: str) -> str:
    """The first line of Linux about the processor that begins with `field`; "" if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(field)), "")
