"""A judge as a reward: None and never 0, whole groups, equal texts, the meta model's choice."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import judges
import pytest

from lightning_onpolicy.datamodules.batch import Group
from lightning_onpolicy.datamodules.given import group_of
from lightning_onpolicy.datamodules.judging.backends import CallableBackend
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.judge import Judge
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate
from lightning_onpolicy.datamodules.judging.records import JudgeSample
from lightning_onpolicy.datamodules.judging.votes import meta_vote
from lightning_onpolicy.datamodules.rewards.base import Reward, is_concurrent
from lightning_onpolicy.datamodules.rewards.generative import GenerativeReward
from lightning_onpolicy.datamodules.rewards.judgement import JudgementReward
from lightning_onpolicy.modules.engine_backend import EngineBackend

GROUPS = [group_of({"prompt": f"q{i}"}, "a" * (i + 1), "bbb", "cccccc") for i in range(4)]


def reward(function: Any = judges.by_content, **settings: Any) -> GenerativeReward:
    return GenerativeReward(CallableBackend(function), **{"k": 4, **settings})


class Meta:
    """Thinks best of judgements with the smallest first score."""

    def score(self, items: Sequence[JudgeItem], samples: Sequence[JudgeSample]) -> list[float | None]:
        return [None if s.scores is None else -float(s.scores[0]) for s in samples]


def test_scores_are_the_means_mapped_to_the_unit_interval() -> None:
    assert isinstance(reward(), Reward)
    for group, scores in zip(GROUPS, reward().score(GROUPS), strict=True):
        assert scores == [(len(c.text) - 1) / 9 for c in group.completions]


def test_what_cannot_be_read_is_none_for_the_whole_group_and_never_zero() -> None:
    assert reward(lambda prompt, seed: None).score(GROUPS) == [[None] * 3] * 4
    assert reward(lambda prompt, seed: "\\boxed{1, 1}").score(GROUPS) == [[None] * 3] * 4  # too few of them
    lowest = reward(lambda prompt, seed: "\\boxed{1, 1, 1}").score(GROUPS)
    assert lowest == [[0.0] * 3] * 4
    # The judge in training gets -1 for the same silence: two paths that must not be mixed up.
    row = {"prompt": "q", "labels": [0.0, 1.0], "low": 1, "high": 10}
    assert JudgementReward().score([group_of(row, "nothing")]) == [[-1.0]]


def test_some_samples_are_enough_unless_more_are_asked_for() -> None:
    def one_in_two(prompt: str, seed: int) -> str | None:
        return judges.by_content(prompt, seed) if zlib.crc32(f"{seed}".encode()) % 2 else None

    full = reward().score(GROUPS)
    some = reward(one_in_two, k=8).score(GROUPS)
    assert all(s in (f, [None] * 3) for s, f in zip(some, full, strict=True)) and some != [[None] * 3] * 4
    assert reward(one_in_two, k=8, least=8).score(GROUPS) == [[None] * 3] * 4


def test_equal_texts_are_shown_once_and_get_equal_scores() -> None:
    group = group_of({"prompt": "q"}, "aa", "bbb", "aa", "bbb", "aa")
    seen: list[int] = []

    def judge(prompt: str, seed: int) -> str:
        seen.append(len(judges.shown(prompt)))
        return judges.by_slot(prompt, seed)

    [scores] = reward(judge, k=8).score([group])
    assert set(seen) == {2} and scores == [scores[0], scores[1], scores[0], scores[1], scores[0]]


def test_an_empty_completion_and_one_that_was_cut_are_judged_like_any_other() -> None:
    whole = group_of({"prompt": "q"}, "", "bbb", "cccccc")
    cut = tuple(dataclasses.replace(c, finish="length") for c in whole.completions)
    judge = reward(lambda prompt, seed: "\\boxed{4, 4, 4}")
    assert judge.score([whole]) == judge.score([dataclasses.replace(whole, completions=cut)]) == [[1 / 3] * 3]


def test_a_group_keeps_its_scores_whatever_is_judged_beside_it() -> None:
    judge = reward(judges.noisy(0.6))
    together = judge.score(GROUPS)
    assert judge.score(GROUPS[::-1])[::-1] == together
    assert [judge.score([group])[0] for group in GROUPS] == together
    assert reward(judges.noisy(0.6), seed=1).score(GROUPS) != together


def test_the_meta_models_choice_and_all_of_them_is_the_plain_vote_bit_for_bit() -> None:
    plain = reward(judges.noisy(0.5), k=8).score(GROUPS)
    assert reward(judges.noisy(0.5), k=8, k_meta=8, meta=Meta()).score(GROUPS) == plain
    chosen = reward(judges.noisy(0.5), k=8, k_meta=2, meta=Meta())
    scores = chosen.score(GROUPS)
    assert scores != plain
    for group, found in zip(GROUPS, scores, strict=True):
        [samples] = chosen.judge.judge([chosen.item(group)])
        means = meta_vote([s.scores for s in samples], [s.meta for s in samples], 2).means
        assert means is not None and found == [(mean - 1) / 9 for mean in means]


def test_a_reference_is_shown_where_it_is_named() -> None:
    prompts: list[str] = []

    def judge(prompt: str, seed: int) -> str:
        prompts.append(prompt)
        return judges.by_content(prompt, seed)

    group = group_of({"prompt": "q", "answer": "forty-two"}, "a", "b")
    reward(judge, k=1).score([group])
    reward(judge, k=1, reference_key="answer").score([group])
    assert ["forty-two" in prompt for prompt in prompts] == [False, True]
    with pytest.raises(ValueError, match="lacks 'answer'"):
        reward(judge, reference_key="answer").score([group_of({"prompt": "q"}, "a")])


def test_conversations_are_shown_as_they_are() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    item = reward().item(group_of({"messages": turns}, "a", "b"))
    assert item.messages == tuple(turns)


def test_the_system_message_of_the_datamodule_is_shown() -> None:
    """Catches: a judge that does not know what the policy was told."""
    group = group_of({"prompt": "Why?"}, "a", "b")
    told = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, system="Be brief."))
    asked = {"role": "user", "content": "Why?"}
    assert reward().item(group).messages == (asked,)
    assert reward().item(told).messages == ({"role": "system", "content": "Be brief."}, asked)
    assert reward().item(told).uid != reward().item(group).uid


def test_only_a_judge_elsewhere_reads_while_others_are_sampled() -> None:
    assert is_concurrent(reward())
    assert not is_concurrent(GenerativeReward(EngineBackend("onpolicy://quickstart/models/student")))
    assert not is_concurrent(reward(k_meta=2, meta=Meta()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k_meta": 2}, "give both or neither"),
        ({"meta": Meta()}, "give both or neither"),
        ({"k_meta": 5, "meta": Meta()}, r"k_meta must be in \[1, k=4\]"),
        ({"least": 5}, r"least must be in \[1, 4\]"),
        ({"k": 0}, r"least must be in"),
        ({"template": JudgeTemplate("nowhere.jinja")}, "nowhere"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        reward(**settings).score(GROUPS)


def test_a_judge_that_is_asked_about_nothing_says_nothing() -> None:
    assert reward().score([]) == []
    assert Judge(CallableBackend(judges.by_content), k=2).judge([]) == []


def test_training_on_a_judge_goes_up_by_what_the_judge_likes() -> None:
    groups: list[Group] = [group_of({"prompt": "q"}, *("x" * n for n in range(1, 9)))]
    [scores] = reward(k=2).score(groups)
    assert scores == sorted(scores, key=float)  # type: ignore[arg-type]
