"""Model configs: their parts, their YAML, their registry and inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sd_mecha.errors import DuplicateNameError, UnknownNameError
from sd_mecha.extensions import model_configs as mc
from sd_mecha.extensions.config_inference import ConfigIndex
from sd_mecha.extensions.model_configs import KeyMetadata, ModelComponent, ModelConfigImpl
from sd_mecha.extensions.registry import Registry
from sd_mecha.storage.contract import TensorEntry


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, no_plugins: None) -> None:
    """A registry of configs with nothing in it."""
    registry: Registry[mc.ModelConfig] = Registry("model config")
    monkeypatch.setattr(mc, "_registry", registry)
    monkeypatch.setattr(mc, "_aux", set())
    monkeypatch.setattr(mc, "_families", {})
    monkeypatch.setattr(mc, "_named", {})
    monkeypatch.setattr(mc, "_index", ConfigIndex(registry.get_all, lambda: registry.version))


def config(identifier: str, keys: Any) -> ModelConfigImpl:
    return ModelConfigImpl(identifier, {"all": dict.fromkeys(keys)})


class TestKeyMetadata:
    def test_takes_plain_values(self) -> None:
        plain = KeyMetadata([2, 3], "float16", ["x"], True)
        assert plain == KeyMetadata((2, 3), torch.float16, ("x",), optional=True)
        assert hash(plain) == hash(KeyMetadata(torch.Size([2, 3]), torch.float16, ("x",), True))
        assert KeyMetadata(aliases="one").aliases == ("one",)
        assert plain.metadata() == TensorEntry((2, 3), torch.float16)

    def test_knows_nothing_by_default(self) -> None:
        assert KeyMetadata() == KeyMetadata(None, None, (), False)
        assert KeyMetadata().metadata() is None
        assert KeyMetadata(()).shape == ()

    def test_is_frozen(self) -> None:
        with pytest.raises(AttributeError):
            KeyMetadata().optional = True  # type: ignore[misc]

    def test_unknown_dtype(self) -> None:
        with pytest.raises(ValueError, match="float17"):
            KeyMetadata((1,), "float17")


class TestModelConfigImpl:
    @pytest.mark.parametrize("identifier", ["sd1-ldm", "sdxl-kohya_kohya_lora", "a.b-c+d", "3-4"])
    def test_identifiers(self, identifier: str) -> None:
        made = config(identifier, "a")
        assert made.identifier == identifier
        assert f"{made.get_architecture_identifier()}-{made.get_implementation_identifier()}" == identifier

    @pytest.mark.parametrize("identifier", ["sd1", "SD1-ldm", "a-b-c", "-b", "a-", "a b-c", "", "a-b\n", None])
    def test_bad_identifiers(self, identifier: Any) -> None:
        with pytest.raises(ValueError, match="architecture"):
            config(identifier, "a")

    def test_parts(self) -> None:
        made = ModelConfigImpl(
            "a-b",
            {
                "one": {"k": {"shape": [1], "dtype": "float32", "aliases": ["old_k", "l"]}},
                "two": ModelComponent({"l": KeyMetadata((2,), torch.int64, optional=True)}),
            },
        )
        assert list(made.components()) == ["one", "two"]
        assert list(made.components()["one"].keys()) == ["k"]
        assert made.keys() == {
            "k": KeyMetadata((1,), torch.float32, ("old_k", "l")),
            "l": KeyMetadata((2,), torch.int64, (), True),
        }
        assert made.metadata()["l"] == TensorEntry((2,), torch.int64)
        assert made.aliases() == {"k": ("old_k", "l"), "l": ()}
        assert made.components()["one"].aliases() == {"k": ("old_k", "l")}
        assert made.components()["two"].metadata() == {"l": TensorEntry((2,), torch.int64)}

    def test_finding_keys(self) -> None:
        made = ModelConfigImpl("a-b", {"c": {"k": {"aliases": ["old", "l"]}, "l": None}})
        assert [made.find(name) for name in ("k", "old", "l", "other")] == ["k", "k", "l", None]
        assert [made.resolve_alias(name) for name in ("k", "old", "l", "other")] == ["k", "k", "l", "other"]

    def test_from_parsed_yaml(self) -> None:
        made = ModelConfigImpl(**yaml.safe_load("{identifier: a-b, components: {c: {k: {shape: [1]}}}}"))
        assert made.keys()["k"].shape == (1,)

    def test_keys_cannot_be_changed(self) -> None:
        with pytest.raises(TypeError):
            config("a-b", "k").keys()["x"] = KeyMetadata()  # type: ignore[index]

    def test_bad_components(self) -> None:
        with pytest.raises(ValueError, match="component 'c'"):
            ModelConfigImpl("a-b", {"c": ["k"]})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match=r"key 'k'.*colour"):
            ModelConfigImpl("a-b", {"c": {"k": {"colour": 1}}})
        with pytest.raises(ValueError, match="key 'k' is in component 'd' and in another"):
            ModelConfigImpl("a-b", {"c": {"k": None}, "d": {"k": None}})

    def test_missing_keys(self) -> None:
        def make(of: Any, key: str, device: Any, dtype: Any) -> torch.Tensor:
            return torch.full((2,), len(key), device=device, dtype=dtype)

        made = ModelConfigImpl("a-b", {"c": {"key": None}}, make)
        tensor = made.create_missing_key("key", "cpu", torch.float16)
        assert tensor is not None
        assert tensor.tolist() == [3.0, 3.0]
        assert tensor.dtype == torch.float16
        assert config("a-b", "k").create_missing_key("k", "cpu", None) is None

    def test_missing_keys_by_dotted_name(self) -> None:
        made = ModelConfigImpl("a-b", {"c": {"key": None}}, "operator.itemgetter")
        assert made.create_missing_key("key", None, None) is not None


def test_minimal_config_needs_only_components() -> None:
    class Minimal(mc.ModelConfig):
        identifier = "a-b"

        def components(self) -> dict[str, ModelComponent]:
            return {"c": ModelComponent({"k": {"aliases": ["old"]}})}

    made = Minimal()
    assert isinstance(made, mc.ModelConfig)
    assert list(made.keys()) == ["k"]
    assert (made.find("old"), made.find("x"), made.resolve_alias("x")) == ("k", None, "x")
    assert made.create_missing_key("k", None, None) is None
    assert made.get_implementation_identifier() == "b"


class TestStandIns:
    def test_structural(self) -> None:
        made = mc.StructuralModelConfig({"a": KeyMetadata((1,), "float32")})
        assert made.identifier == "structural"
        assert list(made.components()) == ["keys"]
        assert made.metadata() == {"a": TensorEntry((1,), torch.float32)}
        assert list(mc.StructuralModelConfig(["a", "b"]).keys()) == ["a", "b"]
        assert not mc.is_stub(made)

    def test_resolving(self) -> None:
        assert mc.resolve("structural") is mc.STRUCTURAL
        assert mc.resolve("infer") is mc.INFER
        assert mc.INFER.identifier == "infer"
        assert mc.is_stub(mc.INFER)
        assert mc.is_stub(mc.STRUCTURAL)
        assert mc.STRUCTURAL.keys() == {}

    def test_infer_has_no_keys(self) -> None:
        for ask in (mc.INFER.keys, mc.INFER.components, mc.INFER.metadata, mc.INFER.aliases):
            with pytest.raises(RuntimeError, match="not inferred yet"):
                ask()


class TestLazy:
    def test_built_once_on_first_use(self) -> None:
        calls: list[int] = []

        def build() -> dict[str, dict[str, KeyMetadata]]:
            calls.append(1)
            return {"c": {"k": KeyMetadata((1,), torch.float32, ("old",))}}

        lazy = mc.BuiltModelConfig("a-b", build)
        assert lazy.identifier == "a-b"
        assert "a-b" in repr(lazy)
        assert isinstance(lazy, mc.ModelConfig)
        assert calls == []
        assert list(lazy.keys()) == list(lazy.components()["c"].keys()) == ["k"]
        assert (lazy.find("old"), lazy.resolve_alias("old"), lazy.aliases()) == ("k", "k", {"k": ("old",)})
        assert lazy.metadata() == {"k": TensorEntry((1,), torch.float32)}
        assert lazy.create_missing_key("k", None, None) is None
        assert calls == [1]

    def test_third_party_subclass(self) -> None:
        class Mine(mc.LazyModelConfigBase):
            identifier = "a-b"

            def create_config(self) -> mc.ModelConfig:
                return config("a-b", "xy")

        assert list(Mine().keys()) == ["x", "y"]

    def test_yaml_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a-b.yaml"
        lazy = mc.YamlModelConfig(path)
        assert lazy.identifier == "a-b"
        path.write_text("identifier: a-b\ncomponents:\n  c:\n    k: {shape: [1], dtype: float16}\n")
        assert lazy.keys() == {"k": KeyMetadata((1,), torch.float16)}

    def test_yaml_file_with_another_identifier(self, tmp_path: Path) -> None:
        path = tmp_path / "a-b.yaml"
        path.write_text("identifier: a-c\ncomponents: {}\n")
        with pytest.raises(ValueError, match=r"a-b\.yaml holds the config 'a-c'; rename"):
            mc.YamlModelConfig(path).keys()


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
metadata = st.builds(
    KeyMetadata,
    shape=st.none() | st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    aliases=st.lists(names, max_size=2),
    optional=st.booleans(),
)


class TestYaml:
    @given(st.lists(st.dictionaries(names, metadata, max_size=4), max_size=3))
    def test_round_trip(self, parts: list[dict[str, KeyMetadata]]) -> None:
        made = ModelConfigImpl(
            "a-b", {f"c{i}": {f"{key}{i}": m for key, m in part.items()} for i, part in enumerate(parts)}
        )
        back = mc.from_yaml(mc.to_yaml(made))
        assert back.identifier == "a-b"
        assert list(back.keys().items()) == list(made.keys().items())
        assert [list(part.keys()) for part in back.components().values()] == [
            list(part.keys()) for part in made.components().values()
        ]

    def test_text(self) -> None:
        made = ModelConfigImpl("a-b", {"c": {"k": {"shape": [2], "dtype": "float32", "optional": True}}}, "x.y")
        assert mc.to_yaml(made) == (
            "identifier: a-b\n"
            "components:\n"
            "  c:\n"
            "    k: {shape: [2], dtype: float32, optional: true}\n"
            "missing_key_handler: x.y\n"
        )

    def test_a_lazy_config_can_be_written(self) -> None:
        lazy = mc.BuiltModelConfig("a-b", lambda: {"c": {"k": KeyMetadata((1,))}})
        assert mc.from_yaml(mc.to_yaml(lazy)).keys() == lazy.keys()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: [", "not valid YAML"),
            ("- a", "identifier"),
            ("identifier: a-b", "components"),
            ("identifier: a-b\ncomponents: {}\nbogus: 1", "bogus"),
            ("identifier: nope\ncomponents: {}", "nope"),
            ("identifier: a-b\ncomponents: {c: {k: {dtype: f17}}}", "f17"),
            ("identifier: a-b\ncomponents: {c: 3}", "component 'c'"),
            ("identifier: !!python/object:os.system a-b\ncomponents: {}", "not valid YAML"),
        ],
    )
    def test_malformed(self, text: str, message: str) -> None:
        with pytest.raises(mc.InvalidConfigError, match=message):
            mc.from_yaml(text)

    def test_serialize_nonsense(self) -> None:
        with pytest.raises(TypeError, match="int"):
            mc.serialize(3)


@pytest.mark.usefixtures("empty")
class TestRegistering:
    def test_base_and_aux(self) -> None:
        base, aux = config("a-b", "k"), config("a-b_lora", "l")
        mc.register(base)
        mc.register_aux(aux)
        assert mc.get_all() == [base, aux]
        assert mc.get_all_base() == [base]
        assert mc.get_all_aux() == [aux]
        assert mc.resolve("a-b_lora") is aux
        assert mc.resolve(aux) is aux
        mc.unregister("a-b_lora")
        assert mc.get_all() == [base]
        assert mc.get_all_aux() == []

    def test_duplicates(self) -> None:
        mc.register(config("a-b", "k"))
        with pytest.raises(DuplicateNameError, match="a-b"):
            mc.register_aux(config("a-b", "k"))
        assert len(mc.get_all_base()) == 1

    def test_only_proper_identifiers(self) -> None:
        with pytest.raises(ValueError, match="structural"):
            mc.register(mc.StructuralModelConfig("abc"))

    def test_unknown(self) -> None:
        mc.register(config("sd1-ldm", "k"))
        with pytest.raises(UnknownNameError, match="unknown model config: 'sd1-lmd'; did you mean 'sd1-ldm'"):
            mc.resolve("sd1-lmd")


@pytest.mark.usefixtures("empty")
class TestInference:
    def test_a_tenth_of_the_keys_is_enough(self) -> None:
        made = config("a-b", "x")
        mc.register(made)
        assert mc.candidates(["x", *map(str, range(9))]) == {made: pytest.approx(0.9)}
        assert mc.candidates(["x", *map(str, range(10))]) == {}

    def test_aliases_count(self) -> None:
        made = ModelConfigImpl("a-b", {"c": {"x": {"aliases": ["old"]}}})
        mc.register(made)
        assert mc.candidates({"old"}) == {made: 0.0}

    def test_no_keys_fit_anything(self) -> None:
        one, two = config("a-b", "x"), config("a-c", "y")
        mc.register(one)
        mc.register(two)
        assert mc.candidates([]) == {one: 0.0, two: 0.0}

    def test_follows_the_registry(self) -> None:
        one, two = config("a-b", "xy"), config("a-c", "y")
        mc.register(one)
        assert mc.candidates("y") == {one: 0.0}
        mc.register(two)
        assert mc.candidates("y") == {one: 0.0, two: 0.0}
        mc.unregister("a-b")
        assert mc.candidates("y") == {two: 0.0}

    def test_ranking(self) -> None:
        best, same, worse, no = (
            config("a-a", "wxyz"),
            config("a-b", "wxyz1"),
            config("a-c", "w"),
            config("a-d", "1"),
        )
        for each in (worse, no, best, same):
            mc.register(each)
        assert mc.infer_model_configs("wxyz") == [{best, same}, {worse}]
        assert mc.infer_model_configs(["unheard"]) == []

    def test_a_config_that_cannot_be_read_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        good = config("a-b", "x")
        mc.register(mc.BuiltModelConfig("a-broken", lambda: 1 / 0))  # type: ignore[arg-type, return-value]
        mc.register(good)
        assert mc.candidates("x") == {good: 0.0}
        assert "a-broken" in caplog.text

    @given(
        st.lists(st.sets(st.sampled_from("abcdefgh")), min_size=1, max_size=4),
        st.sets(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=1),
    )
    def test_agrees_with_counting(self, tables: list[set[str]], keys: set[str]) -> None:
        configs = [config(f"a-{i}", sorted(table)) for i, table in enumerate(tables)]
        index = ConfigIndex(lambda: configs, lambda: 1)
        expected = {
            made: 1 - len(keys & table) / len(keys)
            for made, table in zip(configs, tables, strict=True)
            if len(keys & table) * 10 >= len(keys)
        }
        assert index.candidates(keys) == pytest.approx(expected)
