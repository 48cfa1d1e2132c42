"""The page: every number is there, names are text, and nothing is fetched."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.text import printable
from spade_faiss.report import charts, html, pictures
from spade_faiss.report.csvfile import rank
from spade_faiss.report.html import write_html
from spade_faiss.report.model import Card, CardGroup, Chart, Headline, ImageRow, Match, NormalPicture, Report, Table
from tests.support.scores import NASTY, leftovers


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, and its text without scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.raw: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        (self.raw if self.elements and self.elements[-1][0] in ("script", "style") else self.texts).append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def make_report(n: int = 10, cards: int = 4, normals: int = 2, labels: bool = True, size: int = 32) -> Report:
    rng = np.random.default_rng(3)
    smooth = np.kron(rng.integers(40, 200, (4, 4, 3)), np.ones((size // 4, size // 4, 1))).astype(np.uint8)
    images = tuple(
        ImageRow(
            id=NASTY[i % len(NASTY)] + str(i),
            scores={name: float(rng.random() * most) for name, most in {"knn": 10, "max": 50, "top": 40}.items()},
            neighbor_id=f"<u>normal {i}",
            neighbor_dist=float(rng.random() * 10),
            kind=("good", "<b>scratch</b>")[i % 2] if labels else None,
            defective=bool(i % 2) if labels else None,
        )
        for i in range(n)
    )
    mask = np.zeros((size, size), bool)
    mask[4:9, 4:9] = True
    shown_cards = tuple(
        Card(
            image=images[i],
            map=rng.random((size, size), dtype=np.float32),
            peak=(i, size - 1),
            picture=None if i == 1 else smooth + np.uint8(i),
            missing="<i>moved</i> away" if i == 1 else "",
            mask=mask if labels and i % 2 else None,
            normals=tuple(
                NormalPicture(
                    id=f"near {i} {j} {NASTY[j % len(NASTY)]}",
                    place=j + 1,
                    distance=1.5 + i + j / 10,
                    picture=None if (i, j) == (2, 1) else smooth + np.uint8(50 + 5 * i + j),
                    matches=(Match(level="layer1", corners=(0, 0, 4, 4)), Match(level="layer2", corners=(8, 8, 16, 16))),
                    missing="disk is gone" if (i, j) == (2, 1) else "",
                )
                for j in range(normals)
            ),
        )
        for i in range(cards)
    )
    metrics = Table(title="Metrics", header=("score", "AUROC"), rows=(("image", 0.98765), ("pixel", None)))
    settings = Table(title="Settings", header=("name", "value"), rows=(("k_image", 5), ("fusion", "mean"), ("sigma", 4.0)))
    return Report(
        title="Bottles <1> & more",
        subtitle="a 'test'",
        notices=("3 files skipped",),
        headlines=(Headline(label="Images", value=12345), Headline(label="Highest", value=float("nan"), note="none")),
        summary=(metrics,) if labels else (),
        charts=(Chart(title="Image score", svg=charts.histogram("image score", np.arange(9.0))),),
        groups=(CardGroup(title="Most anomalous", cards=shown_cards), CardGroup(title="Again", cards=shown_cards[:1])),
        colors=(0.2, 0.9),
        levels=("layer1", "layer2"),
        images=images,
        details=(settings,),
    )


class TestHtml:
    def page(self, tmp_path: Path, report: Report) -> Page:
        write_html(tmp_path / "report.html", report)
        return Page(tmp_path / "report.html")

    def test_nothing_is_fetched(self, tmp_path: Path) -> None:
        page = self.page(tmp_path, make_report())
        assert {tag for tag, _ in page.elements}.isdisjoint(
            {"link", "iframe", "object", "embed", "base", "form", "audio", "video"}
        )
        sources = page.values("src")
        assert len(sources) == 4 - 1 + 4 + 4 * 2 - 1 + 2 + 2  # photos, heat maps, normals; and the card shown twice
        assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
        for name in ("href", "xlink:href"):
            assert all(target.startswith("#") for target in page.values(name))
        code = "\n".join([*page.raw, *page.values("style")])
        assert not re.search(r"@import|https?:|//[a-z]|fetch\(|XMLHttp|import\(", code)
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", code))
        assert not {name for _, attributes in page.elements for name in attributes} & {
            "srcset",
            "poster",
            "background",
            "action",
        }
        assert "default-src 'none'" in " ".join(page.values("content"))

    def test_names_are_text_never_markup(self, tmp_path: Path) -> None:
        report = make_report()
        page = self.page(tmp_path, report)
        assert sum(tag == "script" for tag, _ in page.elements) == 1
        assert all(attributes.get("class") in ("ramp", "ring", "swatch") for tag, attributes in page.elements if tag == "i")
        for image in report.images:
            assert printable(image.id) in page.texts
        assert "<u>normal 3" in page.texts
        assert "<b>scratch</b>" in page.texts
        assert "<i>moved</i> away" in page.texts
        assert "Bottles <1> & more" in page.texts
        assert printable("a\nb\u202e\udce9") == r"a\nb\u202e\udce9"
        assert printable("日本 ä") == "日本 ä"

    def test_every_number_is_there(self, tmp_path: Path) -> None:
        report = make_report()
        page = self.page(tmp_path, report)
        ranks = rank([image.scores["knn"] for image in report.images])
        rows = [text for text in page.texts if text]
        start = rows.index("its distance")
        for place, image in sorted(zip(ranks, report.images, strict=True), key=lambda pair: int(pair[0])):
            expected = [str(place), printable(image.id), str(image.kind), f"{image.scores['knn']:.3f}"]
            expected += [
                f"{image.scores['max']:.2f}",
                f"{image.scores['top']:.2f}",
                image.neighbor_id,
                f"{image.neighbor_dist:.3f}",
            ]
            assert rows[start + 1 : start + 9] == expected
            start += 8
        values = page.values("data-v")
        for image in report.images:  # sorting compares all digits, not the ones that are shown
            assert {*map(repr, image.scores.values()), repr(image.neighbor_dist)} <= set(values)
        for text in ("12,345", "–", "0.988", "5", "mean", "4", "3 files skipped"):
            assert text in page.texts
        for card in report.groups[0].cards:
            for normal in card.normals:
                assert f"{normal.distance:.3f}" in page.texts

    def test_rows_link_to_the_first_card_of_their_image(self, tmp_path: Path) -> None:
        report = make_report()
        page = self.page(tmp_path, report)
        ids = page.values("id")
        assert len(ids) == len(set(ids))
        targets = [target[1:] for target in page.values("href")]
        assert set(targets) <= set(ids)
        assert sorted(target for target in targets if target.startswith("card")) == ["card-1", "card-2", "card-3", "card-4"]
        assert [name for name in ids if name.startswith("card")] == ["card-1", "card-2", "card-3", "card-4", "card-5"]

    def test_pictures_marks_and_placeholders(self, tmp_path: Path) -> None:
        report = make_report()
        page = self.page(tmp_path, report)
        images = [attributes for tag, attributes in page.elements if tag == "img"]
        assert all(image["loading"] == "lazy" and image["alt"] for image in images)
        with Image.open(io.BytesIO(b64decode(images[0]["src"].split(",")[1]))) as photo:
            difference = np.asarray(photo).astype(float) - report.groups[0].cards[0].picture
            assert photo.size == (32, 32)
            assert np.abs(difference).mean() < 8
        assert page.texts.count("disk is gone") == 1
        assert page.texts.count("No picture") == 2
        assert "text" in {tag for tag, _ in page.elements}  # of the chart
        circles = [attributes for tag, attributes in page.elements if tag == "circle"]
        assert circles[0]["cy"] == "0.5"
        assert circles[0]["cx"] == "31.5"
        frames = [attributes for tag, attributes in page.elements if tag == "rect" and attributes.get("class") == "line"]
        colors = {color for frame in frames for color in re.findall(r"#\w{6}", frame["style"])}
        assert colors == {"#{:02x}{:02x}{:02x}".format(*c) for c in pictures.level_colors(["layer1", "layer2"]).values()}
        assert (frames[1]["x"], frames[1]["y"], frames[1]["width"], frames[1]["height"]) == ("7", "7", "10", "10")

    def test_without_labels_there_are_no_metrics(self, tmp_path: Path) -> None:
        page = self.page(tmp_path, make_report(labels=False))
        for word in ("AUROC", "ROC", "kind", "ground truth", "Metrics"):
            assert word not in page.text
        assert not {"normal", "defective"} & {word for value in page.values("class") for word in value.split()}

    def test_a_report_of_nothing_is_a_page(self, tmp_path: Path) -> None:
        page = self.page(tmp_path, Report(title="nothing"))
        assert "nothing" in page.texts
        assert "table" not in {tag for tag, _ in page.elements}

    def test_the_same_report_gives_the_same_bytes(self, tmp_path: Path) -> None:
        write_html(tmp_path / "a.html", make_report())
        write_html(tmp_path / "b.html", make_report())
        assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()

    def test_forty_cards_stay_below_ten_megabytes(self, tmp_path: Path) -> None:
        write_html(tmp_path / "r.html", make_report(n=40, cards=40, normals=5, size=224))  # its maps are noise: the worst case
        assert (tmp_path / "r.html").stat().st_size < 10e6

    def test_a_picture_of_noise_can_be_written(self) -> None:
        # Whatever a picture holds, it is encoded: Pillow's `optimize` failed beyond about a byte a pixel.
        noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        for crisp in (False, True):
            with Image.open(io.BytesIO(b64decode(html._data_uri(noise, crisp=crisp).split(",")[1]))) as image:
                assert image.size == (224, 224)

    def test_a_table_too_long_says_what_it_leaves_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(html, "MAX_ROWS", 4)
        report = make_report()
        page = self.page(tmp_path, report)
        assert "The 4 most anomalous of 10; the rest is in scores.csv." in page.texts
        lowest = min(report.images, key=lambda image: image.scores["knn"])
        assert lowest.neighbor_id not in page.texts

    def test_contradictions_are_refused(self, tmp_path: Path) -> None:
        report = make_report()
        card = report.groups[0].cards[0]
        wrong = replace(card, mask=np.zeros((5, 5), bool))
        for bad, message in (
            (replace(report, colors=None), "needs `colors`"),
            (replace(report, levels=("layer1",)), "level 'layer2'"),
            (replace(report, charts=(Chart(title="x", svg="<img>"),)), "no <svg>"),
            (replace(report, groups=(CardGroup(title="x", cards=(wrong,)),)), "both must have the size"),
        ):
            with pytest.raises(InputError, match=message):
                write_html(tmp_path / "r.html", bad)
        with pytest.raises(InputError, match="1 cells, the header has 2"):
            Table(title="x", header=("a", "b"), rows=((1,),))
        assert leftovers(tmp_path) == []


def test_reports_load_neither_torch_nor_faiss_and_pages_no_hdf5() -> None:
    code = """
import sys
import spade_faiss.report.charts, spade_faiss.report.html, spade_faiss.report.jsonfile
print(sorted({"h5py", "matplotlib.pyplot"} & set(sys.modules)))
import spade_faiss.report.scorefile
print(sorted({"torch", "faiss"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "[]"]
