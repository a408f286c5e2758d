"""Jinja for chat templates that somebody else wrote: transformers' dialect, in a sandbox with bounded work.

The sandbox keeps a template from Python's internals; the budget keeps it from running for ever or filling the memory.
Iterations and calls are counted, and so are the characters of values that filters, methods and operators work on; a
text may have `LONGEST` characters, and what would make a longer one is refused before it is made. One render that
exceeds the budget ends with TemplateError.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
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
# Methods that make long texts of short ones.
PADDING = ("format", "format_map", "ljust", "rjust", "center", "zfill", "expandtabs", "translate")
# Filters that make a text of what they are given, of a list of lists too.
TO_TEXT = {"string", "upper", "lower", "capitalize", "title", "trim", "striptags", "truncate", "escape", "e"}
TO_TEXT |= {"forceescape", "safe", "urlencode", "wordcount", "tojson", "replace", "indent"}
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
            self.weigh_length(len(value))
        return value

    def weigh_length(self, size: int) -> None:
        if size > self.longest:
            raise jinja2.TemplateError("it makes a text too long")
        self.take(1 + size // CHARACTERS)

    def weigh_text(self, value: Any) -> Any:
        """As `weigh`, of a value that becomes a text: takes for all that lies in a list or dict too."""
        if type(value) is str:
            self.weigh_length(len(value))
            return value
        waiting, size = [value], 0
        while waiting:
            one = self.weigh(waiting.pop())
            if isinstance(one, dict):
                one = one.items()
            if isinstance(one, list | tuple | KeysView | ValuesView | ItemsView):
                self.take(len(one))
                waiting.extend(one)
            size += len(one) if isinstance(one, str | bytes) else 1
            if size > self.longest:
                raise jinja2.TemplateError("it makes a text too long")
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
        super().__init__(**SETTINGS, finalize=self.budget.weigh_text)
        self.globals.update(raise_exception=_raise, strftime_now=_now, range=self._range, namespace=_PlainNamespace)
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)
        for name in ("center", "format", "wordwrap", "urlize", "xmlattr", "pprint", "random"):
            self.filters.pop(name, None)
        self.filters.update(tojson=_to_json, indent=self._indent, replace=self._replace, join=self._join, sum=self._sum)
        self.filters = {name: self._bounded(name, made) for name, made in self.filters.items()}
        # `compiled` inserts these.
        self.filters.update(counted=self.budget.each, weighed=self.budget.weigh, weighed_text=self.budget.weigh_text)

    def compiled(self, source: str) -> jinja2.Template:
        """Raises jinja2.TemplateError for what is no template."""
        self.budget.refill(0, LONGEST)  # constant expressions are computed here
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filter(loop.iter, "counted")
        for test in tree.find_all(nodes.Test):
            if test.name not in ("defined", "undefined"):
                test.node = _filter(test.node, "weighed")
        for joined in tree.find_all(nodes.Concat):
            joined.nodes = [_filter(node, "weighed_text") for node in joined.nodes]
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = _filter(block.filter, "weighed_text")  # type: ignore[arg-type]
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
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        self.budget.weigh(owner)
        _check_numbers(*args, *kwargs.values())
        if name in PADDING:
            raise jinja2.TemplateError(f"it calls {name}()")
        if isinstance(owner, str) and name == "replace" and all(isinstance(one, str) for one in args[:2]):
            self._check_replaced(owner, *args[:2])
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            args = (list(self.budget.each(args[0])),)
            self._check_joined(owner, args[0])
        return self.budget.weigh(super().call(__context, __obj, *args, **kwargs))

    def _bounded(self, name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, within the budget."""
        first = int(hasattr(make, "jinja_pass_arg"))  # Jinja passes such a filter its environment before the value
        weigh = self.budget.weigh_text if name in TO_TEXT else self.budget.weigh

        @functools.wraps(make)
        def bounded(*args: Any, **named: Any) -> Any:
            weigh(args[first])
            if named or len(args) > first + 1:
                _check_numbers(*args[first + 1 :], *named.values())
            return self.budget.weigh(make(*args, **named))

        return bounded

    def _check_replaced(self, text: str, old: str = "", new: str = "") -> None:
        self.budget.weigh_length(len(text) + text.count(old) * max(0, len(new) - len(old)))

    def _check_joined(self, between: str, parts: list[Any]) -> None:
        lengths = [len(part) for part in parts if isinstance(part, str)]
        self.budget.weigh_length(sum(lengths) + len(parts) * len(between))

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(value), str(old), str(new)
        self._check_replaced(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _each(self, values: Any, attribute: str | int | None) -> Iterable[Any]:
        if attribute is None:
            return self.budget.each(values)
        return map(jinja2.filters.make_attrgetter(self, attribute), self.budget.each(values))

    def _join(self, values: Any, between: Any = "", attribute: str | int | None = None) -> str:
        parts = [str(self.budget.weigh_text(value)) for value in self._each(values, attribute)]
        self._check_joined(str(between), parts)
        return str(between).join(parts)

    def _sum(self, values: Any, attribute: str | int | None = None, start: float = 0) -> Any:
        if not _are_numbers(start):
            raise jinja2.TemplateError(f"it sums values of type {type(start).__name__}")
        return sum(self._each(values, attribute), start)

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text, width = str(value), width if isinstance(width, str) else min(width, 64)
        added = len(width) if isinstance(width, str) else width
        self.budget.weigh_length(len(text) + added * (1 + len(text.splitlines())))
        return jinja2.filters.do_indent(text, width, first, blank)

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


def _check_numbers(*arguments: Any) -> None:
    for value in arguments:
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise jinja2.TemplateError(f"it passes the number {str(value)[:20]} to a function")


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

    def __repr__(self) -> str:
        return "<Namespace>"  # without its values, which may be long


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.TemplateError(f"it sets the namespace's {name}")


def trusted_template(source: str) -> jinja2.Template:
    """One of our own templates, without the sandbox and the budget, which take most of the time."""
    environment = jinja2.Environment(**SETTINGS)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)
