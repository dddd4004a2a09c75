"""Layer tables of ResNet-18, ResNet-50 and MobileNetV2 from their definitions (224 × 224).

Written out from the papers' descriptions of the architectures, so that published sizes and
operation counts can be recomputed without any network. Sizes follow OMPQ's counting: a
convolution has its weights and two batch-norm parameters a channel, the classifier weights
and biases, all at the layer's bits.
"""

from dataclasses import dataclass

CLASSES = 1000


@dataclass(frozen=True)
class Conv:
    """A convolution with batch norm, or (kernel 0) the classifier."""

    name: str
    c_in: int
    c_out: int
    kernel: int
    out: int
    depthwise: bool = False
    group: str | None = None

    @property
    def parameters(self) -> int:
        """Weights and batch-norm parameters; weights and biases of the classifier."""
        if self.kernel == 0:
            return (self.c_in + 1) * self.c_out
        return self.weights + 2 * self.c_out

    @property
    def weights(self) -> int:
        if self.kernel == 0:
            return self.c_in * self.c_out
        return self.kernel**2 * (1 if self.depthwise else self.c_in) * self.c_out

    @property
    def macs(self) -> int:
        return self.weights * self.out**2

    def flops(self, extra: int = 5, out: int | None = None) -> int:
        """OMPQ's count: (K² C_in C_out + extra C_out) H W; the classifier (2 C_in + 1) C_out."""
        if self.kernel == 0:
            return (2 * self.c_in + 1) * self.c_out
        return (self.weights + extra * self.c_out) * (self.out if out is None else out) ** 2


STEM = Conv("conv1", 3, 64, 7, 112)


@dataclass(frozen=True)
class Network:
    """`main` in network order without downsample convolutions, which `downsample` maps from
    the position in `main` of the last convolution of their block."""

    stem: Conv
    main: tuple[Conv, ...]
    downsample: dict[int, Conv]
    classifier: Conv

    def entries(self) -> list[list[Conv]]:
        """What shares one entry of a published list: a main convolution and its downsample."""
        return [
            [conv, *([self.downsample[i]] if i in self.downsample else [])]
            for i, conv in enumerate(self.main)
        ]


def resnet18() -> Network:
    main, downsample, width_in = [], {}, 64
    for stage, width in enumerate((64, 128, 256, 512)):
        out = 56 >> stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            main.append(Conv(f"{name}.conv1", width_in, width, 3, out))
            main.append(Conv(f"{name}.conv2", width, width, 3, out))
            if width_in != width:
                down = Conv(f"{name}.downsample.0", width_in, width, 1, out)
                downsample[len(main) - 1] = down
            width_in = width
    return Network(STEM, tuple(main), downsample, Conv("fc", 512, CLASSES, 0, 1))


def resnet50() -> Network:
    """Stride in the 3 × 3 convolution of a stage's first block, as torchvision's."""
    main, downsample, width_in = [], {}, 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        out = 56 >> stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            before = out * 2 if block == 0 and stage > 0 else out
            main.append(Conv(f"{name}.conv1", width_in, width, 1, before))
            main.append(Conv(f"{name}.conv2", width, width, 3, out))
            main.append(Conv(f"{name}.conv3", width, 4 * width, 1, out))
            if block == 0:
                down = Conv(f"{name}.downsample.0", width_in, 4 * width, 1, out)
                downsample[len(main) - 1] = down
            width_in = 4 * width
    return Network(STEM, tuple(main), downsample, Conv("fc", 2048, CLASSES, 0, 1))


def mobilenetv2() -> Network:
    settings = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
    settings += ((6, 160, 3, 2), (6, 320, 1, 1))
    main, width_in, out = [], 32, 112
    for expansion, width, repeats, stride in settings:
        for repeat in range(repeats):
            name, hidden = f"block{len(main)}", width_in * expansion
            if expansion > 1:
                main.append(Conv(f"{name}.expand", width_in, hidden, 1, out))
            out //= stride if repeat == 0 else 1
            main.append(Conv(f"{name}.depthwise", hidden, hidden, 3, out, depthwise=True))
            main.append(Conv(f"{name}.project", hidden, width, 1, out))
            width_in = width
    main.append(Conv("head", width_in, 1280, 1, out))
    stem = Conv("stem", 3, 32, 3, 112)
    return Network(stem, tuple(main), {}, Conv("fc", 1280, CLASSES, 0, 1))
