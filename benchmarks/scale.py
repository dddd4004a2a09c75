"""What proxies cost on a decoder of billions of weights: formulas, and a table from them.

Nothing is run. Multiply-accumulates are counted as the engine runs them: segment by segment, what
follows a changed layer and no more. `docs/scale.md` tells the formulas; `tests/test_scale.py`
holds them against what is counted on a small decoder.
"""

import argparse
from dataclasses import dataclass

LAYERS = ("query", "key", "value", "out", "gate", "up", "down")
GRID = 48 + 8 + 1  # looks at a weight to find its grid, and one to round it


@dataclass(frozen=True)
class Decoder:
    """A decoder with seven linear layers a block; full attention; a head that is not searched.

    `bytes` is of one number, weight or activation, as the network computes.
    """

    blocks: int = 32
    width: int = 4096
    mlp: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    tokens: int = 2048
    sequences: int = 128
    bytes: int = 2

    @property
    def layers(self) -> int:
        return len(LAYERS) * self.blocks

    @property
    def searched(self) -> int:
        """Weights of the searched layers: 4 d^2 + 3 d f a block."""
        return self.blocks * (4 * self.width**2 + 3 * self.width * self.mlp)

    @property
    def weights(self) -> int:
        """With the embedding and the head."""
        return self.searched + 2 * self.vocabulary * self.width

    def layer_macs(self) -> list[int]:
        """Of each layer, for one sequence: T d^2, or T d f."""
        square, wide = self.tokens * self.width**2, self.tokens * self.width * self.mlp
        return ([square] * 4 + [wide] * 3) * self.blocks

    @property
    def attention(self) -> int:
        """Of a block, for one sequence: scores and mixing, T^2 d each, nothing left out."""
        return 2 * self.tokens**2 * self.width

    @property
    def head(self) -> int:
        return self.tokens * self.width * self.vocabulary

    def segments(self) -> list[int]:
        """What runs from one layer to the next: attention follows `value`, the head the last."""
        found = self.layer_macs()
        for block in range(self.blocks):
            found[len(LAYERS) * block + LAYERS.index("value")] += self.attention
        found[-1] += self.head
        return found

    @property
    def forward(self) -> int:
        return sum(self.segments())

    @property
    def state(self) -> int:
        """Bytes of one sequence between two blocks."""
        return self.tokens * self.width * self.bytes

    @property
    def logits(self) -> int:
        """Of one sequence."""
        return self.tokens * self.vocabulary


# -- how often a segment is run: for layer i of L, counted from 0, B bit-widths ---------------


def sweep_runs(layers: int, bits: int) -> list[int]:
    """Reference and clean pass, then B runs for each layer up to this one."""
    return [2 + bits * (i + 1) for i in range(layers)]


def pair_runs(layers: int, bits: int) -> list[int]:
    """For each choice of a layer up to this one: alone, its state moved on, and for each layer
    between the two of them its B choices: 2 + sum over k <= i of B (2 + B k)."""
    return [2 + bits * (2 * (i + 1) + bits * i * (i + 1) // 2) for i in range(layers)]


def macs(decoder: Decoder, runs: list[int]) -> int:
    """For one sequence."""
    return sum(n * own for n, own in zip(runs, decoder.segments(), strict=True))


def output_error_macs(decoder: Decoder, bits: int) -> int:
    """A pass, and each layer's own output for each change of its weight."""
    return decoder.forward + bits * sum(decoder.layer_macs())


def probe_macs(decoder: Decoder) -> int:
    """One probe: forwards; back through every layer but the first to what it reads, and to each
    image's weights; through attention to both operands of both products, with the scores made
    again; through the head."""
    linear, first = sum(decoder.layer_macs()), decoder.layer_macs()[0]
    attention = 5 * decoder.attention // 2
    back = 2 * linear - first + decoder.blocks * attention + decoder.head
    return decoder.forward + back


def gram_macs(decoder: Decoder) -> int:
    """`X X'` of every layer, for the whole set: N^2 p, with p = T times the layer's channels."""
    channels = decoder.blocks * (5 * decoder.width + 2 * decoder.mlp)
    return decoder.sequences**2 * decoder.tokens * channels


# -- what has to be held ------------------------------------------------------------------------


def tape_bytes(decoder: Decoder) -> int:
    """As the engine reckons for one sequence: six times the layers' outputs, and its own
    gradient of the largest weight, with its square."""
    outputs = decoder.blocks * (5 * decoder.width + 2 * decoder.mlp) * decoder.tokens
    largest = decoder.width * max(decoder.mlp, decoder.width)
    return (6 * outputs + 2 * largest) * decoder.bytes


def scores_bytes(decoder: Decoder) -> int:
    """Attention's scores of one sequence: the largest tensor of a forward pass."""
    return decoder.heads * decoder.tokens**2 * decoder.bytes


def feature_bytes(decoder: Decoder) -> int:
    """The widest layer's feature for all sequences, in float32, as a Gram matrix needs it."""
    return decoder.sequences * decoder.tokens * decoder.mlp * 4


def rounded_bytes(decoder: Decoder, bits: int) -> int:
    """All layers at all bit-widths in float32: what a sweep holds as it stands."""
    return 4 * bits * decoder.searched


def change_bytes(decoder: Decoder, bits: int, positions: int) -> int:
    """Changes of one sequence's logits by all choices in float32, on the host, for couplings."""
    return 4 * decoder.layers * bits * positions * decoder.vocabulary


# -- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Accelerators: operations a second each, the share of them that is used, bytes of memory,
    bytes a second of memory and from disk; and seconds a host core takes for one logit."""

    peak: float = 990e12
    utilisation: float = 0.4
    memory: float = 80e9
    bandwidth: float = 3.35e12
    disk: float = 5e9
    logit: float = 6e-9

    def seconds(self, operations: float, devices: int) -> float:
        return operations / (devices * self.utilisation * self.peak)


@dataclass(frozen=True)
class Row:
    """A method: passes over all sequences, operations, bytes that a device holds with one
    sequence at a time and the network's weights, logits that go to the host."""

    name: str
    passes: float
    operations: float
    held: float
    logits: float


def rows(decoder: Decoder, bits: int, probes: int) -> list[Row]:
    """All methods."""
    many = decoder.sequences
    whole = 2 * decoder.forward * many
    weights = decoder.weights * decoder.bytes
    run = weights + 2 * scores_bytes(decoder) + 4 * decoder.state
    each = decoder.layers * bits

    def row(name: str, operations: float, held: float, changed: float) -> Row:
        return Row(name, operations / whole, operations, held, changed * many * decoder.logits)

    grams = whole + 2 * gram_macs(decoder)
    held = weights + feature_bytes(decoder) + 2 * many * decoder.state
    swept = 2 * macs(decoder, sweep_runs(decoder.layers, bits)) * many
    paired = 2 * macs(decoder, pair_runs(decoder.layers, bits)) * many
    rounded = rounded_bytes(decoder, bits)
    pairs = each + bits**2 * decoder.layers * (decoder.layers - 1) // 2
    return [
        row("sqnr", 0.0, decoder.bytes * decoder.searched, 0),
        row("output-error", 2 * output_error_macs(decoder, bits) * many, run, 0),
        row("orthogonality", grams, held, 0),
        row(
            f"hessian-trace, {probes} probes",
            2 * probes * probe_macs(decoder) * many,
            weights + tape_bytes(decoder),
            0,
        ),
        row("logit-coupling", swept, run + rounded, each),
        row("clado", paired, run + rounded, pairs),
    ]


def told(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.3g} s"


def printed(decoder: Decoder, machine: Machine, bits: int, probes: int) -> str:
    """The table, in Markdown."""
    lines = [
        "| method | passes | PFLOP | 1 device | 8 devices | GB a device | fits | logits to host |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for row in rows(decoder, bits, probes):
        one, eight = (told(machine.seconds(row.operations, n)) for n in (1, 8))
        if not row.operations:  # bound by memory: GRID looks at every weight for each width
            one = eight = told(4 * GRID * bits * decoder.searched / machine.bandwidth)
        passes = f"{row.passes:,.1f}" if row.passes < 1000 else f"{row.passes:,.0f}"
        lines.append(
            f"| {row.name} | {passes} | {row.operations / 1e15:,.0f} | {one} | {eight} "
            f"| {row.held / 1e9:.0f} | {'yes' if row.held <= machine.memory else 'no'} "
            f"| {row.logits:.2g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    plain, machine = Decoder(), Machine()
    for name in ("blocks", "width", "mlp", "heads", "vocabulary", "tokens", "sequences", "bytes"):
        parser.add_argument(f"--{name}", type=int, default=getattr(plain, name))
    parser.add_argument("--bits", type=int, default=4, help="how many bit-widths")
    parser.add_argument("--probes", type=int, default=32)
    parser.add_argument("--positions", type=int, default=32, help="tokens of a sequence measured")
    for name in ("peak", "utilisation", "memory"):
        parser.add_argument(f"--{name}", type=float, default=getattr(machine, name))
    args = parser.parse_args()
    decoder = Decoder(**{name: getattr(args, name) for name in vars(plain)})
    machine = Machine(peak=args.peak, utilisation=args.utilisation, memory=args.memory)
    second = machine.seconds(2 * decoder.forward * decoder.sequences, 1)
    print(f"{decoder.layers} layers, {decoder.searched / 1e9:.2f} G searched weights of", end=" ")
    print(f"{decoder.weights / 1e9:.2f} G; {decoder.sequences * decoder.tokens:,} tokens")
    print(f"a pass: {2 * decoder.forward * decoder.sequences / 1e15:.2f} PFLOP, {second:.1f} s\n")
    print(printed(decoder, machine, args.bits, args.probes))
    share = args.positions / decoder.tokens
    print(f"\nThe host's part on one core, with all {decoder.tokens} positions of a sequence, and")
    print(f"with {args.positions} of them:\n")
    for row in rows(decoder, args.bits, args.probes):
        if row.logits:
            seconds = row.logits * machine.logit
            print(f"- {row.name}: {told(seconds)}; {told(seconds * share)}")
    print("\nHeld beside that:\n")
    for name, value in (
        ("weights, all on every device", decoder.weights * decoder.bytes),
        ("all layers at all widths, float32", rounded_bytes(decoder, args.bits)),
        ("tape of one sequence", tape_bytes(decoder)),
        ("state of all sequences at a cut", decoder.sequences * decoder.state),
        ("state of one sequence, all choices", decoder.layers * args.bits * decoder.state),
        ("widest feature of all sequences", feature_bytes(decoder)),
        ("changes of logits, a sequence", change_bytes(decoder, args.bits, decoder.tokens)),
        (
            f"the same of {args.positions} positions",
            change_bytes(decoder, args.bits, args.positions),
        ),
    ):
        print(f"- {name}: {value / 1e9:,.3g} GB")
    read = decoder.weights * decoder.bytes / machine.disk
    print(f"\nReading the weights from disk once: {read:.1f} s; for each sequence: ", end="")
    print(f"{read * decoder.sequences / 60:.1f} min")


if __name__ == "__main__":
    main()
