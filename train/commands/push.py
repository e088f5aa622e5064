"""`postshare push FOLDER REPO_ID`: an export and its model card, uploaded to the hub.

Nothing leaves the machine before every file has the hash that the manifest says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from sa_models.errors import PostshareError
from sa_models.export.manifest import CARD, MANIFEST, read_manifest
from sa_models.export.peft_adapter import ADAPTER_CONFIG
from sa_models.weights.companion_files import TOKENIZER_FILES, code_files
from sa_models.weights.config_file import GENERATION_CONFIG, read_values
from train.common.console import plain_console
from train.common.files import damage
from train.common.progress import bar
from train.common.run_files import RECIPE_FILE

STALE = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    ADAPTER_CONFIG,
    GENERATION_CONFIG,
    *TOKENIZER_FILES,
)
"""Of an earlier export in the same repository: what this one does not have is deleted there."""


@dataclass(frozen=True)
class Verified:
    """An export whose files are those of its manifest.

    Attributes:
        names: of all files, the manifest included.
    """

    folder: Path
    manifest: dict[str, Any]
    names: tuple[str, ...]


def push(argument: Path, repo_id: str, private: bool, dry_run: bool) -> None:
    """Verify an export, then upload it, or show what would be.

    Args:
        argument: the folder of an export, or a run folder.

    Raises:
        PostshareError: the folder is no whole export, the name is no name of a repository, or the
            hub refuses or cannot be reached.
    """
    console = plain_console()
    _check_name(repo_id)
    folder = _export(argument, console)
    verified = verify(folder)
    if dry_run:
        _show(verified, repo_id, private, console)
        return
    page = _upload(verified, repo_id, private)
    console.print(f"pushed    {page}", soft_wrap=True)


def verify(folder: Path) -> Verified:
    """Compare every file of an export with its manifest.

    Raises:
        PostshareError: no finished export; a file is missing, damaged, or not of the export.
    """
    manifest = read_manifest(folder)
    names = [*manifest["files"], MANIFEST]
    found = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    if strange := sorted(found - set(names)):
        raise PostshareError(
            f"{folder / strange[0]} is not of this export (its {MANIFEST} does not list it); "
            "move it away"
        )
    with bar("verifying") as advance:
        for done, (name, entry) in enumerate(manifest["files"].items(), start=1):
            if (problem := damage(folder / name, entry)) is not None:
                raise PostshareError(f"{folder / name} {problem}; delete {folder} and export again")
            advance(done, len(names))
    needed = {CARD, *_code(folder, manifest)}
    if lacking := sorted(needed - set(names)):
        raise PostshareError(f"{folder} lacks {lacking[0]}; delete it and export again")
    return Verified(folder, manifest, tuple(names))


def _code(folder: Path, manifest: dict[str, Any]) -> set[str]:
    """The modeling files without which a compact export loads nowhere but here."""
    if manifest["format"] != "compact":
        return set()
    return code_files(read_values(folder)["auto_map"])


def _export(argument: Path, console: Console) -> Path:
    """The folder itself; of a run, the export that is its model."""
    folder = argument.expanduser()
    if not folder.is_dir():
        raise PostshareError(f"there is no folder {folder}; give an export, or a run folder")
    if not (folder / RECIPE_FILE).is_file():
        inside = sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))
        if inside and not (folder / MANIFEST).is_file():
            raise PostshareError(f"{folder} is no export; did you mean {inside[0]}?")
        return folder
    from train.evaluation.models import export_of

    export = export_of(folder)
    if export is None:
        raise PostshareError(
            f"{folder} has no export yet; go on with `postshare run {folder / RECIPE_FILE}`"
        )
    others = [path for path in sorted(export.parent.iterdir()) if path != export]
    other = f" (there is also {', '.join(map(str, others))})" if others else ""
    console.print(f"export    {export}{other}", soft_wrap=True)
    return export


def _check_name(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise PostshareError(f"{repo_id!r} is no repository name, OWNER/NAME: {reason}") from None


# --- what would be uploaded -----------------------------------------------------------------------


def _show(verified: Verified, repo_id: str, private: bool, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("file")
    table.add_column("bytes", justify="right")
    sizes = {name: (verified.folder / name).stat().st_size for name in verified.names}
    for name in sorted(sizes):
        table.add_row(name, f"{sizes[name]:,}")
    console.print(table)
    card = (verified.folder / CARD).read_text(encoding="utf-8")
    console.print(Rule(f"{CARD}, the model card"))
    console.print(card, soft_wrap=True)
    kind = "private" if private else "public, where it is new"
    console.print(
        f"{len(sizes)} files, {sum(sizes.values()):,} bytes, verified; without --dry-run they go "
        f"to {repo_id} ({kind})",
        soft_wrap=True,
    )


# --- the hub --------------------------------------------------------------------------------------


def _upload(verified: Verified, repo_id: str, private: bool) -> str:
    """Returns the page of the repository."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise PostshareError("there is no token for the hub; run `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi()
    with _explained(repo_id):
        page = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise PostshareError(
                f"{repo_id} is there already, and public; make it private on its page, or give "
                "another name"
            )
        name = verified.manifest["notes"].get("name", "Shared Llama")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=verified.folder,
            allow_patterns=upload_patterns(verified.names),
            delete_patterns=list(STALE),
            commit_message=f"{name}, {verified.manifest['format']} export",
        )
    return str(page)


def upload_patterns(names: Iterable[str]) -> list[str]:
    """Patterns that match these very names."""
    return [escape(name) for name in names]


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Errors of the hub as one line with a cure."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx  # whichever one this version uses

    try:
        yield
    except OfflineModeIsEnabled:
        raise PostshareError(
            "the hub is switched off here (HF_HUB_OFFLINE); unset it, or see --dry-run"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = " ".join(str(error).split())[:300]
        cure = {
            401: "the token is not valid; run `hf auth login`",
            403: f"the token may not write to {repo_id}; use one with write access to it",
        }.get(status, "try again, or see the hub's status page")
        raise PostshareError(f"the hub refuses ({status}: {reason}); {cure}") from None
    except (httpx.TransportError, ConnectionError) as error:
        raise PostshareError(
            f"the hub cannot be reached ({type(error).__name__}); push from a machine with "
            "network, or see --dry-run"
        ) from None
