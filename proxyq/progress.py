"""How long-running library functions tell how far they are."""

from typing import Protocol


class Progress(Protocol):
    """Called with a stage's name, the steps done and the steps in all."""

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...


def silent(stage: str, done: int, total: int, /) -> None:
    """The default: says nothing."""
    del stage, done, total
