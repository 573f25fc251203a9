"""Owns the building of the C++ kernels, once per instruction set: `python -m engine.kernels.build`, at set-up.

Without a compiler nothing is built and the engine computes with torch. A library's name holds a digest of its source and
flags, so that a stale one is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
FOLDER = Path(__file__).with_name("built")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
ROUNDING = "AVX512_BF16"  # rounds what meets weights or KV of bfloat16
# Best first. As torch names them, but for ROUNDING, which it counts as AVX512.
INSTRUCTION_SETS = {
    ROUNDING: (*_AVX512, "-mavx512bf16"),
    "AVX512": _AVX512,
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
_COMPILE_S = 120.0


def library_path(instruction_set: str) -> Path:
    digest = hashlib.sha256(SOURCE.read_bytes() + repr((_FLAGS, INSTRUCTION_SETS[instruction_set])).encode())
    return FOLDER / f"kernels-{instruction_set.lower()}-{digest.hexdigest()[:12]}.so"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(instruction_set: str, compiler_path: str) -> Path:
    """Raises subprocess.CalledProcessError with the compiler's words."""
    path = library_path(instruction_set)
    if not path.exists():
        FOLDER.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        command = [compiler_path, *_FLAGS, *INSTRUCTION_SETS[instruction_set], "-o", str(partial), str(SOURCE)]
        subprocess.run(command, check=True, timeout=_COMPILE_S, capture_output=True, text=True)
        partial.replace(path)
    return path


def main() -> int:
    found = compiler()
    if found is None:
        sys.stderr.write("no C++ compiler (CXX or g++): the engine will compute with torch, which is slower\n")
        return 0
    for name in INSTRUCTION_SETS:
        try:
            build(name, found)
        except (subprocess.SubprocessError, OSError) as error:
            sys.stderr.write(f"the kernels for {name} were not built: {getattr(error, 'stderr', '') or error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
