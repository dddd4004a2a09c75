"""A torch network quantized, exported to ONNX and run there. Needs `pip install 'proxyq[onnx]'`.

Random convolutions and a least-squares layer on top classify the digits; nothing is trained.
The number: top-1 in ONNX Runtime on the 400 test images, in percent.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import proxyq
from proxyq.model.digits import digits_images


def images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 8, 8) from 0 to 1, channels first as torch has them, and labels."""
    pixels, labels = digits_images(split)
    return pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255, labels


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.head = nn.Linear(512, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return x.flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


torch.manual_seed(0)
module = Net().eval()
x, labels = images("calibration")
with torch.no_grad():
    features = module.features(torch.from_numpy(x)).double().numpy()
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    # Ridge regression on the classes: (F'F + c I) W = F' Y
    gram = features.T @ features + 1e-3 * np.eye(513)
    solved = np.linalg.solve(gram, features.T @ (10.0 * np.eye(10)[labels])).astype(np.float32)
    module.head.weight.copy_(torch.from_numpy(solved[:-1].T))
    module.head.bias.copy_(torch.from_numpy(solved[-1]))

model = proxyq.from_torch(module, (1, 8, 8), name="random-convolutions")
plan = proxyq.search(model, x, proxy="output-error", budget="size=4bit", activation_bits=8)
print(plan)

test, truth = images("test")
with tempfile.TemporaryDirectory() as folder:
    done = proxyq.export_model(model, plan, x, to="onnx", out=Path(folder) / "net.onnx")
    (path,) = done.paths
    print(f"\n{path.name}: {path.stat().st_size:,} bytes, weights {done.size_bits // 8:,} of them")
    options = onnxruntime.SessionOptions()
    # Else ONNX Runtime rounds what meets integer weights in a matrix product to 8 bits itself.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options)
    name = session.get_inputs()[0].name
    (logits,) = session.run(None, {name: test})

ours = proxyq.quantize_model(model, plan, x).logits(test)
print(f"largest difference from proxyq's logits: {np.abs(logits - np.asarray(ours)).max():.1e}")
with torch.no_grad():
    top1 = 100 * (module(torch.from_numpy(test)).numpy().argmax(axis=1) == truth).mean()
print(f"float in torch: {top1:.2f} %")
print(f"\ntop-1 in ONNX Runtime: {100 * (logits.argmax(axis=1) == truth).mean():.2f}")
