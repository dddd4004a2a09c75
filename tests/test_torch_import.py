"""Torch modules as models: every operator against torch, whole networks, refusals."""

import importlib.util
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var

from proxyq.errors import ProxyqError, UsageError
from proxyq.model.explain import kept_float
from proxyq.model.network import network
from proxyq.model.torch_import import from_torch, import_torchvision, register_aten
from proxyq.model.torch_import.aten import table

torch = pytest.importorskip("torch")
F = torch.nn.functional
nn = torch.nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """torch's threads and XLA's wait for each other on few cores: seconds for a small network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Function(nn.Module):
    """A plain function as a module, with the modules that it calls."""

    def __init__(self, function, parts=()):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, *inputs):
        return self.function(*inputs)


def randomise(module, seed=0):
    """Batch-norm statistics and tensors that start at zero, made random so errors show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return module


def torch_output(module, *inputs):
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    with torch.no_grad():
        outputs = module(*inputs)
    for part, flag in flags:
        part.training = flag
    return outputs


def relative_error(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)


def images(batch, *shape, seed=0):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def random_inputs(example, batch):
    """Inputs like the example ones: normal numbers, or integers in their range."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(0, int(example.max()) + 1, shape, generator=generator)


def compare(actual, expected, tolerance, case=""):
    """Every output equal to torch's in shape, (narrowed) dtype and value."""
    wanted = torch.utils._pytree.tree_leaves(expected)
    found = jax.tree.leaves(actual)
    assert len(wanted) == len(found), case
    for a, e in zip(found, wanted, strict=True):
        assert tuple(a.shape) == tuple(e.shape), case
        dtype = str(e.dtype).removeprefix("torch.")
        assert str(a.dtype) == {"int64": "int32", "float64": "float32"}.get(dtype, dtype), case
        scale = float(e.double().nan_to_num(0, 0, 0).abs().max())
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            e.double().numpy(),
            rtol=tolerance,
            atol=tolerance * max(scale, 1e-3),
            err_msg=case,
        )


def check(module, *inputs, batches=(3,), tolerance=3e-5):
    """Import with the example inputs, compare with torch at other batch sizes."""
    model = from_torch(module, tuple(inputs) if len(inputs) > 1 else inputs[0])
    for batch in batches:
        tensors = [random_inputs(x, batch) for x in inputs]
        arrays = tuple(t.numpy() for t in tensors)
        actual = model(arrays if len(arrays) > 1 else arrays[0])
        compare(actual, torch_output(module, *tensors), tolerance)
    return model


def quick(function):
    """Compiled without optimisation: half the time, the same operators."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def check_all(cases, *inputs, parts=(), tolerance=3e-5):
    """`check` for functions by name, in one export: an export costs more than an operator."""
    module = Function(lambda *x: {case: function(*x) for case, function in cases.items()}, parts)
    model = from_torch(module, tuple(inputs) if len(inputs) > 1 else inputs[0])
    tensors = [random_inputs(x, 3) for x in inputs]
    arrays = tuple(t.numpy() for t in tensors)
    actual = quick(model.apply)(model.params, arrays if len(arrays) > 1 else arrays[0])
    expected = torch_output(module, *tensors)
    for case in cases:
        compare(actual[case], expected[case], tolerance, case)


X = images(2, 6)
MAP = images(2, 4, 9, 10)
LINE = images(2, 4, 11)
TOKENS = images(2, 5, 12)
CUBE = images(2, 4, 5, 6, 7)
INT = torch.randint(0, 7, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(30).reshape(5, 6) % 3 > 0

MODULES = {
    "linear": (lambda: nn.Linear(6, 5), X),
    "linear without bias, 3 axes": (lambda: nn.Linear(11, 5, bias=False), LINE),
    "bilinear": (lambda: nn.Bilinear(6, 6, 3), X, X),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, bias=True), LINE),
    "conv2d strided, dilated": (lambda: nn.Conv2d(4, 6, 3, (2, 1), (1, 2), (1, 2)), MAP),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), MAP),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, (3, 5), groups=4, padding=2), MAP),
    "conv2d same, even kernel": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), MAP),
    "conv2d same, dilated": (lambda: nn.Conv2d(4, 6, 2, padding="same", dilation=3), MAP),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), MAP),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), MAP),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), MAP),
    "conv3d": (lambda: nn.Conv3d(4, 2, (2, 3, 3), (1, 2, 1), 1), CUBE),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), LINE),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 4), (2, 3), (1, 0), (1, 2)), MAP),
    "conv_transpose2d grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2, bias=False),
        MAP,
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 2, 2, 2), CUBE),
    "embedding": (lambda: nn.Embedding(7, 3, padding_idx=0), INT),
    "batch_norm1d": (lambda: nn.BatchNorm1d(6), X),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4, eps=0.01), MAP),
    "batch_norm2d plain": (lambda: nn.BatchNorm2d(4, affine=False), MAP),
    "batch_norm3d": (lambda: nn.BatchNorm3d(4), CUBE),
    "layer_norm": (lambda: nn.LayerNorm((9, 10)), MAP),
    "layer_norm plain": (lambda: nn.LayerNorm(10, elementwise_affine=False), MAP),
    "layer_norm without bias": (lambda: nn.LayerNorm(10, bias=False), MAP),
    "rms_norm": (lambda: nn.RMSNorm(10), MAP),
    "group_norm": (lambda: nn.GroupNorm(2, 4), MAP),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(4, affine=True), MAP),
    "local_response_norm": (lambda: nn.LocalResponseNorm(2), MAP),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), MAP),
    "prelu": (lambda: nn.PReLU(4, 0.3), MAP),
    "prelu of one": (lambda: nn.PReLU(), X),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout()), MAP),
    "attention": (lambda: Attention(batch_first=True), LINE),
    "attention, batch second": (lambda: Attention(batch_first=False), LINE),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(12, 3, 24, batch_first=True),
        TOKENS,
    ),
    "encoder layer, norm first": (
        lambda: nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, norm_first=True),
        TOKENS,
    ),
    "upsample nearest": (lambda: nn.Upsample(scale_factor=2), MAP),
    "pixel_shuffle": (lambda: nn.PixelShuffle(2), MAP),
    "pixel_unshuffle": (lambda: nn.PixelUnshuffle(2), images(2, 3, 4, 6)),
    "channel_shuffle": (lambda: nn.ChannelShuffle(2), MAP),
    "unfold": (lambda: nn.Unfold((3, 2), dilation=2, padding=1, stride=2), MAP),
    "fold": (lambda: nn.Fold((6, 7), (3, 2), padding=1, stride=2), images(2, 24, 12)),
    "fold, dilated": (lambda: nn.Fold(7, 2, dilation=3, padding=(0, 1)), images(2, 12, 24)),
    "cosine_similarity": (lambda: nn.CosineSimilarity(dim=1), MAP, MAP),
}


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.inner = nn.MultiheadAttention(11, 1, batch_first=batch_first)
        self.first = batch_first

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        y = self.inner(x, x, x, need_weights=self.first)[0]
        return y if self.first else y.transpose(0, 1)


def test_modules():
    """All in one export, each with those of the inputs that it takes."""
    torch.manual_seed(0)
    every = list({id(x): x for _, *inputs in MODULES.values() for x in inputs}.values())
    cases, parts = {}, []
    for case, (build, *inputs) in MODULES.items():
        module = randomise(build())
        places = [next(i for i, x in enumerate(every) if x is wanted) for wanted in inputs]
        parts.append(module)
        cases[case] = lambda *x, module=module, places=places: module(*(x[i] for i in places))
    check_all(cases, *every, parts=parts)


ACTIVATIONS = (
    "relu relu6 sigmoid tanh silu gelu hardtanh hardsigmoid hardswish mish leaky_relu elu celu "
    "selu softplus softsign softshrink hardshrink logsigmoid tanhshrink"
).split()


def test_activations():
    cases = {name: lambda x, name=name: getattr(F, name)(4 * x) for name in ACTIVATIONS}
    check_all(cases, X)


UNARY = (
    "abs neg sign floor ceil round trunc frac square exp expm1 sin cos tan atan sinh cosh asinh "
    "tanh erf erfc isnan isinf isfinite logical_not reciprocal relu absolute negative positive "
    "fix arctan arcsinh sinc deg2rad rad2deg"
).split()
UNARY_OF_POSITIVE = "log log2 log10 log1p sqrt rsqrt exp2 acosh lgamma".split()

SPECIAL = "erf expm1 exp2 expit".split()


def test_functions_of_one_array():
    cases = {name: lambda x, name=name: getattr(torch, name)(x * 3) for name in UNARY}
    cases |= {
        name: lambda x, name=name: getattr(torch, name)(x.abs() + 1) for name in UNARY_OF_POSITIVE
    }
    cases |= {"asin": lambda x: torch.asin(x / 9), "atanh": lambda x: torch.atanh(x / 9)}
    cases |= {f"special_{f}": lambda x, f=f: getattr(torch.special, f)(x) for f in SPECIAL}
    cases |= {"arccos": lambda x: torch.arccos(x / 9)}
    check_all(cases, X)


BINARY = (
    "add sub mul div maximum minimum atan2 remainder fmod floor_divide eq ne ge gt le lt"
).split()

BINARY_OF_FLOATS = "arctan2 hypot copysign logaddexp logaddexp2 fmax fmin xlogy".split()


def test_functions_of_two_arrays():
    """Every pair of float, integer and number, broadcast."""
    cases = {}
    for name in BINARY:
        f = getattr(torch, name)
        cases[f"{name} floats"] = lambda x, i, f=f: f(x, x[:, :1].abs() + 0.5)
        cases[f"{name} float, int"] = lambda x, i, f=f: f(x, i + 1)
        cases[f"{name} int, float"] = lambda x, i, f=f: f(i, x.abs() + 1)
        if name != "atan2":
            cases[f"{name} ints"] = lambda x, i, f=f: f(i[:, :, None], 2 * i[:, None] - 7)
        if name not in ("maximum", "minimum", "atan2"):
            cases[f"{name} float, number"] = lambda x, i, f=f: f(x, 2.5)
            cases[f"{name} float, whole number"] = lambda x, i, f=f: f(x, -2)
            cases[f"{name} int, number"] = lambda x, i, f=f: f(i, 2.5)
            cases[f"{name} int, whole number"] = lambda x, i, f=f: f(i, 2)
    for name in BINARY_OF_FLOATS:
        f = getattr(torch, name)
        cases[name] = lambda x, i, f=f: f(x, x[:, :1].abs() + 0.5)
    check_all(cases, X, INT)


ATTENTION = [
    {},
    {"is_causal": True},
    {"scale": 0.3},
    {"attn_mask": torch.arange(20).reshape(4, 5) % 3 > 0},
    {"attn_mask": torch.arange(20.0).reshape(4, 5) / 10},
    {"attn_mask": torch.arange(4)[:, None].expand(4, 5) > 0},  # one row sees nothing
]


def test_scaled_dot_product_attention():
    cases = {
        str(place): lambda q, k, v, options=options: F.scaled_dot_product_attention(
            q, k, v, **options
        )
        for place, options in enumerate(ATTENTION)
    }
    check_all(cases, images(2, 3, 4, 8), images(2, 3, 5, 8, seed=1), images(2, 3, 5, 6))


def test_grouped_query_attention():
    def attend(q, k):
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    check(Function(attend), images(2, 6, 4, 8), images(2, 2, 5, 8))


POOLS = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max dilated": lambda x: F.max_pool2d(x, (3, 2), (1, 2), 1, (2, 3)),
    "max ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max ceil padded": lambda x: F.max_pool2d(x, 3, 3, 1, ceil_mode=True),
    "max ceil, last window dropped": lambda x: F.max_pool2d(x, 1, (4, 3), ceil_mode=True),
    "avg": lambda x: F.avg_pool2d(x, 2),
    "avg padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg padded, not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg ceil": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "avg ceil padded": lambda x: F.avg_pool2d(x, (4, 3), 3, 1, ceil_mode=True),
    "avg ceil, not counted": lambda x: F.avg_pool2d(x, 4, 3, 2, True, False),
    "avg divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=7),
    "adaptive avg 1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive avg dividing": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive avg not dividing": lambda x: F.adaptive_avg_pool2d(x, (4, 7)),
    "adaptive avg up": lambda x: F.adaptive_avg_pool2d(x, (13, None)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (4, 5)),
    "max 1d": lambda x: F.max_pool1d(x[..., 0], 3, 2, ceil_mode=True),
    "avg 1d": lambda x: F.avg_pool1d(x[..., 0], 3, 2, 1),
    "adaptive avg 1d": lambda x: F.adaptive_avg_pool1d(x[..., 0], 4),
    "adaptive max 1d": lambda x: F.adaptive_max_pool1d(x[..., 0], 4),
    "max 3d": lambda x: F.max_pool3d(x, 2, 1),
    "avg 3d": lambda x: F.avg_pool3d(x, 2, 2, 1),
    "adaptive avg 3d": lambda x: F.adaptive_avg_pool3d(x, (2, 4, 3)),
    "lp": lambda x: F.lp_pool2d(x.abs(), 2, 3),
}


def test_pooling():
    check_all(POOLS, MAP)


def resize(**options):
    return lambda x: F.interpolate(x, **options)


RESIZES = {
    "nearest size": resize(size=(7, 23)),
    "nearest factor": resize(scale_factor=1.7),
    "nearest exact": resize(size=(7, 23), mode="nearest-exact"),
    "bilinear": resize(size=(14, 6), mode="bilinear"),
    "bilinear corners": resize(size=(14, 1), mode="bilinear", align_corners=True),
    "bilinear factor": resize(scale_factor=1.3, mode="bilinear"),
    "bilinear recomputed": resize(scale_factor=1.3, mode="bilinear", recompute_scale_factor=True),
    "bicubic": resize(size=(14, 6), mode="bicubic"),
    "bicubic corners": resize(size=(5, 23), mode="bicubic", align_corners=True),
    "bicubic factor": resize(scale_factor=(0.8, 2.1), mode="bicubic"),
    "bilinear smoothed": resize(size=(4, 23), mode="bilinear", antialias=True),
    "bilinear smoothed corners": resize(
        size=(3, 10), mode="bilinear", antialias=True, align_corners=True
    ),
    "bicubic smoothed": resize(size=(4, 23), mode="bicubic", antialias=True),
    "bicubic smoothed factor": resize(scale_factor=(0.4, 1.3), mode="bicubic", antialias=True),
    "nearest 1d": lambda x: F.interpolate(x[..., 0], 5),
    "linear": lambda x: F.interpolate(x[..., 0], 5, mode="linear"),
    "trilinear": lambda x: F.interpolate(x[:, None], (5, 11, 4), mode="trilinear"),
}


def test_resizing():
    check_all(RESIZES, MAP)


REDUCTIONS = {
    "mean": lambda x: x.mean((2, 3)),
    "mean keep": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum((1, -1)),
    "sum int": lambda x: (x > 0).sum(1),
    "prod": lambda x: x.prod(-1),
    "cumsum": lambda x: x.cumsum(2),
    "cumprod": lambda x: x.cumprod(-1),
    "cummax": lambda x: x.round().cummax(-1),
    "cummin": lambda x: x.round().cummin(2),
    "diff": lambda x: (x.diff(2, 1), (x > 0).diff(prepend=x[..., :1] > 1)),
    "aminmax": lambda x: tuple(x.aminmax(dim=1, keepdim=True)),
    "count_nonzero": lambda x: (x > 0).count_nonzero((1, 3)),
    "var": lambda x: x.var(1),
    "var biased": lambda x: x.var((2, 3), unbiased=False, keepdim=True),
    "std": lambda x: x.std(-1, correction=2),
    "var_mean": lambda x: torch.var_mean(x, (1, 2), keepdim=True),
    "std_mean": lambda x: torch.std_mean(x, 1),
    "amax": lambda x: x.amax((1, 2), keepdim=True),
    "amin": lambda x: x.amin(-1),
    "max dim": lambda x: x.max(1),
    "min dim": lambda x: x.min(2, keepdim=True),
    "argmax": lambda x: x.argmax(1),
    "argmin": lambda x: x.argmin(-1, keepdim=True),
    "topk": lambda x: x.topk(3, dim=2),
    "topk smallest": lambda x: x.topk(2, largest=False),
    "sort": lambda x: x.sort(1, descending=True),
    "argsort": lambda x: x.argsort(-1),
    "logsumexp": lambda x: x.logsumexp((1, 2)),
    "histc": lambda x: x[:, 0, 0, :1] * torch.histc(x[:1, 0], 5, -1, 1.5),
    "histc between extremes": lambda x: x[:, 0, 0, :1] * torch.histc(x[:1, 0], 4),
    "any": lambda x: (x > 2).any(1),
    "all": lambda x: (x > -2).all(-1, keepdim=True),
    "norm": lambda x: x.norm(dim=1),
    "vector_norm 1": lambda x: torch.linalg.vector_norm(x, 1, dim=(1, 2)),
    "vector_norm 3": lambda x: torch.linalg.vector_norm(x, 3, dim=-1, keepdim=True),
    "vector_norm inf": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "softmax": lambda x: x.softmax(1),
    "softmax of integers": lambda x: F.softmax((x * 3).long(), -1, dtype=torch.float32),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "softmin": lambda x: F.softmin(x, 1),
}


def test_reductions():
    check_all(REDUCTIONS, MAP)


LOWEST = torch.finfo(torch.float64).min
ARITHMETIC = {
    "add alpha": lambda x: torch.add(x, x, alpha=3),
    "rsub": lambda x: 2 - x,
    "div floor": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "div trunc": lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    "int div trunc": lambda x: torch.div((x * 9).long(), 2, rounding_mode="trunc"),
    "int true div": lambda x: (x * 9).long() / 2,
    "pow 3": lambda x: x**3,
    "pow 0.5": lambda x: x.abs() ** 0.5,
    "pow -1": lambda x: (x.abs() + 1) ** -1,
    "number to the power": lambda x: 2**x,
    "int pow": lambda x: (x * 3).long() ** 2,
    "clamp": lambda x: x.clamp(-0.5, 0.2),
    "clamp arrays": lambda x: x.clamp(x.mean(-1, keepdim=True), x.amax(-1, keepdim=True) / 2),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp_max(0.1),
    "int clamp by float": lambda x: (x * 3).long().clamp(min=0.5),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1, value=0.5),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "where int": lambda x: torch.where(x > 0, 1, 0),
    "masked_fill": lambda x: x.masked_fill(x > 0, float("-inf")).exp(),
    "masked_fill lowest": lambda x: x.double().masked_fill(x > 0, LOWEST).exp(),
    "nan_to_num": lambda x: (x / 0).nan_to_num(1.0, 2.0, 3.0),
    "logical": lambda x: (x > 0).logical_and(x < 1).logical_or(x < -1).logical_xor(x < -2),
    "bitwise": lambda x: ((x > 0) & (x < 1) | ~(x < 2)) ^ (x > 3),
    "bool times float": lambda x: (x > 0) * x,
    "bool plus bool": lambda x: (x > 0).float() + (x > 1),
    "int and float array": lambda x: (x * 3).int() + x,
    "uint8": lambda x: (x.abs() * 3).to(torch.uint8) + 1,
    "threshold": lambda x: F.threshold(x, 0.1, -3.0),
    "glu": lambda x: F.glu(x, 1),
    "gelu tanh": lambda x: F.gelu(x * 2, approximate="tanh"),
    "softplus": lambda x: F.softplus(x * 9, beta=2, threshold=5),
    "elu alpha": lambda x: F.elu(x, 0.7),
    "celu": lambda x: F.celu(x, 0.7),
    "hardtanh": lambda x: F.hardtanh(x, -0.2, 0.6),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "matmul broadcast": lambda x: x @ torch.ones(10, 3),
    "matmul vector": lambda x: x @ torch.arange(10.0),
    "bmm": lambda x: torch.bmm(x[:, 0], x[:, 1].transpose(1, 2)),
    "baddbmm": lambda x: torch.baddbmm(x[:, 2, :, :9], x[:, 0], x[:, 1].mT, beta=2, alpha=0.5),
    "addmm": lambda x: torch.addmm(torch.ones(3), x[:, 0, 0], torch.ones(10, 3), alpha=2),
    "einsum": lambda x: torch.einsum("n c h w, n d h w -> n c d", x, x),
    "autocast": lambda x: _autocast(x),
    "no_grad": lambda x: _no_grad(x),
}


def _autocast(x):
    with torch.autocast("cpu", enabled=False):
        return x * 2


def _no_grad(x):
    with torch.no_grad():
        y = x * 2
    return y + x


def test_arithmetic():
    check_all(ARITHMETIC, MAP)


def test_array_without_axes_does_not_promote():
    check(Function(lambda x: x.half() * torch.tensor(0.5)), MAP)


def _assign(x):
    y = torch.zeros_like(x)
    y[:, 1:3, ::2] = x[:, 1:3, ::2]
    y[:, 0, 2] = 1.5
    y[x > 1] = 7.0
    return y


def _scatter(x):
    where = (x[:, :, :2, :5].abs() * 3).long().clamp(max=3)
    return x.scatter(1, where, x), x.scatter(1, where, 2.0), x.gather(1, where)


SHAPES = {
    "view": lambda x: x.view(len(x), -1),
    "reshape": lambda x: x.permute(0, 3, 1, 2).reshape(x.shape[0], 5, -1),
    "flatten": lambda x: torch.flatten(x, 1, 2),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "transpose": lambda x: x.transpose(1, -1).contiguous(),
    "movedim": lambda x: x.movedim((1, 2), (3, 1)),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, 10),
    "expand in front": lambda x: x.mean(1)[None].expand(3, *x.mean(1).shape).transpose(0, 1),
    "expand with len": lambda x: torch.arange(3.0)[None].expand(len(x), 3) + x[:, 0, 0, :3],
    "squeeze": lambda x: x[:, :1].squeeze(1).unsqueeze(-1).squeeze(),
    "squeeze dims": lambda x: x[:, :1, :1].squeeze((1, 2, 3)),
    "cat": lambda x: torch.cat([x, x.flip(1), torch.zeros(len(x), 1, 9, 10)], 1),
    "cat promotes": lambda x: torch.cat([x, (x > 0).long()], 2),
    "stack": lambda x: torch.stack([x, x * 2], dim=2),
    "split": lambda x: x.split(4, dim=3),
    "split sizes": lambda x: x.split([1, 5, 4], -1),
    "chunk": lambda x: x.chunk(3, dim=2),
    "tensor_split": lambda x: x.tensor_split(4, dim=2),
    "unbind": lambda x: x.unbind(1),
    "select": lambda x: x[:, -1, 2],
    "slice": lambda x: x[:, 1:, -4:-1, ::3],
    "slice of the batch": lambda x: torch.cat([x[1:], x[:1]]),
    "narrow": lambda x: x.narrow(2, 3, 4),
    "assign": _assign,
    "scatter and gather": _scatter,
    "scatter_add": lambda x: x.scatter_add(1, torch.zeros(x.shape, dtype=torch.long), x),
    "roll": lambda x: x.roll((1, -2), (2, 3)).roll(3, 1),
    "flip": lambda x: x.flip((1, 3)),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=2),
    "index": lambda x: x[:, [2, 0], [1, 3]],
    "index apart": lambda x: x[:, [2, 0], :, [1, 3]].transpose(0, 1),
    "index by arrays": lambda x: x[:, :, torch.tensor([[0, 2], [8, 1]])],
    "index_select": lambda x: x.index_select(2, torch.tensor([4, 4, 0])),
    "index_put": lambda x: x.index_put((torch.arange(len(x)), torch.tensor(1)), x[:, 0]),
    "take_along_dim": lambda x: x.take_along_dim(x.argsort(1), 1),
    "index_add": lambda x: x.index_add(1, torch.tensor([2, 2, 0]), x[:, 1:], alpha=0.5),
    "index_copy": lambda x: x.index_copy(3, torch.tensor([8, 1]), x[..., :2]),
    "index_fill": lambda x: x.index_fill(2, torch.tensor([8, 1]), 3.0),
    "searchsorted": lambda x: torch.searchsorted(AX3, x.round(), right=True),
    "bucketize": lambda x: torch.bucketize(x.round(), AX3),
    "rot90": lambda x: x.rot90(1, (2, 3)).fliplr().flipud().flipud().swapdims(1, 2),
    "hstack": lambda x: torch.hstack([x, 2 * x]),
    "vstack": lambda x: torch.vstack([x, 2 * x])[: len(x)],
    "diagonal": lambda x: x.diagonal(1, 2, 3),
    "tril": lambda x: x.tril(1) - x.triu(-1),
    "unfold": lambda x: x.unfold(3, 4, 3),
    "meshgrid": lambda x: x[..., :3, :2] + sum(torch.meshgrid(AX3, AX2, indexing="ij")),
    "pad": lambda x: F.pad(x, (1, 2, 0, 3), value=1.5),
    "pad negative": lambda x: F.pad(x, (-1, 2, 1, -2)),
    "pad reflect": lambda x: F.pad(x, (2, 1, 3, 0), mode="reflect"),
    "pad replicate": lambda x: F.pad(x, (2, 1, 3, 0), mode="replicate"),
    "pad circular": lambda x: F.pad(x, (2, 1, 3, 0), mode="circular"),
    "one_hot": lambda x: F.one_hot((x[:, 0, 0] > 0).long(), 4),
    "arange": lambda x: x + torch.arange(10) + torch.arange(0, 1, 0.1),
    "linspace": lambda x: x * torch.linspace(-1, 1, 10),
    "new": lambda x: x + x.new_ones(10) + x.new_zeros(1) + x.new_full((9, 1), 2.0),
    "like": lambda x: torch.ones_like(x) + torch.zeros_like(x) + torch.full_like(x, 3),
    "full": lambda x: x + torch.full((len(x), 1, 1, 10), 2.0) + torch.eye(9, 10),
    "type": lambda x: (x.double() * 2, x.to(torch.int64), x.bool(), x.half().float()),
    "type_as": lambda x: (x > 0).type_as(x),
    "named tuple": lambda x: Pair(x, x + 1),
}
AX3, AX2 = torch.arange(3.0), torch.arange(2.0)
Pair = namedtuple("Pair", "first second")


def test_shapes():
    check_all(SHAPES, MAP)


FOURIER = {
    "fft": lambda x: torch.fft.fft(x).abs(),
    "fft and ifft": lambda x: torch.fft.ifft(torch.fft.fft(x, dim=2) * 2j, 7, 2, "forward").real,
    "rfft and irfft": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) + 1, 4, dim=1),
    "fft2": lambda x: torch.fft.fft2(x, (4, 12)).imag,
    "rfft2 and irfft2": lambda x: torch.fft.irfft2(
        torch.fft.rfft2(x, norm="ortho") * torch.complex(x[..., 4:], x[..., :6]),
        s=(9, 10),
        norm="ortho",
    ),
    "fftn and ifftn": lambda x: torch.fft.ifftn(torch.fft.fftn(x, dim=(1, 3)), dim=(1,)).imag,
    "rfftn and irfftn": lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2)), dim=(1, 2)),
    "shift": lambda x: (torch.fft.fftshift(x), torch.fft.ifftshift(x, dim=(2,))),
    "polar": lambda x: torch.polar(x, x).conj().imag,
    "angle": lambda x: (torch.complex(x, x + 1).angle(), x.angle()),
    "view_as_complex": lambda x: torch.view_as_complex(x.unflatten(3, (5, 2))).sum(1).real,
    "view_as_real": lambda x: torch.view_as_real(torch.fft.fft(x).mean(-1)),
    "product of complex": lambda x: torch.view_as_real(torch.fft.fft(x) @ torch.fft.fft(x).mH),
    "adjoint": lambda x: torch.fft.fft(x).adjoint().imag,
}


def test_fourier_transforms_and_complex_numbers():
    check_all(FOURIER, MAP)


class Recurrent(nn.Module):
    """Examples first in all that comes out: outputs, last states."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        first = self.inner.batch_first
        y, states = self.inner(x if first else x.transpose(0, 1))
        states = states if isinstance(states, tuple) else (states,)
        return y if first else y.transpose(0, 1), [state.transpose(0, 1) for state in states]


RECURRENT = {
    "lstm": lambda: nn.LSTM(12, 5, 2, batch_first=True, bidirectional=True),
    "lstm with projection": lambda: nn.LSTM(12, 5, 2, bias=False, proj_size=3),
    "gru": lambda: nn.GRU(12, 5, 2, bidirectional=True, dropout=0.5),
    "tanh": lambda: nn.RNN(12, 5, batch_first=True),
    "relu": lambda: nn.RNN(12, 5, 2, nonlinearity="relu", batch_first=True),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_recurrent_layers():
    torch.manual_seed(0)
    parts = {case: Recurrent(build()) for case, build in RECURRENT.items()}
    check_all(dict(parts), TOKENS, parts=list(parts.values()))


def test_weights_of_recurrent_layers_are_layers():
    """Of the input in one product over all steps, of the state in one for each step."""
    torch.manual_seed(0)
    module = Recurrent(nn.LSTM(12, 6, 2, batch_first=True, bidirectional=True))
    layers = {layer.name: layer for layer in network(from_torch(module, (5, 12)), 2).layers}
    assert len(layers) == 8
    assert layers["inner.weight_ih_l0"].output_shape == (5, 24)
    assert layers["inner.weight_ih_l1_reverse"].output_shape == (5, 24)
    assert layers["inner.weight_ih_l1"].macs == 5 * 24 * 12
    # Step 1 starts from the zeros that torch gives, which are no data.
    assert layers["inner.weight_hh_l0"].macs == 4 * 24 * 6
    assert layers["inner.weight_hh_l1_reverse"].weights == 24 * 6


@pytest.mark.slow
def test_experts_of_transformers():
    """Routed products are run, though their weights are no layers and stay float."""
    import_torchvision()  # transformers asks for it
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        num_local_experts=3,
        vocab_size=30,
        use_cache=False,
    )
    model = check(transformers.MixtralModel(config), torch.randint(0, 30, (2, 7)), batches=(4,))
    found = network(model, 2)
    assert "layers.0.mlp.gate.weight" in {layer.parameter for layer in found.layers}
    experts = [one for one in kept_float(found) if "experts" in one.parameter]
    assert [one.weights for one in experts] == [3 * 16 * 48, 3 * 24 * 16]
    assert {one.why for one in experts} == {"experts that tokens are routed to"}


def test_raw_batch_norm_has_running_and_batch_statistics():
    """The undecomposed operator, which other exporters leave in the graph."""
    generator = np.random.default_rng(0)
    x, w, b, m, v = (generator.random(s, np.float32) for s in [(3, 4, 5), 4, 4, 4, 4])
    tensors = [torch.from_numpy(a) for a in (x, m, v, w, b)]
    function = table.find("aten.batch_norm.default")
    for training in (False, True):
        expected = F.batch_norm(*[t.clone() for t in tensors], training, 0.1, 1e-5)
        actual = function(x, w, b, m, v, training, 0.1, 1e-5, True)
        np.testing.assert_allclose(actual, expected.numpy(), rtol=2e-5, atol=2e-5)


def test_convolution_in_general_form():
    x, w = images(2, 4, 6, 7).numpy(), images(6, 2, 3, 3).numpy()
    function = table.find("aten.convolution.default")
    arguments = ([2, 1], [1, 0], [1, 1], False, [0, 0], 2)
    expected = torch.convolution(torch.from_numpy(x), torch.from_numpy(w), None, *arguments)
    np.testing.assert_allclose(function(x, w, None, *arguments), expected, rtol=1e-5, atol=1e-5)
    w = images(4, 3, 3, 3).numpy()
    arguments = ([2, 1], [1, 0], [1, 1], True, [1, 0], 2)
    expected = torch.convolution(torch.from_numpy(x), torch.from_numpy(w), None, *arguments)
    np.testing.assert_allclose(function(x, w, None, *arguments), expected, rtol=1e-5, atol=1e-5)


# -- whole networks ----------------------------------------------------------------------

NETWORKS = {
    "resnet18": 64,
    "resnet50": 64,
    "mobilenet_v2": 64,
    "vgg11_bn": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "vit_b_16": 64,
    "swin_t": 64,
}


LARGE = ("resnet50", "vgg11_bn", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in NETWORKS]
)
def test_network_of_torchvision_equals_torch(name):
    models = import_torchvision().models
    size = NETWORKS[name]
    options = {"image_size": size} if name == "vit_b_16" else {}
    torch.manual_seed(0)
    module = randomise(models.get_model(name, weights=None, **options))
    model = from_torch(module, (3, size, size))
    assert set(model.params) == {
        *(key for key, _ in module.named_parameters()),
        *(key for key, _ in module.named_buffers() if "num_batches_tracked" not in key),
    }
    x = images(3, 3, size, size)
    expected = torch_output(module, x)
    apply = quick(model.apply)
    for batch in (2, 3):
        actual = apply(model.params, x[:batch].numpy())
        assert relative_error(actual, expected[:batch]) < 1e-4


@pytest.mark.data
def test_cifar_resnet_with_its_weights_equals_torch(cifar):
    from safetensors.torch import load_file

    module = _cifar_module("resnet20")
    module.load_state_dict(load_file(cifar / "cifar10_resnet20.safetensors"), strict=False)
    with np.load(cifar / "cifar10.npz") as archive:
        pixels, labels = archive["x_test"][:20], archive["y_test"][:20]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = ((pixels / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    model = from_torch(module, module.input_shape)
    logits = jax.jit(model.apply)(model.params, x)
    assert relative_error(logits, torch_output(module, torch.from_numpy(x))) < 1e-5
    assert (np.asarray(logits).argmax(axis=1) == labels).mean() >= 0.85


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet20", 269_722), ("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018)],
)
def test_cifar_resnets_have_their_published_sizes(name, count):
    assert sum(p.numel() for p in _cifar_module(name).parameters()) == count


def _cifar_module(name):
    spec = importlib.util.spec_from_file_location("cifar_resnet", EXAMPLES / "cifar_resnet.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return getattr(code, name)()


# -- batch sizes -------------------------------------------------------------------------


class ReadsLength(nn.Module):
    """A class token, attention over tokens, and Python that asks for the batch size."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 6))
        self.mix = nn.Linear(6, 18)

    def forward(self, x):
        n = len(x)
        x = torch.cat([self.token.expand(n, -1, -1), x], dim=1)
        q, k, v = self.mix(x).reshape(n, -1, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        windows = y.reshape(n * 2, -1, 3).mean(1).view(n, 6)
        return windows + torch.zeros(n, 1)


def test_python_that_reads_the_batch_size():
    check(ReadsLength(), images(2, 4, 6), batches=(1, 2, 3, 35))


def test_model_dimensions_equal_to_the_probes():
    """5 and 7 are what exports would be made at; here they are sizes of the model too."""
    module = nn.Sequential(nn.Conv2d(5, 7, 3, padding=1), nn.Flatten(), nn.Linear(7 * 35, 5))
    check(module, images(2, 5, 7, 5), batches=(2, 5, 7))


def test_literals_that_are_no_multiple_of_the_batch_are_exported_symbolically():
    def mixed(x):
        n = x.shape[0]  # len(x) would be a plain number there
        half = x[: n // 2 + 1].sum(0, keepdim=True)
        return x * (n - 1) + half + torch.arange(n)[:, None] % 3

    check(Function(mixed), X, batches=(2, 3, 8, 9))


def test_branches_on_the_batch_size_are_mapped_over_single_examples():
    def branching(x):
        return x.mean(1, keepdim=True) * 2 if len(x) % 3 == 2 else x.mean(1, keepdim=True) * 2 + 0

    check(Function(branching), X, batches=(1, 2, 3, 4))


def test_branches_that_also_mix_examples_are_refused():
    def mixing(x):
        return x - x.mean(0, keepdim=True) * (1 if len(x) % 3 == 2 else 2)

    with pytest.raises(ProxyqError, match="depend on the others in its batch"):
        from_torch(Function(mixing), (6,))


def test_model_that_takes_one_example_only_is_mapped():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 3, 3)
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            assert len(x) == 1
            return self.bn(self.conv(x)).mean((2, 3))

    module = randomise(Single())
    model = from_torch(module, (4, 9, 10))
    x = images(4, 4, 9, 10)
    expected = torch.cat([torch_output(module, x[i : i + 1]) for i in range(4)])
    assert relative_error(model(x.numpy()), expected) < 1e-5
    conv = torch_output(module.conv, x)
    trained = F.batch_norm(conv, None, None, module.bn.weight, module.bn.bias, training=True)
    expected = trained.mean((2, 3)).detach()
    actual = model.batch_statistics_apply(model.params, x.numpy())
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_wrong_input_shape_is_refused_in_one_sentence():
    model = from_torch(nn.Linear(6, 2), (6,))
    with pytest.raises(UsageError, match=r"takes inputs of shape \(batch, 6\), got \(3, 5\)"):
        model(np.zeros((3, 5), np.float32))


def test_an_output_without_the_batch_is_refused():
    with pytest.raises(ProxyqError, match="batch as its first axis"):
        from_torch(Function(lambda x: x.mean()), (6,))


# -- structure ---------------------------------------------------------------------------


def test_several_inputs_by_position_and_by_name():
    class Two(nn.Module):
        def forward(self, ids, mask):
            return {"sum": (ids * mask).sum(1), "all": [ids, mask]}

    example = (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3))
    model = from_torch(Two(), example)
    ids, mask = np.arange(12).reshape(4, 3), np.ones((4, 3), np.float32)
    outputs = model((ids, mask))
    np.testing.assert_array_equal(outputs["sum"], ids.sum(1))
    assert next(iter(outputs)) == "sum"  # the order of the model, not of the alphabet
    assert model.inputs[0].dtype == np.int32 and model.inputs[0].shape == (3,)

    named = from_torch(Two(), {"mask": example[1], "ids": example[0]})
    outputs = named({"ids": ids, "mask": mask})
    np.testing.assert_array_equal(outputs["all"][0], ids)
    assert named.image_layout is None


def test_tied_weights_are_one_array_under_the_first_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model = check(Tied(), X)
    assert set(model.params) == {"first.weight", "first.bias", "second.bias"}
    changed = {**model.params, "first.weight": np.zeros((6, 6), np.float32)}
    outputs = model.apply(changed, X.numpy())
    np.testing.assert_allclose(outputs, np.broadcast_to(model.params["second.bias"], (2, 6)))


def test_buffers_are_frozen_and_constants_have_no_name():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))
            self.register_buffer("table", torch.arange(6))
            self.register_buffer("hidden", torch.ones(6), persistent=False)
            self.plain = torch.full((6,), 3.0)
            self.bn = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.bn(x * self.weight + self.table * self.hidden + self.plain)

    model = check(randomise(Held()), X)
    assert model.frozen == {"table", "hidden", "bn.running_mean", "bn.running_var"}
    assert set(model.params) - model.frozen == {"weight", "bn.weight", "bn.bias"}
    assert model.params["table"].dtype == np.int32
    assert all(type(value) is np.ndarray for value in model.params.values())


def test_the_module_is_left_as_it_was():
    module = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.BatchNorm1d(6))
    module[2].eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    model = from_torch(module, (6,))
    assert [part.training for part in module] == [True, True, False]
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.no_grad():
        module[0].weight.zero_()
    assert np.any(model.params["0.weight"])


def test_half_precision_module_is_computed_in_float32():
    module = nn.Linear(6, 3).to(torch.bfloat16)
    model = from_torch(module, (6,))
    assert module.weight.dtype == torch.bfloat16
    assert model.params["weight"].dtype == np.float32
    assert relative_error(model(X.numpy()), torch_output(nn.Linear.float(module), X)) < 1e-5


def test_batch_norm_scale_and_shift_are_vectors_of_parameters_only():
    """Per channel, before any input is seen: what the graph hoists and folds."""
    model = from_torch(nn.BatchNorm2d(4), (4, 9, 10))
    jaxpr = jax.make_jaxpr(model.apply)(model.params, model.example(3)).jaxpr
    depends = {jaxpr.invars[-1]}
    on_inputs = []
    for equation in jaxpr.eqns:
        if any(isinstance(v, Var) and v in depends for v in equation.invars):
            depends.update(equation.outvars)
            on_inputs.append(equation.primitive.name)
    assert on_inputs == ["mul", "add"]


def test_batch_statistics_are_those_of_training():
    torch.manual_seed(0)
    module = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(8, 4, 3),
            nn.BatchNorm2d(4, affine=False),
        )
    )
    model = from_torch(module, (3, 12, 12))
    x = images(6, 3, 12, 12)
    evaluated = torch_output(module, x)
    assert relative_error(model(x.numpy()), evaluated) < 1e-5
    for part in module:
        part.train(isinstance(part, nn.BatchNorm2d))
    with torch.no_grad():
        expected = module(x)
    actual = jax.jit(model.batch_statistics_apply)(model.params, x.numpy())
    assert relative_error(actual, expected) < 1e-5
    assert relative_error(evaluated, expected) > 0.1
    plain = from_torch(nn.Linear(6, 6), (6,))  # no batch norm: both functions are the same
    x = X.numpy()
    np.testing.assert_array_equal(plain.batch_statistics_apply(plain.params, x), plain(x))


def test_gradients_equal_those_of_torch():
    torch.manual_seed(0)
    module = randomise(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2, 2, 1))
    ).eval()
    model = from_torch(module, (3, 8, 8))
    x = images(3, 3, 8, 8)
    module(x).square().sum().backward()
    gradients = jax.grad(
        lambda weights: jnp.sum(model.apply({**model.params, **weights}, x.numpy()) ** 2)
    )({key: value for key, value in model.params.items() if key not in model.frozen})
    for key, parameter in module.named_parameters():
        assert relative_error(gradients[key], parameter.grad) < 1e-4


# -- refusals ----------------------------------------------------------------------------


def test_every_missing_operator_is_named_with_its_module():
    class Inner(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x) + torch.digamma(x)

    module = nn.Sequential(nn.ReLU(), Inner(), Function(lambda x: torch.special.bessel_j0(x)))
    with pytest.raises(ProxyqError) as caught:
        from_torch(module, (6,), name="odd")
    message = str(caught.value)
    assert message.startswith("odd uses operators that have no JAX counterpart yet: ")
    assert "special_bessel_j0 (in 1), digamma (in 1)" in message
    assert "register_aten('special_bessel_j0')" in message
    assert "\n" not in message


def test_an_operator_can_be_added():
    module = Function(lambda x: torch.digamma(x.abs() + 1))
    with pytest.raises(ProxyqError, match="digamma"):
        from_torch(module, (6,))
    register_aten("digamma")(jax.scipy.special.digamma)
    try:
        check(module, X)
        with pytest.raises(UsageError, match="registered already"):
            register_aten("aten.digamma")(jax.scipy.special.digamma)
    finally:
        del table._TABLE["aten.digamma"]


def test_an_operator_of_another_library_can_be_added():
    library = torch.library.Library("proxyq_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CPU")
    library.impl("twice", lambda x: torch.empty_like(x), "Meta")
    module = Function(lambda x: torch.ops.proxyq_test.twice(x))
    with pytest.raises(ProxyqError, match=r"register_aten\('proxyq_test::twice'\)"):
        from_torch(module, (6,))
    register_aten("proxyq_test::twice")(lambda x: 2 * x)
    try:
        check(module, X)
    finally:
        del table._TABLE["proxyq_test.twice"]


def test_randomness_and_training_are_refused():
    with pytest.raises(ProxyqError, match="drops activations at random in evaluation mode"):
        from_torch(Function(lambda x: F.dropout(x, 0.5, training=True)), (6,))

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(6)

        def forward(self, x):
            self.bn.train()
            return self.bn(x)

    with pytest.raises(ProxyqError, match=r"updates the running statistics .*\(in bn\)"):
        from_torch(Stubborn(), (6,))


def test_indices_of_pooling_are_refused_but_not_its_values():
    def unpool(x):
        y, where = F.max_pool2d(x, 3, return_indices=True)
        return F.max_unpool2d(y, where, 3)

    with pytest.raises(ProxyqError, match=r"max_pool2d_with_indices \(its indices\)"):
        from_torch(Function(unpool), (4, 9, 9))
    check(Function(lambda x: F.max_pool2d(x, 3, return_indices=True)[0]), MAP)


def test_what_cannot_be_exported_is_one_sentence(capfd):
    with pytest.raises(ProxyqError, match=r"torch.export cannot trace Function \(") as caught:
        from_torch(Function(lambda x: x if x.sum() > 0 else -x), (6,))
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err  # torch prints the graph up to the branch
    with pytest.raises(UsageError, match=r"must be a torch\.nn\.Module, got type"):
        from_torch(nn.Linear, (6,))
    with pytest.raises(UsageError, match="positive sizes"):
        from_torch(nn.Linear(6, 6), (0,))
    with pytest.raises(UsageError, match="leading batch axis"):
        from_torch(nn.Linear(6, 6), torch.tensor(1.0))
