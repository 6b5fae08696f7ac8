"""`load_model`: a saved Keras model comes back with its optimizer distributed, state included."""

import contextlib
import json
import os
import re
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np
from keras.src.legacy.saving import json_utils, legacy_h5_format

from recipe.keras.backend import Compression
from recipe.keras.distributed import DistributedOptimizer, is_distributed, use_compression

_HDF5 = (".h5", ".hdf5")
_WEIGHTS = "model.weights.h5"  # in an archive
_LARGEST_CONFIG = 2**28  # bytes; a longer one is cut off, which is no JSON
# Metrics that `compile` chooses by the model's output.
_BY_OUTPUT = ("accuracy", "acc", "crossentropy", "ce")
# Arguments of `compile` that Keras writes into .h5 files and doesn't read.
_COMPILE = ("run_eagerly", "steps_per_execution", "jit_compile")

Config = Any  # a serialized object, or lists and dictionaries of them


class _Saved(NamedTuple):
    """A variable of an optimizer as it lies in a file."""

    name: str  # that it had when it was saved
    value: np.ndarray


class _Training(NamedTuple):
    """How a model in an .h5 file was trained."""

    config: dict[str, Any] | None  # what it was compiled with; None if it was not
    optimizer: list[_Saved]  # the optimizer's variables


def load_model(
    filepath: str | os.PathLike | h5py.File,
    custom_optimizers: Iterable[Callable] | None = None,
    custom_objects: dict[str, Any] | None = None,
    compression: type = Compression.none,
    legacy_opts: bool = False,
) -> keras.Model:
    """Load a `.keras` or `.h5` model and make its optimizer, state included, distributed.

    `filepath` may be an open h5py.File. `custom_optimizers` are classes or functions, which go by
    their names. `custom_objects` maps names to classes or functions. A function for the optimizer's
    name is called with its saved configuration as keywords. What it returns may be distributed
    already. A model that was saved without an optimizer comes back as it is. Lambdas in the file
    are not run (Keras's safe mode).

    Raise ValueError, in one sentence, for a file that can't be loaded whole, also where only the
    optimizer's state would be lost. Raise it for `legacy_opts`, which Keras 3 doesn't have.
    """
    if legacy_opts:
        raise ValueError(
            "legacy_opts=True: Keras 3 has no legacy optimizers; save the model with one of its own"
        )
    objects = {_name_of(custom): custom for custom in custom_optimizers or ()}
    objects |= custom_objects or {}
    path = _checked_path(filepath)
    with _error_in_a_sentence(path), warnings.catch_warnings():
        # Here it is an error, or no loss.
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        if path.endswith(_HDF5):
            return _from_hdf5(path, objects, compression)
        return _from_archive(path, objects, compression)


def _from_archive(path: str, objects: dict[str, Any], compression: type) -> keras.Model:
    """Load a model in Keras's own format, a zip file or a folder.

    One at a remote address is left to Keras as a whole.
    """
    # Read how the model was compiled.
    is_remote = "://" in path
    compile_config = None if is_remote else _compile_config(path)

    # Give the caller's classes and functions for the optimizer precedence over Keras's.
    chosen = _Chosen(objects)
    config = chosen.renamed(compile_config.get("optimizer")) if compile_config else None
    if compile_config and chosen.names:
        model = keras.models.load_model(path, custom_objects=objects, compile=False)
        with keras.saving.custom_object_scope(objects | chosen.names):
            model.compile_from_config(compile_config | {"optimizer": config})
        model.load_weights(str(Path(path, _WEIGHTS)) if Path(path).is_dir() else path)
    else:
        model = keras.models.load_model(path, custom_objects=objects)

    # Distribute the optimizer, if there is one and it has got its state.
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return model
    _check_outermost(optimizer)
    if not is_remote:
        _check_number(optimizer, _number_in_archive(path))
    distributed = _distributed(optimizer, compression)
    if distributed is not optimizer:  # a LossScaleOptimizer was put around it
        model.optimizer = distributed
        model._compile_config.config["optimizer"] = distributed
    return model


def _from_hdf5(path: str, objects: dict[str, Any], compression: type) -> keras.Model:
    """Load a model in the older format.

    Keras's own loader makes optimizers for no variables, so that their state is lost. Here Keras
    loads the model only, and the optimizer is made, restored and compiled into it.
    """
    # A model that was saved without an optimizer needs no more.
    training = _training_in_hdf5(path)
    model = keras.models.load_model(path, custom_objects=objects, compile=False)
    if training.config is None or not training.config.get("optimizer_config"):
        return model

    # Keras makes the optimizer, the loss and the metrics of their configurations.
    optimizer_config = training.config["optimizer_config"]
    chosen = _Chosen(_own_class(optimizer_config) | objects)
    config = chosen.renamed(optimizer_config)
    with keras.saving.custom_object_scope(objects | chosen.names):
        optimizer = keras.optimizers.deserialize(config)
        arguments = _compile_arguments(training.config)
    if isinstance(optimizer, str):  # Keras hands back what it doesn't know
        raise ValueError(_unknown("optimizer", config["class_name"]))

    # The optimizer's state is restored before anything is put around it.
    _check_outermost(optimizer)
    _restore(optimizer, model.trainable_variables, training.optimizer)
    model.compile(_distributed(optimizer, compression), auto_scale_loss=False, **arguments)
    return model


class _Chosen:
    """The caller's classes and functions for the optimizers in a configuration.

    `renamed` gives these optimizers names that nothing else has. Keras would look up its own
    classes first, and takes no functions. `names` maps the new names to what makes the optimizers.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self.objects = objects
        self.names: dict[str, Any] = {}

    def renamed(self, config: Config) -> Config:
        """Return the configuration with new names for what the caller makes himself."""
        # Look for the names inside, from the inmost on.
        if not isinstance(config, dict):
            return config
        result = {}
        for key, value in config.items():
            result[key] = value if key == "learning_rate" else self.renamed(value)
        old_name = next((name for name in _names_in(result) if name in self.objects), None)
        if old_name is None:
            return result

        # A name that nobody else has leads Keras to the caller's maker.
        maker = self.objects[old_name]
        name = f"load_model>{old_name}"
        self.names[name] = maker if hasattr(maker, "from_config") else _Factory(old_name, maker)
        return {
            "module": None,
            "class_name": name,
            "registered_name": name,
            "config": result["config"],
        }


class _Factory:
    """Looks like a class to Keras: `from_config` calls the caller's function."""

    def __init__(self, name: str, make: Callable) -> None:
        self.name = name
        self.make = make

    def from_config(self, config: dict[str, Any]) -> keras.optimizers.Optimizer:
        """Return what the function makes of the configuration.

        Raise ValueError if that is no optimizer.
        """
        kwargs = {key: _object_of(value) for key, value in config.items()}
        try:
            optimizer = self.make(**kwargs)
        except Exception as error:
            raise ValueError(
                f"the function given for {self.name!r} failed with the saved configuration as its "
                f"keywords: {type(error).__name__}: {_reason(error)}"
            )
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                f"the function given for {self.name!r} returned {optimizer!r}, "
                "not a Keras optimizer"
            )
        return optimizer


def _names_in(config: dict[str, Any]) -> list[str]:
    """Return the names under which a caller may mean this serialized object.

    Horovod's are the lower-case ones.
    """
    if not isinstance(config.get("class_name"), str) or not isinstance(config.get("config"), dict):
        return []
    plain = config["class_name"].split(">")[-1]
    names = [config.get("registered_name"), config["class_name"], plain, plain.lower()]
    return [name for name in names if name]


def _own_class(config: dict[str, Any]) -> dict[str, type]:
    """Return Keras's optimizer class by this configuration's name.

    Keras's older loader doesn't know all of them.
    """
    name = config["class_name"]
    own = getattr(keras.optimizers, name, None)
    return {name.lower(): own} if isinstance(own, type) else {}


def _compile_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `compile` but the optimizer, from a configuration in an .h5 file."""
    arguments = {"loss": _compiled(config.get("loss"), keras.losses, "loss")}
    arguments["loss_weights"] = config.get("loss_weights")
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = _compiled(config.get(name), keras.metrics, "metric")
    for name in _COMPILE:
        if name in config:
            arguments[name] = config[name]
    return arguments


def _compiled(config: Config, module: ModuleType, kind: str) -> Any:
    """Return what `compile` takes for losses or metrics, from their configuration in an .h5 file.

    There may be one, or lists or dictionaries of them. `module` is keras.losses or keras.metrics.
    """
    # Several: one for each output.
    if isinstance(config, list | tuple):
        return [_compiled(part, module, kind) for part in config]
    if isinstance(config, dict) and "class_name" not in config:
        return {name: _compiled(part, module, kind) for name, part in config.items()}

    # An object with its configuration.
    if isinstance(config, dict):
        deserialized = module.deserialize(config)
        if isinstance(deserialized, str):
            raise ValueError(_unknown(kind, config["class_name"]))
        return deserialized

    # A name: the user's own object, or one that Keras must know.
    if not isinstance(config, str) or config in _BY_OUTPUT:
        return config
    if registered := keras.saving.get_registered_object(config):
        return registered
    try:
        module.get(config)
    except ValueError:
        raise ValueError(_unknown(kind, config))
    return config


def _unknown(what: str, name: str) -> str:
    return f"Keras doesn't know the {what} {name!r}; give it to load_model in custom_objects"


def _object_of(value: Any) -> Any:
    """Return a serialized schedule or inner optimizer as an object, anything else as it is."""
    if isinstance(value, dict) and "class_name" in value:
        return keras.saving.deserialize_keras_object(value)
    return value


def _name_of(custom: Callable) -> str:
    name = getattr(custom, "__name__", "<lambda>")
    if not callable(custom) or name == "<lambda>":
        raise ValueError(
            f"custom_optimizers holds {custom!r}, which has no name; use custom_objects={{name: …}}"
        )
    return name


def _check_outermost(optimizer: keras.optimizers.Optimizer) -> None:
    """Raise ValueError where a function of the caller's has distributed a part of the optimizer."""
    parts = [getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())]
    for part in parts:
        if is_distributed(part):
            raise ValueError(
                f"{type(part).__name__} is a DistributedOptimizer inside a "
                f"{type(optimizer).__name__}, but must be outermost; let the function return the "
                "plain optimizer, and load_model makes the whole distributed"
            )


def _distributed(
    optimizer: keras.optimizers.Optimizer, compression: type
) -> keras.optimizers.Optimizer:
    """Return the optimizer, distributed. A function of the caller's may have done that."""
    if not is_distributed(optimizer):
        return DistributedOptimizer(optimizer, compression=compression)
    if compression is not Compression.none:
        use_compression(optimizer, compression)
    return optimizer


def _checked_path(filepath: str | os.PathLike | h5py.File) -> str:
    """Return the path as Keras takes it.

    Raise ValueError for what is absent, or no model by its name and first bytes.
    """
    # A path, whatever it was given as. A remote one is left to Keras.
    if isinstance(filepath, h5py.File):
        filepath.flush()
        filepath = filepath.filename
    path = os.fsdecode(filepath)
    if "://" in path:
        return path
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist")

    # The name and the first bytes must agree.
    is_hdf5 = Path(path).is_file() and h5py.is_hdf5(path)
    if path.endswith(_HDF5) and not is_hdf5:
        raise ValueError(f"{path} is not an HDF5 file, or is damaged")
    if not path.endswith(_HDF5) and is_hdf5:
        raise ValueError(f"{path} is an HDF5 file; rename it, so that its name ends with .h5")
    is_folder = Path(path, "config.json").exists()
    is_archive = path.endswith(".keras") and zipfile.is_zipfile(path)
    if not (is_hdf5 or is_folder or is_archive):
        raise ValueError(
            f"{path} is neither a .keras file nor an .h5 file, or is damaged; "
            "save the model as .keras"
        )
    return path


def _compile_config(path: str) -> dict[str, Any] | None:
    """Return what the model in an archive was compiled with, None if it wasn't."""
    if Path(path).is_dir():
        config = json.loads(Path(path, "config.json").read_text())
    else:
        with zipfile.ZipFile(path) as archive, archive.open("config.json") as file:
            config = json.loads(file.read(_LARGEST_CONFIG))
    saved = config.get("compile_config")
    if saved and "optimizer" not in saved and "loss_weights" in saved:
        raise ValueError(
            "it names no optimizer, which Keras leaves out of a .keras file after an .h5 file of "
            "the same model; load the .h5 file"
        )
    return saved


def _number_in_archive(path: str) -> int | None:
    """Return how many variables of an optimizer the archive holds.

    Return None where they are in another form than a single file.
    """
    if Path(path).is_dir():
        weights = Path(path, _WEIGHTS)
        if not weights.exists():
            return None
        with h5py.File(weights) as file:
            return len(file.get("optimizer/vars", ()))
    with zipfile.ZipFile(path) as archive:
        if _WEIGHTS not in archive.namelist():
            return None
        with archive.open(_WEIGHTS) as member, h5py.File(member) as file:
            return len(file.get("optimizer/vars", ()))


def _check_number(optimizer: keras.optimizers.Optimizer, saved: int | None) -> None:
    """Raise ValueError where Keras has left the optimizer without its saved state.

    Keras itself warns only.
    """
    number = len(optimizer.variables)
    untrained = [v for v in optimizer.variables if _part(v.path) in ("iteration", "rate")]
    if saved not in (None, number, len(untrained)):
        raise ValueError(_differs(optimizer, f"{saved} variables, while this one has {number}"))


def _training_in_hdf5(path: str) -> _Training:
    """Read how the model in an .h5 file was trained.

    Raise ValueError for mere weights, and for an optimizer of an older Keras.
    """
    with h5py.File(path) as file:
        # Read how the model was compiled, if it was.
        if "model_config" not in file.attrs:
            raise ValueError(
                "it holds weights and no model; make the model and call model.load_weights with it"
            )
        encoded = file.attrs.get("training_config")
        if encoded is None:
            return _Training(None, [])
        config = json_utils.decode(encoded)
        version = file.attrs.get("keras_version", "1")
        version = version.decode() if isinstance(version, bytes) else version
        if int(version.split(".")[0]) < 3 and config.get("optimizer_config"):
            raise ValueError(
                f"Keras {version} wrote its optimizer's state in another form; load it with "
                "keras.models.load_model(path, compile=False) and compile it anew, or save it from "
                "Keras 3 as .keras"
            )

        # Read the optimizer's variables.
        if "optimizer_weights" not in file:
            return _Training(config, [])
        group = file["optimizer_weights"]
        names = legacy_h5_format.load_attributes_from_hdf5_group(group, "weight_names")
        values = legacy_h5_format.load_optimizer_weights_from_hdf5_group(file)
        pairs = zip(names, values, strict=True)
        return _Training(config, [_Saved(name, np.asarray(value)) for name, value in pairs])


def _restore(
    optimizer: keras.optimizers.Optimizer,
    trained: list[keras.Variable],
    saved: list[_Saved],
) -> None:
    """Give the optimizer its saved state, which before the first step has no slots yet.

    Raise ValueError where a variable has another shape, or another part by the end of its name.
    """
    # As many variables.
    if len(saved) != len(optimizer.variables):
        optimizer.build(trained)
    number = len(optimizer.variables)
    if len(saved) != number:
        raise ValueError(
            _differs(optimizer, f"{len(saved)} variables, while this one has {number}")
        )

    # The same ones, in the same order. Nothing is assigned before all are checked.
    for v, (name, value) in zip(optimizer.variables, saved, strict=True):
        if tuple(v.shape) != value.shape or _part(v.path) != _part(name):
            difference = f"{name} of shape {value.shape}, while this one has {v.path} of {v.shape}"
            raise ValueError(_differs(optimizer, difference))
    for v, (_, value) in zip(optimizer.variables, saved, strict=True):
        v.assign(value)


def _part(path: str) -> str:
    """Return the end of a variable's name: "momentum" of "sgd/dense_kernel_momentum".

    The rest may change by loading, as does the number of "variable_3".
    """
    return re.sub(r"_\d+$", "", path).rsplit("/", 1)[-1].rsplit("_", 1)[-1]


def _differs(optimizer: keras.optimizers.Optimizer, difference: str) -> str:
    return (
        f"its optimizer's state doesn't fit {type(optimizer).__name__}: the file holds "
        f"{difference}; load it with the class or function, and under the dtype policy, that the "
        "model was trained with"
    )


@contextlib.contextmanager
def _error_in_a_sentence(path: str) -> Iterator[None]:
    """Raise a ValueError with the path for whatever Keras raises about a file.

    Keras's own messages go over pages.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} can't be loaded: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Return the sentence that matters of an error of Keras's."""
    text = str(error).split("Exception encountered: ")[-1].strip()
    unknown = re.match(r"(?:Could not locate|Unknown) (\w+):? '([^']+)'", text)
    if unknown:
        return _unknown(unknown[1], unknown[2])
    if text.startswith("Requested the deserialization of") and "lambda" in text:
        return (
            "it holds a Python lambda, which may do anything and is not run; name the function, "
            "register it with keras.saving.register_keras_serializable and save the model again"
        )
    if text.startswith("Layer count mismatch"):
        return "an .h5 file doesn't say how a model of this class is built; save it as .keras"
    return textwrap.shorten(text.split("\n")[0], 400) or type(error).__name__
