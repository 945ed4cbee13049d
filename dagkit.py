"""dagkit: functions become a pipeline, argument names are its edges.

A function is a *step*. An argument ``total`` takes the value of the step ``total``, or else the
*input* ``total`` that is given to :meth:`Pipeline.run`.

>>> from dagkit import Pipeline, step
>>> @step
... def total(prices):
...     return sum(prices)
>>> @step
... def mean(total, prices):
...     return total / len(prices)
>>> pipeline = Pipeline([total, mean])
>>> pipeline.run("mean", prices=[1, 2, 6])["mean"]
3.0

The rooms of this file, each built only on those above it:

Errors      what can be wrong, and messages that say where
Steps       a function and its options become a frozen ``Step``
Graph       steps become a networkx graph, or an error that names the culprit
Order       graph, targets and given inputs become the steps to run, one after the other
Cache       values and code become fingerprints, results become files
Data        files and data sets of the user's, which a catalog names
Display     what is known of steps becomes text, a picture, a page
Plan        what can be reused, and why the rest cannot
Run record  what is known of a run: values, statuses, times, errors
Events      what happens in a run, for those who listen
Execution   a plain loop for plain steps, one ready/done loop for all others
Pipeline    the façade: short methods that call the rooms above
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import hashlib
import heapq
import importlib.machinery
import inspect
import itertools
import marshal
import math
import opcode
import operator
import os
import queue
import re
import reprlib
import stat
import sys
import threading
import time
import types
import typing
import warnings
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta
from keyword import iskeyword
from types import CoroutineType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeVar, overload

try:
    import fcntl
except ImportError:  # Windows: no locks, so a step may run twice, with the same result
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from concurrent.futures import Future

    import networkx as nx

__version__ = "0.1.0"

__all__ = [
    "CatalogError",
    "CycleError",
    "DagkitError",
    "DagkitWarning",
    "DefaultsError",
    "DuplicateNameError",
    "Event",
    "MissingInputError",
    "MutationError",
    "NoValueError",
    "Pipeline",
    "Plan",
    "ResultError",
    "Run",
    "SensorTimeoutError",
    "Skip",
    "SourceError",
    "Step",
    "StepError",
    "Store",
    "UnknownNameError",
    "WorkerError",
    "sensor",
    "step",
]

_F = TypeVar("_F", bound=Callable[..., Any])

# The mark that @step leaves on a function: its options. functools.wraps copies it to a wrapper, so
# that a decorated step stays a step, and what runs is the wrapper.
_MARK = "_dagkit_options"

# The default of an input that has none, and of an argument that must be filled.
_REQUIRED = inspect.Parameter.empty


########################################################################################
### Errors
########################################################################################


class DagkitError(Exception):
    """Base of all errors that dagkit raises itself; a step's own exception keeps its type.

    Parameters
    ----------
    message : str
        What is wrong, where, what was expected, and what to do.
    **facts
        Become attributes, such as ``.step`` or ``.cycle``. They survive pickling.

    Examples
    --------
    >>> DagkitError("step 'fit' is odd", step="fit").step
    'fit'
    """

    step = name = ""
    cycle: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __init__(self, message: str = "", **facts: object) -> None:
        super().__init__(message)
        self.__dict__.update(facts)

    def __str__(self) -> str:
        # Spelt out for the subclasses of KeyError, which would show a sentence as its repr.
        return str(self.args[0]) if self.args else ""


class StepError(DagkitError, TypeError):
    """A function cannot be a step as it is: its signature, its name or an option."""


class SourceError(DagkitError, TypeError):
    """``Pipeline`` was given something that holds no steps."""


class DuplicateNameError(DagkitError, ValueError):
    """Two different steps make a value of the same name: ``.name``."""


class DefaultsError(DagkitError, ValueError):
    """Two steps give one input different defaults: ``.name``."""


class CycleError(DagkitError, ValueError):
    """Steps need each other: ``.cycle``, a tuple of names, the first one repeated last."""


class UnknownNameError(DagkitError, ValueError):
    """Targets or inputs that no step makes or takes: ``.unknown``, a tuple of names."""


class MissingInputError(DagkitError, TypeError):
    """Inputs without a value: ``.missing``, a tuple of all their names."""


class ResultError(DagkitError, ValueError):
    """A step returned what cannot be its result: too few parts, a generator."""


class CatalogError(DagkitError, ValueError):
    """An entry of the catalog cannot be one, or has changed under a run: ``.name``."""


class MutationError(DagkitError, ValueError):
    """A step has changed an argument in place, against strict= or what a run needs: ``.name``."""


class SensorTimeoutError(DagkitError, TimeoutError):
    """A sensor saw nothing in time."""


class WorkerError(DagkitError, RuntimeError):
    """A worker process has died, could not be sent a step, or raised what cannot be sent back."""


class NoValueError(DagkitError, KeyError):
    """A name has no value in a ``Run``: the step failed or was skipped, or was no target."""


class DagkitWarning(UserWarning):
    """Category of every warning that dagkit gives."""


def _warn(text: str) -> None:
    """Warn at the innermost line outside this module."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals is globals():
        frame, level = frame.f_back, level + 1
    warnings.warn(text, DagkitWarning, stacklevel=level)


class Skip(Exception):
    """Raise it in a step to skip that step and whatever needs its value.

    A step that takes the value by an argument with a default runs, and gets the default.

    Examples
    --------
    >>> def report(sales):
    ...     if not sales:
    ...         raise Skip("no sales today")
    >>> Pipeline(report).run(sales=[]).steps["report"].reason
    'no sales today'
    """


def _listed(names: Iterable[str], most: int = 12) -> str:
    """Join names to ``a, b, c``, sorted and cut to size."""
    names = sorted(names)
    return ", ".join(names[:most]) + f", … and {len(names) - most} more" * (len(names) > most)


def _hint(wrong: Sequence[str], known: Collection[str]) -> str:
    """List the known names, and for each wrong one the nearest of them."""
    import difflib

    near = {name: difflib.get_close_matches(name, known, n=1) for name in wrong}
    found = [f"'{near[n][0]}'" + f" for '{n}'" * (len(wrong) > 1) for n in wrong if near[n]]
    asked = f"; did you mean {', '.join(found)}?" if found else ""
    return f"  known names: {_listed(known) or 'none'}{asked}"


def _innermost(function: Any) -> Any:
    """Look through partials, bound methods and ``functools.wraps`` to what somebody wrote."""
    inner: Any
    for _ in range(100):  # what wraps itself must not hang us
        if isinstance(function, functools.partial):
            inner = function.func
        elif isinstance(function, MethodType):
            inner = function.__func__
        else:
            inner = getattr(function, "__wrapped__", None)
            if not isinstance(inner, FunctionType | functools.partial | MethodType):
                break
        function = inner
    return function


def _name_of(function: Any) -> str:
    inner = function if type(function) is FunctionType else _innermost(function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def _from_here(path: str) -> str:
    if "ipykernel_" in path:  # where a notebook claims that its cells lie
        return "<notebook>"
    return path.removeprefix(os.path.join(os.getcwd(), ""))


def _place(function: Any) -> str:
    """Give ``file.py:12``, where a callable is defined, or its module."""
    function = _innermost(function)
    code = getattr(function, "__code__", None)
    code = code or getattr(getattr(type(function), "__call__", None), "__code__", None)  # noqa: B004
    if code is None:
        return str(getattr(function, "__module__", None) or type(function).__module__)
    return f"{_from_here(code.co_filename)}:{code.co_firstlineno}"


class _Brief(reprlib.Repr):
    """Values in at most 80 characters: arrays and frames by shape; a broken repr does no harm."""

    def __call__(self, value: object) -> str:
        text = " ".join(self.repr(value).split())
        return text if len(text) <= 80 else text[:77] + "..."

    def repr1(self, x: object, level: int) -> str:
        try:
            shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", "")
            if isinstance(shape, tuple):
                return f"{type(x).__name__}({' x '.join(map(str, shape))}{f' {dtype}'.rstrip()})"
            return super().repr1(x, level)
        except Exception as error:
            # A message about one error must not die of another one.
            return f"<{type(x).__name__} whose repr raises {type(error).__name__}>"

    def repr_instance(self, x: object, level: int) -> str:
        return repr(x)  # reprlib's own hides a fault behind an address, which is never the same


_brief = _Brief()
_brief.maxstring, _brief.maxother = 60, 80


class _Secret:
    """Stands where a value must not be shown."""

    def __repr__(self) -> str:
        return "<secret>"


def _hidden(values: Mapping[str, Any], secret: Collection[str]) -> dict[str, Any]:
    return {name: _Secret() if name in secret else value for name, value in values.items()}


def _error_line(error: BaseException | str | None) -> str:
    """``ValueError: the first line of its message``, or ""; what is such a line already stays."""
    if error is None or isinstance(error, str):
        return error or ""
    try:
        message = str(error).strip().splitlines()
    except Exception as broken:  # a user's __str__
        message = [f"<its message raises {type(broken).__name__}>"]
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__


########################################################################################
### Steps
########################################################################################


# Names of arguments by position, by keyword only; the defaults; CO_ flags, of which these matter:
_Signature = tuple[tuple[str, ...], tuple[str, ...], dict[str, Any], int]
_NO_DEFAULTS: dict[str, Any] = {}  # one for all: fewer objects make a large build faster
_VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and value >= 0


def _is_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(n, str) for n in [*value, *value.values()])


# What each option has to be: a test, and the same in words.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    # A string would fall apart into letters.
    "outputs": (lambda x: isinstance(x, tuple | list), "a tuple such as ('train', 'test')"),
    "args": (lambda x: x is None or _is_names(x), "a dict: argument -> value it takes"),
    "map": (lambda x: isinstance(x, str | tuple), "the name of an argument, or a tuple"),
    "cache": (lambda x: isinstance(x, bool | timedelta), "True, False or a timedelta"),
    "version": (lambda x: isinstance(x, Hashable), "something hashable"),
    "retries": (lambda x: type(x) is int and x >= 0, "a number of extra tries, 0 or more"),
    "retry_delay": (_is_amount, "seconds, 0 or more"),
    "retry_backoff": (_is_amount, "a factor, 0 or more"),
    "local": (lambda x: isinstance(x, bool), "True or False"),
    "poke": (lambda x: x is None or len(x) == 3, "(poke_interval, timeout, soft_fail)"),
}
_OPTIONS = ("name", *_CHECKS)  # in one order: a pickled step does not depend on hash seeds


def _signature(function: Callable[..., Any]) -> _Signature:
    """Read a signature; from the code object of a plain function, at a 20th of the cost."""
    odd = function.__dict__ if type(function) is FunctionType else ("__wrapped__",)
    if "__wrapped__" not in odd and "__signature__" not in odd:
        code, last = function.__code__, function.__defaults__ or ()
        count, names = code.co_argcount, code.co_varnames
        by_name = names[count : count + code.co_kwonlyargcount]
        defaults = _NO_DEFAULTS
        if last or function.__kwdefaults__:
            pairs = zip(names[count - len(last) : count], last, strict=True)
            defaults = dict(pairs) | (function.__kwdefaults__ or {})
        return names[:count], by_name, defaults, code.co_flags
    every = inspect.signature(function).parameters.values()
    # An argument that a partial has bound by name is settled: it is no edge any more.
    bound = function.keywords if isinstance(function, functools.partial) else ()
    named = [p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    free = [p for p in named if p.name not in bound]
    return (
        tuple(p.name for p in free if p.kind != p.KEYWORD_ONLY),
        tuple(p.name for p in free if p.kind == p.KEYWORD_ONLY),
        {p.name: p.default for p in free if p.default is not _REQUIRED},
        _VARIADIC * (len(named) < len(every))
        | inspect.CO_COROUTINE * inspect.iscoroutinefunction(function),
    )


@dataclass(frozen=True, slots=True)
class Step:
    """A function with its options: the explicit form of :func:`step`.

    It serves variants of a function, lambdas, ``functools.partial``, callable objects, builtins.
    Arguments that a partial has bound are settled and are no edges.

    Parameters
    ----------
    function : callable
        Gets its arguments by position where its signature allows, else by name.
    name : str, optional
        The step's name and that of its value; the function's by default.
    outputs : tuple of str, optional
        Names for the parts of the tuple (or list, or dict with these keys) that it returns.
    args : dict of str to str, optional
        Argument name -> name of the value it takes, where the two differ. A function whose
        signature is ``*args``, ``**kwargs`` or unreadable gets exactly what is named here: by
        name, or in this order by position if there is no signature.
    cache : bool or timedelta
        Keep the result on disk and reuse it while nothing it depends on changes; a timedelta: for
        that long at the most.
    map : str or tuple of str, optional
        Call once per element of this argument and collect a list, in order; of several arguments,
        side by side. Elements run, are tried again and are cached one by one.
    version : Hashable, optional
        Part of the step's fingerprint, for what a fingerprint cannot see.
    retries : int
        Extra tries after an exception.
    retry_delay : float
        Seconds before the first extra try.
    retry_backoff : float
        Factor on the delay from each extra try to the next.
    local : bool
        Run in the calling process whatever the executor.
    poke : tuple of (float, float, bool), optional
        Of a sensor: seconds between checks, seconds until it gives up, whether that is a skip.

    Raises
    ------
    StepError
        If the signature cannot be edges, or an option is not of its type.

    Examples
    --------
    >>> square = Step(lambda x: x * x, name="square")
    >>> quartic = Step(square.function, name="quartic", args={"x": "square"})
    >>> dict(Pipeline(square, quartic).run(x=3))
    {'square': 9, 'quartic': 81}
    """

    function: Callable[..., Any]
    _: KW_ONLY
    name: str = ""
    outputs: tuple[str, ...] = ()
    args: Mapping[str, str] | None = field(default=None, hash=False)
    map: str | tuple[str, ...] = ()
    cache: bool | timedelta = False
    version: Hashable = None
    retries: int = 0
    retry_delay: float = 0.0
    retry_backoff: float = 1.0
    local: bool = False
    poke: tuple[float, float, bool] | None = None
    # Read from the signature: value names by position, (argument, value name) by keyword, the names
    # of both, and value name -> default where no argument insists on the value.
    _takes: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _keywords: tuple[tuple[str, str], ...] = field(init=False, repr=False, compare=False)
    _needs: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _defaults: Mapping[str, Any] = field(init=False, repr=False, compare=False)
    _over: tuple[str, ...] = field(init=False, repr=False, compare=False)  # names of mapped values
    _is_async: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put, function, args = object.__setattr__, self.function, self.args or {}
        if not callable(function):
            raise StepError(f"Step() was given {_brief(function)}; expected a callable")
        if not self.name:
            put(self, "name", _name_of(function))
        # One comparison tells the usual step, which has no options, from the others.
        delays = self.retries, self.retry_delay, self.retry_backoff
        kind = self.outputs, self.args, self.map, self.cache, self.version, self.local, self.poke
        options = (*kind, *delays)
        if options != _NO_OPTIONS or not str(self.name).isidentifier() or iskeyword(self.name):
            self._check_options()
        try:
            takes, keywords, defaults, flags = _signature(function)
        except (ValueError, TypeError):  # many builtins have no signature
            takes, keywords, defaults, flags = tuple(args), (), {}, 0 if args else _VARIADIC
        if flags & _VARIADIC and not args:
            raise self._error(
                "has arguments without names (*args, **kwargs, or no readable signature), which "
                "cannot be edges",
                "expected named arguments; or name what it gets by args={argument: value}",
            )
        pairs = tuple((name, name) for name in keywords) if keywords else ()
        needs = takes + keywords
        if args:
            extra = tuple(name for name in args if name not in needs)
            if not flags & _VARIADIC:
                self._check_arguments("args", extra, needs)
            insisted = {args.get(n, n) for n in needs + extra if n not in defaults}
            defaults = {args.get(n, n): d for n, d in defaults.items()}
            defaults = {n: d for n, d in defaults.items() if n not in insisted}
            takes = tuple(args.get(n, n) for n in takes)
            pairs = tuple((n, args.get(n, n)) for n in keywords + extra)
            needs = tuple(dict.fromkeys((*takes, *(value for _, value in pairs))))
        over: tuple[str, ...] = ()
        if self.map:
            over = (self.map,) if isinstance(self.map, str) else self.map
            lacking = [name for name in over if args.get(name, name) not in needs]
            self._check_arguments("map", lacking, needs)
            over = tuple([args.get(name, name) for name in over])
        put(self, "_over", over)
        put(self, "_takes", takes)
        put(self, "_keywords", pairs)
        put(self, "_needs", needs)
        put(self, "_defaults", defaults)
        put(self, "_is_async", flags & inspect.CO_COROUTINE != 0)

    def __reduce__(self) -> Any:
        # The function by its name, and the options: what is read from it is read again.
        options = {name: getattr(self, name) for name in _OPTIONS}
        return functools.partial(Step, **options), (self.function,)

    def _error(
        self, what: str, advice: str, kind: type[DagkitError] = StepError, **facts: object
    ) -> DagkitError:
        """Say what is wrong with this step, where it is defined, and what to do."""
        text = f"step '{self.name}' {what}\n  {self.definition}\n  {advice.strip()}"
        return kind(text, step=self.name, **facts)

    def _check_arguments(self, option: str, lacking: Sequence[str], known: Collection[str]) -> None:
        if lacking:
            what = f"has no argument {_listed(map(repr, lacking))}, which {option}= names"
            raise self._error(what, _hint(lacking, known))

    def _check_options(self) -> None:
        for option, (is_good, expected) in _CHECKS.items():
            if not is_good(getattr(self, option)):
                shown = f"has {option}={_brief(getattr(self, option))}"
                raise self._error(shown, f"expected {expected}")
        object.__setattr__(self, "outputs", tuple(self.outputs))
        for name in self.values:
            if not isinstance(name, str) or not name.isidentifier() or iskeyword(name):
                raise self._error(
                    f"makes a value named {name!r}, which no argument can be called",
                    "expected a name such as 'clean': @step(name=...) or Step(..., name=...)",
                )

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the values it takes, in the order of its arguments."""
        return self._needs

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the values it makes: its own, then its outputs."""
        return (self.name, *self.outputs)

    @property
    def definition(self) -> str:
        """How it is defined and where: ``fit(data, alpha=0.1) at analysis.py:41``."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
            shown = ", ".join(
                str(p.replace(annotation=_REQUIRED, default=_REQUIRED))
                + ("" if p.default is _REQUIRED else f"={_brief(p.default)}")
                for p in parameters
            )
        except (ValueError, TypeError):
            shown = "..."
        return f"{self.name}({shown}) at {_place(self.function)}"


_NO_OPTIONS: tuple[Any, ...] = ((), None, (), False, None, False, None, 0, 0.0, 1.0)


@overload
def step(function: _F, /) -> _F: ...
@overload
def step(
    *,
    name: str = ...,
    outputs: tuple[str, ...] = ...,
    args: Mapping[str, str] = ...,
    map: str | tuple[str, ...] = ...,
    cache: bool | timedelta = ...,
    version: Hashable = ...,
    retries: int = ...,
    retry_delay: float = ...,
    retry_backoff: float = ...,
    local: bool = ...,
) -> Callable[[_F], _F]: ...
def step(function: Any = None, /, **options: Any) -> Any:
    """Mark a function as a step, bare or called; the very same function is returned.

    It stays callable, testable and picklable by name.

    Parameters
    ----------
    function : function
        The function to mark. Whatever else is callable becomes a step by :class:`Step`.
    **options
        Those of :class:`Step`.

    Returns
    -------
    function
        The function itself, marked.

    Raises
    ------
    StepError
        If it is no function, its signature cannot be edges, or an option is wrong.

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
    return _marked(function, "step", options)


@overload
def sensor(function: _F, /) -> _F: ...
@overload
def sensor(
    *, poke_interval: float = ..., timeout: float = ..., soft_fail: bool = ..., **options: Any
) -> Callable[[_F], _F]: ...
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

    That is its value. It is called at once, then every ``poke_interval`` seconds, and holds no
    worker between the calls. An exception fails it, as any step. A sensor is never cached.

    Parameters
    ----------
    function : function
        The function to mark.
    poke_interval : float
        Seconds between two checks.
    timeout : float
        Seconds after which a check that fails is the last one.
    soft_fail : bool
        Whether a timeout skips the sensor, and what needs it, instead of failing.
    **options
        Those of :class:`Step`, but for ``cache`` and ``map``.

    Raises
    ------
    StepError
        If an option is wrong.
    SensorTimeoutError
        In a run, if nothing was seen in time and ``soft_fail`` is false; it is never tried again.

    Examples
    --------
    >>> answers = iter([None, 0, "arrived"])
    >>> @sensor(poke_interval=0.01)
    ... def parcel():
    ...     return next(answers)
    >>> Pipeline(parcel).run()["parcel"]
    'arrived'
    """
    for option, number in (("poke_interval", poke_interval), ("timeout", timeout)):
        if not _is_amount(number):
            raise StepError(f"@sensor has {option}={_brief(number)}; expected seconds, 0 or more")
    if not {"cache", "map"}.isdisjoint(options):
        reason = "what it looks at changes by itself"
        raise StepError(f"@sensor has no option 'cache' or 'map': {reason}")
    return _marked(function, "sensor", options, (poke_interval, timeout, soft_fail))


def _marked(function: Any, title: str, options: dict[str, Any], poke: Any = None) -> Any:
    known = [name for name in _OPTIONS if name != "poke"]  # that belongs to sensors
    unknown = sorted(options.keys() - {*known})
    if unknown:
        hint = _hint(unknown, known).replace("names", "options")
        raise StepError(f"@{title} has no option {_listed(map(repr, unknown))}\n{hint}")
    if function is None:
        return lambda function: _marked(function, title, options, poke)
    if type(function) is not FunctionType:
        raise StepError(
            f"@{title} was given {_brief(function)}, which is no function\n"
            "  a class, a partial or a callable object becomes a step by Step(thing, name=...)"
        )
    options = options | {"poke": poke} if poke else options
    Step(function, **options)  # for its checks: what is wrong belongs to this line of the user's
    setattr(function, _MARK, options)
    return function


def _is_marked(value: Any) -> bool:
    """Tell a step, also one inside a wrapper that copies its attributes, as lru_cache does."""
    attributes = getattr(value, "__dict__", None)
    return type(attributes) is dict and _MARK in attributes and callable(value)


def _settled(source: Any) -> Any:
    """Keep what a pipeline follows as it is; read other iterables once."""
    followed = (FunctionType, Step, Pipeline, str, ModuleType, Mapping)
    if isinstance(source, followed) or _is_marked(source):
        return source
    if isinstance(source, Iterable):
        return tuple(map(_settled, source))
    hint = "\n  a callable object becomes a step by Step(thing, name=...)" * callable(source)
    raise SourceError(
        f"Pipeline() was given {_brief(source)}, which holds no steps\n"
        "  expected a module, a module's name, a mapping such as globals(), a function, a Step, a "
        f"Pipeline, or an iterable of these{hint}"
    )


def _entries(sources: Iterable[Any]) -> list[Any]:
    """List what is a step in settled sources now: functions, ``Step``s, (name, function)."""
    found: list[Any] = []
    for source in sources:
        if type(source) is FunctionType or type(source) is Step or _is_marked(source):
            found.append(source)
        elif isinstance(source, str):
            module = sys.modules.get(source) or importlib.import_module(source)
            found += _named_entries(vars(module))
        elif isinstance(source, ModuleType | Mapping):
            found += _named_entries(vars(source) if isinstance(source, ModuleType) else source)
        else:
            found += _entries(source._sources if isinstance(source, Pipeline) else source)
    return found


def _named_entries(namespace: Mapping[str, Any]) -> list[Any]:
    """Pick the steps of a namespace: what ``@step`` has marked, and ``Step`` objects.

    Where there are none, all functions: of a module its own public ones, of a plain mapping all,
    named by their keys.
    """
    found = list(namespace.items())
    steps = [(key, value) for key, value in found if type(value) is Step or _is_marked(value)]
    # IPython keeps former results, so former definitions too, as _, __ and _12.
    marked = [x for key, x in steps if key[:1] != "_" or key == getattr(x, "__name__", key)]
    if marked:
        return marked
    module = namespace.get("__name__")
    if module is None:
        return [(key, value) for key, value in found if callable(value)]
    functions = [(key, value) for key, value in found if type(value) is FunctionType]
    return [f for key, f in functions if f.__module__ == module and key[:1] != "_"]


########################################################################################
### Graph
########################################################################################


class _Graph(NamedTuple):
    """Steps that fit together; ``makers`` maps each value's name to the step that makes it."""

    steps: Mapping[str, Step]
    makers: Mapping[str, Step]
    inputs: Mapping[str, Any]  # name -> default or _REQUIRED
    orders: dict[Any, _Order]  # made so far, by targets and given


def _build_graph(entries: Iterable[Any]) -> _Graph:
    """Fit the steps together, in the order in which they are declared.

    Raises ``DuplicateNameError``, ``DefaultsError``, ``CycleError``; warns of a defaulted argument
    that is one typo away from a step's name.
    """
    makers: dict[str, Step] = {}
    steps: dict[str, Step] = {}
    for entry in entries:
        if isinstance(entry, Step):
            step = entry
        elif isinstance(entry, tuple):
            step = Step(entry[1], name=entry[0])
        else:
            step = Step(entry, **getattr(entry, _MARK, {}))
        if step.name in steps and steps[step.name] == step:
            continue  # the same step by two ways
        for value in step.values:
            if value in makers:
                raise DuplicateNameError(
                    f"two steps make a value '{value}'\n"
                    f"  {makers[value].definition}\n  {step.definition}\n"
                    "  give one of them another name: @step(name=...)",
                    name=value,
                )
            makers[value] = step
        steps[step.name] = step
    graph = _Graph(steps, makers, _find_inputs(steps.values(), makers), {})
    _sort(graph, tuple(steps), set())  # for its CycleError
    return graph


def _find_inputs(steps: Iterable[Step], makers: Mapping[str, Step]) -> dict[str, Any]:
    """Map each name that no step makes to its default; all steps must agree on it."""
    inputs: dict[str, Any] = {}
    owners: dict[str, Step] = {}  # the step that gave the default
    for step in steps:
        defaults = step._defaults
        for name in step._needs:
            if name in makers:
                continue
            default = defaults.get(name, _REQUIRED)
            known = inputs.get(name, _REQUIRED)
            if known is _REQUIRED:
                inputs[name] = default
                owners[name] = step
            elif default is not _REQUIRED and not _same(default, known):
                raise DefaultsError(
                    f"input '{name}' has two defaults: {_brief(known)} and {_brief(default)}\n"
                    f"  {owners[name].definition}\n  {step.definition}\n"
                    "  make them the same, or give the argument a name of its own",
                    name=name,
                )
    for name, near in _near_misses([n for n in inputs if inputs[n] is not _REQUIRED], makers):
        code = getattr(_innermost(owners[name].function), "__code__", None)
        warnings.warn_explicit(
            f"step '{owners[name].name}' has an argument '{name}' with a default, and there is a "
            f"step '{near}': is it a typo? As it stands '{name}' is an input\n"
            f"  {owners[name].definition}",
            DagkitWarning,
            code.co_filename if code else __file__,
            code.co_firstlineno if code else 1,
        )
    return inputs


def _same(one: Any, other: Any) -> bool:
    # Arrays and frames compare element by element: two of them are two defaults.
    with contextlib.suppress(Exception):
        return one is other or (type(one) is type(other) and bool(one == other))
    return False


def _near_misses(names: list[str], known: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, known name) where the two are one edit or one transposition apart.

    Two such names share a text that is left when at most one letter is taken out, which makes this
    linear. Names of one or two letters, and those that differ in a digit (``x1``), are no typos.
    """

    def cut(name: str) -> list[str]:
        return [name, *[name[:i] + name[i + 1 :] for i in range(len(name))]]

    index = {text: name for name in known if names and len(name) > 2 for text in cut(name)}
    for name in names:
        for near in {index[text]: None for text in cut(name) if text in index and len(name) > 2}:
            one, other = name, near
            while one[:1] == other[:1]:
                one, other = one[1:], other[1:]
            while one and other and one[-1] == other[-1]:
                one, other = one[:-1], other[:-1]
            swapped = len(one) == 2 and one == other[::-1]
            if (len(one) < 2 and len(other) < 2 and not (one + other).isdigit()) or swapped:
                yield name, near
                break


def _make_network(graph: _Graph) -> nx.DiGraph[str]:
    """Make the networkx graph; an edge runs from what is needed to what needs it."""
    import networkx as nx  # 0.1 s, which a plain run does not need to spend

    network: nx.DiGraph[str] = nx.DiGraph()
    network.add_nodes_from(graph.inputs, kind="input", step=None)
    for step in graph.steps.values():
        network.add_node(step.name, kind="step", step=step)
        network.add_edges_from([(need, step.name) for need in step.needs])
        for part in step.outputs:
            network.add_node(part, kind="output", step=step)
            network.add_edge(step.name, part)
    return network


def _cycle_error(graph: _Graph) -> CycleError:
    """Find a shortest cycle: the shortest way back from any dependent to its step."""
    import networkx as nx

    steps, network = graph.steps, _make_network(graph)
    paths: list[list[str]] = []
    for knot in nx.strongly_connected_components(network):
        inside = network.subgraph(knot).copy()
        starts = [name for name in steps if name in knot]
        # Each search is linear in the knot; in a huge one the first steps have to do.
        for start in starts[: max(1, 1_000_000 // len(knot))]:
            paths += [nx.shortest_path(inside, after, start) for after in inside.successors(start)]
    names = [name for name in min(paths, key=len) if name in steps]
    first = names.index(min(names, key=list(steps).index))
    names = names[first:] + names[:first]
    cycle = (*names, names[0])
    lines = "".join(f"\n  {steps[name].definition}" for name in names)
    return CycleError(
        f"steps need each other in a cycle: {' -> '.join(cycle)}{lines}\n"
        "  rename an argument, or let it be an input",
        cycle=cycle,
    )


def _sort(
    graph: _Graph, targets: Sequence[str], done: set[str]
) -> tuple[list[Step], dict[str, Step | None]]:
    """Order the steps that make the targets from what is done, and find the inputs they need.

    A depth-first search without recursion: a value is made shortly before it is needed, so that
    few are held at once, and steps that are declared in a possible order keep that order. Adds to
    ``done``; maps each input to the step that asked for it first (None: it is a target).
    """
    makers = graph.makers
    order: list[Step] = []
    inputs: dict[str, Step | None] = {}
    begun: set[str] = set()  # steps on the way from a target to where the search is
    stack: list[tuple[str, Step | None]] = [(name, None) for name in reversed(targets)]
    while stack:
        name, asker = stack[-1]
        step = makers.get(name)
        if name in done:
            stack.pop()
        elif step is None:
            inputs[name] = asker
            done.add(name)
        elif pending := [need for need in step._needs if need not in done]:
            begun.add(step.name)
            for need in reversed(pending):
                if need in makers and makers[need].name in begun:
                    raise _cycle_error(graph)
                stack.append((need, step))
        else:
            order.append(step)
            begun.discard(step.name)
            done.update(step.values)
    return order, inputs


########################################################################################
### Order
########################################################################################

# What the plain loop needs of a step: its name, its function, the names of the values it takes by
# position, (argument, name) by keyword, the step if it has outputs, and the names to drop after it.
_Call = tuple[str, Any, tuple[str, ...], tuple[tuple[str, str], ...], Step | None, list[str]]


class _Order(NamedTuple):
    """The steps that targets need, in topological order."""

    targets: tuple[str, ...]
    named: bool  # whether targets were asked for; if not, all values are targets
    given: frozenset[str]
    steps: tuple[Step, ...]
    defaults: Mapping[str, Any]  # of the inputs that are needed and not given
    calls: list[_Call]
    plain: bool  # whether the plain loop may run it from the start


def _make_order(graph: _Graph, targets: Sequence[str], given: frozenset[str]) -> _Order:
    """Order what the targets need and the given values do not replace.

    Raises
    ------
    UnknownNameError
        If a target or a given name is neither made nor taken by any step.
    MissingInputError
        If an input that is needed has neither value nor default; names all of them.
    """
    _check_names(graph, targets, given)
    # A step that is given as a whole gives its outputs.
    done = {v for n in given for v in (graph.steps[n].values if n in graph.steps else (n,))}
    wanted = tuple(targets) or tuple(graph.makers)
    steps, asked = _sort(graph, wanted, done)
    missing = {name: step for name, step in asked.items() if graph.inputs[name] is _REQUIRED}
    if missing:
        raise _missing_error(graph, missing)
    defaults = {name: graph.inputs[name] for name in asked}
    calls: list[_Call] = []
    needed = set(wanted)
    for step in reversed(steps):
        # From the last step back: what no later one has needed yet can go after this one.
        made = [value for value in step.values if value not in given]
        drops = [name for name in (*step.needs, *made) if name not in needed]
        needed.update(step.needs)
        parts = step if step.outputs else None
        calls.append((step.name, step.function, step._takes, step._keywords, parts, drops))
    plain = not any(s._is_async or s.cache or s._over or s.poke is not None for s in steps)
    return _Order(wanted, bool(targets), given, tuple(steps), defaults, calls[::-1], plain)


def _check_names(graph: _Graph, targets: Iterable[Any], given: Iterable[str]) -> None:
    known = {*graph.makers, *graph.inputs}
    for names, role in ((targets, "be a target of"), (sorted(given), "be given to")):
        wrong = [n if isinstance(n, str) else _brief(n) for n in names if n not in known]
        if wrong:
            raise UnknownNameError(
                f"{_listed(map(repr, wrong))} cannot {role} run(): no step makes or takes it\n"
                + _hint(wrong, known),
                unknown=tuple(wrong),
            )


def _check_known(what: str, names: Iterable[str], graph: _Graph) -> None:
    """Raise ``UnknownNameError`` for a name that an option has and the graph has not."""
    known = {*graph.makers, *graph.inputs}
    unknown = sorted(str(name) for name in names if name not in known)
    if unknown:
        text = f"{what} names {_listed(map(repr, unknown))}: no step makes or takes it\n"
        raise UnknownNameError(text + _hint(unknown, known), unknown=tuple(unknown))


def _missing_error(graph: _Graph, missing: Mapping[str, Step | None]) -> MissingInputError:
    lines = [
        f"step '{step.name}' needs '{name}': no step makes it and run() was not given it\n"
        f"  {step.definition}\n"
        if step is not None
        else f"target '{name}' is an input, and run() was not given it\n"
        for name, step in missing.items()
    ]
    known = [name for name in (*graph.makers, *graph.inputs) if name not in missing]
    text = "".join(lines) + _hint([*missing], known)
    return MissingInputError(text, missing=tuple(missing))


########################################################################################
### Cache
########################################################################################

_MISSING: Any = object()
_SCALARS = frozenset({type(None), bool, int, float, str, bytes})
_CONTAINERS = frozenset({list, tuple, dict, set, frozenset})
_LRU: Any = type(functools.lru_cache(len))  # the wrapper's type has no public name
_TYPE_VARIABLES = (typing.TypeVar, typing.ParamSpec, typing.TypeVarTuple)
_CODE = (FunctionType, type, ModuleType)  # what counts as a part of its own
_Memo = dict[int, tuple[bytes, object]]  # id -> token, and the value, so that the id stays its own


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Modules whose types carry no result: their instances count by type alone when code holds them.
_BY_TYPE = {"logging", "_thread", "threading", "weakref", "_weakrefset"}
# What the interpreter or a wrapper writes into a class or an instance beside its behaviour.
_VOLATILE = _names(
    """__doc__ __module__ __qualname__ __name__ __dict__ __weakref__ __slotnames__ _abc_impl
    __firstlineno__ __static_attributes__ __type_params__ __parameters__ _dagkit_options
    __annotations__ __annotate__ __annotate_func__ __annotations_cache__
    __conditional_annotations__"""
)
# What functools.singledispatch and numpy.vectorize remember between calls.
_LIBRARY_CACHES = {"dispatch_cache", "cache_token", "_ufunc"}
# Where a module lies and how it was loaded is not behaviour either.
_MODULE_FACTS = vars(ModuleType("")).keys() | {"__file__", "__cached__", "__path__", "__builtins__"}
# Code that says one of these can reach what no name in it shows; the last two, what a text names.
_WIDE = _names(
    """getattr globals vars eval exec __import__ import_module attrgetter methodcaller __dict__
    __getattribute__ getmembers getattr_static modules resolve_name locate __subclasses__
    f_globals f_back currentframe _getframe"""
)
_BY_TEXT = _WIDE | {"query", "sql"}
_REFLECTIVE = _names(
    "__annotations__ get_type_hints get_annotations signature getfullargspec __doc__ getdoc"
)
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "STORE_GLOBAL"}
_CONST = frozenset(opcode.hasconst)
_PUSH = {opcode.opmap["LOAD_CONST"], opcode.opmap.get("LOAD_SMALL_INT")}
_NOT_BEHAVIOUR = 0x4000000 | 0x1000000  # flags: has a docstring, postponed annotations
_FACTS = operator.attrgetter(
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_names", "co_varnames"),
    *("co_freevars", "co_cellvars", "co_exceptiontable"),
)


class _Opaque(Exception):
    """Something that cannot be fingerprinted; ``args`` are the names that lead to it."""

    @property
    def reason(self) -> str:
        return f"no fingerprint: {' -> '.join(self.args)}"


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _text(value: Any) -> bytes:
    """Write a scalar as a self-delimiting token; every NaN is the same."""
    # Version 2 of marshal knows neither references nor interning: equal values, equal bytes.
    return marshal.dumps(math.nan if value != value else value, 2)


def _digest(tag: str, *tokens: bytes) -> bytes:
    """Hash self-delimiting tokens into one, which no scalar can equal."""
    return b"#" + hashlib.sha256(b"%b\0%b" % (tag.encode(), b"".join(tokens))).digest()


def _short(token: bytes) -> str:
    return (token if token[:1] == b"#" else _digest("", token))[1:9].hex()


def _joined(marks: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(marks).encode()).hexdigest()


def _is_plain(value: Collection[Any]) -> bool:
    """Tell whether marshal writes the value faithfully: exact builtin types, no NaN, no cycle."""
    # Level by level, so that the loops run in C. What decides is the value unfolded into a tree,
    # never how its parts are shared: equal values must take the same way. marshal sorts sets.
    flat = itertools.chain.from_iterable
    level = [*value, *value.values()] if isinstance(value, dict) else value
    for _ in range(12):
        kinds = set(map(type, level))
        if not kinds <= _SCALARS | _CONTAINERS or len(level) > 20_000_000:
            return False
        if float in kinds and any(map(operator.ne, level, level)):
            return False
        if kinds <= _SCALARS:
            return True
        inner = [x for x in level if type(x) in _CONTAINERS]
        pairs = [x.values() for x in inner if type(x) is dict] if dict in kinds else []
        level = [*flat(inner), *flat(pairs)]
    return False


def _array_content(array: Any) -> bytes:
    """Hash the bytes of an array in C order, one that lies otherwise piece by piece."""
    numpy = sys.modules["numpy"]
    content, rows = hashlib.sha256(), numpy.atleast_1d(array)
    at_once = 1 + (rows.nbytes if rows.flags.c_contiguous else (1 << 20) // (rows[:1].nbytes or 1))
    for at in range(0, len(rows) if rows.nbytes else 0, at_once):
        piece = numpy.ascontiguousarray(rows[at : at + at_once])
        content.update(piece.reshape(-1).view("u1"))
    return content.digest()


_files: dict[tuple[int, ...], bytes] = {}  # what os.stat says of a file -> its content


def _path_token(path: str, above: tuple[tuple[int, int], ...] = ()) -> bytes:
    """Hash the content of a file or folder; a missing one is a value of its own."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            here = (status.st_dev, status.st_ino)
            if here in above:  # a symbolic link to a folder above
                return _digest("loop", _text(len(above) - above.index(here)))
            names, store = sorted(os.listdir(path)), _digest("store")
            if "CACHEDIR.TAG" in names and _top(os.path.join(path, "CACHEDIR.TAG"))[0] == _TAG:
                return store
            inner = {x: _path_token(os.path.join(path, x), (*above, here)) for x in names}
            # What a run keeps is no content, or none of a folder with a store would ever be kept.
            names = [name for name in names if inner[name] != store]
            return _digest("folder", *map(_text, names), *map(inner.__getitem__, names))
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise _Opaque(f"special file {path}")
        times = (status.st_mtime_ns, status.st_ctime_ns)
        stamp = (status.st_dev, status.st_ino, status.st_size, *times)
        if stamp in _files:
            return _files[stamp]
        with open(path, "rb") as file:
            token = b"#" + hashlib.file_digest(file, "sha256").digest()
    except (FileNotFoundError, NotADirectoryError):
        return _digest("missing")
    except OSError as error:
        raise _Opaque(f"file {path}") from error
    if time.time_ns() - max(times) > 2_000_000_000:  # a younger file may change within a clock tick
        _files[stamp] = token
    return token


class _Body(NamedTuple):
    """What a code object does, nested ones included, and what it names, sorted."""

    digest: bytes
    globals: tuple[str, ...]
    names: tuple[str, ...]  # those of attributes and modules too
    strings: tuple[str, ...]
    imports: tuple[tuple[int, str, tuple[str, ...]], ...]  # level, module, names


_bodies: dict[int, tuple[types.CodeType, _Body]] = {}  # by id: code objects compare line numbers


def _body(code: types.CodeType) -> _Body:
    """Read a code object without its place, line numbers and docstring."""
    if id(code) in _bodies:
        return _bodies[id(code)][1]
    shape: list[Any] = [code.co_flags & ~_NOT_BEHAVIOUR, *_FACTS(code)]
    found: list[set[Any]] = [set(), set(code.co_names), set(), set()]  # as in a _Body
    extended = 0
    for op, low in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        arg, extended, name = extended | low, 0, opcode.opname[op]
        if name == "EXTENDED_ARG":
            extended = arg << 8
        elif op in _CONST:  # by value: a docstring shifts the indices
            const = code.co_consts[arg]
            if isinstance(const, types.CodeType):
                inner = _body(const)
                shape += (op, inner.digest)
                for mine, others in zip(found, inner[1:], strict=True):
                    mine.update(others)
            else:
                shape += (op, repr(const) if type(const) is slice else marshal.dumps(const, 2))
                texts = const if type(const) is tuple else (const,)
                found[2].update(x for x in texts if type(x) is str)
        elif name == "STORE_NAME" and code.co_names[arg] in _VOLATILE and shape[-2] in _PUSH:
            del shape[-2:]  # a line number or docstring in the body of a local class
        elif op:  # 0 is an inline cache
            shape += (op, arg)
            if name in _GLOBAL:
                found[0].add(code.co_names[arg >> (name == "LOAD_GLOBAL")])  # the last bit: a flag
            elif name == "IMPORT_NAME":  # the level and the names were pushed just before
                level, names = (marshal.loads(x) if type(x) is bytes else x for x in shape[-5:-2:2])
                found[3].add((level, code.co_names[arg], names or ()))
    body = _Body(_digest("body", marshal.dumps(shape, 2)), *(tuple(sorted(x)) for x in found))
    _bodies[id(code)] = (code, body)
    return body


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    import importlib.metadata

    return importlib.metadata.packages_distributions()


@functools.cache
def _version(distribution: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(distribution)


@functools.cache
def _packages(name: str, file: str | None) -> dict[str, str] | None:
    """Find a module's distributions and versions: {} for Python's own, None for the project's."""
    if name == __name__:  # not the project's, wherever it lies; and its caches change all the time
        return {}
    if not file:  # a notebook's or exec's namespace, whatever its name, or a builtin module
        spec = getattr(sys.modules.get(name), "__spec__", None)
        return {} if getattr(spec, "origin", None) in ("built-in", "frozen") else None
    *above, inside = re.split(r"[/\\](?:site|dist)-packages[/\\]", file)
    if not above:
        return {} if file.startswith(os.path.dirname(os.__file__) + os.sep) else None
    top = re.split(r"[./\\]", inside)[0]
    found = {x: _version(x) for x in _distributions().get(top, ())}
    loaded = getattr(sys.modules.get(top), "__dict__", {}).get("__version__")
    if isinstance(loaded, str) and loaded not in found.values():
        found[f"{top} (loaded)"] = loaded  # it may have been upgraded on disk since
    return found or None


def _origin(value: Any) -> tuple[str, str | None]:
    """Name the module of a function, class or module, and its file."""
    if isinstance(value, type):
        name = str(value.__module__)  # a C type may have a descriptor there
        return name, getattr(sys.modules.get(name), "__file__", None)
    # functools.wraps copies __module__, so that of a function does not count.
    space = value.__globals__ if isinstance(value, FunctionType) else vars(value)
    return str(space.get("__name__", "")), space.get("__file__")


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    """Find a module as an import would, but run nothing, not even the packages above it."""
    where, spec = None, None
    for prefix in itertools.accumulate(name.split("."), "{}.{}".format):
        finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
        spec = next(filter(None, (find(prefix, where) for find in finders if find)), None)
        if spec is None:
            return None
        where = spec.submodule_search_locations
    return spec


def _source(name: str) -> bytes:
    """Return a token of the file that an import of the module would read now."""
    spec = _find(name)
    return _path_token(spec.origin) if spec and spec.origin else _text(bool(spec))


# What objects of Python's own types hold, where pickle cannot say.
_HELD: dict[Any, Callable[[Any], tuple[Any, ...]]] = {
    MethodType: lambda x: (x.__func__, x.__self__),
    property: lambda x: (x.fget, x.fset, x.fdel),
    staticmethod: lambda x: (x.__func__,),
    classmethod: lambda x: (x.__func__,),
    _LRU: lambda x: (x.__wrapped__, x.cache_parameters()),
    MappingProxyType: lambda x: (dict(x),),
    types.CodeType: lambda x: (_body(x).digest,),
    types.GetSetDescriptorType: lambda x: (x.__objclass__, x.__name__),
    types.ClassMethodDescriptorType: lambda x: (x.__objclass__, x.__name__),
    **dict.fromkeys(_TYPE_VARIABLES, lambda x: (x.__name__,)),
    getattr(typing, "TypeAliasType", None): lambda x: (x.__value__,),
}


def _held(value: Any) -> tuple[Any, ...] | None:
    for base in type(value).__mro__:
        if base in _HELD:
            more = () if base is type(value) else (type(value), getattr(value, "__dict__", None))
            return (*_HELD[base](value), *more)
    return None


def _cell(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _MISSING


class _Walk:
    """One walk through values and through all project code that they reach.

    Code is a flat set of named parts, so that cycles end and a change has a name. A function, class
    or module inside a value counts as a reference to its part; everything else by content.
    ``annotated``: annotations and docstrings count too, because some of the code reads them.
    """

    def __init__(self, memo: _Memo, annotated: bool) -> None:
        self.parts: dict[str, str] = {}  # label -> digest or version
        self.looks: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = []
        self.own, self.root, self.in_code, self.annotated = "", _MISSING, False, annotated
        self.memo = memo  # contents that reach no code, which walks may share
        self.done: _Memo = {}
        self.open: dict[int, tuple[int, object]] = {}  # not finished, or in a cycle that is not
        self.lowest = 0  # the index in `open` of the uppermost value referred back to
        self.labels: _Memo = {}  # functions, classes and modules met
        self.queue: deque[tuple[str, Any]] = deque()
        self.looked: dict[tuple[int, str], bytes] = {}
        self.spaces: dict[int, dict[str, Any]] = {}  # namespaces of modules held as objects
        self.files: list[tuple[str, str]] = []  # that values name, and their marks
        self.names, self.strings = {"__getattr__"}, set[str]()  # what any of the code mentions

    def look(self, get: Callable[..., Any], *where: Any) -> Any:
        """Look something up, and note what was found so that `changed` can look again."""
        found = get(*where)
        self.looks.append((get, where, found))
        return found

    def changed(self) -> bool:
        """Tell whether anything that the walk looked at is not what it was."""
        self.done.clear()
        try:
            for get, where, found in self.looks:
                now = get(*where)
                if now is not found and not (
                    type(now) is type(found) in (int, bytes) and now == found
                ):
                    return True
        except Exception:  # a new walk will tell
            return True
        return False

    # Values

    def token(self, value: Any) -> bytes:
        """Return a value's token: the same text for equal values, however built."""
        kind = type(value)
        if kind in _SCALARS:
            return _text(value)
        if id(value) in self.done:
            return self.done[id(value)][0]
        if issubclass(kind, _CODE):
            if id(value) not in self.labels:
                self.labels[id(value)] = (self.label(value), value)
            return self.labels[id(value)][0]
        # A cycle ends in a reference by distance. Finished values leave `open`, so sharing does not
        # count; inside a cycle every value is walked once.
        if id(value) in self.open:
            index = self.open[id(value)][0]
            self.lowest = min(self.lowest, index)
            return _digest("back", _text(len(self.open) - index))
        index, outer = len(self.open), self.lowest
        self.open[id(value)], self.lowest = (index, value), index
        token = self.content(value, kind)
        if self.lowest == index:  # nothing in it leads further up
            while len(self.open) > index:
                self.open.popitem()
            self.done[id(value)] = (token, value)
        self.lowest = min(self.lowest, outer)
        return token

    def content(self, value: Any, kind: type[Any]) -> bytes:
        """Hash one value by its type, and what it holds."""
        if kind in _CONTAINERS and (id(value) in self.memo or _is_plain(value)):
            return self.shared(value, lambda x: _digest("plain", marshal.dumps(x, 2)))
        if issubclass(kind, (set, frozenset)):
            more = map(self.token, (kind, getattr(value, "__dict__", None)))
            return _digest("set", *sorted(map(self.token, value)), *more)
        if kind in _CONTAINERS:
            items = itertools.chain.from_iterable(value.items()) if kind is dict else value
            return _digest(kind.__name__, *map(self.token, items))
        if isinstance(value, os.PathLike) and hasattr(value, "is_dir"):  # a pathlib.Path
            # A folder that code names may hold the whole project, and the store: by name alone.
            where = _digest("path", _text(str(value)))
            if self.in_code and value.is_dir():
                return where
            token = _path_token(str(value))
            self.files.append((f"file {value}", _short(token)))
            return where + token
        numpy, pandas = sys.modules.get("numpy"), sys.modules.get("pandas")
        if numpy and (kind in (numpy.ndarray, numpy.memmap) or isinstance(value, numpy.generic)):
            about = (kind, value.dtype, value.shape)
            if value.dtype.hasobject or value.dtype.kind not in "biufcmMSUV":
                return _digest("objects", *map(self.token, (*about, value.ravel().tolist())))
            return _digest("array", *map(self.token, about), self.shared(value, _array_content))
        if pandas and isinstance(value, (pandas.DataFrame, pandas.Series, pandas.Index)):
            return self.frame(value, kind, pandas)
        silent = self.in_code and kind.__module__ in _BY_TYPE and kind.__name__ != "_local"
        if silent or kind is type(os.environ):
            return _digest("by type", _text(_type_name(kind)))
        if (held := _held(value)) is not None:
            return _digest(_type_name(kind), *map(self.token, held))
        return self.reduced(value, kind)

    def shared(self, value: Any, content: Callable[[Any], bytes]) -> bytes:
        if id(value) not in self.memo:
            self.memo[id(value)] = (content(value), value)
        return self.memo[id(value)][0]

    def frame(self, value: Any, kind: type[Any], pandas: Any) -> bytes:
        """Hash a pandas object column by column: how its blocks lie in memory does not count."""
        if isinstance(value, pandas.DataFrame):
            columns = [value.iloc[:, i].array for i in range(value.shape[1])]
        elif isinstance(value, pandas.MultiIndex):
            columns = [value.get_level_values(i) for i in range(value.nlevels)]
        else:
            columns = [value.array]
        names = ("columns", "index", "names", "name", "freqstr", "attrs")
        names += tuple(getattr(value, "_metadata", ()))
        about = [kind, *(getattr(value, name, None) for name in names)]
        about.append(getattr(getattr(value, "flags", None), "allows_duplicate_labels", None))
        for column in columns:
            inner = getattr(column, "_ndarray", None)  # codes, times or text: the dtype tells which
            about += [column.dtype, column.astype(object) if inner is None else inner]
        return _digest("frame", *map(self.token, about))

    def reduced(self, value: Any, kind: type[Any]) -> bytes:
        """Hash any other object by what pickle would rebuild it from."""
        try:
            reduce = copyreg.dispatch_table.get(kind)
            parts = reduce(value) if reduce else value.__reduce_ex__(4)
            if isinstance(parts, str):  # the name of a global, which must really be it
                import pickle

                home = sys.modules[pickle.whichmodule(value, parts)]  # type: ignore[attr-defined]
                if operator.attrgetter(parts)(home) is not value:
                    raise TypeError(parts)
                self.is_library(*_origin(home))
                parts = (f"{home.__name__}.{parts}", getattr(value, "__dict__", None))
        except Exception as error:  # whatever a foreign __reduce_ex__ raises
            raise _Opaque(_type_name(kind)) from error
        if kind in (operator.attrgetter, operator.methodcaller):
            self.names.add("getattr")
        function, arguments, state, items, pairs = (*parts, None, None, None)[:5]
        if isinstance(state, dict):  # a wrapper's copies of name and docstring are not behaviour
            library = _packages(*_origin(kind)) is not None
            beside = _VOLATILE | _LIBRARY_CACHES if library else _VOLATILE
            state = {name: x for name, x in state.items() if name not in beside}
        lists = [None if x is None else [*x] for x in (items, pairs)]
        try:
            return _digest("object", *map(self.token, (kind, function, arguments, state, *lists)))
        except _Opaque as error:
            raise _Opaque(_type_name(kind), *error.args) from error

    # Code

    def label(self, value: Any) -> bytes:
        """Name a function, class or module, and put it in the queue if it counts by its code."""
        home, file = _origin(value)
        library = self.is_library(home, file)
        if isinstance(value, ModuleType):
            if not library:
                self.spaces[id(value)] = vars(value)
                self.names |= set() if self.in_code else {"getattr"}  # any of an input may be used
            return b"@" + _text(["" if home == self.own else home])
        if isinstance(value, type):
            kind, name = "class", value.__qualname__
            found: Any = sys.modules.get(home)
            for part in name.split(".") if library else ():
                found = getattr(found, part, None)
            # A static type is C code; a class that its module does not hold was made at run time.
            known = library and (found is value or not value.__flags__ & 1 << 9)
        else:
            kind, name = "helper", value.__code__.co_qualname
            known = library and not (value.__closure__ or vars(value))
        if known and value is not self.root:
            return b"@" + _text([kind, home, name])
        label = self.claim(kind, home, name) if value is not self.root else value.__name__
        if known:  # a step of the library's: its name and the version say all
            self.parts[label] = f"{home}.{name}"
        else:
            self.queue.append((label, value))
        return b"@" + _text(label)

    def claim(self, kind: str, home: str, name: str) -> str:
        """Reserve the label of a part; a namesake gets a number."""
        # Without the name of the step's own module: it may be run as __main__.
        first = label = f"{kind} {name}" if home in ("", self.own) else f"{kind} {home}.{name}"
        number = 1
        while label in self.parts:
            label = f"{first} #{(number := number + 1)}"
        self.parts[label] = ""
        return label

    def is_library(self, module: str, file: str | None) -> bool:
        """Tell whether a module is installed, and count its version."""
        packages = _packages(module, file)
        for name, version in (packages or {}).items():
            self.parts[f"package {name}"] = version
        if packages is None and str(file).endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
            self.parts[f"extension {module}"] = _short(_path_token(str(file)))
        return packages is not None

    def lookup(self, space: dict[str, Any], name: str) -> bytes:
        """Look up a global as the code would; a constant becomes a part of its own."""
        if name in _MODULE_FACTS:
            return b""
        if (id(space), name) not in self.looked:
            value = self.look(space.get, name, _MISSING)
            self.looked[id(space), name] = b""  # a builtin, or not defined yet
            if issubclass(type(value), _CODE):
                self.looked[id(space), name] = self.token(value)
            elif value is not _MISSING:
                label = self.claim("constant", str(space.get("__name__", "")), name)
                # Its label comes first, because the value may lead back to it.
                self.looked[id(space), name] = b"@" + _text(label)
                self.parts[label] = _short(self.data(value, f"constant {name}"))
        return self.looked[id(space), name]

    def data(self, value: Any, what: str) -> bytes:
        """Return the token of a value that code holds; if that can change, note it."""
        try:
            token = self.token(value)
        except _Opaque as error:
            raise _Opaque(what, *error.args) from error
        if type(value) not in _SCALARS and id(value) not in self.labels:
            self.looks.append((self.token, (value,), token))
        return token

    def members(self, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield what a function or class holds beside what makes it one."""
        space = vars(value)
        self.look(len, space)
        for name in sorted([name for name in space if name not in _VOLATILE]):
            yield name, self.look(space.get, name)
        if self.annotated:  # Python 3.14 makes annotations when they are asked for
            notes = "__annotate__" if getattr(value, "__annotate__", None) else "__annotations__"
            for name in ("__doc__", notes):
                yield name, self.look(getattr, value, name, None)

    def function(self, function: Any) -> bytes:
        """Hash a function: its code and what its names mean, closure, defaults and attributes."""
        code, defaults, keywords, cells = (
            self.look(getattr, function, name)
            for name in ("__code__", "__defaults__", "__kwdefaults__", "__closure__")
        )
        packages, about = _packages(*_origin(function)), list[object]()
        if packages is None:
            space, body = function.__globals__, _body(code)
            self.mention(body, space)
            about += [body.digest, *(self.lookup(space, name) for name in body.globals)]
        else:
            about += [_origin(function)[0], code.co_qualname]
            if packages:
                self.names.add("__annotations__")  # it may act by those of others
        names = code.co_varnames[code.co_argcount - len(defaults or ()) : code.co_argcount]
        held = [("default", *pair) for pair in zip(names, defaults or (), strict=True)]
        held += [("default", name, self.look(keywords.get, name)) for name in keywords or ()]
        for name, cell in zip(code.co_freevars, cells or (), strict=True):
            value = self.look(_cell, cell)
            if value is not _MISSING and (packages is None or name not in _LIBRARY_CACHES):
                held.append(("closure", name, value))
        held += [("attribute", *pair) for pair in self.members(function)]
        for kind, name, value in held:
            token = self.data(value, f"{kind} {name}")
            about += (kind, name, token)
            if function is self.root:
                self.parts[f"{kind} {name}"] = _short(token)
        return _digest("function", marshal.dumps(about, 2))

    def class_(self, cls: type[Any]) -> bytes:
        """Hash a class: metaclass, bases and attributes."""
        tokens = [self.token(x) for x in (type(cls), *self.look(getattr, cls, "__bases__"))]
        for name, value in self.members(cls):
            tokens += [_text(name), _text(_type_name(type(value)))]
            tokens += [self.data(x, f"attribute {name}") for x in _held(value) or (value,)]
        if any(_packages(*_origin(x)) for x in (type(cls), *cls.__mro__)):
            self.names.add("__annotations__")  # a library's base may act by them
        return _digest("class", *tokens)

    def mention(self, body: _Body, space: dict[str, Any]) -> None:
        """Follow what code names beside its globals."""
        self.names.update(body.names)
        self.strings.update(body.strings)
        imports = {*body.imports}
        if not _BY_TEXT.isdisjoint(body.names):
            self.spaces[id(space)] = space
        if not _WIDE.isdisjoint(body.names):
            for value in [*space.values()]:
                if isinstance(value, (FunctionType, type)):
                    self.token(sys.modules.get(str(value.__module__)))
        if "import_module" in body.names or "__import__" in body.names:
            found = (re.fullmatch(r"(\.*)([^\W\d]\w*(?:\.[^\W\d]\w*)*)", x) for x in body.strings)
            imports |= {(len(match[1]), match[2], ()) for match in found if match}
        for level, name, names in sorted(imports):
            if level:
                package = space.get("__package__") or str(space.get("__name__")).rpartition(".")[0]
                name = ".".join(filter(None, (package.rsplit(".", level - 1)[0], name)))
            for prefix in itertools.accumulate(name.split("."), "{}.{}".format):
                self.module(prefix)
            for inner in names:
                if inner not in getattr(sys.modules.get(name), "__dict__", ()):
                    self.module(f"{name}.{inner}")

    def module(self, name: str) -> None:
        """Count a module imported in a body: the loaded one, else what an import would run."""
        loaded = self.look(sys.modules.get, name)
        if isinstance(loaded, ModuleType):
            self.token(loaded)
        elif f"module {name}" not in self.parts:
            try:
                spec: Any = _find(name)
                if spec and self.is_library(name, spec.origin):
                    return
                code = spec.loader.get_code(name) if spec and spec.loader else None
                self.look(_source, name)
            except Exception as error:  # it does not even compile, or the loader is a strange one
                raise _Opaque(f"module {name}") from error
            self.parts[f"module {name}"] = _short(_body(code).digest) if code else ""
            if code:
                self.mention(_body(code), {"__name__": name, "__package__": spec.parent})

    def meaning(self, space: dict[str, Any]) -> bytes:
        """Look up in a module what any of the code may mean."""
        wanted = self.names & space.keys()
        if not _BY_TEXT.isdisjoint(self.names):
            words = (re.findall(r"[^\W\d]\w*", text) for text in self.strings)
            wanted |= space.keys() & itertools.chain.from_iterable(words)
        if not _WIDE.isdisjoint(self.names):
            kinds = (*_CODE, functools.partial, _LRU)
            wanted |= {x for x, y in space.items() if isinstance(y, kinds) and x[:2] != "__"}
        return b"".join([_text(name) + self.lookup(space, name) for name in sorted(wanted)])

    def finish(self) -> None:
        """Walk all code that was reached."""
        self.in_code, before = True, -1
        while self.queue or before < len(self.looked):
            before = len(self.looked)
            while self.queue:
                label, value = self.queue.popleft()
                try:
                    token = self.class_(value) if isinstance(value, type) else self.function(value)
                except _Opaque as error:
                    raise _Opaque(label, *error.args) from error
                self.parts[label] = _short(token)
            for space in [*self.spaces.values()]:
                self.meaning(space)
        for space in self.spaces.values():
            name = str(space.get("__name__", ""))
            label = self.claim("module", "", "of the step" if name == self.own else name)
            self.parts[label] = _short(_digest("module", self.look(self.meaning, space)))


def _walk(memo: _Memo, value: Any, *, is_step: bool = False) -> tuple[_Walk, bytes]:
    """Walk from a value, or a step's function; once more if it turns out that annotations count."""
    for annotated in (False, True):
        walk = _Walk(memo, annotated)
        try:
            if is_step:
                walk.in_code, walk.root = True, _innermost(value)
                is_code = isinstance(walk.root, _CODE)
                walk.own, _ = _origin(walk.root if is_code else type(walk.root))
                if not is_code or value is not walk.root:
                    label = f"call {type(value).__name__}"
                    walk.parts[label] = _short(walk.data(value, "call"))
            token = walk.token(walk.root if is_step else value)
            walk.finish()
        except RecursionError as error:
            raise _Opaque("nested too deeply") from error
        if _REFLECTIVE.isdisjoint(walk.names):
            break
    return walk, token


def _fingerprint(value: object, files: list[tuple[str, str]] | None = None) -> str:
    """Return 64 hexadecimal digits that are equal exactly for values of equal type and content.

    Functions and classes of the project count with their code, installed ones by version. Raises
    `_Opaque` for what has no content to count: a lock, a connection, an open file, a generator.
    Adds to ``files`` those that count by content.
    """
    walk, token = _walk({}, value)
    if files is not None:
        files += walk.files
    return hashlib.sha256(token + marshal.dumps(sorted(walk.parts.items()), 2)).hexdigest()


class _CodeMemo:
    """The parts of many functions, looked at again rather than walked again.

    Identities are compared at each call. Values that can change in place are read again, once
    between two calls of ``begin``: each run begins anew.
    """

    def __init__(self) -> None:
        self._walks: dict[int, tuple[Any, _Walk, dict[str, str], str]] = {}
        self._lock = threading.RLock()
        self._memo: _Memo = {}

    def begin(self) -> None:
        """Forget what was read, not what was walked."""
        self._memo = {}

    def parts(self, function: Callable[..., Any]) -> tuple[dict[str, str], str]:
        """Return the parts, not to be changed by the caller, and a digest of them."""
        with self._lock:  # a pipeline may be run by many threads
            known = self._walks.get(id(function))
            if known is not None:
                known[1].memo = self._memo
                if not known[1].changed():
                    return known[2:]
            walk, _ = _walk(self._memo, function, is_step=True)
            digest = hashlib.sha256(marshal.dumps(sorted(walk.parts.items()), 2)).hexdigest()
            self._walks[id(function)] = (function, walk, walk.parts, digest)
            return walk.parts, digest


# --- the store: text becomes a file

# An entry: magic (its last byte numbers the format), length of the JSON text, HMAC of both and the
# text, JSON text, payload. Text and payload are filled up to 64 bytes, so that arrays are aligned.
_MAGIC = b"dagkit\x00\x02"
_PREFIX = len(_MAGIC) + 8 + 32
_INLINE = 4 << 10  # bytes; smaller buffers stay in the pickle stream
_MAPPED = 32 << 20  # bytes; sections from here on are mapped, not read
_TOUCH = 3600.0  # seconds that the recorded time of use may lag behind
_LONGEST_HEAD = 64 << 20  # bytes; no entry of ours needs more
_LEFTOVER = 86400.0  # seconds after which nobody still writes a temporary file
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# A store of dagkit: delete it at will.\n"
_FOLDERS = ("tmp", "entries", "locks", "newest")
_RECORDS = "runs.jsonl"
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_WRITE = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)

_locks: set[int] = set()  # handles of the locks that this process holds


def _forget_locks() -> None:
    """Close in a forked child what would keep its parent's locks alive."""
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


class _BadEntry(Exception):
    """An entry cannot be used: its value has to be computed again."""

    key = ""  # of the entry, once that is known


class _Head(NamedTuple):
    """What is known of an entry without its payload; its signature was checked."""

    key: str
    step: str
    parts: dict[str, str]  # name -> fingerprint of all that went into the key
    shown: dict[str, str]  # name -> text of an input, for "alpha 0.1 → 0.3"
    fingerprint: str
    outputs: dict[str, str]  # name -> fingerprint, of a step with outputs
    metrics: dict[str, Any]  # name -> value, of values that are numbers or short texts
    named: dict[str, str]  # file or code that the value only names -> its fingerprint back then
    created: float  # seconds since the epoch
    seconds: float  # that the step took
    # For the value, or each output: lengths of the pickle stream and of each buffer, sha256 of the
    # stream, crc32 of all. Only what was signed is unpickled; the rest is raw data.
    sections: list[tuple[list[int], str, list[int]]]
    path: str = ""
    start: int = 0  # of the payload
    kept: bool = True  # False: the payload was pruned, the fingerprint still counts

    @property
    def size(self) -> int:
        """The bytes of the payload."""
        return sum(length for lengths, *_ in self.sections for length in lengths)


def _padded(length: int) -> int:
    return length + -length % 64


def _top(path: str, most: int = _INLINE) -> tuple[bytes, int]:
    """Read the first bytes of a file, and its size."""
    file = os.open(path, _READ)
    try:
        return os.read(file, most), os.fstat(file).st_size
    finally:
        os.close(file)


def _checksums(pieces: Iterable[Any]) -> list[int]:
    """Give the crc32 of pieces, filled up to 64 bytes; of large ones in parts, on all cores."""
    import zlib

    def check(part: Any) -> int:
        return zlib.crc32(bytes(-len(part) % 64), zlib.crc32(part))

    parts = [p[at : at + _MAPPED] for p in pieces for at in range(0, len(p) or 1, _MAPPED)]
    if sum(map(len, parts)) < _MAPPED:
        return [*map(check, parts)]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [*pool.map(check, parts)]


def _read_head(path: str, secret: bytes) -> _Head:
    import hmac
    import json

    data, size = _top(path)
    if data[:8] != _MAGIC:
        newer = data[:7] == _MAGIC[:7]
        raise _BadEntry("it has the format of another dagkit" if newer else "it is no entry")
    start = _PREFIX + int.from_bytes(data[8:16], "big")
    if len(data) < start <= min(size, _LONGEST_HEAD):
        data, size = _top(path, start)
    text = data[_PREFIX:start]
    if not hmac.compare_digest(hmac.digest(secret, data[:16] + text, "sha256"), data[16:_PREFIX]):
        raise _BadEntry("it is damaged, or another key has signed it")
    head = _Head._make([*json.loads(text.decode()), path, start, True])
    payload = sum(_padded(length) for lengths, *_ in head.sections for length in lengths)
    if size not in (start, start + payload):
        raise _BadEntry("it is cut short, or too long")
    return head._replace(kept=size == start + payload)


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the values that are numbers, bools or short texts, as Python's own."""
    found = {}
    for name, value in values.items():
        kind = type(value)
        if kind.__module__ == "numpy" and not getattr(value, "shape", True):
            value = value.item()
        # An int of thousands of digits cannot be written as text.
        is_short = type(value) is int and value.bit_length() <= 1024
        if is_short or type(value) in (bool, float) or (type(value) is str and len(value) <= 200):
            found[name] = value
    return found


def _user_secret() -> bytes:
    """Return the key that signs this user's entries; make it if there is none, or raise OSError."""
    if shared := os.environ.get("DAGKIT_KEY"):
        return hashlib.sha256(os.fsencode(shared)).digest()
    path = os.path.expanduser("~/.local/share/dagkit/key")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        aside = f"{path}.{os.urandom(8).hex()}"
        with open(os.open(aside, _WRITE | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(32))
        try:
            os.link(aside, path)  # unlike a rename, the first of two writers wins
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(aside, path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
    about, (secret, _) = os.stat(path), _top(path)
    if hasattr(os, "geteuid") and (about.st_uid != os.geteuid() or about.st_mode & 0o077):
        raise OSError(f"its key {path} is not yours alone: chmod 600 it, or delete it")
    if len(secret) != 32:
        raise OSError(f"its key {path} is damaged: delete it")
    return secret


def _named_mark(name: str) -> str:
    """Give the fingerprint of what a name says now: a file, a package, ``code MODULE:NAME``."""
    kind, _, what = name.partition(" ")
    if kind == "file":
        return _short(_path_token(what))
    if kind == "package":
        return _version(what)
    import pkgutil

    return _fingerprint(pkgutil.resolve_name(what))


def _pickled(value: Any, marks: dict[str, str]) -> list[Any]:
    """Return the pickle stream, then its buffers, not copied.

    A pickle holds a path, a class or a function of the project by name: what stands behind the name
    counts too, or a step that uses it would not see that it has changed. It is added to ``marks``.
    """
    import io
    import pickle

    stream, buffers = io.BytesIO(), list[Any]()

    class Pickler(pickle.Pickler):
        def reducer_override(self, thing: Any) -> Any:
            if isinstance(thing, type | FunctionType) and "<" not in thing.__qualname__:
                packages = _packages(*_origin(thing))
                mine = [f"code {thing.__module__}:{thing.__qualname__}"]
                for name in mine if packages is None else [f"package {x}" for x in packages]:
                    marks[name] = _named_mark(name)
            elif isinstance(thing, os.PathLike) and hasattr(thing, "is_dir"):
                marks[f"file {thing}"] = _named_mark(f"file {thing}")
            return NotImplemented

    def aside(buffer: Any) -> bool:
        view = buffer.raw()
        if view.nbytes >= _INLINE:
            buffers.append(view)
        return bool(view.nbytes < _INLINE)

    Pickler(stream, 5, buffer_callback=aside).dump(value)
    return [stream.getbuffer(), *buffers]


class Store:
    """A folder of results: one signed and checked file an entry, shared by many processes.

    Whatever is wrong with it leads to one warning and a value computed once more, never to an
    exception or a wrong value. Nothing is unpickled that this user's key has not signed.

    Parameters
    ----------
    path : path, optional
        The folder; default ``$DAGKIT_STORE`` or ``.dagkit``. Made when the first value is kept.

    Examples
    --------
    >>> Store("/nowhere")
    Store('/nowhere')
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        path = path or os.environ.get("DAGKIT_STORE") or ".dagkit"
        self.path = os.path.abspath(os.path.expanduser(path))
        self._secret = b""  # empty until the folder was found fit for use
        self._said: set[str] = set()
        self._heads: dict[str, tuple[tuple[int, ...], _Head]] = {}  # checked, of unchanged files

    def __repr__(self) -> str:
        return f"Store({self.path!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.path,)  # never the secret

    def size(self) -> int:
        """Return the bytes that all entries take on disk.

        Examples
        --------
        >>> Store("/nowhere").size()
        0
        """
        return sum(size for _, size, _ in self._files("entries"))

    def clear(self, step: str | None = None) -> int:
        """Remove the entries of a step, or of all; return how many there were.

        Examples
        --------
        >>> Store("/nowhere").clear()
        0
        """
        count = 0
        for _, _, path in [*self._files("entries")]:
            with contextlib.suppress(OSError, _BadEntry):
                if step is None or _read_head(path, self._secret).step == step:
                    os.unlink(path)
                    count += 1
        return count

    def prune(
        self, *, max_bytes: int | None = None, older_than: timedelta | float | None = None
    ) -> int:
        """Drop payloads, least recently used first; return the bytes set free.

        Heads stay, so that what depends on a dropped value is still reused. Who has a value open
        keeps it. Leftovers of killed processes go.

        Parameters
        ----------
        max_bytes : int, optional
            Drop until the store takes at most this; default no limit.
        older_than : timedelta or float, optional
            Drop what was not loaded for so long (a number: seconds), to the hour; default none.

        Examples
        --------
        >>> Store("/nowhere").prune(max_bytes=0)
        0
        """
        now, freed = time.time(), 0
        for used, _, path in [*self._files("tmp")]:
            if used < now - _LEFTOVER:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        age = older_than.total_seconds() if isinstance(older_than, timedelta) else older_than
        files = sorted(self._files("entries"))
        excess = sum(size for _, size, _ in files) - max_bytes if max_bytes is not None else 0
        for used, size, path in files:
            if freed < excess or (age is not None and used < now - age):
                with contextlib.suppress(OSError):  # another process was faster
                    try:
                        text, _ = _top(path, _read_head(path, self._secret).start)
                        self._write(path, [text], used)
                        freed += size - len(text)
                    except _BadEntry:  # nobody will ever read it
                        os.unlink(path)
                        freed += size
        return freed

    def _files(self, folder: str) -> Iterator[tuple[float, int, str]]:
        """Yield (time of use, bytes, path) of our own files; what others put there is not seen."""
        if not (self._ready() and self._marked()):
            return
        for top, _, names in os.walk(os.path.join(self.path, folder)):
            for name in names:
                if re.fullmatch("[0-9a-f]{64}", name):
                    with contextlib.suppress(OSError):
                        about = os.lstat(os.path.join(top, name))
                        if stat.S_ISREG(about.st_mode):
                            yield about.st_mtime, about.st_size, os.path.join(top, name)

    # The folder

    def _ready(self, *, make: bool = False) -> bool:
        """Say whether the folder is fit for use; a warning says what to do if not."""
        if not self._secret and (make or os.path.isdir(self.path)):
            try:
                os.makedirs(self.path, 0o700, exist_ok=True)
                self._check()
                secret = _user_secret()
                if make:
                    self._furnish()
                self._secret = secret
            except OSError as error:
                self._say("folder", f"the store {self.path} is not used: {error}")
        return bool(self._secret)

    def _check(self) -> None:
        """Raise OSError for a folder that is not ours alone."""
        about, names = os.stat(self.path), os.listdir(self.path)
        if hasattr(os, "geteuid"):
            if about.st_uid != os.geteuid():
                raise OSError(f"it belongs to user {about.st_uid}; choose another: DAGKIT_STORE")
            if about.st_mode & 0o022 and names:
                raise OSError(f"others can write to it; if you trust it: chmod 700 {self.path}")
        # Another process may be about to furnish it.
        if not self._marked() and not {".gitignore", *_FOLDERS}.issuperset(names):
            raise OSError("it holds other files; choose a new or an empty folder")

    def _furnish(self) -> None:
        for folder in _FOLDERS:
            os.makedirs(os.path.join(self.path, folder), 0o700, exist_ok=True)
        if not self._marked():
            os.chmod(self.path, 0o700)  # it may be an empty one that the user made
            for name, text in ((".gitignore", b"*\n"), ("CACHEDIR.TAG", _TAG)):
                self._write(os.path.join(self.path, name), [text])

    def _marked(self) -> bool:
        with contextlib.suppress(OSError):
            return _top(os.path.join(self.path, "CACHEDIR.TAG"))[0] == _TAG
        return False

    def _say(self, about: str, text: str) -> None:
        """Warn, once for each thing, at the user's line."""
        if about not in self._said:
            self._said.add(about)
            _warn(text)

    def _refuse(self, path: str, error: Exception) -> None:
        why = str(error) if isinstance(error, _BadEntry) else f"{type(error).__name__}: {error}"
        self._say(path, f"the entry {path} is not used, its step runs again: {why}")

    def _write(self, path: str, pieces: Iterable[Any], used: float | None = None) -> None:
        """Write a file that appears under its name when it is complete, or never.

        Others that have the old file open, or mapped, keep it.
        """
        aside = os.path.join(self.path, "tmp", os.urandom(32).hex())
        try:
            with open(os.open(aside, _WRITE | os.O_EXCL, 0o600), "wb") as file:
                file.writelines(pieces)
            if used is not None:
                os.utime(aside, (used, used))
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise

    def _entry(self, key: str) -> str:
        return f"{self.path}/entries/{key[:2]}/{key}"

    def _pointer(self, step: str) -> str:
        return f"{self.path}/newest/{hashlib.sha256(step.encode()).hexdigest()}"

    # Entries

    def _head(self, key: str) -> _Head | None:
        """Return the checked head of an entry; None is a miss."""
        path = self._entry(key)
        try:
            if not self._ready():
                return None
            about = os.stat(path)
            stamp = about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns
            if key in self._heads and self._heads[key][0] == stamp:
                return self._heads[key][1]
            head = _read_head(path, self._secret)
            if head.key != key:
                raise _BadEntry("it is the entry of another key")
            if len(self._heads) > 10_000:
                self._heads.clear()
            self._heads[key] = stamp, head
            return head
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, _BadEntry) as error:
            self._refuse(path, error)
            return None

    def _newest(self, step: str) -> _Head | None:
        """Return the head of a step that was stored last, as far as that is known."""
        with contextlib.suppress(OSError, ValueError, _BadEntry):
            if self._ready():
                key = _top(self._pointer(step))[0].decode()
                return _read_head(self._entry(key), self._secret)
        return None

    def _load(self, head: _Head, part: str = "") -> Any:
        """Return a value of its own from an entry, or one output of it; or raise _BadEntry."""
        import pickle

        if head.outputs and not part:
            return tuple([self._load(head, name) for name in head.outputs])
        try:
            if not head.kept:
                raise _BadEntry("its payload was pruned")
            stream, *buffers = self._pieces(head, list(head.outputs).index(part) if part else 0)
            return pickle.loads(stream, buffers=buffers)
        except Exception as error:
            # Whatever it is (a class of the value that is gone raises what it likes), the value can
            # be computed again.
            if head.kept:
                self._refuse(head.path, error)
            bad = _BadEntry(str(error))
            bad.key = head.key
            raise bad from error

    def _pieces(self, head: _Head, number: int) -> Iterator[Any]:
        """Check a section; yield its stream, then its buffers, writable and of no file."""
        import mmap

        spans = [sum(map(_padded, lengths)) for lengths, *_ in head.sections]
        at, span = head.start + sum(spans[:number]), spans[number]
        lengths, stream_hash, checksums = head.sections[number]
        with open(os.open(head.path, _READ), "rb", buffering=0) as file:
            used = os.fstat(file.fileno()).st_mtime
            if span >= _MAPPED:
                # Pages are private and come as they are touched; the file never changes.
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
                data = data[at : at + span]
            else:
                data = memoryview(bytearray(span))
                file.seek(at)
                if file.readinto(data) != span:
                    raise _BadEntry("it was cut short")
        stream = bytes(data[: lengths[0]])  # what is checked is what is unpickled
        ends = [0, *itertools.accumulate(map(_padded, lengths))]
        pieces = [data[start:end] for start, end in itertools.pairwise(ends)]
        good = hashlib.sha256(stream).hexdigest() == stream_hash
        if not good or _checksums(pieces) != checksums:
            raise _BadEntry("its payload is damaged")
        if used < time.time() - _TOUCH:
            with contextlib.suppress(OSError):
                os.utime(head.path)
        yield stream
        for piece, length in zip(pieces[1:], lengths[1:], strict=True):
            yield piece[:length]

    def _save(self, head: _Head, value: Any) -> _Head | None:
        """Keep a value under a head that lacks only what is known of the payload.

        Returns the full head, or None after a warning if the value cannot be kept.
        """
        import hmac
        import json

        if not self._ready(make=True):
            return None
        payload, prints, sections, named = list[Any](), list[str](), [], dict(head.named)
        try:
            for part in value if head.outputs else (value,):
                marks: dict[str, str] = {}
                pieces = _pickled(part, marks)
                lengths = [piece.nbytes for piece in pieces]
                digest = hashlib.sha256(repr((marks, lengths)).encode())
                for piece in pieces:
                    digest.update(piece)
                    payload += (piece, bytes(-piece.nbytes % 64))
                stream_hash = hashlib.sha256(pieces[0]).hexdigest()
                sections.append((lengths, stream_hash, _checksums(pieces)))
                named |= marks
                prints.append(digest.hexdigest())
        except Exception as error:  # pickling runs code of the value's classes
            why = f"cannot be kept: {type(error).__name__}: {error}"
            self._say(f"save {head.step}", f"the result of step '{head.step}' {why}")
            return None
        whole, path = _joined(prints) if head.outputs else prints[0], self._entry(head.key)
        outputs = dict(zip(head.outputs, prints, strict=False))
        metrics = _metrics(
            dict(zip(head.outputs, value, strict=True)) if outputs else {head.step: value}
        )
        head = head._replace(fingerprint=whole, outputs=outputs, named=named, sections=sections)
        head = head._replace(metrics=metrics, created=time.time(), path=path)
        text = json.dumps(head[: _Head._fields.index("path")], separators=(",", ":"))
        body = text.encode()
        body += b" " * (-(_PREFIX + len(body)) % 64)
        top = _MAGIC + len(body).to_bytes(8, "big")
        sealed = top + hmac.digest(self._secret, top + body, "sha256") + body
        try:
            if not os.path.isdir(os.path.dirname(path)):  # new, or the folder has vanished
                self._furnish()
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            self._write(path, [sealed, *payload])
            self._write(self._pointer(head.step), [head.key.encode()])
        except OSError as error:
            self._say("save", f"results cannot be kept in {self.path}: {error}")
            return None
        self._said.discard(path)
        return head._replace(start=len(sealed))

    def _append(self, record: Mapping[str, Any]) -> None:
        """Add a line to the records of runs; one write, so that many processes do not mix them."""
        import json

        if not self._ready(make=True):
            return
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            file = os.open(f"{self.path}/{_RECORDS}", _WRITE | os.O_APPEND, 0o600)
            try:
                size = os.fstat(file).st_size
                os.lseek(file, max(0, size - 1), os.SEEK_SET)
                # A full disk may have cut the last line short: this one must not be lost with it.
                cut = size > 0 and os.read(file, 1) != b"\n"
                os.write(file, b"\n" * cut + line)
            finally:
                os.close(file)
        except OSError as error:
            self._say("save", f"runs cannot be recorded in {self.path}: {error}")

    def _records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of runs, oldest first; leave out what is none, as a cut line."""
        import json

        with contextlib.suppress(OSError), open(f"{self.path}/{_RECORDS}", "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict):
                        yield record

    # Once only

    def _lock(self, key: str) -> int | None:
        """Return a handle on the lock of a key, None if somebody else has it, -1 if there is none.

        The kernel frees the lock of a process that dies. Without locks (on NFS, on Windows) a value
        may be computed twice, with the same result.
        """
        if fcntl is None or not self._ready(make=True):
            return -1
        path, file = f"{self.path}/locks/{key}", -1
        try:
            while True:
                if not os.path.isdir(f"{self.path}/locks"):  # another process is just making it
                    self._furnish()
                file = os.open(path, _WRITE, 0o600)
                _locks.add(file)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last holder may have unlinked it between the two calls.
                if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
                self._close(file)
        except OSError as error:
            if file in _locks:
                self._close(file)
            return None if isinstance(error, BlockingIOError) else -1

    def _close(self, file: int) -> None:
        _locks.discard(file)
        os.close(file)

    def _unlock(self, key: str, file: int | None) -> None:
        if file in _locks:  # not so in a forked child
            with contextlib.suppress(OSError):
                os.unlink(f"{self.path}/locks/{key}")
            self._close(file)


########################################################################################
### Data
########################################################################################


class _Lazy:
    """A value that is not at hand but can be had: ``load()``, and has a ``fingerprint``."""

    where = "in the store"
    named: Mapping[str, str] = {}  # what the value only names, as in a _Head

    def __repr__(self) -> str:
        return f"<{self.where}>"

    @property
    def fingerprint(self) -> str:
        raise NotImplementedError

    def load(self) -> Any:
        raise NotImplementedError

    def counted(self, names: list[tuple[str, str]]) -> str:
        """Return the fingerprint, and add to ``names`` what the value only names."""
        names += self.named.items()
        return self.fingerprint


def _print_of(value: Any, names: list[tuple[str, str]] | None = None) -> str:
    """Return the fingerprint of a value, at hand or not; add what it names to ``names``."""
    if isinstance(value, _Lazy):
        return value.counted([] if names is None else names)
    return _fingerprint(value, names)


def _marks(values: Sequence[Any]) -> list[str]:
    """Fingerprint what can be fingerprinted."""
    marks = []
    for value in values:
        try:
            marks.append(_fingerprint(value))
        except _Opaque:
            marks.append("")
    return marks


class _Format(NamedTuple):
    """How one kind of file becomes a value and back, by a module that is imported when used."""

    module: str
    load: Callable[[Any, Any], Any]  # of module and binary file
    save: Callable[[Any, Any, Any], object]  # of module, value and binary file
    packs: bool = False  # whether it may be packed, as .json.gz


def _frames(kind: str, packs: bool = False, **options: Any) -> _Format:
    """Make the format of pandas' ``read_KIND`` and ``to_KIND``."""

    def save(_: Any, value: Any, file: Any) -> None:
        if not hasattr(value, f"to_{kind}"):
            raise TypeError(f"expected a pandas.DataFrame, got {_brief(value)}")
        index = value.index
        if "index" in options and (
            any(index.names) or (len(index) and index.dtype.kind not in "iu")
        ):
            # Such as that of a groupby: without it nobody could tell what the rows are.
            raise TypeError(f"a .{kind} does not keep the index: use reset_index(), or .parquet")
        getattr(value, f"to_{kind}")(file, **options)

    return _Format("pandas", lambda m, file: getattr(m, f"read_{kind}")(file), save, packs)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"expected a list, got {_brief(value)}")
    return value


def _json_line(m: Any, value: Any, **options: Any) -> bytes:
    text: str = m.dumps(value, ensure_ascii=False, **options)
    return text.encode() + b"\n"


_FORMATS = {
    ".bytes": _Format("io", lambda m, file: file.read(), lambda m, x, file: file.write(x), True),
    ".csv": _frames("csv", True, index=False, mode="wb"),
    ".feather": _frames("feather"),
    ".json": _Format(
        "json",
        lambda m, file: m.load(file),
        lambda m, x, file: file.write(_json_line(m, x, indent=2)),
        True,
    ),
    ".jsonl": _Format(
        "json",
        lambda m, file: [m.loads(line) for line in file if line.strip()],
        lambda m, x, file: file.writelines([_json_line(m, item) for item in _items(x)]),
        True,
    ),
    ".npy": _Format(
        "numpy",
        lambda m, file: m.load(file, allow_pickle=False),
        lambda m, x, file: m.save(file, x, allow_pickle=False),
    ),
    ".npz": _Format(
        "numpy",
        lambda m, file: dict(m.load(file, allow_pickle=False)),
        lambda m, x, file: m.savez(file, **x),
    ),
    ".parquet": _frames("parquet"),
    ".pkl": _Format("pickle", lambda m, file: m.load(file), lambda m, x, f: m.dump(x, f, 5), True),
    ".txt": _Format(
        "io",
        lambda m, file: file.read().decode(),
        lambda m, x, file: file.write(x.encode()),
        True,
    ),
}


class _File:
    """A file of the catalog, or what fsspec finds at an address; its suffix says the format."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path, self.is_local = name, path, "://" not in path
        # A worker process may be in another folder.
        self.where = os.path.abspath(os.path.expanduser(path)) if self.is_local else path
        self.label = f"{'file' if self.is_local else 'data'} {self.where}"
        stem, suffix = os.path.splitext(path)
        self.packed = suffix == ".gz"
        self.suffix = os.path.splitext(stem)[1] if self.packed else suffix
        known = [end for end, made in _FORMATS.items() if made.packs or not self.packed]
        if self.suffix not in known:
            ends = ", ".join(end + ".gz" * self.packed for end in known)
            raise CatalogError(
                f"the catalog has no format for '{name}': {path}\n"
                f"  known suffixes: {ends}\n  or give an object with load() and save(value)",
                name=name,
            )

    def __str__(self) -> str:
        return self.path

    @property
    def format(self) -> _Format:
        return _FORMATS[self.suffix]

    @contextlib.contextmanager
    def opened(self, path: str, mode: Literal["rb", "wb"]) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            if self.is_local:
                file: Any = stack.enter_context(open(path, mode))
            else:
                import fsspec

                file = stack.enter_context(fsspec.open(path, mode))
            if self.packed:
                import gzip

                # Without name and time, so that equal values make equal files.
                file = stack.enter_context(gzip.GzipFile("", mode, fileobj=file, mtime=0))
            yield file

    @property
    def reader(self) -> dict[str, str]:
        """What makes the value of the content: another version may make another one."""
        with contextlib.suppress(ImportError):  # of a package that is not installed
            module = self.format.module
            if module in ("numpy", "pandas"):
                return {f"package {module}": _version(module)}
        return {}

    def mark(self) -> str:
        """Fingerprint the content as it is now."""
        if self.is_local:
            return _named_mark(self.label)
        try:
            with self.opened(self.where, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return "missing"

    def load(self) -> tuple[Any, str]:
        """Return the value, and the mark of what was read."""
        before = self.mark()
        with self.opened(self.where, "rb") as file:
            value = self.format.load(importlib.import_module(self.format.module), file)
        after = self.mark()
        return value, after if before == after else f"{before} or {after}"

    def write(self, path: str, value: Any) -> None:
        with self.opened(path, "wb") as file:
            self.format.save(importlib.import_module(self.format.module), value, file)

    def save(self, value: Any) -> str:
        """Write the file aside and then in its place; return the mark of what was written."""
        if not self.is_local:
            self.write(self.where, value)
            return self.mark()
        where = os.path.realpath(self.where)  # a link stays one
        folder, name = os.path.split(where)
        os.makedirs(folder, exist_ok=True)
        aside = os.path.join(folder, f".{os.urandom(4).hex()}.{name}")
        try:
            self.write(aside, value)
            mark = _named_mark(f"file {aside}")  # before another process can replace it
            with contextlib.suppress(OSError):
                os.chmod(aside, stat.S_IMODE(os.stat(where).st_mode))  # who may read it stays so
            os.replace(aside, where)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
            raise
        return mark


class _DataSet:
    """Any object with ``load()`` and ``save(value)``, as Kedro's; counts by what it loads."""

    suffix, is_local = "", False

    def __init__(self, name: str, inner: Any) -> None:
        self.name, self.inner = name, inner
        self.label, self.reader = f"data {name}", dict[str, str]()

    def __str__(self) -> str:
        return f"<{type(self.inner).__name__} '{self.name}'>"

    def mark(self) -> str:
        return _fingerprint(self.inner.load())

    def load(self) -> tuple[Any, str]:
        value = self.inner.load()
        return value, *_marks([value])

    def save(self, value: Any) -> str:
        self.inner.save(value)
        return self.load()[1]


_Place = _File | _DataSet


class _InCatalog(_Lazy):
    """A value that lies where the catalog says; each load gives a value of one's own."""

    def __init__(self, place: _Place, mark: str = "", fingerprint: str = "") -> None:
        self.place, self._mark, self._fingerprint = place, mark, fingerprint

    def __repr__(self) -> str:
        return str(self.place)

    @property
    def mark(self) -> str:
        """What is there, as it was when it counted first."""
        self._mark = self._mark or self.place.mark()
        return self._mark

    @property
    def fingerprint(self) -> str:
        if self._fingerprint:
            return self._fingerprint
        try:
            content = [self.mark, *self.place.reader.values()]
            if self.place.suffix == ".pkl":  # whose bytes only name the classes of the project
                content.append(_fingerprint(self.load()))
        except _Opaque:
            raise
        except Exception as error:  # whoever needs the value will say so
            raise _Opaque(f"catalog {self.place.name}", type(error).__name__) from error
        return _joined(["catalog", self.place.suffix, *content])

    def load(self) -> Any:
        try:
            value, mark = self.place.load()
        except Exception as error:
            error.add_note(f"while '{self.place.name}' of the catalog was loaded: {self.place}")
            raise
        if self._mark and mark != self._mark:
            raise CatalogError(
                f"the catalog's '{self.place.name}' has changed while the run needed it: "
                f"{self.place}\n  run again; give two runs that write at once a path each, as by "
                "a template: 'out/{region}/model.pkl'",
                name=self.place.name,
            )
        return value


def _place_of(name: str, entry: Any) -> _Place:
    """Make the place that an entry of a catalog names, its path as it is written there."""
    if isinstance(entry, str | os.PathLike):
        return _File(name, os.fspath(entry))
    if hasattr(entry, "load") and hasattr(entry, "save"):
        return _DataSet(name, entry)
    raise CatalogError(
        f"the catalog has {_brief(entry)} for '{name}'\n"
        "  expected a path, or an object with load() and save(value)",
        name=name,
    )


def _find_places(
    catalog: Mapping[str, Any], names: Iterable[str], inputs: Mapping[str, Any]
) -> dict[str, _Place]:
    """Make the places of those names that the catalog has; paths are filled in from the inputs."""
    places: dict[str, _Place] = {}
    for name in [name for name in names if name in catalog]:
        places[name] = place = _place_of(name, catalog[name])
        if not isinstance(place, _File):
            continue
        path = place.path
        lacking = [
            n
            for n in _template_names(name, path)
            if inputs.get(n, _REQUIRED) is _REQUIRED or isinstance(inputs[n], _InCatalog)
        ]
        if lacking:
            raise MissingInputError(
                f"the path of '{name}' in the catalog needs {_listed(map(repr, lacking))}, which "
                f"run() was not given\n  {path}\n" + _hint(lacking, inputs.keys() - {*lacking}),
                missing=tuple(lacking),
            )
        try:
            filled = path.format_map(inputs)
        except (ValueError, TypeError) as error:
            text = f"the path of '{name}' in the catalog cannot be filled in: {error}\n  {path}"
            raise CatalogError(text, name=name) from error
        places[name] = _File(name, filled)
    files: dict[str, list[str]] = {}
    for name, place in places.items():
        if isinstance(place, _File):
            real = os.path.realpath(place.where) if place.is_local else place.where
            files.setdefault(real, []).append(name)
    for names in files.values():
        if len(names) > 1 and not all(isinstance(inputs.get(n), _InCatalog) for n in names):
            raise CatalogError(
                f"the catalog keeps {_listed(map(repr, names))} in one file: "
                f"{places[names[0]]}\n  one would overwrite the other: give each a path of its own",
                name=names[0],
            )
    return places


def _check_files(inputs: Mapping[str, Any]) -> None:
    """Raise ``MissingInputError`` at once for files of the catalog that are not there."""
    places = [value.place for value in inputs.values() if isinstance(value, _InCatalog)]
    files = [place for place in places if isinstance(place, _File) and place.is_local]
    missing = [place for place in files if not os.path.exists(place.where)]
    if missing:
        told = [f"input '{place.name}' is not where the catalog says: {place}" for place in missing]
        raise MissingInputError("\n".join(told), missing=tuple(place.name for place in missing))


def _template_names(name: str, path: str) -> list[str]:
    """Return the names in the braces of a path, or raise ``CatalogError``."""
    import string

    try:
        fields = [x for x in string.Formatter().parse(path) if x[1] is not None]
        good = all(str(x[1]).isidentifier() and "{" not in str(x[2]) for x in fields)
    except ValueError:
        good = False
    if not good:
        raise CatalogError(
            f"the path of '{name}' in the catalog is no template: {path}\n"
            "  expected names of inputs in braces, and {{ }} for braces",
            name=name,
        )
    return [str(x[1]) for x in fields]


def _with_catalog(graph: _Graph, catalog: Mapping[str, Any]) -> _Graph:
    """Keep the steps that the catalog names, and take the inputs that it names from there.

    Raises ``CatalogError`` for an entry that cannot be one, ``UnknownNameError`` for a name.
    """
    steps, inputs = dict(graph.steps), dict(graph.inputs)
    _check_known("the catalog", catalog, graph)
    for name, entry in catalog.items():
        place = _place_of(name, entry)
        for needed in _template_names(name, place.path) if isinstance(place, _File) else ():
            if needed not in graph.makers:
                inputs.setdefault(needed, _REQUIRED)
        step = graph.makers.get(name)
        if step is None:
            inputs[name] = _InCatalog(place)  # stands for a default: each run puts its own there
            continue
        whole = name == step.name and step.outputs
        if step._over or step.poke is not None or whole:
            what = "a map" if step._over else "a sensor" if step.poke else "a step with outputs"
            raise CatalogError(
                f"step '{step.name}' cannot be in the catalog: it is {what}\n  {step.definition}\n"
                + ("  name its outputs instead" if whole else "  let another step take its value"),
                name=name,
            )
        if not step.cache:
            steps[step.name] = replace(step, cache=True)
    makers = {value: steps[step.name] for value, step in graph.makers.items()}
    return graph._replace(steps=steps, makers=makers, inputs=inputs)


########################################################################################
### Display
########################################################################################


class _Look(NamedTuple):
    """How a status looks; each can be told by colour, glyph, border and word alone."""

    glyph: str
    ascii: str
    ansi: str  # colour of a terminal
    light: str
    dark: str
    dashes: str
    width: float  # of the border, px
    path: str  # the glyph as SVG, in a box of 12 x 12 px


_TURN, _BOX = "M10 6a4 4 0 1 1-1.6-3.2M9.2.6v2.6H6.6", "M1 1h10v10H1zM3.5 6l1.8 2 3-3.8"
_CIRCLE = "M10 6a4 4 0 1 1-8 0 4 4 0 1 1 8 0z"
_CHECK = _Look("✓", "=", "34", "#0936cf", "#658cf2", "", 1.6, "M2 6.5l3 3 5-6.5")
_RING = _Look("○", "o", "90", "#6f747d", "#8b919a", "2 3", 1.6, _CIRCLE)
_BARRED = _RING._replace(glyph="⊘", ascii="-", dashes="6 3 1 3", path=_CIRCLE + "M3.2 8.8l5.6-5.6")
# The colours keep a contrast of 4.5 : 1, and differ also for people who see fewer of them.
_LOOKS = {
    "fresh": _CHECK,
    "stale": _Look("↻", "~", "33", "#926b0e", "#fec845", "5 3", 1.6, _TURN),
    "new": _RING,
    "waiting": _RING,
    "running": _Look("▶", ">", "39", "#1b1f24", "#e8eaed", "", 2.4, "M3.5 2v8l6.5-4z"),
    "ran": _Look("■", "+", "32", "#187456", "#3fdea6", "", 1.6, _BOX),
    "cached": _CHECK,
    "failed": _Look("✗", "x", "31", "#8c1a1f", "#fa3849", "", 2.4, "M2.5 2.5l7 7M9.5 2.5l-7 7"),
    "skipped": _BARRED,
}
_ASCII = str.maketrans(
    {look.glyph: look.ascii for look in _LOOKS.values()} | {"·": "-", "…": "~", "→": ">", "×": "x"}
)


class _StepState(NamedTuple):
    """What is known of one step: what a run would do with it, does, or has done."""

    name: str
    status: str  # one of those above
    seconds: float = 0.0  # of the last try, without the waiting between tries
    reason: str = ""  # why it runs or ran although it is cached, or why it was skipped
    attempts: int = 1
    error: BaseException | str | None = None
    saved: float = 0.0  # seconds that reusing it saves
    fingerprint: str = ""  # of the value of a cached step
    elements: int | None = None  # of a mapped step
    size: int | None = None  # bytes of the entry in the store


class _Scene(NamedTuple):
    """All that is shown of a pipeline, a plan or a run; text, picture and page are made of it."""

    title: str
    graph: _Graph
    states: Mapping[str, _StepState] | None = None  # of the steps that are needed; None: structure
    targets: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()
    inputs: Mapping[str, Any] = {}  # name -> value or default
    seconds: float | None = None
    fault: str = ""  # why there is no graph to show

    def steps(self) -> list[Step]:
        """List the steps of a table, in topological order."""
        if self.states is None:
            return _sort(self.graph, tuple(self.graph.steps), set())[0]
        return [self.graph.steps[name] for name in self.states]

    @property
    def known(self) -> Mapping[str, _StepState]:
        return self.states or {}

    def tally(self) -> dict[str, int]:
        """Count the statuses that occur, in the order of the looks."""
        counts = Counter(state.status for state in self.known.values())
        return {status: counts[status] for status in _LOOKS if counts[status]}

    def counts(self) -> str:
        """Say them: ``2 fresh, 1 new``."""
        return ", ".join(f"{number} {status}" for status, number in self.tally().items())

    def heading(self, *, counts: bool = True) -> list[str]:
        """Count, in words: steps and inputs; statuses; the time, and what the cache saved."""
        if self.fault:
            return []
        steps = self.steps()
        inputs = self.graph.inputs.keys() & {need for step in steps for need in step.needs}
        told = [f"{_counted(len(steps), 'step')}, {_counted(len(inputs), 'input')}"]
        told += [self.counts()] * counts
        if self.seconds is not None:
            saved = sum(state.saved for state in self.known.values())
            told += [_duration(self.seconds), f"saved {_duration(saved)}" if saved else ""]
        return [*filter(None, told)]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    """Write a time for people: ``3 ms``, ``0.4 s``, ``8.2 s``, ``1 min 03 s``, ``2 h 05 min``."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _told(state: _StepState | Event, *, short: bool = False) -> str:
    """Say of a step what its status leaves open: the time, the reason, the error."""
    took, error = _duration(state.seconds), _error_line(state.error)
    match state.status:
        case "fresh":
            return f"saves {_duration(state.saved)}"
        case "cached":
            return "cached, " * short + f"saved {_duration(state.saved)}"
        case "ran":
            tries = f"in {state.attempts} tries" * (state.attempts > 1)
            # What never ran before has run now.
            why = "first time" if state.reason == "never ran" else state.reason
            return took if short else "   ".join(filter(None, [took, tries, why]))
        case "failed":
            return error.partition(":")[0] if short else f"{took}   {error}"
    return state.reason


# What XML cannot hold, a terminal would obey, or would turn the direction of the text around it.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text)


def _cells(text: str) -> int:
    """Count the columns that a text takes in a monospaced font."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(1 + (east_asian_width(c) in "WF") - (combining(c) > 0) for c in text)


def _cut(text: str, cells: int, *, ends: bool = False) -> str:
    """Shorten a text that takes more columns than there are; with ``ends`` keep both its ends."""
    text = " ".join(text.split())
    if _cells(text) <= cells:
        return text
    keep = max(1, cells - 1) * len(text) // _cells(text)  # of wide letters fewer fit
    last = keep // 3 if ends else 0
    return text[: keep - last] + "…" + text[len(text) - last :]


def _rows(scene: _Scene) -> list[list[str]]:
    """Say of each step: its name, what it needs; its status, and what there is to say of that."""
    rows = []
    for step in scene.steps():
        row = [step.name, ", ".join(step.needs)]
        if state := scene.known.get(step.name):
            where = f"   ({_place(step.function)})" if state.status == "failed" else ""
            row += [f"{_LOOKS[state.status].glyph} {state.status}", _told(state) + where]
        rows.append([_printable(text) for text in row])
    return rows


def _aligned(rows: list[list[str]], columns: int | None = None) -> list[str]:
    """Write rows as lines of one width a column; with ``columns`` the last one is cut to size."""
    widths = [max(map(_cells, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        *before, last = [x + " " * (w - _cells(x)) for x, w in zip(row, widths, strict=True)]
        line = "  " + "   ".join([*before, ""])
        last = _cut(last, max(8, columns - _cells(line))) if columns else last
        lines.append((line + last).rstrip())
    return lines


def _table(scene: _Scene, *, columns: int | None = None, ascii: bool = False) -> str:
    """Write a scene as lines of text; what does not fit into ``columns`` is cut off the notes."""
    lines = [" · ".join([scene.title, *scene.heading()])]
    lines += _aligned(_rows(scene), columns if scene.states is not None else None)
    lines += ["  " + line for line in scene.fault.splitlines()]
    text = "\n".join(lines)
    return _in_ascii(text) if ascii else text


def _in_ascii(text: str) -> str:
    return text.translate(_ASCII).encode("ascii", "replace").decode()


def _takes_glyphs(stream: Any) -> bool:
    try:
        "".join(map(chr, _ASCII)).encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


# --- the layout: boxes and edges become places and routes


_Rows = list[list[int]]


class _Ranks(NamedTuple):
    """A layout before it has sizes. Boxes and bends are numbers; the boxes have the first ones."""

    rows: _Rows  # the ranks, each in its order
    up: _Rows  # number -> its neighbours in the rank before
    down: _Rows  # number -> its neighbours in the rank after
    trails: dict[tuple[str, str], list[int]]  # edge -> producer, bends, consumer


class _Layout(NamedTuple):
    """Where boxes and edges lie, in px."""

    places: dict[str, tuple[float, float]]  # node -> centre
    routes: dict[tuple[str, str], list[tuple[float, float]]]  # edge -> see _placed
    width: float
    height: float


def _note(row: list[int], place: list[float]) -> None:
    for index, node in enumerate(row):
        place[node] = (index + 0.5) / len(row)


def _mean(place: list[float], nodes: list[int]) -> float:
    return sum([place[node] for node in nodes]) / len(nodes)


def _count_crossings(rows: _Rows, up: _Rows, place: list[float]) -> int:
    count = 0
    for row in rows:
        ends: list[float] = []
        for _, end in sorted([(place[other], place[node]) for node in row for other in up[node]]):
            count += len(ends) - bisect_right(ends, end)
            insort(ends, end)
    return count


def _gain(left: list[float], right: list[float]) -> int:
    """Return how many crossings go if nodes with neighbours at these places change sides."""
    return sum([bisect_left(right, end) + bisect_right(right, end) - len(right) for end in left])


def _sift(row: list[int], up: _Rows, down: _Rows, place: list[float], wish: list[float]) -> None:
    """Move each node to the place in its row where it crosses least.

    Among equals it goes by the wishes. If these are equal too, it takes the first place: this
    stirs the order, so that the next sweep finds something new.
    """
    above = {node: sorted([place[other] for other in up[node]]) for node in row}
    below = {node: sorted([place[other] for other in down[node]]) for node in row}
    for node in list(row):
        row.remove(node)
        costs = [0.0]
        for other in row:
            gain = _gain(above[node], above[other]) + _gain(below[node], below[other])
            costs.append(costs[-1] - gain + (1e-6 if wish[node] <= wish[other] else -1e-6))
        row.insert(costs.index(min(costs)), node)
    _note(row, place)


def _order(rows: _Rows, up: _Rows, down: _Rows) -> _Rows:
    """Return the rows, each in an order such that few edges cross."""
    place = [float(node) for node in range(len(up))]
    best, fewest, gained = rows, math.inf, 0
    for sweep in range(14):
        near, far, way = (down, up, rows[::-1]) if sweep % 2 else (up, down, rows)
        for row in way:
            means = {node: _mean(place, near[node] or far[node] or [node]) for node in row}
            row.sort(key=means.__getitem__)
            _note(row, place)
        for row in rows * (2 if _count_crossings(rows, up, place) else 0):
            _sift(row, up, down, place, [0.0] * len(up))
        count = _count_crossings(rows, up, place)
        if count < fewest:
            best, fewest, gained = [list(row) for row in rows], count, sweep
        if not count or sweep == gained + 5:
            break
    # What crossings do not settle, sifting has stirred: now it goes to its neighbours, and
    # siblings go back into the order of their numbers, that is of their declaration.
    for row in best:
        _note(row, place)
    wishes = [_mean(place, up[n] + down[n] or [n]) + 1e-9 * n for n in range(len(up))]
    for row in best:
        _sift(row, up, down, place, wishes)
    return best


def _ranked(nodes: Collection[str], edges: Sequence[tuple[str, str]]) -> _Ranks:
    """Rank the nodes of a DAG and order each rank: the half of a layout that needs no sizes.

    The edges together span as few ranks as possible. An edge has a bend in each rank that it
    passes; all edges of one producer share it. The passes are those of Gansner, Koutsofios, North
    and Vo, "A technique for drawing directed graphs" (1993), except that nodes are sifted where
    they swap neighbours.
    """
    import networkx as nx

    network: nx.DiGraph[str] = nx.DiGraph()
    network.add_nodes_from(["", *nodes])
    network.add_edges_from(edges, weight=-1)
    for node, degree in network.in_degree():
        network.nodes[node]["demand"] = degree - network.out_degree(node)
    network.add_edges_from((("", node) for node in nodes), weight=0)  # "" stands above them all
    flow = nx.network_simplex(network)[1]
    # The ranks are the dual of this flow: an edge in which something flows spans just one.
    network.add_edges_from(((b, a) for a, b in edges if flow[a][b]), weight=1)
    paths = nx.single_source_bellman_ford_path_length(network, "")
    rank = {node: -int(paths[node]) for node in nodes}
    # A box or bend is at first a pair: whose it is, and in which rank.
    number = {(node, rank[node]): index for index, node in enumerate(nodes)}
    trails = {}
    for a, b in edges:
        pairs = [*((a, at) for at in range(rank[a], rank[b])), (b, rank[b])]
        trails[a, b] = [number.setdefault(pair, len(number)) for pair in pairs]
    rows: _Rows = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    up, down = [list[int]() for _ in number], [list[int]() for _ in number]
    for (_, at), index in number.items():
        rows[at].append(index)
    for start, end in dict.fromkeys(itertools.chain(*map(itertools.pairwise, trails.values()))):
        down[start].append(end)
        up[end].append(start)
    return _Ranks(_order(rows, up, down), up, down, trails)


def _spread(wishes: list[float], weights: list[float], slots: list[float]) -> list[float]:
    """Return the places nearest to the wishes, by weighted squares, as far apart as the slots.

    This is isotonic regression: neighbours that would come too near are pooled.
    """
    pools: list[tuple[float, float, int]] = []  # distance from the slots, weight, members
    for wish, weight, slot in zip(wishes, weights, slots, strict=True):
        mean, members = wish - slot, 1
        while pools and pools[-1][0] >= mean:
            other, more, others = pools.pop()
            mean = (mean * weight + other * more) / (weight + more)
            weight, members = weight + more, members + others
        pools.append((mean, weight, members))
    means = [mean for mean, _, members in pools for _ in range(members)]
    return [mean + slot for mean, slot in zip(means, slots, strict=True)]


def _align(ranks: _Ranks, widths: list[float], heft: list[float]) -> list[float]:
    """Return number -> centre, near those of its neighbours; the outermost boxes begin at 8 px.

    The gaps are 24 px between boxes, 12 beside bends. A round goes through the ranks, down or up,
    and puts each where it is best for given places in the others.
    """
    x = [0.0] * len(widths)
    slots = []  # of each rank: centres side by side
    for row in ranks.rows:
        gaps = [
            (widths[a] + widths[b]) / 2 + (24 if widths[a] and widths[b] else 12)
            for a, b in itertools.pairwise(row)
        ]
        slots.append([*itertools.accumulate(gaps, initial=0.0)])
        for node, centre in zip(row, slots[-1], strict=True):
            x[node] = centre - slots[-1][-1] / 2
    for turn in range(28):
        near, far, step = (ranks.down, ranks.up, -1) if turn % 2 else (ranks.up, ranks.down, 1)
        # Neighbours beyond the reach hardly pull. As it shrinks, what is almost straight becomes
        # straight; least squares alone leave small kinks everywhere.
        reach = 100 * 0.8**turn
        for row, slot in [*zip(ranks.rows, slots, strict=True)][::step]:
            wishes, weights = [], []
            for node in row:
                weight, moment = 1e-3, 1e-3 * x[node]
                # One-sided rounds carry a shift through the whole graph, the others balance it.
                around = near[node] + far[node] if turn % 4 > 1 else near[node] or far[node]
                for other in around:
                    distance = abs(x[other] - x[node]) / reach
                    pull = heft[node] * heft[other] / (1 + distance * distance * distance)
                    weight, moment = weight + pull, moment + pull * x[other]
                wishes.append(moment / weight)
                weights.append(weight)
            for node, place in zip(row, _spread(wishes, weights, slot), strict=True):
                x[node] = place
    left = min((place - width / 2 for place, width in zip(x, widths, strict=True)), default=8.0) - 8
    return [place - left for place in x]


def _placed(
    ranks: _Ranks,
    sizes: Mapping[str, tuple[float, float]],
    *,
    across: bool = False,
    light: Collection[str] = (),
) -> _Layout:
    """Give each box its place and each edge its route, from the top down or ``across``.

    A route goes from border to border, straight within the band of each rank. Between the bands,
    that is from its 2nd to its 3rd point, from the 4th to the 5th and so on, draw a curve that
    starts and ends along the flow: then it crosses no box. Nodes that are ``light``, such as
    small inputs, follow their neighbours rather than pull them.
    """

    def point(x: float, y: float) -> tuple[float, float]:
        return (y, x) if across else (x, y)

    bends = len(ranks.up) - len(sizes)
    boxes = [point(*size) for size in sizes.values()] + [(0.0, 0.0)] * bends
    heft = [0.25 if node in light else 1.0 for node in sizes] + [3.0] * bends
    x = _align(ranks, [width for width, _ in boxes], heft)
    right = max((place + width / 2 for place, (width, _) in zip(x, boxes, strict=True)), default=8)
    band = [(0.0, 0.0)] * len(boxes)
    bottom = 8.0
    for index, row in enumerate(ranks.rows):
        # Curves that go far aside get more room, else they would lie flat on the boxes.
        aside = max((abs(x[node] - x[n]) for node in row for n in ranks.up[node]), default=0.0)
        top = bottom + (min(max(40.0, aside / 6), 80.0) if index else 0.0)
        bottom = top + max(boxes[node][1] for node in row)
        for node in row:
            band[node] = (top, bottom)
    middle = [(top + bottom) / 2 for top, bottom in band]
    routes = {}
    for edge, trail in ranks.trails.items():
        a, b = trail[0], trail[-1]
        spans = [band[node] for node in trail]
        spans[0] = (middle[a] + boxes[a][1] / 2, band[a][1])
        spans[-1] = (band[b][0], middle[b] - boxes[b][1] / 2)
        routes[edge] = [point(x[n], y) for n, ys in zip(trail, spans, strict=True) for y in ys]
    places = {node: point(x[index], middle[index]) for index, node in enumerate(sizes)}
    return _Layout(places, routes, *point(right + 8.0, bottom + 8.0))


# --- the picture

_MOST_NODES = 300  # in a picture; above that a table says more
_PER_CONSUMER = 8  # dependents from which on an input gets a pill at each of them
_PILL = 22  # px: the height of an input
_PAGE_WIDTH = 840  # px that a notebook has for a picture
_SMALLEST = 0.7  # factor down to which a picture is shrunk to that width

# How parts of the picture are painted where no status says it; then the same in the dark. The
# classes: page, text, small text, edges, arrowheads, boxes without a status.
_Paint = dict[str, Any]
_PAPER: _Paint = {"class_": "p", "fill": "#ffffff"}
_TEXT: _Paint = {"class_": "t", "fill": "#1b1f24", "font_size": 12}
_BOLD: _Paint = _TEXT | {"font_weight": "bold"}
_SMALL: _Paint = {"class_": "s", "fill": "#5c636e", "font_size": 10}
_PLAIN = _Look("", "", "", "#5c636e", "#a9b0ba", "", 1.3, "")
_DARK = (
    ".p{fill:#1b1e23}.t{fill:#e8eaed}.s{fill:#a9b0ba}.e{stroke:#7d8590}.a{fill:#7d8590}"
    ".n{stroke:#a9b0ba}.n-f{fill:#a9b0ba}"
)


def _escaped(text: str) -> str:
    """Make a text safe as content and as an attribute of HTML and SVG."""
    import html

    return html.escape(_printable(text), quote=True)


def _element(tag: str, content: str | None = None, /, **attributes: str | float | None) -> str:
    """Write an element of HTML or SVG around content that is escaped already, None for none.

    Attributes that are None are left out; ``font_size`` and ``class_`` stand for what Python
    cannot spell, True for an attribute without a value.
    """
    told = tag
    for name, value in attributes.items():
        if value is not None:
            text = _escaped(value) if isinstance(value, str) else f"{value:g}"
            told += " " + name.rstrip("_").replace("_", "-") + f'="{text}"' * (value is not True)
    return f"<{told}/>" if content is None else f"<{told}>{content}</{tag}>"


class _Box(NamedTuple):
    """A box of the picture: a step, or the pill of an input (``step`` is None)."""

    label: str
    note: str
    step: Step | None
    width: float
    height: float


def _maker(graph: _Graph, name: str) -> str:
    """Name the box that a value comes from: the step that makes it, or the input itself."""
    return graph.makers[name].name if name in graph.makers else name


def _boxes(scene: _Scene) -> tuple[dict[str, _Box], dict[tuple[str, str], bool]]:
    """Make the boxes, in the order of declaration, and the edges: True for those that matter."""
    graph, states = scene.graph, scene.states
    uses = Counter(need for step in graph.steps.values() for need in step.needs)
    boxes: dict[str, _Box] = {}
    edges: dict[tuple[str, str], bool] = {}
    for step in graph.steps.values():
        for need in step.needs:
            source = _maker(graph, need)
            if need in graph.inputs:
                source += f" {step.name}" * (uses[need] > _PER_CONSUMER)
                label = _cut(need, 24, ends=True)
                boxes.setdefault(source, _Box(label, "", None, 18 + 6.4 * _cells(label), _PILL))
            if source in graph.steps or source in boxes:  # not what lies beyond a neighbourhood
                edges[source, step.name] = states is None or step.name in states
        boxes[step.name] = _step_box(step, scene)
    return boxes, edges


def _step_box(step: Step, scene: _Scene) -> _Box:
    state = scene.known.get(step.name)
    note = ", ".join(step.outputs) if scene.states is None else ""
    note, cells = "given" if step.name in scene.given else note, 42
    if state is not None:
        note = _told(state, short=True)
        if state.status not in ("fresh", "stale", "new"):
            cells = 19  # of whatever is still to come: the layout of a live picture never changes
    label = _cut(step.name, 29, ends=True)
    wide = 7.3 * _cells(label) + (36 if state else 20) + 30 * bool(step._over)
    wide = max(92, wide, 6.1 * (cells if cells == 19 else min(cells, _cells(note))) + 20)
    note = _cut(note, max(cells, int((wide - 20) / 6.1)))
    return _Box(label, note, step, min(math.ceil(wide), 280), 40 if note or state else 30)


@functools.lru_cache(4)  # the frames of a live picture have one layout
def _laid_out(
    boxes: tuple[tuple[str, tuple[float, float]], ...], edges: tuple[tuple[str, str], ...]
) -> tuple[bool, _Layout]:
    """Lay boxes out downwards or to the right (True): whichever has to be shrunk less."""
    sizes = dict(boxes)
    light = {name for name, (_, height) in boxes if height == _PILL}
    ranks = _ranked(sizes, edges)
    layouts = [_placed(ranks, sizes, across=across, light=light) for across in (False, True)]
    across = max(_PAGE_WIDTH, layouts[1].width) < max(_PAGE_WIDTH, layouts[0].width)
    places, routes, width, height = layouts[across]
    # To a tenth of a pixel: short texts, and no kinks that nobody sees.
    places = {name: (round(x, 1), round(y, 1)) for name, (x, y) in places.items()}
    routes = {edge: [(round(x, 1), round(y, 1)) for x, y in way] for edge, way in routes.items()}
    return across, _Layout(places, routes, width, height)


def _svg_text(x: float, y: float, text: str, paint: _Paint) -> str:
    return _element("text", _escaped(text), x=round(x), y=round(y), **paint)


def _svg_glyph(status: str, x: float, y: float) -> str:
    look, at = _LOOKS[status], f"translate({x:.0f} {y:.0f})"
    paint: _Paint = {"fill": "none", "stroke": look.light, "stroke_width": 1.6}
    return _element("path", class_=status, transform=at, d=look.path, **paint)


def _svg_heading(scene: _Scene, *, heading: bool) -> tuple[list[str], float]:
    """Write the head line, or only its legend: the statuses that occur, with their looks."""
    size, *times = scene.heading(counts=False) or scene.fault.splitlines()[:1]
    pieces = [("", scene.title, _BOLD, 7.3), ("", f"· {size}", _TEXT, 16.0)] if heading else []
    for status, number in scene.tally().items():
        paint = _TEXT | {"class_": f"{status}-f", "fill": _LOOKS[status].light}
        pieces.append((status, f"{number} {status}", paint, 16))
    if heading and times:
        pieces.append(("", " · ".join(times), _TEXT, 0))
    parts, x = [], 12.0
    for status, text, paint, gap in pieces:
        if status:
            parts.append(_svg_glyph(status, x, 10))
            x += 17
        parts.append(_svg_text(x, 20, text, paint))
        x += 7.3 * _cells(text) + gap
    return parts, x + 12 if parts else 0.0


def _svg_edges(
    layout: _Layout, edges: Mapping[tuple[str, str], bool], *, across: bool
) -> Iterator[str]:
    """Draw what routes share once: a curve where they change their lane, else a straight line."""
    tip = "l-6-3.5v7z" if across else "l-3.5-6h7z"
    for matters in (True, False):
        lanes, heads = dict[str, None](), dict[str, None]()
        for points in [layout.routes[edge] for edge in edges if edges[edge] == matters]:
            for (x, y), (u, v) in itertools.pairwise(points):
                bend = f"C{(x + u) / 2:g} {y:g} {(x + u) / 2:g} {v:g} "
                if not across:
                    bend = f"C{x:g} {(y + v) / 2:g} {u:g} {(y + v) / 2:g} "
                bend = "L" if ((y == v) if across else (x == u)) else bend
                lanes[f"M{x:g} {y:g}{bend}{u:g} {v:g}"] = None
            heads[f"M{u:g} {v:g}{tip}"] = None
        if lanes:
            drawn = _element("path", class_="e", d="".join(lanes), fill="none", stroke="#8a919c")
            drawn += _element("path", class_="a", d="".join(heads), fill="#8a919c")
            yield _element("g", drawn, opacity=None if matters else ".45")


def _svg_box(scene: _Scene, box: _Box, x: float, y: float, longest: float) -> str:
    """Draw the pill of an input; or a step with its status, and its share of the longest time."""
    step, w, h = box.step, box.width, box.height

    def outline(inset: float, radius: float, **paint: Any) -> str:
        size = {"width": w - 2 * inset, "height": h - 2 * inset, "rx": radius}
        return _element("rect", x=x + inset, y=y + inset, **size, **paint)

    if step is None:
        small = _SMALL | {"font_size": 10.5, "text_anchor": "middle"}
        pill = outline(0, 11, class_="n p", fill="#ffffff", stroke="#8a919c")
        return pill + _svg_text(x + w / 2, y + 14.5, box.label, small)
    state = scene.known.get(step.name)
    name, look = (state.status, _LOOKS[state.status]) if state else ("n", _PLAIN)
    line: _Paint = {"stroke": look.light, "stroke_width": look.width}
    line["stroke_dasharray"] = look.dashes or None
    tint: _Paint = {"class_": f"{name} {name}-f", "fill": look.light, "fill_opacity": ".07"}
    drawn, base = "", y + (17 if h > 30 else 19)
    for shift in (6, 3) if step._over else ():  # a stack, for the elements of a mapped step
        edge = f"M{x + shift + 6:g} {y + h + shift:g}h{w - 12:g}q6 0 6-6v{12 - h:g}"
        drawn += _element("path", class_=name, d=edge, fill="none", **line)
    if not scene.targets.isdisjoint(step.values):
        drawn += outline(-3.5, 9, class_=name, fill="none", stroke=look.light)
    drawn += outline(0, 6, **_PAPER) + outline(0, 6, **tint, **line)
    drawn += _svg_text(x + (28 if state else 10), base, box.label, _BOLD)
    if state:
        drawn += _svg_glyph(name, x + 10, base - 10)
    if state and state.elements is not None:
        count = f"×{state.elements}"
        drawn += _svg_text(x + w - 8, base, count, _SMALL | {"text_anchor": "end"})
    if box.note:
        drawn += _svg_text(x + 10, y + 32, box.note, _SMALL)
    if state and state.seconds and longest and state.status in ("ran", "failed"):
        share = f"{(w - 12) * state.seconds / longest:.1f}"
        bar: _Paint = {"x": x + 6, "y": y + h - 4, "width": share, "height": 2.5}
        drawn += _element("rect", class_=f"{name}-f", **bar, fill=look.light)
    return _element("g", drawn, opacity=None if state or scene.states is None else ".45")


def _svg(scene: _Scene, *, heading: bool = True, links: bool = False) -> str:
    """Draw a scene; with ``links`` each box leads to the part of the page about its step."""
    boxes, edges = _boxes(scene)
    sizes = tuple((name, (box.width, box.height)) for name, box in boxes.items())
    across, layout = _laid_out(sizes, tuple(edges))
    head, head_width = _svg_heading(scene, heading=heading)
    width, top = round(max(layout.width, head_width)), 30 if head else 0
    height = round(layout.height + top)
    longest = max((state.seconds for state in scene.known.values()), default=0.0)
    dark = "".join(
        f".{status}{{stroke:{_LOOKS[status].dark}}}.{status}-f{{fill:{_LOOKS[status].dark}}}"
        for status in scene.tally()
    )
    parts = [_element("style", f"@media (prefers-color-scheme:dark){{{_DARK}{dark}}}")]
    parts.append('<rect class="p" width="100%" height="100%" fill="#ffffff"/>')
    parts += [*head, f'<g transform="translate(0 {top})">']
    parts += _svg_edges(layout, edges, across=across)
    for name, box in boxes.items():
        x, y = layout.places[name]
        drawn = _svg_box(scene, box, x - box.width / 2, y - box.height / 2, longest)
        parts.append(_element("a", drawn, href=f"#{name}") if links and box.step else drawn)
    content = "\n".join(["", *parts, "</g>", ""])
    size: _Paint = {"width": width, "height": height, "viewBox": f"0 0 {width} {height}"}
    font = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
    xmlns = "http://www.w3.org/2000/svg"
    return _element("svg", content, xmlns=xmlns, **size, font_family=font) + "\n"


def _mermaid(scene: _Scene) -> str:
    """Write a scene as Mermaid, which GitHub draws in Markdown."""
    boxes, edges = _boxes(scene)
    ids = {name: f"n{number}" for number, name in enumerate(boxes)}
    lines = ["flowchart TD"]
    for name, box in boxes.items():
        texts = [_printable(text) for text in (box.label, box.note) if text]
        label = "<br/>".join(
            re.sub(r"[^\w\s.,:()×→…-]", lambda sign: f"#{ord(sign[0])};", text) for text in texts
        )
        shape = "[[]]" if box.step and box.step._over else "[]" if box.step else "([])"
        half, state = len(shape) // 2, scene.known.get(name)
        line = f'  {ids[name]}{shape[:half]}"{label}"{shape[half:]}'
        lines.append(line + (f":::{state.status}" if state else ""))
    lines += [f"  {ids[one]} --> {ids[other]}" for one, other in edges]
    for status in scene.tally():
        look = _LOOKS[status]
        dashes = f",stroke-dasharray:{look.dashes}" if look.dashes else ""
        lines.append(f"  classDef {status} stroke:{look.light},stroke-width:{look.width}px{dashes}")
    return "\n".join(lines) + "\n"


# --- pages


def _drawn(scene: _Scene, *, links: bool = False) -> tuple[str, str]:
    """Return the picture, or else a line that says why there is none."""
    count = len(scene.graph.steps) + len(scene.graph.inputs)
    if scene.fault:
        return "", scene.fault
    if count > _MOST_NODES:
        return "", f"{count} names are too many for one picture: .show(around='name', hops=2)"
    try:
        return _svg(scene, heading=False, links=links), ""
    except Exception as error:  # a fault of the drawing must not hide what there is to say
        return "", f"no picture: {_error_line(error)}"


def _html_table(rows: list[list[str]]) -> str:
    lines = [[_element("td", _escaped(text), style="text-align:left") for text in r] for r in rows]
    return _element("table", "".join(_element("tr", "".join(line)) for line in lines))


def _alt(scene: _Scene) -> str:
    """Say in a line what the picture shows, for those who do not see it."""
    names = [step.name for step in scene.steps()]
    told = f"Pipeline {scene.title}: {' → '.join(names[:8])}{' → …' * (len(names) > 8)}"
    for status in ("failed", "stale", "new"):
        those = [state.name for state in scene.known.values() if state.status == status]
        told += f"; {len(those)} {status}: {', '.join(those[:8])}" * bool(those)
    return told


def _html(scene: _Scene) -> str:
    """Write the fragment that a notebook shows: head line, picture, table; no script, no id."""
    svg, fault = _drawn(scene)
    head = [f"<b>{_escaped(scene.title)}</b>", *map(_escaped, scene.heading())]
    parts = [_element("p", " · ".join(head))]
    if svg:
        import base64

        width = int(re.findall(r'width="(\d+)"', svg)[0])
        shrunk = min(width, max(_PAGE_WIDTH, round(_SMALLEST * width)))
        data = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        image = _element("img", alt=_alt(scene), width=shrunk, style="max-width:none", src=data)
        parts.append(_element("div", image, style="overflow-x:auto"))
    else:
        parts.append(_element("pre", _escaped(fault)))
    if rows := _rows(scene):
        table = _element("summary", _counted(len(rows), "step")) + _html_table(rows)
        parts.append(_element("details", table, open=None if svg else True))
    return _element("div", "".join(parts), class_="dagkit")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width"><style>{style}</style></head>
<body>{body}</body></html>
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root{--paper:#fff;--ink:#1b1f24;--grey:#5c636e;--code:#f4f5f7;--link:#0936cf}
@media (prefers-color-scheme:dark){:root{
--paper:#1b1e23;--ink:#e8eaed;--grey:#a9b0ba;--code:#262a31;--link:#658cf2}}
:root{color-scheme:light dark}
body{font:14px/1.5 system-ui,sans-serif;margin:2em;padding:0} details,table,p{max-width:1100px}
body{background:var(--paper);color:var(--ink)} a{color:var(--link)} td{padding-right:2em}
pre,code,summary{font-family:ui-monospace,monospace} .picture,pre{overflow-x:auto}
pre{background:var(--code);padding:.6em} details{border-top:1px solid #8a919c;padding:.4em 0}
dt{float:left;clear:left;width:7em;color:var(--grey)} dd{margin-left:8em;white-space:pre-wrap}
:target{outline:2px solid var(--link);outline-offset:4px;scroll-margin-top:3em}
@media print{details::details-content{content-visibility:visible;height:auto}}
"""


def _page_step(scene: _Scene, step: Step, room: int) -> str:
    """Write what is known of a step; a link to its name opens it."""
    graph, state, inner = scene.graph, scene.known.get(step.name), _innermost(step.function)

    def linked(names: Iterable[str]) -> str:
        return ", ".join(_element("a", _escaped(n), href=f"#{_maker(graph, n)}") for n in names)

    used = [s.name for s in graph.steps.values() if not set(step.values).isdisjoint(s.needs)]
    # A default of a secret would stand in the signature, and in the source.
    is_open = not any(isinstance(scene.inputs.get(name), _Secret) for name in step.needs)
    where = step.definition if is_open else _place(step.function)
    facts = {"defined": _escaped(where), "needs": linked(step.needs)}
    facts |= {"makes": _escaped(", ".join(step.values)), "used by": linked(used)}
    title, texts = _escaped(step.name), [inspect.getdoc(inner) or ""]
    if state:
        told = _escaped(_told(state).replace("   ", " · "))
        title = f"{_LOOKS[state.status].glyph} {title} · {state.status} · {told}"
        facts["tries"] = str(state.attempts) if state.attempts > 1 else ""
        facts["fingerprint"] = state.fingerprint
        facts["entry"] = f"{state.size:,} bytes" if state.size is not None else ""
        if isinstance(state.error, BaseException):
            import traceback

            texts.append("".join(traceback.format_exception(state.error))[-room:])
    with contextlib.suppress(OSError, TypeError):  # defined where there is no file, or a builtin
        texts += [inspect.cleandoc(inspect.getsource(inner))] if is_open else []
    terms = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items() if text)
    inside = _element("dl", terms)
    for text in filter(None, texts):
        inside += _element("pre", _escaped(text if len(text) <= room else text[:room] + "…"))
    body = _element("summary", title) + _element("div", inside, id=step.name)
    return _element("details", body, open=True if state and state.status == "failed" else None)


def _page(scene: _Scene) -> str:
    """Write a page of its own: the picture, and below it all that is known of each step."""
    svg, fault = _drawn(scene, links=True)
    steps, title = scene.steps(), _escaped(scene.title)
    room = max(600, 240_000 // max(1, len(steps)))  # characters of source, for half a megabyte
    shown = [_element("h1", title), _element("p", _escaped(" · ".join(scene.heading())))]
    shown.append(
        _element("pre", _escaped(fault)) if fault else _element("div", svg, class_="picture")
    )
    shown += [_page_step(scene, step, room) for step in steps]
    rows = ""
    for name, value in scene.inputs.items():
        text = "required" if value is _REQUIRED else _escaped(_brief(value))
        cells = _element("td", _escaped(name)) + _element("td", _element("code", text))
        rows += _element("tr", cells, id=name)
    shown.append(f"<h2>Inputs</h2><table>{rows}</table>" if rows else "")
    body = "\n".join(filter(None, shown))
    return _PAGE.format(title=title, policy=_POLICY, style=_STYLE, body=body)


class _Picture:
    """What ``show()`` returns: one scene as picture, page, Mermaid or text; made when asked for.

    Only ``svg`` and ``mermaid`` raise what the drawing raises; ``html`` says it instead.
    """

    svg = property(lambda self: _svg(self._scene))
    html = property(lambda self: _html(self._scene))
    mermaid = property(lambda self: _mermaid(self._scene))
    text = property(lambda self: _table(self._scene))

    def __init__(self, scene: _Scene, format: str = "html") -> None:
        self._scene, self._format = scene, format

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; its suffix says which kind: svg, html (a page of its own), mmd or txt."""
        kinds = {".svg": _svg, ".html": _page, ".mmd": _mermaid, ".txt": _table}
        suffix = os.path.splitext(path)[1]
        if suffix not in kinds:
            raise ValueError(f"{os.fspath(path)!r}: expected a name that ends in {_listed(kinds)}")
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(kinds[suffix](self._scene))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        picture = {"image/svg+xml": _svg} if self._format == "svg" else {"text/html": _html}
        makers = {"text/plain": _table, **picture}
        kinds = [kind for kind in makers if include is None or kind in include]
        return {kind: makers[kind](self._scene) for kind in kinds if kind not in (exclude or ())}


def _neighbourhood(scene: _Scene, name: str, hops: int) -> _Scene:
    """Keep the steps and inputs that are at most so many edges away from a name."""
    import networkx as nx

    graph, known = scene.graph, {*scene.graph.makers, *scene.graph.inputs}
    if name not in known:
        text = f"{_brief(name)} cannot be shown around: no step makes or takes it\n"
        raise UnknownNameError(text + _hint([name], known), unknown=(name,))
    steps = _sort(graph, tuple(graph.steps), set())[0]
    network: nx.Graph[str] = nx.Graph([(_maker(graph, n), s.name) for s in steps for n in s.needs])
    network.add_nodes_from(graph.steps)
    near = nx.single_source_shortest_path_length(network, _maker(graph, name), cutoff=hops)
    makers = {value: step for value, step in graph.makers.items() if step.name in near}
    inputs = {name: default for name, default in graph.inputs.items() if name in near}
    graph = _Graph({step.name: step for step in steps if step.name in near}, makers, inputs, {})
    states = scene.states and {n: state for n, state in scene.states.items() if n in near}
    return scene._replace(graph=graph, states=states)


class _Shown:
    """A pipeline, a plan or a run: they show themselves in one way."""

    def _scene(self) -> _Scene:
        raise NotImplementedError  # each of the three has its own

    def show(
        self, *, format: Literal["html", "svg"] = "html", around: str | None = None, hops: int = 2
    ) -> _Picture:
        """Return the picture and the table, to display or to keep.

        Runs no step, hashes nothing and opens no stored value.

        Parameters
        ----------
        format : {"html", "svg"}
            What a notebook gets: picture and table, or the picture alone, as ``image/svg+xml``.
        around : str, optional
            Show only the neighbourhood of this name; by default everything.
        hops : int
            How many edges away from it, in either direction.

        Returns
        -------
        object
            With ``.svg``, ``.html``, ``.mermaid``, ``.text``, and ``.save(path)``, which goes by
            the suffix: ``.svg``, ``.html`` (a page of its own), ``.mmd``, ``.txt``.

        Raises
        ------
        UnknownNameError
            If ``around`` is no name of the pipeline.

        Examples
        --------
        >>> print(Pipeline({"more": lambda x: x + 1, "twice": lambda more: 2 * more}).show().text)
        pipeline · 2 steps, 1 input
          more    x
          twice   more
        """
        scene = self._scene()
        return _Picture(scene if around is None else _neighbourhood(scene, around, hops), format)

    def __str__(self) -> str:
        import shutil

        stream, columns = sys.stdout, None
        if stream is not None and stream.isatty():
            columns = shutil.get_terminal_size().columns
        return _table(self._scene(), columns=columns, ascii=not _takes_glyphs(stream))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.show()._repr_mimebundle_(include, exclude)


########################################################################################
### Plan
########################################################################################


class _Stored(_Lazy):
    """A value that lies in a store, or one output of it; each load gives a value of one's own."""

    def __init__(self, store: Store, head: _Head, part: str = "") -> None:
        self.store, self.head, self.part, self.named = store, head, part, head.named

    @property
    def fingerprint(self) -> str:
        return self.head.outputs[self.part] if self.part else self.head.fingerprint

    def load(self) -> Any:
        return self.store._load(self.head, self.part)


class _Mapped(_Lazy):
    """The list that a mapped step makes, as long as some of its elements are not at hand."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    @property
    def fingerprint(self) -> str:
        return self.counted([])

    def counted(self, names: list[tuple[str, str]]) -> str:
        return _joined([_print_of(item, names) for item in self.items])

    def load(self) -> Any:
        return [x.load() if isinstance(x, _Lazy) else x for x in self.items]


class _Whole(_Mapped):
    """What a step with outputs makes as a whole, some of them in the catalog."""

    def __init__(self, items: Sequence[Any], fingerprint: str = "") -> None:
        super().__init__(items)
        self._fingerprint = fingerprint

    def counted(self, names: list[tuple[str, str]]) -> str:
        return self._fingerprint or super().counted(names)

    def load(self) -> Any:
        return tuple(super().load())


class _Reuse:
    """Tells, during one run or plan, which step can be reused, and why another cannot.

    ``distrusted`` holds the keys of entries whose payload has proved bad.
    """

    def __init__(
        self,
        store: Store,
        codes: _CodeMemo,
        order: _Order,
        catalog: Mapping[str, _Place],
        secret: Collection[str],
    ) -> None:
        self.store, self.order, self.catalog, self.secret = store, order, catalog, secret
        self.distrusted: set[str] = set()
        self.made: dict[str, tuple[dict[str, str], str] | _Opaque] = {}
        # Of each step: the parts of its code, and the text that its keys begin with.
        self.starts: dict[str, tuple[dict[str, str], str]] = {}
        codes.begin()
        # All at once, before a step runs: it may import, or change a constant.
        for step in order.steps:
            if step.cache:
                try:
                    self.made[step.name] = codes.parts(step.function)
                except _Opaque as culprit:
                    self.made[step.name] = culprit

    @functools.cached_property
    def makers(self) -> dict[str, Step]:
        """Map the values that a run would make to their steps."""
        made = ((value, step) for step in self.order.steps for value in step.values)
        return {value: step for value, step in made if value not in self.order.given}

    def start(self, step: Step) -> tuple[dict[str, str], str]:
        """Return the parts of a step's code, and what its keys begin with; or raise ``_Opaque``."""
        if step.name not in self.starts:
            made = self.made[step.name]
            if isinstance(made, _Opaque):
                raise made
            parts, digest = made
            if step.version is not None:
                parts = {**parts, "version": _fingerprint(step.version)}
                digest += parts["version"]
            places: dict[str, str] = {}
            for name in step.values:
                if name in self.catalog:
                    place = self.catalog[name]
                    places |= {f"catalog {name}": str(place), **place.reader}
            parts = {**parts, **places}
            about = (*sys.version_info[:2], step.name, step._takes, step._keywords, step.outputs)
            digest += repr(places) * bool(places)
            self.starts[step.name] = parts, f"{_MAGIC!r}{about}{digest}"
        return self.starts[step.name]

    def key(self, step: Step, prints: Mapping[str, str]) -> str:
        """Make the key of a result from the step's code and the fingerprints of what it takes.

        Raises ``_Opaque`` for code that cannot be fingerprinted.
        """
        _, start = self.starts.get(step.name) or self.start(step)
        return _joined([start, *[prints[name] for name in step.needs]])

    def wanted(
        self, step: Step, key: str, prints: Mapping[str, str], values: Mapping[str, Any]
    ) -> _Head:
        """Make the head of an entry that is not there: what is known before the step has run."""
        inputs = {f"input {name}": prints[name] for name in step.needs if name in prints}
        values = _hidden(values, self.secret)
        scalars = [n for n in step.needs if type(values.get(n, _MISSING)) in _SCALARS]
        shown = {name: _brief(values[name]) for name in scalars}
        outputs = dict.fromkeys(step.outputs, "")
        parts = {**self.start(step)[0], **inputs}
        return _Head(key, step.name, parts, shown, "", outputs, {}, {}, 0.0, 0.0, [])

    def find(self, step: Step, key: str) -> _Head | str:
        """Return the entry of a key if it can be used, or else the reason why not, if known."""
        head = self.store._head(key) if key not in self.distrusted else None
        if head is None:
            damaged = key in self.distrusted or os.path.lexists(self.store._entry(key))
            return "unreadable entry" if damaged else ""
        kept_for = step.cache.total_seconds() if isinstance(step.cache, timedelta) else math.inf
        if time.time() - head.created > kept_for:
            return "expired"
        if not head.kept:
            held = {step.name, *step.outputs} - self.catalog.keys()
            if not held.isdisjoint(self.order.targets):
                return "payload pruned"
        for name, mark in head.named.items():
            # Not by its path: the whole project may have been moved, or copied.
            place = self.catalog.get(name[8:]) if name[:8] == "catalog " else None
            try:
                if (place.mark() if place else _named_mark(name)) != mark:
                    name = place.label if place else name
                    kind, _, what = name.partition(" ")
                    gone = kind == "file" and not os.path.lexists(what)
                    return f"{kind} {_from_here(what)} {'is gone' if gone else 'changed'}"
            except Exception:  # a module may raise anything when it is imported, a data set too
                return f"{place.label if place else name} is gone"
        return head

    def why(self, step: Step, wanted: _Head, after: str = "") -> str:
        """Compare with the newest entry of the step, and say what is not as it was."""
        newest = self.store._newest(step.name)
        if newest is None:
            return "never ran"
        old, parts = newest.parts, wanted.parts
        # Behind a step that will run, what is not known yet has not changed.
        known = {n for n in {**old, **parts} if n in parts or not (after and n[:6] == "input ")}
        changed = sorted(name for name in known if old.get(name) != parts.get(name))
        others = ("input", "package", "version", "catalog")
        code = [n for n in changed if n.partition(" ")[0] not in others]
        # A default that was edited is an input that was, which says more.
        defaults = [n for n in code if n[:8] == "default " and f"input {n[8:]}" in changed]
        if defaults:
            code = [n for n in code if n not in (*defaults, _name_of(step.function))]
        if code:
            # What a module binds changes with what is bound, which says more.
            code.sort(key=lambda name: name.startswith("module "))
            return f"code changed: {', '.join(code[:3])}" + ", …" * (len(code) > 3)
        if "version" in changed:
            return "version changed"
        packages = [name for name in changed if name.startswith("package ")]
        inputs = [name.removeprefix("input ") for name in changed if name.startswith("input ")]
        inputs.sort(key=lambda name: name in step._over)  # another element is the last reason
        for name in inputs:
            if name not in self.makers:
                was, now = newest.shown.get(name), wanted.shown.get(name)
                return f"input {name}" + (f" {was} → {now}" if was and now else " changed")
        for name in packages:
            return f"{name} {old.get(name, 'none')} → {parts.get(name, 'none')}"
        if after or inputs:
            return f"after {after or self.makers[inputs[0]].name}"
        for name in changed:  # only "catalog NAME" is left
            was, now = (_from_here(found.get(name, "none")) for found in (old, parts))
            return f"{name} {was} → {now}"
        return "unreadable entry"


class Plan(_Shown, Mapping[str, _StepState]):
    """What a run would do, step by step, and why.

    ``Pipeline.plan`` makes it; it runs nothing, and loads only a list that a map goes through, and
    inputs of a catalog that count by their value: pickles, and objects of the user's. A mapping of
    step name -> ``name``, ``status``, ``reason``, in the order in which the steps would run.
    ``fresh``: a stored result fits and will be reused. ``stale``: something changed, or may have;
    it runs if so. ``new``: nothing is stored, or the step is not cached; it runs.

    Examples
    --------
    >>> plan = Pipeline({"more": lambda x: x + 1}).plan(x=1)
    >>> plan["more"].status, plan["more"].reason
    ('new', 'not cached')
    """

    def __init__(self, scene: _Scene) -> None:
        self._shows = scene
        self._steps = dict(scene.states or {})

    def __getitem__(self, name: str) -> _StepState:
        if name not in self._steps:
            raise NoValueError(f"'{name}' is no step of this plan\n{_hint([name], self._steps)}")
        return self._steps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        counts = self._shows.counts() or "no steps"
        return f"<Plan of '{self._shows.title}': {counts}>"

    def _scene(self) -> _Scene:
        return self._shows


def _look_up(
    reuse: _Reuse,
    step: Step,
    prints: Mapping[str, str],
    elements: Mapping[str, Iterable[str]],
    values: Mapping[str, Any],
) -> list[_Head] | str:
    """Return the entries of a step, for a map one an element; or why it would run."""
    unknown = [name for name in step.needs if name not in prints]
    unknown += [name for name in step._over if name not in elements]
    if unknown:
        # An input that is no list has no maker; a run will say what is wrong with it.
        maker = reuse.makers.get(unknown[0])
        wanted = reuse.wanted(step, "", prints, values)
        return reuse.why(step, wanted, after=maker.name if maker else "")
    heads: list[_Head] = []
    rows = zip(*[elements[name] for name in step._over], strict=False)
    for row in rows if step._over else [()]:
        here = {**prints, **dict(zip(step._over, row, strict=True))}
        key = reuse.key(step, here)
        found = reuse.find(step, key)
        if isinstance(found, str):
            return found or reuse.why(step, reuse.wanted(step, key, here, values))
        heads.append(found)
    return heads


def _make_plan(reuse: _Reuse, values: Mapping[str, Any]) -> dict[str, _StepState]:
    """Decide for each step of an order what a run would do with it.

    From heads alone, but for a list that a map goes through: its elements have no head. (An object
    in the catalog counts by what it loads.)
    """
    plan: dict[str, _StepState] = {}
    prints: dict[str, str] = {}
    elements: dict[str, list[str]] = {}  # fingerprints of the elements of a list
    stored: dict[str, _Lazy] = {}
    pruned: dict[str, set[str]] = {}  # values that a fresh step would have to make again
    for step in reuse.order.steps:
        found: list[_Head] | str = "not cached"
        try:
            for name in step.needs if step.cache else ():
                if name in values and name not in prints:
                    prints[name] = _print_of(values[name])
                    stored |= {name: values[name]} if isinstance(values[name], _Lazy) else {}
                if name in values and name in step._over and isinstance(values[name], Iterable):
                    elements[name] = [_fingerprint(item) for item in values[name]]
                elif name in stored and name in step._over and name not in elements:
                    with contextlib.suppress(Exception):  # a run will say what is wrong with it
                        elements[name] = [_fingerprint(item) for item in stored[name].load()]
            if step.cache:
                found = _look_up(reuse, step, prints, elements, values)
        except _Opaque as culprit:
            found = culprit.reason
        if isinstance(found, str):
            new = found in ("never ran", "not cached")
            plan[step.name] = _StepState(step.name, "new" if new else "stale", reason=found)
            continue
        heads = found
        saved, size = sum(head.seconds for head in heads), sum(head.size for head in heads)
        plan[step.name] = _StepState(step.name, "fresh", saved=saved, size=size)
        if not all(head.kept for head in heads):
            pruned[step.name] = {step.name, *step.outputs} - reuse.catalog.keys()
        if not step._over:
            stored |= _stored(reuse.store, heads[0], reuse.catalog)
        for name in step.values:
            marks = [head.outputs.get(name, head.fingerprint) for head in heads]
            prints[name] = _joined(marks) if step._over else marks[0]
            if step._over:
                elements[name] = marks
    loaded: set[str] = set()  # by the steps that run
    for step in reversed(reuse.order.steps):
        if not loaded.isdisjoint(pruned.get(step.name, ())):
            plan[step.name] = _StepState(step.name, "stale", reason="payload pruned")
        if plan[step.name].status != "fresh":
            loaded.update(step.needs)
    return plan


########################################################################################
### Run record
########################################################################################


@dataclass
class _Outcome:
    """How the steps of an order went: a clock reading before and after each plain one, then more.

    The plain loop only reads the clock; what is known of each step is made when someone asks.
    """

    order: _Order
    ends: list[float] = field(default_factory=list)
    others: dict[str, _StepState] = field(default_factory=dict)
    seconds: float = 0.0

    def steps(self) -> dict[str, _StepState]:
        spans = zip(self.order.steps, self.ends, self.ends[1:], strict=False)
        plain = {s.name: _StepState(s.name, "ran", end - start) for s, start, end in spans}
        return {**plain, **self.others}


class Run(_Shown, Mapping[str, Any]):
    """The values of a run's targets, by name, and how the run went.

    ``Pipeline.run`` makes it. A target that failed or was skipped is no key of it.

    Attributes
    ----------
    inputs : dict
        Name -> value of everything that was given, and the defaults that were used; without what
        the catalog loads.

    Examples
    --------
    >>> run = Pipeline({"more": lambda x: x + 1}).run(x=1)
    >>> run["more"], run.steps["more"].status, run.inputs
    (2, 'ran', {'x': 1})
    """

    def __init__(
        self,
        scene: _Scene,
        inputs: Mapping[str, Any],
        outcome: _Outcome,
        started: float,
        noted: dict[str, dict[str, Any]],
        again: Callable[[str, str], Any],
    ) -> None:
        self.inputs = {n: v for n, v in inputs.items() if not isinstance(v, _InCatalog)}
        self._shows, self._outcome, self._again = scene, outcome, again
        self._started, self._noted = started, noted  # inputs as they were, if it is recorded
        self._values: dict[str, Any] = {}
        self._error = ""  # what ended the run
        self._cell: int | None = None  # of a notebook, that shows this run already

    def __getitem__(self, name: str) -> Any:
        if name in self._values:
            value = self._values[name]
            if isinstance(value, _Lazy):  # loaded when it is first asked for
                try:
                    value = value.load()
                except _BadEntry as bad:
                    value = self._again(name, bad.key)
                self._values[name] = value
            return value
        step = self.steps.get(name)
        if step is None or step.status in ("ran", "cached"):
            why = f"'{name}' was no target of this run\n{_hint([name], self._values)}"
        else:
            why = f"step '{name}' {step.status if step.status != 'skipped' else 'was skipped'}"
            why += f": {step.reason or _error_line(step.error)}"
        raise NoValueError(why, step=name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        counts = self._scene().counts() or "no step"
        return f"<Run of '{self._shows.title}': {counts}, {self._outcome.seconds:.3g} s>"

    def _scene(self) -> _Scene:
        states = {
            s.name: self.steps[s.name] for s in self._outcome.order.steps if s.name in self.steps
        }
        return self._shows._replace(states=states, seconds=self._outcome.seconds)

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        if self._cell is not None and self._cell == _notebook_cell():
            return {"text/plain": repr(self)}  # else a cell that runs it would show it twice
        return super()._repr_mimebundle_(include, exclude)

    @functools.cached_property
    def steps(self) -> dict[str, _StepState]:
        """Step name -> how it went, in the order in which the steps ended."""
        return self._outcome.steps()

    @property
    def errors(self) -> dict[str, BaseException]:
        """Step name -> its exception, of the steps that failed."""
        found = {name: step.error for name, step in self.steps.items()}
        return {name: error for name, error in found.items() if isinstance(error, BaseException)}

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The run without its values, ready for ``json.dumps``; times in seconds."""
        error = self._error or "".join(map(_error_line, [*self.errors.values()][:1]))
        inputs = self._shows.inputs  # an input that is a target may be a secret
        values = {n: inputs.get(n, v) for n, v in self._values.items() if not isinstance(v, _Lazy)}
        heads = [v.head for v in self._values.values() if isinstance(v, _Stored)]
        kept = {name: metric for head in heads for name, metric in head.metrics.items()}
        return {
            "id": os.urandom(6).hex(),
            "pipeline": self._shows.title,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "seconds": self._outcome.seconds,
            "status": "failed" if error else "ran",
            "error": error,
            **_whereabouts(),
            **_git(_folder_of(self._shows.graph), int(self._started // 10)),
            "inputs": self._noted or {n: _noted(v) for n, v in inputs.items()},
            "targets": list(self._values),
            "metrics": _metrics(values) | {n: m for n, m in kept.items() if n in self._values},
            "steps": {
                name: {
                    "status": step.status,
                    "seconds": step.seconds,
                    "reason": step.reason,
                    "attempts": step.attempts,
                    "fingerprint": step.fingerprint,
                    "error": _error_line(step.error),
                }
                for name, step in self.steps.items()
            },
        }


@functools.cache
def _whereabouts() -> dict[str, str]:
    import getpass
    import platform

    facts = {"user": "", "host": platform.node(), "python": platform.python_version()}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container may know no name
        facts["user"] = getpass.getuser()
    return {**facts, "dagkit": __version__}


def _folder_of(graph: _Graph) -> str:
    """Find the folder of the file in which the first step is defined."""
    for step in graph.steps.values():
        code = getattr(_innermost(step.function), "__code__", None)
        return str(os.path.dirname(code.co_filename)) if code is not None else ""
    return ""


def _are_paths(value: Any) -> bool:
    """Tell a path, and a list of paths."""
    items = value if type(value) is list else [value]
    return bool(items) and all(isinstance(item, os.PathLike) for item in items)


_LONGEST_NOTE = 4096  # characters of an input in a record


def _noted(value: Any, fingerprint: str = "") -> dict[str, Any]:
    """Write an input so that it can be given again if it is short JSON, else what it is."""
    import json

    if isinstance(value, _InCatalog):
        return {"catalog": str(value), "fingerprint": fingerprint}
    with contextlib.suppress(Exception):  # whatever a class does when it is compared
        if isinstance(value, os.PathLike):
            return {"path": os.fsdecode(value), "fingerprint": fingerprint}
        if _are_paths(value):
            paths = [os.fsdecode(path) for path in value]
            if sum(map(len, paths)) < _LONGEST_NOTE:
                return {"paths": paths, "fingerprint": fingerprint}
        text = ""
        for piece in json.JSONEncoder().iterencode(value):  # no further than it is short
            text += piece
            if len(text) > _LONGEST_NOTE:
                break
        else:
            copied = json.loads(text)  # a step may change the value itself
            if type(copied) is type(value) and copied == value:
                return {"value": copied, "fingerprint": fingerprint}
    return {"text": _brief(value), "fingerprint": fingerprint}


@functools.lru_cache(8)
def _git(folder: str, tens: int) -> dict[str, Any]:
    """Return the commit of a folder and whether files differ from it; asked every ten seconds."""
    import subprocess

    # Without locks, or a commit of the user's at the same moment would find the index locked.
    folder = folder if os.path.isdir(folder) else "."  # the code of a notebook has no real one
    command = ["git", "--no-optional-locks", "-C", folder, "status"]
    command += ["--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # there is no git, or it hangs on a network
        return {"commit": "", "dirty": False}
    text = done.stdout.decode(errors="replace")  # names of branches and files are any bytes
    found = re.search(r"^# branch.oid ([0-9a-f]+)$", text, re.MULTILINE)
    dirty = any(line[:1] != "#" for line in text.splitlines())
    return {"commit": found[1] if found else "", "dirty": dirty}


class _Record(dict[str, Any]):
    """A recorded run as one flat row: facts, ``inputs.NAME`` and ``metrics.NAME``.

    Attributes
    ----------
    inputs : dict
        Name -> value of the inputs that can be given again: ``pipeline.run(**record.inputs)``.
    steps : dict
        Step name -> status, seconds, reason, attempts, fingerprint, error.
    """

    def __init__(self, line: dict[str, Any]) -> None:
        from pathlib import Path

        facts = ("id", "pipeline", "started", "seconds", "status", "error", "user", "host")
        super().__init__({name: line.get(name) for name in (*facts, "commit", "dirty")})
        self.inputs: dict[str, Any] = {}
        self.steps: dict[str, dict[str, Any]] = line.get("steps", {})
        for name, noted in line.get("inputs", {}).items():
            self[f"inputs.{name}"] = next(iter(noted.values()), None)
            if "path" in noted:
                self.inputs[name] = Path(noted["path"])
            elif "paths" in noted:
                self.inputs[name] = [Path(path) for path in noted["paths"]]
            elif "value" in noted:
                self.inputs[name] = noted["value"]
        for name, metric in line.get("metrics", {}).items():
            self[f"metrics.{name}"] = metric


class _History(list[_Record]):
    """Recorded runs, newest last; shows a table of the columns in which they differ."""

    def _rows(self) -> list[list[str]]:
        names = dict.fromkeys(name for record in self for name in record if name != "id")
        shown = [n for n in names if len({repr(record.get(n)) for record in self}) > 1]
        if any(record["status"] != "ran" for record in self):
            shown += [name for name in ("status", "error") if name not in shown]
        # What was put in, what came out, then when and how it went; of a single run all of it.
        ranks = ("inputs.", "metrics.", "started", "seconds", "status", "error", "")
        columns = [n for start in ranks for n in shown or names if n.startswith(start)]
        columns = [*dict.fromkeys(columns)]
        rows = [[_cell_text(name, record) for name in columns] for record in self]
        return [[name.partition(".")[2] or name for name in columns], *rows]

    def __repr__(self) -> str:
        text = "\n".join(_aligned(self._rows()))
        return text if _takes_glyphs(sys.stdout) else _in_ascii(text)

    def _repr_html_(self) -> str:
        return _html_table(self._rows())


def _cell_text(name: str, record: _Record) -> str:
    """Write a value for a table of runs; "" is one that is not there."""
    value = record.get(name, "")
    if name == "seconds":
        return _duration(value)
    if name == "started":
        return str(value).rstrip("Z").replace("T", " ")
    text = f"{value:.4g}" if type(value) is float else str(value)
    return _cut(_printable(text), 48, ends=True)


########################################################################################
### Events
########################################################################################


@dataclass(frozen=True, slots=True)
class Event:
    """A change of state in a run; progress, logs and recipes of your own listen to these.

    Attributes
    ----------
    kind : str
        ``run started``, ``run finished``, ``step submitted`` (to an executor), ``step started``
        (here), ``step finished``, ``step retried``, ``step poked``, or ``map progress``.
    time : float
        Seconds since the epoch.
    step : str
        Its name; "" for a run.
    status : str
        Of what has finished: ``ran``, ``cached``, ``failed``, ``skipped``.
    seconds, saved : float
        How long it took; how long reusing it saved.
    reason, error : str
        Why it ran, or was skipped; the first line of its exception.
    attempts : int
        Tries so far, or checks of a sensor.
    index, done, total : int or None
        Of a mapped step: the element, how many are over, how many there are. Of a run: steps.

    Examples
    --------
    >>> seen = []
    >>> _ = Pipeline({"more": lambda x: x + 1}, on_event=seen.append).run(x=1)
    >>> [event.kind for event in seen]
    ['run started', 'step started', 'step finished', 'run finished']
    """

    kind: str
    time: float
    step: str = ""
    status: str = ""
    seconds: float = 0.0
    saved: float = 0.0
    reason: str = ""
    error: str = ""
    attempts: int = 1
    fingerprint: str = ""
    index: int | None = None
    done: int | None = None
    total: int | None = None


_Listener = Callable[[Event], object]


def _tell(listeners: list[_Listener], event: Event) -> None:
    """Tell all listeners; one that raises gets a warning and is not told any more."""
    for listener in [*listeners]:
        try:
            listener(event)
        except Exception as error:
            listeners.remove(listener)
            _warn(f"{_brief(listener)} is told no more of this run: {_error_line(error)}")


def _log(event: Event) -> None:
    """Write an event to the logger ``dagkit``."""
    import logging

    facts = [event.step, event.status, event.reason, event.error]
    level = logging.ERROR if event.error and event.kind == "step finished" else logging.INFO
    logging.getLogger("dagkit").log(level, "%s", " ".join(filter(None, [event.kind, *facts])))


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _notebook_cell() -> int | None:
    """Return the number of the cell that runs, None where no notebook is; imports nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "execution_count", None) if hasattr(shell, "kernel") else None


class _Progress:
    """Writes a line for each step that is over and, on a terminal, one below for what runs."""

    def __init__(self, title: str, steps: Sequence[Step], stream: Any) -> None:
        self.title, self.stream = title, stream
        self.places = {step.name: step for step in steps}
        self.width = max(map(len, self.places), default=0)
        self.terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.terminal and not os.environ.get("NO_COLOR")
        self.ascii = not _takes_glyphs(stream)
        self.running: dict[str, tuple[float, str]] = {}  # since when, and how far a map is
        self.over: Counter[str] = Counter()
        self.saved, self.drawn = 0.0, 0.0
        self.failures: list[str] = []

    def __call__(self, event: Event) -> None:
        lines: list[str] = []
        if event.kind in ("step started", "step submitted"):
            self.running.setdefault(event.step, (event.time, ""))
        elif event.kind == "map progress":
            since = self.running.get(event.step, (event.time, ""))[0]
            self.running[event.step] = since, f" {event.done}/{event.total}"
        elif event.kind == "step finished":
            self.running.pop(event.step, None)
            self.over[event.status] += 1
            self.saved += event.saved
            lines.append(self.line(event))
            if event.status == "failed":
                self.failures.append(lines[0])
        elif event.kind == "run finished":
            # Once more, where they may have scrolled away.
            lines += self.failures if self.over.total() > 20 else []
            lines.append(self.summary(event))
        last = event.kind == "run finished"
        # Rewritten ten times a second at the most, and only on a terminal.
        bar = self.terminal and not last and (lines or event.time - self.drawn > 0.1)
        if lines or bar:
            self.drawn = event.time
            text = "\r\x1b[K" * self.terminal + "".join(f"{line}\n" for line in lines)
            self.stream.write(text + (self.bar(event.time) if bar else ""))
            self.stream.flush()

    def line(self, event: Event) -> str:
        look = _LOOKS[event.status]
        facts = [_told(event, short=event.status == "ran")]
        if event.status == "failed" and event.step in self.places:
            facts.append(f"({_place(self.places[event.step].function)})")
        head = f"{look.ascii if self.ascii else look.glyph} {event.step.ljust(self.width)}"
        said = self.cut(_printable("   ".join(filter(None, facts))), len(head) + 13)
        if self.colour:
            head = f"\x1b[{look.ansi}m{head}\x1b[0m"
        return f"{head}   {event.status:7}   {said}".rstrip()

    def bar(self, now: float) -> str:
        shown = [f"{name}{far} {_duration(now - at)}" for name, (at, far) in self.running.items()]
        rest = f", {len(shown) - 1} more" if len(shown) > 1 else ""
        glyph = ">" if self.ascii else "▶"
        return self.cut(
            f"{glyph} {shown[0] if shown else ''}{rest}   {self.over.total()}/{len(self.places)}"
        )

    def summary(self, event: Event) -> str:
        failed = event.status == "failed" or self.over["failed"]
        told = f"{self.title} {'failed' if failed else 'done'} in {_duration(event.seconds)}"
        saved = f" (saved {_duration(self.saved)})" if self.saved else ""
        counts = [f"{self.over[s]} {s}{saved * (s == 'cached')}" for s in _LOOKS if self.over[s]]
        return (" - " if self.ascii else " · ").join([told, *counts])

    def cut(self, text: str, used: int = 0) -> str:
        """Shorten what does not fit beside what is already on the line."""
        text = _in_ascii(text) if self.ascii else text
        if not self.terminal:
            return text
        import shutil

        room = max(8, shutil.get_terminal_size().columns - 1 - used)
        return text if len(text) <= room else text[: room - 1] + ("~" if self.ascii else "…")


_LOST_VALUES = ("failed", "skipped")


class _Live:
    """Shows a run in a notebook: one output, drawn anew at most four times a second."""

    def __init__(self, scene: _Scene, steps: Sequence[Step]) -> None:
        self.states = {step.name: _StepState(step.name, "waiting") for step in steps}
        self.scene = scene._replace(states=self.states)
        self.pause = 0.25 if len(steps) <= 100 else 1.0  # notebooks paint each one, 20 to 130 ms
        self.began = self.next = 0.0
        self.handle: Any = None
        self.cell: int | None = None  # in which it has drawn

    def __call__(self, event: Event) -> None:
        now, name = time.monotonic(), event.step
        last = event.kind == "run finished"
        if event.kind == "run started":
            self.began, self.next = now, now + 0.4  # what is over before that need not flash
        elif event.kind == "step finished":
            facts = {
                fact: getattr(event, fact) for fact in _StepState._fields if hasattr(event, fact)
            }
            self.states[name] = _StepState(name, **facts, elements=event.total)
        elif event.kind in ("step started", "step submitted", "map progress"):
            far = f"{event.done}/{event.total}" if event.total is not None else ""
            self.states[name] = _StepState(name, "running", reason=far, elements=event.total)
        if last:
            self.end()
        if (event.status == "failed" or self.handle is not None) if last else now >= self.next:
            self.draw(now, event.seconds if last else now - self.began)

    def end(self) -> None:
        """Settle what an exception or an interrupt has left open."""
        graph = self.scene.graph
        for name, state in self.states.items():
            step = graph.steps[name]
            makers = [_maker(graph, need) for need in step.needs if need not in step._defaults]
            lost = [m for m in makers if m in self.states and self.states[m].status in _LOST_VALUES]
            if state.status == "running":
                self.states[name] = state._replace(status="failed", error="interrupted")
            elif state.status == "waiting" and lost:
                self.states[name] = state._replace(status="skipped", reason=f"needs {lost[0]}")

    def draw(self, now: float, seconds: float) -> None:
        from IPython.display import display

        picture = _Picture(self.scene._replace(seconds=seconds))
        if self.handle is None:
            self.handle, self.cell = display(picture, display_id=True), _notebook_cell()
        else:
            self.handle.update(picture)
        # Showing may take two per cent of the time.
        self.next = time.monotonic() + max(self.pause, 50 * (time.monotonic() - now))


########################################################################################
### Execution
########################################################################################

_clock = time.perf_counter

# Types of a result that only one step could use, once; and of one that is not a value yet. The
# plain loop stops at all of them.
_ITERATORS: tuple[Any, ...] = (iter(()), iter([]), iter(""), iter(range(0)), iter(dict[Any, Any]()))
_ONE_SHOT: frozenset[Any] = frozenset(
    [types.GeneratorType, types.AsyncGeneratorType, zip, map, filter, enumerate, reversed]
) | frozenset(map(type, _ITERATORS))
_NO_VALUES = _ONE_SHOT | {CoroutineType}


def _wait(done: queue.SimpleQueue[Any], seconds: float | None) -> Any:
    """Return what comes next, or None after so many seconds (None: as long as it takes)."""
    try:
        return done.get(timeout=seconds)
    except queue.Empty:
        return None


def _named_values(step: Step, value: Any) -> dict[str, Any]:
    """Map the names of the values that a step makes to what it returned."""
    if type(value) in _ONE_SHOT:
        what = f"returned a {type(value).__name__}, which only one step could use, once"
        raise step._error(what, "return a list instead", ResultError)
    if not step.outputs:
        return {step.name: value}
    names = step.outputs
    if isinstance(value, Mapping):
        if value.keys() == set(names):
            parts = {name: value[name] for name in names}
            return {step.name: tuple(parts.values()), **parts}
        found = f"a dict with the keys {_listed(map(str, value))}"
    elif isinstance(value, tuple | list):
        if len(value) == len(names):
            return {step.name: tuple(value), **dict(zip(names, value, strict=True))}
        found = f"{len(value)} values"
    else:
        found = _brief(value)
    raise step._error(
        f"has {len(names)} outputs ({', '.join(names)}) but returned {found}",
        f"return a tuple of {len(names)}, or a dict with these keys",
        ResultError,
    )


class _Made(NamedTuple):
    """What a call has made: values by name, and the seconds it took."""

    values: dict[str, Any]
    seconds: float
    tried: bool = False  # to keep it, where it was made


class _Job(NamedTuple):
    """One call of a step's function, as it is sent to where it runs."""

    step: Step
    strict: bool = False
    home: int = 0  # the process that sends it
    sent: bool = False  # to an executor
    # Where and under which head to keep the result; files that it was given, as they were before.
    store: Store | None = None
    head: _Head | None = None
    files: Sequence[tuple[str, str]] = ()
    catalog: Mapping[str, _Place] = {}  # where values of the step are to be kept for the user
    doubt: bool = False  # an entry of this key has proved bad: look whether this one can be loaded
    token: str = ""  # makes calls different for those who think that equal calls give equal results


_NO_JOB = _Job(Step(len))  # of a task that has not begun


# Whether this thread is inside a step. A pipeline that a step runs never waits for a lock, since
# who holds it may be waiting for this step.
_inside: ContextVar[bool] = ContextVar("dagkit_inside", default=False)


def _work(job: _Job, *args: Any) -> Any:
    """Call a step's function with values by position, then by keyword: the place that does so.

    Returns what it made, or a coroutine that the event loop is to run.
    """
    step = job.step
    values = [value.load() if isinstance(value, _Lazy) else value for value in args]
    before = _marks(values) if job.strict else []
    by_place, keywords = values, {}
    if step._keywords:
        by_place, by_name = values[: len(step._takes)], values[len(step._takes) :]
        keywords = dict(zip([name for name, _ in step._keywords], by_name, strict=True))
    began, token = _clock(), _inside.set(True)
    try:
        result = step.function(*by_place, **keywords)
        if type(result) is CoroutineType:
            if not job.sent:
                return _checked(step, result, before, values) if before else result
            import asyncio

            result = asyncio.run(result)
        seconds = _clock() - began
        if before:
            _check_unchanged(step, before, values)
        made = _Made(_named_values(step, result), seconds)
        if job.head is None and not job.catalog:
            return made
        return _kept(job, made)._replace(tried=True)
    except Exception as error:
        if job.home == os.getpid():
            raise
        raise _sendable(error) from None
    finally:
        _inside.reset(token)


async def _checked(step: Step, coroutine: Any, before: list[str], values: list[Any]) -> Any:
    """Look at the arguments of a strict pipeline again when the coroutine is over."""
    result = await coroutine
    _check_unchanged(step, before, values)
    return result


def _check_unchanged(step: Step, before: list[str], values: list[Any]) -> None:
    names = (*step._takes, *[name for _, name in step._keywords])
    for name, old, new in zip(names, before, _marks(values), strict=True):
        if old != new:
            what = f"changed its argument '{name}' in place"
            raise step._error(what, "change a copy and return that", MutationError, name=name)


def _into_catalog(job: _Job, made: _Made) -> tuple[_Made, dict[str, str], dict[str, Any], bool]:
    """Keep what a step made where the catalog says; its values become loads from there.

    Returns what was made; name -> mark of what an entry has to be compared with; what it keeps of
    each value; and whether all that has a fingerprint.
    """
    values, is_known = dict(made.values), True
    marks, notes = dict[str, str](), dict[str, Any]()
    for name, place in job.catalog.items():
        named: dict[str, str] = {}
        if place.suffix == ".pkl":  # whose bytes only name the classes of the project
            try:
                _pickled(values[name], named)
            except _Opaque:  # nobody could tell when it is another one
                is_known = False
        try:
            mark = place.save(values[name])
        except Exception as error:
            error.add_note(f"while '{name}' was kept in the catalog: {place}")
            raise
        is_known = is_known and mark != ""  # else what it loads has no fingerprint
        marks |= {**named, f"catalog {name}": mark}
        values[name] = _InCatalog(place, mark)
        notes[name] = (place.suffix, place.reader, mark, named)
    if job.catalog and job.step.outputs:
        values[job.step.name] = _Whole([values[name] for name in job.step.outputs])
    return made._replace(values=values), marks, notes, is_known


def _kept(job: _Job, made: _Made) -> _Made:
    """Keep what a step made where the catalog says, and in the store; values become loads."""
    if job.step.poke is not None and not made.values[job.step.name]:
        return made  # a sensor that has seen nothing has no value yet
    made, marks, notes, is_known = _into_catalog(job, made)
    if job.store is None or job.head is None or not is_known:
        return made
    try:
        if any(_named_mark(name) != mark for name, mark in job.files):
            return made  # a file changed while the step read it: who knows which of the two it saw
    except _Opaque:
        return made
    # Of a value in the catalog the entry holds what was written there, and who reads it.
    value: Any = [
        notes[name] if name in notes else made.values[name]
        for name in job.step.outputs or (job.step.name,)
    ]
    head = job.head._replace(seconds=made.seconds, named=marks)
    found = job.store._save(head, value if job.step.outputs else value[0])
    if found is None:
        return made
    kept = _stored(job.store, found, job.catalog)
    if job.doubt:
        job.store._said.add(found.path)  # that was said when it proved bad
        try:
            kept[job.step.name].load()
        except _BadEntry:  # it can be pickled, but not loaded again
            with contextlib.suppress(OSError):
                os.unlink(found.path)
            return made
        job.store._said.discard(found.path)
    return _Made(kept, made.seconds)


def _with_entry(state: _StepState, head: _Head | None) -> _StepState:
    if head is None:
        return state
    return state._replace(fingerprint=head.fingerprint, size=head.size)


def _stored(store: Store, head: _Head, catalog: Mapping[str, _Place]) -> dict[str, Any]:
    """Map the names of the values that an entry is about to what loads them."""
    values: dict[str, Any] = {head.step: _Stored(store, head)}
    values |= {name: _Stored(store, head, name) for name in head.outputs}
    placed = [name for name in values if name in catalog]
    for name in placed:
        place = catalog[name]
        values[name] = _InCatalog(place, head.named[f"catalog {name}"], values[name].fingerprint)
    if placed and head.outputs:
        values[head.step] = _Whole([values[name] for name in head.outputs], head.fingerprint)
    return values


def _sendable(error: Exception) -> Exception:
    """Return an exception that survives the way home: the error itself, or a twin of its text."""
    import pickle
    import traceback

    with contextlib.suppress(Exception):  # whatever its class does when it is pickled, or built
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    text = "".join(traceback.format_exception(error)).rstrip()
    return WorkerError(f"{_error_line(error)}\n{text}")


def _private_copy(value: Any) -> Any:
    """Copy a value that others need too, so that what a cached step does to it stays unseen.

    Else a first run, in which the step runs, would differ from a second one, in which it does not.
    """
    import copy
    import pickle

    if isinstance(value, _Lazy):  # each load is a copy
        return value
    # By pickle first: a deep copy of a frame shares the objects in its cells.
    with contextlib.suppress(Exception):
        return pickle.loads(pickle.dumps(value, 5))
    with contextlib.suppress(Exception):
        return copy.deepcopy(value)
    return value  # what cannot be copied is shared, as it is between steps that are not cached


class _EventLoopThread:
    """Runs coroutines in a thread of its own, so that it works where a loop already runs."""

    _thread: threading.Thread | None = None

    def submit(self, coroutine: CoroutineType[Any, Any, Any]) -> Future[Any]:
        import asyncio

        if self._thread is None:
            # With a factory of its own a Runner leaves the event loop of this thread alone.
            runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
            self._loop = loop = runner.get_loop()

            def serve() -> None:
                with runner:  # which at the end cancels what still runs, as after Ctrl-C
                    loop.run_forever()

            self._thread = threading.Thread(target=serve, daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()


class _Again(Exception):
    """A payload has proved bad after its fingerprint was used: the run begins again without it."""


class _Pool:
    """An executor, or None for the calling thread, and what the loop has to know of it."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        kind = type(executor)
        # The client of a Dask cluster, whose futures can be arguments: values stay on the workers.
        self.client = executor if hasattr(executor, "scatter") else None
        # Threads and processes of this machine read and write the store themselves.
        self.here = kind.__module__.partition(".")[0] in ("concurrent", "loky", "joblib")
        self.threads = kind.__name__ == "ThreadPoolExecutor"
        workers = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
        if self.client:
            workers = sum(self.client.nthreads().values()) or workers
        # Enough in flight to keep all workers busy, few enough for a map over a million elements.
        self.limit = 4 * int(workers) + 4 if executor is not None else math.inf

    def submit(self, job: _Job, args: Sequence[Any]) -> Any:
        # An object of the user's loads and saves in this process, not in a worker's copy of it.
        places = [*job.catalog.values(), *[getattr(value, "place", None) for value in args]]
        if self.threads or (self.here and not any(isinstance(x, _DataSet) for x in places)):
            return self.executor.submit(_work, job, *args)
        job = job._replace(store=None, head=None, catalog={}, token=os.urandom(8).hex())
        options = {"pure": False} if self.client else {}
        return self.executor.submit(_work, job, *map(self.portable, args), **options)

    def portable(self, value: Any) -> Any:
        """Give what another machine can use for a value: a future of its own cluster, a copy."""
        if isinstance(value, _Remote):
            return value.future
        if isinstance(value, _Mapped) and not isinstance(value, _Whole):
            return [self.portable(item) for item in value.items]
        return value.load() if isinstance(value, _Lazy) else value


class _Remote(_Lazy):
    """A value that stays on the workers of a Dask cluster."""

    where = "on the cluster"

    def __init__(self, client: Any, made: Any, name: str) -> None:
        self.client = client
        self.future = client.submit(_made_value, made, name, pure=False)

    def load(self) -> Any:
        return self.future.result()

    @property
    def fingerprint(self) -> str:
        return str(self.client.submit(_fingerprint, self.future, pure=False).result())


def _is_remote(value: Any) -> bool:
    return isinstance(value, _Remote) or (
        isinstance(value, _Mapped) and any(isinstance(item, _Remote) for item in value.items)
    )


def _made_value(made: _Made, name: str) -> Any:
    return made.values[name]


@dataclass(slots=True, eq=False)
class _Task:
    """A call that the loop has to make: of a step, or for one element of a mapped one."""

    step: Step
    fan: _Fan | None = None
    index: int = 0
    job: _Job = _NO_JOB
    attempts: int = 0
    checks: int = 0  # of a sensor
    first: float = 0.0  # when a sensor was checked first
    began: float = 0.0
    reason: str = ""


class _Fan:
    """A mapped step that is running: its elements, and what it has made of each."""

    def __init__(self, step: Step, elements: Mapping[str, Sequence[Any]]) -> None:
        self.step, self.elements = step, elements
        self.size = self.left = len(next(iter(elements.values())))
        self.rest = iter(range(self.size))  # what is there and was not yet taken up
        self.made: dict[str, list[Any]] = {name: [_MISSING] * self.size for name in step.values}
        self.runs: list[_StepState] = []

    def row(self, index: int) -> dict[str, Any]:
        return {name: items[index] for name, items in self.elements.items()}

    def sum(self) -> _StepState:
        """Sum up how the elements went."""
        ran = [run for run in self.runs if run.status == "ran"]
        some = f"{len(ran)} of {self.size} elements, " * (len(ran) < self.size)
        return _StepState(
            self.step.name,
            "cached" if self.step.cache and not ran else "ran",
            sum(run.seconds for run in ran),
            f"{some}{ran[0].reason}" if ran and ran[0].reason else "",
            max((run.attempts for run in ran), default=1),
            saved=sum(run.saved for run in self.runs),
            fingerprint=_joined(run.fingerprint for run in self.runs) if self.step.cache else "",
            elements=self.size,
        )


# Name -> the fingerprint of a value, and the files that it names as they were.
_Prints = dict[str, tuple[str, Collection[tuple[str, str]]]]


class _Policy(NamedTuple):
    """How a pipeline runs its steps."""

    reuse: _Reuse
    keep_going: bool
    strict: bool
    executor: Any
    listeners: list[_Listener]
    prints: _Prints  # of the inputs, if they are known already


class _Loop:
    """The ready/done loop: runs steps that may wait, overlap, be tried again, be reused or fail.

    Each step goes waiting -> ready -> running -> done. ``ready`` is a heap of tasks by urgency;
    ``later`` a heap by time of what is to be tried again; ``done`` the queue into which the tasks
    in ``flight`` come. The thread that called ``run()`` does all the rest.

    A mapped step over what a running one makes opens at once, and follows it element by element.
    """

    def __init__(
        self, outcome: _Outcome, values: dict[str, Any], start: int, policy: _Policy
    ) -> None:
        order, self.steps = outcome.order, outcome.others
        self.values, self.policy, self.reuse = values, policy, policy.reuse
        self.pool = _Pool(policy.executor)
        self.todo = order.steps[start:]
        self.failure: BaseException | None = None
        self.flight: dict[_Task, Any] = {}  # to their futures
        self.count = itertools.count()
        self.over: deque[Step] = deque()  # steps for which the waiting is over
        self.ready: list[tuple[bool, float, int, _Task]] = []
        self.later: list[tuple[float, int, _Task]] = []
        self.done: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self.background = _EventLoopThread()
        self.locks: dict[_Task, tuple[str, int]] = {}  # key and handle
        self.fans: dict[str, _Fan] = {}  # by the values that running mapped steps make
        # Of values in memory, until a step may have changed them: with the files that they name.
        self.prints = {} if start else dict(policy.prints)
        self.naming = {name for name, (_, files) in self.prints.items() if files}
        made = ((value, step) for step in self.todo for value in step.values)
        self.makers = {value: step for value, step in made if value not in order.given}
        # How many steps, and targets, still need each value; inputs stay with the run.
        self.uses = Counter([*order.targets, *values])
        self.waiting: dict[str, set[str]] = {}
        self.dependents: dict[str, list[Step]] = {}
        uses, makers = self.uses, self.makers
        for step in self.todo:
            for name in step._needs:
                uses[name] += 1
            self.waiting[step.name] = {makers[name].name for name in step._needs if name in makers}
            for maker in self.waiting[step.name]:
                self.dependents.setdefault(maker, []).append(step)
        self.urgency = self.measure()

    def measure(self) -> dict[str, float]:
        """Rank the steps, the lowest first: by their order, or by the longest way that remains."""
        if self.pool.executor is None:
            return {step.name: place for place, step in enumerate(self.todo)}
        newest = self.reuse.store._newest
        known = {s.name: x.seconds for s in self.todo if s.cache and (x := newest(s.name))}
        usual = sum(known.values()) / len(known) if known else 1.0
        way: dict[str, float] = {}
        for step in reversed(self.todo):
            after = [way[dependent.name] for dependent in self.dependents.get(step.name, ())]
            way[step.name] = min(after, default=0.0) - known.get(step.name, usual)
        return way

    def emit(self, kind: str, step: str, task: _Task | None = None, **facts: Any) -> None:
        if self.policy.listeners:
            fan = task.fan if task else self.fans.get(step)
            if fan is not None:
                facts |= {"done": fan.size - fan.left, "total": fan.size}
                facts["index"] = task.index if task else None
            _tell(self.policy.listeners, Event(kind, time.time(), step, **facts))

    def run(self, first: tuple[float, Any, Exception | None] | None = None) -> None:
        """Run all; ``first`` is what the plain loop already got from the first step, if it did."""
        rest = self.todo[first is not None :]
        self.over.extend([step for step in rest if not self.waiting[step.name]])
        try:
            if first is not None:
                task = _Task(self.todo[0])
                task.attempts, (task.began, value, error) = 1, first
                if error is None:
                    self.receive(task, lambda: value)
                else:
                    self.stumble(task, error)
                # Or the error's traceback would hold this frame, and that the error.
                del first, error
            while self.flight or (self.failure is None and (self.over or self.ready or self.later)):
                self.turn()
        finally:
            for future in self.flight.values():
                future.cancel()
            for task in [*self.locks]:
                self.unlock(task)
            self.background.close()
        failure, self.failure = self.failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # or its traceback would hold this frame, and that the values

    def turn(self) -> None:
        """Start the most urgent task, or else wait for whatever comes next."""
        seconds: float | None = None
        if self.failure is None:
            while self.over:
                self.open(self.over.popleft())
            while self.later and self.later[0][0] <= _clock():
                self.push(heapq.heappop(self.later)[2])
            if self.ready and len(self.flight) < self.pool.limit:
                task = heapq.heappop(self.ready)[-1]
                if task.fan is not None:
                    self.feed(task.fan)
                self.begin(task)
                if not self.flight or self.done.empty():
                    return
            elif self.later:
                seconds = max(0.0, self.later[0][0] - _clock())
            elif not self.flight:
                return
        listeners = self.policy.listeners
        watchers: list[_Listener] = [x for x in listeners if isinstance(x, _Progress | _Live)]
        task = _wait(self.done, min(seconds or 0.25, 0.25) if watchers else seconds)
        if task is None:
            if watchers:
                _tell(watchers, Event("tick", time.time()))  # what runs has run longer
            return
        if task.job.head is None:
            self.prints.clear()  # it may have changed what it was given, up to now
        if self.failure is not None and self.flight[task].cancelled():
            del self.flight[task]
            self.unlock(task)
        else:
            self.receive(task, self.land, task)

    def job(self, step: Step) -> _Job:
        sent = self.pool.executor is not None and not step.local and not step._is_async
        places = self.reuse.catalog
        places = {n: places[n] for n in step.values if n in places} if places else places
        return _Job(step, self.policy.strict, os.getpid(), sent, catalog=places)

    def push(self, task: _Task) -> None:
        # Coroutines first: they hold nobody up, and overlap with all that follows.
        rank = self.urgency[task.step.name]
        heapq.heappush(self.ready, (not task.step._is_async, rank, next(self.count), task))

    def push_later(self, task: _Task, seconds: float) -> None:
        heapq.heappush(self.later, (_clock() + seconds, next(self.count), task))

    def feed(self, fan: _Fan) -> None:
        """Make the next element of a map ready: one by one, since there may be a million."""
        if (index := next(fan.rest, None)) is not None:
            self.push(_Task(fan.step, fan, index))

    def follow(self, fan: _Fan, index: int) -> None:
        """Make an element ready if all that is mapped over is there."""
        if all(items[index] is not _MISSING for items in fan.elements.values()):
            self.push(_Task(fan.step, fan, index))

    def settle(self, maker: str, step: Step) -> None:
        """Strike a step from what another one waits for; the last one opens that."""
        waiting = self.waiting[step.name]
        if maker in waiting:
            waiting.discard(maker)
            if not waiting:
                self.over.append(step)

    def open(self, step: Step) -> None:
        """Skip a step, or make its first call ready, now that all it waits for is over."""
        running = {n: self.fans[n] for n in step._over if n in self.fans} if step._over else {}
        for name in step._needs:
            if name not in self.values and name not in step._defaults and name not in running:
                why = f"needs {self.makers[name].name}"
                self.finish(_StepState(step.name, "skipped", reason=why))
                return
        if not step._over:
            self.push(_Task(step))
            return
        try:
            fan = _Fan(step, self.elements(step, running))
        except _BadEntry as bad:
            self.distrust(bad)
        except Exception as error:
            self.fail(_Task(step), error)
            return
        self.fans |= {name: fan for name in step.values if name in self.makers}
        for dependent in self.dependents.get(step.name, ()):
            # Does it take all that it needs of this one element by element?
            if all(n in dependent._over for n in dependent._needs if self.makers.get(n) is step):
                self.settle(step.name, dependent)
        if fan.size == 0:
            self.collect(fan)
        elif not running:
            self.feed(fan)
        else:
            for index in fan.rest:
                self.follow(fan, index)

    def elements(self, step: Step, running: Mapping[str, _Fan]) -> dict[str, Sequence[Any]]:
        """Return the lists that a mapped step goes through side by side; of equal length."""
        lists: dict[str, Sequence[Any]] = {}
        for name in step._over:
            value = self.values[name] if name in self.values else step._defaults.get(name)
            if name in running:
                value = running[name].made[name]  # which fills as that goes on
            elif isinstance(value, _Mapped):
                value = value.items
            else:
                value = value.load() if isinstance(value, _Lazy) else value
                if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
                    found = _brief(_hidden({name: value}, self.reuse.secret)[name])
                    what = f"maps over '{name}', which is {found}"
                    expected = "expected a list, or another iterable of elements"
                    raise step._error(what, expected, ResultError)
                value = list(value)
            lists[name] = value
        if len({len(items) for items in lists.values()}) > 1:
            found = ", ".join(f"{name} {len(items)}" for name, items in lists.items())
            what = f"maps over lists of different lengths: {found}"
            raise step._error(what, "expected equal lengths", ResultError)
        return lists

    def begin(self, task: _Task) -> None:
        """Reuse or call a step, or one element of it."""
        step, values, fan = task.step, self.values, task.fan
        if step.name in self.steps:  # another element has ended it
            return
        # An argument whose step was skipped or failed takes its default.
        args = {n: values[n] if n in values else step._defaults.get(n) for n in step._needs}
        if fan is not None:
            args |= fan.row(task.index)
        if step.cache and self.reused(task, args):  # at each try: a value may have changed since
            return
        task.attempts += 1
        job = task.job = self.job(step) if task.job is _NO_JOB else task.job
        if self.policy.listeners and task.attempts == 1 and not task.checks:
            kind = "step submitted" if job.sent else "step started"
            self.emit(kind, step.name, task, reason=task.reason)
        if self.reuse.made and (not job.sent or self.pool.threads):
            if job.head is None:
                self.prints.clear()  # it may change what it is given
            else:
                # Another step, another element or another try may need it as it was.
                again = step.retries or fan is not None
                shared = {name for name in args if again or self.uses[name] > 1}
                args |= {n: _private_copy(args[n]) for n in shared if type(args[n]) not in _SCALARS}
        listed = [args[name] for name in step._takes]
        if step._keywords:
            listed += [args[name] for _, name in step._keywords]
        task.began = _clock()
        if job.sent:
            self.receive(task, self.send, task, listed)
        else:
            self.receive(task, _work, job, *listed)

    def send(self, task: _Task, args: Sequence[Any]) -> None:
        self.fly(task, self.pool.submit(task.job, args))

    def fly(self, task: _Task, future: Any) -> None:
        put, self.flight[task] = self.done.put, future
        future.add_done_callback(lambda _: put(task))

    def land(self, task: _Task) -> Any:
        """Return what a call in flight has made, or raise what it has raised."""
        job, future, client = task.job, self.flight.pop(task), self.pool.client
        try:
            stays = client is not None and job.sent and not job.step.poke
            stays = stays and job.head is None and not job.catalog  # else it is kept from here
            if not stays or future.exception() is not None:
                return future.result()
            used = [name for name in job.step.values if self.uses[name]]
            remote = {name: _Remote(client, future, name) for name in used}
            return _Made(remote, _clock() - task.began)
        finally:
            del future  # or the traceback of what it has raised would hold it, and that the error

    def distrust(self, bad: _BadEntry) -> NoReturn:
        """Begin the run again without an entry whose payload has proved bad."""
        self.reuse.distrusted.add(bad.key)
        raise _Again from None

    def fingerprint(self, name: str, value: Any) -> tuple[str, Collection[tuple[str, str]]]:
        """Give the fingerprint of a value, and what it names as it was; or raise ``_Opaque``."""
        # Not of an element, or the default in place of a value.
        is_value = self.values.get(name) is value and not isinstance(value, _Lazy)
        if is_value and name in self.prints:
            return self.prints[name]
        files: list[tuple[str, str]] = []
        found = _print_of(value, files), files
        if is_value:
            self.prints[name] = found
            self.naming |= {name} if files else set()
        return found

    def reused(self, task: _Task, args: Mapping[str, Any]) -> bool:
        """Look a cached step up; True if that settles it for now: a hit, or another runs it."""
        reuse, step = self.reuse, task.step
        task.job = _NO_JOB  # not that of the try before, whose key may be another
        try:
            marks = {name: self.fingerprint(name, value) for name, value in args.items()}
            prints = {name: mark for name, (mark, _) in marks.items()}
            key = reuse.key(step, prints)
        except _Opaque as culprit:
            task.reason = culprit.reason
            return False
        found = reuse.find(step, key)
        if isinstance(found, str) and not _inside.get():
            lock = reuse.store._lock(key)
            if lock is None:  # somebody else is computing it
                self.prints.clear()  # a file may change meanwhile
                self.push_later(task, 0.02)
                return True
            self.locks[task] = key, lock
            found = reuse.find(step, key)
        if not isinstance(found, str):
            run = _StepState(step.name, "cached", saved=found.seconds)
            self.complete(task, _stored(reuse.store, found, reuse.catalog), _with_entry(run, found))
            return True
        head = reuse.wanted(step, key, prints, args)
        task.reason = found or reuse.why(step, head)
        # As pairs: of one file there may be two marks, if it has changed in between.
        files = [pair for _, named in marks.values() for pair in named if pair[0][:5] == "file "]
        doubt = key in reuse.distrusted
        task.job = self.job(step)._replace(store=reuse.store, head=head, files=files, doubt=doubt)
        return False

    def unlock(self, task: _Task) -> None:
        if task in self.locks:
            self.reuse.store._unlock(*self.locks.pop(task))

    def receive(self, task: _Task, call: Callable[..., Any], *args: Any) -> None:
        """Take what a call returns or raises; None: it is in flight now."""
        step = task.step
        try:
            result = call(*args)
            if result is None and task in self.flight:
                return
            if type(result) is CoroutineType:
                token = _inside.set(True)  # the task of the event loop begins with a copy of this
                self.fly(task, self.background.submit(result))
                _inside.reset(token)
                return
            if type(result) is not _Made:  # of the plain loop, or of the event loop
                result = _Made(_named_values(step, result), _clock() - task.began)
            if step.poke is not None and not result.values[step.name]:
                self.poke_again(task, *step.poke)
                return
            if not result.tried:
                result = _kept(task.job, result)
            value = result.values.get(step.name) if step.cache else None
            head = getattr(value, "head", None)
        except _BadEntry as bad:
            self.distrust(bad)
        except Exception as error:
            self.stumble(task, error)
            return
        run = _StepState(step.name, "ran", result.seconds, task.reason, task.attempts)
        self.complete(task, result.values, _with_entry(run, head))

    def stumble(self, task: _Task, error: Exception) -> None:
        """Skip a step, try it again or let it fail, as what it has raised says."""
        step = task.step
        self.unlock(task)
        if isinstance(error, Skip):
            why = f"element {task.index}: {error}" if task.fan else str(error)
            seconds = _clock() - task.began
            self.finish(_StepState(step.name, "skipped", seconds, why, task.attempts))
        elif task.attempts <= step.retries and not isinstance(error, ResultError | MutationError):
            self.emit("step retried", step.name, task, error=_error_line(error))
            self.push_later(task, step.retry_delay * step.retry_backoff ** (task.attempts - 1))
        else:
            self.fail(task, error)

    def poke_again(self, task: _Task, interval: float, timeout: float, soft_fail: bool) -> None:
        """Check a sensor later, or give it up: after a check that failed, as Airflow does."""
        step, task.attempts = task.step, task.attempts - 1
        self.unlock(task)
        task.first = task.first or task.began
        waited = _clock() - task.first
        task.checks += 1
        self.emit("step poked", step.name, task, attempts=task.checks)
        if waited < timeout:
            self.push_later(task, interval)
            return
        text = f"sensor '{step.name}' saw nothing within {timeout:g} s, in {task.checks} checks"
        if soft_fail:
            self.finish(_StepState(step.name, "skipped", waited, text, task.checks))
        else:
            where = f"{text}\n  {step.definition}\n  raise timeout=, or see why it waits in vain"
            self.fail(task, SensorTimeoutError(where, step=step.name))

    def complete(self, task: _Task, made: Mapping[str, Any], run: _StepState) -> None:
        """Take the values of a call that has ended well."""
        if task in self.locks:
            self.unlock(task)
        fan = task.fan
        if fan is None:
            self.keep(made)
            self.finish(run)
        elif run.name not in self.steps:  # else another element has ended it
            for name, items in fan.made.items():
                items[task.index] = made.get(name)
            fan.left -= 1
            fan.runs.append(run)
            self.emit("map progress", run.name, task, status=run.status)
            for step in self.dependents.get(run.name, ()):
                if step.name in self.fans:
                    self.follow(self.fans[step.name], task.index)
            if fan.left == 0:
                self.collect(fan)

    def collect(self, fan: _Fan) -> None:
        """Put the values of all elements into lists; the step is over."""
        for name, items in fan.made.items():
            lazy = any(isinstance(item, _Lazy) for item in items)
            self.keep({name: _Mapped(items) if lazy else items})
        self.finish(fan.sum())

    def keep(self, made: Mapping[str, Any]) -> None:
        for name, value in made.items():
            if self.uses[name] and name in self.makers:  # else it was given
                self.values[name] = value

    def fail(self, task: _Task, error: Exception) -> None:
        step = task.step
        if type(error).__name__ in _LOST:
            names = sorted({step.name, *[other.step.name for other in self.flight]})
            error = WorkerError(
                f"a worker process died while it ran {_listed(map(repr, names))}\n"
                f"  {step.definition}\n  {_error_line(error)}\n  a script that starts processes "
                "needs `if __name__ == '__main__':`; else see what kills it, such as memory",
                step=step.name,
            )
        elif task.job.sent and _is_about_sending(step, error):
            error = step._error(
                f"cannot be sent to another process: {_error_line(error)}",
                "define it at the level of a module, use loky or Dask, which send code too, or "
                "keep it here by local=True",
                WorkerError,
            )
        else:
            values = {n: self.values[n] for n in step.needs if n in self.values}
            if task.fan is not None:
                values |= task.fan.row(task.index)
            values = _hidden(values, self.reuse.secret)
            element = f", element {task.index}" if task.fan else ""
            shown = ", ".join(f"{name}={_brief(value)}" for name, value in values.items())
            place = f"in step '{step.name}'{element} at {_place(step.function)}"
            error.add_note(place + f", with {shown}" * bool(shown))
        if not self.policy.keep_going and self.failure is None:
            self.failure = error
            for future in self.flight.values():
                future.cancel()
        seconds = _clock() - task.began if task.began else 0.0
        self.finish(_StepState(step.name, "failed", seconds, "", task.attempts, error))

    def finish(self, run: _StepState) -> None:
        """Record a step that is over, free what it needed, and open what waited for it."""
        if run.name in self.steps:
            return  # another element has ended it
        self.steps[run.name] = run
        if self.policy.listeners:
            facts: dict[str, Any] = run._asdict() | {"error": _error_line(run.error)}
            for name in ("name", "elements", "size"):
                del facts[name]
            self.emit("step finished", run.name, **facts)
        if run.status != "cached":  # it may have written a file that a value names
            while self.naming:
                self.prints.pop(self.naming.pop(), None)
        over = self.makers[run.name]
        for name in over._needs:
            self.uses[name] -= 1
            if not self.uses[name]:
                self.values.pop(name, None)
                self.prints.pop(name, None)
        for name in over.values if over._over else ():
            self.fans.pop(name, None)
        for step in self.dependents.get(run.name, ()):
            if step.name in self.fans and run.status in ("failed", "skipped"):
                self.finish(_StepState(step.name, "skipped", reason=f"needs {run.name}"))
            else:
                self.settle(run.name, step)


# What the executors raise when a worker process has died.
_LOST = ("BrokenProcessPool", "TerminatedWorkerError", "BrokenThreadPool", "KilledWorker")


def _is_about_sending(step: Step, error: Exception) -> bool:
    """Tell whether an error came from pickling a function that cannot be pickled."""
    import pickle

    with contextlib.suppress(Exception):  # pickle says it with whatever type
        pickle.dumps(step.function)
        return False
    return "pickle" in str(error) or "local object" in str(error)


def _unchanged(policy: _Policy, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprints of inputs that still hold, for a run that has to begin again.

    Raises ``MutationError`` if it cannot, since a step has changed an input.
    """
    known = {name: found for name, found in policy.prints.items() if not found[1]}  # names no file
    for name, (mark, _) in known.items():
        if not isinstance(values[name], _Lazy) and _marks([values[name]]) != [mark]:
            for key in policy.reuse.distrusted:  # or the next run would end here as well
                with contextlib.suppress(OSError):
                    os.unlink(policy.reuse.store._entry(key))
            raise MutationError(
                f"a step changed the input '{name}' in place, and the run has to begin again, "
                "since an entry of the store cannot be loaded\n  that entry is gone now: run "
                f"again, with '{name}' as it was; strict=True finds such steps",
                name=name,
            ) from None
    return known


def _execute(outcome: _Outcome, values: dict[str, Any], policy: _Policy) -> None:
    """Run the steps of an order; leaves in ``values`` those of the targets, and what was given.

    Steps run in a plain loop, whose cost is next to nothing, until one does something that takes
    more: raises, skips, returns a coroutine. From there on the ready/done loop goes on, which runs
    all of an order if something in it needs more from the start.
    """
    order, ends = outcome.order, outcome.ends
    ended, get, given = ends.append, values.__getitem__, order.given
    ended(_clock())
    first: tuple[float, Any, Exception | None] | None = None
    plain = order.plain and not policy.strict and policy.executor is None and not policy.listeners
    plain = plain and not any(isinstance(value, _Lazy) for value in values.values())
    try:
        for name, function, takes, keywords, outputs, drops in order.calls if plain else ():
            if keywords:
                value = function(*map(get, takes), **{a: values[n] for a, n in keywords})
            else:
                # Unlike a list of arguments, map() holds no value longer than the call.
                value = function(*map(get, takes))
            if type(value) in _NO_VALUES:
                first = (ends[-1], value, None)
                break
            if outputs is None:
                values[name] = value
            else:
                made = _named_values(outputs, value)
                values.update({n: v for n, v in made.items() if n not in given})
                made.clear()
            value = None
            for drop in drops:
                del values[drop]
            ended(_clock())
    except Exception as error:
        first = (ends[-1], None, error)
    done = len(ends) - 1
    inputs = dict(values)
    while done < len(order.steps):
        outcome.others.clear()
        loop = _Loop(outcome, values, done, policy)
        try:
            loop.run(first)
            break
        except _Again:
            values.clear()
            values.update(inputs)
            policy = policy._replace(prints=_unchanged(policy, values))
        finally:
            first = None


########################################################################################
### Pipeline
########################################################################################


class Pipeline(_Shown):
    """Steps that fit together by the names of their arguments.

    Run it: :meth:`run`. Ask what would run, and why: :meth:`plan`. Look at it: :meth:`show`,
    :attr:`graph`, :attr:`steps`, :attr:`inputs`. Look back: :meth:`history`. Tend what is kept:
    :attr:`store`, :attr:`catalog`. Vary it: :meth:`replace`.

    Parameters
    ----------
    *sources
        Modules, names of modules (``Pipeline(__name__)``), mappings (``globals()``), functions,
        ``Step`` objects, other pipelines, and iterables of these. Of a module or mapping: all that
        ``@step`` has marked, or, if it has marked nothing, all (public) functions. Modules,
        mappings and pipelines are followed: a step that is defined anew is used by the next run.
    store : Store or path, optional
        Where results of cached steps are kept; default ``$DAGKIT_STORE`` or the folder ``.dagkit``.
    executor : executor or dask.distributed.Client, optional
        Where steps run: anything with the ``submit`` of ``concurrent.futures``; in the calling
        thread by default. On a Dask client, intermediate values stay on the cluster.
    catalog : dict of str to path or object, optional
        Name of an input -> where it is loaded from, when it is needed and not given; name of a step
        or output -> where it is kept after its step has run, and read back from by all who need it.
        A path goes by its suffix (.bytes .csv .feather .json .jsonl .npy .npz .parquet .pkl .txt,
        some with .gz), may be an address for fsspec, and may have names of inputs in braces. Any
        other object has ``load()`` and ``save(value)``. What is there counts by content.
    progress : bool or "auto"
        Whether a run is shown on stderr, a line a step; by default if that is a terminal.
    on_event : callable or iterable of callables, optional
        Called in the calling thread with each :class:`Event`.
    on_error : {"raise", "continue"}
        What a step's exception does: end the run, or only keep what needs that step from running.
    secret : iterable of str
        Names of inputs whose values are neither recorded nor shown, but in ``Run.inputs``.
    name : str
        What pictures and records call it; by default as its module, or ``pipeline``.
    strict : bool
        Whether a step that changes an argument in place fails; costs two fingerprints of each.

    Raises
    ------
    SourceError, StepError
        At once, for what can never be a source or a step.
    DuplicateNameError, DefaultsError, CycleError
        At the first use, since what is followed may still change.
    CatalogError, UnknownNameError
        At the first use, for a catalog that cannot be, and a name there or in ``secret`` that no
        step makes or takes.

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
        store: Store | str | os.PathLike[str] | None = None,
        executor: Any = None,
        catalog: Mapping[str, Any] | None = None,
        on_event: _Listener | Iterable[_Listener] = (),
        progress: bool | Literal["auto"] = "auto",
        on_error: Literal["raise", "continue"] = "raise",
        strict: bool = False,
        secret: Iterable[str] = (),
        name: str = "",
    ) -> None:
        if on_error not in ("raise", "continue"):
            raise ValueError(f"on_error={_brief(on_error)}: expected 'raise' or 'continue'")
        self._sources = tuple(map(_settled, sources))
        on_event = on_event if callable(on_event) else [*on_event]
        secret = frozenset([secret] if isinstance(secret, str) else secret)
        self._options = {  # for replace(), and as such no iterators
            "store": store,
            "executor": executor,
            "catalog": catalog,
            "on_event": on_event,
            "progress": progress,
            "on_error": on_error,
            "strict": strict,
            "secret": secret,
            "name": name,
        }
        self._on_error, self._strict = on_error, strict
        if executor is not None and not hasattr(executor, "submit"):
            raise TypeError(f"executor={_brief(executor)}: expected an object with submit()")
        if progress not in (True, False, "auto"):
            raise ValueError(f"progress={_brief(progress)}: expected True, False or 'auto'")
        self._executor, self._progress = executor, progress
        self._listeners = [on_event] if callable(on_event) else on_event
        self._catalog = dict(catalog or {})
        self._keeps = store is not None or "DAGKIT_STORE" in os.environ
        self._name = name
        # What is secret in a pipeline is so in one that is made of it.
        self.secret: frozenset[str] = secret.union(
            *[x.secret for x in self._sources if isinstance(x, Pipeline)]
        )
        self._secret = secret
        self._store = store if isinstance(store, Store) else Store(store)
        self._codes = _CodeMemo()
        self._seen: list[Any] = [None]  # what the graph was built from
        self._inside: list[Any] = []

    def __reduce__(self) -> Any:
        # What a pipeline does: its steps. So it counts where a step's code holds one.
        options: dict[str, Any] = {"on_error": self._on_error, "strict": self._strict}
        options |= {"catalog": self._catalog} if self._catalog else {}
        options |= {"secret": self.secret} if self.secret else {}  # a worker keeps it, too
        return functools.partial(Pipeline, **options), tuple(self._current().steps.values())

    def _current(self) -> _Graph:
        """Return the graph of the steps as they are now, built again if any has changed."""
        entries = _entries(self._sources)
        functions = [entry for entry in entries if type(entry) is FunctionType]
        # A function can also change in place, as by IPython's autoreload.
        inside = [f.__code__ for f in functions] + [f.__defaults__ for f in functions]
        if entries != self._seen or not all(map(operator.is_, inside, self._inside)):
            built = _build_graph(entries)
            built = _with_catalog(built, self._catalog) if self._catalog else built
            _check_known("secret=", self._secret, built)  # or one with a typo would be shown
            self._built, self._caches = built, any(step.cache for step in built.steps.values())
            self._seen, self._inside = entries, inside
        return self._built

    @property
    def graph(self) -> nx.DiGraph[str]:
        """The graph as it is now, frozen; an edge runs from what is needed to what needs it.

        Nodes are all names that have a value, with the attributes ``kind`` (``"input"``,
        ``"step"``, ``"output"``: a part of a step with ``outputs``) and ``step`` (a ``Step``,
        None for an input).

        Examples
        --------
        >>> list(Pipeline({"more": lambda x: x + 1}).graph.edges)
        [('x', 'more')]
        """
        import networkx as nx

        frozen: nx.DiGraph[str] = nx.freeze(_make_network(self._current()))
        return frozen

    @property
    def steps(self) -> Mapping[str, Step]:
        """Step name -> ``Step``, in the order in which they are declared.

        Examples
        --------
        >>> Pipeline({"more": lambda x: x + 1}).steps["more"].needs
        ('x',)
        """
        return MappingProxyType(dict(self._current().steps))

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Name -> default of each input; ``inspect.Parameter.empty`` where one must be given.

        Examples
        --------
        >>> inputs = Pipeline({"more": lambda x, by=1: x + by}).inputs
        >>> inputs["by"], inputs["x"] is inspect.Parameter.empty
        (1, True)
        """
        return MappingProxyType(dict(self._current().inputs))

    def run(self, /, *targets: str, **inputs: Any) -> Run:
        """Run the steps that the targets need, in topological order.

        A value that neither a target nor a later step needs is freed at once; name the targets to
        profit from it.

        Parameters
        ----------
        *targets : str
            Names of steps, outputs or inputs; none means all steps and outputs.
        **inputs
            A value for an input, or for any step or output, which then does not run, nor what
            served only it.

        Returns
        -------
        Run
            The targets' values by name.

        Raises
        ------
        UnknownNameError, MissingInputError
            Before any step runs.
        ResultError
            If a step returns a generator, or not as many values as it has outputs.
        Exception
            Whatever a step raises, with a note of the step, its place and its arguments, unless
            the pipeline was made with ``on_error="continue"``.

        Examples
        --------
        >>> pipeline = Pipeline({"twice": lambda x: 2 * x, "more": lambda twice: twice + 1})
        >>> pipeline.run("more", x=1)["more"], pipeline.run("more", twice=10)["more"]
        (3, 11)
        """
        return self._run(targets, inputs, set())

    def plan(self, /, *targets: str, **inputs: Any) -> Plan:
        """Tell what ``run`` would do with the same arguments, and why; runs nothing.

        Parameters
        ----------
        *targets, **inputs
            As for :meth:`run`.

        Returns
        -------
        Plan
            Step name -> status and reason; ``print`` shows it as a table.

        Raises
        ------
        UnknownNameError, MissingInputError
            As ``run`` does.

        Examples
        --------
        >>> plan = Pipeline({"twice": lambda x: 2 * x}).plan(x=1)
        >>> print(plan)
        pipeline · 1 step, 1 input · 1 new
          twice   x   ○ new   not cached
        """
        order, values, used, places = self._prepare(targets, inputs)
        reuse = _Reuse(self._store, self._codes, order, places, self.secret)
        states = _make_plan(reuse, values)
        return Plan(self._shows(order, used)._replace(states=states))

    def _prepare(
        self, targets: tuple[str, ...], inputs: dict[str, Any]
    ) -> tuple[_Order, dict[str, Any], dict[str, Any], dict[str, _Place]]:
        """Return the order of a run, the values it begins with, the inputs, and its catalog."""
        graph = self._current()
        for target in targets:
            if not isinstance(target, str):
                raise UnknownNameError(
                    f"{_brief(target)} cannot be a target of run(): targets are names\n"
                    "  expected such as run('model', 'accuracy', alpha=0.1)",
                    unknown=(_brief(target),),
                )
        key = (targets, frozenset(inputs))
        order = graph.orders.get(key)
        if order is None:
            order = _make_order(graph, *key)
            if len(graph.orders) >= 32:
                graph.orders.clear()
            graph.orders[key] = order
        for name, value in inputs.items():
            if isinstance(value, Iterator) and not hasattr(value, "read"):
                inputs[name] = [*value]  # else the first step to look at it would use it up
        used, places = {**order.defaults, **inputs}, dict[str, _Place]()
        if self._catalog:
            names = [value for step in order.steps for value in step.values if value not in inputs]
            taken = [name for name, value in used.items() if isinstance(value, _InCatalog)]
            known = {**graph.inputs, **inputs}
            places = _find_places(self._catalog, [*names, *taken], known)
            used |= {name: _InCatalog(places.pop(name)) for name in taken}
        values = dict(used)
        for name in inputs:
            step = graph.steps.get(name)
            if step is not None and step.outputs:
                values.update({**_named_values(step, inputs[name]), **inputs})
        return order, values, used, places

    def _run(self, targets: tuple[str, ...], inputs: dict[str, Any], distrusted: set[str]) -> Run:
        order, values, used, places = self._prepare(targets, inputs)
        _check_files(used)
        started, listeners = time.time(), [*self._listeners]
        logging = sys.modules.get("logging")
        if logging and logging.getLogger("dagkit").isEnabledFor(logging.INFO):
            listeners.append(_log)
        scene = self._shows(order, used)
        live = _Live(scene, order.steps) if self._progress and _notebook_cell() else None
        if live is not None:
            listeners.append(live)
        elif (self._progress is True and sys.stderr) or (self._progress and _on_terminal()):
            listeners.append(_Progress(scene.title, order.steps, sys.stderr))
        reuse = _Reuse(self._store, self._codes, order, places, self.secret)
        reuse.distrusted |= distrusted
        keep_going, is_recorded = self._on_error == "continue", self._is_recorded()
        prints = self._fingerprints(order, used) if is_recorded else {}
        policy = _Policy(reuse, keep_going, self._strict, self._executor, listeners, prints)
        if listeners:
            _tell(listeners, Event("run started", started, done=0, total=len(order.steps)))

        def again(name: str, key: str) -> Any:
            reuse.distrusted.add(key)
            _unchanged(policy, used)  # for its MutationError
            return self._run((name,), inputs, {*distrusted, key})[name]

        marks, shown = self._noted_prints(prints), scene.inputs if is_recorded else {}
        noted = {name: _noted(value, marks.get(name, "")) for name, value in shown.items()}
        outcome = _Outcome(order)
        run = Run(scene, used, outcome, started, noted, again)
        status, began = "failed", _clock()
        try:
            _execute(outcome, values, policy)
            # What lies in a store is loaded when it is asked for; a cluster may be gone by then.
            kept = {name: values[name] for name in order.targets if name in values}
            run._values = {n: v.load() if _is_remote(v) else v for n, v in kept.items()}
            status = "ran"
        except BaseException as error:
            run._error = _error_line(error)
            raise
        finally:
            outcome.seconds = _clock() - began
            if listeners:
                _tell(listeners, Event("run finished", time.time(), "", status, outcome.seconds))
            run._cell = live.cell if live is not None else None
            if is_recorded:
                self._store._append(run.record)
        return run

    def _fingerprints(self, order: _Order, inputs: Mapping[str, Any]) -> _Prints:
        """Take the fingerprints of inputs before a step can change them."""
        prints: _Prints = {}
        kept = {name for step in order.steps if step.cache for name in step.needs}
        for name, value in inputs.items():
            names: list[tuple[str, str]] = []
            place = value.place if isinstance(value, _InCatalog) else None
            # What counts by its value would have to be loaded; files that no cached step takes may
            # be huge, and no step changes them in memory.
            is_file = place is None or (place.is_local and place.suffix != ".pkl")
            if is_file and (name in kept or not (place or _are_paths(value))):
                with contextlib.suppress(_Opaque):
                    prints[name] = _print_of(value, names), names
        return prints

    def _noted_prints(self, prints: _Prints) -> dict[str, str]:
        """Prepare fingerprints for a record."""
        noted = {name: mark for name, (mark, _) in prints.items()}
        for name in self.secret & noted.keys():
            # With a key, or whoever reads the record could try all passwords.
            key = self._store._secret if self._store._ready(make=True) else os.urandom(32)
            noted[name] = hashlib.sha256(key + noted[name].encode()).hexdigest()
        return noted

    @property
    def catalog(self) -> Mapping[str, Any]:
        """Name of an input, step or output -> where it is loaded from or kept.

        Examples
        --------
        >>> Pipeline({"more": lambda x: x + 1}, catalog={"x": "x.json"}).catalog["x"]
        'x.json'
        """
        return MappingProxyType(self._catalog)

    def replace(self, /, *sources: Any, **options: Any) -> Pipeline:
        """Return a pipeline with the same options, but for sources and options given here.

        Parameters
        ----------
        *sources
            As of the class; none: those of this one.
        **options
            As of the class.

        Examples
        --------
        >>> one = Pipeline({"more": lambda x: x + 1}, store="/nowhere")
        >>> one.replace({"less": lambda x: x - 1}).store
        Store('/nowhere')
        """
        return Pipeline(*sources or self._sources, **{**self._options, **options})

    def _is_recorded(self) -> bool:
        return self._keeps or self._caches

    def history(self) -> list[Any]:
        """Return the runs that the store has of pipelines of this name, newest last.

        A run is recorded if a store was asked for, or a step is cached: a line of JSON in the
        file ``runs.jsonl`` of the store. The name is that of the module, else ``pipeline``: give
        unrelated pipelines that come from no module a name (``name=``) or a store each.

        Returns
        -------
        list of dict
            A flat row for each run: when, who, ``inputs.NAME``, ``metrics.NAME`` (the targets that
            are numbers, bools or short texts). ``pandas.DataFrame`` takes it as it is. A row also
            has ``.steps`` and, for ``run(**row.inputs)``, ``.inputs``.

        Examples
        --------
        >>> import tempfile
        >>> pipeline = Pipeline({"more": lambda x: x + 1}, store=tempfile.mkdtemp())
        >>> for x in (1, 2):
        ...     _ = pipeline.run(x=x)
        >>> [row["metrics.more"] for row in pipeline.history()]
        [2, 3]
        """
        history = _History()
        for line in self._store._records():
            if line.get("pipeline") == self._title:
                with contextlib.suppress(AttributeError, TypeError, ValueError):
                    history.append(_Record(line))  # unless another dagkit wrote it otherwise
        return history

    @property
    def store(self) -> Store:
        """Where results are kept: ``clear``, ``prune``, ``size``.

        Examples
        --------
        >>> Pipeline({"more": lambda x: x + 1}, store="/nowhere").store
        Store('/nowhere')
        """
        return self._store

    @property
    def _title(self) -> str:
        if self._name:
            return self._name
        modules = [sys.modules.get(s) if isinstance(s, str) else s for s in self._sources]
        for module in modules:
            if isinstance(module, ModuleType):
                path = getattr(module, "__file__", None) or "pipeline"
                main = os.path.splitext(os.path.basename(path))[0]
                return main if module.__name__ == "__main__" else module.__name__
        return "pipeline"

    def _shows(self, order: _Order, used: Mapping[str, Any]) -> _Scene:
        """Begin the scene of a plan or a run; its states come later."""
        targets = frozenset(order.targets) if order.named else frozenset[str]()
        shown = _hidden(used, self.secret) if self.secret else used
        return _Scene(self._title, self._built, None, targets, order.given, shown)

    def _scene(self) -> _Scene:
        try:
            graph = self._current()
        except DagkitError as error:  # to look at a pipeline must not fail: it says what is wrong
            return _Scene(
                self._title, _Graph({}, {}, {}, {}), fault=f"{type(error).__name__}: {error}"
            )
        return _Scene(self._title, graph, inputs=_hidden(graph.inputs, self.secret))

    def __repr__(self) -> str:
        if fault := self._scene().fault:
            return f"<Pipeline '{self._title}': {fault.splitlines()[0]}>"
        graph = self._current()
        needed = {name for step in graph.steps.values() for name in step.needs}
        last = [step.name for step in graph.steps.values() if needed.isdisjoint(step.values)]
        steps, inputs = _counted(len(graph.steps), "step"), _counted(len(graph.inputs), "input")
        return f"<Pipeline '{self._title}': {steps}, {inputs}, targets {_listed(last) or 'none'}>"
