"""Rows that do not fit, and rows that the model cannot read."""

import pytest
import torch
import transformers as hf

from tests.support import zoo
from tests.support.hub_folders import make_tokenizer
from tests.support.models import build
from zofo.errors import UserError
from zofo.models.adapters import create_adapter
from zofo.models.loading import load_model
from zofo.models.sequence_limits import limits_of
from zofo.tasks.encode import Encoder
from zofo.tasks.encode_rows import check_limits, encode_parts
from zofo.tasks.generate import segments_of
from zofo.tasks.spec import Chat, Completion, Example, Splits


def completion(number, words):
    return Completion((("the film", False), (" great" * words, True)), "", number)


def conversation(number, turns, tokenizer):
    messages = []
    for i in range(turns):
        messages += [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}]
    chat = Chat(messages)
    return Completion(segments_of(chat, tokenizer), "", number, is_rendered=True, chat=chat)


def splits(train, dev=(), test=()):
    return Splits("completion", tuple(train), tuple(dev), tuple(test))


def test_rows_that_teach_nothing_are_left_out_and_counted(decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    encoder = Encoder(tokenizer, max_length=12)
    parts = splits([completion(i, i) for i in (1, 2, 30)], [completion(8, 1)], [completion(9, 1)])
    rows, notes = encode_parts(encoder, parts, model)
    assert [len(rows[part]) for part in ("train", "dev", "test")] == [2, 1, 1]
    assert len(notes) == 1
    assert notes[0].startswith(
        "rows left out: 1. The first: train row 30: its completion is longer"
    )
    parts = splits([completion(1, 1)], [completion(2, 30)], [completion(3, 1)])
    with pytest.raises(UserError, match=r"none of the 1 dev rows .*: row 2.*task\.dev"):
        encode_parts(encoder, parts, model)
    assert encode_parts(encoder, parts, model, may_be_empty=["dev"])[0]["dev"] == []
    assert encode_parts(encoder, parts, model, ["train", "test"])[1] == ()


def test_shortened_conversations_are_counted(decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    parts = splits([conversation(i, i, tokenizer) for i in (1, 2, 20, 30)])
    _, notes = encode_parts(Encoder(tokenizer, max_length=24), parts, model, ["train"])
    (note,) = notes
    assert note.startswith("2 of 4 conversations are longer than task.max_length (24 tokens) and")


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bert", "roberta", "deberta-v2", "bart"])
@torch.no_grad()
def test_a_model_breaks_beyond_its_limit(architecture):
    model = zoo.bare(architecture).eval()
    limits = limits_of(model)
    assert limits.is_hard
    more = {"decoder_input_ids": torch.tensor([[3]])} if architecture == "bart" else {}
    model(input_ids=torch.full((1, limits.positions), 3), **more)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limits.positions + 1), 3), **more)


TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "max_position_embeddings": 32}
UNUSUAL = {  # positions that no embedding of a module holds, or that are counted in another way
    "mpt": hf.MptConfig(vocab_size=99, d_model=16, n_heads=2, n_layers=1, max_seq_len=32),
    "ctrl": hf.CTRLConfig(vocab_size=99, n_embd=16, dff=24, n_layer=1, n_head=2, n_positions=32),
    "ibert": hf.IBertConfig(vocab_size=99, **{**TINY, "max_position_embeddings": 34}),
    "canine": hf.CanineConfig(
        **TINY,
        num_hash_buckets=64,
        num_hash_functions=2,
        local_transformer_stride=8,
        downsampling_rate=2,
    ),
    "nystromformer": hf.NystromformerConfig(vocab_size=99, **TINY),
}


@pytest.mark.parametrize("architecture", UNUSUAL)
def test_positions_that_are_no_table(architecture):
    config, tokenizer = UNUSUAL[architecture], make_tokenizer()
    kind = "CausalLM" if architecture in ("mpt", "ctrl") else "SequenceClassification"
    model = getattr(hf, f"AutoModelFor{kind}").from_config(config).eval()
    tokenizer.pad_token = "<eos>"
    assert check_limits(model, tokenizer, [[1] * 32]) == []
    with pytest.raises(UserError, match=r"has 33 tokens, .* 32 positions; set task.max_length=32"):
        check_limits(model, tokenizer, [[1] * 33])


def test_an_encoder_that_reads_more_than_it_has_positions():
    sides = {f"num_{s}_layers": 1 for s in ("encoder", "decoder")}
    sides |= {f"num_{s}_attention_heads": 2 for s in ("encoder", "decoder")}
    sides |= {f"{s}_ffn_dim": 24 for s in ("encoder", "decoder")}
    model = hf.ProphetNetForConditionalGeneration(
        hf.ProphetNetConfig(vocab_size=99, hidden_size=16, max_position_embeddings=32, **sides)
    ).eval()
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    (note,) = check_limits(model, tokenizer, [[1] * 60], outputs=[[1] * 9])
    assert note.startswith("the longest row has 60 tokens")
    with pytest.raises(UserError, match="the longest row has 60 tokens"):
        check_limits(model, tokenizer, [[1] * 9], outputs=[[1] * 60])


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("adapter", [None, "lora", "prefix", "prompt"])
def test_a_table_of_positions_is_a_limit(architecture, adapter):
    model = build(architecture, adapter)
    limits, tokenizer = limits_of(model), make_tokenizer()
    tokenizer.pad_token = "<eos>"
    assert limits.is_hard == (architecture != "llama")
    assert limits.positions == model.config.max_position_embeddings
    assert (limits.virtual > 0) == (adapter in ("prefix", "prompt"))
    room = limits.positions - limits.virtual
    assert check_limits(model, tokenizer, [[1] * room]) == []
    if not limits.is_hard:
        (note,) = check_limits(model, tokenizer, [[1] * (room + 1)])
        assert note.endswith(f"and the model was made for {limits.positions} positions")
        return
    with pytest.raises(UserError, match=f"has {limits.positions} positions; set task.max_length="):
        check_limits(model, tokenizer, [[1], [1] * (room + 1)])
    with pytest.raises(UserError, match=r"with 2 to be written.*lower max_new_tokens"):
        check_limits(model, tokenizer, [[1] * (room - 1)], max_new_tokens=2)


def test_an_encoder_tells_the_length_that_fits(encoder_folder):
    model, tokenizer = load_model(encoder_folder, head="classification", num_labels=2)
    long = Example("", (" a", " b"), 0, "the film " * 200, 1)
    encoder = Encoder(tokenizer, head="classification", max_length=256)
    with pytest.raises(UserError, match=r"model has 128 .*task.max_length=128"):
        encode_parts(encoder, splits([long]), model, ["train"])
    fits = Encoder(tokenizer, head="classification", max_length=128)
    rows, notes = encode_parts(fits, splits([long]), model, ["train"])
    assert rows["train"][0].length == 128
    assert notes == ()


def test_encoder_decoders_have_no_limit(encoder_decoder_folder):
    assert limits_of(load_model(encoder_decoder_folder, head="seq2seq")[0]).positions is None


@pytest.mark.parametrize("adapter", [None, "lora", "prompt"])
def test_tokens_without_an_embedding(decoder_folder, adapter):
    model, tokenizer = load_model(decoder_folder)
    if adapter:
        model = create_adapter(model, adapter, tokenizer=tokenizer)
    encoder, known = Encoder(tokenizer), splits([completion(1, 1)])
    tokenizer.add_tokens(["<extra>"])
    assert encode_parts(encoder, known, model, ["train"])[1] == ()
    row = Completion((("the <extra>", False), (" great", True)), "", 1)
    with pytest.raises(UserError, match=r"'<extra>' the id \d+, .*resize_token_embeddings"):
        encode_parts(encoder, splits([row]), model, ["train"])
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(UserError, match="'<padding>'"):
        encode_parts(encoder, known, model, ["train"])
