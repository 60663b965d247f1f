"""A mix of domains: who is in it, in which order, and what its rows say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import toys

from lightning_onpolicy.datamodules import DomainMix, PromptStream
from lightning_onpolicy.datamodules.rows import MixedSource, Source


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"t{i}", **more} for i in range(count)]


class Named(list[Any]):
    """Rows with a name, as sources have."""

    name = "puzzles"


def domains(mix: DomainMix) -> list[str]:
    return [mix[i]["domain"] for i in range(len(mix))]


def test_without_weights_every_row_comes_once_and_evenly() -> None:
    """Catches: rows lost or repeated, one domain after the other (the first prompts would be of one domain)."""
    mix = DomainMix({"a": rows(6), "b": rows(12), "c": rows(3)})
    seen = Counter((mix[i]["domain"], mix[i]["prompt"]) for i in range(len(mix)))
    assert len(mix) == 21 and set(seen.values()) == {1} and len(seen) == 21
    for end in range(3, 22):
        counts = Counter(domains(mix)[:end])
        for name, size in (("a", 6), ("b", 12), ("c", 3)):
            assert abs(counts[name] - end * size / 21) <= 1
    assert isinstance(mix, Source) and isinstance(mix, MixedSource)


def test_weights_share_out_a_size_and_short_parts_start_again() -> None:
    """Catches: weights normalised by rows, an index beyond a part."""
    mix = DomainMix({"a": rows(2), "b": rows(50)}, {"a": 3}, size=12)
    assert Counter(domains(mix)) == {"a": 9, "b": 3}
    assert [mix[i]["prompt"] for i in range(12) if mix[i]["domain"] == "a"] == ["t0", "t1"] * 4 + ["t0"]
    assert [mix[i]["prompt"] for i in range(12) if mix[i]["domain"] == "b"] == ["t0", "t1", "t2"]
    mix.reweigh({"b": 0})
    assert set(domains(mix)) == {"a"} and len(mix) == 12
    mix.reweigh({"a": 1, "b": 1})
    assert Counter(domains(mix)) == {"a": 6, "b": 6}


def test_rows_say_what_they_are_and_keep_what_they_said() -> None:
    """Catches: a row's own domain, source or uid overwritten; rows of two parts with one uid."""
    own = {"prompt": "t1", "domain": "algebra", "source": "roots", "uid": "r1", "answer": 5}
    parts: dict[str, Any] = {"math": [own], "code": rows(2), "logic": Named(rows(1))}
    mix = DomainMix(parts)
    found = {row["uid"]: row for row in map(mix.__getitem__, range(4))}
    assert found["r1"] == own
    assert found["code/1"] == {"prompt": "t1", "domain": "code", "source": "code", "uid": "code/1"}
    assert "uid" not in parts["code"][0], "the parts' rows stay as they are"
    prompts = PromptStream(mix, toys.tokenizer(), chat=False, shuffle=False).take(4)
    assert {(p.domain, p.source, p.uid) for p in prompts} == {
        ("algebra", "roots", "r1"), ("code", "code", "code/0"), ("code", "code", "code/1"),
        ("logic", "puzzles", "logic/0"),
    }  # fmt: skip


def test_the_source_is_the_domain_of_rows_that_name_none() -> None:
    """Catches: a table with a nameless domain; None out of a table's empty column as a name."""
    for row in ({"prompt": "t1", "source": "roots"}, {"prompt": "t1", "source": "roots", "domain": None}):
        [prompt] = PromptStream([row], toys.tokenizer(), chat=False).take(1)
        assert prompt.domain == "roots"


def test_settings_are_checked() -> None:
    """Catches: a typo in a weight, a mix of nothing."""
    with pytest.raises(ValueError, match="'mathh'"):
        DomainMix({"math": rows(1)}, {"mathh": 1})
    with pytest.raises(ValueError, match=r"mix.math must be a number >= 0"):
        DomainMix({"math": rows(1)}, {"math": -1})
    with pytest.raises(ValueError, match="leaves no domain"):
        DomainMix({"math": rows(1)}).reweigh({"math": 0})
    with pytest.raises(ValueError, match=r"'math': 0"):
        DomainMix({"math": []})
    with pytest.raises(ValueError, match="size must be >= 1"):
        DomainMix({"math": rows(1)}, size=0)
    with pytest.raises(IndexError):
        DomainMix({"math": rows(1)})[1]


def test_rows_that_a_mix_never_shows_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """Catches: half of a data set that no epoch comes to."""
    parts = {"a": rows(10), "b": rows(10)}
    mix = DomainMix(parts, weights={"a": 1.0, "b": 3.0})
    assert {mix[i]["uid"] for i in range(20) if mix[i]["domain"] == "a"} == {f"a/{i}" for i in range(5)}
    assert "5 of 10 rows of 'a': the other rows never come. With size=40 all do" in caplog.text
    caplog.clear()
    whole = DomainMix(parts, weights={"a": 1.0, "b": 3.0}, size=40)
    assert len({(whole[i]["domain"], whole[i]["prompt"]) for i in range(40)}) == 20 and not caplog.text
