"""The page of public names."""

import pytest

pytest.importorskip("flax")
pytest.importorskip("grain")

import api_page


def test_the_page_is_up_to_date():
    assert api_page.PAGE.read_text() == api_page.page(), "run `python tests/api_page.py`, and commit API.md"


def test_every_name_has_a_summary_and_a_file():
    for line in api_page.page().splitlines():
        if line.startswith("- "):
            name, _, rest = line.removeprefix("- [`").partition("`](")
            where, _, summary = rest.partition(") ")
            assert (api_page.ROOT / where).is_file(), name
            assert summary.endswith((".", ":", "`", "?")), name
