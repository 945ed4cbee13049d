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
Plan        graph, targets and given inputs become an order of steps
Run record  what is known of a run: values, statuses, times, errors
Execution   a plain loop for plain steps, one ready/done loop for all others
Pipeline    the façade: short methods that call the rooms above
"""

from __future__ import annotations

import functools
import heapq
import importlib
import inspect
import os
import queue
import reprlib
import sys
import threading
import time
import warnings
from collections import Counter
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
from dataclasses import KW_ONLY, dataclass, field, fields
from operator import is_
from types import (
    AsyncGeneratorType,
    CoroutineType,
    FunctionType,
    GeneratorType,
    MappingProxyType,
    ModuleType,
)
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

if TYPE_CHECKING:
    from concurrent.futures import Future

    import networkx as nx

__version__ = "0.1.0"

__all__ = [
    "CycleError",
    "DagkitError",
    "DagkitWarning",
    "DefaultsError",
    "DuplicateNameError",
    "MissingInputError",
    "NoValueError",
    "Pipeline",
    "ResultError",
    "Run",
    "Skip",
    "SourceError",
    "Step",
    "StepError",
    "UnknownNameError",
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


class NoValueError(DagkitError, KeyError):
    """A name has no value in a ``Run``: the step failed or was skipped, or was no target."""


class DagkitWarning(UserWarning):
    """Category of every warning that dagkit gives."""


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
    """Look through partials and ``functools.wraps`` to the function that somebody wrote."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)


def _place(function: Any) -> str:
    """Give ``file.py:12``, where a callable is defined, or its module."""
    function = _innermost(function)
    code = getattr(function, "__code__", None)
    code = code or getattr(getattr(type(function), "__call__", None), "__code__", None)  # noqa: B004
    if code is None:
        return str(getattr(function, "__module__", None) or type(function).__module__)
    path = str(code.co_filename)
    here = os.path.join(os.getcwd(), "")
    return f"{path.removeprefix(here)}:{code.co_firstlineno}"


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


########################################################################################
### Steps
########################################################################################


# Names of arguments by position, by keyword only; the defaults; CO_ flags, of which these matter:
_Signature = tuple[tuple[str, ...], tuple[str, ...], dict[str, Any], int]
_NO_DEFAULTS: dict[str, Any] = {}  # one for all: fewer objects make a large build faster
_VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


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
    version: Hashable = None
    retries: int = 0
    retry_delay: float = 0.0
    retry_backoff: float = 1.0
    local: bool = False
    # Read from the signature: value names by position, (argument, value name) by keyword, the names
    # of both, and value name -> default where no argument insists on the value.
    _takes: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _keywords: tuple[tuple[str, str], ...] = field(init=False, repr=False, compare=False)
    _needs: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _defaults: Mapping[str, Any] = field(init=False, repr=False, compare=False)
    _is_async: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put, function, args = object.__setattr__, self.function, self.args or {}
        if not callable(function):
            raise StepError(f"Step() was given {_brief(function)}; expected a callable")
        if not self.name:
            inner = function if type(function) is FunctionType else _innermost(function)
            put(self, "name", getattr(inner, "__name__", type(inner).__name__))
        # One comparison tells the usual step, which has no options, from the others.
        delays = self.retries, self.retry_delay, self.retry_backoff
        options = (self.outputs, self.args, self.version, *delays, self.local)
        if options != _NO_OPTIONS or not self.name.isidentifier():
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
            if extra and not flags & _VARIADIC:
                wrong = _listed(map(repr, extra))
                raise self._error(
                    f"has no argument {wrong}, which args= names", _hint(extra, needs)
                )
            insisted = {args.get(n, n) for n in needs + extra if n not in defaults}
            defaults = {args.get(n, n): d for n, d in defaults.items()}
            defaults = {n: d for n, d in defaults.items() if n not in insisted}
            takes = tuple(args.get(n, n) for n in takes)
            pairs = tuple((n, args.get(n, n)) for n in keywords + extra)
            needs = tuple(dict.fromkeys((*takes, *(value for _, value in pairs))))
        put(self, "_takes", takes)
        put(self, "_keywords", pairs)
        put(self, "_needs", needs)
        put(self, "_defaults", defaults)
        put(self, "_is_async", flags & inspect.CO_COROUTINE != 0)

    def _error(self, what: str, expected: str) -> StepError:
        text = f"step '{self.name}' {what}\n  {self.definition}\n  {expected.strip()}"
        return StepError(text, step=self.name)

    def _check_options(self) -> None:
        if not isinstance(self.outputs, tuple | list):  # a string would fall apart into letters
            raise self._error(
                f"has outputs={_brief(self.outputs)}", "expected a tuple such as ('train', 'test')"
            )
        object.__setattr__(self, "outputs", tuple(self.outputs))
        for name in self.values:
            if not isinstance(name, str) or not name.isidentifier():
                raise self._error(
                    f"makes a value named {name!r}, which no argument can be called",
                    "expected a name such as 'clean': @step(name=...) or Step(..., name=...)",
                )
        count, delay, factor = self.retries, self.retry_delay, self.retry_backoff
        for option, good, expected in (
            ("args", isinstance(self.args, Mapping | None), "a dict: argument -> value it takes"),
            ("version", isinstance(self.version, Hashable), "something hashable"),
            ("retries", type(count) is int and count >= 0, "a number of extra tries, 0 or more"),
            ("retry_delay", isinstance(delay, int | float) and delay >= 0, "seconds, 0 or more"),
            (
                "retry_backoff",
                isinstance(factor, int | float) and factor >= 0,
                "a factor, 0 or more",
            ),
        ):
            if not good:
                shown = f"has {option}={_brief(getattr(self, option))}"
                raise self._error(shown, f"expected {expected}")

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


_NO_OPTIONS: tuple[Any, ...] = ((), None, None, 0, 0.0, 1.0, False)
_OPTIONS = frozenset(f.name for f in fields(Step) if f.init and f.name != "function")


@overload
def step(function: _F, /) -> _F: ...
@overload
def step(
    *,
    name: str = ...,
    outputs: tuple[str, ...] = ...,
    args: Mapping[str, str] = ...,
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
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        hint = _hint(unknown, _OPTIONS).replace("names", "options")
        raise StepError(f"@step has no option {_listed(map(repr, unknown))}\n{hint}")
    if function is None:
        return functools.partial(step, **options)
    if type(function) is not FunctionType:
        raise StepError(
            f"@step was given {_brief(function)}, which is no function\n"
            "  a class, a partial or a callable object becomes a step by Step(thing, name=...)"
        )
    Step(function, **options)  # for its checks: what is wrong belongs to this line of the user's
    setattr(function, _MARK, options)
    return function


def _settled(source: Any) -> Any:
    """Keep what a pipeline follows as it is; read other iterables once."""
    if type(source) is FunctionType or isinstance(
        source, (Step, Pipeline, str, ModuleType, Mapping)
    ):
        return source
    if isinstance(source, Iterable):
        return tuple(map(_settled, source))
    raise SourceError(
        f"Pipeline() was given {_brief(source)}, which holds no steps\n"
        "  expected a module, a module's name, a mapping such as globals(), a function, a Step, a "
        "Pipeline, or an iterable of these"
        + "\n  a callable object becomes a step by Step(thing, name=...)"
        * callable(source)
    )


def _entries(sources: Iterable[Any]) -> list[Any]:
    """List what is a step in settled sources now: functions, ``Step``s, (name, function)."""
    found: list[Any] = []
    for source in sources:
        if type(source) is FunctionType or type(source) is Step:
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
    marked = [
        value
        for key, value in found
        if (hasattr(value, _MARK) if type(value) is FunctionType else type(value) is Step)
        # IPython keeps former results, so former definitions too, as _, __ and _12.
        and (key[:1] != "_" or key == getattr(value, "__name__", key))
    ]
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
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:
        # Arrays and frames compare element by element: two of them are two defaults.
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
### Plan
########################################################################################

# What the plain loop needs of a step: its name, its function, the names of the values it takes by
# position, (argument, name) by keyword, the step if it has outputs, and the names to drop after it.
_Call = tuple[str, Any, tuple[str, ...], tuple[tuple[str, str], ...], Step | None, list[str]]


class _Order(NamedTuple):
    """The steps that targets need, in topological order."""

    targets: tuple[str, ...]
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
    plain = not any(step._is_async for step in steps)
    return _Order(wanted, given, tuple(steps), defaults, calls[::-1], plain)


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
### Run record
########################################################################################

_Status = Literal["ran", "failed", "skipped"]


class _StepRun(NamedTuple):
    """How one step of a run went."""

    name: str
    status: _Status
    seconds: float = 0.0  # of the last try, without the waiting between tries
    reason: str = ""  # why it was skipped
    attempts: int = 1
    error: BaseException | None = None


class _Outcome(NamedTuple):
    """How the steps of an order went: a clock reading before and after each plain one, then more.

    The plain loop only reads the clock; what is known of each step is made when someone asks.
    """

    order: _Order
    ends: list[float]
    others: dict[str, _StepRun]
    seconds: float

    def steps(self) -> dict[str, _StepRun]:
        spans = zip(self.order.steps, self.ends, self.ends[1:], strict=False)
        plain = {s.name: _StepRun(s.name, "ran", end - start) for s, start, end in spans}
        return {**plain, **self.others}


class Run(Mapping[str, Any]):
    """The values of a run's targets, by name, and how the run went.

    ``Pipeline.run`` makes it. A target that failed or was skipped is no key of it.

    Attributes
    ----------
    inputs : dict
        Name -> value of everything that was given, and the defaults that were used.

    Examples
    --------
    >>> run = Pipeline({"more": lambda x: x + 1}).run(x=1)
    >>> run["more"], run.steps["more"].status, run.inputs
    (2, 'ran', {'x': 1})
    """

    def __init__(
        self,
        title: str,
        inputs: Mapping[str, Any],
        values: Mapping[str, Any],
        outcome: _Outcome,
        started: float,
    ) -> None:
        self.inputs = dict(inputs)
        self._title, self._values, self._outcome = title, values, outcome
        self._started = started

    def __getitem__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        step = self.steps.get(name)
        if step is None:
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
        counts = Counter(step.status for step in self.steps.values())
        shown = ", ".join(f"{number} {status}" for status, number in counts.items()) or "no step"
        return f"<Run of '{self._title}': {shown}, {self._outcome.seconds:.3g} s>"

    @functools.cached_property
    def steps(self) -> dict[str, _StepRun]:
        """Step name -> how it went, in the order in which the steps ended."""
        return self._outcome.steps()

    @property
    def errors(self) -> dict[str, BaseException]:
        """Step name -> its exception, of the steps that failed."""
        return {name: step.error for name, step in self.steps.items() if step.error is not None}

    @property
    def record(self) -> dict[str, Any]:
        """The run without its values, ready for ``json.dumps``; times in seconds."""
        return {
            "pipeline": self._title,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "seconds": self._outcome.seconds,
            "python": ".".join(map(str, sys.version_info[:3])),
            "dagkit": __version__,
            "status": "failed" if self.errors else "ran",
            "inputs": {name: _brief(value) for name, value in self.inputs.items()},
            "targets": list(self._values),
            "steps": {
                name: {
                    "status": step.status,
                    "seconds": step.seconds,
                    "reason": step.reason,
                    "attempts": step.attempts,
                    "error": _error_line(step.error),
                }
                for name, step in self.steps.items()
            },
        }


def _error_line(error: BaseException | None) -> str:
    """``ValueError: the first line of its message``, or ""."""
    if error is None:
        return ""
    try:
        message = str(error).strip().splitlines()
    except Exception as broken:  # a user's __str__
        message = [f"<its message raises {type(broken).__name__}>"]
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__


########################################################################################
### Execution
########################################################################################

_clock = time.perf_counter

# Types of a result that is not a value yet, or never will be: the plain loop stops at it.
_NO_VALUES = frozenset((CoroutineType, GeneratorType, AsyncGeneratorType))


def _named_values(step: Step, value: Any) -> dict[str, Any]:
    """Map the names of the values that a step makes to what it returned."""
    if type(value) in (GeneratorType, AsyncGeneratorType):
        raise ResultError(
            f"step '{step.name}' returned a generator, which only one step could use, once\n"
            f"  {step.definition}\n  return a list instead",
            step=step.name,
        )
    if not step.outputs:
        return {step.name: value}
    names = step.outputs
    if isinstance(value, Mapping):
        if value.keys() == set(names):
            return {step.name: value, **{name: value[name] for name in names}}
        found = f"a dict with the keys {_listed(map(str, value))}"
    elif isinstance(value, tuple | list):
        if len(value) == len(names):
            return {step.name: value, **dict(zip(names, value, strict=True))}
        found = f"{len(value)} values"
    else:
        found = _brief(value)
    raise ResultError(
        f"step '{step.name}' has {len(names)} outputs ({', '.join(names)}) but returned {found}\n"
        f"  {step.definition}\n  return a tuple of {len(names)}, or a dict with these keys",
        step=step.name,
    )


def _add_note(error: BaseException, step: Step, values: Mapping[str, Any]) -> None:
    """Say on a step's exception which step it was, where, and with which values."""
    shown = ", ".join(f"{name}={_brief(values[name])}" for name in step.needs if name in values)
    error.add_note(
        f"in step '{step.name}' at {_place(step.function)}" + f", with {shown}" * bool(shown)
    )


class _EventLoopThread:
    """Runs coroutines in a thread of its own, so that it works where a loop already runs."""

    _thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
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


class _Loop:
    """The ready/done loop: runs steps that may wait, overlap, be tried again, skip or fail.

    Each step goes waiting -> ready -> running -> done. ``ready`` is a heap by place in the order;
    ``later`` a heap by time of what is to be tried again; ``done`` the queue into which futures
    put themselves. The thread that called ``run()`` does all the rest.
    """

    def __init__(self, order: _Order, values: dict[str, Any], start: int, keep_going: bool) -> None:
        self.order, self.values, self.keep_going = order, values, keep_going
        self.todo = order.steps[start:]
        self.steps: dict[str, _StepRun] = {}
        self.place = {step.name: i for i, step in enumerate(order.steps)}
        self.makers = {value: step.name for step in self.todo for value in step.values}
        self.failure: BaseException | None = None
        self.running = 0
        self.ready: list[tuple[bool, int]] = []
        self.later: list[tuple[float, int]] = []  # when, place
        self.attempts: dict[str, int] = {}
        self.done: queue.SimpleQueue[tuple[Step, float, Future[Any]]] = queue.SimpleQueue()
        self.background = _EventLoopThread()
        # How many steps, and targets, still need each value.
        self.uses = Counter(order.targets)
        self.waiting: dict[str, int] = {}
        self.dependents: dict[str, list[Step]] = {}
        for step in self.todo:
            self.uses.update(step.needs)
            made = [name for name in step.needs if name in self.makers and name not in order.given]
            awaited = {self.makers[name] for name in made}
            self.waiting[step.name] = len(awaited)
            for maker in awaited:
                self.dependents.setdefault(maker, []).append(step)

    def run(self, first: tuple[float, Any, Exception | None] | None = None) -> None:
        """Run all; ``first`` is what the plain loop already got from the first step, if it did."""
        for step in self.todo[first is not None :]:
            if self.waiting[step.name] == 0:
                self.push(step)
        try:
            if first is not None:
                self.attempts[self.todo[0].name] = 1
                self.receive(self.todo[0], *first)
            while self.running or (not self.failure and (self.ready or self.later)):
                self.turn()
        finally:
            self.background.close()
        failure, self.failure = self.failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # or its traceback would hold this frame, and that the values

    def turn(self) -> None:
        """Start the first ready step, or else wait for whatever comes next."""
        timeout: float | None = None
        if not self.failure:
            while self.later and self.later[0][0] <= _clock():
                heapq.heappush(self.ready, (False, heapq.heappop(self.later)[1]))
            if self.ready:
                self.start(self.order.steps[heapq.heappop(self.ready)[1]])
                timeout = 0.0
            elif self.later:
                timeout = max(0.0, self.later[0][0] - _clock())
        try:
            step, began, future = self.done.get(timeout=timeout)
        except queue.Empty:
            return
        self.running -= 1
        value, error = None, None
        try:
            value = future.result()
        except Exception as raised:
            error = raised
        self.receive(step, began, value, error)

    def push(self, step: Step) -> None:
        # Coroutines first: they hold nobody up, and overlap with all that follows.
        heapq.heappush(self.ready, (not step._is_async, self.place[step.name]))

    def start(self, step: Step) -> None:
        values, defaults = self.values, step._defaults
        lacking = [name for name in step.needs if name not in values]
        for name in lacking:
            if name not in defaults:
                self.finish(_StepRun(step.name, "skipped", reason=f"needs {self.makers[name]}"))
                return
        # An argument whose step was skipped or failed takes its default.
        found = {name: defaults[name] for name in lacking}
        takes = [found[n] if n in found else values[n] for n in step._takes]
        keywords = {a: found[n] if n in found else values[n] for a, n in step._keywords}
        self.attempts[step.name] = self.attempts.get(step.name, 0) + 1
        began = _clock()
        value, error = None, None
        try:
            value = step.function(*takes, **keywords)
        except Exception as raised:
            error = raised
        del takes, keywords
        try:
            self.receive(step, began, value, error)
        finally:
            del error, value  # for the same reason

    def receive(self, step: Step, began: float, value: Any, error: Exception | None) -> None:
        """Take what a step's function returned or raised."""
        if type(value) is CoroutineType:
            future = self.background.submit(value)
            self.running += 1
            future.add_done_callback(lambda done: self.done.put((step, began, done)))
            return
        seconds = _clock() - began
        attempts = self.attempts[step.name]
        if error is None:
            try:
                made = _named_values(step, value)
            except ResultError as wrong:
                error = wrong
            else:
                given, uses = self.order.given, self.uses
                self.values.update((n, v) for n, v in made.items() if uses[n] and n not in given)
                self.finish(_StepRun(step.name, "ran", seconds, attempts=attempts))
                return
        if isinstance(error, Skip):
            self.finish(_StepRun(step.name, "skipped", seconds, str(error), attempts))
        elif attempts <= step.retries and not isinstance(error, ResultError):
            wait = step.retry_delay * step.retry_backoff ** (attempts - 1)
            heapq.heappush(self.later, (_clock() + wait, self.place[step.name]))
        else:
            _add_note(error, step, self.values)
            if not self.keep_going and self.failure is None:
                self.failure = error
            self.finish(_StepRun(step.name, "failed", seconds, "", attempts, error))

    def finish(self, result: _StepRun) -> None:
        """Record a step that is over, free what it needed, and make ready what waited for it."""
        self.steps[result.name] = result
        for name in self.order.steps[self.place[result.name]].needs:
            self.uses[name] -= 1
            if not self.uses[name]:
                self.values.pop(name, None)
        for step in self.dependents.get(result.name, ()):
            self.waiting[step.name] -= 1
            if self.waiting[step.name] == 0:
                self.push(step)


def _execute(order: _Order, values: dict[str, Any], keep_going: bool) -> _Outcome:
    """Run the steps of an order; leaves in ``values`` those of the targets, and what was given.

    Steps run in a plain loop, whose cost is next to nothing, until one does something that takes
    more: raises, skips, or returns a coroutine. From there on the ready/done loop goes on.
    """
    ends = [_clock()]
    ended = ends.append
    get = values.__getitem__
    given = order.given
    first: tuple[float, Any, Exception | None] | None = None
    try:
        for name, function, takes, keywords, outputs, drops in order.calls if order.plain else ():
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
    others: dict[str, _StepRun] = {}
    if done < len(order.steps):
        loop = _Loop(order, values, done, keep_going)
        try:
            loop.run(first)
        finally:
            del first
        others = loop.steps
    return _Outcome(order, ends, others, _clock() - ends[0])


########################################################################################
### Pipeline
########################################################################################


class Pipeline:
    """Steps that fit together by the names of their arguments.

    Give values: :meth:`run`. Look: :attr:`graph`, :attr:`steps`, :attr:`inputs`.

    Parameters
    ----------
    *sources
        Modules, names of modules (``Pipeline(__name__)``), mappings (``globals()``), functions,
        ``Step`` objects, other pipelines, and iterables of these. Of a module or mapping: all that
        ``@step`` has marked, or, if it has marked nothing, all (public) functions. Modules,
        mappings and pipelines are followed: a step that is defined anew is used by the next run.
    on_error : {"raise", "continue"}
        What a step's exception does: end the run, or only keep what needs that step from running.

    Raises
    ------
    SourceError, StepError
        At once, for what can never be a source or a step.
    DuplicateNameError, DefaultsError, CycleError
        At the first use, since what is followed may still change.

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

    def __init__(self, *sources: Any, on_error: Literal["raise", "continue"] = "raise") -> None:
        if on_error not in ("raise", "continue"):
            raise ValueError(f"on_error={_brief(on_error)}: expected 'raise' or 'continue'")
        self._sources = tuple(map(_settled, sources))
        self._on_error = on_error
        self._seen: list[Any] = [None]  # what the graph was built from
        self._inside: list[Any] = []

    def _current(self) -> _Graph:
        """Return the graph of the steps as they are now, built again if any has changed."""
        entries = _entries(self._sources)
        functions = [entry for entry in entries if type(entry) is FunctionType]
        # A function can also change in place, as by IPython's autoreload.
        inside = [f.__code__ for f in functions] + [f.__defaults__ for f in functions]
        if entries != self._seen or not all(map(is_, inside, self._inside)):
            self._built = _build_graph(entries)
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
        graph = self._current()
        key = (targets, frozenset(inputs))
        order = graph.orders.get(key)
        if order is None:
            order = _make_order(graph, *key)
            if len(graph.orders) >= 32:
                graph.orders.clear()
            graph.orders[key] = order
        started = time.time()
        used = {**order.defaults, **inputs}
        values = dict(used)
        for name in inputs:
            step = graph.steps.get(name)
            if step is not None and step.outputs:
                values.update({**_named_values(step, inputs[name]), **inputs})
        outcome = _execute(order, values, self._on_error == "continue")
        kept = {name: values[name] for name in order.targets if name in values}
        return Run(self._title, used, kept, outcome, started)

    @property
    def _title(self) -> str:
        modules = [sys.modules.get(s) if isinstance(s, str) else s for s in self._sources]
        for module in modules:
            if isinstance(module, ModuleType):
                path = getattr(module, "__file__", None) or "pipeline"
                main = os.path.splitext(os.path.basename(path))[0]
                return main if module.__name__ == "__main__" else module.__name__
        return "pipeline"

    def __repr__(self) -> str:
        graph = self._current()
        needed = {name for step in graph.steps.values() for name in step.needs}
        last = [step.name for step in graph.steps.values() if needed.isdisjoint(step.values)]
        steps, inputs = len(graph.steps), len(graph.inputs)
        return (
            f"<Pipeline '{self._title}': {steps} step{'s' * (steps != 1)}, "
            f"{inputs} input{'s' * (inputs != 1)}, targets {_listed(last) or 'none'}>"
        )
