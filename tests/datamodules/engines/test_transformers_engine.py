"""The in-process engine: what it returns, checked against uncached forward passes and `generate`."""

import pytest
import torch
from torch import nn

from lightning_onpolicy.datamodules.batch import Completion, Sampling
from lightning_onpolicy.datamodules.engines.sampling import distribution
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "qwen3_next"]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [3], [4, 1, 4, 0, 4, 4, 4, 20, 21, 22, 23, 24]]
FILTERED = Sampling(temperature=0.7, top_k=12, top_p=0.9, min_p=0.02, min_new_tokens=3, max_new_tokens=16)


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [c for group in groups for c in group]


def same(a: list[list[Completion]], b: list[list[Completion]]) -> None:
    """Equal tokens and reasons; log-probabilities up to the rounding of other batch shapes."""
    assert [len(group) for group in a] == [len(group) for group in b]
    for x, y in zip(flat(a), flat(b), strict=True):
        assert x.ids.tolist() == y.ids.tolist()
        assert x.finish == y.finish
        torch.testing.assert_close(x.logprobs, y.logprobs, atol=2e-5, rtol=1e-5)


# -- log-probabilities and tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=16), FILTERED], ids=["plain", "filtered"])
def test_log_probabilities_are_those_of_a_fresh_forward_pass(make_decoder, family, sampling):
    """Shared prefixes, padding, windows and departures change nothing: every token is rescored alone."""
    decoder = make_decoder(family)
    # a linear-attention prefill works in chunks, a step does not: the same sums in another order
    atol = 1e-4 if family == "qwen3_next" else 1e-5
    groups = TransformersEngine(decoder, max_rows=5).generate(PROMPTS, 3, sampling, seed=1)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            x = distribution(
                decoder.fresh_logits(prompt, c.ids), sampling, torch.tensor([1]), torch.arange(len(c.ids))
            )
            expected = x.log_softmax(-1).gather(1, c.ids[:, None])[:, 0]
            torch.testing.assert_close(c.logprobs, expected, atol=atol, rtol=1e-5)
            assert c.ids.dtype == torch.int64
            assert c.logprobs.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_generate(make_decoder, family):
    decoder = make_decoder(family)
    groups = TransformersEngine(decoder, max_rows=3).generate(
        PROMPTS, 1, Sampling(temperature=0, max_new_tokens=14), seed=0
    )
    for prompt, [c] in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        out = decoder.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=14
        )
        assert c.ids.tolist() == out[0, len(prompt) :].tolist()
        logp = decoder.fresh_logits(prompt, c.ids).log_softmax(-1).amax(-1)
        torch.testing.assert_close(c.logprobs, logp, atol=1e-5, rtol=1e-5)


def test_sequences_come_as_often_as_the_model_says(make_decoder):
    """Chi-square over all sequences of two tokens, whose probabilities are enumerated by forward passes."""
    decoder = make_decoder("llama", {"vocab_size": 5, "initializer_range": 0.15}, eos=(1,))
    N, prompt = 4000, [2, 3]
    [group] = TransformersEngine(decoder).generate([prompt], N, Sampling(max_new_tokens=2), seed=11)
    p = {}
    for first in range(5):
        for second in [None] if first == 1 else range(5):
            ids = torch.tensor([first] if second is None else [first, second])
            logp = decoder.fresh_logits(prompt, ids).log_softmax(-1).gather(1, ids[:, None])
            p[tuple(ids.tolist())] = float(logp.sum().exp())
    assert sum(p.values()) == pytest.approx(1, abs=1e-5)
    counts = dict.fromkeys(p, 0)
    for c in group:
        counts[tuple(c.ids.tolist())] += 1
    chi = sum((counts[k] - N * p[k]) ** 2 / (N * p[k]) for k in p)
    df = len(p) - 1
    assert abs(chi - df) < 4 * (2 * df) ** 0.5
    assert min(p.values()) * N > 5


# -- determinism --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_next"])
def test_results_do_not_depend_on_how_the_work_is_cut(make_decoder, family):
    decoder = make_decoder(family, eos=tuple(range(1, 48, 6)))
    reference = TransformersEngine(decoder).generate(PROMPTS, 3, FILTERED, seed=2)
    assert len({len(c.ids) for c in flat(reference)}) > 3, "lengths must be ragged"
    for limits in (
        {"max_rows": 1 if family == "llama" else 4},
        {"max_rows": 7, "max_prefill_tokens": 4},
        {"max_cache_tokens": 3 * (12 + 16)},
    ):
        same(TransformersEngine(decoder, **limits).generate(PROMPTS, 3, FILTERED, seed=2), reference)


def test_a_prompt_does_not_depend_on_its_neighbours(make_decoder):
    engine = TransformersEngine(make_decoder())
    full = engine.generate(PROMPTS, 3, FILTERED, seed=4)
    same(engine.generate(PROMPTS[:1], 3, FILTERED, seed=4), full[:1])
    same(engine.generate([*PROMPTS[:2], [40] * 30], 3, FILTERED, seed=4)[:2], full[:2])
    fewer = engine.generate(PROMPTS, 1, FILTERED, seed=4)
    same(fewer, [group[:1] for group in full])


def test_greedy_results_follow_the_order_of_prompts(make_decoder):
    engine = TransformersEngine(make_decoder(), max_rows=2)
    sampling = Sampling(temperature=0, max_new_tokens=10)
    forward = engine.generate(PROMPTS, 1, sampling, seed=0)
    same(engine.generate(PROMPTS[::-1], 1, sampling, seed=0), forward[::-1])


def test_seeds_decide_and_global_random_state_is_untouched(make_decoder):
    engine = TransformersEngine(make_decoder())
    sampling = Sampling(max_new_tokens=12)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = engine.generate(PROMPTS, 3, sampling, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    same(engine.generate(PROMPTS, 3, sampling, seed=5), first)
    other = engine.generate(PROMPTS, 3, sampling, seed=6)
    assert [c.ids.tolist() for g in other for c in g] != [c.ids.tolist() for g in first for c in g]
    texts = {tuple(c.ids.tolist()) for group in first for c in group}
    assert len(texts) > 8, "samples of one prompt must differ"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_dropout_and_gradient_checkpointing_are_off_while_sampling(make_decoder):
    plain = make_decoder("gpt2")
    noisy = make_decoder("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5})
    noisy.model.gradient_checkpointing_enable({"use_reentrant": False})
    noisy.train()
    sampling = Sampling(max_new_tokens=10)
    result = TransformersEngine(noisy).generate(PROMPTS, 2, sampling, seed=0)
    same(result, TransformersEngine(plain).generate(PROMPTS, 2, sampling, seed=0))
    assert all(module.training for module in noisy.modules())
    assert not any(c.logprobs.requires_grad for group in result for c in group)


# -- endings ------------------------------------------------------------------------------------------


def test_every_stop_id_ends_a_response_and_stays_in_it(make_decoder):
    decoder = make_decoder(eos=(1, 17))
    sampling = Sampling(max_new_tokens=12, stop_token_ids=(9, 30), temperature=2.0)
    groups = TransformersEngine(decoder).generate(PROMPTS, 16, sampling, seed=0)
    enders = set()
    for c in flat(groups):
        ids = c.ids.tolist()
        assert not {1, 17, 9, 30} & set(ids[:-1])
        assert (c.finish == "eos") == (ids[-1] in {1, 17, 9, 30})
        assert (c.finish == "length") == (len(ids) == 12 and ids[-1] not in {1, 17, 9, 30})
        enders.add(ids[-1])
    assert enders >= {1, 17, 9, 30}


def test_padding_that_equals_eos_is_no_ending(make_decoder):
    """Tokens equal with another pad id, and the last of a full-length response may be the pad id."""
    sampling = Sampling(max_new_tokens=6, temperature=2.0)
    results = [
        TransformersEngine(make_decoder(eos=(1,), pad=pad), max_rows=5).generate(PROMPTS, 8, sampling, seed=3)
        for pad in (0, 1)
    ]
    same(*results)
    assert {c.finish for c in flat(results[1])} == {"eos", "length"}


def test_min_and_max_new_tokens(make_decoder):
    decoder = make_decoder(eos_bias=30.0)  # EOS is certain wherever it is allowed
    for low, high in ((0, 5), (3, 5), (5, 5)):
        sampling = Sampling(min_new_tokens=low, max_new_tokens=high)
        groups = TransformersEngine(decoder).generate(PROMPTS, 2, sampling, seed=0)
        for c in flat(groups):
            assert len(c.ids) == min(low + 1, high)
            assert (c.ids[:low] != 1).all()
            assert c.finish == ("eos" if low < high else "length")


class Letters:
    """Ids as letters; some ids are special and have no text of their own."""

    def batch_decode(self, sequences, skip_special_tokens=False):
        return ["".join("abcd"[i % 4] if i % 5 else "" for i in ids) for ids in sequences]


def test_a_prompt_may_have_a_budget_of_its_own(make_decoder):
    """The same tokens, cut earlier; also where rows wait for others' places, and up to the model's last position."""
    decoder, how = make_decoder("llama"), Sampling(max_new_tokens=20)
    whole = TransformersEngine(decoder).generate(PROMPTS, 2, how, seed=3)
    budgets = [1 + 5 * i % 19 for i in range(len(PROMPTS))]
    cut = TransformersEngine(decoder, max_rows=3).generate(PROMPTS, 2, how, seed=3, budgets=budgets)
    for one, other, budget in zip(whole, cut, budgets, strict=True):
        for a, b in zip(one, other, strict=True):
            assert b.ids.tolist() == a.ids[:budget].tolist()
            assert b.finish == (a.finish if len(a.ids) <= budget else "length")
    room = decoder.max_positions - len(PROMPTS[0])
    long = Sampling(max_new_tokens=decoder.max_positions)
    [[last]] = TransformersEngine(decoder).generate(PROMPTS[:1], 1, long, seed=0, budgets=[room])
    assert 0 < len(last.ids) <= room


def test_numbers_decide_the_randomness_and_places_do_not(make_decoder):
    engine, how = TransformersEngine(make_decoder("llama")), Sampling(max_new_tokens=12)
    groups = engine.generate(PROMPTS, 2, how, seed=3)
    [alone] = engine.generate(PROMPTS[2:3], 2, how, seed=3, numbers=[2])
    assert [c.ids.tolist() for c in alone] == [c.ids.tolist() for c in groups[2]]
    [other] = engine.generate(PROMPTS[2:3], 2, how, seed=3, numbers=[9])
    assert [c.ids.tolist() for c in other] != [c.ids.tolist() for c in groups[2]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budgets": [0]}, "budget of 0"),
        ({"budgets": []}, "1 prompts came with 0 budgets"),
        ({"numbers": [1, 2]}, "2 numbers"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(make_decoder, more, message):
    with pytest.raises(ValueError, match=message):
        TransformersEngine(make_decoder("llama")).generate(
            [[3]], 1, Sampling(max_new_tokens=3), seed=0, **more
        )


@pytest.mark.parametrize("stop", [("ab",), ("dd", "cab"), ("a",)])
def test_stop_strings_end_a_response_where_its_text_first_holds_them(make_decoder, stop):
    decoder, letters = make_decoder(eos_bias=-30.0), Letters()
    sampling = Sampling(max_new_tokens=24, stop=stop, temperature=2.0)
    groups = TransformersEngine(decoder, letters, max_rows=6).generate(PROMPTS, 6, sampling, seed=0)
    free = TransformersEngine(decoder).generate(
        PROMPTS, 6, Sampling(max_new_tokens=24, temperature=2.0), seed=0
    )
    reasons = []
    for c, unbounded in zip(flat(groups), flat(free), strict=True):
        ids = unbounded.ids.tolist()
        ends = [k for k in range(1, 25) if any(s in letters.batch_decode([ids[:k]])[0] for s in stop)]
        assert c.ids.tolist() == ids[: ends[0] if ends else 24]
        assert c.finish == ("stop" if ends else "length")
        reasons.append(c.finish)
    assert "stop" in reasons


# -- work done ----------------------------------------------------------------------------------------


def test_each_prompt_is_prefilled_once_and_no_padding_is_decoded(make_decoder):
    decoder = make_decoder()
    groups = TransformersEngine(decoder, max_rows=6).generate(PROMPTS, 5, Sampling(max_new_tokens=20), seed=0)
    lengths = [len(c.ids) for group in groups for c in group]
    prompt_tokens = sum(map(len, PROMPTS))
    steps = [rows for rows, columns, _ in decoder.calls if columns == 1]
    # A sample's first token comes from the prefill, its last is never fed back. PROMPTS[2] is one token long.
    assert sum(tokens for _, _, tokens in decoder.calls) == prompt_tokens + sum(lengths) - len(lengths)
    assert sum(steps) <= sum(lengths) - len(lengths) + 1
    assert max(steps) <= 6


def test_prefill_keeps_to_its_budget(make_decoder):
    decoder = make_decoder()
    TransformersEngine(decoder, max_prefill_tokens=10).generate(
        PROMPTS, 2, Sampling(max_new_tokens=2), seed=0
    )
    prefills = [(rows, columns) for rows, columns, _ in decoder.calls if columns > 1]
    assert all(rows * columns <= 10 for rows, columns in prefills)
    assert len(prefills) >= 3


# -- errors and state ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_modes_are_restored_after_an_exception(make_decoder, fail_at):
    decoder = make_decoder()
    decoder.frozen = nn.Dropout()
    decoder.train()
    decoder.frozen.eval()
    decoder.fail_at = fail_at
    with pytest.raises(ZeroDivisionError):
        TransformersEngine(decoder).generate(PROMPTS, 2, Sampling(max_new_tokens=9), seed=0)
    assert decoder.training
    assert decoder.model.training
    assert not decoder.frozen.training
    assert torch.is_grad_enabled()


def test_requests_that_cannot_be_served_are_refused(make_decoder):
    engine = TransformersEngine(make_decoder(), max_cache_tokens=50)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([[3], []], 1, Sampling(max_new_tokens=2), seed=0)
    with pytest.raises(ValueError, match=r"prompt 0 has 90 tokens.*96 positions.*max_new_tokens"):
        engine.generate([[3] * 90], 1, Sampling(max_new_tokens=7), seed=0)
    with pytest.raises(ValueError, match="max_cache_tokens=50 holds no row of 51"):
        engine.generate([[3] * 41], 1, Sampling(max_new_tokens=10), seed=0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        engine.generate([[3]], 0, Sampling(max_new_tokens=2), seed=0)
    with pytest.raises(ValueError, match="tokenizer"):
        engine.generate([[3]], 1, Sampling(max_new_tokens=2, stop=("x",)), seed=0)
    with pytest.raises(TypeError, match="Linear cannot be sampled from"):
        TransformersEngine(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="max_rows must be positive"):
        TransformersEngine(make_decoder(), max_rows=0)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_next"])
def test_the_last_position_of_the_model_can_be_reached(make_decoder, family):
    """Learned positions: a row that is finished but not dropped yet must not run past the table."""
    engine = TransformersEngine(make_decoder(family, {"max_position_embeddings": 16}))
    groups = engine.generate([[3] * 10, [4] * 2], 6, Sampling(max_new_tokens=6), seed=0)
    assert max(len(c.ids) for c in groups[0]) == 6


def test_no_prompts_give_no_completions(make_decoder):
    assert TransformersEngine(make_decoder()).generate([], 3, Sampling(), seed=0) == []


def test_a_deadline_names_what_was_left(make_decoder):
    engine = TransformersEngine(make_decoder(), deadline_s=1e-9)
    with pytest.raises(TimeoutError, match=r"rank 0 .*step 0.* 8 completions were unfinished.*deadline_s"):
        engine.generate(PROMPTS, 2, Sampling(max_new_tokens=4), seed=0)


def test_logits_that_are_no_distribution_are_an_error(make_decoder):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.model.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"prompt \d: .*response token 0"):
        TransformersEngine(decoder).generate(PROMPTS, 2, Sampling(max_new_tokens=4), seed=0)


def test_versions_are_stamped_and_another_policy_is_refused(make_decoder):
    decoder = make_decoder()
    engine = TransformersEngine(decoder)
    [[c]] = engine.generate([[3]], 1, Sampling(max_new_tokens=2), seed=0)
    assert c.version == 0
    engine.sync(nn.Sequential(decoder), 7)
    [[c]] = engine.generate([[3]], 1, Sampling(max_new_tokens=2), seed=0)
    assert c.version == engine.version == 7
    with pytest.raises(ValueError, match="another"):
        engine.sync(make_decoder(), 8)
    engine.close()


def test_weights_changed_in_place_are_sampled_from_at_once(make_decoder):
    decoder = make_decoder()
    engine = TransformersEngine(decoder)
    engine.generate(PROMPTS, 1, Sampling(max_new_tokens=3), seed=0)
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(1.1)
    sampling = Sampling(max_new_tokens=8)
    for prompt, [c] in zip(PROMPTS, engine.generate(PROMPTS, 1, sampling, seed=0), strict=True):
        expected = decoder.fresh_logits(prompt, c.ids).log_softmax(-1).gather(1, c.ids[:, None])[:, 0]
        torch.testing.assert_close(c.logprobs, expected, atol=1e-5, rtol=1e-5)
