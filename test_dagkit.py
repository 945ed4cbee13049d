"""The specification of dagkit, room by room in the order of the module."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, assert_type

import hypothesis
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

import dagkit
from dagkit import (
    CycleError,
    DagkitError,
    DagkitWarning,
    DefaultsError,
    DuplicateNameError,
    Event,
    MissingInputError,
    NoValueError,
    Pipeline,
    ResultError,
    Run,
    SensorTimeoutError,
    Skip,
    SourceError,
    Step,
    StepError,
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
### Plan
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
    with pytest.raises(UnknownNameError, match="cannot be a target of run"):
        shop.run(total)  # type: ignore[arg-type]


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
    assert record["inputs"] == {"prices": "[1]"}
    assert record["steps"]["total"]["status"] == "ran"
    assert (record["status"], record["dagkit"]) == ("ran", dagkit.__version__)


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
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as own,
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


squares = Step(square, map="item")
negatives = Step(negated, map="square")


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
    run = Pipeline(squares, executor=executor).run(item=[3, 1, 2])
    assert run["square"] == [9, 1, 4]


def test_a_map_after_a_map_and_a_plain_step(executor: Any) -> None:
    run = Pipeline(squares, negatives, summed, executor=executor).run("summed", item=range(30))
    assert run["summed"] == -sum(i * i for i in range(30))


def test_an_empty_map_gives_an_empty_list(executor: Any) -> None:
    run = Pipeline(squares, negatives, summed, executor=executor).run(item=[])
    assert (run["square"], run["negated"], run["summed"]) == ([], [], 0)


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
        Pipeline(squares).run(item="abc")
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


def test_failures_of_a_map_name_index_and_element(executor: Any) -> None:
    with pytest.raises(ValueError, match="not three") as caught:
        Pipeline(Step(picky, map="item"), executor=executor).run(item=[1, 2, 3, 4])
    assert caught.value.__notes__ == [f"in step 'picky', element 2 at {at(picky)}, with item=3"]


def test_a_failed_map_skips_what_follows_it_element_by_element(executor: Any) -> None:
    steps = [Step(picky, map="item"), Step(square, args={"item": "picky"}, map="item")]
    run = Pipeline(steps, executor=executor, on_error="continue").run(item=[1, 2, 3, 4])
    assert {n: s.status for n, s in run.steps.items()} == {"picky": "failed", "square": "skipped"}
    assert run.steps["square"].reason == "needs picky"


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
        run = Pipeline(squares, executor=pool).run(item=range(3000))
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
        "import sys, time\n"
        "from concurrent.futures import *\n"
        "from dagkit import Pipeline, Step\n"
        "def slow(item):\n"
        "    print('ready', flush=True)\n"
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
        assert time.monotonic() - began < 10
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
    assert seen == [
        ("run started", "", ""),
        ("step started", "double", ""),
        ("step finished", "double", "ran"),
        ("step started", "plus", ""),
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


@hypothesis.given(dags(), st.randoms(use_true_random=False))
@hypothesis.settings(deadline=None, max_examples=30)
def test_random_dags_with_failures_skips_and_retries_agree_with_the_sequential_run(
    dag: list[tuple[str, list[str]]], draw: random.Random
) -> None:
    fate = {name: draw.choice(["ran", "ran", "ran", "ran", "failed", "skipped"]) for name, _ in dag}

    def make(name: str, needs: list[str]) -> Step:
        tried = []

        def body(**values: int) -> int:
            tried.append(1)
            if fate[name] == "failed" or len(tried) == 1:
                raise ValueError(name)
            if fate[name] == "skipped":
                raise Skip(name)
            return 1 + sum(values.values())

        args = {need: need for need in needs} or None
        return Step(body if needs else lambda: body(), name=name, args=args, retries=1)

    def outcome(executor: Any) -> Any:
        steps = [make(name, needs) for name, needs in dag]
        run = Pipeline(steps, executor=executor, on_error="continue").run()
        return dict(run), {n: (s.status, s.reason) for n, s in sorted(run.steps.items())}

    with ThreadPoolExecutor(3) as pool:
        assert outcome(pool) == outcome(None)


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
    assert repr(Pipeline(__name__)).startswith("<Pipeline 'test_dagkit': 5 steps, 3 inputs")


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
    (tmp_path / "blocks.py").write_text("\n".join(driver))
    shutil.copytree(HERE / "examples", tmp_path / "examples")
    done = subprocess.run(
        [sys.executable, "-W", "error", "blocks.py"],
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
