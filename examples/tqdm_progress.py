"""A progress bar of tqdm: a function that listens to the events of a run.

This needs ``pip install tqdm``. dagkit also has progress lines of its own: ``progress=True``.
"""

import time
from typing import Any

from tqdm import tqdm

from dagkit import Event, Pipeline, step


def make_listener(**options: Any) -> Any:
    bar = tqdm(**options)

    def listen(event: Event) -> None:
        if event.kind == "map progress":
            bar.total = event.total
            bar.update()
        elif event.kind == "run finished":
            bar.close()

    return listen


@step(map="number")
def squares(number: int) -> int:
    time.sleep(0.002)
    return number**2


if __name__ == "__main__":
    pipeline = Pipeline(squares, on_event=make_listener(desc="squares"))
    run = pipeline.run(number=range(100))
    print(f"{len(run['squares'])} squares, the last one {run['squares'][-1]}")
