"""The pages: links and anchors lead somewhere, code blocks are code, generated pages are what the source says now."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from docs.error_page import mend_of
from docs.generate import pages as generated
from docs.messages import Message, collect
from dual_policy_plugin import errors
from dual_policy_plugin.cli import main
from dual_policy_plugin.errors import DualPolicyError
from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.hydra_app.loading import known_keys
from tests.docs.pages import PAGES, ROOT, anchors, blocks, links, mentions

LANGUAGES = {"sh", "python", "yaml", "toml", "json", "text", "indented", "session", "{toctree}"}
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_and_anchor_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            assert re.fullmatch(r"https?://[\w.-]+(/\S*)?|mailto:\S+", link), link  # collected, never fetched
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: there are {sorted(anchors(target))}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_code_block_is_in_its_language(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block.where
        if block.language == "python":
            compile(block.text, block.where, "exec")
        elif block.language == "yaml":
            assert yaml.safe_load(block.text), block.where
        elif block.language == "toml":
            assert tomllib.loads(block.text), block.where
        elif block.language in ("text", "json"):
            assert not re.search(r"^(\$|dual-policy |make )", block.text, re.M), f"{block.where}: commands are `sh`"


@functools.cache
def _help_of(*command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main([*command, "--help"]) == 0, command
    return told.getvalue()


def test_commands_in_sentences_name_what_there_is() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    found = sorted({command for page in PAGES for command in mentions(page)})
    assert len(found) > 40
    for command in found:
        program, first, *rest = re.sub(r"[\[\]]", "", command).split()
        if program == "make":
            assert re.search(rf"^{first}:", makefile, re.M), command
        elif first.isalpha():
            has_second = first in ("npc", "curriculum", "launch")
            told = _help_of(first, *(rest[:1] if has_second and rest else ()))
            assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= {
                "--help",
                *re.findall(r"--[a-z-]+", told),
            }, command


def test_a_session_shows_what_the_program_says(capsys: pytest.CaptureFixture[str]) -> None:
    sessions = [block for page in PAGES for block in blocks(page) if block.language == "session"]
    assert sessions
    for block in sessions:
        command, _, answer = block.text.removeprefix("$ ").partition("\n")
        assert main(shlex.split(command)[1:]) == 2, command
        assert capsys.readouterr().err == answer


def test_the_readme_is_under_200_lines() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 200


@pytest.mark.parametrize("path", generated(), ids=lambda path: path.name)
def test_generated_pages_are_what_the_source_says(path: Path) -> None:
    assert path.read_text("utf-8") == generated()[path], f"docs/{path.name} is old; run make docs-reference"


def test_the_reference_has_every_key_that_the_config_knows() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    said, prefix = set(), ""
    for line in text.splitlines():
        prefix = (
            "" if line.startswith("## ") else f"{under[1]}." if (under := re.match(r"Under `(.*)`:", line)) else prefix
        )
        if key := re.match(r"\| `(\w+)` \|", line):
            said.add(prefix + key[1])
    older = {"policy_a_percentage", "checkpoint_path", "policy_uri", "npc_type"}
    leaves = {key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())}
    missing = {key for key in leaves - said if key.rpartition(".")[2] not in older and "initial_policy." not in key}
    assert missing <= {"cmd"}, missing
    assert len(said) > 120


def test_the_environment_variables_of_the_source_are_in_the_reference() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    named = set()
    for folder in ("dual_policy_plugin", "sky", "recipes"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".yaml"):
                named |= set(re.findall(r"\b((?:DUAL_POLICY|METTA)_[A-Z_]+[A-Z])\b", path.read_text("utf-8")))
    ours = {name for name in named if f'"{name}"' in "".join(_sources()) or name in ("DUAL_POLICY_NPC_URI",)}
    internal = {"DUAL_POLICY_ONE_LINE"}
    assert ours - internal <= set(re.findall(r"`([A-Z_]+)`", text)), ours - set(re.findall(r"`([A-Z_]+)`", text))


def _sources() -> list[str]:
    return [path.read_text("utf-8") for path in (ROOT / "dual_policy_plugin").rglob("*.py")]


def test_messages_are_read_with_their_placeholders_wordings_and_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(
        "PLACE = 'the sea'\n"
        "def f(uri, rows, is_far):\n"
        "    hint = f'use {rows[0].name}'\n"
        "    if rows:\n"
        "        raise RunError(f'{uri!r} lies in {PLACE}; {hint}')\n"
        "    check_range('env.x', rows, 1, 2.5)\n"
        "    _log.warning('%s waits for %d s', uri, rows)\n"
        "    raise StorageError('too ' + ('far' if is_far else 'near') + f' for {_told(uri)}; go')\n"
        "def _told(uri):\n"
        "    return f'the {uri}'\n"
        "def g(error):\n"
        "    raise RunError(str(error))\n"
    )
    assert collect(tmp_path) == [
        Message(module="part", text=text, exit_code=code)
        for text, code in (
            ("<uri> lies in the sea; use <name>", 2),
            ("env.x=<rows> is not possible; use a value from 1 to 2.5", 2),
            ("<uri> waits for <rows> s", None),
            ("too far for the <uri>; go", 75),
            ("too near for the <uri>; go", 75),
        )
    ]


def test_a_message_is_split_into_what_is_wrong_and_its_mend() -> None:
    assert mend_of("a lies in b; use c; or d") == ("a lies in b", "use c; or d")
    with pytest.raises(SystemExit, match="no mend for 'a lies in b'"):
        mend_of("a lies in b")


def test_the_most_common_lines_of_the_troubleshooting_page_are_real_ones() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(_sources()))
    section = page.partition("## What happens most often")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `([^`]+)` \|", section, re.M)
    assert len(lines) == 10
    for line in lines:
        for part in re.split(r"\.\.\.|[,:?] ", line):
            assert part.strip(" .,:?=") in source, part


def test_the_table_of_exit_codes_has_all_of_them() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    table = page.partition("## Exit codes")[2].partition("\n## ")[0]
    said = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", table, re.M) for code in cell.split(",")}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DualPolicyError)]
    assert len(kinds) > 5
    assert {kind.exit_code for kind in kinds} <= said


def test_the_intervals_on_the_evaluation_page_are_wilsons() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    rows = re.findall(r"\| ([\d,]+) \| (\S+) to (\S+) \| (\S+) to (\S+) \|", page)
    assert [row[0] for row in rows] == ["64", "256", "1,024", "4,096"]
    for games, *bounds in rows:
        n = int(games.replace(",", ""))
        expected = [bound for rate in (0.55, 0.9) for bound in wilson_interval(rate * n, n)]
        assert [float(bound) for bound in bounds] == pytest.approx(expected, abs=0.0051)
