"""ATen operators in JAX, one table per topic.

A function here takes the operator's arguments in the order of its schema, arrays as JAX
arrays, dtypes as NumPy dtypes, and returns arrays. What only concerns torch (`device`,
`layout`, `pin_memory`, `memory_format`) is not passed on.
"""

from proxyq.model.torch_import.aten import (
    activation as activation,
)
from proxyq.model.torch_import.aten import (
    arithmetic as arithmetic,
)
from proxyq.model.torch_import.aten import (
    creation as creation,
)
from proxyq.model.torch_import.aten import (
    fourier as fourier,
)
from proxyq.model.torch_import.aten import (
    layers as layers,
)
from proxyq.model.torch_import.aten import (
    norm as norm,
)
from proxyq.model.torch_import.aten import (
    pooling as pooling,
)
from proxyq.model.torch_import.aten import (
    python as python,
)
from proxyq.model.torch_import.aten import (
    recurrent as recurrent,
)
from proxyq.model.torch_import.aten import (
    shape as shape,
)
from proxyq.model.torch_import.aten.norm import (
    batch_statistics as batch_statistics,
)
from proxyq.model.torch_import.aten.norm import (
    uses_running_statistics as uses_running_statistics,
)
from proxyq.model.torch_import.aten.table import complaint as complaint
from proxyq.model.torch_import.aten.table import find as find
from proxyq.model.torch_import.aten.table import register_aten as register_aten
