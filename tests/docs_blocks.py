"""The code blocks of README and docs, and what they are given to run on.

A block is run as it stands. A comment right before it says what else the test has to know:

    <!-- given: model, loader -->      names that the block uses: the functions below, called in the block's folder
    <!-- goes on -->                   it continues the block before it, in the same folder and with the same names
    <!-- needs: trl -->                skipped where that package is not installed
    <!-- check: float(loss) < 10 -->   an expression that has to be true afterwards
    <!-- not run: why -->              only its commands' options, extras, targets and files are checked

Several in one comment are separated by `|`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(
    r"(?:^[ ]*<!--(?P<comment>[^\n]*?)-->\n+)?^(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^[ ]*```[ ]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Block:
    page: str
    line: int
    language: str
    code: str
    given: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    check: str = ""
    not_run: str = ""
    goes_on: bool = False

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        indent = len(match["indent"])
        code = "".join(part[indent:] for part in match["code"].splitlines(keepends=True))
        block = Block(page.relative_to(ROOT).as_posix(), line, match["language"], code)
        for remark in filter(None, (part.strip() for part in (match["comment"] or "").split("|"))):
            key, _, value = (part.strip() for part in remark.partition(":"))
            if key == "goes on":
                block.goes_on = True
            elif key in ("given", "needs"):
                setattr(block, key, [name.strip() for name in value.split(",")])
            elif key == "check":
                block.check = value
            elif key == "not run":
                assert value, f"{block.name}: not run, but why?"
                block.not_run = value
            else:
                raise ValueError(f"{block.name}: the comment says {remark!r}, which no test understands")
        yield block


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks_of(page)]


def chains() -> list[list[Block]]:
    """Blocks that are run together: one, and those that go on from it."""
    found: list[list[Block]] = []
    for block in all_blocks():
        if block.goes_on:
            assert found and found[-1][0].page == block.page, f"{block.name} goes on from nothing"
            found[-1].append(block)
        else:
            found.append([block])
    return found
