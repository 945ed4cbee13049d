"""Kedro: any pipeline as a Kedro pipeline, one node for each step, for any runner of Kedro.

The names of values are the names of datasets. An input with a default is a parameter:
``params:seed``.
"""

import sys
from dataclasses import replace
from typing import Any

import kedro.pipeline
from kedro.io import DataCatalog, MemoryDataset, SharedMemoryDataCatalog
from kedro.runner import ParallelRunner, SequentialRunner

from dagkit import REQUIRED, Pipeline, Step, Store


class Call:
    """One step. It is an object because a local function cannot be sent to another process."""

    def __init__(self, step: Step, store: Store, names: tuple[str, ...]) -> None:
        self.step, self.store, self.names = replace(step, after=()), store, names
        self.__name__ = step.name

    def __call__(self, *values: Any) -> list[Any]:
        given = dict(zip(self.step.needs, values))
        run = Pipeline(self.step, store=self.store).run(*self.names, **given)
        return [run[name] for name in self.names]


def dataset(pipeline: Pipeline, name: str) -> str:
    return name if pipeline.inputs.get(name, REQUIRED) is REQUIRED else f"params:{name}"


def datasets(pipeline: Pipeline, **inputs: Any) -> dict[str, MemoryDataset]:
    """Make a dataset of each input: given, from the catalog of the pipeline, or a default."""
    values = {name: value for name, value in pipeline.inputs.items() if value is not REQUIRED}
    values |= {name: pipeline.run(name)[name] for name in values.keys() & pipeline.catalog.keys()}
    values |= inputs
    return {dataset(pipeline, name): MemoryDataset(value) for name, value in values.items()}


def nodes(pipeline: Pipeline) -> kedro.pipeline.Pipeline:
    kedro_nodes, graph = [], pipeline.graph
    for name, step in pipeline.steps.items():
        # The whole result of a step with outputs is a dataset only if a step takes it.
        is_taken = not step.outputs or graph.out_degree(name) > len(step.outputs)
        call = Call(step, pipeline.store, step.values if is_taken else step.outputs)
        needs = [dataset(pipeline, value) for value in step.dependencies]
        kedro_nodes.append(kedro.pipeline.Node(call, needs, [*call.names], name=name))
    return kedro.pipeline.Pipeline(kedro_nodes)


if __name__ == "__main__":
    sys.path.append(f"{sys.path[0]}/..")
    from ml import pipeline

    runners = (SequentialRunner(), ParallelRunner())
    for runner, catalog_class in zip(runners, (DataCatalog, SharedMemoryDataCatalog)):
        catalog = catalog_class(datasets(pipeline, weak_strength=0.001, strong_strength=1.0))
        print(type(runner).__name__, runner.run(nodes(pipeline), catalog)["accuracies"].load())
