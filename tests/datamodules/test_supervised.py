"""Given responses by hand, without a Trainer: what is in a batch, and where a loader goes on."""

from __future__ import annotations

import pytest
import torch
import toys

from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.supervised import SupervisedLoader

TOKENIZER = toys.tokenizer()
ROWS = [{"prompt": f"t{i} t{i + 1}", "uid": str(i), "response": f"t{i} t0"} for i in range(7)]


def loader(**settings: int) -> SupervisedLoader:
    stream = PromptStream(ROWS, TOKENIZER, chat=False)
    return SupervisedLoader(stream, TOKENIZER, **{"prompts_per_batch": 3, "steps": 3, **settings})


def test_a_batch_is_the_rows_own_responses_closed_by_eos() -> None:
    for batch in loader():
        assert len(batch) == 3 and not bool(batch.on_policy.any())
        for i, prompt in enumerate(batch.prompts):
            response = batch.input_ids[i][batch.response_mask[i]].tolist()
            assert response == [int(prompt.uid), 0, 22]


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_resumed_equals_uninterrupted(done: int) -> None:
    """At the ends of epochs too. Catches: rows skipped or repeated, an epoch of another length."""
    whole = loader()
    expected = [*whole, *whole]
    first = loader()
    batches = (batch for _ in range(2) for batch in first)
    state = first.state_dict()
    for _ in range(done):
        next(batches)
        state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    rest = [*second, *second]
    assert len(rest) == (3 - done % 3) + 3, (
        "what was left of the epoch (at its end, the next one), and one more"
    )
    for made, wanted in zip(rest, expected[done:], strict=False):
        assert torch.equal(made.input_ids, wanted.input_ids)
        assert [p.uid for p in made.prompts] == [p.uid for p in wanted.prompts]


@pytest.mark.parametrize("name", ["prompts_per_batch", "steps"])
def test_wrong_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        loader(**{name: 0})
