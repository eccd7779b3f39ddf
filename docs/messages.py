"""Every message that the package gives a user, read from its source: `collect` gives one Message a wording.

Takes the syntax trees of the modules; runs none of them. What a message has in braces becomes `<name>`; a text that
is made elsewhere in the module (a local variable, a constant, a function that returns texts) is followed there.
"""

from __future__ import annotations

import ast
import errno
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dual_policy_plugin import errors

MOST = 6
"""Wordings of one call; with more, or with an inner text of more than two, the name stands in their place."""
_CHECKS = {
    "check": "{key}={value} is not possible; {right}",
    "check_range": "{key}={value} is not possible; use a value from {low} to {high}",
}
_ARGUMENTS = {"check": ("", "key", "value", "right"), "check_range": ("key", "value", "low", "high")}
_TEXTS = (ast.JoinedStr, ast.IfExp, ast.BinOp, ast.Constant)
_USAGE = {"ArgumentTypeError": 2, "fail": 2}


@dataclass(kw_only=True, frozen=True, order=True)
class Message:
    """One wording of one error or warning."""

    module: str
    """Dotted, without the package's name."""
    text: str
    """With `<name>` for what differs."""
    exit_code: int | None
    """None: a warning, nothing ends."""


def collect(package: Path) -> list[Message]:
    """All messages of the modules under `package`, each once, by module and in the order of the source."""
    found: dict[Message, None] = {}
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        reader = _Module(ast.parse(path.read_text("utf-8")))
        for text, exit_code in reader.messages():
            found.setdefault(Message(module=module, text=" ".join(text.split()), exit_code=exit_code))
    return list(found)


def escaped(text: str) -> str:
    """Markdown that shows the text as it is; what stands in backquotes stays code."""
    parts = re.split(r"(`[^`]+`)", text)
    parts[::2] = [re.sub(r"([\\<>*_\[\]|$~#`])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [part.replace("|", r"\|") for part in parts[1::2]]
    return "".join(parts)


class _Module:
    """One module's tree, and where its texts come from."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.constants = dict(_assigned(tree.body))
        self.depth = 0

    def messages(self) -> Iterator[tuple[str, int | None]]:
        """(text, exit code) of every error that is made and every warning that is logged."""
        for scope, call in _calls(self.tree):
            name = _name(call.func)
            kind = getattr(errors, name, None)
            if isinstance(kind, type) and issubclass(kind, errors.DualPolicyError) and call.args:
                code = kind.exit_code
            elif name in _CHECKS and len(call.args) >= 3:
                code = 2
            elif name in _USAGE and call.args:
                code = _USAGE[name]
            elif name == "warning" and call.args:
                code = None
            else:
                continue
            yield from ((text, code) for text in self._of_call(name, call, scope) if _says_something(text))
        yield from ((text, 2) for text in self._of_table() if _says_something(text))

    def _of_table(self) -> Iterator[str]:
        """What a module's table `_MENDS` makes of other programs' errors: by errno, or by functions of a match."""
        table = self.constants.get("_MENDS")
        for node in ast.walk(table) if table else ():
            if isinstance(node, ast.Name) and node.id in self.functions:
                scope = self.functions[node.id]
                returns = [
                    one.value for one in ast.walk(scope) if isinstance(one, ast.Return) and one.value is not None
                ]
                yield from (" ".join(text.split()) for value in returns for text in self._texts(value, scope))
            elif isinstance(node, ast.Lambda):
                yield from (" ".join(text.split()) for text in self._texts(node.body, None))
        if isinstance(table, ast.Dict):
            for key, value in zip(table.keys, table.values, strict=True):
                if isinstance(key, ast.Attribute) and isinstance(value, ast.Constant) and hasattr(errno, key.attr):
                    yield f"<path> could not be <what>: {os.strerror(getattr(errno, key.attr))}; {value.value}"

    def _of_call(self, name: str, call: ast.Call, scope: ast.FunctionDef | None) -> list[str]:
        if name not in _CHECKS:
            texts = self._texts(call.args[0], scope)
            rest = iter(call.args[1:])
            return (
                [re.sub(r"%(\.\d+)?[sdgfr]", lambda _: f"<{_placeholder(next(rest))}>", t) for t in texts]
                if (name == "warning")
                else texts
            )
        parts = dict(zip(_ARGUMENTS[name], call.args, strict=False))
        values = {key: self._texts(node, scope) for key, node in parts.items() if key}
        return [
            _CHECKS[name].format(**dict(zip(values, one, strict=True)))
            for one in _few(itertools.product(*values.values()))
        ]

    def _texts(self, node: ast.expr, scope: ast.FunctionDef | None) -> list[str]:
        """The wordings of an expression."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            return _joined([self._texts(part, scope) for part in node.values])
        if isinstance(node, ast.FormattedValue):
            texts = self._texts(node.value, scope)
            most = MOST if isinstance(node.value, ast.Call) else 2
            return texts if len(texts) <= most else [f"<{_placeholder(node.value)}>"]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return _joined([self._texts(node.left, scope), self._texts(node.right, scope)])
        if isinstance(node, ast.IfExp):
            return list(dict.fromkeys(self._texts(node.body, scope) + self._texts(node.orelse, scope)))
        return self._followed(node, scope) or [f"<{_placeholder(node)}>"]

    def _followed(self, node: ast.expr, scope: ast.FunctionDef | None) -> list[str]:
        """The texts that a name, or a call of a function of the module, stands for; [] where they are not texts."""
        if self.depth > 4:
            return []
        self.depth += 1
        try:
            if isinstance(node, ast.Name):
                local = [v for n, v in _assigned(ast.walk(scope) if scope else ()) if n == node.id]
                texts = local or [self.constants[name] for name in (node.id,) if name in self.constants]
                inner = scope
            elif _is_passed_on(node) and isinstance(node, ast.Call):
                return self._texts(node.args[0], scope)
            elif isinstance(node, ast.Attribute) and _name(node.value) == "self":
                texts, inner = [value for name, value in _assigned(ast.walk(self.tree)) if name == node.attr], None
            elif isinstance(node, ast.Call) and _name(node.func) in self.functions:
                inner = self.functions[_name(node.func)]
                texts = [n.value for n in ast.walk(inner) if isinstance(n, ast.Return) and n.value is not None]
            else:
                return []
            texts = [one for one in texts if not (isinstance(one, ast.Constant) and one.value in ("", None))]
            if not all(isinstance(one, _TEXTS) or _is_passed_on(one) for one in texts):
                return []
            if any(isinstance(one, ast.Constant) and not isinstance(one.value, str) for one in texts):
                return []
            found = dict.fromkeys(text for one in texts for text in self._texts(one, inner))
            return list(found)[:MOST]
        finally:
            self.depth -= 1


def _is_passed_on(node: ast.expr) -> bool:
    """Whether a call gives its first argument's text back, in another shape."""
    return isinstance(node, ast.Call) and _name(node.func) in ("printable", "one_line", "_one_line") and bool(node.args)


def _says_something(text: str) -> bool:
    """Whether there is more than placeholders, as where another error's text is passed on."""
    return re.search(r"[a-z]{3}.* ", re.sub(r"<\w+>", "", text)) is not None


def _calls(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
    """Every call with the function it stands in, in the order of the source."""

    def visit(node: ast.AST, scope: ast.FunctionDef | None) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                yield scope, child
            yield from visit(child, child if isinstance(child, ast.FunctionDef) else scope)

    return visit(tree, None)


def _assigned(nodes: object) -> Iterator[tuple[str, ast.expr]]:
    """(name, value) of every plain assignment among the nodes, of tuples too."""
    for node in nodes:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Name):
            yield target.id, value
        elif isinstance(target, ast.Attribute) and _name(target.value) == "self":
            yield target.attr, value
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                if isinstance(one, ast.Name):
                    yield one.id, its


def _joined(parts: list[list[str]]) -> list[str]:
    return ["".join(one) for one in _few(itertools.product(*parts))]


def _few(wordings: Iterator[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return list(itertools.islice(wordings, MOST))


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _placeholder(node: ast.expr) -> str:
    """A short name for what an expression holds."""
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    if isinstance(node, ast.Subscript | ast.Starred | ast.Await):
        return _placeholder(node.value)
    if isinstance(node, ast.Call):
        inner = node.args[0] if node.args else node.func.value if isinstance(node.func, ast.Attribute) else node.func
        if isinstance(inner, ast.Constant):
            inner = node.func.value if isinstance(node.func, ast.Attribute) else node.func
        return _placeholder(inner) if not isinstance(inner, ast.Constant) else _placeholder(node.args[-1])
    if isinstance(node, ast.BinOp | ast.UnaryOp):
        return _placeholder(node.left if isinstance(node, ast.BinOp) else node.operand)
    if isinstance(node, ast.GeneratorExp | ast.ListComp):
        return _placeholder(node.generators[0].iter)
    return "value"
