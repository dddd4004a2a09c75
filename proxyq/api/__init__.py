"""The library calls behind the commands: one file for each.

`search` walks the whole road (model, data, proxy, allocation, plan, accuracy); `score` and
`allocate` are its two halves, with a file between them; `pareto` answers for a range of budgets;
`evaluate` measures plans, `table` many random ones, against which `rank` holds proxies and from
which `evolve` makes new ones;
`write_report` shows plans on a page; `quantize_model` applies a plan, `pack` writes what it makes,
`export_model` for other programs;
`inspect` shows what a model is made of, `doctor` whether what is installed works.
"""

from proxyq.api.allocate import allocate as allocate
from proxyq.api.doctor import Diagnosis as Diagnosis
from proxyq.api.doctor import doctor as doctor
from proxyq.api.evaluate import Evaluation as Evaluation
from proxyq.api.evaluate import Measured as Measured
from proxyq.api.evaluate import evaluate as evaluate
from proxyq.api.evolve import Evolution as Evolution
from proxyq.api.evolve import evolve as evolve
from proxyq.api.export import export_model as export_model
from proxyq.api.inputs import as_data as as_data
from proxyq.api.inputs import as_model as as_model
from proxyq.api.inputs import inputs_of as inputs_of
from proxyq.api.inspect import inspect as inspect
from proxyq.api.method import AUTO as AUTO
from proxyq.api.method import DEFAULT_BITS as DEFAULT_BITS
from proxyq.api.method import DEFAULT_SAMPLES as DEFAULT_SAMPLES
from proxyq.api.method import Method as Method
from proxyq.api.method import method_of as method_of
from proxyq.api.model_spec import ModelSpec as ModelSpec
from proxyq.api.pareto import DEFAULT_POINTS as DEFAULT_POINTS
from proxyq.api.pareto import pareto as pareto
from proxyq.api.quantize import Packed as Packed
from proxyq.api.quantize import check_plan_fits as check_plan_fits
from proxyq.api.quantize import pack as pack
from proxyq.api.quantize import quantize_model as quantize_model
from proxyq.api.rank import RankResult as RankResult
from proxyq.api.rank import rank as rank
from proxyq.api.report import write_report as write_report
from proxyq.api.score import score as score
from proxyq.api.search import DEFAULT_BUDGET as DEFAULT_BUDGET
from proxyq.api.search import search as search
from proxyq.api.table import DEFAULT_TABLE_BITS as DEFAULT_TABLE_BITS
from proxyq.api.table import table as table
