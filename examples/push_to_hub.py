# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Uploads the folder of a model to the Hugging Face Hub: weights, image processor, card and code, and the policy of a
model of transformers that shares tokens.

    hf auth login
    python examples/push_to_hub.py --folder outputs/scenes --repo_id me/scenes --dry_run   # lists the files
    python examples/push_to_hub.py --folder outputs/scenes --repo_id me/scenes
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from cts_hf.hub.publishing import upload_folder


@dataclass
class UploadArguments:
    """What to upload, and where to."""

    folder: str = field(metadata={"help": "Folder of a model, as training, conversion and `save_cts` write it."})
    repo_id: str | None = field(
        default=None, metadata={"help": "owner/name, created if it is not there; the folder's name by default."}
    )
    private: bool = field(default=False, metadata={"help": "Create a private repository."})
    dry_run: bool = field(default=False, metadata={"help": "Only list what would be uploaded."})


def main() -> None:
    (args,) = HfArgumentParser(UploadArguments).parse_args_into_dataclasses()
    print(upload_folder(args.folder, args.repo_id, private=args.private or None, dry_run=args.dry_run))


if __name__ == "__main__":
    main()
