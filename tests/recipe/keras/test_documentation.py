"""docs/keras.md against the installed Horovod.

Every public name stands in its table and takes its arguments.
"""

import importlib
import inspect
import re
import runpy
import types

import keras
import pytest

from tests.ranks import ROOT

PAGE = (ROOT / "docs/keras.md").read_text()
MADE_WITH = {
    "BroadcastGlobalVariablesCallback": (0,),
    "MetricAverageCallback": (),
    "LearningRateScheduleCallback": (0.1, 1.0),
    "LearningRateWarmupCallback": (0.1,),
    "CommitStateCallback": (types.SimpleNamespace(batch=0, epoch=0),),
    "UpdateBatchStateCallback": (types.SimpleNamespace(batch=0, epoch=0),),
    "UpdateEpochStateCallback": (types.SimpleNamespace(batch=0, epoch=0),),
}
# What Horovod's callbacks remember for themselves, of TensorFlow 1's graphs and of a momentum that
# they put aside.
ITS_OWN_NOTES = {"backend", "broadcast_done", "variables", "allreduce_ops", "restore_momentum"}
IMPORTED = {"K", "inspect", "is_version_greater_equal_than", "keras", "tf", "version", "warnings"}

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="Horovod's Keras modules need it"
)


def public(module: str) -> dict:
    theirs = importlib.import_module(module)
    names = getattr(theirs, "__all__", [n for n in vars(theirs) if not n.startswith("_")])
    return {name: getattr(theirs, name) for name in names if name not in IMPORTED}


def counterpart(module: str, name: str) -> object:
    place = re.sub(r"^horovod(\.tensorflow)?\.keras", "recipe.keras", module)
    return getattr(importlib.import_module(place), name)


def cases() -> list:
    modules = [
        f"horovod.{binding}{part}"
        for binding in ("tensorflow.keras", "keras")
        for part in ("", ".callbacks", ".elastic")
    ]
    return [(module, name) for module in modules for name in public(module)]


def parameters(thing: object) -> list[inspect.Parameter]:
    function = thing.__init__ if inspect.isclass(thing) else thing
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


@pytest.mark.parametrize(("module", "name"), cases())
def test_every_public_name_of_horovod_is_in_the_table_and_exists(module, name):
    assert re.search(rf"^\|[^|]*`{name}`[^|]*\| (same|better|refused)", PAGE, re.MULTILINE), name
    assert counterpart(module, name) is not None


@pytest.mark.parametrize(
    ("module", "name"), [case for case in cases() if case[0].startswith("horovod.tensorflow")]
)
def test_signatures_begin_with_horovods(module, name):
    theirs, ours = public(module)[name], counterpart(module, name)
    if not callable(theirs) or theirs is ours or name in ("Compression", "ProcessSet"):
        return
    if name in ("init", "shutdown"):  # Horovod's are (*args, **kwargs)
        return
    for expected, found in zip(parameters(theirs), parameters(ours), strict=False):
        assert (found.name, found.default) == (expected.name, expected.default)
        assert found.kind == expected.kind
    assert len(parameters(ours)) >= len(parameters(theirs))


@pytest.mark.parametrize(
    "name", ["DistributedOptimizer", "PartialDistributedOptimizer", "allreduce", "load_model"]
)
def test_horovod_keras_takes_the_same_keywords(name):
    """`horovod.keras` lacks some arguments in the middle.

    Its `average=True` is our None, the mean.
    """
    ours = {p.name: p.default for p in parameters(counterpart("horovod.keras", name))}
    for expected in parameters(public("horovod.keras")[name]):
        assert expected.name in ours
        assert expected.name == "average" or ours[expected.name] == expected.default


def classes() -> list:
    return [case for case in cases() if inspect.isclass(public(case[0])[case[1]])]


@pytest.mark.parametrize(("module", "name"), classes())
def test_every_public_method_of_horovods_classes_exists_and_takes_its_arguments(module, name):
    theirs, ours = public(module)[name], counterpart(module, name)
    for method in [
        m for m in dir(theirs) if not m.startswith("_") and callable(getattr(theirs, m))
    ]:
        expected, found = (parameters(getattr(cls, method)) for cls in (theirs, ours))
        assert [(p.name, p.default) for p in found[: len(expected)]] == [
            (p.name, p.default) for p in expected
        ], method


@pytest.mark.parametrize(("module", "name"), [case for case in classes() if case[1] in MADE_WITH])
def test_every_public_attribute_of_horovods_callbacks_exists(module, name):
    theirs, ours = (
        cls(*MADE_WITH[name]) for cls in (public(module)[name], counterpart(module, name))
    )
    for attribute in [a for a in vars(theirs) if not a.startswith("_") and a not in ITS_OWN_NOTES]:
        assert hasattr(ours, attribute), attribute


def test_every_public_name_of_horovods_distributed_optimizer_exists():
    theirs, ours = (
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        for hvd in map(importlib.import_module, ("horovod.tensorflow.keras", "recipe.keras"))
    )
    for name in [n for n in vars(type(theirs)) if not n.startswith("_")] + [
        "process_set",
        "scale_local_gradients",
    ]:
        assert hasattr(ours, name), name
        expected = inspect.getattr_static(theirs, name, None)
        if (
            inspect.isfunction(expected) and name != "apply_gradients"
        ):  # Horovod's is (*args, **kwargs)
            assert [p.name for p in parameters(getattr(ours, name))] == [
                p.name for p in parameters(expected)
            ]
    assert ours.variables() == ours.variables


def test_every_test_that_the_page_names_exists():
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in code, name


def test_every_argument_of_distributed_optimizer_is_in_the_table():
    for parameter in parameters(counterpart("horovod.keras", "DistributedOptimizer"))[1:]:
        assert re.search(rf"^\|[^|]*`{parameter.name}`", PAGE, re.MULTILINE), parameter.name


def test_jax_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(
        ImportError, match=r"no binding for Keras's 'jax' backend; set KERAS_BACKEND="
    ):
        runpy.run_path(str(ROOT / "recipe/keras/backend.py"))
