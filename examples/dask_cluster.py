"""The word count of ``parallel.py`` on a real Dask cluster of two worker processes.

Given a ``Client``, dagkit hands futures from step to step: the counts of each file stay on the
workers, and only the five most common words travel back. Needs ``pip install dagkit[dask]``.
"""

import os
import pickle
from pathlib import Path

from dask.distributed import Client, LocalCluster
from parallel import common, paths, words

from dagkit import Pipeline


def main() -> None:
    folder = Path(os.__file__).parent
    alone = Pipeline(paths, words, common).run("common", "words", folder=folder)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        run = Pipeline(paths, words, common, executor=client).run("common", folder=folder)
        workers = len(client.nthreads())
    print(f"{workers} workers, equal results: {run['common'] == alone['common']}")
    kept, back = (len(pickle.dumps(value)) for value in (alone["words"], run["common"]))
    print(f"{kept:,} bytes of counts stayed on the workers, {back} bytes came back")
    print(", ".join(f"{word} {count}" for word, count in run["common"]))


if __name__ == "__main__":
    main()
