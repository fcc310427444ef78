"""What a page of the report shows, as a browser would find it."""

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
import PIL.Image


@dataclass
class Figure:
    """A figure: its label, its pixels if it has a picture, and what stands below."""

    label: str = ""
    pixels: np.ndarray | None = None
    caption: str = ""
    alt: str = ""


@dataclass
class Card:
    """An `<article>`: its heading, its figures, and the (term, description) pairs of its list."""

    heading: str = ""
    figures: list[Figure] = field(default_factory=list)
    terms: list[list[str]] = field(default_factory=list)


class Page(HTMLParser):
    """The elements of a page, as (tag, attributes), its text, tables and cards.

    A table is a list of rows, a row a list of the cells' texts; `bold` are the texts of the cells of class `best`.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.bold: list[str] = []
        self.cards: list[Card] = []
        self._open: list[tuple[str, str]] = []  # (tag, class) from the outside in
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in ("meta", "img", "br"):
            self._open.append((tag, str(attributes.get("class", ""))))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            if attributes.get("class") == "best":
                self.bold.append("")
        elif tag == "article":
            self.cards.append(Card())
        elif tag == "figure" and self._inside("article"):
            self.cards[-1].figures.append(Figure())
        elif tag == "dt" and self._inside("article"):
            self.cards[-1].terms.append(["", ""])
        elif tag == "img" and self._inside("article") and self._inside("figure"):
            shown = self.cards[-1].figures[-1]
            data = base64.b64decode(str(attributes["src"]).removeprefix("data:image/png;base64,"))
            shown.pixels, shown.alt = np.asarray(PIL.Image.open(io.BytesIO(data))), str(attributes["alt"])

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._inside("td") or self._inside("th"):
            self.tables[-1][-1][-1] += data
            if ("td", "best") in self._open:
                self.bold[-1] += data
        if self._inside("article"):
            card = self.cards[-1]
            if self._inside("h3"):
                card.heading += data
            elif self._inside("figcaption"):
                card.figures[-1].caption += data
            elif ("span", "label") in self._open:
                card.figures[-1].label += data
            elif self._inside("dt"):
                card.terms[-1][0] += data
            elif self._inside("dd"):
                card.terms[-1][1] += data

    def images(self, kind: str) -> list[tuple[str, bytes]]:
        """(alternative text, data) of the images of a media type."""
        prefix = f"data:{kind};base64,"
        found = [(str(a["alt"]), str(a["src"])) for tag, a in self.elements if tag == "img"]
        return [(alt, base64.b64decode(src.removeprefix(prefix))) for alt, src in found if src.startswith(prefix)]

    def _inside(self, tag: str) -> bool:
        return any(each == tag for each, _ in self._open)
