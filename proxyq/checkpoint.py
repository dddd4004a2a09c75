"""Where a long computation keeps how far it is, so that a killed run goes on where it was.

What is kept is exact (arrays in safetensors, never pickles), so a resumed run ends in the same
bytes as one that was never stopped.
"""

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from proxyq.errors import ProxyqError, reason
from proxyq.files import digest_arrays, write_atomic

logger = logging.getLogger("proxyq.cache")
_DIGEST = "proxyq digest"


class Checkpoint:
    """Named sets of arrays in one folder; without a folder it keeps nothing.

    - `folder`: made when the first set is saved; `root`: the cache that it is in.
    - `every`: seconds between two saves, as `due` counts them.
    """

    def __init__(
        self, folder: Path | None = None, *, every: float = 10.0, root: Path | None = None
    ):
        self.folder = folder
        self.every = every
        self.root = folder if root is None else root
        self._saved = time.monotonic()

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """What was saved under `name`; `None` when nothing was, or it is not what was saved."""
        if self.folder is None:
            return None
        try:
            arrays = load((self.folder / f"{name}.safetensors").read_bytes())
            # A disk that lost a page would give wrong numbers, and nobody would know.
            digest = bytes(arrays.pop(_DIGEST)).decode()
            return arrays if digest == digest_arrays(arrays) else None
        except Exception:  # the reader of a damaged file raises many kinds
            return None  # to compute it anew is always right

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep `arrays` under `name`, wholly or not at all.

        A full disk, or another process that has just finished the same and cleared the folder,
        is no reason to stop: it is logged, once.
        """
        if self.folder is None:
            return
        whole = {key: np.asarray(array, order="C") for key, array in arrays.items()}
        digest = np.frombuffer(digest_arrays(whole).encode(), np.uint8)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / f"{name}.safetensors", save({**whole, _DIGEST: digest}))
        except (OSError, ProxyqError) as error:
            tell_unwritable(self.root, error)
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save again."""
        return self.folder is not None and time.monotonic() - self._saved >= self.every

    def within(self, name: str) -> "Checkpoint":
        """A part of this one, for a computation inside of another."""
        folder = None if self.folder is None else self.folder / name
        return Checkpoint(folder, every=self.every, root=self.root)

    def clear(self) -> None:
        """Forget everything."""
        if self.folder is None or not self.folder.is_dir():
            return
        # Also what a run that was killed in the middle of writing has left.
        for file in (*self.folder.rglob("*.safetensors"), *self.folder.rglob(".*.safetensors.*")):
            with contextlib.suppress(OSError):
                file.unlink()
        for folder in sorted(self.folder.rglob("*"), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            self.folder.rmdir()


_TOLD: set[Path | None] = set()


def tell_unwritable(root: Path | None, error: OSError | ProxyqError) -> None:
    """Log that a cache cannot be written, once for each."""
    cause = error.__cause__ or error
    # A folder that is gone was cleared by another process, which has finished the same.
    if root not in _TOLD and not isinstance(cause, FileNotFoundError):
        _TOLD.add(root)
        told = getattr(cause, "strerror", None) or reason(error)
        logger.warning("the cache %r cannot be written (%s): it is left out.", str(root), told)
