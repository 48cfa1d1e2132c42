"""The pages that are looked at: what they say, that they are safe, and that they need no script."""

from __future__ import annotations

import html
import io
import re

import numpy as np
import pytest
from PIL import Image

from spade_faiss.core.text import printable
from spade_faiss.serve.history.records import Filter, LaterVerdict, ScoredPicture
from spade_faiss.serve.web.page.looking import waiting_of
from tests.serve.page.conftest import HOSTILE
from tests.serve.page.html import get, is_local, read
from tests.support.serving import BANK, Server


def hostile(server: Server) -> ScoredPicture:
    """The picture with the hostile name."""
    return next(item for item in server.history.find(Filter()).items if item.name == HOSTILE)


def pages(server: Server) -> list[str]:
    """All pages, among them those that show the hostile name."""
    name = hostile(server).id
    bank = f"/banks/{BANK}"
    return [
        *("/", bank, f"{bank}/review", f"{bank}/review?picture={name}", f"/pictures/{name}", f"{bank}/search"),
        *(f"{bank}/search?text=%3Cimg", f"{bank}/live", f"{bank}/live?wide=1", f"{bank}/rail?picture={name}"),
    ]


def test_pages_are_well_formed_local_and_without_inline_code(server: Server) -> None:
    """Elements nest, no name becomes an element or an attribute, nothing is loaded from elsewhere, and CSP can be strict."""
    client = server.client()
    assert len(server.history.find(Filter(alarm=True)).items) >= 3
    for url in pages(server):
        response = client.get(url)
        assert response.status_code == 200, url
        page = read(response.text)
        assert all(is_local(link) for link in page.links()), url
        for tag, attributes in page.elements:
            assert "style" not in attributes, (url, tag)
            assert not [name for name in attributes if name.startswith("on")], (url, tag, attributes)
            assert tag != "style", url
            assert tag != "script" or (attributes.get("src") or "").startswith("/static/"), url
            assert attributes.get("src") != "x", url
        assert "\u202e" not in response.text, url
        policy = response.headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy or "default-src 'self'" in policy
        assert "script-src 'self'" in policy
        assert response.headers["cache-control"] == "no-store", url


def test_a_hostile_name_is_shown_as_it_is(server: Server) -> None:
    client, picture = server.client(), hostile(server)
    page = get(client, f"/pictures/{picture.id}")
    assert printable(HOSTILE) in page.words
    assert page.title.startswith(printable(HOSTILE))
    assert html.escape(printable(HOSTILE), quote=False) in client.get(f"/banks/{BANK}/search").text.replace("&#34;", '"')


def test_overviews_say_how_the_bank_is_doing(server: Server) -> None:
    client = server.client()
    overview = server.service.overview(BANK)
    for url in ("/", f"/banks/{BANK}"):
        page = get(client, url)
        assert f"{overview.alarms} of {overview.scored} pictures in 24 hours" in page.words
        assert "promised rate of false alarms" in page.words
        assert "generation" in page.words
        assert "24 normals" in page.words
        thumbnails = {link for link in page.links() if link.endswith("/thumbnail")}
        assert len(thumbnails) == 11
    assert "Promised and achieved" in page.words
    assert "0 of" in page.words


def test_a_live_part_is_sent_only_when_it_changed(server: Server) -> None:
    client = server.client()
    for more in ("", "&wide=1", "&recent=3"):
        page = get(client, f"/banks/{BANK}/live?seen=x{more}")
        (again,) = [link for link in page.links() if "/live?" in link]
        assert client.get(again).status_code == 204
    rail = get(client, f"/banks/{BANK}/rail?picture={server.queue()[0].id}")
    (again,) = [link for link in rail.links() if "/rail?" in link]
    assert client.get(again).status_code == 204


def test_the_queue_is_in_the_order_of_p_values(server: Server) -> None:
    client, queue = server.client(), server.queue()
    page = get(client, f"/banks/{BANK}/review")
    shown = [attributes["id"] for _, attributes in page.elements if str(attributes.get("id", "")).startswith("queue-")]
    assert shown == [f"queue-{item.id}" for item in queue]
    assert [item.p_value for item in queue] == sorted(item.p_value or 0 for item in queue)
    assert f"/banks/{BANK}/review?picture={queue[1].id}" in page.links()
    second = get(client, f"/banks/{BANK}/review?picture={queue[1].id}")
    keys = {attributes.get("data-key"): attributes.get("href") for _, attributes in second.elements}
    assert keys["k ArrowLeft"] == f"/banks/{BANK}/review?picture={queue[0].id}"
    assert keys["j ArrowRight"] == f"/banks/{BANK}/review?picture={queue[2].id}"


def test_what_is_no_alarm_any_more_waits_nowhere(own_server: Server) -> None:
    client, first = own_server.client(), own_server.queue()[0]
    own_server.history.score_again([(first.id, LaterVerdict(generation=2, p_value=0.5, alarm=False))])
    assert own_server.history.overview(BANK).waiting == waiting_of(own_server.service, BANK) == 2
    page = get(client, f"/banks/{BANK}/review")
    shown = [attributes["id"] for _, attributes in page.elements if str(attributes.get("id", "")).startswith("queue-")]
    assert len(shown) == 2
    assert f"queue-{first.id}" not in shown


def test_a_picture_is_shown_with_its_evidence(server: Server) -> None:
    client, picture = server.client(), server.queue()[0]
    page = get(client, f"/pictures/{picture.id}")
    assert "alarm" in page.words
    assert "p-value 0.0" in page.words
    for level in ("blocks.1", "blocks.2", "blocks.4"):
        assert level in page.words
    for number, normal in enumerate(picture.nearest):
        assert f"/pictures/{picture.id}/normals/{number}" in page.links()
        assert normal.id in page.words
    (stage,) = [attributes for _, attributes in page.elements if "data-values" in attributes]
    assert '"n": 24' in str(stage["data-curve"])
    slider = next(attributes for _, attributes in page.elements if attributes.get("id") == "threshold")
    assert float(str(slider["value"])) == pytest.approx(picture.threshold)
    assert float(str(slider["min"])) < float(str(slider["value"])) < float(str(slider["max"]))
    assert page.words.count("Regions") == 1
    # Without a script, the overlay lies over the picture.
    assert f"/v1/pictures/{picture.id}/overlay" in page.links()


def test_pictures_of_the_page_are_pictures(server: Server) -> None:
    client, picture = server.client(), server.queue()[0]
    for kind, media in (("thumbnail", "image/jpeg"), ("view", "image/png"), ("normals/0", "image/png")):
        response = client.get(f"/pictures/{picture.id}/{kind}")
        assert response.headers["content-type"] == media
        assert response.headers["cache-control"].startswith("private")
        with Image.open(io.BytesIO(response.content)) as image:
            assert image.size == (64, 64)
    assert client.get(f"/pictures/{picture.id}/normals/{len(picture.nearest)}").status_code == 404
    assert client.get(f"/pictures/{picture.id}/normals/-1").status_code in (404, 422)


def test_the_values_are_those_of_the_map(server: Server) -> None:
    picture = server.queue()[0]
    response = server.client().get(f"/pictures/{picture.id}/values")
    values = np.load(io.BytesIO(response.content))
    assert values.dtype == np.float16
    np.testing.assert_array_equal(values.astype(np.float32), server.history.files.read_map(picture.id))
    assert float(values.max()) == pytest.approx(picture.scores["max"], rel=1e-3)


def test_search_finds_by_name_verdict_and_date(server: Server) -> None:
    client = server.client()

    def found(query: str) -> list[str]:
        page = get(client, f"/banks/{BANK}/search?{query}")
        return [str(link) for link in page.links() if re.fullmatch(r"/pictures/[0-9a-f]{32}", link)]

    assert len(found("")) == 11
    assert len(found("text=SPOT")) == 4
    assert found("text=%22%3E%3Cimg") == [f"/pictures/{hostile(server).id}"]
    assert len(found("verdict=alarm")) == len(server.queue())
    assert found("answer=any") == []
    assert len(found("answer=none")) == 11
    assert found("until=2020-01-31") == []
    assert len(found("since=2020-01-31")) == 11
    least = found("order=p_value")
    assert least[0].removeprefix("/pictures/") in {item.id for item in server.queue()}
    page = get(client, f"/banks/{BANK}/search?verdict=alarm&text=spot")
    (csv,) = [link for link in page.links() if "pictures.csv" in link]
    assert "alarm=true" in csv
    assert "text=spot" in csv
    assert "No picture is like that" in get(client, f"/banks/{BANK}/search?text=nothing").words


def test_problems_are_pages_in_words(server: Server) -> None:
    client = server.client()
    assert "there is no bank 'other'" in get(client, "/banks/other", 404).words
    assert "there is no picture" in get(client, f"/pictures/{'0' * 32}", 404).words
    assert "is no date" in get(client, f"/banks/{BANK}/search?since=yesterday", 422).words
    shown = get(client, "/banks/%3Cscript%3Ealert(1)%3C%2Fscript%3E", 404)
    assert [attributes.get("src") for tag, attributes in shown.elements if tag == "script"] == [
        link for link in shown.links() if link.endswith(".js") or ".js?" in link
    ]


def test_light_and_dark_are_remembered_and_nothing_else_is(server: Server) -> None:
    client = server.client()
    for cookie, theme in (("dark", "dark"), ("light", "light"), ('"><script>', None), ("", None)):
        response = client.get("/", headers={"cookie": f"theme={cookie}"})
        (root,) = [attributes for tag, attributes in read(response.text).elements if tag == "html"]
        assert root.get("data-theme") == theme


def test_static_files_are_there_with_their_licenses(server: Server) -> None:
    client = server.client()
    page = get(client, "/")
    for link in page.links():
        if link.startswith("/static/"):
            assert client.get(link).status_code == 200, link
    assert "Zero-Clause BSD" in client.get("/static/htmx.LICENSE").text
    assert client.get("/static/../routes.py").status_code == 404
    assert client.get("/static/%2e%2e/routes.py").status_code == 404
