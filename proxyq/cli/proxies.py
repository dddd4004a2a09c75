"""`proxyq proxies`: what there is to measure sensitivity with."""

from proxyq.cli import options as o
from proxyq.cli.output import print_blocks, print_json
from proxyq.cli.runtime import working


def proxies(
    seed: o.UnusedNumber = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.UnusedFolder = None,
    no_cache: o.UnusedFlag = False,
    device: o.UnusedDevice = None,
) -> None:
    """List the proxies."""
    with working(no_cache=True, quiet=True):
        from proxyq.proxies import PROXIES

        found = list(PROXIES)
    if json:
        names = ("name", "direction", "needs", "passes", "shape", "reference", "summary", "options")
        print_json([{name: getattr(proxy, name) for name in names} for proxy in found])
        return
    from proxyq.report.tables import proxies_table

    print_blocks(proxies_table(found))
