"""A `torch.nn.Module` becomes a `Model`: `torch.export`, then ATen operators in JAX.

    model = proxyq.from_torch(torchvision.models.resnet18(), (3, 224, 224))

`register_aten` adds an operator that proxyq lacks. torch is imported when it is first
needed, never by importing this package.
"""

from proxyq.model.torch_import.aten import register_aten as register_aten
from proxyq.model.torch_import.convert import from_torch as from_torch
from proxyq.model.torch_import.convert import read_parameters as read_parameters
from proxyq.model.torch_import.require import import_torch as import_torch
from proxyq.model.torch_import.require import import_torchvision as import_torchvision
