"""What is learnt has the tokens of the whole text, whatever the tokenizer does with its parts."""

import itertools

import pytest
import transformers as hf
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.support.hub_folders import CHAT_TEMPLATE, CORPUS, make_tokenizer
from zofo.errors import UserError
from zofo.tasks.encode import Encoder
from zofo.tasks.generate import segments_of
from zofo.tasks.spec import Chat, Completion, Example

SPECIAL = ["<unk>", "<s>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
PROMPTS = ["2+2=", "the film is", "the film is ", "It was\n", "A: "]
COMPLETIONS = ["4", " great", "ly bad", "  two blanks", "\n\nParis.", "é 好"]


def ending_in(ids, before="", after=""):
    names = [t for t in (before, after) if t]
    return processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=[(t, ids(t)) for t in names]
    )


def metaspace(scheme, *, split=False, normalizer=None, after=""):
    """As in Llama 2, Mistral and Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is None:
        blanks = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
        tokenizer.pre_tokenizer, tokenizer.decoder = blanks, decoders.Metaspace()
    else:
        tokenizer.normalizer = normalizer
        tokenizer.decoder = decoders.Replace("▁", " ")
    letters = sorted({c for text in (*CORPUS, *PROMPTS, *COMPLETIONS) for c in text} - set("好é"))
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=["▁", *letters],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = ending_in(tokenizer.token_to_id, "<s>", after)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<eos>", unk_token="<unk>"
    )


def bytelevel(before="", after="", **options):
    """As in GPT-2, Llama 3 and Qwen."""
    fast = make_tokenizer(**options)
    core = fast.backend_tokenizer
    if before or after:
        core.post_processor = ending_in(core.token_to_id, before, after)
    return fast


def trimming():
    """Leaves blanks out of the spans of its tokens, as RoBERTa's does."""
    fast = bytelevel()
    fast.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return fast


def wordpiece():
    """As in BERT, when it is used as a decoder."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=[*SPECIAL, "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, *PROMPTS, *COMPLETIONS[:-1]], trainer)
    tokenizer.post_processor = ending_in(tokenizer.token_to_id, "[CLS]", "[SEP]")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        unk_token="<unk>",
    )


class Slow:
    """A tokenizer that does not tell the characters of its tokens."""

    def __init__(self, fast):
        self.fast = fast

    def __getattr__(self, name):
        return getattr(self.fast, name)

    is_fast = False

    def __call__(self, text=None, **options):
        assert not options.get("return_offsets_mapping")
        return self.fast(text, **options)


LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TOKENIZERS = {
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "metaspace, split": lambda: metaspace("always", split=True),
    "metaspace, end": lambda: metaspace("first", after="<eos>"),
    "prepend": lambda: metaspace("", normalizer=LLAMA),
    "byte level": bytelevel,
    "byte level, trimming": trimming,
    "byte level, end": lambda: bytelevel(after="<eos>"),
    "byte level, both": lambda: bytelevel("<|system|>", "<eos>", bos_token="<|system|>"),
    "word piece": wordpiece,
    "slow": lambda: Slow(metaspace("first")),
    "slow, end": lambda: Slow(bytelevel("<|system|>", "<eos>", bos_token="<|system|>")),
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request):
    made = TOKENIZERS[request.param]()
    getattr(made, "fast", made).chat_template = CHAT_TEMPLATE
    return made


def ids_of(encoded, candidate=0):
    row, _, last = encoded.targets[candidate][-1]
    return [*encoded.rows[row], last]


def learnt_by(encoded, candidate=0):
    return [token for _, _, token in encoded.targets[candidate]]


def ended(tokenizer, ids):
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def letters(tokenizer, ids):
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return "".join(c for c in text if c.isalnum() and c.isascii())


def test_a_completion_has_the_tokens_of_the_whole_text(tokenizer):
    encoder = Encoder(tokenizer)
    for prompt, completion in itertools.product(PROMPTS, COMPLETIONS):
        encoded = encoder(Completion(((prompt, False), (completion, True)), "", 1))
        ids, learnt = ids_of(encoded), learnt_by(encoded)
        assert ids == ended(tokenizer, tokenizer(prompt + completion)["input_ids"])
        assert ids[-len(learnt) :] == learnt  # one piece, to the end
        # All of the completion is learnt, and at most one token that the prompt shares.
        context = letters(tokenizer, ids[: -len(learnt)])
        assert letters(tokenizer, tokenizer(prompt)["input_ids"]).startswith(context)
        if tokenizer.is_fast:
            ends = [end for _, end in tokenizer(prompt + completion).encodings[0].offsets]
            num = sum(end > len(prompt) for end in ends)
            assert sum(end > len(prompt) for end in ends[-len(learnt) :]) in (num, num - 1)


def test_a_prompt_is_what_stands_before_the_answer_in_training(tokenizer):
    encoder = Encoder(tokenizer)
    encoded = encoder(Completion((("the film?", False), ("Paris", True)), "", 1))
    prompt = list(encoder.prompt("the film?"))
    assert ids_of(encoded)[: len(prompt)] == prompt
    assert prompt[-1] != tokenizer.eos_token_id


def test_a_chat_has_the_tokens_of_the_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "2+2="},
        {"role": "assistant", "content": "4 "},
    ]
    row = Completion(segments_of(Chat(messages), tokenizer), "", 1, is_rendered=True)
    encoded = Encoder(tokenizer)(row)
    options = {"tokenize": True, "return_dict": False}
    assert ids_of(encoded) == list(tokenizer.apply_chat_template(messages, **options))
    text = tokenizer.decode(learnt_by(encoded)).replace(" ", "").lower()
    assert text == "paris.<eos>4<eos>"


def test_candidates_have_the_tokens_of_their_whole_texts(tokenizer):
    encoder = Encoder(tokenizer)
    words = [" great", "ly bad", " terrible story", "4"]
    for prompt in PROMPTS:
        encoded = encoder(Example(prompt, tuple(words), 0, "", 1))
        for i, word in enumerate(words):
            assert ids_of(encoded, i) == tokenizer(prompt + word)["input_ids"]
        lengths = [len(ids_of(encoded, i)) - len(learnt_by(encoded, i)) for i in range(len(words))]
        assert len(set(lengths)) == 1  # all are scored from the same token on
        encoded = encoder(Example(prompt, tuple(words[:2]), 0, "", 1, ending=" Label: it"))
        for i, word in enumerate(words[:2]):
            assert ids_of(encoded, i) == tokenizer(f"{prompt}{word} Label: it")["input_ids"]


def test_cut_sequences_begin_as_every_sequence(tokenizer):
    encoder, text = Encoder(tokenizer, max_length=24, max_new_tokens=4), "the film is warm " * 30
    encoded = [
        encoder(Completion(((text, False), (" great", True)), "", 1)),
        encoder(Example(text, (" great", " bad"), 0, "", 1)),
        encoder(Example(text, (" great", " bad"), 0, "", 1, ending=" Label")),
    ]
    begin = tokenizer("the")["input_ids"][0]
    is_special = begin in tokenizer.all_special_ids
    assert is_special == (tokenizer("")["input_ids"][:1] not in ([], [tokenizer.eos_token_id]))
    for row in (*(r for e in encoded for r in e.rows), encoder.prompt(text)):
        assert 15 <= len(row) <= 24
        assert not is_special or row[0] == begin
        assert tokenizer.eos_token_id not in row
    seq2seq = Encoder(tokenizer, head="seq2seq", max_length=24)
    ids = seq2seq(Completion(((text, False), ("great", True)), "", 1)).rows[0]
    whole = tokenizer(text)["input_ids"]
    assert len(ids) == 24
    assert ids[0] == (begin if is_special else whole[-24])
    assert ids[-1] == whole[-1]


def test_a_bos_that_only_the_template_writes_is_kept():
    tokenizer = bytelevel(bos_token="<|system|>")
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    messages = [
        {"role": "user", "content": "the film " * 40},
        {"role": "assistant", "content": "great"},
    ]
    chat = Chat(messages)
    row = Completion(segments_of(chat, tokenizer), "", 1, is_rendered=True, chat=chat)
    encoded = Encoder(tokenizer, max_length=20)(row)
    assert ids_of(encoded)[0] == tokenizer.bos_token_id
    assert len(ids_of(encoded)) == 20
    assert tokenizer.decode(learnt_by(encoded)) == "great<eos>"


UNKNOWN = {"same": (" 好", " 坏"), "one": (" 好", " great"), "both as words": ("好", "坏坏")}


@pytest.mark.parametrize("head", ["causal-lm", "seq2seq"])
@pytest.mark.parametrize("words", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("make", [wordpiece, lambda: metaspace("always")])
def test_label_words_that_the_tokenizer_does_not_know(words, head, make):
    with pytest.raises(UserError, match=r"'.?好'.*give other words in task.verbalizers"):
        Encoder(make(), head=head)(Example("the film :", words, 0, "", 1))


def test_label_words_with_the_same_tokens():
    encoder = Encoder(wordpiece())
    with pytest.raises(UserError, match="' Great' and ' great' have the same tokens"):
        encoder(Example("the film is", (" bad", " Great", " great"), 0, "", 1))
    with pytest.raises(UserError, match="have the same tokens"):
        encoder(Example("the ", ("Film", "film"), 0, "", 1, ending=" is great"))
    encoder(Example("the film 好 is", (" bad", " great 好"), 0, "", 1))  # known in part
