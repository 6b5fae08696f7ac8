"""Recipes refuse what is unknown or impossible, in one sentence with the nearest valid name."""

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe import cli, train
from recipe.config import SYNONYMS, Data, Model, Optimizer, Recipe, Schedule, flatten
from recipe.errors import UsageError


def refused(action, *parts: str) -> None:
    with pytest.raises(UsageError) as error:
        action()
    sentence = str(error.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


def parse(*arguments: str) -> Recipe:
    return cli.parse_recipe(list(arguments)).recipe


def test_the_papers_numbers():
    one_hour, baseline = cli.load_recipe("imagenet_1hr"), cli.load_recipe("imagenet_8gpu")
    assert (one_hour.k, one_hour.n, one_hour.minibatch, one_hour.epochs) == (256, 32, 8192, 90)
    assert (baseline.k, baseline.n, baseline.minibatch, baseline.epochs) == (8, 32, 256, 90)
    assert flatten(one_hour.optimizer) == {
        "base_rate": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "compression": "none",
    }
    assert one_hour.schedule.decay_epochs == baseline.schedule.decay_epochs == (30, 60, 80)


@pytest.mark.parametrize("preset", cli.presets())
def test_recipes_survive_json(preset):
    recipe = cli.load_recipe(preset)
    assert Recipe.from_dict(asdict(recipe)) == recipe


def test_overrides():
    recipe = parse(
        "--config=quick",
        "--config.optimizer.base_rate=1",
        "--config.schedule.decay_epochs=(8, 9.5, 10, 11)",
        "--config.k",
        "3",
    )
    assert recipe.optimizer.base_rate == 1.0
    assert recipe.schedule.decay_epochs == (8.0, 9.5, 10.0, 11.0)
    assert recipe.k == 3
    assert type(recipe.optimizer.base_rate) is float
    assert replace(recipe, k=2, optimizer=Optimizer(base_rate=0.1)).n == cli.load_recipe("quick").n


def test_a_runs_config_file_is_a_recipe(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"k": 4, "optimizer": {"base_rate": 1}}')
    assert parse(f"--config={path}") == Recipe(k=4, optimizer=Optimizer(base_rate=1.0))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--config is missing", "imagenet_1hr"]),
        (["--config=imagenet_1h"], ["imagenet_1h ", "--config=imagenet_1hr"]),
        (["--config=no.json"], ["no.json", "can't be read"]),
        (
            ["--config=quick", "--config.optimiser.base_rate=1"],
            ["optimiser", "--config.optimizer.base_rate"],
        ),
        (["--config=quick", "--config.base_rate=1"], ["--config.optimizer.base_rate"]),
        (["--config=quick", "--config.optimizer.lr=1"], ["mean --config.optimizer.base_rate?"]),
        (["--config=quick", "--config.batch_size=1"], ["mean --config.n?"]),
        (["--config=quick", "--config.momentum=0.8"], ["mean --config.optimizer.momentum?"]),
        (["--config=quick", "--config.train.epochs=1"], ["mean --config.epochs?"]),
        (["--config=quick", "--config.num-workers=1"], ["mean --config.k?"]),
        (["--config=quick", "--config.k=two"], ["config.k", "two"]),
        (["--config=quick", "--config.k=0"], ["config.k", "at least 1", "0"]),
        (
            ["--config=quick", "--config.optimizer.base_rate=nan"],
            ["config.optimizer.base_rate", "nan"],
        ),
        (
            ["--config=quick", "--config.schedule.decay_epochs=('a',)"],
            ["config.schedule.decay_epochs"],
        ),
        (
            ["--config=quick", "--config.model.stem=smal"],
            ["config.model.stem", "'smal'", "'small'"],
        ),
    ],
)
def test_command_lines_refused(arguments, parts):
    refused(lambda: parse(*arguments), *parts)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"k": 2.0}, ["config.k", "int", "2.0"]),
        ({"seed": -1}, ["config.seed", "-1"]),
        ({"optimizer": Optimizer(momentum=1.0)}, ["config.optimizer.momentum"]),
        ({"optimizer": Optimizer(momentum=0.0)}, ["config.optimizer.nesterov", "momentum"]),
        ({"optimizer": Optimizer(compression="bf16")}, ["bf16", "'fp16'"]),
        (
            {"schedule": Schedule(decay_epochs=(60.0, 30.0))},
            ["decay_epochs", "(30.0, 60.0)"],
        ),
        (
            {"schedule": Schedule(decay_epochs=(-1.0, 30.0))},
            ["decay_epochs=(-1.0, 30.0)", "later than epoch 0"],
        ),
        ({"schedule": Schedule(warmup_epochs=40.0)}, ["warmup_epochs=40.0", "30"]),
        ({"epochs": 3}, ["warmup_epochs=5.0", "3 epochs"]),
        ({"model": Model(blocks=())}, ["config.model.blocks"]),
        ({"model": Model(blocks=(3, 0))}, ["config.model.blocks", "(3, 0)"]),
        ({"data": Data(remainder="dorp")}, ["config.data.remainder", "'drop'"]),
        ({"data": Data(image_size=4)}, ["config.data.image_size", "at least 8"]),
        (
            {"data": Data(name="folder", shuffle_block=32)},
            ["config.data.shuffle_block", "of one class"],
        ),
    ],
)
def test_recipes_refused(values, parts):
    refused(lambda: Recipe(**values), *parts)


def test_what_is_no_section_or_no_number_is_refused():
    refused(lambda: Recipe.from_dict({"data": 3}), "config.data", "section", "3")
    refused(lambda: Recipe.from_dict([1]), "config must be a section")
    refused(
        lambda: parse("--config=quick", "--config.optimizer.base_rate=inf"),
        "config.optimizer.base_rate",
        "inf",
    )


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--confg.k=3", "--config.k"),
        ("--epochs=3", "--config.epochs"),
        ("--lr=0.1", "--config.optimizer.base_rate"),
        ("--batch-size=64", "--config.n"),
        ("--output_dir=x", "--run_dir"),
        ("--runs_dir=x", "--run_dir"),
        ("--resume_from=x", "--resume"),
    ],
)
def test_a_flag_of_no_program_is_answered_by_what_may_be_meant(flag, meant):
    refused(lambda: train.main(["--config=quick", flag]), f"did you mean {meant}?")


def test_every_synonym_is_of_a_field_or_a_flag():
    known = {"run_dir", "resume", *(f"config.{name}" for name in flatten(Recipe()))}
    assert set(SYNONYMS) <= known
    others = [word for words in SYNONYMS.values() for word in words.split()]
    assert len(set(others)) == len(others)


def test_unknown_names_in_a_file_are_refused():
    refused(
        lambda: Recipe.from_dict({"optimizer": {"lr": 3}}),
        "did you mean config.optimizer.base_rate?",
    )
    refused(lambda: Recipe.from_dict({"optimiser": {}}), "did you mean config.optimizer?")
    refused(
        lambda: Recipe.from_dict({"model": {"widht": 3}}),
        "config.model.widht",
        "config.model.width",
    )


@given(st.text(st.characters(codec="ascii"), min_size=1, max_size=20), st.text(max_size=10))
def test_any_override_is_taken_or_refused_in_one_sentence(name, value):
    try:
        parse("--config=quick", f"--config.{name}={value}")
    except UsageError as error:
        assert len(str(error)) < 500
