"""Kedro: any pipeline as a Kedro pipeline, one node a step, for any of Kedro's runners.

Names of values are names of datasets; an input with a default is a parameter: ``params:seed``.
"""

import sys
from inspect import Parameter
from typing import Any

import kedro.pipeline
from kedro.io import DataCatalog, MemoryDataset, SharedMemoryDataCatalog
from kedro.runner import ParallelRunner, SequentialRunner

from dagkit import Pipeline, Step, Store


class Call:  # an object, since functions made here could not be sent to another process
    def __init__(self, step: Step, store: Store, names: tuple[str, ...]) -> None:
        self.step, self.store, self.names, self.__name__ = step, store, names, step.name

    def __call__(self, *values: Any) -> list[Any]:
        given = dict(zip(self.step.needs, values))
        run = Pipeline(self.step, store=self.store).run(*self.names, **given)
        return [run[name] for name in self.names]


def dataset(pipeline: Pipeline, name: str) -> str:
    needed = pipeline.inputs.get(name, Parameter.empty) is Parameter.empty
    return name if needed else f"params:{name}"


def datasets(pipeline: Pipeline, **inputs: Any) -> dict[str, MemoryDataset]:
    read = {n: pipeline.run(n)[n] for n in pipeline.inputs if n in pipeline.catalog}
    given = {**pipeline.inputs, **read, **inputs}.items()
    return {dataset(pipeline, n): MemoryDataset(v) for n, v in given if v is not Parameter.empty}


def nodes(pipeline: Pipeline) -> kedro.pipeline.Pipeline:
    made, graph = [], pipeline.graph
    for name, step in pipeline.steps.items():
        # What a step with outputs returns as a whole is a dataset only if a step takes it.
        whole = not step.outputs or graph.out_degree(name) > len(step.outputs)
        call = Call(step, pipeline.store, step.values if whole else step.outputs)
        needs = [dataset(pipeline, need) for need in step.needs]
        made.append(kedro.pipeline.Node(call, needs, [*call.names], name=name))
    return kedro.pipeline.Pipeline(made)


if __name__ == "__main__":
    sys.path.append(f"{sys.path[0]}/..")
    from ml import pipeline

    runners = SequentialRunner(), ParallelRunner()
    for runner, catalog in zip(runners, (DataCatalog, SharedMemoryDataCatalog)):
        held = catalog(datasets(pipeline, weak_strength=0.001, strong_strength=1.0))
        print(type(runner).__name__, runner.run(nodes(pipeline), held)["accuracies"].load())
