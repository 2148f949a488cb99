"""Everything public says what it takes, gives and refuses: checked where a program can."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from lora_lightning.errors import AdapterError, LoraConfigError
from scripts.reference_parts.api import methods, parsed, public

OURS = {LoraConfigError.__name__, AdapterError.__name__}


class Described(NamedTuple):
    name: str
    value: Any


def everything() -> Iterator[Described]:
    for module, members in public().items():
        for name, value in members.items():
            yield Described(f"{module}.{name}", value)
            if inspect.isclass(value):
                for key, method in methods(value).items():
                    yield Described(f"{module}.{name}.{key}", method)


EVERYTHING = list(everything())
CALLED = [each for each in EVERYTHING if not (inspect.isclass(each.value) and issubclass(each.value, Exception))]
each_called = pytest.mark.parametrize("described", CALLED, ids=lambda each: each.name.removeprefix("lora_lightning."))


def parameters(value: Callable) -> list[inspect.Parameter]:
    return [each for name, each in inspect.signature(value).parameters.items() if name not in ("self", "cls")]


@pytest.mark.parametrize("described", EVERYTHING, ids=lambda each: each.name.removeprefix("lora_lightning."))
def test_a_sentence_says_what_it_is(described):
    assert len((parsed(described.value).short_description or "").split()) > 2


@each_called
def test_every_parameter_is_described(described):
    told = {each.arg_name.lstrip("*"): each.description or "" for each in parsed(described.value).params}
    for parameter in parameters(described.value):
        assert told.get(parameter.name), parameter.name
        if re.search(r"\bTensor\b(?!\])", str(parameter.annotation)):
            assert "(" in told[parameter.name], f"{parameter.name}: its shape"


@each_called
def test_what_is_raised_is_told(described):
    """The errors of this package that its own body raises."""
    source = described.value.__init__ if inspect.isclass(described.value) else described.value
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(source)))
    except (OSError, TypeError):  # the constructor of a dataclass or of a base class
        return
    raised = {
        getattr(getattr(node.exc, "func", node.exc), "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and node.exc is not None
    }
    assert raised & OURS <= {each.type_name for each in parsed(described.value).raises}


@each_called
def test_what_comes_back_is_told(described):
    """By a section, or by the first sentence of what does nothing but give it."""
    if inspect.isclass(described.value) or inspect.signature(described.value).return_annotation in ("None", None):
        return
    doc = parsed(described.value)
    begins = (doc.short_description or "").split()[0]
    acts = begins in ("Read", "Write", "Make", "Build", "Put", "Give", "Fill", "Have", "Let", "Begin", "Fold", "Load")
    assert not acts or doc.returns
