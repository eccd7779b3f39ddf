"""Compiles every Triton kernel for real chips on a machine without one, and says what the compilers made of it.

Takes the `CASES` of tests/kernels/cases_*.py (a kernel with the dtypes, sizes and launch shape it has on the device);
gives shared memory, registers, spills and the matrix instructions of each, for sm_80 and sm_90. Must run without
TRITON_INTERPRET, so the tests start it as a process of its own:

    python -m tests.kernels.ahead_of_time [names]          a name picks cases_<name>.py, or cases with it in their names
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FOLDER = Path(__file__).parent
CAPABILITIES = (80, 90)
MATRIX_INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async"}
"""What a tl.dot must become on each chip; an sm_90 kernel that falls back to mma.sync runs at half its rate."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Case:
    """One kernel as it is launched on the device."""

    name: str
    """Unique over all cases."""
    kernel: Any
    """The `@triton.jit` function."""
    signature: dict[str, str]
    """Dtype of every argument that is no constexpr, in order: *bf16, *fp32, *fp64, *u8, *i64, *i1 (a bool tensor), i32,
    fp32, ...; "i32:16" is a number known to be a multiple of 16. Pointers count as 16-byte aligned, unless the kernel
    says do_not_specialize_on_alignment."""
    constexprs: dict[str, Any] = field(default_factory=dict)
    """Values of the constexpr arguments; a pointer argument that is None at the launch belongs here, too."""
    num_warps: int = 4
    num_stages: int = 2
    tensor_cores: bool = False
    """Whether it must use them: wgmma on sm_90, mma.sync on sm_80."""
    max_shared: dict[int, int] = field(default_factory=lambda: {80: 163 * 1024, 90: 227 * 1024})
    """Bytes of shared memory a block may have, by capability."""
    max_spill_bytes: int = 0
    """Registers' spill stores and loads, in bytes a thread."""
    capabilities: tuple[int, ...] = CAPABILITIES
    """Chips that this launch shape is for."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Compiled:
    """What became of a case on one chip."""

    shared_bytes: int
    """Per block."""
    registers: int
    """Per thread."""
    spill_bytes: int
    """Stores and loads, per thread."""
    matrix_instructions: str
    """wgmma.mma_async, mma.sync or nothing."""
    has_tensor_cores: bool
    """Whether the chip's own matrix instruction is there."""


def compile_case(case: Case, capability: int) -> Compiled:
    """Compiles a case for a chip (80 or 90), down to the machine code.

    Raises:
        RuntimeError: under TRITON_INTERPRET, which replaces the compiler.
        ValueError: the case names arguments that the kernel has not, or leaves some out.
    """
    if not isinstance(case.kernel, triton.runtime.JITFunction):
        raise RuntimeError("kernels compile only where TRITON_INTERPRET is not set before triton is imported")
    names = case.kernel.arg_names
    wanted = [name for name in names if name not in case.constexprs]
    if wanted != list(case.signature):
        raise ValueError(f"{case.name}: signature={list(case.signature)}, the kernel wants {wanted}, in this order")
    dtypes = {name: case.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=case.kernel,
        signature={name: dtype.removesuffix(":16") for name, dtype in dtypes.items()},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, (dtype, parameter) in enumerate(zip(dtypes.values(), case.kernel.params, strict=True))
            if dtype.endswith(":16") or (dtype.startswith("*") and not parameter.do_not_specialize_on_alignment)
        },
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spill_bytes = _assemble(ptx, capability)
    found = [instruction for instruction in MATRIX_INSTRUCTIONS.values() if instruction in ptx]
    return Compiled(
        shared_bytes=compiled.metadata.shared,
        registers=registers,
        spill_bytes=spill_bytes,
        matrix_instructions=" ".join(found),
        has_tensor_cores=MATRIX_INSTRUCTIONS[capability] in found,
    )


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, spilled bytes) per thread, from the report of the assembler that ships with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"  # wgmma is in the "a" set only
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", source, "-o", f"{folder}/cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas says nothing of registers and spills:\n{report}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


def find_cases(names: Sequence[str] = ()) -> list[Case]:
    """The cases of all tests/kernels/cases_*.py; with names only those of the files or cases that they name."""
    files = sorted(path.stem for path in FOLDER.glob("cases_*.py"))
    stems = {name for name in names if f"cases_{name}" in files}
    if stems and stems == set(names):  # the others need not even import
        files = [file for file in files if file.removeprefix("cases_") in stems]
    cases = []
    for file in files:
        for case in importlib.import_module(f"tests.kernels.{file}").CASES:
            if not names or file.removeprefix("cases_") in stems or any(name in case.name for name in names):
                cases.append(case)
    twice = {case.name for case in cases if sum(other.name == case.name for other in cases) > 1}
    if twice:
        raise ValueError(f"two cases of one name: {', '.join(sorted(twice))}")
    return cases


def case_complaints(case: Case, capability: int, compiled: Compiled) -> list[str]:
    """What a compiled case has that it may not have; empty if all is well."""
    complaints = []
    if compiled.shared_bytes > case.max_shared[capability]:
        complaints.append(f"{compiled.shared_bytes} bytes of shared memory, at most {case.max_shared[capability]}")
    if compiled.spill_bytes > case.max_spill_bytes:
        complaints.append(f"{compiled.spill_bytes} bytes of registers spilled, at most {case.max_spill_bytes}")
    if case.tensor_cores and not compiled.has_tensor_cores:
        has = compiled.matrix_instructions or "no matrix instruction at all"
        complaints.append(f"no {MATRIX_INSTRUCTIONS[capability]} but {has}")
    return complaints


_cases: list[Case] = []  # what `_compile_job` compiles: kernels travel through no pipe, but a forked process has them


def _compile_job(job: tuple[int, int]) -> dict[str, Any]:
    """One line of the report; job is (index of the case, capability)."""
    case, capability = _cases[job[0]], job[1]
    line: dict[str, Any] = {"case": case.name, "capability": capability}
    try:
        compiled = compile_case(case, capability)
    except Exception as error:  # a kernel that does not compile is a finding; the others are still wanted
        return line | {"complaints": [f"{type(error).__name__}: {error}"]}
    return line | asdict(compiled) | {"complaints": case_complaints(case, capability, compiled)}


def compile_all(cases: list[Case], *, processes: int = 1) -> list[dict[str, Any]]:
    """A report's lines: case, capability, the fields of Compiled (absent if it did not compile), complaints."""
    jobs = [(i, capability) for i, case in enumerate(cases) for capability in case.capabilities]
    _cases[:] = cases
    if processes == 1:
        return [*map(_compile_job, jobs)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        return [*pool.map(_compile_job, jobs)]


def compile_in_another_process(report: Path, *, processes: int = 2) -> list[dict[str, Any]]:
    """The report over all cases, made by an interpreter without TRITON_INTERPRET; leaves it as JSON in `report`."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", "--processes", str(processes), "--json", report]
    done = subprocess.run(command, env=env, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False)
    if not report.exists():
        raise RuntimeError(f"nothing was compiled:\n{done.stderr}")
    lines: list[dict[str, Any]] = json.loads(report.read_text())
    return lines


def _print_table(lines: list[dict[str, Any]]) -> None:
    width = max(len(line["case"]) for line in lines)
    print(f"{'case':{width}}  arch   shared  registers  spills  matrix instructions")
    for line in lines:
        row = f"{line['case']:{width}}  sm_{line['capability']}"
        if "registers" in line:
            row += f"  {line['shared_bytes']:>6}  {line['registers']:>9}  {line['spill_bytes']:>6}"
            row += f"  {line['matrix_instructions']}"
        print(row)
        for complaint in line["complaints"]:
            print(f"    WRONG: {complaint}")


def main() -> int:
    """Prints a table, one line for each case and chip; exit code 1 if one of them breaks its limits."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.ahead_of_time", description="Kernels, compiled.")
    parser.add_argument("names", nargs="*", help="files (small: cases_small.py) or parts of case names; none: all")
    parser.add_argument("--json", type=Path, help="write the report there as well")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    cases = find_cases(args.names)
    if not cases:
        print(f"no case is named {' or '.join(args.names)}" if args.names else "there are no cases", file=sys.stderr)
        return 2
    lines = compile_all(cases, processes=args.processes)
    _print_table(lines)
    if args.json is not None:
        args.json.write_text(json.dumps(lines, indent=1))
    return int(any(line["complaints"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
