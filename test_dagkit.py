"""The specification of dagkit, room by room in the order of the module."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import dataclasses
import errno
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
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
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, assert_type
from xml.etree import ElementTree

import hypothesis
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

import dagkit
from dagkit import (
    CatalogError,
    CycleError,
    DagkitError,
    DagkitWarning,
    DefaultsError,
    DuplicateNameError,
    Event,
    MissingInputError,
    MutationError,
    NoValueError,
    Pipeline,
    Plan,
    ResultError,
    Run,
    SensorTimeoutError,
    Skip,
    SourceError,
    Step,
    StepError,
    Store,
    UnknownNameError,
    WorkerError,
    sensor,
    step,
)

HERE = Path(__file__).parent


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


def at(function: Callable[..., Any]) -> str:
    """Give the place of a function of this file, as messages show it."""
    return f"test_dagkit.py:{function.__code__.co_firstlineno}"


def function(name: str, *needs: str, body: str = "...") -> Callable[..., Any]:
    """Make a function of that name, with these arguments."""
    scope: dict[str, Any] = {}
    exec(f"def {name}({', '.join(needs)}): {body}", scope)
    made: Callable[..., Any] = scope[name]
    return made


def run_python(code: str, **environment: str) -> str:
    """Run code in an interpreter of its own; give what it printed."""
    env = {**os.environ, "PYTHONPATH": str(HERE), **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Messages show places relative to the working folder; a store and its key are for one test."""
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGKIT_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("DAGKIT_KEY", raising=False)


########################################################################################
### Errors
########################################################################################

ERRORS = [
    error
    for error in vars(dagkit).values()
    if isinstance(error, type) and issubclass(error, DagkitError)
]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_public_and_survives_pickle_with_its_facts(error: type[DagkitError]) -> None:
    assert error.__name__ in dagkit.__all__
    twin = pickle.loads(pickle.dumps(error("what\n  where", step="fit", cycle=("a", "a"))))
    assert type(twin) is error
    assert str(twin) == "what\n  where"
    assert (twin.step, twin.cycle) == ("fit", ("a", "a"))


def test_every_error_is_also_the_builtin_a_caller_expects() -> None:
    for error in ERRORS:
        assert error is DagkitError or issubclass(
            error, TypeError | ValueError | KeyError | TimeoutError | RuntimeError
        )


def test_brief_values_are_short_and_name_shapes() -> None:
    brief = dagkit._brief
    assert brief(np.zeros((3, 4))) == "ndarray(3 x 4 float64)"
    assert brief(pd.DataFrame({"a": [1, 2]})) == "DataFrame(2 x 1)"
    assert brief([np.zeros(3), 1]) == "[ndarray(3 float64), 1]"
    assert len(brief("x" * 1000)) <= 80
    assert len(brief({i: "y" * 50 for i in range(100)})) <= 80


def test_a_broken_repr_does_no_harm() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise OSError("no")

    assert dagkit._brief([Broken()]) == "[<Broken whose repr raises OSError>]"


########################################################################################
### Steps
########################################################################################


def test_decorator_returns_the_very_same_function() -> None:
    def plain(x: int) -> int:
        return x

    assert step(plain) is plain
    assert step(retries=2)(plain) is plain
    assert total([1, 2]) == 3


def test_decorated_function_pickles_by_name_and_runs_in_a_process() -> None:
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


def test_step_serves_lambdas_partials_callable_objects_and_builtins() -> None:
    made = Pipeline(
        Step(lambda x: x + 1, name="more"),
        Step(Scaler(3), name="scaled", args={"x": "more"}),
        Step(functools.partial(pow, 2), name="power", args={"exp": "scaled"}),
        Step(len, name="size", args={"obj": "items"}),
        Step(max, name="largest", args={"items": "items"}),
    )
    run = made.run(x=1, items=[1, 5, 2])
    assert dict(run) == {"more": 2, "scaled": 6, "power": 64, "size": 3, "largest": 5} | {
        name: run[name] for name in run if name == "mod"
    }


def test_an_argument_that_a_partial_has_bound_is_no_edge() -> None:
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


def test_positional_only_and_keyword_only_arguments_are_edges() -> None:
    def mixed(a: int, /, b: int, *, c: int, d: int = 4) -> tuple[int, ...]:
        return a, b, c, d

    assert Pipeline(mixed).run(a=1, b=2, c=3)["mixed"] == (1, 2, 3, 4)
    assert Pipeline(mixed).run(a=1, b=2, c=3, d=5)["mixed"] == (1, 2, 3, 5)


def test_a_function_with_kwargs_gets_what_args_names() -> None:
    def collect(*rest: int, **named: int) -> dict[str, int]:
        assert not rest
        return named

    made = Pipeline(Step(collect, args={"a": "x", "b": "y"}))
    assert made.run(x=1, y=2)["collect"] == {"a": 1, "b": 2}


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

    for made in (Pipeline(rate, use), Pipeline({"__name__": "m", "rate": rate}, use)):
        assert made.run("use", x=1)["use"] == 2


def test_a_class_can_be_a_step() -> None:
    assert Pipeline(Step(Scaler, name="scaler")).run(factor=2)["scaler"].factor == 2


def test_unnamed_arguments_error_names_the_step_and_the_way_out() -> None:
    def collect(a: int, *rest: int) -> None: ...

    with pytest.raises(StepError) as caught:
        step(collect)
    assert str(caught.value) == (
        "step 'collect' has arguments without names (*args, **kwargs, or no readable signature), "
        "which cannot be edges\n"
        f"  collect(a, *rest) at {at(collect)}\n"
        "  expected named arguments; or name what it gets by args={argument: value}"
    )
    assert caught.value.step == "collect"


def test_unknown_argument_in_args_error_has_the_nearest_name() -> None:
    def fit(data: int, alpha: float = 0.1) -> None: ...

    with pytest.raises(StepError) as caught:
        Step(fit, args={"dta": "raw"})
    assert str(caught.value) == (
        "step 'fit' has no argument 'dta', which args= names\n"
        f"  fit(data, alpha=0.1) at {at(fit)}\n"
        "  known names: alpha, data; did you mean 'data'?"
    )


def test_unknown_option_error_has_the_nearest_name() -> None:
    with pytest.raises(StepError) as caught:
        step(retrys=2)  # type: ignore[call-overload]
    assert str(caught.value) == (
        "@step has no option 'retrys'\n"
        "  known options: args, cache, local, map, name, outputs, retries, retry_backoff, "
        "retry_delay, version; did you mean 'retries'?"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": "ab"}, "has outputs='ab'\n{}\n  expected a tuple such as ('train', 'test')"),
        ({"retries": -1}, "has retries=-1\n{}\n  expected a number of extra tries, 0 or more"),
        ({"retries": True}, "has retries=True\n{}\n  expected a number of extra tries, 0 or more"),
        ({"retry_delay": "1"}, "has retry_delay='1'\n{}\n  expected seconds, 0 or more"),
        ({"retry_backoff": -2}, "has retry_backoff=-2\n{}\n  expected a factor, 0 or more"),
        ({"version": []}, "has version=[]\n{}\n  expected something hashable"),
        ({"local": "no"}, "has local='no'\n{}\n  expected True or False"),
        (
            {"args": {"data": 1}},
            "has args={{'data': 1}}\n{}\n  expected a dict: argument -> value it takes",
        ),
        ({"args": 3}, "has args=3\n{}\n  expected a dict: argument -> value it takes"),
        (
            {"outputs": ("a", "not good")},
            "makes a value named 'not good', which no argument can be called\n{}\n"
            "  expected a name such as 'clean': @step(name=...) or Step(..., name=...)",
        ),
    ],
)
def test_wrong_options_are_errors_that_say_what_is_expected(
    options: dict[str, Any], message: str
) -> None:
    def fit(data: int) -> None: ...

    with pytest.raises(StepError) as caught:
        step(**options)(fit)
    assert str(caught.value) == f"step 'fit' {message.format(f'  fit(data) at {at(fit)}')}"


def test_a_lambda_without_a_name_is_an_error() -> None:
    nameless = lambda x: x  # noqa: E731
    with pytest.raises(StepError, match="makes a value named '<lambda>'"):
        Step(nameless)


def test_decorating_what_is_no_function_points_to_step() -> None:
    with pytest.raises(StepError) as caught:
        step(functools.partial(pow, 2))
    assert str(caught.value).endswith(
        "a class, a partial or a callable object becomes a step by Step(thing, name=...)"
    )
    with pytest.raises(StepError, match=r"Step\(\) was given 3; expected a callable"):
        Step(3)  # type: ignore[arg-type]


def test_steps_are_frozen_and_equal_by_what_they_are() -> None:
    one, twin = Step(spread), Step(spread)
    assert one == twin
    assert one != Step(spread, retries=1)
    with pytest.raises(AttributeError):
        one.name = "other"  # type: ignore[misc]


########################################################################################
### Graph
########################################################################################


def test_graph_nodes_are_all_names_with_a_value(shop: Pipeline) -> None:
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
    assert set(graph.edges) == {
        ("prices", "total"),
        ("total", "mean"),
        ("prices", "mean"),
        ("digits", "mean"),
        ("prices", "bounds"),
        ("bounds", "low"),
        ("bounds", "high"),
        ("low", "spread"),
        ("high", "spread"),
    }
    assert graph.nodes["low"]["step"] is graph.nodes["bounds"]["step"]
    assert graph.nodes["prices"]["step"] is None


def test_graph_is_a_frozen_copy(shop: Pipeline) -> None:
    graph = shop.graph
    with pytest.raises(nx.NetworkXError):
        graph.remove_node("total")
    graph.nodes["total"]["step"] = None
    assert shop.run("mean", prices=[1, 2])["mean"] == 1.5


def test_steps_and_inputs_are_readable(shop: Pipeline) -> None:
    assert list(shop.steps) == ["total", "mean", "bounds", "spread"]
    assert shop.steps["bounds"].outputs == ("low", "high")
    assert shop.inputs["digits"] == 2
    assert shop.inputs["prices"] is inspect.Parameter.empty


def test_cycle_error_shows_the_shortest_path_with_places() -> None:
    def clean(fit: int, raw: int) -> None: ...
    def fit(clean: int, detour: int) -> None: ...
    def detour(longer: int) -> None: ...
    def longer(clean: int) -> None: ...

    with pytest.raises(CycleError) as caught:
        Pipeline(detour, longer, clean, fit).run()
    assert str(caught.value) == (
        "steps need each other in a cycle: clean -> fit -> clean\n"
        f"  clean(fit, raw) at {at(clean)}\n"
        f"  fit(clean, detour) at {at(fit)}\n"
        "  rename an argument, or let it be an input"
    )
    assert caught.value.cycle == ("clean", "fit", "clean")


def test_cycle_through_an_output_names_only_steps() -> None:
    @step(outputs=("train", "test"))
    def split(model: int) -> None: ...
    def model(train: int) -> None: ...

    with pytest.raises(CycleError) as caught:
        Pipeline(split, model).graph  # noqa: B018
    assert caught.value.cycle == ("split", "model", "split")


def test_self_loop_is_a_cycle() -> None:
    def clean(clean: int) -> None: ...

    with pytest.raises(CycleError) as caught:
        Pipeline(clean).run()
    assert str(caught.value) == (
        "steps need each other in a cycle: clean -> clean\n"
        f"  clean(clean) at {at(clean)}\n"
        "  rename an argument, or let it be an input"
    )


def test_a_cycle_of_thousands_is_found() -> None:
    ring = [function(f"s{i}", f"s{(i + 1) % 5000}") for i in range(5000)]
    with pytest.raises(CycleError) as caught:
        Pipeline(ring).run()
    assert len(caught.value.cycle) == 5001


def test_duplicate_name_error_names_both_places() -> None:
    other = types.ModuleType("other")
    exec("def total(x): ...", vars(other))
    with pytest.raises(DuplicateNameError) as caught:
        Pipeline(total, other).run()
    assert str(caught.value) == (
        "two steps make a value 'total'\n"
        f"  total(prices) at {at(total)}\n"
        "  total(x) at <string>:1\n"
        "  give one of them another name: @step(name=...)"
    )
    assert caught.value.name == "total"


def test_the_same_step_from_two_sources_is_one_step(shop: Pipeline) -> None:
    assert list(Pipeline(shop, total, [bounds]).steps) == list(shop.steps)


def test_an_output_named_like_a_step_is_a_duplicate() -> None:
    with pytest.raises(DuplicateNameError, match="two steps make a value 'split'"):
        Pipeline(Step(lambda: (1,), name="split", outputs=("split",))).run()


def test_clash_of_defaults_error_names_both_steps() -> None:
    def one(alpha: float = 0.1) -> None: ...
    def two(alpha: float = 0.2) -> None: ...

    with pytest.raises(DefaultsError) as caught:
        Pipeline(one, two).run()
    assert str(caught.value) == (
        "input 'alpha' has two defaults: 0.1 and 0.2\n"
        f"  one(alpha=0.1) at {at(one)}\n"
        f"  two(alpha=0.2) at {at(two)}\n"
        "  make them the same, or give the argument a name of its own"
    )


def test_equal_defaults_agree_and_true_is_not_one() -> None:
    def same(n: int = 1000) -> int:
        return n

    def again(n: int = int("1000")) -> int:
        return n

    def other(flag: bool = True) -> None: ...
    def number(flag: int = 1) -> None: ...

    assert Pipeline(same, again).run("again")["again"] == 1000
    with pytest.raises(DefaultsError, match="two defaults: True and 1"):
        Pipeline(other, number).run()


def test_a_default_of_one_step_serves_another_without() -> None:
    def one(alpha: int = 3) -> int:
        return alpha

    def two(alpha: int) -> int:
        return -alpha

    assert dict(Pipeline(two, one).run()) == {"two": -3, "one": 3}


def test_a_steps_value_beats_a_default() -> None:
    def alpha() -> int:
        return 5

    def use(alpha: int = 1) -> int:
        return alpha

    assert Pipeline(alpha, use).run("use")["use"] == 5


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        *[(name, True) for name in ("claen", "cleen", "clea", "cleans", "lean")],
        *[(name, False) for name in ("clever", "x", "dirty", "naelc", "celna")],
    ],
)
def test_defaulted_argument_one_typo_from_a_step_is_a_warning(argument: str, near: bool) -> None:
    """Elsewhere the typo silently drops an edge."""
    clean = function("clean")
    fit = function("fit", f"{argument}=None", body="return 1")
    made = Pipeline(clean, fit)
    if not near:
        assert made.run("fit")["fit"] == 1
        return
    with pytest.warns(DagkitWarning) as caught:
        made.run("fit")
    assert [str(warning.message) for warning in caught] == [
        f"step 'fit' has an argument '{argument}' with a default, and there is a step 'clean': "
        f"is it a typo? As it stands '{argument}' is an input\n"
        f"  fit({argument}=None) at <string>:1"
    ]
    assert (caught[0].filename, caught[0].lineno) == ("<string>", 1)


def test_numbered_names_are_no_typos() -> None:
    Pipeline(function("fold1"), function("fold2"), function("use", "fold3=0")).run()


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


def test_any_value_can_be_given_and_what_only_served_it_does_not_run(shop: Pipeline) -> None:
    run = shop.run("mean", total=10, prices=[1, 2])
    assert list(run.steps) == ["mean"]
    assert run["mean"] == 5.0


def test_outputs_are_targets_and_can_be_given_one_by_one(shop: Pipeline) -> None:
    assert shop.run("high", prices=[1, 6])["high"] == 6
    run = shop.run("spread", low=-1, prices=[1, 6])
    assert (run["spread"], list(run.steps)) == (7, ["bounds", "spread"])
    run = shop.run("spread", low=1, high=4)
    assert (run["spread"], list(run.steps)) == (3, ["spread"])


def test_a_whole_step_with_outputs_can_be_given(shop: Pipeline) -> None:
    run = shop.run("spread", "low", bounds=(2, 9))
    assert (dict(run), list(run.steps)) == ({"spread": 7, "low": 2}, ["spread"])
    with pytest.raises(ResultError, match="has 2 outputs"):
        shop.run("spread", bounds=(1, 2, 3))


def test_inputs_and_given_values_can_be_targets(shop: Pipeline) -> None:
    assert dict(shop.run("digits", "total", "mean", total=4, prices=[2])) == {
        "digits": 2,
        "total": 4,
        "mean": 4.0,
    }


def test_unknown_target_error_has_the_nearest_name(shop: Pipeline) -> None:
    with pytest.raises(UnknownNameError) as caught:
        shop.run("men", prices=[])
    assert str(caught.value) == (
        "'men' cannot be a target of run(): no step makes or takes it\n"
        "  known names: bounds, digits, high, low, mean, prices, spread, total; "
        "did you mean 'mean'?"
    )
    assert caught.value.unknown == ("men",)


def test_unknown_inputs_come_all_at_once(shop: Pipeline) -> None:
    with pytest.raises(UnknownNameError) as caught:
        shop.run("mean", price=[], digit=1, zzz=0)
    assert str(caught.value) == (
        "'digit', 'price', 'zzz' cannot be given to run(): no step makes or takes it\n"
        "  known names: bounds, digits, high, low, mean, prices, spread, total; "
        "did you mean 'digits' for 'digit', 'prices' for 'price'?"
    )


def test_a_target_that_is_no_name_is_an_error(shop: Pipeline) -> None:
    for wrong in (total, ["mean"], {"prices": [1]}):
        with pytest.raises(UnknownNameError, match=r"cannot be a target of run\(\): targets are"):
            shop.run(wrong)  # type: ignore[arg-type]


def test_missing_inputs_come_all_at_once_with_places() -> None:
    def fit(dta: int, alpha: float = 0.1) -> None: ...
    def plot(fit: int, colour: str, data: int) -> None: ...

    with pytest.raises(MissingInputError) as caught:
        Pipeline(fit, plot).run(data=1)
    assert str(caught.value) == (
        "step 'fit' needs 'dta': no step makes it and run() was not given it\n"
        f"  fit(dta, alpha=0.1) at {at(fit)}\n"
        "step 'plot' needs 'colour': no step makes it and run() was not given it\n"
        f"  plot(fit, colour, data) at {at(plot)}\n"
        "  known names: alpha, data, fit, plot; did you mean 'data' for 'dta'?"
    )
    assert caught.value.missing == ("dta", "colour")


def test_an_input_as_target_must_be_given(shop: Pipeline) -> None:
    with pytest.raises(MissingInputError, match="target 'prices' is an input, and run"):
        shop.run("prices")


def test_inputs_of_other_steps_need_no_value(shop: Pipeline) -> None:
    def lonely(unheard: int) -> None: ...

    assert Pipeline(shop, lonely).run("total", prices=[1])["total"] == 1


def test_steps_declared_in_order_run_in_that_order(shop: Pipeline) -> None:
    assert list(shop.run(prices=[1, 2]).steps) == ["total", "mean", "bounds", "spread"]


def test_order_is_the_same_under_other_hash_seeds() -> None:
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
    size = draw(st.integers(1, 12))
    steps = [
        (f"s{i}", [f"s{j}" for j in sorted(draw(st.sets(st.integers(0, i - 1)))) if i])
        if i
        else ("s0", [])
        for i in range(size)
    ]
    shuffled: list[tuple[str, list[str]]] = draw(st.permutations(steps))
    return shuffled


@hypothesis.given(dags(), st.data())
def test_order_of_any_dag_respects_its_edges(
    dag: list[tuple[str, list[str]]], data: st.DataObject
) -> None:
    made = Pipeline([function(name, *needs, body=f"return {name!r}") for name, needs in dag])
    targets = data.draw(st.lists(st.sampled_from([name for name, _ in dag]), unique=True))
    order = list(made.run(*targets).steps)
    needs = dict(dag)
    assert all(set(needs[name]) <= set(order[:i]) for i, name in enumerate(order))
    wanted = set(targets or needs)
    assert set(order) == wanted.union(*[nx.ancestors(made.graph, name) for name in wanted])


########################################################################################
### Cache
########################################################################################

# Edits of code, each a line: name :: code. ⏎ ends a line of the code (here it may also begin a
# line), "= x" is short for "def step(x): return x", ▸ begins another file. Each «old→new» is an
# edit of its own.

KEEPING = r'''
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
'''

CHANGING = r"""
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
"""


def edits(block: str) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """Yield name, files before and files after, of each edit in a block."""
    mark = re.compile("«([^«»]*?)→([^«»]*?)»")
    for line in block.strip().replace("\n⏎", "⏎").splitlines():
        name, _, code = line.partition(" :: ")
        code = code.replace("⏎", "\n")
        old = mark.sub(r"\1", code)
        for number, found in enumerate(mark.finditer(code)):
            head, tail = code[: found.start()], code[found.end() :]
            new = mark.sub(r"\1", head) + found[2] + mark.sub(r"\1", tail)
            yield f"{name} {number or ''}".strip(), files_of(old), files_of(new)


def files_of(code: str) -> dict[str, str]:
    code = re.sub("(?m)^= ", "def step(x): return ", code)
    parts = [part.partition("\n") for part in f"app\n{code}".split("\n▸")]
    return {f"{name}.py": text + "\n" for name, _, text in parts}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


def run_in(folder: Path, code: str, **environment: str) -> str:
    """Run code in a process that sees the modules of a folder as they are now."""
    path = os.pathsep.join([str(HERE), str(folder)])
    return run_python(code, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1", **environment)


EDITS = [(*edit, False) for edit in edits(KEEPING)] + [(*edit, True) for edit in edits(CHANGING)]

PROBE = """
import importlib, json, os, sys
import dagkit
def probe(folder):
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return dagkit._CodeMemo().parts(importlib.import_module("app").step)[0]
    except dagkit._Opaque as error:
        return str(error)
    finally:
        sys.path.remove(folder)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or list(getattr(module, "__path__", [""]))[0]
                   ).startswith(folder):
                del sys.modules[name]
top = os.environ["TOP"]
print(json.dumps({x: probe(os.path.join(top, x)) for x in sorted(os.listdir(top))}))
"""


@pytest.fixture(scope="session")
def probed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Parts of the code before the edits under two hash seeds, and after them, elsewhere."""
    before, after = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("elsewhere")
    for number, (_, old, new, _) in enumerate(EDITS):
        write(before / str(number), old)
        write(after / str(number), new)
    return [
        json.loads(run_in(top, PROBE, TOP=str(top), PYTHONHASHSEED=seed))
        for top, seed in ((before, "0"), (before, "1"), (after, "2"))
    ]


@pytest.mark.parametrize("number", range(len(EDITS)), ids=[edit[0] for edit in EDITS])
def test_an_edit_counts_exactly_if_it_changes_what_the_step_does(
    number: int, probed: list[dict[str, Any]]
) -> None:
    one, again, edited = (each[str(number)] for each in probed)
    assert type(one) is dict
    assert one == again
    assert (one != edited) == EDITS[number][3]


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
    ("cell", "changed"),
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
def test_a_cell_of_a_notebook_counts_by_what_it_changes(cell: str, changed: bool) -> None:
    """Running a cell again, or the cell of a helper, is judged by the outcome."""
    space: dict[str, Any] = {"__name__": "__main__", "np": np, "a": np.ones(3)}
    exec(NOTEBOOK, space)
    memo = dagkit._CodeMemo()
    before = memo.parts(space["step"])
    exec(cell, space)
    memo.begin()
    after = memo.parts(space["step"])
    assert after[0] == dagkit._CodeMemo().parts(space["step"])[0]
    assert (after != before) == changed


def test_parts_of_code_have_names() -> None:
    closed = 3

    def clean(raw: Any, alpha: float = 1.0) -> Any:
        return spread(raw, closed), alpha, HERE, np.mean(raw)

    parts = dagkit._CodeMemo().parts(clean)[0]
    assert {"clean", "closure closed", "constant HERE", "default alpha", "helper spread"} <= {
        *parts
    }
    assert parts["package numpy"] == np.__version__


class Other(Scaler):
    pass


def nested() -> Any:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    return deep


FRAME = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
VALUES: list[Any] = [
    None, 0, 1, 2**80, True, 0.0, -0.0, 1.0, math.nan, math.inf, 1j, complex(-0.0, 1), "", "1",
    b"", b"1", bytearray(b"1"), [], (), {}, set(), frozenset(), [1], (1,), {1}, frozenset({1}),
    [True], [1.0], ["1"], [b"1"], [[1]], [(1,)], [0.0], [-0.0], [math.nan], [1, 2], [2, 1],
    [[1], 2], [[1, 2]], {1: 2}, {2: 1}, {1: 2, 3: 4}, {3: 4, 1: 2}, {"1": 2}, {True: 2}, {1: [2]},
    {1, 2}, {frozenset({1})}, range(3), slice(1), Scaler, Scaler(1), Scaler(2), Other(1), len, int,
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


def test_values_that_differ_have_fingerprints_that_differ() -> None:
    """By type, content and order: dicts by insertion, arrays by dtype and shape, frames by all."""
    prints = [dagkit._fingerprint(value) for value in VALUES]
    assert len(set(prints)) == len(prints)
    assert {len(mark) for mark in prints} == {64}


def test_equal_values_have_equal_fingerprints_however_they_were_built() -> None:
    mark = dagkit._fingerprint
    for value in VALUES:
        with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):
            twin = pickle.loads(pickle.dumps(value))
            assert mark(twin) == mark(value)
            assert mark([value, {"k": value}]) == mark([value, {"k": twin}])
    base = np.arange(12.0).reshape(3, 4)
    assert mark(base) == mark(np.asfortranarray(base)) == mark(np.repeat(base, 2, axis=0)[::2])
    pieces = pd.DataFrame({"a": [1.0, 2.0]})
    pieces["b"] = ["x", "y"]
    assert mark(pieces) == mark(FRAME)
    assert mark([math.nan]) == mark([math.inf - math.inf])
    assert mark({"a", "b", "c"}) == mark({"c", "b", "a"})
    ring: list[Any] = [1]
    ring.append(ring)
    assert mark(copy.deepcopy(ring)) == mark(ring) != mark([1])


def test_fingerprints_are_the_same_in_every_process_and_hash_seed() -> None:
    code = """
        import dagkit, test_dagkit
        words = "alpha beta gamma delta".split()
        value = [set(words), {"k": frozenset(map(frozenset, words))}, {(w, 1.5) for w in words}]
        print([dagkit._fingerprint(x) for x in (value, *test_dagkit.VALUES)])
    """
    assert run_python(code, PYTHONHASHSEED="0") == run_python(code, PYTHONHASHSEED="1")


def test_a_path_counts_by_the_content_of_its_file_or_folder(tmp_path: Path) -> None:
    place = tmp_path / "a"
    seen = [dagkit._fingerprint(place)]
    for text in ("1", "2", "22"):
        place.write_text(text)
        seen.append(dagkit._fingerprint(place))
    place.write_text("1")
    assert dagkit._fingerprint([place]) != dagkit._fingerprint([str(place)])
    assert dagkit._fingerprint(place) == seen[1]
    place.unlink()
    for change in (place.mkdir, (place / "x").touch, (place / "y").touch):
        change()
        seen.append(dagkit._fingerprint(place))
    (place / "y").rename(place / "z")
    seen.append(dagkit._fingerprint(place))
    (place / "loop").symlink_to(place)
    seen.append(dagkit._fingerprint(place))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    "make",
    [threading.Lock, lambda: sqlite3.connect(":memory:"), lambda: (_ for _ in "x"), nested],
    ids=["lock", "connection", "generator", "nested too deeply"],
)
def test_what_has_no_content_has_no_fingerprint(make: Callable[[], Any]) -> None:
    value = make()
    for holder in (value, [value], {"k": (value,)}):
        with pytest.raises(dagkit._Opaque):
            dagkit._fingerprint(holder)
    if hasattr(value, "close"):
        value.close()


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


def shape(value: Any) -> Any:
    """Say in another way what a fingerprint must tell apart."""
    kind = type(value).__name__
    if isinstance(value, list | tuple):
        return (kind, *map(shape, value))
    if isinstance(value, dict):
        return (kind, *((shape(k), shape(v)) for k, v in value.items()))
    if isinstance(value, set | frozenset):
        return (kind, *sorted(map(repr, map(shape, value))))
    if isinstance(value, complex):
        return (kind, shape(value.real), shape(value.imag))
    if isinstance(value, float):
        return (kind, "nan" if math.isnan(value) else value.hex())
    return (kind, repr(value))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(trees, trees)
def test_fingerprints_are_equal_exactly_if_values_and_types_are(one: Any, two: Any) -> None:
    mark = dagkit._fingerprint
    assert (mark(one) == mark(two)) == (shape(one) == shape(two))
    assert mark([one, one]) == mark([one, pickle.loads(pickle.dumps(one))])


def went(run: Run) -> str:
    """Tell how each step went, in the order in which they ended."""
    return ", ".join(f"{x.name} {x.status}" for x in run.steps.values())


def warned(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Give what a call returned, and dagkit's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(x.message) for x in caught if x.category is DagkitWarning]


def entries(made: Pipeline) -> list[Path]:
    return sorted(Path(path) for _, _, path in made.store._files("entries"))


@step(cache=True)
def squares(n: int) -> list[int]:
    return [i * i for i in range(n)]


@step(cache=True)
def biggest(squares: list[int]) -> int:
    return max(squares)


@pytest.fixture
def kept() -> Pipeline:
    return Pipeline(squares, biggest)


APP = {
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
}
RUN_APP = """
import json, os, sys
from pathlib import Path
import app, dagkit
loads, real = [], dagkit.Store._load
def load(self, head, part=""):
    loads.append(part or head.step)
    return real(self, head, part)
dagkit.Store._load = load
inputs = json.loads(os.environ.get("INPUTS", "{}"))
pipeline = dagkit.Pipeline(app)
if os.environ.get("PLAN"):
    plan = pipeline.plan("model", path=Path("data.txt"), **inputs)
    print(*[f"{x.name} {x.status}: {x.reason}" for x in plan.values()], loads, sep=chr(10))
else:
    run = pipeline.run("model", path=Path("data.txt"), **inputs)
    print(loads, run["model"])
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the project of APP in a process of its own, after an edit; give what it printed."""
    folder = write(tmp_path / "app", {**APP, "data.txt": "1 2 3"})
    monkeypatch.chdir(folder)

    def run(file: str = "app.py", old: str = "", new: str = "", /, **environment: str) -> str:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new) if old else text)
        return " ".join(run_in(folder, RUN_APP, **environment).splitlines())

    return run


def test_an_edit_runs_what_it_may_change_and_stops_where_a_value_is_equal(
    app: Callable[..., str],
) -> None:
    """Nothing is loaded that nothing needs: the list shows the loads, the target's last."""
    assert app() == "raw clean split model ['raw', 'clean', 'train', 'model'] 3.0"
    assert app() == "['model'] 3.0"
    assert app("helpers.py", "def", "# A comment\n\ndef") == "['model'] 3.0"
    assert app("helpers.py", "int(x)", "0 + int(x)") == "clean ['raw', 'model'] 3.0"
    assert app("app.py", "clean[2:]", "clean[2:] * 2") == "split ['clean', 'model'] 3.0"
    assert app("data.txt", "3", "4") == "raw clean split ['raw', 'clean', 'model'] 3.0"
    assert app(INPUTS='{"alpha": 2.0}') == "model ['train', 'model'] 60.0"
    everything = "raw clean split model ['raw', 'clean', 'train', 'model']"
    assert app("data.txt", "1", "5") == f"{everything} 7.0"
    assert app("data.txt", "5", "1") == "['model'] 3.0"


def test_the_first_load_of_a_target_is_when_it_is_asked_for(
    kept: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.run(n=4)
    loads: list[str] = []
    real = Store._load

    def load(self: Store, head: Any, part: str = "") -> Any:
        loads.append(head.step)
        return real(self, head, part)

    monkeypatch.setattr(Store, "_load", load)
    run = kept.run(n=4)
    assert (loads, went(run)) == ([], "squares cached, biggest cached")
    assert (run["biggest"], run["biggest"], loads) == (9, 9, ["biggest"])


def test_every_kind_of_input_is_told_apart_by_a_cached_step() -> None:
    @step(cache=True)
    def kind(x: Any) -> str:
        return f"{type(x).__name__} {x!r}"

    made = Pipeline(kind)
    for value in (1, True, 1.0, "1", b"1", 0.0, -0.0, [1], (1,), {1}):
        assert made.run(x=value)["kind"] == f"{type(value).__name__} {value!r}"
    assert len(entries(made)) == 10


@pytest.mark.parametrize("mark", [1, "a", (1, "b")])
def test_version_is_part_of_the_key(mark: Any) -> None:
    def answer() -> int:
        return 42

    for version, expected in ((None, "ran"), (mark, "ran"), (mark, "cached"), (None, "cached")):
        made = Pipeline(Step(answer, cache=True, version=version))
        assert went(made.run()) == f"answer {expected}"


def test_none_is_kept_and_an_exception_is_not() -> None:
    @step(cache=True)
    def nothing() -> None:
        pass

    made = Pipeline(nothing)
    assert [went(made.run()) for _ in range(2)] == ["nothing ran", "nothing cached"]
    assert made.run()["nothing"] is None

    def fails() -> None:
        raise ValueError("no")

    bad = Pipeline(Step(fails, cache=True), on_error="continue")
    assert [went(bad.run()) for _ in range(2)] == ["fails failed"] * 2
    assert len(entries(bad)) == 1


def test_after_a_failure_finished_results_are_there() -> None:
    @step
    def broken(squares: list[int]) -> int:
        raise ZeroDivisionError

    for expected in ("ran", "cached"):
        made = Pipeline(squares, broken, on_error="continue")
        assert went(made.run(n=3)) == f"squares {expected}, broken failed"


def fails_once() -> None:
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
        fails_once()
        return slow * 2

    made = Pipeline(slow, shaky)
    run = made.run(n=1)
    assert (run.steps["shaky"].attempts, run["shaky"]) == (2, 4)
    run = made.run(n=1)
    assert (went(run), run["shaky"]) == ("slow cached, shaky cached", 4)


def test_another_library_function_as_a_step_is_another_step() -> None:
    for function, value in ((statistics.mean, 4), (statistics.median, 2)):
        made = Pipeline(Step(function, name="middle", cache=True))
        assert made.run(data=[1, 2, 9])["middle"] == value
    made = Pipeline(Step(statistics.mean, name="middle", cache=True))
    assert made.plan(data=[1, 2, 9])["middle"].status == "fresh"
    made = Pipeline(Step(statistics.mode, name="middle", cache=True))
    assert made.plan(data=[1, 2, 9])["middle"].reason == "code changed: median, mode"
    for kind in (list, tuple):
        made = Pipeline(Step(kind, name="kept", args={"iterable": "n"}, cache=True))
        assert type(made.run(n=(1,))["kept"]) is kind


def test_a_chain_of_1000_cached_steps_is_reused() -> None:
    chain = [Step(function("s0", "x", body="return x"), cache=True)]
    for i in range(1, 1000):
        chain.append(Step(function(f"s{i}", f"s{i - 1}", body=f"return s{i - 1} + 1"), cache=True))
    made = Pipeline(chain)
    assert made.run("s999", x=1)["s999"] == 1000
    run = made.run("s999", x=1)
    assert {x.status for x in run.steps.values()} == {"cached"}
    assert run["s999"] == 1000


def test_a_cached_step_never_hides_behind_an_uncached_one(monkeypatch: pytest.MonkeyPatch) -> None:
    @step
    def reading() -> str:
        return os.environ["READING"]

    @step(cache=True)
    def shown(reading: str) -> str:
        return f"<{reading}>"

    made = Pipeline(reading, shown)
    for text, expected in (("a", "ran"), ("b", "ran"), ("a", "cached")):
        monkeypatch.setenv("READING", text)
        run = made.run("shown")
        assert (run["shown"], went(run)) == (f"<{text}>", f"reading ran, shown {expected}")


def test_a_class_edited_behind_a_stored_value_runs_who_uses_the_value(tmp_path: Path) -> None:
    """The consumer does not name the class; only the value leads to it."""
    write(tmp_path / "app", {
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


def packages(top: Path, version: str, body: str) -> None:
    """Install a package of that version, by hand."""
    write(top / "site-packages", {
        "fakepkg/__init__.py": body,
        "fakepkg-0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: fakepkg\nVersion: {version}",
        "fakepkg-0.dist-info/top_level.txt": "fakepkg\n",
    })  # fmt: skip


def test_installed_packages_count_by_version_and_only_those_reached(tmp_path: Path) -> None:
    write(tmp_path / "app", {"app.py": """
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
        made = dagkit.Pipeline(app)
        print(*[f"{x.name} {x.status} {x.reason}" for x in made.plan().values()], sep="; ")
        made.run()
    """
    packages(tmp_path, "1.0", "def f(): return 1\n")
    assert run_in(tmp_path / "app", code) == "uses new never ran; free new never ran\n"
    packages(tmp_path, "1.0", "def f(): return 3 - 2\n")
    assert run_in(tmp_path / "app", code) == "uses fresh ; free fresh \n"
    packages(tmp_path, "2.0", "def f(): return 2\n")
    assert run_in(tmp_path / "app", code) == "uses stale package fakepkg 1.0 → 2.0; free fresh \n"


def test_a_value_of_an_installed_class_counts_with_its_version(tmp_path: Path) -> None:
    """No code here names the package; the stored value does."""
    write(tmp_path / "app", {"app.py": """
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
        packages(tmp_path, version, f"class M:\n    def score(self): return {version}\n")
        assert run_in(tmp_path / "app", code) == f"{version}\n"


# Damage


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("damage", ["flipped bit", "truncation"])
def test_damage_anywhere_is_one_warning_and_a_value_computed_again(
    kept: Pipeline, damage: str
) -> None:
    """Cut to its head an entry is as if pruned: a miss without a warning."""
    kept.run("squares", n=5)
    (path,) = entries(kept)
    head = kept.store._head(path.name)
    assert head is not None

    def read() -> Any:
        found = kept.store._head(path.name)
        with contextlib.suppress(dagkit._BadEntry):
            return "miss" if found is None else kept.store._load(found)
        return "miss"

    flips = damage == "flipped bit"
    original = path.read_bytes()
    for at in range(len(original) * (8 if flips else 1)):
        path.write_bytes(flip(original, at) if flips else original[:at])
        value, said = warned(read)
        assert (value, len(said)) == ("miss", int(flips or at != head.start)), at
        assert all(str(path) in text for text in said)
        if at % 97 == 0:  # computed again, it takes the place
            assert warned(lambda: kept.run("squares", n=5)["squares"]) == ([0, 1, 4, 9, 16], [])
        kept.store._said.clear()
    path.write_bytes(original)
    assert warned(read) == ([0, 1, 4, 9, 16], [])


def test_damage_to_arrays_is_found() -> None:
    @step(cache=True)
    def table() -> Any:
        return [np.arange(1000.0), np.arange(5_000_000.0)]  # read, and mapped

    made = Pipeline(table)
    made.run()
    (path,) = entries(made)
    size = path.stat().st_size
    for at in (size - 1, size // 2, 3000, 9000):
        with open(path, "r+b") as file:
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ 16]))
        value, said = warned(lambda: made.run()["table"])
        assert (value[0] == np.arange(1000)).all()
        assert (value[1] == np.arange(5_000_000)).all()
        assert len(said) == 1
        assert str(path) in said[0]


def test_arrays_come_back_as_ones_own() -> None:
    @step(cache=True, outputs=("small", "large", "frame"))
    def tables() -> Any:
        return np.arange(1000), np.arange(5_000_000), pd.DataFrame({"a": np.arange(2000.0)})

    made = Pipeline(tables)
    for _ in range(3):
        run = made.run("small", "large", "frame")
        assert run["small"][3] == run["large"][3] == run["frame"]["a"][3] == 3
        run["small"][:] = run["large"][:] = 0
        run["frame"].loc[:, "a"] = 0
    assert went(run) == "tables cached"


def test_foreign_things_in_the_place_of_an_entry_are_a_miss(
    kept: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.run(n=5)
    kept.run("squares", n=6)
    path, *others = entries(kept)
    good = path.read_bytes()
    things: list[tuple[Callable[[], Any], str]] = [
        (lambda: path.write_bytes(b""), "no entry"),
        (lambda: path.write_bytes(pickle.dumps([1])), "no entry"),
        (lambda: path.write_bytes(b"dagkit\0\x7f" + good[8:]), "format of another dagkit"),
        (lambda: path.write_bytes(others[0].read_bytes()), "another key"),
        (lambda: os.mkfifo(path), "no entry"),
        (lambda: path.symlink_to(path), "symbolic"),
        (path.mkdir, "directory"),
    ]
    for make, why in things:
        path.unlink()
        make()
        said: list[str] = []
        for n, top in ((5, 16), (6, 25)):
            value, more = warned(functools.partial(kept.run, n=n))
            assert value["biggest"] == top
            said += more
        assert str(path) in said[0]
        assert why in said[0]
        assert len(said) == 1 + (make == path.mkdir)  # a folder cannot be overwritten
    path.rmdir()
    for n in (5, 6):
        kept.run(n=n)
    monkeypatch.setenv("DAGKIT_KEY", "of another user")
    value, said = warned(lambda: Pipeline(squares, biggest).run("squares", n=6)["squares"])
    assert (value, len(said)) == ([0, 1, 4, 9, 16, 25], 1)
    assert "another key has signed it" in said[0]


def test_a_huge_foreign_file_is_a_miss(kept: Pipeline) -> None:
    kept.run("squares", n=5)
    (path,) = entries(kept)
    with open(path, "wb") as file:
        file.write(dagkit._MAGIC + (1 << 42).to_bytes(8, "big"))
        file.truncate(1 << 43)  # sparse
    value, said = warned(lambda: kept.run("squares", n=5)["squares"])
    assert (len(value), len(said)) == (5, 1)


def test_a_value_whose_class_is_gone_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = types.ModuleType("gone")
    exec("class Gone: pass", vars(gone))
    monkeypatch.setitem(sys.modules, "gone", gone)

    @step(cache=True)
    def thing(text: bytes) -> Any:
        return 0 if os.environ.get("GONE") else pickle.loads(text)

    made, text = Pipeline(thing), b"cgone\nGone\n)\x81."
    run, again = made.run(text=text), made.run(text=text)
    assert type(run["thing"]) is vars(gone)["Gone"]
    monkeypatch.setenv("GONE", "1")
    del vars(gone)["Gone"]
    assert made.plan(text=text)["thing"].reason == "code gone:Gone is gone"
    (path,) = entries(made)
    value, said = warned(lambda: again["thing"])
    assert (value, len(said)) == (0, 1)
    assert str(path) in said[0]
    assert warned(lambda: made.run(text=text)["thing"]) == (0, [])


class Odd:
    """Pickles, but cannot be unpickled."""

    def __reduce__(self) -> Any:
        return int, ("x",)


class Fragile:
    """What pickling of it raises may be anything."""

    def __reduce__(self) -> Any:
        raise ZeroDivisionError("no")


@pytest.mark.parametrize("make", ["lambda: 0", "Fragile()", "threading.Lock()", "[Odd()]"])
def test_a_result_that_cannot_be_kept_is_one_warning_and_the_run_goes_on(make: str) -> None:
    code = f"""
        import os, signal, threading, warnings
        signal.alarm(20)
        from test_dagkit import Fragile, Odd, Pipeline, Step
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = Pipeline(Step(lambda: {make}, name="made", cache=True),
                            Step(lambda made: type(made).__name__, name="kind", cache=True))
            run = made.run()
            print(type(run["made"]).__name__, run["kind"], len(caught))
        shown = str(caught[0].message)
        said = "step 'made'" in shown or "step runs again" in shown
        print(said, os.listdir(made.store.path + "/tmp"))
    """
    kind = {"lambda: 0": "function", "Fragile()": "Fragile", "[Odd()]": "list"}.get(make, "lock")
    assert run_python(code) == f"{kind} {kind} 1\nTrue []\n"


# Disks


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Mount a disk of one megabyte and put the store there."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount")
    monkeypatch.setenv("DAGKIT_STORE", str(place / "store"))
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def blob(n: int) -> bytearray:
    return bytearray([n % 251]) * (n * 97)


def test_on_a_full_disk_a_run_goes_on_with_one_warning(disk: Path) -> None:
    made = Pipeline(Step(blob, cache=True))
    right, said = warned(lambda: [made.run(n=n)["blob"] == blob(n) for n in range(0, 900, 9)])
    assert right == [True] * 100
    assert len(said) == 1
    assert "No space left" in said[0]
    assert os.listdir(disk / "store" / "tmp") == []
    assert 2 < len(entries(made)) < 100
    again = Pipeline(Step(blob, cache=True))
    right, said = warned(lambda: [again.run(n=n)["blob"] == blob(n) for n in range(0, 900, 9)])
    assert right == [True] * 100
    assert len(said) == 1


def test_on_a_read_only_disk_what_is_there_is_used(disk: Path, kept: Pipeline) -> None:
    kept.run("squares", n=4)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    made = Pipeline(squares, biggest)
    run, said = warned(lambda: made.run(n=4))
    assert (went(run), run["biggest"]) == ("squares cached, biggest ran", 9)
    assert len(said) == 1
    assert "Read-only" in said[0]
    assert (made.store.prune(max_bytes=0), made.store.clear()) == (0, 0)


def test_prune_of_a_damaged_entry_on_a_read_only_disk(disk: Path, kept: Pipeline) -> None:
    kept.run("squares", n=4)
    entries(kept)[0].write_bytes(b"damaged")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert kept.store.prune(max_bytes=0) == 0


@pytest.mark.parametrize("call", ["open", "mkdir", "replace"])
def test_whatever_call_the_disk_refuses_the_value_is_right(
    call: str, kept: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)
    for at in range(12):
        shutil.rmtree(kept.store.path, ignore_errors=True)
        calls = itertools.count()

        def fake(*args: Any, at: int = at, calls: Any = calls, **more: Any) -> Any:
            if next(calls) == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **more)

        made = Pipeline(squares, biggest)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fake)
            value, said = warned(lambda made=made: made.run(n=4)["biggest"])  # type: ignore[misc]
        assert (value, len(said) <= 1) == (9, True)
        tmp = Path(made.store.path, "tmp")
        assert not tmp.exists() or os.listdir(tmp) == []
        assert warned(lambda made=made: made.run(n=4)["biggest"]) == (9, [])  # type: ignore[misc]


def test_a_store_that_vanishes_in_mid_run_is_made_anew() -> None:
    @step(cache=True)
    def vandal(squares: list[int]) -> int:
        shutil.rmtree(os.environ["DAGKIT_STORE"])
        return len(squares)

    made = Pipeline(squares, vandal, biggest)
    run, said = warned(lambda: made.run(n=4))
    values, more = warned(lambda: (run["vandal"], run["biggest"], run["squares"]))
    assert values == (4, 9, [0, 1, 4, 9])
    assert len(said + more) <= 1
    assert warned(lambda: made.run("biggest", n=4)["biggest"]) == (9, [])


# In place


def test_cold_and_warm_runs_agree_when_a_step_changes_its_argument() -> None:
    def given() -> list[list[int]]:
        return [[1], [2]]

    def change(rows: list[list[int]]) -> int:
        rows[0].append(5)
        rows.append([3])
        return sum(map(sum, rows))

    def look(rows: list[list[int]], change: int) -> list[list[int]]:
        return [*rows]

    def both() -> tuple[list[list[int]], list[list[int]]]:
        return given(), given()

    for cached in itertools.product([True, False], [True], [True, False]):
        one, two, three = cached
        makers = [
            ([Step(given, name="rows", cache=one)], {}),
            ([Step(both, cache=one, outputs=("rows", "rest"))], {}),
            ([], {"rows": given()}),
        ]
        for maker, inputs in makers:
            seen = []
            shutil.rmtree(os.environ["DAGKIT_STORE"], ignore_errors=True)
            for _ in range(3):
                made = Pipeline(maker, Step(change, cache=two), Step(look, cache=three))
                run = made.run("change", "look", **copy.deepcopy(inputs))
                seen.append((run["change"], run["look"]))
            assert seen == [(11, given())] * 3


def test_objects_inside_a_frame_are_ones_own_too() -> None:
    @step
    def frame() -> pd.DataFrame:
        return pd.DataFrame({"a": [[1], [2]]})

    @step(cache=True)
    def change(frame: pd.DataFrame) -> int:
        frame["a"][0].append(5)
        return 0

    @step
    def look(frame: pd.DataFrame, change: int) -> Any:
        return frame["a"][0]

    made = Pipeline(frame, change, look)
    assert [made.run("look")["look"] for _ in range(2)] == [[1], [1]]


def test_a_retried_step_gets_its_arguments_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIES", "2")

    @step
    def rows() -> list[int]:
        return [1]

    @step(cache=True, retries=1)
    def grow(rows: list[int]) -> list[int]:
        rows.append(2)
        fails_once()
        return rows

    assert Pipeline(rows, grow).run("grow")["grow"] == [1, 2]


def test_a_file_that_changed_since_it_was_fingerprinted_keeps_nothing(tmp_path: Path) -> None:
    """The step before has changed it: what the next one made of it is not of the old content."""
    file = tmp_path / "file"
    file.write_text("old")

    @step(cache=True)
    def first(path: Path) -> str:
        path.write_text("new")
        return "done"

    @step(cache=True)
    def second(path: Path, first: str) -> str:
        return path.read_text()

    assert Pipeline(first, second).run("second", path=file)["second"] == "new"
    file.write_text("old")
    made = Pipeline(Step(lambda: "done", name="first"), second)
    assert made.plan("second", path=file, first="done")["second"].status != "fresh"
    assert made.run("second", path=file, first="done")["second"] == "old"


def test_a_try_whose_argument_has_lost_its_fingerprint_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it waited, another step has put something into it that has none."""
    monkeypatch.setenv("TRIES", "2")

    @step
    def rows() -> list[Any]:
        return [1]

    @step(cache=True, retries=1, retry_delay=0.05)
    def size(rows: list[Any]) -> int:
        fails_once()
        return len(rows)

    @step
    def spoil(rows: list[Any]) -> None:
        rows.append(threading.Lock())

    made = Pipeline(rows, size, spoil)
    assert made.run("size", "spoil")["size"] == 2
    assert entries(made) == []


def test_what_others_do_while_a_step_waits_for_its_next_try_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIES", "2")

    @step
    def rows() -> list[int]:
        return [1]

    @step(cache=True, retries=1, retry_delay=0.05)
    def size(rows: list[int]) -> int:
        fails_once()
        return len(rows)

    @step
    def grow(rows: list[int]) -> int:
        rows.append(2)
        return 0

    Pipeline(rows, size, grow).run()
    monkeypatch.setenv("TRIES", "1")
    assert Pipeline(rows, size).run()["size"] == 1


def test_what_an_async_step_changes_is_seen_by_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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

    made = Pipeline(rows, grow, first, size)
    for more in ("2", "2", ""):
        monkeypatch.setenv("MORE", more)
        assert made.run("first", "size")["size"] == 1 + len(more)


def test_a_step_with_outputs_gives_the_same_whole_cached_or_not() -> None:
    def pair() -> dict[str, int]:
        return {"y": 1, "x": 2}

    wholes = [
        Pipeline(Step(pair, outputs=("x", "y"), cache=cache)).run()["pair"]
        for cache in (False, True, True)
    ]
    assert wholes[0] == wholes[1] == wholes[2]


def test_strict_names_the_step_that_changes_its_argument() -> None:
    def grow(rows: list[int], by: int = 1) -> int:
        rows.append(by)
        return by

    made = Pipeline(Step(grow, cache=True, retries=3), strict=True)
    with pytest.raises(MutationError) as caught:
        made.run(rows=[1])
    assert str(caught.value) == (
        "step 'grow' changed its argument 'rows' in place\n"
        f"  grow(rows, by=1) at {at(grow)}\n"
        "  change a copy and return that"
    )
    assert (caught.value.step, caught.value.name) == ("grow", "rows")
    assert Pipeline(grow).run(rows=[1])["grow"] == 1
    assert Pipeline(biggest, squares, strict=True).run(n=3)["biggest"] == 4


def test_strict_sees_what_an_async_step_changes() -> None:
    async def grow(rows: list[int]) -> None:
        rows.append(1)

    with pytest.raises(MutationError):
        Pipeline(grow, strict=True).run(rows=[1])


# Files


def test_a_file_that_changes_while_a_step_reads_it_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("old")

    @step(cache=True)
    def text(path: Path) -> str:
        if os.environ.get("EDIT"):
            path.write_text(os.environ["EDIT"])
        return path.read_text()

    made = Pipeline(text)
    monkeypatch.setenv("EDIT", "new")
    assert made.run(path=path)["text"] == "new"
    monkeypatch.delenv("EDIT")
    path.write_text("old")
    assert made.run(path=path)["text"] == "old"
    assert went(made.run(path=path)) == "text cached"


def test_a_file_that_becomes_a_pipe_while_a_step_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("old")

    @step(cache=True)
    def text(path: Path) -> int:
        path.unlink()
        os.mkfifo(path)
        return 1

    assert Pipeline(text).run(path=path)["text"] == 1


def test_a_path_as_a_result_counts_by_the_content_of_its_file(tmp_path: Path) -> None:
    out = str(tmp_path / "out.txt")

    @step(cache=True)
    def report(n: int) -> Path:
        Path(out).write_text("x" * n)
        return Path(out)

    @step(cache=True)
    def size(report: Path) -> int:
        return len(report.read_text())

    made = Pipeline(report, size)
    assert went(made.run(n=3)) == "report ran, size ran"
    assert went(made.run(n=3)) == "report cached, size cached"
    Path(out).write_text("y")
    assert made.plan(n=3)["report"].reason == f"file {out} changed"
    run = made.run(n=3)
    assert (went(run), run["size"]) == ("report ran, size cached", 3)
    Path(out).unlink()
    assert made.run(n=3)["size"] == 3
    assert Path(out).read_text() == "xxx"


def test_a_result_file_that_changes_while_a_step_reads_it(
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

    made = Pipeline(report, text)
    monkeypatch.setenv("EDIT", "wrong")
    made.run()
    monkeypatch.delenv("EDIT")
    assert made.run()["text"] == "right"
    assert Path(out).read_text() == "right"


def test_a_store_inside_a_folder_is_no_content_of_it(tmp_path: Path) -> None:
    """Such as the folder of the project: else each run would change its own input."""

    @step(cache=True)
    def texts(path: Path) -> int:
        return len([*path.glob("*.txt")])

    made = Pipeline(texts, store=tmp_path / "in" / ".dagkit")
    write(tmp_path / "in", {"a.txt": "a"})
    assert [went(made.run(path=tmp_path / "in")) for _ in range(2)] == ["texts ran", "texts cached"]
    write(tmp_path / "in", {"b.txt": "b"})
    assert made.run(path=tmp_path / "in")["texts"] == 2


@pytest.mark.parametrize("looked", ["before the run", "by an earlier step"])
def test_a_file_that_an_earlier_step_of_the_run_writes_counts_as_written(
    tmp_path: Path, looked: str
) -> None:
    """Also if the run has already fingerprinted the path, for its record or another step."""

    def made(text: str) -> Pipeline:
        @step(cache=True)
        def size(path: Path) -> int:
            return 1

        @step(cache=True)
        def download(out: str, size: int = 0) -> None:
            Path(out).write_text(text)

        @step(cache=True)
        def parsed(path: Path, download: None) -> str:
            return path.read_text()

        return Pipeline(download, parsed, *[size] * (looked == "by an earlier step"))

    path = tmp_path / "in.txt"
    for text in ("old", "new"):
        for _ in range(2):
            assert made(text).run(path=path, out=str(path))["parsed"] == text


def test_files_in_a_list_of_a_map_that_change_while_a_step_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each element is a value of its own, and all their files are looked at again."""
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

    made = Pipeline(paths, texts)
    monkeypatch.setenv("EDIT", "new")
    assert made.run(n=[1, 2])["texts"] == ["new"] * 2
    monkeypatch.delenv("EDIT")
    file.write_text("old")
    assert made.run(n=[1, 2])["texts"] == ["old"] * 2
    assert went(made.run(n=[1, 2])) == "paths cached, texts cached"


def test_a_run_cannot_begin_again_with_an_input_that_a_step_has_changed() -> None:
    """What is made of it now is no value of what was given; the next run does not come to that."""

    def total(rows: list[int]) -> int:
        return sum(rows)

    def grow(rows: list[int]) -> None:
        rows.append(100)

    def report(total: int, grow: None) -> int:
        return total

    made = Pipeline(Step(total, cache=True), grow, Step(report, cache=True))
    assert made.run("report", rows=[1, 2])["report"] == 3
    made.store.clear("report")
    made.store.prune(max_bytes=0)
    with pytest.raises(MutationError, match="changed the input 'rows' in place"):
        made.run("report", rows=[1, 2])
    assert made.run("report", rows=[1, 2])["report"] == 3


def test_a_file_that_changes_while_another_process_has_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("old")

    @step(cache=True)
    def text(path: Path) -> str:
        return path.read_text()

    made = Pipeline(text)
    made.run(path=path)
    (entry,) = entries(made)
    entry.unlink()
    lock = made.store._lock(entry.name)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(made.run, path=path)
        time.sleep(0.1)
        path.write_text("new")
        made.store._unlock(entry.name, lock)
        assert waiting.result()["text"] == "new"
    path.write_text("old")
    assert made.run(path=path)["text"] == "old"


# Processes


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(HERE), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


WRITER = """
import os, random, sys, time, warnings
from dagkit import Pipeline, Step, Store
warnings.simplefilter("error")
def blob(n): return [bytearray([n]) * [10, 5000, 70_000, 3_000_000][n % 4], n]
def right(value, n): return value == blob(n)
made = Pipeline(Step(blob, cache=True))
"""


def test_kill_9_at_any_instant_leaves_no_torn_entry_and_no_lock() -> None:
    code = WRITER + 'print("ready", flush=True)\nfor i in range(10**9):\n'
    code += "    made.store.clear() if i % 9 == 0 else made.run(n=i % 8)['blob']\n"
    check = WRITER + "import signal; signal.alarm(30)\n"
    check += "print(all(right(made.run(n=n)['blob'], n) for n in range(8)))\n"
    rng = random.Random(1)
    for _ in range(4):
        for _ in range(4):
            with start(code) as child:
                assert child.stdout is not None
                child.stdout.readline()
                time.sleep(rng.random() * 0.1)
                child.kill()
        assert run_python(check) == "True\n"
    tmp = Path(os.environ["DAGKIT_STORE"], "tmp")
    (tmp / ("a" * 64)).write_text("left behind by a killed process")
    for path in tmp.iterdir():
        age(path, 10**6)
    Store().prune()
    assert os.listdir(tmp) == []


def test_a_store_that_another_process_is_just_making_is_used(kept: Pipeline) -> None:
    for name in ("tmp", "entries", "locks"):
        Path(kept.store.path, name).mkdir(parents=True)
    Path(kept.store.path).chmod(0o700)
    assert warned(lambda: [went(kept.run(n=3)) for _ in range(2)]) == (
        ["squares ran, biggest ran", "squares cached, biggest cached"],
        [],
    )


def test_eight_processes_hammer_one_store() -> None:
    code = (
        WRITER
        + """
rng, until, done = random.Random(int(os.environ["SEED"])), time.time() + 4, 0
while time.time() < until:
    n = rng.randrange(20)
    value = Pipeline(Step(blob, cache=True)).run(n=n)["blob"]
    assert right(value, n), n
    value[0][0] ^= 1
    made.plan(n=n)
    chance, done = rng.random(), done + 1
    if chance < 0.03: made.store.prune(max_bytes=rng.randrange(10**7))
    elif chance < 0.05: made.store.clear("blob")
    elif chance < 0.1: made.store.size()
print(done)
"""
    )
    # Between a look and a load others may remove the entry: a value is computed again, with words.
    code = code.replace('"error"', '"ignore"')
    several = [start(code, SEED=str(seed)) for seed in range(8)]
    for child in several:
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        assert int(out) > 0
    top = Path(os.environ["DAGKIT_STORE"])
    assert (os.listdir(top / "tmp"), os.listdir(top / "locks")) == ([], [])


ONCE = """
import os, time
from dagkit import Pipeline, Step
def slow(n):
    with open(os.environ["LOG"], "a") as log: log.write("x")
    print("inside", flush=True)
    time.sleep(float(os.environ["SLEEP"]))
    return n
made = Pipeline(Step(slow, cache=True))
"""


def test_what_another_process_or_thread_computes_is_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        ONCE
        + """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(3) as pool:
    print([run.result()["slow"] for run in [pool.submit(made.run, n=7) for _ in range(3)]])
"""
    )
    several = [start(code, LOG=str(log), SLEEP="1") for _ in range(4)]
    for child in several:
        out, err = child.communicate(timeout=60)
        assert out.endswith("[7, 7, 7]\n"), err
    assert log.read_text() == "x"


@pytest.mark.parametrize("orphan", [False, True], ids=["alone", "with a forked child"])
def test_the_lock_of_a_killed_process_hangs_nobody(tmp_path: Path, orphan: bool) -> None:
    """Workers that a killed process has forked live on, with all the files it had open."""
    log = str(tmp_path / "log")
    fork = 'if os.environ["SLEEP"] == "60" and os.fork() == 0: time.sleep(9); os._exit(0)\n    '
    code = ONCE.replace('print("inside"', fork * orphan + 'print("inside"')
    child = start(code + "made.run(n=7)", LOG=log, SLEEP="60")
    assert child.stdout is not None
    child.stdout.readline()
    child.kill()
    child.wait()
    child.stdout.close()
    child.stderr.close()  # type: ignore[union-attr]
    began = time.monotonic()
    run_python(code + "assert made.run(n=7)['slow'] == 7", LOG=log, SLEEP="0")
    assert time.monotonic() - began < 5


NESTED = """
import asyncio, signal, sys
from concurrent.futures import ThreadPoolExecutor
from dagkit import Pipeline, Step
signal.alarm(20)
"""


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
def test_a_pipeline_inside_a_step_does_not_deadlock(steps: str) -> None:
    """Else the async one would wait for a step that waits for it."""
    code = NESTED + steps + "\nmade = Pipeline(Step(one, cache=True), Step(two, cache=True))\n"
    assert run_python(code + "print(made.run()['one'], made.run()['one'])") == "1 1\n"


def test_a_step_that_runs_a_pipeline_is_reused(kept: Pipeline) -> None:
    @step(cache=True)
    def outer() -> int:
        largest: int = kept.run("biggest", n=4)["biggest"]
        return largest

    made = Pipeline(outer)
    assert [went(made.run()) for _ in range(2)] == ["outer ran", "outer cached"]


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

    made = Pipeline(count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            assert {run["count"] for run in pool.map(lambda _: made.run(n=1), range(60))} == {101}
    finally:
        sys.setswitchinterval(interval)
    assert len(entries(made)) == 1


# Expiry, clearing, pruning


def test_a_timedelta_is_how_long_a_result_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pipeline(Step(lambda: 1, name="price", cache=timedelta(hours=1)))
    assert [went(made.run()) for _ in range(2)] == ["price ran", "price cached"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3500)
    assert went(made.run()) == "price cached"
    monkeypatch.setattr(time, "time", lambda: now + 3700)
    assert (made.plan()["price"].status, made.plan()["price"].reason) == ("stale", "expired")
    assert [went(made.run()) for _ in range(2)] == ["price ran", "price cached"]


def plant(made: Pipeline) -> dict[Path, str]:
    """Put files of others into the folder of a store."""
    top = Path(made.store.path)
    names = ["note.txt", "entries/readme", "entries/ab/x.csv", "tmp/mine", "newest/n", "locks/l"]
    planted = {top / name: f"precious {name}" for name in (*names, f"entries/ab/{'a' * 63}")}
    for path, text in planted.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        age(path, 10**6)
    return planted


def test_clear_removes_the_entries_of_a_step_or_all_and_nothing_else(kept: Pipeline) -> None:
    kept.run(n=3)
    kept.run(n=4)
    planted = plant(kept)
    assert kept.store.clear("biggest") == 2
    assert went(kept.run(n=3)) == "squares cached, biggest ran"
    assert kept.store.clear("nothing") == 0
    assert kept.store.clear() == 3
    assert (kept.store.size(), kept.plan(n=3)["squares"].reason) == (0, "never ran")
    assert {path: path.read_text() for path in planted} == planted


def test_prune_drops_payloads_and_what_lies_behind_them_is_reused() -> None:
    def numbers(n: int) -> bytearray:
        return bytearray(100_000 + n)

    made = Pipeline(Step(numbers, cache=True), Step(lambda numbers: len(numbers), name="size",
                                                    cache=True))  # fmt: skip
    for n in range(4):
        made.run(n=n)
    planted = plant(made)
    assert made.store.size() == sum(path.stat().st_size for path in entries(made)) > 400_000
    by_size = [path for path in entries(made) if path.stat().st_size > 100_000]
    for path in by_size:
        age(path, 86400)
    assert made.run("numbers", n=2)["numbers"] == bytearray(100_002)  # used just now
    assert 190_000 < made.store.prune(max_bytes=210_000) < 310_000
    assert made.store.size() <= 210_000
    made.store.prune(older_than=timedelta(hours=12))
    assert went(made.run("numbers", n=2)) == "numbers cached"  # the others are gone
    assert sum(path.stat().st_size > 100_000 for path in entries(made)) == 1
    run = made.run("size", n=0)
    assert (went(run), run["size"]) == ("numbers cached, size cached", 100_000)
    made.store.prune(max_bytes=0)
    assert made.plan("numbers", n=0)["numbers"].reason == "payload pruned"
    run, said = warned(lambda: made.run("numbers", n=0))
    assert (went(run), run["numbers"], said) == ("numbers ran", bytearray(100_000), [])
    assert {path: path.read_text() for path in planted} == planted


def test_a_pruned_value_that_a_step_needs_is_computed_again(kept: Pipeline) -> None:
    @step(cache=True)
    def total(squares: list[int], by: int) -> int:
        return sum(squares) * by

    made = Pipeline(squares, total)
    made.run(n=3, by=1)
    made.store.prune(max_bytes=0)
    run, said = warned(lambda: made.run("total", n=3, by=2))
    assert (run["total"], went(run), said) == (10, "squares ran, total ran", [])


def test_the_default_place_is_the_environments(tmp_path: Path) -> None:
    code = "import dagkit; print(dagkit.Pipeline({'f': len}).store.path)"
    assert run_python(code, DAGKIT_STORE="~/there") == f"{os.environ['HOME']}/there\n"
    code = f"import os; os.chdir({str(tmp_path)!r}); {code}"
    assert run_python(code, DAGKIT_STORE="") == f"{tmp_path}/.dagkit\n"


def test_the_folder_is_made_when_the_first_value_is_kept(kept: Pipeline) -> None:
    kept.plan(n=1)
    assert (kept.store.size(), kept.store.clear(), kept.store.prune(max_bytes=0)) == (0, 0, 0)
    assert not Path(kept.store.path).exists()
    old = os.umask(0)
    try:
        kept.run(n=2)
    finally:
        os.umask(old)
    keys = Path(os.environ["HOME"], ".local/share/dagkit")
    for top, _, names in [*os.walk(kept.store.path), *os.walk(keys)]:
        assert stat.S_IMODE(os.stat(top).st_mode) == 0o700
        for name in names:
            assert stat.S_IMODE(os.stat(os.path.join(top, name)).st_mode) == 0o600
    assert Path(kept.store.path, ".gitignore").read_text() == "*\n"
    assert Path(kept.store.path, "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d")


# Safety


@pytest.mark.parametrize("home", ["mine", "attackers"])
def test_a_planted_pickle_never_runs(home: str, tmp_path: Path) -> None:
    """A cloned repository brings its store; only with the attacker's own key would it run."""
    victim = tmp_path / "victim"
    code = """
        import os
        from dagkit import Pipeline, Step
        class Evil:
            def __reduce__(self): return os.system, ("touch " + os.environ["VICTIM"],)
        def answer(): return Evil() if os.environ.get("EVIL") else 42
        made = Pipeline(Step(answer, cache=True))
        import warnings; warnings.simplefilter("ignore")
        run = made.run()
        print(run["answer"] if not os.environ.get("EVIL") else "")
    """
    attacker = str(tmp_path / "attacker")
    planted = code.replace('print(run["answer"]', "print(0")
    run_python(planted, EVIL="1", VICTIM=str(victim), HOME=attacker,
               DAGKIT_STORE=str(tmp_path / "repository"))  # fmt: skip
    shown = run_python(
        code, DAGKIT_STORE=str(tmp_path / "repository"), VICTIM=str(victim),
        HOME=attacker if home == "attackers" else str(tmp_path / "me"),
    )  # fmt: skip
    assert (shown == "42\n") == (home == "mine")
    assert victim.exists() == (home == "attackers")


def test_a_store_of_others_or_open_to_others_is_not_used(kept: Pipeline) -> None:
    kept.run(n=3)
    place = Path(kept.store.path)

    def check(why: str) -> None:
        before = sorted(place.rglob("*"))
        made = Pipeline(squares, biggest)
        value, said = warned(lambda: [made.run(n=n)["biggest"] for n in (3, 4)])
        assert value == [4, 9]
        assert said == [f"the store {place} is not used: {why}"]
        assert (made.store.clear(), made.store.prune(max_bytes=0), made.store.size()) == (0, 0, 0)
        assert sorted(place.rglob("*")) == before

    for mode in (0o777, 0o770, 0o702):
        place.chmod(mode)
        check(f"others can write to it; if you trust it: chmod 700 {place}")
    place.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(place, 12345, -1)
        check("it belongs to user 12345; choose another: DAGKIT_STORE")
        os.chown(place, 0, -1)
    assert went(kept.run(n=3)) == "squares cached, biggest cached"
    shutil.rmtree(place)
    write(place, {"precious.csv": "x"})
    check("it holds other files; choose a new or an empty folder")


def test_a_key_file_that_others_can_read_is_not_used(kept: Pipeline) -> None:
    kept.run(n=3)
    key = Path(os.environ["HOME"], ".local/share/dagkit/key")
    for mode, why in (
        (0o644, f"its key {key} is not yours alone: chmod 600 it, or delete it"),
        (0o600, f"its key {key} is damaged: delete it"),
    ):
        key.chmod(mode)
        made = Pipeline(squares, biggest)
        value, said = warned(lambda made=made: made.run(n=3)["biggest"])  # type: ignore[misc]
        assert (value, said) == (4, [f"the store {made.store.path} is not used: {why}"])
        key.write_bytes(b"short")


def test_the_key_in_the_environment_shares_a_store() -> None:
    code = """
        import os
        os.environ["HOME"] += os.environ["WHO"]
        import dagkit, warnings
        warnings.simplefilter("ignore")
        run = dagkit.Pipeline(dagkit.Step(lambda: 1, name="one", cache=True)).run()
        print(run.steps["one"].status, os.path.exists(os.environ["HOME"]))
    """
    assert run_python(code, WHO="a", DAGKIT_KEY="team") == "ran False\n"
    assert run_python(code, WHO="b", DAGKIT_KEY="team") == "cached False\n"
    assert run_python(code, WHO="c", DAGKIT_KEY="other") == "ran False\n"


########################################################################################
### Data
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


CONNECTION = sqlite3.connect(":memory:", check_same_thread=False)


def opaque(n: int) -> int:
    return n + 1 if CONNECTION else 0


def catalogued(**more: Any) -> Pipeline:
    catalog = {"raw": "data/raw.csv", "cities": "out/cities.csv", "biggest_city": "out/top.json"}
    return Pipeline(cities, biggest_city, headline, catalog=catalog | more)


def test_inputs_come_from_the_catalog_and_values_of_steps_are_kept_there(folder: Path) -> None:
    made = catalogued()
    run = made.run()
    assert run["headline"] == "Oslo leads"
    assert (folder / "out/cities.csv").read_text() == "city,size\nBern,1.5\nOslo,2.25\n"
    assert json.loads((folder / "out/top.json").read_text()) == {"city": "Oslo", "factor": 1.0}
    assert went(made.run()) == "cities cached, biggest_city cached, headline ran"
    assert sorted(x.name for x in folder.iterdir()) == ["data", "out"]
    assert sorted(x.name for x in (folder / "out").iterdir()) == ["cities.csv", "top.json"]
    assert run.inputs == {"factor": 1.0}


def test_a_given_value_beats_the_catalog_and_is_not_written_there(folder: Path) -> None:
    made = catalogued()
    assert made.run("headline", raw=TOWNS.head(1))["headline"] == "Bern leads"
    (folder / "out/cities.csv").unlink()
    assert made.run("headline", cities=TOWNS.tail(2))["headline"] == "Oslo leads"
    assert not (folder / "out/cities.csv").exists()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.unlink(), "file out/cities.csv is gone"),
        (lambda path: path.write_text("city,size\nRome,9\n"), "file out/cities.csv changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "file out/cities.csv changed"),
        (lambda path: path.write_bytes(b""), "file out/cities.csv changed"),
    ],
    ids=["deleted", "edited", "truncated", "emptied"],
)
def test_what_happens_to_a_file_is_noticed_and_said(
    folder: Path, spoil: Callable[[Path], Any], why: str
) -> None:
    """Freshness is what we wrote there, never that there is something."""
    made, path = catalogued(), folder / "out/cities.csv"
    made.run()
    good = path.read_bytes()
    spoil(path)
    assert reasons(made.plan("headline"))[:2] == [
        f"cities stale: {why}",
        "biggest_city stale: after cities",
    ]
    assert went(made.run("headline")) == "cities ran, biggest_city cached, headline ran"
    assert path.read_bytes() == good
    assert made.plan("headline")["cities"].status == "fresh"


def test_an_input_file_counts_by_content_and_is_not_loaded_for_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = catalogued()
    made.run()
    os.utime("data/raw.csv", (1, 1))
    assert made.plan()["cities"].status == "fresh"
    with monkeypatch.context() as patched:
        patched.setattr(pd, "read_csv", lambda *_: pytest.fail("it was loaded"))
        assert made.run("biggest_city")["biggest_city"]["city"] == "Oslo"
    TOWNS.assign(size=[9.0, 1.0, 1.0]).to_csv("data/raw.csv", index=False)
    assert reasons(made.plan())[0] == "cities stale: input raw changed"
    assert made.run("headline")["headline"] == "Bern leads"


FILES: dict[str, Any] = {
    "a.csv": TOWNS,
    "a.csv.gz": TOWNS,
    "a.parquet": TOWNS,
    "a.feather": TOWNS,
    "a.json": {"a": [1, None, "é"], "b": True},
    "a.json.gz": [1.5],
    "a.jsonl": [{"a": 1}, {"a": 2}],
    "a.jsonl.gz": [],
    "a.pkl": {1: (2, {3})},
    "a.pkl.gz": "text",
    "a.npy": np.arange(6.0).reshape(2, 3),
    "a.npz": {"x": np.arange(3), "y": np.eye(2)},
    "a.txt": "Zürich\n",
    "a.txt.gz": "",
    "a.bytes": b"\x00\xff",
    "a.bytes.gz": b"",
}


@pytest.mark.parametrize("path", FILES)
def test_every_suffix_gives_back_what_was_put_in(folder: Path, path: str) -> None:
    def consumer(value: Any) -> Any:
        return [value]

    value = FILES[path]
    maker = Step(lambda: value, name="value", version=path)
    made = Pipeline(maker, consumer, catalog={"value": f"out/{path}"})
    first, second = made.run(), made.run()
    assert went(second) == "value cached, consumer ran"
    for found in (first["value"], second["value"], first["consumer"][0], second["consumer"][0]):
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(found, value)
        elif path == "a.npz":
            assert {k: v.tolist() for k, v in found.items()} == {
                k: v.tolist() for k, v in value.items()
            }
        else:
            assert np.array_equal(found, value)
            assert type(found) is type(value)
    before = (folder / "out" / path).read_bytes()
    (folder / "out" / path).unlink()
    made.run()
    assert (folder / "out" / path).read_bytes() == before  # no time of day in a packed file


def test_first_and_second_run_see_what_the_file_gives_back(folder: Path) -> None:
    """A tuple becomes a list in JSON: then it is a list from the first run on."""
    pair = Step(lambda: (1, 2), name="pair")
    kind = Step(lambda pair: type(pair).__name__, name="kind")
    made = Pipeline(pair, kind, catalog={"pair": "out/pair.json"})
    assert [made.run("kind")["kind"] for _ in range(2)] == ["list", "list"]


def test_outputs_go_into_the_catalog_by_their_names(folder: Path) -> None:
    def width(bounds: tuple[float, float]) -> float:
        return bounds[1] - bounds[0]

    made = Pipeline(bounds, spread, width, catalog={"low": "out/low.json"})
    for _ in range(2):
        run = made.run(prices=[3, 1, 2])
        assert (run["bounds"], run["low"], run["spread"], run["width"]) == ((1, 3), 1, 2, 2)
        assert json.loads((folder / "out/low.json").read_text()) == 1
    assert run.steps["bounds"].status == "cached"


def test_paths_are_templates_of_inputs(folder: Path) -> None:
    made = catalogued(biggest_city="out/{factor}/{region}.json")
    made.run("headline", factor=2.0, region="eu")
    made.run("headline", factor=3.0, region="eu")
    assert json.loads((folder / "out/2.0/eu.json").read_text())["factor"] == 2.0
    assert made.plan("headline", factor=2.0, region="eu")["biggest_city"].status == "fresh"
    assert made.plan("headline", factor=3.0, region="eu")["biggest_city"].status == "fresh"
    assert reasons(made.plan("headline", factor=2.0, region="us"))[1] == (
        "biggest_city stale: input factor 3.0 → 2.0"
    )
    assert made.plan("headline", factor=3.0, region="us")["biggest_city"].reason == (
        "catalog biggest_city out/3.0/eu.json → out/3.0/us.json"
    )
    with pytest.raises(MissingInputError) as caught:
        made.run("headline")
    assert str(caught.value) == (
        "the path of 'biggest_city' in the catalog needs 'region', which run() was not given\n"
        "  out/{factor}/{region}.json\n  known names: factor, raw"
    )


class Table:
    """An object with load and save, as other libraries have them."""

    def __init__(self, value: Any = None) -> None:
        self.value, self.saves = value, 0

    def load(self) -> Any:
        return copy.deepcopy(self.value)

    def save(self, value: Any) -> None:
        self.value, self.saves = value, self.saves + 1


def test_any_object_with_load_and_save_is_an_entry(folder: Path) -> None:
    raw, top = Table(TOWNS), Table()
    made = catalogued(raw=raw, biggest_city=top)
    assert made.run()["headline"] == "Oslo leads"
    assert went(made.run()) == "cities cached, biggest_city cached, headline ran"
    assert top.value == {"city": "Oslo", "factor": 1.0}
    top.value = None
    assert made.plan()["biggest_city"].reason == "data biggest_city changed"
    made.run()
    assert (top.value["city"], top.saves) == ("Oslo", 2)
    raw.value = TOWNS.head(1)
    assert made.run()["headline"] == "Bern leads"


def pair(n: int) -> tuple[int, int]:
    return n, n + 1


def type_of(pair: Any) -> str:
    return type(pair).__name__


def test_outputs_as_a_whole_are_a_tuple_on_all_executors(executor: Any, folder: Path) -> None:
    catalog = {"low": "out/low.json"}
    steps = [Step(pair, outputs=("low", "high")), type_of]
    made = Pipeline(*steps, executor=executor, catalog=catalog, store=folder / "store")
    assert made.run("type_of", n=1)["type_of"] == "tuple"


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
    """Saved by a worker, a value would be in the worker's copy of the object only."""
    kept, catalog = folder / "store", {"cities": Memory()}
    made = catalogued().replace(catalog=catalog, executor=executor, store=kept)
    assert made.run("headline", raw=TOWNS)["headline"] == "Oslo leads"
    assert len(catalog["cities"].value) == 2
    assert made.plan("cities", raw=TOWNS)["cities"].status == "fresh"


class Locks(Table):
    """As a data set of Kedro's that loads functions: what it gives has no fingerprint."""

    def load(self) -> Any:
        return {"lock": threading.Lock()}


def test_what_an_object_loads_may_have_no_fingerprint(folder: Path) -> None:
    @step(cache=True)
    def used(made: Any) -> int:
        return len(made)

    for source in (used, [Step(lambda: 1, name="made"), used]):
        made = Pipeline(source, catalog={"made": Locks()})
        assert [made.run("used")["used"] for _ in range(2)] == [1, 1]
    assert reasons(Pipeline(used, catalog={"made": Locks()}).plan()) == [
        "used stale: no fingerprint: _thread.lock"
    ]


def test_a_pipeline_inside_a_step_counts_and_travels_with_its_catalog(folder: Path) -> None:
    """Where it loads from is what it does; and what is secret stays so in a worker."""

    def outer(path: str) -> Pipeline:
        inner = Pipeline({"more": lambda x: x + 1}, catalog={"x": path}, secret="x")

        @step(cache=True)
        def most() -> int:
            return int(inner.run()["more"])

        return Pipeline(most)

    for number, path in enumerate(("1.json", "2.json")):
        Path(path).write_text(str(number))
        assert went(outer(path).run()) == "most ran"
        assert went(outer(path).run()) == "most cached"
    made = pickle.loads(pickle.dumps(catalogued().replace(secret="factor")))
    assert made.run()["headline"] == "Oslo leads"
    assert made.secret == {"factor"}


def test_addresses_go_through_fsspec(folder: Path) -> None:
    import fsspec

    with fsspec.open("memory://in/raw.csv", "wb") as file:
        file.write(b"city,size\nRiga,1\n")
    made = catalogued(raw="memory://in/raw.csv", cities="memory://out/cities.csv.gz")
    assert made.run("headline")["headline"] == "Riga leads"
    assert went(made.run("headline")) == "cities cached, biggest_city cached, headline ran"
    fsspec.filesystem("memory").rm("/out/cities.csv.gz")
    assert made.plan("headline")["cities"].reason == "data memory://out/cities.csv.gz changed"
    assert went(made.run("headline")) == "cities ran, biggest_city cached, headline ran"


def test_the_catalog_works_on_all_executors(executor: Any, folder: Path) -> None:
    """Workers may be in another folder: paths are those of the calling process."""
    made = catalogued().replace(executor=executor, store=folder / "store")
    assert made.run("headline")["headline"] == "Oslo leads"
    assert went(made.run("headline")) == "cities cached, biggest_city cached, headline ran"
    assert json.loads((folder / "out/top.json").read_text())["city"] == "Oslo"


def test_what_has_no_fingerprint_is_kept_in_the_catalog_on_all_executors(
    executor: Any, folder: Path
) -> None:
    catalog = {"opaque": "out/opaque.json"}
    made = Pipeline(opaque, executor=executor, catalog=catalog, store=folder / "store")
    assert made.plan(n=1)["opaque"].reason.startswith("no fingerprint: opaque -> constant ")
    assert made.run(n=1)["opaque"] == 2
    assert (folder / "out/opaque.json").read_text() == "2\n"


def test_a_save_that_fails_leaves_what_was_there(folder: Path) -> None:
    def odd(n: int) -> Any:
        return n if n < 2 else {"n": n, "lock": threading.Lock()}

    made = Pipeline(odd, catalog={"odd": "out/odd.json"})
    made.run(n=1)
    with pytest.raises(TypeError, match="not JSON serializable") as caught:
        made.run(n=2)
    assert caught.value.__notes__[0] == "while 'odd' was kept in the catalog: out/odd.json"
    assert caught.value.__notes__[1].startswith("in step 'odd' at ")
    assert [x.name for x in (folder / "out").iterdir()] == ["odd.json"]
    assert (folder / "out/odd.json").read_text() == "1\n"
    assert went(made.run(n=1)) == "odd cached"


def test_a_frame_is_expected_where_pandas_writes(folder: Path) -> None:
    made = Pipeline({"rows": lambda: [1, 2]}, catalog={"rows": "out/rows.csv"})
    with pytest.raises(TypeError, match=r"expected a pandas.DataFrame, got \[1, 2\]"):
        made.run()


@pytest.mark.parametrize("value", [{"a": 1}, "ab", b"ab", 5, None])
def test_lines_are_written_of_a_list_only(folder: Path, value: Any) -> None:
    """Of a dict they would be its keys, without what they lead to."""
    made = Pipeline({"rows": lambda value: value}, catalog={"rows": "out/rows.jsonl"})
    with pytest.raises(TypeError, match="expected a list, got"):
        made.run(value=value)


@pytest.mark.parametrize(
    ("index", "fits"),
    [
        (pd.Index([3, 5, 8]), True),
        (pd.Index([3, 5, 8], name="id"), False),
        (pd.Index(["a", "b", "c"]), False),
        (pd.MultiIndex.from_tuples([(1, 2), (1, 3), (2, 2)], names=["a", "b"]), False),
    ],
    ids=["rows left over", "named", "text", "levels"],
)
def test_a_csv_is_not_written_without_an_index_that_says_something(
    folder: Path, index: Any, fits: bool
) -> None:
    """As that of a groupby: who reads the file could not tell what its rows are."""
    frame = TOWNS.set_index(index)
    made = Pipeline({"rows": lambda frame: frame}, catalog={"rows": "out/rows.csv"})
    if fits:
        assert len(made.run(frame=frame)["rows"]) == 3
    else:
        with pytest.raises(TypeError, match="does not keep the index: use reset_index"):
            made.run(frame=frame)


def test_two_values_cannot_be_kept_in_one_file(folder: Path) -> None:
    """Nor can an input be overwritten by what is made of it; two inputs may be read from one."""
    os.symlink("data", "link")
    steps: Any = {"more": lambda raw: raw, "most": lambda more, other: more}
    for catalog in (
        {"more": "out/a.csv", "most": "./out/../out/a.csv"},
        {"more": "link/raw.csv", "raw": "data/raw.csv"},
    ):
        made = Pipeline(steps, catalog=catalog)
        one, two = catalog
        with pytest.raises(CatalogError) as caught:
            made.run(**{"other": 1, "raw": TOWNS} if two == "most" else {"other": 1})
        assert str(caught.value) == (
            f"the catalog keeps '{one}', '{two}' in one file: {catalog[one]}\n"
            "  one would overwrite the other: give each a path of its own"
        )
    assert len(pd.read_csv("data/raw.csv")) == 3
    made = Pipeline(steps, catalog=dict.fromkeys(("raw", "other"), "data/raw.csv"))
    assert len(made.run()["most"]) == 3


@pytest.mark.parametrize("path", ["{0}.json", "{a.b}.json", "{}.json", "{a.json", "{n:{n}}.json"])
def test_a_path_that_is_no_template_is_an_error(path: str) -> None:
    with pytest.raises(CatalogError, match="expected names of inputs in braces"):
        _ = Pipeline({"made": lambda n: n}, catalog={"made": path}).inputs


def test_templates_take_formats_and_double_braces(folder: Path) -> None:
    made = Pipeline({"made": lambda n: n}, catalog={"made": "out/{{a}}{n:03}.json"})
    assert made.run(n=7)["made"] == 7
    assert os.listdir("out") == ["{a}007.json"]
    with pytest.raises(CatalogError, match=r"'made' in the catalog cannot be filled in: .*'str'"):
        made.replace(catalog={"made": "{n:d}.json"}).run(n="x")
    made = Pipeline({"made": lambda raw: 1}, catalog={"raw": "data/raw.csv", "made": "{raw}.json"})
    with pytest.raises(MissingInputError, match="needs 'raw', which run\\(\\) was not given"):
        made.run()


def test_a_project_that_was_copied_keeps_its_own_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path counts as it is given: with its files a copy is reused, and the first not touched."""
    made = catalogued()
    made.run("headline")
    shutil.copytree(folder, folder.parent / "copy")
    monkeypatch.chdir(folder.parent / "copy")
    assert {x.status for x in made.plan("biggest_city").values()} == {"fresh"}
    os.unlink("out/cities.csv")
    assert made.plan("headline")["cities"].reason == "file out/cities.csv is gone"
    assert made.run("headline", factor=2.0)["headline"] == "Oslo leads"
    assert json.loads((folder / "out/top.json").read_text())["factor"] == 1.0


def test_a_link_stays_a_link_and_who_may_read_a_file_stays_so(folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "disk" / "made.json").write_text("0")
    (folder / "disk" / "made.json").chmod(0o640)
    os.symlink("disk/made.json", "made.json")
    made = Pipeline({"made": lambda n: n}, catalog={"made": "made.json"})
    assert made.run(n=5)["made"] == 5
    assert (os.readlink("made.json"), os.listdir("disk")) == ("disk/made.json", ["made.json"])
    assert stat.S_IMODE(os.stat("made.json").st_mode) == 0o640
    assert went(made.run(n=5)) == "made cached"


@pytest.mark.parametrize("made", ["by a step", "elsewhere"])
def test_a_pickle_counts_with_the_code_of_its_classes(tmp_path: Path, made: str) -> None:
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
    code = textwrap.dedent(code).replace("FIT", str(made == "by a step"))
    source = "class Model:\n    def predict(self): return {}\n"
    app = tmp_path / "app"
    for number, status in ((1, "ran"), (1, "cached"), (2, "ran"), (2, "cached")):
        write(app, {"model.py": source.format(number)})
        assert run_in(app, code, APP=str(app)) == f"{number} {status}\n"


def test_equal_bytes_under_another_suffix_are_another_value(folder: Path) -> None:
    def used(made: Any) -> str:
        return repr(made)

    for value, suffix in (("1\n", "txt"), (b"1\n", "bytes"), (1, "json")):
        made = Pipeline(Step(lambda value: value, name="made"), Step(used, cache=True))
        found = made.replace(catalog={"made": f"out/made.{suffix}"}).run("used", value=value)
        assert found["used"] == repr(value)


def test_a_pruned_entry_does_not_matter_to_a_value_in_the_catalog(folder: Path) -> None:
    made = catalogued()
    made.run("biggest_city")
    made.store.prune(max_bytes=0)
    assert {x.status for x in made.plan("biggest_city").values()} == {"fresh"}
    assert made.run("biggest_city")["biggest_city"]["city"] == "Oslo"


def test_a_plan_does_not_fail_for_data_that_cannot_be_loaded(folder: Path) -> None:
    """It is the run that says so, before any step runs."""
    made = Pipeline(Step(lambda x: x, name="out", cache=True), catalog={"x": "x.pkl"})
    assert made.plan()["out"].reason == "no fingerprint: catalog x -> FileNotFoundError"
    with pytest.raises(MissingInputError, match=r"input 'x' is not where the catalog says: x\.pkl"):
        made.run()
    Path("x.json").write_text("[1")
    mapped = Pipeline(Step(lambda x: x, name="out", cache=True, map="x"), catalog={"x": "x.json"})
    assert mapped.plan()["out"].status == "new"


def test_two_runs_that_write_one_file_never_take_each_others_value(folder: Path) -> None:
    """The one whose file was replaced in mid-run says so; an entry never fits a foreign file."""
    made = catalogued()

    def meddle(event: Event) -> None:
        if (event.kind, event.step) == ("step finished", "biggest_city"):
            made.run("biggest_city", factor=5.0)

    with pytest.raises(CatalogError) as caught:
        made.replace(on_event=meddle).run("headline")
    assert str(caught.value).splitlines() == [
        "the catalog's 'biggest_city' has changed while the run needed it: out/top.json",
        "  run again; give two runs that write at once a path each, as by a template: "
        "'out/{region}/model.pkl'",
    ]
    assert made.plan("headline")["biggest_city"].reason == "file out/top.json changed"
    assert made.run("biggest_city")["biggest_city"]["factor"] == 1.0


def test_a_kill_in_mid_save_leaves_no_torn_file(folder: Path) -> None:
    """A real kill -9 while a large value is written: the old file is whole, or the new one."""
    code = """
        import sys
        from dagkit import Pipeline, Step
        def big(n): return [n] * 3_000_000
        made = Pipeline(big, catalog={"big": "out/big.json"})
        made.run(n=1)
        print("ready", flush=True)
        for n in range(2, 100):
            made.run(n=n)
    """
    process = start(code)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.7)
    process.kill()
    process.wait()
    process.communicate()
    assert len(set(json.loads((folder / "out/big.json").read_text()))) == 1


@pytest.mark.parametrize(
    ("catalog", "message"),
    [
        (
            {"raw": "data/raw.xls"},
            "the catalog has no format for 'raw': data/raw.xls\n  known suffixes: .bytes, .csv, "
            ".feather, .json, .jsonl, .npy, .npz, .parquet, .pkl, .txt\n"
            "  or give an object with load() and save(value)",
        ),
        (
            {"raw": "data/raw.npy.gz"},
            "the catalog has no format for 'raw': data/raw.npy.gz\n  known suffixes: .bytes.gz, "
            ".csv.gz, .json.gz, .jsonl.gz, .pkl.gz, .txt.gz\n"
            "  or give an object with load() and save(value)",
        ),
        (
            {"raw": 7},
            "the catalog has 7 for 'raw'\n  expected a path, or an object with load() and "
            "save(value)",
        ),
        (
            {"bounds": "b.json"},
            "step 'bounds' cannot be in the catalog: it is a step with outputs\n"
            f"  bounds(prices) at {at(bounds)}\n  name its outputs instead",
        ),
        (
            {"citys": "x.csv"},
            "the catalog names 'citys': no step makes or takes it\n  known names: bounds, cities, "
            "high, low, prices, raw; did you mean 'cities'?",
        ),
    ],
    ids=["suffix", "packed", "object", "outputs", "name"],
)
def test_wrong_entries_are_errors_that_say_what_is_expected(
    catalog: dict[str, Any], message: str
) -> None:
    made = Pipeline(cities, bounds, catalog=catalog)
    with pytest.raises(DagkitError) as caught:
        made.plan("cities")
    assert str(caught.value) == message


def test_a_file_of_the_catalog_that_is_not_there_is_said_before_any_step_runs(folder: Path) -> None:
    def slow(raw: pd.DataFrame, other: list[int]) -> None:
        raise AssertionError

    made = Pipeline(slow, catalog={"raw": "data/row.csv", "other": "data/other.json"})
    assert repr(dict(made.inputs)) == "{'raw': data/row.csv, 'other': data/other.json}"
    with pytest.raises(MissingInputError) as caught:
        made.run()
    assert str(caught.value).splitlines() == [
        "input 'raw' is not where the catalog says: data/row.csv",
        "input 'other' is not where the catalog says: data/other.json",
    ]
    Path("data/row.csv").write_text("a\n1\n")
    Path("data/other.json").write_text("[1")
    with pytest.raises(json.JSONDecodeError) as broken:
        made.run()
    assert broken.value.__notes__[0] == "while 'other' of the catalog was loaded: data/other.json"


def test_a_map_or_a_sensor_cannot_be_in_the_catalog() -> None:
    @sensor
    def parcel() -> int:
        return 1

    each = Step(lambda item: item, name="each", map="item")
    for made, what in ((each, "a map"), (parcel, "a sensor")):
        pipeline = Pipeline(made, catalog={"each" if what == "a map" else "parcel": "x.json"})
        with pytest.raises(CatalogError, match=f"cannot be in the catalog: it is {what}"):
            pipeline.run(item=[1])


def test_a_map_goes_over_a_list_of_the_catalog(folder: Path) -> None:
    (folder / "data/items.json").write_text("[1, 2, 3]")
    made = Pipeline(
        Step(lambda item: 10 * item, name="each", map="item", cache=True),
        catalog={"item": "data/items.json"},
    )
    assert made.run()["each"] == [10, 20, 30]
    assert made.plan()["each"].status == "fresh"
    (folder / "data/items.json").write_text("[1, 2, 3, 4]")
    assert made.run()["each"] == [10, 20, 30, 40]


def test_strict_and_retries_work_with_the_catalog(folder: Path) -> None:
    tries: list[int] = []

    @step(retries=1)
    def shaky(raw: pd.DataFrame) -> int:
        tries.append(len(raw))
        raw["new"] = 1  # its own copy
        if len(tries) == 1:
            raise OSError("come again")
        return len(raw.columns)

    made = Pipeline(shaky, catalog={"raw": "data/raw.csv"})
    assert (made.run()["shaky"], tries) == (3, [3, 3])


########################################################################################
### Display
########################################################################################


def flow() -> Pipeline:
    """Make the pipeline of an ML project, with an output, a map and a failure to come."""
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


FLOW: dict[str, Any] = {"path": "x.csv", "fold": [1, 2, 3]}


def drawn(svg: str) -> list[str]:
    """Give the texts of a picture, in their order, after a check that it is fit for a notebook."""
    root = ElementTree.fromstring(svg)
    plain = {"svg", "style", "rect", "g", "path", "text"}
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]
        assert tag in plain
        assert not {"id", "href", "style", "onload"} & element.attrib.keys()
    return [text for element in root.iter() if (text := element.text or "").strip()]


def graph_of(kind: str) -> Pipeline:
    """Make one of five small graphs."""
    if kind == "ml":
        return flow()
    steps = {
        "one": ["a"],
        "chain": ["a", "b a", "c b", "d c"],
        "diamond": ["a", "b a", "c a", "d b c"],
        "fan": ["a", *[f"b{i} a" for i in range(20)], "z " + " ".join(f"b{i}" for i in range(20))],
    }[kind]
    return Pipeline([function(*line.split()) for line in steps])


def scene_of(kind: str, stage: str) -> dagkit._Scene:
    """Make what is shown of a graph in a plan, a run or a run that fails, with settled times."""
    base = graph_of(kind)._scene()
    names = [step.name for step in base.steps()]
    looks = {
        "plan": "fresh  1.2|stale code changed: helper tidy 0|new never ran 0",
        "run": "ran  8.2|cached  3.1",
        "failure": "ran  0.4|failed  0.7|skipped needs b 0",
    }[stage].split("|")
    states = {}
    for place, name in enumerate(names):
        status, *words, last = looks[min(place, len(looks) - 1)].split(" ")
        reason, seconds = " ".join(words), float(last)
        error = ValueError("X has 3 columns") if status == "failed" else None
        state = dagkit._StepState(name, "ran", seconds, reason, error=error)
        states[name] = state._replace(
            status=status, saved=seconds * (status in ("fresh", "cached"))
        )
    return base._replace(states=states, seconds=None if stage == "plan" else 9.3)


def test_a_pipeline_shows_its_steps_and_what_they_need() -> None:
    made = flow()
    assert str(made) == made.show().text == (
        "pipeline · 7 steps, 5 inputs\n"
        "  load       path\n"
        "  clean      load, drop\n"
        "  split      clean, seed\n"
        "  model      train, alpha, seed\n"
        "  folds      fold\n"
        "  predict    model, test\n"
        "  evaluate   predict, folds"
    )  # fmt: skip
    texts = drawn(made.show().svg)
    assert texts[1:] == [
        "pipeline", "· 7 steps, 5 inputs", "path", "load", "drop", "clean", "seed", "split",
        "train, test", "alpha", "model", "fold", "folds", "predict", "evaluate",
    ]  # fmt: skip


def test_a_plan_shows_status_and_reason_in_table_and_picture() -> None:
    made = flow()
    assert made.run(**FLOW).steps["predict"].status == "failed"
    made.run("clean", path="y.csv", drop=False)
    plan = made.plan("model", **FLOW, alpha=0.3)
    table = [re.split(" {3,}", line.strip()) for line in str(plan).splitlines()]
    assert table == [
        ["pipeline · 4 steps, 4 inputs · 2 stale, 2 new"],
        ["load", "path", "○ new", "not cached"],
        ["clean", "load, drop", "↻ stale", "input drop False → True"],
        ["split", "clean, seed", "○ new", "not cached"],
        ["model", "train, alpha, seed", "↻ stale", "input alpha 0.1 → 0.3"],
    ]
    texts = drawn(plan.show().svg)
    assert [text for text in texts if re.fullmatch(r"\d \w+", text)] == ["2 stale", "2 new"]
    for _, _, _, reason in table[1:]:
        assert reason in texts
    assert "evaluate" in texts  # not needed: faded, not left out
    assert made.plan("model", **FLOW).show().svg.count('opacity=".45"') == 4


def test_a_run_shows_times_failures_and_what_the_cache_saved() -> None:
    made = flow()
    made.run(**FLOW)
    run = made.run("evaluate", "test", **FLOW)
    shown = re.sub(r"\d+(\.\d)? m?s\b", "T", str(run))
    place = at(made.steps["predict"].function)
    assert shown == (
        "pipeline · 7 steps, 5 inputs · 3 ran, 2 cached, 1 failed, 1 skipped · T · saved T\n"
        "  load       path                 ■ ran       T\n"
        "  clean      load, drop           ✓ cached    saved T\n"
        "  split      clean, seed          ■ ran       T\n"
        "  model      train, alpha, seed   ✓ cached    saved T\n"
        "  predict    model, test          ✗ failed    T   ZeroDivisionError: division by zero"
        f"   ({place})\n"
        "  folds      fold                 ■ ran       T\n"
        "  evaluate   predict, folds       ⊘ skipped   needs predict"
    )  # fmt: skip
    svg = run.show().svg
    texts = re.sub(r"\d+(\.\d)? m?s\b", "T", "|".join(drawn(svg)))
    for text in ("ZeroDivisionError", "needs predict", "cached, saved T", "×3", "1 failed"):
        assert text in texts.split("|")
    # Two targets have a second outline; the mapped step is a stack of three.
    assert svg.count('stroke-dasharray="6 3 1 3"') == 1
    assert len(re.findall(r'<path class="ran" d="M[\d.]+ [\d.]+h', svg)) == 2
    assert len(re.findall(r'rx="9"', svg)) == 2


def test_a_given_value_is_shown_as_given() -> None:
    plan = flow().plan("predict", train=[1], test=[2])
    assert [s.name for s in plan.values()] == ["model", "predict"]
    run = flow().plan("evaluate", predict=3, fold=[1])
    assert "given" in drawn(run.show().svg)


STAGES = ["plan", "run", "failure"]

# Of the pictures of plan, run and failure, that somebody has looked at. When one changes, look
# again at the file that the test names.
GOLDENS = {
    "one": "799800bae280 70fb8b7af4af 5dbfbfef31e8",
    "chain": "b504e0257586 affa1b6c2151 69948442da40",
    "diamond": "be7571b4f902 1cd0908ea054 ff44e0145be5",
    "fan": "626f166fb93b 5b0b00167ee9 8e380188d436",
    "ml": "e74425e3923e b13d4b29cc9b df8f6b1c59c7",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", GOLDENS)
def test_pictures_are_as_they_were_looked_at(kind: str, stage: str, tmp_path: Path) -> None:
    svg = dagkit._svg(scene_of(kind, stage))
    drawn(svg)
    path = tmp_path / f"{kind}-{stage}.svg"
    path.write_text(svg)
    assert (
        hashlib.sha256(svg.encode()).hexdigest()[:12] == GOLDENS[kind].split()[STAGES.index(stage)]
    ), path


def test_what_is_shown_is_the_same_under_every_hash_seed() -> None:
    code = """
        import test_dagkit as t, dagkit
        scene = t.scene_of("ml", "failure")
        print(*[make(scene) for make in (dagkit._svg, dagkit._html, dagkit._page, dagkit._mermaid)])
    """
    one, other = (run_python(code, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert one == other


def test_a_notebook_gets_picture_table_and_text() -> None:
    made = flow()
    bundle = made._repr_mimebundle_()
    assert list(bundle) == ["text/plain", "text/html"]
    assert bundle["text/plain"] == str(made)
    page = bundle["text/html"]
    assert page.startswith('<div class="dagkit"><p><b>pipeline</b> · 7 steps, 5 inputs</p>')
    (data,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert "evaluate" in drawn(base64.b64decode(data).decode())
    assert 'alt="Pipeline pipeline: load → clean → split' in page
    assert page.count("<tr>") == 7
    assert not re.search(r"<script|<a |onload|\sid=", page)
    assert list(made._repr_mimebundle_(include={"text/plain"})) == ["text/plain"]
    assert list(made._repr_mimebundle_(exclude={"text/plain"})) == ["text/html"]
    assert list(made.show(format="svg")._repr_mimebundle_()) == ["text/plain", "image/svg+xml"]
    for shown in (made.plan(**FLOW), made.run(**FLOW)):
        assert list(shown._repr_mimebundle_()) == ["text/plain", "text/html"]


def test_a_wide_picture_is_shrunk_to_the_page_and_then_scrolled() -> None:
    def width(shown: Any) -> int:
        return int(re.findall(r'<img [^>]*width="(\d+)"', shown.show().html)[0])

    assert width(graph_of("chain")) < 300
    names = [f"a_rather_long_name_{i}" for i in range(16)]
    wide = Pipeline([function(name, *names[:i:5]) for i, name in enumerate(names)])
    assert width(wide) <= 840
    layers = [[f"n{i}_{j}" for j in range(14)] for i in range(9)]
    grid = [function(n, *above) for above, row in itertools.pairwise([[], *layers]) for n in row]
    assert width(Pipeline(grid)) > 840


def test_a_fault_of_the_drawing_leaves_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: object) -> None:
        raise ZeroDivisionError("no room")

    monkeypatch.setattr(dagkit, "_laid_out", breaks)
    page = flow()._repr_mimebundle_()["text/html"]
    assert "<pre>no picture: ZeroDivisionError: no room</pre><details open>" in page
    assert page.count("<tr>") == 7


def test_a_pipeline_that_cannot_be_built_shows_why() -> None:
    made = Pipeline([function("a", "b"), function("b", "a")])
    assert repr(made).startswith(
        "<Pipeline 'pipeline': CycleError: steps need each other in a cycle"
    )
    assert "CycleError: steps need each other in a cycle: a -&gt; b -&gt; a" in made.show().html
    assert made.show().text.splitlines()[1].startswith("  CycleError")


def test_a_large_pipeline_is_a_table_and_a_part_of_it_a_picture() -> None:
    chain = [function(f"s{i}", f"s{i - 1}") for i in range(1, 302)]
    made = Pipeline([function("s0"), *chain])
    page = made.show().html
    assert "<img" not in page
    assert "302 names are too many for one picture: .show(around=" in page
    part = made.show(around="s100", hops=2)
    assert drawn(part.svg)[-5:] == ["s98", "s99", "s100", "s101", "s102"]
    assert len(part.text.splitlines()) == 6
    with pytest.raises(UnknownNameError, match="'s1000' cannot be shown around"):
        made.show(around="s1000")


def test_an_input_of_many_steps_is_a_pill_at_each() -> None:
    few, many = (Pipeline([function(f"s{i}", "seed") for i in range(n)]) for n in (8, 9))
    assert drawn(few.show().svg).count("seed") == 1
    assert drawn(many.show().svg).count("seed") == 9


def test_long_names_keep_both_ends_and_names_that_fit_are_whole() -> None:
    long = "load_customers_of_all_regions_in_2024"
    made = Pipeline([function(long), function("x" * 29, long)])
    texts = drawn(made.show().svg)
    assert "load_customers_of_a…s_in_2024" in texts
    assert "x" * 29 in texts
    assert long in made.show().text


def test_mermaid_quotes_what_it_could_read_as_syntax() -> None:
    made = Pipeline({"a": lambda x: x}, Step(len, name="b", args={"obj": "a"}, map="obj"))
    text = made.plan(x=1).show().mermaid
    assert text == (
        'flowchart TD\n  n0(["x"])\n  n1["a<br/>not cached"]:::new\n'
        '  n2[["b<br/>not cached"]]:::new\n  n0 --> n1\n  n1 --> n2\n'
        "  classDef new stroke:#6f747d,stroke-width:1.6px,stroke-dasharray:2 3\n"
    )
    scene = scene_of("one", "plan")
    state = scene.states["a"]._replace(status="stale", reason='x "1" → [2]; #end')  # type: ignore[index]
    text = dagkit._mermaid(scene._replace(states={"a": state}))
    assert 'n0["a<br/>x #34;1#34; → #91;2#93;#59; #35;end"]:::stale' in text
    assert "classDef stale stroke:#926b0e,stroke-width:1.6px,stroke-dasharray:5 3" in text


def test_save_goes_by_the_suffix(tmp_path: Path) -> None:
    shown = flow().show()
    for suffix, start in (("svg", "<svg"), ("html", "<!doctype"), ("mmd", "flow"), ("txt", "pipe")):
        shown.save(tmp_path / f"ml.{suffix}")
        assert (tmp_path / f"ml.{suffix}").read_text().startswith(start)
    with pytest.raises(
        ValueError, match=r"ml.png': expected a name that ends in .html, .mmd, .svg, .txt"
    ):
        shown.save("ml.png")


HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\u202eevil\x00\x1b[31m🦊 שלום " + "x" * 300


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


def test_hostile_text_is_never_markup_and_never_an_exception(tmp_path: Path) -> None:
    made = Pipeline([hostile, skipper], on_error="continue")
    run = made.run()
    for shown in (made, made.plan(), run):
        page, svg = tmp_path / "page.html", shown.show().svg
        drawn(svg)
        shown.show().save(page)
        for text in (page.read_text(), shown.show().html, svg):
            assert "<img src=x" not in text
            assert "</script" not in text
            assert not set(text) & {"\u202e", "\x00", "\x1b"}
        assert "\x00" not in dagkit._table(shown._scene(), ascii=True)
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in page.read_text()


def test_the_page_says_all_that_is_known_of_a_step(tmp_path: Path) -> None:
    def tidy(load: list[int]) -> list[int]:
        """Take the gaps out."""
        return load

    def fit(tidy: list[int], alpha: float = 0.1) -> float:
        raise ValueError("X has 3 columns")

    load = Step(lambda path: [1], name="load", cache=True)
    made = Pipeline(load, tidy, fit, on_error="continue")
    run = made.run(path="x.csv")
    run.show().save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    csp = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{csp}">' in page
    assert '<a href="#tidy">' in page
    rows = dict(re.findall(r'<div id="(\w+)">(.*?)</div></details>', page, re.DOTALL))
    assert list(rows) == ["load", "tidy", "fit"]
    assert "<pre>Take the gaps out.</pre>" in rows["tidy"]
    assert "<dd>tidy(load) at test_dagkit.py" in rows["tidy"]
    assert '<dt>needs</dt><dd><a href="#load">load</a></dd>' in rows["tidy"]
    assert '<dt>used by</dt><dd><a href="#fit">fit</a></dd>' in rows["tidy"]
    assert "def tidy(load: list[int]) -&gt; list[int]:" in rows["tidy"]
    assert f"<dt>fingerprint</dt><dd>{run.steps['load'].fingerprint}</dd>" in rows["load"]
    assert re.search(r"<dt>entry</dt><dd>\d+ bytes</dd>", rows["load"])
    assert "Traceback (most recent call last)" in rows["fit"]
    assert "ValueError: X has 3 columns" in rows["fit"]
    assert '<tr id="alpha"><td>alpha</td><td><code>0.1</code></td></tr>' in page
    assert "<details open><summary>✗ fit · failed" in page


def test_the_page_of_300_steps_is_at_most_500_kilobytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dagkit, "_MOST_NODES", 1000)  # to have its picture too
    graph = random_picture(300, 0)
    needs: dict[str, list[str]] = {name: [] for name in graph.sizes if name[:4] == "step"}
    for source, name in graph.edges:
        needs[name].append(source)
    made = Pipeline([function(name, *needs[name]) for name in needs])
    states = {name: dagkit._StepState(name, "ran", 1.0) for name in needs}
    page = dagkit._page(made._scene()._replace(states=states))
    assert "<svg" in page
    assert 200_000 < len(page.encode()) <= 500_000


def test_showing_runs_nothing_reads_nothing_and_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = flow()
    run = made.run(**FLOW)
    plan = made.plan(**FLOW)

    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError

    for name in ("_work", "_fingerprint", "_top", "_path_token", "_brief"):
        monkeypatch.setattr(dagkit, name, forbidden)
    for shown in (made, plan, run):
        assert shown.show().html
        assert str(shown)
        assert repr(shown)
    assert capsys.readouterr() == ("", "")


def test_statuses_can_be_told_apart_by_everyone() -> None:
    """Contrast by WCAG 2: 4.5 for text in both schemes."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(one: str, other: str) -> float:
        dark, bright = sorted([light(one), light(other)])
        return (bright + 0.05) / (dark + 0.05)

    for look in dagkit._LOOKS.values():
        assert contrast(look.light, "#ffffff") >= 4.5
        assert contrast(look.dark, "#1b1e23") >= 4.5
    assert contrast("#8a919c", "#ffffff") >= 3
    assert contrast("#7d8590", "#1b1e23") >= 3
    seen = {(look.glyph, look.ascii, look.dashes, look.width) for look in dagkit._LOOKS.values()}
    assert len(seen) == len(dagkit._LOOKS) - 2  # waiting looks as new, cached as fresh


def test_a_table_is_cut_to_the_terminal_in_its_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Pipeline(Step(lambda x: x, name="a_step", cache=True)).plan(x=threading.Lock())

    class Terminal(io.StringIO):
        encoding = "ascii"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "36")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert str(plan).splitlines()[1] == "  a_step   x   ~ stale   no fingerp~"


def test_a_plain_run_imports_nothing_of_the_display() -> None:
    code = """
        import sys
        from dagkit import Pipeline
        run = Pipeline({"more": lambda x: x + 1}).run(x=1)
        assert not {"html", "base64", "unicodedata", "urllib.parse", "IPython"} & sys.modules.keys()
        assert "</svg>" in run.show().svg
    """
    assert run_python(code) == ""


def test_networkx_users_draw_the_graph_with_their_own_tools(tmp_path: Path) -> None:
    code = f"""
        import matplotlib; matplotlib.use("agg")
        import matplotlib.pyplot as plt, networkx as nx, test_dagkit as t
        graph = t.flow().graph
        for rank, names in enumerate(nx.topological_generations(graph)):
            print(rank, *names)
        nx.draw(graph, nx.spring_layout(graph, seed=1), with_labels=True)
        plt.savefig({str(tmp_path / "graph.png")!r})
    """
    assert run_python(code).startswith("0 path drop seed alpha fold\n1 load folds\n")
    assert (tmp_path / "graph.png").stat().st_size > 5000


# --- the layout

# Crossings that the mean of twenty pipelines of so many steps may have at most.
MOST_CROSSINGS = {10: 1, 50: 24, 100: 56, 200: 155}


class Sketch(NamedTuple):
    """A graph to lay out."""

    sizes: dict[str, tuple[float, float]]
    edges: list[tuple[str, str]]


def random_picture(steps: int, seed: int) -> Sketch:
    """Return a pipeline of steps that take 1-3 values, mostly recent ones, some old.

    The first ten steps are almost a chain, as in short scripts. Calibrated so that graphviz's dot
    has about 0.1, 19, 43, 114 crossings on average at 10, 50, 100, 200 steps.
    """
    rng = random.Random(seed)
    sizes: dict[str, tuple[float, float]] = {}
    edges = []
    made: list[str] = []
    for index in range(steps):
        name = f"step_{index:03}"
        needs = set()
        if index == 0 or rng.random() < 0.15:
            needs.add(f"input_{index:03}")
            sizes[f"input_{index:03}"] = (60, 22)
        recent = made[-(8 if index >= 10 else 2) :]
        for _ in range(rng.choices((1, 2, 3), (5, 4, 2))[0]):
            if made:
                needs.add(rng.choice(made if rng.random() < 0.045 else recent))
        sizes[name] = (rng.randint(92, 200), 44)
        edges += [(need, name) for need in sorted(needs)]
        made.append(name)
    return Sketch(sizes, edges)


@st.composite
def graphs(draw: st.DrawFn) -> Sketch:
    names = [f"n{index}" for index in range(draw(st.integers(0, 14)))]
    declared = draw(st.permutations(names))
    size = st.tuples(st.integers(30, 260), st.sampled_from((22, 40, 46)))
    pairs = [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=30)) if pairs else []
    return Sketch({name: draw(size) for name in declared}, edges)


def laid_out(
    sizes: dict[str, tuple[float, float]],
    edges: list[tuple[str, str]],
    *,
    across: bool = False,
    light: Collection[str] = (),
) -> dagkit._Layout:
    return dagkit._placed(dagkit._ranked(sizes, edges), sizes, across=across, light=light)


def lights(graph: Sketch) -> set[str]:
    return {node for node, (_, height) in graph.sizes.items() if height == 22}


def curve(route: list[tuple[float, float]], across: bool) -> list[tuple[float, float]]:
    """Return points of a route as it is drawn: straight in bands, one cubic between two bands."""
    points = list(route)
    for start, end in list(itertools.pairwise(route))[1::2]:
        (x0, y0), (x1, y1) = (p[::-1] if across else p for p in (start, end))
        for k in range(1, 24):
            t = k / 24
            aside = x0 + (x1 - x0) * t * t * (3 - 2 * t)  # control points are above their ends
            along = y0 * ((1 - t) ** 3 + 3 * t * (1 - t) ** 2 * 0.5 + 3 * t * t * (1 - t) * 0.5)
            along += y1 * (t**3 + 3 * t * (1 - t) ** 2 * 0.5 + 3 * t * t * (1 - t) * 0.5)
            points.append((along, aside) if across else (aside, along))
    for (x0, y0), (x1, y1) in list(itertools.pairwise(route))[::2]:
        points += [(x0 + (x1 - x0) * k / 8, y0 + (y1 - y0) * k / 8) for k in range(9)]
    return points


def crossings(ranks: dagkit._Ranks) -> int:
    place = [0.0] * len(ranks.up)
    for row in ranks.rows:
        dagkit._note(row, place)
    return dagkit._count_crossings(ranks.rows, ranks.up, place)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(graphs())
def test_every_edge_goes_forward_and_spans_the_fewest_ranks(graph: Sketch) -> None:
    ranks = dagkit._ranked(graph.sizes, graph.edges)
    rank = {node: index for index, row in enumerate(ranks.rows) for node in row}
    assert sorted(rank) == list(range(len(ranks.up)))
    for trail in ranks.trails.values():
        assert all(rank[b] == rank[a] + 1 for a, b in itertools.pairwise(trail))
    # No node alone can be moved to make the edges shorter: a necessary condition.
    names = list(graph.sizes)
    for index, node in enumerate(names):
        before = [rank[names.index(a)] for a, b in graph.edges if b == node]
        after = [rank[names.index(b)] for a, b in graph.edges if a == node]
        if len(after) > len(before):
            assert rank[index] == min(after) - 1
        if len(after) < len(before):
            assert rank[index] == max(before) + 1


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(graphs(), st.booleans())
def test_boxes_of_a_rank_keep_their_gap_and_lie_inside(graph: Sketch, across: bool) -> None:
    ranks = dagkit._ranked(graph.sizes, graph.edges)
    layout = dagkit._placed(ranks, graph.sizes, across=across, light=lights(graph))
    names = list(graph.sizes)
    boxes = {}
    for node, (x, y) in layout.places.items():
        width, height = graph.sizes[node]
        boxes[node] = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        assert min(boxes[node][:2]) > 8 - 1e-6
        assert boxes[node][2] < layout.width - 8 + 1e-6
        assert boxes[node][3] < layout.height - 8 + 1e-6
    for row in ranks.rows:
        for a, b in itertools.pairwise(names[node] for node in row if node < len(names)):
            assert boxes[b][across] - boxes[a][across + 2] > 24 - 1e-6
    for points in layout.routes.values():
        assert all(8 - 1e-6 < x < layout.width - 8 + 1e-6 for x, _ in points)
        assert all(8 - 1e-6 < y < layout.height - 8 + 1e-6 for _, y in points)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(graphs(), st.booleans())
def test_no_edge_crosses_a_foreign_box(graph: Sketch, across: bool) -> None:
    layout = laid_out(graph.sizes, graph.edges, across=across, light=lights(graph))
    for (a, b), route in layout.routes.items():
        assert len(route) % 2 == 0
        for end, sign, point in ((a, 1, route[0]), (b, -1, route[-1])):
            x, y = layout.places[end]
            width, height = graph.sizes[end]
            border = (x + sign * width / 2, y) if across else (x, y + sign * height / 2)
            assert point == pytest.approx(border)
        for x, y in curve(route, across):
            for node, (left, top) in layout.places.items():
                width, height = graph.sizes[node]
                inside = abs(x - left) < width / 2 - 0.01 and abs(y - top) < height / 2 - 0.01
                assert not inside, (a, b, node)


def test_layout_is_the_same_under_two_hash_seeds() -> None:
    code = """
        import test_dagkit as t
        for seed in range(3):
            graph = t.random_picture(40, seed)
            print(t.laid_out(*graph), t.laid_out(*graph, across=True))
    """
    one, other = (run_python(code, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert len(one) > 1000
    assert one == other


@pytest.mark.parametrize("steps", [10, 50, 100, 200])
def test_few_edges_cross(steps: int) -> None:
    """Counted between neighbouring ranks, shared trunks once."""
    counts = [crossings(dagkit._ranked(*random_picture(steps, seed))) for seed in range(20)]
    assert sum(counts) / len(counts) <= MOST_CROSSINGS[steps]


def boxes(*names: str) -> dict[str, tuple[float, float]]:
    return {name: (92 + 8.0 * len(name), 44) for name in names}


@pytest.mark.parametrize("across", [False, True])
def test_chain_is_exactly_straight(across: bool) -> None:
    names = [f"step{'x' * (index % 7)}{index}" for index in range(100)]
    layout = laid_out(boxes(*names), list(itertools.pairwise(names)), across=across)
    assert len({place[1 if across else 0] for place in layout.places.values()}) == 1


def test_diamond_is_symmetric() -> None:
    edges = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]
    at = laid_out(boxes("a", "b", "c", "d"), edges).places
    assert at["a"][0] == pytest.approx(at["d"][0]) == pytest.approx((at["b"][0] + at["c"][0]) / 2)
    assert at["b"][0] < at["c"][0]


def test_children_keep_their_order_of_declaration() -> None:
    names = [f"child{index}" for index in range(20)]
    layout = laid_out(boxes("parent", *names), [("parent", name) for name in names])
    assert sorted(names, key=lambda name: layout.places[name]) == names
    middle = (layout.places[names[0]][0] + layout.places[names[-1]][0]) / 2
    assert layout.places["parent"][0] == pytest.approx(middle, abs=80)


def test_edges_of_one_producer_share_their_bends() -> None:
    names = ["a", "b", "c", "d", "e"]
    ranks = dagkit._ranked(names, [*itertools.pairwise(names), ("a", "d"), ("a", "e")])
    assert ranks.trails["a", "d"][:3] == ranks.trails["a", "e"][:3]
    assert len(ranks.up) == len(names) + 3


def test_wide_graphs_are_laid_out() -> None:
    names = [f"part{index}" for index in range(200)]
    edges = [("split", name) for name in names] + [(name, "join") for name in names]
    assert crossings(dagkit._ranked(["split", *names, "join"], edges)) == 0
    assert len(laid_out(boxes("split", *names, "join"), edges).routes) == 400
    lone = [f"lone{index}" for index in range(300)]
    assert len(laid_out(boxes(*lone), []).places) == 300


def test_empty_graph_has_an_empty_layout() -> None:
    assert laid_out({}, []) == dagkit._Layout({}, {}, 16.0, 16.0)
    assert laid_out({"a": (100, 44)}, []) == dagkit._Layout({"a": (58, 30)}, {}, 116, 60)


# --- a real kernel


def executed(folder: Path, *cells: str) -> tuple[list[list[Any]], Counter[str]]:
    """Run cells in a real Jupyter kernel; give the outputs of each, and the messages by kind."""
    import nbclient
    import nbformat

    Path(os.environ["HOME"]).mkdir(exist_ok=True)
    seen: Counter[str] = Counter()

    class Client(nbclient.NotebookClient):
        def process_message(self, message: Any, cell: Any, index: int) -> Any:
            seen[message["msg_type"]] += 1
            return super().process_message(message, cell, index)

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    env = {**os.environ, "PYTHONPATH": str(HERE), "HOME": str(folder)}
    env["DAGKIT_STORE"] = str(folder / "store")
    Client(book, timeout=120, allow_errors=True).execute(env=env)
    return [cell.outputs for cell in book.cells], seen


def pictured(output: Any) -> list[str]:
    """Give the texts of the picture in an output of a notebook."""
    (data,) = re.findall(r'base64,([^"]+)"', output["data"]["text/html"])
    return drawn(base64.b64decode(data).decode())


LIVE = """
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
def notebook(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[Any]], Counter[str]]:
    return executed(
        tmp_path_factory.mktemp("notebook"),
        LIVE,
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
        "quick = Pipeline({'more': lambda x: x + 1}).run(x=1)",
        "@step\ndef report(fit):\n    return [fit]\npipeline.plan('report', path='x')",
        "pipeline.run(path='v')",
    )


def test_a_cell_shows_pipeline_plan_and_run(notebook: Any) -> None:
    cells, _ = notebook
    for index, text in ((1, "train"), (2, "not cached"), (4, "0.3 s")):
        (output,) = cells[index]
        assert output["output_type"] == "execute_result"
        assert {"text/plain", "text/html"} <= output["data"].keys()
        assert "load" in pictured(output)
        assert index == 1 or text in pictured(output)
    assert "clean" in cells[11][0]["data"]["text/plain"]


@pytest.mark.parametrize(
    ("index", "present", "kind"),
    [
        (3, {"4 ran"}, ""),
        (5, {"1 failed", "ValueError", "1 cached", "needs fit"}, "ValueError"),
        (6, {"1 failed", "interrupted", "1 skipped", "needs fit"}, "KeyboardInterrupt"),
        (7, {"2 ran", "1 cached"}, ""),
        (8, {"2 ran", "1 cached"}, ""),
        (9, {"2 ran", "1 cached"}, ""),
    ],
)
def test_a_live_run_leaves_one_output_with_the_last_state(
    notebook: Any, index: int, present: set[str], kind: str
) -> None:
    """On the calling thread, after an error, after Ctrl-C; on threads, processes and Dask."""
    cells, _ = notebook
    shown = [output for output in cells[index] if output["output_type"] == "display_data"]
    assert len(shown) == 1
    assert shown[0]["data"].keys() >= {"text/plain", "text/html"}
    assert present <= set(pictured(shown[0]))
    errors = [o["ename"] for o in cells[index] if o["output_type"] == "error"]
    assert errors == [kind] * bool(kind)


def test_a_short_run_does_not_flash_and_frames_are_few(notebook: Any) -> None:
    cells, seen = notebook
    assert cells[10] == []
    live, result = cells[12]  # a run that the cell shows already is told in a line
    assert "3 ran" in pictured(live)
    assert result["data"].keys() == {"text/plain"}
    assert 6 <= seen["update_display_data"] <= 60


def test_a_live_picture_never_moves() -> None:
    """From frame to frame only looks and notes change: sizes and places stay."""
    made = flow()
    scene = made._shows(made._prepare((), dict(FLOW))[0], {})
    live = dagkit._Live(scene, list(made.steps.values()))
    frames: list[str] = []
    live.draw = lambda now, seconds: frames.append(dagkit._svg(live.scene))  # type: ignore[method-assign]
    live.pause = live.next = 0.0

    def listen(event: Event) -> None:
        live(event)
        live.draw(0, 0)

    Pipeline(made, on_event=listen, on_error="continue").run(**FLOW)
    assert len(frames) > 12
    boxes = [
        re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="40"', f)
        for f in frames
    ]
    assert boxes[1:] == boxes[:-1]
    assert len({re.findall(r'svg" width="\d+" height="(\d+)"', f)[0] for f in frames}) == 1


def test_a_display_that_fails_is_one_warning_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaks(*args: object) -> None:
        raise OSError("the frontend is gone")

    monkeypatch.setattr(dagkit, "_notebook_cell", lambda: 1)
    monkeypatch.setattr(dagkit._Live, "draw", breaks)

    def slow() -> int:
        time.sleep(0.45)
        return 1

    run, texts = warned(lambda: Pipeline(slow, {"last": lambda slow: slow}).run())
    assert run["last"] == 1
    assert len(texts) == 1
    assert "the frontend is gone" in texts[0]


# --- a real browser

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
# CI installs one, and fails if a test is skipped; a contributor without one can test the rest.
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def browse(page: Path, folder: Path, *flags: str, anchor: str = "") -> str:
    """Open a page in headless Chromium; give what it printed."""
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
        "--disable-component-update --disable-sync --window-size=1000,900"
    )
    done = subprocess.run(
        [str(CHROMIUM), *switches.split(), f"--user-data-dir={folder / 'profile'}", *flags,
         page.as_uri() + anchor],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def pixels(path: Path) -> Counter[Any]:
    """Count the colours of a PNG."""
    import matplotlib.image

    image = (matplotlib.image.imread(path) * 255).astype(int)
    return Counter(map(tuple, image[:, :, :3].reshape(-1, 3).tolist()))


@in_browser
@pytest.mark.parametrize(("scheme", "paper"), [(1, (255, 255, 255)), (0, (27, 30, 35))])
def test_the_page_opens_from_disk_in_light_and_dark(
    tmp_path: Path, scheme: int, paper: tuple[int, ...]
) -> None:
    flow().run(**FLOW).show().save(tmp_path / "ml.html")
    shot = tmp_path / "shot.png"
    browse(
        tmp_path / "ml.html", tmp_path, f"--screenshot={shot}",
        f"--blink-settings=preferredColorScheme={scheme}",
    )  # fmt: skip
    found = pixels(shot)
    assert found.most_common(1)[0][0] == paper
    looks = [dagkit._LOOKS[status] for status in ("ran", "failed")]
    for look in looks:
        colour = look.light if scheme else look.dark
        assert found[tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))] > 50


@in_browser
def test_a_deep_link_leads_to_the_step_and_hostile_text_stays_text(tmp_path: Path) -> None:
    Pipeline([hostile, skipper], on_error="continue").run().show().save(tmp_path / "page.html")
    dom = browse(tmp_path / "page.html", tmp_path, "--dump-dom", anchor="#hostile")
    (part,) = re.findall(r'<div id="hostile">.*?</div>', dom, re.DOTALL)
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in part
    assert "<img" not in dom
    assert "Traceback" in part


@in_browser
@pytest.mark.parametrize("scheme", [1, 0])
def test_a_notebook_as_a_web_page_shows_the_picture(tmp_path: Path, scheme: int) -> None:
    """By nbconvert, as GitHub and others do it: the image is there without any script."""
    import nbconvert
    import nbformat

    data = flow()._repr_mimebundle_()
    output = nbformat.v4.new_output("execute_result", data=data, execution_count=1)
    cell = nbformat.v4.new_code_cell("pipeline", outputs=[output], execution_count=1)
    book = nbformat.v4.new_notebook(cells=[cell])
    text, _ = nbconvert.HTMLExporter(template_name="basic").from_notebook_node(book)
    page = tmp_path / "book.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{text}</body>")
    colours = f"--blink-settings=preferredColorScheme={scheme}"
    browse(page, tmp_path, f"--screenshot={tmp_path / 'shot.png'}", colours)
    assert "data:image/svg+xml;base64," in text
    assert "<details>" in text
    found = pixels(tmp_path / "shot.png")
    assert found[(255, 255, 255) if scheme else (27, 30, 35)] > 10_000  # the picture's own paper
    assert len(found) > 20


########################################################################################
### Plan
########################################################################################


def reasons(plan: Plan) -> list[str]:
    return [f"{x.name} {x.status}: {x.reason}" for x in plan.values()]


def test_a_plan_says_what_would_run_and_why(app: Callable[..., str]) -> None:
    """The list at the end shows that nothing was loaded; no step printed its name."""
    fresh = "raw fresh:  clean fresh:  split fresh:  model fresh:  []"
    assert app(PLAN="1") == (
        "raw new: never ran clean new: never ran split new: never ran model new: never ran []"
    )
    app()
    assert app(PLAN="1") == fresh
    assert app(PLAN="1", INPUTS='{"alpha": 0.3}') == fresh.replace(
        "model fresh: ", "model stale: input alpha 0.1 → 0.3"
    )
    assert app("data.txt", "1", "5", PLAN="1") == (
        "raw stale: input path changed clean stale: after raw split stale: after clean "
        "model stale: after split []"
    )
    app("data.txt", "5", "1")
    assert app("helpers.py", "int(x)", "1 * int(x)", PLAN="1") == (
        "raw fresh:  clean stale: code changed: helper helpers.strip split stale: after clean "
        "model stale: after split []"
    )
    app()
    assert app(PLAN="1") == fresh
    assert app("app.py", "alpha=0.1", "alpha=0.3", PLAN="1") == fresh.replace(
        "model fresh: ", "model stale: input alpha 0.1 → 0.3"
    )


def test_a_plan_is_a_table_and_a_mapping(kept: Pipeline) -> None:
    made = Pipeline(kept, Step(lambda biggest: -biggest, name="least"))
    made.run("squares", n=3)
    plan = made.plan(n=3)
    assert re.sub(r"\d+(\.\d)? m?s\b", "T", str(plan)) == (
        "pipeline · 3 steps, 1 input · 1 fresh, 2 new\n"
        "  squares   n         ✓ fresh   saves T\n"
        "  biggest   squares   ○ new     never ran\n"
        "  least     biggest   ○ new     not cached"
    )
    assert repr(plan) == "<Plan of 'pipeline': 1 fresh, 2 new>"
    assert (list(plan), plan["biggest"].reason) == (["squares", "biggest", "least"], "never ran")
    with pytest.raises(NoValueError, match="'bigest' is no step of this plan"):
        plan["bigest"]


def test_a_plan_of_what_a_run_will_refuse_or_not_look_at() -> None:
    """A plan has no opinion on a map over no list; what no cached step takes is not looked at."""
    made = Pipeline(
        Step(len, args={"obj": "x"}, map="obj", cache=True), Step(id, args={"obj": "y"})
    )
    reasons = [step.reason for step in made.plan(x=5, y=threading.Lock()).values()]
    assert reasons == ["never ran", "not cached"]


def test_a_plan_and_a_run_agree(kept: Pipeline) -> None:
    """Whatever is in the store, fresh steps are reused and no others."""
    size = Step(len, args={"obj": "squares"}, cache=True)
    made = Pipeline(kept, Step(lambda n: n, name="seed"), size)
    for n, clear in ((3, None), (3, "biggest"), (4, None), (3, "squares"), (4, "len"), (4, None)):
        if clear:
            made.store.clear(clear)
        plan = made.plan(n=n)
        run = made.run(n=n)
        fresh = {x.name for x in plan.values() if x.status == "fresh"}
        cached = {x.name for x in run.steps.values() if x.status == "cached"}
        assert fresh <= cached
        assert {x.name for x in plan.values() if x.reason in ("never ran", "not cached")} <= (
            run.steps.keys() - cached
        )


def test_a_plan_loads_the_stored_list_that_a_map_goes_through_and_no_more() -> None:
    """Without that, all that comes after such a map would look stale for ever."""
    listed = Step(lambda n: list(range(n)), name="listed", cache=True)
    doubled = Step(lambda x: 2 * x, name="doubled", args={"x": "listed"}, map="x", cache=True)
    total = Step(sum, args={"iterable": "doubled"}, cache=True)
    made = Pipeline(listed, doubled, total)
    made.run(n=3)
    assert {x.status for x in made.plan(n=3).values()} == {"fresh"}
    made.store.clear("listed")
    assert reasons(made.plan(n=3)) == [
        "listed new: never ran",
        "doubled stale: after listed",
        "sum stale: after doubled",
    ]


def test_the_reason_of_a_step_that_ran_is_that_of_the_plan(kept: Pipeline) -> None:
    assert kept.run(n=3).steps["squares"].reason == "never ran"
    why = "input n 3 → 4"
    assert reasons(kept.plan(n=4)) == [f"squares stale: {why}", "biggest stale: after squares"]
    assert kept.run(n=4).steps["squares"].reason == why


def test_the_reason_for_another_version_or_unreadable_entry(kept: Pipeline) -> None:
    one, two = (Pipeline(Step(len, args={"obj": "x"}, cache=True, version=v)) for v in (1, 2))
    one.run(x="a")
    assert reasons(two.plan(x="a")) == ["len stale: version changed"]
    (path,) = entries(one)
    path.write_bytes(flip(path.read_bytes(), 2000))
    assert warned(lambda: reasons(one.plan(x="a")))[0] == ["len stale: unreadable entry"]


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

    made, lock = Pipeline(clean, after, open_), threading.Lock()
    for expected in ("ran", "cached"):  # what follows goes by the value
        plan = made.plan(n=1, lock=lock)
        why = "no fingerprint: clean -> closure db -> sqlite3.Connection"
        assert reasons(plan)[0] == f"clean stale: {why}"
        assert plan["open_"].reason == "no fingerprint: _thread.lock"
        run = made.run(n=1, lock=lock)
        assert [run.steps[x].status for x in ("clean", "open_", "after")] == [
            "ran",
            "ran",
            expected,
        ]
    db.close()


def test_what_was_pruned_is_fresh_only_if_nothing_that_runs_needs_it(kept: Pipeline) -> None:
    def told(biggest: int) -> str:
        return str(biggest)

    made = Pipeline(kept, told)
    made.run(n=4)
    made.store.prune(max_bytes=0)
    assert reasons(made.plan("told", n=4)) == [
        "squares stale: payload pruned",
        "biggest stale: payload pruned",
        "told new: not cached",
    ]
    assert went(made.run("told", n=4)) == "squares ran, biggest ran, told ran"
    made.store.prune(max_bytes=0)
    made.run("squares", n=4)
    assert reasons(made.plan("told", n=4))[0] == "squares fresh: "


def test_a_module_that_cannot_be_imported_any_more_is_a_reason(tmp_path: Path) -> None:
    write(tmp_path / "app", {
        "models.py": "import os\nif 'BROKEN' in os.environ: raise RuntimeError\nclass M: pass\n",
        "app.py": """
            from dagkit import step
            @step(cache=True)
            def model():
                from models import M
                return M()
        """,
    })  # fmt: skip
    code = "import app, dagkit; made = dagkit.Pipeline(app); "
    run_in(tmp_path / "app", code + "made.run()")
    shown = run_in(tmp_path / "app", code + "print(made.plan()['model'].reason)", BROKEN="1")
    assert shown == "code models:M is gone\n"


########################################################################################
### Run record
########################################################################################


def test_run_is_a_mapping_of_its_targets_with_inputs_and_steps(shop: Pipeline) -> None:
    run = shop.run("mean", prices=[1, 2])
    assert isinstance(run, Run)
    assert run.inputs == {"prices": [1, 2], "digits": 2}
    assert {name: s.status for name, s in run.steps.items()} == {"total": "ran", "mean": "ran"}
    assert all(0 <= s.seconds < 10 and s.attempts == 1 for s in run.steps.values())
    assert run.errors == {}
    assert re.fullmatch(r"<Run of 'pipeline': 2 ran, .* s>", repr(run))


def test_a_name_without_a_value_says_why(shop: Pipeline) -> None:
    run = shop.run("mean", prices=[1, 2])
    with pytest.raises(NoValueError) as caught:
        run["total"]
    assert str(caught.value) == (
        "'total' was no target of this run\n  known names: mean"
    ) or "ran" in str(caught.value)
    assert run.get("nothing", 7) == 7
    assert "total" not in run


def test_record_is_ready_for_json(shop: Pipeline) -> None:
    record = json.loads(json.dumps(shop.run("total", prices=[1]).record))
    assert record["inputs"]["prices"]["value"] == [1]
    assert record["steps"]["total"]["status"] == "ran"
    assert (record["status"], record["dagkit"]) == ("ran", dagkit.__version__)


# --- records


def kept_runs(made: Pipeline) -> list[dict[str, Any]]:
    path = Path(made.store.path) / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_of_a_pipeline_with_a_store_is_a_line_of_json(shop: Pipeline) -> None:
    made = Pipeline(shop, store=os.environ["DAGKIT_STORE"])
    made.run(prices=[1, 2])
    (line,) = kept_runs(made)
    assert list(line) == [
        "id", "pipeline", "started", "seconds", "status", "error", "user", "host", "python",
        "dagkit", "commit", "dirty", "inputs", "targets", "metrics", "steps",
    ]  # fmt: skip
    assert line["inputs"]["prices"]["value"] == [1, 2]
    assert line["inputs"]["prices"]["fingerprint"] == dagkit._fingerprint([1, 2])
    assert line["metrics"] == {"total": 3, "mean": 1.5, "low": 1, "high": 2, "spread": 1}
    assert line["steps"]["mean"]["status"] == "ran"
    assert (line["python"], line["dagkit"]) == (sys.version.split()[0], dagkit.__version__)
    made.run("mean", prices=[1, 2])
    first, second = kept_runs(made)
    assert first["id"] != second["id"]
    assert second["metrics"] == {"mean": 1.5}


def test_a_plain_pipeline_records_nothing(
    monkeypatch: pytest.MonkeyPatch, folder: Path, shop: Pipeline
) -> None:
    monkeypatch.delenv("DAGKIT_STORE")
    made = Pipeline(shop, secret=("prices",))
    made.run(prices=[1])
    assert made.history() == []
    assert not (folder / ".dagkit").exists()


def test_metrics_of_reused_values_are_recorded_without_loading_them(kept: Pipeline) -> None:
    made = Pipeline(kept, Step(lambda biggest: biggest, name="score", cache=True))
    made.run("score", n=4)
    made.store.prune(max_bytes=0)
    run = made.run("biggest", n=4)
    assert [x["metrics"] for x in kept_runs(made)] == [{"score": 9}, {"biggest": 9}]
    assert run["biggest"] == 9


def test_numbers_of_numpy_are_metrics_and_large_things_are_not() -> None:
    values = {
        "half": np.float32(0.5), "three": np.int64(3), "yes": np.bool_(True), "text": "a",
        "long": "a" * 201, "none": None, "list": [1], "array": np.ones(1),
        "date": np.datetime64(1, "s"),
    }  # fmt: skip
    found = dagkit._metrics(values)
    assert found == {"half": 0.5, "three": 3, "yes": True, "text": "a"}
    assert [type(x) for x in found.values()] == [float, int, bool, str]


def test_failed_and_interrupted_runs_are_recorded(shop: Pipeline) -> None:
    def stopped(mean: float) -> None:
        raise KeyboardInterrupt

    def breaks(total: float) -> None:
        raise ValueError("no")

    made = Pipeline(shop, breaks, store=os.environ["DAGKIT_STORE"])
    with pytest.raises(ValueError, match="no"):
        made.run("breaks", prices=[1])
    with pytest.raises(KeyboardInterrupt):
        Pipeline(shop, stopped, store=made.store).run("stopped", prices=[1])
    failed, interrupted = kept_runs(made)
    assert failed["status"] == interrupted["status"] == "failed"
    assert failed["error"] == failed["steps"]["breaks"]["error"] == "ValueError: no"
    assert interrupted["error"] == "KeyboardInterrupt"
    assert interrupted["steps"]["mean"]["status"] == "ran"


def test_history_is_a_table_of_what_differs(shop: Pipeline) -> None:
    made = Pipeline(shop, store=os.environ["DAGKIT_STORE"])
    for digits, prices in ((0, [1, 2, 2]), (2, [1, 2, 2])):
        made.run("mean", prices=prices, digits=digits)
    rows = made.history()
    assert [row["metrics.mean"] for row in rows] == [2.0, 1.67]
    shown = re.sub(r" +", " ", re.sub(r"\d+(\.\d)? m?s$", "T", repr(rows), flags=re.MULTILINE))
    assert shown == " digits mean seconds\n 0 2 T\n 2 1.67 T"
    page = rows._repr_html_()  # type: ignore[attr-defined]
    assert page.startswith('<table><tr><td style="text-align:left">digits</td>')
    frame = pd.DataFrame(rows)
    assert frame["inputs.digits"].tolist() == [0, 2]
    assert frame["metrics.mean"].tolist() == [2.0, 1.67]
    assert list(frame["status"]) == ["ran", "ran"]


def test_failed_runs_are_seen_in_the_history_and_a_long_value_is_cut(folder: Path) -> None:
    def fails(x: Any) -> None:
        raise ValueError("no")

    made = Pipeline(fails, store=os.environ["DAGKIT_STORE"], on_error="continue")
    for x in (None, list(range(50))):
        made.run(x=x)
    head, first, second = [
        re.split(" {3,}", line.strip()) for line in repr(made.history()).splitlines()
    ]
    assert head == ["x", "seconds", "status", "error"]
    assert (first[0], first[2:]) == ("None", ["failed", "ValueError: no"])
    assert re.fullmatch(r"\[0, 1, .*….*48, 49\]", second[0])


def test_pipelines_of_one_store_are_told_apart_by_name(shop: Pipeline) -> None:
    for name in ("one", "two", "one"):
        made = Pipeline(shop, name=name)
        made.run("total", prices=[1])
        assert made.show().text.startswith(f"{name} · ")
    assert [len(Pipeline(shop, name=name).history()) for name in ("one", "two", "")] == [2, 1, 0]


def test_a_recorded_run_can_be_repeated(folder: Path) -> None:
    """Inputs that are short JSON come back as they were, paths too; others must be given."""

    def told(path: Path, options: dict[str, Any], pair: Any, frame: pd.DataFrame) -> str:
        return f"{path.name} {options} {pair} {len(frame)}"

    made = Pipeline(told, store=os.environ["DAGKIT_STORE"])
    inputs = {"path": folder / "data/raw.csv", "options": {"a": [1, None]}, "pair": (1, 2)}
    text = made.run(frame=TOWNS, **inputs)["told"]
    again = made.history()[-1].inputs
    assert again == {"path": folder / "data/raw.csv", "options": {"a": [1, None]}}
    assert made.run(frame=TOWNS, pair=(1, 2), **again)["told"] == text
    with pytest.raises(MissingInputError, match="'pair'"):
        made.run(**again)
    paths = [folder / "data/raw.csv", folder]
    made.run(frame=TOWNS, pair=paths, **again)
    assert made.history()[-1].inputs["pair"] == paths
    (noted,) = {row["inputs.frame"] for row in made.history()}
    assert noted == "DataFrame(3 x 2)"


def test_secrets_are_never_written_nor_shown(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fetch(token: str, region: str = "eu") -> int:
        if region == "moon":
            raise OSError("no such region")
        return len(token)

    made = Pipeline(Step(fetch, cache=True), secret=("token",), progress=True)
    run = made.run(token="s3cr3t-a")
    assert run.inputs["token"] == "s3cr3t-a"  # for who gave it
    with pytest.raises(OSError, match="region") as caught:
        made.run(token="s3cr3t-a", region="moon")
    assert "token=<secret>" in caught.value.__notes__[0]
    assert reasons(made.plan(token="s3cr3t-b")) == ["fetch stale: input token changed"]
    plan, page = made.plan(token="s3cr3t-b"), folder / "page.html"
    run.show().save(page)
    shown = [
        str(run),
        plan.show().html,
        page.read_text(),
        json.dumps(run.record),
        repr(made.history()),
    ]
    stored = [x.read_bytes() for x in Path(made.store.path).rglob("*") if x.is_file()]
    everything = b" ".join(
        [*stored, *(text.encode() for text in shown), *map(str.encode, capfd.readouterr())]
    )
    assert b"s3cr3t" not in everything
    with pytest.raises(UnknownNameError, match=r"secret= names 'tokn'.*\n.*did you mean 'token'"):
        Pipeline(fetch, secret="tokn").run(token="s3cr3t-a")
    plain = dagkit._fingerprint("s3cr3t-a")
    assert made.history()[0].inputs == {"region": "eu"}
    for line in kept_runs(made):
        noted = line["inputs"]["token"]
        assert noted["text"] == "<secret>"
        assert len(noted["fingerprint"]) == 64
        assert noted["fingerprint"] != plain  # with a key: nobody can try all passwords


def login(key: str = "s3cr3t-default") -> int:
    return len(key)


def test_a_value_pruned_after_the_run_is_not_made_of_an_input_that_was_changed() -> None:
    def total_of(numbers: list[int]) -> int:
        return sum(numbers)

    def meddler(total_of: int, numbers: list[int]) -> None:
        numbers.append(100)

    made = Pipeline(Step(total_of, cache=True), meddler)
    run = made.run(numbers=[1, 2])
    made.store.prune(max_bytes=0)
    with (
        pytest.warns(DagkitWarning, match="it was cut short"),
        pytest.raises(MutationError, match="a step changed the input 'numbers' in place"),
    ):
        run["total_of"]
    assert made.run(numbers=[1, 2])["total_of"] == 3


def test_files_that_only_uncached_steps_take_are_not_read_for_the_record(folder: Path) -> None:
    os.mkfifo("data/endless")
    made = Pipeline({"size": lambda path: 1}, Step(lambda n: n, name="same", cache=True))
    made.run(path=[folder / "data"], n=1)
    made.run(path=folder / "data" / "endless", n=1)
    first, second = kept_runs(made)
    assert first["inputs"]["path"] == {"paths": [str(folder / "data")], "fingerprint": ""}
    assert second["inputs"]["path"]["path"] == str(folder / "data" / "endless")
    assert len(second["inputs"]["n"]["fingerprint"]) == 64


def test_the_default_of_a_secret_is_not_on_the_page(tmp_path: Path) -> None:
    made = Pipeline(login, secret="key")
    for shown in (made, made.plan(), made.run()):
        shown.show().save(tmp_path / "page.html")
        assert "s3cr3t" not in (tmp_path / "page.html").read_text() + shown.show().html


def test_lines_of_many_processes_do_not_mix_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    code = """
        import os
        from dagkit import Pipeline, Step
        made = Pipeline(Step(lambda n: "x" * 150, name="text"), store=os.environ["DAGKIT_STORE"])
        for n in range(60):
            made.run(n=n)
    """
    running = [start(code) for _ in range(4)]
    for process in running:
        process.communicate()
        assert process.returncode == 0
    made = Pipeline(Step(lambda n: n, name="text"), store=os.environ["DAGKIT_STORE"])
    rows = [x for x in made.store._records()]
    assert Counter(x["inputs"]["n"]["value"] for x in rows) == dict.fromkeys(range(60), 4)
    with open(tmp_path / "store" / "runs.jsonl", "ab") as file:
        file.write(b'{"id": "cut sho')
    assert len([*made.store._records()]) == 240
    made.run(n=1)
    assert len([*made.store._records()]) == 241


def test_what_has_no_text_does_not_break_the_record_of_its_run() -> None:
    """Python refuses to write an int of so many digits; a path may be of bytes."""

    class Odd(os.PathLike[bytes]):
        def __fspath__(self) -> bytes:
            return b"\xff"

    huge = 10**5000
    made = Pipeline(Step(lambda x, p: x, name="big", cache=True), {"more": lambda big: big + 1})
    for _ in range(2):
        assert made.run(x=huge, p=Odd())["more"] == huge + 1
    assert [row.get("metrics.more") for row in made.history()] == [None, None]


def test_inputs_are_recorded_as_they_were_before_a_step_changed_them() -> None:
    def grow(rows: list[int]) -> int:
        rows.append(9)
        return len(rows)

    made = Pipeline(grow, store=os.environ["DAGKIT_STORE"])
    made.run(rows=[1])
    assert made.history()[0].inputs == {"rows": [1]}


def test_a_long_input_is_not_written_as_text_to_see_that_it_is_long() -> None:
    class Endless(list[int]):
        def __iter__(self) -> Iterator[int]:
            yield from itertools.count()

    assert dagkit._noted({"a": "x" * 4000})["value"] == {"a": "x" * 4000}
    assert list(dagkit._noted({"a": Endless([1])})) == ["text", "fingerprint"]
    assert list(dagkit._noted(np.float64(1))) == ["text", "fingerprint"]  # no float, if given again


@pytest.mark.parametrize(
    "text", ["5", "null", "{}", '{"pipeline": "pipeline", "inputs": {"x": 3}, "steps": null}']
)
def test_lines_that_are_no_record_are_left_out_of_the_history(text: str, shop: Pipeline) -> None:
    made = Pipeline(shop, store=os.environ["DAGKIT_STORE"])
    made.run("total", prices=[1])
    with open(Path(made.store.path) / "runs.jsonl", "a") as file:
        file.write(f"{text}\n")
    made.run("total", prices=[2])
    assert [row["metrics.total"] for row in made.history()] == [1, 2]


def test_records_that_cannot_be_read_are_an_empty_history(shop: Pipeline) -> None:
    made = Pipeline(shop, store=os.environ["DAGKIT_STORE"])
    (Path(made.store.path) / "runs.jsonl").mkdir(parents=True)
    (Path(made.store.path) / "CACHEDIR.TAG").write_bytes(dagkit._TAG)
    with pytest.warns(DagkitWarning, match="runs cannot be recorded"):
        assert made.run("total", prices=[1])["total"] == 1
    assert made.history() == []


def test_what_is_secret_stays_so_in_a_pipeline_made_of_others() -> None:
    """Also if it came as an iterator, which replace() could not use again."""
    inner = Pipeline({"size": lambda token: len(token)}, secret=iter(["token"]))
    for outer in (Pipeline(inner, {"more": lambda size: size + 1}), inner.replace()):
        assert outer.replace(store=os.environ["DAGKIT_STORE"]).run(token="s3cr3t")["size"] == 6
        assert outer.secret == {"token"}
    assert "s3cr3t" not in Path(os.environ["DAGKIT_STORE"], "runs.jsonl").read_text()


def test_a_secret_that_no_step_takes_is_an_error(shop: Pipeline) -> None:
    """With a typo it would be recorded and shown."""
    made = shop.replace(secret="price")
    with pytest.raises(UnknownNameError) as caught:
        made.run(prices=[1])
    assert str(caught.value) == (
        "secret= names 'price': no step makes or takes it\n"
        "  known names: bounds, digits, high, low, mean, prices, spread, total; "
        "did you mean 'prices'?"
    )


def test_a_secret_is_not_shown_as_a_target_nor_by_the_error_of_a_map() -> None:
    step = Step(len, map="obj", args={"obj": "token"})
    made = Pipeline(step, store=os.environ["DAGKIT_STORE"], secret="token")
    assert made.run("token", token="s3cr3t")["token"] == "s3cr3t"
    with pytest.raises(DagkitError, match="which is <secret>"):
        made.run(token="s3cr3t")
    assert "s3cr3t" not in json.dumps(kept_runs(made))


def test_a_branch_may_have_any_name_and_git_is_asked_without_a_lock(tmp_path: Path) -> None:
    """``git status`` else rewrites the index: a commit at that moment would find it locked."""
    app = tmp_path / "app"
    write(app, {"flow.py": "def one(): return 1\n"})
    git = ["git", "-C", str(app), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (app / ".git" / "HEAD").write_bytes(b"ref: refs/heads/caf\xe9\n")
    os.utime(app / "flow.py", (1, 1))  # git would note that it is as it was
    before = (app / ".git" / "index").read_bytes()
    assert dagkit._git(str(app), -1) == {"commit": "", "dirty": True}
    assert (app / ".git" / "index").read_bytes() == before


def test_the_commit_of_the_code_is_recorded(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path / "app"), "-c", "user.name=a", "-c", "user.email=a@b"]
    write(tmp_path / "app", {"flow.py": "def one(): return 1\n"})
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    code = """
        import os, flow, dagkit
        made = dagkit.Pipeline(flow, store=os.environ["DAGKIT_STORE"])
        made.run()
        print(made.history()[-1]["commit"], made.history()[-1]["dirty"])
    """
    assert run_in(tmp_path / "app", textwrap.dedent(code)).split() == [head.stdout.strip(), "False"]
    (tmp_path / "app" / "flow.py").write_text("def one(): return 2\n")
    assert run_in(tmp_path / "app", textwrap.dedent(code)).split() == [head.stdout.strip(), "True"]
    notebook = code.replace(
        "import os, flow, dagkit",
        """
        import os, dagkit
        os.chdir(os.environ["APP"])
        space = {}  # as ipykernel names the file of a cell
        exec(compile("def one(): return 2", "/tmp/ipykernel_0/1.py", "exec"), space)
        flow = space["one"]""",
    )
    found = run_in(tmp_path / "app", textwrap.dedent(notebook), APP=str(tmp_path / "app"))
    assert found.split() == [head.stdout.strip(), "True"]


########################################################################################
### Execution
########################################################################################


def test_a_run_of_100_000_chained_steps_works() -> None:
    chain = [function("s0", body="return 0")]
    chain += [
        function(f"s{i}", f"s{i - 1}", body=f"return s{i - 1} + 1") for i in range(1, 100_000)
    ]
    assert Pipeline(chain).run("s99999")["s99999"] == 99_999


def test_a_fan_in_of_10_000_works() -> None:
    names = [f"s{i}" for i in range(10_000)]
    last = function("last", *names, body=f"return sum(({', '.join(names)},))")
    assert (
        Pipeline([function(n, body="return 1") for n in names], last).run("last")["last"] == 10_000
    )


class Large:
    """A value that can be counted while it is alive."""

    alive: ClassVar[weakref.WeakSet[Large]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.data = np.ones(1000)
        self.alive.add(self)


@pytest.mark.parametrize("retries", [0, 1], ids=["plain loop", "ready/done loop"])
def test_a_chain_over_large_arrays_holds_two(retries: int) -> None:
    """Values are dropped as soon as nothing needs them."""
    most: list[int] = []
    failed = [retries == 0]

    def grow(previous: Large | None) -> Large:
        if not failed[0]:
            failed[0] = True
            raise OSError("the ready/done loop takes over")
        made = Large()
        most.append(len(Large.alive))
        return made

    steps = [Step(lambda: grow(None), name="s0", retries=retries)]
    steps += [Step(grow, name=f"s{i}", args={"previous": f"s{i - 1}"}) for i in range(1, 20)]
    run = Pipeline(steps).run("s19")
    assert isinstance(run["s19"], Large)
    assert max(most) == 2
    assert len(Large.alive) == 1


def test_a_value_that_nothing_needs_is_dropped_at_once() -> None:
    def make() -> tuple[Large, int]:
        return Large(), 1

    def last(small: int) -> tuple[int, int]:
        return small, len(Large.alive)

    run = Pipeline(Step(make, outputs=("large", "small")), last).run("last")
    assert run["last"] == (1, 0)


def failing(total: float, table: Any) -> None:
    raise LookupError("no such column")


def test_an_exception_keeps_type_and_traceback_and_gains_one_note(shop: Pipeline) -> None:
    with pytest.raises(LookupError, match="no such column") as caught:
        Pipeline(shop, failing).run("failing", prices=[1], table=np.zeros((2, 3)))
    assert caught.value.__notes__ == [
        f"in step 'failing' at {at(failing)}, with total=1, table=ndarray(2 x 3 float64)"
    ]
    assert caught.traceback[-1].name == "failing"


def test_wrong_number_of_outputs_error_names_both_counts() -> None:
    def split() -> tuple[int, ...]:
        return 1, 2, 3

    with pytest.raises(ResultError) as caught:
        Pipeline(Step(split, outputs=("train", "test"))).run()
    assert str(caught.value) == (
        "step 'split' has 2 outputs (train, test) but returned 3 values\n"
        f"  split() at {at(split)}\n"
        "  return a tuple of 2, or a dict with these keys"
    )
    for value, found in (
        ({"train": 1, "tst": 2}, "a dict with the keys train, tst"),
        (np.zeros(2), r"ndarray\(2 float64\)"),
        ("ab", "'ab'"),
    ):
        with pytest.raises(ResultError, match=f"but returned {found}\n"):
            Pipeline(Step(lambda v=value: v, name="split", outputs=("train", "test"))).run()


def test_outputs_may_come_as_a_dict_in_any_order() -> None:
    made = Pipeline(Step(lambda: {"b": 2, "a": 1}, name="split", outputs=("a", "b")))
    assert dict(made.run("a", "b")) == {"a": 1, "b": 2}


def test_iterators_are_errors_as_results_and_lists_as_inputs() -> None:
    """Whoever looked first would use them up."""
    for value in (zip([1], [2], strict=True), map(len, []), iter([1]), enumerate("a")):
        with pytest.raises(ResultError, match=f"returned a {type(value).__name__}, which only one"):
            Pipeline(Step(lambda v=value: v, name="rows")).run()
    made = Pipeline({"one": lambda rows: list(rows), "two": lambda rows: list(rows)})
    assert dict(made.run(rows=iter([1, 2]))) == {"one": [1, 2], "two": [1, 2]}


@pytest.mark.parametrize("outputs", [(), ("a", "b")])
def test_a_generator_is_an_error_that_says_to_return_a_list(outputs: tuple[str, ...]) -> None:
    def rows() -> Iterator[int]:
        yield 1

    with pytest.raises(ResultError) as caught:
        Pipeline(Step(rows, outputs=outputs)).run()
    assert str(caught.value) == (
        "step 'rows' returned a generator, which only one step could use, once\n"
        f"  rows() at {at(rows)}\n  return a list instead"
    )


def test_skip_skips_what_needs_it_but_for_an_argument_with_a_default(shop: Pipeline) -> None:
    ran: list[str] = []

    def extra(total: float) -> None:
        raise Skip("nothing today")

    def needs_it(extra: int) -> None:
        ran.append("needs_it")

    def needs_that(needs_it: int) -> None:
        ran.append("needs_that")

    def copes(total: float, extra: str = "none") -> str:
        return f"{total}, {extra}"

    run = Pipeline(shop, extra, needs_it, needs_that, copes).run(prices=[1, 2])
    assert run["copes"] == "3, none"
    assert not ran
    skipped = {n: s.reason for n, s in run.steps.items() if s.status == "skipped"}
    assert skipped == {
        "extra": "nothing today",
        "needs_it": "needs extra",
        "needs_that": "needs needs_it",
    }
    with pytest.raises(NoValueError, match="step 'extra' was skipped: nothing today"):
        run["extra"]


def test_on_error_continue_runs_all_that_does_not_depend_on_the_failure(shop: Pipeline) -> None:
    def broken(total: float) -> None:
        raise ValueError("bad\nnews")

    def after(broken: int) -> None: ...
    def copes(broken: int = 7) -> int:
        return broken

    run = Pipeline(shop, broken, after, copes, on_error="continue").run(prices=[1, 2])
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


def test_the_first_failure_ends_the_run() -> None:
    ran: list[str] = []
    steps = [
        Step(lambda: ran.append("one"), name="one"),
        Step(lambda: 1 / 0, name="two"),
        Step(lambda: ran.append("three"), name="three"),
    ]
    with pytest.raises(ZeroDivisionError):
        Pipeline(steps).run()
    assert ran == ["one"]


@pytest.mark.parametrize("value", ["x", "raise"])
def test_a_wrong_on_error_is_an_error(value: Any) -> None:
    if value == "raise":
        Pipeline(total, on_error=value)
    else:
        with pytest.raises(ValueError, match="on_error='x': expected 'raise' or 'continue'"):
            Pipeline(total, on_error=value)


def flaky(failures: int) -> tuple[Callable[[], int], list[float]]:
    """Make a function that raises so many times before it gives the number of its calls."""
    calls: list[float] = []

    def attempt() -> int:
        calls.append(time.monotonic())
        if len(calls) <= failures:
            raise ConnectionError(f"call {len(calls)}")
        return len(calls)

    return attempt, calls


def test_retries_are_extra_tries() -> None:
    attempt, calls = flaky(2)
    made = Pipeline(Step(attempt, name="get", retries=2), Step(lambda get: get, name="use"))
    run = made.run()
    assert (run["use"], run.steps["get"].attempts, run.steps["get"].status) == (3, 3, "ran")
    attempt, calls = flaky(3)
    with pytest.raises(ConnectionError, match="call 3") as caught:
        Pipeline(Step(attempt, name="get", retries=2)).run()
    assert len(calls) == 3
    assert len(caught.value.__notes__) == 1


def test_retry_delays_grow_by_the_backoff() -> None:
    attempt, calls = flaky(2)
    Pipeline(Step(attempt, name="get", retries=2, retry_delay=0.02, retry_backoff=3)).run()
    assert calls[1] - calls[0] >= 0.02
    assert calls[2] - calls[1] >= 0.06


def test_other_steps_run_while_one_waits_for_its_next_try() -> None:
    other = threading.Event()

    def attempt() -> bool:
        if not other.is_set():
            raise OSError("not yet")
        return True

    made = Pipeline(
        Step(attempt, name="get", retries=1, retry_delay=0.1), Step(other.set, name="other")
    )
    assert made.run()["get"] is True


def test_skips_and_wrong_results_are_not_tried_again() -> None:
    calls: list[int] = []

    def skip() -> None:
        calls.append(1)
        raise Skip

    def rows() -> Iterator[int]:
        calls.append(2)
        return iter(range(3)) if False else (i for i in range(3))

    made = Pipeline(Step(skip, retries=3), Step(rows, retries=3), on_error="continue")
    made.run()
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

    made = Pipeline(Step(get, retries=2), skipped, broken, on_error="continue")
    run = made.run()
    assert {n: s.status for n, s in run.steps.items()} == {
        "get": "ran",
        "skipped": "skipped",
        "broken": "failed",
    }
    assert run.errors["broken"].__notes__ == [f"in step 'broken' at {at(broken)}, with get=3"]


def test_a_callable_that_returns_a_coroutine_is_awaited() -> None:
    async def fetch(x: int) -> int:
        return x

    made = Pipeline(Step(lambda: 1, name="first"), Step(lambda first: fetch(first + 1), name="got"))
    assert made.run("got")["got"] == 2


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
        assert process.communicate(timeout=30)[0] == "stopped None\n"
        assert process.returncode == 0


def test_a_pipeline_runs_inside_a_step_and_in_many_threads(shop: Pipeline) -> None:
    def nested(prices: list[float]) -> Any:
        return shop.run("mean", prices=prices)["mean"]

    made = Pipeline(nested)
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(made.run(prices=[i, i])["nested"]))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(8))


@hypothesis.given(dags(), st.randoms(use_true_random=False))
@hypothesis.settings(deadline=None)
def test_failures_and_skips_agree_with_a_model(
    dag: list[tuple[str, list[str]]], draw: random.Random
) -> None:
    """In any DAG a step runs exactly if all it needs ran; both loops agree on the values."""
    fate = {name: draw.choice(["ran", "ran", "ran", "failed", "skipped"]) for name, _ in dag}
    bodies = {
        "ran": "return 1 + sum(args)",
        "failed": "raise ValueError",
        "skipped": "raise Skip('x')",
    }
    steps = []
    for name, needs in dag:
        scope: dict[str, Any] = {"Skip": Skip}
        body = bodies[fate[name]].replace("args", f"({''.join(n + ',' for n in needs)})")
        exec(f"def {name}({', '.join(needs)}): {body}", scope)
        steps.append(scope[name])
    values: dict[str, int] = {}
    statuses: dict[str, str] = {}
    for name, needs in sorted(dag, key=lambda item: int(item[0][1:])):
        if all(statuses[need] == "ran" for need in needs):
            statuses[name] = fate[name]
            if fate[name] == "ran":
                values[name] = 1 + sum(values[need] for need in needs)
        else:
            statuses[name] = "skipped"
    run = Pipeline(steps, on_error="continue").run()
    assert dict(run) == values
    assert {name: s.status for name, s in run.steps.items()} == statuses


########################################################################################
### Execution: executors, maps, sensors, events
########################################################################################

EXECUTORS = ["sequential", "threads", "processes", "loky", "dask executor", "dask client"]


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


@pytest.fixture(params=EXECUTORS)
def executor(
    request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """Every executor, one after the other: the contract is the same on all of them."""
    monkeypatch.setenv("HOME", str(home))  # that of the workers, which outlive a test
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
    else:
        client = request.getfixturevalue("cluster")
        yield client if request.param == "dask client" else client.get_executor()


def double(x: int) -> int:
    return 2 * x


def plus(double: int, y: int = 1) -> int:
    return double + y


def halves(plus: int) -> tuple[int, int]:
    return plus // 2, plus - plus // 2


def here(plus: int) -> int:
    return os.getpid()


def fails(double: int) -> None:
    raise LookupError(f"no {double}")


def skips(double: int) -> None:
    raise Skip("not today")


def copes(double: int, skips: int = -1) -> int:
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


def flaky_once(item: int, folder: Path) -> int:
    """Fail at the first call for each item, in whatever process."""
    try:
        (folder / str(item)).touch(exist_ok=False)
    except FileExistsError:
        return item
    raise ConnectionError(item)


class Awkward(Exception):
    """Pickles, but cannot be built again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def awkward() -> None:
    raise Awkward(1, 2)


def dies() -> None:
    os._exit(3)


async def later(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


square_all = Step(square, map="item")
negate_all = Step(negated, map="square")


def test_all_executors_give_the_same_values(executor: Any) -> None:
    made = Pipeline(
        double, plus, Step(halves, outputs=("low", "high")), skips, copes, later, executor=executor
    )
    run = made.run(x=10)
    assert (run["plus"], run["low"], run["high"], run["copes"], run["later"]) == (
        21,
        10,
        11,
        -1,
        11,
    )
    assert run.steps["skips"].reason == "not today"


def test_only_targets_are_kept_on_all_executors(executor: Any) -> None:
    made = Pipeline(double, plus, Step(halves, outputs=("low", "high")), executor=executor)
    assert dict(made.run("high", x=1)) == {"high": 2}


def test_local_steps_run_in_the_calling_process(executor: Any) -> None:
    made = Pipeline(double, plus, Step(here, local=True), executor=executor)
    assert made.run("here", x=1)["here"] == os.getpid()


def test_a_failure_arrives_with_type_and_note_from_all_executors(executor: Any) -> None:
    with pytest.raises(LookupError, match="no 20") as caught:
        Pipeline(double, fails, plus, executor=executor).run(x=10)
    where = f"in step 'fails' at {at(fails)}"
    assert caught.value.__notes__ in (
        [f"{where}, with double=20"],
        [f"{where}, with double=<on the cluster>"],
    )


def test_on_error_continue_works_on_all_executors(executor: Any) -> None:
    def after(fails: int) -> None: ...

    run = Pipeline(double, fails, after, plus, executor=executor, on_error="continue").run(x=1)
    assert run["plus"] == 3
    assert {n: s.status for n, s in run.steps.items()} == {
        "double": "ran",
        "fails": "failed",
        "after": "skipped",
        "plus": "ran",
    }


def test_cached_steps_hit_on_all_executors(executor: Any, tmp_path: Path) -> None:
    steps = [Step(double, cache=True), plus, Step(halves, outputs=("low", "high"), cache=True)]
    made = Pipeline(steps, executor=executor, store=tmp_path / "s")
    assert made.run("low", x=10)["low"] == 10
    run = made.run("low", x=10)
    assert (run["low"], run.steps["double"].status, run.steps["halves"].status) == (
        10,
        "cached",
        "cached",
    )


def test_retries_work_on_all_executors(executor: Any, tmp_path: Path) -> None:
    made = Pipeline(Step(flaky_once, retries=1), executor=executor)
    run = made.run(item=1, folder=tmp_path)
    assert (run["flaky_once"], run.steps["flaky_once"].attempts) == (1, 2)


# Maps


def test_a_map_calls_once_per_element_in_order(executor: Any) -> None:
    run = Pipeline(square_all, executor=executor).run(item=[3, 1, 2])
    assert run["square"] == [9, 1, 4]


def test_a_map_after_a_map_and_a_plain_step(executor: Any) -> None:
    run = Pipeline(square_all, negate_all, summed, executor=executor).run("summed", item=range(30))
    assert run["summed"] == -sum(i * i for i in range(30))


def test_an_empty_map_gives_an_empty_list(executor: Any) -> None:
    run = Pipeline(square_all, negate_all, summed, executor=executor).run(item=[])
    assert (run["square"], run["negated"], run["summed"]) == ([], [], 0)
    made = Pipeline(Step(square, map="item", cache=True), executor=executor)
    assert made.plan(item=[])["square"].status == "fresh"
    assert made.run(item=[]).steps["square"].status == "cached"


def test_several_arguments_are_mapped_side_by_side() -> None:
    def pair(a: int, b: str, c: int) -> str:
        return f"{a}{b}{c}"

    made = Pipeline(Step(pair, map=("a", "b")))
    assert made.run(a=[1, 2], b=["x", "y"], c=0)["pair"] == ["1x0", "2y0"]
    with pytest.raises(ResultError) as caught:
        made.run(a=[1, 2], b=["x"], c=0)
    assert str(caught.value) == (
        "step 'pair' maps over lists of different lengths: a 2, b 1\n"
        f"  pair(a, b, c) at {at(pair)}\n  expected equal lengths"
    )


def test_a_map_over_what_is_no_list_is_an_error() -> None:
    with pytest.raises(ResultError) as caught:
        Pipeline(square_all).run(item="abc")
    assert str(caught.value) == (
        "step 'square' maps over 'item', which is 'abc'\n"
        f"  square(item) at {at(square)}\n  expected a list, or another iterable of elements"
    )
    with pytest.raises(StepError, match="has no argument 'items', which map= names"):
        Step(square, map="items")


def test_a_nested_list_is_mapped_one_level_deep() -> None:
    made = Pipeline(Step(lambda row: sum(row), name="sums", map="row"))
    assert made.run(row=[[1, 2], [3]])["sums"] == [3, 3]


def test_outputs_of_a_mapped_step_are_lists() -> None:
    made = Pipeline(Step(lambda x: (x, -x), name="both", map="x", outputs=("up", "down")))
    run = made.run(x=[1, 2])
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
    run = Pipeline(pair, after, executor=executor).run(x=[1, 2, 3])
    assert run["put_together"] == [((x, -x), x) for x in (1, 2, 3)]


def test_failures_of_a_map_name_index_and_element(executor: Any) -> None:
    with pytest.raises(ValueError, match="not three") as caught:
        Pipeline(Step(picky, map="item"), executor=executor).run(item=[1, 2, 3, 4])
    assert caught.value.__notes__ == [f"in step 'picky', element 2 at {at(picky)}, with item=3"]


def test_a_failed_map_skips_what_follows_it_element_by_element(executor: Any) -> None:
    steps = [Step(picky, map="item"), Step(square, args={"item": "picky"}, map="item")]
    run = Pipeline(steps, executor=executor, on_error="continue").run(item=[1, 2, 3, 4])
    assert {n: s.status for n, s in run.steps.items()} == {"picky": "failed", "square": "skipped"}
    assert run.steps["square"].reason == "needs picky"


def test_a_map_that_cannot_begin_took_no_time() -> None:
    run = Pipeline(
        Step(len, name="size", args={"obj": "word"}, map="obj"), on_error="continue"
    ).run(word="abc")
    assert (run.steps["size"].status, run.steps["size"].seconds) == ("failed", 0.0)


def test_a_map_says_how_many_elements_ran() -> None:
    made = Pipeline(Step(square, map="item", cache=True))
    made.run(item=[1, 2, 3])
    run = made.run(item=[1, 2, 3, 4])
    assert run.steps["square"].reason == "1 of 4 elements, input item 3 → 4"


def test_every_element_has_its_own_retries_and_entry(executor: Any, tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    made = Pipeline(
        Step(flaky_once, map="item", retries=1, cache=True),
        executor=executor,
        store=tmp_path / "store",
    )
    run = made.run(item=[1, 2, 3], folder=tmp_path / "seen")
    assert run["flaky_once"] == [1, 2, 3]


def test_one_new_element_is_one_call(tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    def count(item: int, calls: str) -> int:
        with open(calls, "a") as file:
            file.write(f"{item} ")
        return -item

    made = Pipeline(Step(count, map="item", cache=True))
    assert made.run(item=[1, 2, 3], calls=str(calls))["count"] == [-1, -2, -3]
    assert made.plan(item=[1, 2, 3], calls=str(calls))["count"].status == "fresh"
    assert made.plan(item=[1, 2, 3, 4], calls=str(calls))["count"].status == "stale"
    run = made.run(item=[3, 2, 1, 4], calls=str(calls))
    assert run["count"] == [-3, -2, -1, -4]
    assert calls.read_text() == "1 2 3 4 "
    assert made.run(item=[2], calls=str(calls)).steps["count"].status == "cached"


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
        made = Pipeline(Step(first, map="item"), Step(second, map="first"), executor=pool)
        assert made.run("second", item=[0, 1])["second"] == [0, 1]


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


# Order, failures, processes


def test_ready_steps_start_with_the_longest_remaining_path() -> None:
    started: list[str] = []

    def named(name: str) -> Step:
        return Step(lambda **_: started.append(name), name=name, args={"x": "x"})

    chain = [Step(lambda **_: 0, name=f"a{i}", args={"p": f"a{i - 1}"}) for i in range(2, 5)]
    with ThreadPoolExecutor(1) as pool:
        Pipeline(named("b"), named("c"), named("a1"), chain, executor=pool).run(x=0)
    assert started == ["a1", "b", "c"]


def test_the_first_failure_lets_running_steps_end_and_keeps_their_results(tmp_path: Path) -> None:
    failed = threading.Event()

    def breaks() -> None:
        failed.set()
        raise ValueError("first")

    def slow() -> int:
        assert failed.wait(30)
        return 5

    with ThreadPoolExecutor(2) as pool:
        made = Pipeline(Step(slow, cache=True), breaks, executor=pool, store=tmp_path / "s")
        with pytest.raises(ValueError, match="first"):
            made.run()
    assert Pipeline(Step(slow, cache=True), store=tmp_path / "s").run().steps["slow"].status in (
        "cached",
        "ran",
    )


def test_an_exception_that_cannot_be_rebuilt_arrives_as_its_text() -> None:
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
    assert run_python(code) == "Awkward: 1 and 2\n7\n"


def test_a_remote_exception_brings_its_traceback(processes: ProcessPoolExecutor) -> None:
    with pytest.raises(LookupError) as caught:
        Pipeline(double, fails, executor=processes).run(x=1)
    assert "in fails" in str(caught.value.__cause__)


@pytest.mark.parametrize("kind", ["processes", "loky"])
def test_a_killed_worker_is_an_error_that_names_the_step(kind: str) -> None:
    if kind == "processes":
        pool: Any = ProcessPoolExecutor(1)
    else:
        import loky

        pool = loky.ProcessPoolExecutor(1)
    with pool, pytest.raises(WorkerError) as caught:
        Pipeline(dies, executor=pool).run()
    assert str(caught.value).startswith(
        f"a worker process died while it ran 'dies'\n  dies() at {at(dies)}\n"
    )
    assert caught.value.step == "dies"


def test_what_cannot_be_sent_to_a_process_is_an_error_that_says_what_to_do(
    processes: ProcessPoolExecutor,
) -> None:
    with pytest.raises(WorkerError) as caught:
        Pipeline(Step(lambda: 1, name="one"), executor=processes).run()
    message = str(caught.value)
    assert message.startswith("step 'one' cannot be sent to another process: ")
    assert message.endswith(
        "define it at the level of a module, use loky or Dask, which send code too, "
        "or keep it here by local=True"
    )


def test_loky_runs_lambdas() -> None:
    import loky

    pool = loky.get_reusable_executor(2)
    assert Pipeline(Step(lambda x: x + 1, name="more"), executor=pool).run(x=1)["more"] == 2


def test_an_executor_without_submit_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"executor=3: expected an object with submit\(\)"):
        Pipeline(double, executor=3)


def big(n: int) -> Any:
    return np.ones(n)


def bigger(big: Any) -> Any:
    return big + 1


def small(bigger: Any) -> float:
    return float(bigger.sum())


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


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_ctrl_c_ends_a_parallel_run_cleanly(kind: str, tmp_path: Path) -> None:
    """No new work, no zombie, and a store that still works; under 2 s beside the running steps."""
    pool = {"threads": "ThreadPoolExecutor", "processes": "ProcessPoolExecutor"}[kind]
    (tmp_path / "wide.py").write_text(
        "import os, time\n"
        "from concurrent.futures import *\n"
        "from dagkit import Pipeline, Step\n"
        "def slow(item):\n"
        "    os.write(1, b'ready\\n')\n"
        "    time.sleep(0.5)\n"
        "    return item\n"
        "if __name__ == '__main__':\n"
        f"    with {pool}(2) as pool:\n"
        "        try:\n"
        "            wide = Pipeline(Step(slow, map='item', cache=True), executor=pool)\n"
        "            wide.run(item=range(999))\n"
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
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=30)[0]
        assert time.monotonic() - began < 5
        assert "stopped" in out
        assert out.count("ready") < 40


# Sensors


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that passes only by waiting; the list holds the present."""
    now = [100.0]

    def wait(done: Any, seconds: float | None) -> Any:
        if not done.empty():
            return done.get()
        assert seconds is not None
        now[0] += seconds
        return None

    monkeypatch.setattr(dagkit, "_clock", lambda: now[0])
    monkeypatch.setattr(dagkit, "_wait", wait)
    return now


def test_a_sensor_checks_at_once_and_then_every_interval(clock: list[float]) -> None:
    checks: list[float] = []

    @sensor(poke_interval=30)
    def arrived() -> str | None:
        checks.append(clock[0])
        return "file" if len(checks) == 4 else None

    run = Pipeline(arrived, Step(lambda arrived: arrived * 2, name="use")).run()
    assert run["use"] == "filefile"
    assert checks == [100.0, 130.0, 160.0, 190.0]


def test_a_sensor_gives_up_after_a_failed_check_past_its_timeout(clock: list[float]) -> None:
    checks: list[float] = []

    @sensor(poke_interval=30, timeout=70, retries=5)
    def arrived() -> None:
        checks.append(clock[0])

    with pytest.raises(SensorTimeoutError) as caught:
        Pipeline(arrived).run()
    assert checks == [100.0, 130.0, 160.0, 190.0]
    assert str(caught.value) == (
        "sensor 'arrived' saw nothing within 70 s, in 4 checks\n"
        f"  arrived() at {at(arrived)}\n  raise timeout=, or see why it waits in vain"
    )


def test_soft_fail_turns_the_timeout_into_a_skip(clock: list[float]) -> None:
    @sensor(poke_interval=1, timeout=0, soft_fail=True)
    def arrived() -> bool:
        return False

    def copes(arrived: bool = False) -> str:
        return f"{arrived}"

    run = Pipeline(arrived, copes).run()
    assert run.steps["arrived"].status == "skipped"
    assert run["copes"] == "False"


def test_an_exception_fails_a_sensor() -> None:
    @sensor(poke_interval=0)
    def arrived() -> bool:
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        Pipeline(arrived).run()


def test_a_sensor_holds_no_worker_between_checks() -> None:
    """On one worker, the sensor waits for what runs after its first check."""
    seen = threading.Event()

    def other() -> bool:
        seen.set()
        return True

    def arrived() -> bool:
        return seen.is_set()

    with ThreadPoolExecutor(1) as pool:
        made = Pipeline(sensor(poke_interval=0.01)(arrived), other, executor=pool)
        assert made.run()["arrived"] is True


def test_a_sensor_that_another_scheduler_keeps_is_kept_once_it_has_seen_something(
    tmp_path: Path,
) -> None:
    """A bridge makes such a step by ``dataclasses.replace``; a check in vain is no value."""

    @sensor(poke_interval=0.01)
    def arrived(folder: str) -> list[str]:
        found = os.listdir(folder)
        Path(folder, "parcel").touch()
        return found

    kept = dataclasses.replace(Pipeline(arrived).steps["arrived"], cache=True)
    (tmp_path / "mail").mkdir()
    runs = [Pipeline(kept).run(folder=str(tmp_path / "mail")) for _ in range(2)]
    assert [run["arrived"] for run in runs] == [["parcel"], ["parcel"]]
    assert [run.steps["arrived"].status for run in runs] == ["ran", "cached"]


def test_a_sensor_has_no_cache_and_no_map() -> None:
    with pytest.raises(StepError, match="@sensor has no option 'cache' or 'map'"):
        sensor(cache=True)(double)
    with pytest.raises(StepError, match="poke_interval=-1; expected seconds"):
        sensor(poke_interval=-1)(double)


# Events


def test_listeners_see_every_change_in_the_calling_thread(executor: Any) -> None:
    seen: list[tuple[str, str, str]] = []
    threads: set[int] = set()

    def listen(event: Event) -> None:
        threads.add(threading.get_ident())
        seen.append((event.kind, event.step, event.status))
        json.dumps(dataclasses.asdict(event))

    Pipeline(double, plus, executor=executor, on_event=listen).run(x=1)
    assert threads == {threading.get_ident()}
    begun = "step started" if executor is None else "step submitted"
    assert seen == [
        ("run started", "", ""),
        (begun, "double", ""),
        ("step finished", "double", "ran"),
        (begun, "plus", ""),
        ("step finished", "plus", "ran"),
        ("run finished", "", "ran"),
    ]


def test_retries_pokes_and_maps_are_events(tmp_path: Path) -> None:
    seen: list[Event] = []
    answers = iter([0, 1])

    def arrived() -> int:
        return next(answers)

    made = Pipeline(
        Step(flaky_once, map="item", retries=1),
        sensor(poke_interval=0)(arrived),
        on_event=[seen.append],
    )
    made.run(item=[1, 2], folder=tmp_path)
    kinds = Counter(event.kind for event in seen)
    assert (kinds["step retried"], kinds["step poked"]) == (2, 1)
    progress = [e for e in seen if e.kind == "map progress" and e.step == "flaky_once"]
    assert [(e.done, e.total) for e in progress] == [(1, 2), (2, 2)]


def test_a_listener_that_raises_gives_one_warning_and_stops_nothing() -> None:
    def broken(event: Event) -> None:
        raise OSError("full")

    with pytest.warns(DagkitWarning) as caught:
        assert Pipeline(double, plus, on_event=broken).run(x=1)["plus"] == 3
    assert len(caught) == 1
    assert "OSError: full" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_the_logger_dagkit_tells_what_happens(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dagkit"):
        Pipeline(double).run(x=1)
    assert [r.getMessage() for r in caplog.records] == [
        "run started",
        "step started double",
        "step finished double ran",
        "run finished ran",
    ]


def test_without_listeners_the_root_logger_is_left_alone() -> None:
    assert run_python("import logging, dagkit; print(logging.getLogger().handlers)") == "[]\n"


# Progress


def shown(made: Pipeline, **inputs: Any) -> str:
    """Give what a run writes to stderr, with times as T."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.suppress(ValueError):
        made.run(**inputs)
    return re.sub(r"\d+(\.\d)? m?s\b", "T", err.getvalue())


def test_progress_writes_a_line_a_step_and_a_summary_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = [Step(double, cache=True), skips, copes]
    assert shown(Pipeline(steps, progress=True), x=1) == (
        "■ double   ran       T\n"
        "⊘ skips    skipped   not today\n"
        "■ copes    ran       T\n"
        "pipeline done in T · 2 ran · 1 skipped\n"
    )
    assert shown(Pipeline(steps, progress=True), x=1).splitlines()[0] == (
        "✓ double   cached    saved T"
    )
    assert capsys.readouterr() == ("", "")


def test_progress_shows_failures_with_their_place() -> None:
    def breaks(double: int) -> None:
        raise ValueError("X has 3 columns")

    assert shown(Pipeline(double, breaks, progress=True), x=1) == (
        "■ double   ran       T\n"
        f"✗ breaks   failed    T   ValueError: X has 3 columns   ({at(breaks)})\n"
        "pipeline failed in T · 1 ran · 1 failed\n"
    )


def test_progress_is_silent_where_there_is_no_terminal_unless_asked() -> None:
    assert shown(Pipeline(double), x=1) == ""
    assert shown(Pipeline(double, progress=False), x=1) == ""
    with pytest.raises(ValueError, match="progress='loud': expected True, False or 'auto'"):
        Pipeline(double, progress="loud")  # type: ignore[arg-type]


@pytest.mark.parametrize("colour", [True, False])
def test_progress_on_a_terminal_rewrites_its_last_line(colour: bool, tmp_path: Path) -> None:
    """A real pseudo-terminal; a map shows how far it is; colours unless NO_COLOR is set."""
    import pty

    (tmp_path / "slow.py").write_text(
        "import time\nfrom dagkit import Pipeline, Step\n"
        "def slow(item):\n    time.sleep(0.03)\n"
        "Pipeline(Step(slow, map='item')).run(item=range(20))\n"
    )
    main, side = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(HERE), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    env |= {} if colour else {"NO_COLOR": "1"}
    subprocess.run([sys.executable, str(tmp_path / "slow.py")], stderr=side, env=env, check=True)
    os.close(side)
    text = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(main, 4096):
            text += chunk
    os.close(main)
    written = text.decode()
    bars = re.findall(r"\x1b\[K▶ slow (\d+)/20 [^\r]* 0/1", written)
    assert 2 <= len(bars) <= 12
    assert ("\x1b[32m" in written) == colour
    assert written.splitlines()[-1].startswith("\x1b[Kpipeline done in")


def test_progress_falls_back_to_ascii() -> None:
    out = run_python(
        """
        import sys
        from dagkit import Pipeline
        sys.stderr = sys.stdout
        Pipeline({"more": lambda x: x + 1}, progress=True).run(x=1)
        """,
        PYTHONIOENCODING="ascii",
    )
    assert out.splitlines()[0].startswith("+ more   ran")
    assert " - 1 ran" in out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.003, "3 ms"), (0.4, "0.4 s"), (8.2, "8.2 s"), (63, "1 min 03 s"), (7500, "2 h 05 min")],
)
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    assert dagkit._duration(seconds) == text


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
def test_random_dags_with_failures_skips_and_retries_agree_with_the_sequential_run(
    executor: Any, seed: int
) -> None:
    """200 steps with up to three arguments each."""
    draw = random.Random(seed)
    fates = ["ran"] * 30 + ["retried"] * 3 + ["failed", "skipped"]
    dag = [
        (
            f"s{i}",
            draw.sample([f"s{j}" for j in range(max(0, i - 30), i)], min(i, draw.randint(0, 3))),
        )
        for i in range(200)
    ]
    fate = {name: draw.choice(fates) for name, _ in dag}

    def outcome(executor: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            steps = [
                Step(
                    functools.partial(act, fate[name], name, folder),
                    name=name,
                    args={"none": "nothing"} | {need: need for need in needs},
                    retries=1,
                )
                for name, needs in dag
            ]
            run = Pipeline(steps, executor=executor, on_error="continue").run(nothing=0)
            summary = {n: (s.status, s.reason, s.attempts) for n, s in sorted(run.steps.items())}
            return dict(run), summary

    assert outcome(executor) == outcome(None)


########################################################################################
### Pipeline
########################################################################################


def test_sources_of_every_kind_can_be_mixed() -> None:
    module = types.ModuleType("shop_module")
    exec("def tax(total): return total / 10", vars(module))
    sys.modules["shop_module"] = module
    try:
        made = Pipeline(
            "shop_module",
            [total, (function for function in [mean])],
            {"doubled": lambda total: 2 * total},
            Step(lambda tax: -tax, name="negative"),
            Pipeline(bounds),
        )
        assert sorted(made.steps) == ["bounds", "doubled", "mean", "negative", "tax", "total"]
        assert made.run("negative", "doubled", prices=[10])["negative"] == -1
        assert sorted(made.steps) == ["bounds", "doubled", "mean", "negative", "tax", "total"]
    finally:
        del sys.modules["shop_module"]


def test_a_source_without_steps_is_an_error() -> None:
    with pytest.raises(SourceError) as caught:
        Pipeline(total, 3)
    assert str(caught.value) == (
        "Pipeline() was given 3, which holds no steps\n"
        "  expected a module, a module's name, a mapping such as globals(), a function, a Step, "
        "a Pipeline, or an iterable of these"
    )
    with pytest.raises(SourceError, match=r"becomes a step by Step\(thing, name=...\)"):
        Pipeline([len])


def test_a_module_with_marks_counts_only_those() -> None:
    scope: dict[str, Any] = {"step": step, "__name__": "m"}
    exec("@step\ndef a(): return 1\ndef helper(): ...\n_old = a", scope)
    assert list(Pipeline(scope).steps) == ["a"]


def test_a_module_without_marks_counts_its_own_public_functions() -> None:
    """So an example module of another library runs unchanged."""
    module = types.ModuleType("plain")
    exec("from os.path import join\ndef a(): return 1\ndef b(a): return a + 1\ndef _c(): ...",
         vars(module))  # fmt: skip
    assert list(Pipeline(module).steps) == ["a", "b"]
    assert Pipeline(module).run("b")["b"] == 2


def test_a_redefined_step_is_used_by_the_next_run() -> None:
    """As in a notebook, where a cell is run again; IPython keeps old results as _, __ and _12."""
    cells: dict[str, Any] = {"step": step, "__name__": "__main__"}
    made = Pipeline(cells)
    exec("@step\ndef a(): return 1\n@step\ndef b(a): return a + 1", cells)
    assert made.run("b")["b"] == 2
    cells["_"] = cells["_12"] = cells["a"]
    exec("@step\ndef a(x=10): return x", cells)
    assert made.run("b")["b"] == 11
    assert list(made.graph.predecessors("a")) == ["x"]
    del cells["b"]
    with pytest.raises(UnknownNameError):
        made.run("b")


def test_a_function_changed_in_place_is_noticed() -> None:
    """IPython's autoreload puts new code into the old function."""
    one, other = function("a", "x=1", body="return x"), function("a", "y=5", body="return y")
    made = Pipeline(one)
    assert made.run()["a"] == 1
    one.__code__, one.__defaults__ = other.__code__, other.__defaults__
    assert made.run()["a"] == 5
    assert list(made.inputs) == ["y"]


def test_a_reloaded_module_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "followed_steps.py"
    file.write_text("def a(): return 1\n")
    made = Pipeline("followed_steps")
    assert made.run()["a"] == 1
    file.write_text("def a(b): return b\ndef b(): return 22\n")
    importlib.invalidate_caches()
    importlib.reload(sys.modules["followed_steps"])
    assert made.run("a")["a"] == 22


def test_a_plain_mapping_names_steps_by_its_keys_and_is_followed() -> None:
    steps: dict[str, Any] = {"more": lambda x: x + 1}
    made = Pipeline(steps)
    assert made.run(x=1)["more"] == 2
    first = made._current()
    assert made._current() is first
    steps["twice"] = lambda more: 2 * more
    assert made.run(x=1)["twice"] == 4


def test_any_argument_name_is_usable_as_an_input() -> None:
    def use(self: int, targets: int, inputs: int, name: int) -> int:
        return self + targets + inputs + name

    assert Pipeline(use).run("use", self=1, targets=2, inputs=3, name=4)["use"] == 10


def test_repr_counts_steps_and_names_what_nothing_needs(shop: Pipeline) -> None:
    assert repr(shop) == "<Pipeline 'pipeline': 4 steps, 2 inputs, targets mean, spread>"
    assert repr(Pipeline(__name__)).startswith("<Pipeline 'test_dagkit': ")


def test_importing_dagkit_and_a_run_import_no_networkx() -> None:
    code = """
        import sys, dagkit
        assert dagkit.Pipeline({"more": lambda x: x + 1}).run(x=1)["more"] == 2
        assert "networkx" not in sys.modules
        dagkit.Pipeline({"more": lambda x: x + 1}).graph
        assert "networkx" in sys.modules
    """
    assert run_python(code) == ""


########################################################################################
### README and examples
########################################################################################

README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_all_names_exactly_the_public_ones() -> None:
    public = {
        name
        for name, value in vars(dagkit).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == "dagkit"
    }
    assert public == set(dagkit.__all__)


def lines(code: str) -> list[str]:
    return [line for line in code.splitlines() if line.strip()]


def test_every_block_of_the_readme_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    """Python blocks run from top to bottom; a text block is what the one above it printed."""
    driver = ["import contextlib, io, json, sys", "out = []"]
    expected: list[str] = []
    for kind, text in BLOCKS:
        if kind == "python":
            driver += [
                "with contextlib.redirect_stdout(io.StringIO()) as printed:",
                f"    exec(compile({text!r}, 'README.md', 'exec'))",
                "out.append(printed.getvalue())",
            ]
            expected.append("")
        elif kind == "text":
            expected[-1] = text
    driver.append("json.dump(out, sys.stdout)")
    (tmp_path / "iris.py").write_text("\n".join(driver))
    shutil.copytree(HERE / "examples", tmp_path / "examples")
    done = subprocess.run(
        [sys.executable, "-W", "error", "iris.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_the_first_program_of_the_readme_is_the_iris_example() -> None:
    code = (HERE / "examples" / "iris.py").read_text().split('"""\n\n', 1)[1]
    assert lines(code) == lines(BLOCKS[0][1])


EXAMPLES = {
    "iris.py": "96.0% of 50 flowers are told apart",
    "ml.py": "another weak one, nothing else refitted",
    "failures.py": "did you mean 'report'?",
    "caching.py": "code changed: helper centre",
    "parallel.py": "equal results: True",
    "dask_cluster.py": "2 workers, equal results: True",
    "tqdm_progress.py": "100 squares, the last one 9801",
    "study.py": "scaled: ran, cached, cached, cached, cached",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs_alone_and_prints_what_it_proves(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", f"examples/{name}"],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert EXAMPLES[name] in done.stdout


def test_every_example_is_tested() -> None:
    scripts = {path.name for path in (HERE / "examples").glob("*.py")}
    assert scripts == {*EXAMPLES, "benchmark.py"}


def test_the_flights_are_real_work_with_a_catalog_and_a_table_of_runs(tmp_path: Path) -> None:
    shutil.copytree(HERE / "examples" / "flights", tmp_path / "flights")
    outs = [
        subprocess.run(
            [sys.executable, "-W", "error", "flights/flights.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(HERE)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert "known_flights   flights, planes                  ■ ran" in outs[0]
    assert "known_flights   flights, planes                  ✓ cached" in outs[0]  # the second run
    assert "input depth 1 → 4" in outs[0]
    rows = [line.split() for line in outs[1].splitlines()[-5:]]
    assert rows[0] == ["depth", "r2", "minutes_off", "started", "seconds"]
    assert [row[:3] for row in rows[1:]] == [
        ["1", "0.7737", "13.34"],
        ["4", "0.7727", "13.44"],
    ] * 2
    made = sorted(x.relative_to(tmp_path / "flights/out") for x in tmp_path.rglob("out/*/*.*"))
    assert Path("depth-4/model.pkl") in made


def test_the_picture_in_the_readme_is_a_plan_of_the_flights(tmp_path: Path) -> None:
    """Made by dagkit; times aside it is what a plan shows now."""

    def texts(svg: str) -> list[str]:
        return [re.sub(r"\d+(\.\d)? m?s\b", "T", text) for text in drawn(svg)]

    assert "(examples/pipeline.svg)" in README
    shutil.copytree(HERE / "examples" / "flights", tmp_path / "flights")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path / "flights")!r})
        from flights import pipeline
        pipeline.run("report", depth=1)
        print(pipeline.plan("report", depth=4).show().svg)
    """
    kept = (HERE / "examples" / "pipeline.svg").read_text()
    assert texts(kept) == texts(run_python(code))


def test_the_notebook_shows_what_it_says_in_a_real_kernel(tmp_path: Path) -> None:
    import nbformat

    book = nbformat.read(HERE / "examples" / "notebook.ipynb", 4)
    sources = [cell.source for cell in book.cells if cell.cell_type == "code"]
    cells, _ = executed(tmp_path, *sources)
    # A run of more than 0.4 s is shown live, and then told in a line.
    (graph,), (live, *_), (plan,), (run, *_), (failed, *_), (history,) = [
        [re.sub(r"\d+(\.\d)? m?s\b", "T", output["data"]["text/plain"]) for output in outputs]
        for outputs in cells
    ]
    report = cells[1][-1]["data"]["text/plain"]
    assert graph.startswith("pipeline · 6 steps, 4 inputs\n  flowers")
    assert live.startswith("pipeline · 6 steps, 4 inputs · 6 ran · T\n")
    assert "right; across folds" in report
    assert plan.startswith("pipeline · 6 steps, 4 inputs · 4 fresh, 1 stale, 1 new\n")
    assert "↻ stale   code changed: accuracy" in plan
    assert "input trees 100 → 10" in run
    assert "KeyError: 'taget'   (<notebook>:1)" in failed
    assert "⊘ skipped   needs accuracy" in failed
    assert len(history.splitlines()) == 4
    for outputs in cells[:5]:
        assert "report" in pictured(outputs[0])
    red = base64.b64decode(re.findall(r'base64,([^"]+)"', cells[4][0]["data"]["text/html"])[0])
    assert b'stroke="#8c1a1f" stroke-width="2.4"' in red
    kept = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    assert all(outputs for outputs in kept)  # for who reads it on GitHub


def test_the_iris_pipeline_has_at_most_twenty_lines() -> None:
    code = (HERE / "examples" / "iris.py").read_text()
    assert len(lines(code[code.index("@step") :])) <= 20


def test_the_benchmark_prints_ratios() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import benchmark as b; b.SIZES = (20,); b.measure_run()"],
        env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'examples'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"chain +20 +\d+\.\d\d", done.stdout)


########################################################################################
### Bridges
########################################################################################

# A pipeline with everything that a scheduler must get right. Each call of a step is noted in a
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
    """Run code beside the module ``shop``; give what its last line of JSON says."""
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
        done = subprocess.run(
            [sys.executable, *flags, "script.py"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def made_once_each(folder: Path) -> bool:
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


def test_every_bridge_is_tested_and_has_at_most_forty_lines() -> None:
    files = [*(HERE / "examples" / "bridges").glob("*.py")]
    assert {file.name for file in files} == DEMOS.keys()
    assert all(len(lines(file.read_text())) <= 40 for file in files)


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
    assert made_once_each(tmp_path)


@pytest.mark.bridges
def test_a_task_of_luigi_is_complete_while_its_entry_fits(bridge: Any, tmp_path: Path) -> None:
    """Luigi asks whether a target exists; here that is whether code and inputs are as they were."""
    (tmp_path / "flowers.txt").write_text("iris")
    found = bridge("""
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
    assert found == [False, True, True, False]


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
    assert made_once_each(tmp_path)


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
        shown = [
            [run.info.status, run.data.params, run.data.metrics, run.data.tags]
            for run in (good, bad)
        ]
        print(json.dumps([*shown, record]))
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
    assert made_once_each(tmp_path)


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
    assert reason == "data report changed"
    assert values == [[2.0], [5.0]]


@pytest.mark.bridges
def test_what_the_readme_says_of_luigi_and_kedro_runs(bridge: Any) -> None:
    """The two blocks that stand beside dagkit's own, over the same file."""
    luigi_block, kedro_block = (text for kind, text in BLOCKS if kind == "py")
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
