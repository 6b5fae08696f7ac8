"""`load_model`: a saved Keras model whose optimizer, state included, is distributed and goes on training."""

import contextlib
import json
import os
import re
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from keras.src.legacy.saving import json_utils, legacy_h5_format

from recipe.keras.backend import Compression
from recipe.keras.distributed import DistributedOptimizer, is_distributed, use_compression

_HDF5 = (".h5", ".hdf5")
_WEIGHTS = "model.weights.h5"  # in an archive
_LARGEST_CONFIG = 2**28  # bytes; a longer one is cut off, which is no JSON
_BY_OUTPUT = (
    "accuracy",
    "acc",
    "crossentropy",
    "ce",
)  # metrics that `compile` chooses by the model's output
_COMPILE = (
    "run_eagerly",
    "steps_per_execution",
    "jit_compile",
)  # which Keras writes into .h5 files and doesn't read


def load_model(
    filepath: Any,
    custom_optimizers: Iterable[Callable] | None = None,
    custom_objects: dict[str, Any] | None = None,
    compression: type = Compression.none,
    legacy_opts: bool = False,
) -> keras.Model:
    """Loads a `.keras` or `.h5` model and makes its optimizer, state included, distributed.

    `filepath` may be an open h5py.File. `custom_optimizers` are classes or functions, which go by their names;
    `custom_objects` maps names to classes or functions. A function for the optimizer's name is called with its saved
    configuration as keywords; what it returns may be distributed already. A model that was saved without an optimizer
    comes back as it is. Lambdas in the file are not run (Keras's safe mode).

    Raises ValueError, in one sentence, for a file that can't be loaded whole: also where only the optimizer's state
    would be lost. So it does for `legacy_opts`, which Keras 3 doesn't have."""
    if legacy_opts:
        raise ValueError(
            "legacy_opts=True: Keras 3 has no legacy optimizers; save the model with one of its own"
        )
    objects = {_name_of(given): given for given in custom_optimizers or ()} | (custom_objects or {})
    path = _checked_path(filepath)
    with _told_in_a_sentence(path), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Skipping variable loading for optimizer"
        )  # here it is an error, or no loss
        if path.endswith(_HDF5):
            return _from_hdf5(path, objects, compression)
        return _from_archive(path, objects, compression)


def _from_archive(path: str, objects: dict, compression: type) -> keras.Model:
    """A model in Keras's own format, a zip file or a folder; one at a remote address is left to Keras as a whole."""
    remote = "://" in path
    saved = None if remote else _compile_config(path)
    chosen = _Chosen(objects)
    config = chosen.renamed(saved.get("optimizer")) if saved else None
    if chosen.names:
        model = keras.models.load_model(path, custom_objects=objects, compile=False)
        with keras.saving.custom_object_scope(objects | chosen.names):
            model.compile_from_config(saved | {"optimizer": config})
        model.load_weights(str(Path(path, _WEIGHTS)) if Path(path).is_dir() else path)
    else:
        model = keras.models.load_model(path, custom_objects=objects)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return model
    _check_outermost(optimizer)
    if not remote:
        _check_number(optimizer, _number_in_archive(path))
    distributed = _distributed(optimizer, compression)
    if distributed is not optimizer:  # a LossScaleOptimizer was put around it
        model.optimizer = model._compile_config.config["optimizer"] = distributed
    return model


def _from_hdf5(path: str, objects: dict, compression: type) -> keras.Model:
    """A model in the older format. Keras's own loader makes optimizers for no variables, so that their state is lost;
    here Keras loads the model only, and the optimizer is made, restored and compiled into it."""
    training, state = _training_in_hdf5(path)
    model = keras.models.load_model(path, custom_objects=objects, compile=False)
    if training is None or not training.get("optimizer_config"):
        return model

    # Keras makes the optimizer, the loss and the metrics of their configurations.
    chosen = _Chosen(_kerass_own(training["optimizer_config"]) | objects)
    config = chosen.renamed(training["optimizer_config"])
    with keras.saving.custom_object_scope(objects | chosen.names):
        optimizer = keras.optimizers.deserialize(config)
        arguments = {
            "loss": _compiled(training.get("loss"), keras.losses, "loss"),
            "loss_weights": training.get("loss_weights"),
            "metrics": _compiled(training.get("metrics"), keras.metrics, "metric"),
            "weighted_metrics": _compiled(
                training.get("weighted_metrics"), keras.metrics, "metric"
            ),
        }
    if isinstance(optimizer, str):  # Keras hands back what it doesn't know
        raise ValueError(_unknown("optimizer", config["class_name"]))

    # The optimizer takes up its state before anything is put around it.
    _check_outermost(optimizer)
    _restore(optimizer, model.trainable_variables, state)
    arguments |= {name: training[name] for name in _COMPILE if name in training}
    model.compile(_distributed(optimizer, compression), auto_scale_loss=False, **arguments)
    return model


class _Chosen:
    """The caller's classes and functions for the optimizers in a configuration.

    `renamed` gives these optimizers names that nothing else has, since Keras would look up its own classes first, and
    takes no functions. `names` maps the new names to what makes the optimizers."""

    def __init__(self, objects: dict[str, Any]) -> None:
        self.objects, self.names = objects, {}

    def renamed(self, config: Any) -> Any:
        """The configuration with new names where the caller has given something for the old one."""
        if not isinstance(config, dict):
            return config
        config = {
            key: value if key == "learning_rate" else self.renamed(value)
            for key, value in config.items()
        }
        key = next((name for name in _names_in(config) if name in self.objects), None)
        if key is None:
            return config
        given = self.objects[key]
        name = f"load_model>{key}"
        self.names[name] = given if hasattr(given, "from_config") else _Factory(key, given)
        return {
            "module": None,
            "class_name": name,
            "registered_name": name,
            "config": config["config"],
        }


class _Factory:
    """Looks like a class to Keras: `from_config` calls the caller's function."""

    def __init__(self, name: str, make: Callable) -> None:
        self.name, self.make = name, make

    def from_config(self, config: dict) -> keras.optimizers.Optimizer:
        """What the function makes of the configuration. Raises ValueError if that is no optimizer."""
        kwargs = {key: _object_of(value) for key, value in config.items()}
        try:
            made = self.make(**kwargs)
        except Exception as error:
            raise ValueError(
                f"the function given for {self.name!r} failed with the saved configuration as its keywords: "
                f"{type(error).__name__}: {_reason(error)}"
            )
        if not isinstance(made, keras.optimizers.Optimizer):
            raise ValueError(
                f"the function given for {self.name!r} returned {made!r}, not a Keras optimizer"
            )
        return made


def _names_in(config: dict) -> list[str]:
    """The names under which a caller may mean this serialized object: Horovod's are the lower-case ones."""
    if not isinstance(config.get("class_name"), str) or not isinstance(config.get("config"), dict):
        return []
    plain = config["class_name"].split(">")[-1]
    return [
        n for n in (config.get("registered_name"), config["class_name"], plain, plain.lower()) if n
    ]


def _kerass_own(config: dict) -> dict[str, type]:
    """The optimizer class of Keras's by this configuration's name: Keras's older loader doesn't know all of them."""
    own = getattr(keras.optimizers, config["class_name"], None)
    return {config["class_name"].lower(): own} if isinstance(own, type) else {}


def _compiled(config: Any, module: Any, kind: str) -> Any:
    """What `compile` takes for losses or metrics, from their configuration in an .h5 file: one, or lists or dicts of
    them. `module` is keras.losses or keras.metrics."""
    if isinstance(config, list | tuple):
        return [_compiled(part, module, kind) for part in config]
    if isinstance(config, dict) and "class_name" not in config:
        return {name: _compiled(part, module, kind) for name, part in config.items()}
    if isinstance(config, dict):
        made = module.deserialize(config)
        if isinstance(made, str):
            raise ValueError(_unknown(kind, config["class_name"]))
        return made
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
    """A serialized learning rate schedule or inner optimizer as an object; anything else as it is."""
    return (
        keras.saving.deserialize_keras_object(value)
        if isinstance(value, dict) and "class_name" in value
        else value
    )


def _name_of(given: Any) -> str:
    name = getattr(given, "__name__", None)
    if not callable(given) or name in (None, "<lambda>"):
        raise ValueError(
            f"custom_optimizers holds {given!r}, which has no name; use custom_objects={{name: …}}"
        )
    return name


def _check_outermost(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises ValueError where a function of the caller's has distributed a part of the optimizer."""
    for inner in [
        getattr(optimizer, "inner_optimizer", None),
        *getattr(optimizer, "optimizers", ()),
    ]:
        if is_distributed(inner):
            raise ValueError(
                f"{type(inner).__name__} is a DistributedOptimizer inside a {type(optimizer).__name__}, but must be "
                "outermost; let the function return the plain optimizer, and load_model makes the whole distributed"
            )


def _distributed(
    optimizer: keras.optimizers.Optimizer, compression: type
) -> keras.optimizers.Optimizer:
    """The optimizer, distributed; a function of the caller's may have done that."""
    if not is_distributed(optimizer):
        return DistributedOptimizer(optimizer, compression=compression)
    if compression is not Compression.none:
        use_compression(optimizer, compression)
    return optimizer


def _checked_path(filepath: Any) -> str:
    """The path as Keras takes it. Raises ValueError for what is absent or no model by its name and first bytes."""
    if isinstance(filepath, h5py.File):
        filepath.flush()
        filepath = filepath.filename
    path = os.fsdecode(filepath)
    if "://" in path:
        return path
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist")
    hdf5 = Path(path).is_file() and h5py.is_hdf5(path)
    if path.endswith(_HDF5) and not hdf5:
        raise ValueError(f"{path} is not an HDF5 file, or is damaged")
    if not path.endswith(_HDF5) and hdf5:
        raise ValueError(f"{path} is an HDF5 file; rename it, so that its name ends with .h5")
    folder = Path(path, "config.json").exists()
    if not hdf5 and not folder and not (path.endswith(".keras") and zipfile.is_zipfile(path)):
        raise ValueError(
            f"{path} is neither a .keras file nor an .h5 file, or is damaged; save the model as .keras"
        )
    return path


def _compile_config(path: str) -> dict | None:
    """What the model in an archive was compiled with; None if it wasn't."""
    if Path(path).is_dir():
        config = json.loads(Path(path, "config.json").read_text())
    else:
        with zipfile.ZipFile(path) as archive, archive.open("config.json") as file:
            config = json.loads(file.read(_LARGEST_CONFIG))
    saved = config.get("compile_config")
    if saved and "optimizer" not in saved and "loss_weights" in saved:
        raise ValueError(
            "it names no optimizer, which Keras leaves out of a .keras file after an .h5 file of the same model; "
            "load the .h5 file"
        )
    return saved


def _number_in_archive(path: str) -> int | None:
    """How many variables of an optimizer the archive holds; None where they are in another form than a single file."""
    with contextlib.ExitStack() as opened:
        if Path(path).is_dir():
            if not (weights := Path(path, _WEIGHTS)).exists():
                return None
        else:
            archive = opened.enter_context(zipfile.ZipFile(path))
            if _WEIGHTS not in archive.namelist():
                return None
            weights = opened.enter_context(archive.open(_WEIGHTS))
        return len(opened.enter_context(h5py.File(weights)).get("optimizer/vars", ()))


def _check_number(optimizer: keras.optimizers.Optimizer, saved: int | None) -> None:
    """Raises ValueError where Keras has left the optimizer without its saved state. It warns only."""
    untrained = [v for v in optimizer.variables if _part(v.path) in ("iteration", "rate")]
    if saved not in (None, len(optimizer.variables), len(untrained)):
        raise ValueError(
            _differs(optimizer, f"{saved} variables, while this one has {len(optimizer.variables)}")
        )


def _training_in_hdf5(path: str) -> tuple[dict | None, list[tuple[str, np.ndarray]]]:
    """(what the model was compiled with, or None; the optimizer's variables by the names they had)."""
    with h5py.File(path) as file:
        if "model_config" not in file.attrs:
            raise ValueError(
                "it holds weights and no model; make the model and call model.load_weights with it"
            )
        training = file.attrs.get("training_config")
        if training is None:
            return None, []
        training = json_utils.decode(training)
        version = file.attrs.get("keras_version", "1")
        version = version.decode() if isinstance(version, bytes) else version
        if int(version.split(".")[0]) < 3 and training.get("optimizer_config"):
            raise ValueError(
                f"Keras {version} wrote its optimizer's state in another form; load it with "
                "keras.models.load_model(path, compile=False) and compile it anew, or save it from Keras 3 as .keras"
            )
        if "optimizer_weights" not in file:
            return training, []
        names = legacy_h5_format.load_attributes_from_hdf5_group(
            file["optimizer_weights"], "weight_names"
        )
        values = [
            np.asarray(v) for v in legacy_h5_format.load_optimizer_weights_from_hdf5_group(file)
        ]
        return training, list(zip(names, values, strict=True))


def _restore(
    optimizer: keras.optimizers.Optimizer, trained: list, state: list[tuple[str, np.ndarray]]
) -> None:
    """Gives the optimizer the saved state, which before the first step has no slots yet.

    Raises ValueError where a variable has another shape, or plays another part by the end of its name."""
    if len(state) != len(optimizer.variables):
        optimizer.build(trained)
    if len(state) != len(optimizer.variables):
        raise ValueError(
            _differs(
                optimizer, f"{len(state)} variables, while this one has {len(optimizer.variables)}"
            )
        )
    for v, (name, value) in zip(optimizer.variables, state, strict=True):
        if tuple(v.shape) != value.shape or _part(v.path) != _part(name):
            raise ValueError(
                _differs(
                    optimizer,
                    f"{name} of shape {value.shape}, while this one has {v.path} of {v.shape}",
                )
            )
    for v, (_, value) in zip(optimizer.variables, state, strict=True):
        v.assign(value)


def _part(path: str) -> str:
    """The end of a variable's name: "momentum" of "sgd/dense_kernel_momentum". The rest may change by loading, as does
    the number of "variable_3"."""
    return re.sub(r"_\d+$", "", path).rsplit("/", 1)[-1].rsplit("_", 1)[-1]


def _differs(optimizer: keras.optimizers.Optimizer, how: str) -> str:
    return (
        f"its optimizer's state doesn't fit {type(optimizer).__name__}: the file holds {how}; load it "
        "with the class or function, and under the dtype policy, that the model was trained with"
    )


@contextlib.contextmanager
def _told_in_a_sentence(path: str) -> Iterator[None]:
    """Makes a ValueError with the path of whatever Keras raises about a file; its own messages go over pages."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} can't be loaded: {_reason(error)}")


def _reason(error: Exception) -> str:
    """The sentence that matters of an error of Keras's."""
    text = str(error).split("Exception encountered: ")[-1].strip()
    if unknown := re.match(r"(?:Could not locate|Unknown) (\w+):? '([^']+)'", text):
        return f"Keras doesn't know the {unknown[1]} {unknown[2]!r}; give it to load_model in custom_objects"
    if text.startswith("Requested the deserialization of") and "lambda" in text:
        return (
            "it holds a Python lambda, which may do anything and is not run; name the function, register it with "
            "keras.saving.register_keras_serializable and save the model again"
        )
    if text.startswith("Layer count mismatch"):
        return "an .h5 file doesn't say how a model of this class is built; save it as .keras"
    return textwrap.shorten(text.split("\n")[0], 400) or type(error).__name__
