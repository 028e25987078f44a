"""Families of configs: identifiers, inference and conversions of a small family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.errors import ConfigError, DuplicateNameError, UnknownNameError
from sd_mecha.extensions import model_configs as mc
from sd_mecha.extensions import translations
from sd_mecha.extensions.config_families import Family, FamilyConfig, Keys, Layout, translated
from sd_mecha.extensions.header import Header
from sd_mecha.extensions.header_views import read_through
from sd_mecha.extensions.layouts import Rule, prefixed, rename, split, swap
from sd_mecha.extensions.model_configs import InvalidConfigError, KeyMetadata
from sd_mecha.storage.contract import TensorEntry


@dataclass(frozen=True)
class Size:
    depth: int
    width: int
    text: int


def build(h: Size) -> dict[str, Keys]:
    keys: dict[str, Any] = {"toy_text.weight": (h.width, h.text), "toy_end.weight": (2 * h.width, h.width)}
    for i in range(h.depth):
        keys |= {f"toy_blocks.{i}.qkv.weight": (3 * h.width, h.width), f"toy_blocks.{i}.norm.scale": (h.width,)}
    return {"diffuser": keys}


def read(header: Header) -> Size:
    if "toy_blocks.*.gate" in header:
        raise LookupError("gated blocks")
    width = header.size("toy_blocks.*.qkv.weight", 1, "toy_end.weight")
    return Size(header.count("toy_blocks"), width, header.size("toy_text.weight", 1))


def to_other(h: Size) -> list[Rule]:
    return [
        rename("toy_text", "toy_words"),
        swap("toy_end", "toy_out"),
        split("toy_blocks.*.qkv", "toy_layers.*.q", "toy_layers.*.k", "toy_layers.*.v"),
        rename("toy_blocks.*.norm.scale", "toy_layers.*.norm"),
    ]


def extras(h: Size) -> Mapping[str, Keys]:
    return {"vae": {"toy_vae.weight": KeyMetadata((h.width,), torch.float32, optional=True)}}


SIZES = {"toy_small": Size(2, 4, 6), "toy_large": Size(3, 8, 10)}
ODD = "toy.depth5_width6_text2"


def family(name: str = "toy", variants: Mapping[str, Size] = SIZES, **options: Any) -> Family[Size]:
    signs = ("toy_blocks.*.qkv.weight", "toy_blocks.*.norm.scale")
    other = Layout(
        translated(build, to_other),
        ("toy_layers.*.q.weight", "toy_layers.*.norm"),
        read_through(read, to_other(Size(0, 0, 0))),
    )
    return Family(
        name,
        Size,
        variants,
        {
            "original": Layout(build, signs, read),
            "packed": Layout(build, signs, read, "net.", others=extras),
            "other": other,
        },
        {("original", "packed"): lambda h: prefixed(build(h)["diffuser"], "net."), ("original", "other"): to_other},
        **options,
    )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family[Size]]:
    mc.get_all_families()  # loads those that come with the package
    monkeypatch.setattr(mc, "_families", dict(mc._families))
    monkeypatch.setattr(mc, "_named", dict(mc._named))
    for memo in ("_links", "_methods"):
        monkeypatch.setattr(translations, memo, {})
    made = family()
    mc.register_family(made)
    yield made
    mc._index._fits.clear()


def shapes(identifier: str) -> dict[str, tuple[int, ...] | None]:
    return {key: metadata.shape for key, metadata in mc.resolve(identifier).keys().items() if not metadata.optional}


def infer(found: Mapping[str, tuple[int, ...] | None]) -> str:
    entries = {key: None if s is None else TensorEntry(s, torch.float16) for key, s in found.items()}
    fits = mc.fits(entries)
    best = min(fits, key=lambda config: fits[config])
    assert [fits[config] for config in fits].count(fits[best]) == 1
    return best.identifier


def tensors(identifier: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape or (), generator=generator) for key, shape in shapes(identifier).items()}


class TestIdentifiers:
    @pytest.mark.parametrize("layout", ["original", "packed", "other"])
    def test_sizes_with_and_without_names_resolve(self, toy: Family[Size], layout: str) -> None:
        for variant, size in {**SIZES, ODD: Size(5, 6, 2)}.items():
            config = mc.resolve(f"{variant}-{layout}")
            assert config is toy.config(size, layout)
            assert config.identifier == f"{variant}-{layout}"
            assert (
                sum(not metadata.optional for metadata in config.keys().values())
                == size.depth * (4 if layout == "other" else 2) + 2
            )

    @pytest.mark.parametrize(
        "identifier",
        [
            "toy.depth2_width4_text6-original",  # has a name
            "toy.depth5_width6-original",
            "toy.depth5_width6_text2_more1-original",
            "toy.width6_depth5_text2-original",
            "toy.depth05_width6_text2-original",
            "toy.depth5_width6_textx-original",
            f"toy.depth{'9' * 5000}_width6_text2-original",
            "toy.depth5_width6_text2-nothing",
            "toys.depth5_width6_text2-original",
            "toy_medium-original",
            "toy_small",
        ],
    )
    def test_others_do_not(self, toy: Family[Size], identifier: str) -> None:
        with pytest.raises(UnknownNameError, match="unknown model config"):
            mc.resolve(identifier)

    def test_a_near_name_is_suggested(self, toy: Family[Size]) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'toy_small-original'"):
            mc.resolve("toy_smal-original")

    def test_only_sizes_with_names_are_listed(self, toy: Family[Size]) -> None:
        mc.resolve(f"{ODD}-original")
        listed = [c.identifier for c in mc.get_all() if isinstance(c, FamilyConfig) and c.family is toy]
        assert listed == [f"{variant}-{layout}" for variant in SIZES for layout in toy.layouts]
        assert toy in mc.get_all_families()

    def test_parts(self, toy: Family[Size]) -> None:
        config = mc.resolve("toy_small-packed")
        assert list(config.components()) == ["diffuser", "vae"]
        assert config.keys()["net.toy_text.weight"] == KeyMetadata((4, 6), torch.bfloat16)
        assert config.keys()["toy_vae.weight"].optional
        assert config.resolve_alias("net.toy_text.weight") == "net.toy_text.weight"
        assert config.find("toy_text.weight") is None


class TestRegistering:
    def test_nothing_is_built(self, toy: Family[Size]) -> None:
        def broken(h: Size) -> dict[str, Keys]:
            raise AssertionError("built")

        mc.register_family(
            Family("other", Size, {"other_small": SIZES["toy_small"]}, {"a": Layout(broken, ("x",), read)})
        )
        assert mc.resolve("other_small-a") in mc.get_all()

    def test_taken_names(self, toy: Family[Size]) -> None:
        with pytest.raises(DuplicateNameError, match="'toy' is already registered: toy_small-original"):
            mc.register_family(family())
        with pytest.raises(DuplicateNameError, match="its name is taken"):
            mc.register_family(family(variants={"new": Size(1, 1, 1)}))
        with pytest.raises(DuplicateNameError, match="toy_small-original"):
            mc.register_family(family("new"))

    def test_malformed(self) -> None:
        with pytest.raises(InvalidConfigError, match="lowercase letters"):
            family("Toy")
        with pytest.raises(InvalidConfigError, match="that it lacks"):
            Family("a", Size, {}, {}, {("x", "y"): to_other})

    def test_a_layout_that_another_config_stands_for(self, toy: Family[Size]) -> None:
        variants = {"mine_small": SIZES["toy_small"], "mine_large": SIZES["toy_large"]}
        mine = family("mine", variants, absent=[("mine_small", "packed")])
        assert "mine_small-packed" not in [config.identifier for config in mine.known()]
        assert mine.resolve("mine_small-packed") is None
        assert [c.identifier for c in mine.neighbours(mine.config(SIZES["toy_small"], "original"))] == [
            "mine_small-other"
        ]
        entries = {key: TensorEntry(s or (), torch.float16) for key, s in shapes("toy_small-packed").items()}
        assert mine.infer(Header(entries)) == []


class TestInference:
    @pytest.mark.parametrize("variant", [*SIZES, ODD])
    @pytest.mark.parametrize("layout", ["original", "packed", "other"])
    def test_sizes_are_read_off_the_shapes(self, toy: Family[Size], variant: str, layout: str) -> None:
        identifier = f"{variant}-{layout}"
        found = shapes(identifier)
        assert infer(found) == identifier
        assert infer(found | {f"model_ema.{key}": shape for key, shape in found.items()}) == identifier

    @pytest.mark.parametrize("layout", ["original", "packed", "other"])
    def test_any_key_may_be_missing(self, toy: Family[Size], layout: str) -> None:
        found = shapes(f"toy_large-{layout}")
        for missing in found:
            assert infer({key: shape for key, shape in found.items() if key != missing}) == f"toy_large-{layout}"

    def test_names_alone_lead_to_sizes_with_names(self, toy: Family[Size]) -> None:
        names = list(shapes("toy_large-original"))
        assert {c.identifier for c in mc.candidates(names)} == {"toy_small-original", "toy_large-original"}
        assert infer(dict.fromkeys(names)) == "toy_large-original"

    def test_another_network_is_refused(self, toy: Family[Size]) -> None:
        found = {key: TensorEntry(s or (), torch.float16) for key, s in shapes("toy_small-original").items()}
        assert [c.identifier for c in toy.infer(Header(found))] == ["toy_small-original"]
        found["toy_blocks.0.gate"] = TensorEntry((1,), torch.float16)
        assert toy.infer(Header(found)) == []

    def test_foreign_keys(self, toy: Family[Size]) -> None:
        layout = Layout(build, ("toy_blocks.*.qkv.weight",), read, "net.", foreign=("toy_gate.*.weight",))
        found = dict.fromkeys(shapes("toy_small-packed"))
        assert layout.may_be_of(Header(found))
        assert not layout.may_be_of(Header({**found, "net.toy_gate.4.weight": None}))

    def test_known_sizes_of_other_shapes_do_not_stand_in(self, toy: Family[Size]) -> None:
        found = shapes(f"{ODD}-original")
        del found["toy_text.weight"]
        entries = {key: TensorEntry(s or (), torch.float16) for key, s in found.items()}
        assert toy.infer(Header(entries)) == []

    def test_further_configs_are_considered_when_named(self, toy: Family[Size]) -> None:
        config = mc.resolve(f"{ODD}-original")
        names = list(config.keys())
        assert config not in mc.fits(names)
        assert mc.fits(names, [config])[config] == (0, 0, 0)
        assert config not in mc.fits(["a", "b"], [config])


class TestMerging:
    @pytest.fixture(params=["toy_small", ODD])
    def variant(self, request: pytest.FixtureRequest, toy: Family[Size], tmp_path: Path) -> str:
        name: str = request.param
        for file, seed in {"a": 1, "b": 2}.items():
            save_file(tensors(f"{name}-original", seed), tmp_path / f"{file}.safetensors")
        return name

    def test_two_files_and_a_weight_for_each_key(self, variant: str, tmp_path: Path) -> None:
        a, b = tensors(f"{variant}-original", 1), tensors(f"{variant}-original", 2)
        weights = {key: i / len(a) for i, key in enumerate(a)}
        models = [sd_mecha.model(tmp_path / f"{name}.safetensors") for name in "ab"]
        sd_mecha.merge(
            sd_mecha.weighted_sum(*models, alpha=weights),
            output=tmp_path / "out.safetensors",
            output_dtype=torch.float32,
        )
        out = load_file(tmp_path / "out.safetensors")
        assert out.keys() == a.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(out[key], torch.lerp(a[key], b[key], weight), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("layout", ["packed", "other"])
    def test_conversions_there_and_back_change_no_bit(self, variant: str, layout: str, tmp_path: Path) -> None:
        start = tmp_path / "a.safetensors"
        there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
        for source, target, wanted in ((start, there, layout), (there, back, "original")):
            recipe = sd_mecha.convert(sd_mecha.model(source), f"{variant}-{wanted}")
            text = sd_mecha.serialize(recipe)
            assert f"_to_'{variant}-{wanted}'" in text
            again = sd_mecha.deserialize(text.splitlines())
            assert sd_mecha.serialize(again) == text
            sd_mecha.merge(again, output=target, output_dtype=torch.float32)
        assert {key: tuple(t.shape) for key, t in load_file(there).items()} == shapes(f"{variant}-{layout}")
        a, out = load_file(start), load_file(back)
        assert out.keys() == a.keys()
        assert all(torch.equal(out[key], a[key]) for key in a)

    def test_chains_of_conversions(self, variant: str, tmp_path: Path) -> None:
        sd_mecha.merge(
            sd_mecha.convert(sd_mecha.model(tmp_path / "a.safetensors"), f"{variant}-other"),
            output=tmp_path / "other.safetensors",
            output_dtype=torch.float32,
        )
        recipe = sd_mecha.convert(sd_mecha.model(tmp_path / "other.safetensors"), f"{variant}-packed")
        assert sd_mecha.serialize(recipe).count("merge ") == 2

    def test_no_conversion_leads_to_another_size(self, variant: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no conversion leads from"):
            sd_mecha.convert(sd_mecha.model(tmp_path / "a.safetensors"), "toy_large-other")
