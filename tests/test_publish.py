"""Pushing a task folder and a run to the tests' local Hub, with the real client."""

import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hub_helpers import Client, ClientError, write_run, write_task
from hub_server import TOKEN
from pipeline_helpers import saved_files


pytestmark = pytest.mark.usefixtures("fresh_hub")
# What changes something there.
CHANGES = r"^(POST|PUT|DELETE) (?!/api/(repos/create|collections))"
PUSH_RUN = "publish.push_run(folder, name, log=lines.append, **options), lines"


def push_run(client, folder, name: str, **options) -> tuple[list[str], list[str]]:
    """Returns the failures and what was printed."""
    return tuple(client(PUSH_RUN, folder=folder, name=name, options=options, lines=[]))


def history(hub, repo_id: str, branch: str = "main") -> list[str]:
    """Returns the titles of a branch's commits, the first one first."""
    repo, titles = hub.store.repos[repo_id], []
    commit = repo["branches"][branch]
    while commit is not None:
        titles.insert(0, repo["commits"][commit]["title"])
        commit = repo["commits"][commit]["parent"]
    return titles


def test_a_push_is_one_commit_verified_and_then_tagged(hub, client, saved, tmp_path):
    folder = write_task(tmp_path, saved, 3)
    (folder / "stray.txt").write_text("not in the manifest")
    pushed = client.push(folder, "me/one")
    repo = hub.store.repos["me/one"]
    manifest = json.loads((folder / "consolidation" / "manifest.json").read_text())["sha256"]
    expected = {name: (folder / name).read_bytes() for name in [*manifest, "consolidation/manifest.json"]}
    files = hub.head_files("me/one")
    assert files.pop(".gitattributes") and files == expected
    assert {"model_index.json", "pipeline.py", "README.md", "samples.png", "consolidation/ewc.safetensors"} <= set(
        files
    )
    assert history(hub, "me/one") == ["initial commit", "Add task-03"] and not repo["private"]
    assert repo["tags"] == {"task-03": repo["branches"]["main"]} == {pushed["tag"]: pushed["commit"]}
    assert (pushed["repo_id"], pushed["url"]) == ("me/one", f"{hub.url}/me/one")
    # The checksums are asked for between the commit and the tag.
    lines = [request.line.partition("?")[0] for request in hub.requests]
    commit, tag = "POST /api/models/me/one/commit/main", f"POST /api/models/me/one/tag/{pushed['commit']}"
    assert lines.count(commit) == lines.count(tag) == 1
    assert f"GET /api/models/me/one/tree/{pushed['commit']}" in lines[lines.index(commit) : lines.index(tag)]
    (sent,) = hub.sent("/commit/")
    assert json.loads(sent.body.splitlines()[0])["value"]["parentCommit"] == list(repo["commits"])[0]
    # It comes back as it was.
    fetch = "huggingface_hub.snapshot_download('me/one', revision='task-03')"
    assert saved_files(Path(client(fetch))) == hub.head_files("me/one")
    # A second time nothing is sent.
    hub.requests.clear()
    assert client.push(folder, "me/one") == pushed
    assert hub.sent("/refs") and not hub.sent(CHANGES)


def test_a_folder_that_changed_is_one_more_commit_and_the_tag_moves(hub, client, saved, tmp_path):
    first = client.push(write_task(tmp_path, saved, 0), "me/changed")
    hub.requests.clear()
    folder = write_task(tmp_path, saved, 0, card="# Another card\n", extra=False)
    second = client.push(folder, "me/changed")
    files = hub.head_files("me/changed")
    assert files.pop(".gitattributes") and files == saved_files(folder)
    assert history(hub, "me/changed") == ["initial commit", "Add task-00", "Add task-00"]
    assert hub.store.repos["me/changed"]["tags"] == {"task-00": second["commit"]} and second != first
    # Contents that are there are not sent again.
    assert not hub.sent("^PUT")


def test_branch_tag_and_private_repo(hub, client, saved, tmp_path):
    folder = write_task(tmp_path, saved, 0)
    pushed = client.push(folder, "me/hidden", private=True, revision="dev/one", tag="v1")
    repo = hub.store.repos["me/hidden"]
    assert repo["private"] and repo["tags"] == {"v1": pushed["commit"]}
    assert history(hub, "me/hidden") == ["initial commit"] and repo["branches"]["dev/one"] == pushed["commit"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{hub.url}/api/models/me/hidden")
    assert refused.value.code == 401


def test_a_damaged_folder_is_not_sent(hub, client, saved, tmp_path):
    folder = write_task(tmp_path, saved, 0)
    with open(folder / "consolidation" / "ewc.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(ClientError, match="CheckpointError: .*ewc.safetensors is damaged"):
        client.push(folder, "me/damaged")
    assert not hub.requests and "me/damaged" not in hub.store.repos


def check(client, hub_model_id: str, token: str | None = None, **options) -> str:
    code = "task_repos.check_hub_access(name, token, **options)"
    return client(code, name=hub_model_id, token=token, options=options)


def test_access_is_checked_and_the_first_repo_made(hub, client):
    hub.add_token("hf_member", name="her", orgs={"lab": "write", "club": "read"})
    assert check(client, "checked") == "me/checked" and "me/checked-task-00" in hub.store.repos
    assert check(client, "lab/checked", "hf_member", private=True, task=5) == "lab/checked"
    assert hub.store.repos["lab/checked-task-05"]["private"]
    # It may be there already.
    assert check(client, "me/checked") == "me/checked"
    assert client("huggingface_hub.get_session().timeout.read") is None


def test_a_model_that_is_there_already_is_warned_of(hub, saved, tmp_path):
    with Client(hub, tmp_path / "home", stderr=subprocess.PIPE) as client:
        client.push(write_task(tmp_path, saved, 0), "me/taken-task-00")
        check(client, "me/taken")
        check(client, "me/taken", is_new=True)
        check(client, "me/free", is_new=True)
    warnings = client.process.stderr.read().splitlines()
    assert len(warnings) == 1 and "me/taken-task-00 has a model already" in warnings[0]


def test_a_license_that_the_hub_refuses_stops_before_training(hub, client):
    # It would refuse every card, and so every push.
    with pytest.raises(ClientError, match="^ConfigError: license is 'apache', which http.* refuses: .*must be one of"):
        check(client, "me/licensed", license="apache")
    assert "me/licensed-task-00" not in hub.store.repos
    assert check(client, "me/licensed", license="mit") == "me/licensed"


def test_a_token_or_name_that_will_not_do_is_one_sentence(hub, client):
    hub.add_token("hf_reader", role="read")
    hub.add_token("hf_member", name="her", orgs={"lab": "write", "club": "read"})
    before = set(hub.store.repos)
    refusals = [
        ("me/x", "hf_wrongWRONGwrong", "hub_token is not a token that http://127"),
        ("me/x", "hf_reader", "hub_token is a read token"),
        ("me/x", "hf_wrong\nWRONG", "hub_token has characters that no token has"),
        ("you/x", None, "hub_model_id is 'you/x'; allowed: a namespace that hub_token may write to .me."),
        ("club/x", "hf_member", "hub_model_id is 'club/x'; allowed: .* .her, lab."),
        ("me/a b", None, "hub_model_id is 'me/a b'; allowed: name or namespace/name"),
        ("me/a/b", None, "hub_model_id is 'me/a/b'; allowed: name or namespace/name"),
        ("x" * 90, None, "hub_model_id is 'xxx.*88 characters"),
    ]
    for name, token, sentence in refusals:
        with pytest.raises(ClientError, match=f"^ConfigError: {sentence}") as refused:
            check(client, name, token)
        assert "\n" not in refused.value.message and (token or TOKEN) not in refused.value.message
        assert "WRONG" not in refused.value.message
    # What only the attempt shows.
    hub.fail("POST /api/repos/create", status=403)
    with pytest.raises(ClientError, match="^ConfigError: hub_token may not write to me/x-task-00"):
        check(client, "me/x")
    client("os.environ.pop('HF_TOKEN')")
    with pytest.raises(ClientError, match="^ConfigError: hub_token is not set and no token is saved here"):
        check(client, "me/x")
    client("os.environ.update(HF_TOKEN=token)", token=TOKEN)
    assert set(hub.store.repos) == before


def test_an_endpoint_that_does_not_answer_is_given_up(hub, client):
    hub.fail("whoami", times=9, delay=60)
    with pytest.raises(ClientError, match="^EndpointError: me/x: http://127.* cannot be reached .ReadTimeout"):
        check(client, "me/x", timeout=0.1)
    assert len(hub.sent("whoami")) == 5


def test_a_run_is_pushed_recorded_and_grouped(hub, client, saved, tmp_path):
    write_run(tmp_path, saved, 2)
    failures, lines = push_run(client, tmp_path, "run")
    assert failures == [] and len(lines) == 2
    record = json.loads((tmp_path / "push.json").read_text())
    for task in (0, 1):
        entry, repo_id = record["tasks"][f"task-0{task}"], f"me/run-task-0{task}"
        assert lines[task].startswith(f"task-0{task}: {hub.url}/{repo_id} ")
        assert entry["repo_id"] == repo_id and entry["tag"] == f"task-0{task}"
        assert hub.store.repos[repo_id]["tags"] == {entry["tag"]: entry["commit"]}
    (collection,) = hub.store.collections.values()
    assert collection["title"] == "run" and collection["slug"] == record["collection"]["slug"]
    assert [item["id"] for item in collection["items"]] == ["me/run-task-00", "me/run-task-01"]
    # Without a request where nothing is missing, with or without the namespace.
    hub.requests.clear()
    for name in ("run", "me/run"):
        assert push_run(client, tmp_path, name) == ([], [])
    assert not hub.requests
    # One more task, and one that was made anew.
    write_task(tmp_path, saved, 2)
    write_task(tmp_path, saved, 0, card="# Anew\n")
    assert client("publish.missing_tasks(folder, 'me/run')", folder=tmp_path) == [0, 2]
    assert client("publish.missing_tasks(folder, 'me/other')", folder=tmp_path) == [0, 1, 2]
    assert client("publish.missing_tasks(folder, 'run', 'dev')", folder=tmp_path) == [0, 1, 2]
    failures, lines = push_run(client, tmp_path, "me/run")
    assert failures == [] and [line.partition(":")[0] for line in lines] == ["task-00", "task-02"]
    assert not hub.sent("run-task-01") and len(collection["items"]) == 3


def test_what_a_run_went_on_from_is_not_its_own(hub, client, saved, tmp_path):
    write_run(tmp_path, saved, 0)
    write_task(tmp_path, saved, 4)
    write_task(tmp_path, saved, 5)
    (tmp_path / "start.json").write_text(
        json.dumps({"task": 4, "model": "me/elsewhere-task-04", "is_repo": True, "revision": None, "asked": None})
    )
    failures, lines = push_run(client, tmp_path, "me/continued", collection=False)
    assert failures == [] and len(lines) == 1 and not hub.sent("collections")
    assert {name for name in hub.store.repos if "continued" in name} == {"me/continued-task-05"}


def test_an_endpoint_without_collections_is_warned_of_once(hub, client, saved, tmp_path):
    write_run(tmp_path, saved, 1)
    hub.has_collections = False
    failures, lines = push_run(client, tmp_path, "me/alone")
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert failures == [] and len(warnings) == 1 and "grouped" in warnings[0] and "404" in warnings[0]
    write_task(tmp_path, saved, 1)
    failures, lines = push_run(client, tmp_path, "me/alone")
    assert failures == [] and len(lines) == 1 and len(hub.sent("collections")) == 1
    # One that is only busy is asked again.
    hub.has_collections = True
    write_run(tmp_path / "busy", saved, 1)
    hub.fail("collections", times=5, status=503)
    failures, lines = push_run(client, tmp_path / "busy", "me/busy")
    assert failures == [] and lines[1].startswith("warning: ")
    assert push_run(client, tmp_path / "busy", "me/busy") == ([], [])
    record = json.loads((tmp_path / "busy" / "push.json").read_text())
    assert [item["id"] for item in hub.store.collections[record["collection"]["slug"]]["items"]] == ["me/busy-task-00"]


def test_pushing_loads_nothing_heavy(client):
    # It runs beside the training.
    assert client("sorted({'torch', 'diffusers', 'datasets', 'transformers'} & set(sys.modules))") == []


@pytest.mark.parametrize("name", ["push.json", "start.json"])
def test_records_that_cannot_be_read(client, saved, tmp_path, name):
    (tmp_path / name).write_text('{"tasks": ["half"')
    with pytest.raises(ClientError, match=f"CheckpointError: .*{name} cannot be read"):
        push_run(client, tmp_path, "me/unreadable")
