"""Rollouts over the wire: ids and log-probabilities as sampled, the newest weights, and faults that say what to do."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import toys
from fits import trainer
from vllm_fake import FakeVLLM
from workspace import onpolicy, workspace

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.engines import TransformersEngine, VLLMServerEngine
from lightning_onpolicy.datamodules.engines.base import StreamingEngine
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.specs import LoraSpec, ModelSpec

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [6, 5]]
DRAW = Sampling(temperature=0.8, max_new_tokens=6)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toys.save_model(tmp_path_factory.mktemp("model") / "student", 0, scale=3.0)


@pytest.fixture
def policy(path: str) -> Policy:
    return ModelSpec(path, dtype="float32").load()


@pytest.fixture
def server(path: str) -> Iterator[FakeVLLM]:
    with FakeVLLM(path) as fake:
        yield fake


def engine(server: FakeVLLM, policy: Any, folder: Path, **settings: Any) -> VLLMServerEngine:
    return VLLMServerEngine(policy, server.url, str(folder), **settings)


def synced(server: FakeVLLM, policy: Policy, folder: Path, **settings: Any) -> VLLMServerEngine:
    found = engine(server, policy, folder, **settings)
    found.sync(policy, 0)
    return found


def gap(policy: Policy, groups: list[list[Any]], temperature: float = 0.8) -> float:
    """How far the log-probabilities are from the policy's own."""
    worst = 0.0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            ids = torch.tensor([[*prompt, *c.ids.tolist()]])
            with torch.no_grad():
                logits = policy.model(ids).logits[0].float() / temperature
            logits[:, policy.head.vocab_size :] = -torch.inf
            logp = logits.log_softmax(-1)
            own = logp[range(len(prompt) - 1, ids.shape[1] - 1), c.ids]
            worst = max(worst, float((own - c.logprobs).abs().max()))
    return worst


def stir(policy: Policy, factor: float = 1.3) -> None:
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(factor)


def test_completions_come_in_order_with_the_log_probabilities_sampled_from(
    server: FakeVLLM, policy: Policy, tmp_path: Path
) -> None:
    rollouts = engine(server, policy, tmp_path)
    assert isinstance(rollouts, StreamingEngine)
    rollouts.sync(policy, 7)
    groups = rollouts.generate(PROMPTS, 3, DRAW, seed=1)
    assert [len(group) for group in groups] == [3] * 4
    assert gap(policy, groups) < 1e-5
    assert {c.version for group in groups for c in group} == {7}
    assert {c.finish for group in groups for c in group} <= {"eos", "length"}
    streamed: dict[int, Any] = {}
    rollouts.stream(PROMPTS, 3, DRAW, 1, streamed.__setitem__)
    for number, group in enumerate(groups):
        assert [c.ids.tolist() for c in streamed[number]] == [c.ids.tolist() for c in group]


def test_equal_prompts_draw_apart_and_numbers_say_by_what(
    server: FakeVLLM, policy: Policy, tmp_path: Path
) -> None:
    rollouts = synced(server, policy, tmp_path)
    texts = [
        [c.ids.tolist() for c in group]
        for seed, numbers in ((1, None), (2, None), (1, [1, 0]))
        for group in rollouts.generate([PROMPTS[0]] * 2, 4, DRAW, seed, numbers=numbers)
    ]
    assert len({json.dumps(t) for t in texts[:4]}) == 4
    assert texts[4:] == [texts[1], texts[0]]


def test_what_ends_a_completion(server: FakeVLLM, policy: Policy, tmp_path: Path) -> None:
    rollouts = engine(server, policy, tmp_path)
    rollouts.sync(policy, 0)
    every = tuple(range(policy.head.vocab_size))
    [[stopped]] = rollouts.generate([PROMPTS[0]], 1, Sampling(max_new_tokens=6, stop_token_ids=every), 0)
    assert stopped.finish == "eos" and len(stopped.ids) == 1
    [group] = rollouts.generate([PROMPTS[0]], 8, Sampling(max_new_tokens=6, min_new_tokens=6), 0)
    assert all(len(c.ids) == 6 for c in group) and "length" in {c.finish for c in group}
    words = Sampling(max_new_tokens=6, stop=("t",))
    assert {c.finish for c in rollouts.generate([PROMPTS[0]], 8, words, 0)[0]} <= {"stop", "eos"}
    short = rollouts.generate(
        PROMPTS, 2, Sampling(max_new_tokens=6, min_new_tokens=3), 0, budgets=[1, 2, 3, 4]
    )
    assert [max(len(c.ids) for c in group) for group in short] == [1, 2, 3, 4]


def test_it_samples_from_the_newest_weights_and_nothing_is_sent_twice(
    server: FakeVLLM, policy: Policy, tmp_path: Path
) -> None:
    rollouts = engine(server, policy, tmp_path)
    for version in (0, 1, 1, 2):
        if version:
            stir(policy, 1.1)
        rollouts.sync(policy, version)
        assert gap(policy, rollouts.generate(PROMPTS, 2, DRAW, version)) < 1e-5
    assert len(server.reloads) == 1 + 4 == server.flushes, (
        "changed ones first; a reset changes them between two steps"
    )
    rollouts.sync(policy, 3)
    assert len(server.reloads) == 5 and rollouts.version == 3
    for p in policy.parameters():
        p.data.mul_(1.1)  # as Lightning's averages are put in
    rollouts.sync(policy, 3)
    assert len(server.reloads) == 6
    assert gap(policy, rollouts.generate(PROMPTS, 2, DRAW, 9)) < 1e-5
    assert len(list(tmp_path.glob("rank-0-*/*"))) == 1, "one checkpoint at a time"
    rollouts.close()
    assert not list(tmp_path.iterdir())
    rollouts.sync(policy, 3)
    assert len(server.reloads) == 7
    del rollouts
    gc.collect()
    assert not list(tmp_path.iterdir()), "also where nobody closed it"


def test_adapters_are_merged_into_what_is_sent_alone(server: FakeVLLM, path: str, tmp_path: Path) -> None:
    policy = ModelSpec(path, dtype="float32", lora=LoraSpec(r=2)).load()
    torch.manual_seed(0)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    rollouts = engine(server, policy, tmp_path)
    rollouts.sync(policy, 0)
    assert gap(policy, rollouts.generate(PROMPTS, 2, DRAW, 0)) < 1e-4
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("part", ["", "embed_tokens", "q_proj", "norm"])
def test_a_server_that_keeps_weights_is_noticed_before_the_first_sample(
    path: str, policy: Policy, tmp_path: Path, part: str
) -> None:
    """It serves the policy's own model, so nothing else would tell: small steps would stay below what is noticed.

    vLLM for CPUs does so with a tied head, silently.
    """
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    with FakeVLLM(path, deaf_to=part) as server:
        rollouts = engine(server, policy, tmp_path)
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"nats off the policy's own .* not all weights were replaced"
            ):
                rollouts.sync(policy, 1)
            with pytest.raises(RuntimeError, match="call sync first"):
                rollouts.generate(PROMPTS, 1, DRAW, 0)
        assert rollouts.version == 0
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())


def test_weights_that_stop_arriving_are_noticed(server: FakeVLLM, policy: Policy, tmp_path: Path) -> None:
    rollouts = synced(server, policy, tmp_path)
    server.deaf_to = ""
    stir(policy, 1.05)
    with pytest.raises(RuntimeError, match=r"nats off the policy's own"):
        rollouts.sync(policy, 1)


def test_greedy_ones_are_asked_for_once(server: FakeVLLM, policy: Policy, tmp_path: Path) -> None:
    rollouts = synced(server, policy, tmp_path)
    greedy = Sampling(temperature=0, max_new_tokens=6)
    served = rollouts.generate(PROMPTS, 3, greedy, 0)
    here = TransformersEngine(policy).generate(PROMPTS, 3, greedy, 0)
    assert [[c.ids.tolist() for c in g] for g in served] == [[c.ids.tolist() for c in g] for g in here]
    for temperature in (0.001, 2.5):
        with pytest.raises(ValueError, match=r"temperatures from 0\.01 to 2"):
            rollouts.generate(PROMPTS, 1, Sampling(temperature=temperature), 0)


def test_rows_of_the_head_without_a_token_are_never_drawn(
    server: FakeVLLM, path: str, tmp_path: Path
) -> None:
    policy = ModelSpec(path, dtype="float32").load()
    rollouts = synced(server, policy, tmp_path)
    rollouts.generate(PROMPTS[:1], 1, DRAW, 0)
    rows, known = policy.head.weight.shape[0], policy.head.vocab_size
    assert rows > known
    assert server.asked[-1]["logit_bias"] == {str(i): -100.0 for i in range(known, rows)}
    policy.head.vocab_size = rows
    rollouts.generate(PROMPTS[:1], 1, DRAW, 0)
    assert "logit_bias" not in server.asked[-1]


def test_training_with_it_is_training_on_policy(server: FakeVLLM, path: str, tmp_path: Path) -> None:
    """Lag 0, and the ratio 1 of an engine in process, step after step."""
    module = OnPolicyDistill(
        ModelSpec(path, dtype="float32"),
        toys.policy(1, scale=3.0),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
    )
    data = OnPolicyDataModule(
        train=[{"prompt": f"t{i} t{i + 1}"} for i in range(4)],
        prompts_per_batch=4,
        group_size=2,
        steps_per_epoch=3,
        sampling=Sampling(max_new_tokens=6),
        engine=lambda policy: engine(server, policy, tmp_path / "weights"),
    )
    seen: list[float] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert float(trainer.callback_metrics["train/policy_lag"]) == 0
            seen.append(float(trainer.callback_metrics["train/mismatch_max_log_ratio"]))

    trainer(tmp_path, [Look()]).fit(module, datamodule=data)
    assert len(seen) == 3 and max(seen) < 1e-4
    assert len(server.reloads) == 1 + 3


def test_a_configuration_names_it(tmp_path: Path) -> None:
    config = workspace(tmp_path / "place")
    with FakeVLLM(str(tmp_path / "place" / "student")) as server:
        arguments = {"base_url": server.url, "weights": str(tmp_path / "weights")}
        chosen = {"class_path": "VLLMServerEngine", "init_args": arguments}
        assert onpolicy("fit", "-c", config, f"--data.init_args.engine={json.dumps(chosen)}") == 0
        assert len(server.reloads) == 1 + 3, "two steps, and validation after the second"
        assert not list((tmp_path / "weights").iterdir())
        # Without a training step before it, in inference mode.
        assert onpolicy("validate", "-c", config, f"--data.init_args.engine={json.dumps(chosen)}") == 0
        assert len(server.reloads) == 4 + 2


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"dev_mode": False}, RuntimeError, "answered 404: .*VLLM_SERVER_DEV_MODE=1 vllm serve"),
        ({"logprobs_mode": "raw_logprobs"}, ValueError, "raw_logprobs.*--logprobs-mode processed_logprobs"),
        ({"token_ids": False}, RuntimeError, "no token ids"),
    ],
)
def test_servers_that_do_not_fit_are_refused(
    path: str, policy: Policy, tmp_path: Path, settings: dict[str, Any], error: Any, words: str
) -> None:
    with FakeVLLM(path, **settings) as server, pytest.raises(error, match=words):
        synced(server, policy, tmp_path)


def test_faults_say_who_and_what(server: FakeVLLM, policy: Policy, path: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="call sync first"):
        engine(server, policy, tmp_path).generate(PROMPTS, 1, DRAW, 0)
    rollouts = synced(server, policy, tmp_path)
    with pytest.raises(RuntimeError, match=r"answered 400: .*maximum context length is 64"):
        rollouts.generate([[5] * 60], 1, Sampling(max_new_tokens=30), 0)
    with pytest.raises(ValueError, match="no prompt may be empty"):
        rollouts.generate([[]], 1, DRAW, 0)
    with pytest.raises(ValueError, match="policy it was made with"):
        rollouts.sync(toys.policy(3), 0)
    with pytest.raises(TypeError, match="save_pretrained"):
        engine(server, torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="2 servers for 1 ranks"):
        VLLMServerEngine(policy, [server.url] * 2, str(tmp_path))
    with pytest.raises(ValueError, match="concurrency must be positive"):
        engine(server, policy, tmp_path, concurrency=0)
    with FakeVLLM(path) as slow:
        late = synced(slow, policy, tmp_path), synced(slow, policy, tmp_path)
        late[0].deadline_s, late[1]._wire.timeout_s = 0.2, 0.3
        slow.delay_s = 1.0
        with pytest.raises(TimeoutError, match=r"2 of 2 prompts are unanswered .*deadline_s=0\.2"):
            late[0].generate(PROMPTS[:2], 1, DRAW, 0)
        with pytest.raises(TimeoutError, match=r"within timeout_s=0\.3"):
            late[1].generate(PROMPTS[:1], 1, DRAW, 0)
    with pytest.raises(RuntimeError, match=r"cannot be asked .*Is the server there\?"):
        engine(slow, policy, tmp_path)


def test_every_rank_has_a_server_of_its_own(
    server: FakeVLLM, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="1 servers for 2 ranks"):
        engine(server, policy, tmp_path)
    VLLMServerEngine(policy, ["http://127.0.0.1:9", server.url + "/v1/"], str(tmp_path)).sync(policy, 0)
    assert "rank-1-" in server.reloads[0]


def test_in_process_and_served_draw_from_the_same_distribution(
    server: FakeVLLM, policy: Policy, tmp_path: Path
) -> None:
    """Frequencies of the first token of many completions, filters on."""
    draw = Sampling(temperature=1.3, top_k=3, max_new_tokens=1)
    rollouts = engine(server, policy, tmp_path)
    rollouts.sync(policy, 0)
    counts = []
    for source in (rollouts, TransformersEngine(policy)):
        [group] = source.generate([PROMPTS[0]], 600, draw, 5)
        counts.append(torch.bincount(torch.cat([c.ids for c in group]), minlength=64) / 600)
    assert float((counts[0] - counts[1]).abs().max()) < 0.1
    assert int((counts[0] > 0).sum()) <= 3
