"""What the catalogue says of a method comes from its declaration and its docstring."""

from __future__ import annotations

import pytest
from torch import Tensor

import sd_mecha
from sd_mecha.errors import UnknownNameError
from sd_mecha.extensions.catalogue import MethodInfo, Methods
from sd_mecha.extensions.docstrings import read_docstring
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, get_all, merge_method
from sd_mecha.extensions.merge_spaces import MergeSpaceSymbol

OTHER, LIMITED = MergeSpaceSymbol(), MergeSpaceSymbol("weight", "delta")


@merge_method(register=False, tiling="rows")
def several(
    a: Parameter(Tensor),  # type: ignore[valid-type]
    b: Parameter(StateDict[Tensor], OTHER),  # type: ignore[valid-type]
    c: Parameter(Tensor, LIMITED),  # type: ignore[valid-type]
    d: Parameter(Tensor, {"weight", "param"}),  # type: ignore[valid-type]
    *,
    strength: Parameter(float) = 0.5,  # type: ignore[valid-type]
) -> Return(Tensor):  # type: ignore[valid-type]
    """Mix
    several.

    A second paragraph.

    Args:
        a, b: two
            models.
        strength: a number.

    Cost: little.

    >>> 1
    1
    """
    return a


def test_the_facade_lists_all_that_are_registered() -> None:
    known = sd_mecha.methods()
    assert set(known) == {method.identifier for method in get_all()}
    assert all(known[name].method is sd_mecha.extensions.merge_methods.resolve(name) for name in known)


def test_families_stand_together_and_the_repr_has_a_line_for_each() -> None:
    known = sd_mecha.methods()
    hidden = known.chosen_by_config
    in_order = [info.family for info in known.values() if info not in hidden]
    assert in_order == [family for family, infos in known.families.items() for _ in infos]
    assert known.families["ties"] == [known["ties_sum"], known["ties_sum_extended"]]
    lines = repr(known).splitlines()
    assert len(lines) == 1 + len(known.families)
    count = len(hidden)
    assert lines[0].startswith(f"{len(known) - count} merge methods by family, and {count} that are chosen by model")
    assert {"convert_singleton", "exchange_ema_'sd1-ldm'"} <= {info.identifier for info in hidden}
    assert known["exchange_ema"].implementations == ["exchange_ema_'sd1-ldm'"]
    assert any(line.split() == ["ties", "ties_sum,", "ties_sum_extended"] for line in lines)


def test_an_unknown_name_suggests_a_near_one_and_is_a_key_error() -> None:
    known = sd_mecha.methods()
    with pytest.raises(UnknownNameError, match="'slurp'; did you mean 'slerp'"):
        known["slurp"]
    assert known.get("slurp") is None
    assert "slurp" not in known


def test_spaces_and_signature_of_a_declaration() -> None:
    info = MethodInfo(several)
    assert info.merge_spaces == {
        "a": "any",
        "b": "any#2",
        "c": "delta or weight",
        "d": "param or weight",
        "strength": "param",
    }
    assert info.spaces == "any, any#2, delta or weight, param or weight -> any"
    expected = "several(a: Tensor, b: StateDict[Tensor], c: Tensor, d: Tensor, *, strength: float = 0.5) -> Tensor"
    assert info.signature == expected
    assert repr(info) == f"<{expected}: Mix several.>"
    assert (info.tiling, info.cost, info.is_builtin, info.family) == ("rows", "elementwise", False, __name__)


def test_varargs_keep_their_star() -> None:
    info = sd_mecha.methods()["ties_sum"]
    assert info.signature == "ties_sum(*models: Tensor, k: float = 1.0, vote_sgn: bool = False) -> Tensor"
    assert info.spaces == "delta ... -> delta"


def test_parts_of_a_docstring() -> None:
    text = MethodInfo(several).text
    assert text.summary == "Mix several."
    assert text.arguments == {"a": "two models.", "b": "two models.", "strength": "a number."}
    assert (text.formula, text.cost, text.source, text.example) == ("", "little.", "", ">>> 1\n1")
    assert text.whole.startswith("Mix\nseveral.\n\nA second")


def test_no_docstring_and_no_methods() -> None:
    empty = read_docstring(None)
    assert (empty.summary, empty.whole, dict(empty.arguments)) == ("", "", {})
    assert repr(Methods({})).startswith("0 merge methods")
