"""What a header answers about sizes, also where keys are missing."""

from __future__ import annotations

import pytest
import torch

from sd_mecha.extensions.header import Header, MissingShapeError
from sd_mecha.extensions.header_views import TranslatedHeader, read_through
from sd_mecha.extensions.layouts import rename, split, squeeze
from sd_mecha.storage.contract import TensorEntry


def header(*keys: str, prefix: str = "", **shapes: tuple[int, ...]) -> Header:
    """Keys without shapes, and `a__0__b` -> shape for the key `a.0.b`."""
    entries: dict[str, TensorEntry | None] = dict.fromkeys(keys)
    entries |= {key.replace("__", "."): TensorEntry(shape, torch.float32) for key, shape in shapes.items()}
    return Header(entries, prefix)


class TestPatterns:
    def test_a_star_stands_for_a_number_between_dots(self) -> None:
        found = header("layers.12.up", "layers2.up", "x")
        assert "layers.*.up" in found
        assert "layers.12.up" in found
        assert "layers.11.up" not in found
        assert "layers2.up" in found
        assert "layers*.up" not in found
        assert found.has("nothing", "x")
        assert not found.has("nothing", "y")
        assert list(found) == ["layers.*.up", "layers2.up", "x"]

    def test_some_numbers_may_be_given(self) -> None:
        found = header(a__0__mlp__0=(8, 2), a__0__mlp__2=(3, 4), a__1__mlp__2=(3, 4))
        assert found.shape("a.*.mlp.0") == (8, 2)
        assert found.shape("a.*.mlp.2") == (3, 4)
        assert found.shape("a.1.mlp.*") == (3, 4)
        assert "a.1.mlp.0" not in found

    def test_below_a_prefix(self) -> None:
        found = header("other.1.x", net__a__1__b=(2,)).below("net.")
        assert list(found) == ["a.*.b"]
        assert found.count("a") == 2
        assert found.size("a.*.b", 0) == 2
        assert "net.a.*.b" not in found


class TestSizes:
    def test_any_layer_answers(self) -> None:
        found = header("a.0.w", "a.1.w", a__2__w=(5, 6))
        assert found.size("a.*.w", 0) == 5
        assert found.sized("a.*.w")
        assert not found.sized("a.0.w")

    def test_other_patterns_answer(self) -> None:
        found = header(a=(5, 6), b=(7,))
        assert found.size("missing", 1, "also_missing", "a") == 6
        assert found.either(("missing", 4), ("b", 0), ("a", 1)) == 7

    def test_missing(self) -> None:
        found = header("unknown", a=(5, 6))
        for pattern in ("missing", "unknown"):
            with pytest.raises(MissingShapeError, match=pattern):
                found.size(pattern, 0)
        with pytest.raises(LookupError, match="a has 2 axes") as error:
            found.size("a", 2)
        assert not isinstance(error.value, MissingShapeError)
        with pytest.raises(MissingShapeError, match="first"):
            found.either(("first", 0), ("second", 1))

    def test_counts_reach_to_the_greatest_number(self) -> None:
        found = header("a.0.x", "a.7.x", "a.3.b.1.y", "c")
        assert (found.count("a"), found.count("a.*.b"), found.count("c")) == (8, 2, 0)
        assert found.reach("a.*.b.*.y", "a.*.nothing") == 4
        assert found.reach("c.*.x") == 0

    def test_agreement(self) -> None:
        found = header("unknown", a=(1,), b=(2,), c=(3,))
        known = {"a": (1,), "b": (2,), "c": (9,), "unknown": (5,)}
        assert found.agrees(known.get)
        assert not found.agrees({"a": (1,), "b": (9,), "c": (9,)}.get)
        assert found.agrees({}.get)


class TestTranslation:
    RULES = (
        rename("blocks.*.mlp.0", "layers.*.up"),
        rename("blocks.*.mlp.2", "layers.*.down"),
        split("blocks.*.qkv", "layers.*.q", "layers.*.k", "layers.*.v"),
        squeeze("out", "head"),
        rename("groups.*.items.*", "sets.*.of.*"),
    )

    def test_is_asked_by_the_names_that_the_rules_start_from(self) -> None:
        found = TranslatedHeader(
            header(
                layers__0__up=(8, 2),
                layers__1__down=(2, 8),
                layers__2__v=(2, 3),
                layers__0__k=(2, 3),
                layers__1__q=(4, 3),
                head=(4, 5),
            ),
            self.RULES,
        )
        assert found.shape("blocks.*.mlp.0") == (8, 2)
        assert found.shape("blocks.*.mlp.2") == (2, 8)
        assert found.shape("blocks.*.qkv") == (8, 3)
        assert found.size("out", 0) == 4
        assert found.count("blocks") == 3
        assert found.reach("blocks.*.mlp.0", "blocks.*.mlp.2") == 2
        assert "blocks.1.mlp.2" in found
        assert "blocks.0.mlp.2" not in found
        assert "layers.*.up" not in found

    def test_counts_of_inner_groups(self) -> None:
        found = TranslatedHeader(header("sets.1.of.4.x"), self.RULES)
        assert (found.count("groups"), found.count("groups.*.items"), found.count("nothing")) == (2, 5, 0)

    def test_reading_through_rules(self) -> None:
        read = read_through(lambda asked: (asked.count("blocks"), asked.size("blocks.*.qkv", 1)), self.RULES)
        shares = {f"net__layers__1__{name}": (2, 3) for name in "qkv"}
        assert read(header(**shares).below("net.")) == (2, 3)
        with pytest.raises(MissingShapeError, match="qkv"):
            read(header(net__layers__1__q=(2, 3)).below("net."))
