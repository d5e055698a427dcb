from __future__ import annotations

import pytest

from eabf_cli.core.documents.html import read_html


def texts(html: str) -> list[str]:
    return [paragraph.text for paragraph in read_html(html)[0]]


def test_headings_paragraphs_lists_and_tables_are_apart() -> None:
    html = """<body><h1>On <em>Gel</em></h1><p>First
      line &amp; more.<br>Next.</p><ul><li>one<li>two</ul><ol><li>a</li><li>b</li></ol>
      <table><tr><th>x</th><th>y</th></tr><tr><td>1</td><td>2</td></tr></table><pre>  a
    b</pre>end</body>"""
    expected = [
        "On Gel",
        "First line & more.\nNext.",
        "- one",
        "- two",
        "1. a",
        "2. b",
        "x  y",
        "1  2",
        "  a\n    b",
        "end",
    ]
    assert texts(html) == expected
    assert read_html(html)[0][0].is_heading


@pytest.mark.parametrize(
    "hidden",
    [
        "<script>if (a < b) { x('</p>') }</script>",
        "<style>p { color: red }</style>",
        "<nav><ul><li>Home</li></ul></nav>",
        "<noscript>Turn it on</noscript>",
        "<div hidden>secret <b>more</b></div>",
        "<span aria-hidden='true'>x</span>",
        "<p style='color: red; DISPLAY : none'>x</p>",
        "<div style='visibility:hidden'>x <b>y</b></div>",
        "<template><p>later</p></template>",
        "<!-- a comment -->",
        "<form><label>Search<input name=q></label></form>",
    ],
)
def test_what_is_not_shown_is_not_read(hidden: str) -> None:
    assert texts(f"<p>before</p>{hidden}<p>behind</p>") == ["before", "behind"]


def test_a_page_that_is_one_form_is_read() -> None:
    assert texts("<form id=aspnetForm><h1>News</h1><p>before</p><label>Search<input></label></form>") == [
        "News",
        "before",
    ]


def test_elements_may_be_left_open_and_entities_may_be_numbers() -> None:
    assert texts("<head><title>T</title><body><p>caf&eacute; &#8212; &#x3b8;<p>two<div hidden><p>x</div>three") == [
        "caf\u00e9 \u2014 \u03b8",
        "two",
        "three",
    ]


def test_the_title_is_the_head_s() -> None:
    html = "<html><head><title> On\n Gel </title></head><body><svg><title>icon</title></svg>x</body></html>"
    assert read_html(html)[1] == "On Gel"
    assert read_html("<p>x</p>")[1] is None


@pytest.mark.parametrize(
    ("html", "shown"),
    [
        ("<body><p hidden>secret<p>one</p><p>two</p></body>", ["one", "two"]),
        ("<div><p hidden>secret</div><p>one", ["one"]),
        ("<div><span hidden>secret</div>one", ["one"]),
        ("<p>zero <b hidden>secret<p>one", ["zero", "one"]),
        ("<ul><li hidden>secret<li>one<li>two</ul>", ["- one", "- two"]),
        ("<ul><li hidden>secret<ul><li>more</ul><li>one</ul>", ["- one"]),
        ("<dl><dt hidden>secret<dd>one</dl>", ["one"]),
        ("<table><tr hidden><td>secret<td>more<tr><td>one<td>two</table>", ["one  two"]),
        ("<table><tr><td hidden>secret<td>one</table>", ["one"]),
        ("<table hidden><tr><td>secret</table>one", ["one"]),
        ("<h2 hidden>secret</h2><h2>one</h2>", ["one"]),
        ("<select><option>secret<option>more</select><p>one", ["one"]),
        ("<head><title>T</title><script>secret</script><p>one", ["one"]),
        ("<div hidden><p>secret</b></i></span> still</div>one", ["one"]),
        # As browsers do: without an end tag the rest is in it.
        ("<p>zero</p><div hidden>secret<p>more", ["zero"]),
    ],
)
def test_hidden_elements_end_where_html_ends_them(html: str, shown: list[str]) -> None:
    assert texts(html) == shown


def test_a_menu_without_an_end_is_the_page() -> None:
    assert texts("<body><nav><a>menu</a><p>one</body>") == ["menu", "one"]
    assert texts("<body><nav><ul><li>menu</ul></nav><p>one<nav>more</nav>two") == ["one", "two"]
    assert texts("<body><div><nav><ul><li>menu</div><ol><li>one</ol>") == ["- menu", "1. one"]
