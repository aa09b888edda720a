"""
Task folders on the Hub: a model repo a task, pushed as one commit, verified, then tagged.

A commit whose answer was lost exists, so every attempt looks at the branch's head first and sends nothing that is there.
"""

import hashlib
import json
import logging
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from .endpoint import CLIENT_ERRORS, REQUEST_TIMEOUT, client_timeout, fault, http_error, open_api, retry
from .errors import ConfigError, DataError, first_line
from .files import MANIFEST_NAME, file_sha256
from .folders import CONSOLIDATION, read_task_state, task_folder


logger = logging.getLogger(__name__)

# Roles in an organization that may create repos there.
WRITING_ROLES = ("admin", "write", "contributor")
# The Hub writes it into every new repo.
GIT_ATTRIBUTES = ".gitattributes"


def task_repo_id(hub_model_id: str, task: int) -> str:
    """Returns the name of a task's repo."""
    return f"{hub_model_id}-{task_folder('', task).name}"


def full_model_id(hub_model_id: str, token: str | None = None) -> str:
    """
    Returns `hub_model_id` with its namespace, by default the user's, which the token may write to as far as the Hub says.

    Raises:
        ConfigError: for a token or a name that will not do.
        DataError: when the endpoint does not answer.
    """
    api = open_api(token)
    try:
        user = retry(api.whoami, hub_model_id)
    except CLIENT_ERRORS as error:
        raise fault(error, hub_model_id, api.token) from None
    full = hub_model_id if "/" in hub_model_id else f"{user['name']}/{hub_model_id}"
    try:
        validate_repo_id(task_repo_id(full, 0))
    except ValueError:
        raise ConfigError(
            f"hub_model_id is {hub_model_id!r}; allowed: name or namespace/name, of letters, digits, '-', '_' and '.',"
            " 88 characters at most"
        ) from None
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError("hub_token is a read token; allowed: a token with the right to write")
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", ())}
    # Where no role is said, creating the repo will show it.
    namespaces = [user["name"], *(name for name, role in roles.items() if role in (None, *WRITING_ROLES))]
    if full.partition("/")[0] not in namespaces:
        raise ConfigError(
            f"hub_model_id is {hub_model_id!r}; allowed: a namespace that hub_token may write to ({', '.join(namespaces)})"
        )
    return full


def check_hub_access(
    hub_model_id: str,
    token: str | None = None,
    private: bool | None = None,
    task: int = 0,
    license: str | None = None,
    is_new: bool = False,
    timeout: float = REQUEST_TIMEOUT,
) -> str:
    """
    Returns `hub_model_id` with its namespace, after making the repo of the run's first task: what can be known before
    training of whether its pushes will work.

    Args:
        hub_model_id (`str`): the repos' common name; without a namespace, the user's.
        token (`str`, *optional*): by default `HF_TOKEN`, or the one that is saved on this machine.
        private (`bool`, *optional*): by default as the account has it.
        task (`int`): the first task that the run will push.
        license (`str`, *optional*): of the models; with one that the Hub does not know, it refuses every card.
        is_new (`bool`): the run has pushed nothing yet: a warning says so if the repo has a model all the same, which the
            first push replaces (its history keeps it).
        timeout (`float`): seconds without an answer after which a request is given up.

    Raises:
        ConfigError: for a token, a name or a license that will not do.
        DataError: when the endpoint does not answer.
    """
    with client_timeout(timeout):
        full = full_model_id(hub_model_id, token)
        if license is not None:
            _check_license(license, full, open_api(token).token)
        api, repo_id = open_api(token), task_repo_id(full, task)
        _create_repo(api, repo_id, private)
        try:
            if is_new and retry(lambda: api.file_exists(repo_id, f"{CONSOLIDATION}/{MANIFEST_NAME}"), repo_id):
                logger.warning("%s has a model already, which the first push replaces; its history keeps it", repo_id)
        except CLIENT_ERRORS as error:
            raise fault(error, repo_id, api.token) from None
    return full


def _check_license(license: str, hub_model_id: str, token: str) -> None:
    card = ModelCard(f"---\nlicense: {json.dumps(license)}\n---\n", ignore_metadata_errors=True)
    try:
        retry(card.validate, hub_model_id)
    except CLIENT_ERRORS as error:
        if http_error(error) is None or http_error(error).response.status_code == 400:
            raise ConfigError(
                f"license is {license!r}, which {constants.ENDPOINT} refuses: {first_line(error)}"
            ) from None
        raise fault(error, hub_model_id, token) from None


def _create_repo(api: HfApi, repo_id: str, private: bool | None) -> None:
    try:
        retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
    except CLIENT_ERRORS as error:
        raise fault(error, repo_id, api.token) from None


def _is_same(file: Path, sha256: str, remote: RepoFile) -> bool:
    """Whether a file of a repo has the content of a local one: by its sha256 in LFS, else by git's own sum."""
    if remote.lfs is not None:
        return remote.lfs.sha256 == sha256
    content = file.read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _differences(api: HfApi, repo_id: str, commit: str, folder: Path, sums: dict[str, str]) -> tuple[list, list]:
    """Names of files that a commit lacks or has otherwise, and of those that it should not have."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    remote = {file.path: file for file in tree if isinstance(file, RepoFile)}
    changed = [
        name
        for name, sha256 in sums.items()
        if name not in remote or not _is_same(folder / name, sha256, remote[name])
    ]
    return changed, sorted(remote.keys() - sums.keys() - {GIT_ATTRIBUTES})


def _head(api: HfApi, repo_id: str, branch: str) -> str | None:
    """The commit that a branch points to, `None` without one."""
    return next((ref.target_commit for ref in api.list_repo_refs(repo_id).branches if ref.name == branch), None)


def _commit(api: HfApi, repo_id: str, branch: str, folder: Path, sums: dict[str, str], message: str) -> str:
    """The commit with exactly these files: the branch's head, if it has them, else made here and verified."""
    head = _head(api, repo_id, branch)
    if head is None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
        head = _head(api, repo_id, branch)
    changed, surplus = _differences(api, repo_id, head, folder, sums)
    if not changed and not surplus:
        return head
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in sums]
        + [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in surplus],
        commit_message=message,
        revision=branch,
        parent_commit=head,
    ).oid
    changed, surplus = _differences(api, repo_id, commit, folder, sums)
    if changed or surplus:
        raise DataError(f"{repo_id}: {[*changed, *surplus][0]} did not arrive as it is here; the commit is not tagged")
    return commit


def _set_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Lets a tag point to a commit; one that points elsewhere is moved."""
    target = next((ref.target_commit for ref in api.list_repo_refs(repo_id).tags if ref.name == tag), None)
    if target == commit:
        return
    if target is not None:
        api.delete_tag(repo_id, tag=tag)
    api.create_tag(repo_id, tag=tag, revision=commit)


def push_files(
    folder: Path,
    sums: dict[str, str],
    repo_id: str,
    message: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
) -> dict[str, str]:
    """
    Makes files all that a repo has, as one commit, which is verified and then tagged; what is there already is not sent again.

    Args:
        folder (`Path`), sums (`dict[str, str]`): the files' names in it, with their sha256.
        repo_id (`str`), message (`str`): of the commit.
        token, private, revision, tag: as in [`push_task_folder`]; without a tag none is set.

    Returns:
        `dict`: `"repo_id"`, `"commit"` and `"url"`.

    Raises:
        ConfigError, DataError: as [`push_task_folder`].
    """
    branch = revision or constants.DEFAULT_REVISION
    api = open_api(token)
    _create_repo(api, repo_id, private)
    try:
        commit = retry(lambda: _commit(api, repo_id, branch, folder, sums, message), repo_id)
        if tag is not None:
            retry(lambda: _set_tag(api, repo_id, tag, commit), repo_id)
    except CLIENT_ERRORS as error:
        raise fault(error, repo_id, api.token) from None
    return {"repo_id": repo_id, "commit": commit, "url": f"{api.endpoint}/{repo_id}"}


def push_task_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
) -> dict[str, str]:
    """
    Pushes a task folder: the files of its manifest and nothing else, as one commit, which is tagged when the checksums
    that the repo reports are those of the files. What is there already is not sent again.

    Args:
        folder (`Path`), repo_id (`str`): with its namespace; made where it is missing.
        token (`str`, *optional*): by default `HF_TOKEN`, or the one that is saved on this machine.
        private (`bool`, *optional*): for a new repo; by default as the account has it.
        revision (`str`, *optional*): the branch, made where it is missing; by default `main`.
        tag (`str`, *optional*): by default `task-00` for task 0.

    Returns:
        `dict`: `"repo_id"`, `"commit"`, `"tag"`, `"url"`, and the `"manifest_sha256"` of what was pushed.

    Raises:
        CheckpointError: when the folder is not whole; nothing is sent.
        ConfigError: when the token will not do.
        DataError: when the push failed, after some attempts.
    """
    folder = Path(folder)
    tag = tag or task_folder("", read_task_state(folder)["task"]).name
    manifest = f"{CONSOLIDATION}/{MANIFEST_NAME}"
    sums = json.loads((folder / manifest).read_text())["sha256"]
    sums[manifest] = file_sha256(folder / manifest)
    options = {"token": token, "private": private, "revision": revision, "tag": tag}
    pushed = push_files(folder, sums, repo_id, f"Add {tag}", **options)
    return {**pushed, "tag": tag, "manifest_sha256": sums[manifest]}
