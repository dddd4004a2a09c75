"""Every option once: its name, its sign for a value and its help."""

from typing import Annotated, Any

import typer

from proxyq.cli import completion
from proxyq.errors import UsageError


def _option(*names: str, panel: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, **more)


def _check_seed(value: int | None) -> int | None:
    if value is not None and not 0 <= value < 2**31:
        raise UsageError(f"--seed must be a whole number from 0 to {2**31 - 1}, got {value}.")
    return value


def _give_back(memory: str | None) -> str | None:
    if memory is not None:
        from proxyq.devices import give_back_large_blocks

        give_back_large_blocks()
    return memory


def _check_resize(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise UsageError(f"--resize must be at least 1, got {value}.")
    return value


METHOD, LAYERS, BUDGETS = "What is measured", "Layers and bits", "Budgets and solver"
IMAGES, MODEL, RESULT, RUN = "Images", "Model", "Result", "Everywhere"

# -- the model ------------------------------------------------------------------------
ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=completion.models,
        show_default=False,
        help="digits (the default), torchvision:NAME\\[@WEIGHTS], timm:NAME\\[@WEIGHTS], "
        "hf:FOLDER, hf:NAME or path/to/file.py:factory; @none for random weights.",
    ),
]
ModelAndPlans = Annotated[
    list[str],
    typer.Argument(
        metavar="[MODEL] PLAN.json...",
        autocompletion=completion.models,
        show_default=False,
        help="The plans to measure, or networks that `proxyq quantize` packed, and the model "
        "where it is not the embedded one.",
    ),
]
ModelAndPlan = Annotated[
    list[str],
    typer.Argument(
        metavar="[MODEL] PLAN.json",
        autocompletion=completion.models,
        show_default=False,
        help="The plan to apply, and the model where it is not the embedded one.",
    ),
]
ModelOrScores = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL|SCORES.json",
        autocompletion=completion.models,
        show_default=False,
        help="The model, as for `proxyq search`, or the file that `proxyq score` wrote.",
    ),
]
Weights = Annotated[
    str | None,
    _option(
        "--weights",
        metavar="FILE",
        panel=MODEL,
        help="Weights by name, .safetensors, .pt or .pth, instead of the model's own.",
    ),
]
InputShape = Annotated[
    str | None,
    _option(
        "--input-shape",
        metavar="3,224,224",
        panel=MODEL,
        help="Shape of one example, where neither model nor weights tell.",
    ),
]
Embeddings = Annotated[
    bool,
    _option(
        "--embeddings",
        panel=MODEL,
        help="Take tables whose rows the data look up (embeddings) as layers too, with bits of "
        "their own. A plan knows whether it was made so.",
    ),
]

# -- what is measured -----------------------------------------------------------------
ProxyName = Annotated[
    str | None,
    _option(
        "--proxy",
        metavar="NAME",
        autocompletion=completion.proxies_or_auto,
        panel=METHOD,
        help="What measures how sensitive a layer is; `proxyq proxies` lists them. "
        "Default: auto, which tries several and keeps the plan that measures best.",
    ),
]
Effort = Annotated[
    str | None,
    _option(
        "--effort",
        metavar="LEVEL",
        panel=METHOD,
        help="How far auto goes: low (a few forward passes), medium (every layer at every "
        "bit-width), high (and refined, on more images). Default: medium.",
    ),
]
TimeBudget = Annotated[
    float | None,
    _option(
        "--time-budget",
        metavar="SECONDS",
        panel=METHOD,
        help="About how long auto may take; what would take longer is left out, and said.",
    ),
]
Refine = Annotated[
    float,
    _option(
        "--refine",
        metavar="SECONDS",
        panel=METHOD,
        help="Improve the plan for so long by exchanges whose effect is measured.",
    ),
]
RecipeName = Annotated[
    str | None,
    _option(
        "--recipe",
        metavar="NAME|FILE",
        autocompletion=completion.recipes,
        panel=METHOD,
        help="A published method as a whole; `proxyq recipes` lists them.",
    ),
]
ProxyNames = Annotated[
    list[str] | None,
    _option(
        "--proxy",
        metavar="NAME|all",
        autocompletion=completion.proxies_or_all,
        panel=METHOD,
        help="What measures how sensitive a layer is; repeatable; all: every one that neither "
        "trains nor runs pairs of layers. `proxyq proxies` lists them.",
    ),
]
ScoreOptions = Annotated[
    list[str] | None,
    _option(
        "--option",
        metavar="[PROXY.]KEY=VALUE",
        panel=METHOD,
        help="An option of one proxy, or of all that have it; repeatable.",
    ),
]
WhoseScores = Annotated[
    str | None,
    _option(
        "--proxy",
        metavar="NAME",
        autocompletion=completion.proxies,
        panel=METHOD,
        help="Whose scores, where the file holds those of several proxies.",
    ),
]
OneProxy = Annotated[
    str | None,
    _option(
        "--proxy",
        metavar="NAME",
        autocompletion=completion.proxies,
        panel=METHOD,
        help="What measures how sensitive a layer is, or whose scores, where the file holds "
        "those of several. Default, with a model: logit-coupling.",
    ),
]
Cost = Annotated[
    str | None,
    _option(
        "--cost",
        metavar="NAME",
        panel=METHOD,
        help="How an importance becomes costs: linear-bits, times-dw2, times-relative-dw2, "
        "times-relative-dw or exponential. Default: the proxy's own, or the recipe's.",
    ),
]
ShownProxy = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME",
        autocompletion=completion.proxies,
        show_default=False,
        help="Tell all about this one.",
    ),
]
ScoresFile = Annotated[
    str,
    typer.Argument(
        metavar="SCORES.json", show_default=False, help="The file that `proxyq score` wrote."
    ),
]
ProxyOptions = Annotated[
    list[str] | None,
    _option(
        "--option",
        metavar="KEY=VALUE",
        panel=METHOD,
        help="An option of the proxy; repeatable.",
    ),
]

# -- layers and bits ------------------------------------------------------------------
Bits = Annotated[
    str | None,
    _option(
        "--bits",
        metavar="2,3,4,8",
        panel=LAYERS,
        help="Bit-widths to choose from. Default: 2,3,4,8, or the recipe's.",
    ),
]
ActivationBits = Annotated[
    str | None,
    _option(
        "--activation-bits",
        metavar="8|4,8|weights|float",
        panel=LAYERS,
        help="Bits of every layer's input; several to choose from, by a proxy that measures "
        "activations too; weights: as many as the layer's weights. Default: float, or the "
        "recipe's.",
    ),
]
AttentionBits = Annotated[
    str | None,
    _option(
        "--attention-bits",
        metavar="8|float",
        panel=LAYERS,
        help="Bits of both operands of every product of two activations, such as those of "
        "attention. Default: float.",
    ),
]
ExtraCode = Annotated[
    str | None,
    _option(
        "--extra-code",
        metavar="negative|either",
        panel=LAYERS,
        help="Side of zero on which weight grids have their odd code: negative (two's "
        "complement), or either, whichever rounds a channel better. Default: negative.",
    ),
]
GroupSize = Annotated[
    str | None,
    _option(
        "--group-size",
        metavar="64|channel,64",
        panel=LAYERS,
        help="So many weights of an output channel share a grid, in layers that multiply by a "
        "matrix; budgets on size count the scales, 16 bits each. Of several with commas between "
        "(channel: one grid a channel) every layer takes its own. Default: channel.",
    ),
]
Pins = Annotated[
    list[str] | None,
    _option(
        "--pin",
        metavar="PATTERN=8",
        panel=LAYERS,
        help="Layers that keep this bit-width, with PATTERN=8g64 in groups of 64 weights: shell "
        "wildcards on their names, or `re:` and a regular expression; repeatable.",
    ),
]
Ties = Annotated[
    list[str] | None,
    _option(
        "--tie",
        metavar="PATTERN",
        panel=LAYERS,
        help="Layers that share one bit-width; same-feature: those that hand on one tensor; "
        "same-input: those that read one; same-sum: those that are added up; repeatable.",
    ),
]
Unties = Annotated[
    list[str] | None,
    _option(
        "--untie",
        metavar="PATTERN",
        panel=LAYERS,
        help="Layers that runtimes fuse (query, key and value; gate and up) and that shall have "
        "bits of their own all the same; repeatable.",
    ),
]
Candidates = Annotated[
    list[str] | None,
    _option(
        "--candidates",
        metavar="PATTERN=2,4",
        panel=LAYERS,
        help="The only bit-widths for these layers; repeatable.",
    ),
]

# -- budgets and solver ---------------------------------------------------------------
Budgets = Annotated[
    list[str] | None,
    _option(
        "--budget",
        metavar="KIND=AMOUNT",
        panel=BUDGETS,
        help="A hard limit; repeatable, all hold at once: size=3bit (average over the searched "
        "layers), size=1.5MiB, size=50% (of the way from least to most), bops=75G, "
        "macs-bits=12G, latency=3ms, activation-memory=512KiB (the most that is live at one layer, "
        "for one image). Default: size=4bit.",
    ),
]
AskedBudgets = Annotated[
    list[str] | None,
    _option(
        "--budget",
        metavar="KIND=AMOUNT",
        panel=BUDGETS,
        help="A hard limit, as for `proxyq search`; repeatable, all hold at once.",
    ),
]
RangeBudgets = Annotated[
    list[str] | None,
    _option(
        "--budget",
        metavar="KIND=FROM..TO",
        panel=BUDGETS,
        help="The range of budgets, such as size=2.5bit..6bit. Further ones without a range, as "
        "for `proxyq search`, hold at every point.",
    ),
]
Points = Annotated[
    int,
    _option(
        "--points",
        metavar="N",
        panel=BUDGETS,
        help="How many budgets, evenly from one end of the range to the other.",
    ),
]
LatencyFile = Annotated[
    str | None,
    _option(
        "--latency-table",
        metavar="FILE",
        panel=BUDGETS,
        help="What layers take at each bit-width (JSON), for budgets on latency.",
    ),
]
SolverName = Annotated[
    str | None,
    _option(
        "--solver",
        metavar="NAME",
        panel=BUDGETS,
        help="auto, ilp, iqp, dp, lp, greedy, mutation or exhaustive. Default: auto (exact), or "
        "the recipe's.",
    ),
]
TimeLimit = Annotated[
    float,
    _option(
        "--time-limit",
        metavar="SECONDS",
        panel=BUDGETS,
        help="Time for the solver; afterwards the best plan so far, with its gap.",
    ),
]
AllTimeLimit = Annotated[
    float,
    _option(
        "--time-limit",
        metavar="SECONDS",
        panel=BUDGETS,
        help="Time for the solver at all points together; afterwards the best plans so far, with "
        "their gaps.",
    ),
]

# -- images ---------------------------------------------------------------------------
CalibrationData = Annotated[
    str | None,
    _option(
        "--data",
        metavar="DATA",
        panel=IMAGES,
        help="Calibration images: digits, FILE.npz\\[:IMAGES,LABELS], dir:PATH, "
        "torchvision:NAME@ROOT, hf:ID or random; for networks of text text:FILE, or FILE.npz with "
        "their inputs by name. Labels are read by proxies of the loss alone, "
        "and must be the model's classes (else: --option labels=predicted).",
    ),
]
EvalData = Annotated[
    str | None,
    _option(
        "--eval-data",
        metavar="DATA",
        panel=IMAGES,
        help="Labelled images to report accuracy on, named as for --data.",
    ),
]
Samples = Annotated[
    int | None,
    _option(
        "--samples",
        metavar="N",
        panel=IMAGES,
        help="How many calibration images. Default: 256, or the recipe's.",
    ),
]
Mean = Annotated[
    str | None,
    _option(
        "--mean",
        metavar="M[,M,M]",
        panel=IMAGES,
        help="Mean of each channel where white is 1, instead of what the model's weights say.",
    ),
]
Std = Annotated[
    str | None,
    _option("--std", metavar="S[,S,S]", panel=IMAGES, help="Deviation of each channel, likewise."),
]
Size = Annotated[
    str | None,
    _option(
        "--size",
        metavar="N[,N]",
        panel=IMAGES,
        help="Scale and crop the images to this height and width.",
    ),
]
Resize = Annotated[
    int | None,
    _option(
        "--resize",
        metavar="N",
        panel=IMAGES,
        callback=_check_resize,
        help="Scale the shorter side to this before cropping.",
    ),
]

# -- accuracy and results -------------------------------------------------------------
Correction = Annotated[
    str | None,
    _option(
        "--correction",
        metavar="HOW",
        panel=RESULT,
        help="auto, none, weights or statistics: what is corrected when the plan is run. "
        "Default: auto, or the recipe's.",
    ),
]
PlanCorrection = Annotated[
    str | None,
    _option(
        "--correction",
        metavar="HOW",
        panel=RESULT,
        help="auto, none, weights or statistics: what is corrected when a plan is run. "
        "Default: what the plan says.",
    ),
]
Reconstruct = Annotated[
    str,
    _option(
        "--reconstruct",
        metavar="HOW",
        panel=METHOD,
        help="How weights are rounded. none: to the nearest code; bias: the same, and means "
        "corrected; adaround: learned layer by layer; block: learned block by block.",
    ),
]
Steps = Annotated[
    int | None,
    _option(
        "--steps",
        metavar="N",
        panel=METHOD,
        help="Steps of learning for each layer or block, with --reconstruct adaround or block. "
        "Default: 1000.",
    ),
]
ActivationRanges = Annotated[
    str,
    _option(
        "--activation-range",
        metavar="HOW",
        panel=METHOD,
        help="min-max, percentile, mse or moving-average: what range inputs of layers get, "
        "where the plan rounds them.",
    ),
]
OutFolder = Annotated[
    str,
    _option("--out", metavar="DIR", panel=RESULT, help="Write the packed network and plan here."),
]
ModelAndMaybePlan = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] PLAN.json",
        autocompletion=completion.models,
        show_default=False,
        help="The plan to apply, and the model where it is not the embedded one. With --packed "
        "the plan may be left out.",
    ),
]
ExportFormat = Annotated[
    str | None,
    _option(
        "--to",
        metavar="FORMAT",
        autocompletion=completion.formats,
        panel=RESULT,
        help="The format to write: onnx, torchao, compressed-tensors or qwix.",
    ),
]
PackedFile = Annotated[
    str | None,
    _option(
        "--packed",
        metavar="FILE.safetensors",
        panel=METHOD,
        help="Export this network, which `proxyq quantize` wrote, as it is.",
    ),
]
Strict = Annotated[
    bool,
    _option(
        "--strict",
        panel=RESULT,
        help="Refuse to write where the format stores a layer with more bits than asked for.",
    ),
]
Explain = Annotated[
    bool,
    _option(
        "--explain",
        panel=RESULT,
        help="Tell what stays float in any plan and why, and operators that are missing.",
    ),
]
OutExport = Annotated[
    str | None,
    _option("--out", metavar="PATH", panel=RESULT, help="Write to this file or folder."),
]
Evaluate = Annotated[
    bool,
    _option(
        "--evaluate",
        panel=RESULT,
        help="Run the plan, and print its accuracy beside float and uniform bits.",
    ),
]
EvaluateAll = Annotated[
    bool,
    _option(
        "--evaluate",
        panel=RESULT,
        help="Run every plan, and print its accuracy and its divergence from the float network.",
    ),
]
Out = Annotated[
    str | None,
    _option("--out", metavar="PLAN.json", panel=RESULT, help="Write the plan to this file."),
]
OutScores = Annotated[
    str | None,
    _option("--out", metavar="SCORES.json", panel=RESULT, help="Write the scores to this file."),
]
PlanCount = Annotated[
    int,
    _option("--plans", metavar="N", panel=METHOD, help="How many random plans to measure."),
]
Draw = Annotated[
    str,
    _option(
        "--draw",
        metavar="uniform|size",
        panel=METHOD,
        help="uniform: each layer's bits alike likely; size: from the smallest plans to the "
        "largest.",
    ),
]
TableBits = Annotated[
    str | None,
    _option(
        "--bits",
        metavar="2,3,4",
        panel=LAYERS,
        help="Weight bit-widths to draw from. Default: 2,3,4.",
    ),
]
OneActivation = Annotated[
    str | None,
    _option(
        "--activation-bits",
        metavar="8|float",
        panel=LAYERS,
        help="Bits of every layer's input. Default: float.",
    ),
]
TableCorrection = Annotated[
    str,
    _option(
        "--correction",
        metavar="HOW",
        panel=METHOD,
        help="statistics, weights or none, of every plan.",
    ),
]
EvalSamples = Annotated[
    int | None,
    _option(
        "--eval-samples",
        metavar="N",
        panel=IMAGES,
        help="Measure on the first so many images. Default: all.",
    ),
]
DrawSeed = Annotated[
    int,
    _option(
        "--seed", metavar="N", panel=RUN, callback=_check_seed, help="Draw the plans by this seed."
    ),
]
ExecutorName = Annotated[
    str,
    _option(
        "--executor",
        metavar="serial|process:N|ray:N",
        panel=RUN,
        help="Who does the work: this process, N processes that share the cores, or N workers of "
        "a Ray cluster.",
    ),
]
PairExecutor = Annotated[
    str,
    _option(
        "--executor",
        metavar="serial|process:N|ray:N",
        panel=RUN,
        help="Who measures pairs of layers (clado): this process, N processes that share the "
        "cores, or N workers of a Ray cluster.",
    ),
]
TableFile = Annotated[
    str | None,
    _option(
        "--table",
        metavar="TABLE.json",
        panel=METHOD,
        help="The measured plans, as `proxyq table` writes them; digits: those of the embedded "
        "network.",
    ),
]
RankedProxies = Annotated[
    list[str] | None,
    _option(
        "--proxy",
        metavar="NAME|all",
        autocompletion=completion.proxies_or_all,
        panel=METHOD,
        help="What to rank; repeatable. Default: all that neither train nor run pairs of layers.",
    ),
]
InTheLoop = Annotated[
    bool,
    _option(
        "--in-the-loop/--no-in-the-loop",
        panel=METHOD,
        help="Rank proxies that measure the network again, corrected as the table's plans are.",
    ),
]
EvolveTables = Annotated[
    list[str] | None,
    _option(
        "--table",
        metavar="TABLE.json",
        panel=METHOD,
        help="Measured plans that the fitness is taken from, as `proxyq table` writes them; "
        "digits: those of the embedded network. Repeatable: the mean over all counts.",
    ),
]
Holdouts = Annotated[
    list[str] | None,
    _option(
        "--holdout",
        metavar="TABLE.json",
        panel=METHOD,
        help="Measured plans that are only looked at when all is decided; repeatable.",
    ),
]
EvolveMethod = Annotated[
    str,
    _option(
        "--method",
        metavar="default|emq|random",
        panel=METHOD,
        help="Settings as a whole: ours, EMQ's as far as known, or random search.",
    ),
]
StructureName = Annotated[
    str | None,
    _option(
        "--structure",
        metavar="free|tree|chain|graph",
        panel=METHOD,
        help="What formulas look like: any tree, or one of EMQ's three forms. Default: the "
        "method's.",
    ),
]
Leaves = Annotated[
    str | None,
    _option(
        "--leaves",
        metavar="W,G,D,bits",
        panel=METHOD,
        help="What formulas may read: W, G, F, V, H, D, A, E, O, R, bits, weights, macs. Default: "
        "all but H, or EMQ's.",
    ),
]
Objective = Annotated[
    str | None,
    _option(
        "--objective",
        metavar="spearman|top-k",
        panel=METHOD,
        help="The fitness on a table: rank correlation over all plans, or its mean over the "
        "first 20, 50 and 100 %. Default: spearman.",
    ),
]
Population = Annotated[
    int | None, _option("--population", metavar="N", panel=METHOD, help="How many formulas live.")
]
Evaluations = Annotated[
    int | None,
    _option(
        "--evaluations",
        metavar="N",
        panel=METHOD,
        help="How many different formulas are measured. Default: 10000, or EMQ's 1080.",
    ),
]
Generations = Annotated[
    int | None,
    _option("--generations", metavar="N", panel=METHOD, help="End after so many generations."),
]
Restarts = Annotated[
    int | None,
    _option(
        "--restarts",
        metavar="N",
        panel=METHOD,
        help="How often a new population is grown when nothing better comes. Default: 2.",
    ),
]
Nodes = Annotated[
    int | None,
    _option(
        "--nodes", metavar="N", panel=METHOD, help="The longest a free tree may be. Default: 32."
    ),
]
Validation = Annotated[
    float,
    _option(
        "--validation",
        metavar="SHARE",
        panel=METHOD,
        help="Of each table's plans, the share that is held back to choose the formula by.",
    ),
]
Entries = Annotated[
    int,
    _option(
        "--entries",
        metavar="N",
        panel=METHOD,
        help="How many entries of a layer stand for all while formulas are measured.",
    ),
]
SearchSeed = Annotated[
    int,
    _option(
        "--seed",
        metavar="N",
        panel=RUN,
        callback=_check_seed,
        help="Of all that is drawn. The same seed gives the same formulas.",
    ),
]
TablesWeights = Annotated[
    list[str] | None,
    _option(
        "--weights",
        metavar="FILE",
        panel=MODEL,
        help="Weights of the tables' networks: one for each table, then for each holdout, or one "
        "for all, in which {} stands for what follows the last colon of the network's name.",
    ),
]
TablesCode = Annotated[
    list[str] | None,
    _option(
        "--code",
        metavar="FILE.py",
        panel=MODEL,
        help="A Python file that a table names and that you trust: it is run to load the network. "
        "Repeatable.",
    ),
]
TablesData = Annotated[
    list[str] | None,
    _option(
        "--data",
        metavar="DATA",
        panel=IMAGES,
        help="Calibration images, as for `proxyq search`: one for all, or one for each table, "
        "then for each holdout.",
    ),
]
OutFormula = Annotated[
    str | None,
    _option(
        "--out",
        metavar="NAME.json",
        panel=RESULT,
        help="Write the formula to this file: a proxy by that name wherever one is asked for.",
    ),
]
Logbook = Annotated[
    str | None,
    _option(
        "--logbook",
        metavar="FILE.json",
        panel=RESULT,
        help="Write all that was found, and a row for each generation, to this file.",
    ),
]
PlotEvolution = Annotated[
    str | None,
    _option(
        "--plot",
        metavar="FILE.png|svg|pdf",
        panel=RESULT,
        help="Draw fitness and length by generation.",
    ),
]
OutRank = Annotated[
    str | None,
    _option("--out", metavar="RANK.json", panel=RESULT, help="Write the ranking to this file."),
]
PlotRank = Annotated[
    str | None,
    _option(
        "--plot",
        metavar="FILE.png|svg|pdf",
        panel=RESULT,
        help="Draw predicted cost against accuracy, a panel for each proxy.",
    ),
]
OutTable = Annotated[
    str | None,
    _option("--out", metavar="TABLE.json", panel=RESULT, help="Write the table to this file."),
]
OutFront = Annotated[
    str | None,
    _option("--out", metavar="FRONT.json", panel=RESULT, help="Write the front to this file."),
]
Plans = Annotated[
    str | None,
    _option(
        "--plans",
        metavar="DIR",
        panel=RESULT,
        help="Write a plan for each point into this folder: plan-01.json and so on.",
    ),
]
ReportedPlans = Annotated[
    list[str],
    typer.Argument(
        metavar="PLAN.json", show_default=False, help="One or several plans of one model."
    ),
]
OutPage = Annotated[
    str, _option("--out", metavar="REPORT.html", panel=RESULT, help="Write the page to this file.")
]
ReportedScores = Annotated[
    str | None,
    _option(
        "--scores",
        metavar="SCORES.json",
        panel=RESULT,
        help="Show these scores of the layers, from `proxyq score`, and their couplings.",
    ),
]
ReportedFront = Annotated[
    str | None,
    _option(
        "--front",
        metavar="FRONT.json",
        panel=RESULT,
        help="Show the plans beside this front, from `proxyq pareto`.",
    ),
]
ReportedEvaluation = Annotated[
    str | None,
    _option(
        "--evaluation",
        metavar="FILE.json",
        panel=RESULT,
        help="Show this accuracy, printed by `proxyq evaluate --json`. Default: what the plans "
        "hold.",
    ),
]
PageTitle = Annotated[
    str | None,
    _option("--title", metavar="TEXT", panel=RESULT, help="Headline. Default: the model's name."),
]
Plot = Annotated[
    str | None,
    _option(
        "--plot",
        metavar="FILE.png|svg|pdf",
        panel=RESULT,
        help="Draw the plan.",
    ),
]
PlotFront = Annotated[
    str | None,
    _option(
        "--plot",
        metavar="FILE.png|svg|pdf",
        panel=RESULT,
        help="Draw cost, and accuracy where it was measured, against the budget.",
    ),
]

# -- everywhere -----------------------------------------------------------------------
Seed = Annotated[
    int | None,
    _option(
        "--seed",
        metavar="N",
        panel=RUN,
        callback=_check_seed,
        help="Draw calibration images (and whatever is random) from this seed. Default: the "
        "first images.",
    ),
]
LearningSeed = Annotated[
    int,
    _option(
        "--seed",
        metavar="N",
        panel=RUN,
        callback=_check_seed,
        help="Of the order in which learned rounding (--reconstruct) takes the images.",
    ),
]
Memory = Annotated[
    str | None,
    _option(
        "--memory",
        metavar="4GiB",
        panel=RUN,
        callback=_give_back,
        help="Bound on what images take at once, beside libraries, weights and the images "
        "themselves; more is not always faster. Default: 64MiB of activations on CPU, 512MiB "
        "for derivatives.",
    ),
]
AsJson = Annotated[
    bool, _option("--json", panel=RUN, help="Print JSON on stdout, and nothing else there.")
]
Quiet = Annotated[bool, _option("--quiet", panel=RUN, help="No progress and no notes.")]
CacheDir = Annotated[
    str | None,
    _option(
        "--cache-dir",
        metavar="DIR",
        panel=RUN,
        help="Where compiled programs and finished scores are kept. Default: $PROXYQ_CACHE_DIR, "
        "or proxyq in the user's cache folder.",
    ),
]
NoCache = Annotated[bool, _option("--no-cache", panel=RUN, help="Keep and use no cache.")]
Device = Annotated[
    str | None,
    _option(
        "--device",
        metavar="cpu|gpu|tpu",
        panel=RUN,
        help="What computes. Default: the fastest that JAX finds.",
    ),
]
DeviceCount = Annotated[
    str | None,
    _option(
        "--devices",
        metavar="N|all",
        panel=RUN,
        help="Among how many devices images are split. Default: all of an accelerator, 1 on CPU.",
    ),
]

# Listings compute nothing: they take these options, as every command does, and need no help.
UnusedNumber = Annotated[int | None, typer.Option("--seed", hidden=True)]
UnusedFolder = Annotated[str | None, typer.Option("--cache-dir", hidden=True)]
UnusedFlag = Annotated[bool, typer.Option("--no-cache", hidden=True)]
UnusedDevice = Annotated[str | None, typer.Option("--device", hidden=True)]
