"""Pushing through what goes wrong on the way: nothing twice, nothing tagged that is not whole, nothing local lost."""

import json
import time

import pytest
from hub_helpers import Client, ClientError, write_run, write_task
from hub_server import HubServer
from pipeline_helpers import saved_files


pytestmark = pytest.mark.usefixtures("fresh_hub")


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("run"), saved, 0)


def check_pushed_once(hub, folder, repo_id: str) -> None:
    """The repo has what the folder has, in one commit, tagged."""
    repo = hub.store.repos[repo_id]
    files = hub.head_files(repo_id)
    assert files.pop(".gitattributes") and files == saved_files(folder)
    assert [commit["title"] for commit in repo["commits"].values()] == ["initial commit", "Add task-00"]
    assert repo["tags"] == {"task-00": repo["branches"]["main"]}


# What fails, how, and how often what is then sent in all.
FAULTS = {
    "busy-create": ("POST /api/repos/create", {"status": 503}, 2),
    "lost-create": ("POST /api/repos/create", {"drop": "answer"}, 2),
    "busy-card": ("POST /api/validate-yaml", {"status": 503, "body": b"<html>busy</html>"}, 2),
    "dropped-preupload": ("POST .*/preupload/", {"drop": "body"}, 2),
    "dropped-commit": ("POST .*/commit/", {"drop": "body"}, 2),
    "gateway-commit": ("POST .*/commit/", {"status": 504, "body": b"<html>late</html>"}, 2),
    "late-commit": ("POST .*/commit/", {"status": 412}, 2),
    # It is there: once is enough.
    "lost-commit": ("POST .*/commit/", {"drop": "answer"}, 1),
    "busy-tree": ("GET .*/tree/", {"status": 500}, 3),
    "busy-refs": ("GET .*/refs", {"status": 429}, 3),
    "lost-tag": ("POST .*/tag/", {"drop": "answer"}, 1),
    "refused-tag": ("POST .*/tag/", {"status": 409}, 2),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_got_over(hub, client, folder, name):
    pattern, how, times = FAULTS[name]
    hub.fail(pattern, **how)
    client.push(folder, f"me/{name}")
    assert hub.failures[0].times == 0 and len(hub.sent(pattern)) == times
    check_pushed_once(hub, folder, f"me/{name}")


def test_an_upload_that_is_cut_off_is_sent_again(hub, client, saved, tmp_path):
    # Contents that the Hub has are not uploaded: these are new.
    folder = write_task(tmp_path, saved, 0)
    hub.store.folder.joinpath("objects").rename(tmp_path / "other")
    (hub.store.folder / "objects").mkdir()
    hub.fail("PUT /lfs/", drop="body")
    client.push(folder, "me/cut-off")
    puts = [request.path for request in hub.sent("PUT /lfs/")]
    assert len(puts) == len(set(puts)) + 1
    check_pushed_once(hub, folder, "me/cut-off")


def test_the_server_says_when_to_come_again(hub, client, folder):
    for header, seconds in (({"Retry-After": "1"}, 1), ({"RateLimit": '"api";r=0;t=0'}, 1)):
        hub.fail("POST .*/commit/", status=429, headers=header)
        start = time.monotonic()
        name = f"me/{list(header)[0]}"
        client.push(folder, name)
        # Without the header it is 0.05.
        assert time.monotonic() - start >= seconds
        check_pushed_once(hub, folder, name)
    # For ever is too long.
    hub.fail("POST .*/commit/", status=429, headers={"Retry-After": "86400"})
    with pytest.raises(ClientError, match="^EndpointError: me/never: http://.* answers 429"):
        client.push(folder, "me/never")


def test_somebody_else_commits_in_between(hub, client, folder, monkeypatch):
    commit = hub.store.commit

    def overtaken(repo_id, repo, branch, lines):
        monkeypatch.undo()
        commit(repo_id, repo, branch, [{"key": "header", "value": {"summary": "another"}}])
        return commit(repo_id, repo, branch, lines)

    monkeypatch.setattr(hub.store, "commit", overtaken)
    pushed = client.push(folder, "me/overtaken")
    titles = [entry["title"] for entry in hub.store.repos["me/overtaken"]["commits"].values()]
    assert titles == ["initial commit", "another", "Add task-00"] and len(hub.sent("/commit/")) == 2
    assert hub.store.repos["me/overtaken"]["branches"]["main"] == pushed["commit"]


@pytest.mark.parametrize("path", ["README.md", "consolidation/ewc.safetensors"])
def test_what_arrives_damaged_is_not_tagged(hub, client, folder, monkeypatch, path):
    commit, other = hub.store.commit, hub.store.put(b"other")

    def damaging(repo_id, repo, branch, lines):
        oid = commit(repo_id, repo, branch, lines)
        repo["commits"][oid]["files"][path] |= {"sha256": other, "oid": "0" * 40}
        return oid

    monkeypatch.setattr(hub.store, "commit", damaging)
    name = f"me/damaged-{path.count('/')}"
    with pytest.raises(ClientError, match=f"^DataError: {name}: {path} did not arrive as it is here"):
        client.push(folder, name)
    assert hub.store.repos[name]["tags"] == {} and len(hub.sent("/commit/")) == 1
    # The next push mends it.
    monkeypatch.undo()
    pushed = client.push(folder, name)
    assert hub.store.repos[name]["tags"] == {"task-00": pushed["commit"]}
    assert hub.head_files(name)[path] == (folder / path).read_bytes()


def test_a_push_that_fails_for_good_is_recorded_and_made_later(hub, client, saved, tmp_path):
    write_run(tmp_path, saved, 3)
    (tmp_path / "task-00" / "README.md").write_text("tampered")
    before = saved_files(tmp_path)
    push = "publish.push_run(folder, 'me/later', log=lines.append), lines"
    hub.fail("task-01/commit/", times=5, status=503)
    failures, lines = client(push, folder=tmp_path, lines=[])
    # A damaged folder is its own misfortune; an endpoint that is down is everybody's.
    assert len(failures) == len(lines) == 3 and all(": not pushed: " in line for line in lines)
    assert "README.md is damaged" in failures[0]
    assert all("answers 503 (made to fail)" in failure for failure in failures[1:])
    assert len(hub.sent("/commit/")) == 5 and not hub.sent("task-0[02]|collections")
    record = json.loads((tmp_path / "push.json").read_text())["tasks"]
    assert [f"{name}: {entry['error']}" for name, entry in record.items()] == failures
    after = saved_files(tmp_path)
    assert before == {name: after[name] for name in before}
    # Later.
    write_task(tmp_path, saved, 0)
    failures, lines = client(push, folder=tmp_path, lines=[])
    assert failures == [] and [line.partition(":")[0] for line in lines] == ["task-00", "task-01", "task-02"]
    assert {"me/later-task-00", "me/later-task-01", "me/later-task-02"} <= set(hub.store.repos)


def test_a_token_that_is_refused_stops_the_run_and_is_recorded(hub, client, saved, tmp_path):
    write_run(tmp_path, saved, 2)
    hub.fail("POST .*/commit/", status=403)
    with pytest.raises(ClientError, match="^ConfigError: hub_token may not write to me/refused-task-00"):
        client("publish.push_run(folder, 'me/refused', log=lines.append)", folder=tmp_path, lines=[])
    record = json.loads((tmp_path / "push.json").read_text())["tasks"]
    assert len(record) == 2 and all("hub_token may not" in entry["error"] for entry in record.values())


def test_a_task_that_is_finished_during_a_push_is_pushed_too(hub, client, saved, tmp_path):
    write_run(tmp_path, saved, 1)
    write_task(tmp_path / "waiting", saved, 1)
    # The line of the first task lets the second one appear.
    code = "publish.push_run(folder, 'me/during', log=lambda line, new=new, to=to: os.path.exists(new) and os.rename(new, to))"
    folders = {"folder": tmp_path, "new": tmp_path / "waiting" / "task-01", "to": tmp_path / "task-01"}
    assert client(code, **folders) == []
    assert {"me/during-task-00", "me/during-task-01"} <= set(hub.store.repos)


def test_nobody_at_the_endpoint(saved, tmp_path):
    with HubServer() as gone:
        pass
    run = write_run(tmp_path / "run", saved, 2)
    with Client(gone, tmp_path) as client:
        failures, lines = client("publish.push_run(folder, 'digits', log=lines.append), lines", folder=run, lines=[])
        with pytest.raises(ClientError, match="^EndpointError: digits: http://.* cannot be reached .ConnectError"):
            client("task_repos.check_hub_access('digits')")
        client("setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)")
        with pytest.raises(ClientError, match="^ConfigError: me/x: HF_HUB_OFFLINE is set"):
            client.push(run / "task-00", "me/x")
    sentence = f"digits: {gone.url} cannot be reached (ConnectError: "
    assert len(failures) == 2 and all(
        failure.startswith(f"task-0{k}: {sentence}") for k, failure in enumerate(failures)
    )
