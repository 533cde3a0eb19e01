"""Formulas become MathML while the site is built: browsers draw it themselves, offline and without a script."""

import re
from html import unescape

from latex2mathml.converter import convert

# What pymdownx.arithmatex (generic) leaves: <span class="arithmatex">\(...\)</span>, <div ...>\[...\]</div>.
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\[\[(](?P<tex>.*?)\\[\])]\s*</(?P=tag)>', re.DOTALL
)
# Spacing that the converter leaves out: a thin space beside "log" and its kind, a relation's around "~".
SPACING = [
    (
        re.compile(r"<(m[io])>([a-z]{3,})</\1>"),
        r'<mo form="prefix" lspace="0.17em" rspace="0.17em">\2</mo>',
    ),
    (
        re.compile(r"<m[io]>(?:~|&#x0007E;|&#x0223C;|∼)</m[io]>"),
        '<mo lspace="0.28em" rspace="0.28em">∼</mo>',
    ),
    (re.compile(r"<mo>(&#x02205;|∅)</mo>"), r"<mi>\1</mi>"),
]


def on_page_content(html: str, **_: object) -> str:
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    tex = unescape(match["tex"]).strip()
    if "&" in tex:
        raise ValueError(f"alignment is not converted; write two formulas instead of {tex!r}")
    math = convert(tex, display=display)
    for pattern, spaced in SPACING:
        math = pattern.sub(spaced, math)
    return f'<{match["tag"]} class="formula">{math}</{match["tag"]}>'
