"""Reading the configuration file: whatever is in it, the answer says what and where."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurmgate.config import examine, load, validate
from slurmgate.errors import ConfigError
from slurmgate.model import Config
from slurmgate.share import schema_file

CONFIG = Path(__file__).parents[2] / "config"
SERVICES = json.loads((CONFIG / "services.json").read_text())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "services.json"


def refusal(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load(file)
    assert list(examine(file).problems) == refused.value.problems
    return refused.value.problems


def test_a_file_that_is_not_there(file: Path):
    assert refusal(file) == [f"{file}: cannot be read: No such file or directory"]


def test_a_folder(tmp_path: Path):
    assert refusal(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


def test_something_that_is_no_file_does_not_block(file: Path):
    os.mkfifo(file)
    assert refusal(file) == [f"{file}: not a regular file"]


def test_a_file_that_may_not_be_read(file: Path):
    if os.geteuid() == 0:
        file.symlink_to(file)  # root may read everything, but not this
    else:
        file.touch(0o000)
    [problem] = refusal(file)
    assert problem.startswith(f"{file}: cannot be read: ")


def test_a_name_with_a_zero_byte(tmp_path: Path):
    [problem] = refusal(tmp_path / "a\0b")
    assert "not a possible file name" in problem


def test_a_syntax_error_has_line_and_column(file: Path):
    file.write_text('{\n  "Services": [,]\n}')
    [problem] = refusal(file)
    assert problem == f"{file}: line 2, column 16: not valid JSON: Expecting value"


def test_a_key_given_twice(file: Path):
    document = json.dumps(SERVICES).replace('"name": "LLM"', '"name": "LLM", "name": "LLM"')
    file.write_text(document)
    assert refusal(file) == ["Services[0].name: is given twice; keep one of them"]


def test_problems_of_syntax_and_of_meaning_are_told_together(file: Path):
    file.write_text('{"Services": [], "watch": 1, "watch": 2}')
    assert [line.partition(": ")[2][:8] for line in refusal(file)] == ["is given", "2 is a n"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000])
def test_numbers_that_are_none(file: Path, number: str):
    file.write_text(json.dumps(SERVICES).replace('"timeout": 60', f'"timeout": {number}'))
    [problem] = refusal(file)
    assert problem.startswith("Services[0].timeout: NaN, Infinity and numbers beyond 1e308")


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udfff": 1}'])
def test_half_a_surrogate_pair(file: Path, text: str):
    file.write_text(f'{{"Services": [{text}]}}')
    [problem] = refusal(file)
    assert problem.startswith("Services[0]: ")
    assert "half a surrogate pair" in problem


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting(file: Path, depth: int):
    file.write_text('{"Services": ' + "[" * depth + "]" * depth + "}")
    [problem] = refusal(file)
    assert "nested" in problem


def test_text_that_is_not_utf_8(file: Path):
    file.write_bytes(b'{\n"Services": "\xe9"}')
    assert refusal(file) == [f"{file}: line 2: not UTF-8 (byte 15)"]


def test_a_byte_order_mark(file: Path):
    file.write_text(json.dumps(SERVICES), encoding="utf-8-sig")
    [problem] = refusal(file)
    assert "byte order mark" in problem


def test_a_file_that_is_too_large(file: Path):
    with file.open("wb") as output:
        output.truncate((16 << 20) + 1)
    assert refusal(file) == [f"{file}: larger than 16 MiB"]


def test_paths_are_relative_to_the_file_from_wherever_it_is_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    file.write_text(json.dumps(SERVICES | {"admin_token_file": "token"}))
    monkeypatch.chdir(file.parent)
    config = load(Path("services.json"))
    assert config.path == file
    assert config.services[0].folder == file.parent
    assert config.admin_token_file == file.parent / "token"


# Whatever the document, the answer is a configuration or a ConfigError.

KNOWN = sorted(
    {
        name
        for schema in [json.loads(schema_file().read_text())]
        for part in [schema, *schema["$defs"].values()]
        for name in part.get("properties", {})
    }
)
KEYS = st.one_of(st.sampled_from(KNOWN), st.text(max_size=5))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.sampled_from(
        ["auto", "process", "slurm", "/", "x", "127.0.0.1:80", "~nobody/x", "1G", "header:X"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=15,
)
ENTRIES = st.builds(
    lambda base, changes, gone: {k: v for k, v in (base | changes).items() if k not in gone},
    st.sampled_from(SERVICES["Services"]),
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.sets(st.sampled_from(KNOWN), max_size=1),
)
DOCUMENTS = st.one_of(
    VALUES,
    st.builds(
        lambda services, more: more | {"Services": services},
        st.lists(st.one_of(ENTRIES, VALUES), max_size=3),
        st.dictionaries(KEYS, VALUES, max_size=3),
    ),
)


def outcome(document: object) -> Config | list[str]:
    try:
        return validate(document, Path("/nowhere/services.json"))
    except ConfigError as error:
        return error.problems


@given(DOCUMENTS)
def test_any_document_gives_a_configuration_or_a_refusal(document: object):
    found = outcome(document)
    if isinstance(found, Config):
        assert all(len(spec.start_hash()) == 8 for spec in found.services)
    else:
        assert found
        assert all(": " in line and "\n" not in line for line in found)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_configuration_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
):
    file = tmp_path_factory.mktemp("any") / "services.json"
    file.write_bytes(content)
    found = examine(file)
    assert (found.config is None) == bool(found.problems)
