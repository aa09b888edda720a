"""What the tests' local Hub keeps: users, repos with commits, branches and tags, file contents, collections."""

import base64
import copy
import hashlib
import json
import threading
from pathlib import Path


# What the Hub writes into every new model repo, shortened.
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGEST_REGULAR_FILE = 10 * 2**20
MADE = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer that is not a success: its status, the Hub's code for it and a message."""

    def __init__(self, status: int, message: str, code: str | None = None, **content):
        super().__init__(message)
        self.status, self.message, self.code, self.content = status, message, code, content


def git_oid(content: bytes) -> str:
    """Returns what git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubStore:
    """
    The state of a Hub, in a folder: contents by their sha256 in `objects/`, all else in `hub.json`. An instance on the
    same folder goes on with it.
    """

    def __init__(self, folder: Path):
        self.folder, self.lock = Path(folder), threading.RLock()
        (self.folder / "objects").mkdir(parents=True, exist_ok=True)
        self.users, self.repos, self.collections = {}, {}, {}
        if (self.folder / "hub.json").exists():
            content = json.loads((self.folder / "hub.json").read_text())
            self.repos, self.collections = content["repos"], content["collections"]

    def _save(self) -> None:
        content = {"repos": self.repos, "collections": self.collections}
        (self.folder / "hub.json").write_text(json.dumps(content))

    # Users. A token is what somebody may do: `{"name", "role", "orgs": {name: role}}`.

    def user(self, token: str | None) -> dict | None:
        if token is not None and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def check_write(self, user: dict | None, namespace: str) -> None:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        allowed = {user["name"], *(name for name, role in user["orgs"].items() if role != "read")}
        if user["role"] != "write" or namespace not in allowed:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {namespace!r}")

    # Contents

    def put(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / "objects" / sha256).write_bytes(content)
        return sha256

    def has(self, sha256: str) -> bool:
        return (self.folder / "objects" / sha256).exists()

    def content(self, file: dict) -> bytes:
        return (self.folder / "objects" / file["sha256"]).read_bytes()

    def _file(self, content: bytes) -> dict:
        return {"sha256": self.put(content), "size": len(content), "oid": git_oid(content), "lfs": False}

    # Repos

    def create_repo(self, repo_id: str, user: dict | None, private: bool) -> str:
        self.check_write(user, repo_id.partition("/")[0])
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", url=repo_id)
        self.repos[repo_id] = {"private": private, "branches": {}, "tags": {}, "commits": {}}
        files = {".gitattributes": self._file(GIT_ATTRIBUTES)}
        self._commit(repo_id, "main", None, "initial commit", files)
        return repo_id

    def repo(self, repo_id: str, user: dict | None, write: bool = False) -> dict:
        repo, namespace = self.repos.get(repo_id), repo_id.partition("/")[0]
        allowed = user is not None and namespace in {user["name"], *user["orgs"]}
        if repo is None or (repo["private"] and not allowed):
            # As the Hub does, who may not know whether there is one is told 401.
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        if write:
            self.check_write(user, namespace)
        return repo

    def resolve(self, repo: dict, revision: str) -> str:
        """Returns the commit of a branch, tag or commit."""
        commit = repo["branches"].get(revision) or repo["tags"].get(revision) or revision
        if commit not in repo["commits"]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, repo: dict, revision: str) -> dict[str, dict]:
        return repo["commits"][self.resolve(repo, revision)]["files"]

    def file(self, repo: dict, revision: str, path: str) -> dict:
        files = self.files(repo, revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        return files[path]

    def _commit(self, repo_id: str, branch: str, parent: str | None, title: str, files: dict) -> str:
        repo = self.repos[repo_id]
        content = json.dumps([repo_id, parent, title, files, len(repo["commits"])]).encode()
        commit = hashlib.sha1(content).hexdigest()
        repo["commits"][commit] = {"parent": parent, "title": title, "files": files}
        repo["branches"][branch] = commit
        self._save()
        return commit

    def commit(self, repo_id: str, repo: dict, branch: str, lines: list[dict]) -> str:
        """Applies the lines of a commit (ndjson), all or none."""
        if branch not in repo["branches"]:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, parent = lines[0]["value"], repo["branches"][branch]
        if header.get("parentCommit", parent) != parent:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = copy.deepcopy(repo["commits"][parent]["files"])
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            path = value["path"]
            if kind == "file":
                files[path] = self._file(base64.b64decode(value["content"], validate=True))
            elif kind == "lfsFile":
                if not self.has(value["oid"]):
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                size = (self.folder / "objects" / value["oid"]).stat().st_size
                text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n"
                files[path] = {"sha256": value["oid"], "size": size, "oid": git_oid(text.encode()), "lfs": True}
            elif kind == "deletedFile" and path in files:
                del files[path]
            else:
                raise HubError(400, f"cannot apply {kind} of {path}")
        return self._commit(repo_id, branch, parent, header["summary"], files)

    def upload_mode(self, path: str, size: int, sample: bytes) -> str:
        large = path.endswith(".safetensors") or b"\0" in sample or size > LARGEST_REGULAR_FILE
        return "lfs" if large else "regular"

    def set_ref(self, repo: dict, kind: str, name: str, commit: str | None) -> None:
        """Makes a branch or tag, which must be new, or deletes it, where `commit` is `None`."""
        refs = repo[kind]
        if commit is None and name not in refs:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        if commit is not None and name in refs:
            raise HubError(409, f"Reference already exists: {name}")
        if commit is None:
            del refs[name]
        else:
            refs[name] = commit
        self._save()

    # Collections

    def create_collection(self, title: str, namespace: str, private: bool, user: dict | None) -> dict:
        self.check_write(user, namespace)
        slug = f"{namespace}/{title.lower()}-{hashlib.sha1(title.encode()).hexdigest()[:24]}"
        if slug in self.collections:
            raise HubError(409, "You already have a collection of this title", slug=slug)
        self.collections[slug] = {
            **{"slug": slug, "title": title, "owner": {"name": namespace}, "private": private, "items": []},
            **{"lastUpdated": MADE, "position": 0, "theme": "green", "upvotes": 0, "description": None},
        }
        self._save()
        return self.collections[slug]

    def collection(self, slug: str) -> dict:
        if slug not in self.collections:
            raise HubError(404, "Collection not found")
        return self.collections[slug]

    def add_item(self, slug: str, item: dict, user: dict | None) -> dict:
        collection = self.collection(slug)
        self.check_write(user, slug.partition("/")[0])
        self.repo(item["id"], user)
        if any(known["id"] == item["id"] for known in collection["items"]):
            raise HubError(409, "This item is already in the collection")
        position = len(collection["items"])
        collection["items"].append({**item, "_id": f"{position:024x}", "position": position})
        self._save()
        return collection
