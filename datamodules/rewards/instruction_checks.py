"""IFEval's instructions as functions from a response and the instruction's arguments to whether it was followed.

Ids and arguments are those of the public data (Zhou et al., arXiv 2311.07911); this code is ours. Departures:

- words are runs of letters, digits and underscores, with inner apostrophes and hyphens where capitals are counted;
  sentences end with ``.``, ``!`` or ``?`` before white space or the end, common abbreviations and initials excepted
  (the original asks NLTK);
- keywords are texts, not patterns;
- ``english_capital`` and ``english_lowercase`` look at the case alone, not at the language;
- ``language:response_language`` is known and not checked (:data:`UNSUPPORTED`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

UNSUPPORTED = {"language:response_language": "no language detector is installed with this library"}

_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]{0,3}(?=\s|$)")
_ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Capt|Lt|Jr|Sr|Inc|Ltd|Co|vs|etc|e\.g|i\.e|Ph\.D|U\.S|No|approx)$",
    re.IGNORECASE,
)
_DIVIDER = re.compile(r"\s?\*\*\*\s?")

Check = Callable[..., bool]


def related(count: int, relation: str, than: int) -> bool:
    """IFEval's two relations.

    Raises:
        ValueError: If the relation is another.
    """
    if relation == "at least":
        return count >= than
    if relation == "less than":
        return count < than
    raise ValueError(f"relation must be 'at least' or 'less than', got {relation!r}.")


def sentences(text: str) -> int:
    """Number of sentences; what follows the last full stop counts as one.

    Example:
        >>> sentences("Dr. Who paid 3.5 dollars. Did he? Yes"), sentences("")
        (3, 0)
    """
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(text):
        before = text[max(start, end.start() - 12) : end.start()]
        if end.group().startswith(".") and end.end() < len(text) and _ABBREVIATION.search(before):
            continue
        if _WORD.search(text, start, end.start()):
            count += 1
        start = end.end()
    return count + (_WORD.search(text, start) is not None)


def _existence(text: str, keywords: list[str]) -> bool:
    return all(word.casefold() in text.casefold() for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return related(text.casefold().count(keyword.strip().casefold()), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return related(text.lower().count(letter.lower()), let_relation, let_frequency)


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return related(sentences(text), relation, num_sentences)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in _DIVIDER.split(text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _words(text: str, num_words: int, relation: str) -> bool:
    return related(len(_WORD.findall(text)), relation, num_words)


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    if (
        sum(bool(part.strip()) for part in parts) != num_paragraphs
        or not 1 <= nth_paragraph <= num_paragraphs
    ):
        return False
    words = parts[nth_paragraph - 1].split()
    if not words:
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'\""))[0]
    return word.lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    letters = {"P.S.": "ps", "P.P.S": "pps"}.get(postscript_marker)
    if letters is None:
        return postscript_marker.casefold() in text.casefold()
    return (
        re.search(r"\b" + r"\.\s?".join(letters) + (r"\." if letters == "ps" else ""), text.lower())
        is not None
    )


def _bullets(text: str, num_bullets: int) -> bool:
    lines = [line.lstrip() for line in text.splitlines()]
    stars = sum(line.startswith("*") and len(line) > 1 and line[1] != "*" for line in lines)
    return stars + sum(line.startswith("-") for line in lines) == num_bullets


def _constrained(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _highlights(text: str, num_highlights: int) -> bool:
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in single + double) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d", text)) >= num_sections


def _json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(part.strip() for part in re.findall(r"<<([^\n<>]+)>>", text))


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capitals(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return related(sum(w.isupper() for w in _TOKEN.findall(text)), capital_relation, capital_frequency)


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "change_case:capital_word_frequency": (_capitals, ("capital_frequency", "capital_relation")),
    "change_case:english_capital": (str.isupper, ()),
    "change_case:english_lowercase": (str.islower, ()),
    "combination:repeat_prompt": (_repeat, ("prompt_to_repeat",)),
    "combination:two_responses": (_two_responses, ()),
    "detectable_content:number_placeholders": (_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": (_postscript, ("postscript_marker",)),
    "detectable_format:constrained_response": (_constrained, ()),
    "detectable_format:json_format": (_json, ()),
    "detectable_format:multiple_sections": (_sections, ("section_spliter", "num_sections")),
    "detectable_format:number_bullet_lists": (_bullets, ("num_bullets",)),
    "detectable_format:number_highlighted_sections": (_highlights, ("num_highlights",)),
    "detectable_format:title": (_title, ()),
    "keywords:existence": (_existence, ("keywords",)),
    "keywords:forbidden_words": (_forbidden, ("forbidden_words",)),
    "keywords:frequency": (_frequency, ("keyword", "frequency", "relation")),
    "keywords:letter_frequency": (_letters, ("letter", "let_frequency", "let_relation")),
    "length_constraints:nth_paragraph_first_word": (
        _first_word,
        ("num_paragraphs", "nth_paragraph", "first_word"),
    ),
    "length_constraints:number_paragraphs": (_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_sentences": (_sentences, ("num_sentences", "relation")),
    "length_constraints:number_words": (_words, ("num_words", "relation")),
    "punctuation:no_comma": (lambda text: "," not in text, ()),
    "startend:end_checker": (_end, ("end_phrase",)),
    "startend:quotation": (_quotation, ()),
}
"""Instruction id → its check and the names of its arguments."""


def variants(text: str) -> list[str]:
    """The eight readings of the loose criterion: with or without first line, last line and asterisks.

    Example:
        >>> variants("Sure!\\n*one*")
        ['Sure!\\n*one*', 'Sure!\\none', '*one*', 'one', 'Sure!', 'Sure!', '', '']
    """
    lines = text.split("\n")
    cuts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = ["\n".join(cut).strip() for cut in cuts]
    return [form for joined in texts for form in (joined, joined.replace("*", ""))]


def followed(text: str, name: str, arguments: Mapping[str, Any], loose: bool) -> bool:
    """Whether a response follows one instruction; an empty one follows none."""
    check = CHECKS[name][0]
    return any(
        bool(form.strip()) and check(form, **arguments) for form in (variants(text) if loose else [text])
    )


def score(item: tuple[tuple[list[tuple[str, dict[str, Any]]], bool, bool], str]) -> float:
    """Share of instructions that ``((instructions, loose, partial), text)`` follows; without ``partial``, 1 or 0."""
    (instructions, loose, partial), text = item
    kept = [followed(text, name, arguments, loose) for name, arguments in instructions]
    return sum(kept) / len(kept) if partial else float(all(kept))
