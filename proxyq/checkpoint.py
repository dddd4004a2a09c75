"""Where a long computation keeps how far it is, so that a killed run goes on where it was.

What is kept is exact (arrays in safetensors, never pickles), so a resumed run ends in the same
bytes as one that was never stopped.
"""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from proxyq.errors import ProxyqError
from proxyq.files import write_atomic


class Checkpoint:
    """Named sets of arrays in one folder; without a folder it keeps nothing.

    - `folder`: made when the first set is saved.
    - `every`: seconds between two saves, as `due` counts them.
    """

    def __init__(self, folder: Path | None = None, *, every: float = 10.0):
        self.folder = folder
        self.every = every
        self._saved = time.monotonic()

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """What was saved under `name`; `None` when nothing was, or it cannot be read."""
        if self.folder is None:
            return None
        try:
            return load((self.folder / f"{name}.safetensors").read_bytes())
        except (OSError, SafetensorError):
            return None  # to compute it anew is always right

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep `arrays` under `name`, wholly or not at all.

        A full disk, or another process that has just finished the same and cleared the folder,
        is no reason to stop.
        """
        if self.folder is None:
            return
        whole = {key: np.asarray(array, order="C") for key, array in arrays.items()}
        with contextlib.suppress(OSError, ProxyqError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / f"{name}.safetensors", save(whole))
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save again."""
        return self.folder is not None and time.monotonic() - self._saved >= self.every

    def within(self, name: str) -> "Checkpoint":
        """A part of this one, for a computation inside of another."""
        return Checkpoint(None if self.folder is None else self.folder / name, every=self.every)

    def clear(self) -> None:
        """Forget everything."""
        if self.folder is None or not self.folder.is_dir():
            return
        for file in self.folder.rglob("*.safetensors"):
            with contextlib.suppress(OSError):
                file.unlink()
        for folder in sorted(self.folder.rglob("*"), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            self.folder.rmdir()
