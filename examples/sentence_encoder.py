"""A sentence encoder as its users write it: a network of transformers, its tokens averaged.

    export PROXYQ_ENCODER=all-MiniLM-L6-v2/
    proxyq search examples/sentence_encoder.py:encoder --data text:sentences.txt --budget size=4bit

`PROXYQ_ENCODER` is a folder with `config.json` and `model.safetensors`, or a name of the hub. The
outputs are unit vectors times 20, the factor that such networks are trained with, so that a KL
between two of them is their distance.
"""

import os

import torch
import transformers
from torch import nn

import proxyq

TOKENS = 32


class SentenceEncoder(nn.Module):
    """Tokens and their mask, both `[batch, TOKENS]`, to embeddings `[batch, width]`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, input_ids, attention_mask):
        states = self.network(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask[..., None].to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        return 20 * nn.functional.normalize(mean, dim=-1)


def encoder() -> proxyq.Model:
    """The encoder in the folder that the environment names, with its tokenizer."""
    folder = os.environ["PROXYQ_ENCODER"]
    network = transformers.AutoModel.from_pretrained(
        folder, use_safetensors=True, add_pooling_layer=False
    )
    ids = torch.ones((1, TOKENS), dtype=torch.int64)
    return proxyq.from_torch(
        SentenceEncoder(network.eval()),
        {"input_ids": ids, "attention_mask": ids.clone()},
        name="sentence-encoder",
        identity={"tokenizer": folder},
    )
