"""Reading the HTML page of a run."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags and their attributes, and the texts between them; ``rows`` of the tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.rows, self.addresses = [], [], [], []
        self.feed(text)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.lasttag == "style" or not data.strip():
            return
        self.texts.append(data.strip())
        if self.lasttag in ("td", "th"):
            self.rows[-1].append(data.strip())
