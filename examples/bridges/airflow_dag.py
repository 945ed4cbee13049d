"""Airflow: any pipeline as tasks of an Airflow DAG, one a step; values stay in the store.

A task makes an entry of the store, where others find it; its fingerprint alone travels as XCom. A
step that is not cached, or a sensor, is kept for one run of the DAG. Airflow retries and pokes.
"""

import sys
from dataclasses import replace
from typing import Any

import networkx as nx
from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowSkipException

from dagkit import Pipeline


def tasks(pipeline: Pipeline, *targets: str, **inputs: Any) -> dict[str, Any]:
    """Add the steps that the targets need to the DAG at hand, whose params may change inputs."""
    graph, steps, made = pipeline.graph, pipeline.steps, dict[str, Any]()

    def make(name: str, run_id: Any = None, params: Any = None) -> str:
        given = {**inputs, **{n: params[n] for n in pipeline.inputs if n in params}}
        kept = [s if s.cache else replace(s, cache=True, version=run_id) for s in steps.values()]
        once = [replace(s, retries=0, poke=s.poke and (0, 0, True)) for s in kept]
        done = pipeline.replace(once).run(name, **given).steps[name]
        if done.status == "skipped" and not steps[name].poke:
            raise AirflowSkipException(done.reason)
        return done.fingerprint  # a sensor that saw nothing has none, and is called again

    needed = {n for target in targets or graph for n in (target, *nx.ancestors(graph, target))}
    for name, step in [pair for pair in steps.items() if pair[0] in needed]:
        how = {"task_id": name, "retries": step.retries, "retry_delay": step.retry_delay}
        how |= {"retry_exponential_backoff": step.retry_backoff, "trigger_rule": "none_failed"}
        if wait := step.poke and ("all_success", *step.poke, "reschedule"):
            how |= zip(("trigger_rule", "poke_interval", "timeout", "soft_fail", "mode"), wait)
        made[name] = (task.sensor if wait else task)(**how)(make)(name)
    for need, name in graph.edges:
        if name in made and (maker := graph.nodes[need]["step"]):
            made[maker.name] >> made[name]
    return made


if __name__ == "__main__":
    sys.path.append(f"{sys.path[0]}/..")
    from ml import pipeline

    with DAG("cancer") as dag:
        tasks(pipeline, "accuracies", weak_strength=0.001, strong_strength=1.0)
    print([f"{task.task_id} after {sorted(task.upstream_task_ids)}" for task in dag.tasks])
