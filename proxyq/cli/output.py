"""Printing: results on stdout, everything else on stderr."""

import json
import sys
from typing import Any

WIDTH = 88


def print_text(text: str) -> None:
    """Text on stdout; signs that its encoding lacks become question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(f"{text.rstrip()}\n".encode(encoding, "replace").decode(encoding))


def print_json(value: Any) -> None:
    """One JSON value on stdout, in UTF-8 whatever the terminal's encoding; text as it is."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)
    data = f"{text.rstrip()}\n"
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None or encoding.replace("-", "") == "utf8":
        sys.stdout.write(data)
    else:
        sys.stdout.flush()
        buffer.write(data.encode())


def print_blocks(*blocks: Any) -> None:
    """Text and rich tables on stdout, an empty line between; at most 88 columns wide."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    console = Console(highlight=False, width=width)
    with console.capture() as captured:
        for index, block in enumerate(block for block in blocks if block is not None):
            if index:
                console.print()
            console.print(block, markup=False)
    # Cells are padded to the width of their column; nobody needs the blanks at a line's end.
    print_text("\n".join(line.rstrip() for line in captured.get().splitlines()))


def say(text: str, *, quiet: bool = False) -> None:
    """A line for people on stderr."""
    if not quiet:
        print(f"proxyq: {text}", file=sys.stderr)
