"""A sandbox for chat templates, which are untrusted code: Jinja's own, with limits.

The number of iterations and calls and the size of values are limited, so every template terminates.
"""

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from minigpt.errors import CheckpointError, DataError

ANSWER, ANSWER_END = "\ufdd2", "\ufdd3"
"""Marks around the text of a {% generation %} block: Unicode noncharacters, not in normal text."""
MAX_STEPS = 200_000
"""Maximum iterations and calls of one rendering; a thousand characters count as one more."""
MAX_SIZE = 2**24
"""Maximum characters or items of one value, and characters of the rendered text."""
_MAX_BITS = 4096


def rendered(source: str, where: str, **variables: Any) -> str:
    """Return the text that a template renders.

    Args: where, description of its origin, for error messages.
    Raises: DataError if the template refuses the messages; CheckpointError if it is invalid,
        fails, violates the sandbox, or does not terminate.
    """
    try:
        template = _compiled(source)
        environment = template.environment
        assert isinstance(environment, _Sandbox)
        environment.local.n_left = MAX_STEPS
        parts: list[str] = []
        size = 0
        for part in template.generate(**variables):
            size += len(part)
            if size > MAX_SIZE:
                raise _EndlessError(f"more than {MAX_SIZE} characters")
            parts.append(part)
        return "".join(parts)
    except _RefusedError as error:
        raise DataError(
            f"{where} refuses these messages: {str(error.message)[:200]!r}. Change them, "
            "or use another --chat-template."
        ) from None
    except Exception as error:  # a template is untrusted code, which may raise anything
        what = "fails"
        if isinstance(error, _EndlessError | RecursionError | MemoryError):
            what = "does not end, or needs too much memory"
        elif isinstance(error, jinja2.exceptions.SecurityError):
            what = "does something that the sandbox forbids"
        elif isinstance(error, jinja2.TemplateSyntaxError):
            what = f"is not valid Jinja on line {error.lineno}"
        raise CheckpointError(
            f"{where} {what} ({type(error).__name__}: {str(error)[:120]!r}). Give another with "
            "--chat-template FILE."
        ) from None


class _RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


class _EndlessError(Exception):
    """The template has used all its steps, or created a value that is too large."""


class _Generation(Extension):
    """The ``{% generation %}`` block of transformers, which marks the assistant's text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{ANSWER}{caller()}{ANSWER_END}"


class _Counted(NodeTransformer):
    """Makes a template count its iterations and the sizes of joined texts."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_sized")

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _filtered(node.filter, "_sized")
        return node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The Jinja environment of transformers, with limits on steps and sizes."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling
            extensions=[_Generation, loopcontrols],
        )
        self.local = threading.local()
        self.filters["tojson"] = _to_json
        self.filters = {name: self._limited(filter_) for name, filter_ in self.filters.items()}
        self.filters |= {"_counted": self._counted, "_sized": self._sized}
        self.globals.pop("lipsum")
        now: Callable[[str], str] = lambda format: datetime.now().strftime(format)  # noqa: E731
        self.globals |= {"raise_exception": _refuse, "strftime_now": now}

    def _parse(self, *args: Any) -> nodes.Template:
        tree = super()._parse(*args)
        _Counted().visit(tree)
        for node in tree.find_all(nodes.Filter):
            node.set_lineno(node.lineno or 1)
        return tree.set_environment(self)  # type: ignore[return-value]

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # The sandbox wraps the method str.format.
        method = getattr(__obj, "__wrapped__", __obj)
        if isinstance(text := getattr(method, "__self__", None), str):
            __self._check_numbers((*args, *kwargs.values()))
            if method.__name__.startswith("format"):
                _check_format(text)
        return __self._sized(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int | float) and abs(right) > _MAX_BITS:
            raise _EndlessError(f"the power {right}")
        if operator == "*":
            sizes = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
            if any(hasattr(x, "__len__") for x in (left, right)) and sizes[0] * sizes[1] > MAX_SIZE:
                raise _EndlessError("a repeated value")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        return self._sized(super().call_binop(context, operator, left, right))

    def _limited(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filter_)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._check_numbers((*args[1:], *kwargs.values()))
            return self._sized(filter_(*args, **kwargs))

        return limited

    def _check_numbers(self, values: Iterable[Any]) -> None:
        if any(isinstance(value, int) and abs(value) > MAX_SIZE for value in values):
            raise _EndlessError("a large number")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend(1)
            yield value

    def _sized(self, value: Any) -> Any:
        size = 0
        if isinstance(value, str | bytes | list | tuple | dict):
            size = len(value)
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            size = MAX_SIZE + 1
        if size > MAX_SIZE:
            raise _EndlessError("a value that is too large")
        self._spend(1 + size // 1000)
        return value

    def _spend(self, n_steps: int) -> None:
        self.local.n_left -= n_steps
        if self.local.n_left < 0:
            raise _EndlessError(f"more than {MAX_STEPS} steps")


def _check_format(text: str) -> None:
    """Refuse a format string whose width is large or comes from a value."""
    if re.search(r"\d{6}|%[^%a-zA-Z]*\*|:[^}]*\{", text):
        raise _EndlessError("a wide format")


@functools.lru_cache(16)
def _compiled(source: str) -> jinja2.Template:
    return _Sandbox().from_string(source)


def _refuse(message: str) -> None:
    raise _RefusedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialize as in transformers, without the HTML escapes of Jinja's own filter."""
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # type: ignore[arg-type]
