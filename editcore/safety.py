"""Keep pages from running or loading anything: clean what comes from data, and check the whole."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import bleach
from bleach.css_sanitizer import CSSSanitizer

TAGS = frozenset((
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "col", "colgroup", "dd", "del",
    "details", "div", "dl", "dt", "em", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6",
    "hr", "i", "img", "ins", "kbd", "li", "mark", "ol", "p", "pre", "q", "s", "samp", "small",
    "span", "strong", "sub", "summary", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr",
    "u", "ul", "var"))
ATTRIBUTES = frozenset((
    "align", "alt", "border", "class", "colspan", "height", "id", "rowspan", "scope", "title",
    "width"))
CSS = ("background-color", "color", "font-weight", "font-style", "height", "max-width",
       "text-align", "width")
INSIDE = re.compile(r"data:(image/png|text/csv|application/gzip);base64,[\w+/=\s]*", re.A)
LINK = re.compile(r"(https:|mailto:|#|[\w.-]+(/|\.html|#|$))", re.A)
LOADING = ("src", "srcset", "data", "poster", "background", "action", "formaction", "srcdoc")


def cleaned(text):
    """Return HTML in which whatever could run or load something is written out as text."""
    text = re.sub(r"<style\b[^>]*>[^<]*</style>", "", text, flags=re.I)   # of pandas' tables
    return bleach.clean(text, tags=TAGS, attributes=_allowed, protocols={"https", "mailto", "data"},
                        css_sanitizer=CSSSanitizer(allowed_css_properties=CSS))


def policy(script):
    """Return the content security policy of a page with this script: nothing else runs or loads."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
            "img-src data:; base-uri 'none'; form-action 'none'")


def faults(page, script):
    """Return what a page would run, besides `script`, or load from elsewhere: [] if nothing."""
    parser = _Reader(script)
    parser.feed(page)
    parser.close()
    return parser.faults


def _allowed(tag, name, value):
    """Say whether bleach may leave an attribute."""
    if tag == "img" and name == "src":
        return INSIDE.fullmatch(value) is not None
    if tag == "a" and name == "href":
        return (INSIDE.fullmatch(value) or LINK.match(value)) is not None
    return name in ATTRIBUTES or name == "style" or tag == "a" and name in ("download", "rel")


class _Reader(HTMLParser):
    """Collects what a page would run or load."""

    def __init__(self, script):
        super().__init__(convert_charrefs=True)
        self.script = script
        self.text = ""      # since the last start tag
        self.faults = []

    def handle_starttag(self, tag, attrs):
        """Note handlers of events, addresses that run or load, elements that embed."""
        self.text = ""
        if tag in ("iframe", "object", "embed", "base", "link", "form", "svg", "math"):
            self.faults.append(f"<{tag}>")
        for name, value in attrs:
            address = re.sub(r"[\s\0-\x1f]", "", value or "").lower()
            inside = INSIDE.fullmatch(address) is not None
            leads = name.endswith("href")
            if (name.startswith("on") or name in LOADING and not inside
                    or name == "style" and "url(" in address
                    or leads and re.match("(javascript|vbscript|data):", address) and not inside):
                self.faults.append(f"{name}={value!r:.60}")

    def handle_endtag(self, tag):
        """Note scripts that are not the project's, and styles that load something."""
        if tag == "script" and self.text != self.script:
            self.faults.append(f"a script: {self.text!r:.60}")
        if tag == "style" and re.search(r"@import|url\(", self.text, re.I):
            self.faults.append("a style sheet")

    def handle_data(self, data):
        """Gather the text of an element; it may come in parts."""
        self.text += data
