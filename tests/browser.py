"""Pages in a headless Chromium."""

import re
import shutil
from pathlib import Path

import processes

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = ("headless", "no-sandbox", "disable-gpu", "enable-logging=stderr", "virtual-time-budget=5000", "dump-dom")


def browse(html: str, folder: Path, width: int = 1280) -> tuple[str, list[str]]:
    """(the page's elements once its scripts have run, messages on the console)."""
    page = folder / "page.html"
    page.write_text(html)
    flags = (*FLAGS, f"user-data-dir={folder / 'profile'}", f"window-size={width},900")
    done = processes.run([CHROMIUM, *(f"--{f}" for f in flags), page.as_uri()], 120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def with_script(html: str, script: str) -> str:
    """The page with a script of a test, which its policy would not let run."""
    free = re.sub(r"<meta http-equiv[^>]*>", "", html)
    return free.replace("</body>", f"<script>{script}</script></body>")
