"""Looks at the site in a headless browser, and takes the pictures that documents show.

    python docs/site/look.py                          # each page of build/site, as on a phone and on a desktop
    python docs/site/look.py --report compare-photos  # docs/assets/report*.png, from a comparison
    python docs/site/look.py --pictures               # docs/assets/site*.png, from build/site

`make site` builds the pages. It needs playwright (extra "test") and Chromium: that of the system, or what `playwright
install chromium` brings. Exit status 1 if a page reports an error or is wider than its screen.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright


ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "docs" / "assets"
PHONE, DESKTOP = (390, 844), (1280, 900)
COLOURS = 128  # of a picture, which keeps it small
# what stands out of the screen to the right, and is in nothing that scrolls or cuts
OUTSIDE = """() => {
  const width = document.documentElement.clientWidth;
  const scrolls = (node) => node && node !== document.body &&
    (getComputedStyle(node).overflowX !== "visible" || getComputedStyle(node).position === "fixed" ||
     scrolls(node.parentElement));
  const found = [...document.body.querySelectorAll("*")].filter((node) => {
    const box = node.getBoundingClientRect();
    return box.width && box.height && box.right > width + 1 && !scrolls(node);
  });
  if (document.documentElement.scrollWidth > width + 1) found.push(document.documentElement);
  return found.slice(0, 3).map((node) => `${node.tagName.toLowerCase()}.${node.className}`);
}"""


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    own = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=own)
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def screen(opened: Browser, size: tuple[int, int], scheme: str = "light") -> Iterator[tuple[Page, list[str]]]:
    """A page on a screen, and the errors that it reports, which grow."""
    context = opened.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    context.set_default_timeout(300_000)  # ms; coverage.html is large
    page, faults = context.new_page(), []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(f"{request.url}: {request.failure}"))
    try:
        yield page, faults
    finally:
        context.close()


def check(site: Path) -> int:
    """Open each page on both screens; return the number of faults."""
    count = 0
    with browser() as opened:
        for size in (PHONE, DESKTOP):
            with screen(opened, size) as (page, faults):
                for file in sorted(site.rglob("*.html")):
                    if file.name == "404.html":  # is for servers, which know where the site begins
                        continue
                    faults.clear()
                    page.goto(file.as_uri())
                    told = [*faults, *(f"{name} is wider than the screen" for name in page.evaluate(OUTSIDE))]
                    count += len(told)
                    for text in told:
                        print(f"{file.relative_to(site)} at {size[0]} px: {text}")
    return count


def taken(page: Page, name: str) -> None:
    """Write a picture of what the screen shows, with few colours."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLOURS)
    image.save(ASSETS / name, optimize=True)
    print(f"{ASSETS / name}: {(ASSETS / name).stat().st_size // 1024} kB")


def picture_report(runs: list[str]) -> None:
    """The page of a comparison: on a desktop, and its images on a phone in the dark."""
    from hf_visual_peft.report.page import page as page_of  # not for the site, which opens without torch
    from hf_visual_peft.report.reading import read_results

    file = ROOT / "build" / "report.html"
    file.parent.mkdir(exist_ok=True)
    file.write_text(page_of(read_results(runs), f"hf-visual-peft report {' '.join(runs)}"), encoding="utf-8")
    with browser() as opened:
        for name, size, scheme, place in (
            ("report.png", (1280, 1180), "light", "h1"),
            ("report-phone.png", PHONE, "dark", "#pictures-title"),
        ):
            with screen(opened, size, scheme) as (page, faults):
                page.goto(file.as_uri())
                page.wait_for_function("document.querySelectorAll('.chart svg').length === specs.length")
                page.locator(place).evaluate("node => node.scrollIntoView()")
                if faults:
                    raise SystemExit("\n".join(faults))
                taken(page, name)


def picture_site(site: Path) -> None:
    """A page of a method, on a desktop and on a phone in the dark."""
    with browser() as opened:
        for name, size, scheme in (("site.png", DESKTOP, "light"), ("site-phone.png", PHONE, "dark")):
            with screen(opened, size, scheme) as (page, _):
                page.goto((site / "methods" / "adaptformer.html").as_uri())
                taken(page, name)


def main() -> int:
    """Check the site, or take pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=ROOT / "build" / "site", help="the pages; default: build/site")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report", nargs="+", metavar="RUN", help="take the pictures of a report of these")
    what.add_argument("--pictures", action="store_true", help="take the pictures of the site")
    arguments = parser.parse_args()
    if arguments.report:
        picture_report(arguments.report)
        return 0
    if not (arguments.site / "index.html").is_file():
        parser.error(f"{arguments.site} has no index.html: build the pages with `make site`")
    if arguments.pictures:
        picture_site(arguments.site)
        return 0
    faults = check(arguments.site)
    print(f"{faults} faults.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
