"""What stands nowhere in our package: the ways in which Python turns data into code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dual_policy_plugin

ROOT = Path(dual_policy_plugin.__file__).parent
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "torch.hub",
    "torch.package", "torch.jit", "code", "codeop",
}  # fmt: skip
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "hydra.utils.instantiate",
}
IMPORTERS = {
    "dual_policy_plugin/__init__.py": "names of the public functions, a constant table",
    "dual_policy_plugin/envs/pettingzoo.py": "a constant table of ids",
    "dual_policy_plugin/envs/mettagrid.py": "a constant",
    "dual_policy_plugin/envs/worker_process.py": "the module of a function that the parent process already holds",
}
"""The only files that import by a text, and what that text comes from."""
SOURCES = sorted(
    [*ROOT.rglob("*.py"), *(ROOT.parent / "hydra_plugins").rglob("*.py"), *(ROOT.parent / "tools").rglob("*.py")]
)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression, "" for any other."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def offences(text: str) -> list[str]:
    """What `text`, a module's source, does of what is forbidden."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        for name in names:
            if any(name == module or name.startswith(f"{module}.") for module in FORBIDDEN_MODULES):
                found.append(name)
            if name in FORBIDDEN_CALLS or name in {f"builtins.{builtin}" for builtin in FORBIDDEN_NAMES}:
                found.append(name)
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            weights_only, called = keywords.get("weights_only"), dotted(node.func)
            is_true = isinstance(weights_only, ast.Constant) and weights_only.value is True
            if not is_true and (called == "torch.load" or "weights_only" in keywords):
                found.append(f"{called} without weights_only=True")
            if keywords.get("allow_pickle") is not None or keywords.get("trust_remote_code") is not None:
                found.append(f"{called} with a permission")
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            found.append("torch.load by another name")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT.parent)) for path in SOURCES])
def test_no_module_of_ours_turns_data_into_code(path: Path) -> None:
    assert offences(path.read_text()) == []


def test_only_known_modules_import_by_a_text() -> None:
    importers = set()
    for path in SOURCES:
        if {"import_module", "run_path", "run_module", "find_spec", "spec_from_file_location"} & {
            node.attr if isinstance(node, ast.Attribute) else node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute | ast.alias)
        }:
            importers.add(path.relative_to(ROOT.parent).as_posix())
    assert importers == set(IMPORTERS)


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.load(x, weights_only=flag)",
        "f(weights_only=False)",
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import torch\ntorch.hub.load('a', 'b')",
        "from torch import hub",
        "from torch import load",
        "import cloudpickle",
        "import dill",
        "from torch.hub import load",
        "eval('1')",
        "exec('1')",
        "e = eval",
        "import builtins\nbuiltins.exec('1')",
        "from builtins import eval",
        "np.load(x, allow_pickle=True)",
        "from hydra.utils import instantiate",
        "torch.jit.load(x)",
        "__import__('os')",
    ],
)
def test_the_rules_see_what_they_are_for(text: str) -> None:
    assert offences(text) != []


def test_the_rules_let_ordinary_code_through() -> None:
    assert offences("torch.load(x, map_location='cpu', weights_only=True)\npolicy.eval()\nre.compile('a')") == []
    assert len(SOURCES) > 50
