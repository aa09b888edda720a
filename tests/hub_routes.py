"""What the tests' local Hub answers: one function a route, on the state in hub_store.py."""

import base64
import hashlib
import json
import re
from pathlib import Path

from hub_store import MADE, HubError


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES = []
# Some of those that the Hub knows.
LICENSES = ("apache-2.0", "mit", "other")


def route(methods: str, pattern: str):
    """Registers what answers a path: `handler(hub, request, user, query, **groups)` gives JSON, or status, headers, body."""

    def register(handler):
        ROUTES.append((methods.split(), re.compile(pattern), handler))
        return handler

    return register


@route("GET", "/api/whoami-v2")
def whoami(hub, request, user, query):
    if user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user["orgs"].items()]
    token = {"displayName": "test", "role": user["role"]}
    return {"type": "user", "name": user["name"], "orgs": orgs, "auth": {"accessToken": token}}


@route("POST", "/api/repos/create")
def create_repo(hub, request, user, query):
    asked = json.loads(request.body)
    namespace = asked.get("organization") or (user or {}).get("name", "")
    private = asked.get("visibility") == "private" or asked.get("private") is True
    repo_id = hub.store.create_repo(f"{namespace}/{asked['name']}", user, private)
    return {"url": f"{hub.url}/{repo_id}"}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request, user, query):
    content = json.loads(request.body)["content"]
    found = re.search(r"^license: (.*)$", content, re.MULTILINE)
    if found and found[1].strip("'\"") not in LICENSES:
        raise HubError(400, 'Metadata validation error: "license" must be one of [apache-2.0, mit, other, ...]')
    if content.startswith("---\n"):
        return {"errors": [], "warnings": []}
    return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}


@route("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(hub, request, user, query, repo_id, revision):
    files, answers = hub.store.files(hub.store.repo(repo_id, user, write=True), revision), []
    for file in json.loads(request.body)["files"]:
        path, known = file["path"], files.get(file["path"])
        mode = hub.store.upload_mode(path, file["size"], base64.b64decode(file["sample"]))
        oid = known and (known["sha256"] if known["lfs"] else known["oid"])
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": answers}


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(hub, request, user, query, repo_id):
    hub.store.repo(repo_id, user, write=True)
    objects = []
    for item in json.loads(request.body)["objects"]:
        upload = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}", "header": {}}}
        objects.append({**item, **({} if hub.store.has(item["oid"]) else {"actions": upload})})
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(hub, request, user, query, oid):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "the content does not have this sha256")
    hub.store.put(request.body)
    return {}


@route("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
def commit(hub, request, user, query, repo_id, revision):
    repo = hub.store.repo(repo_id, user, write=True)
    lines = [json.loads(line) for line in request.body.splitlines()]
    oid = hub.store.commit(repo_id, repo, revision, lines)
    return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo_id}/commit/{oid}"}


@route("GET", f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")
def repo_info(hub, request, user, query, repo_id, revision):
    repo = hub.store.repo(repo_id, user)
    siblings = []
    for path, file in hub.store.files(repo, revision or "main").items():
        lfs = {"sha256": file["sha256"], "size": file["size"], "pointerSize": 134}
        blob = {"size": file["size"], "blobId": file["oid"], **({"lfs": lfs} if file["lfs"] else {})}
        siblings.append({"rfilename": path, **(blob if "blobs" in query else {})})
    info = {"sha": hub.store.resolve(repo, revision or "main"), "lastModified": MADE, "createdAt": MADE}
    access = {"private": repo["private"], "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
    return {"_id": "0", "id": repo_id, "modelId": repo_id, **info, **access, "siblings": siblings}


@route("GET", f"/api/models/{REPO}/refs")
def refs(hub, request, user, query, repo_id):
    repo = hub.store.repo(repo_id, user)
    prefixes = {"branches": "refs/heads/", "tags": "refs/tags/"}
    return {"converts": []} | {
        kind: [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in repo[kind].items()]
        for kind, prefix in prefixes.items()
    }


@route("POST DELETE", f"/api/models/{REPO}/(?P<kind>tag|branch)/(?P<name>[^/]+)")
def change_ref(hub, request, user, query, repo_id, kind, name):
    repo = hub.store.repo(repo_id, user, write=True)
    refs, oid, asked = {"tag": "tags", "branch": "branches"}[kind], None, json.loads(request.body or b"{}")
    if request.method == "POST":
        # The URL names what a tag points to, or the branch that is made.
        oid = hub.store.resolve(repo, name if kind == "tag" else asked.get("startingPoint", "main"))
        name = asked["tag"] if kind == "tag" else name
    hub.store.set_ref(repo, refs, name, oid)
    return {}


def tree_entry(path: str, file: dict) -> dict:
    lfs = {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}
    return {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]} | (
        {"lfs": lfs} if file["lfs"] else {}
    )


@route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
def tree(hub, request, user, query, repo_id, revision, folder):
    files = hub.store.files(hub.store.repo(repo_id, user), revision)
    prefix = f"{folder}/" if folder else ""
    inside = {path: file for path, file in files.items() if path.startswith(prefix)}
    if folder and not inside:
        raise HubError(404, "Entry not found", "EntryNotFound")
    parents = {str(parent) for path in inside for parent in Path(path).parents} - {".", folder}
    entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(parents)]
    entries += [tree_entry(path, file) for path, file in inside.items()]
    if query.get("recursive", "").lower() != "true":
        entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
    return [entry for entry in entries if entry["path"].startswith(prefix)]


@route("POST", f"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)")
def paths_info(hub, request, user, query, repo_id, revision):
    files = hub.store.files(hub.store.repo(repo_id, user), revision)
    asked = json.loads(request.body)["paths"]
    return [tree_entry(path, files[path]) for path in asked if path in files]


@route("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub, request, user, query, repo_id, revision, path):
    repo = hub.store.repo(repo_id, user)
    file = hub.store.file(repo, revision, path)
    content = hub.store.content(file)
    headers = {"ETag": f'"{file["sha256"] if file["lfs"] else file["oid"]}"', "Accept-Ranges": "bytes"}
    headers |= {"X-Repo-Commit": hub.store.resolve(repo, revision), "Content-Type": "application/octet-stream"}
    if file["lfs"]:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file["size"])}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return 200, headers, content
    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if first > last:
        return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
    return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1]


@route("POST", "/api/collections")
def create_collection(hub, request, user, query):
    if not hub.has_collections:
        raise HubError(404, "Not Found")
    asked = json.loads(request.body)
    return hub.store.create_collection(asked["title"], asked["namespace"], asked["private"], user)


@route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
def get_collection(hub, request, user, query, slug):
    return hub.store.collection(slug)


@route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
def add_item(hub, request, user, query, slug):
    return hub.store.add_item(slug, json.loads(request.body)["item"], user)
