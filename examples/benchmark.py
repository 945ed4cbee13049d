"""How much dagkit adds: ratios to a hand-written loop over the same functions.

Every ratio is the median of interleaved repeats in one process, since machines are shared and
noisy: first the loop, then dagkit, then the loop again. Peers join the table where they are
installed. Run ``python examples/benchmark.py`` for all, or name parts of it: ``run``, ``import``,
``cache``, ``parallel``, ``display``, ``records``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import os
import pickle
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import networkx as nx

import dagkit
from dagkit import Pipeline, Step

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


def chain_of_kilobytes(cache: bool) -> list[Step]:
    """Make a hundred steps with results of 1 kB each."""

    def next_one(previous: bytes) -> bytes:
        return previous[1:] + previous[:1]

    names = ["x", *[f"s{i}" for i in range(100)]]
    pairs = itertools.pairwise(names)
    return [Step(next_one, name=b, args={"previous": a}, cache=cache) for a, b in pairs]


def measure_cache() -> None:
    """Print what a warm step costs, and ratios for a large array, to numpy and bare pickle."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        file, data = Path(folder, "bare"), bytes(range(256)) * 4
        file.write_bytes(pickle.dumps(data))

        def bare() -> None:
            for _ in range(100):
                with open(file, "rb") as opened:
                    pickle.load(opened)

        def warm(pipeline: Pipeline) -> Callable[[], Any]:
            return lambda: pipeline.run("s99", x=data)["s99"]

        def fresh() -> None:
            warm(Pipeline(steps, store=folder + "/store"))()

        steps = chain_of_kilobytes(cache=True)
        kept = Pipeline(steps, store=folder + "/store")
        warm(kept)()
        for title, ours in (("in a kept pipeline", warm(kept)), ("in a new pipeline", fresh)):
            times, floor = ratio(ours, bare, 30)
            print(
                f"warm step {title}: {times * floor * 1e4:.0f} µs, "
                f"{times:.1f} times open and unpickle ({floor * 1e4:.0f} µs)"
            )
        for name, peer in cache_peers(folder).items():
            times, floor = ratio(peer(data), bare, 5)
            print(f"warm step of {name}: {times * floor * 1e4:.0f} µs, {times:.1f} times")
        steps_run = Pipeline(chain_of_kilobytes(cache=False))
        no_cache, _ = ratio(warm(steps_run), warm(steps_run), 5)
        print(f"the same steps uncached, a run over itself (the noise): {no_cache:.2f}")

        size = int(os.environ.get("BENCHMARK_MB", "1000")) * 2**17
        array, plain = np.arange(size, dtype=float), Path(folder, "plain.npy")
        # An argument that a class holds: neither its making nor its fingerprint is measured.
        holder = types.SimpleNamespace(made=array)
        sys.modules["benchmark_array"] = holder  # type: ignore[assignment]
        make_it = Step(lambda n: sys.modules["benchmark_array"].made, name="big", cache=True)
        big = Pipeline(make_it, store=folder + "/big")

        def write() -> None:
            big.store.clear()
            big.run("big", n=size)

        def write_by_hand() -> None:
            plain.unlink(missing_ok=True)
            np.save(plain, array)
            hashlib.sha256(array).hexdigest()  # type: ignore[arg-type]

        cold, seconds = ratio(write, write_by_hand, 3)
        print(f"cold write of {array.nbytes / 1e6:.0f} MB: {cold:.2f} times (np.save + sha256)")
        hit, seconds = ratio(lambda: big.run("big", n=size)["big"], lambda: np.load(plain), 5)
        print(f"verified hit of it: {hit:.2f} times np.load ({seconds:.2f} s)")


def cache_peers(folder: str) -> dict[str, Callable[[bytes], Callable[[], Any]]]:
    """Map the name of each installed peer to what makes a warm chain of a hundred steps."""
    found: dict[str, Callable[[bytes], Callable[[], Any]]] = {}
    with contextlib.suppress(ImportError):
        import joblib

        memory = joblib.Memory(folder + "/joblib", verbose=0)

        @memory.cache  # type: ignore[untyped-decorator]
        def next_one(previous: bytes, number: int) -> bytes:
            return previous[1:] + previous[:1]

        def joblib_chain(data: bytes) -> Callable[[], Any]:
            def run() -> bytes:
                value = data
                for number in range(100):
                    value = next_one(value, number)
                return value

            run()
            return run

        found["joblib"] = joblib_chain
    with contextlib.suppress(ImportError):
        import diskcache

        cache = diskcache.Cache(folder + "/diskcache")

        def diskcache_chain(data: bytes) -> Callable[[], Any]:
            for number in range(100):
                cache[number] = data
            return lambda: [cache[number] for number in range(100)]

        found["diskcache"] = diskcache_chain
    return found


def pool_loop(functions: Functions, needs: list[tuple[str, ...]], pool: Any) -> dict[str, Any]:
    """Run functions on a pool as soon as what they need is there: what one would write by hand."""
    by_name = {function.__name__: function for function in functions}
    values: dict[str, Any] = {}
    waiting = {f.__name__: len(n) for f, n in zip(functions, needs, strict=True)}
    wants = {f.__name__: n for f, n in zip(functions, needs, strict=True)}
    dependents: dict[str, list[str]] = {name: [] for name in waiting}
    for name, names in wants.items():
        for need in names:
            dependents[need].append(name)
    running: dict[Any, str] = {}
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def submit(name: str) -> None:
        future = pool.submit(by_name[name], *[values[need] for need in wants[name]])
        running[future] = name
        future.add_done_callback(done.put)

    for name, count in waiting.items():
        if count == 0:
            submit(name)
    while running:
        future = done.get()
        name = running.pop(future)
        values[name] = future.result()
        for dependent in dependents[name]:
            waiting[dependent] -= 1
            if waiting[dependent] == 0:
                submit(dependent)
    return values


def nap(previous: int = 0) -> int:
    """Wait ten milliseconds."""
    time.sleep(0.01)
    return 1


def crunch(number: int) -> int:
    """Keep a core busy for some 200 ms."""
    total = 0
    for i in range(2_500_000):
        total += i ^ number
    return total


def grow(array: Any) -> Any:
    """Give an array of 10 MB."""
    return array + 1


def identity(x: int) -> int:
    """Give back what it gets."""
    return x


def measure_parallel() -> None:
    """Print ratios to bare pools: short steps, waiting, crunching, a long map, large arrays."""
    import numpy as np

    with ThreadPoolExecutor(8) as pool:
        naps = [Step(nap, name=f"n{i}", args={"previous": "x"}) for i in range(200)]
        waiting = Pipeline(naps, executor=pool)
        bare, _ = ratio(lambda: waiting.run(x=0), lambda: [*pool.map(nap, range(200))], 5)
        print(f"200 naps of 10 ms on 8 threads: {bare:.3f} times the bare pool")
        functions = layered(10_000)
        needs = [tuple(inspect.signature(f).parameters) for f in functions]
        wide = Pipeline(functions, executor=pool)
        bare, seconds = ratio(
            lambda: wide.run("s9999"), lambda: pool_loop(functions, needs, pool), 5
        )
        print(
            f"10,000 steps that return at once: {bare:.2f} times a pool loop by hand "
            f"({seconds * 100:.0f} µs a step)"
        )
        mapped = Pipeline(Step(identity, map="x"), executor=pool)
        times = []
        for size in (1_000, 10_000, 100_000):
            start = time.perf_counter()
            mapped.run("identity", x=range(size))
            times.append((time.perf_counter() - start) / size * 1e6)
        print(
            "a map over 1,000, 10,000, 100,000 elements:", *[f"{t:.0f}" for t in times], "µs each"
        )
    with ProcessPoolExecutor(2) as processes, tempfile.TemporaryDirectory() as folder:
        crunching = Pipeline(Step(crunch, map="number"), executor=processes)
        bare, _ = ratio(
            lambda: crunching.run(number=range(16)), lambda: [*processes.map(crunch, range(16))], 3
        )
        print(f"16 steps of some 200 ms on 2 processes: {bare:.3f} times the bare pool")
        array = np.ones(10_000_000 // 8)

        def by_hand() -> Any:
            value = array
            for _ in range(11):
                value = processes.submit(grow, value).result()
            return value

        def chain_of(cache: bool) -> Pipeline:
            names = ["x", *[f"a{i}" for i in range(11)]]
            pairs = itertools.pairwise(names)
            steps = [Step(grow, name=b, args={"array": a}, cache=cache) for a, b in pairs]
            return Pipeline(steps, executor=processes, store=folder)

        plain, cached = chain_of(False), chain_of(True)

        def cold() -> Any:
            cached.store.clear()
            return cached.run("a10", x=array)["a10"]

        bare, _ = ratio(lambda: plain.run("a10", x=array)["a10"], by_hand, 5)
        kept, _ = ratio(cold, by_hand, 5)
        print(
            f"11 steps over 10 MB on processes: {bare:.2f} times by hand, cached {kept:.2f} times"
        )


def measure_display() -> None:
    """Print the milliseconds of one picture with its table, layout included, and a ratio."""
    for size in (10, 50, 100, 200):
        functions = layered(size)
        shown = Pipeline(functions).show()

        def draw(shown: Any = shown) -> None:
            dagkit._laid_out.cache_clear()
            assert "<img" in shown.html

        times, seconds = ratio(draw, functools.partial(by_hand, functions), 9)
        print(
            f"a picture of {size:3} steps: {times * seconds * 1000:5.1f} ms, "
            f"{times:4.1f} times making the networkx graph by hand"
        )


def measure_records() -> None:
    """Print what a line in the records costs a run of one reused step."""
    with tempfile.TemporaryDirectory() as folder:
        made = Pipeline(Step(identity, cache=True), store=folder)
        made.run(x=1)
        plain = Pipeline({"identity": identity})
        recorded, seconds = ratio(lambda: made.run(x=1), lambda: plain.run(x=1), 99)
        print(
            f"a run of one reused step, recorded: {recorded * seconds * 1e6:.0f} us, "
            f"{recorded:.1f} times a plain run of it"
        )


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
    parts = {
        "run": measure_run,
        "import": measure_import,
        "cache": measure_cache,
        "parallel": measure_parallel,
        "display": measure_display,
        "records": measure_records,
    }
    for part in sys.argv[1:] or parts:
        parts[part]()
