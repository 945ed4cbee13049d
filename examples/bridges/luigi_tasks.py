"""Luigi: any pipeline as Luigi tasks, one for each step. Their targets are entries of the store.

A task is complete if its stored result fits the code and the inputs as they are now; that a file
exists is not enough. The result of a step that is not cached, or of a sensor, is stored for one
call of ``tasks``. Luigi does the retries.
"""

import sys
from dataclasses import replace
from typing import Any
from uuid import uuid4

import luigi

from dagkit import Pipeline


class Entry(luigi.Target):  # type: ignore[misc]
    def __init__(self, pipeline: Pipeline, step: str, inputs: dict[str, Any]) -> None:
        self.pipeline, self.step, self.inputs = pipeline, step, inputs

    def exists(self) -> bool:
        return self.pipeline.plan(self.step, **self.inputs)[self.step].status == "fresh"

    def load(self) -> Any:
        return self.pipeline.run(self.step, **self.inputs)[self.step]


def tasks(pipeline: Pipeline, namespace: str, /, *targets: str, **inputs: Any) -> dict[str, Any]:
    """Map the name of each step that the targets need to its task, in topological order."""
    call, graph = uuid4().hex, pipeline.graph
    steps = []
    for step in pipeline.steps.values():
        version = step.version if step.cache else call
        steps.append(replace(step, cache=step.cache or True, version=version, retries=0))
    cached_pipeline = pipeline.replace(steps)
    all_tasks: dict[str, Any] = {}
    for name in cached_pipeline.plan(*targets, **inputs):
        producers = {graph.nodes[value]["step"] for value in graph.predecessors(name)}
        body = {
            "call": luigi.Parameter(),  # the tasks of another call are other tasks
            "task_namespace": namespace,
            "retry_count": pipeline.steps[name].retries + 1,
            "requires": lambda _, names=producers: [all_tasks[n] for n in all_tasks if n in names],
            "output": lambda _, name=name: Entry(cached_pipeline, name, inputs),
            "run": lambda self: self.output().load(),
        }
        all_tasks[name] = type(name, (luigi.Task,), body)(call=call)
    return all_tasks


if __name__ == "__main__":
    sys.path.append(f"{sys.path[0]}/..")
    from ml import pipeline

    inputs = {"weak_strength": 0.001, "strong_strength": 1.0}
    all_tasks = tasks(pipeline, "cancer", "accuracies", **inputs)
    luigi.build(all_tasks.values(), local_scheduler=True, log_level="WARNING")
    print(f"{len(all_tasks)} tasks of Luigi: {all_tasks['accuracies'].output().load()}")
