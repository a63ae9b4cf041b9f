"""The pages behind a feedback link: plain HTML forms that need no script. What people have written is shown as text alone."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from typing import Final

from starlette.responses import Response

from fedloop_clients.feedback import MAX_TEXT_CHARS

_STYLE: Final = """
:root { color-scheme: light dark; --line: #c9ccd1; --mark: #b45309; --back: #f6f7f8; --card: #fff; --text: #1b1f24;
  --go: #1d4ed8; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444a52; --mark: #f59e0b; --back: #14171a; --card: #1e2226; --text: #e8eaed; --go: #3b6ef0; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem; background: var(--back); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 34rem; margin: 1rem auto; padding: 1.5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .75rem; }
h1 { margin: 0 0 1rem; font-size: 1.35rem; }
fieldset { margin: 0 0 1.25rem; padding: 0; border: 0; }
legend, .above { display: block; padding: 0; margin-bottom: .4rem; font-weight: 600; }
.row { display: flex; flex-wrap: wrap; gap: .5rem; }
.row label { position: relative; padding: .45rem .9rem; border: 1px solid var(--line); border-radius: .5rem; cursor: pointer; }
.row input { position: absolute; opacity: 0; inset: 0; width: 100%; height: 100%; margin: 0; cursor: pointer; }
.row label:has(input:checked) { border-color: var(--go); box-shadow: inset 0 0 0 1px var(--go); }
.row label:has(input:focus-visible) { outline: 3px solid var(--go); outline-offset: 2px; }
.stars label { padding: 0 .15rem; border: 0; font-size: 2rem; line-height: 1.2; color: var(--line); }
.stars label:has(input:checked) { box-shadow: none; }
.stars label:has(input:checked), .stars label:has(~ label input:checked) { color: var(--mark); }
textarea { display: block; width: 100%; min-height: 6rem; margin-bottom: 1.25rem; padding: .6rem; font: inherit; color: inherit;
  background: var(--back); border: 1px solid var(--line); border-radius: .5rem; resize: vertical; }
textarea.short { min-height: 3.5rem; }
button { padding: .6rem 1.4rem; font: inherit; font-weight: 600; color: #fff; background: var(--go); border: 0;
  border-radius: .5rem; cursor: pointer; }
.wrong { padding: .6rem .8rem; border-left: 4px solid var(--mark); background: var(--back); }
.small { margin: 1rem 0 0; font-size: .875rem; opacity: .8; }
"""
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_STARS: Final = {1: "very bad", 2: "bad", 3: "fair", 4: "good", 5: "very good"}


def form(given: Mapping[str, str] = {}, wrong: str = "") -> Response:
    """The form, filled in with what was `given`, and what is `wrong` with that."""

    def checked(name: str, value: str) -> str:
        return " checked" if given.get(name) == value else ""

    thumbs = "".join(
        f'<label><input type="radio" name="thumb" value="{value}"{checked("thumb", value)}>{text}</label>'
        for value, text in (("up", "Yes"), ("down", "No"))
    )
    stars = "".join(
        f'<label title="{text}"><input type="radio" name="rating" value="{number}" aria-label="{number} of 5, {text}"'
        f"{checked('rating', str(number))}>\N{BLACK STAR}</label>"
        for number, text in _STARS.items()
    )
    told = f'<p class="wrong" role="alert">{escape(wrong)}</p>' if wrong else ""
    return _page(
        "How was this answer?",
        f"""{told}<form method="post" accept-charset="utf-8">
<fieldset><legend>Was it helpful?</legend><div class="row">{thumbs}</div></fieldset>
<fieldset><legend>How good was it?</legend><div class="row stars">{stars}</div></fieldset>
<label class="above" for="correction">What should it have said?</label>
<textarea id="correction" name="correction" maxlength="{MAX_TEXT_CHARS}">{escape(given.get("correction", ""))}</textarea>
<label class="above" for="comment">Anything else?</label>
<textarea class="short" id="comment" name="comment" maxlength="{MAX_TEXT_CHARS}">{escape(given.get("comment", ""))}</textarea>
<button type="submit">Send</button>
</form>
<p class="small">What you write leaves this device only once names, numbers and addresses found in it are masked.</p>""",
        400 if wrong else 200,
    )


def thanks(note: str) -> Response:
    """What was given is kept; `note` says what of it is not."""
    told = f'<p class="wrong">{escape(note[:1].upper() + note[1:])}.</p>' if note else ""
    return _page("Thank you", f"<p>Your feedback is kept.</p>{told}")


def refused(title: str, why: str, status: int) -> Response:
    """A link that cannot be used, or not now."""
    return _page(title, f"<p>{escape(why)}</p>", status)


def _page(title: str, body: str, status: int = 200) -> Response:
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex">'
        f"<style>{_STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>\n{body}</main></body></html>\n"
    )
    return Response(text, status, _HEADERS, "text/html")
