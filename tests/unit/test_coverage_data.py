"""What killed processes leave of their coverage does not end the run of all tests."""

from __future__ import annotations

import pytest
from coverage import CoverageData

from tests.coverage_data import remove_broken

PAGE = 4096


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / ".coverage.machine.1.whole"
    data = CoverageData(str(path))
    data.add_arcs({f"/x/{i}.py": {(j, j + 1) for j in range(300)} for i in range(60)})
    data.close()
    return path


def test_data_that_is_whole_is_kept(whole, tmp_path):
    assert remove_broken(tmp_path) == []
    assert whole.exists()


@pytest.mark.parametrize("what", ["empty", "header", "half", "page", "text"])
def test_data_of_a_process_killed_while_it_wrote_is_removed(whole, tmp_path, what):
    content = whole.read_bytes()
    middle = len(content) // PAGE // 2 * PAGE
    broken = tmp_path / ".coverage.machine.2.broken"
    broken.write_bytes(
        {
            "empty": b"",
            "header": content[:PAGE],
            "half": content[:middle],
            "page": content[:middle] + bytes(PAGE) + content[middle + PAGE :],
            "text": b"no data " * 1000,
        }[what]
    )
    assert remove_broken(tmp_path) == [broken]
    assert whole.exists()
    assert not broken.exists()
