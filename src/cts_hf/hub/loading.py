# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Models and image processors from their folders. What `from_pretrained` only warns of is refused here: weights that are
missing would be random ones, and weights that are not finite make every prediction meaningless.
"""

import json
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.image_utils import PILImageResampling
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, logging

from ..model.configuration_cts import CtsConfig, CtsPolicyConfig
from ..model.image_processing_cts import CtsImageProcessor
from ..model.image_processing_pil_cts import CtsImageProcessorPil
from ..model.modeling_cts import CtsForSemanticSegmentation, CtsModel
from ..model.modeling_cts_policy import CtsPolicyModel
from .normalization import Normalization, check_normalization, processor_normalization
from .output_folder import list_names
from .problems import first_line, loading_problems


logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

PROCESSOR_FILE = "preprocessor_config.json"
_OWN_PROCESSORS = (CtsImageProcessor.__name__, CtsImageProcessorPil.__name__)
# Options of `from_pretrained` that say where a repository is.
_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_POLICY_PREFIX = "cts.policy."
# What transformers and PyTorch raise on a file whose content has another form than they expect.
_MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    EOFError,
    StrictDataclassError,
    SafetensorError,
    pickle.UnpicklingError,
)


def load_segmenter(
    source: str | Path, *, ignore: tuple[str, ...] = (), new: tuple[str, ...] = (), **options: Any
) -> CtsForSemanticSegmentation:
    """
    Opens a segmentation model of this package, complete and with finite weights.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.
        ignore (`tuple[str, ...]`): Prefixes of weights that may be misshaped, and are then random ones.
        new (`tuple[str, ...]`): Prefixes of weights that may be missing, and then start as those of a new model.
        options: As for `from_pretrained`.

    Returns:
        [`CtsForSemanticSegmentation`]: In evaluation mode. Where `config.json` is of a time when it did not record the
            normalization, that of the image processor is in the model's configuration.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or it lacks a configuration or weights.
        ValueError: If it holds something else than a segmentation model, such as a policy, or if weights are missing,
            left over, misshaped, unreadable or not finite; it names them.
    """
    _load_config(CtsConfig, source, options)
    model = load_complete(CtsForSemanticSegmentation, source, ignore, new, **options)
    _complete_normalization(model.config, source, options)
    return model


def load_policy_folder(source: str | Path, **options: Any) -> CtsPolicyModel:
    """
    Opens a policy that [`~CtsPolicyModel.save_pretrained`] wrote, complete and with finite weights.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.
        options: As for `from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: As [`load_segmenter`], for instance for a whole segmentation model.
    """
    _load_config(CtsPolicyConfig, source, options)
    return load_complete(CtsPolicyModel, source, **options)


def load_config(source: str | Path) -> CtsConfig:
    """
    The configuration of a segmentation model of this package, with the normalization as in [`load_segmenter`].

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or it lacks a configuration.
        ValueError: If the configuration is that of something else, such as a policy.
    """
    config = _load_config(CtsConfig, source)
    _complete_normalization(config, source)
    return config


def load_processor(source: str | Path) -> CtsImageProcessor:
    """
    Opens the image processor of a model of this package.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or it lacks an image processor or a configuration.
        ValueError: If its image processor cannot be read, is that of another model, has options that are no numbers,
            or normalizes images with other numbers than the configuration records.
    """
    _require_folder_or_id(source)
    folder = Path(source)
    if folder.is_dir() and not (folder / PROCESSOR_FILE).is_file():
        raise FileNotFoundError(
            f"{source} has no {PROCESSOR_FILE}, which says how images are prepared: save the image processor that the "
            f"model was trained with there, such as `CtsImageProcessor(size={{'shortest_edge': 512}})"
            f".save_pretrained({str(source)!r})`."
        )
    with reading(source, PROCESSOR_FILE):
        options, _ = CtsImageProcessor.get_image_processor_dict(source)
        require_mapping(options)
    kind = options.get("image_processor_type", _OWN_PROCESSORS[0])
    if kind not in _OWN_PROCESSORS:
        raise ValueError(
            f"The image processor in {source} must be a {_OWN_PROCESSORS[0]}, got a {kind}: save the one that the "
            "model was trained with there."
        )
    with reading(source, PROCESSOR_FILE):
        processor = CtsImageProcessor.from_pretrained(source)
        _check_numbers(processor)
    if _records_normalization(read_config(source)):
        with reading(source, "config.json"):
            config = AutoConfig.from_pretrained(source)
        check_normalization(config, processor)
    return processor


def is_own_model(source: str | Path) -> bool:
    """Whether a folder or repository holds a Segmenter of this package, and no model of transformers."""
    return read_config(source).get("model_type") in (CtsConfig.model_type, CtsPolicyConfig.model_type)


def check_model_folder(folder: str | Path) -> None:
    """
    Refuses a folder whose model of this package (Segmenter, encoder or policy) or image processor is incomplete.

    Raises:
        FileNotFoundError, ValueError: As [`load_segmenter`] and [`load_processor`].
    """
    config = read_config(folder)
    if config.get("model_type") == CtsPolicyConfig.model_type:
        load_policy_folder(folder)
    elif config.get("architectures") == [CtsModel.__name__]:
        _load_config(CtsConfig, folder)
        load_complete(CtsModel, folder)
    else:
        load_segmenter(folder)
    load_processor(folder)


def check_finite(model: PreTrainedModel, source: str | Path) -> None:
    """
    Refuses a model whose weights hold NaN or infinity.

    Args:
        model ([`PreTrainedModel`]): Segmenter, encoder or policy.
        source (`str` or `Path`): Where it comes from, for the message.

    Raises:
        ValueError: If there are such weights; it names the first ones, and says so if all are the policy's.
    """
    if found := describe_not_finite(model):
        raise ValueError(
            f"{source} must hold finite weights, got {found}. Its training diverged: take an earlier checkpoint, or "
            "train it again with a lower learning rate."
        )


def describe_not_finite(model: PreTrainedModel) -> str | None:
    """Which weights of a model, buffers included, hold NaN or infinity, in words; `None` if they are all finite."""
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    # Weights that are offloaded to the disk are read from there.
    values = (load_offloaded_parameter(model, name) if value.is_meta else value for name, value in state.items())
    flags = [value.isfinite().all() for value in values]
    # One transfer from the device for all of them, where the model has only one.
    is_finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    names = [name for name, finite in zip(state, is_finite, strict=True) if not finite]
    if not names:
        return None
    is_policy = isinstance(model, CtsPolicyModel) or all(name.startswith(_POLICY_PREFIX) for name in names)
    what = "policy" if is_policy else "model"
    return f"NaN or infinity in weights of the {what}: {list_names(names)}"


def _complete_normalization(config: CtsConfig, source: str | Path, options: Mapping[str, Any] | None = None) -> None:
    """Gives a configuration that is older than the record the normalization that model and policy have seen."""
    options = options or {}
    if _records_normalization({**read_config(source, options), **options}):
        return
    try:
        processor = CtsImageProcessor.from_pretrained(source, **place_options(options))
    except (OSError, *_MALFORMED):
        return  # `load_processor` says what is wrong with it
    normalization = processor_normalization(processor, config.num_channels)
    if normalization != (config.image_mean, config.image_std):
        logger.warning_once(
            f"config.json of {source} does not say what its weights expect images to be normalized with: it is "
            f"{normalization._asdict()}, as its image processor does."
        )
        for part in (config, config.policy_config):
            part.image_mean, part.image_std = map(list, normalization)


def _records_normalization(config: Mapping[str, Any]) -> bool:
    return any(name in config for name in Normalization._fields)


def load_complete(
    kind: type[Model], source: str | Path, ignore: tuple[str, ...] = (), new: tuple[str, ...] = (), **options: Any
) -> Model:
    """Opens a model of a class, complete and with finite weights: arguments and errors as of [`load_segmenter`]."""
    _check_shards(Path(source) / options.get("subfolder", ""))
    try:
        model, info = kind.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"{source} must hold the weights of a model beside its config.json: {first_line(error)} Save the model "
            "there again, weights and config.json together."
        ) from error
    except _MALFORMED as error:
        raise ValueError(
            f"The weights in {source} cannot be read as its config.json says ({first_line(error)}): one of these "
            "files is damaged or incomplete. Copy or download them again."
        ) from error
    if problems := loading_problems(info, ignore, new):
        raise ValueError(
            f"The weights in {source} do not fit the {kind.__name__} that its config.json describes. {problems}. Save "
            "it again, weights and config.json together, or train it again."
        )
    check_finite(model, source)
    return model


def _check_shards(folder: Path) -> None:
    """Refuses an index of weights that has another form, or names files outside of the folder."""
    for path in (folder / SAFE_WEIGHTS_INDEX_NAME, folder / WEIGHTS_INDEX_NAME):
        if not path.is_file():
            continue
        with reading(folder, path.name):
            index = json.loads(path.read_text(encoding="utf-8"))
            require_mapping(index)
            for name in ("weight_map", "metadata"):
                require_mapping(index.get(name), f"its `{name}`")
            for shard in index["weight_map"].values():
                if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
                    raise ValueError(f"it must name files in this folder, got {shard!r}")


def _check_numbers(processor: CtsImageProcessor) -> None:
    """Refuses options that an image processor only fails on when it prepares an image."""
    if processor.do_resize:
        for name, value in dict(processor.size).items():
            if value is not None and not (type(value) is int and value > 0):
                raise ValueError(f"`size` must hold whole numbers of at least 1, got {value!r} as {name}")
        PILImageResampling(processor.resample)
    factor = processor.rescale_factor
    if processor.do_rescale and not (type(factor) in (int, float) and math.isfinite(factor) and factor > 0):
        raise ValueError(f"`rescale_factor` must be a number above 0, got {factor!r}")


def _load_config(
    kind: type[CtsConfig] | type[CtsPolicyConfig], source: str | Path, options: Mapping[str, Any] | None = None
) -> CtsConfig | CtsPolicyConfig:
    """The configuration in a folder or repository; refuses one of another model type."""
    found, expected = read_config(source, options).get("model_type"), kind.model_type
    if found == expected:
        with reading(source, "config.json"):
            return kind.from_pretrained(source, **place_options(options))
    if (found, expected) == (CtsConfig.model_type, CtsPolicyConfig.model_type):
        raise ValueError(
            f"{source} must hold a policy, got a whole segmentation model: give the folder of its policy "
            "(examples/train.py leaves the one it trains in OUTPUT_DIR/policy), or save the model's own with "
            f"`CtsForSemanticSegmentation.from_pretrained({str(source)!r}).cts.policy.save_pretrained(FOLDER)`."
        )
    if (found, expected) == (CtsPolicyConfig.model_type, CtsConfig.model_type):
        raise ValueError(
            f"{source} must hold a segmentation model, got a policy: give the folder of the model that has it; a "
            "policy becomes part of a model with `model.set_policy`, or with examples/train.py --policy."
        )
    raise ValueError(
        f"{source} must hold a {_describe(expected)} of this package (`model_type` {expected!r} in its config.json), "
        f"got `model_type` {found!r}. Checkpoints of Segmenter, mmsegmentation and the original CTS are converted by "
        "examples/convert_checkpoint.py."
    )


def read_config(source: str | Path, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of `config.json` in a folder or repository, where options for `from_pretrained` say."""
    place = place_options(options)
    _require_folder_or_id(source)
    folder = Path(source)
    if folder.is_dir() and not (folder / place.get("subfolder", "") / "config.json").is_file():
        raise FileNotFoundError(
            f"{source} has no config.json: it must be the folder of a model, as training, conversion or "
            "`save_pretrained` write it. Checkpoints of others are converted by examples/convert_checkpoint.py."
        )
    with reading(source, "config.json"):
        config, _ = PreTrainedConfig.get_config_dict(source, **place)
        require_mapping(config)
    return config


def place_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those of the options for `from_pretrained` that say where a repository is and which of its files are meant."""
    return {name: value for name, value in (options or {}).items() if name in _PLACE}


def require_mapping(value: Any, name: str = "it") -> None:
    """Refuses what JSON does not write as a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a JSON mapping, got a {type(value).__name__}")


def _require_folder_or_id(source: str | Path) -> None:
    if not isinstance(source, str | Path):
        raise ValueError(f"A folder or id on the Hub must be a `str` or `Path`, got {type(source)}: name one of them.")
    path = Path(source)
    if not path.is_dir() and (path.exists() or path.is_absolute() or len(path.parts) != 2):
        found = "a file" if path.exists() else "no such folder"
        raise FileNotFoundError(
            f"{source} must be the folder of a model, or the id of a repository ('owner/name') on the Hub, got "
            f"{found}. Check the path; files of weights are converted by examples/convert_checkpoint.py."
        )


@contextmanager
def reading(source: str | Path, name: str) -> Iterator[None]:
    """Names the file and where it lies in the error of whoever reads it."""
    try:
        yield
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{name} in {source} cannot be read ({reason}). Correct it or save it again.") from error
    except OSError as error:
        if Path(source).is_dir():
            raise ValueError(f"{name} in {source} cannot be read ({first_line(error)}). Save it again.") from error
        raise FileNotFoundError(
            f"{source} must be the folder of a model, or the id of a repository ('owner/name') on the Hub with a "
            f"{name}, got neither: {first_line(error)}"
        ) from error


def _describe(model_type: str) -> str:
    return "policy" if model_type == CtsPolicyConfig.model_type else "segmentation model"


def image_size_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width, in pixels, of the images that a configuration of a model of transformers names."""
    size = (getattr(config, "backbone_config", None) or config).image_size
    return (size, size) if isinstance(size, int) else tuple(size)


__all__ = [
    "check_finite",
    "check_model_folder",
    "describe_not_finite",
    "image_size_of",
    "is_own_model",
    "load_complete",
    "load_config",
    "load_policy_folder",
    "load_processor",
    "load_segmenter",
    "place_options",
    "read_config",
    "reading",
    "require_mapping",
]
