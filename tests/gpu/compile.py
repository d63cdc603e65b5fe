"""Compile the Triton kernels for NVIDIA GPUs, on a machine without one, and look at what comes out.

    python tests/gpu/compile.py [sm ...]        (default: 80 90)

The launches are the real ones, of `local_norms` and `scale_` on CPU tensors; only the driver is a stand-in that says
which GPU to compile for, and nothing is run. Prints one JSON line a kernel and exits with 1 if a kernel
spills, reads or writes whole blocks otherwise than by 16 bytes, works in float64 where it should not, flushes
denormals, does not round bf16 to nearest, is compiled twice for arguments of other alignments, or uses so many
registers that less than half of the threads fit on the chip.

Needs Triton, with TRITON_INTERPRET unset, and no GPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from math import inf
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import compiler as nvidia  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from distclip.kernels import triton  # noqa: E402
from distclip.kernels.triton import device, table  # noqa: E402

REGISTERS = 64  # a thread; a chip holds 65536 of them and 2048 threads: 64 leaves room for half of the threads
VECTORS = 8  # 16-byte loads of one thread for a block of 32 KiB


class StandIn:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm  # what a device compiled is remembered by its number

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(sm: int) -> list[tuple[str, torch.dtype, float | None, Any]]:
    """Name, dtype, p and kernel of the launches for every dtype and p; a kernel that is launched again not again."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    driver.set_active(StandIn(sm))
    JITFunction.run = compile_only
    found = []
    try:
        for dtype in table.DTYPES:
            tensors = [torch.ones(7, dtype=dtype), torch.ones(70_000, dtype=dtype)]
            for p in (1.0, 2.0, 3.0, 3.7, inf):
                triton.local_norms(tensors, p)
                triton.local_norms(tensors[:1], p)  # an odd number of rows: what lies behind them is aligned otherwise
                found += [(name, dtype, p, kernel) for name, kernel in kernels]
                kernels.clear()
            for coef in torch.ones(2):
                triton.scale_(tensors, coef)
            found += [(name, dtype, None, kernel) for name, kernel in kernels]
            kernels.clear()
    finally:
        JITFunction.run = run
    return [launch for i, launch in enumerate(found) if launch not in found[:i]]


def assembler(sm: int) -> str:
    """The ptxas that Triton takes for a chip. Triton 3.2 had one for all."""
    choice = getattr(nvidia, "get_ptxas", None)
    return nvidia._path_to_binary("ptxas")[0] if choice is None else choice(sm).path


def assembled(ptx: str, sm: int) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, as ptxas says."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        chip = f"sm_{sm}a" if sm >= 90 else f"sm_{sm}"
        command = [assembler(sm), "-v", f"--gpu-name={chip}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers, said
    assert spills, said
    return int(registers[1]), int(spills[1]) + int(spills[2])


def count(pattern: str, ptx: str) -> int:
    return len(re.findall(pattern, ptx))


def faults(name: str, dtype: torch.dtype, p: float | None, facts: dict[str, int], ptx: str) -> list[str]:
    wrong = []
    if facts["spilled_bytes"]:
        wrong.append("spills")
    if facts["registers"] > REGISTERS:
        wrong.append(f"more than {REGISTERS} registers")
    if count(r"\b(add|sub|mul|fma|cvt)\.[\w.]*ftz", ptx):
        wrong.append("flushes denormals")
    if count(r"\batom\.|\bred\.global", ptx):
        wrong.append("has an atomic")
    whole = name == "scale_blocks" or (name == "block_sums" and p in (1.0, 2.0, 3.0, inf))
    if whole and facts["vector_loads"] < VECTORS:
        wrong.append("does not load whole blocks by 16 bytes")
    if name == "scale_blocks" and facts["vector_stores"] != VECTORS:
        wrong.append("does not store whole blocks by 16 bytes")
    if name == "scale_blocks" and dtype == torch.bfloat16 and not count(r"cvt\.rn\.bf16", ptx):
        wrong.append("does not round bf16 to nearest")
    if name == "scale_blocks" and dtype != torch.float64 and facts["float64_arithmetic"]:
        wrong.append("scales in float64")
    if name == "block_sums" and p == 2.0 and dtype != torch.float64:
        squares = triton.block_size(dtype) // triton.WARPS // 32  # of a thread, if no run were added in fp32
        if facts["float64_arithmetic"] >= squares + 16:
            wrong.append("squares whole blocks in float64")
    return wrong


def main() -> int:
    failed = 0
    for sm in [int(arg) for arg in sys.argv[1:]] or [80, 90]:
        seen: set[tuple[str, torch.dtype, float | None]] = set()
        for name, dtype, p, kernel in compiled(sm):
            ptx = kernel.asm["ptx"]
            registers, spilled = assembled(ptx, sm)
            facts = {
                "registers": registers,
                "spilled_bytes": spilled,
                "shared_bytes": kernel.metadata.shared,
                "cubin_bytes": len(kernel.asm["cubin"]),
                "vector_loads": count(r"ld\.global\.(v4\.b32|v2\.b64)", ptx),
                "vector_stores": count(r"st\.global\.(v4\.b32|v2\.b64)", ptx),
                "float64_arithmetic": count(r"\b(add|mul|fma\.rn)(\.rn)?\.f64", ptx),
            }
            wrong = faults(name, dtype, p, facts, ptx) + ["compiled twice"] * ((name, dtype, p) in seen)
            seen.add((name, dtype, p))
            failed += bool(wrong)
            line = {"kernel": name, "dtype": str(dtype), "p": None if p is None else str(p), "sm": sm}
            print(json.dumps(line | facts | {"wrong": wrong}))
    return 1 if failed else 0


if __name__ == "__main__":
    assert device.block_sums, "imported before the driver is replaced"
    sys.exit(main())
