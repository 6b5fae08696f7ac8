"""The comparison of runs says where two part, and reads only what recipe.train has written."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from recipe import fingerprint
from recipe.configs.quick import RECIPE
from recipe.errors import UsageError
from recipe.run import runlog
from recipe.system.processor import processor

START = {"kind": "start", "step": 0, "first_images": "0123abcd", "initial_weights": "11" * 32}


def epoch_line(epoch: int) -> dict:
    return {
        "kind": "epoch",
        "step": 4 * epoch,
        "epoch": epoch,
        "order": f"0000000{epoch}",
        "weights": f"{epoch}" * 64,
        "norm": 20.0 + epoch,
    }


@pytest.fixture
def run(tmp_path):
    """Return what makes a run directory: the lines changed by `change`, the recipe by `fields`."""

    def make(name, change=lambda lines: None, **fields):
        lines = [dict(START), *(epoch_line(epoch) for epoch in (1, 2, 3))]
        change(lines)
        folder = tmp_path / name
        folder.mkdir()
        (folder / runlog.CONFIG).write_text(json.dumps(asdict(replace(RECIPE, **fields))))
        (folder / runlog.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder)

    return make


def verdict(capsys, *runs) -> str:
    fingerprint.main(list(runs))
    return capsys.readouterr().out.splitlines()[-1]


def test_two_lines_say_what_a_run_was(run, capsys):
    fingerprint.main([run("a")])
    one, two = capsys.readouterr().out.splitlines()
    assert " recipe " in one
    assert "first images 0123abcd" in one
    assert "initial weights 11111111" in one
    assert " ".join(two.split()) == "weights after epoch 1 11111111, 2 22222222, 3 33333333 norm 23"


def test_equal_runs_are_equal_as_far_as_both_go(run, capsys):
    assert verdict(capsys, run("a"), run("b")).endswith("the same to the bit, up to epoch 3")
    assert verdict(capsys, run("c"), run("d", list.pop)).endswith(
        "the same to the bit, up to epoch 2"
    )


def test_folders_and_looks_are_no_difference(run, capsys):
    data = replace(RECIPE.data, data_dir="/elsewhere")
    other = run("b", data=data, run=replace(RECIPE.run, log_every=7))
    assert verdict(capsys, run("a"), other).endswith("the same to the bit, up to epoch 3")


def test_the_first_difference_is_named(run, capsys):
    def other_images(lines):
        lines[0].update(first_images="ff")

    def other_order(lines):
        lines[2].update(order="ff")

    def drift(lines):
        lines[2].update(weights="f" * 64)
        lines[3].update(weights="e" * 64, norm=23.000023)

    first = run("a")
    assert verdict(capsys, first, run("b", seed=1)).endswith("another recipe")
    assert verdict(capsys, first, run("c", other_images)).endswith("another first images")
    assert verdict(capsys, first, run("d", other_order)).endswith("another order")
    assert verdict(capsys, first, run("e", drift)).endswith(
        "other weights from epoch 2 on; the last norms differ by 1.0e-06"
    )


def test_what_is_no_run_is_refused(run, tmp_path):
    for arguments, part in (
        ([], "name one run directory"),
        ([str(tmp_path)], "is not a run directory"),
        ([run("a", lambda lines: lines[1].pop("order"))], "has no 'order'"),
        ([run("b", lambda lines: lines.clear())], "no finished epoch"),
    ):
        with pytest.raises(UsageError, match=part):
            fingerprint.main(arguments)


def test_other_processors_are_named_as_the_cause(run, capsys):
    def part(lines):
        lines[2].update(weights="f" * 64)

    runs = [run("a"), run("b", part), run("c", part), run("d")]
    kinds = ("Old (avx2)", "New (avx512f)", "Old (avx2)", "New (avx512f)")
    for folder, kind in zip(runs, kinds, strict=True):
        (Path(folder) / "environment.json").write_text(json.dumps({"processors": [kind]}))
    old, parted_on_new, parted_on_old, same_on_new = runs

    cause = "; they ran on other processors (Old (avx2); New (avx512f)), whose libraries round"
    assert verdict(capsys, old, parted_on_new).endswith(f"{cause} otherwise")
    assert "they ran on" not in verdict(capsys, old, parted_on_old)
    assert verdict(capsys, old, same_on_new).endswith("the same to the bit, up to epoch 3")
    (Path(parted_on_new) / "environment.json").unlink()
    assert "they ran on" not in verdict(capsys, old, parted_on_new)


def test_this_processor_has_a_kind_and_instructions():
    """The kernel says them, so no processor's own words are expected."""
    assert re.fullmatch(r".+ \(.+: .+\)", processor())
    assert processor() == processor()
