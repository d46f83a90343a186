"""A finished folder, sent to the hub once it was found to be what was written."""

from __future__ import annotations

from pathlib import Path

from llmquant import inspection
from llmquant.errors import OutputError, VerificationError


def push(folder: str | Path, repo: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Upload the folder that quantize or export wrote, model card included, as `repo`, owner/name. Returns its address.

    Every file is hashed and every matrix decoded before. The repository is made where there is none; private: only for
    those allowed, by default as the owner's account has it; revision: a branch. The token is that of `hf auth login`,
    or HF_TOKEN.

    Raises VerificationError for a folder that is not what was written, OutputError where the hub refuses.
    """
    from huggingface_hub import HfApi  # takes a while, which who sends nothing need not wait

    if problems := inspection.verify(Path(folder)):
        raise VerificationError(f"{folder}: {problems[0]}: nothing was sent; quantize again")
    hub = HfApi(library_name="llmquant")
    try:
        name = hub.create_repo(repo, private=private, exist_ok=True).repo_id
        hub.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message="Upload a model quantized with llmquant"
        )
    except Exception as error:  # its client has had several libraries below it, each with errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutputError(
            f"{repo}: the hub took no upload: {reason}: a token that may write is what `hf auth login` is for"
        ) from error
    return f"{hub.endpoint}/{name}"
