"""A tiny Llama, its tokenizer and film reviews, for examples that need no hub.

The model is untrained, so an example shows the code and no real result. With `--model` an example
takes any causal language model from the hub.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

GOOD = """
a warm and funny film with a great cast
the story is clever and the ending is lovely
great acting and a lovely score
a clever film that is warm and moving
moving , funny and never slow
the cast is great and the jokes are funny
a lovely story , told with warm humour
never dull , always clever
the score is lovely and the acting is moving
i enjoyed every minute of this clever film
a great film with a moving story
funny from the first minute to the last
warm , clever and well told
the best film of the year , great fun
the acting is great and the story is moving
i enjoyed the cast and the lovely ending
a funny and moving story
well told , and the score is great
this film is clever , warm and great fun
i enjoyed the humour and the acting
"""
BAD = """
a cold and boring film with a weak cast
the story is silly and the ending is awful
weak acting and an awful score
a silly film that is cold and boring
boring , slow and never funny
the cast is weak and the jokes are silly
an awful story , told with cold humour
always dull , never clever
the score is awful and the acting is boring
i hated every minute of this silly film
a weak film with a boring story
dull from the first minute to the last
cold , silly and badly told
the worst film of the year , awful
the acting is weak and the story is boring
i hated the cast and the awful ending
a slow and boring story
badly told , and the score is weak
this film is silly , cold and awful
i hated the humour and the acting
"""
REVIEWS = [
    (line, label)
    for pair in zip(GOOD.strip().splitlines(), BAD.strip().splitlines(), strict=True)
    for line, label in zip(pair, (" good", " bad"), strict=True)
]
TRAIN, DEV = REVIEWS[:32], REVIEWS[32:]


def prompt(review: str) -> str:
    return f"review : {review} sentiment :"


def load(name: str | None) -> tuple[Any, Any]:
    """Load a model and its tokenizer from the hub or a folder.

    Without a name, make the tiny ones.
    """
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tokenizer
    texts = [prompt(review) + label for review, label in REVIEWS]
    words = ["<pad>", "<unk>", "<eos>", *sorted({w for text in texts for w in text.split()})]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config), tokenizer


def encode(tokenizer: Any, rows: list[tuple[str, str]]) -> list[dict[str, list[int]]]:
    """Return token ids. Only the label is scored."""
    encoded = []
    for review, label in rows:
        ids = tokenizer(prompt(review))["input_ids"]
        answer = tokenizer(label, add_special_tokens=False)["input_ids"]
        encoded.append({"input_ids": ids + answer, "labels": [-100] * len(ids) + answer})
    return encoded


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right. Return input_ids, attention_mask and labels, each [rows, longest]."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "labels": padded("labels", -100),
    }


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: list[tuple[str, str]]) -> float:
    """Return how often the right label has the lower loss."""
    was_training = model.training
    model.eval()
    hits = 0
    for review, label in rows:
        losses = {
            candidate: model(**collate(encode(tokenizer, [(review, candidate)]))).loss.item()
            for candidate in (" good", " bad")
        }
        hits += min(losses, key=losses.__getitem__) == label
    model.train(was_training)
    return hits / len(rows)
