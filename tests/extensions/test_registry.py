"""Registries and the loading of plugs."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_mecha.errors import DuplicateNameError, UnknownNameError
from sd_mecha.extensions import registry as module
from sd_mecha.extensions.registry import Registry, load_plugins, suggestion


class EntryPoint:
    def __init__(self, name: str, loaded: Any, distribution: str | None = None) -> None:
        self.name, self.value = name, f"{name}_package:plug"
        self.dist = distribution and SimpleNamespace(name=distribution)
        self._loaded = loaded

    def load(self) -> Any:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def install(monkeypatch: pytest.MonkeyPatch, *entry_points: EntryPoint) -> list[str]:
    groups: list[str] = []

    def listing(group: str) -> list[EntryPoint]:
        groups.append(group)
        return list(entry_points)

    monkeypatch.setattr(module.importlib.metadata, "entry_points", listing)
    return groups


@pytest.mark.usefixtures("no_plugins")
class TestRegistry:
    def test_resolves_what_was_registered(self) -> None:
        registry: Registry[int] = Registry("number")
        registry.register("one", 1)
        registry.register("two", 2)
        assert registry.resolve("two") == 2
        assert registry.get_all() == [1, 2]
        assert list(registry) == ["one", "two"]
        assert "one" in registry
        assert "three" not in registry

    def test_unknown_name_is_a_key_error_with_the_near_name(self) -> None:
        registry: Registry[int] = Registry("merge method")
        registry.register("weighted_sum", 1)
        with pytest.raises(KeyError) as caught:
            registry.resolve("weigthed_sum")
        assert str(caught.value) == "unknown merge method: 'weigthed_sum'; did you mean 'weighted_sum'?"

    def test_unknown_name_suggests_nothing_far(self) -> None:
        registry: Registry[int] = Registry("merge method")
        registry.register("randperm", 1)
        with pytest.raises(UnknownNameError) as caught:
            registry.resolve("nope")
        assert str(caught.value) == "unknown merge method: 'nope'"

    def test_duplicate_names_both(self) -> None:
        registry: Registry[Any] = Registry("thing")
        registry.register("a", TestRegistry)
        with pytest.raises(DuplicateNameError, match=r"'a'.*test_registry\.TestRegistry.*test_registry\.install"):
            registry.register("a", install)
        assert registry.resolve("a") is TestRegistry

    @pytest.mark.parametrize("identifier", ["", None, 3])
    def test_identifier_must_be_text(self, identifier: Any) -> None:
        with pytest.raises(TypeError, match="non-empty str"):
            Registry("thing").register(identifier, 1)

    def test_removed_is_gone_and_free_again(self) -> None:
        registry: Registry[int] = Registry("thing")
        registry.register("a", 1)
        assert registry.remove("a") == 1
        assert "a" not in registry
        registry.register("a", 2)
        assert registry.resolve("a") == 2

    def test_version_changes_with_every_change(self) -> None:
        registry: Registry[int] = Registry("thing")
        versions = [registry.version]
        registry.register("a", 1)
        versions.append(registry.version)
        registry.remove("a")
        versions.append(registry.version)
        assert len(set(versions)) == 3

    def test_threads_register_without_loss(self) -> None:
        registry: Registry[int] = Registry("thing")

        def register(start: int) -> None:
            for i in range(start, start + 200):
                registry.register(str(i), i)

        threads = [threading.Thread(target=register, args=(1000 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(registry) == registry.version == 800


@pytest.mark.usefixtures("unloaded")
class TestPlugins:
    def test_known_names_load_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        groups = install(monkeypatch)
        registry: Registry[int] = Registry("thing")
        registry.register("a", 1)
        assert registry.resolve("a") == 1
        assert groups == []

    def test_first_miss_loads_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry: Registry[int] = Registry("thing")
        groups = install(monkeypatch, EntryPoint("plug", lambda: registry.register("late", 7)))
        assert registry.resolve("late") == 7
        with pytest.raises(UnknownNameError):
            registry.resolve("never")
        registry.get_all()
        assert groups == ["sd_mecha"]

    def test_a_module_is_not_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, EntryPoint("plug", ModuleType("plug")))
        load_plugins()
        assert module._loaded

    def test_failure_is_logged_and_others_load(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        registry: Registry[int] = Registry("thing")

        def broken() -> None:
            raise RuntimeError("boom")

        install(
            monkeypatch,
            EntryPoint("missing", ImportError("no such module"), "dist-a"),
            EntryPoint("broken", broken, "dist-b"),
            EntryPoint("good", lambda: registry.register("good", 1)),
        )
        with caplog.at_level(logging.ERROR, logger="sd_mecha"):
            assert registry.resolve("good") == 1
        first, second = (record.getMessage() for record in caplog.records)
        assert "'missing'" in first
        assert "'dist-a'" in first
        assert "'broken'" in second
        assert "'dist-b'" in second

    def test_plug_may_look_names_up_while_loading(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry: Registry[int] = Registry("thing")
        seen: list[object] = []

        def plug() -> None:
            registry.register("mine", 1)
            seen.append(registry.get_all())
            seen.append("theirs" in registry)

        groups = install(monkeypatch, EntryPoint("plug", plug))
        registry.get_all()
        assert seen == [[1], False]
        assert groups == ["sd_mecha"]

    def test_other_threads_wait_until_all_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry: Registry[int] = Registry("thing")
        started = threading.Event()

        def slow() -> None:
            started.set()
            time.sleep(0.05)
            registry.register("slow", 1)

        groups = install(monkeypatch, EntryPoint("slow", slow))
        loader = threading.Thread(target=load_plugins)
        loader.start()
        assert started.wait(5)
        assert registry.get_all() == [1]
        loader.join()
        assert groups == ["sd_mecha"]

    def test_entry_points_wait_for_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        groups = install(monkeypatch)
        half_imported = ModuleType("half")
        half_imported.__spec__ = SimpleNamespace(_initializing=True)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, "half", half_imported)
        monkeypatch.setattr(module, "BUILTIN_PACKAGE", "half")
        load_plugins()
        assert groups == []
        half_imported.__spec__ = None
        load_plugins()
        assert groups == ["sd_mecha"]


def test_registry_and_package_are_free_of_torch() -> None:
    code = (
        "import sys, sd_mecha.errors\n"
        "before = 'torch' in sys.modules\n"
        "import sd_mecha.extensions, sd_mecha.extensions.registry, sd_mecha.extensions.merge_spaces\n"
        "assert 'torch' in sys.modules or not before\n"
        "assert before or 'torch' not in sys.modules, 'torch was imported'\n"
        "dir(sd_mecha.extensions)\n"
        "assert sd_mecha.extensions.model_dirs.get_all() == []\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_extensions_has_no_other_attributes() -> None:
    import sd_mecha.extensions

    with pytest.raises(AttributeError, match="nonsense"):
        sd_mecha.extensions.nonsense  # noqa: B018


@given(st.text(min_size=3, max_size=12), st.lists(st.text(max_size=12), max_size=5))
def test_a_name_that_is_known_is_its_own_suggestion(name: str, others: list[str]) -> None:
    assert suggestion(name, [*others, name]) == f"; did you mean {name!r}?" or name.casefold() in {
        other.casefold() for other in others
    }
