"""Jinja for chat templates that somebody else wrote: transformers' dialect, in a sandbox with bounded work.

The sandbox keeps a template from Python's internals; the budget keeps it from running for ever or filling the memory.
Iterations and calls are counted, and so are the characters of values that filters, methods and operators work on; a
text may have `LONGEST` characters. One render that exceeds the budget ends with TemplateError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes

ITERATIONS = 20_000  # of loops and calls of one render; more for long conversations
FOR_A_MESSAGE = 200
CHARACTERS = 64  # of a value that count as one iteration
LONGEST = 1 << 20  # characters of a text made by a template; more for long conversations
LARGEST_NUMBER = 1 << 20  # passed to a function: a width, a count
PADDING = ("format", "format_map", "ljust", "rjust", "center", "zfill", "expandtabs")  # make long texts of short ones
BEGIN, END = "\ue000", "\ue001"  # around what stands between {% generation %} and {% endgeneration %}


DICT_METHODS = frozenset(dir(dict))


class Budget:
    """What one render may still do."""

    def __init__(self) -> None:
        self.iterations = self.longest = 0

    def refill(self, messages: int, characters: int) -> None:
        self.iterations = ITERATIONS + FOR_A_MESSAGE * messages + 16 * characters // CHARACTERS
        self.longest = LONGEST + 4 * characters

    def take(self, count: int) -> None:
        self.iterations -= count
        if self.iterations < 0:
            raise jinja2.TemplateError("it loops too long")

    def weigh(self, value: Any) -> Any:
        """Takes for the size of a value; returns it."""
        if isinstance(value, str | bytes | list | tuple | dict):
            size = len(value)
            if size > self.longest:
                raise jinja2.TemplateError("it makes a text too long")
            self.take(1 + size // CHARACTERS)
        return value

    def each(self, values: Any) -> Iterable[Any]:
        """`values`, counted."""
        if isinstance(values, str | list | tuple | dict | range):
            self.take(len(values))
            return values
        return self._counted(values)

    def _counted(self, values: Any) -> Iterator[Any]:
        for value in values:
            self.take(1)
            yield value


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


SETTINGS: dict[str, Any] = {
    "trim_blocks": True,
    "lstrip_blocks": True,
    "extensions": [_Generation, jinja2.ext.loopcontrols],
}


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' settings and functions; `{% generation %}` puts BEGIN and END around its text."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        self.budget = Budget()
        super().__init__(**SETTINGS, finalize=self.budget.weigh)
        self.filters["tojson"] = _to_json
        self.filters["counted"], self.filters["weighed"] = self.budget.each, self.budget.weigh
        self.globals.update(raise_exception=_raise, strftime_now=_now, range=self._range)
        self.filters["indent"] = _indent
        self.globals["namespace"] = _PlainNamespace
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)
        for name in ("center", "format", "wordwrap", "urlize", "xmlattr", "pprint", "random"):
            self.filters.pop(name, None)

    def compiled(self, source: str) -> jinja2.Template:
        """Raises jinja2.TemplateError for what is no template."""
        self.budget.refill(0, LONGEST)  # constant expressions are computed here
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filter(loop.iter, "counted")
        for used in [*tree.find_all(nodes.Filter), *tree.find_all(nodes.Test)]:
            if used.node is not None and used.name not in ("counted", "weighed", "defined", "undefined"):
                used.node = _filter(used.node, "weighed")
        for joined in tree.find_all(nodes.Concat):
            joined.nodes = [_filter(node, "weighed") for node in joined.nodes]
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = _filter(block.filter, "weighed")  # type: ignore[arg-type]
        code = self.compile(tree)
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox's, which takes long, for the two types that templates ask most."""
        if type(obj) is dict and attribute not in DICT_METHODS:
            return self.getitem(obj, attribute)
        if type(obj) is _PlainNamespace and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and type(argument) is str and argument in obj:
            return obj[argument]
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "*" and not _are_numbers(left, right)):
            sizes = [value if isinstance(value, int) else len(value) for value in (left, right)]
            if operator == "**" or sizes[0] * sizes[1] > self.budget.longest:
                raise jinja2.TemplateError(f"it computes {type(left).__name__} {operator} {type(right).__name__}")
        if operator == "%" and isinstance(left, str):
            raise jinja2.TemplateError("it formats a text with %")
        return self.budget.weigh(super().call_binop(context, operator, left, right))

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.budget.take(1)
        self.budget.weigh(getattr(__obj, "__self__", None))
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
                raise jinja2.TemplateError(f"it passes the number {str(value)[:20]} to a function")
        if getattr(__obj, "__name__", "") in PADDING:
            raise jinja2.TemplateError(f"it calls {__obj.__name__}()")
        return self.budget.weigh(super().call(__context, __obj, *args, **kwargs))

    def _range(self, *bounds: int) -> range:
        made = range(*bounds)
        self.budget.take(len(made) if abs(made.stop - made.start) < LARGEST_NUMBER else LARGEST_NUMBER)
        return made


def _filter(node: Any, name: str) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None)
    return made.set_lineno(node.lineno if node is not None else 1)  # type: ignore[return-value]


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As text, not as HTML-safe text; Jinja's own escapes <, > and &."""
    indent = min(indent, 16) if isinstance(indent, int) else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    return jinja2.filters.do_indent(text, width if isinstance(width, str) else min(width, 64), first, blank)


class _PlainNamespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        names = dict(*args[1:], **kwargs)
        for name in names:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.TemplateError(f"it sets the namespace's {name}")


def trusted_template(source: str) -> jinja2.Template:
    """One of our own templates, without the sandbox and the budget, which take most of the time."""
    environment = jinja2.Environment(**SETTINGS)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)
