"""Which architectures the torch bridge takes: layers found, parity with torch, time.

Every network has random weights, drawn so that nothing starts at zero (a head of zeros would make
any two implementations agree), and is run in torch and in proxyq on the same two inputs, a batch
size that it was not exported at. Each takes a process of its own; a row is written as soon as it
is measured, and one that is there already is not measured again.

    python benchmarks/architectures.py --into rows/ --out docs/architectures.md
    python benchmarks/architectures.py --into rows/ --only timm:levit_128s
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TORCHVISION = """
alexnet convnext_tiny convnext_small convnext_base convnext_large densenet121 densenet161
densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3
efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_s
efficientnet_v2_m efficientnet_v2_l googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75
mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf
regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf
regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf
regnet_y_32gf resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d
resnext101_64x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
squeezenet1_0 squeezenet1_1 swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b vgg11 vgg11_bn
vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_l_16 vit_l_32
wide_resnet50_2 wide_resnet101_2
""".split()
"""All of torchvision's networks for classification but its two of 600 million parameters."""

TIMM = """
beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_nano_rw_224
convit_tiny convmixer_768_32 convnextv2_atto cpubone_nano crossvit_9_240 csatv2 cspnext_tiny
cspresnet50 davit_tiny deit3_small_patch16_224 deit_tiny_patch16_224 densenetblur121d dla34 dpn68
eca_nfnet_l0 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1
efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
fbnetc_100 focalnet_tiny_srf gcvit_xxtiny gernet_s ghostnet_100 halonet26t hardcorenas_a
hgnet_tiny hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t inception_next_tiny
inception_resnet_v2 inception_v4 lambda_resnet26t lcnet_050 lcnetv2_small legacy_seresnet18
legacy_xception levit_128s lowformer_b0 mambaout_femto maxvit_tiny_tf_224 mixer_s32_224 mixnet_s
mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
naflexvit_base_patch16_gap nest_tiny nextvit_small nf_resnet50 pit_ti_224 poolformer_s12
pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetv_040 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9
res2net50_26w_4s resmlp_12_224 resnest14d resnetv2_50 rexnet_100 rexnetr_200
samvit_base_patch16_224 selecsls42b sequencer2d_s seresnet18 shvit_s1 skresnet18 starnet_s1
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_pcpvt_small vgg11 visformer_tiny
vit_relpos_small_patch16_224 vit_small_patch14_dinov2 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
vitamin_small_224 volo_d1_224 xception41 xcit_nano_12_p16_224
""".split()

TRANSFORMERS = """
albert bart-encoder bert bigbird bloom convbert deberta deberta-v2 distilbert electra esm falcon
fnet funnel gemma2 gemma3 gpt-bigcode gpt-j gpt-neo gpt-neox gpt2 granite llama longformer minilm
mistral mixtral mobilebert modernbert mpnet mpt olmo2 opt phi phi3 qwen2 qwen3 roberta roformer
squeezebert stablelm starcoder2 t5-encoder xlm xlnet vit deit swin convnextv2 dinov2 clip-vision
siglip-vision
""".split()

WIDE = 1e-5
"""A parity above it is shown beside what torch's own rounding does."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--into", required=True, help="folder for measured rows")
    parser.add_argument("--out", help="write the table here, in Markdown")
    parser.add_argument("--only", help="specs, with commas between")
    parser.add_argument("--again", action="store_true", help="measure failures once more")
    parser.add_argument("--seconds", type=float, default=900, help="limit for each network")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("\n" + json.dumps(measured(args.one)))
        return
    into = Path(args.into)
    into.mkdir(parents=True, exist_ok=True)
    specs = args.only.split(",") if args.only else every()
    for spec in specs:
        file = into / f"{spec.replace(':', '-')}.json"
        if file.is_file() and not (args.again and "error" in json.loads(file.read_text())):
            continue
        row = in_a_process(spec, args.seconds)
        file.write_text(json.dumps(row) + "\n")
        print(spec, row.get("error") or f"{row['layers']} layers, {row['parity']:.1e}", flush=True)
    if args.out:
        from proxyq.files import write_atomic

        files = [into / f"{spec.replace(':', '-')}.json" for spec in every()]
        rows = [json.loads(file.read_text()) for file in files if file.is_file()]
        done = {row["spec"] for row in rows}
        waiting = [spec for spec in every() if spec not in done]
        write_atomic(args.out, "\n".join(table(rows, waiting)) + "\n")


def every() -> list[str]:
    """All specs, in the table's order."""
    kinds = {"torchvision": TORCHVISION, "timm": sorted(TIMM), "transformers": TRANSFORMERS}
    return [f"{library}:{name}" for library, names in kinds.items() for name in names]


def in_a_process(spec: str, seconds: float) -> dict[str, Any]:
    """The row of one network, or why there is none."""
    command = [sys.executable, __file__, "--into", ".", "--one", spec]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"spec": spec, "error": f"more than {seconds:.0f} s"}
    last = (done.stdout.strip() or "?").splitlines()[-1]
    if done.returncode == 0 and last.startswith("{"):
        return json.loads(last)
    return {"spec": spec, "error": (done.stderr.strip() or f"code {done.returncode}")[-600:]}


def measured(spec: str) -> dict[str, Any]:
    """Build, convert, trace and run one network."""
    import jax
    import numpy as np

    import proxyq
    from proxyq.model.model import logits_of
    from proxyq.model.network import network
    from proxyq.model.torch_import import import_torch, import_torchvision

    torch = import_torch()
    import_torchvision()
    torch.manual_seed(0)
    module, example = built(spec)
    randomise(module)
    inputs = drawn(example)
    with torch.no_grad():
        theirs = first_tensor(called(module, inputs)).numpy()
    start = time.process_time()
    shape = tuple(example) if isinstance(example, list) else example
    model = proxyq.from_torch(module, shape, name=spec.partition(":")[2])
    exported = time.process_time() - start
    start = time.process_time()
    found = network(model, 2)
    traced = time.process_time() - start
    arrays = jax.tree.map(lambda x: x.numpy(), inputs)
    ours = np.asarray(logits_of(jax.jit(model.apply)(model.params, arrays)))
    parity = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    kinds: dict[str, int] = {}
    for layer in found.layers:
        kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
    row = {
        "spec": spec,
        "parameters": sum(p.numel() for p in module.parameters()),
        "layers": len(found.layers),
        "kinds": kinds,
        "parity": parity,
        "spread": float(theirs.std()),
        "export_cpu_s": round(exported, 1),
        "trace_cpu_s": round(traced, 1),
    }
    if parity > WIDE:
        row["torch_rounding"] = rounding(module, inputs, theirs)
    return row


def rounding(module: Any, inputs: Any, single: Any) -> float:
    """How far torch's float32 outputs are from its float64 ones, relative to the largest."""
    import numpy as np
    import torch

    def double(x: Any) -> Any:
        return x.double() if x.is_floating_point() else x

    with torch.no_grad():
        exact = called(module.double(), torch.utils._pytree.tree_map(double, inputs))
    exact = first_tensor(exact).numpy()
    return float(np.abs(single - exact).max() / np.abs(exact).max())


# -- networks ----------------------------------------------------------------------------


def built(spec: str) -> tuple[Any, Any]:
    """A module in evaluation mode, and the shape of one example or a dictionary of tensors."""
    library, _, name = spec.partition(":")
    if library == "torchvision":
        from torchvision.models import get_model, get_model_weights

        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        prepared = get_model_weights(name).DEFAULT.transforms()
        return get_model(name, weights=None, **options).eval(), [3, *prepared.crop_size * 2]
    if library == "timm":
        import timm

        module = timm.create_model(name, pretrained=False).eval()
        return module, list(timm.data.resolve_model_data_config(module)["input_size"])
    return of_transformers(name)


def of_transformers(name: str) -> tuple[Any, Any]:
    """Networks of transformers at the sizes of their default configurations, with few layers."""
    import torch
    import transformers as hf

    ids = torch.randint(5, 1000, (1, 24), generator=torch.Generator().manual_seed(1))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    few = {"num_hidden_layers": 4}
    middle = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "vocab_size": 8000,
        **few,
    }
    decoder = {**middle, "num_key_value_heads": 4, "use_cache": False, "pad_token_id": 0}
    old = {"n_embd": 512, "n_layer": 4, "n_head": 8, "vocab_size": 8000, "use_cache": False}
    made: dict[str, Any] = {
        "albert": lambda: hf.AlbertModel(
            hf.AlbertConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, **few)
        ),
        "bart-encoder": lambda: hf.BartModel(hf.BartConfig(encoder_layers=3)).get_encoder(),
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**few)),
        "bigbird": lambda: hf.BigBirdModel(
            hf.BigBirdConfig(attention_type="original_full", **middle)
        ),
        "bloom": lambda: hf.BloomForCausalLM(
            hf.BloomConfig(hidden_size=512, n_layer=4, n_head=8, vocab_size=8000, use_cache=False)
        ),
        "convbert": lambda: hf.ConvBertModel(hf.ConvBertConfig(**few)),
        "deberta": lambda: hf.DebertaModel(hf.DebertaConfig(**middle)),
        "deberta-v2": lambda: hf.DebertaV2Model(
            hf.DebertaV2Config(
                relative_attention=True,
                position_buckets=256,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,
                norm_rel_ebd="layer_norm",
                **middle,
            )
        ),
        "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig()),
        "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**few)),
        "esm": lambda: hf.EsmModel(hf.EsmConfig(pad_token_id=0, mask_token_id=1, **middle)),
        "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**decoder)),
        "fnet": lambda: hf.FNetModel(hf.FNetConfig(**few)),
        "funnel": lambda: hf.FunnelModel(hf.FunnelConfig(block_sizes=[2, 2, 2])),
        "gemma2": lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(head_dim=64, sliding_window=8, **decoder)
        ),
        "gemma3": lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(head_dim=64, sliding_window=8, **decoder)
        ),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=4, use_cache=False)),
        "gpt-bigcode": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**old)),
        "gpt-j": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(rotary_dim=32, **old)),
        "gpt-neo": lambda: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(
                hidden_size=512,
                num_layers=4,
                attention_types=[[["global", "local"], 2]],
                num_heads=8,
                use_cache=False,
            )
        ),
        "gpt-neox": lambda: hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(
                hidden_size=512,
                intermediate_size=1024,
                num_attention_heads=8,
                vocab_size=8000,
                use_cache=False,
                **few,
            )
        ),
        "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**decoder)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**decoder)),
        "longformer": lambda: hf.LongformerModel(hf.LongformerConfig(attention_window=8, **middle)),
        "minilm": lambda: hf.BertModel(
            hf.BertConfig(
                hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
            )
        ),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**decoder)),
        "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, **decoder)),
        "mobilebert": lambda: hf.MobileBertModel(hf.MobileBertConfig(**few)),
        "modernbert": lambda: hf.ModernBertModel(
            hf.ModernBertConfig(
                pad_token_id=0,
                **{key + "_token_id": 1 for key in ("eos", "bos", "cls", "sep")},
                **middle,
            )
        ),
        "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**few)),
        "mpt": lambda: hf.MptForCausalLM(
            hf.MptConfig(d_model=512, n_layers=4, n_heads=8, vocab_size=8000, use_cache=False)
        ),
        "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(eos_token_id=1, **decoder)),
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=512, ffn_dim=1024, num_attention_heads=8, use_cache=False, **few
            )
        ),
        "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**decoder)),
        "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(eos_token_id=1, **decoder)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**decoder)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=64, **decoder)),
        "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**few)),
        "roformer": lambda: hf.RoFormerModel(hf.RoFormerConfig(**middle)),
        "squeezebert": lambda: hf.SqueezeBertModel(hf.SqueezeBertConfig(**few)),
        "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**decoder)),
        "starcoder2": lambda: hf.Starcoder2ForCausalLM(
            hf.Starcoder2Config(bos_token_id=1, eos_token_id=1, **decoder)
        ),
        "t5-encoder": lambda: hf.T5EncoderModel(hf.T5Config()),
        "xlm": lambda: hf.XLMModel(
            hf.XLMConfig(vocab_size=8000, emb_dim=512, n_layers=4, n_heads=8)
        ),
        "xlnet": lambda: hf.XLNetModel(
            hf.XLNetConfig(
                vocab_size=8000,
                d_model=512,
                n_layer=4,
                n_head=8,
                d_inner=1024,
                use_mems_eval=False,
            )
        ),
    }
    images: dict[str, Any] = {
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**few)),
        "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**few)),
        "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig()),
        "convnextv2": lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config()),
        "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**few)),
        "clip-vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**few)),
        "siglip-vision": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**few)),
    }
    if name in images:
        return images[name]().eval(), [3, 224, 224]
    return made[name]().eval(), tokens


def randomise(module: Any) -> None:
    """Batch norms as if trained, and no parameter all of one value."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in module.modules():
            if (
                isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
                and part.running_var is not None
            ):
                part.running_mean.normal_(0, 0.1, generator=generator)
                part.running_var.uniform_(0.7, 1.4, generator=generator)
        for value in module.parameters():
            if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
                value += 0.05 * torch.randn(value.shape, generator=generator)


def drawn(example: Any) -> Any:
    """Two inputs."""
    import torch

    generator = torch.Generator().manual_seed(2)
    if isinstance(example, list):
        return torch.randn(2, *example, generator=generator)
    other = torch.randint(5, 1000, example["input_ids"].shape, generator=generator)
    mask = torch.ones_like(other)
    mask[:, -7:] = 0  # padding
    return {
        "input_ids": torch.cat([example["input_ids"], other]),
        "attention_mask": torch.cat([example["attention_mask"], mask]),
    }


def called(module: Any, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)


def first_tensor(outputs: Any) -> Any:
    """What proxyq takes for the logits: the first tensor of whatever comes out."""
    import torch

    leaves = torch.utils._pytree.tree_leaves(outputs)
    return next(leaf for leaf in leaves if torch.is_tensor(leaf))


# -- the page ----------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], waiting: Sequence[str] = ()) -> list[str]:
    """Markdown from the rows; `waiting` are specs that are not measured yet."""
    fine = [row for row in rows if "error" not in row]
    close = [row for row in fine if row["parity"] <= 1e-4]
    lines = [
        "# Architectures",
        "",
        f"{len(close)} of {len(rows)} networks give torch's outputs within 1e-4 of the largest, on "
        "two inputs, with random weights, at a batch size that they were not exported at. "
        "Parity is the largest difference of the outputs (the first that a network returns) "
        "relative to the largest output"
        + (
            f"; where it is above {WIDE:g}, torch's own float32 outputs are as far from its "
            "float64 ones as stands in brackets. "
            if any("torch_rounding" in row for row in fine)
            else ". "
        )
        + "Export and trace are CPU seconds of the process, without "
        "compiling"
        + (
            "; rows without them are of a time when only wall clock was measured. "
            if any("export_cpu_s" not in row for row in fine)
            else ". "
        )
        + "`python benchmarks/architectures.py` makes this page.",
    ]
    for library in ("torchvision", "timm", "transformers"):
        lines += [
            "",
            f"## {library}",
            "",
            "| network | parameters | layers | of which | parity | export CPU s | trace CPU s |",
            "|---|---:|---:|---|---:|---:|---:|",
        ]
        for row in rows:
            if not row["spec"].startswith(library + ":"):
                continue
            name = row["spec"].partition(":")[2]
            if "error" in row:
                last = row["error"].strip().splitlines()[-1].replace("|", "/")
                last = re.sub(r"^proxyq\.errors\.\w+: ", "", last)[:300]
                lines.append(f"| {name} | | | {last} | | | |")
                continue
            kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(row["kinds"].items()))
            seconds = [
                f"{row[key]:.1f}" if key in row else "" for key in ("export_cpu_s", "trace_cpu_s")
            ]
            parity = f"{row['parity']:.1e}"
            if "torch_rounding" in row:
                parity += f" ({row['torch_rounding']:.1e})"
            lines.append(
                f"| {name} | {row['parameters'] / 1e6:.1f} M | {row['layers']} | {kinds} | "
                f"{parity} | {seconds[0]} | {seconds[1]} |"
            )
        names = [spec.partition(":")[2] for spec in waiting if spec.startswith(library + ":")]
        if names:
            lines += ["", f"Not measured yet: {', '.join(names)}."]
    return lines


if __name__ == "__main__":
    main()
