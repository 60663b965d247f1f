"""Prompt streams: sharding, resumption, rendering, and errors that name the row."""

from __future__ import annotations

import itertools
import types

import lightning.pytorch as pl
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_onpolicy.datamodules.prompts import PromptStream, shard_of

TEMPLATE = (
    "<bos> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}{% if loud is defined %} !{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Word-level, and with a post-processor that puts <bos> before whatever is encoded with special tokens."""
    words = ["<bos>", "<unk>", "system", "user", "assistant", "!", "hush", *(f"w{i}" for i in range(64))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = make_tokenizer()


def rows(n: int) -> list[dict[str, object]]:
    return [{"prompt": f"w{i}", "uid": str(i)} for i in range(n)]


def uids(prompts) -> list[str]:
    return [p.uid for p in prompts]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 6, 7])
def test_ranks_share_out_every_epoch_completely(world: int, size: int) -> None:
    streams = [PromptStream(rows(size), TOKENIZER, seed=3, rank=r, world_size=world) for r in range(world)]
    taken = [uids(s.take(2 * size)) for s in streams]  # 2 * world epochs over all ranks
    merged = list(itertools.chain.from_iterable(zip(*taken, strict=True)))
    epochs = [merged[i : i + size] for i in range(0, len(merged), size)]
    assert all(sorted(e) == sorted(str(i) for i in range(size)) for e in epochs)
    assert merged == uids(PromptStream(rows(size), TOKENIZER, seed=3).take(len(merged)))


def test_epochs_are_reshuffled_and_seeds_differ() -> None:
    stream = PromptStream(rows(40), TOKENIZER, seed=0)
    first, second = uids(stream.take(40)), uids(stream.take(40))
    assert first != second
    assert first != uids(PromptStream(rows(40), TOKENIZER, seed=1).take(40))
    assert uids(PromptStream(rows(40), TOKENIZER, shuffle=False).take(80)) == [str(i % 40) for i in range(80)]


def test_global_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    PromptStream(rows(9), TOKENIZER).take(20)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("overlong", ["error", "skip"])
@pytest.mark.parametrize("stop", [0, 3, 7, 12])
def test_a_resumed_stream_equals_an_uninterrupted_one(stop: int, overlong: str) -> None:
    def stream(rank: int) -> PromptStream:
        data = [{"prompt": "w1 " * (i % 3 + 1), "uid": str(i)} for i in range(7)]
        limit = 3 if overlong == "error" else 2
        return PromptStream(
            data,
            TOKENIZER,
            chat=False,
            max_prompt_tokens=limit + 1,
            overlong=overlong,
            rank=rank,
            world_size=2,
        )

    for rank in (0, 1):
        whole = uids(stream(rank).take(20))
        interrupted = stream(0)  # a checkpoint holds the state of rank 0 alone
        interrupted.take(stop)
        resumed = stream(rank)
        resumed.load_state_dict(interrupted.state_dict())
        assert uids(resumed.take(20 - stop)) == whole[stop:]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_skipping_shares_out_the_prompts_that_fit(world: int) -> None:
    data = [{"prompt": "w1 " * (1 if i % 4 else 9), "uid": str(i)} for i in range(10)]
    streams = [
        PromptStream(
            data, TOKENIZER, chat=False, max_prompt_tokens=4, overlong="skip", rank=r, world_size=world
        )
        for r in range(world)
    ]
    fitting = [str(i) for i in range(10) if i % 4]
    assert streams[0].source_size == len(fitting)
    merged = list(
        itertools.chain.from_iterable(zip(*(uids(s.take(len(fitting))) for s in streams), strict=True))
    )
    for i in range(0, len(merged), len(fitting)):
        assert sorted(merged[i : i + len(fitting)]) == fitting
    assert len({str(s.state_dict()) for s in streams}) == 1


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"world_size": 2}, {"source": rows(6)}, {"shuffle": False}],
    ids=lambda c: next(iter(c)),
)
def test_a_state_of_another_stream_is_refused(change: dict[str, object]) -> None:
    settings = {"source": rows(5), "seed": 0, "world_size": 1, "shuffle": True}
    state = PromptStream(tokenizer=TOKENIZER, **settings).state_dict()
    key = next(iter(change)).replace("source", "source_size")
    with pytest.raises(ValueError, match=f"{key}: saved .*, now "):
        PromptStream(tokenizer=TOKENIZER, **{**settings, **change}).load_state_dict(state)


def test_chat_and_plain_prompts_begin_with_one_bos() -> None:
    bos = TOKENIZER.bos_token_id
    chat = PromptStream([{"prompt": "w1"}], TOKENIZER).take(1)[0]
    assert chat.text == "<bos> user w1 assistant"
    assert list(chat.ids) == TOKENIZER.convert_tokens_to_ids(["<bos>", "user", "w1", "assistant"])
    plain = PromptStream([{"prompt": "w1 w2"}], TOKENIZER, chat=False).take(1)[0]
    assert plain.text == "w1 w2"
    assert list(plain.ids) == [bos, *TOKENIZER.convert_tokens_to_ids(["w1", "w2"])]


def test_conversations_systems_and_options() -> None:
    talk = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    own = [{"role": "system", "content": "w9"}, *talk]
    source = [{"messages": talk}, {"messages": own}, {"prompt": "w5"}]
    stream = PromptStream(source, TOKENIZER, system="hush", chat_options={"loud": True}, shuffle=False)
    prompts = stream.take(3)
    assert [p.system for p in prompts] == ["hush", None, "hush"]
    assert [p.text for p in prompts] == [
        "<bos> system hush user w1 assistant w2 user w3 assistant !",
        "<bos> system w9 user w1 assistant w2 user w3 assistant !",
        "<bos> system hush user w5 assistant !",
    ]


def test_a_last_assistant_message_is_the_response() -> None:
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    prompt = PromptStream([{"messages": talk}], TOKENIZER).take(1)[0]
    assert prompt.text == "<bos> user w1 assistant"
    assert prompt.row["response"] == "w2"


def test_prompts_carry_row_uid_and_source() -> None:
    source = [{"prompt": "w1", "answer": "w2", "uid": "a", "source": "sums"}, {"prompt": "w3"}]
    first, second = PromptStream(source, TOKENIZER, shuffle=False).take(2)
    assert (first.uid, first.source, first.row["answer"]) == ("a", "sums", "w2")
    assert (second.uid, second.source) == ("list/1", "list")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": " ", "uid": "seven"}, {}, "'seven'.*empty"),
        ({"question": "w1", "uid": "seven"}, {}, "'seven'.*neither 'prompt' nor 'messages'.*'question'"),
        (
            {"prompt": "w1", "messages": [{"role": "user", "content": "w1"}]},
            {},
            "both 'prompt' and 'messages'",
        ),
        ({"prompt": 3, "uid": "seven"}, {}, "'seven'.*must be a string, got int"),
        ({"messages": [{"role": "user"}], "uid": "seven"}, {}, r"'seven'.*messages\[0\]"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, {}, "empty"),
        (
            {"messages": [{"role": "user", "content": "w1"}], "uid": "seven"},
            {"chat": False},
            "'seven'.*chat: true",
        ),
        (
            {"prompt": "w1 w1 w1", "uid": "seven"},
            {"max_prompt_tokens": 4},
            "'seven'.*6 tokens.*overlong: skip",
        ),
        (
            {"prompt": "w1 w1 w1"},
            {"max_prompt_tokens": 4, "overlong": "skip"},
            "no prompt.*max_prompt_tokens=4",
        ),
    ],
)
def test_unusable_rows_are_named(row: dict[str, object], settings: dict[str, object], message: str) -> None:
    stream = PromptStream([row], TOKENIZER, **settings)
    with pytest.raises(ValueError, match=message):
        stream.take(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": []}, "has no rows"),
        ({"rank": 1}, "rank must be in range"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens"),
        ({"overlong": "cut"}, "overlong"),
        ({"chat": False, "system": "hush"}, "set chat: true"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptStream(**{"source": rows(2), "tokenizer": TOKENIZER, **settings})


def test_a_missing_chat_template_says_what_to_do() -> None:
    tokenizer = make_tokenizer(template=None)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ValueError, match="'some/model' has no chat template: set chat: false"):
        PromptStream(rows(1), tokenizer)
    assert PromptStream(rows(1), tokenizer, chat=False).take(1)[0].text == "w0"


def test_shards_follow_the_strategy() -> None:
    assert shard_of(None) == (0, 1)
    plain = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert shard_of(plain) == (0, 1)
    ddp = pl.Trainer(accelerator="cpu", devices=3, strategy="ddp", logger=False, enable_checkpointing=False)
    assert shard_of(ddp) == (0, 3)
    # two tensor-parallel peers of data-parallel rank 1, as ModelParallelStrategy reports them
    peer = types.SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})
    assert shard_of(peer) == (1, 2)


def test_absent_names_are_not_the_word_none() -> None:
    """Tables keep absent values as None. Catches: every such row taken for one and the same prompt."""
    rows = [{"prompt": "w1", "uid": None, "source": None}, {"prompt": "w2", "uid": 0, "source": "mine"}]
    prompts = PromptStream(rows, TOKENIZER, chat=False, shuffle=False).take(2)
    assert [(p.uid, p.source) for p in prompts] == [("list/0", "list"), ("0", "mine")]
