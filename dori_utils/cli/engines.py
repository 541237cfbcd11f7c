"""Engines: a sweep in this process, or on Ray."""

import logging
import os
import time
import warnings
from contextlib import contextmanager, suppress

import psutil

OBJECT_BYTES = 10**8  # of Ray's shared memory, by default a third of the machine's: cases and results are small
RETRIES = 20  # of a case whose worker died: fewer are over before Ray has noticed that a node is gone
START_SECONDS = 900  # for Ray to start; and for all workers of a cluster to be there and to have loaded the model

RAY_SETTINGS = {  # of a Ray that the sweep starts itself, read from the environment
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_worker_niceness": "0",  # by default 15: beside anything else a worker has a thirtieth of a core
    # By default 30, 60 and 30 s, in which a machine that is busy may not start them; then they are killed.
    "RAY_gcs_server_port_wait_time_s": str(START_SECONDS),
    "RAY_worker_register_timeout_seconds": str(START_SECONDS),
    "RAY_agent_register_timeout_ms": str(1000 * START_SECONDS),
}


class _Attempts:
    """A worker whose errors are results: the case's number, its result or None, and the error as text or None."""

    def __init__(self, worker, *arguments):
        self.worker = worker(*arguments)

    def about(self):
        return self.worker.about()

    def compute(self, number, case, config):
        try:
            return number, self.worker.compute(case, config), None
        except Exception as error:
            return number, None, f"{type(error).__name__}: {error}"


class LocalEngine:
    """Cases one after the other, in this process."""

    workers = 1

    def __init__(self, worker, *arguments):
        self._attempts = _Attempts(worker, *arguments)

    def about(self) -> dict:
        return self._attempts.about()

    def results(self, tasks):
        """Yields (number, result or None, error or None) of each task (number, case, config)."""
        for task in tasks:
            yield self._attempts.compute(*task)


class RayEngine:
    """Cases by the actors of a Ray cluster, each of which has a worker.

    Args:
        workers: how many; default: one for each GPU, or a single one where there is none.
        address: of the cluster: "local" starts one on this machine, "auto" finds the one that it belongs to.

    Raises:
        ImportError: Ray is not installed.
        ValueError: more workers than GPUs, on this machine.
    """

    def __init__(self, worker, *arguments, workers=None, address="local"):
        self._ray = _import_ray()
        own = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": OBJECT_BYTES}
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        patiently(self._ray.init, address=address, **quiet, **(own if address == "local" else {}))
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        self.workers = workers or gpus or 1
        if address == "local" and 0 < gpus < self.workers:
            raise ValueError(f"{self.workers} workers for {gpus} GPUs: a worker needs one for itself.")
        options = {"num_cpus": 1, "num_gpus": int(gpus > 0), "max_restarts": -1, "max_task_retries": RETRIES}
        actor = self._ray.remote(_Attempts).options(**options)
        self.actors = [actor.remote(worker, *arguments) for _ in range(self.workers)]

    def about(self) -> dict:
        """What the workers say of their model, when all are there.

        Raises:
            ValueError: they do not agree, so that a case would depend on who computes it; or some never started.
        """
        asked = [actor.about.remote() for actor in self.actors]
        there, missing = self._ray.wait(asked, num_returns=len(asked), timeout=START_SECONDS)
        try:
            answers = self._ray.get(there)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        if missing:
            have = ", ".join(
                f"{n:g} {kind}" for kind, n in self._ray.cluster_resources().items() if kind in ("CPU", "GPU")
            )
            raise ValueError(f"{len(missing)} of {len(asked)} workers never started; the cluster has {have}.")
        if any(answer != answers[0] for answer in answers):
            raise ValueError("The workers' models differ: give all nodes the same files, and GPUs to all or to none.")
        return answers[0]

    def results(self, tasks):
        """As those of `LocalEngine`, in the order in which they are finished; to be called once."""
        pool, self.actors = self._ray.util.ActorPool(self.actors), []
        left, death = {task[0] for task in tasks}, None
        for task in tasks:
            pool.submit(lambda actor, task: actor.compute.remote(*task), task)
        while pool.has_next():
            try:
                result = pool.get_next_unordered()
            except self._ray.exceptions.RayActorError as error:
                death = str(error).strip().splitlines()[0]
            else:
                left.remove(result[0])
                yield result
            while idle := pool.pop_idle():
                self._ray.kill(idle)  # nothing is left for it: leaves its place to one whose node was lost
        for number in left:
            yield number, None, death


@contextmanager
def started(engine, worker, *arguments, workers=None, address="local"):
    """The engine of this name, "local" or "ray"; behind it Ray is shut down."""
    if engine == "local":
        yield LocalEngine(worker, *arguments)
        return
    ray = _import_ray()
    try:
        yield RayEngine(worker, *arguments, workers=workers, address=address)
    finally:
        ray.shutdown()


def patiently(start, **options):
    """`start(**options)`, which starts a node of Ray; again, for `START_SECONDS`, if the machine is too busy for it.

    A node is several Python processes that import much. Ray 2.60 gives them 15 seconds in one place and 30 in another,
    no setting changes that (github.com/ray-project/ray/issues/65983), and all that it says is that "The current node
    timed out during startup". So it is tried again for this reason, and for no other.
    """
    end, own = time.monotonic() + START_SECONDS, psutil.Process()
    while True:
        before = own.children()
        try:
            return start(**options)
        except Exception as error:  # Ray has no class of its own for it
            if "timed out during startup" not in str(error) or time.monotonic() > end:
                raise
            warnings.warn("Ray could not start in time: is the machine busy? Trying again.", stacklevel=2)
        for process in set(own.children()) - set(before):
            with suppress(psutil.NoSuchProcess):
                if any("/ray/" in word for word in process.cmdline()):  # half a node, which Ray leaves behind
                    process.kill()


def _import_ray():
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.util
    except ImportError as error:
        raise ImportError('The engine "ray" needs Ray: pip install "dori_utils[cluster]"') from error
    return ray
