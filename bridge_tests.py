"""To be pasted at the end of test_dagkit.py; the imports are there already."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def lines(code: str) -> list[str]:
    return [line for line in code.splitlines() if line.strip()]


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
