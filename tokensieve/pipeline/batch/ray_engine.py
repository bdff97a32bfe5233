"""The Ray engine: a pool of actors, each with a model and the local engine; rows meet in the folder only.

Ray Data hands out batches of inputs, starts an actor that died again, as often as it takes, and gives it its batch once
more; `ray_worker` says how that comes to an end. Should Ray give up all the same, what has no row goes into another
round, as long as every round adds rows.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tokensieve.datasets.limits import Limits
from tokensieve.datasets.results import PARTS
from tokensieve.errors import BadOption, TokensieveError
from tokensieve.pipeline.batch.engine import Progress
from tokensieve.pipeline.batch.folder import Folder
from tokensieve.pipeline.batch.inputs import Input
from tokensieve.pipeline.batch.parts import TEMPORARY, read_columns
from tokensieve.pipeline.batch.ray_worker import Job, Make, Worker, describe

BATCHES_PER_ACTOR = 4  # at least, if there are so many inputs, so that actors end at about the same time
STORE_BYTES = 200 << 20  # of a Ray that we start: frames and rows never go through it
_CONNECT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How many actors, and what each of them has."""

    actors: int
    num_cpus: int
    num_gpus: int


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Joins the cluster, or starts Ray on this machine alone; leaves it, or ends it, at the end.

    A Ray that the process has joined before is used and left as it is.

    Args:
        address: HOST:PORT, or "auto" for the cluster that this machine belongs to; None starts one.

    Raises:
        BadOption: Ray is not installed, there is no cluster, or an address for a process that has joined one.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise BadOption("--engine ray needs Ray.", hint='pip install "tokensieve[ray]"') from None
    _quiet()
    if ray.is_initialized():
        if address is not None:
            raise BadOption("This process has joined a Ray already.", hint="Leave the address out to use that one.")
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            _start()
        else:
            _join(address)
        yield
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray puts its own there


def _quiet() -> None:
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is told by our own errors


def _start() -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


def _join(address: str) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    unreachable = BadOption(
        f"No Ray cluster lets us in at {address!r}.",
        hint="--address is HOST:PORT of its head, or auto on one of its nodes; if it wants a token, RAY_AUTH_TOKEN "
        "must hold it here, too. Without --address Ray starts on this machine.",
    )
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or "/" in host:
            raise BadOption(
                f"--address must be HOST:PORT or auto, got {address!r}.",
                hint="The command itself must run on a node of the cluster.",
            )
        try:  # Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        except (OSError, OverflowError):
            raise unreachable from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError):
        raise unreachable from None


def pool_of(nodes: Sequence[Mapping[str, float]], workers: int | None, use_gpu: bool) -> Pool:
    """As many actors as fit: one a GPU if any node has one, else one for every `workers` processors.

    Args:
        nodes: resources of each node, as Ray names them.
        workers: processors of an actor, and its decoders at once; by default 1, with GPUs their share of a node.
        use_gpu: whether the model may be on a GPU.

    Raises:
        BadOption: no node has that many processors.
    """
    sizes = [(int(node.get("CPU", 0)), int(node.get("GPU", 0)) if use_gpu else 0) for node in nodes]
    if any(gpus for _, gpus in sizes):
        share = min(max(1, cpus // gpus) for cpus, gpus in sizes if gpus)
        each = workers or min(share, 16)
        actors, num_gpus = sum(min(cpus // each, gpus) for cpus, gpus in sizes), 1
    else:
        each = workers or 1
        actors, num_gpus = sum(cpus // each for cpus, _ in sizes), 0
    if not actors:
        raise BadOption(f"No node of the cluster has {each} processors.", hint="Give a smaller --workers.")
    return Pool(actors=actors, num_cpus=each, num_gpus=num_gpus)


class RayEngine:
    """A pool that makes the rows of one step; to be used while `connected`.

    Attributes:
        pool: its size.
        schema: of the rows.
        made_with: all that they follow from, as of the first machine that was asked.

    Args:
        make: loads the step in every actor, and says what its rows follow from; pickled by Ray.
        workers, use_gpu: as of `pool_of`.

    Raises:
        TokensieveError: the process that was asked died; and all that `make` raises.
    """

    def __init__(self, make: Make, workers: int | None = None, *, use_gpu: bool = True):
        import ray
        from ray.exceptions import RayTaskError, WorkerCrashedError

        self._make = make
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.pool = pool_of(nodes, workers, use_gpu)
        resources = {"num_cpus": self.pool.num_cpus, "num_gpus": self.pool.num_gpus}
        task = ray.remote(max_calls=1, max_retries=0, **resources)(describe)  # its process ends, and frees the memory
        try:
            self.schema, self.made_with = ray.get(task.remote(make, os.getcwd()))
        except RayTaskError as error:
            raise error.cause from None
        except WorkerCrashedError:
            raise TokensieveError(
                "The process that loaded the model died.", hint="Check the memory of the nodes."
            ) from None

    def run(
        self,
        inputs: Sequence[Input],
        folder: Folder,
        options: str,
        *,
        limits: Limits,
        read_options: Mapping[str, object],
        ahead_bytes: int,
        max_rows: int = 256,
        max_s: float = 30.0,
        stop: Callable[[], bool] = lambda: False,
        report: Callable[[Progress], None] = lambda _: None,
    ) -> Progress:
        """Works through the inputs; every row is in a part when this returns.

        Args:
            inputs: those without a row.
            folder: where the rows go, on a disk that all nodes share; its lock must be held.
            options: fingerprint, as `Folder.admit` gives it.
            max_rows, max_s: of a part; `max_rows` also bounds what goes to an actor at once.
            limits, read_options, ahead_bytes, stop, report: as of `engine.run`; `report` is called after every batch.

        Raises:
            TokensieveError: actors die and no row gets made; and what an actor could not go on after.
        """
        progress, start = Progress(), time.monotonic()
        job = Job(
            id="",
            cwd=os.getcwd(),
            make=self._make,
            made_with=self.made_with,
            folder=str(folder.folder),
            options=options,
            max_rows=max_rows,
            max_s=max_s,
            limits=limits,
            read_options=dict(read_options),
            workers=self.pool.num_cpus,
            ahead_bytes=ahead_bytes,
        )

        def take(done: Mapping[str, object]) -> None:
            if done["error"] is not None:
                raise pickle.loads(done["error"])
            for status in progress.counts:
                progress.counts[status] += done[status]
            progress.tokens += done["tokens"]
            progress.tokens_full += done["tokens_full"]
            progress.wait_s += done["wait_s"] / self.pool.actors
            progress.seconds = time.monotonic() - start
            report(progress)

        in_rounds(
            inputs,
            folder,
            lambda left: self._round(left, replace(job, id=f"round-{uuid.uuid4().hex}"), stop, take),
            stop,
        )
        folder.drop_repeated()
        # Rows of an actor that died were in no result, so all are counted once more.
        keys = {one.key for one in inputs}
        done = read_columns(folder.parts, ("key", "status")).to_pylist()
        statuses = [row["status"] for row in done if row["key"] in keys]
        progress.counts = {status: statuses.count(status) for status in progress.counts}
        progress.seconds = time.monotonic() - start
        progress.stopped = progress.num_rows < len(inputs)
        return progress

    def facts(self) -> dict[str, object]:
        """For the record."""
        return {"engine": "ray", **asdict(self.pool)}

    def _round(
        self,
        inputs: Sequence[Input],
        job: Job,
        stop: Callable[[], bool],
        take: Callable[[Mapping[str, object]], None],
    ) -> Exception | None:
        """Every input goes to an actor; returns why Ray has given up before the end."""
        import ray
        from ray.exceptions import RayError

        size = max(1, min(job.max_rows, -(-len(inputs) // (self.pool.actors * BATCHES_PER_ACTOR))))
        batches = [{"inputs": pickle.dumps(inputs[at : at + size])} for at in range(0, len(inputs), size)]
        done = ray.data.from_items(batches, override_num_blocks=len(batches)).map_batches(
            Actor,
            batch_size=1,  # one block, which is what Ray does again after a death
            batch_format="pyarrow",
            concurrency=min(self.pool.actors, len(batches)),
            fn_constructor_args=(job,),
            num_cpus=self.pool.num_cpus,
            num_gpus=self.pool.num_gpus,
        )
        parts = Path(job.folder) / PARTS
        try:
            with _telling(job.stop(parts), stop):
                for one in done.iter_rows():
                    take(one)
        except RayError as error:
            return error
        finally:
            for mark in parts.glob(f"{job.id}-*{TEMPORARY}"):
                mark.unlink(missing_ok=True)
        return None


class Actor(Worker):
    """A worker as Ray Data makes it."""

    def __init__(self, job: Job):
        import ray

        super().__init__(job, ray.get_runtime_context().get_actor_id())


def in_rounds(
    inputs: Sequence[Input],
    folder: Folder,
    one_round: Callable[[Sequence[Input]], Exception | None],
    stop: Callable[[], bool],
) -> None:
    """Rounds with what has no row, until one is not given up.

    Raises:
        TokensieveError: one is given up before it has added a row.
    """
    left = list(inputs)
    while left and not stop() and (error := one_round(left)) is not None:
        before, left = left, folder.undone(left)
        if len(left) == len(before):
            raise TokensieveError(
                f"Ray gave up ({type(error).__name__}) before one more row was made; finished rows are kept.",
                hint="Check the memory of the nodes, and the logs of Ray.",
            ) from error


@contextmanager
def _telling(mark: Path, stop: Callable[[], bool]) -> Iterator[None]:
    """Makes the mark once `stop()` is true: the actors look for it, while the driver waits for their results."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            if stop():
                mark.touch()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
