"""How much dagkit adds: ratios to a hand-written loop over the same functions.

Every ratio is the median of interleaved repeats in one process, since machines are shared and
noisy: first the loop, then dagkit, then the loop again. Peers join the table where they are
installed. Run ``python examples/benchmark.py`` for all, or name parts of it: ``run``, ``import``.
"""

from __future__ import annotations

import inspect
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import networkx as nx

from dagkit import Pipeline

Functions = list[Callable[..., Any]]
SIZES = (100, 10_000, 100_000)


def make(name: str, needs: list[str]) -> Callable[..., Any]:
    """Make a function of that name and those arguments that returns at once."""
    scope: dict[str, Any] = {}
    exec(f"def {name}({', '.join(needs)}): return 1", scope)
    function: Callable[..., Any] = scope[name]
    return function


def chain(size: int) -> Functions:
    return [make(f"s{i}", [f"s{i - 1}"] if i else []) for i in range(size)]


def layered(size: int) -> Functions:
    """Layers of ten steps, each with one to three arguments from the layer above."""
    draw = random.Random(0)
    functions = []
    for i in range(size):
        above = [f"s{j}" for j in range(i - i % 10 - 10, i - i % 10) if j >= 0]
        functions.append(make(f"s{i}", draw.sample(above, draw.randint(1, 3)) if above else []))
    return functions


def fan_in(size: int) -> Functions:
    """One step that takes the values of all others."""
    names = [f"s{i}" for i in range(size - 1)]
    return [*[make(name, []) for name in names], make("last", names)]


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the median ratio of the times of two calls, and the median seconds of the second."""
    ratios, seconds = [], []
    for _ in range(repeats):
        spans = []
        for call in (theirs, ours, theirs):
            start = time.perf_counter()
            call()
            spans.append(time.perf_counter() - start)
        ratios.append(2 * spans[1] / (spans[0] + spans[2]))
        seconds.append((spans[0] + spans[2]) / 2)
    return statistics.median(ratios), statistics.median(seconds)


def loop(functions: Functions, needs: list[tuple[str, ...]]) -> dict[str, Any]:
    """Run functions that are already in order: what one would write by hand."""
    values: dict[str, Any] = {}
    for function, names in zip(functions, needs, strict=True):
        values[function.__name__] = function(**{name: values[name] for name in names})
    return values


def by_hand(functions: Functions) -> nx.DiGraph[str]:
    """Make the networkx graph as a first draft would."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for function in functions:
        graph.add_node(function.__name__, function=function)
        for name in inspect.signature(function).parameters:
            graph.add_edge(name, function.__name__)
    return graph


def build(functions: Functions) -> None:
    """All that dagkit does before the first step can run."""
    Pipeline(functions).inputs  # noqa: B018


def peers(functions: Functions) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Map the name of each installed peer to (build, run) of the same functions."""
    found: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    last = functions[-1].__name__
    try:
        import pipefunc
    except ImportError:
        pass
    else:

        def pipefunc_build() -> Any:
            parts = [pipefunc.PipeFunc(f, output_name=f.__name__) for f in functions]
            return pipefunc.Pipeline(parts)

        made = pipefunc_build()
        found["pipefunc"] = pipefunc_build, lambda: made(last)
    try:
        from dask.local import get_sync
    except ImportError:
        pass
    else:
        graph = {f.__name__: (f, *inspect.signature(f).parameters) for f in functions}
        found["dask (sync)"] = (lambda: dict(graph)), lambda: get_sync(graph, last)
    try:
        from hamilton import ad_hoc_utils, driver
    except ImportError:
        pass
    else:
        for function in functions:
            function.__annotations__ = dict.fromkeys(inspect.signature(function).parameters, int)
            function.__annotations__["return"] = int
        module = ad_hoc_utils.create_temporary_module(*functions, module_name="benchmark_steps")

        def hamilton_build() -> Any:
            return driver.Builder().with_modules(module).build()

        app = hamilton_build()
        found["hamilton"] = hamilton_build, lambda: app.execute([last])
    return found


def measure_run() -> None:
    """Print ratios of run and build for shapes and sizes, and those of the peers."""
    print("ratio to a loop with dicts of arguments (run), to a graph made by hand (build)")
    print(f"{'graph':10} {'steps':>8} {'run':>8} {'µs/step':>9} {'build':>8} {'µs/step':>9}")
    for shape in (chain, layered, fan_in):
        for size in SIZES:
            functions = shape(size)
            needs = [tuple(inspect.signature(f).parameters) for f in functions]
            pipeline = Pipeline(functions)
            last = functions[-1].__name__
            repeats = max(5, min(200, 200_000 // size))
            if shape is fan_in:
                # CPython is quadratic in many keyword arguments: by position is the fair loop.
                def ours(needs: Any = needs, functions: Functions = functions) -> Any:
                    values: dict[str, Any] = {}
                    for function, names in zip(functions, needs, strict=True):
                        values[function.__name__] = function(*[values[name] for name in names])
            else:

                def ours(needs: Any = needs, functions: Functions = functions) -> Any:
                    return loop(functions, needs)

            run, step = ratio(lambda: pipeline.run(last), ours, repeats)  # noqa: B023
            made, hand = ratio(
                lambda: build(functions),  # noqa: B023
                lambda: by_hand(functions),  # noqa: B023
                max(3, repeats // 10),
            )
            print(
                f"{shape.__name__:10} {size:8,} {run:8.2f} {run * step / size * 1e6:9.2f} "
                f"{made:8.2f} {made * hand / size * 1e6:9.2f}"
            )
    functions = chain(100)
    needs = [tuple(inspect.signature(f).parameters) for f in functions]
    for name, (make_it, run_it) in peers(functions).items():
        run, _ = ratio(run_it, lambda: loop(functions, needs), 5)
        made, _ = ratio(make_it, lambda: by_hand(functions), 3)
        print(f"{name:10.10} {100:8,} {run:8.1f} {'':9} {made:8.2f}")


def measure_import() -> None:
    """Print what ``import dagkit`` adds to starting a bare interpreter, in milliseconds."""

    def start(code: str) -> Callable[[], Any]:
        # With compiled files, as they are after an installation.
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, env=env)

    bare, ours = start("pass"), start("import dagkit")
    added, seconds = ratio(ours, bare, 15)
    print(f"import dagkit adds {(added - 1) * seconds * 1000:.0f} ms to {seconds * 1000:.0f} ms")


if __name__ == "__main__":
    parts = {"run": measure_run, "import": measure_import}
    for part in sys.argv[1:] or parts:
        parts[part]()
