"""The reproduction report says where two runs part, and reads only what recipe.train has written."""

import copy
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
EPOCHS = [
    {
        "kind": "epoch",
        "step": 4 * e,
        "epoch": e,
        "order": f"0000000{e}",
        "weights": f"{e}" * 64,
        "norm": 20.0 + e,
    }
    for e in (1, 2, 3)
]


@pytest.fixture
def run(tmp_path):
    """Makes a run directory: the lines changed by `change`, the recipe by `fields`."""

    def make(name, change=lambda lines: None, **fields):
        lines = copy.deepcopy([START, *EPOCHS])
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
    assert (
        "first images 0123abcd" in one and "initial weights 11111111" in one and " recipe " in one
    )
    assert " ".join(two.split()) == "weights after epoch 1 11111111, 2 22222222, 3 33333333 norm 23"


def test_equal_runs_are_equal_as_far_as_both_go(run, capsys):
    assert verdict(capsys, run("a"), run("b")).endswith("the same to the bit, up to epoch 3")
    assert verdict(capsys, run("c"), run("d", list.pop)).endswith(
        "the same to the bit, up to epoch 2"
    )


def test_folders_and_looks_are_no_difference(run, capsys):
    other = run(
        "b", data=replace(RECIPE.data, data_dir="/elsewhere"), run=replace(RECIPE.run, log_every=7)
    )
    assert verdict(capsys, run("a"), other).endswith("the same to the bit, up to epoch 3")


def test_the_first_difference_is_named(run, capsys):
    first = run("a")
    assert verdict(capsys, first, run("b", seed=1)).endswith("another recipe")
    assert verdict(
        capsys, first, run("c", lambda lines: lines[0].update(first_images="ff"))
    ).endswith("another first images")
    assert verdict(capsys, first, run("d", lambda lines: lines[2].update(order="ff"))).endswith(
        "another order"
    )

    def drift(lines):
        lines[2].update(weights="f" * 64)
        lines[3].update(weights="e" * 64, norm=23.000023)

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
    for folder, kind in zip(
        runs, ("Old (avx2)", "New (avx512f)", "Old (avx2)", "New (avx512f)"), strict=True
    ):
        (Path(folder) / "environment.json").write_text(json.dumps({"processors": [kind]}))
    assert verdict(capsys, *runs[:2]).endswith(
        "; they ran on other processors (Old (avx2); New (avx512f)), whose libraries round "
        "otherwise"
    )
    assert "they ran on" not in verdict(capsys, runs[0], runs[2])
    assert verdict(capsys, runs[0], runs[3]).endswith("the same to the bit, up to epoch 3")
    (Path(runs[1]) / "environment.json").unlink()
    assert "they ran on" not in verdict(capsys, *runs[:2])


def test_this_processor_has_a_kind_and_instructions():
    """As the kernel says; not the words of one processor."""
    assert re.fullmatch(r".+ \(.+: .+\)", processor())
    assert processor() == processor()
