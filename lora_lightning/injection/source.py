"""What the source of a module's forward says of it: which parts it calls on one input, and which formula it is.

Reading is exact where trying out on numbers would only be likely. A class whose source is not at hand says nothing.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch


def called_on_one_input(kind: type) -> tuple[tuple[str, ...], ...]:
    """Names of the parts that a forward calls, always and in this order, on one and the same variable.

    Of this forward they are ``q`` and ``k``; ``v`` may be called on something else::

        def forward(self, x, other=None):
            q, k = self.q(x), self.k(x)
            return self.o(q + k + (self.v(x) if other is None else self.v(other)))
    """
    function = _function(kind)
    return () if function is None else _called_on_one_input(inspect.unwrap(function))


@cache
def _called_on_one_input(function: Callable) -> tuple[tuple[str, ...], ...]:
    forward = _source(function)
    if forward is None:
        return ()
    times: Counter[str] = Counter()  # how often a variable has been given a value
    found: dict[tuple[str, int, int], list[str]] = {}
    writes = 0  # how often something has been written into, which may be an input by another name
    for statement in forward.body:
        simple = isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return))
        if simple:
            for part, variable in _calls(statement):
                found.setdefault((variable, times[variable], writes), []).append(part)
        elif any(isinstance(node, ast.Return) for node in ast.walk(statement)):
            break  # what follows is not always reached
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
                times[node.id] += 1
            writes += _may_write(node)
    return tuple(tuple(parts) for parts in found.values() if len(parts) > 1 and len(set(parts)) == len(parts))


def is_formula(written: Callable, formula: str) -> bool:
    """Whether a function (of a class: its forward) is, but for the names of variables, the one given as text."""
    function = _function(written)
    return function is not None and _is_formula(function, formula)


# Kept by function and not by class, which may be given another forward.
@cache
def _is_formula(function: FunctionType, formula: str) -> bool:
    if hasattr(function, "__wrapped__"):  # what is around it is not in the text
        return False
    if function.__globals__.get("torch", torch) is not torch:
        return False
    forward = _source(function)
    return forward is not None and _nameless(forward) == _nameless(_parse(formula))


def _function(written: Any) -> FunctionType | None:
    function = getattr(written, "forward", None) if isinstance(written, type) else written
    return function if isinstance(function, FunctionType) else None


def _source(function: Callable) -> ast.FunctionDef | None:
    try:
        return _parse(inspect.getsource(function))
    except (OSError, TypeError, SyntaxError):  # typed in by hand, shipped without its source
        return None


def _parse(text: str) -> ast.FunctionDef | None:
    tree = ast.parse(textwrap.dedent(text)).body[0]
    return tree if isinstance(tree, ast.FunctionDef) else None


def _may_write(node: ast.AST) -> bool:
    """Whether a part of a statement may write into a tensor, as ``x += 1``, ``x[0] = 1`` and ``x.add_(1)`` do."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return name.endswith("_") or any(keyword.arg in ("inplace", "out") for keyword in node.keywords)
    return isinstance(node, ast.AugAssign) or (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store))


def _calls(node: ast.AST) -> Iterator[tuple[str, str]]:
    """``self.part(variable)`` in a statement, in the order of evaluation; not those that may be left out."""
    if isinstance(node, (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
        and [type(argument) for argument in node.args] == [ast.Name]
        and not node.keywords
    ):
        yield node.func.attr, node.args[0].id  # type: ignore[attr-defined]


def _nameless(forward: ast.FunctionDef | None) -> str:
    """The body's text, with variables numbered as they come and ``y = …; return y`` as ``return …``."""
    if forward is None:
        return ""
    body = list(forward.body)
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    match body:
        case [*_, ast.Assign(targets=[ast.Name(id=name)], value=value), ast.Return(value=ast.Name(id=returned))] if (
            name == returned
        ):
            body = [*body[:-2], ast.Return(value=value)]
    # No name in a source begins with a digit, so none is taken for one of these.
    numbers: dict[str, str] = {argument.arg: f"{place}v" for place, argument in enumerate(forward.args.args)}
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Name) and (node.id in numbers or isinstance(node.ctx, ast.Store)):
            node.id = numbers.setdefault(node.id, f"{len(numbers)}v")
    return "\n".join(ast.unparse(statement) for statement in body)
