"""`proxyq doctor`: whether what is installed works."""

from typing import Any

import typer

from proxyq.cli import options as o
from proxyq.cli.output import print_blocks, print_json, say
from proxyq.cli.runtime import cache_folder, working
from proxyq.errors import ProxyqError


def doctor(
    seed: o.UnusedNumber = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
) -> None:
    """Tell what is installed and whether it works: versions, devices, cache, a small search."""
    cache = None if no_cache else cache_folder(cache_dir)
    try:
        with working(
            device=device, cache_dir=cache_dir, no_cache=no_cache, quiet=quiet
        ) as progress:
            from proxyq import api

            found = api.doctor(cache_dir=cache, progress=progress)
    except ProxyqError:
        raise
    except Exception:
        _tell_what_is_broken(json=json)
        raise
    record = found.to_json()
    if json:
        print_json(record)
    else:
        from proxyq.report.tables import doctor_blocks

        print_blocks(*doctor_blocks(record))
    for package in record["packages"]:
        if package["note"] is not None:
            say(package["note"], quiet=quiet)
    _end(record["problems"])


def _tell_what_is_broken(*, json: bool) -> None:
    """What keeps proxyq itself from being imported, where a package that it needs does."""
    from proxyq.installed import NEEDED, look_at

    packages = look_at(NEEDED, needed=True)
    problems = [one.problem for one in packages if one.problem is not None]
    if not problems:
        return
    if json:
        record: dict[str, Any] = {"ok": False, "packages": [one.to_json() for one in packages]}
        print_json({**record, "problems": problems})
    _end(problems)


def _end(problems: list[str]) -> None:
    for problem in problems:
        say(problem)
    if problems:
        raise typer.Exit(1)
