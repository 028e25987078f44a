"""`sd-mecha methods`: the list, one method, and a name that is none."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import sd_mecha
from sd_mecha.cli import main
from sd_mecha.cli.methods import table
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.merge_methods import _registry as registry


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["methods", *arguments])


def test_the_list_has_every_method_in_its_family() -> None:
    result = call()
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    position = {words[0]: number for number, words in reversed(list(enumerate(lines)))}
    known = sd_mecha.methods()
    assert set(known) <= set(position)
    for family, infos in known.families.items():
        first = next(number for number, words in enumerate(lines) if words == [family])
        rows = sorted(position[info.identifier] for info in infos if info.identifier != family)
        assert all(number > first for number in rows), family


def test_a_line_of_the_list_has_all_facts() -> None:
    (line,) = (line for line in call().stdout.splitlines() if line.split()[:1] == ["add_difference"])
    assert [cell.strip() for cell in line.split("  ") if cell.strip()] == [
        "add_difference",
        "Add a difference of models to a model: task arithmetic.",
        "any, delta -> any",
        "elementwise",
    ]


def test_in_a_narrow_terminal_the_facts_are_below() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(sd_mecha.methods(), wide=False))
    text = captured.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "any, delta -> any; elementwise" in text


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "slerp",
            [
                "slerp(a: Tensor, b: Tensor, alpha: Tensor = 0.5) -> Tensor\n",
                "\nMerge spaces: a any, b any, alpha param -> any\n",
                "\nCost class: streamed (",
            ],
        ),
        ("ties_sum", ["\nMerge spaces: *models delta, k param, vote_sgn param -> delta\n"]),
        ("subtract", ["\nMerge spaces: a weight, b weight -> delta\n", "\nCost class: elementwise ("]),
        ("truncate_rank", ["\nCost class: whole ("]),
        ("exchange_ema", ["\nCost class: dispatch (", "\nImplemented by: exchange_ema_'sd1-ldm'\n"]),
        ("fallback", ["\nCost class: selection ("]),
        ("get_rank_from_ratio", ["\nMerge spaces: a delta or weight, ratio param -> param\n", "\nCost class: shape ("]),
    ],
)
def test_one_method_is_told_in_full(name: str, parts: list[str]) -> None:
    result = call(name)
    assert result.exit_code == 0, result.stderr
    assert sd_mecha.methods()[name].text.whole in result.stdout
    for part in parts:
        assert part in result.stdout


def test_an_unknown_name_is_code_1_with_one_message() -> None:
    result = call("weighted_summ")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: unknown merge method: 'weighted_summ'; did you mean 'weighted_sum'?\n"


def test_methods_of_others_are_listed_without_a_docstring(request: pytest.FixtureRequest) -> None:
    def halved_for_this_test(a: float) -> float:
        return a / 2

    annotations = {"a": Parameter(float), "return": Return(float)}
    halved_for_this_test.__annotations__ = annotations
    merge_method(halved_for_this_test)
    request.addfinalizer(lambda: registry.remove("halved_for_this_test"))
    assert "halved_for_this_test" in call().stdout
    assert "(no docstring)" in call("halved_for_this_test").stdout
