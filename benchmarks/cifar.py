"""The networks of `examples/cifar_resnet.py`, for the benchmarks that time them."""

import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cifar_resnet.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resnet(name):
    """`resnet20` … `resnet56` as a torch module."""
    spec = importlib.util.spec_from_file_location("cifar_resnet", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def resnet20():
    """ResNet-20 as a torch module."""
    return resnet("resnet20")


def folded(module):
    """A copy in evaluation mode with every batch norm folded into its convolution."""
    import copy

    from torch.nn import Identity
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    module = copy.deepcopy(module).eval()
    for owner in list(module.modules()):
        for name in ("1", "2"):
            if hasattr(owner, f"bn{name}"):
                conv, norm = getattr(owner, f"conv{name}"), getattr(owner, f"bn{name}")
                setattr(owner, f"conv{name}", fuse_conv_bn_eval(conv, norm))
                setattr(owner, f"bn{name}", Identity())
    return module
