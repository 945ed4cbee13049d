"""What must work in JupyterLite: run in Pyodide, which has no threads, processes, links and locks.

Each function below is a test. Nothing but dagkit and networkx is installed.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import pickle
import sys
import tempfile
import threading
import time
import traceback
import warnings

import dagkit
from dagkit import CatalogError, DagkitWarning, Pipeline, Skip, Step, WorkerError, sensor, step

warnings.simplefilter("error")
LIMIT = 10


@step(cache=True)
def load(path: pathlib.Path) -> list[int]:
    return json.loads(path.read_text())


@step(cache=True, outputs=("low", "high"))
def split(load: list[int]) -> tuple[list[int], list[int]]:
    return [x for x in load if x < LIMIT], [x for x in load if x >= LIMIT]


@step
def count(low: list[int], high: list[int], digits: int = 2) -> float:
    return round(len(low) / (len(low) + len(high)), digits)


def list_statuses(run):
    return " ".join(state.status for state in run.steps.values())


def write_numbers(*numbers):
    path = pathlib.Path("numbers.json")
    path.write_text(json.dumps(numbers))
    return path


@contextlib.contextmanager
def expect(kind, text):
    try:
        yield
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def test_the_platform_is_as_bare_as_we_think():
    assert sys.platform == "emscripten"
    assert not hasattr(os, "link")
    with expect(RuntimeError, "can't start new thread"):
        threading.Thread(target=print).start()


def test_a_pipeline_runs_plans_and_hits():
    pipeline = Pipeline(load, split, count)
    path = write_numbers(1, 2, 30)
    assert [state.status for state in pipeline.plan(path=path).values()] == [
        "new",
        "new",
        "uncached",
    ]
    assert pipeline.run(path=path)["count"] == 0.67
    assert list_statuses(Pipeline(load, split, count).run(path=path)) == "cached cached ran"
    write_numbers(1, 2, 3, 30)
    assert pipeline.plan(path=path)["load"].reason == "file numbers.json changed"
    assert pipeline.run("count", path=path)["count"] == 0.75


def test_edits_of_code_and_constants_count():
    space = {"__name__": "__main__"}
    code = "RATE = 1\ndef helper(x): return x + RATE\ndef total(x): return helper(x)"
    for edit, result in (
        ("", 2),
        ("# comment", 2),
        ("RATE = 2", 3),
        ("def helper(x): return 0", 0),
    ):
        exec(f"{code}\n{edit}", space)
        pipeline = Pipeline(Step(space["total"], cache=True))
        assert pipeline.run(x=1)["total"] == result
        assert list_statuses(pipeline.run(x=1)) == "cached"


def test_the_standard_library_is_no_project_code():
    parts = dagkit._CodeMemo().find_walk(load).parts
    assert {kind for kind, _ in parts} == {"function"}


def test_large_values_come_back():
    def make(size):
        return bytearray(range(256)) * size, list(range(size)), "x" * size

    pipeline = Pipeline(Step(make, cache=True))
    for status in ("ran", "cached"):
        for size in (10, 20_000, 200_000):  # the last one is as large as what is mapped elsewhere
            run = pipeline.run(size=size)
            assert run["make"] == make(size)
            assert list_statuses(run) == status
    assert pipeline.store.size() > 50_000_000
    assert pipeline.store.prune(max_bytes=0) > 50_000_000
    assert pipeline.store.clear() == 0


def test_damage_is_a_miss():
    def make(size):
        return ["x"] * size

    pipeline = Pipeline(Step(make, cache=True))
    pipeline.run(size=9000)
    for folder, _, names in os.walk(pipeline.store.path + "/values"):
        for name in names:
            with open(os.path.join(folder, name), "r+b") as file:
                file.write(b"damage")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert pipeline.run(size=9000)["make"] == ["x"] * 9000
    assert {warning.category for warning in caught} == {DagkitWarning}


def test_the_catalog_loads_and_saves():
    files = {
        "text": "in.txt",
        "numbers": "in.json",
        "rows": "rows.jsonl.gz",
        "model": "out/{tag}.pkl",
    }
    pathlib.Path("in.txt").write_text("größe", encoding="utf-8")
    write_numbers(1, 2).rename("in.json")

    def rows(text, numbers):
        return [{"text": text, "number": number} for number in numbers]

    def model(rows):
        return {len(rows): {1, 2}}

    def best(model):
        return max(model)

    pipeline = Pipeline(rows, model, best, catalog=files)
    assert pipeline.run(tag="a")["best"] == 2
    assert pickle.loads(pathlib.Path("out/a.pkl").read_bytes()) == {2: {1, 2}}
    assert list_statuses(pipeline.run("best", tag="a")) == "cached cached ran"
    pathlib.Path("in.txt").write_text("klein")
    assert pipeline.plan("best", tag="a")["rows"].status == "stale"
    assert pipeline.run("best", tag="a")["best"] == 2
    with expect(CatalogError, "No module named 'pandas'"):
        Pipeline(rows, catalog={"rows": "rows.csv"}).run(text="a", numbers=[1])


def test_runs_are_recorded():
    pipeline = Pipeline(count, store="s", name="records")
    pipeline.run(low=[1], high=[2])
    pipeline.run(low=[1], high=[2, 3, 4])
    assert [row["metrics.count"] for row in pipeline.history()] == [0.5, 0.25]
    assert pipeline.run(**pipeline.history()[0].inputs)["count"] == 0.5


def test_async_steps_run_in_the_loop_of_the_notebook():
    async def page(name):
        await asyncio.sleep(0.01)
        return [name] * 3

    @step(cache=True)
    async def words(page):
        return await asyncio.gather(*[asyncio.sleep(0, word) for word in page])

    async def broken(page):
        raise LookupError("nothing there")

    for statuses in ("ran ran", "ran cached"):
        run = Pipeline(page, words).run(name="a")
        assert run["words"] == ["a", "a", "a"]
        assert list_statuses(run) == statuses
    assert Pipeline(Step(page, map="name")).run(name=["a", "b"])["page"] == [["a"] * 3, ["b"] * 3]
    with expect(LookupError, "nothing there"):
        Pipeline(page, broken).run(name="a")


def test_maps_retries_sensors_and_skips():
    calls = []

    def flaky(item):
        calls.append(item)
        if calls.count(item) < 3:
            raise OSError("not yet")
        if item == 2:
            raise Skip("even")
        return item

    @sensor(poke_interval=0.02, timeout=5)
    def ready():
        calls.append("ready")
        return calls.count("ready") > 2

    steps = Step(flaky, map="item", retries=5, retry_delay=0.01), ready
    run = Pipeline(*steps).run(item=[1, 2, 3])
    assert run["flaky"] == [1, 3]
    assert calls.count("ready") == 3


def test_pictures_are_drawn():
    pipeline = Pipeline(load, split, count)
    for picture in (
        pipeline.show(),
        pipeline.show("low"),
        pipeline.plan(path=write_numbers(1)).show(),
    ):
        assert picture.svg.startswith("<svg")
        assert "load" in picture.text
        picture.save("picture.html")
    assert pathlib.Path("picture.html").read_text(encoding="utf-8").count("<svg") >= 1
    assert "text/html" in pipeline._repr_mimebundle_()


def test_the_graph_is_one_of_networkx():
    assert set(Pipeline(load, split, count).graph.predecessors("count")) == {
        "low",
        "high",
        "digits",
    }


def test_an_executor_of_threads_is_an_error_that_says_so():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, expect(WorkerError, "can't start new thread"):
        Pipeline(count, executor=pool).run(low=[1], high=[2])


passed = failed = 0
for name, test in list(globals().items()):
    if not name.startswith("test_"):
        continue
    os.chdir(tempfile.mkdtemp())
    start = time.perf_counter()
    try:
        test()
        passed += 1
        print(f"{name} passed in {time.perf_counter() - start:.2f} s")
    except BaseException:
        failed += 1
        print(f"{name} FAILED\n{traceback.format_exc()}")
print(f"Python {sys.version.split()[0]} on {sys.platform}, dagkit {dagkit.__version__}")
print(f"{passed} passed, {failed} failed")
