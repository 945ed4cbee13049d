"""The specification of dagkit, room by room in the order of the module."""

from __future__ import annotations

import array
import asyncio
import base64
import collections
import contextlib
import copy
import dataclasses
import decimal
import enum
import errno
import functools
import gc
import gzip
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import signal
import sqlite3
import stat
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unicodedata
import warnings
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, assert_type
from unittest import mock
from xml.etree import ElementTree

import hypothesis
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

import dagkit
from dagkit import (
    REQUIRED,
    CatalogError,
    CycleError,
    DagkitError,
    DagkitWarning,
    Event,
    InputError,
    NoValueError,
    Pipeline,
    Plan,
    ResultError,
    Run,
    SensorTimeoutError,
    Skip,
    Step,
    StepError,
    Store,
    WorkerError,
    sensor,
    step,
)

HERE = Path(__file__).parent

# All private names that the tests need, so that a new name changes one line. Only the code of a few
# child processes uses others. Users would see the same facts in part, or after a long time.
summarize = dagkit._summarize
find_delay = dagkit._find_delay
StepState = dagkit._StepState
STEP_OPTIONS = dagkit._STEP_OPTIONS
PIPELINE_OPTIONS = dagkit._PIPELINE_OPTIONS

fingerprint = dagkit._fingerprint
fingerprint_with_sources = dagkit._fingerprint_with_sources
copy_arguments = dagkit._copy_arguments
CodeMemo = dagkit._CodeMemo
OpaqueError = dagkit._Opaque
SOURCE_TYPES = dagkit._SOURCE_TYPES

format_duration = dagkit._format_duration
format_table = dagkit._format_table
describe_outcome = dagkit._describe_outcome
describe_briefly = dagkit._describe_briefly
cut_end = dagkit._cut_end
cut_middle = dagkit._cut_middle

rank_boxes = dagkit._rank_boxes
update_positions = dagkit._update_positions
count_crossings = dagkit._count_crossings
arrange_boxes = dagkit._arrange
lay_out = dagkit._lay_out
Geometry = dagkit._Geometry
Scene = dagkit._Scene
Picture = dagkit._Picture
format_page = dagkit._format_page
LOOKS = dagkit._LOOKS


@step
def total(prices: list[float]) -> float:
    return sum(prices)


@step
def mean(total: float, prices: list[float], digits: int = 2) -> float:
    return round(total / len(prices), digits)


@step(outputs=("low", "high"))
def bounds(prices: list[float]) -> tuple[float, float]:
    return min(prices), max(prices)


def spread(low: float, high: float) -> float:
    return high - low


@pytest.fixture
def shop() -> Pipeline:
    return Pipeline([total, mean, bounds, spread])


def locate(function: Callable[..., Any]) -> str:
    """Return the location of a function of this file, as messages show it."""
    return f"test_dagkit.py:{function.__code__.co_firstlineno}"


def make_function(name: str, *needs: str, body: str = "...") -> Callable[..., Any]:
    """Make a function of that name, with these arguments."""
    scope: dict[str, Any] = {}
    exec(f"def {name}({', '.join(needs)}): {body}", scope)
    function: Callable[..., Any] = scope[name]
    return function


def run_python(code: str, folder: Path | None = None, /, **environment: str) -> str:
    """Run code in a new interpreter; return what it printed."""
    env = {**os.environ, "PYTHONPATH": str(HERE), **environment}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def get_statuses(run: Run | Plan) -> str:
    """Write the statuses of a run or plan as ``load cached, clean ran``."""
    states = run.steps.values() if isinstance(run, Run) else run.values()
    return ", ".join(f"{state.name} {state.status}" for state in states)


def catch_warnings(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return the result of a call, and the texts of the warnings that dagkit issued."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if w.category is DagkitWarning]


@pytest.fixture(autouse=True, scope="session")
def restore_sigint() -> None:
    """Catch Ctrl-C: shells start jobs in the background without it, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Messages show paths relative to the working folder; each test has its own store and key."""
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGKIT_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("DAGKIT_KEY", raising=False)


########################################################################################
### Errors
########################################################################################

ERRORS: dict[type[DagkitError], tuple[type[Exception], ...]] = {
    DagkitError: (),
    StepError: (TypeError, ValueError),
    CycleError: (ValueError,),
    InputError: (TypeError, ValueError),
    ResultError: (ValueError,),
    CatalogError: (ValueError,),
    WorkerError: (RuntimeError,),
    SensorTimeoutError: (TimeoutError,),
    NoValueError: (KeyError,),
}


def test_there_are_no_other_errors_than_the_public_ones() -> None:
    errors = {value for value in vars(dagkit).values() if isinstance(value, type)}
    assert {error for error in errors if issubclass(error, DagkitError)} == {*ERRORS}
    assert {error.__name__ for error in ERRORS} <= {*dagkit.__all__}


@pytest.mark.parametrize(("error", "builtins"), ERRORS.items())
def test_every_error_is_also_the_builtin_that_a_caller_expects(
    error: type[DagkitError], builtins: tuple[type[Exception], ...]
) -> None:
    assert issubclass(error, DagkitError)
    assert all(issubclass(error, builtin) for builtin in builtins)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_survives_pickle_with_its_facts(error: type[DagkitError]) -> None:
    facts = {"step": "fit", "name": "x", "cycle": ("a", "a"), "unknown": ("b",), "missing": ("c",)}
    twin = pickle.loads(pickle.dumps(error("what\n  where", **facts)))
    assert type(twin) is error
    assert str(twin) == "what\n  where"
    assert {name: getattr(twin, name) for name in facts} == facts
    assert (error().step, error().missing) == ("", ())


class Broken:
    """An object with a repr and a message that raise."""

    def __repr__(self) -> str:
        raise OSError("no")


@pytest.mark.parametrize(
    ("value", "summary"),
    [
        (np.zeros((3, 4)), "ndarray(3 x 4 float64)"),
        (pd.DataFrame({"a": [1, 2]}), "DataFrame(2 x 1)"),
        ([np.zeros(3), 1], "[ndarray(3 float64), 1]"),
        (np.float64(1.5), "np.float64(1.5)"),
        ([Broken()], "[<Broken whose repr raises OSError>]"),
        ("two\nlines", r"'two\nlines'"),
    ],
)
def test_values_in_messages_show_their_shape_and_never_fail(value: Any, summary: str) -> None:
    assert summarize(value) == summary


@pytest.mark.parametrize("value", ["x" * 1000, {i: "y" * 50 for i in range(100)}, object()])
def test_values_in_messages_have_at_most_80_characters(value: Any) -> None:
    assert len(summarize(value)) <= 80


def test_an_error_with_a_broken_message_does_no_harm() -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise OSError("no")

        def add_note(self, note: str) -> None:
            raise OSError("no notes either")

    def fail() -> None:
        raise BrokenError

    def skip() -> None:
        class BrokenSkip(Skip):
            def __str__(self) -> str:
                raise OSError("no")

        raise BrokenSkip

    run = Pipeline(fail, skip, on_error="continue").run()
    assert type(run.errors["fail"]) is BrokenError
    assert run.steps["skip"].reason == "<its message raises OSError>"
    assert repr(run.steps["fail"]).endswith("BrokenError: <its message raises OSError>>")


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (("fit", "ran", "", 0.05), "<step 'fit' ran: 50 ms>"),
        (("fit", "stale", "code changed: fit"), "<step 'fit' stale: code changed: fit>"),
        (("fit", "fresh"), "<step 'fit' fresh>"),
        (
            ("fit", "failed", "", 8.2, 1, ValueError("bad\nnews")),
            "<step 'fit' failed: 8.2 s, ValueError: bad>",
        ),
    ],
)
def test_a_state_is_one_line(state: tuple[Any, ...], text: str) -> None:
    assert repr(StepState(*state)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0031, "3 ms"),
        (0.4, "0.4 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (63, "1 min 03 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


########################################################################################
### Steps
########################################################################################


def test_the_decorator_returns_the_same_function() -> None:
    def plain(x: int) -> int:
        return x

    assert step(plain) is plain
    assert step(retries=2)(plain) is plain
    assert sensor(timeout=1)(plain) is plain
    assert total([1, 2]) == 3


def test_a_decorated_function_pickles_by_name_and_runs_in_a_process() -> None:
    assert pickle.loads(pickle.dumps(total)) is total
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(total, [1.0, 2.0]).result() == 3.0


def test_types_of_decorated_functions_are_kept() -> None:
    assert_type(total([1.0]), float)
    assert_type(bounds([1.0]), tuple[float, float])


class Scaler:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, x: int) -> int:
        return x * self.factor


def test_step_serves_lambdas_partials_callable_objects_classes_and_builtins() -> None:
    pipeline = Pipeline(
        Step(lambda x: x + 1, name="more"),
        Step(Scaler(3), name="scaled", args={"x": "more"}),
        Step(Scaler, name="scaler", args={"factor": "more"}),
        Step(functools.partial(pow, 2), name="power", args={"exp": "scaled"}),
        Step(len, name="size", args={"obj": "items"}),
        Step(max, name="largest", args={"items": "items"}),
    )
    run = pipeline.run("more", "scaled", "scaler", "power", "size", "largest", x=1, items=[1, 5, 2])
    assert run["scaler"].factor == 2
    others = {name: run[name] for name in run if name != "scaler"}
    assert others == {"more": 2, "scaled": 6, "power": 64, "size": 3, "largest": 5}


def test_an_argument_that_a_partial_has_bound_is_not_an_edge() -> None:
    def fit(data: int, alpha: float = 1.0) -> float:
        return data * alpha

    weak = Step(functools.partial(fit, alpha=0.5), name="weak")
    assert weak.needs == ("data",)
    assert Pipeline(weak, Step(lambda: 7.0, name="alpha")).run("weak", data=4)["weak"] == 2.0


def test_one_function_makes_two_steps_under_other_names() -> None:
    def scaled(value: int, by: int) -> int:
        return value * by

    twice = Step(scaled, name="twice", args={"value": "x", "by": "two"})
    again = Step(scaled, name="again", args={"value": "twice", "by": "two"})
    assert Pipeline(twice, again).run("again", x=3, two=2)["again"] == 12


def test_two_arguments_can_take_one_value() -> None:
    square = Step(lambda a, b=7: a * b, name="square", args={"a": "x", "b": "x"})
    assert (square.needs, square.defaults) == (("x",), {})
    assert Pipeline(square).run(x=3)["square"] == 9


def test_positional_only_and_keyword_only_arguments_are_edges() -> None:
    def mixed(a: int, /, b: int, *, c: int, d: int = 4) -> tuple[int, ...]:
        return a, b, c, d

    assert Pipeline(mixed).run(a=1, b=2, c=3)["mixed"] == (1, 2, 3, 4)
    assert Pipeline(mixed).run(a=1, b=2, c=3, d=5)["mixed"] == (1, 2, 3, 5)


def test_a_function_with_kwargs_gets_what_args_names() -> None:
    def collect(*rest: int, **others: int) -> dict[str, int]:
        assert not rest
        return others

    pipeline = Pipeline(Step(collect, args={"a": "x", "b": "y"}))
    assert pipeline.run(x=1, y=2)["collect"] == {"a": 1, "b": 2}


def test_a_wrapper_around_a_step_is_the_step() -> None:
    def logged(inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            return ("logged", inner(*args, **kwargs))

        return outer

    @logged
    @step(name="plus")
    def add(a: int, b: int = 1) -> int:
        return a + b

    assert Pipeline({"add": add}).run(a=1)["plus"] == ("logged", 2)


def test_a_step_under_lru_cache_is_the_step() -> None:
    @functools.lru_cache
    @step
    def rate() -> int:
        return 2

    def use(x: int, rate: int = 5) -> int:
        return x * rate

    for pipeline in (Pipeline(rate, use), Pipeline({"__name__": "m", "rate": rate}, use)):
        assert pipeline.run("use", x=1)["use"] == 2


def test_a_decorator_may_set_more_defaults_than_there_are_arguments() -> None:
    def double(x: int) -> int:
        return 2 * x

    double.__defaults__ = (1, 2)
    assert Pipeline(double).run()["double"] == 4


@dataclasses.dataclass
class Model:
    size: int
    layers: list[int] = dataclasses.field(default_factory=list)
    rate: float = 0.5


def test_a_default_factory_of_a_class_makes_the_value() -> None:
    pipeline = Pipeline(Step(Model, name="model"))
    assert str(dict(pipeline.inputs)) == "{'size': <required>, 'layers': <factory>, 'rate': 0.5}"
    run = pipeline.run(size=1)
    assert (run["model"], run.inputs) == (Model(1, [], 0.5), {"rate": 0.5, "size": 1})
    assert pipeline.run(size=1)["model"].layers is not run["model"].layers
    assert pipeline.run(size=1, layers=[2])["model"] == Model(1, [2], 0.5)
    with pytest.raises(InputError, match="step 'count' needs 'layers'"):
        Pipeline(pipeline, {"count": lambda layers: len(layers)}).run(size=1)
    pipeline = Pipeline({"layers": lambda: [3]}, pipeline)
    assert pipeline.run("model", size=1)["model"] == Model(1, [3], 0.5)


def test_default_factories_of_attrs_and_pydantic_make_the_value() -> None:
    attrs = importlib.import_module("attrs")
    pydantic = importlib.import_module("pydantic")
    models = [
        attrs.make_class("Sizes", {"x": attrs.field(), "y": attrs.field(factory=list)}),
        pydantic.create_model(
            "Sizes", x=(int, ...), y=(list, pydantic.Field(default_factory=list))
        ),
    ]
    for model in models:
        for options in ({}, {"y": [1]}):
            value = Pipeline(Step(model, name="sizes")).run(x=1, **options)["sizes"]
            assert value == model(x=1, **options)


def test_names_are_normalized_as_python_normalizes_identifiers() -> None:
    composed, decomposed = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    assert composed != decomposed

    def use(é: int) -> int:
        return é

    pipeline = Pipeline(Step(lambda: 7, name=decomposed), use)
    assert pipeline.steps[composed].name == composed
    assert pipeline.run("use", decomposed)["use"] == 7
    assert pipeline.run("use", **{decomposed: 8})["use"] == 8
    renamed = Step(lambda x: -x, name="renamed", args={"x": decomposed}, after=decomposed)
    assert Pipeline(pipeline, renamed).run()["renamed"] == -7


def test_fields_of_a_step_tell_what_it_takes_and_makes() -> None:
    def fit(data: int, labels: int, n_jobs: int = 1, *, seed: int = 0) -> None: ...

    fitted = Step(
        fit,
        outputs=["model", "loss"],  # type: ignore[arg-type]
        args={"data": "train"},
        map="data",
        after="checks",
        ignore=("n_jobs", "seed"),
    )
    assert fitted.needs == ("train", "labels", "n_jobs", "seed")
    assert fitted.dependencies == ("train", "labels", "n_jobs", "seed", "checks")
    assert fitted.values == ("fit", "model", "loss")
    assert fitted.defaults == {"n_jobs": 1, "seed": 0}
    assert fitted.mapped_values == ("train",)
    assert fitted.ignored_values == ("n_jobs", "seed")
    assert fitted.definition == f"fit(data, labels, n_jobs=1, *, seed=0) at {locate(fit)}".replace(
        "*, ", ""
    )


def test_a_value_counts_if_one_of_two_arguments_that_take_it_counts() -> None:
    both = Step(lambda a, b: 0, name="both", args={"a": "x", "b": "x"}, ignore="a")
    assert both.ignored_values == ()


def fit(data: int, alpha: float = 0.1) -> None: ...


FIT = f"  fit(data, alpha=0.1) at {locate(fit)}\n  "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "not good"}, "name: expected a name that an argument can have, such as 'clean'"),
        ({"name": True}, "name: expected a name that an argument can have, such as 'clean'"),
        ({"name": "class"}, "name: expected a name that an argument can have, such as 'clean'"),
        ({"outputs": "ab"}, "outputs: expected a tuple such as ('train', 'test')"),
        ({"outputs": ("a", "x y")}, "outputs: expected a tuple such as ('train', 'test')"),
        (
            {"args": {"data": 1}},
            "args: expected a dict: name of an argument -> name of the value that it takes",
        ),
        (
            {"args": 3},
            "args: expected a dict: name of an argument -> name of the value that it takes",
        ),
        ({"map": 3}, "map: expected an argument or a tuple of them"),
        ({"after": (len,)}, "after: expected a step or a tuple of them"),
        ({"ignore": ""}, "ignore: expected an argument or a tuple of them"),
        ({"cache": 3}, "cache: expected True, False or a timedelta"),
        ({"version": []}, "version: expected something hashable"),
        ({"retries": -1}, "retries: expected a number of extra tries, 0 or more"),
        ({"retries": True}, "retries: expected a number of extra tries, 0 or more"),
        ({"retry_delay": "1"}, "retry_delay: expected seconds, 0 or more"),
        ({"retry_delay": math.nan}, "retry_delay: expected seconds, 0 or more"),
        ({"retry_backoff": -2}, "retry_backoff: expected a factor, 0 or more"),
        ({"local": "no"}, "local: expected True or False"),
        (
            {"retries": 0.5, "local": 1},
            "retries: expected a number of extra tries, 0 or more\n  local: expected True or False",
        ),
    ],
)
def test_wrong_options_are_errors_that_say_what_is_expected(
    options: dict[str, Any], message: str
) -> None:
    name = options.get("name", "fit")
    texts = ", ".join(f"{option}={value!r}" for option, value in options.items())
    decorators: list[Callable[[], Any]] = [
        lambda: step(**options)(fit),
        lambda: Step(fit, **options),
    ]
    for decorate in decorators:
        with pytest.raises(StepError) as caught:
            decorate()
        definition = FIT.replace("  fit", f"  {name}", 1)
        assert str(caught.value) == f"step '{name}' has {texts}\n{definition}{message}"
        assert caught.value.step == name


@pytest.mark.parametrize(
    ("options", "problem", "advice"),
    [
        (
            {"args": {"dta": "raw"}},
            "has no argument 'dta', which args= names",
            "known names: alpha, data; did you mean 'data'?",
        ),
        (
            {"map": ("data", "alfa")},
            "has no argument 'alfa', which map= names",
            "known names: alpha, data; did you mean 'alpha'?",
        ),
        (
            {"ignore": "jobs"},
            "has no argument 'jobs', which ignore= names",
            "known names: alpha, data",
        ),
        (
            {"map": "data", "ignore": "data"},
            "ignores data, which map= goes through",
            "expected other arguments: elements are told apart by their values",
        ),
        (
            {"outputs": ("a", "a")},
            "has outputs=('a', 'a'), so two of its values have one name",
            "give each output a name of its own",
        ),
        (
            {"outputs": ("fit",)},
            "has outputs=('fit',), so two of its values have one name",
            "give each output a name of its own",
        ),
    ],
)
def test_options_that_do_not_fit_the_function_are_errors(
    options: dict[str, Any], problem: str, advice: str
) -> None:
    with pytest.raises(StepError) as caught:
        Step(fit, **options)
    assert str(caught.value) == f"step 'fit' {problem}\n{FIT}{advice}"


def test_arguments_without_names_are_an_error_that_names_the_way_out() -> None:
    def collect(a: int, *rest: int) -> None: ...

    with pytest.raises(StepError) as caught:
        step(collect)
    assert str(caught.value) == (
        "step 'collect' has arguments without names (*args, **kwargs, or no readable signature), "
        "which cannot be edges\n"
        f"  collect(a, *rest) at {locate(collect)}\n"
        "  expected named arguments; or name them by args={argument: value}"
    )
    assert caught.value.step == "collect"


@pytest.mark.parametrize(
    ("decorate", "message"),
    [
        (
            lambda: step(retrys=2),
            "@step has no option 'retrys'\n"
            "  known options: after, args, cache, ignore, local, map, name, outputs, retries, "
            "retry_backoff, retry_delay, version; did you mean 'retries'?",
        ),
        (
            lambda: sensor(cache=True),
            "@sensor has no option 'cache'\n"
            "  known options: after, args, local, name, outputs, poke_interval, retries, "
            "retry_backoff, retry_delay, soft_fail, timeout",
        ),
        (
            lambda: sensor(poke_interval=-1)(fit),
            "step 'fit' has poke=_Poke(interval=-1, timeout=3600.0, soft_fail=False)\n"
            f"{FIT}poke: expected seconds (0 or more) as interval and timeout, True or False as "
            "soft_fail",
        ),
        (
            lambda: step(functools.partial(pow, 2)),
            "@step was given functools.partial(<built-in function pow>, 2), which is not a "
            "function\n  a class, a partial or a callable object becomes a step by "
            "Step(thing, name=...)",
        ),
        (
            lambda: Step(3),  # type: ignore[arg-type]
            "Step() was given 3; expected a callable",
        ),
    ],
)
def test_wrong_uses_of_the_decorators_are_errors(decorate: Callable[[], Any], message: str) -> None:
    with pytest.raises(StepError) as caught:
        decorate()
    assert str(caught.value) == message


def test_an_error_of_a_decorator_has_no_frames_of_dagkit_but_one() -> None:
    with pytest.raises(StepError) as caught:
        step(retries=-1)(fit)
    assert len(traceback.extract_tb(caught.value.__traceback__)) <= 3


def test_a_lambda_without_a_name_is_an_error() -> None:
    nameless = lambda x: x  # noqa: E731
    with pytest.raises(StepError, match="step '<lambda>' has name='<lambda>'"):
        Step(nameless)


@dataclasses.dataclass
class Weights:
    """A callable that compares by value, and whose values are arrays."""

    array: Any

    def __call__(self, x: int) -> Any:
        return self.array * x


def test_steps_are_frozen_and_equal_by_what_they_are() -> None:
    one, twin = Step(spread), Step(spread)
    assert one == twin
    assert hash(one) == hash(twin)
    assert one != Step(spread, retries=1)
    assert one != "spread"
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(AttributeError):
        one.name = "other"  # type: ignore[misc]


def test_a_redefined_callable_that_holds_arrays_is_a_new_step() -> None:
    steps = {"scaled": Weights(np.array([1, 2]))}
    pipeline = Pipeline(steps)
    assert list(pipeline.run(x=1)["scaled"]) == [1, 2]
    steps["scaled"] = Weights(np.array([3, 4]))
    assert list(pipeline.run(x=1)["scaled"]) == [3, 4]
    assert Step(Weights(np.zeros(2)), name="a") != Step(Weights(np.zeros(2)), name="a")


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_required_is_one_object(clone: Callable[[Any], Any]) -> None:
    assert clone(REQUIRED) is REQUIRED
    assert repr(REQUIRED) == "<required>"


########################################################################################
### Graph
########################################################################################


def test_the_graph_has_all_names_with_a_value(shop: Pipeline) -> None:
    graph = shop.graph
    assert isinstance(graph, nx.DiGraph)
    assert {name: graph.nodes[name]["kind"] for name in graph} == {
        "prices": "input",
        "digits": "input",
        "total": "step",
        "mean": "step",
        "bounds": "step",
        "low": "output",
        "high": "output",
        "spread": "step",
    }
    assert {edge: graph.edges[edge]["kind"] for edge in graph.edges} == {
        ("prices", "total"): "value",
        ("total", "mean"): "value",
        ("prices", "mean"): "value",
        ("digits", "mean"): "value",
        ("prices", "bounds"): "value",
        ("bounds", "low"): "output",
        ("bounds", "high"): "output",
        ("low", "spread"): "value",
        ("high", "spread"): "value",
    }
    steps = [graph.nodes[name]["step"] for name in ("low", "bounds", "prices")]
    assert steps == ["bounds", "bounds", ""]


def test_the_graph_is_a_frozen_copy(shop: Pipeline) -> None:
    graph = shop.graph
    with pytest.raises(nx.NetworkXError):
        graph.remove_node("total")
    graph.nodes["total"]["step"] = None
    assert shop.run("mean", prices=[1, 2])["mean"] == 1.5


def test_the_graph_can_be_written_to_every_format(shop: Pipeline, tmp_path: Path) -> None:
    graph = Pipeline(shop, Step(lambda: 1, name="notify", after="mean")).graph
    edges = set[Any](graph.edges(data="kind"))
    assert ("mean", "notify", "after") in edges
    nx.write_graphml(graph, tmp_path / "x.graphml")
    nx.write_gexf(graph, tmp_path / "x.gexf")
    nx.write_gml(graph, tmp_path / "x.gml")
    for twin in (
        nx.read_graphml(tmp_path / "x.graphml"),
        nx.read_gexf(tmp_path / "x.gexf"),
        nx.read_gml(tmp_path / "x.gml"),
        nx.node_link_graph(nx.node_link_data(graph, edges="edges"), edges="edges"),
    ):
        assert set(twin.edges(data="kind")) == edges
        assert twin.nodes["low"]["step"] == "bounds"


def test_steps_and_inputs_are_readable(shop: Pipeline) -> None:
    assert list(shop.steps) == ["total", "mean", "bounds", "spread"]
    assert shop.steps["bounds"].outputs == ("low", "high")
    assert shop.inputs == {"prices": REQUIRED, "digits": 2}
    for mapping in (shop.steps, shop.inputs):
        with pytest.raises(TypeError):
            mapping["total"] = 1  # type: ignore[index]


def test_a_cycle_error_shows_a_shortest_cycle_with_locations() -> None:
    def clean(fit: int, raw: int) -> None: ...
    def fit(clean: int, detour: int) -> None: ...
    def detour(longer: int) -> None: ...
    def longer(clean: int) -> None: ...

    with pytest.raises(CycleError) as caught:
        Pipeline(detour, longer, clean, fit).run()
    assert str(caught.value) == (
        "steps depend on each other: clean -> fit -> clean\n"
        f"  clean(fit, raw) at {locate(clean)}\n"
        f"  fit(clean, detour) at {locate(fit)}\n"
        "  rename an argument, so that it is an input"
    )
    assert caught.value.cycle == ("clean", "fit", "clean")


@pytest.mark.parametrize(
    ("steps", "cycle"),
    [
        ([Step(lambda clean: 1, name="clean")], "clean clean"),
        (
            [
                Step(lambda model: (1, 2), name="split", outputs=("train", "test")),
                Step(lambda train: 1, name="model"),
            ],
            "split model split",
        ),
        (
            [Step(lambda: 1, name="a", after="b"), Step(lambda: 1, name="b", after="a")],
            "a b a",
        ),
        ([Step(lambda: 1, name="a", after="a")], "a a"),
    ],
    ids=["self-loop", "through an output", "by after=", "after itself"],
)
def test_a_cycle_names_only_steps(steps: list[Step], cycle: str) -> None:
    with pytest.raises(CycleError) as caught:
        Pipeline(steps).graph  # noqa: B018
    assert caught.value.cycle == tuple(cycle.split())


def test_a_cycle_of_thousands_is_found_and_fits_on_a_screen() -> None:
    ring = [make_function(f"s{i}", f"s{(i + 1) % 5000}") for i in range(5000)]
    with pytest.raises(CycleError) as caught:
        Pipeline(ring).run()
    assert len(caught.value.cycle) == 5001
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("steps depend on each other: s0 -> s4999 -> s4998 -> ")
    assert lines[0].endswith(" -> … 4988 more … -> s0")
    assert len(lines) == 14


def test_a_duplicate_error_names_both_locations_of_all_duplicates() -> None:
    other = types.ModuleType("other")
    exec("def total(x): ...\ndef mean(y): ...", vars(other))
    with pytest.raises(StepError) as caught:
        Pipeline(total, mean, other).run()
    assert str(caught.value) == (
        "two steps produce a value 'total'\n"
        f"  total(prices) at {locate(total)}\n"
        "  total(x) at <string>:1\n"
        "two steps produce a value 'mean'\n"
        f"  mean(total, prices, digits=2) at {locate(mean)}\n"
        "  mean(y) at <string>:2\n"
        "  give one of them another name: @step(name=...)"
    )
    assert caught.value.name == "total"


def test_the_same_step_from_two_sources_is_one_step(shop: Pipeline) -> None:
    assert list(Pipeline(shop, total, [bounds]).steps) == list(shop.steps)


def test_an_output_with_the_name_of_another_step_is_a_duplicate() -> None:
    with pytest.raises(StepError, match="two steps produce a value 'total'"):
        Pipeline(total, Step(lambda: (1,), name="split", outputs=("total",))).run()


def test_two_defaults_of_one_input_are_an_error_that_names_both_steps() -> None:
    def one(alpha: float = 0.1) -> None: ...
    def two(alpha: float = 0.2) -> None: ...

    with pytest.raises(StepError) as caught:
        Pipeline(one, two).run()
    assert str(caught.value) == (
        "input 'alpha' has two defaults: 0.1 and 0.2\n"
        f"  one(alpha=0.1) at {locate(one)}\n"
        f"  two(alpha=0.2) at {locate(two)}\n"
        "  make them equal, or rename one of the arguments"
    )
    assert caught.value.name == "alpha"


NAN = math.nan
ARRAY = np.zeros(2)


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        (1000, int("1000"), True),
        (NAN, NAN, True),
        (ARRAY, ARRAY, True),
        (True, 1, False),
        (1, 1.0, False),
        (ARRAY, ARRAY.copy(), False),
    ],
)
def test_defaults_are_equal_by_type_and_value(one: Any, other: Any, are_equal: bool) -> None:
    def use(x: Any = one) -> bool:
        return x is one

    def use_too(x: Any = other) -> bool:
        return x is one

    if are_equal:
        assert dict(Pipeline(use, use_too).run()) == {"use": True, "use_too": True}
    else:
        with pytest.raises(StepError, match="input 'x' has two defaults"):
            Pipeline(use, use_too).run()


def test_a_default_of_one_step_serves_another_without() -> None:
    def one(alpha: int = 3) -> int:
        return alpha

    def two(alpha: int) -> int:
        return -alpha

    assert dict(Pipeline(two, one).run()) == {"two": -3, "one": 3}


def test_the_value_of_a_step_goes_before_a_default() -> None:
    def alpha() -> int:
        return 5

    def use(alpha: int = 1) -> int:
        return alpha

    assert Pipeline(alpha, use).run("use")["use"] == 5


@pytest.mark.parametrize(
    ("argument", "is_near"),
    [
        *[(name, True) for name in ("claen", "cleen", "clea", "cleans", "lean")],
        *[(name, False) for name in ("clever", "x", "dirty", "naelc", "celna")],
    ],
)
def test_an_argument_with_a_default_that_is_one_typo_from_a_step_is_a_warning(
    argument: str, is_near: bool
) -> None:
    """Elsewhere the typo silently drops an edge."""
    clean = make_function("clean")
    fit = make_function("fit", f"{argument}=None", body="return 1")
    pipeline = Pipeline(clean, fit)
    if not is_near:
        assert pipeline.run("fit")["fit"] == 1
        return
    with pytest.warns(DagkitWarning) as caught:
        pipeline.run("fit")
    assert [str(warning.message) for warning in caught] == [
        f"step 'fit' has an argument '{argument}' with a default, and there is a value 'clean': "
        f"is it a typo? As it stands, '{argument}' is an input\n"
        f"  fit({argument}=None) at <string>:1"
    ]
    assert (caught[0].filename, caught[0].lineno) == ("<string>", 1)


def test_numbered_names_are_not_typos() -> None:
    Pipeline(make_function("fold1"), make_function("use", "fold3=0")).run()


def test_after_names_steps_and_outputs_only() -> None:
    last = Step(lambda prices: 1, name="last", after=("totl", "prices"))
    with pytest.raises(StepError) as caught:
        Pipeline(total, last).run()
    assert str(caught.value).splitlines()[::2] == [
        "step 'last' runs after 'prices', 'totl', but no step produces it",
        "  known names: last, total; did you mean 'total' for 'totl'?",
    ]


@pytest.mark.libraries
@pytest.mark.slow
def test_hamilton_decorators_that_change_values_are_an_error_that_names_them() -> None:
    modifiers: Any = importlib.import_module("hamilton.function_modifiers")

    def sized(x: int) -> int:
        return x

    def fields() -> dict[str, int]:
        return {"a": 1}

    def plain(y: int) -> int:
        return y

    modifiers.parameterize(small={"x": modifiers.value(1)}, large={"x": modifiers.value(2)})(sized)
    modifiers.extract_fields({"a": int})(fields)
    modifiers.tag(owner="me")(fields)
    modifiers.tag(owner="me")(plain)
    module = types.ModuleType("flow")
    for function in (sized, fields, plain):
        function.__module__ = "flow"
        setattr(module, function.__name__, function)
    with pytest.raises(StepError) as caught:
        Pipeline(module).run()
    assert str(caught.value) == (
        "decorators of Hamilton change what a function does, but dagkit calls it without them\n"
        f"  @parameterize of sized(x) at {locate(sized)}\n"
        f"  @extract_fields of fields() at {locate(fields)}\n"
        "  write these functions without them, or mark the steps of the module by @step"
    )
    assert Pipeline(plain).run(y=2)["plain"] == 2


########################################################################################
### Order
########################################################################################


def test_only_what_the_target_needs_runs(shop: Pipeline) -> None:
    run = shop.run("mean", prices=[1.0, 2.0])
    assert list(run.steps) == ["total", "mean"]
    assert dict(run) == {"mean": 1.5}


def test_no_target_means_all_steps_and_outputs(shop: Pipeline) -> None:
    assert dict(shop.run(prices=[1, 2, 6])) == {
        "total": 9,
        "mean": 3.0,
        "bounds": (1, 6),
        "low": 1,
        "high": 6,
        "spread": 5,
    }


@pytest.mark.parametrize(
    ("target", "inputs", "value", "steps"),
    [
        ("mean", {"total": 10, "prices": [1, 2]}, 5.0, "mean"),
        ("high", {"prices": [1, 6]}, 6, "bounds"),
        ("spread", {"low": -1, "prices": [1, 6]}, 7, "bounds spread"),
        ("spread", {"low": 1, "high": 4}, 3, "spread"),
        ("spread", {"bounds": (2, 9)}, 7, "spread"),
        ("low", {"bounds": {"high": 9, "low": 2}}, 2, ""),
        ("low", {"bounds": (2, 9), "low": 5}, 5, ""),
        ("bounds", {"low": 5, "prices": [1, 6]}, (1, 6), "bounds"),
        ("digits", {}, 2, ""),
        ("total", {"total": 4}, 4, ""),
    ],
)
def test_any_value_can_be_a_target_or_given(
    shop: Pipeline, target: str, inputs: dict[str, Any], value: Any, steps: str
) -> None:
    """What serves only a given value does not run."""
    run = shop.run(target, **inputs)
    assert (run[target], " ".join(run.steps)) == (value, steps)


def test_a_given_step_must_fit_its_outputs(shop: Pipeline) -> None:
    with pytest.raises(ResultError, match="has 2 outputs"):
        shop.run("spread", bounds=(1, 2, 3))


@pytest.mark.parametrize(
    ("targets", "inputs", "problem", "suggestion", "unknown"),
    [
        (["men"], {"prices": []}, "'men'", "'mean'", ("men",)),
        (
            ["mean"],
            {"price": [], "digit": 1, "zzz": 0},
            "'digit', 'price', 'zzz'",
            "'digits' for 'digit', 'prices' for 'price'",
            ("digit", "price", "zzz"),
        ),
        (
            ["men"],
            {"price": []},
            "'men', 'price'",
            "'mean' for 'men', 'prices' for 'price'",
            ("men", "price"),
        ),
    ],
)
def test_unknown_names_come_all_at_once_with_the_nearest_ones(
    shop: Pipeline,
    targets: list[str],
    inputs: dict[str, Any],
    problem: str,
    suggestion: str,
    unknown: tuple[str, ...],
) -> None:
    for call in (shop.run, shop.plan):
        with pytest.raises(InputError) as caught:
            call(*targets, **inputs)
        assert str(caught.value) == (
            f"run() names {problem}, but no step produces or uses it\n"
            "  known names: bounds, digits, high, low, mean, prices, spread, total; "
            f"did you mean {suggestion}?"
        )
        assert caught.value.unknown == unknown


@pytest.mark.parametrize("target", [total, ["mean"], {"prices": [1]}, None, np.zeros(2)])
def test_a_target_that_is_not_a_name_is_an_error(shop: Pipeline, target: Any) -> None:
    with pytest.raises(InputError, match=r"cannot be a target of run\(\): targets are names"):
        shop.run(target)


def test_missing_inputs_come_all_at_once_with_locations() -> None:
    def fit(dta: int, alpha: float = 0.1) -> None: ...
    def plot(fit: int, colour: str, data: int) -> None: ...

    with pytest.raises(InputError) as caught:
        Pipeline(fit, plot).run(data=1)
    assert str(caught.value) == (
        "step 'fit' needs 'dta', but no step produces it and run() was not given it\n"
        f"  fit(dta, alpha=0.1) at {locate(fit)}\n"
        "step 'plot' needs 'colour', but no step produces it and run() was not given it\n"
        f"  plot(fit, colour, data) at {locate(plot)}\n"
        "  known names: alpha, data, fit, plot; did you mean 'data' for 'dta'?"
    )
    assert caught.value.missing == ("dta", "colour")


def test_an_input_as_target_must_be_given(shop: Pipeline) -> None:
    with pytest.raises(InputError) as caught:
        shop.run("prices")
    assert str(caught.value).startswith("target 'prices' is an input, but run() was not given it\n")


def test_inputs_of_other_steps_need_no_value(shop: Pipeline) -> None:
    def lonely(unheard: int) -> None: ...

    assert Pipeline(shop, lonely).run("total", prices=[1])["total"] == 1


def test_steps_declared_in_order_run_in_that_order(shop: Pipeline) -> None:
    assert list(shop.run(prices=[1, 2]).steps) == ["total", "mean", "bounds", "spread"]


def test_a_step_runs_after_others_without_taking_their_values() -> None:
    calls: list[str] = []

    def notify(x: int = 1) -> int:
        calls.append("notify")
        return x

    def check() -> None:
        calls.append("check")

    steps = [Step(notify, after=("check", "low")), check, bounds]
    run = Pipeline(steps).run("notify", prices=[1, 2])
    assert (dict(run), sorted(run.steps)) == ({"notify": 1}, ["bounds", "check", "notify"])
    assert calls == ["check", "notify"]
    given = Pipeline(steps).run("notify", check=None, bounds=(1, 2))
    assert list(given.steps) == ["notify"]
    given = Pipeline(steps).run("notify", check=None, low=1)
    assert list(given.steps) == ["notify"]


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_a_step_is_skipped_if_what_it_runs_after_failed_or_was_skipped(outcome: str) -> None:
    def check() -> None:
        raise Skip("closed") if outcome == "skipped" else ValueError

    notify = Step(lambda check=1: check, name="notify", after="check")
    run = Pipeline(check, notify, on_error="continue").run()
    assert [(s.status, s.reason) for s in run.steps.values()][-1] == ("skipped", "needs check")


@pytest.mark.slow
def test_the_order_is_the_same_under_other_hash_seeds() -> None:
    code = """
        import random
        from dagkit import Pipeline
        draw, functions = random.Random(1), []
        for i in range(300):
            needs = draw.sample([f"s{j}" for j in range(i)], min(i, 3))
            exec(f"def s{i}({', '.join(needs)}): return {i}")
            functions.append(locals()[f"s{i}"])
        draw.shuffle(functions)
        print(*Pipeline(functions).run("s299", "s250").steps)
    """
    orders = {run_python(code, PYTHONHASHSEED=seed) for seed in ("0", "1", "42")}
    assert len(orders) == 1
    assert "s299" in orders.pop()


@st.composite
def dags(draw: st.DrawFn) -> list[tuple[str, list[str]]]:
    """Draw steps in a shuffled order; each needs some of those with a smaller number."""
    steps = [("s0", list[str]())]
    for i in range(1, draw(st.integers(1, 12))):
        numbers = draw(st.sets(st.integers(0, i - 1)))
        steps.append((f"s{i}", [f"s{number}" for number in sorted(numbers)]))
    shuffled: list[tuple[str, list[str]]] = draw(st.permutations(steps))
    return shuffled


@hypothesis.given(dags(), st.data())
def test_the_order_of_any_dag_respects_its_edges(
    dag: list[tuple[str, list[str]]], data: st.DataObject
) -> None:
    functions = [make_function(name, *needs, body=f"return {name!r}") for name, needs in dag]
    pipeline = Pipeline(functions)
    targets = data.draw(st.lists(st.sampled_from([name for name, _ in dag]), unique=True))
    order = list(pipeline.run(*targets).steps)
    needs = dict(dag)
    assert all(set(needs[name]) <= set(order[:i]) for i, name in enumerate(order))
    wanted = set(targets or needs)
    assert set(order) == wanted.union(*[nx.ancestors(pipeline.graph, name) for name in wanted])


########################################################################################
### Plain loop
########################################################################################


@pytest.mark.slow
def test_a_run_of_100_000_chained_steps_works() -> None:
    chain = [make_function("s0", body="return 0")]
    for i in range(1, 100_000):
        chain.append(make_function(f"s{i}", f"s{i - 1}", body=f"return s{i - 1} + 1"))
    assert Pipeline(chain).run("s99999")["s99999"] == 99_999


def test_a_fan_in_of_10_000_works() -> None:
    names = [f"s{i}" for i in range(10_000)]
    functions = [make_function(name, body="return 1") for name in names]
    functions.append(make_function("last", *names, body=f"return sum(({', '.join(names)},))"))
    assert Pipeline(functions).run("last")["last"] == 10_000


class Large:
    """A value that can be counted while it is alive."""

    alive: ClassVar[weakref.WeakSet[Large]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.data = np.ones(1000)
        self.alive.add(self)


LOOPS = pytest.mark.parametrize("retries", [0, 1], ids=["plain loop", "ready/done loop"])


@LOOPS
def test_a_chain_over_large_arrays_holds_two(retries: int) -> None:
    """Values are dropped as soon as nothing needs them."""
    counts: list[int] = []

    def grow(previous: Large | None) -> Large:
        value = Large()
        counts.append(len(Large.alive))
        return value

    steps = [Step(lambda: grow(None), name="s0", retries=retries)]
    steps += [Step(grow, name=f"s{i}", args={"previous": f"s{i - 1}"}) for i in range(1, 20)]
    run = Pipeline(steps).run("s19")
    assert isinstance(run["s19"], Large)
    assert max(counts) == 2
    assert len(Large.alive) == 1


@LOOPS
def test_a_value_that_nothing_needs_is_dropped_at_once(retries: int) -> None:
    def make() -> tuple[Large, int]:
        return Large(), 1

    def last(small: int) -> tuple[int, int]:
        return small, len(Large.alive)

    make_step = Step(make, outputs=("large", "small"), retries=retries)
    assert Pipeline(make_step, last).run("last")["last"] == (1, 0)


@LOOPS
def test_the_error_of_a_run_keeps_no_values_in_memory(retries: int) -> None:
    def fail() -> None:
        raise LookupError

    def use(large: Large, fail: int) -> None: ...

    with pytest.raises(LookupError) as caught:
        Pipeline(Step(Large, name="large", retries=retries), fail, use).run("large", "use")
    assert caught.value.__traceback__ is not None
    assert len(Large.alive) == 0


def failing(total: float, table: Any) -> None:
    raise LookupError("no such column")


@LOOPS
def test_an_exception_keeps_type_and_traceback_and_gains_one_note(
    shop: Pipeline, retries: int
) -> None:
    pipeline = Pipeline(shop, Step(failing, retries=retries))
    with pytest.raises(LookupError, match="no such column") as caught:
        pipeline.run("failing", prices=[1], table=np.zeros((2, 3)))
    assert caught.value.__notes__ == [
        f"in step 'failing' at {locate(failing)}, with total=1, table=ndarray(2 x 3 float64)"
    ]
    frames = traceback.extract_tb(caught.value.__traceback__)
    names = [frame.name for frame in frames if frame.filename == dagkit.__file__]
    assert (names, frames[-1].name) == (["run"], "failing")


def test_an_error_of_dagkit_gains_no_note_and_has_one_frame_of_it(shop: Pipeline) -> None:
    pipeline = Pipeline(shop, {"rows": lambda: iter([1])})
    calls: list[Callable[[], Any]] = [
        lambda: pipeline.run("rows"),
        lambda: shop.run("men"),
        lambda: shop.run(),
    ]
    for call in calls:
        with pytest.raises(DagkitError) as caught:
            call()
        assert not hasattr(caught.value, "__notes__")
        frames = traceback.extract_tb(caught.value.__traceback__)
        assert [f.name for f in frames if f.filename == dagkit.__file__] == ["run"]


def test_an_error_of_a_pipeline_inside_a_step_names_the_step(shop: Pipeline) -> None:
    def outer() -> None:
        shop.run("men")

    with pytest.raises(InputError) as caught:
        Pipeline(outer).run()
    assert caught.value.__notes__ == [f"in step 'outer' at {locate(outer)}"]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ((1, 2, 3), "3 values"),
        ((1,), "1 value"),
        ({"train": 1, "tst": 2}, "a dict with the keys train, tst"),
        (np.zeros(2), "ndarray(2 float64)"),
        ("ab", "'ab'"),
        (None, "None"),
    ],
)
def test_a_wrong_number_of_outputs_is_an_error_that_says_what_was_returned(
    result: Any, text: str
) -> None:
    def split() -> Any:
        return result

    with pytest.raises(ResultError) as caught:
        Pipeline(Step(split, outputs=("train", "test"))).run()
    assert str(caught.value) == (
        f"step 'split' has 2 outputs (train, test) but returned {text}\n"
        f"  split() at {locate(split)}\n"
        "  return a tuple of 2, or a dict with these keys"
    )


@pytest.mark.parametrize("result", [(1, 2), [1, 2], {"b": 2, "a": 1}])
def test_outputs_may_come_as_tuple_list_or_dict(result: Any) -> None:
    pipeline = Pipeline(Step(lambda: result, name="split", outputs=("a", "b")))
    assert dict(pipeline.run()) == {"split": (1, 2), "a": 1, "b": 2}


def make_generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("outputs", [(), ("a", "b")])
@pytest.mark.parametrize(
    "make_iterator",
    [
        make_generator,
        lambda: zip([1], [2], strict=True),
        lambda: map(len, []),
        lambda: iter([1]),
        lambda: enumerate("a"),
        lambda: itertools.chain("a"),
        lambda: itertools.count(),
    ],
)
def test_an_iterator_as_result_is_an_error(
    make_iterator: Callable[[], Any], outputs: tuple[str, ...]
) -> None:
    """The step that came first would use it up."""
    kind = type(make_iterator()).__name__
    with pytest.raises(ResultError) as caught:
        Pipeline(Step(make_iterator, name="rows", outputs=outputs)).run()
    assert str(caught.value) == (
        f"step 'rows' returned a {kind}, which only one step could use, once\n"
        f"  rows() at {locate(make_iterator)}\n  return a list instead"
    )


def test_an_iterator_as_input_becomes_a_list() -> None:
    pipeline = Pipeline({"one": lambda rows: list(rows), "two": lambda rows: list(rows)})
    assert dict(pipeline.run(rows=iter([1, 2]))) == {"one": [1, 2], "two": [1, 2]}


@LOOPS
def test_skip_skips_what_needs_the_value_except_an_argument_with_a_default(
    shop: Pipeline, retries: int
) -> None:
    def extra(total: float) -> None:
        raise Skip("nothing today")

    def needs_it(extra: int) -> None: ...
    def needs_that(needs_it: int) -> None: ...
    def copes(total: float, *, extra: str = "none") -> str:
        return f"{total}, {extra}"

    steps = [shop, Step(extra, retries=retries), needs_it, needs_that, copes]
    run = Pipeline(steps).run(prices=[1, 2])
    assert run["copes"] == "3, none"
    assert {n: s.reason for n, s in run.steps.items() if s.status == "skipped"} == {
        "extra": "nothing today",
        "needs_it": "needs extra",
        "needs_that": "needs needs_it",
    }
    with pytest.raises(NoValueError, match="step 'extra' was skipped: nothing today"):
        run["extra"]


@LOOPS
def test_on_error_continue_runs_all_that_does_not_depend_on_the_failure(
    shop: Pipeline, retries: int
) -> None:
    def broken(total: float) -> None:
        raise ValueError("bad\nnews")

    def after(broken: int) -> None: ...
    def copes(broken: int = 7) -> int:
        return broken

    steps = [shop, Step(broken, retries=retries), after, copes]
    run = Pipeline(steps, on_error="continue").run(prices=[1, 2])
    assert list(run.errors) == ["broken"]
    assert type(run.errors["broken"]) is ValueError
    assert {n: (s.status, s.reason) for n, s in run.steps.items() if s.status != "ran"} == {
        "broken": ("failed", ""),
        "after": ("skipped", "needs broken"),
    }
    assert (run["mean"], run["spread"], run["copes"]) == (1.5, 1, 7)
    assert run.record["steps"]["broken"]["error"] == "ValueError: bad"
    with pytest.raises(NoValueError, match="step 'broken' failed: ValueError: bad"):
        run["broken"]


@LOOPS
def test_the_first_failure_ends_the_run(retries: int) -> None:
    calls: list[str] = []
    steps = [
        Step(lambda: calls.append("one"), name="one", retries=retries),
        Step(lambda: 1 / 0, name="two"),
        Step(lambda: calls.append("three"), name="three"),
    ]
    with pytest.raises(ZeroDivisionError):
        Pipeline(steps).run()
    assert calls == ["one"]


@pytest.mark.parametrize("on_error", ["raise", "continue"])
@pytest.mark.parametrize("kind", ["plain", "coroutine", "retries"])
def test_system_exit_ends_the_run(on_error: Any, kind: str) -> None:
    async def leave() -> None:
        await asyncio.sleep(0)
        raise SystemExit(3)

    def fail() -> Any:
        if kind == "coroutine":
            return leave()
        sys.exit(3)

    steps = [Step(fail, retries=int(kind == "retries")), Step(lambda: 1, name="other")]
    with pytest.raises(SystemExit) as caught:
        Pipeline(steps, on_error=on_error).run()
    assert caught.value.code == 3


def make_flaky(failures: int) -> tuple[Callable[[], int], list[float]]:
    """Make a function that raises so many times before it returns the number of its calls."""
    calls: list[float] = []

    def attempt() -> int:
        calls.append(time.monotonic())
        if len(calls) <= failures:
            raise ConnectionError(f"call {len(calls)}")
        return len(calls)

    return attempt, calls


def test_retries_are_extra_tries() -> None:
    attempt, calls = make_flaky(2)
    pipeline = Pipeline(Step(attempt, name="get", retries=2), Step(lambda get: get, name="use"))
    run = pipeline.run()
    assert (run["use"], run.steps["get"].attempts, run.steps["get"].status) == (3, 3, "ran")
    attempt, calls = make_flaky(3)
    with pytest.raises(ConnectionError, match="call 3") as caught:
        Pipeline(Step(attempt, name="get", retries=2)).run()
    assert len(calls) == 3
    assert len(caught.value.__notes__) == 1


def test_retry_delays_grow_by_the_backoff() -> None:
    attempt, calls = make_flaky(2)
    Pipeline(Step(attempt, name="get", retries=2, retry_delay=0.02, retry_backoff=3)).run()
    assert calls[1] - calls[0] >= 0.02
    assert calls[2] - calls[1] >= 0.06


def test_a_huge_backoff_is_a_delay_of_a_day_at_most() -> None:
    get = Step(lambda: 1, name="get", retries=9999, retry_delay=1, retry_backoff=1e10)
    assert [find_delay(get, attempt) for attempt in (1, 2, 9999)] == [1, 86_400, 86_400]


def test_other_steps_run_while_one_waits_for_its_next_try() -> None:
    other = threading.Event()

    def attempt() -> bool:
        if not other.is_set():
            raise OSError("not yet")
        return True

    steps = [Step(attempt, name="get", retries=1, retry_delay=0.1), Step(other.set, name="other")]
    assert Pipeline(steps).run()["get"] is True


def test_skips_and_wrong_results_are_not_tried_again() -> None:
    calls: list[int] = []

    def skip() -> None:
        calls.append(1)
        raise Skip

    def rows() -> Any:
        calls.append(2)
        return make_generator()

    Pipeline(Step(skip, retries=3), Step(rows, retries=3), on_error="continue").run()
    assert calls == [1, 2]


def test_async_steps_run_and_overlap() -> None:
    """Each waits for the other: one after the other they would never end."""
    here: list[int] = []
    there: list[int] = []

    async def meet(mine: list[int], other: list[int]) -> int:
        mine.append(1)
        while not other:
            await asyncio.sleep(0.001)
        return 1

    async def one() -> int:
        return await asyncio.wait_for(meet(here, there), 10)

    async def two() -> int:
        return await asyncio.wait_for(meet(there, here), 10)

    def both(one: int, two: int) -> int:
        return one + two

    assert Pipeline(one, two, both).run("both")["both"] == 2


def test_async_steps_run_inside_a_running_event_loop() -> None:
    async def fetch(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    async def main() -> int:
        value: int = Pipeline(fetch, Step(lambda fetch: -fetch, name="use")).run("use", x=1)["use"]
        return value

    assert asyncio.run(main()) == -2


def test_async_steps_share_one_event_loop() -> None:
    async def one() -> int:
        return id(asyncio.get_running_loop())

    async def two(one: int) -> bool:
        return id(asyncio.get_running_loop()) == one

    assert Pipeline(one, two).run("two")["two"] is True


def test_async_failures_retries_and_skips_are_as_others() -> None:
    calls: list[int] = []

    async def get() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("again")
        return len(calls)

    async def skipped(get: int) -> None:
        raise Skip("no")

    async def broken(get: int) -> None:
        raise ValueError("bad")

    run = Pipeline(Step(get, retries=2), skipped, broken, on_error="continue").run()
    assert {name: state.status for name, state in run.steps.items()} == {
        "get": "ran",
        "skipped": "skipped",
        "broken": "failed",
    }
    assert run.errors["broken"].__notes__ == [f"in step 'broken' at {locate(broken)}, with get=3"]


@pytest.mark.parametrize("is_in_event_loop", [False, True])
def test_a_callable_that_returns_a_coroutine_is_awaited(is_in_event_loop: bool) -> None:
    async def fetch(x: int) -> int:
        await asyncio.sleep(0)
        return x

    steps = {"first": lambda: 1, "second": lambda first: fetch(first + 1)}

    async def main() -> Any:
        return Pipeline(steps).run("second")["second"]

    if is_in_event_loop:
        assert asyncio.run(main()) == 2
    else:
        assert Pipeline(steps).run("second")["second"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT for one process")
@pytest.mark.parametrize("kind", ["plain", "retry", "async"])
def test_ctrl_c_passes_through_untouched(kind: str) -> None:
    """A real SIGINT, while a step runs, a retry waits, a coroutine sleeps."""
    code = {
        "plain": "def slow():\n    ready(); time.sleep(60)",
        "retry": "@step(retries=1, retry_delay=60)\ndef slow():\n    ready(); raise OSError",
        "async": "async def slow():\n    ready(); await asyncio.sleep(60)",
    }[kind]
    script = (
        "import asyncio, time\nfrom dagkit import *\n"
        "def ready(): print('ready', flush=True)\n"
        f"{code}\n"
        "try: Pipeline(slow).run()\n"
        "except KeyboardInterrupt as error: print('stopped', getattr(error, '__notes__', None))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        notes = None
        if kind == "plain":  # it interrupted the step itself
            notes = ["in step 'slow' at <string>:4"]
        assert process.communicate(timeout=30)[0] == f"stopped {notes}\n"
        assert process.returncode == 0


def test_a_pipeline_runs_inside_a_step_and_in_many_threads(shop: Pipeline) -> None:
    def nested(prices: list[float]) -> Any:
        return shop.run("mean", prices=prices)["mean"]

    pipeline = Pipeline(nested)
    results: list[Any] = []

    def run_one(number: int) -> None:
        results.append(pipeline.run(prices=[number, number])["nested"])

    threads = [threading.Thread(target=run_one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(8))


@LOOPS
@hypothesis.given(dags(), st.randoms(use_true_random=False))
@hypothesis.settings(deadline=None)
def test_failures_and_skips_agree_with_a_model(
    retries: int, dag: list[tuple[str, list[str]]], draw: random.Random
) -> None:
    """In any DAG a step runs exactly if all that it needs ran; both loops agree on the values."""
    fates = {name: draw.choice(["ran", "ran", "ran", "failed", "skipped"]) for name, _ in dag}
    steps = []
    for name, needs in dag:
        body = {
            "ran": f"return 1 + sum(({''.join(f'{need},' for need in needs)}))",
            "failed": "raise ValueError",
            "skipped": "raise Skip('x')",
        }[fates[name]]
        function = make_function(name, *needs, body=body)
        function.__globals__["Skip"] = Skip
        steps.append(Step(function, retries=retries if name == "s0" else 0))
    values: dict[str, int] = {}
    statuses: dict[str, str] = {}
    for name, needs in sorted(dag, key=lambda item: int(item[0][1:])):
        statuses[name] = "skipped"
        if all(statuses[need] == "ran" for need in needs):
            statuses[name] = fates[name]
        if statuses[name] == "ran":
            values[name] = 1 + sum(values[need] for need in needs)
    run = Pipeline(steps, on_error="continue").run()
    assert dict(run) == values
    assert {name: state.status for name, state in run.steps.items()} == statuses


########################################################################################
### Fingerprint
########################################################################################

# Edits of code, one a line: name :: code. ⏎ ends a line of the code (it may also begin a line of
# the table), "= x" is short for "def step(x): return x", ▸ begins another file. Each «old→new» is
# an edit of its own.

KEEPING_EDITS = r'''
comment :: «# one→# two, longer⏎»⏎= x
docstring edited :: def step(x):⏎    """«doc→other»"""⏎    return x + 1
docstring added, returns None :: def step(x):⏎«    #D→    """D."""»⏎    print(x, None, 'a')
annotation :: def step(«x: int→x: float»):⏎    return x
future annotations :: «#F→from __future__ import annotations»⏎= x
unrelated function :: def other(): «return 5→return 6»⏎= x
attribute named as a function :: def clean(): «return 5→return 6»⏎= x.clean()
class moved :: «#A→⏎⏎»⏎class M:⏎    def f(self): self.a = 1⏎= M().f()
methods swapped :: class M:⏎«    def f(self): return 1⏎    def g(self): return 2
⏎→    def g(self): return 2⏎    def f(self): return 1⏎»= M().f()
local class docstring edited :: def step(x):⏎    class L:⏎        """«doc→other»"""⏎        a = 1
⏎    return L.a
local class moved :: «#A→⏎⏎»⏎def step(x):⏎    class L:⏎        def f(self): self.z = self.y = 1
⏎    return L.f
set written in another order :: T = «{1, 'b', 'c'}→{'c', 1, 'b'}»⏎= x in T
frozenset constant in another order :: = x in «{'a', 'b', 'c'}→{'c', 'b', 'a'}»
nested docstring :: def step(x):⏎    def inner():⏎        """«doc→dok»"""⏎        return x
⏎    return inner()
logger constant :: import logging⏎«#A→import time»⏎log = logging.getLogger('a')⏎= log.info(x)
library wrapper docstring :: import functools⏎@functools.lru_cache⏎def h(x):⏎    """«doc→dok»"""
⏎    return x⏎= h(x)
contextmanager docstring :: import contextlib⏎@contextlib.contextmanager⏎def h(x):
⏎    """«doc→dok»"""⏎    yield x⏎= h(x)
other function of the helper module :: import helpers⏎= helpers.f(x)⏎▸helpers⏎def f(x): return x
⏎def g(): «return 5→return 6»
__name__ :: «#A→⏎»⏎import logging⏎= logging.getLogger(__name__)
cached_property docstring :: import functools⏎class M:⏎    @functools.cached_property
⏎    def p(self):⏎        "«doc→dok»"⏎        return 1⏎= M().p
comment behind an import in the body :: def step(x):⏎    from helpers import f⏎    return f(x)
⏎▸helpers⏎«#A→# B⏎»⏎def f(x): return 1⏎class C:⏎    'doc'
⏎    def g(self): self.a = self.b = self.c = 1
nan equals nan :: K = [«float('nan')→(float('inf') - float('inf'))»]⏎= K
shared objects for equal :: from fractions import Fraction as F⏎a = F(1, 3)
⏎K = «[a, a]→[a, F(1, 3)]»⏎= K
used lru_cache :: import functools⏎@functools.lru_cache⏎def h(x): return 1⏎«#A→h(7)»⏎= h(x)
abstract class used :: import abc⏎class M(abc.ABC):⏎    def f(self): return 1
⏎«#A→isinstance([], M)»⏎= isinstance(x, M)
sys.modules name in text only :: def clean(): «return 5→return 6»⏎= x['clean']
library base docstring :: import json⏎class M(json.JSONEncoder):⏎    "«doc→dok»"⏎= M().encode(x)
thread local :: import threading⏎«#A→import os»⏎L = threading.local()⏎L.a = 1⏎= L.a
thread local connection :: import threading, sqlite3⏎L = threading.local()
⏎L.c = «sqlite3.connect(':memory:')→sqlite3.connect(':memory:', timeout=3)»⏎= L.c
context variable :: import contextvars⏎«#A→import os»⏎V = contextvars.ContextVar('V', default=1)
⏎= V.get()
executor, lock, event :: import concurrent.futures, threading
⏎P = concurrent.futures.ThreadPoolExecutor(«1→2»)⏎K = threading.Lock()⏎E = threading.Event()
⏎= (P, K, E)
enum flags used :: import enum⏎class F(enum.Flag):⏎    A = 1⏎    B = 2⏎«#A→F(3)⏎~F.A»⏎= F.A
text without a reader :: «A = 1→A = 2»⏎= x + 'A'
keyword call :: «#A→⏎»⏎= sorted(x, key=len, reverse=True)
slices and ellipsis :: «#A→⏎»⏎= x[1:2, ::2, ...]
weak registry used :: import weakref⏎«#A→⏎»⏎R = weakref.WeakValueDictionary()⏎class M: pass⏎m = M()
⏎R['a'] = m⏎= R['a']
module docstring :: '«doc→dok»'⏎= x + 1
typed namedtuple moved :: import typing⏎«#A→⏎⏎»⏎class M(typing.NamedTuple):⏎    a: int
⏎    b: int = 2⏎= M(1)
type checking annotation :: from __future__ import annotations⏎import typing
⏎if typing.TYPE_CHECKING:⏎    from nowhere import T⏎def h(a: «T→T | None») -> T: return a⏎= h(x)
unrelated module text :: N = 'helpers'⏎= x⏎▸helpers⏎A = «1→2»
patched elsewhere, unrelated :: import json⏎def f(self): return «1→2»⏎= json.dumps(x)
dataclass moved :: from dataclasses import dataclass, field⏎«#A→⏎⏎»
⏎@dataclass(frozen=True, order=True)⏎class M:⏎    a: int = 1
⏎    b: list = field(default_factory=list, compare=False)⏎= M()
singledispatch used :: import functools⏎@functools.singledispatch⏎def h(x): return 1⏎@h.register
⏎def _(x: int): return 2⏎«#A→h(3)⏎h('a')»⏎= h(x)
thread pool used :: import concurrent.futures⏎P = concurrent.futures.ThreadPoolExecutor(2)
⏎«#A→P.submit(len, '').result()»⏎= P
type alias comment :: from typing import TypedDict⏎class T(TypedDict):⏎    a: int «#A→#B»⏎= T(a=1)
local function moved :: def step(x):⏎«#A→⏎    #B⏎»⏎    def f(y):⏎        return [z for z in y if z]
⏎    return f(x)
try in a class with a docstring :: def step(x):⏎    class L:⏎        «'doc'→'doc2'»⏎        try:
⏎            a = 1⏎        except Exception:⏎            a = 2⏎        for i in range(3): pass
⏎    return L.a
enum with methods moved :: import enum⏎«#A→⏎»⏎class E(str, enum.Enum):⏎    A = 'a'
⏎    def f(self): return 1⏎    @property⏎    def p(self): return 2⏎    @classmethod
⏎    def c(cls): return 3⏎= E.A.f()
abc instance checks cached :: import abc⏎class A(abc.ABC):⏎    @classmethod
⏎    def __subclasshook__(cls, c): return True⏎«#A→isinstance(1, A)⏎issubclass(int, A)»
⏎= isinstance(x, A)
contextvar set elsewhere :: import contextvars⏎V = contextvars.ContextVar('V')⏎«#A→#B»
⏎= V.get(None)
'''

CHANGING_EDITS = r"""
constant in code :: = x «+ 1→+ 2»
zero's sign :: = x * «0.0→-0.0»
default :: def step(x, «k=1→k=2»):⏎    return x + k
keyword-only default :: def step(x, *, «k=1→k=2»):⏎    return x + k
default is a function :: def h(v): «return 1→return 2»⏎def step(x, f=h):⏎    return f(x)
list comprehension :: = [v «* 2→* 3» for v in x]
nested lambda :: = list(map(lambda v: v «* 2→* 3», x))
local class attribute :: def step(x):⏎    class L:⏎        «a = 1→a = 2»⏎    return L.a
frozenset constant :: = x in {'a', «'b'→'d'», 'c'}
async :: async def h(): «return 1→return 2»⏎async def step(x): return await h()
helper :: def h(x): «return 1→return 2»⏎= h(x)
helper's helper :: def g(x): return «1→2»⏎def h(x): return g(x)«→ + 1»⏎= h(x)
recursive helpers :: def g(x): return h(x) if x else 1⏎def h(x):⏎    g(x)⏎    «return 1→return 2»
⏎= h(x)
helper as a value :: def h(x): «return 1→return 2»⏎= list(map(h, x))
constant :: «A = 1→A = 2»⏎= x + A
constant of constants :: «B = 1→B = 2»⏎A = [B, {'k': (B,)}]⏎= x + A
builtin shadowed :: «#A→def len(x): return 1»⏎= len(x)
rebound helpers :: def a(): return 1⏎def b(): return 2⏎«f, g = a, b→f, g = b, a»⏎= (f(), g())
from import as :: from helpers import f as g⏎= g(x)⏎▸helpers⏎def f(x): «return 1→return 2»
star import :: from helpers import *⏎= f(x)⏎▸helpers⏎def f(x): «return 1→return 2»
module attribute :: import helpers⏎= helpers.f(x)⏎▸helpers⏎def f(x): «return 1→return 2»
module constant :: import helpers⏎= helpers.A⏎▸helpers⏎«A = 1→A = 2»
module in a dict :: import helpers⏎B = {'h': helpers}⏎= B['h'].f(x)⏎▸helpers
⏎def f(x): «return 1→return 2»
module __getattr__ :: import helpers⏎= helpers.f⏎▸helpers
⏎def __getattr__(name): «return 1→return 2»
package submodule :: import pkg.mod⏎= pkg.mod.f(x)⏎▸pkg/__init__⏎⏎▸pkg/mod
⏎def f(x): «return 1→return 2»
relative import in a package :: from pkg.mod import f⏎= f(x)⏎▸pkg/__init__⏎⏎▸pkg/mod
⏎from . import low⏎from .low import g⏎def f(x): return g(x)⏎▸pkg/low⏎def g(x): «return 1→return 2»
re-exported by a package :: import pkg⏎= pkg.g(x)⏎▸pkg/__init__⏎from .low import g⏎▸pkg/low
⏎def g(x): «return 1→return 2»
import in the body :: def step(x):⏎    import helpers⏎    return helpers.f(x)⏎▸helpers
⏎def f(x): «return 1→return 2»
import of an import in the body :: def step(x):⏎    from helpers import f⏎    return f(x)⏎▸helpers
⏎from low import g⏎def f(x): return g(x)⏎▸low⏎def g(x): «return 1→return 2»
loaded import in the body :: import helpers as _⏎def step(x):⏎    from helpers import f
⏎    return f(x)⏎▸helpers⏎def f(x): «return 1→return 2»
relative import in the body :: from pkg.mod import f as step⏎▸pkg/__init__⏎⏎▸pkg/mod⏎def f(x):
⏎    from .low import g⏎    return g(x)⏎▸pkg/low⏎def g(x): «return 1→return 2»
dotted import in the body :: def step(x):⏎    import pkg.low as m⏎    return m.g(x)⏎▸pkg/__init__⏎
⏎▸pkg/low⏎def g(x): «return 1→return 2»
closure :: def make(k):⏎    def step(x): return x + k⏎    return step⏎step = «make(1)→make(2)»
helper's closure :: def make(k):⏎    def h(x): return x + k⏎    return h⏎h = «make(1)→make(2)»
⏎= h(x)
partial :: from functools import partial⏎def h(k, x): return x + k⏎step = partial(«h, 1→h, 2»)
partial holds a helper :: from functools import partial⏎def f(): «return 1→return 2»
⏎def h(k, x): return k()⏎step = partial(h, f)
decorator :: import functools⏎def deco(n):⏎    def outer(f):⏎        @functools.wraps(f)
⏎        def wrapper(*a): return f(*a) «+→-» n⏎        return wrapper⏎    return outer⏎@deco(«1→2»)
⏎= x * «2→3»
lru_cache :: import functools⏎@functools.lru_cache⏎def h(x): return «x * 2→x * 3»⏎= h(x)
contextmanager :: import contextlib⏎@contextlib.contextmanager⏎def h(): «yield 1→yield 2»
⏎def step(x):⏎    with h() as y: return y
singledispatch :: import functools⏎@functools.singledispatch⏎def h(x): «return 1→return 2»
⏎@h.register⏎def _(x: int): return 20⏎@h.register(list)⏎def _l(x): return 30⏎= h(x)
singledispatch registry :: import functools⏎@functools.singledispatch⏎def h(x): return 1
⏎@h.register⏎def _(x: int): return 20⏎@h.register(list)⏎def _l(x): «return 30→return 31»⏎= h(x)
singledispatchmethod :: import functools⏎class M:⏎    @functools.singledispatchmethod
⏎    def h(self, x): return 1⏎    @h.register(list)⏎    def _l(self, x): «return 30→return 31»
⏎= M().h(x)
callable object's state :: class C:⏎    def __init__(self, k): self.k = k
⏎    def __call__(self, x): return x + self.k⏎step = «C(1)→C(2)»
bound method :: class C:⏎    def __init__(self, k): self.k = k
⏎    def f(self, x): return x + self.k⏎step = «C(1)→C(2)».f
class method as step :: class C:⏎    @classmethod⏎    def f(cls, x): return «x + 1→x + 2»
⏎step = C.f
class-based decorator :: class D:⏎    def __init__(self, f): self.f = f
⏎    def __call__(self, *a): return self.f(*a)⏎@D⏎def h(x): return «x * 2→x * 3»⏎= h(x)
function attribute :: def h(x): return h.k⏎«h.k = 1→h.k = 2»⏎= h(x)
class :: class B:⏎    a = «1→2»⏎    t = {'k': «5→6»}⏎    def f(self): return «10→11»⏎    @property
⏎    def p(self): return «20→21»⏎    @staticmethod⏎    def s(): return «30→31»⏎    @classmethod
⏎    def c(cls): return «40→41»⏎class M(«B→object»):⏎    def g(self): return «→-»super().f()⏎= M()
inherited method in another module :: from helpers import B⏎class M(B): pass⏎= M().f()⏎▸helpers
⏎class B:⏎    def f(self): «return 1→return 2»
instance global's state :: class M:⏎    def __init__(self, k): self.k = k⏎m = «M(1)→M(2)»⏎= m.k
__getattr__ :: class M:⏎    def __getattr__(self, n): «return 1→return 2»⏎m = M()⏎= m.z
descriptor's state :: class D:⏎    def __init__(self, k): self.k = k
⏎    def __get__(self, o, t): return self.k⏎class M:⏎    d = «D(1)→D(2)»⏎= M().d
metaclass :: class T(type):⏎    def __call__(cls): «return 1→return 2»⏎class M(metaclass=T): pass
⏎= M()
__init_subclass__ :: class B:⏎    def __init_subclass__(cls): «cls.k = 1→cls.k = 2»
⏎class M(B): pass⏎= M.k
__subclasses__ :: class B: pass⏎class M(B):⏎    def f(self): «return 1→return 2»
⏎= B.__subclasses__()[0]().f()
method monkeypatched :: class M: pass⏎def g(self): return 1⏎def h(self): return 2⏎«M.f = g→M.f = h»
⏎= M().f()
dataclass field default :: from dataclasses import dataclass⏎@dataclass⏎class M:
⏎    «a: int = 1→a: int = 2»⏎= M()
dataclass default_factory :: from dataclasses import dataclass, field
⏎def make(): «return [1]→return [2]»⏎@dataclass⏎class M:⏎    a: list = field(default_factory=make)
⏎= M()
Enum member :: from enum import Enum⏎class E(Enum):⏎    «R = 1→R = 2»⏎    G = 3⏎= E.R.value
defaultdict factory :: from collections import defaultdict⏎def h(): «return 1→return 2»
⏎d = defaultdict(h)⏎= d[x]
dispatch table :: def a(): «return 1→return 2»⏎T = {'a': a}⏎= T[x]()
list of lambdas :: T = [lambda v: «v + 1→v + 9», lambda v: v + 2]⏎= T[0](x)
registry filled elsewhere :: import impl⏎from helpers import R⏎= R['a'](x)⏎▸helpers⏎R = {}
⏎def register(f):⏎    R[f.__name__] = f⏎    return f⏎▸impl⏎from helpers import register⏎@register
⏎def a(x): «return 1→return 2»
methodcaller on a module :: from operator import methodcaller⏎import helpers
⏎call = methodcaller('f')⏎= call(helpers)⏎▸helpers⏎def f(): «return 1→return 2»
regular expression's flags :: import re⏎R = re.compile('a', «re.I→re.M»)⏎= R.match(x)
exec'd function :: ns = {}⏎exec('def h(): «return 1→return 2»', ns)⏎h = ns['h']⏎= h()
getattr on a module :: import sys⏎def f_a(): «return 1→return 2»
⏎= getattr(sys.modules[__name__], 'f_' + x)()
getattr on a project module :: import helpers⏎= getattr(helpers, 'f_' + x)()⏎▸helpers
⏎def f_a(): «return 1→return 2»
globals :: def f(): «return 1→return 2»⏎= globals()[x]()
eval :: def f(): «return 1→return 2»⏎= eval('f()')
query's @ :: «RATE = 1→RATE = 2»⏎= x.query('a > @RATE')
__dict__ of a module :: import helpers⏎= helpers.__dict__[x]()⏎▸helpers
⏎def f_a(): «return 1→return 2»
import_module :: import importlib⏎= importlib.import_module('helpers').f()⏎▸helpers
⏎def f(): «return 1→return 2»
getattr in a helper, name given by the step :: import helpers⏎= helpers.get('RATE')⏎▸helpers
⏎import sys⏎«RATE = 1→RATE = 2»⏎def get(name): return getattr(sys.modules[__name__], name)
annotations read by the step :: def h(«a: int→a: float»): return a⏎= h.__annotations__['a'](x)
annotations read by a decorator :: import functools⏎def conv(f):⏎    @functools.wraps(f)
⏎    def w(a): return f(f.__annotations__['a'](a))⏎    return w⏎@conv
⏎def h(«a: int→a: float»): return a⏎= h(x)
docstring read at run time :: def h():⏎    '«doc→dok»'⏎= h.__«doc→dok»__
singleton's state :: class T:⏎    def __reduce__(self): return 'A'⏎A = T()⏎«A.k = 1→A.k = 2»⏎= A.k
class claiming a library's module :: class M:⏎    __module__ = 'json'
⏎    def f(self): «return 1→return 2»⏎= M().f()
lru_cache method :: import functools⏎class M:⏎    @functools.lru_cache
⏎    def f(self): «return 10→return 11»⏎= M().f()
object in a default :: class M:⏎    def f(self): «return 1→return 2»⏎def step(x, m=M()):
⏎    return m.f()
inherited from a module attribute :: import helpers⏎= helpers.M.k⏎▸helpers⏎import low
⏎class M(low.B): pass⏎▸low⏎class B:⏎    «k = 1→k = 2»
chain of modules :: import helpers⏎= helpers.low.k⏎▸helpers⏎import low⏎▸low⏎«k = 1→k = 2»
module passed to a helper :: import low⏎from helpers import call⏎= call(low, x)⏎▸helpers
⏎def call(m, x): return m.f(x)⏎▸low⏎def f(x): «return 1→return 2»
module-level __getattr__'s helper :: import helpers⏎= helpers.zz⏎▸helpers
⏎def _h(): «return 1→return 2»⏎def __getattr__(name): return _h()
star import in an unloaded module :: def step(x):⏎    import helpers⏎    return helpers.k⏎▸helpers
⏎from low import *⏎▸low⏎«k = 1→k = 2»
unloaded module imports a loaded one's member :: import low as _⏎def step(x):⏎    import helpers
⏎    return helpers.g()⏎▸helpers⏎import low⏎def g(): return low.f()⏎▸low
⏎def f(): «return 1→return 2»
unloaded namespace package :: def step(x):⏎    from space.low import k⏎    return k⏎▸space/low
⏎«k = 1→k = 2»
partial of a function called partial :: import functools⏎def partial(k, x): return x + k
⏎step = functools.partial(«partial, 1→partial, 2»)
constant of a nameless namespace :: «R = 1→R = 3»⏎ns = {}⏎exec('R = 2\ndef h(): return R', ns)
⏎h = ns['h']⏎= (R, h())
query constant :: «LIMIT = 1→LIMIT = 2»⏎RULE = 'price > @LIMIT'⏎= x.query(RULE)
query in a dict of another module :: import helpers⏎«LIMIT = 1→LIMIT = 2»⏎= x.query(helpers.R['a'])
⏎▸helpers⏎R = {'a': 'price > @LIMIT'}
duckdb by alias :: from helpers import sql as q⏎«df = 1→df = 2»⏎= q('select * from df')⏎▸helpers
⏎def sql(text): return eval(text)
numexpr :: import numexpr⏎«LIMIT = 1→LIMIT = 2»⏎E = 'x + LIMIT'⏎= numexpr.evaluate(E)⏎▸numexpr
⏎def evaluate(x): return x
execute :: «df = 1→df = 2»⏎Q = 'select * from df'⏎= x.execute(Q)
compiled eval :: «LIMIT = 1→LIMIT = 2»⏎CODE = compile('LIMIT * 2', '', 'eval')⏎= eval(CODE)
attrgetter of a constant :: from operator import attrgetter⏎import helpers
⏎GET = attrgetter('LIMIT')⏎= GET(helpers)⏎▸helpers⏎«LIMIT = 1→LIMIT = 2»
formula :: def f(v): return «v→v + 1»⏎F = 'y ~ f(x)'⏎= x.from_formula(F)
text in a default :: «LIMIT = 1→LIMIT = 2»⏎def step(x, rule='a > @LIMIT'): return x.query(rule)
text in a class :: «LIMIT = 1→LIMIT = 2»⏎class C:⏎    rule = 'a > @LIMIT'⏎= x.query(C.rule)
text from a join :: «LIMIT = 1→LIMIT = 2»⏎P = ['a >', '@LIMIT']⏎= x.query(' '.join(P))
annotations by text :: class S:⏎    a: «int→float»⏎= getattr(S, '__annotations__', {})
annotations by vars :: class S:⏎    a: «int→float»⏎= vars(S).get('__annotations__')
docstring by text :: def h():⏎    '«doc→dok»'⏎= getattr(h, '__doc__')
module docstring :: '«doc→dok»'⏎= x + __doc__
helper module docstring :: import helpers⏎= helpers.__doc__⏎▸helpers⏎'«doc→dok»'
nested docstring read :: def step(x):⏎    def inner():⏎        '«doc→dok»'⏎    return inner.__doc__
local class docstring read :: def step(x):⏎    class L:⏎        '«doc→dok»'⏎    return L.__doc__
inspect.getdoc :: import inspect⏎class M:⏎    def f(self):⏎        '«doc→dok»'
⏎= inspect.getdoc(M.f)
weak value registry :: import weakref⏎R = weakref.WeakValueDictionary()⏎class M:
⏎    def __init__(self, k): self.k = k⏎m = M(«1→2»)⏎R['a'] = m⏎= R['a'].k
weak set registry :: import weakref⏎R = weakref.WeakSet()⏎class M:⏎    k = «1→2»⏎R.add(M)
⏎= [c.k for c in R]
plugins in a third module :: from base import Base⏎import plugin⏎= Base.all()⏎▸base⏎class Base:
⏎    @classmethod⏎    def all(cls): return [c().f() for c in cls.__subclasses__()]⏎▸plugin
⏎from base import Base⏎class P(Base):⏎    def f(self): return «1→2»
plugins counted :: from base import Base⏎import plugin⏎= len(Base.__subclasses__())⏎▸base
⏎class Base: pass⏎▸plugin⏎from base import Base⏎class P(Base): pass⏎«#A→class Q(Base): pass»
abc register :: import abc⏎class A(abc.ABC): pass⏎class B: pass⏎«#A→A.register(B)»
⏎= isinstance(x, A)
output stream as a default :: import sys⏎def log(m, file=sys.stderr): print(«'a'→'b'», file=file)
⏎= log(x)
output stream as a constant :: import sys⏎OUT = sys.stdout⏎= OUT.write(«'a'→'b'»)
function of the random module :: from random import choice, shuffle⏎= choice([«1→2»])
system random :: from secrets import choice⏎= choice([«1→2»])
struct :: import struct⏎S = struct.Struct('«<I→<Q»')⏎= S.size
method of a struct :: import struct⏎pack = struct.Struct('«<I→<Q»').pack⏎= pack(x)
structure of ctypes :: import ctypes⏎class S(ctypes.Structure):
⏎    _fields_ = [('a', ctypes.«c_int→c_char»)]⏎= S()
module, package and function of one name :: def step(x):⏎    from loop.std import loop
⏎    return loop(x)⏎▸loop/__init__⏎from .std import loop⏎▸loop/std⏎def loop(x): return «1→2»
builtin that was replaced :: import sys⏎h = sys.displayhook⏎sys.displayhook = print⏎= h(«1→2»)
more defaults than arguments :: def h(*a): return «1→2»⏎h.__defaults__ = (1, 2)⏎= h(x)
views of a dict :: D = {'a': 1}⏎K, V, I = D.keys(), D.values(), D.items()
⏎= [*K, *V, *I] + [«1→2»]
constant view of a dict :: K = {'a': 1, «'b'→'c'»: 2}.keys()⏎= sorted(K)
lambdas as methods of library classes :: import argparse
⏎argparse.Action.f = lambda self: 1⏎argparse.ArgumentParser.f = lambda self: 2
⏎argparse.Namespace.f = lambda self: «3→4»⏎argparse.HelpFormatter.f = lambda self: 5
⏎argparse.FileType.f = lambda self: 6⏎def step(x):
⏎    return [argparse.Action, argparse.ArgumentParser, argparse.FileType, argparse.Namespace,
⏎        argparse.HelpFormatter]
match of a pattern :: import re⏎M = re.match('(a)b?', '«ab→a»')⏎= M[0]
context manager as a decorator :: import contextlib⏎@contextlib.contextmanager
⏎def note(text):⏎    yield print(text, «1→2»)⏎@note('a')⏎def h(x): return x⏎= h(x)
argument of such a decorator :: import contextlib⏎@contextlib.contextmanager
⏎def note(text):⏎    yield print(text)⏎@note('«a→b»')⏎def h(x): return x⏎= h(x)
context variable default :: import contextvars⏎V = contextvars.ContextVar('V', default=«1→2»)
⏎= V.get()
thread local :: import threading⏎L = threading.local()⏎L.a = «1→2»⏎= L.a
function name by hand :: def h(x): return 1⏎h.__name__ = «'a'→'b'»⏎= x.agg(h)
slices :: = x[1:2, ::«2→3», ...]
keyword names :: = f(x, «a→b»=1)⏎def f(x, **k): return k
complex constant in tuple :: = x in (1j, («2j→3j», 'a'))
subclass of a logger :: import logging⏎class G(logging.Logger):⏎    def info(self, x): return «1→2»
⏎log = G('a')⏎= log.info(x)
path constant :: import pathlib⏎P = pathlib.Path(__file__).parent / 'data.py'⏎= P.read_text()⏎▸data
⏎«#A→#B»
dict of paths :: import pathlib⏎P = {'a': [pathlib.Path(__file__).parent / 'data.py']}
⏎= P['a'][0].read_text()⏎▸data⏎«#A→#B»
path in a closure :: import pathlib⏎def make(p):⏎    def step(x): return p.read_text()
⏎    return step⏎step = make(pathlib.Path(__file__).parent / 'data.py')⏎▸data⏎«#A→#B»
enum attribute :: import enum⏎class E(enum.Enum):⏎    A = 1⏎E.A.z = «1→2»⏎= E.A.z
dataclass unquoted forward reference :: from __future__ import annotations⏎import dataclasses
⏎@dataclasses.dataclass⏎class N:⏎    v: int = «1→2»⏎    next: N | None = None⏎= N()
typed namedtuple :: import typing⏎class M(typing.NamedTuple):⏎    a: int⏎    b: int = «2→3»⏎= M(1)
protocol :: import typing⏎@typing.runtime_checkable⏎class P(typing.Protocol):
⏎    def «f→g»(self): ...⏎= isinstance(x, P)
partialmethod :: import functools⏎class M:⏎    def f(self, a): return a
⏎    g = functools.partialmethod(f, «1→2»)⏎= M().g()
module by sys.modules text :: import sys, helpers as _⏎= sys.modules['helpers'].f()⏎▸helpers
⏎def f(): return «1→2»
import_module of a constant :: import importlib⏎NAME = 'helpers'
⏎= importlib.import_module(NAME).f()⏎▸helpers⏎def f(): return «1→2»
import_module of a default :: import importlib
⏎def step(x, name='helpers'): return importlib.import_module(name).f()⏎▸helpers
⏎def f(): return «1→2»
import_module of a list :: import importlib⏎NAMES = ['helpers', 'low']
⏎= [importlib.import_module(n).f() for n in NAMES]⏎▸helpers⏎def f(): return 1⏎▸low
⏎def f(): return «1→2»
relative import_module :: from pkg.mod import f as step⏎▸pkg/__init__⏎⏎▸pkg/mod⏎import importlib
⏎def f(x): return importlib.import_module('.low', __package__).g()⏎▸pkg/low⏎def g(): return «1→2»
aliased get_type_hints :: from typing import get_type_hints as hints
⏎def h(a: «int→float»): return a⏎= hints(h)
aliased getdoc :: from inspect import getdoc as doc⏎def h(a):⏎    '«a→b»'⏎= doc(h)
aliased eval :: E = eval⏎«A = 1→A = 2»⏎= E('A')
aliased getattr :: g = getattr⏎import helpers⏎= g(helpers, 'A')⏎▸helpers⏎A = «1→2»
inspect signature :: import inspect⏎def h(a: «int→float»): return a⏎= inspect.signature(h)
argparse description :: '«a→b»'⏎import argparse⏎= argparse.ArgumentParser(description=__doc__)
patched library class :: import statistics⏎def f(self): return «1→2»⏎statistics.NormalDist.foo = f
⏎= statistics.NormalDist().foo()
registry in a base class :: from base import Base⏎import plugin⏎= Base.registry['P']().f()⏎▸base
⏎class Base:⏎    registry = {}⏎    def __init_subclass__(cls): Base.registry[cls.__name__] = cls
⏎▸plugin⏎from base import Base⏎class P(Base):⏎    def f(self): return «1→2»
abc register in a third module :: from base import A⏎import plugin⏎= isinstance(x, A)⏎▸base
⏎import abc⏎class A(abc.ABC): pass⏎▸plugin⏎from base import A⏎class B: pass⏎«#A→A.register(B)»
virtual subclass of a library abc :: import numbers⏎class B: pass⏎«#A→numbers.Rational.register(B)»
⏎= isinstance(x, numbers.Rational)
singledispatch on an abc :: import functools, collections.abc⏎@functools.singledispatch
⏎def h(x): return 1⏎@h.register⏎def _(x: collections.abc.Sequence): return «2→3»⏎= h(x)
subclasses of subclasses :: from base import Base⏎import plugin
⏎def walk(c): return [c] + [w for s in c.__subclasses__() for w in walk(s)]
⏎= [c().f() for c in walk(Base)]⏎▸base⏎class Base:⏎    def f(self): return 0⏎▸plugin
⏎from base import Base⏎class P(Base): pass⏎class Q(P):⏎    def f(self): return «1→2»
descriptor set_name :: class D:⏎    def __set_name__(self, o, n): self.n = n + '«a→b»'
⏎    def __get__(self, o, t): return self.n⏎class M:⏎    d = D()⏎= M().d
metaclass prepare :: class T(type):⏎    @classmethod
⏎    def __prepare__(m, n, b): return {'k': «1→2»}⏎class M(metaclass=T): pass⏎= M.k
slots class with default :: class M:⏎    __slots__ = ('a',)
⏎    def __init__(self, a=«1→2»): self.a = a⏎= M().a
dataclass post init :: from dataclasses import dataclass⏎@dataclass⏎class M:⏎    a: int = 1
⏎    def __post_init__(self): self.a += «1→2»⏎= M()
dataclass metadata :: from dataclasses import dataclass, field, fields⏎@dataclass⏎class M:
⏎    a: int = field(default=1, metadata={'u': '«m→k»'})⏎= fields(M)[0].metadata
dataclass frozen :: from dataclasses import dataclass⏎@dataclass«(frozen=False)→(frozen=True)»
⏎class M:⏎    a: int = 1⏎= M()
total ordering :: import functools⏎@functools.total_ordering⏎class M:
⏎    def __lt__(self, o): return «True→False»⏎    def __eq__(self, o): return False⏎= M() >= M()
cache on a method :: import functools⏎class M:⏎    @functools.cache⏎    def f(self): return «1→2»
⏎    @property⏎    @functools.cache⏎    def g(self): return «3→4»⏎= M().f()
generator function :: def h():⏎    yield from range(«3→4»)⏎= list(h())
async generator :: async def h():⏎    yield «1→2»⏎async def step(x): return [y async for y in h()]
match statement :: def step(x):⏎    match x:⏎        case {'a': «1→2»}: return 1
⏎        case [_, *rest]: return rest
format spec :: = f'{x:>«10→11»}'
walrus and lambda default :: = [y for v in x if (y := v «+→-» 1)]
except star :: def step(x):⏎    try: return x⏎    except* «ValueError→TypeError» as e: print(e)
jump target :: def step(x):⏎    for i in x:⏎        if i: «continue→break»⏎        print(i)
exception range :: def step(x):⏎    try:⏎        a = x()⏎«        b = x()
⏎    except E: return 1→    except E: return 1⏎    b = x()»⏎    return 2
comparison :: = x «<→<=» 1
positional only :: def h(a, b): return a⏎def step(x«→, /»): return h(x, 1)
keyword only marker :: def h(a, «→*, »b=1): return a⏎= h(x)
local name seen by locals :: def step(x):⏎    «a→b» = 1⏎    return locals()
big integer :: = x + «10**30→10**31»
bool and int :: = x + «True→1»
tuple and frozenset constant :: = x in «(1, 2)→{1, 2}»
nested frozenset constant :: = x in {frozenset, (1, ('a', «2→3»))}
long jump :: def step(x):⏎    if x:⏎        return [«1→2», x]⏎    return x
cmp_to_key, sorted :: import functools⏎def h(a, b): return «1→2»
⏎= sorted(x, key=functools.cmp_to_key(h))
callable in a nested constant :: T = {'a': [(lambda v: v + «1→2»,)]}⏎= T['a'][0][0](x)
bound method constant :: class M:⏎    def __init__(self, k): self.k = k
⏎    def f(self): return self.k⏎F = M(«1→2»).f⏎= F()
string enum auto :: import enum⏎class E(enum.StrEnum):⏎    A = enum.auto()⏎    «B→C» = enum.auto()
⏎= list(E)
enum missing :: import enum⏎class E(enum.Enum):⏎    A = 1⏎    @classmethod
⏎    def _missing_(cls, v): return «cls.A→None»⏎= E(x)
namedtuple default :: import collections⏎P = collections.namedtuple('P', 'a b', defaults=[«1→2»])
⏎= P(1)
weak key registry :: import weakref⏎class M: pass⏎R = weakref.WeakKeyDictionary({M: «1→2»})⏎= R[M]
weak method registry :: import weakref⏎def h(): return «1→2»⏎R = [weakref.ref(h)]⏎= R[0]()()
proxy :: import types⏎P = types.MappingProxyType({'a': «1→2»})⏎= P['a']
configparser constant :: import configparser⏎C = configparser.ConfigParser()
⏎C.read_dict({'a': {'b': '«1→2»'}})⏎= C['a']['b']
decimal context :: import decimal⏎C = decimal.Context(prec=«3→4»)⏎= C.divide(x, 3)
property setter :: class M:⏎    @property⏎    def a(self): return self._a⏎    @a.setter
⏎    def a(self, v): self._a = v + «1→2»⏎def step(x):⏎    m = M()⏎    m.a = x⏎    return m.a
context manager class :: class M:⏎    def __enter__(self): return «1→2»
⏎    def __exit__(self, *a): return «True→False»⏎def step(x):⏎    with M() as m: return m
global statement :: N = «0→1»⏎def bump():⏎    global N⏎    N += 1⏎    return N⏎= bump()
deleted global :: «A = 1→#A»⏎def step(x):⏎    try: return A⏎    except NameError: return 0
conditional helper :: import sys⏎if «True→False»:⏎    def h(): return 1⏎else:⏎    def h(): return 2
⏎= h()
vars of an instance by text :: class M: pass⏎m = M()⏎m.a = «1→2»⏎= vars(m)['a']
text built by format :: «LIMIT = 1→LIMIT = 2»⏎T = 'a > @{}'.format⏎= x.query(T('LIMIT'))
text from an enum :: import enum⏎«LIMIT = 1→LIMIT = 2»⏎class Q(enum.Enum):⏎    A = 'a > @LIMIT'
⏎= x.query(Q.A.value)
text from a dataclass :: import dataclasses⏎«LIMIT = 1→LIMIT = 2»⏎@dataclasses.dataclass⏎class C:
⏎    rule: str = 'a > @LIMIT'⏎C_ = C()⏎= x.query(C_.rule)
annotations of a module by text :: import helpers⏎= getattr(helpers, '__annotations__')⏎▸helpers
⏎a: «int→float» = 1
annotations of an instance's class :: class M:⏎    a: «int→float» = 1⏎m = M()
⏎= type(m).__annotations__
dataclass fields types :: import dataclasses⏎@dataclasses.dataclass⏎class M:⏎    a: «int→float» = 1
⏎= [f.type for f in dataclasses.fields(M)]
docstring by vars :: class M:⏎    '«a→b»'⏎= vars(M)['__doc__']
"""

# The same for classes and objects of libraries: they count by what the project wrote.

LIBRARY_KEEPING_EDITS = r"""
sklearn base docstring :: from sklearn.base import BaseEstimator⏎class M(BaseEstimator):
⏎    "«doc→dok»"⏎    def fit(self): return 1⏎= M().fit()
pydantic moved :: import pydantic⏎«#A→⏎⏎»⏎class M(pydantic.BaseModel):⏎    a: int = 1⏎= M().a
sqlalchemy moved :: from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
⏎class Base(DeclarativeBase): pass⏎«#A→⏎⏎»⏎class M(Base):⏎    __tablename__ = 'm'
⏎    id: Mapped[int] = mapped_column(primary_key=True)⏎= M.__table__.name
numba comment :: from numba import njit⏎@njit⏎def h(x):⏎    «#A→#B⏎»⏎    return x + 1⏎= h(x)
pint used :: import pint⏎U = pint.UnitRegistry()⏎«#A→U.Quantity(1, 'kilometer').to('meter')»
⏎= x * U.meter
loguru :: from loguru import logger⏎«#A→logger.debug»⏎= logger.info(x)
rich console :: from rich.console import Console⏎«#A→import os»⏎C = Console()⏎= C.print(x)
attrs moved :: import attrs⏎«#A→⏎⏎»⏎@attrs.define(frozen=True, cache_hash=True)⏎class M:
⏎    a: int = 1⏎= hash(M())
lru filled of pydantic :: import pydantic⏎class M(pydantic.BaseModel):⏎    a: int = 1
⏎«#A→M(a=2).a = 3»⏎= M().a
jinja template moved :: import jinja2⏎«#A→⏎⏎»⏎T = jinja2.Template('{{ a }}')⏎= T.render(a=1)
msgspec moved :: import msgspec⏎«#A→⏎⏎»⏎class M(msgspec.Struct):⏎    a: int = 1⏎= M()
sqlalchemy attribute moved :: from sqlalchemy.orm import *
⏎class Base(DeclarativeBase):⏎    @declared_attr.directive
⏎    def __tablename__(cls): return cls.__name__⏎«#A→⏎»⏎class M(Base):
⏎    id: Mapped[int] = mapped_column(primary_key=True)⏎= M.__tablename__
sqlalchemy configured :: from sqlalchemy import ForeignKey
⏎from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, configure_mappers
⏎class Base(DeclarativeBase): pass⏎class P(Base):⏎    __tablename__ = 'p'
⏎    id: Mapped[int] = mapped_column(primary_key=True)
⏎    kids: Mapped[list['M']] = relationship(back_populates='p', order_by='M.id')⏎class M(Base):
⏎    __tablename__ = 'm'⏎    id: Mapped[int] = mapped_column(primary_key=True)
⏎    pid: Mapped[int] = mapped_column(ForeignKey('p.id'))
⏎    p: Mapped[P] = relationship(back_populates='kids')⏎«#A→configure_mappers()⏎M(id=1)»⏎= (M, P)
pydantic used :: import pydantic⏎class M(pydantic.BaseModel):⏎    a: int = 1
⏎«#A→M.model_json_schema()⏎M(a=3).a = 4⏎M.model_validate({'a': 1})»⏎= M().a
pydantic forward reference rebuilt :: from __future__ import annotations⏎import pydantic
⏎class M(pydantic.BaseModel):⏎    n: N | None = None⏎class N(pydantic.BaseModel):⏎    a: int = 1
⏎«#A→M.model_rebuild()»⏎= M(n=N())
numba used :: from numba import njit⏎@njit⏎def h(x): return x + 1⏎«#A→h(3)»⏎= h(x)
networkx constant used :: import networkx⏎G = networkx.path_graph(3)⏎«#A→G.nodes⏎G.edges»⏎= G.nodes
torch module used :: import torch⏎torch.manual_seed(0)⏎M = torch.nn.Linear(2, 2)
⏎«#A→M(torch.zeros(1, 2))»⏎= M(x)
polars constant moved :: import polars as pl⏎«#A→⏎»⏎F = pl.col('a') > 1⏎= x.filter(F)
"""

LIBRARY_CHANGING_EDITS = r"""
pydantic field :: import pydantic⏎class M(pydantic.BaseModel):⏎    a: «int→float» = «1→2»
⏎    b: str = pydantic.Field('x', max_length=«3→4»)⏎= M()
pydantic validator :: import pydantic⏎class M(pydantic.BaseModel):⏎    a: int = 1
⏎    @pydantic.field_validator('a', mode=«'before'→'after'»)⏎    @classmethod
⏎    def v(cls, x): return «x→x + 1»⏎= M()
pydantic config :: import pydantic⏎class M(pydantic.BaseModel):
⏎    model_config = pydantic.ConfigDict(extra=«'allow'→'forbid'»)⏎    a: int = 1⏎= M()
pydantic computed field :: import pydantic⏎class M(pydantic.BaseModel):⏎    a: int = 1
⏎    @pydantic.computed_field⏎    @property⏎    def v(self) -> int: return «1→2»⏎= M().v
pydantic nested :: import pydantic⏎class N(pydantic.BaseModel):⏎    a: int = «1→2»
⏎class M(pydantic.BaseModel):⏎    n: N = pydantic.Field(default_factory=N)⏎= M()
pydantic annotated :: import pydantic, typing⏎def check(v): return «v→v + 1»
⏎class M(pydantic.BaseModel):⏎    a: typing.Annotated[int, pydantic.AfterValidator(check)] = 1
⏎= M()
pydantic serializer :: import pydantic⏎class M(pydantic.BaseModel):⏎    a: int = 1
⏎    @pydantic.field_serializer('a')⏎    def s(self, v): return «v→v + 1»⏎= M().model_dump()
pydantic dataclass :: import pydantic⏎@pydantic.dataclasses.dataclass⏎class M:
⏎    a: «int→float» = 1⏎= M('1')
type adapter :: import pydantic⏎T = pydantic.TypeAdapter(«list[int]→list[float]»)
⏎= T.validate_python(x)
validate_call :: import pydantic⏎@pydantic.validate_call⏎def h(a: «int→float»): return «a→a + 1»
⏎= h(x)
sqlalchemy column :: from sqlalchemy import ForeignKey, String
⏎from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
⏎class Base(DeclarativeBase): pass⏎class P(Base):⏎    __tablename__ = 'p'
⏎    id: Mapped[int] = mapped_column(primary_key=True)
⏎    kids: Mapped[list['M']] = relationship(back_populates='p', order_by='M.«id→name»')
⏎class M(Base):⏎    __tablename__ = '«m→n»'⏎    id: Mapped[int] = mapped_column(primary_key=True)
⏎    name: Mapped[str] = mapped_column(String(«3→4»), default=«'a'→'b'», nullable=«True→False»)
⏎    pid: Mapped[int] = mapped_column(ForeignKey('p.id'))
⏎    p: Mapped[P] = relationship(back_populates='kids')⏎    def f(self): return «1→2»⏎= M().f()
sqlalchemy default function :: from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
⏎def d(): return «1→2»⏎class Base(DeclarativeBase): pass⏎class M(Base):⏎    __tablename__ = 'm'
⏎    id: Mapped[int] = mapped_column(primary_key=True, default=d)⏎= M()
sqlalchemy table :: import sqlalchemy as sa
⏎T = sa.Table('t', sa.MetaData(), sa.Column('«a→b»', sa.«Integer→String»))⏎= sa.select(T)
numba :: from numba import njit⏎def g(x): return x⏎@njit«→(fastmath=True)»
⏎def h(x): return x + «1→2»⏎= h(x)
numba vectorize :: import numba⏎@numba.vectorize(['float64(float64)'])⏎def h(x): return x + «1→2»
⏎= h(x)
pint definition :: import pint⏎U = pint.UnitRegistry()⏎U.define('foo = «3→4» meter')⏎= x * U.foo
attrs field :: import attrs⏎def c(v): return «v→v + 1»⏎@attrs.define⏎class M:
⏎    a: int = attrs.field(default=«1→2», converter=c, validator=attrs.validators.«instance_of(int)→optional(attrs.validators.instance_of(int))»)
⏎= M()
curried helper :: import toolz⏎@toolz.curry⏎def h(a, b): return «a→b»⏎= h(1)(x)
pandas accessor :: import pandas as pd⏎@pd.api.extensions.register_dataframe_accessor('geo')
⏎class G:⏎    def __init__(self, df): self.df = df⏎    def f(self): return «1→2»
⏎= pd.DataFrame({'a': [x]}).geo.f()
template :: import jinja2⏎T = jinja2.Template('«a→b»')⏎= T.render()
msgspec field :: import msgspec⏎class M(msgspec.Struct):⏎    a: int = «1→2»⏎= M()
typed dict read by a library :: import pydantic, typing_extensions
⏎class T(typing_extensions.TypedDict):⏎    a: «int→float»⏎A = pydantic.TypeAdapter(T)
⏎= A.validate_python(x)
pydantic root validator inherited :: import pydantic⏎class B(pydantic.BaseModel):
⏎    @pydantic.model_validator(mode='after')⏎    def v(self): return «self→None»⏎class M(B):
⏎    a: int = 1⏎= M()
pydantic generic :: import pydantic, typing⏎T = typing.TypeVar('T')
⏎class M(pydantic.BaseModel, typing.Generic[T]):⏎    a: T«→ | None»⏎= M[int](a=1)
pydantic private default :: import pydantic⏎class M(pydantic.BaseModel):
⏎    _p: int = pydantic.PrivateAttr(default=«1→2»)⏎= M()._p
pydantic class variable :: import pydantic, typing⏎class M(pydantic.BaseModel):
⏎    K: typing.ClassVar[int] = «1→2»⏎= M.K
pydantic discriminator alias :: import pydantic⏎class M(pydantic.BaseModel):
⏎    a: int = pydantic.Field(1, alias='«x→y»', description='«d→e»')⏎= M()
pydantic enum field :: import pydantic, enum⏎class E(enum.Enum):⏎    A = «1→2»
⏎class M(pydantic.BaseModel):⏎    e: E = E.A⏎= M()
sqlalchemy hybrid :: from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
⏎from sqlalchemy.ext.hybrid import hybrid_property⏎class Base(DeclarativeBase): pass⏎class M(Base):
⏎    __tablename__ = 'm'⏎    id: Mapped[int] = mapped_column(primary_key=True)⏎    @hybrid_property
⏎    def h(self): return self.id + «1→2»⏎= M(id=1).h
sqlalchemy column property :: from sqlalchemy import literal
⏎from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, column_property
⏎class Base(DeclarativeBase): pass⏎class M(Base):⏎    __tablename__ = 'm'
⏎    id: Mapped[int] = mapped_column(primary_key=True)
⏎    h: Mapped[int] = column_property(literal(1) + «2→3»)⏎= M
sqlalchemy type decorator :: from sqlalchemy import Integer, TypeDecorator
⏎from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column⏎class T(TypeDecorator):
⏎    impl = Integer⏎    cache_ok = True⏎    def process_bind_param(self, v, d): return v + «1→2»
⏎class Base(DeclarativeBase): pass⏎class M(Base):⏎    __tablename__ = 'm'
⏎    id: Mapped[int] = mapped_column(T(), primary_key=True)⏎= M
sqlalchemy validates :: from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, validates
⏎class Base(DeclarativeBase): pass⏎class M(Base):⏎    __tablename__ = 'm'
⏎    id: Mapped[int] = mapped_column(primary_key=True)⏎    @validates('id')
⏎    def v(self, k, x): return x + «1→2»⏎= M(id=1)
sqlalchemy args :: import sqlalchemy as sa
⏎from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
⏎class Base(DeclarativeBase): pass⏎class M(Base):⏎    __tablename__ = 'm'
⏎    id: Mapped[int] = mapped_column(primary_key=True)
⏎    __table_args__ = (sa.CheckConstraint('id > «1→2»'), sa.Index('«i→j»', 'id'))⏎= M.__table__
sqlalchemy statement :: import sqlalchemy as sa⏎T = sa.table('t', sa.column('a'))
⏎Q = sa.select(T).where(T.c.a == «1→2»)⏎= x.execute(Q)
numba helper :: from numba import njit⏎@njit⏎def g(x): return «x→x + 1»⏎@njit⏎def h(x): return g(x)
⏎= h(x)
numba constant :: from numba import njit⏎K = «1→2»⏎@njit⏎def h(x): return x + K⏎= h(x)
numba jitclass :: from numba import int64⏎from numba.experimental import jitclass
⏎@jitclass([('a', int64)])⏎class C:⏎    def __init__(self): self.a = «1→2»⏎= C().a
numba guvectorize :: import numba⏎@numba.guvectorize(['(float64[:], float64[:])'], '(n)->(n)')
⏎def h(a, r):⏎    for i in range(len(a)): r[i] = a[i] + «1→2»⏎= h(x)
attrs hash and eq :: import attrs⏎@attrs.define«→(eq=False)»⏎class M:⏎    a: int = 1⏎= M() == M()
attrs frozen, order, slots :: import attrs
⏎@attrs.define(frozen=«True→False», order=«True→False», slots=«True→False»)⏎class M:⏎    a: int = 1
⏎= M()
attrs method :: import attrs⏎@attrs.define⏎class M:⏎    a: int = 1⏎    def f(self): return «1→2»
⏎    def __attrs_post_init__(self): self.a = «3→4»⏎= M().f()
attrs custom hash :: import attrs⏎@attrs.define(eq=False)⏎class M:⏎    a: int = 1
⏎    def __hash__(self): return «1→2»⏎= hash(M())
sklearn transformer :: from sklearn.preprocessing import FunctionTransformer
⏎def h(x): return «x→x + 1»⏎T = FunctionTransformer(h)⏎= T.transform(x)
sklearn subclass :: from sklearn.base import BaseEstimator⏎class M(BaseEstimator):
⏎    def __init__(self, a=«1→2»): self.a = a⏎= M()
torch module class :: import torch⏎class N(torch.nn.Module):
⏎    def forward(self, x): return x + «1→2»⏎= N()(x)
torch function :: import torch⏎class F(torch.autograd.Function):⏎    @staticmethod
⏎    def forward(ctx, x): return x + «1→2»⏎= F.apply(x)
polars expression :: import polars as pl⏎F = pl.col('a') > «1→2»⏎= x.filter(F)
duckdb constant :: import duckdb⏎«df = 1→df = 2»⏎Q = 'select * from df'⏎= duckdb.sql(Q)
duckdb connection :: import duckdb⏎import helpers⏎«df = 1→df = 2»
⏎= helpers.con().execute(helpers.Q)⏎▸helpers⏎Q = 'select * from df'
⏎def con(): return duckdb.connect()
pandas eval constant :: import pandas as pd⏎«LIMIT = 1→LIMIT = 2»⏎E = 'LIMIT + 1'⏎= pd.eval(E)
"""  # noqa: E501


def read_edits(table: str) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """Yield the name of each edit in a table, the files before it and the files after it."""
    pattern = re.compile("«([^«»]*?)→([^«»]*?)»")
    for line in table.strip().replace("\n⏎", "⏎").splitlines():
        name, _, code = line.partition(" :: ")
        code = code.replace("⏎", "\n")
        before = pattern.sub(r"\1", code)
        for number, edit in enumerate(pattern.finditer(code)):
            head = pattern.sub(r"\1", code[: edit.start()])
            tail = pattern.sub(r"\1", code[edit.end() :])
            after = head + edit[2] + tail
            yield f"{name} {number or ''}".strip(), split_files(before), split_files(after)


def split_files(code: str) -> dict[str, str]:
    code = re.sub("(?m)^= ", "def step(x): return ", code)
    sections = [section.partition("\n") for section in f"app\n{code}".split("\n▸")]
    return {f"{name}.py": text + "\n" for name, _, text in sections}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


def run_in(folder: Path, code: str, **environment: str) -> str:
    """Run code in a process that sees the modules of a folder as they are now."""
    path = os.pathsep.join([str(HERE), str(folder)])
    return run_python(code, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1", **environment)


def find_parts(function: Callable[..., Any]) -> dict[tuple[str, str], str]:
    return CodeMemo().find_walk(function).parts


EDITS = [(*edit, False) for edit in read_edits(KEEPING_EDITS)]
EDITS += [(*edit, True) for edit in read_edits(CHANGING_EDITS)]
LIBRARY_EDITS = [(*edit, False) for edit in read_edits(LIBRARY_KEEPING_EDITS)]
LIBRARY_EDITS += [(*edit, True) for edit in read_edits(LIBRARY_CHANGING_EDITS)]

# Prints the parts of app.step for each folder below $TOP.
PARTS_SCRIPT = """
import importlib, json, os, sys
import dagkit

def list_parts(folder):
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        step = importlib.import_module("app").step
        return [[*part] for part in sorted(dagkit._CodeMemo().find_walk(step).parts.items())]
    except dagkit._Opaque as error:
        return error.reason
    except ModuleNotFoundError as error:
        return f"skip: {error}"
    finally:
        sys.path.remove(folder)
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None) or list(getattr(module, "__path__", [""]))[0]
            if str(file).startswith(folder):
                del sys.modules[name]

top = os.environ["TOP"]
print(json.dumps({name: list_parts(os.path.join(top, name)) for name in sorted(os.listdir(top))}))
"""


def find_parts_of_edits(edits: list[Any], folder: Path) -> list[dict[str, Any]]:
    """Find the parts of the code before the edits under two hash seeds, and after, elsewhere."""
    for number, (_, old_files, new_files, _) in enumerate(edits):
        write_files(folder / "before" / str(number), old_files)
        write_files(folder / "after" / str(number), new_files)
    return [
        json.loads(run_in(top, PARTS_SCRIPT, TOP=str(top), PYTHONHASHSEED=seed))
        for top, seed in (
            (folder / "before", "0"),
            (folder / "before", "1"),
            (folder / "after", "2"),
        )
    ]


@pytest.fixture(scope="session")
def parts_of_edits(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return find_parts_of_edits(EDITS, tmp_path_factory.mktemp("edits"))


@pytest.fixture(scope="session")
def parts_of_library_edits(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return find_parts_of_edits(LIBRARY_EDITS, tmp_path_factory.mktemp("library_edits"))


def check_edit(parts: list[dict[str, Any]], number: int, is_change: bool) -> None:
    first, second, edited = (each[str(number)] for each in parts)
    if type(first) is str and first.startswith("skip"):
        pytest.skip(first)
    assert type(first) is list
    assert first == second
    assert (first != edited) == is_change


@pytest.mark.parametrize("number", range(len(EDITS)), ids=[edit[0] for edit in EDITS])
def test_an_edit_counts_exactly_if_it_changes_what_the_step_does(
    number: int, parts_of_edits: list[dict[str, Any]]
) -> None:
    check_edit(parts_of_edits, number, EDITS[number][3])


@pytest.mark.libraries
@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(LIBRARY_EDITS)), ids=[edit[0] for edit in LIBRARY_EDITS]
)
def test_an_edit_of_a_library_class_counts_by_what_the_project_wrote(
    number: int, parts_of_library_edits: list[dict[str, Any]]
) -> None:
    check_edit(parts_of_library_edits, number, LIBRARY_EDITS[number][3])


NOTEBOOK = """
class B: pass
class M(B):
    def f(self): return self.k
m = M()
m.k = 1
K, T, F = 1, {'a': 1}, [lambda: 1]
def h(x): return x + K + T['a'] + m.f()
def make(n):
    def step(x, *, k=1, o=[]): return h(x) + len(o) + n + k, F[0](), np.sum(a), M
    return step
step = make(1)
"""


@pytest.mark.parametrize(
    ("cell", "is_change"),
    [
        (NOTEBOOK, False),
        ("\n# moved\n\n" + NOTEBOOK, False),
        ("def h(x): return x + K + T['a'] + m.f()  # again", False),
        ("T = {'a': 1}; K = 1", False),
        ("a[0] = 1.0", False),
        ("def h(x): return x + K", True),
        ("h.__code__ = (lambda x: x).__code__", True),
        ("K = True", True),
        ("del K", True),
        ("T['a'] = 2", True),
        ("F[0].__code__ = (lambda: 2).__code__", True),
        ("m.k = 2", True),
        ("M.f = lambda self: 2", True),
        ("B.g = 1", True),
        ("def len(x): return 1", True),
        ("step.__kwdefaults__['o'].append(1)", True),
        ("step.__closure__[0].cell_contents = 2", True),
        ("a[0] = 5.0", True),
    ],
)
def test_a_cell_of_a_notebook_counts_by_what_it_changes(cell: str, is_change: bool) -> None:
    """Running a cell again, or the cell of a helper, is judged by the outcome."""
    space: dict[str, Any] = {"__name__": "__main__", "np": np, "a": np.ones(3)}
    exec(NOTEBOOK, space)
    memo = CodeMemo()
    before = memo.find_walk(space["step"]).parts
    exec(cell, space)
    memo.begin()
    after = memo.find_walk(space["step"]).parts
    assert after == find_parts(space["step"])
    assert (after != before) == is_change


def scale(values: Any) -> Any:
    return values, HERE


def test_parts_of_code_have_kinds_and_names() -> None:
    factor = 3

    def clean(raw: Any, alpha: float = 1.0) -> Any:
        return scale(raw), factor, alpha, np.mean(raw)

    parts = find_parts(clean)
    assert parts.keys() == {
        ("function", "clean"),
        ("closure", "factor"),
        ("default", "alpha"),
        ("helper", "scale"),
        ("constant", "HERE"),
        ("package", "numpy"),
    }
    assert parts["package", "numpy"] == np.__version__


def test_code_that_cannot_be_fingerprinted_is_named_with_its_path() -> None:
    letters = (item for item in "x")

    def clean() -> Any:
        return letters

    with pytest.raises(OpaqueError) as caught:
        find_parts(clean)
    assert caught.value.reason == "no fingerprint: clean -> closure letters -> generator"


# Values


class Multiplier:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: float) -> float:
        return x * self.factor


class OtherMultiplier(Multiplier):
    pass


FRAME = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
DIFFERENT_VALUES: list[Any] = [
    None, 0, 1, 2**80, True, 0.0, -0.0, 1.0, math.nan, math.inf, 1j, complex(-0.0, 1), "", "1",
    b"", b"1", bytearray(b"1"), [], (), {}, set(), frozenset(), [1], (1,), {1}, frozenset({1}),
    [True], [1.0], ["1"], [b"1"], [[1]], [(1,)], [0.0], [-0.0], [math.nan], [1, 2], [2, 1],
    [[1], 2], [[1, 2]], {1: 2}, {2: 1}, {1: 2, 3: 4}, {3: 4, 1: 2}, {"1": 2}, {True: 2}, {1: [2]},
    {1, 2}, {frozenset({1})}, range(3), slice(1), Multiplier, Multiplier(1), Multiplier(2),
    OtherMultiplier(1), len, int,
    datetime(2020, 1, 1), timedelta(1), Decimal("1.0"), Decimal("1.00"), re.compile("a"),
    re.compile("a", re.I), functools.partial(max, 1), functools.partial(min, 1), random.Random(1),
    Path("/nowhere/x"), Path("/nowhere/y"), "/nowhere/x", lambda: 1, lambda: 2, lambda: 1.0,
    list[int], int | str, ValueError("a"), KeyError("a"), np.add, np.float64(1), np.float32(1),
    np.arange(6.0), np.arange(6.0, dtype="f4"), np.arange(6.0).reshape(2, 3), np.zeros(0),
    np.arange(6.0).reshape(3, 2), np.arange(6.0)[::-1], np.arange(6.0).astype(object),
    np.array(["a"]), np.array(["a"], object), np.zeros((0, 2)), np.array([(1, 2.0)], "i4,f8"),
    np.array(1.0), np.arange(6).astype("M8[s]"), FRAME, FRAME[["b", "a"]], FRAME["a"],
    FRAME.rename_axis("i"), FRAME.set_index("a"), FRAME.astype({"a": "f4"}), FRAME.iloc[::-1],
    FRAME["a"].rename("z"), FRAME["b"].astype("category"), FRAME.columns, FRAME.index,
    pd.Series(pd.Categorical(["x"], categories=["x", "y"])), pd.Series(pd.Categorical(["x"])),
    pd.date_range("2020", periods=2), pd.date_range("2020", periods=2, tz="UTC"), pd.NaT,
    pd.Series(["x"], dtype="string"), pd.Series(["x"], dtype=object), pd.array([1, None], "Int64"),
]  # fmt: skip


def test_different_values_have_different_fingerprints() -> None:
    """By type, content and order: dicts by insertion, arrays by dtype and shape, frames by all."""
    fingerprints = [fingerprint(value) for value in DIFFERENT_VALUES]
    assert len(set(fingerprints)) == len(fingerprints)
    assert {len(text) for text in fingerprints} == {64}


def can_be_pickled(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except (TypeError, AttributeError, pickle.PicklingError):
        return False
    return True


@pytest.mark.parametrize(
    "value", list(filter(can_be_pickled, DIFFERENT_VALUES)), ids=lambda value: type(value).__name__
)
def test_a_copy_of_a_value_has_the_same_fingerprint(value: Any) -> None:
    twin = pickle.loads(pickle.dumps(value))
    assert fingerprint(twin) == fingerprint(value)
    assert fingerprint([value, {"k": value}]) == fingerprint([value, {"k": twin}])


def test_equal_values_have_equal_fingerprints_however_they_were_built() -> None:
    array = np.arange(12.0).reshape(3, 4)
    assert fingerprint(array) == fingerprint(np.repeat(array, 2, axis=0)[::2])
    frame = pd.DataFrame({"a": [1.0, 2.0]})
    frame["b"] = ["x", "y"]
    assert fingerprint(frame) == fingerprint(FRAME)
    assert fingerprint([math.nan]) == fingerprint([math.inf - math.inf])
    assert fingerprint({"a", "b", "c"}) == fingerprint({"c", "b", "a"})
    ring: list[Any] = [1]
    ring.append(ring)
    assert fingerprint(copy.deepcopy(ring)) == fingerprint(ring)
    assert fingerprint(ring) != fingerprint([1])


@pytest.mark.slow
def test_fingerprints_are_the_same_in_every_process_and_hash_seed() -> None:
    code = """
        import test_dagkit
        words = "alpha beta gamma delta".split()
        value = [set(words), {"k": frozenset(map(frozenset, words))}, {(w, 1.5) for w in words}]
        for value in (value, *test_dagkit.DIFFERENT_VALUES):
            print(test_dagkit.fingerprint(value))
    """
    assert run_python(code, PYTHONHASHSEED="0") == run_python(code, PYTHONHASHSEED="1")


def test_a_path_counts_by_the_content_of_its_file_or_folder(tmp_path: Path) -> None:
    path = tmp_path / "a"
    fingerprints = [fingerprint(path)]
    for text in ("1", "2", "22"):
        path.write_text(text)
        fingerprints.append(fingerprint(path))
    path.write_text("1")
    assert fingerprint(path) == fingerprints[1]
    assert fingerprint([path]) != fingerprint([str(path)])
    path.unlink()
    for change in (path.mkdir, (path / "x").touch, (path / "y").touch):
        change()
        fingerprints.append(fingerprint(path))
    (path / "y").rename(path / "z")
    fingerprints.append(fingerprint(path))
    (path / "loop").symlink_to(path)
    fingerprints.append(fingerprint(path))
    assert len(set(fingerprints)) == len(fingerprints)


def make_nested_list() -> list[Any]:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        lambda: sqlite3.connect(":memory:"),
        lambda: (item for item in "x"),
        make_nested_list,
    ],
    ids=["lock", "connection", "generator", "nested too deeply"],
)
def test_a_value_without_content_has_no_fingerprint(make: Callable[[], Any]) -> None:
    value = make()
    for holder in (value, [value], {"k": (value,)}):
        with pytest.raises(OpaqueError):
            fingerprint(holder)
    if hasattr(value, "close"):
        value.close()


# Each row: name :: value :: an equal value, built in another way :: a different value. They are
# evaluated with the names of MODELS; `do` returns a value after harmless use.

MODELS = """
import array, collections, copy, dataclasses, datetime, decimal, enum, fractions, functools, io
import ipaddress, itertools, logging, pathlib, pickle, re, statistics, threading, types, typing
import uuid, weakref, zoneinfo, xml.etree.ElementTree as ET
import numpy as np, pandas as pd

@dataclasses.dataclass
class DC:
    a: int = 1
    b: object = None

@dataclasses.dataclass(slots=True, frozen=True)
class SlotDC:
    a: int = 1

class Color(enum.Enum):
    RED = 1
    BLUE = 2

class Flag(enum.Flag):
    A = 1
    B = 2

class Num(enum.IntEnum):
    ONE = 1

class Arr(np.ndarray): pass
class DD(collections.defaultdict): pass
class Cnt(collections.Counter): pass
class Dec(decimal.Decimal): pass
class DT(datetime.datetime): pass
class MyPath(type(pathlib.Path())): pass
class MySet(set): pass
class MyFro(frozenset): pass
class MyTup(tuple): pass
class MyBA(bytearray): pass
class MyComplex(complex): pass

# These lose their content when they are pickled.
class MyInt(int):
    def __reduce__(self): return (MyInt, ())

class MyFloat(float):
    def __reduce__(self): return (MyFloat, ())

class MyStr(str):
    def __reduce__(self): return (MyStr, ())

class MyList(list):
    def __reduce__(self): return (MyList, ())

class MyDict(dict):
    def __reduce__(self): return (MyDict, ())

class Lossy:
    def __init__(self, a): self.a = a; self.lock = threading.Lock()
    def __getstate__(self): return {}

class Summ:
    def __init__(self, items): self.items = items
    def __getstate__(self): return {"items": len(self.items)}

class RedDrop:
    def __init__(self, items=()): self.items = items
    def __reduce__(self): return (RedDrop, ())

class Reg:
    def __init__(self, v): self.v = v

import copyreg
copyreg.pickle(Reg, lambda r: (Reg, (0,)))

class WithLock:
    def __init__(self, a): self.a = a; self.lock = threading.Lock()
    def __getstate__(self): return {name: x for name, x in vars(self).items() if name != "lock"}
    def __setstate__(self, state): self.__dict__.update(state); self.lock = threading.Lock()

class Slots:
    __slots__ = ("a", "b")
    def __init__(self, a): self.a = a

class Sub(Slots):
    def __init__(self, a, c): super().__init__(a); self.c = c

class GS:
    __slots__ = ("a",)
    def __init__(self, a): self.a = a
    def __getstate__(self): return self.a
    def __setstate__(self, state): self.a = state

class Ren:
    def __init__(self, a): self._a = a
    def __getstate__(self): return {"a": self._a}
    def __setstate__(self, state): self._a = state["a"]

class Prop:
    def __init__(self, v): self.__dict__["v"] = v
    @property
    def v(self): return 0

class Liar:
    def __init__(self, v): self.v = v
    def __getattribute__(self, name):
        return {} if name == "__dict__" else object.__getattribute__(self, name)

class Fake:
    def __init__(self, v): self.v = v
    @property
    def __class__(self): return int

class CP:
    def __init__(self, a): self.a = a
    @functools.cached_property
    def p(self): return self.a * 2

class Callable_:
    def __init__(self, name, doc=None): self.__name__ = name; self.__doc__ = doc
    def __call__(self, x): return x

class Wrapped:
    def __init__(self, f): functools.update_wrapper(self, f); self.f = f
    def __call__(self, x): return self.f(x)

def func(x): return x
def func2(x): return x + 1

class Curry:
    def __init__(self, f, k): self.f, self.k = f, k
    def __reduce__(self): return "CURRY"

CURRY = Curry(func, 1)

class Log:
    def __init__(self, a): self.a = a; self.log = logging.getLogger("x")

class Err(Exception): pass

class Slots2:
    def __init__(self, v): self.v = v
    def m(self): return self.v
    def __hash__(self): return hash(self.v)
    def __eq__(self, other): return self.v == other.v

class Node:
    def __init__(self, v): self.v = v; self.ring = self

class SubFrame(pd.DataFrame):
    _metadata = ["note"]
    @property
    def _constructor(self): return SubFrame

NT = collections.namedtuple("NT", "a b")

class TNT(typing.NamedTuple):
    a: int
    b: str = "x"

@functools.singledispatch
def SD(x): return x

@SD.register
def _(x: int): return 1

def arr(x, note, mode=""):
    a = np.asarray(x).view(Arr)
    a.note = note
    a.mode = mode
    return a

def err(a, cause=None):
    try:
        raise Err(a) from cause
    except Err as error:
        return error

def mk():
    def f(x=0): return x
    return f

def named(name):
    return setattrs(mk(), __name__=name)

def setattrs(target, /, **attributes):
    for name, x in attributes.items():
        setattr(target, name, x)
    return target

def use(value, *names):
    for name in names:
        getattr(value, name)
    return value

def do(value, function):
    function(value)
    return value

def subframe(note): return setattrs(SubFrame({"a": [1]}), note=note)
def attrframe(**attrs): return do(pd.DataFrame({"a": [1]}), lambda f: f.attrs.update(attrs))
def FR(x): return pd.DataFrame({"a": [x]})
def masked(data, mask): return np.ma.MaskedArray(data, mask)

def structured(padding):
    dtype = np.dtype({"names": ["a", "b"], "formats": ["i1", "f8"], "offsets": [0, 8]})
    a = np.full(2 * dtype.itemsize, padding, "u1").view(dtype)
    a["a"], a["b"] = 1, 2
    return a

def cfg(v):
    import configparser
    config = configparser.ConfigParser()
    config.read_dict({"a": {"b": v}})
    return config
"""

VALUES = r"""
dataclass :: DC(1, [2]) :: pickle.loads(pickle.dumps(DC(1, [2]))) :: DC(1, [3])
dataclass extra attribute :: setattrs(DC(1), z=1) :: setattrs(DC(1), z=1) :: DC(1)
slots dataclass :: SlotDC(1) :: copy.deepcopy(SlotDC(1)) :: SlotDC(2)
attribute order :: setattrs(Lossy(1), b=1, c=2) :: setattrs(Lossy(1), c=2, b=1) :: setattrs(Lossy(1), b=2, c=1)
enum :: Color.RED :: Color(1) :: Color.BLUE
flag :: Flag.A | Flag.B :: Flag(3) :: Flag.A
flag used :: Flag.A :: do(Flag.A, lambda f: (~f, Flag(3))) :: Flag.B
intenum :: Num.ONE :: Num(1) :: 1
ndarray subclass :: arr([1], "a") :: arr([1], "a") :: arr([1], "b")
ndarray subclass with a mode :: arr([1], "a", "x") :: arr([1], "a", "x") :: arr([1], "a", "y")
defaultdict subclass :: setattrs(DD(list), z=1) :: setattrs(DD(list), z=1) :: setattrs(DD(list), z=2)
defaultdict factory :: collections.defaultdict(list) :: collections.defaultdict(list) :: collections.defaultdict(int)
counter subclass :: setattrs(Cnt("ab"), z=1) :: setattrs(Cnt("ab"), z=1) :: setattrs(Cnt("ab"), z=2)
decimal subclass :: setattrs(Dec(1), z=1) :: setattrs(Dec(1), z=1) :: setattrs(Dec(1), z=2)
datetime subclass :: setattrs(DT(2020,1,1), z=1) :: setattrs(DT(2020,1,1), z=1) :: setattrs(DT(2020,1,1), z=2)
int lossy :: MyInt(3) :: MyInt(3) :: MyInt(4)
list lossy :: MyList([3]) :: MyList([3]) :: MyList([4])
dict lossy :: MyDict(a=3) :: MyDict(a=3) :: MyDict(a=4)
str lossy :: MyStr("a") :: MyStr("a") :: MyStr("b")
path subclass :: setattrs(MyPath("/x"), z=1) :: setattrs(MyPath("/x"), z=1) :: setattrs(MyPath("/x"), z=2)
path subclass differs from path :: MyPath("/x") :: MyPath("/x") :: pathlib.Path("/x")
lossy state :: Lossy(1) :: Lossy(1) :: Lossy(2)
with lock :: WithLock(1) :: pickle.loads(pickle.dumps(WithLock(1))) :: WithLock(2)
slots :: Slots(1) :: copy.copy(Slots(1)) :: Slots(2)
slots and dict :: Sub(1, 2) :: copy.copy(Sub(1, 2)) :: Sub(1, 3)
cached property :: CP(1) :: use(CP(1), "p") :: CP(2)
__name__ attribute :: Callable_("a") :: Callable_("a") :: Callable_("b")
__doc__ attribute :: Callable_("a", "d") :: Callable_("a", "d") :: Callable_("a", "e")
update_wrapper :: Wrapped(func) :: pickle.loads(pickle.dumps(Wrapped(func))) :: Wrapped(func2)
reduces to a name :: setattrs(CURRY, k=1) :: CURRY :: func
reduces to a name, state :: CURRY :: CURRY :: setattrs(CURRY, k=5)
logger attribute :: Log(1) :: pickle.loads(pickle.dumps(Log(1))) :: Log(2)
exception cause :: err(1, ValueError("a")) :: err(1, ValueError("a")) :: err(1, ValueError("b"))
exception note :: setattrs(err(1), __notes__=["a"]) :: setattrs(err(1), __notes__=["a"]) :: err(1)
exception context :: err(1) :: err(1) :: setattrs(err(1), __context__=KeyError(1))
OSError :: OSError(2, "a", "f") :: OSError(2, "a", "f") :: OSError(2, "a", "g")
AttributeError :: AttributeError("a", name="x") :: AttributeError("a", name="x") :: AttributeError("a", name="y")
enum attribute :: setattrs(Color.RED, z=1) :: Color.RED :: setattrs(Color.RED, z=2)
function name :: named("a") :: named("a") :: named("b")
cycle :: Node(1) :: copy.deepcopy(Node(1)) :: Node(2)
namedtuple :: NT(1, 2) :: NT(1, 2) :: (1, 2)
typed namedtuple :: TNT(1) :: TNT(1, "x") :: TNT(1, "y")
deque :: collections.deque([1], 3) :: collections.deque([1], 3) :: collections.deque([1], 4)
chainmap :: collections.ChainMap({1: 2}) :: collections.ChainMap({1: 2}) :: collections.ChainMap({1: 3})
weak value dictionary :: weakref.WeakValueDictionary({"a": Color.RED}) :: weakref.WeakValueDictionary({"a": Color.RED}) :: weakref.WeakValueDictionary({"a": Color.BLUE})
weak set :: weakref.WeakSet([Color.RED]) :: weakref.WeakSet([Color.RED]) :: weakref.WeakSet([Color.BLUE])
simple namespace :: types.SimpleNamespace(a=1) :: types.SimpleNamespace(a=1) :: types.SimpleNamespace(a=2)
c and f order :: np.arange(6).reshape(2,3) :: np.arange(6).reshape(2,3).copy() :: np.asfortranarray(np.arange(6).reshape(2,3))
f slice :: np.asfortranarray(np.arange(12).reshape(3,4))[::2] :: np.asfortranarray(np.asfortranarray(np.arange(12).reshape(3,4))[::2]) :: np.arange(12).reshape(3,4)[::2]
transposed :: np.arange(6).reshape(2,3).T :: np.asfortranarray(np.arange(6).reshape(2,3).T) :: np.arange(6).reshape(2,3).T.copy()
broadcast :: np.broadcast_to(np.arange(3), (4,3)) :: np.broadcast_to(np.arange(3), (4,3)).copy() :: np.broadcast_to(np.arange(4)[:,None], (4,3))
structured padding :: structured(0) :: structured(255) :: do(structured(0), lambda a: a["b"].fill(3))
structured scalar :: structured(0)[0] :: structured(255)[0] :: structured(0)[:1]
masked array :: masked([1,2],[0,1]) :: pickle.loads(pickle.dumps(masked([1,2],[0,1]))) :: masked([1,2],[1,0])
matrix :: np.matrix([[1]]) :: np.matrix([[1]]) :: np.array([[1]])
recarray :: np.rec.array([(1, 2.0)], names="a,b") :: np.rec.array([(1, 2.0)], names="a,b") :: np.rec.array([(1, 2.0)], names="a,c")
string dtype :: np.array(["a", "b"], np.dtypes.StringDType()) :: np.array(["a", "b"], np.dtypes.StringDType()) :: np.array(["a", "c"], np.dtypes.StringDType())
object array :: np.array([{1}, None], object) :: np.array([{1}, None], object) :: np.array([{2}, None], object)
big endian :: np.arange(3, dtype=">i4") :: np.arange(3, dtype=">i4") :: np.arange(3, dtype="<i4")
dtype metadata :: np.dtype("f8", metadata={"a": 1}) :: np.dtype("f8", metadata={"a": 1}) :: np.dtype("f8", metadata={"a": 2})
generator :: np.random.default_rng(1) :: np.random.default_rng(1) :: do(np.random.default_rng(1), lambda g: g.random())
random state :: np.random.RandomState(1) :: np.random.RandomState(1) :: np.random.RandomState(2)
vectorize used :: np.vectorize(func, otypes=[float]) :: do(np.vectorize(func, otypes=[float]), lambda f: f([1])) :: np.vectorize(func2, otypes=[float])
poly1d :: np.poly1d([1, 2]) :: np.poly1d([1, 2]) :: np.poly1d([1, 3])
numpy scalar :: np.float64(1) :: np.float64(1) :: 1.0
datetime64 :: np.datetime64("2020-01-01") :: np.datetime64("2020-01-01") :: np.datetime64("2020-01-01", "s")
frame :: pd.DataFrame({"a": [1], "b": ["x"]}) :: pd.DataFrame({"b": ["x"], "a": [1]})[["a", "b"]] :: pd.DataFrame({"a": [1], "b": ["y"]})
frame fragments :: pd.DataFrame({"a": [1], "b": [2]}) :: setattrs(pd.DataFrame({"a": [1]}).assign(b=2)) :: pd.DataFrame({"a": [1], "b": [3]})
frame attrs :: attrframe(a=1) :: attrframe(a=1) :: attrframe(a=2)
frame subclass :: subframe("a") :: pickle.loads(pickle.dumps(subframe("a"))) :: subframe("b")
frame loaded :: pd.DataFrame({"a": [1.0]}) :: pickle.loads(pickle.dumps(pd.DataFrame({"a": [1.0]}))) :: pd.DataFrame({"a": [2.0]})
frame used :: pd.DataFrame({"a": [1.0]}) :: do(pd.DataFrame({"a": [1.0]}), lambda f: (f.a, f["a"], f.index.is_unique, f.columns.get_loc("a"), f.loc[0], f.describe())) :: pd.DataFrame({"a": [2.0]})
frame flags :: pd.DataFrame({"a": [1.0]}) :: pd.DataFrame({"a": [1.0]}) :: pd.DataFrame({"a": [1.0]}).set_flags(allows_duplicate_labels=False)
series str :: pd.Series(["a", None, "b"]) :: pd.Series(["z", "a", None, "b"])[1:].reset_index(drop=True) :: pd.Series(["a", "b", None])
series arrow :: pd.Series([1, None], dtype="int64[pyarrow]") :: pd.concat([pd.Series([1], dtype="int64[pyarrow]"), pd.Series([None], dtype="int64[pyarrow]")], ignore_index=True) :: pd.Series([2, None], dtype="int64[pyarrow]")
series masked :: pd.Series([1, None], dtype="Int64") :: pd.Series([1, 5], dtype="Int64").mask(pd.Series([False, True])) :: pd.Series([1, 0], dtype="Int64")
categorical :: pd.Series(["a", "b"], dtype="category") :: pickle.loads(pickle.dumps(pd.Series(["a", "b"], dtype="category"))) :: pd.Series(pd.Categorical(["a", "b"], ["b", "a"]))
ordered categorical :: pd.Categorical(["a"], ["a", "b"], ordered=True) :: pd.Categorical(["a"], ["a", "b"], ordered=True) :: pd.Categorical(["a"], ["a", "b"])
interval :: pd.cut(pd.Series([1, 2, 3]), 2) :: pd.cut(pd.Series([1, 2, 3]), 2) :: pd.cut(pd.Series([1, 2, 3]), 2, right=False)
period :: pd.period_range("2020", periods=2, freq="M") :: pd.period_range("2020", periods=2, freq="M") :: pd.period_range("2020", periods=2, freq="D")
tz :: pd.date_range("2020", periods=2, tz="UTC") :: pickle.loads(pickle.dumps(pd.date_range("2020", periods=2, tz="UTC"))) :: pd.date_range("2020", periods=2, tz="Europe/Berlin")
tz series :: pd.Series(pd.date_range("2020", periods=2, tz="Europe/Berlin")) :: pickle.loads(pickle.dumps(pd.Series(pd.date_range("2020", periods=2, tz="Europe/Berlin")))) :: pd.Series(pd.date_range("2020", periods=2))
freq :: pd.date_range("2020", periods=3) :: pd.date_range("2020", periods=3) :: pd.DatetimeIndex(list(pd.date_range("2020", periods=3)))
multiindex :: pd.MultiIndex.from_product([[1, 2], ["a"]]) :: pickle.loads(pickle.dumps(pd.MultiIndex.from_product([[1, 2], ["a"]]))) :: pd.MultiIndex.from_product([[1, 2], ["b"]])
unused level :: pd.MultiIndex.from_product([[1, 2], ["a"]])[:1] :: pd.MultiIndex.from_product([[1, 2], ["a"]])[:1] :: pd.MultiIndex.from_product([[1], ["a"]])
range index :: pd.RangeIndex(3) :: pd.RangeIndex(0, 3) :: pd.Index([0, 1, 2])
sparse column :: pd.arrays.SparseArray([0, 0, 1]) :: pd.arrays.SparseArray([0, 0, 1]) :: pd.arrays.SparseArray([0, 0, 1], fill_value=1)
timestamp :: pd.Timestamp("2020", tz="UTC") :: pd.Timestamp("2020", tz="UTC") :: pd.Timestamp("2020")
offset :: pd.offsets.MonthEnd(2) :: pd.offsets.MonthEnd(2) :: pd.offsets.MonthEnd(1)
object column :: pd.DataFrame({"a": [[1], {2}]}) :: pd.DataFrame({"a": [[1], {2}]}) :: pd.DataFrame({"a": [[1], {3}]})
groupby :: list(pd.DataFrame({"a": [1, 1], "b": [2, 3]}).groupby("a"))[0][1] :: pd.DataFrame({"a": [1, 1], "b": [2, 3]}) :: pd.DataFrame({"a": [1, 1], "b": [2, 4]})
regex, uuid, ip :: [re.compile("a"), uuid.UUID(int=1), ipaddress.ip_address("1.2.3.4")] :: [re.compile("a"), uuid.UUID(int=1), ipaddress.ip_address("1.2.3.4")] :: [re.compile("b"), uuid.UUID(int=1), ipaddress.ip_address("1.2.3.4")]
zoneinfo, fraction :: [zoneinfo.ZoneInfo("UTC"), fractions.Fraction(1, 3)] :: [zoneinfo.ZoneInfo("UTC"), fractions.Fraction(2, 6)] :: [zoneinfo.ZoneInfo("UTC"), fractions.Fraction(1, 4)]
bytesio, array, bytearray :: [io.BytesIO(b"a"), array.array("i", [1]), bytearray(b"a")] :: [io.BytesIO(b"a"), array.array("i", [1]), bytearray(b"a")] :: [io.BytesIO(b"a"), array.array("i", [2]), bytearray(b"a")]
etree :: ET.fromstring("<a b='1'>x</a>") :: ET.fromstring("<a b='1'>x</a>") :: ET.fromstring("<a b='1'>y</a>")
frozen types :: [frozenset({"a", "b"}), {"x", ("a", "b")}] :: [frozenset({"b", "a"}), {("a", "b"), "x"}] :: [frozenset({"b", "c"}), {("a", "b"), "x"}]
set of objects :: {SlotDC(1), SlotDC(2)} :: {SlotDC(2), SlotDC(1)} :: {SlotDC(2), SlotDC(3)}
dict of objects :: {SlotDC(1): [SlotDC(2)]} :: {SlotDC(1): [SlotDC(2)]} :: {SlotDC(1): [SlotDC(3)]}
mutual cycle :: (lambda a, b: (setattrs(a, x=b), setattrs(b, x=a), a)[2])(Slots2(1), Slots2(2)) :: (lambda b, a: (setattrs(b, x=a), setattrs(a, x=b), a)[2])(Slots2(2), Slots2(1)) :: (lambda a, b: (setattrs(a, x=b), setattrs(b, x=a), b)[2])(Slots2(1), Slots2(2))
shared or not :: (lambda d: [d, d])(Slots2(1)) :: [Slots2(1), Slots2(1)] :: [Slots2(1), Slots2(2)]
fold :: datetime.datetime(2020,1,1,fold=1) :: datetime.datetime(2020,1,1,fold=1) :: datetime.datetime(2020,1,1)
zone kinds :: datetime.datetime(2020,1,1,tzinfo=zoneinfo.ZoneInfo("UTC")) :: datetime.datetime(2020,1,1,tzinfo=zoneinfo.ZoneInfo("UTC")) :: datetime.datetime(2020,1,1,tzinfo=datetime.timezone.utc)
decimal snan :: decimal.Decimal("sNaN") :: decimal.Decimal("sNaN") :: decimal.Decimal("NaN")
complex nan :: complex(float("nan"), 1) :: complex(float("nan"), 1) :: complex(float("nan"), 2)
surrogate :: "\ud800" :: "\ud800" :: "\ud801"
list iterator :: do(iter([1, 2]), next) :: do(iter([1, 2]), next) :: iter([1, 2])
userdict :: collections.UserDict(a=1) :: collections.UserDict(a=1) :: collections.UserDict(a=2)
bound method :: Slots2(1).m :: Slots2(1).m :: Slots2(2).m
bound builtin :: [1].append :: [1].append :: [2].append
lambda closure :: (lambda k: lambda: k)(1) :: (lambda k: lambda: k)(1) :: (lambda k: lambda: k)(2)
partial attributes :: setattrs(functools.partial(func, 1), z=1) :: setattrs(functools.partial(func, 1), z=1) :: setattrs(functools.partial(func, 1), z=2)
lru function :: functools.lru_cache(3)(func) :: do(functools.lru_cache(3)(func), lambda f: f(1)) :: functools.lru_cache(4)(func)
function defaults :: setattrs(mk(), __defaults__=(1,)) :: setattrs(mk(), __defaults__=(1,)) :: setattrs(mk(), __defaults__=(2,))
function dict :: setattrs(mk(), z=1) :: setattrs(mk(), z=1) :: setattrs(mk(), z=2)
function doc by hand :: setattrs(mk(), __doc__="a") :: setattrs(mk(), __doc__="a") :: setattrs(mk(), __name__="q")
class made at run time :: type("A", (), {"x": 1}) :: type("A", (), {"x": 1}) :: type("A", (), {"x": 2})
instance of run-time class :: type("A", (), {"x": 1})() :: type("A", (), {"x": 1})() :: type("A", (), {"x": 2})()
nested struct array :: np.zeros(2, [("a", [("b", "i4"), ("c", "f8", (2,))])]) :: np.zeros(2, [("a", [("b", "i4"), ("c", "f8", (2,))])]) :: np.zeros(2, [("a", [("b", "i4"), ("d", "f8", (2,))])])
aligned struct :: np.zeros(2, np.dtype([("a", "i1"), ("b", "f8")], align=True)) :: do(np.empty(2, np.dtype([("a", "i1"), ("b", "f8")], align=True)), lambda a: (a["a"].fill(0), a["b"].fill(0))) :: np.ones(2, np.dtype([("a", "i1"), ("b", "f8")], align=True))
3d order :: np.arange(24).reshape(2,3,4).transpose(1,0,2) :: np.arange(24).reshape(2,3,4).transpose(1,0,2).copy(order="K") :: np.arange(24).reshape(2,3,4).transpose(1,0,2).copy()
zero size :: np.zeros((0, 3)) :: np.asfortranarray(np.zeros((0, 3))) :: np.zeros((3, 0))
reversed :: np.arange(4)[::-1] :: np.array([3, 2, 1, 0]) :: np.arange(4)
void scalar :: np.void(b"abc") :: np.void(b"abc") :: np.void(b"abd")
bytes with nul :: np.array([b"a\0"]) :: np.array([b"a"], "S2") :: np.array([b"a"])
object with nan :: np.array([float("nan"), None], object) :: np.array([float("inf") - float("inf"), None], object) :: np.array([None, None], object)
char array :: np.char.array(["a"]) :: np.char.array(["a"]) :: np.array(["a"])
seed sequence :: np.random.SeedSequence(1) :: np.random.SeedSequence(1) :: do(np.random.SeedSequence(1), lambda s: s.spawn(1))
nan kinds in object column :: pd.Series([None, 1], dtype=object) :: pd.Series([None, 1], dtype=object) :: pd.Series([float("nan"), 1], dtype=object)
pd.NA :: [pd.NA] :: [pd.NA] :: [None]
datetime unit :: pd.Series(pd.to_datetime(["2020"])).dt.as_unit("s") :: pd.Series(pd.to_datetime(["2020"])).dt.as_unit("s") :: pd.Series(pd.to_datetime(["2020"])).dt.as_unit("ns")
duplicate columns :: pd.DataFrame([[1, 2]], columns=["a", "a"]) :: pd.DataFrame([[1, 2]], columns=["a", "a"]) :: pd.DataFrame([[2, 1]], columns=["a", "a"])
column name :: pd.DataFrame({"a": [1]}).rename_axis(columns="c") :: pd.DataFrame({"a": [1]}).rename_axis(columns="c") :: pd.DataFrame({"a": [1]})
empty frames :: pd.DataFrame({"a": pd.Series([], dtype="i8")}) :: pd.DataFrame({"a": pd.Series([1], dtype="i8")})[:0] :: pd.DataFrame({"a": pd.Series([], dtype="f8")})
no columns :: pd.DataFrame(index=[1, 2]) :: pd.DataFrame(index=[1, 2]) :: pd.DataFrame(index=[1, 3])
string storages :: pd.Series(["a"], dtype=pd.StringDtype("python")) :: pd.Series(["a"], dtype=pd.StringDtype("python")) :: pd.Series(["a"], dtype=pd.StringDtype("pyarrow"))
string na :: pd.Series(["a", None], dtype="str") :: pd.Series(["b", "a", None], dtype="str")[1:].reset_index(drop=True) :: pd.Series(["a", None], dtype="string")
interval index :: pd.interval_range(0, 3) :: pd.interval_range(0, 3) :: pd.interval_range(0, 3, closed="left")
frame of frames :: pd.Series([FR(1)]) :: pd.Series([FR(1)]) :: pd.Series([FR(2)])
multiindex codes :: pd.MultiIndex(levels=[[1, 2]], codes=[[0, 0]]) :: pd.MultiIndex(levels=[[1, 2]], codes=[[0, 0]]) :: pd.MultiIndex(levels=[[1, 3]], codes=[[0, 0]])
timedelta :: pd.Series(pd.to_timedelta([1], unit="s")) :: pd.Series(pd.to_timedelta([1], unit="s")) :: pd.Series(pd.to_timedelta([2], unit="s"))
grouper and styler :: pd.Grouper(key="a") :: pd.Grouper(key="a") :: pd.Grouper(key="b")
exception group :: ExceptionGroup("a", [ValueError(1)]) :: ExceptionGroup("a", [ValueError(1)]) :: ExceptionGroup("a", [ValueError(2)])
stop iteration :: StopIteration(1) :: StopIteration(1) :: setattrs(StopIteration(1), value=2)
unicode error :: UnicodeDecodeError("utf8", b"a", 0, 1, "r") :: UnicodeDecodeError("utf8", b"a", 0, 1, "r") :: UnicodeDecodeError("utf8", b"a", 0, 1, "s")
string template :: __import__("string").Template("$a") :: __import__("string").Template("$a") :: __import__("string").Template("$b")
dataclass with cached hash slot :: DC(1, np.arange(3)) :: DC(1, np.arange(3)) :: DC(1, np.arange(3)[::-1])
slots with getstate :: GS(1) :: copy.copy(GS(1)) :: GS(2)
getstate renames :: Ren(1) :: copy.copy(Ren(1)) :: Ren(2)
state replaced by a summary :: Summ([1, 2]) :: Summ([1, 2]) :: Summ([1, 3])
reduce drops a list :: RedDrop([1]) :: RedDrop([1]) :: RedDrop([2])
attribute behind a property :: Prop(1) :: Prop(1) :: Prop(2)
getattribute lies :: Liar(1) :: Liar(1) :: Liar(2)
class property lies :: Fake(1) :: Fake(1) :: Fake(2)
dict subclass with attributes :: setattrs(MyDict(a=1), z=1) :: setattrs(MyDict(a=1), z=1) :: setattrs(MyDict(a=1), z=2)
set subclass :: setattrs(MySet({"a", "b"}), z=1) :: setattrs(MySet({"b", "a"}), z=1) :: setattrs(MySet({"a", "b"}), z=2)
frozenset subclass content :: MyFro({"a", "b"}) :: MyFro({"b", "a"}) :: MyFro({"a", "c"})
tuple subclass :: setattrs(MyTup((1,)), z=1) :: setattrs(MyTup((1,)), z=1) :: setattrs(MyTup((2,)), z=1)
bytearray subclass :: MyBA(b"a") :: MyBA(b"a") :: MyBA(b"b")
complex subclass :: MyComplex(1j) :: MyComplex(1j) :: MyComplex(2j)
float subclass lossy :: MyFloat(1.5) :: MyFloat(1.5) :: MyFloat(2.5)
copyreg :: Reg(1) :: Reg(1) :: Reg(2)
weird keys :: {(1, "a"): 1, None: 2, 1.5: 3} :: {(1, "a"): 1, None: 2, 1.5: 3} :: {None: 2, (1, "a"): 1, 1.5: 3}
set of nan :: {float("nan"), 1} :: {1, float("nan")} :: {1}
deep mix :: [{"a": ({1: [np.arange(2), {Slots2(1)}]},)}] :: [{"a": ({1: [np.arange(2), {Slots2(1)}]},)}] :: [{"a": ({1: [np.arange(3), {Slots2(1)}]},)}]
single dispatch :: SD :: SD :: functools.singledispatch(func)
configparser :: cfg("1") :: cfg("1") :: cfg("2")
inspect signature :: __import__("inspect").signature(func) :: __import__("inspect").signature(func) :: __import__("inspect").signature(mk)
pathlib pure :: pathlib.PurePosixPath("a/b") :: pathlib.PurePosixPath("a/b") :: pathlib.PurePosixPath("a/c")
concurrent fraction :: statistics.NormalDist(1, 2) :: statistics.NormalDist(1, 2) :: statistics.NormalDist(1, 3)
"""  # noqa: E501

LIBRARY_MODELS = """
from models import *

try:
    import attrs

    @attrs.define
    class At:
        x: int = 0
        y: object = None

    @attrs.define(cache_hash=True, frozen=True)
    class AtHash:
        x: str = "a"
except ImportError:
    pass

try:
    import pydantic
    T_ = typing.TypeVar("T_")

    class Order(pydantic.BaseModel):
        sku: str
        pieces: int = 1

    class Cart(pydantic.BaseModel):
        orders: list[Order] = []
        note: typing.Optional[str] = None
        _secret: int = pydantic.PrivateAttr(default=1)
        @functools.cached_property
        def total(self): return sum(order.pieces for order in self.orders)

    class Extra(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")
        a: int = 1

    class Root(pydantic.RootModel[list[int]]): pass

    class Gen(pydantic.BaseModel, typing.Generic[T_]):
        a: T_

    class ArrModel(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
        a: np.ndarray

    @pydantic.dataclasses.dataclass
    class PD:
        a: int
        b: list[int] = pydantic.Field(default_factory=list)
except ImportError:
    pass

try:
    import sqlalchemy
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

    class SBase(DeclarativeBase): pass

    class Row_(SBase):
        __tablename__ = "r"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(sqlalchemy.String(3))
except ImportError:
    pass

try:
    import torch

    class Net(torch.nn.Module):
        def __init__(self, n=2):
            super().__init__()
            self.l = torch.nn.Linear(n, 2)
        def forward(self, x): return self.l(x)

    def net(seed):
        torch.manual_seed(seed)
        return Net()

    def trained(seed):
        model = net(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return model, optimizer
except ImportError:
    pass

try:
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LinearRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def CT(s="mean"):
        imputer = ColumnTransformer([("a", SimpleImputer(strategy=s), ["a"])])
        return imputer.fit(pd.DataFrame({"a": [1.0, 2.0]}))
except ImportError:
    pass

try:
    import networkx

    def gr(w):
        g = networkx.Graph()
        g.add_edge("a", "b", w=np.arange(w))
        return g
except ImportError:
    pass

try:
    import toolz

    @toolz.curry
    def curried(a, b): return a + b
except ImportError:
    pass

try: import polars as pl
except ImportError: pass

try: import pyarrow as pa, pyarrow.compute as pc
except ImportError: pass

try: import scipy.interpolate, scipy.stats, scipy.sparse as sp
except ImportError: pass

try: import xarray as xr
except ImportError: pass

try: from numba import njit
except ImportError: pass

try: import sympy
except ImportError: pass

try: import PIL.Image
except ImportError: pass

try:
    import pint
    UREG = pint.UnitRegistry()
except ImportError: pass
"""

LIBRARY_VALUES = r"""
pydantic :: Order(sku="n", pieces=3) :: Order.model_validate({"sku": "n", "pieces": 3}) :: Order(sku="n", pieces=4)
pydantic fields set :: Order(sku="n") :: Order(sku="n") :: Order(sku="n", pieces=1)
pydantic nested :: Cart(orders=[Order(sku="a")]) :: pickle.loads(pickle.dumps(Cart(orders=[Order(sku="a")]))) :: Cart(orders=[Order(sku="b")])
pydantic private :: Cart() :: Cart() :: setattrs(Cart(), _secret=2)
pydantic cached :: Cart(orders=[]) :: use(Cart(orders=[]), "total") :: Cart(orders=[], note="x")
pydantic extra :: Extra(a=1, z=2) :: Extra(a=1, z=2) :: Extra(a=1, z=3)
pydantic dataclass :: PD(1) :: PD(1, []) :: PD(1, [2])
attrs :: At(1, [2]) :: pickle.loads(pickle.dumps(At(1, [2]))) :: At(1, [3])
attrs cached hash :: AtHash("a") :: do(AtHash("a"), hash) :: AtHash("b")
attrs cached hash pickled :: do(AtHash("a"), hash) :: pickle.loads(pickle.dumps(do(AtHash("a"), hash))) :: AtHash("b")
toolz :: curried(1) :: curried(1) :: curried(2)
ordered dict :: do(collections.OrderedDict(a=1, b=2), lambda d: d.move_to_end("a")) :: collections.OrderedDict(b=2, a=1) :: collections.OrderedDict(a=1, b=2)
polars frame :: pl.DataFrame({"a": [1, None], "b": ["x", "y"]}) :: pl.concat([pl.DataFrame({"a": [1], "b": ["x"]}), pl.DataFrame({"a": [None], "b": ["y"]}, schema={"a": pl.Int64, "b": pl.String})], rechunk=False) :: pl.DataFrame({"a": [1, 0], "b": ["x", "y"]})
polars slice :: pl.Series("a", ["x", "y"]) :: pl.Series("a", ["z", "x", "y"])[1:] :: pl.Series("b", ["x", "y"])
polars list :: pl.Series([[1], [2, None]]) :: pl.Series([[9], [1], [2, None]])[1:] :: pl.Series([[1], [None, 2]])
polars struct :: pl.Series([{"a": 1, "b": "x"}]) :: pl.Series([{"a": 1, "b": "x"}]) :: pl.Series([{"a": 1, "b": "y"}])
polars categorical :: pl.Series(["a", "b"], dtype=pl.Categorical) :: do(pl.Series(["a", "b"], dtype=pl.Categorical), lambda s: pl.Series(["q", "b"], dtype=pl.Categorical)) :: pl.Series(["a", "c"], dtype=pl.Categorical)
polars enum :: pl.Series(["a"], dtype=pl.Enum(["a", "b"])) :: pl.Series(["a"], dtype=pl.Enum(["a", "b"])) :: pl.Series(["a"], dtype=pl.Enum(["b", "a"]))
polars datetime :: pl.Series([datetime.datetime(2020,1,1)], dtype=pl.Datetime("us", "UTC")) :: pl.Series([datetime.datetime(2020,1,1)], dtype=pl.Datetime("us", "UTC")) :: pl.Series([datetime.datetime(2020,1,1)], dtype=pl.Datetime("ms", "UTC"))
polars bool, null, object :: pl.DataFrame({"a": [True, None], "b": [None, None]}) :: pl.DataFrame({"a": [True, None], "b": [None, None]}) :: pl.DataFrame({"a": [False, None], "b": [None, None]})
polars empty :: pl.DataFrame({"a": []}, schema={"a": pl.String}) :: pl.DataFrame({"a": ["x"]}).clear() :: pl.DataFrame({"a": []}, schema={"a": pl.Int8})
polars expr :: pl.col("a") + 1 :: pl.col("a") + 1 :: pl.col("a") + 2
arrow table :: pa.table({"a": [1, None], "b": ["x", "y"]}) :: pa.concat_tables([pa.table({"a": [1], "b": ["x"]}), pa.table({"a": pa.array([None], pa.int64()), "b": ["y"]})]) :: pa.table({"a": [1, 0], "b": ["x", "y"]})
arrow metadata :: pa.table({"a": [1]}).replace_schema_metadata({"k": "v"}) :: pa.table({"a": [1]}).replace_schema_metadata({"k": "v"}) :: pa.table({"a": [1]}).replace_schema_metadata({"k": "w"})
arrow nested :: pa.array([[1, 2], None, [3]]) :: pa.array([[7], [1, 2], None, [3]])[1:] :: pa.array([[1], None, [2, 3]])
arrow struct :: pa.array([{"a": 1}, None]) :: pa.array([{"a": 1}, None]) :: pa.array([{"a": 1}, {"a": None}])
arrow dictionary :: pa.array(["a", "b", "a"]).dictionary_encode() :: pa.array(["a", "b", "a"]).dictionary_encode() :: pa.array(["a", "b", "b"]).dictionary_encode()
arrow map :: pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())) :: pa.array([[("b", 1)], [("a", 1)]], pa.map_(pa.string(), pa.int8()))[1:] :: pa.array([[("a", 2)]], pa.map_(pa.string(), pa.int8()))
arrow decimal :: pa.array([decimal.Decimal("1.0"), None]) :: pa.chunked_array([[decimal.Decimal("1.0")], pa.array([None], pa.decimal128(2, 1))]).combine_chunks() :: pa.array([decimal.Decimal("1.1"), None])
arrow fixed binary :: pa.array([b"ab", None], pa.binary(2)) :: pa.array([b"xx", b"ab", None], pa.binary(2))[1:] :: pa.array([b"ac", None], pa.binary(2))
arrow view :: pa.array(["a", None], pa.string_view()) :: pa.array(["z", "a", None], pa.string_view())[1:] :: pa.array(["b", None], pa.string_view())
arrow field nullable :: pa.schema([pa.field("a", pa.int8(), nullable=False)]) :: pa.schema([pa.field("a", pa.int8(), nullable=False)]) :: pa.schema([pa.field("a", pa.int8())])
arrow null, bool :: pa.table({"a": pa.nulls(2), "b": [True, None]}) :: pa.table({"a": pa.nulls(2), "b": [True, None]}) :: pa.table({"a": pa.nulls(2), "b": [None, True]})
arrow chunked empty :: pa.chunked_array([], pa.string()) :: pa.chunked_array([[]], pa.string()) :: pa.chunked_array([["a"]], pa.string())
arrow list null garbage :: pa.array([[1], None]) :: pa.ListArray.from_arrays(pa.array([0, 1, 3]), pa.array([1, 8, 9]), mask=pa.array([False, True])) :: pa.array([[1], []])
csr :: sp.csr_matrix([[0, 1], [2, 0]]) :: do(sp.csr_matrix([[0, 1], [2, 0]]), lambda m: (m.has_sorted_indices, m.T, m @ m, m.sum_duplicates())) :: sp.csr_matrix([[0, 1], [3, 0]])
csr unsorted :: sp.csr_matrix(([2, 1], [1, 0], [0, 2]), shape=(1, 2)) :: sp.csr_matrix(([1, 2], [0, 1], [0, 2]), shape=(1, 2)) :: sp.csr_matrix(([2, 1], [0, 1], [0, 2]), shape=(1, 2))
coo :: sp.coo_matrix(([1, 1], ([0, 0], [1, 1]))) :: sp.coo_matrix(([2], ([0], [1]))) :: sp.coo_matrix(([3], ([0], [1])))
lil, dok :: [sp.lil_matrix([[1]]), sp.dok_matrix([[1]])] :: [sp.lil_matrix([[1]]), sp.dok_matrix([[1]])] :: [sp.lil_matrix([[2]]), sp.dok_matrix([[1]])]
sparse array :: sp.csr_array([[0, 1]]) :: sp.csr_array([[0, 1]]) :: sp.csr_matrix([[0, 1]])
dia :: sp.diags([1.0, 2.0]) :: sp.diags([1.0, 2.0]) :: sp.diags([1.0, 3.0])
tensor :: torch.arange(6.0) :: pickle.loads(pickle.dumps(torch.arange(6.0))) :: torch.arange(6.0) + 1
tensor dtype :: torch.zeros(2, dtype=torch.bfloat16) :: torch.zeros(2, dtype=torch.bfloat16) :: torch.zeros(2, dtype=torch.float16)
tensor view :: torch.arange(6.0)[2:4] :: torch.tensor([2.0, 3.0]) :: torch.tensor([2.0, 4.0])
tensor requires_grad :: torch.zeros(2, requires_grad=True) :: torch.zeros(2, requires_grad=True) :: torch.zeros(2)
tensor scalar, bool :: [torch.tensor(1), torch.tensor(True)] :: [torch.tensor(1), torch.tensor(True)] :: [torch.tensor(2), torch.tensor(True)]
tensor attribute :: setattrs(torch.zeros(1), z=1) :: setattrs(torch.zeros(1), z=1) :: setattrs(torch.zeros(1), z=2)
module :: net(1) :: pickle.loads(pickle.dumps(net(1))) :: net(2)
state dict :: net(1).state_dict() :: copy.deepcopy(net(1).state_dict()) :: net(2).state_dict()
module trained :: trained(1) :: pickle.loads(pickle.dumps(trained(1))) :: trained(2)
module used :: net(1) :: do(net(1), lambda m: m(torch.zeros(1, 2))) :: net(1).eval()
torch generator :: torch.Generator().manual_seed(1) :: torch.Generator().manual_seed(1) :: torch.Generator().manual_seed(2)
torch dtype, device, size :: [torch.float32, torch.device("cpu"), torch.Size([1])] :: [torch.float32, torch.device("cpu"), torch.Size([1])] :: [torch.float32, torch.device("cpu"), torch.Size([2])]
graph :: networkx.path_graph(3) :: do(networkx.path_graph(3), lambda g: (g.nodes, g.edges, g.adj, g.degree, networkx.shortest_path(g, 0, 2))) :: networkx.path_graph(4)
xarray :: xr.DataArray([1, 2], dims="x", coords={"x": [1, 2]}, name="n") :: do(xr.DataArray([1, 2], dims="x", coords={"x": [1, 2]}, name="n"), lambda a: (a.sel(x=1), a.dt if 0 else 0, a.indexes, a.plot)) :: xr.DataArray([1, 2], dims="y", coords={"y": [1, 2]}, name="n")
xarray dataset :: xr.Dataset({"a": ("x", [1.0])}) :: pickle.loads(pickle.dumps(do(xr.Dataset({"a": ("x", [1.0])}), lambda d: (d.a, d.sizes, d.mean())))) :: xr.Dataset({"a": ("x", [2.0])})
sklearn :: LinearRegression().fit([[1.0], [2.0]], [1.0, 2.0]) :: pickle.loads(pickle.dumps(LinearRegression().fit([[1.0], [2.0]], [1.0, 2.0]))) :: LinearRegression().fit([[1.0], [2.0]], [1.0, 3.0])
random forest :: RandomForestClassifier(2, random_state=0).fit([[1], [2]], [0, 1]) :: pickle.loads(pickle.dumps(RandomForestClassifier(2, random_state=0).fit([[1], [2]], [0, 1]))) :: RandomForestClassifier(2, random_state=1).fit([[1], [2]], [0, 1])
column pipeline :: make_pipeline(StandardScaler(), Ridge()).fit([[1.0], [2.0]], [1.0, 2.0]) :: make_pipeline(StandardScaler(), Ridge()).fit([[1.0], [2.0]], [1.0, 2.0]) :: make_pipeline(StandardScaler(), Ridge(2.0)).fit([[1.0], [2.0]], [1.0, 2.0])
scipy spline :: scipy.interpolate.CubicSpline([1, 2, 3], [1, 2, 4]) :: scipy.interpolate.CubicSpline([1, 2, 3], [1, 2, 4]) :: scipy.interpolate.CubicSpline([1, 2, 3], [1, 2, 5])
scipy frozen distribution :: scipy.stats.norm(1) :: scipy.stats.norm(1) :: scipy.stats.norm(2)
pint quantity :: 3 * UREG.meter :: UREG.Quantity(3, "meter") :: 3 * UREG.km
numba function :: njit(func) :: do(njit(func), lambda f: f(1)) :: njit(func2)
sympy :: sympy.Symbol("x") + 1 :: 1 + sympy.Symbol("x") :: sympy.Symbol("x") + 2
image :: PIL.Image.new("RGB", (2, 2), "red") :: do(PIL.Image.new("RGB", (2, 2), "red"), lambda i: i.tobytes()) :: PIL.Image.new("RGB", (2, 2), "blue")
xarray used :: xr.Dataset({"a": ("x", [1.0])}) :: do(xr.Dataset({"a": ("x", [1.0])}), lambda d: (d.attrs, d.encoding, d.a.attrs, d["a"].sel)) :: xr.Dataset({"a": ("x", [1.0])}, attrs={"z": 1})
xarray variable :: xr.Variable("x", [1]) :: xr.Variable("x", [1]) :: xr.Variable("x", [2])
polars nested categorical :: pl.Series([["a"]], dtype=pl.List(pl.Categorical)) :: pl.Series([["a"]], dtype=pl.List(pl.Categorical)) :: pl.Series([["b"]], dtype=pl.List(pl.Categorical))
polars decimal, time, duration :: pl.DataFrame({"a": [decimal.Decimal("1.0")], "b": [datetime.time(1)], "c": [datetime.timedelta(1)]}) :: pl.DataFrame({"a": [decimal.Decimal("1.0")], "b": [datetime.time(1)], "c": [datetime.timedelta(1)]}) :: pl.DataFrame({"a": [decimal.Decimal("1.0")], "b": [datetime.time(2)], "c": [datetime.timedelta(1)]})
polars array :: pl.Series([[1, 2]], dtype=pl.Array(pl.Int8, 2)) :: pl.Series([[3, 4], [1, 2]], dtype=pl.Array(pl.Int8, 2))[1:] :: pl.Series([[1, 3]], dtype=pl.Array(pl.Int8, 2))
polars object :: pl.Series([Slots2(1)], dtype=pl.Object) :: pl.Series([Slots2(1)], dtype=pl.Object) :: pl.Series([Slots2(2)], dtype=pl.Object)
polars null garbage :: pl.Series([1, None]) :: pl.Series([1, 5]).set(pl.Series([False, True]), None) :: pl.Series([1, 5])
polars nan :: pl.Series([1.0, float("nan")]) :: pl.Series([1.0, float("nan")]) :: pl.Series([1.0, None])
polars sorted flag :: pl.Series([1, 2]) :: pl.Series([2, 1]).sort() :: pl.Series([2, 1])
polars selector :: pl.col("a", "b").sum().alias("x") :: pl.col("a", "b").sum().alias("x") :: pl.col("a", "b").sum().alias("y")
polars categorical type :: pl.Schema({"a": pl.Categorical()}) :: pl.Schema({"a": pl.Categorical()}) :: pl.Schema({"a": pl.Categorical(pl.Categories("x"))})
polars schema :: pl.Schema({"a": pl.Int8}) :: pl.Schema({"a": pl.Int8}) :: pl.Schema({"a": pl.Int16})
arrow union :: pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]) :: pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 9]), pa.array(["z", "b"])]) :: pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "c"])])
arrow fixed list :: pa.array([[1, 2], None], pa.list_(pa.int8(), 2)) :: pa.array([[9, 9], [1, 2], None], pa.list_(pa.int8(), 2))[1:] :: pa.array([[1, 2], [0, 0]], pa.list_(pa.int8(), 2))
arrow nested ns :: pa.array([[1, 2]], pa.list_(pa.timestamp("ns"))) :: pa.array([[1, 2]], pa.list_(pa.timestamp("ns"))) :: pa.array([[1, 3]], pa.list_(pa.timestamp("ns")))
arrow struct slice :: pa.array([{"a": "x"}, {"a": "y"}])[1:] :: pa.array([{"a": "y"}]) :: pa.array([{"a": "x"}])
arrow dictionary chunks :: pa.chunked_array([pa.array(["a", "b"]).dictionary_encode(), pa.array(["b"]).dictionary_encode()]) :: pa.chunked_array([pa.array(["a", "b", "b"]).dictionary_encode()]) :: pa.chunked_array([pa.array(["a", "b", "a"]).dictionary_encode()])
arrow run end :: pc.run_end_encode(pa.array([1, 1, 2])) :: pc.run_end_encode(pa.array([1, 1, 2])) :: pc.run_end_encode(pa.array([1, 2, 2]))
arrow scalar, batch :: [pa.scalar(1), pa.record_batch({"a": [1]})] :: [pa.scalar(1), pa.record_batch({"a": [1]})] :: [pa.scalar(1), pa.record_batch({"a": [2]})]
arrow large string chunks :: pa.chunked_array([["a"], ["b"]], pa.large_string()) :: pa.chunked_array([["a", "b"]], pa.large_string()) :: pa.chunked_array([["a", "b"]], pa.string())
arrow text split :: pa.array(["ab", "c"]) :: pa.array(["ab", "c"]) :: pa.array(["a", "bc"])
arrow expression :: pc.field("a") > 1 :: pc.field("a") > 1 :: pc.field("a") > 2
arrow duration day interval :: pa.array([1, None], pa.duration("s")) :: pa.array([5, 1, None], pa.duration("s"))[1:] :: pa.array([1, None], pa.duration("ms"))
arrow list of lists with nulls :: pa.array([[[1], None], None, []]) :: pa.array([[[2]], [[1], None], None, []])[1:] :: pa.array([[[1]], None, []])
explicit zero :: sp.csr_matrix(([0, 1], [0, 1], [0, 2]), shape=(1, 2)) :: sp.csr_matrix(([0, 1], [0, 1], [0, 2]), shape=(1, 2)) :: sp.csr_matrix(([1], [1], [0, 1]), shape=(1, 2))
csc, bsr :: [sp.csc_matrix([[0, 1]]), sp.bsr_matrix([[0, 1]])] :: [sp.csc_matrix([[0, 1]]), sp.bsr_matrix([[0, 1]])] :: [sp.csc_matrix([[0, 1]]), sp.bsr_matrix([[1, 1]])]
torch expanded :: torch.ones(1).expand(3) :: torch.ones(3) :: torch.ones(4)
torch channels last :: torch.ones(1,2,2,2).to(memory_format=torch.channels_last) :: torch.ones(1,2,2,2).to(memory_format=torch.channels_last) :: torch.ones(1,2,2,2)
torch parameter :: torch.nn.Parameter(torch.ones(1)) :: torch.nn.Parameter(torch.ones(1)) :: torch.ones(1, requires_grad=True)
torch grad :: do(torch.ones(1, requires_grad=True), lambda t: t.sum().backward()) :: do(torch.ones(1, requires_grad=True), lambda t: t.sum().backward()) :: torch.ones(1, requires_grad=True)
torch dataset :: torch.utils.data.TensorDataset(torch.ones(2)) :: torch.utils.data.TensorDataset(torch.ones(2)) :: torch.utils.data.TensorDataset(torch.zeros(2))
torch sequential, scheduler :: torch.nn.Sequential(net(1), torch.nn.ReLU()) :: torch.nn.Sequential(net(1), torch.nn.ReLU()) :: torch.nn.Sequential(net(1), torch.nn.Sigmoid())
pydantic root :: Root([1]) :: Root([1]) :: Root([2])
pydantic generic :: Gen[int](a=1) :: Gen[int](a=1) :: Gen[str](a="1")
pydantic secret :: pydantic.SecretStr("a") :: pydantic.SecretStr("a") :: pydantic.SecretStr("b")
pydantic model class :: Order :: Order :: Cart
pydantic url :: pydantic.TypeAdapter(pydantic.HttpUrl).validate_python("http://a.b") :: pydantic.TypeAdapter(pydantic.HttpUrl).validate_python("http://a.b") :: pydantic.TypeAdapter(pydantic.HttpUrl).validate_python("http://a.c")
pydantic settings of arrays :: ArrModel(a=np.arange(3)) :: ArrModel(a=np.arange(3)) :: ArrModel(a=np.arange(4))
sqlalchemy instance :: Row_(id=1, name="a") :: Row_(id=1, name="a") :: Row_(id=1, name="b")
sqlalchemy query :: sqlalchemy.select(Row_.__table__).where(Row_.__table__.c.id == 3) :: sqlalchemy.select(Row_.__table__).where(Row_.__table__.c.id == 3) :: sqlalchemy.select(Row_.__table__).where(Row_.__table__.c.id == 4)
sqlalchemy text :: sqlalchemy.text("select 1") :: sqlalchemy.text("select 1") :: sqlalchemy.text("select 2")
frozen attrs slots :: At(1) :: do(At(1), weakref.ref) :: At(2)
networkx with arrays :: gr(1) :: do(gr(1), lambda g: (g.nodes, g.edges, g.in_edges if g.is_directed() else 0)) :: gr(2)
networkx digraph used :: networkx.DiGraph([(1, 2)]) :: do(networkx.DiGraph([(1, 2)]), lambda g: (g.pred, g.succ, g.in_degree, g.out_edges, networkx.pagerank(g))) :: networkx.DiGraph([(2, 1)])
xarray index used :: xr.DataArray([1, 2], coords={"x": pd.Index([1, 2])}, dims="x") :: do(xr.DataArray([1, 2], coords={"x": pd.Index([1, 2])}, dims="x"), lambda a: (a.sel(x=1), a.x, a.coords, a.indexes["x"].get_loc(1))) :: xr.DataArray([1, 2], coords={"x": pd.Index([1, 3])}, dims="x")
xarray pickled :: xr.DataArray([1, 2], coords={"x": [1, 2]}, dims="x", attrs={"u": "m"}) :: pickle.loads(pickle.dumps(xr.DataArray([1, 2], coords={"x": [1, 2]}, dims="x", attrs={"u": "m"}))) :: xr.DataArray([1, 2], coords={"x": [1, 2]}, dims="x", attrs={"u": "k"})
sklearn column transformer :: CT() :: pickle.loads(pickle.dumps(CT())) :: CT("median")
sympy symbol assumptions :: sympy.Symbol("x", positive=True) :: sympy.Symbol("x", positive=True) :: sympy.Symbol("x")
pint registry unit :: UREG.meter / UREG.second :: do(UREG.meter / UREG.second, str) :: UREG.meter
"""  # noqa: E501

OPAQUE_VALUES = r"""
lock object :: setattrs(Log(1), lock=threading.Lock())
left out connection :: setattrs(WithLock(1), c=__import__("sqlite3").connect(":memory:"))
file :: open("/dev/null")
generator :: (i for i in "x")
memoryview :: memoryview(b"x")
frame of locks :: pd.DataFrame({"a": [threading.Lock()]})
hash object :: __import__("hashlib").sha256()
"""

OPAQUE_LIBRARY_VALUES = r"""
lazy frame :: pl.DataFrame({"a": [1]}).lazy()
lazy scan :: pl.scan_csv("x.csv")
autograd :: torch.zeros(2, requires_grad=True) * 2
expr with python :: pl.col("a").map_elements(func)
dask :: __import__("dask.array").array.zeros(3)
tensor in module with graph :: setattrs(net(1), t=torch.zeros(2, requires_grad=True) * 2)
"""

FINGERPRINT_SCRIPT = """
import json, sys, warnings
import dagkit
warnings.simplefilter("ignore")
exec(f"from {MODULE} import *")

def compute(expression):
    try:
        return dagkit._fingerprint(eval(expression))
    except dagkit._Opaque as error:
        return error.reason
    except (ImportError, NameError) as error:
        return f"skip: {error}"

print(json.dumps([[compute(x) for x in row] for row in ROWS]))
"""


def read_rows(table: str) -> list[list[str]]:
    return [line.split(" :: ") for line in table.strip().splitlines()]


def compute_rows(rows: list[list[str]], module: str, folder: Path) -> list[list[list[str]]]:
    """Compute the fingerprints of all expressions, in two processes with different hash seeds."""
    write_files(folder, {"models.py": MODELS, "library_models.py": LIBRARY_MODELS})
    code = f"MODULE = {module!r}\nROWS = {[row[1:] for row in rows]!r}\n{FINGERPRINT_SCRIPT}"
    return [json.loads(run_in(folder, code, PYTHONHASHSEED=seed)) for seed in ("1", "2")]


@pytest.fixture(scope="session")
def value_fingerprints(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[str]]]:
    rows = [*read_rows(VALUES), *read_rows(OPAQUE_VALUES)]
    return compute_rows(rows, "models", tmp_path_factory.mktemp("values"))


@pytest.fixture(scope="session")
def library_fingerprints(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[str]]]:
    rows = [*read_rows(LIBRARY_VALUES), *read_rows(OPAQUE_LIBRARY_VALUES)]
    return compute_rows(rows, "library_models", tmp_path_factory.mktemp("library_values"))


def check_value(fingerprints: list[list[list[str]]], number: int) -> None:
    first, second = (process[number] for process in fingerprints)
    if first[0].startswith("skip"):
        pytest.skip(first[0])
    value, equal, different = first
    assert re.fullmatch("[0-9a-f]{64}", value)
    assert value == equal
    assert value != different
    assert first == second


def list_ids(table: str) -> list[str]:
    return [row[0] for row in read_rows(table)]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(list_ids(VALUES))), ids=list_ids(VALUES))
def test_a_fingerprint_is_equal_exactly_for_equal_values(
    number: int, value_fingerprints: list[list[list[str]]]
) -> None:
    check_value(value_fingerprints, number)


@pytest.mark.libraries
@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(list_ids(LIBRARY_VALUES))), ids=list_ids(LIBRARY_VALUES)
)
def test_values_of_libraries_are_equal_in_every_process(
    number: int, library_fingerprints: list[list[list[str]]]
) -> None:
    check_value(library_fingerprints, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(list_ids(OPAQUE_VALUES))), ids=list_ids(OPAQUE_VALUES))
def test_a_value_that_cannot_be_described_completely_is_opaque(
    number: int, value_fingerprints: list[list[list[str]]]
) -> None:
    assert value_fingerprints[0][len(list_ids(VALUES)) + number][0].startswith("no fingerprint: ")


@pytest.mark.libraries
@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(list_ids(OPAQUE_LIBRARY_VALUES))), ids=list_ids(OPAQUE_LIBRARY_VALUES)
)
def test_a_value_of_a_library_that_reads_or_computes_later_is_opaque(
    number: int, library_fingerprints: list[list[list[str]]]
) -> None:
    (reason,) = library_fingerprints[0][len(list_ids(LIBRARY_VALUES)) + number]
    if reason.startswith("skip"):
        pytest.skip(reason)
    assert reason.startswith("no fingerprint: ")


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=3),
    st.binary(max_size=3), st.complex_numbers(), st.decimals(),
)  # fmt: skip
keys = st.one_of(st.none(), st.integers(-3, 3), st.text(max_size=2), st.floats(allow_nan=False))
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.sets(keys, max_size=3),
        st.frozensets(keys, max_size=3),
    ),
    max_leaves=6,
)


def describe(value: Any) -> Any:
    """Describe in another way what a fingerprint must tell apart."""
    kind = type(value).__name__
    if isinstance(value, list | tuple):
        return (kind, *map(describe, value))
    if isinstance(value, dict):
        return (kind, *((describe(key), describe(item)) for key, item in value.items()))
    if isinstance(value, set | frozenset):
        return (kind, *sorted(map(repr, map(describe, value))))
    if isinstance(value, complex):
        return (kind, describe(value.real), describe(value.imag))
    if isinstance(value, float):
        return (kind, "nan" if math.isnan(value) else value.hex())
    return (kind, repr(value))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(trees, trees)
def test_fingerprints_are_equal_exactly_if_values_and_types_are(first: Any, second: Any) -> None:
    is_same = describe(first) == describe(second)
    assert (fingerprint(first) == fingerprint(second)) == is_same
    twin = pickle.loads(pickle.dumps(first))
    assert fingerprint([first, first]) == fingerprint([first, twin])


# Sources


def list_sources(value: Any) -> list[str]:
    return sorted(str(source) for source in fingerprint_with_sources(value)[1])


def test_a_value_names_the_files_packages_and_code_that_it_depends_on(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("1")
    value = [Multiplier(1), path, np.zeros(3), scale]
    text, sources = fingerprint_with_sources(value)
    assert text == fingerprint(value)
    assert [source.kind for source in sources] == ["code", "file", "package", "code"]
    assert list_sources(value) == ["code Multiplier", "code scale", f"file {path}", "package numpy"]
    for source in sources:
        twin = SOURCE_TYPES[source.kind](source.name, source.fingerprint)
        assert twin == source
        assert source.compute_fingerprint() == source.fingerprint


def test_a_source_explains_how_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = HERE / f"{tmp_path.name}.csv"
    path.write_text("1")
    _, (source,) = fingerprint_with_sources(path)
    path.write_text("2")
    assert source.compute_fingerprint() != source.fingerprint
    assert source.explain_change() == f"file {path.name} changed"
    path.unlink()
    assert source.compute_fingerprint() != source.fingerprint
    assert source.explain_change() == f"file {path.name} is gone"
    package = SOURCE_TYPES["package"]("numpy", "1.0")
    assert package.explain_change() == f"package numpy 1.0 → {np.__version__}"
    assert SOURCE_TYPES["package"]("nosuch", "1").explain_change() == "package nosuch is gone"
    code = SOURCE_TYPES["code"](f"{__name__}:scale", "")
    assert code.explain_change() == "code scale changed"
    code = SOURCE_TYPES["code"](f"{__name__}:nosuch", "")
    assert code.explain_change() == "code nosuch is gone"


def test_another_library_function_as_a_step_is_another_step() -> None:
    for function, value in ((statistics.mean, 4), (statistics.median, 2)):
        pipeline = Pipeline(Step(function, name="middle", cache=True))
        assert pipeline.run(data=[1, 2, 9])["middle"] == value
    pipeline = Pipeline(Step(statistics.mean, name="middle", cache=True))
    assert pipeline.plan(data=[1, 2, 9])["middle"].status == "fresh"
    pipeline = Pipeline(Step(statistics.mode, name="middle", cache=True))
    assert pipeline.plan(data=[1, 2, 9])["middle"].reason == "code changed: median, mode"
    for kind in (list, tuple):
        pipeline = Pipeline(Step(kind, name="items", args={"iterable": "n"}, cache=True))
        assert type(pipeline.run(n=(1,))["items"]) is kind


def test_a_class_edited_behind_a_stored_value_runs_the_dependents(tmp_path: Path) -> None:
    """The dependent does not name the class; only the value leads to it."""
    write_files(tmp_path / "app", {
        "models.py": "class M:\n    def score(self): return 1\n",
        "app.py": """
            import models, pickle
            from dagkit import step
            @step(cache=True)
            def model(text): return pickle.loads(text)
            @step(cache=True)
            def score(model): return model.score()
        """,
    })  # fmt: skip
    code = """
        import app, dagkit, models, pickle
        print(dagkit.Pipeline(app).run("score", text=b"cmodels\\nM\\n)\\x81.")["score"])
    """
    assert run_in(tmp_path / "app", code) == "1\n"
    (tmp_path / "app" / "models.py").write_text("class M:\n    def score(self): return 2\n")
    assert run_in(tmp_path / "app", code) == "2\n"


@pytest.mark.slow
def test_a_value_that_holds_functions_without_a_name_of_their_own_is_reused(tmp_path: Path) -> None:
    """Methods that SciPy makes by exec, and the function behind a decorator."""
    app = """
        import functools
        from dagkit import step
        def log(function):
            @functools.wraps(function)
            def logging(*args): return function(*args)
            return logging
        @log
        def add(a, b): return a + b
        @step(cache=True)
        def normal():
            from scipy import stats
            return stats.norm(4)
        @step(cache=True)
        def partial(): return functools.partial(globals()["add"], 1)
        @step(cache=True)
        def result(normal, partial): return float(partial(normal.mean()))
    """
    code = """
        import app, dagkit
        run = dagkit.Pipeline(app).run()
        print(run["result"], [state.status for state in run.steps.values()])
    """
    write_files(tmp_path / "app", {"app.py": app})
    assert run_in(tmp_path / "app", code) == "5.0 ['ran', 'ran', 'ran']\n"
    assert run_in(tmp_path / "app", code) == "5.0 ['cached', 'cached', 'cached']\n"
    write_files(tmp_path / "app", {"app.py": app.replace("a + b", "a - b")})
    assert run_in(tmp_path / "app", code) == "-3.0 ['cached', 'ran', 'ran']\n"


class LossyNumber(int):
    def __reduce__(self) -> Any:
        return LossyNumber, ()


class NoLock:
    """Like many classes, it leaves its lock out of its pickles; without ``make`` it loses it."""

    def __init__(self, make: bool) -> None:
        self.make = make
        self.lock = threading.Lock()

    def __getstate__(self) -> Any:
        return {"make": self.make}

    def __setstate__(self, state: Any) -> None:
        self.make = state["make"]
        if self.make:
            self.lock = threading.Lock()


class NotLoadable:
    def __reduce__(self) -> Any:
        return int, ("no number",)


@pytest.mark.parametrize(
    ("make", "is_kept"),
    [
        (lambda: LossyNumber(3), False),
        (lambda: [{"n": LossyNumber(0)}], True),  # nothing is lost by chance
        (lambda: NoLock(make=True), True),
        (lambda: (NoLock(make=True), NoLock(make=False)), False),
        (lambda: {"x": NotLoadable()}, False),
        (lambda: [LossyNumber(3), np.zeros(5 << 20)], False),  # it is hashed in a thread
        (lambda: ValueError("a", 1), True),
    ],
)
def test_a_result_that_its_pickle_does_not_hold_is_not_stored(
    make: Callable[[], Any], is_kept: bool
) -> None:
    """The run returns what the step returned, and a warning names the class."""
    pipeline = Pipeline(Step(make, name="make", cache=True))
    for status in ("ran", "cached" if is_kept else "ran"):
        run, texts = catch_warnings(pipeline.run)
        assert run.steps["make"].status == status
        assert fingerprint(run["make"]) == fingerprint(make())
        assert len(texts) == (not is_kept)
        for text in texts:
            assert re.search(
                r"cannot be stored in .*: ValueError: it does not come back from its pickle as it "
                r"was \((\w+\.)?(LossyNumber|NoLock|NotLoadable)\)$",
                text,
            )


def install_package(folder: Path, version: str, body: str) -> None:
    """Install a package of that version, by hand."""
    write_files(folder / "site-packages", {
        "fakepkg/__init__.py": body,
        "fakepkg-0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: fakepkg\nVersion: {version}",
        "fakepkg-0.dist-info/top_level.txt": "fakepkg\n",
    })  # fmt: skip


@pytest.mark.slow
def test_installed_packages_count_by_version_and_only_those_reached(tmp_path: Path) -> None:
    write_files(tmp_path / "app", {"app.py": """
        import sys
        sys.path.append(__file__[:-10] + "site-packages")
        import fakepkg
        from dagkit import step
        @step(cache=True)
        def uses(): return fakepkg.f()
        @step(cache=True)
        def free(): return 1
    """})  # fmt: skip
    code = """
        import app, dagkit
        pipeline = dagkit.Pipeline(app)
        print(*[f"{x.name} {x.status} {x.reason}" for x in pipeline.plan().values()], sep="; ")
        pipeline.run()
    """
    install_package(tmp_path, "1.0", "def f(): return 1\n")
    assert run_in(tmp_path / "app", code) == "uses new never ran; free new never ran\n"
    install_package(tmp_path, "1.0", "def f(): return 3 - 2\n")
    assert run_in(tmp_path / "app", code) == "uses fresh ; free fresh \n"
    install_package(tmp_path, "2.0", "def f(): return 2\n")
    assert run_in(tmp_path / "app", code) == "uses stale package fakepkg 1.0 → 2.0; free fresh \n"


@pytest.mark.slow
def test_a_value_of_an_installed_class_counts_with_its_version(tmp_path: Path) -> None:
    """No code here names the package; the stored value does."""
    write_files(tmp_path / "app", {"app.py": """
        import sys, pickle
        sys.path.append(__file__[:-10] + "site-packages")
        from dagkit import step
        @step(cache=True)
        def model(text): return pickle.loads(text)
        @step(cache=True)
        def score(model): return model.score()
    """})  # fmt: skip
    code = """
        import app, dagkit
        print(dagkit.Pipeline(app).run("score", text=b"cfakepkg\\nM\\n)\\x81.")["score"])
    """
    for version in ("1", "2"):
        install_package(tmp_path, version, f"class M:\n    def score(self): return {version}\n")
        assert run_in(tmp_path / "app", code) == f"{version}\n"


########################################################################################
### Store
########################################################################################

# The layout of a store, which users do not see.


def list_entries(store: Store) -> list[Path]:
    return sorted(Path(store.path, "entries").glob("*/*/*"))


def list_values(store: Store) -> list[Path]:
    return sorted(Path(store.path, "values").glob("*/*"))


def list_tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def get_key_path() -> Path:
    return Path(os.environ["HOME"], ".local/share/dagkit/key")


def set_age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def spawn_python(code: str, **environment: str) -> subprocess.Popen[str]:
    """Start code in a new interpreter, which goes on beside the test."""
    env = {**os.environ, "PYTHONPATH": str(HERE), **environment}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


@step(cache=True)
def cubes(n: int) -> list[int]:
    return [i**3 for i in range(n)]


@step(cache=True)
def top(cubes: list[int]) -> int:
    return max(cubes)


def make_cubes() -> Pipeline:
    """Make a pipeline that knows nothing of what others have stored."""
    return Pipeline(cubes, top)


@pytest.fixture
def cubed() -> Pipeline:
    return make_cubes()


def run_cubed(pipeline: Pipeline, n: int = 4) -> tuple[str, int]:
    """Return the statuses and the value of a run."""
    run = pipeline.run(n=n)
    return get_statuses(run), run["top"]


RAN = "cubes ran, top ran"
CACHED = "cubes cached, top cached"


# Damage: a value is computed again, with one warning


@pytest.mark.parametrize("damage", ["bit", "cut"])
@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_damage_anywhere_in_an_entry_is_one_warning_and_a_miss(
    cubed: Pipeline, damage: str, stride: int
) -> None:
    cubed.run("cubes", n=4)
    (path,) = list_entries(cubed.store)
    for position in range(0, path.stat().st_size - 40, stride):
        if damage == "bit":
            flip_bit(path, position * 8 + position % 8)
        else:
            os.truncate(path, position)
        pipeline = make_cubes()
        run, texts = catch_warnings(functools.partial(pipeline.run, "cubes", n=4))
        assert run["cubes"] == [0, 1, 8, 27], position
        assert len(texts) == 1, position
        assert texts[0].startswith(f"the entry {path} is not used, its step runs again: it is ")
    assert catch_warnings(lambda: get_statuses(cubed.run("cubes", n=4))) == ("cubes cached", [])


@pytest.mark.parametrize(
    ("make", "positions"),
    [
        ("'x' * 10_000", (0, 5000, -1)),  # a pickle
        ("np.arange(1000.0)", (0, 90, 3000, -1)),  # a pickle and a buffer
        pytest.param(  # mapped
            "[np.arange(10.0), np.arange(5_000_000.0)]",
            (0, 5000, 20_000_000, -1),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["pickle", "buffer", "mapped"],
)
@pytest.mark.parametrize("damage", ["bit", "cut", "longer", "gone"])
def test_damage_to_a_value_is_one_warning_and_a_value_computed_again(
    make: str, positions: tuple[int, ...], damage: str
) -> None:
    value = eval(make)
    # The values of steps count by content, so that a step may return what it holds.
    pipeline = Pipeline(Step(lambda: value, name="table", cache=True))
    pipeline.run()
    (path,) = list_values(pipeline.store)
    original = fingerprint(value)
    for position in positions:
        size = path.stat().st_size
        position %= size - 128  # the file ends with padding, which does not count
        match damage:
            case "bit":
                with open(path, "r+b") as file:
                    file.seek(position)
                    byte = file.read(1)[0]
                    file.seek(position)
                    file.write(bytes([byte ^ 16]))
            case "cut":
                os.truncate(path, position)
            case "longer":
                os.truncate(path, size + 1)
            case "gone":
                path.unlink()
        again, texts = catch_warnings(lambda: pipeline.run()["table"])
        assert fingerprint(again) == original
        assert len(texts) == (damage != "gone")
        assert all("its step runs again" in text for text in texts)
        assert path.stat().st_size == size
    run, texts = catch_warnings(pipeline.run)
    assert (get_statuses(run), texts) == ("table cached", [])


def test_many_damaged_entries_are_one_warning_a_run(cubed: Pipeline) -> None:
    cubed.run(n=4)
    for path in list_entries(cubed.store):
        path.write_bytes(b"damaged")
    for _ in range(2):
        (status, value), texts = catch_warnings(lambda: run_cubed(cubed))
        assert (status, value, len(texts)) == (RAN, 27, 1)
        for path in list_entries(cubed.store):
            path.write_bytes(b"damaged")


def test_a_plan_deletes_what_is_damaged_and_explains_from_the_next_newest(
    cubed: Pipeline,
) -> None:
    cubed.run("cubes", n=4)
    time.sleep(0.01)
    cubed.run("cubes", n=5)
    newest = max(list_entries(cubed.store), key=lambda path: path.stat().st_mtime_ns)
    flip_bit(newest, 4000)
    plan, texts = catch_warnings(lambda: make_cubes().plan("cubes", n=6))
    assert plan["cubes"].reason == "input n 4 → 6"
    assert (len(texts), newest.exists()) == (1, False)


def test_arrays_come_back_writable_and_aligned_and_each_load_is_a_copy() -> None:
    @step(cache=True, outputs=("small", "large", "frame"))
    def tables() -> Any:
        return np.arange(1000), np.arange(5_000_000), pd.DataFrame({"a": np.arange(2000.0)})

    pipeline = Pipeline(tables)
    for _ in range(3):
        run = pipeline.run("small", "large", "frame")
        assert run["small"][3] == run["large"][3] == run["frame"]["a"][3] == 3
        assert run["small"].flags.aligned
        assert run["large"].flags.aligned
        run["small"][:] = run["large"][:] = 0
        run["frame"].loc[:, "a"] = 0
    assert get_statuses(run) == "tables cached"


FOREIGN_THINGS: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    # what lies there, what the warning says, whether it can be replaced by a file
    "nothing": (lambda path: path.write_bytes(b""), "no entry", True),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps([1])), "no entry", True),
    "a later format": (lambda path: path.write_bytes(b"dagkit 9 " + bytes(900)), "version", True),
    "a pipe": (lambda path: os.mkfifo(path), "no entry", True),
    "a link to itself": (lambda path: path.symlink_to(path), "symbolic", True),
    "a huge file": (lambda path: make_sparse_file(path), "too large", True),
    "a folder": (lambda path: path.mkdir(), "directory", False),
}


def make_sparse_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 43)


@pytest.mark.parametrize("thing", FOREIGN_THINGS)
def test_foreign_things_in_the_place_of_an_entry_are_a_miss(cubed: Pipeline, thing: str) -> None:
    make, reason, is_replaceable = FOREIGN_THINGS[thing]
    cubed.run("cubes", n=4)
    (path,) = list_entries(cubed.store)
    path.unlink()
    make(path)
    value, texts = catch_warnings(lambda: make_cubes().run("cubes", n=4)["cubes"])
    assert value == [0, 1, 8, 27]
    assert str(path) in texts[0]
    assert reason in texts[0]
    assert len(texts) == 1 + (not is_replaceable)  # a folder cannot be overwritten
    if is_replaceable:
        assert get_statuses(make_cubes().run("cubes", n=4)) == "cubes cached"
    assert os.listdir(Path(cubed.store.path, "tmp")) == []


def test_an_entry_under_the_name_of_another_is_a_miss(cubed: Pipeline) -> None:
    cubed.run("cubes", n=4)
    (path,) = list_entries(cubed.store)
    cubed.run("cubes", n=5)
    other = next(entry for entry in list_entries(cubed.store) if entry != path)
    shutil.copy(other, path)
    value, texts = catch_warnings(lambda: make_cubes().run("cubes", n=4)["cubes"])
    assert (value, len(texts)) == ([0, 1, 8, 27], 1)
    assert texts[0].endswith("it is the entry of another key")


@pytest.mark.parametrize("thing", ["a pipe", "a link to itself", "a folder", "a huge file"])
def test_foreign_things_in_the_place_of_a_value_are_a_miss(thing: str) -> None:
    pipeline = Pipeline(Step(lambda: "x" * 9999, name="text", cache=True))
    pipeline.run()
    (path,) = list_values(pipeline.store)
    path.unlink()
    FOREIGN_THINGS[thing][0](path)
    text, texts = catch_warnings(lambda: pipeline.run()["text"])
    assert (text, len(texts) <= 2) == ("x" * 9999, True)


def test_a_value_whose_class_is_gone_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = str(tmp_path / "the class is gone")
    module = types.ModuleType("fleeting")
    exec("class Fleeting: pass", vars(module))
    monkeypatch.setitem(sys.modules, "fleeting", module)

    @step(cache=True)
    def thing(text: bytes) -> Any:
        return 0 if os.path.exists(sign) else pickle.loads(text)

    pipeline = Pipeline(thing)
    text = b"cfleeting\nFleeting\n)\x81."
    run = pipeline.run(text=text)
    lazy_run = pipeline.run(text=text)
    assert type(run["thing"]).__name__ == "Fleeting"
    Path(sign).touch()
    del vars(module)["Fleeting"]
    assert pipeline.plan(text=text)["thing"].reason == "code Fleeting is gone"
    value, texts = catch_warnings(lambda: lazy_run["thing"])
    assert (value, len(texts)) == (0, 1)
    assert "AttributeError" in texts[0]
    assert catch_warnings(lambda: pipeline.run(text=text)["thing"]) == (0, [])


class Unloadable:
    """It can be pickled, but not be loaded again."""

    def __reduce__(self) -> Any:
        return int, ("x",)


class Unpicklable:
    """Pickling may raise anything, an error of the disk too."""

    def __reduce__(self) -> Any:
        raise OSError("no")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: print, "builtin_function_or_method"),
        (lambda: lambda: 0, "function"),
        (lambda: Unpicklable(), "Unpicklable"),
        (lambda: threading.Lock(), "lock"),
        (lambda: [Unloadable()], "list"),
        (lambda: [Unpicklable()] * 3, "list"),
    ],
)
def test_a_result_that_cannot_be_stored_is_one_warning_and_the_run_goes_on(
    make: Callable[[], Any], kind: str
) -> None:
    pipeline = Pipeline(
        Step(make, name="odd", cache=True),
        Step(lambda odd: type(odd).__name__, name="kind", cache=True),
    )
    run, texts = catch_warnings(lambda: pipeline.run("odd", "kind"))
    assert (type(run["odd"]).__name__, run["kind"]) == (kind, kind)
    assert len(texts) == (kind != "builtin_function_or_method")
    assert all("step 'odd'" in text or "its step runs again" in text for text in texts)
    assert os.listdir(Path(pipeline.store.path, "tmp")) == []


def test_a_value_without_a_fingerprint_is_stored_and_named_where_it_is_needed() -> None:
    polars = pytest.importorskip("polars")

    def lazy(n: int) -> Any:
        return polars.DataFrame({"a": [n] * 5000}).lazy()

    def height(lazy: Any) -> int:
        return len(lazy.collect())

    pipeline = Pipeline(Step(lazy, cache=True), Step(height, cache=True))
    for statuses in ("lazy ran, height ran", "lazy cached, height ran"):
        run = pipeline.run("lazy", "height", n=3)
        assert (get_statuses(run), run["height"]) == (statuses, 5000)
        assert run["lazy"].collect()["a"][0] == 3
        reason = "no fingerprint: value of step lazy -> polars.lazyframe.frame.LazyFrame"
        assert run.steps["height"].reason == reason


def test_equal_values_share_a_file_and_a_lost_one_is_made_again_by_either_step() -> None:
    def first() -> str:
        return "x" * 9999

    def second() -> str:
        return "".join(["x"] * 9999)

    pipeline = Pipeline(Step(first, cache=True), Step(second, cache=True))
    pipeline.run()
    (path,) = list_values(pipeline.store)
    pipeline.store.clear("first")
    assert not path.exists()
    statuses = [get_statuses(pipeline.run("second", "first")) for _ in range(2)]
    assert statuses == ["second ran, first ran", "second cached, first cached"]
    assert list_values(pipeline.store) == [path]


def test_equal_values_with_unequal_bytes_do_not_overwrite_each_other() -> None:
    """Padding of structured arrays does not count, so these have the same fingerprint."""
    kind = np.dtype([("a", "i1"), ("b", "i8")], align=True)

    def make(fill: int) -> Any:
        array = np.full(1000 * kind.itemsize, fill, "u1").view(kind)
        array["a"] = array["b"] = 1
        return array

    pipeline = Pipeline(
        Step(lambda: make(0), name="zeros", cache=True),
        Step(lambda: make(255), name="ones", cache=True),
    )
    pipeline.run()
    run, texts = catch_warnings(lambda: pipeline.run("zeros", "ones"))
    assert (run["zeros"] == run["ones"]).all()
    assert (get_statuses(run), texts) == ("zeros cached, ones cached", [])


# Disks


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Mount a disk of one megabyte and put the store there."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount")
    monkeypatch.setenv("DAGKIT_STORE", str(folder / "store"))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def blob(n: int) -> bytearray:
    return bytearray([n % 251]) * (n * 97)


def test_on_a_full_disk_a_run_goes_on_with_one_warning_a_run(small_disk: Path) -> None:
    for _ in range(2):
        pipeline = Pipeline(Step(blob, cache=True, map="n"))
        numbers = list(range(0, 900, 9))
        run, texts = catch_warnings(functools.partial(pipeline.run, n=numbers))
        assert run["blob"] == [blob(n) for n in numbers]
        assert len(texts) == 1
        assert "No space left" in texts[0]
        assert os.listdir(small_disk / "store" / "tmp") == []
        assert 2 < len(list_entries(pipeline.store)) < 100


def test_on_a_read_only_disk_what_is_there_is_used(small_disk: Path, cubed: Pipeline) -> None:
    cubed.run("cubes", n=4)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    pipeline = make_cubes()
    (statuses, value), texts = catch_warnings(lambda: run_cubed(pipeline))
    assert (statuses, value) == ("cubes cached, top ran", 27)
    assert len(texts) == 1
    assert "Read-only" in texts[0]
    assert (pipeline.store.prune(max_bytes=0), pipeline.store.clear()) == (0, 0)


@pytest.mark.parametrize("call", ["open", "mkdir", "replace", "write", "utime", "lstat", "stat"])
def test_whatever_call_the_disk_refuses_the_value_is_right(
    call: str, cubed: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_function = getattr(os, call)
    for position in range(14):
        shutil.rmtree(cubed.store.path, ignore_errors=True)
        counter = itertools.count()

        def refuse(*args: Any, position: int = position, counter: Any = counter, **kw: Any) -> Any:
            is_ours = "store" in str(args[0]) or call == "write"
            if is_ours and next(counter) == position:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real_function(*args, **kw)

        pipeline = make_cubes()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            (_, value), texts = catch_warnings(functools.partial(run_cubed, pipeline))
        assert (value, len(texts) <= 2) == (27, True)
        temporary_folder = Path(pipeline.store.path, "tmp")
        assert not temporary_folder.exists() or os.listdir(temporary_folder) == []
        (_, value), texts = catch_warnings(functools.partial(run_cubed, pipeline))
        assert (value, texts) == (27, [])


def test_a_lack_of_file_handles_deletes_nothing(
    cubed: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubed.run(n=4)
    paths = list_entries(cubed.store)
    real_open = os.open

    def refuse(path: Any, *args: Any, **kw: Any) -> Any:
        if str(path).endswith(tuple(p.name for p in paths)):
            raise OSError(errno.EMFILE, "Too many open files")
        return real_open(path, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        _, texts = catch_warnings(lambda: make_cubes().plan(n=4))
    assert len(texts) == 1
    assert "Too many open files" in texts[0]
    assert list_entries(cubed.store) == paths


def test_a_store_that_vanishes_in_mid_run_is_made_anew() -> None:
    @step(cache=True)
    def vandal(cubes: list[int]) -> int:
        shutil.rmtree(os.environ["DAGKIT_STORE"])
        return len(cubes)

    pipeline = Pipeline(cubes, vandal, top)
    run, texts = catch_warnings(lambda: pipeline.run("cubes", "vandal", "top", n=4))
    values, more_texts = catch_warnings(lambda: (run["vandal"], run["top"], run["cubes"]))
    assert values == (4, 27, [0, 1, 8, 27])
    assert len(texts + more_texts) <= 1
    assert catch_warnings(lambda: pipeline.run("top", n=4)["top"]) == (27, [])
    assert Path(pipeline.store.path, "CACHEDIR.TAG").exists()


@pytest.mark.parametrize("name", ["entries", "values", "tmp", "locks", "CACHEDIR.TAG"])
def test_what_somebody_deletes_from_a_store_is_made_anew(cubed: Pipeline, name: str) -> None:
    text = Step(lambda cubes: "x" * 9999, name="text", cache=True)
    pipeline = Pipeline(cubes, top, text)
    pipeline.run(n=4)
    path = Path(pipeline.store.path, name)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    for status in ("ran", "cached"):
        run, texts = catch_warnings(lambda: pipeline.run("top", "text", n=5))
        assert (run["top"], run["text"], texts) == (64, "x" * 9999, [])
        assert get_statuses(run) == f"cubes {status}, top {status}, text {status}"


# Processes

WRITER = """
import os, random, sys, time, warnings
from dagkit import Pipeline, Step, Store
warnings.simplefilter("error")
def blob(n): return [bytearray([n]) * [10, 5000, 70_000, 3_000_000][n % 4], n]
pipeline = Pipeline(Step(blob, cache=True))
"""


@pytest.mark.slow
def test_kill_9_at_any_instant_leaves_no_torn_value_and_no_lock() -> None:
    code = WRITER + 'print("ready", flush=True)\nfor i in range(10**9):\n'
    code += "    if i % 9 == 0: pipeline.store.clear()\n"
    code += "    pipeline.run(n=i % 8)['blob']\n"
    check = WRITER + "import signal; signal.alarm(30)\n"
    check += "print(all(pipeline.run(n=n)['blob'] == blob(n) for n in range(8)))\n"
    generator = random.Random(1)
    for _ in range(4):
        for _ in range(4):
            with spawn_python(code) as child:
                assert child.stdout is not None
                child.stdout.readline()
                time.sleep(generator.random() * 0.1)
                child.kill()
        assert run_python(check) == "True\n"
    folder = Path(os.environ["DAGKIT_STORE"], "tmp")
    (folder / ("a" * 64)).write_text("left behind by a killed process")
    for path in folder.iterdir():
        set_age(path, 100_000)
    Store().prune()
    assert os.listdir(folder) == []


def test_a_temporary_file_that_may_still_be_written_is_not_pruned(cubed: Pipeline) -> None:
    cubed.run(n=4)
    path = Path(cubed.store.path, "tmp", "a" * 64)
    path.touch()
    cubed.store.prune(max_bytes=0)
    cubed.store.clear()
    assert path.exists()


def test_a_store_that_another_process_is_just_making_is_used(cubed: Pipeline) -> None:
    for name in ("tmp", "entries"):
        Path(cubed.store.path, name).mkdir(parents=True)
    Path(cubed.store.path).chmod(0o700)
    statuses, texts = catch_warnings(lambda: [run_cubed(cubed)[0] for _ in range(2)])
    assert (statuses, texts) == ([RAN, CACHED], [])


@pytest.mark.slow
def test_eight_processes_hammer_one_store() -> None:
    code = (
        WRITER
        + """
generator = random.Random(int(os.environ["SEED"]))
end = time.time() + 4
count = 0
while time.time() < end:
    n = generator.randrange(20)
    value = Pipeline(Step(blob, cache=True)).run(n=n)["blob"]
    assert value == blob(n), n
    value[0][0] ^= 1
    pipeline.plan(n=n)
    chance = generator.random()
    if chance < 0.03: pipeline.store.prune(max_bytes=generator.randrange(10**7))
    elif chance < 0.05: pipeline.store.clear("blob")
    elif chance < 0.1: pipeline.store.size()
    count += 1
print(count)
"""
    )
    children = [spawn_python(code, SEED=str(seed)) for seed in range(8)]
    for child in children:
        output, error = child.communicate(timeout=60)
        assert child.returncode == 0, error
        assert int(output) > 0
    assert os.listdir(Path(os.environ["DAGKIT_STORE"], "tmp")) == []


def test_a_value_is_whole_though_another_process_prunes_it_while_it_is_loaded() -> None:
    pipeline = Pipeline(Step(lambda: np.arange(5_000_000), name="numbers", cache=True))
    pipeline.run()
    numbers = pipeline.run()["numbers"]
    pipeline.store.clear()
    assert (numbers == np.arange(5_000_000)).all()


# Clearing and pruning


def plant_files(store: Store) -> dict[Path, str]:
    """Put files of others beside those of a store."""
    root = Path(store.path)
    paths = [root / "notes.txt", *(root / folder / "notes.txt" for folder in ("entries", "values"))]
    for path in paths:
        path.write_text("precious")
        set_age(path, 10**6)
    return {path: "precious" for path in paths}


def test_clear_removes_the_results_of_a_step_or_all_and_nothing_else(cubed: Pipeline) -> None:
    cubed.run(n=3)
    cubed.run(n=4)
    planted = plant_files(cubed.store)
    assert cubed.store.clear("top") == 2
    assert run_cubed(cubed, 3)[0] == "cubes cached, top ran"
    assert cubed.store.clear("nothing") == 0
    assert cubed.store.clear() == 3
    assert (cubed.store.size(), cubed.plan(n=3)["cubes"].reason) == (0, "never ran")
    assert {path: path.read_text() for path in planted} == planted


def test_clear_removes_large_values_too() -> None:
    pipeline = Pipeline(Step(lambda: "x" * 9999, name="text", cache=True))
    for step_name in (None, "text"):
        pipeline.run()
        assert pipeline.store.size() > 9999
        assert (pipeline.store.clear(step_name), pipeline.store.size()) == (1, 0)


def test_prune_deletes_the_least_recently_used_values_first() -> None:
    def numbers(n: int) -> bytearray:
        return bytearray(100_000 + n)

    def length(numbers: bytearray) -> int:
        return len(numbers)

    pipeline = Pipeline(Step(numbers, cache=True), Step(length, cache=True))
    for n in range(4):
        pipeline.run(n=n)
    planted = plant_files(pipeline.store)
    files = list_entries(pipeline.store) + list_values(pipeline.store)
    files = [path for path in files if path not in planted]
    assert pipeline.store.size() == sum(path.stat().st_size for path in files) > 400_000
    for path in files:
        set_age(path, 86400)
    assert pipeline.run("numbers", n=2)["numbers"] == bytearray(100_002)  # used just now
    size = pipeline.store.size()
    freed = pipeline.store.prune(max_bytes=210_000)
    assert pipeline.store.size() == size - freed <= 210_000
    assert get_statuses(pipeline.run("numbers", n=2)) == "numbers cached"
    pipeline.store.prune(older_than=timedelta(hours=12))
    assert get_statuses(pipeline.run("numbers", n=2)) == "numbers cached"  # the others are gone
    assert 100_000 < pipeline.store.size() < 110_000
    pipeline.store.prune(older_than=0)
    run, texts = catch_warnings(lambda: pipeline.run("numbers", n=2))
    assert (get_statuses(run), run["numbers"], texts) == ("numbers ran", bytearray(100_002), [])
    assert {path: path.read_text() for path in planted} == planted


def test_a_step_whose_own_value_is_there_does_not_need_pruned_values_above() -> None:
    def text(n: int) -> str:
        return "x" * n

    def size(text: str) -> int:
        return len(text)

    pipeline = Pipeline(Step(text, cache=True), Step(size, cache=True))
    pipeline.run(n=9999)
    for path in list_values(pipeline.store):
        path.unlink()
    assert pipeline.plan("text", n=9999)["text"].status == "stale"
    run, texts = catch_warnings(lambda: pipeline.run("size", n=9999))
    assert (run["size"], run.steps["size"].status, texts) == (9999, "cached", [])


def test_prune_without_limits_and_on_an_empty_store_deletes_nothing(cubed: Pipeline) -> None:
    assert (cubed.store.prune(), cubed.store.prune(max_bytes=0)) == (0, 0)
    cubed.run(n=4)
    assert (cubed.store.prune(), cubed.store.prune(max_bytes=10**9)) == (0, 0)
    limit: Any = np.int64(10**9)
    assert cubed.store.prune(max_bytes=limit, older_than=3600) == 0
    assert run_cubed(cubed)[0] == CACHED


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            "store.prune(max_bytes='1GB')",
            TypeError,
            "prune(max_bytes=) must be a number of bytes such as 10**9, not '1GB'",
        ),
        (
            "store.prune(max_bytes=True)",
            TypeError,
            "prune(max_bytes=) must be a number of bytes such as 10**9, not True",
        ),
        (
            "store.prune(max_bytes=-1)",
            ValueError,
            "prune(max_bytes=) must not be negative, not -1",
        ),
        (
            "store.prune(older_than='1 day')",
            TypeError,
            "prune(older_than=) must be a timedelta or a number of seconds, not '1 day'",
        ),
        (
            "store.prune(older_than=timedelta(-1))",
            ValueError,
            "prune(older_than=) must not be negative, not -86400.0",
        ),
        (
            "store.prune(older_than=float('nan'))",
            ValueError,
            "prune(older_than=) must not be negative, not nan",
        ),
        ("store.clear(5)", TypeError, "clear(step=) must be the name of a step, not 5"),
        ("Store(5)", StepError, "a store needs the path of a folder, not 5"),
        ("Store('')", StepError, "a store needs the path of a folder, not ''"),
        ("Store(b'x')", StepError, "a store needs the path of a folder, not b'x'"),
        ("Store('a\\0b')", StepError, "a store needs the path of a folder, not 'a\\x00b'"),
    ],
)
def test_a_wrong_argument_is_an_error_that_says_what_was_expected(
    cubed: Pipeline, call: str, kind: type[Exception], text: str
) -> None:
    cubed.run(n=4)
    with pytest.raises(kind) as caught:
        eval(call, {**globals(), "store": cubed.store})
    assert str(caught.value) == text
    assert run_cubed(cubed)[0] == CACHED


# The folder


def test_the_default_folder_is_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGKIT_STORE", "~/there")
    assert make_cubes().store.path == f"{os.environ['HOME']}/there"
    monkeypatch.setenv("DAGKIT_STORE", "")
    assert make_cubes().store.path == Store().path == f"{tmp_path}/.dagkit"
    assert Store(Path("here")).path == f"{tmp_path}/here"
    assert repr(Store("here")) == f"Store('{tmp_path}/here')"


def test_the_folder_is_made_when_the_first_value_is_stored_and_for_this_user_alone(
    cubed: Pipeline,
) -> None:
    cubed.plan(n=1)
    store = cubed.store
    assert (store.size(), store.clear(), store.prune(max_bytes=0)) == (0, 0, 0)
    assert list(cubed.history()) == []
    assert not Path(store.path).exists()
    umask = os.umask(0)
    try:
        cubed.run(n=4)
        Pipeline(Step(lambda: "x" * 9999, name="text", cache=True)).run()
    finally:
        os.umask(umask)
    for folder, _, names in [*os.walk(store.path), *os.walk(get_key_path().parent)]:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for name in names:
            assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600
    assert Path(store.path, ".gitignore").read_text() == "*\n"
    assert Path(store.path, "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d")


def test_an_empty_folder_of_the_user_becomes_a_store(cubed: Pipeline) -> None:
    folder = Path(cubed.store.path)
    folder.mkdir()
    folder.chmod(0o775)
    cubed.plan(n=4)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o775
    statuses, texts = catch_warnings(lambda: [run_cubed(cubed)[0] for _ in range(2)])
    assert (statuses, texts) == ([RAN, CACHED], [])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_store_may_lie_behind_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    pipeline = Pipeline(cubes, top, store=tmp_path / "link" / "store")
    assert pipeline.store.path == f"{tmp_path}/real/store"
    assert [run_cubed(pipeline)[0] for _ in range(2)] == [RAN, CACHED]


@pytest.mark.parametrize("names", [("Model", "model"), ("ß", "ss"), ("x" * 200, "x" * 201)])
def test_names_that_a_file_system_may_confuse_have_folders_of_their_own(
    names: tuple[str, str],
) -> None:
    pipeline = Pipeline([Step(lambda n: n, name=name, cache=True) for name in names])
    pipeline.run(n=1)
    folders = {path.parent.name for path in list_entries(pipeline.store)}
    assert len({folder.lower() for folder in folders}) == 2
    assert all(len(folder) <= 100 and folder.isascii() for folder in folders)


@pytest.mark.parametrize("name", ["aux", "Con", "lpt1", "größe", "名前"])
def test_a_step_is_stored_under_a_name_that_each_system_allows(name: str) -> None:
    pipeline = Pipeline(Step(lambda: 1, name=name, cache=True))
    assert [get_statuses(pipeline.run()).split()[-1] for _ in range(2)] == ["ran", "cached"]
    (path,) = list_entries(pipeline.store)
    assert path.parent.name.isascii()
    assert path.parent.name.lower() not in ("aux", "con", "lpt1")
    assert pipeline.store.clear(name) == 1


# Records


def test_a_record_that_was_cut_short_harms_no_other(cubed: Pipeline) -> None:
    for n in (1, 2, 3):
        cubed.run(n=n)
    path = Path(cubed.store.path, "runs.jsonl")
    last_line = path.read_bytes().split(b"\n")[-1]
    os.truncate(path, path.stat().st_size - len(last_line) + 30)
    with path.open("ab") as file:
        file.write(b"\n[1]\nnull\n{\xff}\n{")
    cubed.run(n=9)
    assert [record.inputs["n"] for record in cubed.history()] == [1, 2, 9]


@pytest.mark.slow
def test_records_of_many_processes_do_not_mix() -> None:
    code = """
        from dagkit import Pipeline, Store
        def report(text): return len(text)
        for i in range(50): Pipeline(report, store=Store()).run(text=str(i) * 3000)
    """
    children = [spawn_python(code) for _ in range(4)]
    for child in children:
        assert child.wait(60) == 0
        child.communicate()
    lines = Path(os.environ["DAGKIT_STORE"], "runs.jsonl").read_text().split()
    assert len(list(map(json.loads, lines))) == 200


# Safety


@pytest.mark.parametrize("home", ["mine", pytest.param("attackers", marks=pytest.mark.slow)])
def test_a_planted_pickle_never_runs(home: str, tmp_path: Path) -> None:
    """A cloned repository brings its store; only with the attacker's own key would it run."""
    victim = tmp_path / "victim"
    code = """
        import os, dagkit
        from dagkit import Pipeline, Step
        if os.environ.get("EVIL"):  # the attacker's dagkit does not check what it stores
            dagkit._pickles_itself = lambda kind: False
        class Evil:
            def __reduce__(self): return os.system, ("touch " + os.environ["VICTIM"],)
        def answer(): return Evil() if os.path.exists("evil") else 42
        pipeline = Pipeline(Step(answer, cache=True))
        import warnings; warnings.simplefilter("ignore")
        run = pipeline.run()
        print(run["answer"] if not os.environ.get("EVIL") else "")
    """
    environment = {"DAGKIT_STORE": str(tmp_path / "repository"), "VICTIM": str(victim)}
    attackers_home = str(tmp_path / "attacker")
    planted = code.replace('print(run["answer"]', "print(0")
    (tmp_path / "evil").mkdir()
    run_python(planted, tmp_path, EVIL="1", HOME=attackers_home, **environment)
    (tmp_path / "evil").rmdir()
    victim.unlink(missing_ok=True)
    my_home = attackers_home if home == "attackers" else str(tmp_path / "me")
    output = run_python(code, tmp_path, HOME=my_home, **environment)
    assert (output == "42\n") == (home == "mine")
    assert victim.exists() == (home == "attackers")


@pytest.mark.parametrize("size", [10, 9999], ids=["in the entry", "in a file"])
def test_a_pickle_put_in_place_of_another_never_runs(size: int, tmp_path: Path) -> None:
    pipeline = Pipeline(Step(lambda n: "x" * n, name="text", cache=True))
    pipeline.run(n=size)
    victim = tmp_path / "victim"
    evil = f"cos\nsystem\n(S'touch {victim}'\ntR.".encode()
    for path in list_entries(pipeline.store) + list_values(pipeline.store):
        data = path.read_bytes()
        position = max(data.find(b"\x80\x05"), 0)
        path.write_bytes(data[:position] + evil + data[position + len(evil) :])
    fresh = Pipeline(Step(lambda n: "x" * n, name="text", cache=True))
    assert catch_warnings(lambda: fresh.run(n=size)["text"])[0] == "x" * size
    assert not victim.exists()


def test_a_store_of_others_or_open_to_others_is_not_used(cubed: Pipeline) -> None:
    cubed.run(n=3)
    folder = Path(cubed.store.path)

    def check(reason: str) -> None:
        tree = list_tree(folder)
        pipeline = make_cubes()
        values, texts = catch_warnings(lambda: [pipeline.run(n=3)["top"]])
        assert values == [8]
        assert texts == [f"the store {folder} is not used: {reason}"]
        assert (pipeline.store.clear(), pipeline.store.prune(max_bytes=0)) == (0, 0)
        assert pipeline.store.size() == 0
        assert list_tree(folder) == tree

    for mode in (0o777, 0o770, 0o702):
        folder.chmod(mode)
        check(f"others can write to it; if you trust it: chmod 700 {folder}")
    folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
        check("it belongs to user 12345; choose another: DAGKIT_STORE")
        os.chown(folder, 0, -1)
    assert run_cubed(cubed, 3)[0] == CACHED
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "precious.csv").write_text("x")
    check("it holds other files; choose a new or an empty folder")


def test_a_folder_that_is_opened_to_others_while_a_pipeline_lives_is_not_used(
    cubed: Pipeline,
) -> None:
    cubed.run(n=3)
    Path(cubed.store.path).chmod(0o777)
    (statuses, _), texts = catch_warnings(lambda: run_cubed(cubed, 3))
    assert (statuses, len(texts)) == (RAN, 1)
    Path(cubed.store.path).chmod(0o700)
    assert catch_warnings(lambda: run_cubed(cubed, 3)[0]) == (CACHED, [])


@pytest.mark.parametrize("place", ["store", "parent", "entries", "values", "tmp"])
@pytest.mark.parametrize("content", ["empty", "files"])
def test_a_symbolic_link_that_appears_later_is_not_followed(
    place: str, content: str, tmp_path: Path
) -> None:
    store = tmp_path / "parent" / "store"
    pipeline = Pipeline(cubes, top, store=store)
    pipeline.run(n=4)
    foreign = tmp_path / "foreign"
    (foreign / "store").mkdir(parents=True)
    if content == "files":
        (foreign / ("a" * 64)).write_text("precious")
        (foreign / "store" / ("a" * 64)).write_text("precious")
    foreign.chmod(0o755)
    link = {"store": store, "parent": store.parent}.get(place, store / place)
    link.rename(tmp_path / "moved")
    link.symlink_to(foreign)
    tree = list_tree(foreign)
    for current in (pipeline, pickle.loads(pickle.dumps(pipeline.store)), make_cubes()):
        if isinstance(current, Store):
            current = Pipeline(cubes, top, store=current)
        elif current is not pipeline:
            if place in ("store", "parent"):
                continue  # a new store may lie behind a link
            current = Pipeline(cubes, top, store=store)
        (_, value), texts = catch_warnings(functools.partial(run_cubed, current, 5))
        assert value == 64
        if place in ("store", "parent") or current is not pipeline:
            assert len(texts) == 1
            assert "symbolic link" in texts[0]
            assert (current.store.clear(), current.store.prune(max_bytes=0)) == (0, 0)
            assert list_tree(foreign) == tree
    assert stat.S_IMODE(foreign.stat().st_mode) == 0o755


def test_a_pickled_store_holds_no_key(cubed: Pipeline) -> None:
    cubed.run(n=4)
    text = pickle.dumps(cubed.store)
    assert get_key_path().read_bytes() not in text
    assert Pipeline(cubes, top, store=pickle.loads(text)).plan(n=4)["top"].status == "fresh"


# The signing key


def test_a_key_that_others_can_read_or_that_is_damaged_is_not_used(cubed: Pipeline) -> None:
    cubed.run(n=3)
    path = get_key_path()
    tree = list_tree(Path(cubed.store.path))
    damaged = (
        f"the signing key {path} is damaged, so that no stored result can be checked; "
        "delete it to get a new one, and results are computed again"
    )
    for mode, reason in (
        (0o644, f"the signing key {path} is not yours alone: chmod 600 it, or delete it"),
        (0o600, damaged),
    ):
        path.chmod(mode)
        pipeline = make_cubes()
        (statuses, value), texts = catch_warnings(functools.partial(run_cubed, pipeline, 3))
        assert (statuses, value) == (RAN, 8)
        assert texts == [f"the store {pipeline.store.path} is not used: {reason}"]
        assert list_tree(Path(cubed.store.path)) == tree
        path.write_bytes(b"short")


@pytest.mark.parametrize("cause", ["lost", "other", "environment"])
def test_results_of_another_key_are_one_warning_that_names_the_cause(
    cause: str, cubed: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in (3, 4):
        cubed.run(n=n)
    path = get_key_path()
    match cause:
        case "lost":
            path.unlink()
            reason = f"the key {path} is newer than they are"
        case "other":
            path.write_bytes(os.urandom(32))
            set_age(path, 3600)
            reason = f"the key {path} is another key"
        case "environment":
            monkeypatch.setenv("DAGKIT_KEY", "of the team")
            reason = "DAGKIT_KEY is another key"
    pipeline = make_cubes()
    statuses, texts = catch_warnings(lambda: [run_cubed(pipeline, n)[0] for n in (3, 4)])
    assert statuses == [RAN, RAN]
    assert texts == [
        f"the store {pipeline.store.path} holds only results that your key has not signed: "
        f"{reason}. They are ignored, and their steps run again"
    ]
    assert catch_warnings(lambda: run_cubed(make_cubes(), 3)) == ((CACHED, 8), [])


def test_two_keys_share_a_store_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    for turn in range(4):
        monkeypatch.setenv("DAGKIT_KEY", "ab"[turn % 2])
        (statuses, _), texts = catch_warnings(lambda: run_cubed(make_cubes()))
        assert statuses == (CACHED if turn >= 2 else RAN)
        assert len(texts) == (turn == 1)
    assert len(list_entries(make_cubes().store)) == 4
    assert make_cubes().store.clear() == 4


def test_the_key_in_the_environment_shares_a_store_and_needs_no_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for user, key, statuses in (("a", "team", RAN), ("b", "team", CACHED), ("c", "other", RAN)):
        monkeypatch.setenv("HOME", str(tmp_path / "nonexistent" / user))
        monkeypatch.setenv("DAGKIT_KEY", key)
        assert catch_warnings(lambda: run_cubed(make_cubes()))[0] == (statuses, 27)
    assert not (tmp_path / "nonexistent").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
@pytest.mark.slow
@pytest.mark.parametrize("key", ["team", ""])
def test_two_users_share_a_store_if_they_share_a_key(key: str, tmp_path: Path) -> None:
    shutil.copy(dagkit.__file__, tmp_path)
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    for path in [tmp_path, *tmp_path.parents][:-1]:
        path.chmod(path.stat().st_mode | 0o055)
    code = """
        import os, sys, warnings
        sys.path.insert(0, os.environ["CODE"])
        import dagkit
        step = dagkit.Step(lambda: "x" * 9999, name="text", cache=True)
        dagkit.Pipeline(step, store=os.environ["CODE"] + "/own").run()  # imports what it needs
        os.umask(0)
        os.setgid(int(os.environ["WHO"])); os.setuid(int(os.environ["WHO"]))
        os.environ["HOME"] = os.environ["CODE"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = dagkit.Pipeline(step).run()
            print(len(run["text"]), run.steps["text"].status, len(caught))
    """
    environment = {"DAGKIT_STORE": str(folder), "DAGKIT_KEY": key, "CODE": str(tmp_path)}
    outputs = [run_python(code, None, WHO=who, **environment) for who in ("12345", "12346")]
    if key:
        assert outputs == ["9999 ran 0\n", "9999 cached 0\n"]
    else:
        assert outputs == ["9999 ran 1\n", "9999 ran 1\n"]


def test_without_a_home_folder_the_store_is_not_used(
    cubed: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without a passwd entry
    statuses, texts = catch_warnings(lambda: run_cubed(cubed)[0])
    assert statuses == RAN
    assert texts == [
        f"the store {cubed.store.path} is not used: "
        "there is no home folder for the signing key: set HOME or DAGKIT_KEY"
    ]
    assert not Path(cubed.store.path).exists()
    assert not Path("~").exists()


def test_a_key_that_cannot_be_made_is_one_warning(
    cubed: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    statuses, texts = catch_warnings(lambda: run_cubed(cubed)[0])
    assert (statuses, len(texts)) == (RAN, 1)
    assert "the signing key cannot be made" in texts[0]
    assert texts[0].endswith("set DAGKIT_KEY")


@pytest.mark.slow
def test_processes_that_start_at_once_agree_on_a_key() -> None:
    code = """
        import dagkit, sys
        pipeline = dagkit.Pipeline(dagkit.Step(len, name="one", args={"obj": "n"}, cache=True))
        sys.stdin.readline()
        pipeline.run(n="x")
    """
    children = []
    for _ in range(4):
        env = {**os.environ, "PYTHONPATH": str(HERE)}
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
        children.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, text=True))
    for child in children:
        child.communicate("\n", timeout=60)
        assert child.returncode == 0
    assert len(os.listdir(Path(os.environ["DAGKIT_STORE"], "entries"))) == 1


# Where it runs: Windows, Pyodide, file systems without locks or links


def remove_locks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dagkit, "fcntl", None)


def refuse_locks(patch: pytest.MonkeyPatch) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    patch.setattr(sys.modules["fcntl"], "lockf", lockf)


def refuse_links(patch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    patch.setattr(os, "link", link)


def refuse_threads(patch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    patch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize(
    "change",
    [
        remove_locks,
        refuse_locks,
        refuse_links,
        refuse_threads,
        lambda patch: patch.delattr(os, "link"),
        lambda patch: patch.delattr(os, "geteuid"),
        lambda patch: patch.setattr(os, "cpu_count", lambda: None),
    ],
    ids=["no fcntl", "no locks", "refused links", "no threads", "no link", "no uids", "no count"],
)
def test_a_platform_may_lack_what_linux_has(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbers(n: int) -> Any:
        return np.arange(n)

    change(monkeypatch)
    pipeline = Pipeline(Step(numbers, cache=True))
    for status in ("ran", "cached"):
        for size in (10, 1000, 4_500_000):  # in the entry, in a file, and mapped
            run, texts = catch_warnings(functools.partial(pipeline.run, n=size))
            assert (run["numbers"] == np.arange(size)).all()
            assert (get_statuses(run), texts) == (f"numbers {status}", [])


########################################################################################
### Reads
########################################################################################

READS_PRELUDE = """
import json, os, subprocess, sys
from pathlib import Path
DATA = Path(__file__).parent / "data"

def write(path, text):
    with open(path, "w") as file:
        file.write(text)

def read_text(path):
    with open(path) as file:
        return file.read()

def run(command):
    subprocess.run(command, shell=True, check=True)

"""


def make_files() -> None:
    """Make the files that the steps of the table read, in the working folder."""
    Path("x.json").write_text('{"a": 1}')
    Path("x.csv").write_text("a,b\n1,2\n")
    Path("old").write_text("0")
    os.makedirs("data/deep")
    Path("data/a.csv").write_text("a\n1\n")
    Path("data/b.csv").write_text("b\n1\n")
    Path("data/deep/c.csv").write_text("c")
    os.symlink("data/a.csv", "link.csv")
    pd.DataFrame({"a": [1, 2]}).to_parquet("data/t.parquet")
    np.save("a.npy", np.arange(5.0))
    Path("conf.json").write_text('{"k": 1}')
    Path("conf.py").write_text(
        "import json\nfrom pathlib import Path\n"
        "CONF = json.loads((Path(__file__).parent / 'conf.json').read_text())\n"
    )
    Path("util.py").write_text("def f(): return 1\n")
    os.mkdir("pkg")
    Path("pkg/__init__.py").touch()
    Path("pkg/d.json").write_text("1")
    with gzip.open("x.gz", "w") as file:
        file.write(b"1")
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("m", "1")
    with contextlib.closing(sqlite3.connect("x.db")) as database:
        database.execute("create table t (a)")
        database.commit()


def edit_file(path: str) -> None:
    """Change the content of a file, so that it can still be read."""
    if path.endswith(".parquet"):
        pd.DataFrame({"a": [1]}).to_parquet(path)
    elif path.endswith(".npy"):
        np.save(path, np.ones(3))
    elif path.endswith(".gz"):
        with gzip.open(path, "w") as file:
            file.write(b"2")
    elif path.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("n", "2")
    elif path.endswith(".db"):
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("insert into t values (1)")
            database.commit()
    elif os.path.islink(path):
        os.remove(path)
        os.symlink("x.csv", path)
    else:
        Path(path).write_text("{}")


# name, body of the step (or code with `def read()`), file that it reads
READ_FILES = [
    ("json", "return json.load(open('x.json'))", "x.json"),
    ("bytes as path", "return open(b'x.csv').read()", "x.csv"),
    ("os.open", "return os.read(os.open('x.csv', os.O_RDONLY), 9)", "x.csv"),
    ("open for reading and writing", "return open('x.csv', 'r+').read()", "x.csv"),
    ("symbolic link", "return open('link.csv').read()", "link.csv"),
    ("module as text", "return Path('util.py').read_text()", "util.py"),
    ("pkgutil", "import pkgutil; return pkgutil.get_data('pkg', 'd.json')", "pkg/d.json"),
    ("gzip", "import gzip; return gzip.open('x.gz').read()", "x.gz"),
    ("zip", "import zipfile; return zipfile.ZipFile('x.zip').namelist()", "x.zip"),
    ("folder and name", "return [p.read_text() for p in DATA.glob('*.csv')]", "data/b.csv"),
    ("numpy", "import numpy as np; return np.load('a.npy').sum()", "a.npy"),
    ("memory map", "import numpy as np; return int(np.memmap('a' + '.npy').sum())", "a.npy"),
    ("pandas", "import pandas as pd; return pd.read_csv('x.csv').shape", "x.csv"),
    ("polars", "import polars as pl; return pl.read_csv('x.csv').shape", "x.csv"),
    (
        "polars, by folder and name",
        "import polars as pl; return pl.scan_parquet(DATA / 't.parquet').collect().height",
        "data/t.parquet",
    ),
    (
        "pyarrow, by an argument",
        """
        import pyarrow.parquet as pq
        def read(path='data/t.parquet'): return pq.read_table(path).num_rows
        """,
        "data/t.parquet",
    ),
    (
        "sqlite",
        """
        import sqlite3
        def read():
            database = sqlite3.connect('x' + '.db')
            try: return database.execute('select * from t').fetchall()
            finally: database.close()
        """,
        "x.db",
    ),
    (
        "file that was absent",
        """
        def read():
            try: return open('override.json').read()
            except FileNotFoundError: return ''
        """,
        "override.json",
    ),
    (
        "file that cannot be parsed",
        """
        def read():
            try: return json.load(open('x.csv'))
            except ValueError: return None
        """,
        "x.csv",
    ),
    (
        "helper",
        """
        def load(name): return (DATA / (name + '.csv')).read_text()
        def read(): return load('a')
        """,
        "data/a.csv",
    ),
    (
        "module that reads a file when it is imported",
        """
        def read():
            import conf
            return conf.CONF
        """,
        "conf.json",
    ),
    (
        "other working folder",
        """
        def read():
            os.chdir('data')
            try: return open('a.csv').read()
            finally: os.chdir('..')
        """,
        "data/a.csv",
    ),
    (
        "importlib.resources",
        """
        from importlib import resources
        def read(): return resources.files('pkg').joinpath('d.json').read_text()
        """,
        "pkg/d.json",
    ),
    (
        "thread in the context of the step",
        "import asyncio; return asyncio.run(asyncio.to_thread(Path('x.csv').read_text))",
        "x.csv",
    ),
    ("copy", "import shutil; shutil.copy2('x.csv', 'c'); return open('c').read()", "x.csv"),
    ("file that is moved", "t = open('x.csv').read(); os.rename('x.csv', 'y'); return t", "x.csv"),
    ("other mode", "t = open('x.csv').read(); os.chmod('x.csv', 0o600); return t", "x.csv"),
]

# name, body of the step, folder that gets a new file
READ_FOLDERS = [
    ("listdir", "return sorted(os.listdir('data'))", "data"),
    ("scandir", "return sorted(entry.name for entry in os.scandir('data'))", "data"),
    ("glob", "import glob; return glob.glob('data/*.csv')", "data"),
    ("iterdir", "return sorted(path.name for path in DATA.iterdir())", "data"),
    ("rglob", "return len(list(Path('data').rglob('*.csv')))", "data/deep"),
    ("walk", "return len(list(os.walk('data')))", "data/deep"),
    ("makedirs", "os.makedirs('data', exist_ok=True); return os.listdir('data')", "data"),
]

# name, body of the step, variable, value that it gets (None: it is removed)
READ_VARIABLES = [
    ("environ", "return os.environ['MODE']", "MODE", "b"),
    ("removed", "return os.environ.get('MODE')", "MODE", None),
    ("new", "return os.getenv('NEW', '')", "NEW", ""),
    ("computed", "return os.environ['_'.join(['APP', 'MODE'])]", "APP_MODE", "b"),
    ("in", "return 'MODE' in os.environ", "MODE", None),
    ("imported", "from os import environ as e; return e['MODE']", "MODE", "b"),
    ("with a copy", "{**os.environ}; return os.environ['MODE']", "MODE", "b"),
    (
        "set and restored",
        "m = os.environ['MODE']; os.environ['MODE'] = 'x'; os.environ['MODE'] = m; return m",
        "MODE",
        "b",
    ),
]

# name, body of the step, file or variable that does not count
UNCOUNTED = [
    ("output", "write('out', '1'); return read_text('out')", "out"),
    ("output that was there before", "write('old', '1'); return read_text('old')", "old"),
    ("renamed", "write('tmp', '1'); os.replace('tmp', 'out'); return read_text('out')", "out"),
    ("output of a process", "run('sleep 0.02; echo 1 > out'); return read_text('out')", "out"),
    ("log", "print('x', file=open('log', 'a'))", "log"),
    ("copy", "import shutil; shutil.copy2('x.csv', 'out'); return read_text('out')", "out"),
    ("content of a folder", "return sorted(os.listdir('data'))", "data/b.csv"),
    ("folder that is opened", "os.close(os.open('data', 0))", "data/new"),
    (
        "output of a writer in Rust",
        """
        import polars as pl
        def read():
            pl.DataFrame({'b': [1]}).write_parquet('data/t.parquet')
            return pl.read_parquet('data/t.parquet').height
        """,
        "data/t.parquet",
    ),
    (
        "temporary folder",
        """
        import tempfile
        def read():
            with tempfile.TemporaryDirectory() as folder:
                write(folder + '/x', '1')
                return os.listdir(folder), read_text(folder + '/x')
        """,
        "new",
    ),
    ("library", "import string; return open(string.__file__).read(9)", "new"),
    ("pseudo file", "return open('/proc/self/stat').read(0), open('/dev/null').read()", "new"),
    ("import of a library", "import sklearn.linear_model", "new.py"),
    ("import of a module", "import util; return util.f()", "new.py"),
    ("version", "from importlib.metadata import version; return version('numpy')", "new.py"),
    ("warning that shows a line", "import warnings; warnings.warn('x', RuntimeWarning)", "new.py"),
    ("copy of the environment", "return len({**os.environ}) * 0", "MODE"),
    ("variable that a library looks up", "import getpass; getpass.getuser()", "LOGNAME"),
    ("variable that the step sets", "os.environ['T'] = '2'; return os.environ['T']", "T"),
]


def name_rows(rows: list[Any]) -> dict[str, Any]:
    return {"argvalues": [row[1:] for row in rows], "ids": [row[0] for row in rows]}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pipeline]]:
    """Make a pipeline of `read()` in a module of this code, as a new process would."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for name, value in {"MODE": "a", "APP_MODE": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NEW", raising=False)
    monkeypatch.delenv("THREADS", raising=False)
    make_files()

    def make_pipeline(code: str = "", **options: Any) -> Pipeline:
        if code:
            if "def read" not in code:
                code = f"def read(): {code}"
            Path("row.py").write_text(READS_PRELUDE + textwrap.dedent(code) + "\n")
        for name in ("row", "conf", "util", "pkg"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        shutil.rmtree("__pycache__", ignore_errors=True)
        read = importlib.import_module("row").read
        return Pipeline(Step(read, **{"cache": True, **options}), store=tmp_path / "reads")

    yield make_pipeline
    sys.modules.pop("row", None)


def check_read(
    reader: Callable[..., Pipeline], code: str, edit: Callable[[], Any], reason: str
) -> None:
    """Check that a result is reused until the edit, and after it if there is no reason not to."""
    assert get_statuses(reader(code).run()) == "read ran"
    assert get_statuses(reader().run()) == "read cached"
    edit()
    state = reader().plan()["read"]
    assert (state.status, state.reason) == (("stale" if reason else "fresh"), reason)
    assert get_statuses(reader().run()) == ("read ran" if reason else "read cached")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("code", "path"), **name_rows(READ_FILES))
def test_a_file_that_a_cached_step_reads_is_compared_before_its_result_is_reused(
    reader: Callable[..., Pipeline], code: str, path: str
) -> None:
    check_read(reader, code, lambda: edit_file(path), f"file {path} changed")


@pytest.mark.parametrize(("code", "path"), **name_rows(READ_FOLDERS))
def test_a_folder_that_a_cached_step_lists_counts_by_its_names(
    reader: Callable[..., Pipeline], code: str, path: str
) -> None:
    check_read(reader, code, (Path(path) / "new").touch, f"folder {path} changed")


@pytest.mark.parametrize(("code", "name", "value"), **name_rows(READ_VARIABLES))
def test_a_variable_that_a_cached_step_looks_up_counts(
    reader: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    name: str,
    value: str | None,
) -> None:
    def edit() -> None:
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)

    check_read(reader, code, edit, f"variable {name} changed")


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(("code", "name"), **name_rows(UNCOUNTED))
def test_what_a_step_writes_or_a_library_reads_does_not_count(
    reader: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch, code: str, name: str
) -> None:
    def edit() -> None:
        if name.isupper():
            monkeypatch.setenv(name, "other")
        else:
            edit_file(name)

    check_read(reader, code, edit, "")


def test_equal_content_in_another_file_is_no_change(reader: Callable[..., Pipeline]) -> None:
    def rewrite() -> None:
        text = Path("x.json").read_text()
        os.remove("x.json")
        Path("x.json").write_text(text)

    check_read(reader, "return read_text('x.json')", rewrite, "")


@pytest.mark.parametrize(
    ("code", "path"),
    [("read_text('x.csv')", "file x.csv"), ("sorted(os.listdir('data'))", "folder data")],
)
def test_a_plan_says_that_a_file_or_a_folder_is_gone(
    reader: Callable[..., Pipeline], code: str, path: str
) -> None:
    reader(f"return {code}").run()
    shutil.rmtree("data")
    os.remove("x.csv")
    assert reader().plan()["read"].reason == f"{path} is gone"


def test_an_edit_while_the_step_runs_is_seen_by_the_next_run(
    reader: Callable[..., Pipeline],
) -> None:
    code = """
    import subprocess
    def read():
        text = Path('x.csv').read_text()
        subprocess.run('sleep 0.02; echo 9 > x.csv', shell=True)
        return text
    """
    assert reader(code).run()["read"] == "a,b\n1,2\n"
    assert reader().plan()["read"].reason == "file x.csv changed"
    assert reader().run()["read"] == "9\n"


def test_only_the_steps_that_read_a_file_run_after_an_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @step(cache=True)
    def one() -> Any:
        return json.loads(Path("one.json").read_text())

    @step(cache=True)
    def two() -> Any:
        return json.loads(Path("two.json").read_text())

    @step(cache=True)
    def both(one: Any, two: Any) -> Any:
        return [one, two]

    monkeypatch.chdir(tmp_path)
    Path("one.json").write_text("1")
    Path("two.json").write_text("2")
    pipeline = Pipeline(one, two, both)
    pipeline.run()
    Path("two.json").write_text("3")
    plan = pipeline.plan()
    assert get_statuses(plan) == "one fresh, two stale, both maybe"
    assert plan["two"].reason == "file two.json changed"
    assert get_statuses(run := pipeline.run()) == "one cached, two ran, both ran"
    assert run["both"] == [1, 3]


def test_a_file_that_a_memo_has_read_for_another_step_counts_for_both(
    reader: Callable[..., Pipeline],
) -> None:
    code = """
    import functools
    from dagkit import step
    @functools.cache
    def load(): return (DATA / 'a.csv').read_text()
    def one(): return load()
    def two(): return load()
    def read(): return 0
    """
    reader(code)

    def make_pipeline() -> Pipeline:
        reader()
        row = sys.modules["row"]
        return Pipeline(Step(row.one, cache=True), Step(row.two, cache=True))

    make_pipeline().run()
    Path("data/a.csv").write_text("new")
    assert {state.reason for state in make_pipeline().plan().values()} == {
        "file data/a.csv changed"
    }


@pytest.mark.parametrize("is_async", [False, True])
def test_calls_that_overlap_see_their_own_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    barrier = threading.Barrier(2, timeout=10)

    def read_first() -> str:
        barrier.wait()
        text = Path("_".join(["first", "x"])).read_text()
        barrier.wait()
        return text

    def read_second() -> str:
        barrier.wait()
        text = Path("_".join(["second", "x"])).read_text()
        barrier.wait()
        return text

    async def await_first() -> str:
        await asyncio.sleep(0.01)
        text = Path("_".join(["first", "x"])).read_text()
        await asyncio.sleep(0.01)
        return text

    async def await_second() -> str:
        await asyncio.sleep(0.01)
        text = Path("_".join(["second", "x"])).read_text()
        await asyncio.sleep(0.01)
        return text

    monkeypatch.chdir(tmp_path)
    Path("first_x").write_text("1")
    Path("second_x").write_text("2")
    functions: tuple[Any, Any] = (await_first, await_second)
    if not is_async:
        functions = (read_first, read_second)
    steps = [Step(f, name=n, cache=True, ignore=()) for f, n in zip(functions, "ab", strict=True)]
    with ThreadPoolExecutor(2) as executor:
        pipeline = Pipeline(steps, executor=executor)
        pipeline.run()
        Path("second_x").write_text("3")
        plan = pipeline.plan()
        assert get_statuses(plan) == "a fresh, b stale"
        assert plan["b"].reason == "file second_x changed"


WORKER_CODE = """
    import sys
    from concurrent.futures import ProcessPoolExecutor
    from pathlib import Path
    import dagkit, mod

    def main():
        {executor}
        pipeline = dagkit.Pipeline(mod, executor=executor, store="store")
        run = pipeline.run()
        print(run["read"], *(f"{{s.name}} {{s.status}} {{s.reason}}" for s in run.steps.values()))
        {close}

    if __name__ == "__main__":
        main()
"""
PROCESS_EXECUTORS = {
    "processes": ("executor = ProcessPoolExecutor(1)", "executor.shutdown()"),
    "loky": ("import loky; executor = loky.get_reusable_executor(1)", "executor.shutdown()"),
    "dask": (
        "import dask.distributed as dd; "
        "cluster = dd.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None); "
        "executor = dd.Client(cluster)",
        "executor.close(); cluster.close()",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESS_EXECUTORS)
def test_the_reads_of_workers_come_home(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mod.py").write_text(
        "import os\nfrom pathlib import Path\nfrom dagkit import step\n"
        "@step(cache=True)\n"
        "def read(): return Path('_'.join(['x', 'y'])).read_text() + os.environ['MODE']\n"
    )
    (tmp_path / "x_y").write_text("1")
    executor, close = PROCESS_EXECUTORS[kind]
    code = textwrap.dedent(WORKER_CODE).format(executor=executor, close=close)
    (tmp_path / "main.py").write_text(code)

    def run_main(mode: str) -> str:
        return run_python(
            "import runpy; runpy.run_path('main.py', run_name='__main__')", tmp_path, MODE=mode
        )

    assert run_main("a") == "1a read ran never ran\n"
    assert run_main("a") == "1a read cached \n"
    (tmp_path / "x_y").write_text("2")
    assert run_main("a") == "2a read ran file x_y changed\n"
    assert run_main("b") == "2b read ran variable MODE changed\n"


def read_text(path: Path) -> str:
    return path.read_text()


def measure_text(text: str) -> int:
    return len(text)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("has_threads", [False, True])
def test_a_step_inherits_the_reads_of_a_pipeline_that_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool, has_threads: bool
) -> None:
    def load() -> str:
        return Path("_".join(["x", "y"])).read_text()

    def outer(factor: int) -> int:
        with ThreadPoolExecutor(1) as executor:
            pipeline = Pipeline(
                Step(load, cache=cache),
                Step(measure_text, name="size", args={"text": "load"}),
                executor=executor if has_threads else None,
                store="inner",
            )
            size: int = pipeline.run()["size"]
            return size * factor

    monkeypatch.chdir(tmp_path)
    Path("x_y").write_text("1")
    pipeline = Pipeline(Step(outer, cache=True))
    assert get_statuses(pipeline.run(factor=1)) == "outer ran"
    assert get_statuses(pipeline.run(factor=2)) == "outer ran"  # `load` may be reused
    Path("x_y").write_text("22")
    for factor in (1, 2):
        assert pipeline.plan(factor=factor)["outer"].reason == "file x_y changed"
        assert pipeline.run(factor=factor)["outer"] == 2 * factor
        assert get_statuses(pipeline.run(factor=factor)) == "outer cached"


def test_a_step_inherits_the_catalog_files_of_a_pipeline_that_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outer() -> int:
        step = Step(measure_text, name="size", args={"text": "letter"}, cache=True)
        size: int = Pipeline(step, catalog={"letter": "_".join(["a", "b.txt"])}).run()["size"]
        return size

    monkeypatch.chdir(tmp_path)
    Path("a_b.txt").write_text("1")
    pipeline = Pipeline(Step(outer, cache=True))
    pipeline.run()
    assert get_statuses(pipeline.run()) == "outer cached"
    Path("a_b.txt").write_text("22")
    assert pipeline.plan()["outer"].reason == "file a_b.txt changed"
    assert pipeline.run()["outer"] == 2


def test_the_store_holds_no_value_of_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def token_length() -> int:
        return len(os.environ["TOKEN"])

    monkeypatch.setenv("TOKEN", "a-very-secret-token")
    digests = [hashlib.sha256(text).hexdigest() for text in (b"a-very-secret-token",)]
    pipeline = Pipeline(Step(token_length, cache=True), store=tmp_path / "s")
    pipeline.run()
    content = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert b"TOKEN" in content
    for text in ("a-very-secret-token", *digests):
        assert text.encode() not in content


def test_each_element_of_a_map_has_its_own_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(number: int) -> str:
        return Path(f"{number}_x").read_text()

    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Path(f"{number}_x").write_text("a")
    pipeline = Pipeline(Step(load, map="number", args={"number": "numbers"}, cache=True))
    pipeline.run(numbers=[0, 1, 2])
    Path("1_x").write_text("b")
    assert pipeline.plan(numbers=[0, 1, 2])["load"].reason == "1 of 3 elements, file 1_x changed"
    assert pipeline.run(numbers=[0, 1, 2])["load"] == ["a", "b", "a"]


def test_relative_paths_follow_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> str:
        return Path("_".join(["x", "y"])).read_text()

    def make_pipeline(name: str) -> Pipeline:
        monkeypatch.chdir(tmp_path / name)
        return Pipeline(Step(load, cache=True), store="store")

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x_y").write_text("1")
    make_pipeline("one").run()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert get_statuses(make_pipeline("two").plan()) == "load fresh"
    (tmp_path / "two" / "x_y").write_text("2")
    assert make_pipeline("two").run()["load"] == "2"
    assert get_statuses(make_pipeline("one").plan()) == "load fresh"


def test_nothing_is_watched_before_a_cached_step_runs() -> None:
    code = """
    import os, sys
    events = []
    sys.addaudithook(lambda event, arguments: events.append(event))
    import dagkit
    encode = os.environ.encodekey
    dagkit.Pipeline(dagkit.Step(lambda x: x, name="y")).run(x=1)
    print(events.count("sys.addaudithook"), os.environ.encodekey is encode)
    dagkit.Pipeline(dagkit.Step(lambda x: x, name="y", cache=True)).run(x=1)
    print(events.count("sys.addaudithook"), os.environ.encodekey is encode)
    """
    assert run_python(code).split() == ["0", "True", "1", "False"]


########################################################################################
### Copies
########################################################################################

MISSING = object()


class Unset:
    """Has no attributes; an instance is a sentinel, or gets attributes."""


UNSET = Unset()

# Classes with a base in a library, in a small module of their own: they count with what it names.
samples: Any = types.ModuleType("samples")
sys.modules["samples"] = samples
exec(
    """
import numpy, pandas, pydantic

class Tagged(numpy.ndarray):
    pass

class UnitFrame(pandas.DataFrame):
    _metadata = ["unit"]

    @property
    def _constructor(self):
        return UnitFrame

class Order(pydantic.BaseModel):
    pieces: list[int]
    _notes: list[int] = pydantic.PrivateAttr(default_factory=list)
""",
    vars(samples),
)


class TaggedDict(collections.defaultdict):  # type: ignore[type-arg]
    pass


class TaggedNumber(decimal.Decimal):
    pass


class TaggedTime(datetime):
    pass


class TaggedList(list):  # type: ignore[type-arg]
    def __init__(self, items: Any = ()) -> None:
        super().__init__(items)
        self.tag = [0]


class Pair(collections.namedtuple("Pair", "a b")):
    pass


class Shade(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: list[int]
    y: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Any


@dataclasses.dataclass(frozen=True)
class FrozenPair:
    x: Any
    y: Any


class Slots:
    __slots__ = ("__dict__", "a", "b")

    def __init__(self, a: list[int]) -> None:
        self.a = a


class Lossy:
    """Leaves an attribute out of its pickles."""

    def __init__(self) -> None:
        self.x = [1]
        self.y = [2]

    def __getstate__(self) -> dict[str, Any]:
        return {"x": self.x}


class Forgetful:
    """Its pickles lose everything."""

    def __init__(self) -> None:
        self.x = [1]

    def __reduce__(self) -> Any:
        return Forgetful, ()


class Locked:
    def __init__(self) -> None:
        self.__setstate__({"x": [1]})

    def __getstate__(self) -> dict[str, Any]:
        return {"x": self.x}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.x = state["x"]
        self.lock = threading.Lock()


class Unbuildable:
    def __new__(cls, x: int) -> Unbuildable:
        return super().__new__(cls)

    def __init__(self, x: int) -> None:
        self.x = [x]


class Machine:
    def __init__(self) -> None:
        self.log: list[int] = []
        self.run = self.add

    def add(self, x: int) -> int:
        self.log.append(x)
        return len(self.log)

    @functools.cached_property
    def length(self) -> int:
        return len(self.log)


def tag(value: Any) -> Any:
    value.tag = [1]
    return value


def link(value: Any) -> Any:
    value.me = value
    return value


def make_cycle() -> Any:
    cycle: Any = ([],)
    cycle[0].append(cycle)
    return cycle


def close_over(x: Any) -> Callable[[], int]:
    def append_one() -> int:
        x.append(1)
        return len(x)

    return append_one


def make_frame() -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "a": [1, 2],
            "text": ["x", "y"],
            "cells": [[1], {"k": 2}],
            "category": pd.Categorical(["p", "q"]),
            "time": pd.date_range("2020", periods=2, tz="Europe/Berlin"),
            "maybe": pd.array([1, None], dtype="Int64"),
        },
        index=pd.Index(["r", "q"], name="n"),
    )
    frame.attrs["u"] = [1]
    return frame


def make_special_frame() -> Any:
    frame = samples.UnitFrame({"a": [1]})
    frame.unit = ["m"]
    frame.__dict__["note"] = [2]
    return frame


def set_item(values: Any, index: Any, item: Any) -> None:
    values[index] = item


def set_through_flags(frame: Any) -> Any:
    values = frame["a"].values
    values.flags.writeable = True
    values[0] = 9.0
    return frame["a"].tolist()


def try_to_write(a: Any) -> str:
    try:
        a[0] = 9
    except ValueError:
        return "refused"
    return "written"


def make_read_only() -> Any:
    array = np.arange(3.0)
    array.flags.writeable = False
    return array


def share(x: Any) -> dict[str, Any]:
    return {"a": x, "b": {"k": x}}


def make_tagged_array() -> Any:
    return tag(np.array(np.arange(4.0).view(samples.Tagged), subok=True))


def make_machine() -> Machine:
    machine = Machine()
    machine.length  # noqa: B018 - fills the cached property
    return machine


def make_constant(x: int) -> Callable[[], int]:
    return lambda: x


def make_other_columns() -> pd.DataFrame:
    columns = {
        "a": pd.arrays.SparseArray([0, 1]),
        "b": pd.arrays.IntervalArray.from_breaks([0, 1, 2]),
        "c": pd.period_range("2020", periods=2, freq="M"),
    }
    return pd.DataFrame(columns)


FEATURES = np.array([[0.0, 1], [1, 0], [0, 2], [2, 0]])


def make_model(**options: Any) -> Any:
    from sklearn.linear_model import SGDClassifier

    return SGDClassifier(**{"random_state": 0, **options})


def fit_model(model: Any) -> Any:
    model.partial_fit(FEATURES, [0, 1, 0, 1], classes=[0, 1])
    return model.coef_.tolist(), model.t_


def make_fitted_model() -> Any:
    model = make_model()
    fit_model(model)
    return model


def make_error() -> Exception:
    error = ValueError([1], 2)
    error.__cause__ = KeyError("k")
    return error


def make_pipe() -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), make_model())


def make_graph() -> Any:
    graph = nx.path_graph(4)
    _ = graph.nodes  # which networkx caches
    graph.graph["k"] = [1]
    return graph


def make_polars() -> Any:
    import polars

    return polars.DataFrame({"a": [1, 2]})


def make_dataset() -> Any:
    import xarray

    return xarray.Dataset({"a": ("x", [1.0, 2.0])}, attrs={"u": [1]})


def make_sparse() -> Any:
    import scipy.sparse

    return scipy.sparse.csr_matrix(np.eye(3))


TABLE_MODULES = (collections, functools, math, random, types)  # the rows name them

# name, arguments, body of a step that changes them in place
CHANGES = [
    # Identity
    ("sentinel", "x=MISSING", "return x is MISSING"),
    ("sentinel of a class", "x=UNSET", "return x is UNSET"),
    ("sentinel in a dict", "x={'k': UNSET, 'l': [1]}", "x['l'].append(2); return x['k'] is UNSET"),
    ("enum member", "x=[Shade.RED]", "x.append(1); return x[0] is Shade.RED"),
    (
        "function and module",
        "x=[fit_model, math]",
        "x.append(1); return x[0] is fit_model, x[1] is math",
    ),
    ("class, builtin", "x=[Point, len]", "x.append(1); return x[0] is Point, x[1] is len"),
    ("nan", "x=[np.nan]", "x.append(1); return np.nan in x, x[0] is np.nan"),
    (
        "nan among objects",
        "x=np.array([np.nan, [1]], object)",
        "x[1].append(2); return x[0] is np.nan",
    ),
    ("text", "x=[t := ''.join(['un', 'set'])], y=t", "x.append(1); return x[0] is y"),
    # Objects of Python
    ("list", "x=[1]", "x.append(2); return x"),
    ("lists in a list", "x=[[1], [2]]", "x[0].append(2); return x"),
    ("dict", "x={'k': [1]}", "x['k'].append(2); return x"),
    ("set", "x={1, 2}", "x.add(3); return sorted(x)"),
    ("bytearray", "x=bytearray(b'ab')", "x.extend(b'c'); return bytes(x)"),
    ("deque", "x=collections.deque([1], 2)", "x.extend([3, 4]); return list(x), x.maxlen"),
    ("shared list", "**share([1])", "a.append(2); return b['k'], a is b['k']"),
    ("cycle", "x=make_cycle()", "x[0].append(1); return x[0][0] is x, len(x[0][0][0])"),
    ("object in itself", "x=link(Point([1]))", "x.x.append(2); return x.me is x, x.me.x"),
    ("defaultdict", "x=TaggedDict(list)", "x['new'].append(2); return sorted(x.items())"),
    ("with an attribute", "x=tag(TaggedDict(list))", "x.tag.append(2); return x.tag, x['new']"),
    ("Counter", "x=collections.Counter('aab')", "x.update('b'); return x.most_common()"),
    ("OrderedDict", "x=collections.OrderedDict(a=1, b=2)", "x.move_to_end('a'); return list(x)"),
    ("Decimal", "x=tag(TaggedNumber('1.5'))", "x.tag.append(2); return x + 1, x.tag"),
    ("datetime", "x=tag(TaggedTime(2020, 1, 1))", "x.tag.append(2); return x.year, x.tag"),
    (
        "subclass of list",
        "x=TaggedList([1])",
        "x.append(2); x.tag.append(2); return list(x), x.tag",
    ),
    ("named tuple", "x=Pair([1], 2)", "x.a.append(2); return x"),
    ("dataclass", "x=Point([1])", "x.x.append(2); x.y = 5; return x.x, x.y"),
    ("frozen dataclass", "x=Frozen([1])", "x.x.append(2); return x.x"),
    (
        "slots",
        "x=tag(Slots([1]))",
        "x.a.append(2); x.tag.append(2); return x.a, x.tag, hasattr(x, 'b')",
    ),
    ("attribute left out of pickles", "x=Lossy()", "x.y.append(3); x.x.append(2); return x.x, x.y"),
    ("lock left out of pickles", "x=Locked()", "x.lock.acquire(); x.x.append(2); return x.x"),
    ("pickle that forgets", "x=tag(Forgetful())", "x.tag.append(2); return x.tag"),
    ("namespace", "x=types.SimpleNamespace()", "x.a = 1; return x.a"),
    ("bound methods", "x=(m := Machine()), f=m.add", "f(1); x.run(2); return x.log"),
    ("partial", "x=(v := [1]), f=functools.partial(set_item, v, 0)", "f(5); return x"),
    ("filled cached_property", "x=make_machine()", "x.add(1); return x.length"),
    ("closure over a constant", "x=[1], f=make_constant(3)", "x.append(2); return f()"),
    ("exception", "x=ValueError([1], 2)", "x.args[0].append(5); return x.args"),
    ("random numbers", "**share(random.Random(0))", "return a.random(), b['k'].random()"),
    ("immutable", "x=[Path('x'), pd.Timestamp(0)]", "x.append(1); return len(x)"),
    # numpy
    ("array", "x=np.arange(4.0)", "x[0] = 9; return x"),
    ("resize", "x=np.arange(4.0)", "x.resize(6, refcheck=False); return x"),
    (
        "subclass of ndarray",
        "x=make_tagged_array()",
        "x.tag.append(2); x[0] = 9; return x.tag, x.tolist()",
    ),
    ("its resize", "x=make_tagged_array()", "x.resize(6, refcheck=False); return x.tolist()"),
    ("Fortran order", "x=np.asfortranarray(np.ones((2, 3)))", "x[0] = 9; return x.ravel('K')"),
    ("transposed", "x=np.ones((2, 3)).T", "x[0] = 9; return x.ravel('K')"),
    ("strides", "x=np.arange(6.0)[::-2]", "x[0] = 9; return x"),
    ("objects", "x=np.array([[1], {}, None], object)", "x[0].append(2); return x"),
    ("one object", "x=np.array({'k': [1]}, object)", "x.item()['k'].append(2); return x"),
    ("structured", "x=np.zeros(2, [('a', 'i4')])", "x['a'][0] = 5; return x"),
    ("structured scalar", "x=np.zeros(2, [('a', 'i4')])[0]", "x['a'] = 5; return x['a']"),
    ("read-only", "x=make_read_only()", "return try_to_write(x)"),
    (
        "columns of an array",
        "x=(d := np.ones((4, 3)))[:, :2], y=d[:, 2]",
        "x[0] = 9; y[0] = 7; return x, y",
    ),
    ("rows of an array", "x=list(np.ones((200, 2)))", "x[0][0] = 9; return x[:2]"),
    (
        "masked",
        "x=np.ma.array([1.0, 2], mask=[0, 1], fill_value=7)",
        "x[1] = 5; return x.filled(), x.mask",
    ),
    ("generator", "**share(np.random.default_rng(0))", "return a.random(), b['k'].random()"),
    # pandas
    ("new column", "x=make_frame()", "x['new'] = 1; return x"),
    ("insert", "x=make_frame()", "x.insert(0, 'new', 1); return x"),
    ("cells", "x=make_frame()", "x['cells'].iloc[0].append(5); return x"),
    ("attrs", "x=make_frame()", "x.attrs['u'].append(5); return x"),
    ("array of a column", "x=make_frame()", "x['a'].array[0] = 5; return x"),
    ("flags of a column", "x=pd.DataFrame({'a': [1.0, 2.0]})", "return set_through_flags(x)"),
    (
        "array of the index",
        "x=pd.Series([1], [5])",
        "x.index.array._ndarray[0] = 9; return list(x.index)",
    ),
    ("frame and column", "x=(f := make_frame()), y=f['a']", "x['a'] = 0; return y"),
    ("frame twice", "**share(make_frame())", "a['new'] = 1; return b['k'].shape"),
    (
        "subclass of DataFrame",
        "x=make_special_frame()",
        "x.unit.append(1); x.note.append(3); return x.unit, x.note",
    ),
    ("other columns", "x=make_other_columns()", "x['a'] = 0; return x.astype(str)"),
    ("grouped", "x=pd.DataFrame({'a': [1, 1], 'b': [1, 2]}).groupby('a')", "return x.sum()"),
    # Other packages
    ("estimator", "x=make_model()", "return fit_model(x)"),
    ("fitted estimator", "x=make_fitted_model()", "return fit_model(x)"),
    (
        "random state in two",
        "r=(s := np.random.RandomState(0)), x=make_model(random_state=s)",
        "fit_model(x); return r.rand()",
    ),
    (
        "pipeline of estimators",
        "x=make_pipe()",
        "x.fit(FEATURES, [0, 1, 0, 1]); return x.predict(FEATURES)",
    ),
    (
        "pydantic",
        "x=samples.Order(pieces=[1])",
        "x.pieces.append(2); x._notes.append(1); return x.pieces, x._notes",
    ),
    (
        "graph",
        "x=make_graph()",
        "x.add_edge(0, 9); x.graph['k'].append(2); return sorted(x.nodes), x.graph",
    ),
    ("polars", "x=make_polars()", "x[0, 'a'] = 9; return x"),
    (
        "xarray",
        "x=make_dataset()",
        "x['a'].values[0] = 9; x.attrs['u'].append(1); return x['a'].sum().item(), x.attrs",
    ),
    ("sparse", "x=make_sparse()", "x.data[0] = 9; return x.sum()"),
]

# The same where no faithful copy can be made, and the names of the arguments that are changed.
UNCOPIED = [
    ("closure over a list", "f=close_over([1])", "return f()", "'f'"),
    ("closure over an argument", "x=(v := [1]), f=close_over(v)", "f(); return x", "'f', 'x'"),
    ("class that cannot be rebuilt", "x=Unbuildable(1)", "x.x.append(2); return x.x", "'x'"),
    ("first attribute of an object", "x=Unset()", "x.a = 1; return x.a", "'x'"),
    ("array and a view of it", "a=(v := np.ones(6)), b=v[2:4]", "a[:] = 7; return b", "'a', 'b'"),
]


def build(arguments: str) -> dict[str, Any]:
    values: dict[str, Any] = eval(f"dict({arguments})", globals())
    return values


def take_fingerprints(**values: Any) -> dict[str, str]:
    return {name: fingerprint(value) for name, value in values.items()}


def make_changing_pipeline(
    builder: Callable[[], dict[str, Any]], change: str | Callable[..., Any], cache: bool = True
) -> Pipeline:
    """Make a pipeline in which a step changes what an uncached step made, and others check it."""
    names = tuple(builder())
    scope: dict[str, Any] = {"change": change}
    if isinstance(change, str):
        exec(f"def change({', '.join(names)}): {change}", globals(), scope)
    args = {name: name for name in names}
    return Pipeline(
        Step(lambda: tuple(builder().values()), name="make", outputs=names),
        Step(take_fingerprints, name="before", args=args),
        Step(scope["change"], name="change", cache=cache, after="before"),
        Step(take_fingerprints, name="after", args=args, after="change"),
    )


def check_copies(builder: Callable[[], dict[str, Any]], change: str | Callable[..., Any]) -> None:
    expected = make_changing_pipeline(builder, change, cache=False).run()["change"]
    pipeline = make_changing_pipeline(builder, change)
    for status in ("ran", "cached"):
        run, texts = catch_warnings(lambda: pipeline.run("before", "change", "after"))
        assert texts == []
        assert run.steps["change"].status == status
        assert run["before"] == run["after"]
        assert fingerprint(run["change"]) == fingerprint(expected)


@pytest.mark.parametrize(
    ("arguments", "change"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES]
)
def test_a_cached_step_works_on_faithful_copies(arguments: str, change: str) -> None:
    check_copies(lambda: build(arguments), change)


@pytest.mark.parametrize(
    ("arguments", "change", "names"),
    [row[1:] for row in UNCOPIED],
    ids=[row[0] for row in UNCOPIED],
)
def test_a_result_is_not_kept_if_the_step_changes_something_that_cannot_be_copied(
    arguments: str, change: str, names: str
) -> None:
    def builder() -> dict[str, Any]:
        return build(arguments)

    expected = make_changing_pipeline(builder, change, cache=False).run()["change"]
    pipeline = make_changing_pipeline(builder, change)
    for _ in range(2):
        run, texts = catch_warnings(pipeline.run)
        assert texts == [
            f"step 'change' changed {names} in place, which cannot be copied faithfully: "
            "its result is not kept"
        ]
        assert run.steps["change"].status == "ran"
        assert fingerprint(run["change"]) == fingerprint(expected)


def test_a_result_is_kept_if_what_cannot_be_copied_stays_the_same() -> None:
    pipeline = make_changing_pipeline(lambda: {"x": Unbuildable(1)}, lambda x: len(x.x))
    assert [pipeline.run().steps["change"].status for _ in range(2)] == ["ran", "cached"]


@pytest.mark.slow
@pytest.mark.libraries
def test_cached_steps_work_on_faithful_copies_of_torch_objects() -> None:
    import torch

    def make_training() -> dict[str, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=0.1)}

    def train(model: Any, optimizer: Any) -> Any:
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.ones(4, 3)) - 1).pow(2).mean().backward()
            optimizer.step()
        return model.state_dict(), len(optimizer.state)

    def make_gradient() -> dict[str, Any]:
        x = torch.ones(3, requires_grad=True)
        (x * 2).sum().backward()
        return {"x": x}

    def make_ties() -> dict[str, Any]:
        torch.manual_seed(0)
        a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        b.weight = a.weight
        return {"a": a, "b": b}

    def set_weight(a: Any, b: Any) -> Any:
        with torch.no_grad():
            a.weight[:] = 7
        return b.weight.detach(), a.weight is b.weight

    def make_views() -> dict[str, Any]:
        x = torch.ones(4)
        return {"a": x, "b": x[1:]}

    check_copies(make_training, train)
    check_copies(make_gradient, "x.grad.add_(1); return x.grad, x.requires_grad, x.is_leaf")
    check_copies(make_ties, set_weight)
    check_copies(make_views, "a.add_(1); return b")
    check_copies(lambda: {"x": torch.arange(6.0).reshape(2, 3).T}, "return x.add_(1), x.stride()")
    check_copies(
        lambda: {"x": tag(torch.nn.Parameter(torch.ones(2)))},
        "x.tag.append(2); return x.tag, x.requires_grad",
    )
    check_copies(
        lambda: {"x": torch.nn.BatchNorm1d(2)},
        "import torch; x(torch.arange(4.0).reshape(2, 2)); return x.state_dict()",
    )

    # A scheduler replaces optimizer.step by a closure over the optimizer.
    def make_schedule() -> dict[str, Any]:
        training = make_training()
        scheduler = torch.optim.lr_scheduler.StepLR(training["optimizer"], 1)
        return {**training, "scheduler": scheduler}

    def train_and_schedule(model: Any, optimizer: Any, scheduler: Any) -> Any:
        train(model, optimizer)
        scheduler.step()
        return model.state_dict(), scheduler.get_last_lr()

    expected = make_changing_pipeline(make_schedule, train_and_schedule, cache=False)
    pipeline = Pipeline(
        Step(make_schedule, outputs=("model", "optimizer", "scheduler")),
        Step(train_and_schedule, name="change", cache=True),
    )
    run, _ = catch_warnings(pipeline.run)
    assert fingerprint(run["change"]) == fingerprint(expected.run("change")["change"])


def test_a_default_keeps_its_identity_and_must_not_change() -> None:
    def identify(x: int, fallback: Any = MISSING) -> str:
        return "default" if fallback is MISSING else "given"

    def collect(x: int, items: list[int] = []) -> int:  # noqa: B006
        items.append(x)
        return len(items)

    pipeline = Pipeline(Step(identify, cache=True))
    assert [pipeline.run(x=1)["identify"] for _ in range(2)] == ["default", "default"]
    run, texts = catch_warnings(lambda: Pipeline(Step(collect, cache=True)).run(x=1))
    assert run["collect"] == 1
    assert texts == [
        "step 'collect' changed 'items' in place, which cannot be copied faithfully: "
        "its result is not kept"
    ]


def test_an_alias_that_another_step_returns_is_copied() -> None:
    def same(a: list[int]) -> list[int]:
        return a

    def grow(same: list[int]) -> list[int]:
        same.append(9)
        return same

    def total(a: list[int], grow: list[int]) -> int:
        return sum(a)

    for _ in range(2):
        pipeline = Pipeline(same, Step(grow, cache=True), Step(total, cache=True))
        run = pipeline.run("total", "grow", a=[1, 2])
        assert (run["total"], run["grow"]) == (3, [1, 2, 9])
    assert get_statuses(pipeline.run(a=[1, 2])) == "same ran, grow cached, total cached"


def test_an_uncached_step_sees_what_it_changes() -> None:
    def grow(a: list[int]) -> int:
        a.append(9)
        return 0

    pipeline = Pipeline(
        grow, Step(sum, name="total", args={"iterable": "a"}, cache=True, after="grow")
    )
    assert pipeline.run(a=[1])["total"] == 10


def test_each_try_gets_a_fresh_copy() -> None:
    tries: list[int] = []

    def append(a: list[int]) -> list[int]:
        a.append(9)
        tries.append(len(a))
        if len(tries) < 3:
            raise ValueError
        return a

    a = [1]
    step_of_tries = Step(append, cache=True, retries=2, retry_delay=0)
    assert Pipeline(step_of_tries).run(a=a)["append"] == [1, 9]
    assert (tries, a) == ([2, 2, 2], [1])


@pytest.mark.parametrize("workers", [0, 3])
def test_elements_of_a_map_get_copies_of_what_they_share(workers: int) -> None:
    def append(number: int, a: list[int]) -> list[int]:
        a.append(number)
        return a

    appending = Step(append, map="number", args={"number": "numbers"}, cache=True)
    with ThreadPoolExecutor(3) as executor:
        pipeline = Pipeline(appending, executor=executor if workers else None)
        for _ in range(2):
            assert pipeline.run(numbers=[1, 2, 3], a=[0])["append"] == [[0, 1], [0, 2], [0, 3]]


def test_what_does_not_count_is_not_copied() -> None:
    def append(x: int, log: list[int]) -> int:
        log.append(x)
        return x

    log: list[int] = []
    _, texts = catch_warnings(
        lambda: Pipeline(Step(append, cache=True, ignore="log")).run(x=1, log=log)
    )
    assert (log, texts) == ([1], [])


def test_scalars_are_not_copied() -> None:
    arguments = {"a": 1, "b": "text", "c": (1, ("x", None)), "d": 10**100}
    copies, names = copy_arguments(arguments, (), dict.fromkeys(arguments, ""))
    assert all(copies[name] is arguments[name] for name in arguments)
    assert names == []


# outputs, what they share ("": nothing that can change)
SHARED: list[tuple[str, Callable[[], tuple[Any, Any]], str]] = [
    ("list", lambda: (x := [1], {"k": x}), "list"),
    ("equal lists", lambda: ([1], [1]), ""),
    ("scalars", lambda: ("a", "a"), ""),
    ("tuple", lambda: (x := (1, (2, "a")), [x]), ""),
    ("list in a tuple", lambda: (x := ([1],), [x]), "list"),
    ("array", lambda: (x := np.arange(6.0), x), "numpy.ndarray"),
    ("views", lambda: (x := np.arange(6.0), x.reshape(2, 3)), "memory"),
    ("slices", lambda: ((x := np.arange(6.0))[:3], x[3:]), ""),
    ("columns", lambda: ((x := np.arange(6.0).reshape(2, 3))[:, :2], x[:, 2]), ""),
    ("frame", lambda: (x := make_frame(), [x]), "pandas.DataFrame"),
    ("frame and column", lambda: (x := make_frame(), x["a"]), ""),
    ("frames with one index", lambda: ((x := make_frame())[["a"]], x[["text"]]), ""),
    ("split frame", lambda: ((x := make_frame()).iloc[:1], x.iloc[1:]), ""),
    ("frozen dataclass", lambda: (x := Frozen((1,)), [x]), ""),
    ("list in dataclasses", lambda: (Point(x := [1]), Frozen(x)), "list"),
    ("frozen with attributes", lambda: (x := FrozenPair(1, (2,)), [FrozenPair(x, 1)]), ""),
    ("list in one", lambda: (x := FrozenPair([1], 2), [x]), "list"),
    ("estimator", lambda: (x := make_model(), {"model": x}), "SGDClassifier"),
    (
        "code and constants",
        lambda: ([fit_model, Point, Shade.RED], [fit_model, Point, Shade.RED]),
        "",
    ),
    ("dtypes and times", lambda: ([x := np.dtype("f8"), t := pd.Timestamp(0)], [x, t]), ""),
    ("polars frame", lambda: (x := make_polars(), [x]), "DataFrame"),
]


@pytest.mark.parametrize(
    ("make", "shared"), [row[1:] for row in SHARED], ids=[row[0] for row in SHARED]
)
def test_outputs_that_share_what_can_change_are_not_kept(
    make: Callable[[], tuple[Any, Any]], shared: str
) -> None:
    pipeline = Pipeline(Step(lambda: make(), name="make", outputs=("a", "b"), cache=True))
    for status in ("ran", "ran" if shared else "cached"):
        run, texts = catch_warnings(pipeline.run)
        assert run.steps["make"].status == status
        assert len(texts) == bool(shared)
        for text in texts:
            assert text.startswith("step 'make' returned 'a' and 'b', which share ")
            assert text.endswith(f"{shared}: its result is not kept")


@pytest.mark.parametrize(
    "arguments",
    [
        "x=make_tagged_array()",
        "x=[tag(TaggedDict(list, a=[1]))]",
        "x=tag(TaggedNumber('1.5'))",
        "x=tag(TaggedTime(2020, 1, 1))",
        "x=tag(Lossy())",
        "x=link(tag(Lossy()))",
        "x=Locked()",
        "x=make_special_frame()",
        "x=tag(make_model())",
        "x=make_error()",
    ],
)
def test_attributes_that_a_pickle_loses_are_stored(arguments: str) -> None:
    value = build(arguments)["x"]
    pipeline = Pipeline(Step(lambda x: x, name="same", cache=True))
    for status in ("ran", "cached"):
        run = pipeline.run(x=value)
        assert run.steps["same"].status == status
        assert fingerprint(run["same"]) == fingerprint(value)


########################################################################################
### Catalog
########################################################################################

TOWNS = pd.DataFrame({"city": ["Bern", "Oslo", None], "size": [1.5, 2.25, -3.0]})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own, with one CSV file in it."""
    (tmp_path / "work" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    TOWNS.to_csv("data/raw.csv", index=False)
    return tmp_path / "work"


@step
def cities(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.dropna()


@step
def biggest_city(cities: pd.DataFrame, factor: float = 1.0) -> dict[str, Any]:
    return {"city": cities.sort_values("size").iloc[-1]["city"], "factor": factor}


@step
def headline(biggest_city: dict[str, Any]) -> str:
    return f"{biggest_city['city']} leads"


def make_towns(**more: Any) -> Pipeline:
    """Make a pipeline of three steps; the first two lie in the catalog, and so does the input."""
    catalog = {"raw": "data/raw.csv", "cities": "out/cities.csv", "biggest_city": "out/top.json"}
    return Pipeline(cities, biggest_city, headline, catalog=catalog | more)


def list_plan(plan: Plan) -> list[str]:
    """Write a plan as ``cities stale: file out/cities.csv is gone``."""
    return [f"{state.name} {state.status}: {state.reason}" for state in plan.values()]


def give_back(value: Any) -> Any:
    return value


def save_value(path: str, value: Any) -> Run:
    """Save a value to the catalog."""
    return Pipeline(Step(give_back, name="saved"), catalog={"saved": path}).run(value=value)


def test_inputs_come_from_the_catalog_and_values_of_steps_are_saved_there(folder: Path) -> None:
    pipeline = make_towns()
    run = pipeline.run()
    assert run["headline"] == "Oslo leads"
    assert (folder / "out/cities.csv").read_text() == "city,size\nBern,1.5\nOslo,2.25\n"
    assert json.loads((folder / "out/top.json").read_text()) == {"city": "Oslo", "factor": 1.0}
    assert get_statuses(pipeline.run()) == "cities cached, biggest_city cached, headline ran"
    assert sorted(path.name for path in folder.iterdir()) == ["data", "out"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["cities.csv", "top.json"]
    assert run.inputs == {"factor": 1.0}


def test_a_given_value_goes_before_the_catalog_and_is_not_written_there(folder: Path) -> None:
    pipeline = make_towns()
    assert pipeline.run("headline", raw=TOWNS.head(1))["headline"] == "Bern leads"
    (folder / "out/cities.csv").unlink()
    assert pipeline.run("headline", cities=TOWNS.tail(2))["headline"] == "Oslo leads"
    assert not (folder / "out/cities.csv").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "file out/cities.csv is gone"),
        (lambda path: path.write_text("city,size\nRome,9\n"), "file out/cities.csv changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "file out/cities.csv changed"),
        (lambda path: path.write_bytes(b""), "file out/cities.csv changed"),
    ],
    ids=["deleted", "edited", "truncated", "emptied"],
)
def test_a_step_is_fresh_while_its_file_is_what_we_wrote(
    folder: Path, spoil: Callable[[Path], Any], reason: str
) -> None:
    """It is not enough that there is a file."""
    pipeline = make_towns()
    path = folder / "out/cities.csv"
    pipeline.run()
    content = path.read_bytes()
    spoil(path)
    assert list_plan(pipeline.plan("headline"))[:2] == [
        f"cities stale: {reason}",
        "biggest_city maybe: after cities",
    ]
    run = pipeline.run("headline")
    assert get_statuses(run) == "cities ran, biggest_city cached, headline ran"
    assert path.read_bytes() == content
    assert pipeline.plan("headline")["cities"].status == "fresh"


def test_an_input_file_counts_by_content_and_is_not_loaded_for_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_towns()
    pipeline.run()
    os.utime("data/raw.csv", (1, 1))
    assert pipeline.plan()["cities"].status == "fresh"
    with monkeypatch.context() as patched:
        patched.setattr(pd, "read_csv", lambda *_: pytest.fail("it was loaded"))
        assert pipeline.run("biggest_city")["biggest_city"]["city"] == "Oslo"
    TOWNS.assign(size=[9.0, 1.0, 1.0]).to_csv("data/raw.csv", index=False)
    assert list_plan(pipeline.plan())[0] == "cities stale: input raw changed"
    assert pipeline.run("headline")["headline"] == "Bern leads"


FILES: dict[str, Any] = {
    "a.csv": TOWNS,
    "a.csv.gz": TOWNS,
    "a.parquet": TOWNS,
    "a.feather": TOWNS,
    "a.json": {"a": [1, None, "é"], "b": True},
    "a.json.gz": [1.5],
    "a.jsonl": [{"a": 1}, {"a": 2, "b": "\u2028\r"}],
    "a.jsonl.gz": [],
    "a.pkl": {1: (2, {3})},
    "a.pkl.gz": "text",
    "a.npy": np.arange(6.0).reshape(2, 3),
    "a.npz": {"file": np.arange(3), "y": np.eye(2)},
    "a.txt": "Zürich\r\n",
    "a.txt.gz": "",
    "a.bytes": b"\x00\xff",
    "a.bytes.gz": b"",
    "a.CSV": TOWNS,
}


@pytest.mark.parametrize("path", FILES)
def test_every_suffix_gives_back_what_was_put_in(folder: Path, path: str) -> None:
    def consumer(value: Any) -> Any:
        return [value]

    value = FILES[path]
    producer = Step(lambda: value, name="value", version=path)
    pipeline = Pipeline(producer, consumer, catalog={"value": f"out/{path}"})
    first = pipeline.run()
    second = pipeline.run()
    assert get_statuses(second) == "value cached, consumer ran"
    for loaded in (first["value"], second["value"], first["consumer"][0], second["consumer"][0]):
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(loaded, value)
        elif path == "a.npz":
            assert list(loaded) == list(value)
            assert all(np.array_equal(loaded[name], value[name]) for name in value)
        else:
            assert np.array_equal(loaded, value)
            assert type(loaded) is type(value)
    content = (folder / "out" / path).read_bytes()
    (folder / "out" / path).unlink()
    pipeline.run()
    assert (folder / "out" / path).read_bytes() == content  # it holds no time of day


def test_the_first_and_the_second_run_get_what_the_file_gives_back(folder: Path) -> None:
    """JSON makes a list of a tuple: then it is a list from the first run on."""
    pair = Step(lambda: (1, 2), name="pair")
    kind = Step(lambda pair: type(pair).__name__, name="kind")
    pipeline = Pipeline(pair, kind, catalog={"pair": "out/pair.json"})
    assert [pipeline.run("kind")["kind"] for _ in range(2)] == ["list", "list"]


REFUSALS: list[tuple[str, Any, str]] = [
    ("x.csv", [1, 2], "TypeError: expected a pandas.DataFrame"),
    ("x.parquet", [1, 2], "TypeError: expected a pandas.DataFrame"),
    ("x.feather", TOWNS["size"], "TypeError: expected a pandas.DataFrame"),
    ("x.csv", TOWNS.set_index("city"), "TypeError: a CSV does not keep the index: use reset_index"),
    ("x.csv", TOWNS.T, "TypeError: a CSV does not keep the index: use reset_index(), or .parquet"),
    ("x.csv.gz", TOWNS.rename_axis("id"), "TypeError: a CSV does not keep the index: use reset_in"),
    ("x.csv", pd.concat({"a": TOWNS}, axis=1), "TypeError: a CSV does not keep levels of columns"),
    ("x.jsonl", TOWNS, "TypeError: expected a list; of a frame: frame.to_dict('records')"),
    ("x.jsonl", {"a": 1}, "TypeError: expected a list; of a frame: "),
    ("x.jsonl.gz", "ab", "TypeError: expected a list; of a frame: "),
    ("x.jsonl", None, "TypeError: expected a list; of a frame: "),
    ("x.json", {"a": {1}}, "TypeError: Object of type set is not JSON serializable"),
    ("x.txt", 7, "TypeError: expected a str"),
    ("x.bytes", "text", "TypeError: expected bytes"),
    ("x.npy", [1.0, 2.0], "TypeError: expected a numpy.ndarray"),
    ("x.npy", np.ma.array([1], mask=[True]), "TypeError: expected a numpy.ndarray"),
    ("x.npy", np.array([{}]), "ValueError: Object arrays cannot be saved when allow_pickle=False"),
    ("x.npz", np.arange(3), "TypeError: expected a dict: text -> numpy.ndarray"),
    ("x.npz", {1: np.arange(3)}, "TypeError: expected a dict: text -> numpy.ndarray"),
    ("x.npz", {"a": [1]}, "TypeError: expected a numpy.ndarray"),
    ("x.pkl", threading.Lock(), "TypeError: cannot pickle '_thread.lock' object"),
    ("x.png", [1], "TypeError: expected a matplotlib.figure.Figure; of axes: axes.figure"),
]


@pytest.mark.parametrize(("path", "value", "problem"), REFUSALS)
def test_a_value_that_a_file_would_not_give_back_is_refused(
    folder: Path, path: str, value: Any, problem: str
) -> None:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    with pytest.raises(CatalogError) as caught:
        save_value(path, value)
    first, second = str(caught.value).splitlines()
    assert first == f"'saved' is a {kind}, which cannot be saved as {path}"
    assert second.startswith(f"  {problem}")
    assert caught.value.name == "saved"
    assert os.listdir() == ["data"]


def test_a_frame_of_another_library_is_refused_by_the_full_name_of_its_type(folder: Path) -> None:
    import polars

    for path in ("x.csv", "x.parquet", "x.feather"):
        with pytest.raises(CatalogError) as caught:
            save_value(path, polars.DataFrame({"a": [1]}))
        assert str(caught.value) == (
            f"'saved' is a polars.dataframe.frame.DataFrame, which cannot be saved as {path}\n"
            "  TypeError: expected a pandas.DataFrame"
        )


@pytest.mark.parametrize("index", [pd.Index([3, 5, 8]), pd.RangeIndex(3)])
def test_a_csv_drops_an_index_that_only_numbers_the_rows(folder: Path, index: Any) -> None:
    run = save_value("out/rows.csv", TOWNS.set_index(index))
    assert list(run["saved"].index) == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_a_figure_is_saved_as_a_picture_and_handed_on_as_a_figure(
    folder: Path, suffix: str, start: bytes
) -> None:
    """A reused step hands on a copy of the figure, from the store."""
    from matplotlib.figure import Figure

    @step
    def plot(points: list[int]) -> Any:
        figure = Figure()
        figure.subplots().plot(points)
        return figure

    def title_of(plot: Any) -> str:
        return type(plot).__name__

    path = folder / f"out/plot.{suffix}"
    pipeline = Pipeline(plot, title_of, catalog={"plot": str(path)})
    first = pipeline.run(points=[1, 2])
    content = path.read_bytes()
    assert content.startswith(start)
    second = pipeline.run(points=[1, 2])
    assert get_statuses(second) == "plot cached, title_of ran"
    for run in (first, second):
        assert run["title_of"] == "Figure"
        assert list(run["plot"].axes[0].lines[0].get_ydata()) == [1, 2]
    path.unlink()
    assert pipeline.plan(points=[1, 2])["plot"].reason == f"file out/plot.{suffix} is gone"
    pipeline.run(points=[1, 2])
    assert path.read_bytes() == content  # it holds no time of day
    with pytest.raises(CatalogError) as caught:
        Pipeline(title_of, catalog={"plot": str(path)}).run()
    assert str(caught.value) == (
        f"'plot' cannot be loaded from {path}\n  NotImplementedError: this format is only written"
    )


def test_outputs_go_into_the_catalog_by_their_names(folder: Path) -> None:
    def width(bounds: tuple[float, float]) -> float:
        return bounds[1] - bounds[0]

    pipeline = Pipeline(bounds, spread, width, catalog={"low": "out/low.json"})
    for _ in range(2):
        run = pipeline.run(prices=[3, 1, 2])
        assert (run["bounds"], run["low"], run["spread"], run["width"]) == ((1, 3), 1, 2, 2)
        assert json.loads((folder / "out/low.json").read_text()) == 1
    assert run.steps["bounds"].status == "cached"


def test_names_are_normalized_like_identifiers(folder: Path) -> None:
    """A name may be written with a letter and an accent, or with a ligature."""
    (folder / "data/caf\u00e9.json").write_text("3")
    pipeline = Pipeline(
        Step(lambda café: café + 1, name="file"),
        catalog={"cafe\u0301": "data/caf\u00e9.json", "\ufb01le": "out/file.json"},
    )
    assert pipeline.run()["file"] == 4
    assert (folder / "out/file.json").read_text() == "4\n"
    with pytest.raises(
        CatalogError, match="the catalog has the key 'ﬁle'\n  expected different names"
    ):
        pipeline.replace(catalog={"file": "a.json", "\ufb01le": "b.json"}).plan()


def test_paths_are_templates_of_inputs(folder: Path) -> None:
    pipeline = make_towns(biggest_city="out/{factor}/{region}.json")
    pipeline.run("headline", factor=2.0, region="eu")
    pipeline.run("headline", factor=3.0, region="eu")
    assert json.loads((folder / "out/2.0/eu.json").read_text())["factor"] == 2.0
    for factor in (2.0, 3.0):
        plan = pipeline.plan("headline", factor=factor, region="eu")
        assert plan["biggest_city"].status == "fresh"
    assert list_plan(pipeline.plan("headline", factor=2.0, region="us"))[1] == (
        "biggest_city stale: input factor 3.0 → 2.0"
    )
    assert pipeline.plan("headline", factor=3.0, region="us")["biggest_city"].reason == (
        "catalog biggest_city eu.json → us.json"
    )
    with pytest.raises(InputError) as caught:
        pipeline.run("headline")
    assert str(caught.value) == (
        "the catalog needs 'region', but run() was not given it\n"
        "  biggest_city: out/{factor}/{region}.json\n  known names: factor, raw"
    )
    assert caught.value.missing == ("region",)


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "..", "a/b", "../../victim", "/etc/victim", "a\\b", "C:", "C:victim", ":ads"),
        *("a\0b", "a\nb", "a\ud800b", "~", "~root", "a..b", Path("a/b")),
    ],
)
def test_text_that_fills_a_template_must_be_a_plain_name(folder: Path, text: Any) -> None:
    """An input must not lead out of the folder that the catalog names."""
    for template in ("out/{region}/x.json", "{region!s}.json", "out/{region:>3}.json"):
        pipeline = Pipeline({"saved": lambda region: 1}, catalog={"saved": template})
        if template == "out/{region:>3}.json" and len(str(text)) < 3:
            continue  # spaces make it another text
        with pytest.raises(CatalogError) as caught:
            pipeline.run(region=str(text) if ":>" in template else text)
        assert str(caught.value) == (
            f"the path of 'saved' in the catalog cannot be filled in: {str(text)!r} is not a plain "
            f"name for a file\n  {template}"
        )
    assert os.listdir() == ["data"]


@pytest.mark.parametrize("text", ["a.b", "2026-01-31", "Zürich", "a b", "a.", "-1", "x~"])
def test_a_plain_name_may_have_dots_letters_and_spaces(folder: Path, text: str) -> None:
    pipeline = Pipeline({"saved": lambda region: region}, catalog={"saved": "out/{region}/x.json"})
    assert pipeline.run(region=text)["saved"] == text
    assert os.listdir("out") == [text]


@pytest.mark.parametrize("text", ["%2e%2e", "a?b", "a#b", "*", "simplecache::x", "a:b"])
def test_an_address_takes_no_characters_with_a_meaning(folder: Path, text: str) -> None:
    pipeline = Pipeline({"saved": lambda x: 1}, catalog={"saved": "memory://{x}/a.json"})
    with pytest.raises(CatalogError, match="is not a plain name for a file"):
        pipeline.run(x=text)


class Table:
    """An object with load and save, as other libraries have them."""

    def __init__(self, value: Any = None) -> None:
        self.value = value
        self.saves = 0

    def load(self) -> Any:
        return copy.deepcopy(self.value)

    def save(self, value: Any) -> None:
        self.value = value
        self.saves += 1


def test_any_object_with_load_and_save_is_an_entry(folder: Path) -> None:
    raw = Table(TOWNS)
    top = Table()
    pipeline = make_towns(raw=raw, biggest_city=top)
    assert pipeline.run()["headline"] == "Oslo leads"
    assert get_statuses(pipeline.run()) == "cities cached, biggest_city cached, headline ran"
    assert top.value == {"city": "Oslo", "factor": 1.0}
    top.value = None
    assert pipeline.plan()["biggest_city"].reason == "dataset biggest_city changed"
    pipeline.run()
    assert (top.value["city"], top.saves) == ("Oslo", 2)
    raw.value = TOWNS.head(1)
    assert pipeline.run()["headline"] == "Bern leads"


def split_number(n: int) -> tuple[int, int]:
    return n, n + 1


def name_type(split_number: Any) -> str:
    return type(split_number).__name__


def test_outputs_as_a_whole_are_a_tuple_on_all_executors(executor: Any, folder: Path) -> None:
    steps = [Step(split_number, outputs=("floor", "ceiling")), name_type]
    pipeline = Pipeline(
        *steps, executor=executor, catalog={"floor": "out/floor.json"}, store=folder / "store"
    )
    assert pipeline.run("name_type", n=1)["name_type"] == "tuple"


class Memory(Table):
    """Loads what it was given, and nothing before that; cannot be sent to another process."""

    lock = None

    def load(self) -> Any:
        if self.value is None:
            raise KeyError("nothing was saved")
        return super().load()

    def __reduce__(self) -> Any:
        raise TypeError("not to be sent")


def test_an_object_of_the_catalog_stays_in_the_calling_process(executor: Any, folder: Path) -> None:
    """A worker would save to its own copy of the object."""
    memory = Memory()
    pipeline = make_towns().replace(
        catalog={"cities": memory}, executor=executor, store=folder / "store"
    )
    assert pipeline.run("headline", raw=TOWNS)["headline"] == "Oslo leads"
    assert len(memory.value) == 2
    assert pipeline.plan("cities", raw=TOWNS)["cities"].status == "fresh"


def test_outputs_in_an_object_stay_in_the_calling_process(executor: Any, folder: Path) -> None:
    memory = Memory()
    steps = [Step(split_number, outputs=("floor", "ceiling")), name_type]
    pipeline = Pipeline(
        *steps, executor=executor, catalog={"floor": memory}, store=folder / "store"
    )
    assert pipeline.run("name_type", n=1)["name_type"] == "tuple"
    assert memory.value == 1


class Locks(Table):
    """Loads a value that has no fingerprint, as a dataset of Kedro that loads functions does."""

    def load(self) -> Any:
        return {"lock": threading.Lock()}


def test_the_value_of_an_object_may_have_no_fingerprint(folder: Path) -> None:
    @step(cache=True)
    def size(locks: Any) -> int:
        return len(locks)

    for source in (size, [Step(lambda: 1, name="locks"), size]):
        pipeline = Pipeline(source, catalog={"locks": Locks()})
        assert [pipeline.run("size")["size"] for _ in range(2)] == [1, 1]
    assert list_plan(Pipeline(size, catalog={"locks": Locks()}).plan()) == [
        "size uncached: no fingerprint: _thread.lock"
    ]


def test_a_pipeline_inside_a_step_counts_and_travels_with_its_catalog(folder: Path) -> None:
    """What it loads from is part of what it does."""

    def make_outer(path: str) -> Pipeline:
        inner = Pipeline({"more": lambda x: x + 1}, catalog={"x": path})

        @step(cache=True)
        def most() -> int:
            return int(inner.run()["more"])

        return Pipeline(most)

    for number, path in enumerate(("1.json", "2.json")):
        Path(path).write_text(str(number))
        assert get_statuses(make_outer(path).run()) == "most ran"
        assert get_statuses(make_outer(path).run()) == "most cached"
    assert pickle.loads(pickle.dumps(make_towns())).run()["headline"] == "Oslo leads"


def test_addresses_go_through_fsspec(folder: Path) -> None:
    import fsspec

    with fsspec.open("memory://in/raw.csv", "wb") as file:
        file.write(b"city,size\nRiga,1\n")
    pipeline = make_towns(raw="memory://in/raw.csv", cities="memory://out/cities.csv.gz")
    assert pipeline.run("headline")["headline"] == "Riga leads"
    run = pipeline.run("headline")
    assert get_statuses(run) == "cities cached, biggest_city cached, headline ran"
    fsspec.filesystem("memory").rm("/out/cities.csv.gz")
    reason = pipeline.plan("headline")["cities"].reason
    assert reason == "dataset memory://out/cities.csv.gz is gone"
    run = pipeline.run("headline")
    assert get_statuses(run) == "cities ran, biggest_city cached, headline ran"
    with pytest.raises(CatalogError, match="'raw' cannot be opened\n  ValueError: Protocol not "):
        make_towns(raw="nowhere://raw.csv").run()


def test_the_catalog_works_on_all_executors(executor: Any, folder: Path) -> None:
    """Workers may be in another folder: paths are those of the calling process."""
    pipeline = make_towns().replace(executor=executor, store=folder / "store")
    assert pipeline.run("headline")["headline"] == "Oslo leads"
    run = pipeline.run("headline")
    assert get_statuses(run) == "cities cached, biggest_city cached, headline ran"
    assert json.loads((folder / "out/top.json").read_text())["city"] == "Oslo"


DATABASE = sqlite3.connect(":memory:", check_same_thread=False)


def count_rows(n: int) -> int:
    return n + 1 if DATABASE else 0


def test_a_step_without_a_fingerprint_is_saved_to_the_catalog_on_all_executors(
    executor: Any, folder: Path
) -> None:
    catalog = {"count_rows": "out/rows.json"}
    pipeline = Pipeline(count_rows, executor=executor, catalog=catalog, store=folder / "store")
    reason = pipeline.plan(n=1)["count_rows"].reason
    assert reason.startswith("no fingerprint: count_rows -> constant ")
    assert pipeline.run(n=1)["count_rows"] == 2
    assert (folder / "out/rows.json").read_text() == "2\n"


def test_a_save_that_fails_leaves_what_was_there(folder: Path) -> None:
    def odd(n: int) -> Any:
        return n if n < 2 else {"n": n, "lock": threading.Lock()}

    pipeline = Pipeline(odd, catalog={"odd": "out/odd.json"})
    pipeline.run(n=1)
    with pytest.raises(CatalogError) as caught:
        pipeline.run(n=2)
    assert str(caught.value) == (
        "'odd' is a dict, which cannot be saved as out/odd.json\n"
        "  TypeError: Object of type lock is not JSON serializable"
    )
    assert isinstance(caught.value.__cause__, TypeError)
    assert os.listdir("out") == ["odd.json"]
    assert (folder / "out/odd.json").read_text() == "1\n"
    assert get_statuses(pipeline.run(n=1)) == "odd cached"


@pytest.mark.parametrize("obstacle", ["a folder", "a file as its folder"])
def test_an_error_of_the_file_system_keeps_its_type_and_names_the_dataset(
    folder: Path, obstacle: str
) -> None:
    if obstacle == "a folder":
        (folder / "out/x.json").mkdir(parents=True)
    else:
        (folder / "out").write_text("")
    with pytest.raises(OSError) as caught:  # noqa: PT011
        save_value("out/x.json", 1)
    assert caught.value.__notes__[0] == "while 'saved' was saved to the catalog: out/x.json"
    assert caught.value.__notes__[1].startswith("in step 'saved' at ")
    if obstacle == "a folder":
        assert os.listdir("out") == ["x.json"]


def test_an_error_of_an_object_keeps_its_type_and_names_the_dataset(folder: Path) -> None:
    with pytest.raises(KeyError) as caught:
        make_towns(raw=Memory()).run()
    note = "while 'raw' of the catalog was loaded: <Memory 'raw'>"
    assert caught.value.__notes__[0] == note


def test_two_values_cannot_lie_in_one_file(folder: Path) -> None:
    """A value cannot overwrite an input either. Two inputs may be read from one file."""
    os.symlink("data", "link")
    steps: Any = {"more": lambda raw: raw, "most": lambda more, other: more}
    for catalog, given in (
        ({"more": "out/a.csv", "most": "./out/../out/a.csv"}, {"other": 1, "raw": TOWNS}),
        ({"more": "link/raw.csv", "raw": "data/raw.csv"}, {"other": 1}),
    ):
        pipeline = Pipeline(steps, catalog=catalog)
        one, two = catalog
        with pytest.raises(CatalogError) as caught:
            pipeline.run(**given)
        assert str(caught.value) == (
            f"the catalog has one file for '{one}' and '{two}': {catalog[two]}\n"
            "  one would overwrite the other: give each a path of its own"
        )
    assert len(pd.read_csv("data/raw.csv")) == 3
    pipeline = Pipeline(steps, catalog=dict.fromkeys(("raw", "other"), "data/raw.csv"))
    assert len(pipeline.run()["most"]) == 3


@pytest.mark.parametrize("path", ["{0}.json", "{a.b}.json", "{}.json", "{a.json", "{n:{n}}.json"])
def test_a_path_that_is_not_a_template_is_an_error(path: str) -> None:
    with pytest.raises(CatalogError) as caught:
        _ = Pipeline({"saved": lambda n: n}, catalog={"saved": path}).inputs
    assert str(caught.value) == (
        f"the path of 'saved' in the catalog is not a template: {path}\n"
        "  expected names of inputs in braces, and {{ }} for braces"
    )


def test_templates_take_formats_and_double_braces(folder: Path) -> None:
    pipeline = Pipeline({"saved": lambda n: n}, catalog={"saved": "out/{{a}}{n:03}.json"})
    assert pipeline.run(n=7)["saved"] == 7
    assert os.listdir("out") == ["{a}007.json"]
    with pytest.raises(CatalogError, match=r"'saved' in the catalog cannot be filled in: .*'str'"):
        pipeline.replace(catalog={"saved": "{n:d}.json"}).run(n="x")
    pipeline = Pipeline(
        {"saved": lambda raw: 1}, catalog={"raw": "data/raw.csv", "saved": "{raw}.json"}
    )
    with pytest.raises(InputError, match="the catalog needs 'raw', but run\\(\\) was not given"):
        pipeline.run()


def test_a_project_that_was_copied_has_its_own_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path counts as it is written: a copy with its files is reused, the original untouched."""
    pipeline = make_towns()
    pipeline.run("headline")
    shutil.copytree(folder, folder.parent / "copy")
    monkeypatch.chdir(folder.parent / "copy")
    assert {state.status for state in pipeline.plan("biggest_city").values()} == {"fresh"}
    os.unlink("out/cities.csv")
    assert pipeline.plan("headline")["cities"].reason == "file out/cities.csv is gone"
    assert pipeline.run("headline", factor=2.0)["headline"] == "Oslo leads"
    assert json.loads((folder / "out/top.json").read_text())["factor"] == 1.0


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "disk" / "saved.json").write_text("0")
    (folder / "disk" / "saved.json").chmod(0o640)
    os.symlink("disk/saved.json", "saved.json")
    assert save_value("saved.json", 5)["saved"] == 5
    assert (os.readlink("saved.json"), os.listdir("disk")) == ("disk/saved.json", ["saved.json"])
    assert stat.S_IMODE(os.stat("saved.json").st_mode) == 0o640
    assert get_statuses(save_value("saved.json", 5)) == "saved cached"


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["by a step", "elsewhere"])
def test_a_pickle_counts_with_the_code_of_its_classes(tmp_path: Path, origin: str) -> None:
    """Its bytes only name them: a model whose method was edited is another value."""
    code = """
        import os, pickle
        from dagkit import Pipeline, step
        import model
        os.chdir(os.environ["APP"])
        if not os.path.exists("in.pkl"):
            with open("in.pkl", "wb") as file:
                pickle.dump(model.Model(), file)
        @step
        def fitted():
            return model.Model()
        @step(cache=True)
        def used(fitted):
            return fitted.predict()
        steps = [fitted, used] if FIT else used
        run = Pipeline(steps, catalog={"fitted": "out.pkl" if FIT else "in.pkl"}).run("used")
        print(run["used"], run.steps["used"].status)
    """
    code = textwrap.dedent(code).replace("FIT", str(origin == "by a step"))
    path = os.pathsep.join([str(HERE), str(tmp_path)])
    for number, status in ((1, "ran"), (1, "cached"), (2, "ran"), (2, "cached")):
        source = f"class Model:\n    def predict(self): return {number}\n"
        (tmp_path / "model.py").write_text(source)
        output = run_python(code, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1", APP=str(tmp_path))
        assert output == f"{number} {status}\n"


class Bomb:
    """Its pickle writes a file when it is loaded."""

    def __reduce__(self) -> Any:
        return Path.write_text, (Path("exploded"), "")


@pytest.mark.parametrize("moment", ["between two runs", "before the value is asked for"])
def test_a_pickle_that_was_swapped_is_never_unpickled(folder: Path, moment: str) -> None:
    """Its bytes are compared with what we wrote before they are parsed."""
    model = Step(lambda: {"weights": [1, 2]}, name="model")
    size = Step(lambda model: len(model), name="size", cache=True)
    pipeline = Pipeline(model, size, catalog={"model": "model.pkl"})
    run = pipeline.run("size", "model")
    Path("model.pkl").write_bytes(pickle.dumps(Bomb()))
    if moment == "between two runs":
        assert pipeline.plan()["model"].reason == "file model.pkl changed"
        assert pipeline.run("model")["model"] == {"weights": [1, 2]}
    else:
        with pytest.raises(CatalogError, match="'model' of the catalog has changed while the run "):
            _ = run["model"]
    assert not Path("exploded").exists()


def test_equal_bytes_under_another_suffix_are_another_value(folder: Path) -> None:
    def used(saved: Any) -> str:
        return repr(saved)

    for value, suffix in (("1\n", "txt"), (b"1\n", "bytes"), (1, "json")):
        pipeline = Pipeline(Step(give_back, name="saved"), Step(used, cache=True))
        pipeline = pipeline.replace(catalog={"saved": f"out/saved.{suffix}"})
        assert pipeline.run("used", value=value)["used"] == repr(value)


def test_a_value_in_the_catalog_survives_the_pruning_of_the_store(folder: Path) -> None:
    pipeline = make_towns()
    pipeline.run("biggest_city")
    pipeline.store.prune(max_bytes=0)
    assert pipeline.run("biggest_city")["biggest_city"]["city"] == "Oslo"
    assert {state.status for state in pipeline.plan("biggest_city").values()} == {"fresh"}


def test_a_plan_does_not_fail_for_data_that_cannot_be_loaded(folder: Path) -> None:
    """A run says so, before any step runs."""
    pipeline = Pipeline(Step(lambda x: x, name="out", cache=True), catalog={"x": "x.pkl"})
    assert pipeline.plan()["out"].reason == "no fingerprint: catalog x -> FileNotFoundError"
    with pytest.raises(InputError, match="the catalog has no file for input 'x': "):
        pipeline.run()
    Path("x.json").write_text("[1")
    mapped = Pipeline(Step(lambda x: x, name="out", cache=True, map="x"), catalog={"x": "x.json"})
    assert mapped.plan()["out"].status == "new"


def test_two_runs_that_write_one_file_never_take_the_value_of_the_other(folder: Path) -> None:
    """The run whose file was replaced says so; an entry never fits the file of another run."""
    pipeline = make_towns()

    def meddle(event: Event) -> None:
        if (event.kind, event.step) == ("step finished", "biggest_city"):
            pipeline.run("biggest_city", factor=5.0)

    with pytest.raises(CatalogError) as caught:
        pipeline.replace(on_event=meddle).run("headline")
    assert str(caught.value).splitlines() == [
        "'biggest_city' of the catalog has changed while the run needed it: out/top.json",
        "  run again; give two runs that write at once a path each, for instance by a template: "
        "'out/{region}/model.pkl'",
    ]
    assert pipeline.plan("headline")["biggest_city"].reason == "file out/top.json changed"
    assert pipeline.run("biggest_city")["biggest_city"]["factor"] == 1.0


@pytest.mark.slow
def test_many_writers_of_one_file_leave_it_whole(folder: Path) -> None:
    """Four threads write and read one file; each gets its own value, or a ``CatalogError``."""
    pipeline = Pipeline({"big": lambda n: [n] * 30_000}, catalog={"big": "out/big.json"})
    wrong: list[Any] = []

    def write(number: int) -> None:
        for n in range(number, 80, 4):
            with contextlib.suppress(CatalogError):
                value = pipeline.run(n=n)["big"]
                if value != [n] * 30_000:
                    wrong.append(n)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(set(json.loads(Path("out/big.json").read_text()))) == 1
    assert os.listdir("out") == ["big.json"]


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_no_torn_file(folder: Path) -> None:
    """A real kill -9 while a large value is written: the old file is whole, or the new one."""
    code = """
        from dagkit import Pipeline, Step
        def big(n): return [n] * 3_000_000
        pipeline = Pipeline(big, catalog={"big": "out/big.json"})
        pipeline.run(n=1)
        print("ready", flush=True)
        for n in range(2, 100):
            pipeline.run(n=n)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.7)
        process.kill()
    assert len(set(json.loads((folder / "out/big.json").read_text()))) == 1


KNOWN_SUFFIXES = (
    ".bytes, .bytes.gz, .csv, .csv.gz, .feather, .json, .json.gz, .jsonl, .jsonl.gz, .npy, .npz, "
    ".parquet, .pdf, .pkl, .pkl.gz, .png, .svg, .txt, .txt.gz"
)
WRONG_CATALOGS: dict[str, tuple[Any, str]] = {
    "suffix": (
        {"raw": "data/raw.xls"},
        f"the catalog has no format for 'raw': data/raw.xls\n  known suffixes: {KNOWN_SUFFIXES}\n"
        "  or give an object with load() and save(value)",
    ),
    "no path": (
        {"raw": ""},
        f"the catalog has no format for 'raw': \n  known suffixes: {KNOWN_SUFFIXES}\n"
        "  or give an object with load() and save(value)",
    ),
    "packed": (
        {"raw": "data/raw.npy.gz"},
        "the catalog has no format for 'raw': data/raw.npy.gz\n"
        f"  known suffixes: {KNOWN_SUFFIXES}\n  or give an object with load() and save(value)",
    ),
    "object": (
        {"raw": 7},
        "the catalog has 7 for 'raw'\n  expected a path, or an object with load() and save(value)",
    ),
    "bytes": (
        {"raw": b"raw.csv"},
        "the catalog has b'raw.csv' for 'raw'\n"
        "  expected a path, or an object with load() and save(value)",
    ),
    "zero": (
        {"raw": "raw\0.csv"},
        "the catalog has 'raw\\x00.csv' for 'raw'\n"
        "  expected a path, or an object with load() and save(value)",
    ),
    "class": (
        {"raw": Table},
        "the catalog has <class 'test_dagkit.Table'> for 'raw'\n"
        "  expected a path, or an object with load() and save(value)",
    ),
    "outputs": (
        {"bounds": "b.json"},
        f"step 'bounds' cannot be in the catalog\n  bounds(prices) at {locate(bounds)}\n"
        "  a map, a sensor and a step with outputs cannot: name its outputs, or let another step "
        "take its value",
    ),
    "name": (
        {"citys": "x.csv"},
        "the catalog names 'citys', but no step produces or uses it\n"
        "  known names: bounds, cities, high, low, prices, raw; did you mean 'cities'?",
    ),
    "text": (
        "x",
        "Pipeline() has catalog='x'\n"
        "  catalog: expected a dict: name -> path, or object with load() and save(value)",
    ),
    "key": (
        {7: "x.csv"},
        "the catalog has the key 7\n  expected different names",
    ),
}


@pytest.mark.parametrize(("catalog", "message"), WRONG_CATALOGS.values(), ids=WRONG_CATALOGS)
def test_a_wrong_catalog_is_an_error_that_says_what_was_expected(
    catalog: Any, message: str
) -> None:
    with pytest.raises(DagkitError) as caught:
        Pipeline(cities, bounds, catalog=catalog).plan("cities")
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


def test_all_files_that_are_not_there_are_named_before_any_step_runs(folder: Path) -> None:
    def slow(raw: pd.DataFrame, other: list[int], more: bytes) -> None:
        raise AssertionError

    catalog = {"raw": "data/row.csv", "other": "data/other.json", "more": "data/more.bytes"}
    pipeline = Pipeline(slow, catalog=catalog)
    assert repr(dict(pipeline.inputs)) == (
        "{'raw': data/row.csv, 'other': data/other.json, 'more': data/more.bytes}"
    )
    Path("data/more.bytes").mkdir()
    with pytest.raises(InputError) as caught:
        pipeline.run()
    assert str(caught.value).splitlines() == [
        f"the catalog has no file for input 'raw': {folder}/data/row.csv",
        f"the catalog has no file for input 'other': {folder}/data/other.json",
        f"the catalog has no file for input 'more': {folder}/data/more.bytes",
        "  put a file there, or give the value to run()",
    ]
    assert caught.value.missing == ("raw", "other", "more")


@pytest.mark.parametrize(
    ("path", "content", "problem"),
    [
        ("x.json", b"[1", "JSONDecodeError: Expecting ',' delimiter: line 1 column 3 (char 2)"),
        ("x.txt", "Zürich".encode("cp1252"), "UnicodeDecodeError: 'utf-8' codec can't decode byte"),
        ("x.csv", "a\nZürich".encode("cp1252"), "UnicodeDecodeError: 'utf-8' codec can't decode b"),
        ("x.csv", b"", "EmptyDataError: No columns to parse from file"),
        ("x.json.gz", b"[1]", "BadGzipFile: Not a gzipped file (b'[1')"),
        ("x.pkl", b"cnowhere\nName\n.", "ModuleNotFoundError: No module named 'nowhere'"),
        ("x.npy", pickle.dumps([1]), "ValueError: "),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(
    folder: Path, path: str, content: bytes, problem: str
) -> None:
    Path(path).write_bytes(content)
    pipeline = Pipeline({"out": lambda x: x}, catalog={"x": path})
    with pytest.raises(CatalogError) as caught:
        pipeline.run()
    first, second = str(caught.value).splitlines()
    assert first == f"'x' cannot be loaded from {folder}/{path}"
    assert second.startswith(f"  {problem}")


def test_a_map_or_a_sensor_cannot_be_in_the_catalog() -> None:
    @sensor
    def parcel() -> int:
        return 1

    each = Step(lambda item: item, name="each", map="item")
    for source, name in ((each, "each"), (parcel, "parcel")):
        pipeline = Pipeline(source, catalog={name: "x.json"})
        with pytest.raises(CatalogError, match=f"step '{name}' cannot be in the catalog\n"):
            pipeline.run(item=[1])


def test_a_map_goes_through_a_list_of_the_catalog(folder: Path) -> None:
    (folder / "data/items.json").write_text("[1, 2, 3]")
    pipeline = Pipeline(
        Step(lambda item: 10 * item, name="each", map="item", cache=True),
        catalog={"item": "data/items.json"},
    )
    assert pipeline.run()["each"] == [10, 20, 30]
    assert pipeline.plan()["each"].status == "fresh"
    (folder / "data/items.json").write_text("[1, 2, 3, 4]")
    assert pipeline.run()["each"] == [10, 20, 30, 40]


def test_each_try_of_a_step_gets_its_own_value(folder: Path) -> None:
    tries: list[int] = []

    @step(retries=1)
    def shaky(raw: pd.DataFrame) -> int:
        tries.append(len(raw.columns))
        raw["new"] = 1
        if len(tries) == 1:
            raise OSError("come again")
        return len(raw.columns)

    pipeline = Pipeline(shaky, catalog={"raw": "data/raw.csv"})
    assert (pipeline.run()["shaky"], tries) == (3, [2, 2])


########################################################################################
### Reuse
########################################################################################


@step(cache=True)
def squares(n: int) -> list[int]:
    return [i * i for i in range(n)]


@step(cache=True)
def largest(squares: list[int]) -> int:
    return max(squares)


@pytest.fixture
def cached_pair() -> Pipeline:
    return Pipeline(squares, largest)


def count_entries(pipeline: Pipeline) -> int:
    return sum(len(names) for _, _, names in os.walk(Path(pipeline.store.path, "entries")))


# Edits. The project runs in a new process each time, as a user's would.

PROJECT = {
    "helpers.py": """
        def strip(text):
            return [int(x) for x in text.split()]
    """,
    "app.py": """
        from dagkit import step
        import helpers
        @step(cache=True)
        def raw(path):
            print("raw")
            return path.read_text()
        @step(cache=True)
        def clean(raw):
            print("clean")
            return helpers.strip(raw)
        @step(cache=True, outputs=("train", "test"))
        def split(clean):
            print("split")
            return clean[:2], clean[2:]
        @step(cache=True)
        def model(train, alpha=0.1):
            print("model")
            return sum(train) * 10 * alpha
    """,
    "data.txt": "1 2 3",
}
RUN_PROJECT = """
import json, os
from pathlib import Path
import app, dagkit
loads, load = [], dagkit.Store._load
def load_and_note(self, entry, name):
    loads.append(name)
    return load(self, entry, name)
dagkit.Store._load = load_and_note
inputs = json.loads(os.environ.get("INPUTS", "{}"))
run = dagkit.Pipeline(app).run("model", path=Path("data.txt"), **inputs)
print(loads, run["model"])
"""


@pytest.mark.slow
def test_an_edit_runs_what_it_may_change_and_stops_where_a_value_is_equal(tmp_path: Path) -> None:
    """Nothing is loaded that nothing needs: the list shows the loads, the target's comes last."""
    write_files(tmp_path, PROJECT)

    def run(file: str = "app.py", old: str = "", new: str = "", inputs: str = "{}") -> str:
        text = (tmp_path / file).read_text()
        assert old in text
        if old:
            (tmp_path / file).write_text(text.replace(old, new))
        code = f"import os; os.chdir({str(tmp_path)!r})\n{RUN_PROJECT}"
        return " ".join(run_in(tmp_path, code, INPUTS=inputs).splitlines())

    assert run() == "raw clean split model ['raw', 'clean', 'train', 'model'] 3.0"
    assert run() == "['model'] 3.0"
    assert run("helpers.py", "def", "# A comment\n\ndef") == "['model'] 3.0"
    assert run("helpers.py", "int(x)", "0 + int(x)") == "clean ['raw', 'model'] 3.0"
    assert run("app.py", "clean[2:]", "clean[2:] * 2") == "split ['clean', 'model'] 3.0"
    assert run("data.txt", "3", "4") == "raw clean split ['raw', 'clean', 'model'] 3.0"
    assert run(inputs='{"alpha": 2.0}') == "model ['train', 'model'] 60.0"
    everything = "raw clean split model ['raw', 'clean', 'train', 'model']"
    assert run("data.txt", "1", "5") == f"{everything} 7.0"
    assert run("data.txt", "5", "1") == "['model'] 3.0"


EDITED_PROJECT = {
    "helpers.py": """
        def strip_units(text):
            return [int(x) for x in text.split()]
    """,
    "app.py": """
        from dagkit import step
        import helpers
        LIMIT = 5
        @step
        def load(seed=0):
            return [seed]
        @step(cache=True)
        def raw(path):
            return path.read_text()
        @step(cache=True)
        def clean(raw):
            return helpers.strip_units(raw)
        @step(cache=True)
        def model(clean, alpha=0.1):
            return alpha * sum(clean[:LIMIT])
        @step(cache=True)
        def report(load, model, title="A"):
            return f"{title} {load} {model}"
    """,
    "data.txt": "1 2 3",
}


class Project:
    """A small project that is edited and imported again in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_files(folder, EDITED_PROJECT)
        self.inputs: dict[str, Any] = {"path": Path("data.txt")}

    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert old in text
        (self.folder / file).write_text(text.replace(old, new))

    def make_pipeline(self) -> Pipeline:
        modules = {}
        for name in ("helpers", "app"):
            modules[name] = sys.modules[name] = types.ModuleType(name)
            modules[name].__file__ = str(self.folder / f"{name}.py")
            exec((self.folder / f"{name}.py").read_text(), vars(modules[name]))
        return Pipeline(modules["app"])


@pytest.fixture
def edited_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    for name in ("helpers", "app"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Project(tmp_path / "work")


def edit_code_and_input(project: Project) -> None:
    project.inputs["alpha"] = 0.3
    project.edit("app.py", "alpha * sum", "2 * alpha * sum")


REASONS: dict[str, tuple[Callable[[Project], Any], list[str]]] = {
    "nothing": (lambda project: None, []),
    "a comment": (lambda project: project.edit("app.py", "LIMIT = 5", "LIMIT = 5  # five"), []),
    "a helper": (
        lambda project: project.edit("helpers.py", "int(x)", "0 + int(x)"),
        ["clean stale: code changed: helper helpers.strip_units", "model maybe: after clean"],
    ),
    "a body": (
        lambda project: project.edit("app.py", "alpha * sum", "2 * alpha * sum"),
        ["model stale: code changed: model"],
    ),
    "a constant": (
        lambda project: project.edit("app.py", "LIMIT = 5", "LIMIT = 6"),
        ["model stale: code changed: constant LIMIT"],
    ),
    "an input": (
        lambda project: project.inputs.update(alpha=0.3),
        ["model stale: input alpha 0.1 → 0.3"],
    ),
    "a default": (
        lambda project: project.edit("app.py", "alpha=0.1", "alpha=0.3"),
        ["model stale: input alpha 0.1 → 0.3"],
    ),
    "code and an input": (
        edit_code_and_input,
        ["model stale: code changed: model; input alpha 0.1 → 0.3"],
    ),
    "an input beside a step that always runs": (
        lambda project: project.inputs.update(title="B"),
        ["report stale: input title 'A' → 'B'"],
    ),
    "the content of a file": (
        lambda project: project.edit("data.txt", "3", "4"),
        ["raw stale: file data.txt changed", "clean maybe: after raw", "model maybe: after raw"],
    ),
    "another file": (
        lambda project: project.inputs.update(path=Path("app.py")),
        [
            f"raw stale: input path {summarize(Path('data.txt'))} → {summarize(Path('app.py'))}",
            "clean maybe: after raw",
            "model maybe: after raw",
        ],
    ),
    "an option": (
        lambda project: project.edit("app.py", "True)\ndef clean", "True, version=2)\ndef clean"),
        ["clean stale: version changed", "model maybe: after clean"],
    ),
    "an age": (
        lambda project: project.edit(
            "app.py",
            "step(cache=True)\ndef clean",
            "step(cache=__import__('datetime').timedelta(seconds=-1))\ndef clean",
        ),
        ["clean stale: expired", "model maybe: after clean"],
    ),
    "a store without the step": (
        lambda project: Store().clear("clean"),
        ["clean new: never ran", "model maybe: after clean"],
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_plan_gives_the_reason_of_each_step_that_will_or_may_run(
    name: str, edited_project: Project
) -> None:
    """Of the steps that are not listed, ``report`` comes after a step that always runs."""
    project = edited_project
    change, expected = REASONS[name]
    project.make_pipeline().run(**project.inputs)
    change(project)
    lines = list_plan(project.make_pipeline().plan(**project.inputs))
    assert lines.pop(0) == "load uncached: "
    if not any(line.startswith("report") for line in expected):
        expected = [*expected, "report maybe: after load"]
    assert [line for line in lines if not line.endswith(" fresh: ")] == expected


def test_a_plan_says_that_an_entry_is_unreadable_and_a_run_stores_it_again(
    cached_pair: Pipeline,
) -> None:
    cached_pair.run(n=3)
    (path,) = Path(cached_pair.store.path, "entries").glob("*/squares/*")
    path.write_bytes(b"damaged")
    plan, texts = catch_warnings(lambda: cached_pair.plan(n=3))
    assert list_plan(plan) == ["squares stale: unreadable entry", "largest maybe: after squares"]
    assert len(texts) == 1
    run = cached_pair.run(n=3)
    assert run.steps["squares"].reason == "unreadable entry"
    assert get_statuses(cached_pair.run(n=3)) == "squares cached, largest cached"


def test_the_reason_for_another_python_or_package(
    cached_pair: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_pair.run(n=3)
    now = f"{sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setattr(dagkit, "_PYTHON_VERSION", "3.99")
    assert list_plan(cached_pair.plan(n=3)) == [
        f"squares stale: Python {now} → 3.99",
        f"largest stale: Python {now} → 3.99",
    ]


def test_nothing_is_loaded_before_a_target_is_asked_for(
    cached_pair: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_pair.run(n=4)
    loads: list[str] = []
    load = Store._load

    def load_and_note(self: Store, entry: Any, name: str) -> Any:
        loads.append(name)
        return load(self, entry, name)

    monkeypatch.setattr(Store, "_load", load_and_note)
    run = cached_pair.run(n=4)
    assert (loads, get_statuses(run)) == ([], "squares cached, largest cached")
    assert (run["largest"], run["largest"], loads) == (9, 9, ["largest"])
    cached_pair.plan(n=4)
    assert loads == ["largest"]


# Keys


def test_every_kind_of_input_is_told_apart_by_a_cached_step() -> None:
    @step(cache=True)
    def kind(x: Any) -> str:
        return f"{type(x).__name__} {x!r}"

    pipeline = Pipeline(kind)
    for value in (1, True, 1.0, "1", b"1", 0.0, -0.0, [1], (1,), {1}):
        assert pipeline.run(x=value)["kind"] == f"{type(value).__name__} {value!r}"
    assert count_entries(pipeline) == 10


@pytest.mark.parametrize("version", [1, "a", (1, "b")])
def test_version_is_part_of_the_key(version: Any) -> None:
    def answer() -> int:
        return 42

    for value, expected in ((None, "ran"), (version, "ran"), (version, "cached"), (None, "cached")):
        pipeline = Pipeline(Step(answer, cache=True, version=value))
        assert get_statuses(pipeline.run()) == f"answer {expected}"


def test_arguments_that_are_bound_otherwise_are_another_call() -> None:
    def subtract(a: int, b: int) -> int:
        return a - b

    for args, value in (({"a": "x", "b": "y"}, 3), ({"a": "y", "b": "x"}, -3)):
        pipeline = Pipeline(Step(subtract, args=args, cache=True))
        assert pipeline.run(x=5, y=2)["subtract"] == value


def test_an_ignored_argument_does_not_count_in_the_key() -> None:
    def fit(data: int, n_jobs: int = 1) -> tuple[int, int]:
        return data, n_jobs

    pipeline = Pipeline(Step(fit, cache=True, ignore="n_jobs"))
    assert pipeline.run(data=1, n_jobs=2)["fit"] == (1, 2)
    assert pipeline.run(data=1, n_jobs=8)["fit"] == (1, 2)
    assert pipeline.plan(data=2)["fit"].reason == "input data 1 → 2"
    other = Pipeline(Step(fit, cache=True, ignore="data"))
    assert other.run(data=7, n_jobs=1)["fit"] == (7, 1)


def test_an_ignored_value_that_only_a_run_can_make_leaves_a_step_fresh() -> None:
    def jobs() -> int:
        return 4

    def fit(data: int, jobs: int) -> int:
        return data

    pipeline = Pipeline(jobs, Step(fit, cache=True, ignore="jobs"))
    pipeline.run(data=1)
    assert list_plan(pipeline.plan(data=1)) == ["jobs uncached: ", "fit fresh: "]


def test_none_is_stored_and_an_exception_is_not() -> None:
    @step(cache=True)
    def nothing() -> None:
        pass

    pipeline = Pipeline(nothing)
    assert [get_statuses(pipeline.run()) for _ in range(2)] == ["nothing ran", "nothing cached"]
    assert pipeline.run()["nothing"] is None

    def fails() -> None:
        raise ValueError("no")

    failing = Pipeline(Step(fails, cache=True), on_error="continue")
    assert [get_statuses(failing.run()) for _ in range(2)] == ["fails failed"] * 2
    assert count_entries(failing) == 1


def test_after_a_failure_finished_results_are_there() -> None:
    @step
    def broken(squares: list[int]) -> int:
        raise ZeroDivisionError

    for expected in ("ran", "cached"):
        pipeline = Pipeline(squares, broken, on_error="continue")
        assert get_statuses(pipeline.run(n=3)) == f"squares {expected}, broken failed"


def fail_once() -> None:
    """Fail until the variable TRIES has counted down to 0."""
    os.environ["TRIES"] = str(int(os.environ["TRIES"]) - 1)
    if os.environ["TRIES"] != "0":
        raise OSError


def test_async_steps_and_retries_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIES", "2")

    @step(cache=True)
    async def slow(n: int) -> int:
        await asyncio.sleep(0)
        return n + 1

    @step(cache=True, retries=2)
    def shaky(slow: int) -> int:
        fail_once()
        return slow * 2

    pipeline = Pipeline(slow, shaky)
    run = pipeline.run(n=1)
    assert (run.steps["shaky"].attempts, run["shaky"]) == (2, 4)
    run = pipeline.run(n=1)
    assert (get_statuses(run), run["shaky"]) == ("slow cached, shaky cached", 4)


@pytest.mark.slow
def test_a_chain_of_1000_cached_steps_is_reused() -> None:
    chain = [Step(make_function("s0", "x", body="return x"), cache=True)]
    for i in range(1, 1000):
        function = make_function(f"s{i}", f"s{i - 1}", body=f"return s{i - 1} + 1")
        chain.append(Step(function, cache=True))
    pipeline = Pipeline(chain)
    assert pipeline.run("s999", x=1)["s999"] == 1000
    run = pipeline.run("s999", x=1)
    assert {state.status for state in run.steps.values()} == {"cached"}
    assert run["s999"] == 1000


def test_a_cached_step_never_hides_behind_an_uncached_one(monkeypatch: pytest.MonkeyPatch) -> None:
    @step
    def reading() -> str:
        return os.environ["READING"]

    @step(cache=True)
    def quoted(reading: str) -> str:
        return f"<{reading}>"

    pipeline = Pipeline(reading, quoted)
    for text, expected in (("a", "ran"), ("b", "ran"), ("a", "cached")):
        monkeypatch.setenv("READING", text)
        run = pipeline.run("quoted")
        assert (run["quoted"], get_statuses(run)) == (
            f"<{text}>",
            f"reading ran, quoted {expected}",
        )


def test_a_timedelta_is_how_long_a_result_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(Step(lambda: 1, name="price", cache=timedelta(hours=1)))
    assert [get_statuses(pipeline.run()) for _ in range(2)] == ["price ran", "price cached"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3500)
    assert get_statuses(pipeline.run()) == "price cached"
    monkeypatch.setattr(time, "time", lambda: now + 3700)
    assert list_plan(pipeline.plan()) == ["price stale: expired"]
    assert [get_statuses(pipeline.run()) for _ in range(2)] == ["price ran", "price cached"]


# Plans


def test_a_plan_of_what_a_run_will_refuse_or_not_look_at() -> None:
    """A plan has no opinion on a map over no list, and reads nothing that no cached step takes."""
    pipeline = Pipeline(
        Step(len, args={"obj": "x"}, map="obj", cache=True), Step(id, args={"obj": "y"})
    )
    plan = pipeline.plan(x=5, y=threading.Lock())
    assert list_plan(plan) == ["len new: never ran", "id uncached: "]


def test_a_plan_and_a_run_agree(cached_pair: Pipeline) -> None:
    """Whatever is in the store, fresh steps are reused, and new and uncached ones run."""
    size = Step(len, args={"obj": "squares"}, cache=True)
    pipeline = Pipeline(cached_pair, Step(lambda n: n, name="seed"), size)
    for n, clear in ((3, None), (3, "largest"), (4, None), (3, "squares"), (4, "len"), (4, None)):
        if clear:
            pipeline.store.clear(clear)
        plan = pipeline.plan(n=n)
        run = pipeline.run(n=n)
        fresh = {state.name for state in plan.values() if state.status == "fresh"}
        running = {state.name for state in plan.values() if state.status in ("new", "uncached")}
        cached = {state.name for state in run.steps.values() if state.status == "cached"}
        assert fresh <= cached
        assert running.isdisjoint(cached)


def test_a_plan_loads_the_stored_list_that_a_map_goes_through_and_no_more() -> None:
    """Without that, all that comes after such a map would look stale for ever."""
    numbers = Step(lambda n: list(range(n)), name="numbers", cache=True)
    doubled = Step(lambda x: 2 * x, name="doubled", args={"x": "numbers"}, map="x", cache=True)
    pipeline = Pipeline(numbers, doubled, Step(sum, args={"iterable": "doubled"}, cache=True))
    pipeline.run(n=3)
    assert {state.status for state in pipeline.plan(n=3).values()} == {"fresh"}
    pipeline.store.clear("numbers")
    assert list_plan(pipeline.plan(n=3)) == [
        "numbers new: never ran",
        "doubled maybe: after numbers",
        "sum maybe: after numbers",
    ]


def test_the_reason_of_a_step_that_ran_is_that_of_the_plan(cached_pair: Pipeline) -> None:
    assert cached_pair.run(n=3).steps["squares"].reason == "never ran"
    reason = "input n 3 → 4"
    expected = [f"squares stale: {reason}", "largest maybe: after squares"]
    assert list_plan(cached_pair.plan(n=4)) == expected
    run = cached_pair.run(n=4)
    assert run.steps["squares"].reason == reason
    assert run.steps["largest"].reason == "after squares"


def test_a_step_after_a_fresh_one_names_the_value_that_differs(cached_pair: Pipeline) -> None:
    cached_pair.run(n=4)
    cached_pair.run("squares", n=3)
    expected = ["squares fresh: ", "largest stale: value squares changed"]
    assert list_plan(cached_pair.plan(n=3)) == expected
    assert cached_pair.run(n=3).steps["largest"].reason == "value squares changed"


def test_a_step_that_always_runs_is_uncached_however_often_it_ran(cached_pair: Pipeline) -> None:
    pipeline = Pipeline(cached_pair, Step(lambda largest: -largest, name="least"))
    for _ in range(3):
        pipeline.run(n=3)
    assert list_plan(pipeline.plan(n=3))[-1] == "least uncached: "


def test_what_has_no_fingerprint_never_gives_a_hit_and_the_plan_names_it() -> None:
    db = sqlite3.connect(":memory:")

    @step(cache=True)
    def clean(n: int) -> int:
        return n if db else 0

    @step(cache=True)
    def after(clean: int) -> int:
        return clean

    @step(cache=True)
    def open_(lock: Any) -> int:
        return 1

    pipeline = Pipeline(clean, after, open_)
    inputs = {"n": 1, "lock": threading.Lock()}
    for expected in ("ran", "cached"):  # what follows goes by the value
        plan = pipeline.plan(**inputs)
        reason = "no fingerprint: clean -> closure db -> sqlite3.Connection"
        assert list_plan(plan)[0] == f"clean uncached: {reason}"
        assert plan["open_"].reason == "no fingerprint: _thread.lock"
        run = pipeline.run(**inputs)
        statuses = [run.steps[name].status for name in ("clean", "open_", "after")]
        assert statuses == ["ran", "ran", expected]
    db.close()


@pytest.mark.slow
def test_a_module_that_cannot_be_imported_any_more_is_a_reason(tmp_path: Path) -> None:
    write_files(tmp_path / "app", {
        "models.py": """
            import os
            if os.path.exists(os.path.join(os.path.dirname(__file__), "broken")):
                raise RuntimeError
            class M: pass
        """,
        "app.py": """
            from dagkit import step
            @step(cache=True)
            def model():
                from models import M
                return M()
        """,
    })  # fmt: skip
    code = "import app, dagkit; pipeline = dagkit.Pipeline(app); "
    run_in(tmp_path / "app", code + "pipeline.run()")
    code += "print(pipeline.plan()['model'].reason)"
    (tmp_path / "app" / "broken").touch()
    assert run_in(tmp_path / "app", code) == "code M is gone\n"


# Changes in place


def test_cold_and_warm_runs_agree_when_a_step_changes_its_argument() -> None:
    def make_rows() -> list[list[int]]:
        return [[1], [2]]

    def change(rows: list[list[int]]) -> int:
        rows[0].append(5)
        rows.append([3])
        return sum(map(sum, rows))

    def copy_rows(rows: list[list[int]], change: int) -> list[list[int]]:
        return [*rows]

    def make_both() -> tuple[list[list[int]], list[list[int]]]:
        return make_rows(), make_rows()

    for is_made_cached, is_copied_cached in itertools.product([True, False], [True, False]):
        sources: list[tuple[list[Step], dict[str, Any]]] = [
            ([Step(make_rows, name="rows", cache=is_made_cached)], {}),
            ([Step(make_both, cache=is_made_cached, outputs=("rows", "rest"))], {}),
            ([], {"rows": make_rows()}),
        ]
        for steps, inputs in sources:
            shutil.rmtree(os.environ["DAGKIT_STORE"], ignore_errors=True)
            values = []
            for _ in range(3):
                copied = Step(copy_rows, cache=is_copied_cached)
                pipeline = Pipeline(steps, Step(change, cache=True), copied)
                run = pipeline.run("change", "copy_rows", **copy.deepcopy(inputs))
                values.append((run["change"], run["copy_rows"]))
            assert values == [(11, make_rows())] * 3


def test_objects_inside_a_frame_are_ones_own_too() -> None:
    @step
    def frame() -> pd.DataFrame:
        return pd.DataFrame({"a": [[1], [2]]})

    @step(cache=True)
    def change(frame: pd.DataFrame) -> int:
        frame["a"][0].append(5)
        return 0

    @step
    def first_cell(frame: pd.DataFrame, change: int) -> Any:
        return frame["a"][0]

    pipeline = Pipeline(frame, change, first_cell)
    assert [pipeline.run("first_cell")["first_cell"] for _ in range(2)] == [[1], [1]]


def test_a_retried_step_gets_its_arguments_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIES", "2")

    @step
    def rows() -> list[int]:
        return [1]

    @step(cache=True, retries=1)
    def grow(rows: list[int]) -> list[int]:
        rows.append(2)
        fail_once()
        return rows

    assert Pipeline(rows, grow).run("grow")["grow"] == [1, 2]


def test_a_default_is_the_object_that_the_step_declares() -> None:
    missing = object()

    @step(cache=True)
    def kind(x: int, fallback: Any = missing) -> str:
        return "default" if fallback is missing else "given"

    assert Pipeline(kind).run(x=1)["kind"] == "default"


@pytest.mark.parametrize("spoiling", ["a value", "a lock"])
def test_what_others_do_while_a_step_waits_for_its_next_try_is_not_stored(
    spoiling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIES", "2")

    @step
    def rows() -> list[Any]:
        return [1]

    @step(cache=True, retries=1, retry_delay=0.05)
    def size(rows: list[Any]) -> int:
        fail_once()
        return len(rows)

    @step
    def grow(rows: list[Any]) -> int:
        rows.append(2 if spoiling == "a value" else threading.Lock())
        return 0

    assert Pipeline(rows, size, grow).run()["size"] == 2
    monkeypatch.setenv("TRIES", "1")
    assert Pipeline(rows, size).run()["size"] == 1


def test_what_an_async_step_changes_is_seen_by_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    @step
    def rows() -> list[int]:
        return [1]

    @step
    async def grow(rows: list[int]) -> int:
        await asyncio.sleep(0.05)
        rows.extend(map(int, os.environ["MORE"]))
        return 0

    @step(cache=True)
    def first(rows: list[int]) -> int:
        return 0

    @step(cache=True)
    def size(rows: list[int], grow: int) -> int:
        return len(rows)

    pipeline = Pipeline(rows, grow, first, size)
    for more in ("2", "2", ""):
        monkeypatch.setenv("MORE", more)
        assert pipeline.run("first", "size")["size"] == 1 + len(more)


def test_a_step_with_outputs_gives_the_same_whole_cached_or_not() -> None:
    def pair() -> dict[str, int]:
        return {"y": 1, "x": 2}

    for cache in (False, True, True):
        assert Pipeline(Step(pair, outputs=("x", "y"), cache=cache)).run()["pair"] == (2, 1)


# Files


def test_a_file_that_an_earlier_step_writes_after_its_fingerprint_stores_nothing(
    tmp_path: Path,
) -> None:
    """The next step reads the new content. That is no result of the old content."""
    path = tmp_path / "file"
    path.write_text("old")

    @step(cache=True)
    def first(path: Path) -> str:
        path.write_text("new")
        return "done"

    @step(cache=True)
    def second(path: Path, first: str) -> str:
        return path.read_text()

    assert Pipeline(first, second).run("second", path=path)["second"] == "new"
    path.write_text("old")
    pipeline = Pipeline(Step(lambda: "done", name="first"), second)
    assert pipeline.plan("second", path=path, first="done")["second"].status != "fresh"
    assert pipeline.run("second", path=path, first="done")["second"] == "old"


@pytest.mark.parametrize("replacement", ["other content", "a pipe"])
def test_a_file_that_changes_while_a_step_reads_it_stores_nothing(
    replacement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("old")

    @step(cache=True)
    def text(path: Path) -> str:
        if os.environ.get("EDIT") == "other content":
            path.write_text("new")
        elif os.environ.get("EDIT") == "a pipe":
            path.unlink()
            os.mkfifo(path)
            return "new"
        return path.read_text()

    pipeline = Pipeline(text)
    monkeypatch.setenv("EDIT", replacement)
    assert pipeline.run(path=path)["text"] == "new"
    monkeypatch.delenv("EDIT")
    path.unlink()
    path.write_text("old")
    assert pipeline.run(path=path)["text"] == "old"
    assert get_statuses(pipeline.run(path=path)) == "text cached"


def test_a_path_as_a_result_counts_by_the_content_of_its_file(tmp_path: Path) -> None:
    out = str(tmp_path / "out.txt")

    @step(cache=True)
    def report(n: int) -> Path:
        Path(out).write_text("x" * n)
        return Path(out)

    @step(cache=True)
    def size(report: Path) -> int:
        return len(report.read_text())

    pipeline = Pipeline(report, size)
    assert get_statuses(pipeline.run(n=3)) == "report ran, size ran"
    assert get_statuses(pipeline.run(n=3)) == "report cached, size cached"
    Path(out).write_text("y")
    assert pipeline.plan(n=3)["report"].reason == f"file {out} changed"
    run = pipeline.run(n=3)
    assert (get_statuses(run), run["size"]) == ("report ran, size cached", 3)
    Path(out).unlink()
    assert pipeline.plan(n=3)["report"].reason == f"file {out} is gone"
    assert pipeline.run(n=3)["size"] == 3
    assert Path(out).read_text() == "xxx"


def test_a_result_file_that_the_next_step_changes_while_it_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out.txt")

    @step(cache=True)
    def report() -> Path:
        Path(out).write_text("right")
        return Path(out)

    @step(cache=True)
    def text(report: Path) -> str:
        if os.environ.get("EDIT"):
            report.write_text(os.environ["EDIT"])
        return report.read_text()

    pipeline = Pipeline(report, text)
    monkeypatch.setenv("EDIT", "wrong")
    pipeline.run()
    monkeypatch.delenv("EDIT")
    assert pipeline.run()["text"] == "right"
    assert Path(out).read_text() == "right"


def test_a_store_inside_a_folder_is_not_content_of_it(tmp_path: Path) -> None:
    """Such as the folder of the project: otherwise each run would change its own input."""

    @step(cache=True)
    def count_texts(path: Path) -> int:
        return len([*path.glob("*.txt")])

    pipeline = Pipeline(count_texts, store=tmp_path / "in" / ".dagkit")
    folder = write_files(tmp_path / "in", {"a.txt": "a"})
    statuses = [get_statuses(pipeline.run(path=folder)) for _ in range(2)]
    assert statuses == ["count_texts ran", "count_texts cached"]
    write_files(folder, {"b.txt": "b"})
    assert pipeline.run(path=folder)["count_texts"] == 2


@pytest.mark.parametrize("has_been_read", [False, True])
def test_a_file_that_an_earlier_step_of_the_run_writes_counts_as_written(
    has_been_read: bool, tmp_path: Path
) -> None:
    """Also if the run has already fingerprinted the path, for its record or another step."""

    def make_pipeline(text: str) -> Pipeline:
        @step(cache=True)
        def size(path: Path) -> int:
            return 1

        @step(cache=True)
        def download(out: str, size: int = 0) -> None:
            Path(out).write_text(text)

        @step(cache=True)
        def content(path: Path, download: None) -> str:
            return path.read_text()

        return Pipeline(download, content, [size] if has_been_read else [])

    path = tmp_path / "in.txt"
    for text in ("old", "new"):
        path.write_text("start")
        for _ in range(2):
            assert make_pipeline(text).run(path=path, out=str(path))["content"] == text


def test_files_in_the_list_of_a_map_that_change_while_a_step_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each element is a value of its own, and all their files are read again."""
    file = tmp_path / "in.txt"
    file.write_text("old")

    @step(cache=True, map="n")
    def paths(n: int) -> Path:
        return file

    @step(cache=True)
    def texts(paths: list[Path]) -> list[str]:
        if os.environ.get("EDIT"):
            file.write_text(os.environ["EDIT"])
        return [path.read_text() for path in paths]

    pipeline = Pipeline(paths, texts)
    monkeypatch.setenv("EDIT", "new")
    assert pipeline.run(n=[1, 2])["texts"] == ["new"] * 2
    monkeypatch.delenv("EDIT")
    file.write_text("old")
    assert pipeline.run(n=[1, 2])["texts"] == ["old"] * 2
    assert get_statuses(pipeline.run(n=[1, 2])) == "paths cached, texts cached"


# Other processes and threads


def start_python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(HERE), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SLOW_STEP = """
import os, time
from dagkit import Pipeline, Step
def slow(n):
    with open(os.environ["LOG"], "a") as log: log.write("x")
    print("inside", flush=True)
    time.sleep(float(os.environ["SLEEP"]))
    return n
pipeline = Pipeline(Step(slow, cache=True))
"""


@pytest.mark.slow
def test_what_another_process_or_thread_computes_is_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(3) as pool:
    print([run.result()["slow"] for run in [pool.submit(pipeline.run, n=7) for _ in range(3)]])
"""
    processes = [start_python(SLOW_STEP + code, LOG=str(log), SLEEP="1") for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert out.endswith("[7, 7, 7]\n"), err
    assert log.read_text() == "x"


@pytest.mark.slow
@pytest.mark.parametrize("has_child", [False, True], ids=["alone", "with a forked child"])
def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path, has_child: bool) -> None:
    """Workers that a killed process has forked live on, with all the files it had open."""
    log = str(tmp_path / "log")
    code = SLOW_STEP
    if has_child:
        fork = 'if os.environ["SLEEP"] == "60" and os.fork() == 0: time.sleep(9); os._exit(0)\n    '
        code = code.replace('print("inside"', fork + 'print("inside"')
    process = start_python(code + "pipeline.run(n=7)", LOG=log, SLEEP="60")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    start = time.monotonic()
    run_python(code + "assert pipeline.run(n=7)['slow'] == 7", LOG=log, SLEEP="0")
    assert time.monotonic() - start < 5


def test_a_file_that_changes_while_another_thread_computes_the_same_step(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("old")
    has_begun = threading.Event()
    may_go_on = threading.Event()

    @step(cache=True)
    def text(path: Path) -> str:
        has_begun.set()
        assert may_go_on.wait(30)
        return path.read_text()

    pipeline = Pipeline(text)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pipeline.run, path=path)
        assert has_begun.wait(30)
        waiting = pool.submit(pipeline.run, path=path)
        time.sleep(0.1)
        path.write_text("new")
        may_go_on.set()
        assert first.result()["text"] == waiting.result()["text"] == "new"
    path.write_text("old")
    assert pipeline.run(path=path)["text"] == "old"


@pytest.mark.parametrize(
    "steps",
    [
        "def two(): return 2\ntwo_ = two\n"
        "def one(two): return Pipeline(Step(two_, cache=True)).run()['two'] - 1",
        "async def two():\n    await asyncio.sleep(0.2)\n    return 2\n"
        "async def one(): return Pipeline(Step(two, cache=True)).run()['two'] - 1",
        "async def two():\n    await asyncio.sleep(0.2)\n    return 2\n"
        "async def one():\n"
        "    run = Pipeline(Step(two, cache=True)).run\n"
        "    return (await asyncio.to_thread(run))['two'] - 1",
    ],
    ids=["plain", "async", "async with a thread"],
)
@pytest.mark.slow
def test_a_pipeline_inside_a_step_does_not_deadlock(steps: str) -> None:
    """Otherwise the async one would wait for a step that waits for it."""
    code = "import asyncio, signal\nfrom dagkit import Pipeline, Step\nsignal.alarm(20)\n" + steps
    code += "\npipeline = Pipeline(Step(one, cache=True), Step(two, cache=True))\n"
    assert run_python(code + "print(pipeline.run()['one'], pipeline.run()['one'])") == "1 1\n"


def test_a_step_that_runs_a_pipeline_is_reused(cached_pair: Pipeline) -> None:
    @step(cache=True)
    def outer() -> int:
        value: int = cached_pair.run("largest", n=4)["largest"]
        return value

    pipeline = Pipeline(outer)
    assert [get_statuses(pipeline.run()) for _ in range(2)] == ["outer ran", "outer cached"]


class Node:
    def __init__(self) -> None:
        self.inner: list[Node] = []


NODES = [Node() for _ in range(100)]
for node in NODES:
    node.inner = NODES[:3]


def test_one_pipeline_in_many_threads_has_one_key_a_step() -> None:
    @step(cache=True)
    def count(n: int) -> int:
        return len(NODES) + n

    pipeline = Pipeline(count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            runs = list(pool.map(lambda _: pipeline.run(n=1), range(60)))
    finally:
        sys.setswitchinterval(interval)
    assert {run["count"] for run in runs} == {101}
    assert count_entries(pipeline) == 1


########################################################################################
### Calls
########################################################################################

EXECUTORS = [
    *("sequential", "threads", "processes", "custom"),
    *[
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("loky", "dask executor", "dask client")
    ],
]


class Custom:
    """An executor of which dagkit knows nothing but submit()."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        return self._pool.submit(function, *args)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Start a real Dask cluster of two worker processes."""
    import distributed

    with (
        warnings.catch_warnings(),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as own,
        distributed.Client(own) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(params=EXECUTORS)
def executor(
    request: pytest.FixtureRequest, shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """Every executor, one after the other: the contract is the same on all of them."""
    monkeypatch.setenv("HOME", str(shared_home))  # that of the workers, which outlive a test
    if request.param == "sequential":
        yield None
    elif request.param == "threads":
        with ThreadPoolExecutor(2) as pool:
            yield pool
    elif request.param == "processes":
        yield request.getfixturevalue("processes")
    elif request.param == "loky":
        import loky

        yield loky.get_reusable_executor(2)
    elif request.param == "custom":
        yield Custom()
    else:
        client = request.getfixturevalue("cluster")
        yield client if request.param == "dask client" else client.get_executor()


# The steps of these tests are at the level of the module, so that they can be sent to processes.


def twofold(x: int) -> int:
    return 2 * x


def plus_y(twofold: int, y: int = 1) -> int:
    return twofold + y


def halves(plus_y: int) -> tuple[int, int]:
    return plus_y // 2, plus_y - plus_y // 2


def get_process_id(twofold: int) -> int:
    return os.getpid()


def fails(twofold: int) -> None:
    raise LookupError(f"no {twofold}")


def skips(twofold: int) -> None:
    raise Skip("not today")


def copes(twofold: int, skips: int = -1) -> int:
    return skips


def square(item: int) -> int:
    return item * item


def negated(square: int) -> int:
    return -square


def summed(negated: list[int]) -> int:
    return sum(negated)


def both_signs(x: int) -> tuple[int, int]:
    return x, -x


def put_together(one: Any, other: Any) -> Any:
    return one, other


def picky(item: int) -> int:
    if item == 3:
        raise ValueError("not three")
    return item


def only_odd(item: int) -> int:
    if item % 2 == 0:
        raise Skip(f"{item} is even")
    return item


def fails_once(item: int, folder: Path) -> int:
    """Fail at the first call for each item, in whatever process."""
    try:
        (folder / str(item)).touch(exist_ok=False)
    except FileExistsError:
        return item
    raise ConnectionError(item)


class Awkward(Exception):
    """Can be pickled, but not unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def awkward() -> None:
    raise Awkward(1, 2)


def leaves() -> None:
    sys.exit(3)


def dies() -> None:
    os._exit(3)


async def later(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


square_all = Step(square, map="item")
negate_all = Step(negated, map="square")


def test_all_executors_give_the_same_values(executor: Any) -> None:
    steps = [twofold, plus_y, Step(halves, outputs=("lower", "upper")), skips, copes, later]
    run = Pipeline(steps, executor=executor).run(x=10)
    values = [run[name] for name in ("plus_y", "lower", "upper", "copes", "later")]
    assert values == [21, 10, 11, -1, 11]
    assert run.steps["skips"].reason == "not today"


def test_only_targets_are_kept_on_all_executors(executor: Any) -> None:
    pipeline = Pipeline(
        twofold, plus_y, Step(halves, outputs=("lower", "upper")), executor=executor
    )
    assert dict(pipeline.run("upper", x=1)) == {"upper": 2}


def test_local_steps_run_in_the_calling_process(executor: Any) -> None:
    pipeline = Pipeline(twofold, Step(get_process_id, local=True), executor=executor)
    assert pipeline.run("get_process_id", x=1)["get_process_id"] == os.getpid()


def test_a_failure_arrives_with_type_and_one_note_from_all_executors(executor: Any) -> None:
    with pytest.raises(LookupError, match="no 20") as caught:
        Pipeline(twofold, fails, plus_y, executor=executor).run(x=10)
    location = f"in step 'fails' at {locate(fails)}"
    (note,) = caught.value.__notes__
    assert note in (
        f"{location}, with twofold=20",
        f"{location}, with twofold=<value on the cluster>",
    )


def test_on_error_continue_works_on_all_executors(executor: Any) -> None:
    def after(fails: int) -> None: ...

    pipeline = Pipeline(twofold, fails, after, plus_y, executor=executor, on_error="continue")
    run = pipeline.run(x=1)
    assert run["plus_y"] == 3
    statuses = {name: state.status for name, state in run.steps.items()}
    assert statuses == {"twofold": "ran", "fails": "failed", "after": "skipped", "plus_y": "ran"}


def test_cached_steps_hit_on_all_executors(executor: Any, tmp_path: Path) -> None:
    steps = [
        Step(twofold, cache=True),
        plus_y,
        Step(halves, outputs=("lower", "upper"), cache=True),
    ]
    pipeline = Pipeline(steps, executor=executor, store=tmp_path / "s")
    assert pipeline.run("lower", x=10)["lower"] == 10
    run = pipeline.run("lower", x=10)
    assert run["lower"] == 10
    assert [run.steps[name].status for name in ("twofold", "halves")] == ["cached", "cached"]


def test_retries_work_on_all_executors(executor: Any, tmp_path: Path) -> None:
    pipeline = Pipeline(Step(fails_once, retries=1), executor=executor)
    run = pipeline.run(item=1, folder=tmp_path)
    assert (run["fails_once"], run.steps["fails_once"].attempts) == (1, 2)


def test_sys_exit_in_a_step_ends_the_run_on_all_executors(executor: Any) -> None:
    """Whatever on_error says, and without killing a worker."""
    pipeline = Pipeline(leaves, executor=executor, on_error="continue")
    with pytest.raises(SystemExit) as caught:
        pipeline.run()
    assert caught.value.code == 3


def test_an_async_step_may_end_the_run() -> None:
    @step
    async def leaves_later() -> None:
        await asyncio.sleep(0)
        sys.exit(4)

    with pytest.raises(SystemExit):
        Pipeline(leaves_later, twofold, on_error="continue").run(x=1)


@pytest.mark.slow
def test_an_exception_that_cannot_be_unpickled_arrives_as_its_text() -> None:
    """In a process of its own, since Dask teaches pickle to rebuild any exception."""
    code = """
        from concurrent.futures import ProcessPoolExecutor
        from dagkit import Pipeline, WorkerError
        from test_dagkit import awkward
        with ProcessPoolExecutor(1) as pool:
            try:
                Pipeline(awkward, executor=pool).run()
            except WorkerError as error:
                print(str(error).splitlines()[0])
            print(pool.submit(int, "7").result())
    """
    assert run_python(code) == "step 'awkward' raised Awkward: 1 and 2\n7\n"


@pytest.mark.slow
def test_an_exception_that_cannot_be_unpickled_arrives_from_dask_too(cluster: Any) -> None:
    with pytest.raises((Awkward, WorkerError), match="1 and 2"):
        Pipeline(awkward, executor=cluster).run()


def test_a_remote_exception_brings_its_traceback(processes: ProcessPoolExecutor) -> None:
    with pytest.raises(LookupError) as caught:
        Pipeline(twofold, fails, executor=processes).run(x=1)
    assert "in fails" in str(caught.value.__cause__)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "loky"])
def test_a_killed_worker_is_an_error_that_names_the_step(kind: str) -> None:
    if kind == "processes":
        pool: Any = ProcessPoolExecutor(1)
    else:
        import loky

        pool = loky.ProcessPoolExecutor(1)
    with pool, pytest.raises(WorkerError) as caught:
        Pipeline(dies, executor=pool).run()
    first_lines = f"a worker process died while it ran 'dies'\n  dies() at {locate(dies)}\n"
    assert str(caught.value).startswith(first_lines)
    assert caught.value.step == "dies"


def give_lock() -> Any:
    return threading.Lock()


@pytest.mark.parametrize(
    ("one", "inputs", "error"),
    [
        (lambda: 1, {}, "PicklingError: Can't pickle <function <lambda>"),
        (square, {"item": threading.Lock()}, "TypeError: cannot pickle '_thread.lock' object"),
        (give_lock, {}, "TypeError: cannot pickle '_thread.lock' object"),
    ],
    ids=["function", "argument", "result"],
)
def test_what_cannot_be_sent_to_a_process_is_an_error_that_says_what_to_do(
    processes: ProcessPoolExecutor, one: Any, inputs: dict[str, Any], error: str
) -> None:
    with pytest.raises(WorkerError) as caught:
        Pipeline(Step(one, name="one"), executor=processes).run(**inputs)
    message = str(caught.value)
    problem = "step 'one' could not be sent to the executor, or its result back: "
    assert message.startswith(problem + error)
    assert message.endswith(
        "define functions at the level of a module, or use loky or Dask, which send code too; "
        "pass and return what can be pickled; or keep the step here: local=True"
    )


def test_an_executor_that_was_shut_down_is_an_error_that_names_the_step() -> None:
    with ThreadPoolExecutor(1) as pool:
        pass
    with pytest.raises(
        WorkerError, match="step 'twofold' did not run, because the executor was shut"
    ):
        Pipeline(twofold, executor=pool).run(x=1)


@pytest.mark.slow
def test_loky_runs_lambdas(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import loky

    monkeypatch.setenv("HOME", str(shared_home))  # its workers are used by other tests, too
    pool = loky.get_reusable_executor(2)
    assert Pipeline(Step(lambda x: x + 1, name="more"), executor=pool).run(x=1)["more"] == 2


def test_a_pipeline_inside_a_step_on_the_same_pool_runs_in_the_thread_of_the_step() -> None:
    """Otherwise it would wait for workers that all wait for it."""
    with ThreadPoolExecutor(1) as pool:

        def outer(x: int) -> tuple[int, bool]:
            @step
            def thread_id() -> int:
                return threading.get_ident()

            run = Pipeline(twofold, thread_id, executor=pool).run(x=x)
            return run["twofold"], run["thread_id"] == threading.get_ident()

        assert Pipeline(outer, executor=pool).run(x=2)["outer"] == (4, True)


def big(n: int) -> Any:
    return np.ones(n)


def bigger(big: Any) -> Any:
    return big + 1


def small(bigger: Any) -> float:
    return float(bigger.sum())


@pytest.mark.slow
def test_values_stay_on_the_cluster(cluster: Any) -> None:
    """Shown by the bytes that reach this process: 8 MB are made and passed on, none arrives."""
    gathered: list[Any] = []
    real = cluster.__class__._gather

    async def gather(self: Any, futures: Any, *args: Any, **kwargs: Any) -> Any:
        result = await real(self, futures, *args, **kwargs)
        gathered.extend(result if isinstance(result, list) else [result])
        return result

    cluster.__class__._gather = gather
    try:
        run = Pipeline(big, bigger, small, executor=cluster).run("small", n=1_000_000)
        assert run["small"] == 2_000_000.0
    finally:
        cluster.__class__._gather = real
    assert sum(len(pickle.dumps(value)) for value in gathered) < 10_000


# Coroutines


def test_async_steps_overlap_and_at_most_100_are_in_flight() -> None:
    counts = [0, 0]  # now, and at most

    @step(map="item")
    async def nap(item: int) -> int:
        counts[0] += 1
        counts[1] = max(counts)
        await asyncio.sleep(0.02)
        counts[0] -= 1
        return item

    assert Pipeline(nap).run(item=range(250))["nap"] == list(range(250))
    assert counts == [0, 100]


def test_async_steps_run_where_an_event_loop_already_runs() -> None:
    async def main() -> int:
        deferred = Step(lambda x: later(x), name="deferred")  # does not look like an async step
        run = Pipeline(later, deferred).run(x=1)
        value: int = run["later"] + run["deferred"]
        return value

    assert asyncio.run(main()) == 4


########################################################################################
### Maps
########################################################################################


def test_a_map_calls_once_per_element_in_order(executor: Any) -> None:
    assert Pipeline(square_all, executor=executor).run(item=[3, 1, 2])["square"] == [9, 1, 4]


def test_a_map_after_a_map_and_a_plain_step(executor: Any) -> None:
    pipeline = Pipeline(square_all, negate_all, summed, executor=executor)
    assert pipeline.run("summed", item=range(30))["summed"] == -sum(i * i for i in range(30))


def test_an_empty_map_gives_an_empty_list(executor: Any) -> None:
    run = Pipeline(square_all, negate_all, summed, executor=executor).run(item=[])
    assert (run["square"], run["negated"], run["summed"]) == ([], [], 0)
    pipeline = Pipeline(Step(square, map="item", cache=True), executor=executor)
    assert pipeline.plan(item=[])["square"].status == "fresh"
    assert pipeline.run(item=[]).steps["square"].status == "cached"


def test_several_arguments_are_mapped_side_by_side() -> None:
    def pair(a: int, b: str, c: int) -> str:
        return f"{a}{b}{c}"

    pipeline = Pipeline(Step(pair, map=("a", "b")))
    assert pipeline.run(a=[1, 2], b=["x", "y"], c=0)["pair"] == ["1x0", "2y0"]
    with pytest.raises(ResultError) as caught:
        pipeline.run(a=[1, 2], b=["x"], c=0)
    assert str(caught.value) == (
        "step 'pair' maps over lists of different lengths: a 2, b 1\n"
        f"  pair(a, b, c) at {locate(pair)}\n  expected equal lengths"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("abc", "'abc'"),
        ({"a": 1}, "{'a': 1}"),
        (5, "5"),
        (pd.DataFrame({"a": [1]}), "DataFrame(1 x 1)"),  # iteration would give column names
    ],
)
def test_a_map_over_what_is_not_a_list_is_an_error(value: Any, text: str) -> None:
    with pytest.raises(ResultError) as caught:
        Pipeline(square_all).run(item=value)
    assert str(caught.value) == (
        f"step 'square' maps over 'item', which is {text}\n"
        f"  square(item) at {locate(square)}\n  expected a list, or another iterable of elements"
    )


def test_a_map_that_cannot_begin_took_no_time() -> None:
    size = Step(len, name="size", args={"obj": "word"}, map="obj")
    run = Pipeline(size, on_error="continue").run(word="abc")
    assert (run.steps["size"].status, run.steps["size"].seconds) == ("failed", 0.0)


def test_a_nested_list_is_mapped_one_level_deep() -> None:
    pipeline = Pipeline(Step(lambda row: sum(row), name="sums", map="row"))
    assert pipeline.run(row=[[1, 2], [3]])["sums"] == [3, 3]


def test_outputs_of_a_mapped_step_are_lists() -> None:
    pipeline = Pipeline(Step(lambda x: (x, -x), name="both", map="x", outputs=("up", "down")))
    run = pipeline.run(x=[1, 2])
    assert (run["up"], run["down"]) == ([1, 2], [-1, -2])


def test_a_map_over_a_map_may_need_all_of_it_too(executor: Any) -> None:
    pair = Step(both_signs, map="x", outputs=("up", "down"))
    for one, other in (("up", "both_signs"), ("both_signs", "up")):
        after = Step(put_together, args={"one": one, "other": other}, map="one")
        run = Pipeline(pair, after, executor=executor).run(x=[1, 2])
        assert run["put_together"] == [(x, run[other]) for x in run[one]]


def test_a_map_over_two_values_of_a_map(executor: Any) -> None:
    names = {"one": "both_signs", "other": "up"}
    pair = Step(both_signs, map="x", outputs=("up", "down"))
    after = Step(put_together, args=names, map=("one", "other"))
    run = Pipeline(pair, after, executor=executor).run("put_together", x=[1, 2, 3])
    assert run["put_together"] == [((x, -x), x) for x in (1, 2, 3)]


def test_failures_of_a_map_name_index_and_element(executor: Any) -> None:
    with pytest.raises(ValueError, match="not three") as caught:
        Pipeline(Step(picky, map="item"), executor=executor).run(item=[1, 2, 3, 4])
    assert caught.value.__notes__ == [f"in step 'picky', element 2 at {locate(picky)}, with item=3"]


def test_a_failed_map_skips_what_follows_it_element_by_element(executor: Any) -> None:
    steps = [Step(picky, map="item"), Step(square, args={"item": "picky"}, map="item")]
    run = Pipeline(steps, executor=executor, on_error="continue").run(item=[1, 2, 3, 4])
    statuses = {name: state.status for name, state in run.steps.items()}
    assert statuses == {"picky": "failed", "square": "skipped"}
    assert run.steps["square"].reason == "needs picky"


def test_a_map_with_a_default_copes_with_a_map_that_fails() -> None:
    def negate(item: int = 7) -> int:
        return -item

    mapped = Step(lambda picky=(1, 2): -picky, name="mapped", map="picky")
    run = Pipeline(Step(picky, map="item"), mapped, on_error="continue").run(item=[1, 2, 3])
    assert run["mapped"] == [-1, -2]


def test_every_element_has_its_own_retries_and_entry(executor: Any, tmp_path: Path) -> None:
    (tmp_path / "tries").mkdir()
    pipeline = Pipeline(
        Step(fails_once, map="item", retries=1, cache=True, ignore="folder"),
        executor=executor,
        store=tmp_path / "store",
    )
    run = pipeline.run(item=[1, 2, 3], folder=tmp_path / "tries")
    assert run["fails_once"] == [1, 2, 3]
    run = pipeline.run(item=[3, 2], folder=tmp_path / "tries")
    assert (run["fails_once"], run.steps["fails_once"].status) == ([3, 2], "cached")


def test_one_new_element_is_one_call(tmp_path: Path) -> None:
    calls = str(tmp_path / "calls")

    def count(item: int) -> int:
        with open(calls, "a") as file:
            file.write(f"{item} ")
        return -item

    pipeline = Pipeline(Step(count, map="item", cache=True))
    assert pipeline.run(item=[1, 2, 3])["count"] == [-1, -2, -3]
    assert list_plan(pipeline.plan(item=[1, 2, 3])) == ["count fresh: "]
    reason = "1 of 4 elements, never ran"
    assert list_plan(pipeline.plan(item=[1, 2, 3, 4])) == [f"count new: {reason}"]
    run = pipeline.run(item=[3, 2, 1, 4])
    assert run["count"] == [-3, -2, -1, -4]
    assert (run.steps["count"].reason, run.steps["count"].elements) == (reason, 4)
    assert Path(calls).read_text() == "1 2 3 4 "
    assert pipeline.run(item=[2]).steps["count"].status == "cached"


def test_elements_have_one_key_whichever_argument_is_there_first() -> None:
    def make_pipeline() -> Pipeline:
        pair = Step(put_together, args={"one": "square", "other": "negated"}, map="one", cache=True)
        return Pipeline(square_all, negate_all, pair)

    with ThreadPoolExecutor(2) as pool:
        make_pipeline().run(item=[1, 2])
        run = make_pipeline().replace(executor=pool).run("put_together", square=[1, 4])
    assert run.steps["put_together"].status == "cached"


def test_a_map_has_the_strongest_status_of_its_elements() -> None:
    def make_pipeline(by: int) -> Pipeline:
        def times(item: int, size: int) -> int:
            return item * by * size

        size = Step(lambda n: n, name="size", cache=True)
        return Pipeline(size, Step(times, map="item", cache=True))

    make_pipeline(2).run(item=[1, 2, 3], n=1)
    assert list_plan(make_pipeline(2).plan(item=[1, 2, 3], n=1))[1] == "times fresh: "
    assert list_plan(make_pipeline(2).plan(item=[1, 2, 4], n=1))[1] == (
        "times new: 1 of 3 elements, never ran"
    )
    assert list_plan(make_pipeline(2).plan(item=[1, 2, 4], n=2))[1] == "times maybe: after size"
    assert list_plan(make_pipeline(3).plan(item=[1, 2, 4], n=1))[1] == (
        "times stale: code changed: closure by"
    )


def test_a_plan_follows_elements_through_a_chain_of_maps() -> None:
    pipeline = Pipeline(
        Step(square, map="item", cache=True),
        Step(negated, map="square", cache=True),
        Step(summed, cache=True),
    )
    pipeline.run(item=[1, 2, 3])
    assert list_plan(pipeline.plan(item=[1, 2, 4])) == [
        "square new: 1 of 3 elements, never ran",
        "negated maybe: 1 of 3 elements, after square",
        "summed maybe: after square",
    ]


def test_an_element_that_raises_skip_is_left_out_of_the_list(executor: Any) -> None:
    """Between maps the gap stays, so that the pairs stay pairs."""
    odd = Step(only_odd, map="item")
    squares_of_odd = Step(square, args={"item": "only_odd"}, map="item")
    pairs = Step(put_together, args={"one": "item", "other": "square"}, map=("one", "other"))
    total = Step(sum, name="total", args={"iterable": "square"})
    run = Pipeline(odd, squares_of_odd, pairs, total, executor=executor).run(item=[1, 2, 3, 4, 5])
    assert run["only_odd"] == [1, 3, 5]
    assert run["square"] == [1, 9, 25]
    assert run["put_together"] == [(1, 1), (3, 9), (5, 25)]
    assert run["total"] == 35
    state = run.steps["only_odd"]
    assert (state.status, state.elements) == ("ran", 5)
    assert state.reason == "2 of 5 elements skipped: 2 is even"
    assert run.steps["square"].reason == "2 of 5 elements skipped"


def test_if_all_elements_are_skipped_the_list_is_empty(executor: Any) -> None:
    total = Step(sum, name="total", args={"iterable": "only_odd"})
    run = Pipeline(Step(only_odd, map="item"), total, executor=executor).run(item=[2, 4])
    assert (run["only_odd"], run["total"]) == ([], 0)
    assert run.steps["only_odd"].status == "ran"


def test_a_skipped_element_is_not_cached() -> None:
    pipeline = Pipeline(Step(only_odd, map="item", cache=True))
    for _ in range(2):
        run = pipeline.run(item=[1, 2, 3])
        assert run["only_odd"] == [1, 3]
    assert run.steps["only_odd"].status == "cached"
    assert run.steps["only_odd"].reason == "1 of 3 elements skipped: 2 is even"
    assert count_entries(pipeline) == 2
    reason = "1 of 3 elements, never ran"
    assert list_plan(pipeline.plan(item=[1, 2, 3])) == [f"only_odd new: {reason}"]


def test_a_map_after_a_map_has_no_barrier() -> None:
    """The second element of the first step waits for the first element of the second step."""
    passed = threading.Event()

    def first(item: int) -> int:
        if item == 1:
            assert passed.wait(30)
        return item

    def second(first: int) -> int:
        passed.set()
        return first

    with ThreadPoolExecutor(2) as pool:
        pipeline = Pipeline(Step(first, map="item"), Step(second, map="first"), executor=pool)
        assert pipeline.run("second", item=[0, 1])["second"] == [0, 1]


# How many elements are alive, and were at most. A logger in code counts by its type alone.
ELEMENT_COUNTS: Any = logging.getLogger("elements")


class Element:
    """Counts its instances."""

    def __init__(self, number: int) -> None:
        self.number = number
        ELEMENT_COUNTS.alive += 1
        ELEMENT_COUNTS.most = max(ELEMENT_COUNTS.most, ELEMENT_COUNTS.alive)

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        ELEMENT_COUNTS.alive -= 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["plain", "cached", "async"])
def test_elements_of_a_chain_of_maps_go_depth_first(workers: int, kind: str) -> None:
    """A list that is not needed whole is never whole in memory."""
    ELEMENT_COUNTS.alive = ELEMENT_COUNTS.most = 0

    def load(item: int) -> Element:
        return Element(item)

    async def load_later(item: int) -> Element:
        return Element(item)

    def shrink(load: Element) -> int:
        return load.number

    first = Step(load, map="item", cache=kind == "cached")
    if kind == "async":
        first = Step(load_later, name="load", map="item")
    steps = [first, Step(shrink, map="load"), Step(sum, args={"iterable": "shrink"})]
    with ThreadPoolExecutor(workers or 1) as pool:
        pipeline = Pipeline(steps, executor=pool if workers else None)
        assert pipeline.run("sum", item=range(300))["sum"] == sum(range(300))
    assert ELEMENT_COUNTS.most <= {"plain": 20, "cached": 20, "async": 120}[kind]


def test_a_long_map_keeps_few_elements_in_flight() -> None:
    most = [0]

    class Counting(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            most[0] = max(most[0], self._work_queue.qsize())
            return super().submit(*args, **kwargs)

    with Counting(2) as pool:
        run = Pipeline(square_all, executor=pool).run(item=range(3000))
    assert run["square"][-1] == 2999**2
    assert most[0] <= 4 * 2 + 4


########################################################################################
### Loop
########################################################################################

# Order


def test_ready_steps_start_with_the_longest_remaining_path() -> None:
    started: list[str] = []

    def make_step(name: str) -> Step:
        return Step(lambda **_: started.append(name), name=name, args={"x": "x"})

    chain = [Step(lambda **_: 0, name=f"a{i}", args={"p": f"a{i - 1}"}) for i in range(2, 5)]
    with ThreadPoolExecutor(1) as pool:
        Pipeline(make_step("b"), make_step("c"), make_step("a1"), chain, executor=pool).run(x=0)
    assert started == ["a1", "b", "c"]


def test_a_step_runs_after_the_steps_that_it_names(executor: Any, tmp_path: Path) -> None:
    load = Step(functools.partial(write_line, "load"), name="load", args={"path": "log"})
    train = Step(functools.partial(write_line, "train"), name="train", args={"path": "log"})
    notify = Step(
        functools.partial(write_line, "notify"),
        name="notify",
        args={"path": "log"},
        after=("train", "load"),
    )
    pipeline = Pipeline(notify, load, train, executor=executor)
    pipeline.run("notify", log=str(tmp_path / "log"))
    lines = (tmp_path / "log").read_text().split()
    assert sorted(lines) == ["load", "notify", "train"]
    assert lines[-1] == "notify"


def write_line(line: str, path: str) -> None:
    with open(path, "a") as file:
        file.write(line + "\n")


def test_a_step_runs_after_a_whole_map() -> None:
    log: list[Any] = []
    upload = Step(log.append, name="upload", args={"object": "item"}, map="object")
    notify = Step(lambda: log.append("all"), name="notify", after="upload")
    each = Step(lambda item: log.append("one"), name="each", map="item", after="upload")
    Pipeline(notify, upload, each).run(item=[1, 2, 3])
    assert log[:3] == [1, 2, 3]
    assert sorted(log[3:]) == ["all", "one", "one", "one"]


def test_a_step_after_one_that_failed_or_was_skipped_is_skipped() -> None:
    """Whatever its defaults; a step that is given counts as done."""
    notify = Step(lambda fails=0: "sent", name="notify", after="fails")
    tell = Step(lambda skips=0: "told", name="tell", after="skips")
    pipeline = Pipeline(twofold, fails, skips, notify, tell, on_error="continue")
    run = pipeline.run(x=1)
    assert (run.steps["notify"].status, run.steps["notify"].reason) == ("skipped", "needs fails")
    assert run.steps["tell"].reason == "needs skips"
    assert pipeline.run("notify", fails=3)["notify"] == "sent"


def test_after_does_not_count_in_the_key() -> None:
    def make_pipeline(value: int) -> Pipeline:
        first = Step(lambda: value, name="first")
        return Pipeline(first, Step(lambda x: x, name="second", after="first", cache=True))

    assert make_pipeline(1).run(x=1).steps["second"].status == "ran"
    assert make_pipeline(2).run(x=1).steps["second"].status == "cached"
    assert list_plan(make_pipeline(3).plan(x=1)) == ["first uncached: ", "second fresh: "]


def test_a_value_that_nothing_needs_any_more_is_dropped_at_once() -> None:
    alive = []

    class Big:
        pass

    def make(x: int) -> Big:
        value = Big()
        alive.append(weakref.ref(value))
        return value

    def use(make: Big) -> int:
        return 1

    def check(use: int) -> bool:
        gc.collect()
        return alive[-1]() is None

    with ThreadPoolExecutor(1) as pool:
        for executor in (None, pool):
            pipeline = Pipeline(Step(make, retries=1), use, check, executor=executor)
            assert pipeline.run("check", x=1)["check"]


# Failures


def test_the_first_failure_lets_running_steps_end_and_keeps_their_results(tmp_path: Path) -> None:
    has_failed = threading.Event()

    def breaks() -> None:
        has_failed.set()
        raise ValueError("first")

    def slow() -> int:
        assert has_failed.wait(30)
        return 5

    slow_step = Step(slow, cache=True)
    with ThreadPoolExecutor(2) as pool:
        pipeline = Pipeline(slow_step, breaks, executor=pool, store=tmp_path / "s")
        with pytest.raises(ValueError, match="first"):
            pipeline.run()
    run = Pipeline(slow_step, store=tmp_path / "s").run()
    assert run.steps["slow"].status in ("cached", "ran")  # it may not have begun


class BrokenText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class BrokenNote(Exception):
    def add_note(self, note: str) -> None:
        raise RuntimeError("no note")


class BrokenSkip(Skip):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("kind", [BrokenText, BrokenNote, BrokenSkip])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_broken_exception_does_not_end_a_run_that_continues(
    kind: type[Exception], is_mapped: bool
) -> None:
    def breaks(item: Any) -> None:
        raise kind

    pipeline = Pipeline(
        Step(breaks, map="item" if is_mapped else ()), twofold, on_error="continue", progress=False
    )
    run = pipeline.run(item=[1], x=1)
    assert run["twofold"] == 2
    assert run.steps["breaks"].status in ("failed", "skipped", "ran")


def test_the_delay_between_tries_may_grow_beyond_all_bounds() -> None:
    tries = itertools.count()

    def flaky() -> int:
        if next(tries) < 4:
            raise OSError
        return 1

    options: dict[str, Any] = {"retries": 4, "retry_delay": 1e-300, "retry_backoff": 1e100}
    pipeline = Pipeline(Step(flaky, **options), on_error="continue")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dagkit, "_LONGEST_DELAY", 0.01, raising=False)
        run = pipeline.run()
    assert (run["flaky"], run.steps["flaky"].attempts) == (1, 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "threads", "processes"])
def test_ctrl_c_ends_a_run_cleanly(kind: str, tmp_path: Path) -> None:
    """No new work, no zombie, and a store that still works."""
    pools = {"threads": "ThreadPoolExecutor", "processes": "ProcessPoolExecutor"}
    make_pool = f"{pools[kind]}(2)" if kind in pools else "contextlib.nullcontext()"
    (tmp_path / "wide.py").write_text(
        "import contextlib, os, time\n"
        "from concurrent.futures import *\n"
        "from dagkit import Pipeline, Step\n"
        "def slow(item):\n"
        "    os.write(1, b'ready\\n')\n"
        "    time.sleep(0.5)\n"
        "    return item\n"
        "if __name__ == '__main__':\n"
        f"    with {make_pool} as pool:\n"
        "        slow_step = Step(slow, map='item', cache=True)\n"
        "        try:\n"
        "            Pipeline(slow_step, executor=pool, on_error='continue').run(item=range(999))\n"
        "        except KeyboardInterrupt:\n"
        "            print('stopped', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "wide.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=30)[0]
        assert time.monotonic() - start < 5
        assert "stopped" in out
        assert out.count("ready") < 40


# Beginning again


def damage_values(pipeline: Pipeline) -> None:
    """Flip a bit in the pickle of all values that lie in files of their own."""
    for folder, _, names in os.walk(Path(pipeline.store.path, "values")):
        for name in names:
            path = Path(folder, name)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)


def make_table(n: int) -> list[int]:
    return list(range(n, n + 9000))


def test_a_run_begins_again_when_a_stored_value_is_damaged(executor: Any, tmp_path: Path) -> None:
    """The fingerprint of the value has been used by then."""
    if isinstance(executor, ProcessPoolExecutor):  # its workers have pytest's filter of warnings
        executor = ProcessPoolExecutor(2, initializer=warnings.simplefilter, initargs=("ignore",))
    table = Step(make_table, name="table", cache=True)
    size = Step(len, args={"obj": "table"}, cache=True)
    total = Step(sum, args={"iterable": "table"}, cache=True)
    pipeline = Pipeline(table, size, total, executor=executor, store=tmp_path / "s")
    pipeline.run("len", n=1)
    damage_values(pipeline)
    run, texts = catch_warnings(lambda: pipeline.run("len", "sum", n=1))
    assert (run["len"], run["sum"]) == (9000, sum(range(1, 9001)))
    assert get_statuses(run) == "table ran, len cached, sum ran"
    assert len(texts) <= 1  # a worker process warns in its own process
    run, texts = catch_warnings(lambda: pipeline.run("table", "sum", n=1))
    assert (get_statuses(run), texts) == ("table cached, sum cached", [])


def test_a_lazily_loaded_target_that_is_gone_is_computed_again() -> None:
    log: list[str] = []

    def table(n: int) -> list[int]:
        log.append("table")
        return make_table(n)

    other = Step(lambda: log.append("other"), name="other")
    pipeline = Pipeline(Step(table, cache=True, ignore=()), other)
    pipeline.run(n=1)
    run = pipeline.run("table", "other", n=1)
    shutil.rmtree(pipeline.store.path)
    log.clear()
    assert run["table"] == make_table(1)
    assert run["table"] is run["table"]
    assert log == ["table"]  # and no other target


def test_a_damaged_element_of_a_map_is_computed_again() -> None:
    table = Step(make_table, name="table", args={"n": "n"}, map="n", cache=True)
    pipeline = Pipeline(table)
    pipeline.run(n=[1, 2, 3])
    run = pipeline.run(n=[1, 2, 3])
    damage_values(pipeline)
    values, texts = catch_warnings(lambda: run["table"])
    assert values == [make_table(1), make_table(2), make_table(3)]
    assert len(texts) >= 1


def test_a_run_cannot_begin_again_with_an_input_that_a_step_has_changed() -> None:
    """The next run does not come to that."""

    def total(rows: list[int]) -> list[int]:
        return rows * 9000

    def grow(rows: list[int]) -> None:
        rows.append(100)

    def report(total: list[int], grow: None) -> int:
        return sum(total) // 9000

    pipeline = Pipeline(Step(total, cache=True), grow, Step(report, cache=True))
    assert pipeline.run("report", rows=[1, 2])["report"] == 3
    pipeline.store.clear("report")
    damage_values(pipeline)
    with pytest.raises(ResultError, match="a step changed the input 'rows' in place") as caught:
        catch_warnings(lambda: pipeline.run("report", rows=[1, 2]))
    assert caught.value.name == "rows"
    assert pipeline.run("report", rows=[1, 2])["report"] == 3


class Odd:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> Any:
        return int, ("x",)


def test_a_value_that_cannot_be_loaded_again_is_used_from_memory() -> None:
    odd = Step(lambda: [Odd()], name="odd", cache=True)
    kind = Step(lambda odd: type(odd[0]).__name__, name="kind", cache=True)
    run, _ = catch_warnings(lambda: Pipeline(odd, kind).run())
    assert (run["kind"], type(run["odd"][0])) == ("Odd", Odd)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_step_that_removes_the_store_does_not_loop_for_ever(is_cached: bool) -> None:
    @step(cache=is_cached)
    def vandal(squares: list[int]) -> int:
        shutil.rmtree(os.environ["DAGKIT_STORE"])
        return len(squares)

    @step
    def noise() -> float:
        return random.random()

    @step(cache=True)
    def noisy(noise: float) -> float:
        return noise

    @step(cache=True)
    def result(noisy: float, squares: list[int], vandal: int) -> int:
        return max(squares)

    pipeline = Pipeline(squares, vandal, noise, noisy, result)
    run, _ = catch_warnings(lambda: pipeline.run("vandal", "result", "squares", n=4))
    assert (run["vandal"], run["result"], run["squares"]) == (4, 9, [0, 1, 4, 9])


# Sensors


def test_a_sensor_checks_at_once_and_then_every_interval() -> None:
    times: list[float] = []

    @sensor(poke_interval=0.05)
    def arrived() -> str | None:
        times.append(time.monotonic())
        return "file" if len(times) == 3 else None

    start = time.monotonic()
    run = Pipeline(arrived, Step(lambda arrived: arrived * 2, name="use")).run()
    assert run["use"] == "filefile"
    assert times[0] - start < 0.05
    assert all(after - before >= 0.05 for before, after in itertools.pairwise(times))


def test_a_sensor_gives_up_after_a_failed_check_past_its_timeout() -> None:
    checks: list[int] = []

    @sensor(poke_interval=0.04, timeout=0.06, retries=5)
    def arrived() -> None:
        checks.append(1)

    with pytest.raises(SensorTimeoutError) as caught:
        Pipeline(arrived).run()
    assert 2 <= len(checks) <= 3
    assert str(caught.value) == (
        f"step 'arrived' saw nothing within 0.06 s, in {len(checks)} checks\n"
        f"  arrived() at {locate(arrived)}\n"
        "  increase timeout=, or check why the condition is never met"
    )


def test_soft_fail_turns_the_timeout_into_a_skip() -> None:
    @sensor(poke_interval=1, timeout=0, soft_fail=True)
    def arrived() -> bool:
        return False

    def use(arrived: bool = False) -> str:
        return f"{arrived}"

    run = Pipeline(arrived, use).run()
    assert run.steps["arrived"].status == "skipped"
    assert run["use"] == "False"


def test_an_exception_fails_a_sensor() -> None:
    @sensor(poke_interval=0)
    def arrived() -> bool:
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        Pipeline(arrived).run()


@pytest.mark.parametrize("value", [pd.DataFrame({"a": [1]}), np.array([0, 1])])
def test_a_sensor_may_return_what_has_no_truth_value(value: Any) -> None:
    @sensor(poke_interval=0)
    def arrived() -> Any:
        return value

    assert Pipeline(arrived).run()["arrived"] is value


def test_a_sensor_holds_no_worker_between_checks() -> None:
    """On one worker, the sensor waits for what runs after its first check."""
    has_run = threading.Event()

    def other() -> bool:
        has_run.set()
        return True

    def arrived() -> bool:
        return has_run.is_set()

    with ThreadPoolExecutor(1) as pool:
        pipeline = Pipeline(sensor(poke_interval=0.01)(arrived), other, executor=pool)
        assert pipeline.run()["arrived"] is True


def test_a_sensor_that_another_scheduler_keeps_is_stored_once_it_has_seen_something(
    tmp_path: Path,
) -> None:
    """A bridge makes such a step by ``dataclasses.replace``; a check in vain is no value."""

    @sensor(poke_interval=0.01)
    def arrived(folder: str) -> list[str]:
        names = os.listdir(folder)
        Path(folder, "parcel").touch()
        return names

    cached_sensor = dataclasses.replace(Pipeline(arrived).steps["arrived"], cache=True)
    (tmp_path / "mail").mkdir()
    runs = [Pipeline(cached_sensor).run(folder=str(tmp_path / "mail")) for _ in range(2)]
    assert [run["arrived"] for run in runs] == [["parcel"], ["parcel"]]
    assert [run.steps["arrived"].status for run in runs] == ["ran", "cached"]


# Random pipelines


def act(fate: str, name: str, folder: str, **values: int) -> int:
    """Do what a step of a random pipeline is fated to; some do it at the second try only."""
    if fate == "failed":
        raise ValueError(name)
    if fate == "skipped":
        raise Skip(name)
    if fate == "retried" and not Path(folder, name).exists():
        Path(folder, name).touch()
        raise ConnectionError(name)
    return 1 + sum(values.values()) % 1000


@hypothesis.given(seed=st.integers(0, 2**32))
@hypothesis.settings(
    deadline=None,
    max_examples=3,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@pytest.mark.slow
def test_random_dags_with_failures_skips_and_retries_agree_with_the_sequential_run(
    executor: Any, seed: int
) -> None:
    """200 steps with up to three arguments each; some run after another step."""
    draw = random.Random(seed)
    fates = ["ran"] * 30 + ["retried"] * 3 + ["failed", "skipped"]
    dag = []
    for i in range(200):
        earlier = [f"s{j}" for j in range(max(0, i - 30), i)]
        needs = draw.sample(earlier, min(i, draw.randint(0, 3)))
        after = draw.sample(earlier, min(i, draw.choice([0, 0, 0, 1])))
        dag.append((f"s{i}", needs, tuple(after), draw.choice(fates)))

    def find_outcome(executor: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            steps = [
                Step(
                    functools.partial(act, fate, name, folder),
                    name=name,
                    args={"none": "nothing"} | {need: need for need in needs},
                    after=after,
                    retries=1,
                )
                for name, needs, after, fate in dag
            ]
            run = Pipeline(steps, executor=executor, on_error="continue").run(nothing=0)
            states = sorted(run.steps.values(), key=lambda state: state.name)
            return dict(run), [(s.name, s.status, s.reason, s.attempts) for s in states]

    assert find_outcome(executor) == find_outcome(None)


########################################################################################
### Text
########################################################################################


def make_ml_pipeline() -> Pipeline:
    """Make the pipeline of an ML project, with outputs, a map, and a step that fails."""
    steps: list[Any] = [
        Step(lambda path: [1, 2, 3, 4], name="load"),
        Step(lambda load, drop=True: load, name="clean", cache=True),
        Step(lambda clean, seed=0: (clean[:2], clean[2:]), name="split", outputs=("train", "test")),
        Step(lambda train, alpha=0.1, seed=0: sum(train), name="model", cache=True),
        Step(lambda fold: fold, name="folds", map="fold"),
        Step(lambda model, test: 1 / 0, name="predict"),
        Step(lambda predict, folds: predict, name="evaluate"),
    ]
    return Pipeline(steps, on_error="continue")


ML_INPUTS: dict[str, Any] = {"path": "x.csv", "fold": [1, 2, 3]}


def hide_times(text: str) -> str:
    return re.sub(r"\d+(\.\d)? m?s\b", "T", text)


def test_a_pipeline_is_a_table_of_its_steps_and_their_needs() -> None:
    pipeline = make_ml_pipeline()
    assert str(pipeline) == repr(pipeline.show()) == pipeline.show().text == (
        "pipeline · 7 steps, 5 inputs\n"
        "  load                  path\n"
        "  clean                 load, drop\n"
        "  split → train, test   clean, seed\n"
        "  model                 train, alpha, seed\n"
        "  folds                 each fold\n"
        "  predict               model, test\n"
        "  evaluate              predict, folds"
    )  # fmt: skip


def test_a_table_says_after_which_steps_a_step_runs_and_counts_many_needs() -> None:
    names = [f"part{index}" for index in range(10)]
    notify = Step(lambda: None, name="notify", after=("total", "part0"))
    pipeline = Pipeline(*map(make_function, names), make_function("total", *names), notify)
    assert str(pipeline).splitlines()[-2:] == [
        "  total    part0, part1, part2, part3, part4, part5, part6, part7, … and 2 more",
        "  notify   after total, after part0",
    ]


def test_a_plan_is_a_table_of_statuses_and_reasons() -> None:
    pipeline = make_ml_pipeline()
    pipeline.run("model", **ML_INPUTS)
    pipeline.run("clean", path="y.csv", drop=False)
    plan = pipeline.plan("model", **ML_INPUTS, alpha=0.3)
    table = [re.split(" {3,}", line.strip()) for line in str(plan).splitlines()]
    assert table == [
        ["pipeline · 4 steps, 4 inputs · 2 stale, 2 uncached"],
        ["load", "path", "▹ uncached"],
        ["clean", "load, drop", "↻ stale", "input drop False → True"],
        ["split → train, test", "clean, seed", "▹ uncached"],
        ["model", "train, alpha, seed", "↻ stale", "input alpha 0.1 → 0.3"],
    ]


def test_a_run_is_a_table_of_outcomes_with_the_values_of_its_targets_below() -> None:
    pipeline = make_ml_pipeline()
    pipeline.run("model", **ML_INPUTS)
    run = pipeline.run("evaluate", "test", "split", **ML_INPUTS)
    place = locate(pipeline.steps["predict"].function)
    assert hide_times(str(run)) == (
        "pipeline · 7 steps, 5 inputs · 3 ran, 2 cached, 1 failed, 1 skipped · T · saved T\n"
        "  load                  path                 ■ ran       T\n"
        "  clean                 load, drop           ✓ cached    saved T\n"
        "  split → train, test   clean, seed          ■ ran       T\n"
        "  model                 train, alpha, seed   ✓ cached    saved T\n"
        "  predict               model, test          ✗ failed    T   ZeroDivisionError: division "
        f"by zero   ({place})\n"
        "  folds                 each fold            ■ ran       T   3 elements\n"
        "  evaluate              predict, folds       ⊘ skipped   needs predict\n"
        "\n"
        "  test = [3, 4]\n"
        "  split = ([1, 2], [3, 4])"
    )  # fmt: skip


def test_without_targets_the_values_that_no_step_needs_are_displayed() -> None:
    steps: list[Any] = [lambda first: (first, "x" * 100), make_function("last", "low")]
    pipeline = Pipeline(Step(steps[0], name="ends", outputs=("low", "high")), steps[1])
    assert str(pipeline.run(first=1)).splitlines()[-2:] == [
        "  high = 'xxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxx'",
        "  last = None",
    ]
    many = Pipeline({f"step{index}": lambda: 1 for index in range(30)}).run()
    assert str(many).splitlines()[-2:] == ["  step19 = 1", "  … and 10 more"]


def test_a_large_stored_value_is_not_loaded_to_be_displayed() -> None:
    pipeline = Pipeline(Step(lambda n: [n] * 10_000, name="wide", cache=True))
    pipeline.run(n=1)
    run = pipeline.run(n=1)
    assert str(run).splitlines()[-1] == "  wide = <value in the store>"
    assert len(run["wide"]) == 10_000
    assert str(run).splitlines()[-1].startswith("  wide = [1, 1, 1,")


def make_state(status: str, **facts: Any) -> Any:
    return StepState("fit", status, **facts)


@pytest.mark.parametrize(
    ("state", "outcome", "brief"),
    [
        (make_state("fresh", saved=1.2), "saves 1.2 s", "saves 1.2 s"),
        (make_state("stale", reason="expired"), "expired", "expired"),
        (make_state("maybe", reason="after load"), "after load", "after load"),
        (make_state("new", reason="never ran"), "never ran", "never ran"),
        (make_state("uncached"), "", "uncached"),
        (make_state("running", reason="3/20"), "3/20", "3/20"),
        (make_state("ran", seconds=8.2, reason="never ran"), "8.2 s   first time", "8.2 s"),
        (make_state("ran", seconds=8, attempts=3), "8.0 s   in 3 tries", "8.0 s"),
        (make_state("ran", seconds=8, elements=1), "8.0 s   1 element", "8.0 s"),
        (make_state("cached", saved=3.1), "saved 3.1 s", "cached, saved 3.1 s"),
        (make_state("failed", error=ValueError("a\nb")), "0 ms   ValueError: a", "ValueError"),
        (make_state("failed", reason="interrupted"), "0 ms   interrupted", "interrupted"),
        (make_state("skipped", reason="needs load"), "needs load", "needs load"),
    ],
)
def test_an_outcome_is_described_in_a_row_and_in_a_box(
    state: Any, outcome: str, brief: str
) -> None:
    assert describe_outcome(state) == outcome
    assert describe_briefly(state) == brief


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self) -> bool:
        return True


def test_a_table_is_cut_to_the_terminal_in_its_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Pipeline(Step(lambda x: x, name="a_step", cache=True)).plan(x=threading.Lock())
    monkeypatch.setenv("COLUMNS", "36")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert str(plan).splitlines()[1] == "  a_step   x   * uncached   no fing~"


def test_columns_are_aligned_by_the_cells_that_letters_take() -> None:
    assert format_table([["ab", "x"], ["日本", "x"], ["e\u0301", "x"]]) == (
        "  ab     x\n  日本   x\n  e\u0301      x"
    )
    assert format_table([]) == format_table([[]]) == ""
    assert cut_end("日本日本", 6) == "日本…"
    assert cut_middle("load_customers_of_2024", 12) == "load_cu…2024"


########################################################################################
### Layout
########################################################################################

# The mean of the crossings of twenty pipelines of so many steps may not be higher.
MOST_CROSSINGS = {10: 1, 50: 24, 100: 56, 200: 155}

Size = tuple[float, float]
Edges = list[tuple[str, str]]


class Sketch(NamedTuple):
    """A graph to lay out."""

    sizes: dict[str, Size]
    edges: Edges


def rank(names: Any, edges: Edges) -> tuple[list[list[int]], dict[tuple[str, str], list[int]], int]:
    """Return the ranks and the trails of edges, as numbers of nodes, and the crossings."""
    rows, _, trails = rank_boxes(names, edges)
    update_positions(rows)
    crossings = count_crossings(rows)
    numbers = {edge: [node.number for node in trail] for edge, trail in trails.items()}
    return [[node.number for node in row] for row in rows], numbers, crossings


def arrange(sizes: dict[str, Size], edges: Edges, is_across: bool = False) -> Geometry:
    return arrange_boxes(*rank_boxes(sizes, edges), sizes, is_across)


def make_random_sketch(steps: int, seed: int) -> Sketch:
    """Return a pipeline of steps that take 1-3 values, mostly recent ones, some old.

    The first ten steps are almost a chain, as in short scripts. Calibrated so that graphviz's dot
    has about 0.1, 19, 43, 114 crossings on average at 10, 50, 100, 200 steps.
    """
    rng = random.Random(seed)
    sizes: dict[str, Size] = {}
    edges: Edges = []
    names: list[str] = []
    for index in range(steps):
        name = f"step_{index:03}"
        needs = set()
        if index == 0 or rng.random() < 0.15:
            needs.add(f"input_{index:03}")
            sizes[f"input_{index:03}"] = (60, 22)
        recent = names[-(8 if index >= 10 else 2) :]
        for _ in range(rng.choices((1, 2, 3), (5, 4, 2))[0]):
            if names:
                needs.add(rng.choice(names if rng.random() < 0.045 else recent))
        sizes[name] = (rng.randint(92, 200), 44)
        edges += [(need, name) for need in sorted(needs)]
        names.append(name)
    return Sketch(sizes, edges)


@st.composite
def sketches(draw: st.DrawFn) -> Sketch:
    names = [f"n{index}" for index in range(draw(st.integers(0, 14)))]
    declared = draw(st.permutations(names))
    size = st.tuples(st.integers(30, 260), st.sampled_from((22, 40, 46)))
    pairs = list(itertools.combinations(names, 2))
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=30)) if pairs else []
    return Sketch({name: draw(size) for name in declared}, edges)


def trace(route: list[Size], is_across: bool) -> Iterator[Size]:
    """Yield points of a route as it is drawn: straight in bands, one cubic between two bands."""
    for index, (start, end) in enumerate(itertools.pairwise(route)):
        (x0, y0), (x1, y1) = (point[::-1] if is_across else point for point in (start, end))
        for k in range(25):
            t = k / 24
            aside = x0 + (x1 - x0) * (t * t * (3 - 2 * t) if index % 2 else t)
            along = y0 + (y1 - y0) * (1.5 * t - 1.5 * t * t + t**3 if index % 2 else t)
            yield (along, aside) if is_across else (aside, along)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(sketches())
def test_every_edge_goes_forward_and_spans_the_fewest_ranks(graph: Sketch) -> None:
    rows, trails, _ = rank(graph.sizes, graph.edges)
    levels = {node: index for index, row in enumerate(rows) for node in row}
    assert sorted(levels) == list(range(len(levels)))
    for trail in trails.values():
        assert all(levels[b] == levels[a] + 1 for a, b in itertools.pairwise(trail))
    # No node alone can be moved to make the edges shorter: a necessary condition.
    names = list(graph.sizes)
    for index, node in enumerate(names):
        before = [levels[names.index(a)] for a, b in graph.edges if b == node]
        after = [levels[names.index(b)] for a, b in graph.edges if a == node]
        if len(after) > len(before):
            assert levels[index] == min(after) - 1
        if len(after) < len(before):
            assert levels[index] == max(before) + 1


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(sketches(), st.booleans())
def test_boxes_of_a_rank_keep_their_gap_and_lie_inside(graph: Sketch, is_across: bool) -> None:
    rows, _, _ = rank(graph.sizes, graph.edges)
    layout = arrange(graph.sizes, graph.edges, is_across)
    names = list(graph.sizes)
    boxes = {}
    for node, (x, y) in layout.centres.items():
        width, height = graph.sizes[node]
        boxes[node] = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        assert min(boxes[node][:2]) > 7.9
        assert boxes[node][2] < layout.width - 7.9
        assert boxes[node][3] < layout.height - 7.9
    for row in rows:
        for a, b in itertools.pairwise(names[node] for node in row if node < len(names)):
            gap = 14 if is_across else 24
            assert boxes[b][is_across] - boxes[a][is_across + 2] > gap - 0.11
    for route in layout.routes.values():
        assert all(7.9 < x < layout.width - 7.9 for x, _ in route)
        assert all(7.9 < y < layout.height - 7.9 for _, y in route)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(sketches(), st.booleans())
def test_no_edge_crosses_a_foreign_box(graph: Sketch, is_across: bool) -> None:
    layout = arrange(graph.sizes, graph.edges, is_across)
    for (a, b), route in layout.routes.items():
        assert len(route) % 2 == 0
        for end, sign, point in ((a, 1, route[0]), (b, -1, route[-1])):
            x, y = layout.centres[end]
            width, height = graph.sizes[end]
            border = (x + sign * width / 2, y) if is_across else (x, y + sign * height / 2)
            assert point == pytest.approx(border)
        for x, y in trace(route, is_across):
            for node, (left, top) in layout.centres.items():
                width, height = graph.sizes[node]
                is_inside = abs(x - left) < width / 2 - 0.1 and abs(y - top) < height / 2 - 0.1
                assert not is_inside, (a, b, node)


@pytest.mark.parametrize(
    "steps", [10, 50, *[pytest.param(steps, marks=pytest.mark.slow) for steps in (100, 200)]]
)
def test_few_edges_cross(steps: int) -> None:
    """Counted between neighbouring ranks, shared trunks once."""
    crossings = [rank(*make_random_sketch(steps, seed))[2] for seed in range(20)]
    assert sum(crossings) / len(crossings) <= MOST_CROSSINGS[steps]


def make_sizes(*names: str) -> dict[str, Size]:
    return {name: (92 + 8.0 * len(name), 44) for name in names}


@pytest.mark.parametrize("is_across", [False, True])
def test_a_chain_is_exactly_straight(is_across: bool) -> None:
    names = [f"step{'x' * (index % 7)}{index}" for index in range(100)]
    layout = arrange(make_sizes(*names), list(itertools.pairwise(names)), is_across)
    assert len({centre[is_across] for centre in layout.centres.values()}) == 1


def test_a_diamond_is_symmetric() -> None:
    edges = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]
    centres = arrange(make_sizes("a", "b", "c", "d"), edges).centres
    middle = (centres["b"][0] + centres["c"][0]) / 2
    assert centres["a"][0] == pytest.approx(centres["d"][0]) == pytest.approx(middle)
    assert centres["b"][0] < centres["c"][0]


def test_siblings_keep_the_order_in_which_they_are_declared() -> None:
    names = [f"child{index}" for index in range(20)]
    edges = [("parent", name) for name in names] + [(name, "join") for name in names]
    centres = arrange(make_sizes("parent", *names, "join"), edges).centres
    assert sorted(names, key=lambda name: centres[name]) == names
    middle = (centres[names[0]][0] + centres[names[-1]][0]) / 2
    assert centres["parent"][0] == pytest.approx(middle, abs=80)


def test_edges_of_one_producer_share_their_bends() -> None:
    names = ["a", "b", "c", "d", "e"]
    rows, trails, _ = rank(names, [*itertools.pairwise(names), ("a", "d"), ("a", "e")])
    assert trails["a", "d"][:3] == trails["a", "e"][:3]
    assert sum(map(len, rows)) == len(names) + 3


def test_wide_graphs_are_laid_out() -> None:
    names = [f"part{index}" for index in range(200)]
    edges = [("split", name) for name in names] + [(name, "join") for name in names]
    assert rank(["split", *names, "join"], edges)[2] == 0
    assert len(arrange(make_sizes("split", *names, "join"), edges).routes) == 400
    lone = [f"lone{index}" for index in range(300)]
    assert len(arrange(make_sizes(*lone), []).centres) == 300


def test_an_empty_graph_has_an_empty_layout() -> None:
    assert arrange({}, []) == Geometry(False, {}, {}, 16.0, 16.0)
    assert arrange({"a": (100, 44)}, []) == Geometry(False, {"a": (58, 30)}, {}, 116, 60)


@pytest.mark.parametrize(
    ("edges", "is_across"),
    [
        (list(itertools.pairwise("abcdef")), True),  # six steps in a row fill the width
        (list(itertools.pairwise("abcdefghijklmnop")), False),  # sixteen would be too small
        ([("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")], True),
        ([("a", f"b{index}") for index in range(20)], True),  # scrolling down is better
        ([(a, b) for i in range(9) for a, b in [(f"n{i}", f"n{i + 1}"), (f"n{i}", "z")]], False),
    ],
)
def test_edges_go_where_the_picture_wastes_less_of_a_notebook_cell(
    edges: Edges, is_across: bool
) -> None:
    names = dict.fromkeys(itertools.chain.from_iterable(edges))
    sizes = tuple((name, (133.0, 40.0)) for name in names)
    assert lay_out(sizes, tuple(edges)).is_across == is_across


########################################################################################
### Picture
########################################################################################


def read_svg_texts(svg: str) -> list[str]:
    """Return the texts of a picture in their order, after a check that it fits a notebook."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]
        assert tag in {"svg", "style", "rect", "g", "path", "text"}
        assert not {"id", "href", "style", "onload"} & element.attrib.keys()
    texts = [text for element in root.iter() if (text := (element.text or "").strip())]
    assert texts.pop(0).startswith("@media (prefers-color-scheme:dark)")
    return texts


def read_picture(html: str) -> str:
    """Return the SVG in the HTML of a notebook."""
    (data,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    return base64.b64decode(data).decode()


SAMPLES = {
    "one": ["a"],
    "chain": ["a", "b a", "c b", "d c"],
    "diamond": ["a", "b a", "c a", "d b c"],
    "fan": ["a", *[f"b{i} a" for i in range(20)], "z " + " ".join(f"b{i}" for i in range(20))],
}


def make_sample(kind: str) -> Pipeline:
    """Make one of five small graphs."""
    if kind == "ml":
        return make_ml_pipeline()
    return Pipeline([make_function(*line.split()) for line in SAMPLES[kind]])


def make_sample_scene(kind: str, stage: str) -> Scene:
    """Make a scene of a sample in a plan, a run, or a run that fails, with fixed times."""
    scene = make_sample(kind)._make_scene()
    states = {
        "plan": [
            make_state("fresh", saved=1.2),
            make_state("stale", reason="code changed: helper tidy"),
            make_state("maybe", reason="after clean"),
            make_state("new", reason="never ran"),
            make_state("uncached"),
        ],
        "run": [make_state("ran", seconds=8.2), make_state("cached", saved=3.1)],
        "failure": [
            make_state("ran", seconds=0.4),
            make_state("failed", seconds=0.7, error=ValueError("X has 3 columns")),
            make_state("skipped", reason="needs b"),
        ],
    }[stage]
    steps = scene.list_steps()
    names = [step.name for step in steps]
    chosen = [states[min(index, len(states) - 1)] for index in range(len(steps))]
    seconds = None if stage == "plan" else 9.3
    return scene._replace(states=dict(zip(names, chosen, strict=True)), seconds=seconds)


def test_a_picture_draws_each_step_output_and_input_once() -> None:
    assert read_svg_texts(make_ml_pipeline().show().svg) == [
        "pipeline", "· 7 steps, 5 inputs", "path", "load", "drop", "clean", "seed", "split",
        "→ train, test", "alpha", "model", "fold", "folds", "predict", "evaluate",
    ]  # fmt: skip


def test_a_picture_of_a_plan_draws_what_is_needed_with_reasons_and_counts() -> None:
    texts = read_svg_texts(Picture(make_sample_scene("ml", "plan")).svg)
    counts = [text for text in texts if re.fullmatch(r"\d \w+", text)]
    assert counts == ["1 fresh", "1 stale", "1 maybe", "1 new", "3 uncached"]
    assert {"saves 1.2 s", "code changed: helper tidy", "after clean", "→ train, test"} <= {*texts}
    plan = make_ml_pipeline().plan("model", **ML_INPUTS)
    assert "evaluate" not in read_svg_texts(plan.show().svg)


def test_a_picture_of_a_run_shows_times_failures_and_what_the_cache_saved() -> None:
    pipeline = make_ml_pipeline()
    pipeline.run("model", **ML_INPUTS)
    svg = pipeline.run("evaluate", "test", **ML_INPUTS).show().svg
    texts = hide_times("|".join(read_svg_texts(svg))).split("|")
    for text in ("ZeroDivisionError", "needs predict", "cached, saved T", "×3", "1 failed"):
        assert text in texts
    assert svg.count('stroke-dasharray="6 3 1 3"') == 1
    # The mapped step is a stack of three; the two targets have a second outline.
    assert len(re.findall(r'<path d="M\d+ \d+h\d+q6 0 6-6v', svg)) == 2
    assert len(re.findall(r'rx="9"', svg)) == 2


def test_a_given_value_is_drawn_as_an_input() -> None:
    plan = make_ml_pipeline().plan("evaluate", predict=3, fold=[1])
    texts = read_svg_texts(plan.show().svg)
    assert texts[:3] == ["pipeline", "· 2 steps, 2 inputs", "2 uncached"]
    assert "model" not in texts
    assert "predict" in texts


def test_an_edge_that_hands_on_no_value_is_dashed() -> None:
    steps = [make_function("load"), make_function("fit", "load"), make_function("plot", "load")]
    notify = Step(lambda: None, name="notify", after=("fit", "plot"))
    svg = Pipeline(*steps, notify).show().svg
    solid, dashed = re.findall(r'<path d="([^"]+)" class="e".* stroke-dasharray="(.*)"/>', svg)
    assert (solid[0].count("M"), solid[1]) == (2, "none")
    assert (dashed[0].count("M"), dashed[1]) == (2, "4 3")
    both = Step(lambda load: None, name="both", args={"load": "load"}, after="load")
    assert 'stroke-dasharray="4 3"' not in Pipeline(steps[0], both).show().svg


def test_show_with_targets_draws_only_what_they_need() -> None:
    pipeline = make_ml_pipeline()
    picture = pipeline.show("model", "train")
    assert picture.text == (
        "pipeline · 4 steps, 4 inputs\n"
        "  load                  path\n"
        "  clean                 load, drop\n"
        "  split → train, test   clean, seed\n"
        "  model                 train, alpha, seed"
    )
    assert picture.svg.count('rx="9"') == 2
    assert "predict" not in read_svg_texts(picture.svg)
    run = pipeline.run(**ML_INPUTS).show("split")
    assert run.text.splitlines()[0].startswith("pipeline · 3 steps, 3 inputs · 3 ran · ")
    assert run.text.splitlines()[-1] == "  split = ([1, 2], [3, 4])"
    with pytest.raises(InputError) as caught:
        pipeline.show("modle")
    assert str(caught.value) == (
        "show() was given 'modle', but no step produces or uses it\n"
        "  known names: alpha, clean, drop, evaluate, fold, folds, load, model, path, predict, "
        "seed, split, … and 2 more; did you mean 'model'?"
    )
    with pytest.raises(InputError, match="'None', but no step produces or uses it"):
        pipeline.show(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format='png': expected 'html' or 'svg'"):
        pipeline.show(format="png")  # type: ignore[arg-type]


STAGES = ["plan", "run", "failure"]

# The pictures of plan, run and failure as somebody has looked at them. When one changes, look at
# the file that the test names before you write its new hash here.
GOLDENS = {
    "one": "b17b96809b76 52c94e428cef 3b7747386f84",
    "chain": "98f0563f9863 cf5e96628cee 5c5ffda253f3",
    "diamond": "62d4c5e2b626 5e1a4715f9ea 040cfe50e555",
    "fan": "a7996a027b37 8eb14aa2e8d4 9cd2c40fea9d",
    "ml": "32dfac8b4a4e 78b85e219a77 77aad974d507",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", GOLDENS)
def test_pictures_are_as_somebody_has_looked_at_them(kind: str, stage: str, tmp_path: Path) -> None:
    svg = Picture(make_sample_scene(kind, stage)).svg
    read_svg_texts(svg)
    path = tmp_path / f"{kind}-{stage}.svg"
    path.write_text(svg)
    digest = hashlib.sha256(svg.encode()).hexdigest()[:12]
    assert digest == GOLDENS[kind].split()[STAGES.index(stage)], path


@pytest.mark.slow
def test_displays_are_the_same_under_every_hash_seed() -> None:
    code = """
        import test_dagkit as t, dagkit
        scene = t.make_sample_scene("ml", "failure")
        picture = dagkit._Picture(scene)
        print(picture.svg, picture.html, dagkit._format_page(scene), picture.text)
        for seed in range(3):
            graph = t.make_random_sketch(40, seed)
            print(t.arrange(*graph), t.arrange(*graph, True))
    """
    first, second = (run_python(code, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert len(first) > 10_000
    assert first == second


def test_a_notebook_gets_picture_table_and_text() -> None:
    pipeline = make_ml_pipeline()
    bundle = pipeline._repr_mimebundle_()
    assert list(bundle) == ["text/plain", "text/html"]
    assert bundle["text/plain"] == str(pipeline)
    html = bundle["text/html"]
    assert html.startswith('<div class="dagkit"><p><b>pipeline</b> · 7 steps, 5 inputs</p>')
    assert "evaluate" in read_svg_texts(read_picture(html))
    assert 'alt="Pipeline pipeline: load → clean → split' in html
    assert html.count("<tr>") == 7
    assert not re.search(r"<script|<a |onload|\sid=", html)
    assert list(pipeline._repr_mimebundle_(include={"text/plain"})) == ["text/plain"]
    assert list(pipeline._repr_mimebundle_(exclude={"text/plain"})) == ["text/html"]
    svg_bundle = pipeline.show(format="svg")._repr_mimebundle_()
    assert list(svg_bundle) == ["text/plain", "image/svg+xml"]
    for thing in (pipeline.plan(**ML_INPUTS), pipeline.run(**ML_INPUTS)):
        assert list(thing._repr_mimebundle_()) == ["text/plain", "text/html"]


def test_the_counts_appear_once_and_the_values_below_the_table() -> None:
    scene = make_sample_scene("diamond", "run")._replace(values={"d": "<b>"})
    html = Picture(scene).html
    assert "1 ran" not in html
    assert read_svg_texts(read_picture(html))[:2] == ["1 ran", "3 cached"]
    assert html.endswith("</details><pre>d = &#x27;&lt;b&gt;&#x27;</pre></div>")
    assert format_page(scene).count("1 ran") == 1


def test_a_wide_picture_is_shrunk_to_the_cell_and_then_scrolled() -> None:
    def get_width(pipeline: Pipeline) -> int:
        return int(re.findall(r'<img [^>]*width="(\d+)"', pipeline.show().html)[0])

    assert get_width(make_sample("chain")) < 500
    chain = [make_function(f"a_long_name_{i}", f"a_long_name_{i - 1}") for i in range(1, 7)]
    assert get_width(Pipeline(chain)) == 840
    layers = [[f"n{i}_{j}" for j in range(14)] for i in range(30)]
    grid = []
    for above, row in itertools.pairwise([[], *layers]):
        grid += [make_function(name, *above) for name in row]
    assert get_width(Pipeline(grid[:280])) > 840


@pytest.mark.parametrize("format", ["html", "svg"])
def test_a_fault_of_the_drawing_leaves_the_table(
    format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("no room")

    monkeypatch.setattr(dagkit, "_lay_out", fail)
    html = make_ml_pipeline().show(format=format)._repr_mimebundle_()["text/html"]
    assert "<pre>no picture: ZeroDivisionError: no room</pre><details open>" in html
    assert html.count("<tr>") == 7


def test_a_pipeline_that_cannot_be_built_says_why() -> None:
    pipeline = Pipeline([make_function("a", "b"), make_function("b", "a")])
    assert repr(pipeline).startswith("<Pipeline 'pipeline': CycleError: ")
    assert "<pre>CycleError: " in pipeline.show().html
    assert pipeline.show("a").text.splitlines()[:2][1].startswith("  CycleError: ")


def test_a_large_pipeline_is_a_table_with_the_hint_to_draw_a_part() -> None:
    chain = [make_function(f"s{i}", f"s{i - 1}") for i in range(1, 302)]
    pipeline = Pipeline([make_function("s0"), *chain])
    html = pipeline.show().html
    assert "<img" not in html
    text = "302 names are too many for one picture; draw a part: show(&#x27;s100&#x27;)"
    assert f"<pre>{text}</pre><details open>" in html
    assert list(pipeline.show(format="svg")._repr_mimebundle_()) == ["text/plain", "text/html"]
    part = pipeline.show("s100")
    assert "<img" in part.html
    assert len(part.text.splitlines()) == 102


def test_an_input_of_many_steps_is_a_pill_at_each() -> None:
    def count_pills(steps: int) -> int:
        pipeline = Pipeline([make_function(f"s{i}", "seed") for i in range(steps)])
        return read_svg_texts(pipeline.show().svg).count("seed")

    assert count_pills(8) == 1
    assert count_pills(9) == 9


def test_long_names_keep_both_ends_and_names_that_fit_are_whole() -> None:
    long = "load_customers_of_all_regions_in_2024"
    pipeline = Pipeline([make_function(long), make_function("x" * 29, long)])
    texts = read_svg_texts(pipeline.show().svg)
    assert "load_customers_of_a…s_in_2024" in texts
    assert "x" * 29 in texts
    assert long in pipeline.show().text


def test_save_goes_by_the_suffix(tmp_path: Path) -> None:
    picture = make_ml_pipeline().show()
    for suffix, start in (("svg", "<svg"), ("html", "<!doctype"), ("txt", "pipeline ·")):
        picture.save(tmp_path / f"ml.{suffix}")
        assert (tmp_path / f"ml.{suffix}").read_text().startswith(start)
    with pytest.raises(ValueError, match=r"'ml.png' cannot be saved: expected a name that ends in"):
        picture.save("ml.png")


HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\u202eevil\x00\x1b[31m🦊 שלום\n " + "x" * 300


class Hostile(Exception):
    def __str__(self) -> str:
        return HOSTILE


class Unreadable:
    def __repr__(self) -> str:
        raise RuntimeError(HOSTILE)


@step
def hostile(value: Any = HOSTILE, other: Any = Unreadable()) -> None:  # noqa: B008
    """</script><img src=x onerror=alert(1)>."""
    raise Hostile


@step
def skipper() -> None:
    raise Skip(HOSTILE)


@step
def echo(value: Any = HOSTILE) -> Any:
    return value


def test_hostile_text_is_never_markup_and_controls_no_terminal(tmp_path: Path) -> None:
    pipeline = Pipeline([hostile, skipper, echo], on_error="continue", name=HOSTILE[:35])
    run = pipeline.run()
    page = tmp_path / "page.html"
    for thing in (pipeline, pipeline.plan(), run):
        picture = thing.show()
        read_svg_texts(picture.svg)
        picture.save(page)
        for text in (page.read_text(), picture.html, picture.svg, picture.text, repr(thing)):
            assert not set(text) & {"\u202e", "\x00", "\x1b"}
        for text in (page.read_text(), picture.html, picture.svg):
            assert "<img src=x" not in text
            assert "</script" not in text
        assert len(picture.text.splitlines()) <= 6
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in page.read_text()


def test_a_page_is_the_view_of_a_notebook_with_the_tracebacks(tmp_path: Path) -> None:
    pipeline = make_ml_pipeline()
    run = pipeline.run(**ML_INPUTS)
    run.show().save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
    assert "<p><b>pipeline</b> · 7 steps, 5 inputs · " in page
    assert page.count("<svg") == 1
    assert "<details open><summary>7 steps</summary><table>" in page
    assert "<h3>predict</h3><pre>Traceback (most recent call last):" in page
    assert "ZeroDivisionError: division by zero" in page
    assert not re.search(r"<script|<a |https?://(?!www.w3.org)", page)


def test_showing_runs_nothing_reads_nothing_and_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_ml_pipeline()
    run = pipeline.run(**ML_INPUTS)
    plan = pipeline.plan(**ML_INPUTS)

    def forbid(*args: object, **options: object) -> None:
        raise AssertionError

    for name in ("_call_with", "_fingerprint", "_compute_file_fingerprint"):
        monkeypatch.setattr(dagkit, name, forbid)
    monkeypatch.setattr(dagkit.Store, "_load", forbid)
    for thing in (pipeline, plan, run):
        assert thing.show().html
        assert str(thing)
        assert repr(thing)
    assert capsys.readouterr() == ("", "")


def test_statuses_can_be_told_apart_by_everyone() -> None:
    """Contrast by WCAG 2: 4.5 for text, 3 for edges, in both schemes."""

    def measure_light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def measure_contrast(one: str, other: str) -> float:
        dark, bright = sorted([measure_light(one), measure_light(other)])
        return (bright + 0.05) / (dark + 0.05)

    looks = LOOKS
    for look in looks.values():
        assert measure_contrast(look.light, "#ffffff") >= 4.5
        assert measure_contrast(look.dark, "#111111") >= 4.5
    assert measure_contrast("#8a919c", "#ffffff") >= 3
    assert measure_contrast("#7d8590", "#111111") >= 3
    assert len({(look.glyph, look.ascii, look.path) for look in looks.values()}) == len(looks) - 2
    for names in ("fresh stale maybe new uncached", "waiting running", "ran cached failed skipped"):
        borders = [(looks[n].light, looks[n].dashes, looks[n].width) for n in names.split()]
        assert len(set(borders)) == len(borders)


@pytest.mark.slow
def test_a_plain_run_imports_nothing_of_the_display() -> None:
    code = """
        import sys
        from dagkit import Pipeline
        run = Pipeline({"more": lambda x: x + 1}).run(x=1)
        assert not {"html", "base64", "IPython"} & sys.modules.keys()
        assert "</svg>" in run.show().svg
    """
    assert run_python(code) == ""


@pytest.mark.slow
def test_networkx_users_draw_the_graph_with_their_own_tools(tmp_path: Path) -> None:
    code = f"""
        import matplotlib; matplotlib.use("agg")
        import matplotlib.pyplot as plt, networkx as nx, test_dagkit as t
        graph = t.make_ml_pipeline().graph
        for rank, names in enumerate(nx.topological_generations(graph)):
            print(rank, *names)
        nx.draw(graph, nx.spring_layout(graph, seed=1), with_labels=True)
        plt.savefig({str(tmp_path / "graph.png")!r})
    """
    assert run_python(code).startswith("0 path drop seed alpha fold\n1 load folds\n")
    assert (tmp_path / "graph.png").stat().st_size > 5000


# A real browser

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
# CI installs one, and fails if a test is skipped; a contributor without one can test the rest.
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
SCHEMES = [(1, (255, 255, 255)), (0, (17, 17, 17))]  # (light or dark, colour of the paper)


def browse(page: Path, folder: Path, *flags: str) -> str:
    """Open a page in headless Chromium; return what it printed."""
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
        "--disable-component-update --disable-sync --window-size=1000,900"
    )
    process = subprocess.run(
        [str(CHROMIUM), *switches.split(), f"--user-data-dir={folder / 'profile'}", *flags,
         page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


def count_colors(page: Path, folder: Path, scheme: int) -> Counter[Any]:
    """Count the colours of a page in the light scheme (1) or the dark one (0)."""
    import matplotlib.image

    shot = folder / "shot.png"
    browse(page, folder, f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}")
    image = (matplotlib.image.imread(shot) * 255).round().astype(int)
    return Counter(map(tuple, image[:, :, :3].reshape(-1, 3).tolist()))


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize(("scheme", "paper"), SCHEMES)
def test_the_page_opens_from_disk_in_light_and_dark(
    tmp_path: Path, scheme: int, paper: tuple[int, ...]
) -> None:
    make_ml_pipeline().run(**ML_INPUTS).show().save(tmp_path / "ml.html")
    colors = count_colors(tmp_path / "ml.html", tmp_path, scheme)
    assert colors.most_common(1)[0][0] == paper
    for status in ("ran", "failed"):
        look = LOOKS[status]
        color = look.light if scheme else look.dark
        assert colors[tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))] > 50


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_hostile_text_stays_text_in_a_browser(tmp_path: Path) -> None:
    Pipeline([hostile, skipper], on_error="continue").run().show().save(tmp_path / "page.html")
    dom = browse(tmp_path / "page.html", tmp_path, "--dump-dom")
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in dom
    assert "<img" not in dom
    assert "Traceback" in dom


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize(("scheme", "paper"), SCHEMES)
def test_a_notebook_as_a_web_page_shows_the_picture(
    tmp_path: Path, scheme: int, paper: tuple[int, ...]
) -> None:
    """By nbconvert, as GitHub and others do it: the image is there without any script."""
    import nbconvert
    import nbformat

    data = make_ml_pipeline()._repr_mimebundle_()
    output = nbformat.v4.new_output("execute_result", data=data, execution_count=1)
    cell = nbformat.v4.new_code_cell("pipeline", outputs=[output], execution_count=1)
    book = nbformat.v4.new_notebook(cells=[cell])
    text, _ = nbconvert.HTMLExporter(template_name="basic").from_notebook_node(book)
    page = tmp_path / "book.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{text}</body>")
    assert "data:image/svg+xml;base64," in text
    assert "<details>" in text
    colors = count_colors(page, tmp_path, scheme)
    assert colors[paper] > 10_000  # the picture has its own paper
    assert len(colors) > 20


########################################################################################
### Events
########################################################################################


def hop(x: int) -> int:
    return 2 * x


def jump(hop: int) -> int:
    return hop + 1


@pytest.mark.parametrize("has_executor", [False, True])
def test_listeners_get_every_event_in_the_calling_thread(has_executor: bool) -> None:
    events = []
    threads = set()

    def listen(event: Event) -> None:
        threads.add(threading.get_ident())
        events.append((event.kind, event.step))

    with ThreadPoolExecutor(2) as pool:
        executor = pool if has_executor else None
        Pipeline(hop, jump, executor=executor, on_event=listen).run(x=1)
    assert threads == {threading.get_ident()}
    start = "step submitted" if has_executor else "step started"
    assert events == [
        ("run started", ""),
        (start, "hop"),
        ("step finished", "hop"),
        (start, "jump"),
        ("step finished", "jump"),
        ("run finished", ""),
    ]


def test_the_event_of_a_finished_step_holds_its_state() -> None:
    events: dict[str, Event] = {}

    def collect(event: Event) -> None:
        if event.kind == "step finished":
            events[event.step] = event

    def fail(hop: int) -> None:
        raise ValueError("no")

    before = time.time()
    pipeline = Pipeline(hop, fail, on_event=[collect], on_error="continue")
    run = pipeline.run(x=1)
    assert {name: event.state for name, event in events.items()} == run.steps
    assert run.steps["fail"].error is run.errors["fail"]
    assert before <= events["hop"].time <= time.time()


def test_retries_pokes_and_elements_are_events() -> None:
    events: list[Event] = []
    attempts: Counter[int] = Counter()
    answers = iter([0, 1])

    def fetch(item: int) -> int:
        attempts[item] += 1
        if attempts[item] == 1:
            raise OSError("busy")
        return item

    def arrived() -> int:
        return next(answers)

    pipeline = Pipeline(
        Step(fetch, map="item", retries=1), sensor(poke_interval=0)(arrived), on_event=events.append
    )
    pipeline.run(item=[1, 2])
    kinds = Counter(event.kind for event in events)
    assert (kinds["step retried"], kinds["step poked"]) == (2, 1)
    retried = next(event for event in events if event.kind == "step retried")
    assert retried.state
    assert (retried.state.attempts, repr(retried.state.error)) == (1, "OSError('busy')")
    progress = [event for event in events if event.kind == "map progress"]
    assert [(event.step, event.done, event.total) for event in progress] == [
        ("fetch", 1, 2),
        ("fetch", 2, 2),
    ]


def test_a_listener_that_raises_gets_one_warning_and_stops_nothing() -> None:
    events: list[Event] = []

    def broken(event: Event) -> None:
        raise OSError("full")

    pipeline = Pipeline(hop, jump, on_event=[broken, events.append])
    with pytest.warns(DagkitWarning) as caught:
        assert pipeline.run(x=1)["jump"] == 3
    assert len(caught) == 1
    assert str(caught[0].message) == (
        f"{summarize(broken)} will receive no further events of this run: OSError: full"
    )
    assert caught[0].filename == __file__
    assert len(events) == 6


def test_the_log_says_what_happened_and_how_long_it_took(caplog: pytest.LogCaptureFixture) -> None:
    @step(cache=True)
    def fetch(x: int) -> int:
        return x

    @step
    def fail(fetch: int) -> int:
        raise ValueError("no")

    @step
    def late(fail: int) -> None: ...

    @step(map="x", args={"x": "items"})
    def square(x: int) -> int:
        return x * x

    pipeline = Pipeline(fetch, fail, late, square, name="shop", on_error="continue")
    with caplog.at_level("INFO", logger="dagkit"):
        pipeline.run("fetch", x=1)
        pipeline.run("fetch", x=1)
        pipeline.run("late", fetch=1)
        pipeline.run("square", items=[1])
    messages = [re.sub(r"\b[\d.]+ m?s\b", "T", record.getMessage()) for record in caplog.records]
    assert messages == [
        "run started: 1 step",
        "step started: fetch",
        "step finished: fetch ran, T, reason: never ran",
        "run finished: shop ran, T",
        "run started: 1 step",
        "step finished: fetch cached, saved T",
        "run finished: shop ran, T",
        "run started: 2 steps",
        "step started: fail",
        "step finished: fail failed, T, ValueError: no",
        "step finished: late skipped, reason: needs fail",
        "run finished: shop ran, T",
        "run started: 1 step",
        "step started: square",
        "map progress: square, 1 of 1",
        "step finished: square ran, T",
        "run finished: shop ran, T",
    ]
    levels = Counter(record.levelno for record in caplog.records)
    assert levels == {logging.INFO: 16, logging.ERROR: 1}


def test_without_listeners_the_root_logger_is_left_alone() -> None:
    assert run_python("import logging, dagkit; print(logging.getLogger().handlers)") == "[]\n"


########################################################################################
### Records
########################################################################################


def read_records(pipeline: Pipeline) -> list[dict[str, Any]]:
    path = Path(pipeline.store.path) / "runs.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def append_records(pipeline: Pipeline, *lines: str) -> None:
    with open(Path(pipeline.store.path) / "runs.jsonl", "a") as file:
        file.writelines(f"\n{line}" for line in lines)


def set_times(pipeline: Pipeline, *seconds: float) -> None:
    """Rewrite the records, as if the runs had begun in one second and taken these times."""
    records = read_records(pipeline)
    (Path(pipeline.store.path) / "runs.jsonl").unlink()
    for record, time_taken in zip(records, seconds, strict=True):
        record |= {"started": "2026-01-01T00:00:00Z", "seconds": time_taken}
        append_records(pipeline, json.dumps(record, separators=(",", ":")))


@pytest.fixture
def recorded_shop(shop: Pipeline) -> Pipeline:
    return shop.replace(store=os.environ["DAGKIT_STORE"])


def test_a_run_is_a_line_of_json(recorded_shop: Pipeline) -> None:
    run = recorded_shop.run(prices=[1, 2])
    (line,) = read_records(recorded_shop)
    assert list(line) == [
        "id", "pipeline", "started", "seconds", "status", "error", "user", "host", "python",
        "dagkit", "commit", "inputs", "targets", "metrics", "steps",
    ]  # fmt: skip
    assert line == run.record
    assert line["inputs"]["digits"]["value"] == 2
    assert line["inputs"]["prices"]["value"] == [1, 2]
    assert line["inputs"]["prices"]["fingerprint"] == fingerprint([1, 2])[:16]
    assert line["metrics"] == {"total": 3, "mean": 1.5, "low": 1, "high": 2, "spread": 1}
    assert list(line["steps"]) == list(run.steps)
    assert (line["python"], line["dagkit"]) == (sys.version.split()[0], dagkit.__version__)
    recorded_shop.run("mean", prices=[1, 2])
    first, second = read_records(recorded_shop)
    assert first["id"] != second["id"]
    assert second["metrics"] == {"mean": 1.5}


def test_a_pipeline_without_store_and_cache_records_nothing(
    shop: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGKIT_STORE")
    monkeypatch.chdir(tmp_path)
    pipeline = Pipeline(shop)
    pipeline.run(prices=[1])
    assert pipeline.history() == []
    assert not list(tmp_path.iterdir())


def test_metrics_of_reused_values_are_recorded_without_loading_them() -> None:
    def biggest(n: int) -> int:
        return n + 5

    def score(biggest: int) -> int:
        return biggest

    pipeline = Pipeline(biggest, score, cache=True)
    pipeline.run("score", n=4)
    pipeline.store.prune(max_bytes=0)
    run = pipeline.run("biggest", n=4)
    assert [record["metrics"] for record in read_records(pipeline)] == [
        {"score": 9},
        {"biggest": 9},
    ]
    assert run["biggest"] == 9


def test_numbers_of_numpy_are_metrics_and_large_things_are_not() -> None:
    values = {
        "half": np.float32(0.5), "three": np.int64(3), "yes": np.bool_(True), "text": "a",
        "long": "a" * 201, "nothing": None, "items": [1], "array": np.ones(1),
        "date": np.datetime64(1, "s"), "huge": 10**5000,
    }  # fmt: skip
    pick = Step(lambda: tuple(values.values()), name="pick", outputs=tuple(values))
    metrics = Pipeline(pick).run().record["metrics"]
    assert metrics == {"half": 0.5, "three": 3, "yes": True, "text": "a"}
    assert [type(metric) for metric in metrics.values()] == [float, int, bool, str]


def test_failed_and_interrupted_runs_are_recorded(recorded_shop: Pipeline) -> None:
    def fail(total: float) -> None:
        raise ValueError("no")

    def interrupt(mean: float) -> None:
        raise KeyboardInterrupt

    pipeline = recorded_shop.replace(recorded_shop, fail, interrupt)
    with pytest.raises(ValueError, match="no"):
        pipeline.run("fail", prices=[1])
    with pytest.raises(KeyboardInterrupt):
        pipeline.run("interrupt", prices=[1])
    failed, interrupted = read_records(pipeline)
    assert failed["status"] == interrupted["status"] == "failed"
    assert failed["error"] == failed["steps"]["fail"]["error"] == "ValueError: no"
    assert interrupted["error"] == "KeyboardInterrupt"
    assert set(interrupted["steps"]) == {"total", "mean", "interrupt"}


def test_steps_are_recorded_in_short_and_come_back_whole() -> None:
    def fail(x: int) -> None:
        raise ValueError("no")

    pipeline = Pipeline(
        Step(hop, cache=True),
        Step(jump, map="hop", args={"hop": "items"}),
        fail,
        on_error="continue",
    )
    for _ in range(2):
        pipeline.run(x=1, items=[1, 2])
    row = pipeline.history()[-1]
    facts = {name: {**facts, "seconds": 0.0, "saved": 0.0} for name, facts in row.steps.items()}
    default = {
        "status": "ran", "seconds": 0.0, "reason": "", "error": "", "attempts": 1, "saved": 0.0,
        "elements": None, "fingerprint": "",
    }  # fmt: skip
    assert facts == {
        "hop": {**default, "status": "cached", "fingerprint": fingerprint(2)[:16]},
        "jump": {**default, "elements": 2},
        "fail": {**default, "status": "failed", "error": "ValueError: no"},
    }
    assert row.steps["jump"]["seconds"] > 0
    (record, _) = read_records(pipeline)
    assert "attempts" not in record["steps"]["hop"]


def test_a_step_takes_at_most_100_bytes_of_a_record() -> None:
    names = [f"clean_table_{i}" for i in range(50)]
    pipeline = Pipeline([make_function(name, "x") for name in names], cache=True)
    for x in (1, 1, 2):  # never ran, cached, input changed
        pipeline.run(x=x)
        size = len(json.dumps(read_records(pipeline)[-1]["steps"], separators=(",", ":")))
        assert size <= 100 * len(names)


def test_a_history_is_a_table_of_what_differs(recorded_shop: Pipeline) -> None:
    for digits in (0, 2):
        recorded_shop.run("mean", prices=[1, 2, 2], digits=digits)
    set_times(recorded_shop, 0.001, 0.25)
    rows = recorded_shop.history()
    assert [row["metrics.mean"] for row in rows] == [2.0, 1.67]
    assert [line.split(maxsplit=2) for line in repr(rows).splitlines()] == [
        ["digits", "mean", "seconds"],
        ["0", "2", "1 ms"],
        ["2", "1.67", "0.2 s"],
    ]
    page = rows._repr_html_()  # type: ignore[attr-defined]
    assert page.startswith("<table>")
    assert re.findall(r">(digits|mean|seconds)</", page) == ["digits", "mean", "seconds"]
    frame = pd.DataFrame(rows)
    assert frame["inputs.digits"].tolist() == [0, 2]
    assert frame["metrics.mean"].tolist() == [2.0, 1.67]
    assert list(frame["status"]) == ["ran", "ran"]


def test_a_history_displays_failed_runs_and_cuts_long_values() -> None:
    def fail(x: Any) -> None:
        raise ValueError("no")

    pipeline = Pipeline(fail, store=os.environ["DAGKIT_STORE"], on_error="continue")
    for x in (None, list(range(50))):
        pipeline.run(x=x)
    set_times(pipeline, 0.001, 0.25)
    head, first, second = [
        re.split(" {2,}", line.strip()) for line in repr(pipeline.history()).splitlines()
    ]
    assert head == ["x", "seconds", "status", "error"]
    assert (first[0], first[2:]) == ("None", ["failed", "ValueError: no"])
    assert re.fullmatch(r"\[0, 1, .*….*48, 49\]", second[0])


def test_a_history_displays_its_newest_100_rows(recorded_shop: Pipeline) -> None:
    recorded_shop.run("total", prices=[1])
    (record,) = read_records(recorded_shop)
    lines = []
    for i in range(350):
        record["metrics"]["total"] = i
        lines.append(json.dumps(record))
    append_records(recorded_shop, *lines)
    rows = recorded_shop.history()
    head, *texts, last = repr(rows).splitlines()
    assert head.strip() == "total"
    assert [int(text) for text in texts] == list(range(250, 350))
    assert last == "… and 251 older runs"
    page = rows._repr_html_()  # type: ignore[attr-defined]
    assert page.count("<tr>") == 101
    assert "… and 251 older runs" in page
    assert [row["metrics.total"] for row in rows][:2] == [1, 0]


@pytest.mark.slow
def test_a_history_of_100_000_runs_is_read_in_about_a_second() -> None:
    pipeline = Pipeline(
        [make_function(f"step_{i}", "x") for i in range(10)], store=os.environ["DAGKIT_STORE"]
    )
    pipeline.run(x=1)
    path = Path(pipeline.store.path) / "runs.jsonl"
    path.write_bytes(path.read_bytes() * 100_000)
    start = time.process_time()
    rows = pipeline.history()
    assert repr(rows).endswith("… and 99,900 older runs")
    assert time.process_time() - start < 4  # 1 on a quiet machine
    assert len(rows) == 100_000


def test_pipelines_of_one_store_are_told_apart_by_name(shop: Pipeline) -> None:
    for name in ("one", "two", "one"):
        shop.replace(name=name, store=os.environ["DAGKIT_STORE"]).run("total", prices=[1])
    assert [len(shop.replace(name=name).history()) for name in ("one", "two", "three")] == [2, 1, 0]


class Color(enum.IntEnum):
    RED = 1


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -0.0, 1e300, "", "naïve \udc80 \0", [], {}, math.inf,
        {"a": [1, None, {"b": "c"}]}, {"z": 1, "a": 2}, {"a": 1, "steps": {"x": 2}},
        [Path("a"), Path("/b")], Path("data/raw.csv"), "x" * 4000,
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_an_input_that_is_short_json_or_a_path_comes_back_as_it_was(value: Any) -> None:
    pipeline = Pipeline({"same": lambda x: None}, store=os.environ["DAGKIT_STORE"])
    pipeline.run(x=value)
    row = pipeline.history()[-1]
    assert repr(row.inputs) == repr({"x": value})
    assert row.steps["same"]["status"] == "ran"


@pytest.mark.parametrize(
    "value",
    [
        (1, 2), [(1, 2)], {1: 2}, {1, 2}, b"a", np.float64(1), Color.RED, 1j, 10**5000, object(),
        collections.OrderedDict(a=1), {"a": collections.defaultdict(int)}, CYCLE, "x" * 5000,
        [Path("a"), "b"], [0.123456789] * 1000,
    ],
    ids=lambda value: f"{type(value).__name__}",
)  # fmt: skip
def test_an_input_of_another_kind_does_not_come_back(value: Any) -> None:
    pipeline = Pipeline({"same": lambda x: None}, store=os.environ["DAGKIT_STORE"])
    pipeline.run(x=value)
    row = pipeline.history()[-1]
    assert row.inputs == {}
    assert row["inputs.x"] == summarize(value)


def test_a_nan_comes_back_or_not_at_all() -> None:
    pipeline = Pipeline({"same": lambda x: None}, store=os.environ["DAGKIT_STORE"])
    pipeline.run(x=[math.nan])
    assert repr(pipeline.history()[-1].inputs) == "{'x': [nan]}"


def test_a_recorded_run_can_be_repeated(tmp_path: Path) -> None:
    def describe(path: Path, options: dict[str, Any], frame: pd.DataFrame) -> str:
        return f"{path.name} {options} {len(frame)}"

    pipeline = Pipeline(describe, store=os.environ["DAGKIT_STORE"])
    frame = pd.DataFrame({"a": [1, 2]})
    text = pipeline.run(path=tmp_path, options={"a": [1, None]}, frame=frame)["describe"]
    row = pipeline.history()[-1]
    assert pipeline.run(frame=frame, **row.inputs)["describe"] == text
    with pytest.raises(InputError, match="'frame'"):
        pipeline.run(**row.inputs)


def test_inputs_are_recorded_as_they_were_before_a_step_changed_them() -> None:
    def grow(rows: list[int]) -> int:
        rows.append(9)
        return len(rows)

    pipeline = Pipeline(grow, store=os.environ["DAGKIT_STORE"])
    pipeline.run(rows=[1])
    assert pipeline.history()[0].inputs == {"rows": [1]}


def test_a_long_input_is_not_read_to_its_end_for_the_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Endless(list[int]):
        def __iter__(self) -> Iterator[int]:
            yield from itertools.count()

    monkeypatch.delenv("DAGKIT_STORE")  # else it would be read for its fingerprint
    pipeline = Pipeline({"same": lambda x: None})
    for value in ({"a": Endless([1])}, [[[0] * 1000] * 1000] * 1000):
        (recorded,) = pipeline.run(x=value).record["inputs"].values()
        assert list(recorded) == ["text"]


def test_files_that_only_uncached_steps_take_are_not_read_for_the_record(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless")
    pipeline = Pipeline({"size": lambda path: 1}, Step(lambda n: n, name="same", cache=True))
    pipeline.run(path=[tmp_path], n=1)
    pipeline.run(path=tmp_path / "endless", n=1)
    first, second = read_records(pipeline)
    assert first["inputs"]["path"] == {"paths": [str(tmp_path)]}
    assert second["inputs"]["path"] == {"path": str(tmp_path / "endless")}
    assert second["inputs"]["n"]["fingerprint"] == fingerprint(1)[:16]


def test_a_value_that_has_no_text_does_not_break_the_record_of_its_run() -> None:
    class Odd(os.PathLike[bytes]):
        def __fspath__(self) -> bytes:
            return b"\xff"

    class Broken(os.PathLike[bytes]):
        def __fspath__(self) -> bytes:
            raise OSError

    huge = 10**5000  # Python refuses to write an int of so many digits
    pipeline = Pipeline(Step(lambda x, p: x, name="big", cache=True), {"more": lambda big: big + 1})
    for path in (Odd(), Odd(), Broken()):
        assert pipeline.run(x=huge, p=path)["more"] == huge + 1
    assert [row.get("metrics.more") for row in pipeline.history()] == [None, None, None]


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "null",
        "{}",
        "",
        '{"pipeline": "pipeline", "inputs": {"x": 3}, "steps": {}}',
        '{"pipeline": "pipeline", "inputs": {"x": {}}, "steps": {}}',
        '{"pipeline": "pipeline", "seconds": "long", "steps": {}}',
        '{"pipeline": "pipeline", "steps": null}',
        '{"pipeline": "pipe',
    ],
)
def test_a_line_that_is_no_record_is_left_out(text: str, recorded_shop: Pipeline) -> None:
    recorded_shop.run("total", prices=[1])
    append_records(recorded_shop, text)
    recorded_shop.run("total", prices=[2])
    rows = recorded_shop.history()
    assert [row["metrics.total"] for row in rows] == [1, 2]
    assert repr(rows)


def test_a_record_is_not_lost_with_a_line_that_was_cut_before_it(recorded_shop: Pipeline) -> None:
    recorded_shop.run("total", prices=[1])
    path = Path(recorded_shop.store.path) / "runs.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "cut sho')
    recorded_shop.run("total", prices=[2])
    assert [row["metrics.total"] for row in recorded_shop.history()] == [1, 2]


@pytest.mark.slow
def test_the_lines_of_many_processes_do_not_mix() -> None:
    code = """
        from dagkit import Pipeline, Step
        pipeline = Pipeline(Step(lambda n: "x" * 150, name="text"), store="store")
        for n in range(60):
            pipeline.run(n=n)
    """
    folder = Path(os.environ["DAGKIT_STORE"]).parent
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(run_python, code, folder) for _ in range(4)]:
            future.result()
    pipeline = Pipeline(Step(lambda n: n, name="text"), store=folder / "store")
    numbers = Counter(row["inputs.n"] for row in pipeline.history())
    assert numbers == dict.fromkeys(range(60), 4)


def test_records_that_cannot_be_written_or_read_give_a_warning(recorded_shop: Pipeline) -> None:
    recorded_shop.run("total", prices=[1])
    path = Path(recorded_shop.store.path) / "runs.jsonl"
    path.unlink()
    path.mkdir()
    run, texts = catch_warnings(lambda: recorded_shop.run("total", prices=[1]))
    assert run["total"] == 1
    (text,) = texts
    assert text.startswith(f"runs cannot be recorded in {recorded_shop.store.path}: ")
    assert recorded_shop.history() == []


# The commit


def git(folder: Path, *words: str) -> str:
    """Run git in a folder; return what it printed."""
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a repository with one commit, and a folder in it."""
    folder = tmp_path / "project"
    (folder / "flows").mkdir(parents=True)
    (folder / "flows" / "flow.py").touch()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "x")
    return folder


minutes = itertools.count(1)


def read_commit(folder: Path) -> str:
    """Return the commit in the record of a run of code that lies in a folder."""
    scope: dict[str, Any] = {}
    exec(compile("def one(): return 1", str(folder / "flow.py"), "exec"), scope)
    with (
        mock.patch.object(time, "monotonic", return_value=60 * next(minutes)),
        mock.patch.object(subprocess, "Popen", None),  # no process is started
    ):
        commit: str = Pipeline(scope["one"]).run().record["commit"]
    return commit


@pytest.mark.parametrize(
    "commands",
    [
        [],
        ["checkout -q --detach"],
        ["checkout -q -b feature/deep/name"],
        ["pack-refs --all"],
        ["pack-refs --all", "commit -q --allow-empty -m y"],
        ["symbolic-ref refs/heads/alias refs/heads/main", "symbolic-ref HEAD refs/heads/alias"],
        ["gc -q"],
        ["init -q --separate-git-dir ../elsewhere"],
    ],
    ids=lambda commands: ", ".join(commands),
)
def test_the_commit_of_the_code_is_recorded(project: Path, commands: list[str]) -> None:
    for command in commands:
        git(project, *command.split())
    assert read_commit(project / "flows") == git(project, "rev-parse", "HEAD")


def test_the_commit_of_a_worktree_is_recorded(project: Path) -> None:
    worktree = project.parent / "worktree"
    git(project, "worktree", "add", "-q", str(worktree), "-b", "other")
    git(worktree, "commit", "-q", "--allow-empty", "-m", "y")
    commits = [git(folder, "rev-parse", "HEAD") for folder in (project, worktree)]
    assert commits[0] != commits[1]
    assert [read_commit(folder / "flows") for folder in (project, worktree)] == commits
    git(project, "pack-refs", "--all")
    assert read_commit(worktree / "flows") == commits[1]


def test_the_commit_of_a_submodule_is_recorded(project: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "-q", "add", str(project), "in")
    assert read_commit(outer / "in" / "flows") == git(project, "rev-parse", "HEAD")


def test_a_branch_may_have_a_name_of_any_bytes(project: Path) -> None:
    commit = git(project, "rev-parse", "HEAD")
    (project / ".git" / "HEAD").write_bytes(b"ref: refs/heads/caf\xe9\n")
    assert read_commit(project / "flows") == ""  # as long as there is no commit
    with open(os.fsencode(project) + b"/.git/refs/heads/caf\xe9", "w") as file:
        file.write(f"{commit}\n")
    assert read_commit(project / "flows") == commit


@pytest.mark.parametrize(
    "head",
    ["", "ref:", "ref: refs/heads/none", "ref: HEAD", "ref: /etc/passwd", "ref: a\0b", "0" * 39],
)
def test_there_is_no_commit_in_a_damaged_repository(project: Path, head: str) -> None:
    (project / ".git" / "HEAD").write_text(f"{head}\n")
    assert read_commit(project / "flows") == ""


def test_there_is_no_commit_outside_of_a_repository(tmp_path: Path) -> None:
    assert read_commit(tmp_path) == ""


def test_the_commit_is_read_again_after_ten_seconds(project: Path) -> None:
    first = read_commit(project / "flows")
    git(project, "commit", "-q", "--allow-empty", "-m", "y")
    assert read_commit(project / "flows") == git(project, "rev-parse", "HEAD") != first


def test_the_commit_of_a_notebook_is_that_of_the_working_folder(project: Path) -> None:
    code = """
        import dagkit
        scope = {}  # ipykernel compiles cells under such a name
        exec(compile("def one(): return 2", "/tmp/ipykernel_0/1.py", "exec"), scope)
        print(dagkit.Pipeline(scope["one"]).run().record["commit"])
    """
    assert run_python(code, project).strip() == git(project, "rev-parse", "HEAD")


########################################################################################
### Live
########################################################################################


def twice(x: int) -> int:
    return 2 * x


def decline() -> None:
    raise Skip("not today")


def cope(twice: int, decline: None = None) -> int:
    return twice


def capture_progress(pipeline: Pipeline, **inputs: Any) -> str:
    """Return what a run writes to stderr, with times as T."""
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), contextlib.suppress(ValueError):
        pipeline.run(**inputs)
    return hide_times(stream.getvalue())


def test_progress_is_a_line_for_each_step_and_a_summary_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline = Pipeline(Step(twice, cache=True), decline, cope, progress=True)
    assert capture_progress(pipeline, x=1) == (
        "■ twice     ran       T\n"
        "⊘ decline   skipped   not today\n"
        "■ cope      ran       T\n"
        "pipeline done in T · 2 ran · 1 skipped\n"
    )
    lines = capture_progress(pipeline, x=1).splitlines()
    assert lines[0] == "✓ twice     cached    saved T"
    assert lines[-1] == "pipeline done in T · 1 ran · 1 cached (saved T) · 1 skipped"
    assert capsys.readouterr() == ("", "")


def test_progress_shows_failures_with_their_location_and_again_after_many_lines() -> None:
    def fail(twice: int) -> None:
        raise ValueError("X has\x1b[2J 3 columns\nand more")

    failure = f"✗ fail    failed    T   ValueError: X has\ufffd[2J 3 columns   ({locate(fail)})\n"
    assert capture_progress(Pipeline(twice, fail, progress=True), x=1) == (
        f"■ twice   ran       T\n{failure}pipeline failed in T · 1 ran · 1 failed\n"
    )
    many = [Step(twice, name=f"d{index}") for index in range(20)]
    pipeline = Pipeline(twice, fail, many, progress=True, on_error="continue")
    lines = capture_progress(pipeline, x=1).splitlines(keepends=True)
    assert lines[1] == lines[-2] == failure
    assert lines[-1] == "pipeline failed in T · 21 ran · 1 failed\n"


def test_progress_is_silent_where_there_is_no_terminal_unless_asked() -> None:
    assert capture_progress(Pipeline(twice), x=1) == ""
    assert capture_progress(Pipeline(twice, progress=False), x=1) == ""


@pytest.mark.slow
@pytest.mark.parametrize("has_colors", [True, False])
def test_progress_on_a_terminal_rewrites_its_last_line(has_colors: bool, tmp_path: Path) -> None:
    """A real pseudo-terminal; a map shows how far it is; colours unless NO_COLOR is set."""
    import pty

    (tmp_path / "slow.py").write_text(
        "import time\nfrom dagkit import Pipeline, Step\n"
        "def slow(item):\n    time.sleep(0.03)\n"
        "Pipeline(Step(slow, map='item')).run(item=range(20))\n"
    )
    main, side = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(HERE), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    if not has_colors:
        env["NO_COLOR"] = "1"
    subprocess.run([sys.executable, str(tmp_path / "slow.py")], stderr=side, env=env, check=True)
    os.close(side)
    content = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(main, 4096):
            content += chunk
    os.close(main)
    text = content.decode()
    rewrites = re.findall(r"\x1b\[K▶ slow (\d+)/20 [^\r]* 0/1", text)
    assert 2 <= len(rewrites) <= 12
    assert ("\x1b[32m" in text) == has_colors
    assert text.splitlines()[-1].startswith("\r\x1b[Kpipeline done in".removeprefix("\r"))


@pytest.mark.slow
def test_progress_falls_back_to_ascii() -> None:
    output = run_python(
        """
        import sys
        from dagkit import Pipeline
        sys.stderr = sys.stdout
        Pipeline({"more": lambda x: x + 1}, progress=True).run(x=1)
        """,
        PYTHONIOENCODING="ascii",
    )
    assert output.splitlines()[0].startswith("+ more   ran")
    assert " - 1 ran" in output


# A real kernel


def run_notebook(folder: Path, *sources: str) -> tuple[list[list[Any]], list[list[Any]]]:
    """Run cells in a real Jupyter kernel; return the outputs of each, and all displays of each.

    The second list has the frames of a live picture, where the first has the last one only.
    """
    import nbclient
    import nbformat

    frames: list[list[Any]] = [[] for _ in sources]

    class Client(nbclient.NotebookClient):
        def process_message(self, message: Any, cell: Any, index: int) -> Any:
            if message["msg_type"] in ("display_data", "update_display_data"):
                frames[index].append(message["content"])
            return super().process_message(message, cell, index)

    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    book = nbformat.v4.new_notebook(cells=cells)
    Path.home().mkdir(exist_ok=True)  # of this process, where Jupyter looks for kernels
    env = {**os.environ, "PYTHONPATH": str(HERE), "HOME": str(folder)}
    env["DAGKIT_STORE"] = str(folder / "store")
    Client(book, timeout=120, allow_errors=True).execute(env=env)
    return [cell.outputs for cell in book.cells], frames


LIVE_STEPS = """
import os, signal, threading, time
from dagkit import Pipeline, Step, step
@step
def load(path):
    time.sleep(0.3); return 1
@step(cache=True)
def clean(load):
    time.sleep(0.3); return load
@step
def fit(clean, alpha=0.1):
    time.sleep(0.3)
    if alpha > 1: raise ValueError("alpha is too large")
    if alpha < 0: os.kill(os.getpid(), signal.SIGINT); time.sleep(60)
    return alpha
@step
def report(fit):
    return str(fit)
pipeline = Pipeline(__name__)
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    return run_notebook(
        tmp_path_factory.mktemp("notebook"),
        LIVE_STEPS,
        "pipeline",
        "pipeline.plan(path='x')",
        "run = pipeline.run(path='x')",
        "run",
        "pipeline.run(path='x', alpha=2)",
        "pipeline.run(path='x', alpha=-1)",
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(2) as pool:\n"
        "    Pipeline(pipeline, executor=pool).run('fit', path='y')\n",
        "import loky\npool = loky.ProcessPoolExecutor(2)\n"
        "Pipeline(pipeline, executor=pool).run('fit', path='z')\npool.shutdown();",
        "from distributed import Client\n"
        "with Client(n_workers=1, dashboard_address=':0') as client:\n"
        "    Pipeline(pipeline, executor=client).run('fit', path='w');",
        "cached = Pipeline(Step(lambda x: x, name='kept', cache=True), progress=False)\n"
        "cached.run(x=1)\ncached.replace(progress='auto').run(x=1);",
        "quick = Pipeline({'more': lambda x: x + 1})\nfor x in range(5):\n    quick.run(x=x);",
        "@step\ndef report(fit):\n    return [fit]\npipeline.plan('report', path='x')",
        "pipeline.run('report', path='v')",
    )


def read_output(output: Any) -> list[str]:
    """Return the texts of the picture in an output of a notebook."""
    return read_svg_texts(read_picture(output["data"]["text/html"]))


@pytest.mark.slow
def test_a_cell_shows_pipeline_plan_and_run(notebook: Any) -> None:
    cells, _ = notebook
    for index, text in ((1, "path"), (2, "1 new"), (4, "0.3 s")):
        (output,) = cells[index]
        assert output["output_type"] == "execute_result"
        assert output["data"].keys() >= {"text/plain", "text/html"}
        assert {"load", text} <= set(read_output(output))
    assert "report = &#x27;0.1&#x27;" in cells[4][0]["data"]["text/html"]
    assert "clean" in cells[12][0]["data"]["text/plain"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "texts", "error"),
    [
        (3, {"4 ran"}, []),
        (5, {"1 failed", "ValueError", "1 cached", "needs fit"}, ["ValueError"]),
        (6, {"1 failed", "1 skipped", "needs fit"}, ["KeyboardInterrupt"]),
        (7, {"2 ran", "1 cached"}, []),
        (8, {"2 ran", "1 cached"}, []),
        (9, {"2 ran", "1 cached"}, []),
    ],
)
def test_a_live_run_leaves_one_output_with_the_last_state(
    notebook: Any, index: int, texts: set[str], error: list[str]
) -> None:
    """In the calling thread, after an error, after Ctrl-C; on threads, processes and Dask."""
    cells, _ = notebook
    (output,) = [output for output in cells[index] if output["output_type"] == "display_data"]
    assert output["data"].keys() >= {"text/plain", "text/html"}
    assert texts <= set(read_output(output))
    assert not {"running", "waiting"} & set(read_output(output))
    assert [o["ename"] for o in cells[index] if o["output_type"] == "error"] == error


@pytest.mark.slow
def test_each_step_of_a_plain_run_is_drawn_while_it_runs(notebook: Any) -> None:
    _, frames = notebook
    running = []
    for frame in frames[3]:
        rows = frame["data"]["text/plain"].splitlines()
        running += [row.split()[0] for row in rows if "▶ running" in row]
    assert list(dict.fromkeys(running)) == ["load", "clean", "fit", "report"]
    assert len(frames[3]) <= 9


@pytest.mark.slow
def test_what_is_stored_does_not_flash_and_many_short_runs_are_drawn_once(notebook: Any) -> None:
    cells, frames = notebook
    assert cells[10] == []
    assert len(cells[11]) == 1
    assert len(frames[11]) == 2
    assert sum(map(len, frames)) <= 70


@pytest.mark.slow
def test_a_run_that_its_cell_has_drawn_is_not_drawn_again(notebook: Any) -> None:
    cells, _ = notebook
    live, result = cells[13]
    assert "3 ran" in read_output(live)
    assert result["data"].keys() == {"text/plain"}


class Display:
    """Stands for a notebook: keeps the pictures that are displayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import IPython.display

        self.svgs: list[str] = []
        monkeypatch.setattr(dagkit, "_get_notebook_cell", lambda: 1)
        monkeypatch.setattr(IPython.display, "display", self.display)

    def display(self, picture: Any, display_id: bool) -> Any:
        self.update(picture)
        return self

    def update(self, picture: Any) -> None:
        self.svgs.append(read_picture(picture.html))


def test_a_live_picture_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """From frame to frame only looks and notes change: sizes and positions stay."""
    display = Display(monkeypatch)
    monkeypatch.setattr(dagkit, "_FRAMES_AT_ONCE", 1000)
    make_ml_pipeline().replace(progress="auto").run(**ML_INPUTS)
    assert len(display.svgs) >= 7
    boxes = set()
    for svg in display.svgs:
        size = re.findall(r'viewBox="([^"]+)"', svg)
        corners = re.findall(r'<g transform="translate([^"]+)">', svg)
        sizes = re.findall(r'<rect width="(\d+)" height="(\d+)"', svg)
        boxes.add((*size, *corners, *sizes))
    assert len(boxes) == 1
    assert len(boxes.pop()) > 1 + 12 + 2 * 7
    assert read_svg_texts(display.svgs[-1])[:4] == ["5 ran", "1 failed", "1 skipped", "path"]


def test_frames_are_few_however_many_steps_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    display = Display(monkeypatch)
    Pipeline([make_function(f"s{index}") for index in range(90)]).run()
    assert 2 <= len(display.svgs) <= 10


def test_a_display_that_fails_is_one_warning_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("the frontend is gone")

    display = Display(monkeypatch)
    monkeypatch.setattr(display, "update", fail)
    pipeline = Pipeline(twice, {"last": lambda twice: twice})
    run, texts = catch_warnings(lambda: pipeline.run(x=1))
    assert run["last"] == 2
    assert len(texts) == 1
    assert "the frontend is gone" in texts[0]


########################################################################################
### Plan
########################################################################################


def test_a_plan_is_a_mapping_of_the_steps_that_would_run(shop: Pipeline) -> None:
    plan = shop.plan("mean", prices=[1])
    assert isinstance(plan, Plan)
    assert get_statuses(plan) == "total uncached, mean uncached"
    assert list(shop.plan("mean", total=3, prices=[1])) == ["mean"]
    assert repr(plan) == "<Plan of 'pipeline': 2 uncached>"
    assert plan._ipython_key_completions_() == ["total", "mean"]


def test_a_plan_runs_nothing() -> None:
    calls: list[int] = []
    plan = Pipeline(Step(calls.append, name="call", args={"object": "x"}, cache=True)).plan(x=1)
    assert (plan["call"].status, calls) == ("new", [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "men",
            "'men' is not a step of this plan\n  known steps: mean, total; did you mean 'mean'?",
        ),
        (None, "None is not a step of this plan\n  known steps: mean, total"),
        ([1], "[1] is not a step of this plan\n  known steps: mean, total"),
    ],
)
def test_an_unknown_step_of_a_plan_is_an_error(shop: Pipeline, name: Any, message: str) -> None:
    plan = shop.plan("mean", prices=[1])
    with pytest.raises(NoValueError) as caught:
        plan[name]
    assert str(caught.value) == message
    assert name not in plan


########################################################################################
### Run
########################################################################################


def test_a_run_is_a_mapping_of_its_targets_with_inputs_and_steps(shop: Pipeline) -> None:
    run = shop.run("mean", prices=[1, 2])
    assert isinstance(run, Run)
    assert (dict(run), len(run), "total" in run) == ({"mean": 1.5}, 1, False)
    assert run.inputs == {"prices": [1, 2], "digits": 2}
    assert get_statuses(run) == "total ran, mean ran"
    assert all(0 <= s.seconds < 10 and s.attempts == 1 for s in run.steps.values())
    assert run.errors == {}
    assert re.fullmatch(r"<Run of 'pipeline': 2 ran, \d+ ms>", repr(run))
    assert run._ipython_key_completions_() == ["mean"]


def test_a_printed_run_shows_the_values_of_its_targets(shop: Pipeline) -> None:
    text = re.sub(r"\d+ ms", "9 ms", str(shop.run("mean", "low", prices=[1, 2])))
    assert text.splitlines() == [
        "pipeline · 3 steps, 2 inputs · 3 ran · 9 ms",
        "  total                prices                  ■ ran   9 ms",
        "  mean                 total, prices, digits   ■ ran   9 ms",
        "  bounds → low, high   prices                  ■ ran   9 ms",
        "",
        "  mean = 1.5",
        "  low = 1",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("total", "'total' was not a target of this run\n  known names: mean"),
        ("men", "'men' was not a target of this run\n  known names: mean; did you mean 'mean'?"),
        (0, "0 was not a target of this run\n  known names: mean"),
        ([1], "[1] was not a target of this run\n  known names: mean"),
    ],
)
def test_a_name_without_a_value_says_why(shop: Pipeline, name: Any, message: str) -> None:
    run = shop.run("mean", prices=[1, 2])
    with pytest.raises(NoValueError) as caught:
        run[name]
    assert str(caught.value) == message
    assert (run.get(name, 7), name in run) == (7, False)


def test_a_value_that_a_failed_or_skipped_step_owes_says_why() -> None:
    steps = {"bad": lambda: 1 / 0, "next": lambda bad: bad}
    run = Pipeline(steps, on_error="continue").run()
    for name, message, step_name in (
        ("bad", "step 'bad' failed: ZeroDivisionError: division by zero", "bad"),
        ("next", "step 'next' was skipped: needs bad", "next"),
    ):
        with pytest.raises(NoValueError) as caught:
            run[name]
        assert (str(caught.value), caught.value.step, caught.value.name) == (
            message,
            step_name,
            name,
        )


def test_a_pickled_run_may_have_steps_that_take_nothing() -> None:
    run = pickle.loads(pickle.dumps(Pipeline({"five": lambda: 5}).run()))
    assert (run["five"], get_statuses(run)) == (5, "five ran")


def test_a_record_is_ready_for_json(shop: Pipeline) -> None:
    record = json.loads(json.dumps(shop.run("total", prices=[1]).record))
    assert record["inputs"]["prices"]["value"] == [1]
    assert list(record["steps"]) == ["total"]
    assert (record["status"], record["dagkit"]) == ("ran", dagkit.__version__)


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize("cache", [False, True])
def test_a_run_can_be_copied_and_pickled(
    shop: Pipeline, cache: bool, clone: Callable[[Any], Any]
) -> None:
    """Also if its steps are lambdas, and its values are in the store."""
    each = Step(lambda price: -price, name="each", args={"price": "prices"}, map="price")
    pipeline = Pipeline(shop, each, {"fail": lambda total: 1 / 0}, on_error="continue", cache=cache)
    run = pipeline.run("mean", "bounds", "each", "fail", prices=[1, 2])
    twin = clone(run)
    assert (dict(twin), twin.inputs, twin.record) == (dict(run), run.inputs, run.record)
    assert [(s.name, s.status) for s in twin.steps.values()] == [
        (s.name, s.status) for s in run.steps.values()
    ]
    assert type(twin.errors["fail"]) is ZeroDivisionError
    assert str(twin).splitlines()[:2] == str(run).splitlines()[:2]
    with pytest.raises(NoValueError, match="step 'fail' failed: ZeroDivisionError"):
        twin["fail"]


########################################################################################
### Pipeline
########################################################################################


def test_sources_of_every_kind_can_be_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("shop_module")
    exec("def tax(total): return total / 10", vars(module))
    monkeypatch.setitem(sys.modules, "shop_module", module)
    pipeline = Pipeline(
        "shop_module",
        [total, (function for function in [mean])],
        {"doubled": lambda total: 2 * total},
        Step(lambda tax: -tax, name="negative"),
        Pipeline(bounds),
    )
    for _ in range(2):
        assert sorted(pipeline.steps) == ["bounds", "doubled", "mean", "negative", "tax", "total"]
        assert pipeline.run("negative", "doubled", prices=[10])["negative"] == -1


@pytest.mark.parametrize(
    ("source", "text"),
    [(3, "3"), (None, "None"), ([3], "3"), ([len], "<built-in function len>")],
)
def test_a_source_without_steps_is_an_error(source: Any, text: str) -> None:
    with pytest.raises(StepError) as caught:
        Pipeline(total, source)
    assert str(caught.value) == (
        f"Pipeline() was given {text}, which contains no steps\n"
        "  expected a module, a module's name, a mapping such as globals(), a function, a Step, "
        "a Pipeline, or an iterable of these\n"
        "  a callable object becomes a step by Step(thing, name=...)"
    )


@pytest.mark.parametrize("name", ["no_such_module", "no such module", "", "..", "os.no_such"])
def test_a_module_that_cannot_be_imported_is_an_error(name: str) -> None:
    pipeline = Pipeline(name)
    for use in (pipeline.run, pipeline.plan, lambda: pipeline.steps):
        with pytest.raises(StepError) as caught:
            use()
        lines = str(caught.value).splitlines()
        assert lines[0].startswith(
            f"Pipeline() was given '{name}', but a module of this name cannot be imported: "
        )
        assert lines[1] == "  expected a name such as __name__"
        assert caught.value.__cause__ is not None
    assert "cannot be imported" in repr(pipeline)


def test_a_module_with_marked_steps_provides_only_those() -> None:
    scope: dict[str, Any] = {"step": step, "__name__": "m"}
    exec("@step\ndef a(): return 1\ndef helper(): ...\n_old = a", scope)
    assert list(Pipeline(scope).steps) == ["a"]


def test_a_module_without_marked_steps_provides_its_own_public_functions() -> None:
    """So an example module of another library runs unchanged."""
    module = types.ModuleType("plain")
    code = "from os.path import join\ndef a(): return 1\ndef b(a): return a + 1\ndef _c(): ..."
    exec(code, vars(module))
    assert list(Pipeline(module).steps) == ["a", "b"]
    assert Pipeline(module).run("b")["b"] == 2


def test_a_redefined_step_is_used_by_the_next_run() -> None:
    """As in a notebook, where a cell is run again; IPython keeps old results as _, __ and _12."""
    cells: dict[str, Any] = {"step": step, "__name__": "__main__"}
    pipeline = Pipeline(cells)
    exec("@step\ndef a(): return 1\n@step\ndef b(a): return a + 1", cells)
    assert pipeline.run("b")["b"] == 2
    cells["_"] = cells["_12"] = cells["a"]
    exec("@step\ndef a(x=10): return x", cells)
    assert pipeline.run("b")["b"] == 11
    assert list(pipeline.graph.predecessors("a")) == ["x"]
    del cells["b"]
    with pytest.raises(InputError):
        pipeline.run("b")


def test_a_function_changed_in_place_is_noticed() -> None:
    """IPython's autoreload puts new code into the old function."""
    one = make_function("a", "x=1", body="return x")
    other = make_function("a", "y=5", body="return y")
    pipeline = Pipeline(one)
    assert pipeline.run()["a"] == 1
    one.__code__ = other.__code__
    one.__defaults__ = other.__defaults__
    assert pipeline.run()["a"] == 5
    assert list(pipeline.inputs) == ["y"]


def test_a_reloaded_module_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "followed_steps.py"
    file.write_text("def a(): return 1\n")
    pipeline = Pipeline("followed_steps")
    assert pipeline.run()["a"] == 1
    file.write_text("def a(b): return b\ndef b(): return 22\n")
    importlib.invalidate_caches()
    importlib.reload(sys.modules["followed_steps"])
    assert pipeline.run("a")["a"] == 22


def test_a_plain_mapping_names_steps_by_its_keys_and_is_followed() -> None:
    steps: dict[str, Any] = {"more": lambda x: x + 1}
    pipeline = Pipeline(steps)
    assert pipeline.run(x=1)["more"] == 2
    steps["twice"] = lambda more: 2 * more
    assert pipeline.run(x=1)["twice"] == 4
    steps["half"] = steps.pop("twice")
    assert sorted(pipeline.run(x=1)) == ["half", "more"]


@pytest.mark.parametrize("key", ["not good", 3, True])
def test_a_key_that_cannot_be_a_name_is_an_error(key: Any) -> None:
    with pytest.raises(StepError, match="name: expected a name that an argument can have"):
        Pipeline({key: lambda: 1}).run()


def test_any_argument_name_is_usable_as_an_input() -> None:
    def use(self: int, targets: int, inputs: int, name: int) -> int:
        return self + targets + inputs + name

    assert Pipeline(use).run("use", self=1, targets=2, inputs=3, name=4)["use"] == 10


EXPECTED = {
    "cache": "True, False or a timedelta",
    "store": "a Store or the path of a folder",
    "executor": "an object with submit(), such as a ThreadPoolExecutor",
    "catalog": "a dict: name -> path, or object with load() and save(value)",
    "on_event": "a callable or several, each for one Event",
    "progress": "True, False or 'auto'",
    "on_error": "'raise' or 'continue'",
    "name": "a text without control characters",
}


@pytest.mark.parametrize(
    "options",
    [
        {"cache": 3},
        {"store": 5},
        {"executor": 3},
        {"catalog": "x"},
        {"on_event": None},
        {"on_event": [print, 3]},
        {"progress": "yes"},
        {"progress": 1},
        {"on_error": "x"},
        {"on_error": []},
        {"progress": np.zeros(2), "on_error": np.zeros(2)},
        {"name": 3},
        {"name": "\x1b[31mred"},
        {"name": "two\nlines"},
        {"store": 5, "on_error": "x"},
    ],
)
def test_wrong_options_of_a_pipeline_are_errors_that_say_what_is_expected(
    options: dict[str, Any],
) -> None:
    texts = ", ".join(f"{name}={summarize(value)}" for name, value in options.items())
    lines = [f"  {name}: expected {EXPECTED[name]}" for name in options]
    calls: list[Callable[[], Any]] = [
        lambda: Pipeline(total, **options),
        lambda: Pipeline(total).replace(**options),
    ]
    for make in calls:
        with pytest.raises(StepError) as caught:
            make()
        assert str(caught.value).splitlines() == [f"Pipeline() has {texts}", *lines]


def test_replace_changes_sources_or_options(shop: Pipeline, tmp_path: Path) -> None:
    one = Pipeline(shop, total, [mean], store=tmp_path / "new", name="one")
    other = one.replace(on_error="continue")
    assert list(other.steps) == list(one.steps)
    assert (other.store.path, repr(other)) == (one.store.path, repr(one))
    assert list(one.replace({"less": lambda x: x - 1}).steps) == ["less"]
    assert one.replace(name="").run(prices=[1]).record["pipeline"] == "pipeline"
    with pytest.raises(StepError) as caught:
        one.replace(stor=tmp_path)
    assert str(caught.value) == (
        "Pipeline() has no option 'stor'\n"
        "  known options: cache, catalog, executor, name, on_error, on_event, progress, store; "
        "did you mean 'store'?"
    )


def test_a_store_and_a_name_and_a_catalog_survive_copies_and_pickles(tmp_path: Path) -> None:
    options: dict[str, Any] = {"store": tmp_path / "new", "catalog": {"total": "t.json"}}
    pipeline = Pipeline(total, mean, name="ml", **options)
    for twin in (
        copy.copy(pipeline),
        copy.deepcopy(pipeline),
        pickle.loads(pickle.dumps(pipeline)),
        pickle.loads(pickle.dumps(copy.copy(pipeline))),
    ):
        assert repr(twin) == repr(pipeline)
        assert (twin.store.path, twin.catalog) == (pipeline.store.path, {"total": "t.json"})


def test_a_copy_keeps_what_cannot_be_pickled() -> None:
    events: list[Event] = []
    with ThreadPoolExecutor(1) as executor:
        pipeline = Pipeline({"one": lambda: 1}, executor=executor, on_event=events.append)
        assert copy.copy(pipeline).run()["one"] == 1
    assert "step submitted" in [event.kind for event in events]


def test_cache_is_the_default_of_steps_that_do_not_say_otherwise() -> None:
    @sensor
    def arrival() -> bool:
        return True

    steps: list[Any] = [
        arrival,
        Step(lambda: 1, name="plain"),
        Step(lambda: 1, name="never", cache=False),
        Step(lambda: 1, name="daily", cache=timedelta(days=1)),
    ]
    for cache in (True, timedelta(hours=1)):
        pipeline = Pipeline(steps, cache=cache)
        assert [step.cache for step in pipeline.steps.values()] == [
            None,
            cache,
            False,
            timedelta(days=1),
        ]
    pipeline.run()
    assert get_statuses(pipeline.run()) == "arrival ran, plain cached, never ran, daily cached"


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_run_is_recorded_if_the_store_is_used_also_if_it_failed(
    is_stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGKIT_STORE")
    monkeypatch.chdir(tmp_path)

    def check(x: list[int]) -> int:
        x.append(5)
        return 1 // (len(x) - 2)

    pipeline = Pipeline(check, cache=is_stored)
    pipeline.run(x=[0, 1])
    with pytest.raises(ZeroDivisionError):
        pipeline.run(x=[0])
    rows = pipeline.history()
    assert len(rows) == 2 * is_stored
    assert Path(".dagkit").exists() == is_stored
    if is_stored:
        assert [row["status"] for row in rows] == ["ran", "failed"]
        # The inputs are recorded as they were before the run.
        assert [row["inputs.x"] for row in rows] == [[0, 1], [0]]
        assert rows[1]["error"].startswith("ZeroDivisionError: ")


def test_a_repr_counts_steps_and_names_what_nothing_needs(shop: Pipeline) -> None:
    assert repr(shop) == "<Pipeline 'pipeline': 4 steps, 2 inputs, targets mean, spread>"
    assert repr(Pipeline()) == "<Pipeline 'pipeline': 0 steps, 0 inputs, targets none>"
    assert repr(Pipeline(__name__)).startswith("<Pipeline 'test_dagkit': ")
    assert repr(Pipeline(sys.modules[__name__])) == repr(Pipeline(__name__))
    after = Pipeline(total, Step(lambda: 1, name="last", after="total"), name="ml")
    assert repr(after) == "<Pipeline 'ml': 2 steps, 1 input, targets last>"


def test_a_broken_pipeline_can_be_looked_at() -> None:
    pipeline = Pipeline({"a": lambda b: b, "b": lambda a: a})
    assert repr(pipeline) == (
        "<Pipeline 'pipeline': CycleError: steps depend on each other: a -> b -> a>"
    )
    assert "CycleError: steps depend on each other: a -> b -> a" in str(pipeline)
    for use in (pipeline.run, pipeline.plan, lambda: pipeline.graph, lambda: pipeline.inputs):
        with pytest.raises(CycleError) as caught:
            use()
        frames = traceback.extract_tb(caught.value.__traceback__)
        assert len([frame for frame in frames if frame.filename == dagkit.__file__]) <= 2


def test_importing_dagkit_and_a_run_do_not_import_networkx() -> None:
    code = """
        import sys, dagkit
        assert dagkit.Pipeline({"more": lambda x: x + 1}).run(x=1)["more"] == 2
        assert "networkx" not in sys.modules
        dagkit.Pipeline({"more": lambda x: x + 1}).graph
        assert "networkx" in sys.modules
    """
    assert run_python(code) == ""


########################################################################################
### Platforms: code objects of each Python
########################################################################################

# Rows as in EDITS, all of one file, and run in this process: on a Python whose code objects are
# laid out in another way than we know, some of them fail. A row behind [3.14] needs that version.

KEEPING_SNIPPETS = r'''
comment, blank lines :: def step(x):⏎«→    # a comment⏎⏎»    return x
docstring edited :: def step(x):⏎    «"""One."""→"""Another, longer one."""»⏎    return x
docstring added :: def step(x):⏎«    pass→    """One."""»
moved down, with a handler :: «→⏎⏎⏎⏎»def step(x):⏎    try:⏎        return [v for v in x]
⏎    except OSError as e:⏎        raise ValueError from e
line breaks and brackets :: def step(x, y):⏎    return «f(x, y, x + 1)→(⏎        f(⏎            x,
⏎            y,
⏎            x⏎            + 1,⏎        )⏎    )»
lines joined :: def step(x):⏎    while True:«⏎        → »x += 1⏎    for v in x:«⏎        → »f(v)
block on one line :: def step(x):⏎    try:«⏎        → »f(x)⏎    except OSError:«⏎        → »pass
⏎    with x:«⏎        → »g()
quotes, digits, escapes :: = «('a', 1000, 255)→("\x61", 1_000, 0xff)»
folded constant :: = x + «6→2 * 3»
annotations :: def step(«x: int, *, k=1→x: str, *, k: list[int]=1») «→-> str »: return x
variable annotation in a function :: def step(x):⏎    y«→: int» = x⏎    return y
future import :: «→from __future__ import annotations⏎»def step(x: int): return x
closure moved :: def make(n):⏎«→⏎⏎»    def step(x): return x + n⏎    return step⏎step = make(1)
inner docstring :: def step(x):⏎    def f():⏎        «'a'→'b'»⏎        return x⏎    return f()
local class moved, docstring edited :: «→⏎»def step(x):⏎    class L:⏎        «"a"→"bcd"»
⏎        k = 1
⏎        def f(self): self.u = self.v = 1⏎    return L
class moved, docstring edited :: «→⏎»class M:⏎    «"a"→"bcd"»⏎    k: int = 1
⏎    def f(self): self.u = self.v = 1⏎step = M
set constant's order :: = x in «{'a', 'b', 3, None}→{None, 3, 'b', 'a'}»
300 constants, docstring added :: def step(x):⏎    «pass→'A docstring.'»⏎    for v in x:
⏎        if v == 0: break⏎        y = [@300@]⏎    return y
long jump, moved :: «→⏎»def step(x):⏎    while x:⏎        x = x.f(@300@)⏎    return x
'''

CHANGING_SNIPPETS = r"""
constants of each kind :: = (x, «1→2», «255→256», «256→257», «-1→-2», «2**80→2**81», «1.5→2.5»,
⏎ «0.0→-0.0», «1j→2j», «complex(-0.0, 1)→complex(0.0, 1)», «'a'→'b'», «b'a'→b'b'», «None→True»,
⏎ «True→False», «...→None», «1→1.0», «1→True», «'a'→b'a'»)
nested constants :: = (x, «(1, (2, (3,)))→(1, (2, (4,)))», «()→(None,)»,
⏎ «((), 1)→(1, ())», «(0,)→(-0.0,)»)
slices :: = x[«1→2»:«3→4», ::«2→3», «...→None», «5→5:», «:1→1:»]
slices that are constants :: = x[1:2, (3, slice(«4→5»))]
constant sets :: = x in {«'a'→'b'», 1} or x in {(1, «2→3»), 0}
operators :: = (x «+→-» 1, x «*→@» 2, x «/→//» 2, x «%→**» 2,
⏎ x «<<→>>» 2, x «&→|» 2, x «^→&» 2, «-→~»x, «not →»x)
augmented operators :: def step(x):⏎    x «+=→-=» 1⏎    x «|=→= x |» 1⏎    return x
comparisons :: = (x «<→<=» 1, x «==→!=» 2, x «>→>=» 3, x «is→is not» x,
⏎ x «in→not in» [x], 1 < x «<→<=» 3)
None and truth :: = (1 if x is «None→not None» else 2, 1 if «x→not x» else 2, x «and→or» 1)
f-strings :: = f"{x«→!r»} {x:«>3→>4»} {x:{x}«→d»} {x«!r→!s»} «b→c»"
names :: = («int→str», x.«real→imag», x.«f→g»(), «len→abs»(x), x.a.«b→c», «a→b».c)
order of arguments :: def step(x, y):
⏎    return («x - y→y - x», f(«x, y→y, x»), f(a=«x, b=y→y, b=x»))
keywords of a call :: = f(x, «a→b»=1, c=2, *«[]→[1]», **«{}→{'d': 3}»)
keywords of a call, their order :: = f(«a=x, b=x→b=x, a=x»)
names of arguments :: def step(«x, y→y, x»): return x
kinds of arguments :: def step(«x, y→x, /, y», «*, →»z=1, **a): return x
other arguments :: def step(x, «*a→**a»): return x
arguments that were positional :: def step(x, «→*, »y): return x
displays :: = ([x«→, x»], {'a': «x→1»}, {x«→, 1»}, «(x, 1)→[x, 1]»,
⏎ [*x«→, *x»], {«**x→'a': x»}, [1, 2, «3→4»])
comprehensions :: = ([v for v in x if v «>→<» 1], {v: «1→2» for v in x},
⏎ [w for v in x for w in «v→x»])
comprehensions of one kind :: = «[v for v in x]→{v for v in x}»
generator expressions :: = list(v «+→-» 1 for v in x)
lambdas :: = (lambda v, w=«1→2»: v «+→-» w)(x)
branches :: def step(x):⏎    if x: return «1→2»⏎    elif «x→not x»: return 3⏎    else: return «4→5»
loops :: def step(x):⏎    for v in x:⏎        if v: «break→continue»⏎    else: return «1→2»
⏎    return 3
loop's place of a statement :: def step(x):⏎    for v in x:⏎        f(v)⏎«    →»    g(x)
⏎    return x
while :: def step(x):⏎    while x «>→<» 1:⏎        x «-→+»= 1⏎    return x
unpacking :: def step(x):⏎    a, «*b→b» = x⏎    («a, c→c, a») = x⏎    return a
subscripts and attributes stored :: def step(x):⏎    x[«0→1»] = 1⏎    x.«a→b» = 2
⏎    del x«[0]→[1]», x.«c→d»
walrus :: def step(x):⏎    return («a := x→x», 1)
global and nonlocal :: def step(x):⏎    «global G→nonlocal_ = 0»⏎    G = x⏎    return G
nonlocal :: def make():⏎    k = 1⏎    def step(x):⏎        «nonlocal k→pass»⏎        k = x
⏎        return k
⏎    return step⏎step = make()
closure's name :: def make(a, b):⏎    def step(x): return («a→b», a, b)⏎    return step
⏎step = make(1, 2)
exceptions :: def step(x):⏎    try: f()⏎    except «ValueError→TypeError»: return «1→2»
⏎    else: g(«3→4»)
⏎    finally: h(«5→6»)
what try covers :: def step(x):⏎    «f()⏎    try: g()→try: f(); g()»⏎    except ValueError: pass
⏎    return x
except with a name, raise from :: def step(x):⏎    try: f()
⏎    except OSError as e: raise ValueError(«1→2») from «e→None»
exception groups :: def step(x):⏎    try: f()⏎    except* «OSError→TypeError»: return_ = «1→2»
assert :: def step(x):⏎    assert x «>→<» 0, «'a'→'b'»⏎    return x
assert or raise :: def step(x):⏎    assert «x→not x»⏎    return x
with :: def step(x):⏎    with x.«a→b» as f, «open→g»(x): return f.read()
what with covers :: def step(x):⏎    with x:⏎        f()⏎«    →»    g()
generators :: def step(x):⏎    y = yield «1→2»⏎    yield from «x→y»⏎    return «3→4»
yield or return :: def step(x):⏎    «yield→return» x
async :: async def step(x):⏎    async with x.«a→b» as f: await f«()→(1)»
⏎    async for v in x: yield «v→1»
async comprehension :: async def step(x):⏎    return [«v→-v» async for v in x if await «f→g»(v)]
coroutine or not :: «async →»def step(x): return x
match :: def step(x):⏎    match x:⏎        case «1→2»: return 1
⏎        case {'a': «b→2», **r}: return 2
⏎        case int(«real→imag»=1): return 3⏎        case [a, «*_→_»]: return 4
⏎        case «str→bytes»(): return 5
⏎        case a if a «>→<» 1: return 6⏎        case _: return «7→8»
match or-patterns :: def step(x):⏎    match x:⏎        case 1 | «2→3» | None: return 4
super :: class B: pass⏎class M(B):
⏎    def f(self): return super().«a→b», «super().c()→super(B, self).c()»⏎step = M
local class :: def step(x):⏎    class L(«x→object»):⏎        a = «1→2»
⏎        def f(self): return «3→4»
⏎        @«property→staticmethod»⏎        def g(self): pass⏎    return L
local class's metaclass :: def step(x):⏎    class L(metaclass=«x→type»): pass⏎    return L
decorators of an inner function :: def step(x):⏎    @«f→g»
⏎    def h(v=«1→2», *, k=«3→4»): return «v→k»⏎    return h
imports :: def step(x):⏎    import «json→csv»⏎    from math import «sin→cos» as f
⏎    import os.path as «p→q»; return p
relative imports :: def step(x):⏎    from «.→..» import «helpers→others»
⏎    from .«helpers→others» import f
300 constants :: def step(x):⏎    for v in x: y = [@300@]; f('a', «'b'→'c'», «1000→1001»)
⏎    return «y→v»
300 names :: def step(x):⏎    return [@names@, «u1→u2»]
300 locals :: def step(x):⏎    @locals@⏎    return «v298→v299»
long jumps :: def step(x):⏎    for v in x:⏎        if v: «break→continue»⏎        y = [@300@]
⏎    return y
deep nesting :: def step(x):⏎    def f():⏎        def g():
⏎            return [lambda: «1→2» for _ in x]⏎        return g⏎    return f
string in a constant tuple :: = ('a', ('b', «'c'→'d'»))
__debug__ and builtins :: = («min→max»(x), «ValueError→KeyError», __name__«→ + 'a'»)
print to a keyword :: = print(x, sep=«'a'→'b'», «end→file»=None)
[3.12] type parameters :: def step[T](x: T) -> T: return x «+→-» 1
[3.12] type alias :: type A = «int→str»⏎= A.__value__(x)
[3.12] type alias in a function :: def step(x):⏎    type A = «list[int]→list[str]»⏎    return A
[3.12] generic class :: class C[T: int]:⏎    def f(self) -> T: return «1→2»⏎= C().f()
[3.12] f-string in an f-string :: = f"{f"{x«+→-»1}"}" if x else f"{'«a→b»'}"
[3.13] type parameter's default :: def step(x):⏎    class C[T = «int→str»]: pass⏎    return C
[3.14] template strings :: = t"{x«→!r»} {x:«>3→>4»} {x«+→-»1} «b→c»"
[3.14] template or f-string :: = «t→f»"{x}"
[3.14] except without brackets :: def step(x):⏎    try: f()
⏎    except OSError, «ValueError→TypeError»: return 1
[3.14] annotations that are read :: def h(«a: int→a: Later»): return a⏎= h.__annotations__
[3.15] lazy import :: lazy import «json→csv» as m⏎= m.f(x)
[3.15] lazy import from :: lazy from math import «sin→cos» as f⏎= f(x)
[3.15] frozendict :: K = frozendict(a=«1→2»)⏎= x in K
[3.15] frozendict's order :: K = frozendict(«a=1, b=2→b=2, a=1»)⏎= list(K)
[3.15] unpacking in comprehensions :: = [«*v→v» for v in x]
[3.15] sentinel :: «K = sentinel('K')→K = sentinel('L'); L = K»⏎= x is K
"""


def select_rows(table: str) -> list[str]:
    """Return the rows of a table that this Python can compile, without their versions."""
    rows = []
    for row in table.strip().replace("\n⏎", "⏎").splitlines():
        version, _, rest = row.removeprefix("[").partition("] ")
        if not row.startswith("["):
            rows.append(row)
        elif tuple(map(int, version.split("."))) <= sys.version_info:
            rows.append(rest)
    return rows


def read_snippets(table: str) -> dict[str, tuple[str, str]]:
    """Return the code before and after each edit, by its name."""
    table = table.replace("@300@", ", ".join(map(str, range(1000, 1300))))
    table = table.replace("@names@", ", ".join(f"n{i}" for i in range(300)))
    table = table.replace("@locals@", "; ".join(f"v{i} = x" for i in range(300)))
    snippets = {}
    for name, before, after in read_edits("\n".join(select_rows(table))):
        snippets[name] = (before["app.py"], after["app.py"])
    return snippets


def find_code_parts(code: str) -> dict[tuple[str, str], str]:
    """Find the parts of a step that this code defines, as a module that is in no file."""
    module = types.ModuleType("package.snippet")
    module.__package__ = "package"
    exec(compile(code, "<snippet>", "exec", dont_inherit=True), vars(module))
    return find_parts(module.step)


KEEPING = read_snippets(KEEPING_SNIPPETS)
CHANGING = read_snippets(CHANGING_SNIPPETS)


@pytest.mark.parametrize("name", KEEPING)
def test_an_edit_of_a_snippet_that_changes_nothing_does_not_count(name: str) -> None:
    before, after = KEEPING[name]
    assert find_code_parts(before) == find_code_parts(after)


@pytest.mark.parametrize("name", CHANGING)
def test_an_edit_of_a_snippet_that_changes_something_counts(name: str) -> None:
    before, after = CHANGING[name]
    assert find_code_parts(before) == find_code_parts(before)
    assert find_code_parts(before) != find_code_parts(after)


# Edits of several files, or of classes whose annotations are not evaluated.

MODULE_EDITS = r"""
named tuple :: from typing import NamedTuple⏎class P(NamedTuple):⏎    a: 'Later' = «1→2»⏎= P()
[3.12] generic helper :: from helpers import f⏎= f(x)⏎▸helpers⏎def f[T](x: T) -> T: return «x→-x»
[3.14] named tuple, later :: from typing import NamedTuple⏎class P(NamedTuple):
⏎    a: Later = «1→2»⏎= P()
[3.14] dataclass, later :: from dataclasses import dataclass⏎@dataclass⏎class M:
⏎    a: Later = «1→2»
⏎    def f(self) -> Nope: return «3→4»⏎= M().f()
[3.14] annotations that a helper reads :: from annotationlib import get_annotations, Format
⏎def h(«a: Later→a: Sooner»): return a⏎= get_annotations(h, format=Format.STRING)
[3.15] lazy from :: lazy from helpers import f⏎= f(x)⏎▸helpers⏎def f(x): «return 1→return 2»
[3.15] lazy module :: lazy import helpers⏎= helpers.f(x)⏎▸helpers⏎def f(x): «return 1→return 2»
[3.15] lazy in a helper :: import helpers⏎= helpers.g(x)⏎▸helpers⏎lazy from low import f
⏎def g(x): return f(x)⏎▸low⏎def f(x): «return 1→return 2»
[3.15] lazy, by getattr :: lazy from helpers import f⏎import sys
⏎= getattr(sys.modules[__name__], x)(x)
⏎▸helpers⏎def f(x): «return 1→return 2»
[3.15] lazy import of an unloaded module :: def step(x):⏎    import helpers⏎    return helpers.g(x)
⏎▸helpers⏎lazy from low import f⏎def g(x): return f(x)⏎▸low⏎def f(x): «return 1→return 2»
"""


def test_edits_of_modules_in_the_syntax_of_each_python_count(tmp_path: Path) -> None:
    edits = list(read_edits("\n".join(select_rows(MODULE_EDITS))))
    for number, (_, old_files, new_files) in enumerate(edits):
        write_files(tmp_path / "old" / str(number), old_files)
        write_files(tmp_path / "new" / str(number), new_files)
    tops = (tmp_path / "old", tmp_path / "new")
    before, after = [json.loads(run_in(top, PARTS_SCRIPT, TOP=str(top))) for top in tops]
    unseen = [edit[0] for n, edit in enumerate(edits) if before[str(n)] == after[str(n)]]
    assert unseen == []
    assert [text for text in before.values() if isinstance(text, str)] == []  # none is opaque


# Modules whose steps are cached. The steps of each run in one process, and are reused in another.

PYTHON_FEATURES = r"""
slices :: S = slice(1, None), (slice(2), ...)⏎@step
⏎def make(x): return [S, slice(x)], list(range(9))[1:x]
named tuple :: from typing import NamedTuple⏎class P(NamedTuple):⏎    a: int⏎    b: 'Later' = None
⏎@step⏎def make(x): return P(x)⏎@step⏎def use(make): return make.a, P(2)
dataclass :: from dataclasses import dataclass⏎@dataclass(slots=True, frozen=True)⏎class Node:
⏎    value: int⏎    next: 'Node | None' = None⏎@step⏎def make(x): return Node(x, Node(2))
⏎@step⏎def use(make): return make.next, Node(3)
protocol, typed dict :: from typing import Protocol, TypedDict, TypeVar⏎T = TypeVar('T')
⏎class P(Protocol[T]):⏎    def f(self) -> T: ...⏎class D(TypedDict):⏎    a: int⏎class Q(P[int]):
⏎    def f(self): return D(a=1)⏎@step⏎def make(x): return Q(), D(a=2), isinstance(Q(), Q)
⏎@step⏎def use(make): return make[0].f()
enums :: import enum⏎class C(enum.StrEnum):⏎    A = enum.auto()⏎class F(enum.Flag):⏎    A = 1
⏎    B = 2⏎@step⏎def make(x): return C.A, F.A | F.B, C⏎@step⏎def use(make): return make[0] is C.A
abstract class :: import abc⏎class A(abc.ABC):⏎    @abc.abstractmethod⏎    def f(self): ...
⏎class B(A):⏎    def f(self): return 1⏎@step⏎def make(x): return B().f(), isinstance(x, A), B()
[3.12] type parameters :: type Pair[T] = tuple[T, T]⏎class Box[T]:
⏎    def __init__(self, item: T): self.item = item⏎def first[T](x: T) -> T: return x
⏎@step⏎def make[T](x: T) -> Box[T]: return Box(first(x))
⏎@step⏎def use(make) -> Pair[int]: return make.item, Box[int](2), Pair
[3.14] forward references :: from dataclasses import dataclass⏎from typing import NamedTuple
⏎@dataclass⏎class Node:⏎    value: int⏎    next: Node | None = None⏎    other: Nowhere = None
⏎class P(NamedTuple):⏎    a: int⏎    b: Later = None⏎@step⏎def make(x): return Node(x), P(x)
⏎@step⏎def use(make): return make, Node(2), P(3)
[3.14] lazy annotations :: A: Nowhere = 1⏎@step⏎def make(x: Nowhere, *, k: Nowhere = 2) -> Nope:
⏎    def f(v: Nowhere) -> Nope: return v⏎    return f(x) + A
[3.14] classes as steps :: from dataclasses import dataclass⏎@dataclass⏎class Model:⏎    x: Nowhere
⏎    k: Nope = 3⏎class Call:⏎    def __call__(self, make: Nowhere) -> Nope: return make.x
⏎make = dagkit.Step(Model, name='make')⏎use = dagkit.Step(Call(), name='use')
[3.14] template strings :: K = 3⏎@step⏎def make(x): return t'{x!r:>5} {K}'
⏎@step⏎def use(make): return make, make.interpolations[0], [*make]
[3.14] placeholders :: from functools import partial, Placeholder⏎def f(a, b): return a - b
⏎make = dagkit.Step(partial(f, Placeholder, 2), name='make', args={'a': 'x'})
[3.15] frozendict :: K = frozendict(a=1, b=frozendict())⏎@step
⏎def make(x): return frozendict(x=x, k=K)
⏎@step⏎def use(make, k=K): return make, k, k is K, hash(make)
[3.15] sentinels :: MISSING = sentinel('MISSING')⏎ODD = sentinel('<odd>')
⏎@step⏎def make(x, k=MISSING, o=ODD): return k is MISSING, o is ODD, MISSING
⏎@step⏎def use(make): return make[2] is MISSING
[3.15] lazy imports :: lazy import statistics⏎lazy from helpers import double
⏎@step⏎def make(x): return double(x), statistics.mean([x, 2])
"""

FEATURES_SCRIPT = """
import importlib, json, os, sys, warnings
import dagkit

warnings.simplefilter("error")
outcomes = {}
for folder in sorted(os.listdir()):
    sys.path.insert(0, os.path.abspath(folder))
    app = importlib.import_module("app" + folder)
    pipeline = dagkit.Pipeline(app, cache=True, store=os.path.abspath("../store" + folder))
    texts = [pipeline.show().svg, *[step.definition for step in pipeline.steps.values()]]
    plan = pipeline.plan(x=3)
    run = pipeline.run(x=3)
    outcomes[folder] = sorted({state.status for state in [*plan.values(), *run.steps.values()]})
    del sys.path[0]
print(json.dumps(outcomes))
"""


@pytest.mark.slow
def test_steps_in_the_syntax_of_each_python_are_reused(tmp_path: Path) -> None:
    names = {}
    for number, row in enumerate(select_rows(PYTHON_FEATURES)):
        names[str(number)], _, code = row.partition(" :: ")
        code = f"import dagkit⏎from dagkit import step⏎{code}".replace("⏎", "\n")
        files = {f"app{number}.py": code, "helpers.py": "def double(x): return 2 * x\n"}
        write_files(tmp_path / "apps" / str(number), files)

    def run_all() -> dict[str, list[str]]:
        outcomes = json.loads(run_python(FEATURES_SCRIPT, tmp_path / "apps"))
        return {name: outcomes[number] for number, name in names.items()}

    first = run_all()
    assert {name: states for name, states in first.items() if "ran" not in states} == {}
    assert run_all() == {name: ["cached", "fresh"] for name in first}


########################################################################################
### Platforms: what Linux has and others lack
########################################################################################

# Each of these is the start of a Python that lacks something, for the process and those it starts.
# What a module looks up when it is imported must be gone by then.

WINDOWS_FILES = """
def find_open_files():
    paths = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    with open("/proc/self/maps", encoding="utf-8") as file:
        return paths | {line.split(None, 5)[-1].strip() for line in file if "/" in line}

def refuse_open_files(function):
    def wrapper(*paths, **options):
        open_files = find_open_files()
        for path in paths:
            if os.path.realpath(path) in open_files:
                raise PermissionError(13, "The process cannot access the file", str(path))
        return function(*paths, **options)
    return wrapper

for name in ("replace", "rename", "remove", "unlink"):
    setattr(os, name, refuse_open_files(getattr(os, name)))
"""

LACKS = {
    "nothing": "",
    "fcntl": "sys.modules['fcntl'] = None",
    "locks": "import fcntl\nfcntl.lockf = refuse",
    "users": "del os.geteuid, os.getuid",
    "flags of open": "del os.O_NOFOLLOW, os.O_NONBLOCK",
    "links": "del os.link, os.symlink",
    "refused links": "os.link = refuse",
    "processors": "os.cpu_count = lambda: None",
    "threads": "import threading\nthreading.Thread.start = refuse_threads",
    "replacing open files": WINDOWS_FILES,
    "different cases": "os.path.normcase = str.lower",
    "fork": "import multiprocessing\nmultiprocessing.set_start_method('spawn')\n"
    "del os.fork, os.register_at_fork",
    "unicode": "sys.stdout.reconfigure(encoding='cp1252')",
}
LACKS["all that Windows lacks"] = "\n".join(
    code for name, code in LACKS.items() if name not in ("locks", "refused links", "threads")
)

CUSTOMIZATION = """
import errno, os, sys

def refuse(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")

def refuse_threads(*_):
    raise RuntimeError("can't start new thread")

"""

SCENARIO = '''
import concurrent.futures, datetime, json, os, pathlib, pickle, sys, threading, warnings
import dagkit
from dagkit import CatalogError, Pipeline, Skip, Step, step

warnings.simplefilter("error")

@step
def twice(x): return [2 * item for item in x]

@step(cache=True, outputs=("low", "high"))
def split(twice, limit=5): return [i for i in twice if i < limit], [i for i in twice if i >= limit]

@step(cache=True)
def Model(low, high): return {"größe": len(low), "→": high}

@step(cache=True)
def model(Model): return sorted(Model)

def make(size): return list(range(size // 100)), b"x" * size

def use_twice(make): return len(make[0]) + len(make[1])

def list_statuses(run): return " ".join(state.status for state in run.steps.values())

def check_core():
    assert dict(Pipeline(twice, split).run("high", x=[1, 2, 3])) == {"high": [6]}
    run = Pipeline({"bad": lambda x: 1 / x, "after": lambda bad: bad}, on_error="continue").run(x=0)
    assert list_statuses(run) == "failed skipped"
    try:
        Pipeline({"bad": lambda x: 1 / x}).run(x=0)
    except ZeroDivisionError as error:
        assert error.__notes__[0].startswith("in step 'bad' at ")
    async def later(x): return x + 1
    if LACK != "threads":
        assert Pipeline(later).run(x=1)["later"] == 2
    print(run, Pipeline(twice, split), Pipeline(twice, split, Model).plan(x=[1]), sep="\\n")
    print(Pipeline(twice, split, Model).show())
    Pipeline(twice, progress=True).run(x=[1])

def check_cache():
    for status in ("ran ran ran ran", "ran cached cached cached"):
        pipeline = Pipeline(twice, split, Model, model)
        run = pipeline.run(x=[1, 2, 4])
        assert (run["model"], run["Model"]) == (["größe", "→"], {"größe": 2, "→": [8]})
        assert list_statuses(run) == status, list_statuses(run)
    assert pipeline.plan(x=[1, 2, 4], limit=3)["split"].reason == "input limit 5 → 3"
    assert [record["status"] for record in pipeline.history()][-2:] == ["ran", "ran"]
    large = Pipeline(Step(make, cache=True), Step(use_twice, cache=True))
    values = []
    for status in ("ran ran", "cached cached"):
        for size in (500, 10_000, 34_000_000):  # in the entry, in a file; the last one is large
            run = large.run(size=size)
            assert run["make"] == make(size)
            assert list_statuses(run) == status, list_statuses(run)
            values.append(run["make"])
    large.store.clear("make")
    assert large.plan(size=500)["make"].status == "new"
    assert list_statuses(large.run(size=500)) == "ran cached"
    names = [str(path).lower() for path in pathlib.Path("store").rglob("*")]
    assert len(set(names)) == len(names) > 10

def check_open_files():
    """A value is mapped, an entry and a file of the catalog are open, while they are written."""
    import numpy
    def zeros(size): return numpy.zeros(size)
    pipeline = Pipeline(Step(zeros, cache=True))
    pipeline.run(size=5_000_000)
    mapped = pipeline.run(size=5_000_000)["zeros"]
    pipeline.store.prune(max_bytes=0)
    assert (pipeline.run(size=5_000_000)["zeros"] == mapped).all()
    pipeline = Pipeline(Step(zeros, cache=datetime.timedelta(microseconds=1)), store="other")
    pipeline.run(size=1)
    (path,) = pathlib.Path("other").glob("entries/*/zeros/*")
    with open(path, "rb") as file:
        if LACK != "threads":
            threading.Timer(0.03, file.close).start()
        assert list_statuses(pipeline.run(size=1)) == "ran"
    pipeline = Pipeline(zeros, catalog={"zeros": "zeros.npy"})
    pipeline.run(size=1)
    with open("zeros.npy", "rb"):
        if WINDOWS_FILES:
            try:
                pipeline.run(size=2)
            except PermissionError as error:
                assert "zeros.npy" in error.__notes__[0]
            else:
                raise AssertionError("an open file was replaced")
    assert list_statuses(pipeline.run(size=2)) == "ran"
    assert list_statuses(pipeline.run(size=2)) == "cached"
    assert [name for name in os.listdir() if name.startswith(".dagkit-")] == []

def check_catalog():
    pathlib.Path("in.txt").write_text("größe →", encoding="utf-8")
    pathlib.Path("in.json").write_text("[1, 2]", encoding="utf-8")
    def rows(text, numbers): return [{"text": text, "n": n} for n in numbers]
    def table(rows): return {row["n"]: row["text"] for row in rows}
    files = {"text": "in.txt", "numbers": "in.json", "rows": "out/{tag}/rows.jsonl"}
    files["table"] = "out/t.pkl"
    for status in ("ran ran", "cached cached"):
        run = Pipeline(rows, table, catalog=files).run(tag="a")
        assert run["table"] == {1: "größe →", 2: "größe →"}
        assert list_statuses(run) == status
    assert pickle.loads(pathlib.Path("out/t.pkl").read_bytes()) == run["table"]
    pathlib.Path("in.txt").write_text("klein", encoding="utf-8")
    assert Pipeline(rows, table, catalog=files).run(tag="a")["table"] == {1: "klein", 2: "klein"}
    if LACK in ("different cases", "all that Windows lacks"):
        try:
            clash = {"rows": "a.pkl", "table": "A.pkl"}
            Pipeline(rows, table, catalog=clash).run(text="", numbers=[])
        except CatalogError as error:
            assert "the catalog has one file for" in str(error)
        else:
            raise AssertionError("two values in one file")

def check_processes():
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        for status in ("ran ran", "cached cached"):
            pipeline = Pipeline(Step(make, cache=True), Step(use_twice, cache=True), executor=pool)
            run = pipeline.run(size=2000)
            assert (run["use_twice"], list_statuses(run)) == (2020, status)

if __name__ == "__main__":
    LACK = sys.argv[1]
    WINDOWS_FILES = LACK in ("replacing open files", "all that Windows lacks")
    for check in (check_core, check_cache, check_open_files, check_catalog):
        check()
    if LACK != "threads":
        check_processes()
'''


QUICK_LACKS = ("fcntl", "threads", "all that Windows lacks")


@pytest.fixture(
    params=[
        pytest.param(lack, marks=() if lack in QUICK_LACKS else pytest.mark.slow) for lack in LACKS
    ]
)
def bare_python(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[str, Callable[..., subprocess.CompletedProcess[bytes]]]:
    """Return what a Python lacks, and a function that runs it with a script and arguments."""
    (tmp_path / "sitecustomize.py").write_text(CUSTOMIZATION + LACKS[request.param])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{HERE}"}
    environment |= {"PYTHONWARNDEFAULTENCODING": "1", "DAGKIT_STORE": "store"}

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-W", "error::dagkit.DagkitWarning", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)

    return request.param, run


@pytest.mark.slow
def test_a_bare_platform_runs_reuses_and_saves(bare_python: Any, tmp_path: Path) -> None:
    lack, run = bare_python
    (tmp_path / "scenario.py").write_text(SCENARIO, encoding="utf-8")
    process = run("scenario.py", lack)
    assert process.returncode == 0, process.stderr.decode()
    encoding = "cp1252" if lack in ("unicode", "all that Windows lacks") else "utf-8"
    assert "split" in process.stdout.decode(encoding)


WORKERS = """
import multiprocessing, os, sys, threading, warnings
from concurrent import futures
import dagkit, steps
from dagkit import Pipeline, Step, WorkerError

warnings.simplefilter("error")

def run(executor, *functions, **inputs):
    run = Pipeline(*functions, executor=executor, cache=True).run(**inputs)
    return " ".join(state.status for state in run.steps.values())
"""

STEPS = """
import threading

def twice(x): return 2 * x
def total(twice): return [twice] * 9000
def unsendable(x): return threading.Lock()
def fails(x): raise LookupError(f"no {x}")
"""


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[[str], str]:
    """Run a script beside a module of steps; it uses pools, so it must be in a file."""
    (tmp_path / "steps.py").write_text(STEPS)

    def run(code: str, **environment: str) -> str:
        main = textwrap.indent(textwrap.dedent(code), "    ")
        script = f"{WORKERS}\nif __name__ == '__main__':\n{main}"
        (tmp_path / "script.py").write_text(script)
        return run_python("import runpy; runpy.run_path('script.py', run_name='__main__')",
            tmp_path, **environment)  # fmt: skip

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_key_that_is_set_after_a_pool_began_signs_its_results(
    method: str, run_script: Callable[..., str]
) -> None:
    output = run_script(
        f"""
        warnings.simplefilter("ignore", dagkit.DagkitWarning)  # the results of other keys
        context = multiprocessing.get_context("{method}")
        with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(len, "").result()
            for key in "abca":
                os.environ["DAGKIT_KEY"] = key
                print(run(pool, steps.twice, steps.total, x=1))
            os.environ["HOME"] = os.path.abspath("home")
            del os.environ["DAGKIT_KEY"]
            print(run(pool, steps.twice, steps.total, x=1))
            print(run(pool, steps.twice, steps.total, x=1))
        """
    )
    assert output.splitlines() == ["ran ran"] * 3 + ["cached cached", "ran ran", "cached cached"]


if sys.version_info >= (3, 14):

    def test_interpreters_of_one_process_are_an_executor(run_script: Callable[..., str]) -> None:
        """What cannot be sent is an error; it holds no values, though that of the pool does."""
        output = run_script(
            """
            def inner(x, y): return x
            calls = [
                (inner, {"x": 1, "y": "SECRET"}),
                (steps.unsendable, {"x": 1}),
                (steps.twice, {"x": threading.Lock()}),
                (steps.fails, {"x": 1}),
            ]
            with futures.InterpreterPoolExecutor(2) as pool:
                print(run(pool, steps.twice, steps.total, x=1))
                print(run(pool, steps.twice, steps.total, x=1))
                print(run(pool, Step(steps.twice, map="x"), x=[1, 2, 3]))
                for function, inputs in calls:
                    try:
                        Pipeline(Step(function), executor=pool).run(**inputs)
                    except WorkerError as error:
                        text = str(error)
                        print("NotShareableError" in text, "SECRET" in text, "Lock" in text)
                    except LookupError as error:
                        print(error, "steps.py" in str(error.__cause__))
            """
        )
        assert output.splitlines() == [
            *("ran ran", "cached cached", "ran"),
            *["True False False"] * 3,
            "no 1 True",
        ]


NO_HOME = """
    import os, sys, warnings
    del os.environ["HOME"]
    sys.modules["pwd"] = None  # as if the user were not in the list of users
    import dagkit
    def twice(x): return 2 * x
    pipeline = dagkit.Pipeline(twice, cache=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            print(pipeline.plan(x=1)["twice"].status, pipeline.run(x=1).steps["twice"].status)
    print(*sorted({str(warning.message) for warning in caught}), sep="\\n")
    print(os.listdir())
"""


def test_without_a_home_folder_nothing_is_stored_and_a_warning_says_what_to_set(
    tmp_path: Path,
) -> None:
    output = run_python(NO_HOME, tmp_path, DAGKIT_STORE="store")
    assert output.splitlines() == [
        *("new ran", "new ran"),
        f"the store {tmp_path / 'store'} is not used: there is no home folder for the signing key: "
        "set HOME or DAGKIT_KEY",
        "[]",
    ]
    output = run_python(NO_HOME, tmp_path, DAGKIT_STORE="store", DAGKIT_KEY="team")
    assert output.splitlines()[:2] == ["new ran", "fresh cached"]


# Threads, with and without the lock of the interpreter


STRESS = """
    import os, sys, threading, warnings
    from concurrent.futures import ThreadPoolExecutor
    sys.setswitchinterval(1e-6)
    import dagkit
    from dagkit import Pipeline, Step, step

    warnings.simplefilter("error")
    os.environ["MODE"] = "a"
    THREADS = 24
    LOG = os.open("calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    barrier = threading.Barrier(THREADS)

    @step(cache=True)
    def load(n):
        os.write(LOG, b"%d\\n" % n)
        return list(range(n)), os.environ["MODE"]

    @step(cache=True, outputs=("odd", "even"))
    def split(load): return [i for i in load[0] if i % 2], [i for i in load[0] if i % 2 == 0]

    @step(cache=True, map="odd")
    def square(odd): return odd * odd

    @step
    async def total(square, even): return sum(square) + sum(even)

    STEPS = load, split, square, total
    shared = Pipeline(STEPS, catalog={"even": "even/{n}.json"}, name="stress")

    def expect(n): return sum(i * i if i % 2 else i for i in range(n))

    def work(number):
        barrier.wait()
        for turn in range(4):
            n = 5 + (number + turn) % 7
            run = shared.run(n=n)
            assert run["total"] == expect(n)
            assert run["load"] == (list(range(n)), "a")
            own = Pipeline(STEPS, catalog={"even": "even/{n}.json"}, name="stress")
            assert own.run("total", n=n)["total"] == expect(n)
            assert shared.plan("total", n=n)["square"].status == "fresh"
            assert shared.show().svg and str(shared.graph)
        return number

    with ThreadPoolExecutor(THREADS) as pool:
        assert [*pool.map(work, range(THREADS))] == [*range(THREADS)]
    with open("calls", encoding="ascii") as file:
        calls = file.read().split()
    assert len(calls) == len(set(calls)) == 7, calls
    assert len(shared.history()) == 2 * 4 * THREADS
    os.environ["MODE"] = "b"
    assert {shared.plan(n=n)["load"].reason for n in range(5, 12)} == {"variable MODE changed"}
    with ThreadPoolExecutor(THREADS) as pool:
        pipeline = Pipeline(STEPS, executor=pool, store="other")
        for _ in range(3):
            run = pipeline.run(n=400)
            assert run["total"] == expect(400)
        assert run.steps["square"].status == "cached"
    with ThreadPoolExecutor(4) as pool:
        prunes = [pool.submit(pipeline.store.prune, max_bytes=0) for _ in range(4)]
        assert pipeline.replace(executor=None).run(n=400)["total"] == expect(400)
        assert sum(prune.result() for prune in prunes) > 0
    print("fine", getattr(sys, "_is_gil_enabled", lambda: True)())
"""


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "team"])
def test_24_threads_share_pipelines_and_stores(key: str, tmp_path: Path) -> None:
    output = run_python(STRESS, tmp_path, DAGKIT_STORE=str(tmp_path / "store"), DAGKIT_KEY=key)
    assert output.startswith("fine")


########################################################################################
### Faults: security
########################################################################################

CONTROL_TEXT = "evil\x1b[2J\x07\x9b31m\u202e\u2028\r"


def fail_with_controls(x: Any) -> None:
    raise ValueError(CONTROL_TEXT)


def skip_with_controls(x: Any) -> None:
    raise Skip(CONTROL_TEXT)


class ControlsInPickle:
    def __reduce__(self) -> Any:
        raise ValueError(CONTROL_TEXT)


def run_with_controls(**options: Any) -> Run:
    echo = Step(lambda x: x, name="echo")
    steps = [fail_with_controls, skip_with_controls, echo]
    return Pipeline(steps, on_error="continue", **options).run(x=CONTROL_TEXT)


def make_pipeline_of_file(path: str) -> Pipeline:
    """Make a pipeline of the main module, which lies in a file of that name."""
    namespace: dict[str, Any] = {}
    exec(compile("def fails(x): raise ValueError(x)", path, "exec"), namespace)
    main = types.ModuleType("__main__")
    main.__file__ = path
    namespace["fails"].__module__ = "__main__"
    vars(main)["fails"] = namespace["fails"]
    return Pipeline(main, on_error="continue", progress=True)


def list_error_texts(*calls: Callable[[], Any]) -> str:
    texts = []
    for call in calls:
        with pytest.raises(DagkitError) as caught:
            call()
        texts.append(str(caught.value))
    return "\n".join(texts)


def read_foreign_history() -> str:
    """Display the records of a folder that came from somebody else."""
    pipeline = Pipeline({"one": lambda x: 1}, store=".dagkit")
    pipeline.run(x=1)
    path = Path(".dagkit", "runs.jsonl")
    record = json.loads(path.read_text())
    texts = dict.fromkeys(("id", "started", "user", "host", "error", "status"), CONTROL_TEXT)
    evil = {CONTROL_TEXT: CONTROL_TEXT}
    record |= {**texts, "inputs": {CONTROL_TEXT: evil}, "metrics": evil}
    with path.open("a") as file:
        file.write(f"\n{json.dumps(record)}\n")
    history: Any = pipeline.history()
    assert len(history) == 2
    return f"{history!r}{history[-1]!r}{history._repr_html_()}"


def show_progress() -> str:
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        run_with_controls(progress=True)
    return stream.getvalue()


def show_log() -> str:
    handler = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("dagkit")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        run_with_controls()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return str(handler.stream.getvalue())


def show_titles() -> str:
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        pipeline = make_pipeline_of_file(f"{CONTROL_TEXT}.py")
        run = pipeline.run(x=1)
    things = [pipeline, run, pipeline.plan(x=1)]
    return stream.getvalue() + "".join(f"{thing!r}{thing}" for thing in things)


def show_states() -> str:
    run = run_with_controls()
    return f"{run.steps}{run!r}{run}{run.show().html}"


def show_notes() -> str:
    run = make_pipeline_of_file(f"{CONTROL_TEXT}.py").run(x=1)
    return str(run.errors["fails"].__notes__)


def show_warnings() -> str:
    def listen(event: Event) -> None:
        raise ValueError(CONTROL_TEXT)

    secret = Step(ControlsInPickle, name="secret", cache=True)
    folder = Path(f"{CONTROL_TEXT} store")
    folder.mkdir()
    (folder / "precious").touch()
    texts = []
    settings: list[dict[str, Any]] = [{"on_event": listen}, {"store": folder}, {"store": "other"}]
    for options in settings:
        texts += catch_warnings(Pipeline(secret, **options).run)[1]
    assert len(texts) >= 3
    return "".join(texts)


def show_errors() -> str:
    one = Step(lambda x: 1, name="one")
    pipeline = Pipeline(one)
    return list_error_texts(
        lambda: Step(len, name=CONTROL_TEXT),
        lambda: Step(lambda x: x, name="a", map=CONTROL_TEXT),
        lambda: step(**{CONTROL_TEXT: 1}),
        lambda: Pipeline(one, name=CONTROL_TEXT),
        lambda: Pipeline({CONTROL_TEXT: len}).run(),
        lambda: Pipeline(CONTROL_TEXT).run(),
        lambda: Pipeline(one, catalog={"one": CONTROL_TEXT}).run(x=1),
        lambda: Pipeline(one, catalog={"x": f"{CONTROL_TEXT}.json"}).run(),
        lambda: pipeline.run(CONTROL_TEXT, x=1),
        lambda: pipeline.run(**{CONTROL_TEXT: 1}),
        lambda: pipeline.run(x=1)[CONTROL_TEXT],
        lambda: pipeline.show(CONTROL_TEXT),
        lambda: make_pipeline_of_file(f"{CONTROL_TEXT}.py").run(),
        lambda: Store(f"{CONTROL_TEXT}\0"),
    )


@pytest.mark.filterwarnings("default::dagkit.DagkitWarning")
@pytest.mark.parametrize(
    "show",
    [
        *(show_progress, show_log, show_titles, show_states, show_notes, show_warnings),
        *(show_errors, read_foreign_history),
    ],
)
def test_control_characters_never_reach_a_terminal(
    show: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = show()
    assert "evil" in text
    assert not set(text) & set("\x1b\x07\r\x9b\u202e\u2028")


@pytest.mark.parametrize(
    "place", ["entries", "entries/*", "entries/*/*", "values", "values/*", "tmp"]
)
def test_nothing_behind_a_link_inside_of_a_store_is_made_changed_or_deleted(
    place: str, tmp_path: Path
) -> None:
    """The attacker has built the same folders elsewhere, with files of the same names."""
    steps = [Step(lambda n: "x" * 9999 * n, name="text", cache=True), cubes, top]
    pipeline = Pipeline(steps, store=tmp_path / "store")
    pipeline.run(n=4)
    (tmp_path / "store" / "tmp" / ("a" * 64)).write_text("precious")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for number, folder in enumerate(Path(pipeline.store.path).glob(place)):
        folder.rename(foreign / str(number))
        folder.symlink_to(foreign / str(number))
    paths = [path for path in list_tree(foreign) if path.is_file()]
    for path in paths:
        path.write_bytes(path.read_bytes() + b"cut or longer: it would be deleted as damaged")
        set_age(path, 10**6)
    contents = {path: path.read_bytes() for path in paths}
    for current in (pipeline, Pipeline(steps, store=tmp_path / "store")):
        for n in (4, 5):
            catch_warnings(functools.partial(current.plan, n=n))
            run, texts = catch_warnings(functools.partial(current.run, n=n))
            assert (run["text"], run["top"]) == ("x" * 9999 * n, (n - 1) ** 3)
            assert len(texts) <= 2
        catch_warnings(functools.partial(current.store.prune, max_bytes=0, older_than=1))
        catch_warnings(functools.partial(current.store.clear, "text"))
        catch_warnings(current.store.clear)
    paths = [path for path in list_tree(foreign) if path.is_file()]
    assert {path: path.read_bytes() for path in paths} == contents


def test_an_input_that_is_swapped_during_a_run_is_never_unpickled(folder: Path) -> None:
    Path("in.pkl").write_bytes(pickle.dumps([1, 2]))

    def swap() -> None:
        Path("in.pkl").write_bytes(pickle.dumps(Bomb()))

    size = Step(lambda model: len(model), name="size", cache=True)
    first = Step(lambda model: model[0], name="first", after="swap")
    pipeline = Pipeline(size, Step(swap, after="size"), first, catalog={"model": "in.pkl"})
    with pytest.raises(CatalogError, match="'model' of the catalog has changed while the run "):
        pipeline.run()
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"pipeline": ' + "[" * 100_000, "9" * 10_000, '{"pipeline":"pipeline"'],
    ids=["brackets", "brackets in a field", "digits", "cut"],
)
def test_a_hostile_record_is_left_out_of_the_history(line: str) -> None:
    pipeline = Pipeline({"one": lambda x: 1}, store=os.environ["DAGKIT_STORE"])
    pipeline.run(x=1)
    with Path(pipeline.store.path, "runs.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    pipeline.run(x=2)
    assert [row["inputs.x"] for row in pipeline.history()] == [1, 2]


########################################################################################
### Faults: keys
########################################################################################


def repeat(item: int) -> list[int]:
    return [item] * 2000


@pytest.mark.parametrize("kind", ["none", "threads", "processes"])
@pytest.mark.parametrize("cause", ["lost", "damaged"])
def test_trouble_with_the_key_is_one_warning_a_run_whatever_runs_the_steps(
    cause: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Pipeline(Step(repeat, map="item", cache=True)).run(item=range(20))
    path = get_key_path()
    path.unlink()
    texts = {
        "lost": f"holds only results that your key has not signed: the key {path} is newer than "
        "they are. They are ignored, and their steps run again",
        "damaged": f"is not used: the signing key {path} is damaged, so that no stored result can "
        "be checked; delete it to get a new one, and results are computed again",
    }
    if cause == "damaged":
        path.write_bytes(b"short")
        path.chmod(0o600)
    pools: dict[str, Any] = {"threads": ThreadPoolExecutor, "processes": ProcessPoolExecutor}
    with pools.get(kind, contextlib.nullcontext)(1) as pool:
        pipeline = Pipeline(
            Step(repeat, map="item", cache=True), executor=pool if kind in pools else None
        )
        run, warned = catch_warnings(lambda: pipeline.run(item=range(20)))
    assert run["repeat"] == list(map(repeat, range(20)))
    assert run.steps["repeat"].status == "ran"
    assert warned == [f"the store {pipeline.store.path} {texts[cause]}"]
    assert capfd.readouterr().err == ""


########################################################################################
### Faults: executors
########################################################################################


def nap(x: int) -> int:
    time.sleep(0.5)
    return x


def make_broken_threads() -> Any:
    pool = ThreadPoolExecutor(1, initializer=sys.exit)
    pool.submit(int).exception()
    return pool


def make_broken_processes() -> Any:
    pool = ProcessPoolExecutor(1)
    pool.submit(os._exit, 1).exception()
    return pool


def make_closed_pool() -> Any:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    return pool


class ClosedWhileItRuns(ThreadPoolExecutor):
    """An executor that is shut down by somebody else when it has got two calls."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._work_queue.qsize() == 1:
            self.shutdown(wait=False, cancel_futures=True)
        return super().submit(function, *args, **kwargs)


@pytest.mark.parametrize(
    ("make_pool", "state"),
    [
        (make_broken_threads, "is broken: BrokenThreadPool"),
        pytest.param(make_broken_processes, "is broken: BrokenProcessPool", marks=pytest.mark.slow),
        (make_closed_pool, "was shut down: RuntimeError: cannot schedule new futures after shut"),
    ],
    ids=["broken threads", "broken processes", "shut down"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_executor_that_takes_no_calls_is_named_and_no_step_is_blamed(
    make_pool: Callable[[], Any], state: str
) -> None:
    pipeline = Pipeline(twofold, fails, executor=make_pool(), on_error="continue")
    errors = pipeline.run(x=1).errors
    text = str(errors["twofold"])
    assert text.startswith(f"step 'twofold' did not run, because the executor {state}")
    assert "make a new executor" in text
    with pytest.raises(WorkerError, match="step 'twofold' did not run") as caught:
        pipeline.replace(on_error="raise").run(x=1)
    assert caught.value.step == "twofold"


def test_an_executor_that_is_shut_down_during_a_run_is_named() -> None:
    steps = [Step(nap, name=f"nap{number}") for number in range(4)]
    pipeline = Pipeline(steps, executor=ClosedWhileItRuns(1), on_error="continue")
    errors = pipeline.run(x=1).errors
    assert list(errors) == ["nap2", "nap1", "nap3"] or len(errors) == 3
    for name, error in errors.items():
        assert f"step '{name}' did not run, because the executor was shut down" in str(error)


@pytest.mark.slow
def test_only_steps_that_a_worker_had_begun_are_blamed_for_its_death() -> None:
    others = [Step(twofold, name=f"twofold{number}") for number in range(15)]
    with ProcessPoolExecutor(2) as pool:
        first = Step(nap, name="nap", args={"x": "seconds"})
        dies_then = Step(dies, name="dies")
        pipeline = Pipeline([first, dies_then, *others], executor=pool, on_error="continue")
        errors = pipeline.run(seconds=1, x=1).errors
    blamed = [name for name, error in errors.items() if "a worker process died" in str(error)]
    assert sorted(blamed) == ["dies", "nap"]
    assert len(errors) == 17
    for name in errors.keys() - {"dies", "nap"}:
        assert str(errors[name]).startswith(
            f"step '{name}' did not run, because the executor is broken: BrokenProcessPool"
        )


@pytest.mark.parametrize("executor_class", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_the_class_of_an_executor_is_no_executor(executor_class: Any) -> None:
    with pytest.raises(StepError, match=r"executor: expected an object with submit\(\)"):
        Pipeline(twofold, executor=executor_class)


def test_what_submit_returns_must_be_a_future() -> None:
    class Odd:
        def submit(self, *args: Any) -> int:
            return 5

    with pytest.raises(WorkerError, match="step 'twofold' could not be sent to the executor"):
        Pipeline(twofold, executor=Odd()).run(x=1)


def test_pipelines_inside_steps_of_one_pool_never_wait_for_it() -> None:
    """Two levels deep, from a map and from a coroutine, with one worker for all of them."""
    with ThreadPoolExecutor(1) as pool:
        inner = Pipeline(twofold, executor=pool)
        middle = Pipeline({"middle": lambda x: inner.run(x=x)["twofold"]}, executor=pool)

        async def wait_for_middle(x: int) -> Any:
            return await asyncio.to_thread(lambda: middle.run(x=x)["middle"])

        outer = Step(lambda x: middle.run(x=x)["middle"], name="outer", map="x")
        with ThreadPoolExecutor(1) as other_pool:
            between = Pipeline({"between": lambda x: inner.run(x=x)}, executor=other_pool)
            assert Pipeline({"a": lambda: between.run(x=1)}, executor=pool).run()["a"]["between"]
        assert Pipeline(outer, executor=pool).run(x=[1, 2, 3])["outer"] == [2, 4, 6]
        assert Pipeline(wait_for_middle, executor=pool).run(x=4)["wait_for_middle"] == 8


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize(
    "way", ["async", "returned", "retried", "cached", "mapped", "in a pipeline"]
)
def test_what_ends_a_coroutine_arrives_as_it_is_with_the_note_of_its_step(
    error: type[BaseException], way: str
) -> None:
    async def leave(x: Any) -> None:
        await asyncio.sleep(0)
        raise error("code 5")

    options: dict[str, dict[str, Any]] = {
        "retried": {"retries": 3},
        "cached": {"cache": True},
        "mapped": {"map": "x"},
    }
    function: Any = leave
    if way == "returned":
        function = lambda x: leave(x)  # noqa: E731
    elif way == "in a pipeline":
        function = lambda x: Pipeline(Step(leave, name="inner")).run(x=x)  # noqa: E731
    leave_step = Step(function, name="leave", **options.get(way, {}))
    other = Step(lambda: 1, name="other")
    with pytest.raises(error) as caught:
        Pipeline(leave_step, other, on_error="continue").run(x=[7])
    assert caught.value.args == ("code 5",)
    where = locate(function)
    element = ", element 0" if way == "mapped" else ""
    value = "7" if way == "mapped" else "[7]"
    assert caught.value.__notes__[-1] == f"in step 'leave'{element} at {where}, with x={value}"


def test_a_coroutine_that_cancels_itself_fails() -> None:
    async def cancel_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(60)

    with pytest.raises(asyncio.CancelledError):
        Pipeline(cancel_itself).run()


class LockedError(Exception):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lock = threading.Lock()


def raise_locked() -> None:
    raise LockedError("held")


def cancel_call() -> None:
    raise asyncio.CancelledError("code 5")


@pytest.mark.slow
def test_what_cannot_leave_a_cluster_is_a_worker_error_of_its_step(cluster: Any) -> None:
    process_ids = set(cluster.run(os.getpid).values())
    pipeline = Pipeline(raise_locked, give_lock, twofold, executor=cluster, on_error="continue")
    with contextlib.redirect_stderr(io.StringIO()):
        logging.disable()  # Dask logs what it cannot send
        run = pipeline.run(x=1)
        logging.disable(logging.NOTSET)
    assert run["twofold"] == 2
    texts = {name: str(error) for name, error in run.errors.items()}
    assert texts["raise_locked"].startswith("step 'raise_locked' raised LockedError: held\n")
    assert texts["give_lock"].startswith("step 'give_lock' could not be sent to the executor, or ")
    assert {type(error) for error in run.errors.values()} == {WorkerError}
    assert "give_lock" not in run
    with pytest.raises(asyncio.CancelledError, match="code 5"):
        Pipeline(cancel_call, executor=cluster, on_error="continue").run()
    assert set(cluster.run(os.getpid).values()) == process_ids


@pytest.mark.slow
def test_a_dask_client_that_was_closed_is_named(cluster: Any) -> None:
    import distributed

    with distributed.Client(cluster.scheduler.address, set_as_default=False) as client:
        pass
    with pytest.raises(WorkerError, match=r"step 'twofold' did not run, .* was shut down: Closed"):
        Pipeline(twofold, executor=client).run(x=1)


########################################################################################
### Faults: odd failures
########################################################################################


@dataclass(frozen=True)
class FrozenError(Exception):
    text: str = "frozen"


class NumberAsText(Exception):
    def __str__(self) -> Any:
        return 5


class OddNotes(Exception):
    __notes__ = 5  # type: ignore[assignment]


class NoRepr(Exception):
    def __repr__(self) -> str:
        raise RuntimeError


class NoComparison(Exception):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __bool__(self) -> bool:
        raise RuntimeError


class NoTracebacks(Exception):
    def with_traceback(self, traceback: Any) -> Any:
        raise RuntimeError


class NoPickle(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError


ODD_ERRORS = [FrozenError, NumberAsText, OddNotes, NoRepr, NoComparison, NoTracebacks, NoPickle]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "retried": {"retries": 1},
    "cached": {"cache": True},
    "mapped": {"map": "item"},
}


def raise_odd_error(item: Any, kind: type[Exception]) -> None:
    raise kind


def display_run(run: Run) -> str:
    return f"{run!r}{run}{run.show().html}{run.steps}{run.errors.keys()}{run.record}"


@pytest.mark.parametrize("way", [*WAYS, "threads", "processes", "progress"])
@pytest.mark.parametrize("kind", ODD_ERRORS)
def test_a_run_goes_on_after_an_odd_exception_and_names_its_step(
    kind: type[Exception], way: str, request: pytest.FixtureRequest
) -> None:
    executor = None
    if way == "processes":
        executor = request.getfixturevalue("processes")
    elif way == "threads":
        executor = ThreadPoolExecutor(1)
    odd_step = Step(raise_odd_error, **WAYS.get(way, {}))
    options: dict[str, Any] = {"executor": executor, "progress": way == "progress"}
    pipeline = Pipeline(odd_step, twofold, on_error="continue", **options)
    run = pipeline.run(item=[1], kind=kind, x=1)
    assert run["twofold"] == 2
    assert (run.steps["raise_odd_error"].status, list(run.errors)) == (
        "failed",
        ["raise_odd_error"],
    )
    assert "raise_odd_error" in display_run(run)
    with pytest.raises((kind, WorkerError)):
        pipeline.replace(on_error="raise").run(item=[1], kind=kind, x=1)


class NoValue:
    """A value on which nothing works that messages and displays could use."""

    def __repr__(self) -> str:
        raise RuntimeError

    __str__ = __repr__

    def __format__(self, format_spec: str) -> str:
        raise RuntimeError

    def __len__(self) -> int:
        raise RuntimeError

    def __bool__(self) -> bool:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else RuntimeError(name)


class AllAttributes:
    """A value that claims to have every attribute, as mocks do."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


@pytest.mark.filterwarnings("default::dagkit.DagkitWarning")
@pytest.mark.parametrize("role", ["input", "default", "result", "argument of a failure"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "mapped"])
@pytest.mark.parametrize("kind", [NoValue, AllAttributes])
def test_an_odd_value_does_no_harm(kind: type, way: str, role: str) -> None:
    value = kind()
    functions: dict[str, Any] = {
        "input": lambda x: 1,
        "default": lambda x=value: 1,
        "result": lambda x: kind(),
        "argument of a failure": lambda x: 1 / 0,
    }
    odd_step = Step(functions[role], name="odd", **WAYS[way])
    pipeline = Pipeline(odd_step, Step(lambda odd: 2, name="last"), on_error="continue")
    inputs = {} if role == "default" else {"x": value}
    assert "odd" in str(pipeline.plan(**inputs))
    for _ in range(2):
        run = pipeline.run(**inputs)
        assert "odd" in display_run(run)
        assert role.startswith("argument") or run["last"] == 2


@pytest.mark.parametrize("store", [None, "relative", "absolute"])
@pytest.mark.parametrize("has_step_removed_it", [False, True])
def test_the_working_folder_may_have_been_removed(
    has_step_removed_it: bool, store: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGKIT_STORE")
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def remove() -> int:
        shutil.rmtree(folder, ignore_errors=True)
        return 1

    def count(remove: int) -> int:
        return len(Path("no such file").parts) + remove

    if not has_step_removed_it:
        remove()
    if store == "absolute":
        store = str(tmp_path / "store")
    steps = [Step(remove, cache=bool(store)), Step(count, cache=bool(store))]
    run, texts = catch_warnings(Pipeline(steps, store=store).run)
    assert run["count"] == 2
    assert len(texts) == (store == "relative" and not has_step_removed_it), texts


@pytest.mark.parametrize("stream", [None, "closed"])
@pytest.mark.parametrize("progress", [True, "auto"])
def test_there_may_be_no_stderr(
    progress: Any, stream: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_stream = io.StringIO()
    closed_stream.close()
    monkeypatch.setattr(sys, "stderr", stream and closed_stream)
    run, _ = catch_warnings(lambda: Pipeline(twofold, progress=progress).run(x=1))
    assert run["twofold"] == 2


@pytest.mark.parametrize("delay", [0, 1, 10**200, math.inf])
@pytest.mark.parametrize("backoff", [0, 1, 1e308, math.inf])
def test_a_delay_between_tries_is_a_number_of_seconds(delay: float, backoff: float) -> None:
    retried = Step(
        len, name="a", args={"obj": "x"}, retries=9, retry_delay=delay, retry_backoff=backoff
    )
    for attempt in (1, 2, 999):
        assert 0 <= find_delay(retried, attempt) <= 86_400


@pytest.mark.parametrize("value", [math.nan, -1, -math.inf, 10**400, True, "1", None, 1j])
@pytest.mark.parametrize("option", ["retry_delay", "retry_backoff", "poke_interval", "timeout"])
def test_a_time_must_be_a_number_that_is_not_negative(option: str, value: Any) -> None:
    decorator = step if option.startswith("retry") else sensor
    with pytest.raises(StepError, match=r"expected (seconds|a factor)"):
        decorator(**{"name": "a", option: value})(lambda: 1)


@pytest.mark.parametrize("seconds", [1e10, 1e300, math.inf])
def test_a_sensor_may_wait_for_any_time(seconds: float) -> None:
    """The queues of Python have a limit of their own."""

    def stop(*_: Any) -> None:
        raise InterruptedError

    pipeline = Pipeline(sensor(name="w", poke_interval=seconds, timeout=seconds)(lambda: None))
    old_handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(InterruptedError):
            pipeline.run()
    finally:
        signal.signal(signal.SIGALRM, old_handler)


########################################################################################
### Faults: load
########################################################################################


class Block:
    """An array of 0.8 MB that counts how many of its kind are in memory."""

    alive = most = 0

    def __init__(self, number: int) -> None:
        self.data = np.full(100_000, float(number))
        Block.alive += 1
        Block.most = max(Block.most, Block.alive)

    def __del__(self) -> None:
        Block.alive -= 1

    def __reduce__(self) -> Any:
        return Block, (int(self.data[0]),)


def make_block(item: int) -> Block:
    return Block(item)


def next_block(make_block: Block) -> Block:
    return Block(int(make_block.data[0]) + 1)


def read_block(next_block: Block) -> int:
    return int(next_block.data[0])


@pytest.mark.slow
@pytest.mark.parametrize("has_outputs", [False, True])
@pytest.mark.parametrize("target", ["read_block", "sum"])
def test_1000_large_elements_go_through_two_maps_with_few_in_memory(
    target: str, has_outputs: bool
) -> None:
    Block.most = 0
    first = Step(make_block, map="item")
    if has_outputs:
        pair = lambda item: (Block(item), item)  # noqa: E731
        first = Step(pair, name="pair", outputs=("make_block", "number"), map="item")
    steps = [first, Step(next_block, map="make_block"), Step(read_block, map="next_block")]
    with ThreadPoolExecutor(2) as pool:
        pipeline = Pipeline(steps, Step(sum, args={"iterable": "read_block"}), executor=pool)
        value = pipeline.run(target, item=range(1000))[target]
    assert value == (sum(range(1, 1001)) if target == "sum" else list(range(1, 1001)))
    assert Block.most <= 40
    assert Block.alive == 0


########################################################################################
### Faults: a run that outlives its results
########################################################################################


LOSSES: dict[str, Callable[[Store], Any]] = {
    "pruned": lambda store: store.prune(max_bytes=0),
    "cleared": lambda store: store.clear(),
    "values removed": lambda store: shutil.rmtree(Path(store.path, "values")),
    "store removed": lambda store: shutil.rmtree(store.path),
    "expired": lambda store: None,
    "expired and pruned": lambda store: store.prune(max_bytes=0),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["values", "outputs", "map"])
def test_a_run_computes_a_lost_value_once_and_calls_nothing_damaged(kind: str, loss: str) -> None:
    calls: list[str] = []
    cache: Any = timedelta(seconds=0.2) if "expired" in loss else True

    def base(n: int) -> list[int]:
        calls.append("base")
        return list(range(n))

    def large(base: Any) -> Any:
        calls.append("large")
        return (base, base * 2000) if kind == "outputs" else base * 2000

    options: dict[str, dict[str, Any]] = {
        "values": {},
        "outputs": {"name": "pair", "outputs": ("small", "large")},
        "map": {"map": "base"},
    }
    pipeline = Pipeline(Step(base), Step(large, **options[kind]), cache=cache)
    run = pipeline.run(n=3)
    expected = [0, 2000, 4000] if kind == "map" else [0, 1, 2] * 2000
    calls.clear()
    if "expired" in loss:
        time.sleep(0.25)
    LOSSES[loss](pipeline.store)
    values, texts = catch_warnings(lambda: [run["large"], run["base"], run["large"]])
    assert values == [expected, [0, 1, 2], expected]
    assert texts == []
    assert max(collections.Counter(calls).values(), default=0) <= (3 if kind == "map" else 1)
    if loss == "expired":
        assert calls == []


########################################################################################
### Faults: wrong types
########################################################################################


class Submits:
    def submit(self, *args: Any) -> Any:
        raise KeyError("submit")


class Loads:
    def load(self) -> int:
        return 1

    def save(self, value: Any) -> None: ...


class OddPath:
    def __fspath__(self) -> Any:
        return 5


class OddSignature:
    @property
    def __signature__(self) -> Any:
        raise RuntimeError

    def __call__(self, x: Any) -> Any:
        return x


def take_x(x: Any) -> Any:
    return x


def make_odd_things() -> list[Any]:
    """Make things of all kinds; an iterator or a file is used up by the first who reads it."""
    return [
        *(
            None,
            True,
            0,
            1,
            -1,
            10**400,
            3.5,
            math.nan,
            math.inf,
            -math.inf,
            1j,
            decimal.Decimal(1),
        ),
        *("", "a", "x", "no such", "a\0b", CONTROL_TEXT, "\ud800", "class", "a.b", ".", "..", "/"),
        *("/dev/null", "/dev/null/x", "~nobody/x", "é", "x" * 5000, b"", b"a", bytearray(b"a")),
        *(
            (),
            ("a",),
            ("a", "a"),
            ("x",),
            (1,),
            [],
            ["a"],
            [None],
            [[]],
            {},
            {"a": "x"},
            {"x": "a"},
        ),
        *({"a": 1}, {1: "a"}, {"x": None}, {"": ""}, {None: None}, {"a": "a.json"}, {"a": "{"}),
        *({"a": "{x}.json"}, {"a": b"a.json"}, {"a": "\ud800.json"}, {"a": Loads()}, {"x": Loads}),
        *(set(), {"a"}, frozenset(), range(3), iter([]), zip(), (i for i in [1]), slice(1)),
        *(len, take_x, lambda *a: 1, lambda **k: 1, functools.partial(take_x), OddSignature()),
        *(
            int,
            type,
            object(),
            Ellipsis,
            NotImplemented,
            Submits(),
            Submits,
            Loads(),
            Loads,
            OddPath(),
        ),
        *(
            Path("a"),
            Path("a\0b"),
            Path("\ud800"),
            Path("/"),
            np.zeros(2),
            np.array(5),
            np.array("a"),
        ),
        *(np.int64(3), np.float64(math.nan), np.bool_(True), np.str_("a"), pd.NA, pd.NaT),
        *(pd.DataFrame({"a": [1]}), pd.Series([1]), pd.Timedelta(1), AllAttributes()),
        *(timedelta(1), timedelta(-1), timedelta.max, array.array("i", [1])),
        *(
            os,
            sys.modules[__name__],
            threading.Lock(),
            ValueError("x"),
            ValueError,
            Skip,
            Skip("x"),
        ),
        *(
            REQUIRED,
            type(REQUIRED),
            Step(take_x, name="s"),
            Step,
            Pipeline(take_x),
            Pipeline,
            Store,
        ),
        *(
            Store("st"),
            Event("a", 1.0),
            Event,
            io.StringIO(),
            io.BytesIO(),
            sys.__stdout__,
            property(),
        ),
        *(types.SimpleNamespace(a=1), collections.Counter("a"), collections.defaultdict(list)),
        *(DagkitError("x"), StepError, (1, 2, True)),
    ]


def use_pipeline(pipeline: Pipeline) -> None:
    """Do with a pipeline all that can be done."""
    for text in (repr(pipeline), str(pipeline), pipeline.show().html):
        assert text
    things = [pipeline.steps, pipeline.graph, pipeline.store, pipeline.catalog, pipeline.history()]
    assert None not in things
    inputs = {name: 1 for name, default in pipeline.inputs.items() if default is REQUIRED}
    plan = pipeline.plan(**inputs)
    run = pipeline.run(**inputs)
    for thing in (plan, run):
        assert f"{thing!r}{thing}{thing.show().html}{dict(thing).keys()}"
    assert run.record["steps"].keys() == run.steps.keys() >= run.errors.keys()


def use_step(odd_step: Step) -> None:
    assert f"{odd_step!r}{odd_step.definition}{hash(odd_step)}"
    assert odd_step == odd_step
    use_pipeline(Pipeline(odd_step, Step(lambda a: 1, name="last")))


def use_step_option(name: str, thing: Any) -> None:
    use_step(Step(take_x, **{name: thing}))


def use_decorator(decorator: Any, name: str, thing: Any) -> None:
    use_pipeline(Pipeline(decorator(**{"name": "odd", name: thing})(lambda x: x)))


def use_pipeline_option(name: str, thing: Any) -> None:
    use_pipeline(Pipeline(Step(take_x, name="a", cache=True), **{name: thing}))


def use_replace(name: str, thing: Any) -> None:
    use_pipeline(Pipeline(take_x).replace(**{name: thing}))


def use_input(method: Callable[..., Any], name: str, thing: Any) -> None:
    assert str(method(**{"x": 1, name: thing}))


def use_input_name(method: Callable[..., Any], thing: Any) -> None:
    method(**{thing: 1})


def use_format(owner: Any, thing: Any) -> None:
    owner.show(format=thing)


def list_uses() -> dict[str, Callable[[Any], Any]]:
    """Map what takes an argument -> a function that passes a thing there, and uses the result."""
    uses: dict[str, Callable[[Any], Any]] = {
        "Step(thing)": lambda thing: use_step(Step(thing, name="odd")),
        "step(thing)": lambda thing: use_pipeline(Pipeline(step(thing))),
        "sensor(thing)": lambda thing: use_pipeline(Pipeline(sensor(thing))),
        "Pipeline(thing)": lambda thing: use_pipeline(Pipeline(thing)),
        "Pipeline([thing])": lambda thing: use_pipeline(Pipeline([thing])),
        "Pipeline({name: thing})": lambda thing: use_pipeline(Pipeline({"odd": thing})),
        "Pipeline({thing: function})": lambda thing: use_pipeline(Pipeline({thing: take_x})),
        "replace(thing)": lambda thing: use_pipeline(Pipeline(take_x).replace(thing)),
        "Store(thing)": lambda thing: (Store(thing).size(), Store(thing).clear()),
        "Event(thing)": lambda thing: repr(Event(thing, thing)),
        "Skip(thing)": lambda thing: use_pipeline(Pipeline({"odd": lambda: raise_skip(thing)})),
        "a default": lambda thing: use_step(Step(lambda x=thing: 1, name="odd", cache=True)),
        "a result": lambda thing: use_step(Step(lambda: thing, name="odd", cache=True)),
        "outputs": lambda thing: use_step(Step(lambda: thing, name="odd", outputs=("p", "q"))),
        "a mapped result": lambda thing: use_pipeline(
            Pipeline({"odd": lambda: thing}, Step(lambda odd: 1, name="each", map="odd"))
        ),
    }
    for name in STEP_OPTIONS:
        uses[f"Step({name}=)"] = functools.partial(use_step_option, name)
        if name != "poke":
            uses[f"step({name}=)"] = functools.partial(use_decorator, step, name)
    for name in ("poke_interval", "timeout", "soft_fail", "retries", "after", "args", "cache"):
        uses[f"sensor({name}=)"] = functools.partial(use_decorator, sensor, name)
    for name in PIPELINE_OPTIONS:
        uses[f"Pipeline({name}=)"] = functools.partial(use_pipeline_option, name)
        uses[f"replace({name}=)"] = functools.partial(use_replace, name)
    steps = [
        Step(lambda x, y=1: 1, name="a"),
        Step(lambda a: 1, name="b", cache=True),
        Step(lambda a: (1, 2), name="pair", outputs=("one", "two")),
        Step(lambda xs=(): 1, name="each", map="xs"),
    ]
    pipeline = Pipeline(steps)
    run = pipeline.run(x=1)
    plan = pipeline.plan(x=1)
    for method in (pipeline.run, pipeline.plan):
        for name in ("x", "y", "b", "pair", "one", "xs"):
            uses[f"{method.__name__}({name}=)"] = functools.partial(use_input, method, name)
        uses[f"{method.__name__}(thing)"] = functools.partial(method, x=1)
        uses[f"{method.__name__}(**thing)"] = functools.partial(use_input_name, method)
    for name, owner in (("pipeline", pipeline), ("run", run), ("plan", plan)):
        uses[f"{name}.show(thing)"] = owner.show
        uses[f"{name}.show(format=)"] = functools.partial(use_format, owner)
        uses[f"{name}.show().save()"] = owner.show().save
    for name, mapping in (("run", run), ("plan", plan)):
        uses[f"{name}[thing]"] = mapping.__getitem__
        uses[f"{name}.get(thing)"] = mapping.get
        uses[f"thing in {name}"] = mapping.__contains__
    uses["clear(thing)"] = pipeline.store.clear
    uses["prune(max_bytes=)"] = lambda thing: pipeline.store.prune(max_bytes=thing)
    uses["prune(older_than=)"] = lambda thing: pipeline.store.prune(older_than=thing)
    for name in dagkit.__all__:
        error = getattr(dagkit, name)
        if isinstance(error, type) and issubclass(error, DagkitError):
            uses[f"{name}(thing)"] = functools.partial(write_error, error)
    return uses


def write_error(error: type[DagkitError], thing: Any) -> str:
    return f"{error(thing)}{error(thing)!r}"


def raise_skip(thing: Any) -> None:
    raise Skip(thing)


# What Python itself says of a call, and of a key.
OWN_TEXTS = "unexpected keyword|positional argument|multiple values|keywords must be|unhashable"


def check_use(use: Callable[[Any], Any], thing: Any) -> None:
    """Pass a thing where another may be expected: all errors must say what is."""
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            use(thing)
    except DagkitError as error:
        assert str(error)  # noqa: PT017
    except (TypeError, ValueError) as error:  # of ours, of Python's or of the step's function
        texts = "".join([str(error), *getattr(error, "__notes__", [])])
        assert re.search(f"expected|must|in step |{OWN_TEXTS}", texts)


def is_hopeless(name: str, thing: Any) -> bool:
    """Tell whether a thing does what it is asked for, and that never ends."""
    return "executor" in name and isinstance(thing, AllAttributes)


KINDS_OF_THINGS = [type(thing).__name__ for thing in make_odd_things()]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(KINDS_OF_THINGS)), ids=KINDS_OF_THINGS.__getitem__)
def test_every_wrong_argument_is_an_error_that_says_what_was_expected(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, use in list_uses().items():
        thing = make_odd_things()[index]
        if not is_hopeless(name, thing):
            check_use(use, thing)


def test_random_arguments_are_errors_that_say_what_was_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = st.text(st.characters(exclude_characters="/~"), max_size=8)
    scalars = (
        st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=4)
    )
    things = st.recursive(
        st.builds(
            lambda make, index: make[index % len(make)], st.builds(make_odd_things), st.integers()
        )
        | scalars,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(texts, inner, max_size=3)
            | st.tuples(inner, inner)
        ),
        max_leaves=5,
    )
    uses = list_uses()

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(st.sampled_from(sorted(uses)), things)
    def try_one(name: str, thing: Any) -> None:
        if not is_hopeless(name, thing):
            check_use(uses[name], thing)

    try_one()


########################################################################################
### Faults: chaos
########################################################################################

CHAOS = """
import os, random, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from dagkit import DagkitWarning, Pipeline, Step

warnings.simplefilter("error")
warnings.simplefilter("ignore", DagkitWarning)  # something was damaged, and is computed again

def numbers(n): return np.full([10, 3000, 400_000][n % 3], n)
def words(n): return {"word": str(n) * [1, 900, 90_000][n % 3]}
def pair(numbers, n): return n, [n] * 2000
def pieces(n): return [n + i for i in range(5)]
def squares(pieces): return pieces * pieces
def texts(squares): return str(squares) * 2000
def summary(numbers, words, first, second, squares, texts):
    numbers += 0  # a value of a cached step is one's own
    sizes = len(words["word"]), first, len(second), sum(squares), sum(map(len, texts))
    return int(numbers.sum()), *sizes

steps = [
    Step(numbers, cache=True), Step(words, cache=True), Step(pieces, cache=True),
    Step(pair, outputs=("first", "second"), cache=True), Step(squares, map="pieces", cache=True),
    Step(texts, map="squares", cache=True), Step(summary, cache=True),
]

def compute(n):
    values = {"numbers": numbers(n), "words": words(n), "first": n, "second": [n] * 2000}
    values["squares"] = [piece * piece for piece in pieces(n)]
    values["texts"] = list(map(texts, values["squares"]))
    return values | {"summary": summary(**values)}

def are_equal(one, other):
    return one.tobytes() == other.tobytes() if isinstance(one, np.ndarray) else one == other

generator = random.Random(int(os.environ["SEED"]))
pool = ThreadPoolExecutor(2)
pipeline = Pipeline(steps)
log = os.open(os.environ["LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
while time.time() < float(os.environ["END"]):
    n = generator.randrange(12)
    right = compute(n)
    names = generator.sample(sorted(right), 3)
    chance = generator.random()
    if chance < 0.3:
        pipeline = Pipeline(steps, executor=generator.choice([None, pool]))
    elif chance < 0.33:
        pipeline.store.prune(max_bytes=generator.randrange(10**7))
    elif chance < 0.35:
        pipeline.store.clear(generator.choice([None, "numbers", "texts"]))
    elif chance < 0.4:
        pipeline.store.size(), pipeline.history()
    elif chance < 0.5:
        str(pipeline.plan(*names, n=n))
    run = pipeline.run(*names, n=n)
    if generator.random() < 0.1:
        time.sleep(0.05)  # its values are loaded later than others are pruned
    for name in names:
        assert are_equal(run[name], right[name]), (name, n)
    os.write(log, b"r")
"""


def harm(path: Path, kind: str, generator: random.Random) -> None:
    """Do to a file, or to its folder, what a bad disk or a bad colleague does."""
    if kind == "flip":
        with path.open("r+b") as file:
            position = generator.randrange(max(1, path.stat().st_size))
            file.seek(position)
            byte = file.read(1)
            file.seek(position)
            file.write(bytes([byte[0] ^ 1 << generator.randrange(8)]))
    elif kind == "cut":
        os.truncate(path, generator.randrange(max(1, path.stat().st_size)))
    elif kind == "delete":
        path.unlink()
    elif kind == "delete the folder":
        shutil.rmtree(path.parent)


@pytest.mark.slow
def test_chaos_gives_no_wrong_value_and_no_exception(tmp_path: Path) -> None:
    """Eight processes on one store; they are killed, and their files are damaged and deleted."""
    seconds = float(os.environ.get("CHAOS_SECONDS", "40"))
    generator = random.Random(int(os.environ.get("CHAOS_SEED", "1")))
    end = time.time() + seconds
    environment = {"END": str(end), "LOG": str(tmp_path / "log")}
    output = (tmp_path / "output").open("w+")
    counts: collections.Counter[str] = collections.Counter()

    def spawn() -> subprocess.Popen[bytes]:
        seed = str(generator.randrange(10**9))
        env = {**os.environ, **environment, "PYTHONPATH": str(HERE), "SEED": seed}
        command = [sys.executable, "-c", CHAOS]
        return subprocess.Popen(command, env=env, stdout=output, stderr=output)

    children = [spawn() for _ in range(8)]
    kinds = ["kill", "kill", *["flip", "cut", "delete"] * 3, "delete the folder"]
    while time.time() < end - 2:
        time.sleep(generator.random() * 0.2)
        kind = generator.choice(kinds)
        counts[kind] += 1
        if kind == "kill":
            index = generator.randrange(8)
            children[index].kill()
            assert children[index].wait() == -signal.SIGKILL, (tmp_path / "output").read_text()
            children[index] = spawn()
            continue
        with contextlib.suppress(OSError, IndexError):  # somebody else has deleted it
            paths = [path for path in Path(os.environ["DAGKIT_STORE"]).rglob("*") if path.is_file()]
            harm(generator.choice(paths), kind, generator)
    codes = [child.wait(60) for child in children]
    output.close()
    assert (codes, (tmp_path / "output").read_text()) == ([0] * 8, "")
    counts["runs"] = (tmp_path / "log").stat().st_size
    print(dict(counts))
    assert counts["runs"] >= 50
    assert min(counts[kind] for kind in kinds) >= 1


########################################################################################
### What people meet
########################################################################################

# Reasons in words that a person uses


CONFIGS = {
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass Config:",
    "frozen dataclass": "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Config:",
    "slots": "from dataclasses import dataclass\n@dataclass(slots=True)\nclass Config:",
    "pydantic": "import pydantic\nclass Config(pydantic.BaseModel):",
    "attrs": "import attrs\n@attrs.define\nclass Config:",
    "named tuple": "from typing import NamedTuple\nclass Config(NamedTuple):",
    "plain class": "class Config:",
}


def plan_after_edit(folder: Path, code: str, *edits: tuple[str, str], call: str = "") -> list[str]:
    """Run a module's pipeline in one process and plan it in another, with edits in between."""
    program = f"""
        import app, dagkit
        pipeline = dagkit.Pipeline(app)
        print([f"{{state.name}}: {{state.reason}}" for state in pipeline.plan({call}).values()])
        pipeline.run({call})
        """
    for old, new in (("", ""), *edits):
        assert old in code
        code = code.replace(old, new)
        (folder / "app.py").write_text(textwrap.dedent(code))
        output = run_python(program, folder, PYTHONDONTWRITEBYTECODE="1")
    reasons: list[str] = eval(output)
    return reasons


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_changed_default_of_a_config_class_is_named_with_its_values(
    kind: str, tmp_path: Path
) -> None:
    """No generated name appears, such as ``__create_fn__.<locals>.__init__``."""
    lines = [
        "from dagkit import step",
        *CONFIGS[kind].split("\n"),
        "    seed: int = 7",
        "    rate: float = 0.1",
        "    name: str = 'a'",
        "@step(cache=True)",
        "def fit(x):",
        "    return Config().seed + x",
    ]
    code = "\n".join(lines)
    assert plan_after_edit(tmp_path, code, ("= 7", "= 8"), call="x=1") == [
        "fit: class Config: seed 7 → 8"
    ]
    edits = (("= 8", "= 9"), ("0.1", "0.2"), ("'a'", "'b'"))
    (tmp_path / "app.py").unlink()
    code = code.replace("= 7", "= 8")
    last = code
    for edit in edits:
        last = last.replace(*edit)
    assert plan_after_edit(tmp_path, code, (code, last), call="x=1") == [
        # A text may be a credential: it is neither stored nor shown.
        "fit: class Config: seed 8 → 9, rate 0.1 → 0.2, name changed"
    ]


@pytest.mark.slow
def test_generated_methods_are_not_named_beside_their_class(tmp_path: Path) -> None:
    code = """
        from dataclasses import dataclass, field
        from dagkit import step
        @dataclass
        class Config:
            seed: int = 7
            names: list = field(default_factory=list)
        @step(cache=True)
        def fit(config=Config()):
            return config.seed
        """
    edit = ("(default_factory=list)", "(default_factory=tuple)")
    assert plan_after_edit(tmp_path, code, edit) == [
        "fit: code changed: class Config; input config changed"
    ]
    edit = ("    seed: int = 7\n", "    seed: int = 7\n            more: int = 1\n")
    assert plan_after_edit(tmp_path, code, edit) == [
        "fit: class Config: more none → 1; input config changed"
    ]


def make_configs() -> dict[str, tuple[Any, Any, str]]:
    import dataclasses

    import attrs
    import pydantic

    @dataclasses.dataclass
    class Model:
        depth: int = 3

    @dataclasses.dataclass
    class Settings:
        seed: int = 7
        name: str = "a"
        model: Model = dataclasses.field(default_factory=Model)

    Checked = pydantic.create_model("Checked", seed=(int, 7))
    Slim = attrs.make_class("Slim", {"seed": attrs.field(default=7)})
    change = "config.seed 7 → 8"
    return {
        "dataclass": (Settings(), Settings(seed=8), change),
        "two fields": (Settings(), Settings(8, "b"), f"{change}, config.name 'a' → 'b'"),
        "nested": (Settings(), Settings(model=Model(4)), "config.model.depth 3 → 4"),
        "pydantic": (Checked(), Checked(seed=8), change),
        "attrs": (Slim(), Slim(8), change),
        "dict": ({"seed": 7, "a": [1]}, {"seed": 8, "a": [1]}, change),
        "dict in a dict": ({"opt": {"lr": 1}}, {"opt": {"lr": 2}}, "config.opt.lr 1 → 2"),
        "other content": ({"a": [1]}, {"a": [2]}, "config changed"),
    }


@pytest.mark.parametrize("kind", make_configs())
def test_a_changed_field_of_a_config_that_is_an_input_is_named(kind: str) -> None:
    pipeline = Pipeline(Step(lambda config: str(config), name="fit", cache=True))
    old, new, change = make_configs()[kind]
    pipeline.run(config=old)
    assert pipeline.plan(config=old)["fit"].status == "fresh"
    assert pipeline.plan(config=new)["fit"].reason == f"input {change}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "generator",
    ["numpy.random.default_rng(0)", "numpy.random.RandomState(0)", "random.Random(0)"],
)
def test_a_random_generator_of_a_module_that_moved_on_says_so(
    generator: str, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(
        f"import random\nimport numpy\nfrom dagkit import step\nrng = {generator}\n"
        "@step(cache=True)\ndef noise():\n    return rng.random()\n"
    )
    program = """
        import app
        from dagkit import Pipeline
        pipeline = Pipeline(app)
        print(pipeline.plan()["noise"].status)
        pipeline.run()
        print(pipeline.plan()["noise"].reason, Pipeline(app).plan()["noise"].reason, sep="; ")
        """
    reason = "constant rng changed while it ran"
    assert run_python(program, tmp_path).splitlines() == ["new", f"{reason}; {reason}"]
    assert run_python(program, tmp_path).splitlines()[0] == "fresh"


# Maps with failures


def test_the_other_elements_of_a_map_go_on_after_a_failure(executor: Any, tmp_path: Path) -> None:
    steps = [Step(picky, map="item", cache=True), Step(square, args={"item": "picky"}, map="item")]
    pipeline = Pipeline(steps, executor=executor, on_error="continue", store=tmp_path)
    items = [1, 3, 2, 3, 4]
    run = pipeline.run(item=items)
    state = run.steps["picky"]
    assert (state.status, state.elements) == ("failed", 5)
    assert state.reason == "2 of 5 elements failed: 1, 3"
    assert "ValueError: not three   2 of 5 elements failed: 1, 3" in str(run)
    assert "element 1" in run.errors["picky"].__notes__[0]
    assert run.steps["square"].reason == "needs picky"
    assert dict(run) == {}
    plan = pipeline.plan("picky", item=items)
    assert plan["picky"].reason == "2 of 5 elements, never ran"


def test_a_reused_map_still_says_which_elements_were_skipped() -> None:
    pipeline = Pipeline(Step(only_odd, map="item", cache=True))
    for _ in range(2):
        text = str(pipeline.run(item=[1, 2, 3]))
    assert "✓ cached" in text
    assert "1 of 3 elements skipped: 2 is even" in text


# Errors


class ReadOnlyError(Exception):
    """An exception that cannot be changed, like one that is a frozen dataclass."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


def test_a_frozen_exception_ends_only_its_step() -> None:
    def fail() -> None:
        raise ReadOnlyError("no")

    run = Pipeline(fail, Step(lambda: 1, name="other"), on_error="continue").run()
    assert (run.steps["fail"].status, run["other"]) == ("failed", 1)
    with pytest.raises(ReadOnlyError):
        Pipeline(fail).run()


OWN_ERRORS: dict[str, Any] = {
    "an unknown input": lambda: Pipeline(twice).run(z=1),
    "an unknown target": lambda: Pipeline(twice).run("thrice", x=1),
    "a missing input": lambda: Pipeline(twice).run(),
    "a plan": lambda: Pipeline(twice).plan(z=1),
    "a picture": lambda: Pipeline(twice).show("thrice"),
    "a value": lambda: Pipeline(twice).run(x=1)["thrice"],
    "a step of a plan": lambda: Pipeline(twice).plan(x=1)["thrice"],
    "a cycle": lambda: Pipeline(Step(twice, name="x")).run(),
    "the graph": lambda: Pipeline(Step(twice, name="x")).graph,
    "the inputs": lambda: Pipeline(Step(twice, name="x")).inputs,
    "an option": lambda: Pipeline(twice, store=5),  # type: ignore[arg-type]
    "a variant": lambda: Pipeline(twice).replace(cahce=True),
    "a step": lambda: Step(twice, retries=-1),
    "a decorator": lambda: step(retries=-1)(twice),
    "a sensor": lambda: sensor(timeout=-1)(twice),
    "a result": lambda: Pipeline(Step(lambda: iter([1]), name="make")).run(),
}


@pytest.mark.parametrize("name", OWN_ERRORS)
def test_frames_of_dagkit_are_hidden_from_pytest_and_ipython(name: str) -> None:
    """Each of our frames between the call and the raise has the name ``__tracebackhide__``."""
    with pytest.raises(DagkitError) as caught:
        OWN_ERRORS[name]()
    all_frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    frames = [frame for frame in all_frames if frame.f_globals is vars(dagkit)]
    assert 1 <= len(frames) <= 3
    for frame in frames:
        is_generated = frame.f_code.co_filename == "<string>"  # the dataclass's __init__
        assert "__tracebackhide__" in frame.f_code.co_varnames or is_generated, frame.f_code.co_name


@pytest.mark.slow
def test_pytest_shows_a_failed_step_and_not_dagkit(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(
        textwrap.dedent(
            """
            from dagkit import Pipeline

            def fit(x):
                raise ValueError("x is too small")

            def test_step():
                Pipeline(fit).run(x=1)

            def test_name():
                Pipeline(fit).run(y=1)
            """
        )
    )
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_user.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    failures, _, _ = process.stdout.partition("short test summary")
    assert "dagkit.py" not in failures
    assert "in step 'fit' at test_user.py:4, with x=1" in failures
    assert "did you mean" not in failures or "InputError" in failures


@pytest.fixture(scope="module")
def people_notebook(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    cells, _ = run_notebook(
        tmp_path_factory.mktemp("people"),
        "from dagkit import Pipeline, step\n"
        "@step\n"
        "def load(path):\n"
        "    return [1, 2]\n"
        "@step(cache=True)\n"
        "def clean(load):\n"
        "    return load\n"
        "@step\n"
        "def fit(clean, alpha=0.1):\n"
        "    scale = alpha * 2\n"
        "    if scale > 1:\n"
        "        raise ValueError('alpha is too large')\n"
        "    return scale * sum(clean)\n"
        "pipeline = Pipeline(__name__)",
        "x = 1\npipeline.run(path=x, alpha=2)\nx = 2",
        "pipeline.run(pth=1)",
        "run = pipeline.run(path=1)\nplan = pipeline.plan(path=1)\nrun",
        "run.steps['clean']",
        "from IPython.core.completer import provisionalcompleter\n"
        "complete = get_ipython().Completer.completions\n"
        "with provisionalcompleter():\n"
        "    texts = [[c.text for c in complete(t, len(t))] for t in ('run[\"', 'plan[\"')]\n"
        "texts",
        "pipeline.inputs",
    )
    return cells


def read_error(outputs: list[Any]) -> list[str]:
    (error,) = [output for output in outputs if output["output_type"] == "error"]
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error["traceback"]))
    return text.splitlines()


@pytest.mark.slow
def test_the_error_of_a_step_has_at_most_twelve_lines_in_a_notebook(people_notebook: Any) -> None:
    lines = read_error(people_notebook[1])
    assert len(lines) <= 12, lines
    assert lines[2:] == [
        "Cell In[2], line 2",
        "      1 x = 1",
        "----> 2 pipeline.run(path=x, alpha=2)",
        "",
        "Cell In[1], line 12, in fit(clean, alpha)",
        "     11     if scale > 1:",
        "---> 12         raise ValueError('alpha is too large')",
        "",
        "ValueError: alpha is too large",
        "in step 'fit' at <cell 1>:8, with clean=[1, 2], alpha=2",
    ]


@pytest.mark.slow
def test_an_error_of_dagkit_shows_only_the_call_in_a_notebook(people_notebook: Any) -> None:
    lines = read_error(people_notebook[2])
    assert lines[2:] == [
        "Cell In[3], line 1",
        "----> 1 pipeline.run(pth=1)",
        "",
        "InputError: run() names 'pth', but no step produces or uses it",
        "  known names: alpha, clean, fit, load, path; did you mean 'path'?",
    ]


@pytest.mark.slow
def test_a_notebook_shows_values_states_names_and_inputs_in_short(people_notebook: Any) -> None:
    result = people_notebook[3][-1]["data"]["text/plain"]
    assert re.fullmatch(r"<Run of 'pipeline': 2 ran, 1 cached, .*>\n  fit = 0\.6\d*", result)
    state = people_notebook[4][0]["data"]["text/plain"]
    assert re.fullmatch(r"<step 'clean' cached: saved \d+ ms>", state)
    names = str(["clean", "fit", "load"])
    assert people_notebook[5][0]["data"]["text/plain"] == f"[{names}, {names}]"
    assert "'path': <required>" in people_notebook[6][0]["data"]["text/plain"]


def test_the_note_of_an_error_shows_small_stored_values() -> None:
    def fail(small: list[int], large: list[int]) -> None:
        raise ValueError("no")

    steps = [
        Step(lambda: [1, 2], name="small", cache=True),
        Step(lambda: "x" * 100_000, name="large", cache=True),
    ]
    for _ in range(2):  # both values were just made, or both lie in the store
        with pytest.raises(ValueError, match="no") as caught:
            Pipeline(steps, fail).run()
        (note,) = caught.value.__notes__
        assert "with small=[1, 2], large=" in note
        assert len(note) < 200


def test_a_run_shows_small_stored_values_of_its_targets() -> None:
    pipeline = Pipeline(Step(lambda: {"score": 0.9}, name="fit"), cache=True)
    for _ in range(2):
        assert str(pipeline.run()).splitlines()[-1] == "  fit = {'score': 0.9}"


# Stores and caches


def test_a_new_store_in_the_working_folder_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DAGKIT_STORE")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        line = f"dagkit: results are stored in the new folder {tmp_path / name / '.dagkit'}\n"
        for expected in (line, ""):
            Pipeline(twice, cache=True).run(x=1)
            assert capsys.readouterr() == ("", expected)
    Pipeline(twice, cache=True, store=tmp_path / "chosen").run(x=1)
    assert capsys.readouterr() == ("", "")


def test_a_pipeline_caches_every_step_that_does_not_say_otherwise() -> None:
    @step(cache=False)
    def never() -> int:
        return 1

    @sensor(poke_interval=0.01)
    def arrival() -> bool:
        return True

    pipeline = Pipeline(never, arrival, Step(lambda never: never, name="usual"), cache=True)
    pipeline.run()
    assert get_statuses(pipeline.plan()) == "never uncached, arrival uncached, usual maybe"
    assert get_statuses(pipeline.run()) == "never ran, arrival ran, usual cached"
    assert pipeline.replace(cache=False).plan()["usual"].status == "uncached"


@pytest.mark.parametrize("is_cached", [True, False])
def test_the_list_that_a_map_makes_of_objects_is_copied_and_not_blamed(is_cached: bool) -> None:
    def count(item: int) -> Counter[str]:
        return Counter({"a": item})

    def grow(count: list[Counter[str]]) -> int:
        for counter in count:
            counter["z"] = 9
        count.append(Counter())
        return len(count)

    pipeline = Pipeline(
        Step(count, map="item", cache=is_cached),
        Step(grow, cache=True),
        Step(lambda count, grow: count, name="last"),
    )
    for items in ([1, 2], []):
        for status in ("ran", "cached"):
            run = pipeline.run(item=items)
            assert run.steps["grow"].status == status
            assert run["last"] == [Counter({"a": item}) for item in items]


def test_a_changed_folder_is_called_a_folder(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    pipeline = Pipeline(Step(lambda folder: sorted(os.listdir(folder)), name="names", cache=True))
    pipeline.run(folder=tmp_path / "texts")
    (tmp_path / "texts" / "new").touch()
    reason = pipeline.plan(folder=tmp_path / "texts")["names"].reason
    assert reason == f"folder {tmp_path / 'texts'} changed"


########################################################################################
### README and examples
########################################################################################

README = (HERE / "README.md").read_text()
EXAMPLES_README = (HERE / "examples" / "README.md").read_text()
CODE_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def find_code_lines(code: str) -> list[str]:
    return [line for line in code.splitlines() if line.strip()]


def remove_times(text: str) -> str:
    return re.sub(r"\d+(\.\d)? m?s\b", "T", text)


def run_example(path: str, folder: Path = HERE) -> str:
    """Run a script with warnings as errors; return what it printed."""
    process = subprocess.run(
        [sys.executable, "-W", "error", path],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_all_names_exactly_the_public_ones() -> None:
    public = {
        name
        for name, value in vars(dagkit).items()
        if not name.startswith("_")
        and (getattr(value, "__module__", None) == "dagkit" or value is REQUIRED)
    }
    assert public == set(dagkit.__all__)
    assert len(dagkit.__all__) == 20


@pytest.mark.parametrize("name", ["README.md", "examples/README.md"])
def test_every_python_block_of_a_readme_runs_and_prints_what_it_says(
    tmp_path: Path, name: str
) -> None:
    """Python blocks run from top to bottom; a text block is what the one above it printed."""
    driver = ["import contextlib, io, json, sys", "outputs = []"]
    expected: list[str] = []
    for kind, text in CODE_BLOCK.findall((HERE / name).read_text()):
        if kind == "python":
            driver += [
                "with contextlib.redirect_stdout(io.StringIO()) as stream:",
                f"    exec(compile({text!r}, 'README.md', 'exec'))",
                "outputs.append(stream.getvalue())",
            ]
            expected.append("")
        elif kind == "text":
            expected[-1] = text
    driver.append("json.dump(outputs, sys.stdout)")
    (tmp_path / "iris.py").write_text("\n".join(driver))
    shutil.copytree(HERE / "examples", tmp_path / "examples")
    outputs = json.loads(run_example("iris.py", tmp_path))
    assert list(map(remove_times, outputs)) == list(map(remove_times, expected))


def test_the_first_program_of_the_readme_is_the_iris_example() -> None:
    code = (HERE / "examples" / "iris.py").read_text().split('"""\n\n', 1)[1]
    first_block = CODE_BLOCK.findall(README)[0][1]
    assert find_code_lines(code) == find_code_lines(first_block)


def test_the_readme_has_at_most_320_lines() -> None:
    assert len(README.splitlines()) <= 320


EXAMPLES = {
    "iris.py": "96.0% of 50 flowers are classified correctly",
    "ml.py": "another weak one, nothing else refitted",
    "failures.py": "did you mean 'report'?",
    "caching.py": "code changed: helper centre",
    "parallel.py": "equal results: True",
    "dask_cluster.py": "2 workers, equal results: True",
    "tqdm_progress.py": "100 squares, the last one 9801",
    "compare_caches.py": "   69        0        0        0",
    "study.py": "scaled: ran, cached, cached, cached, cached",
    "real_objects.py": "words.json changed",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs_alone_and_prints_what_it_proves(name: str, tmp_path: Path) -> None:
    shutil.copytree(HERE / "examples", tmp_path / "examples")
    assert EXAMPLES[name] in run_example(f"examples/{name}", tmp_path)


def test_every_example_is_tested() -> None:
    scripts = {path.name for path in (HERE / "examples").glob("*.py")}
    assert scripts == {*EXAMPLES, "benchmark.py"}


@pytest.mark.slow
def test_the_flights_are_real_work_with_a_catalog_and_a_table_of_runs(tmp_path: Path) -> None:
    shutil.copytree(HERE / "examples" / "flights", tmp_path / "flights")
    first, second = (run_example("flights/flights.py", tmp_path) for _ in range(2))
    assert re.search("known_flights +flights, planes +■ ran", first)
    assert re.search("known_flights +flights, planes +✓ cached", first)
    assert "input depth 1 → 4" in first
    rows = [line.split() for line in second.splitlines()[-5:]]
    assert rows[0] == ["depth", "r2", "minutes_off", "started", "seconds"]
    scores = [["1", "0.7737", "13.34"], ["4", "0.7727", "13.44"]]
    assert [row[:3] for row in rows[1:]] == scores * 2
    files = [path.relative_to(tmp_path / "flights/out") for path in tmp_path.rglob("out/*/*.*")]
    assert Path("depth-4/model.pkl") in files


@pytest.mark.slow
def test_the_picture_in_the_readme_is_a_plan_of_the_flights(tmp_path: Path) -> None:
    """It was drawn by dagkit; but for the times it is what a plan shows now."""

    def find_texts(svg: str) -> list[str]:
        return [remove_times(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]

    assert "(examples/pipeline.svg)" in README
    shutil.copytree(HERE / "examples" / "flights", tmp_path / "flights")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path / "flights")!r})
        from flights import pipeline
        pipeline.run("report", depth=1)
        print(pipeline.plan("report", depth=4).show().svg)
    """
    picture = (HERE / "examples" / "pipeline.svg").read_text()
    assert find_texts(picture) == find_texts(run_python(code))


@pytest.mark.slow
def test_the_notebook_shows_what_it_says_in_a_real_kernel(tmp_path: Path) -> None:
    import nbformat

    notebook = nbformat.read(HERE / "examples" / "notebook.ipynb", 4)
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code_cells)  # for those who read it on GitHub
    cells, _ = run_notebook(tmp_path, *[cell.source for cell in code_cells])
    texts = [
        [remove_times(output["data"]["text/plain"]) for output in outputs] for outputs in cells
    ]
    # Only a run that takes its time has a live picture beside its values.
    (graph,), (live, live_values), (plan,), (same, *_), (run, *_), (failure, *_), (history,) = texts
    assert graph.startswith("pipeline · 6 steps, 4 inputs\n  flowers")
    assert live.startswith("pipeline · 6 steps, 4 inputs · 6 ran · T\n")
    assert "report = '97.8% right; across folds 94.3% to 95.2%'" in live_values
    assert plan.startswith("pipeline · 6 steps, 4 inputs · 4 fresh, 1 stale, 1 maybe\n")
    assert "↻ stale   code changed: accuracy" in plan
    assert "↷ maybe   after accuracy" in plan
    assert same.startswith("pipeline · 6 steps, 4 inputs · 1 ran, 5 cached")
    assert "input trees 100 → 10" in run
    assert "KeyError: 'taget'" in failure
    assert "⊘ skipped   needs accuracy" in failure
    assert len(history.splitlines()) == 5
    image = re.findall(r'base64,([^"]+)"', cells[5][0]["data"]["text/html"])[0]
    assert b'stroke="#8c1a1f" stroke-width="2.4"' in base64.b64decode(image)


def test_the_iris_pipeline_has_at_most_twenty_lines() -> None:
    code = (HERE / "examples" / "iris.py").read_text()
    assert len(find_code_lines(code[code.index("@step") :])) <= 20


@pytest.mark.slow
def test_the_benchmark_prints_ratios() -> None:
    folders = os.pathsep.join([str(HERE), str(HERE / "examples")])
    text = run_python("import benchmark as b; b.SIZES = (20,); b.measure_run()", PYTHONPATH=folders)
    assert re.search(r"chain of 20 +\d+\.\d\d ×", text)


########################################################################################
### Bridges
########################################################################################

# A pipeline with everything that a scheduler must get right. Each call of a step is written to a
# file: the sensor sees nothing at first, and the first try of bounds fails.
SHOP = """
from pathlib import Path
from dagkit import Pipeline, Step, sensor, step

def calls(folder, name):
    with open(f"{folder}/calls", "a+") as file:
        file.write(f"{name} ")
        file.seek(0)
        return file.read().split().count(name)

@sensor(poke_interval=0.01, timeout=60, soft_fail=True)
def delivery(folder):
    return calls(folder, "delivery") > 1 and ["iris", "setosa"]

@step(map="delivery", cache=True)
def letters(delivery, folder):
    calls(folder, "letters")
    return len(delivery)

@step(outputs=("low", "high"), retries=1, retry_delay=0.01, retry_backoff=2.0)
def bounds(letters, folder):
    if calls(folder, "bounds") == 1:
        raise OSError("come again")
    return min(letters), max(letters)

def scaled(side, factor=2):
    return side * factor

wide = Step(scaled, name="wide", args={"side": "high"})
tall = Step(scaled, name="tall", args={"side": "low"})

@step
def report(wide, tall):
    return {"area": wide * tall}

@step
def unwanted(report):
    raise AssertionError("this is needed by no target")

pipeline = Pipeline(__name__)
"""
SHOP_STEPS = ("delivery", "letters", "bounds", "wide", "tall", "report")
SHOP_EDGES = [
    ("bounds", "tall"),
    ("bounds", "wide"),
    ("delivery", "letters"),
    ("letters", "bounds"),
    ("tall", "report"),
    ("wide", "report"),
]
SHOP_CALLS = ["delivery", "delivery", "letters", "letters", "bounds", "bounds"]


@pytest.fixture
def bridge(tmp_path: Path) -> Callable[[str], Any]:
    """Run code beside the module ``shop``; return its last line of output, decoded from JSON."""
    (tmp_path / "shop.py").write_text(SHOP)
    folders = [tmp_path, HERE, HERE / "examples", HERE / "examples" / "bridges"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "DO_NOT_TRACK": "1",  # Kedro and MLflow would call home
        "AIRFLOW_HOME": str(tmp_path / "airflow_home"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }

    def run(code: str) -> Any:
        # What these packages deprecate of each other is not ours to mend.
        flags = [
            "-Werror",
            "-Wignore::DeprecationWarning",
            "-Wignore::FutureWarning",
            "-Wignore:Using `httpx` with:UserWarning",
        ]
        (tmp_path / "script.py").write_text(textwrap.dedent(code))
        process = subprocess.run(
            [sys.executable, *flags, "script.py"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    return run


def was_each_call_made_once(folder: Path) -> bool:
    return (folder / "calls").read_text().split() == SHOP_CALLS


DEMOS = {
    "luigi_tasks.py": "6 tasks of Luigi: {'weak': 0.916, 'strong': 0.958}",
    "kedro_pipeline.py": "ParallelRunner {'weak': 0.916, 'strong': 0.958}",
    "mlflow_tracking.py": "FINISHED                  0.1                    0.965",
    "airflow_dag.py": "accuracies after ['split', 'strong', 'weak']",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.airflow if "airflow" in name else pytest.mark.bridges)
        for name in DEMOS
    ],
)
def test_every_bridge_runs_alone_and_prints_what_it_proves(bridge: Any, name: str) -> None:
    printed = bridge(f"""
        import contextlib, io, json, runpy, sys

        with contextlib.redirect_stdout(io.StringIO()) as out:
            sys.path[0] = {str(HERE / "examples" / "bridges")!r}
            runpy.run_path({str(HERE / "examples" / "bridges" / name)!r}, run_name="__main__")
        print(json.dumps(out.getvalue()))
    """)
    assert DEMOS[name] in printed


def test_every_bridge_is_tested_and_has_at_most_fifty_lines() -> None:
    files = [*(HERE / "examples" / "bridges").glob("*.py")]
    assert {file.name for file in files} == DEMOS.keys()
    assert all(len(find_code_lines(file.read_text())) <= 50 for file in files)


# Luigi


@pytest.mark.bridges
@pytest.mark.parametrize("workers", [1, 2])
def test_luigi_runs_a_pipeline_a_task_a_step(bridge: Any, tmp_path: Path, workers: int) -> None:
    """It has the edges of the graph, a namespace, and as many tries as the step has."""
    status, names, edges, tries, report = bridge(f"""
        import json, luigi
        from luigi_tasks import tasks
        from shop import pipeline

        config = luigi.configuration.get_config()
        config.set("scheduler", "retry_delay", "0")
        config.set("worker", "keep_alive", "true")
        made = tasks(pipeline, "shop", "report", folder=".")
        done = luigi.build(
            made.values(), local_scheduler=True, workers={workers}, detailed_summary=True
        )
        names = {{task: name for name, task in made.items()}}
        edges = [(names[need], name) for name, task in made.items() for need in task.requires()]
        tries = {{name: task.retry_count for name, task in made.items() if task.retry_count > 1}}
        families = [task.task_family for task in made.values()]
        report = made["report"].output().load()
        print(json.dumps([done.status.name, families, edges, tries, report]))
    """)
    assert status == "SUCCESS_WITH_RETRY"
    assert names == ["shop." + name for name in SHOP_STEPS]
    assert sorted(map(tuple, edges)) == SHOP_EDGES
    assert tries == {"bounds": 2}
    assert report == {"area": 96}
    assert was_each_call_made_once(tmp_path)


@pytest.mark.bridges
def test_a_task_of_luigi_is_complete_while_its_stored_result_fits(
    bridge: Any, tmp_path: Path
) -> None:
    """Luigi asks whether a target exists; here that is whether code and inputs are as they were."""
    (tmp_path / "flowers.txt").write_text("iris")
    answers = bridge("""
        import json, luigi
        from pathlib import Path
        from dagkit import Pipeline, step
        from luigi_tasks import tasks

        @step(cache=True)
        def size(path):
            return len(path.read_text())

        path, pipeline = Path("flowers.txt"), Pipeline(size)
        task = tasks(pipeline, "shop", path=path)["size"]
        found = [task.complete()]
        luigi.build([task], local_scheduler=True)
        found += [task.complete(), tasks(pipeline, "shop", path=path)["size"].complete()]
        path.write_text("setosa")
        print(json.dumps([*found, task.complete()]))
    """)
    assert answers == [False, True, True, False]


# Kedro


@pytest.mark.bridges
@pytest.mark.parametrize(
    ("runner", "catalog"),
    [("SequentialRunner", "DataCatalog"), ("ParallelRunner", "SharedMemoryDataCatalog")],
)
def test_kedro_runs_a_pipeline_a_node_a_step(
    bridge: Any, tmp_path: Path, runner: str, catalog: str
) -> None:
    """Its runners, and a dataset of its own that keeps the report; a default is a parameter."""
    names, edges, inputs, loaded = bridge(f"""
        import json
        from kedro.io import {catalog}
        from kedro.runner import {runner}
        from kedro_datasets.json import JSONDataset
        from kedro_pipeline import datasets, nodes
        from shop import pipeline

        wanted = nodes(pipeline).to_outputs("report")
        catalog = {catalog}(
            {{**datasets(pipeline, folder="."), "report": JSONDataset(filepath="report.json")}}
        )
        runner = {runner}()
        runner.run(wanted, catalog)
        pairs = wanted.node_dependencies.items()
        edges = [(need.name, node.name) for node, needs in pairs for need in needs]
        names = [node.name for node in wanted.nodes]
        print(json.dumps([names, edges, sorted(wanted.inputs()), catalog["report"].load()]))
    """)
    assert sorted(names) == sorted(SHOP_STEPS)
    assert sorted(map(tuple, edges)) == SHOP_EDGES
    assert inputs == ["folder", "params:factor"]
    assert loaded == json.loads((tmp_path / "report.json").read_text()) == {"area": 96}
    assert was_each_call_made_once(tmp_path)


@pytest.mark.bridges
def test_kedro_carries_a_whole_result_only_if_a_step_takes_it(bridge: Any) -> None:
    outputs = bridge("""
        import json
        from dagkit import Pipeline, step
        from kedro_pipeline import nodes

        @step(outputs=("low", "high"))
        def bounds(prices):
            return min(prices), max(prices)

        def whole(bounds):
            return bounds

        pipelines = Pipeline(bounds), Pipeline(bounds, whole)
        print(json.dumps([sorted(nodes(pipeline).all_outputs()) for pipeline in pipelines]))
    """)
    assert outputs == [["high", "low"], ["bounds", "high", "low", "whole"]]


# MLflow


@pytest.mark.bridges
def test_mlflow_tracks_runs_and_how_far_a_failed_one_came(bridge: Any) -> None:
    good, bad, record = bridge("""
        import json, mlflow
        from mlflow_tracking import track
        from shop import pipeline

        mlflow.set_tracking_uri("sqlite:///runs.db")
        mlflow.set_experiment(experiment_id=mlflow.create_experiment("shop", "artifacts"))
        track(pipeline, "report", folder=".", factor=3)
        try:
            track(pipeline, "report", folder=".", low="a", high=None)
        except TypeError:
            pass
        bad, good = mlflow.search_runs(output_format="list")
        record = mlflow.artifacts.load_dict(f"{good.info.artifact_uri}/record.json")
        facts = [
            [run.info.status, run.data.params, run.data.metrics, run.data.tags]
            for run in (good, bad)
        ]
        print(json.dumps([*facts, record]))
    """)
    status, params, metrics, tags = good
    assert (status, params, metrics["report.area"]) == (
        "FINISHED",
        {"folder": ".", "factor": "3"},
        216,
    )
    assert {f"seconds.{name}" for name in SHOP_STEPS} < metrics.keys()
    assert {name: tags[f"status.{name}"] for name in SHOP_STEPS} == dict.fromkeys(SHOP_STEPS, "ran")
    assert list(record["steps"]) == [*SHOP_STEPS]
    status, params, metrics, tags = bad
    assert (status, params) == ("FAILED", {"folder": ".", "factor": "2", "low": "a"})
    assert tags["status.wide"].startswith("TypeError: unsupported operand")
    assert "status.report" not in tags


# Airflow

SHOP_DAG = """
import json
from airflow.sdk import DAG
from airflow_dag import tasks
from shop import pipeline

with DAG("shop", params={"factor": 2}) as dag:
    tasks(pipeline, "report", folder=".")
"""


@pytest.mark.airflow
def test_airflow_gets_a_task_a_step_and_leaves_tries_and_checks_to_it(bridge: Any) -> None:
    names, edges, tries, waits = bridge(
        SHOP_DAG
        + """
names = [task.task_id for task in dag.tasks]
edges = [(need, task.task_id) for task in dag.tasks for need in task.upstream_task_ids]
bounds, delivery = dag.get_task("bounds"), dag.get_task("delivery")
tries = [bounds.retries, bounds.retry_delay.total_seconds(), bounds.retry_exponential_backoff]
waits = [delivery.poke_interval, delivery.timeout, delivery.soft_fail, delivery.mode]
print(json.dumps([names, edges, tries, waits]))
"""
    )
    assert names == [*SHOP_STEPS]
    assert sorted(map(tuple, edges)) == SHOP_EDGES
    assert tries == [1, 0.01, 2.0]
    assert waits == [0.01, 60, True, "reschedule"]


@pytest.mark.airflow
def test_airflow_runs_a_pipeline_on_a_real_database(bridge: Any, tmp_path: Path) -> None:
    """Values stay in the store: what travels between tasks is a fingerprint."""
    state, states, tries, sent, statuses, report = bridge(
        SHOP_DAG
        + """
if __name__ == "__main__":
    from dataclasses import replace
    from airflow.utils.db import initdb
    from dagkit import Pipeline

    initdb()
    done = dag.test(run_conf={"factor": 3})
    tasks = {task.task_id: task for task in done.get_task_instances()}
    states = {name: str(task.state) for name, task in tasks.items()}
    tries = {name: task.try_number for name, task in tasks.items() if task.try_number > 1}
    sent = [task.xcom_pull(task_ids=name) or "" for name, task in tasks.items()]
    once = {"cache": True, "version": done.run_id}
    steps = [step if step.cache else replace(step, **once) for step in pipeline.steps.values()]
    run = Pipeline(steps).run("report", folder=".", factor=3)
    statuses = {name: step.status for name, step in run.steps.items()}
    print(json.dumps([str(done.state), states, tries, sent, statuses, run["report"]]))
"""
    )
    assert (state, states) == ("success", dict.fromkeys(SHOP_STEPS, "success"))
    assert tries == {"bounds": 2}
    assert all(re.fullmatch("[0-9a-f]*", mark) for mark in sent)
    assert any(sent)
    assert (statuses, report) == (dict.fromkeys(SHOP_STEPS, "cached"), {"area": 216})
    assert was_each_call_made_once(tmp_path)


# The same real pipeline on all of them


@pytest.fixture
def flights(tmp_path: Path) -> str:
    """Give the head of a script that imports the example's pipeline, from a copy of its folder."""
    shutil.copytree(HERE / "examples" / "flights", tmp_path / "flights")
    return "import json, sys\nsys.path.insert(0, 'flights')\nfrom flights import pipeline\n"


REPORT = "13.3 minutes off on average; latest: Envoy Air\n"


@pytest.mark.bridges
def test_the_flights_run_unchanged_on_luigi(bridge: Any, flights: str, tmp_path: Path) -> None:
    report, files = bridge(
        flights
        + """
import luigi, pathlib
from luigi_tasks import tasks
made = tasks(pipeline, "flights", "report", depth=1)
assert luigi.build(made.values(), local_scheduler=True)
files = sorted(str(path) for path in pathlib.Path("flights/out").glob("*.*"))
print(json.dumps([made["report"].output().load(), files]))
"""
    )
    assert report == (tmp_path / "flights/out/depth-1/report.txt").read_text() == REPORT
    assert files == ["flights/out/by_airline.csv", "flights/out/known_flights.parquet"]


@pytest.mark.bridges
@pytest.mark.parametrize(
    ("runner", "catalog"),
    [("SequentialRunner", "DataCatalog"), ("ParallelRunner", "SharedMemoryDataCatalog")],
)
def test_the_flights_run_unchanged_on_kedro(
    bridge: Any, flights: str, runner: str, catalog: str
) -> None:
    report = bridge(
        flights
        + f"""
from kedro.io import {catalog}
from kedro.runner import {runner}
from kedro_pipeline import datasets, nodes
held, runner = {catalog}(datasets(pipeline, depth=1)), {runner}()
found = runner.run(nodes(pipeline).to_outputs("report"), held)
print(json.dumps(found["report"].load()))
"""
    )
    assert report == REPORT


@pytest.mark.airflow
def test_the_flights_run_unchanged_on_airflow(bridge: Any, flights: str, tmp_path: Path) -> None:
    state = bridge(
        flights
        + """
from airflow.sdk import DAG
from airflow_dag import tasks

with DAG("flights") as dag:
    tasks(pipeline, "report", depth=1)

if __name__ == "__main__":
    from airflow.utils.db import initdb

    initdb()
    print(json.dumps(str(dag.test().state)))
"""
    )
    assert state == "success"
    assert (tmp_path / "flights/out/depth-1/report.txt").read_text() == REPORT


@pytest.mark.bridges
def test_every_dataset_of_kedro_is_an_entry_of_a_catalog(bridge: Any) -> None:
    """Their CSV, Parquet, JSON and Pickle; a file edited behind their back is noticed."""
    statuses, reason, values = bridge("""
        import json, pathlib
        import pandas as pd
        from kedro_datasets.json import JSONDataset
        from kedro_datasets.pandas import CSVDataset, ParquetDataset
        from kedro_datasets.pickle import PickleDataset
        from dagkit import Pipeline

        def clean(raw): return raw.dropna()
        def model(clean): return {"mean": float(clean["size"].mean())}
        def report(model): return [model["mean"]]

        pathlib.Path("raw.csv").write_text("size\\n1\\n\\n3\\n")
        made = Pipeline(clean, model, report, store="store", catalog={
            "raw": CSVDataset(filepath="raw.csv"),
            "clean": ParquetDataset(filepath="clean.parquet"),
            "model": PickleDataset(filepath="model.pkl"),
            "report": JSONDataset(filepath="report.json"),
        })
        statuses = [[s.status for s in made.run().steps.values()] for _ in range(2)]
        pathlib.Path("report.json").write_text("[7]")
        reason = made.plan()["report"].reason
        value = made.run()["report"]
        pathlib.Path("raw.csv").write_text("size\\n5\\n")
        print(json.dumps([statuses, reason, [value, made.run()["report"]]]))
    """)
    assert statuses == [["ran"] * 3, ["cached"] * 3]
    assert reason == "dataset report changed"
    assert values == [[2.0], [5.0]]


@pytest.mark.bridges
def test_what_the_readme_says_of_luigi_and_kedro_runs(bridge: Any) -> None:
    """The two blocks that stand beside dagkit's own, over the same file."""
    luigi_block, kedro_block = (
        text for kind, text in CODE_BLOCK.findall(EXAMPLES_README) if kind == "py"
    )
    head = """
import json, pathlib
import pandas as pd
pathlib.Path("data").mkdir(exist_ok=True)
pathlib.Path("data/sales.csv").write_text("shop,sold\\nBern,3\\nOslo,\\nRiga,5\\n")
"""
    made = bridge(
        head
        + "import luigi\n\n\nclass Sales(luigi.ExternalTask):\n    def output(self):\n"
        + '        return luigi.LocalTarget("data/sales.csv")\n\n\n'
        + luigi_block
        + "\nassert luigi.build([Known()], local_scheduler=True)\n"
        + 'print(json.dumps(pathlib.Path("out/known.csv").read_text()))'
    )
    assert made == "shop,sold\nBern,3.0\nRiga,5.0\n"
    made = bridge(
        head
        + "from kedro.io import DataCatalog, MemoryDataset\n"
        + "from kedro.pipeline import node, pipeline\n"
        + "from kedro.runner import SequentialRunner\n"
        + kedro_block
        + '\nheld = DataCatalog({"sales": MemoryDataset(pd.read_csv("data/sales.csv"))})\n'
        + 'found = SequentialRunner().run(steps, held)["known"].load()\n'
        + "print(json.dumps(found['shop'].tolist()))"
    )
    assert made == ["Bern", "Riga"]
