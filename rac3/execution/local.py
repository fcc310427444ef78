"""The executor of one process."""

import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from rac3.execution.shards import BEAT, Beat, Events, Job, Outcome, Shard, Tally, attempt, check_counts


@dataclass(frozen=True)
class Local:
    """Makes shards in this process, on all of its devices.

    Attributes:
      threads: shards in progress at once. While the devices compute for one, others are read, decoded and written.
    """

    threads: int = 4

    def __post_init__(self) -> None:
        check_counts("local", threads=self.threads)

    def outcomes(self, job: Job, missing: deque[Shard]) -> Events:
        worker = job.open()
        stopped = threading.Event()
        running: dict[Future[Outcome], Tally] = {}
        with ThreadPoolExecutor(self.threads, "shard") as threads:
            try:
                while missing or running:
                    while missing and len(running) < self.threads:
                        tally = Tally(stopped)
                        running[threads.submit(attempt, worker, missing.popleft(), tally)] = tally
                    done, _ = wait(running, BEAT, FIRST_COMPLETED)
                    for future in done:
                        del running[future]
                        yield future.result()
                    tallies = running.values()
                    yield Beat(1, sum(tally.documents for tally in tallies), sum(tally.rejects for tally in tallies))
            finally:
                stopped.set()
