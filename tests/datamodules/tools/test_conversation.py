"""Conversations: ids as they were, budgets and limits, seeds, ranks; from scripts and from a random policy.

Legend: ``L`` tokens of a response.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import talks
import torch
import toys
from talks import EOS, PROMPT, Deep, Scripted
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_onpolicy.datamodules.assets import resolve_asset
from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, Sampling, collate
from lightning_onpolicy.datamodules.tools.base import Observation
from lightning_onpolicy.datamodules.tools.conversation import MARKS, Conversation
from lightning_onpolicy.datamodules.tools.tokens import encode_observation, segments_of

TOKENIZER = toys.tokenizer()
CALL = ([1, 7, 2, 8], "stop")  # t1 t7 t2 t8: a call of the echo tool
ANSWER = [9, 2, 9]
END = ([2, EOS], "eos")


def talk(engine: Scripted, environment: Any = None, n: int = 1, **settings: Any) -> Completion:
    conversation = Conversation(environment or talks.echo(), TOKENIZER)
    how = Sampling(**{"max_new_tokens": 20, **settings})
    return conversation.sample(engine, [PROMPT], n, how, seed=0)[0][0]


# -- what a response is --------------------------------------------------------------------------------


def test_turns_and_answers_stand_in_the_order_the_model_saw_them() -> None:
    engine = Scripted(CALL, CALL, END, versions=(3, 2, 4))
    done = talk(engine)
    assert done.ids.tolist() == [1, 7, 2, 8, *ANSWER, 1, 7, 2, 8, *ANSWER, 2, EOS]
    assert done.written is not None
    own = done.written.tolist()
    assert own == [True] * 4 + [False] * 3 + [True] * 4 + [False] * 3 + [True] * 2
    assert done.logprobs.tolist() == pytest.approx(
        [-1, -1.01, -1.02, -1.03, 0, 0, 0, -2, -2.01, -2.02, -2.03, 0, 0, 0, -3, -3.01]
    )
    assert done.finish == "eos" and done.tokens == 10
    assert done.version == 2  # the oldest weights that wrote any of it
    asked = [call["prompts"][0] for call in engine.calls]
    assert asked == [[5, 6], [5, 6, 1, 7, 2, 8, *ANSWER], [5, 6, *done.ids[:14].tolist()]]


def test_a_response_without_a_call_is_an_ordinary_completion() -> None:
    done = talk(Scripted(END))
    assert done.written is None and done.tokens == 2 and done.ids.tolist() == [2, EOS]


def test_a_mark_that_closes_nothing_is_passed_over() -> None:
    engine = Scripted(([1, 8], "stop"), END)
    done = talk(engine)
    assert done.ids.tolist() == [1, 8, 2, EOS] and done.written is None
    assert engine.calls[1]["prompts"] == [[5, 6, 1, 8]]


def test_marks_that_close_nothing_are_no_turns() -> None:
    """Catches: "1+1=2 and 2+2=4" that is cut for two equals signs; a response of marks alone that never ends."""
    mark = ([1, 8], "stop")
    done = talk(Scripted(*[mark] * 5, CALL, END), talks.echo(max_turns=2), max_new_tokens=40)
    assert done.finish == "eos" and done.tokens == 16
    engine = Scripted(*[mark] * 99)
    done = talk(engine, talks.echo(max_turns=2), max_new_tokens=400)
    assert done.finish == "length" and len(engine.calls) == 2 * MARKS


def test_observations_are_masked_in_the_batch_and_attended_to() -> None:
    group = Group(PROMPT, (talk(Scripted(CALL, END)), talk(Scripted(END))))
    batch = collate([group], pad_id=20)
    assert batch.response_mask.int().tolist() == [
        [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1],
        [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.attention_mask.sum(1).tolist() == [11, 4]
    assert batch.prompt_lengths.tolist() == [2, 2] and batch.response_lengths.tolist() == [6, 2]
    assert bool((batch.sampler_logprobs[~batch.response_mask] == 0).all())


def characters() -> Any:
    """A tokenizer of single letters that writes "ab" as one token and "a" + "b" as another reading of it."""
    vocab = {"a": 0, "b": 1, "ab": 2, "=": 3, "<eos>": 4, "<unk>": 5}
    backend = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def test_nothing_is_encoded_again() -> None:
    """Catches: contexts and responses made from text, where "a" + "b" would become the one token "ab"."""
    tokenizer = characters()
    assert tokenizer.encode("ab", add_special_tokens=False) == [2]

    class SaysB(Deep):
        def observe(self, transcripts: Any) -> list[Observation | None]:
            answers = super().observe(transcripts)
            return [None if a is None else Observation("b") for a in answers]

    engine = Scripted(([0, 1, 0], "stop"), ([0], "stop"), ([1, 4], "eos"))
    conversation = Conversation(SaysB(lambda prompt: 2), tokenizer)
    [[done]] = conversation.sample(engine, [Prompt((0,), "a")], 1, Sampling(max_new_tokens=9), seed=0)
    assert done.ids.tolist() == [0, 1, 0, 1, 0, 1, 1, 4]  # the observations stay "b" between two "a"
    assert engine.calls[2]["prompts"] == [[0, 0, 1, 0, 1, 0, 1]]
    assert tokenizer.encode(tokenizer.decode(done.ids), add_special_tokens=False) != done.ids.tolist()


def test_special_tokens_count_in_an_environments_marks_and_never_in_what_a_tool_says() -> None:
    """Catches: a model that has a tool repeat the name of a special token, and so ends or forges a turn."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_asset("onpolicy://quickstart/models/student"))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    heard = encode_observation(tokenizer, Observation("1<|end|>2", before="<|bos|>", after="<|end|>"))
    assert heard[0] == bos and heard[-1] == eos and eos not in heard[:-1]
    assert tokenizer.decode(heard) == "<|bos|>1<|end|>2<|end|>"
    assert tokenizer.encode("<|end|>", add_special_tokens=False) == [eos]  # nothing of it stays behind
    assert encode_observation(tokenizer, Observation()) == []


def test_a_response_is_cut_where_the_author_changes() -> None:
    done = talk(Scripted(CALL, END))
    assert done.written is not None
    parts = segments_of(done.ids.tolist(), done.written.tolist(), TOKENIZER)
    assert [(p.role, p.text) for p in parts] == [
        ("assistant", "t1 t7 t2 t8"),
        ("tool", "t9 t2 t9"),
        ("assistant", "t2"),
    ]


# -- limits --------------------------------------------------------------------------------------------


def test_the_budget_is_the_policys_over_all_turns() -> None:
    engine = Scripted(CALL, CALL, ([1, 1, 1, 1, 1], "stop"))
    done = talk(engine, max_new_tokens=11)
    assert [call["budgets"] for call in engine.calls] == [None, [7], [3]]
    assert done.tokens == 11 and len(done.ids) == 17 and done.finish == "length"


def test_an_answer_that_nobody_could_react_to_is_left_out() -> None:
    """Catches: a generate call of budget 0, a response that ends in an observation."""
    engine = Scripted(CALL, CALL)
    done = talk(engine, max_new_tokens=8)
    assert done.ids.tolist() == [1, 7, 2, 8, *ANSWER, 1, 7, 2, 8] and done.finish == "length"


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turns_run_out(turns: int) -> None:
    engine = Scripted(CALL, CALL, CALL)
    done = talk(engine, talks.echo(max_turns=turns))
    assert len(engine.calls) == turns and done.finish == "length" and done.tokens == 4 * turns
    assert len(done.ids) == 7 * turns - 3


def test_the_last_turn_may_end_by_itself() -> None:
    assert talk(Scripted(CALL, END), talks.echo(max_turns=2)).finish == "eos"


@pytest.mark.parametrize(
    ("context", "budgets", "finish"),
    [
        (22, [None, [13], [6]], "eos"),  # 2 + 4 + 3 are in: 13 are left, less than the 16 of the budget
        (16, [None, [7]], "length"),  # 2 + 4 + 3 + 4 + 3 would leave nothing
        (17, [None, [8], [1]], "length"),  # one token, then the limit
    ],
)
def test_context_runs_out(context: int, budgets: list[Any], finish: str) -> None:
    engine = Scripted(CALL, CALL, END)
    done = talk(engine, talks.echo(max_context=context), max_new_tokens=14 if context < 20 else 20)
    assert [call["budgets"] for call in engine.calls] == budgets
    assert done.finish == finish and 2 + len(done.ids) <= context


def test_the_models_positions_bound_the_context_too() -> None:
    conversation = Conversation(talks.echo(max_context=90), TOKENIZER, max_positions=64)
    assert conversation.max_context == 64
    with pytest.raises(ValueError, match=r"a prompt has 2 tokens.*max_context=64"):
        conversation.sample(Scripted(), [PROMPT], 1, Sampling(max_new_tokens=63), seed=0)
    elsewhere = Conversation(talks.echo(), TOKENIZER, max_positions=64, any_rank=lambda here: True)
    with pytest.raises(ValueError, match="another rank has a prompt too long"):
        elsewhere.sample(Scripted(), [PROMPT], 1, Sampling(max_new_tokens=9), seed=0)


def test_a_stop_string_of_the_sampling_ends_the_response() -> None:
    done = talk(Scripted(([1, 7, 2, 6, 8], "stop")), stop=("t6",))
    assert done.finish == "stop" and done.written is None


def test_such_a_string_may_stand_across_two_turns() -> None:
    done = talk(Scripted(([1, 8], "stop"), ([6, 8], "stop"), END), stop=("t8 t6",))
    assert done.ids.tolist() == [1, 8, 6, 8] and done.finish == "stop"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"min_new_tokens": 2}, "min_new_tokens must be 0"), ({"stop": ("t8",)}, r"sampling.stop has \['t8'\]")],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        talk(Scripted(), **settings)
    with pytest.raises(ValueError, match=r"max_turns must be >= 1, got 0"):
        Conversation(talks.echo(max_turns=0), TOKENIZER)


# -- a real engine -------------------------------------------------------------------------------------

PROMPTS = [Prompt(tuple(range(1, 2 + i % 3)), "", uid=f"p{i}") for i in range(5)]


def plain(groups: list[list[Completion]]) -> list[Any]:
    return [
        [c.ids.tolist(), c.finish, None if c.written is None else c.written.tolist()]
        for group in groups
        for c in group
    ]


def test_the_trainer_gives_every_token_of_every_turn_the_samplers_probability() -> None:
    """The ratio is 1 on the first update: also behind one, two and three observations."""
    policy = toys.policy(0, scale=3.0)
    groups = talks.sampled(Deep(lambda prompt: 3), PROMPTS, policy=policy, max_new_tokens=30)
    batch = collate([Group(p, tuple(g)) for p, g in zip(PROMPTS, groups, strict=True)], pad_id=20)
    runs = [len(segments_of(*pair, TOKENIZER)) for pair in _responses(groups)]
    assert max(runs) == 7 and sum(r == 7 for r in runs) >= 5
    with torch.no_grad():
        logp_N = policy.eval()(batch.input_ids, batch.response_mask).logp
    mu_N = batch.sampler_logprobs[batch.response_mask]
    assert float((logp_N - mu_N).abs().max()) < 1e-4
    assert len(mu_N) == sum(c.tokens for g in groups for c in g)


def _responses(groups: list[list[Completion]]) -> list[tuple[list[int], list[bool]]]:
    return [
        (c.ids.tolist(), [True] * len(c.ids) if c.written is None else c.written.tolist())
        for g in groups
        for c in g
    ]


def test_equal_seeds_give_equal_responses_whoever_else_is_there() -> None:
    """Catches: randomness that depends on which other rows are still talking."""
    deep = Deep(lambda prompt: len(prompt.ids))
    every = talks.sampled(deep, PROMPTS)
    assert plain(talks.sampled(deep, PROMPTS)) == plain(every)
    assert plain(talks.sampled(deep, PROMPTS[:2])) == plain(every[:2])
    assert plain(talks.sampled(deep, PROMPTS, seed=1)) != plain(every)
    patient = [every[0], *talks.sampled(Deep(lambda p: 0 if p.uid == "p0" else len(p.ids)), PROMPTS)[1:]]
    assert plain(patient) == plain(every)


def test_turns_do_not_repeat_each_others_randomness() -> None:
    """Catches: the first turn's seed used again, which makes a second turn a copy of the first."""
    policy = toys.policy(0, scale=1e-3)  # nearly uniform: what is drawn is the random number itself
    groups = talks.sampled(Deep(lambda prompt: 1), PROMPTS, n=8, policy=policy)
    starts = [
        (int(c.ids[0]), int(c.ids[int((~c.written).nonzero()[-1]) + 1]))
        for g in groups
        for c in g
        if c.written is not None
    ]
    same = sum(first == second for first, second in starts)
    assert len(starts) > 20 and same < len(starts) / 3


# -- ranks ---------------------------------------------------------------------------------------------


def test_all_ranks_ask_the_engine_equally_often() -> None:
    """Two threads for two ranks: one has nothing to say after the first turn, and calls the engine all the same."""
    world = threading.Barrier(2, timeout=20)
    votes: list[list[bool]] = [[], []]
    engines = [Scripted(CALL, CALL, END), Scripted(END, END, END)]
    results: dict[int, Completion] = {}

    def rank(number: int) -> None:
        def any_rank(here: bool) -> bool:
            votes[number].append(here)
            world.wait()
            result = any(v[len(votes[number]) - 1] for v in votes)
            world.wait()
            return result

        conversation = Conversation(talks.echo(), TOKENIZER, any_rank=any_rank)
        how = Sampling(max_new_tokens=20)
        results[number] = conversation.sample(engines[number], [PROMPT], 1, how, seed=number)[0][0]

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [len(e.calls) for e in engines] == [3, 3] and votes == [[True, True, False], [False] * 3]
    assert engines[1].calls[1]["prompts"] == [] and engines[1].calls[1]["budgets"] == []
    assert results[0].tokens == 10 and results[1].ids.tolist() == [2, EOS]


def test_lengths_and_shapers_count_what_the_policy_wrote() -> None:
    from lightning_onpolicy.datamodules.rewards.lengths import Cosine, KimiLength, L1Exact, L1Max, Overlong

    long = talk(Scripted(CALL, END))
    short = dataclasses.replace(long, ids=long.ids[:6], logprobs=long.logprobs[:6], written=None)
    assert long.tokens == short.tokens == 6 and len(long.ids) == 9
    prompt = dataclasses.replace(PROMPT, row={"target_tokens": 6})
    groups = [Group(prompt, (long, short))]
    shapers = (Overlong(8, 4), Cosine(10), KimiLength(), L1Exact(), L1Max(alpha=0.01))
    for shaper in shapers:
        [[one, other]] = shaper.shape(groups, [[1.0, 1.0]], [[1.0, 1.0]])
        assert one == other, shaper
