"""Airflow: any pipeline as tasks of an Airflow DAG, one for each step. Values stay in the store.

A task stores its result, where the next tasks find it; only its fingerprint travels as XCom. The
result of a step that is not cached, or of a sensor, is stored for one run of the DAG. Airflow
retries and pokes.
"""

import sys
from dataclasses import replace
from typing import Any

import networkx as nx
from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowSkipException

from dagkit import Pipeline


def tasks(pipeline: Pipeline, *targets: str, **inputs: Any) -> dict[str, Any]:
    """Add the steps that the targets need to the current DAG. Its params may change inputs."""
    graph, steps = pipeline.graph, pipeline.steps
    airflow_tasks: dict[str, Any] = {}

    def run_step(name: str, run_id: Any = None, params: Any = None) -> str:
        given = {**inputs, **{n: params[n] for n in pipeline.inputs if n in params}}
        cached_steps = []
        for step in steps.values():
            version = step.version if step.cache else run_id
            poke = step.poke and step.poke._replace(interval=0, timeout=0, soft_fail=True)
            cache = step.cache or True
            cached_steps.append(replace(step, cache=cache, version=version, retries=0, poke=poke))
        state = pipeline.replace(cached_steps).run(name, **given).steps[name]
        if state.status == "skipped" and not steps[name].poke:
            raise AirflowSkipException(state.reason)
        return state.fingerprint  # "" of a sensor that saw nothing: Airflow calls it again

    needed = set(targets or graph).union(*[nx.ancestors(graph, name) for name in targets])
    for name, step in steps.items():
        if name not in needed:
            continue
        options = {"task_id": name, "retries": step.retries, "retry_delay": step.retry_delay}
        options |= {"retry_exponential_backoff": step.retry_backoff, "trigger_rule": "none_failed"}
        if step.poke:
            interval, timeout, soft_fail = step.poke
            options |= {"poke_interval": interval, "timeout": timeout, "soft_fail": soft_fail}
            options |= {"mode": "reschedule", "trigger_rule": "all_success"}
        decorate = task.sensor if step.poke else task
        airflow_tasks[name] = decorate(**options)(run_step)(name)
    for value, name in graph.edges:
        if name in airflow_tasks and graph.nodes[value]["step"]:
            airflow_tasks[graph.nodes[value]["step"]] >> airflow_tasks[name]
    return airflow_tasks


if __name__ == "__main__":
    sys.path.append(f"{sys.path[0]}/..")
    from ml import pipeline

    with DAG("cancer") as dag:
        tasks(pipeline, "accuracies", weak_strength=0.001, strong_strength=1.0)
    print([f"{task.task_id} after {sorted(task.upstream_task_ids)}" for task in dag.tasks])
