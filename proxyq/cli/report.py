"""`proxyq report`: one HTML page about plans."""

from proxyq.cli import options as o
from proxyq.cli.output import print_json, say
from proxyq.cli.runtime import working


def report(
    plans: o.ReportedPlans,
    out: o.OutPage,
    scores: o.ReportedScores = None,
    front: o.ReportedFront = None,
    evaluation: o.ReportedEvaluation = None,
    title: o.PageTitle = None,
    seed: o.UnusedNumber = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.UnusedFolder = None,
    no_cache: o.UnusedFlag = False,
    device: o.UnusedDevice = None,
) -> None:
    """Show plans of one model on an HTML page.

    Bits and scores by layer, couplings, Pareto front, accuracy, groups, provenance: each where
    the files hold it. The page fetches nothing and runs no script.
    """
    with working(computes=False, no_cache=True, quiet=quiet):
        from proxyq import api
        from proxyq.files import check_writable

        check_writable(out)
        written = api.write_report(
            plans, out, scores=scores, front=front, evaluation=evaluation, title=title
        )

    if json:
        print_json({"file": str(written), "bytes": written.stat().st_size})
        return
    say(f"wrote {out}", quiet=quiet)
