"""The engine: segmented execution, taps, perturbation sweeps, derivatives."""

from proxyq.engine.engine import Edits as Edits
from proxyq.engine.engine import Engine as Engine
from proxyq.engine.gradients import GRADIENT_NEEDS as GRADIENT_NEEDS
from proxyq.engine.segments import NO_EDIT as NO_EDIT
from proxyq.engine.segments import Edit as Edit
from proxyq.engine.segments import compiled_count as compiled_count
from proxyq.engine.sweep import single_layer_sweep as single_layer_sweep
from proxyq.engine.taps import GOVERNS as GOVERNS
from proxyq.engine.taps import NEEDS as NEEDS
from proxyq.engine.taps import OF_ALL as OF_ALL
from proxyq.engine.taps import PAIR_NEEDS as PAIR_NEEDS
from proxyq.engine.taps import SWEEP_NEEDS as SWEEP_NEEDS
from proxyq.engine.taps import LayerTap as LayerTap
from proxyq.engine.taps import TapOptions as TapOptions
from proxyq.engine.taps import Taps as Taps
from proxyq.engine.taps import collect as collect
from proxyq.engine.taps import pair_rows as pair_rows
