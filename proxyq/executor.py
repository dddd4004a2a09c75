"""Run many independent tasks: here, in several processes, or on several machines with Ray.

What works on the tasks is named and not sent: `proxyq.api.table:worker` is a function of a setup
that gives a function of a task. Setup, tasks and results are JSON, so that we pickle nothing (Ray
sends its workers' code in its own way) and what runs elsewhere can be read. Results come as they
are finished; what they are does not depend on who computed them.
"""

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from proxyq.devices import cores
from proxyq.errors import MissingExtra, ProxyqError, UsageError

Worker = Callable[[Any], Any]
Work = Callable[[Sequence[Any]], Iterator[tuple[int, Any]]]
LOST = 10
FORMS = "'serial', 'process:N' or 'ray:N'"


class Executor(Protocol):
    """Runs tasks with a worker; yields `(number of the task, result)` in any order.

    `remote`: whether the worker runs in another process, so that only what JSON can say gets
    there.
    """

    remote: bool

    def run(self, worker: str, setup: Any, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """**Raises** what the worker raises."""
        ...

    def session(self, worker: str, setup: Any) -> AbstractContextManager[Work]:
        """Workers that stay for several lots of tasks: `with ... as work: work(tasks)`."""
        ...


def executor(text: "str | Executor | None") -> Executor:
    """An executor from `serial`, `process:N` (N processes) or `ray:N` (N Ray workers)."""
    if text is None or text == "serial":
        return Serial()
    if not isinstance(text, str):
        return text
    kind, colon, number = text.partition(":")
    if kind not in ("process", "ray") or (colon and not number.isascii()):
        raise UsageError(f"`executor` must be {FORMS}, got {text!r}.")
    if colon and not (number.isdigit() and 1 <= int(number) <= 4096):
        raise UsageError(f"`executor` must have at least 1 worker, got {text!r}: write {kind}:2.")
    count = int(number) if colon else len(cores())
    return Processes(count) if kind == "process" else Ray(count)


def resolve(worker: str, setup: Any) -> Worker:
    """The function that works on tasks, from its name within proxyq."""
    module, _, name = worker.partition(":")
    if not module.startswith("proxyq.") or not name.isidentifier():
        raise UsageError(f"a worker is named 'proxyq.module:function', got {worker!r}.")
    return getattr(importlib.import_module(module), name)(setup)


class Serial:
    """One task after the other, in this process."""

    remote = False

    def run(self, worker: str, setup: Any, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `Executor`."""
        if not tasks:
            return
        work = resolve(worker, setup)
        for index, task in enumerate(tasks):
            yield index, work(task)

    @contextlib.contextmanager
    def session(self, worker: str, setup: Any) -> Iterator[Work]:
        """See `Executor`."""
        work = resolve(worker, setup)
        yield lambda tasks: ((index, work(task)) for index, task in enumerate(tasks))


class Processes:
    """Several processes on this machine, each with its share of the cores."""

    remote = True

    def __init__(self, count: int):
        self.count = count

    def run(self, worker: str, setup: Any, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `Executor`."""
        with self.session(worker, setup, min(self.count, len(tasks))) as work:
            yield from work(tasks)

    @contextlib.contextmanager
    def session(self, worker: str, setup: Any, count: int | None = None) -> Iterator[Work]:
        """See `Executor`. Processes are started when there are first tasks for them."""
        crew = _Crew({"worker": worker, "setup": setup}, self.count if count is None else count)
        try:
            yield lambda tasks: self._work(crew, tasks)
        finally:
            crew.end()

    def _work(self, crew: "_Crew", tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(tasks)):
            left.put(index)
        done: queue.SimpleQueue[tuple[int, Any] | BaseException | None] = queue.SimpleQueue()
        count, shift = min(crew.count, len(tasks)), crew.shift

        def serve(number: int) -> None:
            try:
                process = crew.member(number, shift)
                while crew.shift == shift:
                    try:
                        index = left.get_nowait()
                    except queue.Empty:
                        break
                    done.put((index, _ask(process, tasks[index])))
            except BaseException as error:  # handed over to the caller
                done.put(error)
            else:
                done.put(None)

        threads = [threading.Thread(target=serve, args=(i,), daemon=True) for i in range(count)]
        for thread in threads:
            thread.start()
        finished = 0
        try:
            while finished < count:
                result = done.get()
                if result is None:
                    finished += 1
                elif isinstance(result, BaseException):
                    raise result
                else:
                    yield result
        finally:
            if finished < count:  # some are in the middle of a task, whose answer nobody awaits
                crew.end()


class _Crew:
    """Worker processes by number. `shift` changes when all are sent away."""

    def __init__(self, setup: dict[str, Any], count: int):
        self.setup, self.count, self.shift = setup, count, 0
        self._members: dict[int, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()

    def member(self, number: int, shift: int) -> "subprocess.Popen[str]":
        """A process that is set up; of a shift that is over there is none."""
        with self._lock:
            if shift != self.shift:
                raise ProxyqError("the work was given up.")
            process = self._members.get(number)
            if process is not None:
                return process
            process = self._members[number] = _start()
        every = cores()
        own = every[number :: self.count] or [every[number % len(every)]]
        there = _surroundings(number)
        _ask(process, {**self.setup, "cores": own, "environment": there})
        return process

    def end(self) -> None:
        """Stop all, whatever they do."""
        with self._lock:
            self.shift += 1
            ended = list(self._members.values())
            self._members.clear()
        for process in ended:
            with contextlib.suppress(OSError):
                process.kill()
        for process in ended:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, ValueError):
                    pipe.close()  # type: ignore[union-attr]


def _start() -> "subprocess.Popen[str]":
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        # Without the current folder (-P), whose files might stand in for Python's own.
        [sys.executable, "-P", "-m", "proxyq.executor"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        encoding="utf-8",
        # Ctrl-C goes to the process that was started, which ends the others.
        start_new_session=True,
    )


def _ask(process: "subprocess.Popen[str]", message: Any) -> Any:
    """Send a line, wait for the answer."""
    assert process.stdin is not None and process.stdout is not None
    line = ""
    with contextlib.suppress(OSError, ValueError):
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    if not line.endswith("\n"):
        code = process.wait()
        why = " it may have run out of memory;" if code in (-9, 137) else ""
        raise ProxyqError(
            f"a worker process ended before its work was done (exit code {code}):{why} what is "
            "finished is in the cache, so try again, with fewer processes if need be."
        )
    return _result(json.loads(line))


def _result(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        kind = UsageError if answer["usage"] else ProxyqError
        raise kind(answer["error"])
    return answer["result"]


def _answer(function: Callable[[], Any]) -> dict[str, Any]:
    """A result, or the sentence of an error, to be sent."""
    try:
        return {"result": function()}
    except ProxyqError as error:
        return {"error": str(error), "usage": isinstance(error, UsageError)}
    except Exception as error:
        text = f"a worker failed with an unexpected {type(error).__name__}: {error}"
        return {"error": f"{text}; this is a bug.", "usage": False}


class Ray:
    """Ray workers: on the cluster that `RAY_ADDRESS` names, else started here.

    A worker that is lost, alone or with its machine, is replaced, and its task is done again: up to
    `LOST` times, since a task that ends every worker would go on for ever.
    """

    remote = True

    def __init__(self, count: int):
        self.count = count

    def run(self, worker: str, setup: Any, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `Executor`."""
        with self.session(worker, setup, min(self.count, len(tasks))) as work:
            yield from work(tasks)

    @contextlib.contextmanager
    def session(self, worker: str, setup: Any, count: int | None = None) -> Iterator[Work]:
        """See `Executor`."""
        try:
            import ray
            from ray.exceptions import RayActorError
        except ImportError:
            raise MissingExtra(
                "ray", "ray", "The executor ray:N (process:N does without)"
            ) from None
        ours = not ray.is_initialized()
        if ours:
            ray.init(log_to_driver=False, include_dashboard=False)

        @ray.remote(scheduling_strategy="SPREAD")
        class Actor:
            def __init__(self, worker: str, setup: str, environment: dict[str, str]):
                os.environ.update(environment)  # before JAX is there
                self.made = _answer(lambda: resolve(worker, json.loads(setup)))

            def work(self, task: str) -> str:
                if "error" in self.made:
                    return json.dumps(self.made)
                return json.dumps(_answer(lambda: self.made["result"](json.loads(task))))

        number, there = self.count if count is None else count, _surroundings()
        # A worker that asks for no GPU is shown none, and would compute on the CPU.
        share = _gpu_share(ray.cluster_resources().get("GPU", 0.0), number, there)

        def started() -> Any:
            kind: Any = Actor
            chosen = kind.options(num_gpus=share) if share else kind
            return chosen.remote(worker, json.dumps(setup), there)

        actors = [started() for _ in range(number)]
        lost = 0

        def work(tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
            nonlocal lost
            idle, left, running = list(actors), list(range(len(tasks)))[::-1], {}
            while left or running:
                while idle and left:
                    actor, index = idle.pop(), left.pop()
                    running[actor.work.remote(json.dumps(tasks[index]))] = (actor, index)
                (reference,), _ = ray.wait(list(running), num_returns=1)
                actor, index = running.pop(reference)
                try:
                    answer = ray.get(reference)
                except RayActorError:
                    lost += 1
                    if lost > LOST:
                        raise ProxyqError(
                            f"{lost} Ray workers were lost: they may have run out of memory; what "
                            "is finished is in the cache, so try again with fewer."
                        ) from None
                    actors.remove(actor)
                    actors.append(started())
                    idle.append(actors[-1])
                    left.append(index)
                    continue
                yield index, _result(json.loads(answer))
                idle.append(actor)

        try:
            yield work
        finally:
            for actor in actors:
                ray.kill(actor)
            if ours:
                ray.shutdown()


def _surroundings(number: int | None = None) -> dict[str, str]:
    """Environment of a worker: the platform that this process was told to use, no memory taken in
    advance, and for a numbered one on this machine a GPU of its own, as far as they go."""
    found = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    }
    jax = sys.modules.get("jax")
    if jax is None:
        return found
    if platforms := jax.config.jax_platforms:
        found["JAX_PLATFORMS"] = platforms
    if number is not None and jax.default_backend() == "gpu":
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = shown.split(",") if shown else [str(i) for i in range(jax.local_device_count())]
        found["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return found


def _gpu_share(gpus: float, workers: int, environment: Mapping[str, str]) -> float:
    """How much of a GPU each of some Ray workers gets; none where they are to use the CPU."""
    if not gpus or not workers or environment.get("JAX_PLATFORMS") == "cpu":
        return 0.0
    # Of a GPU that several share Ray deals in whole ten-thousandths.
    return 1.0 if gpus >= workers else int(1e4 / -(-workers // int(gpus or 1))) / 1e4


def main() -> None:
    """A worker process: a line of JSON in, a line of JSON out, until the input ends."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    work: Worker | None = None
    for line in sys.stdin:
        task = json.loads(line)
        if work is not None:
            known = work
            answer(_answer(lambda: known(task)))  # noqa: B023 - called at once
            continue
        os.environ.update(task.get("environment", {}))
        if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, task["cores"])
        made = _answer(lambda: resolve(task["worker"], task["setup"]))  # noqa: B023
        work = made.pop("result", None)
        answer(made if work is None else {"result": None})


if __name__ == "__main__":
    main()
