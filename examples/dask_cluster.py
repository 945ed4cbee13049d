"""The word count of ``parallel.py`` on a real Dask cluster of two worker processes.

A pipeline whose executor is a ``Client`` keeps values on the workers: the words of each file stay
there, and only the five most common words come back. This needs ``pip install dagkit[dask]``.
"""

import os
import pickle
from pathlib import Path

from dask.distributed import Client, LocalCluster
from parallel import common, paths, words

from dagkit import Pipeline


def main() -> None:
    folder = Path(os.__file__).parent
    local_run = Pipeline(paths, words, common).run("common", "words", folder=folder)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        run = Pipeline(paths, words, common, executor=client).run("common", folder=folder)
        worker_count = len(client.nthreads())
    print(f"{worker_count} workers, equal results: {run['common'] == local_run['common']}")
    words_size = len(pickle.dumps(local_run["words"]))
    result_size = len(pickle.dumps(run["common"]))
    print(f"{words_size:,} bytes of counts stayed on the workers, {result_size} bytes came back")
    print(", ".join(f"{word} {count}" for word, count in run["common"]))


if __name__ == "__main__":
    main()
