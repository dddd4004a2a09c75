"""`proxyq recipes`: published methods on the shelf."""

from proxyq.cli import options as o
from proxyq.cli.output import print_blocks, print_json
from proxyq.cli.runtime import working


def recipes(
    seed: o.UnusedNumber = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.UnusedFolder = None,
    no_cache: o.UnusedFlag = False,
    device: o.UnusedDevice = None,
) -> None:
    """List the recipes: published methods as a whole."""
    with working(computes=False, no_cache=True, quiet=quiet):
        from proxyq.search.recipes import available_recipes, load_recipe

        found = [load_recipe(name) for name in available_recipes()]
    if json:
        print_json([recipe.model_dump(mode="json") for recipe in found])
        return
    from proxyq.report.tables import recipes_table

    print_blocks(recipes_table(found))
