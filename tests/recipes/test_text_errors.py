"""What bad texts are answered with, word for word."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from sd_mecha.errors import (
    MechaError,
    RecipeSyntaxError,
    RecipeTypeError,
    RecipeVersionError,
    UnknownNameError,
)
from sd_mecha.recipes import parser
from sd_mecha.recipes.text import deserialize_text

SYNTAX = [
    (
        'modle "a"',
        """line 2, column 1: unknown instruction 'modle': expected one of model, dict, literal, merge
    modle "a"
    ^""",
    ),
    (
        'model "a',
        """line 2, column 7: this quote is not closed; a quote inside a string is written \\"
    model "a
          ^""",
    ),
    (
        'dict k="a\\"',
        """line 2, column 8: this quote is not closed; a quote inside a string is written \\"
    dict k="a\\"
           ^""",
    ),
    (
        'model "a"\n\n# note\nmerge "subtract" &0 &2',
        """line 5, column 21: &2 refers to no instruction above this one: those above are only &0
    merge "subtract" &0 &2
                        ^""",
    ),
    (
        'model "a"\nmerge "subtract" &0 &1',
        """line 3, column 21: &1 refers to this instruction itself: those above are only &0
    merge "subtract" &0 &1
                        ^""",
    ),
    (
        'model "a"\nmodel "b"\nmerge "subtract" &0 b=&-1',
        """line 4, column 23: &-1 refers to no instruction above this one: those above are &0 to &1
    merge "subtract" &0 b=&-1
                          ^""",
    ),
    (
        'merge "subtract" &0',
        """line 2, column 18: &0 refers to this instruction itself: those above are none yet
    merge "subtract" &0
                     ^""",
    ),
    (
        'model "a"\nmerge "subtract" &zero',
        """line 3, column 18: '&zero' is no reference: '&' is followed by a number
    merge "subtract" &zero
                     ^""",
    ),
    (
        "  dict w=True",
        """line 2, column 10: cannot read 'True': expected null, true, false, a number, a reference such as \
&0 or a "quoted string", with spaces and no tabs between values
      dict w=True
             ^""",
    ),
    (
        "dict w= 1",
        """line 2, column 8: a value is missing after '='
    dict w= 1
           ^""",
    ),
    (
        "dict 1",
        """line 2, column 6: a dict holds key=value pairs, and this has no key
    dict 1
         ^""",
    ),
    (
        r'dict a=1 b=2 "\u0061"=3',
        """line 2, column 14: 'a' is given twice
    dict a=1 b=2 "\\u0061"=3
                 ^""",
    ),
    (
        'model "a"\nmerge "weighted_sum" &0 &0 alpha=0.1 alpha=0.9',
        """line 3, column 38: 'alpha' is given twice
    merge "weighted_sum" &0 &0 alpha=0.1 alpha=0.9
                                         ^""",
    ),
    (
        'model "a" null model_config=null',
        """line 2, column 16: 'model_config' is given twice
    model "a" null model_config=null
                   ^""",
    ),
    (
        "dict w=" + "9" * 5000,
        """line 2, column 8: a decimal number of 5000 digits is too long: write it in hexadecimal, 0x...
    dict w=%s
           ^"""
        % ("9" * 5000),
    ),
    (
        "model",
        """line 2, column 1: model is followed by the path of a file
    model
    ^""",
    ),
    (
        'model "a" foo=1',
        """line 2, column 11: model takes model_config and merge_space, and nothing else
    model "a" foo=1
              ^""",
    ),
    (
        'model "a" model_config=5',
        """line 2, column 24: expected null or a name as a "quoted string"
    model "a" model_config=5
                           ^""",
    ),
    (
        "model 5",
        """line 2, column 7: a model takes the path of a file as a quoted string
    model 5
          ^""",
    ),
    (
        'model "a"\nliteral &0',
        """line 3, column 9: a literal takes a reference to a dict instruction, such as &0
    literal &0
            ^""",
    ),
    (
        "merge subtract &0",
        """line 2, column 7: merge is followed by the name of a method as a quoted string
    merge subtract &0
          ^""",
    ),
    ("# nothing", "the text holds a version but no instruction: a recipe has at least one"),
]


def failure(body: str, kind: type[MechaError]) -> str:
    with pytest.raises(kind) as caught:
        deserialize_text("version 0.1.0\n" + body)
    return str(caught.value)


@pytest.mark.parametrize(("body", "message"), SYNTAX)
def test_syntax(body: str, message: str) -> None:
    assert failure(body, RecipeSyntaxError) == message


@pytest.mark.parametrize(
    "body",
    [
        "dict a=1 b=2 c=3 d=4 e=5 f=6",
        'model "a"\n' + 'merge "n_average" &0 &0 &0\n' * 5,
        'merge "n_average" 1 2 3 4 5 "6"',
        "dict a=1 b=2\n" + "literal &0\n" * 4,  # each holds them anew
        "dict\n" * 9,
    ],
)
def test_a_recipe_that_would_fill_memory_is_refused(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(parser, "_MAX_MEMORY", 3000)
    assert "the recipe is too large: up to here it takes more than 3 kB of memory" in failure(body, RecipeSyntaxError)


def test_a_text_has_a_largest_size() -> None:
    assert "expected at most 67108864 bytes" in failure(" " * parser.MAX_TEXT, RecipeSyntaxError)


def test_a_recipe_of_100_000_merges_is_not_too_large() -> None:
    body = 'model "a"\nmodel "b"\n' + "".join(f'merge "weighted_sum" &{i + 1} &0 alpha=0.5\n' for i in range(100_000))
    assert deserialize_text("version 0.1.0\n" + body).label() == "merge 'weighted_sum'"


@pytest.mark.parametrize(
    ("count", "line"),
    [
        (1000, 'merge "weighted_sum" &0 0.25 alpha=0.5'),
        (
            20,
            "dict " + " ".join(f"model.diffusion_model.input_blocks.{i}.0.out_layers.3.weight=0.5" for i in range(250)),
        ),
        (20, "dict " + " ".join(f'{i}="\x01"' for i in range(250))),
        (1, 'merge "n_average"' + " 1" * 1000),
        (1, 'merge "n_average"' + " &0" * 10_000),
        (1, 'model "' + "\u0378" * 100_000 + '"'),
        (1, 'model "\U0001f600' + "\u0378" * 100_000 + '"'),
        (1, "dict " + " ".join(f"{i}=&0" for i in range(3000))),
        (100_000, ""),
    ],
)
def test_what_is_counted_is_about_the_memory_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, count: int, line: str
) -> None:
    text = 'version 0.1.0\nmodel "a"\n' + (line + "\n") * count
    deserialize_text(text.split("\n", 3)[:3])  # what is made once is no part of it
    tracemalloc.start()
    try:
        deserialize_text(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    peak += parser.text_size(text)
    monkeypatch.setattr(parser, "_MAX_MEMORY", (peak - 10_000) / 2)
    assert "the recipe is too large" in failure(text.partition("\n")[2], RecipeSyntaxError)
    monkeypatch.setattr(parser, "_MAX_MEMORY", peak * 8)
    deserialize_text(text)


def test_position_is_also_given_as_numbers() -> None:
    with pytest.raises(ValueError, match="unknown instruction") as caught:
        deserialize_text('version 0.1.0\n model "a"\n  what')
    assert isinstance(caught.value, RecipeSyntaxError)
    assert (caught.value.line, caught.value.column) == (3, 3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            'model "a"\nmerge "weighted_sun" &0 &0',
            """line 3, column 7: unknown merge method 'weighted_sun'
    merge "weighted_sun" &0 &0
          ^""",
        ),
        (
            'model "a" model_config="nope-nope"',
            """line 2, column 24: unknown model config 'nope-nope'
    model "a" model_config="nope-nope"
                           ^""",
        ),
        (
            'model "a" merge_space="nope"',
            """line 2, column 23: unknown merge space 'nope'
    model "a" merge_space="nope"
                          ^""",
        ),
    ],
)
def test_unknown_names(body: str, message: str) -> None:
    assert failure(body, UnknownNameError) == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            'model "a"\nmerge "weighted_sum" &0',
            """line 3, column 7: missing a required argument: 'b'
    merge "weighted_sum" &0
          ^""",
        ),
        (
            'model "a"\nmerge "weighted_sum" &0 &0 &0 alpha=1',
            """line 3, column 7: multiple values for argument 'alpha'
    merge "weighted_sum" &0 &0 &0 alpha=1
          ^""",
        ),
    ],
)
def test_arguments_that_a_method_refuses(body: str, message: str) -> None:
    assert failure(body, RecipeTypeError) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty: expected 'version 0.1.0' and instructions"),
        ([], "the text is empty: expected 'version 0.1.0' and instructions"),
        (
            'model "a"',
            """line 1, column 1: the version is missing: the first line of a recipe is 'version 0.1.0'
    model "a"
    ^""",
        ),
        (
            'version 9.9.9\nmodel "a"',
            """line 1, column 1: version '9.9.9' cannot be read: this release reads version 0.1.0
    version 9.9.9
    ^""",
        ),
    ],
)
def test_version(text: Any, message: str) -> None:
    with pytest.raises(RecipeVersionError) as caught:
        deserialize_text(text)
    assert str(caught.value) == message
    assert isinstance(caught.value, (ValueError, RuntimeError))


@pytest.mark.parametrize("text", [b"version 0.1.0", Path("a.mecha"), None, [b"version 0.1.0"]])
def test_only_text_is_read(text: Any) -> None:
    with pytest.raises(RecipeTypeError, match="a recipe is read from a str or a list of lines, got"):
        deserialize_text(text)


@pytest.mark.parametrize("body", ['dict w=__import__("os")', "dict w=[1]", "dict w=1+1", "dict w={}"])
def test_nothing_is_evaluated(body: str) -> None:
    assert "line 2" in failure(body, RecipeSyntaxError)
