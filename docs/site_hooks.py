"""For `mkdocs build`: pages that the navigation does not name come last among the guides.

So a page needs no line in `mkdocs.yml`, and a page that is not there is no broken link.
"""

from pathlib import Path
from typing import Any

GUIDES = "Guides"


def on_config(config: Any) -> Any:
    """Put pages at the top of `docs/` that no entry names under `Guides`."""
    folder = Path(config["docs_dir"])
    named = set(_files(config["nav"]))
    rest = sorted(page.name for page in folder.glob("*.md") if page.name not in named)
    for entry in config["nav"]:
        if isinstance(entry, dict) and GUIDES in entry:
            entry[GUIDES].extend(rest)
    return config


def _files(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [file for part in parts for file in _files(part)]
