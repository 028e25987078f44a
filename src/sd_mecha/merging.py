"""Merging: the one place where planning, execution and storage are put together."""

from __future__ import annotations

import inspect
import os
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch

from sd_mecha.conversion import convert
from sd_mecha.errors import OptionError, RecipeTypeError
from sd_mecha.execution.run import Runner, RunOptions
from sd_mecha.extensions import model_dirs
from sd_mecha.extensions.merge_methods import RecipeNodeOrValue, resolve, value_to_node
from sd_mecha.options import MergeOptions
from sd_mecha.outputs import open_writer, output_metadata
from sd_mecha.planning.bench import Precision
from sd_mecha.planning.plan import Plan, PlanOptions, make_plan
from sd_mecha.progress import NoProgress, RichProgress
from sd_mecha.recipes.nodes import MergeRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort
from sd_mecha.resuming import telling, unfinished
from sd_mecha.storage.contract import Writer, check_unchanged, settle
from sd_mecha.storage.dtypes import parse_dtype
from sd_mecha.storage.memory import MemoryWriter


def merge(
    recipe: RecipeNodeOrValue,
    *,
    fallback_model: Any = ...,
    merge_device: Any = ...,
    merge_dtype: Any = ...,
    output_device: Any = ...,
    output_dtype: Any = ...,
    scaled_fp8: Any = ...,
    threads: Any = ...,
    total_buffer_size: Any = ...,
    strict_merge_space: Any = ...,
    strict_mandatory_keys: Any = ...,
    strict_adapters: Any = ...,
    check_extra_keys: Any = ...,
    check_finite_output: Any = ...,
    omit_non_finite_inputs: Any = ...,
    allow_empty_merge: Any = ...,
    memoize_intermediates: Any = ...,
    validate_mm_contract: Any = ...,
    cache: Any = ...,
    tqdm: Any = ...,
    output: Any = ...,
    output_format: Any = ...,
    shard_size: Any = ...,
    side_files: Any = ...,
    resume: Any = ...,
    checksums: Any = ...,
) -> MutableMapping[str, Any] | Any:
    """Merge a recipe, streaming: memory depends neither on the number of models nor on their size.

    Every option that is not given has the default of `sd_mecha.options.MergeOptions`, which documents them all. By
    default the result is computed in float32 and written in float16; into a module, in the dtypes that it has.

    Args:
        recipe: the recipe; Python values are taken as `value_to_node` says.
        output: None: return a new dict of tensors; a mutable mapping: fill it and return it; a `torch.nn.Module`: copy
            the results into its parameters and buffers, which must be of the same names and shapes, and return it; a
            path: write a file, which appears under its name when it is complete.

    Returns:
        The mapping of keys to tensors, with the recipe under `__metadata__`; the module; None if a file was written.

    Raises:
        PlanError: the recipe contradicts itself, before any tensor is read; subclasses say how.
        OptionError: an option is out of range.
        OutputError: the output cannot be written; a file of that name stays as it was. A module that is no input of
            the recipe may be merged in part by then, which is said in a warning.

    >>> import torch, sd_mecha
    >>> a, b = ({"w": torch.tensor([value])} for value in (1.0, 3.0))
    >>> sd_mecha.merge(sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model(b), alpha=0.25))["w"]
    tensor([1.5000], dtype=torch.float16)
    """
    given = {name: value for name, value in locals().items() if name != "recipe"}
    if isinstance(output, torch.nn.Module) and output_dtype is ...:
        given["output_dtype"] = None  # rounded once, to the dtype of the parameter
    options = MergeOptions().given(given)
    target = options.output
    outputs = [{} if target is None else target]
    _merge([recipe], outputs, options)
    return outputs[0] if isinstance(outputs[0], MutableMapping | torch.nn.Module) else None


def merge_many(recipes: Mapping[Any, RecipeNodeOrValue], **options: Any) -> None:
    """Merge several recipes in one pass; a tensor that several of them need is read once.

    Args:
        recipes: output path -> recipe.
        options: as for `merge`, without `output`.

    Raises:
        OptionError, PlanError, OutputError: as `merge`; either all outputs appear or none, unless publishing one of
            them fails after others were published.
    """
    if "output" in options:
        raise OptionError("merge_many takes its outputs from the keys of the mapping; leave out output=")
    if not recipes:
        return
    paths = [os.path.abspath(model_dirs.resolve_output(path)) for path in recipes]
    if twice := {p for p in paths if paths.count(p) > 1}:
        raise OptionError(f"several recipes would be written to {min(twice)}")
    _merge(list(recipes.values()), list(recipes), MergeOptions().given(options))


def stream(recipe: RecipeNodeOrValue, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge a recipe and yield (key, tensor) as they are finished; nothing is kept.

    Args:
        recipe: the recipe.
        options: as for `merge`, without `output`. With `threads=0` each tensor is computed when it is asked for;
            otherwise workers run ahead by a few tensors.

    Raises:
        ChangedInputError: after the last tensor, where an input changed meanwhile: what was yielded may be of both.

    >>> import torch, sd_mecha
    >>> model = sd_mecha.model({"w": torch.ones(2)})
    >>> dict(sd_mecha.stream(sd_mecha.n_average(model, model), output_dtype=None))
    {'w': tensor([1., 1.])}
    """
    if "output" in options:
        raise OptionError("stream yields its results; leave out output=")
    checked = MergeOptions().given(options)
    for name in ("scaled_fp8", "output_format", "shard_size", "side_files", "resume", "checksums"):
        if getattr(checked, name):
            raise OptionError(f"stream yields tensors as they are computed; {name} needs an output of merge")
    writer = MemoryWriter({})
    with _plan([recipe], checked) as planned:
        writer.declare(planned.outputs[0], {})
        with _progress(checked, planned) as progress:
            steps = _in_turn if checked.workers() == 0 else _ahead
            # closed before the models are: a consumer that stops early leaves workers that still read from them
            with closing(steps(planned, writer, run_options(checked), progress)) as finished:
                for key in finished:
                    tensor = writer.complete(key)
                    writer.drop(key)
                    yield key, _placed(tensor, checked)
        _check_inputs(planned)


def plan(recipe: RecipeNodeOrValue, **options: Any) -> Plan:
    """Plan a merge from file headers alone; printing the plan explains it.

    Args:
        recipe: the recipe.
        options: as for `merge`.

    Returns:
        The plan. It holds its models open: close it, or use it in a `with`.
    """
    return _plan([recipe], MergeOptions().given(options))


class Defaults:
    """Options to be used again and again: `Defaults(threads=4).merge(recipe)`.

    Args:
        options: as for `merge`; options given to a call take precedence.
    """

    def __init__(self, **options: Any) -> None:
        self.options = {name: value for name, value in options.items() if value is not ...}
        MergeOptions().given(self.options)

    def merge(self, recipe: RecipeNodeOrValue, **options: Any) -> MutableMapping[str, Any] | Any:
        return merge(recipe, **self._with(options))

    def plan(self, recipe: RecipeNodeOrValue, **options: Any) -> Plan:
        return plan(recipe, **self._with(options))

    def convert(self, recipe: RecipeNodeOrValue, config: Any) -> RecipeNode:
        return convert(recipe, config)

    def _with(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.options, **{name: value for name, value in options.items() if value is not ...}}


_options = [p for name, p in inspect.signature(merge).parameters.items() if name not in ("recipe", "self")]
_self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
Defaults.__init__.__signature__ = inspect.Signature([_self, *_options])  # type: ignore[attr-defined]
Defaults.merge.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_self, next(iter(inspect.signature(merge).parameters.values())), *_options]
)


def _plan(recipes: Sequence[RecipeNodeOrValue], options: MergeOptions) -> Plan:
    roots = [_root(recipe, options) for recipe in recipes]
    given = options.cache or {}
    if stray := next((n for n in given if not isinstance(n, RecipeNode)), None):
        raise OptionError(f"cache maps recipe nodes to objects; got the key {stray!r}")
    merges = (node for node in toposort(*roots) if isinstance(node, MergeRecipeNode))
    caches: dict[RecipeNode, Any] = {node: node.cache for node in merges if node.cache is not None}
    caches.update(given)
    return make_plan(
        roots,
        PlanOptions(
            Precision(
                options.device,
                options.dtype,
                parse_dtype(options.output_dtype),
                options.omit_non_finite_inputs,
            ),
            options.root_spaces(),
            options.strict_mandatory_keys,
            options.check_extra_keys,
            options.allow_empty_merge,
            options.memoize_intermediates,
            caches,
            options.strict_adapters,
        ),
    )


def _root(recipe: RecipeNodeOrValue, options: MergeOptions) -> RecipeNode:
    if isinstance(recipe, str):
        raise RecipeTypeError(
            f"{recipe!r} is a str, not a recipe; for a model file write sd_mecha.model(path), "
            "for a recipe file sd_mecha.deserialize_path(path)"
        )
    root = value_to_node(recipe)
    if options.fallback_model is None:
        return root
    return resolve("fallback")(root, options.fallback_model)


def _merge(recipes: Sequence[RecipeNodeOrValue], outputs: Sequence[Any], options: MergeOptions) -> None:
    with ExitStack() as stack:
        planned = stack.enter_context(_plan(recipes, options))
        writers: list[Writer] = []
        for target, output in enumerate(outputs):
            writer = open_writer(output, planned, target, options)
            stack.callback(writer.abort)
            writer.declare(planned.outputs[target], output_metadata(planned, target))
            writers.append(writer)
        progress = stack.enter_context(_progress(options, planned))
        runner = Runner(planned, writers, run_options(options), telling(writers, progress.finished))
        runner.run(unfinished(planned.programs, writers, progress.finished))
        _check_inputs(planned)
        planned.close()  # before publishing: an input may be what is replaced
        for writer in writers:  # so that what one of them lacks is not made again for the others
            settle(writer)
        for writer in writers:
            writer.commit()
    for output in outputs:
        if isinstance(output, MutableMapping):
            for key, value in output.items():
                if isinstance(value, torch.Tensor):
                    output[key] = _placed(value, options)


def _check_inputs(planned: Plan) -> None:
    for reader in planned.readers:
        check_unchanged(reader)


def run_options(options: MergeOptions) -> RunOptions:
    """What running a plan needs to know of the options of merging."""
    return RunOptions(
        options.workers(),
        options.total_buffer_size,
        options.device,
        options.check_finite_output,
        options.validate_mm_contract,
    )


def _placed(tensor: torch.Tensor, options: MergeOptions) -> torch.Tensor:
    device = options.output_device if options.output_device is not None else options.device
    return tensor if device is None else tensor.to(device)


class _Progress:
    """Tells a progress bar what is finished; workers report here one at a time."""

    def __init__(self, bar: Any, planned: Plan) -> None:
        self._bar = bar
        self._lock = threading.Lock()
        self._bytes = 0
        self._postfix(total_bytes=planned.bytes_written)

    def finished(self, target: int, key: str, nbytes: int) -> None:
        with self._lock:
            self._bytes += nbytes
            self._bar.update()
            self._postfix(key=key, bytes=self._bytes)

    def _postfix(self, **facts: Any) -> None:
        if hasattr(self._bar, "set_postfix"):
            self._bar.set_postfix(**facts)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *args: Any) -> None:
        self._bar.__exit__(*args)


def _progress(options: MergeOptions, planned: Plan) -> _Progress:
    make = RichProgress if options.tqdm is ... else NoProgress if options.tqdm is None else options.tqdm
    bar = make(total=planned.keys, desc="Merging recipe")
    return _Progress(bar.__enter__(), planned)


def _in_turn(
    planned: Plan, writer: MemoryWriter, options: RunOptions, progress: _Progress
) -> Generator[str, None, None]:
    done: list[str] = []

    def finished(target: int, key: str, nbytes: int) -> None:
        done.append(key)
        progress.finished(target, key, nbytes)

    runner = Runner(planned, [writer], options, finished)
    for program in planned.programs:
        runner.run([program])
        yield from done
        done.clear()


def _ahead(planned: Plan, writer: MemoryWriter, options: RunOptions, progress: _Progress) -> Generator[str, None, None]:
    """Workers run in the background and wait when the consumer is a few tensors behind."""
    ready: queue.Queue[str | None] = queue.Queue(maxsize=2 * options.workers)
    stopped = threading.Event()
    failure: list[BaseException] = []

    def put(item: str | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def finished(target: int, key: str, nbytes: int) -> None:
        progress.finished(target, key, nbytes)
        put(key)

    runner = Runner(planned, [writer], options, finished)

    def produce() -> None:
        try:
            runner.run(planned.programs)
        except BaseException as error:
            failure.append(error)
        put(None)

    producer = threading.Thread(target=produce, name="sd-mecha-stream", daemon=True)
    try:
        producer.start()
        while (key := ready.get()) is not None:
            yield key
        if failure:
            raise failure[0]
    finally:
        stopped.set()
        runner.stop()
        if producer.is_alive():
            producer.join()
