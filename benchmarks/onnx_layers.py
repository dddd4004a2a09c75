"""One layer of a network as an ONNX model of its own, in float32 and in int8, ready to be timed.

int8 means what ONNX Runtime's CPU kernels compute: data in uint8 with a zero point, weights in
int8 with a scale for each output channel, sums in int32, and the output back in uint8
(`QLinearConv`, in the layout with channels last that ONNX Runtime itself chooses for a quantized
network, and `QLinearMatMul`). Values are random, for no kernel looks at them.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OPSET, IR = 17, 9
FLOAT_OPS = {"Conv", "ConvTranspose", "MatMul"}
INT8_OPS = {"QLinearConv", "QLinearMatMul"}
# Reorderings of the data that go with a kernel, and scalings folded into it.
MOVES = {"Transpose", "ReorderInput", "ReorderOutput", "Identity"}


@dataclass(frozen=True)
class Conv:
    """Data `(batch, channels, *sides)`, weight `(outputs, inputs of a group, *sides)`.

    `upsample` above 1 stands for a transposed convolution; `pads` are those before each side,
    then those after.
    """

    data: tuple[int, ...]
    weight: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    upsample: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class MatMul:
    """Data `(…, rows, fan-in)`, weight `(…, fan-in, channels)`."""

    data: tuple[int, ...]
    weight: tuple[int, ...]


def operation(eqn: Any, operand: int) -> Conv | MatMul:
    """What the equation of a layer computes; `operand` is the one that is the weight."""
    weight, data = eqn.invars[operand].aval.shape, eqn.invars[1 - operand].aval.shape
    if eqn.primitive.name == "conv_general_dilated":
        numbers, padding = eqn.params["dimension_numbers"], eqn.params["padding"]
        return Conv(
            data=tuple(data[axis] for axis in numbers.lhs_spec),
            weight=tuple(weight[axis] for axis in numbers.rhs_spec),
            strides=tuple(eqn.params["window_strides"]),
            pads=(*(low for low, _ in padding), *(high for _, high in padding)),
            dilations=tuple(eqn.params["rhs_dilation"]),
            upsample=tuple(eqn.params["lhs_dilation"]),
            groups=eqn.params["feature_group_count"],
        )
    contract, batch = eqn.params["dimension_numbers"]
    together = math.prod(weight[axis] for axis in batch[operand])
    fan_in = math.prod(weight[axis] for axis in contract[operand])
    rows = math.prod(data) // (together * fan_in)
    channels = math.prod(weight) // (together * fan_in)
    first = (together,) if together > 1 else ()
    return MatMul((*first, rows, fan_in), (*first, fan_in, channels))


class Kernel:
    """A layer in ONNX Runtime: calling it runs it once, on data that stays where it is."""

    def __init__(self, model: bytes, data: np.ndarray, threads: int):
        import onnxruntime as ort

        self._model, self._data, self._threads = model, data, threads
        self._session = self._started()
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(data))
        self._binding.bind_output("y")

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def output(self) -> np.ndarray:
        """What the layer computes."""
        return self._session.run(None, {"x": self._data})[0]

    def executed(self) -> set[str]:
        """The types of the operations that ONNX Runtime runs, from its own profile."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._started(profile=str(Path(folder) / "profile"))
            session.run(None, {"x": self._data})
            events = json.loads(Path(session.end_profiling()).read_text())
        return {event["args"]["op_name"] for event in events if event.get("cat") == "Node"}

    def _started(self, profile: str | None = None) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        return ort.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])


def float_kernel(op: Conv | MatMul, threads: int) -> Kernel:
    """The layer in float32."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=op.data).astype(np.float32)
    weight = rng.normal(size=op.weight).astype(np.float32)
    if isinstance(op, MatMul):
        return Kernel(_model("MatMul", ["x", "w"], data, {"w": weight}), data, threads)
    attributes = _attributes(op)
    if any(step > 1 for step in op.upsample):
        # ONNX counts the padding of a transposed convolution from its other end.
        reach = [d * (side - 1) for d, side in zip(op.dilations, op.weight[2:], strict=True)]
        attributes["pads"] = [max(0, r - p) for r, p in zip(reach * 2, op.pads, strict=True)]
        attributes["strides"] = list(op.upsample)
        shape = (op.groups, op.weight[0] // op.groups, *op.weight[1:])
        weight = np.moveaxis(weight.reshape(shape), 1, 2)
        weight = np.ascontiguousarray(weight.reshape(-1, shape[1], *op.weight[2:]))
        model = _model("ConvTranspose", ["x", "w"], data, {"w": weight}, **attributes)
    else:
        model = _model("Conv", ["x", "w"], data, {"w": weight}, **attributes)
    return Kernel(model, data, threads)


def int8_kernel(op: Conv | MatMul, threads: int) -> Kernel | None:
    """The layer in int8; `None` for transposed convolutions, which have no such kernel."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, op.data, np.uint8)
    weight = rng.integers(-127, 128, op.weight, np.int8)
    zero, middle = np.int8(0), np.uint8(128)
    one = {"xs": np.float32(0.02), "xz": middle, "ys": np.float32(0.5), "yz": middle}
    if isinstance(op, MatMul):
        channels = op.weight[-1:] if len(op.weight) == 2 else ()
        scale, zeros = np.full(channels, 0.01, np.float32), np.full(channels, zero)
        names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
        values = {**one, "w": weight, "ws": scale, "wz": zeros}
        return Kernel(_model("QLinearMatMul", names, data, values), data, threads)
    if any(step > 1 for step in op.upsample):
        return None
    scale, zeros = np.full(op.weight[0], 0.01, np.float32), np.full(op.weight[0], zero)
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    values = {**one, "w": weight, "ws": scale, "wz": zeros}
    data = np.ascontiguousarray(np.moveaxis(data, 1, -1))
    attributes = {**_attributes(op), "channels_last": 1, "domain": "com.microsoft"}
    return Kernel(_model("QLinearConv", names, data, values, **attributes), data, threads)


def empty_kernel(threads: int) -> Kernel:
    """Nothing at all: what a call takes by itself."""
    data = np.zeros(1, np.float32)
    return Kernel(_model("Identity", ["x"], data, {}), data, threads)


def _attributes(op: Conv) -> dict[str, Any]:
    return {
        "kernel_shape": list(op.weight[2:]),
        "strides": list(op.strides),
        "pads": list(op.pads),
        "dilations": list(op.dilations),
        "group": op.groups,
    }


def _model(
    kind: str, inputs: list[str], data: np.ndarray, values: dict[str, Any], **attributes: Any
) -> bytes:
    """A model of one operation, from `x` (like `data`) and constant `values` to `y`."""
    from onnx import helper, numpy_helper

    element = helper.np_dtype_to_tensor_dtype(data.dtype)
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, ["y"], **attributes)],
        "layer",
        [helper.make_tensor_value_info("x", element, data.shape)],
        [helper.make_tensor_value_info("y", element, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    sets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=IR).SerializeToString()
