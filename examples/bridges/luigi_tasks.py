"""Luigi: any pipeline as Luigi tasks, one a step, whose targets are entries of the store.

A task is complete if its entry fits code and inputs as they are now, not because a file exists. A
step that is not cached, or a sensor, is kept for one call of ``tasks``. Luigi does the retries.
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
    call, graph, made = uuid4().hex, pipeline.graph, dict[str, Any]()
    once = [s if s.cache else replace(s, cache=True, version=call) for s in pipeline.steps.values()]
    kept = pipeline.replace([replace(s, retries=0) for s in once])
    for name in kept.plan(*targets, **inputs):
        makers = {step.name for n in graph.predecessors(name) if (step := graph.nodes[n]["step"])}
        body = {
            "call": luigi.Parameter(),  # tasks of another call are other tasks
            "task_namespace": namespace,
            "retry_count": pipeline.steps[name].retries + 1,
            "requires": lambda _, makers=makers: [made[n] for n in made if n in makers],
            "output": lambda _, name=name: Entry(kept, name, inputs),
            "run": lambda self: self.output().load(),
        }
        made[name] = type(name, (luigi.Task,), body)(call=call)
    return made


if __name__ == "__main__":
    sys.path.append(f"{sys.path[0]}/..")
    from ml import pipeline

    made = tasks(pipeline, "cancer", "accuracies", weak_strength=0.001, strong_strength=1.0)
    luigi.build(made.values(), local_scheduler=True, log_level="WARNING")
    print(f"{len(made)} tasks of Luigi: {made['accuracies'].output().load()}")
