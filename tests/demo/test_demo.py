"""The demo keeps its promise: a merge reads all ten digits better than either specialist."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file

import sd_mecha
from sd_mecha.cli import main
from sd_mecha.demo.digits import load, network, trained
from sd_mecha.demo.report import Result, run, same_bits


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return run(tmp_path_factory.mktemp("demo"), Console(quiet=True))


def test_specialists_know_their_half_and_merges_both(results: list[Result]) -> None:
    _, low, high, *merges = results
    assert low.low > 0.95 > 0.3 > low.high
    assert high.high > 0.95 > 0.3 > high.low
    assert {m.name for m in merges} >= {"weighted sum", "task arithmetic"}
    for merge in merges:
        assert merge.beats_both
        assert merge.everything > max(low.everything, high.everything) + 0.1


def test_some_merge_beats_the_base_as_well(results: list[Result]) -> None:
    base, _, _, *merges = results
    assert max(merge.everything for merge in merges) > base.everything


def test_models_and_recipes_are_left_for_the_reader(results: list[Result]) -> None:
    for result in results:
        assert load_file(result.file).keys() == network().state_dict().keys()
    recipe = results[-1].file.with_suffix(".mecha")
    again = sd_mecha.merge(sd_mecha.deserialize_path(recipe))
    saved = load_file(results[-1].file)
    assert same_bits(saved, {key: again[key] for key in saved})


def test_training_is_the_same_each_time() -> None:
    train, test = load()
    assert len(test.labels) == 600
    first, second = (trained(network().state_dict(), train.only(0, 4), 3) for _ in range(2))
    assert same_bits(first, second)


def test_training_leaves_the_random_state_of_the_caller() -> None:
    before = torch.random.get_rng_state()
    network()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bits_differ_where_values_compare_equal() -> None:
    assert same_bits({"x": torch.tensor(float("nan"))}, {"x": torch.tensor(float("nan"))})
    assert not same_bits({"x": torch.tensor(0.0)}, {"x": torch.tensor(-0.0)})
    assert not same_bits({"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=torch.float16)})
    assert not same_bits({"x": torch.zeros(2)}, {"y": torch.zeros(2)})


def test_without_scikit_learn_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "pip install 'sd-mecha[demo]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_table_marks_the_merges_that_beat_both(results: list[Result], tmp_path: Path) -> None:
    console = Console(record=True, width=120, file=(tmp_path / "shown").open("w", encoding="utf-8"))
    run(tmp_path, console)
    console.file.close()
    text = console.export_text()
    assert text.count("beats both") == sum(result.beats_both for result in results)
    assert "peak memory" in text
    assert str(tmp_path) in text
