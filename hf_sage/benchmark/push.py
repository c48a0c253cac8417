"""``hf-sage push``: the model of a finished run, with its card, to a repository on the Hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from rich.console import Console

from hf_sage.benchmark.cards import add_card_options, card_of
from hf_sage.publishing import UPLOAD_ERRORS, explain
from hf_sage.publishing.checks import is_repo_id
from hf_sage.publishing.privacy import public_configuration, secrets_in


def main(argv: Sequence[str]) -> int:
    """Uploads a run, or shows what would be uploaded; the body of ``hf-sage push``.

    Returns:
        0.

    Raises:
        ValueError: If the run cannot be published as it is; the message says why and what to do.
        OSError: If the Hub did not take it; nothing local has changed, and the same command goes on.
    """
    parser = argparse.ArgumentParser(
        prog="hf-sage push", description="Upload the model of a finished run, with its card, to the Hub."
    )
    parser.add_argument("run", type=Path, help="directory of a finished run, with result.json and model/")
    parser.add_argument("--repo-id", required=True, metavar="NAMESPACE/NAME", help="where to; made if it is not there")
    parser.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch; made if it is not there [main]")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the files, upload nothing")
    add_card_options(parser)
    options = parser.parse_args(list(argv))
    if not is_repo_id(options.repo_id):
        raise ValueError(f"{options.repo_id!r} is no id of a repository: give it as namespace/name.")
    name = options.name or options.repo_id.split("/")[-1]
    additions = files_of(options.run, card_of(options.run, name=name, license=options.license))
    console = Console(soft_wrap=True, highlight=False)
    if options.dry_run:
        console.print(f"Would upload to {options.repo_id}:", markup=False)
        for addition in additions:
            console.print(f"{addition.upload_info.size:>12,}  {addition.path_in_repo}", markup=False)
        return 0
    url = upload(additions, options.repo_id, private=options.private, revision=options.revision)
    console.print(f"{options.run} is at {url}", markup=False)
    return 0


def files_of(run: Path, card: str) -> list[CommitOperationAdd]:
    """What is uploaded of a run: its ``model/`` as it is, but for local paths in configurations, and the card.

    Raises:
        ValueError: If the run saved no model, or a file holds an access token.
    """
    model = run / "model"
    if not (run / "done").exists():
        raise ValueError(f"{run} is not finished (it has no file `done`): `hf-sage benchmark resume` goes on with it.")
    files = [f for f in sorted(model.rglob("*")) if f.is_file() and not _is_left_out(f.relative_to(model))]
    if not (model / "config.json").is_file():
        raise ValueError(f"{run} has no saved model (model/config.json): do the run again with its model saved.")
    if leaks := [f"{file.name} ({', '.join(found)})" for file in files if (found := secrets_in(file))]:
        raise ValueError(
            f"Access tokens in {model}: {'; '.join(leaks)}. Nothing was uploaded. Remove those files "
            "(training_args.bin is not needed to load a model), and revoke a token that others may have seen."
        )
    additions = [CommitOperationAdd("README.md", card.encode())]
    for file in files:
        name = file.relative_to(model).as_posix()
        if name != "README.md":
            public = public_configuration(file) if name.endswith("config.json") else None
            additions.append(CommitOperationAdd(name, file if public is None else public.encode()))
    return additions


def upload(additions: Sequence[CommitOperationAdd], repo_id: str, *, private: bool, revision: str | None) -> str:
    """Makes the repository and the branch if they are not there, and commits all files at once: all or nothing.

    Files that are there already, unchanged, are not sent again; if none is left to send, nothing is committed.

    Returns:
        The URL of the commit.

    Raises:
        OSError: If the Hub did not take it; the message says what to do.
    """
    hub = HfApi(library_name="hf_sage")
    try:
        repo_id = hub.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = hub.create_commit(
            repo_id, list(additions), commit_message="Upload model and card with hf-sage push", revision=revision
        )
    except UPLOAD_ERRORS as error:
        raise OSError(f"{error}\n{explain(error, repo_id)} Nothing local has changed.") from error
    return commit.commit_url


def _is_left_out(file: Path) -> bool:
    """What `Trainer.push_to_hub` leaves out too, and hidden files."""
    return any(part.startswith((".", "_", "checkpoint-")) for part in file.parts)
