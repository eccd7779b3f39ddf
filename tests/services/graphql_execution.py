"""Answers a GraphQL document from plain dicts: fields, arguments, aliases, fragments, @include and @skip.

There is no schema: an object is a dict from field name to a value or to a function of the field's arguments, with its
type under `__typename`. A field that the dict lacks is the error that a real server gives for it, so that a client
which asks for more than the stand-in knows is told so instead of getting a null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphql import language as ast

Node = dict[str, Any]


class GraphqlError(Exception):
    """Becomes `{"errors": [{"message": ...}]}`; `status` is the HTTP status that goes with it."""

    def __init__(self, message: str, *, status: int = 200, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class UnansweredError(GraphqlError):
    """The stand-in does not know this field."""


def execute(document: str, variables: Mapping[str, Any], *, query: Node, mutation: Node) -> Node:
    """The `data` of the answer to the document's one operation."""
    parsed = ast.parse(document, no_location=True)
    fragments = {d.name.value: d for d in parsed.definitions if isinstance(d, ast.FragmentDefinitionNode)}
    (operation,) = [d for d in parsed.definitions if isinstance(d, ast.OperationDefinitionNode)]
    values = dict(variables)
    for definition in operation.variable_definitions or ():
        if definition.default_value is not None:
            values.setdefault(definition.variable.name.value, _value(definition.default_value, {}))
    root = mutation if operation.operation is ast.OperationType.MUTATION else query
    return _Execution(fragments, values).select([operation.selection_set], root)


class _Execution:
    def __init__(self, fragments: Mapping[str, ast.FragmentDefinitionNode], variables: Mapping[str, Any]) -> None:
        self.fragments, self.variables = fragments, variables

    def select(self, selection_sets: list[ast.SelectionSetNode], node: Node) -> Node:
        fields: dict[str, list[ast.FieldNode]] = {}
        for selection_set in selection_sets:
            self.collect(selection_set, node, fields)
        return {key: self.resolve(same_key, node) for key, same_key in fields.items()}

    def collect(self, selection_set: ast.SelectionSetNode, node: Node, fields: dict[str, list[ast.FieldNode]]) -> None:
        for selection in selection_set.selections:
            if not self.is_included(selection):
                continue
            if isinstance(selection, ast.FieldNode):
                key = selection.alias.value if selection.alias else selection.name.value
                fields.setdefault(key, []).append(selection)
            elif isinstance(selection, ast.FragmentSpreadNode):
                self.collect(self.fragments[selection.name.value].selection_set, node, fields)
            else:
                condition = selection.type_condition
                if condition is None or condition.name.value in (node["__typename"], *node.get("__interfaces", ())):
                    self.collect(selection.selection_set, node, fields)

    def is_included(self, selection: ast.SelectionNode) -> bool:
        for directive in selection.directives or ():
            condition = bool(_value(directive.arguments[0].value, self.variables))
            if condition is not (directive.name.value == "include"):
                return False
        return True

    def resolve(self, same_key: list[ast.FieldNode], node: Node) -> Any:
        name = same_key[0].name.value
        if name not in node:
            raise UnansweredError(f"Cannot query field {name!r} on type {node['__typename']!r}.", status=400)
        value = node[name]
        if callable(value):
            value = value(**{a.name.value: _value(a.value, self.variables) for a in same_key[0].arguments or ()})
        return self.complete(value, [field.selection_set for field in same_key if field.selection_set])

    def complete(self, value: Any, selection_sets: list[ast.SelectionSetNode]) -> Any:
        if isinstance(value, list) and selection_sets:
            return [self.complete(item, selection_sets) for item in value]
        if value is None or not selection_sets:
            return value
        return self.select(selection_sets, value)


def _value(node: ast.ValueNode, variables: Mapping[str, Any]) -> Any:
    match node:
        case ast.VariableNode():
            return variables.get(node.name.value)
        case ast.ListValueNode():
            return [_value(item, variables) for item in node.values]
        case ast.ObjectValueNode():
            return {field.name.value: _value(field.value, variables) for field in node.fields}
        case ast.NullValueNode():
            return None
        case ast.IntValueNode():
            return int(node.value)
        case ast.FloatValueNode():
            return float(node.value)
        case _:
            return node.value  # strings, booleans and enum names


def connection(nodes: list[Any], *, first: int | None, after: str | None, to_node: Any, extra: Any = None) -> Node:
    """One page of a Relay connection; the cursor is the number of items before the next page.

    Args:
        nodes: all items in order.
        first, after: page size and cursor as asked.
        to_node: item -> Node, called for the page's items only.
        extra: item -> further fields of the edge.
    """
    start = int(after) if after else 0
    stop = min(len(nodes), start + first) if first else len(nodes)
    edges = [
        {"__typename": "Edge", "node": to_node(item), "cursor": str(start + i + 1), **(extra(item) if extra else {})}
        for i, item in enumerate(nodes[start:stop])
    ]
    page_info = {"__typename": "PageInfo", "endCursor": str(stop) if edges else None, "hasNextPage": stop < len(nodes)}
    return {"__typename": "Connection", "totalCount": len(nodes), "edges": edges, "pageInfo": page_info}
