# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run may do in its output folder, where an earlier run or somebody else has left files."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub.utils import validate_repo_id

from ..hub.output_folder import UNFINISHED, OutputFolder
from ..hub.publishing import CODE_FILES, SHARING_FILES, WEIGHT_FILES
from .arguments import OptimizationArguments
from .checkpoints import CHECKPOINT_FILES, CHECKPOINTS, CheckpointFolder
from .recipe import RECIPE_FILE


BEST = "best"
# What `save_model_folder` writes.
_MODEL_FILES = (
    *WEIGHT_FILES,
    "config.json",
    "preprocessor_config.json",
    RECIPE_FILE,
    "README.md",
    *CODE_FILES,
    *SHARING_FILES,
)
_PATTERNS = (
    *_MODEL_FILES,
    "prediction.png",
    *(f"{BEST}/{name}" for name in _MODEL_FILES),
    *(f"{CHECKPOINTS}/step_*/{name}" for name in CHECKPOINT_FILES),
)
# What a run writes before its model, and again when it is repeated.
_ON_THE_WAY = (f"{BEST}/", f"{CHECKPOINTS}/")


def lock_output(output_dir: str | Path, accelerator: Accelerator) -> AbstractContextManager:
    """The output folder of a run, locked by its main process; see [`OutputFolder`]."""
    return OutputFolder(output_dir, "training") if accelerator.is_main_process else nullcontext()


def refuse_earlier_run(args: OptimizationArguments) -> None:
    """
    Refuses to train into a folder with files that the run would replace. Files that no run wrote are always refused,
    those of an earlier run unless it is resumed or `overwrite_output_dir` is set.

    Raises:
        ValueError: it names the files.
    """
    checkpoints = CheckpointFolder(args.output_dir)
    folder = checkpoints.output
    resumed = checkpoints.find(args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if resumed is not None:
        checkpoints.read_progress(resumed)  # refuses those of earlier versions, by name
    for name in (BEST, CHECKPOINTS):
        path = folder.path / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            # What lies behind a link cannot be distinguished from files of others, and would never be deleted.
            kind = "link" if path.is_symlink() else "file"
            raise ValueError(
                f"{path} must be a folder of its own or not be there, got a {kind}: move it away. To "
                f"write to another disk, let {folder.path} itself be a link."
            )
    folder.refuse_existing(_PATTERNS, overwrite=True)
    if args.overwrite_output_dir or checkpoints.contains(resumed):
        return
    if args.resume_from_checkpoint == "latest":
        # A run that was killed before its first checkpoint starts again.
        if is_finished(folder.path):
            folder.refuse_existing(_MODEL_FILES)
        return
    if not args.resume_from_checkpoint and (found := checkpoints.list()):
        raise ValueError(
            f"{checkpoints.folder} holds checkpoints of an earlier run, up to {found[-1].name}. Go on with "
            "--resume_from_checkpoint latest, choose another --output_dir, or delete them with "
            "--overwrite_output_dir."
        )
    folder.refuse_existing(_PATTERNS)


def is_finished(folder: Path) -> bool:
    """Whether a run has left its model in a folder; the recipe is the last of the files that come there."""
    return (folder / RECIPE_FILE).exists()


def finished_before(args: OptimizationArguments) -> bool:
    """Whether a run that is to be resumed from its latest checkpoint has finished without writing one."""
    is_over = args.resume_from_checkpoint == "latest" and is_finished(Path(args.output_dir))
    return is_over and not args.overwrite_output_dir and not CheckpointFolder(args.output_dir).list()


def check_output(
    args: OptimizationArguments,
    data_dir: str | None,
    sources: Mapping[str, str | None],
    subfolders: Sequence[str] = ("",),
) -> None:
    """
    Refuses an output folder of which it is known before anything is read that the run must not write there.

    Args:
        args: `output_dir` must be set.
        data_dir: folder of the data set, if it has one.
        sources: by the name of its option, what the run starts from: a path, an id on the Hub, or None.
        subfolders: where in the folder the run saves models.

    Raises:
        ValueError: a folder among the data or one that holds a source; or an upload to a name that no repository can
            have.
    """
    check_hub_name(args)
    _refuse_inside_data(args.output_dir, data_dir)
    for subfolder in subfolders:
        _refuse_own_sources(args.output_dir, sources, subfolder)


def check_hub_name(args: OptimizationArguments) -> None:
    """
    Refuses to upload to a repository that cannot exist, before anything is trained.

    Args:
        args: `output_dir` must be set.

    Raises:
        ValueError: neither `hub_model_id` nor the name of `output_dir` can be the name of a repository.
    """
    if not args.push_to_hub:
        return
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(
            f"`hub_model_id`, or else the last part of `output_dir`, must be a name that a repository on the Hub can "
            f"have, got {name!r} ({error}): pass --hub_model_id NAME or --hub_model_id OWNER/NAME."
        ) from error


def _refuse_own_sources(output_dir: str | Path, sources: Mapping[str, str | None], subfolder: str) -> None:
    """Refuses sources that lie where the run writes, as it would replace them."""
    own = (Path(output_dir) / subfolder).resolve()
    for name, source in sources.items():
        if source is None or not Path(source).exists():
            continue
        path = Path(source).resolve()
        places = {path, path.parent} if path.is_file() else {path}
        if places & {own, own / BEST} or own / CHECKPOINTS in path.parents:
            raise ValueError(
                f"`output_dir` must not be where `{name}` lies, got {output_dir} and {source}: the run would replace "
                "what it starts from. Choose another --output_dir."
            )


def _refuse_inside_data(output_dir: str | Path, data_dir: str | None) -> None:
    """Refuses an output folder among the images or labels of a data set: its pictures would be taken for data."""
    folder = Path(output_dir).resolve()
    for name in ("images", "labels"):
        part = (Path(data_dir) / name).resolve() if data_dir is not None else None
        if part in (folder, *folder.parents):
            raise ValueError(
                f"`output_dir` must not be in {part}, where pictures are data, got {output_dir}: choose another "
                "--output_dir."
            )


def delete_earlier_run(args: OptimizationArguments) -> None:
    """
    Deletes files that earlier runs have recorded, and prints how many: all of them to overwrite the folder, else those
    that a killed run has left unfinished, with its checkpoints and best model.
    """
    folder = OutputFolder(args.output_dir, "training")
    names = sorted(folder.written)
    if not args.overwrite_output_dir:
        names = [name for name in names if name.startswith(_ON_THE_WAY) or _is_unfinished(name)]
    if there := sum((folder.path / name).exists() for name in names):
        folder.delete(names)
        print(f"Deleted {there} files of an earlier run in {args.output_dir}.")


def _is_unfinished(name: str) -> bool:
    """Whether a recorded name is that of a folder, directly in the output folder, in which files are being written."""
    return name.startswith(UNFINISHED) and name.find("/") == len(name) - 1
