"""dagkit: functions become a pipeline, and argument names are its edges.

A function is a *step*. An argument ``total`` takes the value of the step ``total``; if there is
no such step, it takes the *input* ``total`` that is given to :meth:`Pipeline.run`.

>>> from dagkit import Pipeline, step
>>> @step
... def total(prices):
...     return sum(prices)
>>> @step
... def mean(total, prices):
...     return total / len(prices)
>>> pipeline = Pipeline(total, mean)
>>> pipeline.run("mean", prices=[1, 2, 6])["mean"]
3.0

The rooms of this file. Each room uses only the rooms above it.

Part I, the core: a complete small library
    Errors       the error classes, and the parts of messages: names, values, locations
    State        what is known of one step
    Steps        a function and its options become a frozen ``Step``
    Graph        steps that fit together, or an error that names those that do not
    Order        the steps that a set of targets needs, in topological order
    Plain loop   calls the steps of an order, one after the other

Part II, reuse: what is kept on disk, and when it may be used again
    Fingerprint  values and code become fingerprints
    Store        results become files, and files become results
    Reads        notes the files, folders and variables that a step reads while it runs
    Copies       faithful copies of the arguments of a call, which a step may change in place
    Catalog      files and objects of the user from which inputs come and where values go
    Reuse        decides whether a stored result can be used, and says why not

Part III, running wide
    Maps         the list that a mapped step makes, element by element
    Calls        one call of a step's function, wherever it is made: thread, process, cluster
    Loop         the ready/done loop: runs steps that wait, overlap, retry, are reused; and plans

Part IV, watching
    Text         tables of steps, and the words for what happened to them
    Layout       boxes and edges get their positions
    Picture      SVG, the fragment of a notebook, the exported page
    Events       what happens in a run, for those who listen
    Records      one line of JSON for each run, and the history of runs
    Live         progress lines on a terminal, the picture of a run that is going on

Part V, what a user holds
    Plan         what a run would do, and why
    Run          the values of a run's targets, and how it went
    Pipeline     the façade: short methods that call the rooms above
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import dataclasses
import dis
import enum
import errno
import functools
import hashlib
import heapq
import hmac
import importlib
import importlib.machinery
import inspect
import io
import itertools
import json
import marshal
import math
import operator
import os
import pickle
import queue
import re
import reprlib
import stat
import sys
import threading
import time
import types
import unicodedata
import warnings
import zlib
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import (
    Callable,
    Collection,
    Coroutine,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta
from enum import Enum
from keyword import iskeyword
from types import CoroutineType, FrameType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, overload

try:
    import fcntl
except ImportError:  # Windows and Pyodide
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from concurrent.futures import Future

    import networkx as nx

__version__ = "0.2.0"

__all__ = [
    "REQUIRED",
    "CatalogError",
    "CycleError",
    "DagkitError",
    "DagkitWarning",
    "Event",
    "InputError",
    "NoValueError",
    "Pipeline",
    "Plan",
    "ResultError",
    "Run",
    "SensorTimeoutError",
    "Skip",
    "Step",
    "StepError",
    "Store",
    "WorkerError",
    "sensor",
    "step",
]


########################################################################################
### Errors
########################################################################################


class DagkitError(Exception):
    """Base of all errors that dagkit raises itself. The exception of a step keeps its own type.

    The facts of an error are attributes, such as ``.step`` or ``.cycle``. They survive pickling.

    Examples
    --------
    >>> DagkitError("step 'fit' is odd", step="fit").step
    'fit'
    """

    step: str = ""
    name: str = ""
    cycle: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __init__(self, message: str = "", **facts: object) -> None:
        super().__init__(message)
        self.__dict__.update(facts)

    def __str__(self) -> str:
        # A KeyError shows its message as a repr. All our errors show the same text.
        return _clean_text(str(self.args[0])) if self.args else ""

    def _render_traceback_(self) -> list[str]:
        return _render_traceback()


class StepError(DagkitError, TypeError, ValueError):
    """A source, a step, its name, an option or a default cannot be used as it is."""


class CycleError(DagkitError, ValueError):
    """Steps depend on each other: ``.cycle`` is a tuple of names that ends with the first one."""


class InputError(DagkitError, TypeError, ValueError):
    """``run()`` was given unknown names (``.unknown``), or inputs have no value (``.missing``)."""


class ResultError(DagkitError, ValueError):
    """A step returned something that cannot be its result: too few values, or a generator."""


class CatalogError(DagkitError, ValueError):
    """An item of the catalog cannot be used, or has changed during a run: ``.name``."""


class WorkerError(DagkitError, RuntimeError):
    """A worker died, could not receive a step, or raised something that cannot be sent back."""


class SensorTimeoutError(DagkitError, TimeoutError):
    """A sensor returned nothing truthy in time."""


class NoValueError(DagkitError, KeyError):
    """A name has no value in a ``Run``: its step failed or was skipped, or it was not a target."""


class DagkitWarning(UserWarning):
    """Category of all warnings that dagkit issues."""


class Skip(Exception):
    """Raise it in a step to skip that step, and all steps that need its value.

    A step that takes the value by an argument with a default is not skipped: it gets the default.

    Examples
    --------
    >>> def report(sales):
    ...     if not sales:
    ...         raise Skip("no sales today")
    >>> Pipeline(report).run(sales=[]).steps["report"].reason
    'no sales today'
    """


def _render_traceback() -> list[str]:
    """Write the traceback of the exception that IPython displays: short, without our frames.

    IPython calls the method ``_render_traceback_`` of an exception that has one. Without it, it
    writes five lines for each frame, and two for each gap where it leaves out frames of ours.
    """
    from IPython import get_ipython

    error: Any = sys.exception()
    traceback = error.__traceback__
    while traceback is not None:
        while traceback.tb_next and traceback.tb_next.tb_frame.f_globals is globals():
            traceback.tb_next = traceback.tb_next.tb_next
        traceback = traceback.tb_next
    formatter = get_ipython().InteractiveTB
    lines_of_code = 2
    lines: list[str] = formatter.structured_traceback(
        type(error), error, error.__traceback__, None, lines_of_code
    )
    return lines


# Characters that control a terminal, change the direction of text, or are invalid in XML.
_UNPRINTABLE = (
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def _clean_text(text: str) -> str:
    """Replace the unprintable characters of a text that may contain anything."""
    return re.sub(_UNPRINTABLE, "\ufffd", text.replace("\r", " "))


def _make_printable(text: str) -> str:
    """Make one line of a text that may contain anything, without unprintable characters."""
    return _clean_text(re.sub(r"[\t\r\n]+", " ", text))


def _warn(text: str) -> None:
    """Warn at the innermost line outside of this module."""
    level = 1
    while sys._getframe(level).f_globals is globals() and sys._getframe(level).f_back:
        level += 1
    with contextlib.suppress(ValueError):  # stderr was closed
        warnings.warn(_clean_text(text), DagkitWarning, stacklevel=level + 1)


def _join_names(names: Iterable[str], limit: int = 12) -> str:
    """Write names as ``a, b, c``, sorted, and count those beyond the limit."""
    sorted_names = sorted(names)
    text = ", ".join(sorted_names[:limit])
    if len(sorted_names) > limit:
        text += f", … and {len(sorted_names) - limit} more"
    return text


def _suggest_names(wrong: Sequence[str], known: Collection[str], kind: str = "names") -> str:
    """List the known names, and for each wrong name the known one that is most like it."""
    import difflib  # only errors need it

    suggestions = []
    for name in wrong:
        matches = difflib.get_close_matches(name, known, n=1)
        if matches and len(wrong) == 1:
            suggestions.append(f"'{matches[0]}'")
        elif matches:
            suggestions.append(f"'{matches[0]}' for '{name}'")
    text = f"  known {kind}: {_join_names(known) or 'none'}"
    if suggestions:
        text += f"; did you mean {', '.join(suggestions)}?"
    return text


def _unwrap(function: Any) -> Any:
    """Return the function behind partials, bound methods and ``functools.wraps``."""
    for _ in range(100):  # a function that wraps itself must not hang us
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, MethodType):
            function = function.__func__
        else:
            inner = getattr(function, "__wrapped__", None)
            if not isinstance(inner, FunctionType | functools.partial | MethodType):
                break
            function = inner
    return function


def _get_working_folder() -> str:
    """Return the working folder; if it was removed, a path below which nothing can be."""
    try:
        return os.getcwd()
    except OSError:
        return os.devnull


def _shorten_path(path: str) -> str:
    """Return a path relative to the working folder, or ``<cell 5>`` for a cell of a notebook."""
    if "ipykernel_" in path:  # Jupyter compiles each cell under the name of a temporary file
        with contextlib.suppress(Exception):  # only the kernel itself knows the number: In[5]
            _, name = sys.modules["IPython"].get_ipython().compile.format_code_name(path)
            return f"<cell {name.removeprefix('In[').removesuffix(']')}>"
        return "<notebook>"
    return _make_printable(path.removeprefix(os.path.join(_get_working_folder(), "")))


def _is_path_text(value: object) -> bool:
    """Return whether a value is a text that can be a path."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _locate(function: Any) -> str:
    """Return where a callable is defined, as ``file.py:12``, or the name of its module."""
    function = _unwrap(function)
    call_method = getattr(type(function), "__call__", None)  # noqa: B004 - we need its code
    code = getattr(function, "__code__", None) or getattr(call_method, "__code__", None)
    if code is None:
        return str(getattr(function, "__module__", None) or type(function).__module__)
    return f"{_shorten_path(code.co_filename)}:{code.co_firstlineno}"


class _Summary(reprlib.Repr):
    """Writes values in at most 80 characters, and arrays and frames by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 60
        self.maxother = 80

    def __call__(self, value: object) -> str:
        text = " ".join(self.repr(value).split())
        return text if len(text) <= 80 else text[:77] + "..."

    def repr1(self, x: object, level: int) -> str:
        try:
            shape = getattr(x, "shape", None)
            if not (isinstance(shape, tuple) and shape):  # a scalar of numpy has no sizes
                return super().repr1(x, level)
            sizes = " x ".join(map(str, shape))
            text = f"{sizes} {getattr(x, 'dtype', '')}"
            return f"{type(x).__name__}({text.strip()})"
        except Exception as error:  # a message about one error must not fail because of another
            return f"<{type(x).__name__} whose repr raises {type(error).__name__}>"

    def repr_instance(self, x: object, level: int) -> str:
        return repr(x)  # reprlib would hide an exception behind an address


_summarize = _Summary()


def _get_message(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    try:
        lines = str(error).strip().splitlines()
    except Exception as failure:  # a user's __str__ may raise anything
        return f"<its message raises {type(failure).__name__}>"
    return _make_printable(lines[0]) if lines else ""


def _describe_error(error: BaseException | None) -> str:
    """Write an exception as ``ValueError: first line of its message``."""
    if error is None:
        return ""
    message = _get_message(error)
    if not message:
        return type(error).__name__
    return f"{type(error).__name__}: {message}"


########################################################################################
### State
########################################################################################


@dataclass(frozen=True, slots=True, repr=False)
class _StepState:
    """The state of one step. Plans, runs, events and records are made of these."""

    name: str
    # In a plan: fresh, stale, maybe, new, uncached. During a run: waiting, running. After it:
    # ran, cached, failed, skipped.
    status: str
    reason: str = ""  # why it will run, has run or was skipped
    seconds: float = 0.0  # of the last try
    attempts: int = 1
    error: BaseException | None = None
    saved: float = 0.0  # seconds that a stored result saves
    fingerprint: str = ""  # of the result
    elements: int | None = None  # of a mapped step

    def __repr__(self) -> str:
        details = [self.reason, _describe_error(self.error)]
        if self.seconds:
            details.insert(0, _format_duration(self.seconds))
        if self.status == "cached":
            details.insert(0, f"saved {_format_duration(self.saved)}")
        text = ", ".join(filter(None, details))
        return f"<step '{self.name}' {self.status}: {text}".removesuffix(": ") + ">"


def _format_duration(seconds: float) -> str:
    """Write a time as ``3 ms``, ``0.4 s``, ``1 min 03 s`` or ``2 h 05 min``."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _count(number: int, noun: str) -> str:
    """Write ``1 step`` or ``2 steps``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


########################################################################################
### Steps
########################################################################################

_F = TypeVar("_F", bound=Callable[..., Any])

# The attribute by which @step attaches its options to a function. functools.wraps copies it to a
# wrapper, so a decorated step is still a step, and the wrapper is what runs.
_OPTIONS_ATTRIBUTE = "_dagkit_options"


class _Sentinel(Enum):
    """Values that stand only for themselves; they pickle and copy to themselves."""

    REQUIRED = "<required>"
    FACTORY = "<factory>"

    def __str__(self) -> str:
        return self.value

    __repr__ = __str__


# The default of an input that has none, so that run() must be given a value.
REQUIRED: Any = _Sentinel.REQUIRED

# The default of an argument for which a class makes a value itself, such as a field of a dataclass
# with a default_factory. The argument is left out of a call if its value is absent.
_FACTORY: Any = _Sentinel.FACTORY


class _Option(NamedTuple):
    """The check of an option, and the check in words."""

    is_right: Callable[[Any], bool]
    expected: str


def _find_wrong_options(
    values: Mapping[str, Any], options: Mapping[str, _Option]
) -> tuple[str, str]:
    """Return the options that have a wrong value, and what was expected of them, as texts."""
    wrong = []
    expected = []
    for name, value in values.items():
        if not options[name].is_right(value):
            wrong.append(f"{name}={_summarize(value)}")
            expected.append(f"{name}: expected {options[name].expected}")
    return ", ".join(wrong), "\n  ".join(expected)


def _check_option_names(title: str, names: Iterable[str], known: Collection[str]) -> None:
    __tracebackhide__ = True
    unknown = [name for name in names if name not in known]
    if unknown:
        text = f"{title} has no option {_join_names(map(repr, unknown))}"
        raise StepError(f"{text}\n{_suggest_names(unknown, known, 'options')}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isidentifier() and not iskeyword(value)


def _are_names(value: object) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_name, value))


def _is_name_or_names(value: object) -> bool:
    return _is_name(value) or _are_names(value)


def _is_amount(value: object) -> bool:
    if isinstance(value, float):
        return value >= 0
    return type(value) is int and 0 <= value < 10**300  # so that it can become a float


class _Poke(NamedTuple):
    """How a sensor is called again and again."""

    interval: float  # seconds
    timeout: float  # seconds
    soft_fail: bool  # whether a timeout skips the step; otherwise it fails

    def is_right(self) -> bool:
        amounts = self.interval, self.timeout
        return all(map(_is_amount, amounts)) and isinstance(self.soft_fail, bool)


def _option(default: Any, is_right: Callable[[Any], bool], expected: str) -> Any:
    """Declare an option of a step: a field with its default, its check, and the check in words."""
    return field(default=default, metadata={"option": _Option(is_right, expected)})


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A function with its options: the explicit form of :func:`step`.

    Use it for variants of one function, lambdas, ``functools.partial``, callable objects, classes
    and builtins. An argument that a partial has bound by name is not an edge.

    Parameters
    ----------
    function : callable
        Gets its arguments by position where its signature allows it, otherwise by name.
    name : str, optional
        The name of the step and of its value. Default: the name of the function.
    outputs : tuple of str, optional
        Names for the items of the tuple or list that the function returns, or the keys of the
        dict that it returns.
    args : dict of str to str, optional
        Argument name -> name of the value that it takes, where the two differ. A function with
        ``**kwargs`` gets further arguments by name. One with ``*args`` or without a readable
        signature gets them by position, in this order.
    map : str or tuple of str, optional
        Call the function once per element of this argument, and collect the results in a list.
        With several arguments, their elements go side by side. Elements run, are retried and are
        cached one by one.
    after : str or tuple of str, optional
        Names of steps or outputs that must exist before this step runs, although it does not take
        them. If one of them fails or is skipped, so is this step.
    cache : bool or timedelta, optional
        Store the result, and reuse it until something that it depends on changes, or until it is
        older than the timedelta. Default: the option ``cache`` of the pipeline.
    ignore : str or tuple of str, optional
        Arguments that do not count when a stored result is looked up.
    version : Hashable, optional
        Change it to invalidate stored results, for reasons that dagkit cannot see.
    retries : int
        How often the function is called again after an exception.
    retry_delay : float
        Seconds before the first of these calls.
    retry_backoff : float
        Factor by which the delay grows from each of these calls to the next.
    local : bool
        Run in the calling process, even if the pipeline has an executor.
    poke : tuple, optional
        Set by :func:`sensor`.

    Raises
    ------
    StepError
        If the arguments cannot be edges, or an option has a wrong value.

    Examples
    --------
    >>> square = Step(lambda x: x * x, name="square")
    >>> quartic = Step(square.function, name="quartic", args={"x": "square"})
    >>> dict(Pipeline(square, quartic).run(x=3))
    {'square': 9, 'quartic': 81}
    """

    function: Callable[..., Any]
    _: KW_ONLY
    name: str = _option("", _is_name, "a name that an argument can have, such as 'clean'")
    outputs: tuple[str, ...] = _option((), _are_names, "a tuple such as ('train', 'test')")
    args: Mapping[str, str] | None = _option(
        None,
        lambda x: x is None or (isinstance(x, Mapping) and _are_names([*x, *x.values()])),
        "a dict: name of an argument -> name of the value that it takes",
    )
    map: str | tuple[str, ...] = _option((), _is_name_or_names, "an argument or a tuple of them")
    after: str | tuple[str, ...] = _option((), _is_name_or_names, "a step or a tuple of them")
    cache: bool | timedelta | None = _option(  # noqa: RUF009 - it returns a field
        None, lambda x: isinstance(x, bool | timedelta | None), "True, False or a timedelta"
    )
    ignore: str | tuple[str, ...] = _option((), _is_name_or_names, "an argument or a tuple of them")
    version: Hashable = _option(  # noqa: RUF009 - it returns a field
        None, lambda x: isinstance(x, Hashable), "something hashable"
    )
    retries: int = _option(
        0, lambda x: type(x) is int and x >= 0, "a number of extra tries, 0 or more"
    )
    retry_delay: float = _option(0.0, _is_amount, "seconds, 0 or more")
    retry_backoff: float = _option(1.0, _is_amount, "a factor, 0 or more")
    local: bool = _option(False, lambda x: isinstance(x, bool), "True or False")
    poke: _Poke | None = _option(  # noqa: RUF009 - it returns a field
        None,
        lambda x: x is None or (isinstance(x, _Poke) and x.is_right()),
        "seconds (0 or more) as interval and timeout, True or False as soft_fail",
    )

    # Derived from the function and its options:
    positional: tuple[str, ...] = field(init=False, repr=False)  # values taken by position
    keywords: tuple[tuple[str, str], ...] = field(init=False, repr=False)  # (argument, value)
    needs: tuple[str, ...] = field(init=False, repr=False)  # values that it takes
    dependencies: tuple[str, ...] = field(init=False, repr=False)  # needs, then after
    values: tuple[str, ...] = field(init=False, repr=False)  # that it produces: its own, outputs
    defaults: Mapping[str, Any] = field(init=False, repr=False)  # of values it can do without
    mapped_values: tuple[str, ...] = field(init=False, repr=False)  # that map= goes through
    ignored_values: tuple[str, ...] = field(init=False, repr=False)  # that ignore= leaves out
    is_async: bool = field(init=False, repr=False)
    is_plain: bool = field(init=False, repr=False)  # whether the plain loop can run it

    def __post_init__(self) -> None:
        __tracebackhide__ = True
        function = self.function
        set_field = object.__setattr__  # the class is frozen
        if not callable(function):
            raise StepError(f"Step() was given {_summarize(function)}; expected a callable")
        if isinstance(self.name, str) and not self.name:
            inner = function if hasattr(function, "__name__") else _unwrap(function)
            set_field(self, "name", getattr(inner, "__name__", type(inner).__name__))
        # Most steps have no options. Large builds are faster if we do not check each of them.
        has_options = any(map(operator.is_not, _get_options(self), _DEFAULT_OPTIONS))
        if has_options or not _is_name(self.name) or not self.name.isascii():
            self._check_options()
        signature = _read_signature(function)
        if signature.others and self.args is None:
            raise self._error(
                "has arguments without names (*args, **kwargs, or no readable signature), which "
                "cannot be edges",
                "expected named arguments; or name them by args={argument: value}",
            )
        # These are the fields of a step without options.
        needs = signature.positional + signature.keywords
        set_field(self, "positional", signature.positional)
        set_field(self, "keywords", tuple(zip(signature.keywords, signature.keywords, strict=True)))
        set_field(self, "needs", needs)
        set_field(self, "dependencies", needs)
        set_field(self, "values", (self.name,))
        set_field(self, "defaults", signature.defaults)
        set_field(self, "mapped_values", ())
        set_field(self, "ignored_values", ())
        is_async = inspect.iscoroutinefunction(function)
        set_field(self, "is_async", is_async)
        set_field(self, "is_plain", not (is_async or signature.has_factory))
        if has_options:
            self._apply_options(signature)

    def _check_options(self) -> None:
        """Check all options, and normalize the names in them."""
        __tracebackhide__ = True
        values = {name: getattr(self, name) for name in _STEP_OPTIONS}
        wrong, expected = _find_wrong_options(values, _STEP_OPTIONS)
        if wrong:
            raise self._error(f"has {wrong}", expected)
        for name in ("map", "after", "ignore"):
            if isinstance(values[name], str):
                values[name] = (values[name],)
        for name in ("name", "outputs", "args", "map", "after", "ignore"):
            object.__setattr__(self, name, _normalize_names(values[name]))
        if len({self.name, *self.outputs}) <= len(self.outputs):
            raise self._error(
                f"has outputs={_summarize(self.outputs)}, so two of its values have one name",
                "give each output a name of its own",
            )

    def _apply_options(self, signature: _Signature) -> None:
        """Replace the fields that depend on options."""
        __tracebackhide__ = True
        args = self.args or {}
        positional = signature.positional
        keywords = signature.keywords
        extra = tuple([name for name in args if name not in positional + keywords])
        if not signature.others:
            self._check_argument_names("args", extra, positional + keywords)
        elif signature.others == "**":
            keywords += extra
        else:
            positional += extra
        value_names = {name: args.get(name, name) for name in positional + keywords}
        self._check_argument_names("map", self.map, value_names)
        self._check_argument_names("ignore", self.ignore, value_names)
        if not {*self.map}.isdisjoint(self.ignore):
            raise self._error(
                f"ignores {_join_names({*self.map} & {*self.ignore})}, which map= goes through",
                "expected other arguments: elements are told apart by their values",
            )
        needs = tuple(dict.fromkeys(value_names.values()))  # two arguments may take one value
        defaults = {value_names[name]: value for name, value in signature.defaults.items()}
        counted = set()
        for name, value_name in value_names.items():
            if name not in signature.defaults:  # this argument insists on the value
                defaults.pop(value_name, None)
            if name not in self.ignore:
                counted.add(value_name)
        needs_loop = self.cache or self.map or self.retries or self.poke or not self.is_plain
        derived = {
            "positional": tuple([value_names[name] for name in positional]),
            "keywords": tuple([(name, value_names[name]) for name in keywords]),
            "needs": needs,
            "dependencies": (*needs, *self.after),
            "values": (self.name, *self.outputs),
            "defaults": defaults,
            "mapped_values": tuple([value_names[name] for name in self.map]),
            "ignored_values": tuple([name for name in needs if name not in counted]),
            "is_plain": not needs_loop,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _check_argument_names(
        self, option: str, names: Iterable[str], known: Collection[str]
    ) -> None:
        __tracebackhide__ = True
        unknown = [name for name in names if name not in known]
        if unknown:
            raise self._error(
                f"has no argument {_join_names(map(repr, unknown))}, which {option}= names",
                _suggest_names(unknown, known).lstrip(),
            )

    def _error(
        self, problem: str, advice: str, kind: type[DagkitError] = StepError, **facts: object
    ) -> DagkitError:
        """Make an error that says what is wrong with this step, where it is and what to do."""
        text = f"step '{self.name}' {problem}\n  {self.definition}\n  {advice}"
        return kind(text, step=self.name, **facts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Step):
            return NotImplemented
        names = ("function", *_STEP_OPTIONS)
        return all(_is_same(getattr(self, name), getattr(other, name)) for name in names)

    def __hash__(self) -> int:
        return hash(self.name)  # a callable object may be unhashable

    def __reduce__(self) -> Any:
        # Pickle the options only. The other fields are derived from them.
        options = {name: getattr(self, name) for name in _STEP_OPTIONS}
        return functools.partial(Step, **options), (self.function,)

    @property
    def definition(self) -> str:
        """How the step is defined, and where: ``fit(data, alpha=0.1) at analysis.py:41``."""
        texts = []
        try:
            for parameter in _get_signature(self.function).parameters.values():
                text = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
                if parameter.default is not parameter.empty:
                    text += f"={_summarize(parameter.default)}"
                texts.append(text)
        except Exception:  # many builtins have no signature
            texts = ["..."]
        return f"{self.name}({', '.join(texts)}) at {_locate(self.function)}"


_OPTION_FIELDS = [option for option in dataclasses.fields(Step) if "option" in option.metadata]
_STEP_OPTIONS: dict[str, _Option] = {f.name: f.metadata["option"] for f in _OPTION_FIELDS}
# All options but the name:
_DEFAULT_OPTIONS = [option.default for option in _OPTION_FIELDS[1:]]
_get_options = operator.attrgetter(*[option.name for option in _OPTION_FIELDS[1:]])


def _is_same(one: Any, other: Any) -> bool:
    """Compare two objects of any kind. Two arrays are not the same: they compare by element."""
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:
        return False


def _normalize_names(value: Any) -> Any:
    """Normalize the names in an option as Python normalizes identifiers (NFKC)."""
    if isinstance(value, str):
        return unicodedata.normalize("NFKC", value)
    if isinstance(value, Mapping):
        return {_normalize_names(key): _normalize_names(item) for key, item in value.items()}
    return value and tuple(map(_normalize_names, value))


class _Signature(NamedTuple):
    """The arguments of a function, by name."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]  # that must be passed by keyword
    defaults: Mapping[str, Any]
    others: str = ""  # how it takes arguments without names: "*", "**" or "" for not at all
    has_factory: bool = False  # whether some defaults are _FACTORY


_NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})  # one for all functions without defaults


def _read_signature(function: Any) -> _Signature:
    if type(function) is FunctionType and _SIGNATURE_ATTRIBUTES.isdisjoint(function.__dict__):
        code = function.__code__
        if not code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
            return _read_code(function, code)
    try:
        parameters = _get_signature(function).parameters.values()
    except Exception:  # many builtins have no signature
        return _Signature((), (), _NO_DEFAULTS, "*")
    # An argument that a partial has bound by name is not an edge any more.
    bound_names = function.keywords if isinstance(function, functools.partial) else ()
    positional = []
    keywords = []
    defaults = {}
    others = ""
    has_factory = False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            others = "*"
        elif parameter.kind is parameter.VAR_KEYWORD:
            others = "**"
        elif parameter.name not in bound_names:
            if parameter.default is not parameter.empty:
                defaults[parameter.name] = parameter.default
            # A hack: dataclasses, pydantic and attrs show a default factory by a private object.
            if isinstance(function, type) and repr(parameter.default) in ("<factory>", "NOTHING"):
                defaults[parameter.name] = _FACTORY
                has_factory = True
            # After an argument that may be left out, no other can be passed by position.
            if has_factory or parameter.kind is parameter.KEYWORD_ONLY:
                keywords.append(parameter.name)
            else:
                positional.append(parameter.name)
    return _Signature(tuple(positional), tuple(keywords), defaults, others, has_factory)


# Attributes by which a function claims a signature other than that of its code.
_SIGNATURE_ATTRIBUTES = frozenset({"__wrapped__", "__signature__"})


def _read_code(function: FunctionType, code: types.CodeType) -> _Signature:
    """Read the signature of a plain function, 20 times as fast as ``inspect.signature``."""
    count = code.co_argcount
    names = code.co_varnames
    keywords = names[count : count + code.co_kwonlyargcount]
    defaults = _NO_DEFAULTS
    if function.__defaults__ or function.__kwdefaults__:
        values = function.__defaults__ or ()
        # A decorator may have set more defaults than there are arguments.
        defaults = dict(zip(reversed(names[:count]), reversed(values), strict=False))
        defaults.update(function.__kwdefaults__ or {})
    return _Signature(names[:count], keywords, defaults)


def _get_signature(function: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        # Do not evaluate annotations: their names may exist only for type checkers.
        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(function)


@overload
def step(function: _F, /) -> _F: ...
@overload
def step(**options: Any) -> Callable[[_F], _F]: ...
def step(function: Any = None, /, **options: Any) -> Any:
    """Mark a function as a step, as ``@step`` or ``@step(retries=2)``.

    The function itself is returned. It stays callable, testable and picklable.

    Parameters
    ----------
    function : function
        The function to mark. Other callables become a step by :class:`Step`.
    **options
        The options of :class:`Step`.

    Returns
    -------
    function
        The function itself.

    Raises
    ------
    StepError
        If it is not a function, its arguments cannot be edges, or an option is wrong.

    Examples
    --------
    >>> @step(outputs=("low", "high"))
    ... def bounds(data):
    ...     return min(data), max(data)
    >>> bounds([3, 1, 2])
    (1, 3)
    >>> Pipeline(bounds).run("high", data=[3, 1, 2])["high"]
    3
    """
    __tracebackhide__ = True
    _check_option_names("@step", options, _STEP_OPTIONS.keys() - {"poke"})
    if function is None:
        return functools.partial(_attach_options, "@step", options=options)
    return _attach_options("@step", function, options)


@overload
def sensor(function: _F, /) -> _F: ...
@overload
def sensor(**options: Any) -> Callable[[_F], _F]: ...
def sensor(
    function: Any = None,
    /,
    *,
    poke_interval: float = 60.0,
    timeout: float = 3600.0,
    soft_fail: bool = False,
    **options: Any,
) -> Any:
    """Mark a function as a step that is called again until it returns something truthy.

    That is the value of the step. The function is called at once, and then every
    ``poke_interval`` seconds. It occupies no worker between the calls. An exception fails it, as
    any step. A sensor is never cached.

    Parameters
    ----------
    function : function
        The function to mark.
    poke_interval : float
        Seconds between two calls.
    timeout : float
        Seconds after which no further call is made.
    soft_fail : bool
        Whether a timeout skips the sensor and the steps that need it; otherwise it fails.
    **options
        The options of :class:`Step`, except ``cache``, ``ignore``, ``map`` and ``version``.

    Returns
    -------
    function
        The function itself.

    Raises
    ------
    StepError
        If an option is wrong.
    SensorTimeoutError
        In a run, if the function returns nothing truthy in time and ``soft_fail`` is false. It is
        not retried.

    Examples
    --------
    >>> answers = iter([None, 0, "arrived"])
    >>> @sensor(poke_interval=0.01)
    ... def parcel():
    ...     return next(answers)
    >>> Pipeline(parcel).run()["parcel"]
    'arrived'
    """
    __tracebackhide__ = True
    known = _STEP_OPTIONS.keys() - {"poke", "cache", "ignore", "map", "version"}
    _check_option_names("@sensor", options, known | {"poke_interval", "timeout", "soft_fail"})
    options["poke"] = _Poke(poke_interval, timeout, soft_fail)
    if function is None:
        return functools.partial(_attach_options, "@sensor", options=options)
    return _attach_options("@sensor", function, options)


def _attach_options(title: str, function: Any, options: dict[str, Any]) -> Any:
    __tracebackhide__ = True
    if type(function) is not FunctionType:
        raise StepError(
            f"{title} was given {_summarize(function)}, which is not a function\n"
            "  a class, a partial or a callable object becomes a step by Step(thing, name=...)"
        )
    try:
        Step(function, **options)  # only for its checks: errors belong to the decorated line
    except StepError as error:
        raise error.with_traceback(None) from None
    setattr(function, _OPTIONS_ATTRIBUTE, options)
    return function


def _is_marked(value: Any) -> bool:
    """Return whether a value is a function marked by ``@step``, or a wrapper around one."""
    # Not by getattr: an object with __getattr__ may claim to have any attribute.
    attributes = getattr(value, "__dict__", None)
    return type(attributes) is dict and _OPTIONS_ATTRIBUTE in attributes and callable(value)


########################################################################################
### Graph
########################################################################################


class _Graph(NamedTuple):
    """Steps that fit together."""

    steps: dict[str, Step]  # in the order in which they are declared
    producers: dict[str, Step]  # name of a value -> the step that produces it
    inputs: dict[str, Any]  # name -> default, or REQUIRED
    sorted_steps: list[Step]  # in topological order


# Something that becomes a step: a function or a Step, after the name that it gets if it has none.
_Declaration = tuple[str | None, Any]


class _Composable:
    """Base of ``Pipeline``, because a pipeline can be a source of another one."""

    _sources: list[Any]  # what _read_sources returned


def _read_sources(sources: Iterable[Any]) -> list[Any]:
    """Check the sources of a pipeline.

    Functions and steps become lists of declarations. Modules, mappings and pipelines stay as they
    are: they are read anew before each run.
    """
    __tracebackhide__ = True
    result: list[Any] = []
    for source in sources:
        if isinstance(source, FunctionType | Step) or _is_marked(source):
            if not result or type(result[-1]) is not list:
                result.append([])
            result[-1].append((None, source))
        elif isinstance(source, _Composable | str | ModuleType | Mapping):
            result.append(source)
        else:
            try:
                members = list(source)
            except Exception as error:  # most objects cannot be iterated over
                raise StepError(
                    f"Pipeline() was given {_summarize(source)}, which contains no steps\n"
                    "  expected a module, a module's name, a mapping such as globals(), a "
                    "function, a Step, a Pipeline, or an iterable of these\n"
                    "  a callable object becomes a step by Step(thing, name=...)"
                ) from error
            result += _read_sources(members)
    return result


def _find_declarations(sources: Iterable[Any]) -> list[_Declaration]:
    """Return what the sources declare now."""
    declarations: list[_Declaration] = []
    for source in sources:
        if isinstance(source, list):
            declarations += source
        elif isinstance(source, _Composable):
            declarations += _find_declarations(source._sources)
        elif isinstance(source, Mapping):
            declarations += _find_members(source)
        elif isinstance(source, ModuleType):
            declarations += _find_members(vars(source))
        else:
            try:
                module = sys.modules.get(source) or importlib.import_module(source)
            except Exception as error:  # importing a module runs its code
                raise StepError(
                    f"Pipeline() was given '{source}', but a module of this name cannot be "
                    f"imported: {_describe_error(error)}\n  expected a name such as __name__"
                ) from error
            declarations += _find_members(vars(module))
    return declarations


def _find_members(namespace: Mapping[str, Any]) -> list[_Declaration]:
    """Return what a namespace declares: all that ``@step`` has marked, and ``Step`` objects.

    If there are none, all functions are steps: of a module its own public ones, of a mapping all,
    named by their keys.
    """
    declarations: list[_Declaration] = []
    members = list(namespace.items())
    for key, value in members:
        # IPython keeps former results, and so former definitions, as _, __ and _12.
        is_former = str(key).startswith("_") and key != getattr(value, "__name__", key)
        if (isinstance(value, Step) or _is_marked(value)) and not is_former:
            declarations.append((None, value))
    if declarations:
        return declarations
    if "__name__" not in namespace:
        return [(key, value) for key, value in members if callable(value)]
    for key, value in members:
        is_public = isinstance(value, FunctionType) and not key.startswith("_")
        if is_public and value.__module__ == namespace["__name__"]:
            declarations.append((None, value))
    return declarations


def _build_graph(declarations: Iterable[_Declaration], cache: bool | timedelta = False) -> _Graph:
    """Make steps of declarations, and fit them together; ``cache`` is that of the pipeline.

    Raises ``StepError`` if two steps produce the same value, give one input different defaults,
    or run after something that no step produces; ``CycleError`` if they depend on each other.
    """
    steps: dict[str, Step] = {}
    producers: dict[str, Step] = {}
    duplicates: dict[str, str] = {}
    decorators: list[str] = []
    for name, thing in declarations:
        if isinstance(thing, Step):
            step = thing
        elif name is not None:
            step = Step(thing, name=name)
        else:
            step = Step(thing, **getattr(thing, _OPTIONS_ATTRIBUTE, {}))
        if cache and step.cache is None and step.poke is None:
            step = dataclasses.replace(step, cache=cache)
        if step.name in steps and step == steps[step.name]:
            continue  # two sources contain the same step
        if getattr(step.function, "__dict__", None):
            decorators += _find_hamilton_decorators(step)
        for value in step.values:
            other = producers.setdefault(value, step)
            if other is not step:
                duplicates[value] = (
                    f"two steps produce a value '{value}'\n  {other.definition}\n  "
                    f"{step.definition}\n"
                )
        steps[step.name] = step
    if decorators:
        raise StepError(
            "decorators of Hamilton change what a function does, but dagkit calls it without them\n"
            + "".join(decorators)
            + "  write these functions without them, or mark the steps of the module by @step"
        )
    if duplicates:
        text = "".join(duplicates.values()) + "  give one of them another name: @step(name=...)"
        raise StepError(text, name=next(iter(duplicates)))
    for step in steps.values():
        unknown = [name for name in step.after if name not in producers]
        if unknown:
            raise step._error(
                f"runs after {_join_names(map(repr, unknown))}, but no step produces it",
                _suggest_names(unknown, producers).lstrip(),
            )
    graph = _Graph(steps, producers, _find_inputs(steps, producers), [])
    graph.sorted_steps.extend(_sort_steps(graph, steps, set()))
    return graph


def _find_hamilton_decorators(step: Step) -> list[str]:
    """Return a line for each decorator of Hamilton that does more than add metadata."""
    lines = []
    # Hamilton keeps the decorators of a function in lists, by the phase in which they act. Those
    # of this phase are tag, schema and cache.
    for phase, decorators in vars(step.function).items():
        if not isinstance(decorators, list) or phase == "decorate_nodes":
            continue
        for decorator in decorators:
            modules = {base.__module__.partition(".")[0] for base in type(decorator).__mro__}
            if "hamilton" in modules:
                lines.append(f"  @{type(decorator).__name__} of {step.definition}\n")
    return lines


def _find_inputs(steps: Mapping[str, Step], producers: Mapping[str, Step]) -> dict[str, Any]:
    """Map each name that no step produces to its default. All steps must agree on it."""
    inputs: dict[str, Any] = {}
    owners: dict[str, Step] = {}  # input -> the step that gives the default
    conflicts: dict[str, str] = {}
    for step in steps.values():
        for name in step.needs:
            if name in producers:
                continue
            default = step.defaults.get(name, REQUIRED)
            known_default = inputs.setdefault(name, default)
            if default is REQUIRED and known_default is _FACTORY:
                inputs[name] = REQUIRED
            if default is REQUIRED or default is _FACTORY:
                continue
            owner = owners.setdefault(name, step)
            if owner is step:
                inputs[name] = default
            elif not _is_same(default, known_default):
                conflicts[name] = (
                    f"input '{name}' has two defaults: {_summarize(known_default)} and "
                    f"{_summarize(default)}\n  {owner.definition}\n  {step.definition}\n"
                )
    if conflicts:
        text = "".join(conflicts.values()) + "  make them equal, or rename one of the arguments"
        raise StepError(text, name=next(iter(conflicts)))
    if owners:
        _warn_of_typos(owners, producers)
    return inputs


def _warn_of_typos(owners: Mapping[str, Step], producers: Iterable[str]) -> None:
    """Warn of an argument with a default whose name is one letter away from the name of a value.

    A typo in the name of an argument without a default is an error: the input has no value. With
    a default, the step would silently run without the edge.
    """

    def cut_letters(name: str) -> set[str]:
        return {name, *[name[:i] + name[i + 1 :] for i in range(len(name))]}

    # Two names that are one letter apart (changed, added, removed or moved) are equal if one letter
    # is cut out of each. A dict of the texts that are left finds all pairs in linear time.
    names_by_text: dict[str, str] = {}
    for name in producers:
        if len(name) > 2:
            names_by_text.update(dict.fromkeys(cut_letters(name), name))
    digits = "0123456789"
    for name, owner in owners.items():
        near = {names_by_text[text] for text in cut_letters(name) & names_by_text.keys()}
        # Numbered names such as fold1 and fold2 are not typos.
        near = {other for other in near if other.strip(digits) != name.strip(digits)}
        if not near or len(name) < 3:
            continue
        code = getattr(_unwrap(owner.function), "__code__", _warn_of_typos.__code__)
        warnings.warn_explicit(
            f"step '{owner.name}' has an argument '{name}' with a default, and there is a value "
            f"'{min(near)}': is it a typo? As it stands, '{name}' is an input\n"
            f"  {owner.definition}",
            DagkitWarning,
            code.co_filename,
            code.co_firstlineno,
        )


def _sort_steps(graph: _Graph, names: Iterable[str], available: set[str]) -> list[Step]:
    """Sort the steps that produce the names from the available values.

    This is a depth-first search with an explicit stack. Values are produced shortly before they
    are needed, so few are in memory at once. Steps keep the order in which they are declared if
    that is possible. All names that the search meets are added to ``available``.
    """
    producers = graph.producers
    sorted_steps: list[Step] = []
    path: set[str] = set()  # steps whose dependencies are being sorted
    stack = list(names)
    stack.reverse()
    while stack:
        name = stack[-1]
        step = producers.get(name)
        if step is None or name in available:
            available.add(name)
            stack.pop()
            continue
        pending = [other for other in step.dependencies if other not in available]
        if not pending:
            sorted_steps.append(step)
            available.update(step.values)
        elif step.name in path:  # something that the step depends on needs the step itself
            raise _make_cycle_error(graph)
        else:
            path.add(step.name)
            pending.reverse()
            stack += pending
    return sorted_steps


def _make_cycle_error(graph: _Graph) -> CycleError:
    """Find a shortest cycle: the shortest path from any dependent of a step back to the step."""
    import networkx as nx

    network = _make_network(graph)
    shortest: list[str] = []
    for component in nx.strongly_connected_components(network):
        knot = network.subgraph(component).copy()
        # Each search is linear. In a huge component we only search from the first steps.
        limit = max(1, 100_000 // len(component))
        for name in itertools.islice(filter(component.__contains__, graph.steps), limit):
            for dependent in knot.successors(name):
                path = nx.shortest_path(knot, dependent, name)
                if not shortest or len(path) < len(shortest):
                    shortest = path
    names = [name for name in shortest if name in graph.steps]  # without outputs
    first_name = next(name for name in graph.steps if name in names)
    start = names.index(first_name)
    names = names[start:] + names[:start]
    shown_names = names
    if len(names) > 12:
        shown_names = [*names[:12], f"… {len(names) - 12} more …"]
    text = f"steps depend on each other: {' -> '.join(shown_names)} -> {first_name}\n"
    for name in names[:12]:
        text += f"  {graph.steps[name].definition}\n"
    return CycleError(
        f"{text}  rename an argument, so that it is an input", cycle=(*names, first_name)
    )


def _make_network(graph: _Graph) -> nx.DiGraph[str]:
    """Make the networkx graph. An edge leads from a value to what needs it."""
    import networkx as nx  # takes 0.1 s, which a run does not need

    network: nx.DiGraph[str] = nx.DiGraph()
    network.add_nodes_from(graph.inputs, kind="input", step="")
    for step in graph.steps.values():
        network.add_node(step.name, kind="step", step=step.name)
        network.add_nodes_from(step.outputs, kind="output", step=step.name)
        for kind, names in (("after", step.after), ("value", step.needs)):
            network.add_edges_from([(name, step.name) for name in names], kind=kind)
        network.add_edges_from([(step.name, name) for name in step.outputs], kind="output")
    return network


def _check_known_names(what: str, names: Iterable[Any], graph: _Graph) -> None:
    """Raise ``InputError`` for unknown names; ``what`` begins its message: "run() names"."""
    __tracebackhide__ = True
    known = {*graph.producers, *graph.inputs}
    unknown = [str(name) for name in names if name not in known]
    if unknown:
        raise InputError(
            f"{what} {_join_names(map(repr, unknown))}, but no step produces or uses it\n"
            + _suggest_names(unknown, known),
            unknown=tuple(unknown),
        )


########################################################################################
### Order
########################################################################################


@dataclass(eq=False, repr=False)
class _Order:
    """The steps that targets need, in topological order."""

    graph: _Graph
    targets: tuple[str, ...]
    has_targets: bool  # whether they were asked for; otherwise all values are targets
    given: frozenset[str]  # names of the values that run() was given
    steps: list[Step]
    defaults: dict[str, Any]  # of the inputs that are needed and not given
    is_plain: bool  # whether the plain loop can run it

    @functools.cached_property
    def producers(self) -> dict[str, Step]:
        """Name of a value -> the step of this order that produces it."""
        producers = {}
        for step in self.steps:
            for name in step.values:
                if name not in self.given:
                    producers[name] = step
        return producers

    @functools.cached_property
    def drops(self) -> list[list[str]]:
        """For each step the names of the values that nothing needs any more after it."""
        drops = []
        needed = set(self.targets)
        for step in reversed(self.steps):
            drops.append([name for name in step.needs + step.values if name not in needed])
            needed.update(step.needs)
        drops.reverse()
        return drops


def _make_order(graph: _Graph, targets: tuple[str, ...], given: frozenset[str]) -> _Order:
    """Find the steps that the targets need. No targets means all steps.

    Raises ``InputError`` if a name is unknown, or an input that is needed has no value.
    """
    _check_known_names("run() names", [*targets, *sorted(given)], graph)
    has_targets = bool(targets)
    if not has_targets:
        targets = tuple(graph.producers)
    if has_targets or given:
        available = set(given)
        for name in given & graph.steps.keys():  # a step that is given gives its outputs, too
            available.update(graph.steps[name].outputs)
        steps = _sort_steps(graph, targets, available)
        input_names = [name for name in graph.inputs if name in available and name not in given]
    else:
        steps = graph.sorted_steps
        input_names = list(graph.inputs)
    defaults = {name: graph.inputs[name] for name in input_names}
    missing = [name for name, default in defaults.items() if default is REQUIRED]
    if missing:
        raise _make_missing_error(graph, missing, steps)
    for name in input_names:
        if defaults[name] is _FACTORY:
            del defaults[name]
    is_plain = all([step.is_plain for step in steps])
    return _Order(graph, targets, has_targets, given, steps, defaults, is_plain)


def _make_missing_error(graph: _Graph, missing: list[str], steps: Iterable[Step]) -> InputError:
    text = ""
    for name in missing:
        for step in steps:
            if name in step.needs and name not in step.defaults:
                text += f"step '{step.name}' needs '{name}', but no step produces it and run() "
                text += f"was not given it\n  {step.definition}\n"
                break
        else:
            text += f"target '{name}' is an input, but run() was not given it\n"
    others = {*graph.producers, *graph.inputs}.difference(missing)
    return InputError(text + _suggest_names(missing, others), missing=tuple(missing))


########################################################################################
### Plain loop
########################################################################################

_clock = time.perf_counter

# Types of results that only one step could use, and only once.
_ITERABLES: tuple[Any, ...] = ((), [], "", {}, set(), range(0))
_ITERATOR_TYPES = frozenset(
    [types.GeneratorType, types.AsyncGeneratorType, zip, map, filter, enumerate, reversed]
    + [type(iter(iterable)) for iterable in _ITERABLES]
    + [member for member in vars(itertools).values() if isinstance(member, type)]
)
# A coroutine is a result that does not exist yet.
_UNUSUAL_TYPES = _ITERATOR_TYPES | {CoroutineType}


@dataclass(eq=False, repr=False)
class _Results:
    """The results of a run so far. At its end, ``Run`` (Part V) hands the values to the user."""

    order: _Order
    values: dict[str, Any]  # by name; at first those of the inputs, in the end those of the targets
    on_error: str = "raise"
    # Of plain steps, which may be many, we only keep the times. States are made if somebody asks.
    seconds: dict[str, float] = field(default_factory=dict)
    states: dict[str, _StepState] = field(default_factory=dict)  # of all other steps
    absent: dict[str, str] = field(default_factory=dict)  # value -> step that should produce it
    failure: BaseException | None = None  # what ended the run

    def list_states(self) -> list[_StepState]:
        """Return the states of all steps that have ended, in the order in which they ended."""
        if not self.seconds:
            return list(self.states.values())
        states = []
        for step in self.order.steps:  # the plain loop runs them in this order
            if step.name in self.states:
                states.append(self.states[step.name])
            elif step.name in self.seconds:
                states.append(_StepState(step.name, "ran", seconds=self.seconds[step.name]))
        return states

    def add_values(self, values: Mapping[str, Any]) -> None:
        """Add the values of a step, but for those that the run was given."""
        for name, value in values.items():
            if name not in self.order.given:
                self.values[name] = value

    def find_blocker(self, step: Step) -> str:
        """Return the name of a step without values that this one cannot do without, or ""."""
        for name in step.dependencies:
            if name in self.absent and (name not in step.defaults or name in step.after):
                return self.absent[name]
        return ""

    def get_arguments(self, step: Step) -> dict[str, Any]:
        """Return the values that a step takes, by their names."""
        arguments = {}
        for name in step.needs:
            if name in self.values:
                arguments[name] = self.values[name]
            elif step.defaults.get(name, _FACTORY) is not _FACTORY:
                arguments[name] = step.defaults[name]
        return arguments

    def record(self, state: _StepState) -> None:
        """Record the state of a step that has ended."""
        self.states[state.name] = state
        if state.status in ("failed", "skipped"):
            for name in self.order.producers[state.name].values:
                if name not in self.order.given:
                    self.absent[name] = state.name

    def record_error(
        self,
        step: Step,
        error: BaseException,
        seconds: float,
        attempts: int = 1,
        element: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Record that a step raised an exception: it is skipped, or it has failed."""
        if isinstance(error, Skip):
            reason = _get_message(error)
            self.record(_StepState(step.name, "skipped", reason, seconds, attempts))
            return
        self.add_note(step, error, element, arguments)
        if self.is_fatal(error) and self.failure is None:
            self.failure = error
        self.record(_StepState(step.name, "failed", "", seconds, attempts, error))

    def is_fatal(self, error: BaseException) -> bool:
        """Return whether an exception ends the run, not only its step."""
        return self.on_error == "raise" or not isinstance(error, Exception)

    def add_note(
        self,
        step: Step,
        error: BaseException,
        element: int | None,
        arguments: Mapping[str, Any] | None,
    ) -> None:
        """Cut our frames off an exception, and add the step, the element and the arguments.

        ``arguments`` maps names of values to values; default: ``values``.
        """
        # Hide our own frames. They would also keep all values in memory.
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_frame.f_globals is globals():
            traceback = traceback.tb_next
        error = BaseException.with_traceback(error, traceback)  # the exception may be frozen
        is_ours = isinstance(error, DagkitError) and traceback is None  # it names the step itself
        if not is_ours:
            note = f"in step '{step.name}'"
            if element is not None:
                note += f", element {element}"
            values = arguments or self.values
            texts = [f"{name}={_summarize(values[name])}" for name in step.needs if name in values]
            note += f" at {_locate(step.function)}"
            if texts:
                note += f", with {', '.join(texts)}"
            with contextlib.suppress(Exception):  # a user's class may override add_note
                error.add_note(note)


def _run_plain(results: _Results) -> None:
    """Run an order of plain steps, or until one fails and ``on_error`` is "raise".

    There is nothing to decide about a plain step while all values above it exist, so it is called
    with as little overhead as possible.
    """
    order = results.order
    values = results.values
    get_value = values.__getitem__
    seconds = results.seconds
    absent = results.absent
    event_loop = _EventLoopThread()
    start = _clock()
    try:
        for step, drops in zip(order.steps, order.drops, strict=True):
            try:
                if absent:
                    if blocker := results.find_blocker(step):
                        raise Skip(f"needs {blocker}")
                    value = _call_with(step, results.get_arguments(step))
                elif step.keywords:
                    keywords = {argument: values[name] for argument, name in step.keywords}
                    value = step.function(*map(get_value, step.positional), **keywords)
                    keywords.clear()
                else:
                    value = step.function(*map(get_value, step.positional))
                if type(value) in _UNUSUAL_TYPES or step.outputs:
                    if type(value) is CoroutineType:
                        value = event_loop.run(value)
                    results.add_values(_name_values(step, value))
                else:
                    values[step.name] = value
                value = None  # otherwise it would stay in memory during the next step
                end = _clock()
                seconds[step.name] = end - start
            except BaseException as error:
                end = _clock()
                results.record_error(step, error, end - start)
                if results.failure is not None:
                    break
            start = end
            for name in drops:
                values.pop(name, None)
    finally:
        event_loop.close()


def _call_with(step: Step, arguments: Mapping[str, Any]) -> Any:
    """Call the function of a step with values by their names."""
    positional = [arguments[name] for name in step.positional]
    keywords = {}
    for argument, name in step.keywords:
        if name in arguments:  # otherwise the function makes a value itself
            keywords[argument] = arguments[name]
    return step.function(*positional, **keywords)


def _name_values(step: Step, result: Any) -> dict[str, Any]:
    """Map the names of the values that a step produces to what its function returned.

    Raises ``ResultError`` if this cannot be the result of the step.
    """
    names = step.outputs
    if type(result) in _ITERATOR_TYPES:
        problem = f"returned a {type(result).__name__}, which only one step could use, once"
        raise step._error(problem, "return a list instead", ResultError)
    if not names:
        return {step.name: result}
    if isinstance(result, Mapping) and result.keys() == set(names):
        result = tuple([result[name] for name in names])
    if isinstance(result, tuple | list) and len(result) == len(names):
        return {step.name: tuple(result), **dict(zip(names, result, strict=True))}
    returned = _summarize(result)
    if isinstance(result, Mapping):
        returned = f"a dict with the keys {_join_names(map(str, result))}"
    elif isinstance(result, tuple | list):
        returned = _count(len(result), "value")
    raise step._error(
        f"has {len(names)} outputs ({', '.join(names)}) but returned {returned}",
        f"return a tuple of {len(names)}, or a dict with these keys",
        ResultError,
    )


class _EventLoopThread:
    """Runs coroutines in a thread of its own, because an event loop may already run in ours."""

    def __init__(self) -> None:
        self._runner: Any = None  # an asyncio.Runner, from the first coroutine on
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        if sys.platform == "emscripten":
            return _run_to_end(coroutine)
        import asyncio  # takes 16 ms

        if self._thread is None:
            # A Runner with a loop_factory does not touch the event loop of this thread.
            self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
            self._runner.get_loop()
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._runner.get_loop())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Wait for the result of a coroutine; raise its exception."""

        async def catch() -> tuple[Any, BaseException | None]:
            # The event loop itself would act on a CancelledError or a SystemExit.
            try:
                return await coroutine, None
            except BaseException as error:
                return None, error

        result, error = self.submit(catch()).result()
        if error is None:
            return result
        try:
            raise error
        finally:
            del error  # break the reference cycle error -> traceback -> frame -> error

    def _serve(self) -> None:
        with self._runner as runner:  # at its end it cancels all tasks, as after Ctrl-C
            while not self._is_closing:
                # SystemExit of a coroutine stops the loop. The exception is in its future as well.
                with contextlib.suppress(SystemExit, KeyboardInterrupt):
                    runner.get_loop().run_forever()

    def close(self) -> None:
        if self._thread is not None:
            self._is_closing = True
            loop = self._runner.get_loop()
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()


def _run_to_end(coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
    """Run a coroutine in Pyodide, which has no threads. The JavaScript engine switches stacks."""
    from concurrent.futures import Future

    from pyodide.ffi import run_sync  # type: ignore[import-not-found]

    future: Future[Any] = Future()
    try:
        future.set_result(run_sync(coroutine))
    except BaseException as error:
        coroutine.close()  # an old engine has not begun it
        future.set_exception(error)
    return future


########################################################################################
### Fingerprint
########################################################################################

# (kind, name) -> digest, or the version of a package. The kinds are function, helper, class,
# constant, default, closure, attribute, module, call, package and extension.
_Parts = dict[tuple[str, str], str]
# id -> digest, and the value: as long as we hold it, nothing else gets its id.
_Memo = dict[int, tuple[bytes, object]]

_MISSING: Any = object()
_SCALARS = frozenset({type(None), bool, int, float, str, bytes})
_CONTAINERS = frozenset({list, tuple, dict, set, frozenset})
_CODE_TYPES = (FunctionType, type, ModuleType)  # each of these is a part of its own
_FUNCTION_TYPES = (FunctionType, types.BuiltinFunctionType, types.MethodType)


class _Opaque(Exception):
    """Something has no fingerprint; ``args`` are the names that lead to it."""

    @property
    def reason(self) -> str:
        return f"no fingerprint: {' -> '.join(self.args)}"


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


# Digests: always the whole 32 bytes of a sha256, so that they can be joined


def _hash_bytes(*digests: bytes, tag: str) -> bytes:
    """Combine whole digests into one."""
    return hashlib.sha256(b"#%b\0%b" % (tag.encode(), b"".join(digests))).digest()


def _hash_plain(value: Any) -> bytes:
    """Hash a scalar, or a container for which `_is_plain` is true; every NaN is the same."""
    if value != value:
        value = math.nan
    # Version 2 of marshal writes no references: equal values give equal bytes.
    return hashlib.sha256(b"=" + marshal.dumps(value, 2)).digest()


def _shorten_digest(digest: bytes) -> str:
    return digest[:16].hex()


def _join_fingerprints(fingerprints: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()


def _is_plain(value: Collection[Any]) -> bool:
    """Return whether marshal writes a value faithfully: exact builtin types, no NaN, no cycle.

    We go level by level, so that the loops run in C. Sharing between the elements must not count:
    equal values take the same way, however they were built.
    """
    level: Collection[Any] = value
    if isinstance(value, dict):
        level = [*value, *value.values()]
    for _ in range(12):
        kinds = set(map(type, level))
        if not kinds <= _SCALARS | _CONTAINERS or len(level) > 20_000_000:
            return False
        if float in kinds and any(map(operator.ne, level, level)):
            return False
        if kinds <= _SCALARS:
            return True
        containers = [item for item in level if type(item) in _CONTAINERS]
        level = list(itertools.chain.from_iterable(containers))
        if dict in kinds:
            for item in containers:
                if type(item) is dict:
                    level.extend(item.values())
    return False


# Files and folders

_file_digests: dict[tuple[int, ...], bytes] = {}  # facts of os.stat -> digest of the content
_STORE_DIGEST = _hash_bytes(tag="store")


def _hash_path(path: str, parents: tuple[tuple[int, int], ...] = ()) -> bytes:
    """Hash the content of a file or folder; a missing one has a digest of its own."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return _hash_folder(path, (status.st_dev, status.st_ino), parents)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise _Opaque(f"special file {path}")
        times = (status.st_mtime_ns, status.st_ctime_ns)
        facts = (status.st_dev, status.st_ino, status.st_size, *times)
        if facts in _file_digests:
            return _file_digests[facts]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except (FileNotFoundError, NotADirectoryError):
        return _hash_bytes(tag="missing")
    except OSError as error:
        raise _Opaque(f"file {path}") from error
    # A younger file may change again within one tick of the file system's clock.
    if time.time_ns() - max(times) > 2_000_000_000:
        _file_digests[facts] = digest
    return digest


def _hash_folder(path: str, identity: tuple[int, int], parents: tuple[Any, ...]) -> bytes:
    if identity in parents:  # a symbolic link to a folder above
        return _hash_bytes(_hash_plain(len(parents) - parents.index(identity)), tag="loop")
    digests: list[bytes] = []
    for name in sorted(os.listdir(path)):
        inner_path = os.path.join(path, name)
        if name == "CACHEDIR.TAG":
            with open(inner_path, "rb") as file:
                if b"dagkit" in file.read(200):
                    return _STORE_DIGEST
        digest = _hash_path(inner_path, (*parents, identity))
        # Skip stores: otherwise caching a result would change the fingerprint of the folder.
        if digest != _STORE_DIGEST:
            digests += [_hash_plain(name), digest]
    return _hash_bytes(*digests, tag="folder")


def _compute_file_fingerprint(path: str) -> str:
    return _hash_path(path).hex()


# Packages and modules


@functools.cache
def _get_distributions() -> Mapping[str, list[str]]:
    import importlib.metadata

    return importlib.metadata.packages_distributions()


@functools.cache
def _get_version(distribution: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(distribution)


@functools.cache
def _find_packages(name: str, file: str | None) -> dict[str, str] | None:
    """Find a module's distributions and versions: {} for Python's own, None for the project's."""
    if name == __name__ or name.startswith("_cython_"):  # the latter is no real module
        return {}
    if not file:  # a builtin module, or the namespace of a notebook or of exec
        spec = getattr(sys.modules.get(name), "__spec__", None)
        is_builtin = getattr(spec, "origin", None) in ("built-in", "frozen")
        return {} if is_builtin else None
    *folders, inside = re.split(r"[/\\](?:site|dist)-packages[/\\]", file)
    if not folders:
        is_standard = file.startswith(os.path.dirname(os.__file__) + os.sep)
        return {} if is_standard else None
    package = re.split(r"[./\\]", inside)[0]
    versions = {name: _get_version(name) for name in _get_distributions().get(package, ())}
    loaded = getattr(sys.modules.get(package), "__dict__", {}).get("__version__")
    if versions and isinstance(loaded, str) and loaded not in versions.values():
        # It may have been upgraded on disk since it was loaded.
        versions = {name: f"{version} (loaded {loaded})" for name, version in versions.items()}
    return versions or None


def _find_home(value: Any) -> tuple[str, str | None]:
    """Return the name and the file of the module of a function, class or module."""
    if isinstance(value, type):
        name = str(value.__module__)  # a C type may have a descriptor there
        return name, getattr(sys.modules.get(name), "__file__", None)
    # functools.wraps copies __module__, so that the one of a function does not count.
    space = value.__globals__ if isinstance(value, FunctionType) else vars(value)
    return str(space.get("__name__", "")), space.get("__file__")


def _is_importable(value: Any, module: str) -> bool:
    """Return whether a class or function is what its name says, and was not made at run time."""
    if isinstance(value, type):
        is_immutable = value.__flags__ & 1 << 8
        is_on_heap = value.__flags__ & 1 << 9
        if is_immutable or not is_on_heap:  # made in C; its module may not hold it
            return True
    member: Any = sys.modules.get(module)
    for name in value.__qualname__.split("."):
        member = getattr(member, name, None)
    return member is value


def _find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Find a module as an import would, but run nothing, not even the packages above it."""
    folders, spec = None, None
    for prefix in itertools.accumulate(name.split("."), "{}.{}".format):
        if "." in prefix and folders is None:
            return None  # the module above is not a package
        for finder in sys.meta_path:
            spec = finder.find_spec(prefix, folders) if hasattr(finder, "find_spec") else None
            if spec is not None:
                break
        if spec is None:
            return None
        folders = spec.submodule_search_locations
    return spec


# Sources: what lies outside of a stored value, and can change behind it

# kind -> class, by which sources are decoded: _SOURCE_TYPES[kind](name, fingerprint)
_SOURCE_TYPES: dict[str, type[_Source]] = {}


@dataclass(frozen=True)
class _Source:
    """A file, package or piece of code that a stored value depends on, as it was."""

    kind: ClassVar[str]
    name: str
    fingerprint: str

    def __init_subclass__(cls) -> None:
        _SOURCE_TYPES[cls.kind] = cls

    def compute_fingerprint(self) -> str:
        """Return the fingerprint that the source has now; raise anything if it is gone."""
        raise NotImplementedError

    def explain_change(self) -> str:
        try:
            self.compute_fingerprint()
        except Exception:  # importing a module of the project may raise anything
            return f"{self} is gone"
        return f"{self} changed"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class _FileSource(_Source):
    """A file, or a folder with all that lies in it."""

    kind = "file"

    def compute_fingerprint(self) -> str:
        return _compute_file_fingerprint(self.name)

    def explain_change(self) -> str:
        return f"{self} changed" if os.path.lexists(self.name) else f"{self} is gone"

    def __str__(self) -> str:
        return f"file {_shorten_path(self.name)}"


class _PackageSource(_Source):
    """An installed distribution; its fingerprint is its version."""

    kind = "package"

    def compute_fingerprint(self) -> str:
        return _get_version(self.name)

    def explain_change(self) -> str:
        try:
            return f"{self} {self.fingerprint} → {self.compute_fingerprint()}"
        except Exception:  # the metadata of a broken installation may raise anything
            return f"{self} is gone"


class _CodeSource(_Source):
    """A function or class of the project that a value refers to; its name is module:qualname."""

    kind = "code"

    def compute_fingerprint(self) -> str:
        import pkgutil

        return _fingerprint(pkgutil.resolve_name(self.name))

    def __str__(self) -> str:
        return f"code {self.name.partition(':')[2]}"


# Code objects: each is read once; the argument values of its instructions count


class _Body(NamedTuple):
    """The operations of a code object and of the code inside it, and the names that they use."""

    digest: bytes
    global_names: set[str]
    names: set[str]  # all names: those of globals, attributes and modules
    texts: set[str]  # all string constants
    imports: set[tuple[int, str, tuple[str, ...]]]  # level, module, names
    docstrings: list[bytes]


_bodies: dict[int, tuple[types.CodeType, _Body]] = {}  # by id: code objects compare line numbers

_CONSTANT_CODES = frozenset(dis.hasconst)
# How the code is broken into lines decides whether the compiler writes the last two.
_NO_OPERATIONS = frozenset({"EXTENDED_ARG", "CACHE", "NOT_TAKEN", "NOP"})
_PUSHES = {"LOAD_CONST", "LOAD_SMALL_INT", "LOAD_COMMON_CONSTANT"}
_JUMP_CODES = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)
_NAME_CODES = frozenset(dis.hasname)
_VARIABLE_CODES = frozenset(dis.haslocal) | frozenset(dis.hasfree)
# All other instructions with a name look it up among the globals, in a new Python too.
_NOT_GLOBAL = re.compile("ATTR|METHOD|IMPORT|STORE_NAME|DELETE_NAME|SPECIAL")
_IGNORED_FLAGS = 0x4000000 | 0x1000000  # the code has a docstring; annotations are postponed
# The compiler stores these in the body of a class, beside what somebody wrote.
_COMPILER_NAMES = frozenset({"__doc__", "__firstlineno__", "__static_attributes__"})
_BODY_FACTS = operator.attrgetter(
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_varnames"),
    *("co_freevars", "co_cellvars"),
)


def _hash_constant(value: Any) -> bytes:
    """Hash a constant of a code object, however deeply it is nested."""
    kind = type(value)
    if kind is types.CodeType:
        return _read_body(value).digest
    if kind in _SCALARS or kind in (complex, frozenset, types.EllipsisType):
        return _hash_plain(value)
    if kind is slice:  # version 2 of marshal has none
        value = (value.start, value.stop, value.step)
    elif kind is not tuple:
        raise _Opaque(f"constant of type {_type_name(kind)}")
    return _hash_bytes(*map(_hash_constant, value), tag=kind.__name__)


def _find_texts(value: Any) -> Iterator[str]:
    """Find the texts and paths in a value; a large container holds data rather than names."""
    queue = [value]
    seen_ids: set[int] = set()
    while queue:
        item = queue.pop()
        kind = type(item)
        if kind is str:
            yield item
        elif kind in _CONTAINERS and len(item) < 10_000 and id(item) not in seen_ids:
            seen_ids.add(id(item))
            queue += item
            if kind is dict:
                queue += item.values()
        elif kind not in _SCALARS and isinstance(item, os.PathLike):
            with contextlib.suppress(Exception):  # it may be a path to another machine
                yield os.fsdecode(item)


def _list_instructions(code: types.CodeType) -> tuple[list[dis.Instruction], dict[int, int]]:
    """List the instructions that count, and map each offset to an index of this list.

    Left out are line numbers and docstrings that the body of a class stores, and what does nothing.
    """
    instructions: list[dis.Instruction] = []
    indices: dict[int, int] = {}
    for instruction in dis.get_instructions(code):
        indices[instruction.offset] = len(instructions)
        if instruction.opname in _NO_OPERATIONS:
            continue
        if instruction.opcode in _VARIABLE_CODES and type(instruction.argval) is tuple:
            # Two instructions in one, which the compiler makes of neighbours in one line.
            names = re.findall("[A-Z]+_FAST", instruction.opname)
            for name, variable in zip(names, instruction.argval, strict=True):
                instructions.append(instruction._replace(opname=name, argval=variable))
            continue
        is_store = instruction.opname == "STORE_NAME" and instruction.argval in _COMPILER_NAMES
        if is_store and instructions[-1].opname in _PUSHES:
            instructions.pop()
        else:
            instructions.append(instruction)
    indices[len(code.co_code)] = len(instructions)
    return instructions, indices


def _read_body(code: types.CodeType) -> _Body:
    """Read a code object without its location, line numbers and docstring."""
    if id(code) in _bodies:
        return _bodies[id(code)][1]
    operations: list[Any] = [code.co_flags & ~_IGNORED_FLAGS, *_BODY_FACTS(code)]
    body = _Body(b"", set(), set(), set(), set(), [])
    is_function = code.co_flags & inspect.CO_OPTIMIZED
    for text in _find_texts(code.co_consts[:1] if is_function else code.co_consts):
        body.docstrings.append(_hash_plain(text))
    instructions, indices = _list_instructions(code)
    for index, instruction in enumerate(instructions):
        opcode, name = instruction.opcode, instruction.opname
        argument = instruction.argval
        if name == "KW_NAMES":  # Python 3.11 and 3.12 do not look it up
            argument = code.co_consts[instruction.arg or 0]
        if opcode in _CONSTANT_CODES:
            if isinstance(argument, types.CodeType):
                inner = _read_body(argument)
                body.global_names.update(inner.global_names)
                body.names.update(inner.names)
                body.texts.update(inner.texts)
                body.imports.update(inner.imports)
                body.docstrings.extend(inner.docstrings)
            body.texts.update(_find_texts(argument))
            argument = _hash_constant(argument)
        elif opcode in _NAME_CODES:
            body.names.add(argument)
            if not _NOT_GLOBAL.search(name):
                body.global_names.add(argument)
            elif name == "IMPORT_NAME":  # level and names were pushed just before
                pushes = instructions[index - 2 : index]
                if not all(push.opname in _PUSHES for push in pushes):
                    raise _Opaque(f"import of {argument}")
                level, names = (push.argval for push in pushes)
                body.imports.add((level, argument, names or ()))
        elif opcode in _JUMP_CODES:
            argument = indices[argument]
        elif opcode not in _VARIABLE_CODES:
            argument = instruction.arg
        operations += [name.removesuffix("_BORROW"), argument]
    for handler in dis.Bytecode(code).exception_entries:  # type: ignore[attr-defined]
        limits = [indices[offset] for offset in (handler.start, handler.end, handler.target)]
        operations += [*limits, handler.depth, handler.lasti]
    body = body._replace(digest=_hash_bytes(_hash_plain(operations), tag="body"))
    _bodies[id(code)] = (code, body)
    return body


# The walk: through a value, or a step's code, and through all project code that this reaches


def _split(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The interpreter writes these into a class, beside its behaviour.
_CLASS_NAMES = _split(
    """__doc__ __module__ __dict__ __weakref__ __slotnames__ _abc_impl __firstlineno__
    __static_attributes__ __type_params__ __parameters__ __annotations__ __annotate__
    __annotate_func__ __annotations_cache__ __conditional_annotations__ __classdictcell__"""
)
# singledispatch remembers these between calls.
_LIBRARY_CACHES = _split("dispatch_cache cache_token _clear_cache")
# Where a module lies and how it was loaded is not behaviour.
_MODULE_NAMES = _split(
    """__name__ __package__ __loader__ __spec__ __file__ __cached__ __path__ __builtins__
    __conditional_annotations__"""
)
# Code that uses one of these names can reach things that it does not name.
_REFLECTION = _split(
    """getattr globals vars eval exec __import__ import_module attrgetter methodcaller __dict__
    __getattribute__ getmembers getattr_static modules resolve_name locate __subclasses__
    f_globals f_back currentframe _getframe"""
)
# Code that uses one of these names can reach what texts name: queries, formulas, expressions.
_TEXT_READERS = _REFLECTION | _split(
    """query sql evaluate re_evaluate execute executemany read_sql read_sql_query from_formula
    ols wls glm logit formula dmatrix dmatrices sympify parse_expr lambdify"""
)
# Code that uses one of these names can import the modules that texts name.
_IMPORTERS = _split("import_module __import__ modules resolve_name locate find_spec run_module")
_RELATIVE_NAME = re.compile(r"\.+[^\W\d]\w*(?:\.[^\W\d]\w*)*")
# These count only if the code uses one of the names, or a text says one.
_FEATURES = {
    "annotations": _split(
        "__annotations__ __annotate__ get_type_hints get_annotations signature getfullargspec"
    ),
    "docstrings": _split("__doc__ getdoc model_json_schema json_schema help render_doc"),
    "subclasses": _split("__subclasses__"),
}
_READERS = _TEXT_READERS.union(*_FEATURES.values())


@functools.lru_cache(100_000)
def _find_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W\d]\w*", text))


class _Walk:
    """The state of one walk.

    Project code becomes a flat mapping of parts, so that cycles end and a change has a name. A
    value that holds a function, class or module refers to a part.
    """

    def __init__(self, memo: _Memo, features: frozenset[str]) -> None:
        self.parts: _Parts = {}
        self.digest = b""  # of the parts, when the walk is over
        # What was looked up: function, arguments, result. If all is the same again, so is the walk.
        self.observations: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = []
        # Files, packages and code that the value refers to: kind, name -> fingerprint, or the code.
        self.sources: dict[tuple[str, str], Any] = {}
        self.root: Any = _MISSING  # the function of a step
        self.home = ""  # its module: parts do not say it, because it may be run as __main__
        self.is_in_code = False
        self.features = features
        self.wanted: set[str] = set()  # features that a library may use
        self.memo = memo  # contents that lead to no code; walks share it
        self.digests: _Memo = {}
        self.unfinished: dict[int, tuple[int, object]] = {}  # id -> depth of values in a cycle
        self.top = 0  # the smallest depth that a value refers back to
        self.references: _Memo = {}
        self.queue: deque[tuple[tuple[str, str], Any]] = deque()  # code that is not walked yet
        self.globals: dict[tuple[int, str], bytes] = {}  # namespace, name -> digest
        self.spaces: dict[int, dict[str, Any]] = {}  # namespaces of which any name may be used
        self.libraries: dict[int, dict[str, Any]] = {}  # namespaces of modules of libraries
        self.names = {"__getattr__"}  # all names that the code uses
        self.texts: set[str] = set()  # all strings that the code holds
        self.words: set[str] = set()  # the identifiers in those of them that were split
        self.split_texts: set[str] = set()
        self.paths: set[str] = set()  # the paths that it holds, and the folders of its modules
        self.imports: set[str] = set()  # the texts that may name a module
        self.moved_parts: set[tuple[str, str]] = set()  # generators that were used since

    def observe(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """Look something up so that `is_current` can look again."""
        result = read(*arguments)
        self.observations.append((read, arguments, result))
        return result

    def is_current(self) -> bool:
        self.digests.clear()
        try:
            for read, arguments, result in self.observations:
                current = read(*arguments)
                if current is not result:
                    is_plain = type(result) in (int, bytes, str) and type(current) is type(result)
                    if not (is_plain and current == result):
                        return False
        except Exception:  # a new walk will say what is wrong
            return False
        return True

    def hash(self, value: Any) -> bytes:
        """Return the digest of a value; equal values have equal digests, however built."""
        kind = type(value)
        if kind in _SCALARS:
            if kind is str and self.is_in_code:
                self.texts.add(value)
            return _hash_plain(value)
        if id(value) in self.digests:
            return self.digests[id(value)][0]
        if issubclass(kind, _CODE_TYPES):
            if id(value) not in self.references:
                self.references[id(value)] = (_hash_reference(self, value), value)
            return self.references[id(value)][0]
        # A cycle ends in a reference by distance. Finished values leave `unfinished`, so that
        # sharing does not count; inside a cycle each value is walked once.
        if id(value) in self.unfinished:
            depth = self.unfinished[id(value)][0]
            self.top = min(self.top, depth)
            return _hash_bytes(_hash_plain(len(self.unfinished) - depth), tag="back")
        depth = len(self.unfinished)
        outer_top = self.top
        self.top = depth
        self.unfinished[id(value)] = (depth, value)
        digest = _hash_value(self, value, kind)
        if self.top == depth:  # nothing inside refers further up
            while len(self.unfinished) > depth:
                self.unfinished.popitem()
            self.digests[id(value)] = (digest, value)
        self.top = min(self.top, outer_top)
        return digest

    def hash_step(self, function: Any) -> bytes:
        """Hash the function of a step, and the object that wraps or calls it."""
        self.is_in_code = True
        self.root = _unwrap(function)
        is_code = isinstance(self.root, _CODE_TYPES)
        self.home, _ = _find_home(self.root if is_code else type(self.root))
        if self.root is not function or not is_code:
            digest = self.hash_held(function, "call")
            self.parts["call", type(function).__name__] = _shorten_digest(digest)
        return self.hash(self.root)

    def hash_once(self, value: Any, compute: Callable[[Any], bytes]) -> bytes:
        """Hash content that leads to no code, once for all walks with the same memo."""
        if id(value) not in self.memo:
            self.memo[id(value)] = (compute(value), value)
        return self.memo[id(value)][0]

    def hash_held(self, value: Any, label: str) -> bytes:
        """Hash a value that code holds; if it can change, it is observed."""
        try:
            digest = self.hash(value)
        except _Opaque as error:
            raise _Opaque(label, *error.args) from error
        if type(value) not in _SCALARS and id(value) not in self.references:
            self.observations.append((self.hash, (value,), digest))
        return digest

    def find_words(self) -> set[str]:
        """Find all identifiers in the texts that the code holds; there may be many texts."""
        for text in self.texts - self.split_texts:
            self.words |= _find_words(text)
        self.split_texts |= self.texts
        return self.words

    def claim(self, kind: str, home: str, name: str) -> tuple[str, str]:
        """Reserve the name of a part; a namesake gets a number."""
        if home not in ("", self.home):
            name = f"{home}.{name}"
        part = (kind, name)
        for number in itertools.count(2):
            if part not in self.parts:
                break
            part = (kind, f"{name} #{number}")
        self.parts[part] = ""
        return part

    def is_library(self, module: str, file: str | None) -> bool:
        """Return whether a module is installed, and count its version."""
        packages = _find_packages(module, file)
        if packages is None:
            self.paths.add(os.path.dirname(str(file)))
            if str(file).endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
                self.parts["extension", module] = _shorten_digest(_hash_path(str(file)))
            return False
        for name, version in packages.items():
            self.parts["package", name] = version
            if not self.is_in_code:
                self.sources["package", name] = _get_version(name)
        return True


# Values: containers, types with a rule, and all other objects


class _Layout(NamedTuple):
    """How the values of one type count."""

    name: str  # of the rule
    rule: str | _Rule | None  # None: see _hash_object
    ignored_names: frozenset[str]  # instance attributes that do not count
    slots: dict[str, Any]  # name -> descriptor
    has_dict: bool
    builtin_bases: list[type]
    is_resource: bool  # counts by type when code holds it


_layouts: dict[type, _Layout] = {}


def _find_layout(kind: type) -> _Layout:
    """Find the first base of a type that has a rule, and what subclasses add to it."""
    if kind in _layouts:
        return _layouts[kind]
    name, rule = "object", None
    ignored_names: set[str] = set()
    slots: dict[str, Any] = {}
    base_names: set[str] = set()
    for base in kind.__mro__:
        base_name = _get_short_name(base)
        base_names.add(base_name)
        ignored_names |= _split(_IGNORED_ATTRIBUTES.get(base_name, ""))
        for member_name, member in vars(base).items():
            if member_name in _CLASS_MARKERS:
                ignored_names.add(_CLASS_MARKERS[member_name])
            decorator = type(member)
            is_cache = issubclass(decorator, functools.cached_property)
            if decorator.__name__.lstrip("_") in _CACHED_PROPERTIES:
                is_cache = _find_packages(*_find_home(decorator)) is not None
            if is_cache:
                ignored_names.add(member_name)
            if type(member) is types.MemberDescriptorType and "__slots__" in vars(base):
                slots.setdefault(member_name, member)
                if rule is not None or base_name in _RULES:
                    ignored_names.add(member_name)  # the rule covers it
        if rule is None and base_name in _RULES:
            name, rule = base_name, _RULES[base_name]
    _layouts[kind] = _Layout(
        name,
        rule,
        frozenset(ignored_names),
        slots,
        bool(kind.__dictoffset__) and any("__dict__" in vars(base) for base in kind.__mro__),
        [base for base in kind.__mro__ if base in _BUILTIN_BASES],
        issubclass(kind, _LOCKS) or not base_names.isdisjoint(_RESOURCES),
    )
    return _layouts[kind]


def _get_short_name(kind: type) -> str:
    """Name a class of a library as "pandas.DataFrame", in whatever submodule it lies."""
    module = str(kind.__module__)
    if not _is_importable(kind, module):  # it may claim to be of a library
        return ""
    return f"{module.partition('.')[0]}.{kind.__qualname__}"


def _get_attributes(value: Any, layout: _Layout) -> dict[str, Any]:
    """Return all instance attributes of a value, whatever its class says of them."""
    attributes: dict[str, Any] = {}
    if layout.has_dict:
        attributes.update(object.__getattribute__(value, "__dict__"))
    for name, slot in layout.slots.items():
        try:
            attributes[name] = slot.__get__(value)
        except AttributeError:  # not assigned
            continue
    return attributes


def _hash_attributes(walk: _Walk, attributes: dict[str, Any], layout: _Layout) -> bytes:
    """Hash the instance attributes that count; their order does not."""
    ignored_names = layout.ignored_names
    if not attributes or "*" in ignored_names:
        return _NO_ATTRIBUTES
    if "__wrapped__" in attributes:  # functools.wraps copies some that are not behaviour
        ignored_names = ignored_names | {_OPTIONS_ATTRIBUTE}
        for name in attributes.keys() & set(functools.WRAPPER_ASSIGNMENTS):
            if attributes[name] == getattr(attributes["__wrapped__"], name, _MISSING):
                ignored_names = ignored_names | {name}
    if ignored_names:
        attributes = {name: x for name, x in attributes.items() if name not in ignored_names}
    return walk.hash(dict(sorted(attributes.items())))


def _hash_value(walk: _Walk, value: Any, kind: type[Any]) -> bytes:
    if kind in _CONTAINERS:
        return _hash_container(walk, value, kind)
    layout = _find_layout(kind)
    try:
        if layout.is_resource and walk.is_in_code:
            return _hash_bytes(walk.hash(kind), tag="resource")
        if walk.is_in_code and isinstance(value, io.IOBase) and not value.readable():
            return _hash_bytes(tag="output")  # a notebook has another sys.stdout
        if layout.rule is None:
            return _hash_object(walk, value, layout)
        if isinstance(layout.rule, str):
            facts = [operator.attrgetter(name)(value) for name in layout.rule.split()]
        else:
            facts = layout.rule(walk, value)
        digests = [walk.hash(item) for item in (kind, *facts)]
        attributes = _hash_attributes(walk, _get_attributes(value, layout), layout)
        return _hash_bytes(*digests, attributes, tag=layout.name)
    except RecursionError:
        raise
    except Exception as error:  # the methods of a foreign class may raise anything
        names = error.args if isinstance(error, _Opaque) else ()
        raise _Opaque(_type_name(kind), *names) from error


def _hash_container(walk: _Walk, value: Any, kind: type[Any]) -> bytes:
    if id(value) in walk.memo or _is_plain(value):
        if walk.is_in_code:
            walk.texts.update(_find_texts(value))
        return walk.hash_once(value, _hash_plain)
    if kind is dict:
        value = list(itertools.chain.from_iterable(value.items()))
    digests = list(map(walk.hash, value))
    if kind in (set, frozenset):
        digests.sort()
    return _hash_bytes(*digests, tag=kind.__name__)


def _hash_object(walk: _Walk, value: Any, layout: _Layout) -> bytes:
    """Hash an object without a rule: what pickle would rebuild it from, and all its attributes.

    A pickle alone is not enough: it may leave attributes out.
    """
    kind = type(value)
    function, arguments, state, items, pairs = _reduce(walk, value)
    attributes = _get_attributes(value, layout)
    state, saved = _split_state(state, attributes, layout)
    if kind.__module__ == __name__:
        attributes = {}  # our own objects say by their pickle what counts
    for name, item in attributes.items():
        if isinstance(item, _LOCKS) and saved.get(name) is not item:
            attributes[name] = _type_name(type(item))  # it was left out for a good reason
    digests = [walk.hash(kind), _hash_attributes(walk, attributes, layout)]
    for base in layout.builtin_bases:
        digests.append(walk.hash(_BUILTIN_BASES[base](value)))
    if hasattr(kind, "__fspath__"):
        digests += map(walk.hash, _describe_path(walk, value))
    if len(arguments) > 1 or function is not _NEW_OBJECT:
        digests += [walk.hash(function), walk.hash(arguments)]
    if not (state is None and items is None and pairs is None):
        digests.append(walk.hash((state, items and list(items), pairs and list(pairs))))
    return _hash_bytes(*digests, tag="object")


def _get_pickle_pieces(value: Any, protocol: int) -> Any:
    """Return what pickle would write for an object: a name, or a function with its arguments."""
    reduce: Any = copyreg.dispatch_table.get(type(value))
    return reduce(value) if reduce else value.__reduce_ex__(protocol)


def _reduce(walk: _Walk, value: Any) -> tuple[Any, ...]:
    """Return what pickle would rebuild an object from: function, arguments, state, items, pairs."""
    pieces = _get_pickle_pieces(value, 4)
    if isinstance(pieces, str):  # the name of a global, which must really be the value
        # A function in C is what its name says, even if another one has replaced it there.
        home = value.__module__ if isinstance(value, types.BuiltinFunctionType) else None
        module = sys.modules[home or pickle.whichmodule(value, pieces)]  # type: ignore[attr-defined]
        if home is None and operator.attrgetter(pieces)(module) is not value:
            raise TypeError(pieces)
        walk.is_library(*_find_home(module))
        pieces = (module.__name__, pieces)
    return (*pieces, None, None, None)[:5]


def _split_state(state: Any, attributes: dict[str, Any], layout: _Layout) -> tuple[Any, Any]:
    """Return what a pickled state says beside the attributes, and the attributes that it says."""
    mappings = state if type(state) is tuple and len(state) == 2 else (state,)
    saved: dict[str, Any] = {}
    for mapping in mappings:
        if type(mapping) is dict:
            saved.update(mapping)
        elif mapping is not None:
            return state, saved
    for name, item in saved.items():
        if attributes.get(name, _MISSING) is not item:
            return {x: y for x, y in saved.items() if x not in layout.ignored_names}, saved
    return None, saved


_NO_ATTRIBUTES = _hash_plain({})
_NEW_OBJECT = copyreg.__newobj__  # type: ignore[attr-defined]  # not in its type stubs
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition)
# The content of a builtin type, which a subclass cannot hide.
_BUILTIN_BASES: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: bytes.__bytes__,
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    list: list.copy,
    dict: dict.copy,
}


# Rules: what counts of a value of a type and its subclasses. This is hashed in turn.

_Rule = Callable[[_Walk, Any], Any]
# A rule holds for the type and its subclasses: the attributes that count, or a function.
_RULES: dict[str, str | _Rule] = {
    "builtins.method": "__func__ __self__",
    "builtins.property": "fget fset fdel",
    "builtins.staticmethod": "__func__",
    "builtins.classmethod": "__func__",
    "builtins.getset_descriptor": "__objclass__ __name__",
    "builtins.classmethod_descriptor": "__objclass__ __name__",
    "builtins.mappingproxy": lambda walk, x: [dict(x)],
    "builtins.dict_keys": lambda walk, x: [list(x)],
    "builtins.dict_values": lambda walk, x: [list(x)],
    "builtins.dict_items": lambda walk, x: [list(x)],
    "builtins.set": lambda walk, x: [set().union(x)],
    "builtins.frozenset": lambda walk, x: [set().union(x)],
    "functools._lru_cache_wrapper": lambda walk, x: [x.__wrapped__, x.cache_parameters()],
    "functools.partial": "func args keywords",
    "functools.cached_property": "func",
    "enum.Enum": "_name_ _value_",
    "builtins.sentinel": "__module__ __name__",  # Python 3.15
    "_ctypes.CField": "offset size",
    "ctypes.CField": "offset size",  # Python 3.14
    "_struct.Struct": "format",
    "re.Match": "re string pos endpos regs",
    "contextlib._GeneratorContextManagerBase": "func args kwds",
    "typing.TypeVar": "__name__",
    "typing.ParamSpec": "__name__",
    "typing.TypeVarTuple": "__name__",
    "typing.TypeAliasType": "__value__",
    "typing.ForwardRef": "__forward_arg__",
    "annotationlib.ForwardRef": "__forward_arg__",
    "os._Environ": lambda walk, x: [dict(x)],
    "logging.Logger": "name",
    "weakref.ReferenceType": lambda walk, x: [x()],
    "weakref.WeakKeyDictionary": lambda walk, x: [list(x.items())],
    "weakref.WeakValueDictionary": lambda walk, x: [dict(x.items())],
    "_weakrefset.WeakSet": lambda walk, x: [set(x)],
    "pathlib.PurePath": lambda walk, x: [str(x)],
    "numpy.MaskedArray": lambda walk, x: [*_describe_array(walk, x), x.fill_value],
    "pyarrow.Table": "schema num_rows columns",
    "pyarrow.RecordBatch": "schema num_rows columns",
    "polars.DataFrame": lambda walk, x: [x.height, *x.get_columns()],
    "polars.Categories": lambda walk, x: [x.name(), x.namespace(), str(x.physical())],
    "torch.Generator": lambda walk, x: [str(x.device), x.get_state()],
    "pydantic.BaseModel": "__pydantic_fields_set__ __pydantic_extra__ __pydantic_private__",
    "numba.GUFunc": "gufunc_builder.py_func gufunc_builder.signature gufunc_builder.targetoptions",
    "numba.Dispatcher": "py_func targetoptions locals",
    "numba.DUFunc": "_dispatcher.py_func _dispatcher.targetoptions",
    "sqlalchemy.Column": """key name type primary_key nullable unique index autoincrement default
        onupdate server_default server_onupdate foreign_keys computed identity""",
    "sqlalchemy.ForeignKey": "_colspec name onupdate ondelete",
    "sqlalchemy.ColumnDefault": "arg",
    "sqlalchemy.DefaultClause": "arg",
    "sqlalchemy.ClauseElement": lambda walk, x: [str(x), x.compile().params],
    "sqlalchemy.QueryableAttribute": "key prop",
    "sqlalchemy.ColumnProperty": "columns deferred group",
    "sqlalchemy.MetaData": "schema naming_convention",
    "msgspec.StructConfig": lambda walk, x: [getattr(x, name) for name in dir(x) if name[0] != "_"],
    "PIL.Image": lambda walk, x: [x.mode, x.size, x.info, x.getpalette(), x.tobytes()],
    "xarray.Variable": "attrs encoding _dims _data",
    "xarray.Dataset": "attrs encoding _variables _coord_names _indexes _close",
}
# Instance attributes that do not count: a rule covers them, or a library caches something in them.
_IGNORED_ATTRIBUTES = {
    **dict.fromkeys(
        _split(
            """logging.Logger _thread._local numba.Dispatcher numba.DUFunc numba.GUFunc
            pydantic.TypeAdapter sqlalchemy.ClauseElement sqlalchemy.SchemaItem
            sqlalchemy.QueryableAttribute sqlalchemy.MapperProperty pint.GenericPlainRegistry
            PIL.Image"""
        ),
        "*",
    ),
    "functools.cached_property": "func attrname lock __doc__ __module__",
    "enum.Enum": "_name_ _value_ __objclass__ _sort_order_ _inverted_",
    "os._Environ": "encodekey decodekey encodevalue decodevalue _data",
    "weakref.WeakKeyDictionary": "data _remove _pending_removals _iterating _dirty_len",
    "weakref.WeakValueDictionary": "data _remove _pending_removals _iterating _dirty_len",
    "_weakrefset.WeakSet": "data _remove _pending_removals _iterating",
    "contextlib._GeneratorContextManagerBase": "*",
    "random.Random": "gauss_next",
    "numpy.memmap": "_mmap filename offset mode",
    "numpy.MaskedArray": "_fill_value _sharedmask _basedict",
    "numpy.vectorize": "_ufunc",
    "pandas.DataFrame": "_mgr _attrs _flags _item_cache _typ _is_copy",
    "pandas.Series": "_mgr _attrs _flags _name _item_cache _typ _is_copy _cacher",
    "pandas.Index": """_data _id _name _names _references _range _levels _codes sortorder
        _cache""",
    "pandas.ExtensionArray": "_ndarray _dtype _pa_array _data _mask _freq _readonly _cache",
    "pandas.ExtensionDtype": "_cache",
    "polars.DataFrame": "_df _accessors",
    "polars.Series": "_s _accessors",
    "polars.Expr": "_pyexpr",
    "polars.Categories": "*",
    "scipy._spbase": """_shape indptr indices data row col coords offsets rows _dict maxprint
        _has_sorted_indices _has_canonical_format has_canonical_format""",
    "torch.Optimizer": "_zero_grad_profile_name _warned_capturable_if_run_uncaptured",
    "sqlalchemy.TypeEngine": "dispatch",
    "sympy.Basic": "_mhash _assumptions",
    "networkx.Graph": "__networkx_cache__",
    "xarray.DataArray": "_cache",
}
# A library marks its classes by the first name; instances cache something under the second.
_CLASS_MARKERS = {
    "__attrs_attrs__": "_attrs_cached_hash",
    "_sa_class_manager": "_sa_instance_state",
}
# Decorators of attributes that are computed from the others, and so do not count.
_CACHED_PROPERTIES = _split(
    "cached_property cache_readonly lazy_property memoized_property memoized_attribute"
)
# They change no result: if code holds them, they count by type.
_RESOURCES = _split(
    """logging.Filterer logging.LoggerAdapter threading.Event threading.Semaphore
    threading.Barrier threading.Thread concurrent.Executor multiprocessing.Pool
    multiprocessing.SemLock asyncio.Lock loguru.Logger rich.Console
    structlog.BoundLoggerLazyProxy os._Environ"""
)


def _describes(*type_names: str) -> Callable[[_Rule], _Rule]:
    """Make a function the rule of these types."""

    def add_rule(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(type_names, rule))
        return rule

    return add_rule


@_describes("pyarrow.Dataset", "polars.LazyFrame", "xarray.FileManager")
@_describes("dask.DaskMethodsMixin", "zarr.Array", "fsspec.OpenFile")
def _refuse(walk: _Walk, value: Any) -> Any:
    """Refuse what reads its content later from somewhere else."""
    raise _Opaque


@_describes("builtins.code")
def _describe_code(walk: _Walk, value: Any) -> Any:
    body = _read_body(value)
    walk.names |= body.names
    return (body.digest,)


@_describes("_contextvars.ContextVar")
def _describe_variable(walk: _Walk, value: Any) -> Any:
    try:
        return (value.name, value.get())
    except LookupError:  # it has neither a value nor a default
        return (value.name,)


@_describes("_thread._local")
def _describe_thread_local(walk: _Walk, value: Any) -> Any:
    """Each thread has its own attributes: connections and the like count by type."""
    for name, item in sorted(vars(value).items()):
        try:
            yield name, walk.hash(item)
        except _Opaque:
            yield name, type(item)


@_describes("operator.attrgetter", "operator.methodcaller")
def _describe_getter(walk: _Walk, value: Any) -> Any:
    walk.names.add("getattr")
    return _reduce(walk, value)[1]


@_describes("builtins.BaseException")
def _describe_exception(walk: _Walk, value: Any) -> Any:
    members: dict[str, Any] = {}
    for base in type(value).__mro__:
        for name, member in vars(base).items():
            if type(member) is types.MemberDescriptorType:
                members[name] = getattr(value, name, None)
    return (value.args, members, value.__cause__, value.__context__)


@_describes("pathlib.Path")
def _describe_path(walk: _Walk, value: Any) -> Any:
    path = os.fspath(value)
    walk.paths.add(path)
    if walk.is_in_code and os.path.isdir(path):
        return (path,)  # by name alone: it may hold the whole project, and the store
    digest = _hash_path(path)
    if not walk.is_in_code:
        walk.sources["file", path] = digest.hex()
    return (path, digest)


def _find_memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Order the long axes as they lie in memory, from the slowest to the fastest."""
    axes = [axis for axis, length in enumerate(shape) if length > 1]
    if 0 in shape or 0 in [strides[axis] for axis in axes]:  # it is empty, or repeats itself
        return axes
    return sorted(axes, key=lambda axis: -abs(strides[axis]))


@_describes("numpy.ndarray", "numpy.generic")
def _describe_array(walk: _Walk, value: Any) -> Any:
    array = sys.modules["numpy"].asarray(value)  # without what a subclass changes
    dtype = value.dtype
    content: Any
    if dtype.names is not None:  # field by field: the bytes between them are arbitrary
        content = [array[name] for name in dtype.names]
    elif dtype.char in "gG":
        raise _Opaque("long doubles")  # some of their bytes are arbitrary
    elif dtype.hasobject or dtype.kind not in "biufcmMSUV":
        content = array.ravel().tolist()
    else:
        content = walk.hash_once(value, _hash_array)
    return (dtype, value.shape, _find_memory_order(value.shape, value.strides), content)


def _hash_array(array: Any) -> bytes:
    """Hash the bytes of an array in memory order; one with gaps is copied piece by piece."""
    numpy = sys.modules["numpy"]
    content = hashlib.sha256()
    rows = numpy.asarray(array).squeeze()
    if rows.nbytes == 0:
        return content.digest()
    rows = numpy.atleast_1d(rows.transpose(_find_memory_order(rows.shape, rows.strides)))
    rows_at_once = len(rows)
    if not rows.flags.c_contiguous:
        rows_at_once = 1 + (1 << 20) // rows[:1].nbytes
    for start in range(0, len(rows), rows_at_once):
        piece = numpy.ascontiguousarray(rows[start : start + rows_at_once])
        content.update(piece.reshape(-1).view("u1"))
    return content.digest()


@_describes("numpy.RandomState")
def _describe_random_state(walk: _Walk, value: Any) -> Any:
    if value is sys.modules["numpy.random"].mtrand._rand:
        return ()  # the global one, which everything shares
    return (value.get_state(),)


@_describes("random.Random")
def _describe_random(walk: _Walk, value: Any) -> Any:
    import random

    if value is random._inst or isinstance(value, random.SystemRandom):
        return ()  # `from random import choice` is a method of the global one
    return (value.getstate(),)


@_describes("pandas.DataFrame", "pandas.Series")
def _describe_frame(walk: _Walk, value: Any) -> Any:
    """Describe a frame by its columns: how its blocks lie in memory does not count."""
    about = (value.index, value.attrs, value.flags.allows_duplicate_labels)
    if value.ndim == 1:
        return (*about, value.name, value.array)
    return (*about, value.columns, *value._iter_column_arrays())


@_describes("pandas.Index")
def _describe_index(walk: _Walk, value: Any) -> Any:
    names = list(value.names)
    if hasattr(value, "levels"):
        return (names, list(value.levels), list(value.codes), value.sortorder)
    if hasattr(value, "_range"):
        return (names, value._range)
    return (names, getattr(value, "freqstr", None), value.array)


@_describes("pandas.ExtensionArray")
def _describe_column(walk: _Walk, value: Any) -> Any:
    """Describe an array of pandas; the dtype says what its codes, times or texts mean."""
    for name in ("_pa_array", "_ndarray"):
        if hasattr(value, name):
            return (value.dtype, getattr(value, name))
    if hasattr(value, "_mask"):
        content = value._data.copy()
        content[value._mask] = content.dtype.type()  # the values below the mask are arbitrary
        return (value.dtype, content, value._mask)
    return (value.dtype, value.astype(object))


@_describes("pyarrow.Array", "pyarrow.ChunkedArray")
def _describe_arrow(walk: _Walk, value: Any) -> Any:
    """Describe an Arrow array by its content: not by chunks, offsets or bytes below nulls."""
    numpy, pyarrow = sys.modules["numpy"], sys.modules["pyarrow"]
    kind = value.type
    if isinstance(value, pyarrow.ChunkedArray):
        if value.num_chunks == 1:
            value = value.chunk(0)
        else:
            value = value.unify_dictionaries().combine_chunks()
    nulls = value.is_null().to_numpy(zero_copy_only=False) if value.null_count else None
    about = (kind, len(value), nulls)
    if isinstance(value, pyarrow.ExtensionArray):
        return (*about, value.storage)
    if isinstance(value, pyarrow.DictionaryArray):
        return (*about, value.indices, value.dictionary)
    if isinstance(value, pyarrow.StructArray):
        return (*about, *value.flatten())
    if type(value) in (pyarrow.ListArray, pyarrow.LargeListArray):
        return (*about, value.value_lengths().fill_null(0), value.flatten())
    if str(kind).removeprefix("large_") in ("string", "binary", "string_view", "binary_view"):
        value = value.cast("large_binary").fill_null(b"")
        _, offsets, content = value.buffers()
        if not content:
            return about
        limits = numpy.frombuffer(offsets, "i8")[value.offset : value.offset + len(value) + 1]
        text = numpy.frombuffer(content, "u1")[limits[0] : limits[-1]]
        return (*about, numpy.diff(limits), text)
    if str(kind) == "bool":
        value = value.cast("uint8")
    try:
        width = value.type.byte_width
    except ValueError:  # of another type
        return (*about, value.to_pylist())
    cells = numpy.frombuffer(value.buffers()[1], f"V{width}")
    cells = cells[value.offset : value.offset + len(value)]
    if nulls is not None:
        cells = cells.copy()
        cells[nulls] = bytes(width)
    return (*about, cells)


@_describes("polars.Series")
def _describe_polars_series(walk: _Walk, value: Any) -> Any:
    # Categoricals have codes, objects have addresses that depend on the process.
    if re.search("Categorical|Object", str(value.dtype)):
        return (value.name, str(value.dtype), value.to_list())
    try:
        return (value.name, value.dtype, value.to_arrow())
    except Exception:  # without pyarrow
        return (value.name, value.dtype, value.to_list())


@_describes("polars.Expr")
def _describe_polars_expression(walk: _Walk, value: Any) -> Any:
    state = value.__getstate__()
    if b"PLPY" in state:
        raise _Opaque("Python function in an expression")
    return (state,)


@_describes("scipy._spbase")
def _describe_sparse(walk: _Walk, value: Any) -> Any:
    """Describe a sparse matrix in canonical form."""
    about = (value.format, value.shape, value.dtype)
    if value.format not in ("csr", "csc", "bsr"):
        value = value.tocoo(copy=True)
        value.sum_duplicates()
        return (*about, *value.coords, value.data)
    if not vars(value).get("_has_canonical_format"):
        value = value.copy()
        value.sum_duplicates()
    return (*about, value.indptr, value.indices, value.data)


@_describes("torch.Tensor")
def _describe_tensor(walk: _Walk, value: Any) -> Any:
    if value.grad_fn is not None:
        raise _Opaque("autograd graph")
    if str(value.layout) != "torch.strided" or value.is_quantized:
        raise _Opaque(f"layout {value.layout}")

    def hash_content(tensor: Any) -> bytes:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return hashlib.sha256(plain.view(sys.modules["torch"].uint8).numpy()).digest()

    about = (value.dtype, tuple(value.shape), str(value.device), value.requires_grad, value.grad)
    order = _find_memory_order(value.shape, value.stride())
    return (*about, order, value._backward_hooks or None, walk.hash_once(value, hash_content))


@_describes("pydantic.TypeAdapter")
def _describe_type_adapter(walk: _Walk, value: Any) -> Any:
    walk.wanted.add("annotations")
    return (value._type, value._config)


@_describes("sqlalchemy.RelationshipProperty")
def _describe_relationship(walk: _Walk, value: Any) -> Any:
    """Describe a relationship of SQLAlchemy by its arguments, which are resolved later."""
    arguments = [(x.name, x.argument) for x in value._init_args]
    return (value.argument, value.back_populates, value.lazy, value.cascade, arguments)


@_describes("sqlalchemy.Table")
def _describe_sql_table(walk: _Walk, value: Any) -> Any:
    constraints: list[str] = []
    for item in (*value.constraints, *value.indexes):
        columns = [column.name for column in item.columns]
        facts = (item.name, getattr(item, "unique", None), str(getattr(item, "sqltext", "")))
        constraints.append(repr((type(item).__name__, columns, *facts)))
    return (value.name, value.schema, list(value.columns), sorted(constraints))


@_describes("pint.GenericPlainRegistry")
def _describe_units(walk: _Walk, value: Any) -> Any:
    """Describe a registry of pint by its definitions.

    Left out are those that pint makes of a prefix and a unit when they are first used.
    """
    for name, unit in sorted(value._units.items()):
        reference = list(unit.reference or ())
        stem = reference[0] if len(reference) == 1 else ""
        if not (stem and name != stem and name.removesuffix(stem) in value._prefixes):
            yield name, str(unit)
    for name, prefix in sorted(value._prefixes.items()):
        yield name, str(prefix)


# Code: functions, classes and modules become parts


def _hash_reference(walk: _Walk, value: Any) -> bytes:
    """Name a function, class or module, and put it in the queue if it counts by its code."""
    home, file = _find_home(value)
    is_library = walk.is_library(home, file)
    if isinstance(value, ModuleType):
        if is_library:
            walk.libraries[id(value)] = vars(value)
        else:
            walk.spaces[id(value)] = vars(value)
            if not walk.is_in_code:
                walk.names.add("getattr")  # any member of a module that is an input may be used
        return _hash_bytes(_hash_plain("" if home == walk.home else home), tag="module")
    if isinstance(value, type):
        kind, name = "class", value.__qualname__
        is_known = is_library and _is_importable(value, home)
    else:
        kind, name = "helper", value.__code__.co_qualname
        if value.__code__.co_filename.startswith(("<string>", "<attrs")):
            kind = "generated"  # such as __init__ of a dataclass: it changes with the class
        is_known = is_library and not (value.__closure__ or vars(value))
    is_counted = not is_library and not walk.is_in_code and "<" not in name
    if is_counted and _is_importable(value, home):  # a pickle names only what can be imported
        walk.sources["code", f"{home}:{value.__qualname__}"] = value
    if value is walk.root:
        part = ("function", value.__name__)
    elif is_known:
        patches: list[Any] = []
        if isinstance(value, type):
            patches = walk.observe(_list_patches, value)
        digests = [_hash_plain((kind, home, name)), *map(walk.hash, patches)]
        return _hash_bytes(*digests, tag="library")
    else:
        part = walk.claim(kind, home, name)
    if is_known:  # a function of a library is the step: its name and version say everything
        walk.parts[part] = f"{home}.{name}"
    else:
        walk.queue.append((part, value))
    return _hash_bytes(_hash_plain(part), tag="part")


_patches: dict[type, tuple[int, list[tuple[Any, str, Any]], list[Any]]] = {}


def _list_patches(cls: type) -> list[Any]:
    """List project code that was put into a class of a library: accessors, patched methods.

    It returns the same list again as long as the class has as many members and still holds these.
    """
    spaces = [vars(base) for base in cls.__mro__ if base.__flags__ & 1 << 9]
    registered = _list_relatives(cls, with_subclasses=False)
    size = len(registered) + sum(map(len, spaces))
    known_size, places, patches = _patches.get(cls, (-1, [], []))
    if size == known_size and all(space.get(name) is x for space, name, x in places):
        return patches
    places = [(s, name, x) for s in spaces for name, x in s.items() if _is_patch(x)]
    patches = [*[x for _, _, x in places], *filter(_is_patch, registered)]
    _patches[cls] = (size, places, patches)
    return patches


def _is_patch(member: Any) -> bool:
    """Return whether a member of a library is project code, or holds some."""
    if not isinstance(member, _CODE_TYPES):
        member = getattr(member, "_accessor", getattr(member, "fget", member))
    if not isinstance(member, (FunctionType, type)):
        return False
    home, file = _find_home(member)
    return (home == "__main__" or bool(file)) and _find_packages(home, file) is None


_LAZY_TYPE: Any = getattr(types, "LazyImportType", ())  # Python 3.15


# A random generator changes whenever code uses it. For these we remember the first digest.
_GENERATORS = _split("random.Random numpy.RandomState numpy.Generator torch.Generator")
_first_digests: _Memo = {}


def _hash_global(walk: _Walk, space: dict[str, Any], name: str) -> bytes:
    """Look up a global as the code would; a constant becomes a part."""
    key = (id(space), name)
    if key in walk.globals or name in _MODULE_NAMES:
        return walk.globals.get(key, _hash_bytes(tag="module name"))
    value = walk.observe(space.get, name, _MISSING)
    if isinstance(value, _LAZY_TYPE):
        try:
            value = walk.observe(value.resolve)
        except Exception as error:  # importing a module may raise anything
            raise _Opaque(name) from error
    if isinstance(value, _FUNCTION_TYPES) and value.__name__ in _READERS:
        walk.names.add(value.__name__)  # it was imported under another name
        walk.spaces[id(space)] = space
    if value is _MISSING:
        walk.globals[key] = _hash_bytes(tag="undefined")  # a builtin, or not defined yet
    elif issubclass(type(value), _CODE_TYPES):
        walk.globals[key] = walk.hash(value)
    else:
        part = walk.claim("constant", str(space.get("__name__", "")), name)
        # Stored before the value is hashed, because the value may lead back to it.
        walk.globals[key] = _hash_bytes(_hash_plain(part), tag="part")
        digest = walk.hash_held(value, f"constant {name}")
        walk.parts[part] = _shorten_digest(digest)
        if not _GENERATORS.isdisjoint(map(_get_short_name, type(value).__mro__)):
            _, first_digest = _first_digests.setdefault(id(value), (value, digest))
            if digest != first_digest:
                walk.moved_parts.add(part)
    return walk.globals[key]


def _list_members(walk: _Walk, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that somebody gave to a function or class."""
    space = vars(value)
    walk.observe(len, space)
    names = space.keys() - {_OPTIONS_ATTRIBUTE}
    if isinstance(value, type):
        names -= _CLASS_NAMES
    for name in sorted(names):
        yield name, walk.observe(space.get, name)
    if "docstrings" in walk.features:
        yield "__doc__", walk.observe(getattr, value, "__doc__", None)
    if "annotations" in walk.features:
        yield "__annotations__", walk.observe(_get_annotations, value)


def _hash_annotations(walk: _Walk, value: Any, space: dict[str, Any]) -> bytes:
    """Hash what the annotations of a function or class name, if they are texts."""
    digests: list[bytes] = []
    if "annotations" in walk.features:
        for text in _find_texts(_get_annotations(value)):
            for name in sorted(_find_words(text) & space.keys()):
                digests.append(_hash_global(walk, space, name))
    return _hash_bytes(*digests, tag="annotations")


def _get_annotations(value: Any) -> Any:
    """Return the annotations, or the function that makes them on demand; never evaluate them."""
    if isinstance(value, type):  # looked up in the class itself, they would be added to it
        space = vars(value)
        return space.get("__annotate_func__") or space.get("__annotations__")
    return getattr(value, "__annotate__", None) or value.__annotations__


def _get_cell(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _MISSING


def _hash_function(walk: _Walk, function: Any) -> bytes:
    """Hash a function: its code, what its names mean, closure, defaults and attributes."""
    code = walk.observe(getattr, function, "__code__")
    packages = _find_packages(*_find_home(function))
    if packages is None:
        body = _read_body(code)
        _follow_body(walk, body, function.__globals__)
        digests = [body.digest, _hash_annotations(walk, function, function.__globals__)]
        if "docstrings" in walk.features:
            digests += body.docstrings
        for name in sorted(body.global_names):
            digests.append(_hash_global(walk, function.__globals__, name))
    else:
        digests = [_hash_plain((_find_home(function)[0], code.co_qualname))]
        if packages:
            walk.wanted.add("annotations")  # it may act by those of others
    # A name that was set by hand can be seen: pandas names columns by it.
    names = [walk.observe(getattr, function, name) for name in ("__name__", "__qualname__")]
    if names != [code.co_name, code.co_qualname]:
        digests.append(_hash_plain(" ".join(names)))
    for kind, name, value in _list_held(walk, function, code):
        if name == "__classdict__" or (packages is not None and name in _LIBRARY_CACHES):
            continue
        digest = walk.hash_held(value, f"{kind} {name}")
        if function is walk.root:  # a part of its own
            walk.parts[kind, name] = _shorten_digest(digest)
        else:
            digests += [_hash_plain((kind, name)), digest]
    return _hash_bytes(*digests, tag="function")


def _list_held(walk: _Walk, function: Any, code: types.CodeType) -> Iterator[tuple[str, str, Any]]:
    """Yield kind, name and value of all that a function holds."""
    defaults = walk.observe(getattr, function, "__defaults__") or ()
    names = code.co_varnames[: code.co_argcount]
    # A decorator may have set more defaults than there are arguments.
    for name, value in zip(reversed(names), reversed(defaults), strict=False):
        yield "default", name, value
    keyword_defaults = walk.observe(getattr, function, "__kwdefaults__") or {}
    for name in keyword_defaults:
        yield "default", name, walk.observe(keyword_defaults.get, name)
    cells = walk.observe(getattr, function, "__closure__") or ()
    for name, cell in zip(code.co_freevars, cells, strict=True):
        value = walk.observe(_get_cell, cell)
        if value is not _MISSING:
            yield "closure", name, value
    for name, value in _list_members(walk, function):
        yield "attribute", name, value


def _hash_class(walk: _Walk, cls: type[Any]) -> bytes:
    """Hash a class: metaclass, bases, attributes, and the classes that it knows."""
    bases = walk.observe(getattr, cls, "__bases__")
    digests = [walk.hash(base) for base in (type(cls), *bases)]
    space = getattr(sys.modules.get(cls.__module__), "__dict__", {})
    digests.append(_hash_annotations(walk, cls, space))
    facts, library_names = _find_project_facts(cls)
    for name, value in (*facts.items(), *_list_members(walk, cls)):
        if name not in library_names:
            digests.append(_hash_plain((name, _type_name(type(value)))))
            digests.append(walk.hash_held(value, f"attribute {name}"))
    with_subclasses = "subclasses" in walk.features
    walk.observe(lambda: len(_list_relatives(cls, with_subclasses)))
    digests += map(walk.hash, _list_relatives(cls, with_subclasses))
    if any(_find_packages(*_find_home(base)) for base in (type(cls), *cls.__mro__)):
        walk.wanted.add("annotations")  # the base of a library may act by them
    return _hash_bytes(*digests, tag="class")


def _list_relatives(cls: type[Any], with_subclasses: bool) -> list[type]:
    """List the classes that were registered with an abstract one, and the subclasses."""
    relatives: list[type] = []
    if "_abc_impl" in vars(cls):
        import _abc  # type: ignore[import-not-found]

        registered = [reference() for reference in _abc._get_dump(cls)[0]]
        relatives = sorted(filter(None, registered), key=_type_name)
    if with_subclasses:
        relatives += type.__subclasses__(cls)
    return relatives


def _list_fields(cls: type[Any], label: str) -> _Parts:
    """List the defaults of a class as parts, for reasons such as ``class Config: seed 7 → 8``.

    The class counts with all that it holds. These parts name what has changed: numbers are written
    out, texts are not, because they may be credentials.
    """
    space = vars(cls)
    declarations = [*space.get("__dataclass_fields__", {}).items()]
    declarations += space.get("__pydantic_fields__", {}).items()
    declarations += [(field.name, field) for field in space.get("__attrs_attrs__", ())]
    fields = {name: field.default for name, field in declarations}
    for name, value in space.items():
        fields.setdefault(name, value)
    fields |= space.get("_field_defaults", {})  # of a named tuple
    parts = {}
    for name, value in fields.items():
        if type(value) in _SCALARS and not name.startswith("__"):
            text = repr(value)
            if isinstance(value, str | bytes):
                text = f"#{_shorten_digest(_hash_plain(value))}"
            parts["field", f"{label}.{name}"] = text
    return parts


def _find_project_facts(cls: type[Any]) -> tuple[dict[str, Any], Collection[str]]:
    """Return what the project wrote into a class, and the names that a library writes into it."""
    space = vars(cls)
    if "__pydantic_fields__" in space:
        names = {name for name in space if name.startswith("__pydantic_")} | {"__signature__"}
        # Annotations are resolved when the class is used first; they count as they were written.
        facts: dict[str, Any] = {"generic": space.get("__pydantic_generic_metadata__")}
        for name, field in space["__pydantic_fields__"].items():
            facts[f"field {name}"] = ({**field._attributes_set, "annotation": ""}, field.metadata)
            if not _get_annotations(cls):
                facts[f"type {name}"] = field.annotation
        for kind in type(space["__pydantic_decorators__"]).__dataclass_fields__:
            group = getattr(space["__pydantic_decorators__"], kind)
            for name, item in group.items() if isinstance(group, dict) else ():
                facts[f"{kind} {name}"] = item.info
        return facts, names
    if "_sa_registry" in space or "_sa_class_manager" in space:
        names = set(_split("registry metadata _sa_registry _sa_class_manager __mapper__"))
        if "sqlalchemy" in _find_home(space.get("__init__", cls))[0]:
            names.add("__init__")  # it was generated
        return {}, names
    if "__attrs_attrs__" in space:
        code = getattr(space.get("__hash__"), "__code__", None)
        is_generated = code is not None and code.co_filename.startswith("<attrs")
        return {}, {"__hash__"} if is_generated else ()  # it depends on the seed of hashes
    if type(cls).__name__ == "JitClassType":  # of numba
        kind = cls.class_type
        return {"methods": kind.jit_methods, "fields": str(list(kind.struct.items()))}, space.keys()
    if getattr(cls, "_is_protocol", None) is False:
        # typing stores an inherited __init__ in the class when its first instance is made.
        init = space.get("__init__")
        if init and any(vars(base).get("__init__") is init for base in cls.__mro__[1:]):
            return {}, {"__init__"}
    if issubclass(cls, enum.Enum):
        return {}, _split("_value2member_map_ _hashable_values_ _unhashable_values_ "
            "_unhashable_values_map_")  # fmt: skip
    facts = {}
    for base in type(cls).__mro__:  # a metaclass in C has its own memory
        for name, member in vars(base).items() if base is not type and base is not object else ():
            if type(member) in (types.MemberDescriptorType, types.GetSetDescriptorType):
                facts[name] = getattr(cls, name, None)
    facts.pop("__dict__", None)
    return facts, ()


def _follow_body(walk: _Walk, body: _Body, space: dict[str, Any]) -> None:
    """Follow what code names beside its globals: modules, and all that reflection can reach."""
    walk.names |= body.names
    walk.texts |= body.texts
    if not _TEXT_READERS.isdisjoint(body.names):
        walk.spaces[id(space)] = space
    if not _REFLECTION.isdisjoint(body.names):
        for value in list(space.values()):
            if isinstance(value, (FunctionType, type)):
                walk.hash(sys.modules.get(str(value.__module__)))
    imports = set(body.imports)
    if not _IMPORTERS.isdisjoint(body.names):
        for text in body.texts:
            if _RELATIVE_NAME.fullmatch(text):
                imports.add((len(text) - len(text.lstrip(".")), text.lstrip("."), ()))
    for level, name, names in sorted(imports):
        if level:
            package = space.get("__package__") or str(space.get("__name__")).rpartition(".")[0]
            name = ".".join(filter(None, (package.rsplit(".", level - 1)[0], name)))
        _follow_import(walk, name)
        for inner in names:
            if inner not in getattr(sys.modules.get(name), "__dict__", ()):
                _follow_import(walk, f"{name}.{inner}")


@functools.lru_cache(100_000)
def _is_module(name: str) -> bool:
    """Return whether there is such a module. Looking for it may take 0.1 ms."""
    try:
        return all(map(str.isidentifier, name.split("."))) and _find_spec(name) is not None
    except Exception:  # a finder may raise anything
        return False


def _follow_import(walk: _Walk, name: str) -> None:
    """Count a module that a body imports, loaded or not, after the packages above it."""
    package = name.rpartition(".")[0]
    if package:
        _follow_import(walk, package)
    loaded = walk.observe(sys.modules.get, name)
    if isinstance(loaded, ModuleType):
        walk.hash(loaded)
        return
    if ("module", name) in walk.parts:
        return

    def hash_file() -> bytes:  # the one that an import would read now
        spec = _find_spec(name)
        if spec and spec.origin:
            return _hash_path(spec.origin)
        return _hash_plain(spec is not None)

    try:
        spec: Any = _find_spec(name)
        if spec and walk.is_library(name, spec.origin):
            return
        code = spec.loader.get_code(name) if spec and spec.loader else None
        walk.observe(hash_file)
    except Exception as error:  # it does not compile, or has an unusual loader
        raise _Opaque(f"module {name}") from error
    walk.parts["module", name] = ""
    if code:
        body = _read_body(code)
        walk.parts["module", name] = _shorten_digest(body.digest)
        _follow_body(walk, body, {"__name__": name, "__package__": spec.parent})


def _hash_members(walk: _Walk, space: dict[str, Any]) -> bytes:
    """Hash the members of a module that the code may use."""
    names = set(walk.names)
    if not _TEXT_READERS.isdisjoint(names):
        names |= walk.find_words()
    if "__annotations__" in names and "__annotate__" in space:  # it makes them on demand
        names = (names - {"__annotations__"}) | {"__annotate__"}
    names &= space.keys()
    if not _REFLECTION.isdisjoint(walk.names):
        kinds = (*_CODE_TYPES, functools.partial, functools._lru_cache_wrapper, _LAZY_TYPE)
        for name, value in space.items():
            if isinstance(value, kinds) and not name.startswith("__"):
                names.add(name)
    digests: list[bytes] = []
    for name in sorted(names):
        digests += [_hash_plain(name), _hash_global(walk, space, name)]
    return _hash_bytes(*digests, tag="members")


def _walk_queue(walk: _Walk) -> None:
    """Walk all code that was reached, until no more is reached."""
    if not walk.is_in_code:
        walk.is_in_code = True
        walk.digests.clear()  # some values count in another way now
    globals_before = -1
    while walk.queue or globals_before < len(walk.globals):
        globals_before = len(walk.globals)
        while walk.queue:
            part, value = walk.queue.popleft()
            hash_code = _hash_class if isinstance(value, type) else _hash_function
            try:
                walk.parts[part] = _shorten_digest(hash_code(walk, value))
                if isinstance(value, type):
                    walk.parts |= _list_fields(value, part[1])
            except RecursionError:
                raise
            except Exception as error:  # a metaclass may raise anything
                label = part[1] if value is walk.root else " ".join(part)
                names = error.args if isinstance(error, _Opaque) else ()
                raise _Opaque(label, *names) from error
        if not _IMPORTERS.isdisjoint(walk.names):  # texts may name modules
            for text in sorted(walk.texts - walk.imports):
                walk.imports.add(text)
                if text in sys.modules or _is_module(text):
                    _follow_import(walk, text)
        for space in list(walk.libraries.values()):
            for name in sorted(walk.names & space.keys()):
                if isinstance(space[name], (type, ModuleType)) or _is_patch(space[name]):
                    _hash_global(walk, space, name)
        for space in list(walk.spaces.values()):
            _hash_members(walk, space)
    for space in walk.spaces.values():
        name = str(space.get("__name__", ""))
        part = walk.claim("module", "", "of the step" if name == walk.home else name)
        walk.parts[part] = _shorten_digest(walk.observe(_hash_members, walk, space))


def _walk(
    memo: _Memo, hash_value: Callable[[_Walk, Any], bytes], value: Any
) -> tuple[_Walk, bytes]:
    """Walk as often as the code turns out to use features that did not count yet."""
    features: frozenset[str] = frozenset()
    while True:
        walk = _Walk(memo, features)
        try:
            digest = hash_value(walk, value)
            _walk_queue(walk)
        except _Opaque:
            raise
        except RecursionError as error:
            raise _Opaque("nested too deeply") from error
        except Exception as error:  # e.g. the class of a class cannot be hashed
            raise _Opaque(type(error).__name__) from error
        words = walk.names | walk.find_words()
        for name, readers in _FEATURES.items():
            if not readers.isdisjoint(words):
                walk.wanted.add(name)
        if walk.wanted <= features:
            walk.digest = _hash_plain(sorted(walk.parts.items()))
            return walk, digest
        features |= walk.wanted


# The functions that other rooms use


def _fingerprint(value: object) -> str:
    """Return 64 hexadecimal digits that are equal exactly for values of equal type and content.

    Functions and classes of the project count with their code, installed ones by version. Raises
    `_Opaque` if a value has no content to count, like a lock, a connection or a generator.
    """
    return _fingerprint_with_walk(value)[0]


def _fingerprint_with_walk(value: object) -> tuple[str, _Walk]:
    walk, digest = _walk({}, _Walk.hash, value)
    return _hash_bytes(digest, walk.digest, tag="value").hex(), walk


def _fingerprint_with_sources(value: object) -> tuple[str, list[_Source]]:
    """Return the fingerprint of a value, and what it depends on outside of the value."""
    text, walk = _fingerprint_with_walk(value)
    sources: list[_Source] = []
    for (kind, name), fingerprint in walk.sources.items():
        if kind == "code":
            fingerprint = _fingerprint(fingerprint)
        sources.append(_SOURCE_TYPES[kind](name, fingerprint))
    return text, sources


class _CodeMemo:
    """The walks through many functions, which are checked again rather than repeated.

    Identities are compared at each call. Values that can change in place are hashed again, once
    between two calls of ``begin``: each run begins anew.
    """

    def __init__(self) -> None:
        self._walks: dict[int, tuple[Any, _Walk]] = {}  # by the id of the function
        self._lock = threading.RLock()
        self._memo: _Memo = {}

    def begin(self) -> None:
        """Forget the content of values, but not the walks."""
        self._memo = {}

    def find_walk(self, function: Callable[..., Any]) -> _Walk:
        """Return the walk through a function, which the caller must not change."""
        with self._lock:  # a pipeline may be run by many threads
            if id(function) in self._walks:
                _, walk = self._walks[id(function)]
                walk.memo = self._memo
                if walk.is_current():
                    return walk
            walk, _ = _walk(self._memo, _Walk.hash_step, function)
            self._walks[id(function)] = (function, walk)
            return walk


########################################################################################
### Store
########################################################################################

# The folder of a store:
#
#     CACHEDIR.TAG  .gitignore         say what the folder is
#     entries/<key id>/<step>/<key>    the signed facts of one result, and its small values
#     values/<2 digits>/<hash>         one large value: its pickle, then aligned buffers
#     tmp/                             files that are being written
#     locks                            one byte for each key
#     runs.jsonl                       one line for each run
#
# A file appears under its name when it is complete, or never. A file that is absent or damaged is
# a miss; the process that finds damage deletes the file. Nothing is unpickled before its bytes have
# been compared with what this user's key has signed. The modification time of a file says when it
# was written, its access time when it was last used; both are set by hand.

_FORMAT = b"dagkit 3 "  # an entry begins with this, its signature and a line end
_HEAD_SIZE = len(_FORMAT) + 64 + 1
_INLINE_LIMIT = 4 << 10  # bytes; a smaller value lies in its entry, a smaller buffer in its pickle
_LARGEST_ENTRY = 64 << 20  # bytes; a larger file is not ours
_LARGE = 32 << 20  # bytes; such a file is mapped, not read, and hashed by several threads
_ALIGNMENT = 64  # bytes
_TOUCH_INTERVAL = 3600.0  # seconds by which the recorded time of use may lag behind
_LEFTOVER_AGE = 86400.0  # seconds after which nothing writes to a temporary file any more
_MEMO_SIZE = 4096  # decoded entries in memory
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# A store of dagkit: delete it at will.\n"
_FOLDERS = ("entries", "values", "tmp")
_OUR_NAMES = {*_FOLDERS, "locks", "runs.jsonl", "CACHEDIR.TAG", ".gitignore"}
_PLAIN_NAME = r"(?!(aux|con|nul|prn|com[0-9]|lpt[0-9])\Z)[a-z0-9_]{1,100}"  # not a Windows device
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none of these
_NO_BLOCK = getattr(os, "O_NONBLOCK", 0)  # a pipe instead of a file must not block us

_encode_json = json.JSONEncoder(separators=(",", ":")).encode


class _DamageError(Exception):
    """A stored value is damaged or gone and has to be computed again."""

    def __init__(self, message: str, key: str = "", step: str = "") -> None:
        super().__init__(message)
        self.key = key
        self.step = step


class _Handle:
    """A value that is not in memory; it can be loaded and has a fingerprint."""

    where = "elsewhere"  # where the value lies, for messages

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the value; raises `_Opaque` if it has none."""
        raise NotImplementedError

    @property
    def files(self) -> Sequence[_Source]:
        """The files that the value names."""
        return ()

    def load(self) -> Any:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<value {self.where}>"


def _load_value(value: Any) -> Any:
    """Load a value if it is not in memory."""
    return value.load() if isinstance(value, _Handle) else value


def _examine(value: Any) -> tuple[str, Sequence[_Source]]:
    """Return the fingerprint of a value or handle, and the files that it names."""
    if isinstance(value, _Handle):
        return value.fingerprint, value.files
    fingerprint, sources = _fingerprint_with_sources(value)
    return fingerprint, [source for source in sources if source.kind == "file"]


# Entries


class _StoredValue(NamedTuple):
    """Where a value lies, and how its bytes are checked."""

    content_hash: str  # the fingerprint; of an opaque value the sha256 of its bytes
    culprit: Sequence[str] | None = None  # of an opaque value: the names that lead to the culprit
    sizes: Sequence[int] = ()  # of the pickle and of each buffer; none if it lies elsewhere
    pickle_sha256: str = ""
    checksums: Sequence[int] = ()  # crc32 of each block of the buffers
    pickle: bytes | None = None  # if the value lies in the entry

    @property
    def fingerprint(self) -> str:
        """The fingerprint; "" if the value is opaque."""
        return self.content_hash if self.culprit is None else ""

    @property
    def has_file(self) -> bool:
        """Whether a file of ``values`` holds it, not the entry or the catalog."""
        return self.pickle is None and bool(self.sizes)

    @property
    def file_name(self) -> str:
        """A hash of content and representation: equal values may have unequal bytes."""
        return hashlib.sha256(_encode_json(self[:-1]).encode()).hexdigest()

    @property
    def file_size(self) -> int:
        return sum(map(_pad, self.sizes))


@dataclass(repr=False)
class _Entry:
    """The stored facts of one result: of a step, or of one element of a mapped step."""

    step: str
    key: str
    parts: _Parts  # all that went into the key
    values: dict[str, _StoredValue] = field(default_factory=dict)  # the step's, or its outputs'
    sources: list[_Source] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)  # values that are numbers or short texts
    texts: dict[str, str] = field(default_factory=dict)  # of inputs, to say "alpha 0.1 → 0.3"
    created: float = 0.0  # seconds since the epoch
    seconds: float = 0.0  # that the step took

    @property
    def fingerprint(self) -> str:
        """The fingerprint of all that the step returned; "" if one of its values is opaque."""
        if self.step in self.values:
            return self.values[self.step].fingerprint
        fingerprints = [value.fingerprint for value in self.values.values()]
        if "" in fingerprints:
            return ""
        return _join_fingerprints(fingerprints)


def _sign(body: bytes, signing_key: bytes) -> bytes:
    """Return the head of an entry, which signs the rest of it."""
    return _FORMAT + hmac.digest(signing_key, body, "sha256").hex().encode() + b"\n"


def _encode_entry(entry: _Entry, signing_key: bytes) -> bytes:
    """Return a head, one line of JSON, and the pickles that lie in the entry."""
    values = {}
    pickles = []
    for name, value in entry.values.items():
        values[name] = [*value[:-1], value.pickle is not None]
        pickles.append(value.pickle or b"")
    facts = dict(vars(entry))
    facts["parts"] = [(*part, digest) for part, digest in entry.parts.items()]
    facts["values"] = values
    facts["sources"] = [(source.kind, source.name, source.fingerprint) for source in entry.sources]
    body = b"".join([_encode_json(facts).encode(), b"\n", *pickles])
    return _sign(body, signing_key) + body


def _decode_entry(data: bytes, signing_key: bytes) -> _Entry:
    """Return the entry that these bytes hold, or raise `_DamageError`."""
    if not data.startswith(_FORMAT):
        raise _DamageError("it is no entry of this version of dagkit")
    body = data[_HEAD_SIZE:]
    if not hmac.compare_digest(data[:_HEAD_SIZE], _sign(body, signing_key)):
        raise _DamageError("it is damaged")
    # From here on we read what we have written ourselves.
    line, _, pickles = body.partition(b"\n")
    facts = json.loads(line)
    facts["parts"] = {(kind, name): digest for kind, name, digest in facts["parts"]}
    try:
        facts["sources"] = [_SOURCE_TYPES[kind](*source) for kind, *source in facts["sources"]]
    except KeyError as error:
        raise _DamageError(f"it depends on a source of an unknown kind, {error}") from None
    position = 0
    for name, (*value_facts, is_inline) in facts["values"].items():
        value = _StoredValue(*value_facts)
        if is_inline:
            value = value._replace(pickle=pickles[position : position + value.sizes[0]])
            position += value.sizes[0]
        facts["values"][name] = value
    return _Entry(**facts)


def _find_metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are numbers, bools or short texts, as types of Python."""
    metrics = {}
    for name, value in values.items():
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            value = value.item()
        is_number = type(value) in (bool, float)
        is_short_int = type(value) is int and value.bit_length() <= 1024  # json has a limit
        is_short_text = type(value) is str and len(value) <= 200
        if is_number or is_short_int or is_short_text:
            metrics[name] = value
    return metrics


# Values as bytes


def _pickle_value(value: Any) -> tuple[list[memoryview], list[str]]:
    """Return the pickle of a value and its large buffers, which are not copied.

    Also returns the names of the classes that decide themselves what the pickle holds of them.
    """
    stream = io.BytesIO()
    buffers: list[memoryview] = []

    def keep_in_stream(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _INLINE_LIMIT:
            return True
        buffers.append(view)
        return False

    pickler = _Pickler(stream, protocol=5, buffer_callback=keep_in_stream)
    pickler.own_names = {}
    pickler.dump(value)
    # Not getbuffer(): Python 3.12 crashes if it collects such a buffer with an error's frames.
    return [memoryview(stream.getvalue()), *buffers], list(pickler.own_names)


# Facts of an object that neither its attributes nor its pickle contain.
_UNPICKLED_NAMES = {
    "builtins.BaseException": ("__cause__", "__context__", "__suppress_context__"),
    "torch.Tensor": ("grad",),
}


class _Pickler(pickle.Pickler):
    """Also saves the attributes that a class leaves out of its pickles."""

    own_names: dict[str, None]  # of the classes that `_pickles_itself` is true for

    def reducer_override(self, value: Any) -> Any:
        kind: Any = type(value)
        if isinstance(value, type):
            return NotImplemented
        if _pickles_itself(kind):
            self.own_names[_type_name(kind)] = None
        names = _find_unpickled_names(kind)
        if names is None:
            return NotImplemented
        layout = _find_layout(kind)
        attributes = _get_attributes(value, layout)
        for name in names:
            if getattr(value, name) is not None:
                attributes[name] = getattr(value, name)
        pieces = _get_pickle_pieces(value, 5)
        if not attributes or isinstance(pieces, str) or len(pieces) == 6:
            return NotImplemented
        function, arguments, state, items, pairs = (*pieces, None, None, None)[:5]
        _, saved = _split_state(state, attributes, layout)
        unsaved = {}
        for name, attribute in attributes.items():
            is_ignored = name in layout.ignored_names or "*" in layout.ignored_names
            if not (is_ignored or isinstance(attribute, _LOCKS) or saved.get(name) is attribute):
                unsaved[name] = attribute
        if not unsaved:
            return NotImplemented
        return function, arguments, (state, unsaved), items, pairs, _set_state


@functools.cache
def _pickles_itself(kind: type) -> bool:
    """Return whether a class of the project, or an exception, says what its pickles hold."""
    methods = {"__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"}
    for base in kind.__mro__:
        if not methods.isdisjoint(vars(base)):
            return issubclass(base, BaseException) or _find_packages(*_find_home(base)) is None
    return False


@functools.cache
def _find_unpickled_names(kind: type) -> tuple[str, ...] | None:
    """Return what `_UNPICKLED_NAMES` says of a type; None if its pickles hold all attributes.

    We trust the classes of libraries to leave out only what they can compute again.
    """
    for base in kind.__mro__:
        if _get_short_name(base) in _UNPICKLED_NAMES:
            return _UNPICKLED_NAMES[_get_short_name(base)]
    methods = ("__reduce__", "__reduce_ex__", "__getstate__")
    is_default = all(getattr(kind, name) is getattr(object, name) for name in methods)
    if is_default and kind not in copyreg.dispatch_table:
        return None
    has_attributes = kind.__dictoffset__ or _find_layout(kind).slots
    if has_attributes and _find_packages(*_find_home(kind)) is None:
        return ()
    return None


def _set_state(value: Any, states: tuple[Any, dict[str, Any]]) -> None:
    """Set the state of an unpickled object as pickle does, then the attributes it leaves out."""
    state, attributes = states
    if hasattr(value, "__setstate__"):
        if state is not None:
            value.__setstate__(state)
    else:
        for mapping in state if type(state) is tuple else (state,):
            for name, attribute in (mapping or {}).items():
                object.__setattr__(value, name, attribute)
    for name, attribute in attributes.items():
        object.__setattr__(value, name, attribute)


def _hash_pieces(
    value: Any, pieces: Sequence[memoryview], own_names: Sequence[str]
) -> tuple[_StoredValue, list[_Source]]:
    """Return what is known of a value but for the checksums, and the sources it depends on.

    Raises ``ValueError`` if one of the classes that pickle themselves loses content.
    """
    sizes = [piece.nbytes for piece in pieces]
    content = hashlib.sha256(pieces[0])
    pickle_sha256 = content.hexdigest()
    try:
        fingerprint, sources = _fingerprint_with_sources(value)
    except _Opaque as opaque:
        for piece in pieces[1:]:
            content.update(piece)
        return _StoredValue(content.hexdigest(), opaque.args, sizes, pickle_sha256), []
    if own_names:
        with contextlib.suppress(Exception):  # unpickling may raise anything
            if _fingerprint(pickle.loads(pieces[0], buffers=pieces[1:])) == fingerprint:
                own_names = []
    if own_names:
        names = _join_names(own_names, 3)
        raise ValueError(f"it does not come back from its pickle as it was ({names})")
    return _StoredValue(fingerprint, None, sizes, pickle_sha256), sources


def _read_value(path: str, value: _StoredValue) -> Any:
    """Check a file of ``values`` and rebuild its value; arrays are writable and aligned."""
    with _open_file(path) as file:
        if os.fstat(file.fileno()).st_size != value.file_size:
            raise _DamageError("it has the wrong size")
        if value.file_size >= _LARGE:  # a page is read at its first use, copied at its first change
            from mmap import ACCESS_COPY, mmap

            data = memoryview(mmap(file.fileno(), 0, access=ACCESS_COPY))
        else:
            data = memoryview(bytearray(value.file_size))
            file.readinto(data)
    pieces = []
    position = 0
    for size in value.sizes:
        pieces.append(data[position : position + size])
        position += _pad(size)
    stream = bytes(pieces[0])  # a copy: the bytes that are checked are those that are unpickled
    if hashlib.sha256(stream).hexdigest() != value.pickle_sha256:
        raise _DamageError("its pickle is damaged")
    if _compute_checksums(pieces[1:]) != value.checksums:
        raise _DamageError("its data is damaged")
    return pickle.loads(stream, buffers=pieces[1:])


def _compute_checksums(buffers: Sequence[memoryview]) -> list[int]:
    """Return the crc32 of each block of the buffers, with the help of all processors."""
    blocks = [block for buffer in buffers for block in _split_into_blocks(buffer)]
    if sum(block.nbytes for block in blocks) >= _LARGE:
        from concurrent.futures import ThreadPoolExecutor

        with (
            contextlib.suppress(RuntimeError),  # Pyodide has no threads
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            return list(pool.map(zlib.crc32, blocks))
    return [zlib.crc32(block) for block in blocks]


def _start_call(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start a call in a thread; return a function that waits for the result."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(function).result
    except RuntimeError:  # Pyodide has no threads: make the call when its result is needed
        return function
    finally:
        pool.shutdown(wait=False)


def _split_into_blocks(piece: memoryview) -> Iterator[memoryview]:
    for start in range(0, piece.nbytes, _LARGE):
        yield piece[start : start + _LARGE]


def _pad(size: int) -> int:
    return size + -size % _ALIGNMENT


# The signing key


def _locate_signing_key() -> str:
    path = os.path.expanduser("~/.local/share/dagkit/key")
    if not os.path.isabs(path):
        raise OSError("there is no home folder for the signing key: set HOME or DAGKIT_KEY")
    return path


def _read_signing_key() -> bytes:
    """Return the 32 bytes that sign the entries of this user; make them if there are none.

    Raises OSError if there is no home folder, if others can read the key, or if it is damaged.
    """
    if shared_key := os.environ.get("DAGKIT_KEY"):
        return hashlib.sha256(os.fsencode(shared_key)).digest()
    path = _locate_signing_key()
    if not os.path.exists(path):
        _make_signing_key(path)
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        key = file.read(33)
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
        raise OSError(f"the signing key {path} is not yours alone: chmod 600 it, or delete it")
    if len(key) != 32:
        raise OSError(
            f"the signing key {path} is damaged, so that no stored result can be checked; "
            "delete it to get a new one, and results are computed again"
        )
    return key


def _make_signing_key(path: str) -> None:
    temporary_path = f"{path}.{os.urandom(8).hex()}"
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with _open_file(temporary_path, "x") as file:
            file.write(os.urandom(32))
        try:
            os.link(temporary_path, path)  # unlike a rename, the first of two writers wins
        except FileExistsError:
            pass
        except (OSError, AttributeError):  # there are no hard links
            os.replace(temporary_path, path)
    except OSError as error:
        raise OSError(f"the signing key cannot be made ({error}); set DAGKIT_KEY") from error
    finally:
        _remove_file(temporary_path)


# Locks


class _KeyLocks:
    """Locks so that one process computes a key while the others wait.

    Each key stands for one byte of one file. The kernel frees the locks of a process that dies. A
    forked child does not inherit them. Where there are no such locks (NFS, Windows, Pyodide), two
    processes may compute the same value. The folder of the file has to be there.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = -1
        self._guard = threading.Lock()
        self._keys: set[str] = set()  # the locks of the kernel do not tell threads apart

    def acquire(self, key: str) -> bool:
        """Return whether the caller may compute the key; if not, another thread or process does."""
        with self._guard:
            if key in self._keys or not self._lock_byte(key):
                return False
            self._keys.add(key)
            return True

    def _lock_byte(self, key: str) -> bool:
        """Return False if another process has the lock; True if we have it, or there are none."""
        if fcntl is None:
            return True
        try:
            if self._file < 0:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o600)
        except OSError:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key[:15], 16))
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)  # POSIX allows both
        return True

    def release(self, key: str) -> None:
        with self._guard:
            self._keys.discard(key)
            if self._file >= 0 and not self._keys:
                os.close(self._file)  # this drops all locks; an open file keeps its disk busy
                self._file = -1
            elif self._file >= 0:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._file, fcntl.LOCK_UN, 1, int(key[:15], 16))


# POSIX drops all locks of a process on a file when any descriptor of the file is closed, so all
# stores of a folder share one.
_key_locks: dict[str, _KeyLocks] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_key_locks.clear)


# The folder


class _StoreFolder:
    """The folder of a store: checked before each use, made when something is to be written."""

    def __init__(self, path: str) -> None:
        self.path = path  # absolute; no symbolic link that appears in it later is followed
        self.signing_key = b""
        self.entry_folder = ""  # folder of the entries that our key has signed
        self._identity: tuple[int, ...] | None = None  # of the folder when it was checked
        self._is_complete = False
        self.warned_kinds: dict[str, object] = {}
        self._lock = threading.Lock()
        self.is_default = False  # whether the user did not choose it

    def open(self, create: bool = False) -> bool:
        """Return whether the folder can be used, or made; if it is unfit, a warning says why.

        All methods of a store that read or write call this first: since the last call, the folder
        may have been replaced, or opened to others.
        """
        try:
            identity = self._identify()
            if identity is None and not create:
                return False
            if identity is None or identity != self._identity:
                with self._lock:
                    self._begin(identity)
            if create and not self._is_complete:
                self.make_folders()
        except OSError as error:
            self.warn("folder", f"the store {self.path} is not used: {error}")
            return False
        return True

    def _begin(self, identity: tuple[int, ...] | None) -> None:
        """Read the key, make the folder if it is not there, and check it."""
        if identity is not None and identity == self._identity:
            return  # another thread has done it
        self._identity = None
        self.signing_key = _read_signing_key()
        key_id = hashlib.sha256(_FORMAT + self.signing_key).hexdigest()[:8]
        self.entry_folder = f"{self.path}/entries/{key_id}"
        if identity is None:
            os.makedirs(self.path, 0o700, exist_ok=True)
            identity = self._identify()
        self._check()
        self._warn_of_other_keys(key_id)
        self._identity = identity
        self._is_complete = False

    def _identify(self) -> tuple[int, ...] | None:
        """Return the facts that must not change from one use to the next; None without a folder."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return None
        if not stat.S_ISDIR(status.st_mode):
            raise OSError("it is not a folder, or has become a symbolic link")
        return status.st_dev, status.st_ino, status.st_mode, status.st_uid

    def _check(self) -> None:
        """Raise OSError if the folder is not ours alone."""
        if os.path.realpath(self.path) != self.path:
            raise OSError("a symbolic link has appeared in its path")
        status = os.lstat(self.path)
        names = set(os.listdir(self.path))
        # Users who share a key may share the folder.
        if hasattr(os, "geteuid") and not os.environ.get("DAGKIT_KEY"):
            if status.st_uid != os.geteuid():
                raise OSError(f"it belongs to user {status.st_uid}; choose another: DAGKIT_STORE")
            if status.st_mode & 0o022 and names:
                raise OSError(f"others can write to it; if you trust it: chmod 700 {self.path}")
        # The tag comes last: another process may be about to write it.
        if not names <= _OUR_NAMES and not self.has_tag():
            raise OSError("it holds other files; choose a new or an empty folder")
        for folder in self._list_folders():
            self.refuse_links(folder)

    def _warn_of_other_keys(self, key_id: str) -> None:
        """Warn if there are results, but none that our key has signed."""
        with contextlib.suppress(FileNotFoundError):
            names = os.listdir(f"{self.path}/entries")
            key_ids = [name for name in names if re.fullmatch("[0-9a-f]{8}", name)]
            if not key_ids or key_id in key_ids:
                return
            cause = "DAGKIT_KEY is another key"
            if not os.environ.get("DAGKIT_KEY"):
                key_path = _locate_signing_key()
                times = [os.stat(f"{self.path}/entries/{name}").st_mtime for name in key_ids]
                if os.stat(key_path).st_mtime > max(times):
                    cause = f"the key {key_path} is newer than they are"
                else:
                    cause = f"the key {key_path} is another key"
            text = f"the store {self.path} holds only results that your key has not signed: {cause}"
            self.warn("key", f"{text}. They are ignored, and their steps run again")

    def make_folders(self) -> None:
        for folder in [self.path, *self._list_folders()]:
            self.make_folder(folder)
            self.refuse_links(folder)
        if not self.has_tag():
            if not os.environ.get("DAGKIT_KEY"):
                os.chmod(self.path, 0o700)  # the user may have made it
            if self.is_default and sys.stderr is not None:
                # In another working folder, the results of the last one are not found.
                print(f"dagkit: results are stored in the new folder {self.path}", file=sys.stderr)
            for name, text in ((".gitignore", b"*\n"), ("CACHEDIR.TAG", _TAG)):
                with _NewFile(self, f"{self.path}/{name}") as file:
                    file.write(text)
        self._is_complete = True

    def make_folder(self, path: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, self.get_mode(0o700))

    def refuse_links(self, folder: str) -> None:
        """Raise OSError if a folder of the store, or one above it, has become a symbolic link."""
        while len(folder) > len(self.path):
            if os.path.islink(folder):
                raise OSError(f"{folder} is a symbolic link")
            folder = os.path.dirname(folder)

    def remove_file(self, path: str) -> None:
        with contextlib.suppress(OSError):
            self.refuse_links(os.path.dirname(path))
            os.unlink(path)

    def _list_folders(self) -> list[str]:
        return [f"{self.path}/{name}" for name in _FOLDERS] + [self.entry_folder]

    def get_mode(self, mode: int) -> int:
        """Return the mode of a new file or folder: ours alone, or with a shared key the store's."""
        identity = self._identity  # another thread may change it
        if identity is not None and os.environ.get("DAGKIT_KEY"):
            mode |= identity[2] & (mode >> 3 | mode >> 6)
        return mode

    def has_tag(self) -> bool:
        with contextlib.suppress(OSError, _DamageError):
            return _read_file(f"{self.path}/CACHEDIR.TAG") == _TAG
        return False

    def list_files(self, *folders: str) -> dict[str, os.stat_result]:
        """Map the paths of the files in some of our folders to their status; skip foreign files."""
        files: dict[str, os.stat_result] = {}
        if not (self.open() and self.has_tag()):
            return files
        for folder in folders:
            top = os.path.join(self.path, folder)
            try:
                self.refuse_links(top)
            except OSError:
                continue
            for parent, _, names in os.walk(top):
                for name in names:
                    path = f"{parent}/{name}"
                    with contextlib.suppress(OSError):  # another process has deleted it
                        status = os.lstat(path)
                        if stat.S_ISREG(status.st_mode) and re.fullmatch("[0-9a-f]{64}", name):
                            files[path] = status
        return files

    def warn(self, kind: str, text: str) -> None:
        """Warn, once a run for each kind of trouble."""
        token = object()
        if self.warned_kinds.setdefault(kind, token) is token:  # atomic: threads may fail at once
            _warn(text)


class _NewFile:
    """A file that appears under ``path`` when its block ends well, or never.

    A process that has an old file of this name open, or mapped, keeps the old one.
    """

    def __init__(self, folder: _StoreFolder, path: str = "") -> None:
        self.path = path  # may be set in the block; without a path the file is dropped
        self._folder = folder
        self._temporary_path = f"{folder.path}/tmp/{os.urandom(32).hex()}"
        folder.refuse_links(f"{folder.path}/tmp")
        if not os.path.isdir(f"{folder.path}/tmp"):  # somebody has deleted it
            folder.make_folders()
        self._file = _open_file(self._temporary_path, "x", folder.get_mode(0o600))

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest.nbytes:  # the system may write less than it is given
            rest = rest[self._file.write(rest) :]

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
            if error_type is None and self.path:
                now = time.time_ns()  # the clock of the file system may be too coarse
                os.utime(self._temporary_path, ns=(now, now))
                self._move()
        finally:
            _remove_file(self._temporary_path)

    def _move(self) -> None:
        folder = os.path.dirname(self.path)
        self._folder.refuse_links(folder)
        try:
            _replace_file(self._temporary_path, self.path)
        except FileNotFoundError:  # the first file of its folder
            try:
                self._folder.make_folder(folder)
            except FileNotFoundError:  # somebody has deleted the folder above it
                self._folder.make_folders()
                self._folder.make_folder(folder)
            _replace_file(self._temporary_path, self.path)


def _open_file(path: str, mode: str = "r", permissions: int = 0o600) -> io.FileIO:
    """Open a file that is not a symbolic link."""

    def open_with_flags(path: str, flags: int) -> int:
        return os.open(path, flags | _NO_FOLLOW | _NO_BLOCK, permissions)

    return io.FileIO(path, mode, opener=open_with_flags)


def _read_file(path: str) -> bytes:
    """Return the bytes of an entry."""
    with _open_file(path) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST_ENTRY:
            raise _DamageError("it is too large")
        return file.read() or b""  # of a pipe it is None


def _replace_file(new_path: str, path: str) -> None:
    for _ in range(10):
        try:
            return os.replace(new_path, path)
        except PermissionError:  # on Windows, while another process reads the old file
            time.sleep(0.01)
    os.replace(new_path, path)


def _remove_file(path: str) -> bool:
    """Delete a file; return whether it is this call that has deleted it."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _find_last_use(status: os.stat_result) -> float:
    return max(status.st_atime, status.st_mtime)


def _touch(path: str, status: os.stat_result) -> None:
    """Set the time of last use of a file."""
    with contextlib.suppress(OSError):  # the disk is read-only
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))


# The store


class Store:
    """A folder of results, shared by many processes.

    Whatever is wrong with the folder leads to a warning and a value that is computed again, never
    to an exception or a wrong value. Nothing is unpickled that the key of this user has not signed.

    Parameters
    ----------
    path : str or path, optional
        The folder; default ``$DAGKIT_STORE``, else ``.dagkit`` in the working folder. It is made
        when the first result is stored.

    Attributes
    ----------
    path : str
        The absolute path of the folder.

    Raises
    ------
    StepError
        If ``path`` is not the path of a folder.

    Examples
    --------
    >>> Store("/nowhere")
    Store('/nowhere')
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        is_default = path is None and not os.environ.get("DAGKIT_STORE")
        if path is None:
            path = os.environ.get("DAGKIT_STORE") or ".dagkit"
        text = os.fspath(path) if isinstance(path, os.PathLike) else path
        if not _is_path_text(text) or not text:
            raise StepError(f"a store needs the path of a folder, not {_summarize(path)}")
        path = os.path.join(_get_working_folder(), os.path.expanduser(text))
        self.__setstate__(os.path.realpath(path))
        self._folder.is_default = is_default

    def __repr__(self) -> str:
        return f"Store({self.path!r})"

    def __getstate__(self) -> str:
        return self.path  # a copy in another process reads the signing key itself

    def __setstate__(self, path: str) -> None:
        self.path = path
        self._folder = _StoreFolder(path)
        self._entries: dict[str, tuple[tuple[int, ...], _Entry]] = {}  # path -> file stamp, entry
        self._newest: dict[str, tuple[int, _Entry | None]] = {}  # folder -> its stamp, entry
        self._damaged_paths: set[str] = set()  # of entries that were deleted, for plans

    def size(self) -> int:
        """Return the size of all results on disk in bytes.

        Examples
        --------
        >>> Store("/nowhere").size()
        0
        """
        files = self._folder.list_files("entries", "values")
        return sum(status.st_size for status in files.values())

    def clear(self, step: str | None = None) -> int:
        """Delete the results of a step, or of all steps.

        A value that a result of another step shares is deleted too, and is then computed again.

        Parameters
        ----------
        step : str, optional
            Name of the step; default all steps.

        Returns
        -------
        int
            How many results were deleted; each element of a mapped step is one.

        Raises
        ------
        TypeError
            If ``step`` is not a name.

        Examples
        --------
        >>> Store("/nowhere").clear()
        0
        """
        if step is not None and not isinstance(step, str):
            raise TypeError(f"clear(step=) must be the name of a step, not {_summarize(step)}")
        count = 0
        # Folders stay: another process may be about to rename a file into one of them.
        if step is None:
            for path in self._folder.list_files("entries"):
                count += _remove_file(path)
            for path in self._folder.list_files("values"):
                _remove_file(path)
        elif self._folder.open():
            for path in self._folder.list_files(self._locate_step(step)):
                with contextlib.suppress(OSError, _DamageError):
                    self._delete_values(self._read_entry(path))
                count += _remove_file(path)
        self._entries.clear()
        self._newest.clear()
        return count

    def prune(
        self, *, max_bytes: float | None = None, older_than: timedelta | float | None = None
    ) -> int:
        """Delete the least recently used results, and what killed processes have left behind.

        Parameters
        ----------
        max_bytes : int, optional
            Delete until the results take at most so many bytes; default no limit.
        older_than : timedelta or float, optional
            Delete what was not used for so long (a number: seconds). Times of use are exact to the
            hour. Default no limit.

        Returns
        -------
        int
            The bytes that were set free.

        Raises
        ------
        TypeError
            If a limit is not a number or timedelta.
        ValueError
            If a limit is negative.

        Examples
        --------
        >>> Store("/nowhere").prune(max_bytes=10**9)
        0
        """
        if isinstance(older_than, timedelta):
            older_than = older_than.total_seconds()
        _check_limit("max_bytes", "a number of bytes such as 10**9", max_bytes)
        _check_limit("older_than", "a timedelta or a number of seconds", older_than)
        now = time.time()
        files = self._folder.list_files("entries", "values")
        excess = 0.0
        if max_bytes is not None:
            excess = sum(status.st_size for status in files.values()) - max_bytes
        freed = 0
        for path, status in sorted(files.items(), key=lambda item: _find_last_use(item[1])):
            is_old = older_than is not None and now - _find_last_use(status) > older_than
            if (is_old or freed < excess) and _remove_file(path):
                freed += status.st_size
        for path, status in self._folder.list_files("tmp").items():
            if _find_last_use(status) < now - _LEFTOVER_AGE:
                _remove_file(path)
        return freed

    # For runs

    def _begin_run(self) -> None:
        """Allow one warning of each kind again."""
        self._folder.warned_kinds.clear()

    def _find_entry(self, step_name: str, key: str) -> _Entry | None:
        """Return the entry of a key if it is there with its values; None is a miss."""
        if not self._folder.open():
            return None
        path = self._locate_entry(step_name, key)
        try:
            status = os.lstat(path)
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            known_stamp, entry = self._entries.get(path, ((), None))
            if entry is None or stamp != known_stamp:
                entry = self._read_entry(path)
                if len(self._entries) >= _MEMO_SIZE:
                    self._entries.clear()
                self._entries[path] = (stamp, entry)
            is_due = status.st_atime < time.time() - _TOUCH_INTERVAL
            for value in entry.values.values():
                if value.has_file:
                    self._check_file(value, touch=is_due)
            if is_due:
                _touch(path, status)
            return entry
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            text = f"the entry {path} cannot be read, its step runs again: {error}"
            self._folder.warn("read", text)
        except _DamageError as error:
            self._discard(path, error)
        return None

    def _has_entry_file(self, step_name: str, key: str) -> bool:
        """Return whether there is an entry, or was until it proved damaged."""
        if not self._folder.open():
            return False
        path = self._locate_entry(step_name, key)
        return path in self._damaged_paths or os.path.lexists(path)

    def _find_newest(self, step_name: str) -> _Entry | None:
        """Return the entry of a step that was written last, whatever its key.

        This lists the folder of the step (40 ms for 10,000 entries), but only if another process
        has changed it since the last call.
        """
        if not self._folder.open():
            return None
        folder = self._locate_step(step_name)
        try:
            stamp = os.stat(folder).st_mtime_ns
        except OSError:
            return None
        memo = self._newest.get(folder)
        if memo is not None and memo[0] == stamp:
            return memo[1]
        newest = None
        files = self._folder.list_files(folder)
        for path in sorted(files, key=lambda path: files[path].st_mtime_ns, reverse=True):
            try:
                newest = self._read_entry(path)
                break
            except OSError:  # another process has deleted it
                continue
            except _DamageError as error:
                self._discard(path, error)
        self._newest[folder] = (stamp, newest)
        return newest

    def _save(self, entry: _Entry, values: Mapping[str, Any]) -> bool:
        """Store values, then their entry; return whether that was possible. A warning says why not.

        The names are those of the step or of its outputs. A value that is a `_Handle` lies
        elsewhere: only its fingerprint is stored. The entry gets ``values`` and ``created``, and
        the sources and metrics of the values beside those that it has.
        """
        if not self._folder.open(create=True):
            return False
        path = self._locate_entry(entry.step, entry.key)
        sources = dict.fromkeys(entry.sources)  # in order, without repeats
        try:
            for name, value in values.items():
                entry.values[name], value_sources = self._save_value(value)
                sources.update(dict.fromkeys(value_sources))
            entry.sources = list(sources)
            entry.metrics = _find_metrics(values) | entry.metrics
            entry.created = time.time()
            with _NewFile(self._folder, path) as file:
                file.write(_encode_entry(entry, self._folder.signing_key))
            folder = os.path.dirname(path)
            self._newest[folder] = (os.stat(folder).st_mtime_ns, entry)
            self._damaged_paths.discard(path)
        except Exception as error:  # of the disk, or of a class whose code pickling runs
            kind = "disk" if isinstance(error, OSError) else f"value of {entry.step}"
            text = f"the result of step '{entry.step}' cannot be stored in {self.path}: "
            self._folder.warn(kind, text + _describe_error(error))
            return False
        return True

    def _save_value(self, value: Any) -> tuple[_StoredValue, list[_Source]]:
        """Store a value; return where it lies, and the sources that it depends on."""
        if isinstance(value, _Handle):
            try:
                return _StoredValue(value.fingerprint), []
            except _Opaque as opaque:
                return _StoredValue("", opaque.args), []
        pieces, own_names = _pickle_value(value)
        size = sum(piece.nbytes for piece in pieces)
        if size <= _INLINE_LIMIT:
            stored, sources = _hash_pieces(value, pieces, own_names)
            return stored._replace(pickle=bytes(pieces[0])), sources
        get_hashes: Callable[[], Any] = functools.partial(_hash_pieces, value, pieces, own_names)
        if size >= _LARGE:  # hashing takes as long as writing, so the two go on side by side
            get_hashes = _start_call(get_hashes)
        with _NewFile(self._folder) as file:
            checksums = []  # of the buffers; the pickle has its sha256
            for number, piece in enumerate(pieces):
                for block in _split_into_blocks(piece):
                    file.write(block)
                    if number > 0:
                        checksums.append(zlib.crc32(block))
                file.write(bytes(_pad(piece.nbytes) - piece.nbytes))
            stored, sources = get_hashes()
            stored = stored._replace(checksums=checksums)
            try:
                self._check_file(stored, touch=True)
            except (FileNotFoundError, _DamageError):
                file.path = self._locate_value(stored)  # otherwise an equal value is there already
        return stored, sources

    def _load(self, entry: _Entry, name: str) -> Any:
        """Return a new copy of a value, or raise `_DamageError` if it is damaged or gone."""
        value = entry.values[name]
        try:
            if value.pickle is not None:
                return pickle.loads(value.pickle)  # the signature of the entry covers it
            return _read_value(self._locate_value(value), value)
        except Exception as error:
            # Unpickling may raise anything, e.g. when a class was removed. We can always recompute
            # the value.
            if not isinstance(error, OSError | MemoryError):
                if self._folder.open():
                    self._delete_values(entry)
                self._discard(self._locate_entry(entry.step, entry.key), error)
            elif not isinstance(error, FileNotFoundError):  # nothing is damaged
                text = f"a value of step '{entry.step}' cannot be read, it is computed again: "
                self._folder.warn("read", text + _describe_error(error))
            raise _DamageError(str(error), entry.key, entry.step) from error

    def _make_handles(self, entry: _Entry) -> dict[str, _Handle]:
        """Return handles of the values of an entry; of a step with outputs, of the whole too."""
        handles: dict[str, _Handle] = {}
        for name in entry.values:
            handles[name] = _StoredHandle(self, entry, name)
        if entry.step not in handles:
            handles[entry.step] = _TupleHandle(list(handles.values()))
        return handles

    def _check_file(self, value: _StoredValue, touch: bool) -> None:
        """Raise FileNotFoundError or `_DamageError` if the file of a value is absent or cut."""
        path = self._locate_value(value)
        status = os.lstat(path)
        if status.st_size != value.file_size:
            self._folder.remove_file(path)
            raise _DamageError("one of its values has the wrong size")
        if touch:
            _touch(path, status)

    def _delete_values(self, entry: _Entry) -> None:
        for value in entry.values.values():
            if value.has_file:
                self._folder.remove_file(self._locate_value(value))

    def _discard(self, path: str, error: Exception) -> None:
        """Delete an entry that is damaged, with a warning."""
        self._damaged_paths.add(path)
        if self._folder.open():
            self._folder.remove_file(path)
        reason = str(error)
        if not isinstance(error, _DamageError):
            reason = _describe_error(error)
        self._folder.warn("damage", f"the entry {path} is not used, its step runs again: {reason}")

    def _read_entry(self, path: str) -> _Entry:
        entry = _decode_entry(_read_file(path), self._folder.signing_key)
        if self._locate_entry(entry.step, entry.key) != path:
            raise _DamageError("it is the entry of another key")
        return entry

    def _locate_step(self, step_name: str) -> str:
        """Return the folder of a step.

        A hash tells names apart that differ in upper and lower case only, that are very long, or
        that Windows reserves.
        """
        if re.fullmatch(_PLAIN_NAME, step_name):
            return f"{self._folder.entry_folder}/{step_name}"
        readable = re.sub("[^a-z0-9_]", "_", step_name.lower())[:40]
        digits = hashlib.sha256(step_name.encode(errors="surrogatepass")).hexdigest()[:8]
        return f"{self._folder.entry_folder}/{readable}-{digits}"

    def _locate_entry(self, step_name: str, key: str) -> str:
        return f"{self._locate_step(step_name)}/{key}"

    def _locate_value(self, value: _StoredValue) -> str:
        name = value.file_name
        return f"{self.path}/values/{name[:2]}/{name}"

    @property
    def _locks(self) -> _KeyLocks:
        if self.path not in _key_locks:
            _key_locks.setdefault(self.path, _KeyLocks(f"{self.path}/locks"))
        return _key_locks[self.path]

    def _append_record(self, record: Mapping[str, Any]) -> None:
        """Add a line to the records of runs, with one write, so that processes do not mix lines.

        The line end comes first: a line that a full disk has cut short does not spoil the next.
        """
        if not self._folder.open(create=True):
            return
        line = b"\n" + _encode_json(record).encode()
        try:
            with _open_file(f"{self.path}/runs.jsonl", "a", self._folder.get_mode(0o600)) as file:
                if file.write(line) < len(line):
                    raise OSError("the disk is full")
        except OSError as error:
            self._folder.warn("disk", f"runs cannot be recorded in {self.path}: {error}")

    def _read_records(self) -> Iterator[bytes]:
        """Yield the lines of the records of runs, oldest first; one of them may be cut short."""
        if self._folder.open():
            with (
                contextlib.suppress(OSError),
                io.BufferedReader(_open_file(f"{self.path}/runs.jsonl")) as file,
            ):
                yield from filter(None, map(bytes.strip, file))


def _check_limit(name: str, expected: str, limit: Any) -> None:
    from numbers import Real

    if limit is None:
        return
    is_number = isinstance(limit, Real) and not isinstance(limit, bool)
    if not is_number:
        raise TypeError(f"prune({name}=) must be {expected}, not {_summarize(limit)}")
    if not limit >= 0:
        raise ValueError(f"prune({name}=) must not be negative, not {limit!r}")


class _StoredHandle(_Handle):
    """A value of an entry; each load is a new copy."""

    where = "in the store"

    def __init__(self, store: Store, entry: _Entry, name: str) -> None:
        self.store = store
        self.entry = entry
        self.name = name

    @property
    def fingerprint(self) -> str:
        value = self.entry.values[self.name]
        if value.culprit is not None:
            raise _Opaque(f"value of step {self.entry.step}", *value.culprit)
        return value.fingerprint

    @property
    def files(self) -> Sequence[_Source]:
        return [source for source in self.entry.sources if source.kind == "file"]

    def load(self) -> Any:
        return self.store._load(self.entry, self.name)

    def __repr__(self) -> str:
        if self.entry.values[self.name].pickle is not None:  # it is small: show it in messages
            with contextlib.suppress(_DamageError):
                return _summarize(self.load())
        return super().__repr__()


class _TupleHandle(_Handle):
    """All outputs of a step as one value, if some of them are not in memory."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    @property
    def fingerprint(self) -> str:
        return _join_fingerprints([_examine(item)[0] for item in self.items])

    @property
    def files(self) -> Sequence[_Source]:
        files = [file for item in self.items for file in _examine(item)[1]]
        return list(dict.fromkeys(files))

    def load(self) -> tuple[Any, ...]:
        return tuple(map(_load_value, self.items))

    def __repr__(self) -> str:
        return _summarize(tuple(self.items))


########################################################################################
### Reads
########################################################################################

# A step may read files, folders and environment variables that are not among its arguments. They
# become sources of its entry, so that the entry is reused only while they stay the same.
#
# While a cached step runs, an audit hook notes the files that it opens and the folders that it
# lists. This happens at each `open`, so the hook does little: paths are resolved and filtered when
# the call is over. Readers written in C++ or Rust open files without an audit event. For them we
# add the existing files that the texts of the call name: its arguments, and the constants of its
# code.

_LIST_EVENTS = frozenset({"os.listdir", "os.scandir"})
_MAKE_EVENTS = frozenset({"os.rename", "os.link", "os.symlink"})
_OTHER_EVENTS = frozenset({"open", "os.mkdir", "sqlite3.connect"})
_AUDIT_EVENTS = _LIST_EVENTS | _MAKE_EVENTS | _OTHER_EVENTS
# Modules that import code, or show lines of it. Code counts by what it does, not as a file.
_IMPORT_MODULES = _split(
    """importlib._bootstrap_external _frozen_importlib_external importlib.metadata linecache
    pkg_resources"""
)
_IGNORED_PATHS = r"^/(proc|sys|dev)/|[/\\](site-packages|dist-packages|__pycache__)[/\\]"
_JOIN_LIMIT = 1_000  # paths that consist of a folder and a name

# Inode, size and time of a regular file; () for another kind of file; None if there is no file.
_FileStamp = tuple[int, ...] | None


def _get_file_stamp(path: str) -> _FileStamp:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


class _ReadSource(_FileSource):
    """A file that a step has read. The kind "file" is for files that a value names."""

    kind = "read"


class _FolderSource(_FileSource):
    """The names of what lies in a folder."""

    kind = "folder"

    def compute_fingerprint(self) -> str:
        names = None
        with contextlib.suppress(OSError):  # there is no such folder
            # It does not matter whether Python has cached the code of a module there.
            names = sorted(set(os.listdir(self.name)) - {"__pycache__"})
        return _fingerprint(names)

    def __str__(self) -> str:
        return f"folder {_shorten_path(self.name)}"


class _VariableSource(_Source):
    """An environment variable. We store a keyed hash: its value may be a credential."""

    kind = "variable"

    def compute_fingerprint(self) -> str:
        return _hash_variable(os.environ.get(self.name), _make_variable_key())


def _make_variable_key() -> bytes:
    """Derive a key that may be sent to workers, because nothing is signed with it.

    Without a signing key it is empty, and nothing is stored.
    """
    with contextlib.suppress(OSError):
        return hmac.digest(_read_signing_key(), b"variables", "sha256")
    return b""


def _hash_variable(value: str | None, key: bytes) -> str:
    return hmac.digest(key, ascii(value).encode(), "sha256").hex()


class _Reads:
    """The reads of one call of a step, which runs in the block of this context manager.

    Other threads and asynchronous tasks do not count. Relative paths stay relative to the working
    folder.
    """

    def __init__(self, texts: Iterable[str], variable_key: bytes) -> None:
        self._start = time.time_ns()
        self._folder = _get_working_folder()
        self._variable_key = variable_key
        self._text_files = self._find_text_files(texts)
        self._files: dict[str, _FileStamp] = {}  # as they were when the step first opened them
        self._folders: dict[str, None] = {}  # in order
        self._writable_files: set[str] = set()  # the step may have changed them
        self._own_paths: set[str] = set()  # the step has made these files and folders
        self._variables: dict[str, str | None] = {}  # the values at the first lookup
        self._lookups: Counter[str] = Counter()
        self._own_variables: set[str] = set()  # the step has set them
        self._inherited: list[_Source] = []

    @staticmethod
    def _find_text_files(texts: Iterable[str]) -> dict[str, _FileStamp]:
        """Find the regular files that a text names, or a folder and a name together."""
        names = [text for text in texts if len(text) < 1000 and text.isprintable()]
        stamp = {name: _get_file_stamp(name) for name in names}
        folders = [name for name in names if stamp[name] == () and os.path.isdir(name)]
        names = [name for name in names if stamp[name] is None and "." in name]
        for folder, name in itertools.islice(itertools.product(folders, names), _JOIN_LIMIT):
            path = os.path.join(folder, name)
            stamp[path] = _get_file_stamp(path)
        return {path: stamp[path] for path in stamp if stamp[path]}

    # Not by contextlib: it cannot handle an exception that is a frozen dataclass.
    def __enter__(self) -> _Reads:
        _watch_reads()
        self._outer_reads = _current_reads.get()
        self._token = _current_reads.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current_reads.reset(self._token)
        if self._outer_reads is not None:
            self._outer_reads._own_paths |= self._own_paths

    def inherit(self, sources: Iterable[_Source]) -> None:
        """Add the sources of what a pipeline runs or reuses inside the step."""
        for source in sources:
            if source.kind == "file":
                source = _ReadSource(source.name, source.fingerprint)
            self._inherited.append(source)

    def note(self, event: str, arguments: tuple[Any, ...], caller: FrameType) -> None:
        path = arguments[1] if event in _MAKE_EVENTS else arguments[0]
        if type(path) is int:
            return  # the file is open already
        if type(path) is not str:
            path = os.fsdecode(path or ".")
        if not os.path.isabs(path) and _get_working_folder() != self._folder:
            path = os.path.join(_get_working_folder(), path)
        reader = caller.f_globals.get("__name__")
        if reader == "tokenize" and caller.f_back:
            reader = caller.f_back.f_globals.get("__name__")
        is_import = reader in _IMPORT_MODULES
        if event in _LIST_EVENTS:
            if not is_import:
                self._folders[path] = None
        elif event in _MAKE_EVENTS or (event == "os.mkdir" and not os.path.isdir(path)):
            self._own_paths.add(path)
        elif event == "sqlite3.connect":
            self._note_open(path, os.O_RDWR)
        elif event == "open" and not (is_import and path.endswith((".py", ".pyc"))):
            self._note_open(path, arguments[2])

    def _note_open(self, path: str, flags: int) -> None:
        if flags & (os.O_WRONLY | os.O_RDWR):
            exists = os.path.exists(path)
            if exists and flags & os.O_EXCL:
                return  # opening it will fail
            if not exists or flags & (os.O_WRONLY | os.O_TRUNC):
                self._own_paths.add(path)
                return
            self._writable_files.add(path)
        if path not in self._files:
            self._files[path] = _get_file_stamp(path)

    def note_variable(self, name: str, method: FrameType) -> None:
        """Note that a method of os.environ looks up or sets a variable."""
        if method.f_code.co_name != "__getitem__":
            self._own_variables.add(name)
            return
        caller = method.f_back
        while caller and caller.f_globals["__name__"] in ("os", "collections.abc"):
            caller = caller.f_back
        space = caller.f_globals if caller else {"__name__": "os"}
        # Libraries look up many variables that do not matter for the result.
        if _find_packages(space["__name__"], space.get("__file__")) is None:
            self._lookups[name] += 1
            if name not in self._variables and name not in self._own_variables:
                self._variables[name] = os.environ.get(name)

    def list_sources(self) -> list[_Source]:
        """Return what was read, when the call is over."""
        own_paths = {self._resolve(path) for path in self._own_paths}
        sources = list(self._list_files(own_paths))
        for path in self._folders:
            real_path = self._resolve(path)
            is_temporary = real_path in own_paths and not os.path.isdir(real_path)
            if not (is_temporary or _is_ignored(real_path + os.sep)):
                fingerprint = _FolderSource(real_path, "").compute_fingerprint()
                sources.append(_FolderSource(path.rstrip("/") or path, fingerprint))
        # A copy of the environment looks up each variable once, which says nothing about any.
        counts = [self._lookups[name] for name in os.environ if name not in self._own_variables]
        for name, value in self._variables.items():
            is_own = name in self._own_variables and os.environ.get(name) != value
            if self._lookups[name] > min(counts, default=0) and not is_own:
                sources.append(_VariableSource(name, _hash_variable(value, self._variable_key)))
        for source in self._inherited:
            path = self._resolve(source.name)
            is_own = path in own_paths or self._is_new(_get_file_stamp(path))
            if not (isinstance(source, _FileSource) and is_own):
                sources.append(source)
        return list(dict.fromkeys(sources))

    def _list_files(self, own_paths: set[str]) -> Iterator[_Source]:
        known_paths: set[str] = set()  # the step may open a file by several paths
        for path in [*self._files, *self._text_files]:
            full_path = os.path.abspath(os.path.join(self._folder, path))
            real_path = os.path.realpath(full_path)
            if full_path in known_paths or real_path in own_paths or _is_ignored(real_path):
                continue
            known_paths.add(full_path)
            stamp = self._files.get(path, self._text_files.get(path))
            stamp_now = _get_file_stamp(full_path)
            if stamp == () or stamp_now == () or self._is_new(stamp):
                continue
            fingerprint = ""  # equals nothing: somebody else has changed the file meanwhile
            if stamp == stamp_now or stamp_now is None:
                with contextlib.suppress(_Opaque):  # we may not read it
                    fingerprint = _compute_file_fingerprint(full_path)
            elif path not in self._files or path in self._writable_files:
                continue
            yield _ReadSource(path, fingerprint)

    def _resolve(self, path: str) -> str:
        return os.path.realpath(os.path.join(self._folder, path))

    def _is_new(self, stamp: _FileStamp) -> bool:
        """Return whether a file was written after the call began, perhaps by the step itself."""
        return stamp is not None and stamp != () and stamp[2] >= self._start


_current_reads: ContextVar[_Reads | None] = ContextVar("dagkit_reads", default=None)


_watch_lock = threading.Lock()


@functools.cache
def _watch_reads() -> None:
    """Begin to watch, once in a process: an audit hook cannot be removed."""

    def handle_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _AUDIT_EVENTS:
            reads = _current_reads.get()
            caller = sys._getframe(1)
            if reads is not None and caller.f_globals is not _OUR_GLOBALS:
                try:
                    reads.note(event, arguments, caller)
                except Exception:  # it is an odd path, with which the call itself will fail
                    return

    def note_and_encode(name: str) -> Any:
        reads = _current_reads.get()
        if reads is not None:
            token = _current_reads.set(None)
            try:
                reads.note_variable(name, sys._getframe(1))
            finally:
                _current_reads.reset(token)
        return encode(name)

    with _watch_lock:
        encode = os.environ.encodekey
        if getattr(encode, "__globals__", None) is not _OUR_GLOBALS:
            sys.addaudithook(handle_event)
            # A hack: a lookup in os.environ raises no audit event, but it encodes the name.
            os.environ.encodekey = note_and_encode


_OUR_GLOBALS = globals()


@functools.cache
def _list_library_folders() -> tuple[str, ...]:
    folders = {os.path.dirname(os.__file__)}
    for prefix in (sys.prefix, sys.base_prefix):  # which may also hold a project, like /usr/src
        for name in ("bin", "include", "lib", "lib64", "share", "DLLs", "Library", "Scripts"):
            folders.add(os.path.join(prefix, name))
    return tuple(os.path.realpath(folder) + os.sep for folder in folders)


def _is_ignored(path: str) -> bool:
    return path.startswith(_list_library_folders()) or bool(re.search(_IGNORED_PATHS, path))


########################################################################################
### Copies
########################################################################################

# A cached step works on copies of its arguments. Otherwise the first run, in which it may change
# them in place, would differ from the second one, in which it does not run. The arguments of a call
# are copied in one go, so that objects that they share stay shared. `copy.deepcopy` and `pickle`
# lose what classes leave out of their pickles: we copy what pickle would rebuild an object from,
# and all attributes.

_IMMUTABLE_TYPES = _SCALARS | {complex, range, type(Ellipsis), type(NotImplemented), object}


class _CopyError(Exception):
    """No copy of a value would behave like the original."""


class _Region(NamedTuple):
    """Memory of an array or tensor."""

    start: int
    end: int
    owner: Any
    group: object  # sharing inside a group does not matter


class _Copier:
    """Copies values that may share objects with one another."""

    def __init__(self, originals: Collection[Any] = ()) -> None:
        # id -> copy, and the value: as long as we hold it, nothing else gets its id.
        self.copies: dict[int, tuple[Any, Any]] = {id(value): (value, value) for value in originals}
        self.regions: list[_Region] = []
        self.tensor_memo: dict[Any, Any] = {}  # through which tensors share their storage
        self.is_certain = True  # until a class rebuilds an object in its own way
        self.has_originals = False  # whether a copy holds an original that can change

    def copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in _IMMUTABLE_TYPES:
            return value
        if id(value) not in self.copies:
            if kind in _CONTAINERS:
                result = self._copy_container(value, kind)
            else:
                result = _find_copy_rule(kind)(self, value)
            self.copies.setdefault(id(value), (result, value))
        return self.copies[id(value)][0]

    def register(self, value: Any, result: Any) -> Any:
        """Register a copy before it is filled: what it holds may lead back to it."""
        self.copies[id(value)] = (result, value)
        return result

    def keep(self, value: Any) -> Any:
        """Keep an object by identity; perhaps the step gives it an attribute."""
        hash_method: Any = type(value).__hash__
        if type(value).__dictoffset__ and hash_method in (None, object.__hash__):
            self.has_originals = True
        return value

    def _copy_container(self, value: Any, kind: type[Any]) -> Any:
        if kind is dict:
            result = self.register(value, {})
            for key, item in value.items():
                result[self.copy(key)] = self.copy(item)
            return result
        if kind in (list, set):
            if set(map(type, value)) <= _IMMUTABLE_TYPES:
                return value.copy()
            result = self.register(value, kind())
            add = result.append if kind is list else result.add
            for item in value:
                add(self.copy(item))
            return result
        items = [self.copy(item) for item in value]
        if all(map(operator.is_, items, value)):
            return value
        return kind(items)

    def copy_attributes(self, value: Any, result: Any, ignored_names: Collection[str] = ()) -> Any:
        """Copy the attributes of an instance."""
        layout = _find_layout(type(value))
        slots = dict(layout.slots)
        for name, attribute in _get_attributes(value, layout).items():
            if name in ignored_names or "*" in ignored_names:
                continue
            if isinstance(attribute, _LOCKS):
                if not hasattr(result, name):
                    raise _CopyError("a lock")
            elif name in slots:
                slots[name].__set__(result, self.copy(attribute))
            else:
                object.__getattribute__(result, "__dict__")[name] = self.copy(attribute)
        return result


# How a type is copied; the first of its bases that has a rule decides.

_CopyRule = Callable[[_Copier, Any], Any]
_copy_rules: dict[type, _CopyRule] = {}


def _find_copy_rule(kind: type) -> _CopyRule:
    if kind not in _copy_rules:
        _copy_rules[kind] = _copy_object
        for base in kind.__mro__:
            if _get_short_name(base) in _COPY_RULES:
                _copy_rules[kind] = _COPY_RULES[_get_short_name(base)]
                break
    return _copy_rules[kind]


def _keep(copier: _Copier, value: Any) -> Any:
    return value


def _keep_immutable(copier: _Copier, value: Any) -> Any:
    if getattr(value, "__dict__", None):  # of a subclass
        return _copy_object(copier, value)
    return value


def _keep_function(copier: _Copier, value: Any) -> Any:
    """Keep a function, unless it was made at run time and holds something that is copied."""
    if getattr(sys.modules.get(value.__module__), value.__qualname__, None) is value:
        return value
    copier.register(value, value)
    held_values = [_get_cell(cell) for cell in value.__closure__ or ()]
    held_values += value.__defaults__ or ()
    held_values += {**(value.__kwdefaults__ or {}), **vars(value)}.values()
    for held_value in held_values:
        if copier.copy(held_value) is not held_value:
            raise _CopyError("a function that holds an object")
    return value


def _copy_array(copier: _Copier, value: Any) -> Any:
    numpy = sys.modules["numpy"]
    copier.regions.append(_find_region(value, id(value)))
    result = copier.register(value, numpy.array(value, copy=True, order="K", subok=True))
    if value.dtype.hasobject:
        if value.dtype != object:
            raise _CopyError("objects in a structured array")
        cells = value.view(numpy.ndarray)
        if not set(map(type, cells.flat)) <= _IMMUTABLE_TYPES:
            for index in numpy.ndindex(cells.shape):
                result.view(numpy.ndarray)[index] = copier.copy(cells[index])
    result.flags.writeable = value.flags.writeable
    return copier.copy_attributes(value, result, _find_layout(type(value)).ignored_names)


def _copy_tensor(copier: _Copier, value: Any) -> Any:
    torch = sys.modules["torch"]
    if value._backward_hooks:
        raise _CopyError("a tensor with hooks")
    copier.regions.append(_find_region(value, value.untyped_storage().data_ptr()))
    result = copy.deepcopy(value.detach(), copier.tensor_memo)
    if isinstance(value, torch.nn.Parameter):
        result = type(value)(result)
    copier.register(value, result.requires_grad_(value.requires_grad))
    result.grad = copier.copy(value.grad)  # which deepcopy loses
    return copier.copy_attributes(value, result)


def _copy_pandas(copier: _Copier, value: Any) -> Any:
    """Copy a frame in full: through a shallow copy one can write into the original."""
    is_certain = copier.is_certain
    region_count = len(copier.regions)
    result = _copy_object(copier, value)
    copier.is_certain = is_certain
    del copier.regions[region_count:]  # a frame and its columns share memory, but cannot show it
    return result


def _copy_polars(copier: _Copier, value: Any) -> Any:
    return copier.copy_attributes(value, value.clone(), _find_layout(type(value)).ignored_names)


def _copy_object(copier: _Copier, value: Any) -> Any:
    """Copy any other object: what pickle would rebuild it from, and all its attributes."""
    kind = type(value)
    pieces = _get_pickle_pieces(value, 4)
    if isinstance(pieces, str):  # the name of a global
        return value
    function, arguments, state, items, pairs, set_state = (*pieces, None, None, None, None)[:6]
    set_state = set_state or getattr(kind, "__setstate__", None)
    layout = _find_layout(kind)
    is_plain = function is _NEW_OBJECT and set_state is None
    is_empty = len(arguments) == 1 and items is None and pairs is None
    if is_plain and is_empty and not _get_attributes(value, layout):
        return copier.keep(value)  # a sentinel: it has nothing but its identity
    copier.is_certain &= is_plain
    result = function(*map(copier.copy, arguments))
    if result is value:  # a singleton
        return copier.keep(value)
    copier.register(value, result)
    for item in items or ():
        result.append(copier.copy(item))
    for key, item in pairs or ():
        result[copier.copy(key)] = copier.copy(item)
    if is_plain:
        return copier.copy_attributes(value, result)
    if state is not None and set_state is not None:
        set_state(result, copier.copy(state))
    return copier.copy_attributes(value, result, layout.ignored_names)


_COPY_RULES: dict[str, _CopyRule] = {
    **dict.fromkeys(_split("builtins.type builtins.module enum.Enum logging.Logger"), _keep),
    **dict.fromkeys(
        _split(
            """datetime.date datetime.time datetime.timedelta datetime.tzinfo decimal.Decimal
            fractions.Fraction uuid.UUID pathlib.PurePath re.Pattern numpy.generic numpy.dtype
            pandas.Interval pandas.ExtensionDtype pyarrow.Array pyarrow.ChunkedArray
            pyarrow.DataType pyarrow.Field pyarrow.RecordBatch
            pyarrow.Scalar pyarrow.Schema pyarrow.Table"""
        ),
        _keep_immutable,
    ),
    "builtins.function": _keep_function,
    "numpy.void": lambda copier, value: copier.copy(sys.modules["numpy"].array(value))[()],
    "numpy.ndarray": _copy_array,
    "pandas.DataFrame": _copy_pandas,
    "pandas.Series": _copy_pandas,
    "pandas.Index": _copy_pandas,
    "pandas.ExtensionArray": _copy_pandas,
    "polars.DataFrame": _copy_polars,
    "polars.Series": _copy_polars,
    "torch.Tensor": _copy_tensor,
}


def _find_region(value: Any, group: object) -> _Region:
    if hasattr(value, "untyped_storage"):  # a tensor
        storage = value.untyped_storage()
        return _Region(storage.data_ptr(), storage.data_ptr() + storage.nbytes(), None, group)
    numpy = sys.modules["numpy"]
    start, end = getattr(numpy.lib, "array_utils", numpy).byte_bounds(value)
    return _Region(start, end, value, group)


def _share_memory(regions: Collection[_Region]) -> bool:
    """Return whether arrays or tensors of different groups share memory."""
    open_regions: list[_Region] = []
    for region in sorted(regions, key=lambda region: region.start):
        open_regions = [other for other in open_regions if other.end > region.start]
        if len(open_regions) > 100:
            return True  # we do not compare each with each
        for other in open_regions:
            if other.group != region.group:
                if other.owner is None or region.owner is None:
                    return True
                if sys.modules["numpy"].shares_memory(other.owner, region.owner, max_work=1000):
                    return True
        open_regions.append(region)
    return False


class _ObjectFinder(pickle.Pickler):
    """Finds the objects in a value that a step can change."""

    def __init__(self, group: str) -> None:
        super().__init__(self, 5)
        self.group = group
        self.objects: dict[int, Any] = {}
        self.regions: list[_Region] = []
        self.constant_ids: set[int] = set()  # of containers that belong to an unchanging object

    def write(self, data: Any) -> None:
        """Drop the pickle."""

    def persistent_id(self, value: Any) -> Any:
        """Note a value; return None if the pickler has to go on inside it."""
        kind = type(value)
        if kind in _IMMUTABLE_TYPES or id(value) in self.constant_ids:
            return None
        rule = _find_copy_rule(kind)
        if rule in (_keep, _keep_function, _keep_immutable):
            return True
        hash_method: Any = kind.__hash__
        can_change = hash_method is None  # by convention, what is hashed by value does not change
        if hash_method is object.__hash__:
            can_change = bool(_get_attributes(value, _find_layout(kind)))
        if can_change or rule is _copy_tensor:
            self.objects[id(value)] = value
        elif rule is _copy_object:  # what its attributes hold may change, but not the attributes
            for name in ("__dict__", "__pydantic_fields_set__"):
                self.constant_ids.add(id(getattr(value, name, None)))
        if rule is _copy_tensor or rule is _copy_array:
            self.regions.append(_find_region(value, self.group))
        if rule is _copy_array and value.dtype.hasobject:
            return None
        return rule is not _copy_object or None


# The functions that other rooms use


def _copy_arguments(
    arguments: Mapping[str, Any], keep: Collection[str], fingerprints: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Copy the arguments of a call in one go, but for those of ``keep``.

    Returns the values for the call, and the names of those that are, or hold, originals: their
    fingerprints must be the same after the call.
    """
    values: dict[str, Any] = {}
    names = [name for name in keep if name in fingerprints]
    try:
        copier = _Copier([arguments[name] for name in keep])
        for name, value in arguments.items():
            copier.is_certain = True
            copier.has_originals = False
            values[name] = copier.copy(value)
            if not copier.is_certain and _fingerprint(values[name]) != fingerprints[name]:
                raise _CopyError(name)
            if copier.has_originals:
                names.append(name)
        if _share_memory(copier.regions):
            raise _CopyError("arrays that share memory")
    except Exception:  # classes may raise anything when they are rebuilt
        return dict(arguments), [name for name in arguments if name in fingerprints]
    return values, names


def _find_changes(
    arguments: Mapping[str, Any], names: Iterable[str], fingerprints: Mapping[str, str]
) -> list[str]:
    """Find the arguments of these names that a call has changed in place."""
    changed_names = []
    for name in names:
        try:
            is_same = _fingerprint(arguments[name]) == fingerprints[name]
        except _Opaque:  # it was given something that has no fingerprint
            is_same = False
        if not is_same:
            changed_names.append(name)
    return changed_names


def _find_sharing(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """Say which of these values share an object that can change; "" if none do."""
    finders: list[_ObjectFinder] = []
    for name in names:
        finder = _ObjectFinder(name)
        with contextlib.suppress(Exception):  # then the store cannot keep the value
            finder.dump(values[name])
        for other in finders:
            shared_ids = [number for number in finder.objects if number in other.objects]
            shared = ""
            if shared_ids:
                shared = f"a {_type_name(type(finder.objects[shared_ids[0]]))}"
            elif _share_memory([*finder.regions, *other.regions]):
                shared = "memory"
            if shared:
                return f"returned '{other.group}' and '{name}', which share {shared}"
        finders.append(finder)
    return ""


########################################################################################
### Catalog
########################################################################################


class _Format:
    """How the content of one kind of file becomes a value and back.

    ``save`` raises an error for a value that the file would not give back.
    """

    packages: tuple[str, ...] = ()  # that turn the content into a value
    counts_by_value = False  # because the content only names the classes of the value
    is_readable = True

    def load(self, content: bytes) -> Any:
        raise NotImplementedError("this format is only written")

    def save(self, value: Any) -> bytes:
        raise NotImplementedError


class _BytesFormat(_Format):
    def load(self, content: bytes) -> bytes:
        return content

    def save(self, value: Any) -> bytes:
        if type(value) is not bytes:
            raise TypeError("expected bytes")
        return value


class _TextFormat(_Format):
    def load(self, content: bytes) -> str:
        return content.decode()

    def save(self, value: Any) -> bytes:
        if type(value) is not str:
            raise TypeError("expected a str")
        return value.encode()


class _JsonFormat(_Format):
    def load(self, content: bytes) -> Any:
        return json.loads(content)

    def save(self, value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"


class _JsonLinesFormat(_Format):
    def load(self, content: bytes) -> list[Any]:
        return [json.loads(line) for line in content.splitlines() if line.strip()]

    def save(self, value: Any) -> bytes:
        # The items of a dict are its keys, and those of a frame the names of its columns.
        if not isinstance(value, list | tuple):
            raise TypeError("expected a list; of a frame: frame.to_dict('records')")
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in value]
        return "".join(lines).encode()


class _PickleFormat(_Format):
    counts_by_value = True

    def load(self, content: bytes) -> Any:
        return pickle.loads(content)

    def save(self, value: Any) -> bytes:
        return pickle.dumps(value, protocol=5)


class _ArrayFormat(_Format):
    packages = ("numpy",)

    def load(self, content: bytes) -> Any:
        import numpy as np

        return np.load(io.BytesIO(content), allow_pickle=False)

    def save(self, value: Any) -> bytes:
        import numpy as np

        if type(value) is not np.ndarray:
            raise TypeError("expected a numpy.ndarray")
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return file.getvalue()


class _ArraysFormat(_ArrayFormat):
    def load(self, content: bytes) -> dict[str, Any]:
        return dict(super().load(content))

    def save(self, value: Any) -> bytes:
        import zipfile

        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise TypeError("expected a dict: text -> numpy.ndarray")
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:  # numpy.savez has arguments such as "file"
            for name, array in value.items():
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), super().save(array))
        return file.getvalue()


class _FrameFormat(_Format):
    """A frame of pandas, as ``to_parquet`` writes it and ``read_parquet`` reads it."""

    def __init__(self, kind: str, *packages: str) -> None:
        self.kind = kind
        self.packages = ("pandas", *packages)

    def load(self, content: bytes) -> Any:
        import pandas as pd

        return getattr(pd, f"read_{self.kind}")(io.BytesIO(content))

    def save(self, value: Any, **options: Any) -> bytes:
        import pandas as pd

        if type(value) is not pd.DataFrame:  # another class would not come back as itself
            raise TypeError("expected a pandas.DataFrame")
        file = io.BytesIO()
        getattr(value, f"to_{self.kind}")(file, **options)
        return file.getvalue()


class _CsvFormat(_FrameFormat):
    def save(self, value: Any, **options: Any) -> bytes:
        content = super().save(value, index=False, lineterminator="\n")
        has_row_numbers = len(value) == 0 or value.index.dtype.kind in "iu"
        if not has_row_numbers or any(name is not None for name in value.index.names):
            # After a groupby, for instance, the rows could not be told apart without the index.
            raise TypeError("a CSV does not keep the index: use reset_index(), or .parquet")
        if value.columns.nlevels > 1:
            raise TypeError("a CSV does not keep levels of columns: join their names, or use .pkl")
        return content


class _FigureFormat(_Format):
    """A picture of a matplotlib figure. It is only written: the step hands on the figure."""

    is_readable = False

    def __init__(self, kind: str, **metadata: None) -> None:
        self.kind = kind
        self.metadata = metadata  # without the time, so that equal figures make equal files

    def save(self, value: Any) -> bytes:
        import matplotlib
        from matplotlib.figure import Figure

        if not isinstance(value, Figure):
            raise TypeError("expected a matplotlib.figure.Figure; of axes: axes.figure")
        file = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "dagkit"}):
            value.savefig(file, format=self.kind, metadata=self.metadata)
        return file.getvalue()


class _PackedFormat(_Format):
    def __init__(self, inner: _Format) -> None:
        self.inner = inner
        self.packages = inner.packages
        self.counts_by_value = inner.counts_by_value

    def load(self, content: bytes) -> Any:
        import gzip

        return self.inner.load(gzip.decompress(content))

    def save(self, value: Any) -> bytes:
        import gzip

        return gzip.compress(self.inner.save(value), mtime=0)  # equal values make equal files


_FORMATS: dict[str, _Format] = {
    ".bytes": _BytesFormat(),
    ".csv": _CsvFormat("csv"),
    ".feather": _FrameFormat("feather", "pyarrow"),
    ".json": _JsonFormat(),
    ".jsonl": _JsonLinesFormat(),
    ".npy": _ArrayFormat(),
    ".npz": _ArraysFormat(),
    ".parquet": _FrameFormat("parquet", "pyarrow"),
    ".pdf": _FigureFormat("pdf", CreationDate=None),
    ".pkl": _PickleFormat(),
    ".png": _FigureFormat("png"),
    ".svg": _FigureFormat("svg", Date=None),
    ".txt": _TextFormat(),
}
for _suffix in (".bytes", ".csv", ".json", ".jsonl", ".pkl", ".txt"):
    _FORMATS[f"{_suffix}.gz"] = _PackedFormat(_FORMATS[_suffix])


class _FileDataset:
    """A file of the catalog, or what fsspec finds at an address. Its suffix says the format."""

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path  # as it is written in the catalog; it counts in keys
        self.is_local = re.match(r"[\w+.-]{2,}:(:|//)", path) is None  # C:// is a drive
        self.absolute_path = path
        if self.is_local:  # a worker process may be in another folder
            full_path = os.path.join(_get_working_folder(), os.path.expanduser(path))
            self.absolute_path = os.path.abspath(full_path)
        match = re.search(r"\.\w+(\.gz)?\Z", path.lower())
        self.suffix = match[0] if match else ""
        if self.suffix not in _FORMATS:
            raise CatalogError(
                f"the catalog has no format for '{name}': {path}\n"
                f"  known suffixes: {_join_names(_FORMATS, limit=99)}\n"
                "  or give an object with load() and save(value)",
                name=name,
            )
        self.format = _FORMATS[self.suffix]
        self.is_readable = self.format.is_readable
        self.counts_by_value = self.format.counts_by_value

    def __str__(self) -> str:
        return self.path

    @property
    def reader(self) -> dict[str, str]:
        """Name -> version of the packages that turn the content into a value."""
        versions = {}
        for package in self.format.packages:
            with contextlib.suppress(ImportError):  # it is not installed
                versions[package] = _get_version(package)
        return versions

    def compute_fingerprint(self) -> str:
        """Return the fingerprint of the content as it is now."""
        if self.is_local and os.path.isfile(self.absolute_path):
            return _compute_file_fingerprint(self.absolute_path)  # it remembers what it has read
        return self.read()[1]

    def read(self) -> tuple[bytes, str]:
        """Return the content and its fingerprint. Nothing is parsed yet."""
        if self.is_local and not os.path.isfile(self.absolute_path):  # a pipe would block us
            raise FileNotFoundError(f"there is no file {self.absolute_path}")
        with self._open("rb") as file:
            content: bytes = file.read()
        return content, hashlib.sha256(content).hexdigest()

    def parse(self, content: bytes) -> Any:
        """Make the value from a content that ``read`` returned."""
        with self._explain_errors(f"cannot be loaded from {self.absolute_path}"):
            return self.format.load(content)

    def save(self, value: Any) -> str:
        """Write a value; return the fingerprint of the content."""
        kind = _type_name(type(value))
        with self._explain_errors(f"is a {kind}, which cannot be saved as {self.path}"):
            content = self.format.save(value)
        if self.is_local:
            _write_file(self.absolute_path, content)
        else:
            with self._open("wb") as file:
                file.write(content)
        return hashlib.sha256(content).hexdigest()

    def _open(self, mode: str) -> Any:
        if self.is_local:
            return open(self.absolute_path, mode)
        with self._explain_errors("cannot be opened"):
            import fsspec

            return fsspec.open(self.path, mode)

    @contextlib.contextmanager
    def _explain_errors(self, problem: str) -> Iterator[None]:
        """Make a ``CatalogError`` of anything that a library raises."""
        try:
            yield
        except Exception as error:
            text = f"'{self.name}' {problem}\n  {_describe_error(error)}"
            raise CatalogError(text, name=self.name) from error


def _write_file(path: str, content: bytes) -> None:
    """Write a file aside, then rename it into place: a reader sees all of it or nothing."""
    path = os.path.realpath(path)  # a symbolic link stays a link
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary_path = os.path.join(os.path.dirname(path), f".dagkit-{os.urandom(8).hex()}")
    try:
        with open(temporary_path, "xb") as file:
            with contextlib.suppress(OSError):  # there is no old file whose mode we could take
                os.chmod(temporary_path, stat.S_IMODE(os.stat(path).st_mode))
            file.write(content)
        os.replace(temporary_path, path)
    except BaseException:
        _remove_file(temporary_path)
        raise


_UNKNOWN = "unknown"  # stands for the fingerprint of a value that has none


class _ObjectDataset:
    """Any object with ``load()`` and ``save(value)``, as those of Kedro. Its value counts."""

    counts_by_value = True
    is_local = False  # a worker process would have another copy of the object
    is_readable = True
    suffix = ""

    def __init__(self, name: str, inner: Any) -> None:
        self.name = name
        self.inner = inner
        self.reader: dict[str, str] = {}

    def __str__(self) -> str:
        return f"<{type(self.inner).__name__} '{self.name}'>"

    def compute_fingerprint(self) -> str:
        return _fingerprint(self.inner.load())

    def read(self) -> tuple[Any, str]:
        value = self.inner.load()
        try:
            return value, _fingerprint(value)
        except _Opaque:
            return value, _UNKNOWN

    def parse(self, content: Any) -> Any:
        return content

    def save(self, value: Any) -> str:
        self.inner.save(value)
        return self.read()[1]


_Dataset = _FileDataset | _ObjectDataset


@contextlib.contextmanager
def _note_errors(note: str) -> Iterator[None]:
    """Add a note to an error of the file system, or of an object that the user has written."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, DagkitError):
            with contextlib.suppress(Exception):  # a class of the user may override add_note
                error.add_note(note)
        raise


class _CatalogHandle(_Handle):
    """A value that lies where the catalog says. Each load gives a value of one's own.

    The fingerprint of a file is that of its content and of its readers. A pickle and an object
    have the fingerprint of their value.
    """

    def __init__(
        self, dataset: _Dataset, content_fingerprint: str = "", fingerprint: str = ""
    ) -> None:
        self.dataset = dataset
        self._content_fingerprint = content_fingerprint  # that we expect; "" before the first read
        self._fingerprint = fingerprint

    def __repr__(self) -> str:
        return str(self.dataset)

    @property
    def is_local(self) -> bool:
        """Whether another process on this machine can load it."""
        return self.dataset.is_local

    @property
    def fingerprint(self) -> str:
        if self._fingerprint:
            return self._fingerprint
        dataset = self.dataset
        try:
            if dataset.counts_by_value:
                self._fingerprint = _fingerprint(self.load())
            else:
                content = self._content_fingerprint or dataset.compute_fingerprint()
                self._content_fingerprint = content
                versions = dataset.reader.values()
                self._fingerprint = _join_fingerprints([dataset.suffix, content, *versions])
        except _Opaque:
            raise
        except Exception as error:  # a run says more, when a step needs the value
            raise _Opaque(f"catalog {dataset.name}", type(error).__name__) from error
        return self._fingerprint

    def load(self) -> Any:
        dataset = self.dataset
        with _note_errors(f"while '{dataset.name}' of the catalog was loaded: {dataset}"):
            content, content_fingerprint = dataset.read()
        # Never parse, and so never unpickle, another content than the one that we know.
        if content_fingerprint != (self._content_fingerprint or content_fingerprint):
            raise CatalogError(
                f"'{dataset.name}' of the catalog has changed while the run needed it: {dataset}\n"
                "  run again; give two runs that write at once a path each, for instance by a "
                "template: 'out/{region}/model.pkl'",
                name=dataset.name,
            )
        self._content_fingerprint = content_fingerprint
        return dataset.parse(content)


class _DatasetSource(_Source):
    """The content of a dataset as a step wrote it. Its name is the one in the catalog.

    A stored entry holds no dataset, since a project may be moved with its files. Reuse sets the
    dataset of the pipeline before it checks the entry.
    """

    kind = "dataset"

    def __init__(self, name: str, fingerprint: str, dataset: Any = None) -> None:
        super().__init__(name, fingerprint)
        self.dataset = dataset

    def compute_fingerprint(self) -> str:
        return str(self.dataset.compute_fingerprint())

    def explain_change(self) -> str:
        if self.fingerprint == _UNKNOWN:
            return f"{self} has no fingerprint"
        return super().explain_change()

    def __str__(self) -> str:
        if not isinstance(self.dataset, _FileDataset):
            return f"dataset {self.name}"
        if self.dataset.is_local:
            return f"file {_shorten_path(self.dataset.absolute_path)}"
        return f"dataset {self.dataset}"

    def __reduce__(self) -> Any:
        return _DatasetSource, (self.name, self.fingerprint)


# The catalog of a pipeline


def _read_catalog(catalog: Mapping[Any, Any] | None) -> dict[str, Any]:
    """Return a catalog with normalized names."""
    entries: dict[str, Any] = {}
    for key, entry in (catalog or {}).items():
        name = _normalize_names(key) if isinstance(key, str) else ""
        if not name or name in entries:
            raise CatalogError(
                f"the catalog has the key {_summarize(key)}\n  expected different names", name=name
            )
        entries[name] = entry
    return entries


def _make_dataset(name: str, entry: Any) -> _Dataset:
    """Make the dataset of an entry of the catalog, with its path as it is written there."""
    path = os.fspath(entry) if isinstance(entry, str | os.PathLike) else None
    if _is_path_text(path):
        return _FileDataset(name, str(path))
    if hasattr(entry, "load") and hasattr(entry, "save") and not isinstance(entry, type):
        return _ObjectDataset(name, entry)
    raise CatalogError(
        f"the catalog has {_summarize(entry)} for '{name}'\n"
        "  expected a path, or an object with load() and save(value)",
        name=name,
    )


def _add_catalog(graph: _Graph, catalog: Mapping[str, Any]) -> _Graph:
    """Return the graph with the inputs that the catalog has, and its steps with a cache.

    Raises ``CatalogError`` for a wrong entry, ``InputError`` for an unknown name.
    """
    steps = dict(graph.steps)
    inputs = dict(graph.inputs)
    _check_known_names("the catalog names", catalog, graph)
    for name, entry in catalog.items():
        dataset = _make_dataset(name, entry)
        for needed_name in _find_template_names(dataset):
            if needed_name not in graph.producers:
                inputs.setdefault(needed_name, REQUIRED)
        step = graph.producers.get(name)
        if step is None:
            inputs[name] = _CatalogHandle(dataset)  # each run puts a handle of its own there
        elif step.map or step.poke is not None or (step.outputs and name == step.name):
            raise step._error(
                "cannot be in the catalog",
                "a map, a sensor and a step with outputs cannot: name its outputs, or let another "
                "step take its value",
                CatalogError,
                name=name,
            )
        elif not step.cache:
            steps[step.name] = dataclasses.replace(step, cache=True)
    producers = {value: steps[step.name] for value, step in graph.producers.items()}
    sorted_steps = [steps[step.name] for step in graph.sorted_steps]
    return _Graph(steps, producers, inputs, sorted_steps)


def _find_template_names(dataset: _Dataset) -> list[str]:
    """Return the names of inputs in the braces of a path."""
    import string

    names: list[str] = []
    path = dataset.path if isinstance(dataset, _FileDataset) else ""
    try:
        for _, name, format_spec, _ in string.Formatter().parse(path):
            if name is not None:
                names.append(name)
                if not name.isidentifier() or "{" in str(format_spec):
                    raise ValueError(f"{name!r} is not a name")
    except ValueError as error:
        raise CatalogError(
            f"the path of '{dataset.name}' in the catalog is not a template: {path}\n"
            "  expected names of inputs in braces, and {{ }} for braces",
            name=dataset.name,
        ) from error
    return names


# Text that could lead out of a folder: separators, "..", drive letters, a home folder, nothing.
_UNSAFE_TEXT = r"[/\\\x00-\x1f\x7f\ud800-\udfff]|\.\.|^[A-Za-z]?:|^~|^\.?$"
_UNSAFE_IN_ADDRESS = rf"{_UNSAFE_TEXT}|[:%?#*\[\]]"


# The catalog in a run


def _find_datasets(
    catalog: Mapping[str, Any], names: Iterable[str], inputs: Mapping[str, Any]
) -> dict[str, _Dataset]:
    """Return the datasets of those names that the catalog has, with paths filled in from inputs.

    Raises ``InputError`` for inputs that were not given, ``CatalogError`` for a path that cannot
    be filled in or that two values have.
    """
    datasets: dict[str, _Dataset] = {}
    missing_names: list[str] = []
    paths: list[str] = []  # that need them
    for name in [name for name in names if name in catalog]:
        dataset = _make_dataset(name, catalog[name])
        not_given = (type(REQUIRED), _CatalogHandle)
        needed_names = _find_template_names(dataset)
        missing = [n for n in needed_names if isinstance(inputs.get(n, REQUIRED), not_given)]
        if missing:
            missing_names += missing
            paths.append(f"  {name}: {dataset}")
        elif isinstance(dataset, _FileDataset):
            dataset = _fill_template(dataset, inputs)
        datasets[name] = dataset
    if missing_names:
        missing_names = list(dict.fromkeys(missing_names))
        known_names = inputs.keys() - set(missing_names)
        quoted_names = _join_names(map(repr, missing_names))
        lines = [f"the catalog needs {quoted_names}, but run() was not given it", *paths]
        lines.append(_suggest_names(missing_names, known_names))
        raise InputError("\n".join(lines), missing=tuple(missing_names))
    _check_paths(datasets, inputs)
    return datasets


def _fill_template(dataset: _FileDataset, inputs: Mapping[str, Any]) -> _FileDataset:
    import string

    formatter = string.Formatter()
    unsafe = _UNSAFE_TEXT if dataset.is_local else _UNSAFE_IN_ADDRESS
    path = ""
    try:
        for literal, name, format_spec, conversion in formatter.parse(dataset.path):
            path += literal
            if name is not None:
                text = format(formatter.convert_field(inputs[name], conversion), format_spec or "")
                if re.search(unsafe, text):
                    raise ValueError(f"{text!r} is not a plain name for a file")
                path += text
    except Exception as error:  # the __format__ of an input may raise anything
        raise CatalogError(
            f"the path of '{dataset.name}' in the catalog cannot be filled in: "
            f"{_get_message(error)}\n  {dataset.path}",
            name=dataset.name,
        ) from error
    return _FileDataset(dataset.name, path)


def _check_paths(datasets: Mapping[str, _Dataset], inputs: Mapping[str, Any]) -> None:
    """Raise ``CatalogError`` if a value would be saved over another one, or over an input."""
    names_by_path: dict[str, str] = {}
    for name, dataset in datasets.items():
        if not isinstance(dataset, _FileDataset):
            continue
        path = dataset.absolute_path
        if dataset.is_local:
            path = os.path.normcase(os.path.realpath(path))
        other = names_by_path.setdefault(path, name)
        are_inputs = [isinstance(inputs.get(n), _CatalogHandle) for n in (name, other)]
        if other != name and not all(are_inputs):  # inputs may share a file
            raise CatalogError(
                f"the catalog has one file for '{other}' and '{name}': {dataset}\n"
                "  one would overwrite the other: give each a path of its own",
                name=name,
            )


def _check_files(inputs: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for all files of the catalog that are not there."""
    problems: dict[str, str] = {}  # by the name of the input
    for value in inputs.values():
        dataset = value.dataset if isinstance(value, _CatalogHandle) else None
        if isinstance(dataset, _FileDataset) and dataset.is_local:
            path = dataset.absolute_path
            if not os.path.isfile(path):
                name = dataset.name
                problems[name] = f"the catalog has no file for input '{name}': {path}\n"
    if problems:
        text = "".join(problems.values()) + "  put a file there, or give the value to run()"
        raise InputError(text, missing=tuple(problems))


def _save_to_catalog(
    datasets: Mapping[str, _Dataset], values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[_Source]]:
    """Save the values of a step that have a dataset, and put handles in their place.

    So a later step gets what the file gives back, in the first run as in the second one. A figure
    stays itself, and is stored. The sources are what the stored entry depends on.
    """
    new_values = dict(values)
    sources: list[_Source] = []
    for name, value in values.items():
        if name not in datasets:
            continue
        dataset = datasets[name]
        fingerprint = ""
        if isinstance(dataset, _FileDataset) and dataset.counts_by_value:
            with contextlib.suppress(_Opaque):  # then the handle says so
                fingerprint, value_sources = _fingerprint_with_sources(value)
                sources += value_sources
        with _note_errors(f"while '{name}' was saved to the catalog: {dataset}"):
            content_fingerprint = dataset.save(value)
        sources.append(_DatasetSource(name, content_fingerprint, dataset))
        if dataset.is_readable:
            new_values[name] = _CatalogHandle(dataset, content_fingerprint, fingerprint)
    whole, *outputs = new_values  # the step's own name comes first
    if outputs and sources:
        new_values[whole] = _TupleHandle([new_values[name] for name in outputs])
    return new_values, sources


def _replace_handles(
    handles: Mapping[str, Any], step: Step, entry: _Entry, datasets: Mapping[str, _Dataset]
) -> dict[str, Any]:
    """Return the handles of a stored entry, with those of values that lie in the catalog."""
    new_handles = dict(handles)
    for source in entry.sources:
        dataset = datasets.get(source.name) if source.kind == "dataset" else None
        if dataset is not None and dataset.is_readable:
            fingerprint = entry.values[source.name].fingerprint
            new_handles[source.name] = _CatalogHandle(dataset, source.fingerprint, fingerprint)
    if step.outputs:
        new_handles[step.name] = _TupleHandle([new_handles[name] for name in step.outputs])
    return new_handles


########################################################################################
### Reuse
########################################################################################

_KEY_FORMAT = "dagkit key 3"
_PYTHON_VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
_UNREADABLE = "unreadable entry"
_TEXT_TYPES = (bool, int, float, str, bytes, type(None), os.PathLike)  # written out in reasons


class _Unknown(_Handle):
    """Stands in a plan for a value that only a run can make."""

    where = "of a run"

    def __init__(self, cause: str) -> None:
        self.cause = cause  # the step that will run


class _Decision(NamedTuple):
    """Whether a call can be reused; if not, with which status it would run, and why."""

    status: str  # fresh, stale, maybe, new, uncached
    reason: str = ""
    entry: _Entry | None = None  # the stored one, or the one under which to save the result
    cause: str = ""  # of a "maybe": the step above that certainly runs
    files: Sequence[_Source] = ()  # of a call that has to be made: the files that arguments name


_UNCACHED = _Decision("uncached")


class _Examination(NamedTuple):
    """A value and its fingerprint. While we hold the value, nothing else is identical to it."""

    value: Any
    fingerprint: str
    files: Sequence[_Source]  # that the value names


class _Reuse:
    """Decides, during one run or plan, which calls can be reused, and says why others cannot.

    ``datasets`` says where the catalog keeps values that steps of the order make.
    """

    def __init__(
        self, store: Store, code_memo: _CodeMemo, order: _Order, datasets: Mapping[str, Any]
    ) -> None:
        self.store = store
        self.order = order
        self.datasets = datasets
        self.is_active = True  # whether stored results are used
        self.finished_steps: set[str] = set()  # that were called in this run
        self._codes: dict[str, _Walk | _Opaque] = {}  # by step
        self._moved_parts: dict[str, set[tuple[str, str]]] = {}  # step -> random generators
        self.texts: dict[str, set[str]] = {}  # step -> texts of its code, which may name files
        self._damaged_keys: set[str] = set()
        self._examinations: dict[str, _Examination] = {}  # by the name of the value
        self._file_names: set[str] = set()  # of examined values that name files
        self._newest: dict[str, _Entry | None] = {}  # by step; from before this run
        self._known_sources: dict[_Source, bool] = {}  # whether they are as they were
        cached_steps = [step for step in order.steps if step.cache]
        if cached_steps:
            store._begin_run()
            code_memo.begin()
        # Read all code before a step runs, because a step may import modules or change constants.
        for step in cached_steps:
            try:
                walk = code_memo.find_walk(step.function)
                self._codes[step.name] = walk
                self.texts[step.name] = walk.texts | walk.paths
                self._moved_parts[step.name] = walk.moved_parts
            except _Opaque as culprit:
                self._codes[step.name] = culprit

    @functools.cached_property
    def variable_key(self) -> bytes:
        """The key for hashes of environment variables."""
        return _make_variable_key()

    def decide(self, step: Step, arguments: Mapping[str, Any]) -> _Decision:
        """Compare a call with the store; arguments that only a run can make are `_Unknown`."""
        if not step.cache:
            return _UNCACHED
        if step.ignore:
            arguments = {n: v for n, v in arguments.items() if n not in step.ignored_values}
        code = self._codes[step.name]
        try:
            if isinstance(code, _Opaque):
                raise code
            parts = self._list_parts(step, arguments)
        except _Opaque as culprit:
            return _Decision("uncached", culprit.reason)
        if not self.is_active:
            return _Decision("stale", _UNREADABLE)
        key = ""
        reason = ""
        causes = [value.cause for value in arguments.values() if isinstance(value, _Unknown)]
        if not causes:
            text = f"{_KEY_FORMAT} {step.name} {code.digest.hex()} {parts}"
            key = hashlib.sha256(text.encode()).hexdigest()
            entry, reason = self._look_up(step, key)
            if entry is not None and not reason:
                return _Decision("fresh", entry=entry)
        parts |= code.parts
        newest = self._find_newest(step)
        if newest is not None:
            reason = reason or self._explain_changes(step, arguments, parts, newest)
            if causes and not reason:
                reason = self._find_fault(step, newest)
                if not reason:
                    return _Decision("maybe", f"after {causes[0]}", cause=causes[0])
        # If the newest entry differs only in the element, nothing is stored of this element.
        status = "stale" if reason else "new"
        decision = _Decision(status, reason or "never ran")
        if causes:
            return decision
        files: list[_Source] = []
        texts: dict[str, str] = {}
        for name, value in arguments.items():
            files += self._examinations[name].files
            texts |= _write_out(name, value)
        entry = _Entry(step.name, key, parts, texts=texts)
        return decision._replace(entry=entry, files=files)

    def _look_up(self, step: Step, key: str) -> tuple[_Entry | None, str]:
        """Return the entry of a key, and why it cannot be used; "" if it can or there is none."""
        if key in self._damaged_keys:
            return None, _UNREADABLE
        entry = self.store._find_entry(step.name, key)
        if entry is not None:
            return entry, self._find_fault(step, entry)
        if self.store._has_entry_file(step.name, key):
            return None, _UNREADABLE
        return None, ""

    def _list_parts(self, step: Step, arguments: Mapping[str, Any]) -> _Parts:
        """List the parts of a key that are not code; raise `_Opaque` for an opaque argument."""
        parts = {("python", ""): _PYTHON_VERSION}
        for name in step.needs:  # in this order, whatever that of the arguments is
            if name in arguments and not isinstance(arguments[name], _Unknown):
                parts["input", name] = self.fingerprint(name, arguments[name])
        for option in ("args", "outputs", "ignore"):
            value = getattr(step, option)
            if value:
                parts["option", option] = repr(value)
        if step.version is not None:
            parts["option", "version"] = _fingerprint(step.version)
        for name, dataset in self.find_datasets(step).items():
            parts["catalog", name] = str(dataset)
            for package, version in dataset.reader.items():
                parts["package", package] = version
        return parts

    def _explain_changes(
        self, step: Step, arguments: Mapping[str, Any], parts: _Parts, newest: _Entry
    ) -> str:
        """Say what differs from the newest entry of the step; "" if nothing known does."""
        code: list[str] = []
        fields: dict[str, list[str]] = {}  # class -> those that differ
        methods = []  # generated ones: they change with their class
        generators = []
        modules = []  # their members change with all that is bound there
        inputs = []
        others = []
        values = []
        for kind, name in {**newest.parts, **parts}:
            old = newest.parts.get((kind, name), "none")
            new = parts.get((kind, name), "none")
            if old == new:
                continue
            match kind:
                case "input" if new == "none" or name in step.mapped_values:
                    pass  # it is not known yet; another element always differs
                case "input" if name not in self.order.producers:
                    inputs.append(_explain_input(name, arguments[name], newest))
                case "input":
                    producer = self.order.producers[name].name
                    has_run = producer in self.finished_steps
                    values.append(f"after {producer}" if has_run else f"value {name} changed")
                case "option":
                    others.append(f"{name} changed")
                case "python":
                    others.append(f"Python {old} → {new}")
                case "package":
                    others.append(f"package {name} {old} → {new}")
                case "catalog":
                    old_path, new_path = old.split("/"), new.split("/")
                    while old_path[1:] and new_path[1:] and old_path[0] == new_path[0]:
                        del old_path[0], new_path[0]
                    others.append(f"catalog {name} {'/'.join(old_path)} → {'/'.join(new_path)}")
                case "module":
                    modules.append(f"module {name}")
                case "default" if ("input", name) in parts:
                    pass  # the input says more
                case "field":
                    class_name, _, field_name = name.rpartition(".")
                    text = (
                        f"{field_name} changed"
                        if "#" in old + new
                        else f"{field_name} {old} → {new}"
                    )
                    fields.setdefault(class_name, []).append(text)
                case "constant" if (kind, name) in self._moved_parts.get(step.name, ()):
                    generators.append(f"constant {name} changed while it ran")
                case "generated":
                    methods.append(f"helper {name}")
                case "function":
                    code.append(name)
                case _:
                    code.append(f"{kind} {name}")
        reasons = generators[:1] + inputs[:1]
        for class_name, texts in fields.items():
            code = [text for text in code if text != f"class {class_name}"]
            reasons.insert(0, f"class {class_name}: {', '.join(texts[:3])}")
        if not reasons:
            modules = modules or methods
        if code or modules:
            reasons.insert(0, f"code changed: {_join_names(code or modules, 3)}")
        return "; ".join(reasons or others[:1] or values[:1])

    def _find_fault(self, step: Step, entry: _Entry) -> str:
        """Say why an entry cannot be used any more; "" if it can."""
        age = time.time() - entry.created
        if isinstance(step.cache, timedelta) and age > step.cache.total_seconds():
            return "expired"
        for source in entry.sources:
            if isinstance(source, _DatasetSource):
                source.dataset = self.datasets.get(source.name)
            is_current = self._known_sources.get(source)
            if is_current is None:
                is_current = _is_current(source)
                if source.kind in ("code", "package"):  # they count as the run began with them
                    self._known_sources[source] = is_current
            if not is_current:
                return source.explain_change()
        return ""

    def _find_newest(self, step: Step) -> _Entry | None:
        """Return the newest entry from before this run, not that of another element."""
        if step.name not in self._newest:
            self._newest[step.name] = self.store._find_newest(step.name)
        return self._newest[step.name]

    def estimate_seconds(self, step: Step) -> float | None:
        """Return how long a step took when its newest entry was made."""
        newest = self._find_newest(step) if step.cache else None
        return newest.seconds if newest is not None else None

    def fingerprint(self, name: str, value: Any) -> str:
        """Return the fingerprint of a value; raise `_Opaque` if it has none."""
        examination = self._examinations.get(name)
        if examination is None or examination.value is not value:
            examination = _Examination(value, *_examine(value))
            self._examinations[name] = examination
            if examination.files:
                self._file_names.add(name)
        return examination.fingerprint

    def forget_values(self) -> None:
        """Take all fingerprints anew, because a step may have changed values in place."""
        self._examinations.clear()

    def forget_files(self) -> None:
        """Read the files that values name again, because a step may have written to them."""
        while self._file_names:
            self.forget_value(self._file_names.pop())

    def forget_value(self, name: str) -> None:
        """Let go of a value that is not needed any more."""
        self._examinations.pop(name, None)

    def find_datasets(self, step: Step) -> dict[str, Any]:
        """Return the datasets of the values of a step, by the names of the values."""
        if not self.datasets:
            return {}
        return {name: self.datasets[name] for name in step.values if name in self.datasets}

    def make_handles(self, step: Step, entry: _Entry) -> Mapping[str, Any]:
        """Map the names of the values of a step to handles of what an entry holds."""
        handles = self.store._make_handles(entry)
        if self.datasets:
            return _replace_handles(handles, step, entry, self.datasets)
        return handles

    def distrust(self, damage: _DamageError) -> None:
        """Prepare another run in which the result of a key is computed again."""
        self._damaged_keys.add(damage.key)
        self.finished_steps.clear()
        self.forget_values()

    def is_suspect(self, key: str) -> bool:
        """Return whether a value of this key could not be loaded."""
        return key in self._damaged_keys


def _is_current(source: _Source) -> bool:
    """Return whether a source is as it was; it may be gone, or no file any more."""
    try:
        return source.compute_fingerprint() == source.fingerprint
    except Exception:  # importing a module may raise anything, so may a dataset of the user
        return False


def _explain_input(name: str, value: Any, newest: _Entry) -> str:
    """Say how an input differs from that of the newest entry: ``input alpha 0.1 → 0.3``."""
    changes = []
    for label, text in _write_out(name, value).items():
        old_text = newest.texts.get(label, text)
        if text != old_text:
            changes.append(f"{label} {old_text} → {text}")
    if not changes and name in newest.texts and isinstance(value, os.PathLike):
        kind = "folder" if os.path.isdir(value) else "file"
        return f"{kind} {_shorten_path(os.fsdecode(value))} changed"
    return f"input {', '.join(changes[:3]) or f'{name} changed'}"


def _write_out(label: str, value: Any, depth: int = 3) -> dict[str, str]:
    """Write out a short value, or the short fields of a config: ``config.seed`` -> ``7``."""
    if isinstance(value, _TEXT_TYPES):
        return {label: _summarize(value)}
    fields = value
    if type(value) is not dict:
        kind = type(value)
        names = [*getattr(kind, "__dataclass_fields__", ())]
        names += getattr(kind, "__pydantic_fields__", ())
        names += [field.name for field in getattr(kind, "__attrs_attrs__", ())]
        fields = {name: getattr(value, name, None) for name in names}
    texts: dict[str, str] = {}
    if depth > 0:
        for name, field in itertools.islice(fields.items(), 50):
            texts |= _write_out(f"{label}.{name}", field, depth - 1)
    return texts


########################################################################################
### Maps
########################################################################################


class _Gap(Enum):
    """Stands in a list for an absent element."""

    PENDING = "not made yet"
    SKIPPED = "skipped"
    DROPPED = "not needed any more"


class _Elements(_Handle):
    """The list that a mapped step makes.

    Maps that go through it see its gaps, so that lists side by side keep their pairs; all others
    get a list without them. Each element is dropped after the last of these maps, the readers,
    unless something else needs the list as a whole.
    """

    def __init__(self, size: int, reader_count: int, is_needed_whole: bool) -> None:
        self.items: list[Any] = [_Gap.PENDING] * size
        self._reader_counts = [reader_count] * size
        self._is_needed_whole = is_needed_whole
        self._list: list[Any] | None = None
        self.unknown: _Unknown | None = None  # an element that only a run can make

    def __repr__(self) -> str:
        if self.holds(_Handle):
            return f"<list of {_count(len(self.list_items()), 'element')}>"
        return _summarize(self.list_items())

    @property
    def fingerprint(self) -> str:
        return _join_fingerprints(["list", *[_examine(item)[0] for item in self.list_items()]])

    @property
    def files(self) -> Sequence[_Source]:
        return [file for item in self.list_items() for file in _examine(item)[1]]

    def load(self) -> list[Any]:
        """Return the list: always the same one if all elements are in memory."""
        if self._list is not None:
            return self._list
        items = self.list_items()
        if self.holds(_Handle):
            return list(map(_load_value, items))
        self._list = items
        return items

    def list_items(self) -> list[Any]:
        return [item for item in self.items if not isinstance(item, _Gap)]

    def holds(self, kind: type) -> bool:
        return any(isinstance(item, kind) for item in self.items)

    def add(self, index: int, value: Any) -> None:
        if isinstance(value, _Unknown):
            self.unknown = value
        self.items[index] = value
        self._drop_if_unneeded(index)

    def release(self, index: int) -> None:
        """Take note that a reader has dealt with an element."""
        self._reader_counts[index] -= 1
        self._drop_if_unneeded(index)

    def _drop_if_unneeded(self, index: int) -> None:
        if self._reader_counts[index] == 0 and not self._is_needed_whole:
            self.items[index] = _Gap.DROPPED


# The statuses of elements, the weakest first. The strongest one is that of the step.
_STATUS_ORDER = (
    "skipped", "fresh", "cached", "ran", "maybe", "new", "stale", "uncached", "failed"
)  # fmt: skip


class _MapProgress:
    """A mapped step that is going on.

    ``arguments`` are all that the step takes, ``sources`` the lists that it goes through: those of
    another map may still be growing. ``depth`` is how many maps it follows, one through the other.
    """

    def __init__(
        self, step: Step, arguments: dict[str, Any], sources: dict[str, Any], depth: int
    ) -> None:
        self.step = step
        self.depth = depth
        self.results: dict[str, _Elements] = {}
        self._arguments = arguments
        self._followed = [source for source in sources.values() if isinstance(source, _Elements)]
        self._lists = {}
        for name, source in sources.items():
            self._lists[name] = source.items if isinstance(source, _Elements) else source
        sizes = {name: len(items) for name, items in self._lists.items()}
        if len(set(sizes.values())) > 1:
            texts = ", ".join(f"{name} {size}" for name, size in sizes.items())
            problem = f"maps over lists of different lengths: {texts}"
            raise step._error(problem, "expected equal lengths", ResultError)
        self.size = self.left = max(sizes.values())
        # Elements that are there and have not begun.
        self.backlog = iter([index for index in range(self.size) if self.is_ready(index)])
        self._states: list[_StepState | None] = [None] * self.size

    def is_ready(self, index: int) -> bool:
        return all(items[index] is not _Gap.PENDING for items in self._lists.values())

    def get_arguments(self, index: int) -> dict[str, Any]:
        elements = {name: items[index] for name, items in self._lists.items()}
        return {**self._arguments, **elements}

    def record(self, index: int, state: _StepState, values: Mapping[str, Any]) -> None:
        """Take what became of an element."""
        self.left -= 1
        self._states[index] = state
        for name, elements in self.results.items():
            elements.add(index, values[name])
        for source in self._followed:
            source.release(index)

    def summarize(self, is_plan: bool) -> _StepState:
        """Return the state of the step, from those of its elements."""
        states = [state for state in self._states if state is not None]
        status = "fresh" if is_plan else "cached"  # of an empty list
        if states:
            status = max([state.status for state in states], key=_STATUS_ORDER.index)
        if status == "skipped" or (status == "cached" and not self.step.cache):
            status = "ran"
        reasons = []
        error = None
        if status == "failed":
            failures = [i for i, state in enumerate(states) if state.status == "failed"]
            error = states[failures[0]].error
            numbers = ", ".join(map(str, failures[:12]))
            if len(failures) > 12:
                numbers += ", …"
            reasons.append(f"{len(failures)} of {_count(self.size, 'element')} failed: {numbers}")
        for reason_status in (status, "skipped"):
            group = [state for state in states if state.status == reason_status]
            group_reasons = [state.reason for state in group if state.reason]
            text = f"{len(group)} of {_count(self.size, 'element')}"
            if reason_status == "skipped" and group:
                reasons.append(": ".join([f"{text} skipped", *group_reasons[:1]]))
            elif group_reasons and len(group) < self.size:
                reasons.append(f"{text}, {group_reasons[0]}")
            elif group_reasons:
                reasons.append(group_reasons[0])
        fingerprints = [state.fingerprint for state in states]
        return _StepState(
            self.step.name,
            status,
            "; ".join(reasons),
            sum(state.seconds for state in states),
            max([state.attempts for state in states], default=1),
            error,
            saved=sum(state.saved for state in states),
            fingerprint=_join_fingerprints(fingerprints) if all(fingerprints) else "",
            elements=self.size,
        )


########################################################################################
### Calls
########################################################################################

# The executors, by id, that run the steps around this code; None outside of any step.
_outer_executors: ContextVar[tuple[int, ...] | None] = ContextVar("outer_executors", default=None)


class _Job(NamedTuple):
    """One call of a step's function, as it is sent to where it runs."""

    step: Step
    process_id: tuple[int, int]  # of the loop
    executors: tuple[int, ...]  # that run the call and the steps around it
    store: Store | None = None
    entry: _Entry | None = None  # under which to store the result; None: do not store it
    files: Sequence[_Source] = ()  # that arguments name, as they were before the call
    datasets: Mapping[str, Any] = {}  # of the catalog, for values of the step
    is_suspect: bool = False  # an earlier result could not be loaded: check whether this one can
    # Fingerprints of the arguments that count, if the step has to work on copies of its arguments.
    fingerprints: Mapping[str, str] | None = None
    texts: Collection[str] | None = None  # of the step's code; None: its reads do not matter
    variable_key: bytes = b""
    token: str = ""  # makes equal calls different for executors that reuse results


class _CallResult(NamedTuple):
    """The outcome of a call: the values that it returned, or the error that it raised.

    The error of a step is data. An error that is raised on a future is one of the executor.
    """

    values: Mapping[str, Any]  # by name; empty if they were stored
    seconds: float
    entry: _Entry | None = None  # under which they were stored
    error: BaseException | None = None
    traceback: str = ""  # of an error in another process
    sources: Sequence[_Source] = ()  # what the call has read
    problem: str = ""  # why the result must not be stored
    is_unsigned: bool = False  # the worker has another signing key: the loop keeps the result

    def get_value(self, name: str) -> Any:
        return self.values[name]

    def drop_values(self) -> _CallResult:
        return self._replace(values={})


def _get_process_id() -> tuple[int, int]:
    """Identify this interpreter: several in one process have modules of their own."""
    return os.getpid(), id(sys.modules)


class _RemoteTraceback(Exception):
    """The cause of an error from another process; shows the traceback that it had there."""

    def __str__(self) -> str:
        return f"in another process:\n{self.args[0]}"


def _call_step(job: _Job, arguments: Mapping[str, Any]) -> _CallResult:
    """Call the function of a step and keep its result. Never raises."""
    is_here = job.process_id == _get_process_id()
    token = _outer_executors.set(job.executors if is_here else ())
    start = _clock()
    try:
        call = _Call(job, arguments)
        start = _clock()
        with call.record_reads() as call.reads:
            result = _call_with(job.step, call.arguments)
            if type(result) is CoroutineType:  # the function did not look like one that makes it
                event_loop = _EventLoopThread()
                try:
                    result = event_loop.run(result)
                finally:
                    event_loop.close()
        return call.finish(result, _clock() - start)
    except BaseException as error:
        return _make_failure(job, error, _clock() - start)
    finally:
        _outer_executors.reset(token)


async def _await_step(job: _Job, arguments: Mapping[str, Any]) -> _CallResult:
    """Do the same for a coroutine function, in the event loop."""
    _outer_executors.set(job.executors)  # of this task only
    start = _clock()
    try:
        call = _Call(job, arguments)
        start = _clock()
        with call.record_reads() as call.reads:
            result = await _call_with(job.step, call.arguments)
        return call.finish(result, _clock() - start)
    except BaseException as error:
        return _make_failure(job, error, _clock() - start)


_NOT_RECORDED = contextlib.nullcontext()


class _Call:
    """A call in progress: its arguments, what it reads, and what it changes in place."""

    def __init__(self, job: _Job, arguments: Mapping[str, Any]) -> None:
        self.job = job
        self.originals = {name: _load_value(value) for name, value in arguments.items()}
        self.arguments = self.originals
        self.watched_names: list[str] = []  # of arguments that the call must not change
        self.reads: _Reads | None = None
        self.fingerprints = dict(job.fingerprints or {})
        if job.fingerprints is None or job.process_id != _get_process_id():
            return  # what comes from another process is a copy already
        values = {}
        for name, value in arguments.items():
            items = value.list_items() if isinstance(value, _Elements) else [value]
            kinds = _StoredHandle | _CatalogHandle | _RemoteHandle
            if items and all(isinstance(item, kinds) for item in items):
                continue  # loading has made copies
            values[name] = self.originals[name]
            if isinstance(value, _Handle) and name in self.fingerprints:
                # That of a handle of several values is made of theirs.
                self.fingerprints[name] = _fingerprint(values[name])
        names = [name for name in values if name not in self.fingerprints]
        for name, default in job.step.defaults.items():
            if name in values and values[name] is default:
                names.append(name)
        copies, self.watched_names = _copy_arguments(values, names, self.fingerprints)
        self.arguments = {**self.originals, **copies}

    def record_reads(self) -> AbstractContextManager[_Reads | None]:
        if self.job.texts is None:
            return _NOT_RECORDED
        texts = {*self.job.texts, *_find_texts(list(self.arguments.values()))}
        return _Reads(texts, self.job.variable_key)

    def finish(self, result: Any, seconds: float) -> _CallResult:
        job = self.job
        sources = [] if self.reads is None else self.reads.list_sources()
        problem = ""
        if job.fingerprints is not None:
            changed_names = _find_changes(self.originals, self.watched_names, self.fingerprints)
            if changed_names:
                names = _join_names(map(repr, changed_names))
                problem = f"changed {names} in place, which cannot be copied faithfully"
            elif job.step.outputs:
                problem = _find_sharing(_name_values(job.step, result), job.step.outputs)
        return _keep_result(job, result, seconds, sources, problem)


def _keep_result(
    job: _Job, result: Any, seconds: float, reads: Sequence[_Source], problem: str
) -> _CallResult:
    """Name the values that a step returned; keep them in the catalog and store, if they are to be.

    Raises ``ResultError`` if the step returned something that cannot be its result.
    """
    step = job.step
    values: Mapping[str, Any] = _name_values(step, result)
    if step.poke is not None and not _is_true(result):
        # A sensor that has seen nothing has no value yet.
        return _CallResult(values, seconds, sources=reads)
    if job.entry is not None and job.process_id != _get_process_id():
        variable_key = _make_variable_key()
        # The key may have been set after the worker began.
        if not variable_key or variable_key != job.variable_key:
            return _CallResult(values, seconds, sources=reads, problem=problem, is_unsigned=True)
    sources: list[_Source] = []
    if job.datasets:
        values, sources = _save_to_catalog(job.datasets, values)
    call_result = _CallResult(values, seconds, sources=reads, problem=problem)
    entry = job.entry
    if entry is None or job.store is None or problem:
        return call_result
    if not all(map(_is_current, job.files)):
        return call_result
    entry.seconds = seconds
    entry.sources = [*sources, *reads]
    names = step.outputs or (step.name,)
    if not job.store._save(entry, {name: values[name] for name in names}):
        return call_result
    if job.is_suspect:
        try:
            for handle in job.store._make_handles(entry).values():
                handle.load()
        except _DamageError:  # some objects can be pickled, but not unpickled
            return call_result
    return call_result._replace(values={}, entry=entry)


def _is_true(value: Any) -> bool:
    """Return whether a sensor has seen something; an array may have no truth value."""
    try:
        return bool(value)
    except Exception:
        return True


def _make_failure(job: _Job, error: BaseException, seconds: float) -> _CallResult:
    """Make the result of a call that raised; in another process only of what can be sent home."""
    if job.process_id == _get_process_id():
        return _CallResult({}, seconds, error=error)
    import traceback

    text = _describe_error(error)
    is_portable = False
    with contextlib.suppress(Exception):  # both lines run code of the error's class
        text = "".join(traceback.format_exception(error)).rstrip()
        is_portable = type(pickle.loads(pickle.dumps(error))) is type(error)
    if not is_portable:
        advice = "only its text could be sent to this process: let its class be pickled"
        error = job.step._error(f"raised {_describe_error(error)}", advice, WorkerError)
    return _CallResult({}, seconds, error=error, traceback=text)


_POOLS_THAT_PICKLE = ("ProcessPoolExecutor", "InterpreterPoolExecutor")


class _Pool:
    """Where calls run: in this thread, on an executor, or in an event loop.

    ``is_portable`` says whether another process can read and write what the catalog holds.
    """

    def __init__(self, executor: Any, is_portable: bool) -> None:
        outer_executors = _outer_executors.get()
        self.is_nested = outer_executors is not None  # whether a step runs this pipeline
        self.executors = outer_executors or ()
        if id(executor) in self.executors:
            executor = None  # all its workers may be waiting for this pipeline
        self.executor = executor
        self.most_calls = 1
        if executor is not None:
            self.executors += (id(executor),)
            # Enough to keep all workers busy, few enough for a map over a million elements.
            self.most_calls = 4 * self.count_workers() + 4
        names = {cls.__name__ for cls in type(executor).__mro__}  # loky and joblib have the same
        self.has_processes = not names.isdisjoint(_POOLS_THAT_PICKLE)
        is_known = self.has_processes or "ThreadPoolExecutor" in names
        # Whether this process has to load the arguments and to keep the results.
        self.is_remote = not is_known or (self.has_processes and not is_portable)
        self._event_loop = _EventLoopThread()

    def count_workers(self) -> int:
        return getattr(self.executor, "_max_workers", None) or os.cpu_count() or 1

    def sends(self, step: Step) -> bool:
        """Return whether calls of a step go to the executor."""
        return self.executor is not None and not step.local and not step.is_async

    def prepare_arguments(self, job: _Job, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the arguments as they are sent to where the call runs."""
        if self.is_remote and self.sends(job.step):
            return {name: _load_value(value) for name, value in arguments.items()}
        return arguments

    def submit(self, job: _Job, arguments: Mapping[str, Any]) -> Any:
        """Send a call away and return its future; None if it is to be made in this thread."""
        if job.step.is_async:
            return self._event_loop.submit(_await_step(job, arguments))
        if not self.sends(job.step):
            return None
        if self.is_remote:
            job = job._replace(store=None, entry=None, files=(), datasets={}, is_suspect=False)
            job = job._replace(token=os.urandom(8).hex())
        return self.executor.submit(_call_step, job, arguments)

    def get_result(self, job: _Job, future: Any) -> _CallResult:
        """Return the result of a call that is done. An error that is raised is the executor's."""
        result: _CallResult = future.result()
        is_kept_here = (self.is_remote and self.sends(job.step)) or result.is_unsigned
        if is_kept_here and result.error is None:
            try:
                value = result.values[job.step.name]
                result = _keep_result(job, value, result.seconds, result.sources, result.problem)
            except Exception as error:  # of the catalog
                result = _make_failure(job, error, result.seconds)
        return result

    def close(self) -> None:
        self._event_loop.close()


class _RemoteHandle(_Handle):
    """A value that stays on the workers of a Dask cluster."""

    where = "on the cluster"

    def __init__(self, client: Any, call: Any, name: str) -> None:
        self.client = client
        self.future = client.submit(_CallResult.get_value, call, name, pure=False)

    @property
    def fingerprint(self) -> str:
        return str(self.client.submit(_fingerprint, self.future, pure=False).result())

    def load(self) -> Any:
        return self.future.result()


class _DaskPool(_Pool):
    """The workers of a Dask cluster. Values stay there until this process needs them."""

    def __init__(self, client: Any) -> None:
        super().__init__(client, is_portable=False)
        self._calls: dict[Any, Any] = {}  # future of a report -> future of the call

    def count_workers(self) -> int:
        with contextlib.suppress(Exception):  # it was closed, as its submit() will say
            return sum(self.executor.nthreads().values()) or 1
        return 1

    def stays(self, job: _Job) -> bool:
        """Return whether the values of a call stay on the workers."""
        is_kept_here = job.entry is not None or job.datasets or job.step.poke is not None
        return self.sends(job.step) and not is_kept_here

    def prepare_arguments(self, job: _Job, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.sends(job.step):
            return {name: _find_future(value) for name, value in arguments.items()}
        return super().prepare_arguments(job, arguments)

    def submit(self, job: _Job, arguments: Mapping[str, Any]) -> Any:
        if not self.stays(job):
            return super().submit(job, arguments)
        # Equal calls need not have equal results: pure=False.
        call = self.executor.submit(_call_step, job, arguments, pure=False)
        report = self.executor.submit(_CallResult.drop_values, call, pure=False)
        self._calls[report] = call
        return report

    def get_result(self, job: _Job, future: Any) -> _CallResult:
        if future not in self._calls:
            return super().get_result(job, future)
        call = self._calls.pop(future)
        result: _CallResult = future.result()
        if result.error is None:
            handles = {name: _RemoteHandle(self.executor, call, name) for name in job.step.values}
            result = result._replace(values=handles)
        return result


def _find_future(value: Any) -> Any:
    """Return what stands for a value in the call of a Dask client: a future, or the value."""
    if isinstance(value, _RemoteHandle):
        return value.future
    if isinstance(value, _Elements):
        return [_find_future(item) for item in value.list_items()]
    return _load_value(value)


########################################################################################
### Loop
########################################################################################

_MOST_COROUTINES = 100  # in flight
_LOCK_POLL_INTERVAL = 0.02  # seconds
_TICK_INTERVAL = 0.25  # seconds
_MOST_RESTARTS = 20
_LONGEST_DELAY = 86_400.0  # seconds

# Raised if an executor was shut down, the last one by Dask.
_SHUT_DOWN = ("CancelledError", "FutureCancelledError", "ClosedClientError")


def _find_delay(step: Step, attempt: int) -> float:
    """Return the seconds between a try that failed and the next one; at most a day."""
    try:
        delay = step.retry_delay * step.retry_backoff ** (attempt - 1)
    except OverflowError:
        return _LONGEST_DELAY
    return delay if delay < _LONGEST_DELAY else _LONGEST_DELAY  # 0 times infinity is nan


@dataclass(slots=True, eq=False)
class _Task:
    """A call that the loop has to make: of a step, or for one element of a mapped step."""

    step: Step
    progress: _MapProgress | None = None
    index: int = 0
    is_begun: bool = False
    attempts: int = 0
    checks: int = 0  # of a sensor, in vain
    first_check: float = 0.0  # of a sensor, by the clock
    reason: str = ""
    lock: str = ""  # the key that it has locked
    job: _Job | None = None


class _Policy(NamedTuple):
    """How a pipeline runs or plans its steps."""

    reuse: _Reuse
    executor: Any = None
    on_error: str = "raise"
    listeners: Any = None  # with emit(), tick() and wants_ticks; None without listeners
    is_plan: bool = False


class _Loop:
    """The ready/done loop: runs or plans the steps of an order.

    A step goes waiting -> ready -> running -> done. A mapped step has one task for each element,
    any other step has one. A plan is a run that calls nothing: the values of a step that would run
    are `_Unknown`. The thread that called ``run`` does everything but the calls. Futures that are
    done come into the queue ``done``.
    """

    def __init__(self, results: _Results, policy: _Policy) -> None:
        self.results = results
        self.policy = policy
        self.reuse = policy.reuse
        self.order = results.order
        self.process_id = _get_process_id()
        self.open_steps: deque[Step] = deque()  # that wait for nothing any more
        self.ready_calls: list[tuple[Any, ...]] = []  # heaps of urgency and task
        self.ready_coroutines: list[tuple[Any, ...]] = []
        self.later: list[tuple[float, int, _Task]] = []  # heap of time and task
        self.running: dict[Any, _Task] = {}  # by their futures
        self.coroutine_count = 0  # of the running tasks
        self.done: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of futures
        self.maps: dict[str, _MapProgress] = {}  # that are going on, by the names of their values
        self.locked_keys: set[str] = set()
        self.lost_steps: set[str] = set()  # that ran in a pool of processes when it broke
        self.counter = itertools.count()  # breaks ties in heaps
        self.outer_reads = _current_reads.get()  # of a step that runs this pipeline
        self.problems: set[str] = set()  # for which a warning was issued
        # How many steps, and the caller, still need each value. Inputs stay with the run.
        self.uses = Counter([*self.order.targets, *results.values])
        self.waiting: dict[str, set[str]] = {}  # step -> steps that it waits for
        self.dependents: dict[str, list[Step]] = {}
        producers = self.order.producers
        for step in self.order.steps:
            self.uses.update(step.needs)
            names = {producers[name].name for name in step.dependencies if name in producers}
            self.waiting[step.name] = names
            for name in names:
                self.dependents.setdefault(name, []).append(step)
        self.pool = self.make_pool()
        self.ranks = self.rank_steps()

    def make_pool(self) -> _Pool:
        if self.policy.is_plan:
            return _Pool(None, is_portable=True)
        if hasattr(self.policy.executor, "scatter"):  # a dask.distributed.Client
            return _DaskPool(self.policy.executor)
        handles = [v for v in self.results.values.values() if isinstance(v, _CatalogHandle)]
        places = [*self.reuse.datasets.values(), *handles]
        return _Pool(self.policy.executor, all(place.is_local for place in places))

    def rank_steps(self) -> dict[str, float]:
        """Rank the steps, the most urgent lowest.

        On an executor a step goes first if the longest way remains behind it, in seconds. In this
        thread the steps run in their order.
        """
        if self.pool.executor is None:
            return {step.name: rank for rank, step in enumerate(self.order.steps)}
        estimates = {step.name: self.reuse.estimate_seconds(step) for step in self.order.steps}
        known = [seconds for seconds in estimates.values() if seconds is not None]
        usual = sum(known) / len(known) if known else 1.0
        ranks: dict[str, float] = {}
        for step in reversed(self.order.steps):
            seconds = estimates[step.name]
            behind = [ranks[dependent.name] for dependent in self.dependents.get(step.name, ())]
            ranks[step.name] = min(behind, default=0.0) - (usual if seconds is None else seconds)
        return ranks

    # 1. Turns

    def run(self) -> None:
        """Go on until all steps are done, or until an error ends the run: ``results.failure``.

        Raises `_DamageError` if a stored value cannot be loaded.
        """
        self.open_steps.extend([step for step in self.order.steps if not self.waiting[step.name]])
        try:
            while self.running or (self.results.failure is None and self.has_tasks()):
                self.take_turn()
            self.fetch_targets()
        except _DamageError:
            self.cancel_running()
            while self.running:  # or a step could run twice at a time when the run begins again
                del self.running[self.done.get()]
            raise
        except KeyboardInterrupt as error:  # while this thread was not in a step
            self.results.failure = error.with_traceback(None)
            for task in self.running.values():
                if task.step.name not in self.results.states:
                    self.end(_StepState(task.step.name, "failed", error=error))
        finally:
            self.cancel_running()
            for key in self.locked_keys:
                self.reuse.store._locks.release(key)
            self.pool.close()

    def has_tasks(self) -> bool:
        return bool(self.open_steps or self.ready_calls or self.ready_coroutines or self.later)

    def take_turn(self) -> None:
        """Begin the most urgent task if there is room for it, or wait for what comes next."""
        wait_seconds = _LONGEST_DELAY  # a queue cannot wait for ever
        if self.results.failure is None:
            while self.open_steps:
                self.open_step(self.open_steps.popleft())
            while self.later and self.later[0][0] <= _clock():
                self.push(heapq.heappop(self.later)[-1])
            task = self.pop_ready()
            if task is not None:
                self.begin(task)
                if self.done.empty():
                    return
            elif self.later:
                wait_seconds = min(wait_seconds, max(0.0, self.later[0][0] - _clock()))
            elif not self.running:
                return
        self.receive_next(wait_seconds)

    def pop_ready(self) -> _Task | None:
        """Return the most urgent task for which there is room."""
        coroutines = self.ready_coroutines
        calls = self.ready_calls
        task: _Task | None = None
        is_call_first = bool(calls) and bool(coroutines) and calls[0] < coroutines[0]
        if coroutines and not is_call_first and self.coroutine_count < _MOST_COROUTINES:
            task = heapq.heappop(coroutines)[-1]
        elif calls and len(self.running) - self.coroutine_count < self.pool.most_calls:
            task = heapq.heappop(calls)[-1]
        return task

    def receive_next(self, wait_seconds: float) -> None:
        """Take the result of the next task that is done, after at most so many seconds."""
        listeners = self.policy.listeners
        wants_ticks = listeners is not None and listeners.wants_ticks
        if wants_ticks:
            wait_seconds = min(_TICK_INTERVAL, wait_seconds)
        try:
            future = self.done.get(timeout=wait_seconds)
        except queue.Empty:
            if wants_ticks:
                listeners.tick()
            return
        task = self.running.pop(future)
        if task.step.is_async:
            self.coroutine_count -= 1
        if self.results.failure is not None and future.cancelled():
            return
        assert task.job is not None
        try:
            result = self.pool.get_result(task.job, future)
        except Exception as error:
            result = _CallResult({}, 0.0, error=self.explain_loss(task, error, is_sent=True))
        self.receive(task, result)

    def push(self, task: _Task) -> None:
        """Make a task ready.

        What goes through a list that another map is still making comes first, so that an element
        is taken through a chain of maps before the next one begins. Elements go by their index, so
        that maps side by side keep pace. Coroutines come before calls: they hold nothing up.
        """
        is_call = not task.step.is_async
        depth = 0.0 if is_call else math.inf
        if task.progress is not None:
            depth = task.progress.depth
        rank = self.ranks[task.step.name]
        urgency = (-depth, is_call, task.index, rank, next(self.counter), task)
        heapq.heappush(self.ready_calls if is_call else self.ready_coroutines, urgency)

    def push_later(self, task: _Task, seconds: float) -> None:
        heapq.heappush(self.later, (_clock() + seconds, next(self.counter), task))

    # 2. A step, or an element of it, begins

    def open_step(self, step: Step) -> None:
        """Make the tasks of a step, or skip it; all that it waits for is done or going on."""
        if step.name in self.results.states:
            return
        blocker = self.results.find_blocker(step)
        if blocker:
            self.end(_StepState(step.name, "skipped", f"needs {blocker}"))
        elif not step.map:
            self.push(_Task(step))
        elif step.name not in self.maps:
            self.open_map(step)

    def open_map(self, step: Step) -> None:
        arguments = self.results.get_arguments(step)
        sources = {}
        depth = 0
        try:
            for name in step.mapped_values:
                if name in self.maps:
                    sources[name] = self.maps[name].results[name]
                    depth = max(depth, self.maps[name].depth + 1)
                else:
                    sources[name] = _find_elements(step, name, arguments[name])
            if any(isinstance(source, _Unknown) for source in sources.values()):
                self.push(_Task(step))
                return
            progress = _MapProgress(step, arguments, sources, depth)
        except _DamageError:
            raise
        except Exception as error:
            if self.policy.is_plan:  # a run will say what is wrong
                self.push(_Task(step))
            else:
                self.fail(_Task(step), error, 0.0)
            return
        if self.policy.is_plan and not step.cache and progress.size:
            self.push(_Task(step))  # there is nothing to decide about the elements
            return
        dependents = self.dependents.get(step.name, ())
        for name in step.values:
            takers = [dependent for dependent in dependents if name in dependent.needs]
            readers = [taker for taker in takers if name in taker.mapped_values]
            is_needed_whole = name in self.order.targets or len(readers) < len(takers)
            progress.results[name] = _Elements(progress.size, len(readers), is_needed_whole)
            self.maps[name] = progress
        for dependent in dependents:
            if self.can_follow(dependent, step):
                self.stop_waiting(dependent, step)
        if progress.size == 0:
            self.close_map(progress)
        self.feed(progress)

    def can_follow(self, dependent: Step, step: Step) -> bool:
        """Return whether a step takes all that it needs of a mapped step element by element."""
        for name in dependent.dependencies:
            if self.order.producers.get(name) is step:
                # An argument with a default must know whether the mapped step fails.
                is_followed = name in dependent.mapped_values and name not in dependent.defaults
                if not is_followed or name in dependent.after:
                    return False
        return True

    def feed(self, progress: _MapProgress) -> None:
        """Make the next element ready: one at a time, because there may be a million."""
        index = next(progress.backlog, None)
        if index is not None:
            self.push(_Task(progress.step, progress, index))

    def begin(self, task: _Task) -> None:
        """Reuse the result of a call, make the call, or say in a plan that a run would make it."""
        step = task.step
        if step.name in self.results.states:  # another element has ended it
            return
        arguments = self.get_arguments(task)
        if self.outer_reads is not None:
            for value in arguments.values():
                if isinstance(value, _CatalogHandle) and isinstance(value.dataset, _FileDataset):
                    path = value.dataset.absolute_path
                    source = _ReadSource(path, _compute_file_fingerprint(path))
                    self.outer_reads.inherit([source])
        if task.progress is not None:
            if not task.is_begun:
                task.is_begun = True
                self.feed(task.progress)
            if any(value is _Gap.SKIPPED for value in arguments.values()):
                self.skip_element(task, "", 0.0)
                return
        if self.policy.is_plan:
            for name, value in arguments.items():
                if isinstance(value, _Elements):
                    arguments[name] = value.unknown or value
        try:
            decision = self.decide(task, arguments)
        except Exception as error:  # a dataset of the user, or a lost cluster
            self.fail(task, error, 0.0)
            return
        if decision is None:  # another thread or process computes it
            self.reuse.forget_files()
            self.push_later(task, _LOCK_POLL_INTERVAL)
        elif decision.status == "fresh":
            entry = decision.entry
            assert entry is not None
            if self.outer_reads is not None:
                self.outer_reads.inherit(entry.sources)
            status = "fresh" if self.policy.is_plan else "cached"
            fingerprint = entry.fingerprint
            state = _StepState(step.name, status, saved=entry.seconds, fingerprint=fingerprint)
            self.complete(task, self.reuse.make_handles(step, entry), state)
        elif self.policy.is_plan:
            unknown = _Unknown(decision.cause or step.name)
            state = _StepState(step.name, decision.status, decision.reason)
            self.complete(task, dict.fromkeys(step.values, unknown), state)
        else:
            task.reason = decision.reason
            self.call(task, arguments, decision)

    def get_arguments(self, task: _Task) -> dict[str, Any]:
        if task.progress is not None:
            return task.progress.get_arguments(task.index)
        return self.results.get_arguments(task.step)

    def decide(self, task: _Task, arguments: Mapping[str, Any]) -> _Decision | None:
        """Decide about a call. Lock its key if it has to be made; None if the key is locked."""
        decision = self.reuse.decide(task.step, arguments)
        entry = decision.entry
        if entry is None or decision.status == "fresh" or self.policy.is_plan:
            return decision
        # A pipeline inside a step does not wait: the holder of the lock may wait for that step.
        if self.pool.is_nested or task.lock == entry.key:
            return decision
        store = self.reuse.store
        if not store._folder.open(create=True):
            return decision
        self.release_lock(task)
        if not store._locks.acquire(entry.key):
            return None
        task.lock = entry.key
        self.locked_keys.add(entry.key)
        if store._has_entry_file(entry.step, entry.key):  # it was computed in the meantime
            return self.reuse.decide(task.step, arguments)
        return decision

    def call(self, task: _Task, arguments: Mapping[str, Any], decision: _Decision) -> None:
        step = task.step
        entry = decision.entry
        if entry is None:
            self.reuse.forget_values()  # it may change what it is given
        datasets = self.reuse.find_datasets(step)
        job = _Job(step, self.process_id, self.pool.executors, datasets=datasets)
        if self.outer_reads is not None:
            job = job._replace(texts=(), variable_key=self.reuse.variable_key)
        if entry is not None:
            job = job._replace(
                store=self.reuse.store,
                entry=entry,
                files=decision.files,
                is_suspect=self.reuse.is_suspect(entry.key),
                fingerprints={n: f for (kind, n), f in entry.parts.items() if kind == "input"},
                texts=self.reuse.texts[step.name],
                variable_key=self.reuse.variable_key,
            )
        task.job = job
        if self.policy.listeners is not None and task.attempts == 0 and task.checks == 0:
            kind = "step submitted" if self.pool.sends(step) else "step started"
            self.emit(kind, _StepState(step.name, "running", task.reason), task)
        task.attempts += 1
        try:
            arguments = self.pool.prepare_arguments(job, arguments)
        except Exception as error:  # a value could not be loaded
            self.receive(task, _CallResult({}, 0.0, error=error))
            return
        try:
            future = self.pool.submit(job, arguments)
            if future is not None:
                future.add_done_callback(self.done.put)
        except Exception as error:  # the executor was shut down, or has lost its workers
            self.fail(task, self.explain_loss(task, error, is_sent=False), 0.0)
            return
        if future is None:
            self.receive(task, _call_step(job, arguments))
            return
        self.running[future] = task
        if step.is_async:
            self.coroutine_count += 1

    # 3. A step, or an element of it, ends

    def receive(self, task: _Task, result: _CallResult) -> None:
        """Take what a call returned or raised."""
        step = task.step
        if task.lock:
            self.release_lock(task)
        if self.outer_reads is not None:
            self.outer_reads.inherit(result.sources)
        if result.problem:
            problem = f"step '{step.name}' {result.problem}: its result is not kept"
            if problem not in self.problems:
                self.problems.add(problem)
                _warn(problem)
        if result.entry is None:
            self.reuse.forget_values()  # it may have changed what it was given, up to now
        if step.name in self.results.states:  # another element has ended it
            return
        if result.error is not None:
            error = result.error
            if result.traceback:
                if isinstance(error, SystemExit):
                    error = SystemExit(*error.args)  # Dask loses the code on the way
                # Not by assignment: the error may be a frozen dataclass.
                BaseException.__setattr__(error, "__cause__", _RemoteTraceback(result.traceback))
            self.handle_error(task, error, result.seconds)
            return
        values = result.values
        fingerprint = ""
        if result.entry is not None:
            values = self.reuse.make_handles(step, result.entry)
            fingerprint = result.entry.fingerprint
        elif step.poke is not None and not _is_true(values[step.name]):
            self.check_again(task, step.poke)
            return
        state = _StepState(
            step.name, "ran", task.reason, result.seconds, task.attempts, fingerprint=fingerprint
        )
        self.complete(task, values, state)

    def handle_error(self, task: _Task, error: BaseException, seconds: float) -> None:
        """Begin the run again, skip an element, try again later, or let the step fail."""
        step = task.step
        can_retry = isinstance(error, Exception) and not isinstance(error, Skip | ResultError)
        if isinstance(error, _DamageError):
            raise error
        if isinstance(error, Skip) and task.progress is not None:
            self.skip_element(task, _get_message(error), seconds)
        elif can_retry and task.attempts <= step.retries:
            state = _StepState(step.name, "running", "", seconds, task.attempts, error)
            self.emit("step retried", state, task)
            self.push_later(task, _find_delay(step, task.attempts))
        else:
            self.fail(task, error, seconds)

    def check_again(self, task: _Task, poke: _Poke) -> None:
        """Check a sensor later, or give it up."""
        step = task.step
        task.attempts -= 1
        task.checks += 1
        task.first_check = task.first_check or _clock()
        waited = _clock() - task.first_check
        self.emit("step poked", _StepState(step.name, "running", attempts=task.checks), task)
        text = f"saw nothing within {poke.timeout:g} s, in {_count(task.checks, 'check')}"
        if waited < poke.timeout:
            self.push_later(task, poke.interval)
        elif poke.soft_fail:
            self.end(_StepState(step.name, "skipped", text, waited, task.checks))
        else:
            advice = "increase timeout=, or check why the condition is never met"
            self.fail(task, step._error(text, advice, SensorTimeoutError), waited)

    def skip_element(self, task: _Task, reason: str, seconds: float) -> None:
        state = _StepState(task.step.name, "skipped", reason, seconds, task.attempts)
        self.complete(task, dict.fromkeys(task.step.values, _Gap.SKIPPED), state)

    def complete(self, task: _Task, values: Mapping[str, Any], state: _StepState) -> None:
        """Take the values of a step, or of an element."""
        progress = task.progress
        if progress is None:
            self.keep_values(values)
            self.end(state)
            return
        progress.record(task.index, state, values)
        self.emit("map progress", state, task)
        for dependent in self.dependents.get(task.step.name, ()):
            follower = self.maps.get(dependent.name)
            if follower is not None and follower.is_ready(task.index):
                self.push(_Task(dependent, follower, task.index))
        if progress.left == 0:
            self.close_map(progress)

    def close_map(self, progress: _MapProgress) -> None:
        state = progress.summarize(self.policy.is_plan)
        if state.status != "failed":
            self.keep_values(progress.results)
        self.end(state)

    def keep_values(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if self.uses[name] and name in self.order.producers:  # needed, and not given
                self.results.values[name] = value

    def fail(self, task: _Task, error: BaseException, seconds: float) -> None:
        arguments = None
        index = None
        if task.progress is not None:
            index = task.index
            arguments = self.get_arguments(task)
            if not self.results.is_fatal(error):  # the other elements go on
                self.results.add_note(task.step, error, index, arguments)
                state = _StepState(task.step.name, "failed", "", seconds, task.attempts, error)
                self.complete(task, dict.fromkeys(task.step.values, _Gap.SKIPPED), state)
                return
        self.results.record_error(task.step, error, seconds, task.attempts, index, arguments)
        if self.results.failure is not None:
            self.cancel_running()
        self.end(self.results.states[task.step.name])

    def end(self, state: _StepState) -> None:
        """Record that a step is done, drop what only it needed, and open what waited for it."""
        self.results.record(state)
        self.emit("step finished", state)
        step = self.order.producers[state.name]
        if state.status == "ran":
            self.reuse.finished_steps.add(step.name)
        if state.status != "cached":
            self.reuse.forget_files()
        for name in step.needs:
            self.uses[name] -= 1
            if self.uses[name] == 0:
                self.results.values.pop(name, None)
                self.reuse.forget_value(name)
        if step.map:
            for name in step.values:
                self.maps.pop(name, None)
        for dependent in self.dependents.get(step.name, ()):
            self.stop_waiting(dependent, step)
            if dependent.name in self.maps and state.status in ("failed", "skipped"):
                self.open_steps.append(dependent)  # it followed this one: skip it

    def stop_waiting(self, dependent: Step, step: Step) -> None:
        """Let a step not wait for another one any more; open it if that was the last one."""
        waiting = self.waiting[dependent.name]
        if step.name in waiting:
            waiting.remove(step.name)
            if not waiting:
                self.open_steps.append(dependent)

    def fetch_targets(self) -> None:
        """Load targets that are on a cluster, which may be gone when they are asked for."""
        for name in self.order.targets:
            value = self.results.values.get(name)
            if isinstance(value, _Elements) and not value.holds(_RemoteHandle):
                continue
            if isinstance(value, _Elements | _RemoteHandle):
                try:
                    self.results.values[name] = value.load()
                except _DamageError:
                    raise
                except Exception as error:  # it cannot be sent, or its worker is gone
                    step = self.order.producers[name]
                    del self.results.values[name]
                    loss = self.explain_loss(_Task(step), error, is_sent=True)
                    self.results.record_error(step, loss, 0.0)

    def cancel_running(self) -> None:
        for future in list(self.running):
            future.cancel()

    def release_lock(self, task: _Task) -> None:
        if task.lock:
            self.reuse.store._locks.release(task.lock)
            self.locked_keys.discard(task.lock)
            task.lock = ""

    def emit(self, kind: str, state: _StepState, task: _Task | None = None) -> None:
        listeners = self.policy.listeners
        if listeners is None:
            return
        facts = {}
        progress = self.maps.get(state.name)
        if progress is not None:
            facts = {"done": progress.size - progress.left, "total": progress.size}
            if task is not None:
                facts["index"] = task.index
        listeners.emit(kind, state.name, state=state, **facts)

    def explain_loss(self, task: _Task, error: Exception, is_sent: bool) -> DagkitError:
        """Make the error of a call that an executor could not take, or has lost."""
        step = task.step
        text = _describe_error(error)
        kind = type(error).__name__
        if "NotShareableError" in text:  # its message shows all that was sent
            text = "NotShareableError"
        is_broken = kind.startswith("Broken") or kind == "TerminatedWorkerError"
        if is_broken and is_sent and self.pool.has_processes and not self.lost_steps:
            self.lost_steps = self.find_lost_steps(task)
        names = self.lost_steps
        if kind == "KilledWorker":  # of Dask, which goes on without this worker
            names = {step.name}
        if step.name in names:
            problem = f"a worker process died while it ran {_join_names(map(repr, names))}"
            advice = (
                "a script that starts processes needs `if __name__ == '__main__':`; otherwise "
                "check what kills the worker, such as a lack of memory"
            )
            text = f"{problem}\n  {step.definition}\n  {text}\n  {advice}"
            return WorkerError(text, step=step.name)
        if is_broken:
            problem = "did not run, because the executor is broken"
            advice = "make a new executor"
        elif "shutdown" in text or kind in _SHUT_DOWN:
            problem = "did not run, because the executor was shut down"
            advice = "make a new executor, and shut it down after the run"
        else:
            problem = "could not be sent to the executor, or its result back"
            advice = (
                "define functions at the level of a module, or use loky or Dask, which send code "
                "too; pass and return what can be pickled; or keep the step here: local=True"
            )
        return step._error(f"{problem}: {text}", advice, WorkerError)

    def find_lost_steps(self, task: _Task) -> set[str]:
        """Return the steps whose calls the workers were making when a pool of processes broke.

        The first call of which we learn is the oldest. Calls begin in the order in which they are
        sent, so the others are the next ones that have no result.
        """
        tasks = [task]
        for future, other in self.running.items():
            has_result = future.done() and (future.cancelled() or future.exception() is None)
            if self.pool.sends(other.step) and not has_result:
                tasks.append(other)
        return {other.step.name for other in tasks[: self.pool.count_workers()]}


def _find_elements(step: Step, name: str, value: Any) -> Any:
    """Return what a map goes through: a list, the elements that another map makes, or `_Unknown`.

    Raises ``ResultError`` for anything else.
    """
    if isinstance(value, _Elements | _Unknown):
        return value
    value = _load_value(value)
    is_table = hasattr(value, "columns")  # iterating over a data frame gives the column names
    if not is_table and not isinstance(value, str | bytes | Mapping):
        with contextlib.suppress(TypeError):  # it is not iterable
            return list(value)
    problem = f"maps over '{name}', which is {_summarize(value)}"
    raise step._error(problem, "expected a list, or another iterable of elements", ResultError)


class _Session:
    """One run or plan, from its inputs to its results: the only place where it begins again.

    When a stored value turns out to be damaged, its fingerprint may have been used already. So the
    run begins again with the same inputs, and reuses what was stored in the meantime.
    """

    def __init__(self, order: _Order, inputs: Mapping[str, Any], policy: _Policy) -> None:
        self.order = order
        self.inputs = inputs
        self.policy = policy
        self.restart_count = 0

    @functools.cached_property
    def input_fingerprints(self) -> dict[str, str]:
        """Name -> fingerprint of the inputs that have one, as they are before the first step."""
        fingerprints = {}
        cached_needs = {name for step in self.order.steps if step.cache for name in step.needs}
        for name, value in self.inputs.items():
            if name in cached_needs or not _names_files(value):  # files may be huge
                with contextlib.suppress(_Opaque, OSError):
                    fingerprints[name] = self.policy.reuse.fingerprint(name, value)
        return fingerprints

    def run(self) -> _Results:
        """Run or plan all steps. The error that ended a run is the ``failure`` of the results."""
        policy = self.policy
        needs_loop = policy.is_plan or policy.executor is not None or policy.listeners is not None
        has_handles = any(isinstance(value, _Handle) for value in self.inputs.values())
        if self.order.is_plain and not needs_loop and not has_handles:
            results = _Results(self.order, dict(self.inputs), policy.on_error)
            _run_plain(results)
            return results
        if not policy.is_plan and any(step.cache for step in self.order.steps):
            self.input_fingerprints  # noqa: B018 - before a step can change an input
        while True:
            results = _Results(self.order, dict(self.inputs), policy.on_error)
            try:
                _Loop(results, policy).run()
            except _DamageError as damage:
                results.failure = self.begin_again(damage)
                if results.failure is None:
                    continue
            return results

    def begin_again(self, damage: _DamageError) -> ResultError | None:
        """Prepare another run. Return an error if a step has changed an input in place."""
        reuse = self.policy.reuse
        reuse.distrust(damage)
        self.restart_count += 1
        if self.restart_count > _MOST_RESTARTS:  # something destroys the store again and again
            reuse.is_active = False
        for name, fingerprint in self.input_fingerprints.items():
            value = self.inputs[name]
            with contextlib.suppress(_Opaque):
                if _names_files(value) or _fingerprint(value) == fingerprint:
                    continue
            return ResultError(
                f"a step changed the input '{name}' in place, and the run has to begin again, "
                f"because a stored value of step '{damage.step}' cannot be loaded\n"
                f"  that value was deleted: run again, with '{name}' as it was",
                name=name,
                step=damage.step,
            )
        return None

    def load_target(self, name: str, handle: _Handle) -> Any:
        """Load a value that a run has left in the store; compute it again if it is gone."""
        try:
            return handle.load()
        except _DamageError as damage:
            failure: BaseException | None = self.begin_again(damage)
        if failure is not None:
            raise failure
        order = _make_order(self.order.graph, (name,), self.order.given)
        session = _Session(order, self.inputs, _Policy(self.policy.reuse))
        session.restart_count = self.restart_count
        results = session.run()
        if results.failure is not None:
            raise results.failure
        if name not in results.values:
            text = f"the stored value '{name}' is gone, and its step raised Skip this time"
            raise NoValueError(text, name=name)
        value = results.values[name]
        if isinstance(value, _Handle):
            return session.load_target(name, value)
        return value


def _names_files(value: Any) -> bool:
    """Return whether a value is a file, or several, which a step may have written."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, os.PathLike | _Handle)


########################################################################################
### Text
########################################################################################


class _Look(NamedTuple):
    """How a status looks. Its colour, glyph and border each tell it apart without its word."""

    glyph: str
    ascii: str  # the glyph where a stream cannot encode it
    ansi: str  # colour on a terminal
    light: str  # colour on a light background, with a contrast of at least 4.5 : 1
    dark: str  # the same on a dark background
    path: str  # the glyph as SVG
    dashes: str = "none"  # of the border, as SVG
    width: float = 1.6  # of the border, in px
    fill: float = 0.07  # opacity of the colour inside the box


# The glyphs as SVG, in a box of 12 x 12 px.
_CHECK = "M2 6.5l3 3 5-6.5"
_ARROW = "M10 6a4 4 0 1 1-1.6-3.2M9.2.6v2.6H6.6"
_OPEN_ARROW = "M2 7.5a4 4 0 0 1 7.4-2.1M9.8 2.4v3.2H6.6"
_RING = "M10 6a4 4 0 1 1-8 0 4 4 0 1 1 8 0z"
_BARRED_RING = _RING + "M3.2 8.8l5.6-5.6"
_TRIANGLE = "M3.5 2v8l6.5-4z"
_SMALL_TRIANGLE = "M4 2.5v7l5-3.5z"
_BOX = "M1 1h10v10H1zM3.5 6l1.8 2 3-3.8"
_CROSS = "M2.5 2.5l7 7M9.5 2.5l-7 7"

_FRESH = _Look("✓", "=", "34", "#0936cf", "#658cf2", _CHECK)
_STALE = _Look("↻", "~", "33", "#926b0e", "#fec845", _ARROW, "5 3")
_NEW = _Look("○", "o", "90", "#6f747d", "#8b919a", _RING, "2 3")
# The statuses of a step, in the order in which they are counted. A new status is a row here, a
# place in _STATUS_ORDER, and a case of _describe_outcome.
_LOOKS = {
    "fresh": _FRESH,
    "stale": _STALE,
    "maybe": _STALE._replace(glyph="↷", ascii="?", path=_OPEN_ARROW, dashes="2 3", fill=0.02),
    "new": _NEW,
    "uncached": _NEW._replace(glyph="▹", ascii="*", path=_SMALL_TRIANGLE, dashes="none", width=1.3),
    "waiting": _NEW,
    "running": _Look("▶", ">", "39", "#1b1f24", "#e8eaed", _TRIANGLE, width=2.4),
    "ran": _Look("■", "+", "32", "#187456", "#3fdea6", _BOX),
    "cached": _FRESH,
    "failed": _Look("✗", "x", "31", "#8c1a1f", "#fa3849", _CROSS, width=2.4),
    "skipped": _NEW._replace(glyph="⊘", ascii="-", path=_BARRED_RING, dashes="6 3 1 3"),
}

# The other characters of our tables that ASCII lacks.
_ASCII_SIGNS = {"·": "-", "…": "~", "→": ">", "×": "x"}
_ASCII_SIGNS |= {look.glyph: look.ascii for look in _LOOKS.values()}

_MOST_DEPENDENCIES = 8  # in a row of a table
_MOST_VALUES = 20  # values of a run that are written below its table


class _Scene(NamedTuple):
    """The content that a pipeline, a plan or a run displays, as text, picture or page."""

    title: str
    graph: _Graph
    states: Mapping[str, _StepState] | None = None  # of the steps that are needed; None: structure
    targets: frozenset[str] = frozenset()  # that were asked for
    given: frozenset[str] = frozenset()
    values: Mapping[str, Any] = {}  # of a run: target -> value or handle
    seconds: float | None = None
    fault: str = ""  # why there is no graph
    selection: list[Step] | None = None  # what show(*targets) needs

    def select(self, targets: Collection[str]) -> _Scene:
        """Reduce the scene to what some targets need; given values need nothing."""
        __tracebackhide__ = True
        if self.fault:
            return self
        targets = _normalize_names(tuple(map(str, targets)))
        _check_known_names("show() was given", targets, self.graph)
        available = set(self.given)
        for name in self.given & self.graph.steps.keys():
            available.update(self.graph.steps[name].outputs)
        selection = _sort_steps(self.graph, targets, available)
        if self.states is not None:
            selection = [step for step in selection if step.name in self.states]
        return self._replace(targets=frozenset(targets), selection=selection)

    def list_steps(self) -> list[Step]:
        """List the steps that are displayed, in topological order."""
        if self.selection is not None:
            return self.selection
        if self.states is not None:
            return [self.graph.steps[name] for name in self.states]
        return self.graph.sorted_steps

    def list_states(self) -> list[_StepState]:
        if self.states is None:
            return []
        return [self.states[step.name] for step in self.list_steps()]

    def get_counts(self) -> dict[str, int]:
        """Return status -> number of steps, in the order of the looks."""
        counts = Counter(state.status for state in self.list_states())
        return {status: counts[status] for status in _LOOKS if status in counts}

    def count_statuses(self) -> str:
        """Write these counts as ``2 fresh, 1 new``."""
        return ", ".join(f"{number} {status}" for status, number in self.get_counts().items())

    def count_nodes(self) -> str:
        """Write ``7 steps, 5 inputs``. A value that was given counts as an input."""
        needs: set[str] = set()
        values: set[str] = set()
        for step in self.list_steps():
            needs.update(step.needs)
            values.update(step.values)
        return f"{_count(len(self.list_steps()), 'step')}, {_count(len(needs - values), 'input')}"

    def describe_time(self) -> list[str]:
        """Write how long a run took, and how much time its stored results saved."""
        if self.seconds is None:
            return []
        texts = [_format_duration(self.seconds)]
        saved = sum(state.saved for state in self.list_states())
        if saved:
            texts.append(f"saved {_format_duration(saved)}")
        return texts


def _describe_outcome(state: _StepState) -> str:
    """Describe what a step's status leaves open: duration, number of tries, reason or error."""
    details = []
    match state.status:
        case "fresh":
            details.append(f"saves {_format_duration(state.saved)}")
        case "cached":
            details += [f"saved {_format_duration(state.saved)}", state.reason]
        case "ran":
            details.append(_format_duration(state.seconds))
            if state.attempts > 1:
                details.append(f"in {state.attempts} tries")
            if state.reason == "never ran":
                details.append("first time")  # the reason is from before the run
            elif state.reason:
                details.append(state.reason)
        case "failed":
            details.append(_format_duration(state.seconds))
            details += [_describe_error(state.error), state.reason]
        case _:
            details.append(state.reason)
    if state.elements is not None and state.status in ("fresh", "cached", "ran"):
        details.append(_count(state.elements, "element"))
    return "   ".join(filter(None, details))


def _describe_briefly(state: _StepState) -> str:
    """Describe the same in the few words that fit into a box of the picture."""
    match state.status:
        case "fresh":
            return f"saves {_format_duration(state.saved)}"
        case "cached":
            return f"cached, saved {_format_duration(state.saved)}"
        case "ran":
            return _format_duration(state.seconds)
        case "failed" if state.error is not None:
            return type(state.error).__name__
    return state.reason or state.status


def _count_cells(text: str) -> int:
    """Count the columns that a text takes in a monospaced font."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    cells = 0
    for character in text:
        if east_asian_width(character) in ("W", "F"):
            cells += 2
        elif not combining(character):
            cells += 1
    return cells


def _fill(text: str, cells: int) -> str:
    """Add spaces up to that many cells."""
    return text.ljust(len(text) + cells - _count_cells(text))


def _cut_end(text: str, cells: int) -> str:
    """Shorten a text that is wider than so many cells."""
    if _count_cells(text) <= cells:
        return text
    end = max(0, cells - 1)
    while _count_cells(text[:end]) >= max(1, cells):  # wide characters take two cells
        end -= 1
    return text[:end] + "…"


def _cut_middle(text: str, cells: int) -> str:
    """Shorten a text that is wider than so many cells, and keep both its ends."""
    if _count_cells(text) <= cells:
        return text
    tail = text[-(cells // 3) :]
    return _cut_end(text, cells - _count_cells(tail)) + tail


def _format_table(rows: Sequence[Sequence[str]], columns: int | None = None) -> str:
    """Write rows of equal length as indented lines with aligned columns.

    With ``columns``, the last cell of each row is cut to what fits beside the others.
    """
    if not rows or not rows[0]:
        return ""
    clean_rows = [[_make_printable(cell) for cell in row] for row in rows]
    widths = [max(map(_count_cells, column)) for column in zip(*clean_rows, strict=True)]
    lines = []
    for *first_cells, last_cell in clean_rows:
        line = "  "
        for cell, width in zip(first_cells, widths, strict=False):
            line += _fill(cell, width) + "   "
        if columns is not None:
            last_cell = _cut_end(last_cell, max(8, columns - _count_cells(line)))
        lines.append((line + last_cell).rstrip())
    return "\n".join(lines)


def _make_rows(scene: _Scene) -> list[list[str]]:
    """Make a row of each step: its name and outputs, what it depends on, its status and outcome."""
    rows = []
    for step in scene.list_steps():
        name = step.name
        if step.outputs:
            name += f" → {', '.join(step.outputs)}"
        row = [name, _describe_dependencies(step)]
        if scene.states is not None:
            state = scene.states[step.name]
            outcome = _describe_outcome(state)
            if state.status == "failed":
                outcome += f"   ({_locate(step.function)})"
            row += [f"{_LOOKS[state.status].glyph} {state.status}", outcome]
        rows.append(row)
    return rows


def _describe_dependencies(step: Step) -> str:
    texts = []
    for name in dict.fromkeys(step.dependencies):
        if name in step.mapped_values:
            texts.append(f"each {name}")
        elif name in step.needs:
            texts.append(name)
        else:
            texts.append(f"after {name}")
    if len(texts) > _MOST_DEPENDENCIES:
        texts[_MOST_DEPENDENCIES:] = [f"… and {len(texts) - _MOST_DEPENDENCIES} more"]
    return ", ".join(texts)


def _list_values(scene: _Scene) -> list[str]:
    """Write a line for each target of a run; without targets, for each value that nothing needs."""
    names = set(scene.targets)
    if not names:
        for step in scene.list_steps():
            names.update(step.outputs or [step.name])
        for step in scene.list_steps():
            names.difference_update(step.needs)
    lines = []
    for name, value in scene.values.items():
        if name in names:
            lines.append(f"{name} = {_summarize(value)}")
    if len(lines) > _MOST_VALUES:
        lines[_MOST_VALUES:] = [f"… and {len(lines) - _MOST_VALUES} more"]
    return lines


def _format_values(scene: _Scene, columns: int | None = None) -> str:
    """Write the values of a run as indented lines, "" if there are none."""
    return _format_table([[line] for line in _list_values(scene)], columns)


def _format_scene(scene: _Scene, columns: int | None = None, is_ascii: bool = False) -> str:
    """Write a scene as lines of text. Notes are cut if a line does not fit into ``columns``."""
    head = [scene.title]
    if not scene.fault:
        head += [scene.count_nodes(), scene.count_statuses(), *scene.describe_time()]
    lines = [_make_printable(" · ".join(filter(None, head)))]
    if rows := _make_rows(scene):
        lines.append(_format_table(rows, columns if scene.states is not None else None))
    if values := _format_values(scene, columns):
        lines += ["", values]
    for line in scene.fault.splitlines():
        lines.append(_make_printable(f"  {line}"))
    text = "\n".join(lines)
    return _to_ascii(text) if is_ascii else text


def _to_ascii(text: str) -> str:
    for sign, replacement in _ASCII_SIGNS.items():
        text = text.replace(sign, replacement)
    return text.encode("ascii", "replace").decode()


def _can_encode_glyphs(stream: Any) -> bool:
    try:
        "".join(_ASCII_SIGNS).encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


########################################################################################
### Layout
########################################################################################

_MARGIN = 8.0  # px around the picture
_PILL_HEIGHT = 22.0  # px of an input
_CELL_SIZE = (840.0, 600.0)  # px that a notebook has for a picture before it scrolls

_Point = tuple[float, float]
_Edge = tuple[str, str]  # from a producer to a consumer


class _Node:
    """A box in the layout; or a bend, where an edge passes a rank."""

    def __init__(self, number: int) -> None:
        self.number = number  # in the order of declaration; the bends come last
        self.above: list[_Node] = []  # neighbours in the rank before
        self.below: list[_Node] = []  # neighbours in the rank after
        # Where it is in its rank:
        self.position = 0.0  # from 0 to 1
        self.upper_ends: list[float] = []  # positions of its neighbours, sorted
        self.lower_ends: list[float] = []
        self.wish = 0.0  # where it should be if the other nodes of its rank allow it
        # Where it lies, in px, if edges go downwards:
        self.width = 0.0  # of a box, at a right angle to the flow
        self.height = 0.0
        self.weight = 3.0  # how strongly it pulls its neighbours, and resists them
        self.pull = 0.0  # of all its neighbours
        self.slot = 0.0  # its centre if the nodes of its rank were as close as they may be
        self.centre = 0.0
        self.top = 0.0  # of its rank
        self.middle = 0.0
        self.bottom = 0.0


_Rows = list[list[_Node]]  # the ranks


class _Geometry(NamedTuple):
    """Where boxes and edges lie, in px."""

    is_across: bool  # whether edges go to the right, not downwards
    centres: dict[str, _Point]  # of the boxes
    routes: dict[_Edge, list[_Point]]  # see _arrange
    width: float
    height: float


def _rank_boxes(
    names: Collection[str], edges: Sequence[_Edge]
) -> tuple[_Rows, dict[str, _Node], dict[_Edge, list[_Node]]]:
    """Rank the boxes of a DAG and order each rank: the half of a layout that needs no sizes.

    Returns the ranks, the node of each name, and for each edge its producer, bends and consumer.
    The edges together span as few ranks as possible. An edge has a bend in each rank that it
    passes, and all edges of one producer share their bends. Both passes are those of Gansner,
    Koutsofios, North and Vo, "A technique for drawing directed graphs" (1993).
    """
    levels = _find_levels(names, edges)
    nodes: dict[tuple[str, int], _Node] = {}  # (box or producer of the bend, level) -> node
    for name in names:
        nodes[name, levels[name]] = _Node(len(nodes))
    trails: dict[_Edge, list[_Node]] = {}
    for start, end in edges:
        trail = trails[start, end] = [nodes[start, levels[start]]]
        for level in range(levels[start] + 1, levels[end]):
            trail.append(nodes.setdefault((start, level), _Node(len(nodes))))
        trail.append(nodes[end, levels[end]])
        for upper, lower in itertools.pairwise(trail):
            if lower not in upper.below:
                upper.below.append(lower)
                lower.above.append(upper)
    rows: _Rows = [[] for _ in range(max(levels.values(), default=-1) + 1)]
    for (_, level), node in nodes.items():
        rows[level].append(node)
    return _order_ranks(rows), dict(zip(names, nodes.values(), strict=False)), trails


def _find_levels(names: Collection[str], edges: Sequence[_Edge]) -> dict[str, int]:
    """Return name -> number of its rank, such that the edges together span the fewest ranks.

    This linear program is the dual of a flow of least cost. An edge in which something flows
    spans just one rank, so the ranks are longest paths in the residual graph.
    """
    import networkx as nx

    network: nx.DiGraph[str] = nx.DiGraph()
    network.add_nodes_from(["", *names])
    network.add_edges_from(edges, weight=-1)
    for name, degree in network.in_degree():
        network.nodes[name]["demand"] = degree - network.out_degree(name)
    for name in names:
        network.add_edge("", name, weight=0)  # "" is above all of them
    flow = nx.network_simplex(network)[1]
    for start, end in edges:
        if flow[start][end]:
            network.add_edge(end, start, weight=1)
    distances = nx.single_source_bellman_ford_path_length(network, "")
    return {name: -int(distances[name]) for name in names}


def _order_ranks(rows: _Rows) -> _Rows:
    """Order each rank such that few edges cross.

    A sweep goes through the ranks, down or up. It sorts each by the mean position of the neighbours
    in the rank before. Then it swaps neighbours, also those that cross as often either way: this
    stirs the order, so that the next sweep finds something new.
    """
    _update_positions(rows)
    best_rows = rows
    fewest = math.inf
    for sweep in range(10):
        is_upward = sweep % 2 == 1
        for row in reversed(rows) if is_upward else rows:
            if is_upward:
                row.sort(key=lambda node: _average(node.below, node))
            else:
                row.sort(key=lambda node: _average(node.above, node))
            _update_positions([row])
        for _ in range(3):
            _swap_neighbours(rows, lambda node: -node.position)
        crossings = _count_crossings(rows)
        if crossings < fewest:
            best_rows = list(map(list.copy, rows))
            fewest = crossings
        if fewest == 0:
            break
    # Where crossings do not matter, move nodes near their neighbours and keep declaration order.
    _update_positions(best_rows)
    _swap_neighbours(best_rows, lambda node: _average(node.above + node.below, node))
    return best_rows


def _update_positions(rows: _Rows) -> None:
    for row in rows:
        for index, node in enumerate(row):
            node.position = (index + 0.5) / len(row)


def _average(neighbours: list[_Node], node: _Node) -> float:
    """Return the mean position of neighbours; if it is equal, the order of declaration counts."""
    nodes = neighbours or node.above or node.below or [node]
    return sum([node.position for node in nodes]) / len(nodes) + 1e-9 * node.number


def _swap_neighbours(rows: _Rows, find_wish: Callable[[_Node], float]) -> None:
    """Swap neighbours in each rank while fewer edges cross then, or as many and they wish it.

    This ends, since each swap lowers the crossings or the number of pairs against their wishes.
    """
    for row in rows:
        for node in row:
            node.upper_ends = sorted([other.position for other in node.above])
            node.lower_ends = sorted([other.position for other in node.below])
            node.wish = find_wish(node)
        has_changed = True
        while has_changed:
            has_changed = False
            for index in range(len(row) - 1):
                left, right = row[index], row[index + 1]
                gain = _find_gain(left.upper_ends, right.upper_ends)
                gain += _find_gain(left.lower_ends, right.lower_ends)
                if gain > 0 or (gain == 0 and left.wish > right.wish):
                    row[index], row[index + 1] = right, left
                    has_changed = True
        _update_positions([row])


def _find_gain(left_ends: list[float], right_ends: list[float]) -> int:
    """Return how many crossings fewer there are if two neighbours with these ends are swapped."""
    gain = 0
    for end in left_ends:
        gain += bisect_left(right_ends, end) + bisect_right(right_ends, end) - len(right_ends)
    return gain


def _count_crossings(rows: _Rows) -> int:
    """Count the pairs of edges between neighbouring ranks that cross."""
    crossings = 0
    for row in rows:
        lower_ends: list[float] = []  # sorted; of the edges so far, from left to right
        for node in row:
            for end in sorted([other.position for other in node.below]):
                crossings += len(lower_ends) - bisect_right(lower_ends, end)
            for other in node.below:
                insort(lower_ends, other.position)
    return crossings


def _align(rows: _Rows, gap: float) -> None:
    """Set the centres of all nodes, near those of their neighbours.

    A round goes through the ranks, down or up, and arranges each as well as the others allow.
    """
    for row in rows:
        for left, right in itertools.pairwise(row):
            distance = gap if left.width and right.width else gap / 2  # bends need less space
            right.slot = left.slot + (left.width + right.width) / 2 + distance
        for node in row:
            node.centre = node.slot - row[-1].slot / 2
    for turn in range(28):
        # Neighbours beyond the reach hardly pull. As it shrinks, what is almost straight becomes
        # straight. Least squares alone leave small kinks everywhere.
        reach = 100 * 0.8**turn
        is_upward = turn % 2 == 1
        for row in reversed(rows) if is_upward else rows:
            for node in row:
                neighbours = node.above or node.below
                if turn % 4 > 1:  # one-sided rounds carry a shift through the graph, others balance
                    neighbours = node.above + node.below
                elif is_upward:
                    neighbours = node.below or node.above
                node.pull = 1e-3
                moment = 1e-3 * node.centre
                for other in neighbours:
                    distance = abs(other.centre - node.centre) / reach
                    pull = node.weight * other.weight / (1 + distance**3)
                    node.pull += pull
                    moment += pull * other.centre
                node.wish = moment / node.pull
            _space(row)


def _space(row: list[_Node]) -> None:
    """Put the nodes of a rank where they wish, or as near to it as their slots allow.

    The sum of the weighted squares of the distances is least. This is isotonic regression by the
    "pool adjacent violators" algorithm: neighbours that would come too near are pooled.
    """
    pools: list[tuple[float, float, list[_Node]]] = []  # shift from the slots, weight, nodes
    for node in row:
        shift = node.wish - node.slot
        weight = node.pull
        nodes = [node]
        while pools and pools[-1][0] >= shift:
            other_shift, other_weight, others = pools.pop()
            shift = (shift * weight + other_shift * other_weight) / (weight + other_weight)
            weight += other_weight
            nodes = others + nodes
        pools.append((shift, weight, nodes))
    for shift, _, nodes in pools:
        for node in nodes:
            node.centre = node.slot + shift


def _arrange(
    rows: _Rows,
    boxes: Mapping[str, _Node],
    trails: Mapping[_Edge, Sequence[_Node]],
    sizes: Mapping[str, _Point],
    is_across: bool,
) -> _Geometry:
    """Give each box its centre and each edge its route, downwards or to the right.

    A route goes from border to border, straight within the band of each rank. Between the bands,
    that is from its 2nd to its 3rd point, from the 4th to the 5th and so on, draw a curve that
    starts and ends along the flow: it crosses no box.
    """
    # All is computed for edges that go downwards; if they go across, the result is transposed.
    box_gap, rank_gap = (14.0, 20.0) if is_across else (24.0, 40.0)
    for name, node in boxes.items():
        node.width, node.height = reversed(sizes[name]) if is_across else sizes[name]
        # Small boxes, such as inputs, follow their neighbours rather than pull them.
        node.weight = 0.25 if sizes[name][1] <= _PILL_HEIGHT else 1.0
    _align(rows, box_gap)
    nodes = list(itertools.chain.from_iterable(rows))
    left = min([node.centre - node.width / 2 for node in nodes], default=0.0)
    for node in nodes:
        node.centre = round(node.centre - left + _MARGIN, 1)
    bottom = _MARGIN - rank_gap
    for row in rows:
        # Curves that go far aside get more room. Otherwise they would lie flat on the boxes.
        shifts = [abs(node.centre - other.centre) for node in row for other in node.above]
        top = bottom + min(max(rank_gap, round(max(shifts, default=0.0) / 6)), 80.0)
        bottom = top + max([node.height for node in row])
        for node in row:
            node.top, node.middle, node.bottom = top, (top + bottom) / 2, bottom

    def make_point(x: float, y: float) -> _Point:
        return (y, x) if is_across else (x, y)

    centres = {name: make_point(node.centre, node.middle) for name, node in boxes.items()}
    routes: dict[_Edge, list[_Point]] = {}
    for edge, trail in trails.items():
        route = routes[edge] = []
        for node in trail:
            route += [make_point(node.centre, node.top), make_point(node.centre, node.bottom)]
        start, end = trail[0], trail[-1]
        route[0] = make_point(start.centre, start.middle + start.height / 2)
        route[-1] = make_point(end.centre, end.middle - end.height / 2)
    right = max([node.centre + node.width / 2 for node in nodes], default=_MARGIN)
    size = make_point(right + _MARGIN, max(bottom, _MARGIN) + _MARGIN)
    return _Geometry(is_across, centres, routes, *size)


def _rate_layout(layout: _Geometry) -> tuple[bool, float]:
    """Rate how well a layout fits the cell of a notebook; less is better.

    If the text need not be smaller than 85 % to see the whole picture, the area of the cell that
    stays empty beside it counts. Otherwise its width counts, since scrolling sideways is worse.
    """
    cell_width, cell_height = _CELL_SIZE
    if min(cell_width / layout.width, cell_height / layout.height) < 0.85:
        return True, max(cell_width, layout.width)
    scale = min(1.0, cell_width / layout.width)
    return False, layout.height * scale * (cell_width - layout.width * scale)


@functools.lru_cache(4)  # the frames of a live picture have one layout
def _lay_out(boxes: tuple[tuple[str, _Point], ...], edges: tuple[_Edge, ...]) -> _Geometry:
    """Lay boxes out downwards or to the right: whichever fits the cell of a notebook better."""
    sizes = dict(boxes)
    ranks = _rank_boxes(sizes, edges)
    return min([_arrange(*ranks, sizes, across) for across in (False, True)], key=_rate_layout)


########################################################################################
### Picture
########################################################################################

_MOST_NAMES = 300  # in a picture; above that a table says more
_MOST_DEPENDENTS = 8  # of an input; above that each of them has a pill of its own
_LETTER_WIDTH = 7.3  # px of a name
_NOTE_LETTER_WIDTH = 6.1
_LONGEST_OUTCOME = 19  # letters of a note in a run
_SMALLEST_SCALE = 0.7  # down to which a picture is shrunk to the width of a cell

# Attributes of what has no status. Classes give the colours in the dark: p paper, t text, s small
# text, e edges, a arrowheads, n boxes without a status.
_PAPER = 'class="p" fill="#ffffff"'
_TEXT = 'class="t" fill="#1b1f24" font-size="12"'
_SMALL_TEXT = 'class="s" fill="#5c636e" font-size="10"'
_PILL = 'class="n p" fill="#ffffff" stroke="#8a919c" rx="11"'
_PILL_TEXT = 'class="s" fill="#5c636e" font-size="10.5" text-anchor="middle"'
_EDGE = 'class="e" fill="none" stroke="#8a919c"'
_ARROWHEAD = 'class="a" fill="#8a919c"'
_FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
_PLAIN_LOOK = _Look("", "", "", "#5c636e", "#a9b0ba", "", width=1.3)
_DARK_STYLE = (
    ".p{fill:#111111}.t{fill:#e8eaed}.s{fill:#a9b0ba}.e{stroke:#7d8590}.a{fill:#7d8590}"
    ".n{stroke:#a9b0ba}.n-f{fill:#a9b0ba}"
)


class _Box(NamedTuple):
    """The drawing of a step or an input, with its upper left corner at the origin."""

    svg: str
    width: float
    height: float


def _escape(text: str) -> str:
    """Make a text safe as content and as an attribute of HTML and SVG."""
    import html

    return html.escape(_clean_text(text), quote=True)


def _draw_text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" {style}>{_escape(text)}</text>'


def _draw_glyph(x: float, y: float, status: str) -> str:
    look = _LOOKS[status]
    style = f'class="{status}" fill="none" stroke="{look.light}" stroke-width="1.6"'
    return f'<path transform="translate({x:g} {y:g})" d="{look.path}" {style}/>'


def _draw_step(scene: _Scene, step: Step, longest: float) -> _Box:
    """Draw a step: its borders, its name, and what there is to say of it."""
    status = "n"
    look = _PLAIN_LOOK
    label = _cut_middle(step.name, 26 if step.map else 29)
    label_x = 10
    notes = []
    note_cells = 0
    state = None
    if scene.states is not None:
        state = scene.states[step.name]
        status = state.status
        look = _LOOKS[status]
        label_x = 27  # beside the glyph
        notes.append(_make_printable(_describe_briefly(state)))
        note_cells = _count_cells(notes[0])
        if status not in ("fresh", "stale", "maybe", "new", "uncached"):
            note_cells = _LONGEST_OUTCOME  # the layout of a live picture must not change
    if step.outputs:
        notes.append(f"→ {', '.join(step.outputs)}")
        note_cells = max(note_cells, _count_cells(notes[-1]))
    label_width = label_x + _LETTER_WIDTH * _count_cells(label) + 10
    if step.map:
        label_width += 30  # for the number of its elements
    width = min(math.ceil(max(92, label_width, _NOTE_LETTER_WIDTH * note_cells + 17)), 260)
    height = 27 + 13 * len(notes) if notes else 30
    baseline = 17 if notes else 19
    stroke = f'class="{status}" fill="none" stroke="{look.light}"'
    border = f'stroke-width="{look.width}" stroke-dasharray="{look.dashes}"'
    size = f'width="{width}" height="{height}" rx="6"'
    elements = []
    if step.map:  # a stack, for its elements
        for shift in (6, 3):
            path = f"M{shift + 6} {height + shift}h{width - 12}q6 0 6-6v{12 - height}"
            elements.append(f'<path d="{path}" {stroke} {border}/>')
    if not scene.targets.isdisjoint(step.values):  # a double outline
        outline = f'x="-3.5" y="-3.5" width="{width + 7}" height="{height + 7}" rx="9"'
        elements.append(f"<rect {outline} {stroke}/>")
    tint = f'class="{status} {status}-f" fill="{look.light}" fill-opacity="{look.fill}"'
    elements.append(f'<rect {size} {_PAPER}/><rect {size} {tint} stroke="{look.light}" {border}/>')
    elements.append(_draw_text(label_x, baseline, label, f'{_TEXT} font-weight="bold"'))
    for index, note in enumerate(notes):
        text = _cut_end(note, int((width - 16) / _NOTE_LETTER_WIDTH))
        elements.append(_draw_text(10, 31 + 13 * index, text, _SMALL_TEXT))
    if state is not None:
        elements.append(_draw_glyph(10, baseline - 10, status))
        if state.elements is not None:
            style = f'{_SMALL_TEXT} text-anchor="end"'
            elements.append(_draw_text(width - 8, baseline, f"×{state.elements}", style))
        if state.seconds and status in ("ran", "failed"):  # a bar: the share in the longest time
            bar = f'width="{(width - 12) * state.seconds / longest:.1f}" height="2.5"'
            fill = f'class="{status}-f" fill="{look.light}"'
            elements.append(f'<rect x="6" y="{height - 4}" {bar} {fill}/>')
    return _Box("".join(elements), width, height)


def _draw_boxes(scene: _Scene) -> tuple[dict[str, _Box], dict[_Edge, bool]]:
    """Draw the boxes, in the order of declaration; find the edges: True for those to be dashed."""
    graph = scene.graph
    steps = {step.name for step in scene.list_steps()}
    dependents = Counter(name for step in scene.list_steps() for name in step.needs)
    longest = max([state.seconds for state in scene.list_states()], default=0.0)
    boxes: dict[str, _Box] = {}
    edges: dict[_Edge, bool] = {}
    for step in filter(lambda step: step.name in steps, graph.steps.values()):
        for name in step.dependencies:
            is_needed = name in step.needs
            if name in graph.producers and graph.producers[name].name in steps:
                edge = graph.producers[name].name, step.name
                edges[edge] = edges.get(edge, True) and not is_needed
            elif is_needed:  # an input, or a value that was given
                pill = f"input {name}"
                if dependents[name] > _MOST_DEPENDENTS:
                    pill += f" of {step.name}"
                label = _cut_middle(name, 24)
                width = 18 + 6.4 * _count_cells(label)
                svg = f'<rect width="{width:g}" height="{_PILL_HEIGHT:g}" {_PILL}/>'
                svg += _draw_text(width / 2, 14.5, label, _PILL_TEXT)
                boxes.setdefault(pill, _Box(svg, width, _PILL_HEIGHT))
                edges[pill, step.name] = False
        boxes[step.name] = _draw_step(scene, step, longest)
    return boxes, edges


def _draw_edges(layout: _Geometry, edges: Mapping[_Edge, bool]) -> Iterator[str]:
    """Draw the edges, then those that are dashed. Shared pieces of routes are drawn once."""
    tip = "l-6-3.5v7z" if layout.is_across else "l-3.5-6h7z"
    lanes: set[str] = set()
    for dashes in ("none", "4 3"):
        path = ""
        tips = ""
        for edge, is_dashed in edges.items():
            if is_dashed == (dashes != "none"):
                route = layout.routes[edge]
                for start, end in itertools.pairwise(route):
                    lane = _draw_lane(start, end, layout.is_across)
                    if start != end and lane not in lanes:
                        lanes.add(lane)
                        path += lane
                tips += f"M{route[-1][0]:g} {route[-1][1]:g}{tip}"
        if tips:
            yield f'<path d="{path}" {_EDGE} stroke-dasharray="{dashes}"/>'
            yield f'<path d="{tips}" {_ARROWHEAD}/>'


def _draw_lane(start: _Point, end: _Point, is_across: bool) -> str:
    """Draw a piece of a route: a curve where it goes aside, otherwise a straight line."""
    (x, y), (u, v) = start, end
    piece = "L"
    if is_across and y != v:
        piece = f"C{(x + u) / 2:g} {y:g} {(x + u) / 2:g} {v:g} "
    elif not is_across and x != u:
        piece = f"C{x:g} {(y + v) / 2:g} {u:g} {(y + v) / 2:g} "
    return f"M{x:g} {y:g}{piece}{u:g} {v:g}"


def _draw_head(scene: _Scene, has_title: bool) -> tuple[list[str], float]:
    """Draw the head line, or only the legend in it; return its elements and its width.

    The legend counts the statuses that occur, with their looks.
    """
    elements = []
    x = 12.0
    if has_title:
        title = _cut_end(_make_printable(scene.title), 60)
        text = scene.fault.partition("\n")[0] or f"· {scene.count_nodes()}"
        elements.append(_draw_text(x, 20, title, f'{_TEXT} font-weight="bold"'))
        x += _LETTER_WIDTH * (_count_cells(title) + 1)
        elements.append(_draw_text(x, 20, text, _TEXT))
        x += _LETTER_WIDTH * (len(text) + 2)
    for status, number in scene.get_counts().items():
        text = f"{number} {status}"
        style = f'class="{status}-f" fill="{_LOOKS[status].light}" font-size="12"'
        elements.append(_draw_glyph(x, 10, status) + _draw_text(x + 17, 20, text, style))
        x += _LETTER_WIDTH * len(text) + 33
    if has_title and scene.seconds is not None:
        text = " · ".join(scene.describe_time())
        elements.append(_draw_text(x, 20, text, _TEXT))
        x += _LETTER_WIDTH * len(text)
    return elements, x + 12 if elements else 0.0


def _draw_scene(scene: _Scene, has_title: bool = True) -> tuple[str, int]:
    """Draw a scene; return the SVG and its width in px."""
    boxes, edges = _draw_boxes(scene)
    sizes = tuple((name, (box.width, box.height)) for name, box in boxes.items())
    layout = _lay_out(sizes, tuple(edges))
    head, head_width = _draw_head(scene, has_title)
    top = 30 if head else 0
    style = _DARK_STYLE
    for status in scene.get_counts():
        color = _LOOKS[status].dark
        style += f".{status}{{stroke:{color}}}.{status}-f{{fill:{color}}}"
    width = round(max(layout.width, head_width))
    height = round(layout.height + top)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{_FONT}">',
        f"<style>@media (prefers-color-scheme:dark){{{style}}}</style>",
        f'<rect width="100%" height="100%" {_PAPER}/>',
        *head,
        f'<g transform="translate(0 {top})">',
        *_draw_edges(layout, edges),
    ]
    for name, box in boxes.items():
        x, y = layout.centres[name]
        corner = f"{x - box.width / 2:g} {y - box.height / 2:g}"
        elements.append(f'<g transform="translate({corner})">{box.svg}</g>')
    return "\n".join([*elements, "</g>", "</svg>", ""]), width


def _draw_if_possible(scene: _Scene) -> tuple[str, int, str]:
    """Return the SVG without a title, its width, and the reason if there is no picture."""
    if scene.fault:
        return "", 0, scene.fault
    steps = scene.list_steps()
    names: set[str] = set()
    for step in steps:
        names.update((step.name, *step.needs))
    if len(names) > _MOST_NAMES:
        example = steps[min(100, len(steps) // 2)].name  # needs at most a hundred steps
        text = f"{len(names)} names are too many for one picture; draw a part: show({example!r})"
        return "", 0, text
    try:
        return *_draw_scene(scene, has_title=False), ""
    except Exception as error:  # the table says what there is to say, even without a picture
        return "", 0, f"no picture: {_describe_error(error)}"


def _describe_picture(scene: _Scene) -> str:
    """Describe the picture in a line, for those who do not see it."""
    names = [step.name for step in scene.list_steps()]
    text = f"Pipeline {scene.title}: {' → '.join(names[:8])}"
    if len(names) > 8:
        text += " → …"
    for status in ("failed", "stale", "maybe", "new"):
        names = [state.name for state in scene.list_states() if state.status == status]
        if names:
            text += f"; {len(names)} {status}: {', '.join(names[:8])}"
    return text


def _format_html_table(rows: Iterable[Iterable[str]]) -> str:
    lines = []
    for row in rows:
        line = ""
        for cell in row:
            line += f'<td style="text-align:left;white-space:pre-wrap">{_escape(cell)}</td>'
        lines.append(f"<tr>{line}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _format_html(scene: _Scene, is_page: bool = False) -> str:
    """Write what a notebook displays: head line, picture, table and values; no script, no id.

    A page has the SVG itself, and its table is open.
    """
    svg, width, fault = _draw_if_possible(scene)
    head = [f"<b>{_escape(scene.title)}</b>"]
    if not scene.fault:
        statuses = "" if svg else scene.count_statuses()  # the legend of the picture counts them
        head += [scene.count_nodes(), statuses, *scene.describe_time()]
    html = f"<p>{' · '.join(filter(None, head))}</p>"
    if svg and not is_page:
        import base64

        smallest = round(_SMALLEST_SCALE * width)
        width = min(width, max(round(_CELL_SIZE[0]), smallest))  # where styles are stripped
        style = f"max-width:100%;min-width:{smallest}px;height:auto"
        url = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        description = _escape(_describe_picture(scene))
        svg = f'<img alt="{description}" width="{width}" style="{style}" src="{url}">'
    if svg:
        html += f'<div style="overflow-x:auto">{svg}</div>'
    else:
        html += f"<pre>{_escape(fault)}</pre>"
    if rows := _make_rows(scene):
        tag = "<details>" if svg and not is_page else "<details open>"
        summary = _count(len(rows), "step")
        html += f"{tag}<summary>{summary}</summary>{_format_html_table(rows)}</details>"
    if values := _list_values(scene):
        html += "<pre>" + _escape("\n".join(values)) + "</pre>"
    return f'<div class="dagkit">{html}</div>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width"><style>{style}</style></head>
<body>
{body}
</body></html>
"""
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PAGE_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--tint:#f4f5f7;--line:#d5d9df}
@media (prefers-color-scheme:dark){:root{
--paper:#111111;--ink:#e8eaed;--tint:#262a31;--line:#3a3f48}}
body{font:14px/1.5 system-ui,sans-serif;margin:2em;background:var(--paper);color:var(--ink)}
p{font-size:16px} div,pre{overflow-x:auto} table{border-collapse:collapse;margin:1em 0}
td{padding:.3em 2em .3em 0;border-top:1px solid var(--line);vertical-align:top}
td:not(:last-child){white-space:nowrap!important}
pre,td{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px}
pre{background:var(--tint);padding:.8em;border-radius:6px}
@media print{body{margin:0} svg{max-width:100%;height:auto} pre{white-space:pre-wrap}}
"""


def _format_page(scene: _Scene) -> str:
    """Write a page of its own: what a notebook displays, and the traceback of each failed step."""
    import traceback

    body = _format_html(scene, is_page=True)
    for state in scene.list_states():
        if state.error is not None:
            text = "".join(traceback.format_exception(state.error))
            body += f"<h3>{_escape(state.name)}</h3><pre>{_escape(text[-20_000:])}</pre>"
    title = _escape(scene.title)
    return _PAGE.format(title=title, policy=_PAGE_POLICY, style=_PAGE_STYLE, body=body)


class _Picture:
    """The result of ``show()``: one scene as a picture, as HTML and as text.

    Each is made when it is asked for. Only ``svg`` raises what the drawing raises; ``html`` says
    it instead.
    """

    def __init__(self, scene: _Scene, format: str = "html") -> None:
        self._scene = scene
        self._format = format

    def __repr__(self) -> str:
        import shutil

        columns = None
        if sys.stdout is not None and sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns
        return _format_scene(self._scene, columns, not _can_encode_glyphs(sys.stdout))

    @property
    def svg(self) -> str:
        return _draw_scene(self._scene)[0]

    @property
    def html(self) -> str:
        return _format_html(self._scene)

    @property
    def text(self) -> str:
        return _format_scene(self._scene)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; its suffix says which kind: svg, html (a page of its own) or txt."""
        suffix = os.path.splitext(path)[1]
        if suffix not in (".html", ".svg", ".txt"):
            text = f"{os.fspath(path)!r} cannot be saved: expected a name that ends in "
            raise ValueError(text + ".html, .svg or .txt")
        content = self.text + "\n"
        if suffix == ".svg":
            content = self.svg
        elif suffix == ".html":
            content = _format_page(self._scene)
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(content)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        contents = {"text/plain": self.text}
        if self._format == "svg" and _draw_if_possible(self._scene)[0]:
            contents["image/svg+xml"] = self.svg
        else:
            contents["text/html"] = self.html
        for kind in list(contents):
            if (include is not None and kind not in include) or kind in (exclude or ()):
                del contents[kind]
        return contents


class _Displayable:
    """A pipeline, a plan or a run: how they are displayed."""

    def _make_scene(self) -> _Scene:
        raise NotImplementedError

    def show(self, *targets: str, format: Literal["html", "svg"] = "html") -> _Picture:
        """Return the picture and the table, to display or to keep.

        This runs no step, hashes nothing and opens no stored value.

        Parameters
        ----------
        *targets : str
            Names of steps, outputs or inputs: draw only what they need. Default: everything.
        format : {"html", "svg"}
            What a notebook gets: picture and table, or the picture alone, as ``image/svg+xml``.

        Returns
        -------
        object
            It has ``.svg``, ``.html``, ``.text``, and ``.save(path)`` for a path that ends in
            ``.svg``, ``.html`` (a page of its own) or ``.txt``.

        Raises
        ------
        InputError, ValueError
            If a target is not a name of the pipeline; if the format is unknown.

        Examples
        --------
        >>> pipeline = Pipeline({"more": lambda x: x + 1, "twice": lambda more: 2 * more})
        >>> print(pipeline.show().text)
        pipeline · 2 steps, 1 input
          more    x
          twice   more
        """
        __tracebackhide__ = True
        if not isinstance(format, str) or format not in ("html", "svg"):
            text = f"show() was given format={_summarize(format)}: expected 'html' or 'svg'"
            raise ValueError(text)
        scene = self._make_scene()
        if targets:
            scene = scene.select(targets)
        return _Picture(scene, format)

    def __str__(self) -> str:
        return repr(self.show())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.show()._repr_mimebundle_(include, exclude)


########################################################################################
### Events
########################################################################################


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run; ``Pipeline(..., on_event=listener)`` calls the listener.

    The listener is called in the thread that called ``run()``.

    Attributes
    ----------
    kind : str
        ``run started``, ``run finished``, ``step submitted`` (to an executor), ``step started``
        (in this process), ``step finished``, ``step retried``, ``step poked`` (a sensor checked
        its condition), or ``map progress``.
    time : float
        Seconds since the epoch.
    step : str
        The name of the step; "" for a run.
    state : object or None
        ``status``, ``seconds``, ``saved``, ``reason``, ``attempts`` and ``error`` (an exception)
        of the step, or of a run that has finished.
    index, done, total : int or None
        Of a mapped step: the position of the element, how many are finished, how many there are.
        When a run starts, ``total`` is the number of its steps.

    Examples
    --------
    >>> events = []
    >>> _ = Pipeline({"more": lambda x: x + 1}, on_event=events.append).run(x=1)
    >>> [event.kind for event in events]
    ['run started', 'step started', 'step finished', 'run finished']
    """

    kind: str
    time: float
    step: str = ""
    state: _StepState | None = None
    index: int | None = None
    done: int | None = None
    total: int | None = None


_Listener = Callable[[Event], object]


class _Listeners:
    """The listeners of one run. A listener that raises will receive no further events.

    Listeners with a method ``tick`` show the run: the loop calls it while it waits for a step, so
    that they can show how long the step has been running.
    """

    def __init__(self, listeners: list[_Listener]) -> None:
        self._listeners = listeners
        self.wants_ticks = any(hasattr(listener, "tick") for listener in listeners)

    def emit(self, kind: str, step: str = "", **facts: Any) -> None:
        """Call the listeners with a new event, which has these facts."""
        event = Event(kind, time.time(), step, **facts)
        for listener in [*self._listeners]:
            self._call(listener, listener, event)

    def tick(self) -> None:
        for listener in [*self._listeners]:
            if hasattr(listener, "tick"):
                self._call(listener, listener.tick)

    def _call(self, listener: Any, method: Callable[..., object], *arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception as error:
            self._listeners.remove(listener)
            _warn(
                f"{_summarize(listener)} will receive no further events of this run: "
                f"{_describe_error(error)}"
            )


def _log_event(event: Event) -> None:
    """Write an event to the logger ``dagkit``."""
    import logging

    level = logging.INFO
    state = event.state
    details = [event.step]
    if event.kind == "run started":
        details = [_count(event.total or 0, "step")]
    elif event.kind == "map progress":
        details.append(f"{event.done} of {event.total}")
    elif event.kind in ("step retried", "step poked") and state is not None:
        details += [f"attempt {state.attempts}", _describe_error(state.error)]
    elif event.kind in ("step finished", "run finished") and state is not None:
        details = [f"{state.name} {state.status}"]
        if state.status in ("ran", "failed"):
            details.append(_format_duration(state.seconds))
        if state.saved:
            details.append(f"saved {_format_duration(state.saved)}")
        if state.reason:
            details.append(f"reason: {state.reason}")
        details.append(_describe_error(state.error))
        if state.status == "failed":
            level = logging.ERROR
    text = ", ".join(filter(None, details))
    logging.getLogger("dagkit").log(level, "%s: %s", event.kind, text)


########################################################################################
### Records
########################################################################################

# The fields of a record, in the order of its line of JSON, with what it means if one is missing.
# A line ends with the steps, so that it can be read without decoding them.
_RECORD_FIELDS: dict[str, Any] = {
    "id": "", "pipeline": "", "started": "", "seconds": 0.0, "status": "ran", "error": "",
    "user": "", "host": "", "python": "", "dagkit": "", "commit": "",
    "inputs": {}, "targets": [], "metrics": {}, "steps": {},
}  # fmt: skip

# The fields of a step in a record are those of its state. A record leaves out these values.
_STEP_FIELDS = {field.name: field.default for field in dataclasses.fields(_StepState)[1:]}
_STEP_FIELDS |= {"status": "ran", "error": ""}

_FINGERPRINT_DIGITS = 16  # of 64: enough to see whether two runs had the same value
_LONGEST_INPUT = 4096  # characters; a longer input is recorded as a short text
_NEWEST_ROWS = 100  # of a history that are displayed


def _make_record(
    results: _Results,
    *,
    title: str,
    started: float,
    seconds: float,
    inputs: dict[str, dict[str, Any]],
    fingerprints: Mapping[str, str],
) -> dict[str, Any]:
    """Describe a run in values that JSON can hold; `_record_input` has described its inputs."""
    error = results.failure
    steps = {}
    for state in results.list_states():
        steps[state.name] = _record_step(state)
        if error is None and state.status == "failed":
            error = state.error
    for name, record in inputs.items():
        if name in fingerprints:
            record["fingerprint"] = fingerprints[name][:_FINGERPRINT_DIGITS]
    metrics = {}
    values = {}
    for name in results.order.targets:
        value = results.values.get(name)
        if not isinstance(value, _Handle):
            values[name] = value
        elif isinstance(value, _StoredHandle) and name in value.entry.metrics:
            metrics[name] = value.entry.metrics[name]  # the value is not loaded for it
    folder = ""  # of the file that defines the first step
    for step in results.order.steps:
        code = getattr(_unwrap(step.function), "__code__", None)
        if code is not None:
            folder = os.path.dirname(code.co_filename)
            break
    host = os.environ.get("COMPUTERNAME", "")  # the module platform is slow to import
    if hasattr(os, "uname"):
        host = os.uname().nodename
    return _RECORD_FIELDS | {
        "id": os.urandom(6).hex(),
        "pipeline": title,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(seconds, 6),
        "status": "ran" if error is None else "failed",
        "error": _describe_error(error),
        "user": os.environ.get("USER") or os.environ.get("USERNAME", ""),
        "host": host,
        "python": sys.version.split()[0],
        "dagkit": __version__,
        "commit": _read_commit(folder, period=int(time.monotonic() // 10)),
        "inputs": inputs,
        "targets": [*results.order.targets],
        "metrics": metrics | _find_metrics(values),
        "steps": steps,
    }


def _record_step(state: _StepState) -> dict[str, Any]:
    record = {}
    for name, default in _STEP_FIELDS.items():
        fact = getattr(state, name)
        if fact is default:
            continue
        if name == "error":
            fact = _describe_error(fact)
        elif name == "fingerprint":
            fact = fact[:_FINGERPRINT_DIGITS]
        elif type(fact) is float:
            fact = round(fact, 6)
        if fact != default:
            record[name] = fact
    return record


def _record_input(value: Any) -> dict[str, Any]:
    """Describe an input so that it can be given again if it is short; else say what it is.

    The result shares nothing with the value, since a step may change the value in place.
    """
    if isinstance(value, _CatalogHandle):
        return {"catalog": str(value.dataset)}
    if _is_path(value):
        return {"path": str(value)}
    if type(value) is list and value and all(_is_path(x) for x in value[:_LONGEST_INPUT]):
        paths = [str(path) for path in value[:_LONGEST_INPUT]]
        if len("".join(paths)) < _LONGEST_INPUT:
            return {"paths": paths}
    with contextlib.suppress(RecursionError):  # a list may contain itself
        if _measure_json(value, _LONGEST_INPUT) <= _LONGEST_INPUT:
            if type(value) in (list, dict):
                value = json.loads(_encode_json(value))
            return {"value": value}
    return {"text": _summarize(value)}


def _is_path(value: Any) -> bool:
    """Return whether a value comes back as it was if it is recorded as a path."""
    if not isinstance(value, os.PathLike):
        return False
    from pathlib import Path

    return type(value) is type(Path())


def _measure_json(value: Any, limit: int) -> int:
    """Return about how many characters the JSON of a value has.

    The result is above the limit, and the value is not read to its end, if it is longer or if the
    value would not come back from JSON as it was.
    """
    kind = type(value)  # a subclass would come back as its base class
    if kind is str:
        return len(value) + 2
    if kind is int:
        return int(value.bit_length()) // 3 + 1
    if kind is float or kind is bool or value is None:
        return len(repr(value))
    items = value
    if kind is dict and all(type(key) is str for key in value):
        items = [*value.keys(), *value.values()]
    elif kind is not list:
        return limit + 1
    size = 2
    for item in items:
        size += 2 + _measure_json(item, limit - size)
        if size > limit:
            break
    return size


@functools.lru_cache(16)
def _read_commit(folder: str, period: int) -> str:
    """Return the commit that is checked out in a folder, or "" outside of a repository.

    The files of ``.git`` are read without git, since starting a process takes milliseconds. See
    ``man gitrepository-layout``. They are read once in a period.
    """
    try:
        folder = os.path.abspath(folder if os.path.isdir(folder) else ".")  # a notebook has no file
        while not os.path.exists(f"{folder}/.git"):
            parent = os.path.dirname(folder)
            if parent == folder:
                return ""
            folder = parent
        git_folder = f"{folder}/.git"
        if os.path.isfile(git_folder):  # a worktree or a submodule
            git_folder = os.path.join(
                folder, _read_text(git_folder).removeprefix("gitdir:").strip()
            )
        shared_folder = git_folder
        if os.path.exists(f"{git_folder}/commondir"):  # a worktree
            shared_folder = os.path.join(git_folder, _read_text(f"{git_folder}/commondir"))
        content = _read_text(f"{git_folder}/HEAD")
        for _ in range(5):  # git follows as many symbolic references
            if content.startswith("ref:"):
                name = content[4:].strip()
                if os.path.isfile(f"{shared_folder}/{name}"):
                    content = _read_text(f"{shared_folder}/{name}")
                else:
                    packed = _read_text(f"{shared_folder}/packed-refs")
                    match = re.search(rf"^(\w+) {re.escape(name)}$", packed, re.MULTILINE)
                    content = match[1] if match else ""
    except (OSError, ValueError):
        return ""
    is_commit = len(content) in (40, 64) and set(content) <= set("0123456789abcdef")
    return content if is_commit else ""


def _read_text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read().strip()


class _Record(dict[str, Any]):
    """A recorded run as one flat row: facts, ``inputs.NAME`` and ``metrics.NAME``.

    Attributes
    ----------
    inputs : dict
        Name -> value of the inputs that can be given again: ``pipeline.run(**record.inputs)``.
    steps : dict
        Step name -> status, reason, seconds, attempts, error, saved, fingerprint, elements.
    """

    __slots__ = ("_line",)

    def __init__(self, line: bytes) -> None:
        # Do not decode the steps, which are the last field: there may be thousands. An input may
        # have a key "steps" as well. Then the first half is not valid JSON, and we decode all.
        head_size = line.find(b',"steps":')
        try:
            fields = json.loads(line[:head_size] + b"}")
        except ValueError:
            fields = json.loads(line)
        for name, default in _RECORD_FIELDS.items():
            fact = fields.get(name, default)
            kind = type(fact)
            if kind is not type(default):
                raise ValueError(f"the field {name} of a record cannot be {fact!r}")
            if kind is str or kind is float:
                self[name] = fact
        for name, recorded in fields.get("inputs", {}).items():
            self[f"inputs.{name}"] = next(iter(recorded.values()))
        for name, metric in fields.get("metrics", {}).items():
            self[f"metrics.{name}"] = metric
        self._line = line

    @property
    def inputs(self) -> dict[str, Any]:
        from pathlib import Path

        values: dict[str, Any] = {}
        for name, recorded in json.loads(self._line)["inputs"].items():
            if "path" in recorded:
                values[name] = Path(recorded["path"])
            elif "paths" in recorded:
                values[name] = [Path(path) for path in recorded["paths"]]
            elif "value" in recorded:
                values[name] = recorded["value"]
        return values

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        steps = json.loads(self._line)["steps"]
        return {name: _STEP_FIELDS | facts for name, facts in steps.items()}


class _History(list[_Record]):
    """Recorded runs, newest last; displayed as a table of the columns in which they differ."""

    def __repr__(self) -> str:
        return f"{_format_table(self._make_rows())}\n{self._count_older_runs()}".rstrip()

    def _repr_html_(self) -> str:
        return f"{_format_html_table(self._make_rows())}<p>{self._count_older_runs()}</p>"

    def _count_older_runs(self) -> str:
        count = len(self) - _NEWEST_ROWS
        return f"… and {count:,} older runs" if count > 0 else ""

    def _make_rows(self) -> list[list[str]]:
        records = self[-_NEWEST_ROWS:]
        names: dict[str, None] = {}  # as a set that keeps the order
        for record in records:
            names |= dict.fromkeys(record)
        names.pop("id", None)
        columns = []
        for name in names:
            is_failure = name in ("status", "error") and any(r["status"] != "ran" for r in records)
            if is_failure or len({repr(record.get(name)) for record in records}) > 1:
                columns.append(name)
        columns = columns or [*names]
        columns.sort(key=lambda x: (not x.startswith("inputs."), not x.startswith("metrics.")))
        rows = [[name.partition(".")[2] or name for name in columns]]
        for record in records:
            row = []
            for name in columns:
                value = record.get(name, "")
                if name == "seconds":
                    row.append(_format_duration(value))
                elif name == "started":
                    row.append(str(value).rstrip("Z").replace("T", " "))
                elif type(value) is float:
                    row.append(f"{value:.4g}")
                else:
                    row.append(_cut_middle(str(value), 48))
            rows.append(row)
        return rows


def _read_history(lines: Iterable[bytes], title: str) -> _History:
    """Read the records of the pipelines of that name; leave out lines that are no record."""
    history = _History()
    for line in lines:
        try:
            record = _Record(line)
        except Exception:  # anything may stand there, such as 10,000 brackets
            continue
        if record["pipeline"] == title:
            history.append(record)
    return history


########################################################################################
### Live
########################################################################################

_FIRST_FRAME = 0.4  # seconds; a run that is shorter need not be drawn
_FRAMES_AT_ONCE = 8


def _is_terminal(stream: Any) -> bool:
    with contextlib.suppress(ValueError):  # it was closed
        return stream is not None and stream.isatty()
    return False


def _get_notebook_cell() -> int | None:
    """Return the number of the cell that runs, None outside of a notebook; import nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if not hasattr(shell, "kernel"):
        return None
    return getattr(shell, "execution_count", None)


class _ProgressLines:
    """Writes a line for each step that ends. On a terminal, a line below says what is running."""

    def __init__(self, title: str, steps: Sequence[Step], stream: Any) -> None:
        self.title = title
        self.stream = stream
        self.steps = {step.name: step for step in steps}
        self.name_width = max(map(_count_cells, self.steps), default=0)
        self.is_terminal = _is_terminal(stream) and os.environ.get("TERM") != "dumb"
        self.has_colors = self.is_terminal and not os.environ.get("NO_COLOR")
        self.is_ascii = not _can_encode_glyphs(stream)
        self.starts: dict[str, float] = {}  # name of a running step -> since when
        self.progress: dict[str, str] = {}  # name of a running step -> " 3/20", "; attempt 2"
        self.counts: Counter[str] = Counter()
        self.saved = 0.0  # seconds
        self.failures: list[str] = []
        self.last_write = 0.0

    def __call__(self, event: Event) -> None:
        state = event.state
        if event.kind == "step finished" and state is not None:
            self.starts.pop(event.step, None)
            self.counts[state.status] += 1
            self.saved += state.saved
            line = self._format_line(state)
            if state.status == "failed":
                self.failures.append(line)
            self._write([line])
        elif event.kind == "run finished" and state is not None:
            self.starts.clear()
            lines = [self._format_summary(state)]
            if self.counts.total() > 20:  # earlier lines may have scrolled away
                lines = self.failures + lines
            self._write(lines)
        elif event.step:
            self.starts.setdefault(event.step, event.time)
            if event.kind == "map progress":
                self.progress[event.step] = f" {event.done}/{event.total}"
            elif event.kind == "step retried" and state is not None:
                self.progress[event.step] = f", attempt {state.attempts + 1}"
            self.tick()

    def tick(self) -> None:
        """Rewrite the last line of the terminal, at most ten times a second."""
        if self.is_terminal and self.starts and time.monotonic() - self.last_write > 0.1:
            self._write([])

    def _write(self, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        if self.is_terminal:
            text = f"\r\x1b[K{text}"
            if self.starts:
                text += self._format_running()
        self.stream.write(text)
        self.stream.flush()
        self.last_write = time.monotonic()

    def _format_line(self, state: _StepState) -> str:
        look = _LOOKS[state.status]
        outcome = _describe_outcome(state)
        if state.status == "ran":
            outcome = _describe_briefly(state)
        elif state.status == "failed":
            outcome += f"   ({_locate(self.steps[state.name].function)})"
        head = self._fit(f"{look.glyph} {_fill(state.name, self.name_width)}")
        tail = self._fit(f"   {state.status:7}   {outcome}", _count_cells(head)).rstrip()
        if self.has_colors:
            head = f"\x1b[{look.ansi}m{head}\x1b[0m"
        return head + tail

    def _format_running(self) -> str:
        name, start = next(iter(self.starts.items()))
        seconds = _format_duration(max(0.0, time.time() - start))
        text = f"▶ {name}{self.progress.get(name, '')} {seconds}"
        if len(self.starts) > 1:
            text += f", {len(self.starts) - 1} more"
        return self._fit(f"{text}   {self.counts.total()}/{len(self.steps)}")

    def _format_summary(self, state: _StepState) -> str:
        verb = "failed" if state.status == "failed" or self.counts["failed"] else "done"
        texts = [f"{self.title} {verb} in {_format_duration(state.seconds)}"]
        for status in filter(self.counts.get, _LOOKS):
            texts.append(f"{self.counts[status]} {status}")
            if status == "cached" and self.saved:
                texts[-1] += f" (saved {_format_duration(self.saved)})"
        return self._fit(" · ".join(texts))

    def _fit(self, text: str, used_cells: int = 0) -> str:
        """Make a text that the stream can encode, and cut it to the width of a terminal."""
        text = _make_printable(text)
        if self.is_terminal:
            import shutil

            columns = shutil.get_terminal_size().columns
            text = _cut_end(text, max(8, columns - 1 - used_cells))
        return _to_ascii(text) if self.is_ascii else text


class _LivePicture:
    """Shows a run in a notebook: one output, which is drawn again while the run goes on.

    While the calling thread runs a step, nothing can be drawn. So a frame is drawn when a step
    starts, also when the first one does, unless the last run of these steps was a short one: a loop
    of short runs would fill the notebook. A notebook needs 20 to 130 ms for a frame, so there are
    at most four a second on average; the first eight may follow each other closely.
    """

    short_runs: ClassVar[set[int]] = set()  # hashes of titles and steps

    def __init__(self, scene: _Scene, steps: Sequence[Step]) -> None:
        self.states = {step.name: _StepState(step.name, "waiting") for step in steps}
        self.scene = scene._replace(states=self.states)
        self.key = hash((scene.title, *self.states))
        self.most_frames = 4.0 if len(steps) <= 100 else 1.0  # a second
        self.rate = self.most_frames
        self.credit = float(_FRAMES_AT_ONCE)  # number of frames that may be drawn now
        self.start = self.last_check = self.last_frame = time.monotonic()
        self.has_changed = False
        self.handle: Any = None
        self.cell: int | None = None  # number of the cell that shows the picture

    def __call__(self, event: Event) -> None:
        name = event.step
        if event.kind == "run finished" and event.state is not None:
            self._finish(event.state)
        elif event.kind == "step finished" and event.state is not None:
            self.states[name] = event.state
        elif event.kind == "map progress":
            reason = f"{event.done}/{event.total}"
            self.states[name] = _StepState(name, "running", reason, elements=event.total)
        elif event.kind in ("step retried", "step poked") and event.state is not None:
            reason = f"attempt {event.state.attempts}"
            self.states[name] = replace(self.states[name], status="running", reason=reason)
        elif name and self.states[name].status == "waiting":
            self.states[name] = _StepState(name, "running")
        self.has_changed = True
        if event.kind == "step started" and self.key not in self.short_runs:
            self._draw_if_allowed()
        elif name:
            self.tick()

    def tick(self) -> None:
        """Draw a frame if something has changed, or each second to update the time."""
        now = time.monotonic()
        is_due = self.has_changed or now - self.last_frame >= 1
        if is_due and now - max(self.start + _FIRST_FRAME, self.last_frame + 1 / self.rate) >= 0:
            self._draw_if_allowed()

    def _draw_if_allowed(self) -> None:
        now = time.monotonic()
        self.credit = min(_FRAMES_AT_ONCE, self.credit + (now - self.last_check) * self.rate)
        self.last_check = now
        if self.credit >= 1:
            self.credit -= 1
            self._draw(now - self.start)

    def _draw(self, seconds: float) -> None:
        from IPython.display import display

        picture = _Picture(self.scene._replace(seconds=seconds))
        start = time.perf_counter()
        if self.handle is None:
            self.handle = display(picture, display_id=True)
            self.cell = _get_notebook_cell()
        else:
            self.handle.update(picture)
        self.rate = min(self.most_frames, 0.02 / (time.perf_counter() - start))  # 2 % of the time
        self.last_frame = time.monotonic()
        self.has_changed = False

    def _finish(self, run: _StepState) -> None:
        """Settle what an exception or an interrupt has left open, and draw the last frame."""
        graph = self.scene.graph
        absent: set[str] = set()  # values of steps that failed or were skipped
        for name, state in self.states.items():
            step = graph.steps[name]
            causes = absent.intersection(step.dependencies).difference(step.defaults)
            if state.status == "running":
                self.states[name] = replace(state, status="failed", reason="interrupted")
            elif state.status == "waiting" and causes:
                cause = graph.producers[min(causes, key=step.dependencies.index)].name
                self.states[name] = _StepState(name, "skipped", f"needs {cause}")
            if self.states[name].status in ("failed", "skipped"):
                absent.update(step.values)
        if run.status != "failed" and run.seconds < _FIRST_FRAME:
            self.short_runs.add(self.key)
        else:
            self.short_runs.discard(self.key)
        if run.status == "failed" or self.handle is not None:
            self._draw(run.seconds)


########################################################################################
### Plan
########################################################################################


class _ReadOnlyMapping(_Displayable, Mapping[str, Any]):
    """A mapping of names, which notebooks complete in ``run["<tab>``."""

    _items: dict[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._items

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._items)


class Plan(_ReadOnlyMapping):
    """A preview of a run: what each step would do, and why. ``Pipeline.plan`` makes it.

    A mapping of step name -> ``name``, ``status``, ``reason``, in the order in which the steps
    would run. The statuses: ``fresh`` (a stored result will be reused), ``stale`` (it will run,
    because what the reason says has changed), ``maybe`` (a step above will run; this one runs only
    if that gives another value), ``new`` (it will run, because nothing is stored), ``uncached`` (it
    always runs).

    Examples
    --------
    >>> plan = Pipeline({"more": lambda x: x + 1}).plan(x=1)
    >>> plan["more"].status
    'uncached'
    """

    def __init__(self, scene: _Scene) -> None:
        self._scene = scene
        self._items = dict(scene.states or {})

    def __getitem__(self, name: str) -> _StepState:
        __tracebackhide__ = True
        if name in self:
            state: _StepState = self._items[name]
            return state
        text = f"{name!r} is not a step of this plan\n"
        raise NoValueError(text + _suggest_names([str(name)], self._items, "steps"))

    def __repr__(self) -> str:
        counts = self._scene.count_statuses() or "no steps"
        return f"<Plan of '{self._scene.title}': {counts}>"

    def _make_scene(self) -> _Scene:
        return self._scene


########################################################################################
### Run
########################################################################################


class Run(_ReadOnlyMapping):
    """The values of a run's targets, and how the run went. ``Pipeline.run`` returns it.

    A mapping of target -> value. A target whose step failed or was skipped is not a key. A value
    that is stored is loaded when it is asked for.

    Attributes
    ----------
    inputs : dict
        Name -> value of everything that was given, and of the defaults that were used.
        Values from the catalog are left out.

    Examples
    --------
    >>> run = Pipeline({"more": lambda x: x + 1}).run(x=1)
    >>> run["more"], run.steps["more"].status, run.inputs
    (2, 'ran', {'x': 1})
    >>> print(run)  # doctest: +ELLIPSIS
    pipeline · 1 step, 1 input · 1 ran · ...
      more   x   ■ ran   ...
    <BLANKLINE>
      more = 2
    """

    def __init__(
        self,
        scene: _Scene,
        inputs: Mapping[str, Any],
        results: _Results,
        session: _Session,
        make_record: Callable[[], dict[str, Any]],
        cell: int | None,
    ) -> None:
        values = results.values
        self.inputs = {n: v for n, v in inputs.items() if not isinstance(v, _CatalogHandle)}
        self._items = {name: values[name] for name in results.order.targets if name in values}
        self._absent = results.absent
        self._scene = scene
        self._list_states = results.list_states
        self._load_target = session.load_target
        self._make_record = make_record
        self._cell = cell  # of a notebook, which has displayed this run already

    def __getitem__(self, name: str) -> Any:
        __tracebackhide__ = True
        if name in self:
            value = self._items[name]
            if isinstance(value, _Handle):
                self._items[name] = value = self._load_target(name, value)
            return value
        if not isinstance(name, str) or name not in self._absent:
            text = f"{name!r} was not a target of this run\n"
            raise NoValueError(text + _suggest_names([str(name)], self._items))
        state = self.steps[self._absent[name]]
        text = f"step '{state.name}' was skipped: {state.reason}"
        if state.error is not None:
            text = f"step '{state.name}' failed: {_describe_error(state.error)}"
        raise NoValueError(text, step=state.name, name=name)

    def __repr__(self) -> str:
        scene = self._make_scene()
        texts = [scene.count_statuses() or "no steps", *scene.describe_time()]
        return f"<Run of '{scene.title}': {', '.join(texts)}>"

    def _make_scene(self) -> _Scene:
        return self._scene._replace(states=self.steps, values=self._items)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        if self._cell is None or self._cell != _get_notebook_cell():
            return super()._repr_mimebundle_(include, exclude)
        # The live picture is in the same cell already.
        values = _format_values(self._make_scene())
        return {"text/plain": f"{self!r}\n{values}".rstrip()}

    def __getstate__(self) -> dict[str, Any]:
        # A run can be pickled if its values can: what refers to functions is left out.
        for name in self._items:
            self[name]
        state = {"steps": self.steps, "record": self.record, **vars(self)}
        for name in ("_list_states", "_load_target", "_make_record"):
            del state[name]
        state["_scene"] = self._scene._replace(graph=_remove_functions(self._scene.graph))
        return state

    @functools.cached_property
    def steps(self) -> dict[str, _StepState]:
        """Step name -> how it went, in the order in which the steps ended.

        Examples
        --------
        >>> run = Pipeline({"bad": lambda: 1 / 0}, on_error="continue").run()
        >>> run.steps["bad"].status, run.steps["bad"].attempts
        ('failed', 1)
        """
        return {state.name: state for state in self._list_states()}

    @property
    def errors(self) -> dict[str, BaseException]:
        """Step name -> its exception, for the steps that failed.

        Examples
        --------
        >>> Pipeline({"bad": lambda: 1 / 0}, on_error="continue").run().errors
        {'bad': ZeroDivisionError('division by zero')}
        """
        states = self.steps.values()
        return {state.name: state.error for state in states if state.error is not None}

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The run without its values, ready for ``json.dumps``; times are in seconds.

        Examples
        --------
        >>> Pipeline({"more": lambda x: x + 1}).run(x=1).record["metrics"]
        {'more': 2}
        """
        return self._make_record()


def _remove_functions(graph: _Graph) -> _Graph:
    """Return a graph with the same names and edges, which can always be pickled."""
    steps = {}
    for step in graph.steps.values():
        steps[step.name] = Step(
            dict,
            name=step.name,
            outputs=step.outputs,
            args=dict(zip(step.needs, step.needs, strict=True)),
            map=step.mapped_values,
            after=step.after,
        )
    producers = {name: steps[step.name] for name, step in graph.producers.items()}
    sorted_steps = [steps[step.name] for step in graph.sorted_steps]
    return _Graph(steps, producers, dict.fromkeys(graph.inputs, REQUIRED), sorted_steps)


########################################################################################
### Pipeline
########################################################################################


class _Build(NamedTuple):
    """A graph, and what it was built from."""

    things: list[Any]  # what was declared: names, functions and steps
    functions: list[FunctionType]
    states: list[Any]  # of the functions, which IPython's autoreload changes in place
    graph: _Graph
    has_cache: bool  # whether a step is cached
    orders: dict[Any, _Order]  # that were made of it, by targets and names of given values


class _Preparation(NamedTuple):
    """All that a run or a plan begins with."""

    build: _Build
    order: _Order
    inputs: dict[str, Any]  # name -> what was given, default, or handle of the catalog
    values: dict[str, Any]  # the inputs, and the outputs of steps that were given
    datasets: dict[str, Any]  # name -> dataset of the catalog, for values that steps produce


_PIPELINE_OPTIONS = {
    "cache": _Option(lambda x: isinstance(x, bool | timedelta), "True, False or a timedelta"),
    "store": _Option(
        lambda x: isinstance(x, Store | str | os.PathLike | None), "a Store or the path of a folder"
    ),
    "executor": _Option(
        lambda x: x is None or (hasattr(x, "submit") and not isinstance(x, type)),
        "an object with submit(), such as a ThreadPoolExecutor",
    ),
    "catalog": _Option(
        lambda x: isinstance(x, Mapping | None),
        "a dict: name -> path, or object with load() and save(value)",
    ),
    "on_event": _Option(
        lambda x: callable(x) or (isinstance(x, list) and all(map(callable, x))),
        "a callable or several, each for one Event",
    ),
    "progress": _Option(
        lambda x: isinstance(x, bool) or (isinstance(x, str) and x == "auto"),
        "True, False or 'auto'",
    ),
    "on_error": _Option(
        lambda x: isinstance(x, str) and x in ("raise", "continue"), "'raise' or 'continue'"
    ),
    "name": _Option(
        lambda x: isinstance(x, str) and x.isprintable(), "a text without control characters"
    ),
}


class Pipeline(_Displayable, _Composable):
    """Steps that fit together by the names of their arguments.

    Run it: :meth:`run`. Ask what would run, and why: :meth:`plan`. Look at it: :meth:`show`,
    :attr:`graph`, :attr:`steps`, :attr:`inputs`. Look back at its runs: :meth:`history`. See what
    it stores: :attr:`store`, :attr:`catalog`. Make a variant of it: :meth:`replace`.

    Parameters
    ----------
    *sources
        Modules, names of modules (``Pipeline(__name__)``), mappings (``globals()``), functions,
        ``Step`` objects, other pipelines, and iterables of these. A module or mapping provides
        all that ``@step`` has marked, or, if nothing is marked, its public functions. Modules,
        mappings and pipelines are followed: if a step is defined anew, the next run uses it.
    cache : bool or timedelta
        The option ``cache`` of the steps that do not have it. Sensors are never cached.
    store : Store or path, optional
        Where results of cached steps are stored. Default: ``$DAGKIT_STORE`` or the folder
        ``.dagkit``.
    executor : executor or dask.distributed.Client, optional
        Where steps run: anything with the ``submit`` of ``concurrent.futures``. Default: in the
        calling thread. With a Dask client, intermediate values stay on the cluster.
    catalog : dict of str to path or object, optional
        Name of an input -> where it is loaded from, if it is needed and not given. Name of a step
        or output -> where its value is saved after the step has run, and loaded from for all that
        need it. The suffix of a path is its format (.bytes .csv .feather .json .jsonl .npy .npz
        .parquet .pkl .txt, some with .gz; .pdf .png .svg for figures). It may be an address for
        fsspec, and may have names of inputs in braces. Any other object has ``load()`` and
        ``save(value)``.
    on_event : callable or iterable of callables, optional
        Called with each :class:`Event` of a run, in the thread that called ``run()``.
    progress : bool or "auto"
        Whether a run is displayed: by a live picture in a notebook, otherwise by a line a step on
        stderr. "auto" means in a notebook and on a terminal.
    on_error : {"raise", "continue"}
        What an exception of a step does: it ends the run, or only the steps that need its value
        are skipped.
    name : str, optional
        The name in pictures and records. Default: that of the first module among the sources, or
        ``pipeline``.

    Raises
    ------
    StepError
        At once, for something that can never be a source, and for a wrong option. At the first
        use, for steps that do not fit together, since sources may still change.
    CycleError, CatalogError, InputError
        At the first use.

    Examples
    --------
    >>> def total(prices):
    ...     return sum(prices)
    >>> def mean(total, prices, digits=2):
    ...     return round(total / len(prices), digits)
    >>> pipeline = Pipeline(total, mean)
    >>> pipeline
    <Pipeline 'pipeline': 2 steps, 2 inputs, targets mean>
    >>> pipeline.run(prices=[1, 2, 2])["mean"]
    1.67
    """

    def __init__(
        self,
        *sources: Any,
        cache: bool | timedelta = False,
        store: Store | str | os.PathLike[str] | None = None,
        executor: Any = None,
        catalog: Mapping[str, Any] | None = None,
        on_event: _Listener | Iterable[_Listener] = (),
        progress: bool | Literal["auto"] = "auto",
        on_error: Literal["raise", "continue"] = "raise",
        name: str = "",
    ) -> None:
        __tracebackhide__ = True
        listeners: Any = on_event
        if not callable(on_event):
            with contextlib.suppress(Exception):  # it is not iterable, which the check will say
                listeners = list(on_event)
        self._options = {
            "cache": cache,
            "store": store,
            "executor": executor,
            "catalog": catalog,
            "on_event": listeners,
            "progress": progress,
            "on_error": on_error,
            "name": name,
        }
        wrong, expected = _find_wrong_options(self._options, _PIPELINE_OPTIONS)
        if wrong:
            raise StepError(f"Pipeline() has {wrong}\n  {expected}")
        try:
            self._sources = _read_sources(sources)
            self._catalog = _read_catalog(catalog)
        except DagkitError as error:
            raise error.with_traceback(None) from None
        self._listeners: list[_Listener] = listeners if isinstance(listeners, list) else [listeners]
        self._store = store if isinstance(store, Store) else Store(store)
        self._has_store = store is not None or "DAGKIT_STORE" in os.environ
        self._code_memo = _CodeMemo()
        self._build: _Build | None = None

    def _update_build(self) -> _Build:
        """Return the graph of the steps as they are now. Build it again if a step has changed."""
        __tracebackhide__ = True
        build = self._build
        try:
            if build is not None and self._is_current(build):
                return build
            declarations = _find_declarations(self._sources)
            graph = _build_graph(declarations, self._options["cache"])
            if self._catalog:
                graph = _add_catalog(graph, self._catalog)
        except DagkitError as error:
            raise error.with_traceback(None) from error.__cause__
        things = list(itertools.chain.from_iterable(declarations))
        functions = [thing for thing in things if type(thing) is FunctionType]
        has_cache = any(step.cache for step in graph.steps.values())
        self._build = _Build(things, functions, _get_states(functions), graph, has_cache, {})
        return self._build

    def _is_current(self, build: _Build) -> bool:
        """Return whether the sources still declare what a graph was built from."""
        # Compare by identity: two objects that hold arrays cannot be compared by value.
        if not _are_identical(build.states, _get_states(build.functions)):
            return False
        if all(type(source) is list for source in self._sources):
            return True
        declarations = _find_declarations(self._sources)
        return _are_identical(build.things, [*itertools.chain.from_iterable(declarations)])

    @property
    def graph(self) -> nx.DiGraph[str]:
        """The graph as it is now, as a frozen copy. An edge leads from a value to what needs it.

        Nodes are all names that have a value. Their attributes are ``kind`` (``"input"``,
        ``"step"`` or ``"output"``) and ``step`` (the name of the step that produces the value, or
        ``""``). Edges have a ``kind``: ``"value"``, ``"output"`` (from a step to an item of its
        value) or ``"after"``. All attributes are texts, so the graph can be written to any format.

        Examples
        --------
        >>> graph = Pipeline({"more": lambda x: x + 1}).graph
        >>> list(graph.edges(data="kind")), graph.nodes["x"]
        ([('x', 'more', 'value')], {'kind': 'input', 'step': ''})
        """
        __tracebackhide__ = True
        import networkx as nx

        network: nx.DiGraph[str] = nx.freeze(_make_network(self._update_build().graph))
        return network

    @property
    def steps(self) -> Mapping[str, Step]:
        """Step name -> ``Step``, in the order in which they are declared.

        Examples
        --------
        >>> Pipeline({"more": lambda x: x + 1}).steps["more"].needs
        ('x',)
        """
        __tracebackhide__ = True
        return MappingProxyType(self._update_build().graph.steps)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Name of an input -> its default, or ``REQUIRED`` if it has none.

        Examples
        --------
        >>> Pipeline({"more": lambda x, by=1: x + by}).inputs
        mappingproxy({'x': <required>, 'by': 1})
        """
        __tracebackhide__ = True
        return MappingProxyType(self._update_build().graph.inputs)

    @property
    def store(self) -> Store:
        """Where results are stored: ``clear``, ``prune``, ``size``.

        Examples
        --------
        >>> Pipeline({"more": lambda x: x + 1}, store="/nowhere").store
        Store('/nowhere')
        """
        return self._store

    @property
    def catalog(self) -> Mapping[str, Any]:
        """Name of an input, step or output -> where it is loaded from, or saved to.

        Examples
        --------
        >>> Pipeline({"more": lambda x: x + 1}, catalog={"x": "x.json"}).catalog["x"]
        'x.json'
        """
        return MappingProxyType(self._catalog)

    def run(self, /, *targets: str, **inputs: Any) -> Run:
        """Run the steps that the targets need, in topological order.

        A value is dropped as soon as no target and no later step needs it. Name the targets to
        profit from this.

        Parameters
        ----------
        *targets : str
            Names of steps, outputs or inputs. Default: all steps and outputs.
        **inputs
            Values for inputs. A step or output can be given as well: then it does not run, nor do
            steps that only it needs. An iterator becomes a list.

        Returns
        -------
        Run
            A mapping: name of a target -> value.

        Raises
        ------
        InputError
            Before any step runs, if a name is unknown, or an input or its file is missing.
        StepError, CycleError, CatalogError
            Before any step runs, if the steps or the catalog do not fit together.
        ResultError
            If a step returns an iterator, or not as many values as it has outputs.
        Exception
            The exception of a step, with a note that names the step, its location and its
            arguments, unless the pipeline has ``on_error="continue"``.

        Examples
        --------
        >>> pipeline = Pipeline({"twice": lambda x: 2 * x, "more": lambda twice: twice + 1})
        >>> pipeline.run("more", x=1)["more"], pipeline.run("more", twice=10)["more"]
        (3, 11)
        """
        __tracebackhide__ = True
        try:
            preparation = self._prepare(targets, inputs)
            _check_files(preparation.inputs)
        except DagkitError as error:
            raise error.with_traceback(None) from error.__cause__
        outcome = self._execute(preparation)
        if isinstance(outcome, Run):
            return outcome
        if _get_notebook_cell() is not None:
            with contextlib.suppress(Exception):  # the exception may be frozen
                outcome._render_traceback_ = _render_traceback  # type: ignore[attr-defined]
        try:
            raise outcome
        finally:
            del outcome  # break the reference cycle error -> traceback -> frame -> error

    def plan(self, /, *targets: str, **inputs: Any) -> Plan:
        """Say what ``run`` would do with the same arguments, and why. No step runs.

        Parameters
        ----------
        *targets, **inputs
            As for :meth:`run`.

        Returns
        -------
        Plan
            A mapping: step name -> status and reason. ``print`` shows it as a table.

        Raises
        ------
        InputError, StepError, CycleError, CatalogError
            As for :meth:`run`.

        Examples
        --------
        >>> print(Pipeline({"twice": lambda x: 2 * x}).plan(x=1))
        pipeline · 1 step, 1 input · 1 uncached
          twice   x   ▹ uncached
        """
        __tracebackhide__ = True
        try:
            preparation = self._prepare(targets, inputs)
        except DagkitError as error:
            raise error.with_traceback(None) from error.__cause__
        order = preparation.order
        reuse = _Reuse(self._store, self._code_memo, order, preparation.datasets)
        policy = _Policy(reuse, is_plan=True)
        results = _Session(order, preparation.values, policy).run()
        states = {}
        for step in order.steps:
            states[step.name] = results.states[step.name]
        return Plan(self._make_call_scene(preparation)._replace(states=states))

    def _prepare(self, targets: tuple[Any, ...], inputs: dict[str, Any]) -> _Preparation:
        """Check the arguments of ``run()`` or ``plan()``, and find what is to be done with them."""
        build = self._update_build()
        graph = build.graph
        for target in targets:
            if not isinstance(target, str):
                raise InputError(
                    f"{_summarize(target)} cannot be a target of run(): targets are names\n"
                    "  expected names, as in run('model', 'accuracy', alpha=0.1)",
                    unknown=(_summarize(target),),
                )
        if not "".join(itertools.chain(targets, inputs)).isascii():
            targets = _normalize_names(targets)
            inputs = {_normalize_names(name): value for name, value in inputs.items()}
        key = (targets, frozenset(inputs))
        order = build.orders.get(key)
        if order is None:
            order = _make_order(graph, *key)
            if len(build.orders) >= 32:
                build.orders.clear()
            build.orders[key] = order
        for name, value in inputs.items():
            if isinstance(value, Iterator) and not hasattr(value, "read"):
                inputs[name] = list(value)  # the first step would use it up
        all_inputs = {**order.defaults, **inputs}
        datasets = {}
        if self._catalog:
            handle_names = [
                n for n, value in all_inputs.items() if isinstance(value, _CatalogHandle)
            ]
            names = [*order.producers, *handle_names]
            datasets = _find_datasets(self._catalog, names, {**graph.inputs, **inputs})
            for name in handle_names:
                all_inputs[name] = _CatalogHandle(datasets.pop(name))
        values = dict(all_inputs)
        for name in inputs:
            step = graph.steps.get(name)
            if step is not None and step.outputs:
                values = {**_name_values(step, inputs[name]), **values}
        return _Preparation(build, order, all_inputs, values, datasets)

    def _execute(self, preparation: _Preparation) -> Run | BaseException:
        """Make a run. Return it, or the exception that has ended it."""
        started = time.time()
        start = _clock()
        build, order, inputs, values, datasets = preparation
        scene = self._make_call_scene(preparation)
        display = self._make_display(scene, order)
        observers = [*self._listeners, *display]
        logging = sys.modules.get("logging")  # without this module, no log is read
        if logging is not None and logging.getLogger("dagkit").isEnabledFor(logging.INFO):
            observers.append(_log_event)
        listeners = _Listeners(observers) if observers else None
        reuse = _Reuse(self._store, self._code_memo, order, datasets)
        policy = _Policy(reuse, self._options["executor"], self._options["on_error"], listeners)
        session = _Session(order, values, policy)
        is_recorded = self._has_store or build.has_cache
        input_records = {}
        fingerprints = {}
        if is_recorded:  # before a step can change an input in place
            input_records = {name: _record_input(value) for name, value in inputs.items()}
            fingerprints = session.input_fingerprints
        if listeners is not None:
            listeners.emit("run started", total=len(order.steps))
        try:
            results = session.run()
        except BaseException as error:  # such as Ctrl-C between two steps
            results = _Results(order, {}, failure=error)
        failure = results.failure
        seconds = _clock() - start

        @functools.cache
        def make_record() -> dict[str, Any]:
            records = input_records or {name: _record_input(inputs[name]) for name in inputs}
            return _make_record(
                results,
                title=scene.title,
                started=started,
                seconds=seconds,
                inputs=records,
                fingerprints=fingerprints,
            )

        if is_recorded:
            self._store._append_record(make_record())
        if listeners is not None:
            status = "ran" if failure is None else "failed"
            state = _StepState(scene.title, status, seconds=seconds, error=failure)
            listeners.emit("run finished", state=state)
        if failure is None:
            cell = getattr(display[0], "cell", None) if display else None
            return Run(scene._replace(seconds=seconds), inputs, results, session, make_record, cell)
        # Frames to which the error refers hold the results: free the values, and break the
        # reference cycle error -> traceback -> frame -> results -> error.
        results.values.clear()
        results.states.clear()
        results.failure = None
        return failure

    def _make_call_scene(self, preparation: _Preparation) -> _Scene:
        order = preparation.order
        targets = frozenset(order.targets if order.has_targets else ())
        return _Scene(self._title, preparation.build.graph, targets=targets, given=order.given)

    def _make_display(self, scene: _Scene, order: _Order) -> list[Any]:
        """Return the listener that displays a run, if there is one."""
        progress = self._options["progress"]
        if progress and _get_notebook_cell() is not None:
            return [_LivePicture(scene, order.steps)]
        if (progress is True and sys.stderr is not None) or (progress and _is_terminal(sys.stderr)):
            return [_ProgressLines(scene.title, order.steps, sys.stderr)]
        return []

    def replace(self, /, *sources: Any, **options: Any) -> Pipeline:
        """Return a pipeline like this one with other sources or options.

        Parameters
        ----------
        *sources
            As for the class. Default: the sources of this pipeline.
        **options
            As for the class. Default: the options of this pipeline.

        Examples
        --------
        >>> pipeline = Pipeline({"bad": lambda: 1 / 0})
        >>> pipeline.replace(on_error="continue").run().steps["bad"].status
        'failed'
        """
        __tracebackhide__ = True
        _check_option_names("Pipeline()", options, _PIPELINE_OPTIONS)
        pipeline = type(self)(*sources, **{**self._options, **options})
        if not sources:
            pipeline._sources = self._sources
        return pipeline

    def history(self) -> list[Any]:
        """Return the recorded runs of pipelines of this name, newest last.

        A run is recorded if a step is cached, or if a store or catalog was given: as a line of
        JSON in the file ``runs.jsonl`` of the store. Pipelines that do not come from a module are
        all called ``pipeline``: give unrelated ones a name (``name=``) or a store each.

        Returns
        -------
        list of dict
            A flat row for each run: when, who, ``inputs.NAME``, ``metrics.NAME`` (the targets that
            are numbers or short texts). ``pandas.DataFrame`` takes it as it is. A row also has
            ``.steps`` and, for ``run(**row.inputs)``, ``.inputs``.

        Examples
        --------
        >>> import tempfile
        >>> pipeline = Pipeline({"more": lambda x: x + 1}, store=tempfile.mkdtemp())
        >>> for x in (1, 2):
        ...     _ = pipeline.run(x=x)
        >>> [row["metrics.more"] for row in pipeline.history()]
        [2, 3]
        """
        return _read_history(self._store._read_records(), self._title)

    @property
    def _title(self) -> str:
        if self._options["name"]:
            return str(self._options["name"])
        for source in self._sources:
            name = source.__name__ if isinstance(source, ModuleType) else source
            if name == "__main__":
                path = getattr(sys.modules[name], "__file__", None) or "pipeline"
                name = os.path.splitext(os.path.basename(path))[0]
            if isinstance(name, str):
                return _make_printable(name)
        return "pipeline"

    def _make_scene(self) -> _Scene:
        try:
            return _Scene(self._title, self._update_build().graph)
        except DagkitError as error:  # displaying a pipeline must not fail
            return _Scene(
                self._title, _Graph({}, {}, {}, []), fault=f"{type(error).__name__}: {error}"
            )

    def __repr__(self) -> str:
        scene = self._make_scene()
        if scene.fault:
            return f"<Pipeline '{scene.title}': {scene.fault.splitlines()[0]}>"
        steps = scene.graph.steps
        needed = {name for step in steps.values() for name in step.dependencies}
        last = [name for name, step in steps.items() if needed.isdisjoint(step.values)]
        targets = _join_names(last) or "none"
        return f"<Pipeline '{scene.title}': {scene.count_nodes()}, targets {targets}>"

    def __reduce__(self) -> Any:
        # Pickle the steps as they are now. Executors and listeners belong to this process.
        options = dict(self._options)
        for name in ("executor", "on_event", "progress"):
            del options[name]
        options["name"] = self._title
        return functools.partial(type(self), **options), tuple(self.steps.values())

    def __copy__(self) -> Pipeline:
        return self.replace()

    def __deepcopy__(self, memo: Any) -> Pipeline:
        return self.replace()


def _are_identical(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _get_states(functions: list[FunctionType]) -> list[Any]:
    """Return what may change in place of functions."""
    states: list[Any] = [function.__code__ for function in functions]
    states += [function.__defaults__ for function in functions]
    return states
