"""A page in headless Chromium, as wide as a phone: what it measures there; no test without the browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MEASURE = """<script>addEventListener("load", () => {
  const svg = document.querySelector("svg[data-hover]"), box = svg?.getBoundingClientRect();
  svg?.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 40}));
  const wide = document.documentElement.scrollWidth, style = getComputedStyle(document.body);
  document.title = JSON.stringify({wide, inner: innerWidth, back: style.backgroundColor, text: style.color,
    tip: document.querySelector(".tip:not([hidden])")?.textContent ?? ""});
})</script>"""


def browsed(text: str, folder: Path, *options: str) -> dict[str, object]:
    if BROWSER is None:
        pytest.skip("no Chromium here")
    path = folder / "page.html"
    path.write_text(text.replace("</body>", f"{MEASURE}</body>"))
    # A frame as wide as a phone: a window of the browser itself has a least width.
    frame = folder / "frame.html"
    frame.write_text('<iframe src="page.html" style="width: 390px; height: 900px; border: 0"></iframe>'
                     '<script>onload = () => setTimeout(() => { document.title = '
                     'document.querySelector("iframe").contentDocument.title }, 200)</script>')  # fmt: skip
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", *options,
               "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", frame.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stdout[:500]
    found: dict[str, object] = json.loads(title[1].replace("&amp;", "&"))
    return found
