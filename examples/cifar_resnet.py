"""The residual networks for CIFAR-10 of He et al. 2015 (arXiv:1512.03385, section 4.2).

Written as anyone would write them in torch, for use as MODEL on the command line:

    proxyq search examples/cifar_resnet.py:resnet20 --weights cifar10_resnet20.safetensors \\
        --data cifar10.npz:x_train,y_train --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \\
        --budget size=3bit --out plan.json

Depth is 6n + 2: three stages of n blocks with 16, 32 and 64 channels. The shortcuts have no
weights ("option A"): where a stage begins, they take every second row and column and fill
the new channels with zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut: (N, inputs, H, W) -> (N, width, H/s, W/s)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.new_channels = width - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.new_channels:
            half = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return torch.relu(out + x)


class CifarResNet(nn.Module):
    """Images (N, 3, 32, 32) -> logits (N, 10)."""

    input_shape = (3, 32, 32)

    def __init__(self, blocks: int, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, stride=1)
        self.layer2 = self._stage(blocks, 16, 32, stride=2)
        self.layer3 = self._stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(blocks: int, inputs: int, width: int, stride: int) -> nn.Sequential:
        rest = [Block(width, width, 1) for _ in range(blocks - 1)]
        return nn.Sequential(Block(inputs, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet20() -> CifarResNet:
    """269,722 parameters."""
    return CifarResNet(3)


def resnet32() -> CifarResNet:
    """464,154 parameters."""
    return CifarResNet(5)


def resnet44() -> CifarResNet:
    """658,586 parameters."""
    return CifarResNet(7)


def resnet56() -> CifarResNet:
    """853,018 parameters."""
    return CifarResNet(9)
