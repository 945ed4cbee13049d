"""Measure how much dagkit adds, and compare it with the bounds that it promises to keep.

A ratio compares dagkit with what one would write by hand over the same functions. Machines are
shared and noisy, so both run in one process, in turns, and the ratio is a median: first the loop by
hand, then dagkit, then the loop again. Other libraries join the table where they are installed.

``python examples/benchmark.py`` measures all parts, ``python examples/benchmark.py run cache`` only
these two. At the end comes the table in Markdown.
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
import textwrap
import time
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx

from dagkit import Pipeline, Run, Step

Functions = list[Callable[..., Any]]
SIZES = (100, 10_000, 100_000)


########################################################################################
### The table
########################################################################################


@dataclass(frozen=True)
class Row:
    """A figure of the table; a bound of None means that it is only for comparison."""

    title: str
    figure: float
    unit: str
    bound: float | None

    def __str__(self) -> str:
        return f"{self.title:74} {self.format_figure():>10}   {self.format_bound()}"

    def format_figure(self) -> str:
        """Write the figure with its unit."""
        digits = 2 if self.figure < 10 else 0
        return f"{self.figure:,.{digits}f} {self.unit}"

    def format_bound(self) -> str:
        """Write the bound, and whether it is met."""
        if self.bound is None:
            return ""
        verdict = "met" if self.figure <= self.bound else "**missed**"
        return f"≤ {self.bound:g} {self.unit}, {verdict}"


ROWS: list[Row] = []


def add_row(title: str, figure: float, unit: str = "×", bound: float | None = None) -> None:
    """Add a figure to the table, and print it at once."""
    row = Row(title, figure, unit, bound)
    ROWS.append(row)
    print(row, flush=True)


def print_table() -> None:
    """Print all figures as a table in Markdown."""
    print("\n| what | measured | bound |\n| --- | ---: | --- |")
    for row in ROWS:
        print(f"| {row.title} | {row.format_figure()} | {row.format_bound()} |")
    missed = [row for row in ROWS if row.bound is not None and row.figure > row.bound]
    print(f"\n{len(missed)} of {sum(row.bound is not None for row in ROWS)} bounds missed")


def measure_seconds(call: Callable[[], Any], count: int = 1) -> float:
    """Return how long a call takes, on average of so many calls."""
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    seconds = (time.perf_counter() - start) / count
    del result  # freeing it is not measured
    return seconds


def compare(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    repeats: int,
    *,
    count: int = 1,
    prepare: Callable[[], Any] | None = None,
) -> tuple[float, float]:
    """Return the median ratio of the times of two calls, and the median seconds of the first.

    What ``prepare`` does before each of our calls is not measured. Calls that take microseconds
    are made ``count`` times in a row.
    """
    ratios = []
    seconds = []
    for _ in range(repeats):
        before = measure_seconds(theirs, count)
        if prepare is not None:
            prepare()
        our_seconds = measure_seconds(ours, count)
        after = measure_seconds(theirs, count)
        ratios.append(2 * our_seconds / (before + after))
        seconds.append(our_seconds)
    return statistics.median(ratios), statistics.median(seconds)


def measure_in_new_process(script: str, repeats: int = 9) -> float:
    """Return the median of the seconds that a script prints, with compiled files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "script.py")
        path.write_text(textwrap.dedent(script))
        seconds = []
        for _ in range(repeats + 1):
            command = [sys.executable, str(path)]
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds.append(float(process.stdout))
    return statistics.median(seconds[1:])  # the first process has computed and stored the results


########################################################################################
### Functions to run
########################################################################################


def make_function(name: str, needs: list[str]) -> Callable[..., Any]:
    """Make a function of that name and those arguments that returns at once."""
    scope: dict[str, Any] = {}
    exec(f"def {name}({', '.join(needs)}): return 1", scope)
    function: Callable[..., Any] = scope[name]
    return function


def make_chain(size: int) -> Functions:
    """Make functions of which each takes the value of the one before."""
    functions = [make_function("s0", [])]
    for i in range(1, size):
        functions.append(make_function(f"s{i}", [f"s{i - 1}"]))
    return functions


def make_layers(size: int) -> Functions:
    """Make layers of ten functions; each takes one to three values of the layer above."""
    generator = random.Random(0)
    functions = []
    for i in range(size):
        first = i - i % 10
        above = [f"s{j}" for j in range(first - 10, first) if j >= 0]
        needs = generator.sample(above, generator.randint(1, 3)) if above else []
        functions.append(make_function(f"s{i}", needs))
    return functions


def make_fan_in(size: int) -> Functions:
    """Make a function that takes the values of all others."""
    names = [f"s{i}" for i in range(size - 1)]
    return [*make_independent(size - 1), make_function("last", names)]


def make_independent(size: int) -> Functions:
    """Make functions that take nothing."""
    return [make_function(f"s{i}", []) for i in range(size)]


def list_needs(functions: Functions) -> list[tuple[str, ...]]:
    """List the names of the arguments of each function."""
    return [tuple(inspect.signature(function).parameters) for function in functions]


def run_loop(functions: Functions, needs: list[tuple[str, ...]]) -> dict[str, Any]:
    """Run functions that are already in order: what one would write by hand."""
    values: dict[str, Any] = {}
    for function, names in zip(functions, needs, strict=True):
        values[function.__name__] = function(**{name: values[name] for name in names})
    return values


def run_loop_by_position(functions: Functions, needs: list[tuple[str, ...]]) -> dict[str, Any]:
    """Do the same without keyword arguments: CPython is quadratic in their number."""
    values: dict[str, Any] = {}
    for function, names in zip(functions, needs, strict=True):
        values[function.__name__] = function(*[values[name] for name in names])
    return values


def build_by_hand(functions: Functions) -> nx.DiGraph[str]:
    """Make the networkx graph as a first draft would."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for function in functions:
        graph.add_node(function.__name__, function=function)
        for name in inspect.signature(function).parameters:
            graph.add_edge(name, function.__name__)
    return graph


def build(functions: Functions) -> Pipeline:
    """Do all that dagkit does before the first run."""
    pipeline = Pipeline(functions)
    pipeline.inputs  # noqa: B018
    return pipeline


########################################################################################
### Plain runs
########################################################################################


def measure_run() -> None:
    """Compare runs and builds of several shapes and sizes with a loop and a graph by hand."""
    for make in (make_chain, make_layers, make_fan_in):
        for size in SIZES:
            measure_shape(make, size)
    functions = make_chain(100)
    needs = list_needs(functions)
    loop = functools.partial(run_loop, functions, needs)
    for name, peer_build, peer_run in make_run_peers(functions):
        run, _ = compare(peer_run, loop, 5)
        add_row(f"{name}: run, chain of 100", run)
        built, _ = compare(peer_build, functools.partial(build_by_hand, functions), 3)
        add_row(f"{name}: build, chain of 100", built)


def measure_shape(make: Callable[[int], Functions], size: int) -> None:
    """Add the rows of one shape and size."""
    functions = make(size)
    last = functions[-1].__name__
    run_by_hand = run_loop_by_position if make is make_fan_in else run_loop
    loop = functools.partial(run_by_hand, functions, list_needs(functions))
    title = f"{make.__name__.removeprefix('make_')} of {size:,}"
    repeats = max(5, min(200, 200_000 // size))
    pipeline = Pipeline(functions)
    run, _ = compare(lambda: pipeline.run(last), loop, repeats)
    add_row(f"run over the loop by hand, {title}", run, bound=3)
    few = max(3, repeats // 10)
    built, _ = compare(lambda: build(functions), lambda: build_by_hand(functions), few)
    add_row(f"build over the networkx graph by hand, {title}", built, bound=1.2)
    pipelines = [pipeline]

    def build_again() -> None:
        pipelines[0] = build(functions)

    first, _ = compare(lambda: pipelines[0].run(last), loop, few, prepare=build_again)
    add_row(f"first run after the build over the loop by hand, {title}", first, bound=10)


def make_run_peers(
    functions: Functions,
) -> list[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """List name, build and run of the same functions in each installed library."""
    peers: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = []
    last = functions[-1].__name__
    with contextlib.suppress(ImportError):
        import pipefunc

        def build_pipefunc() -> Any:
            parts = [pipefunc.PipeFunc(f, output_name=f.__name__) for f in functions]
            return pipefunc.Pipeline(parts)

        pipeline = build_pipefunc()
        peers.append(("pipefunc", build_pipefunc, lambda: pipeline(last)))
    with contextlib.suppress(ImportError):
        from dask.local import get_sync

        graph = {f.__name__: (f, *inspect.signature(f).parameters) for f in functions}
        peers.append(("Dask (sync)", lambda: dict(graph), lambda: get_sync(graph, last)))
    with contextlib.suppress(ImportError):
        from hamilton import ad_hoc_utils, driver

        for function, needs in zip(functions, list_needs(functions), strict=True):
            function.__annotations__ = dict.fromkeys([*needs, "return"], int)
        module = ad_hoc_utils.create_temporary_module(*functions, module_name="benchmark_steps")

        def build_hamilton() -> Any:
            return driver.Builder().with_modules(module).build()

        app = build_hamilton()
        peers.append(("Hamilton", build_hamilton, lambda: app.execute([last])))
    return peers


def measure_import() -> None:
    """Measure what ``import dagkit`` adds to starting an interpreter."""

    def start(code: str) -> None:
        # With compiled files, as they are after an installation.
        environment = {**os.environ}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)

    bare = functools.partial(start, "pass")
    ratio, seconds = compare(functools.partial(start, "import dagkit"), bare, 15)
    add_row("import dagkit, over a bare interpreter", (seconds - seconds / ratio) * 1e3, "ms", 40)


########################################################################################
### Cached steps
########################################################################################

KILOBYTE = bytes(range(256)) * 4


def rotate(previous: bytes) -> bytes:
    """Move the first byte to the end."""
    return previous[1:] + previous[:1]


def make_kilobyte_steps() -> list[Step]:
    """Make a chain of a hundred cached steps with results of 1 kB each."""
    names = ["x", *[f"s{i}" for i in range(100)]]
    steps = []
    for previous, name in itertools.pairwise(names):
        steps.append(Step(rotate, name=name, args={"previous": previous}, cache=True))
    return steps


def identity(x: int) -> int:
    """Return what it gets."""
    return x


def check_reused(run: Run) -> None:
    """Make sure that a miss is not measured as a hit."""
    statuses = {state.status for state in run.steps.values()}
    assert statuses == {"cached"}, statuses


def measure_cache() -> None:
    """Measure hits and misses of small values, each beside reading or writing a bare pickle."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "bare")
        file.write_bytes(pickle.dumps(KILOBYTE))

        def read_bare() -> None:
            for _ in range(100):
                with open(file, "rb") as stream:
                    pickle.load(stream)

        _, seconds = compare(read_bare, read_bare, 9)
        add_row("open and unpickle 1 kB by hand", seconds * 1e4, "µs")

        single = Pipeline(Step(identity, cache=True), store=f"{folder}/single")
        single.run(x=1)
        check_reused(single.run(x=1))
        _, seconds = compare(lambda: single.run(x=1)["identity"], read_bare, 15, count=20)
        add_row("one kept hit with its record", seconds * 1e6, "µs", 100)

        steps = make_kilobyte_steps()
        kept = Pipeline(steps, store=f"{folder}/chain")
        kept.run("s99", x=KILOBYTE)
        check_reused(kept.run("s99", x=KILOBYTE))
        _, seconds = compare(lambda: kept.run("s99", x=KILOBYTE)["s99"], read_bare, 30)
        add_row("kept hits in a chain of 100, a step", seconds * 1e4, "µs", 30)

        def run_new() -> None:
            Pipeline(steps, store=f"{folder}/chain").run("s99", x=KILOBYTE)["s99"]

        _, seconds = compare(run_new, read_bare, 30)
        add_row("hits of a new pipeline in a chain of 100, a step", seconds * 1e4, "µs")

        cold = [Pipeline(steps, store=f"{folder}/cold{i}") for i in range(9)]
        _, seconds = compare(lambda: cold.pop().run("s99", x=KILOBYTE), read_bare, 9)
        add_row("cold chain of 100 results of 1 kB, a step", seconds * 1e4, "µs", 400)

        mapped = Step(identity, map="x", cache=True)
        maps = [Pipeline(mapped, store=f"{folder}/map{i}") for i in range(5)]
        _, seconds = compare(lambda: maps.pop().run(x=range(1000)), read_bare, 5)
        add_row("cached map of 1,000, cold, an element", seconds * 1e3, "µs", 400)

        for name, make in make_cache_peers(folder).items():
            chains = [make() for _ in range(5)]
            seconds = statistics.median(measure_seconds(chain) for chain in chains)
            add_row(f"{name}: cold chain of 100, a step", seconds * 1e4, "µs")
            _, seconds = compare(chains[0], read_bare, 9)
            add_row(f"{name}: hits in a chain of 100, a step", seconds * 1e4, "µs")
        measure_new_processes(folder)


def measure_new_processes(folder: str) -> None:
    """Measure the first run of a process whose results are all stored; the import is aside."""
    script = f"""
        import time
        from dagkit import Pipeline, step
        start = time.perf_counter()

        @step(cache=True)
        def double(x):
            return 2 * x

        Pipeline(double, store={folder + "/first"!r}).run(x=1)["double"]
        print(time.perf_counter() - start)
    """
    seconds = measure_in_new_process(script)
    add_row("first hit of a one-step script in a new process", seconds * 1e3, "ms", 5)
    script = f"""
        import sys, time
        from dagkit import Pipeline
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from {Path(__file__).stem} import KILOBYTE, make_kilobyte_steps
        steps = make_kilobyte_steps()
        start = time.perf_counter()
        Pipeline(steps, store={folder + "/first"!r}).run("s99", x=KILOBYTE)["s99"]
        print(time.perf_counter() - start)
    """
    seconds = measure_in_new_process(script)
    add_row("hits of a new process in a chain of 100, a step", seconds * 1e4, "µs", 150)
    script = f"""
        import time
        import joblib
        start = time.perf_counter()

        @joblib.Memory({folder + "/first"!r}, verbose=0).cache
        def double(x):
            return 2 * x

        double(1)
        print(time.perf_counter() - start)
    """
    with contextlib.suppress(subprocess.CalledProcessError):  # joblib is not installed
        seconds = measure_in_new_process(script)
        add_row("joblib: first hit of a one-step script in a new process", seconds * 1e3, "ms")


def make_cache_peers(folder: str) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Map the name of each installed library to what makes a chain of a hundred calls to cache."""
    makers: dict[str, Callable[[], Callable[[], Any]]] = {}
    numbers = itertools.count()
    with contextlib.suppress(ImportError):
        import joblib

        def make_joblib_chain() -> Callable[[], Any]:
            memory = joblib.Memory(f"{folder}/joblib{next(numbers)}", verbose=0)
            return make_chain_of_calls(memory.cache(rotate_with_number))

        makers["joblib"] = make_joblib_chain
    with contextlib.suppress(ImportError):
        import checkpointer

        def make_checkpointer_chain() -> Callable[[], Any]:
            path = Path(folder, f"checkpointer{next(numbers)}")
            decorate = checkpointer.checkpoint(directory=path, verbosity=0)
            return make_chain_of_calls(decorate(rotate_with_number))

        makers["checkpointer"] = make_checkpointer_chain
    with contextlib.suppress(ImportError):
        import diskcache

        def make_diskcache_chain() -> Callable[[], Any]:
            cache = diskcache.Cache(f"{folder}/diskcache{next(numbers)}")
            return make_chain_of_calls(cache.memoize()(rotate_with_number))

        makers["diskcache (code unchecked)"] = make_diskcache_chain
    return makers


def rotate_with_number(previous: bytes, number: int) -> bytes:
    """Move the first byte to the end; the number makes each call of a chain another one."""
    return previous[1:] + previous[:1]


def make_chain_of_calls(function: Callable[[bytes, int], bytes]) -> Callable[[], bytes]:
    """Make a function that calls another one a hundred times, with the result of the last call."""

    def run() -> bytes:
        value = KILOBYTE
        for number in range(100):
            value = function(value, number)
        return value

    return run


def measure_array() -> None:
    """Compare storing and loading a large array with numpy and sha256."""
    import numpy as np

    size = int(os.environ.get("BENCHMARK_MB", "512")) * 2**17
    array = np.arange(size, dtype=float)
    # A step that finds the array ready: neither making it nor its fingerprint as a part of the
    # code is measured. In a scope of its own, since code that looks into sys.modules may use
    # everything that is in its module.
    sys.modules["benchmark_array"] = types.SimpleNamespace(array=array)  # type: ignore[assignment]
    scope: dict[str, Any] = {"sys": sys}
    exec("def big(n): return sys.modules['benchmark_array'].array", scope)
    make_array = Step(scope["big"], cache=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "plain.npy")
        pipeline = Pipeline(make_array, store=f"{folder}/store")

        def write() -> None:
            pipeline.store.clear()
            pipeline.run("big", n=size)

        def write_by_hand() -> None:
            file.unlink(missing_ok=True)
            np.save(file, array)
            hashlib.sha256(array).hexdigest()  # type: ignore[arg-type]

        title = f"of {array.nbytes / 2**20:.0f} MB"
        ratio, _ = compare(write, write_by_hand, 5)
        add_row(f"first write {title} over np.save and sha256", ratio, bound=1.4)
        check_reused(pipeline.run("big", n=size))
        load_by_hand = functools.partial(np.load, file)
        ratio, _ = compare(lambda: pipeline.run("big", n=size)["big"], load_by_hand, 5)
        add_row(f"verified hit {title} over np.load", ratio, bound=1.5)


########################################################################################
### Executors
########################################################################################


def run_pool_loop(functions: Functions, needs: list[tuple[str, ...]], pool: Any) -> dict[str, Any]:
    """Run functions on a pool as soon as their arguments are there, as one would by hand."""
    function_by_name = {function.__name__: function for function in functions}
    needs_by_name = dict(zip(function_by_name, needs, strict=True))
    dependents: dict[str, list[str]] = {name: [] for name in function_by_name}
    missing_count = {}
    for name, needed_names in needs_by_name.items():
        missing_count[name] = len(needed_names)
        for needed_name in needed_names:
            dependents[needed_name].append(name)
    values: dict[str, Any] = {}
    running: dict[Any, str] = {}
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def submit(name: str) -> None:
        arguments = [values[needed_name] for needed_name in needs_by_name[name]]
        future = pool.submit(function_by_name[name], *arguments)
        running[future] = name
        future.add_done_callback(done.put)

    for name, count in missing_count.items():
        if count == 0:
            submit(name)
    while running:
        future = done.get()
        name = running.pop(future)
        values[name] = future.result()
        for dependent in dependents[name]:
            missing_count[dependent] -= 1
            if missing_count[dependent] == 0:
                submit(dependent)
    return values


def submit_all(functions: Functions, pool: Any) -> list[Any]:
    """Submit functions without arguments, and wait for all of them."""
    futures = [pool.submit(function) for function in functions]
    return [future.result() for future in futures]


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
    """Return an array of the same size."""
    return array + 1


def measure_parallel() -> None:
    """Compare with bare pools: short steps, waiting, a long map, crunching, large arrays."""
    with ThreadPoolExecutor(8) as pool:
        measure_threads(pool)
    with ProcessPoolExecutor(2) as processes:
        crunching = Pipeline(Step(crunch, map="number"), executor=processes)
        ratio, _ = compare(
            lambda: crunching.run(number=range(16)), lambda: [*processes.map(crunch, range(16))], 3
        )
        add_row("16 steps of some 200 ms on 2 processes over the bare pool", ratio)
        measure_large_arguments(processes)


def measure_threads(pool: ThreadPoolExecutor) -> None:
    """Add the rows of a pool of threads."""
    naps = [Step(nap, name=f"n{i}", args={"previous": "x"}) for i in range(200)]
    napping = Pipeline(naps, executor=pool)
    ratio, _ = compare(lambda: napping.run(x=0), lambda: [*pool.map(nap, range(200))], 5)
    add_row("200 naps of 10 ms on 8 threads over the bare pool", ratio, bound=1.05)

    functions = make_independent(10_000)
    independent = Pipeline(functions, executor=pool)
    ratio, _ = compare(independent.run, lambda: submit_all(functions, pool), 5)
    add_row("10,000 independent steps on threads over submitting all by hand", ratio, bound=1.5)

    for make in (make_chain, make_layers):
        functions = make(10_000)
        pipeline = Pipeline(functions, executor=pool)
        by_hand = functools.partial(run_pool_loop, functions, list_needs(functions), pool)
        ratio, _ = compare(functools.partial(pipeline.run, "s9999"), by_hand, 5)
        title = make.__name__.removeprefix("make_")
        add_row(f"{title} of 10,000 on threads over a pool loop by hand", ratio, bound=3.5)

    mapped = Pipeline(Step(identity, map="x"), executor=pool)
    for size in (1_000, 10_000, 100_000):
        seconds = measure_seconds(functools.partial(mapped.run, "identity", x=range(size)))
        add_row(f"map of {size:,} on threads, an element", seconds / size * 1e6, "µs")


def measure_large_arguments(processes: ProcessPoolExecutor) -> None:
    """Compare a chain of steps over an array of 10 MB in other processes."""
    import numpy as np

    array = np.ones(10_000_000 // 8)

    def run_by_hand() -> Any:
        value = array
        for _ in range(11):
            value = processes.submit(grow, value).result()
        return value

    def make_pipeline(folder: str, cache: bool) -> Pipeline:
        names = ["x", *[f"a{i}" for i in range(11)]]
        steps = []
        for previous, name in itertools.pairwise(names):
            steps.append(Step(grow, name=name, args={"array": previous}, cache=cache))
        return Pipeline(steps, executor=processes, store=folder)

    with tempfile.TemporaryDirectory() as folder:
        plain = make_pipeline(f"{folder}/plain", cache=False)
        ratio, _ = compare(lambda: plain.run("a10", x=array)["a10"], run_by_hand, 5)
        add_row("11 steps over 10 MB on processes over the bare pool", ratio)
        cold = [make_pipeline(f"{folder}/cached{i}", cache=True) for i in range(5)]
        ratio, _ = compare(lambda: cold.pop().run("a10", x=array)["a10"], run_by_hand, 5)
        add_row("the same, cached, cold", ratio)


########################################################################################
### Display and records
########################################################################################


def measure_display() -> None:
    """Measure a picture with its table, layout included."""
    for size in (10, 50, 100, 200):
        functions = make_layers(size)
        pipelines = []
        for i in range(5):  # with other names: a layout is kept
            renamed = {f"{name}_{i}": name for name in (f.__name__ for f in functions)}
            steps = []
            for function, name in zip(functions, renamed, strict=True):
                needs = {need: f"{need}_{i}" for need in inspect.signature(function).parameters}
                steps.append(Step(function, name=name, args=needs))
            pipelines.append(Pipeline(steps))
            pipelines[-1].inputs  # noqa: B018
        by_hand = functools.partial(build_by_hand, functions)
        _, seconds = compare(lambda: pipelines.pop().show().html, by_hand, 5)  # noqa: B023
        add_row(f"picture of {size} steps", seconds * 1e3, "ms")


def measure_records() -> None:
    """Measure what recording a run costs, the size of a record, and reading many."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Pipeline({"identity": identity})
        recorded = Pipeline({"identity": identity}, store=folder)
        recorded.run(x=1)
        ratio, seconds = compare(lambda: recorded.run(x=1), lambda: plain.run(x=1), 49, count=20)
        add_row("recording a run", (seconds - seconds / ratio) * 1e6, "µs", 50)

        records = Path(folder, "runs.jsonl")
        records.write_text(f"{records.read_text().strip().splitlines()[0]}\n" * 100_000)
        assert len(recorded.history()) == 100_000
        seconds = statistics.median(measure_seconds(recorded.history) for _ in range(3))
        add_row("history() of 100,000 runs", seconds, "s", 1.5)
        add_row("its table in a notebook", len(recorded.history()._repr_html_()) / 1e3, "kB")  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory() as folder:
        chain = Pipeline(make_kilobyte_steps(), store=folder)
        chain.run("s99", x=KILOBYTE)
        text = Path(folder, "runs.jsonl").read_text()
        size = len(text.partition('"steps":')[2]) / 100
        add_row("a step in a record", size, "bytes", 100)


if __name__ == "__main__":
    parts = {
        "run": measure_run,
        "import": measure_import,
        "cache": measure_cache,
        "array": measure_array,
        "parallel": measure_parallel,
        "display": measure_display,
        "records": measure_records,
    }
    for part in sys.argv[1:] or parts:
        parts[part]()
    print_table()
