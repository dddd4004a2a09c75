"""`Spill`: the states of all batches between two layers, where memory has no room for them.

What walks all images in step, layer by layer, holds a state for each batch. Those that fit are
kept where they are; the others lie in a file without a name in the folder for temporary files
(`TMPDIR`), which the system removes with the process, and come back bit by bit the same. Running
the network again from its inputs would take as many passes as it has layers.
"""

import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, Self

import jax
import numpy as np

from proxyq.engine.segments import State
from proxyq.errors import ProxyqError
from proxyq.model.graph import Var


class Overflow:
    """What lies partly in a file without a name, which a `with` gives back early."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> IO[bytes]:
        """The file, made where there is none yet."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        return self._file


class Spill(Overflow):
    """States by the number of their batch, in at most `room` bytes; `None` is any number.

    **Raises** `ProxyqError` where the folder for temporary files has no room either.
    """

    def __init__(self, room: int | None = None):
        super().__init__()
        self.room, self.taken = room, 0
        self._here: dict[int, State] = {}
        self._away: dict[int, dict[Var, Any]] = {}
        self._places: dict[int, tuple[int, int]] = {}  # offset and length of what lies in the file
        self._end = 0

    def __len__(self) -> int:
        return len(self._here) + len(self._away)

    def put(self, number: int, state: State) -> None:
        """Keep the state of a batch in place of its last one."""
        self.taken -= _bytes(self._here.pop(number, {}))
        self._away.pop(number, None)
        size = _bytes(state)
        if self.room is None or self.taken + size <= self.room:
            self._here[number], self.taken = state, self.taken + size
            return
        try:
            self._away[number] = self._written(number, state, size)
        except OSError as error:
            raise no_room(error) from None

    def get(self, number: int) -> State:
        """The state of a batch, as it was put."""
        if number in self._here:
            return self._here[number]
        assert self._file is not None
        start, _ = self._places[number]
        self._file.seek(start)
        found = {}
        for var, (shape, dtype, sharding) in self._away[number].items():
            array = np.empty(shape, dtype)
            self._file.readinto(array.reshape(-1).view(np.uint8))  # type: ignore[attr-defined]
            found[var] = jax.device_put(array, sharding)
        return found

    def _written(self, number: int, state: State, size: int) -> dict[Var, Any]:
        file = self._open()
        if self._places.get(number, (0, -1))[1] < size:  # a larger state moves to the end
            self._places[number], self._end = (self._end, size), self._end + size
        file.seek(self._places[number][0])
        written: dict[Var, Any] = {}
        for var, array in state.items():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            written[var] = (array.shape, array.dtype, getattr(array, "sharding", None))
        return written


def no_room(error: OSError) -> ProxyqError:
    """The sentence for a disk that is full too."""
    return ProxyqError(
        "what memory (--memory) has no room for does not fit into "
        f"{tempfile.gettempdir()} either ({error.strerror}): allow more memory, free "
        "some of the disk, or set TMPDIR to a folder on a larger one."
    )


def _bytes(state: Mapping[Var, Any]) -> int:
    return sum(value.size * value.dtype.itemsize for value in state.values())
