"""`proxyq proxies`: what there is to measure sensitivity with."""

from dataclasses import fields
from typing import Any

from proxyq.cli import options as o
from proxyq.cli.output import print_blocks, print_json, print_text
from proxyq.cli.runtime import working


def proxies(
    name: o.ShownProxy = None,
    seed: o.UnusedNumber = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.UnusedFolder = None,
    no_cache: o.UnusedFlag = False,
    device: o.UnusedDevice = None,
) -> None:
    """List the proxies, or tell all about one."""
    with working(computes=False, no_cache=True, quiet=quiet):
        from proxyq.proxies import COST_CLASSES, PROXIES
        from proxyq.proxies.formula.binding import shelf_formulas

        place = {name: place for place, name in enumerate(COST_CLASSES)}  # from cheap to dear
        listed = [*PROXIES, *shelf_formulas()]
        every = sorted(listed, key=lambda one: (place.get(one.cost_class, len(place)), one.name))
        found = every if name is None else [PROXIES.get(name)]
    from proxyq.report.tables import proxies_table, proxy_docs, proxy_text

    if json and name is None:
        print_json([_record(proxy) for proxy in found])
    elif json:
        print_json({**_record(found[0]), "docs": proxy_docs(found[0])})
    elif name is None:
        print_blocks(proxies_table(found))
    else:
        print_text(proxy_text(found[0]))


def _record(proxy: Any) -> dict[str, Any]:
    names = [field.name for field in fields(proxy) if field.name != "kernel"]
    record = {name: getattr(proxy, name) for name in names}
    # A cost for each bit-width needs no mapping.
    return {**record, "cost": proxy.cost if proxy.shape == "layers" else None}
