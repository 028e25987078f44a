"""Every built-in method says the same things about itself, in the same places."""

from __future__ import annotations

import re

import pytest

import sd_mecha
from sd_mecha.extensions.catalogue import MethodInfo

KNOWN = sd_mecha.methods()
IMPLEMENTATIONS = {name for info in KNOWN.values() for name in info.implementations}
DOCUMENTED = [info for info in KNOWN.values() if info.is_builtin and info.identifier not in IMPLEMENTATIONS]

RANGE = re.compile(r"\[.+\]|any (odd )?(number|integer)|at (least|most)|above|below|see `|without effect")
KINDS = re.compile(r"weight|delta|model|kind|literal|checkpoint|state dict|LoRA")

each = pytest.mark.parametrize("info", DOCUMENTED, ids=lambda info: info.identifier)


def test_the_methods_are_there() -> None:
    assert len(DOCUMENTED) >= 38
    assert {"weighted_sum", "ties_sum", "rotate", "fallback"} <= {info.identifier for info in DOCUMENTED}


@each
def test_it_starts_with_one_sentence(info: MethodInfo) -> None:
    assert info.summary[:1].isupper()
    assert info.summary.endswith(".")
    assert not re.search(r"[a-z`)]\. [A-Z]", info.summary)


@each
@pytest.mark.parametrize("part", ["formula", "use_when", "cost", "source"])
def test_no_section_is_missing(info: MethodInfo, part: str) -> None:
    assert getattr(info.text, part).endswith((".", "`", ")")), f"{info.identifier}: no {part}, or it does not end"


@each
def test_exactly_its_parameters_are_documented_in_order(info: MethodInfo) -> None:
    assert set(info.text.arguments) == {name.lstrip("*") for name in info.merge_spaces}
    assert all(info.text.arguments.values())


@each
def test_models_are_told_by_kind(info: MethodInfo) -> None:
    models = [name.lstrip("*") for name, space in info.merge_spaces.items() if space != "param"]
    texts = [info.text.arguments[name] for name in models]
    assert not models or any(map(KINDS.search, texts)), texts


@each
def test_numbers_have_a_range(info: MethodInfo) -> None:
    numbers = {
        name: info.text.arguments[name]
        for name, parameter in info.method.signature.parameters.items()
        if info.merge_spaces.get(name) == "param"
        and isinstance(parameter.default, int | float)
        and not isinstance(parameter.default, bool)
    }
    assert {name: text for name, text in numbers.items() if not RANGE.search(text)} == {}


@each
def test_the_example_computes(info: MethodInfo) -> None:
    example = info.text.example
    assert example.startswith(">>> ")
    assert not all(line.startswith((">>>", "...")) for line in example.splitlines()), "it shows no result"


@each
def test_papers_are_named_by_a_whole_arxiv_number(info: MethodInfo) -> None:
    named = re.findall(r"arxiv\S* *(\S*)", info.text.source, re.IGNORECASE)
    assert all(re.match(r"\d{4}\.\d{4,5}\b", number) for number in named), named
