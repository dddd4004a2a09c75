"""Uniform quantization as pure array functions."""

from proxyq.quantize.grid import SCALE_BITS as SCALE_BITS
from proxyq.quantize.grid import Grid as Grid
from proxyq.quantize.grid import Range as Range
from proxyq.quantize.grid import Rounding as Rounding
from proxyq.quantize.grid import dequantize as dequantize
from proxyq.quantize.grid import fake_quantize as fake_quantize
from proxyq.quantize.grid import fit_grid as fit_grid
from proxyq.quantize.grid import quantize as quantize
from proxyq.quantize.grid import quantize_columns as quantize_columns
from proxyq.quantize.grid import resolved as resolved
from proxyq.widths import BITS as BITS
from proxyq.widths import GroupedBits as GroupedBits
from proxyq.widths import check_bits as check_bits
