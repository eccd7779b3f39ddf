"""Every kernel, compiled for sm_80 and sm_90 without a GPU: shared memory, spills and tensor cores within their limits.

The compiler runs in a process of its own, since this one has Triton's interpreter switched on.
"""

from __future__ import annotations

import ast
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dual_policy_plugin.kernels
from tests.kernels.ahead_of_time import (
    FOLDER,
    Case,
    Compiled,
    case_complaints,
    compile_in_another_process,
    find_cases,
)

CASES = find_cases()
LINES = [(case.name, capability) for case in CASES for capability in case.capabilities]
SOURCES = sorted(Path(next(iter(dual_policy_plugin.kernels.__path__))).glob("*.py"))


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """The lines of the compilers' report by (case, capability); parallel test processes share one."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "ahead_of_time.json"
    with (folder / "ahead_of_time.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = json.loads(path.read_text()) if path.exists() else compile_in_another_process(path, processes=2)
    return {(line["case"], line["capability"]): line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capability"), LINES, ids=[f"{name}-sm_{chip}" for name, chip in LINES])
def test_a_kernel_compiles_within_its_limits(report: dict[tuple[str, int], Any], name: str, capability: int) -> None:
    line = report[name, capability]
    assert line["complaints"] == []
    assert line["registers"] > 0


def test_every_file_of_cases_has_some() -> None:
    files = [path.stem.removeprefix("cases_") for path in FOLDER.glob("cases_*.py")]
    assert files
    for file in files:
        assert find_cases([file]), f"cases_{file}.py has no case"


def jit_functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """The functions below `@triton.jit`, with or without arguments of the decorator."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            decorators = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
            if any(ast.unparse(each) in ("triton.jit", "jit") for each in decorators):
                yield node


def name_of(node: ast.expr) -> str | None:
    """`f` of f and of module.f."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def launched_kernels(sources: list[str]) -> set[str]:
    """Names of the kernels that some code launches, or that no other kernel calls (so nothing else can use them)."""
    trees = [ast.parse(source) for source in sources]
    kernels = {function.name: function for tree in trees for function in jit_functions(tree)}
    called = {
        name_of(node.func) for kernel in kernels.values() for node in ast.walk(kernel) if isinstance(node, ast.Call)
    }
    launched = {
        name_of(node.func.value)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }
    return {name for name in kernels if name in launched or name not in called}


def test_every_kernel_that_is_launched_has_a_case() -> None:
    launched = launched_kernels([path.read_text() for path in SOURCES])
    assert launched
    assert launched - {case.kernel.__name__ for case in CASES} == set()


def test_the_search_for_kernels_finds_them() -> None:
    first = "@triton.jit\ndef part(x):\n    return x\n\n@triton.jit(noinline=True)\ndef whole(x):\n    part(x)\n"
    second = "@triton.jit\ndef other(x):\n    first.part(x)\n\ndef plain(x):\n    other[1](x)\n    table[0](x)\n"
    assert launched_kernels([first, second]) == {"whole", "other"}
    assert launched_kernels([first, second, "first.part[2](x)"]) == {"whole", "other", "part"}


def test_limits_are_limits() -> None:
    case = Case(name="x", kernel=None, signature={}, tensor_cores=True, max_spill_bytes=8)
    within = Compiled(
        shared_bytes=166912, registers=255, spill_bytes=8, matrix_instructions="mma.sync", has_tensor_cores=True
    )
    assert case_complaints(case, 80, within) == []
    beyond = Compiled(
        shared_bytes=166913, registers=255, spill_bytes=9, matrix_instructions="mma.sync", has_tensor_cores=False
    )
    assert [text.split()[0] for text in case_complaints(case, 80, beyond)] == ["166913", "9", "no"]
    assert [text.split()[0] for text in case_complaints(case, 90, beyond)] == ["9", "no"]


PROBES = """
import json

import triton
import triton.language as tl
from tests.kernels.ahead_of_time import Case, compile_all


@triton.jit
def product(a, b, out, num_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    left = tl.load(a + rows[:, None] * WIDTH + columns[None, :])
    right = tl.load(b + columns[:, None] * WIDTH + columns[None, :])
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], tl.dot(left, right), mask=rows[:, None] < num_rows)


@triton.jit
def hoarder(a, out, SIZE: tl.constexpr):
    x = tl.load(a + tl.arange(0, SIZE))
    tl.store(out + tl.arange(0, SIZE), x + tl.sum(x, 0))


arguments = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "num_rows": "i32"}
sizes = {"ROWS": 64, "WIDTH": 128}
vectors = {"a": "*fp32", "out": "*fp32"}
lines = compile_all([
    Case(name="good", kernel=product, signature=arguments, constexprs=sizes, tensor_cores=True),
    Case(name="few rows", kernel=product, signature=arguments, constexprs=sizes | {"ROWS": 16}, tensor_cores=True),
    Case(name="fat", kernel=product, signature=arguments, constexprs=sizes, max_shared={80: 9, 90: 9}),
    Case(name="spills", kernel=hoarder, signature=vectors, constexprs={"SIZE": 2**14}, num_warps=2),
    Case(name="misfit", kernel=product, signature={"a": "*bf16"}, constexprs=sizes),
])
print(json.dumps(lines))
"""


def test_the_compilers_report_is_read_right(tmp_path: Path) -> None:
    script = tmp_path / "probes.py"
    script.write_text(PROBES)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(FOLDER.parents[1]), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=True)
    lines = {(line["case"], line["capability"]): line for line in json.loads(done.stdout)}
    for capability, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async")):
        good = lines["good", capability]
        assert (good["complaints"], good["matrix_instructions"]) == ([], instruction)
        assert good["shared_bytes"] == 64 * 128 * 2 + 128 * 128 * 2
        assert good["spill_bytes"] == 0
        assert lines["fat", capability]["complaints"] == ["49152 bytes of shared memory, at most 9"]
        assert lines["spills", capability]["spill_bytes"] > 0
        assert "spilled" in lines["spills", capability]["complaints"][0]
        assert "signature=['a'], the kernel wants ['a', 'b', 'out'" in lines["misfit", capability]["complaints"][0]
    assert lines["few rows", 80]["complaints"] == []
    assert lines["few rows", 90]["complaints"] == ["no wgmma.mma_async but mma.sync"]  # a wgmma takes 64 rows
