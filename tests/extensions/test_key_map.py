"""The algebra of `map_keys`."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_mecha.errors import MechaError
from sd_mecha.extensions.key_map import (
    ActiveKeyMap,
    Clause,
    ComposeObject,
    KeyMapBuilder,
    KeyMapError,
    RealizedKeyRelation,
    build_key_map,
    identity_key_map,
    realize,
)
from sd_mecha.extensions.model_configs import KeyMetadata, ModelConfigImpl, StructuralModelConfig

ABC = ModelConfigImpl("letters-abc", {"all": dict.fromkeys("abc", KeyMetadata())})
XYZ = ModelConfigImpl("letters-xyz", {"all": dict.fromkeys("xyz", KeyMetadata())})


def builder(output: Any = ABC, **inputs: Any) -> KeyMapBuilder:
    return KeyMapBuilder(inputs or {"m": ABC, "n": ABC}, output)


def always(param: str, key: str) -> bool:
    return True


class TestSelecting:
    def test_a_key_of_every_parameter(self) -> None:
        assert builder().keys["a"] == Clause({"m": ("a",), "n": ("a",)})

    def test_keys_of_one_parameter(self) -> None:
        b = builder()
        assert b.m.keys["a"] == Clause({"m": ("a",)})
        assert b.m.keys["c", "a"] == b.m.keys[["c", "a"]] == Clause({"m": ("c", "a")})

    def test_nothing(self) -> None:
        b = builder(m=ABC, n=XYZ)
        assert b.keys[()] == Clause({"m": (), "n": ()})
        assert b.m.keys[()] == Clause({"m": ()})

    def test_listing(self) -> None:
        b = builder(XYZ)
        assert list(b.keys()) == list(b.keys) == list(b.m.keys()) == ["a", "b", "c"]
        assert list(b.out.keys()) == list(b.out.keys) == ["x", "y", "z"]
        assert dict(b.m.keys.items()) == dict(b.keys.items()) == dict(ABC.keys())
        assert dict(b.out.keys.items()) == dict(XYZ.keys())
        assert "a" in b.keys
        assert "a" in b.m.keys
        assert "a" not in b.out.keys

    def test_structural_inputs_share_their_common_keys(self) -> None:
        b = builder(m=StructuralModelConfig("abc"), n=StructuralModelConfig("cax"))
        assert list(b.keys()) == ["a", "c"]
        assert list(b.n.keys()) == ["c", "a", "x"]
        with pytest.raises(KeyMapError, match="'b'"):
            b.keys["b"]

    def test_varargs_are_one_parameter(self) -> None:
        b = builder(m=ABC, rest=(ABC, ABC))
        assert b.rest.keys["a"] == Clause({"rest": ("a",)})
        assert b.keys["a"] == Clause({"m": ("a",), "rest": ("a",)})

    def test_no_varargs_and_no_config_take_any_key(self) -> None:
        b = builder(m=ABC, rest=(), alpha=None)
        assert b.keys["a"] == Clause({"m": ("a",), "rest": ("a",), "alpha": ("a",)})
        assert b.alpha.keys["anything"] == Clause({"alpha": ("anything",)})


class TestAlgebra:
    def test_and_needs_both(self) -> None:
        b = builder()
        assert b.m.keys["a"] & b.n.keys["b"] == Clause({"m": ("a",), "n": ("b",)})
        assert b.m.keys["a"] & b.m.keys["b", "a"] == Clause({"m": ("a", "b")})

    def test_or_keeps_the_order(self) -> None:
        b = builder()
        either = b.m.keys["a"] | b.n.keys["b"] | b.m.keys["c"]
        assert either.clauses == (Clause({"m": ("a",)}), Clause({"n": ("b",)}), Clause({"m": ("c",)}))

    def test_or_with_none(self) -> None:
        needs: Any = None
        needs |= builder().m.keys["a"]
        assert needs == Clause({"m": ("a",)})
        assert needs | None is needs

    def test_and_distributes_over_or(self) -> None:
        b = builder()
        needs = (b.m.keys["a"] | b.m.keys["b"]) & (b.n.keys["a"] | b.n.keys["b"])
        assert [(c.by_param["m"], c.by_param["n"]) for c in needs.clauses] == list(
            itertools.product([("a",), ("b",)], repeat=2)
        )

    def test_meta(self) -> None:
        b = builder()
        assert (b.m.keys["a"] @ {"x": 1}).clauses[0].meta == {"x": 1}
        both = (b.m.keys["a"] @ {"x": 1, "y": 1}) & (b.n.keys["a"] @ {"x": 2})
        assert both.clauses[0].meta == {"x": 2, "y": 1}
        assert (b.m.keys["a"] & b.n.keys["a"] @ 5).clauses[0].meta == 5
        either = (b.m.keys["a"] | b.n.keys["a"]) @ "m"
        assert [clause.meta for clause in either.clauses] == ["m", "m"]

    def test_meta_twice(self) -> None:
        with pytest.raises(KeyMapError, match="already has the meta 1"):
            builder().m.keys["a"] @ 1 @ 2

    def test_metas_that_cannot_be_joined(self) -> None:
        b = builder()
        with pytest.raises(KeyMapError, match="'p' and 'q'"):
            (b.m.keys["a"] @ "p") & (b.n.keys["a"] @ "q")

    @pytest.mark.parametrize("other", [None, 1, "a"])
    def test_and_with_nonsense(self, other: Any) -> None:
        with pytest.raises(TypeError):
            builder().m.keys["a"] & other


class TestComposeObject:
    def test_joins_attributes_and_class_methods(self) -> None:
        class Scale(ComposeObject):
            factor = 2

            @classmethod
            def apply(cls, value: int) -> int:
                return value * cls.factor

        class Triple(ComposeObject):
            factor = 3
            note = "x"

        assert (Scale | Triple).apply(5) == 10
        assert (Triple | Scale).apply(5) == 15
        assert (Scale | Triple).note == "x"
        assert Scale | Triple is Scale | Triple
        assert Scale | Scale is Scale
        assert ComposeObject | Scale is Scale

        class Special(Scale):
            pass

        assert Scale | Special is Special | Scale is Special

    def test_is_an_object_itself(self) -> None:
        class Thing(ComposeObject):
            pass

        with pytest.raises(TypeError, match="write `Thing`"):
            Thing()

    def test_as_meta(self) -> None:
        class One(ComposeObject):
            one = 1

        class Two(ComposeObject):
            two = 2

        b = builder()
        joined = (b.m.keys["a"] @ One) & (b.n.keys["a"] @ Two)
        assert (joined.clauses[0].meta.one, joined.clauses[0].meta.two) == (1, 2)


class TestBuilding:
    def test_map(self) -> None:
        b = builder(XYZ)
        b["x"] = b.keys["a"]
        b["y", "z"] = b.m.keys["b"] | b.n.keys["c"]
        key_map = b.build()
        assert list(key_map) == ["x", "y", "z"]
        assert key_map["y"] is key_map["z"]
        assert key_map["y"].outputs == ("y", "z")
        assert [relation.outputs for relation in key_map.relations] == [("x",), ("y", "z")]
        assert key_map.get("nope") is None
        outputs, clauses = key_map["x"]
        assert (outputs, len(clauses)) == (("x",), 1)

    def test_all_outputs_at_once(self) -> None:
        b = builder(XYZ)
        b[...] = b.keys["a"]
        assert b.build()["y"].outputs == ("x", "y", "z")

    def test_build_from_function(self) -> None:
        def map_keys(b: KeyMapBuilder) -> None:
            for key in b.out.keys:
                b[key] = b.keys[key]

        assert build_key_map(map_keys, {"m": ABC}, ABC) == identity_key_map(["m"], "abc")

    def test_unknown_parameter(self) -> None:
        with pytest.raises(AttributeError, match=r"'modle'; did you mean 'model'\? \(parameters: 'model', 'n'\)"):
            builder(model=ABC, n=ABC).modle  # noqa: B018
        assert not hasattr(builder(), "other")

    def test_unknown_input_key(self) -> None:
        config = ModelConfigImpl("a-b", {"all": {"layer.0.weight": None}})
        with pytest.raises(KeyError, match=r"'m'.*'layer\.0\.wieght'.*'a-b'.*did you mean 'layer\.0\.weight'"):
            builder(m=config).m.keys["layer.0.wieght"]
        with pytest.raises(ValueError, match=r"'layer\.1'"):
            builder(m=config).keys["layer.1"]

    def test_unknown_output_key(self) -> None:
        b = builder(XYZ)
        with pytest.raises(KeyError, match=r"output key 'q'.*'letters-xyz'"):
            b["q"] = b.keys["a"]

    def test_output_key_twice(self) -> None:
        b = builder()
        b["a", "b"] = b.keys["a"]
        with pytest.raises(ValueError, match=r"'b' is made twice.*\('a', 'b'\).*\('c', 'b'\)"):
            b["c", "b"] = b.keys["c"]
        with pytest.raises(ValueError, match="'c' is made twice"):
            builder()["c", "c"] = b.keys["c"]

    def test_empty_group(self) -> None:
        b = builder()
        with pytest.raises(ValueError, match="empty"):
            b[()] = b.keys["a"]

    @pytest.mark.parametrize("needs", [None, "a", 3])
    def test_needs_must_be_keys(self, needs: Any) -> None:
        with pytest.raises(KeyMapError, match="expected keys of inputs"):
            builder()["a"] = needs

    @pytest.mark.parametrize("key", [3, ...])
    def test_input_key_must_be_text(self, key: Any) -> None:
        with pytest.raises(KeyMapError):
            builder().m.keys[key]

    def test_input_key_twice(self) -> None:
        with pytest.raises(KeyMapError, match="twice"):
            builder().m.keys["a", "a"]

    def test_inputs_of_different_configs(self) -> None:
        with pytest.raises(KeyMapError, match=r"m: letters-abc, n: letters-xyz.*builder\.PARAM"):
            builder(m=ABC, n=XYZ).keys["a"]

    def test_errors_are_one_family(self) -> None:
        for act in (lambda: builder().q, lambda: builder().m.keys["q"], lambda: builder().m.keys["a", "a"]):
            with pytest.raises(MechaError) as caught:
                act()
            assert isinstance(caught.value, ValueError)


class TestRealizing:
    def test_first_possible_clause(self) -> None:
        b = builder()
        b["a", "b"] = (b.m.keys["a"] @ 1) | (b.n.keys["b"] @ 2)
        relation = b.build()["a"]
        assert realize(relation, always) == RealizedKeyRelation(("a", "b"), {"m": ("a",)}, 1)
        assert realize(relation, lambda p, k: p == "n") == RealizedKeyRelation(("a", "b"), {"n": ("b",)}, 2)
        assert realize(relation, lambda p, k: False) is None

    def test_empty_requirement_is_always_met(self) -> None:
        b = builder()
        b["a"] = b.keys[()]
        realised = realize(b.build()["a"], lambda p, k: False)
        assert realised is not None
        outputs, inputs = realised
        assert (outputs, inputs) == (("a",), {"m": (), "n": ()})

    def test_active_map(self) -> None:
        relation = RealizedKeyRelation(("a",), {})
        active = ActiveKeyMap({"a": relation})
        assert active["a"] is relation
        assert active.get("b") is None
        assert list(active) == ["a"]

    @given(
        st.lists(st.lists(st.sampled_from("abc"), unique=True), min_size=1, max_size=4),
        st.sets(st.sampled_from("abc")),
    )
    def test_laws(self, alternatives: list[list[str]], have: set[str]) -> None:
        b = builder(m=ABC)
        needs: Any = None
        for keys in alternatives:
            needs |= b.m.keys[tuple(keys)]
        b["a"] = needs
        realised = realize(b.build()["a"], lambda param, key: key in have)
        expected = next((keys for keys in alternatives if have.issuperset(keys)), None)
        assert (realised and realised.inputs["m"]) == (expected if expected is None else tuple(expected))


def test_identity_map_of_a_large_model_is_cheap() -> None:
    config = StructuralModelConfig([f"model.layer.{i}.weight" for i in range(2600)])

    def map_keys(b: KeyMapBuilder) -> None:
        for key in b.out.keys:
            b[key] = b.keys[key]

    def cpu_time() -> float:
        start = time.process_time()
        build_key_map(map_keys, {"m": config, "n": config}, config)
        return time.process_time() - start

    assert min(cpu_time() for _ in range(5)) < 0.03  # 4 ms where this was written
