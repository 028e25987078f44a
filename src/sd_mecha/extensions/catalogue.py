"""What merge methods there are, and what each of them says about itself: for people, not for the engine."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sd_mecha.errors import UnknownNameError
from sd_mecha.extensions import merge_methods, merge_spaces
from sd_mecha.extensions.docstrings import MethodText, read_docstring
from sd_mecha.extensions.merge_spaces import MergeSpace, MergeSpaceSymbol
from sd_mecha.extensions.method import MergeMethod, Tiling
from sd_mecha.extensions.parameters import ParameterData, type_name
from sd_mecha.extensions.registry import BUILTIN_PACKAGE, suggestion

CostClass = Literal["elementwise", "streamed", "whole", "selection", "shape", "dispatch"]

COST_CLASSES: Mapping[CostClass, str] = {
    "elementwise": "one pass over tiles",
    "streamed": "more than one pass over tiles, for facts about whole tensors",
    "whole": "entire tensors in memory: matrices, sorting, Fourier transforms",
    "selection": "bytes are copied, nothing is computed",
    "shape": "headers alone, no tensor is read",
    "dispatch": "that of the implementation for the model config",
}

_COST_OF_TILING: Mapping[Tiling, CostClass] = {
    "elementwise": "elementwise",
    "rows": "elementwise",
    "pieces": "elementwise",
    "whole": "whole",
    "select": "selection",
    "shape": "shape",
}


@dataclass(frozen=True, repr=False)
class MethodInfo:
    """One merge method, described; `method` is what a recipe calls."""

    method: MergeMethod

    @property
    def identifier(self) -> str:
        """The name in recipes."""
        return self.method.identifier

    @property
    def family(self) -> str:
        """The module that defines it; of a built-in method, the last part of its name."""
        return self.module.rpartition(".")[2] if self.is_builtin else self.module

    @property
    def module(self) -> str:
        """The module that defines it; text that was executed has none, and is called `__main__`."""
        return self.method.__module__ or "__main__"

    @property
    def is_builtin(self) -> bool:
        """Whether this package brings it."""
        return self.module.startswith(f"{BUILTIN_PACKAGE}.")

    @property
    def is_conversion(self) -> bool:
        """Whether it only leads from one model config to another; `sd_mecha.convert` finds such methods by itself."""
        return self.method.is_conversion

    @property
    def implementations(self) -> list[str]:
        """The methods that stand in for it, one per model config; only an interface has any."""
        interface = self.method.interface
        return [] if interface is None else [method.identifier for method, _ in interface.candidates]

    @cached_property
    def text(self) -> MethodText:
        """The parts of its docstring."""
        return read_docstring(self.method.__doc__)

    @property
    def summary(self) -> str:
        """What it does, in one sentence."""
        return self.text.summary

    @property
    def tiling(self) -> Tiling:
        """What it promises about pieces of a tensor; see `sd_mecha.extensions.merge_methods`."""
        return self.method.tiling

    @property
    def cost(self) -> CostClass:
        """What a merge pays for it; `COST_CLASSES` explains the words."""
        if self.method.interface is not None:
            return "dispatch"
        return "streamed" if self.method.streamed else _COST_OF_TILING[self.tiling]

    @property
    def signature(self) -> str:
        """Parameters with their types and defaults, and the type of the result."""
        shown = [
            f"{_starred(p)}: {type_name(p.annotation.data.interface)}{_default(p)}"
            for p in self.method.signature.parameters.values()
        ]
        first_keyword = self._first_keyword_only()
        if first_keyword is not None:
            shown.insert(first_keyword, "*")
        result = type_name(self.method.declaration.result.interface)
        return f"{self.identifier}({', '.join(shown)}) -> {result}"

    @property
    def merge_spaces(self) -> dict[str, str]:
        """By parameter, the merge space it takes; `any` is the same one wherever it stands in a method."""
        d = self.method.declaration
        return {f"*{name}" if name == d.names.vararg else name: self._space(data) for name, data in d}

    @property
    def result_space(self) -> str:
        """The merge space of the result."""
        return self._space(self.method.declaration.result)

    @property
    def spaces(self) -> str:
        """The merge spaces of models and deltas, and of the result: `any, delta -> any`; plain numbers are left out."""
        inputs = [f"{space} ..." if n.startswith("*") else space for n, space in self.merge_spaces.items()]
        shown = ", ".join(space for space in inputs if space != "param")
        return f"{shown or 'param'} -> {self.result_space}"

    def __repr__(self) -> str:
        return f"<{self.signature}: {self.summary}>"

    def _space(self, data: ParameterData) -> str:
        spaces = data.merge_space
        assert spaces is not None  # reading a declaration fills it in
        if isinstance(spaces, MergeSpaceSymbol):
            return self._symbols[spaces]
        return _either(spaces)

    @cached_property
    def _symbols(self) -> dict[MergeSpaceSymbol, str]:
        """A word for each symbol; a second one that may stand for the same spaces gets a number."""
        d = self.method.declaration
        found = [data.merge_space for data in (*(data for _, data in d), d.result)]
        everything = frozenset(merge_spaces.get_all())
        words: dict[MergeSpaceSymbol, str] = {}
        for symbol in found:
            if isinstance(symbol, MergeSpaceSymbol) and symbol not in words:
                word = "any" if symbol.merge_spaces == everything else _either(symbol.merge_spaces)
                again = sum(taken.partition("#")[0] == word for taken in words.values())
                words[symbol] = f"{word}#{again + 1}" if again else word
        return words

    def _first_keyword_only(self) -> int | None:
        """Where a bare star stands; none where `*models` says the same."""
        kinds = [p.kind for p in self.method.signature.parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.KEYWORD_ONLY not in kinds:
            return None
        return kinds.index(inspect.Parameter.KEYWORD_ONLY)


class Methods(Mapping[str, MethodInfo]):
    """Merge methods by identifier, family by family.

    >>> import sd_mecha
    >>> sd_mecha.methods()["subtract"]
    <subtract(a: Tensor, b: Tensor) -> Tensor: Take the difference of two models: what turns `b` into `a`.>
    """

    def __init__(self, methods: Mapping[str, MethodInfo]) -> None:
        self._methods = methods

    def __getitem__(self, identifier: str) -> MethodInfo:
        """Describe the method of that name.

        Raises:
            UnknownNameError: there is none; a near name is suggested. It is a KeyError.
        """
        try:
            return self._methods[identifier]
        except KeyError:
            hint = suggestion(str(identifier), self._methods)
            raise UnknownNameError(f"unknown merge method: {identifier!r}{hint}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    @property
    def families(self) -> dict[str, list[MethodInfo]]:
        """The methods of each family, but for those in `chosen_by_config`."""
        hidden = {info.identifier for info in self.chosen_by_config}
        families: dict[str, list[MethodInfo]] = {}
        for info in self._methods.values():
            if info.identifier not in hidden:
                families.setdefault(info.family, []).append(info)
        return families

    @property
    def chosen_by_config(self) -> list[MethodInfo]:
        """The methods that nobody needs to call: conversions, and implementations of an interface."""
        implementations = {name for info in self._methods.values() for name in info.implementations}
        return [info for info in self._methods.values() if info.is_conversion or info.identifier in implementations]

    def __repr__(self) -> str:
        families = {name: ", ".join(info.identifier for info in infos) for name, infos in self.families.items()}
        width = max(map(len, families), default=0)
        lines = [f"  {name:{width}}  {names}" for name, names in families.items()]
        hidden = len(self.chosen_by_config)
        counts = f"{len(self) - hidden} merge methods by family, and {hidden} that are chosen by model config"
        return "\n".join([f"{counts}; index by name for one of them", *lines])


def methods() -> Methods:
    """Describe every merge method that is registered now: the built-in ones, and those of plugins.

    Returns:
        a mapping from identifier to description, with `summary`, `signature`, `spaces`, `tiling`, `cost`, and the
        parts of the docstring as `text`.
    """
    infos = [MethodInfo(method) for method in merge_methods.get_all()]
    families = list(dict.fromkeys(info.family for info in sorted(infos, key=lambda info: not info.is_builtin)))
    ordered = sorted(infos, key=lambda info: families.index(info.family))
    return Methods({info.identifier: info for info in ordered})


def _either(spaces: frozenset[MergeSpace]) -> str:
    return " or ".join(sorted(space.identifier for space in spaces))


def _starred(parameter: inspect.Parameter) -> str:
    return f"*{parameter.name}" if parameter.kind is parameter.VAR_POSITIONAL else parameter.name


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
