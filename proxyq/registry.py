"""A small registry: find a frozen record by its name, or be told the near misses."""

import fnmatch
import logging
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, Protocol, TypeVar

from proxyq.errors import UsageError, kind_and_line, near


class Named(Protocol):
    """Anything with a `name`."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Named)
logger = logging.getLogger("proxyq.registry")


class Registry(Generic[R]):
    """Records by name, in the order of registration.

    A registry exists for finding by name (command line, listings, tests); library code
    imports the function. Third parties add records through the entry-point group
    `group`, each of whose entries must load to a record.
    """

    def __init__(self, kind: str, *, group: str | None = None):
        self.kind = kind
        self._group = group
        self._records: dict[str, R] = {}

    def add(self, record: R) -> R:
        """File `record`; a name that is taken is an error."""
        if record.name in self._records:
            raise UsageError(f"a {self.kind} named {record.name!r} is registered already.")
        self._records[record.name] = record
        return record

    def get(self, name: str) -> R:
        """The record called `name`; unknown names raise `UsageError` with near misses."""
        self._load_plugins()
        try:
            return self._records[name]
        except KeyError:
            raise UsageError(
                f"unknown {self.kind} {name!r}: {near(name, list(self._records))}"
            ) from None

    def available(self, pattern: str = "*") -> list[str]:
        """Names that match a shell wildcard, in the order of registration."""
        self._load_plugins()
        return [name for name in self._records if fnmatch.fnmatchcase(name, pattern)]

    def __iter__(self) -> Iterator[R]:
        self._load_plugins()
        return iter(tuple(self._records.values()))

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return name in self._records

    def _load_plugins(self) -> None:
        group, self._group = self._group, None  # once
        if group is None:
            return
        for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
            # A broken package of somebody's must not take everything else down with it.
            try:
                record = entry.load()
                name = record.name
            except Exception as error:
                logger.warning(
                    "the %s plug-in %r (%s) cannot be loaded and is left out (%s): update or "
                    "uninstall the package that brings it.",
                    *(self.kind, entry.name, entry.value, kind_and_line(error)),
                )
                continue
            if name not in self._records:
                self.add(record)
