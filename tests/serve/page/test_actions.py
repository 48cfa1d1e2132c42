"""What people do on the page, without a script: answer, undo, upload, sign in; and what other sites cannot have them do."""

from __future__ import annotations

from pathlib import Path

import pytest

from spade_faiss.serve.history.records import Filter
from tests.serve.page.html import get, press, read
from tests.support.serving import BANK, Server, serving, wait_for

REVIEW = f"/banks/{BANK}/review"
TOKEN = "0123456789abcdef-the-token"


def test_an_empty_start_says_what_to_do(fitted_bank: Path, tmp_path: Path) -> None:
    with serving(fitted_bank, tmp_path) as server:
        client = server.client()
        for url in ("/", f"/banks/{BANK}", f"/banks/{BANK}/search"):
            words = get(client, url).words
            assert "No pictures yet" in words, url
            assert "Upload some" in words, url
        assert "spade-faiss watch" in get(client, "/").words
        assert "Nothing to review" in get(client, REVIEW).words


def test_answers_and_undo_work_without_a_script(own_server: Server) -> None:
    client = own_server.client()
    first, second, third = own_server.queue()
    page = press(client, get(client, REVIEW), "Defect", note="a <b>scratch</b>")
    given = own_server.history.get(first.id).answer
    assert given is not None
    assert (given.kind, given.note, given.state) == ("defect", "a <b>scratch</b>", "kept")
    assert f"Answered “defect”: {first.name}. It is kept as a label." in page.words
    assert second.name in page.words  # the next one follows
    page = press(client, page, "Undo")
    assert f"Taken back: “defect” of {first.name}." in page.words
    assert own_server.history.get(first.id).answer is None
    # The last of the queue is followed by what was left out before.
    page = press(client, get(client, f"{REVIEW}?picture={third.id}"), "Defect")
    assert [item.id for item in own_server.queue()] == [first.id, second.id]
    assert f"/pictures/{first.id}/answer" in page.links()
    shown = press(client, get(client, f"/pictures/{second.id}"), "Defect", note="again")
    assert "Answered “defect”" in shown.words
    assert "again" in shown.words
    press(client, shown, "Undo this answer")
    assert own_server.history.get(second.id).answer is None


def test_a_normal_comes_into_the_bank_and_the_page_says_what_changed(own_server: Server) -> None:
    client, first = own_server.client(), own_server.queue()[0]
    page = press(client, get(client, REVIEW), "Normal")
    given = own_server.history.get(first.id).answer
    assert given is not None
    assert own_server.settled(given.id) == "in the bank"
    wait_for(lambda: own_server.service.change_of(given.id))
    assert "/answers/" in " ".join(page.links())
    said = get(client, f"/answers/{given.id}/state")
    assert "It is in the bank, generation 2: this alarm is gone" in said.words
    assert not [link for link in said.links() if "state" in link]  # it asks no more
    assert "this alarm is gone" in get(client, f"/pictures/{first.id}").words
    assert "generation 1 → 2" in get(client, f"/banks/{BANK}").words
    assert "25 normals" in get(client, "/").words
    press(client, get(client, f"/pictures/{first.id}"), "Undo this answer")
    wait_for(lambda: own_server.history.get_answer(given.id).state != "pending")
    assert "not in the bank any more" in get(client, f"/answers/{given.id}/state").words


def test_forms_of_others_are_refused(own_server: Server) -> None:
    client, first = own_server.client(), own_server.queue()[0]
    form = get(client, REVIEW).form("Normal")
    for fields in ({"kind": "normal"}, {"kind": "normal", "csrf": "0" * 64}):
        response = client.post(form.action, data=fields)
        assert response.status_code == 403
        assert "not from a page of this session" in read(response.text).words
    whole = {**form.fields, "kind": "normal"}
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert client.post(form.action, data=whole, headers=headers).status_code == 403
    files = {"files": ("a.png", b"x", "image/png")}
    assert client.post(f"/banks/{BANK}/upload", files=files).status_code == 403
    assert own_server.history.get(first.id).answer is None
    assert client.post("/logout").status_code == 403
    wrong = client.post(form.action, data={**form.fields, "kind": "perhaps"})
    assert wrong.status_code == 422
    assert "must be normal or defect" in read(wrong.text).words
    assert client.post(form.action, data=whole).status_code == 200


def test_pictures_are_uploaded_without_a_script(own_server: Server, dataset_folder: Path) -> None:
    client = own_server.client()
    form = get(client, f"/banks/{BANK}").form("Score")
    spot = (dataset_folder / "test" / "spot" / "000.png").read_bytes()
    good = (dataset_folder / "test" / "good" / "000.png").read_bytes()
    one = client.post(form.action, files=[("files", ("=1+1.png", spot, "image/png"))])
    assert one.status_code == 200
    assert "/pictures/" in str(one.url)
    assert read(one.text).title.startswith("=1+1.png")
    sent = [("files", (f"{i}.png", data, "image/png")) for i, data in enumerate((spot, good, b"no picture"))]
    several = client.post(form.action, files=sent)
    words = read(several.text).words
    assert "2 pictures were scored: 1 alarm." in words
    assert "Refused" in words
    assert "2.png" in words
    nothing = client.post(form.action, files=[("files", ("", b"", "application/octet-stream"))])
    assert "no file" in read(nothing.text).words
    # A spreadsheet takes no name for a formula.
    csv = client.get(f"/v1/banks/{BANK}/pictures.csv").text
    assert "'=1+1.png" in csv


def test_the_token_opens_a_session_and_signing_out_ends_it(fitted_bank: Path, tmp_path: Path) -> None:
    with serving(fitted_bank, tmp_path, token=TOKEN) as server:
        client = server.client()
        page = get(client, f"/banks/{BANK}")
        assert page.title.startswith("Sign in")
        assert BANK not in page.words  # nobody outside learns what is served
        wrong = client.post("/login", data={**page.form("Sign in").fields, "token": TOKEN + "x"})
        assert wrong.status_code == 401
        assert "not the token" in read(wrong.text).words
        fields = {**page.form("Sign in").fields, "token": TOKEN}
        away = client.post("/login", data={**fields, "next": "//evil.example"}, follow_redirects=False)
        assert away.headers["location"] == "/"
        client.cookies.clear()
        page = get(client, f"/banks/{BANK}")
        fields = {**page.form("Sign in").fields, "token": TOKEN}
        entered = client.post("/login", data=fields, follow_redirects=False)
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert entered.headers["location"] == f"/banks/{BANK}"
        inside = get(client, f"/banks/{BANK}")
        assert inside.title.startswith(BANK)
        out = press(client, inside, "Sign out")
        assert out.title.startswith("Sign in")
        assert get(client, "/").title.startswith("Sign in")


@pytest.mark.parametrize("kind", ["normal", "defect"])
def test_an_answer_that_was_given_is_not_given_twice(own_server: Server, kind: str) -> None:
    """A form that is sent twice, by an impatient hand or a reload, gives one answer."""
    client, first = own_server.client(), own_server.queue()[0]
    form = get(client, REVIEW).form("Normal")
    for _ in range(2):
        assert client.post(form.action, data={**form.fields, "kind": kind}).status_code == 200
    given = own_server.history.get(first.id).answer
    assert given is not None
    if kind == "normal":
        own_server.settled(given.id)
    assert len(own_server.history.find(Filter(answered=True)).items) == 1
