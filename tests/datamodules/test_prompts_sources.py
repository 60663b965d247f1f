"""Rows from files and datasets."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.sources import DatasetSource, FileSource, GymSource, Source

ROWS = [{"prompt": f"p{i}", "answer": str(i), "nested": {"a": [i]}} for i in range(3)]


def write(folder: Path, ending: str) -> Path:
    file = folder / f"train{ending}"
    if ending == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(file))
    elif ending == ".json":
        file.write_text(json.dumps(ROWS))
    else:
        file.write_text("\n".join(json.dumps(r) for r in ROWS) + "\n\n")
    return file


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".parquet"])
def test_all_formats_give_the_same_rows(tmp_path: Path, ending: str) -> None:
    source = FileSource(str(write(tmp_path, ending)))
    assert isinstance(source, Source)
    assert [source[i] for i in range(len(source))] == ROWS
    assert source.name == "train"


def test_keys_are_translated(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    file.write_text(json.dumps({"question": "q", "gold": "g", "messages": None, "teacher": "t"}))
    row = FileSource(file, prompt_key="question", answer_key="gold", response_key="teacher")[0]
    assert (row["prompt"], row["answer"], row["response"]) == ("q", "g", "t")


def test_null_key_chooses_between_prompt_and_messages(tmp_path: Path) -> None:
    file = tmp_path / "both.jsonl"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file.write_text(json.dumps({"prompt": "p", "messages": talk}))
    with pytest.raises(ValueError, match=r"line 1.*both.*null"):
        FileSource(file)
    assert FileSource(file, messages_key=None)[0] == {"prompt": "p"}
    assert FileSource(file, prompt_key=None)[0] == {"messages": talk[:1], "response": "ho"}


def test_a_conversation_may_be_called_a_prompt(tmp_path: Path) -> None:
    """As TRL has it. Catches: "must be a string", for the commonest format of chat data."""
    file = tmp_path / "chat.jsonl"
    file.write_text('{"prompt": [{"role": "user", "content": "hi"}], "answer": "ho"}\n')
    assert FileSource(str(file))[0] == {"messages": [{"role": "user", "content": "hi"}], "answer": "ho"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"bad\.jsonl line 2: not JSON"),
        ("bad.jsonl", '{"prompt": "a"}\n[1]\n', r"bad\.jsonl line 2: a row must be a mapping.*list"),
        (
            "bad.jsonl",
            '{"prompt": "a"}\n\n{"text": "b"}\n',
            r"line 3: neither 'prompt' nor 'messages'.*\['text'\]",
        ),
        ("bad.json", '{"prompt": "a"}', r"bad\.json: expected a list of objects, got dict"),
        ("bad.json", "[{]", r"bad\.json: not JSON"),
        ("bad.json", '[{"prompt": 1}]', r"bad\.json row 0: 'prompt' must be a string"),
        ("bad.parquet", "not parquet", r"bad\.parquet: not a Parquet file"),
        (
            "bad.jsonl",
            '{"prompt": "a"}\n{"prompt": "b\\ud83d"}\n',
            r"bad\.jsonl line 2: 'prompt' holds '\\ud83d' at character 1.*half of a character",
        ),
        (
            "bad.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\udfff"}]}]}',
            r"line 1: 'messages'\[0\]\['content'\]\[0\]\['text'\] holds '\\udfff'",
        ),
        ("bad.json", '[{"prompt": "a", "response": "\\ud83d"}]', r"bad\.json row 0: 'response' holds"),
        ("bad.csv", "prompt\n", r"cannot read '\.csv' files.*\.jsonl"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        FileSource(tmp_path / name)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_file_in_another_encoding_is_named(tmp_path: Path, ending: str) -> None:
    """Catches: an error that says where in the file, and not which file."""
    (tmp_path / f"old.{ending}").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"old\.{ending}: not UTF-8"):
        FileSource(tmp_path / f"old.{ending}")


def test_half_a_character_is_named_by_every_way_into_a_prompt() -> None:
    """Catches: a tokenizer that fails on it with no row named."""
    with pytest.raises(ValueError, match=r"row 'list/1': 'prompt' holds '\\ud83d' at character 0"):
        PromptStream([{"prompt": "a"}, {"prompt": "\ud83d"}], _Echo(), chat=False, shuffle=False).take(2)
    with pytest.raises(ValueError, match=r"^system holds '\\ud83d' at character 2"):
        PromptStream(ROWS, _Chat(), system="ab\ud83d")


def test_a_missing_file_and_a_missing_named_key(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        FileSource(tmp_path / "nowhere.jsonl")
    with pytest.raises(
        ValueError, match=r"line 1: key 'gold' \(named by answer_key\).*\['answer', 'nested', 'prompt'\]"
    ):
        FileSource(write(tmp_path, ".jsonl"), answer_key="gold")


def test_datasets_in_memory_on_disk_and_by_loader(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(str(tmp_path / "dict"))
    file = write(tmp_path, ".jsonl")
    for source in (
        DatasetSource(data),
        DatasetSource(str(tmp_path / "one")),
        DatasetSource(str(tmp_path / "dict")),
        DatasetSource("json", data_files=str(file)),
    ):
        assert [source[i] for i in range(len(source))] == ROWS
    assert DatasetSource(str(tmp_path / "dict"), split="test")[0] == ROWS[2]
    with pytest.raises(ValueError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        DatasetSource(str(tmp_path / "dict"), split="dev")
    with pytest.raises(ValueError, match="no length"):
        DatasetSource(data.to_iterable_dataset())
    with pytest.raises(ValueError, match="row 1: key 'gold'"):
        DatasetSource(data, prompt_key="gold")[1]


def test_a_dataset_and_a_list_are_sources_as_they_are() -> None:
    from_list = PromptStream(ROWS, _Echo(), chat=False, seed=5).take(6)
    from_dataset = PromptStream(datasets.Dataset.from_list(ROWS), _Echo(), chat=False, seed=5).take(6)
    assert [p.text for p in from_list] == [p.text for p in from_dataset]


def test_command_line_types_accept_every_source(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--train", type=Source | None)
    file = write(tmp_path, ".jsonl")
    for spec in (
        {"class_path": "lightning_onpolicy.datamodules.sources.FileSource", "init_args": {"path": str(file)}},
        {
            "class_path": "lightning_onpolicy.datamodules.sources.DatasetSource",
            "init_args": {"path": "json", "data_files": str(file)},
        },
        {
            "class_path": "lightning_onpolicy.datamodules.sources.GymSource",
            "init_args": {"tasks": {"chain_sum": {"weight": 1}}, "size": 3},
        },
    ):
        made = parser.instantiate_classes(parser.parse_object({"train": spec})).train
        assert len(made) == 3
        assert made[0]["prompt"]
    assert isinstance(made, GymSource)


class _Echo:
    """The least a tokenizer can be."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


class _Chat(_Echo):
    """One with a template."""

    chat_template = "{{ messages }}"
