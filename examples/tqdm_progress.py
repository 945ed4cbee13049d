"""A progress bar of tqdm in five lines: a listener on ``on_event``.

Needs ``pip install tqdm``. dagkit has a progress of its own, ``Pipeline(..., progress=True)``.
"""

import time
from typing import Any

from tqdm import tqdm

from dagkit import Event, Pipeline, step


def bar(**options: Any) -> Any:
    shown = tqdm(**options)

    def listen(event: Event) -> None:
        shown.total = event.total or shown.total
        shown.update(event.kind == "map progress")
        if event.kind == "run finished":
            shown.close()

    return listen


@step(map="number")
def squares(number: int) -> int:
    time.sleep(0.002)
    return number**2


if __name__ == "__main__":
    run = Pipeline(squares, on_event=bar(desc="squares")).run(number=range(100))
    print(f"{len(run['squares'])} squares, the last one {run['squares'][-1]}")
